"""A page as HTML: one stylesheet, one skeleton, and nothing that comes from outside.

The page follows the reader's choice of a light or a dark screen, fits a telephone, and prints in black on white.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from itertools import zip_longest

from fastbert.pages.document import OK, Block, Fold, Line, Page, Picture, Section, Table, Text, Verdict
from fastbert.pages.figures import Bar

STYLESHEET = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --back: #ffffff; --band: #f4f6f8; --rule: #d5dbe1;
  --good: #2f7de1; --bad: #b3261e; --bad-band: #fdf0ee; --gap: 0.7rem; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a0a8b0; --back: #14171a; --band: #1d2226; --rule: #3a4148; --good: #5b9bf0;
    --bad: #ff8a80; --bad-band: #2c1c1b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--rule); font-size: 1.25rem; }
.subject { margin: 0.2rem 0 1.2rem; color: var(--soft); overflow-wrap: anywhere; }
.note { margin: 0.4rem 0; color: var(--soft); font-size: 0.87rem; overflow-wrap: anywhere; }
.verdict { padding: 1rem 1.25rem; border-left: 0.4rem solid var(--good); border-radius: 0.3rem;
  background: var(--band); }
.verdict.bad { border-color: var(--bad); background: var(--bad-band); }
.sentence { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.4; overflow-wrap: anywhere; }
.word { margin-right: 0.5rem; padding: 0.1rem 0.55rem; border-radius: 0.3rem; color: var(--back);
  background: var(--good); }
.bad .word { background: var(--bad); }
.points { margin: 0.6rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.picture { margin: 1.2rem 0 0; }
.picture figcaption { font-weight: 600; font-size: 0.93rem; }
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(8rem, 1fr) max-content;
  margin: 0.3rem 0 0; padding: 0; list-style: none; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
.bars li { display: grid; grid-column: 1 / -1; grid-template-columns: subgrid; column-gap: var(--gap);
  align-items: center; }
.track { position: relative; height: 1.55rem; }
.bar { position: absolute; top: 0.3rem; bottom: 0.3rem; min-width: 2px; border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.whisker { position: absolute; top: 50%; height: 0; border-top: 1.5px solid var(--ink); }
.line { position: absolute; top: 0; bottom: 0; border-left: 1.5px dashed var(--ink); }
.remark { color: var(--soft); }
.axis .track { height: 1.3rem; } .axis .line { top: auto; height: 0.3rem; }
.axis em { position: absolute; bottom: 0.3rem; color: var(--soft); font-style: normal; font-size: 0.8rem;
  white-space: nowrap; }
.scroll, .plot { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { padding: 0.3rem 0; text-align: left; font-weight: 600; }
th, td { padding: 0.28rem 0.6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; line-height: 1.25; vertical-align: bottom;
  white-space: normal; }
th:first-child { position: sticky; left: 0; background: var(--back); text-align: left; }
tbody th { font-weight: 400; }
td.text, td.reason { min-width: 12rem; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.prose thead th { text-align: left; }
.ours th, .ours td { background: var(--band); } .ours th { font-weight: 600; }
tr.bad th, tr.bad td { background: var(--bad-band); } tr.bad th, tr.bad td:last-child { color: var(--bad);
  font-weight: 600; }
.status { color: var(--bad); font-weight: 600; }
.plot svg { min-width: 36rem; max-width: 100%; height: auto; }
summary { cursor: pointer; color: var(--soft); }
.method li { margin: 0.3rem 0; max-width: 60rem; }
@media (max-width: 44rem) {
  body { padding: 1rem 0.8rem 3rem; } .verdict { padding: 0.8rem; } .sentence { font-size: 1.08rem; }
  .bars { display: block; } .track { flex-basis: 100%; order: 1; height: 1.1rem; }
  .bars li { display: flex; flex-wrap: wrap; justify-content: space-between; margin-top: 0.25rem; line-height: 1.3; }
  .bar { top: 0.15rem; bottom: 0.15rem; }
  th:first-child { min-width: 8rem; max-width: 40vw; white-space: normal; overflow-wrap: break-word; } }
@media print {
  @page { margin: 12mm; } body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll, .plot { overflow: visible; } .plot svg { min-width: 0; } table { font-size: 6.5pt; }
  .sentence { font-size: 12pt; } .bars { font-size: 8pt; } .track { height: 1.3rem; }
  th, td { padding: 0.15rem 0.3rem; white-space: normal; } tbody th { min-width: 7rem; }
  thead th { overflow-wrap: anywhere; }
  tr, figure, .verdict { break-inside: avoid; } h2, caption, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


def render(page: Page) -> str:
    """The page as one HTML document: the verdict first, the method and the environment last."""
    parts = [
        f'<header><h1>{_text(page.title)}</h1>\n<p class="subject">{_text(page.subject)}</p></header>',
        _verdict(page.verdict),
        *map(_section, page.sections),
        f'<section class="method"><h2>Method</h2>\n{_items(page.method)}</section>',
        f'<section class="environment"><h2>Environment</h2>\n{_blocks(page.environment)}</section>',
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(page.title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLESHEET}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _items(items: Iterable[str], tone: str = "") -> str:
    attribute = f' class="{tone}"' if tone else ""
    return f"<ul{attribute}>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{_text(note)}</p>' for note in notes)


def _verdict(verdict: Verdict) -> str:
    word = f'<span class="word">{_text(verdict.word)}</span>' if verdict.word else ""
    points = _items(verdict.points, "points") if verdict.points else ""
    picture = "" if verdict.picture is None else _picture(verdict.picture)
    return (
        f'<section class="verdict {"good" if verdict.good else "bad"}">'
        f'<p class="sentence">{word}{_text(verdict.sentence)}</p>\n{points}{picture}{_notes(verdict.notes)}</section>'
    )


def _section(section: Section) -> str:
    return f"<section><h2>{_text(section.title)}</h2>\n{_blocks(section.blocks)}</section>"


def _blocks(blocks: Iterable[Block]) -> str:
    return "\n".join(map(_block, blocks))


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Fold):
        return f"<details><summary>{_text(block.title)}</summary>\n{_blocks(block.tables)}\n</details>"
    if isinstance(block, Table):
        return _table(block)
    return f'<figure class="plot">{block.svg()}</figure>'


def _table(table: Table) -> str:
    rows = "".join(_row(line, table) for line in table.lines)
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in table.header)
    opening = '<table class="prose">' if table.prose else "<table>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.title)}">'
        f"{opening}<caption>{_text(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{_notes(table.notes)}"
    )


def _row(line: Line, table: Table) -> str:
    if line.status == OK:
        opening = '<td class="text">' if table.prose else "<td>"
        cells = "".join(f"{opening}{_text(cell)}</td>" for cell in line.cells)
    else:
        reason = f'<span class="status">{_text(line.status)}</span>: {_text(line.reason)}'
        cells = f'<td class="reason" colspan="{len(table.header) - 1}">{reason}</td>'
    tone = f' class="{line.tone}"' if line.tone else ""
    return f'<tr{tone}><th scope="row">{_text(line.name)}</th>{cells}</tr>'


def _picture(picture: Picture) -> str:
    scale = _Scale(picture)
    rows = "".join(
        f'<li><span class="name">{_text(name)}</span><span class="track">{scale.marks(bar)}</span>'
        f'<span class="value">{_value(bar, remark)}</span></li>'
        for name, bar, remark in zip_longest(picture.names, picture.bars, picture.remarks, fillvalue="")
    )
    return (
        f'<figure class="picture"><figcaption>{_text(picture.title)}</figcaption>\n'
        f'<ul class="bars">{scale.axis()}{rows}</ul>\n{_notes([picture.foot])}</figure>'
    )


def _value(bar: Bar | str, remark: str) -> str:
    value = _text(bar.label) if isinstance(bar, Bar) else f'<span class="status">{_text(bar)}</span>'
    return f'{value} <span class="remark">{_text(remark)}</span>' if remark else value


class _Scale:
    """Places along the picture's bars, as shares of their length."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        drawn = [bar for bar in picture.bars if isinstance(bar, Bar)]
        ends = [1.0, *(end for bar in drawn for end in (bar.value, bar.low, bar.high) if end is not None)]
        ends = [end for end in ends if math.isfinite(end)]
        if picture.log:
            low, high = math.log(min(ends)), math.log(max(ends))
            margin = 0.02 * max(high - low, 0.3)
            self.low, self.high = low - margin, max(high, low + 0.3) + margin
        else:
            # A bar beyond three times the line is cut there: its label has the number.
            self.low, self.high = 0.0, min(1.08 * max(ends), 3.0)

    def place(self, value: float) -> float:
        if self.picture.log:
            value = math.log(value)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def marks(self, bar: Bar | str) -> str:
        """The line at 1 and, if there is one, the bar with its whisker."""
        line = f'<span class="line" style="left: {self.place(1.0):.2%}"></span>'
        if not isinstance(bar, Bar):
            return line
        start, end = sorted((self.place(1.0 if self.picture.log else 0.0), self.place(bar.value)))
        style = f"left: {start:.2%}; width: {end - start:.2%}; background: {bar.colour}"
        marks = f'<span class="bar" style="{style}"></span>{line}'
        if bar.low is not None and bar.high is not None and bar.high > bar.low:
            low, high = self.place(bar.low), self.place(bar.high)
            marks += f'<span class="whisker" style="left: {low:.2%}; width: {high - low:.2%}"></span>'
        return marks

    def axis(self) -> str:
        """The label of the line at 1, on the side where there is room for it."""
        at = self.place(1.0)
        side = f"left: {at:.2%}" if at < 0.5 else f"right: {1 - at:.2%}"
        label = f'<em style="{side}">{_text(self.picture.line)}</em><span class="line" style="left: {at:.2%}"></span>'
        return f'<li class="axis"><span></span><span class="track">{label}</span><span></span></li>'
