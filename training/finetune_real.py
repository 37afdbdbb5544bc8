"""Put filters into the last layers of a trained model of texts, and let it recover by what it was itself.

    python training/finetune_real.py PATH_OR_HUB_NAME --layers -2 -1 --steps 100 --output outputs/recovery.json
    python training/finetune_real.py --records outputs/recovery.json --plot outputs/recovery.png

The model as it was is the teacher. A filtered copy learns from it (all parameters, AdamW, no dropout), and a copy
without filters goes through the same steps as the control. No data are needed. A language model writes the texts, and
its copies learn the next words (Kullback-Leibler divergence); measured is the cross-entropy on texts of the teacher
that nobody trained on, in nats a token above the teacher's own. An encoder reads paragraphs of Python's manual, or the
lines of a file, and its copies learn the states of its tokens (cosine); measured are the distance of sentence vectors
from the teacher's (1 - cosine), and how many texts keep their nearest neighbour.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boost_pretrained import STOCK, load

from hf_imgproc_attn.errors import OneLineParser, UsageError, exit_code, plain_message, require_extras
from hf_imgproc_attn.models.spec_fields import PRESETS
from hf_imgproc_attn.output_paths import check_new_files, write_or_keep

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.teachers import Lesson, Teacher

Curves = dict[str, dict[str, list[list[float]]]]
"""Variant -> seed -> [step, value]."""

FORMAT = 2
"""1 had a summary, which is made of the curves now, and only language models."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; from there it falls to 0, both in a straight line.

At a constant rate AdamW keeps moving a model that has nothing to learn by steps of that size: the control then drifts
as far as some filters cost.
"""
HELD_OUT_SEED = 10**6
"""As in ``training_support/teachers.py``, which needs torch: seeds are below it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        variants: presets of ``apply_filter``; the control comes by itself.
        layers: that get the filter, from either end; None: all.
        steps: of training.
        seeds: of the texts, or of their order; every variant sees the same ones.
        batch: texts a step.
        length: tokens of a text; those of an encoder may be shorter.
        held_out: texts that are measured on.
        learning_rate: of AdamW, the highest; see :data:`WARM_UP`.

    Raises:
        UsageError: for a value outside its range.
    """

    variants: Sequence[str] = ("twicing", "learned_twicing")
    layers: Sequence[int] | None = (-2, -1)
    steps: int = 100
    seeds: Sequence[int] = (0, 1, 2)
    batch: int = 8
    length: int = 64
    held_out: int = 128
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("held_out", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be an integer >= {least}, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate must be a number > 0, got {self.learning_rate}")
        if (
            len(set(self.seeds)) != len(self.seeds)
            or len(self.seeds) < 2
            or not all(0 <= seed < HELD_OUT_SEED for seed in self.seeds)
        ):
            raise UsageError(
                f"seeds must be two or more different integers from 0 to {HELD_OUT_SEED - 1}, got {list(self.seeds)}"
            )
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise UsageError(f"variants must be different presets, got {list(self.variants)}")

    @property
    def measured_at(self) -> list[int]:
        """Steps after which the held-out texts are scored: 0, the last one, and halves, quarters ... of it."""
        return sorted({0, *(max(1, self.steps >> shift) for shift in range(5))})


def recover(name: str, settings: Settings, texts: Path | None = None) -> dict[str, Any]:
    """Train every variant and the control with every seed.

    Args:
        name: a causal language model, which needs no tokenizer, or an encoder of texts; a folder or Hub name.
        settings: what is trained.
        texts: of an encoder, a file with a text on each line; None: Python's manual.

    Returns:
        The record: ``curves``, variant -> seed -> [step, distance from the teacher]; of an encoder ``neighbours`` too.

    Raises:
        UsageError: for a model that cannot be loaded or is of another kind, too few texts, a preset that the model
            cannot have, or training that diverges.
    """
    import torch

    from hf_imgproc_attn import records
    from hf_imgproc_attn.study.recovery import UNITS

    model, tokenizer = load(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    starts = {variant: _filtered(model.to(device), variant, settings) for variant in (STOCK, *settings.variants)}
    teacher = _teacher(model, tokenizer, settings, texts)
    started = time.perf_counter()
    curves: list[Curves] = [{variant: {} for variant in starts} for _ in teacher.measures]
    for seed in settings.seeds:
        lessons = teacher.lessons(seed, settings.steps)
        for variant, start in starts.items():
            measured = train(copy.deepcopy(start), teacher, lessons, settings, variant)
            for place, of_measure in enumerate(curves):
                of_measure[variant][str(seed)] = [[step, values[place]] for step, values in measured]
            print(f"seed {seed}, {variant}: {measured[-1][1][0]:+.4f} {UNITS[teacher.measures[0]]}", flush=True)
    return {
        "format": FORMAT,
        "measure": teacher.measures[0],
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "settings": asdict(settings),
        **teacher.facts(),
        "curves": curves[0],
        **dict(zip(teacher.measures[1:], curves[1:], strict=True)),
        "versions": records.package_versions(),
        "git": records.git_state(),
        "device": records.device_description(device, processes=1),
        "seconds": time.perf_counter() - started,
    }


def train(
    student: Any, teacher: "Teacher", lessons: "Sequence[Lesson]", settings: Settings, variant: str = "student"
) -> list[tuple[int, tuple[float, ...]]]:
    """Distil the teacher into a student, in place.

    Args:
        student: in evaluation mode, so that there is no dropout.
        teacher: is not changed.
        lessons: a batch for each step, used once, in order.
        settings: steps and learning rate.
        variant: what an error calls the student.

    Returns:
        Step and scores on the held-out texts.

    Raises:
        UsageError: if the loss is no finite number any more.
    """
    import torch

    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    curve = [(0, teacher.score(student))]
    for step, lesson in enumerate(lessons, start=1):
        loss = teacher.loss(student, lesson)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in settings.measured_at:
            curve.append((step, teacher.score(student)))
        if not all(map(math.isfinite, (loss.item(), *curve[-1][1]))):
            raise UsageError(
                f"{variant} diverges at step {step}: learning_rate must be smaller, got {settings.learning_rate}"
            )
    return curve


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a part of the highest."""
    rising = max(1, round(WARM_UP * steps))
    return min((step + 1) / rising, (steps - step) / (steps + 1 - rising))


