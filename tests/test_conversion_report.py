"""What a conversion reports: its cost, what changed, the card, processors and licences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # not behind torchvision, as in 5.17

from hf_imgproc_attn import cli, convert
from hf_imgproc_attn.cards.filters import recorded
from hf_imgproc_attn.conversion import (
    KEPT_BY_ANY,
    KEPT_BY_OWN,
    KEPT_IF_CAUSAL,
    STOCK_AGAIN,
    convert_checkpoint,
)
from hf_imgproc_attn.conversion_probe import probe_inputs, sample_texts
from hf_imgproc_attn.conversion_source import load_source
from tests.conversion_cases import GPT2, STOCK, VIT, disturbed, make_stock
from tests.models.helpers import sharpen_


def test_tensors_hidden_by_the_stock_class_are_listed(tmp_path: Path) -> None:
    """Old GPT-2 files hold causal masks that the stock class drops silently; here they are named as unused."""
    stock = make_stock(GPT2LMHeadModel, GPT2Config, GPT2)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48), "transformer.extra": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = convert(tmp_path, "twicing", return_report=True)
    assert report.unused == ["transformer.extra", "transformer.h.0.attn.bias"]


def sharp_language_model() -> GPT2LMHeadModel:
    """One that is sure of its next tokens, and for which it matters what they see."""
    return sharpen_(GPT2LMHeadModel(GPT2Config(**GPT2)), std=3.0).eval()


def cross_entropy(model: PreTrainedModel, texts: torch.Tensor) -> float:
    return model(texts, labels=texts).loss.item()


def test_the_report_tells_the_cost_of_a_language_model() -> None:
    """The rise of the cross-entropy on texts that the stock model wrote; the same numbers at every call."""
    stock = sharp_language_model()
    model, report = convert(stock, "twicing", return_report=True)
    texts = sample_texts(stock, torch.Generator().manual_seed(0))
    assert texts.shape == (8, 48)
    change = report.change
    assert change.before == pytest.approx(cross_entropy(stock, texts), abs=1e-5)
    assert change.after == pytest.approx(cross_entropy(model, texts), abs=1e-5)
    assert f"cross-entropy on 376 tokens that the source itself wrote rises by {change.rise:.3f} nats" in str(report)
    assert convert(stock, "twicing", return_report=True)[1].change == change
    # Its own texts, not any: random ones are much less likely.
    assert change.before < cross_entropy(stock, torch.randint(0, 61, texts.shape)) - 0.5
    assert convert(stock, "learned_twicing", return_report=True)[1].change.rise == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_texts_are_drawn_from_the_model() -> None:
    """Tokens appear as often as the model says: the second one, over many draws."""
    stock = sharp_language_model()
    expected = stock(torch.tensor([[stock.config.bos_token_id % 61]])).logits[0, -1].softmax(-1)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.cat([sample_texts(stock, generator, length=2)[:, 1] for _ in range(250)])
    found = drawn.bincount(minlength=61) / len(drawn)
    assert (found - expected).abs().max() < 4 * float((expected * (1 - expected) / len(drawn)).sqrt().max())


def test_what_costs_less_is_measured_and_said() -> None:
    stock = sharp_language_model()
    _, report = convert(stock, "twicing", return_report=True)
    assert report.change.is_large
    last = convert(stock, "twicing", return_report=True, boosted_layers=[-2, -1])[1].change.rise
    assert last < report.change.rise
    assert (
        report.advice == f"boosted in its last two layers only (boosted_layers=[-2, -1]) it rises by {last:.3f} nats"
    )
    assert report.advice in str(report)
    advice = convert(stock, "nlm", return_report=True)[1].advice
    assert advice.endswith(f"{', '.join((*KEPT_BY_ANY, *KEPT_BY_OWN))}, and with a causal mask delta")
    assert convert(stock, "learned_twicing", return_report=True)[1].advice == ""


@torch.no_grad()
@pytest.mark.parametrize(
    ("filtered", "preset"),
    [*((False, name) for name in (*KEPT_BY_ANY, *KEPT_BY_OWN, KEPT_IF_CAUSAL)),
     *((True, name) for name in (*KEPT_BY_ANY, KEPT_IF_CAUSAL))],
)  # fmt: skip
def test_what_the_advice_names_starts_as_the_sources_function(filtered: bool, preset: str) -> None:
    stock, tokens = sharp_language_model(), torch.arange(1, 13).view(1, 12)
    variant = convert(stock, preset, filtered=filtered)
    torch.testing.assert_close(variant(tokens).logits, stock(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filtered", [False, True])
def test_stock_attention_again_is_no_starting_point_for_a_filter(filtered: bool) -> None:
    variant = convert(sharp_language_model(), "twicing", filtered=filtered)
    assert convert(variant, "softmax", return_report=True)[1].advice == STOCK_AGAIN


@pytest.mark.parametrize("stock_spec", [STOCK[2], STOCK[3], STOCK[5]], ids=lambda spec: spec[0].__name__)
def test_the_report_counts_changed_predictions(stock_spec: tuple) -> None:
    """On samples that were given; without any on random ones, and the report says so."""
    stock = make_stock(*stock_spec)
    is_text = stock.main_input_name == "input_ids"
    samples = torch.randint(1, 61, (24, 9)) if is_text else torch.randn(24, 3, 16, 16)
    model, report = convert(stock, "twicing", return_report=True, samples=samples)
    predictions = [each(samples).logits.argmax(-1) for each in (stock, model)]
    assert report.change.changed == int((predictions[0] != predictions[1]).sum())
    assert report.change.predictions == predictions[0].numel()
    assert "predictions change on the 24 samples that were given" in str(report)
    report = convert(stock, "twicing", return_report=True)[1]
    assert report.change.predictions in (16, 16 * 32)
    assert f"predictions change on random {'tokens' if is_text else 'images'} (no data was given)" in str(report)


def test_a_regression_has_no_predictions_to_count() -> None:
    stock = make_stock(GPT2ForSequenceClassification, GPT2Config, {**GPT2, "num_labels": 1})
    _, report = convert(stock, "twicing", return_report=True)
    assert report.change is None
    assert "predictions" not in str(report)


def test_random_images_have_the_statistics_of_the_processor(tmp_path: Path) -> None:
    stock = make_stock(*STOCK[5])
    stock.save_pretrained(tmp_path)
    assert "ViT's usual image processor" in convert(tmp_path, "twicing", return_report=True)[1].change.described
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 1.0]
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=mean, image_std=std).save_pretrained(tmp_path)
    inputs = probe_inputs(stock, str(tmp_path), None)
    assert inputs.described.endswith("its image processor")
    pixels = inputs.tensor * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    assert pixels.shape == (16, 3, 16, 16)
    assert 0 <= pixels.min() < 0.1
    assert 0.9 < pixels.max() <= 1


@pytest.mark.parametrize(
    ("stock_spec", "samples"),
    [
        (STOCK[0], torch.ones(1, 4, dtype=torch.long)),
        (STOCK[1], torch.ones(1, 49, dtype=torch.long)),
        (STOCK[1], torch.ones(2, 4)),
        (STOCK[1], torch.ones(0, 4, dtype=torch.long)),
        (STOCK[5], torch.ones(2, 3, 16, 12)),
        (STOCK[5], torch.ones(3, 16, 16)),
    ],
    ids=str,
)
def test_samples_that_do_not_fit_are_refused(stock_spec: tuple, samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"samples must be .*, got"):
        convert(make_stock(*stock_spec), "twicing", return_report=True, samples=samples)


def test_the_report_names_the_boosted_layers() -> None:
    stock = make_stock(*STOCK[1])
    for preset, fields, words in (
        ("twicing", {}, "boosted layers: all 3 (twicing, 2 steps)"),
        ("bilateral_twicing", {"boosted_layers": [-2, -1]}, "boosted layers: 1, 2 of 0 to 2 (twicing, 2 steps)"),
        ("sos", {"boosted_layers": [0]}, "boosted layers: 0 of 0 to 2 (sos, 3 steps)"),
        ("learned_twicing", {}, "boosted layers: all 3 (learned)"),
    ):
        assert words in str(convert(stock, preset, return_report=True, **fields)[1])
    assert "boosted layers" not in str(convert(stock, "bilateral", return_report=True)[1])


def test_report_names_what_changed() -> None:
    _, report = convert(make_stock(ViTForImageClassification, ViTConfig, VIT), "bilateral", return_report=True)
    text = str(report)
    assert "vit.embeddings.cls_token <- vit.embeddings.cls_token + vit.embeddings.position_embeddings" in text
    assert "vit.layers.0.attention.filter.scalar_bias.class_token" in text
    assert f"{report.max_difference:.3g}" in text


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


@pytest.mark.parametrize(
    "given",
    [ViTImageProcessorPil(image_mean=[0.3], image_std=[0.2]), ViTImageProcessorPil(image_mean=[0.3] * 3)],
    ids=["one value", "three equal ones"],
)
def test_a_model_with_one_channel_gets_the_processor_that_makes_grey(
    tmp_path: Path, given: ViTImageProcessorPil, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock one leaves three channels, which the model refuses."""
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**fields, image_size=16, patch_size=4, num_channels=1)
    ViTForImageClassification(config).save_pretrained(tmp_path / "stock")
    given.size = {"height": 16, "width": 16}
    given.save_pretrained(tmp_path / "stock")
    words = ["convert", str(tmp_path / "stock"), "--preset", "twicing", "--output", str(tmp_path / "grey")]
    assert cli.main(words) == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "grey")
    assert type(processor).__name__ == "ImgProcGreyImageProcessor"
    assert list(processor.image_mean) == [0.3]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "grey")
    assert model(**processor(picture, return_tensors="pt")).logits.shape == (1, 2)
    ViTImageProcessorPil(image_mean=[0.3, 0.4, 0.5]).save_pretrained(tmp_path / "stock")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words[:-1], str(tmp_path / "colour")])
    message = "image_mean of the image processor of a model with one channel must be one, got [0.3, 0.4, 0.5]"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "colour").exists()


