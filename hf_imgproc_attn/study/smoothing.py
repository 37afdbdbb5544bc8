"""How alike the tokens of a finished run become with depth: over-smoothing, by the measure of the lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backbones import TASKS
from ..cards.rendering import load_record
from ..lens.observation import block_name, first_tensor
from ..lens.tokens import measure_tokens
from ..models.any_layers import attention_layers
from .measurements import SIMILARITY, images_of

FAMILY = "over-smoothing"
BATCH_SIZE = 64


class _Batch(NamedTuple):
    """What runs the model once, on how many samples, and which of their tokens are no padding (None: all)."""

    run: Callable[[], Any]
    samples: int
    real: torch.Tensor | None


@torch.no_grad()
def token_similarity(folder: Path, split: str, samples: int) -> list[dict[str, Any]]:
    """The mean cosine similarity of two different tokens that leave each block, a result a layer.

    Args:
        folder: of a finished run that classifies images or sequences.
        split: ``test`` or ``validation``.
        samples: the first so many of the split, or all that there are.

    Returns:
        Results as :mod:`.measurements` has them; ``layer`` is 1, 2 and so on, and ``last``, so that models of
        different depth can be compared. Special tokens, as that of the class, are among the tokens.

    Raises:
        UsageError: for data that are not there.
    """
    record = load_record(folder)
    is_image = TASKS[record["task"]].auto_class == "AutoModelForImageClassification"
    model, batches = (_images if is_image else _sequences)(folder, record, split, samples)
    layers, modules = attention_layers(model), dict(model.named_modules())
    sums, counted = [0.0] * len(layers), 0
    with ExitStack() as stack:
        found: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            block = modules[block_name(layer, modules)]
            stack.callback(block.register_forward_hook(partial(_keep, found, index)).remove)
        for batch in batches:
            batch.run()
            for index in range(len(layers)):
                sums[index] += batch.samples * measure_tokens(found.pop(index), batch.real).similarity
            counted += batch.samples
    about = {"family": FAMILY, "disturbance": "token similarity", "seed": None, "metric": SIMILARITY, "split": split}
    places = [*range(1, len(layers)), "last"]
    unit = TASKS[record["task"]].rows
    return [
        {**about, "parameters": {"layer": place}, "value": total / counted, "samples": counted, "unit": unit}
        for place, total in zip(places, sums, strict=True)
    ]


def _keep(found: dict[int, torch.Tensor], index: int, block: Any, args: Any, output: Any) -> None:
    leaving = first_tensor(output)
    if leaving is not None:
        found[index] = leaving


def _images(folder: Path, record: dict[str, Any], split: str, samples: int) -> tuple[Any, Iterator[_Batch]]:
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..robustness.classifier import PixelClassifier, unit_images

    processor = AutoImageProcessor.from_pretrained(folder)
    classifier = PixelClassifier(AutoModelForImageClassification.from_pretrained(folder), processor)
    images, _ = unit_images(images_of(record, processor, split))
    parts = images[:samples].split(BATCH_SIZE)
    return classifier.model, (_Batch(lambda part=part: classifier(part), len(part), None) for part in parts)  # type: ignore[misc]


def _sequences(folder: Path, record: dict[str, Any], split: str, samples: int) -> tuple[Any, Iterator[_Batch]]:
    from torch.utils.data import DataLoader, Subset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ..training_support.sequence_arguments import SequenceDataArguments
    from ..training_support.sequence_data import classified_rows, load_sequences

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, collate = classified_rows(
        load_sequences(SequenceDataArguments(**record["arguments"]["data"])).splits[split], tokenizer
    )
    few = Subset(rows, range(min(samples, len(rows))))

    def batches() -> Iterator[_Batch]:
        for batch in DataLoader(few, batch_size=BATCH_SIZE, collate_fn=collate):
            mask = batch["attention_mask"].flatten(0, -2)  # of pairs each text
            yield _Batch(lambda batch=batch: model(**batch), len(mask), mask.bool())  # type: ignore[misc]

    return model, batches()
