"""Checkpoints of any model type become filtered ones: what is kept, what it costs, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertForSequenceClassification,
    apply_filter,
    cli,
    convert,
    filtered_layers,
)
from hf_imgproc_attn.conversion import convert_checkpoint
from hf_imgproc_attn.models.spec_fields import FILTER_FIELDS
from tests.any_model.architectures import build, inputs, output, text
from tests.conversion_cases import STOCK, make_stock


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a licence."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").float().save_pretrained(folder)  # type: ignore[operator]
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return (status, *capsys.readouterr())


def test_the_command_puts_a_filter_into_the_last_layers(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("convert", str(llama), "--preset", "twicing", "--layers", "-2,-1", "--output", str(tmp_path / "filtered"))
    status, out, err = run(capsys, *words)
    assert status == 0, err
    assert f"LlamaForCausalLM {llama}, softmax -> twicing" in out
    assert "model.layers  2      dot_product  its own    twicing (2)" in out
    assert "cross-entropy on 504 tokens that the source itself wrote rises by" in out
    assert "licence of the source: cc-by-4.0" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "filtered")
    assert type(loaded) is LlamaForCausalLM
    assert [row["layer"] for row in filtered_layers(loaded)] == [1, 2]
    wanted = apply_filter(LlamaForCausalLM.from_pretrained(llama), "twicing", layers=[-2, -1])
    assert torch.equal(loaded(text()).logits, wanted(text()).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "filtered")("a b c").input_ids == [0, 1, 2]
    card = (tmp_path / "filtered/README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in card
    assert str(llama.parent) not in card


def test_what_starts_as_the_source_does_not_cost_anything(llama: Path) -> None:
    model, report = convert(llama, "learned_twicing", return_report=True, layers=[-1])
    assert report.max_difference == 0
    assert report.change.rise == 0
    assert len(report.new) == 1
    assert len(report.mapped) == len(LlamaForCausalLM.from_pretrained(llama).state_dict())
    assert "| 2 | 0, 0, 0, 0 |" in card_of(model)


def card_of(model: Any) -> str:
    from hf_imgproc_attn.cards.filters import in_markdown, recorded
    from hf_imgproc_attn.filtered import applied_summary

    return in_markdown(recorded(applied_summary(model)))


def test_a_large_change_is_told_with_what_costs_less(llama: Path) -> None:
    _, report = convert(llama, "twicing", return_report=True, boosting_steps=8)
    assert report.change.is_large
    fewer = convert(llama, "twicing", return_report=True, boosting_steps=8, layers=[-2, -1])[1].change.rise
    assert report.advice == f"filtered in its last two layers only (layers=[-2, -1]) it rises by {fewer:.3f} nats"


@pytest.mark.parametrize(("name", "preset"), [("bert", "twicing"), ("vit", "alibi"), ("t5", "sos"), ("swin", "sos")])
def test_models_of_every_kind(name: str, preset: str) -> None:
    """Own backbones too where the stock class is asked for; an unchanged source stays what it is."""
    source = build(name)
    before = output(source, inputs(name))
    model, report = convert(source, preset, return_report=True, filtered=True)
    assert type(model) is type(source)
    assert torch.equal(output(source, inputs(name)), before)
    assert not filtered_layers(source)
    assert filtered_layers(model)
    assert 0 < report.max_difference < 1e3


def test_what_cannot_be_probed_is_converted_and_said() -> None:
    model, report = convert(build("wav2vec2"), "twicing", return_report=True)
    assert filtered_layers(model)
    assert "outputs are not compared: no inputs of this kind of model are known" in str(report)


def test_a_filter_is_replaced_and_taken_out(llama: Path, tmp_path: Path) -> None:
    convert(llama, "twicing").save_pretrained(tmp_path / "twicing")
    other, report = convert(tmp_path / "twicing", "sos", return_report=True)
    assert report.source_preset == "twicing"
    assert {row["boosting"] for row in filtered_layers(other)} == {"sos (3)"}
    stock = convert(tmp_path / "twicing", "softmax")
    assert torch.equal(stock(text()).logits, LlamaForCausalLM.from_pretrained(llama)(text()).logits)
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock/config.json").read_text(encoding="utf-8"))["model_type"] == "llama"


@pytest.mark.parametrize("name", ["dinov2", "bert", "bart", "clip"])
def test_the_filter_of_any_class_is_replaced(name: str, tmp_path: Path) -> None:
    """Many Auto classes load such a checkpoint; the class that was saved comes back."""
    source: Any = build(name).float()
    apply_filter(source, "twicing").save_pretrained(tmp_path)
    model = convert(tmp_path, "sos")
    assert type(model) is type(source)
    assert {row["boosting"] for row in filtered_layers(model)} == {"sos (3)"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "bilateral"], "position_kernel must be one of gaussian, alibi, relative_buckets for layers of"),
        (["--preset", "twicing", "--layers", "7"], "layers must be integers from -3 to 2 (model.layers has 3"),
        (["--preset", "twicing", "--layers", "-1,last"], "--layers must be integers with commas between them"),
        (["--preset", "twicing", "--stacks", "encoder"], "stacks must be among model.layers, got 'encoder'"),
        (["--preset", "twicing", "--set", "residual=twicing"], "residual='twicing' is not for layers of another mod"),
        (["--preset", "softmax"], "nothing of the model would change"),
        (["--preset", "twicing", "--set", "n_embd=7"], "fields must be among content_kernel"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(
    words: list[str], message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "convert", str(llama), *words, "--output", str(tmp_path / "o"))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_filtered_is_refused(llama: Path, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    no_attention = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(ValueError, match="ResNetForImageClassification has no self-attention layer"):
        convert(no_attention, "twicing")
    convert(build("gpt2"), "twicing").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="filtered=True is for stock models, got one of type imgproc_gpt2"):
        convert(tmp_path / "ours", "twicing", filtered=True)
    with pytest.raises(ValueError, match=r"architecture must be .*got LlamaForCausalLM .*filtered=True"):
        convert(llama, "twicing", filtered=False)
    said = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({**said, "architectures": ["LlamaForPoetry"]}))
    with pytest.raises(ValueError, match="architecture must be a class of Transformers .* got LlamaForPoetry"):
        convert(tmp_path / "odd", "twicing")


@pytest.mark.parametrize("stock_spec", STOCK, ids=lambda spec: spec[0].__name__)
def test_a_variant_gets_its_stock_class_back(stock_spec: tuple[Any, ...], tmp_path: Path) -> None:
    """To the bit where the variant has the stock tensors, in a folder without code that asks for none."""
    stock = make_stock(*stock_spec)
    convert(stock, "twicing").save_pretrained(tmp_path / "ours")
    convert_checkpoint(str(tmp_path / "ours"), "softmax", str(tmp_path / "back"), filtered=True)
    again = type(stock).from_pretrained(tmp_path / "back")
    assert {name: tensor.tolist() for name, tensor in again.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in stock.state_dict().items()
    }
    said = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert (said["model_type"], said["architectures"]) == (stock.config.model_type, [type(stock).__name__])
    assert "auto_map" not in said
    assert not {*FILTER_FIELDS, "filter_spec_version"} & set(said)
    assert not list((tmp_path / "back").glob("*.py"))


def test_what_a_stock_class_has_no_place_for_is_refused() -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = ImgProcBertForSequenceClassification(ImgProcBertConfig(**size, classifier_pooling="mean"))
    with pytest.raises(ValueError, match="classifier_pooling='mean' is no field of BertConfig"):
        convert(model, "softmax", filtered=True)
    with pytest.raises(ValueError, match="a stock class has no fields of filters, got boosted_layers"):
        convert(model, "softmax", filtered=True, boosted_layers=[0])
