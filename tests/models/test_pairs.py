"""A text classifier of pairs: equal to two encodings and an MLP by hand; shapes, saving, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertForSequenceClassification,
    ImgProcBertForTokenClassification,
    convert,
)
from hf_imgproc_attn.conversion_probe import RANDOM_INPUTS

SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 9,
    "pad_token_id": 0,
    "num_labels": 3,
}


def classifier(preset: str = "bilateral_twicing", **fields: object) -> ImgProcBertForSequenceClassification:
    """With weights that are far from symmetric."""
    torch.manual_seed(0)
    settings = {**SIZES, "classifier_pairs": True, "classifier_pooling": "mean", **fields}
    model = ImgProcBertForSequenceClassification(ImgProcBertConfig.from_preset(preset, **settings)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


LENGTHS = ((5, 7), (9, 2))
"""Tokens of both texts of two pairs."""


def pairs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 13, (2, 2, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[..., None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_are_those_of_two_texts_and_an_mlp(pooling: str) -> None:
    model, inputs = classifier(classifier_pooling=pooling), pairs()
    weights = dict(model.classifier.named_parameters())
    assert {name: tuple(value.shape) for name, value in weights.items() if value.ndim == 2} == {
        "dense.weight": (6, 32),
        "out.weight": (3, 6),
    }
    expected = []
    for pair, lengths in zip(inputs["input_ids"], LENGTHS, strict=True):
        tokens = [
            model.bert(text[None, :length]).last_hidden_state[0] for text, length in zip(pair, lengths, strict=True)
        ]
        a, b = (text.mean(0) if pooling == "mean" else text[0] for text in tokens)
        hidden = weights["dense.weight"] @ torch.cat([a, b, a * b, a - b]) + weights["dense.bias"]
        expected.append(weights["out.weight"] @ hidden.clamp(min=0) + weights["out.bias"])
    output = model(**inputs, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(output.logits, torch.stack(expected), rtol=0, atol=1e-12)
    loss = torch.nn.functional.cross_entropy(torch.stack(expected), torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-12)
    swapped = model(**{name: value.flip(1) for name, value in inputs.items()}).logits
    assert (swapped - output.logits).abs().max() > 1e-3, "the difference has a sign"
    embedded = model.bert.embeddings.word_embeddings(inputs["input_ids"])
    again = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(again, output.logits, rtol=0, atol=1e-12)


def test_both_texts_are_learned_from() -> None:
    model, inputs = classifier("softmax"), pairs()
    embedded = model.bert.embeddings.word_embeddings(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], labels=torch.tensor([1, 0])).loss.backward()
    assert embedded.grad is not None
    assert (embedded.grad.abs().amax(-1)[inputs["attention_mask"].bool()] > 0).all()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = classifier(), pairs()
    model.save_pretrained(tmp_path)
    travelled = get_class_from_dynamic_module(
        "modeling_imgproc_bert.ImgProcBertForSequenceClassification", str(tmp_path)
    )
    assert travelled is not ImgProcBertForSequenceClassification
    stranger = travelled.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(stranger(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert not any("pooler" in name for name in loaded.state_dict())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["a text alone", "three texts", "a mask of texts"])
def test_other_shapes_are_refused(change: str) -> None:
    inputs = pairs()
    if change == "a text alone":
        inputs = {name: value[:, 0] for name, value in inputs.items()}
    elif change == "three texts":
        inputs = {name: torch.cat([value, value[:, :1]], 1) for name, value in inputs.items()}
    else:
        inputs["attention_mask"] = inputs["attention_mask"].flatten(0, 1)
    name = "attention_mask" if change == "a mask of texts" else "input_ids"
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \[pairs, 2, length, ...\] with classifier_pairs, got"
    ):
        classifier()(**inputs)


def test_conversion_between_variants_keeps_the_head_and_measures_pairs() -> None:
    model = classifier("softmax").float()
    with pytest.raises(ValueError, match="classifier_pairs must be the checkpoint's True, for which its head is made"):
        convert(model, "twicing", classifier_pairs=False)
    ids = pairs()["input_ids"]
    with pytest.raises(ValueError, match=r"samples must be token ids \[pairs, 2, length\] with a length from 2 to 9"):
        convert(model, "twicing", samples=ids[:, 0])
    for samples in (None, ids):
        twiced, report = convert(model, "twicing", samples=samples, return_report=True)
        assert not report.new
        assert not report.unused
        assert twiced.classifier.dense.weight.equal(model.classifier.dense.weight)
        assert report.change.predictions == (len(ids) if samples is not None else RANDOM_INPUTS)


def test_other_heads_take_texts_as_ever() -> None:
    model = ImgProcBertForTokenClassification(ImgProcBertConfig(**SIZES, classifier_pairs=True)).eval()
    assert model(pairs()["input_ids"][:, 0]).logits.shape == (2, 9, 3)
