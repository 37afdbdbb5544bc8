"""Part c: what one filter costs on each back-end, beside plain SDPA in the same rounds.

Forward without gradients, and forward + backward, in bfloat16. A sample is a row of calls between two CUDA events,
long enough for the events' resolution; caches are warm, and compiling and tuning are over. Where the device is faster
than Python launches, this is Python's time: the last cases time calls again as a CUDA graph, which needs no launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.attention import restore_flash_attention_impl, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...functional import filter_attention
from ...gpu import flash
from ..benchmark.attention import Shape
from ..benchmark.timing import DIRECTIONS, direction_calls, interleave, peak_memory
from . import decoding
from .composed import with_dropout
from .part_backends import SDPA_KERNELS, compiled_flex, forced, triton_algorithm
from .parts import Bench, Case, Refused, Wrong
from .tensors import FILTERS, Attend, Inputs, attend, gaussian_features, relative_error

VIT = Shape(64, 12, 197, 64, is_causal=False)
FEW_HEADS = Shape(1, 12, 2048, 64)
SHAPES = (VIT, Shape(8, 12, 2048, 64), Shape(1, 12, 16384, 64), Shape(8, 8, 2048, 128))
TINY_SHAPES = (Shape(2, 1, 17, 16, is_causal=False), Shape(1, 1, 17, 16))
TIMED = ("twicing", "bilateral untied", "bilateral gaussian", "twicing, 3 steps")
_REHEARSED_ON_TRITON = ("twicing", "bilateral untied")
"""The interpreter takes seconds for a case."""
_PRODUCTS_OF_DELTA = 3.0, 7.0
"""Those of twicing: the logits, what the filter reads of the values before, and A on the corrected ones."""
PLAIN = "plain"

DISAGREEMENT = 0.05
"""Largest relative difference from the same filter by SDPA calls, in bfloat16; what differs more is not timed."""
_SAMPLE = 4e-3
_MOST_CALLS = 50


def cases(bench: Bench) -> list[Case]:
    """The cases: back-ends on every shape, Triton's algorithms, forced kernels and graphs; FlexAttention comes last.

    It compiles for half a minute a case, and nothing that takes a second should wait for that.
    """
    shapes = TINY_SHAPES if bench.tiny else SHAPES
    found = [
        Case("SDPA's choice for plain attention", partial(baseline_choice, bench, shapes), about={"what": "choice"})
    ]
    quick = [(name, backend, shape) for name in TIMED for shape in shapes for backend in ("sdpa", "triton", "blocked")]
    slow = [(name, "flex", shape) for name in TIMED for shape in shapes]

    def add(name: str, backend: str, shape: Shape, run: Callable[[float], dict[str, Any]], prefix: str = "") -> None:
        about = {"filter": name, "backend": backend, "shape": list(shape.size), "is_causal": shape.is_causal}
        about["graph"] = bool(prefix)
        found.append(Case(f"{prefix}{name}, {backend}, {words(shape)}", run, 90.0, about))

    for name, backend, shape in quick:
        add(name, backend, shape, partial(time_backend, bench, name, backend, shape))
    for shape in (shape for shape in shapes if shape.is_causal):
        for backend in ("sdpa", "blocked"):
            add("delta", backend, shape, partial(time_delta, bench, backend, shape))
    found += decoding.time_cases(bench)
    for algorithm, shape in _triton_algorithms(bench, shapes):
        run = partial(time_triton, bench, algorithm, shape)
        add("twicing", f"triton {algorithm}", shape, run)
    for implementation in () if bench.tiny else flash.installed():
        for shape in shapes[1:]:
            run = partial(time_flash, bench, implementation, shape)
            add("twicing", flash.algorithm(implementation), shape, run)
    name = "twicing, 3 steps"
    add(name, "triton with dropout", shapes[1], partial(time_dropout, bench, name, shapes[1]))
    for shape in shapes:
        for kernel in ("flash", "memory-efficient", "cuDNN"):
            add(PLAIN, f"SDPA {kernel}", shape, partial(time_kernel, bench, kernel, shape))
    for shape in shapes[:2]:
        for name, backend in (("twicing", "triton"), ("twicing", "sdpa"), ("bilateral gaussian", "sdpa")):
            add(name, backend, shape, partial(time_graph, bench, name, backend, shape), "CUDA graph: ")
    found.append(
        Case("kernels of plain attention", partial(baseline_kernels, bench, shapes), about={"what": "kernels"})
    )
    for name, backend, shape in slow:
        add(name, backend, shape, partial(time_backend, bench, name, backend, shape))
    for shape in shapes:
        add(PLAIN, "flex", shape, partial(time_flex, bench, shape))
    return found


def _triton_algorithms(bench: Bench, shapes: tuple[Shape, ...]) -> list[tuple[str, Shape]]:
    """What the table of ``gpu/measured.py`` is made of: every algorithm at every shape, and causal with few heads."""
    if bench.tiny:
        return [("single_pass", shapes[1]), ("wavefront", shapes[1])]
    causal = ("wavefront", "single_pass", "general")
    found = [(name, shape) for shape in (shapes[1], FEW_HEADS, shapes[3], shapes[2]) for name in causal]
    return [*found, ("short", shapes[0]), ("general", shapes[0])]


def words(shape: Shape) -> str:
    """``causal (8, 12, 2048, 64)``."""
    return f"{'causal' if shape.is_causal else 'bidirectional'} {shape.size}"


def plain(inputs: Inputs) -> torch.Tensor:
    """The baseline: one call, by the kernel that PyTorch chooses."""
    return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=inputs.is_causal)


def baseline_choice(bench: Bench, shapes: tuple[Shape, ...], seconds_left: float) -> dict[str, Any]:
    """Which of its kernels ``scaled_dot_product_attention`` chooses for each shape."""
    names = {kernel.value: name for name, kernel in SDPA_KERNELS.items()}
    values = {}
    for shape in shapes:
        inputs, _ = draw_on(bench, PLAIN, shape).with_leaves()
        query, key, value = inputs.query, inputs.key, inputs.value
        choice = int(torch._fused_sdp_choice(query, key, value, None, 0.0, inputs.is_causal))
        values[words(shape)] = names.get(choice, str(choice))
    return values


def baseline_kernels(bench: Bench, shapes: tuple[Shape, ...], seconds_left: float) -> dict[str, Any]:
    """The names of what runs on the device for plain attention: they tell which implementation of flash it is."""
    if bench.device == "cpu":
        raise Refused("there are no kernels on the CPU")
    return {words(shape): _kernel_names(partial(plain, draw_on(bench, PLAIN, shape))) for shape in shapes}


def _kernel_names(call: Callable[[], object]) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sorted({event.key[:160] for event in profiler.key_averages() if event.device_type.name == "CUDA"})


def draw_on(bench: Bench, name: str, shape: Shape) -> Inputs:
    """A filter's inputs in bfloat16, drawn on the device itself: moving them there takes longer than timing them."""
    generator = torch.Generator(bench.device).manual_seed(0)
    batch, heads, length, width = shape.size

    def random(rows: int) -> torch.Tensor:
        """``[rows, heads, length, width]``, laid out as a model's projections leave it."""
        size = (rows, length, heads, width)
        return torch.randn(size, generator=generator, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)

    query, key, value, gradient = (random(batch) for _ in range(4))
    features = None
    if FILTERS[name].positions == "untied":
        features = (random(1) * width**-0.25, random(1) * width**-0.25)
    elif FILTERS[name].positions == "gaussian":
        left, right = gaussian_features(query)
        features = (left.to(query), right.to(query))
    return Inputs(query, key, value, gradient, shape.is_causal, features)


