"""ALiBi, buckets, rotary and the elliptical metric at 1024 tokens, and Gaussian logits beyond the range of float16.

As in ``test_precision``: errors against float64 in units of the error of torch's own attention in the same precision.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.helpers import make_filter

LENGTH, WIDTH, HEADS = 1024, 16, 5
HALF = (torch.float16, torch.bfloat16)
Inputs = dict[str, torch.Tensor]


def tokens(size: float = 1.0, width: int = WIDTH) -> Inputs:
    """Tokens that bfloat16 and float16 both hold exactly."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 1, HEADS, LENGTH, width, generator=generator)
    states[:2] *= size
    names = ("query", "key", "value", "previous_value")
    return {name: tensor.bfloat16().half().double() for name, tensor in zip(names, states, strict=True)}


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error a head."""
    return (got.double() - exact).square().mean((0, 2, 3)).sqrt() / exact.square().mean((0, 2, 3)).sqrt()


def plain_error(inputs: Inputs, dtype: torch.dtype, is_causal: bool) -> float:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    attention = torch.nn.functional.scaled_dot_product_attention
    exact = attention(query, key, value, is_causal=is_causal)
    got = attention(query.to(dtype), key.to(dtype), value.to(dtype), is_causal=is_causal)
    return float(relative_error(got, exact).mean())


# Largest error of a head in units of plain attention's, in float32, float16 and bfloat16.
BOUNDS = {
    ("alibi", 1, True): (3, 1.5, 1.5),
    ("alibi", 1, False): (2, 2, 2),
    ("alibi", 2, False): (2, 2, 2),
    ("relative_buckets", 1, True): (2, 2, 2),
    ("relative_buckets", 2, False): (2, 2, 2),
    ("rotary", 1, True): (3, 3, 3),
    ("rotary", 2, False): (3, 3, 3),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("kernel", "axes", "is_causal"), list(BOUNDS))
def test_positions(kernel: str, axes: int, is_causal: bool, dtype: torch.dtype) -> None:
    """Every head; ALiBi's columns reach m j = 512."""
    inputs, layer = tokens(), make_filter("dot_product", kernel, heads=HEADS, head_dim=WIDTH, position_axes=axes)
    layer = layer.to(dtype).double()
    places = torch.arange(LENGTH) - 300 if axes == 1 else torch.cartesian_prod(torch.arange(32), torch.arange(32))
    options: dict[str, Any] = {"is_causal": is_causal, "contiguous": True, "coordinates": places.view(1, LENGTH, axes)}
    exact, _ = layer(**inputs, implementation="eager", **options)
    given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    got, _ = layer.to(dtype)(**given, implementation="sdpa", **options)
    bound = dict(zip((torch.float32, *HALF), BOUNDS[kernel, axes, is_causal], strict=True))[dtype]
    error = relative_error(got, exact) / plain_error(inputs, dtype, is_causal)
    assert error.max() <= bound, f"a head: {error.tolist()}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_elliptical(is_causal: bool, dtype: torch.dtype) -> None:
    """The metric is computed in float32 and multiplies the query once."""
    inputs, layer = tokens(), make_filter("elliptical", heads=HEADS, head_dim=WIDTH).to(dtype).double()
    exact, _ = layer(**inputs, implementation="eager", is_causal=is_causal)
    given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    got, _ = layer.to(dtype)(**given, implementation="sdpa", is_causal=is_causal)
    error = relative_error(got, exact) / plain_error(inputs, dtype, is_causal)
    assert error.max() <= 2.5, f"a head: {error.tolist()}"


@pytest.mark.sampled("size,dtype")
@pytest.mark.parametrize("position", ["none", "gaussian"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", [30.0, 1000.0, 5000.0, 20000.0])
def test_gaussian_logits_beyond_float16(size: float, dtype: torch.dtype, implementation: str, position: str) -> None:
    """|k|^2 up to 4e11, where float16 ends at 65504: no NaN in output or gradient, and the right neighbour wins.

    Logits of that size leave one key in each row: what is compared is which one. Beyond 2^32 no product of two float16
    numbers is a logit, and SDPA in that precision has no say in it.
    """
    inputs = {name: tensor.clamp(-60000, 60000) for name, tensor in tokens(size).items()}
    layer = make_filter("gaussian", position, heads=HEADS, head_dim=WIDTH, longest_side=LENGTH)
    places = torch.arange(LENGTH).view(1, LENGTH, 1) - LENGTH // 2
    options: dict[str, Any] = {"is_causal": True, "contiguous": True, "coordinates": places}
    given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with torch.no_grad():
        exact, _ = layer(**{name: t.double() for name, t in given.items()}, implementation="eager", **options)
    leaves = {name: tensor.requires_grad_(name != "previous_value") for name, tensor in given.items()}
    layer = layer.to(dtype)
    got, _ = layer(**leaves, implementation=implementation, **options)
    got.float().sum().backward()
    gradients = [leaves[name].grad for name in ("query", "key", "value")]
    gradients += [parameter.grad for parameter in layer.parameters()]
    assert got.isfinite().all()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    wrong = ((got.detach().double() - exact).norm(dim=-1) > 0.1 * exact.norm(dim=-1)).double().mean()
    assert wrong < 0.02 or (size > 5000 and (dtype, implementation) == (torch.float16, "sdpa")), (
        f"{wrong:.1%} of the rows"
    )
