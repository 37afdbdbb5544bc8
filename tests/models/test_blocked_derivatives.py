"""Blocked attention: precision of gradients, derivatives of derivatives, layout and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models import backend_chunked, backend_sdpa_delta
from hf_imgproc_attn.models.backend_call import Booster
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_operators import BOOSTING
from tests.models.blocked_cases import BATCH, EXACT, HEADS, SCALE, SMALL, VALUE_WIDTH, dense, inputs, random
from tests.models.helpers import blocked_filter, filter_call

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


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own, of its fused call
@pytest.mark.parametrize(("backend", "boosting"), [("chunked", "twicing"), ("chunked", "delta"), ("sdpa", "delta")])
def test_per_sample_gradients_where_blocks_are_computed_again(
    backend: str, boosting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.func`` has no checkpoints, which these back-ends take where a call has several blocks."""
    monkeypatch.setattr(backend_sdpa_delta, "BLOCK_ROWS", 4)
    monkeypatch.setattr(backend_chunked, "BLOCK_SCORES", 9)
    samples, gain = inputs(9, batch=2), random(HEADS, 1, 1, seed=6).tanh()

    def loss(*one: torch.Tensor) -> torch.Tensor:
        call = filter_call(*(x[None] for x in one), is_causal=True, scale=SCALE)
        gains = gain if boosting == "delta" else None
        return run_filter(call._replace(booster=Booster(boosting, 2, gains)), backend).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*samples)
    for index in range(2):
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
