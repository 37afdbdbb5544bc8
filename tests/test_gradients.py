"""Gradients of every filter against finite differences (the framework's proposition 7), in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from hf_imgproc_attn.gpu import flex
from hf_imgproc_attn.models import backend_blocked, backend_chunked, backend_sdpa_delta, layer_filter
from hf_imgproc_attn.models.backend_table import BACKENDS, OPTIONAL_BACKENDS, SINKHORN_BACKENDS, Backend, register
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.layer_tokens import filter_tokens
from hf_imgproc_attn.models.spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    POSITION_KERNELS,
    TOKEN_BOOSTINGS,
    default_steps,
)
from tests.gradient_cases import (
    AXES,
    FIRST,
    HEADS,
    LENGTH,
    ONE_DIRECTION,
    REFUSED,
    VALUES,
    differentiated,
    random,
)
from tests.models.helpers import layer_inputs, make_filter

COMBINATIONS = [
    combination
    for combination in itertools.product(CONTENT_KERNELS, POSITION_KERNELS, BOOSTINGS)
    if combination[:2] != ("elliptical", "rotary")  # refused: the metric would weigh what the rotation mixes
]
IMPLEMENTATIONS = {"eager": "reference", "sdpa": "auto"}


class Layer(nn.Module):
    """A filter with everything that happens to its output, as one module."""

    def __init__(self, attention_filter: AttentionFilter) -> None:
        super().__init__()
        self.filter = attention_filter

    def forward(
        self, hidden_states: torch.Tensor, *projected: torch.Tensor, implementation: str, **options: Any
    ) -> torch.Tensor:
        inputs = layer_inputs(hidden_states.shape[1], backend=IMPLEMENTATIONS[implementation], **options)
        return filter_tokens(self.filter, hidden_states, projected, inputs)[0]


@pytest.mark.sampled("content,position", "content,boosting", "position,boosting")
@pytest.mark.parametrize(("content", "position", "boosting"), COMBINATIONS)
def test_7_gradients(content: str, position: str, boosting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of kernels and boosters against finite differences: inputs and parameters, both back-ends."""
    heads, width, length = 2, 2, 4
    fields: dict[str, Any] = {}
    if position == "relative_buckets":
        fields = {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 5}
    layer = Layer(
        make_filter(
            content, position, boosting, default_steps(boosting), heads=heads, head_dim=width, longest_side=4, **fields
        )
    )
    hidden_states = random(1, length, heads * width, seed=9)
    inputs = [hidden_states, *(random(1, heads, length, width, seed=seed) for seed in range(3))]
    options: dict[str, Any] = {"previous_value": random(1, heads, length, width, seed=4)}
    if position == "untied":
        options["position_states"] = random(1, length, heads * width, seed=3)
    elif position not in ("additive", "none"):
        options["coordinates"] = torch.arange(length).view(1, length, 1)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    # The elliptical metric is a constant by definition: finite differences must not see it move.
    metrics: list[torch.Tensor] = []
    calls = itertools.count()
    compute = layer_filter.elliptical_metric

    def recorded(*arguments: Any, **keywords: Any) -> torch.Tensor:
        metrics.append(compute(*arguments, **keywords))
        return metrics[-1]

    monkeypatch.setattr(layer_filter, "elliptical_metric", recorded)
    layer(*inputs, implementation="eager", **options)
    assert len(metrics) == (content == "elliptical") * (2 if boosting == "gradient_boosted" else 1)
    monkeypatch.setattr(layer_filter, "elliptical_metric", lambda *_, **__: metrics[next(calls) % len(metrics)])

    for implementation in ("eager", "sdpa"):

        def output(*leaves: torch.Tensor, implementation: str = implementation) -> torch.Tensor:
            own = dict(zip(names, leaves[len(inputs) :], strict=True))
            given = {**options, "implementation": implementation}
            result: torch.Tensor = torch.func.functional_call(layer, own, leaves[: len(inputs)], given)
            return result

        leaves = [leaf.detach().clone().requires_grad_() for leaf in (*inputs, *parameters)]
        # These read the tokens themselves.
        reads = boosting in ("gradient_boosted", *TOKEN_BOOSTINGS) or position == "forget"
        leaves[0].requires_grad_(reads)
        assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


