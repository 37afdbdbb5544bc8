"""Blocked attention against the dense reference: outputs, every gradient, memory.

Blocks of 8 rows and groups of 2 pairs, so that a few dozen tokens cross several of both.
"""

from __future__ import annotations

import itertools
import re
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_imgproc_attn.models.backend_blocked_dense import dense_dropout_factors
from hf_imgproc_attn.models.backend_blocked_passes import recurrence
from hf_imgproc_attn.models.backend_blocked_plan import make_plan
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_operators import BOOSTING, extra_streams
from hf_imgproc_attn.models.kernel_position import BlockedPositions, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from tests.models.helpers import (
    RecordedStreams,
    blocked_filter,
    dense_attention,
    dense_matrix,
    dropout_seed,
    filter_call,
)

BATCH, HEADS, WIDTH, VALUE_WIDTH, SCALE = 2, 3, 5, 4, 0.6
SMALL = {"block_rows": 8, "group_pairs": 2}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(
    length: int, key_length: int | None = None, heads: int = HEADS, key_heads: int | None = None, batch: int = BATCH
) -> list[torch.Tensor]:
    """Query, key and value with logits of std 2 to 3."""
    key_length, key_heads = key_length or length, key_heads or heads
    return [
        2 * random(batch, heads, length, WIDTH, seed=0),
        random(batch, key_heads, key_length, WIDTH, seed=1),
        random(batch, key_heads, key_length, VALUE_WIDTH, seed=2),
    ]


def make_mask(kind: str, length: int, key_length: int) -> torch.Tensor | None:
    """Masks of every form; the full ones have rows that see nothing."""
    shape = {"padding": (BATCH, 1, 1, key_length), "full": (BATCH, HEADS, length, key_length)}
    shape |= {"float": (1, 1, length, key_length), "shared": (length, key_length)}
    if kind == "none":
        return None
    seen = random(*shape[kind], seed=7) > -0.5
    if kind == "padding":
        seen[0, ..., :2] = False
    elif kind == "full":
        seen[1, 2, length // 2] = False
    if kind != "float":
        return seen
    hidden = torch.where(random(*seen.shape, seed=9) > 0, torch.finfo(torch.float32).min, float("-inf"))
    return torch.where(seen, random(*seen.shape, seed=8), hidden).float()


def dense(
    tensors: list[torch.Tensor],
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    boosting: str = "twicing",
    steps: int = 2,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same with a dense A, multiplied by ``factors`` (dropout), and the booster's streams."""
    query, key, value, *bias = tensors
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.mT * SCALE
    matrix = dense_matrix(logits + bias[0] if bias else logits, attention_mask, is_causal)
    matrix = matrix if factors is None else matrix * factors
    streams = []

    def extend(index: int, rows: torch.Tensor) -> torch.Tensor:
        streams.append(rows)
        return rows

    return BOOSTING[boosting](lambda stream: matrix @ stream, extend, value, value, steps), streams


def compare(tensors: list[torch.Tensor], *, dropout: float = 0.0, **options: Any) -> None:
    """Output, streams and the gradients of a sum over all of them."""
    blocked, plain = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    bias = blocked[3] if len(blocked) > 3 else None
    cutting = {name: options.pop(name) for name in tuple(options) if name in SMALL}
    output, streams = blocked_filter(
        *blocked[:3], bias=bias, scale=SCALE, dropout=dropout, seed=5, **options, **cutting
    )
    factors = None
    if dropout:
        causal = options.get("is_causal", False)
        one_pass = causal or options.get("steps", 2) == 1
        chosen = {"scale": SCALE, "dropout": dropout, "seed": dropout_seed(5), "one_pass": one_pass, **cutting}
        factors = dense_dropout_factors(make_plan(*tensors[:2], is_causal=causal, **chosen), tensors[0])
        assert 0.2 < float((factors == 0).double().mean()) < 0.9
    expected, expected_streams = dense(plain, factors=factors, **options)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(streams, expected_streams, **EXACT)
    results = [(output, expected), *zip(streams, expected_streams, strict=True)]
    directions = [random(*output.shape, seed=20 + index) for index in range(len(results))]
    # Streams are outputs too; the output alone must do without their gradients.
    for used in (1, len(results)):
        ours, theirs = (
            torch.autograd.grad([pair[side] for pair in results[:used]], leaves, directions[:used], retain_graph=True)
            for side, leaves in enumerate((blocked, plain))
        )
        torch.testing.assert_close(ours, theirs, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Agreement in float64
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 29])
def test_lengths_around_the_edges_of_blocks(length: int, steps: int, is_causal: bool) -> None:
    compare(inputs(length), is_causal=is_causal, steps=steps, **SMALL)


@pytest.mark.parametrize("mask", ["padding", "full", "float", "shared"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cutting", [SMALL, {}, {"group_pairs": 4}], ids=["small", "whole", "samples"])
def test_masks(mask: str, is_causal: bool, cutting: dict[str, int]) -> None:
    compare(inputs(19), attention_mask=make_mask(mask, 19, 19), is_causal=is_causal, steps=3, **cutting)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 13, 13), (1, HEADS, 13, 13), (1, 1, 13, 13), (1, HEADS, 1, 13)])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("mask", ["none", "float"])
