"""Checkpoints, configurations and caches that do not fit are one clear error, with what to do instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.bad_input_cases import CLASSES, gpt2
from tests.models.variants import (
    ALL_STOCK,
    VARIANTS,
    token_ids,
)

FILTERED = tuple(name for name in VARIANTS if name not in ALL_STOCK)

# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------

OTHER_VARIANTS = [
    ("bilateral", "twicing"),
    ("twicing", "bilateral"),
    ("bilateral", "softmax"),
    ("softmax", "bilateral"),
    ("bilateral_gaussian", "bilateral"),
    ("bilateral", "bilateral_gaussian"),
    ("bilateral_gaussian", "softmax"),
    ("softmax", "bilateral_gaussian"),
    ("softmax", "t5_bias"),
    ("t5_bias", "bilateral_gaussian"),
    ("shared", "bilateral"),
    ("mixed", "mixed_fixed"),
    ("gradient_boosted", "softmax"),
    ("softmax", "gradient_boosted"),
    ("learned_twicing", "twicing"),
    ("twicing", "learned_twicing"),
]


@pytest.mark.parametrize(("saved", "wanted"), OTHER_VARIANTS)
@pytest.mark.parametrize("backbone", CLASSES)
def test_checkpoint_of_another_variant(backbone: str, saved: str, wanted: str, tmp_path: Path) -> None:
    """Every parameter that is missing, too many or of another shape is named, as the model names it."""
    model_class, config, *_ = CLASSES[backbone]
    model_class(config(saved)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another variant.*missing parameters \[.*unexpected parameters \[") as error:
        model_class.from_pretrained(tmp_path, config=config(wanted))
    shapes = [{k: v.shape for k, v in model_class(config(name)).state_dict().items()} for name in (saved, wanted)]
    missing, unexpected = shapes[1].keys() - shapes[0].keys(), shapes[0].keys() - shapes[1].keys()
    reshaped = {name for name in shapes[0].keys() & shapes[1].keys() if shapes[0][name] != shapes[1][name]}
    text = str(error.value).replace(f"'{tmp_path}'", "")
    assert set(re.findall(r"'([\w.]+)'", text)) == missing | unexpected | reshaped
    found = [set(re.findall(r"'([\w.]+)'", part)) for part in re.findall(r"parameters \[(.*?)\]", text)]
    assert missing <= found[0] <= missing | reshaped
    assert unexpected <= found[1] <= unexpected | reshaped


@pytest.mark.parametrize("wanted", ["bilateral", "bilateral_gaussian", "t5_bias", "mixed", "mixed_kernels"])
@pytest.mark.parametrize("backbone", CLASSES)
def test_stock_checkpoint_into_a_variant(backbone: str, wanted: str, tmp_path: Path) -> None:
    model_class, config, stock_class, stock_config = CLASSES[backbone]
    stock_class(stock_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another variant.*missing parameters \[.*filter\.") as error:
        model_class.from_pretrained(tmp_path, config=config(wanted))
    assert "convert" in str(error.value)


@pytest.mark.parametrize("backbone", CLASSES)
def test_another_variant_can_be_forced(backbone: str, tmp_path: Path) -> None:
    model_class, config, *_ = CLASSES[backbone]
    saved = model_class(config("bilateral"))
    saved.save_pretrained(tmp_path)
    forced = model_class.from_pretrained(tmp_path, config=config("twicing"), ignore_mismatched_sizes=True)
    assert all(value.isfinite().all() for value in forced.state_dict().values())
    name = "transformer.wte.weight" if backbone == "gpt2" else "vit.embeddings.cls_token"
    assert torch.equal(forced.state_dict()[name], saved.state_dict()[name])


@pytest.mark.parametrize("backbone", CLASSES)
def test_checkpoints_without_a_head_still_load(backbone: str, tmp_path: Path) -> None:
    """The check is about the filter: a missing classifier is what fine-tuning starts from."""
    model_class, config, *_ = CLASSES[backbone]
    base = model_class(config("bilateral")).base_model
    base.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    for name, value in base.state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(loaded.base_model.state_dict()[name], value), name


@pytest.mark.parametrize("cut", [100, -1, -200, 5])
@pytest.mark.parametrize("backbone", CLASSES)
def test_truncated_weights(backbone: str, cut: int, tmp_path: Path) -> None:
    model_class, config, *_ = CLASSES[backbone]
    model_class(config("bilateral")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(OSError, match=rf"(?s){re.escape(str(tmp_path))}.*truncated or corrupt"):
        model_class.from_pretrained(tmp_path)


def test_truncated_weights_through_an_auto_class(tmp_path: Path) -> None:
    gpt2("bilateral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(OSError, match=r"(?s)truncated or corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_checkpoint_that_lacks_one_filter_parameter(tmp_path: Path) -> None:
    gpt2("bilateral").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "transformer.h.1.attn.filter.scalar_bias.position_log_bandwidth"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing parameters \['{re.escape(lost)}'\], unexpected parameters \[\]"):
        ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)


def test_configuration_with_a_wrong_value_on_disk(tmp_path: Path) -> None:
    gpt2("twicing").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for field, value, rule in (
        ("boosting", "thricing", r"boosting must be one of none, twicing, .*, got 'thricing'"),
        ("boosting_steps", 0, r"boosting_steps must be an integer >= 1"),
        ("boosting_step", 3, r"unknown configuration field boosting_step=3; did you mean boosting_steps\?"),
        ("boosted_layers", [3], r"boosted_layers must be integers from -3 to 2"),
    ):
        file.write_text(json.dumps({**config, field: value}))
        with pytest.raises(Exception, match=rule):
            ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)


def test_configuration_that_was_changed_after_it_was_made() -> None:
    """Fields can be set one by one, so the model looks again."""
    for model_class, make, *_ in CLASSES.values():
        config = make("twicing")
        config.boosted_layers = [7]
        with pytest.raises(Exception, match=r"boosted_layers must be integers from -3 to 2"):
            model_class(config)


# --------------------------------------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------------------------------------


def test_continuous_batching_is_not_built_for_filtered_layers() -> None:
    with pytest.raises(ValueError, match=r"continuous batching needs a paged .* not supported .* here layer 0"):
        gpt2("twicing").generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"paged"):
        gpt2("twicing").generate(token_ids(), cache_implementation="paged", max_new_tokens=1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching_of_stock_layers_generates_what_generate_does(implementation: str) -> None:
    model = gpt2("softmax", implementation=implementation)
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11]]
    # As it comes, the paged cache takes nearly all the memory that the machine has free.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    answers = model.generate_batch(
        prompts, generation_config=options, continuous_batching_config=small, progress_bar=False
    )
    found = sorted(answer.generated_tokens for answer in answers.values())
    wanted = sorted(
        model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
        for prompt in prompts
    )
    assert found == wanted


@pytest.mark.parametrize("backbone", CLASSES)
def test_other_shapes_raise_what_the_stock_class_raises(backbone: str, tmp_path: Path) -> None:
    """A head of another size, with the names of the tensors in our message."""
    model_class, config, stock_class, stock_config = CLASSES[backbone]
    other = {"vocab_size": 67} if backbone == "gpt2" else {"num_labels": 7}
    model_class(config("softmax")).save_pretrained(tmp_path / "own")
    stock_class(stock_config()).save_pretrained(tmp_path / "stock")
    with pytest.raises(RuntimeError):
        stock_class.from_pretrained(tmp_path / "stock", **other)
    with pytest.raises(RuntimeError, match=r"weight.*in place of"):
        model_class.from_pretrained(tmp_path / "own", **other)


@pytest.mark.parametrize("backbone", CLASSES)
def test_only_modules_that_a_preset_has_are_kept_in_float32(backbone: str) -> None:
    model_class, config, *_ = CLASSES[backbone]
    for variant, kept in (("softmax", set()), ("twicing", set()), ("bilateral", {"scalar_bias"})):
        assert model_class(config(variant))._keep_in_fp32_modules_strict == kept


@pytest.mark.parametrize("variant", ["twicing", "bilateral_twicing", "mixed", "three_steps", "sos", "learned_twicing"])
def test_attentions_of_boosted_layers_need_all_rows(variant: str) -> None:
    model = gpt2(variant, "eager")
    output = model(token_ids(), output_attentions=True)
    assert len(output.attentions) == 3
    with pytest.raises(ValueError, match=r"output_attentions=True with use_cache=False"):
        model(token_ids(length=1), past_key_values=output.past_key_values, output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions=True with use_cache=False"):
        model.generate(
            token_ids(), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True, pad_token_id=0
        )
