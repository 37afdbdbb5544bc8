"""Images that are not 8-bit files in order: scaled, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import train_image_classification
from PIL import Image

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.image_pixels import PixelDataset, build_image_processor, eight_bits
from tests.helpers import ROOT, RunPython
from tests.training.conftest import TINY_VIT

RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


def image_of(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("8.png", np.rint(RAMP * 255).astype(np.uint8)),
        ("16.png", np.rint(RAMP * 65535).astype(np.uint16)),
        ("big_endian.tif", np.rint(RAMP * 65535).astype(">u2")),
        ("32.tif", np.rint(RAMP * 65535).astype(np.int32)),
        ("float.tif", RAMP),
    ],
)
def test_wide_images_keep_their_grey_levels(tmp_path: Path, name: str, values: np.ndarray, num_channels: int) -> None:
    image_of(values).save(tmp_path / name)
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / name)]}).cast_column("image", datasets.Image())
    processor = build_image_processor((16, 16), num_channels)
    dataset = PixelDataset(rows, np.array([0]), "image", processor, description="decoding train")
    for channel in dataset[0]["pixel_values"].numpy():
        assert np.array_equal(channel, np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 255, r"floating-point pixels must lie in \[0, 1\], got 0 to 255"),
        (np.full((2, 2), np.nan, np.float32), r"floating-point pixels must lie in \[0, 1\], got nan"),
        (np.array([[0, 70000]], np.int32), "integer pixels of 32 bits must lie in 0 to 65535"),
        (np.array([[-1, 900]], np.int32), "integer pixels of 32 bits must lie in 0 to 65535"),
        # An 8-bit picture in a 32-bit file, or a nearly black one of 16 bits?
        (np.array([[0, 255]], np.int32), "not all below 256, got 0 to 255"),
    ],
)
def test_values_whose_white_is_not_known_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eight_bits(image_of(values))


def test_twelve_bits_in_a_file_of_sixteen_are_told_of(tmp_path: Path) -> None:
    image_of(np.rint(RAMP * 4095).astype(np.uint16)).save(tmp_path / "x.png")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.png")]}).cast_column("image", datasets.Image())
    with pytest.warns(
        UserWarning, match="of the train split have no pixel above 4095 of 65535: 17 of 256 grey levels"
    ):
        PixelDataset(rows, np.array([0]), "image", build_image_processor((16, 16), 3), description="decoding train")


def test_black_is_black_in_every_mode() -> None:
    for dtype in (np.uint8, np.uint16, np.int32, np.float32):
        assert np.asarray(eight_bits(image_of(np.zeros((2, 2), dtype)))).max() == 0


@pytest.fixture
def folder_with_a_damaged_image(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            image_of(pixels).save(tmp_path / "data" / "train" / name / f"{number}.png")
    return tmp_path / "data"


SHORT = ["--config_overrides", *TINY_VIT, "--max_steps", "2", "--disable_tqdm", "true", "--save_strategy", "no"]


def train(folder: Path, output: Path, *words: str) -> int:
    return train_image_classification.main(
        ["--dataset_name", str(folder), "--output_dir", str(output), *SHORT, *words]
    )


# The library datasets leaves a file open that it cannot decode.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("damage", ["cut", "text", "wide"])
@pytest.mark.parametrize("name", ["cat/0", "dog/7"])
def test_an_image_that_cannot_be_used_is_named(
    folder_with_a_damaged_image: Path, tmp_path: Path, damage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_with_a_damaged_image / "train" / f"{name}.png"
    if damage == "wide":
        image_of(RAMP * 255).save(path, format="tiff")
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "cut" else b"not an image")
    assert train(folder_with_a_damaged_image, tmp_path / "run") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the image {str(path)!r} (row ")
    assert "cannot be used: " in last
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_of_a_table_is_named_by_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    buffer = io.BytesIO()
    image_of(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, format="png")
    images = [{"bytes": buffer.getvalue(), "path": None} for _ in range(30)]
    images[11] = {"bytes": buffer.getvalue()[:50], "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 15}, features=features)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    assert train(tmp_path / "data", tmp_path / "run", "--validation_fraction", "0") == 2
    assert "the image row 11 of the train split cannot be used: " in capsys.readouterr().err


def test_an_image_damaged_while_it_is_read_late_is_named(
    folder_with_a_damaged_image: Path, tmp_path: Path, run_python: RunPython
) -> None:
    """Splits too large for the memory are read by the data loader's own processes.

    In a process of its own, as the script runs: a fork of one that has run a thousand tests may hang.
    """
    path = folder_with_a_damaged_image / "train" / "dog" / "7.png"
    path.write_bytes(path.read_bytes()[:60])
    words = [
        *("--dataset_name", str(folder_with_a_damaged_image), *SHORT, "--output_dir", str(tmp_path / "run")),
        *("--dataloader_num_workers", "1", "--validation_fraction", "0", "--per_device_train_batch_size", "4"),
        *("--max_steps", "5"),
    ]
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'training')!r})\nimport train_image_classification\n"
        "from hf_imgproc_attn.training_support import image_pixels\nimage_pixels.DECODE_ONCE_BYTES = 100\n"
        f"sys.exit(train_image_classification.main({words!r}))"
    )
    result = run_python("-c", code)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: the image {str(path)!r} (row ")


def test_a_grey_model_works_in_a_pipeline_without_the_package(tmp_path: Path, run_python: RunPython) -> None:
    words = ["--config_overrides", *TINY_VIT, "num_channels=1", "--max_steps", "1", "--disable_tqdm", "true"]
    words += ["--save_strategy", "no", "--eval_strategy", "no", "--max_eval_samples", "10"]
    assert train_image_classification.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image_of(values).save(tmp_path / "grey.png")
    image_of(values).convert("RGB").save(tmp_path / "colour.png")
    code = (
        "import sys\nsys.modules['hf_imgproc_attn'] = None\nfrom transformers import pipeline\n"
        f"classify = pipeline('image-classification', model={str(tmp_path / 'run')!r}, trust_remote_code=True)\n"
        f"grey, colour = (classify(f'{tmp_path}/{{name}}.png') for name in ('grey', 'colour'))\n"
        "assert grey == colour, (grey, colour)\nprint(len(grey))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "5\n"
    # Training goes on from it as from any other checkpoint.
    again = ["--model_name_or_path", str(tmp_path / "run"), *words[6:], "--output_dir", str(tmp_path / "again")]
    assert train_image_classification.main(again) == 0
    kind = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert kind["image_processor_type"] == "ImgProcGreyImageProcessor"


def test_rows_without_an_image_are_named() -> None:
    rows = datasets.Dataset.from_dict({"image": [None, None]}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(UsageError, match="the image row 0 of the train split cannot be used: there is no image"):
        PixelDataset(rows, np.zeros(2), "image", build_image_processor((8, 8), 3), description="decoding train")
