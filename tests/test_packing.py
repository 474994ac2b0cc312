"""Packing: the rows, their order, and that nothing else changes: losses, gradients, evaluation, resume, recipes."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from conftest import PIXELS, losses_of, relative_error, run
from PIL import Image
from safetensors.torch import load_file
from test_distributed import STAGES, ZERO, assert_same_run, evaluations, launch, needs_deepspeed
from torch.utils.data import DataLoader

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.constants import IGNORE_INDEX
from ovis25.data import Collator, ConversationDataset, DataError
from ovis25.data.collator import PackedCollator
from ovis25.data.dataset import SIZES
from ovis25.data.packed import PackedDataset
from ovis25.data.packing import CostWeights, _best_fit, pack
from ovis25.data.sampler import LengthSampler, RowSampler
from ovis25.training.build import Precision, steps_of, training_arguments
from ovis25.training.config import ConfigError, load_config
from ovis25.training.cost import cost_weights
from ovis25.training.memory import released_config
from ovis25.training.trainer import OvisTrainer

# float32 sums in another order
SAME = 1e-5
WEIGHTS = CostWeights(token=1.0, token_pair=1e-4, learned=0.5, visual=8.0, patch_pair=1e-4)


def random_sizes(num_samples: int, seed: int = 0) -> np.ndarray:
    """Texts of 16 to 2000 tokens, four of five with a picture of up to 3136 visual tokens."""
    generator = np.random.default_rng(seed)
    sizes = np.zeros(num_samples, SIZES)
    text = np.exp(generator.normal(5.3, 0.8, num_samples)).astype(int).clip(16, 2000)
    height, width = np.exp(generator.uniform(np.log(14), np.log(57), (2, num_samples))).astype(int)
    visual = height * width * (generator.random(num_samples) < 0.8)
    sizes["tokens"], sizes["learned"] = text + visual, text // 2
    sizes["visual"], sizes["patch_pairs"] = visual, (4 * visual.astype(np.int64)) ** 2
    return sizes


def spread(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


def sums(rows: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    return np.array([values[row].sum() for row in rows])


# -- which samples share a row


def test_the_example_of_the_docstring():
    rows = pack([6, 6, 4, 4], [9, 1, 9, 1], capacity=10)
    assert sorted(row.tolist() for row in rows) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("keep_order", [False, True])
def test_every_sample_is_in_one_row_and_no_row_is_too_long(keep_order):
    sizes = random_sizes(3000)
    tokens, costs = sizes["tokens"], WEIGHTS.of(sizes)
    rows = pack(tokens, costs, 8192, seed=1, multiple=8, keep_order=keep_order)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert all((np.diff(row) > 0).all() for row in rows)
    assert sums(rows, tokens).max() <= 8192
    assert len(rows) % 8 == 0 and len(rows) <= math.ceil(tokens.sum() / 8192) * 1.03
    again = pack(tokens, costs, 8192, seed=1, multiple=8, keep_order=keep_order)
    assert all(np.array_equal(row, other) for row, other in zip(rows, again, strict=True))
    other = pack(tokens, costs, 8192, seed=2, multiple=8, keep_order=keep_order)
    assert any(not np.array_equal(row, other) for row, other in zip(rows, other, strict=False))
    if keep_order:
        # a row's samples are at most a window of 64 rows apart
        assert max(row[-1] - row[0] for row in rows) < 64 * 8192 / tokens.mean() * 1.2
        assert [row[0] for row in rows][:3] < [row[0] for row in rows][-3:]
    else:
        assert (np.diff(sums(rows, costs)) <= 1e-6 * costs.max()).all(), "the dearest row comes first"


def test_rows_cost_about_the_same_where_best_fit_alone_leaves_them_apart():
    sizes = random_sizes(20000)
    tokens, costs = sizes["tokens"].astype(np.int64), WEIGHTS.of(sizes)
    rows = pack(tokens, costs, 8192)
    longest_first = np.argsort(-tokens, kind="stable")
    row_of, num_rows = _best_fit(tokens, longest_first, 8192)
    assert spread(sums(rows, costs)) < 0.25 * spread(np.bincount(row_of, costs))
    assert num_rows <= len(rows) <= 1.02 * num_rows
    assert tokens.sum() / (8192 * len(rows)) > 0.98


def test_there_is_a_row_for_every_device_where_there_are_samples_enough():
    assert len(pack([5] * 9, [1] * 9, capacity=100, multiple=4)) == 4
    assert sorted(map(len, pack([5] * 8, [1] * 8, capacity=100, multiple=4))) == [2, 2, 2, 2]
    assert len(pack([5] * 3, [1] * 3, capacity=100, multiple=4)) == 1
    assert [row.tolist() for row in pack([5], [0], capacity=5)] == [[0]]


def test_two_hundred_thousand_samples():
    sizes = random_sizes(200_000)
    rows = pack(sizes["tokens"], WEIGHTS.of(sizes), 8192)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(200_000))
    assert spread(sums(rows, WEIGHTS.of(sizes))) < 0.05 and sizes["tokens"].sum() / (8192 * len(rows)) > 0.98


@pytest.mark.parametrize("length", [0, 11])
def test_a_sample_that_fits_no_row_is_named(length):
    with pytest.raises(ValueError, match=rf"sample 1 has {length} tokens, but a row takes samples of 1 to 10"):
        pack([3, length], [1, 1], capacity=10)


def test_costs_are_the_flops_of_the_forward_pass():
    """The design's figures: one 1792^2 image (12,544 patches) and 1,024 text tokens, lm_head on all rows."""
    sizes = np.array([(4160, 4160, 3136, 12544**2)], SIZES)
    for size, tera_flops in (("2B", 49.0), ("9B", 101.6)):
        assert cost_weights(released_config(size)).of(sizes)[0] / 1e12 == pytest.approx(tera_flops, rel=0.01)
    frozen, whole = (cost_weights(released_config("2B"), share) for share in (0.0, 1.0))
    assert frozen.visual == frozen.patch_pair == 0 and frozen.token == whole.token


