"""The standard training run end to end, on files: plan, evaluation, early stopping, resume, the final folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PIXELS, losses_of, run
from safetensors.torch import load_file
from transformers import TrainerCallback

from ovis25 import Ovis2_5, Ovis2_5Processor, Ovis25Inference
from ovis25.data import ConversationDataset, DataError
from ovis25.data.collator import Collator
from ovis25.files import REPOSITORY_ROOT
from ovis25.training.checkpoints import find_checkpoints
from ovis25.training.config import ConfigError, load_config
from ovis25.training.run import train


def test_a_run_leaves_a_folder_that_loads_and_answers(write_config, data_dir, tmp_path, capsys):
    results = run(write_config(eval_data_path=str(data_dir / "eval.json"), eval_steps=3))
    out = tmp_path / "out"
    assert results["finished"] and results["global_step"] == 6
    assert results["stop_reason"] == "all 6 steps are done (1.00 epochs)"
    for name in ("train_config.json", "train_plan.json", "train_results.json", "loss_curve.png"):
        assert (out / name).is_file()

    model, info = Ovis2_5.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    best = load_file(out / results["best_checkpoint"] / "model.safetensors")
    assert all(torch.equal(best[name], value) for name, value in load_file(out / "model.safetensors").items())
    processor = Ovis2_5Processor.from_pretrained(out)
    assert processor.limits.budget("single_image") == (32 * 32, 96 * 96)
    assert isinstance(Ovis25Inference(out).text_only_inference("What is 1 + 1?", max_new_tokens=4), str)

    printed = capsys.readouterr()
    assert "12 (" in printed.out and "evaluates    every 3 steps (2 times)" in printed.out
    assert printed.err.count("evaluation loss") == 2 and "tokens/s" in printed.err


def test_the_plan_tells_the_rates_of_the_optimizer_that_runs(write_config, tmp_path, capsys):
    run(write_config(train_modules="visual_tokenizer:1e-4|vte:2e-4|llm", max_steps=1, warmup_steps=1))
    plan = json.loads((tmp_path / "out" / "train_plan.json").read_text())
    rates = {group["module"]: group["learning_rate"] for group in plan["optimizer_groups"]}
    assert rates == {"visual_tokenizer": 1e-4, "vte": 2e-4, "llm": 1e-3}
    assert plan["total_steps"] == 1 and plan["steps_per_epoch"] == 6 and plan["effective_batch"] == 2
    assert plan["data"]["num_samples"] == 12
    assert "optimizer: vte" in capsys.readouterr().out


def test_the_plans_tokens_are_those_of_the_data(write_config, data_dir, tiny_folder, tmp_path):
    run(write_config(max_steps=1))
    dataset = ConversationDataset(data_dir / "train.json", Ovis2_5Processor.from_pretrained(tiny_folder), **PIXELS)
    data = json.loads((tmp_path / "out" / "train_plan.json").read_text())["data"]
    items = [dataset[i] for i in range(len(dataset))]
    assert data["total_tokens"] == sum(len(item["input_ids"]) for item in items)
    assert data["learned_tokens"] == sum(int((item["labels"] != -100).sum()) for item in items)


def test_only_the_chosen_modules_change(write_config, tiny_folder, tmp_path):
    run(write_config(train_modules="vte|visual_tokenizer.vit.last_block", max_steps=2))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in before if "encoder.layers" in name)
    assert "vte.weight" in changed
    assert all(name == "vte.weight" or f"encoder.layers.{last}." in name for name in changed)


def test_the_evaluation_loss_is_the_token_mean_and_the_training_loss_on_the_same_data(write_config, data_dir, tmp_path):
    """One step over the whole file at learning rate zero: its loss is the mean over the file's learned tokens."""
    run(
        write_config(eval_data_path=str(data_dir / "train.json"), per_device_train_batch_size=12, learning_rate=0.0,
                     per_device_eval_batch_size=5, eval_steps=1, max_steps=1)
    )  # fmt: skip
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    training = next(entry["loss"] for entry in state["log_history"] if "loss" in entry)
    evaluation = next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
    assert evaluation == pytest.approx(training, rel=1e-4)

    model = Ovis2_5.from_pretrained(tmp_path / "out", dtype=torch.float32)
    processor = Ovis2_5Processor.from_pretrained(tmp_path / "out")
    dataset = ConversationDataset(data_dir / "train.json", processor, **PIXELS)
    total = tokens = 0.0
    for index in range(len(dataset)):
        batch = Collator(processor.tokenizer.pad_token_id)([dataset[index]])
        with torch.no_grad():
            total += float(model(**batch, num_items_in_batch=1).loss)
        tokens += int((batch["labels"] != -100).sum())
    assert evaluation == pytest.approx(total / tokens, rel=1e-5)


def test_accumulated_batches_train_as_the_big_batch_does(write_config, tmp_path):
    """Four ragged micro-batches of one against one batch of four: the same loss and the same weights."""
    shared = {"max_steps": 3, "optim": "sgd", "save_steps": 3}
    run(write_config(**shared), "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "big")
    run(write_config(**shared), "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4,
        "--output_dir", tmp_path / "small")  # fmt: skip
    big, small = losses_of(tmp_path / "big"), losses_of(tmp_path / "small")
    assert small == pytest.approx(big, rel=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("big", "small"))
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-6), name


