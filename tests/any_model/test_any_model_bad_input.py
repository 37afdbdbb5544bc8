"""What cannot have a filter is refused by name, and left as it was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DynamicCache,
    FalconConfig,
    FalconModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    SegformerConfig,
    SegformerModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, apply_filter, filtered_layers, remove_filter
from hf_imgproc_attn.models.any_filter import filter_arguments
from tests.any_model.architectures import TEXT, build, inputs, output, text
from tests.models.helpers import tiny_gpt2_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "twiceing"}, r"preset must be one of .*, got 'twiceing'; did you mean twicing\?"),
        ({}, "nothing of the model would change"),
        ({"preset": "softmax"}, "nothing of the model would change"),
        ({"preset": "twicing", "layers": [3]}, r"layers must be integers from -3 to 2 \(model.layers has 3 .*got 3"),
        ({"preset": "twicing", "layers": [True]}, "layers must be integers .*got True"),
        ({"preset": "twicing", "layers": []}, r"layers must name at least one layer, .*got \[\]"),
        ({"preset": "twicing", "layers": [0, -3]}, r"every layer once, got \[0, -3\]"),
        ({"preset": "twicing", "stacks": "encoder"}, "stacks must be among model.layers, got 'encoder'"),
        ({"preset": "twicing", "layers": 1.0}, "layers must be integers .*got 1.0"),
        ({"preset": "twicing", "layers": slice(0, 2)}, "layers must be integers .*got slice"),
        ({"preset": "twicing", "stacks": []}, r"stacks must be one or more of model.layers, got \[\]"),
        ({"preset": "twicing", "stacks": 3}, "stacks must be one or more of model.layers, got 3"),
        ({"preset": "twicing", "stacks": [3]}, "stacks must be among model.layers, got 3"),
        (
            {"preset": "twicing", "num_special_tokens": "a"},
            "num_special_tokens must be an integer >= 0 or None, got 'a'",
        ),
        ({"position_kernel": {}}, r"position_kernel must be of the type str \| list\[str\], got \{\}"),
        ({"feedback": ["neutreno"]}, r"feedback must be of the type str, got \['neutreno'\]"),
        ({"feedback": "neutral"}, "feedback must be one of none, neutreno, pid, value_residual, got 'neutral'"),
        ({"feedback": "pid", "pid_gains": 3}, r"pid_gains must be of the type list\[float \| int\] \| None, got 3"),
        ({"boosting": np.array([1, 2, 3])}, r"boosting must be of the type str \| list\[str\], got \[1, 2, 3\]"),
        ({"preset": "nlm", "learn_bandwidths": 1}, "learn_bandwidths must be of the type bool, got 1"),
        ({"preset": "twicing", "boosting_steps": np.float32(2)}, "boosting_steps must be of the type .*, got 2.0"),
        ({"preset": "twicing", "boosting_step": 3}, "unknown configuration field boosting_step=3; did you mean"),
        ({"preset": "twicing", "colour": 3}, "fields must be among .*got 'colour'"),
        ({"preset": "twicing", "boosting_steps": 99}, "boosting_steps must be an integer >= 1 and <= 16, got 99"),
        ({"preset": "bilateral"}, "position_kernel must be one of .*got 'untied': it projects positions"),
        ({"preset": "sinkhorn"}, "it needs attention without a causal mask, got 'sinkhorn'"),
        ({"preset": "softpick", "content_kernel": "gaussian"}, "'softpick' cannot be combined with"),
        ({"preset": "forgetting"}, "got 'forget': it projects the layer's input, which attention functions of"),
        ({"preset": "gated"}, "gate='elementwise' .* projects the layer's input, which attention functions of"),
        *(
            (
                {"preset": preset},
                f"boosting='{preset}' .* projections of its own, of the layer's input, which attention",
            )
            for preset in ("differential", "dynamic_inversion")
        ),
        ({"preset": "rope"}, "got 'rotary': it turns queries and keys"),
        ({"preset": "nope"}, "got 'none': the model adds its own positions"),
        ({"position_kernel": "additive"}, "got 'additive': it is what the model does"),
        ({"preset": "gradient_boosted"}, "boosting='gradient_boosted' .* projections of its own"),
        (
            {"preset": "boosted_residual"},
            "residual='twicing' is not for layers of another model: it changes the blocks",
        ),
        ({"preset": "twicing", "boosted_layers": [0]}, "boosted_layers=.* choose layers by layers="),
        ({"preset": "neutreno", "layers": [1]}, "feedback='neutreno' compares a layer with the ones before it"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model = build("llama")
    config = model.model.layers[0].self_attn.config  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=message):
        apply_filter(model, **arguments)
    assert not filtered_layers(model)
    assert model.model.layers[0].self_attn.config is config  # type: ignore[union-attr,index]


def test_delta_is_refused_where_only_some_of_the_chosen_layers_are_causal() -> None:
    """BART's encoder has no causal mask; with it chosen nothing changes, and the decoder alone gets the filter."""
    model = build("bart")
    for stacks in (None, ["model.decoder.layers", "model.encoder.layers"]):
        with pytest.raises(ValueError, match="it needs attention with a causal mask, got 'delta'"):
            apply_filter(model, "delta", stacks=stacks)
        assert not filtered_layers(model)
    chosen = filtered_layers(apply_filter(model, "delta", stacks="model.decoder.layers"))
    assert {(row["stack"], row["boosting"]) for row in chosen} == {("model.decoder.layers", "delta (2)")}


