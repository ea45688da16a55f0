"""What transformers must know to load what losa saves in a form of its own; told once transformers is there.

`import losa` may neither import transformers (seconds) nor come too late, whichever is imported first. So the module
that holds transformers' table of storage methods is waited for.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Of models whose linears differ from what their config.json says, in shape or in storage; transformers prints this name,
# and little else, where losa has not been imported.
STRUCTURED = "losa-structured (import losa first)"
PACKED = "losa-packed (import losa first)"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets `name` be found and run by others, once, and then calls `call`."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.call()

            setattr(spec.loader, "exec_module", run_and_call)  # noqa: B010  (mypy knows it as a method)
        return spec


def after_import(name: str, call: Callable[[], None]) -> None:
    """Call `call` once the module `name` has been imported: now, or when it is."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _AfterImport(name, call))


def register() -> None:
    """Tell transformers of the structurally smaller models (`losa.shrink`) and of the packed ones (`losa.sparse`)."""
    auto: Any = importlib.import_module("transformers.quantizers.auto")
    if STRUCTURED in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:  # losa was reloaded
        return
    from losa.quantizers import Packer, Resizer, Stored

    for method, quantizer in ((STRUCTURED, Resizer), (PACKED, Packer)):
        auto.register_quantization_config(method)(Stored)
        auto.register_quantizer(method)(quantizer)
