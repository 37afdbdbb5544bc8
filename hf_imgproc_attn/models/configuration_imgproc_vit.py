"""Configuration of ViT with a chosen attention filter."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_peft import tell_peft
from .spec_axes import HEADS, PUBLISHED_NEUTRENO_LAMBDAS
from .spec_fields import FilterSpecMixin, with_plain_numbers

SEGMENTATION_HEADS = ("linear", "upsampling")


@with_plain_numbers
@strict
class ImgProcViTConfig(FilterSpecMixin, BackboneConfigMixin, ViTConfig):
    """The stock ``ViTConfig`` and the filter fields of ``FilterSpecMixin``; the defaults are the stock model.

    Args:
        segmentation_head: of ``ImgProcViTForSemanticSegmentation``: ``"linear"`` (one class for each patch) or
            ``"upsampling"`` (convolutions between doublings of the resolution).
        segmentation_channels: of the convolutions of ``"upsampling"``.
        semantic_loss_ignore_index: label of the pixels that do not count, as in Transformers' segmentation models.
        out_features: of ``ImgProcViTBackbone``: names of the stages whose feature maps are returned, ``"stem"`` (the
            embedded patches), ``"stage1"`` (the first layer) and so on. Default: the last one.
        out_indices: the same as indices, 0 for the stem; one of the two is enough.

    Example:
        >>> from hf_imgproc_attn import ImgProcViTConfig
        >>> ImgProcViTConfig.from_preset("bilateral").position_kernel
        'untied'
    """

    model_type = "imgproc_vit"
    base_model_tp_plan = {
        "layers.*.attention": HEADS,
        **{f"layers.*.attention.{name}_proj": "colwise" for name in "qkv"},
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }
    position_axes = 2
    default_neutreno_lambda = PUBLISHED_NEUTRENO_LAMBDAS[2]

    segmentation_head: str = "linear"
    segmentation_channels: int = 256
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if features is not None or indices is not None:
            self.set_output_features_output_indices(features, indices)

    def validate_segmentation(self) -> None:
        """Check the fields of the segmentation head (run by the strict dataclass)."""
        if self.segmentation_head not in SEGMENTATION_HEADS:
            raise ValueError(
                f"segmentation_head must be one of {', '.join(SEGMENTATION_HEADS)}, got {self.segmentation_head!r}"
            )
        if self.segmentation_channels < 1:
            raise ValueError(f"segmentation_channels must be an integer >= 1, got {self.segmentation_channels}")

    @property
    def stage_names(self) -> list[str]:
        """What ``out_features`` may name: the embedded patches and every layer."""
        return ["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))]

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time; PEFT, which calls it, learns its targets here.

        Stages are listed where they were chosen: the default is the last layer, however many there are.
        """
        names = {**{name: [name] for name in ("q_proj", "k_proj", "v_proj")}, "down_proj": ["mlp.fc2"]}
        tell_peft(self.model_type, like="llama", names=names)
        fields = super().to_dict()
        return {key: value for key, value in fields.items() if key[:4] != "out_" or value is not None}


ImgProcViTConfig.register_for_auto_class()
