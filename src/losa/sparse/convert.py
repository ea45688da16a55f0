"""A saved model in another form: dense with zeros to packed, and back, weight by weight, without loading it."""

import copy
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from losa import card, masks, model
from losa.blocks import find_blocks
from losa.checkpoint import INDEX, MASKS, SINGLE, Checkpoint, files_of, weight_bytes
from losa.disk import of_shapes
from losa.errors import LosaError
from losa.export import load_masks
from losa.progress import Progress
from losa.run import CARD, FORMAT, damaged, make_readable, read_made, sync, write_bytes, write_json, writing
from losa.shrink import OURS, PLAIN
from losa.sparse.linear import check_files, describe, install, layouts_in
from losa.sparse.packed import FLOATS, SUFFIXES, Layout, Packed, pack, unpack
from losa.widths import named

SHARD = 10**9  # bytes of a file; as much is held in memory before it is written
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def convert(
    folder: Path,
    output: Path,
    form: Literal["dense", "packed"],
    values: Literal["auto", "int8"] = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model in `folder` to the new folder `output`, dense or packed. All but the linears is copied.

    What is kept of a weight is what its mask says: the packed linear's own, that of masks.safetensors, or, where there is
    none, what is not zero. Linears that would be no smaller, and experts, stay dense. Floats go through bit for bit; int8
    rounds, and comes back as products rounded to the model's type. Held in memory: SHARD bytes, a linear, the masks.
    Raises LosaError, before anything is written, where there is nothing to convert or `output` is not free.
    """
    source = Path(model.locate(str(folder)))
    if not source.is_dir():
        raise LosaError(f"{str(folder)!r} is no folder: export takes a saved model's")
    config = model.load_config(str(source))
    layouts = layouts_in(config) or {}
    _check(source, config, layouts, form, values)
    told = _told(source)
    with writing(output, ""):
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()) or output.samefile("."))
    if taken:
        raise LosaError(f"output {str(output)!r} exists: name a new folder")
    files = Checkpoint(source, layouts)
    companions = {files.key(f"{name}.{suffix}") for name in layouts for suffix in SUFFIXES[1:]}
    _check_weights(source, config, files, companions)
    linears = _linears(config, files)
    if form == "packed":  # tensors that mean nothing to a dense model would be taken for those that are written here
        companions |= {files.key(f"{name}.{suffix}") for name, _ in linears.values() for suffix in SUFFIXES[1:]}
    kept = load_masks(source) if layouts or (source / MASKS).is_file() else {}
    with writing(output, ""), _staging(Path(os.path.realpath(output))) as staging:  # where a link leads to
        writer = _Writer(staging)
        made: dict[str, Layout] = {}
        for key in (progress or Progress(quiet=True)).track(list(files.files), "writing", "tensor"):
            if key in linears:
                name, shape = linears[key]
                weight, mask = _read(source, files, name, shape, kept, config)
                packed = _pack(weight, mask, values, made) if form == "packed" else None
                if packed is None:
                    writer.add(key, weight)
                    continue
                made[name] = packed.layout
                kept.pop(name, None)
                for suffix, tensor in packed.tensors().items():
                    writer.add(key.removesuffix("weight") + suffix, tensor)
            elif key not in companions:
                writer.add(key, files.read(key))
        if form == "packed" and not made:
            raise LosaError(f"{str(folder)!r}: no linear has zeros enough for packing to make it smaller")
        writer.close()
        if kept:
            writer.save(kept, MASKS, {"losa": str(FORMAT)})
        _copy_rest(source, staging, describe(made) if made else None)
        what = {
            "from": str(source.resolve()) if Path(folder).is_dir() else str(folder),
            "format": form,
            "values": values,
        }
        sizes = {"size": writer.total, "disk": weight_bytes(staging)}
        _note(staging, source, told, what, sizes, OURS if made else PLAIN)
    return {
        "output": str(output),
        "linears": len(linears),
        "packed": len(made),
        "bytes_before": weight_bytes(source),
        "bytes": weight_bytes(output),
    }


def _check(source: Path, config: Any, layouts: dict[str, Layout], form: str, values: str) -> None:
    """Raise LosaError for what cannot be converted."""
    stored: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if stored and not layouts:
        raise LosaError(
            f"{str(source)!r} is stored as {stored.get('quant_method')!r}: export takes dense or packed models"
        )
    if form == "dense" and values != "auto":
        raise LosaError(f"values {values} are of packed models: leave them out, or say --format packed")
    if form == "dense" and not layouts:
        raise LosaError(f"{str(source)!r} is dense already")
    if form == "packed" and layouts and (values == "auto" or stored["values"] == "int8"):
        raise LosaError(f"{str(source)!r} is packed already, with {stored['values']} values")
    if (source / "adapter").is_dir():
        raise LosaError(f"{str(source)!r} has an adapter beside it, for PEFT, which knows dense linears only")


def _check_weights(source: Path, config: Any, files: Checkpoint, companions: set[str | None]) -> None:
    """Raise LosaError where loading would: for tensors that are missing, too many or of another shape; by headers only."""
    shapes = {key: file.get_slice(key).get_shape() for key, file in files.files.items() if key not in companions}
    if files.packed:
        install(model.skeleton(config), files.packed)
        check_files([str(path) for path in files_of(source)], files.packed)
        dense = {f"{name}.weight": [it.out_features, it.in_features] for name, it in files.packed.items()}
        shapes |= {key: shape for name, shape in dense.items() if (key := files.key(name)) is not None}
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    of_shapes(source, plain, shapes, torch.float32)


def _linears(config: Any, files: Checkpoint) -> dict[str, tuple[str, list[int]]]:
    """The linears that are prunable or packed, modules of the model and stored under their names: name and shape by key."""
    whole: Any = model.skeleton(config)
    found: dict[str, tuple[str, list[int]]] = {}
    prunable = [name for block in find_blocks(whole) for name in block.linears]
    for name in dict.fromkeys([*prunable, *files.packed]):  # a packed one may lie outside the blocks, as a head does
        key = files.key(f"{name}.weight")
        module: Any = named(whole, name)[1]
        if key is not None and module is not None:  # an expert's linear is no module
            found[key] = (name, list(module.weight.shape))
    return found


def _read(
    source: Path, files: Checkpoint, name: str, shape: list[int], kept: dict[str, Tensor], config: Any
) -> tuple[Tensor, Tensor]:
    """A linear's weight, dense, and its mask."""
    if name in files.packed:
        weight, mask = unpack(files.packed_linear(name))
        return (weight.to(config.dtype or weight.dtype) if files.packed[name].values == torch.int8 else weight), mask
    weight = files.read(f"{name}.weight")
    if name not in kept:
        # by its bits: a zero with a sign is kept, or it would not come back
        return weight, weight.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
        ) != 0
    mask = masks.of_weight(name, shape, kept[name], source)
    masks.check_held(name, weight, mask, source)
    return weight, mask


