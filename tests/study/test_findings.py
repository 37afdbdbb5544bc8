"""docs/what-holds.md is what the command makes of the ledgers, and says what they hold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean, multimode
from typing import Any

import pytest
import torch

from hf_imgproc_attn.cli import main
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.layer_parameters import bandwidth_scale
from hf_imgproc_attn.models.layer_positions import LayerPositions
from hf_imgproc_attn.sequences import generate
from hf_imgproc_attn.sequences.splits import IGNORED
from hf_imgproc_attn.study.claims import CLAIMS
from hf_imgproc_attn.study.comparisons import (
    Chapter,
    Comparison,
    counted,
    in_a_word,
    in_words,
    points_to_the_better,
    read_chapter,
    seeds_in_words,
    verdict_of,
)
from hf_imgproc_attn.study.evidence import BEGIN, END, evidence_table
from hf_imgproc_attn.study.findings import LEDGERS, MOST_CERTAIN, anchor, findings
from hf_imgproc_attn.study.larger import in_a_sentence, lines_of_pairs
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.report import on_autoattack
from hf_imgproc_attn.study.statistics import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE, compare
from hf_imgproc_attn.study.study_file import read_study
from hf_imgproc_attn.study.subjects import SUBJECTS
from hf_imgproc_attn.study.table import Row, Table, autoattack_gaps, build_tables
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_start import new_model
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "what-holds.md"


def row(verdict: str) -> Row:
    return Row("a", None, None, None, verdict, 0, None, None)


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    assert main(["findings", str(tmp_path / "page.md"), "--ledgers", str(ROOT / LEDGERS)]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_the_table_of_evidence_is_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, words = (
        tmp_path / "which-filter.md",
        ["findings", str(tmp_path / "page.md"), "--ledgers", str(ROOT / LEDGERS)],
    )
    text = (ROOT / "docs" / "which-filter.md").read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    copy.write_text(f"{text[:begin]}old\n{text[end:]}", encoding="utf-8")
    assert main([*words, "--evidence", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("no marks\n", encoding="utf-8")
    for page, message in (
        (copy, "must have the marks"),
        (tmp_path / "missing.md", "--evidence must be a Markdown file"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--evidence", str(page)])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_evidence_is_bold_only_where_a_verdict_is(tmp_path: Path) -> None:
    lines = evidence_table(ROOT / LEDGERS).splitlines()
    study = read_study(ROOT / "training" / "configs" / "studies" / "digits.yaml")
    (table,) = [
        table
        for table in build_tables(study, Ledger(ROOT / LEDGERS / "digits").everything(study))
        if table.family == "clean"
    ]
    stock = table.rows[0]
    assert stock.summary is not None
    assert lines[2].startswith(f"| `softmax`, its own value | {100 * stock.summary.mean:.2f} |")
    for entry in table.rows[1:]:
        cell = next(line for line in lines if line.startswith(f"| `{entry.variant}` |")).split("|")[2]
        assert entry.difference is not None
        assert f"{100 * entry.difference.summary.mean:+.2f} [" in cell
        assert ("**" in cell) == (entry.corrected is not None and entry.corrected < 0.05)


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


def test_the_most_certain_differences_are_those_of_the_smallest_p_values_corrected_for_the_page() -> None:
    """Against the page's own rows, read back from its text, and Holm's factor for the first of them."""
    text = PAGE.read_text(encoding="utf-8")
    (count,) = re.findall(r"corrected here for all (\d+)\s+tests of the page", text)
    part = text[text.index("most certain differences") : text.index("| claim | seeds")]
    told = [" ".join(entry.split()) for entry in part.split("\n1. ")[1:]]
    assert len(told) == MOST_CERTAIN
    values = [float(re.findall(r"; p ([0-9.e-]+), which", entry)[0]) for entry in told]
    assert values == sorted(values)
    for entry, value in zip(told, values, strict=True):
        found = re.findall(r"`(\w+)` is (better|worse) than `(\w+)` under the condition \*(.+?)\* by (\S+)", entry)
        ((variant, side, against, condition, difference),) = found
        assert re.search(
            rf"\| {re.escape(condition)} \| {variant} \| \S+ \| {against} \| {re.escape(difference)} \|.*\| {side}",
            text,
        )
        assert ("which remains after" in entry) or float(count) * value >= 0.05
    assert ("which remains after" in told[0]) == (int(count) * values[0] < 0.05)


def test_readme_makes_no_claim_about_accuracy_that_the_ledgers_do_not() -> None:
    """It has no number of its own on how well a filter does; the page with the ledgers' numbers is linked."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "docs/what-holds.md" in prose
    assert not re.findall(r"[^.]*\d\s?(?:%|points?\b)[^.]*(?:accura|perplexity|robust)[^.]*", prose)
    assert not re.findall(r"(?:accuracy|perplexity|robustness)[^.|]{0,60}\d+(?:\.\d+)?\s?(?:%|points?\b)", prose)
    assert not re.findall(r"(?:more|less|higher|lower|better|worse)\s+(?:accura|perplexity|robust)", prose)


