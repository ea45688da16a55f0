"""README and docs say what is so: what they show runs, what they name is there, what they quote is said."""

import argparse
import ast
import importlib.util
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, Reader, blocks, fill

from losa import cli
from losa.experiments.tables import TABLES

INLINE = [(page, found) for page, text in PAGES.items() for found in re.findall(r"`(losa \w+ [^`]+)`", text)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill(folder, text)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_what_a_page_shows_runs(
    page: str, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "page"
    shutil.copytree(filled, folder, symlinks=True)
    Reader(page, folder, monkeypatch, capsys).read()


@pytest.mark.parametrize(("page", "command"), [(p, c) for p, c in INLINE if "..." not in c])
def test_commands_in_the_text_are_understood(page: str, command: str) -> None:
    """Every flag is one; values are not tried here."""
    cli.build_parser().parse_args(shlex.split(command)[1:])


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """A parser's own and those of the commands below it."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action.choices, dict):
            found = found.union(*map(flags_of, action.choices.values()))
    return found


def test_flags_are_there() -> None:
    known = flags_of(cli.build_parser()) | {"--nproc-per-node"}
    for page, text in PAGES.items():
        if page != "docs/log.md":  # tells of benchmarks, which have flags of their own
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", re.sub(r"<!--.*?-->", "", text)):
                assert flag in known, f"{page}: {flag}"


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for place in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if not place.startswith("https://"):
                path, _, anchor = place.partition("#")
                file = (ROOT / page).parent / path if path else ROOT / page
                assert file.exists(), f"{page}: {place}"
                heads = {slug(head) for head in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}
                assert not anchor or anchor in heads, f"{page}: {place}"


def slug(head: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")


def said_in_source() -> list[re.Pattern[str]]:
    """Every text of some length in losa's source, with room for what is put into it."""
    found = []
    for path in (ROOT / "src" / "losa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(v.value) if isinstance(v, ast.Constant) else ".*" for v in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [re.escape(node.value).replace("%s", ".*")]
            else:
                continue
            if len("".join(parts).replace(".*", "")) > 12:
                found.append(re.compile("".join(parts), re.DOTALL))
    return found


def loaded(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_are_those_there_are() -> None:
    assert loaded(ROOT / "scripts" / "write_settings.py").page() == PAGES["docs/settings.md"], (
        "scripts/write_settings.py"
    )


def test_tables_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those between markers are made from the raw results, and have not been touched since."""
    methods = loaded(ROOT / "benchmarks" / "methods.py")
    made = methods.tables(ROOT / "benchmarks" / "results.jsonl")
    marked = [page for page in PAGES if "<!-- methods -->" in PAGES[page]]
    assert "README.md" in marked and all("| --- |" in table for table in made.values())
    for page in marked:
        assert methods.with_tables(PAGES[page], made) == PAGES[page], f"{page}: benchmarks/methods.py --markdown"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    best, results = loaded(ROOT / "benchmarks" / "best.py"), ROOT / "benchmarks" / "best.jsonl"
    made = {"best": best.table(results), "parts of best": best.table_of_parts(results)}
    marked = [page for page in PAGES if "<!-- best -->" in PAGES[page]]
    assert {"README.md", "docs/log.md"} <= {*marked} and "`best-adapters` | 70%" in made["best"]
    for page in marked:
        assert methods.with_tables(PAGES[page], made) == PAGES[page], f"{page}: benchmarks/best.py --markdown"


def test_messages_are_those_of_the_code() -> None:
    """Those that a command ends with are said when it is run (above); here the others."""
    known, found = said_in_source(), blocks("docs/troubleshooting.md")
    quoted = [block.text for before, block in pairwise(found) if block.kind == "text" and before.kind != "sh"]
    assert len(quoted) > 4
    for message in quoted:
        bare = " ".join(message.removeprefix("losa: ").split())
        assert any(pattern.fullmatch(bare) for pattern in known), message


def test_every_table_of_the_paper_is_there() -> None:
    """Each experiment has its place in docs/results.md, once, and a table with figures in it."""
    text = (ROOT / "docs" / "results.md").read_text()
    for name in TABLES:
        (found,) = re.findall(rf"<!-- experiment {re.escape(name)} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
        assert re.search(r"^\| .*\d\.\d", found, flags=re.MULTILINE), name
