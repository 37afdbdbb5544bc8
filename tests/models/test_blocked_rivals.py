"""``local_linear`` and ``robust`` on weights of every normalisation, block by block: beside the dense truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.backend_table import choose_backend, run_filter
from hf_imgproc_attn.models.boost_weights import LocalLinear, Robust
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.kernel_position import GaussianPositions
from tests.models.blocked_cases import EXACT
from tests.models.helpers import filter_call
from tests.models.layer_cases import random
from tests.models.test_blocked_memory import Memory

BOOSTERS = ("local_linear", "huber", "l1", "mcp")
NAMES = ("softmax", "sink", "sigmoid", "softpick")
LENGTH, HEADS, WIDTH = 11, 4, 4
THRESHOLDS = {"huber": 1.3, "mcp": 2.0}


def leaves(key_heads: int = HEADS) -> list[torch.Tensor]:
    """Query, key, value, slopes and sinks."""
    shapes = ((2, HEADS), (2, key_heads), (2, key_heads), (2, HEADS))
    given = [random(*shape, LENGTH, WIDTH, seed=seed) for seed, shape in enumerate(shapes)]
    return [tensor.requires_grad_() for tensor in (*given, random(HEADS, seed=5))]


def boosted(given: list[torch.Tensor], booster: str, name: str, steps: int = 2, **options: Any) -> FilterCall:
    query, key, value, slope, sinks = given
    call = filter_call(query, key, value, **options)
    if booster == "local_linear":
        call = call._replace(by_weights=LocalLinear(call.visibility.clean_queries(slope)))
    else:
        call = call._replace(by_weights=Robust.of(steps, booster, THRESHOLDS.get(booster)))
    if name == "sink":
        return call._replace(sinks=sinks.to(torch.promote_types(query.dtype, torch.float32)))
    return call._replace(normalisation=Normalisation(name))


def padding() -> torch.Tensor:
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :3] = False
    return mask


def gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = random(*output.shape, seed=9).to(output.dtype)
    return [output, *torch.autograd.grad(output, given, upstream)]


@pytest.mark.grid(
    booster=BOOSTERS,
    name=NAMES,
    is_causal=[True, False],
    padded=[True, False],
    dropout=[0.0, 0.4],
    key_heads=[4, 2],
)
def test_outputs_and_gradients_are_the_dense_ones(
    booster: str, name: str, is_causal: bool, padded: bool, dropout: float, key_heads: int
) -> None:
    """In blocks of three rows, groups of three pairs; with dropout beside numerical gradients of the same mask."""
    given = leaves(key_heads)
    options = {"is_causal": is_causal, "attention_mask": padding() if padded else None, "dropout": dropout}
    is_used = (True, True, True, booster == "local_linear", name == "sink")
    used = [number for number, needed in enumerate(is_used) if needed]

    def blocked(tensors: list[torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(3)
        return run_blocked(boosted(tensors, booster, name, **options), block_rows=3, group_pairs=3)

    found = gradients(blocked(given), [given[number] for number in used])
    if not dropout:
        exact = run_reference(boosted(given, booster, name, **options))
        torch.testing.assert_close(found, gradients(exact, [given[number] for number in used]), **EXACT)
        return
    ways = [random(*tensor.shape, seed=20 + number) for number, tensor in enumerate(given)]
    ahead, back = (
        blocked([tensor.detach() + step * way for tensor, way in zip(given, ways, strict=True)])
        for step in (1e-6, -1e-6)
    )
    along = sum(float((ways[number] * gradient).sum()) for number, gradient in zip(used, found[1:], strict=True))
    numerical = float(((ahead - back) * random(*ahead.shape, seed=9)).sum()) / 2e-6
    assert along == pytest.approx(numerical, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("booster", ["local_linear", "huber"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_positions_and_a_bias_have_their_gradients(booster: str, name: str) -> None:
    """A Gaussian of places in the blocks, and a bias that is learned."""
    given, bias = leaves(), random(1, HEADS, LENGTH, LENGTH, seed=7).requires_grad_()
    log_bandwidth = random(HEADS, 1, 1, seed=8).requires_grad_()
    places = torch.arange(LENGTH).double().view(1, -1, 1)
    results = []
    for run in (run_reference, lambda call: run_blocked(call, block_rows=4, group_pairs=3)):
        scale = 0.2 * torch.exp(-2.0 * log_bandwidth)
        call = boosted(given, booster, name, is_causal=True, bias=bias)
        places_term = GaussianPositions(places, places, scale, None, 0.1, True, True)
        call = call._replace(positions=(*call.positions, places_term))
        results.append(gradients(run(call), [given[0], given[1], bias, log_bandwidth]))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("booster", BOOSTERS)
@pytest.mark.parametrize("name", NAMES[1:])
def test_half_precision_is_rounded_once(name: str, booster: str, dtype: torch.dtype) -> None:
    """Against float64 on the same numbers: outputs and gradients."""
    given = [tensor.detach().to(dtype) for tensor in leaves()]
    results = []
    for precision in (torch.float64, dtype):
        own = [tensor.to(precision).requires_grad_() for tensor in given]
        output = (run_reference if precision == torch.float64 else run_blocked)(
            boosted(own, booster, name, is_causal=True)
        )
        upstream = random(*output.shape, seed=9).to(dtype).to(precision)
        results.append([output, *torch.autograd.grad(output, own[:3], upstream)])
    for exact, found in zip(*results, strict=True):
        assert found.dtype == dtype
        room = torch.finfo(dtype).eps * exact.abs().max() + 2e-4 * exact.abs().max()
        assert (found.double() - exact).abs().max() < room


@torch.no_grad()
@pytest.mark.parametrize("booster", ["local_linear", "huber"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_long_rows_are_served_in_blocks(name: str, booster: str) -> None:
    given = [torch.zeros(1, 2, 256, 4)] * 4 + [torch.zeros(2)]
    assert choose_backend(boosted(given, booster, name, is_causal=True)) == "blocked"


@pytest.mark.parametrize("booster", ["local_linear", "huber"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_memory_is_linear(name: str, booster: str) -> None:
    """Forward and backward: less than a fifth of one matrix at 2,048 tokens, four times that of 512."""
    peaks = []
    for length in (512, 2048):
        given = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(4)]
        call = boosted([*given, torch.zeros(1)], booster, name, is_causal=True)
        with Memory() as memory:
            run_blocked(call, block_rows=32, group_pairs=1).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 2048 * 2048 * 4 / 5
    assert peaks[1] < 4.3 * peaks[0]


@pytest.mark.parametrize("low", [-60.0, -88.0, -100.0])
@pytest.mark.parametrize("booster", ["local_linear", "huber", "mcp"])
@pytest.mark.parametrize("name", ["sink", "sigmoid"])
def test_rows_of_next_to_no_weight_have_finite_gradients(name: str, booster: str, low: float) -> None:
    """In single precision, where 1 over the sum of such a row may be infinite: a sink far above it, or far keys."""
    for backend in ("reference", "chunked", "blocked"):
        given = [leaf.detach().float().requires_grad_() for leaf in leaves()]
        call = boosted(given, booster, name, bias=torch.full((1, 1, 1, 1), low if name == "sigmoid" else 0.0))
        if name == "sink":
            call = call._replace(sinks=given[4] - low)
        output = run_filter(call, backend)
        found = torch.autograd.grad(output.square().sum(), given, allow_unused=True)
        assert all(bool(grad.isfinite().all()) for grad in (output, *found) if grad is not None)


@torch.no_grad()
def test_soft_caps_are_refused_by_name() -> None:
    given = leaves()
    call = boosted(given, "huber", "softmax")._replace(content=filter_call(*given[:3]).content._replace(softcap=5.0))
    with pytest.raises(ValueError, match="soft cap"):
        run_filter(call, "blocked")
    assert run_filter(call, "auto").isfinite().all()
