"""Self-attention as image filtering: bilateral and twicing GPT-2, ViT and BERT for Hugging Face Transformers.

Importing this package is cheap (neither torch nor transformers is imported), and it is enough for ``AutoConfig``,
``AutoModel…``, ``AutoTokenizer``, ``AutoImageProcessor`` and ``pipeline`` to know the model types of
:mod:`hf_imgproc_attn.backbones`: see :mod:`hf_imgproc_attn.registration`. The public names below are imported when
they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .backbones import BACKBONES
from .registration import register_with_transformers

if TYPE_CHECKING:
    from .conversion import ConversionReport, convert
    from .functional import filter_attention
    from .lens import lens
    from .models.any_filter import apply_filter, filtered_layers, remove_filter
    from .models.configuration_imgproc_bert import ImgProcBertConfig
    from .models.configuration_imgproc_gpt2 import ImgProcGPT2Config
    from .models.configuration_imgproc_vit import ImgProcViTConfig
    from .models.modeling_imgproc_bert import (
        ImgProcBertForMaskedLM,
        ImgProcBertForSequenceClassification,
        ImgProcBertForTokenClassification,
        ImgProcBertModel,
    )
    from .models.modeling_imgproc_gpt2 import (
        ImgProcGPT2ForSequenceClassification,
        ImgProcGPT2ForTokenClassification,
        ImgProcGPT2LMHeadModel,
        ImgProcGPT2Model,
    )
    from .models.modeling_imgproc_vit import (
        ImgProcViTBackbone,
        ImgProcViTForImageClassification,
        ImgProcViTForMaskedImageModeling,
        ImgProcViTForSemanticSegmentation,
        ImgProcViTModel,
    )
    from .models.spec_fields import PRESETS

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "ConversionReport",
    "ImgProcBertConfig",
    "ImgProcBertForMaskedLM",
    "ImgProcBertForSequenceClassification",
    "ImgProcBertForTokenClassification",
    "ImgProcBertModel",
    "ImgProcGPT2Config",
    "ImgProcGPT2ForSequenceClassification",
    "ImgProcGPT2ForTokenClassification",
    "ImgProcGPT2LMHeadModel",
    "ImgProcGPT2Model",
    "ImgProcViTBackbone",
    "ImgProcViTConfig",
    "ImgProcViTForImageClassification",
    "ImgProcViTForMaskedImageModeling",
    "ImgProcViTForSemanticSegmentation",
    "ImgProcViTModel",
    "__version__",
    "apply_filter",
    "convert",
    "filter_attention",
    "filtered_layers",
    "lens",
    "remove_filter",
]

_MODULE_OF = {
    "PRESETS": ".models.spec_fields",
    "ConversionReport": ".conversion",
    "apply_filter": ".models.any_filter",
    "convert": ".conversion",
    "filter_attention": ".functional",
    "filtered_layers": ".models.any_filter",
    "lens": ".lens",
    "remove_filter": ".models.any_filter",
    **{name: module for row in BACKBONES.values() for name, module in row.module_of.items()},
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
