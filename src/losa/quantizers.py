"""transformers' quantizers of what losa stores in a form of its own: structurally smaller models, and packed ones.

At the top of a module, so that a loaded model, which keeps them, can be pickled. `losa.loading` registers them.
"""

from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Stored(QuantizationConfigMixin):
    """What config.json says of the linears, as it stands there."""

    def __init__(self, quant_method: str, **fields: Any) -> None:
        self.__dict__.update(fields, quant_method=quant_method)


class Resizer(HfQuantizer):
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


class Packer(HfQuantizer):
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

        linear.fix_types(model, self.__dict__.pop("expected"))
        linear.finish(model, self.layouts)
        decoding.attach(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from losa.sparse import linear

        linear.unpack_model(model, dtype)
        return model
