"""Kernels: columns against dense logits, dense logits against the formula, exact positions, default bandwidths."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.backend_call import without_autocast
from hf_imgproc_attn.models.kernel_content import (
    class_token_columns,
    class_token_logits,
    decode_positions,
    dot_product_logits,
    encode_positions,
    gaussian_content_columns,
    gaussian_logits,
    gaussian_position_columns,
    gaussian_position_logits,
    left_columns,
    right_columns,
    working_dtype,
)
from hf_imgproc_attn.models.layer_parameters import default_bandwidth, gaussian_position_bandwidths
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2Model
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTModel
from tests.models.helpers import layer_inputs, make_filter, tiny_gpt2_config, tiny_vit_config

BATCH, HEADS, LENGTH, KEYS, WIDTH = 2, 3, 7, 9, 5
EXACT = {"rtol": 1e-13, "atol": 1e-12}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """<left_i, right_j> in float64."""
    return left.double() @ right.double().transpose(-1, -2)


def without_row_constant(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


def scales(bandwidths: tuple[float, ...] = (1.3, 2.0, 3.7)) -> torch.Tensor:
    return 2 / torch.tensor(bandwidths, dtype=torch.float64).view(-1, 1, 1) ** 2


def coordinates(dims: int, length: int, seed: int) -> torch.Tensor:
    """Positions of which a cached call may have any subset: integers, not sorted, other ones in each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-11, 12, (BATCH, length, dims), generator=generator).double()


