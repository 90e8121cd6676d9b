"""The report, the comparison with a baseline and the figures of the README, on made-up results."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from fastbert.bench import plots, tables
from fastbert.bench.measure import Ratio, Timing
from fastbert.bench.report import NO_FIGURES, render_terminal, write_report
from fastbert.bench.results import FAILED, MISSING, WRONG, Results, Row
from fastbert.pages import figures as drawing

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from

import baseline  # noqa: E402
import compare  # noqa: E402
import readme_figures  # noqa: E402
import report as page  # noqa: E402

BROKEN = {
    "compiled": (FAILED, "RuntimeError: <planted> & | failure"),
    "cuDNN": (WRONG, "error 0.2 above the bound 0.1"),
    "OpenVINO": (MISSING, "the package openvino is not installed"),
}


def environment(kind="cuda", device="Planted H100", date="2026-02-01 12:30 UTC", **changes):
    packages = {"torch": "2.11.0", "triton": "3.6.0", "openvino": None}
    return {"device": device, "device_type": kind, "date": date, "commit": "0123456789", "packages": packages} | changes


def contest(suite="model", workload="S128 b8", ratios=None, *, dtype="bfloat16", ours=0.001, broken=(), **extra):
    """fastbert's row, one a peer with the ratio it should show, and those that did not run."""
    rows = [Row(suite, workload, "fastbert", dtype, error=3e-3, bound=4e-3, extra=dict(extra))]
    for name, ratio in (ratios or {"eager": 2.0}).items():
        rows.append(Row(suite, workload, name, dtype, error=4e-3, bound=0.1, extra=dict(extra)))
        rows[-1].compared(Ratio(ratio, 0.95 * ratio, 1.05 * ratio))
    for row in rows:
        seconds = ours * (row.speedup or 1.0)
        row.timed(Timing((0.99 * seconds, seconds, 1.01 * seconds)), tokens=1024, items=8)
    for name in broken:
        status, detail = BROKEN[name]
        rows.append(Row(suite, workload, name, dtype, status, detail, extra=dict(extra)))
    return rows


def results(*contests, **changes):
    return Results(environment(**changes), [row for rows in contests for row in rows], {"copy GB/s": 3012.3})


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_terminal_shows_numbers_and_reasons():
    """A column that is lost, or a competitor that did not run left blank, at zero, or without its reason."""
    rows = contest(ratios={"eager": 1.84, "flash": 0.8}, broken=BROKEN, model="BERT-base", padding_waste=0.25)
    rows[0].peak_bytes = 3 * 2**30
    text = render_terminal(results(rows), width=200)
    assert text.startswith("Planted H100, 2026-02-01, commit 0123456789\n")
    assert "not installed: openvino" in text and "copy GB/s 3012" in text
    assert "model: BERT-base · S128 b8 · bf16" in text
    ours = line_of(text, "fastbert")
    for cell in ("1.02 M", "8.00 k", "1.00 ms ± 0.5 %", "0.003 (≤ 0.004)", "3.00 GiB", "25 %"):
        assert cell in ours
    assert "1.84× [1.75 to 1.93]" in line_of(text, "eager") and "0.80× [0.76 to 0.84]" in line_of(text, "flash")
    for name, (status, detail) in BROKEN.items():
        assert re.fullmatch(rf"{name} +{re.escape(f'{status}: {detail}')}", line_of(text, name))


