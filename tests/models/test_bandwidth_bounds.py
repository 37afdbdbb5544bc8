"""A learned bandwidth that runs away is bounded where it is used, and a training run says so once."""

from __future__ import annotations

import math

import pytest
import torch

from hf_imgproc_attn.models.layer_parameters import bandwidth_bounds, bandwidths_at_bound, bounded_log_bandwidth
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.helpers import layer_inputs, make_filter, sharpen_, tiny_gpt2_config
from tests.models.variants import token_ids

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_inside_is_left_alone(dtype: torch.dtype) -> None:
    low, high = bandwidth_bounds(dtype)
    inside = torch.tensor([2 * low, 1.0, high / 2], dtype=torch.float64).log()
    assert torch.equal(bounded_log_bandwidth(inside, dtype), inside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_way_back_stays_open(dtype: torch.dtype) -> None:
    """Beyond a bound the gradient still passes, so that a parameter can return."""
    parameter = torch.tensor([-1e4, 1e4], requires_grad=True)
    bounded = bounded_log_bandwidth(parameter, dtype)
    assert bounded.exp().tolist() == pytest.approx(bandwidth_bounds(dtype), rel=1e-5)
    bounded.sum().backward()
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("log_bandwidth", [-1e4, math.log(1e-6), 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", ["none", "gaussian", "untied"])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_outputs_and_gradients_stay_finite(
    backend: str, position: str, dtype: torch.dtype, log_bandwidth: float
) -> None:
    layer = make_filter("gaussian", position, "twicing", heads=2, head_dim=4)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "log_bandwidth" in name:
                parameter.fill_(log_bandwidth)
    layer = layer.to(dtype)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 9, 4, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    states = torch.randn(1, 9, 8, generator=generator).to(dtype)
    inputs = layer_inputs(
        9,
        is_causal=True,
        backend=backend,
        coordinates=torch.arange(9).view(1, 9, 1) if position == "gaussian" else None,
        position_states=states if position == "untied" else None,
    )
    output, _ = layer(*given, inputs)
    assert output.isfinite().all()
    parameters = [parameter for name, parameter in layer.named_parameters() if "log_bandwidth" in name]
    for gradient in torch.autograd.grad(output.float().square().sum(), [*given, *parameters]):
        assert gradient.isfinite().all()


def test_bandwidths_at_a_bound_are_named() -> None:
    model = sharpen_(ImgProcGPT2LMHeadModel(tiny_gpt2_config("bilateral")))
    assert bandwidths_at_bound(model) == []
    with torch.no_grad():
        model.transformer.h[1].attn.filter.scalar_bias.position_log_bandwidth[2] = -30.0
    assert bandwidths_at_bound(model) == ["transformer.h.1.attn.filter.scalar_bias.position_log_bandwidth"]
    assert model(token_ids(), labels=token_ids()).loss.isfinite()
