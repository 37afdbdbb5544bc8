"""Train or fine-tune a BERT classifier of texts: softmax, bilateral, twicing and the other presets.

    python training/train_text_classification.py --preset bilateral_twicing
    python training/train_text_classification.py --preset twicing --dataset_name PATH_OR_HUB_NAME --max_steps 500

``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import (
    CLASSIFIER_TRAINER_DEFAULTS,
    EMBEDDED_TEXT,
    INTERRUPTED,
    Arguments,
    LabelledTextDataArguments,
)

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[LabelledTextDataArguments]) -> "Result":
    """Train one classifier.

    Args:
        arguments: the parsed command line.

    Returns:
        The output folder, the metrics of every evaluated split and the run record.

    Raises:
        UsageError: for arguments, data or an output folder that cannot be used.
    """
    require_extras("train")
    # Imported here so that --help does not wait for them.
    from transformers import DataCollatorWithPadding

    from hf_imgproc_attn.training_support.early_checks import check_model
    from hf_imgproc_attn.training_support.fitting import fit
    from hf_imgproc_attn.training_support.labelled_text import TokenizedTexts, load_labelled_texts
    from hf_imgproc_attn.training_support.metrics import classification_metrics
    from hf_imgproc_attn.training_support.model_setup import build_text_classifier
    from hf_imgproc_attn.training_support.tokenizer import choose_classifier_tokenizer
    from hf_imgproc_attn.training_support.trainer_setup import begin_run

    embedded = arguments.data.dataset_name == EMBEDDED_TEXT
    run = begin_run("text-classification", arguments, CLASSIFIER_TRAINER_DEFAULTS, embedded=embedded)
    check_model("text-classification", arguments)
    texts, label_names = load_labelled_texts(arguments.data)
    tokenizer = choose_classifier_tokenizer(arguments.data, arguments.model.model_name_or_path, texts["train"].texts)
    model, max_length = build_text_classifier(arguments.model, tokenizer, label_names, arguments.data.max_length)
    tokenizer.model_max_length = max_length  # pipelines cut longer texts there
    rows = {split: TokenizedTexts(part, tokenizer, max_length) for split, part in texts.items()}
    fingerprints = {split: part.fingerprint for split, part in texts.items()}
    metrics = dict.fromkeys(rows, classification_metrics)
    collator = DataCollatorWithPadding(tokenizer)
    return fit(run, model, rows, metrics, fingerprints, data_collator=collator, processing_class=tokenizer)


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[LabelledTextDataArguments]:
    """The options of a command line; None: of this process."""
    first = str(__doc__).split("\n")[0]
    return parse_arguments(argv, LabelledTextDataArguments, CLASSIFIER_TRAINER_DEFAULTS, first)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
