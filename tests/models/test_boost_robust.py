"""Robust attention: the formula, back-ends, penalties, what it ignores, other people's models, who refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_imgproc_attn import ImgProcGPT2Config, apply_filter, filter_attention, filtered_layers, remove_filter
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_weights import Robust
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from tests.models.helpers import filter_call, logits_in_steps, make_filter, sharpen_
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors

EXACT = ("reference", "chunked", "blocked")
PENALTIES = {"huber": 1.3, "l1": None, "mcp": 2.0}
FACTORS = {
    "huber": lambda d: min(1.0, 1.3 / d) if d > 0 else 1.0,
    "l1": lambda d: 1 / max(d, 0.01),
    "mcp": lambda d: max(1 / max(d, 0.01) - 1 / 2.0, 0.0),
}


def robust(*given: torch.Tensor, steps: int = 3, penalty: str = "huber", **options: Any) -> FilterCall:
    return filter_call(*given, **options)._replace(by_weights=Robust.of(steps, penalty, PENALTIES[penalty]))


def by_hand(matrix: torch.Tensor, value: torch.Tensor, penalty: str, steps: int) -> torch.Tensor:
    """Row by row, number by number."""
    output = torch.zeros(*matrix.shape[:-1], value.shape[-1], dtype=matrix.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in matrix.shape[:3])).tolist():
        seen = matrix[b, h, i].nonzero().flatten().tolist()
        estimate = sum(matrix[b, h, i, j] * value[b, h, j] for j in seen)
        for _ in range(steps if seen else 0):
            distances = {j: float((value[b, h, j] - estimate).norm()) for j in seen}
            weights = {j: float(matrix[b, h, i, j]) * FACTORS[penalty](distances[j]) for j in seen}
            if sum(weights.values()) == 0:
                weights = {j: float(matrix[b, h, i, j]) / distances[j] for j in seen}
            estimate = sum(weights[j] * value[b, h, j] for j in seen) / sum(weights.values())
        output[b, h, i] = estimate
    return output


@pytest.mark.parametrize("mask", ["none", "left", "dense"])
@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_every_back_end_is_the_formula(penalty: str, mask: str) -> None:
    """Outputs by hand, and every gradient by the dense form; rows that see no key give 0."""
    layer = make_filter(
        "dot_product", "none", "robust", 3, robust_penalty=penalty, robust_threshold=PENALTIES[penalty]
    )
    inputs, options = tensors("none"), masks()[mask]
    dense = run(layer, inputs, "eager", need_weights=True, **options)
    matrix = dense.pop("weights")  # A: what it does is no operator
    torch.testing.assert_close(dense["output"], by_hand(matrix, inputs["value"], penalty, 3), **TIGHT)
    for backend in EXACT:
        assert_same(run(layer, inputs, "sdpa", backend=backend, **options), dense)
    for backend in ("sdpa", "flex"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve this call: it applies A as a whole"):
            run(layer, inputs, "sdpa", backend=backend, **options)


@pytest.mark.grid(
    **{"heads,key_heads,causal": [(2, 2, True), (4, 2, False)]},
    penalty=list(PENALTIES),
    dropout=[0.0, 0.4],
    backend=["reference", "blocked"],
)
def test_gradients_are_numerical_ones(
    backend: str, dropout: float, heads: int, key_heads: int, causal: bool, penalty: str
) -> None:
    """In blocks of three queries, two of four heads that share keys at a time, and with one dropout mask."""
    shapes = ((heads, 6, 3), (key_heads, 6, 3), (key_heads, 6, 2))
    leaves = [random(1, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]

    def filtered(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        call = robust(*given, steps=2, penalty=penalty, is_causal=causal, dropout=dropout)
        return run_blocked(call, block_rows=3, group_pairs=2) if backend == "blocked" else run_filter(call, backend)

    # Every entry of the Jacobian in one case of the blocks, a random direction of it in the others.
    is_fast = (backend, penalty, dropout) != ("blocked", "l1", 0.4)
    assert torch.autograd.gradcheck(filtered, leaves, fast_mode=is_fast)
    if backend == "blocked" and penalty == "huber" and causal:
        assert torch.autograd.gradgradcheck(filtered, leaves, fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("penalty", list(PENALTIES))
def test_one_planted_outlier_is_ignored_that_moves_the_mean_without_bound(penalty: str) -> None:
    """Each step takes all but a/(1 - a) of the way that is left; the robust rows end where they would without it."""
    query, key, value = (0.3 * random(1, 1, 9, 4, seed=seed) for seed in range(3))
    without = run_filter(
        robust(query[..., 1:, :], key[..., 1:, :], value[..., 1:, :], steps=16, penalty=penalty), "reference"
    )
    for size in (1e2, 1e4, 1e6):
        value[..., 0, :] = size
        mean = run_filter(filter_call(query, key, value), "reference")[..., 1:, :]
        assert (mean - without).abs().min() > 0.05 * size
        for backend in EXACT:
            output = run_filter(robust(query, key, value, steps=16, penalty=penalty), backend)[..., 1:, :]
            assert (output - without).abs().max() < 0.35
    first = run_filter(robust(query, key, value, steps=1, penalty="l1"), "reference")[..., 1:, :]
    weight = torch.softmax(query[0, 0, 1:] @ key[0, 0].T * 0.5, -1)[:, 0]
    left = first[0, 0, :, 0] / mean[0, 0, :, 0]
    torch.testing.assert_close(left, weight / (weight**2 + (1 - weight) ** 2), rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_step_is_a_bilateral_filter_on_values() -> None:
    """One step from the token's own value, with a Gaussian in place of rho'(d)/d, is the bilateral filter (1998).

    With rho of ``huber`` the range kernel is the same function of the distance in values, beside a spatial kernel.
    """
    places, value = torch.arange(12.0).double().view(1, 1, 12, 1), random(1, 1, 12, 1, seed=2)
    spatial = torch.exp(-((places - places.mT) ** 2) / 8)
    matrix = spatial / spatial.sum(-1, keepdim=True)
    start = matrix @ value
    expected = torch.zeros(12, dtype=torch.float64)
    for i in range(12):
        ranges = torch.tensor([min(1.0, 0.5 / abs(float(value[0, 0, j] - start[0, 0, i]))) for j in range(12)])
        weights = spatial[0, 0, i] * ranges
        expected[i] = (weights * value[0, 0, :, 0]).sum() / weights.sum()
    query, key, bias = torch.zeros(1, 1, 12, 2).double(), torch.zeros(1, 1, 12, 2).double(), spatial.log()
    for backend in EXACT:
        call = filter_call(query, key, value, bias=bias)._replace(by_weights=Robust.of(1, "huber", 0.5))
        torch.testing.assert_close(run_filter(call, backend)[0, 0, :, 0], expected, rtol=0, atol=1e-7)


@torch.no_grad()
def test_the_function_has_it_too() -> None:
    """Of other lengths as well: no row needs another row's estimate."""
    query, key, value = (random(1, 2, length, 5, seed=length) for length in (4, 9, 9))
    output = filter_attention(query, key, value, boosting="robust", boosting_steps=3)
    call = filter_call(query, key, value)._replace(by_weights=Robust.of(3))
    torch.testing.assert_close(output, run_filter(call, "reference"), **TIGHT)


