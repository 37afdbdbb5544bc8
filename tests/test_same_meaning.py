"""The same call means the same on every back-end: hidden places, extreme masks and scales, empty calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn import filter_attention
from hf_imgproc_attn.models import backend_table
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import choose_backend
from hf_imgproc_attn.models.visibility import attention_visibility, model_visibility

BACKENDS = ("reference", "sdpa", "blocked", "chunked", "flex", "auto")
BATCH, HEADS, LENGTH, WIDTH = 2, 3, 11, 8
EXACT = {"rtol": 0, "atol": 1e-11}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(length: int = LENGTH, value_width: int = WIDTH) -> list[torch.Tensor]:
    widths = (WIDTH, WIDTH, value_width)
    return [random(BATCH, HEADS, length, width, seed=seed) for seed, width in enumerate(widths)]


def filtered(backend: str, *given: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():  # FlexAttention has no backward pass on the CPU
        return filter_attention(*given, backend=backend, **options)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, steps: int
) -> torch.Tensor:
    """(I - (I - A)^steps) V written out; rows that see nothing are 0."""
    logits = (query @ key.mT / WIDTH**0.5).masked_fill(~allowed, float("-inf"))
    matrix = logits.softmax(-1).nan_to_num(0.0)
    out, rest = torch.zeros_like(matrix @ value), value
    for _ in range(steps):
        smooth = matrix @ rest
        out, rest = out + smooth, rest - smooth
    return out


# --------------------------------------------------------------------------------------------------------------------
# Widths
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_width", [3, 8, 19])
@pytest.mark.parametrize(("boosting", "steps"), [("none", 1), ("twicing", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_any_width(backend: str, boosting: str, steps: int, value_width: int) -> None:
    given = tensors(value_width=value_width)
    expected = dense(*given, torch.ones(LENGTH, LENGTH, dtype=torch.bool), steps)
    torch.testing.assert_close(filtered(backend, *given, boosting=boosting), expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
def test_gradients_of_wide_values(backend: str) -> None:
    expected = None
    for name in ("reference", backend):
        leaves = [x.requires_grad_() for x in tensors(value_width=19)]
        out = filter_attention(*leaves, boosting="twicing", is_causal=True, backend=name)
        gradients = torch.autograd.grad(out, leaves, random(*out.shape, seed=5))
        expected = expected or gradients
    torch.testing.assert_close(gradients, expected, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# What stands in hidden places
# --------------------------------------------------------------------------------------------------------------------


def hiding_masks() -> dict[str, torch.Tensor]:
    """Boolean masks that hide the key 4 from every query, in three forms."""
    keys = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    keys[..., 4] = False
    square = keys & (random(BATCH, 1, LENGTH, LENGTH, seed=9) > -1).logical_or(torch.eye(LENGTH, dtype=torch.bool))
    return {"keys": keys, "square": square, "causal": keys & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("mask", hiding_masks())
@pytest.mark.parametrize(("boosting", "steps"), [("none", 1), ("twicing", 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_key_may_hold_anything(
    backend: str, boosting: str, steps: int, mask: str, where: str, poison: float
) -> None:
    allowed = hiding_masks()[mask]
    given = tensors()
    expected = dense(*given, allowed, steps)
    given[1 if where == "key" else 2][:, :, 4] = poison
    options = {"attn_mask": allowed, "boosting": boosting, "boosting_steps": steps}
    torch.testing.assert_close(filtered(backend, *given, **options), expected, **EXACT)


@pytest.mark.parametrize(("boosting", "steps"), [("none", 1), ("twicing", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_may_hold_anything(backend: str, boosting: str, steps: int) -> None:
    """Left padding: the first token sees nothing, and nobody sees it."""
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].clone()
    allowed[..., 0] = False
    given = tensors()
    expected = dense(*given, allowed, steps)
    for tensor in given:
        tensor[:, :, 0] = float("nan")
    options = {"attn_mask": allowed, "boosting": boosting, "boosting_steps": steps}
    torch.testing.assert_close(filtered(backend, *given, **options), expected, **EXACT)


def poisoned_call(kind: str, poison: float | None = None) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Leaves and options of a call; query 3 sees nothing, nobody sees key 5, and both hold ``poison``."""
    allowed = (random(1, 1, LENGTH, LENGTH, seed=9) > -0.5).logical_or(torch.eye(LENGTH, dtype=torch.bool))
    allowed[..., 3, :], allowed[..., 5] = False, False
    leaves = dict(zip(("query", "key", "value"), tensors(), strict=True))
    mask = allowed
    if kind == "additive mask":
        mask = random(1, 1, LENGTH, LENGTH, seed=6).masked_fill(~allowed, float("-inf"))
    elif kind == "features":
        leaves |= {f"{name}_features": random(1, 1, LENGTH, 3, seed=7) for name in ("query", "key")}
    elif kind == "bias":
        leaves["position_bias"] = random(1, HEADS, LENGTH, LENGTH, seed=7)
    if poison is not None:
        for name, leaf in leaves.items():
            if name == "position_bias":
                leaf.masked_fill_(~allowed, poison)
            else:
                leaf[..., 3 if name.startswith("query") else 5, :] = poison
    for leaf in leaves.values():
        leaf.requires_grad_()
    return list(leaves.values()), {**leaves, "attn_mask": mask}


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_row_sees_and_is_not_a_number_shows(backend: str, boosting: str, where: str) -> None:
    given = tensors()
    given[("query", "key", "value").index(where)][:, :, 4] = float("nan")
    rows = filtered(backend, *given, is_causal=True, boosting=boosting).isnan().all(-1)
    assert rows[:, :, 4 : 5 if where == "query" else None].all()


