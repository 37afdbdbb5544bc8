"""One self-contained HTML page: panels to switch, each with what it shows and what to look for."""

from __future__ import annotations

import base64
import html

from .definitions import GROUPS, definition_rows, learned_definitions
from .figures import Pictures, view_name
from .report import Report, cell, counted, head_table, kinds_of, learned_names, seconds_in_words

PANELS: dict[str, tuple[str, str, str]] = {
    "heads": (
        "Heads",
        "Each square is one attention head: a row a layer, a column a head, bright is large.",
        "Local heads (dark in position bandwidth), heads that are switched off (bright in weight on sinks, dark "
        "in the norm of their values), and heads that only average (entropy near uniform).",
    ),
    "kernels": (
        "Kernels",
        "What the logits of attention are made of, by layer: how much of their variation comes from comparing content "
        "with content, position with position, and one with the other. Constant is the mean of all queries: what they "
        "prefer whatever they are.",
        "A bilateral filter has the first two only. Large cross terms (content-position, position-content) are what "
        "stock attention adds; the residual is context that the words alone do not explain.",
    ),
    "maps": (
        "Filter maps",
        "What one token (the red mark) receives from where, in every head: by content alone, by position alone, by "
        "both (product), and through the booster (operator), where the layer has one. Below a text stands the text "
        "itself, darker where more is received, mean over heads.",
        "Compare product with its factors: where it equals the position map, the head does not look at content. "
        "Negative weights of a booster sharpen: they are orange.",
    ),
    "smoothing": (
        "Over-smoothing",
        "How alike the tokens are at each layer: as they enter a block, as values, after the filter, after the "
        "residual connection, and as they leave.",
        "The filter averages, so its output is mostly more alike than its values. If similarity rises to 1, or high "
        "frequency and stable rank fall to their least with depth, tokens lose what tells them apart.",
    ),
    "noise": (
        "Noise",
        "Noise of known size is put into the input; the curves show how much stronger the signal is than the noise at "
        "each place, and on the right, what each part of a block gains.",
        "Above 0 a part removes noise, below it amplifies it. The dotted line is what the paper's proposition "
        "promises.",
    ),
    "spectra": (
        "Spectra",
        "Eigenvalues of the filter A, and of what a booster makes of it, in the complex plane with the unit circle, "
        "and what follows for contrast between tokens, by layer.",
        "Radius below 1: repeated filtering wipes contrast out. Gain above 1: a single application amplifies some of "
        "it.",
    ),
    "removed": (
        "What the filter removes",
        "The size of V − p(A) V at each token: what the filter takes away from the values (method noise).",
        "A good denoiser removes noise that shows no structure; edges or words here are detail that is lost.",
    ),
    "numbers": (
        "Numbers",
        "Every head's numbers in a table.",
        "Heads that stand out in their column; the same numbers, and more, are in lens.json.",
    ),
    "definitions": (
        "Definitions",
        "What every number and every word beside it is, on this page and in lens.json.",
        "The rows with the title that you see in a picture or a table; the sources are in docs/lens.md.",
    ),
}
"""Panel -> title, what it shows, what to look for."""

STYLE = """
:root{--ink:#1b1b1b;--paper:#fff;--line:#bbb;--accent:#0072B2}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;padding:1rem}
body{max-width:75rem}
nav{display:flex;flex-wrap:wrap;gap:.4rem;margin:1rem 0}
button{font:inherit;padding:.3rem .8rem;border:1px solid var(--line)}
button{background:#f5f5f5;border-radius:.3rem;cursor:pointer}
button[aria-selected=true]{background:var(--accent);color:#fff;border-color:var(--accent)}
.js section.panel:not(.shown),.js .view:not(.shown){display:none}
img{max-width:100%;height:auto}
.look{color:#444}
table{border-collapse:collapse;font-size:.85rem}
th,td{border:1px solid var(--line);padding:.15rem .5rem;text-align:right}
td.text,th.text{text-align:left}
.wide{overflow-x:auto}
figure{margin:1rem 0}
.tokens{line-height:1.9}
.tokens span{padding:.1rem .15rem;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.tokens .chosen{outline:2px solid red}
@media print{nav,label{display:none}.js section.panel:not(.shown),.js .view:not(.shown){display:block}
section.panel{break-inside:avoid}}
"""

