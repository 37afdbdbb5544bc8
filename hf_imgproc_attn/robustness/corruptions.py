"""The corruptions of CIFAR-10-C and ImageNet-C on 8-bit images: noise, blur, weather, digital.

Each function takes a picture ``[height, width, channels]`` with values in 0 to 255 (one channel or three), the setting
of its severity from :mod:`.severities` and a random generator, and returns values in 0 to 255; :func:`corrupt` cuts
their fractions off, as the programs that made the data sets did. The generator of a picture is seeded by the seed, the
name, the severity and the picture's number, so that every model sees the same pictures, whatever the size of a batch.

What differs from the published programs:

- Frost needs the authors' photographs, which this package does not ship: it is left out where no folder is given.
- Motion blur and the trails of the snow follow ImageMagick's formula, without its rounding between 16 and 8 bits.
- Pictures of one channel stay grey; pictures need not be square.

Source: Hendrycks and Dietterich 2019, arXiv 1903.12261.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .corruption_parts import Array, blurred_disk, motion_trail, plasma_fractal, zoomed
from .severities import severity_setting

PICTURES = (".png", ".jpg", ".jpeg")
LEAST_SIDE = 4
"""The smallest side of a picture, in pixels: less leaves nothing of a pixelated one."""


def corrupt(
    image: Array,
    name: str,
    severity: int,
    table: str,
    *,
    seed: int = 0,
    index: int = 0,
    frost_pictures: str | Path | None = None,
) -> Array:
    """Corrupt one picture.

    Args:
        image: uint8 ``[height, width, channels]``, one channel or three.
        name: a key of :data:`.severities.CORRUPTIONS`.
        severity: 1 to 5.
        table: ``cifar10-c`` or ``imagenet-c``.
        seed: of what is random in it.
        index: number of the picture among those of an evaluation.
        frost_pictures: folder with the authors' photographs ``frost1.png`` to ``frost5.jpg``, for ``frost``.

    Returns:
        uint8, of the same shape.

    Raises:
        UsageError: for a name, severity or table that there is not, or frost without photographs.
        ValueError: for an array that is no such picture.
    """
    setting = severity_setting(name, severity, table)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or min(image.shape[:2]) < LEAST_SIDE:
        raise ValueError(
            f"image must be uint8 [height, width, 1 or 3] with sides >= {LEAST_SIDE}, got {image.dtype} {image.shape}"
        )
    rng = np.random.default_rng((seed, zlib.crc32(name.encode()), severity, index))
    if name == "frost":
        setting = (*setting, frost_photographs(frost_pictures))
    values = FUNCTIONS[name](image, setting, rng)
    return np.clip(values, 0, 255).astype(np.uint8)


def gaussian_noise(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """White Gaussian noise."""
    pixels = image / 255.0
    return np.clip(pixels + rng.normal(size=pixels.shape, scale=setting), 0, 1) * 255


def shot_noise(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Poisson noise of few photons."""
    counts = rng.poisson(image / 255.0 * setting)
    return np.clip(counts / setting, 0, 1) * 255


