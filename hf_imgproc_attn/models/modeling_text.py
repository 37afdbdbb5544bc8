"""What the models for texts share: their words, and what their layers' position kernels compare."""

from __future__ import annotations

from typing import Any

import torch

from .kernel_position import check_coordinates
from .spec_axes import COORDINATE_KERNELS


class TextModelMixin:
    """Put before the backbone's stock model class.

    The model has ``position_kernels``, the set of those of its layers, and ``position_projection``, the projections
    that all layers share, or None.
    """

    config: Any
    position_kernels: set[str]
    position_projection: Any

    def checked_words(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The embedded words, ``[batch, length, hidden_size]``.

        Raises:
            ValueError: for both or neither of ``input_ids`` and ``inputs_embeds``, or one of the wrong shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {got}")
        words: Any = inputs_embeds
        if words is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)  # type: ignore[attr-defined]
            words = self.get_input_embeddings()(input_ids)  # type: ignore[attr-defined]
        if words.ndim != 3:
            raise ValueError(
                "input_ids must have shape [batch, length] and inputs_embeds [batch, length, hidden_size], got "
                f"{list(words.shape[:-1] if input_ids is not None else words.shape)}"
            )
        return words

    def checked_positions(
        self, position_ids: torch.Tensor | None, words: torch.Tensor, past_length: int = 0, *, has_table: bool
    ) -> torch.Tensor:
        """Positions of the new tokens, ``[batch or 1, length]``: those that were given, or the ones that follow.

        Raises:
            ValueError: for positions outside the table of ``additive`` and ``untied``, before an embedding look-up
                crashes, or of the wrong shape.
        """
        batch, length = words.shape[:2]
        limit = self.config.max_position_embeddings
        name = self.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        if position_ids is None:
            # Of a static cache the number of tokens is a tensor, which a traced graph cannot look at.
            if has_table and not torch.compiler.is_compiling() and past_length + length > limit:
                raise ValueError(
                    f"input of {past_length + length} tokens (cached ones included) is longer than "
                    f"{name}={limit} of position_kernel={self.config.position_kernel!r}: shorten the input"
                )
            return (torch.arange(length, device=words.device) + past_length).unsqueeze(0)
        # No set: looking a shape up would hash its sizes and compile anew for every length.
        if position_ids.ndim != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
            raise ValueError(
                f"position_ids must have shape {(batch, length)} or {(1, length)}, got {tuple(position_ids.shape)}"
            )
        # Looking at values would wait for an accelerator at every decoding step; there the embedding kernel checks.
        if has_table and position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            lowest, highest = int(position_ids.min()), int(position_ids.max())
            if lowest < 0 or highest >= limit:
                raise ValueError(
                    f"position_ids must be from 0 to {name} - 1 = {limit - 1} for "
                    f"position_kernel={self.config.position_kernel!r}, got values from {lowest} to {highest}"
                )
        return position_ids

    def position_inputs(
        self, positions: torch.Tensor, vectors: torch.Tensor | None, words: torch.Tensor, *, contiguous: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the layers' position kernels compare: vectors for ``untied``, centred indices for others.

        Args:
            positions: from :meth:`checked_positions`.
            vectors: those of the positions, ``[batch or 1, length, hidden_size]``, where a layer is ``untied``.
            words: the embedded words.
            contiguous: whether the positions are known to be in order and to have no gaps.
        """
        position_states, coordinates = vectors, None
        if position_states is not None and self.position_projection is not None:
            position_states = self.position_projection(position_states)
        if self.position_kernels & set(COORDINATE_KERNELS):
            # Centred at a fixed index, the same for cached keys and new queries, so that numbers stay small: float16
            # then represents the positions of longer texts.
            coordinates = (positions - self.config.max_position_embeddings // 2).unsqueeze(-1)
            batch, length = words.shape[:2]
            check_coordinates(coordinates, batch, length, axes=1, contiguous=contiguous)
        return position_states, coordinates
