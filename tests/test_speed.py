"""losa bench decode: what is timed, in which turns, and where it is kept."""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny, two_steps

import losa
from losa import speed
from losa.cli import main
from losa.recipe import Recipe
from losa.sparse import decoding


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """A run's output."""
    out = tmp_path_factory.mktemp("speed") / "out"
    losa.compress(str(llama), Recipe(**two_steps(text) | {"recovery": "none", "steps": 1, "format": "packed"}), out)
    return out


def counted(whole: Any, prompt: torch.Tensor, tokens: int) -> float:
    """In place of a clock: a dense model takes a second a token, a packed one half of that."""
    speed_of = 0.5 if any("Packed" in type(module).__name__ for module in whole.modules()) else 1.0
    decode(whole, prompt, tokens)
    turns.append(speed_of)
    return speed_of * tokens


decode = speed.one_by_one
turns: list[float] = []


def test_two_models_in_turns(packed: Path, llama: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "one_by_one", counted)
    turns.clear()
    arguments = ["bench", "decode", str(packed), "--against", str(llama), "--tokens", "3", "--rounds", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens_per_second"] == 2 and found["against"]["tokens_per_second"] == 1 and found["speedup"] == 2
    assert found["runtime"] == found["against"]["runtime"] == "native" and found["tokens"] == 3
    assert turns == [0.5, 1.0, 1.0, 0.5, 0.5, 1.0]  # a round to warm up, then two; who begins changes
    assert main([*arguments, "--threads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2.00 times as fast as" in printed and "2 threads" in printed and torch.get_num_threads() == 1


def test_saved_speeds_are_in_the_report(packed: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "one_by_one", counted)
    before = json.loads((packed / "losa.json").read_text())
    arguments = ["bench", "decode", str(packed), "--tokens", "2", "--rounds", "2", "--save", "--against", str(llama)]
    assert main(arguments) == 0
    after = json.loads((packed / "losa.json").read_text())
    assert after["measurements"]["sparse"].pop("tokens_per_second") == 2
    assert after["measurements"]["dense"].pop("tokens_per_second") == 1
    assert after == before
    from losa import story

    told = {row.name: row.speed for row in story.read(packed).verdict()}
    assert told["dense"] == 1 and told["pruned"] == 2


def test_says_what_decodes(llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tokens", "2", "--rounds", "2", "--json"]
    other = save_tiny(tmp_path / "opt", "opt")
    assert main(["bench", "decode", str(other), *arguments]) == 0
    assert "own forward: OPTForCausalLM is none of" in json.loads(capsys.readouterr().out)["runtime"]
    monkeypatch.setenv(decoding.SWITCH, "ordinary")
    assert main(["bench", "decode", str(llama), *arguments]) == 0
    assert "LOSA_DECODING asks for it" in json.loads(capsys.readouterr().out)["runtime"]


def test_tokens_are_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the prompt, which is not timed, each from the cache of those before it, the likeliest."""
    ticks = count()
    monkeypatch.setattr(speed, "now", lambda device: next(ticks) if seen else pytest.fail("the prompt is timed"))
    seen: list[tuple[list[int], int | None]] = []

    class Model:
        def __call__(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: int | None = None) -> Any:
            seen.append((input_ids[0].tolist(), past_key_values))
            logits = torch.nn.functional.one_hot(input_ids + 1, 9).float()
            return type("Out", (), {"logits": logits, "past_key_values": (past_key_values or 0) + input_ids.shape[1]})

    assert decode(Model(), torch.tensor([[5, 2]]), 3) == 1
    assert seen == [([5, 2], None), ([3], 2), ([4], 3), ([5], 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--rounds", "1"], "rounds at least 2"),
        (["--threads", "-1"], "threads at least 0"),
        (["--tokens", "64"], "reads at most 64 tokens: --tokens can be 48 at most"),
        (["--save", "--against", "demo"], "name that"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--against", "./nowhere"], "nowhere"),
        (["--shape", "8x8"], "unknown argument '--shape'"),
    ],
)
def test_bad_input(packed: Path, capsys: Any, arguments: list[str], message: str) -> None:
    before = (packed / "losa.json").read_bytes()
    assert main(["bench", "decode", str(packed), *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and (packed / "losa.json").read_bytes() == before


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{", "is damaged (JSONDecodeError"),
        ("{}", "is damaged (KeyError: 'format')"),
        ("[]", "is damaged (TypeError"),
        ('{"format": 2}', "is of format 2, this losa reads 1"),
        ('{"format": 1}', "is damaged (KeyError: 'command')"),
    ],
)
def test_a_damaged_losa_json(llama: Path, tmp_path: Path, capsys: Any, told: str, message: str) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    (copy / "losa.json").write_text(told)
    for command in (["bench", "decode", str(copy), "--save"], ["inspect", str(copy)]):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_a_folder_without_a_run_has_no_place(llama: Path, capsys: Any) -> None:
    assert main(["bench", "decode", str(llama), "--save"]) == 2
    assert "--save needs a folder that losa compress or recover has made" in capsys.readouterr().err
