"""One attention layer as a filter: composes content kernel, position kernel, boosting and cache. Knows no backbone.

A backbone's attention projects its tokens to query, key and value and hands them to :class:`AttentionFilter`, together with
what the position kernel compares. Two back-ends apply the same filter: ``eager``, the dense reference, and ``sdpa``, one
``scaled_dot_product_attention`` a booster pass on augmented queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .filter_boosting import BOOSTING, Extend, extra_streams, keep_rows
from .filter_cache import cache_layer
from .filter_kernels import (
    CONTENT_COLUMNS,
    CONTENT_LOGITS,
    HALF_DTYPES,
    class_token_columns,
    class_token_logits,
    decode_positions,
    dot_product_logits,
    encode_positions,
    gaussian_position_columns,
    gaussian_position_logits,
    working_dtype,
)
from .filter_reference import reference_attention
from .filter_spec import LayerSpec, is_stock_layer

logger = logging.get_logger(__name__)

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")


def check_attn_implementation(name: str | None) -> None:
    """Refuse attention back-ends that are not built, by name.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    if name is not None and name not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)}, got {name!r}")


def default_bandwidth(head_dim: int) -> float:
    """(4 d)^(1/4), the equal bandwidth of stock attention: 2/h^2 = 1/sqrt(d) (FRAMEWORK section 1)."""
    return (4.0 * head_dim) ** 0.25


def gaussian_position_bandwidths(num_heads: int, head_dim: int, longest_side: int) -> list[float]:
    """h_p of the Gaussian position kernel: geometric over the heads from (4 d)^(1/4) to the longest side.

    One bandwidth for all would either see nothing far or nothing near. *Choice*: a single head gets the geometric mean.
    """
    low, high = math.log(default_bandwidth(head_dim)), math.log(longest_side)
    if num_heads == 1:
        return [math.exp((low + high) / 2)]
    return [math.exp(low + (high - low) * head / (num_heads - 1)) for head in range(num_heads)]


