"""PEFT's default target modules, which it looks up by ``model_type``.

They come with the configuration, so that a model whose code travelled with its checkpoint has them too.
"""

from __future__ import annotations

import sys


def tell_peft(model_type: str, like: str, names: tuple[list[str], list[str]] | None = None) -> None:
    """Give PEFT, where it is imported, the default target modules of a model type.

    PEFT may be imported after the model was made. It asks the configuration for its dictionary before it looks up a
    target: that is when this is called. Each of its methods has a table of its own; entries that are there stay.

    Args:
        model_type: of the model that gets the defaults.
        like: a model type that PEFT knows, whose modules do the same.
        names: a method whose targets of ``like`` are exactly the first list gets the second, and others get nothing.
            None: the modules have the same names, and every method gets what it has for ``like``.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in list(vars(constants).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and like in table:
            if names is None:
                table.setdefault(model_type, table[like])
            elif name.endswith("_TARGET_MODULES_MAPPING") and table[like] == names[0]:
                table.setdefault(model_type, list(names[1]))
