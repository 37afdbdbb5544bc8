"""Heads whose queries are one block, a pair at a time: the dense truth, and what is left to the other path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models import (
    backend_blocked,
    backend_blocked_pairs,
    backend_blocked_plan,
    backend_blocked_rows,
    backend_blocked_whole,
)
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_blocked_pairs import as_shared_bias
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.boost_weights import LocalLinear, Robust
from hf_imgproc_attn.models.kernel_given import FeaturePositions
from hf_imgproc_attn.models.kernel_position import ClassTokens, UntiedPositions
from tests.models.helpers import filter_call
from tests.models.layer_cases import random

HEADS, LENGTH, KEYS, WIDTH, VALUE_WIDTH = 3, 9, 11, 6, 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Every call suits single products, in any precision, here by torch's own linear layer; those that were made."""
    made: list[torch.dtype] = []

    def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, *after: Any) -> torch.Tensor:
        made.append(x.dtype)
        return torch.nn.functional.linear(x, w, bias)

    monkeypatch.setattr(backend_blocked_plan, "suits_onednn", lambda like, work: True)
    monkeypatch.setattr(backend_blocked_plan, "onednn_linear", lambda: linear)
    monkeypatch.setattr(backend_blocked_whole, "onednn_linear", lambda: linear)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return made


