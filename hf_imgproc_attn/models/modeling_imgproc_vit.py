"""ViT with a chosen attention filter. Stock modules are reused; attention, layer and position inputs are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    MaskedImageModelingOutput,
    SemanticSegmenterOutput,
)
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .boost_depth import LayerState
from .configuration_imgproc_vit import ImgProcViTConfig
from .layer_grid import check_images, check_patch_mask, grid_size, masked_patch_loss, trained_grid
from .layer_inputs import LayerInputs
from .layer_tokens import FilteredAttentionMixin, Projected, filter_residual, project_each
from .modeling_dense import check_masks, check_whole_patches, feature_map, segmentation_head, segmentation_loss
from .modeling_encoder import encoder_inputs, run_layers
from .modeling_losses import classification_loss
from .modeling_saved_names import RenamedOnLoadingMixin, accept_saved_names
from .modeling_shared import FilterPreTrainedMixin, check_activation, shared_position_projection, wanted_attentions
from .modeling_vit_embeddings import NUM_CLASS_TOKENS, ImgProcViTEmbeddings
from .spec_axes import COORDINATE_KERNELS, is_stock_layer


class ImgProcViTAttention(FilteredAttentionMixin, ViTAttention):
    """Bidirectional self-attention whose filter is composed by :class:`AttentionFilter`."""

    def __init__(self, config: ImgProcViTConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        self.make_filter(config, layer_idx, max(trained_grid(config)), config.layer_norm_eps, NUM_CLASS_TOKENS)

    def project(self, hidden_states: torch.Tensor) -> Projected:
        return project_each(hidden_states, self.head_dim, (self.q_proj, self.k_proj, self.v_proj))

    def project_heads(self, heads: torch.Tensor) -> torch.Tensor:
        return self.o_proj(heads)

    def dropout_on_weights(self) -> float:
        return self.attention_dropout

    def attend_stock(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return ViTAttention.forward(self, hidden_states, inputs.stock_mask, **kwargs)


class ImgProcViTLayer(ViTLayer):
    """A stock layer around :class:`ImgProcViTAttention`, with the residual scheme and the state between layers."""

    def __init__(self, config: ImgProcViTConfig, layer_idx: int) -> None:
        check_activation(config)
        super().__init__(config)
        self.attention = ImgProcViTAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_states: torch.Tensor | None = None,
        *state: torch.Tensor | None,
        inputs: LayerInputs,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """``[batch, length, hidden_size]`` and the state's tensors in and out.

        Tensors that carry a gradient are positional: re-entrant gradient checkpointing sees no others.
        """
        inputs = inputs._replace(position_states=position_states, state=LayerState(*state))
        hidden_states, new_state = filter_residual(
            self.attention, self.layernorm_before, hidden_states, inputs, self.dropout, **kwargs
        )
        hidden_states = self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states
        return hidden_states, *new_state


class ImgProcViTPreTrainedModel(FilterPreTrainedMixin, ViTPreTrainedModel):
    """Base class: loading, saving and initialisation of the ViT variants."""

    config_class = ImgProcViTConfig
    config: ImgProcViTConfig
    _no_split_modules = ["ImgProcViTEmbeddings", "ImgProcViTLayer", "FilterScalars"]
    _keep_in_fp32_modules_strict = ["scalar_bias"]
    auto_map = {
        "AutoConfig": "configuration_imgproc_vit.ImgProcViTConfig",
        "AutoModel": "modeling_imgproc_vit.ImgProcViTModel",
        "AutoModelForImageClassification": "modeling_imgproc_vit.ImgProcViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_imgproc_vit.ImgProcViTForMaskedImageModeling",
        "AutoModelForSemanticSegmentation": "modeling_imgproc_vit.ImgProcViTForSemanticSegmentation",
        "AutoBackbone": "modeling_imgproc_vit.ImgProcViTBackbone",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The stock initialisation, but a mask token to which no position is added does not start at 0.

        All masked patches would be 0 there, where a layer norm has a slope of 1 / sqrt(eps): the first gradient of the
        mask token would be thousands of times the others.
        """
        super()._init_weights(module)
        if isinstance(module, ImgProcViTEmbeddings) and module.mask_token is not None and not module.adds_positions:
            init.trunc_normal_(module.mask_token, std=self.config.initializer_range)

    def post_init(self) -> None:
        """The stock initialisation; afterwards ``load_state_dict`` takes the names that a checkpoint has."""
        super().post_init()
        self.register_load_state_dict_pre_hook(accept_saved_names)


