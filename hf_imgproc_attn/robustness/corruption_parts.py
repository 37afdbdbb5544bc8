"""What several corruptions are made of: blurred disks, trails, zooms and the fractal of the fog.

Pictures are float arrays ``[height, width, channels]``; random numbers come from the caller's generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_SMALL_DISK = 8
_FIRST_WOBBLE = 100.0


def blurred_disk(radius: float, edge: float) -> Array:
    """A disk of total weight 1 whose edge is blurred by a small Gaussian.

    Args:
        radius: in pixels; up to 8 it lies on a grid of 17 x 17 points and is blurred over 3 x 3, above on a grid of
            its own size over 5 x 5.
        edge: standard deviation of the Gaussian in pixels.
    """
    import cv2

    reach = _SMALL_DISK if radius <= _SMALL_DISK else radius
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps[None] ** 2 <= radius**2).astype(np.float32)
    size = 3 if radius <= _SMALL_DISK else 5
    blurred: Array = cv2.GaussianBlur(disk / disk.sum(), ksize=(size, size), sigmaX=edge)
    return blurred


def motion_trail(image: Array, radius: float, sigma: float, angle: float) -> Array:
    """Blur along a line, on one side, as ImageMagick's ``-motion-blur`` does, with which the data sets were made.

    Each pixel becomes the mean of the ``2 radius + 1`` pixels that lie from it on in direction ``angle``, with weights
    that fall off as one half of a Gaussian. Steps along the line are rounded to whole pixels; what lies outside is as
    the nearest pixel of the edge.

    Args:
        image: ``[height, width]`` or ``[height, width, channels]``.
        radius: in pixels.
        sigma: standard deviation of the Gaussian, pixels.
        angle: in degrees, from right to down.
    """
    import cv2

    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    turn = np.deg2rad(angle)
    columns = np.ceil(steps * np.cos(turn) - 0.5).astype(int)
    rows = np.ceil(steps * np.sin(turn) - 0.5).astype(int)
    middle = int(steps[-1])
    kernel = np.zeros((2 * middle + 1, 2 * middle + 1))
    np.add.at(kernel, (middle + rows, middle + columns), weights / weights.sum())
    blurred: Array = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(image.shape)


def zoomed(image: Array, factor: float) -> Array:
    """The middle of a picture, enlarged linearly to the picture's size.

    Args:
        image: ``[height, width, channels]``.
        factor: >= 1.
    """
    from scipy.ndimage import zoom

    height, width = image.shape[:2]
    rows, columns = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - rows) // 2, (width - columns) // 2
    large = zoom(image[top : top + rows, left : left + columns], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    middle: Array = large[top : top + height, left : left + width]
    return middle


def plasma_fractal(side: int, decay: float, rng: np.random.Generator) -> Array:
    """A fractal landscape in [0, 1] by the diamond-square algorithm, which repeats at its edges.

    Differs from the textbook: the amplitude of the random part enters twice, as a factor and as the range of the
    uniform numbers, as in the program that made the data sets.

    Args:
        side: a power of two.
        decay: the amplitude of the random part is divided by it at each halving of the grid.
        rng: source of random numbers.

    Returns:
        ``[side, side]``.
    """
    land = np.zeros((side, side))
    step, amplitude = side, _FIRST_WOBBLE

    def middle(total: Array) -> Array:
        return total / 4 + amplitude * rng.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = land[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        land[half::step, half::step] = middle(rows + np.roll(rows, -1, axis=1))
        centres, corners = land[half::step, half::step], land[::step, ::step]
        beside = corners + np.roll(corners, -1, axis=1)
        land[::step, half::step] = middle(centres + np.roll(centres, 1, axis=0) + beside)
        below = corners + np.roll(corners, -1, axis=0)
        land[half::step, ::step] = middle(centres + np.roll(centres, 1, axis=1) + below)
        step, amplitude = half, amplitude / decay
    land -= land.min()
    fractal: Array = land / max(land.max(), np.finfo(float).tiny)
    return fractal
