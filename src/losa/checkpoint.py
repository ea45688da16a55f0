"""The weights of a saved model, out of its safetensors files, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losa.errors import LosaError
from losa.sparse.packed import Layout, Packed, check, unpack

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MASKS = "masks.safetensors"


def files_of(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in `folder`, there or not. Raises LosaError for a broken index."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        told = json.loads(index.read_text())
        names = sorted(set(told["weight_map"].values()))
        if not names or "metadata" not in told:  # transformers wants both
            raise ValueError
        return [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LosaError(f"{index} is not an index of weights: download the model again") from None


def check_config(path: Path) -> None:
    """Raise LosaError for a quantization_config that is none; all else of config.json is transformers' to read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError, RecursionError):  # transformers says it
        return
    if not isinstance(stored, dict | None):
        raise LosaError(
            f"{path}: quantization_config is no object but {type(stored).__name__}: download the model again"
        )


def check_files(folder: Path) -> None:
    """Every safetensors file is there, as long as its header says and holds what the index says.

    An interrupted download is found in milliseconds. Raises LosaError.
    """
    found: dict[str, str] = {}  # file by key
    for path in files_of(folder):
        try:
            there = path.is_file()
        except OSError as error:  # a name too long
            what = f"names a file that cannot be ({error.strerror})"
            raise LosaError(f"{folder / INDEX} {what}: download the model again") from None
        if not there:
            others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            note = f" ({others[0]} is a pickle, which losa does not load: convert it to safetensors)" if others else ""
            raise LosaError(f"{folder} has no {path.name}: the model is incomplete{note}")
        for key in open_file(path).keys():  # noqa: SIM118
            if key in found:
                raise LosaError(f"{folder}: both {found[key]} and {path.name} hold {key}: download the model again")
            found[key] = path.name
    index = folder / INDEX
    for key, name in json.loads(index.read_text())["weight_map"].items() if index.is_file() else ():
        if found.get(key) != name:
            where = f"{found[key]} does" if key in found else "no file does"
            raise LosaError(f"{index} says that {name} holds {key}, but {where}: download the model again")


def weight_bytes(folder: Path) -> int:
    """What the files of the model's weights take on disk."""
    return sum(path.stat().st_size for path in files_of(folder))


def open_file(path: Path) -> Any:
    """An open safetensors file. Raises LosaError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LosaError(f"{path} is damaged ({error}): download the model again") from None


class Checkpoint:
    """Tensors by name, each read when asked for.

    packed: the linears that are packed (`losa.sparse.linear.layouts_in`). places: what is stored otherwise than under its name,
    as `experts.stored` says. Raises LosaError for what is not there.
    """

    def __init__(
        self,
        folder: Path,
        packed: dict[str, Layout] | None = None,
        places: dict[str, list[tuple[str, int | None]]] | None = None,
    ) -> None:
        self.packed, self._places = packed or {}, places or {}
        self.files: dict[str, Any] = {}  # by the keys that they hold
        for path in files_of(folder):
            file = open_file(path)
            self.files |= dict.fromkeys(file.keys(), file)

    def key(self, name: str) -> str | None:
        """The key under which `name` is stored, None if there is none: base models are saved without the head's prefix."""
        return next((key for key in (name, name.partition(".")[2]) if key in self.files), None)

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat([self._read(key, index) for key, index in self._places.get(name, [(name, None)])])

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the file, not a copy."""
        return self._read(name, None)

    def _read(self, name: str, index: int | None) -> Tensor:
        key = self.key(name)
        if key is None:
            raise LosaError(f"the model's files hold no {name}")
        tensor: Tensor = self.files[key].get_slice(key)[... if index is None else index]
        return tensor

    def packed_linear(self, name: str) -> Packed:
        """A packed linear, checked."""
        layout = self.packed[name]
        parts = {suffix: self.read(f"{name}.{suffix}") for suffix in layout.tensors()}
        found = Packed.of(parts, layout.in_features, layout.nm)
        check(found, name, layout)
        return found

    def weight(self, name: str) -> Tensor:
        """The weight [out, in] of the linear `name`, dense, whatever the form it is stored in."""
        return unpack(self.packed_linear(name))[0] if name in self.packed else self[f"{name}.weight"]
