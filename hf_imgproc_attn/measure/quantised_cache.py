"""What a quantised cache costs a language model with a filter: its rows rounded as values are, or kept whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from ..models import cache_followed

BITS = (8, 4, 2)
GROUP = 8
"""Numbers that share a scale and a zero."""


class RoundedLayer(QuantizedLayer):
    """A cache layer whose keys and values are rounded to a few bits a number, in groups of :data:`GROUP`."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        groups = tensor.unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-12) / (2**self.nbits - 1)
        return ((groups - low) / scale).round().to(torch.uint8), scale, low

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        codes, scale, low = q_tensor
        return (codes * scale + low).flatten(-2)


@torch.no_grad()
def relative_error(model: Any, ids: torch.Tensor, bits: int) -> float:
    """Norm of the error of the logits beside that of the logits, of a text that is read token by token.

    Args:
        model: a causal language model, filtered or not, whose heads have widths that :data:`GROUP` divides.
        ids: ``[batch, length]``.
        bits: of each number in the cache.
    """
    exact = model(ids, use_cache=False).logits
    layers = model.config.get_text_config().num_hidden_layers
    cache = Cache(layers=[RoundedLayer(nbits=bits, residual_length=1) for _ in range(layers)])
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    return float((torch.cat(steps, dim=1) - exact).norm() / exact.norm())


def errors(stock: Any, filtered: Any, ids: torch.Tensor) -> list[tuple[str, ...]]:
    """A row for each number of bits, below the head of a table: stock model, rows rounded, rows whole.

    Args:
        stock: a causal language model.
        filtered: the same with a filter whose rows are those of a booster.
        ids: ``[batch, length]``.
    """
    rows: list[tuple[str, ...]] = [("cache", "stock model", "rows quantised", "rows whole")]
    for bits in BITS:
        found = [relative_error(stock, ids, bits), relative_error(filtered, ids, bits)]
        with _rows_whole():
            found.append(relative_error(filtered, ids, bits))
        rows.append((f"{bits} bits, groups of {GROUP} numbers", *(f"{100 * error:.1f} %" for error in found)))
    return rows


@contextmanager
def _rows_whole() -> Iterator[None]:
    """Keep the rows of boosters whole, whatever the cache is."""
    before = cache_followed.KEPT_WHOLE
    cache_followed.KEPT_WHOLE = (*before, *map(str, range(1, 16)))  # type: ignore[assignment]
    try:
        yield
    finally:
        cache_followed.KEPT_WHOLE = before
