"""A filter's call for a few new tokens with cached streams: whether the kernels for decoding serve it, and how."""

from __future__ import annotations

from typing import Any

import torch

from ..models.backend_call import Content, FilterCall
from ..models.backend_sdpa import augment
from ..models.boost_operators import extra_streams
from ..models.cache_streams import boost_stream
from . import composed
from .checks import tensors_of

LINEAR = ("none", "twicing", "learned", "diffusion", "sos")
"""Boosters whose new rows the kernels compute themselves."""
MOST_TOKENS = 16
MOST_STREAMS = 3


def applies(call: FilterCall) -> bool:
    """Whether they serve a call that the back-end does not refuse: few new tokens, streams given, no gradient wanted.

    A cache that does not hand out its streams (one of fixed size, another library's) leaves the call to ``composed``.
    """
    tokens, known = call.query.shape[-2], call.key.shape[-2]
    if not call.streams.is_cached or not tokens < known or tokens > MOST_TOKENS or call.own_value is not None:
        return False
    if call.own_softmax is not None:
        return False
    if call.dropout > 0.0 or call.booster.name not in LINEAR or tokens * call.groups > 64:
        return False
    if _wants_gradient(call):  # in whatever is learned, bandwidths among it
        return False
    needed = extra_streams(call.booster.name, call.booster.steps)
    given = call.past_streams() if needed else []
    if needed > MOST_STREAMS or len(given) < needed:
        return False
    shape = (*call.query.shape[:2], known - tokens, call.value.shape[-1])
    fits = all(rows.shape == shape and rows.dtype == call.query.dtype for rows in given[:needed])
    gain = call.booster.gain
    return fits and not _wants_gradient(tuple(given)) and (gain is None or gain.shape == (call.query.shape[1], 1, 1))


def _wants_gradient(part: Any) -> bool:
    """Whether gradients are on and any tensor of a tuple, or of tuples in it, requires one."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(part))


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call to which this applies: ``[batch, heads, length, d]``; stores the booster's streams."""
    from .decode import Cached, decode_attention

    name, steps, gain = call.booster
    needed = extra_streams(name, steps)
    streams = call.past_streams()[:needed] if needed else []
    # Keys that nobody sees are not read, whatever stands there: zeroing them would copy the cache for every token.
    seen = call._replace(visibility=call.visibility._replace(hidden=None, blind=None))
    by_place, rest = composed.split_terms(seen)
    given = augment(rest._replace(content=Content("dot_product", call.content.scale)), call.query.dtype)
    out, rows = decode_attention(
        given.query,
        Cached(given.key, call.value, streams),
        boosting=name,
        steps=steps,
        gain=gain,
        scale=given.scale,
        is_causal=call.visibility.hides_later_keys,
        key_mask=composed.key_mask(call),
        positions=by_place,
        key_bias=composed.key_bias(seen),
    )
    for number, new in enumerate(rows):
        call.streams.append(boost_stream(number + 1), new)
    return out
