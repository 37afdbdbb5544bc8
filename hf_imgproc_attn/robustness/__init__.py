"""How a trained model stands up to disturbed inputs: corruptions and attacks on images, changed words in texts.

What other code calls, for any image classifier, causal language model or text classifier of Transformers::

    from hf_imgproc_attn.robustness import ImageSettings, evaluate_robustness, mean_corruption_error

    settings = ImageSettings(corruptions=["fog", "shot_noise"], attacks=["fgsm", "pgd"], epsilons=[2 / 255, 8 / 255])
    report = evaluate_robustness(model, processor, images, labels, settings)

- ``evaluate_robustness(model, processor, images, labels, settings) -> dict``: ``images`` are ``[images, channels,
  height, width]`` of the model's size, uint8 or floats in [0, 1], *before* normalisation, ``labels`` class indices.
  The dictionary is plain JSON: ``report["results"]`` is a list of ``{"family", "disturbance", "parameters", "seed",
  "metric", "value", "samples", "unit", "correct"}``, clean first (:mod:`.images`), ``report["errors"]`` has the mean
  errors of the corruptions, ``report["masking"]`` signs of masked gradients in words.
- ``evaluate_text_robustness(model, tokenizer, texts, settings, labels=None) -> dict``: the same for lines of text and
  a causal language model, or for texts with ``labels`` and a text classifier (:mod:`.texts`).
- ``mean_corruption_error(report["results"], baseline["results"]) -> dict``: against a baseline (:mod:`.scores`).
- ``unpack_bits(result["correct"], result["samples"])``: which images were right, for paired comparisons.

``imgproc-attn robustness CHECKPOINT`` (:mod:`.command`) does it from the command line. What the names mean, with
sources: docs/robustness.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import unpack_bits as unpack_bits
    from .images import evaluate_robustness as evaluate_robustness
    from .scores import mean_corruption_error as mean_corruption_error
    from .settings import ImageSettings as ImageSettings
    from .settings import TextSettings as TextSettings
    from .texts import evaluate_text_robustness as evaluate_text_robustness

_HOME = {
    "ImageSettings": "settings",
    "TextSettings": "settings",
    "evaluate_robustness": "images",
    "evaluate_text_robustness": "texts",
    "mean_corruption_error": "scores",
    "unpack_bits": "classifier",
}

__all__ = [
    "ImageSettings",
    "TextSettings",
    "evaluate_robustness",
    "evaluate_text_robustness",
    "mean_corruption_error",
    "unpack_bits",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch is not needed for the settings."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
