"""Says once in a training run when a learned bandwidth has reached the bound at which it is used."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..models.layer_parameters import bandwidth_bounds, bandwidths_at_bound

logger = logging.get_logger(__name__)


class BandwidthBounds(TrainerCallback):
    """Looks whenever the Trainer logs, and at the end."""

    def __init__(self) -> None:
        self._said = False

    def _look(self, model: Any) -> None:
        if self._said or model is None:
            return
        found = bandwidths_at_bound(model)
        if found:
            self._said = True
            low, high = bandwidth_bounds(torch.float32)
            logger.warning(
                f"learned bandwidths have reached a bound, {low:g} or {high:g}, and act as if they were there: "
                f"{', '.join(found)}. A lower learning rate, or learn_bandwidths=False, keeps them inside"
            )

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model)
