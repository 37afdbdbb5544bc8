"""Logits with a soft cap, and sinks: every back-end that takes them computes the dense formula, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models import backend_chunked
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS, choose_backend, run_filter
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.visibility import Visibility, attention_visibility

LENGTH, CAP = 11, 1.5


def tensors(seed: int = 0) -> list[torch.Tensor]:
    """Query of four heads, key and value of two, logits of the sinks; sharp enough for the cap to matter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, LENGTH, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 5), (4,))
    return [(2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_() for shape in shapes]


def masks() -> dict[str, Visibility]:
    keys = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    keys[0, ..., :3] = False
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(1, 4, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    shape = (2, 4, LENGTH, LENGTH)
    return {
        "all": Visibility(LENGTH, LENGTH),
        "causal": Visibility(LENGTH, LENGTH, True),
        "padded": attention_visibility(keys & causal, shape=shape),
        "biased": attention_visibility(bias.masked_fill(~causal, float("-inf")), shape=shape),
    }


def dense(call: FilterCall) -> torch.Tensor:
    """The definition: cap, bias, mask, sink, softmax, booster."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (call.key, call.value))
    logits = call.query @ key.mT * call.content.scale
    if call.content.softcap is not None:
        logits = call.content.softcap * torch.tanh(logits / call.content.softcap)
    if call.visibility.bias is not None:
        logits = logits + call.visibility.bias
    for term in call.positions:
        logits = logits + term.grid_logits(torch.float64)
    allowed = call.visibility.allowed(logits.device)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    sinks = torch.full((4,), float("-inf"), dtype=torch.float64) if call.sinks is None else call.sinks
    logits = torch.cat((logits, sinks.view(1, 4, 1, 1).expand(2, 4, LENGTH, 1)), dim=-1)
    matrix = logits.softmax(-1).nan_to_num(0.0)[..., :-1]
    if call.is_boosted:
        matrix = 2 * matrix - matrix @ matrix
    return matrix @ value


def run(backend: str, call: FilterCall) -> torch.Tensor:
    return backend_chunked.run(call, block_rows=4) if backend == "chunked" else run_filter(call, backend)


@pytest.mark.grid(
    backend=["reference", "sdpa", "chunked", "blocked"],
    mask=masks(),
    cap=[None, CAP],
    has_sinks=[True, False],
    boosting=["none", "twicing"],
)
def test_back_ends_compute_the_definition(
    backend: str, mask: str, cap: float | None, has_sinks: bool, boosting: str
) -> None:
    given = tensors()
    query, key, value, sinks = given
    call = FilterCall(
        query,
        key,
        value,
        Content("dot_product", 0.4, cap),
        masks()[mask],
        booster=Booster(boosting),
        sinks=sinks if has_sinks else None,
    )
    if BACKENDS[backend].refuses(call) is not None:
        assert backend in ("sdpa", "blocked")
        assert cap == CAP
        return
    used = given if has_sinks else given[:3]
    wanted, found = dense(call), run(backend, call)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), used),
        torch.autograd.grad((wanted * weights).sum(), used),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_sink_takes_weight_from_every_row() -> None:
    query, key, value, sinks = tensors()
    content = Content("dot_product", 0.4)
    call = FilterCall(query, key, torch.ones_like(value), content, Visibility(LENGTH, LENGTH, True), sinks=sinks)
    sums = run_filter(call, "sdpa")[..., 0]
    assert ((sums > 0) & (sums < 1)).all()
    twiced = run_filter(call._replace(booster=Booster("twicing")), "sdpa")[..., 0]
    # Not 1 - (1 - A 1)²: A acts on the sums of the rows, which differ.
    assert (twiced - (2 * sums - sums.square())).abs().max() > 1e-3


def test_positions_and_sinks_are_compared_as_they_are() -> None:
    """A back-end that drops a number a row would shift the keys against the sink."""
    query, key, value, sinks = tensors()
    bias = 50 + torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64)
    call = FilterCall(
        query,
        key,
        value,
        Content("dot_product", 0.4),
        Visibility(LENGTH, LENGTH),
        (BiasPositions(bias),),
        sinks=sinks + 50,
    )
    for backend in ("auto", "reference", "sdpa", "blocked", "chunked"):
        torch.testing.assert_close(run_filter(call, backend), dense(call), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"content": Content("dot_product", 0.4, CAP)}, "reference"),
        ({"sinks": torch.ones(4)}, "sdpa"),
        ({"sinks": torch.ones(4), "dropout": 0.1, "booster": Booster("twicing")}, "reference"),
    ],
)
def test_the_back_end_is_chosen_by_what_can_be_computed(options: dict[str, Any], chosen: str) -> None:
    query, key, value, _ = tensors()
    call = FilterCall(query, key, value, Content("dot_product", 0.4), Visibility(LENGTH, LENGTH, True))
    call = call._replace(**options)
    assert choose_backend(call) == chosen
    for name in ("blocked", "flex", "triton"):
        if name in BACKENDS and "content" in options:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot serve this call: it knows no "):
                run_filter(call, name)


def test_many_scores_with_a_soft_cap_come_in_chunks() -> None:
    rows = torch.randn(1, 1, 256, 4)
    call = FilterCall(rows, rows, rows, Content("dot_product", 0.4, CAP), Visibility(256, 256, True))
    assert choose_backend(call) == "chunked"
    torch.testing.assert_close(run_filter(call, "auto"), run_filter(call, "reference"))
