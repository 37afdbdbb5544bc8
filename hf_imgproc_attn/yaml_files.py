"""YAML files of a user, in which no key may stand twice: the usual loaders silently keep the last one."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from .errors import UsageError


def read_yaml_mapping(path: Path, what: str) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: of the file.
        what: it is, for messages: ``study`` or ``config``.

    Returns:
        The mapping; keys and values as YAML has them.

    Raises:
        UsageError: for a file that cannot be read or is not valid YAML, a key that stands twice in one mapping, or
            content that is no mapping.
    """
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except OSError as error:
        raise UsageError(f"{what} must be a readable YAML file, got {str(path)!r} ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{what} {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{what} {str(path)!r} must hold a mapping, got {type(content).__name__}")
    return content


def _loader() -> type[Any]:
    """The safe loader of PyYAML, which is imported when a file is read, with a look at the keys."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping. A merge (``<<``) may say again what it overrides."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable):  # of other keys the loader says that they are none
                    if key in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key!r} stands twice in one mapping", key_node.start_mark
                        )
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueKeys
