"""One run, from its folder to its final checkpoint: what both training scripts share around the ``Trainer``."""

import os
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn import records
from hf_imgproc_attn.cards.filters import lens_history
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.output_paths import check_output_folder, write_or_keep, writing
from hf_imgproc_attn.training_support.adapters import base_model, check_adapters, merged
from hf_imgproc_attn.training_support.arguments import Arguments
from hf_imgproc_attn.training_support.checkpoints import (
    full_disk_named,
    newest_complete_checkpoint,
    saved_filters,
)
from hf_imgproc_attn.training_support.trackers import check_trackers, tracker_named
from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_imgproc_attn.training_support.trainer import ScriptTrainer

EMBEDDED_EPOCHS = 10

_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass
class Run:
    """A run whose options and folder have been checked.

    Attributes:
        arguments: the parsed command line.
        training_args: the ``TrainingArguments`` made from it.
        record: the content of ``run.json``.
        resume_from: the checkpoint to go on from, None to start at the beginning.
    """

    arguments: Arguments[Any]
    training_args: "TrainingArguments"
    record: dict[str, Any]
    resume_from: str | None


@dataclass
class Result:
    """What a finished run achieved.

    Attributes:
        output_dir: folder of the checkpoint and ``run.json``.
        metrics: split -> metric -> value.
        record: the content of ``run.json``.
        trainer: with the trained model and the data.
    """

    output_dir: str
    metrics: dict[str, dict[str, float]]
    record: dict[str, Any]
    trainer: "ScriptTrainer"


def begin_run(task: str, arguments: Arguments[Any], defaults: dict[str, Any], *, embedded: bool) -> Run:
    """Build the ``TrainingArguments``, check the output folder, choose the checkpoint to resume from, seed everything.

    Args:
        task: ``image-classification`` or ``causal-lm``.
        arguments: the parsed command line.
        defaults: the script's defaults for fields of ``TrainingArguments``.
        embedded: whether the data are the small embedded ones, which get more epochs by default.

    Raises:
        UsageError: for wrong options, several processes that would train one model each, or a folder that cannot be
            written or holds something else.
    """
    import torch
    from transformers import set_seed

    from hf_imgproc_attn.training_support.faults import wait_no_longer

    start = arguments.model.model_name_or_path
    defaults = {
        **defaults,
        "learning_rate": 1e-3 if start is None else 5e-5,
        "num_train_epochs": EMBEDDED_EPOCHS if embedded else 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Several processes without an accelerator find each other only where the CPU was asked for.
        "use_cpu": not torch.accelerator.is_available(),
    }
    variant = arguments.model.preset or ("softmax" if start is None else _last_part(start))
    output_dir = arguments.run.output_dir or f"outputs/{_last_part(arguments.data.dataset_name)}-{variant}"
    check_output_folder(output_dir, "output_dir")
    training_args = build_training_arguments(arguments, defaults, output_dir)
    _check_processes(training_args)
    if training_args.use_cpu and training_args.world_size > 1:
        wait_no_longer(training_args.ddp_timeout_delta)
    check_adapters(arguments.model, training_args)
    check_trackers(training_args)
    if training_args.push_to_hub and arguments.run.license is not None and training_args.process_index == 0:
        from hf_imgproc_attn.hub.client import connect
        from hf_imgproc_attn.hub.repository import check_licence

        check_licence(connect(), arguments.run.license)
    record = records.start_record(task, arguments, training_args)
    if training_args.process_index == 0:
        records.check_output_dir(output_dir, record, arguments.run.resume)
    resume_from = None
    if arguments.run.resume:
        checkpoint = newest_complete_checkpoint(output_dir)
        resume_from = None if checkpoint is None else str(checkpoint)
        if training_args.process_index == 0:
            print(
                f"resuming from {resume_from}"
                if resume_from
                else f"no complete checkpoint in {output_dir}: from the start"
            )
    set_seed(training_args.seed)
    return Run(arguments, training_args, record, resume_from)


