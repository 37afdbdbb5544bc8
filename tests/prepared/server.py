"""A process that has imported what is slow to import, and forks a new one for each command that `client.py` brings.

Usage: server.py SOCKET [MODULE ...], with a pipe as standard input: it ends when the pipe is closed.

If no module is given, it has imported neither Transformers nor huggingface_hub, which read the environment when they
are imported, nor this package; in a forked process all three are as new as in a fresh interpreter. No thread is
running when it forks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import types
from types import NoneType
from typing import Any, NoReturn

# Three seconds, of the four that `import transformers.modeling_utils` takes.
SLOW = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch.export", "scipy.optimize", "sklearn.metrics", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "PIL.Image",
    "jinja2", "yaml", "psutil", "requests", "safetensors.torch", "tokenizers",
)  # fmt: skip
NEW = ("transformers", "huggingface_hub", "hf_imgproc_attn")
"""What no process may have got from here unasked."""


class Started(Exception):  # no error: it leaves the loop in the forked process
    """In the forked process: what it is to run."""


def serve(place: str, *modules: str) -> None:
    """Fork for each command, until the standard input ends."""
    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not [name for name in NEW if name in sys.modules]
    for name in modules:
        importlib.import_module(name)
    if os.path.isdir("/proc/self/task"):
        # A forked process has no other thread than the one that forked, and what others had locked stays locked.
        assert len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()  # a collection writes to every object, and what is written to is copied
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place + ".new")
    listener.listen()
    os.rename(place + ".new", place)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            watch(connection)
        connection.close()


def watch(connection: socket.socket) -> None:
    """Fork once more, and tell the client how that process ended; end it where the client is no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 8, 3)
    (length,) = struct.unpack("q", message)
    content = b""
    while len(content) < length:
        content += connection.recv(length - len(content))
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        raise Started(json.loads(content))
    for file in files:
        os.close(file)
    while True:
        gone, _, _ = select.select([connection], [], [], 0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
            os._exit(0)
        if gone:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os._exit(0)


def become(command: dict[str, Any]) -> None:
    """Do what ``python ARGUMENTS`` does, in this process."""
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.executable = command["executable"]
    options = command["options"]
    first, *arguments = command["arguments"]
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    paths = [] if "-I" in options else [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = paths
    if any(os.path.exists(os.path.join(path, "sitecustomize.py")) for path in paths):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    is_safe = bool({"-I", "-P"} & set(options))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if first == "-m":
        sys.argv = arguments
        if not is_safe:
            sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
        return
    if first == "-c":
        code, name = arguments.pop(0), "<string>"
    else:
        name = first
        with open(name, "rb") as file:
            code = file.read()
        main.__file__ = name
    sys.argv = [first, *arguments]
    if not is_safe:
        sys.path.insert(0, "" if first == "-c" else os.path.dirname(os.path.abspath(name)))
    exec(compile(code, name, "exec", dont_inherit=True), main.__dict__)


def run(command: dict[str, Any]) -> NoReturn:
    """Do what the command says, and end as an interpreter does, but leave its memory to the system, which is quick."""
    status = 0
    try:
        become(command)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, (int, NoneType)):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        status = 1
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, which then can use what follows
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    try:
        serve(*sys.argv[1:])
    except Started as started:
        (asked,) = started.args
    else:
        sys.exit()
    # Outside of the loop and of its exception, so that the command's errors have tracebacks of their own.
    run(asked)
