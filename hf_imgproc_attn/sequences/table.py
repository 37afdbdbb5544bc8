"""The generated tasks: one row each, with the sizes of their splits and where the rules were published."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_imgproc_attn.errors import UsageError, did_you_mean
from hf_imgproc_attn.sequences.copying import SelectiveCopying
from hf_imgproc_attn.sequences.listops import ListOps
from hf_imgproc_attn.sequences.recall import MQAR, NoisyRecall
from hf_imgproc_attn.sequences.splits import Rules, SequenceSplit, draw_splits


@dataclass(frozen=True)
class SequenceTask:
    """A task as it is called by name.

    Attributes:
        rules: with the settings of this name.
        sizes: sequences in each split.
        source: where rules and settings come from.
    """

    rules: Rules
    sizes: dict[str, int]
    source: str


def _sizes(train: int, held_out: int) -> dict[str, int]:
    return {"train": train, "validation": held_out, "test": held_out}


_LRA = "arXiv 2011.04006"
_MAD = "arXiv 2403.17844"
_ZOOLOGY = "arXiv 2312.04927"

SEQUENCE_TASKS: dict[str, SequenceTask] = {
    "listops": SequenceTask(ListOps(), _sizes(96_000, 2_000), _LRA),
    "listops_short": SequenceTask(
        ListOps(min_length=16, max_length=96, max_depth=5, max_args=5), _sizes(20_000, 2_000), f"{_LRA}, made short"
    ),
    "mqar": SequenceTask(MQAR(), _sizes(100_000, 3_000), _ZOOLOGY),
    "mqar_short": SequenceTask(
        MQAR(length=64, pairs=8, vocab_size=128), _sizes(20_000, 1_000), f"{_ZOOLOGY}, made short"
    ),
    "noisy_recall": SequenceTask(NoisyRecall(), _sizes(12_800, 1_280), _MAD),
    "corrupted_recall": SequenceTask(
        NoisyRecall(noise=0.0, corruption=0.3, noise_vocab_size=0),
        _sizes(12_800, 1_280),
        f"{_MAD}, with values that are shown wrongly",
    ),
    "selective_copying": SequenceTask(SelectiveCopying(), _sizes(12_800, 1_280), f"arXiv 2312.00752, sizes of {_MAD}"),
}
"""Name -> task. Tasks with classes are for encoders, those with answers for causal models."""


def generate(
    name: str,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, SequenceSplit]:
    """Make the splits of a task.

    Args:
        name: a key of :data:`SEQUENCE_TASKS`.
        seed: the same seed gives the same bytes.
        sizes: split -> number of sequences, for ``train``, ``validation`` and ``test``; what is not named has the
            task's own size, 0 leaves a split out.
        settings: fields of the task's rules that differ.

    Returns:
        Split -> sequences; no sequence is in two of them, or twice in one.

    Raises:
        UsageError: for an unknown task, split or setting, or values that are out of range.
    """
    task = SEQUENCE_TASKS.get(name)
    if task is None:
        known = ", ".join(SEQUENCE_TASKS)
        raise UsageError(f"task must be one of {known}, got {name!r}{did_you_mean(name, SEQUENCE_TASKS)}")
    return draw_splits(name, with_settings(task.rules, settings or {}), {**task.sizes, **(sizes or {})}, seed)


def with_settings(rules: Rules, settings: Mapping[str, Any]) -> Rules:
    """The same rules with other settings.

    Raises:
        UsageError: for a setting that there is not, or a value of another type or out of range.
    """
    known: dict[str, type] = typing.get_type_hints(type(rules))
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"settings must be among {', '.join(known)}, got {name!r}{did_you_mean(name, known)}")
        kind = known[name]
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise UsageError(f"{name} must be of type {kind.__name__}, got {value!r}")
    changed: Rules = replace(rules, **settings)  # type: ignore[type-var]
    return changed
