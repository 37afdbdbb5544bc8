"""``imgproc-attn robustness``: any checkpoint, any data, a record that can be gone on with, mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_imgproc_attn import cli
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.robustness import evaluation, loading
from hf_imgproc_attn.robustness.report import plain_text
from hf_imgproc_attn.training_support.image_pixels import build_image_processor

QUICK = ["--corruptions", "fog", "contrast", "--severities", "1", "5", "--attacks", "fgsm", "pgd",
         "--epsilons", "8/255", "--steps", "2", "--restarts", "1"]  # fmt: skip


def stock_model(folder: Path, seed: int = 0, classifier_scale: float = 1.0, **fields: Any) -> Path:
    """A stock ViT for 8 x 8 colour images in three classes."""
    torch.manual_seed(seed)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "num_labels": 3, **fields}  # fmt: skip
    model = ViTForImageClassification(ViTConfig(**size))
    with torch.no_grad():
        model.classifier.weight.normal_(std=1).mul_(classifier_scale)
    model.save_pretrained(folder)
    build_image_processor((8, 8), 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_model(tmp_path_factory.mktemp("models") / "stock")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    for seed, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
        columns = {"img": [Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(30)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    try:
        status = cli.main(["robustness", *map(str, words)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_stock_checkpoint_is_measured_and_gone_on_with(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = stock_model(tmp_path / "other", seed=1)
    output = tmp_path / "out"
    words = [checkpoint, "--dataset_name", data, *QUICK, "--baseline", other, "--output", output]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    record = json.loads((output / "robustness.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["checkpoint"] == "stock"
    assert str(tmp_path) not in json.dumps({**record, "identity": None})
    assert (record["versions"]["scipy"], record["device"]["type"]) != (None, None)
    assert record["identity"]["data"]["split"] == "test"
    assert record["results"][0]["samples"] == 30
    assert len(record["results"]) == 9
    assert [result["disturbance"] for result in record["baseline"]["results"]] == ["clean"] + ["fog"] * 2 + [
        "contrast"
    ] * 2
    assert record["mean_corruption_error"]["counted"] == ["fog", "contrast"]
    assert (output / "robustness.png").stat().st_size > 10_000
    assert "| fog | " in (output / "robustness.md").read_text(encoding="utf-8")
    assert out.startswith(plain_text(record))
    assert "(mCE) against other" in out
    assert "[14/14] contrast" in err

    status, _, err = run(capsys, *words)
    assert status == 2
    assert "robustness.json' and 2 more files are there already; --force replaces them" in err

    # A kill after the fifth measurement: the record holds five.
    cut = {**record, "status": "running", "results": record["results"][:5]}
    cut.pop("baseline")
    (output / "robustness.json").write_text(json.dumps(cut), encoding="utf-8")
    status, out, err = run(capsys, *words, "--resume")
    assert status == 0, err
    assert err.count("\n[") + err.startswith("[") == 9
    assert "[6/14] FGSM" in err
    again = json.loads((output / "robustness.json").read_text(encoding="utf-8"))
    assert (again["results"], again["baseline"]) == (record["results"], record["baseline"])

    status, _, err = run(capsys, *words, "--resume", "--seed", "1")
    assert status == 2
    assert "--resume needs the same measurements, but settings was" in err

    (output / "robustness.json").unlink()
    status, _, err = run(capsys, *words, "--resume")
    assert status == 2
    assert "--resume needs the record of an earlier call" in err


def test_the_record_is_kept_after_every_measurement(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_imgproc_attn.robustness import images

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "pgd_withstood", interrupted)
    status, _, _ = run(capsys, checkpoint, "--dataset_name", data, *QUICK, "--output", tmp_path)
    assert status == 130
    record = json.loads((tmp_path / "robustness.json").read_text(encoding="utf-8"))
    assert record["status"] == "running"
    assert [result["disturbance"] for result in record["results"]][-1] == "FGSM"


def test_the_record_of_a_baseline_serves_in_its_place(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [checkpoint, "--dataset_name", data, "--corruptions", "contrast", "--severities", "1", "--attacks", "none"]
    assert run(capsys, *base, "--output", tmp_path / "a")[0] == 0
    status, out, err = run(capsys, *base, "--baseline", tmp_path / "a", "--output", tmp_path / "b")
    assert status == 0, err
    assert "(mCE) against a: 100.0 %" in out
    status, _, err = run(capsys, *base, "--baseline", tmp_path / "a", "--output", tmp_path / "c", "--max_samples", "9")
    assert status == 2
    assert "was measured on other data" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("you/nowhere", "baseline 'you/nowhere' cannot be loaded: "),
        (
            "{folder}/empty",
            "baseline must be a checkpoint, or the results of imgproc-attn robustness, got the",
        ),
        ("{folder}/other.json", "baseline needs a record of imgproc-attn robustness, got "),
        ("missing.json", "baseline needs the record of an earlier call, but 'missing.json' is not there"),
        ("{folder}/unknown", "baseline '{folder}/unknown' cannot be loaded: "),
    ],
)
def test_a_wrong_baseline_is_named_as_one_before_anything_is_loaded(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"a": 1}', encoding="utf-8")
    monkeypatch.setattr(evaluation, "load_subject", None)  # whoever calls it fails
    words = ["--baseline", name.format(folder=tmp_path), "--dataset_name", data, "--output", tmp_path / "out"]
    status, _, err = run(capsys, checkpoint, *words)
    assert (status, err.count("\n")) == (2, 1), err
    assert message.format(folder=tmp_path) in err
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_the_mean_in_the_figure_is_that_of_the_published_corruptions() -> None:
    import matplotlib.pyplot as plt

    from hf_imgproc_attn.robustness.report import _severity_panel

    def result(name: str, severity: int, value: float) -> dict[str, Any]:
        return {"family": "corruption", "disturbance": name, "parameters": {"severity": severity}, "value": value}

    values = {"fog": (0.8, 0.6), "snow": (0.4, 0.2), "gaussian blur": (0.0, 0.0)}
    results = [result(name, severity, value[severity - 1]) for name, value in values.items() for severity in (1, 2)]
    figure, axes = plt.subplots()
    _severity_panel({"results": [{"family": "clean", "value": 1.0}, *results]}, axes)
    (mean,) = [line for line in axes.lines if str(line.get_label()).startswith("mean")]
    assert np.asarray(mean.get_ydata()).tolist() == pytest.approx([100, 60, 40])
    plt.close(figure)


def test_labels_in_another_order_are_the_same_classes(data: Path, tmp_path: Path) -> None:
    # Transformers 5.17 keeps it behind torchvision elsewhere.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    plain = loading.ImageDataArguments(dataset_name=str(data))
    folder = stock_model(tmp_path / "m", id2label={0: "c", 1: "a", 2: "b"}, label2id={"c": 0, "a": 1, "b": 2})
    from transformers import AutoConfig

    config, processor = AutoConfig.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    _, labels, about = loading.load_images(plain, None, processor, config)
    assert labels.tolist() == [(i % 3 + 1) % 3 for i in range(30)]
    assert about["split"] == "test"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["b", "more", "a", "c"], [2, 0, 3]),  # a model with more classes
        (["x", "y", "z"], [0, 1, 2]),  # nothing in common: by number, which is said
        (["a", "b", "sea"], [0, 1, 2]),  # those in common have the same numbers
        (["b", "a", "sea"], "must be among those of the model, whose class 'a' has another number; got 'c'"),
    ],
)
def test_classes_are_matched_by_name(
    own: list[str], expected: list[int] | str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ViTConfig(id2label=dict(enumerate(own)), label2id={name: index for index, name in enumerate(own)})
    labels = torch.arange(3)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            loading.as_the_model_counts(labels, ["a", "b", "c"], config)
        return
    assert loading.as_the_model_counts(labels, ["a", "b", "c"], config).tolist() == expected
    said = "classes are taken by their numbers: 'x' of the model is 'a' of the data, and so on\n"
    assert capsys.readouterr().err == (said if own == ["x", "y", "z"] else "")


def test_logits_that_are_no_numbers_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock_model(tmp_path / "model", classifier_scale=float("nan"))
    words = ["--attacks", "none", "--corruptions", "none", "--dataset_name", data, "--output", tmp_path / "out"]
    status, _, err = run(capsys, folder, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "the model must have finite logits, got others for 30 of 30 images" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corruptions", "frost", "--frost_pictures", "{checkpoint}"], "frost_pictures must hold pictures"),
        (["--corruptions", "fogg"], "corruptions must be names of corruptions, got 'fogg'; did you mean fog?"),
        (["--severities", "6"], "severities must be integers from 1 to 5, got 6"),
        (["--epsilons", "8"], "epsilons must be > 0 and <= 1, got 8.0"),
        (["--epsilons", "0"], "epsilons must be > 0 and <= 1, got 0.0"),
        (["--epsilons", "x"], "must be a number or a fraction such as 8/255, got 'x'"),
        (
            ["--attacks", "pgdd"],
            "attacks must be names among fgsm, pgd, spsa, autoattack, got 'pgdd'; did you mean pgd?",
        ),
        (["--max_samples", "0"], "max_samples must be an integer >= 1, got 0"),
        (["--device", "tpu9"], "device must be cpu or cuda, got 'tpu9'"),
        (["--resume", "--force"], "--resume and --force cannot be given together"),
        (["--baseline", "./nowhere"], "baseline must be a local path or a Hub name, got './nowhere', which does not"),
        (["--corruptions", "none", "--baseline", "{checkpoint}"], "a baseline is for the mean corruption error"),
        (["--split", "validation", "--dataset_name", "digits"], "labels must be classes of the model, 0 to 2, got"),
        (["--split", "train"], "invalid choice: 'train'"),
        (["--epsilonz", "1"], "did you mean --epsilons?"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [word.format(checkpoint=checkpoint) for word in words]
    given = [] if "--dataset_name" in words else ["--dataset_name", data]
    status, _, err = run(capsys, checkpoint, *given, "--output", tmp_path, *words)
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert not (tmp_path / "robustness.json").exists()


def test_the_folder_of_a_run_is_not_written_into(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    status, _, err = run(capsys, checkpoint, "--output", tmp_path, "--force")
    assert status == 2
    assert "output must be a folder of its own, got" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_is_no_image_classifier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**size)).save_pretrained(tmp_path / "body")
    for place, message in (
        (
            tmp_path / "body",
            "checkpoint must be an image classifier, a causal language model or a text classifier, got",
        ),
        (tmp_path, f"checkpoint '{tmp_path}' cannot be loaded"),
        (tmp_path / "none", "checkpoint must be a local path or a Hub name"),
    ):
        status, _, err = run(capsys, place, "--output", tmp_path / "out")
        assert status == 2
        assert message in err.splitlines()[-1]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock GPT-2 with filters in its last layer, and a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_imgproc_attn import apply_filter
    from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "reader"
    tokenizer = train_tokenizer(["one two three\n"], 270)
    torch.manual_seed(0)
    size = {"vocab_size": 270, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 48}
    apply_filter(GPT2LMHeadModel(GPT2Config(**size)), "twicing", layers=[-1]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_filtered_language_model_is_measured_on_changed_texts(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [reader, "--max_samples", "12", "--fractions", "0.05", "0.5", "--output", tmp_path, "--block_size", "32"]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    record = json.loads((tmp_path / "robustness.json").read_text(encoding="utf-8"))
    assert (record["task"], record["status"], len(record["results"])) == ("causal-lm", "finished", 14)
    assert record["identity"]["data"]["dataset_name"] == "pydoc_topics"
    assert "Perplexity a word by the part of the words that is changed" in out
    assert "| change | clean | 5 % | 50 % |" in (tmp_path / "robustness.md").read_text(encoding="utf-8")
    assert (tmp_path / "robustness.png").stat().st_size > 10_000
    assert "[14/14] typos, fraction 0.5: word perplexity" in err
    record["results"] = record["results"][:5]  # as a kill between the two values of a change leaves it
    (tmp_path / "robustness.json").write_text(json.dumps(record), encoding="utf-8")
    status, again, err = run(capsys, *words, "--resume")
    assert status == 0, err
    assert again == out


def test_a_text_classifier_is_measured_on_changed_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=280, num_labels=8, pad_token_id=0, **size))
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["one two three\n"], 280, for_classifier=True).save_pretrained(tmp_path / "model")
    words = ["--max_samples", "20", "--changes", "typo", "--fractions", "0.3", "--output", tmp_path / "out"]
    status, out, err = run(capsys, tmp_path / "model", *words)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "robustness.json").read_text(encoding="utf-8"))
    assert [result["metric"] for result in record["results"]] == ["accuracy"] * 2
    assert "Accuracy in % by the part of the words that is changed" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "pgd"], "attacks is not used with a checkpoint for causal-lm"),
        (["--baseline", "{reader}"], "needs corruptions of images, got a checkpoint for causal-lm"),
        (["--label_column_name", "x"], "label_column_name is not used with a checkpoint for causal-lm, got 'x'"),
        (["--fractions", "2"], "fractions must be > 0 and <= 1, got 2.0"),
        (
            ["--changes", "typos"],
            "changes must be names among word_swap, deletion, typo, got 'typos'; did you mean typo?",
        ),
        (["--block_size", "1"], "block_size must be an integer >= 2, got 1"),
        (["--block_size", "99"], "block_size must be an integer from 2 to 48, what the model can read, got 99"),
    ],
)
def test_mistakes_with_texts_are_one_line(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, _, err = run(capsys, reader, "--output", tmp_path, *(word.format(reader=reader) for word in words))
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert message in err


def test_options_of_texts_are_refused_with_images(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, checkpoint, "--dataset_name", data, "--output", tmp_path, "--fractions", "0.1")
    assert (status, err.splitlines()[-1]) == (
        2, "imgproc-attn: error: fractions is not used with a checkpoint for image-classification"
    )  # fmt: skip


def test_the_data_of_another_kind_of_run_are_named(tmp_path: Path) -> None:
    record = {"arguments": {"data": {"dataset_name": "listops_short", "sequence_settings": ["max_depth=3"]}}}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    given = loading.Data()
    with pytest.raises(UsageError) as caught:
        loading._data_arguments(str(tmp_path), loading.LABELLED_TEXTS, given)
    assert str(caught.value) == (
        f"'{tmp_path / 'run.json'}' does not name data in a way that can be read (it has sequence_settings, which "
        f"data for {loading.LABELLED_TEXTS} do not): give --dataset_name"
    )