# --------------------------------------------------------------------------------------------------------------------
# Newer values of the axes: a table of values and back-ends
# --------------------------------------------------------------------------------------------------------------------

EVERY_BACKEND = tuple(dict.fromkeys((*BACKENDS, *OPTIONAL_BACKENDS)))


def in_short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries a block, in whatever works in blocks, and one head at a time."""
    plan = backend_blocked.make_plan
    monkeypatch.setattr(
        backend_blocked, "make_plan", lambda *given, **options: plan(*given, **{**options, **SHORT_BLOCKS})
    )
    monkeypatch.setattr(backend_chunked, "BLOCK_SCORES", 2 * HEADS * LENGTH)
    monkeypatch.setattr(backend_sdpa_delta, "BLOCK_ROWS", 2)


SHORT_BLOCKS = {"block_rows": 2, "group_pairs": 1}


def flex_with_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: Callable[..., torch.Tensor] | None,
    blocks: BlockMask | None,
    scale: float,
    log_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlexAttention computes of the functions that it is given; on a CPU it has no backward pass itself."""
    scores = query @ key.mT * scale
    places = [torch.arange(size).view(-1, *(1,) * (3 - axis)) for axis, size in enumerate(scores.shape)]
    scores = scores if score is None else score(scores, *places)
    if blocks is not None:
        scores = scores.masked_fill(~blocks.mask_mod(*places), float("-inf"))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.fixture
def each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    in_short_blocks(monkeypatch)
    monkeypatch.setattr(flex, "_attention", lambda device_type: flex_with_gradients)
    for table in (BACKENDS, SINKHORN_BACKENDS):
        monkeypatch.setitem(table, "flex", table["flex"])  # is there again afterwards
    # What it says of a call of which no gradient is wanted is what a GPU would hear.
    register("flex", Backend(flex.run, torch.no_grad()(flex.refuses)))


def output_of(name: str, backend: str, is_causal: bool) -> torch.Tensor:
    """Of the layer with its own leaves."""
    layer, leaves = differentiated(name, is_causal)
    return layer(backend, *leaves)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("name", VALUES)
def test_7_each_value_on_each_back_end(name: str, backend: str, is_causal: bool, each_backend: None) -> None:
    """Tokens, projections, values of earlier layers and all parameters; or a refusal that names value and reason.

    Triton's interpreter knows no double precision: tests/gpu compares the same layers in single precision.
    """
    reason = ONE_DIRECTION.get((name, is_causal), REFUSED[backend].get(name))
    reason = reason or (NO_GPU if backend == "triton" else None)
    if reason is not None:
        with pytest.raises((ValueError, StrictDataclassClassValidationError), match=reason):
            output_of(name, backend, is_causal)
        return
    layer, leaves = differentiated(name, is_causal)
    # No gradient flows through softpick's largest logit, which counts by epsilon alone.
    options: dict[str, Any] = {"eps": 1e-6, "atol": 1e-6 if name != "softpick" else 1e-5, "rtol": 1e-5}
    options |= {"fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(partial(layer, backend), leaves, **options)


NO_GPU = "needs tensors on a CUDA device, got cpu|needs the package triton|the kernels need a CUDA device"


@pytest.mark.parametrize("axis", AXES)
def test_the_table_has_every_value(axis: str) -> None:
    """A new value of an axis needs a row, and a new back-end a column."""
    rows = {fields[axis] for fields in VALUES.values() if axis in fields}
    assert rows | FIRST[axis] == set(AXES[axis])
    assert REFUSED.keys() == set(EVERY_BACKEND)
    assert {name for reasons in REFUSED.values() for name in reasons} <= VALUES.keys()
