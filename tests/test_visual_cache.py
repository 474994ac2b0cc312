"""The frozen vision cache: the same losses, nothing decoded twice, keys that know what they stand for, refusals."""

import importlib
import json
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from conftest import PIXELS, losses_of, relative_error, run
from PIL import Image
from safetensors.torch import load_file

import ovis25.data.dataset as dataset_module
from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.data import Collator, ConversationDataset, DataError
from ovis25.data.cache.inputs import SampleKeys
from ovis25.data.cache.items import CachedDataset
from ovis25.data.cache.store import CachedVisuals, VisualCache, content_digest
from ovis25.files import REPOSITORY_ROOT
from ovis25.model.visual_tokenizer import VisualTokenizer
from ovis25.training import visual_pass
from ovis25.training.config import ConfigError, load_config
from ovis25.training.run import train

# Relative. Sums over batches of other shapes: float32 (eps 1.2e-7) rounds them otherwise; 2.4e-7 was measured.
SAME = 1e-6
# Adam turns the rounding of a gradient near zero into a whole step
SAME_WEIGHTS = 1e-3
LORA = {"use_lora": True}
RECIPES = {
    "lora": LORA,
    "trl": {"recipe": "trl", **LORA, "lora_dropout": 0.1},
    "full": {"train_modules": "llm", "learning_rate": 1e-4},
}


@pytest.fixture
def settings(data_dir, tmp_path):
    """Settings of a run with two evaluations, its cache outside of its folder."""
    return {
        "eval_data_path": str(data_dir / "eval.json"), "eval_steps": 3, "save_total_limit": 9,
        "early_stopping_patience": 0, "visual_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip


def history(output_dir) -> list[float]:
    """Training and evaluation losses, in order."""
    state = json.loads((output_dir / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in state for name in ("loss", "eval_loss") if name in entry]


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cached_run_trains_as_the_plain_one(recipe, write_config, settings, tmp_path, capsys):
    config = write_config(**settings, **RECIPES[recipe])
    run(config, "--output_dir", tmp_path / "plain")
    assert "visual_cache_dir has no effect" in capsys.readouterr().out
    run(config, "--output_dir", tmp_path / "cached", "--cache_visual_embeddings", "true")
    plain, cached = history(tmp_path / "plain"), history(tmp_path / "cached")
    assert len(plain) == 6 + 2 and cached == pytest.approx(plain, rel=SAME)
    weights = "model.safetensors" if recipe == "full" else "adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / weights) for name in ("plain", "cached"))
    assert one.keys() == other.keys()
    assert max(relative_error(other[name], value) for name, value in one.items()) < SAME_WEIGHTS
    printed = capsys.readouterr().out
    assert "16 of 16 images and clips to compute" in printed
    assert f"visual cache  16 images and clips, {_size(tmp_path / 'cache')} in {tmp_path / 'cache'}" in printed


def _size(folder) -> str:
    embeds = [load_file(path)["embeds"] for path in files(folder)]
    return f"{sum(value.nbytes for value in embeds) / 1e6:.1f} MB"


def test_after_the_pass_nothing_is_decoded_and_no_vision_runs(write_config, settings, monkeypatch):
    calls = {"decoded": [], "encoded": 0}
    opened, encode = dataset_module.open_image, VisualTokenizer.forward

    def open_image(source):
        calls["decoded"].append(source)
        return opened(source)

    def forward(self, pixels, *args):
        calls["encoded"] += len(pixels)
        return encode(self, pixels, *args)

    monkeypatch.setattr(dataset_module, "open_image", open_image)
    monkeypatch.setattr(VisualTokenizer, "forward", forward)
    config = write_config(**settings, **LORA, cache_visual_embeddings=True)
    run(config)
    assert len(calls["decoded"]) == len(set(calls["decoded"])) == 16
    num_patches = 4 * sum(len(load_file(path)["embeds"]) for path in files(config.parent / "cache"))
    assert calls["encoded"] == num_patches + 4, "each input once, and one block to learn the format"
    calls["decoded"].clear()
    run(config, "--overwrite_output_dir", "true")
    assert not calls["decoded"], "a second run finds everything"


def test_an_interrupted_run_goes_on(write_config, settings, tmp_path):
    config = write_config(**settings, **LORA, cache_visual_embeddings=True)
    run(config)
    losses = losses_of(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    (tmp_path / "out" / "checkpoint-6" / "COMPLETE").unlink()
    (tmp_path / "out" / "train_results.json").unlink()
    lost = files(tmp_path / "cache")[3]
    lost.unlink()
    run(config)
    assert losses_of(tmp_path / "out") == losses
    again = {path: path.stat().st_mtime_ns for path in files(tmp_path / "cache")}
    assert again.keys() == times.keys() and {path for path in again if again[path] != times[path]} == {lost}


def test_a_dry_run_says_the_size_and_computes_nothing(write_config, settings, tmp_path, capsys):
    train(load_config(write_config(**settings, **LORA, cache_visual_embeddings=True)), dry_run=True)
    printed = capsys.readouterr().out
    num_tokens = int(printed.split(" visual tokens)")[0].rpartition("(")[2].replace(",", ""))
    assert f"in {tmp_path / 'cache'}" in printed and "visual cache  at most" in printed and num_tokens > 17
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_modules": "all"}, "this run trains visual_tokenizer.vit, visual_tokenizer.head, vte: its output"),
        ({"train_modules": "llm|vte"}, "this run trains vte: .*Set train_modules to llm"),
        ({"train_modules": "all", "freeze_vision_tower": True}, "trains visual_tokenizer.head, vte"),
        ({"train_modules": "llm|visual_tokenizer.vit.last_block"}, "trains visual_tokenizer.vit:"),
        ({**LORA, "apply_lora_to_vision": True}, "trains visual_tokenizer.vit:"),
        ({**LORA, "lora_modules_to_save": "vte"}, "trains vte:"),
    ],
)
def test_a_trained_vision_side_is_refused(write_config, values, message):
    with pytest.raises(ConfigError, match=message):
        train(load_config(write_config(cache_visual_embeddings=True, **values)), dry_run=True)


def test_a_disk_that_is_too_small_is_refused(write_config, monkeypatch, tmp_path):
    monkeypatch.setattr(visual_pass.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(ConfigError, match=r"visual_cache_dir .*visual_cache needs .* has 0.0 MB free; name a folder"):
        run(write_config(**LORA, cache_visual_embeddings=True))
    assert not files(tmp_path)


def test_rows_that_are_made_on_demand_are_cached_too(write_config, tmp_path, capsys):
    values = {"data_path": "tiny:train:40", "max_steps": 4, "save_steps": 4, "seed": 5}
    for name in PIXELS:
        values[name] = 64 * 64 if "min" in name else 128 * 128
    config = write_config(**LORA, **values)
    run(config, "--output_dir", tmp_path / "plain")
    run(config, "--output_dir", tmp_path / "cached", "--cache_visual_embeddings", "true")
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "plain"), rel=SAME)
    assert files(tmp_path / "cached" / "visual_cache")