def test_terminal_keeps_to_its_width():
    """Lines that a narrow terminal breaks, or columns that are dropped to fit."""
    rows = contest(broken=BROKEN, model="BERT-base", padding_waste=0.25, prepare_seconds=1.0, cold_start_seconds=2.0)
    text = render_terminal(results(rows), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("tokens/s", "time", "fastbert is faster", "error (bound)", "padding", "prepare", "cold start"):
        assert heading in text
    assert text.count("RuntimeError") == 1


def test_no_speedup_where_fastbert_is_wrong():
    """Speed-ups, or blanks, in a contest that fastbert itself did not finish."""
    rows = contest()
    rows[0] = Row("model", "S128 b8", "fastbert", "bfloat16", WRONG, "error 1 above the bound 0.1")
    rows[1].speedup = None
    text = render_terminal(results(rows), width=160)
    assert "no ratio" in line_of(text, "eager") and "fastbert is wrong here, so there are no speed-ups." in text


def test_case_that_failed_as_a_whole():
    """A table without columns when the only row is a failure."""
    rows = [Row("model", "S128 b8", "fastbert", "bfloat16", FAILED, "not timed: its tests failed")]
    assert "failed: not timed: its tests failed" in render_terminal(results(rows), width=100)


def test_same_peers_in_another_dtype_are_another_contest():
    """Rows of two contests in one table, or a peer's own dtype hidden."""
    first, second = contest(ratios={"eager": 2.0, "int8": 1.5}), contest(ratios={"eager": 3.0}, dtype="float32")
    first[2].dtype = "int8"
    found = tables.contests(first + second)
    assert [(c.dtype, len(c.rows)) for c in found] == [("bfloat16", 3), ("float32", 2)]
    assert found[0].name_of(first[2]) == "int8 (int8)" and found[0].name_of(first[1]) == "eager"


def test_summary_holds_means_per_setting_and_every_reason():
    """A mean over throughput and latency together, or a failed peer that counts as if it had run."""
    rows = contest("text", "a", {"eager": 2.0}, setting="throughput", broken=["compiled"])
    rows += contest("text", "b", {"eager": 8.0, "compiled": 3.0}, setting="throughput")
    rows += contest("text", "a", {"eager": 5.0}, setting="latency", broken=["compiled"])
    text = render_terminal(results(rows), width=160, summary_only=True)
    assert line_of(text, "geometric mean, throughput").split()[-5:] == ["4.00×", "3.00×", "(1", "of", "2)"]
    assert "geometric mean, latency" not in text and "\ncompetitor" not in text
    assert "compiled failed, 2 of 3: RuntimeError: <planted> & | failure" in text


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (tables.digits, 999.7, "1000"),
        (tables.digits, 1.2345, "1.23"),
        (tables.digits, 0.0, "0"),
        (tables.si, 1_234_567, "1.23 M"),
        (tables.si, 999_700, "1.00 M"),
        (tables.duration, 0.0009999, "1.00 ms"),
        (tables.duration, 57e-6, "57.0 µs"),
        (tables.times, 0.804, "0.80×"),
        (tables.times, 123.4, "123×"),
        (tables.percent, 0.0213, "2.1 %"),
        (tables.memory, 1536 * 2**20, "1.50 GiB"),
    ],
)
def test_forms_of_numbers(form, value, text):
    """A unit off by a factor, or 1,000 k where 1 M is meant."""
    assert form(value) == text


def test_ceiling_that_could_not_be_measured():
    """A crash on a ceiling that is not a number, which a result file holds as null."""
    found = Results(environment(), contest(), {"copy GB/s": None})
    assert "copy GB/s unknown" in render_terminal(found, width=160)


def test_percentiles_need_rounds():
    """A 99th percentile of three rounds, or none where latency was asked for."""
    assert "p95" not in render_terminal(results(contest()), width=200)
    assert "1.00 ms / 1.01 ms / 1.01 ms" in render_terminal(results(contest(setting="latency")), width=200)


