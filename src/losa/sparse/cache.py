"""Keys and values of one text where native code adds to them, seen by transformers as an ordinary cache."""

from typing import Any

import torch
from torch import Tensor

from losa.sparse.steps import Attention

ROOM = 256  # tokens that there is room for at first, beyond those of the prompt; doubled whenever it is used up


class Store:
    """Keys and values, [layers, 1, kv heads, capacity, dim] of the model's type; a layer's tensors in the cache are views.

    A place is the same token in every layer. What a sliding layer no longer shows stays here, and is not looked at.
    """

    def __init__(self, heads: list[Attention], dtype: torch.dtype, length: int) -> None:
        self.heads, self.length, self.capacity = heads, length, length + ROOM
        self.keys, self.values = self._room(dtype), self._room(dtype)
        self._shown: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, cache: Any, heads: list[Attention], dtype: torch.dtype) -> "Store | None":
        """What is in a cache, copied; None if it is not one of transformers' dynamic caches, with one text in it."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        if type(cache) is not DynamicCache or len(cache.layers) != len(heads):
            return None
        length, layers = cache.get_seq_length(), list[Any](cache.layers)
        for layer, h in zip(layers, heads, strict=True):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length() != length:
                return None
            if not length or layer.keys.dtype != dtype or layer.keys.device.type != "cpu":
                return None
            kept = length
            if type(layer) is DynamicSlidingWindowLayer:
                if layer.sliding_window != h.window or getattr(
                    layer, "record_past", False
                ):  # which old transformers lack
                    return None
                kept = min(length, h.window - 1)
            if layer.keys.shape != (1, h.kv_heads, kept, h.dim) or layer.values.shape != layer.keys.shape:
                return None
        made = cls(heads, dtype, length)
        for i, layer in enumerate(layers):
            kv_heads, kept = layer.keys.shape[1:3]
            made.keys[i, :, :kv_heads, length - kept : length] = layer.keys
            made.values[i, :, :kv_heads, length - kept : length] = layer.values
        return made

    def holds(self, cache: Any) -> bool:
        """Whether the cache still shows what it was last given."""
        return len(self._shown) == len(cache.layers) and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(cache.layers, self._shown, strict=True)
        )

    def make_room(self) -> None:
        """For one more token."""
        if self.length == self.capacity:
            old = self.keys, self.values
            self.capacity *= 2
            self.keys, self.values = (self._room(tensor.dtype) for tensor in old)
            for new, tensor in zip((self.keys, self.values), old, strict=True):
                new[:, :, :, : self.length] = tensor

    def show(self, cache: Any) -> None:
        """Let the cache show one token more, which native code has put into its place."""
        self.length += 1
        keys = self.keys[:, :, :, : self.length].unbind(0)
        values = self.values[:, :, :, : self.length].unbind(0)
        most = self.keys.shape[2]
        self._shown = []
        for layer, h, key, value in zip(cache.layers, self.heads, keys, values, strict=True):
            if layer.is_sliding:
                layer.cumulative_length += 1
                begin = max(0, self.length - h.window + 1)
                key, value = key[:, :, begin:], value[:, :, begin:]
            if h.kv_heads < most:
                key, value = key[:, : h.kv_heads], value[:, : h.kv_heads]
            layer.keys, layer.values = key, value
            self._shown.append((key, value))

    def _room(self, dtype: torch.dtype) -> Tensor:
        kv_heads, dim = max(h.kv_heads for h in self.heads), self.heads[0].dim
        self.scores = torch.empty(max(h.heads for h in self.heads), self.capacity)
        return torch.empty(len(self.heads), 1, kv_heads, self.capacity, dim, dtype=dtype)
