"""BERT with a chosen attention filter. Stock modules are reused; attention, layer and position inputs are ours.

BERT normalises after the addition: a layer is LN(x + f(x)) with f its attention, and so are the residual schemes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.models.bert import modeling_bert as stock

from .boost_depth import LayerState
from .configuration_imgproc_bert import ImgProcBertConfig
from .layer_inputs import LayerInputs
from .layer_tokens import FilteredAttentionMixin, Projected, filter_residual, project_each
from .modeling_encoder import TextEncoderMixin
from .modeling_losses import SummedEncoderLossMixin, classification_loss, token_loss
from .modeling_pairs import PairHead, PlainPooler
from .modeling_shared import FilterPreTrainedMixin, check_activation, shared_position_projection
from .spec_axes import is_stock_layer, uses_position_table


class ImgProcBertEmbeddings(stock.BertEmbeddings):
    """Words, token types and, only for ``additive``, positions; the table of ``untied`` is kept for the layers."""

    def __init__(self, config: ImgProcBertConfig) -> None:
        padding, words = config.pad_token_id, config.vocab_size
        if padding is not None and not -words <= padding < words:
            raise ValueError(f"pad_token_id must be None or one of the {words} words of vocab_size, got {padding}")
        super().__init__(config)
        self.adds_positions = any(spec.position_kernel == "additive" for spec in config.layer_specs)
        if not uses_position_table(config):
            self.position_embeddings = None

    def forward(self, words: torch.Tensor, token_type_ids: torch.Tensor | None, positions: torch.Tensor) -> Any:
        """Tokens ``[batch, length, hidden_size]``, and the vectors of ``untied`` (with 1 for batch), or None."""
        types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
        tokens = words + self.token_type_embeddings(types)
        vectors = None if self.position_embeddings is None else self.position_embeddings(positions)
        if self.adds_positions:
            tokens, vectors = tokens + vectors, None
        return self.dropout(self.LayerNorm(tokens)), vectors


class ImgProcBertSelfAttention(FilteredAttentionMixin, stock.BertSelfAttention):
    """Bidirectional self-attention whose filter is composed by :class:`AttentionFilter`."""

    def __init__(self, config: ImgProcBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.head_dim = self.attention_head_size
        self.make_filter(config, layer_idx, config.max_position_embeddings, config.layer_norm_eps)

    def project(self, hidden_states: torch.Tensor) -> Projected:
        return project_each(hidden_states, self.head_dim, (self.query, self.key, self.value))

    def project_heads(self, heads: torch.Tensor) -> torch.Tensor:
        return heads  # the output projection is a module of the layer

    def dropout_on_weights(self) -> float:
        return self.dropout.p

    def attend_stock(self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any) -> Any:
        return stock.BertSelfAttention.forward(self, hidden_states, inputs.stock_mask, **kwargs)


class ImgProcBertLayer(stock.BertLayer):
    """A stock layer around :class:`ImgProcBertSelfAttention`, with residual scheme and state between layers."""

    def __init__(self, config: ImgProcBertConfig, layer_idx: int) -> None:
        check_activation(config)
        super().__init__(config, layer_idx)
        self.attention.self = ImgProcBertSelfAttention(config, layer_idx)

    def forward(
        self, hidden_states: torch.Tensor, position_states: Any = None, *state: Any, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """``[batch, length, hidden_size]`` and state in and out; tensors are positional for re-entrant checkpoints."""
        attention, after = self.attention.self, self.attention.output
        inputs = inputs._replace(position_states=position_states, state=LayerState(*state))
        added, new_state = filter_residual(
            attention, nn.Identity(), hidden_states, inputs, lambda heads: after.dropout(after.dense(heads)), **kwargs
        )
        return self.feed_forward_chunk(after.LayerNorm(added)), *new_state


class ImgProcBertPreTrainedModel(FilterPreTrainedMixin, stock.BertPreTrainedModel):
    """Base class: loading, saving and initialisation of the BERT variants."""

    config_class = ImgProcBertConfig
    config: ImgProcBertConfig
    _no_split_modules = ["ImgProcBertEmbeddings", "ImgProcBertLayer", "FilterScalars"]
    _keep_in_fp32_modules_strict = ["scalar_bias"]
    auto_map = {
        "AutoConfig": "configuration_imgproc_bert.ImgProcBertConfig",
        "AutoModel": "modeling_imgproc_bert.ImgProcBertModel",
        **{
            f"AutoModelFor{task}": f"modeling_imgproc_bert.ImgProcBertFor{task}"
            for task in ("MaskedLM", "SequenceClassification", "TokenClassification")
        },
    }


class ImgProcBertModel(TextEncoderMixin, ImgProcBertPreTrainedModel, BertModel):
    """The bare encoder, with a pooler unless ``add_pooling_layer`` is False."""

    def __init__(self, config: ImgProcBertConfig, add_pooling_layer: bool = True) -> None:
        config.validate()
        stock.BertPreTrainedModel.__init__(self, config)
        heads, norm_eps = config.num_attention_heads, config.layer_norm_eps
        self.position_kernels = {spec.position_kernel for spec in config.layer_specs}
        self.is_stock = all(is_stock_layer(config, spec) for spec in config.layer_specs)
        self.embeddings = ImgProcBertEmbeddings(config)
        self.position_projection = shared_position_projection(config, heads, config.hidden_size // heads, norm_eps)
        layers = [ImgProcBertLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = stock.BertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()


class ImgProcBertForMaskedLM(SummedEncoderLossMixin, ImgProcBertPreTrainedModel, BertForMaskedLM):
    """BERT variant that predicts masked words; its output matrix is tied to the word embeddings."""

    def __init__(self, config: ImgProcBertConfig) -> None:
        stock.BertPreTrainedModel.__init__(self, config)
        self.bert, self.cls = ImgProcBertModel(config, add_pooling_layer=False), stock.BertOnlyMLMHead(config)
        self.loss_type, self.loss_function = "ForMaskedLM", token_loss
        self.post_init()


class _Classifier(SummedEncoderLossMixin, ImgProcBertPreTrainedModel):
    """What the two classifiers share: all but the pooler, which only that of texts has, and the loss."""

    def __init__(self, config: ImgProcBertConfig) -> None:
        stock.BertPreTrainedModel.__init__(self, config)
        self.num_labels, rate = config.num_labels, config.classifier_dropout
        self.bert = ImgProcBertModel(config, add_pooling_layer=self.summed_loss is classification_loss)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.takes_pairs = config.classifier_pairs and self.summed_loss is classification_loss
        self.classifier: nn.Module
        if self.takes_pairs:
            self.bert.pooler, self.classifier = PlainPooler(), PairHead(config)
        else:
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_type, self.loss_function = self.loss_name, self.summed_loss
        self.post_init()


class ImgProcBertForSequenceClassification(_Classifier, BertForSequenceClassification):
    """BERT variant that classifies a text by its pooled first token, or a pair of texts (``classifier_pairs``)."""

    loss_name, summed_loss = "ForSequenceClassification", staticmethod(classification_loss)


class ImgProcBertForTokenClassification(_Classifier, BertForTokenClassification):
    """BERT variant that classifies every token."""

    loss_name, summed_loss = "ForTokenClassification", staticmethod(token_loss)


ImgProcBertModel.register_for_auto_class("AutoModel")
ImgProcBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
ImgProcBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ImgProcBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
