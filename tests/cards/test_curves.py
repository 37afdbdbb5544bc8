"""The picture of the training curves shows what the record holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_imgproc_attn.cards.curves import draw_curves

TRAIN_LOSS = [[1, 2.5], [10, 1.5], [20, float("nan")], [30, 0.5]]
EVAL_HISTORY = [[15, {"loss": 1.25, "accuracy": 0.5}], [30, {"loss": 0.75, "accuracy": 0.875}]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, which are written all the same."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def curves(figure: Figure) -> list[dict[str, list[list[float]]]]:
    """Of every panel: label -> points."""
    return [{str(line.get_label()): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]


def test_losses_and_metric_against_the_step(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "training_curves.png"
    draw_curves({"train_loss": TRAIN_LOSS, "eval_history": EVAL_HISTORY}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    losses, metric = curves(drawn[0])
    assert losses["training"][:2] + losses["training"][3:] == [[1, 2.5], [10, 1.5], [30, 0.5]]
    assert losses["validation"] == [[15, 1.25], [30, 0.75]]
    assert metric == {"validation": [[15, 0.5], [30, 0.875]]}
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss (nats)", "validation accuracy"]


def test_without_evaluation_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves({"train_loss": TRAIN_LOSS[:2]}, tmp_path / "a.png")
    draw_curves({"train_loss": TRAIN_LOSS[:2], "eval_history": [[7, {"loss": 1.0}]]}, tmp_path / "b.png")
    assert [list(panel) for panel in curves(drawn[0])] == [["training"]]
    assert [list(panel) for panel in curves(drawn[1])] == [["training", "validation"]]


def test_text_shows_perplexity_a_token(tmp_path: Path, drawn: list[Figure]) -> None:
    history = [[5, {"loss": 3.0, "word_perplexity": 900.0, "perplexity": 20.0}]]
    draw_curves({"eval_history": history}, tmp_path / "a.png")
    assert curves(drawn[0]) == [{"validation": [[5, 3.0]]}, {"validation": [[5, 20.0]]}]
    assert drawn[0].axes[1].get_ylabel() == "validation perplexity a token"


@pytest.mark.parametrize("record", [{}, {"train_loss": [], "eval_history": []}])
def test_no_curves_is_an_error_and_no_picture(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no training curves"):
        draw_curves(record, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