# -- in which order they are trained


def test_rows_of_one_step_cost_alike_and_every_epoch_has_its_own_order():
    costs = np.random.default_rng(0).uniform(1, 10, 802)
    sampler = RowSampler(costs, group_size=8, seed=3)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert len(sampler) == 802 and all(sorted(order) == list(range(802)) for order in epochs)
    for order in epochs:
        steps = costs[order[:800]].reshape(-1, 8)
        assert (steps.max(1) / steps.min(1)).mean() < 1.05
        assert not np.allclose(np.sort(steps.mean(1)), steps.mean(1)), "steps are shuffled"
    assert epochs[0] != epochs[1]
    again = RowSampler(costs, group_size=8, seed=3)
    again.set_epoch(1)
    assert list(again) == epochs[1]
    assert list(RowSampler(costs, group_size=8, seed=4)) != epochs[0]


def test_batches_grouped_by_length_are_of_like_lengths_and_differ_by_epoch():
    lengths = np.random.default_rng(0).integers(10, 1000, 4000)
    sampler = LengthSampler(4, lengths, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(4000)) and list(sampler) != first
    grouped, shuffled = (np.ptp(lengths[order].reshape(-1, 4), axis=1).mean() for order in (first, range(4000)))
    assert grouped < 0.05 * shuffled


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", ["rows", "lengths"])
def test_an_epoch_is_gone_on_with_on_every_rank(kind, num_processes):
    """As Trainer resumes: batches of a later epoch are skipped, on loaders that accelerate has cut up for the ranks."""
    numbers = np.random.default_rng(0).integers(1, 100, 40)

    def loader_of(rank: int):
        sampler = RowSampler(numbers, 4, seed=5) if kind == "rows" else LengthSampler(4, numbers, seed=5)
        loader = DataLoader(range(40), batch_size=2, sampler=sampler)
        return prepare_data_loader(loader, num_processes=num_processes, process_index=rank)

    for rank in range(num_processes):
        whole, resumed = loader_of(rank), loader_of(rank)
        orders = []
        for epoch in range(3):
            whole.set_epoch(epoch)
            orders.append([batch.tolist() for batch in whole])
        assert orders[1] != orders[2]
        # what OvisTraining._run_epoch does before Trainer's own
        resumed.set_epoch(2)
        skipped = skip_first_batches(resumed, 3)
        skipped.set_epoch(2)
        assert [batch.tolist() for batch in skipped] == orders[2][3:]


