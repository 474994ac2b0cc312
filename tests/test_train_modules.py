"""`train_modules`: what is trained, with which learning rate, and what stays frozen."""

import pytest

from ovis25.training.config import ConfigError
from ovis25.training.modules import (
    TrainedModule,
    choose_trained,
    count_parameters,
    parameter_groups,
    parse_train_modules,
)


def trained_names(model, text, **freeze) -> set[str]:
    choose_trained(model, parse_train_modules(text), **freeze)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_prefix(model, *prefixes) -> set[str]:
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(prefixes) and ".post_layernorm." not in name
    }  # fmt: skip


def test_modules_with_and_without_rates_are_read():
    assert parse_train_modules("visual_tokenizer:1e-5|llm| vte : 5e-6") == [
        TrainedModule("visual_tokenizer", 1e-5),
        TrainedModule("llm", None),
        TrainedModule("vte", 5e-6),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm", "unknown module 'lm'; choose from all, llm, visual_tokenizer,"),
        ("llm||vte", "unknown module ''"),
        ("llm|llm:1e-5", "names llm twice"),
        ("llm:fast", "the learning rate of llm is 'fast'; it must be a positive number"),
        ("llm:-1", "must be a positive number"),
        ("llm:nan", "must be a positive number"),
    ],
)
def test_a_wrong_entry_is_named(text, message):
    with pytest.raises(ConfigError) as error:
        parse_train_modules(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "prefixes"),
    [
        ("all", ("",)),
        ("llm", ("llm.",)),
        ("visual_tokenizer", ("visual_tokenizer.",)),
        ("visual_tokenizer.vit", ("visual_tokenizer.vit.",)),
        ("visual_tokenizer.head|vte", ("visual_tokenizer.head.", "vte.")),
        ("visual_tokenizer.vit.last_block", ("visual_tokenizer.vit.vision_model.encoder.layers.2.",)),
    ],
)
def test_exactly_the_named_modules_are_trained(model, text, prefixes):
    assert trained_names(model, text) == with_prefix(model, *prefixes)


def test_freezing_wins_over_train_modules(model):
    assert trained_names(model, "all", freeze_vision_tower=True) == with_prefix(
        model, "llm.", "vte.", "visual_tokenizer.head."
    )
    assert trained_names(model, "all", freeze_llm=True) == with_prefix(model, "visual_tokenizer.", "vte.")
    with pytest.raises(ConfigError, match="nothing is left to train: train_modules llm"):
        trained_names(model, "llm", freeze_llm=True)


def test_the_most_specific_entry_gives_the_rate(model):
    chosen = choose_trained(
        model, parse_train_modules("all:1e-3|visual_tokenizer:1e-4|visual_tokenizer.vit.last_block:1e-5|llm")
    )
    groups = parameter_groups(model, chosen, set(), learning_rate=2e-3, weight_decay=0.1)
    assert {group["module"]: group["lr"] for group in groups} == {
        "all": 1e-3,
        "visual_tokenizer": 1e-4,
        "visual_tokenizer.vit.last_block": 1e-5,
        "llm": 2e-3,
    }
    grouped = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)


def test_weight_decay_is_for_decayed_names_alone(model):
    chosen = choose_trained(model, parse_train_modules("llm"))
    groups = parameter_groups(model, chosen, {"llm.lm_head.weight"}, 1e-3, 0.1)
    assert sorted((group["weight_decay"], len(group["params"]) == 1) for group in groups) == [(0.0, False), (0.1, True)]


def test_parameters_are_counted_by_part(model):
    choose_trained(model, parse_train_modules("vte"))
    counts = count_parameters(model)
    assert counts["vte"] == (260 * 64, 260 * 64)
    assert counts["llm"][0] == 0
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())
