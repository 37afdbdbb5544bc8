"""Data options of the scripts that train on long sequences; as in :mod:`.arguments`, nothing slow is imported.

The embedded data are the tasks of :mod:`hf_imgproc_attn.sequences`; a test compares the names.
"""

from dataclasses import dataclass, field

from hf_imgproc_attn.backbones import OF_TASK
from hf_imgproc_attn.errors import UsageError, did_you_mean
from hf_imgproc_attn.training_support.arguments import (
    CLASSIFIER_TRAINER_DEFAULTS,
    EMBEDDED_PAIRS,
    GENERATED_ANSWERS,
    GENERATED_CLASSES,
    DataArguments,
    ImageSourceArguments,
    _check,
    _option,
)

DEFAULT_PAIR_LENGTH = 256
SEQUENCE_TRAINER_DEFAULTS = {**CLASSIFIER_TRAINER_DEFAULTS, "per_device_eval_batch_size": 32}


@dataclass(kw_only=True)
class GeneratedDataArguments(DataArguments):
    """Data that are made from a seed, or stand in for such."""

    sequence_settings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "settings of the generated task as key=value, e.g. length=128 pairs=16; in YAML a mapping. Those "
            "of the command line are added to those of the YAML file and win",
        },
    )
    sequence_seed: int = _option(0, "seed of the generated data; it does not move with the seed of a run")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.sequence_seed >= 0, "sequence_seed", "an integer >= 0", self.sequence_seed)

    @property
    def is_generated(self) -> bool:
        """Whether the data set is one of the generated tasks."""
        return self.dataset_name in (*GENERATED_CLASSES, *GENERATED_ANSWERS)


@dataclass(kw_only=True)
class SequenceDataArguments(GeneratedDataArguments, ImageSourceArguments):
    """Data of ``train_sequence_classification.py``."""

    model_type = OF_TASK["sequence-classification"].model_type

    dataset_name: str = _option(
        "listops_short",
        f"data set: {', '.join(GENERATED_CLASSES)}, or images whose grey pixels become the tokens: a Hub name, a "
        f"local path or digits (scikit-learn, 8 x 8); or pairs of texts: {EMBEDDED_PAIRS} (paragraphs of Python's own "
        "manual), or any with text_pair_columns",
    )
    text_pair_columns: str | None = _option(
        None,
        "the two columns with the texts of a pair, as text1,text2: bytes are the tokens, and pairs are classified. A "
        "folder of the Long Range Arena's *.train.tsv, *.eval.tsv and *.test.tsv has text1,text2",
    )
    max_length: int | None = _option(
        None, f"tokens of each text of a pair that are read, the rest is cut. Default: {DEFAULT_PAIR_LENGTH}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name in GENERATED_ANSWERS:
            raise UsageError(
                f"dataset_name must be data with a class for each sequence, got {self.dataset_name!r}, whose answers "
                "are tokens: train_recall.py trains on it"
            )
        if self.is_pairs:
            _check(not self.sequence_settings, "sequence_settings", "empty for pairs", self.sequence_settings)
            _check(self.image_column_name is None, "image_column_name", "none for pairs", self.image_column_name)
            _check(not self.is_generated, "text_pair_columns", "none for sequences", self.text_pair_columns)
            length, names = self.max_length, self.pair_columns
            # The first and the last token of a text are special ones.
            _check(length is None or length >= 3, "max_length", "an integer >= 3", length)
            _check(len(names) == 2 and all(names), "text_pair_columns", "two names, as a,b", self.text_pair_columns)
            return
        _check(self.max_length is None, "max_length", "none but for pairs of texts", self.max_length)
        if not self.is_generated:
            _check(not self.sequence_settings, "sequence_settings", "empty for images", self.sequence_settings)

    @property
    def is_pairs(self) -> bool:
        """Whether the rows are pairs of texts."""
        return self.dataset_name == EMBEDDED_PAIRS or self.text_pair_columns is not None

    @property
    def pair_columns(self) -> tuple[str, ...]:
        """The columns with the texts of a pair, where they are named."""
        return tuple(name.strip() for name in (self.text_pair_columns or "text1,text2").split(","))


@dataclass(kw_only=True)
class RecallDataArguments(GeneratedDataArguments):
    """Data of ``train_recall.py``."""

    model_type = OF_TASK["recall"].model_type

    dataset_name: str = _option("mqar_short", f"task: {', '.join(GENERATED_ANSWERS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name in GENERATED_CLASSES:
            raise UsageError(
                f"dataset_name must be a task whose answers are tokens, got {self.dataset_name!r}, which has a class "
                "for each sequence: train_sequence_classification.py trains on it"
            )
        if self.dataset_name not in GENERATED_ANSWERS:
            hint = did_you_mean(self.dataset_name, GENERATED_ANSWERS)
            raise UsageError(
                f"dataset_name must be one of {', '.join(GENERATED_ANSWERS)}, got {self.dataset_name!r}{hint}"
            )
