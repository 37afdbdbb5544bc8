"""Cards: baselines, run folders and records that do not fit are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.backbones import TASKS
from hf_imgproc_attn.cards.rendering import RunResults, load_results
from hf_imgproc_attn.cards.results import check_results
from tests.cards.card_cases import changed, render


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


@pytest.mark.parametrize(
    ("option", "value"),
    [("boosted_layers", "-1"), ("filter_stacks", "model.layers"), ("peft_filter", True), ("preset", "twicing")],
)
def test_a_baseline_without_the_filter_is_of_the_same_recipe(
    images: RunResults, stock: RunResults, option: str, value: Any
) -> None:
    """Options that choose the filter, and where it is, are what the two are compared in."""
    run = changed(images, **{f"arguments__model__{option}": value})
    assert render(run, baseline=stock)
    overrides = run.record["arguments"]["model"]["config_overrides"]
    changes = {"arguments__model__config_overrides": [*overrides, "boosting_steps=3"]}
    assert render(changed(run, **changes), baseline=stock)


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
            f"task must be one of {', '.join(TASKS)}, got 'detection'",
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
    with pytest.raises(ValueError, match=r"run\.json cannot be read: No such file .*; a run is what a training"):
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
