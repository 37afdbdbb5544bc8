"""How far one layer's call travels through the package: ``imgproc-attn calls [--list]``.

Counts the package's own functions that run between an attention layer's tokens and its output, for twicing on 256
tokens: a number to keep small when the core is changed.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent


class Journey(NamedTuple):
    """Calls of the package's own functions, in order.

    calls: ``(file, function)`` of each.
    depth: deepest nesting of them.
    """

    calls: list[tuple[str, str]]
    depth: int

    def figures(self) -> dict[str, int]:
        """What is to be kept small."""
        files = [file for file, _ in self.calls]
        return {
            "calls": len(self.calls),
            "functions": len(set(self.calls)),
            "files": len(set(files)),
            "switches of file": sum(before != after for before, after in itertools.pairwise(files)),
            "depth": self.depth,
        }


def record(call: Callable[[], Any]) -> Journey:
    """Run a call and note which of the package's functions it passes through (comprehensions are not counted)."""
    calls: list[tuple[str, str]] = []
    depth = deepest = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        if event not in ("call", "return") or code.co_name.startswith("<") or not _is_ours(code.co_filename):
            return
        depth += 1 if event == "call" else -1
        deepest = max(deepest, depth)
        if event == "call":
            calls.append((Path(code.co_filename).name, code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Journey(calls, deepest)


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(PACKAGE) and Path(file) != Path(__file__)


def layer_call(preset: str = "twicing", length: int = 256) -> Callable[[], Any]:
    """One attention layer of a small GPT-2, on the back-end that it chooses."""
    import torch

    from ..models.configuration_imgproc_gpt2 import ImgProcGPT2Config
    from ..models.layer_inputs import LayerInputs
    from ..models.modeling_imgproc_gpt2 import ImgProcGPT2Model
    from ..models.visibility import Visibility

    config = ImgProcGPT2Config.from_preset(
        preset, n_layer=1, n_embd=128, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    model = ImgProcGPT2Model(config).eval()
    hidden_states = torch.randn(1, length, 128)
    inputs = LayerInputs(Visibility(length, length, causal=True))

    def call() -> Any:
        with torch.no_grad():
            return model.h[0].attn(hidden_states, inputs)

    call()
    return call


def report(*, with_list: bool = False) -> str:
    """The figures in a line and, ``with_list``, a line for each function: how often it runs, its file, its name."""
    journey = record(layer_call())
    lines = [", ".join(f"{count} {name}" for name, count in journey.figures().items())]
    if with_list:
        lines += [f"{count:4} {file}: {function}" for (file, function), count in Counter(journey.calls).items()]
    return "\n".join(lines)
