"""Wrong input ends in one error that names the field, the rule and the value, before it does harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer, StaticLayer

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import GPT2, VIT
from tests.models.variants import (
    ALL_STOCK,
    BOOSTED,
    IMPLEMENTATIONS,
    VARIANTS,
    gpt2_config,
    images,
    token_ids,
    vit_config,
)

FILTERED = tuple(name for name in VARIANTS if name not in ALL_STOCK)
CLASSES = {
    "gpt2": (ImgProcGPT2LMHeadModel, gpt2_config, GPT2LMHeadModel, lambda: GPT2Config(**GPT2)),
    "vit": (ImgProcViTForImageClassification, vit_config, ViTForImageClassification, lambda: ViTConfig(**VIT)),
}


def gpt2(variant: str = "softmax", implementation: str = "sdpa", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """A tiny language model in evaluation mode."""
    return ImgProcGPT2LMHeadModel(gpt2_config(variant, attn_implementation=implementation, **overrides)).eval()


def vit(variant: str = "softmax", implementation: str = "sdpa", **overrides: Any) -> ImgProcViTForImageClassification:
    """A tiny classifier in evaluation mode."""
    return ImgProcViTForImageClassification(
        vit_config(variant, attn_implementation=implementation, **overrides)
    ).eval()


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 8), (2, 10), (1, 9), (9,), (2, 9, 9), (2, 1, 9, 8), (2, 1, 8, 9), (2, 3, 9, 9), (3, 1, 9, 9), (18,)]
)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_gpt2_masks_of_a_wrong_shape(variant: str, shape: tuple[int, ...], implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 9\) .*, got {re.escape(str(shape))}"):
        gpt2(variant, implementation)(token_ids(), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 15), (2, 17), (16,), (2, 16, 16), (2, 1, 16, 15), (2, 3, 16, 16), (5, 1, 16, 16)]
)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_vit_masks_of_a_wrong_shape(variant: str, shape: tuple[int, ...], implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 16\) .*, got {re.escape(str(shape))}"):
        vit(variant, implementation)(images(), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("length", [1, 9, 11])
def test_masks_must_cover_the_cached_tokens(length: int) -> None:
    model = gpt2("twicing")
    cache = model(token_ids()).past_key_values
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 10\) .*, got \(2, {length}\)"):
        model(token_ids(length=1), attention_mask=torch.ones(2, length), past_key_values=cache)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_four_dimensional_masks_of_integers(variant: str, implementation: str) -> None:
    """Ones and zeros that would be added to the logits."""
    with pytest.raises(ValueError, match=r"attention_mask .*bool.*float.*, got torch.int64"):
        gpt2(variant, implementation)(token_ids(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.long).tril())
    with pytest.raises(ValueError, match=r"attention_mask .*bool.*float.*, got torch.int64"):
        vit(variant, implementation)(images(), attention_mask=torch.ones(2, 1, 16, 16, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------------------
# Positions and sizes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["additive", "untied", ["gaussian", "untied", "none"]])
def test_text_longer_than_the_table(kernel: Any) -> None:
    model = gpt2(position_kernel=kernel)
    assert model(token_ids(length=24)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"25 tokens .* longer than n_positions=24 .*position_kernel="):
        model(token_ids(length=25))
    cache = model(token_ids(length=20)).past_key_values
    with pytest.raises(ValueError, match=r"25 tokens .* longer than n_positions=24"):
        model(token_ids(length=5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"n_positions"):
        model.generate(token_ids(length=20), max_new_tokens=9, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kernel", ["gaussian", "none", ["gaussian", "none", "none"]])
def test_text_of_any_length_where_there_is_no_table(kernel: Any) -> None:
    model = gpt2(position_kernel=kernel)
    assert model(token_ids(length=40)).logits.isfinite().all()
    positions = torch.arange(100, 109).unsqueeze(0)
    assert model(token_ids(), position_ids=positions).logits.isfinite().all()


@pytest.mark.parametrize("kernel", ["additive", "untied"])
@pytest.mark.parametrize(("first", "last"), [(16, 24), (-1, 7), (100, 108)])
def test_positions_outside_the_table(kernel: str, first: int, last: int) -> None:
    positions = torch.arange(first, last + 1).unsqueeze(0)
    rule = rf"position_ids must be from 0 to n_positions - 1 = 23 .*, got values from {first} to {last}"
    with pytest.raises(ValueError, match=rule):
        gpt2(position_kernel=kernel)(token_ids(), position_ids=positions)


@pytest.mark.parametrize("shape", [(9,), (2, 8), (3, 9), (2, 10), (2, 9, 1), (1, 1)])
@pytest.mark.parametrize("variant", ["softmax", "bilateral", "bilateral_gaussian"])
def test_positions_of_a_wrong_shape(variant: str, shape: tuple[int, ...]) -> None:
    rule = rf"position_ids must have shape \(2, 9\) or \(1, 9\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=rule):
        gpt2(variant)(token_ids(), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(12, 20), (24, 12), (20, 16), (4, 4)])
def test_images_of_another_size(variant: str, size: tuple[int, int]) -> None:
    rule = (
        rf"pixel_values must be images of 20 x 12 pixels, got {size[0]} x {size[1]}: .*interpolate_pos_encoding=True"
    )
    with pytest.raises(ValueError, match=rule):
        vit(variant)(images(height=size[0], width=size[1]))


def test_images_with_other_channels() -> None:
    with pytest.raises(ValueError, match=r"(?s)channel.*2.*3"):
        vit("bilateral")(torch.zeros(1, 3, 20, 12))


def test_images_without_a_batch() -> None:
    with pytest.raises(
        ValueError, match=r"pixel_values must .*\[batch, channels, height, width\].*, got .*\(?\[?2, 20, 12"
    ):
        vit("bilateral")(torch.zeros(2, 20, 12))
    with pytest.raises(ValueError, match=r"pixel_values .*, got None"):
        vit("bilateral")()


# --------------------------------------------------------------------------------------------------------------------
# Tokens and encoders
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_both_or_neither_of_tokens_and_embeddings(variant: str) -> None:
    model = gpt2(variant)
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds, got (neither|none)"):
        model()
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds, got both"):
        model(token_ids(), inputs_embeds=torch.zeros(2, 9, 20))


@pytest.mark.parametrize("inputs", [{"input_ids": token_ids()[0]}, {"inputs_embeds": torch.zeros(9, 20)}])
def test_text_without_a_batch(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must have shape \[batch, length\].*, got \[9"):
        gpt2("bilateral")(**inputs)


@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_an_encoder_for_a_model_without_cross_attention(variant: str) -> None:
    with pytest.raises(ValueError, match=r"encoder_hidden_states .*add_cross_attention=True, got False"):
        gpt2(variant)(token_ids(), encoder_hidden_states=torch.zeros(2, 4, 20))


# --------------------------------------------------------------------------------------------------------------------
# Attention back-ends
# --------------------------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "paged|sdpa",
    "sdpaa",
    "flash",
    "",
]


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
@pytest.mark.parametrize("backbone", CLASSES)
def test_other_attention_implementations(backbone: str, variant: str, name: str, tmp_path: Path) -> None:
    model_class, config, *_ = CLASSES[backbone]
    rule = re.escape(f'Specified `attn_implementation="{name}"` is not supported. The only possible arguments are ')
    with pytest.raises(ValueError, match=rule):
        model_class(config(variant, attn_implementation=name))
    with pytest.raises(ValueError, match=rule):
        model_class._from_config(config(variant), attn_implementation=name)
    model = model_class(config(variant))
    with pytest.raises(ValueError, match=rule):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        model_class.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize(
    ("backbone", "variant"), [("gpt2", "bilateral_twicing"), ("vit", "softmax"), ("vit", "bilateral_twicing")]
)
def test_paged_attention_is_for_stock_decoders_alone(backbone: str, variant: str) -> None:
    """It is what continuous batching makes of `eager`."""
    model_class, config, *_ = CLASSES[backbone]
    with pytest.raises(ValueError, match=r"paged\|eager.* is not supported"):
        model_class(config(variant, attn_implementation="paged|eager"))
    stock = gpt2("softmax", implementation="paged|eager")
    assert stock.config._attn_implementation == "paged|eager"


@pytest.mark.parametrize("backbone", CLASSES)
def test_supported_implementations_can_be_exchanged(backbone: str) -> None:
    model_class, config, *_ = CLASSES[backbone]
    model = model_class(config("bilateral"))
    assert model.config._attn_implementation == "sdpa"
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
    model.set_attn_implementation({"": "eager"})
    assert model.config._attn_implementation == "eager"
    for flag in ("_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(model_class, flag) is False


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


@pytest.mark.parametrize("name", ["static", "offloaded_static", "quantized", "sliding_window"])
@pytest.mark.parametrize("variant", FILTERED)
def test_cache_implementations_that_are_not_built(variant: str, name: str) -> None:
    model = gpt2(variant)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=rf"cache_implementation.*{name}"):
        model.generate(token_ids(), max_new_tokens=2, cache_implementation=name, pad_token_id=0)


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


@pytest.mark.parametrize("variant", FILTERED)
def test_static_caches_that_are_handed_in(variant: str) -> None:
    model = gpt2(variant)
    with pytest.raises(ValueError, match=r"static.* is not supported .*dynamic"):
        StaticCache(config=model.config, max_cache_len=16)
    stock = StaticCache(config=GPT2Config(**GPT2), max_cache_len=16)
    with pytest.raises(ValueError, match=r"past_key_values .*StaticLayer is not supported .*DynamicCache\(config="):
        model(token_ids(), past_key_values=stock)


class RoundedLayer(QuantizedLayer):
    """A quantised cache that needs no library."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.half()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float()


