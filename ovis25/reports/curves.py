"""The picture of a run: loss curves as a PNG. The one file that knows matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter


def draw_curves(log_history: list[dict], path: str | Path, title: str) -> None:
    """Training and evaluation loss over steps, with the best evaluation marked, and the learning rate below."""
    train = [(entry["step"], entry["loss"], entry.get("learning_rate")) for entry in log_history if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not train and not evaluations:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if train:
        steps, losses, rates = zip(*train, strict=True)
        loss_axes.plot(steps, losses, color="0.6", linewidth=1, label="training")
        rate_axes.plot(steps, rates, color="0.4", linewidth=1)
    if evaluations:
        steps, losses = zip(*evaluations, strict=True)
        loss_axes.plot(steps, losses, color="tab:blue", marker="o", markersize=3, label="evaluation")
        best_step, best_loss = min(evaluations, key=lambda entry: entry[1])
        loss_axes.plot(best_step, best_loss, "*", color="tab:red", markersize=12, label=f"best: {best_loss:.4f}")
    loss_axes.set_yscale("log")
    # plain numbers, also where the curve stays within one power of ten
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    loss_axes.set_ylabel("loss per learned token")
    loss_axes.set_title(title)
    loss_axes.legend()
    loss_axes.grid(alpha=0.3, which="both")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