class Page(HTMLParser):
    """Collects ids and whatever names a resource; fails if tags do not nest."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.ids, self.resources, self.text, self.open = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
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
    found = []
    for length in (128, 512):
        extra = {"model": "BERT-base", "length": length, "batch": 8, "prepare_seconds": 1.5, "cold_start_seconds": 3.0}
        found.append(contest(workload=f"S{length} b8", ratios={"eager": 2.0, "flash": 0.5}, broken=broken, **extra))
        for row in found[-1][:3]:
            row.peak_bytes, row.ceiling_fraction = 2**29, 0.75
    return results(*found)


def test_html_refers_to_nothing_outside(tmp_path):
    """A page that needs a network, that a planted tag breaks, or whose figures share ids."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    found = by_length(broken=BROKEN)
    write_report(found, tmp_path / "r.html", title="a <title>")
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
    """A figure that nobody can place, an axis without a unit, or a peer that vanishes from a figure."""
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
    """A figure of nothing, a crash on a row without numbers, or a status missing from among the bars."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    assert plots.figures(Results({})) == []
    assert plots.figures(results([Row("s", "w", "fastbert", "float32", FAILED, "x")])) == []
    holes = contest(workload="S128 b8", ratios={"eager": 2.0}) + contest(workload="S256 b8", ratios={"eager": 3.0})
    holes[3].status, holes[3].speedup = WRONG, None
    (ratio,) = plots.figures(results(holes))
    assert ">wrong<" in ratio.svg()


def test_colours_can_be_seen_on_white_and_on_black():
    """A colour that vanishes in the light or in the dark page."""

    def luminance(colour):
        parts = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (drawing.BLUE, drawing.ORANGE, drawing.GREY, *drawing.PALETTE):
        for back in ("#ffffff", "#14171a"):
            light, dark = sorted((luminance(colour), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, back)


def test_markdown_has_its_figures_beside_it(tmp_path):
    """Links to figures that are not there, figures of a former report left, or other people's files removed."""
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
    """A report that needs matplotlib, or is silent about what it lacks."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("r.html", "r.md"):
        write_report(by_length(), tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert NO_FIGURES in text and "eager" in text and "2.00×" in text and "<svg" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.md"]


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_unknown_kind_of_report(name, tmp_path):
    """A report of another kind written under a name that promises something else."""
    with pytest.raises(ValueError, match=rf"path: got '.*{name}', expected a name that ends in \.md or \.html"):
        write_report(results(contest()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["r.html", "r.md"])
def test_interrupted_report_leaves_the_old_one(name, tmp_path, monkeypatch):
    """Half a page under the final name, or an old page that has lost its figures."""
    one = drawing.Plot("model", "one", "one", "one", lambda: None)
    monkeypatch.setattr(plots, "figures", lambda found: [one])
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
    """Rows of one file only, notes that overwrite each other, or a second commit that is hidden."""
    one, two = results(contest("model")), results(contest("text"), date="2026-02-02 01:00 UTC", commit="abcdef")
    one.notes, two.notes = {"seconds": 1}, {"seconds": 2}
    two.environment["packages"] |= {"torch": "2.12.0"}
    one.save(tmp_path / "model.json")
    two.save(tmp_path / "text.json")
    found = page.load(tmp_path)
    assert [row.suite for row in found.rows] == ["model", "model", "text", "text"]
    assert found.notes == {"model: seconds": 1, "text: seconds": 2}
    assert found.environment["commit"] == "0123456789 / abcdef" and found.environment["date"].startswith("2026-02-02")
    assert found.environment["packages"]["torch"] == "2.11.0 / 2.12.0"


def test_truncated_file_is_refused_by_name(tmp_path, capsys):
    """A page of half a folder: the file that is cut short passed over in silence."""
    results(contest()).save(tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "text.json").write_text(text[: len(text) // 2])
    assert page.main([str(tmp_path)]) == 1
    assert "text.json: not a readable result file" in capsys.readouterr().err
    assert not (tmp_path / "index.md").exists()
    assert compare.main([str(tmp_path), str(tmp_path / "model.json")]) == 2
    assert "text.json: not a readable result file" in capsys.readouterr().err


def test_folder_of_two_devices_is_refused(tmp_path):
    """Two machines in one table."""
    results(contest()).save(tmp_path / "a.json")
    results(contest(), device="Another").save(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"different devices: Planted H100 in a.json, Another in b.json"):
        page.load(tmp_path)


def test_page_of_a_folder(tmp_path, monkeypatch, capsys):
    """No page beside the results, or one without the environment, the ceilings or the method."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "empty").mkdir()
    assert page.main([str(tmp_path / "empty")]) == 1 and "no result files" in capsys.readouterr().err
    results(contest()).save(tmp_path / "r" / "model.json")
    assert page.main([str(tmp_path / "r")]) == 0
    for name in ("index.md", "index.html"):
        text = (tmp_path / "r" / name).read_text(encoding="utf-8")
        for part in ("Planted H100", "torch 2.11.0", "copy GB/s", "bootstrap", "openvino", "eager"):
            assert part in text


