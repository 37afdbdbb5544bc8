"""Part b: every back-end that is there against float64, as multiples of plain attention's own error.

Outputs and gradients. The yardstick of a shape and a precision is one ``scaled_dot_product_attention`` as PyTorch
chooses it, on the same query, key and value. Twicing has norm up to 3 and rounds twice: it costs multiples of 2 to 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...gpu import supports
from ..benchmark.attention import Shape
from . import decoding
from .parts import Bench, Case, Refused, Wrong
from .tensors import BY_PLACE, FILTERS, Attend, Inputs, attend, by_place, draw, exact, relative_error, results

LARGEST_MULTIPLE = 16.0
"""Of plain attention's error; above it a result is wrong (the benchmark's bound)."""
LARGEST_YARDSTICK = {"bfloat16": 4e-2, "float16": 6e-3, "float32": 2e-5}
"""Plain attention's own relative error may be this much, some times a CPU's: a wrong yardstick would pass anything."""
PARTS = ("output", "dQ", "dK", "dV", "dt")
"""What is compared. t is the parameter of a position kernel, whose yardstick is that of dQ: both sum over dS."""

BIDIRECTIONAL = Shape(2, 3, 197, 64, is_causal=False)
CAUSAL = Shape(1, 2, 515, 64)
WIDE = Shape(1, 2, 300, 128)
# The kinds that part c times. They compile here, in several processes at once, for part c to find.
LONG = Shape(1, 2, 2048, 64)
LONG_WIDE = Shape(1, 2, 2048, 128)
TINY_BIDIRECTIONAL = Shape(2, 2, 19, 16, is_causal=False)
TINY_CAUSAL = Shape(1, 2, 21, 16)

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "maths": SDPBackend.MATH,
}
_FIRST = 8
"""Triton cases that come before all else: those whose kernels part c needs compiled."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Setting(NamedTuple):
    """What a case needs but for the method: filter, shape, dtype, device."""

    filter: str
    shape: Shape
    dtype: str
    device: str

    def __str__(self) -> str:
        kind = "causal" if self.shape.is_causal else "bidirectional"
        return f"{self.filter}, {kind} {self.shape.size}, {self.dtype}"


def cases(bench: Bench) -> list[Case]:
    """The cases: Triton first, which has never run on a device; FlexAttention last, which compiles longest."""
    device = bench.device
    shapes = (TINY_CAUSAL, TINY_BIDIRECTIONAL) if bench.tiny else (LONG, BIDIRECTIONAL)
    causal, bidirectional = (TINY_CAUSAL, TINY_BIDIRECTIONAL) if bench.tiny else (CAUSAL, BIDIRECTIONAL)
    found: list[Case] = []

    def add(method: str, run: Attend, name: str, shape: Shape, dtype: str, seconds: float = 60.0) -> None:
        setting = Setting(name, shape, dtype, device)
        backward = not (device == "cpu" and method.startswith("flex"))
        about = {
            "method": method,
            "backend": method.partition(" ")[0],
            "filter": name,
            "shape": list(shape.size),
            "is_causal": shape.is_causal,
            "dtype": dtype,
        }
        found.append(Case(f"{method}: {setting}", partial(compare, setting, run, backward), seconds, about))

    triton = _triton(bench)
    for name, shape, dtype, algorithm in triton[:_FIRST]:
        add(f"triton {algorithm}", triton_algorithm(algorithm, name), name, shape, dtype, 120.0)
    found += decoding.error_cases(bench)
    for shape in shapes:
        for name in ("plain", "twicing"):
            for kernel in SDPA_KERNELS:
                add(f"SDPA {kernel}", forced(kernel, attend(name, "sdpa")), name, shape, "bfloat16")
    for backend in ("sdpa", "blocked"):
        for dtype in DTYPES:
            for name in FILTERS:
                if FILTERS[name].positions in BY_PLACE and (backend == "sdpa" or dtype == "float16"):
                    continue
                if name != "plain" and (dtype != "float16" or name in ("twicing", "bilateral gaussian")):
                    add(backend, attend(name, backend), name, causal, dtype)
                    add(backend, attend(name, backend), name, bidirectional, dtype)
    for name, shape, dtype, algorithm in triton[_FIRST:]:
        add(f"triton {algorithm}", triton_algorithm(algorithm, name), name, shape, dtype, 120.0)
    from .composed import cases as composed  # they compare as this module does
    from .rivals import cases as rivals

    found += composed(bench) + rivals(bench, "triton")
    for kernel in SDPA_KERNELS:
        for name in ("bilateral untied", "bilateral gaussian", "additive bias"):
            add(f"SDPA {kernel}", forced(kernel, attend(name, "sdpa")), name, causal, "bfloat16")
    for options in (None, "FLASH"):
        words = "flex, called directly" + ("" if options is None else f", BACKEND={options}")
        for shape in shapes:
            add(words, _direct_flex(options), "plain", shape, "bfloat16", 120.0)
    for name in ("twicing", "bilateral untied", "twicing, hidden keys", "additive bias", *_PLACED_ON_FLEX):
        for shape in (causal, bidirectional):
            add("flex", attend(name, "flex"), name, shape, "bfloat16", 120.0)
    found += rivals(bench, "flex")
    setting = Setting("twicing, Gaussian by place", causal, "bfloat16", device)
    about = {**found[-1].about, "method": "flex, several lengths", "filter": setting.filter, "is_causal": True}
    run_all = partial(several_lengths, setting, device != "cpu")
    found.append(Case(f"flex, several lengths: {setting}", run_all, 120.0, {**about, "shape": list(causal.size)}))
    return found


