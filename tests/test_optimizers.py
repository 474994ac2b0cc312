"""`optim: muon`: its steps are those of torch's own optimizers, it resumes, and it says where it cannot run."""

import json
import re

import pytest
import torch
from conftest import losses_of, run
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.optimization import get_linear_schedule_with_warmup

from ovis25 import Ovis2_5
from ovis25.cli import main
from ovis25.training.config import MUON, ConfigError, load_config
from ovis25.training.modules import choose_trained, parameter_groups, parse_train_modules
from ovis25.training.muon import MuonWithAdamW, layer_matrices
from ovis25.training.run import train
from ovis25.training.trainer import OvisTrainer

MODULES = "visual_tokenizer:1e-4|vte:2e-4|llm"
EMBEDDING = "llm.model.embed_tokens.weight"


def is_for_muon(name: str, value: torch.Tensor) -> bool:
    return value.ndim == 2 and (".encoder.layers." in name or name.startswith("llm.model.layers."))


def make_optimizer(model, modules: str = MODULES) -> MuonWithAdamW:
    chosen = choose_trained(model, parse_train_modules(modules))
    decayed = {name for name in chosen if name.endswith("weight") and "norm" not in name}
    groups = parameter_groups(model, chosen, decayed, 1e-3, 0.1)
    return MuonWithAdamW(groups, layer_matrices(model), lr=1e-3, betas=(0.9, 0.95), eps=1e-6)


def set_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def by_hand(model, modules: str = MODULES) -> list[torch.optim.Optimizer]:
    """The two halves, each over groups of single parameters written out here."""
    chosen = choose_trained(model, parse_train_modules(modules))
    halves: dict[bool, list[dict]] = {True: [], False: []}
    for name, value in model.named_parameters():
        if name in chosen:
            decay = 0.1 if name.endswith("weight") and "norm" not in name else 0.0
            group = {"params": [value], "lr": chosen[name].learning_rate or 1e-3, "weight_decay": decay}
            halves[is_for_muon(name, value)].append(group)
    return [
        torch.optim.Muon(halves[True], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(halves[False], betas=(0.9, 0.95), eps=1e-6, fused=True),
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def twin_of(model: Ovis2_5) -> Ovis2_5:
    twin = Ovis2_5(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def test_its_steps_are_those_of_the_two_optimizers_under_one_schedule(model):
    twin = twin_of(model)
    one, halves = make_optimizer(model), by_hand(twin)
    schedules = [get_linear_schedule_with_warmup(optimizer, 2, 6) for optimizer in (one, *halves)]
    before = weights(model)
    for step in range(4):
        for side, optimizers in ((model, [one]), (twin, halves)):
            set_gradients(side, step)
            for optimizer in optimizers:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
    after, expected = weights(model), weights(twin)
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    unmoved = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert all(".post_layernorm." in name for name in unmoved)


def test_matrices_keep_one_momentum_and_have_the_rates_of_their_modules(model):
    optimizer = make_optimizer(model)
    set_gradients(model, 0)
    optimizer.step()
    assert {(group["algorithm"], group["module"], group["lr"]) for group in optimizer.param_groups} == {
        ("muon", "visual_tokenizer", 1e-4), ("adamw", "visual_tokenizer", 1e-4), ("adamw", "vte", 2e-4),
        ("muon", "llm", 1e-3), ("adamw", "llm", 1e-3),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = is_for_muon(name, parameter)
            expected = {"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[parameter].keys() == expected, name
    assert optimizer.state[dict(model.named_parameters())[EMBEDDING]].keys() >= {"exp_avg"}


def test_a_saved_state_goes_on(model, tmp_path):
    first = make_optimizer(model)
    set_gradients(model, 0)
    first.step()
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    twin = twin_of(model)
    second = make_optimizer(twin)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for side, optimizer in ((model, first), (twin, second)):
        set_gradients(side, 1)
        optimizer.step()
    resumed = weights(twin)
    assert all(torch.equal(resumed[name], value) for name, value in weights(model).items())
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] and len(second.state) == len(first.state)


class PowerCut(Exception):
    pass


class Cut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise PowerCut


def test_a_run_that_is_cut_resumes_and_ends_as_if_nothing_had_happened(write_config, tmp_path, capsys):
    config = write_config(optim=MUON, train_modules=MODULES, max_steps=4, save_steps=2, warmup_steps=2, adam_beta2=0.95)
    run(config, "--output_dir", tmp_path / "whole")
    plan = json.loads((tmp_path / "whole" / "train_plan.json").read_text())
    assert "M parameters), AdamW for the rest (" in plan["optimizer"] and plan["optimizer"].startswith("muon for the ")
    assert re.search(r"\n  optimizer +muon for the layers' matrices \(", capsys.readouterr().out)
    with pytest.raises(PowerCut):
        train(load_config(config, ["--output_dir", str(tmp_path / "cut")]), callbacks=[Cut()])
    run(config, "--output_dir", tmp_path / "cut")
    assert "resumes from checkpoint-2" in capsys.readouterr().out
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_the_settings_reach_both_halves(model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4, adam_beta2=0.95, adam_epsilon=1e-6)
    arguments.optim = MUON
    chosen = choose_trained(model, parse_train_modules("llm"))
    optimizer = OvisTrainer(model=model, args=arguments, chosen=chosen).create_optimizer()
    assert isinstance(optimizer, MuonWithAdamW)
    groups = {group["algorithm"]: group for group in optimizer.param_groups}
    assert groups["adamw"]["betas"] == (0.9, 0.95) and groups["adamw"]["eps"] == 1e-6 and groups["adamw"]["fused"]
    assert groups["muon"]["adjust_lr_fn"] == "match_rms_adamw" and groups["muon"]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_lora": True}, r"not for the factors of an adapter \(use_lora\); use adamw_torch_fused or adafactor"),
        ({"deepspeed": "scripts/zero_configs/zero1_cp.json"}, "optim muon and deepspeed exclude each other"),
        ({"fsdp": True}, "fsdp flattens or shards them; use adamw_torch_fused, .* or do without fsdp"),
        ({"optim_args": "momentum=0.9"}, "optim_args has no effect with optim muon; remove it"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(write_config, values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(optim=MUON, **values))


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_sharding_by_accelerates_launcher_is_refused(write_config, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ConfigError, match=f"optim muon and {name} exclude each other"):
        load_config(write_config(optim=MUON))


def test_a_run_without_layers_has_nothing_for_muon(write_config):
    with pytest.raises(ConfigError, match='leave none of them trained; use "optim": "adamw_torch_fused"'):
        train(load_config(write_config(optim=MUON, train_modules="vte")), dry_run=True)


def test_the_plan_names_the_optimizer(write_config, capsys):
    for name in (None, "adafactor"):
        train(load_config(write_config(**({"optim": name} if name else {}))), dry_run=True)
        assert re.search(rf"\n  optimizer +{name or 'adamw_torch_fused'}\n", capsys.readouterr().out)


def test_the_memory_plan_says_whose_states_it_counts(write_config, capsys):
    main(["plan", str(write_config(optim=MUON)), "--devices", "1", "--device-memory", "1GB"])
    assert "the optimizer's column is AdamW's" in capsys.readouterr().out
