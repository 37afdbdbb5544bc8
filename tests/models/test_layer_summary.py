"""The numbers of a model's filters, in natural units; PEFT trains and saves them on request."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.cards.filters import MEANINGS, check, in_markdown, recorded
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from hf_imgproc_attn.models.spec_axes import MAX_BANDWIDTH
from tests.any_model.architectures import build
from tests.models.helpers import sharpen_
from tests.models.variants import VARIANTS, gpt2_config, token_ids, vit_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_scalar_of_every_layer_and_head_is_in_the_rows(variant: str) -> None:
    """Each parameter, by hand from the checkpoint's names, in its own unit; the rows are plain data."""
    model = sharpen_(ImgProcViTForImageClassification(vit_config(variant)))
    summary = model.filter_summary()
    assert json.loads(json.dumps(summary.rows)) == summary.rows
    check(kept := recorded(summary))
    assert {name for row in kept["rows"] for name in row} <= {"layer", "head", *MEANINGS}
    assert all(name in in_markdown(kept) for name in kept["learned"])
    for full, short in zip(summary.rows, kept["rows"], strict=True):
        if "buckets" in full:
            logits = [number for axis in full["buckets"] for number in axis]
            assert short["bucket_least"] == pytest.approx(min(logits), rel=1e-5)
            assert short["bucket_most"] == pytest.approx(max(logits), rel=1e-5)
    heads = model.config.num_attention_heads
    assert [(row["layer"], row["head"]) for row in summary.rows] == [(i, j) for i in range(3) for j in range(heads)]
    found = 0
    for name, value in model.state_dict().items():
        if ".scalar_bias." not in name:
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        rows = [row for row in summary.rows if row["layer"] == layer]
        kind = name.split(".")[-1]
        wanted = {
            "content_log_bandwidth": lambda v: {"h_y": math.exp(v)},
            "position_log_bandwidth": lambda v: {"h_p": math.exp(v)},
            "class_token": lambda v: dict(zip(("class_to", "class_from", "class_within"), v.tolist(), strict=True)),
            "relative_buckets": lambda v: {"buckets": v.tolist()},
            "boosting_gain": lambda v: {"gain": float(v)},
            "value_residual": lambda v: {"lambda": float(v)},
            "sink": lambda v: {"sink": float(v)},
            "inversion_gains": lambda v: {"alpha": float(v[0]), "beta": float(v[1])},
            "feedback_gains": lambda v: dict(zip(("lambda",) if len(v) == 1 else "PID", v.tolist(), strict=True)),
        }[kind]
        for head, row in enumerate(rows):
            for column, number in wanted(value.expand(heads)[head] if value.shape == (1,) else value[head]).items():
                assert row[column] == (number if isinstance(number, list) else pytest.approx(number, rel=1e-5)), name
                assert column in summary.learned
                found += 1
    assert bool(found) == bool(summary.learned)
    lines = str(summary).splitlines()
    assert len(lines) == 1 + len(summary.rows) + bool(found)
    assert lines == [line.rstrip() for line in lines]


def test_fixed_numbers_are_in_the_rows_too() -> None:
    rows, learned = ImgProcGPT2LMHeadModel(gpt2_config("neutreno", neutreno_lambda=0.3)).filter_summary()
    assert learned == []
    assert "lambda" not in rows[0], "layer 0 has no feedback"
    assert rows[-1]["lambda"] == pytest.approx(0.3)
    assert rows[0]["h_y"] == pytest.approx((4 * 5) ** 0.25)


def test_a_bandwidth_beyond_its_bound_is_shown_as_it_acts() -> None:
    model = ImgProcGPT2LMHeadModel(gpt2_config("bilateral"))
    with torch.no_grad():
        model.transformer.h[1].attn.filter.scalar_bias.content_log_bandwidth.fill_(50.0)
    shown = [row["h_y"] for row in model.filter_summary().rows if row["layer"] == 1]
    assert shown == pytest.approx([MAX_BANDWIDTH] * 4)


@pytest.mark.parametrize("saved", [False, True])
def test_peft_trains_and_saves_the_scalars_where_modules_to_save_names_them(saved: bool, tmp_path: Path) -> None:
    """`scalar_bias` is the name; without it they stay as they were."""
    options = {"modules_to_save": ["scalar_bias"]} if saved else {}
    torch.manual_seed(0)
    base = ImgProcGPT2LMHeadModel(gpt2_config("bilateral"))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    before = base.filter_summary().rows
    adapted = peft.get_peft_model(base, peft.LoraConfig(fan_in_fan_out=True, **options))
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=1.0)
    adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    after = adapted.get_base_model().filter_summary().rows
    assert (after != before) == saved
    adapted.save_pretrained(tmp_path)
    other = ImgProcGPT2LMHeadModel(gpt2_config("bilateral"))
    other.load_state_dict(weights)
    again = peft.PeftModel.from_pretrained(other, tmp_path)
    assert again.get_base_model().filter_summary().rows == after


@pytest.mark.parametrize("kind", ["gpt2", "filtered"])
def test_an_auto_class_loads_the_scalars_of_an_adapter_with_its_base(kind: str, tmp_path: Path) -> None:
    """Transformers loads base and adapter by the adapter's folder alone."""
    torch.manual_seed(0)
    if kind == "gpt2":
        base: Any = ImgProcGPT2LMHeadModel(gpt2_config("bilateral"))
        options = {"modules_to_save": ["scalar_bias"], "fan_in_fan_out": True}
    else:
        base = apply_filter(build("llama"), "learned_twicing")
        options = {"modules_to_save": ["imgproc_filter"]}
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(init_lora_weights=False, **options)
    )
    copies = {name: value for name, value in adapted.named_parameters() if ".modules_to_save." in name}
    assert copies
    with torch.no_grad():
        for value in copies.values():
            value += torch.randn(value.shape)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").named_parameters())
    assert all(torch.equal(loaded[name.removeprefix("base_model.model.")], copies[name]) for name in copies)
