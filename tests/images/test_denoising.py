"""The command ``denoise``: removes noise from photographs, grey or in colour, and shows what it took away."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import estimate_sigma

from hf_imgproc_attn import cli, errors
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.images import denoising, denoising_rules
from hf_imgproc_attn.images.filters import IMAGE_NORMALISATIONS, IMAGE_PRESETS, denoise
from hf_imgproc_attn.images.photographs import load_photograph
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.helpers import ROOT


def test_rules_go_with_the_presets_and_depend_on_the_noise_alone() -> None:
    assert set(denoising.RULES) == set(IMAGE_PRESETS) <= set(PRESETS)
    for preset, rule in denoising.RULES.items():
        for is_colour, factor in ((False, rule.content), (True, rule.content_in_colour)):
            settings = denoising.filter_settings(preset, 10.0, is_colour)
            assert settings["content_bandwidth"] == 10 * factor


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
    assert [row["shape"] for row in record["results"]] == [[36, 36]] * 2 + [[36, 36, 3]] * 2
    clean = load_photograph("camera", crop=36).pixels.astype(np.float64)
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
    cup = load_photograph("cup.png", crop=36).pixels
    noisy = denoising.add_noise(cup, 10.0, 0)
    filtered = denoise(noisy, **denoising.filter_settings(preset, 10.0, is_colour=True))
    expected = peak_signal_noise_ratio(cup.astype(np.float64), filtered.astype(np.float64), data_range=255)
    assert record["results"][2]["estimates"]["filtered"]["psnr"] == pytest.approx(expected, abs=0.006)
    with Pillow.open("new/folder/denoising.png") as figure:
        drawn = np.asarray(figure.convert("RGB")).astype(int)
    assert drawn.shape[1] > 8 * 160
    assert drawn.shape[0] > 4 * 160
    assert drawn[-1].min() == 255  # nothing is cut off at the lower edge
    assert np.ptp(drawn, axis=-1).max() > 60  # the cup is in colour
    assert [path.name for path in sorted(Path("new/folder").iterdir())] == ["denoising.json", "denoising.png"]
    # the same command gives the same numbers
    assert cli.main([*arguments, "--output", "again"]) == 0
    assert json.loads(Path("again/denoising.json").read_text(encoding="utf-8"))["results"] == record["results"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.png",), "a file or one of astronaut"),
        (("camera", "--preset", "softmax"), "preset must be one of nlm, bilateral_gaussian on images, got 'softmax'"),
        (("camera", "--noise", "0.5"), "noise must be 0 (none is added) or a standard deviation from 1 to 128"),
        (("camera", "--noise", "-1"), "got -1"),
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


# -- pictures without a clean one, and what is written


def noisy_file(path: Path, kind: str, sigma: float) -> tuple[np.ndarray, float]:
    """A photograph with noise of its own in a file, the clean one, and the grey levels that one of 255 is."""
    clean = data.moon()[100:180, 200:270] if kind != "colour" else data.chelsea()[100:180, 200:270]
    clean = clean.astype(np.float64)
    noisy = (clean + np.random.default_rng(5).normal(0, sigma, clean.shape)).clip(0, 255)
    if kind == "deep":
        cv2.imwrite(str(path), np.rint(noisy * 257).astype(np.uint16))
        return clean * 257, 257.0
    pixels = np.rint(noisy).astype(np.uint8)
    if kind == "alpha":
        pixels = np.dstack((pixels, np.arange(5600, dtype=np.uint8).reshape(80, 70)))
    Pillow.fromarray(pixels).save(path)
    return clean, 1.0


@pytest.mark.parametrize("kind", ["grey", "colour", "deep", "alpha"])
def test_noise_zero_removes_what_is_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture is filtered as it is, for a noise that scikit-image estimates, and comes closer to the clean one."""
    monkeypatch.chdir(tmp_path)
    clean, unit = noisy_file(Path("in.png"), kind, 15.0)
    assert cli.main(["denoise", "in.png", "--noise", "0", "--save", "--output", "out"]) == 0
    row = json.loads(Path("out/denoising.json").read_text(encoding="utf-8"))["results"][0]
    photograph = load_photograph("in.png")
    axis = -1 if kind == "colour" else None
    sigma = estimate_sigma(photograph.pixels.astype(np.float64), average_sigmas=True, channel_axis=axis)
    assert (row["noise"], row["depth"]) == (0, 16 if kind == "deep" else 8)
    assert row["sigma"] == pytest.approx(sigma, abs=1e-4)
    assert 12 < sigma < 18
    assert all(
        row["estimates"][label]["psnr"] is row["estimates"][label]["ssim"] is None for label in row["estimates"]
    )
    expected = denoise(photograph.pixels, **denoising.filter_settings("nlm", sigma, kind == "colour"))
    names = ["denoising.json", "denoising.png", "in_filtered.png", "in_sos.png", "in_twicing.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    with Pillow.open("in.png") as given, Pillow.open("out/in_filtered.png") as written:
        assert given.mode == written.mode
        before, after = np.asarray(given), np.asarray(written)
    if kind == "alpha":
        assert (before[..., 1] == after[..., 1]).all()
        before, after = before[..., 0], after[..., 0]
    assert np.abs(after - expected.clip(0, 255) * unit).max() <= 0.51
    errors_of = [float(np.sqrt(np.mean((values - clean) ** 2))) / unit for values in (before, after)]
    assert errors_of[1] < 0.7 * errors_of[0]
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith(f"in     {sigma:.2f} (its own)  -")
    assert f"{row['estimates']['filtered']['method_noise_std']:.2f} removed" in table[1]
    assert table[-1].endswith("figure, record and pictures are in out")


def test_the_weak_noise_of_a_deep_picture_is_removed(tmp_path: Path) -> None:
    """Noise of sigma 2 on grey values around 30000, which is less than a hundredth of a level of 8 bits."""
    clean = 30000 + np.add.outer(np.linspace(0, 40, 70), np.linspace(0, 40, 60))
    noisy = np.rint(clean + np.random.default_rng(6).normal(0, 2.0, clean.shape)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "in.png"), noisy)
    record = denoising.run([str(tmp_path / "in.png")], noise=[0], output=tmp_path / "out", save=True)
    assert 1.6 < record["results"][0]["sigma"] * 257 < 2.4
    filtered = cv2.imread(str(tmp_path / "out" / "in_filtered.png"), cv2.IMREAD_UNCHANGED)
    assert filtered.dtype == np.uint16
    assert np.std(filtered - clean) < 0.6 * np.std(noisy - clean)


