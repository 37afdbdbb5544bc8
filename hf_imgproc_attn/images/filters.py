"""The filters on images: what the models do to tokens, done to the pixels of a photograph.

A pixel is a token: its content is the patch around it, its value its grey value, its position (row, column);
projections are the identity. Then the preset ``bilateral_gaussian`` over pixels is the bilateral filter (Tomasi,
Manduchi 1998) and ``nlm`` over patches is non-local means (Buades, Coll, Morel 2005), boosters included. Kernels, the
normalisation and the boosters are the functions of ``models/`` themselves; only what a layer never needs is here: a
finite search window, without which A of a 512 x 512 image would have 7e10 entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.backend_reference import filter_matrix
from ..models.boost_operators import BOOSTING, keep_rows
from ..models.kernel_content import CONTENT_LOGITS, gaussian_position_logits
from ..models.spec_axes import MAX_BANDWIDTH, MAX_BOOSTING_STEPS, MIN_BANDWIDTH, STEPPED_BOOSTINGS, default_steps
from ..models.spec_fields import PRESETS, preset_fields
from ..models.visibility import Visibility

IMAGE_PRESETS = tuple(
    name
    for name, fields in PRESETS.items()
    if fields.get("content_kernel") == "gaussian"
    and fields.get("position_kernel") in ("gaussian", "none")
    and not {"boosting", "residual", "feedback"} & set(fields)
)
"""Presets that are filters of images as they stand: nothing in them has to be learned first."""

IMAGE_BOOSTINGS = ("none", *STEPPED_BOOSTINGS)
MAX_PATCH_SIZE, MAX_WINDOW_RADIUS = 31, 50
MAX_GREY_VALUE = 2.0**17
"""Twice the range of 16-bit images, with room for noise: far beyond, float32 has no digits for differences."""

_BLOCK_NUMBERS = 2**20
"""How many numbers the keys of one block of rows may take: 4 MiB in float32 stay near the processor."""

Image = NDArray[np.floating[Any]]
"""Grey values ``[height, width]``."""
Window = NDArray[np.bool_]
"""A search window ``[side, side]`` around a pixel, True where a key may lie."""


def square_window(radius: int) -> Window:
    """Keys at most ``radius`` rows and columns away: ``[2 * radius + 1, 2 * radius + 1]``.

    Raises:
        ValueError: for a radius that is no integer from 1 to 50.
    """
    if not _is_int(radius) or not 1 <= radius <= MAX_WINDOW_RADIUS:
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
    """A of one image: the row-stochastic filter between each pixel and the keys in its search window.

    Args:
        image: the guide that is compared, ``[height, width]``: unsigned 8-bit or 16-bit integers, or finite floats in
            any unit.
        preset: one of :data:`IMAGE_PRESETS`.
        content_bandwidth: h_y > 0 in the image's unit. Patches are compared by their weighted mean square difference,
            so h_y means the same for every patch size; -‖q - k‖²/h_y² is the logit (other libraries' sigma is
            h_y / sqrt(2) where they write -‖q - k‖²/(2 sigma²)).
        position_bandwidth: h_p > 0 in pixels, likewise; only where the preset has a position kernel.
        patch_size: odd side of the patch that is a pixel's content. Its pixels are weighted with a Gaussian of
            sigma = (patch_size - 1) / 4, and mirrored at the border.
        window: which keys a pixel sees: True in an array ``[side, side]`` with an odd side around the pixel
            (:func:`square_window`, :func:`disc_window`). Keys outside the image do not exist.

    The filter keeps A: ``height * width * side²`` numbers (460 MB for 512 x 512 pixels and a side of 21), computed in
    the precision of a float image, at least float32.

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
    ) -> None:
        fields = _preset_fields(preset)
        guide = check_image(image)
        self.image, self.window = guide, _check_window(window, guide.shape)
        _check_bandwidth("content_bandwidth", content_bandwidth)
        has_positions = fields["position_kernel"] != "none"
        if has_positions:
            _check_bandwidth("position_bandwidth", position_bandwidth)
        elif position_bandwidth is not None:
            raise ValueError(f"position_bandwidth has no effect with preset {preset!r}, got {position_bandwidth!r}")
        self._content_logits = CONTENT_LOGITS[fields["content_kernel"]]
        self._content_scale = 2.0 / float(content_bandwidth) ** 2
        self._position_scale = 2.0 / float(position_bandwidth) ** 2 if position_bandwidth is not None else None
        self.weights = self._weights(_patches(guide, patch_size))

    def _weights(self, content: torch.Tensor) -> torch.Tensor:
        """A ``[pixels, 1, 1, side²]`` of contents ``[height, width, features]``, one block of rows at a time."""
        height, width, features = content.shape
        side = self.window.shape[0]
        keys = side**2
        position_logits = self._position_logits(content.dtype)
        weights = content.new_empty(height * width, 1, 1, keys)
        inside = torch.ones(height, width, 1, dtype=torch.bool)
        window = torch.from_numpy(self.window).view(1, 1, 1, keys)
        rows = max(1, _BLOCK_NUMBERS // (width * keys * features))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            query = content[start:stop].reshape(-1, 1, 1, features)
            key = _in_windows(content, side, start, stop)
            logits = self._content_logits(query, key, self._content_scale)
            if position_logits is not None:
                logits = logits + position_logits
            visible = _in_windows(inside, side, start, stop).view(-1, 1, 1, keys) & window
            weights[start * width : stop * width] = filter_matrix(logits, Visibility(1, keys, mask=visible))
        return weights

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
            values: ``[height, width]`` of the guide's size; None: the guide itself, which is denoising.
            boosting: one of :data:`IMAGE_BOOSTINGS`; every pass uses the same A.
            boosting_steps: as in a model's configuration; None: 3 for ``sos``, else 2.

        Returns:
            ``[height, width]`` in the precision of the filter.

        Raises:
            ValueError: naming the argument, the rule and the value.
        """
        if boosting not in IMAGE_BOOSTINGS:
            raise ValueError(f"boosting must be one of {', '.join(IMAGE_BOOSTINGS)} on images, got {boosting!r}")
        if boosting_steps is not None and (
            not _is_int(boosting_steps) or not 1 <= boosting_steps <= MAX_BOOSTING_STEPS
        ):
            raise ValueError(
                f"boosting_steps must be an integer from 1 to {MAX_BOOSTING_STEPS}, got {boosting_steps!r}"
            )
        if boosting_steps is not None and boosting == "none":
            raise ValueError(f"boosting_steps has no effect with boosting 'none', got {boosting_steps!r}")
        grey = self.image if values is None else check_image(values)
        if grey.shape != self.image.shape:
            raise ValueError(f"values must have the guide's shape {self.image.shape}, got {grey.shape}")
        booster = {"osher": "twicing"}.get(boosting, boosting)  # for a fixed linear A they are the same
        steps = default_steps(booster) if boosting_steps is None else boosting_steps
        value = torch.from_numpy(grey).to(self.weights.dtype).view(1, 1, -1, 1)
        out: torch.Tensor = BOOSTING[booster](self._attend, keep_rows, value, value, steps)
        return out.view(grey.shape).numpy()

    def _attend(self, stream: torch.Tensor) -> torch.Tensor:
        """A times a stream ``[1, 1, pixels, d]``, one block of rows at a time."""
        height, width = self.image.shape
        side = self.window.shape[0]
        on_grid = stream[0, 0].view(height, width, -1)
        out = torch.empty_like(stream)
        rows = max(1, _BLOCK_NUMBERS // (width * side**2 * on_grid.shape[-1]))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            block = slice(start * width, stop * width)
            out[0, 0, block] = torch.matmul(self.weights[block], _in_windows(on_grid, side, start, stop))[:, 0, 0]
        return out


def denoise(
    image: NDArray[Any],
    *,
    preset: str,
    content_bandwidth: float,
    position_bandwidth: float | None = None,
    patch_size: int = 1,
    window: Window,
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
    )
    return image_filter(boosting=boosting, boosting_steps=boosting_steps)


def check_image(image: NDArray[Any]) -> Image:
    """Grey values as floats, checked.

    Raises:
        ValueError: for another rank or type, an empty image, or values that are not finite or out of range.
    """
    array = np.asarray(image)
    if array.ndim != 2:
        raise ValueError(f"an image must be grey, [height, width], got shape {array.shape}")
    if array.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise ValueError(f"an image must be uint8, uint16, float32 or float64, got {array.dtype}")
    if not array.size:
        raise ValueError(f"an image must have pixels, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("an image must be finite, got NaN or infinity in it")
    largest = float(np.abs(array.astype(np.float64)).max())
    if largest > MAX_GREY_VALUE:
        raise ValueError(
            f"grey values must lie between -{MAX_GREY_VALUE:.0f} and {MAX_GREY_VALUE:.0f}, got {largest:g}"
        )
    return np.array(array, dtype=np.float64 if array.dtype == np.float64 else np.float32)


def _patches(image: Image, patch_size: int) -> torch.Tensor:
    """The content of every pixel, ``[height, width, patch_size²]``; squared distances are weighted means."""
    height, width = image.shape
    if not _is_int(patch_size) or patch_size < 1 or patch_size % 2 == 0:
        raise ValueError(f"patch_size must be an odd integer >= 1, got {patch_size!r}")
    if patch_size > min(MAX_PATCH_SIZE, height, width):
        raise ValueError(
            f"patch_size must be at most {MAX_PATCH_SIZE} and fit into the image of {height} x {width} pixels, "
            f"got {patch_size}"
        )
    # The kernel sees differences only; around 0 they keep more digits.
    grey = torch.from_numpy(image - image.mean(dtype=np.float64).astype(image.dtype))
    radius = patch_size // 2
    padded = torch.nn.functional.pad(grey[None, None], (radius,) * 4, mode="reflect")[0, 0]
    patches = padded.unfold(0, patch_size, 1).unfold(1, patch_size, 1).flatten(2)
    if patch_size == 1:
        return patches
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    profile = torch.exp(-offsets.square() / (2 * ((patch_size - 1) / 4) ** 2))
    pixel_weights = torch.outer(profile, profile).flatten()
    pixel_weights = (pixel_weights / pixel_weights.sum()).sqrt().to(patches.dtype)
    return patches * pixel_weights


def _in_windows(channels_last: torch.Tensor, side: int, start: int, stop: int) -> torch.Tensor:
    """What each pixel of the rows ``start`` to ``stop`` sees: ``[pixels, 1, side², channels]``, 0 outside."""
    height, width, channels = channels_last.shape
    radius = side // 2
    above, below = max(start - radius, 0), min(stop + radius, height)
    missing = (0, 0, radius, radius, radius - (start - above), radius - (below - stop))
    strip = torch.nn.functional.pad(channels_last[above:below], missing)
    seen = strip.unfold(0, side, 1).unfold(1, side, 1)
    return seen.permute(0, 1, 3, 4, 2).reshape((stop - start) * width, 1, side**2, channels)


def _preset_fields(preset: str) -> dict[str, Any]:
    fields = preset_fields(preset)
    if preset not in IMAGE_PRESETS:
        raise ValueError(
            f"preset must be one of {', '.join(IMAGE_PRESETS)} on images (the others compare what must be learned or "
            f"are boosters, which `boosting` chooses), got {preset!r}"
        )
    return fields


def _check_bandwidth(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not MIN_BANDWIDTH <= value <= MAX_BANDWIDTH:
        raise ValueError(
            f"{name} must be a finite number > 0, from {MIN_BANDWIDTH:g} to {MAX_BANDWIDTH:g}, got {value!r}"
        )


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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
