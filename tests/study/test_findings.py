"""docs/what-holds.md is what the command makes of the ledgers, and says what they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.study.claims import CLAIMS
from hf_imgproc_attn.study.findings import LEDGERS, findings, in_words
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.statistics import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE
from hf_imgproc_attn.study.study_file import read_study
from hf_imgproc_attn.study.table import Row, build_tables
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "what-holds.md"


def row(verdict: str) -> Row:
    return Row("a", None, None, None, verdict, 0, None, None)


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    assert main(["findings", str(tmp_path / "page.md"), "--ledgers", str(ROOT / LEDGERS)]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_claims_name_variants_and_baselines_that_their_studies_have() -> None:
    for claim in CLAIMS:
        study = read_study(ROOT / "training" / "configs" / "studies" / f"{claim.study}.yaml")
        assert {*claim.variants, *claim.against} <= set(study.variant_names), claim.title


def test_the_pages_numbers_follow_the_ledger(tmp_path: Path) -> None:
    name = CLAIMS[0].study
    shutil.copytree(ROOT / LEDGERS / name, tmp_path / name)
    study = read_study(ROOT / "training" / "configs" / "studies" / f"{name}.yaml")
    before = findings(tmp_path)
    path = next(iter(sorted(tmp_path.glob(f"{name}/*-{CLAIMS[0].variants[0]}-seed*.json"))))
    record = json.loads(path.read_text(encoding="utf-8"))
    record["metrics"]["test"]["accuracy"] = 0.0
    path.write_text(json.dumps(record), encoding="utf-8")
    table = build_tables(study, Ledger(tmp_path / name).everything(study))[0]
    (changed,) = [row for row in table.rows if row.variant == CLAIMS[0].variants[0]]
    assert changed.summary is not None
    line = f"| clean | {changed.variant} | {100 * changed.summary.mean:.2f} |"
    assert line in findings(tmp_path)
    assert line not in before


def test_without_ledgers_the_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["findings", str(tmp_path / "page.md"), "--ledgers", str(tmp_path)])
    assert caught.value.code == 2
    assert "ledgers must be a folder with a ledger for each study" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([], "not tested, no run has ended."),
        ([TOO_FEW, TOO_FEW], "too few seeds yet."),
        ([BETTER, f"{BETTER}, 1 diverged"], "it holds here: better in all 2 comparisons."),
        ([WORSE], "the opposite is seen here: worse in all 1 comparisons."),
        ([NO_DIFFERENCE, NO_DIFFERENCE], "not seen here: no difference in any of 2 comparisons."),
        (
            [BETTER, WORSE, NO_DIFFERENCE, TOO_FEW],
            "of 4 comparisons, better in 1, worse in 1, no difference seen in 1, too few seeds in 1.",
        ),
    ],
)
def test_several_verdicts_in_words(verdicts: list[str], words: str) -> None:
    assert in_words([row(verdict) for verdict in verdicts]) == words
