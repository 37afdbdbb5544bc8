"""Every number of a report in one place, for the page and the docs: its title, what it is, and how to read it."""

from __future__ import annotations

from typing import NamedTuple


class Definition(NamedTuple):
    """Of one number. formula: in text. reading: what is large and what is small."""

    title: str
    formula: str
    reading: str


DEFINITIONS: dict[str, Definition] = {
    "entropy_share": Definition(
        "entropy / uniform",
        "mean over rows of −Σⱼ Aᵢⱼ log Aᵢⱼ, divided by log of the number of keys that the row sees; a row that does "
        "not sum to 1 (sinks, sigmoid, softpick) is divided by its sum first",
        "1: the head averages everything; 0: it copies one token",
    ),
    "logit_std": Definition(
        "std of logits",
        "root mean over rows of the variance of the logits over the keys that the row sees",
        "0: a plain mean; above 5: nearly a choice of one token",
    ),
    "content_bandwidth": Definition(
        "content bandwidth",
        "h with 2/h² = s · mean|q| · mean|k|, s the factor on q·k: the bandwidth between directions on the unit "
        "sphere",
        "directions of unit vectors are at most 2 apart: above 2 content hardly counts, below 0.3 it selects",
    ),
    "position_bandwidth": Definition(
        "position bandwidth",
        "√(2 m / axes), m the mean over rows of Σⱼ Aᵢⱼ |pᵢ − pⱼ|² among tokens with a place: the Gaussian kernel with "
        "this second moment, in tokens or patches",
        "small: a local filter; near the length of the input: it looks everywhere",
    ),
    "sink_weight": Definition(
        "weight on sinks",
        "mean over the other tokens' rows of the weight on class and register tokens, of a text on its first token",
        "near 1: the head has nothing to say for most tokens",
    ),
    "sink_value_ratio": Definition(
        "norm of the sinks' values",
        "mean |v| of those tokens divided by the mean |v| of the others",
        "near 0: weight on the sink adds nothing, the head is off",
    ),
    "received_most": Definition(
        "most received",
        "the largest entry of Aᵀ1, mean over samples: how much all rows together take from one token",
        "1: every token is used alike; the number of tokens: all take from one",
    ),
    "method_noise": Definition(
        "method noise",
        "|V − p(A) V|² / |V|², p(A) what multiplies the values V (A, or what a booster makes of it)",
        "0: the filter changes nothing; what it removes (Buades 2005)",
    ),
    "learned": Definition(
        "its ...",
        "what the layer's own filter holds: its bandwidths h_y (content) and h_p (position), gains and the like",
        "compare h_y and h_p with the bandwidths that are measured",
    ),
    "shares": Definition(
        "shares of the logits' variance",
        "covariance of each term ⟨qᵃ, kᵇ⟩ with the logits within rows, over their variance; query and key are split "
        "into constant, position, content and rest by means over the batch",
        "they add up to 1; cross terms are what a bilateral filter does not have; rest is context",
    ),
    "exact_shares": Definition(
        "exact shares, first layer",
        "the same with token and position passed through the first norm separately, whose statistics are kept",
        "without a rest: the expansion of the paper",
    ),
    "similarity": Definition(
        "similarity",
        "mean cosine of two different tokens of a sample",
        "near 1: over-smoothed, all tokens point the same way",
    ),
    "high_frequency": Definition(
        "high frequency",
        "|X − mean|² / |X|², the energy orthogonal to constants",
        "near 0: only the mean of the tokens is left",
    ),
    "stable_rank": Definition(
        "stable rank", "|X|²_F / |X|²₂", "1: all tokens are multiples of one vector (rank collapse)"
    ),
    "noise": Definition(
        "signal to noise",
        "10 log₁₀ of the energy of the clean run over that of the difference a noisy input makes",
        "above the line before: this step removes noise",
    ),
    "predicted_gain": Definition(
        "predicted gain",
        "20 log₁₀ |(1+α)/(1+β)| with α = ⟨f(s), s⟩/|s|², β = ⟨f(s+n) − f(s), n⟩/|n|², f what attention adds to the "
        "stream (proposition III.1)",
        "what the proposition promises if f(s) = αs and the answer to noise is βn exactly",
    ),
    "eigenvalues": Definition(
        "eigenvalues",
        "of A, and of the operator p(A)",
        "inside the unit circle A can only smooth; outside the operator amplifies",
    ),
    "radius": Definition(
        "radius",
        "largest |eigenvalue| on what is orthogonal to constants",
        "contrast between tokens shrinks by it with each application",
    ),
    "gain": Definition(
        "largest gain", "largest singular value there", "above 1: some contrast is amplified in one application"
    ),
    "effective_rank": Definition(
        "effective rank", "exp of the entropy of the normalised singular values", "how many directions pass the filter"
    ),
}
