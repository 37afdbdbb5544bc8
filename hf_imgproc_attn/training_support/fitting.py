"""The end of every training script: a model and its data are ready."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.training_support.adapters import with_adapters
from hf_imgproc_attn.training_support.lens_log import LensLog
from hf_imgproc_attn.training_support.trainer import ScriptTrainer
from hf_imgproc_attn.training_support.trainer_setup import Result, Run, adapt_to_data, length_of, train_and_save

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit(
    run: Run,
    model: "PreTrainedModel",
    rows: Mapping[str, Any],
    metrics: Mapping[str, Any],
    fingerprints: dict[str, Any],
    *,
    on_saved: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Train on the training split, evaluate the others, save and record.

    Args:
        run: from :func:`~.trainer_setup.begin_run`.
        model: is trained, or the adapters on it where the run asks for adapters.
        rows: split -> data set of what the collator takes.
        metrics: split -> ``compute_metrics``, for all splits but the training one.
        fingerprints: split -> what tells these data from others.
        on_saved: is called with the run's folder by one process, when all is saved and nothing is published yet.
        **options: of the Trainer, such as ``data_collator`` and ``processing_class``.

    Raises:
        UsageError: for options that the data do not allow, or a disk that is full.
    """
    adapt_to_data(run, length_of(rows["train"]), "validation" in rows)
    trainer = ScriptTrainer(
        model=with_adapters(run, model),
        args=run.training_args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        compute_metrics=metrics.get("validation"),
        data_timeout=run.arguments.run.data_timeout,
        context_parallel=getattr(run.arguments.data, "context_parallel", 1),
        **options,
    )
    if run.arguments.run.lens_every is not None:
        trainer.add_callback(LensLog(trainer, rows.get("validation", rows["train"]), run.arguments.run.lens_every))
    evaluated = {split: (rows[split], metrics[split]) for split in rows if split != "train"}
    return train_and_save(run, trainer, fingerprints, evaluated, on_saved)
