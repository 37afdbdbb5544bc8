"""ALiBi, buckets of offsets and rotary positions against the papers' own code and Transformers', and against formulas.

How they act inside a filter (eager = SDPA, gradients, caches) is in ``test_filter_attention`` and its siblings.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from hf_imgproc_attn.models.kernel_position import ClassTokens, check_coordinates, features_or_bias, position_logits
from hf_imgproc_attn.models.kernel_relative import (
    AlibiPositions,
    BucketPositions,
    alibi_slopes,
    bucket_boundaries,
    relative_buckets,
)
from hf_imgproc_attn.models.kernel_rotary import rotate
from tests.models.helpers import make_filter

EXACT = {"rtol": 0, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(length: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + length).double().view(1, -1, 1)


# --------------------------------------------------------------------------------------------------------------------
# ALiBi
# --------------------------------------------------------------------------------------------------------------------


def slopes_of_the_paper(count: int) -> list[float]:
    """``get_slopes`` of the authors' repository, in its own words."""

    def get_slopes_power_of_2(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        ratio = start
        return [start * ratio**i for i in range(n)]

    if math.log2(count).is_integer():
        return get_slopes_power_of_2(count)
    closest_power_of_2 = 2 ** math.floor(math.log2(count))
    return (
        get_slopes_power_of_2(closest_power_of_2)
        + slopes_of_the_paper(2 * closest_power_of_2)[0::2][: count - closest_power_of_2]
    )


@pytest.mark.parametrize("heads", [*range(1, 26), 32, 40, 96])
def test_alibi_slopes_are_those_of_the_paper(heads: int) -> None:
    assert alibi_slopes(heads) == pytest.approx(slopes_of_the_paper(heads), rel=1e-12)


def alibi(
    places: torch.Tensor,
    *,
    queries: int | None = None,
    is_causal: bool = True,
    contiguous: bool = False,
    class_tokens: ClassTokens | None = None,
) -> AlibiPositions:
    slopes = alibi_slopes(3)
    new = places if queries is None else places[:, -queries:]
    tensor = torch.tensor(slopes, dtype=places.dtype).view(-1, 1, 1)
    return AlibiPositions(new, places, tensor, class_tokens, max(slopes), is_causal, contiguous)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [7, 2000])
def test_alibi_columns_are_the_bias_below_the_diagonal(length: int, dtype: torch.dtype) -> None:
    """Up to a constant a row; in half precision the split columns keep more than 20 bits of m j."""
    places = line(length, -37).to(torch.promote_types(dtype, torch.float32))
    positions = alibi(places, contiguous=True)
    left, right, _ = positions.grid_columns(dtype)
    assert left.dtype == right.dtype == dtype
    got = left.double() @ right.double().mT
    dense = positions._replace(
        coordinates=places.double(), key_coordinates=places.double(), slopes=positions.slopes.double()
    ).grid_logits(torch.float64)
    error = (got - dense - (got - dense)[..., :1]).tril()
    assert error.abs().max() <= (1e-9 if dtype == torch.float64 else length * 2.0**-21)


def test_which_form_alibi_takes() -> None:
    """Columns where the distance is linear in the key's position, an additive bias everywhere else."""
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(2)).double().unsqueeze(0)
    jumping, repeated = torch.tensor([[0.0, 3, 2]]).unsqueeze(-1), torch.tensor([[0.0, 0, 0, 1, 2]]).unsqueeze(-1)
    class_tokens = ClassTokens(1, torch.zeros(3, 3))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert features_or_bias(alibi(line(9), contiguous=True), dtype) == "features"
        assert features_or_bias(alibi(line(9)), dtype) == "features"
        assert features_or_bias(alibi(repeated), dtype) == "features", "left padding repeats the first position"
        assert features_or_bias(alibi(jumping), dtype) == "bias"
        assert features_or_bias(alibi(line(9), is_causal=False), dtype) == "bias"
        assert features_or_bias(alibi(line(9), queries=1), dtype) == "bias", "one query is not worth a look"
        assert features_or_bias(alibi(grid, is_causal=True), dtype) == "bias"
        assert features_or_bias(alibi(line(9), class_tokens=class_tokens), dtype) == "bias"
        assert features_or_bias(alibi(line(300_000), contiguous=True), dtype) == "bias", "digits of m j"