def _check_processes(training_args: "TrainingArguments") -> None:
    """Refuse a launch of several processes that do not know each other, or cut tokens or heads between them.

    Raises:
        UsageError: if the launcher's number of processes is not the Trainer's, or for another way of sharing the work
            than by rows of a batch.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    # Each process would see a part of the tokens, and the filters would not look at the others' without a word.
    config = training_args.parallelism_config
    for name, what in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        size = getattr(config, f"{name}_size", None) or os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE")
        if int(size or 1) > 1:
            raise UsageError(
                f"parallelism_config.{name}_size must be 1, got {size}: this script knows no {what} parallelism of "
                "accelerate's; DDP and FSDP2 share the batch (training/launch/), train_causal_lm shares tokens by "
                "--context_parallel; for heads see docs/scaling.md"
            )
    if launched > 1 and training_args.world_size == 1:
        raise UsageError(
            f"{launched} processes were started (WORLD_SIZE), but on {training_args.device} each would train alone "
            "into one folder: add --use_cpu to train on the CPUs together, or start one process"
        )


def adapt_to_data(run: Run, train_samples: int | None, has_validation: bool) -> None:
    """Defaults that depend on the data; what the user set stays.

    The last, incomplete batch of an epoch is dropped (the order is new in every epoch): several processes would fill
    it up with repeated samples, and so train on something else than one process with their batches together. Without
    a validation split there is no evaluation during training.

    Args:
        run: from :func:`begin_run`.
        train_samples: size of the training split; None: it is a stream.
        has_validation: whether there is a validation split.

    Raises:
        UsageError: if evaluation during training was asked for and there is no validation split.
    """
    from transformers import IntervalStrategy

    args = run.training_args
    if "dataloader_drop_last" not in run.arguments.trainer:
        groups = args.world_size // getattr(run.arguments.data, "context_parallel", 1)
        args.dataloader_drop_last = train_samples is None or train_samples >= args.train_batch_size * groups
    if has_validation:
        return
    if args.load_best_model_at_end or (
        "eval_strategy" in run.arguments.trainer and args.eval_strategy != IntervalStrategy.NO
    ):
        raise UsageError(
            "eval_strategy must be no, and load_best_model_at_end off, without a validation split; got "
            f"{args.eval_strategy.value} and {args.load_best_model_at_end}"
        )
    args.eval_strategy = IntervalStrategy.NO


def train_and_save(
    run: Run,
    trainer: "ScriptTrainer",
    fingerprints: dict[str, Any],
    splits: dict[str, Any],
    on_saved: Callable[[str], None] | None = None,
) -> Result:
    """Train, save the final checkpoint, evaluate, and complete ``run.json``.

    Args:
        run: from :func:`begin_run`.
        trainer: ready to train.
        fingerprints: split -> fingerprint of the data.
        splits: split -> data set and ``compute_metrics`` of the final evaluation, in the order of the table.
        on_saved: see :func:`.fitting.fit`.

    Raises:
        UsageError: if a run is resumed on other data, if the disk is full, if a loss is no number, if
            another process of the launch is lost, or if publishing is refused.
    """
    from hf_imgproc_attn.filtered import recorded_config, recorded_filter
    from hf_imgproc_attn.models.any_filter import is_filtered
    from hf_imgproc_attn.training_support.divergence import DivergenceStop, has_diverged
    from hf_imgproc_attn.training_support.faults import NotFiniteSteps, faults_named, some, steps_left_out

    main = trainer.is_world_process_zero()
    drop_last = bool(run.training_args.dataloader_drop_last)
    records.check_same_data(run.record, fingerprints, drop_last, length_of(trainer.train_dataset))
    if run.resume_from is None:
        for name in ("sessions", "training_seconds"):  # of steps that are trained again
            run.record.pop(name, None)
    elif "sessions" in run.record:
        run.record["sessions"][-1]["resumed_from"] = run.resume_from
    model = trainer.model
    run.record["arguments"]["trainer"] = records.trainer_options(run.training_args)
    run.record |= {
        "data_fingerprint": fingerprints,
        "parameters": {"total": model.num_parameters(), "trained": model.num_parameters(only_trainable=True)},
        "model_config": recorded_config(base_model(model)),
        "resumed_from": run.resume_from,
    }
    if is_filtered(model):
        run.record["applied_filter"] = recorded_filter(base_model(model))
    options = run.arguments.run
    if options.prepare_only:
        return Result(run.training_args.output_dir, {}, run.record, trainer)
    if not options.evaluate_test:
        splits = {name: split for name, split in splits.items() if name != "test"}
    if options.stop_diverged:
        run.training_args.logging_nan_inf_filter = False
        trainer.add_callback(DivergenceStop())
    else:
        trainer.not_finite = NotFiniteSteps(trainer, skip=options.on_nan_loss == "skip")
        trainer.add_callback(trainer.not_finite)
    if main:
        print(
            f"{type(model).__name__}: {model.num_parameters():,} parameters; output in {run.training_args.output_dir}"
        )
        records.write_record(run.training_args.output_dir, run.record)
    with faults_named(run.training_args.output_dir, run.training_args.world_size, options.data_timeout):
        outcome, metrics, seconds = _trained(run, trainer, splits)
    model = trainer.model
    if main:
        history = trainer.state.log_history
        left_out = steps_left_out(history)
        run.record |= {
            "status": "diverged" if options.stop_diverged and has_diverged(history) else "finished",
            "steps": trainer.state.global_step,
            "model_config": recorded_config(base_model(model)),
            "metrics": {"train": outcome.metrics, **metrics},
            **({"steps_left_out": left_out} if left_out else {}),
            "train_loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
            "eval_history": [[entry["step"], _measured(entry, "eval")] for entry in history if "eval_loss" in entry],
            **({} if options.lens_every is None else {"lens_history": lens_history(history)}),
            # Of all sessions that came to their end; a killed one has left no time.
            "training_seconds": run.record.get("training_seconds", 0.0) + seconds,
            "weights_sha256": records.weights_sha256(run.training_args.output_dir),
        }
        if (filters := _filters(run, trainer)) is not None:
            run.record["filter_summary"] = filters
        print(metrics_table(metrics))
        if left_out:
            print(f"left out, because loss or gradient was not finite: {len(left_out)} steps ({some(left_out)})")
        path = Path(run.training_args.output_dir) / records.FILE_NAME
        write_or_keep(path, lambda file: records.write_json(file, run.record), "output_dir")
        print(
            f"trained {trainer.state.global_step} steps in {seconds:.0f} s; checkpoint and run.json in {path.parent}"
        )
        if on_saved is not None:
            on_saved(run.training_args.output_dir)
        if run.training_args.push_to_hub:
            _publish(run.training_args, str(trainer.hub_model_id), run.record["arguments"]["run"]["license"])
    return Result(run.training_args.output_dir, metrics, run.record, trainer)


def length_of(rows: Any) -> int | None:
    """How many samples there are; of a stream None."""
    return len(rows) if hasattr(rows, "__len__") else None


def _trained(
    run: Run, trainer: "ScriptTrainer", splits: dict[str, Any]
) -> tuple[Any, dict[str, dict[str, float]], float]:
    """Train, save and evaluate: what the Trainer says of it, split -> metric -> value, and seconds of training."""
    started = time.perf_counter()
    with full_disk_named(run.training_args.output_dir), tracker_named(run.training_args.report_to):
        outcome = trainer.train(resume_from_checkpoint=run.resume_from)
    seconds = time.perf_counter() - started
    if run.arguments.model.peft_merge:
        trainer.model = merged(trainer.model)
    _save_model(run, trainer)
    metrics = {}
    for name, (dataset, compute_metrics) in splits.items():
        trainer.compute_metrics = compute_metrics
        metrics[name] = _measured(trainer.evaluate(dataset, metric_key_prefix=name), name)
    return outcome, metrics, seconds


def _filters(run: Run, trainer: "ScriptTrainer") -> dict[str, Any] | None:
    """The numbers of the trained filters; of a model whose parameters are shards from its files."""
    from hf_imgproc_attn.cards.filters import recorded
    from hf_imgproc_attn.filtered import applied_summary
    from hf_imgproc_attn.models.any_filter import is_filtered

    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_filtered(trainer.model) and not is_sharded:
        return recorded(applied_summary(trainer.model))
    if not trainer.is_deepspeed_enabled:
        return saved_filters(run.training_args.output_dir)
    from transformers.integrations import deepspeed

    # With ZeRO-3 Transformers shares every model that is built, with processes that do not build this one.
    deepspeed.unset_hf_deepspeed_config()
    try:
        return saved_filters(run.training_args.output_dir)
    finally:
        deepspeed.set_hf_deepspeed_config(run.training_args.hf_deepspeed_config)


def _save_model(run: Run, trainer: "ScriptTrainer") -> None:
    """Save the final checkpoint; where the folder cannot be written any more, in a temporary one.

    Shards are put together, whatever the run's checkpoints hold: of them alone the Trainer would save no model.

    Raises:
        UsageError: if the folder cannot be written; says what is left.
    """
    folder = run.training_args.output_dir
    trainer.restore_configuration()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        with full_disk_named(folder):
            trainer.save_model()
            trainer.save_state()
    except UsageError as error:
        if run.training_args.world_size > 1:  # saving is something that all processes do together
            raise
        kept = tempfile.mkdtemp(prefix="hf_imgproc_attn_")
        try:
            with writing(kept):
                trainer.save_model(kept)
        except (UsageError, RuntimeError):
            raise error from None
        raise UsageError(f"{error}; the trained model is kept in {kept}") from error


def _publish(training_args: "TrainingArguments", repo_id: str, license: str | None) -> None:  # noqa: A002
    """Publish the finished run; what it has learned is on disk, whatever the Hub says."""
    from hf_imgproc_attn.hub.publishing import publish

    words = ["imgproc-attn", "publish", str(training_args.output_dir), "--repo-id", repo_id]
    words += ["--private"] if training_args.hub_private_repo else []
    words += ["--revision", training_args.hub_revision] if training_args.hub_revision else []
    again = shlex.join(words)
    try:
        publication = publish(
            training_args.output_dir,
            repo_id,
            private=bool(training_args.hub_private_repo),
            revision=training_args.hub_revision,
            license=license,
        )
    except UsageError as error:
        raise UsageError(f"the run is finished, but not published: {error}; to publish it later: {again}") from error
    if publication is not None:
        print(publication)


def metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    """A small table of the measured values: one row a split."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["split", *(name.replace("_", " ") for name in names)]]
    rows += [[split, *(_number(values[name]) for name in names)] for split, values in metrics.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _measured(entry: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of one evaluation, without the times that the Trainer reports beside them."""
    values = {key.removeprefix(f"{prefix}_"): value for key, value in entry.items() if key.startswith(f"{prefix}_")}
    return {name: value for name, value in values.items() if name not in _TIMES}


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _last_part(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name.rstrip("/").split("/")[-1]
