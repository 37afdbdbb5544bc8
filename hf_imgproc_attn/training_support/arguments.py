"""The training scripts' own arguments, as plain dataclasses (no torch, no transformers: ``--help`` is instant).

Every other option of the scripts is a field of ``transformers.TrainingArguments``; where the scripts' default differs
from the library's it stands in :data:`IMAGE_TRAINER_DEFAULTS` and :data:`TEXT_TRAINER_DEFAULTS`.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from hf_imgproc_attn.backbones import OF_TASK
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import PRESETS

INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"
"""What a training script says after Ctrl-C."""
EMBEDDED_IMAGES = "digits"
EMBEDDED_TEXT = "pydoc_topics"
LOCAL_OR_HUB = ("model_name_or_path", "dataset_name", "tokenizer_name")
"""Options that take a local path or a Hub name."""


def _option(default: Any, description: str, **metadata: Any) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": description, **metadata})


def _check(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise UsageError(f"{name} must be {rule}, got {value!r}")


@dataclass(kw_only=True)
class ModelArguments:
    """Which model is trained, and from where it starts."""

    preset: str | None = _option(
        None,
        "attention variant. Default: softmax for a new model or a stock checkpoint, the checkpoint's own otherwise",
        choices=tuple(PRESETS),
    )
    model_name_or_path: str | None = _option(
        None,
        "checkpoint to start from: one of ours is loaded, a stock one is converted to the preset on the way. "
        "Default: a new, small model",
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={
            "help": "fields of the model configuration as key=value, e.g. hidden_size=192 num_hidden_layers=8 "
            "boosted_layers=[-2,-1]; in YAML a mapping. Those of the command line are added to those of the YAML file "
            "and win",
        },
    )
    paired_start: bool = _option(
        False,
        "a new model starts from the values of a new softmax model of its sizes and seed in every parameter that both "
        "have, so that variants are compared from one start",
    )


@dataclass(kw_only=True)
class DataArguments:
    """Which data are used; shared by images and text.

    Attributes:
        model_type: the type of the models that are trained on them.
    """

    model_type: ClassVar[str]

    dataset_name: str = _option("", "data set: a Hub name, a local path, or the embedded one")
    dataset_config_name: str | None = _option(None, "configuration of a Hub data set")
    validation_fraction: float = _option(
        0.1,
        "part of the training split held out for validation when the data set has no validation split (its test split "
        "is never used for that); 0: no validation",
    )
    max_train_samples: int | None = _option(None, "use at most so many training samples (text: lines)")
    max_eval_samples: int | None = _option(None, "use at most so many validation and test samples (text: lines)")

    def __post_init__(self) -> None:
        _check(0.0 <= self.validation_fraction < 1.0, "validation_fraction", "in [0, 1)", self.validation_fraction)
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "an integer >= 1", value)


@dataclass(kw_only=True)
class LabelledDataArguments(DataArguments):
    """Data with a class for each row."""

    label_column_name: str | None = _option(None, "column with the labels. Default: detected")


@dataclass(kw_only=True)
class ImageDataArguments(LabelledDataArguments):
    """Data of ``train_image_classification.py``."""

    model_type = OF_TASK["image-classification"].model_type

    dataset_name: str = _option(
        EMBEDDED_IMAGES,
        "data set: a Hub name, a local path (parquet, image folder, saved data set) or digits (scikit-learn, 8 x 8)",
    )
    image_column_name: str | None = _option(None, "column with the images. Default: detected")
    random_crop_padding: int = _option(0, "augmentation: pad by so many pixels, crop back at a random place; 0: off")
    horizontal_flip: bool = _option(False, "augmentation: mirror half of the images")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.random_crop_padding >= 0, "random_crop_padding", "an integer >= 0", self.random_crop_padding)


@dataclass(kw_only=True)
class TokenizedDataArguments(DataArguments):
    """Texts and what cuts them into tokens.

    Attributes:
        special_tokens: entries of a vocabulary beside the 256 bytes.
    """

    special_tokens: ClassVar[int]

    dataset_name: str = _option(
        EMBEDDED_TEXT,
        "data set: a Hub name, a local path (parquet, csv, json or text files) or pydoc_topics (Python's own manual)",
    )
    text_column_name: str | None = _option(None, "column with the text. Default: detected")
    tokenizer_name: str | None = _option(
        None,
        "tokenizer, a path or Hub name. Default: that of model_name_or_path, else a byte-level BPE trained on the "
        "training split",
    )
    tokenizer_vocab_size: int = _option(2048, "size of the vocabulary of a tokenizer that is trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        # 256 bytes and some special tokens are always there.
        least = 256 + self.special_tokens
        _check(
            self.tokenizer_vocab_size >= least,
            "tokenizer_vocab_size",
            f"an integer >= {least}",
            self.tokenizer_vocab_size,
        )


@dataclass(kw_only=True)
class TextDataArguments(TokenizedDataArguments):
    """Data of ``train_causal_lm.py``."""

    model_type = OF_TASK["causal-lm"].model_type
    special_tokens = 2

    block_size: int | None = _option(
        None, "tokens in one training sample. Default: 256, or the model's positions if these are fewer"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.block_size is None or self.block_size >= 2, "block_size", "an integer >= 2", self.block_size)


@dataclass(kw_only=True)
class LabelledTextDataArguments(TokenizedDataArguments, LabelledDataArguments):
    """Data of ``train_text_classification.py``."""

    model_type = OF_TASK["text-classification"].model_type
    special_tokens = 4

    max_length: int | None = _option(
        None,
        "tokens of a text that are read, the rest is cut. Default: 128, or the model's positions if these are fewer",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The first and the last token of a text are special ones.
        _check(self.max_length is None or self.max_length >= 3, "max_length", "an integer >= 3", self.max_length)


@dataclass(kw_only=True)
class RunArguments:
    """Where the run is kept."""

    config: str | None = _option(None, "YAML file with options as on the command line, which overrides it")
    output_dir: str | None = _option(
        None, "folder of checkpoint and run.json. Default: outputs/<data set>-<preset or start model>"
    )
    resume: bool = _option(False, "go on from the newest complete checkpoint in output_dir")
    license: str | None = _option(
        None,
        "licence of the checkpoint when it is published, as the Hub names it, e.g. apache-2.0. Default: that of the "
        "checkpoint or the data that it was made of, else none",
    )
    evaluate_test: bool = _option(
        True, "measure the test split at the end; false while anything is still to be chosen by the validation split"
    )
    stop_diverged: bool = _option(False, "end training, with status diverged, as soon as the loss is no finite number")
    prepare_only: bool = _option(False, "load the data, build the model and its Trainer, and stop")


DataT = TypeVar("DataT", bound=DataArguments)


@dataclass(kw_only=True)
class Arguments(Generic[DataT]):
    """All arguments of one run.

    Attributes:
        trainer: options that are not the scripts' own, name -> words as on a command line, or None for a YAML null;
            their names are checked against ``transformers.TrainingArguments`` when that is built.
        argv: the command line as it was given.
    """

    model: ModelArguments
    data: DataT
    run: RunArguments
    trainer: dict[str, list[str] | None]
    argv: list[str]


_TRAINER_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a part of all steps
    "weight_decay": 0.05,
    "logging_steps": 0.02,
    "logging_first_step": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "hub_strategy": "end",
    "ddp_find_unused_parameters": False,
}
IMAGE_TRAINER_DEFAULTS: dict[str, Any] = {
    **_TRAINER_DEFAULTS,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "remove_unused_columns": False,  # the pixels are chosen and augmented by our own data set
}
TEXT_TRAINER_DEFAULTS: dict[str, Any] = {
    **_TRAINER_DEFAULTS,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
}
CLASSIFIER_TRAINER_DEFAULTS: dict[str, Any] = {
    **_TRAINER_DEFAULTS,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}
EXPLAINED_TRAINER_DEFAULTS = (
    "learning_rate 1e-3 for a new model and 5e-5 for model_name_or_path, num_train_epochs 1 (10 for the embedded "
    "data), eval_strategy no without a validation split, dataloader_drop_last true (training only) unless there are "
    "fewer samples than a batch holds"
)
