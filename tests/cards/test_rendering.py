"""Model cards: every number is the record's, what is missing says so, and the committed cards are up to date."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.cards.rendering import RunResults, load_results, render_card
from hf_imgproc_attn.cards.results import METRICS, check_results
from hf_imgproc_attn.catalogue.presets import VARIANTS
from hf_imgproc_attn.catalogue.works import PACKAGE_PAPERS, PAPERS
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import preset_fields
from hf_imgproc_attn.records import public_record
from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "training"))
import make_cards
import make_results

RESULTS, CARDS = ROOT / "training" / "results", ROOT / "model_cards"
NAMES = make_results.NAMES


@pytest.fixture
def images() -> RunResults:
    return load_results(RESULTS / "vit_digits_bilateral.json")


@pytest.fixture
def text() -> RunResults:
    return load_results(RESULTS / "gpt2_pydoc_twicing.json")


@pytest.fixture
def stock() -> RunResults:
    return load_results(RESULTS / "vit_digits_softmax.json")


def changed(run: RunResults, **changes: Any) -> RunResults:
    """A copy of a run with some fields of its record replaced; a dotted name, with ``__``, reaches into it."""
    record = copy.deepcopy(run.record)
    for name, value in changes.items():
        *parents, last = name.split("__")
        target = record
        for parent in parents:
            target = target[parent]
        target[last] = value
    return RunResults(record, copy.deepcopy(run.robustness), run.name)


def render(run: RunResults, **options: Any) -> str:
    return render_card(run, **({"repo_id": "you/model", "revision": "v1"} | options))


def tables(card: str) -> list[list[list[str]]]:
    """The cells of every table, header first."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", card, re.MULTILINE)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in (table[0], *table[2:])] for table in rows]


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


# -- the committed results and cards