# -- rows of samples


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_folder):
    """Every kind of sample, encoded for the embedded model."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = np.random.default_rng(1)
    for index, (height, width) in enumerate([(64, 64), (40, 96), (96, 70), (64, 64), (64, 64), (64, 64)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")

    def sample(question: str, answer: str, **visuals) -> dict:
        return {**visuals, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    frames = ["3.png", "4.png", "5.png"]
    rows = [
        sample("What is 1+1?", "2"),
        sample("<image>\nWhich digits are shown?", "34", image="0.png"),
        sample("<image>\n<image>\nWhich is larger?", "first", image=["1.png", "2.png"]),
        sample("<video>\nWhat is it?", "7", video=frames),
        sample("<image>\nWhat is the sum?", "<think>\n1+2=3\n</think>\n\n3", image="2.png"),
        sample("What is 12+7?", "<think>\n12+7=19\n</think>\n\n19"),
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    processor = Ovis2_5Processor.from_pretrained(tiny_folder)
    limits = {**PIXELS, "min_frames": 3, "max_frames": 3}
    return ConversationDataset(folder / "data.json", processor, raw_pixels=True, **limits)


def packed_of(dataset: ConversationDataset, rows: list[list[int]]) -> PackedDataset:
    return PackedDataset(dataset, [np.array(row) for row in rows], np.ones(len(rows)), capacity=1000)


def test_a_packed_row_is_its_samples_one_after_the_other(mixed):
    packed = packed_of(mixed, [[0, 2, 3], [1, 4], [5]])
    row, items = packed[0], [mixed[index] for index in (0, 2, 3)]
    assert row["input_ids"].equal(torch.cat([item["input_ids"] for item in items]))
    lengths = [len(item["input_ids"]) for item in items]
    assert row["sequence_lengths"].tolist() == lengths == mixed.lengths[[0, 2, 3]].tolist()
    assert row["position_ids"].tolist() == [place for length in lengths for place in range(length)]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    assert (row["labels"][starts] == IGNORE_INDEX).all()
    expected = torch.cat([item["labels"] for item in items])
    expected[starts] = IGNORE_INDEX
    assert row["labels"].equal(expected) and (expected != IGNORE_INDEX).any()
    for name in ("pixel_values", "grid_thws"):
        assert row[name].equal(torch.cat([items[1][name], items[2][name]]))
    assert "pixel_values" not in packed[2], "text alone"

    batch = PackedCollator()([packed[0], packed[2], packed[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, mixed.lengths.sum())
    assert batch["sequence_lengths"].tolist() == mixed.lengths[[0, 2, 3, 5, 1, 4]].tolist()
    assert batch["grid_thws"].equal(torch.cat([packed[0]["grid_thws"], packed[1]["grid_thws"]]))
    assert "attention_mask" not in batch
    with pytest.raises(IndexError, match="row 3 of 3"):
        packed[3]
    assert packed[-1]["input_ids"].equal(packed[2]["input_ids"])


def gradients_of(model: Ovis2_5, batches: list[dict], **options) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of the mean over all learned tokens of the batches."""
    model.train().zero_grad()
    num_items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items, **options).loss
        loss.backward()
        total += loss.item()
    return total, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_the_samples_apart(mixed, tiny_folder, smoothing):
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.float32)
    packed = packed_of(mixed, [[0, 2, 3], [1, 4, 5]])
    collate, options = Collator(0), {"label_smoothing": smoothing}
    apart, apart_gradients = gradients_of(model, [collate([mixed[index]]) for index in range(6)], **options)
    ways = {
        "padded": [collate([mixed[index] for index in range(6)])],
        "one long row": [PackedCollator()([packed[0], packed[1]])],
        "two rows": [PackedCollator()([packed[0]]), PackedCollator()([packed[1]])],
    }
    for name, batches in ways.items():
        loss, gradients = gradients_of(model, batches, **options)
        assert loss == pytest.approx(apart, rel=SAME), name
        assert gradients.keys() == apart_gradients.keys()
        for parameter, expected in apart_gradients.items():
            assert expected.norm() == 0 or relative_error(gradients[parameter], expected) < SAME, (name, parameter)


