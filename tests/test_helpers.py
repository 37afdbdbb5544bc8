"""The tests' own tools."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import RunPython, each_value_once, pairwise_cover, prepared_python, readable_id, run_command

pytest_plugins = ("pytester",)


def test_a_pairwise_cover_has_every_pair_and_few_rows() -> None:
    axes = [list("abcdefg"), [0, 1, 2, 3], [True, False], list("xyz")]
    rows = pairwise_cover(axes)
    for one, other in itertools.combinations(range(4), 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        assert {(row[one], row[other]) for row in rows} == wanted
    assert len(rows) <= 32
    assert rows == pairwise_cover(axes)


def test_each_value_occurs_in_few_rows_that_mix_them() -> None:
    rows = list(itertools.product("abcdefghi", "xyz", [0.5, 1.5]))
    chosen = [rows[index] for index in sorted(each_value_once(rows))]
    assert len(chosen) == 9
    assert [letter for letter, *_ in chosen] == list("abcdefghi")
    assert Counter(word for _, word, _ in chosen) == {"x": 3, "y": 3, "z": 3}
    assert len({(word, number) for _, word, number in chosen}) == 6, "all pairs"


ALTERNATING = """
import pytest

pytestmark = pytest.mark.both_back_ends

@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("variant", ["a", "b", "c"])
def test_one(variant, width): pass

@pytest.mark.parametrize("variant", ["a", "b", "c"])
def test_two(variant): pass

@pytest.mark.parametrize("width", [1, 2])
def test_without_variants(width): pass
"""


@pytest.mark.parametrize("options", ["", "--blocked", "--full", "--full --blocked"])
def test_variants_of_a_test_take_turns_on_the_back_ends(pytester: pytest.Pytester, options: str) -> None:
    """But all run on both with ``--full``, and all on the one that ``--blocked`` asks for."""
    pytester.makeconftest(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems, pytest_generate_tests, _back_end"
    )
    pytester.makeini("[pytest]\nmarkers =\n    both_back_ends: a mark")
    pytester.makepyfile(ALTERNATING)
    run = pytester.inline_run("--collect-only", *options.split())
    cases: dict[str, list[dict[str, Any]]] = {}
    for item in run.getcall("pytest_collection_finish").session.items:
        cases.setdefault(item.originalname, []).append(item.callspec.params)
    both = {"auto", "blocked"} if "--blocked" not in options else {"blocked"}
    for name in ("test_one", "test_two"):
        found = {(case["_back_end"], case["variant"]) for case in cases[name]}
        assert {variant for _, variant in found} == set("abc")
        assert {back_end for back_end, _ in found} == both
        assert len(found) == (len(both) * 3 if options else 3)
    widths = Counter((case["_back_end"], case["width"]) for case in cases["test_one"])
    assert widths.keys() == set(itertools.product(both, [1, 2])), "other axes are cut on neither back-end"
    assert len(cases["test_without_variants"]) == 2 * len(both)
    if not options:
        turns = [{case["variant"]: case["_back_end"] for case in cases[name]} for name in ("test_one", "test_two")]
        assert turns[0] == {"a": "auto", "b": "blocked", "c": "auto"}
        assert turns[1] == {"a": "blocked", "b": "auto", "c": "blocked"}, "the name decides which is first"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ((2, 3, 4), "2x3x4"),
        ({"steps": 2, "boosting": "twicing"}, "steps=2,boosting=twicing"),
        ([{"a": None}, True], "a=None,True"),
        (torch.float16, "float16"),
        (torch.zeros(2, 3), "float32[2x3]"),
        ({"b", "a"}, "a,b"),
        ([], "[]"),
        (object(), "object"),
        ("text", None),
        (len, None),
    ],
)
def test_values_have_readable_names(value: object, name: str | None) -> None:
    assert readable_id(value) == name


BROKEN = """
import pytest

@pytest.mark.elementary
def test_law():
    assert {law}

