"""Model folders that are damaged, confused or unfinished: one line before anything runs, and nothing is touched."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, run
from safetensors.torch import load_file, save_file

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.checkpoint import CheckpointError, copy_side_files, side_files
from ovis25.cli import main
from ovis25.data.visual_cache import VisualCache
from ovis25.model.folder import check_folder
from ovis25.tokenizer_files import check_tokenizer
from ovis25.training.config import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "llm.model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture(scope="session")
def sharded_source(tiny_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "base"
    Ovis2_5.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.fixture
def sharded(sharded_source, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def flip_header(folder: Path) -> None:
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(8)
        file.write(b"#")


def rename_to_port(folder: Path) -> None:
    change_weights(
        folder / WEIGHTS,
        lambda t: t.update({n.replace("llm.model", "model.language_model"): t.pop(n) for n in list(t)}),
    )


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def half_downloaded(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete")


def linked_to_nothing(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to("../../blobs/0123")


def fewer_words(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(list(vocab.items())[:100])))


def real_rows(folder: Path) -> None:
    """The embedding of the released size over the tiny tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 151936
    (folder / "config.json").write_text(json.dumps(config))
    rows = torch.zeros(151936, config["hidden_size"])
    change_weights(folder / WEIGHTS, lambda t: t.update({EMBEDDING: rows}))


def fewer_rows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 390
    (folder / "config.json").write_text(json.dumps(config))
    change_weights(folder / WEIGHTS, lambda t: t.update({EMBEDDING: t[EMBEDDING][:390].clone()}))


