"""``sinkhorn`` as a softmax with a number for each key, which is found block by block: beside the dense truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked import column_scales
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_blocked_sinkhorn import as_softmax
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import filter_logits, filter_matrix
from hf_imgproc_attn.models.backend_table import choose_backend, run_filter
from hf_imgproc_attn.models.boost_weights import LocalLinear, Robust
from hf_imgproc_attn.models.kernel_normalisation import Normalisation, sinkhorn_steps
from hf_imgproc_attn.models.visibility import Visibility
from tests.models.blocked_cases import EXACT
from tests.models.helpers import filter_call
from tests.models.layer_cases import assert_same, build, masks, random, run, tensors
from tests.models.test_blocked_memory import Memory

LENGTH, HEADS = 11, 4


def sinkhorn(*given: torch.Tensor, iterations: int = 3, **options: Any) -> FilterCall:
    return filter_call(*given, **options)._replace(normalisation=Normalisation("sinkhorn", iterations))


def leaves(key_heads: int = HEADS) -> list[torch.Tensor]:
    """Query, key, value and a bias."""
    given = [random(2, heads, LENGTH, 4, seed=seed) for seed, heads in enumerate((HEADS, key_heads, key_heads))]
    return [tensor.requires_grad_() for tensor in (*given, random(1, HEADS, LENGTH, LENGTH, seed=5))]


def some_mask(kind: str) -> torch.Tensor | None:
    """Padding, or any mask, with a query that sees nothing and is seen, and a key that nobody sees."""
    if kind == "none":
        return None
    if kind == "padded":
        mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
        mask[1, ..., :3] = False
        return mask
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 0, 3], mask[1, ..., 5] = False, False
    return mask


@pytest.mark.grid(
    backend=["sdpa", "blocked", "chunked", "in small blocks"],
    mask=["none", "padded", "dense"],
    key_heads=[4, 2],
    iterations=[1, 3],
    boosting=["none", "twicing", "exclusive"],
)
def test_sinkhorn_in_blocks_is_the_dense_one(
    backend: str, mask: str, key_heads: int, iterations: int, boosting: str
) -> None:
    """Outputs and all gradients; in blocks of three rows and groups of three pairs too."""
    given = leaves(key_heads)
    options = {"attention_mask": some_mask(mask), "bias": given[3], "boosting": boosting}
    call = sinkhorn(*given[:3], iterations=iterations, **options)
    if backend == "in small blocks":
        sizes = {"block_rows": 3, "group_pairs": 3}
        found = run_blocked(as_softmax(call, column_scales(call, **sizes)), **sizes)
    else:
        found = run_filter(call, backend)
    exact = run_filter(call, "reference")
    upstream = random(*exact.shape, seed=9)
    torch.testing.assert_close(found, exact, **EXACT)
    wanted = torch.autograd.grad(exact, given, upstream)
    torch.testing.assert_close(torch.autograd.grad(found, given, upstream), wanted, **EXACT)


@pytest.mark.parametrize("content", ["dot_product", "gaussian"])
@pytest.mark.parametrize("position", ["untied", "patches", "bucket patches"])
def test_with_kernels_of_every_form(content: str, position: str) -> None:
    """A layer's parameters get the gradients of the dense form; class tokens and padding on the right."""
    classes = 0 if position == "untied" else 2
    options = {"normalisation": "sinkhorn", "num_class_tokens": classes, "position_axes": 2}
    layer, inputs = build(content, position, "twicing", 2, **options), tensors(position, classes=classes)
    dense = run(layer, inputs, "eager", **masks()["keys"])
    for backend in ("sdpa", "blocked", "auto"):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **masks()["keys"]), dense)


@pytest.mark.parametrize("booster", ["local_linear", "robust"])
def test_boosters_that_look_at_single_weights(booster: str) -> None:
    given, slope = leaves(), random(2, HEADS, LENGTH, 4, seed=7)
    call = sinkhorn(*given[:3], bias=given[3], attention_mask=some_mask("padded"))
    by_weights = LocalLinear(slope) if booster == "local_linear" else Robust.of(2, "huber", 1.3)
    call = call._replace(by_weights=by_weights)
    results = []
    for backend in ("reference", "blocked"):
        output = run_filter(call, backend)
        results.append([output, *torch.autograd.grad(output, given, random(*output.shape, seed=9))])
    torch.testing.assert_close(results[1], results[0], **EXACT)
    with pytest.raises(ValueError, match=f"boosting='{booster}' looks at its weights one by one"):
        run_filter(call, "sdpa")


def test_dropout_falls_on_the_doubly_scaled_weights() -> None:
    """One mask for all passes: the operator that the identity reveals is a polynomial of one matrix."""
    query, key = (random(1, 2, 9, 4, seed=seed) for seed in range(2))
    identity = torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)

    def operator(boosting: str, dropout: float) -> torch.Tensor:
        torch.manual_seed(3)
        return run_filter(sinkhorn(query, key, identity, boosting=boosting, dropout=dropout), "blocked")

    dropped, whole = operator("none", 0.5), operator("none", 0.0)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], **EXACT)
    torch.testing.assert_close(operator("twicing", 0.5), 2 * dropped - dropped @ dropped, **EXACT)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
