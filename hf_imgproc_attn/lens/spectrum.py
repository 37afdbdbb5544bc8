"""Spectra of the filter A of a head, and of the operator p(A) that its booster makes of it.

    eigenvalues       of the matrix, complex
    singular_values   of the matrix
    effective_rank    exp of the entropy of the singular values divided by their sum (Roy, Vetterli 2007)
    stable_rank       |B|_F^2 / |B|_2^2
    radius            largest |eigenvalue| of P B P, P = I - 1 1^T / N
    gain              largest singular value of P B P: above 1 the operator amplifies some contrast between tokens

A has the eigenvalue 1 on constants, since its rows sum to 1; its other eigenvalues are those of P A P on what is
orthogonal to constants. Applied n times, contrast shrinks as radius^n (over-smoothing).

Up to ``DENSE_LENGTH`` tokens LAPACK finds everything. Beyond that, ARPACK (``scipy.sparse.linalg``) finds the few
largest of each, from products with the operator alone, whose rows are computed as they are needed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.backend_call import FilterCall
from ..models.backend_reference import filter_logits, reference_attention
from .rows import apply_filter_by_rows, apply_operator_by_rows, difference_of, filter_rows, some_samples

DENSE_LENGTH = 1024
"""The most tokens whose matrix is formed."""
ITERATIVE_VALUES = 6
"""Eigenvalues and singular values that are found beyond that."""


@dataclass
class Spectrum:
    """Of one operator of one head.

    eigenvalues: real and imaginary parts, by falling absolute value.
    singular_values: falling.
    effective_rank: None where not all singular values are known.
    stable_rank: see above; None where |B|_F is not known.
    radius: on the complement of constants.
    gain: likewise.
    complete: whether all eigenvalues and singular values are there, or only the largest.
    """

    eigenvalues: list[tuple[float, float]] = field(default_factory=list)
    singular_values: list[float] = field(default_factory=list)
    effective_rank: float | None = None
    stable_rank: float | None = None
    radius: float = float("nan")
    gain: float = float("nan")
    complete: bool = True


def dense_spectrum(matrix: torch.Tensor) -> Spectrum:
    """The spectrum of a matrix ``[length, length]``."""
    matrix = matrix.double()
    length = matrix.shape[-1]
    values = torch.linalg.eigvals(matrix)
    values = values[values.abs().argsort(descending=True)]
    singular = torch.linalg.svdvals(matrix)
    shares = singular / singular.sum()
    centre = torch.eye(length, dtype=matrix.dtype) - 1.0 / length
    contrast = centre @ matrix @ centre
    return Spectrum(
        [(float(value.real), float(value.imag)) for value in values],
        singular.tolist(),
        float(torch.exp(-torch.special.xlogy(shares, shares).sum())),
        float(singular.square().sum() / singular[0].square()),
        float(torch.linalg.eigvals(contrast).abs().max()),
        float(torch.linalg.matrix_norm(contrast, 2)),
    )


def layer_matrices(call: FilterCall, real: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and the operator of the first sample's real tokens, each ``[heads, length, length]`` in float64.

    Args:
        call: of one or more samples.
        real: boolean ``[batch, length]`` or None.
    """
    first = some_samples(call, slice(0, 1))
    first = first._replace(
        query=first.query.double(),
        key=first.key.double(),
        value=first.value.double(),
        dropout=0.0,
    )
    logits = filter_logits(first)
    found = [
        reference_attention(logits, part, kind)[1]
        for part, kind in ((first._replace(difference=None), "filter"), (first, "operator"))
    ]
    matrices = [matrix[0].detach().cpu() for matrix in found if matrix is not None]
    if real is not None:
        keep = real[0].cpu().nonzero()[:, 0]
        matrices = [matrix[:, keep][:, :, keep] for matrix in matrices]
    return matrices[0], matrices[1]