class ImgProcViTModel(RenamedOnLoadingMixin, ImgProcViTPreTrainedModel, ViTModel):
    """The bare encoder.

    Args:
        config: of the variant; checked again here, since fields can be set one by one after its construction.
        add_pooling_layer: whether to add a pooling layer on the class token.
        use_mask_token: whether to have a mask token, for masked image modelling.
    """

    def __init__(self, config: ImgProcViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        config.validate()
        ViTPreTrainedModel.__init__(self, config)
        self.position_kernels = {spec.position_kernel for spec in config.layer_specs}
        self.embeddings = ImgProcViTEmbeddings(config, use_mask_token=use_mask_token)
        heads = config.num_attention_heads
        self.position_projection = shared_position_projection(
            config, heads, getattr(config, "head_dim", config.hidden_size // heads), config.layer_norm_eps
        )
        self.layers = nn.ModuleList([ImgProcViTLayer(config, i) for i in range(config.num_hidden_layers)])
        self.is_stock = all(is_stock_layer(config, spec) for spec in config.layer_specs)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def _position_inputs(
        self, pixel_values: torch.Tensor, position_table: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the layers' position kernels compare.

        Vectors of the patches ``[1, patches, hidden_size]`` (or their shared projections) for ``untied``; (row,
        column) ``[1, 1 + patches, 2]`` in patch units, zeros for the class token, for kernels that see places.
        """
        height, width = pixel_values.shape[-2:]
        position_states, coordinates = None, None
        if "untied" in self.position_kernels:
            position_states = position_table
            if self.position_projection is not None:
                position_states = self.position_projection(position_states)
        if self.position_kernels & set(COORDINATE_KERNELS):
            grid_sides = grid_size(self.config, height, width)
            axes = [torch.arange(side, device=pixel_values.device) for side in grid_sides]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            coordinates = nn.functional.pad(grid, (0, 0, NUM_CLASS_TOKENS, 0)).unsqueeze(0)
        return position_states, coordinates

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As ``ViTModel.forward``; see there for the arguments.

        Raises:
            ValueError: without ``pixel_values``, for an image of another size without ``interpolate_pos_encoding``, or
                for a mask of the wrong shape.
        """
        pixel_values = check_images(pixel_values)
        output_attentions = wanted_attentions(self.config, kwargs)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states, position_table = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=bool(interpolate_pos_encoding)
        )
        position_states, coordinates = self._position_inputs(pixel_values, position_table)
        inputs = encoder_inputs(
            self, hidden_states, attention_mask, coordinates, contiguous=True, output_attentions=output_attentions
        )
        kwargs |= {"inputs": inputs, "output_attentions": output_attentions}
        hidden_states = self.layernorm(run_layers(self.layers, self.config, hidden_states, position_states, **kwargs))
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class ImgProcViTForImageClassification(ImgProcViTPreTrainedModel, ViTForImageClassification):
    """ViT variant with a linear classifier on the class token."""

    def __init__(self, config: ImgProcViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = ImgProcViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.loss_type = "ForImageClassification"  # not told by the name of a class that a user derives
        self.loss_function = classification_loss
        self.post_init()


class ImgProcViTForMaskedImageModeling(ImgProcViTPreTrainedModel, ViTForMaskedImageModeling):
    """ViT variant that reconstructs masked patches (SimMIM)."""

    accepts_loss_kwargs = False  # a mean over the masked patches, of which Trainer does not know the number

    def __init__(self, config: ImgProcViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)
        self.vit = ImgProcViTModel(config, add_pooling_layer=False, use_mask_token=True)
        channels = config.encoder_stride**2 * config.num_channels
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, channels, kernel_size=1), nn.PixelShuffle(config.encoder_stride)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        """As the stock ``forward``, which assumes square images; see there for the arguments.

        An image's last rows and columns that no patch covers are not reconstructed and not part of the loss.

        Raises:
            ValueError: without images; for a mask without one value for each patch; for any mask if ``patch_size`` is
                not ``encoder_stride``.
        """
        pixel_values = check_images(pixel_values)
        if bool_masked_pos is not None:
            check_patch_mask(self.config, pixel_values, bool_masked_pos)
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        grid = grid_size(self.config, *pixel_values.shape[-2:])
        reconstruction = self.decoder(feature_map(outputs.last_hidden_state, grid, NUM_CLASS_TOKENS))
        loss = None
        if bool_masked_pos is not None:
            loss = masked_patch_loss(pixel_values, reconstruction, bool_masked_pos, grid) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ImgProcViTForSemanticSegmentation(ImgProcViTPreTrainedModel):
    """ViT variant with a class for each place, see ``config.segmentation_head``; images may have any size.

    Positions are interpolated to it, unless ``interpolate_pos_encoding=False`` asks to refuse other sizes.
    """

    accepts_loss_kwargs = False  # a mean over the pixels that count, of which Trainer does not know the number

    def __init__(self, config: ImgProcViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ImgProcViTModel(config, add_pooling_layer=False)
        self.decode_head = segmentation_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        """Images ``[batch, channels, height, width]`` to logits ``[batch, num_labels, rows, columns]``.

        There is one row and column for each patch with the linear head, up to four with the other one; the image
        processor's ``post_process_semantic_segmentation`` brings them to an image's size.

        Args:
            pixel_values: height and width are multiples of the patches'.
            labels: the pixels' classes ``[batch, height, width]``, or ``config.semantic_loss_ignore_index``.
            interpolate_pos_encoding: see the class.
            attention_mask: of the tokens, as in ``ImgProcViTModel``.
            **kwargs: as of ``ImgProcViTModel``.

        Raises:
            ValueError: without images, for pixels that no patch covers, or for labels that are no masks of the images.
        """
        pixel_values = check_images(pixel_values)
        grid = check_whole_patches(self.config, pixel_values)
        if labels is not None:
            check_masks(self.config, pixel_values, labels)
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "attention_mask": attention_mask, **kwargs}
        outputs = self.vit(pixel_values, **options)
        logits = self.decode_head(feature_map(outputs.last_hidden_state, grid, NUM_CLASS_TOKENS).contiguous())
        ignored = self.config.semantic_loss_ignore_index
        return SemanticSegmenterOutput(
            loss=None if labels is None else segmentation_loss(logits, labels, ignored),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ImgProcViTBackbone(BackboneMixin, ImgProcViTModel):
    """Feature maps of chosen layers, ``config.out_features``, for a head of another library's or Transformers' making.

    As ``Dinov2Backbone`` does it: each map is normalised by the last layer norm and has no class token. Images may
    have any size; last rows and columns that no patch covers are left out.
    """

    def __init__(self, config: ImgProcViTConfig) -> None:
        config.set_output_features_output_indices(config.out_features, config.out_indices)  # None: the last layer
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor | None = None, interpolate_pos_encoding: bool = True, **kwargs: Any
    ) -> BackboneOutput:
        """Images ``[batch, channels, height, width]`` to maps ``[batch, hidden_size, rows, columns]`` of patches.

        Args:
            pixel_values: the images.
            interpolate_pos_encoding: False refuses images of another size than ``config.image_size``.
            **kwargs: as of ``ImgProcViTModel``.

        Raises:
            ValueError: as ``ImgProcViTModel``.
        """
        pixel_values = check_images(pixel_values)
        outputs = ImgProcViTModel.forward(
            self, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        grid = grid_size(self.config, *pixel_values.shape[-2:])
        maps = (self.layernorm(outputs.hidden_states[index]) for index in self.out_indices)
        return BackboneOutput(
            feature_maps=tuple(feature_map(tokens, grid, NUM_CLASS_TOKENS).contiguous() for tokens in maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


ImgProcViTModel.register_for_auto_class("AutoModel")
ImgProcViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ImgProcViTForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ImgProcViTForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
ImgProcViTBackbone.register_for_auto_class("AutoBackbone")
