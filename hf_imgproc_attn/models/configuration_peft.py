"""PEFT's default target modules, which it looks up by ``model_type``.

They come with the configuration, so that a model whose code travelled with its checkpoint has them too.
"""

from __future__ import annotations

import sys


def tell_peft(model_type: str, modules: dict[str, list[str]] | None = None) -> None:
    """Give PEFT, where it is imported, the default target modules of a model type.

    PEFT may be imported after the model was made. It asks the configuration for its dictionary before it looks up a
    target: that is when this is called. Each of its methods has a table of its own; entries that are there stay.

    Args:
        model_type: of the model that gets the defaults.
        modules: name of a module of GPT-2 -> names of the modules that stand in its place; a method whose defaults for
            GPT-2 have other names gets none. None: the modules have GPT-2's names.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in list(vars(constants).items()):
        if not (name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "gpt2" in table):
            continue
        if modules is None:
            table.setdefault(model_type, table["gpt2"])
        elif name.endswith("_MODULES_MAPPING") and set(table["gpt2"]) <= set(modules):
            table.setdefault(model_type, [own for gpt2 in table["gpt2"] for own in modules[gpt2]])
