"""Faults of the cache layers of Transformers 5.17, the oldest supported version, mended where filters are cached.

And one way around PyTorch 2.11.

Whether a layer has a fault is asked of its class, not of a version's number. Layers of other models without a filter
are Transformers' own, and keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

RESETS_HALFWAY = "reset" not in vars(DynamicLayer)
"""Whether the stock growing layers become zeros instead of empty, and so keep their length."""


def reorders_halfway(layer_class: Any) -> bool:
    """Whether a quantised cache layer leaves its quantised rows in their order in beam search."""
    return hasattr(layer_class, "_quantize") and not hasattr(layer_class, "_apply_pending_reorder")


def reorder_quantised(self: Any, beam_idx: torch.Tensor) -> None:
    """Reorder all rows of a quantised cache layer for beam search; what is quantised is quantised once more."""
    if self.get_seq_length() == 0:
        return
    for name, axis in (("keys", "axis_key"), ("values", "axis_value")):
        stored, recent = f"_quantized_{name}", getattr(self, name)
        rows = self._dequantize(getattr(self, stored))
        rows = rows.index_select(0, beam_idx.to(rows.device)).contiguous()
        setattr(self, stored, self._quantize(rows, axis=getattr(self, axis, 0)))
        if recent.ndim > 1:  # rows that wait to be quantised; else there are none
            setattr(self, name, recent.index_select(0, beam_idx.to(recent.device)))


def mended(layer_class: Any, name: str) -> Callable[..., Any]:
    """A method of a cache layer's class, without its fault.

    Args:
        layer_class: of a cache layer.
        name: of one of its methods.
    """
    method = getattr(layer_class, name)
    if name == "reorder_cache" and reorders_halfway(layer_class):
        return reorder_quantised
    if name == "crop":

        def crop(self: Any, tokens_to_remove: int) -> None:
            """There is nothing to take from an empty layer, whose rows are None."""
            if self.is_initialized or tokens_to_remove > 0:  # which newer versions refuse
                method(self, tokens_to_remove)

        return crop
    if name == "reset" and not layer_class.is_compileable:

        def reset(self: Any) -> None:
            """A layer that grows starts anew."""
            method(self)
            self.keys = self.values = None
            self.is_initialized = False

        return reset
    return method


class AnewLayer(DynamicLayer):
    """The stock growing layer, which starts anew and is not cut while it is empty."""

    _layer_type: str | None = None
    crop = mended(DynamicLayer, "crop")
    reset = mended(DynamicLayer, "reset")


def seen_rows(layer: Any, rows: torch.Tensor, new: int) -> torch.Tensor:
    """What a mask shows of the rows ``[batch, heads, length, width]`` that a cache layer hands out.

    A sliding layer that records its past, for assisted decoding, hands out more than its window.

    Args:
        layer: that has stored the rows.
        rows: what its ``update`` has returned.
        new: how many of them are new.
    """
    if not layer.is_sliding or layer.is_compileable:
        return rows
    return rows[..., -(layer.sliding_window - 1 + new) :, :]


@torch.compiler.assume_constant_result
def attribute_names(layer_class: Any) -> tuple[str, ...]:
    """Names that the attributes of a cache layer may have: compiled code of PyTorch 2.11 cannot read ``__dict__``."""
    codes = [getattr(part, "__code__", None) for each in layer_class.__mro__ for part in vars(each).values()]
    names = {name for code in codes if code is not None for name in code.co_names}
    return tuple(sorted(name for name in names if not hasattr(layer_class, name)))
