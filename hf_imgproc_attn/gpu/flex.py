"""The back-end ``flex``: PyTorch's FlexAttention, one call a booster pass, with any mask and bias.

On a CUDA device the calls are compiled to a fused kernel. Mask and bias are looked up inside it, and position kernels
of places (Gaussian, ALiBi, buckets) and numbers of tokens (``forget``, ``sinkhorn``) are added inside it, so that no
bias of length x key_length is formed (:mod:`.flex_scores`). Blocks that causality hides are left out by a block mask,
made once for each length. A sink takes its share of the output afterwards, by the rows' log-sum-exp. On the CPU
FlexAttention runs dense and forward only, which is enough to test it.

*Compiling.* A kernel is compiled for each kind of call (precision, heads, width, what is hidden and added, whether
gradients are wanted), and one more for all lengths together once there is a second one. PyTorch's limit of 8 kinds,
behind which it would run dense without a word, is raised to ``MAX_KINDS``; behind that a call is an error.
*Not measured* on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..models.backend_call import FilterCall, autocast_dtype, without_autocast
from ..models.backend_sdpa import augment
from ..models.visibility import Visibility
from .checks import backward_only, tensors_of
from .flex_scores import Place, look_up, number_score, place_score, score_of
from .token_numbers import split_numbers

NO_STREAMS = "does not hand out the streams that a cache of boosted attention keeps"


def refuses(call: FilterCall) -> str | None:
    """Why FlexAttention cannot serve a call, as the rest of a sentence about it, or None if it can."""
    reason = call._replace(sinks=None).own_softmax
    if reason is not None:
        return reason
    if call.in_order is not None:
        return call.in_order
    if call.streams.is_cached and call.is_boosted:
        return NO_STREAMS
    if call.dropout > 0.0:
        return f"drops nothing out, got dropout_p={call.dropout}"
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(call))
    if needs_gradient and call.query.device.type == "cpu":
        return "has no backward pass on the CPU"
    return backward_only(call)


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]`` in the value's dtype."""
    dtype = autocast_dtype(call.query)
    by_place, rest = call.split_positions()
    numbers, rest = split_numbers(rest)
    query, key, scale, bias = augment(rest, dtype)
    _, value = call.repeated()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(call.groups, dim=1)
    if call.visibility.bias is not None:
        bias = call.visibility.bias if bias is None else bias + call.visibility.bias
    if bias is not None and call.ignores_row_constants:
        # A number a row changes no softmax, and a large one would leave the products no digits.
        bias = bias - call.visibility.largest_seen(bias)
    terms = [number_score(each) for each in numbers]
    if bias is not None:
        terms.append(partial(look_up, bias))
    if by_place is not None:
        terms.append(place_score(by_place))
    blocks = _causal_blocks(call.visibility, key.device)
    seen, hidden_rows = visible_places(call.visibility, key.device, but_causality=blocks is not None)
    score = score_of(seen, terms)
    attention = _attention(query.device.type)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        with without_autocast(query.device.type):
            out, log_sum = attention(query, key, rows.to(dtype), score, blocks, scale, call.sinks is not None)
            if call.sinks is not None and log_sum is not None:
                # One more key, of value 0, leaves this share to the others.
                kept = torch.sigmoid(log_sum - call.sinks.to(log_sum.dtype).view(-1, 1))
                out = (out * kept.unsqueeze(-1)).to(out.dtype)
        return out if hidden_rows is None else out.masked_fill(hidden_rows, 0.0)

    return call.boost(attend, call.new_value, value).to(call.value.dtype)


def _four_axes(x: torch.Tensor) -> torch.Tensor:
    return x.view((1,) * (4 - x.ndim) + tuple(x.shape))