def _teacher(model: Any, tokenizer: Any, settings: Settings, texts: Path | None) -> "Teacher":
    from hf_imgproc_attn.training_support.teachers import LanguageTeacher, SentenceTeacher

    sizes = (model, settings.length, settings.batch, settings.held_out)
    if not model.can_generate():
        return SentenceTeacher(*sizes, tokenizer, texts, settings.steps)
    if texts is not None:
        raise UsageError("texts are for encoders: a language model writes its own")
    return LanguageTeacher(*sizes)


def _filtered(teacher: Any, variant: str, settings: Settings) -> Any:
    """A copy of the teacher with a filter; of the control without."""
    from hf_imgproc_attn import apply_filter

    student = copy.deepcopy(teacher)
    if variant == STOCK:
        return student
    try:
        return apply_filter(student, variant, layers=settings.layers)
    except ValueError as error:
        raise UsageError(f"variants: {variant}: {plain_message(error)}") from error


def _build_parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "model", nargs="?", help="an encoder of texts or a causal language model, a folder or Hub name"
    )
    parser.add_argument(
        "--records", nargs="+", type=Path, metavar="RECORD", help="train nothing, show finished records"
    )
    parser.add_argument("--variants", nargs="+", choices=PRESETS, default=default.variants, metavar="PRESET")
    parser.add_argument("--layers", nargs="+", type=int, default=default.layers, help="(default: the last two)")
    parser.add_argument("--all-layers", action="store_const", dest="layers", const=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
    for name in ("steps", "batch", "length", "held_out"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--texts", type=Path, help="for an encoder, a text on each line (default: Python's manual)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG file")
    parser.add_argument("--output", type=Path, default=Path("outputs/recovery.json"), help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


def _run(argv: Sequence[str] | None) -> None:
    options = vars(_build_parser().parse_args(argv))
    name, shown, texts, plot, output, force = (
        options.pop(option) for option in ("model", "records", "texts", "plot", "output", "force")
    )
    if (name is None) == (shown is None):
        raise UsageError("either a model or --records must be given")
    require_extras("train", "study")
    from hf_imgproc_attn.records import write_json
    from hf_imgproc_attn.study.recovery import read_records, table, title, unit

    settings = Settings(**options)
    check_new_files([path for path in (plot, None if shown else output) if path is not None], force)
    if shown:
        found = read_records(shown)
    else:
        found = [recover(name, settings, texts)]
        write_or_keep(output, lambda file: write_json(file, found[0]))
        print(f"{found[0]['seconds']:.0f} s; curves in {output}")
    for record in found:
        print(f"\n{title(record)}, {unit(record)}:\n\n{table(record)}")
    if plot is not None:
        from hf_imgproc_attn.study.recovery_plot import draw

        draw(found, plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
