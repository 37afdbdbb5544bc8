"""Attention alone: every method on the same tensors, over lengths, forward and forward + backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .methods import FLOP_FLOORS, METHODS, PLAIN, Method, byte_floor, disagreement
from .timing import DIRECTIONS, MIB, Row, available_memory, direction_calls, interleave, peak_memory


@dataclass(frozen=True)
class Shape:
    """``[batch, heads, length, head_dim]``, causal or not."""

    batch: int
    heads: int
    length: int
    head_dim: int = 64
    is_causal: bool = True

    @property
    def size(self) -> tuple[int, int, int, int]:
        """As a tensor's shape."""
        return self.batch, self.heads, self.length, self.head_dim

    def name(self, dtype: torch.dtype) -> str:
        """The case in words."""
        return f"{'causal' if self.is_causal else 'bidirectional'} {self.size} {str(dtype).removeprefix('torch.')}"


GOALS = (
    Shape(2, 12, 1024),
    Shape(1, 12, 4096),
    Shape(2, 12, 1024, is_causal=False),
    Shape(16, 12, 197, is_causal=False),
)
"""The shapes that the table of ``docs/speed.md`` shows: GPT-2 at two lengths, a text encoder, ViT-B at 224 pixels."""

GPU_GOALS = (Shape(8, 12, 2048), Shape(64, 12, 197, is_causal=False))

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def sweep(lengths: Sequence[int], is_causal: bool) -> list[Shape]:
    """One batch row and two heads at every length, for cost and memory against N."""
    return [Shape(1, 2, length, is_causal=is_causal) for length in lengths]


@dataclass(frozen=True)
class Limits:
    """What a row may take at most: estimated seconds for one call, estimated MiB, and seconds for all rounds."""

    seconds: float
    mib: float | None
    budget: float


def run_attention(
    shapes: Sequence[Shape],
    *,
    dtype: torch.dtype,
    device: str,
    limits: Limits,
    methods: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Time the methods on each shape.

    Args:
        shapes: what to time.
        dtype: of the tensors.
        device: ``"cpu"`` or a CUDA device.
        limits: rows with a higher estimate are skipped and named.
        methods: names among ``METHODS``; None: all.
        say: told what is being timed.

    Yields:
        A :class:`Row` for each shape, direction and method, the skipped ones included.
    """
    names = [PLAIN, *(name for name in methods or METHODS if name != PLAIN)]
    for shape in shapes:
        wrong = {
            name: disagreement(name, shape.length, shape.head_dim, shape.is_causal, dtype, device) for name in names
        }
        generator = torch.Generator().manual_seed(0)
        *inputs, gradient = (
            torch.randn(shape.size, generator=generator, dtype=torch.float32).to(device, dtype) for _ in range(4)
        )
        query, key, value = (tensor.requires_grad_() for tensor in inputs)
        rate: float | None = None
        for index, direction in enumerate(DIRECTIONS):
            say(f"{shape.name(dtype)}, {direction}")
            calls, skipped = {}, {}
            for name in names:
                reason = wrong[name] and f"not timed: {wrong[name]}"
                if reason is None and name != PLAIN:
                    reason = too_much(METHODS[name], shape, index, rate, inputs[0].element_size(), limits)
                if reason is None:
                    attend = partial(METHODS[name].run, query, key, value, shape.is_causal)
                    calls[name] = direction_calls(attend, inputs, gradient)[direction]
                    if name == PLAIN:
                        rate = _rate(calls[name], shape, index, device)
                else:
                    skipped[name] = reason
            if PLAIN not in calls:
                raise RuntimeError(f"plain attention is {skipped[PLAIN]}")
            spreads = interleave(calls, PLAIN, budget=limits.budget, device=device)
            gc.collect()  # looks through all that is imported, which takes longer than small cases
            for name in names:
                floors = FLOP_FLOORS[METHODS[name].filter]
                common = {
                    "suite": "attention",
                    "case": shape.name(dtype),
                    "length": shape.length,
                    "method": name,
                    "direction": direction,
                }
                if name in skipped:
                    yield Row(**common, skipped=skipped[name])  # type: ignore[arg-type]
                    continue
                gc.collect(1)
                yield Row(
                    **common,  # type: ignore[arg-type]
                    **spreads[name].fields(),
                    peak_mib=peak_memory(calls[name], device),
                    flop_floor=floors[index],
                    byte_floor_mib=byte_floor(inputs[0], bool(index)) / MIB,
                )


def too_much(
    method: Method, shape: Shape, direction: int, rate: float | None, element_size: int, limits: Limits
) -> str | None:
    """Why a method is not tried on a shape: its estimated time or memory is above the limits; None if it is tried."""
    batch, heads, length, width = shape.size
    pairs = batch * heads * length**2
    mib = method.dense[direction] * pairs * element_size / MIB
    allowed = limits.mib
    if allowed is None:
        free = available_memory()
        allowed = free and free / 2
    if allowed is not None and mib > allowed:
        return f"skipped: about {mib:,.0f} MiB, above the limit of {allowed:,.0f} MiB"
    # What skips the hidden half of a causal matrix does half of the work.
    share = 0.5 if shape.is_causal and not any(method.dense) else 1.0
    flops = 2 * pairs * (share * method.products[direction] * width + method.cubic[direction] * length)
    if rate is not None and flops / rate > limits.seconds:
        return f"skipped: about {flops / rate:,.0f} s a call, above the limit of {limits.seconds:g} s"
    return None


def _rate(call: Callable[[], object], shape: Shape, direction: int, device: str) -> float:
    """Operations a second of plain attention."""
    spread = interleave({PLAIN: call}, PLAIN, budget=0.0, device=device)[PLAIN]
    batch, heads, length, width = shape.size
    share = 0.5 if shape.is_causal else 1.0
    return (
        2
        * share
        * METHODS[PLAIN].products[direction]
        * batch
        * heads
        * length**2
        * width
        / (spread.milliseconds / 1000)
    )