def test_the_licence_of_the_source_is_kept(tmp_path: Path) -> None:
    from hf_imgproc_attn.hub.licences import licence_of_folder

    stock = tmp_path / "stock"
    make_stock(*STOCK[1]).save_pretrained(stock)
    report = convert_checkpoint(str(stock), "twicing", str(tmp_path / "none"))
    assert report.license == ""
    assert "licence of the source: none is known" in str(report)
    assert licence_of_folder(tmp_path / "none", ask_hub=False) == {}
    keys = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    front_matter = "\n".join(f"{key}: {value}" for key, value in keys.items())
    (stock / "README.md").write_text(f"---\n{front_matter}\ntags:\n- x\n---\n# x\n", encoding="utf-8")
    (stock / "LICENSE").write_text("own", encoding="utf-8")
    report = convert_checkpoint(str(stock), "twicing", str(tmp_path / "once"))
    assert "licence of the source: other" in str(report)
    convert_checkpoint(str(tmp_path / "once"), "softmax", str(tmp_path / "twice"))
    for name in ("once", "twice"):
        assert licence_of_folder(tmp_path / name, ask_hub=False) == keys
        assert (tmp_path / name / "LICENSE").read_text(encoding="utf-8") == "own"
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert "base_model" not in card
        assert str(tmp_path) not in card
        assert "tensors copied" in card