@pytest.mark.parametrize("kind", ["boolean mask", "additive mask", "features", "bias"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
def test_what_stands_in_hidden_places_has_no_gradient(backend: str, boosting: str, poison: float, kind: str) -> None:
    gradients = []
    for given, name in ((None, "reference"), (poison, backend)):
        leaves, options = poisoned_call(kind, given)
        out = filter_attention(boosting=boosting, backend=name, **options)
        gradients.append(torch.autograd.grad(out.sin().sum(), leaves))
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_of_hidden_keys_have_no_influence(backend: str, boosting: str, kv_heads: int) -> None:
    query, key, value = tensors()
    key, value = key[:, :kv_heads], value[:, :kv_heads]
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[..., 3] = False
    columns, clean = random(1, 1, LENGTH, 2, seed=7), random(1, 1, LENGTH, 2, seed=8)
    poisoned = clean.clone()
    poisoned[:, :, 3] = float("nan")
    options: dict[str, Any] = {"attn_mask": mask, "boosting": boosting, "query_features": columns, "enable_gqa": True}
    got, expected = (
        filtered(backend, query, key, value, key_features=features, **options) for features in (poisoned, clean)
    )
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_an_additive_mask_shows(backend: str, boosting: str) -> None:
    mask = random(LENGTH, LENGTH, seed=7)
    mask[2, 3] = float("nan")
    assert filtered(backend, *tensors(), attn_mask=mask, boosting=boosting)[:, :, 2].isnan().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_hides(backend: str, boosting: str, masked: bool) -> None:
    """As in a mask: one key, and all keys of a query, whose output is 0."""
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    allowed[3, 5], allowed[6] = False, False
    bias = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    options = {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()} if masked else {}
    given = tensors()
    got = filtered(backend, *given, position_bias=bias, boosting=boosting, **options)
    expected = dense(*given, allowed.tril() if masked else allowed, 2 if boosting == "twicing" else 1)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_mask_hides_what_the_logits_cannot_hold(backend: str, dtype: torch.dtype) -> None:
    """-1e300 in a float64 mask is beyond float32: it hides the key, and a row of nothing else gives 0."""
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    allowed[:, 2] = False
    allowed[5] = False
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~allowed, -1e300)
    given = tensors()
    got = filtered(backend, *(x.to(dtype) for x in given), attn_mask=mask).double()
    expected = dense(*(x.to(dtype).double() for x in given), allowed, 1)
    assert (got - expected).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-6)
    assert (got[:, :, 5] == 0).all()


