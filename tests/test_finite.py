"""Runs whose loss, gradients or weights are no numbers end with a reason, and save nothing of it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from transformers import TrainerCallback

from ovis25 import Ovis2_5
from ovis25.cli import train_main
from ovis25.training.checkpoints import find_checkpoints
from ovis25.training.config import ConfigError, load_config
from ovis25.training.finite import FiniteWatch, FirstBad, bad_weights, check_policy, likely_cause
from ovis25.training.run import train

LAST = 6


class Poison(TrainerCallback):
    """Makes the loss, a gradient or a weight `value` in each of `steps`, or an evaluation loss after them."""

    def __init__(self, what: str, *steps: int, value: float = math.nan):
        self.what, self.steps, self.value = what, steps, value
        self.step = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.what in ("loss", "evaluation"):
            model.register_forward_hook(self._loss)
        if self.what == "gradient":
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * self.value if self.step in self.steps else gradient)

    def _loss(self, model, inputs, outputs):
        if self.step in self.steps and model.training == (self.what == "loss"):
            outputs.loss = outputs.loss * self.value
        return outputs

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.what == "weights" and self.step in self.steps:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = self.value


def in_order(write_config, **settings):
    """Samples 0 and 1 in step 1, 2 and 3 in step 2, ...; logged rarely."""
    return write_config(**{
        "train_sampling_strategy": "sequential", "max_steps": LAST, "save_steps": 2, "logging_steps": 50,
        "save_total_limit": 1, **settings,
    })  # fmt: skip


def ended(path, *callbacks, **settings) -> str:
    """The reason that the run ended with."""
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    with pytest.raises(FloatingPointError) as error:
        train(load_config(path, overrides), callbacks=callbacks)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_nothing_bad_is_saved(out, *steps: int) -> None:
    """Good checkpoints of these steps are there; no final folder is."""
    complete, incomplete = find_checkpoints(out)
    assert [folder.name for folder in complete] == [f"checkpoint-{step}" for step in steps] and not incomplete
    for folder in complete:
        assert all(bool(value.isfinite().all()) for value in load_file(folder / "model.safetensors").values())
    assert not (out / "train_results.json").exists() and not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("what", "step", "value", "message", "kept"),
    [
        ("loss", 6, math.nan, "the training loss became nan at step 6, on ", [4]),
        ("loss", 3, math.inf, "the training loss became inf at step 3, on ", [2]),
        ("loss", 1, -math.inf, "the training loss became -inf at step 1, on ", []),
        ("gradient", 5, math.inf, "the gradient norm became ", [4]),
        ("gradient", 6, math.nan, "the gradient norm became nan at step 6, on ", [4]),
        ("weights", 6, math.nan, " by the update of step 6, taken on ", [4]),
        ("weights", 4, -math.inf, " by the update of step 4, taken on ", [2]),
    ],
)
def test_a_step_that_is_no_number_ends_the_run(what, step, value, message, kept, write_config, data_dir, tmp_path):
    said = ended(in_order(write_config), Poison(what, step, value=value))
    assert message in said and "nothing of it is saved" in said and "learning_rate" in said or step == 1
    names = [f'{data_dir / "train.json"}[{index}] (id "s{index}")' for index in (2 * step - 2, 2 * step - 1)]
    assert ", ".join(names) in said
    assert_nothing_bad_is_saved(tmp_path / "out", *kept)


def test_only_the_samples_of_the_broken_batch_are_named(write_config, tmp_path):
    """Of an accumulated step, the micro-batch; of a packed row, all its samples."""

    class SecondBatch(Poison):
        seen = 0

        def _loss(self, model, inputs, outputs):
            self.seen += 1
            return super()._loss(model, inputs, outputs) if self.seen == 4 else outputs

    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    said = ended(in_order(write_config, **settings), SecondBatch("loss", 2))
    assert '[3] (id "s3")' in said and '(id "s2")' not in said
    packed = {"packing": True, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "packed")}
    said = ended(in_order(write_config, **packed), Poison("loss", 2))
    assert "at step 2, on " in said and said.count('(id "s') > 1


@pytest.mark.parametrize("recipe", ["standard", "trl"])
def test_an_evaluation_that_is_no_number_ends_the_run(recipe, write_config, data_dir, tmp_path):
    pytest.importorskip("trl")
    config = in_order(write_config, eval_data_path=str(data_dir / "eval.json"), eval_steps=2, recipe=recipe)
    said = ended(config, Poison("evaluation", 4), per_device_eval_batch_size=2)
    assert "the evaluation loss became nan at step 4, on " in said and '(id "s12")' in said and '"s14"' not in said
    assert_nothing_bad_is_saved(tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("vte.weight", math.nan, torch.float32),
        ("llm.model.norm.weight", math.inf, torch.float32),
        ("visual_tokenizer.head.0.weight", -math.inf, torch.bfloat16),
    ],
)
def test_broken_base_weights_are_refused_in_one_line(name, value, dtype, write_config, tiny_folder, tmp_path, capsys):
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=dtype)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    model.save_pretrained(tmp_path / "broken")
    assert train_main([str(write_config()), "--model_path", str(tmp_path / "broken")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "the base weights in" in errors[0] and name in errors[0]
    assert not list((tmp_path / "out").iterdir())


def test_large_good_weights_are_good():
    """Their sum overflows float32."""
    model = torch.nn.Linear(8, 8)
    torch.nn.init.constant_(model.weight, 3e38)
    assert bad_weights(model) == []
    model.bias.data[3] = math.nan
    assert bad_weights(model) == ["bias"]
    model.bias.requires_grad_(False)
    assert bad_weights(model, only_trained=True) == []


def test_the_first_bad_number_is_kept():
    bad = FirstBad(torch.device("cpu"))
    assert bad.read() is None
    for number, value in enumerate([1.0, 3e38, math.inf, math.nan, 2.0]):
        bad.note(number, torch.tensor(value))
    assert bad.read() == (2, math.inf)


def test_watching_a_step_reads_nothing_from_the_device():
    """A meta tensor has no value that the host could wait for."""
    device = torch.device("meta")
    watch = FiniteWatch(SimpleNamespace(device=device), names=list)
    for step in (1, 2):
        watch.note_loss(torch.zeros((), device=device), step, [0, 1])
        watch.note_norm(torch.zeros((), device=device), step)
        assert watch.must_skip(step, 10) is None


def test_a_rising_loss_points_at_the_learning_rate():
    assert "risen from 2 to 9: lower learning_rate (0.1)" in likely_cause(7, 0.1, [3.0, 2.0, 9.0])
    assert likely_cause(1, 0.1, []).startswith("The base weights are finite")


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("what", "recipe"), [("loss", "standard"), ("gradient", "standard"), ("loss", "trl")])
def test_skip_leaves_the_update_out_and_counts_it(what, recipe, write_config, tmp_path, capsys):
    pytest.importorskip("trl")
    weights = Weights()
    config = in_order(write_config, on_nonfinite="skip", recipe=recipe, weight_decay=0.1, logging_steps=1)
    results = train(load_config(config), callbacks=[Poison(what, 2, 5), weights])
    assert [entry["step"] for entry in results["skipped_steps"]] == [2, 5]
    assert results["skipped_steps"][0]["on"][0].endswith('[2] (id "s2")')
    same = {
        step: all(torch.equal(*pair) for pair in zip(weights.after[step - 1], weights.after[step], strict=True))
        for step in range(2, LAST + 1)
    }
    assert same == {2: True, 3: False, 4: False, 5: True, 6: False}
    assert math.isfinite(results["last_train_loss"]) and "left out the update of step 5" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "train_results.json").read_text()) == results


def test_too_many_skipped_steps_end_the_run(write_config, tmp_path):
    config = in_order(write_config, on_nonfinite="skip", max_steps=30, num_train_epochs=9)
    said = ended(config, Poison("loss", *range(5, 31)), save_steps=4)
    assert "more than 10 in a row" in said and "at step 15" in said
    said = ended(config, Poison("loss", *range(2, 31, 2)), save_steps=30, output_dir=tmp_path / "two")
    assert "more than 10 of 30" in said and "at step 22" in said


@pytest.mark.parametrize(("plugin", "fp16"), [(object(), False), (None, True)])
def test_skip_is_refused_where_it_could_not_be_exact(plugin, fp16):
    with pytest.raises(ConfigError, match="on_nonfinite skip cannot be used here"):
        check_policy("skip", SimpleNamespace(deepspeed_plugin=plugin, fp16=fp16))
    check_policy("stop", SimpleNamespace(deepspeed_plugin=plugin, fp16=fp16))


def test_a_run_without_bad_steps_is_the_same_with_skip(write_config, tmp_path):
    for policy in ("stop", "skip"):
        run(in_order(write_config), "--on_nonfinite", policy, "--output_dir", tmp_path / policy)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("stop", "skip"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
