"""Every setting, with every odd value: refused in one line before data and weights are touched, or taken as it is."""

import enum
import errno
import functools
import itertools
import json
import math
import re

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from ovis25.cli import train_main
from ovis25.files import REPOSITORY_ROOT
from ovis25.training import build
from ovis25.training.config import KINDS, OWN_KEYS, TRAINER_KEYS, ConfigError, TrainConfig, load_config
from ovis25.training.config.legacy import RENAMED
from ovis25.training.plan import Steps
from ovis25.training.rhythm import choose_rhythm

ODD = [0, -1, 1, 2.5, 1e400, -1e400, math.nan, 10**400, True, False, "", " ", "text", "1_000", "10%", "a\0b", "\ud800",
       [], ["text"], [1], {}, {"text": 1}]  # fmt: skip
KEYS = list(KINDS)
# read by ourselves, or turned into something else by transformers, or overruled by a machine without GPU
NOT_FOR_TRAINER = {"resume_from_checkpoint", "accelerator_config", "include_num_input_tokens_seen", "use_cpu",
                   "dataloader_pin_memory", "tf32"}  # fmt: skip


@pytest.fixture
def write_config(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "eval.json").write_text("[]")

    def write(**values):
        settings = {"model_path": "tiny", "data_path": "train.json", "output_dir": str(tmp_path / "out"), **values}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        return path

    return write


def arguments_of(path, *overrides, total=100):
    """What the run would be given, by the way that every run takes."""
    config = load_config(path, list(overrides))
    build.check_before_loading(config)
    return config, build.training_arguments(config, build.choose_precision(config), Steps(total, total, 1))


def is_same(taken, given) -> bool:
    if isinstance(taken, enum.Enum):
        taken = taken.value
    if isinstance(given, str) and not isinstance(taken, str):
        return taken == [given] or float(given) == taken
    return taken == given or taken == [given]


