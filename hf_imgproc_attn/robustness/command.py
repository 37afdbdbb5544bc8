"""``imgproc-attn robustness``: options here, without torch, and the work in :mod:`.evaluation`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .settings import ATTACKS, TEXT_CHANGES, ImageSettings, TextSettings
from .severities import CORRUPTIONS, TABLES

OUTPUT = Path("outputs/robustness")
_IMAGE_OPTIONS = (
    "corruptions", "severities", "table", "frost_pictures", "sigmas", "attacks", "epsilons", "attack_samples", "steps",
    "restarts", "spsa_steps", "spsa_samples", "autoattack_steps", "autoattack_targets", "square_queries",
)  # fmt: skip
_TEXT_OPTIONS = ("changes", "fractions", "block_size")


def add_command(commands: Any) -> None:
    """Add the sub-command to the parser of ``imgproc-attn``."""
    command = commands.add_parser(
        "robustness",
        help="measure a checkpoint under corruptions, attacks and changed words",
        description="Measure any checkpoint of Transformers, from a folder or the Hub, on disturbed data: image "
        "classifiers under the corruptions of CIFAR-10-C and ImageNet-C and under attacks, language models and text "
        "classifiers on texts with swapped, deleted and misspelt words. Writes a record, tables and a figure, the "
        "record after every measurement. What the numbers mean: docs/robustness.md.",
    )
    command.add_argument("checkpoint", help="a folder or a Hub name")
    data = command.add_argument_group("data (default: those that a run of this package names, else the embedded ones)")
    data.add_argument("--dataset_name", help="a Hub name or a local path, as for training")
    data.add_argument("--dataset_config_name", help="configuration of a Hub data set")
    data.add_argument("--image_column_name", help="column with the images (default: detected)")
    data.add_argument("--text_column_name", help="column with the texts (default: detected)")
    data.add_argument("--label_column_name", help="column with the labels (default: detected)")
    data.add_argument("--split", choices=("test", "validation"), help="(default: test where there is one)")
    data.add_argument("--max_samples", type=int, default=500, help="use at most so many rows (default: %(default)s)")
    _add_image_options(command)
    _add_text_options(command)
    command.add_argument("--baseline", metavar="CHECKPOINT", help="another checkpoint, or the folder of its results, "
                         "for the mean corruption error")  # fmt: skip
    command.add_argument("--batch_size", type=int, help="images, texts or blocks at once (default: 128 or 16)")
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="(default: %(default)s)")
    command.add_argument("--resume", action="store_true", help="go on with the same measurements where they ended")
    command.add_argument("--force", action="store_true", help="replace the results of earlier measurements in DIR")
    command.set_defaults(run_command=run_command)


def _add_image_options(command: argparse.ArgumentParser) -> None:
    images = command.add_argument_group("images")
    images.add_argument("--corruptions", nargs="*", metavar="NAME", help="all (default), none, or "
                        f"names among {', '.join(CORRUPTIONS)}")  # fmt: skip
    images.add_argument("--severities", nargs="+", type=int, metavar="N", help="1 to 5 (default: all)")
    images.add_argument(
        "--table", choices=tuple(TABLES), help="of the severities (default: by the size of the images)"
    )
    images.add_argument("--frost_pictures", metavar="DIR", help="photographs for frost, which is left out without")
    images.add_argument("--sigmas", nargs="*", type=number, metavar="SIGMA", help="of Gaussian noise, beside the "
                        "corruptions; pixels in [0, 1] (default: none)")  # fmt: skip
    images.add_argument("--attacks", nargs="*", metavar="NAME", help=f"{', '.join(ATTACKS)} (default: fgsm pgd)")
    images.add_argument("--epsilons", nargs="+", type=number, metavar="EPSILON", help="largest changes of a pixel in "
                        "[0, 1] (default: 2/255 4/255 8/255)")  # fmt: skip
    images.add_argument("--attack_samples", type=int, metavar="N", help="attack the first N images only")
    for name, text in (
        ("steps", "of PGD"),
        ("restarts", "of PGD"),
        ("spsa_steps", "of SPSA"),
        ("spsa_samples", "directions of each of SPSA's estimates"),
        ("autoattack_steps", "of each APGD and FAB of AutoAttack"),
        ("autoattack_targets", "classes that its targeted attacks try"),
        ("square_queries", "evaluations that its Square attack may make an image"),
    ):
        default = getattr(ImageSettings, name)
        images.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")


def _add_text_options(command: argparse.ArgumentParser) -> None:
    texts = command.add_argument_group("texts")
    texts.add_argument("--changes", nargs="+", metavar="NAME", help=f"{', '.join(TEXT_CHANGES)} (default: all)")
    texts.add_argument("--fractions", nargs="+", type=number, metavar="PART", help="parts of the words that are "
                       "changed (default: 0.015 0.025 0.05)")  # fmt: skip
    texts.add_argument("--block_size", type=int, metavar="N", help="tokens that are read at once (default: as the "
                       "run, else 256 for a language model, or what the model can read)")  # fmt: skip


def number(word: str) -> float:
    """``0.1`` or ``8/255``."""
    try:
        return float(Fraction(word))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a number or a fraction such as 8/255, got {word!r}") from error


def image_settings(options: argparse.Namespace) -> ImageSettings:
    """The settings that the options ask for.

    Raises:
        UsageError: for a wrong one.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in _IMAGE_OPTIONS}
    given["corruptions"] = _corruptions(given["corruptions"], given["frost_pictures"])
    given["attacks"] = _or_none(given["attacks"], ("fgsm", "pgd"))
    settings = ImageSettings(**_chosen({**given, "batch_size": options.batch_size, "seed": options.seed}))
    if "frost" in settings.corruptions:  # before any data are read
        from .corruptions import frost_photographs

        frost_photographs(settings.frost_pictures)
    return settings


