"""Blocked attention takes memory in proportion to the length."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import Difference
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_weights import LocalLinear, Robust
from hf_imgproc_attn.models.kernel_position import BlockedPositions, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from tests.models.helpers import blocked_filter, dense_attention, filter_call


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


def peak_of_weights(length: int, is_causal: bool, by_weights: Any) -> int:
    leaves = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(4)]
    call = filter_call(*leaves[:3], is_causal=is_causal, dropout=0.1)
    with Memory() as memory:
        run_blocked(call._replace(by_weights=by_weights or LocalLinear(leaves[3]))).sum().backward()
    return memory.peak


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
    """Forward and backward with dropout at 4,096 tokens: less than a fifth of one matrix, four times that of 1,024."""
    torch.manual_seed(0)
    short, long = (peak_memory(length, is_causal, kernel, repeated) for length in (1024, 4096))
    assert long < 4096 * 4096 * 4 / 5
    assert long < 4.3 * short


@pytest.mark.parametrize(("by_weights", "is_causal"), [(None, True), (Robust.of(2, "mcp"), False)])
def test_memory_of_boosters_that_look_at_single_weights_is_linear(by_weights: Any, is_causal: bool) -> None:
    torch.manual_seed(0)
    short, long = (peak_of_weights(length, is_causal, by_weights) for length in (1024, 4096))
    assert long < 4096 * 4096 * 4 / 2
    assert long < 4.3 * short


def test_memory_of_a_second_map_is_linear() -> None:
    torch.manual_seed(0)
    peaks = []
    for length in (1024, 4096):
        leaves = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(5)]
        other = Difference(leaves[3], leaves[4], torch.full((1, 1, 1), 0.3, requires_grad=True))
        with Memory() as memory:
            call = filter_call(*leaves[:3], is_causal=True, dropout=0.1)._replace(difference=other)
            run_blocked(call).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 4096 * 4096 * 4 / 2
    assert peaks[1] < 4.3 * peaks[0]


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_memory_of_delta_is_linear(backend: str) -> None:
    torch.manual_seed(0)
    peaks = []
    for length in (1024, 4096):
        leaves = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
        with Memory() as memory:
            dropout = 0.1 if backend == "blocked" else 0.0
            run_filter(
                filter_call(*leaves, is_causal=True, boosting="delta", dropout=dropout), backend
            ).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 4096 * 4096 * 4 / 2
    assert peaks[1] < 4.3 * peaks[0]


def test_the_memory_meter_sees_a_matrix() -> None:
    logits = torch.randn(1, 1, 300, 300)
    with Memory() as memory:
        dense_attention(logits, logits, logits)
    assert memory.peak >= 300 * 300 * 4
    assert memory.now <= memory.peak
