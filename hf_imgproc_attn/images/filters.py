"""The filters on images: what the models do to tokens, done to the pixels of a photograph.

A pixel is a token: its content is the patch around it, its value its grey value or colour, its position (row, column);
projections are the identity. Then the preset ``bilateral_gaussian`` over pixels is the bilateral filter (Tomasi,
Manduchi 1998) and ``nlm`` over patches is non-local means (Buades, Coll, Morel 2005), boosters included. Position
kernel, normalisation and boosters are the functions of ``models/`` themselves, the content kernel is its to rounding.
What a layer never needs is here: a finite search window, without which A of a 512 x 512 image would have 7e10 entries,
and exact differences of values that go up to 65535.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.backend_reference import filter_matrix
from ..models.boost_operators import BOOSTING, keep_rows
from ..models.kernel_content import gaussian_position_logits
from ..models.spec_axes import (
    DEFAULT_SINKHORN_ITERATIONS,
    MAX_BANDWIDTH,
    MAX_BOOSTING_STEPS,
    MAX_SINKHORN_ITERATIONS,
    MIN_BANDWIDTH,
    STEPPED_BOOSTINGS,
    default_steps,
)
from ..models.spec_fields import PRESETS, preset_fields
from ..models.visibility import Visibility
from .windows import Image, Patches, in_windows, is_int, overlap

IMAGE_PRESETS = tuple(
    name
    for name, fields in PRESETS.items()
    if fields.get("content_kernel") == "gaussian"
    and fields.get("position_kernel") in ("gaussian", "none")
    and not {"boosting", "residual", "feedback"} & set(fields)
)
"""Presets that are filters of images as they stand: nothing in them has to be learned first."""

IMAGE_BOOSTINGS = ("none", *(name for name in STEPPED_BOOSTINGS if name not in ("gradient_boosted", "robust")))
"""Those that are powers of one A."""
IMAGE_NORMALISATIONS = ("softmax", "sinkhorn", "symmetric")
"""How the kernel K becomes the filter A: D^-1 K, K scaled to rows and columns that sum to 1, or D^-1/2 K D^-1/2."""
MAX_WINDOW_RADIUS = 50
MAX_GREY_VALUE = 2.0**32
"""The range of 32-bit images: squares of larger differences, over the smallest bandwidth, would leave float32."""
CHANNELS = 3
"""Of a colour image."""

_EXACT_IN_FLOAT32 = 2.0**24
"""Up to here float32 holds every integer."""

_BLOCK_NUMBERS = 2**20
"""How many numbers the keys of one block of rows may take: 4 MiB in float32 stay near the processor."""

Window = NDArray[np.bool_]
"""A search window ``[side, side]`` around a pixel, True where a key may lie."""


def square_window(radius: int) -> Window:
    """Keys at most ``radius`` rows and columns away: ``[2 * radius + 1, 2 * radius + 1]``.

    Raises:
        ValueError: for a radius that is no integer from 1 to 50.
    """
    if not is_int(radius) or not 1 <= radius <= MAX_WINDOW_RADIUS:
        raise ValueError(f"the radius of a window must be an integer from 1 to {MAX_WINDOW_RADIUS}, got {radius!r}")
    return np.ones((2 * radius + 1, 2 * radius + 1), dtype=bool)


def disc_window(radius: int) -> Window:
    """Keys with offset² <= radius², the window of the usual bilateral filter; shaped as :func:`square_window`.

    Raises:
        ValueError: for a radius that is no integer from 1 to 50.
    """
    square = square_window(radius)
    offsets = np.arange(-radius, radius + 1)
    return square & (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2)


class ImageFilter:
    """A of one image: the filter between each pixel and the keys in its search window.

    Rows of A sum to 1, but for the normalisation ``symmetric``.

    Args:
        image: the guide that is compared, grey ``[height, width]`` or in colour ``[height, width, 3]``: integers,
            booleans or finite floats of any width and byte order, in any unit. An alpha channel is no colour: leave it
            out and keep it as it is.
        preset: one of :data:`IMAGE_PRESETS`.
        content_bandwidth: h_y > 0 in the image's unit. Patches are compared by their weighted mean square difference,
            the mean over the channels too, so h_y means the same for every patch size and in colour; the logit is
            -‖q - k‖²/h_y² (other libraries' sigma is h_y / sqrt(2) where they write -‖q - k‖²/(2 sigma²)).
        position_bandwidth: h_p > 0 in pixels, likewise; only where the preset has a position kernel.
        patch_size: odd side of the patch that is a pixel's content. Its pixels are weighted with a Gaussian of
            sigma = (patch_size - 1) / 4, and mirrored at the border.
        window: which keys a pixel sees: True in an array ``[side, side]`` with an odd side around the pixel
            (:func:`square_window`, :func:`disc_window`). Keys outside the image do not exist.
        normalisation: one of :data:`IMAGE_NORMALISATIONS`. K is symmetric, since both pixels of a pair have the same
            distance, if the window is; so is A of ``symmetric`` and, in the limit of many iterations, of ``sinkhorn``
            (Milanfar 2013, Symmetrizing Smoothing Filters). Its spectrum is then real, and where K is positive, in
            [0, 1]: what theory says of boosting holds. Rows of ``symmetric`` do not sum to 1, so that a flat picture
            does not stay flat.
        sinkhorn_iterations: of ``sinkhorn``, each a step over columns and one over rows. None: 3.

    The filter keeps A: ``height * width * side²`` numbers (460 MB for 512 x 512 pixels and a side of 21), in float32
    where that holds every value of the image, else in float64.

    Differs from ``skimage.restoration.denoise_nl_means`` in nothing but the border, where that mirrors the image; from
    OpenCV's ``bilateralFilter`` there and in colour, whose distance is the sum of the channels' absolute differences.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    def __init__(
        self,
        image: NDArray[Any],
        *,
        preset: str,
        content_bandwidth: float,
        position_bandwidth: float | None = None,
        patch_size: int = 1,
        window: Window,
        normalisation: str = "softmax",
        sinkhorn_iterations: int | None = None,
    ) -> None:
        fields = _preset_fields(preset)
        guide = check_image(image)
        self.image, self.window = guide, _check_window(window, guide.shape[:2])
        self.normalisation = _check_normalisation(normalisation, self.window, sinkhorn_iterations)
        self._iterations = sinkhorn_iterations or DEFAULT_SINKHORN_ITERATIONS
        _check_bandwidth("content_bandwidth", content_bandwidth)
        has_positions = fields["position_kernel"] != "none"
        if has_positions:
            _check_bandwidth("position_bandwidth", position_bandwidth)
        elif position_bandwidth is not None:
            raise ValueError(f"position_bandwidth has no effect with preset {preset!r}, got {position_bandwidth!r}")
        self._content_scale = 2.0 / float(content_bandwidth) ** 2
        self._position_scale = 2.0 / float(position_bandwidth) ** 2 if position_bandwidth is not None else None
        self.weights = self._weights(Patches(guide, patch_size))
        self._row_sums: torch.Tensor | None = None
        if self.normalisation != "softmax":
            self._scale_symmetrically_()

    def _weights(self, patches: Patches) -> torch.Tensor:
        """A ``[pixels, 1, 1, side²]``, one block of rows after the other."""
        height, width = self.image.shape[:2]
        side = self.window.shape[0]
        keys = side**2
        weights = self._content_logits(patches).view(height * width, 1, 1, keys)
        position_logits = self._position_logits(weights.dtype)
        inside = torch.ones(height, width, 1, dtype=torch.bool)
        window = torch.from_numpy(self.window).view(1, 1, 1, keys)
        rows = max(1, _BLOCK_NUMBERS // (width * keys))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            block = slice(start * width, stop * width)
            logits = weights[block] if position_logits is None else weights[block] + position_logits
            visible = in_windows(inside, side, start, stop).view(-1, 1, 1, keys) & window
            if self.normalisation == "softmax":
                weights[block] = filter_matrix(logits, Visibility(1, keys, mask=visible))
            else:  # K; a pixel's weight for itself is 1, the largest
                weights[block] = logits.exp().masked_fill(~visible, 0.0)
        return weights

    def _scale_symmetrically_(self) -> None:
        """Make A of K ``[pixels, 1, 1, side²]``, in place: a_ij = r_i k_ij c_j."""
        ones = torch.ones(self.weights.shape[0], dtype=self.weights.dtype)
        rows = columns = self._row_sum(ones).rsqrt()
        if self.normalisation == "sinkhorn":
            rows = ones
            for _ in range(self._iterations):
                columns = self._row_sum(rows).reciprocal()  # K^T = K
                rows = self._row_sum(columns).reciprocal()
        for block, seen in self._seen(columns):
            self.weights[block] *= seen * rows[block].view(-1, 1, 1, 1)
        if self.normalisation == "symmetric":
            self._row_sums = self.weights.sum(-1, keepdim=True)

    def _row_sum(self, column: torch.Tensor) -> torch.Tensor:
        """K times a column ``[pixels]``."""
        return torch.cat([(self.weights[block] * seen).sum((1, 2, 3)) for block, seen in self._seen(column)])

    def _seen(self, column: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of pixels, and what each of them sees of ``[pixels]``: ``[block, 1, 1, side²]``."""
        (height, width), keys = self.image.shape[:2], self.window.size
        grid, rows = column.view(height, width, 1), max(1, _BLOCK_NUMBERS // (width * keys))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            seen = in_windows(grid, self.window.shape[0], start, stop).view(-1, 1, 1, keys)
            yield slice(start * width, stop * width), seen

    def _content_logits(self, patches: Patches) -> torch.Tensor:
        """-‖q - k‖²/h_y² of every pixel and the keys in its window, ``[height, width, side²]``, 0 outside the image.

        The Gaussian content kernel of ``models/``, with differences that are formed before they are squared: those of
        16-bit values, up to 65535, would be lost in q·k and ‖k‖² in float32.
        """
        height, width = self.image.shape[:2]
        side = self.window.shape[0]
        logits = torch.zeros(height, width, side**2, dtype=patches.mirrored.dtype)
        steps = range(-(side // 2), side // 2 + 1)
        for index, offset in enumerate(itertools.islice(itertools.product(steps, steps), side**2 // 2)):
            # The distance of a pixel from its key is that of the key from the pixel, whose offset is the opposite one.
            opposite = side**2 - 1 - index
            if not self.window.flat[index] and not self.window.flat[opposite]:
                continue
            query, key = overlap(offset, (height, width)), overlap((-offset[0], -offset[1]), (height, width))
            distances = patches.square_distances(query, key) * (-self._content_scale / 2)
            logits[query[0], query[1], index] = distances
            logits[key[0], key[1], opposite] = distances
        return logits

    def _position_logits(self, dtype: torch.dtype) -> torch.Tensor | None:
        """``[1, 1, 1, side²]``: only differences of positions matter, which are those of the window everywhere."""
        if self._position_scale is None:
            return None
        radius = self.window.shape[0] // 2
        axis = torch.arange(-radius, radius + 1, dtype=dtype)
        offsets = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).view(1, -1, 2)
        scale = torch.full((1, 1, 1), self._position_scale, dtype=dtype)
        return gaussian_position_logits(torch.zeros(1, 1, 2, dtype=dtype), offsets, scale)

    def __call__(
        self, values: NDArray[Any] | None = None, *, boosting: str = "none", boosting_steps: int | None = None
    ) -> Image:
        """Filter an image with this A.

        Args:
            values: ``[height, width]`` or ``[height, width, 3]`` of the guide's height and width; None: the guide
                itself, which is denoising.
            boosting: one of :data:`IMAGE_BOOSTINGS`; every pass uses the same A.
            boosting_steps: as in a model's configuration; None: 3 for ``sos``, else 2.

        Returns:
            The filtered values, shaped as they are, in the precision of the filter.

        Raises:
            ValueError: naming the argument, the rule and the value.
        """
        if boosting not in IMAGE_BOOSTINGS:
            raise ValueError(f"boosting must be one of {', '.join(IMAGE_BOOSTINGS)} on images, got {boosting!r}")
        if boosting_steps is not None and (
            not is_int(boosting_steps) or not 1 <= boosting_steps <= MAX_BOOSTING_STEPS
        ):
            raise ValueError(
                f"boosting_steps must be an integer from 1 to {MAX_BOOSTING_STEPS}, got {boosting_steps!r}"
            )
        if boosting_steps is not None and boosting == "none":
            raise ValueError(f"boosting_steps has no effect with boosting 'none', got {boosting_steps!r}")
        image = self.image if values is None else check_image(values)
        if image.shape[:2] != self.image.shape[:2]:
            raise ValueError(
                f"values must have the guide's height and width {self.image.shape[:2]}, got {image.shape}"
            )
        booster = {"osher": "twicing"}.get(boosting, boosting)  # for a fixed linear A they are the same
        steps = default_steps(booster) if boosting_steps is None else int(boosting_steps)
        value = torch.from_numpy(image).to(self.weights.dtype).view(1, 1, image.shape[0] * image.shape[1], -1)
        out: torch.Tensor = BOOSTING[booster](self._attend, keep_rows, value, value, steps)
        return out.view(image.shape).numpy()

    def _attend(self, stream: torch.Tensor) -> torch.Tensor:
        """A times a stream ``[1, 1, pixels, d]``, one block of rows at a time."""
        height, width = self.image.shape[:2]
        side = self.window.shape[0]
        on_grid = stream[0, 0].view(height, width, -1)
        out = torch.empty_like(stream)
        rows = max(1, _BLOCK_NUMBERS // (width * side**2 * on_grid.shape[-1]))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            block = slice(start * width, stop * width)
            # A row of A sums to 1: u_i = v_i + sum_j a_ij (v_j - v_i), whose terms keep the digits of large values.
            own = stream[0, 0, block].view(-1, 1, 1, on_grid.shape[-1])
            seen = in_windows(on_grid, side, start, stop) - own
            kept = own if self._row_sums is None else own * self._row_sums[block]
            out[0, 0, block] = (kept + torch.matmul(self.weights[block], seen))[:, 0, 0]
        return out


def denoise(
    image: NDArray[Any],
    *,
    preset: str,
    content_bandwidth: float,
    position_bandwidth: float | None = None,
    patch_size: int = 1,
    window: Window,
    normalisation: str = "softmax",
    sinkhorn_iterations: int | None = None,
    boosting: str = "none",
    boosting_steps: int | None = None,
) -> Image:
    """Filter an image with the A that its own content gives: :class:`ImageFilter`, built and applied once.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    image_filter = ImageFilter(
        image,
        preset=preset,
        content_bandwidth=content_bandwidth,
        position_bandwidth=position_bandwidth,
        patch_size=patch_size,
        window=window,
        normalisation=normalisation,
        sinkhorn_iterations=sinkhorn_iterations,
    )
    return image_filter(boosting=boosting, boosting_steps=boosting_steps)


def check_image(image: NDArray[Any]) -> Image:
    """Grey values or colours as native floats, checked: float32 where that holds every value, else float64.

    Raises:
        ValueError: for another shape or type, an empty image, or values that are not finite or out of range.
    """
    array = np.asarray(image)
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] == CHANNELS):
        raise ValueError(
            f"an image must be grey, [height, width], or in colour, [height, width, {CHANNELS}] (alpha is no colour), "
            f"got shape {array.shape}"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"an image must hold integers, booleans or floats, got {array.dtype}")
    if not array.size:
        raise ValueError(f"an image must have pixels, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("an image must be finite, got NaN or infinity in it")
    largest = float(np.abs(array.astype(np.float64)).max())
    if largest > MAX_GREY_VALUE:
        raise ValueError(f"values must lie between -{MAX_GREY_VALUE:.0f} and {MAX_GREY_VALUE:.0f}, got {largest:g}")
    fits = array.dtype.itemsize <= 4 if array.dtype.kind == "f" else largest <= _EXACT_IN_FLOAT32
    return np.array(array, dtype=np.float32 if fits else np.float64)


def _preset_fields(preset: str) -> dict[str, Any]:
    fields = preset_fields(preset)
    if preset not in IMAGE_PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(IMAGE_PRESETS)} on images (the others compare what must be learned or "
            f"are boosters, which `boosting` chooses), got {preset!r}"
        )
    return fields


def _check_bandwidth(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not MIN_BANDWIDTH <= value <= MAX_BANDWIDTH:
        raise ValueError(
            f"{name} must be a finite number > 0, from {MIN_BANDWIDTH:g} to {MAX_BANDWIDTH:g}, got {value!r}"
        )


def _check_normalisation(normalisation: Any, window: Window, iterations: Any) -> str:
    if normalisation not in IMAGE_NORMALISATIONS:
        raise ValueError(
            f"normalisation must be one of {', '.join(IMAGE_NORMALISATIONS)} on images, got {normalisation!r}"
        )
    if iterations is not None and normalisation != "sinkhorn":
        raise ValueError(f"sinkhorn_iterations has no effect with normalisation {normalisation!r}, got {iterations!r}")
    if iterations is not None and (not is_int(iterations) or not 1 <= iterations <= MAX_SINKHORN_ITERATIONS):
        raise ValueError(
            f"sinkhorn_iterations must be an integer from 1 to {MAX_SINKHORN_ITERATIONS}, got {iterations!r}"
        )
    if normalisation != "softmax" and not np.array_equal(window, window[::-1, ::-1]):
        raise ValueError(
            f"window must be symmetric around its centre with normalisation {normalisation!r}: each pixel of a pair "
            "has to see the other"
        )
    return str(normalisation)


def _check_window(window: Any, shape: tuple[int, ...]) -> Window:
    array = np.asarray(window)
    if array.dtype != np.bool_ or array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] % 2 == 0:
        raise ValueError(
            f"window must be a boolean array [side, side] with an odd side, got {array.dtype} of shape {array.shape}"
        )
    radius = array.shape[0] // 2
    if radius > MAX_WINDOW_RADIUS or array.shape[0] > min(shape):
        raise ValueError(
            f"window must have a radius of at most {MAX_WINDOW_RADIUS} and fit into the image of {shape[0]} x "
            f"{shape[1]} pixels, got a side of {array.shape[0]}"
        )
    if not array[radius, radius]:
        raise ValueError("window must be True in its centre: a pixel sees itself")
    return np.array(array)
