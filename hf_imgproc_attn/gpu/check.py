"""What a GPU has to say about the kernels: ``python -m hf_imgproc_attn.gpu.check [--output FILE]``.

Compiles and tunes them on the CUDA device, compares outputs and gradients with float64, times them against
``scaled_dot_product_attention`` in the same process (once: plain attention; twice: twicing without these kernels),
prints a table and writes a JSON file. Exit status: 0 if every error is within its bound, 1 if not, 2 without a CUDA
device or without Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import install_hint

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Bench = Callable[[Callable[[], None]], float]
"""Milliseconds of a call."""

ERROR_BOUND = 2.0
"""Largest error over that of two SDPA calls in the same dtype, both against float64."""


@dataclass(frozen=True)
class Case:
    """A shape ``[batch, heads, length, head_dim]`` and the algorithms that serve it."""

    batch: int
    heads: int
    length: int
    head_dim: int
    is_causal: bool
    algorithms: tuple[str, ...]

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Query, key, value and the output's gradient, laid out as a model's projections leave them."""
        torch.manual_seed(0)
        shape = (self.batch, self.length, self.heads, self.head_dim)
        return [torch.randn(shape, device=device).transpose(1, 2).to(dtype) for _ in range(4)]


CORRECT = (
    Case(2, 3, 37, 32, False, ("general", "short")),
    Case(2, 3, 197, 64, False, ("general", "short")),
    Case(1, 2, 300, 96, False, ("general",)),
    Case(2, 3, 37, 32, True, ("general", "single_pass")),
    Case(2, 3, 1000, 64, True, ("general", "single_pass")),
    Case(1, 2, 515, 128, True, ("general", "single_pass")),
)
TIMED = (
    Case(64, 12, 197, 64, False, ("short", "general")),  # ViT-B, 224 px
    Case(8, 12, 2048, 64, True, ("general", "single_pass")),
    Case(32, 12, 1024, 64, True, ("general", "single_pass")),  # heads that fill the device
)


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_imgproc_attn.gpu.check", description="check the kernels")
    parser.add_argument("--output", type=Path, default=Path("kernels_check.json"), help="JSON file, overwritten")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print(f"error: the package triton is not installed: {install_hint('kernels')}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: no CUDA device: the kernels can only be measured on one", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    def bench(call: Callable[[], None]) -> float:
        return float(do_bench(call, warmup=100, rep=400, return_mode="median"))

    return measure(options.output, CORRECT, TIMED, torch.device("cuda"), bench)


def measure(
    output: Path, correct: tuple[Case, ...], timed: tuple[Case, ...], device: torch.device, bench: Bench
) -> int:
    """Compare and time the cases, print and write what was found; returns the exit status."""
    import triton

    errors = [row for case in correct for row in compare(case, device)]
    timings = [row for case in timed for row in time_case(case, device, bench)]
    worst = max(row["error_ratio"] for row in errors)
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {"hf_imgproc_attn": __version__, "torch": torch.__version__, "triton": triton.__version__},
        "error_bound": ERROR_BOUND,
        "errors": errors,
        "timings": timings,
    }
    for row in (*errors, *timings):
        print("  ".join(f"{name}={value}" for name, value in row.items() if name != "case"), " ", row["case"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['device']}: largest error {worst:.2f} x that of two SDPA calls; written to {output}")
    return 0 if worst <= ERROR_BOUND else 1


def candidates(case: Case, *, plain: bool) -> dict[str, Attention]:
    """Twicing by two SDPA calls and by each algorithm; with ``plain`` also one SDPA call, which is not twicing."""
    from .twicing import twicing_attention

    def once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    def twice(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        smooth = once(query, key, value)
        return smooth + once(query, key, value - smooth)

    def fused(algorithm: str) -> Attention:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return twicing_attention(query, key, value, is_causal=case.is_causal, algorithm=algorithm)

        return attend

    found: dict[str, Attention] = {"sdpa once": once} if plain else {}
    return found | {"sdpa twice": twice} | {name: fused(name) for name in case.algorithms}


def compare(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Errors of output, dQ, dK and dV against float64, over those of two SDPA calls."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        *inputs, grad = case.tensors(dtype, device)

        def results(
            attend: Attention, work: torch.dtype, inputs: list[torch.Tensor] = inputs, grad: torch.Tensor = grad
        ) -> list[torch.Tensor]:
            leaves = [tensor.detach().to(work).requires_grad_() for tensor in inputs]
            out = attend(*leaves)
            return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, leaves, grad.to(work)))]

        tried = candidates(case, plain=False)
        wanted = results(lambda query, key, value: _dense(query, key, value, case.is_causal), torch.float64)
        measured = {
            name: [
                float((got - want).abs().max() / want.abs().max())
                for got, want in zip(results(attend, dtype), wanted, strict=True)
            ]
            for name, attend in tried.items()
        }
        baseline = measured.pop("sdpa twice")
        for name, found in measured.items():
            ratio = max(mine / theirs for mine, theirs in zip(found, baseline, strict=True))
            rows.append(
                {
                    "algorithm": name,
                    "dtype": str(dtype),
                    "error_ratio": ratio,
                    "out_dq_dk_dv": found,
                    "case": asdict(case),
                }
            )
    return rows


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The formula itself, for float64."""
    from ..functional import filter_attention

    return filter_attention(query, key, value, is_causal=is_causal, boosting="twicing", backend="reference")


def time_case(case: Case, device: torch.device, bench: Bench) -> list[dict[str, Any]]:
    """Median milliseconds of every candidate and their ratio to one SDPA call, forward and forward + backward."""
    *inputs, grad = case.tensors(torch.bfloat16, device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    rows: list[dict[str, Any]] = []
    for direction in ("forward", "forward + backward"):
        milliseconds = {}
        for name, attend in candidates(case, plain=True).items():

            def call(attend: Attention = attend, direction: str = direction) -> None:
                if direction == "forward":
                    with torch.no_grad():
                        attend(*inputs)
                else:
                    torch.autograd.grad(attend(*leaves), leaves, grad)

            call()  # compiles and tunes
            milliseconds[name] = bench(call)
        for name, time in milliseconds.items():
            ratio = time / milliseconds["sdpa once"]
            rows.append(
                {
                    "candidate": name,
                    "direction": direction,
                    "milliseconds": time,
                    "over_sdpa_once": ratio,
                    "case": asdict(case),
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
