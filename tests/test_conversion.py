"""Conversion of stock checkpoints: every tensor accounted for, initialised as the framework says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_imgproc_attn import PRESETS, ConversionReport, convert
from hf_imgproc_attn.conversion import convert_checkpoint

GPT2 = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 61, "pad_token_id": 0}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}
STOCK = [
    (GPT2Model, GPT2Config, GPT2),
    (GPT2LMHeadModel, GPT2Config, GPT2),
    (GPT2ForSequenceClassification, GPT2Config, GPT2),
    (GPT2ForTokenClassification, GPT2Config, GPT2),
    (ViTModel, ViTConfig, VIT),
    (ViTForImageClassification, ViTConfig, VIT),
    (ViTForMaskedImageModeling, ViTConfig, VIT),
]


def make_stock(model_class: type[PreTrainedModel], config_class: type, fields: dict) -> PreTrainedModel:
    """A stock model with weights large enough that a wrongly placed tensor shows in the outputs."""
    torch.manual_seed(0)
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def outputs(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(1)
    if model.main_input_name == "input_ids":
        return model(torch.randint(1, 61, (2, 9)))[0]
    return model(torch.randn(2, 3, 16, 16))[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stock_spec", STOCK, ids=lambda spec: spec[0].__name__)
def test_every_tensor_is_accounted_for(stock_spec: tuple, preset: str, tmp_path: Path) -> None:
    """mapped + new = the tensors of the variant; used + unused = those of the source; the saved folder loads back."""
    stock = make_stock(*stock_spec)
    stock.save_pretrained(tmp_path / "stock")
    model, report = convert(tmp_path / "stock", preset, return_report=True)
    assert isinstance(report, ConversionReport)
    assert sorted([*report.mapped, *report.new]) == sorted(model.state_dict())
    used = {name for made_of in report.mapped.values() for name in made_of}
    assert used.isdisjoint(report.unused)
    # Of a table whose class position alone is used the other rows are listed.
    whole = {name.removesuffix(" (rows of the patches)") for name in report.unused}
    assert used | whole == set(stock.state_dict())
    assert not model.training
    model.save_pretrained(tmp_path / "variant")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "variant")), outputs(model))
    if preset == "softmax":
        assert torch.equal(outputs(model), outputs(stock))
        # Not 0: products of a memory-mapped and of a copied weight may differ in the last bit.
        assert report.max_difference < 1e-6
        assert report.unused == report.new == []
    elif preset == "gradient_boosted":
        assert report.max_difference < 1e-6  # it starts as the stock model
        assert report.unused == []
        assert all(".filter.gradient_boosting." in name for name in report.new)
    else:
        assert report.max_difference > 0.0
    if preset == "learned_twicing":
        assert report.unused == []
        assert len(report.new) == 3
        assert all(name.endswith("scalar_bias.boosting_gain") for name in report.new)
    assert bool(report.warnings) == (preset == "boosted_residual")
    if preset in ("twicing", "sos", "neutreno", "pidformer", "elliptical", "boosted_residual"):
        assert report.unused == report.new == []
    if preset in ("bilateral_gaussian", "nlm", "alibi", "t5_bias", "rope", "nope"):
        of_patches = "embeddings.position_embeddings (rows of the patches)"
        expected = "wpe.weight" if "gpt2" in stock.config.model_type else of_patches
        assert [name.removeprefix("transformer.").removeprefix("vit.") for name in report.unused] == [expected]
    if preset == "t5_bias":
        kinds = {name.rsplit(".", 1)[-1] for name in report.new}
        assert kinds == (
            {"relative_buckets"} if "gpt2" in stock.config.model_type else {"relative_buckets", "class_token"}
        )
    if preset in ("rope", "nope"):
        assert report.new == []


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
@pytest.mark.parametrize("scheme", ["twicing", "sos", "osher"])
def test_another_residual_scheme_is_warned_of(
    scheme: str, stock_spec: tuple, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence in the report and in the log, with presets and with overrides."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_imgproc_attn"), "propagate", True)
    stock = make_stock(*stock_spec)
    _, report = convert(stock, "twicing", return_report=True, residual=scheme)
    assert len(report.warnings) == 1
    assert f"the residual scheme {scheme!r} changes the function of the checkpoint" in report.warnings[0]
    assert f"warning: {report.warnings[0]}" in str(report)
    assert report.warnings[0] in caplog.text
    caplog.clear()
    _, report = convert(stock, "twicing", return_report=True)
    assert report.warnings == []
    assert "residual scheme" not in caplog.text


def test_learned_twicing_starts_as_twicing() -> None:
    stock = make_stock(*STOCK[1])
    torch.testing.assert_close(outputs(convert(stock, "learned_twicing")), outputs(convert(stock, "twicing")))


def test_untied_positions_start_from_the_content_projections() -> None:
    """GPT-2: LayerNorm from ln_1, U_Q and U_K from the halves of c_attn; bandwidths at the stock scaling."""
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2)
    model = convert(stock, "bilateral")
    for source, target in zip(stock.transformer.h, model.transformer.h, strict=True):
        projection = target.attn.filter.position_projection
        x = torch.randn(7, 32)
        expected = torch.nn.functional.linear(source.ln_1(x), source.attn.c_attn.weight.T)
        pair = projection(x.unsqueeze(0))
        joined = torch.cat([half.transpose(1, 2).flatten(2) for half in pair.chunk(2, dim=-1)], dim=-1)
        torch.testing.assert_close(joined[0], expected[:, :64], rtol=1e-5, atol=1e-5)
        scale = 2 * torch.exp(-2 * target.attn.filter.scalar_bias.content_log_bandwidth)
        torch.testing.assert_close(scale, torch.full((4,), 8**-0.5))


def test_vit_class_position_goes_into_the_class_token() -> None:
    """The table of patches loses its class entry to the class token, for untied and for Gaussian positions."""
    stock = make_stock(ViTForImageClassification, ViTConfig, VIT)
    positions, token = stock.vit.embeddings.position_embeddings, stock.vit.embeddings.cls_token
    for preset in ("bilateral", "bilateral_gaussian", "alibi", "t5_bias", "rope", "nope"):
        embeddings = convert(stock, preset).vit.embeddings
        assert torch.equal(embeddings.cls_token, token + positions[:, :1])
        if preset == "bilateral":
            assert torch.equal(embeddings.position_embeddings, positions[:, 1:])
        else:
            assert embeddings.position_embeddings is None


@pytest.mark.parametrize("stock_spec", [STOCK[1], STOCK[5]], ids=["gpt2", "vit"])
def test_shared_projections_start_from_layer_0(stock_spec: tuple) -> None:
    stock = make_stock(*stock_spec)
    model, report = convert(stock, "bilateral", return_report=True, share_position_projections=True)
    names = [name for name in report.mapped if "position_projection" in name]
    assert len(names) == 4
    assert all(".0." in source for name in names for source in report.mapped[name])
    assert torch.equal(
        model.base_model.position_projection.norm.weight,
        (
            stock.base_model.h[0].ln_1
            if hasattr(stock.base_model, "h")
            else stock.base_model.layers[0].layernorm_before
        ).weight,
    )


def test_untied_conversion_keeps_position_information() -> None:
    """Content and position terms of the converted logits are those of the stock logits, cross terms dropped."""
    stock = make_stock(GPT2Model, GPT2Config, {**GPT2, "n_layer": 1})
    model = convert(stock, "bilateral")
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 61, (1, 9))
    attention = model(ids, output_attentions=True).attentions[0]
    block, positions = stock.h[0], stock.wpe(torch.arange(9))
    content = block.ln_1(stock.wte(ids))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, 9, 4, 8).transpose(1, 2)

    query, key, _ = block.attn.c_attn(content).split(32, dim=-1)
    weight = block.attn.c_attn.weight
    position_query, position_key = (block.ln_1(positions)[None] @ weight[:, part : part + 32] for part in (0, 32))
    logits = heads(query) @ heads(key).mT + heads(position_query) @ heads(position_key).mT
    logits = (logits * 8**-0.5).masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf"))
    torch.testing.assert_close(attention, logits.softmax(-1), rtol=1e-4, atol=1e-5)


def test_tensors_hidden_by_the_stock_class_are_listed(tmp_path: Path) -> None:
    """Old GPT-2 files hold causal masks that the stock class drops silently; here they are named as unused."""
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48), "transformer.extra": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = convert(tmp_path, "twicing", return_report=True)
    assert report.unused == ["transformer.extra", "transformer.h.0.attn.bias"]


def test_dtype_and_overrides_are_kept() -> None:
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2).to(torch.bfloat16)
    model = convert(stock, "bilateral_twicing", boosted_layers=[-1], resid_pdrop=0.3)
    assert model.dtype == torch.bfloat16
    assert model.config.boosted_layers == [-1]
    assert model.config.resid_pdrop == 0.3
    assert model.transformer.h[0].attn.filter.scalar_bias.content_log_bandwidth.dtype == torch.float32


def test_deit_published_as_vit_keeps_its_labels(tmp_path: Path) -> None:
    """DeiT checkpoints without a distillation token are ViT checkpoints by their config.json."""
    fields = {**VIT, "id2label": {i: f"class {i}" for i in range(5)}}
    make_stock(ViTForImageClassification, ViTConfig, fields).save_pretrained(tmp_path)
    assert convert(tmp_path, "twicing").config.id2label[3] == "class 3"


def test_report_names_what_changed() -> None:
    _, report = convert(make_stock(ViTForImageClassification, ViTConfig, VIT), "bilateral", return_report=True)
    text = str(report)
    assert "vit.embeddings.cls_token <- vit.embeddings.cls_token + vit.embeddings.position_embeddings" in text
    assert "vit.layers.0.attention.filter.scalar_bias.class_token" in text
    assert f"{report.max_difference:.3g}" in text


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (DeiTForImageClassification, DeiTConfig(**{**VIT, "encoder_stride": 16})),
        (GPT2DoubleHeadsModel, GPT2Config(**GPT2)),
        (
            LlamaForCausalLM,
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=32,
                vocab_size=61,
                pad_token_id=0,
            ),
        ),
    ],
    ids=["deit", "double heads", "llama"],
)
def test_unsupported_architectures_are_refused_by_name(
    model_class: type[PreTrainedModel], config: object, tmp_path: Path
) -> None:
    model = model_class(config)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match=f"architecture must be a stock one of .*, got {model_class.__name__}"):
            convert(source, "twicing")


def test_variants_are_not_converted_again(tmp_path: Path) -> None:
    variant = convert(make_stock(*STOCK[1]), "twicing")
    variant.save_pretrained(tmp_path)
    for source in (variant, tmp_path):
        with pytest.raises(ValueError, match="got ImgProcGPT2LMHeadModel"):
            convert(source, "softmax")


def test_processors_travel_where_there_are_any(tmp_path: Path) -> None:
    """A tokenizer or image processor is copied; none is invented for a checkpoint without one."""
    text, image = tmp_path / "text", tmp_path / "image"
    make_stock(*STOCK[1]).save_pretrained(text)
    make_stock(*STOCK[5]).save_pretrained(image)
    convert_checkpoint(str(text), "twicing", str(tmp_path / "bare"))
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(text)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(image)
    convert_checkpoint(str(text), "twicing", str(tmp_path / "text-twicing"))
    convert_checkpoint(str(image), "twicing", str(tmp_path / "image-twicing"))
    assert AutoTokenizer.from_pretrained(tmp_path / "text-twicing").get_vocab() == words.get_vocab()
    assert AutoImageProcessor.from_pretrained(tmp_path / "image-twicing").size["height"] == 16


def test_bad_input_is_refused_before_work(tmp_path: Path) -> None:
    stock = make_stock(*STOCK[1])
    with pytest.raises(ValueError, match="preset must be one of softmax, .*, got 'bilatral'"):
        convert(stock, "bilatral")
    with pytest.raises(ValueError, match="n_positions.*change the shape of transformer.wpe.weight"):
        convert(stock, "twicing", n_positions=64)
    stock.save_pretrained(tmp_path / "stock")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    del weights["transformer.h.1.ln_2.weight"]
    save_file(weights, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks tensors of GPT2LMHeadModel: transformer.h.1.ln_2.weight"):
        convert(tmp_path / "stock", "twicing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        convert_checkpoint(str(tmp_path / "stock"), "twicing", str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
