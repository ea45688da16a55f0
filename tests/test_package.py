"""What is built for others holds all that losa needs, and runs without the repository."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def needed(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Add a distribution, and what it cannot be installed without, to `found`."""
    if canonicalize_name(name) in found:
        return
    found[canonicalize_name(name)] = of = importlib.metadata.distribution(name)
    for line in of.requires or ():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            needed(wanted.name, found)


def test_works_with_what_it_depends_on_alone(llama: Path, text: Path, tmp_path: Path) -> None:
    """The development tools bring packages along that nothing else does."""
    found: dict[str, importlib.metadata.Distribution] = {}
    needed("losa", found)
    del found["losa"]  # from the source, below
    assert "accelerate" in found and not {"pytest", "peft", "plotly"} & found.keys()
    alone = tmp_path / "alone"
    alone.mkdir()
    for of in found.values():
        for top in {path.parts[0] for path in of.files or () if path.parts[0] != ".."}:
            if not (alone / top).exists():
                (alone / top).symlink_to(Path(str(of.locate_file(top))).resolve())
    short = ["--steps", "1", "--calibration-samples", "2", "--sequence-length", "16", "--sample-tokens", "0"]
    commands = [
        ["compress", llama, "--output", "one", "--calibration", text, "--recovery", "none", "--memory", "2GB", *short],
        ["export", "one", "--output", "packed", "--format", "packed"],
        ["export", "packed", "--output", "dense", "--format", "dense"],
        ["inspect", "packed"],
        ["generate", "packed", "--prompt", "import", "--max-new-tokens", "2"],
        ["evaluate", "dense", "--data", text, "--tokens", "64"],
    ]
    code = "import sys\nfrom losa.cli import main\nfor one in eval(sys.argv[1]):\n    assert main(one) == 0, one"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, repr([[str(part) for part in command] for command in commands])],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{alone}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
