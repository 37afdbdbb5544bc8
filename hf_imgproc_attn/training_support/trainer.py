"""The ``Trainer`` of the training scripts: the library's, with two of its habits mended."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer


class ScriptTrainer(Trainer):
    """``transformers.Trainer``, but

    - ``dataloader_drop_last`` drops training samples only, never samples that are evaluated;
    - ``use_cache=False``, which the Trainer writes into the configuration for training, is not left there
      (:meth:`restore_configuration`).
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, **options)
        if self._use_cache is None:
            self.restore_configuration()

    def get_eval_dataloader(self, eval_dataset: str | Dataset[Any] | None = None) -> DataLoader[Any]:
        with self._dropping_nothing():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset[Any]) -> DataLoader[Any]:
        with self._dropping_nothing():
            return super().get_test_dataloader(test_dataset)

    def restore_configuration(self) -> None:
        """Give the configuration the ``use_cache`` back that it had, or none; before the final checkpoint is saved."""
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache
        elif hasattr(self.model.config, "use_cache"):
            del self.model.config.use_cache

    @contextlib.contextmanager
    def _dropping_nothing(self) -> Iterator[None]:
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = dropping
