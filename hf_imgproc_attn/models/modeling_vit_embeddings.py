"""The embeddings of ViT: patches, a class token, and positions where the variant adds them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.vit.modeling_vit import ViTEmbeddings

from .configuration_imgproc_vit import ImgProcViTConfig
from .layer_grid import grid_size, resize_table, trained_grid
from .spec_axes import uses_position_table

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
