"""How tensors and arguments come to the Triton kernels; importing this module needs Triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .triton_tiles import INTERPRETED, Rows


def adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """The same with step 1 along the last dimension, which the kernels walk."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rows_of(tensor: torch.Tensor, group: int = 1) -> Rows:
    """A tensor ``[batch, heads, length, width]`` as kernels take it.

    Args:
        tensor: adjacent along its last dimension.
        group: query heads that share one of its heads.
    """
    batch, head, row = tensor.stride()[:3]
    return Rows(tensor, batch, head, row, group)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels are launched on a tensor's device.

    Raises:
        ValueError: for a tensor that no kernel can reach.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if INTERPRETED:
        return contextlib.nullcontext()
    raise ValueError(f"the Triton kernels need tensors on a GPU, got {tensor.device}")


def launch(kernel: Any, grid: Any, arguments: dict[str, Any], **own: Any) -> None:
    """Start a kernel with those of the arguments that it takes.

    Args:
        kernel: compiled by Triton.
        grid: numbers of programs, or a function of the block sizes.
        arguments: by name; those that the kernel has none of are left out.
        own: likewise, before the others.
    """
    every = {**arguments, **own}
    kernel[grid](**{name: every[name] for name in kernel.arg_names if name in every})
