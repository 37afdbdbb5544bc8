"""Configuration of ViT with a chosen attention filter."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_peft import tell_peft
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
    default_neutreno_lambda = 0.6

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time; PEFT, which calls it, learns its targets here."""
        tell_peft(self.model_type, {"c_attn": ["q_proj", "v_proj"], "mlp.c_proj": ["mlp.fc2"]})
        return super().to_dict()


ImgProcViTConfig.register_for_auto_class()