def visible_places(
    visibility: Visibility, device: torch.device, *, but_causality: bool = False
) -> tuple[Place | None, torch.Tensor | None]:
    """Whether a query sees a key, as FlexAttention asks it, and the queries that see none (``[..., length, 1]``).

    Args:
        visibility: who sees whom.
        device: of the answer.
        but_causality: whether later keys are hidden elsewhere.

    None stands for "all" and for "no query". Padding and causality are told from the places: no mask of
    length x key_length is formed. A row of nothing but -inf has no softmax, so that queries which see nothing see
    everything here; their output has to be set to 0.
    """
    if visibility.hides_nothing:
        return None, None
    past = visibility.key_length - visibility.length
    if visibility.hides_only_padding:
        keys = visibility.keys
        if keys is None:
            return None if but_causality else lambda b, h, i, j: j <= i + past, None
        some = keys.long().cumsum(-1).mT[..., past:, :] > 0 if visibility.causal else keys.any(-1, keepdim=True)
        hidden_rows = ~some

        def see(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
            seen = look_up(keys, b, h, i, j)
            if visibility.causal and not but_causality:
                seen = seen & (j <= i + past)
            return seen | look_up(hidden_rows, b, h, i, j)

        return see, hidden_rows
    allowed = visibility.allowed(device)
    if allowed is None:
        return None, None
    hidden_rows = ~allowed.any(-1, keepdim=True)
    every = _four_axes(allowed | hidden_rows)
    return lambda b, h, i, j: look_up(every, b, h, i, j), hidden_rows


BLOCK = 128
"""Rows and columns of the blocks that a block mask leaves out or keeps."""


def _causal_blocks(visibility: Visibility, device: torch.device) -> BlockMask | None:
    """The block mask of a causal call, or None where causality hides nothing or a graph is being traced."""
    length, key_length = visibility.length, visibility.key_length
    if not visibility.hides_later_keys or length > key_length or torch.compiler.is_compiling():
        return None
    with torch.inference_mode(False):  # what is remembered may be used in training
        return causal_block_mask(length, key_length, device)


@lru_cache(maxsize=64)
def causal_block_mask(length: int, key_length: int, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries sees, in part or as a whole.

    Counted rather than found in a mask of all pairs, as ``create_block_mask`` does: of (length / 128)^2 numbers.

    Args:
        length: queries, the last ones of the tokens.
        key_length: keys, at least as many.
        device: of the block mask.
    """
    past = key_length - length
    first_query = torch.arange(-(-length // BLOCK), device=device).view(-1, 1) * BLOCK
    first_key = torch.arange(-(-key_length // BLOCK), device=device) * BLOCK
    is_inside = (first_query + BLOCK <= length) & (first_key + BLOCK <= key_length)
    is_full = is_inside & (first_key + BLOCK - 1 <= first_query + past)
    is_part = (first_key <= (first_query + BLOCK - 1).clamp(max=length - 1) + past) & ~is_full

    def listed(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks are kept, and which: those first, in order."""
        order = torch.argsort(~kept, dim=-1, stable=True)
        return kept.sum(-1).int()[None, None], order.int()[None, None]

    def sees(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return j <= i + past

    mask: BlockMask = BlockMask.from_kv_blocks(
        *listed(is_part), *listed(is_full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, key_length)
    )
    return mask


MAX_KINDS = 256
"""Of calls that kernels are compiled for in one process."""

Attention = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        "Callable[..., torch.Tensor] | None",
        "BlockMask | None",
        float,
        bool,
    ],
    tuple[torch.Tensor, "torch.Tensor | None"],
]
"""(query, key, value, score_mod, block_mask, scale, log_sum) to the output and, if wanted, the rows' log-sum-exp."""


@cache
def _attention(device_type: str) -> Attention:
    return compiled_attention() if device_type == "cuda" else _dense


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: Callable[..., torch.Tensor] | None,
    blocks: BlockMask | None,
    scale: float,
    log_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    options: dict[str, Any] = {"score_mod": score, "block_mask": blocks, "scale": scale}
    if not log_sum:
        return flex_attention(query, key, value, **options), None
    output, beside = flex_attention(query, key, value, **options, return_aux=AuxRequest(lse=True))
    return output, beside.lse


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with warnings.catch_warnings():  # it advises to compile
        warnings.simplefilter("ignore")
        # It refuses leaves that require a gradient on the CPU, even under no_grad; here none is wanted.
        return _flex(query.detach(), key.detach(), value.detach(), *options)


def compiled_attention(backend: Any = "inductor") -> Attention:
    """FlexAttention compiled for every kind of call, up to ``MAX_KINDS``; then a call raises RuntimeError.

    Args:
        backend: of ``torch.compile``.
    """
    # One graph or an error: else a call that is not compiled would run dense.
    fused = torch.compile(_flex, backend=backend, fullgraph=True)

    def attend(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.compiler.is_compiling():
            return _flex(*arguments)
        limits = {"recompile_limit": MAX_KINDS, "accumulated_recompile_limit": MAX_KINDS}
        for tensor in arguments[:3]:  # one kernel serves all lengths, but not all heads and widths
            torch._dynamo.mark_static(tensor, 1)
            torch._dynamo.mark_static(tensor, 3)
        try:
            with torch._dynamo.config.patch(limits):
                return fused(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"filter_backend='flex' compiles at most {MAX_KINDS} kinds of calls in one process, and this is one "
                "more; choose filter_backend='auto', or call torch.compiler.reset() first"
            ) from error

    return attend
