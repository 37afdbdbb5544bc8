"""Gaussian position kernels at 1024 tokens: output and bandwidth gradient of every precision against float64.

Squared positions reach 2^18 and 2/h^2 spans five decades over the heads, so a form of the kernel that is correct on
paper can be wrong in every digit. The yardstick is the error of torch's own attention in the same dtype on the same
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from hf_imgproc_attn.models.kernel_content import gaussian_position_columns
from hf_imgproc_attn.models.kernel_position import ClassTokens, GaussianPositions, features_or_bias
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from tests.models.helpers import make_filter

LENGTH, WIDTH = 1024, 16
BANDWIDTHS = [4.1, 15.0, 61.0, 250.0, 1000.0]  # no powers of two, whose products would be exact
HEADS = len(BANDWIDTHS)
HALF = (torch.bfloat16, torch.float16)
PRECISIONS = (*HALF, torch.float32)
Inputs = dict[str, torch.Tensor]

# Bounds on the error of every head, root mean square over root mean square, and what was measured.
# Half precision, in units of plain attention's error in the same dtype (2e-3 in bfloat16, 3e-4 in float16): 1.6; where
# every patch looks at the class token, the rounding of its logit in a bias of half precision makes 2.8.
HALF_BOUND = {"text": 1.8, "bidirectional": 1.8, "patches": 1.8, "patches and class token": 3.2}
# float32, likewise in units of plain attention's error (3e-7), through the blocks or a bias alike.
FLOAT_BOUND = 3.0
# Gradient of log h_p in units of its size, every head. Half precision: two epsilons, 1.6 % (1.1 %) in bfloat16 and
# 0.2 % (0.11 %) in float16. float32: 1.25e-6 for one upstream gradient and h = 1000, where plain attention's own
# gradients have 3.5e-7; test_precision_blocked.py has the mean over several.
FLOAT_GRADIENT_BOUND = 1.5e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error a head, ``[batch, heads, ...]`` to ``[heads]``."""
    rest = [axis for axis in range(got.ndim) if axis != 1]
    error = got.detach().double() - exact
    return error.square().mean(rest).sqrt() / exact.square().mean(rest).sqrt()


def tokens(length: int = LENGTH) -> Inputs:
    """Query, key and value that bfloat16 and float16 both hold exactly, so that one truth serves every precision."""
    names = enumerate(("query", "key", "value"))
    return {n: random(1, HEADS, length, WIDTH, seed=seed).bfloat16().half().double() for seed, n in names}


