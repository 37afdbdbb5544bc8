"""How the samples of an optimizer's step are cut: on each device, in each process, over accumulated gradients."""

from typing import Any, NamedTuple

from hf_imgproc_attn.errors import UsageError

OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that, with the number of processes, make the batch of a step."""


class Batches(NamedTuple):
    """A cut of the batch of a step.

    per_device: samples that a process takes at once.
    accumulated: how often it does before a step.
    processes: that share the samples.
    """

    per_device: int
    accumulated: int
    processes: int

    @classmethod
    def of(cls, trainer: dict[str, Any], processes: int | None) -> "Batches | None":
        """From the options of the Trainer in a run's record, or None where the record does not say."""
        values = (*(trainer.get(name) for name in OPTIONS), processes)
        return cls(*(int(value) for value in values if value is not None)) if None not in values else None

    @property
    def samples(self) -> int:
        """Of one step."""
        return self.per_device * self.accumulated * self.processes

    def comes_out_even(self, samples: int, drop_last: bool) -> bool:
        """Whether each step of an epoch has the same number of samples, what is left over at its end being dropped."""
        at_once = self.per_device * self.processes
        return (drop_last or samples % at_once == 0) and samples // at_once % self.accumulated == 0


def check_same_steps(before: Batches, now: Batches, samples: int | None, drop_last: bool) -> None:
    """Refuse another cut of the steps' batches where the last step of an epoch would get other samples.

    Args:
        before: how they were cut.
        now: how they are to be cut.
        samples: of the training split; None: it is a stream, of which each process has its own rows.
        drop_last: whether the incomplete batch of an epoch is dropped.

    Raises:
        UsageError: naming the two.
    """
    if before == now or (samples is None and before.processes == now.processes):
        return
    if samples is None:
        raise UsageError(
            f"the run was started in {_words(before)}; in {now.processes} processes a stream is shared in another "
            "order: go on in as many as before"
        )
    same = before.per_device * before.processes == now.per_device * now.processes and drop_last
    if not same and not (before.comes_out_even(samples, drop_last) and now.comes_out_even(samples, drop_last)):
        raise UsageError(
            f"the run was started in {_words(before)}; in {_words(now)} the last step of an epoch of {samples} "
            "samples would get others: keep per_device_train_batch_size x processes"
        )


def _words(cut: Batches) -> str:
    return f"{cut.processes} processes x {cut.per_device} samples x {cut.accumulated} accumulated batches"
