"""Ends a training run whose loss is no finite number any more: the steps to come would learn nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback


def has_diverged(history: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a loss in the Trainer's log, of training or evaluation, is infinite or no number."""
    return any(not math.isfinite(entry[name]) for entry in history for name in ("loss", "eval_loss") if name in entry)


class DivergenceStop(TrainerCallback):
    """Looks whenever the Trainer logs. It needs ``logging_nan_inf_filter`` off, which would hide such losses."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if has_diverged([logs or {}]):
            control.should_training_stop = True