def test_delta_is_refused_where_layers_of_a_stack_differ() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="'delta' needs attention with a causal mask in every chosen layer, and some"):
        apply_filter(model, "delta")
    assert not filtered_layers(model)
    assert [row["layer"] for row in filtered_layers(apply_filter(model, "delta", layers=[0, 2]))] == [0, 2]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"preset": "twicing", "boosting_steps": np.int64(3)}, {"boosting": "twicing", "boosting_steps": 3}),
        ({"boosting": np.str_("sos"), "layers": np.array([0])}, {"boosting": "sos", "layers": [0]}),
        ({"feedback": "pid", "pid_gains": np.array([1, 2, 3])}, {"feedback": "pid", "pid_gains": [1, 2, 3]}),
        ({"preset": "qk_norm", "learn_bandwidths": np.True_}, {"content_kernel": "cosine", "learn_bandwidths": True}),
    ],
)
def test_values_of_numpy_are_kept_as_plain_ones(fields: dict[str, Any], kept: dict[str, Any]) -> None:
    arguments = filter_arguments(apply_filter(build("llama"), **fields))
    assert json.loads(json.dumps(arguments)) == kept
    assert [type(arguments[name]) for name in kept] == [type(value) for value in kept.values()]


def test_special_tokens_may_be_a_number_of_numpy() -> None:
    model = apply_filter(build("beit"), "alibi", num_special_tokens=np.int64(1))
    assert json.loads(json.dumps(filter_arguments(model)))["num_special_tokens"] == 1


@pytest.mark.parametrize("call", [lambda model: apply_filter(model, "twicing"), remove_filter, filtered_layers])
def test_what_is_no_model_is_refused(call: Any) -> None:
    config = tiny_gpt2_config("softmax", n_layer=1)  # whose text is long
    for wrong, words in (
        (None, "None"),
        ("gpt2", "'gpt2'"),
        (BertModel, "the class BertModel"),
        (config, "a ImgProcGPT2Config"),
    ):
        with pytest.raises(ValueError, match=f"^model must be a model, which is loaded already, got {words}$"):
            call(wrong)


