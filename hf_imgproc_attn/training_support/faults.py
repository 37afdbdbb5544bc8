"""What goes wrong in the middle of a run: a loss that is no number, a process that is lost, data that do not come."""

from __future__ import annotations

import contextlib
import datetime
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.checkpoints import newest_complete_checkpoint

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer import ScriptTrainer

LEFT_OUT = "left_out"
"""In the Trainer's log, with the step: why a step did not change the weights. Checkpoints keep the log."""

# How gloo, NCCL and torch's store put a process that has ended, or has not answered for `ddp_timeout` seconds.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "wait timeout",
    "failed to recv, got 0 bytes",
    "remote process exited",
    "NCCL communicator was aborted",
    "connectFullMesh failed",
)
# And how torch's loader puts a worker that gives nothing, or has ended.
_SILENT_WORKER = "DataLoader timed out after"
_DEAD_WORKER = ("exited unexpectedly", "is killed by signal")


class NotFiniteSteps(TrainerCallback):
    """Keeps a loss, or gradients, that are infinite or no number away from the weights.

    Looked at is every step, after its last backward pass and before the optimizer's: the loss of each micro-batch, and
    the gradients after clipping. All processes decide alike, since the flag is summed over them. With float16 the
    gradients overflow now and then by design, and the library's loss scaler leaves those steps out itself: there only
    the loss counts.

    Args:
        trainer: whose steps these are.
        skip: leave such steps out, as if they had not been (the learning rate's schedule goes on); otherwise training
            ends at the first one.
    """

    def __init__(self, trainer: ScriptTrainer, skip: bool) -> None:
        self._trainer, self._skip = trainer, skip
        self._losses: list[torch.Tensor] = []

    def saw(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch, a scalar on any device."""
        self._losses.append(loss.detach())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the step out, or end the run.

        Raises:
            UsageError: where a run ends at such a step; names the newest checkpoint.
        """
        losses, self._losses = self._losses, []
        loss = torch.stack([loss.float() for loss in losses]).sum()
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        bad = ~loss.isfinite()
        if scaler is None:
            bad = bad | ~_total(self._trainer.model.parameters(), loss.device).isfinite()
        flag = bad.float()
        if args.world_size > 1:
            flag = self._trainer.accelerator.reduce(flag, "sum")
        if not flag.item():
            return
        if args.process_index > 0 and not self._skip:
            raise SystemExit(2)  # the first process says why
        step, value = state.global_step + 1, loss.item() / len(losses)
        what = f"the loss is {value}" if not math.isfinite(value) else "a gradient is infinite or no number"
        if args.world_size > 1 and math.isfinite(value):
            what = "a loss or gradient is infinite or no number"
        if not self._skip:
            raise UsageError(
                f"{what} in step {step}, so training stopped before it could change the weights; "
                f"{_what_is_left(args.output_dir)}; --resume with --on_nan_loss skip goes on and leaves such steps "
                "out, a lower learning_rate in another output_dir may avoid them"
            )
        state.log_history.append({"step": step, "epoch": state.epoch, LEFT_OUT: what})
        if scaler is None:
            for parameter in self._trainer.model.parameters():  # the optimizer passes over what has no gradient
                parameter.grad = None


def steps_left_out(history: Iterable[dict[str, Any]]) -> list[int]:
    """The steps in the Trainer's log whose loss or gradients were not finite, in order."""
    return [entry["step"] for entry in history if LEFT_OUT in entry]


def some(steps: list[int], most: int = 10) -> str:
    """The first steps of a list, in words."""
    return ", ".join(map(str, steps[:most])) + (", ..." if len(steps) > most else "")


def _total(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.Tensor:
    """Sum of the absolute values of this process's share of the gradients: finite where all of them are, a scalar."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shares = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    sums = [norm.to(device) for norm in torch._foreach_norm(shares, 1, torch.float32)] if shares else []
    return torch.stack(sums).sum() if sums else torch.zeros((), device=device)


def _what_is_left(output_dir: str | Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_complete_checkpoint(output_dir)
    return "there is no complete checkpoint yet" if newest is None else f"{newest} is complete"


def wait_no_longer(timeout: datetime.timedelta) -> None:
    """Give the processes of a launch on CPUs so long to answer each other; there the library drops ``ddp_timeout``."""
    torch.distributed.distributed_c10d._set_pg_timeout(timeout)


@contextlib.contextmanager
def faults_named(output_dir: str | Path, processes: int, data_timeout: int) -> Iterator[None]:
    """Put a lost process of the launch, or data that do not come, in one sentence that says what is left.

    Args:
        output_dir: folder of the run.
        processes: of the launch.
        data_timeout: seconds for which the data workers may be silent.

    Raises:
        UsageError: naming the newest complete checkpoint.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if _SILENT_WORKER in text:
            reason = f"the data workers have given nothing for {data_timeout} s (data_timeout)"
        elif "DataLoader worker" in text and any(words in text for words in _DEAD_WORKER):
            reason = f"a data worker has died ({text})"
        elif processes > 1 and any(words in text for words in _LOST):
            reason = (
                f"another of the {processes} processes has ended, or has not answered for ddp_timeout seconds ({text})"
            )
        else:
            raise
        raise UsageError(
            f"{reason}; {_what_is_left(output_dir)}; with this mended, the same command with --resume goes on"
        ) from error
