"""How a model of long sequences answers: as it was trained, and where the noise is stronger than in training."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_imgproc_attn.sequences import SEQUENCE_TASKS, SequenceSplit
from hf_imgproc_attn.sequences.recall import NoisyRecall
from hf_imgproc_attn.training_support.sequence_arguments import GeneratedDataArguments
from hf_imgproc_attn.training_support.sequence_data import (
    TokenSequences,
    classified_rows,
    load_sequences,
    parse_settings,
)
from hf_imgproc_attn.training_support.text_data import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RATES = (0.2, 0.4, 0.6, 0.8)
"""Of the noise in MAD's harder settings of noisy recall; the first is that of training."""
DEFINITIONS = {
    "noise tokens": "test sequences made anew, in which pairs are replaced by tokens that only disturb",
    "false values": "test sequences made anew, in which values are shown as other ones",
    "rate": "probability of that for a pair",
}


@torch.no_grad()
def sequence_accuracy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", split: SequenceSplit, batch_size: int = 32
) -> dict[str, Any]:
    """Part of the answers that are right, in [0, 1]; of classes one a sequence, of tokens all that are asked.

    Args:
        model: a classifier, or a causal language model.
        tokenizer: its tokenizer.
        split: the sequences.
        batch_size: sequences at once.

    Returns:
        ``metric``, ``value``, ``samples`` and ``unit``.
    """
    has_classes = split.labels.ndim == 1
    rows, collate = (
        classified_rows(split, tokenizer) if has_classes else (TokenSequences(split, tokenizer), default_data_collator)
    )
    model.eval()
    right = asked = 0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collate):
        labels = batch.pop("labels")
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
        found = logits.argmax(-1).cpu()
        if not has_classes:
            found, labels = found[:, :-1], labels[:, 1:]
        scored = labels != IGNORED_LABEL
        right += int((found[scored] == labels[scored]).sum())
        asked += int(scored.sum())
    unit = "sequences" if has_classes else "answers"
    return {"metric": "accuracy", "value": right / asked, "samples": asked, "unit": unit}


def stronger_noise(args: GeneratedDataArguments, rates: Sequence[float] | None) -> list[tuple[str, str, float]]:
    """What of a task's noise can be changed, and to which rates.

    Args:
        args: the data options of the run.
        rates: those that were asked for; None: :data:`RATES`, but for the task's own.

    Returns:
        Name of the disturbance, setting, rate; empty for a task without noise.
    """
    task = SEQUENCE_TASKS.get(args.dataset_name)
    if task is None or not isinstance(task.rules, NoisyRecall):
        return []
    own = {**dataclasses.asdict(task.rules), **parse_settings(args.sequence_settings)}
    setting = "corruption" if own["corruption"] > 0 else "noise"
    name = {"corruption": "false values", "noise": "noise tokens"}[setting]
    chosen = [rate for rate in RATES if rate != own[setting]] if rates is None else rates
    return [(name, setting, rate) for rate in chosen]


def sequence_robustness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    split: SequenceSplit,
    name: str,
    args: GeneratedDataArguments,
    rates: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """Accuracy on a split, and on sequences of the same task with other rates of noise, where it has any.

    Args:
        model: as for :func:`sequence_accuracy`.
        tokenizer: its tokenizer.
        split: as the run had it.
        name: of the split.
        args: the data options of the run.
        rates: of the noise; None: the usual ones.

    Returns:
        Results, accuracies in [0, 1].
    """
    clean: dict[str, Any] = {"family": "clean", "disturbance": "clean", "parameters": {}, "seed": None}
    results = [{**clean, **sequence_accuracy(model, tokenizer, split)}]
    for disturbance, setting, rate in stronger_noise(args, rates):
        words = [*args.sequence_settings, f"{setting}={rate}"]
        others = dataclasses.replace(args, sequence_settings=words, max_train_samples=1, max_eval_samples=len(split))
        noise = {"family": "noise", "disturbance": disturbance, "parameters": {"rate": rate}}
        made = load_sequences(others).splits[name]
        results.append({**noise, "seed": args.sequence_seed, **sequence_accuracy(model, tokenizer, made)})
    return results
