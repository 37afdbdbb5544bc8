"""What the models without a causal mask share: what their layers need to know, and the way through the layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .boost_depth import initial_state
from .kernel_content import working_dtype
from .layer_inputs import LayerInputs
from .modeling_shared import run_time_choices, wanted_attentions
from .modeling_text import TextModelMixin
from .visibility import check_model_mask, model_visibility, stock_mask


def encoder_inputs(
    model: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    *,
    contiguous: bool,
    output_attentions: bool,
) -> LayerInputs:
    """What an encoder hands to each of its layers.

    Args:
        model: has ``config`` and ``is_stock``.
        hidden_states: the embedded input, ``[batch, length, hidden_size]``.
        attention_mask: as the model was given it.
        coordinates: places of the tokens, or None.
        contiguous: whether they are known to be in order and to have no gaps.
        output_attentions: whether attentions are to be returned.

    Raises:
        ValueError: for a mask of the wrong shape, or an attention implementation that is not supported.
    """
    config, (batch, length) = model.config, hidden_states.shape[:2]
    if not torch.compiler.is_compiling():
        check_model_mask(attention_mask, batch, config.num_attention_heads, length, length)
    built_mask = create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=stock_mask(attention_mask, config._attn_implementation, hidden_states.dtype),
    )
    visibility, choices = None, {}
    if not model.is_stock:
        visibility = model_visibility(attention_mask, built_mask, length=length, key_length=length, causal=False)
        choices = run_time_choices(config, output_attentions)._asdict()
    return LayerInputs(visibility, coordinates, contiguous=contiguous, stock_mask=built_mask, **choices)


def run_layers(
    layers: Iterable[nn.Module],
    config: Any,
    hidden_states: torch.Tensor,
    position_states: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """``[batch, length, hidden_size]`` through all layers, which hand on their state.

    Args:
        layers: each takes tokens, position vectors and the state's tensors, and returns tokens and the new state.
        config: of the model.
        hidden_states: the embedded input.
        position_states: see ``LayerInputs``.
        **kwargs: for every layer.
    """
    state = initial_state(config, hidden_states)
    for layer in layers:
        hidden_states, *state = layer(hidden_states, position_states, *state, **kwargs)
    return hidden_states


class TextEncoderMixin(TextModelMixin):
    """The forward pass of a bare encoder of texts: words and positions, layers, pooler.

    Beside what :class:`TextModelMixin` needs, the model has ``is_stock``; ``embeddings``, which turn words, token
    types and positions into tokens and the vectors of ``untied``; ``encoder.layer``; and ``pooler`` or None.
    """

    embeddings: Any
    encoder: Any
    pooler: Any

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As ``BertModel.forward``, without the arguments of a decoder; see there.

        Raises:
            ValueError: for both or neither of ``input_ids`` and ``inputs_embeds``, a mask or ``position_ids`` of the
                wrong shape, more tokens than the position table holds, or what only a decoder takes.
        """
        output_attentions = wanted_attentions(self.config, kwargs)
        refuse_decoder_inputs(kwargs)
        words = self.checked_words(input_ids, inputs_embeds, attention_mask)
        has_table, contiguous = self.embeddings.position_embeddings is not None, position_ids is None
        positions = self.checked_positions(position_ids, words, has_table=has_table)
        tokens, vectors = self.embeddings(words, token_type_ids, positions)
        position_states, places = self.position_inputs(positions, vectors, words, contiguous=contiguous)
        kwargs["inputs"] = encoder_inputs(
            self, tokens, attention_mask, places, contiguous=contiguous, output_attentions=output_attentions
        )
        tokens = run_layers(self.encoder.layer, self.config, tokens, position_states, **kwargs)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(pooler_input(tokens, attention_mask, self.config.classifier_pooling))
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=tokens, pooler_output=pooled)


def pooler_input(tokens: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Tokens of which a stock pooler, which reads the first, reads what it should.

    Args:
        tokens: ``[batch, length, hidden_size]``.
        attention_mask: ``[batch, length]``, 0 at padding; None: there is none.
        pooling: ``"cls"`` for the first token, ``"mean"`` for the mean over all tokens that are no padding.

    Raises:
        ValueError: for the mean under a mask of pairs of tokens, which does not say what is padding.
    """
    if pooling == "cls":
        return tokens
    if attention_mask is None:
        return tokens.mean(1, keepdim=True)
    if attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must have shape [batch, length] with classifier_pooling='mean', got "
            f"{list(attention_mask.shape)}"
        )
    # Thousands of tokens add up: in half precision the sum would be rounded, or pass its range.
    dtype = working_dtype(tokens.dtype)
    weights = attention_mask.to(dtype).unsqueeze(-1)
    mean = (tokens.to(dtype) * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
    return mean.to(tokens.dtype)


def refuse_decoder_inputs(kwargs: dict[str, Any]) -> None:
    """Take what only a decoder has a use for out of a model's arguments; stock heads hand on some of it as None.

    Raises:
        ValueError: for one that is given.
    """
    kwargs.pop("use_cache", None)
    for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"{name} must be None: an encoder has neither cross-attention nor a cache")
