"""Hooks of pytest: while an elementary law is broken, which fails under its own name, all else that fails is one line.

A flipped sign in a booster turns hundreds of tests of models and back-ends red, and none of them names the cause. The
laws are the tests with the mark ``elementary``.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

_LAWS = pytest.StashKey[list[pytest.Function]]()
_BROKEN_LAW = pytest.StashKey[str | None]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember the elementary laws that this run tests."""
    laws = (item for item in session.items if item.get_closest_marker("elementary"))
    session.config.stash[_LAWS] = [item for item in laws if isinstance(item, pytest.Function)]


def _broken_law(config: pytest.Config) -> str | None:
    """The elementary law that does not hold, found out when the first test fails, in each process for itself."""
    if _BROKEN_LAW not in config.stash:
        config.stash[_BROKEN_LAW] = None
        for item in config.stash.get(_LAWS, []):
            try:
                item.obj(**getattr(getattr(item, "callspec", None), "params", {}))
            except Exception:
                config.stash[_BROKEN_LAW] = item.name
                break
    return config.stash[_BROKEN_LAW]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count what fails beside a broken law as skipped, with the law as the reason, in one line of the summary."""
    report = yield
    if report.failed and item.get_closest_marker("elementary") is None:
        law = _broken_law(item.config)
        if law is not None:
            report.outcome = "skipped"
            report.longrepr = (__file__, 0, f"failed, which says nothing while {law} fails: mend that first")
    return report
