"""``docs/precision.md``: its rows, the measurement on small tokens, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_imgproc_attn import cli
from hf_imgproc_attn.measure import precision
from hf_imgproc_attn.models.spec_axes import CONTENT_KERNELS, POSITION_KERNELS
from tests.helpers import ROOT

SMALL = (precision.Data("text", (40,), 0), precision.Data("images", (5, 4), 1))


def test_the_committed_page_has_a_row_of_every_kernel() -> None:
    text = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    assert text.index(precision.COMMAND) < text.index("|")
    # A cosine is the dot product of other vectors; forget gates project tokens, which no single call has.
    kernels = [f"content `{name}`" for name in CONTENT_KERNELS if name != "cosine"]
    kernels += [f"position `{name}`" for name in POSITION_KERNELS if name not in ("additive", "forget", "none")]
    for row in kernels:
        assert text.count(f"\n| {row} |") == 3, f"{row}: twice for text, once for images"


@pytest.mark.parametrize("data", SMALL, ids=lambda data: data.name)
def test_errors_are_those_of_the_precision(data: precision.Data) -> None:
    """Each row in each precision: not exact, and within a small multiple of plain attention's error."""
    plain = precision.plain_errors(data)
    assert 1e-8 < plain[torch.float32].output < 1e-6
    assert 5e-4 < plain[torch.bfloat16].output < 5e-3
    for row, fields in precision.cases().items():
        for (dtype, implementation), errors in precision.measure(fields, data).items():
            place = (row, dtype, implementation)
            assert 0 < errors.output < 8 * plain[dtype].output, place
            assert 0 < errors.inputs < 8 * plain[dtype].inputs, place
            assert errors.parameters is None or 0 < errors.parameters < 12 * plain[dtype].inputs, place


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(precision, "ALL_DATA", SMALL)
    monkeypatch.setattr(precision, "cases", lambda: {"a row": {"position_kernel": "alibi"}})
    page = tmp_path / "page.md"
    assert cli.main(["precision", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| a row |") == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["precision", str(page)])
    assert capsys.readouterr().err.endswith("page.md' is there already; --force replaces it\n")
    assert cli.main(["precision", str(page), "--force"]) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(["precision", str(tmp_path / "missing" / "page.md")])
    assert capsys.readouterr().err.startswith("imgproc-attn: error: output must be in a folder that exists")
