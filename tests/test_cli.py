"""The command line as a user meets it: results, one clear line for bad input, exit codes, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LONG

from losa.cli import main
from losa.demo.run import demo
from losa.errors import LosaError
from losa.progress import Progress

Settings = dict[str, Any]


def flags(settings: Settings) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends with, at exit code 2."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("losa: ")
    return err


def process(*arguments: object, program: Sequence[str] = ("-m", "losa")) -> "subprocess.Popen[str]":
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def at_update(number: int, then: str) -> tuple[str, str]:
    """losa as a program that sends itself a signal when so many updates are done, however fast it is."""
    code = f"""
import os, signal, sys
from losa import cli, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests are a shell's background job
log, updates = run.Run.log, 0
def logging(self, event, **fields):
    global updates
    log(self, event, **fields)
    updates += event == "update"
    if event == "update" and updates == {number}:
        os.kill(os.getpid(), signal.{then})
run.Run.log = logging
sys.exit(cli.main(sys.argv[1:]))
"""
    return "-c", code


def test_compress_evaluate_inspect(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(llama), "--output", str(out), *flags(settings), "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    made = json.loads(stdout.splitlines()[-1])
    assert made["output"] == str(out) and "step" not in stderr
    arguments = ["evaluate", str(out), "--data", settings["eval_data"], "--tokens", "500", "--dtype", "float32"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["perplexity"] == pytest.approx(made["measurements"]["sparse"]["perplexity"], rel=1e-6)
    assert main(["inspect", str(out), "--json"]) == 0
    looked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert looked["sparsity"] == pytest.approx(made["measurements"]["sparse"]["sparsity"], abs=1e-3)
    assert [block["rank"] for block in looked["blocks"]] == made["history"][-1]["ranks"]
    assert looked["source"] == str(llama)
    assert main(["inspect", str(out)]) == 0
    table = capsys.readouterr().out
    assert "model.layers.2" in table and "self_attn.q_proj" in table and "sparsity 0.5" in table


def test_plain_lines_where_there_is_no_terminal(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(llama), "--output", str(tmp_path / "out"), *flags(settings)]) == 0
    out, err = capsys.readouterr()
    assert [line[:9] for line in err.splitlines()] == ["eval_data", "step 1/2:", "step 2/2:"]
    assert "perplexity" in out and "\x1b" not in out + err


def test_quiet_says_nothing_on_the_way(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(llama), "--output", str(tmp_path / "out"), *flags(settings), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_one_line(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("losa.inspection.inspect", fails)
    monkeypatch.setattr("losa.pipeline.start", fails)
    said = f"losa: out of memory ({str(error).splitlines()[0]})"
    assert refused(capsys, "inspect", "demo") == f"{said}\n"  # none of a run's settings, and nothing to resume
    line = refused(capsys, "compress", "demo", "--output", "x", "--quiet")
    assert line.startswith(f"{said}; less is taken with --micro-batch-size 1") and "--resume goes on" in line
    monkeypatch.setattr("losa.inspection.inspect", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "demo"])


def test_inspect_counts_zeros_of_models_from_elsewhere(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["zeros"] == 0


def test_inspect_finds_a_weight_that_was_changed(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    main(["compress", str(llama), "--output", str(tmp_path / "out"), *flags(settings), "--quiet"])
    capsys.readouterr()
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 1.0
    save_file(tensors, path, {"format": "pt"})
    assert "model.layers.1.mlp.up_proj" in refused(capsys, "inspect", tmp_path / "out")


def test_a_dry_run_tells_and_leaves_nothing(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", str(llama), "--output", str(tmp_path / "out"), *flags(settings), "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    # q, o: 32 x 32; k, v: 16 x 32; gate, up, down: 48 x 32
    assert planned["prunable"] == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert [step["sparsity"] for step in planned["steps"]] == [0.4375, 0.5]
    assert main(arguments) == 0
    assert "memory at its peak" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "sparsity is 1.0: must be at least 0 and below 1"),
        (["--sparsity", "-0.1"], "sparsity is -0.1"),
        (["--sparsity", "nan"], "not a finite number"),
        (["--pruner", "wnada"], "did you mean 'wanda'"),
        (["--allocator", "rmj"], "did you mean 'rmi'"),
        (["--recovery", "lossa"], "did you mean 'losa'"),
        (["--schedule", "cubik"], "did you mean 'cubic'"),
        (["--sparsty", "0.5"], "did you mean '--sparsity'"),
        (["--recipe", "papr"], "did you mean 'paper'"),
        (["--recipe", "nowhere.json"], "does not exist"),
        (["--pruner-options", '{"dmap": 1}', "--pruner", "sparsegpt"], "did you mean 'damp'"),
        (["--targets", "("], "is no regular expression"),
        (["--calibration", "nowhere.txt"], "does not exist"),
        (["--calibration", "wikitxt2"], "did you mean 'wikitext2'"),
        (["--train-data", "demo:test"], "held out"),
        (["--device", "cdua"], "use auto, cpu or cuda"),
        (
            ["--recovery", "full"],
            "mean_rank 2.0 would change nothing: leave it out, or set recovery to one of low-rank pairs",
        ),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_bad_settings(
    arguments: list[str],
    message: str,
    llama: Path,
    tmp_path: Path,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rest = [] if arguments == ["--resume"] else flags(settings)
    assert message in refused(capsys, "compress", llama, "--output", tmp_path / "out", *rest, *arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_settings_in_a_recipe_file(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text('{"sparsety": 0.5}')
    line = refused(capsys, "compress", llama, "--output", tmp_path / "out", "--recipe", tmp_path / "r.json")
    assert "unknown setting 'sparsety': did you mean 'sparsity'" in line


def test_too_little_text_says_how_much_there_is(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    (tmp_path / "empty.txt").write_text("")
    start = ["compress", llama, "--output", tmp_path / "out"]
    line = refused(capsys, *start, *flags(settings | {"calibration": tmp_path / "short.txt"}))
    assert "tokens of text, 12 sequences of 24 need 288" in line
    assert "is empty" in refused(capsys, *start, *flags(settings | {"train_data": tmp_path / "empty.txt"}))
    assert not (tmp_path / "out" / "losa.json").exists()


def test_outputs_are_not_overwritten_unasked(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    start = ["compress", llama, *flags(settings), "--quiet", "--output"]
    for more in ([], ["--overwrite"]):
        assert "is no run of losa" in refused(capsys, *start, foreign, *more)
        assert (foreign / "thesis.txt").read_text() == "years of work"
        assert "is a file" in refused(capsys, *start, tmp_path / "file", *more)
    assert main([*map(str, start), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "losa.json").read_bytes()
    capsys.readouterr()
    assert "--resume goes on with it, --overwrite replaces it" in refused(capsys, *start, tmp_path / "out")
    assert (tmp_path / "out" / "losa.json").read_bytes() == before
    assert main([*map(str, start), str(tmp_path / "out"), "--overwrite"]) == 0


def test_an_output_that_cannot_be_written(llama: Path, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    # /proc takes no folders, not even from root
    assert "cannot be written" in refused(capsys, "compress", llama, *flags(settings), "--output", "/proc/losa-out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("MODEL", "--output", "PLACE/out"),
        ("MODEL", "--output", "out", "--calibration", "PLACE/rows.jsonl"),
        ("PLACE/model", "--output", "out"),
        ("MODEL", "--output", "out", "--recipe", "PLACE/mine.json"),
        ("MODEL", "--output", "out", "--distill", "0.5", "--teacher-model", "PLACE/model"),
    ],
)
@pytest.mark.parametrize(
    ("place", "reason"), [("locked", "Permission denied"), ("n" * 300, "File name too long")], ids=["locked", "long"]
)
def test_a_path_that_cannot_be_looked_at_is_one_line(
    arguments: Sequence[str],
    place: str,
    reason: str,
    llama: Path,
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """pathlib passes on that a folder may not be entered, and that a name is too long, where it is asked what is there."""
    stat = os.stat

    def forbidding(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if "locked" in str(path):  # root may enter all
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "stat", forbidding)
    given = [word.replace("PLACE", place).replace("MODEL", str(llama)) for word in arguments]
    said = refused(capsys, "compress", given[0], *flags(settings), "--quiet", *given[1:])
    assert place in said and reason in said
    assert place != "locked" or "no folder has that name" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "~no-such-user/model", "--output", "out", "--calibration=demo", "--train-data=demo"),
        ("compress", "demo", "--output", "out", "--calibration", "~no-such-user/rows.jsonl"),
        ("recover", "demo", "--output", "out", "--train-data", "~no-such-user/rows.jsonl"),
        ("evaluate", "~no-such-user/model", "--data", "demo:test"),
    ],
)
def test_a_home_that_nobody_has_is_a_path_that_does_not_exist(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused(capsys, *arguments)


def test_what_else_the_system_refuses_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "of-losa")

    monkeypatch.setattr("losa.run.read_recipe", missing)
    with pytest.raises(FileNotFoundError):
        main(["compress", "demo", "--output", "x", "--resume"])


def test_a_full_disk_ends_in_one_line_and_no_half_result(llama: Path, tmp_path: Path, settings: Settings) -> None:
    """No file may grow beyond 40 kB: writing fails as it does on a full disk."""
    code = """