@pytest.mark.parametrize("variant", FILTERED)
@pytest.mark.parametrize("lazy", [True, False])
def test_quantised_caches_that_are_handed_in(variant: str, lazy: bool) -> None:
    cache = Cache(layer_class_to_replicate=RoundedLayer) if lazy else Cache(layers=[RoundedLayer() for _ in range(3)])
    with pytest.raises(ValueError, match=r"past_key_values .*RoundedLayer is not supported .*DynamicCache\(config="):
        gpt2(variant)(token_ids(), past_key_values=cache)


@pytest.mark.parametrize("variant", BOOSTED)
@pytest.mark.parametrize("kind", ["bare", "stock", "encoder"])
def test_plain_caches_where_streams_must_be_kept(variant: str, kind: str) -> None:
    """Refused at the first token: later it would be a different model."""
    model = gpt2(variant, add_cross_attention=kind == "encoder")
    cache = {
        "bare": DynamicCache,
        "stock": lambda: DynamicCache(config=GPT2Config(**GPT2)),
        "encoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }[kind]()
    with pytest.raises(ValueError, match=r"plain layer at index \d, .*DynamicCache\(config=model.config\)"):
        model(token_ids(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"plain layer at index \d, .*DynamicCache\(config=model.config\)"):
        model.generate(token_ids(), max_new_tokens=2, past_key_values=DynamicCache(), pad_token_id=0)


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


def test_a_refused_cache_is_left_as_it_was() -> None:
    cache = DynamicCache()
    with pytest.raises(ValueError, match="plain layer"):
        gpt2("twicing")(token_ids(), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert not [layer for layer in cache.layers if not isinstance(layer, (DynamicLayer, StaticLayer))]


# --------------------------------------------------------------------------------------------------------------------
# Images without a patch
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(3, 12), (20, 3), (0, 12), (1, 1)])
@pytest.mark.parametrize("variant", ["softmax", "bilateral", "alibi", "nope"])
def test_images_smaller_than_a_patch(variant: str, height: int, width: int) -> None:
    """One sentence in place of an error of a convolution or of an empty grid."""
    model = ImgProcViTForImageClassification(vit_config(variant)).eval()
    with pytest.raises(ValueError, match=rf"at least one patch of 4 x 4 pixels, got {height} x {width}"):
        model(images(height=height, width=width), interpolate_pos_encoding=True)


def test_a_configuration_of_images_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="at least one patch of 16 x 16 pixels, got 8 x 8"):
        ImgProcViTForImageClassification(vit_config("alibi", image_size=8, patch_size=16))