def recipe_of(name: str) -> str:
    """The recipe of a result."""
    return next(recipe for recipe in make_results.RECIPES if name.startswith(f"{recipe}_"))


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
    names = {path.stem for path in folder.iterdir()} - {"template"}
    assert names == set(NAMES)
    for path in folder.iterdir():
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
    output = tmp_path / "cards"
    output.mkdir()
    assert make_cards.main(["--results", str(RESULTS), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {f"{name}.md" for name in NAMES}
    (output / f"{NAMES[0]}.md").write_text("mine", encoding="utf-8")
    assert make_cards.main(["--results", str(RESULTS), "--output", str(output)]) == 2
    assert "more files are there already; --force replaces them" in capsys.readouterr().err
    assert (output / f"{NAMES[0]}.md").read_text(encoding="utf-8") == "mine"
    assert make_cards.main(["--results", str(RESULTS), "--output", str(output), "--force"]) == 0
    assert (output / f"{NAMES[0]}.md").read_text(encoding="utf-8").startswith("---")
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


# -- presets


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


# -- the filters


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


# -- numbers


@pytest.mark.parametrize("name", NAMES)
def test_front_matter_holds_every_measured_value_and_survives_the_library(name: str) -> None:
    run = load_results(RESULTS / f"{name}.json")
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert str(card) == text
    data = card.data
    assert (data.license, data.library_name, data.model_name) == ("apache-2.0", "transformers", name)
    assert data.pipeline_tag == make_results.RECIPES[recipe_of(name)].pipeline
    assert {"hf_imgproc_attn", "attention", run.record["arguments"]["model"]["preset"]} <= set(data.tags)
    assert data.get("datasets") is None  # embedded ones are not on the Hub
    assert data.get("base_model") is None
    expected = [
        (split, metric, value)
        for split in ("validation", "test")
        for metric, value in run.record["metrics"][split].items()
    ]
    assert run.robustness is not None
    disturbed = [result for result in run.robustness["results"] if result["family"] != "clean"]
    expected += [(result["split"], result["metric"], result["value"]) for result in disturbed]
    assert data.eval_results is not None
    found = [(result.dataset_split, result.metric_type, result.metric_value) for result in data.eval_results]
    assert sorted(found) == sorted(expected)
    for result in data.eval_results:
        assert result.metric_args["training_seed"] == 0
        assert result.metric_args["samples"] > 0


def test_a_changed_metric_changes_that_number_alone(text: RunResults) -> None:
    before, value = render(text), text.record["metrics"]["validation"]["word_perplexity"]
    after = render(changed(text, metrics__validation__word_perplexity=4321.125))
    assert before.replace(str(value), "4321.125").replace(f"{value:,.2f}", "4,321.12") == after
    assert before.count(f"{value:,.2f}") == 1


def test_an_accuracy_and_its_standard_error_are_those_of_the_record(images: RunResults) -> None:
    card = render(changed(images, metrics__test__accuracy=0.9, data_fingerprint__test__rows=400))
    assert "| clean | accuracy | test | 400 images | training 0 | 90.00 % |" in card
    assert f"a standard error of {100 * math.sqrt(0.9 * 0.1 / 400):.1f} percentage points" in card


def test_metrics_of_the_training_scripts_all_have_a_name(images: RunResults, text: RunResults) -> None:
    assert {metric for run in (images, text) for metric in run.record["metrics"]["test"]} == set(METRICS)


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_shown_as_that_and_kept_from_the_hub(images: RunResults, value: float) -> None:
    run = changed(images, metrics__test__accuracy=value)
    card = render(run, baseline=changed(images, metrics__test__accuracy=value, arguments__model__preset="softmax"))
    word = "not a number" if math.isnan(value) else "infinite"
    assert f"| clean | accuracy | test | 359 images | training 0 | {word} | {word} |" in card
    results = ModelCard(card).data.eval_results
    assert results is not None
    assert all(math.isfinite(result.metric_value) for result in results)
    # Validation, five kinds of disturbed images, and what was found beside these on clean ones: another number.
    assert sum(result.metric_type == "accuracy" for result in results) == 7
    again = images.robustness["results"][0]["value"] if images.robustness else None
    (row,) = [row for row in tables(card)[0] if row[0] == "clean, as evaluated with the disturbed"]
    assert row[1:6] == ["accuracy", "test", "359 images", "training 0", f"{100 * again:.2f} %"]


# -- what is missing


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


# -- names, commands, escaping


def test_hub_names_reach_the_front_matter_and_local_ones_do_not(images: RunResults) -> None:
    names = {
        "arguments__data__dataset_name": "uoft-cs/cifar10",
        "arguments__data__dataset_config_name": "plain_text",
        "arguments__model__model_name_or_path": "google/vit-base-patch16-224",
    }
    card = render(changed(images, **names))
    data = front_matter(card)
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert data["base_model"] == "google/vit-base-patch16-224"
    dataset = data["model-index"][0]["results"][0]["dataset"]
    assert (dataset["type"], dataset["config"]) == ("uoft-cs/cifar10", "plain_text")
    assert "| weights start from | google/vit-base-patch16-224 |" in card

    names = {"arguments__data__dataset_name": "/home/alice/birds", "arguments__model__model_name_or_path": "/data/vit"}
    for run in (changed(images, **names), RunResults(public_record(changed(images, **names).record))):
        card = render(run)
        assert {"datasets", "base_model"}.isdisjoint(front_matter(card))
        assert "fine-tuned from `vit` on birds (local data)" in card
        assert "alice" not in card
        assert "Something local was used (dataset_name, model_name_or_path)" in card


@pytest.mark.parametrize("name", NAMES)
def test_command_of_the_card_gives_the_arguments_of_the_run(name: str, tmp_path: Path) -> None:
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
    assert vars(arguments.model) == recorded["model"]
    assert vars(arguments.data) == recorded["data"]
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


def test_odd_names_break_neither_tables_nor_front_matter(images: RunResults) -> None:
    odd = "a|b: {{ 7 * 7 }} 'c' # \n- d"
    card = render(changed(images, arguments__data__dataset_name=odd, device__name=odd))
    assert all(len({len(row) for row in table}) == 1 for table in tables(card))
    assert "49" not in card.partition("# model")[2].partition("## Quick start")[0]
    dataset = front_matter(card)["model-index"][0]["results"][0]["dataset"]
    assert dataset["type"] == odd
    assert ModelCard(card).data.eval_results


def test_a_commit_is_pinned_and_a_tag_may_move(images: RunResults) -> None:
    assert "can be moved" in render(images, revision="v1")
    card = render(images, revision="0123456789" * 4)
    assert "can be moved" not in card
    assert f'revision="{"0123456789" * 4}"' in card


def test_no_licence_is_made_up(images: RunResults) -> None:
    assert "license" not in front_matter(render(images))
    assert front_matter(render(images, license="mit"))["license"] == "mit"
    named = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert named.items() <= front_matter(render(images, license=named)).items()


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed is 1 instead of 0"),
        ({"steps": 7}, "its steps is 7 instead of 380"),
        ({"task": "causal-lm"}, "its task is 'causal-lm' instead of 'image-classification'"),
        ({"arguments__data__horizontal_flip": True}, "data option horizontal_flip is True instead of False"),
        ({"arguments__data__dataset_name": "/a/digits"}, r"its local_paths is \['dataset_name'\] instead of \[\]"),
        ({"arguments__model__config_overrides": []}, r"model option config_overrides is \[\] instead of \['hidden"),
        ({"arguments__trainer__learning_rate": 0.1}, "trainer option learning_rate is 0.1 instead of 0.002"),
        ({"arguments__trainer__unheard_of": 1}, "trainer option unheard_of is 1 instead of None"),
        ({"data_fingerprint__train": {"rows": 3}}, r"fingerprint of split train is \{'rows': 3\} instead of"),
    ],
)
def test_baseline_of_another_recipe_is_refused(
    images: RunResults, stock: RunResults, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"the baseline must be a run of the same recipe, but .*{message}"):
        render(images, baseline=changed(stock, **changes))