DAMAGES = {
    "no tokenizer": (remove("vocab.json", "merges.txt"), r"lacks its tokenizer: neither vocab.json and merges.txt"),
    "no vocab": (remove("vocab.json"), r"vocab.json is missing"),
    "no merges": (remove("merges.txt"), r"merges.txt is missing"),
    "no tokenizer config": (remove("tokenizer_config.json"), r"tokenizer_config.json is missing"),
    "empty vocab": (write("vocab.json", ""), r"vocab.json is empty \(0 bytes\)"),
    "vocab of nothing": (write("vocab.json", "{}"), r"merges.txt: .* merges make no token|lacks 256 of the 256"),
    "pointer vocab": (write("vocab.json", POINTER), r"vocab.json is a git-lfs pointer.*git lfs pull"),
    "pointer merges": (write("merges.txt", POINTER), r"merges.txt is a git-lfs pointer"),
    "pointer weights": (write(WEIGHTS, POINTER), r"model.safetensors is a git-lfs pointer"),
    "pointer config": (write("config.json", POINTER), r"config.json is a git-lfs pointer"),
    "pointer generation": (write("generation_config.json", POINTER), r"generation_config.json is a git-lfs pointer"),
    "cut vocab": (lambda f: cut(f / "vocab.json"), r"vocab.json is no valid JSON.*cut or damaged"),
    "fewer words": (fewer_words, r"merges.txt: .*merges make no token|lacks \d+ of the 256 byte tokens"),
    "cut merges": (lambda f: cut(f / "merges.txt"), r"merges.txt: of \d+ tokens, \d+ are made by none"),
    "cut tokenizer config": (lambda f: cut(f / "tokenizer_config.json"), r"tokenizer_config.json is no valid JSON"),
    "cut tokenizer.json": (write("tokenizer.json", '{"model": {"vocab"'), r"tokenizer.json is no valid JSON"),
    "other tokenizer.json": (write("tokenizer.json", "{}"), r"tokenizer.json describes no byte-pair tokenizer"),
    "link to nothing": (linked_to_nothing, r"vocab.json is a link to ../../blobs/0123, which does not exist"),
    "tiny tokenizer": (real_rows, r"the tokenizer has 393 tokens, but the embedding has 151,936 rows"),
    "token without a row": (fewer_rows, r"has the id 392, but the embedding has 390 rows"),
    "no weights": (remove(WEIGHTS), r"holds no weights: neither model.safetensors nor"),
    "unfinished": (half_downloaded, r"holds no weights.*download was not finished: model.safetensors.incomplete"),
    "cut weights": (lambda f: cut(f / WEIGHTS), r"model.safetensors is cut: it has [\d,]+ bytes, .*describes [\d,]+"),
    "cut header": (lambda f: cut(f / WEIGHTS, 0.0001), r"model.safetensors is cut: it ends within its header"),
    "longer weights": (lambda f: os.truncate(f / WEIGHTS, 10**7), r"model.safetensors is damaged: it has 10,000,000"),
    "empty weights": (write(WEIGHTS, ""), r"model.safetensors is empty"),
    "no safetensors": (write(WEIGHTS, "<html>Not found, but long enough</html>"), r"is no safetensors file"),
    "broken header": (flip_header, r"is no safetensors file: its header is damaged"),
    "pickled": (pickled, r"pickled files alone \(pytorch_model.bin\), which can run any program"),
    "one tensor less": (lambda f: change_weights(f / WEIGHTS, lambda t: t.pop("vte.weight")), r"lacks vte.weight"),
    "one tensor more": (
        lambda f: change_weights(f / WEIGHTS, lambda t: t.update(extra=torch.zeros(2))),
        r"holds weights that the model does not have: extra",
    ),
    "wrong shape": (
        lambda f: change_weights(f / WEIGHTS, lambda t: t.update({"vte.weight": torch.zeros(512, 64)})),
        r"vte.weight has the shape 512 x 64, config.json wants 512 x 128",
    ),
    "whole numbers": (
        lambda f: change_weights(f / WEIGHTS, lambda t: t.update({"vte.weight": t["vte.weight"].to(torch.int8)})),
        r"vte.weight holds I8 numbers",
    ),
    "port": (rename_to_port, r"layout of transformers' own port of Ovis2.5 \(model.language_model"),
    "no config": (remove("config.json"), r"config.json is missing"),
    "cut config": (lambda f: cut(f / "config.json"), r"config.json is no valid JSON.*cut or damaged"),
    "list config": (write("config.json", "[1]"), r"config.json must hold one JSON object"),
    "other model": (lambda f: change_json(f / "config.json", model_type="qwen3"), r"model_type is 'qwen3'"),
    "port config": (
        lambda f: change_json(f / "config.json", text_config={}, vision_config={}, llm_config=None, vit_config=None),
        r"text_config and vision_config.*port",
    ),
    "cut generation": (lambda f: cut(f / "generation_config.json"), r"generation_config.json is no valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


SHARD_DAMAGES = {
    "no index": (remove(INDEX), r"but not model.safetensors.index.json"),
    "one shard less": (remove("model-00002-of-00005.safetensors"), r"model-00002-of-00005.safetensors is missing"),
    "shard of a pointer": (write("model-00001-of-00005.safetensors", POINTER), r"00001-of-00005.* git-lfs pointer"),
    "cut shard": (lambda f: cut(f / "model-00003-of-00005.safetensors"), r"model-00003-of-00005.safetensors is cut"),
    "cut index": (lambda f: cut(f / INDEX), r"index.json is no valid JSON"),
    "empty index": (write(INDEX, '{"weight_map": {}}'), r"names no weights"),
    "index out of the folder": (write(INDEX, '{"weight_map": {"a": "../x"}}'), r"is no file of its own folder"),
    "shards of another cut": (
        lambda f: shutil.copyfile(f / "model-00001-of-00005.safetensors", f / "model-00002-of-00005.safetensors"),
        r"model-00002-of-00005.safetensors lacks .*which model.safetensors.index.json looks for there",
    ),
    "unfinished shard": (
        lambda f: (f / "model-00002-of-00005.safetensors").rename(f / "model-00002-of-00005.safetensors.part"),
        r"00002-of-00005.safetensors is missing \(a download was not finished: model-00002-of-00005.safetensors.part",
    ),
}


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_damaged_shards_are_named(sharded, name):
    damage, message = SHARD_DAMAGES[name]
    check_folder(sharded)
    damage(sharded)
    for load in (check_folder, Ovis2_5.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(sharded)


def test_whole_folders_pass(folder, sharded, golden):
    check_folder(folder)
    check_folder(sharded)
    check_tokenizer(golden.tokenizer_folder)
    # what transformers itself writes for a tokenizer
    Ovis2_5Processor.from_pretrained(folder).tokenizer.save_pretrained(folder.parent / "rewritten")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    for file in (folder.parent / "rewritten").iterdir():
        shutil.copyfile(file, folder / file.name)
    check_folder(folder)


def test_the_cure_is_a_command_where_the_hub_name_is_known(folder, tmp_path):
    change_json(folder / "config.json", _name_or_path="AIDC-AI/Ovis2.5-2B")
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"hf download AIDC-AI/Ovis2.5-2B --include merges.txt --local-dir"):
        check_folder(folder)
    snapshot = tmp_path / "models--AIDC-AI--Ovis2.5-9B" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    with pytest.raises(CheckpointError, match=r"hf download AIDC-AI/Ovis2.5-9B --include merges.txt --force-download"):
        check_folder(snapshot)


@pytest.mark.parametrize("command", ["train", "dry-run", "plan", "infer", "chat"])
def test_every_command_says_it_first(folder, write_config, tmp_path, command, capsys):
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    config = str(write_config(model_path=str(folder)))
    arguments = {
        "train": ["train", config],
        "dry-run": ["train", config, "--dry-run"],
        "plan": ["plan", config],
        "infer": ["infer", str(folder), "--prompt", "Hi"],
        "chat": ["chat", str(folder)],
    }[command]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "vocab.json" in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


def test_the_processor_alone_refuses_half_a_tokenizer(folder):
    (folder / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="vocab.json is missing"):
        Ovis2_5Processor.from_pretrained(folder)


# -- output folders


def state(folder: Path) -> dict[str, tuple]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("place", ["itself", "inside", "holds", "link", "dots", "home of a link"])
@pytest.mark.parametrize("values", [{}, {"use_lora": True}, {"overwrite_output_dir": True}], ids=str)
def test_the_output_never_lies_over_the_model(folder, write_config, tmp_path, place, values):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "model").symlink_to(folder)
    # what a run that is deleted first would take away
    (folder / "checkpoint-1").mkdir()
    output, model = {
        "itself": (folder, folder),
        "inside": (folder / "runs" / "1", folder),
        "holds": (folder, folder / "checkpoint-1"),
        "link": (tmp_path / "link", folder),
        "dots": (folder / "checkpoint-1" / "..", folder),
        "home of a link": (folder, tmp_path / "parent" / "model"),
    }[place]
    before = state(folder)
    config = write_config(model_path=str(model), output_dir=str(output), **values)
    with pytest.raises(ConfigError, match=r"output_dir .* (is|lies in|holds) the model's folder") as caught:
        run(config)
    assert state(folder) == before and "\n" not in str(caught.value)


def test_an_output_beside_model_and_pictures_is_fine(folder, write_config, data_dir, tmp_path):
    results = run(write_config(model_path=str(folder), max_steps=1, output_dir=str(tmp_path / "basement")))
    assert results["finished"]


# -- side files that are links


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "README.txt").write_text("own")
    (folder / "again.txt").symlink_to("README.txt")
    with pytest.warns(UserWarning, match=r"notes.txt is a link out of its folder.*was not copied"):
        copy_side_files(folder, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "notes.txt" not in names and {"again.txt", "README.txt", "vocab.json"} <= names
    assert "notes.txt" not in {file.name for file in side_files(folder)}
    (tmp_path / "out" / "merges.txt").unlink()
    (tmp_path / "out" / "merges.txt").symlink_to(secret)
    with pytest.warns(UserWarning, match="notes.txt"):
        copy_side_files(folder, tmp_path / "out")
    assert secret.read_text() == "private"


@pytest.mark.parametrize("is_cache", [True, False])
def test_the_hubs_cache_consists_of_links(tiny_folder, tmp_path, is_cache):
    home = tmp_path / ("models--AIDC-AI--Ovis2.5-2B" if is_cache else "data")
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_folder.iterdir():
        shutil.copyfile(file, blobs / f"of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/of-{file.name}")
    check_folder(snapshot)
    model, processor = Ovis2_5.from_pretrained(snapshot), Ovis2_5Processor.from_pretrained(snapshot)
    out = tmp_path / "out"
    if is_cache:
        model.save_pretrained(out)
        assert (out / "vocab.json").read_bytes() == (tiny_folder / "vocab.json").read_bytes()
        assert not any(file.is_symlink() for file in out.iterdir())
    else:
        # the tokenizer is written from memory then
        with pytest.warns(UserWarning, match="link out of its folder"):
            processor.save_pretrained(out)
        text = "What is 1 + 1?"
        assert Ovis2_5Processor.from_pretrained(out).tokenizer(text) == processor.tokenizer(text)


# -- who may read what was saved


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_saved_files_follow_the_umask(umask, folder, write_config, tmp_path):
    from_run = {"model_path": str(folder), "max_steps": 1, "save_steps": 1}
    run(write_config(**from_run, output_dir=str(tmp_path / "whole")))
    run(write_config(**from_run, output_dir=str(tmp_path / "lora"), use_lora=True, cache_visual_embeddings=True))
    merging = ["merge", "--adapter_path", str(tmp_path / "lora"), "--output_path", str(tmp_path / "merged")]
    assert main(merging) == 0
    seen = set()
    for name in ("whole", "lora", "merged"):
        for path in (tmp_path / name, *(tmp_path / name).rglob("*")):
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
            seen.add(path.name)
    assert {WEIGHTS, "adapter_model.safetensors", "checkpoint-1", "visual_cache"} <= seen


def test_a_cached_embedding_follows_the_umask(umask, tmp_path):
    cache = VisualCache(tmp_path, "x", 4, torch.float32)
    cache.write("ab", torch.zeros(1, 4), (1, 2, 2))
    assert stat.S_IMODE(cache.path("ab").stat().st_mode) == 0o666 & ~umask


# -- the dtype of a saved copy


def test_saving_a_copy_leaves_the_model_as_it_is(folder, tmp_path):
    model = Ovis2_5.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "half", state_dict={n: v.bfloat16() for n, v in model.state_dict().items()})
    assert str(model.config.dtype).endswith("float32") and model.dtype == torch.float32
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model.save_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_golden_tokenizer_beside_the_golden_weights(released_folder):
    """Its words have ids that the tiny embedding has no rows for: it loads apart, and is refused as a whole."""
    Ovis2_5.from_pretrained(released_folder)
    Ovis2_5Processor.from_pretrained(released_folder)
    with pytest.raises(CheckpointError, match="has the id 151,668, but the embedding has 512 rows"):
        check_folder(released_folder)
    assert GOLDEN.is_dir()
