"""Load a causal language model, its configuration and its tokenizer; the device and the type it is computed in."""

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from losa import checkpoint, data, distributed
from losa.errors import LosaError
from losa.loading import STRUCTURED
from losa.recipe import Recipe
from losa.units import dtype_name

ADAPTER = "adapter"  # the folder beside a model that has a LoRA which does not merge, as PEFT reads it
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def choose_device(name: str) -> torch.device:
    """The device a recipe names; auto is the first accelerator, else the CPU. Raises LosaError if it is not there.

    Of several processes on one machine each takes the accelerator of its number.
    """
    if distributed.launched() > 1:
        name = _of_process(name)
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise LosaError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type != "cpu" and not torch.accelerator.is_available():
        raise LosaError(f"device {name!r} is not there: torch sees no accelerator; use cpu")
    return device


def _of_process(name: str) -> str:
    """The device of this process, where others take theirs. Raises LosaError where they would have to share one."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = found.type if found else "cpu"
    if name in ("cpu", "mps"):
        return name
    if ":" in name:
        kind = name.partition(":")[0]
        raise LosaError(f"device {name!r} cannot be that of {distributed.launched()} processes: use {kind}, one each")
    place, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if "LOCAL_RANK" not in os.environ and count > 1:
        raise LosaError("LOCAL_RANK is not set, and every process would take the first device: set it, or use torchrun")
    if place >= count:
        raise LosaError(f"process {place} of this machine has no device: torch sees {count}: start as many processes")
    return f"{name}:{place}"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type a recipe names; auto is bfloat16 where it is multiplied in hardware, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        # amx or avx512_bf16; elsewhere bf16 products are emulated and slower than fp32's
        fast = any(f() for f in (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported))
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def locate(source: str) -> str:
    """A local folder's path, or a hub name as it is; `demo` is the built-in model. Raises LosaError for neither, or a broken one.

    What can be known of a folder without reading its weights is checked here.
    """
    if source == "demo":
        return str(resources.files("losa").joinpath("demo", "model"))
    path = Path(os.path.expanduser(source))
    if not path.exists():
        if HUB_NAME.fullmatch(source) and not source.startswith("."):
            return source
        raise LosaError(f"model {source!r} does not exist: name a folder, a model on the hub (OWNER/NAME) or demo")
    if not (path / "config.json").is_file():
        raise LosaError(f"{source!r} is not a model: it has no config.json")
    checkpoint.check_config(path / "config.json")
    checkpoint.check_files(path)
    return str(path)


def name_of(source: Any) -> str:
    """What a model is called: a folder or a name on the hub as it is given, a loaded one by its class."""
    return source if isinstance(source, str) else type(source).__name__


def folder_of(source: str) -> Path | None:
    """Where the files of a model are on this machine, if they are: nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        place = locate(source)
        return Path(place) if Path(place).is_dir() else Path(snapshot_download(place, local_files_only=True))
    except (LosaError, LocalEntryNotFoundError, HFValidationError):
        return None


def disk_of(source: str) -> int | None:
    """Bytes of the files of a model's weights, if they are on this machine."""
    folder = folder_of(source)
    try:
        return checkpoint.weight_bytes(folder) if folder else None
    except (LosaError, FileNotFoundError):  # part of a download
        return None


def load_config(source: str) -> Any:
    """The model's configuration and nothing else. Raises LosaError if it cannot be had, or asks for code of its own."""
    from transformers import AutoConfig

    with loading(source):
        return AutoConfig.from_pretrained(locate(source), trust_remote_code=False)


def config_of(loaded: Any, recipe: Recipe) -> Any:
    """The configuration of a loaded model. Raises LosaError for what is no causal language model, or of another type."""
    head = getattr(loaded, "get_output_embeddings", None)
    if not isinstance(loaded, nn.Module) or head is None or head() is None or not hasattr(loaded, "config"):
        raise LosaError(f"{type(loaded).__name__} is no causal language model of transformers: it is not supported")
    if recipe.dtype not in ("auto", dtype_name(loaded.dtype)):
        raise LosaError(
            f"dtype {recipe.dtype}: a loaded model is computed in its own type ({loaded.dtype}): convert it first"
        )
    return loaded.config


