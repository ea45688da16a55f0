"""Tiny random models with the demo's tokenizer, and a little text, in folders as a user has them."""

import ctypes
import json
import math
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

# Before torch: on tiny models threads only wait for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy
import pytest
import torch
import transformers

from losa import progress
from losa.recipe import Recipe
from losa.run import Run
from losa.sparse import native

FUZZ = int(os.environ.get("LOSA_FUZZ", "1"))  # so many times the tampering that CI does: docs/format.md has the command
LONG = 1800  # seconds until what hangs is an error; nothing is meant to take so long, however busy the machine

# Nothing fails for being slow, and the same examples are tried every time, but where more are asked for.
hypothesis.settings.register_profile(
    "losa", deadline=None, derandomize=FUZZ == 1, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("losa")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed does not depend on the tests before it, nor its threads on how one of them ended."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


WIDTHS = dict(
    vocab_size=2048,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
)
GATED = WIDTHS | {"intermediate_size": 48, "num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED, tie_word_embeddings=True)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GATED, sliding_window=8)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GATED, head_dim=8)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**WIDTHS, ffn_dim=48, word_embed_proj_dim=16, pad_token_id=1)
    ),
}

# Layer types that differ in mask and rotary embedding; fused and parallel projections; experts as 3-D parameters.
SLIDING = GATED | {"head_dim": 8, "sliding_window": 8}
EXPERTS = GATED | {"num_experts_per_tok": 2}
ARCHITECTURES: dict[str, Any] = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SLIDING)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SLIDING, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GATED, pad_token_id=0)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**WIDTHS, bias=True)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDTHS, intermediate_size=48)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **EXPERTS, head_dim=8, num_experts=8, moe_intermediate_size=16, norm_topk_prob=True, mlp_only_layers=[1]
        )
    ),
}


def tiny(kind: str = "llama") -> Any:
    """A random model in fp32; norms and biases are random too, so that nothing passes by being one or zero."""
    torch.manual_seed(0)
    model = (MODELS | ARCHITECTURES)[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter *= 4
    return model


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(resources.files("losa").joinpath("demo", "model")))


def save_tiny(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny(kind).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal, what takes long says how far it is; no test depends on how long one takes."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", math.inf)


@pytest.fixture(autouse=True)
def loud_libraries() -> None:
    """The command line silences transformers; each test starts as a new process would."""
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 70 000 tokens of made-up text in one file of rows."""
    rng = random.Random(0)
    words = ["def", "return", "self", "import", "for", "value", "in", "range", "(", ")", ":", "\n", "0", "1", "x"]
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [json.dumps({"text": " ".join(rng.choices(words, k=100))}) for _ in range(600)]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def settings(text: Path) -> dict[str, Any]:
    return two_steps(text)


def for_cells(settings: dict[str, Any]) -> dict[str, Any]:
    """The flags of `losa experiment`: a cell takes about half a second."""
    left_out = ("sparsity", "steps", "mean_rank", "sample_tokens")
    return {k: v for k, v in settings.items() if k not in left_out} | {"train_samples": 12, "eval_tokens": 200}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def two_steps(text: Path) -> dict[str, Any]:
    """A run of two steps that takes about a second."""
    return dict(
        sparsity=0.5,
        steps=2,
        mean_rank=2.0,
        calibration=str(text),
        calibration_samples=12,
        sequence_length=24,
        allocation_samples=8,
        error_tokens=100,
        train_data=str(text),
        train_samples=16,
        train_length=24,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=2e-3,
        eval_data=str(text),
        eval_tokens=500,
        eval_step_tokens=200,
        sample_tokens=4,
        dtype="float32",
        device="cpu",
    )


@pytest.fixture
def small(settings: dict[str, Any]) -> Recipe:
    return Recipe(**settings)


class Killed(BaseException):
    """What stands for kill -9."""


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    return Recipe(**{**recipe.to_json(), **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def killed_after(saves: int) -> Iterator[None]:
    """The run inside saves its state so many times, and is then killed; fails if it is not."""
    save, done = Run.save, 0

    def dying(run: Run, *rest: Any) -> None:
        nonlocal done
        save(run, *rest)
        done += 1
        if done == saves:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save", dying)
        yield


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The AVX-512 kernels, every instruction of theirs in plain C++ (tests/emulated), for any processor."""
    try:
        command = native.compiler()
    except native.Unavailable as error:
        pytest.skip(str(error))
    made = tmp_path_factory.mktemp("emulated") / "emulated.so"
    sources = [str(native.CSRC / f"{name}.cpp") for name in ("common", "avx512", "avx512_bf16")]
    include = ["-I", str(Path(__file__).parent / "emulated")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared", "-pthread"]
    subprocess.run([*command, *flags, *include, *sources, "-o", str(made), "-ldl"], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes text as it is, or records in the format of the file's name; returns the path."""

    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            import pyarrow  # type: ignore[import-untyped]
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """In place of the hub: `records` are what every dataset holds, `calls` what was asked for, `read` how many rows."""
    state: dict[str, Any] = {"calls": [], "records": [], "read": 0}

    def load_dataset(**arguments: Any) -> Iterator[Any]:
        state["calls"].append(arguments)
        for record in state["records"]:
            state["read"] += 1
            if isinstance(record, Exception):
                raise record
            yield record

    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield state
