"""A finished run as a publication: what must be right about its folder, which files travel, and their version."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones import FILTERED_MODEL_TYPE, OF_MODEL_TYPE, OF_TASK, SAVED_MODEL_TYPES, TASKS
from ..errors import UsageError, require_extras
from .travelling_code import audit_folder, missing_imports

if TYPE_CHECKING:
    from ..cards.rendering import RunResults

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# Of the run's folder; optimizer states, checkpoints, logs and pickled arguments stay at home.
TRAVELLING = (
    "config.json", "generation_config.json", *WEIGHTS, "*.py", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "robustness.json", "predictions.png",
)  # fmt: skip
CARD, CURVES, RECORD = "README.md", "training_curves.png", "run.json"


@dataclass(frozen=True)
class RunFolder:
    """A run that can be published.

    Attributes:
        folder: where it is.
        results: what ``run.json`` and ``robustness.json`` say.
        config: the content of ``config.json``.
    """

    folder: Path
    results: RunResults
    config: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a publication consists of.

    Attributes:
        files: path in the repository -> a file of the run, or the content itself; without the card, which depends on
            the card that is there already.
        card: the generated card that pins a revision.
        tag: names this content: the package's version and the first digits of a SHA-256 over all files.
    """

    files: dict[str, Path | bytes]
    card: Callable[[str], str]
    tag: str


def read_run(folder: str | Path) -> RunFolder:
    """Check that a folder holds a finished run whose record, weights and code belong together.

    Raises:
        UsageError: naming the folder and what is wrong: no such folder, no record, a run that is not finished, no
            weights, weights other than the record's, values that are not finite, a file that is no JSON, no tokenizer
            or image processor, code that is missing (also what the named files import) or that does what a model has
            no need for.
    """
    require_extras("hub")
    from ..cards.rendering import load_results

    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"run must be the folder of a finished training run, got {str(folder)!r}, which is no folder")
    results = load_results(path)
    _check_weights(path, results.record)
    config = _read_config(path, results.record["task"])
    for name in sorted({file.name for file in travelling_files(path).values() if file.suffix == ".json"}):
        _read_json(path / name)
    needed = OF_TASK[results.record["task"]].processor_files
    if not any((path / name).is_file() for name in needed):
        raise UsageError(f"run {str(folder)!r} lacks {' or '.join(needed)}: nobody could give the model an input")
    named = {_file_of(reference) for reference in config["auto_map"].values()}
    if missing := sorted(name for name in named if not (path / name).is_file()):
        raise UsageError(f"run {str(folder)!r} lacks {', '.join(missing)}, which its config.json names as its code")
    if imports := missing_imports(path, named):
        raise UsageError(f"run {str(folder)!r} lacks files of its code: {'; '.join(imports)}")
    findings = audit_folder(path)
    if findings:
        raise UsageError(f"run {str(folder)!r} has code that a model has no need for: {'; '.join(findings)}")
    return RunFolder(path, results, config)


def travelling_files(folder: Path) -> dict[str, Path]:
    """The files of a run's folder that are published as they are, by name."""
    return {path.name: path for pattern in TRAVELLING for path in sorted(folder.glob(pattern)) if path.is_file()}


def contents(run: RunFolder, repo_id: str, baseline: RunResults | None, license: dict[str, Any]) -> Contents:  # noqa: A002
    """The files of a publication, the card and the curves made anew; nothing is written.

    Args:
        run: from :func:`read_run`.
        repo_id: ``NAME/ID``, for the card.
        baseline: a run of the same recipe to stand beside it in the card, or None.
        license: the keys of the card that name the licence, from :mod:`.licences`.

    Raises:
        UsageError: if the card cannot be made, e.g. because the baseline has another recipe.
    """
    from .. import __version__
    from ..cards.curves import draw_curves
    from ..cards.rendering import render_card
    from ..records import public_record

    def card(revision: str) -> str:
        return render_card(run.results, revision=revision, repo_id=repo_id, baseline=baseline, license=license)

    files: dict[str, Path | bytes] = {**travelling_files(run.folder)}
    files[RECORD] = (json.dumps(public_record(run.results.record), indent=2, sort_keys=True) + "\n").encode()
    # The picture's bytes depend on the drawing library, and the card names the tag: neither is part of what is hashed.
    tag = f"v{__version__}-{_digest({**files, CARD: card('TAG').encode()})[:8]}"
    if run.results.record.get("train_loss") or run.results.record.get("eval_history"):
        picture = io.BytesIO()
        draw_curves(run.results.record, picture)
        files[CURVES] = picture.getvalue()
    return Contents(files, card, tag)


def _digest(files: dict[str, Path | bytes]) -> str:
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        own = hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
        total.update(f"{own}  {name}\n".encode())
    return total.hexdigest()


def _check_weights(folder: Path, record: dict[str, Any]) -> None:
    """The weights are there, are those of the record, and are all numbers."""
    from ..records import weights_sha256

    found = weights_sha256(str(folder))
    if not found:
        raise UsageError(f"run {str(folder)!r} has no weights (*.safetensors)")
    recorded = record.get("weights_sha256")
    if found != recorded:
        raise UsageError(
            f"run {str(folder)!r} has weights other than those its {RECORD} was written for: SHA-256 {found}, "
            f"recorded {recorded}"
        )
    from safetensors import SafetensorError, safe_open

    for name in found:
        try:
            with safe_open(str(folder / name), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a dictionary: it has no __iter__
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise UsageError(
                            f"run {str(folder)!r} has weights that are not finite numbers: {key} in {name}"
                        )
        except SafetensorError as error:
            raise UsageError(f"the weights {str(folder / name)!r} are truncated or corrupt: {error}") from error


def _read_config(folder: Path, task: str) -> dict[str, Any]:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise UsageError(
            f"run {str(folder)!r} holds an adapter, not a model: train with --peft_merge, or merge it into the model "
            "in base/, to publish what loads by itself"
        )
    config = _read_json(path)
    if config.get("model_type") not in SAVED_MODEL_TYPES:
        raise UsageError(
            f"{str(path)!r} must have a model_type among {', '.join(SAVED_MODEL_TYPES)}, got "
            f"{config.get('model_type')!r}"
        )
    if config["model_type"] == FILTERED_MODEL_TYPE:
        needed = {"AutoConfig", TASKS[task].auto_class}
    else:
        needed = {"AutoConfig", *(head.auto_class for head in OF_MODEL_TYPE[config["model_type"]].heads)}
    missing = sorted(needed - set(config.get("auto_map") or {}))
    if missing:
        raise UsageError(f"{str(path)!r} lacks the auto_map entries {', '.join(missing)}: save the model again")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def _file_of(reference: str) -> str:
    """``"modeling_x.Class"`` -> ``"modeling_x.py"``."""
    return f"{reference.rpartition('.')[0]}.py"
