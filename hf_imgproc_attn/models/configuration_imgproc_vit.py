"""Configuration of ViT with a chosen attention filter."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_peft import tell_peft
from .spec_axes import PUBLISHED_NEUTRENO_LAMBDAS
from .spec_fields import FilterSpecMixin


@strict
class ImgProcViTConfig(FilterSpecMixin, ViTConfig):
    """The stock ``ViTConfig`` and the filter fields of ``FilterSpecMixin``; the defaults are the stock model.

    Example:
        >>> from hf_imgproc_attn import ImgProcViTConfig
        >>> ImgProcViTConfig.from_preset("bilateral").position_kernel
        'untied'
    """

    model_type = "imgproc_vit"
    position_axes = 2
    default_neutreno_lambda = PUBLISHED_NEUTRENO_LAMBDAS[2]

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time; PEFT, which calls it, learns its targets here."""
        names = {**{name: [name] for name in ("q_proj", "k_proj", "v_proj")}, "down_proj": ["mlp.fc2"]}
        tell_peft(self.model_type, like="llama", names=names)
        return super().to_dict()


ImgProcViTConfig.register_for_auto_class()
