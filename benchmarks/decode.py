"""Decoding end to end, one text, against dense and llama.cpp: tokens a second, taken in turns, as ratios, with their bounds.

    python benchmarks/decode.py --llama PYTHON               # 1.1B; PYTHON: an interpreter with llama-cpp-python and gguf
    python benchmarks/decode.py --shape 7b --blocks 8        # as many blocks of Llama-2-7B as fit into memory beside each other
    python benchmarks/decode.py --shape 7b --who dense "packed 70%"   # all blocks: those models that fit
    python benchmarks/decode.py --only prefill               # 512 tokens at once, packed and dense
    python benchmarks/decode.py --only loading               # peak memory while a packed model is loaded

Models are random: one matrix of each shape, copied for every block. In each round everyone decodes --tokens tokens behind a
prompt of 8, by `generate`; a round's time is the median token's, and ratios are of the same round. What disagrees with the model's own forward is not timed.
`bound`: of the ratio, if both read their weights at one speed. One line of JSON a result.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, MLP, heads, key/value heads, blocks; vocabulary 32000
    "1.1b": (2048, 5632, 32, 4, 22),
    "7b": (4096, 11008, 32, 32, 32),
}
VOCABULARY = 32000
PROMPT = 8
DENSE = ("dense", "transformers")
PACKED = {
    "packed 50%": (0.5, "auto"),
    "packed 60%": (0.6, "auto"),
    "packed 70%": (0.7, "auto"),
    "int8 70%": (0.7, "int8"),
}
LLAMA_CPP = {"llama.cpp BF16": "BF16", "llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}
PAUSE = 0.05  # seconds between turns, in which the last one's threads go to sleep


# --------------------------------------------------------------------------------------------------------------- llama.cpp


def write_gguf(path: Path, kind: str, shape: str, blocks: int) -> None:
    """A random model of that shape for llama.cpp; `kind`: BF16, Q8_0 or Q4_0."""
    import gguf
    import numpy as np

    hidden, mlp, heads, kv_heads, _ = SHAPES[shape]
    wanted = gguf.GGMLQuantizationType[kind]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    made: dict[tuple[int, int], Any] = {}

    def matrix(name: str, out: int, columns: int) -> None:
        if (out, columns) not in made:
            drawn = random.standard_normal((out, columns), dtype=np.float32) * 0.02
            made[out, columns] = gguf.quants.quantize(drawn, wanted)
        writer.add_tensor(f"{name}.weight", made[out, columns], raw_dtype=wanted)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    key_value = hidden // heads * kv_heads
    matrix("token_embd", VOCABULARY, hidden)
    for i in range(blocks):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.attn_q", hidden, hidden)
        matrix(f"blk.{i}.attn_k", key_value, hidden)
        matrix(f"blk.{i}.attn_v", key_value, hidden)
        matrix(f"blk.{i}.attn_output", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate", mlp, hidden)
        matrix(f"blk.{i}.ffn_up", mlp, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, mlp)
    norm("output_norm")
    matrix("output", VOCABULARY, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(kind: str, shape: str, blocks: int, threads: int) -> None:
    """In llama.cpp's interpreter: for every number on stdin, the seconds that each of so many tokens takes."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.gguf"
        write_gguf(path, kind, shape, blocks)
        model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    print("ready", flush=True)
    for line in sys.stdin:
        model.reset()
        model.eval(list(range(3, 3 + PROMPT)))
        times = [time.perf_counter()]
        for token in range(int(line)):
            model.eval([100 + token])
            times.append(time.perf_counter())
        print(*between(times), flush=True)


