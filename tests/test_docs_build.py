"""The documentation is built, mistakes in it are errors, and its example runs."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def tools() -> None:
    """Skips where what builds is not installed."""
    for name in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(name, reason="pip install '.[docs]'")


def build(source: Path, output: Path) -> "subprocess.CompletedProcess[str]":
    """As `make docs` does."""
    flags = ["--fail-on-warning", "--keep-going", "--fresh-env", "--quiet", "-b", "html", "-c", str(DOCS)]
    command = [sys.executable, "-m", "sphinx", *flags, "-d", str(output / "doctrees"), str(source), str(output)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.usefixtures("tools")
def test_the_documentation_is_built(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text()
    assert 'id="losa.compress"' in reference and "Prune <code" in reference
    assert "--sequence-length" in (tmp_path / "settings.html").read_text()
    formulas = (tmp_path / "method.html").read_text()
    assert formulas.count("<math") > 20 and "cdn" not in formulas  # no page needs the network
    for page in DOCS.glob("*.md"):
        assert f'href="{page.stem}.html"' in (tmp_path / "index.html").read_text() or page.stem == "index", page


@pytest.mark.usefixtures("tools")
def test_mistakes_are_errors(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(
        "# A page\n\n[nowhere](nowhere.md) [no heading](#none)\n\n"
        "```{eval-rst}\n.. autofunction:: losa.cli.build_parser\n```\n\n$\\nonsense{1}$\n"
    )
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    for mistake in ("nowhere.md", "'none'", "losa.cli.build_parser has no docstring", "nonsense"):
        assert mistake in done.stderr, done.stderr


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell after cell, as `python docs/example.py` does; it checks its own claims."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runpy.run_path(str(DOCS / "example.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "sparsity is 1.5: must be at least 0 and below 1" in said and "MB without" in said