def test_the_card_names_the_preset_and_shows_the_numbers(tmp_path: Path) -> None:
    """By what the filter is, whatever was asked for; learned factors with their values."""
    disturbed(convert(make_stock(*STOCK[1]), "neutreno")).save_pretrained(tmp_path / "source")
    report = convert_checkpoint(str(tmp_path / "source"), "neutreno", str(tmp_path / "new"), boosted_layers=None)
    assert (report.preset, report.variant) == ("neutreno", "neutreno with neutreno_lambda=0.0, learn_feedback=True")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert f"# source, converted to {report.variant}\n" in card
    assert f"GPT2LMHeadModel source, {report.variant} -> {report.variant}\n" in card.replace("ImgProc", "")
    rows = recorded(load_source(tmp_path / "new").model.filter_summary())["rows"]
    for layer in (1, 2):
        values = ", ".join(f"{row['lambda']:.3g}" for row in rows if row["layer"] == layer)
        assert f"| {layer} | {values} |\n" in card
        assert "0, 0" not in values
    report = convert_checkpoint(str(tmp_path / "source"), "twicing", str(tmp_path / "sos"), boosting="sos")
    assert "converted to sos\n" in (tmp_path / "sos" / "README.md").read_text(encoding="utf-8")


def test_the_licence_of_a_source_on_the_hub_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the Hub, or what was downloaded from it, can be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit, repository = "0" * 40, tmp_path / "cache" / "models--ann--stock"
    make_stock(*STOCK[1]).save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    assert convert_checkpoint("ann/stock", "twicing", str(tmp_path / "unknown")).license == ""
    card = "---\nlicense: mit\nbase_model: ann/older\n---\n"
    (repository / "snapshots" / commit / "README.md").write_text(card, encoding="utf-8")
    assert convert_checkpoint("ann/stock", "twicing", str(tmp_path / "known")).license == "mit"
    card = (tmp_path / "known" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: mit\n" in f"\n{card}"
    assert "base_model: ann/stock\n" in card