def verdicts(before, after, **options):
    found = compare.compare(results(*before), results(*after), **options)
    return {f"{change.key[2]} {change.competitor}": change.verdict for change in found}


def test_slower_ratio_is_a_regression():
    """A fall beyond the threshold and the intervals that goes unnoticed, or the machine's speed taken for ours."""
    before = [contest(workload="a", ratios={"eager": 2.0, "flash": 1.0})]
    after = [contest(workload="a", ratios={"eager": 1.7, "flash": 1.3}, ours=0.5)]
    assert verdicts(before, after) == {"a fastbert": "same", "a eager": "slower", "a flash": "faster"}


@pytest.mark.parametrize(("ratio", "threshold"), [(1.85, 0.05), (1.7, 0.2), (2.0, 0.1)])
def test_within_interval_or_threshold_is_none(ratio, threshold):
    """Noise reported as a regression: intervals of 5 % either way that overlap, or a fall below the threshold."""
    found = verdicts([contest()], [contest(ratios={"eager": ratio})], threshold=threshold)
    assert found["S128 b8 eager"] == "same"


@pytest.mark.parametrize(
    ("competitor", "status", "verdict"),
    [
        ("eager", FAILED, "broken"),
        ("eager", WRONG, "broken"),
        ("eager", MISSING, "not compared"),
        ("fastbert", WRONG, "broken"),
        ("fastbert", MISSING, "broken"),
    ],
)
def test_what_no_longer_runs(competitor, status, verdict):
    """A competitor that broke passing for one that is as fast as before; a package not installed blamed on us."""
    after = contest()
    for row in after:
        if row.competitor == competitor or competitor == "fastbert":
            row.speedup = None
        if row.competitor == competitor:
            row.status, row.detail = status, "planted"
    found = verdicts([contest()], [after])
    assert found[f"S128 b8 {competitor}"] == verdict
    assert competitor == "eager" or found["S128 b8 eager"] == "no ratio"


def test_dtypes_models_and_settings_are_compared_each_with_itself():
    """The ratio in bf16 compared with that in fp32, or of another model."""
    one, two = contest(ratios={"eager": 4.0}), contest(ratios={"eager": 2.0}, dtype="float32")
    three = contest(ratios={"eager": 1.0}, model="MiniLM", setting="latency")
    assert set(verdicts([one, two, three], [three, two, one]).values()) == {"same"}
    assert set(verdicts([one], [two]).values()) == {"not compared"}


def test_exit_codes(tmp_path, capsys):
    """A regression that lets a build pass, or a comparison across device types that says nothing."""
    paths = {name: tmp_path / f"{name}.json" for name in ("base", "slow", "cpu", "other")}
    results(contest()).save(paths["base"])
    results(contest(ratios={"eager": 1.0})).save(paths["slow"])
    results(contest(), kind="cpu", device="Xeon").save(paths["cpu"])
    results(contest(suite="text")).save(paths["other"])

    def run(name, *options):
        code = compare.main([str(paths["base"]), str(paths[name]), *options])
        return code, capsys.readouterr()

    code, said = run("base")
    assert code == 0 and "0 regressions" in said.out
    code, said = run("slow")
    assert code == 1 and "1 regression\n" in said.out and "-50.0 %" in said.out
    assert "2.00× [1.90 to 2.10]" in line_of(said.out, "slower")
    assert run("slow", "--threshold", "0.6")[0] == 0
    code, said = run("cpu")
    assert code == 2 and "device type cuda and the new results of cpu" in said.err
    code, said = run("cpu", "--force")
    assert code == 0 and "device: Planted H100, now Xeon" in said.out
    code, said = run("other")
    assert code == 2 and "no contest in common" in said.err


