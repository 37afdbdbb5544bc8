"""Evaluate the checkpoint of a finished run on clean and on disturbed data, and write robustness.json beside it.

    python training/evaluate_checkpoint.py outputs/digits
    python training/evaluate_checkpoint.py outputs/digits --sigmas 0.1 0.2 --epsilons 4/255 8/255

Images: Gaussian noise and FGSM; text: word swap; recall: other rates of noise. The data are those that run.json names,
checked by their fingerprint; the training split is never evaluated. More disturbances, for any checkpoint:
imgproc-attn robustness.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_imgproc_attn.backbones import TASKS
from hf_imgproc_attn.errors import (
    OneLineParser,
    UsageError,
    exit_code,
    require_extras,
)
from hf_imgproc_attn.output_paths import check_new_files, write_or_keep
from hf_imgproc_attn.robustness.command import number
from hf_imgproc_attn.robustness.settings import ImageSettings, TextSettings, check_fractions, check_integer
from hf_imgproc_attn.training_support.arguments import (
    EMBEDDED_TEXT,
    GENERATED_ANSWERS,
    GENERATED_CLASSES,
    ImageDataArguments,
    LabelledTextDataArguments,
    TextDataArguments,
)
from hf_imgproc_attn.training_support.mask_arguments import MaskDataArguments
from hf_imgproc_attn.training_support.sequence_arguments import (
    GeneratedDataArguments,
    RecallDataArguments,
    SequenceDataArguments,
)

if TYPE_CHECKING:
    from hf_imgproc_attn.sequences import SequenceSplit
    from hf_imgproc_attn.training_support.image_pixels import PixelDataset
    from hf_imgproc_attn.training_support.labelled_text import LabelledTexts
    from hf_imgproc_attn.training_support.mask_pixels import MaskedPixels
    from hf_imgproc_attn.training_support.text_data import TextSplit

FORMAT = 1
SIGMAS = (0.1, 0.2, 0.3)
EPSILONS = (8 / 255, 16 / 255)
FRACTION = 0.015
SPLITS = ("test", "validation")

DataT = TypeVar("DataT", "PixelDataset", "MaskedPixels", "TextSplit", "LabelledTexts", "SequenceSplit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; None: the default of the run's task.

    Attributes:
        sigmas: standard deviations of the Gaussian noise, pixels in [0, 1].
        epsilons: largest changes of a pixel in [0, 1] by FGSM.
        fraction: part of the words that word swap replaces; of recall the rate of the noise.
        seed: of the noise or the choice of words.
        max_samples: use at most so many images or lines.
        split: ``test`` or ``validation``.

    Raises:
        UsageError: for a value outside its range.
    """

    sigmas: Sequence[float] | None = None
    epsilons: Sequence[float] | None = None
    fraction: float | None = None
    seed: int = 0
    max_samples: int | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        for name, values in (("sigmas", self.sigmas), ("epsilons", self.epsilons), ("fraction", (self.fraction,))):
            check_fractions(name, [value for value in values or () if value is not None])
        for name, least in (("seed", 0), ("max_samples", 1)):
            check_integer(name, getattr(self, name), least)
        if self.split not in SPLITS:
            raise UsageError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")


