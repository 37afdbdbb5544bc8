"""The reference in chunks: blocks of queries whose dense weights are made anew for each pass, and again for gradients.

For what no fused call computes, such as logits with a soft cap: slower than ``blocked``, in memory
O(chunk * key_length). ``backend_reference`` is its truth, and computes each block.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from .backend_call import FilterCall, without_autocast
from .backend_reference import filter_logits, filter_matrix
from .kernel_content import working_dtype
from .visibility import Visibility

BLOCK_SCORES = 2**22
"""Weights of a block, over batch and heads: 16 MiB in single precision."""


def refuses(call: FilterCall) -> str | None:
    """Why the chunks cannot serve a call, as the rest of a sentence about them, or None if they can."""
    if call.dropout:
        return "draws a new dropout mask at every pass, and gradients need the same one"
    if len(call.positions) > 0:
        return "takes no position kernels, which are not cut into blocks of queries here"
    return None


def run(call: FilterCall, *, block_rows: int | None = None) -> torch.Tensor:
    """The back-end ``chunked``: ``[batch, heads, length, d]`` in the value's dtype.

    Args:
        call: what to compute.
        block_rows: queries of a block. None: as many as have :data:`BLOCK_SCORES` weights.
    """
    batch, heads, length, _ = call.query.shape
    rows_at_once = block_rows or max(1, BLOCK_SCORES // max(1, batch * heads * call.key.shape[-2]))
    blocks = [slice(start, min(start + rows_at_once, length)) for start in range(0, length, rows_at_once)]
    allowed = call.visibility.allowed(call.query.device)
    parts = [_rows_of(call, block, allowed) for block in blocks]
    dtype, compute_dtype = call.value.dtype, working_dtype(call.value.dtype)
    _, value = call.repeated()

    def attend(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(compute_dtype)
        if len(parts) < 2:  # nothing is saved by computing the only block again
            return torch.cat([_smooth(part, rows) for part in parts], dim=-2) if parts else rows[..., :0, :]
        return torch.cat([checkpoint(_smooth, part, rows, use_reentrant=False) for part in parts], dim=-2)

    with without_autocast(call.query.device.type):
        return call.boost(attend, call.new_value.to(compute_dtype), value).to(dtype)


def _smooth(call: FilterCall, rows: torch.Tensor) -> torch.Tensor:
    """A of one block applied to ``[batch, heads, key_length, d]``."""
    logits = filter_logits(call)
    with without_autocast(logits.device.type):
        return torch.matmul(filter_matrix(logits, call.visibility, call.sinks), rows)


def _rows_of(call: FilterCall, block: slice, allowed: torch.Tensor | None) -> FilterCall:
    """The call of some queries, which see what the mask says."""

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.shape[-2] == 1 else x[..., block, :]

    seen, scale = call.visibility, call.content.scale
    if isinstance(scale, torch.Tensor) and scale.ndim == 4 and scale.shape[-2] == seen.length:
        scale = scale[..., block, :]
    visibility = Visibility(
        block.stop - block.start,
        seen.key_length,
        mask=cut(allowed),
        bias=cut(seen.bias),
        hidden=seen.hidden,
        blind=cut(seen.blind),
    )
    query = call.query[..., block, :]
    return call._replace(query=query, content=call.content._replace(scale=scale), visibility=visibility)
