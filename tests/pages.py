"""What tests of README and docs share: their blocks, a folder that holds what they name, and how a command is run."""

import json
import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GATED, tokenizer

from losa import bench, cli, masks, registry
from losa.recipe import Recipe
from losa.recipe_checks import refuse_unread
from losa.sparse import kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w-]+\.(?:json|py))`[^`\n]*:\n+\Z")  # what ends so is followed by the file itself

# ------------------------------------------------- what stands for what a page says, so that it runs here and in seconds

# Flags of compress, recover and experiment that are not given, and that no recipe file gives, get these.
SMALL = {
    "--calibration": "text.jsonl",
    "--calibration-samples": "12",
    "--sequence-length": "24",
    "--allocation-samples": "8",
    "--error-tokens": "100",
}
SMALL_TRAINING = {
    "--train-data": "text.jsonl",
    "--train-samples": "24",
    "--train-length": "128",
    "--batch-size": "4",
    "--micro-batch-size": "2",
    "--mean-rank": "2",
    "--learning-rate": "1e-3",
    "--eval-tokens": "500",
    "--eval-window": "64",
    "--eval-step-tokens": "200",
    "--sample-tokens": "4",
    "--dtype": "float32",
    "--device": "cpu",
}
INSTEAD = {
    "--data wikitext2": "--data held-out.txt",  # the hub
    "--tasks paper": "--tasks piqa --task-data piqa=./piqa",  # the hub
    "--tasks demo-next-line": "--tasks demo-next-line --limit 4",  # a minute of questions
    "--shape 11008x4096": "--shape 48x200 --rounds 2",  # a minute of timing
}
PARSED_ONLY = {"losa demo"}  # a minute; tests/test_cli.py runs its recipe, and `make package` the command
# Runs that a page looks at without making them are there.
GIVEN = {"docs/judging.md": ("DIR", "A", "B")}


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is, its text, the line before it, and the name of the file that it is, if it is one."""

    kind: str
    text: str
    line: int
    file: str | None


def blocks(page: str) -> list[Block]:
    """All of a page, in order; without those that are Sphinx's."""
    found = []
    for match in FENCE.finditer(PAGES[page]):
        if not match[1].startswith("{"):
            named = FILE.search(PAGES[page], 0, match.start())
            line = PAGES[page].count("\n", 0, match.start()) + 1
            found.append(Block(match[1], match[2], line, named[1] if named else None))
    return found