def between(times: list[float]) -> list[float]:
    """What lies between neighbours."""
    return [after - before for before, after in itertools.pairwise(times)]


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, kind: str, args: argparse.Namespace, blocks: int) -> None:
        command = [python, __file__, "--serve", kind, "--shape", args.shape, "--blocks", str(blocks)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer() != "ready":
            raise RuntimeError(f"llama.cpp does not start with {kind}")

    def seconds(self, tokens: int) -> list[float]:
        assert self.process.stdin
        print(tokens, file=self.process.stdin, flush=True)
        return [float(number) for number in self._answer().split()]

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


# ------------------------------------------------------------------------------------------------------------------- ours


def build(shape: str, blocks: int, share: float | None, values: str = "auto") -> Any:
    """A random bf16 Llama. share: pruned, and packed; None leaves it dense."""
    import torch
    import transformers
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from losa import model
    from losa.sparse import decoding
    from losa.sparse.linear import PackedLinear, describe
    from losa.sparse.packed import pack

    hidden, mlp, heads, kv_heads, _ = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=blocks,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    whole: Any = model.skeleton(config).to(torch.bfloat16)
    whole.model.rotary_emb = LlamaRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(0)
    made: dict[Any, Any] = {}
    packed: dict[str, Any] = {}
    for name, module in list(whole.named_modules()):
        if isinstance(module, nn.Linear):
            key = (module.weight.shape, name == "lm_head")
            if key not in made:
                made[key] = torch.randn(module.weight.shape, generator=generator).mul_(0.02).bfloat16()
                if share is not None and name != "lm_head":
                    mask = torch.rand(module.weight.shape, generator=generator) >= share
                    made[key] = pack(made[key], mask, torch.int8 if values == "int8" else None)
            if isinstance(made[key], torch.Tensor):
                module.weight = nn.Parameter(made[key].clone(), requires_grad=False)
            else:
                packed[name] = PackedLinear.of(copy.deepcopy(made[key]), module)
                whole.set_submodule(name, packed[name])
        elif isinstance(module, nn.Embedding):
            drawn = torch.randn(module.weight.shape, generator=generator).bfloat16()
            module.weight = nn.Parameter(drawn, requires_grad=False)
        elif hasattr(module, "variance_epsilon"):
            module.weight = nn.Parameter(torch.ones(hidden, dtype=torch.bfloat16), requires_grad=False)
    if packed:
        config.quantization_config = describe({name: linear.packed.layout for name, linear in packed.items()})
    decoding.attach(whole.eval())
    return whole


def bytes_read(whole: Any) -> int:
    """By one token: all weights but the embedding."""
    return sum(p.nbytes for name, p in whole.named_parameters() if "embed_tokens" not in name)


def dense_bytes(shape: str, blocks: int) -> int:
    """The same of the dense model in bf16."""
    hidden, mlp, heads, kv_heads, _ = SHAPES[shape]
    block = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads) + 3 * hidden * mlp + 2 * hidden
    return 2 * (blocks * block + hidden * VOCABULARY + hidden)


