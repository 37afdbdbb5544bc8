"""Gradient boosting: gated attentions of the remainder, on both backbones; sources, rounds, start, cache, dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_imgproc_attn.models.boost_gradient import GradientBoosting
from hf_imgproc_attn.models.cache_streams import CachedStreams
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import sharpen_
from tests.models.variants import IMPLEMENTATIONS, gpt2_config, gradients, images, token_ids, vit_config

TIGHT = {"rtol": 0, "atol": 1e-11}
ROUNDS = [(source, rounds) for source in ("residual", "input") for rounds in (2, 3)]


def build(backbone: str, preset: str = "gradient_boosted", implementation: str = "sdpa", **fields: Any) -> Any:
    config = (gpt2_config if backbone == "gpt2" else vit_config)(preset, attn_implementation=implementation, **fields)
    return (ImgProcGPT2LMHeadModel if backbone == "gpt2" else ImgProcViTForImageClassification)(config)


def given(backbone: str) -> torch.Tensor:
    return token_ids() if backbone == "gpt2" else images()


def attentions_of(model: Any, backbone: str) -> list[Any]:
    return (
        [block.attn for block in model.transformer.h]
        if backbone == "gpt2"
        else [layer.attention for layer in model.vit.layers]
    )


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (4, 5)).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """Stock attention, written out; heads side by side."""
    logits = heads(query) @ heads(key).mT / math.sqrt(5)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
    return (logits.softmax(-1) @ heads(value)).transpose(1, 2).flatten(2)


def by_hand(model: Any, backbone: str, inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the published recurrence, arXiv 2604.03190, algorithm 1.

    r_m = z - F, c_m = Attn_m(r_m), F <- F + sigmoid(W_m [F ; c_m]) c_m for m = 1 .. M - 1, then W_O F. Keys and values
    of Attn_m are made of r_m in the authors' experiments, of z in the first version's equation.
    """
    gpt2 = backbone == "gpt2"
    body, config = model.base_model, model.config
    hidden = body.wte(inputs) + body.wpe.weight[: inputs.shape[1]] if gpt2 else body.embeddings(inputs)[0]
    for block in body.h if gpt2 else body.layers:
        attention = block.attn if gpt2 else block.attention
        z = (block.ln_1 if gpt2 else block.layernorm_before)(hidden)
        projections = (
            attention.c_attn(z).split(20, dim=-1)
            if gpt2
            else (attention.q_proj(z), attention.k_proj(z), attention.v_proj(z))
        )
        estimate = attend(*projections, causal=gpt2)
        rounds = [attention.filter.gradient_boosting, *getattr(attention.filter, "gradient_boosting_further", ())]
        assert len(rounds) == (config.boosting_steps or 2) - 1
        for own in rounds:
            residual = z - estimate
            source = z if config.gradient_boosting_source == "input" else residual
            correction = attend(own.query(residual), own.key(source), own.value(source), causal=gpt2)
            logits = torch.cat((estimate, correction), -1) @ own.gate.weight.T + own.gate.bias
            estimate = estimate + correction / (1 + torch.exp(-logits))
        hidden = hidden + (attention.c_proj if gpt2 else attention.o_proj)(estimate)
        hidden = hidden + block.mlp((block.ln_2 if gpt2 else block.layernorm_after)(hidden))
    return body.ln_f(hidden) @ body.wte.weight.T if gpt2 else model.classifier(body.layernorm(hidden)[:, 0])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "blocked"])
@pytest.mark.parametrize(("source", "rounds"), ROUNDS)
@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_the_model_is_the_formula(backbone: str, source: str, rounds: int, implementation: str) -> None:
    """Logits and the gradient of every parameter, of each source and two or three rounds, in each back-end."""
    fields = {"gradient_boosting_source": source, "boosting_steps": rounds}
    model = build(backbone, implementation="eager" if implementation == "eager" else "sdpa", **fields)
    model = sharpen_(model).double()
    if implementation == "blocked":
        model.config.filter_backend = "blocked"
    inputs = given(backbone)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    results = []
    for logits in (model(inputs).logits, by_hand(model, backbone, inputs)):
        results.append((logits.detach(), gradients(model, logits.sin().sum())))
    (got, got_gradients), (wanted, wanted_gradients) = results
    torch.testing.assert_close(got, wanted, **TIGHT)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_residual_and_two_rounds_are_the_default() -> None:
    """And the other source, or another round, computes something else."""
    model, ids = sharpen_(build("gpt2")).eval(), token_ids()
    wanted = model(ids).logits
    for fields, same in (
        ({"gradient_boosting_source": "residual", "boosting_steps": 2}, True),
        ({"gradient_boosting_source": "input"}, False),
        ({"boosting_steps": 3}, False),
    ):
        other = sharpen_(build("gpt2", **fields)).eval()
        other.load_state_dict(model.state_dict(), strict=False)
        assert torch.equal(other(ids).logits, wanted) == same, fields


@pytest.mark.parametrize(("source", "rounds"), [("residual", 2), ("input", 3)])
@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_it_starts_as_the_model_without_it(backbone: str, source: str, rounds: int) -> None:
    """The later value projections start at zero; they learn first, and a step later all the rest does."""
    torch.manual_seed(0)
    model = build(backbone, gradient_boosting_source=source, boosting_steps=rounds)
    plain = build(backbone, "softmax")
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model.eval()(given(backbone)).logits, plain.eval()(given(backbone)).logits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(given(backbone)).logits.sin().sum().backward()
        for attention in attentions_of(model, backbone):
            later = {name: value for name, value in attention.filter.named_parameters() if "gradient_boost" in name}
            assert len(later) == 8 * (rounds - 1)
            for name, parameter in later.items():
                if not name.endswith("key.bias"):
                    assert (parameter.grad.abs().max() > 0) == (step == 1 or ".value." in name), name
        optimizer.step()


