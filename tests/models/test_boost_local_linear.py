"""Local linear attention: the formula, back-ends, what it reproduces, where it starts, who refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, convert
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_weights import LocalLinear
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from tests.models.helpers import filter_call, make_filter
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, token_ids

EXACT = ("reference", "chunked", "blocked")


def local_linear(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slope: torch.Tensor, **options: Any
) -> FilterCall:
    return filter_call(query, key, value, **options)._replace(by_weights=LocalLinear(slope))


def by_hand(matrix: torch.Tensor, slope: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Head by head and query by query: A V minus the weighted covariance of keys and values times the slope."""
    output = torch.zeros(*matrix.shape[:-1], value.shape[-1], dtype=matrix.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in matrix.shape[:3])).tolist():
        weights, keys, values = matrix[b, h, i], key[b, h], value[b, h]
        if not weights.any():
            continue
        mean_key, mean_value = weights @ keys, weights @ values
        covariance = (weights[:, None] * (keys - mean_key)).T @ (values - mean_value)
        output[b, h, i] = mean_value - slope[b, h, i] @ covariance
    return output


@pytest.mark.parametrize("mask", ["none", "causal", "left", "dense", "bias"])
@pytest.mark.parametrize("content", ["dot_product", "gaussian", "elliptical"])
def test_every_back_end_is_the_formula(content: str, mask: str) -> None:
    """Outputs by hand, and every gradient by the dense form; rows that see no key give 0."""
    layer, plain = make_filter(content, "none", "local_linear"), make_filter(content, "none")
    inputs = tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}
    options = masks()[mask]
    dense = run(layer, inputs, "eager", **options)
    with torch.no_grad():
        plain.load_state_dict(layer.state_dict(), strict=False)
        matrix = plain(
            **{name: x for name, x in inputs.items() if name != "hidden_states"},
            implementation="eager",
            need_weights=True,
            **options,
        )[1]
        slope = layer.weight_booster.slope(inputs["hidden_states"]).view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2)
        torch.testing.assert_close(dense["output"], by_hand(matrix, slope, inputs["key"], inputs["value"]), **TIGHT)
    for backend in EXACT:
        assert_same(run(layer, inputs, "sdpa", backend=backend, **options), dense)
    for backend in ("sdpa", "flex"):
        with pytest.raises(ValueError, match=f"'{backend}' cannot serve this call: it applies A as a whole"):
            run(layer, inputs, "sdpa", backend=backend, **options)


@torch.no_grad()
def test_the_operator_multiplies_the_values() -> None:
    """Its rows sum to 1; the other map is A."""
    layer = make_filter("dot_product", "none", "local_linear")
    inputs = tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}
    output, operator = layer(**inputs, implementation="eager", need_weights=True, **masks()["causal"])
    torch.testing.assert_close(operator @ inputs["value"], output, **TIGHT)
    torch.testing.assert_close(operator.sum(-1), torch.ones(BATCH, HEADS, LENGTH, dtype=torch.float64), **TIGHT)
    assert (operator < 0).any()
    layer._config.attention_output = "filter"
    same, matrix = layer(**inputs, implementation="eager", need_weights=True, **masks()["causal"])
    torch.testing.assert_close(same, output, **TIGHT)
    assert (matrix >= 0).all()


@pytest.mark.grid(**{"heads,key_heads,causal": [(2, 2, True), (4, 2, False)]}, dropout=[0.0, 0.4], backend=EXACT)
def test_gradients_are_numerical_ones(backend: str, heads: int, key_heads: int, causal: bool, dropout: float) -> None:
    """In blocks of three queries, two of four heads that share keys at a time, and with one dropout mask."""
    shapes = ((heads, 7, 3), (key_heads, 7, 3), (key_heads, 7, 2), (heads, 7, 3))
    leaves = [random(1, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]

    def filtered(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        call = local_linear(*given, is_causal=causal, dropout=dropout)
        return run_blocked(call, block_rows=3, group_pairs=2) if backend == "blocked" else run_filter(call, backend)

    # Every entry of the Jacobian in one case of the blocks, a random direction of it in the others.
    is_fast = (backend, causal, dropout) != ("blocked", False, 0.4)
    assert torch.autograd.gradcheck(filtered, leaves, fast_mode=is_fast)
    if backend == "blocked" and not dropout:
        assert torch.autograd.gradgradcheck(filtered, leaves, fast_mode=True)


@torch.no_grad()
def test_it_reproduces_a_linear_signal_which_plain_attention_bends_at_the_ends() -> None:
    """Takeda, Farsiu, Milanfar 2007: with the slope of weighted least squares, r = C^-1 (mean k - q)."""
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0)).double()
    signal = places @ random(2, 3) + random(3, seed=1)
    query = key = places.view(1, 1, -1, 2)
    matrix = torch.softmax(query @ key.mT - key.square().sum(-1).unsqueeze(-2) / 2, -1)  # Gaussian, of width 1
    mean = matrix @ key
    moments = torch.einsum("bhij,jx,jy->bhixy", matrix, places, places)
    covariance = moments - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    slope = torch.linalg.solve(covariance, (mean - query).unsqueeze(-1)).squeeze(-1)
    bias = -key.square().sum(-1).unsqueeze(-2) / 2
    for backend in EXACT:
        call = local_linear(query, key, signal.view(1, 1, -1, 3), slope, bias=bias, scale=1.0)
        torch.testing.assert_close(run_filter(call, backend)[0, 0], signal, **TIGHT)
    assert (run_filter(call._replace(by_weights=None), "reference")[0, 0] - signal).abs()[0].max() > 0.3