SCRIPT = """
document.documentElement.classList.add('js');
function show(kind, scope, id){
  scope.querySelectorAll(kind).forEach(function(e){e.classList.toggle('shown', e.id === id)});
}
function open(id){
  show('section.panel', document, id);
  document.querySelectorAll('nav button').forEach(function(b){
    b.setAttribute('aria-selected', String(b.dataset.panel === id));
  });
}
document.querySelectorAll('nav button').forEach(function(b){
  b.addEventListener('click', function(){
    open(b.dataset.panel);
    try { history.replaceState(null, '', '#' + b.dataset.panel); } catch (e) { /* inside the app's frame */ }
  });
});
document.querySelectorAll('select').forEach(function(s){
  var panel = s.closest('section');
  s.addEventListener('change', function(){ show('.view', panel, s.value); });
  show('.view', panel, s.value);
});
var wanted = location.hash.slice(1);
open(document.getElementById(wanted) ? wanted : document.querySelector('section.panel').id);
addEventListener('load', function(){ scrollTo(0, 0); });
document.body.dataset.ready = 'yes';
"""


def page(reports: list[Report], pictures: Pictures) -> str:
    """The page of one or more reports with the pictures of ``figures.draw_all``."""
    names = [name for name in PANELS if name in pictures or name in ("numbers", "definitions")]
    buttons = "".join(
        f'<button type="button" role="tab" data-panel="{name}" aria-selected="false">{_text(PANELS[name][0])}</button>'
        for name in names
    )
    title = f"What {', '.join(report.model for report in reports)} filters"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        "<p>Self-attention averages the values of tokens with weights that depend on how alike they are: it is a "
        "filter, as image processing knows them. This page shows what the filters of a trained model do on real "
        "input.</p>",
        *(f"<p>{_text(_described(report))}</p>" for report in reports),
        *(f"<p><b>Note.</b> {_text(f'{report.model}: {note}.')}</p>" for report in reports for note in report.notes),
        _skipped(reports),
        f'<nav role="tablist" aria-label="panels">{buttons}</nav>',
        *(_panel(name, reports, pictures) for name in names),
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _described(report: Report) -> str:
    return (
        f"{report.model}: {report.model_type}, {report.parameters:,} parameters, {len(report.layers)} layers, "
        f"{kinds_of(report)}. Shown: "
        f"{counted(report.samples, 'sample')} of {report.length} tokens, {report.data}. "
        f"Time: {seconds_in_words(report)}."
    )


def _skipped(reports: list[Report]) -> str:
    reasons = [f"{report.model}: {reason}" for report in reports for reason in report.skipped]
    items = "".join(f"<li>{_text(reason)}</li>" for reason in reasons)
    return f"<p>Not measured:</p><ul>{items}</ul>" if reasons else ""


def _panel(name: str, reports: list[Report], pictures: Pictures) -> str:
    title, shows, look = PANELS[name]
    if name == "numbers":
        body = "".join(_numbers(report) for report in reports)
    elif name == "definitions":
        body = _definitions(reports)
    else:
        views, texts = pictures[name], _coloured_texts(reports) if name == "maps" else {}
        body = _views(name, views, texts, _groups(reports, views))
    return (
        f'<section class="panel" id="{name}" role="tabpanel"><h2>{_text(title)}</h2><p>{_text(shows)}</p>'
        f'<p class="look"><b>Look for:</b> {_text(look)}</p>{body}</section>'
    )


MOST_COLOURED = 256
"""Tokens of a text that are shown in colours."""


