"""Commands that write a table into a page: refused before work begins where the page has no place for it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from hf_imgproc_attn import cli
from hf_imgproc_attn.measure import compatibility, support


@pytest.mark.parametrize(("command", "module", "name"), [
    ("compatibility", compatibility, "measured"), ("support", support, "supported")
])  # fmt: skip
@pytest.mark.parametrize("content", [None, "# a page\n", "<!-- {name}: begin -->\n"])
def test_a_page_without_a_place_for_the_table_is_refused(
    command: str,
    module: ModuleType,
    name: str,
    content: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("work has begun"))
    if content is not None:
        (tmp_path / "page.md").write_text(content.format(name=name), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, str(tmp_path / "page.md")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "page must " in line