def test_layers_with_filters_of_their_own_are_refused() -> None:
    """A second filter in them would never be called."""
    model = ImgProcGPT2LMHeadModel(tiny_gpt2_config("twicing", n_layer=2, boosted_layers=[1]))
    with pytest.raises(ValueError, match=r"transformer.h.1.attn of ImgProcGPT2LMHeadModel has a filter of its own"):
        apply_filter(model, "twicing")
    apply_filter(model, "twicing", layers=[0])
    assert [row["layer"] for row in filtered_layers(model)] == [0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by PEFT
def test_a_model_that_peft_has_wrapped_is_refused() -> None:
    wrapped = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is a PeftModel, which saves its adapter alone"):
        apply_filter(wrapped, "twicing")


def test_a_filter_is_applied_and_removed_once() -> None:
    model = apply_filter(build("llama"), "twicing")
    with pytest.raises(ValueError, match=r"filtered already: call remove_filter\(model\) first"):
        apply_filter(model, "sos")
    remove_filter(model)
    with pytest.raises(ValueError, match="no filter to remove"):
        remove_filter(model)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (FalconModel, FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        (BloomModel, BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
    ],
)
def test_models_outside_the_interface_are_refused(model_class: Any, config: Any) -> None:
    with pytest.raises(
        ValueError, match="has no self-attention layer that goes through Transformers' attention inter"
    ):
        apply_filter(model_class(config), "twicing")


def test_terms_of_the_logits_that_are_not_understood_are_refused() -> None:
    model = apply_filter(build("llama"), "twicing")
    with pytest.raises(ValueError, match=r"layers.0.self_attn does not take tilt: it is not known what it does"):
        model(text(), tilt=torch.ones(4))


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    """Flex attention has blocks of visible tokens instead."""
    AttentionInterface.register("in_blocks", sdpa_attention_forward)
    AttentionMaskInterface.register("in_blocks", lambda *args, **kwargs: range(3))
    model = apply_filter(build("llama"), "twicing")
    model.set_attn_implementation("in_blocks")  # type: ignore[operator]
    with pytest.raises(
        ValueError, match="needs its mask as a tensor, got a range, as attn_implementation='in_blocks'"
    ):
        model(text())


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_that_no_mask_shows_is_refused(padded: bool) -> None:
    """Masks as flash attention wants them tell padding only: its own functions know the window."""
    AttentionInterface.register("padding_only", sdpa_attention_forward)
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model, mask = apply_filter(build("mistral"), "twicing"), torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 1 - padded
    model.set_attn_implementation("padding_only")  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn needs a mask that shows its sliding window of \d+ tokens"
    ):
        model(text(), attention_mask=mask)


def packed() -> dict[str, torch.Tensor]:
    """Texts of 5 and 9 tokens in one row."""
    return {
        "input_ids": text(batch=1),
        "position_ids": torch.cat((torch.arange(5), torch.arange(9)))[None],
    }


VARLEN = {
    "cu_seq_lens_q": torch.tensor([0, 5, 14], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 5, 14], dtype=torch.int32),
    "max_length_q": 9,
    "max_length_k": 9,
}


@pytest.mark.parametrize("told", ["by places", "by lengths"])
@pytest.mark.parametrize("asked", ["sdpa", "eager", "packs_by_itself"])
def test_packed_texts_do_not_see_each_other(told: str, asked: str) -> None:
    """Flash attention has no mask for them: its own functions see places that begin anew, or are given lengths."""
    AttentionInterface.register("packs_by_itself", sdpa_attention_forward)
    AttentionMaskInterface.register("packs_by_itself", flash_attention_mask)
    model, given = apply_filter(build("llama"), "twicing", boosting_steps=3), packed()
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in given["input_ids"].split([5, 9], dim=1)], dim=1)
        model.set_attn_implementation(asked)  # type: ignore[operator]
        lengths = VARLEN if told == "by lengths" else {}
        found = model(**given, **lengths, use_cache=False).logits
    assert (found - alone).abs().max() < 1e-12 * alone.abs().max()


def test_packed_texts_that_nothing_parts_are_refused() -> None:
    model, given = apply_filter(build("llama"), "twicing"), packed()
    with pytest.raises(ValueError, match="given cu_seq_lens_q of 2 texts and no mask that parts them, and attn_impl"):
        model(given["input_ids"], **VARLEN)
    one = {**VARLEN, "cu_seq_lens_q": torch.tensor([0, 14]), "cu_seq_lens_k": torch.tensor([0, 14])}
    assert torch.equal(model(given["input_ids"], **one).logits, model(given["input_ids"]).logits)
    AttentionInterface.register("packs_by_itself", sdpa_attention_forward)
    AttentionMaskInterface.register("packs_by_itself", flash_attention_mask)
    model.set_attn_implementation("packs_by_itself")  # type: ignore[operator]
    with pytest.raises(ValueError, match="takes packed texts in one row and without a cache, got 2 rows of 14 tokens"):
        model(text(), **VARLEN)


