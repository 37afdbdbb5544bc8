"""The ``Trainer`` of the training scripts: the library's, with some of its habits mended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .bandwidth_bounds import BandwidthBounds
from .faults import NotFiniteSteps
from .shared_tokens import SharedTokens
from .streams import StreamedSamples

# PyTorch 2.11 knows no CPU by number, as Transformers 5.17 asks for where several processes on CPUs go on with a run.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class Processes(TrainerCallback, ExportableState):
    """Writes into every checkpoint how many processes saved it, so that a part that is missing is missed."""

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        return {"args": {}, "attributes": {"count": count}}


class ScriptTrainer(Trainer):
    """``transformers.Trainer``, but

    - ``dataloader_drop_last`` drops training samples only, never samples that are evaluated;
    - ``use_cache=False``, which the Trainer writes into the configuration for training, is not left there
      (:meth:`restore_configuration`);
    - with ``push_to_hub``, the repository is prepared before training and the run is published once, when its record
      is complete, by :mod:`hf_imgproc_attn.hub`: the library's own push would upload pickled arguments and local
      paths, and write a card of its own over ours;
    - data workers that give nothing for ``data_timeout`` seconds are an error (0: they are waited for);
    - ``context_parallel`` processes share the tokens of each training text;
    - ``not_finite``, where it is set, sees the loss of every micro-batch.
    """

    def __init__(
        self, model: PreTrainedModel, *, data_timeout: int = 0, context_parallel: int = 1, **options: Any
    ) -> None:
        self.not_finite: NotFiniteSteps | None = None
        self._tokens: SharedTokens | None = None
        if context_parallel > 1:
            self._tokens = SharedTokens(model, options["args"], context_parallel)
        self._context_parallel = context_parallel
        self._data_timeout = data_timeout
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, **options)
        self.add_callback(BandwidthBounds())
        self.add_callback(Processes())
        if self._use_cache is None:
            self.restore_configuration()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with contextlib.nullcontext() if self._tokens is None else self._tokens.shared():
            loss = super().training_step(*args, **kwargs)
        if self.not_finite is not None:
            self.not_finite.saw(loss)
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        if self._tokens is not None:
            epoch_iterator = map(self._tokens.part, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(super().get_total_train_batch_size(args)) // self._context_parallel

    def get_train_dataloader(self) -> DataLoader[Any]:
        if isinstance(self.train_dataset, StreamedSamples):  # each process has its own: accelerate must not share them
            pinned = self.args.dataloader_pin_memory
            batch = self._train_batch_size
            return DataLoader(self.train_dataset, batch, collate_fn=self.data_collator, pin_memory=pinned)
        loader = self._patient(super().get_train_dataloader())
        return loader if self._tokens is None else self._tokens.deal(loader)

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        with self._dropping_nothing():
            return self._patient(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Dataset[Any]) -> DataLoader[Any]:
        with self._dropping_nothing():
            return self._patient(super().get_test_dataloader(test_dataset))

    def _patient(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader, whose workers may be silent for so long and no longer."""
        if loader.num_workers:
            # accelerate's loader takes its batches from torch's, which it holds.
            getattr(loader, "base_dataloader", loader).timeout = self._data_timeout
        return loader

    def restore_configuration(self) -> None:
        """Give the configuration the ``use_cache`` back that it had, or none; before the final checkpoint is saved."""
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache
        elif hasattr(self.model.config, "use_cache"):
            del self.model.config.use_cache

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Prepare the repository, so that a token or a name that is refused costs no training time.

        Raises:
            UsageError: if the token may not write, or the repository holds something else.
        """
        if not self.is_world_process_zero():
            return
        from hf_imgproc_attn.filtered import saved_model_type
        from hf_imgproc_attn.hub.client import connect
        from hf_imgproc_attn.hub.publishing import prepare_repository
        from hf_imgproc_attn.hub.repository import MAIN

        self.hub_model_id = prepare_repository(
            connect(),
            self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            saved_model_type(self.model),
            private=bool(self.args.hub_private_repo),
            branch=self.args.hub_revision or MAIN,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see the class."""

    @contextlib.contextmanager
    def _dropping_nothing(self) -> Iterator[None]:
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = dropping