def evaluate(run: str | Path, settings: Settings | None = None, *, force: bool = False) -> dict[str, Any]:
    """Evaluate a run and write its ``robustness.json``.

    Args:
        run: the folder of a finished run.
        settings: what is measured.
        force: replace a ``robustness.json`` that is there already.

    Returns:
        The content of ``robustness.json``.

    Raises:
        UsageError: if the folder holds no finished run or other weights than it made, the data are not the run's or
            have no such split, or a setting does not belong to the run's task; without ``force`` if it was evaluated.
    """
    require_extras("train")
    import torch

    from hf_imgproc_attn import records
    from hf_imgproc_attn.cards.rendering import ROBUSTNESS_FILE, load_record
    from hf_imgproc_attn.robustness.images import DEFINITIONS as IMAGE_DEFINITIONS
    from hf_imgproc_attn.robustness.texts import DEFINITIONS as TEXT_DEFINITIONS
    from hf_imgproc_attn.training_support.sequence_evaluation import DEFINITIONS as SEQUENCE_DEFINITIONS

    folder, settings = Path(run), settings or Settings()
    record = load_record(folder)
    check_new_files([folder / ROBUSTNESS_FILE], force, "the run's robustness.json")
    weights = records.weights_sha256(str(folder))
    if not weights or weights != record.get("weights_sha256"):
        raise UsageError(f"{folder} must hold the weights that its run.json names (weights_sha256), got {weights}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    task = record["task"]
    measure = _measure_sequences if task in _SEQUENCE_TASKS else _MEASURES[TASKS[task].auto_class]
    results = measure(folder, record, settings, device)
    used = {name for result in results for name in (result["disturbance"], *result["parameters"])}
    known = {**IMAGE_DEFINITIONS, **TEXT_DEFINITIONS, **SEQUENCE_DEFINITIONS}
    robustness = {
        "format": FORMAT,
        "weights_sha256": weights,
        "split": settings.split,
        "results": [_for_card(result, settings.split) for result in results],
        "definitions": {name: text for name, text in known.items() if name in used},
        "versions": records.package_versions(),
        "git": records.git_state(),
        "device": records.device_description(device, processes=1),
        "seconds": time.perf_counter() - started,
    }
    write_or_keep(
        folder / ROBUSTNESS_FILE, lambda file: records.write_json(file, robustness), "the run's robustness.json"
    )
    return robustness


def _for_card(result: dict[str, Any], split: str) -> dict[str, Any]:
    """A result without what a card has no room for: which of the samples were right."""
    return {**{name: value for name, value in result.items() if name != "correct"}, "split": split}


def _measure_images(folder: Path, record: dict[str, Any], settings: Settings, device: Any) -> list[dict[str, Any]]:
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_imgproc_attn.robustness.classifier import unit_images
    from hf_imgproc_attn.robustness.images import evaluate_robustness
    from hf_imgproc_attn.training_support.image_data import load_image_splits
    from hf_imgproc_attn.training_support.image_pixels import load_pixels

    _refuse("fraction", settings, record)
    sigmas, epsilons = (
        default if given is None else given
        for given, default in ((settings.sigmas, SIGMAS), (settings.epsilons, EPSILONS))
    )
    processor = AutoImageProcessor.from_pretrained(folder)

    def load(args: ImageDataArguments) -> "PixelDataset":
        splits, name = load_image_splits(args), settings.split
        _check_split(splits.rows, settings, args.dataset_name)
        only = dataclasses.replace(splits, rows={name: splits.rows[name]}, labels={name: splits.labels[name]})
        return load_pixels(only, processor, args, settings.seed)[name]

    dataset = _same_data(load, ImageDataArguments, record, settings)
    model = AutoModelForImageClassification.from_pretrained(folder).to(device)
    chosen = ImageSettings(
        sigmas=sigmas,
        attacks=("fgsm",) if epsilons else (),
        epsilons=epsilons,
        seed=settings.seed,
        batch_size=256,
    )
    return list(evaluate_robustness(model, processor, *unit_images(dataset), chosen)["results"])


def _measure_masks(folder: Path, record: dict[str, Any], settings: Settings, device: Any) -> list[dict[str, Any]]:
    from transformers import AutoModelForSemanticSegmentation
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_imgproc_attn.training_support.mask_data import load_mask_splits
    from hf_imgproc_attn.training_support.mask_evaluation import mask_robustness
    from hf_imgproc_attn.training_support.mask_pixels import load_masked_pixels

    _refuse("fraction", settings, record)
    processor = AutoImageProcessor.from_pretrained(folder)

    def load(args: MaskDataArguments) -> "MaskedPixels":
        splits, name = load_mask_splits(args), settings.split
        _check_split(splits.rows, settings, args.dataset_name)
        only = dataclasses.replace(splits, rows={name: splits.rows[name]})
        return load_masked_pixels(only, processor, args, settings.seed)[name]

    dataset = _same_data(load, MaskDataArguments, record, settings)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).to(device)
    sigmas = SIGMAS if settings.sigmas is None else settings.sigmas
    epsilons = EPSILONS if settings.epsilons is None else settings.epsilons
    return mask_robustness(model, processor, dataset, sigmas=sigmas, epsilons=epsilons, seed=settings.seed)


