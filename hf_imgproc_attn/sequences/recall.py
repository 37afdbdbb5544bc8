"""Recall of key-value pairs out of the context: several queries, and pairs among noise.

**MQAR**, multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927): key-value pairs, then the
keys again, scattered among fillers; at each the model has to name its value.

    k3 v8 k1 v5 v2 v9 k1 v4 k6 v1 k3 ...    answers: v5 behind the second k1, v8 behind the second k3

*Differs from the public generator*, which draws fillers from the whole vocabulary: a filler may be one of the keys,
and what happens to stand behind it then overwrites the pair, so that the right answer is another one than the label.
Here the fillers are never a key of their sequence.

**Noisy in-context recall** (Poli et al. 2024, "MAD", arXiv 2403.17844): key-value pairs of a small vocabulary repeat
themselves, and some pairs are replaced by tokens that only disturb; wherever a key comes again, its value is asked. It
is the natural test of a denoiser, and ``corruption``, which is ours, makes it one in the sense of statistics: a value
that is shown is replaced by another one with that probability, while the answer stays the true one. Averaging over
all that was shown then beats copying what was shown last.
"""

from dataclasses import dataclass

import numpy as np

from hf_imgproc_attn.sequences.drawing import below, distinct, weighted_places
from hf_imgproc_attn.sequences.splits import IGNORED, check_setting


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """The settings of multi-query associative recall.

    Attributes:
        length: tokens of a sequence; even.
        pairs: keys with a value, each asked once.
        vocab_size: half of it keys, half of it values.
        power: 1 spreads the queries evenly, less puts most of them near the pairs (power * gap^(power - 1)).
        random_fillers: whether the fillers are random tokens, or all the same one.

    Raises:
        UsageError: for settings that do not fit each other.
    """

    length: int = 256
    pairs: int = 16
    vocab_size: int = 8192
    power: float = 0.01
    random_fillers: bool = True

    def __post_init__(self) -> None:
        check_setting(self.length >= 4 and self.length % 2 == 0, "length", "an even number >= 4", self.length)
        check_setting(
            1 <= self.pairs <= self.length // 4, "pairs", f"from 1 to length / 4 = {self.length // 4}", self.pairs
        )
        least = 2 * self.pairs + 4
        check_setting(
            least <= self.vocab_size < 2**15, "vocab_size", f"from 2 * pairs + 4 = {least} to 32767", self.vocab_size
        )
        check_setting(0 < self.power <= 1, "power", "above 0 and at most 1", self.power)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The filler, keys, values."""
        keys = self.vocab_size // 2
        return ("_", *(f"k{key}" for key in range(1, keys)), *(f"v{value}" for value in range(self.vocab_size - keys)))

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.length

    @property
    def classes(self) -> None:
        """The answers are tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences ``[count, length]``, int16, and the answers at their places, int64."""
        first_value, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + distinct(rng, count, self.pairs, first_value - 1)
        values = first_value + distinct(rng, count, self.pairs, self.vocab_size - first_value)
        gaps = (self.length - context) // 2
        weights = self.power * np.arange(1, gaps + 1, dtype=np.float64) ** (self.power - 1)
        queries = context + 2 * weighted_places(rng, count, self.pairs, weights)
        tokens = self._fillers(rng, keys)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        np.put_along_axis(tokens, queries, keys, axis=1)
        # The answer of a query at the last place but one stands at the last place.
        labels = np.full(tokens.shape, IGNORED, dtype=np.int64)
        np.put_along_axis(labels, queries + 1, values, axis=1)
        return tokens.astype(np.int16), labels

    def _fillers(self, rng: np.random.Generator, keys: np.ndarray) -> np.ndarray:
        """``[count, length]`` tokens, none of which is a key of its row; int64."""
        fillers = np.zeros((len(keys), self.length), dtype=np.int64)
        if not self.random_fillers:
            return fillers
        ordered = np.sort(keys, axis=1)
        # Uniform among the other tokens: numbers that skip the keys, each of which shifts those from it on.
        fillers = 1 + below(rng, self.vocab_size - 1 - self.pairs, fillers.shape)
        for column in ordered.T:
            fillers += fillers >= column[:, None]
        return fillers


@dataclass(frozen=True, kw_only=True)
class NoisyRecall:
    """The settings of noisy in-context recall; the defaults are MAD's.

    Attributes:
        length: tokens of a sequence; even.
        vocab_size: without the noise; half of it keys, half of it values.
        noise_vocab_size: tokens that only disturb.
        noise: probability that a pair is replaced by two of them, in [0, 1).
        corruption: probability that a value is shown as another one, in [0, 1).

    Raises:
        UsageError: for settings that do not fit each other.
    """

    length: int = 128
    vocab_size: int = 16
    noise_vocab_size: int = 16
    noise: float = 0.2
    corruption: float = 0.0

    def __post_init__(self) -> None:
        check_setting(self.length >= 4 and self.length % 2 == 0, "length", "an even number >= 4", self.length)
        check_setting(4 <= self.vocab_size < 2**14, "vocab_size", "from 4 to 16383", self.vocab_size)
        least = int(self.noise > 0)
        check_setting(
            least <= self.noise_vocab_size < 2**14, "noise_vocab_size", f"from {least} to 16383", self.noise_vocab_size
        )
        for name in ("noise", "corruption"):
            check_setting(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Keys, values, noise."""
        kinds = (("k", self._keys), ("v", self.vocab_size - self._keys), ("n", self.noise_vocab_size))
        return tuple(f"{kind}{number}" for kind, size in kinds for number in range(size))

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return self.length

    @property
    def classes(self) -> None:
        """The answers are tokens."""

    @property
    def _keys(self) -> int:
        return self.vocab_size // 2

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences ``[count, length]``, int16, and the answers at their places, int64."""
        pairs, num_values = self.length // 2, self.vocab_size - self._keys
        rows = np.arange(count)
        keys = below(rng, self._keys, (count, pairs))
        value_of = below(rng, num_values, (count, self._keys))
        is_noise = rng.random((count, pairs)) < self.noise
        # One pair is always there, and the last one asks for a key that was shown.
        is_noise[rows, below(rng, pairs - 1, count)] = False
        is_noise[:, -1] = False
        keys[:, -1] = self._shown_key(rng, keys[:, :-1], is_noise[:, :-1])
        truth = np.take_along_axis(value_of, keys, axis=1)
        other = (truth + 1 + below(rng, max(num_values - 1, 1), truth.shape)) % num_values
        shown = np.where(rng.random(truth.shape) < self.corruption, other, truth)
        noise = self.vocab_size + below(rng, max(self.noise_vocab_size, 1), (count, self.length))
        tokens = np.empty((count, self.length), dtype=np.int64)
        tokens[:, 0::2] = np.where(is_noise, noise[:, 0::2], keys)
        tokens[:, 1::2] = np.where(is_noise, noise[:, 1::2], self._keys + shown)
        labels = np.full(tokens.shape, IGNORED, dtype=np.int64)
        seen = np.zeros((count, self._keys), dtype=bool)
        for pair in range(pairs):
            key, real = keys[:, pair], ~is_noise[:, pair]
            asked = real & seen[rows, key]
            labels[asked, 2 * pair + 1] = self._keys + truth[asked, pair]
            seen[rows, key] |= real
        return tokens.astype(np.int16), labels

    def _shown_key(self, rng: np.random.Generator, keys: np.ndarray, is_noise: np.ndarray) -> np.ndarray:
        """For each row one of the keys that it has shown, all alike likely; int64 ``[rows]``."""
        shown = np.zeros((len(keys), self._keys), dtype=bool)
        rows, columns = np.nonzero(~is_noise)
        shown[rows, keys[rows, columns]] = True
        return np.argmax(rng.random(shown.shape) * shown, axis=1)
