"""Measures of heads against their dense definitions, row by row, on asymmetric random weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_imgproc_attn.lens.heads import HeadSums, Tokens, measure_heads
from hf_imgproc_attn.lens.rows import apply_filter_by_rows, apply_operator_by_rows, filter_rows, some_samples
from hf_imgproc_attn.lens.shares import (
    FOUR_TERMS,
    KERNEL,
    REMAINDER,
    decompose_by_means,
    mean_effects,
    variance_shares,
)
from hf_imgproc_attn.lens.spectrum import dense_spectrum, iterative_spectrum, layer_matrices, one_head
from hf_imgproc_attn.lens.tokens import measure_tokens
from hf_imgproc_attn.models.backend_call import Booster, Content, Difference, FilterCall
from hf_imgproc_attn.models.backend_reference import filter_logits, filter_matrix, reference_attention
from hf_imgproc_attn.models.boost_weights import LocalLinear
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.kernel_position import ClassTokens, GaussianPositions, UntiedPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions
from hf_imgproc_attn.models.visibility import Visibility, padding_visibility
from tests.models.test_blocked_memory import Memory

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 13, 5
GRID, SPECIAL = (4, 3), 1
REAL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
REAL[0, 10:] = False


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coordinates() -> torch.Tensor:
    grid = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in GRID))
    return torch.nn.functional.pad(grid, (0, 0, SPECIAL, 0))[None]


def make_call(kind: str) -> FilterCall:
    query, key, value = (
        noise(BATCH, heads, LENGTH, WIDTH, seed=seed) * 1.7 for seed, heads in ((1, HEADS), (2, 2), (3, 2))
    )
    visibility, content = Visibility(LENGTH, LENGTH), Content("dot_product", 0.6)
    positions: tuple[Any, ...] = ()
    per_head = torch.tensor([0.5, 1.0, 0.2, 2.0], dtype=torch.float64).view(-1, 1, 1)
    class_tokens = ClassTokens(SPECIAL, noise(HEADS, 3, seed=7))
    booster = Booster()
    if kind == "causal":
        visibility = Visibility(LENGTH, LENGTH, causal=True)
        booster = Booster("twicing", 3)
    elif kind == "padded":
        visibility = padding_visibility(REAL[:, None, None, :], LENGTH, causal=False)
        content = Content("gaussian", per_head)
        booster = Booster("learned", 2, per_head)
    elif kind == "padded and causal":
        mask = REAL[:, None, None, :] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        bias = noise(1, HEADS, LENGTH, LENGTH, seed=8)
        visibility = Visibility(LENGTH, LENGTH, causal=True, mask=mask, bias=bias)
        content = Content("elliptical", noise(BATCH, HEADS, LENGTH, WIDTH, seed=4).abs())
    elif kind == "gaussian places":
        at = coordinates()
        positions = (GaussianPositions(at, at, per_head, class_tokens, 1.0, False, True),)
    elif kind == "alibi":
        at = coordinates()
        positions = (AlibiPositions(at, at, per_head, None, 1.0, False, True),)
        booster = Booster("sos", 2)
    elif kind == "untied":
        vectors = noise(1, HEADS, LENGTH, WIDTH, seed=5), noise(1, HEADS, LENGTH, WIDTH, seed=6)
        positions = (UntiedPositions(*vectors, per_head, class_tokens),)
    elif kind == "delta":
        visibility = padding_visibility(REAL[:, None, None, :], LENGTH, causal=True)
        booster = Booster("delta", 1, torch.tanh(noise(BATCH, HEADS, LENGTH, 1, seed=10)))
    by_weights = None
    if kind == "local linear":
        visibility = Visibility(LENGTH, LENGTH, causal=True)
        by_weights = LocalLinear(noise(BATCH, HEADS, LENGTH, WIDTH, seed=7))
    call = FilterCall(query, key, value, content, visibility, positions, booster, by_weights=by_weights)
    if kind == "sink":
        return call._replace(sinks=per_head.flatten(), booster=Booster("twicing", 2))
    if kind == "sigmoid":
        gains = torch.stack((per_head, 1 - per_head))
        return call._replace(normalisation=Normalisation("sigmoid"), booster=Booster("inversion", 1, gains))
    if kind in ("softpick, padded", "sinkhorn, padded"):
        visibility = padding_visibility(REAL[:, None, None, :], LENGTH, causal=False)
        return call._replace(normalisation=Normalisation(kind.split(",")[0]), visibility=visibility)
    if kind == "differential":
        second = (noise(BATCH, HEADS, LENGTH, WIDTH, seed=seed) for seed in (11, 12))
        visibility = padding_visibility(REAL[:, None, None, :], LENGTH, causal=True)
        return call._replace(difference=Difference(*second, 0.7 * per_head), visibility=visibility)
    return call


KINDS = (
    *("local linear", "plain", "causal", "padded", "padded and causal", "gaussian places", "alibi", "untied"),
    *("sink", "sigmoid", "softpick, padded", "delta", "sinkhorn, padded", "differential"),
)


def dense(call: FilterCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, the logits, and what is seen, ``[batch, heads, length, length]``."""
    logits = filter_logits(call)
    allowed = call.visibility.allowed(logits.device)
    seen = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed.expand_as(logits)
    return filter_matrix(logits, call.visibility, call.sinks, call.normalisation), logits, seen