def test_gradient_checkpointing_changes_nothing(write_config, tmp_path):
    run(write_config(max_steps=2, save_steps=2), "--output_dir", tmp_path / "plain")
    run(write_config(max_steps=2, save_steps=2, gradient_checkpointing=True), "--output_dir", tmp_path / "checkpointed")
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "checkpointed")


def test_early_stopping_says_why_and_loads_the_best(write_config, data_dir, tmp_path, capsys):
    results = run(
        write_config(eval_data_path=str(data_dir / "eval.json"), learning_rate=0.0, eval_steps=1, num_train_epochs=5)
    )
    assert results["stop_reason"].startswith("early stopping at step 4: eval_loss has not improved on ")
    assert results["stop_reason"].endswith("for 3 evaluations")
    assert results["best_checkpoint"] == "checkpoint-1" and results["global_step"] == 4
    assert "early stopping at step 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "train_results.json").read_text()) == results


def test_patience_zero_never_stops(write_config, data_dir):
    results = run(
        write_config(eval_data_path=str(data_dir / "eval.json"), learning_rate=0.0, eval_steps=1, max_steps=6,
                     early_stopping_patience=0)
    )  # fmt: skip
    assert results["global_step"] == 6


KILLER = """
import os, signal, sys
from transformers import TrainerCallback
from ovis25.cli import train_main
from ovis25.training import callbacks

class Kill(callbacks.FiniteLoss):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

import ovis25.training.run as run
run.FiniteLoss = Kill
sys.exit(train_main(sys.argv[1:]))
"""


