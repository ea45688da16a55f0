"""A model that is written block by block: a safetensors file each, in its place from the start, and the masks beside the run."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from losa import masks
from losa.blocks import Block, Subject
from losa.checkpoint import INDEX, SINGLE
from losa.errors import LosaError
from losa.export import publish
from losa.recipe import Recipe
from losa.run import Run, Saved, make_readable, sync, write_json, writing


class Shards:
    """The files of a model that is written block by block, in their place from the start; the last has what is around them."""

    def __init__(self, subject: Subject, run: Run) -> None:
        self.subject, self.run = subject, run
        count = len(subject.blocks) + 1
        self._names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        with writing(run.folder):
            run.claim(self._names)

    def paths(self) -> list[Path]:
        assert self.run.output is not None
        return [self.run.output / name for name in self._names]

    def written(self, index: int) -> Path | None:
        """The file of that block, if it is finished."""
        path = self.paths()[index]
        return path if path.is_file() else None

    def write(self, block: Block, bits: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Keep the merged `block`, which is narrowed, its masks, and `meta`; the block's file comes last."""
        widths = {name: linear.in_features for name, linear in block.linears.items()}
        kept = sum(int(masks.unpack(mask, widths[name]).count_nonzero()) for name, mask in bits.items())
        self.run.save(f"masks-{block.index:05}", bits, {"kept": kept, **meta})
        for name, parameter in block.module.named_parameters(block.name):
            parameter.data = self.subject.narrowed(name, parameter.data)
        self._write(block.index, block.module.state_dict(prefix=f"{block.name}."))

    def write_rest(self) -> None:
        """Keep what is around the blocks."""
        assert self.subject.home is not None
        if self.written(-1) is None:
            with self.subject.home.outer_weights(self.subject.stored) as weights:
                self._write(-1, weights)

    def read(self, block: Block) -> dict[str, Any]:
        """What `write` was given as `meta`, and how many weights are kept."""
        return self._saved(block).meta

    def bits(self) -> dict[str, Tensor]:
        """All masks, mapped from where `write` put them."""
        return {name: bits for block in self.subject.blocks for name, bits in self._saved(block).tensors.items()}

    def _saved(self, block: Block) -> Saved:
        saved = self.run.load(f"masks-{block.index:05}")
        if saved is None:
            raise LosaError(f"{self.run.folder} lacks the masks of {block.name}: start a new run")
        return saved

    def _write(self, index: int, weights: dict[str, Any]) -> None:
        """By transformers, which knows under which keys they are stored; into its place in one step."""
        scratch = self.run.folder / "shard"
        with writing(self.run.folder):
            try:
                self.subject.model.save_pretrained(scratch, state_dict=weights, max_shard_size=1 << 60)
                file = scratch / SINGLE
                make_readable(file)
                sync(file)
                file.replace(self.paths()[index])
                sync(self.paths()[index].parent)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _write_index(self, folder: Path) -> None:
        """Which key is in which file, as transformers looks it up."""
        from safetensors import safe_open

        places: dict[str, str] = {}
        size = 0
        for path in self.paths():
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    places[key] = path.name
                    size += file.get_tensor(key).nbytes
        metadata = {"total_parameters": self.subject.model.num_parameters(), "total_size": size}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": places})

    def finish(self, recipe: Recipe, measurements: dict[str, Any], history: list[dict[str, Any]]) -> Path | None:
        """Put what belongs to the model beside its weights. Raises LosaError if the disk refuses."""

        def write(staging: Path) -> int:
            self.subject.narrow()
            self.subject.model.save_pretrained(staging, state_dict={})
            self._write_index(staging)
            return sum(path.stat().st_size for path in self.paths())

        return publish(self.subject, recipe, write, self.bits(), measurements, history, self.run)
