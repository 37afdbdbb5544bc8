"""``training_curves.png``: what ``run.json`` recorded while a run was trained."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from ..errors import UsageError, require_extras
from .results import METRICS


def draw_curves(record: dict[str, Any], path: Path | IO[bytes]) -> None:
    """Draw the training loss and, where it was evaluated during training, validation loss and metric against the step.

    Args:
        record: the content of ``run.json``.
        path: the PNG file to write, or an open one.

    Raises:
        UsageError: if the record has neither, or matplotlib is not installed.
    """
    require_extras("hub")
    from matplotlib.figure import Figure  # without pyplot: no window system and no global state

    training, history = record.get("train_loss") or [], record.get("eval_history") or []
    if not training and not history:
        raise UsageError("the record of the run has no training curves (train_loss, eval_history)")
    metric = next((name for name in METRICS if name != "loss" and any(name in values for _, values in history)), None)
    figure = Figure(figsize=(6 if metric is None else 11, 4), layout="constrained")
    axes = figure.subplots(1, 1 if metric is None else 2, sharex=True, squeeze=False)[0]
    if training:
        axes[0].plot(*zip(*training, strict=True), label="training")
    _plot_history(axes[0], history, "loss")
    axes[0].set_ylabel("loss (nats)")
    axes[0].legend()
    if metric is not None:
        _plot_history(axes[1], history, metric)
        axes[1].set_ylabel(f"validation {METRICS[metric]}")
    for panel in axes:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _plot_history(axes: Any, history: list[Any], metric: str) -> None:
    points = [(step, values[metric]) for step, values in history if metric in values]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color="C1", label="validation")
