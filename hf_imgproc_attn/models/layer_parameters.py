"""What a filter learns beside the backbone's projections: bandwidths, class-token logits, position projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .kernel_content import HALF_DTYPES, working_dtype
from .layer_heads import HeadShare
from .spec_axes import MAX_BANDWIDTH, MIN_BANDWIDTH, NEW_VALUE_RESIDUAL


def default_bandwidth(head_dim: int) -> float:
    """(4 d)^(1/4), the equal bandwidth of stock attention: 2/h^2 = 1/sqrt(d)."""
    return (4.0 * head_dim) ** 0.25


def gaussian_position_bandwidths(num_heads: int, head_dim: int, longest_side: int) -> list[float]:
    """h_p of the Gaussian position kernel: geometric over the heads from (4 d)^(1/4) to the longest side.

    One bandwidth for all would either see nothing far or nothing near. *Choice*: a single head gets the geometric
    mean.
    """
    low, high = math.log(default_bandwidth(head_dim)), math.log(longest_side)
    if num_heads == 1:
        return [math.exp((low + high) / 2)]
    return [math.exp(low + (high - low) * head / (num_heads - 1)) for head in range(num_heads)]


def per_head(bandwidth: Any, num_heads: int) -> list[float] | None:
    """A configuration's bandwidth as one number per head, or None where it has the default."""
    if bandwidth is None:
        return None
    return [float(item) for item in bandwidth] if isinstance(bandwidth, list) else [float(bandwidth)] * num_heads


def bandwidth_scale(
    log_bandwidth: torch.Tensor | None, bandwidths: list[float], like: torch.Tensor, known: Any = None
) -> torch.Tensor:
    """2/h^2, ``[heads, 1, 1]``, of learned bandwidths or else of fixed ones, in the working precision of ``like``.

    Args:
        log_bandwidth: log h, ``[heads]``, or None.
        bandwidths: h where it is not learned.
        like: a tensor of the query's dtype and device.
        known: a ``KnownAhead``, which keeps what was made for the step before, or None.
    """
    if known is not None:
        make = partial(bandwidth_scale, log_bandwidth, bandwidths, like)
        made: torch.Tensor = known.scale(log_bandwidth, bandwidths, like, make)
        return made
    dtype = working_dtype(like.dtype)
    if log_bandwidth is None:
        log_bandwidth = torch.tensor(bandwidths, dtype=dtype, device=like.device).log()
    else:
        log_bandwidth = bounded_log_bandwidth(log_bandwidth.to(dtype), like.dtype)
    return 2.0 * torch.exp(-2.0 * log_bandwidth).view(-1, 1, 1)


