"""Every number of a report in one place, for the page and the docs: its title, what it is, and how to read it.

``python -m hf_imgproc_attn.lens.definitions`` prints the tables of docs/lens.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..cards.filters import MEANINGS
from ..markdown_tables import table_text


class Definition(NamedTuple):
    """Of one number, or of a word that stands beside numbers.

    title: what it is called on the page. formula: in text. reading: what is large and what is small. source: where it
    is from.
    """

    title: str
    formula: str
    reading: str = ""
    source: str = ""


GROUPS: dict[str, dict[str, Definition]] = {
    "The input": {
        "parameters": Definition("parameters", "numbers that the model has learned, all of them"),
        "samples": Definition("samples", "texts or images that it was shown"),
        "length": Definition("tokens", "tokens of each sample, with class and register tokens and padding"),
        "axes": Definition("axes", "of the places of tokens", "1: a text; 2: an image"),
        "grid": Definition("grid", "rows and columns of an image's patches"),
        "special": Definition(
            "special tokens", "leading tokens that are no patches (class, registers); of a text 1, its first token"
        ),
        "token": Definition("chosen token", "whose maps are shown: its number in the first sample, from 0"),
        "report.noise": Definition(
            "noise put in", "its standard deviation, as a share of that of the images or the embedded tokens"
        ),
        "seconds": Definition(
            "time", "of the model alone (model), of the measuring on top of it (lens), of the run with noise (noise)"
        ),
    },
    "Places and operators": {
        "index": Definition("layer", "number of the layer in its stack, from 0"),
        "head": Definition("head", "number of the head in its layer, from 0"),
        "filter_spectrum": Definition(
            "A", "the filter of a head: row i holds the weights with which token i averages the values of all tokens"
        ),
        "operator_spectrum": Definition("p(A)", "what multiplies the values V: A, or what a booster makes of it"),
        "entering": Definition("entering", "tokens as a block is given them"),
        "values": Definition("values", "the values V, with the heads side by side"),
        "filtered": Definition("filtered", "p(A) V, likewise"),
        "after_residual": Definition(
            "after residual", "the sum of both, where the second half of the block reads; behind the norm in BERT"
        ),
        "leaving": Definition("leaving", "tokens as the block returns them"),
    },
    "Heads": {
        "entropy_share": Definition(
            "entropy / uniform",
            "mean over rows that see two keys or more of −Σⱼ Aᵢⱼ log Aᵢⱼ, divided by log of the number of keys that "
            "the row sees; a row that does not sum to 1 (sinks, sigmoid, softpick) is divided by its sum first",
            "1: the head averages everything; 0: it copies one token",
            "Shannon 1948",
        ),
        "entropy": Definition("entropy", "the same in nats, not divided, over all rows", "", "Shannon 1948"),
        "logit_std": Definition(
            "std of logits",
            "root of the mean over rows of the variance of the logits over the keys that the row sees: their scale, "
            "as far as the softmax notices it",
            "0: a plain mean; above 5: nearly a choice of one token",
        ),
        "content_bandwidth": Definition(
            "content bandwidth",
            "h with 2/h² = s · mean|q| · mean|k|, s the factor on q·k: exp(s q·k) is exp(−|q̂ − k̂|²/h²) on unit "
            "vectors, up to a constant a row",
            "directions of unit vectors are at most 2 apart: above 2 content hardly counts, below 0.3 it selects",
            "arXiv 2506.10371: bilateral filter on normalised vectors",
        ),
        "position_bandwidth": Definition(
            "position bandwidth",
            "√(2 m / axes), m the mean over rows of Σⱼ Aᵢⱼ |pᵢ − pⱼ|² among tokens with a place: the Gaussian kernel "
            "exp(−d²/h²) with this second moment, in tokens or patches",
            "small: a local filter; near the length of the input: it looks everywhere",
            "Tomasi, Manduchi 1998",
        ),
        "distance": Definition("distance", "√m of the same m, in tokens or patches", "how far the head looks"),
        "sink_weight": Definition(
            "weight on sinks",
            "mean over the other tokens' rows of the weight on class and register tokens, of a text on its first "
            "token",
            "near 1: the head has nothing to say for most tokens",
            "Xiao 2023, arXiv 2309.17453; Darcet 2023, arXiv 2309.16588",
        ),
        "sink_value_ratio": Definition(
            "norm of the sinks' values",
            "mean |v| of those tokens divided by the mean |v| of the others",
            "near 0: weight on the sink adds nothing, the head is off",
            "arXiv 2309.17453",
        ),
        "received": Definition("received", "Aᵀ1, mean over samples: how much all rows together take from each token"),
        "received_most": Definition(
            "most received",
            "the largest entry of that",
            "1: every token is used alike; the number of tokens: all take from one",
        ),
        "received_most_at": Definition("most received, where", "the token of which that is, from 0"),
        "method_noise": Definition(
            "method noise",
            "|V − p(A) V|² / |V|²",
            "0: the filter changes nothing; it is the share that it removes",
            "Buades 2005",
        ),
        "method_noise_map": Definition(
            "removed", "|vᵢ − (p(A) V)ᵢ| of each token of the first sample", "large: lost detail", "Buades 2005"
        ),
        "learned": Definition(
            "its ...",
            "what the layer's own filter holds: its bandwidths h_y (content) and h_p (position), gains and the like",
            "compare h_y and h_p with the bandwidths that are measured",
        ),
    },
    "What the logits are made of": {
        "shares": Definition(
            "share of the logits' variance",
            "query and key are sums of parts, so that logits are a sum of terms: the covariance of a term with the "
            "logits within rows, over their variance. Parts are told apart by means over the batch (mean effects)",
            "they add up to 1; negative: the term works against the others",
        ),
        "exact_shares": Definition(
            "exact",
            "the same of the first layer of models that add a table of positions (GPT-2, ViT): token and position "
            "pass the first norm separately, whose statistics are those of their sum",
            "without a residual: the expansion of the paper",
            "arXiv 2506.10371",
        ),
        "content-content": Definition("content-content", "what the query's token is with what the key's token is"),
        "position-position": Definition("position-position", "where the query is with where the key is"),
        "content-position": Definition(
            "content-position", "what the query's token is with where the key is", "a bilateral filter has none"
        ),
        "position-content": Definition(
            "position-content", "where the query is with what the key's token is", "a bilateral filter has none"
        ),
        "constant-content": Definition(
            "constant-content", "the mean of all queries with what the key's token is", "tokens that all look at"
        ),
        "constant-position": Definition(
            "constant-position", "the mean of all queries with where the key is", "places that all look at"
        ),
        "residual": Definition(
            "residual", "any term with the rest that words and places do not explain", "context", "Song, Zhong 2023"
        ),
        "position kernel": Definition(
            "position kernel", "what a position kernel or bias adds to the logits, as it is", "of bilateral models"
        ),
        "other": Definition("other", "what no product of parts has, such as the norms of keys in a Gaussian kernel"),
    },
    "Maps": {
        "content": Definition("content", "the weights if positions counted for nothing"),
        "position": Definition("position", "the weights if only positions counted"),
        "product": Definition("product", "the row of A: what the chosen token receives from where"),
        "operator": Definition("operator", "the row of p(A), where the layer has a booster", "negative: it sharpens"),
    },
    "Tokens by depth": {
        "similarity": Definition(
            "similarity",
            "mean cosine of two different tokens of a sample",
            "near 1: over-smoothed, all tokens point the same way",
            "Dong 2021, arXiv 2103.03404",
        ),
        "high_frequency": Definition(
            "high frequency",
            "|X − 1x̄|²/|X|²: the energy that is orthogonal to constants",
            "near 0: only the mean of the tokens is left",
            "Wang 2022, arXiv 2203.05962",
        ),
        "stable_rank": Definition(
            "stable rank",
            "|X|²_F/|X|²₂, X the tokens of a sample; of a spectrum that of A or p(A)",
            "1: all tokens are multiples of one vector (rank collapse)",
            "Rudelson, Vershynin 2007",
        ),
    },
    "Noise": {
        "noise": Definition(
            "signal to noise",
            "10 log₁₀ |s|²/|n|² in dB, s the clean run and n what the noisy one differs by, at each place",
            "above the place before: this step removes noise",
        ),
        "gain, dB": Definition(
            "gain, dB",
            "the difference of two of these: filtered less values (filter), after residual less entering (attention "
            "with its residual), leaving less entering (whole block)",
            "above 0: noise is removed",
        ),
        "alpha": Definition(
            "alpha",
            "⟨f(s), s⟩/|s|², f what the attention adds to the stream",
            "how much of the signal it adds",
            "arXiv 2506.10371, proposition III.1",
        ),
        "beta": Definition(
            "beta",
            "⟨f(s + n) − f(s), n⟩/|n|²",
            "how much of the noise it adds",
            "arXiv 2506.10371, proposition III.1",
        ),
        "predicted_gain": Definition(
            "predicted gain",
            "20 log₁₀ |(1 + α)/(1 + β)| in dB: what the residual connection gains if f(s) = αs and the answer to the "
            "noise is βn (the dotted line, proposition III.1)",
            "what the proposition promises",
            "arXiv 2506.10371, proposition III.1",
        ),
    },
    "Spectra": {
        "eigenvalues": Definition(
            "eigenvalues",
            "of the matrix, in the complex plane, by falling absolute value",
            "inside the unit circle A can only smooth; outside it the operator amplifies",
        ),
        "singular_values": Definition("singular values", "of the matrix, falling", "above 1: it amplifies"),
        "radius": Definition(
            "radius",
            "largest |eigenvalue| of PBP, P = I − 11ᵀ/N, B the matrix: on what is orthogonal to constants",
            "contrast between tokens shrinks by it with each application",
            "arXiv 2203.05962",
        ),
        "gain": Definition(
            "largest gain",
            "largest singular value of PBP",
            "above 1: some contrast is amplified in one application",
        ),
        "effective_rank": Definition(
            "effective rank",
            "exp of the entropy of the singular values divided by their sum",
            "how many directions pass the filter",
            "Roy, Vetterli 2007",
        ),
        "complete": Definition("complete", "whether all eigenvalues and singular values are listed, or the largest"),
    },
}
"""Headline -> name in lens.json -> definition. ``report.noise`` is ``noise`` of the report, not of its layers."""

DEFINITIONS: dict[str, Definition] = {name: each for group in GROUPS.values() for name, each in group.items()}


def learned_definitions(names: Iterable[str]) -> dict[str, Definition]:
    """Of what the filters of a model hold, by their names."""
    return {name: Definition(f"its {name}", MEANINGS[name].replace("`", "")) for name in names}


COLUMNS = {
    "name": "in lens.json",
    "title": "on the page",
    "formula": "what it is",
    "reading": "how to read it",
    "source": "source",
}
"""Of tables of definitions."""


def definition_rows(held: Mapping[str, Definition], columns: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of a table of definitions; a column in which nothing stands is left out.

    Args:
        held: name in lens.json -> definition.
        columns: keys of :data:`COLUMNS`.
    """
    cells = [{"name": _json_name(name), **each._asdict()} for name, each in held.items()]
    shown = [column for column in columns if any(row[column] for row in cells)]
    return [COLUMNS[column] for column in shown], [[row[column] for column in shown] for row in cells]


def _json_name(name: str) -> str:
    """How a number is called in lens.json, in words."""
    return f"{name.removeprefix('report.')} (of the report)" if name.startswith("report.") else name


def docs_table(group: str) -> str:
    """A group as the docs have it."""
    head, rows = definition_rows(GROUPS[group], COLUMNS)
    return table_text(head, ([f"`{name}`", *others] for name, *others in rows))


if __name__ == "__main__":
    print("\n\n".join(f"### {group}\n\n{docs_table(group)}" for group in GROUPS))
