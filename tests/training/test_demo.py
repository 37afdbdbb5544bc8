"""The demonstration, with a few steps only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_imgproc_attn.cards.results import Measurement, result_rows
from tests.helpers import ROOT, RunPython

PRESETS = ["softmax", "bilateral", "twicing", "bilateral_twicing"]


@pytest.mark.long
def test_demo_compares_reports_and_loads_in_a_fresh_process(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text("{}", encoding="utf-8")
    (folder / "left_over.txt").write_text("of an earlier demonstration", encoding="utf-8")
    script = str(ROOT / "training" / "demo.py")
    result = run_python(script, "--quick", "--output_dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert not (folder / "left_over.txt").exists()
    report = (folder / "report.md").read_text(encoding="utf-8")
    for preset in PRESETS:
        assert report.count(f"| {preset} ") == 2
        assert (folder / f"vit_digits_{preset}" / "model.safetensors").is_file()
        assert (folder / f"gpt2_pydoc_{preset}" / "robustness.json").is_file()
    assert "ImgProcViTForImageClassification from transformers_modules, without hf_imgproc_attn" in report
    assert "Quick run" in report
    assert (folder / "accuracy_against_noise.png").read_bytes().startswith(b"\x89PNG")
    page = folder / "lens_vit_digits" / "lens.html"
    assert "<h1>What softmax, bilateral_twicing filters</h1>" in page.read_text(encoding="utf-8")
    assert "softmax beside bilateral_twicing under the lens: [digits](lens_vit_digits/lens.html)." in report
    assert f"what vit_digits filters: {page}" in result.stdout
    assert "| preset " in result.stdout
    values = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert list(values["digits"]) == list(values["text"]) == PRESETS
    for row in values["digits"].values():
        assert all(0 <= row[name] <= 1 for name in row if name not in ("parameters", "training s"))
        assert {"clean", "Gaussian noise, sigma 0.1", "FGSM, epsilon 8/255"} <= set(row)
    for recipe in ("vit_digits", "gpt2_pydoc"):
        for preset in PRESETS:
            check_row(report, folder / f"{recipe}_{preset}", preset)


def check_row(report: str, folder: Path, preset: str) -> None:
    """The table names and prints every value as ``imgproc-attn evaluate`` does."""
    robustness = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))
    printed = result_rows([Measurement(**result) for result in robustness["results"]], None, None)
    tables = [part for part in report.split("## ") if f"| {preset} " in part]
    table = tables[0] if folder.name.startswith("vit") else tables[1]
    header, *rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[1] == preset]
    for name, metric, *_, value in printed:
        column = name if metric == "accuracy" else f"{name}, {metric}"
        assert row[header.index(column)] == value


def test_foreign_folder_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import demo

    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert demo.main(["--output_dir", str(tmp_path)]) == 2
    assert "output_dir must be empty or an earlier demo's" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
