"""Configuration of GPT-2 with a chosen attention filter."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from .configuration_peft import tell_peft
from .spec_axes import CONV_IN, CONV_OUT, CONV_QKV, FILTER_LAYER_TYPE, HEADS, is_stock_layer
from .spec_fields import FilterSpecMixin, with_plain_numbers


@with_plain_numbers
@strict
class ImgProcGPT2Config(FilterSpecMixin, GPT2Config):
    """The stock ``GPT2Config`` and the filter fields of ``FilterSpecMixin``; the defaults are the stock model.

    Example:
        >>> from hf_imgproc_attn import ImgProcGPT2Config
        >>> ImgProcGPT2Config.from_preset("twicing", n_layer=2, boosted_layers=[-1]).boosted_layers
        [-1]
    """

    model_type = "imgproc_gpt2"
    base_model_tp_plan = {
        "h.*.attn": HEADS,
        "h.*.attn.c_attn": CONV_QKV,
        "h.*.attn.c_proj": CONV_IN,
        "h.*.mlp.c_fc": CONV_OUT,
        "h.*.mlp.c_proj": CONV_IN,
    }
    hides_later_tokens = True

    @property
    def layer_types(self) -> list[str]:
        """Which cache layer each attention layer needs."""
        return ["full_attention" if is_stock_layer(self, spec) else FILTER_LAYER_TYPE for spec in self.layer_specs]

    def validate_layer_type(self) -> None:
        """Stock configurations check user-given layer types here; ours are derived, so there is nothing to check."""

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time; PEFT, which calls it, learns its targets here."""
        tell_peft(self.model_type, like="gpt2")
        return super().to_dict()


ImgProcGPT2Config.register_for_auto_class()
