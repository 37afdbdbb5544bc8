"""The environment of every test: offline, a private Hugging Face cache, single-threaded processes.

It is set before anything imports transformers or torch, and sub-processes that a test starts inherit it.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.elementary import pytest_collection_finish, pytest_runtest_makereport  # noqa: F401  # hooks
from tests.helpers import ROOT, RunPython, each_value_once, pairwise_cover, prepared_python, readable_id, run_command

# The training scripts as modules: they import each other as siblings, as they do when they are run.
sys.path.insert(0, str(ROOT / "training"))

# A private cache: tests neither see nor change what the user has downloaded, nor another worker's dynamic modules.
_HF_HOME = tempfile.mkdtemp(prefix="hf_imgproc_attn_tests_")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that takes more memory than it may fails under its own name. Without a limit, the system ends some process, or
# swaps for ever, and the suite hangs. The processes that tests start inherit the limit.
_MOST_MEMORY = 8 * 2**30
resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """``run_python(*arguments, path=ROOT)``: an interpreter in an empty folder; ``path`` is first on sys.path.

    It has imported neither Transformers nor this package, but torch; with ``fresh`` it has imported nothing.
    """

    def run(
        *arguments: str, path: Path = ROOT, cwd: Path | None = None, timeout: float = 300, fresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        folder = cwd or tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        return run_command(
            [sys.executable if fresh else prepared_python(), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(path)},
            timeout=timeout,
        )

    return run


@pytest.fixture
def prepared_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package starts with this process's interpreter gets a prepared one."""
    monkeypatch.setattr(sys, "executable", prepared_python())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, None, None]:
    """What is imported and collected stays to the end: the garbage collector need not look through it ever again."""
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--blocked", action="store_true", help="run only what the mark `both_back_ends` adds")
    parser.addoption("--full", action="store_true", help="run every combination of a grid, not a pairwise cover of it")


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Values that pytest would only number have names."""
    return readable_id(val)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only ``--full`` tests; the elementary laws come first, then what is ``long`` or a group.

    What is long would run alone at the end, if it began last. At the end are the tests of models, most of them short.
    """
    only_blocked, everything = config.getoption("--blocked"), config.getoption("--full")
    kept = sampled(items if only_blocked or everything else alternated(items))
    if everything:  # of the second back-end every combination only where it is asked for
        kept |= {item for item in items if only_blocked or not is_blocked(item)}
    if only_blocked:
        kept = {item for item in kept if is_blocked(item)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
    items.sort(
        key=lambda item: (
            item.get_closest_marker("elementary") is None,
            not any(item.get_closest_marker(name) for name in ("long", "xdist_group")),
            item.path.parent.name == "models",
        )
    )


def is_blocked(item: pytest.Item) -> bool:
    """Whether the mark ``both_back_ends`` runs this test on the back-end of real sizes."""
    return (
        isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and (item.callspec.params.get("_back_end") == "blocked")
    )


def alternated(items: list[pytest.Item]) -> list[pytest.Item]:
    """What is left where a test with ``both_back_ends`` runs each value of its ``variant`` on one of the two.

    The back-ends take turns along a test's variants, and which is first depends on the test's name: each test meets
    both back-ends and all variants, and each variant both back-ends in one test or another.
    """
    kept, places = [], defaultdict[str, dict[int, int]](dict)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            values = item.callspec.params
            if "_back_end" in values and "variant" in values:
                place = places[item.nodeid.partition("[")[0]]
                turn = place.setdefault(id(values["variant"]), len(place)) + zlib.crc32(item.originalname.encode())
                if is_blocked(item) != bool(turn % 2):
                    continue
        kept.append(item)
    return kept


def sampled(items: list[pytest.Item]) -> set[pytest.Item]:
    """What is left without the mark ``full`` of tests with ``sampled``, and of all on the back-end of real sizes.

    Each value of each parameter occurs, and each combination of those that a text of the mark names.
    """
    kept, grids = {item for item in items if item.get_closest_marker("full") is None}, defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("sampled")
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and (marker or is_blocked(item)):
            # Values may have no hash; what stands in a list of values once is the same object in each combination.
            values = {name: id(value) for name, value in item.callspec.params.items()}
            groups = [*values, *(marker.args if marker else ())]
            combinations = [(names, *(values[name] for name in names.split(","))) for names in groups]
            grids[item.nodeid.partition("[")[0], is_blocked(item)].append((item, combinations))
    for cases in grids.values():
        chosen = each_value_once([combinations for _, combinations in cases])
        kept -= {item for index, (item, _) in enumerate(cases) if index not in chosen}
    return kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What the marks ``grid`` and ``both_back_ends`` make of a test.

    ``@pytest.mark.grid(names=values, ...)``: each pair of values of two axes occurs, or with ``--full`` each row. The
    name of an axis of tuples lists their parts: ``**{"content,position": [...]}``.
    """
    both = metafunc.definition.get_closest_marker("both_back_ends")
    if both is not None and both.args != (False,):
        metafunc.parametrize("_back_end", ["auto", "blocked"], indirect=True)
    marker = metafunc.definition.get_closest_marker("grid")
    if marker is None:
        return
    axes = [list(values) for values in marker.kwargs.values()]
    rows = list(itertools.product(*axes)) if metafunc.config.getoption("--full") else pairwise_cover(axes)
    names = [name.split(",") for name in marker.kwargs]
    flat = [
        [item for part, value in zip(names, row, strict=True) for item in (value if len(part) > 1 else [value])]
        for row in rows
    ]
    metafunc.parametrize(",".join(itertools.chain(*names)), flat)


@pytest.fixture(autouse=True)
def _back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests have tiny shapes, for which ``auto`` seldom chooses the back-end that real sizes get."""
    if getattr(request, "param", "auto") == "blocked":
        from hf_imgproc_attn.models import backend_table

        traced = [row for row in backend_table.CHOICES if "traced" in row.shapes]
        assert len(traced) == 3
        always = backend_table.Choice(None, "everything, for a test", lambda call: True, ("blocked",))
        monkeypatch.setattr(backend_table, "CHOICES", (*traced, always))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadgroup``, the cases of one test function stay together, where the test has no group.

    To hand out each of thousands of cases by itself keeps the workers waiting.
    """
    from xdist.scheduler import LoadGroupScheduling

    class ByFunction(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return scope if scope != nodeid else nodeid.partition("[")[0]

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            scope = self._split_scope(self.registered_collections[node][item_index])
            super().mark_test_complete(node, item_index, duration)
            if all(self.assigned_work[node][scope].values()):  # else it is counted again after each test
                del self.assigned_work[node][scope]

    return ByFunction(config, log) if config.getoption("dist") == "loadgroup" else None
