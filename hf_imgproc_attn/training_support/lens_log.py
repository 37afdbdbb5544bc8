"""Writes into the log of a training run, every so many steps, what the model's attention filters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_imgproc_attn.cards.filters import LENS_PREFIX
from hf_imgproc_attn.errors import UsageError

HEAD_MEASURES = ("entropy_share", "position_bandwidth", "content_bandwidth", "sink_weight")
"""Of heads: their mean in each layer is logged."""
SAMPLES = 8


class LensLog(TrainerCallback):
    """Looks at the same samples before the first step, every so many steps, and at the end.

    Logged are ``lens_NAME_LAYER``: means over heads of :data:`HEAD_MEASURES`, and ``similarity``, the mean cosine of
    two tokens as they leave a layer. ``docs/lens.md`` defines them.

    Args:
        trainer: whose log is written, to TensorBoard too where the run reports there.
        rows: a data set; its first samples are looked at.
        every: so many steps.
    """

    def __init__(self, trainer: Trainer, rows: Any, every: int) -> None:
        self._trainer, self._every, self._last = trainer, every, -1
        with torch.random.fork_rng(devices=[]):  # augmentation draws, and training must not notice
            samples = [rows[index] for index in range(min(SAMPLES, len(rows)))]
            batch = trainer.data_collator(samples)
        self._inputs = {name: value for name, value in batch.items() if not name.startswith("label")}

    def _look(self, model: Any, step: int, control: Any) -> None:
        from hf_imgproc_attn.lens import inspect_model

        if self._last == step:
            return
        self._last = step
        inputs = {name: value.to(model.device) for name, value in self._inputs.items()}
        try:
            report = inspect_model(model, inputs, spectra="none", noise=0.0, measures="summary")
        except ValueError as error:
            raise UsageError(f"lens_every cannot be used with this model: {error}") from error
        logs = {
            f"{LENS_PREFIX}{name}_{layer.index}": sum(getattr(head, name) for head in layer.heads) / len(layer.heads)
            for layer in report.layers
            for name in HEAD_MEASURES
        }
        for layer in report.layers:
            if "leaving" in layer.tokens:
                logs[f"{LENS_PREFIX}similarity_{layer.index}"] = layer.tokens["leaving"].similarity
        wanted = control.should_log
        self._trainer.log({name: round(value, 6) for name, value in logs.items() if value == value})
        control.should_log = (
            wanted  # which any entry in the log puts back, so that the loss of this step would be lost
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model, state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._look(model, state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model, state.global_step, control)
