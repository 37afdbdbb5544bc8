"""Similarity, high frequencies, ranks and noise of tokens against their dense definitions."""

from __future__ import annotations

import math

import pytest
import torch

from hf_imgproc_attn.lens.tokens import gains, measure_tokens, noise_ratio, side_by_side


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REAL = torch.ones(3, 9, dtype=torch.bool)
REAL[1, :4] = False


@pytest.mark.parametrize("width", [4, 20])
@pytest.mark.parametrize("real", [None, REAL], ids=["all", "padded"])
def test_measures_of_tokens_are_their_definitions(real: torch.Tensor | None, width: int) -> None:
    x = noise(3, 9, width) + noise(3, 1, width, seed=1)
    got = measure_tokens(x, real)
    similarities, energies, ranks = [], [], []
    for b in range(3):
        rows = x[b] if real is None else x[b][real[b]]
        pairs = [
            float(torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0))
            for i in range(len(rows))
            for j in range(len(rows))
            if i != j
        ]
        similarities.append(sum(pairs) / len(pairs))
        energies.append(float((rows - rows.mean(0)).square().sum() / rows.square().sum()))
        singular = torch.linalg.svdvals(rows)
        ranks.append(float(singular.square().sum() / singular[0].square()))
    assert got.similarity == pytest.approx(sum(similarities) / 3, rel=1e-12)
    assert got.high_frequency == pytest.approx(sum(energies) / 3, rel=1e-12)
    assert got.stable_rank == pytest.approx(sum(ranks) / 3, rel=1e-12)


def test_tokens_that_are_all_the_same() -> None:
    measured = measure_tokens(noise(2, 1, 6).expand(-1, 8, -1))
    assert measured.similarity == pytest.approx(1.0)
    assert measured.high_frequency == pytest.approx(0.0, abs=1e-12)
    assert measured.stable_rank == pytest.approx(1.0)


@pytest.mark.parametrize("real", [None, REAL], ids=["all", "padded"])
def test_ratio_of_signal_and_noise(real: torch.Tensor | None) -> None:
    clean, disturbance = noise(3, 9, 5, seed=2), 0.1 * noise(3, 9, 5, seed=3)
    measured = noise_ratio(torch.cat((clean, clean + disturbance)), real)
    keep = slice(None) if real is None else real
    wanted = clean[keep].norm() ** 2 / disturbance[keep].norm() ** 2
    assert measured.decibels == pytest.approx(10 * math.log10(float(wanted)), rel=1e-9)
    assert noise_ratio(torch.cat((clean, clean)), real).decibels == math.inf


@pytest.mark.parametrize("real", [None, REAL], ids=["all", "padded"])
def test_gain_that_the_proposition_predicts(real: torch.Tensor | None) -> None:
    """An attention that is exactly alpha s + beta n gains what it says (``test_propositions`` has the proposition)."""
    signal, disturbance = noise(3, 9, 5, seed=2), 0.1 * noise(3, 9, 5, seed=3)
    alpha, beta = 0.7, 0.05
    entering = torch.cat((signal, signal + disturbance))
    answer = torch.cat((alpha * signal, alpha * signal + beta * disturbance))
    found = gains(entering, entering + answer, real)
    assert found == pytest.approx((alpha, beta))
    before, after = noise_ratio(entering, real).decibels, noise_ratio(entering + answer, real).decibels
    assert after - before == pytest.approx(found.predicted_decibels, rel=1e-9)


def test_heads_stand_side_by_side() -> None:
    heads = noise(2, 3, 4, 5)
    assert torch.equal(side_by_side(heads)[1, 2], torch.cat([heads[1, head, 2] for head in range(3)]))