def test_conditions_name_the_task_of_a_study_with_several() -> None:
    chapter = read_chapter("digits_rates", ROOT / LEDGERS)
    conditions = {entry.condition for _, found in chapter.claims for entry in found}
    assert conditions == {f"rate_{rate}, clean" for rate in ("5e4", "1e3", "2e3", "4e3")}


BOTH, RELATIVE = ("bilateral", "bilateral_twicing"), ("alibi", "t5_bias", "rope")
README_SAYS = [
    *[
        (study, "mean of all corruptions", variant, "softmax_as_large", BETTER)
        for study in ("cifar10_small", "cifar10")
        for variant in BOTH
    ],
    *[("wikitext2_medium", "clean", v, against, BETTER) for v in BOTH for against in ("softmax", "softmax_as_large")],
    *[("wikitext2_medium", "clean", "rope", against, BETTER) for against in ("softmax", "softmax_as_large")],
    *[("wikitext2_medium", "clean", variant, "rope", NO_DIFFERENCE) for variant in BOTH],
    *[("listops", "clean", variant, "softmax", NO_DIFFERENCE) for variant in BOTH],
    *[("listops_seeds", "clean", variant, "softmax", WORSE) for variant in BOTH],
    ("corrupted_recall", "clean", "twicing", "softmax", BETTER),
    ("corrupted_recall_long", "clean", "twicing", "softmax", NO_DIFFERENCE),
    *[
        ("digits", condition, "bilateral_gaussian", "softmax", WORSE)
        for condition in ("clean", "Gaussian noise, sigma 0.2", "FGSM, epsilon 8/255", "PGD, epsilon 16/255")
    ],
    ("digits_positions", "clean", "gaussian_contents", "softmax", BETTER),
    ("digits_positions", "Gaussian noise, sigma 0.2", "gaussian_contents", "softmax", NO_DIFFERENCE),
    *[("digits_positions", "clean", variant, "softmax", WORSE) for variant in ("bilateral_gaussian", *RELATIVE)],
]
"""Study, condition, variant, baseline and verdict of what README says in words."""


def test_readme_says_in_words_what_the_ledgers_say() -> None:
    verdicts = {
        (name, entry.condition, entry.row.variant, entry.against): verdict_of(entry.row)
        for name in SUBJECTS
        for _, entries in read_chapter(name, ROOT / LEDGERS).claims
        for entry in entries
    }
    assert {said[:4]: verdicts.get(said[:4]) for said in README_SAYS} == {said[:4]: said[4] for said in README_SAYS}
    of_twicing = {said: verdict for said, verdict in verdicts.items() if said[2:] == ("twicing", "softmax")}
    seen = {name for (name, *_), verdict in of_twicing.items() if verdict not in (NO_DIFFERENCE, TOO_FEW)}
    assert len(of_twicing) > 50
    assert seen == {"corrupted_recall"}