def text_settings(options: argparse.Namespace) -> TextSettings:
    """The settings that the options ask for.

    Raises:
        UsageError: for a wrong one.
    """
    given = {name: getattr(options, name) for name in ("changes", "fractions", "batch_size", "seed")}
    return TextSettings(**_chosen(given))


def _chosen(given: dict[str, Any]) -> dict[str, Any]:
    """Without what was not given; lists as tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }


def _corruptions(names: Sequence[str] | None, frost_pictures: str | None) -> tuple[str, ...]:
    if names is not None and list(names) != ["all"]:
        return _or_none(names, ())
    usable = [name for name in CORRUPTIONS if name != "frost" or frost_pictures is not None]
    return tuple(usable)


def _or_none(names: Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The names; the word ``none`` alone, or an option without words, for no name."""
    if names is None:
        return default
    return () if list(names) == ["none"] else tuple(names)


def run_command(options: argparse.Namespace) -> int:
    """``imgproc-attn robustness``: print the tables, leave record, tables and figure.

    Raises:
        UsageError: for a wrong option, before anything is loaded.
    """
    images, texts = image_settings(options), text_settings(options)
    if options.resume and options.force:
        raise UsageError("--resume and --force cannot be given together")
    if options.max_samples < 1:
        raise UsageError(f"max_samples must be an integer >= 1, got {options.max_samples}")
    if options.block_size is not None and options.block_size < 2:
        raise UsageError(f"block_size must be an integer >= 2, got {options.block_size}")
    from .evaluation import Settings, run
    from .loading import Data

    of_images, of_texts = (
        tuple(name for name in names if getattr(options, name) is not None)
        for names in (_IMAGE_OPTIONS, _TEXT_OPTIONS)
    )
    settings = Settings(images, texts, (of_images, of_texts), options.block_size)
    data = Data(**{name: getattr(options, name) for name in Data._fields})
    record = run(
        options.checkpoint,
        data,
        settings,
        baseline=options.baseline,
        device=options.device,
        output=options.output,
        resume=options.resume,
        force=options.force,
    )
    from .report import plain_text

    print(plain_text(record))
    print(f"\nrecord, tables and figure are in {options.output}")
    return 0
