"""Skipped means absent: what breaks while decoding counts in no loss, is listed once, and ends no run in a stack."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PIXELS, losses_of, run
from PIL import Image
from safetensors.torch import load_file
from test_training import launch

from ovis25.cli import train_main
from ovis25.constants import IGNORE_INDEX
from ovis25.data import Collator, ConversationDataset, DataError
from ovis25.data.errors import SampleError
from ovis25.data.packed import PackedDataset

# Relative. Sums over batches of other shapes: float32 (eps 1.2e-7) rounds them otherwise.
SAME = 1e-6
SKIP = {"on_bad_sample": "skip", "train_sampling_strategy": "sequential", "optim": "sgd"}


def cut(path) -> None:
    """A picture whose header is sound and whose pixels end early."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def broken_row(name: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing at all."}]
    return {"id": name, "image": f"{name}.png", "conversations": turns}


@pytest.fixture
def sets(data_dir, tmp_path):
    """(good, mixed): the first four samples, and the same with two broken ones among them."""
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    good = json.loads((folder / "train.json").read_text())[:4]
    for name in ("x", "y"):
        cut(folder / f"{name}.png")
    mixed = [good[0], broken_row("x"), *good[1:], broken_row("y")]
    paths = (folder / "good.json", folder / "mixed.json")
    for path, rows in zip(paths, (good, mixed), strict=True):
        path.write_text(json.dumps(rows))
    return paths


def listed(folder) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "skipped_samples.jsonl").read_text().splitlines()]


def eval_loss(folder, step=1) -> float:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)


WAYS = {
    "one batch": ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 6}),
    "accumulated": ({"per_device_train_batch_size": 4},
                    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}),
    "workers": ({"per_device_train_batch_size": 4},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "dataloader_num_workers": 2}),
    "packed": ({"packing": True, "multimodal_max_length": 400}, {"packing": True, "multimodal_max_length": 400}),
    "rows of one": ({"packing": True, "multimodal_max_length": 400},
                    {"packing": True, "multimodal_max_length": 45, "per_device_train_batch_size": 9}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_the_mean_over_the_others(way, write_config, sets, tmp_path):
    """One step over the set; then an evaluation of the model that it gave."""
    good, mixed = WAYS[way]
    for name, path, settings in (("good", sets[0], good), ("mixed", sets[1], mixed)):
        config = write_config(**SKIP, **settings, data_path=str(path), eval_data_path=str(path), max_steps=1,
                              eval_steps=1, per_device_eval_batch_size=2)  # fmt: skip
        run(config, "--output_dir", tmp_path / name)
    assert losses_of(tmp_path / "mixed") == pytest.approx(losses_of(tmp_path / "good"), rel=SAME)
    assert eval_loss(tmp_path / "mixed") == pytest.approx(eval_loss(tmp_path / "good"), rel=SAME)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("good", "mixed"))
    assert all(torch.allclose(other[name], value, atol=1e-6) for name, value in one.items())
    assert (
        sorted(listed(tmp_path / "mixed")) == ["x", "y"] and not (tmp_path / "good" / "skipped_samples.jsonl").exists()
    )


