"""The process that runs cases: one line of JSON in, one out. It may crash or be killed; the runner goes on.

First line in: what to prepare (``module``, ``device``, ``data``, ``earlier``); first line out: the environment and the
list of cases. Then a line in for each case, and a line out with its verdict. When standard input ends, so does this
process, whatever it is doing: nothing outlives a runner that was killed.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .parts import CRASHED, FAILED, MEASURED, REFUSED, WRONG, Bench, Case, Refused, Wrong

ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package."""

_REFUSALS = (
    "No available kernel",  # a forced SDPA kernel that does not take the call, on a GPU
    "No viable backend",  # likewise, on the CPU
    "BACKEND='FLASH' but flash attention cannot be used",  # FlexAttention without the FlashAttention package
    "cannot serve this call",  # this package's back-ends
    "is not available: the kernels need",
)
_LONGEST_TRACEBACK = 4000


def main() -> None:
    """Serve the runner at standard input and output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(plain(message)) + "\n")
        answers.flush()

    order = json.loads(orders.get())
    if order["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            answer({"unusable": "device must be there, got 'cuda', and torch sees no GPU"})
            return
        exact_float32()
    no_silent_eager()
    bench = Bench(order["device"], order["data"] and Path(order["data"]), order["earlier"])
    cases = {case.name: case for case in importlib.import_module(order["module"]).cases(bench)}
    answer(
        {
            "environment": environment(bench.device),
            "cases": [{"name": case.name, "seconds": case.seconds, "about": case.about} for case in cases.values()],
        }
    )
    gc.freeze()  # what is imported stays: looking through it after every case would take longer than small cases
    while True:
        order = json.loads(orders.get())
        result = measure(cases[order["case"]], order["seconds_left"])
        lost = _device_is_lost(bench.device)  # kernels run late: their error may come after a result
        if lost:
            result["status"] = CRASHED
        elif result["status"] == MEASURED:
            bench.earlier[order["case"]] = result["values"]
        answer({"result": result, "lost": lost})
        _tidy(bench.device)


def measure(case: Case, seconds_left: float) -> dict[str, Any]:
    """Run a case and turn whatever happens into a verdict: ``status``, ``seconds``, and what explains them."""
    started = time.perf_counter()
    result: dict[str, Any]
    try:
        result = {"status": MEASURED, "values": case.run(seconds_left)}
    except Refused as error:
        result = {"status": REFUSED, "reason": str(error)}
    except Wrong as error:
        result = {"status": WRONG, "reason": str(error), "values": error.values}
    except Exception as error:
        if any(text in str(error) for text in _REFUSALS):
            result = {"status": REFUSED, "reason": without_paths(str(error))}
        else:
            result = {"status": FAILED, "reason": reason_of(error), "traceback": traceback_of(error)}
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result


def reason_of(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {without_paths(str(error)).strip().partition(chr(10))[0]}"


def traceback_of(error: BaseException) -> str:
    """The end of an error's traceback, without this machine's paths."""
    return without_paths("".join(traceback.format_exception(error)))[-_LONGEST_TRACEBACK:]


def without_paths(text: str) -> str:
    """A text whose paths start at this package, at ``site-packages`` or at Python's library."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = re.sub(r"[^\s\"']*[\\/](site-packages|dist-packages)[\\/]", r"\1/", text)
    return re.sub(r"[^\s\"']*[\\/]lib[\\/]python3\.\d+[\\/]", "", text)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers to five digits, those that are not finite as words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return str(value)


def exact_float32() -> None:
    """float32 means float32: no TF32 in matrix products or convolutions (the patch embedding is one)."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def no_silent_eager() -> None:
    """Make ``torch.compile`` fail, rather than run the function as it is, when it has compiled it too often."""
    import torch._dynamo

    with contextlib.suppress(AttributeError):  # a private setting, here in torch 2.11 to 2.13
        torch._dynamo.config.fail_on_recompile_limit_hit = True


def environment(device_type: str) -> dict[str, Any]:
    """What is measured on, and what is measured: device, versions, source."""
    import torch

    from ...records import device_description, git_state, package_versions

    device = torch.device(device_type)
    found: dict[str, Any] = {
        "device": device_description(device, 1),
        "versions": package_versions("triton", "numpy", "pyarrow", "pillow"),
        "git": git_state(),
        "source_sha256": source_digest(),
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        with contextlib.suppress(Exception):
            found["device"]["cudnn"] = torch.backends.cudnn.version()
    attention = torch.nn.attention
    for name in ("current_flash_attention_impl", "list_flash_attention_impls"):
        with contextlib.suppress(Exception):  # torch 2.11 may have them under other rules than later versions
            found[name] = getattr(attention, name)()
    return found


def source_digest() -> str:
    """SHA-256 of the package's Python files: says what was measured where there is no git."""
    package = ROOT / "hf_imgproc_attn"
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _listen(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)


def _device_is_lost(device: str) -> bool:
    """Whether every further call would fail: an illegal access, say, stays with a process for good."""
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _tidy(device: str) -> None:
    """Give memory back, and forget what was compiled.

    Compiled code is found again on disk; but after eight versions of a function ``torch.compile`` would run it as it
    is, without a word.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
