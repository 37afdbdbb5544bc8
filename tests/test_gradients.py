"""Gradients of every filter against finite differences (the framework's proposition 7), in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from hf_imgproc_attn.models import layer_filter
from hf_imgproc_attn.models.boost_depth import LayerState
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.layer_tokens import filter_tokens
from hf_imgproc_attn.models.spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    POSITION_KERNELS,
    TOKEN_BOOSTINGS,
    default_steps,
)
from tests.models.helpers import layer_inputs, make_filter


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COMBINATIONS = [
    combination
    for combination in itertools.product(CONTENT_KERNELS, POSITION_KERNELS, BOOSTINGS)
    if combination[:2] != ("elliptical", "rotary")  # refused: the metric would weigh what the rotation mixes
]
BACKENDS = {"eager": "reference", "sdpa": "auto"}


class Layer(nn.Module):
    """A filter with everything that happens to its output, as one module."""

    def __init__(self, attention_filter: AttentionFilter) -> None:
        super().__init__()
        self.filter = attention_filter

    def forward(
        self, hidden_states: torch.Tensor, *projected: torch.Tensor, implementation: str, **options: Any
    ) -> torch.Tensor:
        inputs = layer_inputs(hidden_states.shape[1], backend=BACKENDS[implementation], **options)
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


RIVALS: dict[str, dict[str, Any]] = {
    "cosine": {"content_kernel": "cosine"},
    "forget": {"position_kernel": "forget"},
    "headwise": {"gate": "headwise"},
    "elementwise": {"gate": "elementwise", "boosting": "inversion"},
    "exclusive": {"boosting": "exclusive"},
    "dynamic_inversion": {"boosting": "dynamic_inversion"},
    "differential": {"boosting": "differential"},
    "delta": {"boosting": "delta"},
    "value_residual": {"feedback": "value_residual", "boosting": "twicing", "num_layers": 2, "layer_idx": 1},
    "sink": {"normalisation": "sink", "boosting": "twicing"},
    "sigmoid": {"normalisation": "sigmoid", "boosting": "twicing"},
    "softpick": {"normalisation": "softpick", "boosting": "twicing"},
}


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "chunked"])
def test_7_gradients_of_the_rivals(name: str, backend: str) -> None:
    """Of each value on each back-end, causal: tokens, projections, values of the first layer, and all parameters."""
    if backend == "sdpa" and name in ("sigmoid", "softpick"):
        return  # refused: tests/models/test_normalisation.py
    heads, width, length = 2, 3, 4
    layer = Layer(make_filter(**RIVALS[name], heads=heads, head_dim=width, longest_side=4))
    leaves = [random(1, length, heads * width, seed=9)]
    leaves += [random(1, heads, length, width, seed=seed) for seed in range(4)]
    names, parameters = zip(*layer.named_parameters(), strict=True)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (*leaves, *parameters)]

    def output(hidden_states: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        query, key, value, first, *own = rest
        state = LayerState(first_value=first) if name == "value_residual" else LayerState()
        inputs = layer_inputs(length, is_causal=True, backend=backend)._replace(state=state)
        given = (hidden_states, (query, key, value), inputs)
        values = dict(zip(names, own, strict=True))
        result: torch.Tensor = torch.func.functional_call(Rival(layer.filter), values, given)
        return result

    assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


class Rival(nn.Module):
    """A filter with everything that happens to its output, given its inputs."""

    def __init__(self, attention_filter: AttentionFilter) -> None:
        super().__init__()
        self.filter = attention_filter

    def forward(self, hidden_states: torch.Tensor, projected: Any, inputs: Any) -> torch.Tensor:
        return filter_tokens(self.filter, hidden_states, projected, inputs)[0]
