"""What `recover` is told: the recipe of a model that is pruned already, without the settings of pruning."""

import dataclasses
from typing import Any, ClassVar

from losa import registry
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recipe_checks import check_format

# what means nothing to a model that is pruned already
PRUNING = (
    *("sparsity", "pattern", "undivided", "pruner", "pruner_options", "true_sequential"),
    *("allocator", "allocator_options", "rates_per", "schedule", "steps", "rank_growth", "finetune_first"),
    *("calibration", "calibration_samples", "sequence_length", "allocation_samples", "error_tokens", "last_step_share"),
    *("reconstruct", "reconstruct_rate"),
)


class Repair(Recipe):
    """How a model that is pruned already is repaired: a recipe without the settings of pruning, in one step.

    `sparsity` is that of the masks once they are known (`found`)."""

    prunes: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        known = {f.name for f in dataclasses.fields(Recipe)}
        for name in settings:
            if name in PRUNING:
                raise LosaError(f"{name} means nothing to recover, which takes the masks as they are: leave it out")
            if name not in known:
                raise registry.unknown("setting", name, known - set(PRUNING))
        super().__init__(**{"rank_by": "uniform"} | settings, steps=1)
        recovery = registry.get("recovery", self.recovery)
        if not recovery.merges:
            raise LosaError(f"recovery {self.recovery!r} does not merge, and recover merges: use losa or sparse-lora")
        if not recovery.trains:
            raise LosaError(f"recovery {self.recovery!r} trains nothing: recover needs one that does, such as losa")
        without = "the dense model, which recover does not have"
        if self.rank_by == "error":
            raise LosaError(f"rank_by error compares with {without}: use uniform or sparsity")
        if self.distill and not self.teacher_model:
            raise LosaError(f"distill asks {without}: name it as teacher_model")

    def found(self, sparsity: float) -> Recipe:
        """The same, of masks that prune so much. Raises LosaError if they are too few for the format."""
        made = self.at(sparsity=sparsity)
        check_format(made)
        return made

    @classmethod
    def part_of(cls, shipped: dict[str, Any]) -> dict[str, Any]:
        """Those that need neither pruning nor the dense model."""
        without = {*PRUNING, "distill", *(["rank_by"] if shipped.get("rank_by") == "error" else [])}
        return {name: value for name, value in shipped.items() if name not in without}

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_json().items() if name not in PRUNING}
