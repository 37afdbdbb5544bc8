"""The models inside the tools people use: checkpointing, precision, initial values, PEFT, Trainer."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.layer_parameters import FilterScalars
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2Block
from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTLayer,
)
from tests.models.ecosystem_cases import BACKBONES, CLASSES, CONFIGS, build, inputs_of, real_logits
from tests.models.variants import (
    CUSTOM,
    IMPLEMENTATIONS,
    VARIANTS,
    assert_same_gradients,
    gradients,
    images,
    token_ids,
)

pytestmark = [
    pytest.mark.both_back_ends,
    pytest.mark.filterwarnings(
        # The newest versions have another name for it, the oldest supported ones do not; PEFT asks by the old one.
        "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
    ),
]
WITH_SCALARS = ("bilateral", "bilateral_gaussian", "bilateral_twicing", "t5_bias", "mixed", "mixed_kernels", "shared")


def scalars(model: nn.Module) -> dict[str, nn.Parameter]:
    """Bandwidths and class-token biases."""
    return {name: value for name, value in model.named_parameters() if ".scalar_bias." in name}


def filters(model: nn.Module) -> list[AttentionFilter]:
    """The filters of all layers."""
    return [module for module in model.modules() if isinstance(module, AttentionFilter)]


# --------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("backbone,variant")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_changes_nothing(
    backbone: str, variant: str, implementation: str, use_reentrant: bool
) -> None:
    dropout = {"attn_pdrop": 0.2, "resid_pdrop": 0.1} if backbone == "gpt2" else {"attention_probs_dropout_prob": 0.2}
    model = build(backbone, variant, implementation, **dropout).double().train()
    calls = []
    blocks = [module for module in model.modules() if isinstance(module, (ImgProcGPT2Block, ImgProcViTLayer))]
    for block in blocks:
        block.attn_norm = block.ln_1 if backbone == "gpt2" else block.layernorm_before
        block.attn_norm.register_forward_hook(lambda *_: calls.append(1))
        del block.attn_norm
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        calls.clear()
        torch.manual_seed(0)
        loss = model(**inputs_of(backbone, torch.float64)).loss
        results.append((loss, gradients(model, loss), len(calls)))
    (plain, plain_gradients, once), (recomputed, recomputed_gradients, twice) = results
    assert (once, twice) == (3, 6)
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=0)
    assert_same_gradients(recomputed_gradients, plain_gradients, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("backbone,variant")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_is_near_float64(backbone: str, variant: str, dtype: torch.dtype, implementation: str) -> None:
    """Forward and backward are finite, and off by what rounding the same weights costs the stock model."""
    half = build(backbone, variant, implementation).to(dtype).eval()
    truth = build(backbone, variant, "eager").double().eval()
    truth.load_state_dict(half.state_dict())
    results = []
    for model, precision in ((half, dtype), (truth, torch.float64)):
        output = model(**inputs_of(backbone, precision))
        assert output.logits.dtype == precision
        results.append((real_logits(backbone, output.logits).double(), gradients(model, output.loss)))
    (got, got_gradients), (wanted, wanted_gradients) = results
    relative = ((got - wanted).norm() / wanted.norm()).item()
    assert relative < (0.05 if dtype == torch.bfloat16 else 0.008)
    for name, gradient in got_gradients.items():
        assert gradient.isfinite().all(), name
        error = (gradient.double() - wanted_gradients[name]).norm()
        # Small gradients drown in the rounding of large ones: measure against the largest of their kind too.
        size = max(wanted_gradients[name].norm(), 0.02 * max(other.norm() for other in wanted_gradients.values()))
        assert error / size < (0.25 if dtype == torch.bfloat16 else 0.06), name


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_is_near_float32(backbone: str, variant: str, implementation: str) -> None:
    model = build(backbone, variant, implementation).train()
    wanted = model(**inputs_of(backbone))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**inputs_of(backbone))
    got_gradients = gradients(model, got.loss)
    left, right = (real_logits(backbone, output.logits).float() for output in (got, wanted))
    assert (left - right).norm() / right.norm() < 0.05
    for name, gradient in got_gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name


def halve(model: nn.Module, how: str) -> nn.Module:
    """The model in half precision, by one of the ways there are."""
    return {
        "half": lambda: model.half(),
        "bfloat16": lambda: model.bfloat16(),
        "to_dtype": lambda: model.to(torch.bfloat16),
        "to_keyword": lambda: model.to(dtype=torch.float16, device="cpu"),
        "to_tensor": lambda: model.to(torch.empty((), dtype=torch.bfloat16)),
        "submodules": lambda: [module.bfloat16() for module in model.children()] and model,
    }[how]()


@pytest.mark.sampled
@pytest.mark.parametrize("how", ["half", "bfloat16", "to_dtype", "to_keyword", "to_tensor", "submodules"])
@pytest.mark.parametrize("variant", WITH_SCALARS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scalars_stay_in_float32(backbone: str, variant: str, how: str) -> None:
    """Their values, their gradients, and what an optimizer holds of them; nothing else stays."""
    model = build(backbone, variant)
    model(**inputs_of(backbone)).loss.backward()
    before = {name: (value, value.detach().clone(), value.grad.clone()) for name, value in scalars(model).items()}
    assert before
    halve(model, how)
    for name, (parameter, value, gradient) in before.items():
        assert scalars(model)[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradient)
    others = {name: value for name, value in model.named_parameters() if name not in before}
    assert {value.dtype for value in others.values()} <= {torch.bfloat16, torch.float16}


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("variant", WITH_SCALARS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scalars_stay_in_float32_when_a_model_is_made_or_loaded(backbone: str, variant: str, tmp_path: Path) -> None:
    model = build(backbone, variant)
    auto_class = {"gpt2": AutoModelForCausalLM, "vit": AutoModelForImageClassification}[backbone]
    model.save_pretrained(tmp_path / "single")
    model.bfloat16().save_pretrained(tmp_path / "half")
    made = {
        "from_pretrained": CLASSES[backbone].from_pretrained(tmp_path / "single", dtype=torch.bfloat16),
        "from_pretrained text": CLASSES[backbone].from_pretrained(tmp_path / "single", dtype="float16"),
        "from_pretrained auto": CLASSES[backbone].from_pretrained(tmp_path / "half", dtype="auto"),
        "from_config": auto_class.from_config(CONFIGS[backbone](variant), dtype=torch.bfloat16),
        "config": CLASSES[backbone]._from_config(CONFIGS[backbone](variant, dtype="bfloat16")),
    }
    for way, other in made.items():
        assert {value.dtype for value in scalars(other).values()} == {torch.float32}, way
        assert other.dtype in (torch.bfloat16, torch.float16), way
        if way.startswith("from_pretrained"):
            for name, value in scalars(other).items():
                assert torch.equal(value, scalars(model)[name]), (way, name)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {half[name].dtype for name in half if "scalar_bias" in name} == {torch.float32}


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_made_in_half_precision_starts_where_a_float32_one_does(backbone: str) -> None:
    made = [
        CLASSES[backbone]._from_config(CONFIGS[backbone]("mixed"), dtype=d) for d in (torch.float32, torch.bfloat16)
    ]
    for name, value in scalars(made[0]).items():
        assert torch.equal(scalars(made[1])[name], value), name


@pytest.mark.both_back_ends(False)
def test_float64_models_have_float64_scalars(tmp_path: Path) -> None:
    """Otherwise float64 is float32 in disguise; also where a model is loaded in it."""
    for backbone in BACKBONES:
        model = build(backbone, "mixed")
        model.save_pretrained(tmp_path / backbone)
        loaded = CLASSES[backbone].from_pretrained(tmp_path / backbone, dtype=torch.float64)
        for other in (model.double(), loaded):
            assert {value.dtype for value in scalars(other).values()} == {torch.float64}


# --------------------------------------------------------------------------------------------------------------------
# Initial values
# --------------------------------------------------------------------------------------------------------------------


def documented_scalars(backbone: str, model: Any) -> dict[str, torch.Tensor]:
    """What the framework says the scalars start at, from the configuration alone."""
    config, wanted = model.config, {}
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    default = (4 * head_dim) ** 0.25
    longest = config.n_positions if backbone == "gpt2" else max(config.image_size) // config.patch_size
    spread = [default * (longest / default) ** (head / (heads - 1)) for head in range(heads)]
    for name, value in scalars(model).items():
        kernel = model.config.layer_specs[int(re.search(r"\.(\d+)\.", name).group(1))].position_kernel
        if name.endswith("class_token"):
            wanted[name] = torch.zeros(heads, 3)
        elif name.endswith("relative_buckets"):
            wanted[name] = torch.zeros(heads, config.position_axes, config.relative_attention_num_buckets or 32)
        elif name.endswith("position_log_bandwidth") and kernel == "gaussian":
            wanted[name] = torch.tensor([math.log(item) for item in spread])
        else:
            wanted[name] = torch.full_like(value, math.log(default))
    return wanted


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("variant", WITH_SCALARS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scalars_start_where_the_framework_says(backbone: str, variant: str) -> None:
    model = CLASSES[backbone](CONFIGS[backbone](variant))
    for name, value in documented_scalars(backbone, model).items():
        torch.testing.assert_close(scalars(model)[name].detach(), value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    "variant", ["bilateral", "bilateral_gaussian", "alibi", "t5_bias", "mixed", "mixed_kernels", "shared"]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameters_that_a_checkpoint_lacks_are_initialised(
    backbone: str, variant: str, meta: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is poisoned: what initialisation forgets is not a number."""
    model = build(backbone, variant)
    model.save_pretrained(tmp_path)
    kept = {
        name: value
        for name, value in load_file(tmp_path / "model.safetensors").items()
        if "scalar_bias" not in name and "position" not in name and "wpe" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if meta:
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    loaded, info = CLASSES[backbone].from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    monkeypatch.undo()
    missing = {name for name in model.state_dict() if name not in info["missing_keys"]}
    for name, value in model.state_dict().items():
        if name in missing:
            assert torch.equal(loaded.state_dict()[name], value), name
    for name, value in documented_scalars(backbone, loaded).items():
        torch.testing.assert_close(scalars(loaded)[name].detach(), value)
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all(), name
        if "position_projection" in name and "norm" not in name:
            assert 0.01 < value.std() < 0.04, name
        if "position_projection.norm" in name:
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
        if name.endswith(("wpe.weight", "position_embeddings")):
            assert 0.01 < value.std() < 0.04, name


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory filled with NaN."""
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor


@pytest.mark.both_back_ends(False)
def test_reset_parameters_undoes_training() -> None:
    module = FilterScalars(3, [1.0, 2.0, 3.0], None, class_token=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    module.reset_parameters()
    torch.testing.assert_close(module.content_log_bandwidth.exp(), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(module.class_token, torch.zeros(3, 3))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_copies_and_models_without_memory(backbone: str) -> None:
    """deepcopy, pickle, and a half-precision model on the meta device that is filled later."""
    model = build(backbone, "mixed").bfloat16().eval()
    inputs = inputs_of(backbone, torch.bfloat16)
    wanted = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.device("meta"):
        empty = CLASSES[backbone](CONFIGS[backbone]("mixed", attn_implementation="sdpa")).bfloat16()
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), empty.eval()):
        assert torch.equal(other(**inputs).logits, wanted)
        assert {value.dtype for value in scalars(other).values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------------------------
# PEFT
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_lora_trains_adapters_only_and_merges(
    backbone: str, variant: str, implementation: str, tmp_path: Path
) -> None:
    model = build(backbone, variant, implementation).eval()
    inputs = inputs_of(backbone)
    base = real_logits(backbone, model(**inputs).logits).detach()
    frozen = {name: value.detach().clone() for name, value in model.named_parameters()}
    options = (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        if backbone == "gpt2"
        else {"target_modules": ["q_proj", "v_proj"]}
    )
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, **options))
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(trained) == 3 * 2 * len(options["target_modules"])
    torch.testing.assert_close(real_logits(backbone, adapted(**inputs).logits), base)
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**inputs).loss.backward()
        assert {name for name, value in adapted.named_parameters() if value.grad is not None} == trained
        optimizer.step()
    tuned = real_logits(backbone, adapted.eval()(**inputs).logits).detach()
    assert (tuned - base).abs().max() > 1e-2
    for name, value in adapted.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(backbone, variant, implementation).eval(), tmp_path)
    torch.testing.assert_close(real_logits(backbone, again(**inputs).logits), tuned)
    merged = adapted.merge_and_unload()
    assert type(merged) is CLASSES[backbone]
    torch.testing.assert_close(real_logits(backbone, merged(**inputs).logits), tuned, rtol=1e-4, atol=1e-4)


def test_lora_with_gradient_checkpointing_and_bfloat16() -> None:
    """As large models are tuned: frozen half-precision weights, recomputed blocks, inputs that require a gradient."""
    for backbone in BACKBONES:
        model = build(backbone, "bilateral_twicing").bfloat16().train()
        targets = ["c_attn"] if backbone == "gpt2" else ["q_proj", "v_proj"]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=targets, fan_in_fan_out=backbone == "gpt2", r=2)
        )
        adapted(**inputs_of(backbone, torch.bfloat16)).loss.backward()
        for name, value in adapted.named_parameters():
            assert (value.grad is not None) == ("lora_" in name), name
        assert {value.dtype for value in scalars(adapted).values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """The rows of a batch."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


@pytest.mark.parametrize("variant", ["softmax", "bilateral_gaussian", "mixed", "shared"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_trainer_trains_every_parameter_and_decays_no_scalar(backbone: str, variant: str, tmp_path: Path) -> None:
    model = build(backbone, variant)
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, max_steps=2, learning_rate=1e-2, weight_decay=0.1, report_to=[], disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=2, bf16=variant == "mixed", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Examples(inputs_of(backbone)))
    decayed = set(trainer.get_decay_parameter_names(model))
    assert not decayed & set(scalars(model))
    assert not {name for name in decayed if "norm" in name or name.endswith("bias")}
    assert {name for name in decayed if "position_projection.query" in name or "position_projection.key" in name} == {
        name for name, _ in model.named_parameters() if re.search(r"position_projection\.(query|key)\.", name)
    }
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with contextlib.redirect_stdout(None):
        trainer.train()
    unchanged = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    # The last layer's patches do not reach the class token's position, which it has not.
    allowed = r"layers\.2\.attention\.filter" if backbone == "vit" else r"$^"
    assert {name for name in unchanged if not re.search(allowed, name)} == set()


# --------------------------------------------------------------------------------------------------------------------
# Batches of no rows (those of every preset: docs/compatibility.md)
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", CUSTOM)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_empty_batch_gives_empty_outputs(backbone: str, variant: str, implementation: str) -> None:
    """Layers whose attention is the stock one, which cannot reshape it, are among the others here."""
    model = build(backbone, variant, implementation)
    inputs = {"input_ids": token_ids()[:0]} if backbone == "gpt2" else {"pixel_values": images()[:0]}
    attentions = implementation == "eager" and "gradient_boosted" not in str(model.config.boosting)
    output = model(**inputs, output_attentions=attentions)
    assert len(output.logits) == 0
    output.logits.sum().backward()
    if attentions:
        assert all(weights.shape[0] == 0 and weights.shape[-2:].numel() for weights in output.attentions)
