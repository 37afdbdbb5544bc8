"""Record of a GPU check -> the back-ends for each kind of shape, fastest first, as a table of literals.

A back-end is in an order only if its results were right: no case of parts b and c with this filter went wrong or
failed. The table's data live in ``models/backend_measured.py``, which travels with a checkpoint;
``imgproc-attn gpu-check --render`` writes them there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .parts import BAD, MEASURED

KINDS = {
    "twicing": "twicing",
    "twicing, 3 steps": "several steps",
    "bilateral untied": "columns",
    "bilateral gaussian": "columns",
}
"""Filter that part c times -> kind of a call in ``models/backend_measured.py``."""

BACKENDS = ("sdpa", "blocked", "triton", "flex")
ADVANTAGE = {"flex": 1.25}
"""How many times faster than the others a back-end has to be to come before them: FlexAttention compiles for seconds
at every new shape, which no timing with warm caches shows."""


class MeasuredOrder(NamedTuple):
    """A row of the table; the names are those in ``models/backend_measured.py``.

    Attributes:
        kind: ``"twicing"``, ``"several steps"`` or ``"columns"``.
        is_causal: whether query i sees keys j <= i only.
        backward: whether gradients are wanted.
        length: tokens.
        head_dim: width of a head, without columns.
        order: back-ends, fastest first.
    """

    kind: str
    is_causal: bool
    backward: bool
    length: int
    head_dim: int
    order: tuple[str, ...]


def cuda_choices(record: dict[str, Any] | None) -> tuple[MeasuredOrder, ...]:
    """The table of a record.

    Args:
        record: of ``gpu-check``; None, or one of a rehearsal, gives an empty table.

    Returns:
        A row for every kind, shape and direction that at least two back-ends were timed on, sorted.
    """
    if record is None or record["environment"]["device"]["type"] != "cuda":
        return ()
    distrusted = {
        (case["about"].get("filter"), case["about"].get("backend"))
        for letter in "bc"
        for case in _cases(record, letter)
        if case["status"] in BAD
    }
    costs: dict[tuple[str, bool, bool, int, int], dict[str, list[float]]] = {}
    for case in _cases(record, "c"):
        about = case["about"]
        name, backend = about.get("filter"), about.get("backend")
        if case["status"] != MEASURED or name not in KINDS or backend not in BACKENDS or about["graph"]:
            continue
        if (name, backend) in distrusted:
            continue
        _, _, length, head_dim = about["shape"]
        for direction, found in case["values"]["directions"].items():
            key = (KINDS[name], about["is_causal"], direction != "forward", length, head_dim)
            costs.setdefault(key, {}).setdefault(backend, []).append(found["ratio"] * ADVANTAGE.get(backend, 1.0))
    return tuple(
        MeasuredOrder(*key, _order(found)) for key, found in sorted(costs.items()) if len(_comparable(found)) >= 2
    )


ALGORITHMS = "triton ", "two_calls "
"""How the back-ends are called that are single algorithms of twicing, of which ``gpu/measured.py`` holds a table."""


class MeasuredAlgorithms(NamedTuple):
    """A row of the table of algorithms; the names are those in ``gpu/measured.py``.

    Attributes:
        device: its name.
        is_causal: whether query i sees keys j <= i only.
        backward: whether it is for gradients.
        items: batch times heads.
        length: tokens.
        head_dim: width of a head.
        order: algorithms, fastest first.
    """

    device: str
    is_causal: bool
    backward: bool
    items: int
    length: int
    head_dim: int
    order: tuple[str, ...]


def algorithm_choices(record: dict[str, Any] | None) -> tuple[MeasuredAlgorithms, ...]:
    """The table of a record: what twicing costs by each of the kernels' algorithms.

    For gradients it is the time of forward and backward together, less that of forward by the same algorithm.

    Args:
        record: of ``gpu-check``; None, or one of a rehearsal, gives an empty table.
    """
    if record is None or record["environment"]["device"]["type"] != "cuda":
        return ()
    cases = [case for letter in "bc" for case in _cases(record, letter)]
    wrong = {case["about"].get("backend") for case in cases if case["status"] in BAD}
    wrong |= {case["about"].get("method") for case in cases if case["status"] in BAD}
    device = record["environment"]["device"]["name"]
    costs: dict[tuple[str, bool, bool, int, int, int], dict[str, float]] = {}
    for case in _cases(record, "c"):
        about, backend = case["about"], case["about"].get("backend") or ""
        if case["status"] != MEASURED or about.get("filter") != "twicing" or about["graph"] or backend in wrong:
            continue
        if not backend.startswith(ALGORITHMS):
            continue
        batch, heads, length, head_dim = about["shape"]
        forward, both = (found["milliseconds"] for found in case["values"]["directions"].values())
        for backward, cost in ((False, forward), (True, both - forward)):
            key = (device, about["is_causal"], backward, batch * heads, length, head_dim)
            costs.setdefault(key, {})[backend.removeprefix("triton ")] = cost
    return tuple(
        MeasuredAlgorithms(*key, tuple(sorted(found, key=lambda name: (found[name], name))))
        for key, found in sorted(costs.items())
        if len(found) >= 2
    )


def algorithms_source(record: dict[str, Any] | None) -> str:
    """The measured algorithms as Python, for ``gpu/measured.py``."""
    rows = algorithm_choices(record)
    if not rows:
        return "MEASURED: tuple[Row, ...] = ()"
    lines = []
    for device, is_causal, backward, items, length, head_dim, order in rows:
        names = ", ".join(f'"{name}"' for name in order)
        lines.append(f'    ("{device}", {is_causal}, {backward}, {items}, {length}, {head_dim}, ({names})),')
    return "\n".join(["MEASURED: tuple[Row, ...] = (", *lines, ")"])


def _order(costs: dict[str, list[float]]) -> tuple[str, ...]:
    comparable = _comparable(costs)
    return tuple(sorted(comparable, key=lambda backend: (comparable[backend], backend)))


def _comparable(costs: dict[str, list[float]]) -> dict[str, float]:
    """Mean cost of the back-ends that were timed on every filter of a kind; the others' means say something else."""
    most = max(len(found) for found in costs.values())
    return {backend: sum(found) / most for backend, found in costs.items() if len(found) == most}


def _cases(record: dict[str, Any], letter: str) -> list[dict[str, Any]]:
    return list(record["parts"].get(letter, {}).get("cases", {}).values())