@torch.no_grad()
@pytest.mark.parametrize("normalisation", ["softmax", "sigmoid", "softpick"])
def test_a_shift_of_all_keys_changes_nothing_and_one_visible_key_gives_its_value(normalisation: str) -> None:
    query, key, value, slope = (random(1, 2, 9, 5, seed=seed) for seed in range(4))
    base = local_linear(query, key, value, slope, is_causal=True)._replace(normalisation=Normalisation(normalisation))
    # The logits stay as they are: the shift is taken from them again.
    bias = -(query @ torch.full((5, 1), 3.0, dtype=torch.float64)) * 5**-0.5
    shifted = local_linear(query, key + 3.0, value, slope, is_causal=True, bias=bias)
    if normalisation == "softmax":
        for backend in EXACT:
            torch.testing.assert_close(run_filter(shifted, backend), run_filter(base, "reference"), **TIGHT)
            torch.testing.assert_close(run_filter(base, backend)[:, :, 0], value[:, :, 0], **TIGHT)
    output = run_filter(base, "auto")
    assert output.isfinite().all()
    for backend in EXACT:
        torch.testing.assert_close(run_filter(base, backend), output, **TIGHT)


def test_what_stands_at_padding_has_no_influence() -> None:
    """NaN in keys, values and queries of padding reaches no gradient."""
    leaves = [random(BATCH, HEADS, LENGTH, WIDTH, seed=seed) for seed in range(4)]
    poisoned = [leaf.clone() for leaf in leaves]
    for leaf in poisoned:
        leaf[0, :, :4] = float("nan")
    results = []
    for given, backend in ((leaves, "reference"), (poisoned, "blocked"), (poisoned, "reference")):
        given = [leaf.clone().requires_grad_() for leaf in given]
        call = filter_call(*given[:3], attention_mask=masks()["left"]["attention_mask"], is_causal=True)
        call = call._replace(by_weights=LocalLinear(call.visibility.clean_queries(given[3])))
        output = run_filter(call, backend)
        (output * random(*output.shape, seed=9)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in given)])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    given = [random(1, 2, 40, 8, seed=seed).to(dtype) for seed in range(4)]
    exact = run_filter(local_linear(*(x.double() for x in given), is_causal=True), "reference")
    for backend in EXACT:
        output = run_filter(local_linear(*given, is_causal=True), backend)
        assert (output.double() - exact).abs().max() < 1.5 * torch.finfo(dtype).eps * exact.abs().max()


@torch.no_grad()
def test_it_starts_as_plain_attention() -> None:
    """In a new model and in a converted one; a cache keeps nothing for it."""
    torch.manual_seed(0)
    source = ImgProcGPT2LMHeadModel(gpt2_config("softmax")).eval()
    model, report = convert(source, "local_linear", return_report=True)
    assert report.max_difference < 1e-6
    torch.testing.assert_close(model.eval()(token_ids()).logits, source(token_ids()).logits, rtol=0, atol=1e-6)
    layer = model.transformer.h[0].attn.filter
    assert layer.stream_names == ()
    assert (
        not ImgProcGPT2LMHeadModel(gpt2_config("local_linear"))
        .transformer.h[1]
        .attn.filter.weight_booster.slope.weight.any()
    )


def test_the_slopes_learn_from_the_start() -> None:
    torch.manual_seed(0)
    model = ImgProcGPT2LMHeadModel(gpt2_config("local_linear"))
    model(token_ids(), labels=token_ids()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("weight_booster.slope.weight")]
    assert len(gradients) == 3
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
