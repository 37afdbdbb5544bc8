"""Blocked attention against the dense reference: outputs, every gradient, memory.

Blocks of 8 rows and groups of 2 pairs, so that a few dozen tokens cross several of both.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked_dense import dense_dropout_factors
from hf_imgproc_attn.models.backend_blocked_passes import recurrence
from hf_imgproc_attn.models.backend_blocked_plan import make_plan
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_operators import BOOSTING, extra_streams
from tests.models.blocked_cases import BATCH, EXACT, HEADS, SCALE, SMALL, VALUE_WIDTH, WIDTH, dense, inputs, random
from tests.models.helpers import (
    RecordedStreams,
    blocked_filter,
    dropout_seed,
    filter_call,
)


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
    """Averaged over masks, of many samples that are the same and of several seeds, A with dropout is A."""
    tensors = inputs(9)
    expected = dense(tensors, steps=1)[0]
    batch, copies = len(expected), 100
    many = [x.repeat(copies, 1, 1, 1) for x in tensors]
    runs = [blocked_filter(*many, scale=SCALE, dropout=0.25, steps=1, seed=seed)[0] for seed in range(8)]
    mean = torch.stack(runs).unflatten(1, (copies, batch)).mean((0, 1))
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.12)


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

    # Every entry of the Jacobian where a bias and streams come together, a random direction of it elsewhere.
    is_fast = not (bias and boosting == "twicing")
    assert torch.autograd.gradcheck(run, [*tensors, extra] if extra is not None else tensors, fast_mode=is_fast)


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
