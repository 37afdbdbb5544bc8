"""Photographs, those that ship inside scikit-image or files: read with all that they are, and written as they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .windows import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

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

_GREY, _GREY_16 = ("1", "L", "LA"), ("I;16", "I;16B", "I;16L", "I;16N", "I")
_COLOUR = ("P", "PA", "RGB", "RGBA")


class Photograph(NamedTuple):
    """A picture.

    name: of a file without folder and suffix.
    pixels: grey values ``[height, width]`` or colours ``[height, width, 3]`` in float32, from 0 to 255 at any depth.
    depth: bits a channel, 8 or 16.
    alpha: opacity ``[height, width]`` from 0 to 255; no filter sees it, :func:`save_photograph` writes it as it was.
    colour_profile: ICC profile, which is written as it was too.
    """

    name: str
    pixels: Image
    depth: int = 8
    alpha: NDArray[np.uint8] | None = None
    colour_profile: bytes | None = None

    @property
    def is_colour(self) -> bool:
        """Whether it has three channels."""
        return self.pixels.ndim == 3


def load_photograph(source: str, crop: int | None = None) -> Photograph:
    """A picture as it is: grey or in colour, with 8 or 16 bits.

    Args:
        source: one of :data:`PHOTOGRAPHS`, or a file that Pillow reads: grey with 8 or 16 bits, colour or a palette
            with 8 bits a channel, with or without transparency, turned as its EXIF orientation says.
        crop: side of the square in the middle to which it is cut; None: all of it.

    Raises:
        UsageError: for a file that cannot be read or of which something would be lost, or a size that does not go.
    """
    photograph = _shipped(source) if source in PHOTOGRAPHS else _read(source)
    name, (height, width) = photograph.name, photograph.pixels.shape[:2]
    if crop is not None:
        if not 1 <= crop <= min(height, width):
            raise UsageError(f"crop must be from 1 to the shorter side of {name}, {min(height, width)}, got {crop}")
        rows, columns = (slice((side - crop) // 2, (side - crop) // 2 + crop) for side in (height, width))
        alpha = None if photograph.alpha is None else photograph.alpha[rows, columns]
        photograph = photograph._replace(pixels=photograph.pixels[rows, columns], alpha=alpha)
    height, width = photograph.pixels.shape[:2]
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"{name} must have at most {MAX_PIXELS} pixels, got {height} x {width}: cut a square out of it with crop"
        )
    return photograph


def save_photograph(photograph: Photograph, pixels: Image, path: Path) -> None:
    """Write pixels as a PNG with the bit depth, the transparency and the colour profile of a photograph.

    Args:
        photograph: what they were made of.
        pixels: of the same size, from 0 to 255; what lies beyond is clipped, the rest rounded.
        path: of the PNG.
    """
    from PIL import Image as Pillow

    kind, largest = (np.uint16, 65535) if photograph.depth == 16 else (np.uint8, 255)
    values = np.rint(np.clip(pixels.astype(np.float64) / 255, 0, 1) * largest).astype(kind)
    if photograph.alpha is not None:
        values = np.dstack((values, photograph.alpha))
    options: dict[str, Any] = {} if photograph.colour_profile is None else {"icc_profile": photograph.colour_profile}
    Pillow.fromarray(values).save(path, **options)


def _shipped(name: str) -> Photograph:
    from skimage import data

    return Photograph(name, np.asarray(getattr(data, name)()).astype(np.float32))


def _read(source: str) -> Photograph:
    from PIL import Image as Pillow
    from PIL import ImageOps

    if not Path(source).is_file():
        raise UsageError(f"an image must be a file or one of {', '.join(PHOTOGRAPHS)}, got {source!r}")
    try:
        with Pillow.open(source) as picture:
            if picture.width * picture.height > 64 * MAX_PIXELS:
                raise UsageError(f"{source!r} is too large: {picture.width} x {picture.height} pixels")
            _check_nothing_is_lost(picture, source)
            profile = picture.info.get("icc_profile")
            pixels, depth, alpha = _pixels(ImageOps.exif_transpose(picture), source)
            return Photograph(Path(source).stem, pixels, depth, alpha, profile)
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{source!r} must be an image that can be read, got {type(error).__name__}: {error}"
        ) from error


def _check_nothing_is_lost(picture: Picture, source: str) -> None:
    """Refuse what Pillow would read in part: other modes, further frames, the lower half of 16 bits."""
    if picture.mode not in (*_GREY, *_GREY_16, *_COLOUR):
        raise UsageError(
            f"{source!r} must be grey with 8 or 16 bits, or RGB or a palette with 8 bits a channel, got mode "
            f"{picture.mode!r}"
        )
    # Of the files that some cameras write, MPO, the first is the photograph and the others are views of it.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise UsageError(f"{source!r} must be one picture, got {frames} frames")
    # How the file stores its pixels: colours, and grey with alpha, of 16 bits are read with 8. PPM names its maximum.
    stored = [tile[3] for tile in getattr(picture, "tile", [])]
    is_deep = any(";16" in str(how) for how in stored) or (
        picture.format == "PPM" and any(isinstance(how, tuple) and how[-1] > 255 for how in stored)
    )
    if is_deep and picture.mode not in _GREY_16:
        raise UsageError(
            f"{source!r} must be grey without transparency to have more than 8 bits a channel, got mode "
            f"{picture.mode!r} with more: save it with 8"
        )


def _pixels(picture: Picture, source: str) -> tuple[Image, int, NDArray[np.uint8] | None]:
    """Values from 0 to 255 in float32, the bit depth, and the opacity if there is one."""
    if picture.mode in _GREY_16:
        deep = np.asarray(picture).astype(np.int64)
        # Of 32-bit integers nothing tells the range; small ones are 8-bit values in a wide file.
        is_narrow = picture.mode == "I" and 0 < deep.max() < 256
        if deep.min() < 0 or deep.max() > 65535 or is_narrow:
            raise UsageError(
                f"{source!r} must have grey values from 0 to 65535, with 32 bits not all below 256, got {deep.min()} "
                f"to {deep.max()}: save it with 8 or 16 bits"
            )
        if picture.has_transparency_data:
            raise UsageError(f"{source!r} must be without transparency to have 16 bits a channel, got both")
        return (deep / 257).astype(np.float32), 16, None
    colour, transparent = picture.mode in _COLOUR, picture.has_transparency_data
    mode = ("RGBA" if colour else "LA") if transparent else ("RGB" if colour else "L")
    # Palettes have a colour that stands for transparent, grey pictures may; by way of RGBA it becomes opacity.
    values: NDArray[np.uint8] = np.asarray((picture.convert("RGBA") if transparent else picture).convert(mode))
    if not transparent:
        return values.astype(np.float32), 8, None
    shown, alpha = values[..., :-1] if colour else values[..., 0], values[..., -1]
    return shown.astype(np.float32), 8, alpha
