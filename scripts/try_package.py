"""Install packages into clean environments and run the demo there: what a stranger would do.

    python scripts/try_package.py dist/losa-0.1.0-py3-none-any.whl dist/losa-0.1.0.tar.gz

Everything else is installed as constraints.txt pins it. Nothing of the repository is on the path: the demo runs in an
empty folder. Ends with one line a package, and with status 1 if one failed.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def passes(package: Path) -> bool:
    """Whether the demo runs from `package` in an environment of its own, and LoSA helps there."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "env", with_pip=True)
        python = home / "env" / "bin" / "python"
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, "-c", CONSTRAINTS, package.resolve()], check=True)
        demo = [str(home / "env" / "bin" / "losa"), "demo", "--json"]
        done = subprocess.run(demo, cwd=home, check=True, capture_output=True, text=True)
        models = json.loads(done.stdout.splitlines()[-1])["models"]
        dense, pruned, losa = (models[name]["perplexity"] for name in ("dense", "pruned only", "LoSA"))
        print(f"{package.name}: dense {dense:.2f}, pruned only {pruned:.2f}, LoSA {losa:.2f}", flush=True)
        return bool(dense < losa < pruned)


if __name__ == "__main__":
    sys.exit(0 if all([passes(Path(name)) for name in sys.argv[1:]]) else 1)