def test_pictures_at_every_level_are_saved(tmp_path: Path) -> None:
    arguments = ["denoise", "camera", "--noise", "0", "20", "--crop", "40", "--save", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    names = {path.name for path in tmp_path.glob("camera*")}
    levels = {"": ("filtered", "twicing", "sos"), "_20": ("noisy", "filtered", "twicing", "sos")}
    assert names == {f"camera{level}_{label}.png" for level, labels in levels.items() for label in labels}
    noisy = denoising.add_noise(load_photograph("camera", crop=40).pixels, 20.0, 0)
    with Pillow.open(tmp_path / "camera_20_noisy.png") as written:
        assert np.abs(np.asarray(written) - noisy.clip(0, 255)).max() <= 0.5


def columns(path: Path) -> np.ndarray:
    """The panels of the first row of a figure, ``[columns, 160, 160]``, in grey."""
    with Pillow.open(path) as figure:
        drawn = np.asarray(figure.convert("L")).astype(float)
    panels = (drawn.shape[1] - 34) // 168
    return np.stack([drawn[62:222, 34 + 168 * i : 194 + 168 * i] for i in range(panels)])


def test_the_figure_has_the_clean_picture_where_it_is_known(tmp_path: Path) -> None:
    clean = load_photograph("camera", crop=160).pixels
    for noise, panels in ((["25"], 8), (["0"], 7), (["0", "25"], 8)):
        arguments = ["denoise", "camera", "--noise", *noise, "--crop", "160", "--output", str(tmp_path), "--force"]
        assert cli.main(arguments) == 0
        drawn = columns(tmp_path / "denoising.png")
        assert len(drawn) == panels
        if noise == ["0", "25"]:
            assert drawn[0].min() == 255  # nothing is known of it
        else:
            assert np.abs(drawn[0] - clean).max() < 6  # the clean one, or the picture itself
        assert np.abs(drawn[-1] - clean).max() > 60


def test_pictures_are_not_written_over_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noisy_file(Path("a.png"), "grey", 10.0)
    noisy_file(Path("a_filtered.png"), "grey", 10.0)
    before = Path("a_filtered.png").read_bytes()
    with pytest.raises(UsageError, match="save would write a_filtered.png over another file"):
        denoising.run(["a.png", "a_filtered.png"], noise=[0], output=".", save=True)
    Path("a_25.png").write_bytes(before)
    with pytest.raises(UsageError, match="save would write a_25_filtered.png over another file"):
        denoising.run(["a.png", "a_25.png"], noise=[0, 25], output="out", save=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a_25.png", "a_filtered.png"]
    assert Path("a_filtered.png").read_bytes() == before


def test_an_earlier_run_is_replaced_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["denoise", "camera", "--noise", "0", "--crop", "40", "--output", "out"]
    Path("out").mkdir()
    for name in ("denoising.png", "denoising.json", "camera_sos.png"):
        Path("out", name).write_text("mine", encoding="utf-8")
    monkeypatch.setattr(denoising, "compare", lambda *_: pytest.fail("work has begun"))
    for options, files in (
        ([], "'out/denoising.png' and 'out/denoising.json' are"),
        (["--save"], "'out/denoising.png' and 2 more files are"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*arguments, *options])
        error = capsys.readouterr().err
        assert error == f"imgproc-attn: error: output {files} there already; --force replaces them\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--force"]) == 0
    assert json.loads(Path("out/denoising.json").read_text(encoding="utf-8"))["results"]
    assert Path("out/camera_sos.png").read_text(encoding="utf-8") == "mine"


