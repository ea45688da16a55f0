"""Text from a model, shown as it is made."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from losa import model
from losa.errors import LosaError
from losa.progress import Progress
from losa.recipe import Recipe
from losa.sparse import decoding

# The likeliest token each time, whatever the model's own generation settings ask for.
LIKELIEST = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "temperature": None, "top_k": None, "top_p": None,
}  # fmt: skip
SEEDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # of small models: they soon repeat the likeliest


def generate(
    source: str,
    prompt: str,
    settings: Recipe,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    chat: bool = False,
    stream: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Continue `prompt` by at most `max_new_tokens`; the likeliest ones, or drawn at a `temperature` above 0, seeded.

    settings: seed, device and dtype of it are read. chat: put the prompt into the model's chat template. stream: print
    the text as it is made. Returns it, with the number of tokens and the seconds they took, without loading.
    Raises LosaError for a model that does not load, a text that is too long, and numbers out of range.
    """
    from transformers import TextStreamer

    if max_new_tokens < 1:
        raise LosaError(f"max-new-tokens is {max_new_tokens}: must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise LosaError(f"temperature is {temperature}: must be at least 0")
    config = model.load_config(source)
    tokenizer = model.load_tokenizer(source, config)
    if chat:
        if not tokenizer.chat_template:
            raise LosaError(f"{source!r} has no chat template: leave --chat out")
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length < 1:
        raise LosaError("the prompt is empty: the model needs a token to go on from")
    if length + max_new_tokens > model.longest_text(config):
        raise LosaError(
            f"the prompt has {length} tokens: with {max_new_tokens} more they are beyond the "
            f"{model.longest_text(config)} that the model reads: shorten it, or lower --max-new-tokens"
        )
    with (progress or Progress(quiet=True)).working("loading"):
        loaded = model.load_whole(source, settings)
        model.check_finite(loaded)
    if loaded.device.type == "cpu":
        decoding.attach(loaded)
    drawn = {"do_sample": True, "temperature": temperature}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    began = time.perf_counter()
    ids = continued(
        loaded, tokenizer, inputs, max_new_tokens, settings.seed, streamer, **(drawn if temperature else LIKELIEST)
    )
    seconds = time.perf_counter() - began
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return {"model": source, "prompt": prompt, "text": text, "tokens": len(ids), "seconds": round(seconds, 3)}


def continued(
    loaded: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, seed: int, streamer: Any = None, **choice: Any
) -> Tensor:
    """The new tokens, int64 [at most max_new_tokens], behind `inputs` of one row. choice: how `generate` chooses each."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        ids: Tensor = loaded.generate(
            input_ids=inputs["input_ids"].to(loaded.device),
            attention_mask=inputs["attention_mask"].to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **choice,
        )
    return ids[0, inputs["input_ids"].shape[1] :]
