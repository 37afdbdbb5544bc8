"""Tiny random models of many architectures of Transformers, and inputs for them.

Names are those of the table of supported models. The sizes are the smallest that show what an architecture is like:
key heads that queries share, windows shorter than the texts, values of another width than queries.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "num_channels": 3,
}
BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
WINDOW = 6
"""Tokens that a sliding layer sees: fewer than the tests' texts have."""

EXPERTS = "experts_implementation"
"""Field of models with experts, which are not saved with it: ``"eager"`` is for float64, and does not compile."""

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "Qwen 3": ("Qwen3ForCausalLM", GROUPED),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "hidden_size": 64,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 1,  # queries and keys are normalised, whatever the weights are
        },
    ),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        # Sharp weights have logits beyond the cap.
        {
            **GROUPED,
            "hidden_size": 64,  # whose root is exact in every precision
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "GPT-OSS": (
        "GptOssForCausalLM",
        {
            **GROUPED,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            EXPERTS: "eager",
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TEXT),
    "OPT": (
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "Phi 3": ("Phi3ForCausalLM", GROUPED),
    "SmolLM 3": ("SmolLM3ForCausalLM", GROUPED),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 16,
        },
    ),
}
"""Text decoders: class and configuration."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", TEXT),
    "RoBERTa": ("RobertaModel", TEXT),
    "DistilBERT": ("DistilBertModel", {"vocab_size": 50, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}),
    "ModernBERT": (
        "ModernBertModel",
        {**TEXT, "local_attention": WINDOW, "global_attn_every_n_layers": 2, "reference_compile": False},
    ),
}
"""Text encoders."""

IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTModel", IMAGE),
    "DeiT": ("DeiTModel", IMAGE),
    "DINOv2": ("Dinov2Model", IMAGE),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {**IMAGE, "num_register_tokens": 2}),
    "DINOv3": ("DINOv3ViTModel", {**IMAGE, "num_register_tokens": 2}),
    "BEiT": ("BeitModel", IMAGE),
    "ViT-MAE": ("ViTMAEModel", IMAGE),
    "SigLIP": ("SiglipVisionModel", IMAGE),
    "CLIP": ("CLIPVisionModel", IMAGE),
    "Swin": (
        "SwinModel",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 24, "patch_size": 2},
    ),
}
"""Image encoders."""

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BART": ("BartForConditionalGeneration", BART),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 50,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 0,
        },
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
    ),
}
"""Encoder-decoders."""

AUDIO: dict[str, tuple[str, dict[str, Any]]] = {
    "Wav2Vec 2": (
        "Wav2Vec2Model",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "conv_dim": [8, 8],
            "conv_stride": [4, 4],
            "conv_kernel": [4, 4],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
        },
    ),
}
"""Audio encoders."""

OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "SegFormer": (
        "SegformerModel",
        {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "depths": [1, 1], "num_encoder_blocks": 2},
    ),
    "Falcon": ("FalconModel", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "Bloom": ("BloomModel", {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "MPT": ("MptModel", {"vocab_size": 50, "d_model": 16, "n_layers": 1, "n_heads": 2}),
    "DeBERTa": (
        "DebertaModel",
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    ),
}
"""Models that cannot have a filter."""

ARCHITECTURES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS, **AUDIO, **IMAGES, **OUTSIDE}
"""All of them: title -> name of the class, fields of its configuration."""


SHARPNESS = 12.0
"""Factor on the matrices of a new model: its attention would else be nearly uniform, which hides what is wrong."""


def build(title: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A float64 model for inference, with weights so large that its attention is far from uniform.

    Args:
        title: key of :data:`ARCHITECTURES`.
        seed: of its weights.
        **changes: other fields of its configuration.
    """
    class_name, fields = ARCHITECTURES[title]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    config = model_class.config_class(**{**fields, **changes})
    model: nn.Module = model_class(config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in key:
                parameter.mul_(SHARPNESS)
    return model


def text(batch: int = 2, length: int = 14) -> torch.Tensor:
    """Token ids ``[batch, length]`` without padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 50, (batch, length), generator=generator)


def padding(ids: torch.Tensor, left: bool, count: int = 4) -> torch.Tensor:
    """A mask of the shape of ``ids`` that hides ``count`` tokens of the first row."""
    mask = torch.ones_like(ids)
    hidden = slice(0, count) if left else slice(ids.shape[1] - count, None)
    mask[0, hidden] = 0
    return mask


def inputs(title: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """What a model is called with.

    Args:
        title: key of :data:`ARCHITECTURES`.
        padded: whether texts come with a mask: padding on the left for decoders, on the right for others.
    """
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if title == "ViT-MAE":
        return {"pixel_values": noise(2, 3, 24, 24), "noise": noise(2, 9)}  # which patches are left out
    if title in IMAGES:
        return {"pixel_values": noise(2, 3, 24, 24)}
    if title == "SegFormer":
        return {"pixel_values": noise(2, 3, 64, 64)}
    if title in AUDIO:
        values = noise(2, 400)
        return {"input_values": values, **({"attention_mask": padding(values, False, 200).long()} if padded else {})}
    ids = text()
    if title == "Whisper":
        return {"input_features": noise(2, 8, 24), "decoder_input_ids": ids}
    if title in ENCODER_DECODERS:
        asked = text(length=9)
        mask = {"attention_mask": padding(asked, left=False)} if padded else {}
        return {"input_ids": asked, "decoder_input_ids": ids, **mask}
    mask = {"attention_mask": padding(ids, left=title in DECODERS)} if padded else {}
    return {"input_ids": ids, **mask}


def output(model: nn.Module, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Logits, or the last hidden states."""
    result = model(**given, **options)
    found: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found