def test_a_broken_picture_is_left_out_of_its_row(mixed, tiny_folder, tmp_path):
    whole = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:4000])  # the header is sound, the pixels are cut
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "3"}]
    rows = [
        {"id": "cut", "image": "cut.jpg", "conversations": turns},
        {"conversations": [{**turns[0], "value": "1+1?"}, turns[1]]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    processor = Ovis2_5Processor.from_pretrained(tiny_folder)
    dataset = ConversationDataset(tmp_path / "data.json", processor, on_bad_sample="skip", **PIXELS)
    dataset.skipped_path = tmp_path / "skipped.jsonl"
    packed = packed_of(dataset, [[0, 1], [0]])
    assert packed[0]["sequence_lengths"].tolist() == [dataset.lengths[1]]
    assert json.loads(dataset.skipped_path.read_text())["id"] == "cut"
    assert packed[1]["sequence_lengths"].tolist() == [2], "a row without a sample is neutral"
    assert packed[1]["labels"].tolist() == [-100, -100]
    with pytest.raises(DataError, match=r'\[0\] \(id "cut"\), field image'):
        packed_of(ConversationDataset(tmp_path / "data.json", processor, **PIXELS), [[0, 1]])[0]


def test_rows_made_on_demand_tell_their_lengths_where_all_are_measured(mixed):
    class Rows:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "7 " * (index % 5 + 1)}]
            return {"conversations": turns}

    with pytest.raises(ValueError, match="the lengths of 334 of 1000 samples are known; check every sample"):
        ConversationDataset(Rows(), mixed.processor).lengths  # noqa: B018
    dataset = ConversationDataset(Rows(), mixed.processor, measure_all=True)
    assert dataset.lengths[:10].tolist() == [len(dataset[index]["input_ids"]) for index in range(10)]
    packed = PackedDataset.of(dataset, WEIGHTS, 200, seed=0, multiple=1, in_order=False)
    summary = packed.summary()
    assert summary.fill == dataset.lengths.sum() / 200 / summary.num_rows > 0.9 and summary.cost_spread < 0.05
    one_each = PackedDataset.of(dataset, WEIGHTS, 1, seed=0, multiple=1, in_order=False)
    assert one_each.capacity == dataset.lengths.max(), "no sample is longer than a row"


# -- runs


def plan_of(folder) -> dict:
    return json.loads((folder / "train_plan.json").read_text())


