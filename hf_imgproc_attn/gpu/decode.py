"""``hf_imgproc_attn::decode_filter`` as a PyTorch operator: a few new tokens against a cache, by ``triton_decode``.

For inference only: it has no gradient. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from ..models.backend_flops import product_flops
from ..models.boost_operators import extra_streams
from ..models.kernel_position import BlockedPositions
from . import triton_decode
from .checks import check_backward_only
from .launching import adjacent, launch, on_device, rows_of
from .places import PositionTensors, make_places, position_tensors, with_nearest
from .triton_decode import BOOSTERS, MOST_QUERIES, MOST_STREAMS

MAX_WIDTH = 256
"""Of queries and keys, and of values."""
MOST_ROWS = 64
"""New tokens times the query heads of a key head: the rows of a tile."""
_SHORTEST_CHUNK = 128
_PROGRAMS_A_PROCESSOR = 2
_MOST_CHUNKS = 64


class Cached(NamedTuple):
    """What new tokens are compared with, all of it including their own rows; see :func:`decode_attention`.

    key: ``[batch, key_heads, key_length, width]``.
    value: ``[batch, key_heads, key_length, d]``.
    streams: what the booster applies A to after V, the rows of the cached tokens: each
        ``[batch, heads, key_length - length, d]``.
    """

    key: torch.Tensor
    value: torch.Tensor
    streams: Sequence[torch.Tensor] = ()


def decode_attention(
    query: torch.Tensor,
    cached: Cached,
    *,
    boosting: str = "twicing",
    steps: int = 2,
    gain: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_mask: torch.Tensor | None = None,
    positions: BlockedPositions | None = None,
    key_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A booster's output for the last tokens, and the rows that they add to its streams.

    Args:
        query: ``[batch, heads, length, width]``, at most 16 tokens; float16, bfloat16, or float32 in the interpreter.
        cached: keys, values and streams.
        boosting: ``none``, ``twicing``, ``learned``, ``diffusion`` or ``sos``; see ``boost_operators``.
        steps: of the booster, at most 4.
        gain: of ``learned``, float32 ``[heads, 1, 1]``; None: 1.
        scale: on q.k; None: width^-1/2.
        is_causal: whether no new token sees a later one.
        key_mask: boolean ``[batch, key_length]``, True = visible, or None. A token that sees no key gives 0.
        positions: Gaussian, ALiBi or relative buckets by place, or None.
        key_bias: added to all logits of a key, float32 ``[batch, heads, key_length]``, or None.

    Returns:
        ``[batch, heads, length, d]``, and for each stream ``[batch, heads, length, d]``, which are to be cached.

    Raises:
        ValueError: for what the kernels do not do, gradients among it.
    """
    _check(query, cached, boosting, steps, gain)
    check_backward_only(query, cached, gain, positions, key_bias)
    parameters = [] if positions is None else positions.parameters()
    learned = [x for x in (query, *cached[:2], *cached.streams, *parameters, gain, key_bias) if x is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned):
        raise ValueError("decoding has no gradient: no tensor may require one, unless under torch.no_grad()")
    place = position_tensors(positions, query, cached.key.shape[2])
    kind, class_tokens, *tensors = place
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        out, rows = decode_forward(
            query, cached.key, cached.value, list(cached.streams), gain, key_mask, key_bias, *tensors,
            kind, class_tokens, factor, is_causal, boosting,
        )  # fmt: skip
    return out, tuple(rows.unbind(0))


