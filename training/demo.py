"""Four attention variants compared in a few minutes: a small ViT on digits and a small GPT-2 on Python's manual.

    python training/demo.py

Trains softmax, bilateral, twicing and bilateral_twicing with the same seed, recipe and number of steps; evaluates on
clean and on disturbed test data; writes tables and a picture to outputs/demo/report.md; generates text; and loads a
checkpoint back in a process that does not have this package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_imgproc_attn.training_support.errors import UsageError, exit_code, require_extras

PRESETS = ("softmax", "bilateral", "twicing", "bilateral_twicing")
SEED = 0
NOISE_SIGMAS = (0.1, 0.2, 0.3)
FGSM_EPSILONS = (8 / 255, 16 / 255)
PROMPT = 'The "with" statement'
IMAGE_OPTIONS = (
    "--config_overrides hidden_size=64 num_hidden_layers=4 num_attention_heads=4 intermediate_size=128 "
    "--num_train_epochs 20 --learning_rate 2e-3"
)
TEXT_OPTIONS = (
    "--config_overrides n_embd=64 n_layer=2 n_head=2 --tokenizer_vocab_size 1024 --block_size 64 --max_steps 800 "
    "--learning_rate 4e-3"
)
COMMON_OPTIONS = f"--seed {SEED} --eval_strategy no --save_strategy no --logging_steps 0.2"

_MARKER = "demo.json"
_DIGITS_SHOWN = 8
# Runs with -I (no PYTHONPATH, no current folder); the None entry makes every import of the package fail.
_FRESH_PROCESS = """
import pathlib, sys
sys.modules["hf_imgproc_attn"] = None
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
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