import resource, signal, sys
from losa import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(cli.main(sys.argv[1:]))
"""
    out = tmp_path / "out"
    worker = process("compress", llama, "--output", out, *flags(settings), "--quiet", program=("-c", code))
    _, err = worker.communicate(timeout=LONG)
    assert worker.returncode == 2, err
    assert err.count("\n") == 1 and "cannot be written" in err
    assert not (out / "losa.json").exists() and not (out / "config.json").exists()
    assert not list((out / "run").glob("*.new"))


def test_resume_refuses_other_settings(
    llama: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compress", llama, "--output", tmp_path / "out", "--quiet"]
    assert main([*map(str, start), *flags(settings)]) == 0
    capsys.readouterr()
    assert "sparsity = 0.5, not 0.6" in refused(capsys, *start, "--resume", "--sparsity", "0.6")
    assert main([*map(str, start[:-1]), "--resume"]) == 0
    assert "out was finished before: nothing is left to do" in capsys.readouterr().err


def test_resume_from_another_folder(
    llama: Path,
    text: Path,
    tmp_path: Path,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run's own settings name its files as they were named where it was begun."""
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    begun.mkdir(), elsewhere.mkdir()
    shutil.copy(text, begun / "mine.txt")
    start = ["compress", llama, "--output", tmp_path / "out", "--quiet"]
    monkeypatch.chdir(begun)
    assert main([*map(str, start), *flags(settings | {"calibration": "mine.txt"})]) == 0
    capsys.readouterr()
    monkeypatch.chdir(elsewhere)
    said = refused(capsys, *start, "--resume")
    assert f"calibration 'mine.txt' is in {begun}, where the run was begun: resume it from there" in said
    monkeypatch.chdir(begun)
    assert main([*map(str, start), "--resume"]) == 0