def test_alibi_is_euclidean_on_a_grid() -> None:
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(5)).double().unsqueeze(0)
    logits = position_logits(alibi(grid, is_causal=False), torch.float64)
    assert logits[0, 1, 0, 19] == pytest.approx(-alibi_slopes(3)[1] * 5.0)  # rows 0 to 3, columns 0 to 4
    torch.testing.assert_close(logits, logits.mT, rtol=0, atol=0)
    assert (logits.diagonal(dim1=-2, dim2=-1) == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------------------------

BUCKETS = [(32, 128), (8, 20), (4, 5), (64, 1000), (12, 100), (128, 300), (4096, 2**20)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("count", "max_distance"), BUCKETS)
def test_buckets_are_those_of_t5(
    count: int, max_distance: int, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also far beyond the last one. Exactly on a boundary T5's float32 logarithm may round down."""
    one_way = count // 2 if bidirectional else count
    reach = torch.arange(-2500, 2501)
    boundaries = bucket_boundaries(one_way, max_distance)
    assert len(boundaries) == one_way - 1
    assert boundaries == sorted(boundaries)
    got = relative_buckets(reach.double(), boundaries, bidirectional)
    with monkeypatch.context() as context:  # as core operators, in an exported graph
        context.setattr(torch.compiler, "is_exporting", lambda: True)
        assert torch.equal(relative_buckets(reach.double(), boundaries, bidirectional), got)
    wanted = T5Attention._relative_position_bucket(
        reach, bidirectional=bidirectional, num_buckets=count, max_distance=max_distance
    )
    differs = got != wanted
    exact = one_way // 2
    for distance in reach[differs].abs().tolist():
        place = math.log(distance / exact) / math.log(max_distance / exact) * (one_way - exact)
        assert abs(place - round(place)) < 1e-5, "not on a boundary"
    assert (got - wanted)[differs].eq(1).all()
    assert got.min() >= 0
    assert got.max() < count


def test_boundaries_are_exact_integers() -> None:
    """8 (128 / 8)^(k / 8): 16, 32 and 64 are powers and lie in the bucket that they open."""
    boundaries = bucket_boundaries(16, 128)
    assert boundaries[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert boundaries[8:] == [12, 16, 23, 32, 46, 64, 91]
    assert relative_buckets(torch.tensor([-64.0, 64.0]), boundaries, True).tolist() == [14, 30]


def test_one_axis_each_and_their_sum() -> None:
    """Every offset of rows and columns has its own two entries; nothing is shared between heads or axes."""
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4)).double().unsqueeze(0)
    table, boundaries = random(3, 2, 8), bucket_boundaries(4, 9)
    logits = BucketPositions(grid, grid, table, None, boundaries, True).grid_logits(torch.float64)
    for i in range(12):
        for j in range(12):
            rows, columns = (grid[0, j] - grid[0, i]).tolist()
            expected = sum(
                table[:, axis, relative_buckets(torch.tensor(offset), boundaries, True)]
                for axis, offset in enumerate((rows, columns))
            )
            torch.testing.assert_close(logits[0, :, i, j], expected, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# Rotary
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary_of_text_is_transformers(base: float) -> None:
    states, places = random(2, 3, 7, 8), line(7, -3)
    frequencies = base ** (-torch.arange(0, 8, 2).double() / 8)
    angles = torch.cat((places * frequencies, places * frequencies), dim=-1)
    wanted, _ = apply_rotary_pos_emb(states, states, angles.cos(), angles.sin())
    torch.testing.assert_close(rotate(states, places, base), wanted, **EXACT)


def test_axial_rotary_turns_each_half_by_its_axis() -> None:
    states = random(2, 3, 6, 8)
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(2)).double().unsqueeze(0)
    got = rotate(states, grid, 100.0)
    for axis, half in enumerate((slice(0, 4), slice(4, 8))):
        torch.testing.assert_close(
            got[..., half], rotate(states[..., half], grid[..., axis : axis + 1], 100.0), **EXACT
        )


@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_keeps_norms_and_sees_differences_alone(axes: int) -> None:
    query, key, places = random(1, 2, 6, 8), random(1, 2, 6, 8, seed=1), random(1, 6, axes, seed=2).mul(9).round()
    turned = [rotate(states, places, 10000.0) for states in (query, key)]
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm(dim=-1), **EXACT)
    shifted = [rotate(states, places + 1000, 10000.0) for states in (query, key)]
    torch.testing.assert_close(shifted[0] @ shifted[1].mT, turned[0] @ turned[1].mT, rtol=0, atol=1e-11)
    assert (turned[0] @ turned[1].mT - query @ key.mT).abs().max() > 1


