"""What a run resumes, and what it refuses to: changed data, changed weights, damaged checkpoints, other runs'."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import losses_of, run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from ovis25 import cli
from ovis25.checkpoint import sampled_digest, weights_digest
from ovis25.cli import train_main
from ovis25.training import checkpoints, finish, resume
from ovis25.training.checkpoints import damage_of, find_checkpoints, read_mark, rotate
from ovis25.training.config import ConfigError, load_config
from ovis25.training.run import train

WAYS_OUT = ("--output_dir", "--overwrite_output_dir true", "--resume_anyway true")


@pytest.fixture
def own(write_config, data_dir, tiny_folder, tmp_path):
    """A config over copies of the data and the base, which a test may change: checkpoints at 2 and 4 of 4 steps."""
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(tiny_folder, tmp_path / "base")

    def write(**settings) -> Path:
        return write_config(**{
            "model_path": str(tmp_path / "base"), "data_path": str(tmp_path / "data" / "train.json"), "max_steps": 4,
            "save_steps": 2, "save_total_limit": 5, **settings,
        })  # fmt: skip

    return write


@pytest.fixture
def cut(own, tmp_path):
    """As `own`, after a run that was killed after its second step."""

    def write(**settings) -> Path:
        config = own(**settings)
        run(config)
        cut_off(tmp_path / "out")
        return config

    return write


def cut_off(out: Path, after: int = 2) -> None:
    """Leave what a run that was killed after a checkpoint leaves."""
    for folder in find_checkpoints(out)[0]:
        if checkpoints.number_of(folder) > after:
            shutil.rmtree(folder)
    for name in ("train_results.json", "model.safetensors"):
        (out / name).unlink()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def change_data(folder: Path) -> None:
    edit(folder / "data" / "train.json", "It is 3.", "It is 4.")


def change_evaluation(folder: Path) -> None:
    edit(folder / "data" / "eval.json", "What is 14", "What is 15")


def change_picture(folder: Path) -> None:
    path = sorted((folder / "data").glob("*.png"))[0]
    with Image.open(path) as image:
        turned = image.resize((image.width * 2, image.height * 2))
    turned.save(path)


def change_base(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    weights["vte.weight"] += 1.0
    save_file(weights, path, {"format": "pt"})


CHANGES = {
    "data_path": change_data, "eval_data_path": change_evaluation, "samples of data_path": change_picture,
    "model_path": change_base,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_and_refused(name, cut, tmp_path):
    """And is gone on with where the user says so, with a note."""
    config = cut(eval_data_path=str(tmp_path / "data" / "eval.json"), eval_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    CHANGES[name](tmp_path)
    with pytest.raises(ConfigError) as error:
        run(config)
    (line,) = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert line.startswith(f"  {name}: ") and " there, " in line and line.endswith(" now")
    assert all(way in str(error.value) for way in WAYS_OUT)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    results = run(config, "--resume_anyway", "true")
    plan = json.loads((tmp_path / "out" / "train_plan.json").read_text())
    assert results["global_step"] == 4 and "checkpoint-2" in plan["resumes_from"]
    assert any(note.startswith(f"goes on all the same with another {name}: ") for note in plan["notes"])


def test_a_wish_to_resume_means_what_it_meant(cut, tmp_path):
    config = cut()
    change_data(tmp_path)
    assert run(config, "--resume_from_checkpoint", "true", "--learning_rate", 5e-4)["global_step"] == 4


def test_other_settings_go_on_with_resume_anyway(cut, tmp_path):
    config = cut()
    with pytest.raises(ConfigError, match="learning_rate: 0.001 there, 0.0005 now"):
        run(config, "--learning_rate", 5e-4)
    results = run(config, "--learning_rate", 5e-4, "--resume_anyway", "true")
    assert results["global_step"] == 4


def test_a_finished_run_on_other_data_is_no_finished_run(own, tmp_path):
    config = own()
    run(config)
    change_data(tmp_path)
    with pytest.raises(ConfigError, match="data_path: "):
        run(config)


def test_a_run_that_saved_nothing_yet_begins_anew_on_other_data(own, tmp_path):
    config = own()
    run(config)
    cut_off(tmp_path / "out", after=0)
    change_data(tmp_path)
    assert run(config)["global_step"] == 4


def test_another_number_of_processes_is_refused(own, tiny_folder):
    config = load_config(own())
    one, two = (resume.sources_of(config, tiny_folder, number) for number in (1, 2))
    before = {name: vars(source) for name, source in one.items()}
    assert resume.check_same_sources(config, before, one) == []
    with pytest.raises(ConfigError, match=r"number of processes: 1 \(\w+\) there, 2 \(\w+\) now"):
        resume.check_same_sources(config, before, two)


def test_data_sources_are_contents(tmp_path):
    """A copied file is the same, a datainfo's files count, generated data are what their source says."""
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('[{"id": "x"}]')
    digests = {name: resume.data_source(str(tmp_path / name)).digest for name in ("a.json", "b.json")}
    assert digests["a.json"] == digests["b.json"]
    entry = {"meta_file": "a.json", "image_dir": ".", "data_format": "conversation"}
    (tmp_path / "info.json").write_text(json.dumps({"a": entry}))
    joined = resume.data_source(f"datainfo:{tmp_path / 'info.json'}:a")
    (tmp_path / "a.json").write_text('[{"id": "y"}]')
    assert resume.data_source(f"datainfo:{tmp_path / 'info.json'}:a").digest != joined.digest
    assert resume.data_source("tiny:train:64") == resume.data_source("tiny:train:64")
    assert resume.data_source("tiny:train:64").digest != resume.data_source("tiny:train:65").digest
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert resume.data_source(both).digest != resume.data_source(both[::-1]).digest


