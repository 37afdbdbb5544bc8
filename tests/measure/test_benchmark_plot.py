"""The plot of a benchmark shows every value that was measured, and says which ones are below the resolution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_imgproc_attn import cli
from hf_imgproc_attn.measure.benchmark.report import LEAST, draw
from tests.helpers import ROOT

LENGTHS = (256, 1024, 2048, 4096)
MEMORY = {
    "plain SDPA": (0.0, 0.0, 0.0, 1.5),
    "reference": (0.0, 8.0, 64.0, 512.0),
    "language": (0.0, 48.0, 128.0, None),
}


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


def rows() -> list[dict[str, Any]]:
    return [
        {
            "suite": "attention",
            "case": f"{kind} (1, 2, {length}, 64) float32",
            "direction": "forward + backward",
            "method": method,
            "length": length,
            "milliseconds": None if mib is None else length / 100,
            "peak_mib": mib,
        }
        for kind in ("causal", "bidirectional")
        for method, values in MEMORY.items()
        for length, mib in zip(LENGTHS, values, strict=True)
    ]


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]  # type: ignore[union-attr]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def test_no_value_is_left_out(drawn: list[Figure], tmp_path: Path) -> None:
    draw(rows(), tmp_path / "a.png")
    time, memory = drawn[0].axes[:2]
    assert [len(points) for points in lines(time).values()] == [4, 4, 3]
    least = LEAST["peak_mib"]
    found = lines(memory)
    assert found["plain SDPA: below 32 MiB"] == [(length, least) for length in LENGTHS]
    (reference,) = (points for label, points in found.items() if label.startswith("reference: N^"))
    assert reference == [(256, least), (1024, least), (2048, 64.0), (4096, 512.0)]
    (language,) = (points for label, points in found.items() if label.startswith("language"))
    assert language == [(256, least), (1024, 48.0), (2048, 128.0)]
    legend = memory.get_legend()
    assert legend is not None
    assert "below 32 MiB: not resolved" in [text.get_text() for text in legend.get_texts()]
    assert time.get_xlim() == memory.get_xlim()


def test_the_committed_plot_is_drawn_by_the_command(drawn: list[Figure], tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "benchmark.json", tmp_path / "benchmark.json")
    assert cli.main(["benchmark", "--redraw", str(tmp_path / "benchmark.json")]) == 0
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    sweep = [row for row in record["rows"] if row["suite"] == "attention" and "(1, 2," in row["case"]]
    for axes, kind in ((drawn[0].axes[1], "causal"), (drawn[0].axes[3], "bidirectional")):
        measured = [
            row
            for row in sweep
            if row["case"].startswith(kind)
            and row["direction"] == "forward + backward"
            and row["peak_mib"] is not None
        ]
        assert sum(len(points) for points in lines(axes).values()) == len(measured)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_record_is_one_line(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["benchmark", "--redraw", str(tmp_path / "a.json")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imgproc-attn: error: --redraw must be a record of a benchmark, got ")