def _measure_text(folder: Path, record: dict[str, Any], settings: Settings, device: Any) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_imgproc_attn.conversion_probe import longest_text
    from hf_imgproc_attn.robustness.texts import evaluate_text_robustness
    from hf_imgproc_attn.training_support.block_size import DEFAULT_BLOCK_SIZE
    from hf_imgproc_attn.training_support.text_data import load_text_splits

    for name in ("sigmas", "epsilons"):
        _refuse(name, settings, record)

    def load(args: TextDataArguments) -> "TextSplit":
        splits = load_text_splits(args)
        _check_split(splits, settings, args.dataset_name)
        return splits[settings.split]

    text = _same_data(load, TextDataArguments, record, settings)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    positions = longest_text(model.config.get_text_config())
    block_size = record["arguments"]["data"].get("block_size") or min(positions, DEFAULT_BLOCK_SIZE)
    # Behind the token that the training put before its texts.
    first, swap = tokenizer.eos_token_id, _word_swap(settings)
    report = evaluate_text_robustness(model, tokenizer, text.lines, swap, block_size=block_size, first_token=first)
    return list(report["results"])


def _word_swap(settings: Settings) -> TextSettings:
    fraction = FRACTION if settings.fraction is None else settings.fraction
    return TextSettings(changes=("word_swap",), fractions=(fraction,), seed=settings.seed)


