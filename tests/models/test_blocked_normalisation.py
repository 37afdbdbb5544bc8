"""``sink``, ``sigmoid`` and ``softpick`` inside the blocks, and sinks around a fused call.

Positions and dropout, beside the other back-ends: ``test_normalisation``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.backend_sdpa import run as run_sdpa
from hf_imgproc_attn.models.backend_sdpa_sinks import SinkAttention
from hf_imgproc_attn.models.backend_table import choose_backend, run_filter
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from tests.models.blocked_cases import EXACT
from tests.models.helpers import filter_call
from tests.models.layer_cases import random
from tests.models.test_blocked_memory import Memory

NAMES = ("sink", "sigmoid", "softpick")
LENGTH, HEADS = 11, 4


def normalised(call: FilterCall, name: str, sinks: torch.Tensor) -> FilterCall:
    if name == "sink":
        return call._replace(sinks=sinks.to(torch.promote_types(call.query.dtype, torch.float32)))
    return call._replace(normalisation=Normalisation(name))


def leaves(key_heads: int = HEADS) -> list[torch.Tensor]:
    """Query, key, value and sinks."""
    heads = (HEADS, key_heads, key_heads)
    given = [random(2, count, LENGTH, 4, seed=seed) for seed, count in enumerate(heads)]
    return [tensor.requires_grad_() for tensor in (*given, random(HEADS, seed=5))]


def padding() -> torch.Tensor:
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :3] = False
    return mask


@pytest.mark.grid(
    name=NAMES,
    is_causal=[True, False],
    padded=[True, False],
    booster=[("none", 2), ("twicing", 3), ("sos", 2), ("learned", 2), ("inversion", 2), ("exclusive", 2)],
    key_heads=[4, 2],
)
def test_every_booster_and_grouped_heads(
    name: str, is_causal: bool, padded: bool, booster: tuple[str, int], key_heads: int
) -> None:
    """In blocks of three rows, groups of three pairs: outputs and gradients of the dense truth."""
    given = leaves(key_heads)
    gains = {"learned": random(HEADS, 1, 1, seed=7), "inversion": random(2, HEADS, 1, 1, seed=7)}
    call = filter_call(
        *given[:3],
        is_causal=is_causal,
        attention_mask=padding() if padded else None,
        boosting=booster[0],
        boosting_steps=booster[1],
        boosting_gain=gains.get(booster[0]),
    )
    call = normalised(call, name, given[3])
    used = given if name == "sink" else given[:3]
    exact, found = run_reference(call), run_blocked(call, block_rows=3, group_pairs=3)
    torch.testing.assert_close(found, exact, **EXACT)
    upstream = random(*exact.shape, seed=9)
    wanted = torch.autograd.grad(exact, used, upstream)
    torch.testing.assert_close(torch.autograd.grad(found, used, upstream), wanted, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_blocks_above_the_diagonal_are_never_computed(name: str) -> None:
    """Keys and values of later blocks may be NaN."""
    query, key, value, sinks = leaves()
    whole = run_blocked(normalised(filter_call(query, key, value, is_causal=True), name, sinks), block_rows=4)
    key[:, :, 8:], value[:, :, 8:] = float("nan"), float("nan")
    part = run_blocked(normalised(filter_call(query, key, value, is_causal=True), name, sinks), block_rows=4)
    assert torch.equal(part[:, :, :8], whole[:, :, :8])
    assert part[:, :, 8:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name: str, is_causal: bool, dtype: torch.dtype) -> None:
    """Against float64 on the same numbers: outputs and gradients within one rounding, and what float32 loses."""
    *given, sinks = (tensor.detach().to(dtype).double() for tensor in leaves())
    results: list[list[torch.Tensor]] = []
    for precision in (torch.float64, dtype):
        own = [tensor.to(precision).requires_grad_() for tensor in given]
        call = normalised(filter_call(*own, is_causal=is_causal), name, sinks)
        output = (run_reference if precision == torch.float64 else run_blocked)(call)
        results.append(
            [output, *torch.autograd.grad(output, own, random(*output.shape, seed=9).to(dtype).to(precision))]
        )
    for exact, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_derivatives_and_transforms(name: str) -> None:
    """Densely: gradients of gradients, and forward-mode derivatives by ``torch.func``."""
    *given, sinks = (tensor[:1, :2, :5].detach() if tensor.ndim == 4 else tensor[:2].detach() for tensor in leaves())

    def output(query: torch.Tensor) -> torch.Tensor:
        return run_blocked(normalised(filter_call(query, *given[1:], is_causal=True), name, sinks), block_rows=2)

    def exact(query: torch.Tensor) -> torch.Tensor:
        return run_reference(normalised(filter_call(query, *given[1:], is_causal=True), name, sinks))

    query, along = given[0], random(*given[0].shape, seed=8)
    results = []
    for function in (output, exact):
        leaf = query.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), leaf)
        results.append((second, torch.func.jvp(function, (query,), (along,))[1]))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize(("name", "is_causal"), [("sink", False), ("sigmoid", True), ("softpick", False)])
def test_memory_is_linear(name: str, is_causal: bool) -> None:
    """Forward and backward at 2,048 tokens: less than a tenth of one matrix, and four times that of 512."""
    peaks = []
    for length in (512, 2048):
        given = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
        mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
        mask[..., :3] = False
        call = filter_call(*given, attention_mask=mask, is_causal=is_causal, boosting="twicing")
        with Memory() as memory:
            run_blocked(normalised(call, name, torch.zeros(1)), block_rows=32, group_pairs=1).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 2048 * 2048 * 4 / 10
    assert peaks[1] < 4.3 * peaks[0]


def test_long_rows_are_served_in_blocks() -> None:
    """No fused call has these weights; one has a sink where nothing but causality hides a key."""
    query, key, value = (torch.zeros(1, 2, 256, 4) for _ in range(3))
    mask = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    mask[..., 0] = False
    chosen: dict[Any, str] = {}
    for name in NAMES:
        for seen in (None, mask):
            call = filter_call(query, key, value, is_causal=True, attention_mask=seen)
            chosen[name, seen is None] = choose_backend(normalised(call, name, torch.zeros(2)))
    assert chosen.pop(("sink", True)) == "sdpa"
    assert set(chosen.values()) == {"blocked"}


# --------------------------------------------------------------------------------------------------------------------
# Sinks around a fused call
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_fused_call_with_a_sink_has_numerical_gradients_and_those_of_gradients(is_causal: bool) -> None:
    given = [random(1, 2, 5, 3, seed=seed).requires_grad_() for seed in range(3)] + [
        random(2, seed=4).requires_grad_()
    ]
    options = is_causal, 0.7
    assert torch.autograd.gradcheck(lambda *tensors: SinkAttention.apply(*tensors, *options), given)
    assert torch.autograd.gradgradcheck(lambda *tensors: SinkAttention.apply(*tensors, *options), given)


@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize("scale", [0.5, -0.5])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_sink_on_sdpa_is_the_dense_formula(is_causal: bool, scale: float, boosting: str) -> None:
    """Also where the fused call cannot serve: a factor below 0 in a causal call."""
    given = leaves(2)
    call = filter_call(*given[:3], is_causal=is_causal, scale=scale, boosting=boosting)._replace(sinks=given[3])
    results = [
        (output, *torch.autograd.grad(output.sin().sum(), given)) for output in (run_sdpa(call), run_reference(call))
    ]
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sink_in_half_precision(dtype: torch.dtype) -> None:
    """As near to float64 as torch's own attention without it."""
    given = [tensor.detach().to(dtype) for tensor in leaves()[:3]]
    plain, exact_plain = (
        run_filter(filter_call(*(x.to(kind) for x in given)), "sdpa") for kind in (dtype, torch.float64)
    )
    sinks = torch.linspace(-1, 2, HEADS)
    call = filter_call(*given)._replace(sinks=sinks)
    exact = run_reference(filter_call(*(x.double() for x in given))._replace(sinks=sinks.double()))
    error = (run_sdpa(call).double() - exact).abs().max()
    assert error < 2 * (plain.double() - exact_plain).abs().max()
