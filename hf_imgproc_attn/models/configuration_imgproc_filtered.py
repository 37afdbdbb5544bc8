"""The configuration of a filtered model of any type: that of the model, and what its filters are."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

FILTERED_MODEL_TYPE = "imgproc_filtered"
_NOT_KEPT = ("model_type", "_name_or_path")
"""Of the base model's configuration: its type is said elsewhere, where its file was is nobody else's business."""
_OF_THE_BASE = frozenset(("is_encoder_decoder", "problem_type", "chunk_size_feed_forward", "id2label", "label2id"))
"""Fields that every configuration has, and that this one takes over, so that they can be asked for here."""


class ImgProcFilteredConfig(PreTrainedConfig):
    """What ``config.json`` of a saved filtered model holds.

    A model type of its own makes sure that nobody loads the model without its filters and does not notice: without
    this class Transformers does not know the type.

    Args:
        base_model_type: the model's own type.
        base_config: the model's own configuration, as a dictionary without its type: Transformers would take a
            dictionary with one for what a stock class is looking for, and load the model without its filters.
        filter_arguments: what ``apply_filter`` was called with.

    Raises:
        ValueError: if there is no base configuration, or one of a type that Transformers does not know.
    """

    model_type = FILTERED_MODEL_TYPE

    def __init__(
        self,
        base_model_type: str | None = None,
        base_config: dict[str, Any] | None = None,
        filter_arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, given in (("base_config", base_config), ("filter_arguments", filter_arguments)):
            if given is not None and not isinstance(given, dict):
                raise ValueError(f"{name} must be a dictionary or None, got {given!r}")
        kwargs.pop("vocab_size", None)  # said in the file for others; see ``to_dict``
        for name in _OF_THE_BASE & set(base_config or {}):
            kwargs.setdefault(name, (base_config or {})[name])
        super().__init__(**kwargs)
        # Last: while Transformers checks a new configuration, nothing is looked up in the model's own.
        self.base_model_type, self.filter_arguments = base_model_type, dict(filter_arguments or {})
        self.base_config = {name: value for name, value in (base_config or {}).items() if name not in _NOT_KEPT}

    def __getattr__(self, name: str) -> Any:
        """What this configuration does not have is the model's own: ``hidden_size``, ``vocab_size``, ``eos_token_id``.

        Raises:
            AttributeError: if the model's configuration has no such field either.
        """
        if not name.startswith("_") and self._is_known():
            base = self.base()
            if hasattr(base, name):
                return getattr(base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a field of the model's own configuration there, from where the model is made."""
        own = self.__dict__.get("base_config")
        if own is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
            return
        field = CONFIG_MAPPING[self.base_model_type].attribute_map.get(name, name) if self._is_known() else name
        if field in own:
            own[field] = value
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As usual, with the model's ``vocab_size``: PEFT looks in the file whether a base model was enlarged."""
        size = self.__dict__.get("base_config", {}).get("vocab_size")
        return super().to_dict() | ({} if size is None else {"vocab_size": size})

    def _get_generation_parameters(self) -> dict[str, Any]:
        """None: those of the model's own configuration are fields of it, such as Whisper's ``suppress_tokens``."""
        return {}

    def _is_known(self) -> bool:
        return "base_config" in self.__dict__ and self.base_model_type in CONFIG_MAPPING

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model's own configuration; without one, this."""
        return self.base().get_text_config(*args, **kwargs) if self._is_known() else self

    def base(self) -> PreTrainedConfig:
        """The model's own configuration, anew.

        Raises:
            ValueError: for a type that Transformers does not know.
        """
        kind = self.base_model_type
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type must be a model type that Transformers knows, got {kind!r}")
        return CONFIG_MAPPING[kind].from_dict(dict(self.base_config))
