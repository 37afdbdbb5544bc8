"""``train-sequences`` on pairs of texts: a run from end to end, the arena's files, the stand-in, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_sequence_classification
import train_text_classification
from evaluate_checkpoint import Settings, evaluate
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_imgproc_attn import ImgProcBertForSequenceClassification
from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.hub.fresh_process import check_folder
from hf_imgproc_attn.robustness.loading import task_of
from hf_imgproc_attn.study.smoothing import token_similarity
from hf_imgproc_attn.training_support.labelled_text import paragraphs
from hf_imgproc_attn.training_support.sequence_arguments import SequenceDataArguments
from hf_imgproc_attn.training_support.sequence_data import load_sequences
from hf_imgproc_attn.training_support.text_pairs import PairRows, byte_tokenizer, load_pairs

TINY = ["hidden_size=8", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=8"]
QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"]
FEW = ["--max_train_samples", "24", "--max_eval_samples", "10", "--per_device_train_batch_size", "4"]


def run(folder: Path, *words: str) -> int:
    options = ["--output_dir", str(folder), *QUIET, *FEW, "--max_steps", "2", "--max_length", "20"]
    return train_sequence_classification.main(
        [*options, "--config_overrides", *TINY, "classifier_pooling=mean", *words]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    assert run(folder, "--dataset_name", "topic_pairs", "--preset", "bilateral_twicing") == 0
    return folder


def test_a_run_from_end_to_end(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    assert (record["task"], record["model_config"]["classifier_pairs"]) == ("sequence-classification", True)
    assert record["model_config"]["max_position_embeddings"] == 20
    assert record["data_fingerprint"]["test"]["rows"] == 10
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert type(model) is ImgProcBertForSequenceClassification
    assert list(model.config.id2label.values()) == ["different topics", "same topic"]
    (clean,) = evaluate(trained, Settings())["results"]
    assert clean["value"] == pytest.approx(record["metrics"]["test"]["accuracy"])
    assert (clean["samples"], clean["unit"]) == (10, "sequences")
    similar = token_similarity(trained, "test", 4)
    assert [result["parameters"]["layer"] for result in similar] == [1, "last"]
    with pytest.raises(UsageError, match="with ImgProcBertForSequenceClassification for pairs of texts"):
        task_of(str(trained))
    assert check_folder(str(trained)) == {"class": "ImgProcBertForSequenceClassification"}


def test_its_card_says_how_to_ask(trained: Path) -> None:
    card = render_card(load_results(trained), repo_id="ann/pairs", revision="main")
    assert "pairs of paragraphs, of one topic or not, of the manual of Python" in card
    assert "pipeline(" not in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace('"ann/pairs", "revision": "main"', repr(str(trained)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() in ("different topics", "same topic")


def test_a_run_goes_on_from_a_checkpoint_of_pairs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [
        "--output_dir",
        str(tmp_path / "on"),
        *QUIET,
        *FEW,
        "--max_steps",
        "1",
        "--model_name_or_path",
        str(trained),
    ]
    assert train_text_classification.main(start) == 2
    assert "classifier_pairs must be False for data that are no pairs, got True" in capsys.readouterr().err
    assert train_sequence_classification.main([*start, "--dataset_name", "topic_pairs", "--max_length", "20"]) == 0
    record = json.loads((tmp_path / "on" / "run.json").read_text(encoding="utf-8"))
    assert record["model_config"]["boosting"] == "twicing"


def test_the_stand_in_is_half_of_one_topic_and_never_shared_between_splits() -> None:
    topic = {
        text: label for rows in paragraphs().values() for text, label in zip(rows["text"], rows["label"], strict=True)
    }
    splits, names = load_pairs(SequenceDataArguments(dataset_name="topic_pairs"))
    assert names == ["different topics", "same topic"]
    seen: dict[str, set[str]] = {}
    for split, pairs in splits.items():
        texts = [pairs.texts(index) for index in range(len(pairs))]
        assert all(first != second for first, second in texts)
        same = np.array([topic[first] == topic[second] for first, second in texts])
        assert (same == pairs.labels.astype(bool)).all()
        assert 0.45 < same.mean() <= 0.5
        seen[split] = {text for pair in texts for text in pair}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    again, other = (
        load_pairs(SequenceDataArguments(dataset_name="topic_pairs", sequence_seed=seed))[0] for seed in (0, 1)
    )
    assert splits["test"].fingerprint == again["test"].fingerprint
    assert splits["test"].fingerprint["sha256"] != other["test"].fingerprint["sha256"]


def test_the_files_of_the_arena(tmp_path: Path) -> None:
    rows = {
        "train": [("1.0", 'he said "no', "NA"), ("0.0", "", "b\u00e9\\n"), ("1.0", "x  y", "\u4e2d")] * 4,
        "eval": [("0.0", "a\rb", "null")],
        "test": [("1.0", "1.5", "2")] * 2,
    }
    for part, lines in rows.items():
        text = "".join(f"{label}\tP{index}\t7\t{a}\t{b}\n" for index, (label, a, b) in enumerate(lines))
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_bytes(text.encode())
    splits, names = load_pairs(SequenceDataArguments(dataset_name=str(tmp_path), text_pair_columns="text1,text2"))
    assert names == ["0.0", "1.0"]
    for split, part in (("train", "train"), ("validation", "eval"), ("test", "test")):
        found = [(*splits[split].texts(index), label) for index, label in enumerate(splits[split].labels)]
        assert found == [(a, b, int(float(label))) for label, a, b in rows[part]]


def test_tokens_are_the_bytes_of_each_text_up_to_the_length() -> None:
    rows = datasets.Dataset.from_dict({"a": ["\u00e9x", "long text"], "b": ["", "y"], "label": [0, 1]})
    from hf_imgproc_attn.training_support.text_pairs import PairSplit

    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 260
    tokenizer.model_max_length = 6
    items = PairRows(PairSplit(rows, ("a", "b"), np.array([0, 1])), tokenizer)
    assert [[len(text) for text in items[index]["input_ids"]] for index in (0, 1)] == [[5, 2], [6, 3]]
    assert tokenizer.decode(items[0]["input_ids"][0][1:-1]) == "\u00e9x"
    assert tokenizer.decode(items[1]["input_ids"][0][1:-1]) == "long"
    assert items[1]["labels"] == torch.tensor(1)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that cannot be used, a folder each."""
    root = tmp_path_factory.mktemp("tables")
    columns = {"a": ["x", None], "b": ["y", "z"], "n": [1, 2], "label": [0, 1]}
    (root / "holes").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(root / "holes" / "train.parquet")
    (root / "broken").mkdir()
    (root / "broken" / "new.train.tsv").write_text("no label\tP1\tP2\tx\ty\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset_name {}/holes --text_pair_columns a", "text_pair_columns must be two names, as a,b, got 'a'"),
        ("--dataset_name {}/holes --text_pair_columns b,c", "text_pair_columns must be a column of the train split"),
        ("--dataset_name {}/holes --text_pair_columns b,n", "text_pair_columns must be columns of texts, got 'n'"),
        ("--dataset_name {}/holes --text_pair_columns b,a", "column 'a' of the train split has 1 rows without a text"),
        ("--dataset_name {}/broken --text_pair_columns text1,text2", "must have files of label, id1, id2, text1 and"),
        ("--dataset_name topic_pairs --sequence_settings a=1", "sequence_settings must be empty for pairs"),
        ("--dataset_name topic_pairs --image_column_name a", "image_column_name must be none for pairs"),
        ("--dataset_name topic_pairs --max_length 2", "max_length must be an integer >= 3, got 2"),
        ("--dataset_name listops --text_pair_columns a,b", "text_pair_columns must be none for sequences"),
        ("--dataset_name digits", "max_length must be none but for pairs of texts, got 20"),
        (
            "--dataset_name topic_pairs --config_overrides classifier_pairs=false",
            "classifier_pairs must be True for pai",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: str, message: str, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", *words.format(tables).split()) == 2
    (error,) = re.findall(r"^error: .*$", capsys.readouterr().err, re.MULTILINE)  # beside bars of what is read
    assert message in error


def test_a_loaded_tokenizer_cuts_where_the_model_ends(trained: Path) -> None:
    data = load_sequences(SequenceDataArguments(dataset_name="topic_pairs", max_length=20, max_eval_samples=3))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert max(len(text) for text in PairRows(data.splits["test"], tokenizer)[0]["input_ids"]) == 20
