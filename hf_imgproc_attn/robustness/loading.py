"""A checkpoint of any kind and the data that it is measured on, loaded for the command ``robustness``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UsageError, broken_files, plain_message
from ..training_support.arguments import (
    DataArguments,
    ImageDataArguments,
    LabelledTextDataArguments,
    TextDataArguments,
)

if TYPE_CHECKING:
    import torch

IMAGES, TEXTS, LABELLED_TEXTS = "image-classification", "causal-lm", "text-classification"
_CLASSES = {IMAGES: ImageDataArguments, TEXTS: TextDataArguments, LABELLED_TEXTS: LabelledTextDataArguments}
_HEADS = {
    IMAGES: ("ForImageClassification",),
    LABELLED_TEXTS: ("ForSequenceClassification",),
    TEXTS: ("ForCausalLM", "LMHeadModel"),
}
"""Task -> what the names of its models hold."""


class Data(NamedTuple):
    """Which rows are used; None: as the checkpoint's run, or detected."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column_name: str | None = None
    text_column_name: str | None = None
    label_column_name: str | None = None
    split: str | None = None
    max_samples: int = 500


class Subject(NamedTuple):
    """A loaded checkpoint with its data.

    Attributes:
        task: :data:`IMAGES`, :data:`TEXTS` or :data:`LABELLED_TEXTS`.
        evaluate: measures it: takes the settings of the task, ``done`` and ``on_result``, as
            :func:`.images.evaluate_robustness` does.
        identity: digest of the weights, and what the data are.
        device: where the model is.
    """

    task: str
    evaluate: Callable[..., dict[str, Any]]
    identity: dict[str, Any]
    device: torch.device


def task_of(checkpoint: str, option: str = "checkpoint") -> str:
    """What a checkpoint is for, by the class that its configuration names.

    Args:
        checkpoint: a folder or a Hub name.
        option: what it was given as, for messages.

    Raises:
        UsageError: if it cannot be loaded, or is neither an image classifier nor a model of texts.
    """
    from transformers import AutoConfig

    import hf_imgproc_attn  # noqa: F401  # registers our model types

    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except broken_files() as error:
        raise UsageError(_not_loaded(checkpoint, option, error)) from error
    names, pairs = list(config.architectures or ()), getattr(config, "classifier_pairs", False)
    for task, heads in _HEADS.items():
        if any(head in name for head in heads for name in names) and not pairs:
            return task
    raise UsageError(
        f"{option} must be an image classifier, a causal language model or a text classifier, got "
        f"{checkpoint!r} with {', '.join(names) or 'no class in its configuration'}{' for pairs of texts' * pairs}"
    )


def _not_loaded(checkpoint: str, option: str, error: BaseException) -> str:
    """The message on a checkpoint that cannot be loaded, by the option that named it."""
    return f"{option} {checkpoint!r} cannot be loaded: {plain_message(error)}"


def load_subject(
    checkpoint: str,
    task: str,
    data: Data,
    device: str | None,
    block_size: int | None = None,
    *,
    option: str = "checkpoint",
) -> Subject:
    """Load a checkpoint and the rows it is measured on.

    Args:
        checkpoint: a folder or a Hub name.
        task: from :func:`task_of`.
        data: which rows.
        device: ``cpu`` or ``cuda``; None: cuda where there is one.
        block_size: tokens that a model of texts reads at once; None: as its run, or the default.
        option: what the checkpoint was given as, for messages.

    Raises:
        UsageError: for a checkpoint or data that cannot be loaded or do not belong together.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    place = _device(device)
    kind = {IMAGES: "ImageClassification", TEXTS: "CausalLM", LABELLED_TEXTS: "SequenceClassification"}[task]
    try:
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(checkpoint).to(place)
        reader = AutoImageProcessor if task == IMAGES else transformers.AutoTokenizer
        processor = reader.from_pretrained(checkpoint)
    except broken_files() as error:
        raise UsageError(_not_loaded(checkpoint, option, error)) from error
    arguments = _data_arguments(checkpoint, task, data)
    if task == IMAGES:
        evaluate, about = _images(arguments, data.split, model, processor)
    else:
        block_size = block_size or getattr(arguments, "block_size", None)
        evaluate, about = _texts(arguments, data.split, model, processor, block_size)
    identity = {"weights_sha256": _digest_of(model), "data": {"dataset_name": arguments.dataset_name, **about}}
    return Subject(task, evaluate, identity, place)


def _data_arguments(checkpoint: str, task: str, data: Data) -> Any:
    """The options of the data: those given, else those of the run that made the checkpoint, else the embedded ones."""
    data_class = _CLASSES[task]
    known = {field.name for field in dataclasses.fields(data_class)}
    given = {name: value for name, value in data._asdict().items() if value is not None}
    given.pop("split", None)
    limit = given.pop("max_samples")
    for name in given:
        if name not in known:
            raise UsageError(f"{name} is not used with a checkpoint for {task}, got {given[name]!r}")
    path = Path(checkpoint) / "run.json"
    options: dict[str, Any] = {}
    if data.dataset_name is None and path.is_file():
        try:
            options = dict(json.loads(path.read_text(encoding="utf-8"))["arguments"]["data"])
            data_class(**options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{str(path)!r} does not name data in a way that can be read ({plain_message(error)}): give "
                "--dataset_name"
            ) from error
    return data_class(**{**options, **given, "max_eval_samples": limit})


def _images(
    arguments: ImageDataArguments, split: str | None, model: Any, processor: Any
) -> tuple[Any, dict[str, Any]]:
    from .images import evaluate_robustness

    images, labels, about = load_images(arguments, split, processor, model.config)
    return partial(evaluate_robustness, model, processor, images, labels), about


def load_images(
    arguments: ImageDataArguments, split: str | None, processor: Any, config: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Images of the size that the model takes, their labels as the model counts them, and what they are.

    Args:
        arguments: the data options.
        split: None: test, where there is one, else validation.
        processor: resizes and crops.
        config: of the model; where it has the data's classes in another order, the labels follow it.

    Raises:
        UsageError: for data that cannot be loaded, or without that split.
    """
    from ..training_support.image_data import load_image_splits
    from ..training_support.image_pixels import load_pixels
    from .classifier import unit_images

    splits = load_image_splits(arguments)
    name = _choose_split(splits.rows, split, arguments)
    only = dataclasses.replace(splits, rows={name: splits.rows[name]}, labels={name: splits.labels[name]})
    dataset = load_pixels(only, processor, arguments, 0)[name]
    images, labels = unit_images(dataset)
    return images, as_the_model_counts(labels, splits.label_names, config), {"split": name, **dataset.fingerprint}