def test_weights_of_other_bytes_or_names_have_other_digests(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1_000_000), "b": torch.ones(3)}, tmp_path / name / "model.safetensors")
    one = weights_digest(tmp_path / "one")
    assert len(one) == 64 and one == weights_digest(tmp_path / "two")
    path = tmp_path / "two" / "model.safetensors"
    for change in ({"a": torch.full((1_000_000,), 2.0), "b": torch.ones(3)}, {"c": torch.zeros(1_000_000)}):
        save_file(change, path)
        assert weights_digest(tmp_path / "two") != one
    path.write_bytes(path.read_bytes()[:-1])
    assert sampled_digest(path) != sampled_digest(tmp_path / "one" / "model.safetensors")


def test_a_checkpoint_of_weights_alone_is_refused(cut, tmp_path, capsys):
    config = cut(save_only_model=True)
    assert train_main([str(config)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "holds weights alone (save_only_model)" in line and "--model_path" in line and "checkpoint-2" in line
    # its weights can be started from, as the message says
    anew = run(config, "--model_path", tmp_path / "out" / "checkpoint-2", "--output_dir", tmp_path / "anew")
    assert anew["global_step"] == 4


def test_the_end_of_a_run_of_weights_alone_is_still_saved(own, tmp_path, capsys):
    config = own(save_only_model=True)
    run(config)
    saved = (tmp_path / "out" / "model.safetensors").read_bytes()
    cut_off(tmp_path / "out", after=4)
    assert run(config)["global_step"] == 4 and "checkpoint-4 is the end of this run" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == saved


def test_an_adapter_whose_final_save_was_missing_is_the_same(own, tmp_path):
    config = own(use_lora=True, lora_modules_to_save=["vte"])
    run(config)
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".txt")}
    assert "adapter_model.safetensors" in before
    for name in ("train_results.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    run(config)
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".txt")}
    assert (out / "adapter_config.json").is_file() and not (out / "optimizer.pt").exists()