def test_where_a_baseline_is_kept_and_ran_is_no_difference_of_recipe(images: RunResults, stock: RunResults) -> None:
    options = {"output_dir": "elsewhere", "hub_model_id": "you/other", "push_to_hub": True, "run_name": "x"}
    places = {f"arguments__trainer__{name}": value for name, value in options.items()}
    card = render(images, baseline=changed(stock, **places))
    assert "another environment" not in card
    card = render(images, baseline=changed(stock, **places, versions__torch="2.12.0", device__threads=9))
    torch = images.record["versions"]["torch"]
    assert f"another environment (torch 2.12.0 instead of {torch}; device threads 9 instead of 1)" in card


def test_results_are_read_from_run_folders_too(tmp_path: Path, images: RunResults) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(images.record), encoding="utf-8")
    assert load_results(folder) == RunResults(images.record, None, "run")
    (folder / "robustness.json").write_text(json.dumps(images.robustness), encoding="utf-8")
    assert load_results(str(folder)) == RunResults(images.record, images.robustness, "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "detection"},
            "task must be one of causal-lm, image-classification, text-classification, got 'detection'",
        ),
        ({"status": "running"}, "the run must have finished, got status 'running'"),
        ({"arguments__trainer": None}, "the arguments have no trainer"),
        ({"metrics": []}, r"metrics must be of type dict, got \[\]"),
        ({"metrics__test__accuracy": "0.9"}, "accuracy of the test split must be a number, got '0.9'"),
        ({"metrics__test__accuracy": True}, "accuracy of the test split must be a number, got True"),
        ({"weights_sha256": {}}, "the robustness was measured on other weights"),
    ],
)
def test_wrong_records_are_refused(tmp_path: Path, images: RunResults, changes: dict[str, Any], message: str) -> None:
    run = changed(images, **changes)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"record": run.record, "robustness": run.robustness}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"wrong\.json: {message}"):
        load_results(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "wrong.json is not valid JSON"),
        ("3", "wrong.json must hold a JSON object, got int"),
        ("{}", "wrong.json must hold a record"),
        ('{"record": {}, "robustness": 3}', "wrong.json must hold a record and, where measured, robustness"),
        ('{"record": {}}', "wrong.json: the record of the run has no task"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "wrong.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_results(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=r"missing\.json cannot be read: No such file"):
        load_results(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"run\.json cannot be read: No such file"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "much"}, "value of the robustness result 'FGSM, epsilon 8/255' must be a number, got 'much'"),
        ({"metric": "bleu"}, "metric of a robustness result must be one of accuracy, .*, got 'bleu'"),
        ({"colour": 1}, "has a result that is none: "),
    ],
)
def test_wrong_robustness_is_refused(images: RunResults, change: dict[str, Any], message: str) -> None:
    assert images.robustness is not None
    check_results(images.robustness)
    robustness = {"results": [*images.robustness["results"][:-2], images.robustness["results"][-2] | change]}
    with pytest.raises(ValueError, match=message):
        check_results(robustness)
    with pytest.raises(ValueError, match="must have a list of results, got None"):
        check_results({})
