"""What is timed on plain tensors: this package's back-ends, the published algorithms, and what each has to compute.

Every method is a function of query, key and value ``[batch, heads, length, head_dim]``. A method is timed only if it
agrees with the filter it stands for, computed densely in float64 from the formulas alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...functional import filter_attention
from ...models.backend_call import Booster, Content, FilterCall
from ...models.backend_table import run_filter
from ...models.visibility import padding_visibility

PLAIN = "plain SDPA"

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(query, key, value, is_causal) -> output."""

Features = tuple[torch.Tensor, torch.Tensor]

_CHECK_LENGTH, _CHECK_HEADS = 160, 2


@dataclass(frozen=True)
class Method:
    """A candidate.

    Attributes:
        run: the function.
        filter: which filter it computes: a key of :data:`FILTERS`.
        products: matrix products of N x N by d that it makes, (forward, forward + backward).
        dense: N x N matrices of a head that it holds at once, (forward, forward + backward); 0: none.
        cubic: products of two N x N matrices, (forward, forward + backward).
    """

    run: Attention
    filter: str
    products: tuple[float, float]
    dense: tuple[int, int] = (0, 0)
    cubic: tuple[int, int] = (0, 0)


def matrix(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """A, dense: softmax of q k^T / sqrt(d)."""
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if is_causal:
        length = query.shape[-2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1)


def plain_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """The baseline: one call of PyTorch's own attention."""
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def published_language(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """(2A - A @ A) V with A squared, the algorithm of the authors' language code (arXiv 2503.00687)."""
    a = matrix(query, key, is_causal)
    return (2 * a - a @ a) @ value


def published_vision(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """A (2V - A V) with A kept whole, the algorithm of the authors' vision code (arXiv 2503.00687)."""
    a = matrix(query, key, is_causal)
    return a @ (2 * value - a @ value)


def twicing(backend: str, steps: int = 2) -> Attention:
    """I - (I - A)^steps, 2A - A^2 for two, by one of this package's back-ends."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        options: dict[str, Any] = {"boosting": "twicing", "boosting_steps": steps, "backend": backend}
        return filter_attention(query, key, value, is_causal=is_causal, **options)

    return run


def padded_twicing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """2A - A^2 of a padded batch, as a model computes it."""
    content = Content("dot_product", query.shape[-1] ** -0.5)
    seen = padding_visibility(padding(key), query.shape[-2], is_causal)
    return run_filter(FilterCall(query, key, value, content, seen, booster=Booster("twicing", 2)), "auto")


def padding(key: torch.Tensor) -> torch.Tensor:
    """Whether each key is no padding, ``[batch, 1, 1, length]``: texts fill 7/8 of their rows, or in turn 3/4."""
    batch, _, length, _ = key.shape
    lengths = torch.tensor([length - length * (1 + index % 2) // 8 for index in range(batch)], device=key.device)
    return torch.arange(length, device=key.device) < lengths.view(-1, 1, 1, 1)


def _three_steps_exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    a, rest = matrix(query, key, is_causal), value
    for _ in range(3):
        rest = rest - a @ rest
    return value - rest


def _padded_exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    a = matrix(query, key, is_causal) * padding(key)
    a = a / a.sum(-1, keepdim=True)
    return a @ (2 * value - a @ value)


def gaussian_features(query: torch.Tensor) -> Features:
    """Columns of a spatial Gaussian over the token index, 8 wide with padding; h_p is a quarter of the length."""
    heads, length = query.shape[1], query.shape[2]
    index = torch.arange(length, dtype=torch.float64, device=query.device) - (length - 1) / 2
    scale = 2.0 / (length / 4) ** 2
    left = torch.stack((index * scale, torch.full_like(index, -0.5 * scale)), dim=-1)
    right = torch.stack((index, index.square()), dim=-1)
    left, right = (torch.nn.functional.pad(columns, (0, 6)) for columns in (left, right))
    shape = (query.shape[0], heads, length, 8)
    return left.to(query.dtype).expand(shape), right.to(query.dtype).expand(shape)


def untied_features(query: torch.Tensor) -> Features:
    """As many position columns as the head is wide, the same for all rows of the batch."""
    batch, heads, length, width = query.shape
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(2, 1, heads, length, width, generator=generator, dtype=torch.float64) * width**-0.25
    left, right = pair.to(query).expand(2, batch, heads, length, width)
    return left, right


def bilateral(make: Callable[[torch.Tensor], Features]) -> Attention:
    """Content and position compared separately, through feature columns; the columns belong to the input."""
    cache: dict[tuple[object, ...], Features] = {}

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        place = (*query.shape, query.dtype, query.device)
        if place not in cache:
            cache.clear()
            cache[place] = make(query)
        left, right = cache[place]
        return filter_attention(query, key, value, is_causal=is_causal, query_features=left, key_features=right)

    return run


def _plain_exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    return matrix(query, key, is_causal) @ value


def _bilateral_exact(make: Callable[[torch.Tensor], Features]) -> Attention:
    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        left, right = make(query)
        width = math.sqrt(query.shape[-1])
        both = torch.cat((query / width, left), dim=-1), torch.cat((key, right), dim=-1)
        return matrix(both[0] * math.sqrt(both[0].shape[-1]), both[1], is_causal) @ value

    return exact


FILTERS: dict[str, Attention] = {
    "plain": _plain_exact,
    "twicing": published_language,
    "twicing, 3 steps": _three_steps_exact,
    "twicing, padded": _padded_exact,
    "bilateral gaussian": _bilateral_exact(gaussian_features),
    "bilateral untied": _bilateral_exact(untied_features),
}
"""What is to be computed, densely."""

# Of plain attention: 2 products forward; 5 more backward, which computes the scores again.
METHODS: dict[str, Method] = {
    PLAIN: Method(plain_sdpa, "plain", (2, 7)),
    "twicing, auto": Method(twicing("auto"), "twicing", (4, 14)),
    "twicing, blocked": Method(twicing("blocked"), "twicing", (4, 12)),
    "twicing, 3 steps": Method(twicing("auto", 3), "twicing, 3 steps", (4, 13)),
    "twicing, padded": Method(padded_twicing, "twicing, padded", (4, 14)),
    "twicing, two SDPA calls": Method(twicing("sdpa"), "twicing", (4, 14)),
    "twicing, triton": Method(twicing("triton"), "twicing", (4, 12)),
    "twicing, reference": Method(twicing("reference"), "twicing", (6, 14), dense=(3, 5)),
    "A kept whole (published, vision)": Method(published_vision, "twicing", (6, 14), dense=(3, 5)),
    "2A - A @ A (published, language)": Method(published_language, "twicing", (4, 12), dense=(4, 8), cubic=(1, 3)),
    "bilateral gaussian": Method(bilateral(gaussian_features), "bilateral gaussian", (2.25, 8)),
    "bilateral untied": Method(bilateral(untied_features), "bilateral untied", (4, 14)),
}

FLOP_FLOORS: dict[str, tuple[float, float]] = {
    # S once, A V, A W; backward S again, dA, dQ, dK, H = A^T G and dV: 10 in place of 7.
    "twicing": (3 / 2, 10 / 7),
    "twicing, 3 steps": (4 / 2, 13 / 7),
    "twicing, padded": (3 / 2, 10 / 7),
    "plain": (1.0, 1.0),
    # Columns widen the product of the scores alone.
    "bilateral gaussian": ((1 + 8 / 64 + 1) / 2, (7 + 4 * 8 / 64) / 7),
    "bilateral untied": (3 / 2, 11 / 7),
}
"""Least number of matrix products, as a ratio to plain attention: (forward, forward + backward), head width 64."""


def byte_floor(query: torch.Tensor, backward: bool) -> float:
    """Bytes that must be read and written: three tensors in, one out; backward five in and three out as well."""
    return query.numel() * query.element_size() * (12 if backward else 4)


def gradients(
    method: Attention, inputs: tuple[torch.Tensor, ...], is_causal: bool, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    output = method(query, key, value, is_causal)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), gradient)]


def disagreement(name: str, length: int, width: int, is_causal: bool, dtype: torch.dtype, device: str) -> str | None:
    """Compare a method with its filter in float64, on few heads and at most 160 tokens.

    Returns:
        None if it agrees within 16 times the error that plain SDPA itself has in this dtype; else what differs.
    """
    length = min(length, _CHECK_LENGTH)
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, _CHECK_HEADS, length, width)
    *inputs, gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    doubles = tuple(tensor.double() for tensor in inputs)
    errors = {}
    for candidate in (PLAIN, name):
        exact = gradients(FILTERS[METHODS[candidate].filter], doubles, is_causal, gradient.double())
        try:
            got = gradients(METHODS[candidate].run, tuple(inputs), is_causal, gradient)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return str(error)
        errors[candidate] = [
            float((mine.double() - truth).abs().max() / truth.abs().max())
            for mine, truth in zip(got, exact, strict=True)
        ]
    for part, mine, plain in zip(("output", "dQ", "dK", "dV"), errors[name], errors[PLAIN], strict=True):
        limit = 16 * max(plain, torch.finfo(dtype).eps)
        if not mine <= limit:
            return f"wrong {part}: relative error {mine:.2g} against float64, allowed {limit:.2g}"
    return None
