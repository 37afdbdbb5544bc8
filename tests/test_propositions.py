"""What follows from reading attention as an image filter, each proposition checked on the code that the models run.

With A = D^-1 K, row-stochastic, and values V a filter's output is A V. Everything is in float64. The agreement with
OpenCV's bilateral filter and scikit-image's non-local means (proposition 3) is in ``images/test_filters.py``, that of
gradients with finite differences (proposition 7) in ``test_gradients.py``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_imgproc_attn.functional import filter_attention
from hf_imgproc_attn.models.backend_reference import filter_matrix
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_depth import RESIDUAL, LayerState
from hf_imgproc_attn.models.boost_operators import BOOSTING, NOT_LINEAR, keep_rows
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.visibility import Visibility
from tests.models.helpers import dense_attention, dense_matrix, filter_call, make_filter

TIGHT = {"rtol": 0, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_matrix(length: int = 9, width: int = 4, seed: int = 0) -> torch.Tensor:
    """A of ordinary attention, q and k apart: ``[length, length]`` with complex eigenvalues."""
    query, key = random(length, width, seed=seed), random(length, width, seed=seed + 1)
    return dense_matrix((query @ key.T)[None, None])[0, 0]


def gaussian_matrix(length: int = 9, width: int = 4, seed: int = 0, bandwidth: float = 1.6) -> torch.Tensor:
    """A of a Gaussian kernel with q = k: similar to a symmetric positive matrix, so eigenvalues in (0, 1]."""
    tokens = random(length, width, seed=seed)
    return dense_matrix(-torch.cdist(tokens, tokens).square()[None, None] / bandwidth**2)[0, 0]


def boost(
    matrix: torch.Tensor, value: torch.Tensor, boosting: str, steps: int, gain: float | None = None
) -> torch.Tensor:
    """The booster of a model's layer on a given A ``[length, length]`` and value ``[length, d]``."""
    gamma = () if gain is None else (torch.tensor(gain, dtype=torch.float64).view(1, 1, 1),)
    value = value[None, None]
    return BOOSTING[boosting](lambda stream: matrix @ stream, keep_rows, value, value, steps, *gamma)[0, 0]


# -- 1. A filter is a weighted least-squares fit