def test_a_killed_run_resumes_and_ends_as_if_nothing_had_happened(write_config, data_dir, tmp_path):
    """SIGKILL at step 5 with checkpoints at 2 and 4: the same command resumes at 4 and reaches equal weights."""
    config = write_config(eval_data_path=str(data_dir / "eval.json"), eval_steps=2, max_steps=8)
    run(config, "--output_dir", tmp_path / "whole")
    arguments = [str(config), "--output_dir", str(tmp_path / "cut")]
    killed = subprocess.run([sys.executable, "-c", KILLER, *arguments], env={**os.environ, "KILL_AT": "5"}, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert [folder.name for folder in find_checkpoints(tmp_path / "cut")[0]] == ["checkpoint-2", "checkpoint-4"]

    # what a power cut in the middle of saving leaves behind
    half = tmp_path / "cut" / "checkpoint-6"
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", half, ignore=shutil.ignore_patterns("COMPLETE", "optimizer.pt"))
    door = [sys.executable, REPOSITORY_ROOT / "src_theo" / "train_theo.py", *arguments]
    resumed = subprocess.run(door, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes from checkpoint-4 (step 4 of 8)" in resumed.stdout
    assert "checkpoint-6 was not written to its end and is passed over" in resumed.stdout
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_a_run_cut_off_before_its_final_save_only_saves(write_config, data_dir, tmp_path, capsys):
    config = write_config(eval_data_path=str(data_dir / "eval.json"), eval_steps=2, max_steps=4)
    results = run(config)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("train_results.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert run(config)["global_step"] == 4
    assert "checkpoint-4 is the end of this run" in capsys.readouterr().out
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    kept = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert {k: kept[k] for k in ("stop_reason", "best_checkpoint")} == {
        k: results[k] for k in ("stop_reason", "best_checkpoint")
    }


def test_early_stopping_counts_on_after_a_resume(write_config, data_dir, tmp_path):
    config = write_config(eval_data_path=str(data_dir / "eval.json"), learning_rate=0.0, eval_steps=1, max_steps=9)
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, str(config)], env={**os.environ, "KILL_AT": "3"}, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert run(config)["stop_reason"].startswith("early stopping at step 4")


def test_a_finished_run_is_not_run_again(write_config, tmp_path, capsys):
    config = write_config(max_steps=1)
    run(config)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(config)["finished"]
    assert "holds this run, finished (all 1 steps are done" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused_and_can_be_forced(write_config, tmp_path):
    run(write_config(max_steps=2, save_steps=1))
    with pytest.raises(ConfigError) as error:
        run(write_config(max_steps=2, save_steps=1, learning_rate=5e-4))
    assert "learning_rate: 0.001 there, 0.0005 now" in str(error.value)
    assert "--overwrite_output_dir true" in str(error.value)
    results = run(write_config(max_steps=3, save_steps=1), "--overwrite_output_dir", "true")
    assert results["global_step"] == 3 and losses_of(tmp_path / "out").keys() == {1, 2, 3}


def test_a_wished_checkpoint_must_be_complete(write_config, tmp_path):
    with pytest.raises(ConfigError, match="is no complete checkpoint; .* has: none"):
        run(write_config(max_steps=1), "--resume_from_checkpoint", tmp_path / "checkpoint-9")


def test_a_defective_evaluation_set_stops_the_run_before_it_starts(write_config, data_dir, tmp_path):
    (tmp_path / "bad.json").write_text('[{"id": "b", "image": "gone.png", "conversations": []}]')
    with pytest.raises(DataError, match="bad.json"):
        run(write_config(eval_data_path=str(tmp_path / "bad.json")))
    assert not (tmp_path / "out").exists()


def test_skipped_samples_are_listed_in_the_output_folder(write_config, data_dir, tmp_path):
    samples = json.loads((data_dir / "train.json").read_text())
    samples.append({"id": "lost", "image": "gone.png", "conversations": samples[1]["conversations"]})
    (data_dir / "with_bad.json").write_text(json.dumps(samples))
    run(write_config(data_path=str(data_dir / "with_bad.json"), on_bad_sample="skip", max_steps=1))
    listed = (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()
    assert len(listed) == 1 and json.loads(listed[0])["id"] == "lost"
    assert json.loads((tmp_path / "out" / "train_plan.json").read_text())["data"]["num_skipped"] == 1


def test_an_attention_that_is_not_installed_says_so(write_config):
    with pytest.raises(ConfigError, match="attn_implementation flash_attention_2 cannot be used"):
        run(write_config(attn_implementation="flash_attention_2", max_steps=1))


def test_a_loss_that_is_no_number_ends_the_run(write_config):
    with pytest.raises(FloatingPointError, match="the training loss became nan at step"):
        run(write_config(learning_rate=1e30, max_grad_norm=0.0, max_steps=6))


def test_a_bfloat16_checkpoint_trained_in_float32_is_saved_in_bfloat16(write_config, tiny_folder, tmp_path):
    half = tmp_path / "half"
    model = Ovis2_5.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.save_pretrained(half)
    run(write_config(max_steps=1, save_steps=1), "--model_path", half)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    resumable = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert {value.dtype for value in resumable.values()} == {torch.float32}


def launch(num_processes: int, config: Path, *arguments) -> None:
    """A torchrun of real gloo processes; a watchdog turns a hang into a failure."""
    door = str(REPOSITORY_ROOT / "src_theo" / "train_theo.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", door]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([*command, str(config), *map(str, arguments)], env=env, start_new_session=True)
    try:
        assert started.wait(timeout=240) == 0
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        pytest.fail("the processes hang")


def test_two_processes_train_as_one_does_with_text_and_pictures_apart(write_config, data_dir, tmp_path):
    """Batches of one, where one rank may hold pictures and the other text alone."""
    config = write_config(max_steps=6, save_steps=6, eval_data_path=str(data_dir / "eval.json"), eval_steps=6)
    run(config, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "one")
    launch(2, config, "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "two")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    best = [json.loads((tmp_path / n / "train_results.json").read_text())["best_eval_loss"] for n in ("one", "two")]
    # five samples over two processes: none may count twice
    assert best[1] == pytest.approx(best[0], rel=1e-4)


def test_checkpointed_towers_and_z_loss_reach_the_model(write_config, data_dir):
    """Checkpointing one tower changes no loss; the z-loss is added to each token's."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            whole = getattr(model, "get_base_model", lambda: model)()
            towers = (whole.visual_tokenizer.vit.vision_model.encoder.layers, whole.llm.model.layers)
            seen.append([layer.gradient_checkpointing for layers in towers for layer in layers[:1]])

    config = write_config(max_steps=1, overwrite_output_dir=True)
    losses = []
    for overrides in (
        [],
        ["--gradient_checkpointing", "true", "--gradient_checkpointing_towers", "llm"],
        ["--gradient_checkpointing", "true", "--gradient_checkpointing_towers", "vision", "--use_lora", "true"],
        ["--z_loss", "0.01"],
        ["--z_loss", "0.02"],
    ):
        losses.append(train(load_config(config, overrides), callbacks=[Look()])["last_train_loss"])
    assert seen == [[False, False], [False, True], [True, False], [False, False], [False, False]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[3] > losses[0] + 0.1
    assert losses[4] - losses[0] == pytest.approx(2 * (losses[3] - losses[0]), rel=1e-3)
    with pytest.raises(ConfigError, match="z_loss is -1"):
        load_config(config, ["--z_loss", "-1"])
    with pytest.raises(ConfigError, match="gradient_checkpointing_towers is 'vit'; choose one of both, llm, vision"):
        load_config(config, ["--gradient_checkpointing_towers", "vit"])


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"save_strategy": "no", "early_stopping_patience": 2}, None),
        ({"save_strategy": "epoch"}, "checkpoint-6"),
        ({"save_strategy": "best", "eval_steps": 2}, "checkpoint-6"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "save_steps": 4}, None),
    ],
)
def test_an_evaluated_run_ends_however_it_saves(write_config, data_dir, tmp_path, capsys, settings, best):
    results = run(write_config(eval_data_path=str(data_dir / "eval.json"), learning_rate=1e-4, **settings))
    assert results["global_step"] == 6 and (tmp_path / "out" / "model.safetensors").is_file()
    said = "the final model is that of the last step, not the best one" in capsys.readouterr().out
    assert said == (best is None)
    assert best is None or results["best_checkpoint"] == best
