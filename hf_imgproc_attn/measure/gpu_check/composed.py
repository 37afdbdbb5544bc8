"""Part b's cases of boosters that the Triton kernels compose of applications of A: steps, columns, chunks, dropout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...models.backend_call import Booster, Content, FilterCall
from ...models.backend_table import BACKENDS, run_filter
from ...models.visibility import attention_visibility
from .part_backends import (
    BIDIRECTIONAL,
    CAUSAL,
    DTYPES,
    TINY_BIDIRECTIONAL,
    TINY_CAUSAL,
    WIDE,
    Setting,
    against_plain,
    compare,
)
from .parts import Bench, Case, Refused
from .tensors import FILTERS, Attend, Inputs, attend, draw, exact, results

DROPPED = 0.25
STEPS = "twicing, 3 steps"


def cases(bench: Bench) -> list[Case]:
    """The cases, those whose kernels part c times first."""
    causal, bidirectional = (TINY_CAUSAL, TINY_BIDIRECTIONAL) if bench.tiny else (CAUSAL, BIDIRECTIONAL)
    wide = TINY_CAUSAL if bench.tiny else WIDE
    found = []
    for method, name, shape, dtype in (
        ("composed", STEPS, causal, "bfloat16"),
        ("composed", "bilateral untied", bidirectional, "bfloat16"),
        ("composed", "bilateral gaussian", causal, "bfloat16"),
        ("composed", "bilateral untied twicing", wide, "bfloat16"),
        ("composed", STEPS, bidirectional, "float16"),
        ("in chunks", "twicing", causal, "bfloat16"),
        ("with dropout", STEPS, causal, "bfloat16"),
    ):
        setting = Setting(name, shape, dtype, bench.device)
        run: Any = partial(dropped, setting)
        if method != "with dropout":
            run = partial(compare, setting, attend(name, "triton") if method == "composed" else in_chunks, True)
        about = {
            "method": f"triton {method}",
            "backend": "triton",
            "filter": name,
            "shape": list(shape.size),
            "is_causal": shape.is_causal,
            "dtype": dtype,
        }
        found.append(Case(f"triton {method}: {setting}", run, 120.0, about))
    return found


class Stored:
    """The streams of a cache as the rows of all earlier calls: gradients pass through them."""

    is_cached = True
    keeps_places_apart = False

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """All rows of a stream."""
        earlier = self.rows.get(name)
        self.rows[name] = rows if earlier is None else torch.cat([earlier, rows], dim=2)
        return self.rows[name]


def in_chunks(inputs: Inputs) -> torch.Tensor:
    """Causal twicing of a prompt in two chunks, whose second one finds the streams of the first."""
    streams: Any = Stored()
    half, length, outputs = inputs.query.shape[2] * 2 // 3, inputs.query.shape[2], []
    for start, end in ((0, half), (half, length)):
        query = inputs.query[:, :, start:end]
        call = FilterCall(
            query,
            inputs.key[:, :, :end],
            inputs.value[:, :, :end],
            Content("dot_product", query.shape[3] ** -0.5),
            attention_visibility(None, shape=(*query.shape[:3], end), causal=True),
            booster=Booster("twicing"),
            streams=streams,
        )
        outputs.append(run_filter(call, "triton"))
    return torch.cat(outputs, dim=2)


def dropped(setting: Setting, seconds_left: float) -> dict[str, Any]:
    """Twicing with dropout against float64, with the weights that the kernels dropped, found by one application.

    The errors are small only if every step and the backward pass drop the same weights.
    """
    given = draw(setting.filter, setting.shape)
    inputs = given.to(DTYPES[setting.dtype], setting.device)
    kept = _weights(inputs) != 0.0
    truth = results(lambda exactly: exact(setting.filter, exactly), replace(given, kept=kept.cpu(), dropout=DROPPED))
    return against_plain(setting, results(with_dropout(setting.filter), inputs), truth)


def with_dropout(name: str) -> Attend:
    """A filter by the Triton kernels, with the same weights dropped in every call."""

    def run(inputs: Inputs) -> torch.Tensor:
        return run_filter(_dropping(inputs, inputs.value, Booster("twicing", FILTERS[name].steps)), "triton")

    return run


def _weights(inputs: Inputs) -> torch.Tensor:
    """A as the kernels thin it out, ``[batch, heads, length, length]``: applied to columns of the identity."""
    batch, heads, length, width = inputs.value.shape
    identity = torch.eye(length, dtype=inputs.value.dtype, device=inputs.value.device)
    columns = [part.expand(batch, heads, -1, -1) for part in identity.split(width, dim=1)]
    with torch.no_grad():
        return torch.cat([run_filter(_dropping(inputs, part, Booster()), "triton") for part in columns], dim=3)


def _dropping(inputs: Inputs, value: torch.Tensor, booster: Booster) -> FilterCall:
    """A call with dropout; calling it sets the generator, so that all of them drop the same weights.

    Raises:
        Refused: if the kernels do not take it.
    """
    query = inputs.query
    call = FilterCall(
        query,
        inputs.key,
        value,
        Content("dot_product", query.shape[3] ** -0.5),
        attention_visibility(None, shape=(*query.shape[:3], query.shape[2]), causal=inputs.is_causal),
        booster=booster,
        dropout=DROPPED,
    )
    reason = BACKENDS["triton"].refuses(call)
    if reason is not None:
        raise Refused(f"triton {reason}")
    torch.manual_seed(0)
    return call