@pytest.mark.parametrize("kind", ["mask", "bias", "mask and bias", "keys", "causal"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, -1e300), (torch.float32, -1e30), (torch.float32, 1e30)])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_for_a_whole_row_changes_nothing(
    backend: str, boosting: str, dtype: torch.dtype, size: float, kind: str
) -> None:
    """A softmax does not notice what is added to a whole row, however large: the products keep their digits."""
    given = tensors()
    small = random(1, 1, LENGTH, LENGTH, seed=6).to(dtype)
    allowed = (random(1, 1, LENGTH, LENGTH, seed=9) > -0.5).logical_or(torch.eye(LENGTH, dtype=torch.bool))
    shifted, options = small.clone(), {}
    shifted[:, :, 4:] = size
    shifted[:, :, 7] = 0.0
    meant = small.clone()
    meant[:, :, 4:] = 0.0
    if kind == "mask":
        options["attn_mask"] = shifted.masked_fill(~allowed, float("-inf"))
    elif kind == "bias":
        options |= {"position_bias": shifted, "attn_mask": allowed}
    elif kind == "mask and bias":  # one row of numbers, half of it in the mask and half in the bias
        left = torch.arange(LENGTH) < 5
        options["position_bias"] = shifted.masked_fill(left, 0.0)
        options["attn_mask"] = shifted.masked_fill(~left, 0.0).masked_fill(~allowed, float("-inf"))
    elif kind == "keys":  # for all queries alike
        options |= {"position_bias": torch.full((1, 1, 1, LENGTH), size, dtype=dtype), "attn_mask": allowed}
        meant = torch.zeros(1)
    else:  # what the first queries see is far below what comes later
        row = torch.zeros(LENGTH, dtype=dtype)
        row[:6] = -abs(size)
        options |= {"position_bias": row.view(1, 1, 1, -1), "is_causal": True}
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        meant = torch.where(torch.arange(LENGTH)[:, None] < 6, 0.0, row)
    logits = (given[0] @ given[1].mT / WIDTH**0.5 + meant.double()).masked_fill(~allowed, float("-inf"))
    matrix = logits.softmax(-1)
    expected = matrix @ given[2]
    if boosting == "twicing":
        expected = 2 * expected - matrix @ expected
    got = filtered(backend, *(x.to(dtype) for x in given), boosting=boosting, **options)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-11 if dtype == torch.float64 else 5e-6)


