"""The table of ``docs/supported-models.md`` is what is measured, and its checks find what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn import cli
from hf_imgproc_attn.measure import support, support_checks
from hf_imgproc_attn.measure.support import COLUMNS, COMMAND, NOTHING, YES, Column, measure, read_table, table
from hf_imgproc_attn.measure.support_models import ARCHITECTURES, DECODERS, OUTSIDE, build, inputs
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "supported-models.md").read_text(encoding="utf-8")
MEASURED = PAGE.partition(support.MARKS[0])[2].partition(support.MARKS[1])[0]
BY_TITLE = {column.title: column for column in COLUMNS}
CHEAP = [title for title in BY_TITLE if title != "compiled"]  # which takes seconds for each
CELLS = list(itertools.product(ARCHITECTURES, BY_TITLE))
SAMPLE = [
    *((title, CHEAP[number % len(CHEAP)]) for number, title in enumerate(ARCHITECTURES)),
    *((title, "checkpointed") for title in OUTSIDE),
    ("Llama", "compiled"),
]
"""Without ``--full`` one cell for each architecture, and one that tells why the last ones are refused."""


def test_the_table_has_every_architecture_and_names_its_command() -> None:
    outcomes = read_table(MEASURED)
    assert set(outcomes) == set(CELLS)
    assert table(outcomes) == MEASURED
    assert COMMAND in PAGE
    refused = {title for (title, _), outcome in outcomes.items() if outcome not in (YES, NOTHING)}
    assert refused == set(OUTSIDE)
    for title in BY_TITLE:  # each column says something of some architecture
        assert any(outcomes[architecture, title] == YES for architecture in ARCHITECTURES)


def test_the_readme_says_in_a_paragraph_what_the_table_says() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert support.summary(read_table(MEASURED)) in readme


def test_the_table_is_what_is_measured(request: pytest.FixtureRequest) -> None:
    cells = CELLS if request.config.getoption("--full") else list(dict.fromkeys(SAMPLE))
    measured = {(title, column): measure(BY_TITLE[column], title) for title, column in cells}
    outcomes = read_table(MEASURED)
    assert measured == {cell: outcomes[cell] for cell in measured}


def test_a_filter_that_computes_something_else_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As would be a formula of the table that is not that of the filter."""
    monkeypatch.setattr(
        support_checks, "_filtered", lambda title, preset="": support_checks.apply_filter(build(title), "sos")
    )
    for column in ("full", "causal"):
        with pytest.raises(RuntimeError, match="differs by"):
            measure(BY_TITLE[column], "BART")
    monkeypatch.setattr(support_checks, "_filtered", lambda title, preset="": build(title))
    with pytest.raises(RuntimeError, match="other parameters have gradients"):
        measure(BY_TITLE["checkpointed"], "Llama")
    with pytest.raises(RuntimeError, match="differs by|changes nothing"):
        measure(BY_TITLE["padded"], "Llama")


def test_a_refusal_is_an_outcome_and_a_fault_is_none() -> None:
    def fail(kind: type[Exception]) -> Any:
        def run(title: str) -> None:
            raise kind(f"{title}\nis odd")

        return run

    assert measure(Column("x", lambda _: True, fail(ValueError), ""), "Llama") == "Llama is odd"
    assert measure(Column("x", lambda _: False, fail(ValueError), ""), "Llama") == NOTHING
    with pytest.raises(RuntimeError, match="is odd"):
        measure(Column("x", lambda _: True, fail(RuntimeError), ""), "Llama")


def test_the_models_of_the_table_have_sharp_attention() -> None:
    """What equality in float64 relies on: a wrong mask or a lost row would be seen."""
    for title in ("Llama", "Mistral"):
        model: Any = build(title)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = model(**inputs(title), output_attentions=True).attentions
        assert torch.stack([weights[..., -1, :].amax(-1).mean() for weights in attentions]).mean() > 0.25
    assert set(DECODERS) < set(ARCHITECTURES)


def test_the_command_writes_the_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine\n<!-- supported: begin -->\nold\n<!-- supported: end -->\nmine too\n", encoding="utf-8")
    monkeypatch.setattr(support, "measure", lambda column, title: YES if title == "BERT" else column.title)
    assert cli.main(["support", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("mine\n<!-- supported: begin -->\n| | full | causal |")
    assert text.endswith("\n<!-- supported: end -->\nmine too\n")
    assert read_table(text)["BERT", "LoRA"] == YES
    assert read_table(text)["Llama", "LoRA"] == "LoRA"
