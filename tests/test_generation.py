"""losa generate: text as it is made, the same for the same seed, one line for bad input."""

import json
import shutil
from pathlib import Path

import pytest
from test_packed_linear import save_packed

from losa.cli import main
from losa.sparse.steps import Table


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    save_packed(folder)
    return folder


def test_streams_what_it_makes(packed: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (packed, llama):
        arguments = ["generate", str(model), "--prompt", "def f(x):", "--max-new-tokens", "12", "--dtype", "float32"]
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert main([*arguments, "--json"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        found = json.loads(lines[0])
        assert shown.rstrip("\n") == found["text"].rstrip("\n") != ""
        assert 0 < found["tokens"] <= 12 and found["prompt"] == "def f(x):"


def test_the_likeliest_whatever_the_model_asks_for(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own settings penalise what is there already, and search with beams."""
    asking = tmp_path / "asking"
    shutil.copytree(llama, asking)
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "num_beams": 3, "do_sample": True, "top_k": 5}
    (asking / "generation_config.json").write_text(json.dumps(settings))
    texts = []
    for model in (llama, asking):
        assert (
            main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "30", "--dtype", "float32", "--json"])
            == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]


def test_draws_by_seed(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        arguments = ["--prompt", "import", "--max-new-tokens", "12", "--temperature", "2", "--seed", str(seed)]
        assert main(["generate", str(packed), *arguments, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_decodes_in_native_code(
    packed: Path, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = Table.run
    monkeypatch.setattr(Table, "run", lambda table: ran.append(1) or run(table))
    for model in (packed, llama):
        assert main(["generate", str(model), "--prompt", "x", "--max-new-tokens", "5", "--json"]) == 0
        assert len(ran) == json.loads(capsys.readouterr().out)["tokens"] - 1 > 0
        ran.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x " * 100], "beyond the 64 that the model reads"),
        (["--max-new-tokens", "64"], "beyond the 64 that the model reads"),
        (["--chat"], "has no chat template"),
        (["--device", "cdua"], "use auto, cpu or cuda"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--temprature", "1"], "did you mean '--temperature'"),
    ],
)
def test_bad_input(packed: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    given = [] if "--prompt" in arguments else ["--prompt", "x"]
    assert main(["generate", str(packed), *given, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "./nowhere", "--prompt", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
