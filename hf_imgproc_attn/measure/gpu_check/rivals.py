"""Part b's cases of other weights than softmax's, and of gates that forget, on Triton and FlexAttention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...models.backend_call import Booster, Content, FilterCall
from ...models.backend_table import run_filter
from ...models.kernel_forget import ForgetPositions
from ...models.kernel_normalisation import Normalisation
from ...models.visibility import attention_visibility
from ..benchmark.attention import Shape
from .part_backends import (
    BIDIRECTIONAL,
    CAUSAL,
    DTYPES,
    TINY_BIDIRECTIONAL,
    TINY_CAUSAL,
    Setting,
    against_plain,
)
from .parts import Bench, Case
from .tensors import Inputs, draw, results

RIVALS = ("sink", "forget", "sigmoid", "softpick", "sinkhorn")
NOT_ON_FLEX = ("sigmoid", "softpick")
ITERATIONS = 3


def cases(bench: Bench, backend: str) -> list[Case]:
    """Twicing of each on one back-end, in bfloat16."""
    causal, bidirectional = (TINY_CAUSAL, TINY_BIDIRECTIONAL) if bench.tiny else (CAUSAL, BIDIRECTIONAL)
    found = []
    for rival in RIVALS:
        if backend == "flex" and rival in NOT_ON_FLEX:
            continue
        shape = bidirectional if rival == "sinkhorn" else causal
        setting = Setting(f"twicing, {rival}", shape, "bfloat16", bench.device)
        about = {
            "method": backend,
            "backend": backend,
            "filter": setting.filter,
            "shape": list(shape.size),
            "is_causal": shape.is_causal,
            "dtype": setting.dtype,
        }
        run = partial(compare, setting, rival, backend, not (bench.device == "cpu" and backend == "flex"))
        found.append(Case(f"{backend}: {setting}", run, 120.0, about))
    return found


def drawn(rival: str, shape: Shape) -> Inputs:
    """Inputs in float64: the parameter is a logit a head of ``sink``, the logarithm of each gate of ``forget``."""
    inputs = draw("twicing", shape)
    batch, heads, length, _ = shape.size
    if rival == "sink":
        return replace(inputs, parameter=torch.linspace(-1.0, 3.0, heads, dtype=torch.float64))
    if rival == "forget":
        steps = torch.arange(batch * heads * length, dtype=torch.float64).view(batch, heads, length, 1)
        return replace(inputs, parameter=-(torch.sin(steps).abs() / 8).float().double())
    return inputs


def weights(rival: str, inputs: Inputs) -> torch.Tensor:
    """A from the formulas, ``[batch, heads, length, length]``."""
    logits = inputs.query @ inputs.key.mT * inputs.query.shape[-1] ** -0.5
    shown = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    shown = shown.tril() if inputs.is_causal else shown
    if rival == "forget" and inputs.parameter is not None:
        total = inputs.parameter.cumsum(-2)
        logits = logits + total - total.mT
    if rival == "sigmoid":
        return torch.sigmoid(logits - shown.sum(-1, keepdim=True).to(logits.dtype).log()) * shown
    if rival == "softpick":
        above = (logits.exp() - 1.0) * shown
        largest = logits.masked_fill(~shown, 0.0).amax(-1, keepdim=True).clamp(min=0.0).detach()
        return above.relu() / (1e-6 * largest.exp() + above.abs().sum(-1, keepdim=True))
    powers = logits.exp() * shown
    if rival == "sinkhorn":
        for _ in range(ITERATIONS):
            powers = powers / powers.sum(-2, keepdim=True)
            powers = powers / powers.sum(-1, keepdim=True)
        return powers
    total = powers.sum(-1, keepdim=True)
    if rival == "sink" and inputs.parameter is not None:
        total = total + inputs.parameter.exp().view(-1, 1, 1)
    return powers / total


def exact(rival: str, inputs: Inputs) -> torch.Tensor:
    """(2A - A^2) V."""
    matrix = weights(rival, inputs)
    smooth = matrix @ inputs.value
    return smooth + matrix @ (inputs.value - smooth)


def filtered(rival: str, backend: str, inputs: Inputs) -> torch.Tensor:
    """The same by a back-end."""
    query, parameter = inputs.query, inputs.parameter
    call = FilterCall(
        query,
        inputs.key,
        inputs.value,
        Content("dot_product", query.shape[-1] ** -0.5),
        attention_visibility(None, shape=(*query.shape[:3], query.shape[2]), causal=inputs.is_causal),
        booster=Booster("twicing"),
    )
    if rival == "sink":
        call = call._replace(sinks=parameter)
    elif rival == "forget" and parameter is not None:
        total = parameter.cumsum(-2)
        call = call._replace(positions=(ForgetPositions(total, total),))
    else:
        call = call._replace(normalisation=Normalisation(rival, ITERATIONS))
    return run_filter(call, backend)


def compare(setting: Setting, rival: str, backend: str, backward: bool, seconds_left: float) -> dict[str, Any]:
    """Errors of a back-end, and as multiples of plain attention's.

    Raises:
        Wrong: for results that are off.
    """
    inputs = drawn(rival, setting.shape)
    truth = results(partial(exact, rival), inputs)
    given = inputs.to(DTYPES[setting.dtype], setting.device)
    return against_plain(setting, results(partial(filtered, rival, backend), given, backward), truth)
