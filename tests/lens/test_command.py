"""``imgproc-attn lens``: what it writes, what it shows a model, and what it refuses in one line."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.lens import Report
from hf_imgproc_attn.lens.compare import write
from hf_imgproc_attn.lens.figures import Pictures, _noise, _png, _smoothing, _spectra, draw_all
from hf_imgproc_attn.lens.inputs import load_model, show
from hf_imgproc_attn.lens.map_figures import draw_maps, draw_removed


def test_files_of_a_comparison(look: Path) -> None:
    held = json.loads((look / "lens.json").read_text(encoding="utf-8"))
    assert [each["model"] for each in held] == ["llama", "gpt2"]
    assert [len(each["layers"]) for each in held] == [2, 2]
    assert held[1]["layers"][0]["heads"][0]["operator_spectrum"] != held[1]["layers"][0]["heads"][0]["filter_spectrum"]
    page = (look / "lens.md").read_text(encoding="utf-8")
    assert "# What llama filters" in page
    assert "# What gpt2 filters" in page
    pictures = sorted(path.name for path in look.glob("*.png"))
    assert {"heads.png", "kernels.png", "smoothing.png", "noise.png", "spectra.png"} <= set(pictures)
    assert {"maps_llama_layer_0.png", "maps_gpt2_layer_1.png", "removed_gpt2_layer_1.png"} <= set(pictures)
    for name in pictures:
        with Image.open(look / name) as picture:
            assert picture.size[0] > 300
            assert len(picture.convert("L").getcolors() or [0] * 9) > 3, f"{name} is empty"


def test_names_of_the_hub_name_files_too(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = {"owner/name: 1 layer 0": b"", "layer 0": b""}
    monkeypatch.setattr("hf_imgproc_attn.lens.compare.draw_all", lambda reports: {"maps": views})
    write([replace(report, model="owner/name: 1"), report], tmp_path)
    assert (tmp_path / "maps_owner_name_1_layer_0.png").is_file()


def test_comparisons_share_their_axes(report: Report) -> None:
    from copy import deepcopy

    other = deepcopy(report)
    for layer in other.layers:
        layer.noise = {place: value + 30 for place, value in layer.noise.items()}
        layer.tokens = {place: each._replace(stable_rank=each.stable_rank + 5) for place, each in layer.tokens.items()}
    for draw, columns in ((_smoothing, 3), (_noise, 2)):
        axes = draw([report, other]).axes
        assert len(axes) == 2 * columns
        for first, second in zip(axes[:columns], axes[columns:], strict=True):
            assert first.get_ylim() == second.get_ylim()
    for layer in other.layers:
        for head in layer.heads:
            assert head.filter_spectrum is not None
            head.filter_spectrum.radius += 3
    axes = [axes for axes in _spectra([report, other]).axes if axes.get_ylabel() == "radius"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert axes[0].get_ylim()[1] > 3


def test_gains_are_drawn_whole_whatever_is_promised(report: Report) -> None:
    layers = [replace(layer, predicted_gain=500.0) for layer in report.layers]
    layers[0].noise = {**layers[0].noise, "filtered": layers[0].noise["values"] - 9.0}
    gains = _noise([replace(report, layers=layers)]).axes[1]
    drawn = [y for line in gains.get_lines()[:3] for y in line.get_ydata()]
    low, high = gains.get_ylim()
    assert low < min(drawn) == pytest.approx(-9.0)
    assert max(drawn) < high < 100
    assert gains.get_xlim()[0] < 0 < 1 < gains.get_xlim()[1]


@pytest.fixture(scope="module")
def pictures(report: Report) -> Pictures:
    return draw_all([report])


def test_images_are_drawn_on_their_grid(report: Report, pictures: Pictures) -> None:
    assert list(pictures["maps"]) == ["layer 0", "layer 1"]
    assert set(report.layers[0].maps) == {"content", "position", "product"}
    with Image.open(io.BytesIO(pictures["removed"]["layer 1"])) as picture:
        assert picture.size[0] > picture.size[1]


def test_maps_lie_over_the_image(report: Report) -> None:
    """The image first, then the heads, where each has the mark of the chosen patch, in the same place."""
    layer = report.layers[0]
    figure = draw_maps(report, layer)
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["content", "position", "product"]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["input", *(f"head {head.head}" for head in layer.heads)]
    drawn = figure.axes[2].get_images()[0].get_array()
    side = drawn.shape[1] // len(labels)
    with Image.open(io.BytesIO(base64.b64decode(report.picture))) as picture:
        assert picture.size == (12, 20)
        wanted = np.asarray(picture.resize((side - 3, drawn.shape[0]))) / 255
    np.testing.assert_allclose(drawn[:, : side - 3], wanted)
    marks = figure.axes[2].get_lines()[0]
    assert set(np.diff(marks.get_xdata())) == {side + 1}
    plain = draw_maps(replace(report, picture=""), layer)
    assert plain is not None
    assert plain.axes[0].get_xticklabels()[0].get_text() == "head 0"


@pytest.mark.parametrize("heads", [12, 13, 30])
def test_all_heads_are_drawn(heads: int, report: Report) -> None:
    """Over an image twelve beside each other, each with its number; of texts below each other."""
    each = [float(index) for index in range(report.length)]
    layer = replace(
        report.layers[0],
        heads=[replace(report.layers[0].heads[0], head=head) for head in range(heads)],
        maps={"position": [each] * heads, "product": [each] * heads},
        method_noise_map=[each] * heads,
    )
    for draw, kernels in ((draw_maps, 2), (draw_removed, 1)):
        figure = draw(report, layer)
        assert figure is not None
        assert len(figure.axes) == kernels * -(-heads // 12)
        labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
        times = kernels if heads > 12 else 1
        assert sorted(label for label in labels if label.startswith("head")) == sorted(
            times * [f"head {head}" for head in range(heads)]
        )
        figure = draw(replace(report, grid=None), layer)
        assert figure is not None
        assert figure.axes[0].get_images()[0].get_array().shape == (heads, report.length)


def test_negative_weights_are_orange(report: Report) -> None:
    """As the page says, and as the coloured texts have them."""
    layer = replace(report.layers[0], maps={"operator": [[0.0] * report.special + [-1.0, 1.0] + [0.0] * 13] * 4})
    assert report.length == report.special + 15
    for given in (replace(report, picture=""), replace(report, picture="", grid=None)):
        figure = draw_maps(given, layer)
        assert figure is not None
        drawn = figure.axes[0].get_images()[0]
        pixels = np.asarray(drawn.get_array()) if drawn.get_array().ndim == 3 else drawn.to_rgba(drawn.get_array())
        step = pixels.shape[1] // (report.grid or [1, 1])[1] // 4 if given.grid is not None else 1
        first = 0 if given.grid is not None else report.special
        negative, positive = pixels[0, first, :3], pixels[0, first + step, :3]
        assert negative[0] > negative[2], "orange has more red than blue"
        assert positive[2] > positive[0], "purple has more blue than red"


def test_the_same_numbers_give_the_same_pictures(report: Report, pictures: Pictures) -> None:
    assert _png(_smoothing([report])) == pictures["smoothing"]["all"]


# --------------------------------------------------------------------------------------------------------------------
# What a model is shown
# --------------------------------------------------------------------------------------------------------------------


def test_models_without_a_tokenizer_see_texts_of_their_own(checkpoints: Path) -> None:
    name = str(checkpoints / "llama")
    model = load_model(name)
    shown = show(model, name, samples=5, length=9)
    assert shown.described == "texts that the model itself wrote"
    assert shown.inputs["input_ids"].shape == (5, 9)
    assert shown.labels == [str(int(token)) for token in shown.inputs["input_ids"][0]]
    again = show(model, name, samples=5, length=9)
    assert torch.equal(shown.inputs["input_ids"], again.inputs["input_ids"])


def test_grey_images_are_digits_and_files_are_taken(checkpoints: Path, tmp_path: Path) -> None:
    name = str(checkpoints / "vit")
    model = load_model(name)
    shown = show(model, name, samples=4)
    assert shown.described == "handwritten digits"
    assert shown.inputs["pixel_values"].shape == (4, 1, 20, 12)
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    shown = show(model, name, files=[str(tmp_path / "red.png")])
    assert shown.described == "red.png"
    # A third of white, from 0 to 1, normalised with 0.5 and 0.5.
    assert torch.allclose(shown.inputs["pixel_values"], torch.tensor((1 / 3 - 0.5) / 0.5))
    shown = show(model, name, data="photographs", samples=13)
    assert shown.inputs["pixel_values"].shape == (13, 1, 20, 12)
    assert len({float(image.mean()) for image in shown.inputs["pixel_values"]}) == 13


def test_real_data_stand_beside_a_users_file(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    arguments = ["--input", str(tmp_path / "red.png"), "--noise", "0", "--spectra", "none"]
    names = [str(checkpoints / "vit"), *arguments, "--output", str(tmp_path / "new")]
    assert main(["lens", *names, "--beside", "2"]) == 0
    (held,) = json.loads((tmp_path / "new" / "lens.json").read_text(encoding="utf-8"))
    assert (held["samples"], held["data"]) == (3, "red.png, and beside it 2 samples of handwritten digits")
    assert held["layers"][0]["heads"][0]["shares"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["lens", *names, "--beside", "-1", "--force"])
    assert "beside must be an integer >= 0, got -1" in capsys.readouterr().err


def test_token_numbers_are_taken_from_json(checkpoints: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[[3, 4, 5, 6], [7, 8, 9]]", encoding="utf-8")
    name = str(checkpoints / "llama")
    shown = show(load_model(name), name, files=[str(file)])
    assert shown.inputs["input_ids"].tolist() == [[3, 4, 5], [7, 8, 9]]


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("t5", ["--data", "random"], "T5Model has several stacks: choose stack among encoder.block, decoder.block"),
        ("llama", ["--data", "digits"], "data='digits' is for image models"),
        ("vit", ["--data", "pydoc"], "data='pydoc' is for models of texts"),
        ("llama", ["--data", "everything"], "data must be one of auto, pydoc, own"),
        ("llama", ["--data", "pydoc"], "data='pydoc' needs a tokenizer, and there is none beside"),
        ("llama", ["--length", "65"], "length must be at most 64, the places of"),
        ("llama", ["--samples", "0"], "samples must be an integer >= 1, got 0"),
        ("llama", ["--noise", "-1"], "noise must be a number >= 0"),
        ("llama", ["--spectra", "full"], "spectra must be dense, iterative or none, got 'full'"),
        ("llama", ["--token", "99", "--length", "8"], "token must be below the number of tokens, 8, got 99"),
        ("llama", ["--input", "text.txt"], "texts need a tokenizer"),
        ("llama", ["--input", "one.json"], "at least 2 tokens, got 1"),
        ("llama", ["--input", "large.json"], "token numbers must be from 0 to 49"),
        ("llama", ["--input", "broken.json"], "must be JSON"),
        ("llama", ["--input", "missing.json"], "'missing.json' cannot be read: No such file"),
        ("vit", ["--input", "text.txt"], "'text.txt' must be an image that can be read"),
        ("nothing", [], "cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(
    model: str,
    arguments: list[str],
    message: str,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"text.txt": "Some words.", "one.json": "[[3]]", "large.json": "[[3, 50]]", "broken.json": "[[3,"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "nothing").mkdir()
    name = "./nothing" if model == "nothing" else str(checkpoints / model)
    with pytest.raises(SystemExit) as ended:
        main(["lens", name, *arguments, "--output", "new"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "new").exists()


def test_output_is_checked_before_the_work(
    look: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not replaced, and a place that cannot be written is found before any model is loaded."""
    monkeypatch.setattr("hf_imgproc_attn.lens.inputs.load_model", lambda name: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    for output, message in ((look, "are there already; --force"), (tmp_path / "file", "output must be a folder")):
        with pytest.raises(SystemExit) as ended:
            main(["lens", "model", "--output", str(output)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
