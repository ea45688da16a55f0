"""Rows as sources give them, and tokens that can be read: a tokenizer of bytes, one token a character of ASCII text."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"

INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}
WITHOUT_INPUT = {"instruction": "Greet.", "input": "", "output": "Hello"}
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response"
    " that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet.\n\n### Response:\n"
)

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


def make_tokenizer(
    bos: bool = False, merges: tuple[tuple[str, str], ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    names = {"bos_token": BOS, "eos_token": EOS} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids))
