"""Which back-end computes attention in functional form: a table of them, and the order in which they are tried.

A back-end is two functions of a :class:`Request`; kernels outside this folder join with :func:`register_backend` when
they are imported, so that a downloaded checkpoint, which comes without them, still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .backend_blocked import blocked_attention
from .backend_blocked_plan import WHOLE_SCORES
from .backend_reference import reference_attention
from .backend_sdpa import sdpa_attention
from .kernel_content import working_dtype
from .visibility import visible


class Request(NamedTuple):
    """One call, checked: what every back-end gets.

    Args:
        query: ``[batch, heads, length, head_dim]``, feature columns included.
        key: ``[batch, key_heads, key_length, head_dim]``; ``key_heads`` divides ``heads``.
        value: ``[batch, key_heads, key_length, d]``; d may differ from ``head_dim``.
        attn_mask: boolean or additive float ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None.
        position_bias: added to the logits, of the same form, or None.
        is_causal: square, without ``attn_mask``.
        scale: factor on q.k.
        dropout_p: probability on A, one mask for all passes.
        boosting: key of ``BOOSTING``; other than ``"none"`` only where ``key_length == length``.
        boosting_steps: k >= 1.
        gets_wider: whether columns of a position or content kernel will be put beside the queries before it is run.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    position_bias: torch.Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    boosting: str
    boosting_steps: int
    gets_wider: bool = False

    @property
    def is_boosted(self) -> bool:
        """Whether A is applied more than once."""
        return self.boosting != "none"

    def repeated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with as many heads as the queries."""
        groups = self.query.shape[1] // self.key.shape[1]
        if groups == 1:
            return self.key, self.value
        return self.key.repeat_interleave(groups, dim=1), self.value.repeat_interleave(groups, dim=1)


Run = Callable[[Request], torch.Tensor]
"""Returns ``[batch, heads, length, d]`` in the value's dtype, differentiable in all tensors but a boolean mask."""

Refuse = Callable[[Request], "str | None"]
"""Why a back-end cannot serve a request, as the rest of a sentence that starts with its name; None if it can."""


class Backend(NamedTuple):
    """How to run a request, and when not to."""

    run: Run
    refuses: Refuse


def _never(request: Request) -> str | None:
    return None


def _reference(request: Request) -> torch.Tensor:
    key, value = request.repeated()
    work = working_dtype(request.query.dtype)
    with torch.autocast(request.query.device.type, enabled=False):
        logits = torch.matmul(request.query.to(work), key.to(work).mT) * request.scale
        if request.position_bias is not None:
            logits = logits + request.position_bias.to(work)
    output, _ = reference_attention(
        logits,
        value,
        value,
        attention_mask=request.attn_mask,
        is_causal=request.is_causal,
        boosting=request.boosting,
        boosting_steps=request.boosting_steps,
        dropout=request.dropout_p,
    )
    return output


def _sdpa(request: Request) -> torch.Tensor:
    key, value = request.repeated()
    mask, is_causal = request.attn_mask, request.is_causal
    if request.position_bias is not None:
        sizes = (request.query.shape[-2], key.shape[-2])
        allowed, additive = visible(mask, is_causal, *sizes, key.device)
        mask = request.position_bias.to(working_dtype(key.dtype))
        mask, is_causal = mask if additive is None else mask + additive, False
        if allowed is not None:
            mask = torch.where(allowed, mask, torch.finfo(mask.dtype).min)
    output = sdpa_attention(
        request.query,
        key,
        value,
        value,
        content_kernel="dot_product",
        content_scale=request.scale,
        positions=None,
        attention_mask=mask,
        is_causal=is_causal,
        boosting=request.boosting,
        boosting_steps=request.boosting_steps,
        dropout=request.dropout_p,
    )
    return output.to(request.value.dtype)


def _sdpa_refuses(request: Request) -> str | None:
    if request.dropout_p and request.is_boosted:
        return "draws a new dropout mask at every pass, and a booster needs the same one"
    return None


def _blocked(request: Request) -> torch.Tensor:
    output, _ = blocked_attention(
        request.query,
        request.key,
        request.value,
        attn_mask=request.attn_mask,
        bias=request.position_bias,
        is_causal=request.is_causal,
        scale=request.scale,
        dropout_p=request.dropout_p,
        boosting=request.boosting,
        steps=request.boosting_steps,
    )
    return output


