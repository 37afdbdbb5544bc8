"""The dense reference against formulas written out here: it is the truth that everything else is tested against."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.kernel_content import dot_product_logits, gaussian_logits, gaussian_position_logits
from hf_imgproc_attn.models.visibility import split_mask
from tests.models.helpers import dense_attention, dense_matrix

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 7, 4
EXACT = {"rtol": 0, "atol": 1e-12}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sharp_logits(length: int = LENGTH, key_length: int | None = None, seed: int = 0) -> torch.Tensor:
    """Asymmetric logits of std 2."""
    return 2 * random(BATCH, HEADS, length, key_length or length, seed=seed)


def softmax_by_hand(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Row by row over the visible keys only; a row that sees none is 0."""
    allowed = allowed.expand_as(logits)
    matrix = torch.zeros_like(logits)
    for index in itertools.product(*map(range, logits.shape[:-1])):
        seen = allowed[index]
        if seen.any():
            weights = (logits[index][seen] - logits[index][seen].max()).exp()
            matrix[index][seen] = weights / weights.sum()
    return matrix


def apply(logits: torch.Tensor, value: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return dense_attention(logits, value, value, **options)


# --------------------------------------------------------------------------------------------------------------------
# One filter pass
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [None, 1, 2], ids=["content", "text", "patches"])
def test_output_solves_the_weighted_least_squares_problem(dims: int | None) -> None:
    """u_i minimises sum_j K_ij |v_j - u|^2 with K written out from the definition of the bilateral filter."""
    query, key, value = (random(1, 1, LENGTH, WIDTH, seed=seed) for seed in range(3))
    range_bandwidth, spatial_bandwidth = 1.7, 2.9
    logits = gaussian_logits(query, key, 2 / range_bandwidth**2)
    places = torch.randint(-5, 6, (LENGTH, dims or 1), generator=torch.Generator().manual_seed(3)).double()
    if dims:
        scale = torch.full((1, 1, 1), 2 / spatial_bandwidth**2, dtype=torch.float64)
        logits = logits + gaussian_position_logits(places[None], places[None], scale)
    output, _ = apply(logits, value)
    for i in range(LENGTH):
        kernel = (-(query[0, 0, i] - key[0, 0]).square().sum(-1) / range_bandwidth**2).exp()
        if dims:
            kernel = kernel * (-(places[i] - places).square().sum(-1) / spatial_bandwidth**2).exp()
        root = kernel.sqrt().unsqueeze(-1)
        estimate = torch.linalg.lstsq(root, root * value[0, 0]).solution[0]
        torch.testing.assert_close(output[0, 0, i], estimate, **EXACT)


