"""What happens without a GPU, as JSON: refusals, and the Triton kernels compiled for compute capability 9.0.

The operator itself is called, so that arguments are bound and specialised as they would be before a launch.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver, jit

from hf_imgproc_attn.gpu import supports
from hf_imgproc_attn.models.kernel_position import BlockedPositions, ClassTokens, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries

LENGTH = 300


class NoDevice:
    """A driver without a device, which Triton asks for what it compiles for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands in for launching: compiles each kernel with one of its configurations.

    The last one has the largest blocks, which need most shared memory; the first one compiles soonest.
    """

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.label, self.configuration = "", -1
        self.launch = jit.JITFunction.run

    def tuned(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel.nargs = {}
        configuration = kernel.prune_configs(kwargs)[self.configuration]
        self.compile(kernel.fn, *args, grid=grid, warmup=True, **kwargs, **configuration.all_kwargs())

    def compile(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = self.launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        self.found.append(
            {
                "kernel": kernel.__name__,
                "case": self.label,
                "products": binary.asm["ttir"].count("tt.dot"),
                "shared_memory": binary.metadata.shared,
                "acquires": len(re.findall(r"\.global\.gpu\.acquire\.", binary.asm["ptx"])),
                "releases": len(re.findall(r"\.global\.gpu\.release\.", binary.asm["ptx"])),
                "warp_products": binary.asm["ptx"].count("mma.sync"),
                "warp_group_products": binary.asm["ptx"].count("wgmma.mma_async"),
                "bytes": len(binary.asm["cubin"]),
            }
        )


def positions(kind: str, heads: int, length: int) -> BlockedPositions | None:
    """Learned ones, with class tokens where the kernel has two axes."""
    axes = 2 if kind == "gaussian" else 1
    places = torch.arange(length * axes, dtype=torch.float32).view(1, length, axes)
    class_tokens = ClassTokens(1, torch.zeros(heads, 3)) if axes == 2 else None
    scale = torch.ones(heads, 1, 1, requires_grad=True)
    if kind == "gaussian":
        return GaussianPositions(places, places, scale, class_tokens, 1.0, True, False)
    if kind == "alibi":
        return AlibiPositions(places, places, scale.detach(), class_tokens, 1.0, False, False)
    if kind == "buckets":
        table = torch.zeros(heads, axes, 32, requires_grad=True)
        return BucketPositions(places, places, table, class_tokens, bucket_boundaries(32, 128), False)
    return None


def refusals() -> list[str]:
    """Of a call by the package, and by the operator, which the package has not imported for that."""
    query = torch.zeros(1, 1, 2, 16)
    found = [str(supports(query, query, query)), str("hf_imgproc_attn.gpu.fused" in sys.modules)]
    from hf_imgproc_attn.gpu.fused import fused_attention

    try:
        fused_attention(query, query, query)
    except ValueError as error:
        found.append(str(error))
    return found


def composed(compiler: Compiler) -> None:
    """The filter applied once: two widths, fewer queries than keys, masks and lengths, dropout, positions."""
    from hf_imgproc_attn.gpu.once import apply_once
    from hf_imgproc_attn.gpu.once_inputs import Once

    cases = [(256, 64, "gaussian", True, -1, "softmax"), (64, 64, "none", True, -1, "softpick")]
    if "--full" in sys.argv:
        cases += [
            (128, 64, "gaussian", True, -1, "sink"),
            (256, 256, "none", False, -1, "sigmoid"),
            (40, 128, "buckets", False, 0, "softmax"),
        ]
    for width, value_width, kind, masked, configuration, normalisation in cases:
        compiler.label = f"once, {kind}, {width}, {value_width}, {normalisation}"
        compiler.configuration = configuration
        query, key, x = (
            torch.zeros(2, heads, length, size, dtype=torch.bfloat16, requires_grad=True)
            for heads, length, size in ((2, 100, width), (1, LENGTH, width), (1, LENGTH, value_width))
        )
        once = Once(query, key, 0.125, is_causal=masked)
        if masked:
            bias, seed = torch.zeros(2, 2, LENGTH, requires_grad=True), torch.zeros(1, dtype=torch.int64)
            once = once._replace(
                key_mask=torch.ones(2, LENGTH, dtype=torch.bool), key_bias=bias, dropout=0.1, seed=seed
            )
            if normalisation != "softmax":
                once = once._replace(query_bias=torch.zeros(2, 2, 100, requires_grad=True))
        else:
            once = once._replace(key_mask=torch.tensor([LENGTH, 7], dtype=torch.int32))
        if normalisation == "sink":
            once = once._replace(sinks=torch.zeros(2, requires_grad=True))
        else:
            once = once._replace(normalisation=normalisation)
        places = positions(kind, 2, LENGTH)
        if places is not None:
            places = places._replace(coordinates=places.coordinates[:, LENGTH - 100 :])
        apply_once(once._replace(positions=places), x).sum().backward()


def decoding(compiler: Compiler) -> None:
    """One token of a wide group with three streams: the tiles that need most shared memory."""
    from hf_imgproc_attn.gpu.decode import Cached, decode_attention

    compiler.label, compiler.configuration = "decoding", 0
    query, key = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, LENGTH, 128, dtype=torch.bfloat16)
    stream = torch.zeros(1, 8, LENGTH - 1, 128, dtype=torch.bfloat16)
    decode_attention(query, Cached(key, key, [stream] * 3), steps=4)


def main() -> None:
    compiler, refused = Compiler(), refusals()
    from hf_imgproc_attn.gpu import fused, launching

    driver.set_active(NoDevice())
    autotuner.Autotuner.run = lambda kernel, *args, **kwargs: compiler.tuned(kernel, *args, **kwargs)
    jit.JITFunction.run = lambda kernel, *args, **kwargs: compiler.compile(kernel, *args, **kwargs)
    launching.INTERPRETED = True  # tensors of the CPU stand in for a GPU's
    for algorithm, kind, boosting, key_heads in (
        ("general", "gaussian", "twicing", 1),
        ("general", "buckets", "none", 2),
        ("short", "alibi", "twicing", 2),
        ("single_pass", "none", "twicing", 2),
        ("wavefront", "none", "twicing", 2),
    ):
        compiler.label = f"{algorithm}, {kind}, {boosting}"
        compiler.configuration = 0 if kind == "buckets" else -1
        length = 256 if algorithm == "short" else LENGTH
        query, key, value = (
            torch.zeros(1, heads, length, 64, dtype=torch.bfloat16, requires_grad=True)
            for heads in (2, key_heads, key_heads)
        )
        mask = torch.ones(1, length, dtype=torch.bool) if kind == "gaussian" else None
        options: dict[str, Any] = {"boosting": boosting, "algorithm": algorithm, "is_causal": algorithm != "short"}
        if kind == "gaussian":
            options["key_bias"] = torch.zeros(1, 2, length, requires_grad=True)
        out = fused.fused_attention(query, key, value, mask, positions=positions(kind, 2, length), **options)
        out.sum().backward()
    composed(compiler)
    decoding(compiler)
    print(json.dumps({"refused": refused, "binaries": compiler.found}))


if __name__ == "__main__":
    main()
