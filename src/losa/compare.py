"""What a sparse model writes beside its dense one, from the same prompts."""

import math
from collections import Counter
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa import generation, sources
from losa import model as models
from losa.errors import LosaError


def read_prompts(path: str, tokenizer: Any, longest: float, new_tokens: int) -> list[str]:
    """The prompts in a file: every line of a .txt that is not blank; of rows, the prompt, or the text of those without one.

    Raises LosaError if there is none, or one leaves no room for `new_tokens` within the `longest` text a model reads.
    """
    if sources.place_of(path) != "file":
        raise LosaError(f"--prompts {path}: name a file ({', '.join(sources.SUFFIXES)})")
    rows = sources.load_rows(path, "evaluate", tokenizer)
    if Path(path).suffix == ".txt":
        prompts = [line for row in rows for line in row.answer.splitlines() if line.strip()]
    else:
        prompts = [text for row in rows if (text := row.prompt or row.answer).strip()]
    if not prompts:
        raise LosaError(f"--prompts {path}: there is no prompt in it")
    for number, prompt in enumerate(prompts, 1):
        if (length := len(tokenizer(prompt)["input_ids"])) + new_tokens > longest:
            raise LosaError(
                f"--prompts {path}: prompt {number} has {length} tokens, and the model reads at most {longest}: "
                f"shorten it, or lower --max-new-tokens ({new_tokens})"
            )
    return prompts


def check_tokenizers(source: str, tokenizer: Any, against: str) -> None:
    """Raise LosaError unless the model `against` reads the same tokens as `source`, whose `tokenizer` this is."""
    other = models.load_tokenizer(against, models.load_config(against))
    if other.get_vocab() != tokenizer.get_vocab():
        raise LosaError(f"{source!r} and {against!r} have different vocabularies: compare models of one tokenizer")


@torch.no_grad()
def compare(sparse: Any, dense: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> dict[str, Any]:
    """Both models write on greedily from each prompt, `new_tokens` at most.

    Returns, of each prompt in "prompts" and of all together: "agreement", the share of the tokens of the dense model's
    text that the sparse model holds likeliest, too, after the same beginning; "perplexity" of either text under the dense
    model; and of each the texts "dense" and "sparse", and "same", the number of tokens with which both begin.
    """
    found = []
    agreeing, tokens, losses = 0, Counter[str](), Counter[str]()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        both = {"dense": dense, "sparse": sparse}
        texts = {name: _continued(model, tokenizer, ids, new_tokens) for name, model in both.items()}
        written = {name: text[start:].tolist() for name, text in texts.items()}
        alike = int((_logits(sparse, texts["dense"], start).argmax(-1) == texts["dense"][start:]).sum())
        loss = {
            name: F.cross_entropy(_logits(dense, text, start), text[start:], reduction="sum").item()
            for name, text in texts.items()
        }
        line = {"prompt": prompt, "same": len(commonprefix([*written.values()]))}
        line |= {name: tokenizer.decode(text, skip_special_tokens=True) for name, text in written.items()}
        line["agreement"] = alike / len(written["dense"])
        line["perplexity"] = {name: math.exp(loss[name] / len(text)) for name, text in written.items()}
        found.append(line)
        agreeing += alike
        tokens.update({name: len(text) for name, text in written.items()})
        losses.update(loss)
    return {
        "prompts": found,
        "agreement": agreeing / tokens["dense"],
        "perplexity": {name: math.exp(losses[name] / tokens[name]) for name in tokens},
    }


def _continued(model: Any, tokenizer: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """The prompt (int64 [1, tokens]) and what the model holds likeliest after it, one token at least: int64 [tokens], on the CPU."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    written = generation.continued(model, tokenizer, inputs, new_tokens, 0, **generation.LIKELIEST)
    return torch.cat([ids[0], written.cpu()])


def _logits(model: Any, text: Tensor, start: int) -> Tensor:
    """What the model makes of each token of `text` from `start` on, given those before it: fp32 [tokens, vocabulary], CPU."""
    logits: Tensor = model(input_ids=text[None].to(model.device), use_cache=False).logits
    return logits[0, start - 1 : -1].float().cpu()
