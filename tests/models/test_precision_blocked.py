"""Position kernels inside the blocks: output and parameter gradients in float32 and bfloat16, at every bandwidth.

Errors against float64, in units of the error of torch's own attention in the same precision on the same tokens.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch

from hf_imgproc_attn.models.kernel_position import BlockedPositions, ClassTokens, GaussianPositions, position_logits
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from tests.models.helpers import blocked_filter

WIDTH, DIRECTIONS, BOUND = 16, 6, 3.0
BANDWIDTHS = (0.1, 0.3, 0.5, 1.0, 4.1, 15.0, 61.0, 250.0, 1000.0)  # no powers of two, whose products would be exact
GRIDS = ("text", "bidirectional", "patches")


def random(*shape: int, seed: int) -> torch.Tensor:
    """Numbers that bfloat16 holds exactly, so that one truth serves every precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


class Case(NamedTuple):
    """Tokens and places; ``directions`` are upstream gradients."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    directions: list[torch.Tensor]
    places: torch.Tensor
    is_causal: bool

    def tokens(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [x.to(dtype) for x in (self.query, self.key, self.value)]


@cache
def case(length: int, heads: int, grid: str) -> Case:
    side = math.isqrt(length)
    places = torch.arange(length).view(1, length, 1)
    if grid == "patches":
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
    tensors = [random(1, heads, length, WIDTH, seed=seed) for seed in range(3 + DIRECTIONS)]
    return Case(*tensors[:3], tensors[3:], places.double(), grid == "text")


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """A head."""
    return (got.double() - exact).square().sum((0, 2, 3)).sqrt() / exact.square().sum((0, 2, 3)).sqrt()


@cache
def plain_error(length: int, heads: int, grid: str, dtype: torch.dtype) -> tuple[float, float]:
    """The yardstick: of torch's attention's output and of its gradient of the queries."""
    known, results = case(length, heads, grid), []
    for precision in (torch.float64, dtype):
        leaves = [x.requires_grad_() for x in known.tokens(precision)]
        output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=known.is_causal)
        (gradient,) = torch.autograd.grad(output, leaves[0], known.directions[0].to(precision))
        results.append((output.detach(), gradient))
    output, gradient = (float(relative_error(got, exact).mean()) for exact, got in zip(*results, strict=True))
    return output, gradient


def gaussian(known: Case, log_bandwidth: torch.Tensor, dtype: torch.dtype) -> BlockedPositions:
    work = torch.promote_types(dtype, torch.float32)
    scale = 2 * torch.exp(-2 * log_bandwidth.to(work)).view(-1, 1, 1)
    return GaussianPositions(known.places.to(work), known.places.to(work), scale, None, 1.0, True, True)


def run(known: Case, positions: BlockedPositions, dtype: torch.dtype) -> torch.Tensor:
    options = {"is_causal": known.is_causal, "boosting": "none", "steps": 1}
    return blocked_filter(*known.tokens(dtype), positions=positions, **options)[0]


def dense(known: Case, positions: BlockedPositions) -> torch.Tensor:
    """The same in float64 from dense logits."""
    query, key, value = known.tokens(torch.float64)
    logits = query @ key.mT * WIDTH**-0.5 + position_logits(positions, torch.float64)
    if known.is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1) @ value


class Truth(NamedTuple):
    """Output and gradients of log h_p, ``[directions, heads]``, in float64.

    gradient_scale: the size of the gradient for a random upstream gradient, the norm of the output's derivative a
        head. The gradient itself is a sum that may nearly cancel; its size says little about its error.
    """

    output: torch.Tensor
    gradients: torch.Tensor
    gradient_scale: torch.Tensor


def all_gradients(output: torch.Tensor, leaf: torch.Tensor, directions: list[torch.Tensor]) -> torch.Tensor:
    grads = [torch.autograd.grad(output, leaf, d.to(output.dtype), retain_graph=True)[0] for d in directions]
    return torch.stack(grads).double()


@cache
def truth(length: int, bandwidths: tuple[float, ...], grid: str) -> Truth:
    known = case(length, len(bandwidths), grid)
    logs = torch.tensor([math.log(h) for h in bandwidths]).double().requires_grad_()
    # Beyond 1,024 tokens the blocks in float64, which other tests compare with dense logits.
    apply = dense if length <= 1024 else lambda known, positions: run(known, positions, torch.float64)
    output = apply(known, gaussian(known, logs, torch.float64))
    gradients = all_gradients(output, logs, known.directions)
    with torch.no_grad():
        up, down = (apply(known, gaussian(known, logs + step, torch.float64)) for step in (1e-5, -1e-5))
    return Truth(output.detach(), gradients, ((up - down) / 2e-5).square().sum((0, 2, 3)).sqrt())


@pytest.mark.sampled("grid,dtype", "length,dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "bandwidths"),
    [(256, (*BANDWIDTHS, 256.0)), (1024, (0.1, 0.5, 4.1, 250.0, 1024.0)), (4096, (0.5, 4096.0))],
)
@pytest.mark.parametrize("grid", GRIDS)
def test_gaussian_of_any_bandwidth(grid: str, length: int, bandwidths: tuple[float, ...], dtype: torch.dtype) -> None:
    """From h = 0.1, where a token sees itself alone, to h = N: no digit is lost, and no gradient is noise."""
    known, exact = case(length, len(bandwidths), grid), truth(length, bandwidths, grid)
    logs = torch.tensor([math.log(h) for h in bandwidths]).requires_grad_()
    output = run(known, gaussian(known, logs, dtype), dtype)
    plain, plain_gradient = plain_error(length, len(bandwidths), grid, dtype)
    assert output.dtype == dtype
    error = relative_error(output.detach(), exact.output) / plain
    assert error.max() <= BOUND, f"output, a head: {error.tolist()}"
    gradients = all_gradients(output, logs, known.directions[: DIRECTIONS if length < 4096 else 2])
    lost = (gradients - exact.gradients[: len(gradients)]).square().mean(0).sqrt()
    # Where every weight but one underflows, float32 keeps the gradient near its smallest number.
    allowed = BOUND * plain_gradient * exact.gradient_scale + 1e-36
    assert (lost <= allowed).all(), f"gradient, a head: {(lost / allowed * BOUND).tolist()}"
    assert gradients[:, 0].abs().max() > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["alibi", "buckets"])
@pytest.mark.parametrize("grid", GRIDS)
def test_kernels_of_offsets(grid: str, kernel: str, dtype: torch.dtype) -> None:
    """Slopes from steep to flat; tables of buckets and their gradients."""
    heads, length = 4, 256
    known = case(length, heads, grid)
    parameter = torch.tensor([2.0, 0.3, 0.02, 1e-3]).view(-1, 1, 1)
    if kernel == "buckets":
        parameter = random(heads, known.places.shape[-1], 32, seed=40).float()
    results = []
    for precision in (torch.float64, dtype):
        leaf = parameter.to(torch.promote_types(precision, torch.float32)).requires_grad_()
        coordinates = known.places.to(leaf.dtype)
        positions: BlockedPositions
        if kernel == "alibi":
            positions = AlibiPositions(coordinates, coordinates, leaf, None, 2.0, known.is_causal, True)
        else:
            positions = BucketPositions(coordinates, coordinates, leaf, None, bucket_boundaries(16, 128), True)
        output = dense(known, positions) if precision == torch.float64 else run(known, positions, precision)
        results.append((output.detach(), all_gradients(output, leaf, known.directions)))
    (exact, exact_gradients), (got, gradients) = results
    plain, plain_gradient = plain_error(length, heads, grid, dtype)
    assert (relative_error(got, exact) / plain).max() <= BOUND
    lost = (gradients - exact_gradients).square().mean(0).sqrt().flatten(1)
    size = exact_gradients.square().mean(0).sqrt().flatten(1)
    # The slopes, which no layer learns: a distance is further from 0 in units of its spread than its square is.
    bound = 1.5 * BOUND if kernel == "alibi" else BOUND
    assert (lost.norm(dim=1) / size.norm(dim=1)).max() <= bound * plain_gradient


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("gap", [1, 10, 100])
def test_rows_that_do_not_see_themselves(gap: int, is_causal: bool) -> None:
    """Every key nearer than ``gap`` is hidden, as for rows of padding: logits of -1e6 that hardly differ.

    In float32 they would have no digits left, and the gradient of log h_p would be noise of the size of the logits.
    """
    bandwidths, length = (0.1, 1.0, 4.1, 61.0), 300
    heads = len(bandwidths)
    known, results = case(length, heads, "text" if is_causal else "bidirectional"), []
    mask = (known.places[0] - known.places[0].mT).abs() >= gap
    logs = torch.tensor([math.log(h) for h in bandwidths])

    def output(log_bandwidth: torch.Tensor) -> torch.Tensor:
        positions = gaussian(known, log_bandwidth, log_bandwidth.dtype)
        options = {"attention_mask": mask, "is_causal": is_causal, "boosting": "none", "steps": 1}
        return blocked_filter(*known.tokens(log_bandwidth.dtype), positions=positions, **options)[0]

    for dtype in (torch.float64, torch.float32):
        leaf = logs.to(dtype).requires_grad_()
        got = output(leaf)
        results.append((got.detach(), all_gradients(got, leaf, known.directions)))
    with torch.no_grad():
        scale = ((output(logs.double() + 1e-5) - output(logs.double() - 1e-5)) / 2e-5).square().sum((0, 2, 3)).sqrt()
    (exact, exact_gradients), (got, gradients) = results
    plain, plain_gradient = plain_error(length, heads, "text" if is_causal else "bidirectional", torch.float32)
    error = relative_error(got, exact) / plain
    assert error.max() <= BOUND, f"output, a head: {error.tolist()}"
    lost = (gradients - exact_gradients).square().mean(0).sqrt()
    assert (lost <= BOUND * plain_gradient * scale + 1e-6).all(), f"gradient, a head: {(lost / scale).tolist()}"


def test_padding_of_one_row_alone() -> None:
    """Masks and coordinates of their own for each sample, class tokens, and queries at other places than the keys."""
    length, heads = 40, 2
    known = case(64, heads, "text")
    query, key, value = (x[:, :, :length].expand(2, -1, -1, -1) for x in known.tokens(torch.float64))
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[0, ..., 25:] = False
    places = torch.stack((known.places[0, :length], known.places[0, :length] * 3))
    for coordinates in (places, places[:1], places + 7.0):
        class_tokens = ClassTokens(1, random(heads, 3, seed=5))
        scale = torch.tensor([200.0, 0.5]).double().view(-1, 1, 1)
        positions = GaussianPositions(coordinates, places[: len(coordinates)], scale, class_tokens, 1.0, True, False)
        options = {"attention_mask": mask, "positions": positions, "boosting": "none", "steps": 1, "block_rows": 16}
        got, _ = blocked_filter(query, key, value, **options)
        logits = query @ key.mT * WIDTH**-0.5 + position_logits(positions, torch.float64)
        expected = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