@pytest.mark.parametrize(
    ("content", "position"), [("dot_product", "none"), ("gaussian", "none"), ("gaussian", "gaussian")]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_1_attention_is_the_weighted_least_squares_estimate(content: str, position: str, implementation: str) -> None:
    """Row i minimises sum_j K_ij |u - v_j|² over u. Projections are the identity: q = k = v = the tokens."""
    length, width = 7, 5
    layer = make_filter(content, position, heads=1, head_dim=width)
    tokens = random(length, width)
    places = torch.arange(length, dtype=torch.float64)
    scalars = layer.requires_grad_(False).scalar_bias()
    assert scalars.content_log_bandwidth is not None
    h_y = float(scalars.content_log_bandwidth.exp())
    h_p = math.inf if scalars.position_log_bandwidth is None else float(scalars.position_log_bandwidth.exp())
    heads = tokens[None, None]
    options: dict[str, Any] = {} if position == "none" else {"coordinates": places.view(1, -1, 1)}
    output, _ = layer(heads, heads, heads, implementation=implementation, **options)

    for i in range(length):
        # The kernel, from its formula, and a solver that knows nothing of softmax.
        kernel = np.empty(length)
        for j in range(length):
            y_i, y_j = tokens[i].numpy(), tokens[j].numpy()
            logit = 2 * y_i @ y_j / h_y**2 if content == "dot_product" else -((y_i - y_j) ** 2).sum() / h_y**2
            kernel[j] = math.exp(logit - (i - j) ** 2 / h_p**2)
        root = np.sqrt(kernel)[:, None]
        estimate, *_ = np.linalg.lstsq(root, root * tokens.numpy(), rcond=None)
        np.testing.assert_allclose(output[0, 0, i].detach().numpy(), estimate[0], rtol=0, atol=1e-12)


# -- 2. What stock attention has beyond a bilateral filter


def test_2_attention_without_cross_terms_is_bilateral_attention() -> None:
    """(y_i + p_i).(y_j + p_j) = content + position + cross; dropping the cross terms leaves `untied` positions."""
    length, width = 8, 5
    content, places, value = random(length, width), random(length, width, seed=1), random(length, width, seed=2)
    root = math.sqrt(width)
    log_kernel = (content + places) @ (content + places).T / root
    content_term, position_term = content @ content.T / root, places @ places.T / root
    cross_terms = (content @ places.T + places @ content.T) / root
    torch.testing.assert_close(content_term + position_term + cross_terms, log_kernel, **TIGHT)
    assert cross_terms.abs().max() > 1

    layer = make_filter("dot_product", "untied", heads=1, head_dim=width, learn_bandwidths=False,
                        share_position_projections=True)  # fmt: skip
    y, v = content[None, None], value[None, None]
    options: dict[str, Any] = {
        "position_states": torch.cat((places, places), dim=-1)[None, None],
        "implementation": "sdpa",
    }
    bilateral, _ = layer(y, y, v, **options)
    torch.testing.assert_close(bilateral[0, 0], (content_term + position_term).softmax(-1) @ value, **TIGHT)
    # and with them, added as a mask, it is stock attention with positions added to the tokens
    stock = nn.functional.scaled_dot_product_attention(y + places, y + places, v)
    with_cross, _ = layer(y, y, v, attention_mask=cross_terms[None, None], **options)
    torch.testing.assert_close(with_cross, stock, **TIGHT)
    assert (bilateral - stock).abs().max() > 0.1


def test_2_stock_attention_has_equal_bandwidths() -> None:
    """2/h² = 1/√d: h_y = h_p = (4d)^(1/4), the default of both."""
    layer = make_filter("dot_product", "untied", heads=2, head_dim=5, share_position_projections=True)
    layer.scalar_bias.reset_parameters()
    scalars = layer.scalar_bias()
    assert scalars.content_log_bandwidth is not None
    assert scalars.position_log_bandwidth is not None
    for log_bandwidth in (scalars.content_log_bandwidth, scalars.position_log_bandwidth):
        torch.testing.assert_close(log_bandwidth.exp(), torch.full((2,), 20.0**0.25, dtype=torch.float64))


def test_2_inner_products_and_distances_agree_on_vectors_of_equal_length() -> None:
    """-|x - y|²/h² = 2 x.y/h² - (|x|² + |y|²)/h², whose last term a row of the softmax does not see if |y| is one."""
    query, key, value = (random(1, 1, 6, 5, seed=seed) for seed in range(3))
    kernels = [
        make_filter(kernel, "none", heads=1, head_dim=5, learn_bandwidths=False)
        for kernel in ("dot_product", "gaussian")
    ]

    def outputs(key: torch.Tensor) -> list[torch.Tensor]:
        return [kernel(query, key, value, implementation="eager")[0] for kernel in kernels]

    torch.testing.assert_close(*outputs(3 * nn.functional.normalize(key, dim=-1)), **TIGHT)
    unequal = outputs(key)
    assert (unequal[0] - unequal[1]).abs().max() > 0.1


# -- 4. Boosters are polynomials of A


def test_4_a_filter_keeps_slow_changes_and_removes_fast_ones() -> None:
    """What is left of a wave falls with its frequency and with the number of filters; twicing leaves more of each."""
    length = 64
    places = torch.arange(length, dtype=torch.float64)
    A = dense_matrix(-((places[:, None] - places) / 3).square()[None, None])[0, 0]
    waves = torch.stack([torch.cos(math.pi * k * (places + 0.5) / length) for k in (1, 4, 10, 20)], dim=-1)

    def left(filtered: torch.Tensor) -> torch.Tensor:
        return filtered.norm(dim=0) / waves.norm(dim=0)

    once, again, twiced = left(A @ waves), left(A @ (A @ waves)), left(boost(A, waves, "twicing", 2))
    assert once[0] > 0.98
    assert once[-1] < 0.2
    assert (once.diff() < 0).all()
    assert (again < once).all()
    assert (twiced > once).all()


POLYNOMIALS = [
    ("none", 1, None, lambda x: x),
    *(("twicing", k, None, lambda x, k=k: 1 - (1 - x) ** k) for k in (1, 2, 3, 5)),
    *(("diffusion", k, None, lambda x, k=k: x**k) for k in (1, 2, 4)),
    *(("sos", k, None, lambda x, k=k: sum((-1) ** m * (1 - x) ** m * x for m in range(k))) for k in (1, 2, 3, 5)),
    *(("learned", 2, gamma, lambda x, gamma=gamma: x + gamma * x * (1 - x)) for gamma in (0.0, 0.4, 1.0, -1.5)),
    *(
        (name, 1, [1.0, beta], lambda x, beta=beta: x + beta * (1 - x))
        for name, beta in (("inversion", 0.3), ("dynamic_inversion", -0.8))
    ),
]
"""booster, steps, gamma (or alpha and beta), and what it makes of an eigenvalue."""


def test_4_every_booster_that_is_an_operator_is_covered() -> None:
    assert {name for name, *_ in POLYNOMIALS} == set(BOOSTING) - set(NOT_LINEAR)


@pytest.mark.parametrize("kind", [attention_matrix, gaussian_matrix])
@pytest.mark.parametrize(("boosting", "steps", "gain", "polynomial"), POLYNOMIALS)
def test_4_spectrum_of_the_boosted_operator(
    kind: Any, boosting: str, steps: int, gain: float | list[float] | None, polynomial: Any
) -> None:
    """The eigenvectors of A stay; an eigenvalue x becomes p(x), complex ones too."""
    matrix = kind()
    eigenvalues, eigenvectors = torch.linalg.eig(matrix)
    options = {}
    if gain is not None:
        shape = (-1, 1, 1, 1) if isinstance(gain, list) else (1, 1, 1)
        options["boosting_gain"] = torch.tensor(gain, dtype=torch.float64).view(shape)
    _, operator = dense_attention(
        matrix.log()[None, None], random(1, 1, 9, 2), random(1, 1, 9, 2), boosting=boosting, boosting_steps=steps,
        need_weights=True, **options,
    )  # fmt: skip
    assert operator is not None
    boosted = operator[0, 0].to(eigenvectors.dtype)
    torch.testing.assert_close(boosted @ eigenvectors, eigenvectors * polynomial(eigenvalues), rtol=0, atol=1e-10)
    if kind is gaussian_matrix:
        assert 0 < eigenvalues.real.min() < 0.5
        assert eigenvalues.imag.abs().max() < 1e-10
    else:
        assert eigenvalues.imag.abs().max() > 1e-3  # attention in general is no symmetric filter
    # Rows still sum to 1: a constant is an eigenvector of A with eigenvalue 1, and p(1) = 1.
    torch.testing.assert_close(operator.sum(-1), torch.ones(1, 1, 9, dtype=torch.float64), **TIGHT)


def test_4_twicing_keeps_more_of_every_eigenvalue_and_sos_less() -> None:
    eigenvalues = torch.linspace(0, 1, 101, dtype=torch.float64)
    twiced = boost(torch.diag(eigenvalues), torch.ones(101, 1, dtype=torch.float64), "twicing", 2)[:, 0]
    assert (twiced >= eigenvalues).all()
    assert (twiced <= 1).all()
    limit = boost(torch.diag(eigenvalues)[1:, 1:], torch.ones(100, 1, dtype=torch.float64), "sos", 4000)[:, 0]
    torch.testing.assert_close(limit, (eigenvalues / (2 - eigenvalues))[1:], rtol=0, atol=1e-10)
    assert (limit <= eigenvalues[1:]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 48, 200])
