"""``delta`` from fused calls: u of some tokens at a time, each block from those before it, and A u at the end.

    u = v - beta A' u:   of a block of rows  A' u = A'_earlier u_earlier + A'_own u_own

Both parts come from ONE fused call, on values [u_earlier, 0; 0, I]: the first columns of its output are A'_earlier
u_earlier, the others the matrix A'_own itself, with whatever normalises the rows. A unit triangular solve of that
matrix gives the block's u. No matrix of length x length is formed; where there are gradients each block's call is made
once more in the backward pass, so that what is kept is linear in the length.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .backend_call import FilterCall, autocast_dtype, is_transformed, without_autocast
from .backend_sdpa import Augmented, additive_mask, augment, fused_call, with_sinks
from .backend_sdpa import run as run_sdpa
from .boost_delta import DenseDelta, hidden_rows
from .cache_streams import NO_STREAMS, boost_stream
from .kernel_content import working_dtype

BLOCK_ROWS = 64
"""Tokens that are solved at a time: as many columns beside V's."""


def refuses(call: FilterCall) -> str | None:
    """Why fused calls cannot serve a call of ``delta``, as the rest of a sentence, or None if they can."""
    if call.query.shape[-2] != call.key.shape[-2] and (call.streams.keeps_places_apart or not call.streams.is_cached):
        return "needs the streams of earlier keys"
    return None


def run(call: FilterCall) -> torch.Tensor:
    """``[batch, heads, length, d]`` in the value's dtype, or in autocast's where that is on."""
    dtype = autocast_dtype(call.query)
    products = augment(call, dtype)
    key, length, name = products.key, call.query.shape[-2], boost_stream(1)
    if key.shape[1] != call.query.shape[1]:
        key = key.repeat_interleave(call.groups, dim=1)
    products = products._replace(key=key)
    past = key.shape[-2] - length
    earlier = call.streams.earlier(name, call.new_value) if past else None
    blocks = [] if earlier is None else [earlier[..., :past, :].to(dtype)]
    new_value, hidden = call.new_value.to(dtype), hidden_rows(call.visibility, call.own_places)
    starts = range(0, length, BLOCK_ROWS)
    keeps_graph = torch.is_grad_enabled() and len(starts) > 1 and not torch.compiler.is_compiling()
    keeps_graph = keeps_graph and not is_transformed((call.query, call.key, call.value))
    for start in starts:
        rows = slice(start, min(start + BLOCK_ROWS, length))
        solve = partial(_solved, call, products, rows, new_value[..., rows, :], _cut(hidden, rows, -2))
        blocks.append(checkpoint(solve, *blocks, use_reentrant=False) if keeps_graph else solve(*blocks))
    solved = torch.cat(blocks, dim=-2) if blocks else new_value
    if call.streams.is_cached:
        call.streams.append(name, solved[..., past:, :])
    repeated = call.key if call.groups == 1 else call.key.repeat_interleave(call.groups, dim=1)
    filtered = call._replace(key=repeated, value=solved, streams=NO_STREAMS, own_value=None).plain()
    return run_sdpa(filtered)


def _solved(
    call: FilterCall,
    products: Augmented,
    rows: slice,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    *earlier: torch.Tensor,
) -> torch.Tensor:
    """u of some rows, ``[batch, heads, rows, d]``, in the dtype of their values."""
    count, width, dtype, working = value.shape[-2], value.shape[-1], value.dtype, working_dtype(value.dtype)
    unit = torch.eye(count, dtype=dtype, device=value.device).expand(*value.shape[:2], -1, -1)
    values = nn.functional.pad(unit, (width, 0))
    if earlier:
        known = torch.cat(earlier, dim=-2)
        unseen = _cut(call.visibility.hidden, slice(0, known.shape[-2]), -1)
        known = known if unseen is None else known.masked_fill(unseen.mT, 0.0)
        values = torch.cat((nn.functional.pad(known, (0, count)), values), dim=-2)
    both = _before(call, products, rows, values).to(working)
    rate = _cut(call.booster.gain, rows, -2)
    with without_autocast(value.device.type):
        read = both[..., :width] if rate is None else both[..., :width] * rate.to(working)
        system = DenseDelta(both[..., width:], rate, slice(0, count), hidden)
        return system.solve(value.to(working) - read).to(dtype)


def _before(call: FilterCall, products: Augmented, rows: slice, values: torch.Tensor) -> torch.Tensor:
    """A' of some rows times values of the keys up to them; 0 in rows without an earlier key."""
    keys, seen = slice(0, values.shape[-2]), call.visibility
    query, key, scale = products.query[..., rows, :], products.key[..., keys, :], products.scale

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return _cut(_cut(x, keys, -1), rows, -2)

    shown = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    shown = shown.tril(key.shape[-2] - query.shape[-2] - 1)[None, None]
    for mask in (cut(seen.keys), cut(seen.mask)):
        shown = shown if mask is None else shown & mask
    terms = [term for term in (cut(products.bias), cut(seen.bias)) if term is not None]
    bias = sum(terms[1:], terms[0]) if terms else None
    some = shown.any(-1, keepdim=True)
    if call.sinks is not None:
        query, key, scale = with_sinks(query, key, scale, call.sinks, in_front=False)
        values, shown = nn.functional.pad(values, (0, 0, 0, 1)), nn.functional.pad(shown, (0, 1), value=True)
        bias = None if bias is None else nn.functional.pad(bias.expand(*bias.shape[:-1], keys.stop), (0, 1))
    # A row of nothing but hidden keys has no softmax.
    mask = shown | ~shown.any(-1, keepdim=True)
    if bias is not None:
        mask, _ = additive_mask(bias.to(working_dtype(query.dtype)), mask, query.dtype)
    return fused_call(query, key, values, mask, False, scale, 0.0).masked_fill(~some, 0.0)


def _cut(x: torch.Tensor | None, part: slice, dim: int) -> torch.Tensor | None:
    """Some rows or columns; one that stands for all stays."""
    if x is None or x.shape[dim] == 1:
        return x
    return x[..., part, :] if dim == -2 else x[..., part]
