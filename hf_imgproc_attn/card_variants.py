"""What a model card says about each preset: its equation and the works it comes from.

Every preset of ``filter_spec`` has an entry here (``tests/test_cards.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A work, as a line of text refers to it and as BibTeX."""

    reference: str
    bibtex: str


class Variant(NamedTuple):
    """A preset in one equation.

    Attributes:
        equation: LaTeX of the filter's output U; without a backslash before punctuation, which Markdown may eat.
        symbols: what stands in it beyond queries q, keys k, values V and the width d of a head.
        papers: keys of :data:`PAPERS`.
    """

    equation: str
    symbols: str
    papers: tuple[str, ...]


PAPERS: dict[str, Paper] = {
    "filtering": Paper(
        "Abdullaev, Tkachenko, Nguyen 2025, [Revisiting Transformers with Insights from Image Filtering and Boosting]"
        "(https://arxiv.org/abs/2506.10371)",
        """@article{abdullaev2025revisiting,
  title   = {Revisiting Transformers with Insights from Image Filtering and Boosting},
  author  = {Abdullaev, Laziz U. and Tkachenko, Maksim and Nguyen, Tan M.},
  journal = {arXiv preprint arXiv:2506.10371},
  year    = {2025}
}""",
    ),
    "twicing": Paper(
        "Abdullaev, Nguyen 2025, [Transformer Meets Twicing: Harnessing Unattended Residual Information]"
        "(https://arxiv.org/abs/2503.00687)",
        """@inproceedings{abdullaev2025twicing,
  title     = {Transformer Meets Twicing: Harnessing Unattended Residual Information},
  author    = {Abdullaev, Laziz U. and Nguyen, Tan M.},
  booktitle = {The Thirteenth International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2503.00687}
}""",
    ),
    "attention": Paper(
        "Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762)",
        """@inproceedings{vaswani2017attention,
  title     = {Attention Is All You Need},
  author    = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez,
               Aidan N. and Kaiser, Lukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems 30},
  year      = {2017},
  note      = {arXiv:1706.03762}
}""",
    ),
    "untied": Paper(
        "Ke, He, Liu 2021, [Rethinking Positional Encoding in Language Pre-training](https://arxiv.org/abs/2006.15595)",
        """@inproceedings{ke2021rethinking,
  title     = {Rethinking Positional Encoding in Language Pre-training},
  author    = {Ke, Guolin and He, Di and Liu, Tie-Yan},
  booktitle = {The Ninth International Conference on Learning Representations (ICLR)},
  year      = {2021},
  note      = {arXiv:2006.15595}
}""",
    ),
    "bilateral": Paper(
        "Tomasi, Manduchi 1998, Bilateral Filtering for Gray and Color Images",
        """@inproceedings{tomasi1998bilateral,
  title     = {Bilateral Filtering for Gray and Color Images},
  author    = {Tomasi, Carlo and Manduchi, Roberto},
  booktitle = {Sixth International Conference on Computer Vision (ICCV)},
  year      = {1998}
}""",
    ),
    "tukey": Paper(
        "Tukey 1977, Exploratory Data Analysis",
        """@book{tukey1977exploratory,
  title     = {Exploratory Data Analysis},
  author    = {Tukey, John W.},
  publisher = {Addison-Wesley},
  year      = {1977}
}""",
    ),
}

PACKAGE_PAPERS = ("filtering", "twicing")
"""The two papers whose methods the package implements: cited by every card."""

_UNTIED = r"A_{ij} \propto \exp\left(\frac{2 q_i^\top k_j}{h_y^2} + \frac{2 (U_Q p_i)^\top (U_K p_j)}{h_p^2}\right)"
_UNTIED_SYMBOLS = (
    "$q$, $k$ come from the content alone; $p$ is the learned vector of a position (layer-normalised), $U_Q$, $U_K$ "
    "are its own projections, and the bandwidths $h_y$, $h_p$ are learned, one of each a head and layer"
)
_STOCK = r"A_{ij} \propto \exp\left(\frac{q_i^\top k_j}{\sqrt{d}}\right)"
_STOCK_SYMBOLS = "learned positions are added to the tokens before the first layer"
_ONCE, _TWICE = r"U = A V", r"U = (2A - A^2) V"

VARIANTS: dict[str, Variant] = {
    "softmax": Variant(rf"{_ONCE}, \qquad {_STOCK}", _STOCK_SYMBOLS, ("attention",)),
    "bilateral": Variant(rf"{_ONCE}, \qquad {_UNTIED}", _UNTIED_SYMBOLS, ("filtering", "untied")),
    "bilateral_gaussian": Variant(
        rf"{_ONCE}, \qquad A_{{ij}} \propto \exp\left(-\frac{{\lVert q_i - k_j \rVert^2}}{{h_y^2}}"
        r" - \frac{\lVert p_i - p_j \rVert^2}{h_p^2}\right)",
        "$p$ is the place itself (the index of a token; row and column of an image patch), and the bandwidths $h_y$, "
        "$h_p$ are learned, one of each a head and layer",
        ("bilateral", "filtering"),
    ),
    "twicing": Variant(rf"{_TWICE}, \qquad {_STOCK}", _STOCK_SYMBOLS, ("twicing", "tukey")),
    "bilateral_twicing": Variant(
        rf"{_TWICE}, \qquad {_UNTIED}", _UNTIED_SYMBOLS, ("filtering", "twicing", "untied", "tukey")
    ),
}
