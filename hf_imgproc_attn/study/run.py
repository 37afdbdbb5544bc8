"""One run of a study: trained and evaluated by its training script, measured on disturbed data, recorded."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from .. import records
from ..errors import UsageError
from .ledger import DIVERGED, FINISHED, FORMAT
from .measurements import measure
from .plan import Run, Study, training_script
from .sizes import Size


def carry_out(study: Study, run: Run, folder: Path, size: Size) -> dict[str, Any]:
    """Train one model, or go on where a killed process left it, and measure it.

    Args:
        study: of the run.
        run: what is done.
        folder: for checkpoint and ``run.json``.
        size: of its model.

    Returns:
        The record that goes into the ledger.

    Raises:
        UsageError: for data or options that cannot be used, or a full disk.
    """
    record = _train(study, run, folder)
    diverged = record["status"] == DIVERGED
    started = time.perf_counter()
    measurements = [] if diverged else measured(study, run, folder)
    samples = record["steps"] * record["arguments"]["trainer"]["per_device_train_batch_size"]
    samples *= record["arguments"]["trainer"]["gradient_accumulation_steps"] * record["device"]["processes"]
    public = records.public_record(record)
    return {
        "format": FORMAT,
        "study": study.name,
        "version": study.version,
        "identity": run.identity,
        "task": run.task.name,
        "variant": run.variant.name,
        "seed": run.seed,
        "status": DIVERGED if diverged else FINISHED,
        "metrics": _finite(public["metrics"]),
        "measured": {} if diverged else run.task.measure,
        "measurements": _finite(measurements),
        "parameters": record["parameters"],
        "operations": {"step_per_sample": size.compute, "training": size.compute * samples},
        "steps": record["steps"],
        "seconds": {"training": record["training_seconds"], "measuring": time.perf_counter() - started},
        **{name: public[name] for name in ("command", "data_fingerprint", "versions", "git", "device")},
        "weights_sha256": record["weights_sha256"],
    }


def be_quiet() -> None:
    """No progress bars of the libraries in this process: a study has its own lines."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def measured(study: Study, run: Run, folder: Path, record: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What is measured of a finished run beside the clean data; what its ``record`` has of it is taken from there."""
    if not run.task.measure:
        return []
    earlier = ({}, []) if record is None else (record["measured"], record["measurements"])
    return measure(folder, run.task.kind, run.task.measure, study.split, earlier)


def words(study: Study, run: Run, folder: Path) -> list[str]:
    """The command line of the training script for a run in ``folder``."""
    options = [f"--output_dir={folder}", "--paired_start=true", "--stop_diverged=true"]
    options += ["--evaluate_test=false"] if study.split == "validation" else []
    for name, value in (("save_strategy", "no"), ("eval_strategy", "no"), ("disable_tqdm", "true")):
        options += [] if name in run.task.options else [f"--{name}={value}"]
    return [*run.task.words(run.variant, run.seed), *options]


def _train(study: Study, run: Run, folder: Path) -> dict[str, Any]:
    """The run record of a training that is finished, of which a killed process may have done a part or all."""
    from hf_imgproc_attn.training_support.checkpoints import newest_complete_checkpoint

    script = training_script(run.task.kind)
    path, resume = folder / records.FILE_NAME, []
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier.get("status") in (FINISHED, DIVERGED):
            return dict(earlier)
        resume = ["--resume"] if newest_complete_checkpoint(folder) is not None else []
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # of losses, which the record has
        result = script.train(script.read_arguments([*words(study, run, folder), *resume]))
    return dict(result.record)


def _finite(value: Any) -> Any:
    """JSON has no infinite numbers: they become None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_data(study: Study, records_of: dict[str, dict[str, Any]], fingerprints: dict[str, Any]) -> None:
    """Refuse to go on with a ledger whose runs were made with other data than lie here.

    Args:
        study: of the ledger.
        records_of: what has ended.
        fingerprints: name of a task -> split -> fingerprint.

    Raises:
        UsageError: naming the task and the split.
    """
    for name, record in records_of.items():
        for split, found in fingerprints[record["task"]].items():
            before = record["data_fingerprint"].get(split)
            if before != found:
                raise UsageError(
                    f"task {record['task']} of study {study.name}: the {split} split must be the one that run {name} "
                    f"was made with ({before}), got {found}"
                )
