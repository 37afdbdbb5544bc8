"""Losses of all heads: several batches before a step have the gradient of one big batch."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2ForSequenceClassification, GPT2ForTokenClassification, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2ForTokenClassification,
    ImgProcGPT2LMHeadModel,
)
from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTForImageClassification,
    ImgProcViTForMaskedImageModeling,
    ImgProcViTForSemanticSegmentation,
)
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, vit_config

ROWS, LABELS = 8, 3
KINDS = ("one", "many", "number", "numbers")
LOSSES = (
    "causal",
    "token",
    "masked",
    "segmentation",
    *(f"text_{kind}" for kind in KINDS),
    *(f"image_{kind}" for kind in KINDS),
)


def labels_of(kind: str) -> list[torch.Tensor]:
    """Labels of a row for each: one class, several classes, one number, several numbers."""
    return {
        "one": [torch.tensor(row % LABELS) for row in range(ROWS)],
        "many": [torch.randint(0, 2, (LABELS,)).float() for _ in range(ROWS)],
        "number": [torch.randn(()) for _ in range(ROWS)],
        "numbers": [torch.randn(LABELS) for _ in range(ROWS)],
    }[kind]


def head(loss: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model with the loss, in float64 and without dropout, and rows for it."""
    torch.manual_seed(0)
    kind = loss.partition("_")[2]
    problem = {"number": "regression", "numbers": "regression", "many": "multi_label_classification"}.get(kind)
    labels = {"num_labels": 1 if kind == "number" else LABELS, "problem_type": problem}
    text = [{"input_ids": torch.randint(2, 61, (9,)), "attention_mask": torch.ones(9).long()} for _ in range(ROWS)]
    config = gpt2_config("twicing", pad_token_id=0, classifier_dropout=0.0, **labels)
    if loss == "causal":
        # Another number of tokens in every row: the mean over the batches' means is not the mean over the tokens.
        rows = [{**row, "labels": row["input_ids"].clone()} for row in text]
        model: Any = ImgProcGPT2LMHeadModel(config)
    elif loss == "token":
        rows = [{**row, "labels": torch.randint(0, LABELS, (9,))} for row in text]
        model = ImgProcGPT2ForTokenClassification(config)
    elif loss.startswith("text"):
        rows = [{**row, "labels": label} for row, label in zip(text, labels_of(kind), strict=True)]
        model = ImgProcGPT2ForSequenceClassification(config)
    else:
        vision = vit_config("twicing", image_size=16, patch_size=4, encoder_stride=4, num_channels=3, **labels)
        pictures = [{"pixel_values": torch.randn(3, 16, 16).double()} for _ in range(ROWS)]
        if loss == "masked":
            masks = [torch.randperm(16) < 6 for _ in range(ROWS)]
            rows = [{**row, "bool_masked_pos": mask} for row, mask in zip(pictures, masks, strict=True)]
            model = ImgProcViTForMaskedImageModeling(vision)
        elif loss == "segmentation":
            masks = [torch.randint(0, LABELS, (16, 16)) for _ in range(ROWS)]
            rows = [{**row, "labels": mask} for row, mask in zip(pictures, masks, strict=True)]
            model = ImgProcViTForSemanticSegmentation(vision)
        else:
            rows = [{**row, "labels": label} for row, label in zip(pictures, labels_of(kind), strict=True)]
            model = ImgProcViTForImageClassification(vision)
    if loss in ("causal", "token"):
        for index, row in enumerate(rows):
            row["labels"][: index + 1] = -100
    model = sharpen_(model).double()
    for row in rows:
        if "labels" in row and row["labels"].is_floating_point():
            row["labels"] = row["labels"].double()
    return model, rows


def trained_gradients(model: Any, rows: list[dict[str, torch.Tensor]], size: int, steps: int, folder: Path) -> Any:
    """What Trainer hands its optimizer at the first step."""
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    arguments = TrainingArguments(
        str(folder), use_cpu=True, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
        report_to=[], disable_tqdm=True, save_strategy="no", max_grad_norm=0, remove_unused_columns=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows, callbacks=[Look()]).train()
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_eight_batches_of_one_have_the_gradient_of_one_batch_of_eight(loss: str, tmp_path: Path) -> None:
    model, rows = head(loss)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model.train()(**batch).loss.backward()
    wanted = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model = copy.deepcopy(model)
    model.zero_grad()
    for size, steps in ((8, 1), (1, 8)):
        found = trained_gradients(model, rows, size, steps, tmp_path)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=f"{size} x {steps}: {name}")


@pytest.mark.parametrize("loss", [name for name in LOSSES if name.startswith(("token", "text"))])
def test_losses_of_text_heads_are_those_of_stock_heads(loss: str) -> None:
    """Without a number of items, also as a tuple."""
    model, rows = head(loss)
    config = copy.deepcopy(model.config)
    stock_class = GPT2ForTokenClassification if loss == "token" else GPT2ForSequenceClassification
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    own = type(model)(gpt2_config("softmax", **{
        name: getattr(config, name) for name in ("pad_token_id", "classifier_dropout", "num_labels", "problem_type")
    })).double().eval()  # fmt: skip
    stock = stock_class(own.config).double().eval()
    stock.load_state_dict(own.state_dict())
    assert torch.equal(own(**batch).loss, stock(**batch).loss)
    as_tuple = own(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], stock(**batch).loss)