def test_derivatives_of_derivatives_and_along_a_direction() -> None:
    given = [random(1, 2, 4, 3, seed=seed).requires_grad_() for seed in range(3)]

    def filtered(*tensors: torch.Tensor) -> torch.Tensor:
        return run_filter(sinkhorn(*tensors, iterations=2), "blocked")

    assert torch.autograd.gradgradcheck(filtered, given, fast_mode=True)
    query, along = given[0].detach(), random(1, 2, 4, 3, seed=8)
    rest = [tensor.detach() for tensor in given[1:]]
    ways = [
        torch.func.jvp(lambda x, name=name: run_filter(sinkhorn(x, *rest), name), (query,), (along,))[1]
        for name in ("blocked", "reference")
    ]
    torch.testing.assert_close(ways[0], ways[1], **EXACT)


def test_what_stands_at_padding_has_no_influence() -> None:
    given, poisoned = (leaves()[:3] for _ in range(2))
    with torch.no_grad():
        for leaf in poisoned[1:]:
            leaf[1, :, :3] = float("nan")
    results, mask = [], some_mask("padded")
    for own, backend in ((given, "reference"), *((poisoned, name) for name in ("reference", "blocked", "sdpa"))):
        output = run_filter(sinkhorn(*own, attention_mask=mask), backend)[:, :, 3:]
        results.append([output, *torch.autograd.grad(output, own, random(*output.shape, seed=9))])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], **EXACT)


@torch.no_grad()
def test_a_token_that_sees_nothing_counts_in_no_column() -> None:
    """Its row is 0, as if it were not there."""
    logits, mask = random(1, 1, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    matrix = filter_matrix(logits, Visibility(6, 6, mask=mask), None, Normalisation("sinkhorn", 2))
    rest = logits[..., [0, 1, 3, 4, 5], :]
    for _ in range(2):
        rest = rest - rest.logsumexp(-2, keepdim=True)
        rest = rest - rest.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(matrix[..., [0, 1, 3, 4, 5], :], rest.exp(), **EXACT)
    assert not matrix[..., 2, :].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_of_half_precision_are_those_of_double(dtype: torch.dtype) -> None:
    given = [tensor.detach().to(dtype) for tensor in leaves()[:3]]
    call = sinkhorn(*given)
    exact = sinkhorn(*(tensor.double() for tensor in given))
    wanted = sinkhorn_steps(filter_logits(exact), None, 3)[1]
    torch.testing.assert_close(column_scales(call).double(), wanted, rtol=0, atol=1e-5)
    limit = 4 * torch.finfo(dtype).eps
    for backend in ("sdpa", "blocked"):
        error = (run_filter(call, backend).double() - run_filter(exact, "reference")).abs().max()
        assert error < limit * 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_that_is_no_power_of_two_is_not_rounded_into_queries(dtype: torch.dtype) -> None:
    """With large logits beside large numbers of the keys: the error is that of plain attention, width 3."""
    given = [(3.0 * random(1, HEADS, 64, 3, seed=seed)).to(dtype) for seed in range(3)]
    errors = {}
    for backend in ("reference", "sdpa"):
        exact = run_filter(sinkhorn(*(tensor.double() for tensor in given)), "reference")
        errors[backend] = float((run_filter(sinkhorn(*given), backend).double() - exact).abs().max())
    assert errors["sdpa"] < 2 * errors["reference"]


def test_memory_of_sinkhorn_is_linear() -> None:
    """Forward and backward at 2,048 tokens: less than a tenth of one matrix, and four times that of 512."""
    peaks = []
    for length in (512, 2048):
        given = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
        call = sinkhorn(*given, boosting="twicing")
        with Memory() as memory:
            scales = column_scales(call, block_rows=32, group_pairs=1)
            run_blocked(as_softmax(call, scales), block_rows=32, group_pairs=1).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 2048 * 2048 * 4 / 10
    assert peaks[1] < 4.3 * peaks[0]


def test_who_serves_it() -> None:
    """Small matrices stand in memory; a causal mask and other numbers of queries are refused by name."""
    few, many = (torch.zeros(1, 2, length, 4) for length in (16, 256))
    assert choose_backend(sinkhorn(few, few, few)) == "reference"
    assert choose_backend(sinkhorn(many, many, many)) == "sdpa"
    assert choose_backend(sinkhorn(many, many, many, boosting="twicing")) == "blocked"
    for backend in ("sdpa", "blocked"):
        with pytest.raises(ValueError, match="attention without a causal mask"):
            run_filter(sinkhorn(few, few, few, is_causal=True), backend)
        with pytest.raises(ValueError, match="as many queries as keys, got 3 and 16"):
            run_filter(sinkhorn(few[:, :, :3], few, few), backend)
