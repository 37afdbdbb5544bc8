"""Put filters into the last layers of a trained language model, and let it recover on texts that it writes itself.

    python training/finetune_real.py PATH_OR_HUB_NAME --layers -2 -1 --steps 100 --output outputs/recovery.json

No data are needed: the model as it was, the teacher, writes the texts, and a filtered copy learns to predict what the
teacher predicts (Kullback-Leibler divergence, all parameters, AdamW, no dropout). A copy without filters goes through
the same steps as the control. Measured is the cross-entropy on texts of the teacher that nobody trained on, in nats a
token, above the teacher's own.
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

from hf_imgproc_attn.errors import (
    OneLineParser,
    UsageError,
    broken_files,
    exit_code,
    plain_message,
    refuse_missing_path,
)
from hf_imgproc_attn.markdown_tables import table_text
from hf_imgproc_attn.models.spec_fields import PRESETS
from hf_imgproc_attn.output_paths import check_new_files, write_or_keep

if TYPE_CHECKING:
    import torch

FORMAT = 1
CONTROL = "stock"
_HELD_OUT_SEED = 10**6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        variants: presets of ``apply_filter``; the control comes by itself.
        layers: that get the filter, from either end; None: all.
        steps: of training.
        seeds: of the texts; every variant sees the same ones.
        batch: texts a step.
        length: tokens of a text.
        held_out: texts that are measured on.
        learning_rate: of AdamW, constant.

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
            or not all(0 <= seed < _HELD_OUT_SEED for seed in self.seeds)
        ):
            raise UsageError(
                f"seeds must be two or more different integers from 0 to {_HELD_OUT_SEED - 1}, got {list(self.seeds)}"
            )
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise UsageError(f"variants must be different presets, got {list(self.variants)}")

    @property
    def measured_at(self) -> list[int]:
        """Steps after which the held-out texts are scored: 0, the last one, and halves, quarters ... of it."""
        return sorted({0, *(max(1, self.steps >> shift) for shift in range(5))})


def recover(name: str, settings: Settings) -> dict[str, Any]:
    """Train every variant and the control with every seed.

    Args:
        name: a causal language model, a folder or Hub name; it needs no tokenizer.
        settings: what is trained.

    Returns:
        The record: ``curves``, variant -> seed -> [step, nats a token above the teacher]; ``rows``, the summary.

    Raises:
        UsageError: for a model that cannot be loaded, or a preset that it cannot have.
    """
    refuse_missing_path("model", name)
    import torch

    from hf_imgproc_attn import records
    from hf_imgproc_attn.conversion_probe import sample_texts

    teacher = _load(name).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.to(device).requires_grad_(False)
    starts = {variant: _filtered(teacher, variant, settings) for variant in (CONTROL, *settings.variants)}
    started = time.perf_counter()
    held_out = sample_texts(teacher, _generator(_HELD_OUT_SEED), settings.length, settings.held_out)
    entropy = cross_entropy(teacher, held_out, settings.batch)
    curves: dict[str, dict[str, list[list[float]]]] = {variant: {} for variant in starts}
    for seed in settings.seeds:
        texts = sample_texts(teacher, _generator(seed), settings.length, settings.steps * settings.batch)
        for variant, start in starts.items():
            curve = train(copy.deepcopy(start), teacher, texts, held_out, settings)
            curves[variant][str(seed)] = [[step, value - entropy] for step, value in curve]
            print(f"seed {seed}, {variant}: {curves[variant][str(seed)][-1][1]:+.4f} nats a token", flush=True)
    return {
        "format": FORMAT,
        "model_type": teacher.config.model_type,
        "parameters": teacher.num_parameters(),
        "settings": asdict(settings),
        "teacher_cross_entropy": entropy,
        "curves": curves,
        "rows": summarise(curves),
        "versions": records.package_versions(),
        "git": records.git_state(),
        "device": records.device_description(device, processes=1),
        "seconds": time.perf_counter() - started,
    }


def train(
    student: Any, teacher: Any, texts: "torch.Tensor", held_out: "torch.Tensor", settings: Settings
) -> list[tuple[int, float]]:
    """Distil the teacher into a student, in place.

    Args:
        student: in evaluation mode, so that there is no dropout.
        teacher: is not changed.
        texts: token ids ``[steps * batch, length]``, used once, in order.
        held_out: token ids ``[texts, length]``.
        settings: batch, steps and learning rate.

    Returns:
        Step and cross-entropy on the held-out texts.
    """
    import torch

    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    curve = [(0, cross_entropy(student, held_out, settings.batch))]
    for step, batch in enumerate(texts.split(settings.batch), start=1):
        with torch.no_grad():
            wanted = teacher(batch, use_cache=False).logits.float().log_softmax(-1)
        found = student(batch, use_cache=False).logits.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step in settings.measured_at:
            curve.append((step, cross_entropy(student, held_out, settings.batch)))
    return curve


def cross_entropy(model: Any, texts: "torch.Tensor", batch: int) -> float:
    """Mean negative log-likelihood of all tokens but the first, in nats."""
    import torch

    total = 0.0
    with torch.no_grad():
        for part in texts.split(batch):
            logits = model(part, use_cache=False).logits[:, :-1].double()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
    return total / texts[:, 1:].numel()


def summarise(curves: dict[str, dict[str, list[list[float]]]]) -> list[dict[str, Any]]:
    """A row for every variant: what the filter costs at once, at the end, and beside the control, all in nats a token.

    The last is paired by seed, with an interval of 95 % (Student's t).
    """
    rows = []
    for variant, of_seed in curves.items():
        ends = [curve[-1][1] for curve in of_seed.values()]
        beside = [end - curves[CONTROL][seed][-1][1] for seed, end in zip(of_seed, ends, strict=True)]
        start = next(iter(of_seed.values()))[0][1]
        rows.append({"variant": variant, "start": start, "end": _interval(ends), "beside_control": _interval(beside)})
    return rows


def _interval(values: Sequence[float]) -> list[float]:
    """Mean, and the ends of its interval of 95 %."""
    from statistics import fmean, stdev

    from scipy.stats import t

    mean = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def table(record: dict[str, Any]) -> str:
    """The summary as Markdown."""
    rows = []
    for row in record["rows"]:
        cells = [f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" for mean, low, high in (row["end"], row["beside_control"])]
        last = "–" if row["variant"] == CONTROL else cells[1]
        rows.append([row["variant"], f"{row['start']:+.4f}", cells[0], last])
    return table_text(["variant", "at once", "after training", "beside the control"], rows)


def _load(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name)
    except broken_files() as error:
        raise UsageError(f"model must be a causal language model, got {name!r}: {plain_message(error)}") from error


def _filtered(teacher: Any, variant: str, settings: Settings) -> Any:
    """A copy of the teacher with a filter; of the control without."""
    from hf_imgproc_attn import apply_filter

    student = copy.deepcopy(teacher)
    if variant == CONTROL:
        return student
    try:
        return apply_filter(student, variant, layers=settings.layers)
    except ValueError as error:
        raise UsageError(f"variants: {variant}: {plain_message(error)}") from error


def _generator(seed: int) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(seed)


def _build_parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("model", help="a causal language model, a folder or Hub name; it needs no tokenizer")
    parser.add_argument("--variants", nargs="+", choices=PRESETS, default=default.variants, metavar="PRESET")
    parser.add_argument("--layers", nargs="+", type=int, default=default.layers, help="(default: the last two)")
    parser.add_argument("--all-layers", action="store_const", dest="layers", const=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
    for name in ("steps", "batch", "length", "held_out"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/recovery.json"), help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


def _run(argv: Sequence[str] | None) -> None:
    options = vars(_build_parser().parse_args(argv))
    name, output, force = (options.pop(option) for option in ("model", "output", "force"))
    settings = Settings(**options)
    check_new_files([output], force)
    record = recover(name, settings)
    from hf_imgproc_attn.records import write_json

    print(table(record))
    write_or_keep(output, lambda file: write_json(file, record))
    print(f"{record['seconds']:.0f} s; curves in {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
