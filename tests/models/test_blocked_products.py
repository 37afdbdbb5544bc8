"""Products of the blocks by oneDNN: the same numbers as by torch's batched product, where it is there and suits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_imgproc_attn.models import backend_blocked_plan as products
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_flops import register_formulas
from hf_imgproc_attn.models.backend_reference import run as run_reference
from tests.models.helpers import filter_call
from tests.models.layer_cases import random

LENGTH, HEADS = 24, 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of every size go to oneDNN, where it is there."""
    monkeypatch.setattr(products, "LEAST_WORK", 1)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Whether oneDNN is there is asked anew, and again after the test."""
    products.onednn_linear.cache_clear()
    yield
    products.onednn_linear.cache_clear()


def shapes(left: bool, right: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors, each as it stands or the other way round in memory."""
    first, second = torch.randn(3, 5, 7), torch.randn(3, 7, 6)
    return (first.mT.contiguous().mT if left else first), (second.mT.contiguous().mT if right else second)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("pairs", [1, 3])
def test_it_is_the_batched_product(left: bool, right: bool, pairs: int) -> None:
    """Of matrices, transposed ones, and columns out of wider ones; into room, into new memory, and added."""
    first, second = (x[:pairs] for x in shapes(left, right))
    for a, b in ((first, second), (first[..., 2:6], second[:, 2:6, 1:])):
        exact, room = torch.bmm(a, b), torch.full((pairs, a.shape[1], b.shape[-1]), float("nan"))
        for given in (None, lambda room=room: room):
            torch.testing.assert_close(products.multiply(a, b, given, by_onednn=True), exact)
        total = torch.ones_like(room)
        products.add_product(total, a, b)
        torch.testing.assert_close(total, exact + 1.0)


@pytest.mark.parametrize("with_room", [True, False])
@pytest.mark.parametrize("columns", [products.LEAST_COLUMNS - 1, 64])
def test_long_sums_are_no_less_exact(columns: int, with_room: bool) -> None:
    """Beside the batched product, of averages of many values as attention takes them."""
    weights, values = torch.randn(2, 64, 5000).softmax(-1), torch.randn(2, 5000, columns)
    exact, room = weights.double() @ values.double(), torch.full((2, 64, columns), float("nan"))
    found = products.multiply(weights, values, (lambda: room) if with_room else None, by_onednn=True)
    errors = [float((got - exact).norm()) for got in (found, torch.bmm(weights, values))]
    assert errors[0] < 1.8 * errors[1]


@pytest.mark.parametrize("group_pairs", [1, 3])
@pytest.mark.parametrize("block_rows", [8, LENGTH])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("steps", "key_heads", "padded"), [(1, 4, False), (2, 2, True), (3, 4, False)])
def test_filters_are_the_dense_ones(
    small: None, is_causal: bool, block_rows: int, group_pairs: int, steps: int, key_heads: int, padded: bool
) -> None:
    """Outputs and gradients in single precision beside the dense truth in double precision."""
    heads = (HEADS, key_heads, key_heads)
    given = [random(2, count, LENGTH, 6, seed=seed) for seed, count in enumerate(heads)]
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :5] = False
    options: dict[str, Any] = {"attention_mask": mask if padded else None, "is_causal": is_causal}
    results = []
    for dtype in (torch.float64, torch.float32):
        own = [tensor.to(dtype).requires_grad_() for tensor in given]
        call = filter_call(*own, boosting="twicing" if steps > 1 else "none", boosting_steps=max(steps, 2), **options)
        blocks = {"block_rows": block_rows, "group_pairs": group_pairs}
        output = run_reference(call) if dtype == torch.float64 else run_blocked(call, **blocks)
        upstream = random(*output.shape, seed=9).to(dtype)
        results.append([output, *torch.autograd.grad(output, own, upstream)])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)


def test_it_serves_large_products_of_single_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads, since one product does not keep many busy; all products of a call alike."""
    is_there = products.onednn_linear() is not None
    query = torch.zeros(1, 2, 256, 64)

    def chosen(like: torch.Tensor) -> bool:
        plan = products.make_plan(like, like, is_causal=True, scale=1.0, dropout=0.0, seed=0, one_pass=True)
        assert plan.backward.by_onednn == plan.by_onednn
        return plan.by_onednn

    assert chosen(query) is is_there
    assert chosen(query.bfloat16()) is is_there  # computed in single precision
    assert not chosen(query.double())
    assert not chosen(query[:, :, :64])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not chosen(query)


@pytest.mark.parametrize("what", ["missing", "other arguments", "wrong"])
def test_a_torch_without_the_operator_goes_on(what: str, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Operators:
        if what != "missing":

            class _linear_pointwise:
                @staticmethod
                def default(*given: Any) -> torch.Tensor:
                    if what == "other arguments":
                        raise RuntimeError("expected at most 5 arguments")
                    return torch.zeros(2, 4)

    monkeypatch.setattr(torch.ops, "mkldnn", Operators, raising=False)
    assert products.onednn_linear() is None
    query = torch.zeros(1, 2, 256, 64)
    assert not products.make_plan(
        query, query, is_causal=True, scale=1.0, dropout=0.0, seed=0, one_pass=True
    ).by_onednn


def test_its_products_are_counted(small: None) -> None:
    """By torch's counter of operations: as many as of the batched product."""
    register_formulas()
    given = [torch.randn(1, 2, 32, 8, requires_grad=True) for _ in range(3)]
    counts = []
    for dtype in (torch.float32, torch.float64):
        own = [tensor.to(dtype) for tensor in given]
        with FlopCounterMode(display=False) as counter:
            run_blocked(filter_call(*own, boosting="twicing"), group_pairs=1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 10 * 2 * 2 * 32 * 32 * 8
