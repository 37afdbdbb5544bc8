"""Conversion of checkpoints whose architecture nothing names, or that lack a part: told by the tensors, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, ViTConfig, ViTModel

from hf_imgproc_attn import convert
from tests.conversion_cases import GPT2, STOCK, VIT, make_stock, outputs


def without_architecture(folder: Path) -> None:
    """As many files on the Hub are: config.json names no class."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("stock_spec", STOCK, ids=lambda spec: spec[0].__name__)
def test_an_architecture_is_told_by_the_tensors(stock_spec: tuple, tmp_path: Path) -> None:
    """Of a stock checkpoint and of a variant, in safetensors files whole and in parts, and in a file of torch's."""
    stock = make_stock(*stock_spec)
    expected = outputs(convert(stock, "twicing"))
    folders = [tmp_path / name for name in ("stock", "parts", "variant", "torch")]
    stock.save_pretrained(folders[0])
    stock.save_pretrained(folders[1], max_shard_size="20KB")
    assert (folders[1] / "model.safetensors.index.json").exists()
    convert(stock, "softmax").save_pretrained(folders[2])
    shutil.copytree(folders[0], folders[3])
    torch.save(load_file(folders[3] / "model.safetensors"), folders[3] / "pytorch_model.bin")
    (folders[3] / "model.safetensors").unlink()
    for folder in folders:
        without_architecture(folder)
        model = convert(folder, "twicing")
        assert type(model).__name__ == f"ImgProc{stock_spec[0].__name__}"
        torch.testing.assert_close(outputs(model), expected)


def test_a_language_model_is_told_by_its_head_too(tmp_path: Path) -> None:
    """Where the head is not the token table, it is in the file."""
    model = make_stock(GPT2LMHeadModel, GPT2Config, {**GPT2, "tie_word_embeddings": False})
    weights = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    without = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not without.get("architectures")
    torch.testing.assert_close(outputs(convert(tmp_path, "softmax")), outputs(model))


@pytest.mark.parametrize("preset", ["twicing", "bilateral"])
def test_a_vit_without_a_pooler_stays_one(preset: str, tmp_path: Path) -> None:
    """As those of DINO, by name and in memory; nothing is drawn at random, and the report says how to load it."""
    config = ViTConfig(**VIT)
    model = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
    with torch.no_grad():
        model.embeddings.mask_token.add_(1.0)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        converted, report = convert(source, preset, return_report=True)
        assert converted.pooler is None
        assert torch.equal(converted.embeddings.mask_token, model.embeddings.mask_token)
        assert not any("pooler" in name for name in [*report.new, *report.unused])
        assert "add_pooling_layer=False" in report.warnings[0]


@pytest.mark.parametrize("preset", ["twicing", "bilateral"])
def test_a_mask_token_that_was_never_trained_starts_where_it_can_be(preset: str) -> None:
    """Without positions that are added, masked patches of 0 have gradients that nothing can use."""
    stock = make_stock(*STOCK[6])
    with torch.no_grad():
        stock.vit.embeddings.mask_token.zero_()
    converted, report = convert(stock, preset, return_report=True)
    assert bool(converted.vit.embeddings.mask_token.any()) == (preset == "bilateral")
    assert ("vit.embeddings.mask_token" in report.new) == (preset == "bilateral")


def test_half_a_pooler_is_refused(tmp_path: Path) -> None:
    make_stock(*STOCK[4]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["pooler.dense.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks tensors of ViTModel: pooler.dense.bias"):
        convert(tmp_path, "twicing")


def test_several_architectures_are_refused(tmp_path: Path) -> None:
    make_stock(*STOCK[1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["A", "B"]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"architectures in config.json .* must name one class, got \['A', 'B'\]"):
        convert(tmp_path, "twicing")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    make_stock(*STOCK[4]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="weights of .* cannot be read, the file is damaged"):
        convert(tmp_path, "twicing")


def test_an_architecture_that_ours_do_not_have_is_refused_by_name(tmp_path: Path) -> None:
    model = GPT2DoubleHeadsModel(GPT2Config(**GPT2))
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match="architecture must be a stock one of .*, got GPT2DoubleHeadsModel"):
            convert(source, "twicing")
    without_architecture(tmp_path)
    with pytest.raises(ValueError, match="architecture must be .*, got"):
        convert(tmp_path, "twicing")
