"""Train and evaluate every preset by the small recipes, for training/results/: the facts of the example model cards.

    python training/make_results.py --force
    python training/make_results.py --force --only vit_digits_twicing

Minutes on one CPU core. A file holds the run record as it may be published and the robustness of the checkpoint, which
itself is not kept.
"""

import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate_checkpoint import evaluate

from hf_imgproc_attn.backbones import OF_TASK, TASKS
from hf_imgproc_attn.errors import OneLineParser, exit_code, require_extras
from hf_imgproc_attn.models.spec_fields import PRESETS

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result

RECIPES = {task.recipe[0]: task for task in TASKS.values() if task.recipe}
"""Name of a recipe -> its task."""
CONFIGS = {task.recipe[0]: task.recipe[1] for task in TASKS.values() if task.recipe}
"""Name of a recipe -> its YAML file."""

ONE_RECIPE = {
    "inversion": "vit_digits",
    "dynamic_inversion": "vit_digits",
    "exclusive": "vit_digits",
    "local_linear": "vit_digits",
    "robust": "vit_digits",
    "gated": "vit_digits",
    "sink": "vit_digits",
    "sigmoid": "vit_digits",
    "softpick": "vit_digits",
    "qk_norm": "vit_digits",
    "value_residual": "vit_digits",
    "sinkhorn": "vit_digits",
    "forgetting": "gpt2_pydoc",
    "differential": "vit_digits",
    "delta": "gpt2_pydoc",
}
"""Presets that are one value of one axis, beside those of the papers that the package is about -> their one recipe."""

NAMES = [
    f"{recipe}_{preset}"
    for recipe, task in RECIPES.items()
    for preset in PRESETS
    if preset not in OF_TASK[task.name].refused_presets and ONE_RECIPE.get(preset, recipe) == recipe
]
"""Names of all results: a recipe and a preset that its backbone can have."""
SEED = 0

_CONFIGS = Path(__file__).resolve().parent / "configs"


def run_recipe(recipe: str, preset: str, folder: Path, options: Sequence[str] = ()) -> tuple["Result", dict[str, Any]]:
    """Train a preset by one of :data:`RECIPES` and evaluate the checkpoint on clean and disturbed test data.

    Args:
        recipe: a key of :data:`RECIPES`.
        preset: the variant.
        folder: new; gets checkpoint, ``run.json`` and ``robustness.json``.
        options: further words of the training script's command line.

    Returns:
        The result of the training, and the content of ``robustness.json``.
    """
    script = importlib.import_module(RECIPES[recipe].script)
    words = ["--config", str(_CONFIGS / CONFIGS[recipe]), "--preset", preset, "--seed", str(SEED)]
    words += ["--output_dir", str(folder), *options]
    result = script.train(script.read_arguments(words))
    return result, evaluate(folder)


def make_results(names: Sequence[str], output: Path, force: bool) -> None:
    """Write ``NAME.json`` for every name, which is a recipe and a preset joined by ``_``.

    Raises:
        UsageError: without ``force`` if there is a file of such a name.
    """
    require_extras("train", "robustness")
    import torch

    from hf_imgproc_attn.output_paths import check_new_files
    from hf_imgproc_attn.records import public_record, write_json

    check_new_files([output / f"{name}.json" for name in names], force)

    torch.set_num_threads(1)  # models this small gain nothing from a second one
    for name in names:
        recipe = next(recipe for recipe in RECIPES if name.startswith(f"{recipe}_"))
        with tempfile.TemporaryDirectory() as folder:
            result, robustness = run_recipe(recipe, name.removeprefix(f"{recipe}_"), Path(folder) / name)
        content = {"name": name, "record": public_record(result.record), "robustness": robustness}
        print(f"written: {write_json(output / f'{name}.json', content)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, metavar="NAME", help="(default: all)")
    parser.add_argument(
        "--output", type=Path, default=Path("training/results"), metavar="DIR", help="(default: %(default)s)"
    )

    parser.add_argument("--force", action="store_true", help="replace results that are there")

    def work() -> None:
        options = parser.parse_args(argv)
        make_results(options.only, options.output, options.force)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
