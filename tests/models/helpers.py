"""Tiny models and sharpened weights for the tests of the models folder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall, check_bias
from hf_imgproc_attn.models.backend_reference import filter_matrix, reference_attention
from hf_imgproc_attn.models.boost_depth import LayerState
from hf_imgproc_attn.models.cache_streams import NO_STREAMS, NoStreams, Streams, boost_stream
from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.kernel_position import Positions, check_coordinates
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.layer_inputs import LayerInputs
from hf_imgproc_attn.models.layer_tokens import cache_streams
from hf_imgproc_attn.models.modeling_shared import run_time_choices
from hf_imgproc_attn.models.spec_axes import STEPPED_BOOSTINGS
from hf_imgproc_attn.models.visibility import Visibility, attention_visibility, padding_visibility

GPT2 = {
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 20,
    "n_head": 4,
    "n_layer": 3,
    "bos_token_id": 60,
    "eos_token_id": 60,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
VIT = {
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "image_size": [20, 12],
    "patch_size": 4,
    "num_channels": 2,
    "encoder_stride": 4,
    "num_labels": 3,
}


def _heads(preset: str, field: str) -> dict[str, int]:
    """``rotary`` turns pairs of features along two axes: five heads of width 4 in place of four of width 5."""
    return {field: 5} if preset == "rope" else {}


def tiny_gpt2_config(preset: str = "softmax", **overrides: Any) -> ImgProcGPT2Config:
    """Three layers, four heads of width 5, 24 positions, no dropout."""
    return ImgProcGPT2Config.from_preset(preset, **{**GPT2, **_heads(preset, "n_head"), **overrides})


def tiny_vit_config(preset: str = "softmax", **overrides: Any) -> ImgProcViTConfig:
    """Three layers, four heads of width 5, a grid of 5 x 3 patches, no dropout."""
    return ImgProcViTConfig.from_preset(preset, **{**VIT, **_heads(preset, "num_attention_heads"), **overrides})


@torch.no_grad()
def sharpen_(model: torch.nn.Module, seed: int = 0, std: float = 2.0) -> torch.nn.Module:
    """Asymmetric random weights that give logits of about ``std``, in place; returns the model.

    The usual weights of std 0.02 make every attention row uniform, which hides errors of masks and caches. Here
    matrices keep the variance of their input, except those that make queries and keys, each of which multiplies it by
    ``std``; all vectors (biases, norms, logarithms of bandwidths, class-token logits) are perturbed.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "scalar_bias" in name:
            parameter.add_(noise(parameter), alpha=0.1 if "log_bandwidth" in name else 0.3)
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight", "cls_token", "mask_token")):
            parameter.copy_(noise(parameter) * 0.7)
        else:
            # Conv1D of GPT-2 is [in, out], Linear is [out, in], a convolution [out, in, *kernel].
            fan_in = parameter.shape[0] if ".c_" in name else parameter[0].numel()
            gain = torch.full((), 1 / math.sqrt(fan_in))
            weight = noise(parameter) * gain.to(parameter)
            if "c_attn" in name:
                weight[:, : 2 * weight.shape[0]] *= math.sqrt(std)
            elif "q_proj" in name or "k_proj" in name:
                weight *= math.sqrt(std)
            parameter.copy_(weight)
    return model


def layer_inputs(
    length: int,
    key_length: int | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    token_mask: torch.Tensor | None = None,
    **fields: Any,
) -> LayerInputs:
    """A layer's inputs from a mask of the logits.

    Args:
        length: new tokens.
        key_length: new and cached tokens; None: ``length``.
        attention_mask: boolean or additive, broadcastable to ``[batch, heads, length, key_length]``, or None.
        is_causal: whether the layer is causal; a mask counts too then.
        token_mask: ``[batch or 1, length]``, which new tokens are no padding; given where the mask hides nothing but
            padding and, if ``is_causal``, later tokens.
        **fields: of ``LayerInputs``; ``previous_value`` goes into its state.
    """
    key_length = key_length or length
    if attention_mask is None:
        visibility = Visibility(length, key_length, is_causal)
    elif token_mask is not None:  # the last query sees every key that is no padding
        keys = attention_mask[:, :1, -1:, :]
        visibility = padding_visibility(keys, length, is_causal)
    else:
        batch, heads = (max(size, 1) for size in attention_mask.shape[:2])
        visibility = attention_visibility(attention_mask, shape=(batch, heads, length, key_length))
    state = LayerState(previous_value=fields.pop("previous_value", None))
    return LayerInputs(visibility, state=state, **fields)