def commands(text: str) -> list[str]:
    """The commands of a block, without comments."""
    lines = [shlex.join(shlex.split(line, comments=True)) for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# --------------------------------------------------------------------------------------------- the folder of a page


def small_model(folder: Path, pruned: bool = False) -> None:
    """A random Llama that reads 1024 tokens; pruned: half of its weights are zero."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED | {"max_position_embeddings": 1024}))
    if pruned:
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data.mul_(masks.choose(parameter.data.abs(), None, 0.5, "row"))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def fill(folder: Path, text: Path) -> None:
    """Put there what pages name: models, data, rows of tasks."""
    small_model(folder / "my-model")
    small_model(folder / "SPARSE", pruned=True)
    (folder / "MODEL").symlink_to(folder / "my-model")
    shutil.copy(text, folder / "text.jsonl")
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    for name in ("held-out.txt", "validation.txt"):
        (folder / name).write_text("\n".join(rows[:20]))
    turns = [{"instruction": f"Say {number}.", "output": rows[number][:60]} for number in range(100)]
    (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, turns)))
    (folder / "prompts.txt").write_text("def main():\nimport\n")
    (folder / "piqa").mkdir()
    piqa = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": 0}
    (folder / "piqa" / "validation.jsonl").write_text(json.dumps(piqa))
    boolq = {"question": "is water wet", "passage": "Water -- Water is wet.", "idx": 0, "label": 1}
    (folder / "val.jsonl").write_text(json.dumps(boolq))


# --------------------------------------------------------------------------------------------------- running a page


class Reader:
    """Does what a page says, in a folder, block after block."""

    def __init__(self, page: str, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.page, self.folder, self.patch, self.capsys = page, folder, patch, capsys
        self.names: dict[str, Any] = {"__name__": page}
        for table in (registry.PRUNERS, registry.ALLOCATORS, registry.RECOVERIES, registry.KERNELS):
            for name in [*table]:
                patch.setitem(table, name, table[name])
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(bench, "last_level_cache", lambda: 2**14)  # so that small matrices are four times the cache
        patch.setattr(kernels, "_chosen", {})
        for made in GIVEN.get(page, ()):
            self.run(f"losa compress MODEL --output {made} --steps 2 --eval-data held-out.txt", None)

    def read(self) -> None:
        """All of it."""
        found = blocks(self.page)
        for block, after in zip(found, [*found[1:], None], strict=True):
            where = f"{self.page}, line {block.line}"
            if block.kind == "sh":
                refusal = (
                    after.text.strip() if after and after.kind == "text" and after.text.startswith("losa: ") else None
                )
                lines = commands(block.text)
                for number, line in enumerate(lines, 1):
                    self.run(line, refusal if number == len(lines) else None)
            elif block.kind == "json":
                json.loads(block.text)
            else:
                assert block.kind in ("python", "text"), f"{where}: say sh, python, json, or text for what is shown"
            if block.file:
                (self.folder / block.file).write_text(block.text)
            elif block.kind == "python":  # its lines numbered as the page's are
                exec(compile("\n" * block.line + block.text, self.page, "exec"), self.names)

    def run(self, line: str, refusal: str | None) -> None:
        """One command; `refusal`: what it says when it fails, as it must."""
        words = shlex.split(line)
        while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            self.patch.setenv(*words.pop(0).split("="))
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif words[:2] == ["pip", "install"]:
            self.check_install(words[2])
        elif words[0] == "torchrun":  # as many processes are not started here; tests/test_processes.py starts some
            own = words.index("-m")
            assert words[own + 1] == "losa"
            self.losa([*words[own + 2 :], "--dry-run"], refusal)
        elif words[0] == "python":
            assert words[1].endswith(".py")
            self.script(words[1:])
        else:
            assert words[0] == "losa", f"{self.page}: no rule runs {line!r}"
            if line in PARSED_ONLY:
                cli.build_parser().parse_args(words[1:])
            else:
                self.losa(words[1:], refusal)

    def losa(self, words: list[str], refusal: str | None) -> None:
        """A command of losa, in this process."""
        line = shlex.join(words)
        for theirs, ours in INSTEAD.items():
            line = line.replace(theirs, ours)
        words = shlex.split(line)
        if words[0] in ("compress", "recover", "experiment") and "--resume" not in words:
            words = self.small(words, refusal)
        if words[0] == "experiment" and "--cached" not in words:
            words.append("--dry-run")  # hours
        code = cli.main(words)
        said = self.capsys.readouterr()
        if refusal is None:
            assert code == 0, f"{self.page}: losa {line}: {said.err}"
        else:
            parts = re.split(r"[\d.]+(?= [kMG]B\b)", refusal)  # sizes may change a little
            assert code == 2 and re.fullmatch(r"[\d.]+".join(map(re.escape, parts)), said.err.strip()), (
                f"{self.page}: losa {line}: {said.err}"
            )

    def small(self, words: list[str], refusal: str | None) -> list[str]:
        """The command with settings that make it quick; a folder that holds a run already is replaced."""
        settings = SMALL_TRAINING | (SMALL if words[0] != "recover" else {})
        given = {word.partition("=")[0] for word in words}
        if "--recipe" in words:
            files = [name for name in words[words.index("--recipe") + 1].split(",") if name.endswith(".json")]
            given |= {f"--{key.replace('_', '-')}" for file in files for key in json.loads(Path(file).read_text())}
        settings = {flag: value for flag, value in settings.items() if flag not in given}
        names = {flag.removeprefix("--").replace("-", "_") for flag in settings}

        def of_the_page(made: Recipe, asked: dict[str, Any]) -> None:  # what is added here need not be read
            refuse_unread(made, {name: value for name, value in asked.items() if name not in names})

        self.patch.setattr("losa.commands.refuse_unread", of_the_page)
        added = [part for pair in settings.items() for part in pair]
        output = words[words.index("--output") + 1] if "--output" in words else ""
        again = words[0] != "experiment" and (self.folder / output / "losa.json").exists() and refusal is None
        return [*words, *added, *(["--overwrite"] if output and again and "--overwrite" not in words else [])]

    def script(self, words: list[str]) -> None:
        """A file of the page's, as `python` would run it."""
        self.patch.setattr(sys, "argv", words)
        try:
            exec(compile(Path(words[0]).read_text(), words[0], "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            assert not end.code, f"{self.page}: {words} ended with {end.code}"

    @staticmethod
    def check_install(what: str) -> None:
        """That an extra which is installed is one."""
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        found = re.fullmatch(r"(?:\.|losa)(?:\[([\w,]+)\])?", what)
        assert found, what
        assert {extra for extra in (found[1] or "").split(",") if extra} <= known.keys(), what
