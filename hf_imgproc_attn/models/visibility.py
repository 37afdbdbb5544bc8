"""Who sees whom: one object, built once for each forward pass of a model, that every layer and back-end asks.

Nothing else interprets a mask. Most calls hide two kinds of keys only, padding and later tokens. Then the fields
``keys`` and ``causal`` say everything, and no mask of size ``length x key_length`` is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Visibility(NamedTuple):
    """What each query sees: key j where ``mask``, ``keys`` and ``causal`` all allow it, with ``bias`` on its logit.

    The queries are the last ``length`` of the ``key_length`` tokens: query i stands at ``key_length - length + i``.
    Queries that see no key give 0.

    Args:
        length: number of queries.
        key_length: number of keys.
        causal: whether no query sees a key after its own. It may be True beside a mask that says so too.
        keys: boolean ``[batch or 1, heads or 1, 1, key_length]``, True = no padding, or None where no key is padding.
        mask: boolean ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None where ``keys`` and ``causal``
            say everything.
        bias: finite numbers added to the logits, ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None.
        hidden: keys that no query sees, ``[batch or 1, heads or 1, 1, key_length]``, or None if there are none.
            Whatever stands there, NaN included, has no influence.
        blind: queries that see no key, ``[batch or 1, heads or 1, length or 1, 1]``, or None if there are none. The
            same holds for what stands there.
        dense: everything that is visible as one boolean mask, if it has been built already, or None.
    """

    length: int
    key_length: int
    causal: bool = False
    keys: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    dense: torch.Tensor | None = None

    @property
    def is_square(self) -> bool:
        """Whether there are as many queries as keys."""
        return self.length == self.key_length

    @property
    def hides_only_padding(self) -> bool:
        """Whether nothing but padding and, where ``causal``, later tokens is hidden."""
        return self.mask is None

    @property
    def hides_nothing(self) -> bool:
        """Whether every query is known to see every key."""
        return self.mask is None and self.keys is None and not self.hides_later_keys

    @property
    def hides_later_keys(self) -> bool:
        """Whether causality hides anything: a single query is the last token and sees all."""
        return self.causal and self.length > 1

    def allowed(self, device: torch.device) -> torch.Tensor | None:
        """Everything that is visible as one boolean mask, ``[batch or 1, heads or 1, length or 1, key_length]``.

        None where everything is visible.
        """
        if self.dense is not None:
            return self.dense
        allowed = _both(self.mask, self.keys)
        if self.hides_later_keys:
            allowed = _both(allowed, causal_mask(self.length, self.key_length, device))
        return allowed

    def largest_seen(self, terms: torch.Tensor) -> torch.Tensor:
        """The largest number that each query sees, without a gradient: 0 for queries that see none.

        Args:
            terms: of the logits, ``[batch or 1, heads or 1, length or 1, key_length or 1]``.

        Returns:
            ``[batch or 1, heads or 1, length or 1, 1]``.
        """
        terms, places = terms.detach(), _both(self.mask, self.keys)
        is_one_row = terms.shape[-2] == 1 and (places is None or places.shape[-2] == 1)
        if self.hides_later_keys and is_one_row and self.length <= self.key_length:
            # A running maximum: no matrix of length x key_length is formed.
            shown = terms if places is None else torch.where(places, terms, float("-inf"))
            shown = shown.expand(-1, -1, -1, self.key_length)
            largest = shown.cummax(-1).values[..., self.key_length - self.length :].mT
        else:
            allowed = self.allowed(terms.device)
            shown = terms if allowed is None else torch.where(allowed, terms, float("-inf"))
            largest = shown.amax(-1, keepdim=True)
        return largest.masked_fill(largest == float("-inf"), 0.0)

    def clean_queries(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of queries ``[batch or 1, heads or 1, length, width]`` with 0 where they see no key."""
        return rows if self.blind is None else rows.masked_fill(self.blind, 0.0)

    def clean_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of keys ``[batch, heads, key_length, width]`` with 0 where no query sees them."""
        if self.hidden is None:
            return rows
        hidden = self.hidden.transpose(-1, -2)
        if hidden.shape[1] not in (1, rows.shape[1]):  # grouped keys: hidden only where no query head sees them
            hidden = hidden.unflatten(1, (rows.shape[1], -1)).all(2)
        return rows.masked_fill(hidden, 0.0)


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def causal_mask(length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """Boolean ``[1, 1, length, key_length]``: each of the last ``length`` tokens sees itself and what is before it."""
    everything = torch.ones(length, key_length, dtype=torch.bool, device=device)
    return everything.tril(key_length - length)[None, None]


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def check_mask_dtype(mask: torch.Tensor, name: str = "attention_mask") -> None:
    """Refuse a mask of integers: its ones and zeros would be added to the logits.

    Raises:
        ValueError: naming the dtype.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} with four axes must be bool or float, got {mask.dtype}")