def test_without_ledgers_the_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["findings", str(tmp_path / "page.md"), "--ledgers", str(tmp_path)])
    assert caught.value.code == 2
    assert "ledgers must be a folder with a ledger for each study" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_a_ledger_of_ones_own_makes_no_empty_page(tmp_path: Path) -> None:
    """A page that says of every claim that it was not tested is no answer: report.md is."""
    ledger = tmp_path / "mine"
    ledger.mkdir()
    (ledger / "study.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"one of the studies .*digits.*, got mine in .*report\.md of its ledger"):
        findings(tmp_path)
    with pytest.raises(UsageError, match=r"got the ledger .*mine' itself: its tables are in report\.md there"):
        findings(ledger)


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("split", "validation")])
def test_the_ledger_of_another_version_is_refused_by_the_page(field: str, value: Any, tmp_path: Path) -> None:
    name = CLAIMS[0].study
    header = json.loads((ROOT / LEDGERS / name / "study.json").read_text(encoding="utf-8"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "study.json").write_text(json.dumps({**header, field: value}), encoding="utf-8")
    for make in (findings, evidence_table):
        with pytest.raises(UsageError, match=f"is of a study with {field} {value!r}"):
            make(tmp_path)


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([], "not tested, no run has ended."),
        ([TOO_FEW, TOO_FEW], "too few seeds yet."),
        ([BETTER, f"{BETTER}, 1 diverged"], "it holds here: better in all 2 comparisons."),
        ([WORSE], "the opposite is seen here: worse in the only comparison."),
        ([NO_DIFFERENCE], "not seen here: no difference in the only comparison."),
        ([NO_DIFFERENCE, NO_DIFFERENCE], "not seen here: no difference in any of 2 comparisons."),
        (
            [BETTER, WORSE, NO_DIFFERENCE, TOO_FEW],
            "of 4 comparisons, better in 1, worse in 1, no difference seen in 1, too few seeds in 1.",
        ),
    ],
)
def test_several_verdicts_in_words(verdicts: list[str], words: str) -> None:
    assert in_words([row(verdict) for verdict in verdicts]) == words


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([], "not tested"),
        ([TOO_FEW], "too few seeds"),
        ([BETTER, f"{BETTER}, 1 diverged"], "holds here"),
        ([WORSE, WORSE], "the opposite"),
        ([BETTER, WORSE, NO_DIFFERENCE], "depends on the variant"),
        ([BETTER, NO_DIFFERENCE], "in part"),
        ([WORSE, TOO_FEW], "not seen, worse in part"),
        ([NO_DIFFERENCE, TOO_FEW], "not seen"),
    ],
)
def test_several_verdicts_in_a_word(verdicts: list[str], words: str) -> None:
    assert in_a_word([row(verdict) for verdict in verdicts]) == words


@pytest.mark.parametrize(("metric", "better"), [("accuracy", True), ("word_perplexity", False)])
def test_a_point_to_the_better_is_one_of_the_metric(metric: str, better: bool) -> None:
    def found(variant: list[float]) -> Comparison:
        compared = Row("a", None, compare(variant, [0.5, 0.6]), None, NO_DIFFERENCE, 0, None, None)
        return Comparison(Table("task", "clean", "clean", metric, "test", [compared]), "softmax", compared, "clean")

    assert points_to_the_better(found([0.6, 0.7])) is better
    assert points_to_the_better(found([0.4, 0.5])) is not better
    assert not points_to_the_better(found([0.5, 0.6]))


