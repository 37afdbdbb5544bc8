"""Cards: the front matter holds every measured value, baselines, and what records may not hold."""

from __future__ import annotations

import math

import make_results
import pytest
from huggingface_hub import ModelCard

from hf_imgproc_attn.cards.rendering import RunResults, load_results
from hf_imgproc_attn.cards.results import METRICS
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
    assert {metric for run in (images, text) for metric in run.record["metrics"]["test"]} <= set(METRICS)


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


def test_odd_names_break_neither_tables_nor_front_matter(images: RunResults) -> None:
    odd = "a|b: {{ 7 * 7 }} 'c' # \n- d"
    card = render(changed(images, arguments__data__dataset_name=odd, device__name=odd))
    assert all(len({len(row) for row in table}) == 1 for table in tables(card))
    assert "49" not in card.partition("# model")[2].partition("## Quick start")[0]
    dataset = front_matter(card)["model-index"][0]["results"][0]["dataset"]
    assert dataset["type"] == odd
    assert ModelCard(card).data.eval_results


def test_no_licence_is_made_up(images: RunResults) -> None:
    assert "license" not in front_matter(render(images))
    assert front_matter(render(images, license="mit"))["license"] == "mit"
    named = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert named.items() <= front_matter(render(images, license=named)).items()
