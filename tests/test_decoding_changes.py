"""Decoding in native code of a model that changes: followed, or left to the model's own forward."""

import copy
import gc
import re
import weakref
from typing import Any

import pytest
import torch
import transformers
from conftest import GATED
from test_decoding import PROMPT, TEXT, error, made, small_rooms_of_nan, stepped, wanted  # noqa: F401  (for all tests)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from losa.sparse.linear import unpack_model


@torch.no_grad()
def test_follows_what_becomes_of_the_model() -> None:
    whole = made("qwen2", "int8")
    before = stepped(whole)
    near = 1e-4 if whole.forward._table.kernel.summed else 2e-6  # where activations are 16-bit fixed point

    def follows() -> None:
        nonlocal before
        tokens, found = whole.forward.tokens, stepped(whole)
        assert whole.forward.tokens > tokens
        assert error(found, wanted(whole)) < near < 1e-3 < error(found, before)
        before = found

    whole.model.norm.weight.mul_(1.5)
    follows()
    whole.model.layers[1].self_attn.q_proj.bias.add_(0.5)
    follows()
    whole.model.layers[0].mlp.up_proj.weight_scales.data.mul_(2)
    whole.model.layers[0].mlp.up_proj = whole.model.layers[0].mlp.up_proj.dense()
    follows()
    whole.lm_head.weight = nn.Parameter(whole.lm_head.weight * 0.5, requires_grad=False)
    follows()
    whole.model.layers[2].mlp, whole.model.layers[1].mlp = whole.model.layers[1].mlp, whole.model.layers[2].mlp
    follows()
    handle = whole.model.layers[0].register_forward_hook(lambda _, __, output: output * 1.1)
    tokens = whole.forward.tokens
    assert error(stepped(whole), before) > 1e-3 and whole.forward.tokens == tokens
    handle.remove()
    assert torch.equal(stepped(whole), before)
    unpack_model(whole)
    assert error(stepped(whole), before) < near and whole.forward.tokens > tokens


def test_does_not_keep_its_model_alive() -> None:
    whole = made()
    stepped(whole)
    weights = weakref.ref(whole.lm_head.weight)
    gc.disable()
    try:
        del whole
        assert weights() is None
    finally:
        gc.enable()


def uneven() -> Any:
    config = transformers.Qwen2Config(**GATED | {"hidden_size": 40, "intermediate_size": 77})
    whole = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in whole.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_follows_what_is_written_past_autograd(dtype: torch.dtype) -> None:
    """`.data` counts no version: there must be no copies of weights."""
    for whole in (made(uneven(), dtype=dtype), made("qwen3", dtype=dtype)):
        before = stepped(whole)
        for name, parameter in whole.named_parameters():
            if "layers.0" in name or "layers" not in name:
                parameter.data += 0.5 * torch.randn_like(parameter)
                tokens, found = whole.forward.tokens, stepped(whole)
                assert whole.forward.tokens > tokens
                assert torch.equal(found, stepped(copy.deepcopy(whole))) and not torch.equal(found, before), name
                before = found
        assert error(before, wanted(whole)) < (2e-6 if dtype == torch.float32 else 0.05)


