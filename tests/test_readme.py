"""What README says is so: its Python runs, its commands are understood, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from losa.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.partition("#")[0]
    for kind, text in FENCED
    if kind == ""
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("losa ")
] + re.findall(r"`(losa \w+ [^`]+)`", README)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [text for kind, text in FENCED if kind == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--help" not in command])
def test_commands_are_understood(command: str) -> None:
    """Every flag is one; values are not tried here."""
    build_parser().parse_args(shlex.split(command)[1:])


def test_files_are_there() -> None:
    named = set(re.findall(r"`((?:[\w-]+/)*[\w-]+(?:\.py|/))`", README))
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src" / "losa" / name).exists(), name


def test_every_file_is_named() -> None:
    """The table of where things are is the layout on disk."""
    table = README.partition("## How it is made")[2]
    for path in sorted((ROOT / "src" / "losa").iterdir()):
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("__") and name != "py.typed":
            assert f"`{name}`" in table, f"{name} is not in README's table"
