"""``train-sequences`` and ``train-recall``: runs from end to end, their data and tokenizer, cards, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_recall
import train_sequence_classification
from evaluate_checkpoint import Settings, evaluate
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_imgproc_attn import ImgProcBertForSequenceClassification, ImgProcGPT2LMHeadModel, cli
from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.sequences import SEQUENCE_TASKS
from hf_imgproc_attn.training_support.arguments import GENERATED_ANSWERS, GENERATED_CLASSES
from hf_imgproc_attn.training_support.metrics import answer_metrics, answers
from hf_imgproc_attn.training_support.sequence_arguments import RecallDataArguments, SequenceDataArguments
from hf_imgproc_attn.training_support.sequence_data import TokenSequences, load_sequences, sequence_tokenizer
from tests.training.conftest import WriteImages

SCRIPTS: dict[str, Any] = {"recall": train_recall, "classes": train_sequence_classification}
TINY = {
    "recall": ["n_embd=16", "n_layer=2", "n_head=2"],
    "classes": ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32"],
}
QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"]


def run(kind: str, folder: Path, *words: str, sizes: tuple[str, ...] = ()) -> int:
    """The exit status of a script, in this process."""
    overrides = ["--config_overrides", *TINY[kind], *sizes]
    status: int = SCRIPTS[kind].main(["--output_dir", str(folder), *QUIET, *overrides, *words])
    return status


def read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def quick_start(card: str, folder: Path) -> str:
    """What a card's first code block prints, when the repository is a folder."""
    code = card.split("```python\n")[1].split("```")[0]
    code = re.sub(r'model="[^"]*", revision="main", trust_remote_code=True', f"model={str(folder)!r}", code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.fixture(scope="module")
def recalling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a recall so small that it is learned in seconds."""
    folder = tmp_path_factory.mktemp("runs") / "recall"
    words = [
        "--dataset_name",
        "noisy_recall",
        "--sequence_settings",
        "length=16",
        "vocab_size=6",
        "noise_vocab_size=3",
    ]
    words += ["--preset", "twicing", "--max_train_samples", "3000", "--max_eval_samples", "100", "--max_steps", "150"]
    words += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "64"]
    assert run("recall", folder, *words, sizes=("n_embd=32",)) == 0
    return folder


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on very short ListOps."""
    folder = tmp_path_factory.mktemp("runs") / "listops"
    words = ["--sequence_settings", "min_length=3", "max_length=8", "max_depth=2", "--max_train_samples", "1500"]
    words += ["--preset", "bilateral", "--max_steps", "120", "--learning_rate", "1e-2", "--max_eval_samples", "200"]
    assert run("classes", folder, *words, sizes=("classifier_pooling=mean", "hidden_size=32")) == 0
    return folder


def test_recall_is_learned_recorded_and_reloaded(recalling: Path) -> None:
    record = read_record(recalling)
    assert record["task"] == "recall"
    assert record["metrics"]["test"]["accuracy"] > 0.5, "a third by chance"
    fingerprint = record["data_fingerprint"]["test"]
    assert (fingerprint["task"], fingerprint["format"], fingerprint["rows"]) == ("noisy_recall", 1, 100)
    assert fingerprint["settings"]["length"] == 16
    model, tokenizer = AutoModelForCausalLM.from_pretrained(recalling), AutoTokenizer.from_pretrained(recalling)
    assert type(model) is ImgProcGPT2LMHeadModel
    assert model.config.n_positions == tokenizer.model_max_length == 16
    inputs = tokenizer("k0 v1 k2 v0 k1 v2 n1 n0 k2", return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 9)
    likeliest = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode(likeliest).startswith("v")


def test_recall_under_stronger_noise(recalling: Path) -> None:
    results = evaluate(recalling, Settings(max_samples=60))["results"]
    clean, *noisy = results
    assert [result["parameters"] for result in noisy] == [{"rate": rate} for rate in (0.4, 0.6, 0.8)]
    assert {result["disturbance"] for result in noisy} == {"noise tokens"}
    assert clean["unit"] == "answers"
    assert noisy[-1]["samples"] < clean["samples"], "fewer pairs, so fewer questions"
    again = evaluate(recalling, Settings(fraction=0.5), force=True)
    assert [result["parameters"] for result in again["results"]] == [{}, {"rate": 0.5}]
    assert again["results"][0]["value"] == pytest.approx(read_record(recalling)["metrics"]["test"]["accuracy"])
    assert set(again["definitions"]) == {"noise tokens", "rate"}
    card = render_card(load_results(recalling), repo_id="ann/recall", revision="main")
    for part in ("noisy_recall, generated by hf_imgproc_attn.sequences (seed 0)", "test answers", "train-recall"):
        assert part in card
    assert "datasets:" not in card
    assert re.fullmatch(r"[kvn]\d", quick_start(card, recalling).strip()), "a word of the task"


def test_classes_are_learned_recorded_and_reloaded(classified: Path) -> None:
    record = read_record(classified)
    assert record["task"] == "sequence-classification"
    assert record["metrics"]["test"]["accuracy"] > 0.3, "a tenth by chance"
    model = AutoModelForSequenceClassification.from_pretrained(classified)
    assert type(model) is ImgProcBertForSequenceClassification
    assert (model.config.classifier_pooling, model.config.max_position_embeddings) == ("mean", 8)
    assert list(model.config.id2label.values()) == list("0123456789")
    classify = pipeline("text-classification", model=str(classified), device="cpu")
    (answer,) = classify("[MAX 4 9 [MIN 1 2 ] ]", truncation=True)
    assert answer["label"] in set("0123456789")
    results = evaluate(classified, Settings(max_samples=200))["results"]
    assert [result["family"] for result in results] == ["clean"]
    assert results[0]["value"] == pytest.approx(record["metrics"]["test"]["accuracy"])
    card = render_card(load_results(classified), repo_id="ann/listops", revision="main")
    assert "listops_short, generated by hf_imgproc_attn.sequences (seed 0)" in card
    assert quick_start(card, classified).startswith("[{'label': '")
    with pytest.raises(UsageError, match="fraction is not used with a run of task sequence-classification"):
        evaluate(classified, Settings(fraction=0.5), force=True)


def test_the_tokenizer_reads_what_the_generator_writes() -> None:
    for name, for_classifier in (("listops_short", True), ("mqar_short", False)):
        kind = SequenceDataArguments if for_classifier else RecallDataArguments
        data = load_sequences(kind(dataset_name=name, max_train_samples=5, max_eval_samples=1))
        tokenizer = sequence_tokenizer(data.vocabulary, for_classifier=for_classifier)
        rows = TokenSequences(data.splits["train"], tokenizer)
        assert len(rows) == 5
        for index, tokens in enumerate(data.splits["train"].tokens):
            words = " ".join(data.vocabulary[token] for token in tokens)
            assert rows[index]["input_ids"].tolist() == tokenizer(words)["input_ids"]
            assert tokenizer.decode(rows[index]["input_ids"], skip_special_tokens=True) == words
        assert tokenizer("nonsense")["input_ids"][-1] == tokenizer.unk_token_id


def test_only_answers_have_labels_and_they_are_where_the_model_predicts_them() -> None:
    data = load_sequences(RecallDataArguments(max_train_samples=8, max_eval_samples=1))
    tokenizer = sequence_tokenizer(data.vocabulary, for_classifier=False)
    item = TokenSequences(data.splits["train"], tokenizer)[3]
    asked = torch.nonzero(item["labels"] != -100).ravel()
    assert len(asked) == 8
    words = tokenizer.convert_ids_to_tokens(item["input_ids"])
    wanted = tokenizer.convert_ids_to_tokens(item["labels"][asked])
    shown = dict(zip(words[0:16:2], words[1:16:2], strict=True))
    assert [shown[words[place - 1]] for place in asked] == wanted


def test_accuracy_counts_what_is_asked() -> None:
    labels = np.array([[-100, -100, 4, -100], [-100, 2, -100, 3]])
    logits = torch.zeros(2, 4, 5)
    logits[0, 1, 4] = logits[1, 0, 2] = logits[1, 2, 1] = 1
    found = tuple(part.numpy() for part in answers(logits, torch.from_numpy(labels)))
    prediction: Any = type("Prediction", (), {"predictions": found, "label_ids": labels})
    # Of five words one has the logit 1, in two of three answers the right one.
    loss = math.log(4 + math.e) - 2 / 3
    assert answer_metrics(prediction) == {"loss": pytest.approx(loss), "accuracy": pytest.approx(2 / 3)}


def test_pixels_become_tokens(tmp_path: Path, write_images: WriteImages) -> None:
    folder = write_images("photos", size=8, train=[0, 1, 2] * 8, test=[0, 1, 2])
    data = load_sequences(SequenceDataArguments(dataset_name=str(folder), validation_fraction=0.25))
    assert (data.longest, len(data.vocabulary), data.label_names) == (64, 256, ["a", "b", "c"])
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 18, "validation": 6, "test": 3}
    import datasets

    first = datasets.load_dataset(str(folder), split="test")[0]["img"]
    red, green, blue = np.asarray(first, dtype=np.float64)[0, 5]
    assert data.splits["test"].tokens[0][5] == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=1)
    words = ["--dataset_name", str(folder), "--max_steps", "2", "--preset", "twicing"]
    assert run("classes", tmp_path / "run", *words) == 0
    record = read_record(tmp_path / "run")
    assert record["data_fingerprint"]["test"]["task"] == "pixels"
    assert record["model_config"]["max_position_embeddings"] == 65