def line(length: int = LENGTH, first: int = -LENGTH // 2) -> torch.Tensor:
    """Text: centred token indices."""
    return torch.arange(first, first + length).double().view(1, -1, 1)


def square(side: int, classes: int) -> torch.Tensor:
    """Patches: centred rows and columns, class tokens first."""
    places = torch.arange(side).double() - (side - 1) / 2
    grid = torch.cartesian_prod(places, places)
    return torch.cat((torch.zeros(classes, 2, dtype=torch.float64), grid)).unsqueeze(0)


def layer_for(classes: int = 0, axes: int = 1, **options: Any) -> AttentionFilter:
    """A filter with the bandwidths above; scalars that are parameters are exactly representable in float32."""
    options = {"position_axes": axes, "position_bandwidth": BANDWIDTHS, "heads": HEADS, "head_dim": WIDTH, **options}
    layer = make_filter("dot_product", "gaussian", num_class_tokens=classes, **options)
    with torch.no_grad():
        if layer.scalar_bias.position_log_bandwidth is not None:
            layer.scalar_bias.position_log_bandwidth.copy_(torch.tensor([math.log(h) for h in BANDWIDTHS]))
        if classes:  # every patch looks at the class token, or an error in its logits would not be seen
            layer.scalar_bias.class_token[:, 0] += 3.0
    return layer.float().double()


def evaluate(
    layer: AttentionFilter,
    inputs: Inputs,
    places: torch.Tensor,
    dtype: torch.dtype,
    upstream: torch.Tensor | None = None,
    implementation: str = "sdpa",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output, and the gradient of log h_p where there is an upstream gradient, with everything in ``dtype``."""
    layer = layer.double().to(dtype)
    layer.zero_grad()
    places = places if dtype == torch.float64 else places.float()
    with torch.set_grad_enabled(upstream is not None):
        given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        output, _ = layer(**given, coordinates=places, implementation=implementation, **options)
        if upstream is None:
            return output, None
        output.backward(upstream.to(output.dtype))
    return output.detach(), layer.scalar_bias.position_log_bandwidth.grad.double()


CASES: dict[str, Callable[[], tuple[torch.Tensor, int, bool]]] = {
    "text": lambda: (line(), 0, True),
    "bidirectional": lambda: (line(), 0, False),
    "patches": lambda: (square(32, 0), 0, False),
    "patches and class token": lambda: (square(32, 1), 1, False),
}


class Truth(NamedTuple):
    """A case in float64.

    gradient_scale: the size of the gradient of log h_p for a random upstream gradient, the norm of the output's
        derivative a head. The gradient itself is a sum that may nearly cancel; its size says little about its error.
    """

    inputs: Inputs
    places: torch.Tensor
    classes: int
    options: dict[str, Any]
    upstream: torch.Tensor
    output: torch.Tensor
    gradient: torch.Tensor
    gradient_scale: torch.Tensor

    def gradient_error(self, layer: AttentionFilter) -> torch.Tensor:
        """Of the gradient that ``layer`` has now, a head."""
        return (layer.scalar_bias.position_log_bandwidth.grad.double() - self.gradient).abs() / self.gradient_scale


@cache
def truth(case: str, stock_content: bool = False) -> Truth:
    """Of :func:`layer_for` or, for the hand-made columns below, with the stock content bandwidth."""
    places, classes, is_causal = CASES[case]()
    inputs, options = tokens(places.shape[1]), {"is_causal": is_causal}
    upstream = random(*inputs["value"].shape, seed=9).bfloat16().half().double()
    layer = layer_for(classes, places.shape[-1])
    if stock_content:
        layer.scalar_bias.content_log_bandwidth.data.fill_(math.log(2 * WIDTH**0.5) / 2)
    output, gradient = evaluate(layer, inputs, places, torch.float64, upstream, "eager", **options)
    moved, parameter = [], layer.scalar_bias.position_log_bandwidth
    for step in (1e-5, -2e-5):
        parameter.data += step
        moved.append(evaluate(layer, inputs, places, torch.float64, implementation="eager", **options)[0])
    scale = ((moved[0] - moved[1]) / 2e-5).square().sum((0, 2, 3)).sqrt()
    return Truth(inputs, places, classes, options, upstream, output, gradient, scale)


@cache
def plain_error(dtype: torch.dtype, is_causal: bool, length: int) -> float:
    """The yardstick: torch's attention in ``dtype`` on the same tokens."""
    attention, inputs = torch.nn.functional.scaled_dot_product_attention, tokens(length)
    exact = attention(*inputs.values(), is_causal=is_causal)
    return float(relative_error(attention(*(x.to(dtype) for x in inputs.values()), is_causal=is_causal), exact).mean())


def output_bound(dtype: torch.dtype, case: str) -> float:
    known, factor = truth(case), FLOAT_BOUND if dtype == torch.float32 else HALF_BOUND[case]
    return factor * plain_error(dtype, known.options["is_causal"], known.places.shape[1])


def gradient_bound(dtype: torch.dtype, case: str) -> float:
    return FLOAT_GRADIENT_BOUND if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


@pytest.mark.sampled("dtype,case")
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_output_and_bandwidth_gradient(dtype: torch.dtype, case: str, mode: str) -> None:
    """Every head, without gradients (feature columns may do) and with (they may not)."""
    known, layer = truth(case), layer_for(truth(case).classes, truth(case).places.shape[-1])
    upstream = known.upstream if mode == "training" else None
    output, _ = evaluate(layer, known.inputs, known.places, dtype, upstream, **known.options)
    assert output.dtype == dtype
    error = relative_error(output, known.output)
    assert error.max() <= output_bound(dtype, case), f"a head: {error.tolist()}"
    if mode == "training":
        error = known.gradient_error(layer)
        assert error.max() <= gradient_bound(dtype, case), f"a head: {error.tolist()}"


@pytest.mark.parametrize("case", ["text", "patches and class token"])
def test_bandwidths_that_are_not_learned(case: str) -> None:
    """Their features may be used in training too."""
    known, layer = truth(case), layer_for(truth(case).classes, truth(case).places.shape[-1], learn_bandwidths=False)
    exact, _ = evaluate(layer, known.inputs, known.places, torch.float64, implementation="eager", **known.options)
    for dtype in PRECISIONS:
        output, _ = evaluate(layer, known.inputs, known.places, dtype, **known.options)
        assert relative_error(output, exact).max() <= output_bound(dtype, case), dtype


@pytest.mark.parametrize("case", ["text", "patches and class token"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_eager_is_no_worse_than_plain_attention(dtype: torch.dtype, case: str) -> None:
    """The dense form computes in float32 and rounds the output once."""
    known, layer = truth(case), layer_for(truth(case).classes, truth(case).places.shape[-1])
    output, _ = evaluate(layer, known.inputs, known.places, dtype, implementation="eager", **known.options)
    assert relative_error(output, known.output).max() <= output_bound(dtype, case) / HALF_BOUND[case]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", ["text", "patches and class token"])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(given: torch.dtype, case: str, mode: str) -> None:
    """Under autocast SDPA runs in bfloat16, whatever dtype query and key come in: the bounds are those of bfloat16."""
    known, layer = truth(case), layer_for(truth(case).classes, truth(case).places.shape[-1]).float()
    leaves = {name: tensor.to(given) for name, tensor in known.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(mode == "training"):
        output, _ = layer(**leaves, coordinates=known.places.float(), implementation="sdpa", **known.options)
    assert relative_error(output, known.output).max() <= output_bound(torch.bfloat16, case)
    if mode == "training":
        output.backward(known.upstream.to(output.dtype))
        assert known.gradient_error(layer).max() <= gradient_bound(torch.bfloat16, case)


@pytest.mark.parametrize("first", [-4096, -16384])
@pytest.mark.parametrize("mode", ["inference", "training", "fixed"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_far_from_the_centre(dtype: torch.dtype, mode: str, first: int) -> None:
    """A short text in a model with many positions lies far from the centre: it must not lose its digits there.

    Only differences of positions matter, so the error may be that of the same text at the centre.
    """
    places, inputs, layer = line(128, first), tokens(128), layer_for(learn_bandwidths=mode != "fixed")
    exact, _ = evaluate(layer, inputs, places, torch.float64, implementation="eager", is_causal=True)
    output, _ = evaluate(layer, inputs, places, dtype, exact if mode == "training" else None, is_causal=True)
    factor = FLOAT_BOUND if dtype == torch.float32 else HALF_BOUND["text"]
    error = relative_error(output, exact)
    assert error.max() <= factor * plain_error(dtype, True, 128), f"a head: {error.tolist()}"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_long_texts(dtype: torch.dtype) -> None:
    """The error of columns grows with the square of length over bandwidth: the bound at 1024 tokens holds beyond."""
    length = 2304
    places, inputs = line(length, -length // 2), {name: tensor[:, :1] for name, tensor in tokens(length).items()}
    layer = layer_for(heads=1, position_bandwidth=BANDWIDTHS[:1], learn_bandwidths=False)
    exact, _ = evaluate(layer, inputs, places, torch.float64, implementation="eager", is_causal=True)
    output, _ = evaluate(layer, inputs, places, dtype, is_causal=True)
    factor = FLOAT_BOUND if dtype == torch.float32 else HALF_BOUND["text"]
    bound = factor * plain_error(dtype, True, length)
    assert relative_error(output, exact).max() <= bound


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_positions_with_a_gap(dtype: torch.dtype, mode: str) -> None:
    """Custom positions may lie far apart however few they are: the choice of form must not go by their number."""
    places = torch.cat((line(64, -4096), line(64, 4032)), dim=1)
    inputs, layer = tokens(128), layer_for()
    exact, _ = evaluate(layer, inputs, places, torch.float64, implementation="eager", is_causal=True)
    output, _ = evaluate(layer, inputs, places, dtype, exact if mode == "training" else None, is_causal=True)
    factor = FLOAT_BOUND if dtype == torch.float32 else HALF_BOUND["text"]
    error = relative_error(output, exact)
    assert error.max() <= factor * plain_error(dtype, True, 128), f"a head: {error.tolist()}"


# --------------------------------------------------------------------------------------------------------------------
# Which form SDPA gets
# --------------------------------------------------------------------------------------------------------------------


def gaussian(
    bandwidth: float, side: int, *, classes: int = 0, learns: bool = False, contiguous: bool = True
) -> GaussianPositions:
    """Text of ``side`` tokens, of a layer that started with h = 1000."""
    class_tokens = ClassTokens(classes, torch.zeros(1, 3)) if classes else None
    scale, places = torch.full((1, 1, 1), 2 / bandwidth**2), line(side).float()
    return GaussianPositions(places, places, scale, class_tokens, 1000.0, learns, contiguous)


def test_which_form_gaussian_takes() -> None:
    """Columns where the grid is short in units of the bandwidth in use; a bias that forms differences elsewhere."""
    single, double, bfloat16, float16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for dtype in (single, double):
        assert features_or_bias(gaussian(16.0, 64), dtype) == "features"
        assert features_or_bias(gaussian(15.0, 64), dtype) == "bias"
        assert features_or_bias(gaussian(16.0, 64, classes=1), dtype) == "features"
    for contiguous in (True, False):
        assert features_or_bias(gaussian(1.0, 256, contiguous=contiguous), bfloat16) == "features"
        assert features_or_bias(gaussian(0.9, 256, contiguous=contiguous), bfloat16) == "bias"
    assert features_or_bias(gaussian(100.0, 64, classes=1), bfloat16) == "bias"
    assert features_or_bias(gaussian(100.0, 64), float16) == "bias"
    for dtype in (single, double, bfloat16):
        assert features_or_bias(gaussian(100.0, 64, learns=True), dtype) == "bias", "the gradient of h_p"
        with torch.no_grad():
            assert features_or_bias(gaussian(100.0, 64, learns=True), dtype) == "features"
            assert features_or_bias(gaussian(0.1, 64, learns=True), dtype) == "bias", "the bandwidth that was learned"


def test_a_frozen_bandwidth_is_not_taken_for_the_initial_one() -> None:
    """Trained down to h = 0.2 and frozen: exact in float32."""
    layer, inputs, places = layer_for(position_bandwidth=[100.0] * HEADS), tokens(64), line(64)
    layer.scalar_bias.position_log_bandwidth.data.fill_(math.log(0.2))
    layer.requires_grad_(False)
    exact, _ = evaluate(layer, inputs, places, torch.float64, implementation="eager", is_causal=True)
    output, _ = evaluate(layer, inputs, places, torch.float32, is_causal=True)
    assert relative_error(output, exact).max() <= FLOAT_BOUND * plain_error(torch.float32, True, 64)


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("axes", [1, 2])
def test_columns_that_are_allowed_are_exact(axes: int, side: int) -> None:
    """At the longest side that float32 columns are used for: output and gradients of the content."""
    bandwidth = side / (4.0 if axes == 1 else 2.0)
    places = line(side, 300) if axes == 1 else square(side, 0)
    layer = layer_for(axes=axes, position_bandwidth=[bandwidth * 1.001] * HEADS, learn_bandwidths=False)
    inputs, length = tokens(places.shape[1]), places.shape[1]
    direction, results = random(1, HEADS, length, WIDTH, seed=9).bfloat16().double(), []
    for dtype, implementation in ((torch.float64, "eager"), (torch.float32, "sdpa"), (torch.float32, "eager")):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        options = {"coordinates": places.to(dtype), "contiguous": True, "implementation": implementation}
        output, _ = layer.to(dtype)(**leaves, **options)
        results.append([output, *torch.autograd.grad(output, list(leaves.values()), direction.to(dtype))])
    exact, columns, dense = results
    for truth_, got, plain in zip(exact, columns, dense, strict=True):
        assert relative_error(got, truth_.detach()).max() <= 3 * relative_error(plain, truth_.detach()).max()


# --------------------------------------------------------------------------------------------------------------------
# The bounds have teeth: forms that are right on paper break them
# --------------------------------------------------------------------------------------------------------------------


def naive_columns(places: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[2p_i/h^2, -1/h^2].[p_j, p_j^2] rounded to one column each."""
    left = torch.stack(((places * scale)[..., 0], (scale * -0.5).expand(HEADS, places.shape[1], 1)[..., 0]), dim=-1)
    right = torch.cat((places, places.square()), dim=-1).expand(HEADS, -1, -1)
    return left.unsqueeze(0).to(dtype), right.unsqueeze(0).to(dtype)


def with_columns(inputs: Inputs, columns: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Causal attention on columns beside query and key."""
    query, key, value = (tensor.to(dtype) for tensor in inputs.values())
    query = torch.cat(((query * WIDTH**-0.5).to(dtype), columns[0]), dim=-1)
    key = torch.cat((key, columns[1]), dim=-1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_single_columns_would_break_the_bound(dtype: torch.dtype) -> None:
    """Positions rounded to half precision: the bound on the output notices, in narrow heads by orders of magnitude."""
    known = truth("text", stock_content=True)
    places, scale = known.places, 2 / torch.tensor(BANDWIDTHS, dtype=torch.float64).view(-1, 1, 1) ** 2
    if dtype == torch.float16:  # p^2 must not overflow: the naive form gets the best shift
        places, scale = places / 2**4, scale * 2**8
    error = relative_error(with_columns(known.inputs, naive_columns(places, scale, dtype), dtype), known.output)
    assert error[0] > 100 * output_bound(dtype, "text")
    assert (error[:3] > output_bound(dtype, "text")).all()


def test_gradient_through_half_precision_columns_would_break_the_bound() -> None:
    """Split columns give the output within its bound but a useless gradient of log h_p, where large terms cancel."""
    known, dtype = truth("text", stock_content=True), torch.bfloat16
    layer, places = layer_for().float(), known.places.float()
    log_bandwidth = layer.scalar_bias.position_log_bandwidth
    columns = gaussian_position_columns(places, places, 2 * torch.exp(-2 * log_bandwidth).view(-1, 1, 1), dtype)
    output = with_columns(known.inputs, columns, dtype)
    assert relative_error(output, known.output).max() <= output_bound(dtype, "text")
    output.backward(known.upstream.to(dtype))
    assert known.gradient_error(layer).max() > 10 * gradient_bound(dtype, "text")


# --------------------------------------------------------------------------------------------------------------------
# Masks beside very low position logits
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["boolean", "smallest", "infinity"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_hidden_near_keys_lose_to_visible_far_ones(dtype: torch.dtype, mode: str, hidden: str) -> None:
    """A key 2000 places away has a logit of -250,000 at h = 4, below float16's range; a hidden key is lower still.

    Among the visible ones the nearest has all the weight in narrow heads.
    """
    places = line(64, -32) * 100
    near = (places - places.mT).abs() < 2000
    mask = ~near
    if hidden != "boolean":
        low = torch.finfo(dtype).min if hidden == "smallest" else float("-inf")
        mask = torch.zeros(near.shape, dtype=dtype).masked_fill(near, low)
    inputs, layer = tokens(64), layer_for()
    exact, _ = layer(**inputs, coordinates=places, implementation="eager", attention_mask=~near)
    layer, results = layer.to(dtype), []
    for factor in (1.0, -50.0):
        inputs["value"][:, :, :20] *= factor  # of the keys that row 0 must not see
        given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        with torch.set_grad_enabled(mode == "training"):
            output, _ = layer(**given, coordinates=places.float(), implementation="sdpa", attention_mask=mask)
        results.append(output.detach()[:, :, 0])
    assert torch.equal(results[0], results[1]), "a hidden value has an influence"
    torch.testing.assert_close(results[0].double(), exact.detach()[:, :, 0], rtol=0, atol=0.02)
