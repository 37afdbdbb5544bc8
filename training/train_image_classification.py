"""Train or fine-tune a Vision Transformer on labelled images: softmax, bilateral, twicing and the other presets.

    python training/train_image_classification.py --preset bilateral_twicing
    python training/train_image_classification.py --preset twicing --dataset_name PATH_OR_HUB_NAME --max_steps 500

``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import (
    EMBEDDED_IMAGES,
    IMAGE_TRAINER_DEFAULTS,
    INTERRUPTED,
    Arguments,
    ImageDataArguments,
)

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[ImageDataArguments]) -> "Result":
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
    from hf_imgproc_attn.training_support.early_checks import check_model
    from hf_imgproc_attn.training_support.fitting import fit
    from hf_imgproc_attn.training_support.image_data import load_image_splits
    from hf_imgproc_attn.training_support.image_pixels import EpochCallback, NormalizingCollator, load_pixels
    from hf_imgproc_attn.training_support.image_streams import load_image_stream
    from hf_imgproc_attn.training_support.metrics import classification_metrics
    from hf_imgproc_attn.training_support.model_setup import build_image_classifier
    from hf_imgproc_attn.training_support.streams import check_streaming
    from hf_imgproc_attn.training_support.trainer_setup import adapt_to_data, begin_run

    embedded = arguments.data.dataset_name == EMBEDDED_IMAGES
    run = begin_run("image-classification", arguments, IMAGE_TRAINER_DEFAULTS, embedded=embedded)
    check_model("image-classification", arguments)
    check_streaming(arguments.data, run.training_args, arguments.run.lens_every)
    stream, seed = None, run.training_args.seed
    if arguments.data.streaming:
        stream, splits = load_image_stream(arguments.data, seed)
    else:
        splits = load_image_splits(arguments.data)
    samples = None if stream is not None else len(splits.rows["train"])
    adapt_to_data(run, samples, "validation" in splits.rows)  # before images are decoded
    model, processor = build_image_classifier(arguments.model, splits.label_names, splits.image_size)
    pixels: dict[str, Any] = dict(load_pixels(splits, processor, arguments.data, seed))
    if stream is not None:
        pixels["train"] = stream.pixels(processor, arguments.data, run.training_args)
    fingerprints = {split: dataset.fingerprint for split, dataset in pixels.items()}
    return fit(
        run,
        model,
        pixels,
        dict.fromkeys(pixels, classification_metrics),
        fingerprints,
        data_collator=NormalizingCollator(processor),
        processing_class=processor,
        callbacks=[] if stream is not None else [EpochCallback(pixels["train"])],
    )


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[ImageDataArguments]:
    """The options of a command line; None: of this process."""
    return parse_arguments(argv, ImageDataArguments, IMAGE_TRAINER_DEFAULTS, str(__doc__).split("\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
