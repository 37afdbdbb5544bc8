"""The filters on images are the known image filters (the framework's proposition 3), and the command shows them."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from skimage import data
from skimage.restoration import denoise_nl_means

from hf_imgproc_attn import cli, errors
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.images import denoising
from hf_imgproc_attn.images.filters import (
    IMAGE_PRESETS,
    ImageFilter,
    check_image,
    denoise,
    disc_window,
    square_window,
)
from hf_imgproc_attn.images.photographs import PHOTOGRAPHS, load_photograph
from hf_imgproc_attn.models.boost_operators import keep_rows
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.helpers import ROOT
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


@pytest.mark.parametrize(("dtype", "result"), [(np.uint8, np.float32), (np.uint16, np.float32),
                                               (np.float32, np.float32), (np.float64, np.float64)])  # fmt: skip
def test_precision_follows_the_image(dtype: type, result: type) -> None:
    image = data.camera()[100:120, 100:120]
    settings = {**BILATERAL, "content_bandwidth": 30.0}
    out = denoise(image.astype(dtype), **settings)
    assert out.dtype == result
    np.testing.assert_allclose(out, denoise(image.astype(np.float64), **settings), atol=1e-3)


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
        (np.zeros((10, 12, 3)), "grey, [height, width], got shape (10, 12, 3)"),
        (np.zeros(10), "got shape (10,)"),
        (np.zeros((0, 12)), "must have pixels"),
        (np.zeros((10, 12), dtype=np.int64), "got int64"),
        (np.zeros((10, 12), dtype=bool), "got bool"),
        (np.where(GOOD > 0.5, np.nan, GOOD), "finite"),
        (np.where(GOOD > 0.5, np.inf, GOOD), "finite"),
        (GOOD * 1e6, "between -131072 and 131072, got 1e+06"),
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
    with pytest.raises(ValueError, match=re.escape("guide's shape (10, 12), got (12, 10)")):
        ImageFilter(GOOD, **BILATERAL)(GOOD.T)


# -- photographs


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_shipped_photographs_need_no_download(name: str) -> None:
    assert (Path(data.__file__).parent / {"clock": "clock_motion.png", "rocket": "rocket.jpg"}.get(name, f"{name}.png")
            ).is_file()  # fmt: skip
    got, image = load_photograph(name)
    assert got == name
    assert image.dtype == np.float32
    assert image.shape == getattr(data, name)().shape[:2]
    assert 0 <= image.min() < image.max() <= 255
    check_image(image)


def test_files_are_read_as_luminance(tmp_path: Path) -> None:
    colours = data.astronaut()[:40, :30]
    Pillow.fromarray(colours).save(tmp_path / "a.png")
    Pillow.fromarray(colours).convert("RGBA").save(tmp_path / "b.png")
    Pillow.fromarray(data.camera()[:40, :30]).save(tmp_path / "grey.png")
    name, image = load_photograph(str(tmp_path / "a.png"))
    assert name == "a"
    assert (load_photograph(str(tmp_path / "b.png"))[1] == image).all()
    assert (load_photograph("astronaut")[1][:40, :30] == image).all()
    assert (load_photograph(str(tmp_path / "grey.png"))[1] == data.camera()[:40, :30]).all()
    assert (load_photograph(str(tmp_path / "a.png"), crop=20)[1] == image[10:30, 5:25]).all()


def test_files_that_do_not_go_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    buffer = tmp_path / "cut.png"
    Pillow.fromarray(data.camera()).save(buffer)
    buffer.write_bytes(buffer.read_bytes()[:5000])
    Pillow.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(tmp_path / "deep.png")
    Pillow.new("L", (2000, 1000)).save(tmp_path / "large.png")
    for name, message in (
        ("text.png", "can be read"),
        ("cut.png", "can be read"),
        ("deep.png", "8 bits a channel, got mode 'I;16'"),
        ("large.png", "at most 1048576 pixels"),
        ("missing.png", "a file or one of astronaut"),
        (".", "a file or one of astronaut"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            load_photograph(str(tmp_path / name))
    with pytest.raises(UsageError, match="crop must be from 1 to"):
        load_photograph("camera", crop=513)


# -- the command


def test_rules_go_with_the_presets_and_depend_on_the_noise_alone() -> None:
    assert set(denoising.RULES) == set(IMAGE_PRESETS) <= set(PRESETS)
    for preset in denoising.RULES:
        weak, strong = (denoising.filter_settings(preset, noise) for noise in (10.0, 20.0))
        assert strong["content_bandwidth"] == 2 * weak["content_bandwidth"]


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
def test_command_writes_table_figure_and_record(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Pillow.fromarray(data.coffee()[100:140, 200:260]).save("cup.png")
    arguments = ["denoise", "camera", "cup.png", "--preset", preset, "--noise", "10", "30", "--crop", "36"]
    assert cli.main([*arguments, "--output", "new/folder"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["image", "noise", "noisy", "filtered", "twicing", "sos"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        [name, noise] for name in ("camera", "cup") for noise in ("10", "30")
    ]
    assert [line.partition("]")[0] for line in printed.err.splitlines()] == [f"[{i}/4" for i in range(1, 5)]

    record = json.loads(Path("new/folder/denoising.json").read_text(encoding="utf-8"))
    assert (record["preset"], record["seed"], record["crop"]) == (preset, 0, 36)
    assert record["git"].keys() == {"revision", "dirty"}
    assert record["versions"]["scikit-image"]
    clean = load_photograph("camera", crop=36)[1].astype(np.float64)
    noisy = denoising.add_noise(clean.astype(np.float32), 10.0, 0)
    filtered = denoise(noisy, **denoising.filter_settings(preset, 10.0), boosting="twicing")
    psnr = 10 * math.log10(255**2 / np.mean((filtered - clean) ** 2))
    row = record["results"][0]["estimates"]
    assert row["twicing"]["psnr"] == pytest.approx(psnr, abs=0.006)
    assert row["noisy"]["method_noise_std"] == 0
    for entry in record["results"]:
        assert entry["estimates"]["filtered"]["psnr"] > entry["estimates"]["noisy"]["psnr"]
    assert lines[1].split()[2:] == [
        word
        for label in denoising.ESTIMATES
        for word in f"{row[label]['psnr']:.2f} / {row[label]['ssim']:.3f}".split()
    ]
    with Pillow.open("new/folder/denoising.png") as figure:
        assert figure.mode == "L"
        assert figure.width > 7 * 160
        assert figure.height > 4 * 160
        assert np.asarray(figure)[-1].min() == 255  # nothing is cut off at the lower edge
    # the same command gives the same numbers
    assert cli.main([*arguments, "--output", "again"]) == 0
    assert json.loads(Path("again/denoising.json").read_text(encoding="utf-8"))["results"] == record["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.png",), "a file or one of astronaut"),
        (("camera", "--preset", "softmax"), "preset must be one of nlm, bilateral_gaussian on images, got 'softmax'"),
        (("camera", "--noise", "0"), "from 1 to 128 grey values, got 0"),
        (("camera", "--noise", "nan"), "from 1 to 128 grey values, got nan"),
        (("camera", "--noise", "10", "10"), "every level once"),
        (("camera", "--noise", "much"), "--noise"),
        (("camera", "camera"), "a name of its own"),
        (("camera", "--crop", "9"), "window must have a radius of at most 50 and fit into the image of 9 x 9"),
        (("camera", "--seed", "-1"), "seed must be"),
        (("camera", "--output", "file"), "output must be a folder"),
        ((), "IMAGE"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["denoise", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imgproc-attn: error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["denoise", "camera"])
    assert 'skimage, which is not installed: pip install ".[filters]"' in capsys.readouterr().err


def test_boosters_see_one_sequence_of_pixels() -> None:
    """``attend`` maps a stream of several channels; a booster may hand it any number of them."""
    image_filter = ImageFilter(GOOD, **BILATERAL)
    stream = torch.randn(1, 1, GOOD.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = image_filter._attend(keep_rows(0, stream))
    for channel in range(3):
        alone = image_filter(stream[0, 0, :, channel].view(GOOD.shape).numpy())
        np.testing.assert_allclose(together[0, 0, :, channel].view(GOOD.shape).numpy(), alone, atol=1e-14)


def test_committed_record_and_figure_belong_to_the_documentation() -> None:
    record = json.loads((ROOT / "docs" / "denoising.json").read_text(encoding="utf-8"))
    assert record["git"]["dirty"] is False
    assert record["rule"] == json.loads(json.dumps(denoising.RULES[record["preset"]]._asdict()))
    assert denoising.markdown_table(record) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "denoising.png").stat().st_size < 1_500_000