class LooseFilter(AttentionFilter):
    """A filter that takes its inputs one by one."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: LayerInputs | None = None,
        *,
        streams: Any = None,
        dropout: float = 0.0,
        implementation: str | None = None,
        past_key_values: Any = None,
        need_weights: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inputs is not None:
            return super().forward(query, key, value, inputs, streams=streams, dropout=dropout)
        self._config._attn_implementation = implementation
        options |= run_time_choices(self._config, need_weights)._asdict()
        length, key_length = query.shape[-2], query.shape[-2]
        if past_key_values is not None:
            key_length += past_key_values.get_seq_length(self.layer_idx)
        coordinates, contiguous = options.get("coordinates"), options.get("contiguous", False)
        if coordinates is not None and self.positions.sees_places:
            size = (query.shape[0], length, self._config.position_axes)
            classes = self.positions.num_class_tokens
            check_coordinates(coordinates, *size, num_class_tokens=classes, contiguous=contiguous)
        inputs = layer_inputs(length, key_length, **options)
        if past_key_values is not None:
            streams = cache_streams(past_key_values, self, inputs)
        return super().forward(query, key, value, inputs, streams=streams, dropout=dropout)


class RecordedStreams(NoStreams):
    """A cache of one call.

    Args:
        past: rows of the booster's streams of earlier keys, in order.
    """

    is_cached = True

    def __init__(self, past: Sequence[torch.Tensor] = ()) -> None:
        self._past = {boost_stream(index + 1): rows for index, rows in enumerate(past)}
        self.appended: list[torch.Tensor] = []

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        self.appended.append(rows)
        return torch.cat((self._past[name], rows), dim=2) if name in self._past else rows

    def past(self, name: str) -> torch.Tensor | None:
        return self._past.get(name)


def filter_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    bias: torch.Tensor | None = None,
    positions: Positions | None = None,
    scale: float | None = None,
    boosting: str = "none",
    boosting_steps: int = 2,
    boosting_gain: torch.Tensor | None = None,
    dropout: float = 0.0,
    streams: Streams = NO_STREAMS,
) -> FilterCall:
    """A call of plain inner products, with its options one by one.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, key_length, head_dim]``.
        value: ``[batch, key_heads, key_length, d]``.
        attention_mask: boolean or additive, broadcastable to ``[batch, heads, length, key_length]``, or None.
        is_causal: whether causality hides keys too.
        bias: added to the logits, broadcastable likewise, or None.
        positions: a position kernel, or None.
        scale: factor on q.k; None: 1/sqrt(head_dim).
        boosting: key of ``BOOSTING``.
        boosting_steps: k >= 1.
        boosting_gain: of ``learned``, or None.
        dropout: probability on A.
        streams: of a cache.
    """
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    working = torch.promote_types(query.dtype, torch.float32)
    terms: list[Positions] = [] if positions is None else [positions]
    if bias is not None:
        terms.append(BiasPositions(check_bias(bias, shape)))
    return FilterCall(
        query,
        key,
        value,
        Content("dot_product", query.shape[-1] ** -0.5 if scale is None else scale),
        attention_visibility(attention_mask, shape=shape, causal=is_causal, working_dtype=working),
        positions=tuple(terms),
        booster=Booster(boosting, boosting_steps, boosting_gain),
        dropout=dropout,
        streams=streams,
    )


def dropout_seed(seed: int | None) -> int:
    """Seed torch's generator, unless None, and return what the next blocked call will draw from it."""
    if seed is not None:
        torch.manual_seed(seed)
    state = torch.get_rng_state()
    drawn = int(torch.randint(2**62, ()))
    torch.set_rng_state(state)
    return drawn


