"""What makes no sense for a backbone is refused before any data are read, by every training command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_causal_lm
import train_image_classification
import train_recall
import train_semantic_segmentation
import train_sequence_classification
import train_text_classification
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support import image_data, labelled_text, mask_data, sequence_data, text_data
from hf_imgproc_attn.training_support.arguments import LabelledTextDataArguments, TextDataArguments
from hf_imgproc_attn.training_support.early_checks import check_model
from hf_imgproc_attn.training_support.sequence_arguments import SequenceDataArguments
from tests.training.conftest import TINY_GPT2

SCRIPTS: dict[str, tuple[Any, Any, str]] = {
    "causal-lm": (train_causal_lm, text_data, "load_text_splits"),
    "recall": (train_recall, sequence_data, "load_sequences"),
    "text-classification": (train_text_classification, labelled_text, "load_labelled_texts"),
    "sequence-classification": (train_sequence_classification, sequence_data, "load_sequences"),
    "image-classification": (train_image_classification, image_data, "load_image_splits"),
    "semantic-segmentation": (train_semantic_segmentation, mask_data, "load_mask_splits"),
}


def refused(
    task: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The one line of a training command that must not ask for its data."""
    script, module, loader = SCRIPTS[task]

    def read(*_: Any) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(module, loader, read)
    assert script.main([*words, "--output_dir", str(folder / "run"), "--use_cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert not (folder / "run").exists()
    return str(line)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("causal-lm", "--preset sinkhorn", "preset 'sinkhorn': normalisation 'sinkhorn' scales rows and columns"),
        ("image-classification", "--preset delta", "preset 'delta': boosting 'delta' corrects each token's value"),
        ("causal-lm", "--preset robust --config_overrides n_head=3", "preset 'robust' with config_overrides: num_att"),
        ("recall", "--config_overrides normalisation=sinkhorn", "causal mask"),
        ("causal-lm", "--config_overrides n_head=3", "num_attention_heads must divide hidden_size"),
        ("recall", "--config_overrides boosting_steps=0", "boosting_steps"),
        ("text-classification", "--config_overrides position_kernel=none", "position_kernel"),
        ("sequence-classification", "--config_overrides hidden_act=gleu", "hidden_act must be one of"),
        ("image-classification", "--config_overrides image_size=13", "patch_size must be given for images of 13 x 13"),
        ("image-classification", "--config_overrides patch_size=0", "patch_size"),
        ("semantic-segmentation", "--config_overrides segmentation_head=deep", "segmentation_head must be one of"),
        ("semantic-segmentation", "--config_overrides boosted_layers=[9]", "boosted_layers"),
        ("semantic-segmentation", "--config_overrides n_embd=8", "n_embd"),
        (
            "semantic-segmentation",
            "--ignore_index 250 --config_overrides semantic_loss_ignore_index=254",
            "ignore_index 250 differs from semantic_loss_ignore_index of config_overrides, 254",
        ),
        ("semantic-segmentation", "--image_size 30 --config_overrides patch_size=4 image_size=32", "multiple of the"),
    ],
)
def test_nothing_is_read_for_what_cannot_be_trained(
    task: str,
    words: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert message in refused(task, words.split(), tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("start", "words", "message"),
    [
        ("gpt2", "--preset sinkhorn", "normalisation 'sinkhorn'"),
        ("gpt2", "--preset twicing --config_overrides n_layer=3", "n_layer must be the checkpoint's 1"),
        ("ours", "--preset bilateral", "preset bilateral has"),
        ("ours", "--config_overrides boosting_steps=0", "boosting_steps"),
        ("llama", "--preset forgetting", "it projects the layer's input"),
        ("llama", "--preset sinkhorn", "sinkhorn"),
        ("llama", "--preset twicing --boosted_layers 7", "layers"),
        ("llama", "--preset twicing --config_overrides n_layer=3", "must be fields of the filter"),
    ],
)
def test_checkpoints_refuse_what_they_cannot_become_before_data_are_read(
    start: str,
    words: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small = {**sizes, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    if start == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(**small))
    elif start == "ours":
        model = ImgProcGPT2LMHeadModel(ImgProcGPT2Config.from_preset("twicing", **small))
    else:
        llama = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **llama))
    model.save_pretrained(tmp_path / "start")
    given = ["--model_name_or_path", str(tmp_path / "start"), *words.split()]
    assert message in refused("causal-lm", given, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("causal-lm", "--preset bilateral_twicing --config_overrides vocab_size=300"),
        ("text-classification", "--preset sinkhorn --max_length 40"),
        ("image-classification", "--preset bilateral --config_overrides patch_size=7"),
        ("image-classification", "--config_overrides patch_size=[3,5]"),
        ("semantic-segmentation", "--preset twicing --image_size 24"),
    ],
)
def test_what_the_data_decide_is_left_open_and_no_random_number_is_drawn(task: str, words: str) -> None:
    """Sizes of images, classes and vocabularies are not known yet; the start of the model stays what it was."""
    arguments = SCRIPTS[task][0].read_arguments(words.split())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_model(task, arguments)
    assert torch.equal(torch.rand(4), expected)


def test_the_classes_of_a_checkpoint_are_not_those_of_the_data(tmp_path: Path) -> None:
    """255, the label that is ignored, is a class of ImageNet: no obstacle to segmentation with classes of its own."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=300))
    model.save_pretrained(tmp_path / "vit")
    start = ["--model_name_or_path", str(tmp_path / "vit"), "--preset", "sinkhorn"]
    check_model("semantic-segmentation", train_semantic_segmentation.read_arguments(start))
    one = [*start, "--config_overrides", "segmentation_head=deep"]
    with pytest.raises(UsageError, match="segmentation_head must be one of"):
        check_model("semantic-segmentation", train_semantic_segmentation.read_arguments(one))


def test_columns_of_data_that_have_none_to_choose_are_refused() -> None:
    for load, kind in (
        (text_data.load_text_splits, TextDataArguments),
        (labelled_text.load_labelled_texts, LabelledTextDataArguments),
    ):
        with pytest.raises(UsageError, match="text_column_name must be none for data set 'pydoc_topics', got 'text'"):
            load(kind(text_column_name="text"))
    with pytest.raises(UsageError, match="label_column_name must be none for data set 'listops_short', got 'y'"):
        sequence_data.load_sequences(SequenceDataArguments(label_column_name="y"))


def test_the_command_line_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text_column_name", "words", "--config_overrides", *TINY_GPT2, "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main([*words, "--use_cpu"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("text_column_name must be none for data set 'pydoc_topics', got 'words'")
    )
