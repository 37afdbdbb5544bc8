"""How alike tokens are, and what noise does to them, in memory linear in their number.

With X the tokens of one sample, ``[length, width]``, N of them real, x^ = x / |x|:

    similarity      ( |sum_i x^_i|^2 - N ) / (N (N - 1))     mean cosine similarity of two different tokens
    high_frequency  |X - 1 mean(X)|_F^2 / |X|_F^2            energy beside constants (Wang 2022, arXiv 2203.05962)
    stable_rank     |X|_F^2 / |X|_2^2                        (Rudelson, Vershynin 2007)

means over the samples of at least two tokens. They are 1, 0 and 1 where all tokens have become the same (Dong 2021,
arXiv 2103.03404).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenMeasures(NamedTuple):
    """Of the tokens at one place of a model, means over samples; NaN where no sample has two tokens."""

    similarity: float
    high_frequency: float
    stable_rank: float


def measure_tokens(tokens: torch.Tensor, real: torch.Tensor | None = None) -> TokenMeasures:
    """Measure tokens.

    Args:
        tokens: ``[batch, length, width]``.
        real: boolean ``[batch, length]``, False for padding; None: all are real.
    """
    found = []
    for sample, x in enumerate(tokens):
        x = (x if real is None else x[real[sample]]).double()
        number = x.shape[0]
        if number < 2:  # which has no other that it could be compared with
            continue
        norms = x.norm(dim=-1, keepdim=True)
        summed = (x / norms.clamp(min=torch.finfo(torch.float64).tiny)).sum(0).square().sum()
        energy = x.square().sum()
        smooth = number * x.mean(0).square().sum()
        small = x if x.shape[0] < x.shape[1] else x.mT  # the smaller Gram matrix
        largest = torch.linalg.eigvalsh(small @ small.mT)[-1]
        found.append(((summed - number) / (number * (number - 1)), 1.0 - smooth / energy, energy / largest))
    if not found:
        return TokenMeasures(*[float("nan")] * 3)
    means = torch.tensor([[float(value) for value in row] for row in found], dtype=torch.float64).mean(0).tolist()
    return TokenMeasures(*means)


def side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, length, d]`` to ``[batch, length, heads * d]``."""
    return heads.transpose(1, 2).flatten(2)


class NoiseRatio(NamedTuple):
    """Energies of a signal and of the noise in it; ratios are of energies."""

    signal: float
    noise: float

    @property
    def decibels(self) -> float:
        """10 log10 (|s|^2 / |n|^2)."""
        if self.noise == 0.0:
            return float("inf")
        return float(10.0 * torch.tensor(self.signal / self.noise, dtype=torch.float64).log10())


def noise_ratio(pairs: torch.Tensor, real: torch.Tensor | None = None) -> NoiseRatio:
    """Signal and noise of tokens that were computed twice.

    Args:
        pairs: ``[2 * batch, length, width]``: the clean samples, then the same with noise in the model's input.
        real: boolean ``[batch, length]`` or None.
    """
    signal, noise = _signal_and_noise(pairs, real)
    return NoiseRatio(float(signal.square().sum()), float(noise.square().sum()))


def _signal_and_noise(pairs: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    clean, noisy = pairs.double().chunk(2)
    if real is not None:
        clean, noisy = clean[real], noisy[real]
    return clean, noisy - clean


class Gains(NamedTuple):
    """How an attention's contribution f to the residual stream answers to signal and to noise, and what follows.

    With x = s + n what enters a block and f(s + n) - f(s) its answer to the noise: alpha = <f(s), s> / |s|^2 and
    beta = <f(s + n) - f(s), n> / |n|^2, least squares of f(s) = alpha s and of the answer = beta n. Were f exactly
    that, the signal-to-noise ratio would gain ((1 + alpha) / (1 + beta))^2 (proposition III.1 of arXiv 2506.10371).
    """

    alpha: float
    beta: float

    @property
    def predicted_decibels(self) -> float:
        """20 log10 |(1 + alpha) / (1 + beta)|."""
        ratio = abs(1.0 + self.alpha) / max(abs(1.0 + self.beta), 1e-300)
        return float(20.0 * torch.tensor(ratio, dtype=torch.float64).log10())


def gains(entering: torch.Tensor, after_residual: torch.Tensor, real: torch.Tensor | None = None) -> Gains:
    """alpha and beta of one block; arguments as of :func:`noise_ratio`."""
    signal, noise = _signal_and_noise(entering, real)
    answer, noise_answer = _signal_and_noise(after_residual - entering, real)
    energies = (signal.square().sum(), noise.square().sum())
    return Gains(float((answer * signal).sum() / energies[0]), float((noise_answer * noise).sum() / energies[1]))
