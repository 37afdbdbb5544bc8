"""The corruptions equal an independent implementation of the published settings, for every severity.

It is written plainly in :mod:`tests.robustness.plain_corruptions` or beside the test; where random numbers are drawn,
both draw the same ones from NumPy's old generator, as the published programs do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage import data as photographs
from skimage.filters import gaussian
from skimage.transform import resize

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.robustness import corruptions
from hf_imgproc_attn.robustness.corruption_parts import motion_trail
from hf_imgproc_attn.robustness.corruptions import FUNCTIONS, corrupt
from hf_imgproc_attn.robustness.severities import CORRUPTIONS, SEVERITIES, severity_setting, table_for
from tests.robustness.plain_corruptions import PLAIN, SETTINGS, zoomed


class LegacyGenerator:
    """The numbers of NumPy's old generator, which the published programs draw from."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, {"integers": "randint"}.get(name, name))


def picture(side: int, width: int | None = None) -> np.ndarray:
    """A part of a photograph."""
    small = resize(photographs.astronaut()[:256, 100:356], (side, width or side), anti_aliasing=True)
    return np.asarray(small * 255).round().astype(np.uint8)


def applied(name: str, image: np.ndarray, severity: int, table: str, seed: int = 3) -> np.ndarray:
    """Our corruption with the old generator's numbers."""
    setting = severity_setting(name, severity, table)
    return np.clip(FUNCTIONS[name](image, setting, LegacyGenerator(seed)), 0, 255).astype(np.uint8)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", ["cifar10-c", "imagenet-c"])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_equals_a_plain_implementation(name: str, table: str) -> None:
    """To a hundredth of a grey level (float32 here and there), before fractions are cut off; to one where a library
    rounds on the way."""
    image = picture(32)
    for severity in SEVERITIES:
        setting = severity_setting(name, severity, table)
        ours = FUNCTIONS[name](image, setting, LegacyGenerator(3))  # type: ignore[arg-type]
        assert np.abs(ours - image.astype(float)).max() > 1
        typed = SETTINGS[name][table == "imagenet-c"][severity - 1]
        plain = PLAIN[name](image, typed, np.random.RandomState(3))
        allowed = 1 if name in ("jpeg_compression", "pixelate") else 0.01
        np.testing.assert_allclose(ours, plain, atol=allowed, rtol=0, err_msg=f"severity {severity}")