def test_initialisation_does_not_touch_loaded_weights(tmp_path: Any) -> None:
    model = sharpen_(build("gpt2"))
    model.save_pretrained(tmp_path)
    again = ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)
    value = again.transformer.h[1].attn.filter.gradient_boosting.value
    assert value.weight.abs().max() > 0
    assert torch.equal(again(token_ids()).logits, model.eval()(token_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "widths"),
    [
        ({}, [5, 5]),
        ({"position_kernel": "untied"}, [10, 5]),
        ({"content_kernel": "elliptical"}, [5, 5, 5, 5]),
        ({"boosting_steps": 3}, [5, 5, 5, 5]),
        ({"gradient_boosting_source": "input"}, [5, 5]),
        ({"boosting_steps": 3, "gradient_boosting_source": "input", "content_kernel": "elliptical"}, [5] * 7),
    ],
    ids=["plain", "with positions", "with the metric's rows", "three rounds", "of the input", "all of it"],
)
def test_the_cache_holds_keys_and_values_of_every_round(fields: dict[str, Any], widths: list[int]) -> None:
    """As streams of the layer, behind the first metric's rows and before the round's own, of the queries' heads."""
    model = sharpen_(build("gpt2", **fields)).eval().double()
    cache = DynamicCache(config=model.config)
    parts = [
        model(token_ids()[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in ((0, 4), (4, 5), (5, 9))
    ]
    layer = cache.layers[1]
    assert [rows.shape for rows in layer.streams.values()] == [torch.Size((2, 4, 9, width)) for width in widths]
    assert set(model.transformer.h[1].attn.filter.stream_names) == set(layer.streams)
    torch.testing.assert_close(torch.cat(parts, 1), model(token_ids(), use_cache=False).logits, **TIGHT)
    # Taking tokens back takes them back from the second attention too.
    cache.crop(-4)
    assert {rows.shape[-2] for rows in layer.streams.values()} == {5}
    again = model(token_ids()[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, parts[2], **TIGHT)


@torch.no_grad()
def test_attentions_with_a_cache_are_those_of_the_new_tokens() -> None:
    """Both maps are plain filters: unlike a boosted operator's, their rows need no other rows."""
    model = sharpen_(build("gpt2", implementation="eager")).eval().double()
    whole = model(token_ids(), output_attentions=True, use_cache=False).attentions
    cache = model(token_ids()[:, :6], use_cache=True).past_key_values
    rest = model(token_ids()[:, 6:], past_key_values=cache, output_attentions=True).attentions
    for full, new in zip(whole, rest, strict=True):
        assert new.shape == (2, 2, 4, 3, 9)
        torch.testing.assert_close(new, full[..., 6:, :], **TIGHT)


def test_each_attention_draws_a_mask_of_its_own() -> None:
    model = sharpen_(build("gpt2", implementation="eager", attn_pdrop=0.5)).train()
    torch.manual_seed(0)
    maps = model(token_ids(), output_attentions=True, use_cache=False).attentions[0]
    dropped = maps.tril() == 0
    assert (dropped[:, 0] != dropped[:, 1]).any()
    assert not model.transformer.h[0].attn.filter.gradient_boosting.value.weight.eq(0).all()


def test_heads_must_fill_the_hidden_size() -> None:
    with pytest.raises(ValueError, match=r"must be hidden_size = 20, got 4 \* 6"):
        GradientBoosting(20, 4, 6)


def test_each_round_has_streams_of_its_own() -> None:
    """In the same cache layer, under names that the other rounds do not use."""
    cache = DynamicCache(config=build("gpt2").config)
    first = CachedStreams(cache, 0)
    zeros, ones = torch.zeros(1, 4, 2, 5), torch.ones(1, 4, 2, 5)
    first.update(zeros, zeros)
    first.append("metric", zeros)
    later = first.of_round(1)
    key, value = later.update(zeros, ones)
    later.append("metric", ones)
    later.of_round(2).update(ones, zeros)
    names = {"metric", "round.1.key", "round.1.value", "round.1.metric", "round.2.key", "round.2.value"}
    assert set(cache.layers[0].streams) == names
    assert torch.equal(key, zeros)
    assert torch.equal(value, ones)
    assert torch.equal(first.past("metric"), zeros)
    assert torch.equal(first.of_round(1).past("metric"), ones)
    assert first.of_round(2).past("metric") is None
    assert torch.equal(first.of_round(2).past("key"), ones)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_half_precision_is_near_float64(backbone: str, dtype: torch.dtype) -> None:
    model = sharpen_(build(backbone), std=1.0).to(dtype)
    got = model(given(backbone).to(dtype) if backbone == "vit" else given(backbone)).logits.double()
    exact = model.double()(given(backbone).to(dtype).double() if backbone == "vit" else given(backbone)).logits
    error = (got - exact).square().mean().sqrt() / exact.std()
    assert error < (0.06 if dtype == torch.bfloat16 else 0.01)
