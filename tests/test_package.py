"""What is built for others holds all that losa needs, and runs without the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel made from it, as an installer would."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def tracked(folder: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_wheel_holds_every_file(wheel: Path) -> None:
    ours = {name.removeprefix("src/") for name in tracked("src/losa")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "losa/py.typed" in ours
    assert ours <= names, ours - names


def test_sdist_holds_what_its_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked(".") if not name.startswith((".ci/", ".gitignore"))} <= names


def test_wheel_runs_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "losa", "inspect", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert '"sparsity": 0.0' in done.stdout
    where = "import losa; print(losa.__file__)"
    done = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
