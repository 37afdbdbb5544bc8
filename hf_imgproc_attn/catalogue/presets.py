"""The presets: a row each, with what cards, the table of variants and the README say of it.

The fields of a preset are in ``models/spec_fields.py``, which travels with checkpoints; all else about it is its row
here. ``tests/catalogue/test_table.py`` compares the two.
"""

from __future__ import annotations

from typing import NamedTuple


class Variant(NamedTuple):
    """A preset in one equation.

    Attributes:
        text: what it computes, in a line of plain text, without the `|` that separates the columns of a table.
        equation: the same in LaTeX; without a backslash before punctuation, which Markdown may eat.
        symbols: what stands in it beyond queries q, keys k, values V and the width d of a head.
        papers: keys of :data:`~hf_imgproc_attn.catalogue.works.PAPERS`: the works it comes from, the foremost first.
        limits: what it does not support, keys of :data:`REASONS`, beyond what
            :func:`~hf_imgproc_attn.catalogue.table.limits` finds out.
    """

    text: str
    equation: str
    symbols: str
    papers: tuple[str, ...]
    limits: tuple[str, ...] = ()

    def in_any_model(self) -> Variant:
        """The same in the layers of a stock model, which keeps its own positions, and whose gains start at 0."""
        symbols = self.symbols.replace(", from 1, where this is twicing", ", from 0, where this is the stock model")
        for words in (_STOCK_SYMBOLS, _NO_TABLE):
            symbols = symbols.replace(words, "the model's own positions are what they are without the filter")
        return self._replace(symbols=symbols)


REASONS = {
    "continuous batching": "the layers keep rows that its paged cache has no place for",
    "longer texts": "the table of positions ends at N",
    "one-layer models": "a layer is compared with one before it",
    "rotary positions": "they mix the features that M weighs",
    "every head width": "features turn in pairs, for each axis: a multiple of 2 for text, of 4 for images",
    "encoders of texts": "without positions and without a causal mask a model is blind to the order of words",
    "one attention map": "each round has its own",
    "causal models": "every weight depends on all tokens, later ones too",
    "models without a causal mask": "gates between a token and a later one have no order",
}
"""What some presets do not support, and why."""

_UNTIED = r"A_{ij} \propto \exp\left(\frac{2 q_i^\top k_j}{h_y^2} + \frac{2 (U_Q p_i)^\top (U_K p_j)}{h_p^2}\right)"
_UNTIED_SYMBOLS = (
    "$q$, $k$ come from the content alone; $p$ is the learned vector of a position (layer-normalised), $U_Q$, $U_K$ "
    "are its own projections, and the bandwidths $h_y$, $h_p$ are learned, one of each per head and layer"
)
_STOCK = r"A_{ij} \propto \exp\left(\frac{q_i^\top k_j}{\sqrt{d}}\right)"
_STOCK_SYMBOLS = "learned positions are added to the tokens before the first layer"
_LOGITS = r"\ell_{ij} = \frac{q_i^\top k_j}{\sqrt{d}}"
_ONCE, _TWICE = r"U = A V", r"U = (2A - A^2) V"
_STEPS = "$2A - A^2$ is $I - (I - A)^k$ with $k = 2$ steps (`boosting_steps`)"
_NO_TABLE = "no positions are added to the tokens"