def tensors(dtype: torch.dtype, length: int = LENGTH, keys: int = KEYS, sharp: float = 2.0) -> list[torch.Tensor]:
    """Query, key, value and slope."""
    shapes = ((length, WIDTH), (keys, WIDTH), (keys, VALUE_WIDTH), (length, WIDTH))
    given = [random(2, HEADS, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    given[0] *= sharp
    return [x.to(dtype).requires_grad_() for x in given]


def local_linear(given: list[torch.Tensor], **options: Any) -> FilterCall:
    return filter_call(*given[:3], **options)._replace(by_weights=LocalLinear(given[3]))


def results(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and its gradients, in double precision."""
    found = torch.autograd.grad(output, leaves, random(*output.shape, seed=9).to(output.dtype))
    return [x.detach().double() for x in (output, *found)]


@pytest.mark.parametrize(("length", "keys"), [(LENGTH, KEYS), (LENGTH, LENGTH), (1, 1)])
@pytest.mark.parametrize("sharp", [1.0, 300.0])
def test_local_linear_is_the_dense_one(length: int, keys: int, sharp: float, products: list[torch.dtype]) -> None:
    leaves = tensors(torch.float64, length, keys, sharp)
    found = results(run_blocked(local_linear(leaves)), leaves)
    assert len(products) == 2 * HEADS * (2 + 5)
    for got, exact in zip(found, results(run_reference(local_linear(leaves)), leaves), strict=True):
        torch.testing.assert_close(got, exact, **EXACT)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("penalty", ["huber", "l1"])
@pytest.mark.parametrize(("length", "keys"), [(LENGTH, KEYS), (LENGTH, LENGTH), (1, 1)])
def test_robust_is_the_dense_one(
    length: int, keys: int, penalty: str, steps: int, products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With distances on both sides of the threshold; penalties with a cutoff go by groups."""
    leaves = tensors(torch.float64, length, keys)[:3]
    robust = Robust.of(steps, penalty, 2.0 if penalty == "huber" else None)
    call = filter_call(*leaves)._replace(by_weights=robust)
    with monkeypatch.context() as patch:
        patch.delattr(backend_blocked_rows, "_forward")
        found = results(run_blocked(call), leaves)
    assert len(products) == 2 * HEADS * (2 + 2 * steps + 5 + 5 * steps)
    for got, exact in zip(found, results(run_reference(call), leaves), strict=True):
        torch.testing.assert_close(got, exact, **EXACT)
    cut = call._replace(by_weights=Robust.of(steps, "mcp"))
    torch.testing.assert_close(run_blocked(cut), run_reference(cut), **EXACT)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_it_computes_in_single_precision(dtype: torch.dtype, bound: float, products: list[torch.dtype]) -> None:
    leaves = tensors(dtype)
    found, doubles = results(run_blocked(local_linear(leaves)), leaves), [x.detach().double() for x in leaves]
    assert set(products) == {torch.float32}
    exact = results(run_reference(local_linear([x.requires_grad_() for x in doubles])), doubles)
    for got, wanted in zip(found, exact, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("length", [190, 197, 256])
def test_both_directions_round_logits_alike(length: int) -> None:
    """By oneDNN, where it is there: at logits of 1e4 the weights still sum to 1 where gradients are computed."""
    query, key, value, slope = (random(1, 1, length, 64, seed=seed).float().requires_grad_() for seed in range(4))
    given = [query, (key + 5e3).detach().requires_grad_(), value, (slope * 1e-4).detach().requires_grad_()]
    call = local_linear(given)
    output = run_blocked(call)
    upstream = random(*output.shape, seed=9).float()
    (d_value,) = torch.autograd.grad(output, value, upstream)
    torch.testing.assert_close(d_value.sum(-2), upstream.sum(-2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["mask", "bias", "dropout", "causal", "sinks"])
def test_what_makes_a_call_general_is_left_out(what: str, products: list[torch.dtype]) -> None:
    leaves = tensors(torch.float64, LENGTH, LENGTH)
    options: dict[str, Any] = {
        "mask": {"attention_mask": torch.ones(2, 1, 1, LENGTH, dtype=torch.bool).triu(3)},
        "bias": {"attention_mask": random(1, HEADS, LENGTH, LENGTH, seed=7)},
        "dropout": {"dropout": 0.25},
        "causal": {"is_causal": True},
    }.get(what, {})
    call = local_linear(leaves, **options)
    if what == "sinks":
        call = call._replace(sinks=random(HEADS, seed=8))
    torch.manual_seed(0)
    got = run_blocked(call)
    torch.manual_seed(0)
    wanted = run_blocked(call, group_pairs=HEADS * 2) if what == "dropout" else run_reference(call)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_gradients_have_gradients(products: list[torch.dtype]) -> None:
    leaves = [x[:1, :1, :3].detach().requires_grad_() for x in tensors(torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *given: run_blocked(local_linear(list(given))), leaves)


LINEAR = [("none", 1), ("twicing", 2), ("twicing", 3), ("diffusion", 3), ("sos", 3), ("learned", 1)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("boosting", "steps"), LINEAR)
def test_linear_boosters_are_the_dense_ones(
    boosting: str, steps: int, with_bias: bool, products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and every gradient, those of gain and bias too; nothing goes by groups."""
    monkeypatch.delattr(backend_blocked, "forward_passes")
    leaves = tensors(torch.float64, LENGTH, LENGTH)[:3]
    leaves += [random(1, HEADS, LENGTH, LENGTH, seed=7).requires_grad_()] if with_bias else []
    gain = [random(HEADS, 1, 1, seed=8).requires_grad_()] if boosting == "learned" else []
    options: dict[str, Any] = {
        "boosting": boosting,
        "boosting_steps": steps,
        "boosting_gain": gain[0] if gain else None,
    }
    call = filter_call(*leaves[:3], bias=leaves[3] if with_bias else None, **options)
    found, exact = (results(run(call), leaves + gain) for run in (run_blocked, run_reference))
    assert products
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("length", [LENGTH, KEYS])
def test_plain_attention_may_have_other_lengths(length: int, products: list[torch.dtype]) -> None:
    leaves = tensors(torch.float64, length, LENGTH)[:3]
    call = filter_call(*leaves)
    assert backend_blocked_pairs.suits(*bare_call(call))
    for got, wanted in zip(results(run_blocked(call), leaves), results(run_reference(call), leaves), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


def bare_call(call: FilterCall) -> tuple[Any, Any]:
    """What the autograd function gets."""
    return backend_blocked._blocked_call(call, None, 0, None, None), backend_blocked._tensors(call, None)


@pytest.mark.parametrize("kernel", ["untied", "features"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_positions_of_all_samples_become_one_bias(kernel: str, is_shared: bool, products: list[torch.dtype]) -> None:
    """With class tokens' scalars; positions that samples have for themselves stay columns."""
    leaves = tensors(torch.float64, LENGTH, LENGTH)[:3]
    places = [random(1 if is_shared else 2, HEADS, LENGTH, 5, seed=seed).requires_grad_() for seed in (7, 8)]
    for place in places:
        place.detach()[:, :, :2] = 0.0  # class tokens
    scalars = random(HEADS, 3, seed=10).requires_grad_()
    if kernel == "untied":
        scale = torch.full((HEADS, 1, 1), 0.7, dtype=torch.float64)
        term: Any = UntiedPositions(*places, scale, ClassTokens(2, scalars, 0) if is_shared else None)
    else:
        term = FeaturePositions(*(x.expand(2, -1, -1, -1) for x in places))
    call = filter_call(*leaves, positions=term, boosting="twicing")
    assert (as_shared_bias(call).positions[0].features_or_bias(torch.float32) == "bias") is is_shared
    own = [*leaves, *places, *([scalars] if kernel == "untied" and is_shared else [])]
    for got, wanted in zip(results(run_blocked(call), own), results(run_reference(call), own), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("steps", [1, 2])
def test_linear_boosters_in_single_and_half_precision(dtype: torch.dtype, bound: float, steps: int) -> None:
    """By oneDNN, where it is there."""
    leaves = [random(1, 2, 190, 64, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
    bias = random(1, 2, 190, 190, seed=7).to(dtype)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options: dict[str, Any] = {"boosting": "twicing" if steps > 1 else "none", "boosting_steps": steps}
    found = results(run_blocked(filter_call(*leaves, bias=bias, **options)), leaves)
    exact = results(run_reference(filter_call(*doubles, bias=bias.double(), **options)), doubles)
    for got, wanted in zip(found, exact, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < bound


def test_a_large_bias_is_rounded_alike_in_both_directions() -> None:
    """By oneDNN, where it is there: weights still sum to 1 where gradients are computed."""
    query, key, value = (random(1, 1, 197, 64, seed=seed).float().requires_grad_() for seed in range(3))
    bias = random(1, 1, 197, 197, seed=7).float() + 3e3 * torch.arange(197.0).sin()
    call = filter_call(query, (key * 200.0).detach(), value, bias=bias)
    upstream = random(1, 1, 197, 64, seed=9).float()
    (d_value,) = torch.autograd.grad(run_blocked(call), value, upstream)
    torch.testing.assert_close(d_value.sum(-2), upstream.sum(-2), rtol=1e-4, atol=1e-4)