def test_4_capacity_falls_as_one_over_depth_and_under_twicing_as_its_root(depth: int) -> None:
    """The mean over x in [0, 1] of p(x)^n, what n layers leave of an even spectrum: 1/(n + 1), and about ½√(π/n)."""
    nodes, weights = np.polynomial.legendre.leggauss(300)  # exact for polynomials of degree < 600
    eigenvalues, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    capacity = {}
    for boosting in ("none", "twicing"):
        left = boost(torch.diag(eigenvalues), torch.ones(300, 1, dtype=torch.float64), boosting, 2)[:, 0]
        capacity[boosting] = float((weights * left**depth).sum())
    assert capacity["none"] == pytest.approx(1 / (depth + 1), rel=1e-10)
    exact = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(depth + 1) - math.lgamma(depth + 1.5))
    assert capacity["twicing"] == pytest.approx(exact, rel=1e-10)
    # The asymptotic law is too large by 3/(8n), and what follows is of the order 1/n².
    law = math.sqrt(math.pi / depth) / 2
    assert law / capacity["twicing"] - 1 == pytest.approx(3 / (8 * depth), abs=0.1 / depth**2)


# -- 5. Other boosters of image denoising


@pytest.mark.parametrize("kind", [attention_matrix, gaussian_matrix])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_5_oshers_iterative_regularisation_is_twicing(kind: Any, steps: int) -> None:
    """Osher et al. 2005: denoise the image plus the noise removed so far, u = A(f + w), w += f - u."""
    matrix, image = kind(), random(9, 3, seed=5)
    removed = torch.zeros_like(image)
    for _ in range(steps):
        estimate = matrix @ (image + removed)
        removed = removed + image - estimate
    torch.testing.assert_close(boost(matrix, image, "twicing", steps), estimate, rtol=0, atol=1e-10)


