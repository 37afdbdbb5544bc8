"""``train-text-classification``: a run from end to end, its card and evaluation, its data, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import train_text_classification
from evaluate_checkpoint import Settings, evaluate
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, pipeline

from hf_imgproc_attn import ImgProcBertForSequenceClassification, ImgProcGPT2Config
from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.hub.run_files import read_run
from hf_imgproc_attn.hub.verification import check_loads
from hf_imgproc_attn.training_support.arguments import LabelledTextDataArguments
from hf_imgproc_attn.training_support.labelled_text import TOPICS, TokenizedTexts, load_labelled_texts
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

TINY = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]
QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"]


def run(folder: Path, *words: str, overrides: list[str] | None = None) -> int:
    """The exit status of the script, in this process."""
    sizes = TINY if overrides is None else overrides
    options = ["--config_overrides", *sizes] if sizes else []
    return train_text_classification.main(["--output_dir", str(folder), *QUIET, *options, *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded data."""
    folder = tmp_path_factory.mktemp("runs") / "topics"
    words = ["--preset", "twicing", "--max_steps", "150", "--learning_rate", "3e-3", "--tokenizer_vocab_size", "700"]
    assert run(folder, *words, "--max_length", "24", overrides=[*TINY, "hidden_size=48"]) == 0
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of labelled texts in two columns."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 8)):
        rows = [{"review": f"{'good' if i % 2 else 'bad'} film number {i}", "verdict": i % 2} for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


COLUMNS = ("--text_column_name", "review", "--label_column_name", "verdict")


def test_a_run_learns_reloads_and_is_recorded(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    losses = [loss for _, loss in record["train_loss"]]
    assert sum(losses[-3:]) / 3 < 0.85 * losses[0]
    assert record["task"] == "text-classification"
    assert record["metrics"]["test"]["accuracy"] > 0.3, "the largest class has a quarter"
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    assert type(model) is ImgProcBertForSequenceClassification
    assert (model.config.max_position_embeddings, model.config.boosting) == (24, "twicing")
    assert list(model.config.id2label.values()) == list(TOPICS)
    assert record["parameters"]["total"] == model.num_parameters()
    classify = pipeline("text-classification", model=str(finished), device="cpu")
    (answer,) = classify("Strings have a method that splits them into words. " * 30, truncation=True)
    assert answer["label"] in TOPICS


def test_evaluation_and_card(finished: Path) -> None:
    robustness = evaluate(finished, Settings(fraction=0.3))
    clean, swapped = robustness["results"]
    record = json.loads((finished / "run.json").read_text())
    assert clean["value"] == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert (swapped["family"], swapped["unit"], swapped["parameters"]) == ("word swap", "texts", {"fraction": 0.3})
    assert swapped["value"] < clean["value"]
    card = render_card(load_results(finished), repo_id="ann/topics", revision="main")
    assert "A text encoder of the BERT architecture with `twicing` self-attention" in card
    assert f"{100 * clean['value']:.2f} %" in card
    assert f"{100 * swapped['value']:.2f} %" in card
    for part in ("pipeline_tag: text-classification", "- bert\n", 'pipeline("text-classification"', "test texts"):
        assert part in card
    assert "imgproc-attn train-text-classification" in card
    run = read_run(finished)
    assert run.config["model_type"] == "imgproc_bert"
    check_loads(run)  # in a process without the package


def test_the_embedded_paragraphs_are_in_one_split_each_and_stay_there() -> None:
    splits, names = load_labelled_texts(LabelledTextDataArguments(dataset_name="pydoc_topics"))
    assert names == list(TOPICS)
    sets = {split: set(part.texts) for split, part in splits.items()}
    assert (
        sum(map(len, sets.values()))
        == len(set().union(*sets.values()))
        == sum(len(part.texts) for part in splits.values())
    )
    for part in splits.values():
        assert set(part.labels) == set(range(len(TOPICS)))
    assert 0.7 < len(sets["train"]) / len(set().union(*sets.values())) < 0.9


def test_texts_are_cut_between_their_first_and_last_token(texts: Path) -> None:
    splits, _ = load_labelled_texts(
        LabelledTextDataArguments(
            dataset_name=str(texts), text_column_name="review", label_column_name="verdict", validation_fraction=0.25
        )
    )
    assert {split: len(part.texts) for split, part in splits.items()} == {"train": 18, "validation": 6, "test": 8}
    assert np.bincount(splits["validation"].labels).tolist() == [3, 3]
    tokenizer = train_tokenizer(splits["train"].texts, 280, for_classifier=True)
    rows = TokenizedTexts(splits["test"], tokenizer, 6)
    assert len(rows) == 8
    ids = rows[1]["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (6, tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert rows[1]["labels"] == 1
    pair = tokenizer("a", "b")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]


def test_a_stock_encoder_is_converted_on_the_way(texts: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["good bad film number"], 270, for_classifier=True)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "num_hidden_layers": 2}
    sizes |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    words = ("--model_name_or_path", str(tmp_path / "stock"), "--dataset_name", str(texts), *COLUMNS)
    assert run(tmp_path / "tuned", *words, "--preset", "neutreno", "--max_steps", "2", overrides=[]) == 0
    record = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert (record["model_config"]["feedback"], record["model_config"]["learn_feedback"]) == ("neutreno", True)
    assert record["arguments"]["data"]["max_length"] is None
    again = ("--model_name_or_path", str(tmp_path / "tuned"), "--dataset_name", str(texts), *COLUMNS)
    assert run(tmp_path / "again", *again, "--max_steps", "1", overrides=[]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max_length", "2"), "max_length must be an integer >= 3, got 2"),
        (("--tokenizer_vocab_size", "258"), "tokenizer_vocab_size must be an integer >= 260, got 258"),
        (("--label_column_name", "nothing"), "label_column_name must be a column of the train split"),
        (("--preset", "nope"), "blind to the order of the words"),
        (("--config_overrides", "max_position_embeddings=8", "--max_length", "9"), "max_length must not exceed"),
        (("--config_overrides", "vocab_size=8"), "vocab_size must hold the tokenizer's"),
        (("--config_overrides", "n_layer=8"), "config_overrides must name fields"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = () if "--tokenizer_vocab_size" in words else ("--tokenizer_vocab_size", "300")
    assert run(tmp_path / "run", *small, *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The library makes an empty one up, to which every word is unknown."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "stock")
    assert run(tmp_path / "run", "--model_name_or_path", str(tmp_path / "stock"), overrides=[]) == 2
    assert "tokenizer_name must be a tokenizer with a vocabulary, got" in capsys.readouterr().err


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ImgProcGPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    assert run(tmp_path / "run", "--model_name_or_path", str(tmp_path / "gpt2"), overrides=[]) == 2
    assert "must be a checkpoint of type imgproc_bert or bert" in capsys.readouterr().err
