"""How many tokens a second a model decodes, alone or in turns with another: `losa bench decode`."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from losa import bench, model
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.run import may_be_same, read_made, write_json
from losa.sparse import decoding

T = TypeVar("T")
PROMPT = 16  # tokens read at once, before those that are timed


def decode(
    source: str,
    settings: Recipe,
    against: str = "",
    tokens: int = 32,
    rounds: int = 5,
    threads: int = 0,
    save: bool = False,
) -> dict[str, Any]:
    """Decode `tokens` one by one behind a random prompt, one text at a time, `rounds` times; the first round is thrown away.

    settings: device and dtype of it are read. against: another model, which decodes in turns with this one, so that their
    ratio is of neighbours in time. threads: 0 for torch's. save: put what was found beside the measurements in the folder's
    losa.json, where `losa report` shows it: of the model, and of the other one if the folder's was made from it.
    Raises LosaError for a model that does not load, numbers out of range, and a folder that has no place to save it.
    """
    if tokens < 1 or rounds < 2 or threads < 0:
        raise LosaError("tokens must be at least 1, rounds at least 2, threads at least 0")
    sources = [source, *([against] if against else [])]
    place = _place(source, against) if save else None
    for name in sources:
        if (room := model.longest_text(model.load_config(name))) < PROMPT + tokens:
            raise LosaError(
                f"{name!r} reads at most {room:g} tokens: --tokens can be {max(room - PROMPT, 0):g} at most"
            )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        models = [_load(name, settings) for name in sources]
        takes = [partial(one_by_one, whole, prompt_for(whole, PROMPT), tokens) for whole in models]
        seconds = in_turns(dict(enumerate(takes)), rounds)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    speeds = [tokens / statistics.median(each) for each in seconds.values()]
    found: dict[str, Any] = {"tokens_per_second": round(speeds[0], 2), "runtime": _runtime(models[0])}
    if against:
        low, middle, high = ratios_of(seconds[1], seconds[0])
        found |= {
            "against": {"model": against, "tokens_per_second": round(speeds[1], 2), "runtime": _runtime(models[1])},
            "speedup": round(middle, 3),
            "speedup_quartiles": [round(low, 3), round(high, 3)],
        }
    if place is not None:
        _save(place, found)
    where = str(models[0].device) if models[0].device.type != "cpu" else bench.processor()
    return found | {"tokens": tokens, "rounds": rounds, "threads": used, "device": where}


def one_by_one(whole: Any, prompt: Tensor, tokens: int) -> float:
    """Seconds that so many tokens take behind a prompt, int64 [1, length], the likeliest each time."""
    out = whole(input_ids=prompt, use_cache=True)
    began = now(prompt.device)
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = whole(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return now(prompt.device) - began


def now(device: torch.device) -> float:
    """Seconds; of the processor where it computes with one thread, which others on the machine then do not lengthen."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.process_time() if alone(device) else time.perf_counter()


def alone(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def prompt_for(whole: Any, length: int) -> Tensor:
    """int64 [1, length], random tokens of its vocabulary."""
    vocabulary = whole.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(whole.device)


def _load(source: str, settings: Recipe) -> Any:
    loaded = model.load_whole(source, settings)
    model.check_finite(loaded)
    if loaded.device.type == "cpu":
        decoding.attach(loaded)
    return loaded


@torch.no_grad()
def in_turns(takes: Mapping[T, Callable[[], float]], rounds: int, before: int = 1) -> dict[T, list[float]]:
    """What each says it took, in every round; who begins changes from round to round. So many `before` are thrown away."""
    seconds: dict[T, list[float]] = {who: [] for who in takes}
    order = list(takes)
    for turn in range(-before, rounds):
        for who in order:
            took = takes[who]()
            if turn >= 0:
                seconds[who].append(took)
        order = order[1:] + order[:1]
    return seconds


def ratios_of(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """The quartiles of the ratios of neighbours in time, the median between them."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(above, below, strict=True)], n=4, method="inclusive"
    )
    return low, middle, high


def _runtime(whole: Any) -> str:
    """What decoded it, and why that if it was not the native runtime."""
    if whole.device.type != "cpu":
        return "the model's own forward"
    if (why := decoding.refusal(whole)) is not None:
        return f"the model's own forward: {why}"
    return "native" if vars(whole)["forward"].tokens else f"the model's own forward: {decoding.SWITCH} asks for it"


def _place(source: str, against: str) -> Path:
    """The losa.json that takes what is measured."""
    place = Path(source) / "losa.json"
    if not place.is_file():
        raise LosaError(f"--save needs a folder that losa compress or recover has made: {str(place)!r} is not there")
    made = read_made(place)
    if against and not may_be_same(made["source"], against):
        raise LosaError(f"--save with --against {against!r}: {source!r} was made from {made['source']!r}, name that")
    return place


def _save(place: Path, found: dict[str, Any]) -> None:
    made = json.loads(place.read_text())
    made["measurements"]["sparse"]["tokens_per_second"] = found["tokens_per_second"]
    came = "dense" if "dense" in made["measurements"] else "before"  # what losa recover calls it
    if "against" in found and came in made["measurements"]:
        made["measurements"][came]["tokens_per_second"] = found["against"]["tokens_per_second"]
    write_json(place, made)