def test_kill_9_then_resume_gives_the_same_bytes(llama: Path, tmp_path: Path, settings: Settings) -> None:
    longer = settings | {"train_samples": 40, "checkpoint_minutes": 0.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    worker = process("compress", llama, "--output", whole, *flags(longer), "--quiet")
    _, err = worker.communicate(timeout=LONG)
    assert worker.returncode == 0, err
    begin = ["compress", llama, "--output", killed, *flags(longer), "--quiet"]
    worker = process(*begin, program=at_update(3, "SIGSTOP"))  # it keeps its lock
    how = os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert how is not None and how.si_code == os.CLD_STOPPED, worker.communicate()
    other = process(*begin, "--resume")
    _, err = other.communicate(timeout=LONG)
    assert other.returncode == 2 and "in use by another losa" in err
    worker.kill()
    worker.communicate()
    assert not (killed / "losa.json").exists() and (killed / "run" / "recovery.safetensors").is_file()
    worker = process("compress", llama, "--output", killed, "--resume", "--quiet")
    _, err = worker.communicate(timeout=LONG)
    assert worker.returncode == 0, err
    for name in ("model.safetensors", "masks.safetensors", "config.json", "losa.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_ctrl_c_says_how_to_go_on(llama: Path, tmp_path: Path, settings: Settings) -> None:
    begin: list[object] = ["compress", llama, "--output", tmp_path / "out", *flags(settings)]
    worker = process(*begin, program=at_update(2, "SIGINT"))
    _, err = worker.communicate(timeout=LONG)
    assert worker.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "losa.json").exists()


def test_help_is_quick_and_complete() -> None:
    """Help loads no torch, and lists every setting of the issue."""
    code = "import sys; from losa.cli import main\ntry: main(['compress', '--help'])\nexcept SystemExit: pass\n"
    check = "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    named = (
        "--output --recipe --sparsity --pruner --allocator --schedule --steps --mean-rank --rank-by --recovery --targets "
        "--calibration --calibration-samples --sequence-length --train-data --train-samples --learning-rate "
        "--batch-size --eval-data --seed --device --dtype --resume --dry-run --json --ignore"
    )
    for flag in named.split():
        assert f"{flag} " in done.stdout or f"{flag}\n" in done.stdout, flag


