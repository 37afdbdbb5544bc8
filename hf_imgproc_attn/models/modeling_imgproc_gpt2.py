"""GPT-2 with a chosen attention filter. Stock modules are reused; attention, block and position inputs are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .boost_depth import LayerState, initial_state
from .cache_ahead import upcoming_positions
from .cache_layer import check_cache_implementation
from .configuration_imgproc_gpt2 import ImgProcGPT2Config
from .layer_inputs import LayerInputs
from .layer_tokens import FilteredAttentionMixin, Projected, filter_residual
from .modeling_losses import SummedLossMixin, classification_loss, token_loss
from .modeling_shared import (
    FilterPreTrainedMixin,
    check_activation,
    run_time_choices,
    shared_position_projection,
    wanted_attentions,
)
from .modeling_text import TextModelMixin
from .spec_axes import is_stock_layer, uses_position_table
from .visibility import check_model_mask, model_visibility, stock_mask


class ImgProcGPT2Attention(FilteredAttentionMixin, GPT2Attention):
    """Causal self-attention whose filter is composed by :class:`AttentionFilter`."""

    def __init__(self, config: ImgProcGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.make_filter(config, layer_idx, config.n_positions, config.layer_norm_epsilon)

    def project(self, hidden_states: torch.Tensor) -> Projected:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = self.c_attn(hidden_states).split(self.split_size, dim=2)
        return query.view(shape).transpose(1, 2), key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)

    def project_heads(self, heads: torch.Tensor) -> torch.Tensor:
        # Heads of width 1 are put side by side as a view, which the stock projection cannot read.
        return self.resid_dropout(self.c_proj(heads.contiguous()))

    def dropout_on_weights(self) -> float:
        return self.attn_dropout.p

    def attend_stock(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return GPT2Attention.forward(self, hidden_states, inputs.past_key_values, inputs.stock_mask, **kwargs)


class ImgProcGPT2Block(GPT2Block):
    """A stock block around :class:`ImgProcGPT2Attention`, with the residual scheme and the state between layers."""

    def __init__(self, config: ImgProcGPT2Config, layer_idx: int) -> None:
        check_activation(config)
        super().__init__(config, layer_idx=layer_idx)
        self.attn = ImgProcGPT2Attention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        position_states: torch.Tensor | None = None,
        *state: torch.Tensor | None,
        inputs: LayerInputs,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """``[batch, length, hidden_size]`` and the state's tensors in and out.

        Tensors that carry a gradient are positional: re-entrant gradient checkpointing sees no others.
        """
        inputs = inputs._replace(position_states=position_states, state=LayerState(*state))
        hidden_states, new_state = filter_residual(self.attn, self.ln_1, hidden_states, inputs, **kwargs)
        if encoder_hidden_states is not None:
            if not hasattr(self, "crossattention"):
                raise ValueError("encoder_hidden_states needs a model built with add_cross_attention=True, got False")
            cross_output, _ = self.crossattention(
                self.ln_cross_attn(hidden_states),
                past_key_values=inputs.past_key_values,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            hidden_states = hidden_states + cross_output
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return hidden_states, *new_state


class ImgProcGPT2PreTrainedModel(FilterPreTrainedMixin, GPT2PreTrainedModel):
    """Base class: loading, saving and initialisation of the GPT-2 variants."""

    config_class = ImgProcGPT2Config
    config: ImgProcGPT2Config
    _no_split_modules = ["ImgProcGPT2Block", "FilterScalars"]
    _keep_in_fp32_modules_strict = ["scalar_bias"]
    has_paged_attention = True
    auto_map = {
        "AutoConfig": "configuration_imgproc_gpt2.ImgProcGPT2Config",
        "AutoModel": "modeling_imgproc_gpt2.ImgProcGPT2Model",
        "AutoModelForCausalLM": "modeling_imgproc_gpt2.ImgProcGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "modeling_imgproc_gpt2.ImgProcGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_imgproc_gpt2.ImgProcGPT2ForTokenClassification",
    }


class ImgProcGPT2Model(TextModelMixin, ImgProcGPT2PreTrainedModel, GPT2Model):
    """The bare decoder. Positions are added to the tokens only where ``position_kernel`` is ``"additive"``.

    Args:
        config: of the variant; checked again here, since fields can be set one by one after its construction.
    """

    def __init__(self, config: ImgProcGPT2Config) -> None:
        config.validate()
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.layer_specs = config.layer_specs
        self.position_kernels = {spec.position_kernel for spec in self.layer_specs}
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.n_positions, self.embed_dim) if uses_position_table(config) else None
        self.position_projection = shared_position_projection(
            config, config.n_head, self.embed_dim // config.n_head, config.layer_norm_epsilon
        )
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([ImgProcGPT2Block(config, layer_idx=i) for i in range(config.n_layer)])
        self.is_stock = all(is_stock_layer(config, spec) for spec in config.layer_specs)
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As ``GPT2Model.forward``; see there for the arguments.

        Raises:
            ValueError: for both or neither of ``input_ids`` and ``inputs_embeds``, a mask or ``position_ids`` of the
                wrong shape, or more tokens than the position table holds.
        """
        output_attentions = wanted_attentions(self.config, kwargs)
        inputs_embeds = self.checked_words(input_ids, inputs_embeds, attention_mask)
        batch, length = inputs_embeds.shape[:2]

        if use_cache:
            if past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            if self.config.add_cross_attention and not isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        # The mask of a static cache covers its empty places too; that of continuous batching, which comes with a
        # `cache` of its own, every request in it.
        is_static = past_key_values is not None and past_key_values.is_compileable
        if "cache" not in kwargs and not is_static and not torch.compiler.is_compiling():
            check_model_mask(attention_mask, batch, self.config.n_head, length, past_length + length)
        positions = self.checked_positions(position_ids, inputs_embeds, past_length, has_table=self.wpe is not None)

        hidden_states = inputs_embeds
        if "additive" in self.position_kernels and self.wpe is not None:
            hidden_states = hidden_states + self.wpe(positions).to(inputs_embeds.device)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=stock_mask(attention_mask, self.config._attn_implementation, inputs_embeds.dtype),
            past_key_values=past_key_values,
            position_ids=positions,
        )
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids.view(-1, length))
        hidden_states = self.drop(hidden_states)

        contiguous = position_ids is None and not is_static and past_length == 0
        vectors = self.wpe(positions) if self.wpe is not None and "untied" in self.position_kernels else None
        position_states, coordinates = self.position_inputs(positions, vectors, inputs_embeds, contiguous=contiguous)
        visibility, choices = None, {}
        if not self.is_stock:
            visibility = model_visibility(
                attention_mask,
                causal_mask,
                length=length,
                key_length=None if is_static else past_length + length,
                causal=True,
                position_ids=position_ids,
            )
            choices = run_time_choices(self.config, output_attentions)._asdict()
        inputs = LayerInputs(
            visibility,
            coordinates,
            contiguous,
            past_key_values=None if self.gradient_checkpointing and self.training else past_key_values,
            stock_mask=causal_mask,
            upcoming=None if vectors is None or past_key_values is None else upcoming_positions(positions, self.wpe),
            **choices,
        )
        state = initial_state(self.config, hidden_states)
        for block in self.h:
            hidden_states, *state = block(
                hidden_states,
                encoder_hidden_states,
                position_states,
                *state,
                inputs=inputs,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                position_ids=positions,
                output_attentions=output_attentions,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class ImgProcGPT2LMHeadModel(ImgProcGPT2PreTrainedModel, GPT2LMHeadModel, GenerationMixin):
    """GPT-2 variant with a language-modelling head, tied to the token embeddings."""

    def __init__(self, config: ImgProcGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = ImgProcGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # the class name, from which Transformers would tell it, does not say so
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: ImgProcGPT2Config,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """One causal mask for all layers: the stock function makes one for each name in ``layer_types``."""
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock function, where every layer is stock.

        Raises:
            ValueError: for a model with filtered layers, whose rows a paged cache does not keep.
        """
        if not self.transformer.is_stock:
            layer = next(i for i, kind in enumerate(self.config.layer_types) if kind != "full_attention")
            raise ValueError(
                "continuous batching needs a paged attention implementation, which is not supported for layers with a "
                f"filter other than stock softmax attention, here layer {layer}: use generate() with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        check_cache_implementation(generation_config.cache_implementation, self.device.type)
        if generation_config.cache_implementation == "quantized":
            # It takes the layers by their number, and refuses all types but the stock one.
            plain = GPT2Config(n_layer=self.config.n_layer)
            generation_config.cache_config = {"config": plain, **(generation_config.cache_config or {})}
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)


class ImgProcGPT2ForSequenceClassification(SummedLossMixin, ImgProcGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """GPT-2 variant that classifies a sequence by its last token."""

    def __init__(self, config: ImgProcGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = ImgProcGPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.loss_type = "ForSequenceClassification"
        self.loss_function = classification_loss
        self.post_init()


class ImgProcGPT2ForTokenClassification(SummedLossMixin, ImgProcGPT2PreTrainedModel, GPT2ForTokenClassification):
    """GPT-2 variant that classifies every token."""

    def __init__(self, config: ImgProcGPT2Config) -> None:
        GPT2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = ImgProcGPT2Model(config)
        dropout = getattr(config, "classifier_dropout", None)
        dropout = getattr(config, "hidden_dropout", None) if dropout is None else dropout
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.loss_type = "ForTokenClassification"
        self.loss_function = token_loss
        self.post_init()


ImgProcGPT2Model.register_for_auto_class("AutoModel")
ImgProcGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
ImgProcGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ImgProcGPT2ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
