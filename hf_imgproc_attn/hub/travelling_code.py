"""The Python files that travel with a checkpoint: what they may do, and whether they are this package's.

Whoever loads a checkpoint with ``trust_remote_code=True`` runs these files. :func:`audit` reads one and names whatever
a model has no need for; it is a reading aid and a guard against accidents, not a sandbox: code that wants to hide can.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOM = Path(__file__).resolve().parent.parent / "models"

_LIBRARIES = ("torch", "transformers", "huggingface_hub")
# What a model may use of the standard library: nothing here opens a file or a connection, or starts a process.
_STANDARD_LIBRARY = {
    "__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "difflib", "enum", "functools",
    "itertools", "logging", "math", "numbers", "operator", "os", "re", "sys", "typing", "warnings", "weakref",
}  # fmt: skip
# Modules of the three libraries that read or write files, fetch something, or compile and load native code.
_FORBIDDEN_MODULES = (
    "huggingface_hub.hf_api", "huggingface_hub.file_download", "torch.distributed.rpc", "torch.utils.cpp_extension",
    "transformers.dynamic_module_utils", "transformers.utils.hub",
)  # fmt: skip
_FORBIDDEN_NAMES = {"__builtins__", "__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}
_FORBIDDEN_ATTRIBUTES = {"load_library", "push_to_hub", "read_bytes", "read_text", "write_bytes", "write_text"}
_FORBIDDEN_OF_TORCH = {
    f"torch.{name}"
    for name in ("export.load", "export.save", "from_file", "hub", "jit.load", "jit.save", "load", "package", "save",
                 "serialization")
}  # fmt: skip
_ALLOWED_OF = {"os": {"os.PathLike", "os.fspath"}, "sys": set()}
_MAY_BE_LOOKED_UP = "peft"
"""The library of which ``sys.modules.get("…")`` may ask whether it is imported: that of no other gives a way to it."""


def _goes_too_far(name: str) -> bool:
    """Whether a dotted name is a part of ``os`` or ``sys`` that a model has no need for."""
    top, _, rest = name.partition(".")
    return bool(rest) and top in _ALLOWED_OF and name not in _ALLOWED_OF[top]


def _harmless_look_ups(tree: ast.AST) -> set[int]:
    """The nodes of ``sys.modules.get("peft…")``, by identity."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.modules.get" and len(node.args) == 1:
            module = node.args[0]
            name = module.value if isinstance(module, ast.Constant) else None
            if isinstance(name, str) and name.partition(".")[0] == _MAY_BE_LOOKED_UP and not node.keywords:
                found |= {id(part) for part in ast.walk(node.func)}
    return found


def audit(source: str) -> list[str]:
    """What a file contains that code of a model has no need for: network, processes, files, pickles, evaluated text.

    Args:
        source: Python source.

    Returns:
        Findings as ``line N: what``, empty for code of this package; one finding for what is no Python.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return [f"line {getattr(error, 'lineno', None) or 0}: is not Python: {error}"]
    return [f"line {line}: {what}" for line, what in sorted(_findings(tree))]


def _findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    harmless = _harmless_look_ups(tree)
    for node in ast.walk(tree):
        if id(node) in harmless:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from ((node.lineno, what) for what in _module_findings(alias.name, alias.asname))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                continue  # a file of the same folder, which is audited itself
            for alias in node.names:
                # `from torch import hub` imports a module too.
                yield from ((node.lineno, what) for what in _module_findings(f"{node.module}.{alias.name}", None))
        elif isinstance(node, ast.Name) and node.id in _FORBIDDEN_NAMES:
            yield node.lineno, f"uses {node.id}"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in _FORBIDDEN_ATTRIBUTES or name in _FORBIDDEN_OF_TORCH or _goes_too_far(name):
                yield node.lineno, f"uses {name}"


def _module_findings(name: str, renamed: str | None) -> Iterator[str]:
    top = name.partition(".")[0]
    unknown = top not in _STANDARD_LIBRARY and top not in _LIBRARIES
    forbidden = any(f"{name}.".startswith(f"{module}.") for module in (*_FORBIDDEN_MODULES, *_FORBIDDEN_OF_TORCH))
    if unknown or forbidden or _goes_too_far(name):
        yield f"imports {name}"
    elif renamed is not None and top in ("os", "sys", "torch"):
        yield f"imports {name} under another name, {renamed}"  # the names above would not be recognised


def audit_folder(folder: str | os.PathLike[str]) -> list[str]:
    """:func:`audit` of every Python file in a folder (not below it), each finding with the file's name."""
    findings = []
    for path in sorted(Path(folder).glob("*.py")):
        findings += [f"{path.name}, {what}" for what in audit(path.read_text(encoding="utf-8", errors="replace"))]
    return findings


def missing_imports(folder: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    """The files of a folder that are imported by some others, directly or not, and are not there.

    Args:
        folder: of a checkpoint.
        names: the files to start at.

    Returns:
        Findings as ``b.py (imported by a.py)``.
    """
    missing, waiting, seen = list[str](), sorted(names), set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in seen or not (Path(folder) / name).is_file():
            continue
        seen.add(name)
        try:
            tree = ast.parse((Path(folder) / name).read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            continue  # `audit` names it
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            for needed in (f"{module.partition('.')[0]}.py" for module in modules):
                waiting.append(needed)
                finding = f"{needed} (imported by {name})"
                if not (Path(folder) / needed).is_file() and finding not in missing:
                    missing.append(finding)
    return missing


def differing_files(folder: str | os.PathLike[str]) -> list[str]:
    """The Python files in a folder that are not the package's files of that name, sorted by name."""
    differing = []
    for path in sorted(Path(folder).glob("*.py")):
        own = ROOM / path.name
        if not own.is_file():
            differing.append(f"{path.name} (not a file of the package)")
        elif own.read_bytes() != path.read_bytes():
            differing.append(path.name)
    return differing


def report_differing_code(name: Any, model: Any, options: dict[str, Any]) -> None:
    """Warn if the code that was published with a checkpoint is not the code that has just loaded it.

    A process that has imported this package runs the package's code, whatever a checkpoint brings along. Everybody
    else runs the published files, and may get another model. Called after every load through the package
    (``FilterPreTrainedMixin.load_listeners``).

    Args:
        name: the folder or Hub name that was loaded.
        model: the loaded model.
        options: those of ``from_pretrained`` (revision, token, cache and so on).
    """
    from transformers.utils import logging

    logger = logging.get_logger(__name__)
    if name is None or not getattr(model.config, "auto_map", None):
        return  # built in memory, or saved without code
    try:
        folder = (
            name
            if os.path.isdir(name)
            else _download_code(str(name), getattr(model.config, "_commit_hash", None), options)
        )
        differing = differing_files(folder)
    except (OSError, ValueError) as error:
        logger.warning(f"the code published with {str(name)!r} could not be compared with this package's: {error}")
        return
    if differing:
        logger.warning(
            f"the code published with {str(name)!r} differs from this package's in {', '.join(differing)}: this "
            "process runs the package's code, a process without the package runs the published code"
        )


def _download_code(name: str, commit: str | None, options: dict[str, Any]) -> str:
    from huggingface_hub import snapshot_download

    known = ("cache_dir", "token", "local_files_only", "force_download")
    given: dict[str, Any] = {key: options[key] for key in known if options.get(key) is not None}
    return str(snapshot_download(name, revision=commit or options.get("revision"), allow_patterns=["*.py"], **given))