def blocked_filter(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    boosting: str = "twicing",
    steps: int = 2,
    past: Sequence[torch.Tensor] = (),
    seed: int | None = None,
    block_rows: int | None = None,
    group_pairs: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The back-end ``blocked``, cut as one likes: the output, and the booster's streams of the queries.

    Args:
        query: see :func:`filter_call`.
        key: likewise.
        value: likewise.
        boosting: likewise.
        steps: k >= 1.
        past: rows of the streams of earlier keys.
        seed: of the dropout mask; None: torch's generator goes on.
        block_rows: see ``backend_blocked.run``.
        group_pairs: likewise.
        **options: of :func:`filter_call`.
    """
    streams = RecordedStreams(past)
    call = filter_call(query, key, value, boosting=boosting, boosting_steps=steps, streams=streams, **options)
    if seed is not None:
        torch.manual_seed(seed)
    return run_blocked(call, block_rows=block_rows, group_pairs=group_pairs), streams.appended


def dense_matrix(
    logits: torch.Tensor, attention_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    """``filter_matrix`` of a mask."""
    shape = (*logits.shape[:2], *logits.shape[-2:])
    visibility = attention_visibility(attention_mask, shape=shape, causal=is_causal)
    return filter_matrix(logits if visibility.bias is None else logits + visibility.bias, visibility)


def dense_attention(
    logits: torch.Tensor,
    value: torch.Tensor,
    full_value: torch.Tensor | None = None,
    *,
    need_weights: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``reference_attention`` with its options one by one."""
    value = value.expand(*logits.shape[:2], -1, -1)
    full_value = value if full_value is None else full_value
    call = filter_call(value, full_value, full_value, **options)
    if call.visibility.bias is not None:
        logits = logits + call.visibility.bias
    return reference_attention(logits, call, "operator" if need_weights else None)


@torch.no_grad()
def make_filter(
    content_kernel: str = "dot_product",
    position_kernel: str = "none",
    boosting: str = "none",
    boosting_steps: int = 2,
    *,
    heads: int = 3,
    head_dim: int = 5,
    longest_side: int = 12,
    num_class_tokens: int = 0,
    layer_idx: int = 0,
    num_layers: int = 1,
    position_axes: int = 1,
    seed: int = 0,
    **fields: Any,
) -> AttentionFilter:
    """One layer's filter in float64 with perturbed scalars, different in every head, and random projections.

    One axis of positions is text, two are patches. An elliptical layer is the second one, which has one before it.
    """
    if content_kernel == "elliptical":
        layer_idx, num_layers = 1, 2
    config_class = ImgProcGPT2Config if position_axes == 1 else ImgProcViTConfig
    config = config_class(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_hidden_layers=num_layers,
        content_kernel=content_kernel,
        position_kernel=position_kernel,
        boosting=boosting,
        boosting_steps=boosting_steps if boosting in STEPPED_BOOSTINGS else None,
        **{"learn_bandwidths": True, **fields},
    )
    layer = LooseFilter(
        config.layer_specs[layer_idx],
        config,
        layer_idx=layer_idx,
        head_dim=head_dim,
        scaling=head_dim**-0.5,
        longest_side=longest_side,
        layer_norm_eps=1e-5,
        num_class_tokens=num_class_tokens,
    )
    return sharpen_(layer.double(), seed)


def logits_in_steps(
    model: Any, inputs: dict[str, torch.Tensor], bounds: Sequence[int], cache: Any = None
) -> torch.Tensor:
    """Logits of tokens that come to a cache in parts, those between neighbouring bounds.

    Args:
        model: a causal language model.
        inputs: of all tokens, ``[batch, length]`` each; the attention mask is among them.
        bounds: the first is 0, the last one the length.
        cache: a new one of another kind than the model would make.
    """
    found = []
    for start, stop in itertools.pairwise(bounds):
        part = {name: tensor[:, start:stop] for name, tensor in inputs.items()}
        part["attention_mask"] = inputs["attention_mask"][:, :stop]
        output = model(**part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)
