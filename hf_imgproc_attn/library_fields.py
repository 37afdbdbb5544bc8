"""Which fields a class of Transformers declares, read from its source: importing the library takes seconds.

A misspelt option is then refused at once. The library's own check, which comes later, stays the judge: where the
source cannot be read, nothing is known here and nothing is refused.
"""

import ast
import dataclasses
import functools
import importlib.util
from pathlib import Path

from .backbones import OF_MODEL_TYPE
from .models.spec_fields import FilterSpecMixin


@functools.cache
def own_fields(model_type: str) -> frozenset[str]:
    """The fields that a configuration of ours adds to the stock ones and to those of the filters."""
    row = OF_MODEL_TYPE[model_type]
    path = Path(__file__).resolve().parent / "models" / f"configuration_{model_type}.py"
    return frozenset(_annotated(path, row.config))


@functools.cache
def declared_fields(file: str, class_name: str) -> dict[str, str]:
    """The annotated fields of a dataclass of Transformers, without those of its bases.

    Args:
        file: its source, relative to the package's folder.
        class_name: the class.

    Returns:
        name -> annotation as it is written; empty where the source has no such class.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return {}
    return _annotated(Path(found.origin).parent / file, class_name)


def _annotated(path: Path, class_name: str) -> dict[str, str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    return {
        line.target.id: ast.unparse(line.annotation)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == class_name
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        and not ast.unparse(line.annotation).startswith("ClassVar") and not _is_derived(line)
    }  # fmt: skip


def training_fields() -> dict[str, str]:
    """The fields of ``transformers.TrainingArguments`` and their annotations; empty where they cannot be read."""
    return declared_fields("training_args.py", "TrainingArguments")


def configuration_fields(model_type: str) -> set[str]:
    """Names of all fields of a configuration of ours, the common names such as ``hidden_size`` among them.

    Args:
        model_type: one of ours.

    Returns:
        The names; empty where they cannot be read.
    """
    row = OF_MODEL_TYPE[model_type]
    stock = set(declared_fields(f"models/{row.name}/configuration_{row.name}.py", row.stock_config))
    common = set(declared_fields("configuration_utils.py", "PreTrainedConfig"))
    if not stock or not common:
        return set()
    own = {field.name for field in dataclasses.fields(FilterSpecMixin)}
    names = {"hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"}
    return stock | common | own | own_fields(model_type) | names


def _is_derived(line: ast.AnnAssign) -> bool:
    """Whether a field is none of the constructor: ``field(init=False)``."""
    return isinstance(line.value, ast.Call) and any(
        keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in line.value.keywords
    )
