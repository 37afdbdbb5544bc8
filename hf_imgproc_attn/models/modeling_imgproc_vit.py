"""ViT with a chosen attention filter. Stock modules are reused; attention, layer and position inputs are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedImageModelingOutput
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .boost_depth import LayerState
from .configuration_imgproc_vit import ImgProcViTConfig
from .layer_grid import check_images, check_patch_mask, grid_size, masked_patch_loss, resize_table, trained_grid
from .layer_inputs import LayerInputs
from .layer_tokens import FilteredAttentionMixin, Projected, filter_residual, project_each
from .modeling_encoder import encoder_inputs, run_layers
from .modeling_losses import classification_loss
from .modeling_shared import FilterPreTrainedMixin, shared_position_projection, wanted_attentions
from .spec_axes import COORDINATE_KERNELS, is_stock_layer, uses_position_table

NUM_CLASS_TOKENS = 1


class ImgProcViTEmbeddings(ViTEmbeddings):
    """Patch and class tokens; positions are added only for ``additive``, kept as a table of patches for ``untied``."""

    def __init__(self, config: ImgProcViTConfig, use_mask_token: bool = False) -> None:
        super().__init__(config, use_mask_token=use_mask_token)
        self.config = config
        self.adds_positions = any(spec.position_kernel == "additive" for spec in config.layer_specs)
        if not self.adds_positions:
            rows, columns = trained_grid(config)
            table = nn.Parameter(torch.randn(1, rows * columns, config.hidden_size))
            self.position_embeddings = table if uses_position_table(config) else None

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What stock ``forward`` adds to the tokens ``[batch, 1 + patches, hidden_size]``: 0 unless ``additive``.

        The stock function assumes that patches and the table's grid are square; where they are, it gives the same.
        """
        table = self.position_embeddings
        if not self.adds_positions or table is None:
            return embeddings.new_zeros(())
        trained, requested = trained_grid(self.config), grid_size(self.config, height, width)
        if trained == requested:
            return table
        return torch.cat(
            (table[:, :NUM_CLASS_TOKENS], resize_table(table[:, NUM_CLASS_TOKENS:], trained, requested)), 1
        )

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[batch, channels, height, width]`` to ``[batch, 1 + patches, hidden_size]``, and the position table.

        The table of ``untied``, ``[1, patches, hidden_size]`` (else None), is handed out here, where hooks that shard
        or offload parameters expect them to be used.

        Raises:
            ValueError: for an image of another size without ``interpolate_pos_encoding``, or smaller than a patch.
        """
        height, width = pixel_values.shape[-2:]
        grid_size(self.config, height, width)  # refuses images without a patch
        expected = tuple(self.image_size)
        if not interpolate_pos_encoding and (height, width) != expected:
            raise ValueError(
                f"pixel_values must be images of {expected[0]} x {expected[1]} pixels, got {height} x {width}: "
                "resize them or pass interpolate_pos_encoding=True"
            )
        # Of the two ways in which the stock code adds positions, only interpolation can be overridden to add 0.
        interpolate = interpolate_pos_encoding or not self.adds_positions
        tokens = super().forward(pixel_values, bool_masked_pos, interpolate)
        kernel_reads_positions = not self.adds_positions and self.position_embeddings is not None
        return tokens, self.position_table(height, width) if kernel_reads_positions else None

    def position_table(self, height: int, width: int) -> torch.Tensor:
        """Position vectors of the patches, ``[1, patches, hidden_size]``, interpolated to the image's grid."""
        table = self.position_embeddings
        if table is None:
            raise ValueError("this model has no position table")
        trained, requested = trained_grid(self.config), grid_size(self.config, height, width)
        if trained == requested:
            return table.clone()  # FSDP frees the parameter itself after this module's forward
        return resize_table(table, trained, requested)


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


def accept_saved_names(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Rename weights that have the names of a checkpoint, before ``load_state_dict`` looks for them.

    ViT is saved under the parameter names of Transformers 4, and only ``from_pretrained`` translates them.
    ``Trainer`` reads checkpoints with ``load_state_dict``, on resuming and when it loads the best model: it would drop
    nearly every weight with a mere warning (seen with Transformers 5.23, with the stock ViT too).
    """
    parameters = model.state_dict()
    if prefix or state_dict.keys() <= parameters.keys():
        return
    for name, tensor in parameters.items():
        saved = list(revert_weight_conversion(model, {name: tensor}))
        if len(saved) == 1 and saved[0] != name and saved[0] in state_dict:
            state_dict[name] = state_dict.pop(saved[0])


class ImgProcViTPreTrainedModel(FilterPreTrainedMixin, ViTPreTrainedModel):
    """Base class: loading, saving and initialisation of the ViT variants."""

    config_class = ImgProcViTConfig
    config: ImgProcViTConfig
    _no_split_modules = ["ImgProcViTEmbeddings", "ImgProcViTLayer"]
    _keep_in_fp32_modules_strict = ["scalar_bias"]
    auto_map = {
        "AutoConfig": "configuration_imgproc_vit.ImgProcViTConfig",
        "AutoModel": "modeling_imgproc_vit.ImgProcViTModel",
        "AutoModelForImageClassification": "modeling_imgproc_vit.ImgProcViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_imgproc_vit.ImgProcViTForMaskedImageModeling",
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


class _RenamedOnLoadingMixin:
    """Tells Transformers of every class defined below this one that its weights on disk have other names.

    On disk ViT has the names of Transformers 4; the stock library renames them on loading by the class name `ViTModel`
    and would leave our class, and classes derived from it, with random layers.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_checkpoint_conversion_mapping(
            cls.__name__, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
        )


class ImgProcViTModel(_RenamedOnLoadingMixin, ImgProcViTPreTrainedModel, ViTModel):
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
        patches = outputs.last_hidden_state[:, NUM_CLASS_TOKENS:]
        reconstruction = self.decoder(patches.mT.unflatten(2, grid))
        loss = None
        if bool_masked_pos is not None:
            loss = masked_patch_loss(pixel_values, reconstruction, bool_masked_pos, grid) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


ImgProcViTModel.register_for_auto_class("AutoModel")
ImgProcViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ImgProcViTForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