# --------------------------------------------------------------------------------------------------------------------
# Content
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.37, scales()], ids=["number", "heads"])
def test_content_logits_are_the_formulas(scale: float | torch.Tensor) -> None:
    """Entry by entry: q.k 2/h^2, and -|q - k|^2/h^2 up to a constant a row."""
    query, key = random(BATCH, HEADS, LENGTH, WIDTH), random(BATCH, HEADS, KEYS, WIDTH, seed=1) * 1.5 + 0.4
    dot, gaussian = dot_product_logits(query, key, scale), gaussian_logits(query, key, scale)
    of_head = torch.as_tensor(scale, dtype=torch.float64).expand(HEADS, 1, 1)[:, 0, 0]
    for head in range(HEADS):
        for i in range(LENGTH):
            for j in range(KEYS):
                q, k = query[1, head, i], key[1, head, j]
                assert math.isclose(dot[1, head, i, j], (q * k).sum() * of_head[head], rel_tol=1e-13, abs_tol=1e-13)
                distance = -(q - k).square().sum() / 2 * of_head[head]
                row_constant = -q.square().sum() / 2 * of_head[head]
                assert math.isclose(gaussian[1, head, i, j] + row_constant, distance, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("scale", [0.37, scales()], ids=["number", "heads"])
def test_gaussian_content_columns(scale: float | torch.Tensor) -> None:
    """[q 2/h^2 ; a].[k ; b] is the dense logit, row constant included."""
    query, key = random(BATCH, HEADS, LENGTH, WIDTH), random(BATCH, HEADS, KEYS, WIDTH, seed=1) * 1.5 + 0.4
    left, right = gaussian_content_columns(query, key, scale)
    assert left.shape[:3] == (BATCH, HEADS, LENGTH)
    assert right.shape[:3] == (BATCH, HEADS, KEYS)
    got = product(query * scale, key) + product(left, right)
    torch.testing.assert_close(got, gaussian_logits(query, key, scale), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gaussian_content_columns_in_half_precision(dtype: torch.dtype) -> None:
    """-|k|^2/h^2 keeps about 22 bits, also where |k|^2 is large."""
    scale = scales().float()
    query = random(BATCH, HEADS, LENGTH, 64).to(dtype)
    key = (random(BATCH, HEADS, KEYS, 64, seed=1) * 8).to(dtype)
    left, right = gaussian_content_columns(query, key, scale)
    assert left.dtype == right.dtype == dtype
    expected = -key.double().square().sum(-1).unsqueeze(-2) / 2 * scale.double()
    torch.testing.assert_close(product(left, right), expected.expand(-1, -1, LENGTH, -1), rtol=2.0**-21, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Positions
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gaussian_position_logits_are_the_formula(dims: int) -> None:
    queries, keys, scale = coordinates(dims, LENGTH, 0), coordinates(dims, KEYS, 1), scales()
    logits = gaussian_position_logits(queries, keys, scale)
    assert logits.shape == (BATCH, HEADS, LENGTH, KEYS)
    for index in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        batch, head, i, j = index
        squared = sum((float(queries[batch, i, axis]) - float(keys[batch, j, axis])) ** 2 for axis in range(dims))
        assert math.isclose(logits[batch, head, i, j], -squared * float(scale[head]) / 2, rel_tol=1e-13)


@pytest.mark.parametrize("dims", [1, 2])
def test_gaussian_position_columns(dims: int) -> None:
    """Columns reproduce the logits up to a constant a row, for positions that differ between rows of the batch."""
    queries, keys, scale = coordinates(dims, LENGTH, 0), coordinates(dims, KEYS, 1), scales()
    left, right = gaussian_position_columns(queries, keys, scale, torch.float64)
    assert left.shape == (BATCH, HEADS, LENGTH, dims + 1)
    got, expected = product(left, right), gaussian_position_logits(queries, keys, scale)
    torch.testing.assert_close(without_row_constant(got), without_row_constant(expected), **EXACT)
    dropped = queries.square().sum(-1).view(BATCH, 1, LENGTH, 1) * scale / 2
    torch.testing.assert_close(got - expected, dropped.expand_as(got), **EXACT)


@pytest.mark.parametrize("shared_rows", [True, False])
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dims", [1, 2])
def test_class_token_columns_beside_the_grid(dims: int, classes: int, shared_rows: bool) -> None:
    """Class keys get back the row constant that the grid's columns dropped, in every row and head."""
    places = coordinates(dims, LENGTH, 0)[: 1 if shared_rows else BATCH]
    places[:, :classes] = 0
    scale, bias = scales(), random(HEADS, 3)
    on_grid = (torch.arange(LENGTH) >= classes).double().view(-1, 1)
    left, right = gaussian_position_columns(places, places, scale, torch.float64)
    dropped = places.square().sum(-1).unsqueeze(1) * scale.squeeze(-1) / 2
    left_class, right_class = class_token_columns(bias, dropped, LENGTH, LENGTH, classes, torch.float64)
    got = product(left * on_grid, right * on_grid) + product(left_class, right_class)
    grid = gaussian_position_logits(places, places, scale) * on_grid * on_grid.view(1, -1)
    expected = grid + class_token_logits(bias, LENGTH, LENGTH, classes)
    torch.testing.assert_close(without_row_constant(got), without_row_constant(expected), **EXACT)


@pytest.mark.parametrize("classes", [1, 2])
def test_class_token_columns_without_a_row_constant(classes: int) -> None:
    """Where the grid's columns drop nothing (``untied``) the class-token logits are exact."""
    bias = random(HEADS, 3)
    left, right = class_token_columns(bias, None, LENGTH, KEYS, classes, torch.float64)
    expected = class_token_logits(bias, LENGTH, KEYS, classes)
    torch.testing.assert_close(product(left, right), expected, **EXACT)


@pytest.mark.parametrize("classes", [1, 2])
def test_class_token_logits_are_three_scalars_a_head(classes: int) -> None:
    """To the class tokens, from them, within them; 0 between patches."""
    bias = random(HEADS, 3)
    logits = class_token_logits(bias, LENGTH, KEYS, classes)
    assert logits.shape == (1, HEADS, LENGTH, KEYS)
    for head in range(HEADS):
        to_class, from_class, within = bias[head].tolist()
        for i in range(LENGTH):
            for j in range(KEYS):
                expected = (within if j < classes else from_class) if i < classes else to_class if j < classes else 0.0
                assert logits[0, head, i, j] == expected


# --------------------------------------------------------------------------------------------------------------------
# Half precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_split_products_have_about_24_bits(dtype: torch.dtype) -> None:
    """The sum of the columns' products is a * b to about 2^-23, where plain columns have 2^-8 or 2^-11."""
    a, b = random(4096).float() * 30, random(4096, seed=1).float() * 300
    exact = a.double() * b.double()
    split = (left_columns(a, dtype).double() * right_columns(b, dtype).double()).sum(-1)
    plain = a.to(dtype).double() * b.to(dtype).double()
    # In float16 the pieces of b / 256 end at the smallest subnormal number, 2^-24.
    allowed = exact.abs() * 2.0**-23 + (0 if dtype == torch.bfloat16 else a.abs().double() * 256 * 2.0**-25)
    assert ((split - exact).abs() <= allowed).all()
    assert ((plain - exact).abs() > allowed * 2**8).float().mean() > 0.5
    assert left_columns(a, dtype).dtype == right_columns(b, dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_column_is_enough_in_full_precision(dtype: torch.dtype) -> None:
    a = random(5).to(dtype)
    for columns in (left_columns(a, dtype), right_columns(a, dtype)):
        assert columns.shape == (5, 1)
        assert torch.equal(columns[:, 0], a)


def test_gradient_of_split_columns_is_that_of_the_product() -> None:
    """The pieces depend on each other; together they must pass on d(ab)/da = b and d(ab)/db = a."""
    a, b = (random(64, seed=seed).float().requires_grad_() for seed in (0, 1))
    (left_columns(a, torch.bfloat16).float() * right_columns(b, torch.bfloat16).float()).sum().backward()
    torch.testing.assert_close(a.grad, b.detach(), rtol=2.0**-7, atol=0)
    torch.testing.assert_close(b.grad, a.detach(), rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 0.5], ids=["integers", "halves"])
def test_positions_survive_every_dtype_exactly(dtype: torch.dtype, offset: float) -> None:
    """Cached keys carry their position: whole and half numbers, negative ones and those beyond 4096."""
    generator = torch.Generator().manual_seed(0)
    limit = 2**24 - 1
    near = torch.arange(-9000, 9001)
    far = torch.randint(-limit, limit + 1, (5000,), generator=generator)
    edges = torch.tensor([-limit, limit, 2**23 + 1, 16773120, -65504, 65537])
    whole = torch.cat((near, far, edges) if not offset else (near,)).double()
    positions = (whole + offset).to(working_dtype(dtype)).view(1, -1, 1).expand(2, -1, 2)
    columns = encode_positions(positions, dtype)
    assert columns.dtype == dtype
    assert columns.shape[:2] == positions.shape[:2]
    decoded = decode_positions(columns)
    assert decoded.dtype == working_dtype(dtype)
    assert torch.equal(decoded, positions)


def test_coordinates_of_two_axes_are_not_mixed() -> None:
    positions = torch.tensor([[[1.0, -4097.0], [300.0, 7.0]]])
    for dtype in DTYPES:
        assert torch.equal(decode_positions(encode_positions(positions, dtype)).float(), positions)


def test_working_dtype() -> None:
    assert [working_dtype(dtype) for dtype in DTYPES] == [torch.float32, torch.float32, torch.float32, torch.float64]


# --------------------------------------------------------------------------------------------------------------------
# Default bandwidths
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 5, 64, 128])
def test_default_bandwidth_is_that_of_stock_attention(head_dim: int) -> None:
    """h = (4 d)^(1/4), so that 2/h^2 = 1/sqrt(d)."""
    assert math.isclose(default_bandwidth(head_dim), (4 * head_dim) ** 0.25, rel_tol=1e-15)
    assert math.isclose(2 / default_bandwidth(head_dim) ** 2, head_dim**-0.5, rel_tol=1e-14)


@pytest.mark.parametrize(("heads", "head_dim", "side"), [(2, 64, 1024), (5, 16, 14), (12, 64, 1024), (3, 64, 2)])
def test_spatial_bandwidths_are_geometric_over_the_heads(heads: int, head_dim: int, side: int) -> None:
    bandwidths = torch.tensor(gaussian_position_bandwidths(heads, head_dim, side), dtype=torch.float64)
    assert len(bandwidths) == heads
    assert math.isclose(bandwidths[0], (4 * head_dim) ** 0.25, rel_tol=1e-13)
    assert math.isclose(bandwidths[-1], side, rel_tol=1e-13)
    ratios = bandwidths[1:] / bandwidths[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-13, atol=0)


def test_spatial_bandwidth_of_a_single_head() -> None:
    assert math.isclose(gaussian_position_bandwidths(1, 64, 1024)[0], math.sqrt(4 * 1024), rel_tol=1e-13)


def bandwidths_of(attention: torch.nn.Module, which: str) -> torch.Tensor:
    return getattr(attention.filter.scalar_bias, f"{which}_log_bandwidth").detach().double().exp()


SCALE_OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("options", SCALE_OPTIONS, ids=str)
@pytest.mark.parametrize("preset", ["bilateral", "bilateral_gaussian"])
def test_gpt2_bandwidths_follow_the_stock_scaling(preset: str, options: dict[str, Any]) -> None:
    """2/h_y^2 is the stock factor of each layer; h_p of ``untied`` is the same, of ``gaussian`` in index units."""
    config = tiny_gpt2_config(preset, **options)
    for index, block in enumerate(ImgProcGPT2Model(config).h):
        factor = (5**-0.5 if config.scale_attn_weights else 1.0) / (
            index + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )
        expected = torch.full((4,), math.sqrt(2 / factor), dtype=torch.float64)
        torch.testing.assert_close(bandwidths_of(block.attn, "content"), expected, rtol=1e-6, atol=0)
        if preset == "bilateral_gaussian":
            expected = torch.tensor(gaussian_position_bandwidths(4, 5, 24), dtype=torch.float64)
        torch.testing.assert_close(bandwidths_of(block.attn, "position"), expected, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", SCALE_OPTIONS, ids=str)
def test_gpt2_scaling_of_layers_that_learn_nothing(options: dict[str, Any], implementation: str) -> None:
    """Without bandwidths of its own a boosted layer has the stock factor of its index."""
    config = tiny_gpt2_config("twicing", attn_implementation=implementation, **options)
    query, key, value = (random(BATCH, 4, LENGTH, 5, seed=seed) for seed in range(3))
    for index, block in enumerate(ImgProcGPT2Model(config).double().h):
        factor = (5**-0.5 if config.scale_attn_weights else 1.0) / (
            index + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )
        matrix = (query @ key.mT * factor).softmax(-1)
        output, _ = block.attn.filter(query, key, value, layer_inputs(LENGTH))
        torch.testing.assert_close(output, 2 * matrix @ value - matrix @ (matrix @ value), **EXACT)


def test_vit_bandwidths_reach_the_longest_side_of_the_grid() -> None:
    for layer in ImgProcViTModel(tiny_vit_config("bilateral_gaussian")).layers:
        bandwidths = bandwidths_of(layer.attention, "position")
        assert math.isclose(bandwidths[0], 20**0.25, rel_tol=1e-6)
        assert math.isclose(bandwidths[-1], 5, rel_tol=1e-6), "patches of a 20 x 12 image with patch size 4"
        assert torch.equal(layer.attention.filter.scalar_bias.class_token, torch.zeros(4, 3))


def apply(layer: torch.nn.Module, implementation: str) -> torch.Tensor:
    query, key, value = (random(BATCH, 3, LENGTH, 5, seed=seed) for seed in range(3))
    places = torch.arange(LENGTH, dtype=torch.float64).view(1, -1, 1) - 3
    return layer(query, key, value, implementation=implementation, coordinates=places)[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_given_bandwidths_are_used_a_head_each(implementation: str) -> None:
    """A number holds for all heads, a list per head; learned or not they mean the same."""
    given = {"content_bandwidth": [1.0, 2, 3.5], "position_bandwidth": [2.5, 4, 1]}
    kernels = ("gaussian", "gaussian", "twicing")
    fixed = make_filter(*kernels, learn_bandwidths=False, **given)
    learned = make_filter(*kernels, **given)
    learned.scalar_bias.reset_parameters()
    expected = apply(fixed, implementation)
    torch.testing.assert_close(apply(learned, implementation), expected, rtol=1e-6, atol=1e-6)
    for head in range(3):
        one = {name: values[head] for name, values in given.items()}
        alone = apply(make_filter(*kernels, learn_bandwidths=False, **one), implementation)
        torch.testing.assert_close(alone[:, head], expected[:, head], **EXACT)
        assert (alone - expected).abs().amax((0, 2, 3)).sort().values[1] > 1e-3, "the heads differ"


def test_autocast_is_asked_for_without_breaking_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 cannot trace `is_autocast_available`: it must not be called on the way."""
    kinds = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta")}

    def untraceable(device_type: str) -> bool:
        raise AssertionError(f"asked for {device_type}")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    assert kinds == {"cpu": True, "cuda": True, "meta": False}
    # A context costs time, so that there is none where autocast is off.
    assert all(isinstance(without_autocast(kind), nullcontext) for kind in kinds)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {kind: not isinstance(without_autocast(kind), nullcontext) for kind in kinds}
        assert found == {"cpu": True, "cuda": False, "meta": False}
        ImgProcGPT2Model(tiny_gpt2_config("bilateral_gaussian", boosting="twicing")).eval()(tokens)
