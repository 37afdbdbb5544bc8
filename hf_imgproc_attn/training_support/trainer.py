"""The ``Trainer`` of the training scripts: the library's, with three of its habits mended."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer


class ScriptTrainer(Trainer):
    """``transformers.Trainer``, but

    - a checkpoint's weights are read under the names they are saved under (see :func:`accept_saved_names`);
    - ``dataloader_drop_last`` drops training samples only, never samples that are evaluated;
    - ``use_cache=False``, which the Trainer writes into the configuration for training, is not left there
      (:meth:`restore_configuration`).
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, **options)
        accept_saved_names(model)
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


def accept_saved_names(model: PreTrainedModel) -> None:
    """Let ``model.load_state_dict`` take weights under the names they have in a checkpoint.

    Transformers saves a ViT under the parameter names of its version 4, and translates them in ``from_pretrained``
    only. The Trainer reads checkpoints with ``load_state_dict``: on resuming, and when it loads the best model, it
    would drop nearly every weight with a mere warning (seen with 5.23, with the stock ViT too).
    """
    from transformers.core_model_loading import revert_weight_conversion

    own_names: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        saved = list(revert_weight_conversion(model, {name: tensor}))
        if len(saved) == 1 and saved[0] != name:
            own_names[saved[0]] = name

    def rename(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix == "":
            for saved_name in own_names.keys() & state_dict.keys():
                state_dict[own_names[saved_name]] = state_dict.pop(saved_name)

    model.register_load_state_dict_pre_hook(rename)
