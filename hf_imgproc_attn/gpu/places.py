"""From a layer's position kernel to what the Triton kernels read, and which kernels they know."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..models.kernel_blocks import DistanceKernel
from ..models.kernel_position import BlockedPositions
from ..models.kernel_relative import BucketKernel, relative_buckets
from .triton_positions import BUCKETS, DISTANCE, SQUARED, Places, nearest_kernel

NEAREST_BLOCK = 64


class PositionTensors(NamedTuple):
    """A position kernel as the operator takes it; see ``triton_positions``.

    kind: 0 for none, else the number of its formula.
    class_tokens: leading tokens without a place.
    coordinates: float32 ``[batch or 1, length, axes]``.
    key_coordinates: of all keys, likewise, or None where every query stands at the place of its own key.
    parameters: float32 ``[heads, count]``, differentiable.
    lookup: int32, the bucket of each offset, or None.
    """

    kind: int = 0
    class_tokens: int = 0
    coordinates: torch.Tensor | None = None
    key_coordinates: torch.Tensor | None = None
    parameters: torch.Tensor | None = None
    lookup: torch.Tensor | None = None


def position_tensors(
    positions: BlockedPositions | None, query: torch.Tensor, key_length: int | None = None
) -> PositionTensors:
    """What the operator takes of a position kernel.

    Args:
        positions: what the kernel compares, or None.
        query: ``[batch, heads, length, head_dim]``, for which it must be.
        key_length: number of keys; None: as many as queries.

    Raises:
        ValueError: for a kernel that has no formula in ``triton_positions``, or one of other tokens or heads.
    """
    if positions is None:
        return PositionTensors()
    batch, heads, length, _ = query.shape
    for name, places, tokens in (
        ("coordinates", positions.coordinates, length),
        ("key_coordinates", positions.key_coordinates, length if key_length is None else key_length),
    ):
        if places.shape[0] not in (1, batch) or places.shape[1] != tokens:
            raise ValueError(
                f"positions.{name} must have shape [{batch} or 1, {tokens}, axes], got {tuple(places.shape)}"
            )
    for parameter in positions.parameters():
        if parameter.shape[0] != heads:
            raise ValueError(
                f"parameters of positions must have one row for each of {heads} heads, "
                f"got shape {tuple(parameter.shape)}"
            )
    kernel, lookup = positions.block_kernel(), None
    if isinstance(kernel, DistanceKernel):
        kind = SQUARED.value if kernel.squared else DISTANCE.value
    elif isinstance(kernel, BucketKernel):
        kind, lookup = BUCKETS.value, bucket_lookup(kernel, positions.coordinates.device)
    else:
        raise ValueError(f"positions must be Gaussian, ALiBi or relative buckets, got {type(positions).__name__}")
    parameters = torch.cat([parameter.float().flatten(1) for parameter in positions.parameters()], dim=1)
    coordinates, key_coordinates = positions.coordinates, positions.key_coordinates
    are_own_keys = coordinates is key_coordinates
    if coordinates.dtype != torch.float32:  # only differences matter, and only small ones need their digits
        origin = key_coordinates[:, -1:].double()
        coordinates, key_coordinates = ((x.double() - origin).float() for x in (coordinates, key_coordinates))
    return PositionTensors(
        kind,
        0 if positions.class_tokens is None else positions.class_tokens.num_tokens,
        coordinates.contiguous(),
        None if are_own_keys else key_coordinates.contiguous(),
        parameters,
        lookup,
    )


def bucket_lookup(kernel: BucketKernel, device: torch.device) -> torch.Tensor:
    """The bucket of the offsets 0, -1, ..., -reach, then of the positive offsets that are cut off to 0, 1, ..., reach.

    Returns:
        int32 ``[2 (reach + 1)]``; farther offsets have the bucket of the last one.
    """
    distance = torch.arange(kernel.boundaries[-1] + 1, device=device)
    # A positive fraction is cut off to 0 and yet in the first bucket behind the query.
    positive = (distance + 0.5).to(torch.float64)
    return torch.cat(
        [relative_buckets(offset, kernel.boundaries, kernel.bidirectional) for offset in (-distance, positive)]
    ).to(torch.int32)


def make_places(
    position: PositionTensors,
    key_bias: torch.Tensor | None,
    key_bias_grad: torch.Tensor | None,
    heads: int,
    query_bias: torch.Tensor | None = None,
) -> Places | None:
    """What the kernels read, but for the nearest keys, or None where nothing is added to the logits.

    Args:
        position: what the operator was given.
        key_bias: float32 ``[batch, heads, key_length]``, or None.
        key_bias_grad: where its gradient goes, or None.
        heads: of the queries.
        query_bias: float32 ``[batch, heads, length]``, beside a key bias, or None.
    """
    coordinates, parameters = position.coordinates, position.parameters
    bias, of_queries = (None if x is None else x.contiguous() / math.log(2.0) for x in (key_bias, query_bias))
    if coordinates is None or parameters is None:
        return None if bias is None else _only_keys(bias, key_bias_grad, heads, of_queries)
    key_coordinates = coordinates if position.key_coordinates is None else position.key_coordinates
    axes = coordinates.shape[2]
    own = parameters.shape[1] - 3 * (position.class_tokens > 0)
    query_step, key_step = (x.shape[1] * axes if x.shape[0] > 1 else 0 for x in (coordinates, key_coordinates))
    return Places(
        queries=coordinates,
        keys=key_coordinates,
        query_step=query_step,
        key_step=key_step,
        nearest=coordinates,
        parameters=parameters / math.log(2.0),
        lookup=coordinates if position.lookup is None else position.lookup,
        key_bias=coordinates if bias is None else bias,
        key_bias_grad=coordinates if key_bias_grad is None else key_bias_grad,
        query_bias=coordinates if of_queries is None else of_queries,
        heads=heads,
        key_length=key_coordinates.shape[1],
        has_nearest=tl.constexpr(False),
        has_key_bias=tl.constexpr(bias is not None),
        has_query_bias=tl.constexpr(of_queries is not None),
        axes=tl.constexpr(axes),
        count=tl.constexpr(parameters.shape[1]),
        class_tokens=tl.constexpr(position.class_tokens),
        buckets=tl.constexpr(own // axes),
        entries=tl.constexpr(triton.next_power_of_2(own)),
        reach=tl.constexpr(0 if position.lookup is None else position.lookup.numel() // 2 - 1),
    )


def with_nearest(
    places: Places, position: PositionTensors, key_mask: torch.Tensor | None, batch: int, is_causal: bool
) -> Places:
    """The same with the nearest visible key of each query, where a query may not see itself.

    Args:
        places: what the kernels read.
        position: what the operator was given.
        key_mask: uint8 ``[batch, key_length]``, or None where all keys are visible.
        batch: items of the batch.
        is_causal: whether query i sees keys j <= i only.
    """
    sees_itself = key_mask is None and position.key_coordinates is None
    if position.coordinates is None or position.kind == BUCKETS.value or sees_itself:
        return places
    length = position.coordinates.shape[1]
    nearest = torch.empty(batch, length, dtype=torch.float32, device=position.coordinates.device)
    arguments: dict[str, Any] = {
        "places": places,
        "mask_pointer": nearest if key_mask is None else key_mask,
        "nearest_pointer": nearest,
        "length": length,
        "POSITION": position.kind,
        "CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
        "BLOCK": NEAREST_BLOCK,
    }
    nearest_kernel[(triton.cdiv(length, NEAREST_BLOCK) * batch,)](**arguments)
    return places._replace(nearest=nearest, has_nearest=tl.constexpr(True))


def _only_keys(bias: torch.Tensor, grad: torch.Tensor | None, heads: int, query_bias: torch.Tensor | None) -> Places:
    """A number for each key, and maybe each query; the other fields, which no kernel looks at, hold anything."""
    none = tl.constexpr(0)
    fields: dict[str, Any] = dict.fromkeys(Places._fields, bias)
    fields |= dict.fromkeys(("axes", "count", "class_tokens", "buckets", "entries", "reach", "has_nearest"), none)
    fields |= {"query_step": 0, "key_step": 0, "key_bias_grad": bias if grad is None else grad, "heads": heads}
    fields["key_length"] = bias.shape[2]
    fields |= {"has_key_bias": tl.constexpr(True), "has_query_bias": tl.constexpr(query_bias is not None)}
    return Places(**fields if query_bias is None else {**fields, "query_bias": query_bias})