def test_each_is_listed_once_over_epochs_workers_and_restarts(write_config, sets, tmp_path):
    config = write_config(on_bad_sample="skip", data_path=str(sets[1]), num_train_epochs=4, dataloader_num_workers=2,
                          eval_data_path=str(sets[1]), eval_steps=3, early_stopping_patience=0)  # fmt: skip
    run(config)
    assert sorted(listed(tmp_path / "out")) == ["x", "y"]
    (tmp_path / "out" / "train_results.json").unlink()
    (tmp_path / "out" / "checkpoint-12" / "COMPLETE").unlink()
    run(config)
    assert sorted(listed(tmp_path / "out")) == ["x", "y"]


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "cache_visual_embeddings": True}], ids=["plain", "cached"])
def test_a_step_without_any_token_makes_no_number_nan(settings, write_config, sets, tmp_path):
    """Batches of one, in order: the second step and the last have nothing to learn."""
    run(write_config(**SKIP, **settings, data_path=str(sets[1]), per_device_train_batch_size=1, save_steps=6))
    losses = losses_of(tmp_path / "out")
    assert losses[2] == losses[6] == 0.0 and all(losses[step] > 0.1 for step in (1, 3, 4, 5))
    (weights,) = (tmp_path / "out").glob("*model.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(weights).values())
    assert sorted(listed(tmp_path / "out")) == ["x", "y"]


def test_two_processes_stay_in_step(write_config, sets, tmp_path):
    """Three batches of two ranks: one rank of the first and one of the last has a broken sample."""
    settings = {**SKIP, "data_path": str(sets[1]), "eval_data_path": str(sets[1]), "max_steps": 3, "eval_steps": 3}
    config = write_config(**settings)
    run(config, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "one")
    launch(2, config, "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "two")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert eval_loss(tmp_path / "two", 3) == pytest.approx(eval_loss(tmp_path / "one", 3), rel=1e-4)
    assert sorted(listed(tmp_path / "two")) == ["x", "y"]


@pytest.fixture
def all_broken(tmp_path):
    cut(tmp_path / "x.png")
    rows = [{**broken_row("x"), "id": str(number)} for number in range(6)]
    (tmp_path / "broken.json").write_text(json.dumps(rows))
    return tmp_path / "broken.json"


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"dataloader_num_workers": 2, "max_steps": 2}])
def test_all_broken_is_one_error(settings, write_config, all_broken, tmp_path):
    with pytest.raises(DataError, match="every sample (so far broke|breaks) while decoding") as caught:
        run(write_config(data_path=str(all_broken), on_bad_sample="skip", **settings))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_evaluation_set_is_one_error(write_config, all_broken):
    with pytest.raises(DataError, match=r"broken.json: every sample breaks while decoding; one of them: .*x\.png"):
        run(write_config(eval_data_path=str(all_broken), on_bad_sample="skip", eval_steps=1))


def test_hundreds_of_broken_samples_in_a_row(processor, tmp_path):
    cut(tmp_path / "x.png")
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    rows = [*({**broken_row("x"), "id": str(number)} for number in range(1500)), good]
    dataset = ConversationDataset(rows, processor, tmp_path, on_bad_sample="skip", **PIXELS)
    dataset.skipped_path = tmp_path / "skipped_samples.jsonl"
    packed = PackedDataset(dataset, [np.arange(1500), np.array([1500])], np.ones(2), 100_000)
    assert packed[0]["labels"].tolist() == [IGNORE_INDEX] * 2 and (packed[1]["labels"] != IGNORE_INDEX).any()
    assert dataset.num_broken == 1500 and len(listed(tmp_path)) == 1500
    batch = Collator(0)([dataset[0], dataset[1500], dataset[-2]])
    learned = batch["labels"] != IGNORE_INDEX
    assert learned.any(dim=1).tolist() == [False, True, False] and "pixel_values" not in batch
    assert dataset.num_broken == len(listed(tmp_path)) == 1500


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_says_what_the_process_would(workers, write_config, sets, tmp_path, capsys):
    config = write_config(data_path=str(sets[1]), dataloader_num_workers=workers)
    assert train_main([str(config)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    folder = sets[1].parent
    assert line.startswith(f'error: {sets[1]}[1] (id "x"), field image: ') or line.startswith(f"error: {sets[1]}[5]")
    assert line.endswith("Replace the file, or remove the sample") and str(folder) in line and "Traceback" not in line


def test_an_error_keeps_its_words_on_its_way_out_of_a_worker():
    text = (
        "Caught DataError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\novis25.data.errors.DataError: data.json[1], field image: gone\n'
    )
    assert str(DataError(text)) == "data.json[1], field image: gone"
    assert str(DataError("two\nlines")) == "two\nlines"
    error = SampleError("image", "gone", "Bring it back")
    constructor, arguments = error.__reduce__()
    assert str(constructor(*arguments)) == str(error) == "field image: gone. Bring it back"
