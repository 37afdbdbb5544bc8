"""Splits of a generated task: one stream of different sequences, of which the test split comes first.

All splits of a task are cut out of one stream of sequences, none of which occurs twice: first test, then validation,
then training. So no sequence is in two splits, and a limit on one kind of sample leaves the others as they are. The
stream depends on the task, its settings, the seed and :data:`FORMAT`, and on nothing else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from hf_imgproc_attn.errors import UsageError

FORMAT = 1
"""Version of the generators, recorded with every run: it grows when a seed no longer gives the same sequences."""

IGNORED = -100
"""Label of a place where nothing is asked."""

SPLITS = ("test", "validation", "train")
"""In the order in which they are cut out of the stream."""

_BATCH = 1024
_BATCHES_WITHOUT_NEWS = 50


class Rules(Protocol):
    """The rules of one task: a frozen dataclass whose fields are what can be set."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token id -> the word that it is written as."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None: the answers are tokens at places of the sequence."""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Sequence[np.ndarray] | np.ndarray, np.ndarray]:
        """Draw at most ``count`` sequences, and their labels as in :class:`SequenceSplit`."""


@dataclass(frozen=True)
class SequenceSplit:
    """The sequences of one split.

    Attributes:
        tokens: a row each, token ids ``[length]``, int16 or int32.
        labels: ``[rows]`` class indices, or ``[rows, length]`` tokens that are the right answer *at* their place, -100
            where nothing is asked. A causal model predicts a place from those before it. int64.
        origin: task, settings, seed and format version.
    """

    tokens: Sequence[np.ndarray]
    labels: np.ndarray
    origin: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Numbers of rows, tokens and answers, what they were made from, a SHA-256 over tokens and labels."""
        digest = hashlib.sha256()
        for row, label in zip(self.tokens, self.labels, strict=True):
            digest.update(len(row).to_bytes(4, "little"))
            digest.update(row.astype("<i4").tobytes())
            digest.update(np.asarray(label).astype("<i4").tobytes())
        tokens = sum(len(row) for row in self.tokens)
        counts = {"rows": len(self), "tokens": tokens}
        if self.labels.ndim == 2:
            counts["answers"] = int((self.labels != IGNORED).sum())
        return {**counts, **self.origin, "sha256": digest.hexdigest()}


def draw_splits(name: str, rules: Rules, sizes: Mapping[str, int], seed: int) -> dict[str, SequenceSplit]:
    """Cut the splits out of the task's stream.

    Args:
        name: of the task.
        rules: the task with its settings.
        sizes: split -> number of sequences; a split of 0 is left out.
        seed: of the stream, an integer >= 0.

    Raises:
        UsageError: for sizes or a seed that cannot be, or settings that have fewer different sequences.
    """
    for split, size in sizes.items():
        if split not in SPLITS or not _is_count(size):
            raise UsageError(f"sizes must be integers >= 0 for {', '.join(SPLITS)}, got {split}={size!r}")
    if not _is_count(seed):
        raise UsageError(f"seed must be an integer >= 0, got {seed!r}")
    origin = {"task": name, "format": FORMAT, "seed": int(seed), "settings": asdict(rules)}  # type: ignore[call-overload]
    stream = _different(rules, origin)
    splits = {}
    for split in SPLITS:
        if sizes.get(split):
            pairs = [pair for _, pair in zip(range(sizes[split]), stream, strict=False)]
            if len(pairs) < sizes[split]:
                raise UsageError(
                    f"the {split} split of {name} must have at most as many sequences as its settings give different "
                    f"ones, got {sizes[split]}"
                )
            labels = np.stack([label for _, label in pairs]).astype(np.int64)
            splits[split] = SequenceSplit([row for row, _ in pairs], labels, origin)
    return {split: splits[split] for split in reversed(SPLITS) if split in splits}


def _different(rules: Rules, origin: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream: sequences and labels, no sequence twice; it ends when nothing new comes any more."""
    start = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(start[:16], "little")))
    seen: set[bytes] = set()
    without_news = 0
    while without_news < _BATCHES_WITHOUT_NEWS:
        without_news += 1
        for row, label in zip(*rules.draw(rng, _BATCH), strict=True):
            key = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                without_news = 0
                yield row, label


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def check_setting(holds: bool, name: str, rule: str, value: object) -> None:
    """Refuse a setting of a task.

    Raises:
        UsageError: naming the setting, the rule and what was got.
    """
    if not holds:
        raise UsageError(f"{name} must be {rule}, got {value!r}")