def bandwidth_bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest bandwidth that a learned one acts as, beside queries of ``dtype``.

    The bounds of a configuration. In float16 the smallest is 2^-5, since 2/h^2 times a query must stay below 65,504.
    """
    return 2.0**-5 if dtype == torch.float16 else MIN_BANDWIDTH, MAX_BANDWIDTH


def bounded_log_bandwidth(log_bandwidth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """log h inside the bounds for queries of ``dtype``.

    The gradient is that of an unbounded value, so that a parameter beyond the bound can come back.
    """
    low, high = (math.log(bound) for bound in bandwidth_bounds(dtype))
    if not torch.is_grad_enabled():
        return log_bandwidth.clamp(low, high)
    # The difference is 0, but carries the gradient past the clamp.
    return log_bandwidth.detach().clamp(low, high) + (log_bandwidth - log_bandwidth.detach())


def bandwidths_at_bound(model: nn.Module) -> list[str]:
    """Names of the learned bandwidths that are at a bound or beyond it in at least one head."""
    low, high = (math.log(bound) for bound in bandwidth_bounds(torch.float32))
    names = []
    for name, parameter in model.named_parameters():
        if name.endswith("_log_bandwidth") and bool(((parameter <= low) | (parameter >= high)).any()):
            names.append(name)
    return names


class Scalars(NamedTuple):
    """What :class:`FilterScalars` holds, None where the layer has no such parameter.

    content_log_bandwidth: log h_y, ``[heads]``.
    position_log_bandwidth: log h_p, ``[heads]``.
    class_token: logits to the class tokens, from them, within them, ``[heads, 3]``.
    relative_buckets: logits of the buckets of offsets, ``[heads, axes, buckets]``.
    boosting_gain: gamma of the booster ``learned``, ``[heads]``.
    feedback_gains: lambda of ``neutreno`` ``[heads, 1]``, or P, I, D of ``pid`` ``[heads, 3]``.
    inversion_gains: alpha and beta of ``inversion``, ``[heads, 2]``.
    sink: logit of the key that takes weight from every row, ``[heads]``.
    value_residual: lambda of ``value_residual``, ``[1]``.
    differential: lambda of ``differential``, ``[heads]``.
    delta: b of ``delta``, whose beta is tanh(b + w . z), ``[heads]``.
    """

    content_log_bandwidth: torch.Tensor | None = None
    position_log_bandwidth: torch.Tensor | None = None
    class_token: torch.Tensor | None = None
    relative_buckets: torch.Tensor | None = None
    boosting_gain: torch.Tensor | None = None
    feedback_gains: torch.Tensor | None = None
    inversion_gains: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    value_residual: torch.Tensor | None = None
    differential: torch.Tensor | None = None
    delta: torch.Tensor | None = None


class FilterScalars(nn.Module):
    """Bandwidths, class-token and bucket logits, gains: values per head, as logarithms where they must stay positive.

    The parameters stay in float32 whatever the model's dtype (a step of 1e-3 in log h vanishes in bfloat16), and the
    module is called ``scalar_bias`` where it is used because ``Trainer`` leaves parameters with "bias" in their name
    out of weight decay, which would pull every bandwidth towards 1.

    Args:
        num_heads: number of heads.
        content: initial h_y, one per head, or None where the layer does not learn it.
        position: initial h_p, likewise.
        class_token: whether there are class-token logits: to the token, from it, to itself; initially 0.
        buckets: axes of the grid and buckets of offsets along each, or None. Their logits are initially 0, so that a
            model starts without any notion of position; T5 draws them at random instead (*choice*).
        boosting: whose gains there are: gamma of ``learned``, initially 1: twicing; alpha and beta of ``inversion``,
            initially 1 and 0: no boosting; lambda of ``differential`` and b of ``delta``, initially 0: the same.
        sink: whether there is a sink's logit, initially 0.
        value_residual: whether there is lambda of ``value_residual``, one for all heads, initially 0.5.
        feedback: initial factors of the feedback, the same for every head, or None where they are not learned.
    """

    content_log_bandwidth: nn.Parameter | None
    position_log_bandwidth: nn.Parameter | None
    class_token: nn.Parameter | None
    relative_buckets: nn.Parameter | None
    boosting_gain: nn.Parameter | None
    feedback_gains: nn.Parameter | None
    inversion_gains: nn.Parameter | None
    sink: nn.Parameter | None
    value_residual: nn.Parameter | None
    differential: nn.Parameter | None
    delta: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        content: list[float] | None,
        position: list[float] | None,
        class_token: bool,
        buckets: tuple[int, int] | None = None,
        boosting: str = "none",
        sink: bool = False,
        value_residual: bool = False,
        feedback: list[float] | None = None,
    ) -> None:
        super().__init__()
        half = torch.get_default_dtype() in HALF_DTYPES
        dtype = torch.float32 if half else torch.get_default_dtype()
        self.heads: HeadShare | None = None
        self._initial_feedback = feedback
        self._initial = {"content_log_bandwidth": content, "position_log_bandwidth": position}
        for name, bandwidths in self._initial.items():
            self.register_parameter(
                name, None if bandwidths is None else nn.Parameter(torch.empty(num_heads, dtype=dtype))
            )
        shapes = {
            "class_token": (3,) if class_token else None,
            "relative_buckets": buckets,
            "boosting_gain": () if boosting == "learned" else None,
            "feedback_gains": (len(feedback),) if feedback else None,
            "inversion_gains": (2,) if boosting == "inversion" else None,
            "sink": () if sink else None,
            "differential": () if boosting == "differential" else None,
            "delta": () if boosting == "delta" else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(
                name, None if shape is None else nn.Parameter(torch.empty(num_heads, *shape, dtype=dtype))
            )
        self.register_parameter(
            "value_residual", nn.Parameter(torch.empty(1, dtype=dtype)) if value_residual else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values; called by the models' ``_init_weights``."""
        for name, bandwidths in self._initial.items():
            parameter = getattr(self, name)
            if parameter is not None and bandwidths is not None:
                logs = [math.log(bandwidth) for bandwidth in bandwidths]
                init.copy_(parameter, torch.tensor(logs, dtype=parameter.dtype, device=parameter.device))
        for logits in (self.class_token, self.relative_buckets, self.sink, self.differential, self.delta):
            if logits is not None:
                init.zeros_(logits)
        if self.value_residual is not None:
            init.constant_(self.value_residual, NEW_VALUE_RESIDUAL)
        if self.boosting_gain is not None:
            init.ones_(self.boosting_gain)
        for gains, start in ((self.feedback_gains, self._initial_feedback), (self.inversion_gains, [1.0, 0.0])):
            if gains is not None:
                values = torch.tensor(start, dtype=gains.dtype)
                init.copy_(gains, values.to(gains.device).expand_as(gains))

    def forward(self) -> Scalars:
        """The parameters. A call, not an attribute, so that hooks which bring parameters to the device run first.

        Where processes share the heads: those of the heads that are here.
        """
        scalars = Scalars(
            self.content_log_bandwidth,
            self.position_log_bandwidth,
            self.class_token,
            self.relative_buckets,
            self.boosting_gain,
            self.feedback_gains,
            self.inversion_gains,
            self.sink,
            self.value_residual,
            self.differential,
            self.delta,
        )
        if hasattr(self, "reshard"):
            # A unit of FSDP2's own, which frees the whole parameters when this returns.
            scalars = Scalars(*(None if x is None else x.clone() for x in scalars))
        if self.heads is None:
            return scalars
        share = self.heads
        # One number for all heads is whole in every process, and its gradient the sum over their heads.
        return Scalars(*(None if x is None else share.whole(x) if len(x) == 1 else share.mine(x) for x in scalars))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FilterScalars:
        unrounded = {
            name: (parameter.detach(), None if parameter.grad is None else parameter.grad.detach())
            for name, parameter in self.named_parameters()
        }
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype in HALF_DTYPES:
                value, gradient = unrounded[name]
                parameter.grad = None
                parameter.data = value.to(device=parameter.device, dtype=torch.float32)
                if gradient is not None:
                    parameter.grad = gradient.to(device=parameter.device, dtype=torch.float32)
        return self


class PositionProjection(nn.Module):
    """U_Q p, U_K p of the ``untied`` position kernel; p passes a LayerNorm first, the projections have no bias."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, num_heads * head_dim, bias=False)

    def forward(self, position_embeddings: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden_size]`` to ``[batch, heads, length, 2 * head_dim]``, queries before keys."""
        normed = self.norm(position_embeddings)
        shape = (*normed.shape[:-1], self.num_heads, self.head_dim)
        pair = torch.cat((self.query(normed).view(shape), self.key(normed).view(shape)), dim=-1)
        return pair.transpose(1, 2)