def _measure_labelled_texts(
    folder: Path, record: dict[str, Any], settings: Settings, device: Any
) -> list[dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hf_imgproc_attn.robustness.texts import evaluate_text_robustness
    from hf_imgproc_attn.training_support.labelled_text import load_labelled_texts

    for name in ("sigmas", "epsilons"):
        _refuse(name, settings, record)

    def load(args: LabelledTextDataArguments) -> "LabelledTexts":
        splits, _ = load_labelled_texts(args)
        _check_split(splits, settings, args.dataset_name)
        return splits[settings.split]

    texts = _same_data(load, LabelledTextDataArguments, record, settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    swap, labels = _word_swap(settings), texts.labels.tolist()
    return list(evaluate_text_robustness(model, tokenizer, texts.texts, swap, labels=labels)["results"])


def _measure_sequences(folder: Path, record: dict[str, Any], settings: Settings, device: Any) -> list[dict[str, Any]]:
    import transformers

    from hf_imgproc_attn.training_support.sequence_data import load_sequences
    from hf_imgproc_attn.training_support.sequence_evaluation import sequence_robustness, stronger_noise

    for name in ("sigmas", "epsilons"):
        _refuse(name, settings, record)
    data_class = _SEQUENCE_TASKS[record["task"]]

    def load(args: Any) -> "SequenceSplit":
        splits = load_sequences(args).splits
        _check_split(splits, settings, args.dataset_name)
        return splits[settings.split]

    split = _same_data(load, data_class, record, settings)
    args = data_class(**record["arguments"]["data"])
    rates = None if settings.fraction is None else [settings.fraction]
    if not stronger_noise(args, rates):
        _refuse("fraction", settings, record)
    model = getattr(transformers, TASKS[record["task"]].auto_class).from_pretrained(folder).to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return sequence_robustness(model, tokenizer, split, settings.split, args, rates)


_SEQUENCE_TASKS: dict[str, type[GeneratedDataArguments]] = {
    "sequence-classification": SequenceDataArguments,
    "recall": RecallDataArguments,
}
"""Tasks on long sequences -> their data options."""

_MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "AutoModelForImageClassification": _measure_images,
    "AutoModelForSemanticSegmentation": _measure_masks,
    "AutoModelForCausalLM": _measure_text,
    "AutoModelForSequenceClassification": _measure_labelled_texts,
}
"""Auto class that loads a task's checkpoints -> what measures them."""


def _refuse(name: str, settings: Settings, record: dict[str, Any]) -> None:
    value = getattr(settings, name)
    if value is not None:
        raise UsageError(f"{name} is not used with a run of task {record['task']}, got {value!r}")


def _check_split(splits: dict[str, Any], settings: Settings, dataset_name: str) -> None:
    if settings.split not in splits:
        raise UsageError(
            f"split must be one that the data set {dataset_name!r} has ({', '.join(splits)}) and that is not trained "
            f"on, got {settings.split!r}"
        )


def _same_data(
    load: Callable[[Any], DataT], data_class: type[Any], record: dict[str, Any], settings: Settings
) -> DataT:
    """Load a split as the run did, check that it is the same, then limit it."""
    try:
        args = data_class(**_without_ignored(record["arguments"]["data"]))
    except TypeError as error:
        raise UsageError(f"run.json has data options that this version does not know: {error}") from error
    data = load(args)
    found, recorded = data.fingerprint, record.get("data_fingerprint", {}).get(settings.split, {})
    if any(recorded.get(name) != value for name, value in found.items()):
        raise UsageError(
            f"the {settings.split} split must be the one that the run was made with ({recorded}), got {found}"
        )
    if settings.max_samples is None or settings.max_samples >= found["rows"]:
        return data
    return load(dataclasses.replace(args, max_eval_samples=settings.max_samples))


def _without_ignored(options: dict[str, Any]) -> dict[str, Any]:
    """The data options of a run without the columns that built-in data do not have.

    Training commands refuse these now; up to version 0.2.0 they ignored them, and recorded them all the same.
    """
    name = options.get("dataset_name")
    ignored: tuple[str, ...] = ()
    if name == EMBEDDED_TEXT:
        ignored = ("text_column_name",)
    elif name in (*GENERATED_CLASSES, *GENERATED_ANSWERS):
        ignored = ("image_column_name", "label_column_name")
    return {option: None if option in ignored else value for option, value in options.items()}


def _build_parser() -> OneLineParser:
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--sigmas",
        type=number,
        nargs="*",
        metavar="SIGMA",
        help="images: standard deviations of Gaussian noise, pixels in [0, 1] (default: 0.1 0.2 0.3)",
    )
    parser.add_argument(
        "--epsilons",
        type=number,
        nargs="*",
        metavar="EPSILON",
        help="images: largest changes of a pixel by FGSM, pixels in [0, 1] (default: 8/255 16/255)",
    )
    parser.add_argument(
        "--fraction",
        type=number,
        help=f"text: part of the words that is replaced by AAA (default: {FRACTION}); noisy recall: rate of the noise "
        "(default: 0.2 0.4 0.6 0.8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and word swap (default: %(default)s)")
    parser.add_argument("--max_samples", type=int, help="use at most so many images or lines (default: all)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the robustness.json of an earlier evaluation")
    return parser


def _run(argv: Sequence[str] | None) -> None:
    options = vars(_build_parser().parse_args(argv))
    folder: Path = options.pop("run")
    force: bool = options.pop("force")
    robustness = evaluate(folder, Settings(**options), force=force)
    from hf_imgproc_attn.cards.results import Measurement, result_rows

    for row in result_rows([Measurement(**result) for result in robustness["results"]], None, None):
        print(f"{row[0]:30} {row[1]:20} {row[2]:10} {row[3]:>15} {row[-1]:>12}")
    print(f"{robustness['seconds']:.0f} s; written to {folder / 'robustness.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
