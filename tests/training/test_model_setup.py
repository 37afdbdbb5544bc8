"""What a run starts from: presets, checkpoints of ours, stock checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, Trainer, TrainingArguments, ViTConfig
from transformers import ViTForImageClassification as StockViT

from hf_imgproc_attn import PRESETS
from hf_imgproc_attn.backbones import GPT2, VIT
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_setup import build_causal_lm, build_image_classifier, default_patch_size
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.training.conftest import TINY_GPT2, TINY_VIT

NAMES = ["a", "b", "c"]
TINY_STOCK_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def arguments(*overrides: str, preset: str | None = None, start: Path | None = None) -> ModelArguments:
    path = None if start is None else str(start)
    return ModelArguments(preset=preset, model_name_or_path=path, config_overrides=list(overrides))


@pytest.fixture
def stock_vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = StockViT(ViTConfig(**TINY_STOCK_VIT, image_size=8, patch_size=4, num_labels=3))
    model.to(torch.float16).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_default_classifier_has_about_a_million_parameters() -> None:
    model, processor = build_image_classifier(arguments(preset="bilateral_twicing"), NAMES, (32, 32))
    assert (model.config.image_size, model.config.patch_size) == (32, 4)
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 2), ((28, 28), 4), ((32, 32), 4), ((64, 64), 8), ((96, 64), 8), ((224, 224), 16)]
)
def test_default_patch_size(size: tuple[int, int], patch: int) -> None:
    assert default_patch_size(size) == patch


def test_image_side_without_a_fitting_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="patch_size must be given for images of 29 x 29 pixels"):
        default_patch_size((29, 29))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_scalar_filter_parameters_are_left_out_of_weight_decay(preset: str, tmp_path: Path) -> None:
    """The Trainer knows by their names which parameters decay; ours must be among those it leaves alone."""
    models = []
    if preset not in VIT.refused_presets:
        models.append(build_image_classifier(arguments(*TINY_VIT, preset=preset), NAMES, (8, 8))[0])
    if preset not in GPT2.refused_presets:
        tokenizer = train_tokenizer(["a b c"], 258)
        models.append(build_causal_lm(arguments(*TINY_GPT2, preset=preset), tokenizer, 16)[0])
    for model in models:
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, weight_decay=0.1)
        trainer = Trainer(model=model, args=args)
        trainer.create_optimizer()
        decay = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        scalars = [name for name, _ in model.named_parameters() if ".scalar_bias." in name]
        spec, has_class_token = model.config.layer_specs[-1], model.config.model_type == VIT.model_type
        assert bool(scalars) == (
            model.config.learn_bandwidths
            or spec.position_kernel == "relative_buckets"
            or spec.boosting in ("learned", "inversion", "differential", "delta")
            or spec.normalisation == "sink"
            or spec.feedback == "value_residual"
            or (has_class_token and spec.compares_positions)
        )
        assert not [name for name, p in model.named_parameters() if name in scalars and id(p) in decay]
        assert all(id(p) in decay for name, p in model.named_parameters() if name.endswith("mlp.fc1.weight"))


def test_own_checkpoint_is_loaded_with_a_new_head_where_the_classes_differ(tmp_path: Path) -> None:
    model, processor = build_image_classifier(arguments(*TINY_VIT, preset="bilateral"), NAMES, (8, 8))
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    same, _ = build_image_classifier(arguments(start=tmp_path / "ours"), NAMES, (32, 32))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert same.config.image_size == 8
    other, own_processor = build_image_classifier(
        arguments(start=tmp_path / "ours", preset="bilateral"), ["x", "y"], (32, 32)
    )
    assert other.classifier.weight.shape[0] == 2
    assert own_processor.size["height"] == 8
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in other.named_parameters() if not n.startswith("classifier"))


def test_stock_checkpoint_is_converted_on_the_way_in_single_precision(stock_vit: Path) -> None:
    model, processor = build_image_classifier(arguments(start=stock_vit, preset="bilateral_twicing"), NAMES, (32, 32))
    assert (model.config.position_kernel, model.config.boosting) == ("untied", "twicing")
    assert model.dtype == torch.float32
    assert processor.size["height"] == 8
    softmax, _ = build_image_classifier(arguments(start=stock_vit), NAMES, (8, 8))
    stock = StockViT.from_pretrained(stock_vit, dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(softmax.eval()(pixel_values=pixels).logits, stock(pixel_values=pixels).logits)


def test_language_model_follows_tokenizer_and_block_size(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b c"], 258)
    model, block_size = build_causal_lm(arguments(*TINY_GPT2, preset="twicing"), tokenizer, None)
    assert (model.config.vocab_size, model.config.n_positions, block_size) == (len(tokenizer), 256, 256)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    model, block_size = build_causal_lm(arguments("n_positions=32", *TINY_GPT2), tokenizer, None)
    assert block_size == 32
    with pytest.raises(UsageError, match="block_size must not exceed the model's 32 positions, got 64"):
        build_causal_lm(arguments("max_position_embeddings=32", *TINY_GPT2), tokenizer, 64)
    with pytest.raises(UsageError, match="vocab_size must hold the tokenizer's 258 entries, got 100"):
        build_causal_lm(arguments("vocab_size=100", *TINY_GPT2), tokenizer, None)


def test_stock_language_model_is_converted_and_its_vocabulary_enlarged(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=24, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "stock")
    tokenizer = train_tokenizer(["a b c"], 258)
    model, block_size = build_causal_lm(arguments(start=tmp_path / "stock", preset="twicing"), tokenizer, None)
    assert (model.config.boosting, block_size) == ("twicing", 24)
    assert model.get_input_embeddings().weight.shape[0] == 258
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hiden_size=64", "must name fields of the model's configuration, got 'hiden_size'; did you mean hidden_size"),
        ("hidden_size", "config_overrides must be key=value, got 'hidden_size'"),
        ("hidden_size=true", "'hidden_size' expected int, got bool"),
        ("num_attention_heads=5", "num_attention_heads must divide hidden_size"),
        ("position_kernel=foo", "position_kernel must be one of .*, got 'foo'"),
        ("hidden_size=[1", "config_overrides must have values in YAML"),
    ],
)
def test_wrong_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_image_classifier(arguments(override), NAMES, (8, 8))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path, stock_vit: Path) -> None:
    model, _ = build_image_classifier(arguments(*TINY_VIT, preset="bilateral"), NAMES, (8, 8))
    model.save_pretrained(tmp_path / "ours")
    ours = tmp_path / "ours"
    with pytest.raises(
        UsageError, match="preset twicing has boosting='twicing', but the checkpoint was made with 'none'"
    ):
        build_image_classifier(arguments(start=ours, preset="twicing"), NAMES, (8, 8))
    with pytest.raises(UsageError, match=r"does not fit the configuration.* and \d+ more"):
        build_image_classifier(arguments("hidden_size=32", start=ours), NAMES, (8, 8))
    with pytest.raises(UsageError, match=r"position_projection"):
        build_image_classifier(arguments("position_kernel=gaussian", start=ours), NAMES, (8, 8))
    with pytest.raises(
        UsageError, match=r"must be a checkpoint of type imgproc_gpt2 or gpt2, or of an.* got .* of type imgproc_vit"
    ):
        build_causal_lm(arguments(start=ours), train_tokenizer(["a"], 258), None)
    tokenizer = train_tokenizer(["a"], 258)
    build_causal_lm(arguments(*TINY_GPT2), tokenizer, 16)[0].save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError, match="model_name_or_path '.*text'"):
        build_causal_lm(arguments("n_embd=32", start=tmp_path / "text"), tokenizer, 16)
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    with pytest.raises(UsageError, match="preset must be given for a model of type resnet"):
        build_image_classifier(arguments(start=tmp_path / "resnet"), NAMES, (8, 8))
    with pytest.raises(UsageError, match="model_name_or_path '.*nowhere'"):
        build_image_classifier(arguments(start=tmp_path / "nowhere"), NAMES, (8, 8))
    weights = stock_vit / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="model_name_or_path '.*stock'"):
        build_image_classifier(arguments(start=stock_vit), NAMES, (8, 8))
