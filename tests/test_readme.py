"""The table of files in README is the layout on disk; what README shows is run by test_docs.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