@pytest.mark.parametrize("key", KEYS)
def test_an_odd_value_is_refused_in_one_line_or_taken_as_it_is(write_config, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    for value in ODD:
        settings = {"recipe": "trl"} if key in ("loss_type", "eos_token") else {}
        try:
            config, arguments = arguments_of(write_config(**{**settings, key: value}))
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 800, str(error)
            assert key in str(error), (value, str(error))
            continue
        notes = [*config.notes, build.choose_precision(config).note or ""]
        if any(note.startswith((f"{key} has no effect", f"without effect: {key}")) for note in notes):
            continue
        new_key = RENAMED.get(key, key)
        taken = getattr(config, key) if key in OWN_KEYS else config.trainer.get(new_key, config.trl.get(key))
        if key in ("output_dir", "visual_cache_dir", "model_path"):
            taken = taken.rsplit("/", 1)[-1]
        assert is_same(taken, value), (value, taken)
        if key in TRAINER_KEYS and key not in NOT_FOR_TRAINER:
            assert is_same(getattr(arguments, key), value), (value, getattr(arguments, key))
    assert not (tmp_path / "out").exists()


def refusal(path, *overrides) -> str:
    """The message, which is one line."""
    with pytest.raises(ConfigError) as error:
        arguments_of(path, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_accumulation_steps", -1, "gradient_accumulation_steps is -1; it must be at least 1"),
        ("num_train_epochs", 0, "num_train_epochs is 0; it must be above 0"),
        ("max_steps", 0, "max_steps is 0; it must be -1, or at least 1"),
        ("max_steps", -5, "max_steps is -5; it must be -1, or at least 1"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size is 0; it must be at least 1"),
        ("per_device_eval_batch_size", 0, "per_device_eval_batch_size is 0; it must be at least 1"),
        ("learning_rate", math.nan, "learning_rate is nan; it must be finite, and at least 0 (default: 5e-05)"),
        ("adam_beta2", 1, "adam_beta2 is 1; it must be at least 0 and below 1 (default: 0.999)"),
        ("label_smoothing_factor", 2, "label_smoothing_factor is 2; it must be at least 0 and below 1"),
        ("eval_steps", 2.5, "eval_steps is 2.5; it must be a whole number of steps, or below 1 a share of them"),
        ("seed", 2**32, "seed is 4294967296; it must be at least 0 and at most 4,294,967,295"),
        ("lr_scheduler_type", "cosin", "lr_scheduler_type is 'cosin'; choose one of linear, cosine"),
        ("optim", "adamw_torch_fuse", "did you mean adamw_torch_fused?"),
        ("metric_for_best_model", "eval_los", "choose one of eval_loss, loss; did you mean eval_loss?"),
        ("dtype", "float16", "bfloat16? (float16 weights lose the optimizer's small steps; on a GPU take float32"),
        ("parallelism_config", {"tp_size": 2}, "parallelism_config is {'tp_size': 2}, but a config file cannot hold"),
        ("warmup_ratio", 5, "warmup_ratio is 5; it must be at least 0 and below 1 (steps: warmup_steps)"),
        ("group_by_length", "maybe", "group_by_length is 'maybe', but it must be bool"),
        ("gradient_checkpointing", 3, "gradient_checkpointing is 3, but it must be bool"),
        ("lora_target_modules", [], "lora_target_modules is [], but it must be a list of texts that are not empty"),
        ("learning_rate", "10%", "learning_rate is '10%', but it must be float"),
        ("multimodal_max_length", "1,000", "multimodal_max_length is '1,000', but it must be int"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_its_range(write_config, key, value, message):
    assert message in refusal(write_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [("learning_rate", "2e-5", 2e-5), ("max_steps", "1_000", 1000), ("max_steps", "1e3", 1000), ("seed", " 7 ", 7),
     ("warmup_steps", ".1", 0.1), ("seed", str(2**32 - 1), 2**32 - 1)],
)  # fmt: skip
def test_numbers_written_as_text_are_read_where_they_mean_one_thing(write_config, key, text, number):
    assert load_config(write_config(**{key: text})).trainer[key] == number


@pytest.mark.parametrize("text", ["1_0", "1,5", "0x10", "nan", "inf", "٣", "1e", "ten", "1 000"])
def test_texts_that_may_mean_another_number_are_refused(write_config, text):
    assert f"max_steps is {text!r}" in refusal(write_config(max_steps=text))


# -- the command line and the file


def test_a_key_given_twice_is_an_error(write_config):
    message = refusal(write_config(), "--max_steps", "2", "--max-steps", "3")
    assert message == "--max_steps is given twice, as 2 and 3; keep one"
    assert load_config(write_config(), ["--max_steps", "2", "--max_steps=2"]).trainer["max_steps"] == 2


@pytest.mark.parametrize(
    "arguments", [["--max_steps="], ["--max_steps"], ["--output_dir", "--packing"], ["--optim", ""]]
)
def test_a_key_without_a_value_is_an_error(write_config, arguments):
    name = arguments[0].strip("=")
    assert f"{name} has no value; write {name} VALUE" in refusal(write_config(), *arguments)


def test_a_switch_needs_no_value(write_config):
    config = load_config(write_config(), ["--packing", "--gradient_checkpointing", "--max_steps", "3"])
    assert config.packing and config.trainer["max_steps"] == 3 and config.value("max_steps") == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "the key 'seed' stands in it twice"),
        ('{"lr_scheduler_kwargs": {"a": 1, "a": 2}}', "the key 'a' stands in it twice"),
        ('{"a": ' * 100_000, "is no valid JSON"),
        ('{"seed": ' + "1" * 5000 + "}", "is no valid JSON"),
    ],
)
def test_a_config_file_that_says_two_things_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert message in refusal(path)


def test_comments_may_stand_twice(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    path = tmp_path / "config.json"
    path.write_text('{"_why": 1, "_why": 2, "model_path": "tiny", "data_path": "train.json"}')
    assert load_config(path).trainer == {}


# -- files and folders


def test_files_that_are_folders_and_folders_that_are_files(write_config, tmp_path):
    assert "which is a folder; name the file of samples in it, for example" in refusal(write_config(data_path="."))
    assert refusal(write_config(eval_data_path=".")).startswith("eval_data_path is ")
    assert "image_folder is" in refusal(write_config(image_folder="train.json"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "no_stage.json").write_text("{}")
    for name, message in (("gone.json", "was not found"), ("broken.json", "is no valid JSON"),
                          ("list.json", "must hold one JSON object"), ("no_stage.json", "zero_optimization None"),
                          (".", "which is a folder")):  # fmt: skip
        text = refusal(write_config(deepspeed=name))
        assert text.startswith("deepspeed") and message in text
    assert "deepspeed has zero_optimization {'stage': 7}" in refusal(
        write_config(deepspeed={"zero_optimization": {"stage": 7}})
    )
    clipped = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    assert refusal(write_config(deepspeed=clipped)) == (
        'deepspeed has gradient_clipping 0.5, but max_grad_norm is 1.0; write "auto" there'
    )
    assert load_config(write_config(deepspeed=clipped, max_grad_norm=0.5)).value("deepspeed") == clipped
    assert "data_path is " in refusal(write_config(data_path="x" * 300))
    assert "datainfo:" in refusal(write_config(data_path="datainfo:gone"))
    assert "gone.json was not found. Looked for" in refusal(write_config(data_path="datainfo:gone:a"))
    assert "gone.json was not found. Looked for" in refusal("gone.json")
    assert refusal(tmp_path).endswith("is a folder, not a config file; name the JSON file in it")
    assert "tiny:train:none" in refusal(write_config(data_path="tiny:train:none"))


def test_an_exam_needs_the_tiny_models_data(write_config):
    assert "exam is true, but data_path" in refusal(write_config(exam=True))
    assert load_config(write_config(exam=True, data_path="tiny:train:64")).exam


@pytest.fixture
def taken(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    return tmp_path


@pytest.mark.parametrize("key", ["output_dir", "visual_cache_dir"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "which is empty"),
        ("file", "it is a file"),
        ("file/below/it", "which is a file"),
        ("nowhere", "it is a file"),
        ("n" * 300, "a name of 300 bytes"),
        ("/proc/x", "no file can be made there"),
        ("/proc/1/fd/x/y", "which cannot be written to"),
        ("/" + "long/" * 2000, "which cannot be written to"),
        ("a\0b", "a character that no file can have"),
        ("~nobody_of_this_name/out", "~nobody_of_this_name"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused(write_config, taken, monkeypatch, key, name, message):
    monkeypatch.chdir(taken)
    before = sorted(taken.rglob("*"))
    text = refusal(write_config(cache_visual_embeddings=True, use_lora=True, **{key: name}))
    assert text.startswith(f"{key} is") and message in text
    assert sorted(taken.rglob("*")) == sorted({*before, taken / "config.json"})


def test_permissions_and_full_disks_are_seen(write_config, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "you may not write to" in refusal(write_config())
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "its disk is full; free some space" in refusal(write_config())


# -- steps and precision


@pytest.mark.parametrize(("num_items", "batch"), [(3, 4), (1, 2)])
def test_a_run_without_a_step_is_refused(write_config, num_items, batch):
    config = load_config(write_config(dataloader_drop_last=True, per_device_train_batch_size=batch))
    with pytest.raises(ConfigError, match=f"dataloader_drop_last leaves no batch: {num_items} samples are fewer than"):
        build.steps_of(config, num_items)
    assert build.steps_of(config, batch).total == 3
    with pytest.raises(ConfigError, match="there is nothing to train: 0 samples"):
        build.steps_of(load_config(write_config()), 0)


def test_float16_is_mixed_precision_on_a_gpu_alone(write_config, monkeypatch):
    message = refusal(write_config(fp16=True))
    assert message.startswith("fp16 is true, but this run trains on the CPU") and '"dtype": "bfloat16"' in message
    assert "fp16 and bf16 are both true" in refusal(write_config(fp16=True, bf16=True))
    assert "fp16 needs float32 weights" in refusal(write_config(fp16=True, dtype="bfloat16"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    for settings in (
        {},
        {"use_lora": True},
        {"deepspeed": str(REPOSITORY_ROOT / "scripts/zero_configs/zero2_cp.json")},
    ):
        precision = build.choose_precision(load_config(write_config(fp16=True, **settings)))
        assert precision.fp16 and precision.weights is torch.float32


# -- evaluations and checkpoints

GRID = {
    "eval_strategy": [None, "no", "steps", "epoch"],
    "save_strategy": [None, "no", "steps", "epoch", "best"],
    "eval_steps": [None, 4, 10, 0.1],
    "save_steps": [None, 1, 10, 15, 97, 0.2],
    "load_best_model_at_end": [None, True, False],
    "do_eval": [None, False],
}


def test_every_rhythm_keeps_what_the_user_set_or_names_his_keys_alone(tmp_path):
    """The whole grid: transformers itself takes what comes out."""
    for values in itertools.product(*GRID.values()):
        given = {name: value for name, value in zip(GRID, values, strict=True) if value is not None}
        config = TrainConfig("tiny", "x", "e", output_dir=str(tmp_path), trainer=given)
        try:
            rhythm = choose_rhythm(config, 100)
        except ConfigError as error:
            evaluates_not = given.get("eval_strategy") == "no" or given.get("do_eval") is False
            assert given.get("load_best_model_at_end") or evaluates_not, given
            named = {name for name in TRAINER_KEYS if re.search(rf"\b{name}\b", str(error))}
            assert named and named <= given.keys(), str(error)
            assert "\n" not in str(error)
            continue
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **{**rhythm.values, **given})
        for name, value in given.items():
            assert getattr(arguments, name) == value, (given, name)
        if given.get("eval_strategy") != "no" and given.get("do_eval") is not False:
            assert arguments.eval_strategy != "no"
            is_explained = any("the final model is that of the last step" in note for note in rhythm.notes)
            assert arguments.load_best_model_at_end or is_explained or "load_best_model_at_end" in given


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        ({"save_strategy": "epoch"}, {"eval_strategy": "epoch", "load_best_model_at_end": True}, None),
        ({"save_strategy": "no"}, {"eval_steps": 10, "load_best_model_at_end": False}, "no checkpoints are saved"),
        ({"save_steps": 20}, {"eval_steps": 10, "load_best_model_at_end": True}, None),
        ({"save_steps": 97}, {"eval_steps": 97, "load_best_model_at_end": True}, None),
        ({"save_strategy": "best"}, {"eval_steps": 10, "load_best_model_at_end": True}, None),
        ({"eval_steps": 4, "save_steps": 10}, {"load_best_model_at_end": False}, "not every checkpoint has an eval"),
        ({"eval_strategy": "epoch", "save_steps": 10}, {"save_strategy": "steps", "load_best_model_at_end": False},
         "evaluations by epoch and checkpoints by steps"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, {"save_strategy": "epoch"}, "eval_steps has no effect"),
        ({"load_best_model_at_end": False}, {"eval_steps": 10, "save_steps": 10}, None),
        ({"eval_strategy": "no"}, {"save_steps": 25, "load_best_model_at_end": False}, None),
    ],
)  # fmt: skip
def test_defaults_follow_what_the_user_set(write_config, given, wanted, note):
    config, arguments = arguments_of(write_config(eval_data_path="eval.json", **given))
    assert {name: getattr(arguments, name) for name in wanted} == wanted
    assert any(note in text for text in config.notes) if note else not config.notes


def test_settings_that_evaluations_exclude(write_config):
    with_set = functools.partial(write_config, eval_data_path="eval.json")
    message = refusal(with_set(load_best_model_at_end=True, save_strategy="no"))
    assert message == (
        "load_best_model_at_end is true, but no checkpoints are saved: save_strategy no; change that, or remove "
        "load_best_model_at_end"
    )
    assert "eval_steps 4 and save_steps 10" in refusal(
        with_set(load_best_model_at_end=True, eval_steps=4, save_steps=10)
    )
    assert "greater_is_better is true" in refusal(with_set(greater_is_better=True))
    assert "eval_on_start asks for evaluation" in refusal(write_config(eval_on_start=True))
    assert "save_strategy best needs an evaluation set" in refusal(write_config(save_strategy="best"))
    assert "early_stopping_patience needs evaluations" in refusal(write_config(early_stopping_patience=2))
    assert "do_eval is false, but eval_strategy is steps" in refusal(with_set(do_eval=False, eval_strategy="steps"))


# -- packages


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr("ovis25.training.config.machine.has_package", lambda name: False)


OPTIMIZERS = [member.value for member in OptimizerNames]
PLAIN = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_whose_package_is_missing_is_refused(write_config, nothing_installed, optim):
    targets = {"optim_target_modules": ["attn"]} if optim.startswith(("galore", "apollo")) else {}
    path = write_config(optim=optim, **targets)
    if optim in PLAIN:
        assert arguments_of(path)[1].optim == optim
    else:
        assert re.match(rf"optim {optim} needs \w+, which is not installed: pip install [\w-]+, or take", refusal(path))


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, "wanbd", "nothing"])
def test_a_reporter_that_is_missing_is_refused(write_config, nothing_installed, name):
    for value in (name, [name], ["none", name]):
        message = refusal(write_config(report_to=value))
        assert f"report_to {name} needs" in message or f"report_to is {name!r}, which nobody knows" in message
        assert "pip install" in message or "did you mean wandb?" in message or "choose of" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "trl"}, "recipe is 'trl', which needs TRL: pip install"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "needs deepspeed, which is not installed: pip install"),
        ({"attn_implementation": "flash_attention_2"}, "it needs flash_attn, not installed here; use sdpa"),
        ({"attn_implementation": "flash_atention_2"}, "did you mean flash_attention_2?"),
        ({"attn_implementation": "someone/kernel"}, "needs kernels, which is not installed: pip install kernels"),
        ({"torch_compile_backend": "inductr"}, "did you mean inductor?"),
        ({"ddp_backend": "nccl"}, "ddp_backend is 'nccl', which this torch does not have"),
        ({"fsdp": True}, "fsdp is True, but there is one process"),
        ({"push_to_hub": True}, "push_to_hub is true, but there is no access token"),
        ({"dataloader_num_workers": 0, "dataloader_persistent_workers": True}, "but dataloader_num_workers is 0"),
        ({"dataloader_num_workers": 0, "dataloader_prefetch_factor": 2}, "but dataloader_num_workers is 0"),
        ({"optim_args": "a"}, "optim_args is 'a'; it must be of the form name=value"),
        ({"optim_args": "momentum=0.9"}, "optim_args has no effect with optim adamw_torch_fused"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "optim sgd with optim_args momentum=fast cannot be used"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args has 'momentm'; it may hold momentum, dampening"),
        ({"optim": "galore_adamw"}, "optim galore_adamw needs optim_target_modules"),
        ({"gradient_checkpointing_kwargs": {"use_rentrant": False}}, "did you mean use_reentrant?"),
        ({"gradient_checkpointing_kwargs": {"debug": "yes"}}, "debug is 'yes', but it must be bool"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config has 'split_batches'"),
        ({"train_modules": "llm:inf"}, "the learning rate of llm is 'inf'"),
        ({"single_image_min_pixels": 10**9}, "single_image_min_pixels"),
    ],
)  # fmt: skip
def test_what_the_machine_or_the_other_settings_exclude(write_config, nothing_installed, settings, message):
    assert message in refusal(write_config(**settings))


def test_liger_has_no_effect_and_says_so(write_config):
    config, arguments = arguments_of(write_config(use_liger_kernel=True))
    assert config.notes[0].startswith("use_liger_kernel has no effect here: Liger has no kernels for Ovis2.5")
    assert not arguments.use_liger_kernel


def test_workers_follow_the_settings_that_need_them(write_config, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert arguments_of(write_config(dataloader_prefetch_factor=2))[1].dataloader_num_workers == 1
    assert arguments_of(write_config())[1].dataloader_num_workers == 0


# -- schedules


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("cosine_with_min_lr", {}, 'needs lr_scheduler_kwargs, {"min_lr_rate": ...}'),
        ("cosine_warmup_with_min_lr", {}, 'needs lr_scheduler_kwargs, {"min_lr_rate": ...}'),
        ("warmup_stable_decay", {}, 'needs lr_scheduler_kwargs, {"num_decay_steps": ...}'),
        ("polynomial", {"lr_end": 1.0}, "cannot be used"),
        ("polynomial", {"lr_ende": 0}, "did you mean lr_end?"),
        ("polynomial", {"power": "two"}, "cannot be used"),
        ("cosine", {"num_cycle": 1}, "lr_scheduler_kwargs has 'num_cycle'; cosine takes num_cycles"),
        ("constant", {"num_cycles": 1}, "constant takes none; remove it"),
        ("cosine_with_min_lr", {"min_lr": "low"}, "cannot be used"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "fast"}, "cannot be used"),
        ("reduce_lr_on_plateau", {}, "lr_scheduler_type reduce_lr_on_plateau needs an evaluation set"),
        ("linear", "text", "lr_scheduler_kwargs is 'text', but it must be an object"),
        ("cosine_with_min_lr", {"min_lr_rate": 5}, "times the learning rate"),
        ("cosine_with_min_lr", {"min_lr": 1.0}, "times the learning rate"),
        ("polynomial", {"lr_end": 1e-4}, "must be smaller than initial lr"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused(write_config, kind, values, message):
    path = write_config(lr_scheduler_type=kind, **({"lr_scheduler_kwargs": values} if values else {}))
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 1e-6}),
        ("polynomial", {"lr_end": 1e-7, "power": 2}),
        ("warmup_stable_decay", {"num_decay_steps": 20}),
        ("cosine_with_restarts", '{"num_cycles": 3}'),
        ("inverse_sqrt", {}),
        ("reduce_lr_on_plateau", {"factor": 0.5, "patience": 2}),
    ],
)
def test_a_schedule_with_its_arguments_is_taken(write_config, kind, values):
    path = write_config(lr_scheduler_type=kind, lr_scheduler_kwargs=values, eval_data_path="eval.json")
    assert arguments_of(path)[1].lr_scheduler_type == kind