def test_a_picture_without_noise_is_refused(tmp_path: Path) -> None:
    Pillow.fromarray(np.full((40, 40), 7, dtype=np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UsageError, match="at least 0.001 grey values, got .*, as estimated, for flat"):
        denoising.run([str(tmp_path / "flat.png")], noise=[0], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_estimator_its_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = denoising_rules.importlib.util.find_spec
    monkeypatch.setattr(
        denoising_rules.importlib.util, "find_spec", lambda name: None if name == "pywt" else find(name)
    )
    with pytest.raises(UsageError, match=re.escape("noise 0 needs PyWavelets, which is not installed: pip install")):
        denoising.run(["camera"], noise=[0], output=tmp_path / "out")


def test_committed_record_and_figure_belong_to_the_documentation() -> None:
    record = json.loads((ROOT / "docs" / "denoising.json").read_text(encoding="utf-8"))
    assert record["git"]["dirty"] is False
    assert record["rule"] == json.loads(json.dumps(denoising.RULES[record["preset"]]._asdict()))
    assert denoising.markdown_table(record) in (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "denoising.png").stat().st_size < 1_500_000


def test_normalisations_stand_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row each; softmax is what it is alone."""
    monkeypatch.chdir(tmp_path)
    arguments = ["denoise", "camera", "--noise", "20", "--crop", "30", "--save"]
    names = ["softmax", "sinkhorn", "symmetric"]
    assert cli.main([*arguments, "--normalisation", *names, "--output", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["image", "noise", "normalisation"]
    assert [line.split()[2] for line in lines[1:4]] == names
    rows = json.loads(Path("all/denoising.json").read_text(encoding="utf-8"))["results"]
    assert len({row["estimates"]["filtered"]["psnr"] for row in rows}) == 3
    assert len({row["estimates"]["noisy"]["psnr"] for row in rows}) == 1
    assert Path("all/camera_20_symmetric_twicing.png").exists()
    assert cli.main([*arguments, "--output", "one"]) == 0
    assert json.loads(Path("one/denoising.json").read_text(encoding="utf-8"))["results"] == rows[:1]
    for wrong in (["sink"], ["softmax", "softmax"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["denoise", "camera", "--normalisation", *wrong])
        assert "normalisation must" in capsys.readouterr().err


def test_the_page_shows_the_record_of_the_normalisations() -> None:
    record = json.loads((ROOT / "docs" / "denoising_normalised.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert denoising.markdown_table(record) in page
    assert record["git"]["dirty"] is False
    assert {row["normalisation"] for row in record["results"]} == set(IMAGE_NORMALISATIONS)
    assert (ROOT / "docs" / "denoising_normalised.png").stat().st_size < 1_500_000