def test_5_sos_reaches_its_fixed_point_for_a_tied_gaussian_kernel() -> None:
    """(2I - A)^-1 A V, where the spectral radius r of A - I is below 1; the error falls as r^k."""
    matrix, image = gaussian_matrix(bandwidth=1.2), random(9, 3, seed=5)
    identity = torch.eye(9, dtype=torch.float64)
    radius = float(torch.linalg.eigvals(matrix - identity).abs().max())
    assert radius < 1
    fixed_point = torch.linalg.solve(2 * identity - matrix, matrix @ image)
    errors = [float((boost(matrix, image, "sos", steps) - fixed_point).abs().max()) for steps in (20, 60, 400)]
    assert errors[1] < errors[0] * radius**40 * 2
    assert errors[2] < 1e-12


def test_5_sos_diverges_where_tokens_attend_to_each_other() -> None:
    """Two tokens that look away from themselves: A is nearly [[0, 1], [1, 0]], with an eigenvalue near -1.

    A - I then has one near -2, and (1, -1) grows as 2^k; twicing does so too, by 1 - 2^k. Attention can do that: the
    query asks for the other token's key. A Gaussian kernel with q = k cannot.
    """
    query, key = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([[-1.0], [1.0]]).double()
    logits = (8 * query @ key.T)[None, None]
    image = torch.tensor([[1.0], [-1.0]]).double()[None, None]

    def applied(boosting: str, steps: int) -> float:
        out, _ = dense_attention(logits, image, image, boosting=boosting, boosting_steps=steps)
        return float(out[0, 0, 0])

    for steps in (1, 2, 3, 8, 15):
        assert applied("sos", steps) == pytest.approx(-(1 - (-2.0) ** steps) / 3, rel=1e-4)
        assert applied("twicing", steps) == pytest.approx(1 - 2.0**steps, rel=1e-4)
    assert abs(applied("diffusion", 15)) < 1.0001  # powers of a row-stochastic A never grow


# -- 6. Why a residual connection helps


def test_6_a_residual_connection_raises_the_signal_to_noise_ratio() -> None:
    """x = s + n, f(x) = αs + βn with β << α: SNR(x + f(x)) / SNR(x) = ((1 + α)/(1 + β))².

    f is a circulant smoothing filter, s one of its slow eigenvectors and n a fast one, so α and β are eigenvalues.
    """
    length = 48
    places = torch.arange(length, dtype=torch.float64)
    distance = torch.minimum((places[:, None] - places) % length, (places - places[:, None]) % length)
    matrix = dense_matrix(-distance.square()[None, None] / 3.0**2)[0, 0]
    signal, noise = torch.cos(2 * math.pi * 2 * places / length), 0.2 * torch.cos(2 * math.pi * 13 * places / length)
    alpha, beta = (float((matrix @ part) @ part / (part @ part)) for part in (signal, noise))
    assert 0 < beta < 0.1 < 0.8 < alpha < 1

    def snr(x: torch.Tensor) -> float:
        """Power of what lies along the signal over the power of the rest."""
        along = signal * (x @ signal) / (signal @ signal)
        return float(along.square().sum() / (x - along).square().sum())

    tokens = (signal + noise).view(1, length, 1)
    read, added_to, _ = RESIDUAL["standard"](tokens, LayerState())
    stream = (added_to + matrix @ read)[0, :, 0]
    gain = snr(stream) / snr(tokens[0, :, 0])
    assert gain == pytest.approx(((1 + alpha) / (1 + beta)) ** 2, rel=1e-10)
    assert gain > 3
    # Without the residual connection the ratio would rise more, (α/β)², but the signal would shrink with every layer.
    assert snr(matrix @ tokens[0, :, 0]) / snr(tokens[0, :, 0]) == pytest.approx((alpha / beta) ** 2, rel=1e-6)
    assert float(stream @ signal) > float(tokens[0, :, 0] @ signal)


