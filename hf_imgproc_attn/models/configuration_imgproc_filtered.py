"""The configuration of a filtered model of any type: that of the model, and what its filters are."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

FILTERED_MODEL_TYPE = "imgproc_filtered"


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
        self.base_model_type, self.filter_arguments = base_model_type, dict(filter_arguments or {})
        self.base_config = {name: value for name, value in (base_config or {}).items() if name != "model_type"}
        super().__init__(**kwargs)

    def base(self) -> PreTrainedConfig:
        """The model's own configuration, anew.

        Raises:
            ValueError: for a type that Transformers does not know.
        """
        kind = self.base_model_type
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type must be a model type that Transformers knows, got {kind!r}")
        return CONFIG_MAPPING[kind].from_dict(dict(self.base_config))
