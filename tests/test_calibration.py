"""Streaming block by block gives what one pass through the whole model gives."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, MODELS, tiny
from torch import Tensor

from losa import calibration, experts
from losa.blocks import Block, find_blocks
from losa.calibration import Stream
from losa.errors import LosaError

TOKENS = torch.randint(1, 2048, (7, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 60)  # three sequences a batch: two batches of 3 and one of 1


def whole(model: Any, blocks: list[Block]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every block puts out and every linear is given, in one pass over all tokens."""
    outputs, inputs = {}, {}
    for block in blocks:
        block.module.register_forward_hook(
            lambda _m, _i, out, name=block.name: outputs.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        for name, linear in block.linears.items():
            linear.register_forward_pre_hook(lambda _m, i, name=name: inputs.__setitem__(name, i[0]))
    with torch.no_grad():
        model(input_ids=TOKENS)
    return outputs, inputs


class Inputs:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.sequences = 0

    def update(self, x: Tensor, sequences: int) -> None:
        self.seen.append(x.clone())
        self.sequences += sequences


@pytest.mark.parametrize("kind", MODELS | ARCHITECTURES)
def test_features_and_inputs_equal_those_of_the_whole_model(kind: str) -> None:
    """Attention masks and rotary embeddings that differ by block (sliding windows) are each block's own."""
    model, copy = tiny(kind), tiny(kind)
    experts.split(model)
    experts.split(copy)
    blocks = find_blocks(model)
    expected, given = whole(copy, find_blocks(copy))
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    for block in blocks:
        statistics: dict[str, Any] = {name: Inputs() for name in block.linears}
        stream.observe(block, statistics)
        for name in block.linears:
            x = given[name].reshape(-1, given[name].shape[-1])
            torch.testing.assert_close(torch.cat(statistics[name].seen), x, rtol=1e-4, atol=1e-5)
            assert statistics[name].sequences == 7 or ".experts." in name
        stream.advance(block)
        torch.testing.assert_close(torch.cat(stream.hiddens), expected[block.name], rtol=1e-4, atol=1e-5)


def test_blocks_that_are_given_the_text_itself_are_refused() -> None:
    """As some models hand each token's embedding to every block: what the first batch's blocks got is not the others'."""
    blocks = find_blocks(model := tiny())
    embed = model.model.embed_tokens
    seen: list[Tensor] = []
    embed.register_forward_hook(lambda _m, _i, out: seen.append(out))

    def given(_module: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return rest, named | {"per_layer_input": seen[-1][..., :4]}

    blocks[1].module.register_forward_pre_hook(given, with_kwargs=True)
    Stream(model, blocks, TOKENS[:3], torch.device("cpu"))  # one batch has its own
    with pytest.raises(LosaError, match=r"^model\.layers\.1 is given more of the text than hidden states: it is not"):
        Stream(model, blocks, TOKENS, torch.device("cpu"))


def test_linears_with_the_same_input_share_a_statistic() -> None:
    blocks = find_blocks(model := tiny())
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    statistics: dict[str, Any] = {name: Inputs() for name in blocks[0].linears}
    stream.observe(blocks[0], statistics)
    distinct = {id(statistic) for statistic in statistics.values()}
    assert len(distinct) == 4  # q k v; o; gate up; down
    attention = "model.layers.0.self_attn."
    assert statistics[attention + "q_proj"] is statistics[attention + "v_proj"]


def test_only_one_set_of_features_is_held() -> None:
    blocks = find_blocks(model := tiny())
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    one = sum(hidden.numel() for hidden in stream.hiddens)
    shape = stream.hiddens[0].shape[1:]
    for block in blocks:
        stream.advance(block)
        gc.collect()
        live = sum(t.numel() for t in gc.get_objects() if type(t) is Tensor and t.ndim == 3 and t.shape[1:] == shape)
        assert live == one


def test_samples_are_the_features_at_their_positions() -> None:
    blocks = find_blocks(model := tiny())
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    stream.advance(blocks[0])
    positions = torch.tensor([0, 19, 20, 59, 60, 119, 120, 139])
    everything = stream.sample(None)
    assert everything.shape == (140, 32)
    assert torch.equal(stream.sample(positions), everything[positions])


def test_gram_is_that_of_the_centred_features() -> None:
    blocks = find_blocks(model := tiny())
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    stream.advance(blocks[0])
    for n in (5, 7):
        x = torch.cat(stream.hiddens)[:n].flatten(1).double()
        x = x - x.mean(dim=0)
        torch.testing.assert_close(stream.gram(n), x @ x.T, rtol=1e-5, atol=1e-4)


def test_a_block_can_compute_away_from_home() -> None:
    """Blocks visit the device one at a time and go back: every weight is where it was, features stay at home."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator on this machine")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    blocks = find_blocks(model := tiny())
    copy = tiny()
    expected, _ = whole(copy, find_blocks(copy))
    stream = Stream(model, blocks, TOKENS, device)
    for block in blocks:
        stream.advance(block)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        torch.testing.assert_close(torch.cat(stream.hiddens).cpu(), expected[block.name], rtol=1e-2, atol=1e-2)


def test_observing_on_the_way_is_observing_then_moving_on() -> None:
    model = tiny()
    blocks = find_blocks(model)
    one, two = (Stream(model, blocks, TOKENS, torch.device("cpu")) for _ in range(2))
    for block in blocks:
        seen: list[dict[str, Any]] = [{name: Inputs() for name in block.linears} for _ in range(2)]
        one.observe(block, seen[0])
        one.advance(block)
        two.observe(block, seen[1], advance=True)
        assert all(torch.equal(a, b) for a, b in zip(one.hiddens, two.hiddens, strict=True))
        for name in block.linears:
            assert torch.equal(torch.cat(seen[0][name].seen), torch.cat(seen[1][name].seen))
            assert seen[0][name].sequences == seen[1][name].sequences == len(TOKENS)


def observed(kind: str, part: str, advance: bool = False) -> dict[str, int]:
    """How often each linear of the first block is multiplied by, while those with `part` in their names are observed."""
    experts.split(model := tiny(kind))
    block, *_ = blocks = find_blocks(model)
    stream = Stream(model, blocks, TOKENS, torch.device("cpu"))
    runs = dict.fromkeys(block.linears, 0)
    for name, linear in block.linears.items():
        linear.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    stream.observe(block, {name: Inputs() for name in block.linears if part in name}, advance)
    return {name.removeprefix(f"{block.name}."): count for name, count in runs.items()}


def test_observing_ends_a_batch_at_the_last_linear() -> None:
    """Once the first of three batches has shown which that is, also of some of them (true_sequential)."""
    assert {name for name, runs in observed("llama", "").items() if runs == 1} == {"mlp.down_proj"}
    runs = observed("llama", "self_attn")
    assert {name: runs for name, runs in runs.items() if "v_proj" in name or "gate" in name} == {
        "self_attn.v_proj": 3,
        "mlp.gate_proj": 1,
    }
    assert set(observed("llama", "", advance=True).values()) == {3}


def test_observing_ends_no_batch_where_tokens_are_routed() -> None:
    assert observed("mixtral", "") == observed("mixtral", "", advance=True)


def test_processes_that_spill_at_once_have_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    map_file, others = torch.from_file, []

    def mapped_meanwhile(*rest: Any, **named: Any) -> Tensor:
        """Another process spills between this one's mapping its file and taking away the name."""
        made = map_file(*rest, **named)
        if not others:
            others.append(made)
            others[0] = calibration.mapped(tmp_path, (4,), torch.float32)
        return made

    monkeypatch.setattr(torch, "from_file", mapped_meanwhile)
    own = calibration.mapped(tmp_path, (4,), torch.float32).fill_(1.0)
    others[0].fill_(2.0)
    assert own.tolist() == [1.0] * 4
    assert not any(tmp_path.iterdir())
