"""Zero-shot tasks: our definitions and scores are the harness's own, from whatever files the rows come."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from conftest import changed, tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import losa
from losa.cli import main
from losa.demo import next_line
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.tasks import functions, harness, local

Row = dict[str, Any]
STOCK = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}
CHOICES = {"text": ["the sun", "a stone", "rain", "the sea"], "label": ["A", "B", "C", "D"]}

# rows with the fields of the hub's datasets
HUB: dict[str, list[Row]] = {
    "hellaswag": [
        {"ind": 3, "activity_label": "Baking", "ctx_a": "A man [step] mixes  dough.", "ctx_b": "he", "ctx": "", "label": "2",
         "endings": ["eats [title] it.", "Leaves [substeps] the  room.", "rolls it out.", "sings."]},
        {"ind": 4, "activity_label": "How to sew", "ctx_a": "[header] Cut [title] Take cloth.", "ctx_b": "", "ctx": "", "label": "0",
         "endings": [" cut it.", "b", "c", "d"]},
    ],
    "winogrande": [
        {"sentence": "The cup broke the plate since _ was hard.", "option1": "the cup", "option2": "the plate", "answer": "1"},
        {"sentence": "Ann thanked Eve, as _ had helped her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "boolq": [
        {"question": "is water wet", "passage": "Water -- Water is wet.", "idx": 0, "label": 1},
        {"question": "is fire cold", "passage": "Fire -- Fire is hot.", "idx": 1, "label": 0},
    ],
    "openbookqa": [
        {"id": "a", "question_stem": "What warms the earth?", "choices": CHOICES, "answerKey": "A"},
        {"id": "b", "question_stem": "What falls from clouds?", "choices": CHOICES, "answerKey": "C"},
    ],
    "piqa": [
        {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Sing to the lid of it.", "label": 0},
        {"goal": "dry a cup", "sol1": "put it in water", "sol2": "use a towel", "label": 1},
    ],
    "arc_easy": [
        {"id": "a", "question": "What is hot?", "choices": CHOICES, "answerKey": "A"},
        {"id": "b", "question": "What is salty?", "choices": {"text": ["ice", "sea"], "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "arc_challenge": [{"id": "a", "question": "What is hard?", "choices": CHOICES, "answerKey": "B"}],
}  # fmt: skip


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's datasets hold the rows above in every split."""
    named = {("aps/super_glue", "boolq"): "boolq", ("Rowan/hellaswag", None): "hellaswag", ("baber/piqa", None): "piqa"}
    named |= {("allenai/winogrande", "winogrande_xl"): "winogrande", ("allenai/openbookqa", "main"): "openbookqa"}
    named |= {("allenai/ai2_arc", "ARC-Easy"): "arc_easy", ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge"}

    def load_dataset(path: str, name: str | None = None) -> Any:
        rows = datasets.Dataset.from_list(HUB[named[path, name]])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def stock(name: str) -> Any:
    """The harness's own task, from its own definition."""
    manager = TaskManager(include_defaults=False)
    return manager.load([str(Path(lm_eval.__file__).parent / "tasks" / STOCK[name])])["tasks"][name]


def asked(task: Any) -> list[Any]:
    """What it asks of a model, and what it makes of answers that like the first, and the last, of each row best."""
    task.build_all_requests()
    found = [instance.args for instance in task.instances]
    for row in task.eval_docs:
        count = len(task.doc_to_choice(row))
        for best in range(count):
            found.append(task.process_results(row, [(-1.0 - abs(best - i), False) for i in range(count)]))
    return found


# ---------------------------------------------------------------------------------------- the harness's own


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", harness.PAPER)
def test_definitions_are_the_harness_own(name: str, tmp_path: Path) -> None:
    own, ours = stock(name), harness.prepare([name], {})[name]
    local_rows = write(tmp_path / "rows.jsonl", HUB[name])
    for task in (ours, harness.prepare([name], {name: str(local_rows)})[name]):
        assert asked(task) == asked(own) and len(task.instances) > 1
        assert task.aggregation() == own.aggregation() and task.higher_is_better() == own.higher_is_better()
        assert task.VERSION == own.VERSION and task.OUTPUT_TYPE == own.OUTPUT_TYPE
        for key in ("dataset_path", "dataset_name", "target_delimiter", "description", "doc_to_text", "doc_to_target"):
            theirs, here = getattr(own.config, key), getattr(task.config, key)
            assert here == theirs or (callable(here) and callable(theirs)), key
    for split in ("training_split", "validation_split", "test_split"):
        assert getattr(ours.config, split) == getattr(own.config, split)


PIECES = st.lists(st.sampled_from(["[title]", " [title]", "[x]", "[", "]", "  ", " ", "a", "B.", "\n", "É", "_"])).map(
    "".join
)


@pytest.fixture(scope="module")
def own_functions() -> Any:
    from lm_eval.tasks.hellaswag import utils
    from lm_eval.tasks.winogrande import preprocess_winogrande

    return utils, preprocess_winogrande


@settings(max_examples=200, deadline=None)
@given(PIECES, PIECES, PIECES)
def test_functions_are_the_harness_own(own_functions: Any, one: str, two: str, three: str) -> None:
    hellaswag, winogrande = own_functions
    assert functions._without_marks(one) == hellaswag.preprocess(one)
    row = {"sentence": f"{one}_{two}", "option1": three, "option2": two, "answer": "2"}
    assert functions.winogrande_beginnings(row) == winogrande.doc_to_choice(row)
    assert functions.winogrande_ending(row) == winogrande.doc_to_target(row)
    assert functions.winogrande_answer(row) == winogrande.doc_to_text(row)


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    """A folder as PIQA's authors publish it, 40 rows made up."""
    generator = torch.Generator().manual_seed(0)
    words = ["turn", "the", "lid", "of", "a", "jar", "cup", "water", "into", "and", "cut"]

    def some() -> str:
        count = int(torch.randint(2, 7, (), generator=generator))
        return " ".join(words[i] for i in torch.randint(len(words), (count,), generator=generator))

    rows = [{"goal": some(), "sol1": some(), "sol2": some()} for _ in range(40)]
    write(tmp_path / "piqa" / "valid.jsonl", rows)
    labels = torch.randint(2, (40,), generator=generator).tolist()
    (tmp_path / "piqa" / "valid-labels.lst").write_text("\n".join(map(str, labels)) + "\n")
    return tmp_path / "piqa"


def test_scores_are_the_harness_own(
    piqa: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stock task, with only the rows replaced, on the model as it loads it itself."""
    labels = (piqa / "valid-labels.lst").read_text().split()
    lines = (piqa / "valid.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"label": int(label)} for line, label in zip(lines, labels, strict=True)]
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(rows)))
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda path, name=None: splits)
        task = stock("piqa")
    own = HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=1)
    expected = lm_eval.evaluate(own, {"tasks": {"piqa": task}})["results"]["piqa"]
    capsys.readouterr()
    rest = ["--task-data", f"piqa={piqa}", "--dtype", "float32", "--device", "cpu"]
    assert main(["evaluate", str(llama), "--tasks", "piqa", *rest, "--batch-size", "7", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["tasks"]["piqa"]
    assert err == "" and found["rows"] == 40 and found["cut"] == 0
    for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        assert found[metric] == expected[f"{metric},none"], metric
    assert found["acc"] != found["acc_norm"] and 0.2 < found["acc"] < 0.8
    assert main(["evaluate", str(llama), "--tasks", "piqa,piqa", *rest, "--limit", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["piqa"]["rows"] == 10


def test_a_table_for_people(
    piqa: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boolq = write(piqa / "boolq.jsonl", HUB["boolq"])
    arguments = [
        "--tasks",
        "boolq,piqa",
        "--task-data",
        f"piqa={piqa / 'valid.jsonl'}",
        "--task-data",
        f"boolq={boolq}",
    ]
    assert main(["evaluate", str(llama), *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["questions", "acc", "±", "acc_norm", "±"]
    assert [line[0] for line in lines[1:]] == ["boolq", "piqa", "mean"]
    assert float(lines[3][1]) == pytest.approx((float(lines[1][2]) + float(lines[2][2])) / 2, abs=1e-4)


# ---------------------------------------------------------------------------------------- the loaded model


def pairs() -> list[Instance]:
    texts = [
        ("import os", "\nimport sys"),
        ("def f(a, b):", "\n    return a"),
        ("x", " = 1"),
        ("for i in range", "(3)"),
    ]
    texts += [("class Reader:\n    def", end) for end in (" read", " write(self)", " __init__(self, a, b, c)")]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]


def oracle(of: Any) -> list[float]:
    """Log-probability of each ending after its beginning, in float64 from the model's own logits."""
    found = []
    for beginning, ending in (instance.args for instance in pairs()):
        start = len(tokenizer()(beginning)["input_ids"])
        ids = torch.tensor(tokenizer()(beginning + ending)["input_ids"])
        with torch.no_grad():
            logs = of(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
        found.append(float(logs.gather(1, ids[1:, None])[start - 1 :].sum()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "mixtral"])
def test_the_loaded_model_is_what_is_asked_however_batched(kind: str, dtype: torch.dtype) -> None:
    of = tiny(kind).to(dtype)
    before = {name: weight.clone() for name, weight in of.state_dict().items()}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    reader = tokenizer()
    for batch_size in (1, 3, 8):
        lm = harness.as_the_harness_reads(of, reader, batch_size)
        assert lm.model is of and of.dtype == dtype
        found = [value for value, _ in lm.loglikelihood(pairs(), disable_tqdm=True)]
        assert found == pytest.approx(oracle(of), rel=tolerance)
        if (
            dtype == torch.bfloat16 and batch_size == 1 and kind != "mixtral"
        ):  # one at a time, only softmax and sum differ
            assert found == pytest.approx(oracle(of), rel=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in of.state_dict().items())
    assert reader.pad_token == tokenizer().pad_token


def test_a_structurally_smaller_model(llama: Path, tmp_path: Path, piqa: Path, small: Recipe, capsys: Any) -> None:
    """Its rates differ by block, so that only losa's own way of loading reads it."""
    recipe = changed(small, pattern="structured", pruner="wanda-sp", recovery="none", steps=1, eval_data="")
    made = losa.compress(str(llama), recipe, tmp_path / "out")
    assert hasattr(made.model.config, "quantization_config")
    data = {"piqa": str(piqa)}
    expected = losa.zero_shot(made.model, made.tokenizer, ["piqa"], data)
    assert expected["tasks"]["piqa"]["rows"] == 40
    assert main(["evaluate", str(tmp_path / "out"), "--tasks", "piqa", "--task-data", f"piqa={piqa}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"] == expected["tasks"]


def test_a_packed_model(llama: Path, tmp_path: Path, piqa: Path, small: Recipe, capsys: Any) -> None:
    """Its linears are no nn.Linear; it scores, and writes, what the same model dense with zeros does."""
    losa.compress(str(llama), changed(small, recovery="none", steps=1, eval_data=""), tmp_path / "dense")
    assert main(["export", str(tmp_path / "dense"), "--output", str(tmp_path / "packed"), "--format", "packed"]) == 0
    (tmp_path / "prompts.txt").write_text("import os\n\ndef main():\n")
    arguments = ["--tasks", "piqa", "--task-data", f"piqa={piqa}", "--dtype", "float32", "--json"]
    arguments += ["--against", str(tmp_path / "dense"), "--prompts", str(tmp_path / "prompts.txt")]
    found = []
    for name in ("dense", "packed"):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / name), *arguments, "--max-new-tokens", "8"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["tasks"] == found[1]["tasks"]
    assert len(found[1]["comparison"]["prompts"]) == 2 and found[1]["comparison"]["agreement"] == 1


def test_questions_longer_than_the_model_reads(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "water " * 100
    rows = [*HUB["piqa"], {"goal": long, "sol1": "a", "sol2": "b", "label": 0}]
    path = write(tmp_path / "rows.jsonl", rows)
    arguments = ["evaluate", str(llama), "--tasks", "piqa", "--task-data", f"piqa={path}"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["piqa"]["cut"] == 2  # two answers
    assert main(arguments) == 0
    assert "piqa: 2 questions with an answer are longer than the model reads" in capsys.readouterr().out
    write(path, [*rows, {"goal": "a", "sol1": long, "sol2": "b", "label": 0}])
    assert main(arguments) == 2
    assert "and the model reads at most 64: this task cannot be scored on it" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- rows from files


def nested(rows: list[Row], stem: str) -> list[Row]:
    """As AI2 publishes its questions."""
    return [
        {
            "id": row["id"],
            "question": {
                "stem": row[stem],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in rows
    ]


AUTHORS: dict[str, tuple[str, list[Row]]] = {
    "hellaswag": ("hellaswag_val.jsonl", [row | {"label": int(row["label"])} for row in HUB["hellaswag"]]),
    "winogrande": ("dev.jsonl", HUB["winogrande"]),
    "boolq": ("val.jsonl", [row | {"label": bool(row["label"])} for row in HUB["boolq"]]),
    "openbookqa": ("test.jsonl", nested(HUB["openbookqa"], "question_stem")),
    "piqa": ("valid.jsonl", HUB["piqa"]),
    "arc_easy": ("ARC-Easy-Test.jsonl", nested(HUB["arc_easy"], "question")),
    "arc_challenge": ("ARC-Challenge-Test.jsonl", nested(HUB["arc_challenge"], "question")),
}


@pytest.mark.parametrize("name", harness.PAPER)
def test_every_published_form_asks_the_same(name: str, tmp_path: Path) -> None:
    split = "test" if name in ("openbookqa", "arc_easy", "arc_challenge") else "validation"
    folders = [write(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", HUB[name]).parent]
    file, rows = AUTHORS[name]
    folders.append(write(tmp_path / "authors" / file, rows).parent)
    for folder in folders:
        write(folder / "train.jsonl", [])
        (folder / "README.txt").write_text(split)
    expected = asked(harness.prepare([name], {name: str(write(tmp_path / "rows.json", HUB[name]))})[name])
    for folder in folders:
        assert asked(harness.prepare([name], {name: str(folder)})[name]) == expected


@pytest.mark.parametrize("name", ["piqa", "winogrande", "hellaswag"])
def test_labels_in_a_file_of_their_own(name: str, tmp_path: Path) -> None:
    answer = local.FIELDS[name][-1]
    rows = [{key: value for key, value in row.items() if key != answer} for row in HUB[name]]
    write(tmp_path / "dev.jsonl", rows)
    (tmp_path / "dev-labels.lst").write_text("\n".join(str(row[answer]) for row in HUB[name]))
    assert asked(harness.prepare([name], {name: str(tmp_path)})[name]) == asked(
        harness.prepare([name], {name: str(write(tmp_path / "rows.json", HUB[name]))})[name]
    )


def spoilt(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        row = {key: value for key, value in (HUB["piqa"][1] | fields).items() if value is not None}
        write(folder / "valid.jsonl", [HUB["piqa"][0], row])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt(goal=None), "line 2: no row of piqa: goal missing among its fields (sol1, sol2, label)"),
        (spoilt(label=2), "row 2: label 2 is none of the choices of piqa"),
        (spoilt(label=-1), "row 2: label -1 is none of the choices of piqa"),
        (spoilt(label="x"), "do not fit piqa: Could not convert 'x'"),
        (lambda folder: write(folder / "dev.jsonl", HUB["piqa"]), "several files (dev.jsonl, valid.jsonl) named after"),
        (lambda folder: (folder / "valid.jsonl").unlink(), "no file (of none) named after validation or valid"),
        (
            lambda folder: (folder / "valid.jsonl").rename(folder / "train.jsonl"),
            "no file (of train.jsonl) named after",
        ),
        (lambda folder: (folder / "valid.jsonl").write_text("{"), "valid.jsonl, line 1: not JSON"),
        (lambda folder: (folder / "valid.jsonl").write_text("3"), "line 1: expected an object with fields, got int"),
        (lambda folder: (folder / "valid.jsonl").write_text(""), "valid.jsonl is empty"),
        (lambda folder: (folder / "valid-labels.lst").write_text("0"), "has 1 labels for the 2 rows of valid.jsonl"),
    ],
)
def test_rows_that_are_none(
    spoil: Callable[[Path], None], message: str, llama: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write(tmp_path / "valid.jsonl", HUB["piqa"])
    spoil(tmp_path)
    monkeypatch.setattr("losa.model.load", lambda *_: pytest.fail("the model was loaded"))
    assert main(["evaluate", str(llama), "--tasks", "piqa", "--task-data", f"piqa={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("name", ["winogrande", "arc_easy", "hellaswag"])
def test_answers_that_are_none(name: str, tmp_path: Path) -> None:
    row = HUB[name][0] | {local.FIELDS[name][-1]: "9"}
    path = write(tmp_path / "rows.jsonl", [HUB[name][0], row])
    with pytest.raises(LosaError, match=f"row 2: {local.FIELDS[name][-1]} '9' is none of the choices of {name}"):
        harness.prepare([name], {name: str(path)})


# ---------------------------------------------------------------------------------------- out of reach


def test_hub_out_of_reach(llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("losa.model.load", lambda *_: pytest.fail("the model was loaded"))
    assert main(["evaluate", str(llama), "--tasks", "paper"]) == 2
    assert capsys.readouterr().err == (
        "losa: task 'hellaswag' cannot be read (Couldn't reach 'Rowan/hellaswag' on the Hub): check the network, or give "
        "its rows with --task-data hellaswag=FILE or FOLDER\n"
    )


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(LosaError, match=r"tasks need lm-evaluation-harness .*: pip install 'lm_eval\[hf\]'"):
        harness.prepare(["piqa"], {})


def test_a_definition_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    rows = write(tmp_path / "rows.jsonl", [{"beginning": "import", "end": " os"}] * 3)
    path.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: beginning\ndoc_to_target: '{{end}}'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    found = losa.zero_shot(tiny(), tokenizer(), [str(path)])["tasks"]["mine"]
    whole = torch.tensor([tokenizer()("import os")["input_ids"]])
    with torch.no_grad():
        logs = tiny()(input_ids=whole).logits[0, 0].log_softmax(-1)
    assert whole.shape == (1, 2)
    assert found["rows"] == 3 and found["perplexity"] == pytest.approx(math.exp(-logs[whole[0, 1]]), rel=1e-4)
    path.write_text("task: [")
    with pytest.raises(LosaError, match="cannot be read"):
        harness.prepare([str(path)], {})


# ---------------------------------------------------------------------------------------- the demo's own task


def test_questions_of_the_next_line() -> None:
    found = next_line.questions(60, 0)
    assert found == next_line.questions(60, 0) and found != next_line.questions(60, 1)
    held_out = {line.rstrip() for d in next_line.corpus.standard_library()["test"] for line in d.text.splitlines()}
    assert len({row["choices"][row["target"]] for row in found}) == 60
    assert len({row["target"] for row in found}) == 4
    for row in found:
        lines, choices = row["context"].split("\n"), row["choices"]
        assert len(lines) == 12 and len(set(choices)) == 4
        assert held_out.issuperset([*lines, *choices]) and not set(choices) - {choices[row["target"]]} & set(lines)
        assert len({len(choice) - len(choice.lstrip()) for choice in choices}) == 1


def test_the_built_in_model_knows_the_next_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "demo", "--tasks", "demo-next-line", "--limit", "60", "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["demo-next-line"]
    assert found["rows"] == 60 and found["cut"] == 0
    assert found["acc"] > 0.25 + 2 * found["acc_stderr"]


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The harness draws from the global generators; other tests must not see it."""
    with torch.random.fork_rng():
        yield