def test_scripts_name_the_tasks_that_there_are() -> None:
    for names, has_classes in ((GENERATED_CLASSES, True), (GENERATED_ANSWERS, False)):
        assert names == tuple(
            name for name, task in SEQUENCE_TASKS.items() if (task.rules.classes is not None) == has_classes
        )


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("recall", "--dataset_name mqar_shor", "got 'mqar_shor'; did you mean mqar_short?"),
        ("recall", "--dataset_name listops", "which has a class for each sequence: train_sequence_classification.py"),
        ("classes", "--dataset_name mqar", "whose answers are tokens: train_recall.py trains on it"),
        ("classes", "--dataset_name nowhere", "dataset_name must be digits, a local path or a Hub data set"),
        ("classes", "--dataset_name digits --sequence_settings max_depth=3", "sequence_settings must be empty for im"),
        ("recall", "--sequence_settings pairs", "sequence_settings must be key=value, got 'pairs'"),
        ("recall", "--sequence_settings pairs=[", "sequence_settings must have values in YAML, got 'pairs=['"),
        ("recall", "--sequence_settings pair=3", "got 'pair'; did you mean pairs?"),
        ("recall", "--sequence_settings pairs=300", "pairs must be from 1 to length / 4 = 16, got 300"),
        ("recall", "--sequence_seed=-1", "sequence_seed must be an integer >= 0, got -1"),
        ("recall", "--dataset_config_name x", "dataset_config_name must be none for data set 'mqar_short'"),
        ("recall", "--config_overrides n_positions=8", "block_size must not exceed the model's 8 positions, got 64"),
        ("classes", "--config_overrides max_position_embeddings=8", "max_length must not exceed the model's 8 posit"),
        ("classes", "--config_overrides classifier_pooling=max", "classifier_pooling"),
    ],
)
def test_mistakes_are_one_line(
    kind: str, words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--max_train_samples", "40", "--max_eval_samples", "8", "--max_steps", "1"]
    assert run(kind, tmp_path / "run", *small, *words.split()) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_commands_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train-recall", "train-sequences"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "--sequence_settings" in capsys.readouterr().out


def test_a_yaml_file_gives_settings_as_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sequence_settings: {pairs: 4, power: 1.0}\n", encoding="utf-8")
    arguments = train_recall.read_arguments(["--config", str(path), "--sequence_settings", "pairs=2"])
    assert arguments.data.sequence_settings == ["pairs=4", "power=1.0", "pairs=2"]
    data = load_sequences(arguments.data)
    assert data.splits["test"].origin["settings"]["pairs"] == 2