def _pack(weight: Tensor, mask: Tensor, values: str, made: dict[str, Layout]) -> Packed | None:
    """The packed linear, None if it would be no smaller or its values of another type than those so far."""
    chosen = torch.int8 if values == "int8" else weight.dtype
    if weight.dtype not in FLOATS or any(layout.values != chosen for layout in made.values()):
        return None
    packed = pack(weight, mask, chosen)
    return packed if packed.layout.bytes < weight.numel() * weight.itemsize else None


class _Writer:
    """Tensors into safetensors files of at most SHARD bytes (or one tensor), and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.size = folder, dict[str, Tensor](), 0
        self.parts: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.itemsize
        if self.held and self.size + size > SHARD:
            self._flush()
        self.held[name] = tensor
        self.size, self.total = self.size + size, self.total + size

    def _flush(self) -> None:
        self.save(self.held, f"part-{len(self.parts)}.safetensors", {"format": "pt"})
        self.parts.append(list(self.held))
        self.held, self.size = {}, 0

    def save(self, tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name, metadata)
        make_readable(self.folder / name)
        sync(self.folder / name)

    def close(self) -> None:
        """Give the files the names that transformers looks for."""
        self._flush()
        count, places = len(self.parts), dict[str, str]()
        for index, keys in enumerate(self.parts):
            name = SINGLE if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
            (self.folder / f"part-{index}.safetensors").rename(self.folder / name)
            places |= dict.fromkeys(keys, name)
        if count > 1:
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": places})


def _copy_rest(source: Path, target: Path, stored: dict[str, Any] | None) -> None:
    """All files but weights, and config.json with `stored` for its quantization_config, or none."""
    ours = {path.name for path in files_of(source)} | {INDEX, MASKS, CARD, "config.json"}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in ours and path.suffix not in WEIGHTS and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if stored is not None:
        config["quantization_config"] = stored
    write_bytes(target / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _told(source: Path) -> dict[str, Any] | None:
    """losa.json, None if there is none. Raises LosaError where no card can be written from it, before the weights are."""
    path = source / "losa.json"
    if not path.is_file():
        return None
    told = read_made(path, any_format=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _note(Path(folder), source, told, {"from": "", "format": "dense", "values": "auto"}, {"size": 0}, PLAIN)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise damaged(path, error) from None
    return told


def _note(
    target: Path, source: Path, told: dict[str, Any] | None, what: dict[str, str], sizes: dict[str, int], loads: str
) -> None:
    """Say in losa.json, if there is one, that what it tells was of the model before this, all but sizes; and a card of its own."""
    if told is not None:
        made = told | {"exported": what}
        if made["format"] == FORMAT:
            # its speed was the other form's
            measured = {k: value for k, value in made["measurements"]["sparse"].items() if k != "tokens_per_second"}
            made["measurements"] = made["measurements"] | {"sparse": measured | sizes}
        write_json(target / "losa.json", made)
        if made["format"] == FORMAT:
            shown = made | {"recipe": made["recipe"] | {"format": what["format"], "values": what["values"]}}
            shown["measurements"] = made["measurements"] | {"sparse": made["measurements"]["sparse"] | {"loads": loads}}
            card.write(target, shown, source)
            return
    card.write_exported(target, source, what["format"], what["values"], loads)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` if all goes well; what a killed export has left in it is taken away first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.exporting")
    with writing(staging, ""):
        staging.mkdir(exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)  # the system frees it however the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not staging.exists() or staging.stat().st_ino != os.fstat(lock).st_ino:
            raise BlockingIOError
        with writing(staging, ""):
            for path in staging.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield staging
            staging.replace(output)
            sync(output.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except BlockingIOError:
        raise LosaError(f"{str(output)!r} is being written by another losa: wait, or name another folder") from None
    finally:
        os.close(lock)
