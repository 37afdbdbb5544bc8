"""One filter's call: what a layer and ``filter_attention`` build, and all that a back-end receives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .boost_by_parts import inversion_by_parts
from .boost_exclusive import exclusive_by_parts
from .boost_operators import BOOSTING, SEQUENTIAL, WITH_FACTORS, Attend, keep_rows
from .boost_weights import ByWeights
from .cache_streams import NO_STREAMS, Streams, boost_stream
from .kernel_content import CONTENT_COLUMNS, working_dtype
from .kernel_normalisation import Normalisation
from .kernel_position import BlockedPositions, Positions, is_by_place
from .spec_axes import MAX_BOOSTING_STEPS
from .visibility import Visibility, four_axes


class Content(NamedTuple):
    """The content kernel.

    kernel: key of ``CONTENT_LOGITS``.
    scale: 2/h_y^2, a number or broadcastable to the query ``[batch, heads, length, head_dim]``.
    softcap: c of logits that are bounded as c tanh(l / c), before positions and masks are added; None: not bounded.
    """

    kernel: str
    scale: torch.Tensor | float
    softcap: float | None = None


class Booster(NamedTuple):
    """How often, and how, A is applied.

    name: key of ``BOOSTING``, or ``"delta"``.
    steps: k >= 1.
    gain: gamma of ``learned`` or alpha and beta of ``inversion``, as ``boost_operators`` takes them, or beta of
        ``delta``, ``[heads, 1, 1]`` or ``[batch, heads, length, 1]``, or None.
    """

    name: str = "none"
    steps: int = 2
    gain: torch.Tensor | None = None


class Difference(NamedTuple):
    """A second map, of which lambda times is taken away from the first; see ``boost_differential``.

    query: ``[batch, heads, length, head_dim]``.
    key: ``[batch, heads, key_length, head_dim]`` of all tokens.
    share: lambda, ``[heads, 1, 1]`` in at least float32.
    """

    query: torch.Tensor
    key: torch.Tensor
    share: torch.Tensor


class FilterCall(NamedTuple):
    """One call of a filter, checked: output = p(A) V, with A made of content, positions and visibility.

    query: ``[batch, heads, length, head_dim]``, the last tokens.
    key: ``[batch, key_heads, key_length, head_dim]`` of all tokens; ``key_heads`` divides ``heads``.
    value: ``[batch, key_heads, key_length, d]`` of all tokens; d may differ from ``head_dim``.
    content: the content kernel.
    positions: terms that are added to the content's logits, often none or one.
    visibility: who sees whom.
    booster: how often A is applied.
    dropout: probability on A, one mask for all applications.
    streams: rows of earlier tokens that the booster needs, and where those of the new tokens go.
    sinks: ``[heads]``, the logit of one more key a head, whose value is 0: it takes weight from every row, so that the
        rows of A sum to less than 1. None: there is none.
    own_value: values of the queries' own tokens, ``[batch, key_heads, length, d]``; None where they are the last rows
        of ``value``. In a cache of fixed size they are not, and nothing but the mask tells which keys are there.
    normalisation: how logits become weights.
    difference: a second map to be taken away, or None.
    by_weights: a booster that looks at single weights, in place of ``booster``, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    content: Content
    visibility: Visibility
    positions: tuple[Positions, ...] = ()
    booster: Booster = Booster()
    dropout: float = 0.0
    streams: Streams = NO_STREAMS
    sinks: torch.Tensor | None = None
    own_value: torch.Tensor | None = None
    normalisation: Normalisation = Normalisation()
    difference: Difference | None = None
    by_weights: ByWeights | None = None

    @property
    def own_softmax(self) -> str | None:
        """Why back-ends whose weights are the plain softmax of the logits refuse, or None."""
        if self.by_weights is not None:
            return f"applies A as a whole, and boosting={self.by_weights.name!r} looks at its weights one by one"
        if self.content.softcap is not None:
            return "knows no logits with a soft cap"
        if self.normalisation.name != "softmax":
            return f"computes the weights of softmax only, got normalisation={self.normalisation.name!r}"
        return None if self.sinks is None else "knows no sinks"

    @property
    def ignores_row_constants(self) -> bool:
        """Whether a number that is added to a whole row of logits changes nothing."""
        return self.sinks is None and self.normalisation.ignores_row_constants

    @property
    def is_boosted(self) -> bool:
        """Whether A is applied more than once."""
        return self.booster.name != "none" or self.by_weights is not None

    @property
    def is_sequential(self) -> bool:
        """Whether rows are corrected one after the other, by ``delta``: :meth:`boost` is not for it."""
        return self.booster.name in SEQUENTIAL

    @property
    def in_order(self) -> str | None:
        """Why back-ends refuse that compute all rows at the same time, or None."""
        if not self.is_sequential:
            return None
        return f"computes all rows at the same time, and boosting={self.booster.name!r} needs those before for each"

    @property
    def own_places(self) -> slice | torch.Tensor:
        """Where the queries' own tokens stand among the keys."""
        return self.streams.own_places(self.query.shape[-2], self.key.shape[-2])

    @property
    def groups(self) -> int:
        """Query heads to a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def new_value(self) -> torch.Tensor:
        """V of the queries' own tokens, ``[batch, heads, length, d]``."""
        rows = self.own_value
        if rows is None:
            rows = self.value[..., self.key.shape[-2] - self.query.shape[-2] :, :]
        return rows if self.groups == 1 else rows.repeat_interleave(self.groups, dim=1)

    @property
    def has_columns(self) -> bool:
        """Whether anything but a plain inner product enters the logits."""
        # Not bool(): torch 2.11 cannot trace it on a tuple.
        return len(self.positions) > 0 or CONTENT_COLUMNS[self.content.kernel] is not None

    def split_positions(self) -> tuple[BlockedPositions | None, FilterCall]:
        """The term that is a function of places, for back-ends that compute it as they go, and the call without it."""
        by_place = next((term for term in self.positions if is_by_place(term)), None)
        return by_place, self._replace(positions=tuple(term for term in self.positions if term is not by_place))

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with as many heads as the queries; keys that no query sees are 0 (:meth:`boost` does V)."""
        key, value = self.visibility.clean_keys(self.key), self.value
        if self.groups == 1:
            return key, value
        return key.repeat_interleave(self.groups, dim=1), value.repeat_interleave(self.groups, dim=1)

    def boost(self, attend: Attend, new_value: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Apply the booster, storing and reading its streams.

        Args:
            attend: applies A to ``[batch, heads, key_length, d]``.
            new_value: of the queries' own tokens, ``[batch, heads, length, d]``.
            value: of all tokens, ``[batch, heads, key_length, d]``.

        Returns:
            ``[batch, heads, length, d]``.
        """

        def apply(rows: torch.Tensor) -> torch.Tensor:
            return attend(self.visibility.clean_keys(rows))

        def extend(index: int, rows: torch.Tensor) -> torch.Tensor:
            return self.streams.append(boost_stream(index + 1), rows)

        name, steps, gain = self.booster
        return BOOSTING[name](apply, extend, new_value, value, steps, gain)

    def plain(self) -> FilterCall:
        """The same without the booster."""
        return self.changed(booster=Booster())

    def changed(self, **fields: Any) -> FilterCall:
        """The same with other fields."""
        # Not `_replace`: where a traced graph breaks, torch 2.11 hands on an empty tuple, or fails to make it again.
        return FilterCall(**{**self._asdict(), **fields})

    def finish(self, smooth: torch.Tensor) -> torch.Tensor:
        """What a booster that applies A once makes of A V, ``[batch, heads, length, d]``; 0 in rows that see no key.

        Own values that no query sees count as 0: whatever stands there may be NaN.
        """
        seen, value = self.visibility, self.new_value
        if seen.hidden is not None and self.own_value is None and seen.key_length >= seen.length:
            value = value.masked_fill(seen.hidden[..., seen.key_length - seen.length :].mT, 0.0)
        # In half precision the factors of ``inversion``, near 1, would be rounded away.
        working = working_dtype(smooth.dtype)
        rows = self._finish_by_parts(smooth.to(working), value)
        if rows is None:
            name, steps, gain = self.booster
            rows = BOOSTING[name](lambda _: smooth.to(working), keep_rows, value, value, steps, gain)
        rows = rows.to(smooth.dtype)
        return rows if seen.blind is None else rows.masked_fill(seen.blind, 0.0)

    def _finish_by_parts(self, smooth: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
        gain, value = self.booster.gain, value.to(smooth.dtype)
        if is_transformed((smooth, value, gain)):
            return None
        if self.booster.name == "exclusive":
            return exclusive_by_parts(smooth, value)
        return None if gain is None else inversion_by_parts(smooth, value, gain)

    def maps(self) -> tuple[FilterCall, FilterCall | None]:
        """The call of the first map alone, and that of the second or None."""
        first, other = self.changed(difference=None), self.difference
        if other is None:
            return first, None
        value = self.value if self.groups == 1 else self.value.repeat_interleave(self.groups, dim=1)
        return first, first.changed(query=other.query, key=other.key, value=value)

    def past_streams(self) -> list[torch.Tensor]:
        """The cached rows of the booster's streams, in order; empty where there are none."""
        streams: list[torch.Tensor] = []
        while (rows := self.streams.past(boost_stream(len(streams) + 1))) is not None:
            streams.append(rows)
        return streams


def is_transformed(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks at a call; a hand-written backward serves neither.

    Args:
        tensors: of the call.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(tensor is not None and unpack(tensor).tangent is not None for tensor in tensors)


# --------------------------------------------------------------------------------------------------------------------
# Precision under autocast
# --------------------------------------------------------------------------------------------------------------------

# Asked once: torch 2.11 cannot trace the question, and breaks a compiled graph at it.
_HAS_AUTOCAST = {name: torch.amp.is_autocast_available(name) for name in ("cpu", "cuda", "mps", "xpu", "meta")}


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which autocast does not change the dtype of products."""
    available = _HAS_AUTOCAST.get(device_type)
    if available is None:
        available = torch.amp.is_autocast_available(device_type)
    # Where it is off, a context would take as long as the rest of a small call.
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast would run a product of ``x``: its own where autocast is off or does not reach."""
    device_type = x.device.type
    has_autocast = _HAS_AUTOCAST.get(device_type)
    if has_autocast is None:
        has_autocast = torch.amp.is_autocast_available(device_type)
    if x.dtype == torch.float64 or not has_autocast or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


# --------------------------------------------------------------------------------------------------------------------
# Checks of what a caller gave
# --------------------------------------------------------------------------------------------------------------------


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Check that queries, keys and values fit each other.

    Raises:
        ValueError: unless they are ``[batch, heads, length, head_dim]``, ``[batch, key_heads, key_length, head_dim]``
            and ``[batch, key_heads, key_length, d]`` of one floating dtype and device, with ``key_heads`` a divisor of
            ``heads``, and no width 0.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[0] != query.shape[0] or key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3]:
        raise ValueError(
            "query, key and value must share the batch, key and value their heads and length, query and key their "
            f"width, got {shapes}"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if key.shape[2] == 0 or heads == 0 or key_heads == 0 or heads % key_heads:
        raise ValueError(f"heads of query must be a multiple of those of key, and neither be empty, got {shapes}")
    if query.shape[3] == 0 or value.shape[3] == 0:  # the scale of such queries is none, and such values have no norm
        raise ValueError(f"query and value must have a width of at least 1, got {shapes}")


def check_options(boosting: str, boosting_steps: int, dropout: float) -> None:
    """Check what is not a tensor.

    Raises:
        ValueError: naming the option, its rule and the value.
    """
    known = (*(name for name in BOOSTING if name not in WITH_FACTORS), *SEQUENTIAL, "robust")
    if boosting not in known:
        why = ", whose factors are parameters of a layer" if boosting in WITH_FACTORS else ""
        raise ValueError(f"boosting must be one of {', '.join(known)}, got {boosting!r}{why}")
    is_int = isinstance(boosting_steps, int) and not isinstance(boosting_steps, bool)
    if not is_int or not 1 <= boosting_steps <= MAX_BOOSTING_STEPS:
        raise ValueError(f"boosting_steps must be an integer >= 1 and <= {MAX_BOOSTING_STEPS}, got {boosting_steps!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout!r}")


def check_bias(bias: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Check what is to be added to the logits, and give it four axes.

    Raises:
        ValueError: for a bias that is not of a floating dtype, or a wrong shape.
    """
    if not bias.is_floating_point():
        raise ValueError(f"position_bias must be of a floating dtype, got {bias.dtype}")
    return four_axes("position_bias", bias, shape)
