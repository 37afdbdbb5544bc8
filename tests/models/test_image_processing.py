"""The image processor of models with one channel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # not behind torchvision, as in 5.17

from hf_imgproc_attn.models.image_processing_imgproc import ImgProcGreyImageProcessor
from tests.helpers import RunPython

OPTIONS = {"size": {"height": 6, "width": 5}, "image_mean": [0.5], "image_std": [0.5]}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))


def grey_levels(processor: ImgProcGreyImageProcessor, image: object) -> np.ndarray:
    values = processor(image, return_tensors="np")["pixel_values"]
    assert values.shape == (1, 1, 6, 5)
    return np.rint((values[0, 0] * 0.5 + 0.5) * 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_kind_of_picture_becomes_what_pillow_calls_grey(picture: Image.Image, mode: str) -> None:
    image = picture.convert(mode)
    assert np.array_equal(grey_levels(ImgProcGreyImageProcessor(**OPTIONS), image), np.asarray(image.convert("L")))


def test_arrays_become_grey_too(picture: Image.Image) -> None:
    import torch

    processor = ImgProcGreyImageProcessor(**OPTIONS)
    expected, colour = np.asarray(picture.convert("L")), np.array(picture)
    first = colour.transpose(2, 0, 1).copy()
    for image in (colour, first, torch.from_numpy(first), expected[None]):
        assert np.array_equal(grey_levels(processor, image), expected)
    floats = processor(colour / 255, do_rescale=False, return_tensors="np")["pixel_values"]
    assert (
        np.abs((floats[0, 0] * 0.5 + 0.5) * 255 - expected).max() < 1.01
    )  # the stock processor rounds floats down to resize them


def test_sixteen_bits_keep_their_differences() -> None:
    ramp = np.arange(30, dtype=np.uint16).reshape(6, 5) * 2184
    found = grey_levels(ImgProcGreyImageProcessor(**OPTIONS), Image.fromarray(ramp))
    assert np.abs(found - ramp / 257).max() <= 0.51


def test_other_sizes_are_resized_as_the_stock_processor_does() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (17, 11), dtype=np.uint8))
    stock = ViTImageProcessorPil(**OPTIONS)(image, return_tensors="np")["pixel_values"]
    ours = ImgProcGreyImageProcessor(**OPTIONS)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(ours, stock)


def test_it_is_saved_with_its_code_and_found_with_and_without_the_package(
    tmp_path: Path, run_python: RunPython, picture: Image.Image
) -> None:
    ImgProcGreyImageProcessor(**OPTIONS).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "image_processing_imgproc.py").is_file()
    config = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {"AutoImageProcessor": "image_processing_imgproc.ImgProcGreyImageProcessor"}
    for trust in (None, True):
        found = AutoImageProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=trust)
        assert type(found) is ImgProcGreyImageProcessor
    picture.save(tmp_path / "picture.png")
    code = (
        "import sys\nsys.modules['hf_imgproc_attn'] = None\nfrom PIL import Image\n"
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
        f"processor = AutoImageProcessor.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True)\n"
        f"print(processor(Image.open({str(tmp_path / 'picture.png')!r}), return_tensors='pt')['pixel_values'].shape)\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([1, 1, 6, 5])\n"


def test_models_with_three_channels_keep_the_stock_processor(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 6, "width": 5}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is ViTImageProcessorPil
