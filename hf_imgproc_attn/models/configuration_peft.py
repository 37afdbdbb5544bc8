"""PEFT's default target modules, which it looks up by ``model_type``.

They come with the configuration, so that a model whose code travelled with its checkpoint has them too.
"""

from __future__ import annotations

import sys


def tell_peft(model_type: str, attention: list[str] | None = None) -> None:
    """Give PEFT, where it is imported, the default target modules of a model type.

    PEFT may be imported after the model was made. It asks the configuration for its dictionary before it looks up a
    target: that is when this is called. Each of its methods has a table of its own; entries that are there stay.

    Args:
        model_type: of the model that gets the defaults.
        attention: names of the attention projections, which a method gets that adapts those of GPT-2 by default. None:
            the modules have GPT-2's names, and every method gets what it has for GPT-2.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in list(vars(constants).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "gpt2" in table:
            if attention is None:
                table.setdefault(model_type, table["gpt2"])
            elif name.endswith("_TARGET_MODULES_MAPPING") and table["gpt2"] == ["c_attn"]:
                table.setdefault(model_type, list(attention))