def history_of(folder, step: int) -> list[dict]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("recipe", [[], ["--recipe", "trl"], ["--use_lora", "true"]], ids=["standard", "trl", "lora"])
def test_packed_runs_are_those_of_the_samples_apart(recipe, write_config, data_dir, tmp_path, capsys):
    """Three steps over the whole file: its rows in one batch, or its samples."""
    if "trl" in recipe:
        pytest.importorskip("trl")
    config = write_config(eval_data_path=str(data_dir / "eval.json"), multimodal_max_length=128, max_steps=3,
                          eval_steps=1, save_total_limit=5, per_device_eval_batch_size=2)  # fmt: skip
    run(config, "--per_device_train_batch_size", 12, "--output_dir", tmp_path / "apart", *recipe)
    capsys.readouterr()
    run(config, "--packing", "true", "--per_device_train_batch_size", 6, "--output_dir", tmp_path / "packed", *recipe)
    plan, printed = plan_of(tmp_path / "packed"), capsys.readouterr()
    packing = plan["packing"]
    assert packing["num_rows"] == 6 and packing["capacity"] == 128
    assert plan["steps_per_epoch"] == 1 and plan["effective_batch"] == 6 and plan["data"]["num_samples"] == 12
    line = (
        f"12 samples in 6 rows of up to {packing['capacity']} tokens, fill {100 * packing['fill']:.1f} %, cost spread"
    )
    assert line in printed.out and "packed in 2 rows" in printed.out and "= 6 rows" in printed.out
    assert "nan tokens/s" not in printed.err
    apart, packed = (history_of(tmp_path / name, 3) for name in ("apart", "packed"))
    for key in ("loss", "eval_loss", "eval_tokens", "grad_norm"):
        numbers = [[entry[key] for entry in history if key in entry] for history in (apart, packed)]
        assert len(numbers[0]) == 3 and numbers[1] == pytest.approx(numbers[0], rel=1e-4), key
    results = [json.loads((tmp_path / name / "train_results.json").read_text()) for name in ("apart", "packed")]
    assert results[0]["train_tokens"] == results[1]["train_tokens"] == 3 * plan["data"]["total_tokens"]


def test_packed_rows_take_their_visuals_from_the_cache(write_config, tmp_path):
    config = write_config(**PACKED, use_lora=True, max_steps=3, save_steps=3)
    run(config, "--output_dir", tmp_path / "decoded")
    run(config, "--cache_visual_embeddings", "true", "--output_dir", tmp_path / "cached")
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "decoded"), rel=SAME)
    assert plan_of(tmp_path / "cached")["visual_cache"]


PACKED = {"packing": True, "multimodal_max_length": 100, "per_device_train_batch_size": 1}


def test_accumulated_rows_train_as_one_batch_of_them_does(write_config, tmp_path):
    shared = {**PACKED, "multimodal_max_length": 128, "train_sampling_strategy": "sequential", "max_steps": 4,
              "optim": "sgd", "save_steps": 4}  # fmt: skip
    run(write_config(**shared), "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "big")
    run(write_config(**shared), "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "small")
    plans = [plan_of(tmp_path / name) for name in ("big", "small")]
    assert plans[0]["packing"] == plans[1]["packing"] and plans[0]["packing"]["num_rows"] % 2 == 0
    assert losses_of(tmp_path / "small") == pytest.approx(losses_of(tmp_path / "big"), rel=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("big", "small"))
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-6), name


def test_a_packed_run_resumes_in_the_middle_of_an_epoch(write_config, tmp_path):
    config = write_config(**PACKED, max_steps=8, save_steps=3, save_total_limit=5)
    run(config)
    per_epoch = plan_of(tmp_path / "out")["steps_per_epoch"]
    assert 3 < per_epoch < 6, "step 6 is in the middle of the second epoch"
    losses, weights = losses_of(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    # as a run that was killed after step 6
    (tmp_path / "out" / "train_results.json").unlink()
    (tmp_path / "out" / "checkpoint-8" / "COMPLETE").unlink()
    run(config)
    assert plan_of(tmp_path / "out")["resumes_from"] == "checkpoint-6 (step 6 of 8)"
    assert losses_of(tmp_path / "out") == losses and losses.keys() == set(range(1, 9))
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def trainer_of(config, dataset, tmp_path, **settings) -> OvisTrainer:
    config = load_config(config, [f"--{name}={value}" for name, value in settings.items()])
    precision = Precision("CPU", torch.float32, False, False, None)
    arguments = training_arguments(config, precision, steps_of(config, len(dataset)))
    model = Ovis2_5.from_pretrained(config.model_path, dtype=torch.float32)
    return OvisTrainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, chosen={},
                       data_collator=Collator(0), processing_class=dataset.processor)  # fmt: skip


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_lengths_are_known_without_decoding(strategy, write_config, data_dir, mixed, tmp_path, monkeypatch):
    import ovis25.data.dataset as module

    decoded = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda source: decoded.append(source) or original(source))
    dataset = ConversationDataset(data_dir / "train.json", mixed.processor, **PIXELS)
    config = write_config(eval_data_path=str(data_dir / "train.json"), dataloader_num_workers=0)
    trainer = trainer_of(config, dataset, tmp_path, train_sampling_strategy=strategy)
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader()]
    orders = [[index for batch in loader.batch_sampler for index in batch] for loader in loaders]
    assert decoded == [] and all(sorted(order) == list(range(12)) for order in orders)
    batches = list(loaders[0])
    assert decoded, "only now"
    if strategy == "group_by_length":
        assert all(order[0] == dataset.lengths.argmax() for order in orders)
        lengths = [int(batch["attention_mask"].sum(1).max()) for batch in batches]
        assert lengths == [batch["input_ids"].shape[1] for batch in batches], "each padded to its own longest"


