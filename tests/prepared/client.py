"""A Python interpreter whose process comes from `server.py`; what that cannot do, a real one does.

It is run as ``python -IS client.py FOLDER ARGUMENTS``; in FOLDER are the socket and ``settings.json``.
"""

import json
import os
import signal
import socket
import struct
import sys

# What Python, or a library that is imported before a process is forked, has read by then.
READ = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "TRITON", "CUDA", "LD_", "LC_", "LANG", "MPL")
READ_BY_MORE = ("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "ACCELERATE_")
# The cache folder is read when something is compiled; torch itself sets it in a process that has compiled.
NOT_READ = ("PYTHONPATH", "TORCHELASTIC_", "TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR")
OPTIONS = ("-I", "-P", "-u")
"""Options without a value that a forked process can have."""


def is_possible(arguments, settings):
    """Whether a process that has begun can become one with these arguments, in this environment."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-c", "-m")):
        return False
    begun = settings["environment"]
    read = READ + READ_BY_MORE if settings["knows_more"] else READ
    names = {name for name in {*os.environ, *begun} if name.startswith(read) and not name.startswith(NOT_READ)}
    return all(os.environ.get(name) == begun.get(name) for name in names)


def main(folder, *arguments):
    """Ask for a process with this one's arguments, environment and files, and end as it ends."""
    with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
        settings = json.load(file)
    count = next((index for index, word in enumerate(arguments) if word not in OPTIONS), len(arguments))
    if not is_possible(arguments[count:], settings):
        os.execv(settings["python"], [settings["python"], *arguments])
    request = {
        "options": arguments[:count],
        "arguments": arguments[count:],
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "executable": os.path.join(folder, "python"),
    }
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(folder, "socket"))
        socket.send_fds(connection, [struct.pack("q", len(content))], [0, 1, 2])
        connection.sendall(content)
        answer = connection.recv(4)
    if len(answer) < 4:
        sys.exit("the process that forks is gone")
    (status,) = struct.unpack("i", answer)
    if status >= 0:
        os._exit(status)
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


main(*sys.argv[1:])
