"""What a model card says about each preset: its equation and the works it comes from.

Every preset of ``spec_fields`` has an entry here (``tests/cards/test_rendering.py``).
"""

from __future__ import annotations

from typing import NamedTuple

from .works import PAPERS_OF


class Variant(NamedTuple):
    """A preset in one equation.

    Attributes:
        equation: LaTeX of the filter's output U; without a backslash before punctuation, which Markdown may eat.
        symbols: what stands in it beyond queries q, keys k, values V and the width d of a head.
        papers: keys of :data:`~hf_imgproc_attn.catalogue.works.PAPERS`.
    """

    equation: str
    symbols: str
    papers: tuple[str, ...]


_UNTIED = r"A_{ij} \propto \exp\left(\frac{2 q_i^\top k_j}{h_y^2} + \frac{2 (U_Q p_i)^\top (U_K p_j)}{h_p^2}\right)"
_UNTIED_SYMBOLS = (
    "$q$, $k$ come from the content alone; $p$ is the learned vector of a position (layer-normalised), $U_Q$, $U_K$ "
    "are its own projections, and the bandwidths $h_y$, $h_p$ are learned, one of each per head and layer"
)
_STOCK = r"A_{ij} \propto \exp\left(\frac{q_i^\top k_j}{\sqrt{d}}\right)"
_STOCK_SYMBOLS = "learned positions are added to the tokens before the first layer"
_ONCE, _TWICE = r"U = A V", r"U = (2A - A^2) V"
_NO_TABLE = "no positions are added to the tokens"

_EQUATIONS: dict[str, tuple[str, str]] = {
    "softmax": (rf"{_ONCE}, \qquad {_STOCK}", _STOCK_SYMBOLS),
    "bilateral": (rf"{_ONCE}, \qquad {_UNTIED}", _UNTIED_SYMBOLS),
    "bilateral_gaussian": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(-\frac{{\lVert q_i - k_j \rVert^2}}{{h_y^2}}"
        r" - \frac{\lVert p_i - p_j \rVert^2}{h_p^2}\right)",
        "$p$ is the place itself (the index of a token; row and column of an image patch), and the bandwidths $h_y$, "
        "$h_p$ are learned, one of each per head and layer",
    ),
    "twicing": (rf"{_TWICE}, \qquad {_STOCK}", _STOCK_SYMBOLS),
    "bilateral_twicing": (rf"{_TWICE}, \qquad {_UNTIED}", _UNTIED_SYMBOLS),
    "nlm": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(-\frac{{\lVert q_i - k_j \rVert^2}}{{h_y^2}}\right)",
        f"{_NO_TABLE}, and the bandwidth $h_y$ is learned, one per head and layer",
    ),
    "elliptical": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top M_i k_j}}{{\sqrt{{d}}}}\right)",
        "$M_i$ is diagonal: the mean over tokens of $|V_l - V_{l-1}|$, feature by feature, divided by its largest "
        "entry (in text over the tokens up to $i$; no gradient flows through it; the first layer has none); "
        f"{_STOCK_SYMBOLS}",
    ),
    "neutreno": (
        rf"U_l = A V_l + \lambda (V_0 - V_l), \qquad {_STOCK}",
        f"$l > 0$ counts the layers, the first one is plain, $\\lambda$ is fixed; {_STOCK_SYMBOLS}",
    ),
    "pidformer": (
        r"U_l = A V_l + \lambda_P e_l + \lambda_I \sum_{m=1}^{l} e_m + \lambda_D (e_l - e_{l-1}),"
        rf" \qquad e_l = V_0 - V_l, \qquad {_STOCK}",
        f"$l > 0$ counts the layers, the first one is plain, the gains are fixed; {_STOCK_SYMBOLS}",
    ),
    "alibi": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}} - m |i - j|\right)",
        f"$m$ is a fixed slope, one per head (between image patches $|i - j|$ is the Euclidean distance); {_NO_TABLE}",
    ),
    "t5_bias": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}} + b(i - j)\right)",
        "$b$ is a learned number for each head and bucket of offsets: small offsets have one each, large ones share "
        f"(between image patches rows and columns have tables of their own); {_NO_TABLE}",
    ),
    "rope": (
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{(R_i q_i)^\top R_j k_j}}{{\sqrt{{d}}}}\right)",
        f"$R_i$ turns pairs of features by angles in proportion to the position $i$; {_NO_TABLE}",
    ),
    "nope": (rf"{_ONCE}, \qquad {_STOCK}", f"{_NO_TABLE}, nor is there any other positional encoding"),
    "tupe": (
        rf"{_ONCE}, \qquad {_UNTIED}",
        "$q$, $k$ come from the content alone; $p$ is the learned vector of a position (layer-normalised), $U_Q$, "
        "$U_K$ are its own projections, which all layers share, and the bandwidths are fixed, $h_y^2 = h_p^2 = 2 "
        "\\sqrt{d}$",
    ),
    "sos": (
        rf"U = u_3, \qquad u_m = A (V + u_{{m-1}}) - u_{{m-1}}, \qquad u_0 = 0, \qquad {_STOCK}",
        _STOCK_SYMBOLS,
    ),
    "learned_twicing": (
        rf"U = (A + \gamma A (I - A)) V, \qquad {_STOCK}",
        f"$\\gamma$ is learned, one per head and layer, from 1, where this is twicing; {_STOCK_SYMBOLS}",
    ),
    "gradient_boosted": (
        r"F_0 = \mathrm{Attn}_0(z), \qquad c = \mathrm{Attn}_1(z - F_0), \qquad "
        r"U = F_0 + \sigma(W_1 [F_0, c]) \odot c",
        "$z$ is the layer's normalised input; $\\mathrm{Attn}_0$ and $\\mathrm{Attn}_1$ are softmax attention with "
        f"projections of their own, queries, keys and values of the latter all made of $z - F_0$; {_STOCK_SYMBOLS}",
    ),
    "boosted_residual": (
        rf"x'_l = x_l + f(x_0 - x_l), \qquad f(x) = \mathrm{{Attn}}(\mathrm{{LN}}(x)), \qquad {_STOCK}",
        f"$x_l$ is the input of layer $l > 0$ and $x_0$ the embedded input, the first is plain; {_STOCK_SYMBOLS}",
    ),
}

VARIANTS: dict[str, Variant] = {preset: Variant(*formula, PAPERS_OF[preset]) for preset, formula in _EQUATIONS.items()}
