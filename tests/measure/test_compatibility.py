"""The table of ``docs/compatibility.md`` is what is measured, and its checks find what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn import PRESETS, cli
from hf_imgproc_attn.measure import compatibility
from hf_imgproc_attn.measure.compatibility import CHECKS, COMMAND, YES, Check, measure, read_table, table
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
MEASURED = PAGE.partition(compatibility.MARKS[0])[2].partition(compatibility.MARKS[1])[0]
BY_KEY = {check.key: check for check in CHECKS}
SLOW = {
    "export gpt2": ("bilateral_twicing", "t5_bias"),
    "export vit": ("bilateral_gaussian", "elliptical", "rope"),
}
"""Seconds each: without ``--full`` these presets, which share no kernel and no booster."""


def test_the_table_has_every_preset_and_names_its_command() -> None:
    outcomes = read_table(MEASURED)
    assert set(outcomes) == {(preset, check.key) for preset in PRESETS for check in CHECKS}
    assert table(outcomes) == MEASURED
    assert COMMAND in PAGE
    refused = {preset for (preset, key), outcome in outcomes.items() if outcome != YES}
    assert 0 < len(refused) < len(PRESETS)


@pytest.mark.parametrize("key", BY_KEY)
def test_the_table_is_what_is_measured(key: str, request: pytest.FixtureRequest) -> None:
    presets = tuple(PRESETS) if request.config.getoption("--full") else SLOW.get(key, tuple(PRESETS))
    measured = {(preset, key): measure(BY_KEY[key], preset) for preset in presets}
    outcomes = read_table(MEASURED)
    assert measured == {place: outcomes[place] for place in measured}


def test_a_refusal_is_an_outcome_and_a_fault_is_none() -> None:
    def fail(kind: type[Exception]) -> Any:
        def run(preset: str) -> None:
            raise kind(f"{preset}\nis odd")

        return run

    assert measure(Check("x", "x", fail(ValueError), ""), "sos") == "sos is odd"
    with pytest.raises(RuntimeError, match="is odd"):
        measure(Check("x", "x", fail(RuntimeError), ""), "sos")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # torch's own, in its exporter
def test_strange_operators_and_exploding_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bucketize(x, torch.tensor([0.0, 1.0]))

    exported = torch.export.export(Model(), (torch.zeros(3),))
    with pytest.raises(ValueError, match=r"operators that are not in the core set: aten\.bucketize\.Tensor$"):
        compatibility.check_operators(exported)
    monkeypatch.setattr(compatibility, "LARGEST_GRADIENT", 0.1)
    assert measure(BY_KEY["mask token"], "nlm").startswith("the first gradient of the mask token is ")


def test_the_command_writes_the_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nmine too\n", encoding="utf-8")
    monkeypatch.setattr(compatibility, "measure", lambda check, preset: YES if preset == "sos" else check.key)
    assert cli.main(["compatibility", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("mine\n<!-- measured: begin -->\n| | `torch.export`, GPT-2 |")
    assert text.endswith("\n<!-- measured: end -->\nmine too\n")
    assert read_table(text)["sos", "prompt"] == YES
    assert read_table(text)["nlm", "prompt"] == "prompt"
