"""The configuration of a filtered model of any type: that of the model, and what its filters are."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .spec_fields import FILTER_FIELDS

FILTERED_MODEL_TYPE = "imgproc_filtered"
_ARGUMENTS = ("preset", "layers", "stacks", "num_special_tokens", *FILTER_FIELDS)
"""What ``apply_filter`` takes beside the model."""
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
        ValueError: for a value of another kind, a base that is filtered itself, or an argument that ``apply_filter``
            does not have. A type that Transformers does not know is refused by :meth:`base`.
    """

    model_type = FILTERED_MODEL_TYPE

    def __init__(
        self,
        base_model_type: str | None = None,
        base_config: dict[str, Any] | None = None,
        filter_arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check(base_model_type, base_config, filter_arguments)
        kwargs.pop("vocab_size", None)  # said once more in files that have no fields for stock classes
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
            ValueError: for a type that Transformers does not know, or without that configuration: the sizes would be
                those that the type has by default.
        """
        kind = self.base_model_type
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type must be a model type that Transformers knows, got {kind!r}")
        if not self.base_config:
            raise ValueError(f"base_config must hold the configuration of the {kind} model, got {self.base_config!r}")
        return CONFIG_MAPPING[kind].from_dict(dict(self.base_config))


def _check(base_model_type: Any, base_config: Any, filter_arguments: Any) -> None:
    if base_model_type is not None and not isinstance(base_model_type, str):
        raise ValueError(f"base_model_type must be a model type, such as 'llama', or None, got {base_model_type!r}")
    if base_model_type == FILTERED_MODEL_TYPE:
        raise ValueError(f"base_model_type must be the type of a model without filters, got {base_model_type!r}")
    for name, given in (("base_config", base_config), ("filter_arguments", filter_arguments)):
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{name} must be a dictionary or None, got {given!r}")
    for name in filter_arguments or {}:
        if name not in _ARGUMENTS:
            raise ValueError(f"filter_arguments must be among {', '.join(_ARGUMENTS)}, got {name!r}")


def refusals(base_config: dict[str, Any], call: str) -> dict[str, Any]:
    """Fields for ``config.json`` at which the stock classes of a model and of its parts stop.

    A stock class that is asked by name warns of another model type, and would go on to make a model of the sizes that
    it has by default, without the filters. But first it looks for a dictionary of its own type, and takes that for its
    configuration: it finds one whose implementations are a sentence. The model, which has none of that name, shows the
    sentence before it makes a weight; the configuration alone can be read, and answers for ``vocab_size``, which PEFT
    asks it for.

    Args:
        base_config: the model's own configuration with its type, in which those of its parts may lie.
        call: what loads the model.
    """
    said = (
        f"none, since the checkpoint is of type {FILTERED_MODEL_TYPE} and has filters, which this class would leave "
        f"out. Load it with {call}"
    )
    stops = {"attn_implementation": said, "experts_implementation": said}  # either may be given by a user
    return {
        f"not_for_{kind}": {**stops, **{name: own[name] for name in ("model_type", "vocab_size") if name in own}}
        for kind, own in sorted(_parts(base_config).items())
    }


def _parts(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations in a configuration by their model types, with itself."""
    parts: dict[str, dict[str, Any]] = {}
    for value in config.values():
        if isinstance(value, dict):
            parts |= _parts(value)
    return {**parts, config["model_type"]: config} if isinstance(config.get("model_type"), str) else parts
