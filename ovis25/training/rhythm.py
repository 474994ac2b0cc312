"""When a run evaluates and saves, and whether it ends with the best checkpoint: defaults follow what the user set."""

from dataclasses import dataclass, field

from ovis25.training.config import ConfigError, TrainConfig

_NUM_EVALUATIONS = 10
_NUM_SAVES = 4
_BY_LOSS = ("reduce_lr_on_plateau", "greedy")


@dataclass
class Rhythm:
    """Values of TrainingArguments that the user did not give, and what the plan says about them."""

    values: dict
    notes: list[str] = field(default_factory=list)

    @property
    def evaluates(self) -> bool:
        return self.values.get("eval_strategy", "no") != "no"


def choose_rhythm(config: TrainConfig, total_steps: int) -> Rhythm:
    """When to evaluate and save, where the config does not say.

    What the user set stays as it is: the strategy of the one follows that of the other, steps that are not given divide
    those that are, and the best checkpoint is loaded at the end wherever checkpoints and evaluations coincide.

    Raises:
        ConfigError: keys that the user gave exclude each other; no other key is named.
    """
    given = config.given_trainer
    if not config.eval_data_path:
        _check_without_set(given)
        return Rhythm(_saving_alone(given, total_steps))
    evaluates = _evaluation_strategy(given)
    if evaluates == "no":
        _check_without_evaluation(given)
        return Rhythm({"eval_strategy": "no", **_saving_alone(given, total_steps)})
    _check_direction(given)
    rhythm = _both(given, evaluates, total_steps)
    _decide_on_best(given, rhythm)
    return rhythm


def _check_without_set(given: dict) -> None:
    for name in ("eval_strategy", "do_eval", "eval_on_start"):
        if given.get(name, "no") not in ("no", False):
            raise ConfigError(f"{name} asks for evaluation, but eval_data_path names no evaluation set")
    for name, asks in _needing_evaluation(given):
        raise ConfigError(f"{name}{asks} needs an evaluation set: give eval_data_path")


def _needing_evaluation(given: dict) -> list[tuple[str, str]]:
    """Given keys that make no sense without evaluations, with their value where it matters."""
    wanting = [("load_best_model_at_end", "")] if given.get("load_best_model_at_end") else []
    if given.get("save_strategy") == "best":
        wanting.append(("save_strategy", " best"))
    if given.get("lr_scheduler_type") in _BY_LOSS:
        wanting.append(("lr_scheduler_type", f" {given['lr_scheduler_type']}"))
    return wanting


def _evaluation_strategy(given: dict) -> str:
    """The user's, else that of his evaluation steps, else that of his checkpoints."""
    wish = given.get("eval_strategy")
    if given.get("do_eval") is False:
        if wish not in (None, "no"):
            raise ConfigError(f"do_eval is false, but eval_strategy is {wish}; remove one of them")
        return "no"
    if wish:
        return wish
    return "epoch" if given.get("save_strategy") == "epoch" and "eval_steps" not in given else "steps"


def _check_without_evaluation(given: dict) -> None:
    off = "do_eval is false" if given.get("do_eval") is False else "eval_strategy is no"
    if given.get("do_eval"):
        raise ConfigError("do_eval is true, but eval_strategy is no; remove one of them")
    for name, asks in _needing_evaluation(given):
        raise ConfigError(f"{name}{asks} needs evaluations, but {off}; remove one of them")


def _check_direction(given: dict) -> None:
    if given.get("greater_is_better"):
        raise ConfigError("greater_is_better is true, but the best loss is the smallest; remove it")


def _saving_alone(given: dict, total_steps: int) -> dict:
    """Checkpoints without evaluations: a few times a run."""
    return {"save_strategy": "steps", "save_steps": max(1, total_steps // _NUM_SAVES)}


def _both(given: dict, evaluates: str, total_steps: int) -> Rhythm:
    """Evaluations and checkpoints, at the same steps wherever the user leaves that open."""
    rhythm = Rhythm({"eval_strategy": evaluates})
    saves = given.get("save_strategy") or ("steps" if "save_steps" in given else evaluates)
    rhythm.values["save_strategy"] = saves
    idle = {"eval_steps": ("eval_strategy", evaluates), "save_steps": ("save_strategy", saves)}
    for name, (strategy_name, strategy) in idle.items():
        if name in given and strategy != "steps":
            rhythm.notes.append(f"{name} has no effect with {strategy_name} {strategy}")
    wished = max(1, total_steps // _NUM_EVALUATIONS)
    if evaluates == "steps":
        apart = given.get("save_steps") if saves == "steps" else None
        rhythm.values["eval_steps"] = _dividing(apart, wished) if apart else wished
    rhythm.values["save_steps"] = given.get("eval_steps", rhythm.values.get("eval_steps", wished))
    return rhythm


def _dividing(save_steps: float, wished: int) -> float:
    """The divisor of save_steps that is nearest to the wished number of steps, in ratio; a share stays itself."""
    if save_steps < 1:
        return save_steps
    whole = int(save_steps)
    small = [number for number in range(1, int(whole**0.5) + 1) if whole % number == 0]
    return min((*small, *(whole // number for number in small)), key=lambda n: max(n / wished, wished / n))


def _decide_on_best(given: dict, rhythm: Rhythm) -> None:
    """Load the best checkpoint at the end where there is one for every evaluation that may be the best."""
    chosen = {**rhythm.values, **given}
    reason, keys = _why_no_best(chosen)
    if given.get("save_only_model") and (given.get("deepspeed") or given.get("fsdp")):
        reason, keys = "a sharded model is not loaded back from save_only_model", ("save_only_model",)
    wish = given.get("load_best_model_at_end")
    if reason and wish:
        named = [f"{key} {_plain(chosen[key])}" for key in keys if key in given]
        raise ConfigError(
            f"load_best_model_at_end is true, but {reason}: {' and '.join(named)}; change that, or remove "
            "load_best_model_at_end"
        )
    rhythm.values |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    rhythm.values["load_best_model_at_end"] = not reason
    if reason and wish is None:
        rhythm.notes.append(f"the final model is that of the last step, not the best one: {reason}")


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _why_no_best(chosen: dict) -> tuple[str | None, tuple[str, ...]]:
    """Why the best checkpoint cannot be loaded at the end, and because of which keys; (None, ()) where it can."""
    saves, evaluates = chosen["save_strategy"], chosen["eval_strategy"]
    if saves == "best":
        return None, ()
    if saves == "no":
        return "no checkpoints are saved", ("save_strategy",)
    if saves != evaluates:
        keys = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")
        return f"evaluations by {evaluates} and checkpoints by {saves} do not coincide", keys
    if saves == "steps" and not _is_multiple(chosen["save_steps"], chosen["eval_steps"]):
        return "not every checkpoint has an evaluation", ("eval_steps", "save_steps")
    return None, ()


def _is_multiple(save_steps: float, eval_steps: float) -> bool:
    """As transformers asks for it: both whole numbers of steps, or both shares of the run."""
    if (save_steps < 1) != (eval_steps < 1):
        return False
    scale = 1_000_000 if save_steps < 1 else 1
    return (save_steps * scale) % (eval_steps * scale) == 0


def check_patience(config: TrainConfig, evaluates: bool) -> None:
    """Early stopping needs evaluations to judge by.

    Raises:
        ConfigError: there are none.
    """
    if config.early_stopping_patience and not evaluates:
        raise ConfigError("early_stopping_patience needs evaluations: give eval_data_path, and no eval_strategy of no")