def test_the_demo_recovers_what_pruning_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in model is sound: it predicts Python, loses clearly at 60%, and wins part of it back in two short steps.

    What comes out is an ordinary model with its zeros, and a smaller one without; a demo that was killed goes on.
    """
    short = {"steps": 2, "train_samples": 120, "calibration_samples": 16, "allocation_samples": 16}
    chosen = {"eval_data": "demo:validation", "eval_tokens": 16384, "eval_step_tokens": 0, "sample_tokens": 0} | short
    quiet = Progress(quiet=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("losa.pipeline.set_ranks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        demo(tmp_path, chosen, False, False, quiet)
    with pytest.raises(LosaError, match="holds a demo: --resume goes on with it"):
        demo(tmp_path, chosen, False, False, quiet)
    found = demo(tmp_path, chosen, True, False, quiet)
    dense, pruned, losa = (found["models"][name] for name in ("dense", "pruned only", "LoSA"))
    assert dense["perplexity"] < 16 and pruned["perplexity"] > 1.15 * dense["perplexity"]
    assert losa["perplexity"] < pruned["perplexity"] - 0.2 * (pruned["perplexity"] - dense["perplexity"])
    assert dense["bytes"] <= 12_000_000
    assert losa["bytes_packed"] < 0.6 * losa["bytes"] and pruned["bytes_packed"] < 0.6 * pruned["bytes"]
    loads = "from transformers import AutoModelForCausalLM as A; import sys; m = A.from_pretrained(sys.argv[1]);"
    loads += "w = m.model.layers[0].mlp.up_proj.weight; assert 'losa' not in sys.modules; print(float((w == 0).float().mean()))"
    done = subprocess.run([sys.executable, "-c", loads, found["output"]], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.4


def test_an_overwritten_demo_leaves_no_packed_model_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the new one is made, and resumed, it would be taken for it."""
    made = {"losa.json": "{}", "run/recipe.json": "{}"}
    for place in [tmp_path / f"{name}{form}" for name in ("pruned", "losa") for form in ("", "-packed")]:
        (place / "run").mkdir(parents=True)
        for name, content in made.items():
            (place / name).write_text(content)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("losa.demo.run.compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, {}, False, True, Progress(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "losa"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "demo", "--output", "x", "--steps", "abc"], "--steps: invalid int value: 'abc'"),
        (["compress", "demo", "--output", "x", "--pruner-options", "x"], "--pruner-options: 'x' is not JSON"),
        (["compress", "demo", "--output", "x", "--pruner-options", "[" * 100_000], "is not JSON"),
        (["compress", "demo", "--output", "x", "--pruner-options", "9" * 5000], "is not JSON"),
        (["compres", "demo"], "invalid choice: 'compres'"),
        ([], "COMMAND"),
        (["evaluate", "demo", "--data", "demo:test", "--tokens", "1"], "at least 2"),
        (["compress", "demo", "--output", "x", "--eval-tokens", "1"], "eval_tokens is 1: must be at least 2"),
        (["inspect", "nowhere"], "'nowhere' is no folder"),
        (["compress", "demo", "--output", "x", "--pruner-options", '{"foo": 1}'], "'foo': known: none"),
    ],
)
def test_every_mistake_gets_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("losa: ") and said.count("\n") == 1 and message in said
    assert not list(tmp_path.iterdir())


def test_the_built_in_model_can_be_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["zeros"] < 100