def test_baseline_is_the_newest_committed_one_of_the_device(tmp_path, monkeypatch, capsys):
    """New results compared with themselves, with another machine's, with older ones than need be, or not at all."""
    folder = tmp_path / "results"
    slow, fast = contest(ratios={"eager": 1.0}), contest(ratios={"eager": 3.0})
    results(slow, date="2026-01-01 00:00 UTC").save(folder / "old" / "model.json")
    results(contest(), date="2026-01-02 00:00 UTC").save(folder / "day" / "model.json")
    results(fast, date="2026-01-03 00:00 UTC", device="Another").save(folder / "another" / "model.json")
    monkeypatch.setattr(compare, "committed", functools.partial(baseline.committed, results=folder))

    def run():
        return compare.main([str(folder / "day")]), capsys.readouterr()

    code, said = run()
    assert code == 2 and "could not be read from git" in said.err
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "results"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    code, said = run()  # unchanged since it was committed, so that the one before counts
    assert code == 0 and "old as committed" in said.out and "+100.0 %" in said.out
    results(slow, date="2026-01-02 09:00 UTC").save(folder / "day" / "model.json")
    code, said = run()  # written anew on the same day
    assert code == 1 and "day as committed" in said.out and "1 regression" in said.out
    results(slow, date="2026-01-04 00:00 UTC", device="A third").save(folder / "day" / "model.json")
    code, said = run()
    assert code == 2 and "no committed results of 'A third'" in said.err


def test_readme_is_what_the_committed_results_give():
    """Figures in the README that were edited by hand, or that are older than the results."""
    found = {folder: page.load(folder) for folder in readme_figures.committed(page.RESULTS)}
    assert readme_figures.written(ROOT / "README.md") == readme_figures.section(found), (
        "run `python benchmarks/report.py --readme`"
    )


def test_readme_section():
    """A device that was not measured left out, older results shown, or the strongest peer left unnamed."""
    assert readme_figures.section({}) == "**GPU**: not measured yet.\n\n**CPU**: not measured yet."
    old = results(contest(ratios={"eager": 9.0}), date="2025-01-01 00:00 UTC")
    kernels = contest("kernels", ratios={"eager": 7.0})
    new = results(contest(ratios={"eager": 2.0, "flash": 1.5}, broken=BROKEN), kernels)
    text = readme_figures.section({Path("x/b-old"): old, Path("x/a-new"): new})
    assert "**GPU: Planted H100, 2026-02-01, commit 0123456789**" in text and "**CPU**: not measured yet." in text
    assert "| model · bf16 | 1.02 M | 1.50×: flash | 1.75× |" in text
    assert "compiled (1 failed of 1), cuDNN (1 wrong of 1), OpenVINO (1 missing of 1)" in text
    assert "9.00" not in text and "7.00" not in text and "(benchmarks/results/a-new/)" in text


def test_readme_does_not_compare_fastbert_with_itself():
    """fastbert in 8 bits as the fastest peer of fastbert in 16."""
    alone = readme_figures.section({Path("x"): results(contest(ratios={"eager": 2.0}))})
    ratios = {"eager": 2.0, "fastbert int8": 0.6, "fastbert fp8": 0.5}
    assert readme_figures.section({Path("x"): results(contest(ratios=ratios))}) == alone


def test_readme_section_with_fastbert_failing():
    """A workload that fastbert failed dropped from the count."""
    failed = [Row("model", "S512 b8", "fastbert", "bfloat16", FAILED, "planted")]
    text = readme_figures.section({Path("x"): results(contest(), failed)})
    assert "| model · bf16 | 1.02 M; 1 failed | 2.00×: eager (1 of 2 workloads) | 2.00× |" in text
    text = readme_figures.section({Path("x"): results(failed)})
    assert "| model · bf16 | 1 failed | no ratio | no ratio |" in text


def test_readme_is_rewritten_between_the_markers(tmp_path):
    """Text around the figures lost, or a README without markers silently left as it is."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_figures.START}{readme_figures.END}\nafter\n")
    for text in ("one", "two"):
        readme_figures.rewrite(readme, text)
        assert readme_figures.written(readme) == text
    assert readme.read_text() == f"before\n{readme_figures.START}\ntwo\n{readme_figures.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README.md: expected <!-- benchmarks:start -->"):
        readme_figures.rewrite(readme, "three")
    assert readme.read_text() == "no markers"
