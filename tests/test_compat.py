"""What the package knows of its dependencies' insides is still so; a failure here says what a new version changed."""

import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from ovis25 import compat
from ovis25.compat import OVERRIDDEN, Overridden
from ovis25.model.llm import build_llm


def named(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("entry", OVERRIDDEN, ids=lambda entry: f"{entry.owner.partition(':')[2]}.{entry.name}")
def test_what_is_overridden_is_still_there(entry: Overridden):
    version = importlib.import_module(entry.owner.partition(":")[0]).__version__
    changed = f"{entry.owner} {version} has changed; {entry.ours} overrides its {entry.name} ({entry.why})"
    theirs = getattr(named(entry.owner), entry.name, changed)
    assert theirs is not changed, f"{changed}: it is gone"
    assert entry.name in vars(named(entry.ours)), f"{entry.ours} has no {entry.name}: delete the entry"
    if entry.parameters is not None:
        found = inspect.signature(theirs).parameters
        assert set(entry.parameters) <= set(found), f"{changed}: it takes {list(found)}, not {entry.parameters}"


def test_every_private_override_of_the_trainer_is_listed():
    for ours in {entry.ours for entry in OVERRIDDEN}:
        theirs = {named(entry.owner) for entry in OVERRIDDEN if entry.ours == ours}
        private = {name for name in vars(named(ours)) if name.startswith("_") and not name.startswith("__")}
        known = {name for name in private for owner in theirs if hasattr(owner, name)}
        assert known <= {entry.name for entry in OVERRIDDEN if entry.ours == ours}, f"{ours} overrides more"


def test_storages_without_data_are_told_apart():
    with compat.FakeTensorMode():
        first, second = torch.empty(3), torch.empty(3)
    keys = [compat.storage_key(tensor.untyped_storage()) for tensor in (first, first.view(1, 3), second)]
    assert keys[0] == keys[1] != keys[2], "torch's storages have no number that tells them apart"


def test_a_dispatch_mode_sees_operations():
    seen = []

    class Mode(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add(1)
    assert seen == ["aten.ones.default", "aten.add.Tensor"], "torch's dispatch mode sees other operations"


def test_the_attention_of_a_config_is_what_its_model_takes(model):
    assert compat.attention_of(model.llm.config) == "sdpa"
    compat.set_attention(model.llm.config, "eager")
    assert model.llm.model.layers[0].self_attn.config is model.llm.config
    assert compat.attention_of(build_llm(model.llm.config).config) == "eager", "transformers reads another attribute"


def test_one_process_drives_one_device(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(arguments, "_n_gpu", 4)
    assert arguments.n_gpu == 4, "transformers' n_gpu no longer reads _n_gpu"
    compat.drive_one_device(arguments)
    assert arguments.n_gpu == 1


def test_a_trainer_has_the_methods_that_are_called(tmp_path):
    trainer = importlib.import_module("transformers").Trainer(
        torch.nn.Linear(2, 2), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    )
    batch = compat.prepare_inputs(trainer, {"x": torch.ones(2)})
    assert batch["x"].device == trainer.args.device
    trainer.args.restore_callback_states_from_checkpoint = True
    control = {"args": {"should_training_stop": True}, "attributes": {}}
    trainer.state = TrainerState(stateful_callbacks={"TrainerControl": control})
    compat.restore_callbacks(trainer)
    assert trainer.control.should_training_stop, "Trainer restores its callbacks otherwise"


@pytest.mark.parametrize(
    ("package", "file", "name"),
    [
        ("trl", "trainer/sft_trainer.py", "self._metrics[mode]"),
        ("trl", "trainer/sft_trainer.py", "self._metrics[mode].clear()"),
        ("deepspeed", "utils/z3_leaf_module.py", f"'{compat.LEAF_MODULE}'"),
    ],
)
def test_optional_packages_still_use_the_name(package, file, name):
    """Read, not imported: that would take seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    text = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    assert name in text, f"{package} no longer has {name} in {file}; see ovis25/compat.py"
