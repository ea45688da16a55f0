"""Load a causal language model; find its decoder blocks and their prunable linears by structure, not by class name."""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from losa import checkpoint, data, distributed, experts
from losa.errors import LosaError
from losa.loading import STRUCTURED
from losa.recipe import Recipe
from losa.recipe_checks import TARGETS
from losa.sparse.linear import PackedLinear, part_of
from losa.units import dtype_name

if TYPE_CHECKING:
    from losa.adapters import MaskedLinear
    from losa.disk import OnDisk
    from losa.recovery.distillation import Teacher

ADAPTER = "adapter"  # the folder beside a model that has a LoRA which does not merge, as PEFT reads it
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Block:
    """A decoder block and its prunable linears (there may be none) by full name; `Subject.wrap` makes these MaskedLinears.

    `home`: where its weights are while it is not `present`, if that is the disk; its module is then on the meta device.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, Any]
    home: "OnDisk | None" = None

    def present(self) -> AbstractContextManager[None]:
        """Its weights are in memory inside; those of a model that lives there always are."""
        return self.home.present(self) if self.home else nullcontext()

    @property
    def masked(self) -> dict[str, "MaskedLinear"]:
        return self.linears

    @property
    def weights(self) -> int:
        return sum(linear.weight.numel() for linear in self.linears.values())


@dataclass
class Subject:
    """What is compressed: the model, its tokenizer, its blocks in order, where it came from, the type it is saved in, and
    what teaches it while it is repaired.

    `home`: if the model stays on disk, what brings its parts. `spill`: the folder for activations, if not in memory.
    """

    model: Any
    tokenizer: Any
    blocks: list[Block]
    source: str
    stored: torch.dtype
    teacher: "Teacher | None" = None
    dense: Any = None  # a frozen copy of the dense model, where something needs it later
    home: "OnDisk | None" = None
    spill: Path | None = None

    @property
    def pad_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end)

    @property
    def size(self) -> int:
        """Bytes of the weights in the type they are saved in: what the model takes in memory, once loaded."""
        tensors = {id(tensor): tensor for tensor in self.model.state_dict(keep_vars=True).values()}  # tied ones once
        wide = self.stored.itemsize
        return sum(
            t.numel() * (min(wide, t.itemsize) if t.is_floating_point() else t.itemsize) for t in tensors.values()
        )

    def wrap(self, make: Callable[[nn.Linear, int, float], "MaskedLinear"], recipe: Recipe, max_rank: int) -> None:
        """Put a masked linear in the place of every prunable one; those the recipe targets can hold ranks up to `max_rank`.

        Experts held as 3-D parameters become linears first; `merge` puts them back.
        """
        names = [name for block in self.blocks for name in block.linears]
        wanted = targeted(names, recipe) if max_rank else set()

        def wrap(block: Block) -> None:
            block.module.requires_grad_(False)
            experts.split(block.module)
            for name in block.linears:
                linear: Any = block.module.get_submodule(inner := name.removeprefix(f"{block.name}."))
                block.linears[name] = make(linear, max_rank if name in wanted else 0, recipe.scaling)
                block.module.set_submodule(inner, block.linears[name])

        if self.home is not None:
            self.home.prepare = wrap
            return
        self.model.requires_grad_(False)
        for block in self.blocks:
            wrap(block)

    def round_block(self, block: Block) -> None:
        """Round the weights of `block` to what is stored: with no recovery to come, later blocks see what will be there."""
        self._round(block.module.named_parameters(block.name))

    def round(self) -> None:
        """Round all weights to what is stored."""
        self._round(self.model.named_parameters())

    def _round(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        for name, parameter in parameters:
            parameter.data = self.narrowed(name, parameter.data).to(parameter.dtype)

    def narrowed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, the model's `name`, in the type it is saved in: what transformers keeps in fp32 (routers) stays as it is."""
        wide = part_of(name, self.model._get_dtype_plan(self.stored))
        return weight if wide else weight.to(self.stored)

    def merge(self) -> dict[str, torch.Tensor]:
        """Put plain linears back, the adaptation merged and rounded to what is stored, every pruned weight zero.

        Returns the keep-masks, packed (`masks.pack`), by the linears' names.
        """
        bits = {name: mask for block in self.blocks for name, mask in self.merge_block(block).items()}
        self.round()
        return bits

    def merge_block(self, block: Block) -> dict[str, torch.Tensor]:
        """The same for one block, which must be present."""
        bits = {}
        for name, linear in block.masked.items():
            bits[name] = linear.mask_bits
            block.linears[name] = linear.merge()
            block.module.set_submodule(name.removeprefix(f"{block.name}."), block.linears[name])
            del linear  # and with it the weight it had
        self.round_block(block)
        experts.join(block.module)
        return bits

    def narrow(self) -> None:
        """Hold the weights in the type they are saved in. Buffers (rotary frequencies) stay, as when a model is loaded."""
        for prefix, module in self.model.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if name.endswith("bias") or not isinstance(module, PackedLinear):  # what is packed is so for good
                    parameter.data = self.narrowed(name, parameter.data)


