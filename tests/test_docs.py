"""README and docs against the code: links, options, flags and targets that they name, tables, length, sentences."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_arrows
import typer

from hvcompile import passes
from hvcompile.app.cli import app
from hvcompile.app.cli.main import COMMANDS
from hvcompile.app.cli.main import load as load_command
from hvcompile.options import GENERAL, parse
from hvcompile.passes import PASSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
CARDS = (ROOT / "hvcompile/app/tiny_hunyuan_video/README.md", ROOT / "examples/tiny_model/README.md")
OPTIONS = {f"{kind.section}.{field.name}" for kind in PASSES for field in dataclasses.fields(kind)}

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Links.


def anchors_of(page: Path) -> set[str]:
    """The anchors that a code host gives a page's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE):
        text = LINK.sub(r"\1", heading).lower()
        kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        slug = kept.strip().replace(" ", "-")
        number = 1
        while slug in anchors:
            slug, number = f"{kept.strip().replace(' ', '-')}-{number}", number + 1
        anchors.add(slug)
    return anchors


def broken_links(page: Path) -> list[str]:
    broken = []
    for _, target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [*PAGES, *CARDS, CONTRIBUTING], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_and_a_broken_anchor(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, with more\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    good = "[a](other.md#a-heading-with-more) [b](other.md#twice-1) [c](#here) [d](https://example.org/none)"
    page.write_text(f"# Here\n\n{good}\n\n[e](none.md) [f](other.md#none) ![g](none.png)\n")
    assert broken_links(page) == ["none.md", "other.md#none", "none.png"]


def test_every_page_stands_in_the_index() -> None:
    index = (DOCS / "index.md").read_text("utf-8")
    (tree,) = re.findall(r"```\{toctree\}\n:hidden:\n\n(.*?)```", index, re.DOTALL)
    for page in DOCS.glob("*.md"):
        if page.name != "index.md":
            assert page.stem in tree.split(), f"{page.name} is missing in the index's toctree"
            assert f"]({page.name})" in index, f"{page.name} is missing in the index's table"


# Options.


def test_options_that_are_named_exist() -> None:
    sections = "|".join(dict.fromkeys(kind.section for kind in PASSES))
    seen = set()
    for page in PAGES:
        for option in re.findall(rf"`((?:{sections})\.\w+)`", page.read_text("utf-8")):
            assert option in OPTIONS, f"{name_of(page)} names {option}"
            seen.add(option)
    assert seen == OPTIONS


def test_every_option_has_a_row() -> None:
    text = (DOCS / "options.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted([*OPTIONS, *GENERAL])


def test_the_tables_are_up_to_date() -> None:
    tables = load(DOCS / "tables.py")
    text = (DOCS / "options.md").read_text("utf-8")
    assert tables.updated(text) == text, "run python docs/tables.py"


def test_a_table_that_differs_is_seen() -> None:
    tables = load(DOCS / "tables.py")
    text = (DOCS / "options.md").read_text("utf-8")
    assert tables.updated(text.replace("`0.06`", "`0.07`")) == text
    with pytest.raises(ValueError, match="has no lines"):
        tables.updated("# Options\n")


def test_options_that_are_shown_are_valid() -> None:
    shown = 0
    scope: dict[str, Any] = {kind.__name__: getattr(passes, kind.__name__) for kind in PASSES}
    for page in PAGES:
        for text in re.findall(r"options=(\{[^`]*?\})[`)]", page.read_text("utf-8")):
            if "scaled_residual" in text:  # a pass of examples/debug_graph.py
                continue
            options = eval(text, {"__builtins__": {}}, scope.copy() | {"cache": passes.FirstBlockCache()})
            parse(PASSES, options, None)
            shown += 1
    assert shown >= 25


# Commands.


def shell_lines(text: str) -> Iterator[str]:
    """What a page tells to type: lines of shell blocks, and code within the text."""
    for kind, block in re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind in {"", "sh"}:
            yield from block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield " ".join(code.split())


def flags_of(command: Any) -> set[str]:
    """A command's flags. Typer may bring a click of its own, so no class of click's is asked for."""
    options = [option for option in command.params if option.param_type_name == "option"]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)} | {"--help"}


def subcommands(command: Any) -> dict[str, Any]:
    """The commands of a group by name; none of a command. Those of hvcompile are loaded when they are run."""
    return {
        name: load_command(name) if name in COMMANDS else item
        for name, item in getattr(command, "commands", {}).items()
    }


def words_after(line: str, start: str) -> list[str] | None:
    """The words of a command line that follow its first ones, as a shell splits them; None where it is another."""
    begin = re.search(rf"(?:^|[\s/]){re.escape(start)}(?=\s|$)", line)
    if begin is None:
        return None
    words = shlex.split(line[begin.end() :], comments=True)
    return words[: next((place for place, word in enumerate(words) if word in {"&&", "|", ";"}), len(words))]


def unknown_flags(text: str) -> list[str]:
    """The commands and flags of ``hvcompile ...`` that a page shows and that don't exist."""
    commands, unknown = subcommands(typer.main.get_command(app)), []
    for line in shell_lines(text):
        words = words_after(line, "hvcompile")
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            continue
        if words[0] not in commands:
            unknown.append(words[0])
            continue
        own = flags_of(commands[words[0]])
        unknown += [f"{words[0]} {word}" for word in words[1:] if word.startswith("-") and word not in own]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_flags_exist(page: Path) -> None:
    assert unknown_flags(page.read_text("utf-8")) == []


