"""The filters on images are the known image filters (the framework's proposition 3)."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from skimage.restoration import denoise_nl_means

from hf_imgproc_attn.images.filters import (
    IMAGE_PRESETS,
    ImageFilter,
    denoise,
    disc_window,
    square_window,
)
from hf_imgproc_attn.models.boost_operators import keep_rows
from tests.models.helpers import dense_attention

BILATERAL: dict[str, Any] = {
    "preset": "bilateral_gaussian", "content_bandwidth": 0.3, "position_bandwidth": 2.5, "window": disc_window(2),
}  # fmt: skip


def photograph(rows: slice, columns: slice, noise: float = 0.05) -> np.ndarray:
    """A noisy piece of a photograph, about 0 to 1, in float64."""
    clean = data.camera()[rows, columns] / 255.0
    return clean + np.random.default_rng(0).normal(0.0, noise, clean.shape)


# -- the same as other libraries


@pytest.mark.parametrize(("radius", "sigma_color", "sigma_space"), [(3, 0.1, 1.5), (4, 0.15, 2.0), (5, 0.4, 9.0)])
def test_gaussian_content_and_position_are_opencvs_bilateral_filter(
    radius: int, sigma_color: float, sigma_space: float
) -> None:
    """OpenCV writes exp(-difference² / (2 sigma²)), so h² = 2 sigma². At the border it mirrors, and we do not."""
    image = photograph(slice(200, 240), slice(200, 247))
    ours = denoise(
        image,
        preset="bilateral_gaussian",
        content_bandwidth=math.sqrt(2) * sigma_color,
        position_bandwidth=math.sqrt(2) * sigma_space,
        window=disc_window(radius),
    )
    theirs = cv2.bilateralFilter(image.astype(np.float32), 2 * radius + 1, sigma_color, sigma_space)
    interior = (slice(radius, -radius), slice(radius, -radius))
    assert np.abs(ours - theirs)[interior].max() < 1e-6 * np.ptp(image)
    assert np.abs(ours - image).max() > 0.1  # it does something


@pytest.mark.parametrize(
    ("rows", "bandwidth", "patch_size", "distance"),
    [(slice(100, 140), 0.2, 5, 5), (slice(100, 140), 0.2, 5, 4), (slice(100, 140), 0.3, 7, 5)],
)
def test_gaussian_content_over_patches_is_scikit_images_non_local_means(
    rows: slice, bandwidth: float, patch_size: int, distance: int
) -> None:
    """h is the same in both. scikit-image's exponential is off by up to a few per cent and 0 beyond 5; where the image
    is mostly even, as here, this averages out. A wrong bandwidth, patch or window shows by ten times the tolerance.
    """
    image = photograph(rows, slice(200, 244))

    def ours(bandwidth: float, patch_size: int, distance: int) -> np.ndarray:
        window = square_window(distance)
        return denoise(image, preset="nlm", content_bandwidth=bandwidth, patch_size=patch_size, window=window)

    theirs = denoise_nl_means(image, patch_size=patch_size, patch_distance=distance, h=bandwidth, fast_mode=False)
    assert np.abs(ours(bandwidth, patch_size, distance) - theirs).max() < 1e-3
    for wrong in (
        (bandwidth * math.sqrt(2), patch_size, distance),
        (bandwidth, patch_size + 2, distance),
        (bandwidth, patch_size, distance - 1),
    ):
        assert np.abs(ours(*wrong) - theirs).max() > 1e-2


DEPTHS = {8: (255, np.uint8), 16: (65535, np.uint16)}


@pytest.mark.parametrize("depth", DEPTHS)
def test_integers_of_both_depths_are_filtered_as_the_libraries_filter_them(depth: int) -> None:
    """As above, on rounded grey values of the whole range; the libraries get them as floats."""
    largest, kind = DEPTHS[depth]
    image = np.rint(np.clip(photograph(slice(200, 240), slice(200, 247)), 0, 1) * largest).astype(kind)
    ours = denoise(
        image,
        preset="bilateral_gaussian",
        content_bandwidth=math.sqrt(2) * 0.1 * largest,
        position_bandwidth=math.sqrt(2) * 1.5,
        window=disc_window(3),
    )
    theirs = cv2.bilateralFilter(image.astype(np.float32), 7, 0.1 * largest, 1.5)
    assert np.abs(ours - theirs)[3:-3, 3:-3].max() < 2e-6 * largest
    ours = denoise(image, preset="nlm", content_bandwidth=0.2 * largest, patch_size=5, window=square_window(4))
    theirs = denoise_nl_means(
        image.astype(np.float64), patch_size=5, patch_distance=4, h=0.2 * largest, fast_mode=False
    )
    assert np.abs(ours - theirs).max() < 2e-3 * largest


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
def test_small_differences_of_large_values_are_not_lost(preset: str) -> None:
    """16-bit values around 30000 and 60000 with noise of sigma 2, of whose squares float32 has no such digits."""
    sigma, rng = 2.0, np.random.default_rng(4)
    clean = np.where(np.arange(40) < 20, 30000.0, 60000.0) + np.linspace(0, 4, 30)[:, None]
    image = np.rint(clean + rng.normal(0, sigma, clean.shape)).astype(np.uint16)
    settings: dict[str, Any] = {"preset": preset, "content_bandwidth": 3 * sigma, "window": disc_window(4)}
    settings |= {"patch_size": 5} if preset == "nlm" else {"position_bandwidth": 2.5}
    for boosting in ("none", "twicing", "sos"):
        exact = denoise(image.astype(np.float64), **settings, boosting=boosting)
        assert np.abs(denoise(image, **settings, boosting=boosting) - exact).max() < 0.01 * sigma
        assert np.std(exact - clean) < 0.8 * sigma  # it does something
    if preset == "bilateral_gaussian":
        theirs = cv2.bilateralFilter(image[:, :20].astype(np.float32), 9, 3 * sigma / math.sqrt(2), 2.5 / math.sqrt(2))
        ours = denoise(image[:, :20], **settings)
        assert np.abs(ours - theirs)[4:-4, 4:-4].max() < 0.01 * sigma  # OpenCV sums 30000s in float32


# -- colour


def colours(rows: slice, columns: slice) -> np.ndarray:
    """A noisy piece of a colour photograph, about 0 to 1, in float64."""
    clean = data.astronaut()[rows, columns] / 255.0
    return clean + np.random.default_rng(0).normal(0.0, 0.05, clean.shape)


@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0])
def test_colour_is_compared_jointly_as_in_scikit_image(scale: float) -> None:
    """One weight for the three channels, from the mean of their square differences."""
    image = colours(slice(0, 40), slice(180, 224))
    theirs = scale * denoise_nl_means(image, patch_size=5, patch_distance=4, h=0.2, fast_mode=False, channel_axis=-1)
    settings: dict[str, Any] = {"preset": "nlm", "content_bandwidth": 0.2 * scale, "patch_size": 5}
    given = image if scale == 1 else np.rint(image.clip(0, 1) * scale).astype(np.uint8 if scale == 255 else np.uint16)
    if scale != 1:
        theirs = denoise_nl_means(
            given.astype(np.float64), patch_size=5, patch_distance=4, h=0.2 * scale, fast_mode=False, channel_axis=-1
        )
    ours = denoise(given, **settings, window=square_window(4))
    assert ours.shape == image.shape
    assert np.abs(ours - theirs).max() < 2e-3 * scale
    # Each channel alone is another filter.
    alone = [denoise(given[..., channel], **settings, window=square_window(4)) for channel in range(3)]
    assert np.abs(np.dstack(alone) - theirs).max() > 2e-2 * scale


def test_colour_is_opencvs_where_its_distance_is_the_same() -> None:
    """OpenCV adds the channels' absolute differences. That is the Euclidean distance where one channel varies (and the
    mean square is a third of its square), and three differences where all are equal (the root mean square is one).
    """
    grey = photograph(slice(200, 240), slice(200, 247)).astype(np.float32)
    window, sigma_color, sigma_space = disc_window(3), 0.1, 1.5
    one = np.dstack((np.full_like(grey, 0.3), grey, np.full_like(grey, 0.7)))
    for image, factor in ((one, math.sqrt(2 / 3)), (np.dstack((grey, grey, grey)), math.sqrt(2) / 3)):
        theirs = cv2.bilateralFilter(image, 7, sigma_color, sigma_space)
        ours = denoise(
            image,
            preset="bilateral_gaussian",
            content_bandwidth=factor * sigma_color,
            position_bandwidth=math.sqrt(2) * sigma_space,
            window=window,
        )
        assert np.abs(ours - theirs)[3:-3, 3:-3].max() < 3e-6


def test_colour_distance_is_the_mean_over_channels() -> None:
    """Against loops, and: three equal channels are filtered as one grey picture, with any booster."""
    image = colours(slice(0, 6), slice(180, 187))
    ours = denoise(image, preset="nlm", content_bandwidth=0.3, window=disc_window(1))
    expected = np.empty_like(image)
    for row, column in itertools.product(range(6), range(7)):
        keys = [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        keys = [(i, j) for i, j in keys if 0 <= i < 6 and 0 <= j < 7]
        weights = [math.exp(-np.mean((image[row, column] - image[key]) ** 2) / 0.3**2) for key in keys]
        expected[row, column] = sum(w * image[key] for w, key in zip(weights, keys, strict=True)) / sum(weights)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    grey = photograph(slice(0, 20), slice(0, 21))
    for boosting in ("none", "twicing", "sos"):
        single = denoise(grey, **BILATERAL, patch_size=3, boosting=boosting)
        triple = denoise(np.dstack((grey, grey, grey)), **BILATERAL, patch_size=3, boosting=boosting)
        np.testing.assert_allclose(triple, np.dstack((single, single, single)), rtol=0, atol=1e-12)


def test_colours_are_filtered_by_a_grey_guide() -> None:
    guide, image = photograph(slice(0, 20), slice(180, 200)), colours(slice(0, 20), slice(180, 200))
    image_filter = ImageFilter(guide, **BILATERAL)
    ours = image_filter(image, boosting="twicing")
    for channel in range(3):
        alone = image_filter(image[..., channel], boosting="twicing")
        np.testing.assert_allclose(ours[..., channel], alone, rtol=0, atol=1e-12)
    assert ImageFilter(image, **BILATERAL)(guide).shape == guide.shape


# -- the same as the dense definition


@pytest.mark.parametrize(("boosting", "steps"), [("none", None), ("twicing", None), ("twicing", 3), ("sos", None),
                                                 ("osher", 2), ("diffusion", 3)])  # fmt: skip
@pytest.mark.parametrize("preset", IMAGE_PRESETS)
def test_windows_are_a_mask_of_dense_attention(preset: str, boosting: str, steps: int | None) -> None:
    """All pairs of pixels, compared with loops, masked by the window; boosted by the dense reference."""
    rng, height, width, h_y, h_p = np.random.default_rng(1), 5, 7, 0.7, 1.9
    image = rng.normal(size=(height, width))
    window = disc_window(2)
    window[0, 2] = False  # not symmetric
    places = list(itertools.product(range(height), range(width)))
    logits = torch.zeros(len(places), len(places), dtype=torch.float64)
    seen = torch.zeros(len(places), len(places), dtype=torch.bool)
    for (i, (row, column)), (j, (key_row, key_column)) in itertools.product(enumerate(places), repeat=2):
        logits[i, j] = -((image[row, column] - image[key_row, key_column]) ** 2) / h_y**2
        if preset == "bilateral_gaussian":
            logits[i, j] -= ((row - key_row) ** 2 + (column - key_column) ** 2) / h_p**2
        down, right = key_row - row + 2, key_column - column + 2
        seen[i, j] = 0 <= down < 5 and 0 <= right < 5 and bool(window[down, right])
    value = torch.from_numpy(image).reshape(1, 1, -1, 1)
    booster = "twicing" if boosting == "osher" else boosting
    count = steps or (3 if boosting == "sos" else 2)
    expected, _ = dense_attention(
        logits[None, None], value, value, attention_mask=seen, boosting=booster, boosting_steps=count
    )
    ours = denoise(
        image,
        preset=preset,
        content_bandwidth=h_y,
        position_bandwidth=h_p if preset == "bilateral_gaussian" else None,
        window=window,
        boosting=boosting,
        boosting_steps=steps,
    )
    np.testing.assert_allclose(ours, expected.view(height, width).numpy(), rtol=0, atol=1e-12)


def test_blocks_of_rows_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(slice(0, 23), slice(100, 119))
    settings: dict[str, Any] = {"preset": "nlm", "content_bandwidth": 0.1, "patch_size": 3, "window": square_window(4)}
    whole = denoise(image, **settings, boosting="twicing")
    monkeypatch.setattr("hf_imgproc_attn.images.filters._BLOCK_NUMBERS", 1)
    np.testing.assert_allclose(denoise(image, **settings, boosting="twicing"), whole, rtol=0, atol=1e-12)


def test_rows_sum_to_one_and_a_constant_stays() -> None:
    image_filter = ImageFilter(photograph(slice(50, 70), slice(0, 21)), **BILATERAL)
    torch.testing.assert_close(image_filter.weights.sum(-1), torch.ones(420, 1, 1, dtype=torch.float64))
    constant = np.full((20, 21), 0.4)
    for boosting in ("none", "twicing", "sos"):
        np.testing.assert_allclose(image_filter(constant, boosting=boosting), constant, atol=1e-14)


def test_another_image_is_filtered_by_the_guides_weights() -> None:
    guide = photograph(slice(50, 70), slice(0, 21))
    image_filter = ImageFilter(guide, **BILATERAL)
    other = np.random.default_rng(2).normal(size=guide.shape)
    np.testing.assert_allclose(
        image_filter(2 * guide + other), 2 * image_filter() + image_filter(other), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "dtype",
    [
        "u1",
        "i1",
        "u2",
        "i2",
        "u4",
        "i4",
        "u8",
        "i8",
        ">u2",
        ">i2",
        ">i4",
        ">u8",
        ">i8",
        "f2",
        "f4",
        "f8",
        ">f4",
        ">f8",
        "g",
    ],
)
def test_every_type_of_number_is_taken(dtype: str) -> None:
    """Of any width and byte order; in float32 where that holds every value."""
    image = (data.camera()[100:120, 100:120] // 2).astype(dtype)
    settings = {**BILATERAL, "content_bandwidth": 30.0}
    out = denoise(image, **settings)
    assert out.dtype == (np.float64 if np.dtype(dtype).kind == "f" and np.dtype(dtype).itemsize > 4 else np.float32)
    np.testing.assert_allclose(out, denoise(image.astype(np.float64), **settings), atol=1e-4)
    assert (ImageFilter(image, **settings)(image[::1]) == out).all()


def test_values_that_float32_does_not_hold_are_filtered_in_float64() -> None:
    image = data.camera()[100:120, 100:120].astype(np.int64) + 2**31
    out = denoise(image, **{**BILATERAL, "content_bandwidth": 30.0})
    assert out.dtype == np.float64
    expected = denoise(image.astype(np.float64) - 2**31, **{**BILATERAL, "content_bandwidth": 30.0})
    np.testing.assert_allclose(out - 2**31, expected, rtol=0, atol=1e-5)


def test_a_bilevel_image_is_one_of_zeros_and_ones() -> None:
    image = data.camera()[100:120, 100:120] > 100
    assert (denoise(image, **BILATERAL) == denoise(image.astype(np.float32), **BILATERAL)).all()


def test_numbers_of_numpy_are_numbers() -> None:
    settings = {
        "preset": "bilateral_gaussian",
        "content_bandwidth": np.float32(0.5),
        "position_bandwidth": np.int64(2),
    }
    ours = denoise(GOOD, **settings, patch_size=np.int64(3), window=disc_window(np.int32(2)))
    plain: dict[str, Any] = {"preset": "bilateral_gaussian", "content_bandwidth": 0.5, "position_bandwidth": 2}
    assert (ours == denoise(GOOD, **plain, patch_size=3, window=disc_window(2))).all()
    boosted = denoise(GOOD, **BILATERAL, boosting="twicing", boosting_steps=np.int64(3))
    assert (boosted == denoise(GOOD, **BILATERAL, boosting="twicing", boosting_steps=3)).all()


def test_the_input_is_left_alone() -> None:
    image = photograph(slice(0, 20), slice(0, 20))
    before = image.copy()
    image_filter = ImageFilter(image, **BILATERAL)
    first = image_filter(boosting="sos")
    assert (image == before).all()
    assert (image_filter(boosting="sos") == first).all()


# -- bad input

GOOD = np.linspace(0, 1, 120).reshape(10, 12)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((10, 12, 4)), "[height, width, 3] (alpha is no colour), got shape (10, 12, 4)"),
        (np.zeros((10, 12, 2)), "got shape (10, 12, 2)"),
        (np.zeros((1, 10, 12, 3)), "got shape (1, 10, 12, 3)"),
        (np.zeros(10), "got shape (10,)"),
        (np.zeros((0, 12)), "must have pixels"),
        (np.zeros((10, 12), dtype=complex), "integers, booleans or floats, got complex128"),
        (np.full((10, 12), "7"), "got <U1"),
        (np.zeros((10, 12), dtype=object), "got object"),
        (np.where(GOOD > 0.5, np.nan, GOOD), "finite"),
        (np.where(GOOD > 0.5, np.inf, GOOD), "finite"),
        (GOOD * 1e10, "between -4294967296 and 4294967296, got 1e+10"),
    ],
)
def test_wrong_images_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        denoise(image, **BILATERAL)
    with pytest.raises(ValueError, match=re.escape(message)):
        ImageFilter(GOOD, **BILATERAL)(image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_bandwidth": 0.0}, "content_bandwidth must be a finite number > 0"),
        ({"content_bandwidth": -1.0}, "content_bandwidth must be"),
        ({"content_bandwidth": math.nan}, "content_bandwidth must be"),
        ({"content_bandwidth": True}, "got True"),
        ({"content_bandwidth": None}, "got None"),
        ({"position_bandwidth": math.inf}, "position_bandwidth must be"),
        ({"position_bandwidth": None}, "position_bandwidth must be"),
        ({"preset": "nlm"}, "position_bandwidth has no effect with preset 'nlm'"),
        ({"preset": "softmax"}, "preset must be one of bilateral_gaussian, nlm on images"),
        ({"preset": "blur"}, "preset must be one of softmax"),
        ({"patch_size": 4}, "patch_size must be an odd integer >= 1, got 4"),
        ({"patch_size": 0}, "got 0"),
        ({"patch_size": 2.0}, "got 2.0"),
        ({"patch_size": 11}, "fit into the image of 10 x 12 pixels, got 11"),
        ({"window": np.ones((4, 4), dtype=bool)}, "odd side"),
        ({"window": np.ones((3, 5), dtype=bool)}, "shape (3, 5)"),
        ({"window": np.ones((3, 3))}, "got float64"),
        ({"window": np.ones((11, 11), dtype=bool)}, "fit into the image of 10 x 12 pixels, got a side of 11"),
        ({"window": np.zeros((3, 3), dtype=bool)}, "True in its centre"),
        ({"boosting": "learned"}, "boosting must be one of none, twicing, osher, diffusion, sos on images"),
        ({"boosting": "twicing", "boosting_steps": 0}, "boosting_steps must be an integer from 1 to 16, got 0"),
        ({"boosting": "twicing", "boosting_steps": True}, "got True"),
        ({"boosting_steps": 2}, "boosting_steps has no effect"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        denoise(GOOD, **{**BILATERAL, **changes})


@pytest.mark.parametrize("radius", [0, -1, 51, 2.0, True])
def test_wrong_radii_are_refused(radius: Any) -> None:
    for make in (square_window, disc_window):
        with pytest.raises(ValueError, match="must be an integer from 1 to 50"):
            make(radius)


def test_values_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("guide's height and width (10, 12), got (12, 10)")):
        ImageFilter(GOOD, **BILATERAL)(GOOD.T)


def test_boosters_see_one_sequence_of_pixels() -> None:
    """``attend`` maps a stream of several channels; a booster may hand it any number of them."""
    image_filter = ImageFilter(GOOD, **BILATERAL)
    stream = torch.randn(1, 1, GOOD.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = image_filter._attend(keep_rows(0, stream))
    for channel in range(3):
        alone = image_filter(stream[0, 0, :, channel].view(GOOD.shape).numpy())
        np.testing.assert_allclose(together[0, 0, :, channel].view(GOOD.shape).numpy(), alone, atol=1e-14)