def iterative_spectrum(call: FilterCall, head: int, *, boosted: bool, values: int = ITERATIVE_VALUES) -> Spectrum:
    """The largest eigenvalues and singular values of one head of the first sample, without its matrix.

    Args:
        call: its queries and keys, ``[batch, heads, length, head_dim]``.
        head: a query head.
        boosted: of the operator p(A) instead of A.
        values: how many to find.

    Raises:
        ValueError: if SciPy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("spectra of more tokens than fit a dense matrix need scipy, which is not installed")
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigs, svds

    one = one_head(some_samples(call, slice(0, 1)), head)
    length = one.query.shape[-2]

    def times(columns: Any, transposed: bool) -> Any:
        x = torch.from_numpy(np.ascontiguousarray(columns)).double().view(1, 1, length, -1)
        product = apply_operator_by_rows if boosted else apply_filter_by_rows
        return product(one, x, transposed=transposed).view(length, -1).numpy().reshape(np.shape(columns))

    def contrast(columns: Any, transposed: bool) -> Any:
        centred = times(columns - columns.mean(0), transposed)
        return centred - centred.mean(0)

    def operator(apply: Any) -> Any:
        return LinearOperator(
            (length, length),
            dtype=np.float64,
            matvec=lambda x: apply(x, False),
            rmatvec=lambda x: apply(x, True),
            matmat=lambda x: apply(x, False),
            rmatmat=lambda x: apply(x, True),
        )

    start = np.random.default_rng(0).standard_normal(length)
    found = eigs(operator(times), k=values, v0=start, return_eigenvectors=False)
    found = found[np.argsort(-np.abs(found))]
    singular = np.sort(svds(operator(times), k=values, v0=start, return_singular_vectors=False))[::-1]
    radius = np.abs(eigs(operator(contrast), k=1, v0=start, return_eigenvectors=False)).max()
    gain = svds(operator(contrast), k=1, v0=start, return_singular_vectors=False).max()
    stable = None
    if not boosted:
        energy = sum(float(rows.weights.double().square().sum()) for rows in filter_rows(one))
        stable = energy / float(singular[0]) ** 2
    pairs = [(float(value.real), float(value.imag)) for value in found]
    return Spectrum(pairs, [float(x) for x in singular], None, stable, float(radius), float(gain), complete=False)


def one_head(call: FilterCall, head: int) -> FilterCall:
    """The call of one query head alone."""
    heads, own = call.query.shape[1], slice(head, head + 1)
    shared = slice(head // call.groups, head // call.groups + 1)

    def cut(x: Any) -> Any:
        return x if x is None or x.shape[1] == 1 else x[:, own]

    scale = call.content.scale
    if isinstance(scale, torch.Tensor) and scale.ndim >= 3:
        scale = scale if scale.shape[-3] == 1 else scale[..., own, :, :]
    visible = call.visibility
    names = ("keys", "mask", "bias", "hidden", "blind", "dense")
    gain = call.booster.gain
    return call._replace(
        query=call.query[:, own],
        key=call.key[:, shared],
        value=call.value[:, shared],
        content=call.content._replace(scale=scale),
        visibility=visible._replace(**{name: cut(getattr(visible, name)) for name in names}),
        positions=tuple(_head_of(term, heads, head) for term in call.positions),
        booster=call.booster._replace(gain=None if gain is None else gain[..., own, :, :]),
        sinks=None if call.sinks is None else call.sinks[own],
        by_weights=None if call.by_weights is None else call.by_weights.of_heads(slice(None), own),
        difference=difference_of(call, slice(None), own),
    )


def _head_of(term: Any, heads: int, head: int) -> Any:
    own = slice(head, head + 1)
    replaced = {}
    for name in ("bias", "query_features", "key_features", "query", "key"):  # [batch, heads or 1, ...]
        x = getattr(term, name, None)
        if x is not None:
            replaced[name] = x if x.shape[1] == 1 else x[:, own]
    for name in ("scale", "slopes", "table"):  # [heads, ...]
        x = getattr(term, name, None)
        if x is not None:
            replaced[name] = x if x.shape[0] == 1 else x[own]
    if term.class_tokens is not None:
        replaced["class_tokens"] = term.class_tokens._replace(logits=term.class_tokens.logits[own])
    return term._replace(**replaced)