def test_an_unknown_command_and_an_unknown_flag() -> None:
    text = "`hvcompile paint` and\n\n```sh\nmake x && .venv/bin/hvcompile bench --threads 1 --thread 2   # --no\n```\n"
    assert unknown_flags(text) == ["bench --thread", "paint"]


def test_flags_that_stand_alone_exist() -> None:
    """A flag in the text (not in a command) is one of some command's."""
    commands = subcommands(typer.main.get_command(app))
    known = set().union(*map(flags_of, commands.values()))
    for page in PAGES:
        for code in re.findall(r"`(--[^`]*)`", FENCE.sub("", page.read_text("utf-8"))):
            flag = code.split()[0]
            assert flag in known | {"--first-seed", "--ring"}, f"{name_of(page)} names {flag}"


def script_flags(script: Path, name: str | None) -> set[str]:
    """The flags of a script of typer (of one of its commands), or of argparse."""
    module = load(script)
    if not hasattr(module, "typer"):
        return set(re.findall(r'add_argument\("(--[\w-]+)"', re.sub(r"\(\s+", "(", script.read_text("utf-8"))))
    own = getattr(module, "app", None)
    if own is None:
        own = typer.Typer()
        own.command()(module.main)
    command = typer.main.get_command(own)
    return flags_of(subcommands(command)[name] if name is not None and subcommands(command) else command)


def shown_scripts() -> Iterator[tuple[str, str, list[str]]]:
    """Every ``python benchmarks/x.py ...`` (examples, docs): page, script, and the words after it."""
    for page in (*PAGES, *CARDS):
        for line in shell_lines(page.read_text("utf-8")):
            for script in re.findall(r"\bpython (\S+\.py)\b", line):
                if "/" in script:
                    yield name_of(page), script, words_after(line, f"python {script}") or []


def test_scripts_and_their_flags_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # they import each other
    known: dict[tuple[str, str | None], set[str]] = {}
    checked = 0
    for page, script, words in shown_scripts():
        assert (ROOT / script).exists(), f"{page} names {script}"
        flags = [word for word in words if word.startswith("--")]
        if not flags or script == "docs/tables.py":
            continue
        name = words[0] if not words[0].startswith("-") else None
        if (script, name) not in known:
            known[script, name] = script_flags(ROOT / script, name) | {"--help"}
        assert set(flags) <= known[script, name], f"{page} shows python {script} {' '.join(words)}"
        checked += 1
    assert checked >= 6


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shown = set()
    for page in (*PAGES, CONTRIBUTING):
        for line in shell_lines(page.read_text("utf-8")):
            for target in re.findall(r"^make ([a-z]+)", line):
                assert target in targets, f"{name_of(page)} names make {target}"
                shown.add(target)
    assert {"video", "test", "check"} <= shown


def test_test_files_that_are_named_exist() -> None:
    for page in (*PAGES, CONTRIBUTING):
        for file in re.findall(r"\btests/\w+\.py", page.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{name_of(page)} names {file}"


def test_modules_that_are_named_exist() -> None:
    module = re.compile(r"`((?:hvcompile|passes|examples|benchmarks|docs)/[\w/]+(?:\.\w+)?)/?`")
    for page in (*PAGES, *CARDS, CONTRIBUTING):
        for file in module.findall(page.read_text("utf-8")):
            assert (ROOT / file).exists(), f"{name_of(page)} names {file}"


# Layout.


def test_the_floors_are_those_of_the_arrows_test() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    (block,) = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [tuple(line.split(" | ")) for line in block.splitlines()] == list(test_arrows.FLOORS)


# Length and sentences.


def test_readme_is_one_screen() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:25])
    assert "GPU" in first
    assert "![" in first


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose: no code blocks, tables, headings, pictures or comments.

    An item of a list and a paragraph end a sentence. Code within the text is one word.
    """
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", text), flags=re.DOTALL)
    text = re.sub(r"`[^`]+`", "Code", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text))
    text = LINK.sub(r"\1", text)
    lines = []
    for line in text.splitlines():
        is_prose = not line.lstrip().startswith(("|", "#")) and line.strip() != "---"
        starts = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        lines += (
            [""] * bool(starts) + [line[starts.end() :] if starts else line.strip()] * is_prose + [""] * (not is_prose)
        )
    found = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        found += re.split(r"(?<=[.!?])[*_)\"”]*\s+(?=[^a-z])", " ".join(paragraph.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def num_words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_short() -> None:
    counts = {name_of(page): [num_words(one) for one in sentences(page.read_text("utf-8"))] for page in PAGES}
    words = sum(sum(each) for each in counts.values())
    number = sum(len(each) for each in counts.values())
    report = "\n".join(f"{sum(each) / max(1, len(each)):5.1f}  {page}" for page, each in counts.items())
    assert words / number < 18, f"{words / number:.1f} words a sentence:\n{report}"


def test_what_counts_as_a_sentence() -> None:
    text = """# A heading that has many words in it

One [link](a.md) and `some code` here. Another one, of
two lines.

- an item
- two. Sentences.

| a table | of words |
|---|---|

```sh
a block
```
"""
    assert [num_words(one) for one in sentences(text)] == [5, 5, 2, 1, 1]


# The site.


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api.html").read_text("utf-8")
    for name in ("hvcompile.stats", "hvcompile.explain", "hvcompile.errors.OptionError", "threshold"):
        assert name in api
