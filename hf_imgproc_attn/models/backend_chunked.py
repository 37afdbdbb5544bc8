"""The reference in chunks: blocks of queries whose dense weights are made anew for each pass, and again for gradients.

For what no fused call computes, such as logits with a soft cap or weights other than softmax: slower than
``blocked``, in memory O(chunk * key_length). ``backend_reference`` is its truth, and computes each block. Where A is
causal a block has no keys after its own queries. In a graph of ``torch.compile`` the weights are made once, and what
their gradients need is kept, in memory O(length * key_length).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .backend_call import FilterCall, is_transformed, without_autocast
from .backend_reference import delta_system, filter_logits, filter_matrix
from .backend_sdpa_delta import refuses as delta_refuses
from .cache_streams import boost_stream
from .kernel_content import working_dtype
from .kernel_position import keys_of_positions, rows_of_positions
from .visibility import Visibility

BLOCK_SCORES = 2**22
"""Weights of a block, over batch and heads: 16 MiB in single precision."""

Again = Callable[..., torch.Tensor]
"""Calls a function with arguments, and again in the backward pass where its results are not kept."""


def _run_once(function: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
    return function(*given)


def refuses(call: FilterCall) -> str | None:
    """Why the chunks cannot serve a call, as the rest of a sentence about them, or None if they can."""
    return delta_refuses(call) if call.is_sequential else None


def run(call: FilterCall, *, block_rows: int | None = None) -> torch.Tensor:
    """The back-end ``chunked``: ``[batch, heads, length, d]`` in the value's dtype.

    Args:
        call: what to compute.
        block_rows: queries of a block. None: as many as have :data:`BLOCK_SCORES` weights.
    """
    batch, heads, length, _ = call.query.shape
    rows_at_once = block_rows or max(1, BLOCK_SCORES // max(1, batch * heads * call.key.shape[-2]))
    blocks = [slice(start, min(start + rows_at_once, length)) for start in range(0, length, rows_at_once)]
    allowed = None if _is_cut_by_causality(call) else call.visibility.allowed(call.query.device)
    parts = [_rows_of(call, block, allowed) for block in blocks]
    # One mask for all passes, drawn again where a block is computed again.
    seed = int(torch.randint(2**62, ())) if call.dropout else 0
    dtype, compute_dtype = call.value.dtype, working_dtype(call.value.dtype)
    _, value = call.repeated()
    # Nothing is saved by computing the only block again, and ``torch.func`` has no checkpoints. In a graph of any
    # length numbers are inputs, which those that only a checkpoint reads do not become.
    is_traced = torch.compiler.is_compiling() or is_transformed((call.query, call.key, call.value))
    is_kept = len(parts) < 2 or is_traced
    again: Again = _run_once if is_kept else partial(checkpoint, use_reentrant=False)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(compute_dtype)
        smooth = [
            again(_smooth, part, rows[..., : part.key.shape[-2], :], seed + number)
            for number, part in enumerate(parts)
        ]
        return torch.cat(smooth, dim=-2) if smooth else rows[..., :0, :]

    with without_autocast(call.query.device.type):
        if call.is_sequential:
            return attend(_corrected(call, blocks, parts, seed, again)).to(dtype)
        return call.boost(attend, call.new_value.to(compute_dtype), value).to(dtype)


def _corrected(
    call: FilterCall, blocks: list[slice], parts: list[FilterCall], seed: int, again: Again
) -> torch.Tensor:
    """What ``delta`` applies A to: u of all keys, 0 where nobody sees them, block after block."""
    value, name = call.new_value, boost_stream(1)
    past = call.key.shape[-2] - value.shape[-2]
    earlier = call.streams.earlier(name, value) if past else None
    known = [] if earlier is None else [earlier]
    for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        given = (part, block.start + past, value[..., block, :], seed + number, *known)
        known.append(again(_solved, *given))
    every = torch.cat(known, dim=-2) if known else value
    if call.streams.is_cached:
        call.streams.append(name, every[..., past:, :])
    return call.visibility.clean_keys(every)


def _solved(call: FilterCall, first: int, value: torch.Tensor, seed: int, *known: torch.Tensor) -> torch.Tensor:
    """u of the block whose tokens begin at key ``first``; ``known``: those of the keys before."""
    logits = filter_logits(call)
    with without_autocast(logits.device.type):
        kept = _kept(logits, call.dropout, seed) if call.dropout else None
        system = delta_system(logits, call, kept, slice(first, first + value.shape[-2]))
        return system.solve(value, torch.cat(known, dim=-2) if known else None)


def _kept(matrix: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """What dropout multiplies a block's weights with."""
    generator = torch.Generator(matrix.device).manual_seed(seed % 2**63)
    return torch.empty_like(matrix).bernoulli_(1.0 - dropout, generator=generator) / (1.0 - dropout)


def _smooth(call: FilterCall, rows: torch.Tensor, seed: int) -> torch.Tensor:
    """A of one block applied to ``[batch, heads, key_length, d]``; ``seed`` is that of its dropout mask."""
    logits = filter_logits(call)
    with without_autocast(logits.device.type):
        matrix = filter_matrix(logits, call.visibility, call.sinks, call.normalisation)
        if call.dropout:
            matrix = matrix * _kept(matrix, call.dropout, seed)
        if call.by_weights is not None:
            return call.by_weights.apply(matrix, rows, call.repeated()[0].to(rows.dtype))
        return torch.matmul(matrix, rows)


def _is_cut_by_causality(call: FilterCall) -> bool:
    """Whether causality and padding say who is seen, so that later keys can be left out."""
    seen = call.visibility
    return seen.hides_later_keys and seen.mask is None and call.own_value is None and seen.key_length >= seen.length


def _rows_of(call: FilterCall, block: slice, allowed: torch.Tensor | None) -> FilterCall:
    """The call of some queries, which see what the mask says."""
    whole = call

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.shape[-2] == 1 else x[..., block, :]

    seen, scale = call.visibility, call.content.scale
    query = call.query[..., block, :]
    positions = tuple(rows_of_positions(term, block) for term in call.positions)
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
    call = call._replace(
        query=query, content=call.content._replace(scale=scale), visibility=visibility, positions=positions
    )
    if call.by_weights is not None:
        call = call._replace(by_weights=call.by_weights.of_rows(block))
    gain = call.booster.gain
    if call.is_sequential and gain is not None and gain.shape[-2] > 1:
        call = call._replace(booster=call.booster._replace(gain=gain[..., block, :]))
    return call if allowed is not None or not _is_cut_by_causality(whole) else _without_later_keys(call, seen, block)


def _without_later_keys(call: FilterCall, seen: Visibility, block: slice) -> FilterCall:
    """The call of a block without the keys after its last query, of which causality hides those it has to."""
    keys = seen.key_length - seen.length + block.stop

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.shape[-1] == 1 else x[..., :keys]

    return call._replace(
        key=call.key[..., :keys, :],
        value=call.value[..., :keys, :],
        positions=tuple(keys_of_positions(term, keys) for term in call.positions),
        visibility=call.visibility._replace(
            key_length=keys,
            causal=True,
            keys=cut(seen.keys),
            hidden=cut(seen.hidden),
            bias=cut(call.visibility.bias),
        ),
    )
