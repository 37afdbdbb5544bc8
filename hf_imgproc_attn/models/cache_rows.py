"""Tensors that grow row by row without being copied at every step, for cached decoding.

``torch.cat`` moves the whole cache for every token, and on the CPU it asks the system for fresh memory each time: at
1,024 tokens that costs several times the attention itself.
"""

from __future__ import annotations

import torch

_MIN_SPARE_ROWS = 64


class GrowingRows:
    """Appends along the last but one axis, in place where there is room.

    What is returned is a view of a buffer with up to a quarter of spare rows. Rows that were appended once never
    change; after a crop new rows overwrite those that were removed. Where writing in place could change a tensor that
    is still used, rows are concatenated instead: under autograd, in traced code, and for tensors that were created in
    inference mode and are used outside it.
    """

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self._last: torch.Tensor | None = None

    def append(self, stored: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Put rows behind what is stored.

        Args:
            stored: ``[..., length, width]``: what the previous call returned, or what a cache operation made of it (a
                crop, other batch rows, another device); None or an empty tensor: nothing yet.
            rows: ``[..., new, width]``.

        Returns:
            ``[..., length + new, width]``.
        """
        if stored is None or stored.numel() == 0:
            return rows
        needs_graph = torch.is_grad_enabled() and (rows.requires_grad or stored.requires_grad)
        # Written in place, rows of another batch would be broadcast and rows of another precision rounded.
        alike = rows.shape[:-2] == stored.shape[:-2] and rows.dtype == stored.dtype
        if needs_graph or not alike or torch.compiler.is_compiling():
            return torch.cat([stored, rows], dim=-2)
        length, total = stored.shape[-2], stored.shape[-2] + rows.shape[-2]
        if self.buffer is None or not self._continues(stored, total):
            spare = max(total // 4, _MIN_SPARE_ROWS)
            self.buffer = stored.new_empty(*stored.shape[:-2], total + spare, stored.shape[-1])
            self.buffer[..., :length, :] = stored
        self.buffer.narrow(-2, length, total - length).copy_(rows)
        self._last = self.buffer.narrow(-2, 0, total)
        return self._last

    def _continues(self, stored: torch.Tensor, total: int) -> bool:
        """Whether the buffer begins with what is stored and has room for ``total`` rows."""
        buffer = self.buffer
        if buffer is None or buffer.shape[-2] < total:
            return False
        # What the last call returned need not be looked at.
        is_prefix = stored is self._last or (
            buffer.device == stored.device
            and buffer.dtype == stored.dtype
            and buffer.shape[:-2] == stored.shape[:-2]
            and buffer.stride() == stored.stride()
            and buffer.data_ptr() == stored.data_ptr()
        )
        return is_prefix and (torch.is_inference_mode_enabled() or not buffer.is_inference())
