"""The demonstration, with a few steps only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, RunPython

PRESETS = ["softmax", "bilateral", "twicing", "bilateral_twicing"]


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
    assert "| preset " in result.stdout
    values = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert list(values["digits"]) == list(values["text"]) == PRESETS
    for row in values["digits"].values():
        assert all(0 <= row[name] <= 1 for name in row if name not in ("parameters", "training s"))
        assert {"clean", "Gaussian noise 0.1", "FGSM 0.0314"} <= set(row)


def test_foreign_folder_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import demo

    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert demo.main(["--output_dir", str(tmp_path)]) == 2
    assert "output_dir must be empty or an earlier demo's" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
