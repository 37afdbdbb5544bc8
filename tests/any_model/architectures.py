"""Tiny random models of many architectures, by short names; see ``hf_imgproc_attn.measure.support_models``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_imgproc_attn.measure import support_models
from hf_imgproc_attn.measure.support_models import BART, GROUPED, IMAGE, TEXT, WINDOW, output, padding, text

__all__ = ["BART", "GROUPED", "IMAGE", "TEXT", "WINDOW", "output", "padding", "text"]

_SHORT = {"GPT-2": "gpt2", "DINOv2 with registers": "dinov2_with_registers"}


def _short(title: str) -> str:
    return _SHORT.get(title, title.lower().replace(" ", "").replace("-", "_"))


def _by_short_name(table: dict[str, Any]) -> dict[str, Any]:
    return {_short(title): row for title, row in table.items()}


_TITLES = {_short(title): title for title in support_models.ARCHITECTURES}
DECODERS = _by_short_name(support_models.DECODERS)
ENCODERS = _by_short_name(support_models.ENCODERS)
IMAGES = _by_short_name(support_models.IMAGES)
ENCODER_DECODERS = _by_short_name(support_models.ENCODER_DECODERS)
AUDIO = _by_short_name(support_models.AUDIO)
EVERYTHING = {**DECODERS, **ENCODERS, **IMAGES, **ENCODER_DECODERS, **AUDIO}


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A float64 model for inference, with weights so large that its attention is far from uniform."""
    return support_models.build(_TITLES[name], seed, **changes)


def inputs(name: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    return support_models.inputs(_TITLES[name], padded)
