"""What the site does beyond plain MkDocs.

- README.md, CONTRIBUTING.md and CHANGELOG.md are pages too, without copies of them.
- A link to another file of the repository (a test, the code, a card) leads to the file's text on the site: the pages
  can be read away from the repository, and a strict build finds links that lead nowhere.
- Mathematics becomes MathML when the site is built: a browser needs neither scripts nor a network to show it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files beside docs/ that are pages, and where these are on the site."""
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]+)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/, and every file that a page links."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):

        def add(path: str) -> str:
            uri = place_of(path)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            return uri

        with_links(page.content_string, page.src_uri, add)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to the repository's files to their texts on the site, and mark displayed mathematics."""
    markdown = with_links(markdown, page.file.src_uri, place_of)
    return re.sub(r"^```math\n(.*?)^```$", r"$$\n\1$$", markdown, flags=re.MULTILINE | re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Put MathML in place of the formulas that the extension ``arithmatex`` has found."""

    def formula(found: re.Match[str]) -> str:
        text: str = convert(unescape(found[2]), display="block" if found[1] == "div" else "inline")
        # Bars of a norm: browsers without a font for mathematics would stretch the one that has an exponent.
        return text.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')

    pattern = r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>'
    return re.sub(pattern, formula, html, flags=re.DOTALL)


def with_links(text: str, page: str, lead: Callable[[str], str]) -> str:
    """A page's text with its links to files outside docs/ led elsewhere.

    Args:
        text: Markdown.
        page: of the site, ``index.md``.
        lead: path in the repository -> path on the site.
    """
    source = next((name for name, uri in PAGES.items() if uri == page), f"docs/{page}")

    def replaced(found: re.Match[str]) -> str:
        path = os.path.normpath(PurePosixPath(source).parent / found[2])
        if "://" in found[2] or not (ROOT / path).is_file():
            return found[0]  # MkDocs judges it
        target = path.removeprefix("docs/") if path.startswith("docs/") else lead(path)
        return found[1] + os.path.relpath(target, PurePosixPath(page).parent)

    return LINK.sub(replaced, text)


def place_of(path: str) -> str:
    """Where a file of the repository is on the site: as text, which browsers show."""
    return PAGES.get(path, f"source/{path}.txt")