def test_the_best_checkpoint_is_found_where_the_folder_has_moved(own, tmp_path):
    config = own(eval_data_path=str(tmp_path / "data" / "eval.json"), eval_steps=2, learning_rate=1e-9)
    results = run(config)
    (tmp_path / "out" / "train_results.json").unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    again = run(config, "--output_dir", tmp_path / "moved")
    assert again["best_checkpoint"] == results["best_checkpoint"]
    shutil.rmtree(tmp_path / "moved" / results["best_checkpoint"])
    (tmp_path / "moved" / "train_results.json").unlink()
    if results["best_checkpoint"] != "checkpoint-4":
        with pytest.raises(ConfigError, match="cannot be used: it is gone"):
            run(config, "--output_dir", tmp_path / "moved")


def damage_missing(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def damage_empty(folder: Path) -> None:
    (folder / "trainer_state.json").write_bytes(b"")


def damage_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_zeros(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))


def damage_other_step(folder: Path) -> None:
    for name in ("trainer_state.json", "scheduler.pt"):
        shutil.copyfile(folder.parent / "checkpoint-2" / name, folder / name)


def damage_mark(folder: Path) -> None:
    (folder / "COMPLETE").write_bytes(b"")


def damage_place(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "checkpoint-2", folder)


DAMAGES = [
    damage_missing, damage_empty, damage_cut, damage_zeros, damage_other_step, damage_mark, damage_place,
]  # fmt: skip


def test_every_damage_is_seen(own, tmp_path):
    run(own())
    folder, kept = tmp_path / "out" / "checkpoint-4", tmp_path / "kept"
    assert damage_of(folder) is None
    shutil.copytree(folder, kept)
    for damage in DAMAGES:
        damage(folder)
        assert damage_of(folder), damage.__name__
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        assert damage_of(folder) is None


@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_mark])
def test_the_checkpoint_before_a_damaged_one_is_used_and_said_so(damage, own, tmp_path, capsys):
    config = own()
    run(config)
    losses, weights = losses_of(tmp_path / "out"), (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "train_results.json").unlink()
    damage(tmp_path / "out" / "checkpoint-4")
    capsys.readouterr()
    run(config)
    said = capsys.readouterr().out
    assert "note: checkpoint-4 is damaged (" in said and "and is passed over" in said and "from checkpoint-2" in said
    assert losses_of(tmp_path / "out") == losses and damage_of(tmp_path / "out" / "checkpoint-4") is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_a_finished_run_needs_no_checkpoints(own, tmp_path, capsys):
    config = own()
    run(config)
    for folder in find_checkpoints(tmp_path / "out")[0]:
        damage_missing(folder)
    assert run(config)["finished"] and "nothing to train" in capsys.readouterr().out


def test_a_checkpoint_that_would_be_deleted_first_is_not_gone_on_from(own, tmp_path):
    config = own()
    run(config)
    wish = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2", "--overwrite_output_dir", "true"]
    with pytest.raises(ConfigError, match="checkpoint-2 lies in the folder that overwrite_output_dir would delete"):
        run(config, *wish)
    assert damage_of(tmp_path / "out" / "checkpoint-2") is None


