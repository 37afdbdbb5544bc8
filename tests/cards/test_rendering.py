"""Model cards: every number is the record's, what is missing says so, and the committed cards are up to date."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import make_cards
import make_results
import pytest
from huggingface_hub import ModelCard

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.cards.evidence import evidence
from hf_imgproc_attn.cards.rendering import RunResults, load_results
from hf_imgproc_attn.catalogue.presets import VARIANTS
from hf_imgproc_attn.catalogue.works import PACKAGE_PAPERS, PAPERS
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import preset_fields
from hf_imgproc_attn.records import public_record
from tests.cards.card_cases import (
    CARDS,
    NAMES,
    RESULTS,
    changed,
    front_matter,
    recipe_of,
    render,
    tables,
)
from tests.helpers import ROOT


@pytest.mark.parametrize("name", NAMES)
def test_committed_result_is_a_clean_and_public_run(name: str) -> None:
    run = load_results(RESULTS / f"{name}.json")
    assert run.name == name
    assert run.robustness is not None
    assert public_record(run.record) == run.record
    assert run.record["arguments"]["model"]["preset"] == name.removeprefix(f"{recipe_of(name)}_")
    assert run.record["seed"] == 0
    for source in (run.record["git"], run.robustness["git"]):
        assert source["dirty"] is False
        assert re.fullmatch("[0-9a-f]{40}", source["revision"])
    assert run.record["steps"] == run.record["eval_history"][-1][0]
    # Corruptions are measured by nothing that the recipes use.
    family = set(make_results.RECIPES[recipe_of(name)].disturbances) - {"corruption"}
    assert {result["family"] for result in run.robustness["results"]} == {"clean", *family}


@pytest.mark.parametrize("folder", [RESULTS, CARDS], ids=lambda folder: folder.name)
def test_committed_files_name_no_paths_of_a_machine(folder: Path) -> None:
    assert {path.stem for path in folder.iterdir() if path.is_file()} - {"template"} == set(NAMES)
    for path in (path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".tex")):
        content = path.read_text(encoding="utf-8")
        assert not re.search(
            r"(?<![\w.:/<])(/(?:home|root|tmp|work|Users|mnt|var|usr|opt)\b|[A-Za-z]:\\\w|~/)", content
        )
        assert not re.search(r"\bhf_[A-Za-z0-9]{16,}|localhost", content)


def test_committed_cards_are_what_the_results_say() -> None:
    """Stale: ``make cards`` renders them again."""
    rendered = make_cards.render_all(RESULTS)
    committed = {path.stem: path.read_text(encoding="utf-8") for path in CARDS.glob("*.md") if path.stem != "template"}
    assert rendered == committed


def test_a_changed_result_makes_its_own_card_stale(tmp_path: Path) -> None:
    for name in ("vit_digits_softmax", "vit_digits_twicing"):
        (tmp_path / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    before = make_cards.render_all(tmp_path)
    content = json.loads((RESULTS / "vit_digits_twicing.json").read_text(encoding="utf-8"))
    content["robustness"]["results"][2]["value"] = 0.123456
    (tmp_path / "vit_digits_twicing.json").write_text(json.dumps(content), encoding="utf-8")
    after = make_cards.render_all(tmp_path)
    assert after["vit_digits_softmax"] == before["vit_digits_softmax"]
    lines = zip(before["vit_digits_twicing"].splitlines(), after["vit_digits_twicing"].splitlines(), strict=True)
    new = [line for old, line in lines if old != line]
    assert len(new) == 2  # front matter and table
    assert "value: 0.123456" in new[0]
    assert "| 12.35 % |" in new[1]


def test_make_cards_writes_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, results, names = tmp_path / "cards", tmp_path / "results", ("vit_digits_softmax", "vit_digits_twicing")
    for folder in (output, results):
        folder.mkdir()
    for name in names:
        shutil.copy(RESULTS / f"{name}.json", results)
    assert make_cards.main(["--results", str(results), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {f"{name}.md" for name in names}
    (output / f"{names[0]}.md").write_text("mine", encoding="utf-8")
    assert make_cards.main(["--results", str(results), "--output", str(output)]) == 2
    assert f"{names[1]}.md' are there already; --force replaces them" in capsys.readouterr().err
    assert (output / f"{names[0]}.md").read_text(encoding="utf-8") == "mine"
    assert make_cards.main(["--results", str(results), "--output", str(output), "--force"]) == 0
    assert (output / f"{names[0]}.md").read_text(encoding="utf-8").startswith("---")
    (tmp_path / "wrong.json").write_text("[]", encoding="utf-8")
    assert make_cards.main(["--results", str(tmp_path), "--output", str(output)]) == 2
    assert "wrong.json must hold a JSON object, got list" in capsys.readouterr().err


def test_make_results_replaces_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{NAMES[0]}.json"
    path.write_text("mine", encoding="utf-8")
    monkeypatch.setattr(make_results, "run_recipe", lambda *_: pytest.fail("work has begun"))
    assert make_results.main(["--only", NAMES[0], "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: output '{path}' is there already; --force replaces it\n"
    assert path.read_text(encoding="utf-8") == "mine"


def test_example_cards_say_that_they_are(images: RunResults) -> None:
    card = (CARDS / "vit_digits_bilateral.md").read_text(encoding="utf-8")
    assert "**Example card.** The checkpoint of this run is not published" in card
    assert f'revision="{make_cards.REVISION}"' in card
    assert "training_curves.png" not in card
    published = render(images)
    assert "Example card" not in published
    assert "![training curves](training_curves.png)" in published


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_equation_and_sources(preset: str) -> None:
    variant, fields = VARIANTS[preset], preset_fields(preset)
    assert ("2A - A^2" in variant.equation) == (fields.get("boosting") == "twicing")
    assert ("h_p^2" in variant.equation) == (fields.get("position_kernel") in ("untied", "gaussian"))
    assert ("U_Q" in variant.equation) == (fields.get("position_kernel") == "untied")
    assert not re.search(r"\\[^A-Za-z]", variant.equation)
    assert variant.papers
    for key in variant.papers:
        assert re.search(r"\b(19|20)\d\d, ", PAPERS[key].reference)


def test_no_entry_without_a_preset() -> None:
    assert set(VARIANTS) == set(PRESETS)
    assert {key for variant in VARIANTS.values() for key in variant.papers} | set(PACKAGE_PAPERS) == set(PAPERS)


def test_the_two_papers_are_cited_as_the_readme_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for key in PACKAGE_PAPERS:
        assert PAPERS[key].bibtex in readme


@pytest.mark.parametrize("name", NAMES)
def test_card_shows_equation_sources_and_citations_of_its_preset(name: str) -> None:
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    variant = VARIANTS[load_results(RESULTS / f"{name}.json").record["arguments"]["model"]["preset"]]
    assert f"$$ {variant.equation} $$" in card
    for key in dict.fromkeys([*PACKAGE_PAPERS, *variant.papers]):
        assert PAPERS[key].bibtex in card
    for key in variant.papers:
        assert PAPERS[key].reference in card


def test_custom_filter_is_listed_field_by_field(images: RunResults) -> None:
    card = render(changed(images, model_config__boosting="sos", model_config__boosted_layers=[-2, -1]))
    (fields,) = [table for table in tables(card) if table[0] == ["field", "this model", "the stock model"]]
    assert fields[1:] == [
        ["position_kernel", "untied", "additive"],
        ["learn_bandwidths", "True", "False"],
        ["boosting", "sos", "none"],
        ["boosted_layers", "[-2, -1]", "None"],
    ]
    assert "$$" not in card
    assert "with `custom` self-attention, trained" in card
    assert "custom" in front_matter(card)["tags"]


def test_a_varied_preset_is_named_after_it(images: RunResults) -> None:
    """As a converted `neutreno` is, whose strength is learned from 0 on; the published one is the preset itself."""
    run = changed(load_results(RESULTS / "vit_digits_neutreno.json"), model_config__neutreno_lambda=0.6)
    assert "with `neutreno` self-attention, trained" in render(run)
    run = changed(run, model_config__neutreno_lambda=0.0, model_config__learn_feedback=True)
    card = render(run)
    assert "with `neutreno` self-attention (`neutreno_lambda=0.0`, `learn_feedback=True`), trained" in card
    assert "this run (`neutreno`)" in card
    assert {"neutreno"} == {"custom", *PRESETS} & set(front_matter(card)["tags"])
    assert f"$$ {VARIANTS['neutreno'].equation} $$" in card
    assert PAPERS["neutreno"].bibtex in card
    (fields,) = [table for table in tables(card) if table[0] == ["field", "this model", "the preset"]]
    assert fields[1:] == [["neutreno_lambda", "0.0", "0.6"], ["learn_feedback", "True", "False"]]
    assert "So the preset `neutreno`. The fields in which this model differs from it:" in card


@pytest.mark.parametrize("preset", PRESETS)
def test_learned_logits_of_the_class_token_are_told(preset: str) -> None:
    """Of every position kernel that is a term of the logits; of images only, text has no class token."""
    compares = preset_fields(preset).get("position_kernel") in ("untied", "gaussian", "alibi", "relative_buckets")
    for recipe in (recipe for recipe in make_results.RECIPES if f"{recipe}_{preset}" in NAMES):
        results = load_results(RESULTS / f"{recipe}_{preset}.json")
        card = render(results)
        assert ("three a head" in card) == (compares and recipe == "vit_digits")
        learns = compares and (recipe == "vit_digits" or preset not in ("alibi", "tupe"))
        unknown = (learns or preset in ("nlm", "learned_twicing")) and "filter_summary" not in results.record
        assert ("not recorded.\n\n## Results" in card) == unknown


def test_only_the_stock_filter_is_called_stock(stock: RunResults) -> None:
    for card, is_stock in (
        (render(stock), True),
        (render(changed(stock, model_config__content_bandwidth=3.0)), False),
    ):
        assert ("the stock self-attention (`softmax`)" in card) == is_stock
        assert ("This is the stock model" in card) == is_stock
        assert ("with `softmax` self-attention (`content_bandwidth=3.0`)" in card) != is_stock


def test_the_numbers_of_the_filters_are_a_table(images: RunResults) -> None:
    rows = [
        {"P": 1 / 8, "I": head, "h_p": 1.5, "h_y": 2.0, "layer": layer, "head": head}
        if layer
        else {"h_p": 1.5 + head, "h_y": 2.0, "layer": layer, "head": head}
        for layer in range(2)
        for head in range(2)
    ]
    card = render(changed(images, filter_summary={"rows": rows, "learned": ["I", "P", "h_p"]}))
    (table,) = [table for table in tables(card) if table[0][0] == "layer"]
    assert table[0] == ["layer", "`h_p` (learned)", "`P` (learned)", "`I` (learned)"]
    assert table[1:] == [["0", "1.5, 2.5", "-", "-"], ["1", "1.5, 1.5", "0.125, 0.125", "0, 1"]]
    assert "The same in all heads, and fixed: `h_y` = 2." in card
    assert "; `P`: λ_P of the feedback; `I`: λ_I of the feedback." in card
    assert card.index("## What it computes") < card.index("## Numbers of the filters") < card.index("## Results")


def test_numbers_that_were_not_recorded_are_missed_only_where_there_are_any(images: RunResults) -> None:
    sentence = "What the filters have learned beside their projections is not recorded."
    assert sentence in render(images)
    summary = {"rows": [{"layer": 0, "head": 0, "h_y": 2.0}], "learned": []}
    for run in (load_results(RESULTS / "gpt2_pydoc_twicing.json"), changed(images, filter_summary=summary)):
        assert sentence not in render(run)
        assert "Beside the projections nothing in the filters is learned." in render(run)


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ([], "filter_summary must be of type dict"),
        ({}, "must have lists of rows and of learned names"),
        ({"rows": [3], "learned": []}, "must have a layer and a head, got 3"),
        ({"rows": [{"layer": 0, "head": 0, "h_y": "2"}], "learned": []}, "h_y in filter_summary must be a number"),
        ({"rows": [], "learned": [3]}, "must be names"),
    ],
    ids=str,
)
def test_a_summary_of_another_form_is_refused_by_name(
    images: RunResults, tmp_path: Path, summary: Any, message: str
) -> None:
    record = changed(images, filter_summary=summary).record
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        load_results(tmp_path)
    assert "run.json: " in str(error.value)


def test_template_holds_no_numbers_and_asks_for_nothing_unknown(images: RunResults) -> None:
    source = (CARDS / "template.md").read_text(encoding="utf-8")
    asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    given: set[str] = set()

    def keep(data: Any, template_str: str, **variables: Any) -> str:
        given.update(variables)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCard, "from_template", keep)
        render(images)
    assert asked - {"card_data"} == given
    prose = re.sub(r"\{[{%].*?[%}]\}|```python.*?```", "", source, flags=re.DOTALL)
    assert re.findall(r"\d+", prose) == ["1"]  # to which the rows of A sum


def test_what_was_not_measured_says_so_in_one_sentence(images: RunResults) -> None:
    run = RunResults(changed(images, metrics={}).record, name="digits")
    card = render(run)
    table = tables(card)[0]
    assert [row[0] for row in table[1:]] == ["clean", "clean"]
    assert all(row[3:] == ["not measured"] * 3 for row in table[1:])
    assert "model-index" not in front_matter(card)
    sentence = (
        "Not measured: disturbed inputs (noise, attack, corruption). `imgproc-attn evaluate digits` measures them."
    )
    assert card.count(sentence) == 1
    assert "Not measured among these: noise, attack, corruption." in card
    assert "disturbed inputs (" not in render(images)


def test_without_a_baseline_there_is_no_column_of_nothing(images: RunResults, stock: RunResults) -> None:
    card = render(images)
    table = tables(card)[0]
    assert table[0][-1] == "this run (`bilateral`)"
    assert [row[-1] for row in table[1:] if row[-1] == "not measured"] == ["not measured"]  # corruption
    assert tables(card)[1][0] == ["cost", "this run"]
    assert "There is no baseline" in card
    card = render(stock)
    assert tables(card)[0][0][-1] == "this run (`softmax`)"
    assert "it is the baseline of the other presets" in card


def test_a_baseline_that_was_not_evaluated_is_one_hint(images: RunResults, stock: RunResults) -> None:
    card = render(images, baseline=RunResults(stock.record, None, "digits-softmax"))
    table = tables(card)[0]
    clean = f"{100 * stock.record['metrics']['test']['accuracy']:.2f} %"
    assert [row[-1] for row in table[1:] if row[:3] == ["clean", "accuracy", "test"]] == [clean]
    disturbed = [row for row in table[1:] if row[0].startswith(("Gaussian noise", "FGSM"))]
    assert disturbed
    assert {row[-1] for row in disturbed} == {"–"}
    assert card.count("`imgproc-attn evaluate digits-softmax` does that.") == 1
    assert "does that" not in render(images, baseline=stock)
    # Where neither was evaluated, there is nothing to stand beside.
    card = render(RunResults(images.record, None, "digits"), baseline=RunResults(stock.record, None, "digits-softmax"))
    assert "–" not in tables(card)[0][-1]
    assert "does that" not in card


def test_the_baseline_stands_beside(images: RunResults, stock: RunResults) -> None:
    assert stock.robustness is not None
    run = RunResults(stock.record, copy.deepcopy(stock.robustness))
    assert run.robustness is not None
    del run.robustness["results"][1]  # sigma 0.1
    run.robustness["results"][1]["seed"] = 5  # sigma 0.2: other noise is another measurement
    card = render(images, baseline=run)
    table = tables(card)[0]
    assert table[0][-1] == "baseline (`softmax`)"
    last = {row[0]: row[-1] for row in table[1:] if row[1] == "accuracy" and row[2] == "test"}
    assert last["clean"] == f"{100 * stock.record['metrics']['test']['accuracy']:.2f} %"
    assert last["Gaussian noise, sigma 0.1"] == last["Gaussian noise, sigma 0.2"] == "not measured"
    assert last["Gaussian noise, sigma 0.3"] == f"{100 * stock.robustness['results'][3]['value']:.2f} %"
    costs = tables(card)[1]
    assert costs[1] == ["parameters", *(f"{run.record['parameters']['total']:,}" for run in (images, stock))]


def test_missing_facts_are_not_recorded(images: RunResults) -> None:
    record = {name: images.record[name] for name in ("task", "arguments", "model_config", "status", "seed")}
    record["arguments"] = record["arguments"] | {"trainer": {}}
    card = render(RunResults(record))
    rows = {row[0]: row[-1] for table in tables(card) for row in table}
    names = ("parameters", "learning rate (highest)", "optimiser steps", "epochs", "warm-up", "batch (samples a step)")
    for name in (*names, "device", "platform", "threads a process", "versions", "git revision of hf_imgproc_attn"):
        assert rows[name] == "not recorded", name
    assert "```bash\nnot recorded\n```" in card
    assert "Training curves: not recorded." in card
    assert "None" not in card.partition("## Citations")[0]


def test_limits_follow_the_record(images: RunResults, text: RunResults) -> None:
    def limits(run: RunResults) -> str:
        return render(run).partition("## Limits")[2].partition("##")[0]

    assert "uncommitted" not in limits(images)
    assert "uncommitted changes" in limits(changed(images, git__dirty=True))
    assert "resumed" in limits(changed(images, resumed_from="checkpoint-20"))
    assert "after the last step (380)" in limits(images)
    best = limits(changed(images, arguments__trainer__load_best_model_at_end=True))
    assert "optimistic" in best
    assert "last step" not in best
    assert "(1,259 training images)" in limits(images)
    assert "changes with Python" in limits(text)
    big = limits(changed(images, arguments__data__dataset_name="uoft-cs/cifar10"))
    assert "comes with a Python package" not in big


@pytest.mark.parametrize("name", NAMES)
def test_command_of_the_card_gives_the_arguments_of_the_run(name: str, tmp_path: Path) -> None:
    from hf_imgproc_attn.training_support.arguments import ModelArguments
    from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments

    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^```bash\n(.*)\n```$", card, re.MULTILINE)
    program, script, *words = shlex.split(line)
    task = make_results.RECIPES[recipe_of(name)]
    assert (program, script) == ("imgproc-attn", task.command)
    module = importlib.import_module(task.script)
    (defaults,) = (value for name, value in vars(module).items() if name.endswith("_TRAINER_DEFAULTS"))
    arguments = module.read_arguments(words)
    recorded = load_results(RESULTS / f"{name}.json").record["arguments"]
    # What a record does not have yet was at its default.
    assert vars(arguments.model) == {**vars(ModelArguments()), **recorded["model"]}
    assert vars(arguments.data) == {**vars(type(arguments.data)()), **recorded["data"]}
    assert arguments.run.output_dir == name
    args = build_training_arguments(arguments, defaults, str(tmp_path))
    for option in arguments.trainer:
        assert getattr(args, option) == recorded["trainer"][option]
    assert {"num_train_epochs", "learning_rate", "seed"} - set(arguments.trainer) <= {"num_train_epochs"}


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_a_card_is_rectangular(name: str) -> None:
    found = tables((CARDS / f"{name}.md").read_text(encoding="utf-8"))
    filters = load_results(RESULTS / f"{name}.json").record.get("filter_summary", {"learned": []})
    assert len(found) == (6 if filters["learned"] else 5)
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert len(table) > 1


def test_a_commit_is_pinned_and_a_tag_may_move(images: RunResults) -> None:
    assert "can be moved" in render(images, revision="v1")
    card = render(images, revision="0123456789" * 4)
    assert "can be moved" not in card
    assert f'revision="{"0123456789" * 4}"' in card


def test_the_evidence_of_several_seeds_is_told_for_its_preset_and_its_data(tmp_path: Path) -> None:
    """Of a report: the clean test split, the same training data, a variant of the preset's name; nothing else."""
    run = load_results(ROOT / "training" / "results" / "vit_digits_twicing.json").record
    data = run["data_fingerprint"]["train"]
    difference = {"summary": {"mean": 0.0125, "values": [0.01, 0.015], "t_interval": {"low": -0.02, "high": 0.045}}}
    row = {"variant": "twicing", "difference": difference, "verdict": "no difference seen"}
    table = {"task": "digits", "family": "clean", "split": "test", "metric": "accuracy", "rows": [row]}
    tables = [table, {**table, "family": "noise"}, {**table, "split": "validation"}, {**table, "task": "other"}]
    report = {"study": "five", "baseline": "softmax", "data": {"digits": data, "other": {}}, "tables": tables}
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (sentence,) = evidence(run, "twicing", tmp_path)
    assert "With 2 seeds" in sentence
    assert "`twicing` minus `softmax` is +1.25 points of accuracy (95 % interval -2.00 to +4.50)" in sentence
    assert sentence.endswith("no difference seen.")
    assert evidence(run, "sos", tmp_path) == []
    assert evidence({"task": "image-classification"}, "twicing", tmp_path) == []
