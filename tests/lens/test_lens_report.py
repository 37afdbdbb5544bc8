"""What the lens reports of whole models: shares, maps, noise, and the forms in which it can be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import hf_imgproc_attn
from hf_imgproc_attn.lens import Report, inspect_model
from hf_imgproc_attn.lens.spectrum import Spectrum
from tests.any_model.architectures import build, inputs, text
from tests.lens.lens_cases import calls_of, made, operator_of, stock


def test_images_have_a_grid_and_special_tokens() -> None:
    model, given = stock("dinov2_with_registers")
    report = inspect_model(model, given)
    assert (report.length, report.grid, report.special, report.axes) == (12, [3, 3], 3, 2)
    assert report.token == 3 + 1 * 3 + 1
    assert report.skipped == []


@torch.no_grad()
def test_the_first_layer_is_decomposed_exactly_where_positions_are_added() -> None:
    """By the definition: token and position through the norm, whose statistics are those of their sum."""
    model = build("gpt2")
    given = {"input_ids": text(length=10)}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    block, attention = model.transformer.h[0], model.transformer.h[0].attn
    tokens, places = model.transformer.wte(given["input_ids"]), model.transformer.wpe.weight[:10]
    x = tokens + places
    sigma = (x.var(-1, unbiased=False, keepdim=True) + block.ln_1.eps).sqrt()

    def projected(part: torch.Tensor, which: int) -> torch.Tensor:
        normed = block.ln_1.weight * (part - part.mean(-1, keepdim=True)) / sigma
        columns = attention.c_attn.weight[:, 32 * which : 32 * (which + 1)]
        return (normed @ columns).unflatten(-1, (4, 8)).transpose(1, 2)

    constant = (block.ln_1.bias @ attention.c_attn.weight + attention.c_attn.bias)[:32].view(1, 4, 1, 8)
    query = {"content": projected(tokens, 0), "position": projected(places + 0 * tokens, 0)}
    query["constant"] = constant.expand_as(query["content"])
    key = {"content": projected(tokens, 1), "position": projected(places + 0 * tokens, 1)}
    for head in range(4):
        terms = {
            (a, b): query[a][:, head] @ key[b][:, head].mT for a in query for b in key
        }  # the constant of the keys changes no row
        total = sum(terms.values())
        covariances, variance = dict.fromkeys(terms, 0.0), 0.0
        for i in range(10):
            row = total[:, i, : i + 1]
            row = row - row.mean(-1, keepdim=True)
            variance += float(row.square().sum())
            for pair, term in terms.items():
                covariances[pair] += float((term[:, i, : i + 1] * row).sum())
        shares = report.layers[0].heads[head].exact_shares
        assert sum(shares.values()) == pytest.approx(1.0)
        for (a, b), value in covariances.items():
            assert shares[f"{a}-{b}"] == pytest.approx(value / variance, rel=1e-8), (head, a, b)
    assert report.layers[1].heads[0].exact_shares == {}


def test_vit_is_decomposed_exactly_too() -> None:
    model, given = build("vit"), inputs("vit")
    shares = inspect_model(model, given, spectra="none", noise=0.0).layers[0].heads[2].exact_shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert abs(shares["other"]) < 1e-9
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    shares = inspect_model(model, given, spectra="none", noise=0.0).layers[0].heads[2].exact_shares
    assert shares["position-position"] == shares["content-position"] == 0.0
    assert shares["content-content"] + shares["constant-content"] == pytest.approx(1.0)


def test_kernels_of_bilateral_models_are_shares_as_they_are() -> None:
    model, given = made("vit:bilateral_gaussian")
    report = inspect_model(model, given, spectra="none", noise=0.0)
    for layer in report.layers:
        for head in layer.heads:
            assert sum(head.shares.values()) == pytest.approx(1.0)
            assert "position kernel" in head.shares
            assert set(head.learned) >= {"h_y", "h_p"}


@pytest.mark.parametrize("name", ["gpt2:bilateral_twicing", "vit:softmax", "llama"])
def test_maps_are_rows_of_the_models_attention(name: str) -> None:
    model, given = made(name)
    report = inspect_model(model, given, token=9, spectra="none", noise=0.0)
    calls = calls_of(model, given)
    for layer, (call, _) in zip(report.layers, calls, strict=True):
        rows = torch.tensor(layer.maps["product"], dtype=torch.float64)
        plain = call._replace(booster=call.booster._replace(name="none"))
        torch.testing.assert_close(rows, operator_of(plain)[0, :, 9])
        if call.is_boosted:
            torch.testing.assert_close(
                torch.tensor(layer.maps["operator"], dtype=torch.float64), operator_of(call)[0, :, 9]
            )
        for kernel in ("content", "position"):
            sums = torch.tensor(layer.maps[kernel], dtype=torch.float64).sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums))
            assert not torch.allclose(torch.tensor(layer.maps[kernel]).double(), rows)


def test_noise_of_the_asked_size_enters() -> None:
    for name in ("vit:softmax", "llama"):
        model, given = made(name)
        report = inspect_model(model, given, noise=0.05, spectra="none")
        assert set(report.layers[0].noise) == {"entering", "values", "filtered", "after_residual", "leaving"}
        if name == "llama":  # what enters the first block is the embedding itself, with a mean near 0
            assert report.layers[0].noise["entering"] == pytest.approx(-20 * math.log10(0.05), abs=0.5)
        for layer in report.layers:
            assert layer.alpha is not None
            assert all(0 < value < 80 for value in layer.noise.values())


def test_report_as_json_and_markdown() -> None:
    import json

    model, given = made("gpt2:bilateral_twicing")
    report = inspect_model(model, given, name="tiny")
    assert isinstance(report, Report)
    held = json.loads(report.to_json())
    assert held["layers"][1]["heads"][2]["entropy"] == pytest.approx(report.layers[1].heads[2].entropy, rel=1e-5)
    again = Report.from_dict(held)
    assert again.to_json() == report.to_json()
    assert isinstance(again.layers[0].heads[0].operator_spectrum, Spectrum)
    page = report.to_markdown()
    assert "# What tiny filters" in page
    assert "NaN" not in page
    assert "nan" not in page
    for title in ("## Heads", "## Tokens by depth", "## Noise (10 % of the input)", "## Spectra"):
        assert title in page


def test_report_as_page_and_pictures(tmp_path: Path) -> None:
    report = inspect_model(build("bert", num_hidden_layers=1), text(batch=2, length=6), noise=0.0, name="tiny")
    page = report.to_html(tmp_path / "lens.html")
    assert (tmp_path / "lens.html").read_text(encoding="utf-8") == page
    assert "<h1>What tiny filters</h1>" in page
    files = report.to_png(tmp_path / "pictures")
    assert [file.name for file in files] == [
        *("heads.png", "smoothing.png", "kernels.png", "spectra.png", "maps.png", "removed.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_model_without_inputs_sees_real_data() -> None:
    """What the command shows it; also of a model in training, which stays in it."""
    model = build("llama", num_hidden_layers=1).train()
    report = inspect_model(model, spectra="none", noise=0.0)
    assert (report.samples, report.length, report.data) == (16, 64, "texts that the model itself wrote")
    assert len(report.labels) == 64
    assert all(module.training for module in model.modules())
    assert report.to_dict()["layers"] == inspect_model(model, spectra="none", noise=0.0).to_dict()["layers"]
    with pytest.raises(ValueError, match="model must be a model, which is loaded already, got 'gpt2'"):
        inspect_model("gpt2")  # type: ignore[arg-type]


def test_a_text_and_a_misspelt_option_are_refused_with_what_to_do() -> None:
    model = build("llama", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"of texts and images: what the model's tokenizer .* got 'Once upon a time'$"
    ):
        inspect_model(model, "Once upon a time")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"unknown option of the lens 'layer': it must be one of .*did you mean layers\?"
    ):
        inspect_model(model, torch.ones(2, 4, dtype=torch.long), layer=[0])


def test_the_function_has_the_name_of_its_package() -> None:
    report = hf_imgproc_attn.lens(build("bert"), text(), spectra="none", noise=0.0)
    assert report.model_type == "bert"