# -- without a model


@pytest.fixture
def pictures(tmp_path):
    """Six samples over three picture files: shared, several, frames of a clip, text."""
    generator = np.random.default_rng(1)
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")

    def turns(question, answer="It is."):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    rows = [
        {"image": "a.png", "conversations": turns("<image>What?")},
        {"image": ["a.png", "b.png"], "conversations": turns("<image><image>What?")},
        {"conversations": turns("What?")},
        {"video_frames": ["a.png", "b.png", "c.png"], "conversations": turns("<video>What?")},
        {"image": "c.png", "conversations": turns("<image>What?")},
        {"image": "a.png", "conversations": turns("<image>Other?")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


BUDGETS = {name: 128 * 128 if "max" in name else 1024 for name in PIXELS}


def keys_of(path, processor, cache=None, **options) -> list[tuple[str, ...]]:
    cache = cache or VisualCache(path.parent / "cache", "weights", 8, torch.float32)
    dataset = ConversationDataset(path, processor, **{**BUDGETS, "min_frames": 2, "max_frames": 2, **options})
    return [tuple(key for key, _ in found) for _, found in SampleKeys(dataset, cache)]


def test_keys_stand_for_content_budget_frames_and_weights(pictures, processor):
    before = keys_of(pictures, processor)
    assert [len(keys) for keys in before] == [1, 2, 0, 1, 1, 1]
    assert before[0] == before[5] and before[0][0] == before[1][0], "the same picture, read alike"
    assert len({key for keys in before for key in keys}) == 4
    assert keys_of(pictures, processor) == before

    def changed(**options) -> set[int]:
        return {index for index, keys in enumerate(keys_of(pictures, processor, **options)) if keys != before[index]}

    assert changed(cache=VisualCache(pictures.parent, "other weights", 8, torch.float32)) == {0, 1, 3, 4, 5}
    assert changed(single_image_max_pixels=64 * 64) == {0, 4, 5}
    assert changed(video_max_pixels=64 * 64) == {3}
    assert changed(max_frames=3, min_frames=3) == {3}
    # of three frames two are shown: 0 and 2
    Image.new("RGB", (96, 64)).save(pictures.parent / "b.png")
    assert changed() == {1}
    Image.new("RGB", (96, 64)).save(pictures.parent / "c.png")
    assert changed() == {1, 3, 4}


def test_a_sample_that_is_shrunk_has_its_own_key(pictures, processor):
    limit = int(ConversationDataset(pictures, processor, **BUDGETS).lengths[0]) - 1
    whole, shrunk = (keys_of(pictures, processor, multimodal_max_length=length) for length in (8192, limit))
    assert whole[0] == whole[5] and shrunk[0] == shrunk[5] != whole[0]


def test_pictures_without_files_are_known_by_their_pixels(pictures):
    image = Image.open(pictures.parent / "a.png")
    assert content_digest(image) == content_digest(image.copy())
    assert content_digest(image) != content_digest(image.rotate(180))
    path = pictures.parent / "a.png"
    assert content_digest(path) == content_digest(path.read_bytes()) == content_digest(str(path))


def test_what_a_tool_makes_is_known_by_its_pixels(processor):
    image = Image.new("RGB", (96, 64), "red")
    image.paste("blue", (0, 0, 48, 64))

    def row(box: list[float], picture: Image.Image) -> dict:
        answer = f"<tool_call>Crop {box}</tool_call><image>It is."
        turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": answer}]
        return {"image": [picture], "conversations": turns}

    rows = [row([0, 0, 0.5, 1], image), row([0, 0, 0.5, 1], image), row([0.5, 0, 1, 1], image)]
    dataset = ConversationDataset(rows, processor, **BUDGETS)
    cache = VisualCache("unused", "weights", 8, torch.float32)
    keys = [[key for key, _ in found] for _, found in SampleKeys(dataset, cache)]
    assert keys[0] == keys[1] and keys[0][0] == keys[2][0] and keys[0][1] != keys[2][1]
    assert len(keys[0]) == 2


def test_items_carry_the_embeddings_in_the_order_of_their_placeholders(pictures, processor):
    cache = VisualCache(pictures.parent / "cache", "weights", 8, torch.bfloat16)
    dataset = ConversationDataset(pictures, processor, min_frames=2, max_frames=2, **BUDGETS)
    plain, rows = [dataset[index] for index in range(6)], {}
    for row_index, found in SampleKeys(dataset, cache):
        rows[row_index] = tuple(key for key, _ in found)
        grids = plain[row_index]["grid_thws"]
        for place, (key, num_tokens) in enumerate(found):
            embeds = torch.full((num_tokens, 8), float(int(key[:2], 16)), dtype=torch.bfloat16)
            assert cache.write(key, embeds, tuple(grids[place].tolist())) is None and cache.has(key)
    dataset = CachedDataset(dataset, CachedVisuals(cache, rows))
    for index, before in enumerate(plain):
        item = dataset[index]
        assert item["input_ids"].equal(before["input_ids"]) and item["labels"].equal(before["labels"])
        assert item["pixel_values"] is None and item["grid_thws"] is None
        values = [float(int(key[:2], 16)) for key in rows[index]]
        assert item["visual_embeds"].dtype == torch.bfloat16
        assert item["visual_embeds"][:, 0].unique_consecutive().tolist() == values
        assert len(item["visual_embeds"]) == int((item["input_ids"] == -300).sum())
    batch = Collator(0)([dataset[2], dataset[1], dataset[2]])
    assert batch["visual_embeds"].equal(dataset[1]["visual_embeds"]) and "pixel_values" not in batch
    assert Collator(0)([dataset[2]])["visual_embeds"].shape == (0, 8)


def test_only_whole_files_count(tmp_path):
    cache = VisualCache(tmp_path, "weights", 8, torch.float32)
    assert not cache.has("ab12")
    cache.write("ab12", torch.ones(3, 8), (1, 2, 6))
    assert cache.has("ab12") and [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]
    path = cache.path("ab12")
    # what a killed process leaves, and what a disk that lost power may
    (path.parent / "cd34.1-2.tmp").write_bytes(path.read_bytes()[:50])
    assert not cache.has("cd34")
    path.write_bytes(path.read_bytes()[:50])
    assert not cache.has("ab12")
    cache.write("ab12", torch.ones(3, 8), (1, 2, 6))
    assert cache.read(("ab12", "ab12"))[0].shape == (6, 8) and cache.read(("ab12",))[1] == [(1, 2, 6)]
    assert not VisualCache(tmp_path, "weights", 16, torch.float32).has("ab12")
    with pytest.raises(FileNotFoundError, match="has lost ef56.safetensors: start the run again"):
        cache.read(("ab12", "ef56"))


def test_the_fingerprint_knows_vision_weights_and_format(tiny_folder):
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)
    device = torch.device("cpu")
    before = visual_pass.fingerprint(model, torch.float32, device)
    assert visual_pass.fingerprint(model, torch.bfloat16, device) != before
    with torch.no_grad():
        model.llm.model.norm.weight += 1
        assert visual_pass.fingerprint(model, torch.float32, device) == before
        for value in (model.vte.weight, model.visual_tokenizer.head[0].weight):
            value.view(-1)[7] += 1e-3
            after = visual_pass.fingerprint(model, torch.float32, device)
            assert after != before
            before = after


@pytest.fixture
def broken(write_config, data_dir, tmp_path):
    """A run over a copy of the data in which sample 4's picture (its header is sound) breaks while decoding."""
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / "4_0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return write_config(**LORA, data_path=str(tmp_path / "data" / "train.json"), cache_visual_embeddings=True)


def test_a_picture_that_breaks_while_decoding_is_an_error(broken):
    with pytest.raises(
        DataError, match=r'1 of 12 sample(?s:.*)\[4\] \(id "s4"\), field image: .*4_0.png cannot be decoded'
    ):
        run(broken)


def test_or_is_left_out_and_listed_as_without_a_cache(broken, tmp_path):
    plain = ["--on_bad_sample", "skip", "--save_steps", "6"]
    run(broken, *plain, "--output_dir", tmp_path / "plain", "--cache_visual_embeddings", "false")
    run(broken, *plain, "--output_dir", tmp_path / "cached")
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "plain"), rel=SAME)
    listed = [(tmp_path / name / "skipped_samples.jsonl").read_text() for name in ("plain", "cached")]
    assert listed[0] == listed[1] and '"s4"' in listed[0]


