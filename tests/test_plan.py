"""The plan's arithmetic, and when a config evaluates, saves and stops."""

import pytest

from ovis25.training import build
from ovis25.training.config import ConfigError, TrainConfig
from ovis25.training.plan import count_steps, optimizer_groups


@pytest.mark.parametrize(
    ("arguments", "per_epoch", "total", "effective"),
    [
        ((100, 4, 2, 3, 1), 5, 5, 24),
        ((100, 4, 2, 3, 2.5), 5, 13, 24),
        ((100, 4, 1, 1, 1), 25, 25, 4),
        ((101, 4, 1, 1, 1), 26, 26, 4),
        ((101, 4, 2, 1, 1), 13, 13, 8),
        ((3, 4, 2, 8, 1), 1, 1, 64),
        ((100, 4, 1, 1, 3, 7), 25, 7, 4),
    ],
)
def test_steps_are_counted_with_devices_and_accumulation(arguments, per_epoch, total, effective):
    steps = count_steps(*arguments)
    assert (steps.per_epoch, steps.total, steps.effective_batch) == (per_epoch, total, effective)


def test_dropping_the_last_batch_rounds_down():
    assert count_steps(103, 4, 2, 1, 1, drop_last=True).per_epoch == 12


def arguments_of(tmp_path, num_samples=80, **values):
    own = {k: values.pop(k) for k in ("eval_data_path", "early_stopping_patience") if k in values}
    config = TrainConfig(model_path="tiny", data_path="x", output_dir=str(tmp_path), trainer=values, **own)
    steps = build.steps_of(config, num_samples)
    return config, build.training_arguments(config, build.choose_precision(config), steps)


def test_with_an_evaluation_set_it_evaluates_ten_times_and_keeps_the_best(tmp_path):
    config, arguments = arguments_of(tmp_path, eval_data_path="e", per_device_train_batch_size=1, num_train_epochs=1.0)
    assert (arguments.eval_strategy, arguments.eval_steps, arguments.save_steps) == ("steps", 8, 8)
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model == "eval_loss"
    assert build.early_stopping_patience(config, arguments) == 3


def test_the_users_rhythm_wins(tmp_path):
    _, arguments = arguments_of(tmp_path, eval_data_path="e", eval_steps=5, max_steps=20)
    assert (arguments.eval_steps, arguments.save_steps) == (5, 5)
    _, arguments = arguments_of(tmp_path, eval_data_path="e", eval_strategy="epoch")
    assert (arguments.eval_strategy, arguments.save_strategy) == ("epoch", "epoch")


def test_without_an_evaluation_set_nothing_is_evaluated(tmp_path):
    config, arguments = arguments_of(tmp_path)
    assert arguments.eval_strategy == "no" and not arguments.load_best_model_at_end
    assert build.early_stopping_patience(config, arguments) == 0


@pytest.mark.parametrize("values", [{"eval_strategy": "steps"}, {"do_eval": True}])
def test_evaluation_without_a_set_is_an_error(tmp_path, values):
    with pytest.raises(ConfigError, match="eval_data_path names no evaluation set"):
        arguments_of(tmp_path, **values)


def test_keeping_the_best_without_a_set_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="load_best_model_at_end needs an evaluation set"):
        arguments_of(tmp_path, load_best_model_at_end=True)


def test_early_stopping_without_evaluation_is_an_error(tmp_path):
    config, arguments = arguments_of(tmp_path, early_stopping_patience=2)
    with pytest.raises(ConfigError, match="early_stopping_patience needs evaluations"):
        build.early_stopping_patience(config, arguments)


def test_settings_that_transformers_refuses_are_one_clean_error(tmp_path):
    with pytest.raises(ConfigError, match="transformers refuses these settings"):
        arguments_of(tmp_path, lr_scheduler_type="zigzag")


def test_bf16_is_off_on_a_cpu_and_says_so(tmp_path):
    config = TrainConfig(model_path="tiny", data_path="x", trainer={"bf16": True, "use_cpu": True})
    precision = build.choose_precision(config)
    assert not precision.bf16 and "in float32" in precision.note


def test_rates_are_read_from_the_optimizers_groups():
    groups = [{"module": "llm", "lr": 0.0, "initial_lr": 1e-4, "weight_decay": 0.1, "params": []}]
    assert optimizer_groups(groups) == [{"module": "llm", "learning_rate": 1e-4, "weight_decay": 0.1}]
