"""Which preset a configuration is, or varies: by its fields, whatever it was made from.

Of any object that has the fields of :class:`~hf_imgproc_attn.models.spec_fields.FilterSpecMixin`. Needs no torch.
"""

from __future__ import annotations

from typing import Any

from ..models.spec_axes import (
    DEFAULT_MAX_DISTANCE,
    DEFAULT_NUM_BUCKETS,
    DEFAULT_PID_GAINS,
    DEFAULT_ROTARY_BASE,
    DEFAULT_SINKHORN_ITERATIONS,
    GRADIENT_BOOSTING_SOURCES,
    ROBUST_PENALTIES,
    ROBUST_THRESHOLDS,
    default_steps,
)
from ..models.spec_fields import FILTER_FIELDS, PRESETS, FilterSpecMixin

_AXES = ("content_kernel", "position_kernel", "boosting", "residual", "feedback", "gate", "normalisation")
"""The fields that make a preset what it is."""


def preset_name(config: Any) -> str:
    """The name of the preset whose filter fields ``config`` has, or ``"custom"``; defaults may be written out."""
    name, changes = closest_preset(config)
    return "custom" if changes else name


def closest_preset(config: Any) -> tuple[str, dict[str, Any]]:
    """The preset that a configuration varies, and the fields in which it differs from it, with their values.

    It is of a preset if it has the same kernels, booster, residual scheme and feedback; steps, layers, bandwidths,
    gains and what is learned may differ. Of several presets the one with the fewest differences is meant.

    Returns:
        A key of ``PRESETS`` and the fields; with other axes ``"custom"`` and the fields in which the
        configuration differs from the stock model.
    """
    fields = {field: getattr(config, field) for field in FILTER_FIELDS}
    for field, default in written_out_defaults(config).items():
        if fields[field] == default:
            fields[field] = None
    if fields["boosting"] == "osher":
        fields["boosting"] = "twicing"  # an alias
    stock = {field: getattr(FilterSpecMixin, field) for field in FILTER_FIELDS}
    differences = {
        name: {field: value for field, value in fields.items() if value != {**stock, **preset}[field]}
        for name, preset in PRESETS.items()
    }
    of_its_axes = [name for name, changes in differences.items() if not changes.keys() & set(_AXES)]
    name = min(of_its_axes, key=lambda name: len(differences[name]), default="custom")
    return name, differences["softmax" if name == "custom" else name]


def written_out_defaults(config: Any) -> dict[str, Any]:
    """What the fields stand for whose default is None, for a configuration's booster and kind of data."""
    return {
        "boosting_steps": default_steps(config.boosting) if isinstance(config.boosting, str) else None,
        "gradient_boosting_source": GRADIENT_BOOSTING_SOURCES[0],
        "robust_penalty": ROBUST_PENALTIES[0],
        "robust_threshold": ROBUST_THRESHOLDS.get(config.robust_penalty or ROBUST_PENALTIES[0]),
        "neutreno_lambda": config.default_neutreno_lambda,
        "pid_gains": list(DEFAULT_PID_GAINS),
        "relative_attention_num_buckets": DEFAULT_NUM_BUCKETS,
        "relative_attention_max_distance": DEFAULT_MAX_DISTANCE,
        "rotary_base": DEFAULT_ROTARY_BASE,
        "sinkhorn_iterations": DEFAULT_SINKHORN_ITERATIONS,
    }


def preset_in_words(config: Any) -> str:
    """:func:`closest_preset` as one text: ``neutreno with learn_feedback=True``."""
    name, changes = closest_preset(config)
    listed = ", ".join(f"{field}={value!r}" for field, value in changes.items())
    return f"{name} with {listed}" if listed else name
