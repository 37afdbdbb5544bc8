"""The lens on whole models: what it sees is what the model computes, whatever its filters are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

import hf_imgproc_attn
from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.lens import LensOptions, inspect_model
from hf_imgproc_attn.models.backend_reference import filter_logits, filter_matrix
from hf_imgproc_attn.models.spec_fields import PRESETS
from tests.any_model.architectures import build, inputs
from tests.lens.lens_cases import STACKS, calls_of, made, no_cache, operator_of
from tests.models.helpers import sharpen_, tiny_gpt2_config, tiny_vit_config
from tests.models.variants import images, token_ids

SEEN = (
    *("gemma2", "gpt_oss", "llama", "mistral", "gpt_neox", "bert", "modernbert", "dinov2_with_registers", "siglip"),
    *("t5", "bart", "whisper", "gpt2:softmax", "gpt2:bilateral_gaussian", "gpt2:t5_bias"),
    *("vit:bilateral", "vit:alibi", "vit:elliptical"),
)


FLOAT32_SOFTMAX = ("gemma2", "gpt_oss", "llama", "mistral", "gpt_neox", "modernbert", "siglip")
"""Models whose eager attention computes its softmax in float32, whatever they are."""


@torch.no_grad()
@pytest.mark.parametrize("name", SEEN)
def test_entropy_and_attention_received_are_those_of_the_models_attentions(name: str) -> None:
    """The model's own eager attention, which returns A, against the lens, which computes its rows."""
    model, given = made(name)
    for part in model.modules():  # in Transformers 5.17 the stacks of T5 do not hear what their model is told
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    if name == "llama":  # rows that see nothing are NaN in its float32 softmax of a float64 mask
        given = inputs(name)
    # Logits of up to 100, rounded to float32, give weights with a relative error of up to 100 / 2^24.
    exact, absolute = (1e-5, 1e-5) if name in FLOAT32_SOFTMAX else (1e-9, 1e-12)
    options = LensOptions(stack=STACKS.get(name), noise=0.0, spectra="none")
    report = inspect_model(model, given, options=options)
    result = model(**given, output_attentions=True, **no_cache(model))
    attentions = getattr(result, "attentions", None)
    if attentions is None:
        side = "decoder" if "decoder" in (options.stack or "") else "encoder"
        attentions = result[f"{side}_attentions"]
    mask = given.get("attention_mask", torch.ones(attentions[0].shape[0], attentions[0].shape[-1]))
    real = mask.bool()
    assert len(report.layers) == len(attentions)
    for layer, weights in zip(report.layers, attentions, strict=True):
        shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)  # with sinks a row sums to less than 1
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        for head in layer.heads:
            rows = entropy[:, head.head][real]
            assert head.entropy == pytest.approx(float(rows.mean()), rel=exact, abs=absolute), layer.name
            received = (weights[:, head.head] * real[:, :, None]).sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(received.tolist(), rel=exact, abs=absolute)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_filters_put_into_a_model_are_seen(name: str) -> None:
    """The call that the lens sees computes what the model's layer returned, with its booster and positions."""
    model = build(name)
    apply_filter(
        model, boosting="twicing", position_kernel="gaussian", learn_bandwidths=True, **_special(name), layers=[1, 2]
    )
    calls = calls_of(model, inputs(name))
    assert [call.booster.name for call, _ in calls] == ["none", "twicing", "twicing"]
    for call, output in calls:
        operator = operator_of(call)
        torch.testing.assert_close(operator @ call.repeated()[1], output, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2:twicing", "gpt2:gradient_boosted", "vit:bilateral_twicing", "vit:nlm"])
def test_filters_of_our_models_are_seen(name: str) -> None:
    model, given = made(name)
    for call, output in calls_of(model, given):
        torch.testing.assert_close(operator_of(call) @ call.repeated()[1], output, rtol=1e-10, atol=1e-12)


def _special(name: str) -> dict[str, Any]:
    return {"num_special_tokens": 1} if name == "vit" else {}


def test_filters_with_dependent_rows_are_seen_whole() -> None:
    """Sinkhorn's columns are normalised too."""
    config = tiny_vit_config("softmax", normalisation="sinkhorn", attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    for layer, weights in zip(report.layers, attentions, strict=True):
        for head in layer.heads:
            wanted = weights[:, head.head].sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(wanted.tolist(), rel=1e-9)


def test_differential_layers_show_their_first_map_and_the_difference() -> None:
    """A is the first map, whose rows sum to 1; p(A) are the model's own attentions, maps and spectra alike."""
    config = tiny_vit_config("differential", attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, token=3, noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    calls = calls_of(model, given)
    for layer, difference, (call, _) in zip(report.layers, attentions, calls, strict=True):
        first = filter_matrix(filter_logits(call), call.visibility)
        assert (first - difference).abs().max() > 1e-2
        torch.testing.assert_close(torch.tensor(layer.maps["product"]).double(), first[0, :, 3])
        torch.testing.assert_close(torch.tensor(layer.maps["operator"]).double(), difference[0, :, 3])
        for head in layer.heads:
            assert head.received == pytest.approx(first[:, head.head].sum((0, 1)).div(len(first)).tolist())
            for spectrum, matrix in ((head.filter_spectrum, first), (head.operator_spectrum, difference)):
                wanted = torch.linalg.svdvals(matrix[0, head.head])
                assert spectrum is not None
                assert spectrum.singular_values == pytest.approx(wanted.tolist(), abs=1e-9)


@pytest.mark.parametrize("normalisation", ["sigmoid", "softpick", "sink"])
def test_rows_that_do_not_sum_to_one_are_seen_as_they_are(normalisation: str) -> None:
    """What all rows take from each token, and entropies between 0 and those of uniform weights."""
    config = tiny_vit_config("softmax", normalisation=normalisation, attn_implementation="eager")
    model = sharpen_(hf_imgproc_attn.ImgProcViTForImageClassification(config).double().eval())
    given = {"pixel_values": images().double()}
    report = inspect_model(model, given, spectra="none", noise=0.0)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    assert (attentions[0].sum(-1) - 1).abs().max() > 1e-2
    for layer, weights in zip(report.layers, attentions, strict=True):
        for head in layer.heads:
            wanted = weights[:, head.head].sum((0, 1)) / weights.shape[0]
            assert head.received == pytest.approx(wanted.tolist(), rel=1e-9)
            assert 0 <= head.entropy_share <= 1


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_shown_or_refused_by_name(preset: str) -> None:
    """Of images where it goes, else of texts; ``product`` has the model's own weights' form, a row a head."""
    try:
        config = tiny_vit_config(preset, num_hidden_layers=2)
        model: nn.Module = hf_imgproc_attn.ImgProcViTForImageClassification(config)
        given = {"pixel_values": images()}
    except StrictDataclassError:  # a filter of texts
        model = hf_imgproc_attn.ImgProcGPT2LMHeadModel(tiny_gpt2_config(preset, n_layer=2))
        given = {"input_ids": token_ids(3, 10)}
    sharpen_(model.eval())
    report = inspect_model(model, given, noise=0.0)
    assert report.skipped == []
    for layer in report.layers:
        assert set(layer.maps) >= {"content", "position", "product"}
        assert all(math.isfinite(head.entropy) and head.operator_spectrum is not None for head in layer.heads)
