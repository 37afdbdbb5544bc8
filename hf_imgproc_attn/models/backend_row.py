"""Products of one query, as of a decoding step on a CPU: there each operation costs more than its arithmetic.

Between two layers a step reads megabytes of weights, so that neither code nor cached rows are in the processor's
caches any more when a layer begins.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .backend_call import FilterCall, without_autocast
from .kernel_position import UntiedPositions


def heads_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of ``[batch, heads, rows, inner]`` and ``[batch, heads, inner, columns]``.

    Of one row or column, on a CPU, without what ``torch.matmul`` does to find out that nothing is to be broadcast.
    """
    batch, heads, rows, _ = left.shape
    columns = right.shape[-1]
    is_small = (rows == 1 or columns == 1) and left.device.type == "cpu" and left.shape[:2] == right.shape[:2]
    if not is_small or torch.compiler.is_compiling():
        return torch.matmul(left, right)
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).view(batch, heads, rows, columns)


def joint_logits(call: FilterCall, compute_dtype: torch.dtype) -> torch.Tensor | None:
    """Logits of one query by one product, with keys of content and position that lie side by side.

    Args:
        call: of a single query.
        compute_dtype: at least float32.

    Returns:
        ``[batch, heads, 1, key_length]``; None where the two do not lie so, or where anything else enters the logits.
    """
    term, seen = call.positions[0] if len(call.positions) == 1 else None, call.visibility
    key = term.beside(call.key) if isinstance(term, UntiedPositions) else None
    is_plain = call.content.kernel == "dot_product" and call.content.softcap is None
    if key is None or not isinstance(term, UntiedPositions) or not is_plain or call.groups != 1:
        return None
    if seen.bias is not None or seen.hidden is not None or seen.blind is not None:
        return None
    with without_autocast(call.query.device.type):
        key, query, place = (x.to(compute_dtype) for x in (key, call.query, term.query))
        place = place.expand_as(query) if place.shape[0] != query.shape[0] else place
        # Without gradients, a cache knows both factors from the step before.
        ahead = getattr(call.streams, "ahead", None)
        if ahead is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            query = torch.cat((query * call.content.scale, place * term.scale), dim=-1)
        else:
            query = torch.cat((query, place), dim=-1) * ahead.side_by_side(call.content.scale, term.scale, query)
        if _reads_rows_faster() and query.device.type == "cpu":
            return heads_product(key, query.mT).mT
        return heads_product(query, key.mT)


@lru_cache
def _reads_rows_faster() -> bool:
    """Whether many keys times one query are faster than one query times all keys turned.

    So it is where MKL has no AVX-512 and the keys come from memory: by a quarter at 256 to 2,048 keys of width 128.
    With AVX-512 it has not been measured.
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX512"
