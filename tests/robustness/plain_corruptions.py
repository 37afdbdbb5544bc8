"""The published corruptions once more, written plainly: loops, the standard library, and other libraries' functions.

Settings are typed here from the programs that made the data sets, apart from the package's table. A function takes a
picture uint8 ``[side, side, 3]``, its setting and NumPy's old generator, and returns values in 0 to 255.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from scipy import ndimage

Array = np.ndarray[Any, Any]


def gaussian_noise(image: Array, c: float, state: np.random.RandomState) -> Array:
    return np.clip(image / 255 + c * state.standard_normal(image.shape), 0, 1) * 255


def shot_noise(image: Array, c: float, state: np.random.RandomState) -> Array:
    return np.minimum(state.poisson(c * (image / 255)) / c, 1) * 255


def gaussian_blur(image: Array, c: float, state: np.random.RandomState) -> Array:
    return ndimage.gaussian_filter(image / 255, (c, c, 0), mode="nearest", truncate=4) * 255


def defocus_blur(image: Array, c: tuple[float, float], state: np.random.RandomState) -> Array:
    radius, edge = c
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    steps = range(-int(reach), int(reach) + 1)
    disk = np.array([[float(x * x + y * y <= radius * radius) for x in steps] for y in steps])
    bell = np.array([math.exp(-(step**2) / (2 * edge**2)) for step in range(-half, half + 1)])
    kernel = disk / disk.sum()
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, bell / bell.sum(), axis=axis, mode="mirror")
    return np.clip(ndimage.correlate(image / 255, kernel[..., None], mode="mirror"), 0, 1) * 255


def zoomed(image: Array, factor: float) -> Array:
    """The middle, enlarged: corners stay corners, and between pixels it is linear."""
    side = len(image)
    kept = math.ceil(side / factor)
    start = (side - kept) // 2
    large = round(kept * factor)
    places = [place * (kept - 1) / max(large - 1, 1) for place in range(large)]
    middle = image[start : start + kept, start : start + kept].astype(float)
    for axis in (0, 1):
        lower = [min(int(place), kept - 1) for place in places]
        upper = [min(place + 1, kept - 1) for place in lower]
        part = np.array([place - int(place) for place in places])
        part = part[:, None, None] if axis == 0 else part[None, :, None]
        middle = middle.take(lower, axis) * (1 - part) + middle.take(upper, axis) * part
    trim = (large - side) // 2
    return middle[trim : trim + side, trim : trim + side]


def zoom_blur(image: Array, c: list[float], state: np.random.RandomState) -> Array:
    pictures = [image / 255, *(zoomed(image / 255, factor) for factor in c)]
    return np.mean(pictures, axis=0) * 255


def fog(image: Array, c: tuple[float, float], state: np.random.RandomState) -> Array:
    strength, decay = c
    side = 1
    while side < len(image):
        side *= 2
    land, step, amplitude = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        for first_row, first_column, around in (
            (half, half, [(-half, -half), (-half, half), (half, -half), (half, half)]),
            (0, half, [(-half, 0), (half, 0), (0, -half), (0, half)]),
            (half, 0, [(-half, 0), (half, 0), (0, -half), (0, half)]),
        ):
            drawn = state.uniform(-amplitude, amplitude, (side // step, side // step))
            for i in range(side // step):
                for j in range(side // step):
                    row, column = first_row + i * step, first_column + j * step
                    near = [land[(row + down) % side, (column + right) % side] for down, right in around]
                    land[row, column] = sum(near) / 4 + amplitude * drawn[i, j]
        step, amplitude = half, amplitude / decay
    land = (land - land.min()) / (land.max() - land.min())
    x = image / 255
    return np.clip((x + strength * land[: len(x), : len(x), None]) * x.max() / (x.max() + strength), 0, 1) * 255


def brightness(image: Array, c: float, state: np.random.RandomState) -> Array:
    def brighter(pixel: Array) -> list[float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return [255 * part for part in colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))]

    return np.apply_along_axis(brighter, 2, image)


def contrast(image: Array, c: float, state: np.random.RandomState) -> Array:
    mean = image.reshape(-1, 3).mean(0)
    return np.clip(mean + c * (image - mean), 0, 255)


def jpeg_compression(image: Array, c: int, state: np.random.RandomState) -> Array:
    _, file = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, c])
    return cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1]


def pixelate(image: Array, c: float, state: np.random.RandomState) -> Array:
    def boxes(large: int, small: int) -> Array:
        """Weights of each input pixel in each output pixel: those whose middle lies in its box, alike."""
        scale, weights = large / small, np.zeros((small, large))
        reach = max(scale, 1) / 2
        for place in range(small):
            centre = (place + 0.5) * scale
            for pixel in range(large):
                distance = (pixel + 0.5 - centre) / max(scale, 1)
                weights[place, pixel] = -0.5 < distance <= 0.5 and abs(pixel + 0.5 - centre) <= reach + 1e-9
        return weights / weights.sum(1, keepdims=True)

    side = len(image)
    down, up = boxes(side, int(side * c)), boxes(int(side * c), side)
    small = np.rint(np.einsum("ij,jkc->ikc", down, np.rint(np.einsum("ij,kjc->kic", down, image.astype(float)))))
    return np.rint(np.einsum("ij,jkc->ikc", up, np.einsum("ij,kjc->kic", up, small)))


def _range(end: float, step: float) -> list[float]:
    """As published: the rounding of ``arange`` decides about the end, and about sides that are halves of pixels."""
    return np.arange(1, end, step).tolist()


SETTINGS: dict[str, tuple[list[Any], list[Any]]] = {
    "gaussian_noise": ([0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": ([500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "gaussian_blur": ([0.4, 0.6, 0.7, 0.8, 1], [1, 2, 3, 4, 6]),
    "defocus_blur": (
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    "zoom_blur": (
        [_range(end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)],
        [_range(1.11, 0.01), _range(1.16, 0.01), _range(1.21, 0.02), _range(1.26, 0.02), _range(1.31, 0.03)],
    ),
    "fog": (
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": ([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": ([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "jpeg_compression": ([80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
    "pixelate": ([0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
}
"""Corruption -> the settings of CIFAR-10-C and of ImageNet-C."""

PLAIN: dict[str, Callable[[Array, Any, np.random.RandomState], Array]] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, gaussian_blur, defocus_blur, zoom_blur, fog, brightness, contrast,
        jpeg_compression, pixelate,
    )
}  # fmt: skip