@pytest.mark.parametrize("scores", [1, 200, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_dense_filter(kind: str, scores: int) -> None:
    """However many rows are computed at a time; so is what is applied with them, and its transpose."""
    call = make_call(kind)
    matrix, _, _ = dense(call)
    got = torch.zeros_like(matrix)
    for rows in filter_rows(call, scores):
        got[..., rows.start : rows.stop, : rows.keys] = rows.weights
    torch.testing.assert_close(got, matrix, rtol=1e-12, atol=1e-14)
    columns = noise(BATCH, HEADS, LENGTH, 3, seed=9)
    torch.testing.assert_close(apply_filter_by_rows(call, columns, scores=scores), matrix @ columns)
    torch.testing.assert_close(
        apply_filter_by_rows(call, columns, transposed=True, scores=scores), matrix.mT @ columns
    )


@pytest.mark.parametrize("kind", KINDS)
def test_operator_by_rows_is_the_dense_one(kind: str) -> None:
    call = make_call(kind)
    operator = reference_attention(filter_logits(call), call, "operator")[1]
    assert operator is not None
    columns = noise(BATCH, HEADS, LENGTH, 3, seed=9)
    for scores in (200, 2**22):
        torch.testing.assert_close(apply_operator_by_rows(call, columns, scores=scores), operator @ columns)
        torch.testing.assert_close(
            apply_operator_by_rows(call, columns, transposed=True, scores=scores), operator.mT @ columns
        )


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_and_one_head_are_cut_out_of_a_call(kind: str) -> None:
    call = make_call(kind)
    matrix, _, _ = dense(call)
    part = one_head(some_samples(call, slice(1, 2)), 2)
    torch.testing.assert_close(dense(part)[0], matrix[1:, 2:3])
    operator = reference_attention(filter_logits(call), call, "operator")[1]
    own = reference_attention(filter_logits(part), part, "operator")[1]
    assert operator is not None
    torch.testing.assert_close(own, operator[1:, 2:3])


# --------------------------------------------------------------------------------------------------------------------
# Measures of heads
# --------------------------------------------------------------------------------------------------------------------


def by_definition(call: FilterCall, tokens: Tokens, head: int) -> dict[str, float | list[float]]:
    """Every measure of one head by loops over its rows."""
    matrices, logits, seen = (x[:, head] for x in dense(call))
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool) if tokens.real is None else tokens.real
    places = coordinates()[0] if tokens.grid else torch.arange(LENGTH)[:, None]
    off_grid = SPECIAL if tokens.grid else 0
    scale = call.content.scale
    factor = scale if isinstance(scale, float) else scale[head] if scale.ndim == 3 else scale[:, head]
    queries, keys = (call.query[:, head] * factor).norm(dim=-1), call.key[:, head // 2].norm(dim=-1)
    values = call.value[:, head // 2].norm(dim=-1)
    entropies, shares, variances, distances, sinks = [], [], [], [], []
    received = torch.zeros(LENGTH, dtype=torch.float64)
    special_values, other_values = [], []
    for b in range(BATCH):
        special = [j for j in range(LENGTH) if real[b, j]][: tokens.special]
        for i in range(LENGTH):
            if not real[b, i]:
                continue
            (special_values if i in special else other_values).append(float(values[b, i]))
            row = matrices[b, i]
            weight = float(row.sum())  # not 1 with sinks, sigmoid and softpick
            entropies.append(-sum(float(a) / weight * math.log(a / weight) for a in row if a > 0))
            number = int(seen[b, i].sum())
            if number > 1:
                shares.append(entropies[-1] / math.log(number))
            variances.append(float(logits[b, i][seen[b, i]].var(unbiased=False)))
            received += row
            if i not in special:
                sinks.append(float(row[special].sum()))
            if i >= off_grid:
                total = sum(float(row[j]) for j in range(off_grid, LENGTH))
                moment = sum(
                    float(row[j]) * float((places[i] - places[j]).double().square().sum())
                    for j in range(off_grid, LENGTH)
                )
                if total > 0:
                    distances.append(moment / total)

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers)

    squared = mean(distances)
    return {
        "entropy": mean(entropies),
        "entropy_share": mean(shares),
        "logit_std": math.sqrt(mean(variances)),
        "content_bandwidth": math.sqrt(2 / (float(queries[real].mean()) * float(keys[real].mean()))),
        "mean_distance_sq": squared,
        "position_bandwidth": math.sqrt(2 * squared / places.shape[1]),
        "received": (received / BATCH).tolist(),
        "sink_weight": mean(sinks),
        "sink_value_ratio": mean(special_values) / mean(other_values),
    }


@pytest.mark.parametrize("scores", [60, 10**6])
@pytest.mark.parametrize("grid", [None, GRID], ids=["line", "grid"])
@pytest.mark.parametrize("kind", KINDS)
def test_measures_of_heads_are_their_definitions(kind: str, grid: tuple[int, int] | None, scores: int) -> None:
    call = make_call(kind)
    tokens = Tokens(REAL if "padded" in kind else None, special=2 if grid is None else SPECIAL, grid=grid)
    got = measure_heads(call, tokens, scores)
    for head in range(HEADS):
        wanted = by_definition(call, tokens, head)
        assert set(wanted) == set(HeadSums._fields)
        for name, value in wanted.items():
            measured = getattr(got, name)[head].tolist()
            assert measured == pytest.approx(value, rel=1e-10, abs=1e-12), name


def test_bandwidths_of_a_gaussian_kernel_are_its_own() -> None:
    """Equal content, a wide grid: the second moment gives h_p back."""
    length, h = 401, 9.0
    at = torch.arange(length, dtype=torch.float64)[None, :, None]
    scale = torch.full((1, 1, 1), 2 / h**2, dtype=torch.float64)
    flat = torch.ones(1, 1, length, 2, dtype=torch.float64)
    positions = (GaussianPositions(at, at, scale, None, h, False, True),)
    call = FilterCall(flat, flat, flat, Content("dot_product", 2 / 4.0**2), Visibility(length, length), positions)
    far_from_the_border = (at[..., 0] > 100) & (at[..., 0] < 300)
    sums = measure_heads(call, Tokens(far_from_the_border))
    assert float(sums.position_bandwidth) == pytest.approx(h, rel=1e-6)
    # Vectors of norm sqrt(2): h on the unit sphere is h_y / sqrt(2).
    assert float(sums.content_bandwidth) == pytest.approx(4.0 / math.sqrt(2), rel=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Kernel decomposition
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [60, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_covariances_with_the_logits(kind: str, scores: int) -> None:
    call = make_call(kind)
    real = REAL if "padded" in kind else None
    types = torch.randint(0, 4, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    got = decompose_by_means(call, types, real, scores)
    keys = call.key.repeat_interleave(2, dim=1)
    query_parts, key_parts = mean_effects(call.query, types, real), mean_effects(keys, types, real)
    _, logits, seen = dense(call)
    if real is not None:
        seen = seen & real[:, None, :, None]
    scale = call.content.scale
    for head in range(HEADS):
        covariances: dict[str, float] = dict.fromkeys(got, 0.0)
        total = 0.0
        for b in range(BATCH):
            for i in range(LENGTH):
                visible = seen[b, head, i]
                if not visible.any():
                    continue
                row = logits[b, head, i][visible]
                row = row - row.mean()
                total += float(row.square().sum())
                for name in got:
                    if name in (KERNEL, REMAINDER):
                        continue
                    a, _, c = name.partition("-")
                    factor = scale if isinstance(scale, float) else scale.expand(BATCH, HEADS, -1, -1)[b, head]
                    factor = factor if isinstance(factor, float) or len(factor) == 1 else factor[i]
                    term = ((query_parts[a][b, head, i] * factor) * key_parts[c][b, head]).sum(-1)[visible]
                    covariances[name] += float(((term - term.mean()) * row).sum())
        for name, value in covariances.items():
            if name not in (KERNEL, REMAINDER):
                assert got[name][head] == pytest.approx(value / total, rel=1e-9, abs=1e-11), name
        assert sum(values[head] for values in got.values()) == pytest.approx(1.0, abs=1e-12)
        if call.content.kernel == "dot_product" and call.visibility.bias is None:
            assert abs(got[REMAINDER][head]) < 1e-10
    assert (KERNEL in got) == bool(call.positions)
    assert set(FOUR_TERMS) <= set(got)


def test_mean_effects_of_a_projection_are_the_projected_mean_effects() -> None:
    """Which is why queries may be decomposed in place of the attention's input."""
    x, weight = noise(5, 1, 7, 6, seed=1), noise(6, 4, seed=2)
    types = torch.randint(0, 3, (5, 7), generator=torch.Generator().manual_seed(3))
    real = torch.ones(5, 7, dtype=torch.bool)
    real[2, 4:] = False
    of_input, of_output = mean_effects(x, types, real), mean_effects(x @ weight + 1.5, types, real)
    for name in ("position", "content", "rest"):
        torch.testing.assert_close(of_output[name], of_input[name] @ weight)
    torch.testing.assert_close(of_output["constant"], of_input["constant"] @ weight + 1.5)


def test_mean_effects_find_the_parts_that_tokens_are_made_of() -> None:
    """All types at all places equally often, and no interaction: the parts come back exactly, without a rest."""
    position, content = noise(1, 1, 6, 4, seed=1), noise(6, 4, seed=2)
    types = torch.stack([torch.arange(6).roll(shift) for shift in range(6)])
    x = position + content[types][:, None]
    parts = mean_effects(x, types)
    assert parts["rest"].abs().max() < 1e-12
    torch.testing.assert_close(parts["position"][0, 0], (position - position.mean(-2, keepdim=True))[0, 0])
    torch.testing.assert_close(parts["content"][:, 0], (content - content.mean(0))[types])


def test_one_kernel_alone_has_all_of_the_variance() -> None:
    call = make_call("plain")
    zero = torch.zeros_like(call.query)
    keys = call.key.repeat_interleave(2, dim=1)
    got = variance_shares(call, {"content": call.query, "position": zero}, {"content": keys, "position": zero})
    assert got["content-content"] == pytest.approx([1.0] * HEADS)
    assert got["position-content"] == got["content-position"] == [0.0] * HEADS


def test_a_single_sample_cannot_be_decomposed() -> None:
    call = some_samples(make_call("plain"), slice(0, 1))
    with pytest.raises(ValueError, match="mean effects need at least 2 samples, got 1"):
        decompose_by_means(call, None)


# --------------------------------------------------------------------------------------------------------------------
# Spectra
# --------------------------------------------------------------------------------------------------------------------


def test_spectrum_of_a_known_matrix() -> None:
    """Constants keep; on what is orthogonal to them a rotation by 90 degrees, shrunk to 0.6, and nothing else."""
    basis = torch.linalg.qr(torch.cat((torch.ones(5, 1), noise(5, 4, seed=1).float()), dim=1).double())[0]
    core = torch.zeros(5, 5, dtype=torch.float64)
    core[0, 0] = 1.0
    core[1, 2], core[2, 1] = -0.6, 0.6
    core[0, 3] = 2.0  # not normal: it moves constants, and is no contrast
    found = dense_spectrum(basis @ core @ basis.T)
    assert found.eigenvalues[0] == pytest.approx((1.0, 0.0), abs=1e-7)
    assert sorted(pair[1] for pair in found.eigenvalues[1:3]) == pytest.approx([-0.6, 0.6])
    assert found.radius == pytest.approx(0.6)
    assert found.gain == pytest.approx(0.6)
    assert found.singular_values[:3] == pytest.approx([math.sqrt(5.0), 0.6, 0.6])
    assert found.stable_rank == pytest.approx((5.0 + 2 * 0.36) / 5.0)
    assert found.effective_rank is not None
    total = math.sqrt(5.0) + 1.2
    shares = [math.sqrt(5.0) / total, 0.6 / total, 0.6 / total]
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "alibi", "gaussian places"])
def test_iterative_spectrum_is_the_head_of_the_dense_one(kind: str) -> None:
    call = make_call(kind)
    matrices = layer_matrices(call)
    for boosted in (False, True):
        exact = dense_spectrum(matrices[int(boosted)][2])
        found = iterative_spectrum(call, 2, boosted=boosted, values=4)
        assert [abs(complex(*value)) for value in found.eigenvalues] == pytest.approx(
            [abs(complex(*value)) for value in exact.eigenvalues[:4]], rel=1e-8
        )
        assert found.singular_values == pytest.approx(exact.singular_values[:4], rel=1e-8)
        assert (found.radius, found.gain) == pytest.approx((exact.radius, exact.gain), rel=1e-8)
        assert not found.complete
        if not boosted:
            assert found.stable_rank == pytest.approx(exact.stable_rank, rel=1e-8)


def test_twicing_maps_the_spectrum_by_its_polynomial() -> None:
    call = make_call("plain")._replace(booster=Booster("twicing", 2))
    matrix, operator = (x[1] for x in layer_matrices(call))
    before, after = dense_spectrum(matrix), dense_spectrum(operator)
    wanted = [2 * value - value**2 for value in (complex(*pair) for pair in before.eigenvalues)]
    got = [complex(*pair) for pair in after.eigenvalues]
    for value in wanted:
        assert min(abs(value - other) for other in got) < 1e-8


def test_padding_is_left_out_of_matrices() -> None:
    call = make_call("padded")
    matrix, _ = layer_matrices(call, REAL)
    assert matrix.shape == (HEADS, 10, 10)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(HEADS, 10, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_memory_is_linear_in_the_length() -> None:
    """Of all measures of a causal, a bidirectional and a Gaussian head: a tenth of one matrix at 2,048 tokens."""
    peaks = []
    for length in (512, 2048):
        vectors = torch.randn(1, 1, length, 4)
        at = torch.arange(length).float().view(1, -1, 1)
        gaussian = GaussianPositions(at, at, torch.full((1, 1, 1), 0.1), None, 4.0, False, True)
        with Memory() as memory:
            for visibility, positions in (
                (Visibility(length, length, True), ()),
                (Visibility(length, length), (gaussian,)),
            ):
                call = FilterCall(vectors, vectors, vectors, Content("dot_product", 0.5), visibility, positions)
                measure_heads(call, Tokens(), scores=2**15)
                measure_tokens(vectors[0])
                apply_operator_by_rows(call._replace(booster=Booster("twicing", 2)), vectors, scores=2**15)
        peaks.append(memory.peak)
    assert peaks[1] < 2048 * 2048 * 4 / 10
    assert peaks[1] < 4 * peaks[0]
