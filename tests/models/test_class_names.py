"""What other libraries tell by the name of a class or the type of a model, with and without the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.auto import modeling_auto

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification, ImgProcViTModel
from tests.helpers import prepared_python, run_command
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, images, token_ids, vit_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT

# Everything that a process without the package may say of a model, one check a line.
WORKER = '''
import importlib.abc, json, logging, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_imgproc_attn":
            raise ImportError("blocked in this process")
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments
torch.set_num_threads(1)

def losses(model):
    """Losses of a few steps on rows that count upwards, and how often the next token is told afterwards."""
    rows = [{"input_ids": (i := (torch.arange(s, s + 12) % 50) + 2), "labels": i} for s in range(0, 48)]
    arguments = TrainingArguments("out", use_cpu=True, report_to=[], disable_tqdm=True, label_smoothing_factor=0.1,
        max_steps=30, per_device_train_batch_size=16, learning_rate=1e-2, save_strategy="no", logging_steps=5, seed=0)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    x = torch.stack([row["input_ids"] for row in rows])
    told = (model.eval()(x).logits.argmax(-1)[:, :-1] == x[:, 1:]).float().mean()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], float(told)

report = {}
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
remote = load("softmax")
class Mine(type(remote)):
    pass
stock = GPT2LMHeadModel.from_pretrained("stock")
stock.loss_type = "ForCausalLM"  # not told by the stock name: Trainer counts a label too many a row
report["stock"] = losses(stock)
report["remote"] = losses(remote)
report["derived"] = losses(Mine.from_pretrained("softmax"))
report["twicing"] = losses(load("twicing"))
import peft
adapted = peft.get_peft_model(load("twicing"), peft.LoraConfig(fan_in_fan_out=True))
report["lora"] = sorted(adapted.targeted_module_names)
report["modules"] = [name for name in sys.modules if name.split(".")[0] == "hf_imgproc_attn"]
open("report.json", "w").write(json.dumps(report))
'''


def test_a_model_without_the_package_is_trained_with_smoothed_labels_as_stock_gpt2_is(tmp_path: Path) -> None:
    """Remote code and a class derived from it: the same losses as the stock model of the same weights."""
    sizes = {"vocab_size": 61, "n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    softmax = ImgProcGPT2LMHeadModel(gpt2_config("softmax", **sizes))
    softmax.save_pretrained(tmp_path / "softmax")
    stock = GPT2Config()
    stock.update({name: value for name, value in softmax.config.to_dict().items() if name in GPT2Config().to_dict()})
    stock.model_type = "gpt2"
    same = GPT2LMHeadModel(stock)
    same.load_state_dict(softmax.state_dict())
    same.save_pretrained(tmp_path / "stock")
    ImgProcGPT2LMHeadModel(gpt2_config("twicing", **sizes)).save_pretrained(tmp_path / "twicing")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = run_command(
        [prepared_python(), "-P", "-c", WORKER],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["modules"] == []
    for kind in ("remote", "derived"):
        assert report[kind][0] == pytest.approx(report["stock"][0], rel=1e-4), kind
    for kind in ("stock", "remote", "derived", "twicing"):
        assert report[kind][1] > 0.8, kind
    assert report["lora"] == ["transformer.h.0.attn.c_attn"]


def test_a_derived_class_is_entered_beside_the_class_here() -> None:
    class Weighted(ImgProcGPT2LMHeadModel):
        pass

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert Weighted.__name__ in names.values()
    assert names["imgproc_gpt2"] == "ImgProcGPT2LMHeadModel"
    others = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    assert Weighted.__name__ not in others.values()


def test_a_derived_classifier_of_any_name_has_the_loss_of_its_parent() -> None:
    class Weighted(ImgProcViTForImageClassification):
        pass

    config = vit_config("bilateral", num_labels=3)
    torch.manual_seed(0)
    parent = sharpen_(ImgProcViTForImageClassification(config)).eval()
    derived = Weighted(config).eval()
    derived.load_state_dict(parent.state_dict())
    inputs: dict[str, Any] = {"pixel_values": images(), "labels": torch.tensor([2, 0])}
    assert derived(**inputs).loss == parent(**inputs).loss


def test_a_derived_encoder_has_the_weights_that_were_saved(tmp_path: Path) -> None:
    """Stock ViT is saved under other names, which are told by the name of the class."""

    class Encoder(ImgProcViTModel):
        pass

    saved = sharpen_(ImgProcViTModel(vit_config("twicing"))).eval()
    saved.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images()).last_hidden_state, saved(images()).last_hidden_state)
    loaded.save_pretrained(tmp_path / "again")
    again = ImgProcViTModel.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(images()).last_hidden_state, saved(images()).last_hidden_state)


def test_lora_without_targets_adapts_the_attention_of_both_backbones() -> None:
    language = peft.get_peft_model(
        ImgProcGPT2LMHeadModel(gpt2_config("twicing")), peft.LoraConfig(fan_in_fan_out=True)
    )
    assert {name.split(".")[-1] for name in language.targeted_module_names} == {"c_attn"}
    vision = peft.get_peft_model(ImgProcViTForImageClassification(vit_config("twicing")), peft.LoraConfig())
    assert {name.split(".")[-1] for name in vision.targeted_module_names} == {"q_proj", "v_proj"}
    vision(pixel_values=images(), labels=torch.tensor([1, 0])).loss.backward()
    assert language(token_ids()).logits.isfinite().all()
