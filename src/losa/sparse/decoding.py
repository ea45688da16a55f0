"""Decoding in native code: one token of one text through a whole model, without Python or torch between its layers.

`attach` puts a Decoding in the place of a model's `forward`. It takes the calls that `generate` makes for each new token
of one text; all others (prompts, batches, training, whatever it does not know) go to the model's own forward, and so do
all calls of a model that it refuses, which it says in a warning. Keys and values stay in the model's own cache.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from losa.errors import LosaError
from losa.sparse.cache import Store
from losa.sparse.linear import PackedLinear
from losa.sparse.steps import Attention, Table, kernel_of

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FLOATS = (torch.float32, torch.bfloat16)
PRODUCTS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
# of modules and of the configuration, what else steps are made of
ATTRIBUTES = ("variance_epsilon", "head_dim", "scaling", "sliding_window", "rope_type", "attention_scaling", "max_norm")
FREQUENCIES = "inv_freq"  # the rotary embedding's buffer
SETTINGS = ("num_hidden_layers", "sliding_window", "_attn_implementation")
SWITCH = "LOSA_DECODING"  # "ordinary" leaves every model its own forward
TAKEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
log = logging.getLogger("losa.sparse")
_told: set[str] = set()


def attach(whole: Any) -> None:
    """Let a causal language model decode in native code from now on; twice is once."""
    if not isinstance(vars(whole).get("forward"), Decoding) and hasattr(whole, "generate"):
        whole.forward = Decoding(whole)


def refusal(whole: Any) -> str | None:
    """Why a model cannot be decoded in native code; None if it can."""
    try:
        _heads(whole)
        kernel_of(whole)
    except LosaError as error:
        return str(error)
    return None


class Decoding:
    """A model's forward: native for one more token of one text, the model's own for everything else.

    It belongs to one model, holds it weakly, and is copied and pickled with it, without what it has built.
    """

    def __init__(self, whole: Any) -> None:
        self.__setstate__({"whole": whole})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._whole = weakref.ref(state["whole"])
        self._lock = threading.Lock()
        self._seen: _Seen | None = None  # of the model, when it was last looked at
        self._table: Table | None = None
        self._stores: weakref.WeakKeyDictionary[Any, Store] = weakref.WeakKeyDictionary()
        self._turns = torch.empty(2, 0, 0)  # cosines and sines, [2, positions, dim]
        self.tokens = 0  # so many went through native code

    def __getstate__(self) -> dict[str, Any]:
        return {"whole": self._whole()}

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own forward, which tells `inspect` the signature, too."""
        whole: Any = self._whole()
        return MethodType(type(whole).forward, whole)

    def __call__(self, *args: Any, **options: Any) -> Any:
        whole: Any = self._whole()
        if not torch.compiler.is_compiling() and not args:
            with self._lock:
                if (found := self._decoded(whole, options)) is not None:
                    return found
        return type(whole).forward(whole, *args, **options)  # not by __wrapped__, which torch.compile does not trace

    def _decoded(self, whole: Any, options: dict[str, Any]) -> Any:
        """The model's output, or None where the model's own forward must make it."""
        ids, cache = options.get("input_ids"), options.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.shape != (1, 1) or ids.device.type != "cpu" or cache is None:
            return None
        if whole.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if os.environ.get(SWITCH) == "ordinary" or not _plain(whole.config, options):
            return None
        if (table := self._look(whole)) is None:
            return None
        store = self._stores.get(cache)
        if store is None or not store.holds(cache):
            store = Store.of(cache, table.heads, table.dtype)
            if store is None:
                return None
            self._stores[cache] = store
            table.sum_up()
        length, token = store.length, int(ids)
        mask, position = _mask(options.get("attention_mask"), length), _position(options.get("position_ids"), length)
        if mask is False or position is None or not 0 <= token < len(whole.model.embed_tokens.weight):
            return None
        plan = table.plan
        cosines, sines = self._turned(whole, position)
        store.make_room()
        plan.token, plan.slot = token, length
        plan.cosines, plan.sines = cosines.data_ptr(), sines.data_ptr()
        plan.visible = None if mask is None else mask.data_ptr()
        plan.keys, plan.values, plan.scores = store.keys.data_ptr(), store.values.data_ptr(), store.scores.data_ptr()
        plan.layer_size, plan.capacity = store.keys[0].numel(), store.capacity
        logits = table.run().to(table.dtype, copy=True).view(1, 1, -1)
        store.show(cache)
        self.tokens += 1
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _look(self, whole: Any) -> Table | None:
        """The table of the model as it is now: made again if anything of it has changed; None if it is refused."""
        if self._seen is None or not self._seen.still():
            self._table, self._turns = None, torch.empty(2, 0, 0)
            self._stores.clear()
            try:
                heads = _heads(whole)
                kernel_of(whole)
                self._table = Table(whole, heads)
            except LosaError as error:
                _warn(f"{type(whole).__name__} is decoded by its own, slower forward: {error}")
            self._seen = _Seen(whole)  # building has moved its weights
        return self._table

    def _turned(self, whole: Any, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a position, float32 [dim]."""
        if self._turns.shape[1] <= position:
            positions = torch.arange(max(256, 2 * position))[None]
            self._turns = torch.cat(whole.model.rotary_emb(torch.empty(1, dtype=torch.float32), positions))
        return self._turns[0, position], self._turns[1, position]


def _warn(line: str) -> None:
    if line not in _told:
        _told.add(line)
        log.warning(line)


def _plain(config: Any, options: dict[str, Any]) -> bool:
    """Whether logits of the token and the cache are all that is asked for."""
    asked = {name for name, value in options.items() if name not in TAKEN and value is not None and value is not False}
    keep, use, told = options.get("logits_to_keep"), options.get("use_cache"), options.get("return_dict")
    return (
        not asked
        and (keep is None or (type(keep) is int and keep in (0, 1)))
        and (config.use_cache if use is None else use) is True
        and told is not False
        and config.return_dict
        and not config.output_hidden_states
        and not config.output_attentions
    )


def _mask(mask: Any, length: int) -> Tensor | Literal[False] | None:
    """uint8 [length + 1], or None where all is seen; False for what is no such mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (1, length + 1) or mask.is_floating_point():
        return False
    seen = mask[0] != 0
    if bool(seen.all()):
        return None
    return seen.to(torch.uint8) if bool(seen[-1]) else False


def _position(positions: Any, length: int) -> int | None:
    if positions is None:
        return length
    if not isinstance(positions, Tensor) or positions.shape != (1, 1):
        return None
    position = int(positions)
    return position if position >= 0 else None


class _Seen:
    """What a table depends on, at one time: a model's modules, whether they have hooks or other forwards, where weights are.

    What is written into weights needs no look: steps read them where they are.
    """

    def __init__(self, whole: Any) -> None:
        modules = list(whole.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in modules if m._modules]
        self._parts = modules[1:]  # the whole must not keep itself alive
        self._hooks = [hooks for m in self._parts for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._weights = [
            (m._parameters, name, p, p.data_ptr(), p._version)
            for m in modules
            for name, p in m._parameters.items()
            if p is not None and not p.is_inference()
        ]
        self._kinds, self._own = [type(m) for m in self._parts], [vars(m) for m in self._parts]
        self._names = [(own, name) for own in self._own for name in ATTRIBUTES if name in own]
        self._attributes = [own[name] for own, name in self._names]
        self._config, self._settings = whole.config, [getattr(whole.config, name, None) for name in SETTINGS]
        self._turning = [(m._buffers, _floats(m._buffers)) for m in modules if FREQUENCIES in m._buffers]
        self._hooked, self._kernel = any(self._hooks), os.environ.get("LOSA_KERNEL")
        self._replaced = self._forwards()

    def still(self) -> bool:
        """Whether it is so now. Asked for each token: 0.1 ms for 22 blocks."""
        return (
            self._kernel == os.environ.get("LOSA_KERNEL")
            and any(self._hooks) == self._hooked
            and self._forwards() == self._replaced
            and [type(m) for m in self._parts] == self._kinds
            and all(list(now.values()) == then for now, then in self._children)
            and [own.get(name) for own, name in self._names] == self._attributes
            and [getattr(self._config, name, None) for name in SETTINGS] == self._settings
            and all(
                now.get(name) is p and p._version == version and p.data_ptr() == place
                for now, name, p, place, version in self._weights
            )
            and all(_floats(now) == then for now, then in self._turning)  # angles are computed once
        )

    def _forwards(self) -> bool:
        """Whether a module of the model has a forward that is not its class's."""
        return any(["forward" in own for own in self._own])


def _floats(buffers: dict[str, Tensor | None]) -> list[float] | None:
    tensor = buffers.get(FREQUENCIES)
    return None if tensor is None or tensor.device.type != "cpu" else tensor.tolist()


def _heads(whole: Any) -> list[Attention]:
    """The heads of each block of a model that can be decoded. Raises LosaError, with the first reason why one cannot."""
    kind = type(whole)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        raise LosaError(f"{kind.__name__} is none of {', '.join(KNOWN)}")
    if any(p.is_inference() or p.device.type != "cpu" for p in whole.parameters()):
        raise LosaError("its weights are not on the CPU, or were made in inference mode")
    if whole.dtype not in FLOATS:
        raise LosaError(f"it computes in {whole.dtype}, not in float32 or bfloat16")
    config, base = whole.config, whole.model
    _known(whole)
    if (rope := base.rotary_emb.rope_type) in ("dynamic", "longrope"):
        raise LosaError(f"its rotary embedding {rope!r} changes with the length of the text")
    if config._attn_implementation not in ("eager", "sdpa"):
        raise LosaError(f"its attention is {config._attn_implementation!r}, not eager or sdpa")
    width = base.embed_tokens.weight.shape[1]
    _readable("model.embed_tokens.weight", base.embed_tokens.weight)
    _wide("model.norm", base.norm, width)
    _wide("lm_head", whole.lm_head, None, width)
    found = []
    for index, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        window = getattr(attention, "sliding_window", None)
        if kind.__name__ == "MistralForCausalLM":
            window = config.sliding_window
        dim = attention.head_dim
        heads, kv_heads = _rows(attention.q_proj) // dim, _rows(attention.k_proj) // dim
        if dim % 2 or not kv_heads or heads % kv_heads or window == 1:
            raise LosaError(f"block {index} has {heads} heads for {kv_heads} of {dim}, and a window of {window}")
        middle = _rows(mlp.gate_proj)
        for name in ("input_layernorm", "post_attention_layernorm"):
            _wide(f"{name} of block {index}", getattr(layer, name), width)
        sizes = [(heads * dim, width), (kv_heads * dim, width), (kv_heads * dim, width), (width, heads * dim)]
        sizes += [(middle, width), (middle, width), (width, middle)]
        names = [(part, name) for part, several in PRODUCTS.items() for name in several]
        for (part, name), (rows, columns) in zip(names, sizes, strict=True):
            _wide(f"{name} of block {index}", getattr(getattr(layer, part), name), rows, columns)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            _wide(f"q_norm of block {index}", q, dim)
            _wide(f"k_norm of block {index}", k, dim)
            if q.variance_epsilon != k.variance_epsilon or q.weight.dtype != k.weight.dtype:
                raise LosaError(f"q_norm and k_norm of block {index} differ in epsilon or type")
        found.append(Attention(heads, kv_heads, dim, window or 0))
    return found


def _known(whole: Any) -> None:
    """Raise LosaError unless every module computes what steps compute in its place."""
    family = type(whole).__name__.removesuffix("ForCausalLM")
    base = whole.model

    def own(where: str, module: Any, part: str) -> None:
        if type(module).__name__ != family + part or type(module).__module__ != type(whole).__module__:
            raise LosaError(f"{where} is a {type(module).__name__}, not transformers' {family}{part}")

    for name, module in whole.named_modules():
        if module is whole:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            raise LosaError(f"{name} has hooks")
        if "forward" in vars(module):
            raise LosaError(f"{name} has been given another forward")
    own("model", base, "Model")
    own("model.rotary_emb", base.rotary_emb, "RotaryEmbedding")
    own("model.norm", base.norm, "RMSNorm")
    if type(base.embed_tokens) is not nn.Embedding:
        raise LosaError(f"its embedding is a {type(base.embed_tokens).__name__}")
    if base.embed_tokens.max_norm is not None:
        raise LosaError("its embedding has a max_norm")
    if len(base.layers) != whole.config.num_hidden_layers:
        raise LosaError(f"it has {len(base.layers)} blocks, its configuration says {whole.config.num_hidden_layers}")
    for index, layer in enumerate(base.layers):
        own(f"block {index}", layer, "DecoderLayer")
        own(f"self_attn of block {index}", layer.self_attn, "Attention")
        own(f"mlp of block {index}", layer.mlp, "MLP")
        for name in ("input_layernorm", "post_attention_layernorm"):
            own(f"{name} of block {index}", getattr(layer, name), "RMSNorm")
        for name in ("q_norm", "k_norm"):
            if hasattr(layer.self_attn, name):
                own(f"{name} of block {index}", getattr(layer.self_attn, name), "RMSNorm")
        for part, names in PRODUCTS.items():
            for name in names:
                linear = getattr(getattr(layer, part), name)
                if type(linear) not in (nn.Linear, PackedLinear):
                    raise LosaError(f"{name} of block {index} is a {type(linear).__name__}")
        if type(act := layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):  # torch's or transformers'
            raise LosaError(f"block {index} has {type(act).__name__} between its products, not SiLU")
    if type(whole.lm_head) not in (nn.Linear, PackedLinear):
        raise LosaError(f"its head is a {type(whole.lm_head).__name__}")


def _rows(linear: Any) -> int:
    rows: int = linear.out_features if isinstance(linear, PackedLinear) else linear.weight.shape[0]
    return rows


def _wide(where: str, module: Any, rows: int | None, columns: int | None = None) -> None:
    """Raise LosaError unless a linear, or a norm (no columns), is of those sizes and has weights that steps can read."""
    if isinstance(module, PackedLinear):
        found = [module.out_features, module.in_features]
    else:
        found = list(module.weight.shape)
        _readable(f"the weight of {where}", module.weight, moved=isinstance(module, nn.Linear))
    rows = found[0] if rows is None else rows
    wanted = [rows] if columns is None else [rows, columns]
    if found != wanted:
        raise LosaError(f"{where} is {found}, not {wanted}")
    if (bias := getattr(module, "bias", None)) is not None:
        _readable(f"the bias of {where}", bias)
        if list(bias.shape) != [rows]:
            raise LosaError(f"the bias of {where} is {list(bias.shape)}, not {[rows]}")


def _readable(where: str, parameter: Tensor, moved: bool = False) -> None:
    """Raise LosaError for what steps cannot read where it is. moved: it will be copied into pages."""
    if parameter.dtype not in FLOATS:
        raise LosaError(f"{where} is of {parameter.dtype}")
    if not moved and not parameter.is_contiguous():
        raise LosaError(f"{where} is not contiguous")