def test_stock_logits_give_stock_attention() -> None:
    """The dot product with 2/h^2 = 1/sqrt(d) is torch's own attention."""
    query, key, value = (random(BATCH, HEADS, LENGTH, WIDTH, seed=seed) * 2 for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    output, matrix = apply(dot_product_logits(query, key, WIDTH**-0.5), value, need_weights=True)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(matrix, softmax_by_hand(query @ key.mT / 2, torch.ones(1, dtype=torch.bool)), **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Boosting
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_twicing_is_the_polynomial_of_a(steps: int, is_causal: bool) -> None:
    """I - (I - A)^k; for k = 2 it is 2A - A^2; its rows sum to 1; what is returned is what was applied."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    matrix = softmax_by_hand(logits, allowed.tril() if is_causal else allowed)
    identity = torch.eye(LENGTH, dtype=torch.float64)
    operator = identity - torch.linalg.matrix_power(identity - matrix, steps)
    if steps == 1:
        torch.testing.assert_close(operator, matrix, **EXACT)
    if steps == 2:
        torch.testing.assert_close(operator, 2 * matrix - matrix @ matrix, **EXACT)
    output, returned = apply(
        logits, value, boosting="twicing", boosting_steps=steps, is_causal=is_causal, need_weights=True
    )
    torch.testing.assert_close(returned, operator, **EXACT)
    torch.testing.assert_close(output, operator @ value, **EXACT)
    torch.testing.assert_close(returned @ value, output, **EXACT)
    torch.testing.assert_close(returned.sum(-1), torch.ones(BATCH, HEADS, LENGTH, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_twicing_is_oshers_iterative_regularisation(steps: int) -> None:
    """u_k = A(f + v_{k-1}), v_k = v_{k-1} + f - u_k: for a fixed linear A the same operator."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    matrix, removed = logits.softmax(-1), torch.zeros_like(value)
    for _ in range(steps):
        estimate = matrix @ (value + removed)
        removed = removed + value - estimate
    output, _ = apply(logits, value, boosting="twicing", boosting_steps=steps)
    torch.testing.assert_close(output, estimate, **EXACT)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_diffusion_and_sos_are_polynomials_of_a(steps: int, is_causal: bool) -> None:
    """A^k and sum_{m<k} (-1)^m (I - A)^m A; for k = 2 both are A^2; what is returned is what was applied."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    matrix = softmax_by_hand(logits, allowed.tril() if is_causal else allowed)
    power, identity = torch.linalg.matrix_power, torch.eye(LENGTH, dtype=torch.float64)
    operators = {
        "diffusion": power(matrix, steps),
        "sos": sum((-1) ** m * power(identity - matrix, m) @ matrix for m in range(steps)),
    }
    for boosting, operator in operators.items():
        output, returned = apply(
            logits, value, boosting=boosting, boosting_steps=steps, is_causal=is_causal, need_weights=True
        )
        torch.testing.assert_close(returned, operator, **EXACT)
        torch.testing.assert_close(output, operator @ value, **EXACT)
    if steps == 2:
        torch.testing.assert_close(operators["sos"], operators["diffusion"], **EXACT)


def test_learned_boosting_is_twicing_with_a_gain() -> None:
    """A + gamma A(I - A), a gamma per head; 0 is A, 1 (also where there is none) is 2A - A^2."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    matrix, identity = logits.softmax(-1), torch.eye(LENGTH, dtype=torch.float64)
    gain = torch.tensor([0.0, 1.0, -0.7], dtype=torch.float64).view(HEADS, 1, 1)
    operator = matrix + gain * (matrix @ (identity - matrix))
    output, returned = apply(logits, value, boosting="learned", boosting_gain=gain, need_weights=True)
    torch.testing.assert_close(returned, operator, **EXACT)
    torch.testing.assert_close(output, operator @ value, **EXACT)
    torch.testing.assert_close(returned[:, 0], matrix[:, 0], **EXACT)
    twicing, without = (apply(logits, value, boosting=boosting)[0] for boosting in ("twicing", "learned"))
    torch.testing.assert_close(output[:, 1], twicing[:, 1], **EXACT)
    torch.testing.assert_close(without, twicing, **EXACT)


def test_sos_reaches_its_fixed_point_only_where_the_rest_contracts() -> None:
    """(2I - A)^-1 A V for a symmetric positive kernel; a swap of two tokens, eigenvalue -1, moves away instead."""
    points = random(LENGTH, 2)
    positive = -torch.cdist(points, points).square().expand(1, 1, -1, -1)
    swap = torch.tensor([[-40.0, 0.0], [0.0, -40.0]], dtype=torch.float64).expand(1, 1, -1, -1)
    distances: dict[str, list[float]] = {}
    for name, logits in (("positive", positive), ("swap", swap)):
        matrix = logits.softmax(-1)
        value = random(1, 1, matrix.shape[-1], WIDTH, seed=1)
        limit = torch.linalg.solve(2 * torch.eye(matrix.shape[-1], dtype=torch.float64) - matrix, matrix @ value)
        distances[name] = [
            float((apply(logits, value, boosting="sos", boosting_steps=steps)[0] - limit).abs().max())
            for steps in (2, 8, 16)
        ]
    assert distances["positive"][2] < 0.1 * distances["positive"][0]
    assert distances["swap"][2] > 100 * distances["swap"][1] > 1000 * distances["swap"][0]


def test_steps_mean_nothing_without_boosting() -> None:
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    for steps in (1, 2, 7):
        output, operator = apply(logits, value, boosting="none", boosting_steps=steps, need_weights=True)
        torch.testing.assert_close(output, logits.softmax(-1) @ value, **EXACT)
        torch.testing.assert_close(operator, logits.softmax(-1), **EXACT)


def test_operator_of_a_boosted_filter_needs_all_rows() -> None:
    """With cached keys the rows of A for older queries are gone: one clear error, for plain attention an answer."""
    logits, value = sharp_logits(3, LENGTH), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    with pytest.raises(ValueError, match="output_attentions=True with use_cache=False"):
        dense_attention(logits, value[:, :, -3:], value, boosting="twicing", need_weights=True)
    output, operator = dense_attention(logits, value[:, :, -3:], value, need_weights=True)
    torch.testing.assert_close(operator, logits.softmax(-1), **EXACT)
    torch.testing.assert_close(output, operator @ value, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def masks() -> dict[str, torch.Tensor]:
    """Boolean masks of every broadcastable shape; ``holes`` hides everything from some rows."""
    flat = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    flat[0, ..., :3] = False
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    right = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    right[1, ..., 4:] = False
    holes = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.4
    holes[0, :, 2] = holes[1, 1, 5] = False
    return {"keys": flat, "causal": causal, "left": flat & causal, "right": right & causal, "holes": holes}


MASKS = list(masks())


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, is_causal: bool, dtype: torch.dtype | None) -> None:
    """A boolean mask, or the smallest number of any dtype, hides keys exactly; rows that see nothing are 0."""
    mask, logits = masks()[name], sharp_logits()
    allowed = mask & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if is_causal else mask
    given = mask if dtype is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    matrix = dense_matrix(logits, given, is_causal)
    torch.testing.assert_close(matrix, softmax_by_hand(logits, allowed), **EXACT)
    assert (matrix[~allowed.expand_as(matrix)] == 0).all()


@pytest.mark.parametrize("low", [float("-inf"), -2e38], ids=["infinity", "near the smallest"])
@pytest.mark.parametrize("name", MASKS)
def test_other_very_low_numbers_hide_too(name: str, low: float) -> None:
    """Minus infinity, and what is left of the smallest number after some arithmetic."""
    mask, logits = masks()[name], sharp_logits()
    given = torch.zeros(mask.shape).masked_fill(~mask, low)
    torch.testing.assert_close(dense_matrix(logits, given), softmax_by_hand(logits, mask), **EXACT)


def test_additive_masks_are_added_where_they_do_not_hide() -> None:
    """A bias beside hidden keys keeps its values."""
    logits, bias, mask = sharp_logits(), random(BATCH, 1, LENGTH, LENGTH, seed=4), masks()["holes"]
    given = bias.masked_fill(~mask, torch.finfo(torch.float64).min)
    torch.testing.assert_close(dense_matrix(logits, given), softmax_by_hand(logits + bias, mask), **EXACT)
    allowed, additive = split_mask(given)
    assert torch.equal(allowed, mask)
    assert torch.equal(additive, bias.masked_fill(~mask, 0.0).expand_as(given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_keys_stay_hidden_beside_very_low_logits(dtype: torch.dtype) -> None:
    """Adding the smallest number would lose to a logit that is lower still; the key must not come back."""
    low = torch.full((1, 1, 2, 4), -1e5, dtype=torch.float64)
    low[..., 1] = 1e5
    mask = torch.zeros(1, 1, 1, 4, dtype=dtype)
    mask[..., 1] = torch.finfo(dtype).min
    matrix = dense_matrix(low, mask)
    torch.testing.assert_close(matrix[0, 0, 0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["left", "holes"])
def test_rows_that_see_nothing_are_zero_forward_and_backward(name: str, dtype: torch.dtype | None, steps: int) -> None:
    """No NaN, no gradient into what is hidden, and rows that see something are not touched by those that do not."""
    mask = masks()[name].expand(BATCH, HEADS, LENGTH, LENGTH)
    blind = ~mask.any(-1)
    assert blind.any()
    given = mask if dtype is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    logits = sharp_logits().requires_grad_()
    value = random(BATCH, HEADS, LENGTH, WIDTH, seed=1).requires_grad_()
    output, operator = apply(
        logits, value, attention_mask=given, boosting="twicing", boosting_steps=steps, need_weights=True
    )
    assert (output[blind] == 0).all()
    assert (operator[blind] == 0).all()
    matrix = softmax_by_hand(logits.detach(), mask)
    identity = torch.eye(LENGTH, dtype=torch.float64)
    expected = identity - torch.linalg.matrix_power(identity - matrix, steps)
    expected = torch.where(blind.unsqueeze(-1), 0.0, expected)
    torch.testing.assert_close(operator, expected, **EXACT)
    (output * random(*output.shape, seed=2)).sum().backward()
    for gradient in (logits.grad, value.grad):
        assert gradient.isfinite().all()
    assert (logits.grad[~mask] == 0).all()
    assert (value.grad[~mask.any(-2)] == 0).all(), "a value that no query sees has no gradient"


def test_mask_that_hides_everything() -> None:
    mask = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    logits, value = sharp_logits().requires_grad_(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1).requires_grad_()
    output, _ = apply(logits, value, attention_mask=mask, boosting="twicing", boosting_steps=3)
    assert (output == 0).all()
    output.sum().backward()
    assert (logits.grad == 0).all()
    assert (value.grad == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------------------------------


def test_all_passes_see_the_same_dropout_mask() -> None:
    """With one token and p = 1/2 the dropped A is 0 or 2, so 2A - A^2 is 0 either way.

    Passes with masks of their own would give A_1 + A_2 (1 - A_1), which is 2 half of the time.
    """
    logits, value = torch.zeros(64, 8, 1, 1, dtype=torch.float64), torch.ones(64, 8, 1, 1, dtype=torch.float64)
    torch.manual_seed(0)
    output, operator = apply(logits, value, boosting="twicing", dropout=0.5, need_weights=True)
    assert (output == 0).all()
    assert (operator == 0).all()
    plain, _ = apply(logits, value, dropout=0.5)
    assert set(plain.flatten().tolist()) == {0.0, 2.0}, "dropout did act"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_dropout_acts_once_on_a(steps: int) -> None:
    """The operator is the polynomial of one dropped matrix, whose entries are 0 or A / (1 - p)."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1)
    torch.manual_seed(3)
    _, dropped = apply(logits, value, dropout=0.3, need_weights=True)
    torch.manual_seed(3)
    output, operator = apply(logits, value, boosting="twicing", boosting_steps=steps, dropout=0.3, need_weights=True)
    scaled = logits.softmax(-1) / 0.7
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], scaled[kept], **EXACT)
    assert 0.6 < kept.float().mean() < 0.8
    identity = torch.eye(LENGTH, dtype=torch.float64)
    expected = identity - torch.linalg.matrix_power(identity - dropped, steps)
    torch.testing.assert_close(operator, expected, **EXACT)
    torch.testing.assert_close(output, operator @ value, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_half_precision_values_are_rounded_once(steps: int, dtype: torch.dtype, autocast: bool) -> None:
    """Everything between the value and the output is float32, under autocast too: the output is rounded once."""
    logits, value = sharp_logits(), random(BATCH, HEADS, LENGTH, WIDTH, seed=1).to(dtype)
    exact, _ = apply(logits, value.double(), boosting="twicing", boosting_steps=steps)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, operator = apply(logits.float(), value, boosting="twicing", boosting_steps=steps, need_weights=True)
    assert output.dtype == operator.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert ((output.double() - exact).abs() <= exact.abs() * unit + 2e-6).all()