def write_and_read(folder) -> None:
    cache = VisualCache(folder, "weights", 64, torch.float32)
    for _ in range(20):
        for number in range(20):
            key = f"{number:02d}key"
            cache.write(key, torch.full((200, 64), float(number)), (1, 2, 400))
            embeds, grids = cache.read((key,))
            assert embeds.shape == (200, 64) and (embeds == number).all() and grids == [(1, 2, 400)]


def test_processes_that_write_the_same_files_never_see_half_of_one(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=write_and_read, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(files(tmp_path)) == 20 and not list(tmp_path.rglob("*.tmp"))


def test_workers_compute_and_read_the_same(write_config, tmp_path):
    config = write_config(**LORA, cache_visual_embeddings=True, max_steps=3, save_steps=3)
    run(config, "--output_dir", tmp_path / "alone")
    run(config, "--output_dir", tmp_path / "helped", "--dataloader_num_workers", "2")
    assert losses_of(tmp_path / "helped") == losses_of(tmp_path / "alone")


def test_the_benchmark_compares_runs_with_the_same_losses(monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY_ROOT / "benchmarks")
    benchmark = importlib.import_module("visual_cache")
    figures = benchmark.measure(num_samples=2, num_epochs=2, is_small=True)
    benchmark.report(figures)
    assert "times as fast" in capsys.readouterr().out
    assert figures["largest_loss_difference"] < SAME and len(figures["losses"]["cached"]) == 2 + 2
    assert figures["losses"]["again"] == figures["losses"]["cached"]
    # 49 visual tokens of width 512 in float32 for each of four pictures, and a header each
    assert 0 < figures["cache_bytes"] - 4 * 49 * 512 * 4 < 4 * 1000
    assert all(len(run["epochs_s"]) == len(run["evaluations_s"]) == 2 for run in figures["runs"].values())


def test_the_processor_gives_positions_for_grids_alone(processor):
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It."}]
    item = processor.encode_training(turns, grids=[(1, 4, 6)])
    assert int((item["input_ids"] == -300).sum()) == 6 and item["pixel_values"] is None
    assert isinstance(processor, Ovis2_5Processor)
