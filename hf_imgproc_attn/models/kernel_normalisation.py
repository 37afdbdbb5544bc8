"""How logits become the weights of a filter: softmax and its rivals, dense, on rows of logits.

With l the logits of row i, m its largest (at least 0 for ``softpick``) and n_i the number of keys that it sees

    softmax   a_ij = e^l_ij / sum_k e^l_ik
    sink      a_ij = e^l_ij / (e^b + sum_k e^l_ik), b a learned number a head (softmax-1; the sinks of GPT-OSS)
    sigmoid   a_ij = sigmoid(l_ij - log n_i)   (Ramapuram 2024, arXiv 2409.04431)
    softpick  a_ij = relu(e^(l_ij - m) - e^-m) / (eps + sum_k |e^(l_ik - m) - e^-m|)   (arXiv 2504.20966)
    sinkhorn  e^l scaled to columns, then rows, that sum to 1, t times  (Sinkformers, arXiv 2110.11773)

``sink`` is softmax with one more key, whose value is 0, and has its place there: ``FilterCall.sinks``. Only the rows
of ``softmax`` and ``sinkhorn`` sum to 1. Only ``softmax`` ignores a number that is added to a whole row of logits; the
first step of ``sinkhorn`` is over columns, which do not. ``sinkhorn`` compares rows with each other: it needs all of
them at once, in memory O(length * key_length), and no causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .spec_axes import DEFAULT_SINKHORN_ITERATIONS

SOFTPICK_EPSILON = 1e-6
"""As in the paper. No gradient flows through m, which cancels but for this number."""


class Normalisation(NamedTuple):
    """How rows of logits become weights.

    name: ``"softmax"`` or a key of :data:`NORMALISATIONS`.
    iterations: of ``sinkhorn``, each a step over columns and one over rows.
    """

    name: str = "softmax"
    iterations: int = DEFAULT_SINKHORN_ITERATIONS

    @property
    def ignores_row_constants(self) -> bool:
        """Whether a number that is added to a whole row of logits changes nothing."""
        return self.name == "softmax"


def sigmoid_weights(
    logits: torch.Tensor, allowed: torch.Tensor | None, hidden: torch.Tensor | None, iterations: int
) -> torch.Tensor:
    """sigmoid(l_ij - log n_i); every row weighs its keys by themselves. Arguments as of :data:`NORMALISATIONS`."""
    if allowed is None:
        seen = torch.full((), float(logits.shape[-1]), dtype=logits.dtype, device=logits.device)
    else:
        shown = allowed.expand(*allowed.shape[:-1], logits.shape[-1])
        seen = shown.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype)
    return torch.sigmoid(logits - seen.log())


def softpick_weights(
    logits: torch.Tensor, allowed: torch.Tensor | None, hidden: torch.Tensor | None, iterations: int
) -> torch.Tensor:
    """Rectified softmax: keys with a logit below 0 get no weight, and a row may have none at all."""
    largest = logits.detach().amax(-1, keepdim=True).clamp(min=0.0)
    above = torch.exp(logits - largest) - torch.exp(-largest)
    if allowed is not None:
        above = above.masked_fill(~allowed, 0.0)
    return above.relu() / (SOFTPICK_EPSILON + above.abs().sum(-1, keepdim=True))


def sinkhorn_weights(
    logits: torch.Tensor, allowed: torch.Tensor | None, hidden: torch.Tensor | None, iterations: int
) -> torch.Tensor:
    """Columns, then rows, that sum to 1, ``iterations`` times, in logarithms; the rows do so exactly.

    Rows of padding, tokens that nobody sees, do not count in the sums of columns, so that a text is filtered as it is
    alone.
    """
    if logits.shape[-2] != logits.shape[-1]:
        raise ValueError(
            "normalisation 'sinkhorn' scales all rows of A together and needs as many queries as keys, got "
            f"{logits.shape[-2]} and {logits.shape[-1]}"
        )
    # A query that sees nothing has the same logit everywhere by now.
    shown = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    return sinkhorn_steps(shown, hidden, iterations)[0].exp()


def sinkhorn_steps(
    logits: torch.Tensor, hidden: torch.Tensor | None, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log A, and what the steps over columns have added to the logits of each key.

    Args:
        logits: -inf at what is hidden, ``[batch, heads, length, length]``.
        hidden: keys that no query sees, as for :data:`NORMALISATIONS`.
        iterations: of both steps.

    Returns:
        ``[batch, heads, length, length]`` and ``[batch, heads, length]``.
    """
    logs, columns = logits, torch.zeros_like(logits[..., 0, :])
    for _ in range(iterations):
        counted = logs if hidden is None else logs.masked_fill(hidden.mT, float("-inf"))
        found = _log_sum(counted, -2)
        columns = columns - found.squeeze(-2)
        logs = logs - found
        logs = logs - _log_sum(logs, -1)
    return logs, columns


def _log_sum(logs: torch.Tensor, dim: int) -> torch.Tensor:
    """log of a sum of exponentials, 0 where all of them are 0."""
    empty = (logs == float("-inf")).all(dim, keepdim=True)
    return logs.masked_fill(empty, 0.0).logsumexp(dim, keepdim=True).masked_fill(empty, 0.0)


Weights = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", int], torch.Tensor]

NORMALISATIONS: dict[str, Weights] = {
    "sigmoid": sigmoid_weights,
    "softpick": softpick_weights,
    "sinkhorn": sinkhorn_weights,
}
"""name -> function(logits, allowed, hidden, iterations) -> A.

logits: ``[batch, heads, length, key_length]``, -inf at what is hidden, 0 in rows that see nothing.
allowed: what is visible, broadcastable to it, or None.
hidden: keys that no query sees, ``[batch or 1, heads or 1, 1, key_length]``, or None.
"""
