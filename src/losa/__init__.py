"""losa makes large language models sparse without making them stupid."""

from typing import TYPE_CHECKING, Any

from losa import loading
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.repair_recipe import Repair

if TYPE_CHECKING:
    from losa.attached import Adapters, attach, merge
    from losa.evaluate import perplexity
    from losa.pipeline import compress
    from losa.repair import recover
    from losa.starting import Result
    from losa.tasks.harness import zero_shot

__version__ = "0.1.0"
__all__ = [
    "Adapters",
    "LosaError",
    "Recipe",
    "Repair",
    "Result",
    "attach",
    "compress",
    "merge",
    "perplexity",
    "recover",
    "zero_shot",
]

_LAZY = {  # they import torch
    "Adapters": "losa.attached",
    "Result": "losa.starting",
    "attach": "losa.attached",
    "compress": "losa.pipeline",
    "merge": "losa.attached",
    "perplexity": "losa.evaluate",
    "recover": "losa.repair",
    "zero_shot": "losa.tasks.harness",
}

loading.after_import("transformers.quantizers.auto", loading.register)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'losa' has no attribute {name!r}")