@pytest.mark.parametrize("number", range(3))
def test_of_a_model(number):
    assert number == 0
"""


@pytest.mark.parametrize("law", [True, False], ids=["law holds", "law is broken"])
def test_a_broken_law_is_one_failure(pytester: pytest.Pytester, law: bool) -> None:
    """What fails beside it is counted in one line, and fails where the law holds or is not tested."""
    pytester.makeconftest("from tests.elementary import *")
    pytester.makeini("[pytest]\nmarkers =\n    elementary: a law")
    pytester.makepyfile(BROKEN.format(law=law))
    if law:
        pytester.inline_run().assertoutcome(passed=2, failed=2)
    else:
        pytester.inline_run().assertoutcome(passed=1, failed=1, skipped=2)
        pytester.inline_run("-k", "model").assertoutcome(passed=1, failed=2)


def test_a_command_that_leaves_a_process_behind_fails_in_time() -> None:
    """`sleep` holds the pipes when bash has been killed."""
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ran for more than 1 s\nhere"):
        run_command(["bash", "-c", "echo here; sleep 60; true"], timeout=1)
    assert time.monotonic() - started < 30


@pytest.mark.xdist_group("together")
def test_groups_of_tests_stay_in_one_worker(request: pytest.FixtureRequest) -> None:
    """By their names, in which pytest-xdist finds the group; else what they share is made once in every worker."""
    assert request.node.nodeid.endswith("@together") == bool(getattr(request.config.option, "loadgroup", False))


@pytest.mark.parametrize("fresh", [True, False], ids=["real", "prepared"])
def test_a_prepared_interpreter_does_what_a_real_one_does(run_python: RunPython, tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv, sys.path[0])\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n", encoding="utf-8")
    mine = str(tmp_path / "mine.py")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = run_python(*arguments, path=tmp_path, fresh=fresh)
        return done.returncode, done.stdout, done.stderr

    assert run(mine, "a", "-b") == (0, f"__main__ {[mine, 'a', '-b']} {tmp_path}\n", "")
    assert run("-m", "mine", "-c") == (0, f"__main__ {[mine, '-c']} {tmp_path / 'cwd'}\n", "")
    paths = "import sys; print(sys.argv, sys.path[:2])"
    assert run("-c", paths, "a") == (0, f"['-c', 'a'] {['', str(tmp_path)]}\n", "")
    paths = f"import sys; print([path for path in sys.path if path in ('', {str(tmp_path)!r})])"
    assert run("-I", "-c", paths) == (0, "[]\n", "")
    assert run("-c", "import peft")[2].splitlines()[-1].startswith("ModuleNotFoundError: import of peft halted")
    assert run("-c", "\n1 / 0")[2].splitlines()[:2] == [
        "Traceback (most recent call last):",
        '  File "<string>", line 2, in <module>',
    ]
    assert run("-c", "raise SystemExit('no')") == (1, "", "no\n")
    assert run("-c", "import os; os.kill(os.getpid(), 9)")[0] == -signal.SIGKILL
    atexit = "import atexit, threading\natexit.register(print, 'last')\n"
    assert run("-c", f"{atexit}threading.Timer(0.01, print, ['first']).start()\nexit(3)") == (3, "first\nlast\n", "")


def test_a_prepared_interpreter_knows_torch_and_nothing_that_reads_the_environment(run_python: RunPython) -> None:
    code = "import sys; print([name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')])"
    assert run_python("-c", code).stdout == "[True, False, False]\n"
    assert run_python("-W", "error", "-c", code).stdout == "[False, False, False]\n", "options need a real one"


def test_a_prepared_interpreter_ends_with_what_started_it(tmp_path: Path) -> None:
    code = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    with pytest.raises(pytest.fail.Exception, match="ran for more than 5 s"):
        run_command([prepared_python(), "-c", code], cwd=tmp_path, timeout=5)
    deadline = time.monotonic() + 30
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
