"""The kernel of the Hub loaded beside the package, in Triton's interpreter: part of ``interpreter_worker``."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_imgproc_attn.gpu.decode import Cached, decode_attention
from hf_imgproc_attn.gpu.fused import fused_attention
from hf_imgproc_attn.gpu.hub_kernel import VARIANT, build


def load(variant: Path) -> Any:
    """As ``kernels.get_kernel`` does: by path, under a name that nothing else has."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def hub_kernel() -> dict[str, Any]:
    """Largest differences from the package's own operators, output and gradients, and an operator's full name."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        kernel = load(Path(folder) / "build" / VARIANT)
        generator = torch.Generator().manual_seed(3)
        query, key, value, grad = (torch.randn(1, 2, 21, 16, generator=generator) for _ in range(4))
        found = []
        for attend in (kernel.fused_attention, fused_attention):
            leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            out = attend(*leaves, is_causal=True)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        for decode, cached in ((kernel.decode_attention, kernel.Cached), (decode_attention, Cached)):
            out, rows = decode(query[:, :, -1:], cached(key, value, [grad[:, :, :-1]]))
            found[decode is decode_attention] += [out, *rows]
        differences = [float((mine - own).abs().max()) for mine, own in zip(*found, strict=True)]
    operator = kernel.fused_attention.__globals__["fused_forward"]._qualname
    return {"hub_kernel": {"differences": differences, "operator": operator}}