def test_no_whole_checkpoint_is_one_clear_error(own, tmp_path, capsys):
    config = own()
    run(config)
    (tmp_path / "out" / "train_results.json").unlink()
    damage_cut(tmp_path / "out" / "checkpoint-4")
    damage_missing(tmp_path / "out" / "checkpoint-2")
    assert train_main([str(config)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "checkpoint-4 is damaged (model.safetensors has " in line and "checkpoint-2 is damaged (optimizer.pt" in line
    assert "--resume_from_checkpoint false" in line


@pytest.mark.parametrize("name", ["train_results.json", "train_config.json", "train_run.json"])
@pytest.mark.parametrize("content", [b"", b'{"finished": tr', b"[1]", b"\xff\xfe\x00"])
def test_a_record_that_cannot_be_read_is_one_line(name, content, own, tmp_path, capsys):
    config = own()
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "COMPLETE").write_text('{"files": {}, "step": 2}')
    (tmp_path / "out" / name).write_bytes(content)
    assert train_main([str(config)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert name in line and "delete it" in line


class Killed(RuntimeError):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_a_run_begun_anew_never_goes_on_from_the_old_runs_checkpoints(own, tmp_path, capsys):
    config = own()
    run(config)
    cut_off(tmp_path / "out")
    old = json.loads((tmp_path / "out" / "train_run.json").read_text())["run_id"]
    with pytest.raises(Killed):
        train(load_config(config, ["--resume_from_checkpoint", "false"]), callbacks=[KillAt(1)])
    assert json.loads((tmp_path / "out" / "train_run.json").read_text())["run_id"] != old
    assert "an earlier run's checkpoints were moved to" in capsys.readouterr().out
    assert read_mark(tmp_path / "out" / "earlier_run-1" / "checkpoint-2")["run_id"] == old
    run(config)
    assert json.loads((tmp_path / "out" / "train_plan.json").read_text())["resumes_from"] is None


def test_another_runs_checkpoint_in_its_place_is_passed_over(own, tmp_path, capsys):
    config = own()
    run(config, "--output_dir", tmp_path / "other", "--seed", "4")
    run(config)
    cut_off(tmp_path / "out")
    shutil.copytree(tmp_path / "other" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    run(config)
    assert "checkpoint-4 belongs to another run and is passed over" in capsys.readouterr().out
    assert damage_of(tmp_path / "out" / "checkpoint-4") is None
    marks = [read_mark(tmp_path / "out" / f"checkpoint-{step}")["run_id"] for step in (2, 4)]
    assert marks[0] == marks[1]


def test_the_mark_goes_before_a_checkpoint_is_written_again(own, tmp_path, monkeypatch):
    config = own()
    run(config)
    (tmp_path / "out" / "train_results.json").unlink()
    damage_missing(tmp_path / "out" / "checkpoint-4")

    def killed(self, *args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "save_model", killed)
        run(config)
    complete, _ = find_checkpoints(tmp_path / "out")
    assert [folder.name for folder in complete] == ["checkpoint-2"]
    assert run(config)["global_step"] == 4


def test_counts_are_those_of_the_whole_run(own, tmp_path):
    config = own()
    whole = run(config)
    mark = read_mark(tmp_path / "out" / "checkpoint-2")["progress"]
    assert 0 < mark["tokens"] < whole["train_tokens"]
    cut_off(tmp_path / "out")
    resumed = run(config)
    assert resumed["train_tokens"] == whole["train_tokens"]
    assert resumed["train_seconds"] >= mark["seconds"]


def test_rotation_keeps_the_newest_and_the_best_and_drops_what_comes_again(tmp_path):
    def make(*steps: int) -> None:
        for step in steps:
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir(exist_ok=True)
            checkpoints.mark_complete(folder, {})

    def left(newest: int, best: str | None, limit: int | None) -> list[int]:
        rotate(tmp_path, tmp_path / f"checkpoint-{newest}", best, limit)
        return [checkpoints.number_of(folder) for folder in sum(find_checkpoints(tmp_path), [])]

    make(2, 4, 6, 8)
    assert left(8, None, None) == [2, 4, 6, 8]
    assert left(6, None, 3) == [2, 4, 6]
    (tmp_path / "checkpoint-5").mkdir()
    assert left(6, "/elsewhere/checkpoint-2", 3) == [2, 4, 6]
    assert left(6, "/elsewhere/checkpoint-2", 1) == [2, 6]
    make(9, 10)
    assert left(6, None, 1) == [6]


def test_a_failure_after_saving_says_that_the_model_is_saved(own, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise OSError("no space left\nat all")

    monkeypatch.setattr(finish, "draw_curves", fails)
    assert train_main([str(own())]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.endswith("but the drawing of the curves failed: OSError: no space left")
    assert f"the model is saved in {tmp_path / 'out'}" in line
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["finished"]


def test_a_failing_exam_says_that_the_model_is_saved(own, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise KeyError("answers")

    monkeypatch.setattr(cli, "hold_exam", fails)
    config = own(data_path="tiny:train:8", exam=True, max_steps=1, multimodal_max_length=512)
    assert train_main([str(config)]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == f"error: the model is saved in {tmp_path / 'out'}, but the exam failed: KeyError: 'answers'"
    assert (tmp_path / "out" / "model.safetensors").is_file()
