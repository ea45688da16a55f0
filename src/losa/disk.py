"""A model that stays on disk: a skeleton whose blocks come to memory one at a time, out of its safetensors files.

transformers reads and writes, with its own conversion of keys, so that the weights are those of `from_pretrained`. A part
of the model that is away is on the meta device; buffers that no file holds (rotary frequencies) are always there.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa import heap, model
from losa.blocks import Block, Subject, prunable, stack_of
from losa.checkpoint import files_of, open_file
from losa.recipe import Recipe
from losa.sparse.linear import part_of


class OnDisk:
    """The files of the model in `folder`, and the skeleton `model` of which blocks and outer modules come and go.

    dtype: what it computes in. `prepare` is called with each block that has come from `folder` or from `written`, the
    file of a finished block by its index. Raises LosaError if the files are not those of such a model.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.prepare: Callable[[Block], None] | None = None
        self.written: Callable[[int], Path | None] = lambda _: None
        self._files = {path: list(open_file(path).keys()) for path in files_of(folder)}
        self.model: Any = self._skeleton()
        self._conversions = self.model._weight_conversions
        stack, blocks = stack_of(self.model)
        self._blocks = [f"{stack}.{index}" for index in range(len(blocks))]
        self._keys, self._aliases = self._by_module()
        self._away: dict[str, tuple[nn.Module, dict[str, Any]]] = {}

    def subject(self, tokenizer: Any, source: str, recipe: Recipe, stored: torch.dtype | None) -> Subject:
        """The model, ready to be compressed from disk, as `subject_of` has one in memory."""
        if stored is None or stored.itemsize >= self.dtype.itemsize:
            stored = self.dtype
        blocks = prunable(self.model, recipe)
        for block in blocks:
            block.home = self
        return Subject(self.model, tokenizer, blocks, source, stored, home=self)

    def samples(self) -> Iterator[tuple[str, list[int], Tensor]]:
        """Name, shape and a few values of every tensor in the files: enough to tell models apart."""
        for path, keys in self._files.items():
            with open_file(path) as file:
                for key in keys:
                    tensor = file.get_tensor(key)
                    yield key, list(tensor.shape), tensor.flatten()[:: max(1, tensor.numel() // 16)].float()

    # -------------------------------------------------------------------------------------------- what comes and goes

    @contextmanager
    def present(self, block: Block) -> Iterator[None]:
        """`block` is in memory inside, once however often it is asked for; what it has become is forgotten at the end."""
        if block.name in self._away:
            yield
        else:
            with self._brought(block, self.written(block.index)):
                yield

    def dense(self, block: Block) -> AbstractContextManager[None]:
        """The same of `block` as it was before it was written; it must not be present."""
        return self._brought(block, None)

    @contextmanager
    def _brought(self, block: Block, written: Path | None) -> Iterator[None]:
        self._away[block.name] = block.module, dict(block.linears)
        block.module = copy.deepcopy(block.module)
        self.model.set_submodule(block.name, block.module)
        try:
            self._load(block.name, block.module, written)
            if self.prepare is not None:
                self.prepare(block)
            yield
        finally:
            block.module, block.linears = self._away.pop(block.name)
            self.model.set_submodule(block.name, block.module)
            heap.trim()

    @contextmanager
    def ends(self) -> Iterator[None]:
        """What stands around the blocks comes when it is first used inside, and goes at the end."""
        here: set[str] = set()

        def bring(names: set[str]) -> Callable[..., None]:
            def come(_module: nn.Module, _inputs: Any) -> None:
                for name in names - here:
                    here.add(name)
                    self._load(name, self.model.get_submodule(name))

            return come

        hooks = [
            self.model.get_submodule(user).register_forward_pre_hook(bring(names))
            for user, names in self._users().items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in here:
                self._leave(name)

    @contextmanager
    def outer_weights(self, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
        """All weights around the blocks by name, in `dtype`: mapped, if that is what the files hold. Of tied ones, the first."""
        outer = [name for name in self._keys if name not in self._blocks]
        for name in outer:
            self._load(name, self.model.get_submodule(name), dtype=dtype)
        try:
            aliases = {alias for names in self._aliases.values() for alias in names}
            state = {name: t for name, t in self.model.state_dict().items() if not t.is_meta and name not in aliases}
            wide = self.model._get_dtype_plan(dtype)  # these have come in fp32
            yield {n: t.to(dtype) if t.is_floating_point() and not part_of(n, wide) else t for n, t in state.items()}
        finally:
            for name in outer:
                self._leave(name)

    def _users(self) -> dict[str, set[str]]:
        """By module around the blocks, the modules whose weights it uses: its own, or that to which they are tied."""
        users = {name: {name} for name in self._keys if name not in self._blocks}
        for name, aliases in self._aliases.items():
            for alias in aliases:
                users.setdefault(alias.rpartition(".")[0], set()).add(name.rpartition(".")[0])
        return users

    def _load(
        self, name: str, module: nn.Module, written: Path | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Fill `module`, the model's `name`, from the files of the model, or from the one file `written`.

        Raises LosaError for a weight that holds NaN or infinity.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = dtype or self.dtype
        for parameter in module.parameters():  # on the meta device: what it will be
            parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
        config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=self.model._get_dtype_plan(dtype), weight_mapping=self._mapping()
        )
        wanted = {written: None} if written else self._keys[name]
        open_files = [(open_file(path), keys) for path, keys in wanted.items()]
        with _silent():
            parts = {key: file.get_slice(key) for file, keys in open_files for key in keys or file.keys()}
            convert_and_load_state_dict_in_model(self.model, parts, config)
        self.model._weight_conversions = self._conversions
        self._tie(name, module)
        if written is None:
            model.check_finite(module, name)
        module.requires_grad_(False)

    def _leave(self, name: str) -> None:
        """The weights of a module around the blocks go back to the meta device."""
        module = self.model.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key not in module._non_persistent_buffers_set:
                module.register_buffer(key, buffer.to("meta"))
        self._tie(name, module)

    def _tie(self, name: str, module: nn.Module) -> None:
        """What shares a weight with `module` shares the one it has now."""
        for key, parameter in module.named_parameters(name):
            for alias in self._aliases.get(key, []):
                user, _, last = alias.rpartition(".")
                self.model.get_submodule(user).register_parameter(last, parameter)

    # ------------------------------------------------------------------------------------------------ how it is found

    def _skeleton(self) -> Any:
        """The model that waits for its weights; what is missing or odd is found now."""
        from transformers import GenerationConfig

        shapes: dict[str, list[int]] = {}
        for path, keys in self._files.items():
            with open_file(path) as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in keys}
        made = of_shapes(self.folder, model.load_config(str(self.folder)), shapes, self.dtype)
        if (self.folder / "generation_config.json").is_file():
            with model.loading(str(self.folder)):
                made.generation_config = GenerationConfig.from_pretrained(self.folder)
        # buffers that are not stored: room for them, and transformers fills it
        for name, buffer in list(made.named_non_persistent_buffers()):
            owner, _, key = name.rpartition(".")
            module = made.get_submodule(owner)
            module._buffers[key] = torch.empty_like(buffer, device="cpu")
            module._is_hf_initialized = False
        made.initialize_weights()
        return made.eval()

    def _by_module(self) -> tuple[dict[str, dict[Path, list[str]]], dict[str, list[str]]]:
        """Which keys of which files make up each block, and each module around the blocks, by the names of these.

        And the names of weights that are not stored but tied, by the name of the one that is.
        """
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        keys: dict[str, dict[Path, list[str]]] = {name: {} for name in self._blocks}
        stored: set[str] = set()
        for path, in_file in self._files.items():
            for key in in_file:
                name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
                if name in state:  # others are of no use to this model, as from_pretrained has it too
                    stored.add(name)
                    block = next((b for b in self._blocks if name.startswith(f"{b}.")), None)
                    keys.setdefault(block or name.rpartition(".")[0], {}).setdefault(path, []).append(key)
        shared: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        aliases = {}
        for names in shared.values():
            first = next((name for name in names if name in stored), names[0])
            aliases[first] = [name for name in names if name != first]
        return keys, {name: others for name, others in aliases.items() if others}

    def _mapping(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self.model))


def of_shapes(folder: Path, config: Any, shapes: dict[str, list[int]], dtype: torch.dtype) -> Any:
    """The model as `from_pretrained` makes it, of weights that have shapes only, by key.

    Raises LosaError where one is missing or of another shape than the model's.
    """
    weights = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
    with model.loading(str(folder)), _silent():
        made, found = type(model.skeleton(config)).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.check_complete(found, str(folder))
    return made


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' bar for each part."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def local(source: str) -> Path:
    """The folder of a model's files: a local one, or that of a name on the hub, downloaded. Raises LosaError."""
    place = Path(model.locate(source))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    with model.loading(source):
        place = Path(snapshot_download(source, allow_patterns=["*.json", "model*.safetensors", "tokenizer*"]))
    return Path(model.locate(str(place)))
