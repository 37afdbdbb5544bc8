"""The back-ends, and which one serves a call: the one that was asked for, or the first that suits its shape.

``backend_reference`` is the truth of all of them. What differs is cost: ``sdpa`` takes one fused call a booster pass,
``blocked`` computes every weight once, a dense row is cheapest for a single token. Kernels for GPUs call
:func:`register` when they are imported, so that a downloaded checkpoint, which comes without them, still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual

from .backend_blocked import column_scales
from .backend_blocked import refuses as blocked_refuses
from .backend_blocked import run as run_blocked
from .backend_blocked_plan import BLOCK_ROWS, WHOLE_SCORES, suits_onednn
from .backend_blocked_sinkhorn import as_softmax, scales_refuse
from .backend_call import FilterCall
from .backend_chunked import refuses as chunked_refuses
from .backend_chunked import run as run_chunked
from .backend_measured import SAFE, cuda_order
from .backend_reference import run as run_reference
from .backend_sdpa import refuses as sdpa_refuses
from .backend_sdpa import run as run_sdpa
from .backend_sdpa_delta import refuses as sdpa_delta_refuses
from .backend_sdpa_delta import run as run_sdpa_delta
from .boost_operators import ONE_PASS
from .cache_streams import NO_STREAMS
from .kernel_content import HALF_DTYPES
from .kernel_position import is_by_place

Run = Callable[[FilterCall], torch.Tensor]
"""Returns ``[batch, heads, length, d]``, differentiable in all tensors; stores streams by ``call.streams``."""

Refuses = Callable[[FilterCall], "str | None"]
"""Why a back-end cannot serve a call, as the rest of a sentence that starts with its name; None if it can."""


class Backend(NamedTuple):
    """How to run a call, and when not to."""

    run: Run
    refuses: Refuses


def _refuses_fused(call: FilterCall) -> str | None:
    reason = sdpa_refuses(call)
    return reason if reason is not None or not call.is_sequential else sdpa_delta_refuses(call)


def _run_fused(call: FilterCall) -> torch.Tensor:
    return run_sdpa_delta(call) if call.is_sequential else run_sdpa(call)


def _never(call: FilterCall) -> str | None:
    return None


def _sinkhorn(backend: Backend) -> Backend:
    """A back-end of softmax as one of ``sinkhorn``, by a column of numbers made in blocks."""

    def refuses(call: FilterCall) -> str | None:
        reason = scales_refuse(call)
        return backend.refuses(as_softmax(call, None)) if reason is None else reason

    return Backend(lambda call: backend.run(as_softmax(call, column_scales(call))), refuses)


BACKENDS: dict[str, Backend] = {
    "reference": Backend(run_reference, _never),
    "sdpa": Backend(_run_fused, _refuses_fused),
    "blocked": Backend(run_blocked, blocked_refuses),
    "chunked": Backend(run_chunked, chunked_refuses),
}
SINKHORN_BACKENDS = {name: _sinkhorn(BACKENDS[name]) for name in ("sdpa", "blocked", "chunked")}
"""What serves calls with ``sinkhorn`` instead; the optional ones come to it when they are registered."""
OPTIONAL_BACKENDS = {
    "triton": "the kernels need a CUDA device and the package triton, and hf_imgproc_attn.gpu to be imported",
    "flex": "the kernels need hf_imgproc_attn.gpu to be imported",
}
"""Names that are known and may be missing, with what they need."""


def register(name: str, backend: Backend) -> None:
    """Add one of ``OPTIONAL_BACKENDS`` to the table.

    Raises:
        ValueError: for another name.
    """
    if name not in OPTIONAL_BACKENDS:
        raise ValueError(f"back-end must be one of {', '.join(OPTIONAL_BACKENDS)}, got {name!r}")
    BACKENDS[name] = backend
    SINKHORN_BACKENDS[name] = _sinkhorn(backend)


class Choice(NamedTuple):
    """A row of the table of measured shapes."""

    device: str | None
    """None: any."""
    shapes: str
    """What the row is for, in words."""
    fits: Callable[[FilterCall], bool]
    order: tuple[str, ...]
    """What is tried, in order."""


FEW_SCORES = 2**15
"""With fewer scores than this in all, the time goes into calls and not into products."""


def _is_one_row(call: FilterCall) -> bool:
    is_plain = not (call.is_boosted or call.has_columns or call.difference is not None)
    return call.query.shape[-2] == 1 and call.query.dtype not in HALF_DTYPES and not is_plain


def _is_plain(call: FilterCall) -> bool:
    seen = call.visibility
    if call.sinks is not None and not (seen.mask is None and seen.keys is None):
        return False  # SDPA would need one more key, which the mask has to show
    as_wide = call.query.shape[-1] == call.value.shape[-1] and not call.has_columns
    return as_wide and not (call.is_boosted or call.dropout or call.difference is not None)


def _has_few_scores(call: FilterCall) -> bool:
    return call.query.shape[:3].numel() * call.key.shape[-2] <= FEW_SCORES


def _is_no_matter_of_memory(call: FilterCall) -> bool:
    """Whether a dense matrix is traced, or so small that it is the fastest."""
    return torch.compiler.is_compiling() or _has_few_scores(call)


def _sees_places(call: FilterCall) -> bool:
    return any(is_by_place(term) for term in call.positions)


def _takes_several_passes(call: FilterCall) -> bool:
    scores = call.query.shape[-2] * call.key.shape[-2]
    if not call.is_boosted or call.visibility.causal or scores <= WHOLE_SCORES:
        return False
    like = call.query.new_empty(0, dtype=torch.promote_types(call.query.dtype, torch.float32))
    return not suits_onednn(like, BLOCK_ROWS * call.key.shape[-2] * call.query.shape[-1])


CHOICES = (
    # Fused calls of blocks fix lengths and masks in a traced graph.
    Choice(None, "delta, traced", lambda call: torch.compiler.is_compiling() and call.is_sequential, ("reference",)),
    Choice(
        None,
        "sinkhorn, traced",
        lambda call: call.normalisation.name == "sinkhorn" and torch.compiler.is_compiling(),
        ("reference",),
    ),
    Choice(
        None,
        "sinkhorn, few scores",
        lambda call: call.normalisation.name == "sinkhorn" and _has_few_scores(call),
        ("reference",),
    ),
    # No graph breaks.
    Choice(
        None,
        "traced by torch.compile or torch.export",
        lambda call: torch.compiler.is_compiling(),
        ("sdpa", "reference"),
    ),
    # No fused call has forward mode, and the others compute it densely.
    Choice(
        None,
        "differentiated in forward mode",
        lambda call: any(unpack_dual(x).tangent is not None for x in (call.query, call.key, call.value)),
        ("reference",),
    ),
    # One row of weights serves all passes, and no columns have to be put beside every cached key.
    Choice(None, "one query, boosted or with columns", _is_one_row, ("reference",)),
    # Twicing, in units of one SDPA call on the same tensors: forward / forward + backward, float32, head_dim 64.
    # 4 heads, N = 64: SDPA 2.6 / 2.0, blocked 6.8 / 5.3
    Choice("cpu", "few scores", _has_few_scores, ("sdpa", "reference")),
    Choice("cpu", "not boosted, values as wide as queries", _is_plain, ("sdpa",)),
    # SDPA would need a dense N x N bias.
    Choice("cpu", "positions by place", lambda call: bool(call.positions) and _sees_places(call), ("blocked",)),
    # N = 2048: SDPA 2.1 / 2.0, blocked 2.5 / 1.9, by oneDNN 1.7 / 1.4
    Choice("cpu", "boosted, long, not causal, products not by oneDNN", _takes_several_passes, ("sdpa", "blocked")),
    # Causal N = 1024: SDPA 2.0 / 2.0, blocked 1.5 / 1.3; bidirectional N = 197: SDPA 2.0 / 2.0, blocked 1.7 / 1.6. Not
    # boosted, 64 feature columns beside 64: SDPA with padded values 2.2 / 2.0, blocked 1.5 / 1.4.
    Choice("cpu", "all else", lambda call: True, ("blocked",)),
)
"""The first row that fits decides."""
LARGE_BIAS = 2**24
"""Positions by place are a dense bias for SDPA: too much memory beyond so many scores over batch and heads."""


def order_elsewhere(device: str, call: FilterCall) -> tuple[str, ...]:
    """What is tried, in order, where no row of the table fits or everything in it refuses.

    On a CUDA device what was measured there; what was not measured is not chosen by itself.

    Args:
        device: type of the device.
        call: what is to be computed.
    """
    if call.own_softmax is not None and sdpa_refuses(call) is not None:  # no fused call has it
        blocks = ("blocked", "chunked") if device == "cpu" else ("chunked",)
        return ("reference",) if _has_few_scores(call) else (*blocks, "reference")
    if _sees_places(call) and call.query.shape[:3].numel() * call.key.shape[-2] > LARGE_BIAS:
        return ("blocked", *SAFE)
    if device != "cuda" or not (call.is_boosted or call.has_columns):
        return SAFE
    kind = "several steps"
    if call.has_columns:
        kind = "columns"
    elif (call.booster.name, call.booster.steps) == ("twicing", 2):
        kind = "twicing"
    return cuda_order(
        kind,
        is_causal=call.visibility.causal,
        backward=torch.is_grad_enabled() and call.query.requires_grad,
        length=max(call.query.shape[-2], 1),
        head_dim=max(call.query.shape[-1], 1),
    )


def choose_backend(call: FilterCall) -> str:
    """The fastest back-end, by measured shape, of those that are there and do not refuse."""
    table = BACKENDS if call.normalisation.name != "sinkhorn" else BACKENDS | SINKHORN_BACKENDS
    device = call.query.device.type
    order = next((row.order for row in CHOICES if row.device in (None, device) and row.fits(call)), ())
    # The second order is made only if the first one fails: it compares sizes, which would fix them in a traced graph.
    for names in (lambda: order, lambda: order_elsewhere(device, call)):
        for name in names():
            if name in table and table[name].refuses(call) is None:
                return name
    return "reference"


def run_filter(call: FilterCall, backend: str, option: str = "backend") -> torch.Tensor:
    """Run a call on a named back-end, or on the one that ``"auto"`` chooses.

    Args:
        call: what to compute.
        backend: ``"auto"`` or a key of ``BACKENDS``.
        option: what the caller calls ``backend``, for messages.

    Returns:
        ``[batch, heads, length, d]``.

    Raises:
        ValueError: for an unknown back-end, one that is not there, or one that refuses the call.
    """
    if call.difference is not None and not _takes_both_maps(call, backend):
        first, other = (run_filter(part, backend, option) for part in call.maps() if part is not None)
        return torch.addcmul(first, call.difference.share, other, value=-1.0).to(first.dtype)
    if call.booster.name in ONE_PASS:
        return call.finish(run_filter(call.plain(), backend, option))
    if call.booster.name != "none" and getattr(call.streams, "applies_apart", False):
        return _run_apart(call, backend, option)
    table = BACKENDS if call.normalisation.name != "sinkhorn" else BACKENDS | SINKHORN_BACKENDS
    if backend == "auto":
        return table[choose_backend(call)].run(call)
    if backend not in BACKENDS:
        if backend in OPTIONAL_BACKENDS:
            raise ValueError(f"{option}={backend!r} is not available: {OPTIONAL_BACKENDS[backend]}")
        known = ", ".join(dict.fromkeys(("auto", *BACKENDS, *OPTIONAL_BACKENDS)))
        raise ValueError(f"{option} must be one of {known}, got {backend!r}")
    reason = table[backend].refuses(call)
    if reason is not None:
        raise ValueError(f"{option}={backend!r} cannot serve this call: it {reason}")
    return table[backend].run(call)


def _takes_both_maps(call: FilterCall, backend: str) -> bool:
    """Whether the back-end subtracts the second map itself, which ``blocked`` does with maps of softmax."""
    name = choose_backend(call) if backend == "auto" else backend
    return name == "blocked" and call.normalisation.name == "softmax"


def _run_apart(call: FilterCall, backend: str, option: str) -> torch.Tensor:
    """Likewise, by one call for each application of A: what a step makes of the other tokens is made elsewhere.

    Raises:
        ValueError: for dropout, whose mask the calls would not share.
    """
    if call.dropout:
        raise ValueError(f"dropout on boosted attention must be 0 where processes share tokens, got {call.dropout}")
    key, value = call.repeated()
    plain = call.plain()._replace(key=key, streams=NO_STREAMS, own_value=None)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        return run_filter(plain._replace(value=rows), backend, option)

    return call.boost(attend, call.new_value, value).to(call.value.dtype)