def _texts(
    arguments: Any, split: str | None, model: Any, tokenizer: Any, block_size: int | None
) -> tuple[Any, dict[str, Any]]:
    from ..training_support.labelled_text import load_labelled_texts
    from ..training_support.text_data import load_text_splits
    from .texts import evaluate_text_robustness

    if isinstance(arguments, LabelledTextDataArguments):
        labelled, label_names = load_labelled_texts(arguments)
        name = _choose_split(labelled, split, arguments)
        texts = labelled[name]
        import torch

        labels = as_the_model_counts(torch.from_numpy(texts.labels), label_names, model.config).tolist()
        evaluate = partial(
            evaluate_text_robustness, model, tokenizer, texts.texts, labels=labels, block_size=block_size
        )
        return evaluate, {"split": name, **texts.fingerprint}
    splits = load_text_splits(arguments)
    name = _choose_split(splits, split, arguments)
    lines = splits[name].lines
    evaluate = partial(evaluate_text_robustness, model, tokenizer, lines, block_size=block_size)
    return evaluate, {"split": name, **splits[name].fingerprint}


def _choose_split(splits: dict[str, Any], wanted: str | None, arguments: DataArguments) -> str:
    name = wanted or ("test" if "test" in splits else "validation")
    if name not in splits:
        raise UsageError(
            f"split must be one that the data set {arguments.dataset_name!r} has ({', '.join(splits)}) and that is "
            f"not trained on, got {name!r}"
        )
    return name


def as_the_model_counts(labels: torch.Tensor, label_names: list[str], config: Any) -> torch.Tensor:
    """The labels as the model numbers its classes: by their names where the data's names are among the model's.

    A model may have more classes than the data. Where no name is common to both, classes are taken by their numbers,
    which is said, since nothing can tell whether it is right.

    Raises:
        UsageError: if some names are common and others not, and those that are have other numbers.
    """
    import torch

    own = {str(label): int(index) for index, label in config.id2label.items()}
    if len(own) == config.num_labels and set(label_names) <= set(own):
        return torch.tensor([own[label_names[label]] for label in labels.tolist()])
    if len(own) < config.num_labels:  # some classes have one name, as cranes, birds and machines, in ImageNet
        return labels
    moved = [name for index, name in enumerate(label_names) if own.get(name, index) != index]
    if moved:
        foreign = next(name for name in label_names if name not in own)
        raise UsageError(
            f"classes of the data must be among those of the model, whose class {moved[0]!r} has another number; got "
            f"{foreign!r}, which is none"
        )
    first = next((name for name, index in own.items() if index == 0), "")
    is_named = first != "LABEL_0"  # as a model without names for its classes calls them
    if is_named and not set(label_names) & set(own) and len(label_names) <= len(own):  # more: refused where they occur
        print(
            f"classes are taken by their numbers: {first!r} of the model is {label_names[0]!r} of the data, and so on",
            file=sys.stderr,
        )
    return labels


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device must be cpu or cuda, got {name!r}: {plain_message(error)}") from error
    return device


def _digest_of(model: Any) -> str:
    """SHA-256 over all weights of a model, wherever it came from."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