def targeted(names: list[str], recipe: Recipe) -> set[str]:
    """Those of the linears that get adapters. Raises LosaError if there are none."""
    wanted = {name for name in names if re.search(TARGETS.get(recipe.targets, recipe.targets), name)}
    if not wanted:
        kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in names})
        raise LosaError(f"targets {recipe.targets!r} match none of the linears: {', '.join(kinds)}")
    return wanted


def stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of modules with linears that holds most of the model, and its name. Raises LosaError if there is none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_linears(child) for child in module)
    ]
    if not lists:
        what = "decoder blocks" if any(isinstance(m, nn.Linear) for m in model.modules()) else "Linear layers"
        raise LosaError(f"{type(model).__name__} has no {what} that losa can find: it is not supported")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def find_blocks(model: nn.Module, ignore: list[str] | None = None) -> list[Block]:
    """The decoder blocks. Raises LosaError if there are none.

    Every nn.Linear of a block whose full name no pattern of `ignore` matches is prunable, but for routers. Experts held
    as 3-D parameters are listed as the linears that `experts.split` will make of them. Raises LosaError for weights in
    any other form.
    """
    name, stack = stack_of(model)
    blocks = []
    for index, module in enumerate(stack):
        prefix = f"{name}.{index}"
        linears = {f"{prefix}.{n}": linear for n, linear in _linears(module).items()}
        _refuse_others(prefix, module, linears, ignore or [])
        kept = {n: linear for n, linear in linears.items() if not any(re.search(p, n) for p in ignore or [])}
        blocks.append(Block(index, prefix, module, kept))
    if not any(block.linears for block in blocks):
        raise LosaError(f"ignore {ignore} leaves no linear of {type(model).__name__} to prune")
    return blocks


def prunable(model: nn.Module, recipe: Recipe) -> list[Block]:
    """The blocks of `model` with the linears that the recipe prunes. Raises LosaError if its pattern does not fit one."""
    blocks = find_blocks(model, recipe.ignore)
    if m := recipe.kept.m:
        for block in blocks:
            odd = [name for name, linear in block.linears.items() if linear.in_features % m]
            if odd and recipe.undivided == "refuse":
                width = block.linears[odd[0]].in_features
                raise LosaError(
                    f"{odd[0]}: pattern {recipe.pattern} needs an input width that {m} divides, not {width}; "
                    "--undivided dense leaves such linears dense"
                )
            block.linears = {name: linear for name, linear in block.linears.items() if name not in odd}
        if not any(block.linears for block in blocks):
            raise LosaError(f"no linear of {type(model).__name__} has an input width that {m} divides")
    return blocks


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block, each expert's among them, without the routers."""
    found: dict[str, nn.Linear] = {}
    for name, child in block.named_modules():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif experts.held_by(child):
            found |= {f"{name}.{inner}": linear for inner, linear in _linears(experts.Experts(child)).items()}
    routers = _routers(block)
    return {name: linear for name, linear in found.items() if linear not in routers}