def test_bias_and_its_gradient(shape: tuple[int, ...], is_causal: bool, mask: str) -> None:
    tensors = [*inputs(13), random(*shape, seed=3)]
    compare(tensors, is_causal=is_causal, attention_mask=make_mask(mask, 13, 13), **SMALL)


@pytest.mark.parametrize("pairs", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_grouped_query_heads(pairs: int, is_causal: bool) -> None:
    compare(inputs(11, heads=6, key_heads=2), is_causal=is_causal, block_rows=4, group_pairs=pairs)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cutting", [SMALL, {}], ids=["small", "whole"])
def test_dropout_is_one_mask_for_all_products(steps: int, is_causal: bool, cutting: dict[str, int]) -> None:
    compare(inputs(17), is_causal=is_causal, steps=steps, dropout=0.3, **cutting)


def test_dropout_follows_the_seed() -> None:
    tensors = inputs(17)

    def run(seed: int | None) -> torch.Tensor:
        return blocked_filter(*tensors, dropout=0.5, seed=seed, **SMALL)[0]

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(3)
    first, second = run(None), run(None)
    torch.manual_seed(3)
    torch.testing.assert_close(run(None), first, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean() -> None:
    """Averaged over seeds, A with dropout is A."""
    tensors = inputs(9)
    expected = dense(tensors, steps=1)[0]
    runs = [blocked_filter(*tensors, scale=SCALE, dropout=0.25, steps=1, seed=seed)[0] for seed in range(800)]
    torch.testing.assert_close(torch.stack(runs).mean(0), expected, rtol=0, atol=0.12)


@pytest.mark.parametrize("name", sorted(BOOSTING))
def test_every_booster_of_the_table(name: str) -> None:
    """Coefficients are read off the booster itself, so that there is one definition."""
    compare(inputs(11), boosting=name, steps=3, is_causal=True, **SMALL)
    compare(inputs(11), boosting=name, steps=3, **SMALL)


def test_coefficients_of_twicing() -> None:
    assert recurrence("none", 4) == (((1, 0, 0, 0, 0),), (0, 1, 0, 0, 0))
    assert recurrence("twicing", 3) == (((1, 0, 0, 0), (1, -1, 0, 0), (1, -1, -1, 0)), (0, 1, 1, 1))


def test_fewer_keys_than_queries_without_boosting() -> None:
    compare(inputs(19, 11), boosting="none", **SMALL)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("booster", [("none", 1), ("twicing", 2), ("learned", 2)])
@pytest.mark.parametrize(("batch", "heads", "key_heads"), [(0, 2, 2), (2, 2, 2), (2, 4, 2), (2, 0, 2)])
@pytest.mark.parametrize("padded", [True, False])
def test_nothing_to_do(
    batch: int, heads: int, key_heads: int, padded: bool, booster: tuple[str, int], is_causal: bool
) -> None:
    """No sample, no head, or no query: empty outputs, and gradients of 0."""
    length = 0 if batch and heads else 9
    query, key, value = inputs(length, 9, heads=heads or 1, key_heads=key_heads, batch=batch)
    leaves = [x.requires_grad_() for x in (query[:, :heads], key, value)]
    boosting, steps = booster
    past = [random(batch, heads, 9, VALUE_WIDTH, seed=3)] * extra_streams(boosting, steps) if not length else []
    mask = torch.ones(batch, 1, 1, 9, dtype=torch.bool) if padded else None
    options = {"boosting": boosting, "steps": steps, "is_causal": is_causal, "past": past}
    output, streams = blocked_filter(*leaves, attention_mask=mask, **options)
    assert all(x.shape == (batch, heads, length, VALUE_WIDTH) for x in (output, *streams))
    for grad in torch.autograd.grad(output, leaves, torch.ones_like(output)):
        assert not grad.any()


def test_the_learned_booster_has_two_passes_whatever_its_steps() -> None:
    for steps in (1, 2, 5):
        compare(inputs(11), boosting="learned", steps=steps, is_causal=True, **SMALL)


@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(boosting: str, bias: bool) -> None:
    """Numerical derivatives, with a mask that leaves one row without keys, and causal."""
    tensors = [x[:1, :2].clone().requires_grad_() for x in inputs(5)]
    extra = random(1, 2, 5, 5, seed=3).requires_grad_() if bias else None
    mask = torch.tensor([False, True, True, False, True])

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        term = leaves[3] if bias else None
        options = {"attention_mask": mask, "bias": term, "is_causal": True, "block_rows": 2}
        output, streams = blocked_filter(*leaves[:3], boosting=boosting, **options)
        return output, *streams

    assert torch.autograd.gradcheck(run, [*tensors, extra] if extra is not None else tensors)


# --------------------------------------------------------------------------------------------------------------------
# Chunks: later queries with the streams of earlier keys
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_are_the_whole(steps: int, padded: bool) -> None:
    """Three chunks, each with what the ones before returned: outputs and gradients through the streams."""
    length, cuts = 23, (0, 5, 6, 23)
    mask = None
    if padded:
        mask = torch.ones(BATCH, 1, 1, length, dtype=torch.bool)
        mask[0, ..., :7] = False
    leaves, whole = ([x.clone().requires_grad_() for x in inputs(length)] for _ in range(2))
    outputs, past = [], []
    for start, stop in itertools.pairwise(cuts):
        output, streams = blocked_filter(
            leaves[0][:, :, start:stop],
            leaves[1][:, :, :stop],
            leaves[2][:, :, :stop],
            attention_mask=None if mask is None else mask[..., :stop],
            is_causal=True,
            scale=SCALE,
            steps=steps,
            past=past if start else (),
            **SMALL,
        )
        outputs.append(output)
        past = [torch.cat(pair, 2) for pair in zip(past, streams, strict=True)] if past else streams
    output = torch.cat(outputs, 2)
    expected, _ = dense(whole, attention_mask=mask, is_causal=True, steps=steps)
    torch.testing.assert_close(output, expected, **EXACT)
    direction = random(*output.shape, seed=4)
    ours = torch.autograd.grad(output, leaves, direction)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, whole, direction), **EXACT)


