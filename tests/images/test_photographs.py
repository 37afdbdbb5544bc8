"""Photographs are read with all that they are and written as they were; what would be lost is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from skimage import data

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.images.filters import check_image
from hf_imgproc_attn.images.photographs import PHOTOGRAPHS, load_photograph, save_photograph

GREY, COLOUR = data.camera()[100:140, 200:230], data.astronaut()[:40, :30]
DEEP = (GREY.astype(np.uint16) * 257) ^ np.arange(30, dtype=np.uint16)  # its lower bytes are not its upper ones
ALPHA = np.arange(1200, dtype=np.uint8).reshape(40, 30)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_shipped_photographs_need_no_download(name: str) -> None:
    file = {"clock": "clock_motion.png", "rocket": "rocket.jpg"}.get(name, f"{name}.png")
    assert (Path(data.__file__).parent / file).is_file()
    photograph = load_photograph(name)
    assert photograph.name == name
    assert photograph.pixels.dtype == np.float32
    assert (photograph.pixels == getattr(data, name)()).all()
    assert (photograph.depth, photograph.alpha) == (8, None)
    check_image(photograph.pixels)


def saved(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> str:
    picture = Pillow.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return str(path)


def test_files_keep_colour_depth_and_transparency(tmp_path: Path) -> None:
    for name, pixels, alpha in (
        ("grey.png", GREY, None),
        ("colour.png", COLOUR, None),
        ("grey-alpha.png", GREY, ALPHA),
        ("colour-alpha.png", COLOUR, ALPHA),
        ("colour.bmp", COLOUR, None),
        ("grey.tif", GREY, None),
    ):
        given = pixels if alpha is None else np.dstack((pixels, alpha))
        photograph = load_photograph(saved(tmp_path / name, given))
        assert photograph.name == Path(name).stem
        assert photograph.depth == 8
        assert photograph.is_colour == (pixels.ndim == 3)
        assert (photograph.pixels == pixels).all()
        assert (photograph.alpha is None) == (alpha is None)
        assert alpha is None or (photograph.alpha == alpha).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "big-endian.tif"])
def test_sixteen_bits_are_all_read(name: str, tmp_path: Path) -> None:
    if name == "big-endian.tif":
        Pillow.fromarray(DEEP.astype(">u2")).save(tmp_path / name)
    else:
        cv2.imwrite(str(tmp_path / name), DEEP)
    photograph = load_photograph(str(tmp_path / name))
    assert photograph.depth == 16
    np.testing.assert_allclose(photograph.pixels, DEEP / 257, rtol=1e-6)
    assert len(np.unique(photograph.pixels)) == len(np.unique(DEEP)) > 256


def test_palettes_are_colours_and_their_transparency_is_opacity(tmp_path: Path) -> None:
    palette = Pillow.fromarray(COLOUR).quantize(16)
    palette.save(tmp_path / "plain.png")
    photograph = load_photograph(str(tmp_path / "plain.png"))
    assert (photograph.pixels == np.asarray(palette.convert("RGB"))).all()
    assert photograph.alpha is None
    palette.save(tmp_path / "hole.png", transparency=3)
    photograph = load_photograph(str(tmp_path / "hole.png"))
    assert (photograph.pixels == np.asarray(palette.convert("RGB"))).all()
    assert (photograph.alpha == np.where(np.asarray(palette) == 3, 0, 255)).all()
    saved(tmp_path / "grey.png", GREY, transparency=int(GREY[0, 0]))
    photograph = load_photograph(str(tmp_path / "grey.png"))
    assert (photograph.pixels == GREY).all()
    assert (photograph.alpha == np.where(GREY[0, 0] == GREY, 0, 255)).all()
    saved(tmp_path / "bilevel.png", GREY > 100)
    assert (load_photograph(str(tmp_path / "bilevel.png")).pixels == np.where(GREY > 100, 255, 0)).all()


def test_a_crop_is_the_middle_of_pixels_and_opacity(tmp_path: Path) -> None:
    photograph = load_photograph(saved(tmp_path / "a.png", np.dstack((COLOUR, ALPHA))), crop=20)
    assert (photograph.pixels == COLOUR[10:30, 5:25]).all()
    assert (photograph.alpha == ALPHA[10:30, 5:25]).all()


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    """Cameras write how the picture is to be turned; a PNG of its pixels would lie on its side."""
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    saved(tmp_path / "a.png", COLOUR, exif=exif)
    assert (load_photograph(str(tmp_path / "a.png")).pixels == np.rot90(COLOUR, -1)).all()


@pytest.mark.parametrize("kind", ["grey", "colour", "grey-alpha", "colour-alpha", "deep"])
def test_what_is_written_is_what_was_read(kind: str, tmp_path: Path) -> None:
    """Nothing but the pixels that are given changes: depth, channels, opacity and colour profile."""
    given = {
        "grey": GREY,
        "colour": COLOUR,
        "grey-alpha": np.dstack((GREY, ALPHA)),
        "colour-alpha": np.dstack((COLOUR, ALPHA)),
        "deep": DEEP,
    }[kind]
    photograph = load_photograph(saved(tmp_path / "in.png", given, icc_profile=b"a profile"))
    save_photograph(photograph, photograph.pixels, tmp_path / "out.png")
    with Pillow.open(tmp_path / "in.png") as before, Pillow.open(tmp_path / "out.png") as after:
        assert before.mode == after.mode
        assert (np.asarray(before) == np.asarray(after)).all()
        assert after.info["icc_profile"] == b"a profile"


def test_values_are_rounded_and_clipped_to_the_depth(tmp_path: Path) -> None:
    pixels = np.array([[-3.0, 0.4, 100.6, 254.6, 300.0]], dtype=np.float32)
    for depth, expected in ((8, [0, 0, 101, 255, 255]), (16, [0, 103, 25854, 65432, 65535])):
        photograph = load_photograph("camera")._replace(depth=depth)
        save_photograph(photograph, pixels, tmp_path / "out.png")
        with Pillow.open(tmp_path / "out.png") as written:
            assert np.asarray(written).tolist() == [expected]


def test_files_that_do_not_go_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    cut = tmp_path / "cut.png"
    Pillow.fromarray(data.camera()).save(cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    Pillow.new("L", (2000, 1000)).save(tmp_path / "large.png")
    saved(tmp_path / "cmyk.jpg", COLOUR, "CMYK")
    saved(tmp_path / "floats.tif", GREY.astype(np.float32))
    saved(tmp_path / "integers.tif", GREY.astype(np.int32) - 200)
    saved(tmp_path / "narrow.tif", GREY.astype(np.int32))
    for name in ("deep-colour.png", "deep-colour.tif", "deep-colour.ppm"):
        cv2.imwrite(str(tmp_path / name), np.dstack((DEEP, DEEP, DEEP)))
    frames = [Pillow.fromarray(GREY), Pillow.fromarray(GREY[::-1])]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, message in (
        ("text.png", "can be read"),
        ("cut.png", "can be read"),
        ("large.png", "at most 1048576 pixels"),
        ("missing.png", "a file or one of astronaut"),
        (".", "a file or one of astronaut"),
        ("cmyk.jpg", "or RGB or a palette with 8 bits a channel, got mode 'CMYK'"),
        ("floats.tif", "got mode 'F'"),
        ("integers.tif", "grey values from 0 to 65535, with 32 bits not all below 256, got -1"),
        ("narrow.tif", "with 32 bits not all below 256, got 7 to 156: save it with 8 or 16 bits"),
        ("deep-colour.png", "more than 8 bits a channel, got mode 'RGB' with more"),
        ("deep-colour.tif", "more than 8 bits a channel, got mode 'RGB' with more"),
        ("deep-colour.ppm", "more than 8 bits a channel, got mode 'RGB' with more"),
        ("moving.gif", "must be one picture, got 2 frames"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            load_photograph(str(tmp_path / name))
    with pytest.raises(UsageError, match="crop must be from 1 to"):
        load_photograph("camera", crop=513)