def longest_text(config: Any) -> float:
    """The most tokens a model reads at once; infinite if its positions have no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def reading_window(config: Any, wanted: int = 0) -> int:
    """Tokens read at once for perplexity: `wanted`, or with 0 all the model can, at most 4096 (the paper's).

    Raises LosaError for more than the model reads.
    """
    longest = longest_text(config)
    if wanted > longest:
        raise LosaError(f"a window of {wanted} tokens: the model reads at most {longest}")
    return wanted or int(min(4096, longest))


def load_tokenizer(source: str, config: Any) -> Any:
    """The model's tokenizer. Raises LosaError if there is none, or it has more tokens than the model."""
    from transformers import AutoTokenizer

    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(locate(source), trust_remote_code=False)
    data.check_tokenizer(tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def load(source: str, recipe: Recipe) -> Any:
    """The model in the recipe's type, on its device (the CPU if it will be sharded). safetensors only, no remote code.

    Raises LosaError for a folder or hub name without a usable model, and for weights that are missing or not a number.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(recipe.device)
    with loading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            locate(source),
            dtype=choose_dtype(recipe.dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that it is said which, below
            output_loading_info=True,
        )
    model, found = loaded
    check_complete(found, source)
    # a model that is sharded over devices, a block at a time, need not fit one
    return model if recipe.shard == "blocks" and distributed.world() > 1 else model.to(device)


def load_whole(source: str, recipe: Recipe) -> Any:
    """`load`, with the LoRA that is kept apart in adapter/, if there is one: what its owner runs, to measure and to use.

    Raises LosaError also for an adapter that does not fit, or where PEFT is not installed.
    """
    loaded = load(source, recipe)
    place = locate(source)
    if _beside(source, f"{ADAPTER}/adapter_config.json") is None:
        return loaded
    if _beside(source, f"{ADAPTER}/adapter_model.safetensors") is None:  # PEFT would look for a pickle
        raise LosaError(f"{source!r} has an adapter beside it without adapter_model.safetensors: losa loads no pickles")
    if find_spec("peft") is None:
        raise LosaError(f"{source!r} has an adapter beside it, which needs PEFT: pip install peft")
    from peft import PeftModel

    with warnings.catch_warnings(), loading(source):
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's own call
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(loaded, place, subfolder=ADAPTER).get_base_model()


def _beside(source: str, name: str) -> str | None:
    """Where a file beside a model is on this machine, None if there is none."""
    from transformers.utils.hub import cached_file

    quietly: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    with loading(source):
        return cached_file(locate(source), name, **quietly)


def refuse_adapters(source: Any) -> None:
    """Raise LosaError for a model (a folder, a name on the hub, or loaded) with a LoRA of PEFT: work on its weights alone
    would lose it, unsaid."""
    if isinstance(source, nn.Module):
        if any(type(module).__module__.startswith("peft.") for module in source.modules()):
            raise LosaError("the model has adapters of PEFT: merge or unload them first")
        return
    for name in (f"{ADAPTER}/adapter_config.json", "adapter_config.json"):
        if _beside(source, name) is not None:
            raise LosaError(
                f"{source!r} has a LoRA beside its weights ({name}), which would be lost: merge it first, or take a copy "
                "without it"
            )


def check_complete(found: dict[str, Any], source: str) -> None:
    """Raise LosaError if from_pretrained's `loading_info` says that weights were missing, or of other shapes."""
    if odd := sorted(found["mismatched_keys"]):
        key, has, wants = odd[0]
        why = "download the model again"
        if any(unused.endswith(".weight_mask") for unused in found["unexpected_keys"]):
            why = "they are packed, and config.json has lost its quantization_config"
        what = f"{key} is {list(has)}, the model wants {list(wants)}"
        raise LosaError(f"the weights of {source!r} do not fit its config.json: {what}: {why}")
    if missing := sorted(found["missing_keys"]):
        raise LosaError(f"the weights of {source!r} are incomplete: {len(missing)} are missing, such as {missing[0]}")


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Whatever transformers, safetensors or the hub raise, in one line."""
    try:
        yield
    except LosaError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        found = source == "demo" or isinstance(error, PermissionError) or os.path.exists(os.path.expanduser(source))
        note = "" if found else " (and no folder has that name)"
        raise LosaError(f"cannot load the model {source!r}{note}: {reason}") from error


def skeleton(config: Any) -> Any:
    """The model without weights, to look at its structure. Raises LosaError if it is no causal language model."""
    from transformers import AutoModelForCausalLM

    with loading(config.name_or_path or config.model_type), torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == STRUCTURED:
        from losa.widths import read_widths, resize

        resize(whole, read_widths(stored))
    return whole


def check_finite(model: nn.Module, prefix: str = "") -> None:
    """Raise LosaError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters(prefix):
        if parameter.numel() and not bool(
            torch.stack(parameter.aminmax()).isfinite().all()
        ):  # without a mask of it all
            raise LosaError(
                f"weight {name} holds NaN or infinity: the model is damaged or overflows in {parameter.dtype}"
            )
