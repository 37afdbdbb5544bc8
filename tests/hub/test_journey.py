"""The whole way, as users walk it: train with ``--push_to_hub``, use the checkpoint elsewhere, fine-tune it by its id.

"Elsewhere" is a fresh process with an empty cache in which this package cannot be imported.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.records import weights_sha256
from tests.helpers import ROOT, run_command
from tests.hub.conftest import IMAGE_RUN, TEXT_RUN, TOKEN
from tests.hub.server import HubServer

ELSEWHERE = """
import json, sys
sys.modules["hf_imgproc_attn"] = None  # every import of it fails
from transformers import pipeline
task, name, revision, given, options = sys.argv[1:]
answer = pipeline(task, model=name, revision=revision, trust_remote_code=True, device="cpu")
assert any(type(part).__module__.startswith("transformers_modules.") for part in answer.model.modules())
print(json.dumps(answer(given, **json.loads(options))))
"""


def run_elsewhere(hub: HubServer, home: Path, *arguments: str, **options: Any) -> Any:
    """What a pipeline answers without a token, without the package, with an empty cache."""
    environment = {key: value for key, value in hub.environment(home).items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, *arguments, json.dumps(options)]
    done = run_command(command, env=environment, cwd=home.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def train(*arguments: str) -> str:
    command = [sys.executable, "-m", "hf_imgproc_attn.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_command(command, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def revision_in(printed: str) -> str:
    found = re.search(r"^revision: +([0-9a-f]{40}) ", printed, re.MULTILINE)
    assert found, printed
    return found[1]


def test_images_from_training_to_a_pipeline_and_on(hub: HubServer, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import pipeline

    folder = tmp_path / "run"
    words = [*IMAGE_RUN, "--preset", "bilateral_twicing", "--push_to_hub", "--hub_model_id", "digits"]
    words += ["--license", "cc-by-4.0"]
    revision = revision_in(train("train-image", *words, "--output_dir", str(folder)))
    repository = hub.repo("ann/digits")
    (tag,) = repository.tags
    assert repository.tags[tag] == repository.head == revision
    assert len(repository.commits()) == 2
    assert "training_args.bin" not in repository.files()
    # Ours, not the card that the Trainer writes on a push.
    card = repository.files()["README.md"].decode()
    assert f'revision="{tag}"' in card
    assert "generated_from_trainer" not in card
    assert "license: cc-by-4.0\n" in card
    assert "--license cc-by-4.0" in card

    picture = str(tmp_path / "zero.png")
    Image.fromarray((load_digits().images[0] * 15.9).astype("uint8")).convert("RGB").save(picture)
    arguments = ("image-classification", "ann/digits", revision, picture)
    answer = run_elsewhere(hub, tmp_path / "elsewhere", *arguments, top_k=10)
    expected = pipeline("image-classification", model=str(folder), device="cpu")(picture, top_k=10)
    scores = {item["label"]: item["score"] for item in expected}
    assert len(scores) == 10
    assert {item["label"]: item["score"] for item in answer} == pytest.approx(scores, abs=1e-5)

    # Fine-tuned by its id, with other data settings and seed.
    again = tmp_path / "again"
    words = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--max_eval_samples", "40"]
    train("train-image", *words, "--model_name_or_path", "ann/digits", "--max_steps", "2", "--output_dir", str(again))
    record = json.loads((again / "run.json").read_text(encoding="utf-8"))
    assert record["model_config"]["boosting"] == "twicing"
    assert record["weights_sha256"] == weights_sha256(str(again)) != weights_sha256(str(folder))


def test_text_from_training_to_a_pipeline_and_on(hub: HubServer, tmp_path: Path) -> None:
    from transformers import pipeline

    folder = tmp_path / "run"
    words = [*TEXT_RUN, "--preset", "bilateral_twicing", "--push_to_hub", "--hub_model_id", "ann/words"]
    revision = revision_in(train("train-lm", *words, "--output_dir", str(folder)))
    assert hub.repo("ann/words").head == revision
    options = {"max_new_tokens": 8, "do_sample": False}
    arguments = ("text-generation", "ann/words", revision, "The import")
    answer = run_elsewhere(hub, tmp_path / "elsewhere", *arguments, **options)
    assert answer == pipeline("text-generation", model=str(folder), device="cpu")("The import", **options)
    assert len(answer[0]["generated_text"]) > len("The import")

    again = tmp_path / "again"
    words = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--max_eval_samples", "40"]
    words += ["--model_name_or_path", "ann/words", "--max_train_samples", "300", "--max_steps", "2"]
    train("train-lm", *words, "--output_dir", str(again))
    record = json.loads((again / "run.json").read_text(encoding="utf-8"))
    assert record["model_config"]["vocab_size"] == 300
    assert record["weights_sha256"] != weights_sha256(str(folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hub_token", "hf_secret"], "hub_token is not used by this script"),
        (["--hub_strategy", "every_save"], "hub_strategy is not used by this script: a run is published once"),
    ],
)
def test_options_that_would_leak_or_publish_half_a_run(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_image_classification

    words = [*IMAGE_RUN, "--push_to_hub", *words, "--output_dir", str(tmp_path / "run")]
    assert train_image_classification.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hf_secret" not in error


def test_a_licence_that_the_hub_does_not_know_costs_no_training(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_image_classification

    words = [*IMAGE_RUN, "--push_to_hub", "--hub_model_id", "ann/digits", "--output_dir", str(tmp_path / "run")]
    assert train_image_classification.main([*words, "--license", "Apache 2"]) == 2
    assert '"license" must be one of' in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(KeyError):
        hub.repo("ann/digits")


def test_a_refused_token_costs_no_training(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_image_classification

    monkeypatch.delenv("HF_TOKEN")
    words = [*IMAGE_RUN, "--push_to_hub", "--hub_model_id", "ann/digits", "--output_dir", str(tmp_path / "run")]
    assert train_image_classification.main(words) == 2
    assert "there is no token" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


# Trainer switches the bars off and on again, which the tests' environment forbids.
@pytest.mark.filterwarnings("ignore:Cannot enable progress bars:UserWarning")
def test_a_hub_that_fails_at_the_end_leaves_the_finished_run(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_image_classification

    folder = tmp_path / "run"
    hub.fail("commit", status=400, times=None)
    words = [*IMAGE_RUN, "--push_to_hub", "--hub_model_id", "ann/digits", "--output_dir", str(folder)]
    words += ["--hub_revision", "trial", "--hub_private_repo", "true"]
    assert train_image_classification.main(words) == 2
    error = capsys.readouterr().err
    assert "the run is finished, but not published: could not upload to ann/digits: the Hub answered 400" in error
    assert f"imgproc-attn publish {folder} --repo-id ann/digits --private --revision trial" in error
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert hub.repo("ann/digits").tags == {}