@torch.no_grad()
def test_huber_leaves_rows_as_they_are_whose_values_are_near() -> None:
    query, key, value = (random(1, 2, 9, 5, seed=seed) for seed in range(3))
    for backend in EXACT:
        call = robust(query, key, 0.1 * value, is_causal=True)
        plain = run_filter(call._replace(by_weights=None), "reference")
        torch.testing.assert_close(run_filter(call, backend), plain, **TIGHT)
        assert (run_filter(robust(query, key, 3 * value), backend) - 30 * plain).abs().max() > 0.1


@pytest.mark.parametrize("penalty", list(PENALTIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_degenerate_gives_numbers(dtype: torch.dtype, penalty: str) -> None:
    """One visible key, equal values, values that are 0, rows without keys: finite, with finite gradients."""
    given = [random(2, 2, 6, 4, seed=seed).to(dtype) for seed in range(3)]
    given[2][0], given[2][1, :, 2:] = 0.0, given[2][1, :, :1]
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., :2] = False
    for backend in EXACT:
        leaves = [x.clone().requires_grad_() for x in given]
        call = robust(*leaves, penalty=penalty, attention_mask=mask & torch.ones(6, 6, dtype=torch.bool).tril())
        output = run_filter(call, backend)
        output.sum().backward()
        assert output.isfinite().all()
        assert not output[1, :, :2].any()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_through_the_steps(dtype: torch.dtype) -> None:
    """Outputs and gradients of the same half-precision inputs, beside float64."""
    given = [random(1, 2, 40, 8, seed=seed).to(dtype) for seed in range(3)]
    results = []
    for backend, kind in (("reference", torch.float64), *((name, dtype) for name in EXACT)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in given]
        output = run_filter(robust(*leaves, is_causal=True), backend)
        output.backward(random(*output.shape, seed=9).to(dtype).to(kind))
        results.append([output.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert (got - wanted).abs().max() < 1.5 * torch.finfo(dtype).eps * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("normalisation", ["sigmoid", "softpick"])
def test_rows_that_do_not_sum_to_one_keep_their_sum(normalisation: str) -> None:
    """Where all values are near it is A V, as with softmax."""
    query, key, value = (random(1, 2, 9, 5, seed=seed) for seed in range(3))
    call = robust(query, key, 0.1 * value, is_causal=True)._replace(normalisation=Normalisation(normalisation))
    plain = run_filter(call._replace(by_weights=None), "reference")
    for backend in EXACT:
        torch.testing.assert_close(run_filter(call, backend), plain, **TIGHT)


@torch.no_grad()
def test_it_runs_in_a_trained_model_and_decodes_exactly() -> None:
    """No parameter, no row in the cache, left padding; taken out again the model is what it was."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=19, n_positions=12, bos_token_id=0, eos_token_id=0)
    model = sharpen_(GPT2LMHeadModel(config)).double().eval()
    tokens = torch.randint(1, 19, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    before = model(tokens, **given).logits
    apply_filter(model, "robust")
    assert all(row["parameters"] == 0 and row["boosting"] == "robust (3)" for row in filtered_layers(model))
    whole = model(tokens, **given).logits
    assert (whole - before).abs().max() > 1e-2
    stepwise = logits_in_steps(model, {"input_ids": tokens, **given}, (0, 5, 6, 8))
    torch.testing.assert_close(stepwise[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-10)
    alone = model(tokens[:1, 3:]).logits
    torch.testing.assert_close(whole[:1, 3:], alone, rtol=0, atol=1e-10)
    assert torch.equal(remove_filter(model)(tokens, **given).logits, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boosting": "robust", "robust_penalty": "l2"}, "robust_penalty must be one of huber, l1, mcp, got 'l2'"),
        ({"boosting": "robust", "boosting_steps": 17}, "boosting_steps must be an integer >= 1 and <= 16, got 17"),
        ({"boosting": "robust", "robust_threshold": 0.0}, "robust_threshold must be a finite number from 0.02"),
        ({"boosting": "robust", "robust_penalty": "mcp", "robust_threshold": float("nan")}, "must be a finite number"),
        (
            {"boosting": "robust", "robust_penalty": "l1", "robust_threshold": 1.0},
            "threshold must be None with",
        ),
        ({"boosting": "twicing", "robust_penalty": "l1"}, "robust_penalty needs boosting 'robust'"),
        ({"robust_threshold": 2.0}, "robust_threshold needs boosting 'robust'"),
    ],
)
def test_bad_input_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ImgProcGPT2Config(**fields)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match=message):
        apply_filter(model, None, **fields)


@torch.no_grad()
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_keeps_the_mean(dropout: float) -> None:
    """Where nothing is far, it is dropout of plain attention, with the same mask."""
    layer = [random(BATCH, HEADS, LENGTH, WIDTH, seed=seed) for seed in range(3)]
    layer[2] *= 0.05
    results = []
    for by_weights in (None, Robust.of(3)):
        torch.manual_seed(5)
        results.append(run_filter(filter_call(*layer, dropout=dropout)._replace(by_weights=by_weights), "reference"))
    torch.testing.assert_close(results[1], results[0], **TIGHT)
