"""One filtered layer of another model: its parameters, its places, what it hands to the next one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .any_fields import StackConfig
from .any_layers import AttentionLayer
from .backend_call import FilterCall
from .backend_reference import filter_logits, reference_attention
from .backend_table import run_filter
from .boost_depth import LayerState, mixed_value
from .cache_followed import FollowingStreams
from .cache_owner import CacheOwner
from .cache_streams import NO_STREAMS, Streams
from .kernel_content import working_dtype
from .kernel_given import BiasPositions
from .kernel_position import Positions
from .layer_filter import AttentionFilter
from .layer_parameters import Scalars
from .spec_axes import CONVERTED_SINK
from .visibility import Visibility

FIRST_VALUE = "first.value"
"""Name of the stream that keeps the values of the first filtered layer, for ``value_residual``."""


class ModelLogits(NamedTuple):
    """What a model's own attention does to its logits, beside the mask.

    scaling: the factor on q.k, or None: as the layer has it.
    bias: added, ``[batch or 1, heads, length, key_length]``, or None.
    softcap: c of c tanh(l / c), before anything is added, or None.
    sinks: ``[heads]``, the logit of one more key, whose value is 0, or None.
    """

    scaling: float | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class SharedState:
    """What the filtered layers of one stack hand to each other during a forward pass.

    states: what goes into each layer, by its order among the filtered ones. It is kept until the next forward pass, so
        that layers which gradient checkpointing computes again find it.
    with_gradient: whether the forward pass was recorded for gradients.
    mask: the mask that the layers were given last, and what it shows.
    """

    def __init__(self) -> None:
        self.states: dict[int, tuple[torch.Tensor | None, ...]] = {}
        self.with_gradient = False
        self.mask: tuple[Any, Visibility] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedState:
        return memo.setdefault(id(self), SharedState())


class FilterSeat:
    """What belongs to a filtered attention module and not to the filter's parameters.

    PEFT puts copies of a sub-module in its place, one an adapter; what they have in common is kept here.

    Args:
        shared: of the stack.
        arguments: what ``apply_filter`` has to be called with for the same filters.
        stock_config: the configuration that the module had before.
        hooks: remove the hooks of the module.
        places: which layers of the stack have the filter.
    """

    def __init__(
        self,
        shared: SharedState,
        arguments: dict[str, Any],
        stock_config: Any,
        hooks: list[Any],
        places: tuple[int, ...],
    ) -> None:
        self.shared, self.arguments, self.stock_config, self.hooks = shared, arguments, stock_config, hooks
        self.places = places
        self.cache_layer: Any = None
        """Set before the layer's forward pass: its part of the cache, or None."""
        self._owner: CacheOwner | None = None

    def owner(self, module: nn.Module) -> CacheOwner:
        """Whose rows are in a cache that the module fills."""
        if self._owner is None:
            self._owner = CacheOwner(module, self.places)
        return self._owner

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without the owner: the copy belongs to another module."""
        return {**self.__dict__, "_owner": None}


class AppliedFilter(nn.Module):
    """The filter of one layer of another model.

    Args:
        layer: the layer.
        order: its place among the filtered layers of its stack.
        config: what the filter is.
    """

    def __init__(self, layer: AttentionLayer, order: int, config: StackConfig) -> None:
        super().__init__()
        self.layer_name, self.stack, self.index, self.order = layer.name, layer.stack, layer.place, order
        self.filter = AttentionFilter(
            config.layer_specs[order],
            config,
            layer_idx=order,
            head_dim=layer.head_dim,
            scaling=layer.scaling,
            longest_side=max(config.sides),
            layer_norm_eps=0.0,
            num_class_tokens=config.num_class_tokens,
        )
        if self.filter.scalar_bias.boosting_gain is not None:
            # Boosting that is learned starts where the model is: without it.
            nn.init.zeros_(self.filter.scalar_bias.boosting_gain)
        if self.filter.scalar_bias.value_residual is not None:
            nn.init.zeros_(self.filter.scalar_bias.value_residual)
        if self.filter.scalar_bias.sink is not None:
            nn.init.constant_(self.filter.scalar_bias.sink, CONVERTED_SINK)
        self.sides = config.sides
        self.sees_places = self.filter.positions.sees_places
        mixes_values = self.filter.scalar_bias.value_residual is not None
        keeps_streams = bool(self.filter.stream_names) or self.sees_places or mixes_values
        self.kind = self.filter.kind if keeps_streams else None
        """What the filter is, where a cache keeps rows for it."""
        fields = config.fields
        has_own_scale = self.filter.spec.content_kernel == "cosine"
        self.scales_by_itself = has_own_scale or fields["learn_bandwidths"] or fields["content_bandwidth"] is not None

    def forward(
        self,
        seat: FilterSeat,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        visibility: Visibility,
        logits: ModelLogits,
        *,
        dropout: float,
        position_ids: torch.Tensor | None,
        attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Filter the values; see :func:`filtered_attention`.

        Returns:
            ``[batch, heads, length, d]``, and the attentions or None.
        """
        query, key, value = projected
        self._check_logits(logits)
        streams: Streams = NO_STREAMS
        own_value, has_past = None, visibility.length != visibility.key_length
        if self.filter.context is not None:
            streams = self.filter.context.streams()
            own_value = streams.own_value(value, visibility.length)
        elif seat.cache_layer is not None:
            streams = following = FollowingStreams(seat.cache_layer, visibility.key_length)
            own_value = following.own_value(value, visibility.length)
        elif has_past:
            raise ValueError(
                f"the filter of {self.layer_name} needs as many keys as queries, got {visibility.key_length} and "
                f"{visibility.length}, and no cache that explains it: attention to another sequence, or to fewer "
                "keys, is no filter of its own tokens; choose other layers"
            )
        new_value = value[..., visibility.key_length - visibility.length :, :] if own_value is None else own_value
        if self.filter.has_metric and query.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"content_kernel='elliptical' weighs queries by the values: {self.layer_name} has values of width "
                f"{value.shape[-1]} and queries of width {query.shape[-1]}; choose another kernel"
            )
        state = self._state(seat.shared)
        scalars = self.filter.scalar_bias()
        own_mixed = None
        if scalars.value_residual is not None and state.first_value is not None:
            first = state.first_value
            self._check_first_value(first, new_value)
            own_mixed = mixed_value(new_value, first, scalars.value_residual)
            # The values that the model keeps are those of the layer: V_0 is kept beside them.
            first = streams.append(FIRST_VALUE, first) if streams.is_cached else first
            value = mixed_value(value, first, scalars.value_residual)
        positions = self._positions(
            scalars, query, visibility, self._coordinates(query, position_ids, seat.cache_layer), streams
        )
        if logits.bias is not None:
            positions = (*positions, BiasPositions(logits.bias))
        call = self.filter.call(
            (query, key, value),
            scalars,
            visibility=visibility,
            positions=positions,
            moved=(new_value, state.previous_value),
            streams=streams,
            dropout=dropout,
        )
        content = call.content._replace(softcap=logits.softcap)
        if not (self.scales_by_itself or self.filter.has_metric) and logits.scaling is not None:
            content = content._replace(scale=float(logits.scaling))
        call = call._replace(content=content)
        if own_mixed is not None and call.own_value is not None:
            call = call._replace(own_value=own_mixed)
        if logits.sinks is not None:
            call = call._replace(sinks=logits.sinks)
        if attentions:
            output, weights = reference_attention(filter_logits(call), call, "operator")
        else:
            is_masked = has_past and seat.cache_layer is not None
            output, weights = run_filter(call, self._backend(call) if is_masked else "auto"), None
        if self.filter.compares_layers:
            output, state = self.filter.hand_on(output, new_value, state)
            # Plain tuples: compiled code of PyTorch 2.11 cannot hand on objects that it has made.
            seat.shared.states[self.order + 1] = tuple(state)
        seat.cache_layer = None  # a model keeps no cache alive
        return output, weights

    def _check_first_value(self, first: torch.Tensor, own: torch.Tensor) -> None:
        if first.shape != own.shape:
            raise ValueError(
                f"feedback='value_residual' mixes values of two layers: {self.layer_name} has values of shape "
                f"{tuple(own.shape)}, the first filtered layer of its stack {tuple(first.shape)}; choose other layers"
            )

    def _check_logits(self, logits: ModelLogits) -> None:
        normalisation = self.filter.spec.normalisation
        if logits.sinks is not None and normalisation != "softmax":
            raise ValueError(
                f"the filter of {self.layer_name} does not take s_aux with normalisation={normalisation!r}: the model "
                "has sinks of its own, beside which weights are those of softmax; choose other layers"
            )
        what = "softcap" if logits.softcap is not None else "s_aux"
        if self.filter.spec.content_kernel == "gaussian" and (logits.softcap is not None or logits.sinks is not None):
            raise ValueError(
                f"the filter of {self.layer_name} does not take {what} with content_kernel='gaussian': the model "
                "bounds its inner products, or compares them with a sink, and a Gaussian kernel has other numbers; "
                "keep content_kernel='dot_product', or choose other layers"
            )

    @staticmethod
    def _backend(call: FilterCall) -> str:
        """The back-end of a call with cached tokens: one that takes everything about who is seen from the mask."""
        if call.content.softcap is not None or call.normalisation.name != "softmax" or call.by_weights is not None:
            return "auto"
        if call.is_sequential:  # the only one that finds the rows of earlier tokens in a cache of any kind
            return "reference"
        one_row = call.query.shape[-2] == 1 or (call.dropout and call.is_boosted)
        return "reference" if one_row else "sdpa"

    def _state(self, shared: SharedState) -> LayerState:
        if not self.filter.compares_layers:
            return LayerState()
        with_gradient = torch.is_grad_enabled()
        if self.order == 0:
            shared.states, shared.with_gradient = {0: ()}, with_gradient
        if self.order not in shared.states or (with_gradient and not shared.with_gradient):
            raise ValueError(
                f"the filter of {self.layer_name} compares layers, and the layer before it did not run in the same "
                "pass: call the whole model, and use gradient checkpointing with use_reentrant=False"
            )
        return LayerState(*shared.states[self.order])

    def _positions(
        self,
        scalars: Scalars,
        query: torch.Tensor,
        visibility: Visibility,
        coordinates: torch.Tensor | None,
        streams: Streams,
    ) -> tuple[Positions, ...]:
        if coordinates is None:
            return ()
        own = coordinates.to(working_dtype(query.dtype))
        all_places = own
        if streams.is_cached:
            rows = own.expand(query.shape[0], -1, -1).unsqueeze(1)
            all_places = streams.append("places", rows).squeeze(1)
        return self.filter.positions.terms(
            scalars,
            (None, None),
            (own, all_places),
            contiguous=False,
            causal=visibility.causal,
            like=query,
        )

    def _coordinates(
        self, query: torch.Tensor, position_ids: torch.Tensor | None, cache_layer: Any
    ) -> torch.Tensor | None:
        """Places of the new tokens, ``[batch or 1, length, axes]``; None where the filter does not see them."""
        if not self.sees_places:
            return None
        length = query.shape[-2]
        if len(self.sides) == 2:
            rows, columns = self.sides
            special = length - rows * columns
            if special != self.filter.positions.num_class_tokens:
                raise ValueError(
                    f"position_kernel={self.filter.spec.position_kernel!r} needs the places of all tokens: "
                    f"{self.filter.positions.num_class_tokens} special tokens and {rows} x {columns} patches, got "
                    f"{length} tokens; give num_special_tokens, and images of the size of the configuration"
                )
            grid = torch.cartesian_prod(
                torch.arange(rows, device=query.device), torch.arange(columns, device=query.device)
            )
            return nn.functional.pad(grid, (0, 0, special, 0))[None]
        if position_ids is not None:
            return position_ids[..., None] if position_ids.ndim == 2 else position_ids[0, ..., None]
        places = torch.arange(length, device=query.device)
        if cache_layer is not None:
            places = places + (cache_layer.get_seq_length() - length)
        return places[None, :, None]

    def extra_repr(self) -> str:
        """What the layer's filter is, in one line."""
        return self.filter.kind