def _coloured_texts(reports: list[Report]) -> dict[str, str]:
    """View -> the text in colours, a line a kernel: what the chosen token receives, mean over heads."""
    found = {}
    for report in reports:
        if report.grid is not None or not report.labels or report.length > MOST_COLOURED:
            continue
        for layer in report.layers:
            lines = [_coloured_text(report, kernel, weights) for kernel, weights in layer.maps.items()]
            found[view_name(report, layer, len(reports))] = "".join(lines)
    return found


def _coloured_text(report: Report, kernel: str, heads: list[list[float]]) -> str:
    means = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
    most = max(map(abs, means)) or 1.0
    tokens = []
    for index, (label, mean) in enumerate(zip(report.labels, means, strict=False)):
        colour = "0,114,178" if mean >= 0 else "213,94,0"
        mark = ' class="chosen"' if index == report.token else ""
        style = f"background:rgba({colour},{0.6 * abs(mean) / most:.2f})"
        tokens.append(f'<span{mark} style="{style}" title="{cell(mean)}">{_text(label.strip() or "·")}</span>')
    return f'<p class="tokens"><b>{_text(kernel)}</b> {" ".join(tokens)}</p>'


def _views(panel: str, views: dict[str, bytes], texts: dict[str, str], groups: dict[str, list[str]]) -> str:
    """The pictures of a panel, one group of them at a time where there are several.

    Args:
        panel: its name.
        views: name -> PNG.
        texts: name of a view -> the text in colours.
        groups: what a reader chooses among -> the views that are then shown.
    """
    parts = []
    several = len(groups) > 1
    if several:
        options = "".join(
            f'<option value="{panel}-{number}">{_text(group)}</option>' for number, group in enumerate(groups)
        )
        parts.append(f'<p><label>Show <select aria-label="{_text(PANELS[panel][0])}">{options}</select></label></p>')
    for number, members in enumerate(groups.values()):
        shown = ' class="view"' if several else ""
        figures = []
        for view in members:
            data = base64.b64encode(views[view]).decode("ascii")
            is_named = len(views) > 1
            label = f"{PANELS[panel][0]}, {view}" if is_named else PANELS[panel][0]
            figures.append(
                f"<figure><figcaption>{_text(view) if is_named else ''}</figcaption>"
                f'<img alt="{_text(label)}" src="data:image/png;base64,{data}">{texts.get(view, "")}</figure>'
            )
        parts.append(f'<div id="{panel}-{number}"{shown}>{"".join(figures)}</div>')
    return "".join(parts)


def _groups(reports: list[Report], views: dict[str, bytes]) -> dict[str, list[str]]:
    """Views of all models by layer, so that models stand below each other; others each by itself."""
    groups: dict[str, list[str]] = {}
    for report in reports:
        for layer in report.layers:
            view = view_name(report, layer, len(reports))
            if view in views:
                groups.setdefault(f"layer {layer.index}", []).append(view)
    return groups or {view: [view] for view in views}


def _numbers(report: Report) -> str:
    titles, rows = head_table(report)
    head_row = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f'<h3>{_text(report.model)}</h3><div class="wide"><table><tr>{head_row}</tr>{body}</table></div>'


def _definitions(reports: list[Report]) -> str:
    learned = learned_definitions(dict.fromkeys(name for report in reports for name in learned_names(report)))
    groups = {**GROUPS, **({"What its filters hold": learned} if learned else {})}
    parts = []
    for group, held in groups.items():
        titles, rows = definition_rows(held, ("title", "formula", "reading", "name"))
        head = "".join(f'<th class="text">{title}</th>' for title in titles)
        body = "".join(
            "<tr>" + "".join(f'<td class="text">{_text(text)}</td>' for text in row) + "</tr>" for row in rows
        )
        parts.append(f'<h3>{_text(group)}</h3><div class="wide"><table><tr>{head}</tr>{body}</table></div>')
    return "".join(parts)