def _routers(block: nn.Module) -> set[nn.Module]:
    """The linears that choose among experts or weigh them: beside experts, as many outputs as there are, or one.

    They stay dense: they are tiny, and a wrong choice costs a whole expert. Most models hold theirs as a plain parameter.
    """
    routers: set[nn.Module] = set()
    for parent in block.modules():
        beside = list(parent.children())
        counts = [len(child) for child in beside if isinstance(child, nn.ModuleList)]
        counts += [len(child.get_parameter("down_proj")) for child in beside if experts.held_by(child)]
        for child in beside if counts else []:
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if len(linears) == 1 and linears[0].out_features in (1, *counts):
                routers.add(linears[0])
    return routers


def _refuse_others(prefix: str, block: nn.Module, linears: dict[str, nn.Linear], ignore: list[str]) -> None:
    """Raise LosaError naming weights of `block` that no pruner can handle: else a large part of it would stay dense, unsaid.

    They have three dimensions (of more than 1), or two and the size of a linear; a router's have not.
    """
    largest = max((linear.weight.numel() for linear in linears.values()), default=0)
    for owner, module in block.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or experts.held_by(module):
            continue
        for name, parameter in module.named_parameters(owner, recurse=False):
            sizes = sum(size > 1 for size in parameter.shape)
            if sizes < 2 or (sizes == 2 and parameter.numel() < largest):
                continue
            if not any(re.search(pattern, f"{prefix}.{name}") for pattern in ignore):
                raise LosaError(
                    f"{prefix}.{name} {list(parameter.shape)} is neither an nn.Linear nor experts that losa knows: it "
                    "cannot be pruned; --ignore with its name leaves it dense"
                )


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
    path = Path(source).expanduser()
    if not path.exists():
        if HUB_NAME.fullmatch(source) and not source.startswith("."):
            return source
        raise LosaError(f"model {source!r} does not exist: name a folder, a model on the hub (OWNER/NAME) or demo")
    if not (path / "config.json").is_file():
        raise LosaError(f"{source!r} is not a model: it has no config.json")
    checkpoint.check_files(path)
    return str(path)


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
    """Raise LosaError if from_pretrained's `loading_info` says that weights were missing."""
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
        note = "" if Path(source).expanduser().exists() or source == "demo" else " (and no folder has that name)"
        raise LosaError(f"cannot load the model {source!r}{note}: {reason}") from error


def skeleton(config: Any) -> Any:
    """The model without weights, to look at its structure. Raises LosaError if it is no causal language model."""
    from transformers import AutoModelForCausalLM

    with loading(config.name_or_path or config.model_type), torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored["quant_method"] == STRUCTURED:
        from losa.widths import resize

        resize(whole, stored["linears"])
    return whole


def subject_of(model: Any, tokenizer: Any, source: str, recipe: Recipe, stored: torch.dtype | None = None) -> Subject:
    """A loaded model, ready to be compressed; it will be saved in the type it was stored in, if that is the narrower one."""
    check_finite(model)
    model.eval()
    if stored is None or stored.itemsize >= model.dtype.itemsize:
        stored = model.dtype
    return Subject(model, tokenizer, prunable(model, recipe), source, stored)


def check_finite(model: nn.Module, prefix: str = "") -> None:
    """Raise LosaError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters(prefix):
        if parameter.numel() and not bool(
            torch.stack(parameter.aminmax()).isfinite().all()
        ):  # without a mask of it all
            raise LosaError(
                f"weight {name} holds NaN or infinity: the model is damaged or overflows in {parameter.dtype}"
            )
