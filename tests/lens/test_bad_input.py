"""What the lens refuses, in one clear line, and what it leaves out by name: inputs of Python, broken checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.lens import LensOptions, Report, inspect_model
from hf_imgproc_attn.lens.inputs import load_model, show
from hf_imgproc_attn.lens.tokens import measure_tokens
from tests.any_model.architectures import build, inputs, text

QUICK = LensOptions(spectra="none", noise=0.0)
IDS = text(batch=3, length=8)
FEW_PLACES = {"max_position_embeddings": 8}


def mask(*real: int) -> torch.Tensor:
    """Padding on the right: so many tokens of each of three samples are real."""
    return torch.arange(8) < torch.tensor(real)[:, None]


def test_what_the_lens_refuses() -> None:
    llama = build("llama")
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        inspect_model(llama, torch.tensor([[3]]))
    with pytest.raises(ValueError, match=r"several stacks: choose stack among encoder.block, decoder.block"):
        inspect_model(build("t5"), inputs("t5"))
    with pytest.raises(ValueError, match="stack must be among model.layers, got 'nothing'"):
        inspect_model(llama, text(), stack="nothing")
    with pytest.raises(ValueError, match="no self-attention layer that goes through"):
        inspect_model(nn.Linear(3, 3), text())
    with pytest.raises(ValueError, match="model must be a model"):
        inspect_model("a folder", text())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs must have 2 axes as input_ids, got shape \(2, 14, 1\)"):
        inspect_model(llama, text()[..., None])
    with pytest.raises(ValueError, match="inputs must be a tensor or what the model is called with"):
        inspect_model(llama, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be integers from -3 to 2, got 3"):
        inspect_model(llama, text(), layers=(3,))
    with pytest.raises(ValueError, match="token must be below the number of tokens, 14, got 14"):
        inspect_model(llama, text(), token=14)
    for field, value in (("noise", -1.0), ("noise", True), ("spectra", "all"), ("token", -1), ("seed", 1.5)):
        with pytest.raises(ValueError, match=f"{field} must be"):
            LensOptions(**{field: value})


def test_activations_that_are_not_finite_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[2 * 8 + 3] = math.nan
    with pytest.raises(ValueError, match=r"the query of model.layers.1.self_attn \(layer 1\), head 2, has NaN"):
        inspect_model(model, text())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (IDS[:0], r"input_ids must hold at least one sample, and nothing empty, got shape \(0, 8\)"),
        (IDS[:, :0], r"input_ids must hold at least one sample, and nothing empty, got shape \(3, 0\)"),
        (IDS[:, :1], "inputs must have at least 2 tokens, got 1"),
        (IDS.float(), "input_ids must be token numbers, of dtype torch.int64 or torch.int32, got torch.float32"),
        (IDS.bool(), "input_ids must be token numbers, of dtype torch.int64 or torch.int32, got torch.bool"),
        (IDS + 999, r"input_ids must be token numbers from 0 to 49, the tokens of BertModel, got 10\d\d"),
        (-1 - IDS, r"input_ids must be token numbers from 0 to 49, the tokens of BertModel, got -"),
        ({"input_ids": IDS[0]}, r"input_ids must have 2 axes, samples and tokens, got shape \(8,\)"),
        (torch.cat((IDS, IDS[:, :1]), 1), "inputs must have at most 8 tokens, the places of BertModel, got 9"),
        ({"input_ids": IDS, "attention_mask": mask(8, 0, 8)}, "attention_mask must leave .* sample 1 is all padding"),
        ({"input_ids": IDS, "attention_mask": mask(1, 1, 1)}, "at least 2 real tokens, and each has 1"),
        (
            {"input_ids": IDS, "inputs_embeds": IDS},
            r"inputs must fit BertModel, which fails on input_ids \[3, 8\], in",
        ),
        ({"input_ids": IDS, "attention_mask": mask(8, 8, 8)[:2]}, r"the shape of input_ids, \[3, 8\], got \[2, 8\]"),
        ({"input_ids": None}, "inputs must hold a tensor, got input_ids"),
        ({}, "inputs must hold a tensor, got nothing"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        inspect_model(build("bert", **FEW_PLACES), given, options=QUICK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, r"layers must be some numbers of layers, or None for all, got \(\)"),
        ({"layers": 1}, "layers must be some numbers of layers, or None for all, got 1"),
        ({"place": 0.5}, "place must be two shares of width and height from 0 to 1, got 0.5"),
        ({"place": ("left", 0.5)}, "place must be two shares"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LensOptions(**fields)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must fit ViTModel, which fails on pixel_values \[2, 3, 20, 20\]: "):
        inspect_model(build("vit"), torch.rand(2, 3, 20, 20).double(), options=QUICK)


def test_faults_of_the_lens_itself_keep_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no mistake of the user."""

    def fail(*args: Any) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr("hf_imgproc_attn.lens.run.add_heads", fail)
    with pytest.raises(IndexError, match="a bug"):
        inspect_model(build("bert"), IDS, options=QUICK)


# --------------------------------------------------------------------------------------------------------------------
# What is left out
# --------------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_named() -> None:
    """Swin's windows have no grid of the whole image; a single text cannot be decomposed; spectra can be left out."""
    report = inspect_model(build("swin"), inputs("swin"), spectra="none")
    assert "distances and position bandwidths: the grid of patches is not known" in report.skipped
    assert math.isnan(report.layers[0].heads[0].position_bandwidth)
    report = inspect_model(build("vit"), torch.zeros(2, 3, 24, 24, dtype=torch.float64), spectra="none")
    assert report.skipped[-1].startswith("what the noise does: the input is constant")
    assert report.layers[0].noise == {}
    report = inspect_model(build("llama"), text(batch=1), spectra="none")
    assert report.skipped == [
        "kernel decomposition by mean effects, and maps of position and content: at least 2 samples are needed, got 1",
        "spectra: they were not asked for",
    ]
    assert report.layers[0].heads[0].shares == {}


