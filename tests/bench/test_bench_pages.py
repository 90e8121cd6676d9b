"""Reports in HTML and Markdown, with their figures, on made-up results."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from bench_cases import BROKEN, contest, results
from fastbert.bench import plots
from fastbert.bench.report import write_report
from fastbert.bench.results import FAILED, WRONG, Results, Row
from fastbert.pages import figures as drawing
from fastbert.pages.document import NO_FIGURES

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from
import compare  # noqa: E402
import report as page  # noqa: E402


class Page(HTMLParser):
    """Collects ids and whatever names a resource; fails if tags do not nest."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.ids, self.resources, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.resources += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def by_length(broken=("OpenVINO",)):
    """Two contests, with all that figures are made of."""
    contests = []
    for length in (128, 512):
        extra = {"model": "BERT-base", "length": length, "batch": 8, "prepare_seconds": 1.5, "cold_start_seconds": 3.0}
        contests.append(contest(workload=f"S{length} b8", ratios={"eager": 2.0, "flash": 0.5}, broken=broken, **extra))
        for row in contests[-1][:3]:
            row.peak_bytes, row.ceiling_fraction = 2**29, 0.75
    return results(*contests)


def test_html_refers_to_nothing_outside(tmp_path):
    """Catches a page that needs a network, that a planted tag breaks, or whose figures share ids."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    results_by_length = by_length(broken=BROKEN)
    write_report(results_by_length, tmp_path / "r.html", title="a <title>")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    parsed = Page(text)
    assert all(resource.startswith("#") for resource in parsed.resources)
    assert "http" not in text and "@import" not in text and "<script" not in text and "<planted>" not in text
    assert all(target.startswith("url(#") for target in re.findall(r"url\([^)]*", text))
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {r.removeprefix("#") for r in parsed.resources} <= set(parsed.ids)
    for status, detail in BROKEN.values():
        assert f"{status}: {detail}" in parsed.text
    assert text.count("<svg") == 6  # ratio, by length, ceiling, memory, cold start, prepare
    assert "currentColor" in text and drawing.INK not in text


def test_every_figure_says_where_and_when_and_its_unit():
    """Catches a figure that nobody can place, an axis without a unit, or a peer that vanishes from a figure."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    drawn = {plot.name: plot.svg() for plot in plots.figures(by_length())}
    units = {
        "model-bert-base-ratio": "times faster",
        "model-bert-base-bfloat16-by-length": "million valid tokens/s",
        "model-ceiling": "% of the ceiling",
        "model-memory": "MiB",
        "model-cold-start": "seconds",
        "model-prepare": "seconds",
    }
    for name, unit in units.items():
        shown = re.sub(r"<[^>]*>", "\n", drawn.pop(name))
        assert "Planted H100, 2026-02-01" in shown and unit in shown
        assert name == "model-prepare" or "OpenVINO" in shown
    assert not drawn


def test_figures_of_results_full_of_holes():
    """Catches an empty figure, a crash on a row without numbers, or a status missing among the bars."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    assert plots.figures(Results({})) == []
    assert plots.figures(results([Row("s", "w", "fastbert", "float32", FAILED, "x")])) == []
    holes = contest(workload="S128 b8", ratios={"eager": 2.0}) + contest(workload="S256 b8", ratios={"eager": 3.0})
    holes[3].status, holes[3].speedup = WRONG, None
    (ratio,) = plots.figures(results(holes))
    assert ">wrong<" in ratio.svg()


def test_colours_can_be_seen_on_white_and_on_black():
    """Catches a colour that vanishes in the light or in the dark page."""

    def luminance(colour):
        parts = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (drawing.BLUE, drawing.ORANGE, drawing.GREY, *drawing.PALETTE):
        for back in ("#ffffff", "#14171a"):
            light, dark = sorted((luminance(colour), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, back)


def test_markdown_has_its_figures_beside_it(tmp_path):
    """Catches links to figures that are not there, figures of a former report left, or other people's files removed."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    path, folder = tmp_path / "my report.md", tmp_path / "my report-figures"
    write_report(results(*by_length_contests(1)), path)
    (folder / "notes.txt").write_text("mine")
    first = {p.name for p in folder.iterdir()}
    write_report(results(*by_length_contests(2)), path)
    text = path.read_text(encoding="utf-8")
    links = [tmp_path / unquote(link) for link in re.findall(r"\]\(([^)]*\.png)\)", text)]
    assert links and all(link.read_bytes().startswith(b"\x89PNG") for link in links)
    assert {p.name for p in folder.iterdir()} == {"notes.txt", *(link.name for link in links)} != first
    assert r"**failed**" in text and r"RuntimeError: \<planted\> & \| failure" in text


