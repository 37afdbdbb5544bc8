"""Heads whose queries are one block, a pair at a time: the dense truth, and what is left to the other path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models import backend_blocked_plan, backend_blocked_whole
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.boost_weights import LocalLinear
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
    for module in (backend_blocked_plan, backend_blocked_whole):
        monkeypatch.setattr(module, "onednn_linear", lambda: linear)
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