def impulse_noise(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Salt and pepper: values become 0 or 1."""
    from skimage.util import random_noise

    return np.clip(random_noise(image / 255.0, mode="s&p", rng=rng, amount=setting), 0, 1) * 255


def defocus_blur(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """The mean over a disk."""
    import cv2

    radius, edge = setting
    blurred = cv2.filter2D(image / 255.0, -1, blurred_disk(radius, edge))
    return np.clip(blurred.reshape(image.shape), 0, 1) * 255


def glass_blur(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Pixels take the values of random neighbours, between two Gaussian blurs.

    From the last pixel to the first, each takes the value that a neighbour has by then. The published program means to
    exchange the two, but its assignment overwrites the first before it is read; the data sets were made so.
    """
    sigma, reach, times = setting
    height, width = image.shape[:2]
    pixels = (_gaussian(image / 255.0, sigma) * 255).astype(np.uint8)
    source = list(range(height * width))
    for _ in range(times):
        rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
        shifts = rng.integers(-reach, reach, size=(len(rows) * len(columns), 2)).tolist()
        places = ((row, column) for row in rows for column in columns)
        for (row, column), (right, down) in zip(places, shifts, strict=True):
            source[row * width + column] = source[(row + down) * width + column + right]
    pixels = pixels.reshape(height * width, -1)[source].reshape(image.shape)
    return np.clip(_gaussian(pixels / 255.0, sigma), 0, 1) * 255


def motion_blur(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A trail at an angle of at most 45 degrees to the horizontal."""
    radius, sigma = setting
    return np.rint(motion_trail(image.astype(np.float64), radius, sigma, rng.uniform(-45, 45)))


def zoom_blur(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """The mean of the picture and of enlarged ones."""
    end, step = setting
    pixels = (image / 255.0).astype(np.float32)
    factors = np.arange(1, end, step)
    total = sum((zoomed(pixels, factor) for factor in factors), np.zeros_like(pixels))
    return np.clip((pixels + total) / (len(factors) + 1), 0, 1) * 255


def gaussian_blur(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A Gaussian blur."""
    return np.clip(_gaussian(image / 255.0, setting), 0, 1) * 255


def snow(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Flakes with trails, on a paler picture."""
    mean, deviation, factor, threshold, radius, sigma, kept = setting
    pixels = image.astype(np.float32) / 255.0
    flakes = zoomed(rng.normal(size=(*image.shape[:2], 1), loc=mean, scale=deviation), factor)[..., 0]
    flakes[flakes < threshold] = 0
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8).astype(np.float64)
    flakes = np.rint(motion_trail(flakes, radius, sigma, rng.uniform(-135, -45)))[..., None] / 255.0
    pale = kept * pixels + (1 - kept) * np.maximum(pixels, _grey(pixels) * 1.5 + 0.5)
    return np.clip(pale + flakes + np.rot90(flakes, 2), 0, 1) * 255


def frost(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A part of a photograph of frost, added."""
    import cv2

    kept, added, size, photographs = setting
    picture = photographs[rng.integers(len(photographs))]
    if size != 1:
        picture = cv2.resize(picture, (0, 0), fx=size, fy=size)
    height, width = image.shape[:2]
    if picture.shape[0] <= height or picture.shape[1] <= width:
        raise UsageError(f"the pictures of frost must be larger than the images, got {picture.shape[:2]}")
    top = rng.integers(0, picture.shape[0] - height)
    left = rng.integers(0, picture.shape[1] - width)
    part = picture[top : top + height, left : left + width, ::-1]
    return kept * image + added * (_grey(part.astype(np.float32)) if image.shape[2] == 1 else part)


def fog(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A fractal cloud."""
    strength, decay = setting
    height, width = image.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    pixels = image / 255.0
    cloudy = pixels + strength * plasma_fractal(side, decay, rng)[:height, :width, None]
    brightest = pixels.max()
    return np.clip(cloudy * brightest / (brightest + strength), 0, 1) * 255


def brightness(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A higher value in HSV."""
    from skimage.color import hsv2rgb, rgb2hsv

    pixels = rgb2hsv(np.repeat(image / 255.0, 3 // image.shape[2], axis=2))
    pixels[..., 2] = np.clip(pixels[..., 2] + setting, 0, 1)
    return np.clip(hsv2rgb(pixels)[..., : image.shape[2]], 0, 1) * 255


def contrast(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Nearer to the mean of each channel."""
    pixels = image / 255.0
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return np.clip((pixels - mean) * setting + mean, 0, 1) * 255


def elastic_transform(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """A random affine map, then a smooth random displacement."""
    import cv2
    from scipy.ndimage import map_coordinates

    height, width = image.shape[:2]
    strength, sigma, shift = (part * min(height, width) for part in setting)
    pixels: Array = image.astype(np.float32) / 255.0
    row, column, third = height // 2, width // 2, min(height, width) // 3
    signs = np.array([[1, 1], [1, -1], [-1, -1]])
    corners = (np.array([row, column]) + third * signs).astype(np.float32)
    moved = corners + rng.uniform(-shift, shift, size=corners.shape).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    pixels = cv2.warpAffine(pixels, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101).reshape(image.shape)
    right, down = (
        (_gaussian(rng.uniform(-1, 1, size=(height, width, 1)), sigma, "reflect", 3)[..., 0] * strength).astype(
            np.float32
        )
        for _ in range(2)
    )
    rows, columns = np.mgrid[:height, :width]
    channels = [map_coordinates(channel, (rows + down, columns + right), order=1, mode="reflect")
                for channel in np.moveaxis(pixels, 2, 0)]  # fmt: skip
    return np.clip(np.stack(channels, axis=2), 0, 1) * 255


def pixelate(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """Fewer pixels, each a square."""
    from PIL import Image

    height, width = image.shape[:2]
    small = _picture(image).resize((int(width * setting), int(height * setting)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)).reshape(image.shape)


def jpeg_compression(image: Array, setting: Any, rng: np.random.Generator) -> Array:
    """What a JPEG file keeps."""
    from PIL import Image

    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=setting)
    with Image.open(file) as stored:
        return np.asarray(stored).reshape(image.shape)


FUNCTIONS: dict[str, Callable[[Array, Any, np.random.Generator], Array]] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, gaussian_blur,
        snow, frost, fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
"""Corruption -> what computes it."""


def frost_photographs(folder: str | Path | None) -> tuple[Array, ...]:
    """The photographs of frost, as uint8 ``[height, width, 3]`` in the order blue, green, red.

    Args:
        folder: where they are; the first five by name are used, as in the published program.

    Raises:
        UsageError: if there is no folder or none in it.
    """
    if folder is None:
        raise UsageError(
            "frost needs the photographs of the authors of CIFAR-10-C (frost1.png and so on): give their folder as "
            "frost_pictures"
        )
    return _photographs(Path(folder))


@cache
def _photographs(folder: Path) -> tuple[Array, ...]:
    import cv2

    if not folder.is_dir():
        raise UsageError(f"frost_pictures must be a folder, got {str(folder)!r}")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES][:5]
    found = [picture for path in files if (picture := cv2.imread(str(path))) is not None]
    if not found or len(found) < len(files):
        raise UsageError(f"frost_pictures must hold pictures ({', '.join(PICTURES)}), got {str(folder)!r}")
    return tuple(found)


def _gaussian(pixels: Array, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Blur the rows and columns; scikit-image's defaults."""
    from skimage.filters import gaussian

    blurred: Array = gaussian(pixels, sigma=sigma, mode=mode, truncate=truncate, channel_axis=-1)
    return blurred


def _grey(pixels: Array) -> Array:
    """Float32 pixels -> ``[height, width, 1]``, by the weights of OpenCV."""
    import cv2

    return pixels if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]


def _picture(image: Array) -> Any:
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