def four_axes(name: str, term: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Give a mask or a bias of the logits four axes.

    Args:
        name: of the argument.
        term: at most four axes, each 1 or as in ``shape``, aligned at the last one.
        shape: ``(batch, heads, length, key_length)``.

    Returns:
        ``[batch or 1, heads or 1, length or 1, key_length or 1]``, a view.

    Raises:
        ValueError: naming the argument and its shape.
    """
    full = (1,) * (4 - term.ndim) + tuple(term.shape)
    if len(full) != 4 or any(size not in (1, wanted) for size, wanted in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must be broadcastable to {shape}, got shape {tuple(term.shape)}")
    return term.view(full)


def check_model_mask(mask: torch.Tensor | None, batch: int, heads: int, length: int, key_length: int) -> None:
    """Refuse a mask that does not fit a model's input.

    Args:
        mask: ``[batch, key_length]``, or ``[batch or 1, heads or 1, length, key_length]``, or None.
        batch: rows of the input.
        heads: attention heads.
        length: new tokens.
        key_length: new and cached tokens.

    Raises:
        ValueError: naming the shapes (with four axes also the dtypes) that are allowed and what was given.
    """
    if mask is None:
        return
    shape = tuple(mask.shape)
    if len(shape) == 4:
        check_mask_dtype(mask)
    fits_2d = shape == (batch, key_length)
    fits_4d = (
        len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (length, key_length)
    )
    if not fits_2d and not fits_4d:
        raise ValueError(
            f"attention_mask must have shape {(batch, key_length)} or {(batch, 1, length, key_length)} "
            f"(heads may be {heads} in place of 1), got {shape}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Building it
# --------------------------------------------------------------------------------------------------------------------


def split_mask(
    mask: torch.Tensor, working_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split a mask into what may be seen and what is added to the logits.

    Args:
        mask: boolean (True = visible) or additive float.
        working_dtype: of the logits; None: the mask's.

    Returns:
        Booleans, and the additive part, finite (or NaN where the mask is NaN, so that a wrong mask shows), or None.
        Additive values near the smallest number of their dtype, or of the logits' if that is nearer to 0, mean "not
        visible": adding them to a large negative logit would not hide it in every precision.

    Raises:
        ValueError: for a mask of integers.
    """
    check_mask_dtype(mask)
    if mask.dtype == torch.bool:
        return mask, None
    lowest = max(torch.finfo(dtype).min for dtype in (mask.dtype, working_dtype or mask.dtype))
    hidden = mask <= lowest / 2
    return ~hidden, mask.masked_fill(hidden, 0.0)


def attention_visibility(
    mask: torch.Tensor | None,
    *,
    shape: tuple[int, int, int, int],
    causal: bool = False,
    working_dtype: torch.dtype | None = None,
    name: str = "attention_mask",
) -> Visibility:
    """What a mask of the logits shows, with or without causality beside it.

    Args:
        mask: boolean (True = visible) or additive float, broadcastable to ``shape``, or None.
        shape: ``(batch, heads, length, key_length)``.
        causal: whether no query sees a key after its own.
        working_dtype: of the logits; None: the mask's.
        name: of the mask, for messages.

    Raises:
        ValueError: for a mask of integers or of another shape.
    """
    length, key_length = shape[2:]
    if mask is None:
        return Visibility(length, key_length, causal)
    check_mask_dtype(mask, name)
    allowed, bias = split_mask(four_axes(name, mask, shape), working_dtype)
    if bias is not None and _is_all_zero(bias):
        bias = None
    if _all_true(allowed):
        return Visibility(length, key_length, causal, bias=bias)
    if allowed.shape[-2] == 1 and allowed.shape[-1] == key_length:
        # A single query or a row for all queries: what is hidden, is hidden from every query.
        return padding_visibility(allowed, length, causal)._replace(bias=bias)
    both = allowed & causal_mask(length, key_length, mask.device) if causal else allowed
    found = _as_padding(both, length, key_length, causal)
    if found is not None:
        return found._replace(bias=bias, dense=both)
    seen, sees = both.any(-2, keepdim=True).expand(-1, -1, -1, key_length), both.any(-1, keepdim=True)
    causal = causal or _is_causal(allowed, length, key_length)
    return Visibility(
        length, key_length, causal, mask=allowed, bias=bias, hidden=_places_outside(seen), blind=_places_outside(sees)
    )


def _as_padding(allowed: torch.Tensor, length: int, key_length: int, causal: bool) -> Visibility | None:
    """What a mask of all pairs shows, if that is known to be keys that are no padding, with causality or without.

    The last query sees all of these keys, and the first one too if there is no causality. A mask made of them that
    differs nowhere says the same; windows, prefixes and several texts in a row do not.

    Args:
        allowed: boolean ``[batch or 1, heads or 1, length or 1, key_length or 1]``, causality included.
        length: number of queries, the last tokens.
        key_length: number of keys.
        causal: whether no query sees a key after its own.
    """
    if not _can_look(allowed) or allowed.shape[-2:] != (length, key_length) or not length or not key_length:
        return None
    keys, first = allowed[..., -1:, :], allowed[..., :1, :]
    if causal or not torch.equal(keys, first):
        if length > key_length or not torch.equal(keys & causal_mask(length, key_length, allowed.device), allowed):
            return None
        causal = True
    elif torch.equal(keys.expand_as(allowed), allowed):
        causal = length <= key_length and not bool(keys[..., key_length - length + 1 :].any())
    else:
        return None
    return Visibility(length, key_length, causal) if _all_true(keys) else padding_visibility(keys, length, causal)


def padding_visibility(keys: torch.Tensor, length: int, causal: bool) -> Visibility:
    """What is seen where nothing but padding and, if ``causal``, later tokens is hidden.

    Args:
        keys: boolean ``[batch or 1, heads or 1, 1, key_length]``, True = no padding.
        length: number of queries, the last tokens.
        causal: whether no query sees a key after its own.
    """
    key_length = keys.shape[-1]
    if causal and length > 1:  # padding by a negative number cuts off the earlier tokens
        sees = torch.nn.functional.pad(keys.long().cumsum(-1), (length - key_length, 0)).mT > 0
    else:
        sees = keys.any(-1, keepdim=True)
    return Visibility(length, key_length, causal, keys=keys, hidden=_places_outside(keys), blind=_places_outside(sees))


def model_visibility(
    attention_mask: torch.Tensor | None,
    built_mask: torch.Tensor | None,
    *,
    length: int,
    key_length: int | None,
    causal: bool,
    position_ids: torch.Tensor | None = None,
) -> Visibility:
    """What the tokens of a whole model see.

    Args:
        attention_mask: what the model was called with, checked: ``[batch, key_length]`` (0 or False = padding), one
            with four axes, or None.
        built_mask: what Transformers made of it for its own attention functions: boolean or additive, four axes, or
            None. It is taken where only it says what is seen: of a mask with four axes and of several texts in a row.
        length: new tokens, the last ones.
        key_length: new and cached tokens; None with a cache of fixed size, where only the built mask tells which
            places are empty. Without a mask its tokens are the first ones, and attend to themselves.
        causal: whether the model is.
        position_ids: what the model was called with, ``[batch or 1, length]``, or None. Without a mask Transformers
            takes position_ids that are not consecutive for several texts in one row, masked from each other.
    """
    if key_length is None:
        if built_mask is None:
            return Visibility(length, length, causal)
        return attention_visibility(built_mask, shape=(*built_mask.shape[:2], length, built_mask.shape[-1]))
    dense = built_mask if built_mask is not None and built_mask.dtype == torch.bool else None
    if attention_mask is not None and attention_mask.ndim == 2:
        keys = (attention_mask != 0)[:, None, None, :]
        if _all_true(keys):
            return Visibility(length, key_length, causal)
        return padding_visibility(keys, length, causal)._replace(dense=dense)
    is_packed = attention_mask is None and position_ids is not None and _may_hold_several_texts(position_ids)
    if built_mask is None or not (is_packed or attention_mask is not None):
        return Visibility(length, key_length, causal, dense=dense)
    shape = (built_mask.shape[0], built_mask.shape[1], length, key_length)
    return attention_visibility(built_mask, shape=shape, causal=causal and is_packed)


def _may_hold_several_texts(position_ids: torch.Tensor) -> bool:
    # This waits for an accelerator, but so does Transformers, which reads the same values.
    return torch.compiler.is_compiling() or bool((position_ids.diff(dim=-1) != 1).any())


def _can_look(x: torch.Tensor) -> bool:
    """Whether to read values: on an accelerator that would wait for it, in a traced graph it would break the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _all_true(mask: torch.Tensor) -> bool:
    return _can_look(mask) and bool(mask.all())


def _is_all_zero(bias: torch.Tensor) -> bool:
    """Whether a bias is known to change nothing, and to have no gradient that anybody waits for."""
    return not bias.requires_grad and _can_look(bias) and not bool(bias.any())


def _places_outside(seen: torch.Tensor) -> torch.Tensor | None:
    """The places that are not seen, or None where there are known to be none."""
    return None if _all_true(seen) else ~seen


def _is_causal(allowed: torch.Tensor, length: int, key_length: int) -> bool:
    """Whether a mask is known to hide every later key, so that algorithms for causal attention may be used."""
    if not _can_look(allowed) or allowed.shape[-2:] != (length, key_length) or key_length < length:
        return False
    return not bool(allowed.triu(key_length - length + 1).any())


def stock_mask(mask: torch.Tensor | None, implementation: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Mend a mask with four axes for stock ``eager`` attention, which adds it to the logits as it is.

    A boolean one would add 0 and 1, and rows of nothing but -inf would be NaN.
    """
    if mask is None or mask.ndim != 4 or implementation != "eager":
        return mask
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(mask.dtype).min)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
