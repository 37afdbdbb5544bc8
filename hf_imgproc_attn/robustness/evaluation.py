"""The work of ``imgproc-attn robustness``: load a checkpoint and data, measure, keep what is known, write it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UsageError, plain_message, refuse_missing_path, require_extras
from ..output_paths import check_new_files, check_output_folder, write_or_keep
from ..records import device_description, git_state, package_versions, write_json
from ..training_support.arguments import ImageDataArguments
from . import report
from .settings import STANDARD_CORRUPTIONS, ImageSettings, as_plain

if TYPE_CHECKING:
    import torch

RECORD, TABLES, FIGURE = "robustness.json", "robustness.md", "robustness.png"
PACKAGES = ("adversarial-robustness-toolbox", "opencv-python-headless", "scikit-image", "scipy", "pillow")
"""What the values depend on beside the packages that every record names."""


class Data(NamedTuple):
    """Which rows are used; None: as the checkpoint's run, or detected."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column_name: str | None = None
    label_column_name: str | None = None
    split: str | None = None
    max_samples: int = 500


class _Subject(NamedTuple):
    """A loaded checkpoint and the images for it."""

    model: Any
    processor: Any
    images: torch.Tensor
    labels: torch.Tensor
    identity: dict[str, Any]


def run(
    checkpoint: str,
    data: Data,
    settings: ImageSettings,
    *,
    baseline: str | None = None,
    device: str | None = None,
    output: str | Path,
    resume: bool = False,
    force: bool = False,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint and write its record, tables and figure.

    Args:
        checkpoint: a folder or a Hub name of an image classifier.
        data: which rows.
        settings: what is measured.
        baseline: another checkpoint, or the folder or file of its results, for the mean corruption error.
        device: ``cpu`` or ``cuda``; None: cuda where there is one.
        output: a folder, made if missing; the record in it is written after every measurement.
        resume: go on with an earlier call's measurements, which must be the same.
        force: replace results of earlier calls.
        show: is called with lines of progress; None: they go to standard error.

    Returns:
        The record, as in the JSON file.

    Raises:
        UsageError: for a checkpoint, data or settings that do not fit, or results that are there already.
    """
    require_extras("train", "robustness", "viz")
    for option, name in (("checkpoint", checkpoint), ("baseline", baseline), ("dataset_name", data.dataset_name)):
        refuse_missing_path(option, name)
    folder = check_output_folder(output)
    if not resume:
        check_new_files([folder / name for name in (RECORD, TABLES, FIGURE)], force)
    earlier = _read_record(folder / RECORD, "--resume") if resume else None
    show = show or _to_standard_error
    if baseline is not None and not settings.corruptions:
        raise UsageError("a baseline is for the mean corruption error, which needs corruptions, got none")
    subject = _load(checkpoint, data, device)
    other = None if baseline is None else _load_baseline(baseline, data, settings, device, subject)
    identity = {**subject.identity, "settings": as_plain(settings), "baseline": baseline}
    record = _begin(checkpoint, identity, subject, earlier)
    keep = _Keeper(folder / RECORD, record, show)
    from .images import count_measurements
    from .scores import mean_corruption_error

    only_corrupted = dataclasses.replace(settings, attacks=(), sigmas=())
    keep.total = count_measurements(settings)
    if isinstance(other, _Subject):
        keep.total += count_measurements(only_corrupted)
    found = _measure(subject, settings, record["results"], keep)
    record |= {name: value for name, value in found.items() if name not in ("settings", "seconds")}
    if baseline is not None and other is not None:
        about = record.setdefault("baseline", {"name": _public_name(baseline), "results": []})
        if isinstance(other, _Subject):
            other = _measure(other, only_corrupted, about["results"], keep)["results"]
        about["results"] = other
        record["mean_corruption_error"] = mean_corruption_error(record["results"], other)
    if "frost" not in settings.corruptions and len(settings.corruptions) >= len(STANDARD_CORRUPTIONS) - 1:
        record["left_out"] = {"frost": "which needs photographs (frost_pictures)"}
    record |= {"status": "finished", "seconds": record["seconds"] + keep.seconds}
    write_or_keep(folder, lambda place: _write(place, record))
    return record


def _measure(subject: _Subject, settings: ImageSettings, known: list[Any], keep: _Keeper) -> dict[str, Any]:
    from .images import evaluate_robustness

    return evaluate_robustness(
        subject.model,
        subject.processor,
        subject.images,
        subject.labels,
        settings,
        done=list(known),
        on_result=lambda result: keep(known, result),
    )


class _Keeper:
    """Writes the record after every measurement and says how far it has come."""

    def __init__(self, path: Path, record: dict[str, Any], show: Callable[[str], None]) -> None:
        self.path, self.record, self.show = path, record, show
        self.total, self._started, self._before = 0, time.perf_counter(), time.perf_counter()
        self._known = len(record["results"]) + len(record.get("baseline", {}).get("results", []))
        self._measured = 0

    @property
    def seconds(self) -> float:
        """Since the measurements began."""
        return time.perf_counter() - self._started

    def __call__(self, results: list[Any], result: dict[str, Any]) -> None:
        if not any(result is other for other in results):
            results.append(result)
        write_json(self.path, self.record)
        self._measured += 1
        now, number = time.perf_counter(), self._known + self._measured
        left = (self.total - number) * self.seconds / self._measured
        parameters = "".join(f", {name} {_short(value)}" for name, value in result["parameters"].items())
        value = f"{100 * result['value']:.1f} %" if result["metric"] == "accuracy" else f"{result['value']:.2f}"
        self.show(
            f"[{number}/{self.total}] {result['disturbance']}{parameters}: {value} ({now - self._before:.1f} s, about "
            f"{left:.0f} s left)"
        )
        self._before = now


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _load(checkpoint: str, data: Data, device: str | None) -> _Subject:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    import hf_imgproc_attn  # noqa: F401  # registers our model types

    place = _device(device)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if not any("ForImageClassification" in name for name in config.architectures or ()):
            raise UsageError(
                f"checkpoint must be an image classifier, got {checkpoint!r} with {config.architectures or 'no head'}"
            )
        model = AutoModelForImageClassification.from_pretrained(checkpoint).to(place)
        processor = AutoImageProcessor.from_pretrained(checkpoint)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"checkpoint {checkpoint!r} cannot be loaded: {plain_message(error)}") from error
    arguments, split = _data_arguments(checkpoint, data)
    images, labels, fingerprint = _load_images(arguments, split, processor, model.config)
    identity = {
        "weights_sha256": _digest_of(model),
        "data": {"dataset_name": arguments.dataset_name, "split": fingerprint.pop("split"), **fingerprint},
    }
    return _Subject(model, processor, images, labels, identity)


def _data_arguments(checkpoint: str, data: Data) -> tuple[ImageDataArguments, str | None]:
    """The options of the data: those given, else those of the run that made the checkpoint, else the embedded ones."""
    given = {name: value for name, value in data._asdict().items() if value is not None}
    split, limit = given.pop("split", None), given.pop("max_samples")
    path = Path(checkpoint) / "run.json"
    options: dict[str, Any] = {}
    if data.dataset_name is None and path.is_file():
        try:
            options = dict(json.loads(path.read_text(encoding="utf-8"))["arguments"]["data"])
            ImageDataArguments(**options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{str(path)!r} does not name data in a way that can be read ({plain_message(error)}): give "
                "--dataset_name"
            ) from error
    return ImageDataArguments(**{**options, **given, "max_eval_samples": limit}), split


def _load_images(
    arguments: ImageDataArguments, split: str | None, processor: Any, config: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Images of the size that the model takes, their labels as the model counts them, and what they are."""
    import torch

    from ..training_support.image_data import load_image_splits
    from ..training_support.image_pixels import load_pixels
    from .classifier import unit_images

    splits = load_image_splits(arguments)
    name = split or ("test" if "test" in splits.rows else "validation")
    if name not in splits.rows:
        raise UsageError(
            f"split must be one that the data set {arguments.dataset_name!r} has ({', '.join(splits.rows)}) and that "
            f"is not trained on, got {name!r}"
        )
    only = dataclasses.replace(splits, rows={name: splits.rows[name]}, labels={name: splits.labels[name]})
    dataset = load_pixels(only, processor, arguments, 0)[name]
    images, labels = unit_images(dataset)
    own = {str(label): index for index, label in config.id2label.items()}
    if set(own) == set(splits.label_names) and len(own) == config.num_labels:  # the same classes in another order
        labels = torch.tensor([int(own[splits.label_names[label]]) for label in labels.tolist()])
    return images, labels, {"split": name, **dataset.fingerprint}


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device must be cpu or cuda, got {name!r}: {plain_message(error)}") from error
    return device


def _digest_of(model: Any) -> str:
    """SHA-256 over all weights of a model, wherever it came from."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _begin(
    checkpoint: str, identity: dict[str, Any], subject: _Subject, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """A new record, or the earlier one where it is of the same measurements."""
    record: dict[str, Any] = {
        "format": 1,
        "status": "running",
        "checkpoint": _public_name(checkpoint),
        "identity": identity,
        "results": [],
        "seconds": 0.0,
        "versions": package_versions(*PACKAGES),
        "git": git_state(),
        "device": device_description(subject.model.device, processes=1),
    }
    if earlier is None:
        return record
    now = json.loads(json.dumps(identity))
    for part in ("weights_sha256", "data", "settings", "baseline"):
        if earlier["identity"].get(part) != now[part]:
            raise UsageError(
                f"--resume needs the same measurements, but {part} was {earlier['identity'].get(part)!r} and is "
                f"{now[part]!r}"
            )
    kept = {name: earlier[name] for name in ("results", "baseline") if name in earlier}
    return record | kept | {"seconds": float(earlier.get("seconds", 0.0))}


def _read_record(path: Path, option: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != 1 or not isinstance(record["results"], list):
            raise ValueError("it is of another version")
        if not {"weights_sha256", "data", "settings", "baseline"} <= record["identity"].keys():
            raise ValueError("it does not say what was measured")
    except FileNotFoundError as error:
        raise UsageError(f"{option} needs the record of an earlier call, but {str(path)!r} is not there") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{option} needs a record of imgproc-attn robustness, got {str(path)!r}: {error}") from error
    return dict(record)


def _is_record(baseline: str) -> bool:
    path = Path(baseline)
    return path.suffix == ".json" or ((path / RECORD).is_file() and not (path / "config.json").exists())


def _load_baseline(
    baseline: str, data: Data, settings: ImageSettings, device: str | None, subject: _Subject
) -> _Subject | list[Any]:
    """The results of a baseline that was measured on the same rows, or the baseline, to be measured on them."""
    about = subject.identity["data"]
    if not _is_record(baseline):
        given = data._replace(dataset_name=about["dataset_name"], split=about["split"])
        return _load(baseline, given, device)
    path = Path(baseline)
    other = _read_record(path if path.suffix == ".json" else path / RECORD, "baseline")
    for name, value in (("seed", settings.seed), ("table", settings.table)):
        if other["identity"]["settings"].get(name) != value:
            raise UsageError(f"the baseline {baseline!r} was measured with another {name}")
    if other["identity"]["data"] != about:
        raise UsageError(f"the baseline {baseline!r} was measured on other data: {other['identity']['data']}")
    return list(other["results"])


def _public_name(checkpoint: str) -> str:
    """A Hub name as it is, and of a path the last part."""
    path = Path(checkpoint)
    return path.resolve().name if path.exists() else checkpoint


def _write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)
    (folder / TABLES).write_text(report.markdown(record), encoding="utf-8")
    report.save_figure(record, folder / FIGURE)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