def _check(query: torch.Tensor, cached: Cached, boosting: str, steps: int, gain: torch.Tensor | None) -> None:
    """Refuse what the kernels would misread, or do not do."""
    if boosting not in BOOSTERS:
        raise ValueError(f"boosting must be one of {', '.join(BOOSTERS)}, got {boosting!r}")
    needed = extra_streams(boosting, steps)
    key, value, streams = cached
    if needed > MOST_STREAMS:
        raise ValueError(f"steps must be <= {MOST_STREAMS + 1}, got {steps}")
    if any(tensor.dtype != query.dtype for tensor in (key, value, *streams)):
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, value, *streams))
        raise ValueError(f"query, keys, values and streams must have one dtype, got {names}")
    if query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"on a GPU query must be float16 or bfloat16, got {query.dtype}")
    batch, heads, length, width = query.shape
    key_heads, key_length = key.shape[1:3]
    fits = key.shape == (batch, key_heads, key_length, width) and value.shape[:3] == key.shape[:3]
    fits = fits and len(streams) == needed and heads % max(key_heads, 1) == 0 and key_length > length
    if not fits or any(tensor.shape != (batch, heads, key_length - length, value.shape[3]) for tensor in streams):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value, *streams))
        raise ValueError(
            f"query, keys, values and {needed} streams of the cached tokens must fit each other, got {shapes}"
        )
    too_many = length > MOST_QUERIES or length * (heads // key_heads) > MOST_ROWS
    if too_many or max(width, value.shape[3]) > MAX_WIDTH:
        raise ValueError(
            f"new tokens must be at most {MOST_QUERIES}, times the heads that share a key {MOST_ROWS}, and widths at "
            f"most {MAX_WIDTH}, got {tuple(query.shape)} with {key_heads} key heads, values of {value.shape[3]}"
        )


def chunk_of(past: int, items: int, device: torch.device) -> int:
    """How many cached keys a program looks at: chunks enough to fill the device, none of them short.

    Args:
        past: cached keys.
        items: batch times key heads.
        device: whose multiprocessors are to be filled.
    """
    at_once = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(_MOST_CHUNKS, max(1, -(-_PROGRAMS_A_PROCESSOR * at_once // items)))
    if device.type != "cuda":
        wanted = _MOST_CHUNKS  # the interpreter: as many as there may be
    return max(_SHORTEST_CHUNK, triton.next_power_of_2(-(-past // wanted)))


def _outputs(query: torch.Tensor, value: torch.Tensor, streams: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """out, in memory ``[batch, length, heads, d]`` so that joining heads copies nothing, and the streams' new rows."""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(len(streams), batch, heads, length, value.shape[3])


@torch.library.custom_op("hf_imgproc_attn::decode_filter", mutates_args=())
def decode_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    streams: list[torch.Tensor],
    gain: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    key_coordinates: torch.Tensor | None,
    parameters: torch.Tensor | None,
    lookup: torch.Tensor | None,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosting: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, and the new rows of the streams, ``[streams, batch, heads, length, d]``."""
    query, key, value, *streams = (adjacent(tensor) for tensor in (query, key, value, *streams))
    out, rows = _outputs(query, value, streams)
    if out.numel() == 0:
        return out, rows
    batch, heads, length = query.shape[:3]
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    bias = None if key_bias is None else key_bias.contiguous() / math.log(2.0)
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    places = make_places(position, None, None, heads)
    sizes = _sizes(query, key, value, len(streams))
    with on_device(query):
        if places is not None:
            places = with_nearest(places, position, mask, batch, is_causal)
        arguments = _tensors(query, key, value, streams, sizes) | sizes
        arguments |= {
            "outputs": rows_of(out),
            "rows_pointer": rows,
            "mask_pointer": out if mask is None else mask,
            "bias_pointer": out if bias is None else bias,
            "gain_pointer": _gain(gain, boosting, out),
            "places": places,
            "scale": scale / math.log(2.0),
            "HAS_MASK": mask is not None,
            "HAS_BIAS": bias is not None,
            "POSITION": kind,
            "CAUSAL": is_causal,
            "BOOSTER": BOOSTERS[boosting].value,
        }
        programs = batch * key.shape[1] * sizes["chunks"]
        rows_of_a_tile = max(MOST_QUERIES, triton.next_power_of_2(length * sizes["GROUP"]))
        launch(triton_decode.decode_chunk_kernel, (programs,), arguments, ROWS=rows_of_a_tile)
        launch(triton_decode.decode_combine_kernel, (batch * heads,), arguments, ROWS=MOST_QUERIES)
    return out, rows


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: int) -> dict[str, int]:
    """Numbers that both kernels take."""
    batch, heads, length, width = query.shape
    key_heads, key_length, value_width = key.shape[1], key.shape[2], value.shape[3]
    chunk_length = chunk_of(key_length - length, batch * key_heads, query.device)
    return {
        "heads": heads,
        "items": batch * heads,
        "length": length,
        "key_length": key_length,
        "chunks": -(-(key_length - length) // chunk_length),
        "chunk_length": chunk_length,
        "WIDTH": width,
        "BLOCK_W": max(16, triton.next_power_of_2(width)),
        "VALUE_WIDTH": value_width,
        "BLOCK_V": max(16, triton.next_power_of_2(value_width)),
        "STREAMS": streams,
        "GROUP": heads // key_heads,
    }


def _tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, streams: list[torch.Tensor], sizes: dict[str, int]
) -> dict[str, Any]:
    """What is read, and where a chunk's results go; streams that there are none of are never looked at."""
    chunks = (sizes["items"], sizes["chunks"])
    partial = torch.empty(2, *chunks, sizes["length"], dtype=torch.float32, device=query.device)
    sums_of_each = (1 + len(streams), sizes["length"], sizes["VALUE_WIDTH"])
    of_streams = [rows_of(stream) for stream in streams] + [rows_of(value)] * (MOST_STREAMS - len(streams))
    return {
        "queries": rows_of(query),
        "keys": rows_of(key, sizes["GROUP"]),
        "values": rows_of(value, sizes["GROUP"]),
        **{f"stream_{number + 1}": stream for number, stream in enumerate(of_streams)},
        "highest_pointer": partial[0],
        "total_pointer": partial[1],
        "sums_pointer": torch.empty(*chunks, *sums_of_each, dtype=torch.float32, device=query.device),
    }


def _gain(gain: torch.Tensor | None, boosting: str, unread: torch.Tensor) -> torch.Tensor:
    """One number a head, or what nobody reads: most boosters have none, and filling one is a launch more."""
    if boosting != "learned":
        return unread
    if gain is None:
        return torch.ones(unread.shape[1], device=unread.device)
    return gain.float().flatten()


@decode_forward.register_fake
def _(
    query: Any,
    key: Any,
    value: Any,
    streams: Any,
    gain: Any,
    key_mask: Any,
    key_bias: Any,
    coordinates: Any,
    key_coordinates: Any,
    parameters: Any,
    lookup: Any,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosting: str,
) -> Any:
    return _outputs(query, value, streams)


@register_flop_formula(torch.ops.hf_imgproc_attn.decode_filter)
def decode_flops(
    query_shape: Any, key_shape: Any, value_shape: Any, stream_shapes: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits, and A's products with V and every stream."""
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(
        query_shape, key_shape, value_shape[-1], 1 + len(stream_shapes)
    )
