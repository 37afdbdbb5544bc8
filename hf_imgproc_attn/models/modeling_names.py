"""What Transformers looks up by the name of a model's class, entered when the class is defined.

Trainer shifts the labels of a smoothed loss only for classes whose name is in a table of causal language models, and
pipelines log an error for a name they do not know. The entries are made here and not by the package, so that a class
that came with a checkpoint, or one that a user derived, has them too.
"""

from __future__ import annotations

from transformers.models.auto import modeling_auto

# The tables of names, by the Auto class. `AutoModel….register` does not write into them.
_NAME_TABLES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForMaskedImageModeling": modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    "AutoModelForSemanticSegmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
}


def tell_class_name(cls: type, auto_map: dict[str, str], model_type: str) -> None:
    """Enter a class under the task of the class in ``auto_map`` that it is or derives from.

    Args:
        cls: a model class, just defined.
        auto_map: the backbone's Auto classes and what they load, as in a configuration.
        model_type: of the backbone.
    """
    ancestors = {kind.__name__ for kind in cls.__mro__}
    for auto_class, reference in auto_map.items():
        name = reference.rpartition(".")[2]
        if auto_class in _NAME_TABLES and name in ancestors:
            # A derived class gets a key that no model type has: Auto classes go on loading the class here.
            key = model_type if cls.__name__ == name else f"{model_type}/{cls.__name__}"
            _NAME_TABLES[auto_class][key] = cls.__name__