class FilterScalars(nn.Module):
    """Bandwidths and class-token logits: one value a head, as logarithms where they must stay positive.

    The parameters stay in float32 whatever the model's dtype (a step of 1e-3 in log h vanishes in bfloat16), and the
    module is called ``scalar_bias`` where it is used because ``Trainer`` leaves parameters with "bias" in their name out
    of weight decay, which would pull every bandwidth towards 1.

    Args:
        num_heads: number of heads.
        content: initial h_y, one a head, or None where the layer does not learn it.
        position: initial h_p, likewise.
        class_token: whether there are class-token logits: to the token, from it, to itself; initially 0.
    """

    def __init__(
        self, num_heads: int, content: list[float] | None, position: list[float] | None, class_token: bool
    ) -> None:
        super().__init__()
        self._initial = {"content_log_bandwidth": content, "position_log_bandwidth": position}
        for name, bandwidths in self._initial.items():
            self.register_parameter(name, None if bandwidths is None else nn.Parameter(torch.empty(num_heads)))
        self.register_parameter("class_token", nn.Parameter(torch.empty(num_heads, 3)) if class_token else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values; called by the models' ``_init_weights``."""
        for name, bandwidths in self._initial.items():
            parameter = getattr(self, name)
            if parameter is not None and bandwidths is not None:
                logs = [math.log(bandwidth) for bandwidth in bandwidths]
                init.copy_(parameter, torch.tensor(logs, dtype=parameter.dtype, device=parameter.device))
        if self.class_token is not None:
            init.zeros_(self.class_token)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FilterScalars:
        kept = {name: parameter.detach() for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype in HALF_DTYPES:
                parameter.data = kept[name].to(device=parameter.device, dtype=torch.float32)
        return self


class PositionProjection(nn.Module):
    """U_Q p, U_K p of the ``untied`` position kernel; p passes a LayerNorm first, the projections have no bias."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, num_heads * head_dim, bias=False)

    def forward(self, position_embeddings: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden_size]`` to ``[batch, heads, length, 2 * head_dim]``, queries before keys."""
        normed = self.norm(position_embeddings)
        shape = (*normed.shape[:-1], self.num_heads, self.head_dim)
        pair = torch.cat((self.query(normed).view(shape), self.key(normed).view(shape)), dim=-1)
        return pair.transpose(1, 2)


class AttentionFilter(nn.Module):
    """The filter of one layer.

    Args:
        spec: the layer's axes.
        config: the model's configuration (filter fields, number of heads).
        layer_idx: index of the layer, for the cache.
        head_dim: width of a head.
        scaling: the stock model's factor on q.k; the default h_y has 2/h_y^2 = scaling.
        longest_side: of the grid of positions, in index or patch units.
        layer_norm_eps: of the norm before the position projections.
        num_class_tokens: leading tokens that have no place on the grid.

    Shapes (``length`` new tokens, ``key_length`` with the cached ones): query, key, value
    ``[batch, heads, length, head_dim]``; key and value may have fewer heads (grouped queries).
    """

    def __init__(
        self,
        spec: LayerSpec,
        config: Any,
        *,
        layer_idx: int,
        head_dim: int,
        scaling: float,
        longest_side: int,
        layer_norm_eps: float,
        num_class_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.layer_idx = spec, layer_idx
        self.is_stock = is_stock_layer(config, spec)
        self.head_dim, self.num_heads = head_dim, config.num_attention_heads
        self.num_class_tokens = num_class_tokens
        self.num_streams = extra_streams(spec.boosting, spec.boosting_steps)
        stock_bandwidths = [math.sqrt(2.0 / scaling)] * self.num_heads
        content = self._per_head(config.content_bandwidth) or stock_bandwidths
        position = None
        if spec.compares_positions:
            spatial = gaussian_position_bandwidths(self.num_heads, head_dim, longest_side)
            default = spatial if spec.position_kernel == "gaussian" else stock_bandwidths
            position = self._per_head(config.position_bandwidth) or default
        learned = config.learn_bandwidths
        self.scalar_bias = FilterScalars(
            self.num_heads,
            content if learned else None,
            position if learned else None,
            class_token=num_class_tokens > 0 and spec.compares_positions,
        )
        # 2/h^2 of bandwidths that are not learned. The stock factor is kept as it is, not rounded through h.
        stock_scale = scaling if config.content_bandwidth is None else None
        self._fixed_content_scale = stock_scale or [2.0 / bandwidth**2 for bandwidth in content]
        self._fixed_position_scale = None if position is None else [2.0 / bandwidth**2 for bandwidth in position]
        self.position_projection = None
        if spec.position_kernel == "untied" and not config.share_position_projections:
            self.position_projection = PositionProjection(
                config.hidden_size, self.num_heads, head_dim, layer_norm_eps
            )

    def _per_head(self, bandwidth: Any) -> list[float] | None:
        if bandwidth is None:
            return None
        return [float(item) for item in bandwidth] if isinstance(bandwidth, list) else [float(bandwidth)] * self.num_heads

    def _scale(self, which: str, like: torch.Tensor) -> torch.Tensor | float:
        """2/h^2 in the working precision: ``[heads, 1, 1]``, or a number where it is the stock factor."""
        log_bandwidth = getattr(self.scalar_bias, f"{which}_log_bandwidth")
        work = working_dtype(like.dtype)
        if log_bandwidth is not None:
            return 2.0 * torch.exp(-2.0 * log_bandwidth.to(work)).view(-1, 1, 1)
        fixed = self._fixed_content_scale if which == "content" else self._fixed_position_scale
        if not isinstance(fixed, list):
            return fixed
        return torch.tensor(fixed, dtype=work, device=like.device).view(-1, 1, 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        implementation: str,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        position_states: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        past_key_values: Any = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Filter the values.

        Args:
            query: ``[batch, heads, length, head_dim]``.
            key: ``[batch, key_heads, length, head_dim]``.
            value: ``[batch, key_heads, length, head_dim]``.
            implementation: ``"eager"`` or ``"sdpa"``.
            attention_mask: boolean (True = visible) or additive float, broadcastable to
                ``[batch, heads, length, key_length]``, or None.
            is_causal: whether the layer is causal; used where there is no mask.
            dropout: probability on A.
            position_states: ``untied``: position vectors of the new tokens ``[batch or 1, length, hidden_size]``, or,
                with shared projections, their projections ``[batch or 1, heads, length, 2 * head_dim]``. Class tokens
                come first and are ignored.
            coordinates: ``gaussian``: ``[batch or 1, length, dims]`` in index or patch units, class tokens first.
            past_key_values: cache, updated in place.
            need_weights: return the operator that multiplies V (eager only).

        Returns:
            ``[batch, heads, length, head_dim]``, and the operator ``[batch, heads, length, key_length]`` or None.

        Raises:
            ValueError: for an implementation or a cache that is not supported.
        """
        check_attn_implementation(implementation)
        if key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        position_query, position_key = self._position_vectors(position_states, query)
        key_coordinates, full_value, extend = coordinates, value, keep_rows
        if past_key_values is not None:
            layer = cache_layer(past_key_values, self.layer_idx, self.num_streams)
            packed = self._pack_key(key, position_key, coordinates)
            packed, full_value = past_key_values.update(packed, value, self.layer_idx)
            key, position_key, key_coordinates = self._unpack_key(packed)
            if self.num_streams:
                extend = layer.update_stream
        if need_weights and implementation != "eager":
            logger.warning_once(
                f"attn_implementation={implementation!r} does not return attentions: set it to 'eager' for output_attentions=True"
            )
        is_causal = is_causal and attention_mask is None and query.shape[-2] > 1
        positions = _Positions(position_query, position_key, coordinates, key_coordinates)
        # SDPA draws a new mask at every call; a booster needs the same one in each pass.
        dense = implementation == "eager" or (dropout > 0.0 and self.spec.is_boosted)
        apply = self._apply_reference if dense else self._apply_sdpa
        return apply(
            query,
            key,
            value,
            full_value,
            positions,
            attention_mask=attention_mask,
            is_causal=is_causal,
            dropout=dropout,
            extend=extend,
            need_weights=need_weights and implementation == "eager",
        )

    # ------------------------------------------------------------------------------------------------------------
    # Positions
    # ------------------------------------------------------------------------------------------------------------

    def _position_vectors(
        self, position_states: torch.Tensor | None, query: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """U_Q p and U_K p of the new tokens, ``[batch or 1, heads, length, head_dim]``; 0 for class tokens."""
        if self.spec.position_kernel != "untied" or position_states is None:
            return None, None
        pair = position_states if self.position_projection is None else self.position_projection(position_states)
        if self.num_class_tokens:
            on_grid = torch.arange(pair.shape[-2], device=pair.device) >= self.num_class_tokens
            pair = pair * on_grid.view(-1, 1).to(pair.dtype)
        position_query, position_key = pair.to(query.dtype).chunk(2, dim=-1)
        return position_query, position_key

    def _pack_key(
        self, key: torch.Tensor, position_key: torch.Tensor | None, coordinates: torch.Tensor | None
    ) -> torch.Tensor:
        """What the cache stores for a key: its content, and what the position kernel compares."""
        parts = [key]
        if position_key is not None:
            parts.append(position_key.expand(key.shape[0], -1, -1, -1))
        if self.spec.position_kernel == "gaussian" and coordinates is not None:
            columns = encode_positions(coordinates, key.dtype).unsqueeze(1)
            parts.append(columns.expand(key.shape[0], key.shape[1], -1, -1))
        return torch.cat(parts, dim=-1)

    def _unpack_key(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        key, rest = packed[..., : self.head_dim], packed[..., self.head_dim :]
        if self.spec.position_kernel == "untied":
            return key, rest, None
        if self.spec.position_kernel == "gaussian":
            return key, None, decode_positions(rest[:, 0])
        return key, None, None

    def _position_logits(self, positions: _Positions, like: torch.Tensor) -> torch.Tensor | None:
        """s(p_i, p_j), ``[batch or 1, heads, length, key_length]`` in the working precision."""
        if not self.spec.compares_positions:
            return None
        scale = self._scale("position", like)
        if self.spec.position_kernel == "untied":
            work = working_dtype(like.dtype)
            logits = dot_product_logits(positions.query.to(work), positions.key.to(work), scale)
        else:
            logits = gaussian_position_logits(positions.coordinates, positions.key_coordinates, scale)
        if self.num_class_tokens:
            length, key_length = logits.shape[-2:]
            is_class_query = torch.arange(length, device=logits.device).view(-1, 1) < self.num_class_tokens
            is_class_key = torch.arange(key_length, device=logits.device).view(1, -1) < self.num_class_tokens
            bias = class_token_logits(
                self.scalar_bias.class_token.to(logits.dtype), length, key_length, self.num_class_tokens
            )
            logits = logits.masked_fill(is_class_query | is_class_key, 0.0) + bias
        return logits

    def _position_columns(
        self, positions: _Positions, like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Feature columns with <left_i, right_j> = s(p_i, p_j) + const_i, queries' and keys'."""
        scale, dtype = self._scale("position", like), like.dtype
        row_constant = None
        if self.spec.position_kernel == "untied":
            left, right = _scaled(positions.query, scale), positions.key
        else:
            query_positions, key_positions = positions.coordinates, positions.key_coordinates
            left, right = gaussian_position_columns(query_positions, key_positions, scale, dtype)
            if self.num_class_tokens:
                on_grid = torch.arange(left.shape[-2], device=left.device) >= self.num_class_tokens
                left, right = left * on_grid.view(-1, 1), right * on_grid.view(-1, 1)
                row_constant = query_positions.square().sum(-1).unsqueeze(1) * (scale.squeeze(-1) / 2)
        lefts, rights = [left], [right]
        if self.num_class_tokens:
            class_bias = self.scalar_bias.class_token.to(working_dtype(dtype))
            left, right = class_token_columns(
                class_bias, row_constant, left.shape[-2], right.shape[-2], self.num_class_tokens, dtype
            )
            lefts.append(left)
            rights.append(right)
        return lefts, rights

    def _position_form(self, like: torch.Tensor) -> str:
        """How SDPA gets s(p_i, p_j): "none", "features" or "bias" (dense logits as an additive mask).

        Features of the Gaussian kernel are exact enough in float32. In bfloat16 the split columns keep the output as
        accurate as plain attention, but neither the gradient of h_p (large columns cancel in it) nor the row constant
        that class tokens need survives, and float16 has no room for p^2 / h^2: there the bias is formed in float32.
        Bounds in tests/models/test_precision.py.
        """
        if not self.spec.compares_positions:
            return "none"
        if self.spec.position_kernel == "untied" or like.dtype not in HALF_DTYPES:
            return "features"
        learns = self.scalar_bias.position_log_bandwidth is not None and torch.is_grad_enabled()
        return "bias" if learns or self.num_class_tokens or like.dtype == torch.float16 else "features"

    # ------------------------------------------------------------------------------------------------------------
    # Back-ends
    # ------------------------------------------------------------------------------------------------------------

    def _apply_reference(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        full_value: torch.Tensor,
        positions: _Positions,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        work = working_dtype(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            content = CONTENT_LOGITS[self.spec.content_kernel]
            logits = content(query.to(work), key.to(work), self._scale("content", query))
            position_logits = self._position_logits(positions, query)
            if position_logits is not None:
                logits = logits + position_logits
            return reference_attention(
                logits, value, full_value, boosting=self.spec.boosting, boosting_steps=self.spec.boosting_steps, **options
            )

    def _apply_sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        full_value: torch.Tensor,
        positions: _Positions,
        *,
        attention_mask: torch.Tensor | None,
        is_causal: bool,
        dropout: float,
        extend: Extend,
        need_weights: bool,
    ) -> tuple[torch.Tensor, None]:
        content_scale = self._scale("content", query)
        form = self._position_form(query)
        lefts, rights = [], []
        content_columns = CONTENT_COLUMNS[self.spec.content_kernel]
        if content_columns is not None:
            left, right = content_columns(query, key, content_scale)
            lefts.append(left)
            rights.append(right)
        if form == "features":
            left_columns, right_columns = self._position_columns(positions, query)
            lefts += left_columns
            rights += right_columns
        scale = content_scale
        if lefts or isinstance(content_scale, torch.Tensor):
            # The columns carry their own factors, so the content's goes into the query.
            query, scale = _scaled(query, content_scale), 1.0
        query, key = _augment(query, lefts), _augment(key, rights)
        if form == "bias":
            bias = self._position_logits(positions, query)
            bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
            attention_mask = _merge_bias(bias, attention_mask, is_causal)
            is_causal = False

        def attend(stream: torch.Tensor) -> torch.Tensor:
            return _sdpa(query, key, stream, attention_mask, is_causal, scale, dropout)

        boost = BOOSTING[self.spec.boosting]
        return boost(attend, extend, value, full_value, self.spec.boosting_steps), None


class _Positions:
    """What the position kernel compares: untied vectors or coordinates, of the queries and of the keys."""

    def __init__(
        self,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        coordinates: torch.Tensor | None,
        key_coordinates: torch.Tensor | None,
    ) -> None:
        self.query, self.key = query, key
        self.coordinates, self.key_coordinates = coordinates, key_coordinates


def _scaled(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x * scale).to(x.dtype)


def _augment(x: torch.Tensor, columns: list[torch.Tensor]) -> torch.Tensor:
    """Append columns, and zeros up to a multiple of 8, the width that fused kernels want."""
    if not columns:
        return x
    parts = [x, *(column.to(x.dtype).expand(x.shape[0], x.shape[1], -1, -1) for column in columns)]
    width = sum(part.shape[-1] for part in parts)
    return nn.functional.pad(torch.cat(parts, dim=-1), (0, -width % 8))


def _merge_bias(bias: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """One additive mask from position logits and a boolean, additive or causal mask."""
    smallest = torch.finfo(bias.dtype).min
    if is_causal:
        attention_mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, smallest)
    return (bias + attention_mask).clamp(min=smallest)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """SDPA with V padded to the width of Q: the fused kernels want equal widths, and the padding costs less than them."""
    width = value.shape[-1]
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        nn.functional.pad(value, (0, query.shape[-1] - width)),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
    )
    return out[..., :width]
