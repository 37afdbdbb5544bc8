"""Tiny random models of many architectures, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
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

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        # Sharp weights have logits beyond the cap.
        {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **GROUPED,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "experts_implementation": "eager",  # the other one is not for float64
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "opt": (
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", GROUPED),
    "deepseek_v3": (
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
    "bert": ("BertModel", TEXT),
    "roberta": ("RobertaModel", TEXT),
    "distilbert": ("DistilBertModel", {"vocab_size": 50, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}),
    "modernbert": (
        "ModernBertModel",
        {**TEXT, "local_attention": WINDOW, "global_attn_every_n_layers": 2, "reference_compile": False},
    ),
}
"""Text encoders."""

IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", IMAGE),
    "deit": ("DeiTModel", IMAGE),
    "dinov2": ("Dinov2Model", IMAGE),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {**IMAGE, "num_register_tokens": 2}),
    "dinov3": ("DINOv3ViTModel", {**IMAGE, "num_register_tokens": 2}),
    "beit": ("BeitModel", IMAGE),
    "siglip": ("SiglipVisionModel", IMAGE),
    "clip": ("CLIPVisionModel", IMAGE),
    "swin": (
        "SwinModel",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 24, "patch_size": 2},
    ),
}
"""Image encoders."""

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", BART),
    "t5": (
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
    "whisper": (
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
    ),
}
"""Encoder-decoders."""

AUDIO: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": (
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

EVERYTHING = {**DECODERS, **ENCODERS, **IMAGES, **ENCODER_DECODERS, **AUDIO}


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A float64 model for inference, with weights so large that its attention is far from uniform."""
    class_name, fields = EVERYTHING[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    config = model_class.config_class(**{**fields, **changes})
    model: nn.Module = model_class(config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in key:
                parameter.mul_(3.0)
    return model


def text(batch: int = 2, length: int = 14) -> torch.Tensor:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 50, (batch, length), generator=generator)


def padding(ids: torch.Tensor, left: bool, count: int = 4) -> torch.Tensor:
    """A mask that hides ``count`` tokens of the first text."""
    mask = torch.ones_like(ids)
    hidden = slice(0, count) if left else slice(ids.shape[1] - count, None)
    mask[0, hidden] = 0
    return mask


def inputs(name: str, padded: bool = False) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name in IMAGES:
        return {"pixel_values": noise(2, 3, 24, 24)}
    if name in AUDIO:
        return {"input_values": noise(2, 400)}
    ids = text()
    if name == "whisper":
        return {"input_features": noise(2, 8, 24), "decoder_input_ids": ids}
    mask = {"attention_mask": padding(ids, left=name in DECODERS)} if padded else {}
    if name in ENCODER_DECODERS:
        return {"input_ids": text(length=9), "decoder_input_ids": ids}
    return {"input_ids": ids, **mask}


def output(model: nn.Module, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Logits, or the last hidden states."""
    result = model(**given, **options)
    return result.logits if "logits" in result else result.last_hidden_state


Build = Callable[..., nn.Module]
