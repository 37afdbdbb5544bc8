"""Corruptions and over-smoothing in a study: what is measured of a kept model, and the columns that it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_imgproc_attn.backbones import TASKS
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.robustness import images as image_measurements
from hf_imgproc_attn.study import smoothing
from hf_imgproc_attn.study.driver import InThisProcess, run_study
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.measurements import check_settings, measure
from hf_imgproc_attn.study.plan import Study
from hf_imgproc_attn.study.statistics import BETTER, NO_DIFFERENCE
from hf_imgproc_attn.study.study_file import read_study
from hf_imgproc_attn.study.table import CORRUPTION_ERROR, Table, build_tables
from tests.study.conftest import TINY_TASK, WriteStudy, tiny_study

IMAGES = TASKS["image-classification"]
TINY_SEQUENCES: dict[str, Any] = {
    "task": "sequence-classification",
    "options": {
        "dataset_name": "listops_short",
        "sequence_settings": ["min_length=4", "max_length=24", "max_depth=3", "max_args=3"],
        "max_train_samples": 16,
        "max_eval_samples": 5,
        "max_steps": 1,
        "use_cpu": True,
        "config_overrides": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a task -> the folder of one finished run of it."""
    import yaml

    folder = tmp_path_factory.mktemp("kept")
    tasks = {"digits": TINY_TASK, "lists": TINY_SEQUENCES}
    path = folder / "study.yaml"
    content = tiny_study(variants=["softmax"], seeds=1, tasks=tasks, keep_models=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    study, ledger = read_study(path), Ledger(folder / "ledger")
    run_study(study, ledger, InThisProcess(study, ledger), say=lambda line: None)
    return {name: ledger.models / f"{name}-softmax-seed0" for name in tasks}


def leaving_tokens(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """``[batch, length, width]`` behind every layer, as Transformers returns them."""
    with torch.no_grad():
        return list(model.eval()(**inputs, output_hidden_states=True).hidden_states[1:])


def mean_cosine(tokens: torch.Tensor) -> float:
    """Of all pairs of different tokens of one sample, one by one."""
    pairs = [
        torch.cosine_similarity(tokens[i], tokens[j], dim=0)
        for i in range(len(tokens))
        for j in range(len(tokens))
        if i != j
    ]
    return float(torch.stack(pairs).mean())


def test_token_similarity_of_images_is_the_mean_cosine_behind_each_block(
    kept: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # not behind torchvision, as in 5.17

    from hf_imgproc_attn.cards.rendering import load_record
    from hf_imgproc_attn.study.measurements import images_of

    monkeypatch.setattr(smoothing, "BATCH_SIZE", 2)  # batches of unequal size count by their images
    results = measure(kept["digits"], IMAGES, {"token_similarity": 5}, "test")
    assert [result["parameters"]["layer"] for result in results] == [1, "last"]
    assert {(result["family"], result["samples"], result["unit"]) for result in results} == {
        ("over-smoothing", 5, "images")
    }
    processor = AutoImageProcessor.from_pretrained(kept["digits"])
    dataset = images_of(load_record(kept["digits"]), processor, "test")
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(5)]).float()
    pixels = (pixels / 255 - 0.5) / 0.5
    model = AutoModelForImageClassification.from_pretrained(kept["digits"])
    for result, tokens in zip(results, leaving_tokens(model, {"pixel_values": pixels}), strict=True):
        expected = sum(map(mean_cosine, tokens)) / 5
        assert result["value"] == pytest.approx(expected, abs=1e-5)


def test_padding_is_no_token(kept: dict[str, Path]) -> None:
    """The similarity in a padded batch is that of the sequences one by one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_imgproc_attn.cards.rendering import load_record
    from hf_imgproc_attn.training_support.sequence_arguments import SequenceDataArguments
    from hf_imgproc_attn.training_support.sequence_data import TokenSequences, load_sequences

    folder = kept["lists"]
    results = measure(folder, TASKS["sequence-classification"], {"token_similarity": 50}, "test")
    assert [result["samples"] for result in results] == [5, 5]  # all that there are
    split = load_sequences(SequenceDataArguments(**load_record(folder)["arguments"]["data"])).splits["test"]
    assert len({len(tokens) for tokens in split.tokens}) > 1
    rows = TokenSequences(split, AutoTokenizer.from_pretrained(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    alone = [leaving_tokens(model, {"input_ids": rows[index]["input_ids"][None]}) for index in range(5)]
    for layer, result in enumerate(results):
        expected = sum(mean_cosine(tokens[layer][0]) for tokens in alone) / 5
        assert result["value"] == pytest.approx(expected, abs=1e-5)


def test_only_what_is_new_is_measured_again(kept: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    original = image_measurements.evaluate_robustness

    def evaluate(model: Any, processor: Any, images: Any, labels: Any, settings: Any) -> Any:
        asked.append({"sigmas": settings.sigmas, "attacks": settings.attacks, "corruptions": settings.corruptions})
        return original(model, processor, images, labels, settings)

    monkeypatch.setattr(image_measurements, "evaluate_robustness", evaluate)
    before = check_settings({"sigmas": [0.1], "attacks": ["fgsm"], "epsilons": ["8/255"]}, IMAGES, "digits")
    first = measure(kept["digits"], IMAGES, before, "test")
    more = check_settings({**before, "corruptions": ["contrast"], "severities": [2, 4]}, IMAGES, "digits")
    second = measure(kept["digits"], IMAGES, {**more, "token_similarity": 4}, "test", (before, first))
    assert asked == [
        {"sigmas": [0.1], "attacks": ["fgsm"], "corruptions": ()},
        {"sigmas": (), "attacks": (), "corruptions": ["contrast"]},
    ]
    families = [result["family"] for result in second]
    assert families == ["clean", "noise", "corruption", "corruption", "attack", "over-smoothing", "over-smoothing"]
    assert second == sorted(
        measure(kept["digits"], IMAGES, {**more, "token_similarity": 4}, "test"),
        key=lambda result: families.index(result["family"]),
    )
    asked.clear()
    assert measure(kept["digits"], IMAGES, before, "test", (before, first)) == first
    assert asked == []
    stronger = check_settings({**before, "sigmas": [0.3]}, IMAGES, "digits")
    third = measure(kept["digits"], IMAGES, stronger, "test", (before, first))
    assert [result["parameters"] for result in third] == [{}, {"sigma": 0.3}, {"epsilon": 8 / 255}]
    assert asked == [{"sigmas": [0.3], "attacks": (), "corruptions": ()}]


def test_a_model_that_computes_something_else_now_is_not_measured_further(kept: dict[str, Path]) -> None:
    before = check_settings({"sigmas": [0.1]}, IMAGES, "digits")
    first = measure(kept["digits"], IMAGES, before, "test")
    first[0] = {**first[0], "value": first[0]["value"] + 0.05}
    more = check_settings({"sigmas": [0.1], "corruptions": ["contrast"], "severities": [1]}, IMAGES, "digits")
    with pytest.raises(UsageError, match=r"digits-softmax-seed0 must give the accuracy on clean data that its record"):
        measure(kept["digits"], IMAGES, more, "test", (before, first))


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("image-classification", {"token_similarity": 0}, "token_similarity must be an integer >= 1, got 0"),
        ("image-classification", {"token_similarity": True}, "token_similarity must be an integer >= 1, got True"),
        ("image-classification", {"token_similarity": None}, "token_similarity must be an integer >= 1, got None"),
        ("causal-lm", {"token_similarity": 8}, "must name fractions, got 'token_similarity'"),
        ("image-classification", {"corruptions": ["frost"]}, "frost needs frost_pictures"),
    ],
)
def test_measurements_that_cannot_be_made_are_refused(task: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(settings, TASKS[task], "some")


def test_over_smoothing_is_asked_of_sequences() -> None:
    assert check_settings({"token_similarity": 8}, TASKS["sequence-classification"], "some") == {"token_similarity": 8}


def corrupted_record(variant: str, seed: int, wrong: dict[str, list[float]], similarity: float) -> dict[str, Any]:
    """A record whose error under each corruption is given for severities 1 and 5, beside one that does not count."""

    def result(family: str, name: str, value: float, metric: str = "accuracy", **parameters: Any) -> dict[str, Any]:
        return {
            "family": family, "disturbance": name, "parameters": parameters, "seed": 0, "metric": metric,
            "value": value, "samples": 10, "unit": "images", "split": "test",
        }  # fmt: skip

    results = [result("clean", "clean", 0.9)]
    for name, errors in {**wrong, "gaussian blur": [1.0, 1.0]}.items():
        results += [
            result("corruption", name, 1 - e, severity=s, table="CIFAR-10-C")
            for s, e in zip((1, 5), errors, strict=True)
        ]
    results.append(result("over-smoothing", "token similarity", similarity, "token_similarity", layer="last"))
    return {
        "task": "digits", "variant": variant, "seed": seed, "status": "finished",
        "metrics": {"test": {"accuracy": 0.9}}, "measured": {}, "measurements": results,
        "parameters": {"total": 1}, "operations": {"step_per_sample": 1},
    }  # fmt: skip


def tables_of(study: Study) -> dict[str, Table]:
    records = {}
    for seed, shift in enumerate((0.0, 0.01, -0.01)):
        for variant, factor, alike in (("softmax", 1.0, 0.5), ("twicing", 0.5, 0.4)):
            wrong = {"fog": [0.2, 0.4], "contrast": [0.1 + shift, 0.5]}
            scaled = {name: [factor * error for error in errors] for name, errors in wrong.items()}
            record = corrupted_record(variant, seed, scaled, alike + shift * factor)
            records[f"digits-{variant}-seed{seed}"] = record
    return {table.condition: table for table in build_tables(study, records)}


def test_corruptions_and_over_smoothing_become_columns_with_tests(write_study: WriteStudy) -> None:
    tables = tables_of(read_study(write_study(seeds=3)))
    assert set(tables) == {
        "clean", "fog, all severities", "contrast, all severities", "gaussian blur, all severities",
        "mean of all corruptions", "mean corruption error, softmax = 100", "token similarity, layer last",
    }  # fmt: skip
    fog = tables["fog, all severities"].rows
    assert [row.summary.mean for row in fog if row.summary] == pytest.approx([0.7, 0.85])
    # Over the published 15, of which the Gaussian blur is none: (0.3 + 0.3) / 2 of softmax, half of it of twicing.
    mean = tables["mean of all corruptions"].rows
    assert [row.summary.mean for row in mean if row.summary] == pytest.approx([0.7, 0.85])
    error = tables["mean corruption error, softmax = 100"]
    assert error.metric == CORRUPTION_ERROR
    assert [row.summary.values for row in error.rows if row.summary] == [
        pytest.approx([100.0] * 3), pytest.approx([50.0] * 3),
    ]  # fmt: skip
    assert tables["clean"].rows[1].verdict == NO_DIFFERENCE
    # Less similar is better, although the number is smaller.
    smooth = tables["token similarity, layer last"].rows[1]
    assert smooth.difference is not None
    assert smooth.difference.summary.mean == pytest.approx(-0.1)
    assert smooth.verdict == BETTER


def test_the_error_is_taken_from_the_baseline_of_the_same_seed(write_study: WriteStudy) -> None:
    """A seed without a baseline has no corruption error, and is still in the mean accuracy."""
    study = read_study(write_study(seeds=2))
    records = {
        "a": corrupted_record("softmax", 0, {"fog": [0.2, 0.2]}, 0.1),
        "b": corrupted_record("twicing", 0, {"fog": [0.1, 0.1]}, 0.1),
        "c": corrupted_record("twicing", 1, {"fog": [0.4, 0.4]}, 0.1),
    }
    tables = {table.condition: table for table in build_tables(study, records)}
    _, twicing = tables["mean corruption error, softmax = 100"].rows
    assert twicing.summary is not None
    assert twicing.summary.values == pytest.approx([50.0])
    _, twicing = tables["mean of all corruptions"].rows
    assert twicing.summary is not None
    assert twicing.summary.values == pytest.approx([0.9, 0.6])
