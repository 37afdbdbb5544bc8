"""What Transformers calls in a filtered layer of another model: a hook before it, and its attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import output_capturing

from .any_layer import AppliedFilter, FilterSeat, ModelLogits, SharedState
from .any_layers import unwrapped
from .cache_followed import follow_layer
from .layer_heads import share_heads, share_of_module
from .visibility import Visibility, attention_visibility, padding_visibility

IMPLEMENTATION = "imgproc_filter"
"""Name of :func:`filtered_attention` in Transformers' table of attention functions."""
PART = "imgproc_filter"
"""Name of the sub-module of a filtered layer."""
SEAT = "imgproc_filter_seat"
"""Name of the attribute of a filtered layer that holds its ``FilterSeat``."""

_CACHES = ("past_key_values", "layer_past", "past_key_value")
_OTHER_SEQUENCE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
_HARMLESS = frozenset(
    (
        *("position_ids", "position_embeddings", "sliding_window", "use_cache", "cache_position", "output_attentions"),
        *("output_hidden_states", "return_dict", "num_items_in_batch", "deterministic", "logits_to_keep"),
        *("token_type_ids", "labels", "shift_labels", "is_training"),
        *("softcap", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    )
)
"""Keywords of the interface that say nothing of the logits beside what the mask says, or are understood."""
_SHOWS_ALL_IN_MASKS = ("sdpa", "eager", None)
"""Attention implementations whose mask says who is seen; others are told packed texts and windows beside it."""
_REFUSED = {"cache": "continuous batching keeps its cache in pages, which have no place for the filter's rows"}


def filtered_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of filtered layers; arguments as Transformers' own functions have them.

    Args:
        module: the attention module.
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, key_length, head_dim]`` of all tokens, from the cache.
        value: ``[batch, key_heads, key_length, d]``.
        attention_mask: boolean or additive with four axes, ``[batch, key_length]``, or None: then ``is_causal`` says
            everything.
        dropout: probability on A.
        scaling: the factor on q.k.
        is_causal: whether later tokens are hidden where there is no mask; None: as the module says.
        position_bias: added to the logits, ``[batch or 1, heads, length, key_length]``, or None.
        **kwargs: what a model says beside. ``softcap``: c of logits that it bounds as c tanh(l / c), before anything
            is added to them. ``s_aux``: ``[heads]``, the logit of a sink, one more key, of value 0, that takes weight
            from every row: the rows of A then sum to less than 1, and twicing is 2A - A² with that A.
            ``cu_seq_lens_q``: ``[texts + 1]``, where the texts begin that are packed into one row, and where the last
            one ends. Terms of the logits that are not understood are refused.

    Returns:
        ``[batch, length, heads, d]``, and the attentions or None.

    Raises:
        ValueError: for terms of the logits that the filter does not know, or a call that is no self-attention.
    """
    part: AppliedFilter = getattr(module, PART)
    seat: FilterSeat = getattr(module, SEAT)
    if query.shape[1] != part.filter.num_heads:
        _share_heads(module, part, query.shape[1])
    for name, extra in kwargs.items():
        if extra is None or extra is False or name in _HARMLESS:
            continue
        reason = _REFUSED.get(name, "it is not known what it does to the logits")
        raise ValueError(f"the filter of {part.layer_name} does not take {name}: {reason}; choose other layers")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    context = part.filter.context
    if context is not None:
        _check_context(part.layer_name, attention_mask, position_bias, kwargs, context.size * context.length)
        key, value = context.streams().update(key, value)
    elif attention_mask is None and causal and 1 < query.shape[-2] < key.shape[-2]:
        # As Transformers has it, the first tokens of a cache of fixed size: the places after them are empty.
        key, value = (x[..., : query.shape[-2], :] for x in (key, value))
    asked = seat.stock_config._attn_implementation
    _check_mask(part.layer_name, attention_mask, kwargs.get("sliding_window"), key.shape[-2], asked)
    if attention_mask is None and context is None:
        starts, places = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
        texts = _packed_texts(part.layer_name, query, starts, places, asked)
        if texts is not None:
            attention_mask = _mask_of_texts(part.layer_name, texts, query, key, causal)
    shared = context is not None
    visibility = context.visibility() if shared else _visibility(seat.shared, attention_mask, query, key, causal)
    output, weights = part(
        seat,
        (query, key, value),
        visibility,
        ModelLogits(
            scaling,
            bias=None if position_bias is None else position_bias[..., : key.shape[-2]],
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        ),
        dropout=dropout,
        position_ids=kwargs.get("position_ids"),
        attentions=_wants_attentions(seat.stock_config, bool(kwargs.get("output_attentions"))),
    )
    return output.transpose(1, 2).contiguous(), weights


def _share_heads(module: nn.Module, part: AppliedFilter, heads: int) -> None:
    """Before the first call of a layer whose heads several processes share: its filter is that of the heads here."""
    share = share_of_module(module)
    if share is None or heads * share.size != part.filter.num_heads:
        raise ValueError(
            f"the filter of {part.layer_name} has {part.filter.num_heads} heads and was given queries of {heads}: a "
            "plan of tensor parallelism may cut them, alike in every process, and nothing else"
        )
    share_heads(part.filter, share)


def _check_context(name: str, mask: Any, bias: Any, terms: dict[str, Any], length: int) -> None:
    """Refuse what a model says of its own tokens alone, where several processes share the tokens."""
    window = terms.get("sliding_window")
    given = {
        "attention_mask": mask is not None,
        "position_bias": bias is not None,
        "cu_seq_lens_q": terms.get("cu_seq_lens_q") is not None,
        "sliding_window": isinstance(window, int) and not isinstance(window, bool) and 0 < window < length,
    }
    if any(given.values()):
        raise ValueError(
            f"the filter of {name} sees tokens of several processes and knows causality and padding there, not "
            f"{' and '.join(key for key, there in given.items() if there)} of the model: use "
            "attn_implementation='sdpa', or another model"
        )


def _wants_attentions(config: Any, asked: bool) -> bool:
    """Whether the layers beside this one return their attentions, and anybody looks at them.

    Only ``"eager"`` layers return any, so that a filtered layer which did would stand at the place of another. Most
    models do not tell their layers that they were asked: what Transformers collects does.
    """
    if config._attn_implementation not in ("eager", None):
        return False
    if asked or getattr(config, "output_attentions", False) or torch.compiler.is_compiling():
        return asked or bool(getattr(config, "output_attentions", False))
    collector = getattr(output_capturing, "_active_collector", None)  # no public name
    return collector is None or any("attentions" in name for name in collector.get() or ())


def _check_mask(name: str, mask: Any, window: Any, key_length: int, asked: str | None) -> None:
    """Refuse masks that do not tell who is seen: other layers' attention functions may want them so."""
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"the filter of {name} needs its mask as a tensor, got a {type(mask).__name__}, as attn_implementation="
            f"{asked!r} wants it: use 'sdpa' or 'eager'"
        )
    if asked in _SHOWS_ALL_IN_MASKS or (mask is not None and mask.ndim != 2):
        return  # before lengths are looked at: a compiled step would depend on them
    if isinstance(window, int) and not isinstance(window, bool) and 0 < window < key_length:
        raise ValueError(
            f"the filter of {name} needs a mask that shows its sliding window of {window} tokens, and "
            f"attn_implementation={asked!r} makes none: use 'sdpa' or 'eager'"
        )


