"""What ``once`` is given: a filter that can be applied, its checks, and what follows from its mask. No Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..models.kernel_position import BlockedPositions

MAX_WIDTH = 256
"""Of queries, keys and x."""
NORMALISATIONS = ("softmax", "sigmoid", "softpick")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Once(NamedTuple):
    """A filter that can be applied: what :func:`apply_once` takes beside x.

    query: ``[batch, heads, length, width]``, the last tokens; float16, bfloat16, or float32 in the interpreter.
    key: ``[batch, key_heads, key_length, width]``; ``key_heads`` divides ``heads``.
    scale: on q.k.
    key_mask: which keys are visible, boolean ``[batch, key_length]``; or how many of a sample's first keys are, int32
        ``[batch]``, which costs no look at a mask; None: all. A query that sees none gives 0.
    is_causal: whether no query sees a key after its own, query i standing at ``key_length - length + i``.
    positions: Gaussian, ALiBi or relative buckets by place, or None; parameters have gradients, coordinates do not.
    key_bias: added to all logits of a key, float32 ``[batch, heads, key_length]``, or None.
    query_bias: added to all logits of a query, which a softmax without sinks would not notice, float32
        ``[batch, heads, length]``, beside a key bias, or None.
    dropout: probability in [0, 1) with which a weight of A becomes 0; the others are divided by 1 - p.
    seed: int64 ``[1]`` on the query's device, from which the dropped weights follow; None where nothing is dropped.
    normalisation: ``"softmax"``, ``"sigmoid"`` or ``"softpick"``, see ``models.kernel_normalisation``.
    sinks: float32 ``[heads]``, the logit of one more key a head, whose x is 0, beside softmax; None: there is none.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    key_mask: torch.Tensor | None = None
    is_causal: bool = False
    positions: BlockedPositions | None = None
    key_bias: torch.Tensor | None = None
    query_bias: torch.Tensor | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None
    normalisation: str = "softmax"
    sinks: torch.Tensor | None = None


def visible_keys(key_mask: torch.Tensor | None, key_length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask, and the first visible key of each sample and the one behind the last, which bound the loops."""
    if key_mask is None:
        return None, None
    if key_mask.dtype != torch.bool:
        ends = key_mask.clamp(min=0, max=key_length)
        return None, torch.stack((torch.zeros_like(ends), ends), 1).int()
    numbers = torch.arange(key_length, dtype=torch.int32, device=key_mask.device)
    first = torch.where(key_mask, numbers, key_length).amin(1)
    end = torch.where(key_mask, numbers + 1, 0).amax(1)
    return key_mask, torch.stack((torch.minimum(first, end), end), 1).int()


def log_counts(
    mask: torch.Tensor | None, spans: torch.Tensor | None, query: torch.Tensor, key_length: int, is_causal: bool
) -> torch.Tensor:
    """log2 of the number of keys that each query sees, at least 1: float32 ``[batch, length]``.

    Args:
        mask: as :func:`visible_keys` returns it.
        spans: likewise.
        query: ``[batch, heads, length, width]``.
        key_length: number of keys.
        is_causal: see :class:`Once`.
    """
    batch, length = query.shape[0], query.shape[2]
    keys = torch.arange(key_length, device=query.device)
    shown = mask
    if shown is None:
        shown = (keys < key_length).expand(batch, -1) if spans is None else keys < spans[:, 1:]
    counts = shown.sum(1, keepdim=True).expand(-1, length)
    if is_causal:
        places = torch.arange(length, device=query.device) + (key_length - length)
        counts = shown.cumsum(1)[:, places.clamp(min=0)] * (places >= 0)
    return counts.clamp(min=1).float().log2()


def check(once: Once, x: torch.Tensor) -> None:
    """Refuse tensors that the kernels would misread."""
    query, key = once.query, once.key
    if not query.dim() == key.dim() == x.dim() == 4:
        raise ValueError(
            f"query, key and x must have 4 axes [batch, heads, length, width], got {_shapes(query, key, x)}"
        )
    (batch, heads, _, width), (_, key_heads, key_length, _) = query.shape, key.shape
    fits = key.shape[0] == x.shape[0] == batch and key.shape[3] == width and x.shape[2] == key_length > 0
    fits = fits and all(own > 0 and heads % own == 0 for own in (key_heads, x.shape[1]))
    if not fits:
        raise ValueError(
            "key must have the query's batch and width, x the key's batch and length, and both a divisor of the "
            f"query's heads, got {_shapes(query, key, x)}"
        )
    if max(width, x.shape[3]) > MAX_WIDTH:
        raise ValueError(f"widths must be <= {MAX_WIDTH}, got {_shapes(query, key, x)}")
    if not query.dtype == key.dtype == x.dtype or query.dtype not in _DTYPES:
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, x))
        raise ValueError(f"query, key and x must be all float16, bfloat16 or float32, got {names}")
    if query.is_cuda and query.dtype == torch.float32:
        raise ValueError("on a GPU query, key and x must be float16 or bfloat16, got torch.float32")
    _check_options(once, key_length)


def _shapes(*tensors: torch.Tensor) -> str:
    """For messages; a traced graph of any length cannot make them."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _check_options(once: Once, key_length: int) -> None:
    """Refuse a mask, a bias or a dropout that is none."""
    mask, batch, heads, length = once.key_mask, *once.query.shape[:3]
    forms = {torch.bool: (batch, key_length), torch.int32: (batch,)}
    if mask is not None and forms.get(mask.dtype) != tuple(mask.shape):
        raise ValueError(
            f"key_mask must be boolean [batch, key_length] = {forms[torch.bool]} or int32 [batch] = {(batch,)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    for name, numbers, axes, shape in (
        ("key_bias", once.key_bias, "[batch, heads, key_length]", (batch, heads, key_length)),
        ("query_bias", once.query_bias, "[batch, heads, length]", (batch, heads, length)),
        ("sinks", once.sinks, "[heads]", (heads,)),
    ):
        if numbers is not None and (numbers.dtype, tuple(numbers.shape)) != (torch.float32, shape):
            raise ValueError(f"{name} must be float32 {axes} = {shape}, got {numbers.dtype} {tuple(numbers.shape)}")
    if once.query_bias is not None and once.key_bias is None:
        raise ValueError("query_bias must stand beside a key_bias, got None")
    if once.normalisation not in NORMALISATIONS or (once.sinks is not None and once.normalisation != "softmax"):
        allowed = f"one of {', '.join(NORMALISATIONS)}" if once.sinks is None else "softmax beside sinks"
        raise ValueError(f"normalisation must be {allowed}, got {once.normalisation!r}")
    if not 0.0 <= once.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {once.dropout!r}")
    seed = once.seed
    if once.dropout > 0.0 and (seed is None or (seed.dtype, tuple(seed.shape)) != (torch.int64, (1,))):
        got = seed if seed is None else (seed.dtype, tuple(seed.shape))
        raise ValueError(f"seed must be int64 of shape (1,) where dropout > 0, got {got}")