def compare_images(folder: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Train the four image classifiers and evaluate each on the test digits.

    Args:
        folder: gets one checkpoint folder a preset, and a few digits as files.
        quick: a few steps only.

    Returns:
        preset -> column of the table -> value.
    """
    from train_image_classification import train
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hf_imgproc_attn.training_support.argument_parser import parse_arguments
    from hf_imgproc_attn.training_support.arguments import IMAGE_TRAINER_DEFAULTS, ImageDataArguments
    from hf_imgproc_attn.training_support.evaluation import image_robustness
    from hf_imgproc_attn.training_support.image_data import load_image_splits
    from hf_imgproc_attn.training_support.image_pixels import load_pixels

    table: dict[str, dict[str, float]] = {}
    for preset in PRESETS:
        print(f"\n== digits, {preset}", flush=True)
        words = _options(IMAGE_OPTIONS, preset, folder / f"vit_{preset}", quick)
        arguments = parse_arguments(words, ImageDataArguments, IMAGE_TRAINER_DEFAULTS, "")
        result = train(arguments)
        processor = AutoImageProcessor.from_pretrained(result.output_dir)
        splits = load_image_splits(arguments.data)
        test = load_pixels(splits, processor, arguments.data, SEED)["test"]
        model = AutoModelForImageClassification.from_pretrained(result.output_dir)
        # The digits are grey: they are disturbed as grey images.
        scores = image_robustness(model, processor, test, sigmas=NOISE_SIGMAS, epsilons=FGSM_EPSILONS, greyscale=True)
        table[preset] = {**_costs(result.record), **scores}
    (folder / "digits").mkdir()
    for index in range(_DIGITS_SHOWN):
        label = splits.label_names[splits.labels["test"][index]]
        splits.rows["test"][index][splits.image_column].save(folder / "digits" / f"{index:02d}_{label}.png")
    return table


def compare_texts(folder: Path, quick: bool) -> tuple[dict[str, dict[str, float]], str]:
    """Train the four language models, evaluate each on the test text, and let the last one write.

    Args:
        folder: gets one checkpoint folder a preset.
        quick: a few steps only.

    Returns:
        preset -> column of the table -> value; and the generated text.
    """
    from train_causal_lm import train
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from hf_imgproc_attn.training_support.argument_parser import parse_arguments
    from hf_imgproc_attn.training_support.arguments import TEXT_TRAINER_DEFAULTS, TextDataArguments
    from hf_imgproc_attn.training_support.evaluation import text_robustness
    from hf_imgproc_attn.training_support.text_data import load_text_splits

    table: dict[str, dict[str, float]] = {}
    for preset in PRESETS:
        print(f"\n== Python's manual, {preset}", flush=True)
        words = _options(TEXT_OPTIONS, preset, folder / f"gpt2_{preset}", quick)
        arguments = parse_arguments(words, TextDataArguments, TEXT_TRAINER_DEFAULTS, "")
        result = train(arguments)
        tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
        model = AutoModelForCausalLM.from_pretrained(result.output_dir)
        test = load_text_splits(arguments.data)["test"]
        scores = text_robustness(model, tokenizer, test, arguments.data.block_size or 0, seed=SEED)
        table[preset] = {
            **_costs(result.record),
            **{f"{name}, a word": values["word_perplexity"] for name, values in scores.items()},
            **{f"{name}, a token": values["perplexity"] for name, values in scores.items()},
        }
    set_seed(SEED)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    # As many tokens as the model has positions.
    sampling = {"do_sample": True, "top_k": 20, "temperature": 0.8, "max_length": model.config.n_positions}
    return table, tokenizer.decode(model.generate(**inputs, **sampling)[0], skip_special_tokens=True)


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


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against the noise level, one line a preset.

    Args:
        table: from :func:`compare_images`.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for preset, values in table.items():
        heights = [values["clean"], *(values[f"noise {sigma:g}"] for sigma in NOISE_SIGMAS)]
        axes.plot([0, *NOISE_SIGMAS], [100 * height for height in heights], marker="o", label=preset)
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
    require_extras("train", "robustness", "viz")
    import torch

    # Models this small gain little from a second thread, and lose much where other programs want the cores too.
    torch.set_num_threads(1)
    started = time.perf_counter()
    if output_dir.exists() and not (output_dir / _MARKER).is_file() and any(output_dir.iterdir()):
        raise UsageError(
            f"output_dir must be empty or an earlier demo's, got {str(output_dir)!r}, which holds other files"
        )
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    (output_dir / _MARKER).write_text("{}\n", encoding="utf-8")

    images = compare_images(output_dir, quick)
    texts, sample = compare_texts(output_dir, quick)
    print("\n== a fresh process without this package", flush=True)
    fresh = load_in_fresh_process(output_dir / "vit_bilateral_twicing", output_dir / "digits")
    draw(images, output_dir / "accuracy_against_noise.png")
    seconds = time.perf_counter() - started

    percent = {preset: {name: _percent(name, value) for name, value in row.items()} for preset, row in images.items()}
    plain = {preset: {name: f"{value:,.1f}" for name, value in row.items()} for preset, row in texts.items()}
    for row in plain.values():
        row["parameters"] = row["parameters"].removesuffix(".0")
    image_table, text_table = _markdown(percent), _markdown(plain)
    note = "One seed and short training: the figures show how the variants are compared, not which is better."
    if quick:
        note = "Quick run: a few steps only, a check that everything runs. The figures mean nothing."
    report = f"""# Demonstration

{note} Seed {SEED}; {seconds:.0f} s in all.

## Digits (scikit-learn, 8 x 8): test accuracy in %

Gaussian noise with the given standard deviation and FGSM with the given epsilon, pixels in [0, 1].

{image_table}

![accuracy against noise](accuracy_against_noise.png)

## Python's manual: test perplexity

Word swap replaces 1.5 % of the words by AAA. A word is a whitespace-separated word or the end of a line.

{text_table}

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
    print(f"{fresh}\n\ndigits: test accuracy in %\n{image_table}\n\nPython's manual: test perplexity\n{text_table}\n")
    print(f"written by bilateral_twicing:\n{sample}\n\n{note}\n{seconds:.0f} s; report in {output_dir / 'report.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only: a check, not a result")
    options = parser.parse_args(argv)
    return exit_code(lambda: run(options.output_dir, options.quick))


def _options(recipe: str, preset: str, folder: Path, quick: bool) -> list[str]:
    shortened = "--max_steps 3 --max_eval_samples 40" if quick else ""
    return [*f"{recipe} {COMMON_OPTIONS} {shortened}".split(), "--preset", preset, "--output_dir", str(folder)]


def _costs(record: dict[str, Any]) -> dict[str, float]:
    return {"parameters": record["parameters"]["total"], "training s": record["training_seconds"]}


def _percent(name: str, value: float) -> str:
    if name == "parameters":
        return f"{value:,}"
    return f"{value:.1f}" if name == "training s" else f"{100 * value:.1f}"


def _markdown(table: dict[str, dict[str, str]]) -> str:
    columns = list(next(iter(table.values())))
    rows = [["preset", *columns], *([preset, *(row[name] for name in columns)] for preset, row in table.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns) + 1)]
    rows.insert(1, ["-" * width for width in widths])
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    sys.exit(main())
