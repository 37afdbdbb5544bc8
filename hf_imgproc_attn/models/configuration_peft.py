"""PEFT's default target modules, which it looks up by ``model_type``.

They come with the configuration, so that a model whose code travelled with its checkpoint has them too.
"""

from __future__ import annotations

import sys


def tell_peft(model_type: str, like: str, names: dict[str, list[str]] | None = None) -> None:
    """Give PEFT, where it is imported, the default target modules of a model type.

    PEFT may be imported after the model was made. It asks the configuration for its dictionary before it looks up a
    target: that is when this is called. Each of its methods has a table of its own; entries that are there stay.

    Args:
        model_type: of the model that gets the defaults.
        like: a model type that PEFT knows, whose modules do the same.
        names: name of a module of ``like`` -> names of the modules in its place; a method whose targets have other
            names gets nothing. None: the modules have the same names, and every method gets what it has for ``like``.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in list(vars(constants).items()):
        if not (name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and like in table):
            continue
        if names is None:
            table.setdefault(model_type, table[like])
        elif name.endswith("_MODULES_MAPPING") and set(table[like]) <= set(names):
            table.setdefault(model_type, [own for target in table[like] for own in names[target]])