@pytest.mark.parametrize("table", ["cifar10-c", "imagenet-c"])
def test_impulse_noise_makes_the_part_black_or_white(table: str) -> None:
    image, parts = (
        np.full((200, 200, 3), 100, np.uint8),
        ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    )
    for severity in SEVERITIES:
        found = corrupt(image, "impulse_noise", severity, table)
        assert set(np.unique(found)) == {0, 100, 255}
        part = parts[table == "imagenet-c"][severity - 1]
        assert (found != 100).mean() == pytest.approx(part, rel=0.06)
        assert (found == 255).mean() == pytest.approx(part / 2, rel=0.1)


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("glass_blur",
         [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
         [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
        ("motion_blur",
         [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)], [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
        ("frost",
         [(1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)],
         [(1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)]),
        ("snow",
         [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
          (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
         [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
          (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)]),
    ],
)  # fmt: skip
def test_settings_are_the_published_ones(name: str, small: list[Any], large: list[Any]) -> None:
    assert [severity_setting(name, severity, "cifar10-c") for severity in SEVERITIES] == small
    assert [severity_setting(name, severity, "imagenet-c") for severity in SEVERITIES] == large


@pytest.mark.parametrize(("table", "side"), [("cifar10-c", 32), ("imagenet-c", 48)])
def test_glass_blur_equals_the_published_loop(table: str, side: int) -> None:
    image = picture(side)
    for severity in SEVERITIES:
        sigma, reach, times = severity_setting("glass_blur", severity, table)
        x = np.uint8(gaussian(image / 255.0, sigma=sigma, channel_axis=-1) * 255)
        state = np.random.RandomState(3)
        for _ in range(times):
            for row in range(side - reach, reach, -1):
                for column in range(side - reach, reach, -1):
                    dx, dy = state.randint(-reach, reach, size=(2,))
                    x[row, column], x[row + dy, column + dx] = x[row + dy, column + dx], x[row, column]
        expected = np.clip(gaussian(x / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255
        setting = (sigma, reach, times)
        ours = corruptions.glass_blur(image, setting, PairsAsDrawn(3))  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours.astype(np.uint8), expected.astype(np.uint8))


class PairsAsDrawn(LegacyGenerator):
    """Pairs one by one, right before down, as the loop draws them."""

    def integers(self, low: int, high: int, size: tuple[int, int]) -> np.ndarray:
        return np.stack([self.state.randint(low, high, size=(2,)) for _ in range(size[0])])


@pytest.mark.parametrize("angle", [0, 30, -45, -90, -110.5])
def test_motion_equals_a_loop_over_pixels(angle: float) -> None:
    image, radius, sigma = picture(16, 12)[..., 0].astype(float), 6, 2.0
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(2 * radius + 1)]
    turn = math.radians(angle)
    expected = np.zeros_like(image)
    for row in range(16):
        for column in range(12):
            for step, weight in enumerate(weights):
                down = row + math.ceil(step * math.sin(turn) - 0.5)
                right = column + math.ceil(step * math.cos(turn) - 0.5)
                place = min(max(down, 0), 15), min(max(right, 0), 11)
                expected[row, column] += weight / sum(weights) * image[place]
    np.testing.assert_allclose(motion_trail(image, radius, sigma, angle), expected, atol=1e-9)


@pytest.mark.parametrize("table", ["cifar10-c", "imagenet-c"])
def test_motion_blur_and_snow_follow_the_published_steps(table: str) -> None:
    image = picture(32)
    for severity in SEVERITIES:
        radius, sigma = severity_setting("motion_blur", severity, table)
        angle = np.random.RandomState(3).uniform(-45, 45)
        expected = np.rint(motion_trail(image.astype(float), radius, sigma, angle))
        np.testing.assert_array_equal(applied("motion_blur", image, severity, table), expected)

        mean, deviation, zoom, threshold, radius, sigma, kept = severity_setting("snow", severity, table)
        state = np.random.RandomState(3)
        layer = zoomed(state.normal(mean, deviation, (32, 32))[..., None], zoom)
        layer[layer < threshold] = 0
        layer = np.uint8(np.clip(layer[..., 0], 0, 1) * 255).astype(float)
        layer = np.rint(motion_trail(layer, radius, sigma, state.uniform(-135, -45)))[..., None] / 255
        x = np.float32(image) / 255
        pale = kept * x + (1 - kept) * np.maximum(x, cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5)
        snowy = np.clip(pale + layer + layer[::-1, ::-1], 0, 1) * 255
        np.testing.assert_array_equal(applied("snow", image, severity, table), snowy.astype(np.uint8))


@pytest.mark.parametrize(("table", "side"), [("cifar10-c", 32), ("imagenet-c", 224)])
def test_elastic_transform_equals_a_plain_one_at_the_published_size(table: str, side: int) -> None:
    image = picture(side)
    small = [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)]
    large = [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)]
    for severity in (2,) if side == 224 else SEVERITIES:
        factors = (small if side == 32 else large)[severity - 1]
        alpha, sigma, move = (factor * (32 if side == 32 else 244) for factor in factors)
        state = np.random.RandomState(3)
        half, third = float(side // 2), side // 3
        corners = np.float32([[half + third] * 2, [half + third, half - third], [half - third] * 2])
        moved = corners + state.uniform(-move, move, size=(3, 2)).astype(np.float32)
        warp = cv2.getAffineTransform(corners, moved)
        x = cv2.warpAffine(np.float32(image) / 255, warp, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        dx, dy = (
            (gaussian(state.uniform(-1, 1, (side, side)), sigma, mode="reflect", truncate=3) * alpha).astype(
                np.float32
            )
            for _ in range(2)
        )
        columns, rows, channels = np.meshgrid(np.arange(side), np.arange(side), np.arange(3))
        places = (rows + dy[..., None], columns + dx[..., None], channels)
        expected = np.clip(ndimage.map_coordinates(x, places, order=1, mode="reflect"), 0, 1) * 255
        ours = applied("elastic_transform", image, severity, table).astype(int)
        assert np.abs(ours - expected.astype(np.uint8)).max() <= 1  # 244 / 224 * 224 is not 244 in floating point
        assert (ours != expected.astype(np.uint8)).mean() < 0.001


@pytest.mark.parametrize("table", ["cifar10-c", "imagenet-c"])
def test_frost_adds_a_part_of_a_photograph(table: str, tmp_path: Path) -> None:
    image, frosts = picture(32), [picture(190 + number, 240) for number in range(6)]
    for number, frost in enumerate(frosts, start=1):
        cv2.imwrite(str(tmp_path / f"frost{number}.png"), frost[..., ::-1])
    for severity in (1, 5):
        kept, added, size = severity_setting("frost", severity, table)
        state = np.random.RandomState(3)
        frost = frosts[state.randint(5)]  # never the sixth, as published
        if size != 1:
            frost = cv2.resize(frost, (0, 0), fx=0.2, fy=0.2)
        top, left = state.randint(0, frost.shape[0] - 32), state.randint(0, frost.shape[1] - 32)
        expected = np.clip(kept * image + added * frost[top : top + 32, left : left + 32], 0, 255)
        setting = (kept, added, size, corruptions.frost_photographs(tmp_path))
        ours = np.clip(corruptions.frost(image, setting, LegacyGenerator(3)), 0, 255)  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours.astype(np.uint8), expected.astype(np.uint8))


def test_frost_without_photographs_and_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="frost needs the photographs of the authors"):
        corrupt(picture(8), "frost", 1, "cifar10-c")
    with pytest.raises(UsageError, match="frost_pictures must be a folder"):
        corrupt(picture(8), "frost", 1, "cifar10-c", frost_pictures=tmp_path / "none")
    (tmp_path / "frost1.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="frost_pictures must hold pictures"):
        corrupt(picture(8), "frost", 1, "cifar10-c", frost_pictures=tmp_path)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "frost"])
def test_pictures_keep_their_form_and_repeat(name: str) -> None:
    """Colour and grey, oblong and tiny; the same for the same seed and number, and stronger with severity."""
    for image in (picture(20, 28), picture(20, 28)[..., :1], picture(8)[..., :1]):
        found = corrupt(image, name, 3, "cifar10-c", seed=1, index=2)
        assert (found.dtype, found.shape) == (np.uint8, image.shape)
        np.testing.assert_array_equal(found, corrupt(image, name, 3, "cifar10-c", seed=1, index=2))
    image = picture(32)
    is_random = name not in (
        "defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "pixelate", "jpeg_compression"
    )  # fmt: skip
    first, other, again = (corrupt(image, name, 3, "cifar10-c", seed=s, index=i) for s, i in ((1, 2), (1, 3), (2, 2)))
    assert np.array_equal(first, other) == np.array_equal(first, again) == (not is_random)
    for table in ("cifar10-c", "imagenet-c"):
        weak, strong = (
            np.mean(
                [np.abs(corrupt(image, name, severity, table, index=i).astype(int) - image).mean() for i in range(3)]
            )
            for severity in (1, 5)
        )
        assert strong > weak or name == "elastic_transform"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fogg", 1, "cifar10-c"), "corruptions must be names of corruptions, got 'fogg'; did you mean fog?"),
        (("?", 1, "cifar10-c"), "got '\\?'; there are gaussian_noise, "),
        (("fog", 0, "cifar10-c"), "severities must be integers from 1 to 5, got 0"),
        (("fog", 6, "cifar10-c"), "severities must be integers from 1 to 5, got 6"),
        (("fog", True, "cifar10-c"), "severities must be integers from 1 to 5, got True"),
        (("fog", 1, "cifar-100-c"), "table must be one of cifar10-c, imagenet-c, got 'cifar-100-c'"),
    ],
)
def test_what_there_is_not_is_refused(arguments: tuple[str, int, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        corrupt(picture(8), *arguments)


@pytest.mark.parametrize("image", [picture(8).astype(float), picture(8)[..., 0], picture(8)[..., :2], picture(2)])
def test_what_is_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image must be uint8"):
        corrupt(image, "contrast", 1, "cifar10-c")


def test_every_corruption_has_a_function_and_five_settings() -> None:
    assert set(FUNCTIONS) == set(CORRUPTIONS)
    assert {len(corruption.cifar) for corruption in CORRUPTIONS.values()} == {5}
    assert {len(corruption.imagenet) for corruption in CORRUPTIONS.values()} == {5}
    assert sum(not corruption.is_extra for corruption in CORRUPTIONS.values()) == 15
    assert [table_for(side) for side in (8, 32, 96, 97, 224)] == ["cifar10-c"] * 3 + ["imagenet-c"] * 2
