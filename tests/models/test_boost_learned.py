"""Learned boosting: one gain a head, float32, out of weight decay, 1 at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_operators import learned
from hf_imgproc_attn.models.kernel_given import FeaturePositions
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import filter_call, sharpen_
from tests.models.layer_cases import random
from tests.models.variants import gpt2_config, images, token_ids, vit_config


def build(backbone: str, preset: str = "learned_twicing") -> Any:
    if backbone == "gpt2":
        return ImgProcGPT2LMHeadModel(gpt2_config(preset))
    return ImgProcViTForImageClassification(vit_config(preset))


def gains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("filter.scalar_bias.boosting_gain")}


@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_it_starts_as_twicing(backbone: str) -> None:
    model, fixed = build(backbone), build(backbone, "twicing")
    assert len(gains(model)) == 3
    assert all(torch.equal(gain, torch.ones(4)) for gain in gains(model).values())
    assert not gains(fixed)
    sharp = sharpen_(fixed)
    model.load_state_dict(sharp.state_dict(), strict=False)
    given = token_ids() if backbone == "gpt2" else images()
    torch.testing.assert_close(model.eval()(given).logits, sharp.eval()(given).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_gains_stay_in_float32(backbone: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """In memory, through a file, and in what they do: a gain of 1.001 is not one of 1."""
    model = sharpen_(build(backbone))
    with torch.no_grad():
        for gain in gains(model).values():
            gain.fill_(1.001)
    model.to(dtype)
    model.save_pretrained(tmp_path)
    for other in (model, type(model).from_pretrained(tmp_path, dtype=dtype)):
        for gain in gains(other).values():
            assert gain.dtype == torch.float32
            assert torch.equal(gain, torch.full((4,), 1.001))
    given = token_ids() if backbone == "gpt2" else images()
    model(given).logits.float().square().sum().backward()
    assert all(gain.grad.dtype == torch.float32 and gain.grad.abs().min() > 0 for gain in gains(model).values())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "chunked"])
def test_what_stands_at_padding_does_not_reach_the_gains(backend: str, is_causal: bool) -> None:
    """Keys and values of hidden tokens are NaN, and their rows are written out beside the others."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool().view(2, 1, 1, 5)
    results = []
    for poison in (0.0, float("nan")):
        query, key, value = (random(2, 2, 5, 3, seed=seed) for seed in range(3))
        given = [x.masked_fill(~mask.mT, poison).requires_grad_() for x in (key, value)]
        gain = random(2, 1, 1, seed=3).requires_grad_()
        options: Any = {"attention_mask": mask, "is_causal": is_causal, "boosting": "learned", "boosting_gain": gain}
        output = run_filter(filter_call(query, *given, **options), backend)
        seen = output.masked_select(mask.mT)
        results.append([seen, *torch.autograd.grad(seen.square().sum(), [*given, gain])])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", [0, 2])
def test_keys_hidden_from_some_heads_of_a_group(features: int) -> None:
    """In blocks, where feature columns give every head values of its own."""
    given = [random(2, heads, 5, 3, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    mask = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, 1, :, 2] = False
    columns = [random(1, 4, 5, features, seed=seed) for seed in (5, 6)]
    options: dict[str, Any] = {"positions": FeaturePositions(*columns)} if features else {}
    call = filter_call(*given, attention_mask=mask, boosting="learned", boosting_gain=random(4, 1, 1), **options)
    output, exact = (run_filter(call, backend) for backend in ("blocked", "reference"))
    torch.testing.assert_close(output, exact, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(each.square().sum(), given) for each in (output, exact))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


def test_the_product_is_not_rounded_to_half_precision_gains() -> None:
    """gamma A r in bfloat16 with gamma = 1 + 2^-8, which bfloat16 rounds to 1: right on average."""
    value = 1 + torch.rand(1, 1, 4096, 1, generator=torch.Generator().manual_seed(0))
    value, gain = value.bfloat16(), torch.full((1, 1, 1), 1 + 2**-8)

    def attend(stream: torch.Tensor) -> torch.Tensor:
        return stream / 2

    got = learned(attend, lambda _, rows: rows, value, value, 2, gain)
    assert got.dtype == torch.bfloat16

    def bias(factor: float) -> float:
        return float((got.double() / value.double() - (0.5 + factor * 0.25)).mean().abs())

    assert bias(float(gain)) < bias(1.0) / 3


def test_the_trainer_leaves_gains_out_of_weight_decay(tmp_path: Any) -> None:
    model = build("gpt2")
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    decayed = Trainer(model=model, args=arguments).get_decay_parameter_names(model)
    assert not gains(model).keys() & set(decayed)
    assert any(name.endswith("c_attn.weight") for name in decayed)
