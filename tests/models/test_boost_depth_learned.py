"""Learned feedback: one factor (or three) a head and layer, float32, out of weight decay, at the fixed ones' start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, images, token_ids, vit_config

BACKBONES = ("gpt2", "vit")
START = {("gpt2", "neutreno"): [0.4], ("vit", "neutreno"): [0.6], ("gpt2", "pidformer"): [0.5, 0.05, 0.05]}


def build(backbone: str, preset: str, learned: bool = True, **fields: Any) -> Any:
    torch.manual_seed(0)
    config_of = gpt2_config if backbone == "gpt2" else vit_config
    model_class: Any = ImgProcGPT2LMHeadModel if backbone == "gpt2" else ImgProcViTForImageClassification
    return model_class(config_of(preset, learn_feedback=learned, **fields))


def gains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("filter.scalar_bias.feedback_gains")}


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(token_ids() if isinstance(model, ImgProcGPT2LMHeadModel) else images()).logits


@pytest.mark.parametrize("preset", ["neutreno", "pidformer"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_starts_as_the_fixed_feedback(backbone: str, preset: str) -> None:
    """In every layer but the first, which has no feedback and so nothing that would never get a gradient."""
    model, fixed = build(backbone, preset), build(backbone, preset, learned=False)
    start = torch.tensor(START.get((backbone, preset), START["gpt2", preset])).expand(4, -1)
    assert len(gains(model)) == 2
    assert not any(".0." in name for name in gains(model))
    assert all(torch.equal(gain, start) for gain in gains(model).values())
    assert not gains(fixed)
    sharp = sharpen_(fixed)
    model.load_state_dict(sharp.state_dict(), strict=False)
    torch.testing.assert_close(logits(model), logits(sharp))


def test_the_start_is_a_field() -> None:
    (gain, *_) = gains(build("gpt2", "pidformer", pid_gains=[0.0, -1.0, 2.0])).values()
    assert torch.equal(gain, torch.tensor([0.0, -1.0, 2.0]).expand(4, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", ["neutreno", "pidformer"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_factors_stay_in_float32(backbone: str, preset: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """In memory and through a file; the model's own precision stays as it is."""
    model = sharpen_(build(backbone, preset))
    for gain in gains(model).values():
        gain.data.fill_(1.001)
    model.to(dtype)
    model.save_pretrained(tmp_path)
    for other in (model, type(model).from_pretrained(tmp_path, dtype=dtype)):
        assert len(gains(other)) == 2
        for gain in gains(other).values():
            assert gain.dtype == torch.float32
            assert (gain == 1.001).all()
    output = logits(model)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(gain.grad.dtype == torch.float32 and gain.grad.abs().min() > 0 for gain in gains(model).values())


def test_a_checkpoint_without_factors_is_refused(tmp_path: Any) -> None:
    build("gpt2", "neutreno", learned=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another variant.*missing parameters .*feedback_gains"):
        ImgProcGPT2LMHeadModel.from_pretrained(tmp_path, learn_feedback=True)


def test_the_trainer_leaves_factors_out_of_weight_decay(tmp_path: Any) -> None:
    model = build("gpt2", "pidformer")
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    decayed = Trainer(model=model, args=arguments).get_decay_parameter_names(model)
    assert not gains(model).keys() & set(decayed)
    assert any(name.endswith("c_attn.weight") for name in decayed)