def test_numbers_that_are_not_defined_are_named() -> None:
    """Values that are all zero, queries that are, and images without a class token."""
    model = build("bert")
    with torch.no_grad():
        for layer, part in ((0, "value"), (2, "query")):
            projection = getattr(model.encoder.layer[layer].attention.self, part)
            projection.weight.zero_()
            projection.bias.zero_()
    report = inspect_model(model, IDS, options=QUICK)
    assert report.skipped == [
        "spectra: they were not asked for",
        "content bandwidth of some heads in layer 2: it would divide by zero",
        "norm of the sinks' values of some heads in layer 0: it would divide by zero",
        "method noise of some heads in layer 0: it would divide by zero",
        "kernel decomposition of some heads in layer 2: their logits are the same for all keys",
        "how alike tokens are at some places in layer 0: they are all zero there",
    ]
    report = inspect_model(build("siglip"), inputs("siglip"), options=QUICK)
    assert "weight on sinks, and the norm of their values: there are no class or register tokens" in report.skipped


def test_single_tokens_are_left_out_of_what_compares_tokens() -> None:
    """The others count as if they were alone, and what is skipped is named."""
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    real = mask(8, 1, 3)
    assert measure_tokens(x, real) == pytest.approx(measure_tokens(x[[0, 2]], real[[0, 2]]))
    assert all(math.isnan(value) for value in measure_tokens(x, mask(1, 1, 1)))
    report = inspect_model(build("bert"), {"input_ids": IDS, "attention_mask": real}, noise=0.0)
    assert report.skipped == [
        "how alike tokens are in 1 of 3 samples: a single real token has no other that it could be compared with"
    ]
    for layer in report.layers:
        for measured in layer.tokens.values():
            assert all(math.isfinite(value) for value in measured)


def test_spectra_of_a_single_token_are_skipped() -> None:
    given = {"input_ids": IDS, "attention_mask": mask(1, 8, 8)}
    report = inspect_model(build("bert"), given, noise=0.0)
    assert "spectra: the first sample has a single real token" in report.skipped
    assert report.layers[0].heads[0].filter_spectrum is None


def test_maps_are_those_of_a_real_token() -> None:
    given = {"input_ids": IDS, "attention_mask": mask(3, 8, 8)}
    assert inspect_model(build("bert"), given, options=QUICK).token == 1
    given["attention_mask"] = given["attention_mask"].flip(-1)
    assert inspect_model(build("bert"), given, options=QUICK).token == 6
    with pytest.raises(ValueError, match="token must be a real one of the first sample, and 4 is padding"):
        inspect_model(build("bert"), given, token=4, spectra="none", noise=0.0)


# --------------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# --------------------------------------------------------------------------------------------------------------------


def _numbers(report: Report) -> list[list[float]]:
    return [head.received for layer in report.layers for head in layer.heads]


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_decoders_that_are_given_nothing_see_the_same_tokens(stack: str) -> None:
    model = build("t5")
    given = {"input_ids": IDS, "attention_mask": mask(8, 5, 8)}
    report = inspect_model(model, given, stack=stack, spectra="none", noise=0.0)
    both = {**given, "decoder_input_ids": IDS, "decoder_attention_mask": given["attention_mask"]}
    assert _numbers(report) == _numbers(inspect_model(model, both, stack=stack, spectra="none", noise=0.0))
    assert report.layers[0].name.startswith(stack)


def test_a_decoder_without_tokens_is_refused_and_its_encoder_is_seen() -> None:
    model, given = build("whisper"), inputs("whisper")
    wanted = inspect_model(model, given, stack="model.encoder.layers", spectra="none", noise=0.0)
    del given["decoder_input_ids"]
    report = inspect_model(model, given, stack="model.encoder.layers", spectra="none", noise=0.0)
    assert _numbers(report) == _numbers(wanted)
    with pytest.raises(ValueError, match="inputs must hold decoder_input_ids: the decoder of Whisper"):
        inspect_model(model, given, stack="model.decoder.layers", spectra="none", noise=0.0)


# --------------------------------------------------------------------------------------------------------------------
# Broken checkpoints
# --------------------------------------------------------------------------------------------------------------------


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def _random_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bytes(range(256)) * 20)


def _empty_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def _list_in_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")


def _wrong_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}', encoding="utf-8")


BROKEN = {
    _truncated: "the file is damaged, or holds other things than weights",
    _random_bin: "the file is damaged, or holds other things than weights",
    _empty_bin: "the file is damaged, or holds other things than weights",
    _list_in_bin: "cannot convert dictionary",
    _wrong_type: "hidden_size",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_broken_checkpoints_are_one_line(
    damage: Callable[[Path], None], checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_imgproc_attn.lens.app_look import Question, answer

    folder = tmp_path / "broken"
    shutil.copytree(checkpoints / "llama", folder)
    damage(folder)
    with pytest.raises(SystemExit) as ended:
        main(["lens", str(folder), "--data", "random", "--output", str(tmp_path / "new")])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"MODEL {str(folder)!r} cannot be loaded: " in error
    assert BROKEN[damage] in error
    assert len(error) < 500
    with pytest.raises(UsageError, match="cannot be loaded: "):
        answer(Question(str(folder)))


def test_random_images_are_drawn_from_the_seed(checkpoints: Path) -> None:
    name = str(checkpoints / "vit")
    model = load_model(name)
    first, again, other = (
        show(model, name, data="random", samples=2, seed=seed).inputs["pixel_values"] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
