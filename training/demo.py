"""Four attention variants compared in a few minutes: a small ViT on digits and a small GPT-2 on Python's manual.

    python training/demo.py

Trains softmax, bilateral, twicing and bilateral_twicing with the same seed, recipe and number of steps; evaluates on
clean and on disturbed test data; writes tables and a picture to outputs/demo/report.md; generates text; loads a
checkpoint back in a process that does not have this package; and shows under the lens what the first and the last of
the variants filter.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate_checkpoint import SIGMAS
from make_results import SEED, run_recipe

from hf_imgproc_attn.errors import OneLineParser, UsageError, exit_code, require_extras
from hf_imgproc_attn.output_paths import check_output_folder

PRESETS = ("softmax", "bilateral", "twicing", "bilateral_twicing")
PROMPT = 'The "with" statement'
LOOKS = {"vit_digits": "digits", "gpt2_pydoc": "pydoc"}
"""Recipe -> what its models are shown under the lens."""
# Beside the recipe: nothing is evaluated or saved before the end.
OPTIONS = "--eval_strategy no --save_strategy no --logging_steps 0.2"
QUICK_OPTIONS = f"{OPTIONS} --max_steps 3 --max_eval_samples 24"

_MARKER = "demo.json"
_DIGITS_SHOWN = 8
# Runs with -I (no PYTHONPATH, no current folder); the None entry makes every import of the package fail.
_FRESH_PROCESS = """
import pathlib, sys
sys.modules["hf_imgproc_attn"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
checkpoint, digits = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(checkpoint)
files = sorted(pathlib.Path(digits).glob("*.png"))
inputs = processor([Image.open(file) for file in files], return_tensors="pt")
with torch.no_grad():
    answers = model(**inputs).logits.argmax(-1).tolist()
print(f"{type(model).__name__} from {type(model).__module__.split('.')[0]}, without hf_imgproc_attn")
print("  is  ", *(file.stem.split("_")[-1] for file in files))
print("  said", *(model.config.id2label[answer] for answer in answers))
"""


def compare(recipe: str, folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Train and evaluate the four variants of one recipe.

    Args:
        recipe: of :mod:`make_results`.
        folder: gets one checkpoint folder a preset.
        quick: a few steps only.

    Returns:
        preset -> column of the table -> value.
    """
    table: dict[str, dict[str, float]] = {}
    for preset in PRESETS:
        print(f"\n== {recipe}, {preset}", flush=True)
        options = (QUICK_OPTIONS if quick else OPTIONS).split()
        result, robustness = run_recipe(recipe, preset, folder / f"{recipe}_{preset}", options)
        record = result.record
        table[preset] = {"parameters": record["parameters"]["total"], "training s": record["training_seconds"]}
        table[preset] |= {_column(entry, recipe): entry["value"] for entry in robustness["results"]}
    return table


def save_digits(folder: Path) -> None:
    """Write a few test digits as ``<number>_<label>.png``."""
    from hf_imgproc_attn.training_support.arguments import ImageDataArguments
    from hf_imgproc_attn.training_support.image_data import load_image_splits

    splits = load_image_splits(ImageDataArguments())
    folder.mkdir()
    for index in range(_DIGITS_SHOWN):
        label = splits.label_names[splits.labels["test"][index]]
        splits.rows["test"][index][splits.image_column].save(folder / f"{index:02d}_{label}.png")


def write_text(checkpoint: Path) -> str:
    """Let a language model go on from the prompt, to as many tokens as it has positions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    set_seed(SEED)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    sampling = {"do_sample": True, "top_k": 20, "temperature": 0.8, "max_length": model.config.n_positions}
    return str(tokenizer.decode(model.generate(**inputs, **sampling)[0], skip_special_tokens=True))


def load_in_fresh_process(checkpoint: Path, digits: Path) -> str:
    """Classify the digits in a new process in which ``hf_imgproc_attn`` cannot be imported.

    Args:
        checkpoint: folder of an image classifier.
        digits: folder of images named ``<number>_<label>.png``.

    Returns:
        What that process printed.

    Raises:
        RuntimeError: if it failed; with its error output.
    """
    command = [sys.executable, "-I", "-c", _FRESH_PROCESS, str(checkpoint), str(digits)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"the fresh process failed:\n{done.stderr}")
    return done.stdout.strip()


def look(folder: Path, quick: bool) -> dict[str, Path]:
    """What the first and the last preset filter, side by side.

    Args:
        folder: has the checkpoints, and gets a folder a recipe.
        quick: the first recipe alone, without pictures of maps, noise and spectra.

    Returns:
        recipe -> page.
    """
    from hf_imgproc_attn.lens.compare import look_at, write
    from hf_imgproc_attn.lens.options import LensOptions

    options = LensOptions(spectra="none", noise=0.0, measures="summary") if quick else LensOptions()
    pages = {}
    for recipe, data in list(LOOKS.items())[: 1 if quick else None]:
        names = (PRESETS[0], PRESETS[-1])
        looks = [look_at(str(folder / f"{recipe}_{name}"), name=name, data=data, options=options) for name in names]
        write(looks, folder / f"lens_{recipe}")
        pages[recipe] = folder / f"lens_{recipe}" / "lens.html"
    return pages


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against the noise level, one line per preset.

    Args:
        table: from :func:`compare`.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for preset, values in table.items():
        heights = [values["clean"], *(values[f"Gaussian noise, sigma {sigma:g}"] for sigma in SIGMAS)]
        axes.plot([0, *SIGMAS], [100 * height for height in heights], marker="o", label=preset)
    axes.set_xlabel("standard deviation of the noise (pixels in [0, 1])")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Digits with Gaussian noise, one seed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(output_dir: Path, quick: bool) -> None:
    """Run the whole demonstration.

    Args:
        output_dir: is replaced if an earlier demonstration made it.
        quick: a few steps only: a check that everything runs, not a result.

    Raises:
        UsageError: if ``output_dir`` holds something else, or a package is missing.
    """
    require_extras("train", "robustness", "viz", "lens")
    import torch

    # Models this small gain little from a second thread, and lose much where other programs want the cores too.
    torch.set_num_threads(1)
    started = time.perf_counter()
    check_output_folder(output_dir, "output_dir")
    if output_dir.exists() and not (output_dir / _MARKER).is_file() and any(output_dir.iterdir()):
        raise UsageError(
            f"output_dir must be empty or an earlier demo's, got {str(output_dir)!r}, which holds other files"
        )
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    (output_dir / _MARKER).write_text("{}\n", encoding="utf-8")

    images, texts = compare("vit_digits", output_dir, quick), compare("gpt2_pydoc", output_dir, quick)
    sample = write_text(output_dir / "gpt2_pydoc_bilateral_twicing")
    print("\n== a fresh process without this package", flush=True)
    save_digits(output_dir / "digits")
    fresh = load_in_fresh_process(output_dir / "vit_digits_bilateral_twicing", output_dir / "digits")
    draw(images, output_dir / "accuracy_against_noise.png")
    print("\n== the lens", flush=True)
    pages = look(output_dir, quick)
    seconds = time.perf_counter() - started

    image_table, text_table = _markdown(images, "accuracy"), _markdown(texts, "perplexity")
    note = "One seed and short training: the figures show how the variants are compared, not which is better."
    if quick:
        note = "Quick run: a few steps only, a check that everything runs. The figures mean nothing."
    links = " and ".join(f"[{LOOKS[recipe]}]({page.relative_to(output_dir)})" for recipe, page in pages.items())
    report = f"""# Demonstration

{note} Seed {SEED}; {seconds:.0f} s in all.

## Digits (scikit-learn, 8 x 8): test accuracy

Gaussian noise with the given standard deviation and FGSM with the given epsilon, pixels in [0, 1].

{image_table}

![accuracy against noise](accuracy_against_noise.png)

## Python's manual: test perplexity

Word swap replaces the given part of the words by AAA. A word is a whitespace-separated word or the end of a line.

{text_table}

## What the models filter

{PRESETS[0]} beside {PRESETS[-1]} under the lens: {links}.

## Written by the bilateral_twicing model

```text
{sample}
```

## Loaded with trust_remote_code in a process without hf_imgproc_attn

```text
{fresh}
```
"""
    (output_dir / "report.md").write_text(report, encoding="utf-8")
    summary = {"seed": SEED, "quick": quick, "seconds": seconds, "digits": images, "text": texts}
    (output_dir / _MARKER).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"{fresh}\n\ndigits: test accuracy\n{image_table}\n\nPython's manual: test perplexity\n{text_table}\n")
    print(*(f"what {recipe} filters: {page}" for recipe, page in pages.items()), sep="\n")
    print(f"written by bilateral_twicing:\n{sample}\n\n{note}\n{seconds:.0f} s; report in {output_dir / 'report.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only: a check, not a result")

    def work() -> None:
        options = parser.parse_args(argv)
        run(options.output_dir, options.quick)

    return exit_code(work)


def _column(result: dict[str, Any], recipe: str) -> str:
    """The name that ``imgproc-attn evaluate`` gives a result; of a text, which has two metrics, with the metric."""
    from hf_imgproc_attn.cards.results import METRICS, Measurement

    name = Measurement(**{**result, "split": "test"}).name
    return name if recipe == "vit_digits" else f"{name}, {METRICS[result['metric']]}"


def _cell(name: str, value: float, metric: str) -> str:
    """A value in the unit in which ``imgproc-attn evaluate`` prints it."""
    from hf_imgproc_attn.cards.results import format_value

    if name == "parameters":
        return f"{value:,}"
    return f"{value:.1f}" if name == "training s" else format_value(metric, value)


def _markdown(table: dict[str, dict[str, float]], metric: str) -> str:
    columns = list(next(iter(table.values())))
    rows = [["preset", *columns]]
    rows += [[preset, *(_cell(name, row[name], metric) for name in columns)] for preset, row in table.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns) + 1)]
    rows.insert(1, ["-" * width for width in widths])
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    sys.exit(main())
