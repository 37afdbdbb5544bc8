"""Boosters that cost one pass, inversion and exclusive attention, and the gate: formulas, back-ends, starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn import apply_filter, filter_attention
from hf_imgproc_attn.models import boost_exclusive
from hf_imgproc_attn.models.backend_table import BACKENDS, run_filter
from hf_imgproc_attn.models.boost_exclusive import exclusive_by_parts
from hf_imgproc_attn.models.boost_gate import OutputGate, TokenGains, gated
from tests.models.helpers import filter_call, make_filter, tiny_gpt2_config
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, token_ids

ONE_PASS = ("inversion", "dynamic_inversion", "exclusive")
NEVER_CHECKED = ("triton", "flex")  # they need another machine, or have no gradient here; they compute A V alone


def build(boosting: str, **fields: Any) -> Any:
    return make_filter("dot_product", "none", boosting, **fields)


def inputs_with_tokens(boosting: str) -> dict[str, torch.Tensor]:
    hidden = random(BATCH, LENGTH, HEADS * WIDTH, seed=11)
    return tensors("none") | ({"hidden_states": hidden} if boosting == "dynamic_inversion" else {})


def by_hand(layer: Any, inputs: dict[str, torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    """Token by token, head by head, of A."""
    expected = torch.zeros(BATCH, HEADS, LENGTH, WIDTH, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(BATCH) for h in range(HEADS) for i in range(LENGTH)):
        if not matrix[b, h, i].any():
            continue
        own, smooth = inputs["value"][b, h, i], matrix[b, h, i] @ inputs["value"][b, h]
        if layer.spec.boosting == "exclusive":
            expected[b, h, i] = smooth - own * (smooth @ own) / (own @ own)
            continue
        if layer.spec.boosting == "inversion":
            alpha, beta = layer.scalar_bias.inversion_gains[h]
        else:
            change = layer.token_gains.weight @ inputs["hidden_states"][b, i] + layer.token_gains.bias
            alpha, beta = 1 + change[h], change[HEADS + h]
        expected[b, h, i] = alpha * smooth + beta * (own - smooth)
    return expected


@pytest.mark.parametrize("mask", ["none", "causal", "left", "dense"])
@pytest.mark.parametrize("boosting", ONE_PASS)
def test_every_back_end_is_the_formula(boosting: str, mask: str) -> None:
    """Outputs by hand, and every gradient by the dense form; rows that see no key give 0."""
    layer, inputs, options = build(boosting), inputs_with_tokens(boosting), masks()[mask]
    attentions = {"need_weights": True} if boosting == "exclusive" else {}
    dense = run(layer, inputs, "eager", **options, **attentions)
    plain = {name: tensor for name, tensor in inputs.items() if name != "hidden_states"}
    matrix = run(build("none"), plain, "eager", need_weights=True, **options)["weights"]
    matrix = dense.pop("weights", matrix)  # of exclusive attention it is A that is returned
    layer_matrix = torch.softmax(_logits(layer, inputs, matrix), -1).nan_to_num(0.0) * (matrix != 0)
    layer_matrix = layer_matrix / layer_matrix.sum(-1, keepdim=True).clamp(min=1e-300)
    with torch.no_grad():
        torch.testing.assert_close(dense["output"], by_hand(layer, inputs, layer_matrix), **TIGHT)
    for backend in BACKENDS:
        if backend not in NEVER_CHECKED:
            assert_same(run(layer, inputs, "sdpa", backend=backend, **options), dense)


def _logits(layer: Any, inputs: dict[str, torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    scale = 2 * torch.exp(-2 * layer.scalar_bias.content_log_bandwidth.detach()).view(-1, 1, 1)
    logits = inputs["query"] @ inputs["key"].mT * scale
    return logits.masked_fill(matrix == 0, float("-inf"))


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["inversion", "dynamic_inversion"])
def test_the_operator_multiplies_the_values(boosting: str) -> None:
    layer, inputs = build(boosting), inputs_with_tokens(boosting)
    output, operator = layer(**inputs, implementation="eager", need_weights=True, **masks()["left"])
    torch.testing.assert_close(operator @ inputs["value"], output, **TIGHT)


@torch.no_grad()
def test_inversion_with_one_and_one_is_the_identity() -> None:
    """alpha = beta = 1: what the filter passes and what it removes."""
    query, key, value = (random(1, 2, 9, 5, seed=seed) for seed in range(3))
    ones = torch.ones(2, 2, 1, 1, dtype=torch.float64)
    for backend in ("reference", "sdpa", "blocked"):
        call = filter_call(query, key, value, boosting="inversion", boosting_gain=ones)
        torch.testing.assert_close(run_filter(call, backend), value, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_exclusive_output_is_orthogonal_to_the_own_value(size: float) -> None:
    """Whatever its length; where it is 0, nothing is taken away."""
    query, key, value = (random(1, 2, 9, 5, seed=seed).float() for seed in range(3))
    value = value * size
    value[:, :, 4] = 0
    plain = filter_attention(query, key, value)
    for backend in ("reference", "sdpa", "blocked"):
        output = filter_attention(query, key, value, boosting="exclusive", backend=backend)
        cosine = torch.cosine_similarity(output / size, value / size, dim=-1)
        assert cosine.abs().max() < 1e-5
        torch.testing.assert_close(output[:, :, 4], plain[:, :, 4])
        assert (output - plain).abs().max() > 0.1 * size


def test_exclusive_by_parts_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, gradients and their gradients, of rows that are worked on in parts, one of them with a value of 0."""
    monkeypatch.setattr(boost_exclusive, "ROWS_NUMBERS", 20)
    query, key, value = leaves = [random(3, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3)]
    with torch.no_grad():
        value[1, 0, 2] = 0.0
    upstream, call = random(3, 2, 5, 4, seed=4), filter_call(query, key, value, boosting="exclusive", is_causal=True)
    found = {}
    for least in (0, 10**9):
        monkeypatch.setattr(boost_exclusive, "LEAST_NUMBERS", least)
        output = run_filter(call, "blocked")
        gradients = torch.autograd.grad(output, leaves, upstream, create_graph=True)
        assert ("ExclusiveRows" in str(output.grad_fn)) == (least == 0)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves[:2])
        found[least] = (
            output,
            *torch.autograd.grad(run_filter(call, "blocked"), leaves, upstream),
            *gradients,
            *second,
        )
    for got, expected in zip(found[0], found[10**9], strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("size", [1e-25, 1e25, float("nan")])
def test_exclusive_by_parts_leaves_values_of_extreme_length_to_the_formula(
    monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    monkeypatch.setattr(boost_exclusive, "LEAST_NUMBERS", 0)
    smooth, value = (random(1, 2, 3, 4, seed=seed).float() for seed in range(2))
    assert exclusive_by_parts(smooth, value) is not None
    value[0, 1, 2] *= size
    assert exclusive_by_parts(smooth, value) is None


@pytest.mark.parametrize("kind", ["heads", "tokens", "gate"])
def test_inversion_and_gate_by_parts_are_the_formulas(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, gradients and their gradients, of rows that are worked on in parts and stand in another order."""
    monkeypatch.setattr(boost_exclusive, "ROWS_NUMBERS", 20)
    smooth = random(3, 5, 2, 4, seed=0).transpose(1, 2).requires_grad_()
    value = random(3, 2, 5, 4, seed=1).requires_grad_()
    gain = random(2, *((3, 2, 5, 1) if kind == "tokens" else (2, 1, 1)), seed=2).requires_grad_()
    leaves, upstream = [smooth, value] + ([] if kind == "gate" else [gain]), random(3, 2, 5, 4, seed=4)
    found = {}
    for least in (0, 10**9):
        monkeypatch.setattr(boost_exclusive, "LEAST_NUMBERS", least)
        if kind == "gate":
            output = gated(smooth, value)
        else:
            name = "inversion" if kind == "heads" else "dynamic_inversion"
            call = filter_call(value, value, value, boosting=name, boosting_gain=gain)
            output = call.finish(smooth)
        assert ("Rows" in str(output.grad_fn)) == (least == 0)
        gradients = torch.autograd.grad(output, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, retain_graph=True)
        found[least] = (output, *torch.autograd.grad(output, leaves, upstream), *gradients, *second)
    for got, expected in zip(found[0], found[10**9], strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("boosting", ONE_PASS)
def test_what_stands_at_padding_has_no_influence(boosting: str) -> None:
    """NaN in values that no query sees reaches no gradient."""
    layer, inputs = build(boosting), inputs_with_tokens(boosting)
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("query", "key", "value"):
        poisoned[name][0, :, :4] = float("nan")
    upstream = random(BATCH, HEADS, LENGTH, WIDTH, seed=9)
    upstream[0, :, :4] = 0
    expected = run(layer, inputs, "sdpa", upstream, **masks()["left"])
    for backend in ("reference", "sdpa", "blocked"):
        got = run(layer, poisoned, "sdpa", upstream, backend=backend, **masks()["left"])
        assert_same(
            {name: tensor for name, tensor in got.items() if name.startswith("d ")},
            {name: tensor for name, tensor in expected.items() if name.startswith("d ")},
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_gains_near_one(dtype: torch.dtype) -> None:
    """beta = 2^-9 is below half precision's steps at 1, and must act all the same."""
    query, key, value = (random(1, 2, 9, 8, seed=seed).to(dtype) for seed in range(3))
    gain = torch.tensor([1.0, 2.0**-9]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    wide = [x.double() for x in (query, key, value)]
    expected = run_filter(filter_call(*wide, boosting="inversion", boosting_gain=gain.double()), "reference")
    for backend in ("reference", "blocked"):
        output = run_filter(filter_call(query, key, value, boosting="inversion", boosting_gain=gain), backend)
        assert (output.double() - expected).abs().max() < 1.5 * torch.finfo(dtype).eps * expected.abs().max()


# --------------------------------------------------------------------------------------------------------------------
# The gate, and where all of them start
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_the_gate_is_the_formula(kind: str) -> None:
    gate = OutputGate(kind, 7, HEADS, WIDTH).double()
    hidden, output = random(BATCH, LENGTH, 7), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    gated = gate(hidden, output)
    for h in range(HEADS):
        rows = gate.projection.weight.view(HEADS, -1, 7)[h]
        expected = output[1, h, 3] * 2 / (1 + torch.exp(-(rows @ hidden[1, 3])))
        torch.testing.assert_close(gated[1, h, 3], expected, **TIGHT)
    assert rows.shape[0] == (1 if kind == "headwise" else WIDTH)


@torch.no_grad()
def test_token_gains_start_at_one_and_zero() -> None:
    gains = TokenGains(7, HEADS)
    alpha, beta = gains(torch.randn(BATCH, LENGTH, 7))
    assert alpha.shape == (BATCH, HEADS, LENGTH, 1)
    assert bool((alpha == 1).all())
    assert bool((beta == 0).all())


@torch.no_grad()
@pytest.mark.parametrize("preset", ["inversion", "dynamic_inversion"])
def test_a_new_model_starts_as_the_one_without(preset: str) -> None:
    from hf_imgproc_attn import ImgProcGPT2LMHeadModel

    torch.manual_seed(0)
    model = ImgProcGPT2LMHeadModel(gpt2_config(preset)).double().eval()
    plain = ImgProcGPT2LMHeadModel(gpt2_config("softmax")).double().eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".filter." in name for name in unexpected)
    torch.testing.assert_close(model(token_ids()).logits, plain(token_ids()).logits, rtol=0, atol=1e-12)


def test_what_needs_a_projection_is_refused_for_other_models() -> None:
    from transformers import GPT2LMHeadModel

    stock = GPT2LMHeadModel(type(tiny_gpt2_config()).__mro__[2](n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    with pytest.raises(ValueError, match="boosting='dynamic_inversion' is not for layers of another model"):
        apply_filter(stock, "dynamic_inversion")
    with pytest.raises(ValueError, match="gate='elementwise' is not for layers of another model"):
        apply_filter(stock, "gated")