# --------------------------------------------------------------------------------------------------------------------
# Scales
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -0.4, 1e-30])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend: str, features: bool, scale: float) -> None:
    """Zero and negative scales beside causality, and a scale so small that features cannot be divided by it."""
    query, key, value = tensors()
    logits, named = query @ key.mT * scale, {}
    if features:
        named = {
            "query_features": random(1, HEADS, LENGTH, 2, seed=3),
            "key_features": random(1, 1, LENGTH, 2, seed=4),
        }
        logits = logits + named["query_features"] @ named["key_features"].mT
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(future, float("-inf")).softmax(-1) @ value
    got = filtered(backend, query, key, value, scale=scale, is_causal=True, **named)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("length", [11, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_keep_their_digits_beside_half_precision(backend: str, length: int, autocast: bool) -> None:
    """Columns of a Gaussian with h = 4 in float32: rounded to bfloat16 they would be wrong by 0.4 of 2.6."""
    query, key, value = (0.1 * x for x in tensors(length))
    places = torch.arange(length, dtype=torch.float64) - length // 2
    ones = torch.ones_like(places)
    columns = torch.stack((2 * places / 16, -ones / 16), -1), torch.stack((places, places.square()), -1)
    named = dict(zip(("query_features", "key_features"), (x.float()[None, None] for x in columns), strict=True))
    half = [x.bfloat16() for x in (query, key, value)]
    logits = half[0].double() @ half[1].double().mT / WIDTH**0.5 - (places[:, None] - places).square() / 16
    expected = logits.softmax(-1) @ half[2].double()
    given = [x.float() for x in half] if autocast else half
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = filtered(backend, *given, **named).double()
    assert (got - expected).abs().max() < 0.01 * expected.abs().max()


# --------------------------------------------------------------------------------------------------------------------
# Nothing to do
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("boosting", ["none", "twicing", "learned"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_calls(backend: str, boosting: str, batch: int, length: int) -> None:
    """No sample, or no query: an empty output of the right shape (boosted, there are as few keys)."""
    key_length = 5 if boosting == "none" else max(length, 1)
    if boosting != "none" and not length:
        return
    query = torch.zeros(batch, HEADS, length, WIDTH)
    key, value = torch.zeros(batch, HEADS, key_length, WIDTH), torch.zeros(batch, HEADS, key_length, 6)
    assert filtered(backend, query, key, value, boosting=boosting).shape == (batch, HEADS, length, 6)


@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
def test_the_meta_device(backend: str, boosting: str, mask: bool) -> None:
    """Shapes without numbers, as tools that plan memory use them."""
    given = [x.to("meta") for x in tensors(value_width=5)]
    options = {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="meta")} if mask else {}
    out = filter_attention(*given, boosting=boosting, backend=backend, **options)
    assert out.shape == (BATCH, HEADS, LENGTH, 5)
    assert out.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("boosting", ["learned", "diffusion", "sos", "twicing"])
def test_one_step(backend: str, boosting: str) -> None:
    """One step of a stepped booster is A; ``learned`` has no steps."""
    given = tensors()
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    expected = dense(*given, allowed, 2 if boosting == "learned" else 1)
    got = filtered(backend, *given, boosting=boosting, boosting_steps=1)
    torch.testing.assert_close(got, expected, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# What is hidden decides, not which argument says so
# --------------------------------------------------------------------------------------------------------------------


def call_with(length: int, **mask: Any) -> FilterCall:
    query = torch.zeros(2, 1, length, 4)
    visibility = attention_visibility(
        mask.get("attn_mask"), shape=(2, 1, length, length), causal=mask.get("causal", False)
    )
    return FilterCall(query, query, query, Content("dot_product", 0.5), visibility, booster=Booster("twicing"))


def test_causality_is_seen_in_a_mask() -> None:
    length = 1100
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    padded = triangle.expand(2, 1, -1, -1).clone()
    padded[0, ..., :3] = False
    low = torch.finfo(torch.float32).min
    for mask in (triangle, padded, torch.zeros(padded.shape).masked_fill(~padded, low)):
        call = call_with(length, attn_mask=mask)
        assert call.visibility.causal
        assert choose_backend(call) == choose_backend(call_with(length, causal=True)) == "blocked"
    assert choose_backend(call_with(length, attn_mask=padded.mT)) == "sdpa"


def test_padding_keeps_a_model_causal() -> None:
    """One padded row must not change the algorithm of the whole batch."""
    mask = torch.ones(2, 1100, dtype=torch.int64)
    mask[0, :5] = 0
    seen = model_visibility(mask, None, length=1100, key_length=1100, causal=True)
    assert (seen.causal, seen.mask) == (True, None)
    query = torch.zeros(2, 1, 1100, 4)
    call = FilterCall(query, query, query, Content("dot_product", 0.5), seen, booster=Booster("twicing"))
    assert choose_backend(call) == "blocked"


def test_every_backend_is_tested_here() -> None:
    assert set(BACKENDS) | {"triton"} >= set(backend_table.BACKENDS)