# -- DeepSpeed

AUTO = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, "train_micro_batch_size_per_gpu 5, but per_device_train_batch_size is"),
        ({"train_batch_size": 17}, "train_batch_size=17, but the settings make it"),
        ({"optimizer": {"type": "AdamW"}}, "an own optimizer, which would pass over the settings"),
        ({"scheduler": {"type": "WarmupLR"}}, "an own scheduler"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True, but the settings"),
        ({"bf16": True}, 'bf16 True; it must be {"enabled": "auto"}'),
        ({"gradient_cliping": 1}, "did you mean gradient_clipping?"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimiser": {}}},
            "offload_optimiser, which Deep",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "floppy"}}},
            "offload_param.device, which",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size, which DeepSpeed refuses"),
    ],
)
def test_a_deepspeed_config_that_cannot_work_is_refused(write_config, changes, message):
    pytest.importorskip("deepspeed")
    assert message in refusal(write_config(deepspeed={**AUTO, **changes}))


def test_a_deepspeed_config_without_a_batch_size_is_refused(write_config):
    pytest.importorskip("deepspeed")
    assert 'add it with "auto"' in refusal(write_config(deepspeed={"zero_optimization": {"stage": 2}}))
    config = load_config(write_config(deepspeed=AUTO))
    build.check_before_loading(config)
    assert config.trainer["deepspeed"] == AUTO


# -- before anything is loaded


def test_a_rate_of_zero_teaches_nothing(write_config):
    config = load_config(write_config(learning_rate=0))
    build.check_before_loading(config)
    assert "learning_rate is 0: the run changes nothing" in config.notes
    assert arguments_of(write_config(learning_rate=0, train_modules="llm:1e-5"))[1].learning_rate == 0


def test_a_dry_run_refuses_what_a_run_refuses_and_leaves_nothing(write_config, tmp_path, capsys):
    path = write_config(report_to="nothing", data_path="tiny:train:8")
    for arguments in ([], ["--dry-run"]):
        assert train_main([str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: report_to is 'nothing'") and error.count("\n") == 1
    assert train_main([str(write_config(output_dir=str(tmp_path / "train.json" / "x"))), "--dry-run"]) == 2
    assert "which is a file; name another folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