_PLACED_ON_FLEX = ("twicing, Gaussian by place", "twicing, buckets by place")


def _triton(bench: Bench) -> list[tuple[str, Shape, str, str]]:
    """Filter, shape, dtype and algorithm of the Triton kernels' cases; part c's shapes are among them."""
    if bench.tiny:
        return [
            ("twicing", TINY_CAUSAL, "bfloat16", "single_pass"),
            ("twicing, hidden keys", TINY_CAUSAL, "float16", "general"),
            ("twicing", TINY_BIDIRECTIONAL, "float32", "general"),
            ("twicing, hidden keys", TINY_BIDIRECTIONAL, "bfloat16", "short"),
            ("twicing, Gaussian by place", TINY_CAUSAL, "bfloat16", "single_pass"),
            ("ALiBi by place", TINY_BIDIRECTIONAL, "float16", "general"),
            ("twicing, buckets by place", TINY_BIDIRECTIONAL, "bfloat16", "short"),
            ("twicing", TINY_CAUSAL, "bfloat16", "wavefront"),
        ]
    return [
        ("twicing", LONG, "bfloat16", "single_pass"),
        ("twicing", BIDIRECTIONAL, "bfloat16", "short"),
        ("twicing", LONG, "bfloat16", "wavefront"),
        ("twicing", LONG, "bfloat16", "general"),
        ("twicing", LONG_WIDE, "bfloat16", "single_pass"),
        ("twicing", LONG_WIDE, "bfloat16", "wavefront"),
        ("twicing", LONG_WIDE, "bfloat16", "general"),
        ("twicing", BIDIRECTIONAL, "bfloat16", "general"),
        ("twicing, Gaussian by place", LONG, "bfloat16", "single_pass"),
        ("twicing, Gaussian by place", LONG, "bfloat16", "wavefront"),
        ("twicing, Gaussian by place", LONG, "bfloat16", "general"),
        ("twicing, Gaussian by place", BIDIRECTIONAL, "bfloat16", "short"),
        ("ALiBi by place", CAUSAL, "float16", "general"),
        ("twicing, buckets by place", CAUSAL, "bfloat16", "single_pass"),
        ("twicing, buckets by place", BIDIRECTIONAL, "bfloat16", "short"),
        ("twicing, buckets by place", CAUSAL, "float16", "general"),
        ("twicing", CAUSAL, "float16", "single_pass"),
        ("twicing, hidden keys", CAUSAL, "bfloat16", "single_pass"),
        ("twicing, hidden keys", CAUSAL, "float16", "wavefront"),
        ("twicing, hidden keys", BIDIRECTIONAL, "bfloat16", "short"),
        ("twicing, hidden keys", BIDIRECTIONAL, "float16", "general"),
        ("twicing", Shape(1, 2, 300, 96, is_causal=False), "bfloat16", "general"),
        ("twicing", Shape(2, 3, 37, 32), "bfloat16", "single_pass"),
        ("twicing", Shape(2, 3, 37, 32, is_causal=False), "float16", "short"),
    ]


def triton_algorithm(algorithm: str, name: str = "twicing") -> Attend:
    """One algorithm of the kernels, for a filter, with a mask of keys if there is one."""
    boosting = "twicing" if FILTERS[name].steps > 1 else "none"

    def run(inputs: Inputs) -> torch.Tensor:
        query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
        reason = supports(query, key, value, is_causal=inputs.is_causal, attn_mask=mask, boosting=boosting)
        if reason is not None:
            raise Refused(f"triton {reason}")
        from ...gpu.fused import fused_attention

        hidden = None if mask is None else mask[:, 0, 0]
        options: dict[str, Any] = {"is_causal": inputs.is_causal, "algorithm": algorithm, "boosting": boosting}
        return fused_attention(query, key, value, hidden, positions=by_place(name, inputs), **options)

    return run