def test_every_study_of_a_claim_is_explained_and_every_link_of_the_table_leads_to_its_claim() -> None:
    assert list(dict.fromkeys(claim.study for claim in CLAIMS)) == list(SUBJECTS)
    text = PAGE.read_text(encoding="utf-8")
    assert len({anchor(claim.title) for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        link = f"| [{claim.title}](#{anchor(claim.title)}) |"
        assert (link in text) == (f"\n### {claim.title}\n" in text) == (ROOT / LEDGERS / claim.study).is_dir()
        assert link in text or f"| {claim.title} |" in text
    assert anchor("Feedback (NeuTRENO) raises A, B") == "feedback-neutreno-raises-a-b"


def test_no_claim_shows_one_condition_twice() -> None:
    """Two metrics under one condition are two rows that a reader can tell apart."""
    for part in PAGE.read_text(encoding="utf-8").split("\n### ")[1:]:
        lines = [line.split(" | ") for line in part.splitlines() if line.count(" | ") == 7]
        rows = [(cells[0], cells[1], cells[3]) for cells in lines]
        assert len(set(rows)) == len(rows), part[:60]
    found = [
        found for claim, found in read_chapter("segmentation", ROOT / LEDGERS).claims if "noise" in claim.families
    ]
    assert {entry.condition for entry in found[0] if "0.1" in entry.condition} == {
        "Gaussian noise, sigma 0.1: mean IoU",
        "Gaussian noise, sigma 0.1: accuracy of the pixels",
    }


def test_what_a_larger_study_says_of_a_smaller_one() -> None:
    claim = CLAIMS[0]

    def chapter(name: str, **of: tuple[str, list[float]]) -> Chapter:
        found = []
        for variant, (verdict, values) in of.items():
            compared = Row(variant, None, compare(values, [0.5] * len(values)), None, verdict, 0, None, None)
            table = Table("task", "clean", "clean", "accuracy", "test", [compared])
            found.append(Comparison(table, "softmax", compared, "clean"))
        return Chapter(name, None, {}, [(claim, found)])

    small = chapter(
        "cifar10_small",
        a=(BETTER, [0.6, 0.7, 0.8]),
        b=(WORSE, [0.4, 0.3, 0.2]),
        c=(BETTER, [0.6, 0.6, 0.7]),
        d=(NO_DIFFERENCE, [0.5, 0.6, 0.7]),
        e=(NO_DIFFERENCE, [0.5, 0.6, 0.7]),
        not_repeated=(BETTER, [0.6, 0.7, 0.8]),
    )
    large = chapter(
        "cifar10",
        a=(BETTER, [0.6, 0.7, 0.8]),
        b=(BETTER, [0.6, 0.7, 0.8]),
        c=(TOO_FEW, [0.4]),
        d=(NO_DIFFERENCE, [0.4, 0.5, 0.4]),
        e=(WORSE, [0.1, 0.2, 0.1]),
    )
    said = in_a_sentence(small, large)
    assert "20,000 training images* (1 to 3 seeds) repeats 5 comparisons of" in said
    assert "better or worse in 3 of them; of these, in the larger one the same is seen in 1, the opposite in 1" in said
    assert ", too few seeds yet in 1. The mean difference has the same sign in both studies in 1 of these 3, " in said
    assert said.endswith("in 1 of all 5. A difference that the smaller one does not show is seen in 1.")
    only_few = chapter("cifar10", a=(TOO_FEW, [0.6]))
    assert in_a_sentence(small, only_few).endswith(
        "too few seeds yet in 1. The mean difference has the same sign in both studies in 1 of these 1, and in 1 of "
        "all 1."
    )
    none_stood_out = in_a_sentence(chapter("cifar10_small", d=(NO_DIFFERENCE, [0.5, 0.6, 0.7])), large)
    assert "(3 seeds). In the smaller study the variant is better or worse in none of them. The mean" in none_stood_out
    assert "has the same sign in both studies in 0 of the 1. " in none_stood_out
    lines = lines_of_pairs(small, large)
    assert [line.split(" | ")[1] for line in lines[2:]] == ["a", "b", "c", "e"]
    assert "| c | softmax | +13.33 [" in lines[4]
    assert lines[4].endswith(f"| {BETTER} | -10.00 | {TOO_FEW} |")
    assert lines_of_pairs(chapter("cifar10_small"), large) == []


def test_numbers_of_seeds_in_words() -> None:
    assert [counted(numbers) for numbers in ([], [3, 3], [3, 1, 2])] == ["–", "3", "1 to 3"]
    assert [seeds_in_words(numbers) for numbers in ([1], [1, 3])] == ["1 seed", "1 to 3 seeds"]


def test_what_autoattack_adds_to_pgd() -> None:
    def record(auto: float, epsilon: float = 0.125, samples: int = 100) -> dict[str, Any]:
        values = {"PGD": (0.4, 0.125, 100), "AutoAttack": (auto, epsilon, samples)}
        return {
            "measurements": [
                {
                    "family": "attack",
                    "disturbance": name,
                    "value": value,
                    "samples": count,
                    "parameters": {"epsilon": e},
                }
                for name, (value, e, count) in values.items()
            ]
        }

    assert autoattack_gaps({"a": record(0.4), "b": record(0.3)}) == {
        "a (epsilon 0.125)": 0.0, "b (epsilon 0.125)": pytest.approx(0.1),
    }  # fmt: skip
    assert autoattack_gaps({"a": record(0.9, epsilon=0.25), "b": record(0.9, samples=50)}) == {}
    assert "5.0 points fewer of the images right than PGD on average, 10.0 at most." in on_autoattack(
        {"a": 0, "b": 0.1}
    )
    assert "It cannot leave more, but does in a:" in on_autoattack({"a": -0.1, "b": 0.1})


def test_autoattack_fools_as_many_images_as_pgd_in_every_run_of_the_ledgers() -> None:
    for folder in sorted(path.parent for path in (ROOT / LEDGERS).glob("*/study.json")):
        study = read_study(ROOT / "training" / "configs" / "studies" / f"{folder.name}.yaml")
        assert all(gap >= 0 for gap in autoattack_gaps(Ledger(folder).everything(study)).values()), folder.name


def test_the_ledgers_hold_sixty_finished_runs_and_their_reports() -> None:
    """Every report has as many runs as there are records: none was forgotten after a run was added."""
    finished = 0
    for folder in sorted(path.parent for path in (ROOT / LEDGERS).glob("*/study.json")):
        records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*-seed*.json")]
        finished += sum(record["status"] == "finished" for record in records)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert report["runs"]["ended"] == len(records), folder.name
    assert finished >= 60


def test_position_logits_start_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their standard deviation over pairs of patches, in the model of the study: 0.21 / h²."""
    deviations: list[float] = []
    terms = LayerPositions.terms

    def observed(self: LayerPositions, scalars: Any, vectors: Any, *places: Any, **options: Any) -> Any:
        scale = bandwidth_scale(scalars.position_log_bandwidth, self.bandwidths, options["like"])
        deviations.append(float((scale * (vectors[0] @ vectors[1].transpose(-1, -2)))[..., 1:, 1:].std()))
        return terms(self, scalars, vectors, *places, **options)

    monkeypatch.setattr(LayerPositions, "terms", observed)
    (task,) = read_study(ROOT / "training" / "configs" / "studies" / "digits_start.yaml").tasks
    for bandwidth in (None, 8.0, 1.0, 0.5, 0.25):
        torch.manual_seed(0)
        start = ModelArguments(preset="bilateral")
        sizes = {**task.options["config_overrides"], "image_size": 8, "patch_size": 2, "num_channels": 1}
        model = new_model("image-classification", start, {**sizes, "position_bandwidth": bandwidth})
        deviations.clear()
        with torch.no_grad():
            model(torch.zeros(1, 1, 8, 8))
        expected = 0.21 / (bandwidth or (4 * 16) ** 0.25) ** 2
        assert len(deviations) == 4
        assert sum(deviations) / 4 == pytest.approx(expected, rel=0.15)


def test_the_best_answers_to_corrupted_recall_are_as_often_right_as_the_page_says() -> None:
    """Of the study's test split, by the value that a key was shown with most often, and by the one shown last."""
    (task,) = read_study(ROOT / "training" / "configs" / "studies" / "corrupted_recall.yaml").tasks
    settings = {name: json.loads(text) for name, text in (x.split("=") for x in task.options["sequence_settings"])}
    split = generate(task.options["dataset_name"], settings=settings)["test"]
    best, last = [], []
    for tokens, labels in zip(split.tokens, split.labels, strict=True):
        shown: dict[int, list[int]] = {}
        for key, value, label in zip(tokens[::2].tolist(), tokens[1::2].tolist(), labels[1::2].tolist(), strict=True):
            before = shown.setdefault(key, [])
            if label != IGNORED:
                most = multimode(before)
                best.append((label in most) / len(most))
                last.append(label == before[-1])
            before.append(value)
    (claim,) = (claim for claim in CLAIMS if claim.study == "corrupted_recall")
    assert f"{100 * fmean(best):.1f} % of the test answers, with the value shown last in" in claim.text
    assert claim.text.endswith(f"{100 * fmean(last):.1f} %.")
