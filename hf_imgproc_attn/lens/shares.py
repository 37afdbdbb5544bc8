"""What a head's logits are made of: content with content, position with position, and the two cross terms.

Query and key are each a sum of parts, so the logits are a sum of terms t_ab = s <q^a_i, k^b_j>. Within a row a
constant changes no softmax: a term counts by how it varies over the keys that the query sees. The share of a term in
the variance of the logits l is

    share_ab = sum_i sum_{j in V(i)} (t_ab - mean_j t_ab)(l_ij - mean_j l_ij) / sum_i sum_j (l_ij - mean_j l_ij)^2

The shares add up to 1; a term that works against the others has a negative one. A key part that is the same for all
keys has none.

*Parts by mean effects* (analysis of variance; Song, Zhong 2023, arXiv 2310.04861, with the token in place of the text
as the second factor): over a batch, x_bi of token type c at place i is

    x_bi = constant + position_i + content_c + rest_bi
    constant    the mean over all real tokens
    position_i  the mean over the batch at place i, minus the constant
    content_c   the mean of what is left over all tokens of type c; 0 for types that occur once
    rest        what is left then: context, and the interaction of token and place

Queries and keys are linear in the attention's input, and so are means, so that this is the same as decomposing the
input (after rotary embedding: at each place). Images have no token types: there content is all that position is not,
and rest is 0.

*Exact parts*, layer 0 of models that add a table of positions to the token (GPT-2, ViT): given the statistics of the
norm before the attention, its output is linear in token and position. *Position kernels* that a layer adds to its
logits are a term as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..models.backend_call import FilterCall
from .rows import BLOCK_SCORES, filter_rows, position_rows

Parts = Mapping[str, torch.Tensor]
"""Named parts of queries or keys, ``[batch, heads, length, head_dim]``, whose sum they are."""

KERNEL = "position kernel"
REMAINDER = "other"


def mean_effects(
    x: torch.Tensor, types: torch.Tensor | None, real: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Constant, position, content and rest of queries or keys, in float64.

    Args:
        x: ``[batch, heads, length, d]``.
        types: token types, integers ``[batch, length]``; None: there are none, content is all that position is not.
        real: boolean ``[batch, length]``, False for padding; None: all are real.
    """
    x = x.double()
    batch, _, length, _ = x.shape
    mask = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    weight = mask.to(x.device).double()[:, None, :, None]
    constant = (x * weight).sum((0, 2), keepdim=True) / weight.sum((0, 2), keepdim=True)
    at_place = (x * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)
    position = torch.where(weight.sum(0, keepdim=True) > 0, at_place - constant, 0.0)
    left = x - constant - position
    content = left if types is None else _type_means(left, types.to(x.device), mask.to(x.device))
    parts = {"constant": constant, "position": position, "content": content, "rest": left - content}
    return {name: part.expand_as(x) for name, part in parts.items()}


def _type_means(x: torch.Tensor, types: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean of each token type at all of its tokens, 0 for types that occur once."""
    rows = x.transpose(1, 2)[real]  # [tokens, heads, d]
    _, index, counts = types[real].unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), *rows.shape[1:], dtype=x.dtype, device=x.device).index_add_(0, index, rows)
    means = sums / counts.view(-1, 1, 1)
    means[counts < 2] = 0.0
    result = torch.zeros_like(x.transpose(1, 2))
    result[real] = means[index]
    return result.transpose(1, 2)


def variance_shares(
    call: FilterCall,
    query_parts: Parts,
    key_parts: Parts,
    real: torch.Tensor | None = None,
    scores: int = BLOCK_SCORES,
) -> dict[str, list[float]]:
    """The share of each term in the variance of the logits, one number a head.

    Args:
        call: the call, whose queries and keys are the sums of their parts.
        query_parts: of its queries.
        key_parts: of its keys, with as many heads as the queries; a part named ``"constant"`` has no share.
        real: boolean ``[batch, length]`` or None.
        scores: the most weights to hold at a time.

    Returns:
        ``"A-B"`` for query part A and key part B; :data:`KERNEL` for what position kernels and biases add; and
        :data:`REMAINDER`, what is left: the norms of keys in a Gaussian kernel, or a nonlinear bound on logits.
    """
    heads = call.query.shape[1]
    names = [(a, b) for a in query_parts for b in key_parts if b != "constant"]
    covariance = {name: torch.zeros(heads, dtype=torch.float64) for name in names}
    kernel, total = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    for rows in filter_rows(call, scores):
        part = slice(rows.start, rows.stop)
        centred = _centred(rows.logits.double(), rows.allowed)
        if real is not None:
            centred = centred * real.to(centred.device)[:, None, part, None]
        total += centred.square().sum((0, 2, 3)).cpu()
        scale = call.content.scale
        if isinstance(scale, torch.Tensor) and scale.ndim > 2 and scale.shape[-2] == call.query.shape[-2] > 1:
            scale = scale[..., part, :]
        for b in dict.fromkeys(b for _, b in names):
            # sum_j (l_ij - mean) <q_i, k_j>: the term need not be centred, since the logits are.
            weighted = centred @ key_parts[b][..., : rows.keys, :]
            for a in query_parts:
                covariance[a, b] += (query_parts[a][..., part, :] * scale * weighted).sum((0, 2, 3)).cpu()
        for term in call.positions:
            kernel += (position_rows(term, *rows[:3], torch.float64) * centred).sum((0, 2, 3)).cpu()
    shares = {f"{a}-{b}": value / total for (a, b), value in covariance.items()}
    if call.positions:
        shares[KERNEL] = kernel / total
    shares[REMAINDER] = 1.0 - torch.stack(list(shares.values())).sum(0)
    return {name: value.tolist() for name, value in shares.items()}


def _centred(logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Logits minus their mean over the keys that each query sees; 0 at the other keys."""
    if allowed is None:
        return logits - logits.mean(-1, keepdim=True)
    count = allowed.expand_as(logits).sum(-1, keepdim=True).clamp(min=1)
    logits = logits.masked_fill(~allowed, 0.0)
    return (logits - logits.sum(-1, keepdim=True) / count).masked_fill(~allowed, 0.0)


def decompose_by_means(
    call: FilterCall, types: torch.Tensor | None, real: torch.Tensor | None = None, scores: int = BLOCK_SCORES
) -> dict[str, list[float]]:
    """Shares by mean effects, see above; the batch must have two samples or more.

    Raises:
        ValueError: for a single sample, of which position and content cannot be told apart.
    """
    if call.query.shape[0] < 2:
        raise ValueError("mean effects need at least 2 samples, got 1: position and content cannot be told apart")
    keys = call.key.repeat_interleave(call.groups, dim=1)
    return variance_shares(call, mean_effects(call.query, types, real), mean_effects(keys, types, real), real, scores)


FOUR_TERMS = ("content-content", "position-position", "content-position", "position-content")
"""The terms of the expanded kernel of stock attention, in the order of arXiv 2506.10371."""


def summed_up(shares: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The four terms, those of a constant query, the residual share (any term with a rest), and the others.

    Args:
        shares: of :func:`variance_shares`.
    """
    result: dict[str, list[float]] = {}
    for name, values in shares.items():
        short = name
        if "rest" in name.split("-"):
            short = "residual"
        before = result.get(short, [0.0] * len(values))
        result[short] = [one + other for one, other in zip(before, values, strict=True)]
    return result
