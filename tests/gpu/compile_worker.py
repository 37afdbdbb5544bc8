"""Compiles the Triton kernels for compute capability 9.0, which needs no GPU, and prints what came out as JSON."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_imgproc_attn.gpu import triton_general, triton_short, triton_single_pass

CONSTANTS = {"HEAD_DIM": 64, "BLOCK_D": 64, "HALF": 128, "HAS_MASK": True, "ADD_DQ": True}
FLOATS = ("lse_pointer", "delta_pointer", "dq_sum_pointer")


def compile_kernel(name: str, kernel: Any, config: Any, constants: dict[str, Any]) -> dict[str, Any]:
    function = kernel.fn
    blocks = {"BLOCK_N": 256} if name == "short_backward_kernel" else {}
    known = {**constants, **blocks, **config.kwargs}
    types, aligned = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in known:
            types[argument] = "constexpr"
        elif argument.endswith("_pointer"):
            types[argument] = "*u8" if argument == "mask_pointer" else "*fp32" if argument in FLOATS else "*bf16"
        else:
            types[argument] = "fp32" if argument in ("scale", "softmax_scale") else "i32"
        if argument.endswith(("_pointer", "_b", "_h", "_n")) and types[argument] != "constexpr":
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(key),): value for key, value in known.items() if key in function.arg_names}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(function, types, values, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "kernel": name,
        "constants": {key: value for key, value in known.items() if key in function.arg_names},
        "shared_memory": binary.metadata.shared,
        "warp_group_products": binary.asm["ptx"].count("wgmma.mma_async"),
        "bytes": len(binary.asm["cubin"]),
    }


def kernels(module: ModuleType) -> dict[str, Any]:
    return {name: item for name, item in vars(module).items() if name.endswith("_kernel")}


def main() -> None:
    found = []
    for module in (triton_general, triton_short, triton_single_pass):
        for name, kernel in kernels(module).items():
            # The largest blocks need most shared memory.
            found.append(
                compile_kernel(name, kernel, kernel.configs[-1], {**CONSTANTS, "CAUSAL": True, "WITH_DQ": True})
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
