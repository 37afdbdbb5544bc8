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
LORA_RANK = 8
EMBEDDED_IMAGES = "digits"
EMBEDDED_MASKS = "composed_digits"
EMBEDDED_TEXT = "pydoc_topics"
EMBEDDED_PAIRS = "topic_pairs"
GENERATED_CLASSES = ("listops", "listops_short")
"""The tasks of :mod:`hf_imgproc_attn.sequences` that have a class for each sequence."""
GENERATED_ANSWERS = ("mqar", "mqar_short", "noisy_recall", "corrupted_recall", "selective_copying")
"""Those whose answers are tokens."""
BUILT_IN_DATA = (
    EMBEDDED_IMAGES, EMBEDDED_MASKS, EMBEDDED_TEXT, EMBEDDED_PAIRS, *GENERATED_CLASSES, *GENERATED_ANSWERS,
)  # fmt: skip
"""Names of data sets that are neither local paths nor Hub names."""
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
        "attention variant. Default: softmax for a new model or a stock checkpoint of the usual type, the "
        "checkpoint's own otherwise",
        choices=tuple(PRESETS),
    )
    model_name_or_path: str | None = _option(
        None,
        "checkpoint to start from: one of ours is loaded, a stock one is converted to the preset on the way, and a "
        "model of any other type gets the preset's filter into its layers. Default: a new, small model",
    )
    boosted_layers: str | None = _option(
        None,
        "layers that are boosted, counted from either end, as -2,-1; of a model of another type: that are filtered. "
        "Default: all",
    )
    filter_stacks: str | None = _option(
        None,
        "of a model of another type with several stacks of layers: those that are filtered, as model.decoder.layers. "
        "Default: all",
    )
    peft: str | None = _option(
        None,
        "train adapters instead of the weights, by the library PEFT: lora. Default: the weights",
        choices=("lora",),
    )
    peft_rank: int | None = _option(None, f"rank of the adapters. Default: {LORA_RANK}")
    peft_alpha: float | None = _option(None, "alpha of the adapters, which act times alpha / rank. Default: 2 x rank")
    peft_dropout: float | None = _option(None, "dropout before the adapters. Default: 0")
    peft_targets: str | None = _option(
        None, "modules that get adapters, as q_proj,v_proj, or all-linear. Default: what PEFT knows for the model"
    )
    peft_filter: bool | None = _option(
        None, "train the filter's own numbers (gains, bandwidths) beside the adapters. Default: true where it has any"
    )
    peft_merge: bool | None = _option(
        None,
        "save the model with its adapters merged into the weights. Default: the adapters, and the model below them",
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

    def __post_init__(self) -> None:
        self.layers()  # refuses what is no list of layers
        for name in ("peft_rank", "peft_alpha", "peft_dropout", "peft_targets", "peft_filter", "peft_merge"):
            _check(self.peft is not None or getattr(self, name) is None, name, "given with peft", getattr(self, name))
        _check(self.peft_rank is None or self.peft_rank >= 1, "peft_rank", "an integer >= 1", self.peft_rank)
        _check(self.peft_alpha is None or self.peft_alpha > 0, "peft_alpha", "a number > 0", self.peft_alpha)
        _check(
            self.peft_dropout is None or 0 <= self.peft_dropout < 1,
            "peft_dropout",
            "at least 0 and below 1",
            self.peft_dropout,
        )

    def layers(self) -> list[int] | None:
        """``boosted_layers`` as integers.

        Raises:
            UsageError: for what is none.
        """
        if self.boosted_layers is None:
            return None
        try:
            return [int(word) for word in self.boosted_layers.strip("[]").split(",")]
        except ValueError:
            rule = "boosted_layers must be integers with commas between them, as -2,-1"
            raise UsageError(f"{rule}, got {self.boosted_layers!r}") from None


@dataclass(kw_only=True)
class DataArguments:
    """Which data are used; shared by images and text.

    Attributes:
        model_type: the type of the models that are trained on them.
    """

    model_type: ClassVar[str]

    dataset_name: str = _option("", "data set: a Hub name, a local path, or the embedded one")
    dataset_config_name: str | None = _option(None, "configuration of a Hub data set")
    dataset_revision: str | None = _option(
        None,
        "branch, tag or commit of a Hub data set. refs/convert/parquet is the Hub's own form of data that come as a "
        "script, which is not run; dataset_config_name is a folder there",
    )
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
class StreamedDataArguments(DataArguments):
    """Data whose training split may be read as it is needed."""

    streaming: bool = _option(
        False,
        "read the training split as it is needed, a part of its rows in each process, instead of all of it first; "
        "needs max_steps",
    )
    shuffle_buffer: int = _option(
        0, "with streaming: draw the next row from a buffer of so many; 0: in the order of the data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.shuffle_buffer >= 0, "shuffle_buffer", "an integer >= 0", self.shuffle_buffer)
        _check(self.streaming or not self.shuffle_buffer, "shuffle_buffer", "0 without streaming", self.shuffle_buffer)
        held_out = DataArguments.validation_fraction
        _check(
            not self.streaming or self.validation_fraction in (0.0, held_out),
            "validation_fraction",
            "0 with streaming, since a stream has no end to be held out",
            self.validation_fraction,
        )


@dataclass(kw_only=True)
class LabelledDataArguments(DataArguments):
    """Data with a class for each row."""

    label_column_name: str | None = _option(None, "column with the labels. Default: detected")


@dataclass(kw_only=True)
class ImageSourceArguments(LabelledDataArguments):
    """Images with a class each."""

    dataset_name: str = _option(
        EMBEDDED_IMAGES,
        "data set: a Hub name, a local path (parquet, image folder, saved data set) or digits (scikit-learn, 8 x 8)",
    )
    image_column_name: str | None = _option(None, "column with the images. Default: detected")


@dataclass(kw_only=True)
class ImageDataArguments(ImageSourceArguments, StreamedDataArguments):
    """Data of ``train_image_classification.py``."""

    model_type = OF_TASK["image-classification"].model_type

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
class TextDataArguments(TokenizedDataArguments, StreamedDataArguments):
    """Data of ``train_causal_lm.py``."""

    model_type = OF_TASK["causal-lm"].model_type
    special_tokens = 2

    block_size: int | None = _option(
        None, "tokens in one training sample. Default: 256, or the model's positions if these are fewer"
    )
    max_train_tokens: int | None = _option(None, "use at most so many tokens of the training text")
    context_parallel: int = _option(
        1, "so many processes share the tokens of each training sample, for texts that are too long for one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.max_train_tokens
        _check(self.context_parallel >= 1, "context_parallel", "an integer >= 1", self.context_parallel)
        _check(tokens is None or tokens >= 2, "max_train_tokens", "an integer >= 2", tokens)
        _check(tokens is None or not self.streaming, "max_train_tokens", "none with streaming", tokens)
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
    on_nan_loss: str = _option(
        "stop",
        "a step whose loss or gradient is infinite or no number: stop, before it changes the weights, with the last "
        "checkpoint as it is; or skip, which leaves the step out and counts it",
        choices=("stop", "skip"),
    )
    data_timeout: int = _option(
        600, "seconds for which data workers (dataloader_num_workers) may be silent before the run ends; 0: for ever"
    )
    lens_every: int | None = _option(
        None,
        "every so many steps, write into the log what each layer's attention filters: entropy, bandwidths, weight on "
        "sinks, likeness of tokens. Default: never",
    )
    prepare_only: bool = _option(False, "load the data, build the model and its Trainer, and stop")

    def __post_init__(self) -> None:
        _check(self.on_nan_loss == "stop" or not self.stop_diverged, "on_nan_loss", "stop with stop_diverged", "skip")
        _check(self.data_timeout >= 0, "data_timeout", "an integer >= 0", self.data_timeout)
        _check(self.lens_every is None or self.lens_every >= 1, "lens_every", "an integer >= 1", self.lens_every)


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
