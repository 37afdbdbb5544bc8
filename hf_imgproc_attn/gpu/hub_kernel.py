"""The fused operators as a kernel of the Hugging Face Hub, for ``kernels.get_kernel``: ``make kernel``.

Written are the sources in the form of kernel-builder (``build.toml``, ``flake.nix``, ``torch-ext/imgproc_attention``),
and what it would build of them: ``build/torch-cuda``, the variant of kernels that are Python only, with its
``metadata.json``. The files are those of this package that the operators reach, with relative imports only, nothing
but torch and Triton beside the standard library, and operators under a name that follows from their content, so that
two versions can be loaded side by side. What the kernels do not do raises an error; nothing falls back to anything.

The form is that of https://huggingface.co/docs/kernels/kernel-requirements and of build.toml's edition 6.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NAME, MODULE, VERSION, LICENSE = "imgproc-attention", "imgproc_attention", 0, "apache-2.0"
"""Version 0 is by convention a kernel that is not yet recommended: no GPU has run this one."""
ARCHITECTURES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0")
"""Compute capabilities whose instructions Triton's products need; compiled and looked at was 9.0."""
VARIANT = "torch-cuda"
ENTRIES = (
    *("gpu/fused.py", "gpu/once.py", "gpu/decode.py"),
    *("models/kernel_position.py", "models/kernel_relative.py"),
)
"""Files whose names the kernel offers; those that they import come along."""
NAMESPACE = "hf_imgproc_attn"

FRONT = '''"""Attention as an image filter: (2A - A^2) V and its relatives, in Triton, without A in memory.

    fused_attention     twicing, or plain attention, of as many queries as keys
    apply_once          A x for any x, of which every linear booster is composed
    decode_attention    a few new tokens against cached keys, values and streams; no gradient

Queries, keys and values are float16 or bfloat16 on a CUDA device of compute capability 8.0 or newer. Python 3.11 or
newer. A call that the kernels cannot serve raises ValueError, which says why: nothing else is tried.
"""

from .gpu.decode import Cached, decode_attention
from .gpu.fused import fused_attention
from .gpu.once import apply_once
from .gpu.once_inputs import Once
from .models.kernel_position import ClassTokens, GaussianPositions
from .models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries

__all__ = [
    "AlibiPositions",
    "BucketPositions",
    "Cached",
    "ClassTokens",
    "GaussianPositions",
    "Once",
    "apply_once",
    "bucket_boundaries",
    "decode_attention",
    "fused_attention",
]
'''
OPERATORS = '''"""The name under which this version's operators are registered."""

import torch

ops = torch.ops.{identifier}


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"{identifier}::{{name}}"
'''
BUILD = f'''[general]
name = "{NAME}"
version = {VERSION}
edition = 6
license = "{LICENSE}"
backends = ["cuda"]

[torch-noarch]

[kernel]
'''
FLAKE = f'''{{
  description = "{NAME}";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = {{ self, kernel-builder }}: kernel-builder.lib.genKernelFlakeOutputs {{ inherit self; path = ./.; }};
}}
'''