def calls_for(run: Attend, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Direction -> a call to time."""
    with_leaves, leaves = inputs.with_leaves()
    return direction_calls(partial(run, with_leaves), leaves, inputs.gradient)


def event_clock(counts: Mapping[Callable[[], object], int]) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call, by CUDA events around as many of them in a row as ``counts`` says."""

    def clock(call: Callable[[], object]) -> float:
        calls = counts[call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / calls

    return clock


def time_against_plain(
    bench: Bench, mine: Attend, inputs: Inputs, shape: Shape, products: tuple[float, float], budget: float
) -> dict[str, Any]:
    """Times of a method and of plain attention, interleaved, by direction.

    Args:
        bench: where.
        mine: the method.
        inputs: what it filters.
        shape: theirs.
        products: N x N products of a head's width that the filter needs at least, forward and backward.
        budget: seconds for the rounds of a direction.
    """
    values: dict[str, Any] = {"directions": {}}
    candidates = {PLAIN: calls_for(plain, inputs), "mine": calls_for(mine, inputs)}
    for direction in DIRECTIONS:
        calls = {name: found[direction] for name, found in candidates.items()}
        clock = None
        if bench.device == "cuda":
            clock = event_clock({call: calls_in_a_sample(call) for call in calls.values()})
        spreads = interleave(calls, PLAIN, budget=budget, device=bench.device, clock=clock)
        found = spreads["mine"].fields()
        found["plain_milliseconds"] = spreads[PLAIN].milliseconds
        for name, key, least in ((PLAIN, "plain_tflops", (2.0, 5.0)), ("mine", "tflops", products)):
            work = least[0] + (least[1] if direction != "forward" else 0.0)
            found[key] = work * product_flops(shape) / (spreads[name].milliseconds / 1000) / 1e12
        found["peak_mib"] = peak_memory(calls["mine"], bench.device)
        found["plain_peak_mib"] = peak_memory(calls[PLAIN], bench.device)
        values["directions"][direction] = found
    return values


def calls_in_a_sample(call: Callable[[], object]) -> int:
    """How many calls in a row are long enough to be timed; compiles, tunes and warms up on the way."""
    for _ in range(2):
        call()
    seconds = event_clock({call: 3})(call)
    return max(1, min(_MOST_CALLS, math.ceil(_SAMPLE / max(seconds, 1e-6))))


def product_flops(shape: Shape) -> float:
    """Operations of one product of N x N by N x d, the hidden half of a causal one left out."""
    batch, heads, length, width = shape.size
    return 2.0 * batch * heads * length**2 * width * (0.5 if shape.is_causal else 1.0)


def time_backend(bench: Bench, name: str, backend: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """A filter on one of this package's back-ends, compared with the same filter by SDPA calls before it is timed."""
    if bench.device == "cpu" and backend == "flex":
        raise Refused("FlexAttention has no backward pass on the CPU")
    inputs, by_sdpa = draw_on(bench, name, shape), None if backend == "sdpa" else attend(name, "sdpa")
    return _compared_and_timed(bench, attend(name, backend), by_sdpa, inputs, shape, FILTERS[name].products)


def time_delta(bench: Bench, backend: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """``delta`` with beta = 1, which Triton's kernels lack; by SDPA calls it is a block of rows after another."""

    def run(inputs: Inputs, backend: str = backend) -> torch.Tensor:
        tensors = inputs.query, inputs.key, inputs.value
        return filter_attention(*tensors, is_causal=True, boosting="delta", backend=backend)

    inputs, by_sdpa = draw_on(bench, PLAIN, shape), None if backend == "sdpa" else partial(run, backend="sdpa")
    return _compared_and_timed(bench, run, by_sdpa, inputs, shape, _PRODUCTS_OF_DELTA)


def _compared_and_timed(
    bench: Bench,
    run: Attend,
    by_sdpa: Attend | None,
    inputs: Inputs,
    shape: Shape,
    products: tuple[float, float],
) -> dict[str, Any]:
    """A method's times and, first, how far it is from the same filter by SDPA calls, if that is another method."""
    values: dict[str, Any] = {}
    if by_sdpa is not None:
        with torch.no_grad():
            difference = relative_error(run(inputs), by_sdpa(inputs))
        values["difference_from_sdpa"] = difference
        if not difference <= DISAGREEMENT:
            raise Wrong(f"differs from the same by SDPA calls by {difference:.2g}, allowed {DISAGREEMENT}", values)
    budget = 0.0 if bench.tiny else 0.4
    return values | time_against_plain(bench, run, inputs, shape, products, budget)


def time_triton(bench: Bench, algorithm: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """Twicing by one algorithm of the Triton kernels; the back-end ``triton`` chooses one itself."""
    inputs, by_sdpa = draw_on(bench, "twicing", shape), attend("twicing", "sdpa")
    return _compared_and_timed(bench, triton_algorithm(algorithm), by_sdpa, inputs, shape, FILTERS["twicing"].products)


def time_flash(bench: Bench, implementation: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """Twicing by two SDPA calls of another flash implementation, in units of plain attention by PyTorch's own.

    The switch between them is the whole process's, so that the two are not timed in the same rounds.
    """
    inputs, run = draw_on(bench, "twicing", shape), attend("twicing", "sdpa")

    def timed() -> dict[str, Any]:
        return time_against_plain(bench, run, inputs, shape, FILTERS["twicing"].products, 0.4)

    usual = timed()
    flash.activate(implementation)
    try:
        values = timed()
    finally:
        restore_flash_attention_impl()
    for direction, found in values["directions"].items():
        plain_milliseconds = usual["directions"][direction]["plain_milliseconds"]
        for name in ("ratio", "ratio_low", "ratio_high"):
            found[name] *= found["plain_milliseconds"] / plain_milliseconds
        found["plain_milliseconds"] = plain_milliseconds
    return values


def time_dropout(bench: Bench, name: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """A filter by the Triton kernels with dropout, one mask for all steps, against plain attention without."""
    inputs = draw_on(bench, name, shape)
    budget = 0.0 if bench.tiny else 0.4
    return time_against_plain(bench, with_dropout(name), inputs, shape, FILTERS[name].products, budget)


def time_kernel(bench: Bench, kernel: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """Plain attention forced to one SDPA kernel, against PyTorch's own choice."""
    inputs = draw_on(bench, "plain", shape)
    with_leaves, _ = inputs.with_leaves()
    forced(kernel, plain)(with_leaves)  # says why, if the kernel does not take it

    def run(given: Inputs) -> torch.Tensor:
        with sdpa_kernel(SDPA_KERNELS[kernel]):  # without `forced`: catching warnings would be timed, too
            return plain(given)

    budget = 0.0 if bench.tiny else 0.3
    return time_against_plain(bench, run, inputs, shape, (2.0, 5.0), budget)


def time_flex(bench: Bench, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """FlexAttention itself with a causal block mask, made once: what a FlexAttention back-end could reach at best."""
    from torch.nn.attention.flex_attention import create_block_mask

    if bench.device == "cpu":
        raise Refused("FlexAttention has no backward pass on the CPU")
    inputs, length = draw_on(bench, "plain", shape), shape.length
    block_mask = None
    if shape.is_causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=bench.device)

    def run(given: Inputs) -> torch.Tensor:
        output: torch.Tensor = compiled_flex()(given.query, given.key, given.value, block_mask=block_mask)
        return output

    return time_against_plain(bench, run, inputs, shape, (2.0, 5.0), 0.3)


def time_graph(bench: Bench, name: str, backend: str, shape: Shape, seconds_left: float) -> dict[str, Any]:
    """Forward calls captured as a CUDA graph: what the device takes when nobody has to launch anything."""
    if bench.device == "cpu":
        raise Refused("there are no CUDA graphs on the CPU")
    inputs = draw_on(bench, name, shape)
    graphs = {}
    for candidate, run in ((PLAIN, plain), ("mine", attend(name, backend))):
        forward = calls_for(run, inputs)["forward"]
        for _ in range(3):  # compiles and tunes, which cannot be captured
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        graphs[candidate] = graph
    calls: dict[str, Callable[[], object]] = {candidate: graph.replay for candidate, graph in graphs.items()}
    spreads = interleave(
        calls, PLAIN, budget=0.3, device=bench.device, clock=event_clock(dict.fromkeys(calls.values(), 10))
    )
    return {**spreads["mine"].fields(), "plain_milliseconds": spreads[PLAIN].milliseconds}