@pytest.mark.parametrize(
    ("boosting", "past", "message"),
    [
        ("twicing", [], "the cached streams must be 1 of shape (2, 3, 4, 4), got []"),
        ("twicing", [random(2, 3, 5, 4, seed=0)], "got [(2, 3, 5, 4)]"),
        ("none", [random(2, 3, 4, 4, seed=0)], "must be 0"),
    ],
    ids=["none", "of another length", "too many"],
)
def test_streams_that_do_not_fit_are_refused(boosting: str, past: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        blocked_filter(*inputs(5, 9), boosting=boosting, past=past)


def test_more_queries_than_keys_are_refused_where_rows_matter() -> None:
    for options in ({}, {"boosting": "none", "is_causal": True}):
        with pytest.raises(ValueError, match="backend='blocked' cannot serve this call: it .* got 5 keys for 9"):
            run_filter(
                filter_call(*inputs(9, 5), **{"boosting": "twicing", "streams": RecordedStreams(), **options}),
                "blocked",
            )


# --------------------------------------------------------------------------------------------------------------------
# What must not leak
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_no_key_no_output(is_causal: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs(11)]
    mask = torch.ones(BATCH, 1, 11, 11, dtype=torch.bool)
    mask[0, :, 3] = False
    output, _ = blocked_filter(*leaves, attention_mask=mask, is_causal=is_causal, **SMALL)
    assert torch.equal(output[0, :, 3], torch.zeros(HEADS, VALUE_WIDTH, dtype=torch.float64))
    grads = torch.autograd.grad(output, leaves, random(*output.shape, seed=4))
    assert torch.equal(grads[0][0, :, 3], torch.zeros(HEADS, WIDTH, dtype=torch.float64))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("floating", [False, True], ids=["bool", "float"])
def test_hidden_keys_may_hold_anything(poison: float, is_causal: bool, floating: bool) -> None:
    """Padding whose keys and values are NaN changes neither outputs nor gradients; its own gradients are 0."""
    mask = torch.ones(BATCH, 1, 1, 13, dtype=torch.bool)
    mask[0, ..., :4] = mask[1, ..., 9] = False
    given = torch.where(mask, 0.0, float("-inf")) if floating else mask
    results = []
    for value in (0.0, poison):
        leaves = inputs(13)
        for x in leaves[1:]:
            x.masked_fill_(~mask.mT, value)
        leaves = [x.requires_grad_() for x in leaves]
        output, _ = blocked_filter(*leaves, attention_mask=given, is_causal=is_causal, steps=3, **SMALL)
        results.append([output, *torch.autograd.grad(output, leaves, random(*output.shape, seed=4))])
    torch.testing.assert_close(results[1], results[0], **EXACT)
    hidden = (~mask.mT).expand(-1, HEADS, -1, 1)
    for grad in results[1][2:]:
        assert not grad.masked_select(hidden).any()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cutting", [SMALL, {}], ids=["small", "whole"])
@pytest.mark.parametrize("mask", ["padding", "full"])
def test_queries_that_see_no_key_may_hold_anything(mask: str, cutting: dict[str, int], is_causal: bool) -> None:
    """A padded token's query, key and value are NaN: all that is visible keeps its output and its gradients."""
    hidden = torch.zeros(BATCH, 1, 13, dtype=torch.bool)
    hidden[0, :, :4] = hidden[1, :, 9] = True
    seen = ~hidden[:, :, None, :]
    if mask == "full" or not is_causal:
        seen = seen & ~hidden[..., None]
    else:  # a padded token that sees a key is no hidden query
        hidden[1] = False
        seen = ~hidden[:, :, None, :]
    results = []
    for poison in (0.0, float("nan")):
        leaves = [x.masked_fill(hidden[..., None], poison).requires_grad_() for x in inputs(13)]
        output, _ = blocked_filter(*leaves, attention_mask=seen, is_causal=is_causal, steps=3, **cutting)
        results.append([output, *torch.autograd.grad(output, leaves, random(*output.shape, seed=4))])
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert all(grad.isfinite().all() for grad in results[1])


@pytest.mark.parametrize("token", [0, 7, 8, 12])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_causality(token: int, steps: int) -> None:
    """A changed token changes no earlier output, to the last bit, and its own."""
    outputs = []
    for shift in (0.0, 1.5):
        tensors = inputs(13)
        for x in tensors:
            x[:, :, token] += shift
        outputs.append(blocked_filter(*tensors, is_causal=True, steps=steps, **SMALL)[0])
    assert torch.equal(outputs[0][:, :, :token], outputs[1][:, :, :token])
    assert not torch.isclose(outputs[0][:, :, token], outputs[1][:, :, token]).all(-1).any()
    if token < 12:
        assert not torch.allclose(outputs[0][:, :, token + 1 :], outputs[1][:, :, token + 1 :])


# --------------------------------------------------------------------------------------------------------------------
# Precision, layout, compilation
# --------------------------------------------------------------------------------------------------------------------


def two_sdpa_calls(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, steps: int) -> torch.Tensor:
    boosting = "twicing" if steps > 1 else "none"

    def attend(stream: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, stream, is_causal=True)

    return BOOSTING[boosting](attend, lambda index, rows: rows, value, value, steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [1, 2])
def test_error_is_at_most_twice_that_of_sdpa(dtype: torch.dtype, steps: int) -> None:
    """Root mean squared error against float64, of the output and of every gradient."""
    shape = (2, 2, 150, 16)
    exact = [random(*shape, seed=seed).to(dtype).double().requires_grad_() for seed in range(3)]
    direction = random(*shape, seed=4).to(dtype)
    expected = two_sdpa_calls(*exact, steps)
    truth = [expected, *torch.autograd.grad(expected, exact, direction.double())]
    errors = []
    for blocked in (False, True):
        leaves = [x.detach().to(dtype).requires_grad_() for x in exact]
        if blocked:
            output, _ = blocked_filter(*leaves, is_causal=True, steps=steps)
        else:
            output = two_sdpa_calls(*leaves, steps)
        assert output.dtype == dtype
        results = [output, *torch.autograd.grad(output, leaves, direction)]
        errors.append(
            [(a.detach().double() - b).square().mean().sqrt().item() for a, b in zip(results, truth, strict=True)]
        )
    for sdpa, ours in zip(*errors, strict=True):
        assert ours <= 2 * sdpa


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("size", [30.0, 300.0, 1000.0])
@pytest.mark.parametrize("length", [100, 300])
def test_gradients_at_extreme_logits(length: int, size: float, steps: int) -> None:
    """q.k up to 1e4: rows of A come again from a float32 log-sum-exp and do not quite sum to 1.

    The median of samples: where one row decides between two equal keys, a rounding of its logits decides the error.
    """
    shape = (12, 2, length, 16)
    exact = [random(*shape, seed=seed).float().double() for seed in range(3)]
    exact[0] = (exact[0] * size).float().double()
    direction = random(*shape, seed=4)
    errors, truth = [], []
    for kind, dtype in (("sdpa", torch.float64), ("sdpa", torch.float32), ("blocked", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        if kind == "sdpa":
            output = two_sdpa_calls(*leaves, steps)
        else:
            output, _ = blocked_filter(*leaves, is_causal=True, steps=steps)
        results = [output.detach(), *torch.autograd.grad(output, leaves, direction.to(dtype))]
        truth = truth or results
        pairs = [(got.flatten(1), x.flatten(1)) for got, x in zip(results, truth, strict=True)]
        errors.append([float(((got - x).norm(dim=1) / x.norm(dim=1)).median()) for got, x in pairs])
    for sdpa, ours in zip(*errors[1:], strict=True):
        assert ours <= 1.5 * sdpa


# --------------------------------------------------------------------------------------------------------------------
# Derivatives beyond the first backward: computed densely
# --------------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"is_causal": True, "scale": SCALE, "boosting": "twicing"}


def masked_twicing(*tensors: torch.Tensor) -> torch.Tensor:
    """Causal, grouped heads, a padded key that holds NaN, and dropout."""
    mask = torch.ones(BATCH, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., 2] = False
    query, key, value = (x.masked_fill(~mask.mT, float("nan")) if x.shape[1] == 1 else x for x in tensors)
    return blocked_filter(query, key, value, attention_mask=mask, dropout=0.2, seed=3, **OPTIONS, **SMALL)[0]


def test_gradients_of_gradients() -> None:
    """The same first gradients as without ``create_graph``, and second ones that numerical differences confirm."""
    tensors = [x.requires_grad_() for x in inputs(9, heads=2, key_heads=1)]
    output = masked_twicing(*tensors)
    direction = random(*output.shape, seed=4)
    once = torch.autograd.grad(output, tensors, direction, retain_graph=True)
    again = torch.autograd.grad(output, tensors, direction, create_graph=True)
    torch.testing.assert_close(again, once, **EXACT)
    assert torch.autograd.gradgradcheck(masked_twicing, tensors, fast_mode=True)


@pytest.mark.parametrize("linked", ["one tensor", "key made of query"])
def test_gradients_of_gradients_of_inputs_that_hang_together(linked: str) -> None:
    """What flows to the query by way of the key is counted once."""
    leaf = random(1, 2, 7, VALUE_WIDTH, seed=0).requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        key = x if linked == "one tensor" else x.sin() * 2
        return blocked_filter(x, key, key, **OPTIONS, **SMALL)[0]

    output = run(leaf)
    direction = random(*output.shape, seed=4)
    (once,) = torch.autograd.grad(output, leaf, direction, retain_graph=True)
    (again,) = torch.autograd.grad(output, leaf, direction, create_graph=True)
    torch.testing.assert_close(again, once, **EXACT)
    assert torch.autograd.gradgradcheck(run, [leaf], fast_mode=True)


def test_gradients_of_gradients_through_streams() -> None:
    tensors = [x.requires_grad_() for x in inputs(7)]

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output, streams = blocked_filter(*leaves, boosting="sos", steps=3, scale=SCALE, **SMALL)
        return output, *streams

    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_per_sample_gradients() -> None:
    """``vmap`` over ``grad``: what one sample after another gives."""
    samples = inputs(9, batch=4)

    def loss(*one: torch.Tensor) -> torch.Tensor:
        return blocked_filter(*(x[None] for x in one), **OPTIONS, **SMALL)[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*samples)
    for index in range(4):
        leaves = [x[index].clone().requires_grad_() for x in samples]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close([x[index] for x in got], list(expected), **EXACT)


# Torch compiles its own forward-mode formulas with what it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch.func", "dual numbers"])
def test_forward_mode(kind: str) -> None:
    """A Jacobian-vector product, against the product of the backward's gradient and the same vector."""
    tensors = tuple(inputs(9))
    tangents = tuple(random(*x.shape, seed=10 + index) for index, x in enumerate(tensors))

    def run(*given: torch.Tensor) -> torch.Tensor:
        return blocked_filter(*given, **OPTIONS, **SMALL)[0]

    if kind == "torch.func":
        output, change = torch.func.jvp(run, tensors, tangents)
    else:
        with torch.autograd.forward_ad.dual_level():
            pairs = zip(tensors, tangents, strict=True)
            dual = run(*(torch.autograd.forward_ad.make_dual(x, tangent) for x, tangent in pairs))
            output, change = torch.autograd.forward_ad.unpack_dual(dual)
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = run(*leaves)
    torch.testing.assert_close(output, expected.detach(), **EXACT)
    direction = random(*output.shape, seed=4)
    grads = torch.autograd.grad(expected, leaves, direction)
    along = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
    torch.testing.assert_close((change * direction).sum(), along, **EXACT)


def test_autocast_does_not_reach_the_products() -> None:
    tensors = [x.float().requires_grad_() for x in inputs(19)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = blocked_filter(*tensors, scale=SCALE, **SMALL)
        grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
    plain, _ = blocked_filter(*tensors, scale=SCALE, **SMALL)
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(plain, tensors, torch.ones_like(plain)), rtol=0, atol=0)


def test_transposed_layout() -> None:
    """Heads split off a projection, as models do, and inputs are left as they were."""
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(19)]
    copies = [x.clone() for x in tensors]
    output, _ = blocked_filter(*tensors, scale=SCALE, is_causal=True, group_pairs=6)
    torch.testing.assert_close(output, dense(copies, is_causal=True)[0], **EXACT)
    torch.testing.assert_close(tensors, copies, rtol=0, atol=0)


def test_float_mask_with_a_gradient() -> None:
    leaves, plain = ([*inputs(9), random(1, 1, 9, 9, seed=3)] for _ in range(2))
    leaves, plain = ([x.requires_grad_() for x in tensors] for tensors in (leaves, plain))
    output, _ = blocked_filter(*leaves[:3], attention_mask=leaves[3], scale=SCALE, **SMALL)
    expected, _ = dense(plain)
    ours, theirs = (torch.autograd.grad(x.square().sum(), y) for x, y in ((output, leaves), (expected, plain)))
    torch.testing.assert_close(ours, theirs, **EXACT)


# Dynamo hides this warning of its own at a graph break, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled() -> None:
    """A graph break, and the same numbers."""
    tensors = [x.requires_grad_() for x in inputs(9)]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return blocked_filter(query * 2, key, value, is_causal=True, **SMALL)[0].sin()

    output, expected = torch.compile(run, backend="aot_eager")(*tensors), run(*tensors)
    torch.testing.assert_close(output, expected, **EXACT)
    ours, theirs = (torch.autograd.grad(x.sum(), tensors) for x in (output, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made under it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def some_positions(kernel: str, length: int, repeated: bool) -> BlockedPositions | None:
    """Of one head, in order, or as left padding makes them."""
    places = torch.arange(length).float().view(1, -1, 1)
    places = (places - 5).clamp(min=0) if repeated else places
    if kernel == "gaussian":
        return GaussianPositions(places, places, torch.full((1, 1, 1), 0.1).requires_grad_(), None, 4.0, True, False)
    if kernel == "alibi":
        return AlibiPositions(places, places, torch.full((1, 1, 1), 0.1), None, 0.1, True, False)
    table = torch.randn(1, 1, 32, requires_grad=True)
    return BucketPositions(places, places, table, None, bucket_boundaries(16, 128), True) if kernel != "none" else None


def peak_memory(length: int, is_causal: bool, kernel: str, repeated: bool) -> int:
    leaves = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
    positions = some_positions(kernel, length, repeated)
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    mask[..., :3] = False
    with Memory() as memory:
        output, _ = blocked_filter(*leaves, attention_mask=mask, positions=positions, is_causal=is_causal, dropout=0.1)
        output.sum().backward()
    return memory.peak


@pytest.mark.parametrize(
    ("kernel", "repeated", "is_causal"),
    [
        ("none", False, True),
        ("none", False, False),
        ("gaussian", False, True),
        ("gaussian", True, False),
        ("alibi", False, True),
        ("buckets", True, True),
    ],
)
def test_memory_is_linear(kernel: str, repeated: bool, is_causal: bool) -> None:
    """Forward and backward with dropout at 8,192 tokens: less than a tenth of one matrix, four times that of 2,048."""
    torch.manual_seed(0)
    short, long = (peak_memory(length, is_causal, kernel, repeated) for length in (2048, 8192))
    assert long < 8192 * 8192 * 4 / 10
    assert long < 4.3 * short


def test_the_memory_meter_sees_a_matrix() -> None:
    logits = torch.randn(1, 1, 300, 300)
    with Memory() as memory:
        dense_attention(logits, logits, logits)
    assert memory.peak >= 300 * 300 * 4
    assert memory.now <= memory.peak
