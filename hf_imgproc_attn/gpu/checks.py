"""What the fused operators accept: names of their algorithms, and checks of their tensors. No Triton here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

ALGORITHMS = ("auto", "general", "short", "single_pass", "wavefront")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


BACKWARD_ONLY = (
    "has derivatives in backward mode alone, and serves neither forward mode nor the transforms of torch.func; choose "
    "another back-end, such as 'blocked', for them"
)


def tensors_of(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of a call, or of any tuples and lists, however deep."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (tuple, list)):
        for each in part:
            yield from tensors_of(each)


def backward_only(*parts: Any) -> str | None:
    """Why kernels cannot serve tensors, of tuples and lists, that are differentiated some other way than backwards.

    The rest of a sentence about the kernels; None if they can. An operator would lose the tangents without a word.
    (Asked as in ``models.backend_call``, which a kernel of the Hub does not take along.)
    """
    if torch.compiler.is_compiling():
        return None
    unpack = torch.autograd.forward_ad.unpack_dual
    has_tangent = any(unpack(tensor).tangent is not None for tensor in tensors_of(parts))
    return BACKWARD_ONLY if has_tangent or torch._C._are_functorch_transforms_active() else None


def check_backward_only(*parts: Any) -> None:
    """Refuse tensors that are differentiated some other way than backwards; as :func:`backward_only`."""
    reason = backward_only(*parts)
    if reason is not None:
        raise ValueError(f"the kernel {reason}")


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """Refuse tensors that the kernels would misread."""
    fit = key.shape == value.shape and query.dim() == key.dim() == 4
    if not fit or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            "query, key and value must have one shape [batch, heads, length, head_dim], but for fewer heads of key "
            f"and value, got {shapes}"
        )
    if query.shape[1] % max(key.shape[1], 1):
        raise ValueError(f"heads of query must be a multiple of those of key, got {query.shape[1]}, {key.shape[1]}")
    if query.shape[-1] > 128:
        raise ValueError(f"head_dim must be <= 128, got {query.shape[-1]}")
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in _DTYPES:
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must be all float16, bfloat16 or float32, got {names}")
    if query.is_cuda and query.dtype == torch.float32:
        raise ValueError("on a GPU query, key and value must be float16 or bfloat16, got torch.float32")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (query.shape[0], query.shape[2])):
        raise ValueError(
            f"key_mask must be boolean [batch, length] = {(query.shape[0], query.shape[2])}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