def reached(entries: tuple[str, ...] = ENTRIES) -> list[str]:
    """The files of the package that some files import, themselves included, as paths in it.

    Raises:
        ValueError: if one imports something that a kernel may not: it has the standard library, torch and Triton.
    """
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += _files(path, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                foreign = {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "torch", "triton"}
                if foreign:
                    raise ValueError(f"a kernel may import torch and Triton only, got {min(foreign)} in {path}")
    return sorted(found)


def _files(path: str, node: ast.ImportFrom) -> list[str]:
    """The files of a relative import."""
    folder = Path(path).parents[node.level - 1]
    if node.module is None:
        return [(folder / f"{alias.name}.py").as_posix() for alias in node.names]
    return [(folder / f"{node.module.replace('.', '/')}.py").as_posix()]


def source(path: str) -> str:
    """A file as the kernel has it: its operators' namespace is the kernel's."""
    text = (PACKAGE / path).read_text(encoding="utf-8")
    text = re.sub(rf'"{NAMESPACE}::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text = text.replace(f"torch.ops.{NAMESPACE}.", "ops.")
    needed = [name for name in ("add_op_namespace_prefix", "ops") if re.search(rf"(?<![\w.]){name}\b[.(]", text)]
    if needed:
        line = "from __future__ import annotations\n"
        text = text.replace(line, f"{line}\nfrom .._ops import {', '.join(needed)}\n", 1)
    return text


def build(target: Path) -> str:
    """Write sources and build of the kernel into a folder, which must be empty or not there.

    Returns:
        The identifier of what was built, the namespace of its operators.

    Raises:
        ValueError: if the folder holds anything.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder for the kernel must be empty or not there, got {str(target)!r}")
    files = {"__init__.py": FRONT, **{path: source(path) for path in reached()}}
    for folder in sorted({Path(path).parent.as_posix() for path in files} - {"."}):
        files[f"{folder}/__init__.py"] = f'"""Files of `hf_imgproc_attn/{folder}`."""\n'
    content = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in sorted(files.items())).encode())
    identifier = f"_{MODULE}_cuda_{content.hexdigest()[:7]}"
    _write(target, {"build.toml": BUILD, "flake.nix": FLAKE, "CARD.md": card()})
    shutil.copy(PACKAGE.parent / "LICENSE", target) if (PACKAGE.parent / "LICENSE").is_file() else None
    _write(target / "torch-ext" / MODULE, files)
    built = {
        **files,
        "_ops.py": OPERATORS.format(identifier=identifier),
        # Older versions of `kernels` look for a folder of the kernel's name.
        f"{MODULE}/__init__.py": f'"""The same as one folder above."""\n\n{_compatible()}',
    }
    variant = target / "build" / VARIANT
    _write(variant, built)
    metadata = {
        "id": identifier,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "backend": {"type": "cuda", "archs": list(ARCHITECTURES)},
        "digest": {"algorithm": "sha256", "files": {path: digest(text) for path, text in sorted(built.items())}},
    }
    _write(variant, {"metadata.json": json.dumps(metadata, indent=2) + "\n"})
    return identifier


def digest(text: str) -> str:
    """SHA-256 of a file as ``metadata.json`` writes it, in base 64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _compatible() -> str:
    """Load the folder above, whatever it is called, and hand out its names."""
    return (
        "import importlib.util\n"
        "import sys\n"
        "from pathlib import Path\n\n"
        "_path = Path(__file__).parents[1] / \"__init__.py\"\n"
        "_spec = importlib.util.spec_from_file_location(f\"{__name__}_flat\", _path)\n"
        "_module = importlib.util.module_from_spec(_spec)\n"
        "sys.modules[_spec.name] = _module\n"
        "_spec.loader.exec_module(_module)\n"
        "__all__ = _module.__all__\n"
        "globals().update({name: getattr(_module, name) for name in __all__})\n"
    )  # fmt: skip


def card() -> str:
    """What the kernel's page says."""
    return (
        f"---\nlicense: {LICENSE}\ntags:\n- kernels\n---\n\n# {NAME}\n\n"
        "Triton kernels of attention as an image filter: twicing `(2A - A²) V`, plain attention, any linear booster\n"
        "and decoding, without A in memory, with exact gradients but for decoding.\n\n"
        "```python\nfrom kernels import get_kernel\n\n"
        f'kernel = get_kernel("YOUR_NAME/{NAME}", version={VERSION}, trust_remote_code=True)\n'
        "out = kernel.fused_attention(query, key, value, is_causal=True)\n```\n\n"
        "Checked without a GPU: outputs and gradients against float64 in Triton's interpreter, and compiled for\n"
        "compute capability 9.0. Not measured on a GPU. It needs Python 3.11 or newer.\n"
    )


def _write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def main() -> int:
    """Build into the folder that is named."""
    if len(sys.argv) != 2:
        print("usage: python -m hf_imgproc_attn.gpu.hub_kernel FOLDER", file=sys.stderr)
        return 2
    try:
        identifier = build(Path(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written to {sys.argv[1]}: {identifier}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