@pytest.mark.parametrize(("name", "term"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_other_kernels_have_no_soft_cap_and_no_sink(name: str, term: str) -> None:
    model = apply_filter(build(name), "twicing", content_kernel="gaussian")
    with pytest.raises(ValueError, match=f"does not take {term} with content_kernel='gaussian'"):
        model(text())


def test_attention_with_fewer_keys_than_queries_is_refused() -> None:
    model = SegformerModel(
        SegformerConfig(hidden_sizes=[8, 16], num_attention_heads=[1, 2], depths=[1, 1], num_encoder_blocks=2)
    ).eval()
    apply_filter(model, "twicing")
    with pytest.raises(ValueError, match="needs as many keys as queries"):
        model(torch.randn(1, 3, 64, 64))


def test_attention_to_another_sequence_is_refused() -> None:
    config = BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = apply_filter(BertModel(config).eval(), "twicing")
    other = torch.randn(2, 5, 32)
    model(text(), encoder_hidden_states=other)  # the second attention of each block has no filter
    assert len(filtered_layers(model)) == 3
    layer = model.encoder.layer[0].attention.self  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="is for self-attention, got encoder_hidden_states"):
        layer(torch.randn(2, 14, 32), encoder_hidden_states=other)


def test_layers_that_share_the_keys_of_an_earlier_one_have_no_place_for_rows() -> None:
    config = Gemma3nTextConfig(
        vocab_size=50,
        vocab_size_per_layer_input=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    model, ids = Gemma3nForCausalLM(config).double().eval(), text()
    apply_filter(model, "twicing")
    with torch.no_grad():
        assert model(ids, use_cache=False).logits.isfinite().all()
        with pytest.raises(
            ValueError, match="keeps nothing in layer 2, which attends to the keys and values of an ear"
        ):
            model(ids, past_key_values=DynamicCache(config=config))
        apply_filter(remove_filter(model), "twicing", layers=[0, 1])
        full, cache = model(ids, use_cache=False).logits, DynamicCache(config=config)
        found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([9, 1, 4], 1)], dim=1)
    assert (found - full).abs().max() < 1e-5 * full.abs().max()  # some of its numbers are in single precision


def test_one_layer_alone_cannot_compare_layers() -> None:
    model = apply_filter(build("llama"), "neutreno", neutreno_lambda=0.3)
    layer = model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    states = torch.randn(2, 14, 32, dtype=torch.float64)
    places = model.model.rotary_emb(states, torch.arange(14)[None])  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="the layer before it did not run in the same pass"):
        layer(states, position_embeddings=places, attention_mask=None)


def test_values_of_another_width_have_no_elliptical_metric() -> None:
    model = apply_filter(build("deepseek_v3"), "elliptical")
    with pytest.raises(ValueError, match="has values of width 6 and queries of width 12"):
        output(model, inputs("deepseek_v3"))


def test_values_of_other_heads_are_not_compared() -> None:
    with pytest.raises(ValueError, match="must have the same heads, got 2 of width 8, 4 of width 8"):
        apply_filter(build("swin"), "neutreno")


def test_images_of_another_size_have_no_known_places() -> None:
    model = apply_filter(build("vit"), "alibi")
    larger = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 special tokens and 3 x 3 patches, got 17 tokens"):
        model(larger, interpolate_pos_encoding=True)


@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_shuffled_patches_have_no_known_places(ratio: float) -> None:
    """A masked autoencoder shuffles its patches and drops some, or none."""
    with pytest.raises(ValueError, match="a model with mask_ratio in its ViTMAEConfig shuffles them"):
        apply_filter(build("vit_mae", mask_ratio=ratio), "alibi")


def test_an_image_model_that_does_not_tell_its_special_tokens_asks_for_them() -> None:
    with pytest.raises(ValueError, match="give num_special_tokens"):
        apply_filter(build("beit"), "alibi")
    model = apply_filter(build("beit"), "alibi", num_special_tokens=1)
    assert output(model, inputs("beit")).isfinite().all()


@pytest.mark.parametrize(
    ("name", "special"),
    [("vit", 1), ("deit", 2), ("dinov2_with_registers", 3), ("dinov3", 3), ("siglip", 0), ("clip", 1)],
)
def test_special_tokens_are_told_apart_from_patches(name: str, special: int) -> None:
    model = apply_filter(build(name), "alibi")
    counts = {
        module.num_class_tokens
        for module in (part.filter.positions for part in model.modules() if hasattr(part, "sides"))
    }
    assert counts == {special}
    assert output(model, inputs(name)).isfinite().all()
