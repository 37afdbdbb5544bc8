"""The rules of ``hf_imgproc_attn/models``: whatever is saved from there must load where the package is not installed.

``save_pretrained`` copies the file of the saved class and, transitively, every file that a *text scan* finds in a
relative import; what the scan cannot follow is missing on the other side, and third-party imports become requirements
there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

ROOM = ROOT / "hf_imgproc_attn" / "models"
FILES = sorted(path for path in ROOM.rglob("*.py") if path.name != "__init__.py")
TRAVELS_WITH = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
MAX_LINES = 400

# What `transformers.dynamic_module_utils` looks for (5.17 and 5.23), in code, comments and docstrings alike.
SCANS = (
    re.compile(r"^\s*import\s+\.(\S+)\s*$", re.MULTILINE),
    re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE),
)


def violations(source: str, siblings: set[str]) -> list[str]:
    """Every breach of the flat room's rules in one file, as ``line: what``."""
    tree = ast.parse(source)
    found: list[str] = []
    imported = set()
    for node, guarded in _imports(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1:
                found.append(f"{node.lineno}: import from outside the folder")
            elif node.module is None:
                found.append(f"{node.lineno}: `from . import x` is not copied")
            elif "." in node.module:
                found.append(f"{node.lineno}: import from a sub-folder")
            elif node.module not in siblings:
                found.append(f"{node.lineno}: {node.module} is not in the folder")
            else:
                imported.add(node.module)
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            package = name.split(".")[0]
            if package == "hf_imgproc_attn":
                found.append(f"{node.lineno}: absolute import of the package")
            elif package not in TRAVELS_WITH and not guarded:
                found.append(f"{node.lineno}: {package} becomes a requirement of every checkpoint")
    for scan in SCANS:
        for match in scan.finditer(source):
            if match.group(1) not in imported:
                line = source.count("\n", 0, match.start(1)) + 1
                found.append(f"{line}: reads like a relative import to save_pretrained: {match.group(0).strip()!r}")
    return found


def _imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """All imports, wherever they stand, and whether an ``except`` catches the failure."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, guarded
        elif isinstance(node, ast.Try):
            for statement in node.body:
                yield from _imports(ast.Module([statement], []), guarded or bool(node.handlers))
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from _imports(ast.Module([part], []), guarded)  # type: ignore[list-item]
        else:
            yield from _imports(node, guarded)


def test_the_room_is_flat() -> None:
    assert FILES
    assert not [path.name for path in ROOM.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_travels(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, {other.stem for other in FILES}) == []
    assert source.count("\n") <= MAX_LINES, "a file has one responsibility and rarely passes 300 lines"


def test_the_room_init_imports_nothing() -> None:
    """Saved folders have no ``__init__`` of ours, so nothing may depend on one."""
    tree = ast.parse((ROOM / "__init__.py").read_text(encoding="utf-8"))
    assert not list(_imports(tree))


def test_transformers_copies_what_the_rules_say(tmp_path: Path) -> None:
    """The scan of the installed Transformers follows our imports to every sibling, and finds no requirement."""
    from transformers.dynamic_module_utils import check_imports, get_relative_import_files

    for name in ("modeling_imgproc_gpt2", "modeling_imgproc_vit"):
        copied = {Path(file).stem for file in get_relative_import_files(ROOM / f"{name}.py")}
        assert copied == _reachable(name)
        for stem in {name, *copied}:
            check_imports(ROOM / f"{stem}.py")


def _reachable(name: str) -> set[str]:
    """The siblings that a file needs, directly or through another one, by the syntax tree."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        tree = ast.parse((ROOM / f"{waiting.pop()}.py").read_text(encoding="utf-8"))
        for node, _ in _imports(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and node.module not in needed:
                needed.add(node.module)
                waiting.append(node.module)
    return needed


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from . import spec_fields", "is not copied"),
        ("from .. import convert", "outside the folder"),
        ("from ..convert import convert", "outside the folder"),
        ("from .deep.spec_fields import x", "sub-folder"),
        ("from .filter_sepc import x", "not in the folder"),
        ("from hf_imgproc_attn.models.spec_fields import x", "absolute import"),
        ("import hf_imgproc_attn", "absolute import"),
        ("import numpy as np", "numpy becomes a requirement"),
        ("def f():\n    from safetensors.torch import load_file", "safetensors becomes a requirement"),
        ("try:\n    pass\nfinally:\n    import triton", "triton becomes a requirement"),
        ("try:\n    pass\nexcept ImportError:\n    import triton", "triton becomes a requirement"),
        ('"""Use it so:\n\n    from .filter_cache import x\n"""', "reads like a relative import"),
        ("x = 1\n#\n'''\nfrom .other import y\n'''", "4: reads like a relative import"),
    ],
)
def test_each_rule_is_enforced(source: str, message: str) -> None:
    found = violations(source, {"spec_fields", "cache_layer"})
    assert any(message in violation for violation in found), found


@pytest.mark.parametrize(
    "source",
    [
        "from .spec_fields import x",
        "def f():\n    from .spec_fields import x",
        "import math, torch.nn\nfrom transformers.models.gpt2.modeling_gpt2 import GPT2Attention",
        "from huggingface_hub.dataclasses import strict",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        '"""Everything may import from .spec_fields; see there."""',
    ],
)
def test_what_travels_is_allowed(source: str) -> None:
    assert violations(source, {"spec_fields"}) == []
