"""A finished run is evaluated on the data that it was made with, and only as itself; its card's quick start runs."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import evaluate_checkpoint
import pytest
import train_causal_lm
import train_image_classification
from evaluate_checkpoint import Settings

from hf_imgproc_attn.backbones import TASKS
from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.cards.results import METRICS
from tests.helpers import RunPython
from tests.training.conftest import TINY_GPT2, TINY_VIT

evaluate = functools.partial(evaluate_checkpoint.evaluate, force=True)
"""Runs are shared by the tests."""
QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no", "--max_steps", "30"]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "image"
    words = ["--preset", "bilateral_twicing", "--learning_rate", "1e-2", "--max_eval_samples", "90"]
    words += ["--config_overrides", *TINY_VIT, "--output_dir", str(folder), *QUIET]
    assert train_image_classification.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "text"
    words = ["--preset", "twicing", "--block_size", "48", "--tokenizer_vocab_size", "300", "--max_eval_samples", "70"]
    words += ["--config_overrides", *TINY_GPT2, "--output_dir", str(folder), *QUIET]
    assert train_causal_lm.main(words) == 0
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """``copy_of(run)``: the folder again, to be tampered with."""
    return lambda run: Path(shutil.copytree(run, tmp_path / "copy"))


def change_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(record | changes), encoding="utf-8")


def test_images_are_evaluated_clean_noisy_and_attacked(image_run: Path) -> None:
    found = evaluate(image_run, Settings(sigmas=[0.25], epsilons=[8 / 255, 0.1], seed=4))
    assert json.loads((image_run / "robustness.json").read_text(encoding="utf-8")) == found
    record = json.loads((image_run / "run.json").read_text(encoding="utf-8"))
    assert found["weights_sha256"] == record["weights_sha256"]
    assert found["split"] == "test"
    assert found["versions"]["torch"]
    assert found["device"]["type"] == "cpu"
    assert found["seconds"] > 0
    clean, noisy, *attacked = found["results"]
    assert clean["value"] == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert (noisy["disturbance"], noisy["parameters"], noisy["seed"]) == ("Gaussian noise", {"sigma": 0.25}, 4)
    assert [entry["parameters"] for entry in attacked] == [{"epsilon": 8 / 255}, {"epsilon": 0.1}]
    assert {(entry["split"], entry["samples"], entry["unit"]) for entry in found["results"]} == {
        ("test", 90, "images")
    }
    assert set(found["definitions"]) == {"Gaussian noise", "sigma", "FGSM", "epsilon"}
    again = evaluate(image_run, Settings(sigmas=[0.25], epsilons=[8 / 255, 0.1], seed=4))
    assert again["results"] == found["results"]
    assert evaluate(image_run, Settings(sigmas=[], epsilons=[]))["results"] == [clean]


def test_a_file_that_cannot_be_written_is_found_before_work_begins(
    image_run: Path, copy_of: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(image_run)
    (folder / "robustness.json").unlink(missing_ok=True)
    (folder / "robustness.json").mkdir()
    monkeypatch.setattr(evaluate_checkpoint, "_measure_images", lambda *_: pytest.fail("work has begun"))
    assert evaluate_checkpoint.main([str(folder)]) == 2
    assert "robustness.json must be a file, got" in capsys.readouterr().err


def test_an_earlier_evaluation_is_replaced_only_on_request(
    image_run: Path, copy_of: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(image_run)
    (folder / "robustness.json").write_text("{}", encoding="utf-8")
    with monkeypatch.context() as context:
        context.setattr(evaluate_checkpoint, "_measure_images", lambda *_: pytest.fail("work has begun"))
        assert evaluate_checkpoint.main([str(folder)]) == 2
    message = f"the run's robustness.json '{folder}/robustness.json' is there already; --force replaces it"
    assert capsys.readouterr().err == f"error: {message}\n"
    assert (folder / "robustness.json").read_text(encoding="utf-8") == "{}"
    assert evaluate_checkpoint.main([str(folder), "--force", "--sigmas", "--epsilons", "--max_samples", "9"]) == 0
    assert json.loads((folder / "robustness.json").read_text(encoding="utf-8"))["results"][0]["samples"] == 9


def test_text_is_evaluated_clean_and_with_swapped_words(text_run: Path) -> None:
    found = evaluate(text_run)
    record = json.loads((text_run / "run.json").read_text(encoding="utf-8"))
    values = {(entry["disturbance"], entry["metric"]): entry["value"] for entry in found["results"]}
    for metric in ("perplexity", "word_perplexity"):
        assert values["clean", metric] == pytest.approx(record["metrics"]["test"][metric], rel=1e-4)
        assert values["word swap", metric] != values["clean", metric]
    counts = record["data_fingerprint"]["test"]
    assert [entry["samples"] for entry in found["results"][:2]] == [counts["tokens"] - 1, counts["words"]]
    swapped = evaluate(text_run, Settings(fraction=1.0, seed=1))["results"][3]
    assert (swapped["parameters"], swapped["seed"], swapped["samples"]) == ({"fraction": 1.0}, 1, counts["words"])
    assert len({swapped["value"], *values.values()}) == 5


def test_a_column_that_an_older_run_ignored_is_ignored(text_run: Path, copy_of: Any) -> None:
    folder = copy_of(text_run)
    arguments = json.loads((folder / "run.json").read_text(encoding="utf-8"))["arguments"]
    arguments["data"]["text_column_name"] = "text"
    change_record(folder, arguments=arguments)
    assert evaluate(folder)["results"] == evaluate(text_run)["results"]


def test_validation_split_and_limits(image_run: Path, text_run: Path) -> None:
    record = json.loads((image_run / "run.json").read_text(encoding="utf-8"))
    options = {"sigmas": [], "epsilons": []}
    (clean,) = evaluate(image_run, Settings(split="validation", **options))["results"]
    assert clean["value"] == pytest.approx(record["metrics"]["validation"]["accuracy"])
    assert clean["split"] == "validation"
    (clean,) = evaluate(image_run, Settings(max_samples=50, **options))["results"]
    assert clean["samples"] == 50
    (clean,) = evaluate(image_run, Settings(max_samples=5000, **options))["results"]
    assert clean["samples"] == 90
    assert evaluate(text_run, Settings(max_samples=8))["results"][1]["samples"] < 100


def test_the_card_shows_what_was_evaluated(image_run: Path, text_run: Path) -> None:
    for folder, name in ((image_run, "FGSM, epsilon 16/255"), (text_run, "word swap, fraction 0.015")):
        last = evaluate(folder)["results"][-1]
        card = render_card(load_results(folder), repo_id="you/model", revision="v1")
        metric, value = last["metric"], last["value"]
        shown = f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:,.2f}"
        label = METRICS[metric]
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} | {label} | test |")]
        assert f"| {last['samples']:,} {last['unit']} |" in row
        assert f"| {shown} |" in row


def test_other_weights_are_refused(image_run: Path, copy_of: Any) -> None:
    folder = copy_of(image_run)
    evaluate(folder, Settings(sigmas=[], epsilons=[]))
    robustness = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))
    robustness["weights_sha256"] = {"model.safetensors": "0"}
    (folder / "robustness.json").write_text(json.dumps(robustness), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json: the robustness was measured on other weights"):
        load_results(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold the weights that its run\.json names"):
        evaluate(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold the weights that its run\.json names .*, got \{\}"):
        evaluate(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "running"}, "the run must have finished, got status 'running'"),
        ({"task": "detection"}, f"task must be one of {', '.join(TASKS)}, got 'detection'"),
        ({"data_fingerprint": {"test": {"rows": 90, "sha256": "0"}}}, "the test split must be the one"),
        ({"data_fingerprint": {}}, "the test split must be the one"),
    ],
)
def test_other_runs_and_data_are_refused(image_run: Path, copy_of: Any, changes: dict[str, Any], message: str) -> None:
    folder = copy_of(image_run)
    (folder / "robustness.json").unlink(missing_ok=True)
    change_record(folder, **changes)
    with pytest.raises(ValueError, match=message):
        evaluate(folder)
    assert not (folder / "robustness.json").exists()


def test_data_options_of_another_version_are_refused(image_run: Path, copy_of: Any) -> None:
    folder = copy_of(image_run)
    arguments = json.loads((folder / "run.json").read_text(encoding="utf-8"))["arguments"]
    arguments["data"]["colour_jitter"] = 0.1
    change_record(folder, arguments=arguments)
    with pytest.raises(ValueError, match="data options that this version does not know: .*colour_jitter"):
        evaluate(folder)


def test_the_training_split_is_never_evaluated(image_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of test, validation, got 'train'"):
        Settings(split="train")
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    datasets.Dataset.from_dict({"text": [f"line {index} of a text" for index in range(40)]}).to_parquet(
        data / "train.parquet"
    )
    words = ["--dataset_name", str(data), "--block_size", "16", "--tokenizer_vocab_size", "270", "--preset", "softmax"]
    words += ["--config_overrides", *TINY_GPT2, "--output_dir", str(folder), *QUIET, "--max_steps", "1"]
    assert train_causal_lm.main(words) == 0
    with pytest.raises(
        ValueError, match=r"split must be one that .* has \(train, validation\) and that is not trained"
    ):
        evaluate(folder)
    assert {entry["split"] for entry in evaluate(folder, Settings(split="validation"))["results"]} == {"validation"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epsilons", "8/0"], "--epsilons: must be a number or a fraction such as 8/255, got '8/0'"),
        (["--sigmas", "much"], "--sigmas: must be a number or a fraction such as 8/255, got 'much'"),
        (["--sigmas", "0.1", "-0.1"], "sigmas must be > 0 and <= 1, got -0.1"),
        (["--epsilons", "8"], "epsilons must be > 0 and <= 1, got 8.0"),
        (["--fraction", "0"], "fraction must be > 0 and <= 1, got 0.0"),
        (["--fraction", "0.1"], "fraction is not used with a run of task image-classification, got 0.1"),
        (["--seed", "-1"], "seed must be an integer >= 0, got -1"),
        (["--max_samples", "0"], "max_samples must be an integer >= 1, got 0"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--sigma_s", "1"], "unrecognized arguments: --sigma_s"),
    ],
)
def test_mistakes_are_one_line(
    image_run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert evaluate_checkpoint.main([str(image_run), "--force", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_settings_of_the_other_task_and_folders_without_a_run_are_refused(text_run: Path, tmp_path: Path) -> None:
    for name in ("sigmas", "epsilons"):
        with pytest.raises(ValueError, match=f"{name} is not used with a run of task causal-lm"):
            evaluate(text_run, Settings(**{name: [0.1]}))
    with pytest.raises(ValueError, match=r"run\.json cannot be read: No such file"):
        evaluate(tmp_path)


def test_command_line_prints_the_values(image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_checkpoint.main([str(image_run), "--sigmas", "--epsilons", "4/255", "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    robustness = json.loads((image_run / "robustness.json").read_text(encoding="utf-8"))
    assert [line.split("  ")[0] for line in lines[:2]] == ["clean", "FGSM, epsilon 4/255"]
    assert [entry["parameters"] for entry in robustness["results"]] == [{}, {"epsilon": 4 / 255}]
    for line, entry in zip(lines, robustness["results"], strict=False):
        assert line.endswith(f"{100 * entry['value']:.2f} %")
    assert lines[-1].endswith("robustness.json")


@pytest.mark.parametrize("task", ["image", "text"])
def test_quick_start_of_the_card_runs_without_the_package(
    request: pytest.FixtureRequest, tmp_path: Path, run_python: RunPython, task: str
) -> None:
    from PIL import Image

    folder: Path = request.getfixturevalue(f"{task}_run")
    card = render_card(load_results(folder), repo_id=str(folder), revision="main")
    (program,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    (tmp_path / "cwd").mkdir()
    Image.new("L", (8, 8), 120).save(tmp_path / "cwd" / "image.png")
    result = run_python("-c", f"import sys\nsys.modules['hf_imgproc_attn'] = None\n{program}")
    assert result.returncode == 0, result.stderr
    assert ("'score'" if task == "image" else "The import statement") in result.stdout