def test_a_batch_is_one_row_where_nothing_else_is_said(write_config):
    path = write_config(packing=True)
    settings = json.loads(path.read_text())
    del settings["per_device_train_batch_size"]
    path.write_text(json.dumps(settings))
    assert load_config(path).trainer["per_device_train_batch_size"] == 1
    assert "per_device_train_batch_size" not in load_config(path, ["--packing", "false"]).trainer


def test_settings_that_packing_excludes_or_replaces(write_config):
    with pytest.raises(ConfigError, match="packing and attn_implementation eager exclude each other"):
        load_config(write_config(packing=True, attn_implementation="eager"))
    notes = load_config(write_config(packing=True, group_by_length=True, padding_free=True)).notes
    assert "train_sampling_strategy group_by_length has no effect with packing: rows are alike in cost" in notes
    assert "padding_free has no effect here: use packing, which leaves no padding" in notes
    assert not load_config(write_config(packing=True)).notes


# -- several processes


@pytest.fixture(scope="module")
def packed_config(tiny_folder, data_dir, tmp_path_factory):
    """Ten steps over shuffled rows, four an epoch."""
    path = tmp_path_factory.mktemp("packed") / "config.json"
    path.write_text(json.dumps({
        **PACKED, "multimodal_max_length": 72, "model_path": str(tiny_folder),
        "data_path": str(data_dir / "train.json"), "eval_data_path": str(data_dir / "eval.json"),
        "max_steps": 10, "eval_steps": 5, "save_total_limit": 5,
        "logging_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 0, "early_stopping_patience": 0,
        "max_grad_norm": 1.0, "train_modules": "visual_tokenizer:5e-4|llm|vte", **PIXELS,
    }))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def packed_alone(packed_config):
    folder = packed_config.parent / "alone"
    run(packed_config, "--per_device_train_batch_size", 2, "--output_dir", folder)
    assert plan_of(folder)["steps_per_epoch"] == 4
    return folder


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(s, marks=[] if s == "zero3_cp" else pytest.mark.slow) for s in STAGES])
def test_every_stage_trains_packed_rows_as_one_process_does(stage, packed_config, packed_alone, tmp_path):
    launch(packed_config, "standard", tmp_path / "two", "--deepspeed", ZERO / f"{stage}.json")
    assert_same_run(tmp_path / "two", packed_alone)


def test_plain_data_parallel_trains_packed_rows_and_resumes_in_their_order(packed_config, packed_alone, tmp_path):
    """Step 5 is the first of the second epoch, whose order a resumed run must find again on every rank."""
    launch(packed_config, "standard", tmp_path / "two")
    assert_same_run(tmp_path / "two", packed_alone)
    for path in (tmp_path / "two" / "checkpoint-10" / "COMPLETE", tmp_path / "two" / "train_results.json"):
        path.unlink()
    launch(packed_config, "standard", tmp_path / "two")
    assert_same_run(tmp_path / "two", packed_alone)
    assert "checkpoint-5" in plan_of(tmp_path / "two")["resumes_from"]
    assert len(evaluations(tmp_path / "two")) == 2
