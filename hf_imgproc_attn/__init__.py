"""Self-attention as image filtering: bilateral and twicing GPT-2 and ViT for Hugging Face Transformers.

Importing this package is cheap (neither torch nor transformers is imported), and it is enough for ``AutoConfig``,
``AutoModel…``, ``AutoTokenizer``, ``AutoImageProcessor`` and ``pipeline`` to know the model types ``imgproc_gpt2`` and
``imgproc_vit``: see :mod:`hf_imgproc_attn.registration`. The public names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .conversion import ConversionReport, convert
    from .functional import filter_attention
    from .models.any_filter import apply_filter, filtered_layers, remove_filter
    from .models.configuration_imgproc_gpt2 import ImgProcGPT2Config
    from .models.configuration_imgproc_vit import ImgProcViTConfig
    from .models.modeling_imgproc_gpt2 import (
        ImgProcGPT2ForSequenceClassification,
        ImgProcGPT2ForTokenClassification,
        ImgProcGPT2LMHeadModel,
        ImgProcGPT2Model,
    )
    from .models.modeling_imgproc_vit import (
        ImgProcViTForImageClassification,
        ImgProcViTForMaskedImageModeling,
        ImgProcViTModel,
    )
    from .models.spec_fields import PRESETS

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "ConversionReport",
    "ImgProcGPT2Config",
    "ImgProcGPT2ForSequenceClassification",
    "ImgProcGPT2ForTokenClassification",
    "ImgProcGPT2LMHeadModel",
    "ImgProcGPT2Model",
    "ImgProcViTConfig",
    "ImgProcViTForImageClassification",
    "ImgProcViTForMaskedImageModeling",
    "ImgProcViTModel",
    "__version__",
    "apply_filter",
    "convert",
    "filter_attention",
    "filtered_layers",
    "remove_filter",
]

_MODULE_OF = {
    "PRESETS": ".models.spec_fields",
    "ConversionReport": ".conversion",
    "ImgProcGPT2Config": ".models.configuration_imgproc_gpt2",
    "ImgProcGPT2ForSequenceClassification": ".models.modeling_imgproc_gpt2",
    "ImgProcGPT2ForTokenClassification": ".models.modeling_imgproc_gpt2",
    "ImgProcGPT2LMHeadModel": ".models.modeling_imgproc_gpt2",
    "ImgProcGPT2Model": ".models.modeling_imgproc_gpt2",
    "ImgProcViTConfig": ".models.configuration_imgproc_vit",
    "ImgProcViTForImageClassification": ".models.modeling_imgproc_vit",
    "ImgProcViTForMaskedImageModeling": ".models.modeling_imgproc_vit",
    "ImgProcViTModel": ".models.modeling_imgproc_vit",
    "apply_filter": ".models.any_filter",
    "convert": ".conversion",
    "filter_attention": ".functional",
    "filtered_layers": ".models.any_filter",
    "remove_filter": ".models.any_filter",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
