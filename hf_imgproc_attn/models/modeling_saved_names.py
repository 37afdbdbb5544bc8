"""Weights of ViT on disk have the names of Transformers 4: who must be told, and when they are read without it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion


def accept_saved_names(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Rename weights that have the names of a checkpoint, before ``load_state_dict`` looks for them.

    ViT is saved under the parameter names of Transformers 4, and only ``from_pretrained`` translates them.
    ``Trainer`` reads checkpoints with ``load_state_dict``, on resuming and when it loads the best model: it would drop
    nearly every weight with a mere warning (seen with Transformers 5.23, with the stock ViT too). A model inside
    another one, such as a backbone of UperNet, has its names behind the ``prefix``.
    """
    parameters = model.state_dict()
    found = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    if found <= parameters.keys():
        return
    for name, tensor in parameters.items():
        saved = list(revert_weight_conversion(model, {name: tensor}))
        if len(saved) == 1 and saved[0] != name and saved[0] in found:
            state_dict[prefix + name] = state_dict.pop(prefix + saved[0])


class RenamedOnLoadingMixin:
    """Tells Transformers of every class defined below this one that its weights on disk have other names.

    On disk ViT has the names of Transformers 4; the stock library renames them on loading by the class name `ViTModel`
    and would leave our class, and classes derived from it, with random layers.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_checkpoint_conversion_mapping(
            cls.__name__, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
        )