def _packed_texts(
    name: str, query: torch.Tensor, starts: torch.Tensor | None, places: torch.Tensor | None, asked: str | None
) -> torch.Tensor | None:
    """The number of the text that each token belongs to, ``[length]``; None for one text in a row.

    Where there is no mask, flash attention is told by ``cu_seq_lens_q``, or sees places that begin anew.

    Raises:
        ValueError: for texts of which the layers beside this one do not know.
    """
    length = query.shape[-2]
    if starts is not None:
        if starts.numel() <= 2:
            return None
        if asked in _SHOWS_ALL_IN_MASKS:
            raise ValueError(
                f"the filter of {name} was given cu_seq_lens_q of {starts.numel() - 1} texts and no mask that parts "
                f"them, and attn_implementation={asked!r} takes them for one: give position_ids that begin anew"
            )
        return torch.bucketize(torch.arange(length, device=query.device), starts[1:].to(query.device), right=True)
    if asked in _SHOWS_ALL_IN_MASKS or places is None or places.ndim != 2 or len(places) != 1 or length == 1:
        return None
    if query.shape[0] != 1 or not (places.diff() < 0).any():
        return None
    return (places[0] == 0).cumsum(0)


def _mask_of_texts(
    name: str, texts: torch.Tensor, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> torch.Tensor:
    """Each token sees its own text, and of it only the past if causal: ``[1, 1, length, length]``, True if seen."""
    length = query.shape[-2]
    if query.shape[0] != 1 or key.shape[-2] != length:
        raise ValueError(
            f"the filter of {name} takes packed texts in one row and without a cache, got {query.shape[0]} rows of "
            f"{length} tokens and {key.shape[-2]} keys"
        )
    seen = texts[:, None] == texts
    return (seen.tril() if causal else seen)[None, None]


def _visibility(
    shared: SharedState, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> Visibility:
    length, key_length = query.shape[-2], key.shape[-2]
    if mask is None:
        return Visibility(length, key_length, causal and length > 1)
    compiling = torch.compiler.is_compiling()
    if not compiling and shared.mask is not None and shared.mask[0] is mask:
        found = shared.mask[1]
        if (found.length, found.key_length) == (length, key_length):
            return found
    if mask.ndim == 2:  # flash attention's: padding only
        found = padding_visibility((mask[:, None, None, :] != 0), length, causal)
    else:
        shape = (query.shape[0], query.shape[1], length, key_length)
        found = attention_visibility(mask[..., :key_length], shape=shape)
    if not compiling:
        shared.mask = (mask, found)
    return found


def before_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a filtered layer runs: find its part of the cache, and refuse attention to another sequence."""
    part: AppliedFilter = getattr(module, PART)
    given = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
    for name in _OTHER_SEQUENCE:
        if given.get(name) is not None:
            raise ValueError(
                f"the filter of {part.layer_name} is for self-attention, got {name}: attention to another sequence is "
                "no filter of its own tokens; choose other layers"
            )
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    cache = getattr(cache, "self_attention_cache", cache)
    seat: FilterSeat = getattr(module, SEAT)
    seat.cache_layer = None
    if cache is not None:
        layer_idx = getattr(module, "layer_idx", None)
        if layer_idx is None:
            raise ValueError(f"the filter of {part.layer_name} was given a cache, and the layer has no layer_idx")
        seat.cache_layer = follow_layer(cache, layer_idx, part.kind, seat.owner(module))


def _parameters(module_class: type[nn.Module]) -> list[str]:
    """The names of what ``forward`` takes by place, without ``self``."""
    code = unwrapped(module_class.forward).__code__
    return list(code.co_varnames[1 : code.co_argcount])


AttentionInterface.register(IMPLEMENTATION, filtered_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
