"""Grey photographs: those that ship inside scikit-image, or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UsageError
from .filters import Image

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "moon",
    "rocket",
)
"""Pictures of ``skimage.data`` that its wheel carries, so that none is downloaded."""

MAX_PIXELS = 2**20
"""Largest picture that is filtered: A takes about 2 kB a pixel."""

_MODES = ("L", "LA", "P", "PA", "RGB", "RGBA")


def load_photograph(source: str, crop: int | None = None) -> tuple[str, Image]:
    """A picture as luminance from 0 to 255.

    Args:
        source: one of :data:`PHOTOGRAPHS`, or a file that Pillow reads, 8 bits a channel; transparency is ignored.
        crop: side of the square in the middle to which it is cut; None: all of it.

    Returns:
        Its name (of a file without folder and suffix) and the grey values ``[height, width]`` in float32.

    Raises:
        UsageError: for a file that cannot be read, or a size that does not go.
    """
    name, colours = (source, _shipped(source)) if source in PHOTOGRAPHS else (Path(source).stem, _read(source))
    height, width = colours.shape[:2]
    if crop is not None:
        if not 1 <= crop <= min(height, width):
            raise UsageError(f"crop must be from 1 to the shorter side of {name}, {min(height, width)}, got {crop}")
        top, left = (height - crop) // 2, (width - crop) // 2
        colours = colours[top : top + crop, left : left + crop]
    height, width = colours.shape[:2]
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"{name} must have at most {MAX_PIXELS} pixels, got {height} x {width}: cut a square out of it with crop"
        )
    return name, _luminance(colours)


def _shipped(name: str) -> np.ndarray:
    from skimage import data

    picture: np.ndarray = getattr(data, name)()
    return picture


def _read(source: str) -> np.ndarray:
    from PIL import Image as Pillow

    if not Path(source).is_file():
        raise UsageError(f"an image must be a file or one of {', '.join(PHOTOGRAPHS)}, got {source!r}")
    try:
        with Pillow.open(source) as picture:
            if picture.mode not in _MODES:
                raise UsageError(f"{source!r} must be grey or RGB with 8 bits a channel, got mode {picture.mode!r}")
            if picture.width * picture.height > 64 * MAX_PIXELS:
                raise UsageError(f"{source!r} is too large: {picture.width} x {picture.height} pixels")
            grey = picture.mode in ("L", "LA")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{source!r} must be an image that can be read, got {type(error).__name__}: {error}"
        ) from error


def _luminance(colours: np.ndarray) -> Image:
    from skimage.color import rgb2gray

    if colours.ndim == 2:
        return colours.astype(np.float32)
    grey: Image = (255.0 * rgb2gray(colours[..., :3])).astype(np.float32)
    return grey
