"""The trl recipe: the standard run's numbers, TRL's own features."""

import dataclasses
import json

import pytest
import torch
from conftest import PIXELS, losses_of, relative_error, run
from safetensors.torch import load_file
from transformers import TrainerCallback

from ovis25 import Ovis2_5, Ovis2_5Processor
from ovis25.data import ConversationDataset
from ovis25.data.collator import Collator
from ovis25.training.config import OWN_KEYS, TRAINER_KEYS, ConfigError, load_config, trl_keys
from ovis25.training.run import train

trl = pytest.importorskip("trl")

SAME = 1e-4


def history(output_dir, step: int) -> list[dict]:
    return json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def test_three_steps_have_the_standard_trainers_loss_and_gradients(write_config, tmp_path):
    """With plain SGD a step's change of the weights is its gradient, times the learning rate."""
    config = write_config(optim="sgd", learning_rate=1e-3, lr_scheduler_type="constant", max_steps=3, save_steps=1,
                          save_total_limit=5, gradient_accumulation_steps=2)  # fmt: skip
    for recipe in ("standard", "trl"):
        run(config, "--recipe", recipe, "--output_dir", tmp_path / recipe)
    assert losses_of(tmp_path / "trl") == pytest.approx(losses_of(tmp_path / "standard"), rel=SAME)
    before = {recipe: None for recipe in ("standard", "trl")}
    for step in (1, 2, 3):
        norms = [history(tmp_path / recipe, step)[-1]["grad_norm"] for recipe in before]
        assert norms[1] == pytest.approx(norms[0], rel=SAME)
        after = {r: load_file(tmp_path / r / f"checkpoint-{step}" / "model.safetensors") for r in before}
        changes = [torch.cat([(after[r][n] - (before[r] or after[r])[n]).flatten() for n in after[r]]) for r in before]
        assert relative_error(after["trl"]["vte.weight"], after["standard"]["vte.weight"]) < SAME
        if before["trl"]:
            assert changes[0].norm() > 0 and relative_error(changes[1], changes[0]) < SAME
        before = after


def test_trls_metrics_are_those_of_the_learned_tokens(write_config, data_dir, tmp_path):
    """At learning rate zero the evaluation's metrics are computable from the saved model's logits."""
    from_eval = str(data_dir / "eval.json")
    run(write_config(recipe="trl", eval_data_path=from_eval, learning_rate=0.0, max_steps=1, eval_steps=1,
                     per_device_eval_batch_size=2))  # fmt: skip
    got = next(entry for entry in history(tmp_path / "out", 1) if "eval_loss" in entry)
    model = Ovis2_5.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = Ovis2_5Processor.from_pretrained(tmp_path / "out")
    rows, labels = [], []
    for item in ConversationDataset(from_eval, processor, **PIXELS):
        batch = Collator(0)([item])
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        learned = batch["labels"][0, 1:] != -100
        rows.append(logits[learned])
        labels.append(batch["labels"][0, 1:][learned])
    logits, labels = torch.cat(rows), torch.cat(labels)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert got["eval_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    assert got["eval_mean_token_accuracy"] == pytest.approx(float(accuracy), rel=1e-5)
    assert history(tmp_path / "out", 1)[0]["num_tokens"] > 0


def test_dft_weights_tokens_by_their_probability(write_config, tmp_path):
    run(write_config(recipe="trl", loss_type="dft", max_steps=1, save_steps=1))
    plain = write_config(recipe="trl", max_steps=1, save_steps=1)
    run(plain, "--output_dir", tmp_path / "nll")
    # p * -log p is below exp(-1) for every token
    assert losses_of(tmp_path / "out")[1] < 0.37 < losses_of(tmp_path / "nll")[1]


def test_neftune_offloading_and_callbacks_work(write_config, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    config = write_config(recipe="trl", neftune_noise_alpha=5, max_steps=2, save_steps=2)
    train(load_config(config), callbacks=[Watch()])
    run(write_config(recipe="trl", max_steps=2, save_steps=2), "--output_dir", tmp_path / "still")
    assert seen == [1, 2]
    assert losses_of(tmp_path / "out")[1] != losses_of(tmp_path / "still")[1]


def test_early_stopping_and_resume_work_as_in_the_standard_recipe(write_config, data_dir, tmp_path):
    settings = {"recipe": "trl", "eval_data_path": str(data_dir / "eval.json"), "learning_rate": 0.0, "eval_steps": 1}
    results = run(write_config(**settings, max_steps=9, early_stopping_patience=2))
    assert results["stop_reason"].startswith("early stopping at step 3")


def test_the_table_of_keys_is_sftconfigs():
    names = {field.name for field in dataclasses.fields(trl.SFTConfig)} - TRAINER_KEYS.keys() - {"output_dir"}
    assert names & OWN_KEYS.keys() == {"packing"}, "ours in both recipes"
    assert names - {"packing"} == trl_keys.PASSED_ON.keys() | trl_keys.WITHOUT_EFFECT.keys()


def test_keys_that_another_recipe_understands_are_reported(write_config):
    notes = load_config(write_config(loss_type="dft", max_length=512, lora_r=4)).notes
    assert "loss_type has no effect here: only the trl recipe knows it" in notes
    assert "max_length has no effect here: use multimodal_max_length and text_max_length" in notes
    assert "lora_r has no effect without use_lora" in notes
    assert not load_config(write_config(recipe="trl", loss_type="dft")).notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "ppo"}, "recipe is 'ppo'; choose one of standard, trl"),
        ({"recipe": "trl", "loss_type": "mse"}, "loss_type is 'mse'; choose one of nll, dft"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "exclude each other"),
    ],
)
def test_wrong_settings_are_refused(write_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(**settings))