class Ours:
    """A model that decodes natively, or, `own`, by its own forward."""

    def __init__(self, whole: Any, own: bool = False) -> None:
        self.whole, self.own = whole, own
        self.bytes = bytes_read(whole)

    def seconds(self, tokens: int) -> list[float]:
        import torch
        from transformers.generation.streamers import BaseStreamer

        times: list[float] = []

        class Clock(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        os.environ["LOSA_DECODING"] = "ordinary" if self.own else "auto"
        ids = torch.arange(3, 3 + PROMPT)[None]
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        self.whole.generate(ids, max_new_tokens=tokens + 1, streamer=Clock(), **options)
        return between(times)[-tokens:]  # the prompt comes first

    def check(self) -> None:
        """Raise RuntimeError if native decoding disagrees with the model's own forward."""
        import torch

        found = []
        for way in ("auto", "ordinary"):
            os.environ["LOSA_DECODING"] = way
            ids = torch.arange(3, 3 + PROMPT)[None]
            made = self.whole.generate(
                ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
            )
            found.append(made.logits[1].float())
        error = float((found[0] - found[1]).norm() / found[1].norm())
        if not error < 3e-2 or not self.whole.forward.tokens:
            raise RuntimeError(f"native decoding disagrees with the model's own forward: relative error {error:.1e}")


class Reading:
    """Reads memory from end to end, as fast as it goes: `bytes` a token."""

    def __init__(self) -> None:
        import torch

        from losa.sparse.pages import Pages

        self.bytes = 2**29
        self.room = Pages([self.bytes]).put(torch.ones(self.bytes // 8, dtype=torch.int64))

    def seconds(self, tokens: int) -> list[float]:
        import torch

        from losa import bench
        from losa.sparse import cpu

        read = cpu.function(f"losa_read_{bench.best_dense()}")
        times = [time.perf_counter()]
        for _ in range(tokens):
            read(self.room.data_ptr(), self.bytes // 64, 4, torch.get_num_threads())
            times.append(time.perf_counter())
        return between(times)


def decoding(args: argparse.Namespace, blocks: int) -> None:
    """All in turns; prints a line for each."""
    import torch

    from losa import bench, speed

    who: dict[str, Any] = {}
    if whole := [name for name in DENSE if name in args.who]:
        dense = build(args.shape, blocks, None)
        who |= {name: Ours(dense, own=name == "transformers") for name in whole}
        assert bytes_read(dense) == dense_bytes(args.shape, blocks)
    for name, (share, values) in PACKED.items():
        if name in args.who:
            who[name] = Ours(build(args.shape, blocks, share, values))
    for one in who.values():
        one.check()
    who["read"] = Reading()
    for name, kind in LLAMA_CPP.items():
        if name in args.who:
            who[name] = LlamaCpp(args.llama, kind, args, blocks)

    def median(one: Any) -> float:
        time.sleep(PAUSE)
        return float(statistics.median(one.seconds(args.tokens)))

    times = speed.in_turns({name: partial(median, one) for name, one in who.items()}, args.rounds)
    for name, one in who.items():
        line = {
            "benchmark": "decode",
            "who": name,
            "shape": args.shape,
            "blocks": blocks,
            "threads": args.threads,
            "tokens_per_s": round(1 / statistics.median(times[name]), 2),
        }
        line |= {f"over_{base}": ratio(times[base], times[name]) for base in (*LLAMA_CPP, *DENSE) if base in who}
        if hasattr(one, "bytes"):
            line["bytes"] = one.bytes
            line["gb_per_s"] = round(one.bytes / statistics.median(times[name]) / 1e9, 2)
            if name != "read":
                line["bound"] = round(dense_bytes(args.shape, blocks) / one.bytes, 3)  # over dense
            read = [a / who["read"].bytes * one.bytes for a in times["read"]]
            line["share_of_read_bandwidth"] = ratio(read, times[name])
        print(json.dumps(line | {"processor": bench.processor(), "kernel": kernel(one), "torch": torch.__version__}))


def kernel(one: Any) -> str | None:
    """Which one a model of ours takes."""
    return one.whole.forward._table.kernel.name if isinstance(one, Ours) and not one.own else None


def ratio(above: list[float], below: list[float]) -> float:
    """Median of ratios of neighbours."""
    from losa import speed

    return round(speed.ratios_of(above, below)[1], 3)


def prefill(args: argparse.Namespace, blocks: int) -> None:
    """512 tokens at once, packed at 70% over dense."""
    import torch

    from losa import speed

    whole = {"dense": build(args.shape, blocks, None), "packed 70%": build(args.shape, blocks, 0.7)}
    ids = torch.randint(3, 30000, (1, 512))

    def read(model: Any) -> float:
        began = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1)
        return time.perf_counter() - began

    times = speed.in_turns({name: partial(read, model) for name, model in whole.items()}, args.rounds)
    seconds = {name: round(statistics.median(t), 3) for name, t in times.items()}
    over = ratio(times["dense"], times["packed 70%"])
    print(json.dumps({"benchmark": "prefill", "shape": args.shape, "blocks": blocks, "s": seconds, "over_dense": over}))


LOADED = """
import resource, sys
import torch, transformers, losa
from losa.sparse import decoding, linear, steps
import transformers.models.llama.modeling_llama
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded = peak()
if "decode" in sys.argv:
    model.generate(torch.arange(3, 11)[None], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert model.forward.tokens == 3
print(before, loaded, peak())
"""


def loading(args: argparse.Namespace, blocks: int) -> None:
    """Peak of resident memory while a packed model is loaded, and once it has decoded, above what importing takes."""
    with tempfile.TemporaryDirectory() as folder:
        build(args.shape, blocks, 0.7).save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        done = subprocess.run(
            [sys.executable, "-c", LOADED, folder, "decode"], check=True, capture_output=True, text=True
        )
    before, loaded, decoded = (int(number) for number in done.stdout.split())
    line = {"benchmark": "loading", "shape": args.shape, "blocks": blocks, "bytes": size, "import": before}
    line |= {
        "loaded_over_bytes": round((loaded - before) / size, 3),
        "decoded_over_bytes": round((decoded - before) / size, 3),
    }
    print(json.dumps(line | {"own_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--blocks", type=int, help="default: all of the shape's")
    parser.add_argument("--only", choices=["decoding", "prefill", "loading"], default="decoding")
    parser.add_argument("--llama", metavar="PYTHON")
    names = [*DENSE, *PACKED, *LLAMA_CPP]
    parser.add_argument("--who", nargs="+", choices=names, help="who decodes, of --only decoding; default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who and args.only != "decoding":
        parser.error("--who is for --only decoding")
    if not args.llama and LLAMA_CPP.keys() & set(args.who or ()):
        parser.error("llama.cpp takes --llama PYTHON")
    args.who = args.who or [name for name in names if args.llama or name not in LLAMA_CPP]
    blocks = args.blocks or SHAPES[args.shape][4]
    if args.serve:
        serve(args.serve, args.shape, blocks, args.threads)
        return
    import torch

    torch.set_num_threads(args.threads)
    {"decoding": decoding, "prefill": prefill, "loading": loading}[args.only](args, blocks)


if __name__ == "__main__":
    main()