def test_class_tokens_are_not_turned() -> None:
    states, places = random(1, 2, 5, 4), line(5, 3)
    got = rotate(states, places, 10000.0, num_class_tokens=2)
    assert torch.equal(got[:, :, :2], states[:, :, :2])
    torch.testing.assert_close(got[:, :, 2:], rotate(states, places, 10000.0)[:, :, 2:], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_far_positions_turn_as_exactly_as_near_ones(dtype: torch.dtype) -> None:
    """Angles of a hundred thousand radians keep their digits."""
    states, places = random(1, 2, 8, 8).to(dtype), line(8, 100_000)
    exact = rotate(states.double(), places, 10000.0)
    got = rotate(states, places.float(), 10000.0)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps


# --------------------------------------------------------------------------------------------------------------------
# Coordinates
# --------------------------------------------------------------------------------------------------------------------

GRID = torch.cartesian_prod(torch.arange(3), torch.arange(2)).unsqueeze(0)


@pytest.mark.parametrize(
    ("given", "axes", "message"),
    [
        (line(6)[0], 1, r"coordinates must have shape \(2, 6, 1\) or \(1, 6, 1\) .*got \(6, 1\)"),
        (line(6)[..., 0], 1, r"got \(1, 6\)"),
        (line(5), 1, r"got \(1, 5, 1\)"),
        (line(6).expand(3, -1, -1), 1, r"got \(3, 6, 1\)"),
        (line(6), 2, r"coordinates must have shape \(2, 6, 2\) .*got \(1, 6, 1\)"),
        (GRID, 1, r"got \(1, 6, 2\)"),
        (GRID[:, :5], 2, r"got \(1, 5, 2\)"),
        (line(6).bfloat16(), 1, r"not be of half precision, got .*bfloat16"),
        (line(6).index_fill(1, torch.tensor([2]), float("nan")), 1, r"must be finite, got inf or nan"),
        (line(6).index_fill(1, torch.tensor([5]), float("inf")), 1, r"must be finite"),
        (line(6) * 2, 1, r"must fill it, got 6 places on a grid of 11"),
        (torch.cat((GRID[:, :5], GRID[:, :1] + 7), dim=1), 2, r"must fill it, got 6 places on a grid of 8 x 8"),
        (line(6).flip(1), 1, r"must be in order, got them unsorted"),
        (GRID.flip(1), 2, r"must be in order"),
    ],
)
def test_coordinates_of_no_grid_are_one_clear_error(given: torch.Tensor, axes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_coordinates(given, 2, 6, axes, contiguous=True)


def test_coordinates_of_a_grid_are_taken() -> None:
    for rows in (1, 2):
        check_coordinates(line(6).expand(rows, -1, -1), 2, 6, 1, contiguous=True)
        check_coordinates(GRID.expand(rows, -1, -1), 2, 6, 2, contiguous=True)
    check_coordinates(line(6) * 2, 2, 6, 1, contiguous=False)
    class_first = torch.cat((torch.full((1, 1, 2), 99), GRID), dim=1)
    check_coordinates(class_first, 2, 7, 2, num_class_tokens=1, contiguous=True)


@pytest.mark.parametrize("kernel", ["gaussian", "alibi", "relative_buckets", "rotary"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_kernel_refuses_them(kernel: str, implementation: str) -> None:
    layer = make_filter("dot_product", kernel, head_dim=6)
    query, key, value = (random(2, 3, 6, 6, seed=seed) for seed in range(3))
    options: dict[str, Any] = {"implementation": implementation}
    for wrong in (line(5), line(6).expand(1, 6, 2), line(6) * float("inf")):
        with pytest.raises(ValueError, match="coordinates must"):
            layer(query, key, value, coordinates=wrong, **options)
    with pytest.raises(ValueError, match="must fill it"):
        layer(query, key, value, coordinates=line(6) * 3, contiguous=True, **options)