@torch.no_grad()
def test_follows_the_rotary_embedding() -> None:
    whole = made()
    before = stepped(whole)
    rotary = whole.model.rotary_emb
    rotary.inv_freq.mul_(0.5)
    for change in (
        lambda: None,
        lambda: rotary.inv_freq.data.mul_(3),
        lambda: setattr(rotary, "attention_scaling", 1.5),
        lambda: setattr(rotary, "inv_freq", rotary.inv_freq * 0.1),
        lambda: setattr(
            whole.model,
            "rotary_emb",
            type(rotary)(
                transformers.LlamaConfig(**GATED, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
            ),
        ),
    ):
        change()
        tokens, found = whole.forward.tokens, stepped(whole)
        assert whole.forward.tokens > tokens
        assert error(found, wanted(whole)) < 2e-6 < error(found, before)
        before = found


@torch.no_grad()
def test_follows_numbers_of_modules() -> None:
    whole = made("qwen3")
    before = stepped(whole)
    layer = whole.model.layers[1]
    for module, name, value in (
        (layer.input_layernorm, "variance_epsilon", 0.1),
        (layer.self_attn, "scaling", 0.7),
    ):
        setattr(module, name, value)
        tokens, found = whole.forward.tokens, stepped(whole)
        assert whole.forward.tokens > tokens
        assert error(found, wanted(whole)) < 2e-6 < error(found, before)
        before = found
    layer.self_attn.q_norm.variance_epsilon = layer.self_attn.k_norm.variance_epsilon = 0.3
    found = stepped(whole)
    assert error(found, wanted(whole)) < 2e-6 < error(found, before)


@torch.no_grad()
def test_a_text_goes_on_in_another_type() -> None:
    """The cache is of the old one then: it is the model's own forward's."""
    whole = made()
    past = DynamicCache(config=whole.config)
    whole(input_ids=TEXT[:, :PROMPT], past_key_values=past)
    whole(input_ids=TEXT[:, PROMPT : PROMPT + 1], past_key_values=past)
    assert whole.forward.tokens == 1
    whole.bfloat16()
    with pytest.raises(RuntimeError):
        whole(input_ids=TEXT[:, PROMPT + 1 : PROMPT + 2], past_key_values=past)


class Doubling(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class OtherNorm(nn.Module):
    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def other_forward(whole: Any) -> None:
    mlp = whole.model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def other_norm(whole: Any) -> None:
    whole.model.layers[1].input_layernorm = OtherNorm(whole.model.layers[1].input_layernorm)


def other_attention(whole: Any) -> None:
    attention = whole.model.layers[0].self_attn
    attention.__class__ = type(
        "Other", (type(attention),), {"forward": lambda self, hidden_states, **_: (hidden_states, None)}
    )


def other_embedding(whole: Any) -> None:
    found = Doubling(*whole.model.embed_tokens.weight.shape)
    found.weight = whole.model.embed_tokens.weight
    whole.model.embed_tokens = found


def bounded_embedding(whole: Any) -> None:
    whole.model.embed_tokens.max_norm = 0.5


def narrow_norm(whole: Any) -> None:
    whole.model.norm.weight = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)


def fewer_blocks(whole: Any) -> None:
    whole.config.num_hidden_layers = 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_forward, "model.layers.1.mlp has been given another forward"),
        (other_norm, "input_layernorm of block 1 is a OtherNorm, not transformers' LlamaRMSNorm"),
        (other_attention, "self_attn of block 0 is a Other, not transformers' LlamaAttention"),
        (other_embedding, "its embedding is a Doubling"),
        (bounded_embedding, "its embedding has a max_norm"),
        (narrow_norm, r"model.norm is \[1\], not \[32\]"),
        (fewer_blocks, "it has 3 blocks, its configuration says 2"),
    ],
)
@torch.no_grad()
def test_what_computes_something_else_is_refused(change: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Before a text and in the midst of one."""
    whole = made()
    past = DynamicCache(config=whole.config)
    steps = [TEXT[:, :PROMPT], *TEXT[:, PROMPT : PROMPT + 4].split(1, dim=1)]
    for ids in steps[:3]:
        whole(input_ids=ids, past_key_values=past, use_cache=True)
    assert whole.forward.tokens == 2
    change(whole)
    own = copy.deepcopy(past)
    for ids in steps[3:]:
        found = whole(input_ids=ids, past_key_values=past, use_cache=True).logits
        exact = type(whole).forward(whole, input_ids=ids, past_key_values=own, use_cache=True).logits
        assert torch.equal(found, exact)
    assert whole.forward.tokens == 2
    assert re.search(f"LlamaForCausalLM is decoded by its own, slower forward: {why}", caplog.text)