def by_length_contests(ratio):
    return [contest(workload="S128 b8", ratios={"eager": float(ratio)}, broken=["compiled"])]


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch):
    """Catches a report that needs matplotlib, or is silent about what it lacks."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("r.html", "r.md"):
        write_report(by_length(), tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert NO_FIGURES in text and "eager" in text and "2.00×" in text and "<svg" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.md"]


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_unknown_kind_of_report(name, tmp_path):
    """Catches a report of another kind written under a name that promises something else."""
    with pytest.raises(ValueError, match=rf"path: got '.*{name}', expected a name that ends in \.md or \.html"):
        write_report(results(contest()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["r.html", "r.md"])
def test_interrupted_report_leaves_the_old_one(name, tmp_path, monkeypatch):
    """Catches half a page under the final name, or an old page that has lost its figures."""
    one = drawing.Plot("model", "one", "one", "one", lambda: None)
    monkeypatch.setattr(plots, "figures", lambda each: [one])
    monkeypatch.setattr(drawing.Plot, "svg", lambda self: "<svg></svg>")
    monkeypatch.setattr(drawing.Plot, "png", lambda self: b"old")
    write_report(results(contest()), tmp_path / name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing.Plot, "png", lambda self: b"new")
    monkeypatch.setattr("fastbert.bench.report.write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(results(contest()), tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_folder_is_read_as_one(tmp_path):
    """Catches rows of one file only, notes that overwrite each other, or a second commit that is hidden."""
    one, two = results(contest("model")), results(contest("text"), date="2026-02-02 01:00 UTC", commit="abcdef")
    one.notes, two.notes = {"seconds": 1}, {"seconds": 2}
    two.environment["packages"] |= {"torch": "2.12.0"}
    one.save(tmp_path / "model.json")
    two.save(tmp_path / "text.json")
    loaded = page.load(tmp_path)
    assert [row.suite for row in loaded.rows] == ["model", "model", "text", "text"]
    assert loaded.notes == {"model: seconds": 1, "text: seconds": 2}
    assert loaded.environment["commit"] == "0123456789 / abcdef" and loaded.environment["date"].startswith("2026-02-02")
    assert loaded.environment["packages"]["torch"] == "2.11.0 / 2.12.0"


def test_truncated_file_is_refused_by_name(tmp_path, capsys):
    """Catches a page of half a folder, where a file that is cut short is passed over in silence."""
    results(contest()).save(tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "text.json").write_text(text[: len(text) // 2])
    assert page.main([str(tmp_path)]) == 1
    assert "text.json: not a readable result file" in capsys.readouterr().err
    assert not (tmp_path / "index.md").exists()
    assert compare.main([str(tmp_path), str(tmp_path / "model.json")]) == 2
    assert "text.json: not a readable result file" in capsys.readouterr().err


def test_folder_of_two_devices_is_refused(tmp_path):
    """Catches the results of two machines in one table."""
    results(contest()).save(tmp_path / "a.json")
    results(contest(), device="Another").save(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"different devices: Planted H100 in a.json, Another in b.json"):
        page.load(tmp_path)


def test_page_of_a_folder(tmp_path, monkeypatch, capsys):
    """Catches no page beside the results, or one without the environment, the ceilings or the method."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "empty").mkdir()
    assert page.main([str(tmp_path / "empty")]) == 1 and "no result files" in capsys.readouterr().err
    results(contest()).save(tmp_path / "r" / "model.json")
    assert page.main([str(tmp_path / "r")]) == 0
    for name in ("index.md", "index.html"):
        text = (tmp_path / "r" / name).read_text(encoding="utf-8")
        for part in ("Planted H100", "torch 2.11.0", "copy GB/s", "bootstrap", "openvino", "eager"):
            assert part in text
