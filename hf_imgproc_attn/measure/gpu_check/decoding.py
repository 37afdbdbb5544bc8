"""Cases of parts b and c for decoding: one new token of twicing against cached keys, values and the booster's stream.

Right against float64; then timed beside one plain ``scaled_dot_product_attention`` of the same token, eagerly and as a
CUDA graph, where nothing has to be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...gpu import supports
from ..benchmark.attention import Shape
from ..benchmark.timing import interleave
from .parts import Bench, Case, Refused, Wrong
from .tensors import Inputs, draw, exact, relative_error

KERNELS, TWO_CALLS = "triton decode", "sdpa"
SHAPES = (Shape(1, 12, 4096, 64), Shape(16, 12, 4096, 64))
TINY_SHAPES = (Shape(1, 2, 150, 16),)
LARGEST_MULTIPLE = 16.0
"""Of plain attention's error; see ``part_backends``."""

Step = Callable[[], torch.Tensor]


def error_cases(bench: Bench) -> list[Case]:
    """For part b."""
    shape = TINY_SHAPES[0] if bench.tiny else SHAPES[0]
    found = []
    for dtype in ("bfloat16", "float16"):
        about: dict[str, Any] = {"method": KERNELS, "backend": KERNELS, "filter": "twicing, one token"}
        about |= {"shape": list(shape.size), "is_causal": True, "dtype": dtype}
        run = partial(compare, bench, shape, dtype)
        found.append(Case(f"{KERNELS}: twicing, one token after {shape.size}, {dtype}", run, 90.0, about))
    return found


def time_cases(bench: Bench) -> list[Case]:
    """For part c."""
    found = []
    for graph in (False, True):
        for shape in TINY_SHAPES if bench.tiny else SHAPES:
            for backend in (KERNELS, TWO_CALLS):
                about: dict[str, Any] = {"what": "decoding", "filter": "twicing, one token", "backend": backend}
                about |= {"shape": list(shape.size), "is_causal": True, "graph": graph}
                words = f"{'CUDA graph: ' * graph}twicing, one token after {shape.size}, {backend}"
                found.append(Case(words, partial(time_step, bench, backend, shape, graph), 60.0, about))
    return found


def kernel_step(query: torch.Tensor, inputs: Inputs, stream: torch.Tensor) -> Step:
    """One token by the kernels for decoding.

    Raises:
        Refused: where they cannot run.
    """
    reason = supports(query, query, query)
    if reason is not None:
        raise Refused(f"triton {reason}")
    from ...gpu.decode import Cached, decode_attention

    return lambda: decode_attention(query, Cached(inputs.key, inputs.value, [stream]))[0]


def two_calls_step(query: torch.Tensor, inputs: Inputs, stream: torch.Tensor) -> Step:
    """The same by two calls of attention; the stream has room for the new row."""
    room = torch.cat((stream, torch.zeros_like(query)), 2)

    def step() -> torch.Tensor:
        smooth = scaled_dot_product_attention(query, inputs.key, inputs.value)
        room[:, :, -1:] = inputs.value[:, :, -1:] - smooth
        return smooth + scaled_dot_product_attention(query, inputs.key, room)

    return step


def compare(bench: Bench, shape: Shape, dtype: str, seconds_left: float) -> dict[str, Any]:
    """The output's error, and as a multiple of plain attention's own for the same token."""
    inputs = draw("twicing", shape)
    query, stream = inputs.query[:, :, -1:], (inputs.value - exact("plain", inputs))[:, :, :-1]
    truth, plain_truth = exact("twicing", inputs)[:, :, -1:], exact("plain", inputs)[:, :, -1:]
    rounded = inputs.to(getattr(torch, dtype), bench.device)
    query, stream = (tensor.to(rounded.query) for tensor in (query, stream))
    with torch.no_grad():
        got = kernel_step(query, rounded, stream)()
        plain = scaled_dot_product_attention(query, rounded.key, rounded.value)
    least = torch.finfo(getattr(torch, dtype)).eps / 4
    error, yardstick = relative_error(got, truth), max(relative_error(plain, plain_truth), least)
    values = {"errors": {"output": error}, "multiples": {"output": error / yardstick}}
    if not values["multiples"]["output"] <= LARGEST_MULTIPLE:
        raise Wrong(f"output: {error / yardstick:.3g} times plain attention's error", values)
    return values


def time_step(bench: Bench, backend: str, shape: Shape, graph: bool, seconds_left: float) -> dict[str, Any]:
    """A token by a method beside a token of plain attention."""
    if graph and bench.device == "cpu":
        raise Refused("there are no CUDA graphs on the CPU")
    generator = torch.Generator(bench.device).manual_seed(0)
    query, key, value, stream = (
        torch.randn(
            (*shape.size[:2], rows, shape.size[3]), generator=generator, device=bench.device, dtype=torch.bfloat16
        )
        for rows in (1, shape.size[2], shape.size[2], shape.size[2] - 1)
    )
    inputs = Inputs(query, key, value, value, is_causal=True)
    make = kernel_step if backend == KERNELS else two_calls_step
    steps: dict[str, Callable[[], object]] = {
        "plain": lambda: scaled_dot_product_attention(query, key, value),
        "mine": make(query, inputs, stream),
    }
    with torch.no_grad():
        clock = None
        if bench.device == "cuda":
            from .part_times import calls_in_a_sample, event_clock

            counts = {name: calls_in_a_sample(step) for name, step in steps.items()}
            if graph:
                steps = {name: _captured(step) for name, step in steps.items()}
            clock = event_clock({steps[name]: count for name, count in counts.items()})
        spreads = interleave(steps, "plain", budget=0.0 if bench.tiny else 0.3, device=bench.device, clock=clock)
    return {**spreads["mine"].fields(), "plain_milliseconds": spreads["plain"].milliseconds}


def _captured(step: Callable[[], object]) -> Callable[[], object]:
    """A step that was run already, as a CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], object] = graph.replay
    return replay
