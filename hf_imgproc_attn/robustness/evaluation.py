"""The work of ``imgproc-attn robustness``: measure a checkpoint, keep what is known, write and show it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, refuse_missing_path, require_extras
from ..output_paths import check_new_files, check_output_folder, write_or_keep
from ..records import device_description, git_state, package_versions, write_json
from . import report
from .loading import IMAGES, LABELLED_TEXTS, Data, Subject, load_subject, task_of
from .settings import STANDARD_CORRUPTIONS, ImageSettings, TextSettings, as_plain

RECORD, TABLES, FIGURE = "robustness.json", "robustness.md", "robustness.png"
PACKAGES = ("adversarial-robustness-toolbox", "opencv-python-headless", "scikit-image", "scipy", "pillow")
"""What the values depend on beside the packages that every record names."""


class Settings(NamedTuple):
    """What is measured of a checkpoint, by its kind.

    Attributes:
        images: of an image classifier.
        texts: of a model of texts.
        given: options of images, and options of texts, that the user gave: those of the other kind are refused.
        block_size: tokens that a model of texts reads at once.
    """

    images: ImageSettings = ImageSettings()
    texts: TextSettings = TextSettings()
    given: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    block_size: int | None = None


def run(
    checkpoint: str,
    data: Data,
    settings: Settings,
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
        checkpoint: a folder or a Hub name of an image classifier, a causal language model or a text classifier.
        data: which rows.
        settings: what is measured.
        baseline: another image classifier, or the folder or file of its results, for the mean corruption error.
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
    require_extras("train", "viz")
    for option, name in (("checkpoint", checkpoint), ("baseline", baseline), ("dataset_name", data.dataset_name)):
        refuse_missing_path(option, name)
    folder = check_output_folder(output)
    if (folder / "run.json").exists():  # `evaluate` keeps its own robustness.json there, for the card
        raise UsageError(f"output must be a folder of its own, got {str(output)!r}, which holds a run")
    if not resume:
        check_new_files([folder / name for name in (RECORD, TABLES, FIGURE)], force)
    earlier = _read_record(folder / RECORD, "--resume") if resume else None
    task = task_of(checkpoint)
    chosen = _settings_for(task, settings, baseline)
    if baseline is not None:
        _check_baseline(baseline)
    subject = load_subject(checkpoint, task, data, device, settings.block_size)
    other = None if baseline is None else _load_baseline(baseline, data, settings.images, device, subject)
    identity = {**subject.identity, "settings": as_plain(chosen), "baseline": baseline}
    if settings.block_size is not None:
        identity["settings"]["block_size"] = settings.block_size
    record = _begin(checkpoint, identity, subject, earlier)
    keep = _Keeper(folder / RECORD, record, show or _to_standard_error)
    only_corrupted = dataclasses.replace(settings.images, attacks=(), sigmas=())
    keep.total = _count(chosen, task)
    if isinstance(other, Subject):
        keep.total += _count(only_corrupted, task)
    found = _measure(subject, chosen, record["results"], keep)
    record |= {name: value for name, value in found.items() if name not in ("settings", "seconds")}
    if baseline is not None and other is not None:
        from .scores import mean_corruption_error

        about = record.setdefault("baseline", {"name": _public_name(baseline), "results": []})
        if isinstance(other, Subject):
            other = _measure(other, only_corrupted, about["results"], keep)["results"]
        about["results"] = other
        record["mean_corruption_error"] = mean_corruption_error(record["results"], other)
    corruptions = settings.images.corruptions
    if task == IMAGES and "frost" not in corruptions and len(corruptions) >= len(STANDARD_CORRUPTIONS) - 1:
        record["left_out"] = {"frost": "which needs photographs (frost_pictures)"}
    record |= {"status": "finished", "seconds": record["seconds"] + keep.seconds}
    write_or_keep(folder, lambda place: _write(place, record))
    return record


def _settings_for(task: str, settings: Settings, baseline: str | None) -> ImageSettings | TextSettings:
    """The settings of the task, when none of the other kind were given."""
    of_images, of_texts = settings.given
    foreign = of_texts if task == IMAGES else of_images
    if foreign:
        raise UsageError(f"{foreign[0]} is not used with a checkpoint for {task}")
    if baseline is not None and (task != IMAGES or not settings.images.corruptions):
        got = "got none" if task == IMAGES else f"got a checkpoint for {task}"
        raise UsageError(f"a baseline is for the mean corruption error, which needs corruptions of images, {got}")
    if task != IMAGES:
        return settings.texts
    require_extras("robustness")
    return settings.images


def _count(settings: ImageSettings | TextSettings, task: str) -> int:
    from . import images, texts

    if isinstance(settings, TextSettings):
        return texts.count_measurements(settings, is_classifier=task == LABELLED_TEXTS)
    return images.count_measurements(settings)


def _measure(
    subject: Subject, settings: ImageSettings | TextSettings, known: list[Any], keep: _Keeper
) -> dict[str, Any]:
    return subject.evaluate(settings=settings, done=list(known), on_result=lambda result: keep(known, result))


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
        metric, value = result["metric"].replace("_", " "), result["value"]
        shown = f"{100 * value:.1f} %" if metric == "accuracy" else f"{metric} {value:.2f}"
        self.show(
            f"[{number}/{self.total}] {result['disturbance']}{parameters}: {shown} ({now - self._before:.1f} s, about "
            f"{left:.0f} s left)"
        )
        self._before = now


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _begin(
    checkpoint: str, identity: dict[str, Any], subject: Subject, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """A new record, or the earlier one where it is of the same measurements."""
    record: dict[str, Any] = {
        "format": 1,
        "status": "running",
        "checkpoint": _public_name(checkpoint),
        "task": subject.task,
        "identity": identity,
        "results": [],
        "seconds": 0.0,
        "versions": package_versions(*PACKAGES),
        "git": git_state(),
        "device": device_description(subject.device, processes=1),
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
        if "format" not in record or "identity" not in record or "results" not in record:
            raise ValueError("it is no such record")
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


def _check_baseline(baseline: str) -> None:
    """Refuse what is no baseline, before anything is loaded or measured."""
    if _is_record(baseline):
        _read_baseline(baseline)
        return
    path = Path(baseline)
    if path.is_dir() and not (path / "config.json").exists():
        raise UsageError(
            "baseline must be a checkpoint, or the results of imgproc-attn robustness, got the folder "
            f"{baseline!r}, which has neither config.json nor {RECORD}"
        )
    task = task_of(baseline, "baseline")
    if task != IMAGES:
        raise UsageError(f"baseline must be an image classifier, got {baseline!r}, a checkpoint for {task}")


def _read_baseline(baseline: str) -> dict[str, Any]:
    path = Path(baseline)
    return _read_record(path if path.suffix == ".json" else path / RECORD, "baseline")


def _load_baseline(
    baseline: str, data: Data, settings: ImageSettings, device: str | None, subject: Subject
) -> Subject | list[Any]:
    """The results of a baseline that was measured on the same rows, or the baseline, to be measured on them."""
    about = subject.identity["data"]
    if not _is_record(baseline):
        given = data._replace(dataset_name=about["dataset_name"], split=about["split"])
        return load_subject(baseline, IMAGES, given, device, option="baseline")
    other = _read_baseline(baseline)
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
