"""Files that belong to the package but lie beside it in a checkout: training scripts, the template of the cards."""

from pathlib import Path


def shipped_file(name: str) -> Path:
    """Where such a file is: inside the package after an installation, beside it in a checkout.

    Args:
        name: relative to the root of a checkout, as ``training/train_causal_lm.py``.

    Raises:
        FileNotFoundError: if it is in neither place: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is neither in {package} nor beside it")