# -- 8. The rivals


@torch.no_grad()
def test_8_sinkhorn_rows_and_columns_sum_to_one_and_twicing_keeps_more() -> None:
    """Of a symmetric positive kernel: A is symmetric, and twicing makes of an eigenvalue x one in [x, 1]."""
    points = 0.4 * random(9, 4)
    logits = -torch.cdist(points, points).square()[None, None]
    matrix = filter_matrix(logits, Visibility(9, 9), None, Normalisation("sinkhorn", 64))[0, 0]
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(-1), ones, **TIGHT)
    torch.testing.assert_close(matrix.sum(-2), ones, rtol=0, atol=1e-9)
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    assert eigenvalues.min() > 0
    boosted = boost(matrix, eigenvectors, "twicing", 2)
    found = (eigenvectors * boosted).sum(0)
    torch.testing.assert_close(found, 2 * eigenvalues - eigenvalues.square(), rtol=0, atol=1e-9)
    assert (found >= eigenvalues - 1e-12).all()
    assert found.max() <= 1 + 1e-9


@torch.no_grad()
def test_8_what_exclusive_attention_returns_is_orthogonal_to_the_own_value() -> None:
    query, key, value = (random(1, 2, 9, 4, seed=seed) for seed in range(3))
    output = filter_attention(query, key, value, boosting="exclusive", is_causal=True)
    assert (output * value).sum(-1).abs().max() < 1e-12
    assert output[:, :, 1:].norm(dim=-1).min() > 1e-3


@torch.no_grad()
def test_8_inversion_with_one_and_one_is_the_identity() -> None:
    query, key, value = (random(1, 2, 9, 4, seed=seed) for seed in range(3))
    gains = torch.ones(2, 2, 1, 1, dtype=torch.float64)
    found = run_filter(filter_call(query, key, value, boosting="inversion", boosting_gain=gains), "auto")
    torch.testing.assert_close(found, value, **TIGHT)


@torch.no_grad()
def test_8_delta_with_beta_1_is_a_times_the_inverse_of_1_plus_a_strictly_before() -> None:
    """A (I + A')^-1, with the rows of A' renormalised over the keys before; at beta = 0 it is plain attention."""
    query, key, value = (random(1, 2, 9, 4, seed=seed) for seed in range(3))
    logits, below = query @ key.mT * 0.5, torch.ones(9, 9, dtype=torch.bool).tril()
    matrix = logits.masked_fill(~below, -torch.inf).softmax(-1)
    before = logits.masked_fill(~below.tril(-1), -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(before.sum(-1)[..., 1:], torch.ones(1, 2, 8).double(), **TIGHT)
    own = matrix.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(matrix - torch.diag_embed(own), (1 - own).unsqueeze(-1) * before, **TIGHT)
    operator = matrix @ torch.linalg.inv(torch.eye(9).double() + before)
    found = filter_attention(query, key, value, is_causal=True, boosting="delta")
    torch.testing.assert_close(found, operator @ value, **TIGHT)
    for backend in ("reference", "sdpa", "blocked", "chunked"):
        for beta, wanted in ((1.0, operator), (0.0, matrix)):
            gain = torch.full((2, 1, 1), beta, dtype=torch.float64)
            call = filter_call(query, key, value, is_causal=True, boosting="delta", boosting_gain=gain)
            torch.testing.assert_close(run_filter(call, backend), wanted @ value, **TIGHT)