VARIANTS: dict[str, Variant] = {
    "softmax": Variant(
        text="A ∝ exp(qᵀk/√d), positions added to the tokens; U = A V",
        equation=rf"{_ONCE}, \qquad {_STOCK}",
        symbols=_STOCK_SYMBOLS,
        papers=("attention",),
    ),
    "bilateral": Variant(
        text="A ∝ exp(2qᵀk/h_y² + 2(U_Q p_i)ᵀ(U_K p_j)/h_p²); U = A V",
        equation=rf"{_ONCE}, \qquad {_UNTIED}",
        symbols=_UNTIED_SYMBOLS,
        papers=("filtering", "untied"),
    ),
    "bilateral_gaussian": Variant(
        text="A ∝ exp(-‖q - k‖²/h_y² - ‖p_i - p_j‖²/h_p²); U = A V",
        equation=(
            rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(-\frac{{\lVert q_i - k_j \rVert^2}}{{h_y^2}}"
            r" - \frac{\lVert p_i - p_j \rVert^2}{h_p^2}\right)"
        ),
        symbols=(
            "$p$ is the place itself (the index of a token; row and column of an image patch), and the bandwidths "
            "$h_y$, $h_p$ are learned, one of each per head and layer"
        ),
        papers=("bilateral", "filtering"),
    ),
    "twicing": Variant(
        text="A of softmax; U = (2A - A²) V",
        equation=rf"{_TWICE}, \qquad {_STOCK}",
        symbols=f"{_STOCK_SYMBOLS}; {_STEPS}",
        papers=("twicing", "tukey"),
    ),
    "bilateral_twicing": Variant(
        text="A of bilateral; U = (2A - A²) V",
        equation=rf"{_TWICE}, \qquad {_UNTIED}",
        symbols=f"{_UNTIED_SYMBOLS}; {_STEPS}",
        papers=("filtering", "twicing", "untied", "tukey"),
    ),
    "nlm": Variant(
        text="A ∝ exp(-‖q - k‖²/h_y²), no positions; U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(-\frac{{\lVert q_i - k_j \rVert^2}}{{h_y^2}}\right)",
        symbols=f"{_NO_TABLE}, and the bandwidth $h_y$ is learned, one per head and layer",
        papers=("nlm", "filtering"),
    ),
    "elliptical": Variant(
        text="A ∝ exp(qᵀM k/√d), M = diag(mean abs(V_l - V_(l-1))) / its maximum; U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top M_i k_j}}{{\sqrt{{d}}}}\right)",
        symbols=(
            "$M_i$ is diagonal: the mean over tokens of $|V_l - V_{l-1}|$, feature by feature, divided by its largest "
            "entry (where tokens see only earlier ones, over the tokens up to $i$; no gradient flows through it; the "
            "first layer has none); "
            f"{_STOCK_SYMBOLS}"
        ),
        papers=("elliptical",),
        limits=("one-layer models", "rotary positions"),
    ),
    "neutreno": Variant(
        text="A of softmax; U = A V_l + λ(V_0 - V_l)",
        equation=rf"U_l = A V_l + \lambda (V_0 - V_l), \qquad {_STOCK}",
        symbols=(
            "$l > 0$ counts the layers, the first one is plain, $\\lambda$ is fixed (with `learn_feedback` it is "
            f"learned, one per head and layer); {_STOCK_SYMBOLS}"
        ),
        papers=("neutreno",),
        limits=("one-layer models",),
    ),
    "pidformer": Variant(
        text="A of softmax; U = A V_l + λ_P e_l + λ_I Σ e_m + λ_D(e_l - e_(l-1)), e_l = V_0 - V_l",
        equation=(
            r"U_l = A V_l + \lambda_P e_l + \lambda_I \sum_{m=1}^{l} e_m + \lambda_D (e_l - e_{l-1}),"
            rf" \qquad e_l = V_0 - V_l, \qquad {_STOCK}"
        ),
        symbols=(
            "$l > 0$ counts the layers, the first one is plain, the gains are fixed (with `learn_feedback` they are "
            f"learned, three per head and layer); {_STOCK_SYMBOLS}"
        ),
        papers=("pidformer",),
        limits=("one-layer models",),
    ),
    "alibi": Variant(
        text="A ∝ exp(qᵀk/√d - m‖i - j‖); U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}} - m |i - j|\right)",
        symbols=(
            "$m$ is a fixed slope, one per head (between image patches $|i - j|$ is the Euclidean distance); "
            f"{_NO_TABLE}"
        ),
        papers=("alibi",),
    ),
    "t5_bias": Variant(
        text="A ∝ exp(qᵀk/√d + b[bucket(i - j)]); U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}} + b(i - j)\right)",
        symbols=(
            "$b$ is a learned number for each head and bucket of offsets: small offsets have one each, large ones "
            f"share (between image patches rows and columns have tables of their own); {_NO_TABLE}"
        ),
        papers=("t5",),
    ),
    "rope": Variant(
        text="A ∝ exp((R_i q)ᵀ(R_j k)/√d); U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{(R_i q_i)^\top R_j k_j}}{{\sqrt{{d}}}}\right)",
        symbols=f"$R_i$ turns pairs of features by angles in proportion to the position $i$; {_NO_TABLE}",
        papers=("roformer",),
        limits=("every head width",),
    ),
    "nope": Variant(
        text="A ∝ exp(qᵀk/√d), no positions; U = A V",
        equation=rf"{_ONCE}, \qquad {_STOCK}",
        symbols=f"{_NO_TABLE}, nor is there any other positional encoding",
        papers=("nope",),
    ),
    "tupe": Variant(
        text="A of bilateral, h fixed, U_Q, U_K shared by all layers; U = A V",
        equation=rf"{_ONCE}, \qquad {_UNTIED}",
        symbols=(
            "$q$, $k$ come from the content alone; $p$ is the learned vector of a position (layer-normalised), $U_Q$, "
            "$U_K$ are its own projections, which all layers share, and the bandwidths are fixed, $h_y^2 = h_p^2 = 2 "
            "\\sqrt{d}$"
        ),
        papers=("untied",),
    ),
    "sos": Variant(
        text="A of softmax; U = u_3, u_m = A(V + u_(m-1)) - u_(m-1), u_0 = 0",
        equation=rf"U = u_3, \qquad u_m = A (V + u_{{m-1}}) - u_{{m-1}}, \qquad u_0 = 0, \qquad {_STOCK}",
        symbols=f"{_STOCK_SYMBOLS}; the index of $u$ is the number of steps (`boosting_steps`)",
        papers=("sos", "filtering"),
    ),
    "learned_twicing": Variant(
        text="A of softmax; U = (A + γA(I - A)) V",
        equation=rf"U = (A + \gamma A (I - A)) V, \qquad {_STOCK}",
        symbols=f"$\\gamma$ is learned, one per head and layer, from 1, where this is twicing; {_STOCK_SYMBOLS}",
        papers=("twicing", "l2boosting"),
    ),
    "gradient_boosted": Variant(
        text="F_0 = Attn_0(z), c = Attn_1(z - F_0); U = F_1 = F_0 + σ(W_1[F_0; c]) ∘ c",
        equation=(
            r"F_0 = \mathrm{Attn}_0(z), \qquad c_m = \mathrm{Attn}_m(z - F_{m-1}), \qquad "
            r"F_m = F_{m-1} + \sigma(W_m [F_{m-1}, c_m]) \odot c_m, \qquad U = F_{M-1}"
        ),
        symbols=(
            "$z$ is the layer's normalised input; every $\\mathrm{Attn}_m$ is softmax attention with projections of "
            "its own; there are $M = 2$ rounds (`boosting_steps`), and for $m > 0$ keys and values are made of "
            "$z - F_{m-1}$ as the queries are (`gradient_boosting_source` `residual`; with `input` they are made of "
            f"$z$); {_STOCK_SYMBOLS}"
        ),
        papers=("gradient_boosting",),
        limits=("one attention map",),
    ),
    "boosted_residual": Variant(
        text="A of softmax; x + Attn(LN(x_0 - x)) instead of x + Attn(LN(x))",
        equation=rf"x'_l = x_l + f(x_0 - x_l), \qquad f(x) = \mathrm{{Attn}}(\mathrm{{LN}}(x)), \qquad {_STOCK}",
        symbols=(
            f"$x_l$ is the input of layer $l > 0$ and $x_0$ the embedded input, the first is plain; {_STOCK_SYMBOLS}"
        ),
        papers=("filtering", "tukey"),
        limits=("one-layer models",),
    ),
    "inversion": Variant(
        text="A of softmax; U = αA V + β(I - A) V",
        equation=rf"U = \alpha A V + \beta (I - A) V, \qquad {_STOCK}",
        symbols=(
            "$\\alpha$ and $\\beta$ are learned, one of each per head and layer, from 1 and 0, where this is "
            f"`softmax`; {_STOCK_SYMBOLS}"
        ),
        papers=("inversion",),
    ),
    "dynamic_inversion": Variant(
        text="A of softmax; u_i = α_i (A V)_i + β_i (v_i - (A V)_i), α_i - 1 and β_i linear in z_i",
        equation=rf"u_i = \alpha_i (A V)_i + \beta_i (v_i - (A V)_i), \qquad {_STOCK}",
        symbols=(
            "$\\alpha_i - 1$ and $\\beta_i$ are learned linear functions of the layer's normalised input $z_i$, one "
            f"of each per head, which start at 0; {_STOCK_SYMBOLS}"
        ),
        papers=("inversion",),
    ),
    "exclusive": Variant(
        text="A of softmax; u_i = s_i - v_i (s_iᵀv_i)/‖v_i‖², s = A V",
        equation=rf"u_i = s_i - \frac{{s_i^\top v_i}}{{\lVert v_i \rVert^2}} v_i, \qquad s = A V, \qquad {_STOCK}",
        symbols=f"$v_i$ is the value of token $i$ itself; {_STOCK_SYMBOLS}",
        papers=("exclusive",),
    ),
    "local_linear": Variant(
        text="A of softmax; u_i = Σ_j a_ij (1 + s̄_i - s_ij) v_j, s_ij = r_iᵀk_j, s̄_i = Σ_j a_ij s_ij, r = W_R z",
        equation=(
            r"u_i = \sum_j A_{ij} (1 + \bar s_i - s_{ij}) v_j, \qquad s_{ij} = r_i^\top k_j, \quad "
            rf"\bar s_i = \sum_j A_{{ij}} s_{{ij}}, \qquad {_STOCK}"
        ),
        symbols=(
            "$r_i = W_R z_i$ is a learned projection of the layer's normalised input $z_i$, one vector per head, from "
            f"$W_R = 0$, where this is `softmax`; {_STOCK_SYMBOLS}"
        ),
        papers=("local_linear", "takeda"),
    ),
    "robust": Variant(
        text="A of softmax; u ← Σ_j w_ij v_j / Σ_j w_ij, w_ij = a_ij min(1, 1/‖v_j - u_i‖), 3 times from u = A V",
        equation=(
            r"u_i \leftarrow \frac{\sum_j w_{ij} v_j}{\sum_j w_{ij}}, \quad w_{ij} = A_{ij} "
            rf"\frac{{\rho'(\lVert v_j - u_i \rVert)}}{{\lVert v_j - u_i \rVert}}, \qquad {_STOCK}"
        ),
        symbols=(
            "$u = A V$ before the first of 3 steps (`boosting_steps`), and $\\rho$ is Huber's penalty, $\\rho'(x)/x = "
            "\\min(1, 1/x)$ (`robust_threshold` is the distance 1; `robust_penalty`: `huber`, `l1`, `mcp`); nothing "
            f"is learned; {_STOCK_SYMBOLS}"
        ),
        papers=("robust",),
    ),
    "gated": Variant(
        text="A of softmax; u_i = 2σ(W z_i) ∘ (A V)_i",
        equation=rf"u_i = 2 \sigma(W z_i) \odot (A V)_i, \qquad {_STOCK}",
        symbols=(
            "$z_i$ is the layer's normalised input, and $W$ is learned, with one number a feature (`gate` "
            "`elementwise`; with `headwise` one a head); the factor 2, which the output projection absorbs, makes the "
            f"gate 1 where $W = 0$; {_STOCK_SYMBOLS}"
        ),
        papers=("gated",),
    ),
    "sink": Variant(
        text="a_ij = exp(l_ij) / (exp(b) + Σ_k exp(l_ik)), l = qᵀk/√d; U = A V",
        equation=(
            rf"{_ONCE}, \qquad A_{{ij}} = \frac{{e^{{\ell_{{ij}}}}}}{{e^b + \sum_k e^{{\ell_{{ik}}}}}}, "
            rf"\qquad {_LOGITS}"
        ),
        symbols=f"$b$ is learned, one per head and layer, from 0, or from -10 in a converted model; {_STOCK_SYMBOLS}",
        papers=("sink",),
    ),
    "sigmoid": Variant(
        text="a_ij = σ(l_ij - log n_i), n_i visible keys, l = qᵀk/√d; U = A V",
        equation=rf"{_ONCE}, \qquad A_{{ij}} = \sigma(\ell_{{ij}} - \log n_i), \qquad {_LOGITS}",
        symbols=f"$n_i$ is the number of keys that query $i$ sees; {_STOCK_SYMBOLS}",
        papers=("sigmoid",),
    ),
    "softpick": Variant(
        text="a_ij = relu(exp(l_ij) - 1) / Σ_k abs(exp(l_ik) - 1), l = qᵀk/√d; U = A V",
        equation=(
            rf"{_ONCE}, \qquad A_{{ij}} = \frac{{\mathrm{{relu}}(e^{{\ell_{{ij}}}} - 1)}}"
            r"{\sum_k |e^{\ell_{ik}} - 1|}, "
            rf"\qquad {_LOGITS}"
        ),
        symbols=(f"the sum is made positive by $10^{{-6}}$ of the largest $e^{{\\ell}}$ or of 1; {_STOCK_SYMBOLS}"),
        papers=("softpick",),
    ),
    "qk_norm": Variant(
        text="A ∝ exp(τ q̂ᵀk̂), q̂ = q/‖q‖, k̂ = k/‖k‖; U = A V",
        equation=(
            rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\tau \frac{{q_i^\top k_j}}"
            r"{\lVert q_i \rVert \lVert k_j \rVert}\right)"
        ),
        symbols=(
            "$\\tau = 2/h_y^2$ is learned, one per head and layer, from $\\sqrt{d}$: a bilateral filter on normalised "
            f"vectors, with $\\exp(-\\lVert \\hat q_i - \\hat k_j \\rVert^2 / h_y^2)$; {_STOCK_SYMBOLS}"
        ),
        papers=("qk_norm", "filtering"),
    ),
    "value_residual": Variant(
        text="A of softmax; U = A((1 - λ)V_l + λV_0)",
        equation=rf"U_l = A \left((1 - \lambda) V_l + \lambda V_0\right), \qquad {_STOCK}",
        symbols=(
            "$l > 0$ counts the layers, the first one is plain, $\\lambda$ is learned, one per layer, from 0.5, or "
            f"from 0 in a converted model; {_STOCK_SYMBOLS}"
        ),
        papers=("value_residual",),
        limits=("one-layer models",),
    ),
    "sinkhorn": Variant(
        text="A = exp(qᵀk/√d) scaled 3 times to columns, then rows, that sum to 1; U = A V",
        equation=(
            rf"{_ONCE}, \qquad A = D_r K D_c, \qquad K_{{ij}} = \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}}\right), "
            r"\qquad \sum_j A_{ij} = 1, \qquad \sum_i A_{ij} \approx 1"
        ),
        symbols=(
            "$D_r$ and $D_c$ are diagonal, found by Sinkhorn's iterations: columns, then rows, are divided by their "
            f"sums 3 times (`sinkhorn_iterations`); {_STOCK_SYMBOLS}"
        ),
        papers=("sinkhorn", "symmetrizing"),
    ),
    "forgetting": Variant(
        text="A ∝ exp(qᵀk/√d + Σ_(j<m≤i) log σ(wᵀz_m + b)), j ≤ i; U = A V",
        equation=(
            rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(\frac{{q_i^\top k_j}}{{\sqrt{{d}}}} + "
            r"\sum_{m=j+1}^{i} \log \sigma(w^\top z_m + b)\right)"
        ),
        symbols=(
            "$z_m$ is the layer's normalised input, $w$ and $b$ are learned, one of each per head and layer: each "
            "token multiplies the weight of what lies before it by a gate between 0 and 1, which in a converted model "
            f"starts open, at $b = 16$; {_NO_TABLE}"
        ),
        papers=("forgetting",),
    ),
    "differential": Variant(
        text="A_1, A_2 as of softmax, A_2 with q, k of its own; U = (A_1 - λA_2) V",
        equation=(
            r"U = (A^{(1)} - \lambda A^{(2)}) V, \qquad "
            r"A^{(m)}_{ij} \propto \exp\left(\frac{q^{(m)\top}_i k^{(m)}_j}{\sqrt{d}}\right)"
        ),
        symbols=(
            "the second map has query and key projections of its own and the values of the first; $\\lambda$ is "
            "learned, one per head and layer, from 0, where this is `softmax` (differs from the paper, whose "
            "$\\lambda$ is made of products of exponentials, and whose heads have a norm of their own); "
            f"{_STOCK_SYMBOLS}"
        ),
        papers=("differential",),
    ),
    "delta": Variant(
        text="A, A' of softmax, over j ≤ i, j < i; u_i = v_i - β_i Σ_(j<i) a'_ij u_j; U = A u, β_i = tanh(b + wᵀz_i)",
        equation=(
            r"U = A u, \qquad u_i = v_i - \beta_i \sum_{j<i} A'_{ij} u_j, \qquad \beta_i = \tanh(b + w^\top z_i), "
            rf"\qquad {_STOCK}"
        ),
        symbols=(
            "$A'$ has the weights of the same logits over the keys before the query's own, $z_i$ is the layer's "
            "normalised input, $w$ and $b$ are learned, one of each per head and layer, from 0, where this is "
            "`softmax` (differs from the layer in flash-linear-attention, whose $\\beta$ has no bounds, and whose "
            f"$A'$ compares keys with keys); {_STOCK_SYMBOLS}"
        ),
        papers=("delta",),
    ),
}
"""Every preset of ``spec_fields``, in its order."""
