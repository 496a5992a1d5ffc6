"""The report: it shows what it was given, escapes it, needs nothing else, and reads on any screen of a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import EXECUTABLE, Browser, Page
from toy import Toy, toy_inputs
from typer.testing import CliRunner

import hvcompile
from hvcompile import backend
from hvcompile.app import cli, generate, pipelines, records, reference, tiny
from hvcompile.app import explain as app_explain
from hvcompile.errors import InputError, UntraceableModelError
from hvcompile.explanation import listing, pictures, report
from hvcompile.explanation.explain import Explanation, Stretch, explain
from hvcompile.explanation.listing import Line
from hvcompile.explanation.pictures import Generation
from hvcompile.journal import JournalRow, PassReport
from hvcompile.runtime.state import Stats, Step

pytestmark = pytest.mark.xdist_group("report")  # one browser, and one run of the model, for all of them

NASTY = "<script>alert('a')</script> \"><img src=x onerror=alert(1)> & {{ 7 * 7 }}"
BLOCKS, STEPS = 6, 12


def toy_explanation(blocks: int = BLOCKS, **kwargs: Any) -> Explanation:
    return explain(Toy(blocks), **dict[str, Any](toy_inputs()), **kwargs)


def guided_run() -> Stats:
    """A run of two guidance halves in turn, the second twice as restless as the first."""
    model = Toy(BLOCKS, scale=0.05)
    compiled = torch.compile(model, backend="hvfast", fullgraph=True, options={"lower": "eager"})
    noise = torch.Generator().manual_seed(0)
    halves = [toy_inputs(seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for step in range(STEPS):
            drawn = torch.randn(halves[0]["sample"].shape, generator=noise)
            for number, half in enumerate(halves, 1):
                half["timestep"].fill_(900.0 - 50 * step)
                compiled(half["sample"] + 0.1 * number * drawn, half["timestep"], half["text"])
    return hvcompile.stats(model)


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return toy_explanation()


@pytest.fixture(scope="module")
def stats() -> Stats:
    return guided_run()


@pytest.fixture(scope="module")
def full(explanation: Explanation, stats: Stats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    facts = {"prompt": NASTY, "word": "w" * 300}
    report.write(path, explanation=explanation, stats=stats, title=f"Toy {NASTY}", facts=facts)
    return path


class Document(HTMLParser):
    """The tags of a page in order, each with its attributes, and its text without that of the style sheet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def having(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        """Attributes of the tags of a name and, if one is given, of a class."""
        return [
            held for name, held in self.tags if name == tag and style in [*(held.get("class") or "").split(" "), ""]
        ]


def written(tmp_path: Path, **kwargs: Any) -> Document:
    path = tmp_path / "written.html"
    report.write(path, **kwargs)
    return Document(path)


def test_what_comes_from_outside_is_text(full: Path) -> None:
    document = Document(full)
    assert document.text.count(NASTY) == 3  # the page's title, its heading, and the prompt
    assert not document.having("script")
    assert not document.having("img")
    assert not any(name.startswith("on") for _, held in document.tags for name in held)


def test_all_of_it_is_in_the_file(full: Path) -> None:
    document = Document(full)
    assert document.open == []
    links = [held[name] for _, held in document.tags for name in ("href", "src", "action") if name in held]
    assert {link for link in links if not str(link).startswith("#")} == {"data:,"}
    assert not re.search(r"url\(|@import|@font-face", document.source)
    ids = [held["id"] for _, held in document.tags if "id" in held]
    assert len(ids) == len(set(ids))
    named = [str(held["aria-labelledby"]) for _, held in document.tags if "aria-labelledby" in held]
    assert {str(link)[1:] for link in links if str(link).startswith("#")} | set(named) <= set(ids)


def test_headings_are_in_order(full: Path) -> None:
    levels = [int(tag[1]) for tag, _ in Document(full).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_every_step_is_drawn_with_its_decision(full: Path, stats: Stats) -> None:
    document = Document(full)
    sizes = len(pictures.CHART_WIDTHS)
    assert len(document.having("rect", "hit")) == sizes * len(stats.steps) == sizes * 2 * STEPS
    cells = [str(held["class"]) for held in document.having("rect", "cell")]
    assert cells.count("cell reused") == sizes * stats.hits + 1  # the legend has one of each
    assert cells.count("cell computed") == sizes * stats.misses + 1
    assert 0 < stats.hits < 2 * STEPS
    first = pictures.generations(stats.steps)[0]
    assert f"Slot 0: {first.num_reused} of {STEPS} steps reused" in document.text
    assert f"step 2: {'reused' if first.steps[1].reused else 'computed'}; difference: " in document.text
    assert "step 1: computed; difference: nothing to compare with" in document.text
    assert f"{first.steps[1].difference:.4g}" in document.text


def test_changes_are_counted_and_marked(full: Path, explanation: Explanation) -> None:
    document = Document(full)
    captured, _, attended, cached = explanation.stages
    (row,) = [row for row in explanation.journal if row.name == "FirstBlockCache"]
    counts = cached.op_counts()
    counts.subtract(attended.op_counts())
    assert {op: count for op, count in counts.items() if count} == row.op_changes
    for op, count in row.op_changes.items():
        assert f"+{count} {op}" in document.text
    assert "\N{MINUS SIGN}15 linear" in document.text  # three a block, and five blocks whose body is that of the first
    assert row.report.matched[0] in document.text
    assert [listing.name for listing in cached.listings] == ["root", "block_0", "cache_hit", "cache_miss"]
    assert len(captured.listings) == 1
    assert document.text.count("linear(hidden, attend_weight, attend_bias)") == 1  # a body stands there once
    removed = f"{13 * BLOCKS} lines removed"
    assert removed in re.sub(r"\s+", " ", document.text)
    assert "lines of blocks.1 .. blocks.5, which repeat blocks.0" in document.text
    marked = sum("state_counters: i64[2]" in line for line in re.findall(r"<ins[^>]*>(.*?)</ins>", document.source))
    assert marked == 1


def test_comparison_says_both_versions() -> None:
    draw = random.Random(0)
    for _ in range(200):
        before = [Line(name=str(n), text=f"{n} = f({draw.randrange(3)})") for n in draw.sample(range(30), 12)]
        after = [dataclasses.replace(line, text=f"{line.text}'") if draw.random() < 0.2 else line for line in before]
        after = [line for line in after if draw.random() < 0.7]
        after[3:3] = [Line(name=f"new{n}", text=f"new{n}") for n in range(draw.randrange(4))]
        parts = listing.compare(before, after)
        assert [line for part in parts for line in part.before] == before
        assert [line for part in parts for line in part.after] == after
        for part in parts:
            assert part.kind in {"same", "changed", "replaced"}
            assert (part.kind == "same") == ([x.text for x in part.before] == [x.text for x in part.after])
            assert part.kind != "changed" or part.before[0].name == part.after[0].name


def test_nodes_read_as_python_would_say_them() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            rows, _ = torch.split(x.to(torch.float64), [1, 2])
            return rows[..., :-1, None], {"all": x.sum(dim=(0, 1))}

    (captured,) = explain(Model(), torch.ones(3, 4)).stages
    texts = [line.text for line in captured.listings[0].lines]
    assert texts[0] == "args_0: f32[3, 4]"
    assert "to: f64[3, 4] = args_0.to(float64)" in texts
    assert "split = split(to, [1, 2])" in texts
    assert "rows: f64[1, 4] = split[0]" in texts
    assert any(text.endswith("= rows[..., :-1, None]") for text in texts)
    assert any(text.endswith("= args_0.sum(dim=(0, 1))") for text in texts)


def test_where_blocks_are_skipped_is_told(explanation: Explanation) -> None:
    names = ["blocks.0", "blocks.1", f"blocks.{BLOCKS - 1}"]
    assert explanation.stretches == (
        Stretch(kind=0, count=1, first=names[0], last=names[0], is_skipped=False),
        Stretch(kind=0, count=BLOCKS - 1, first=names[1], last=names[2], is_skipped=True),
    )
    picture = pictures.trunk(explanation)
    assert picture.fork is not None
    assert picture.branch is not None
    top, height = picture.branch
    inside = [box for box in picture.boxes if top < box.y and box.y + box.height < top + height]
    assert [box.lines[0] for box in inside] == ["blocks.1 .. 5"]
    boxes = picture.boxes
    assert all(above.y + above.height < below.y for above, below in itertools.pairwise(boxes))
    assert boxes[-1].y + boxes[-1].height <= picture.height


def test_trunk_without_a_branch_and_with_kinds_in_turn(explanation: Explanation, tmp_path: Path) -> None:
    exact = toy_explanation(mode="exact")
    assert pictures.trunk(exact).branch is None
    document = written(tmp_path, explanation=exact)
    assert "keeps only passes that do not change numerics" in document.text
    assert "only in steps that are computed" not in document.text
    kind = explanation.kinds[0]
    turns = tuple(
        Stretch(kind=place % 2, count=1, first=f"b.{place}", last=f"b.{place}", is_skipped=place > 0)
        for place in range(40)
    )
    picture = pictures.trunk(dataclasses.replace(explanation, kinds=(kind, kind), stretches=turns))
    assert "34 more blocks, kinds in turn" in [box.lines[0] for box in picture.boxes]
    assert picture.height < 1000


def test_a_model_without_trunk_says_why(tmp_path: Path) -> None:
    document = written(tmp_path, explanation=explain(torch.nn.Linear(8, 4), torch.ones(3, 8)))
    assert "No trunk was found" in document.text
    assert "no module list" in document.text
    assert "What a step costs" in document.text


def a_run(*differences: float, slot: int = 0, threshold: float = 0.06) -> list[Step]:
    return [Step(slot, difference <= threshold, difference) for difference in differences]


def test_generations_are_told_apart() -> None:
    steps = [
        *(step for pair in zip(a_run(math.inf, 0.1), a_run(math.inf, 0.2, slot=4), strict=True) for step in pair),
        *a_run(math.inf, 0.05, 0.01),
    ]
    found = pictures.generations(steps)
    assert [(run.slot, run.number, len(run.steps), run.num_reused) for run in found] == [
        (0, 1, 2, 0),
        (4, 1, 2, 0),
        (0, 2, 3, 2),
    ]
    assert [run.largest_reused for run in found] == [None, None, 0.05]
    assert pictures.generations([]) == []


def test_chart_keeps_within_its_frame() -> None:
    for differences in ((math.inf,), (0.0, 0.0), (math.inf, 0.01, math.nan, 0.02, 0.03, 50.0), (0.3,) * 700):
        for threshold in (None, 0.0, 0.06, 1e9):
            run = Generation(slot=0, number=1, steps=tuple(a_run(*differences)))
            drawn = pictures.chart(run, threshold, 358)
            heights = [mark.y for mark in drawn.marks if mark.y is not None] + [y for y, _ in drawn.y_ticks]
            heights += [drawn.threshold[0]] if drawn.threshold else []
            assert all(drawn.top - 1e-6 <= y <= drawn.bottom + 1e-6 for y in heights), (differences, threshold)
            assert 1 <= len(drawn.y_ticks) <= 12
            assert len(drawn.x_ticks) <= 358 / 20
            assert drawn.marks[-1].x + drawn.marks[-1].width == pytest.approx(drawn.right)
    run = Generation(slot=0, number=1, steps=tuple(a_run(math.inf, 0.01, math.nan, 0.02, 0.03, 50.0)))
    drawn = pictures.chart(run, 0.06, 358)
    assert len(drawn.curves) == 1  # broken where there is no number
    assert [mark.is_above for mark in drawn.marks] == [False] * 5 + [True]
    assert "not a number" in drawn.marks[2].title


def test_many_generations_are_counted_and_the_latest_drawn(stats: Stats, tmp_path: Path) -> None:
    steps = [step for slot in range(100) for step in a_run(math.inf, 0.05, slot=slot)]
    document = written(tmp_path, stats=dataclasses.replace(stats, steps=steps, hits=100, misses=100))
    assert f"The latest {report.MOST_ROWS} of 100" in document.text
    charts = len(document.having("svg", "wide"))
    assert charts == report.MOST_CHARTS
    assert "Slot 99:" in document.text
    assert "Slot 80:" not in document.text
    long = a_run(math.inf, *[0.05] * 999)
    document = written(tmp_path, stats=dataclasses.replace(stats, steps=long))
    assert "Slot 0: 999 of 1000 steps reused" in document.text
    assert f"the latest {report.MOST_STEPS} are shown" in document.text
    assert "step 1000: reused" in document.text
    assert len(document.having("rect", "hit")) == report.MOST_STEPS * len(pictures.CHART_WIDTHS)
    document = written(tmp_path, stats=dataclasses.replace(stats, steps=a_run(math.inf, 0.05) * 2))
    assert "Slot 0, generation 2: 1 of 2 steps reused" in document.text


def test_a_run_alone_shows_its_journal(stats: Stats, tmp_path: Path) -> None:
    document = written(tmp_path, stats=stats)
    assert "blocks.1 .. blocks.5 run on a miss" in document.text
    assert "threshold 0.06" in document.text
    assert "The trunk" not in document.text
    assert "+5 sub" in document.text
    declined = JournalRow(name="Other", report=PassReport(declined=(("all <of> it", "why & how"),)), op_changes={})
    several = dataclasses.replace(stats, journal=[*stats.journal, *stats.journal, [declined]], steps=[], hits=0)
    document = written(tmp_path, stats=several)
    assert "Graphs 1, 2" in document.text
    assert "Graph 3" in document.text
    assert "all <of> it: why & how" in document.text
    assert "No step was decided by the cache" in document.text


def test_a_large_program_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "KEPT_LINES", 20)
    path = tmp_path / "large.html"
    report.write(path, explanation=toy_explanation(20))
    document = Document(path)
    assert path.stat().st_size < 150_000
    assert re.search(r"\d+ more (added )?lines, not in this file", document.text)
    assert f"{13 * 19} lines of blocks.1 .. blocks.19" in document.text.replace(",", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.txt", "is no HTML file: give a name that ends in .html, .htm"),
        ("folder.html", "is a directory: give a file name"),
        ("nowhere/report.html", "make it first"),
    ],
)
def test_a_bad_path_is_one_line_before_any_work(
    name: str, message: str, explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.html").mkdir()
    path = tmp_path / name
    with pytest.raises(InputError, match=message):
        report.write(path, explanation=explanation)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(app_explain, "first_call", never)
    monkeypatch.setattr(pipelines, "load", never)
    for command in (["explain"], ["generate", "a cat", "--output", str(tmp_path / "a.mp4")]):
        done = CliRunner().invoke(cli.app, [*command, "--html", str(path)])
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give explanation, stats or media"):
        report.write(tmp_path / "report.html")


def test_explain_writes_a_report(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    shape = tmp_path / "transformer" / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"num_layers": 2, "num_single_layers": 3}))
    path, figures = tmp_path / "report.html", tmp_path / "figures.json"
    size = ["--frames", "5", "--height", "32", "--width", "48"]
    done = CliRunner().invoke(cli.app, ["explain", str(tmp_path), *size, "--html", str(path), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    document = Document(path)
    assert str(tmp_path) in document.text
    assert "HunyuanVideoTransformer3DModel" in document.text
    assert "NVIDIA H100 SXM" in document.text
    # the last block ends early: nothing reads the text that it would return
    assert "lines of single_transformer_blocks.1 .. single_transformer_blocks.2, which repeat" in document.text
    assert "stages" not in json.loads(figures.read_text())
    assert path.stat().st_size < 400_000


def test_generate_writes_a_report_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second time on one pipeline, with the steps of that run alone, and where no trace is to be had."""

    def rewritten(graph_module: torch.fx.GraphModule, inputs: Any, *, options: Any = None) -> Any:
        return backend.hvfast(graph_module, inputs, options={**(options or {}), "lower": "eager"})

    def untraceable(*_: Any, **__: Any) -> Any:
        raise UntraceableModelError("the model does not trace as one graph: a length depends on data")

    monkeypatch.setattr(generate, "BACKEND", rewritten)
    monkeypatch.setattr(reference, "PLAIN", "eager")
    loaded, path = pipelines.load(), tmp_path / "report.html"
    transformer = loaded.pipe.transformer
    shape = {**transformer.config, "num_layers": 1, "num_single_layers": 2}
    loaded.pipe.transformer = type(transformer).from_config(shape).eval()
    small: dict[str, Any] = {"prompt": NASTY, "steps": 3, "frames": 5, "height": 32, "width": 48, "threshold": 0.5}
    for can_trace in (True, False):
        if not can_trace:
            monkeypatch.setattr(records, "explain", untraceable)
        request = generate.Request(**small, output=tmp_path / "a.mp4", html_file=path, compare=not can_trace)
        events: list[Any] = []
        result = generate.generate(request, events.append, loaded)
        assert result.report == path
        assert events[-1] == "reporting"
        document = Document(path)
        text = re.sub(r"\s+", " ", document.text)
        assert f"{result.run.num_reused} of 3 steps reused" in text
        assert len(document.having("rect", "hit")) == 3 * len(pictures.CHART_WIDTHS)
        assert "threshold 0.5" in text
        assert "num_inference_steps 3" in text
        assert NASTY in document.text
        assert ("What a step costs" in text) == can_trace
        assert ("a length depends on data" in text) != can_trace
        assert ("times as fast a step" in text) != can_trace


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if EXECUTABLE is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with Browser() as running:
        yield running


OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(item => {
  const box = item.getBoundingClientRect();
  const held = item.closest('.scroll, .vh, .skip, thead');
  return box.width > 0 && !held && (box.right > innerWidth + 1 || box.left < -1);
}).map(item => item.outerHTML.slice(0, 80))
"""
CONTRASTS = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
      .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = item => {
    for (let at = item; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('h1, h2, p, dt, dd, a:not(.skip), td, th, summary, .l, mark, .key, li, small')]
    .filter(item => item.getBoundingClientRect().width > 0)
    .map(item => {
      const [a, b] = [light(getComputedStyle(item).color), light(ground(item))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), item.outerHTML.slice(0, 80)];
    })
    .filter(([ratio]) => ratio < 4.5);
})()
"""


def check_page(page: Page, path: Path) -> None:
    """Nothing logged, nothing fetched, nothing wider than the screen, all text strong enough to read."""
    assert page.console == []
    assert page.requests == [path.resolve().as_uri()]
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_in_a_browser(browser: Browser, full: Path, width: int, dark: bool, tmp_path: Path) -> None:
    page = browser.open(full, width=width, dark=dark)
    check_page(page, full)
    page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
    check_page(page, full)
    seen = page.evaluate(
        "[...document.querySelectorAll('svg.wide, svg.narrow')].filter(i => i.getBoundingClientRect().width).length"
    )
    assert seen == 2  # one chart a slot, in the size that fits
    letters = page.evaluate(
        "Math.min(...[...document.querySelectorAll('main svg text')].map(i => i.getBoundingClientRect())"
        ".filter(box => box.width).map(box => Math.min(box.width, box.height)))"
    )
    assert letters > 6
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 60)")
    assert ground == dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_pictures_keep_their_text_inside(browser: Browser, full: Path) -> None:
    page = browser.open(full, width=390)
    outside = page.evaluate("""
        [...document.querySelectorAll('main svg text')].filter(item => {
          const [text, frame] = [item, item.ownerSVGElement].map(i => i.getBoundingClientRect());
          return text.width && (text.right > frame.right + 1 || text.left < frame.left - 1
                                || text.bottom > frame.bottom + 1 || text.top < frame.top - 1);
        }).map(item => item.textContent)
    """)
    assert outside == []


def test_by_keyboard(browser: Browser, full: Path) -> None:
    page = browser.open(full, width=1280)
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.evaluate("document.querySelector('summary').focus()")
    page.press("Enter", 13, "\r")
    assert page.evaluate("document.querySelector('details').open")
    unreachable = "[...document.querySelectorAll('.scroll')].filter(item => item.tabIndex < 0).length"
    assert page.evaluate(unreachable) == 0


def test_on_paper(browser: Browser, full: Path) -> None:
    page = browser.open(full, width=800, dark=True, media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#1c2127"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate(OVERFLOWING) == []
    printed = browser.send("Page.printToPDF", printBackground=True)
    assert len(printed["data"]) > 20_000


@pytest.mark.parametrize("kind", ["explanation", "stats", "neither slot nor trunk"])
def test_parts_of_it_in_a_browser(
    browser: Browser, kind: str, explanation: Explanation, stats: Stats, tmp_path: Path
) -> None:
    content: dict[str, Any] = {"explanation": explanation} if kind == "explanation" else {"stats": stats}
    if kind.startswith("neither"):
        content = {"stats": dataclasses.replace(stats, steps=[], hits=0, journal=[[]])}
        content["explanation"] = explain(torch.nn.Linear(8, 4), torch.ones(3, 8))
    path = tmp_path / "part.html"
    report.write(path, **content)
    check_page(browser.open(path, width=390), path)
