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
    mixin: Any = importlib.import_module("transformers.utils.quantization_config").QuantizationConfigMixin
    base: Any = importlib.import_module("transformers.quantizers.base").HfQuantizer

    class Stored(mixin):  # type: ignore[misc]
        """What config.json says of the linears, as it stands there."""

        def __init__(self, quant_method: str, **fields: Any) -> None:
            self.quant_method = quant_method
            self.__dict__.update(fields)

    class Resizer(base):  # type: ignore[misc]
        """Resizes the linears before the weights are read, and is gone after: the model is an ordinary one."""

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            from losa.widths import read_widths, resize

            resize(model, read_widths(self.quantization_config.to_dict()))

        def postprocess_model(self, model: Any, **_: Any) -> None:
            self.remove_quantization_config(model)
            model.config.quantization_config = self.quantization_config.to_dict()  # to be saved again

    class Packer(base):  # type: ignore[misc]
        """Puts packed linears into the model before the weights are read, and looks at what was read."""

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
        ) -> None:
            from losa.sparse import linear

            self.layouts = linear.read_layouts(self.quantization_config.to_dict())
            linear.install(model, self.layouts)
            linear.check_files(checkpoint_files, self.layouts)
            self.expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters()}

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            from losa.sparse import decoding, linear

            linear.settle(model, self.__dict__.pop("expected"))
            linear.finish(model, self.layouts)
            decoding.attach(model)
            return model

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            from losa.sparse import linear

            linear.unpack_model(model, dtype)
            return model

    for method, quantizer in ((STRUCTURED, Resizer), (PACKED, Packer)):
        auto.register_quantization_config(method)(Stored)
        auto.register_quantizer(method)(quantizer)
