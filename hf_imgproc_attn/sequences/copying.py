"""Selective copying: a few tokens, scattered among many blanks, are to be repeated in their order.

The task of Gu and Dao 2023 ("Mamba", arXiv 2312.00752): there 16 tokens out of a vocabulary of 16 in a sequence of
4096 places. The defaults here are the shorter ones of Poli et al. 2024 ("MAD", arXiv 2403.17844): 256 places.

    _ _ 5 _ 2 _ _ 5 > > > >    answers: 5 2 5, one behind each marker but the last
"""

from dataclasses import dataclass

import numpy as np

from hf_imgproc_attn.sequences.drawing import below
from hf_imgproc_attn.sequences.splits import IGNORED, check_setting


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """The task's settings.

    Attributes:
        length: places for tokens and blanks; ``copied + 1`` markers follow.
        copied: tokens to be copied.
        vocab_size: blank and marker included.

    Raises:
        UsageError: for settings that do not fit each other.
    """

    length: int = 256
    copied: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        check_setting(self.length >= 1, "length", "an integer >= 1", self.length)
        check_setting(1 <= self.copied <= self.length, "copied", f"from 1 to length = {self.length}", self.copied)
        check_setting(3 <= self.vocab_size < 2**15, "vocab_size", "from 3 to 32767", self.vocab_size)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Tokens, blank, marker."""
        return (*(str(token) for token in range(self.vocab_size - 2)), "_", ">")

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.length + self.copied + 1

    @property
    def classes(self) -> None:
        """The answers are tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences ``[count, length + copied + 1]``, int16, and the answers at their places, int64."""
        blank, marker = self.vocab_size - 2, self.vocab_size - 1
        copied = below(rng, self.vocab_size - 2, (count, self.copied))
        chosen = np.argsort(rng.random((count, self.length)), axis=1, kind="stable")[:, : self.copied]
        tokens = np.full((count, self.longest), marker, dtype=np.int64)
        tokens[:, : self.length] = blank
        np.put_along_axis(tokens, np.sort(chosen, axis=1), copied, axis=1)
        labels = np.full(tokens.shape, IGNORED, dtype=np.int64)
        labels[:, self.length + 1 :] = copied
        return tokens.astype(np.int16), labels
