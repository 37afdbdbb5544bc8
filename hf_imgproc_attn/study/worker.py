"""A process that does runs of a study: names of runs come in, a line each, and how they ended goes out.

Started by :class:`.engines.Workers`; it ends as soon as its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from ..errors import UsageError, disk_problem, plain_message


def main(start: dict[str, Any]) -> None:
    """Do runs until the input ends.

    Args:
        start: ``study`` (a file), ``places`` of its data, ``ledger`` (a folder), ``threads``.
    """
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    answers = sys.stdout

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    with contextlib.redirect_stdout(sys.stderr):  # nothing but answers may go out
        import torch

        from .driver import Job, do_job
        from .ledger import Ledger
        from .run import be_quiet
        from .study_file import read_study

        be_quiet()
        torch.set_num_threads(start["threads"])
        study = read_study(start["study"], start["places"])
        ledger = Ledger(start["ledger"])
        while True:
            order = orders.get()
            try:
                outcome = do_job(study, ledger, Job.from_line(study, order))
                answer({"record": outcome.record})
            except UsageError as error:
                answer({"refused": plain_message(error)})
            except OSError as error:
                problem = disk_problem(error)
                answer({"refused": problem} if problem else {"error": plain_message(error)})
            except Exception as error:  # a fault of one run leaves the others
                traceback.print_exc()
                answer({"error": f"{type(error).__name__}: {plain_message(error)}"})


def _listen(orders: queue.Queue[dict[str, Any]]) -> None:
    """Take orders, and end the process when who gives them is gone."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