BACKENDS: dict[str, Backend] = {
    "reference": Backend(_reference, _never),
    "sdpa": Backend(_sdpa, _sdpa_refuses),
    "blocked": Backend(_blocked, _never),
}
OPTIONAL_BACKENDS = {
    "triton": "the kernels need a CUDA device and the package triton, and hf_imgproc_attn.gpu to be imported",
    "flex": "the kernels need hf_imgproc_attn.gpu to be imported",
}
"""Names that are known and may be missing, with what they need."""


def register_backend(name: str, run: Run, refuses: Refuse = _never) -> None:
    """Add a back-end to the table.

    Args:
        name: one of ``OPTIONAL_BACKENDS``.
        run: see :data:`Run`.
        refuses: see :data:`Refuse`.

    Raises:
        ValueError: for another name.
    """
    if name not in OPTIONAL_BACKENDS:
        raise ValueError(f"back-end must be one of {', '.join(OPTIONAL_BACKENDS)}, got {name!r}")
    BACKENDS[name] = Backend(run, refuses)


class Choice(NamedTuple):
    """A row of the table of measured shapes."""

    device: str
    shapes: str
    """What the row is for, in words."""
    fits: Callable[[Request], bool]
    order: tuple[str, ...]
    """What is tried, in order."""


FEW_SCORES = 2**15
"""With fewer scores than this in all, the time goes into calls and not into products."""


def _is_plain(request: Request) -> bool:
    as_wide = request.query.shape[-1] == request.value.shape[-1] and not request.gets_wider
    return as_wide and not (request.is_boosted or request.dropout_p)


def _has_few_scores(request: Request) -> bool:
    return request.query.shape[:3].numel() * request.key.shape[-2] <= FEW_SCORES


def _takes_several_passes(request: Request) -> bool:
    scores = request.query.shape[-2] * request.key.shape[-2]
    return request.is_boosted and not request.is_causal and scores > WHOLE_SCORES


CHOICES = (
    # Twicing, in units of one SDPA call on the same tensors: forward / forward + backward, float32, head_dim 64.
    Choice("cpu", "not boosted, values as wide as queries", _is_plain, ("sdpa",)),
    # 4 heads, N = 64: SDPA 2.6 / 2.0, blocked 6.8 / 5.3
    Choice("cpu", "few scores", _has_few_scores, ("sdpa", "reference")),
    # N = 2048: SDPA 2.1 / 2.0, blocked 2.5 / 1.9
    Choice("cpu", "boosted, long, not causal", _takes_several_passes, ("sdpa", "blocked")),
    # Causal N = 1024: SDPA 2.0 / 2.0, blocked 1.5 / 1.3; bidirectional N = 197: SDPA 2.0 / 2.0, blocked 1.7 / 1.6. Not
    # boosted, 64 feature columns beside 64: SDPA with padded values 2.2 / 2.0, blocked 1.5 / 1.4.
    Choice("cpu", "all else", lambda request: True, ("blocked",)),
)
"""The first row that fits decides."""
ELSEWHERE = ("triton", "sdpa", "blocked")
"""On other devices, and where everything in a row is missing or refuses."""


def choose_backend(request: Request) -> str:
    """The fastest back-end, by measured shape, of those that are there and do not refuse."""
    device = request.query.device.type
    order = next((row.order for row in CHOICES if row.device == device and row.fits(request)), ())
    for name in (*order, *ELSEWHERE):
        if name in BACKENDS and BACKENDS[name].refuses(request) is None:
            return name
    return "reference"


def run_backend(name: str, request: Request) -> torch.Tensor:
    """Run a request on a named back-end, or on the one that ``"auto"`` chooses.

    Raises:
        ValueError: for an unknown back-end, one that is not there, or one that refuses the request.
    """
    if name == "auto":
        name = choose_backend(request)
    if name not in BACKENDS:
        if name in OPTIONAL_BACKENDS:
            raise ValueError(f"backend={name!r} is not available: {OPTIONAL_BACKENDS[name]}")
        known = ", ".join(("auto", *BACKENDS, *(other for other in OPTIONAL_BACKENDS if other not in BACKENDS)))
        raise ValueError(f"backend must be one of {known}, got {name!r}")
    reason = BACKENDS[name].refuses(request)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot serve this call: it {reason}")
    return BACKENDS[name].run(request)