def forced(kernel: str, run: Attend) -> Attend:
    """A method whose SDPA calls may use one kernel only; why it does not take a call is part of the refusal."""

    def with_one_kernel(inputs: Inputs) -> torch.Tensor:
        with warnings.catch_warnings(record=True) as caught, sdpa_kernel(SDPA_KERNELS[kernel]):
            warnings.simplefilter("always")
            try:
                return run(inputs)
            except RuntimeError as error:
                if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                    raise
                reasons = [str(item.message).partition(" (Triggered")[0] for item in caught]
                raise Refused("; ".join([str(error), *dict.fromkeys(reasons)])[:600]) from error

    return with_one_kernel


def _direct_flex(backend: str | None) -> Attend:
    """FlexAttention itself, causal by a block mask; plain attention."""

    def run(inputs: Inputs) -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        device, length = inputs.query.device, inputs.query.shape[-2]
        block_mask = None
        if inputs.is_causal:
            block_mask = create_block_mask(_not_later, None, None, length, length, device=str(device))
        if device.type == "cpu":
            if backend is not None:
                raise Refused("kernel options mean nothing on the CPU")
            call: Callable[..., Any] = flex_attention
        else:
            call = compiled_flex()
        options = None if backend is None else {"BACKEND": backend}
        output: torch.Tensor = call(
            inputs.query, inputs.key, inputs.value, block_mask=block_mask, kernel_options=options
        )
        return output

    return run


def _not_later(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


@lru_cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention as it is used on a GPU, compiled for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


@lru_cache(maxsize=8)
def _truth(name: str, shape: Shape) -> tuple[Inputs, list[torch.Tensor]]:
    inputs = draw(name, shape)
    return inputs, results(lambda given: exact(name, given), inputs)


def _plain(inputs: Inputs) -> torch.Tensor:
    return scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=inputs.is_causal)


@lru_cache(maxsize=16)
def plain_errors(shape: Shape, dtype: str, device: str) -> list[float]:
    """Errors of PyTorch's own attention: output, dQ, dK, dV; at least the precision's epsilon."""
    inputs, truth = _truth("plain", shape)
    got = results(_plain, inputs.to(DTYPES[dtype], device))
    least = torch.finfo(DTYPES[dtype]).eps / 4
    return [max(relative_error(mine, wanted), least) for mine, wanted in zip(got, truth, strict=True)]


def compare(setting: Setting, run: Attend, backward: bool, seconds_left: float) -> dict[str, Any]:
    """Errors of a method, and as multiples of plain attention's."""
    inputs, truth = _truth(setting.filter, setting.shape)
    return against_plain(setting, results(run, inputs.to(DTYPES[setting.dtype], setting.device), backward), truth)


def against_plain(setting: Setting, got: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, Any]:
    """Errors of what was got, and as multiples of plain attention's.

    Raises:
        Wrong: for results that are off, or a yardstick that is.
    """
    yardstick = plain_errors(setting.shape, setting.dtype, setting.device)
    if not all(error <= LARGEST_YARDSTICK[setting.dtype] for error in yardstick):
        allowed = LARGEST_YARDSTICK[setting.dtype]
        raise Wrong(f"plain attention, the yardstick, is off itself: {yardstick}, allowed {allowed:.2g}", {})
    errors = {
        part: relative_error(mine, wanted) for part, mine, wanted in zip(PARTS, got, truth[: len(got)], strict=False)
    }
    yardstick = [*yardstick, yardstick[PARTS.index("dQ")]]
    multiples = {part: error / plain for (part, error), plain in zip(errors.items(), yardstick, strict=False)}
    values = {"errors": errors, "multiples": multiples}
    wrong = [part for part, multiple in multiples.items() if not multiple <= LARGEST_MULTIPLE]
    if wrong:
        raise Wrong(f"{wrong[0]}: {multiples[wrong[0]]:.3g} times plain attention's error", values)
    return values


def several_lengths(setting: Setting, backward: bool, seconds_left: float) -> dict[str, Any]:
    """FlexAttention as one process meets it, which compiles for the first length and then for all: the largest errors.

    Each length is compared as by :func:`compare`.
    """
    batch, heads, length, width = setting.shape.size
    run = attend(setting.filter, "flex")
    found = []
    for more in (0, 3, 5, 11):
        shape = Shape(batch, heads, length + more, width, is_causal=setting.shape.is_causal)
        found.append(compare(setting._replace(shape=shape), run, backward, seconds_left))
    return max(found, key=lambda values: max(values["multiples"].values()))
