"""How the settings of a filter follow from the noise of a picture, and how strong that noise is."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError, did_you_mean, install_hint
from .filters import square_window
from .photographs import Photograph

MIN_SIGMA = 0.001
"""Least noise that is removed, in grey values of 0 to 255: the rounding of 16-bit pictures has as much."""


class Rule(NamedTuple):
    """How a preset's settings follow from the noise alone, its standard deviation sigma in grey values.

    content: h_y / sigma of a grey picture.
    content_in_colour: likewise in colour, where distances are means over three channels and vary less.
    position: h_p in pixels, or None.
    patch_size: side of the patches.
    window_radius: of the square search window.
    source: where the numbers come from.
    """

    content: float
    content_in_colour: float
    position: float | None
    patch_size: int
    window_radius: int
    source: str


RULES = {
    "nlm": Rule(
        1.2,
        1.0,
        None,
        7,
        10,
        "patches of 7 x 7 in windows of 21 x 21 as Buades, Coll, Morel 2005; h_y = 1.2 sigma chosen on other pictures "
        "(chelsea, coins, moon), in colour 1.0 sigma (chelsea, rocket)",
    ),
    "bilateral_gaussian": Rule(
        3 * 2**0.5,
        2 * 2**0.5,
        1.8 * 2**0.5,
        1,
        5,
        "spatial sigma 1.8 and range sigma 3 times the noise's, within what Zhang, Gunturk 2008 recommend, chosen on "
        "other photographs (chelsea, coins, moon), in colour 2 times (chelsea, rocket)",
    ),
}


def estimate_noise(photograph: Photograph) -> float:
    """Standard deviation of a photograph's own noise in grey values, the mean over its channels.

    From the finest wavelet coefficients (Donoho, Johnstone 1994), by ``skimage.restoration.estimate_sigma``.

    Raises:
        UsageError: without PyWavelets, and for a picture without noise.
    """
    if importlib.util.find_spec("pywt") is None:
        raise UsageError(f"noise 0 needs PyWavelets, which is not installed: {install_hint('filters')}")
    from skimage.restoration import estimate_sigma

    axis = -1 if photograph.is_colour else None
    sigma = float(estimate_sigma(photograph.pixels.astype(np.float64), average_sigmas=True, channel_axis=axis))
    if not sigma >= MIN_SIGMA:
        raise UsageError(
            f"noise 0 removes a picture's own noise, which must be at least {MIN_SIGMA:g} grey values, got "
            f"{sigma:.2g}, as estimated, for {photograph.name}"
        )
    return sigma


def filter_settings(preset: str, sigma: float, is_colour: bool = False) -> dict[str, Any]:
    """Arguments of :class:`~hf_imgproc_attn.images.filters.ImageFilter` by the preset's :class:`Rule`.

    Raises:
        UsageError: for a preset without a rule.
    """
    if preset not in RULES:
        raise UsageError(
            f"preset must be one of {', '.join(RULES)} on images, got {preset!r}{did_you_mean(preset, RULES)}"
        )
    rule = RULES[preset]
    return {
        "preset": preset,
        "content_bandwidth": (rule.content_in_colour if is_colour else rule.content) * sigma,
        "position_bandwidth": rule.position,
        "patch_size": rule.patch_size,
        "window": square_window(rule.window_radius),
    }
