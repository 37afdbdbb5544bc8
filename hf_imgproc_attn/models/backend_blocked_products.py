"""Matrix products of the blocks, by the faster of the two libraries that torch has for them on a CPU.

torch multiplies matrices of single precision with MKL, which keeps to narrower instructions on processors that are not
Intel's. oneDNN, which torch is built with as well, takes the widest that there are. On an AMD EPYC (Zen 5) with one
thread, 128 rows, 1,024 keys and head width 64 it has 190 to 200 GFLOP/s, where MKL has 100. Dense matrices of single
precision reach it by one operator, the linear layer that ``torch.compile`` emits on CPUs: one matrix at a time, each
where its numbers stand side by side. Both work in single precision throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

LEAST_WORK = 2**21
"""Multiplications of a product, rows x keys x width, from which on oneDNN is worth a call for each matrix."""
MOST_THREADS = 8
"""With more, a batched product has a matrix for each of them."""

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x ``[rows, inner]``, w ``[columns, inner]``) -> x w^T."""

Room = Callable[[], torch.Tensor]
"""Gives memory of a product's shape; its content is what was there before."""


@lru_cache
def onednn_linear() -> Linear | None:
    """oneDNN's product, or None where it is not there, does not work or is not faster."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        probe = operator(torch.ones(2, 3), torch.full((4, 3), 0.5), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # another version of torch
        return None
    if not torch.equal(probe, torch.full((2, 4), 1.5)):
        return None
    return lambda x, w: operator(x, w, None, "none", [], "")


def suits_onednn(like: torch.Tensor, work: int) -> bool:
    """Whether a call's products go to oneDNN: all of them, since both directions must round logits alike.

    Args:
        like: a tensor of the dtype and device that products are computed in.
        work: multiplications of one product, rows x keys x width.
    """
    if like.dtype != torch.float32 or like.device.type != "cpu" or work < LEAST_WORK:
        return False
    return torch.get_num_threads() <= MOST_THREADS and onednn_linear() is not None


def multiply(left: torch.Tensor, right: torch.Tensor, room: Room | None = None, *, by_onednn: bool) -> torch.Tensor:
    """A batched product.

    Args:
        left: ``[pairs, rows, inner]``.
        right: ``[pairs, inner, columns]``.
        room: gives memory for the product, and is asked for it only where it is of use. None: there is none.
        by_onednn: as :func:`suits_onednn` said.

    Returns:
        ``[pairs, rows, columns]``.
    """
    linear = onednn_linear() if by_onednn else None
    if linear is None:
        return torch.bmm(left, right) if room is None else torch.bmm(left, right, out=room())
    left, right = _dense(left), _dense(right)
    if left.shape[0] == 1:
        return linear(left[0], right[0].mT).unsqueeze(0)
    out = left.new_empty(*left.shape[:2], right.shape[-1]) if room is None else room()
    for x, w, own in zip(left.unbind(), right.mT.unbind(), out.unbind(), strict=True):
        own.copy_(linear(x, w))
    return out


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a batched product to what stands in ``total``, ``[pairs, rows, columns]``, matrix by matrix by oneDNN."""
    linear = onednn_linear()
    if linear is None:
        total.baddbmm_(left, right)
        return
    for x, w, own in zip(_dense(left).unbind(), _dense(right).mT.unbind(), total.unbind(), strict=True):
        own.add_(linear(x, w))


def _dense(matrices: torch.Tensor) -> torch.Tensor:
    """The same with each matrix in one piece, its transpose being as good: oneDNN is slow with anything else."""
    rows, columns = matrices.stride()[-2:]
    is_dense = (rows, columns) in ((matrices.shape[-1], 1), (1, matrices.shape[-2]))
    return matrices if is_dense else matrices.contiguous()
