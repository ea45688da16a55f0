"""LoSA beside its authors' code, in turns, on one random Llama: time and memory of each part of a step.

    git clone https://github.com/wzhuang-xmu/LoSA authors
    python benchmarks/authors.py authors [--part features rates+pruning recovery --rounds 2 --threads 2 --dtype float32 --their-dtype float32]

Nothing of theirs is in this repository. Each side is a process of its own, which waits while the other computes; theirs
is adapted to the CPU and to today's transformers from outside, and its files stay as they are. What it takes to train
(trl, paged moments in 8 bits) is left out on both sides: a training step is forward, backward, clipping and AdamW.

Parts: features (the dense model's outputs of every block; ours with the Gram matrices that RMI needs), rates (RMI of
the model as it stands, a pass of its own: ours needs that from the second step on only), pruning (with Wanda, and
the blocks' errors), recovery (sequences of --length tokens, 4 at a time, an update every 8).

Before anything is timed, both prune two such blocks on short sequences, at the authors' rates: their errors and the loss behind them must
agree to 1e-3. One line of JSON a part and round, wall and processor seconds and peak of anonymous memory of both sides,
and the floor: operations that each side's products take at least, at the rate at which this machine multiplies.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import transformers
from parts import BATCH, MICRO, RMI_SAMPLES, SAMPLES, SPARSITY, Clock, Parts, tokens

STEPS, MEAN_RANK = 5, 6  # of the paper
PARTS = ("features", "rates+pruning", "recovery")


def build(args: argparse.Namespace) -> Any:
    """The same model on both sides."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=max(args.length, 32),
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    model.config.use_cache = False
    return model


class Theirs:
    """The authors' functions, on the CPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        sys.path.insert(0, str(args.folder))  # its peft is a changed copy of an old one
        import lib.prune
        import peft
        from peft.tuners.lora import LoraLayer

        self._prune, self._layer = lib.prune, LoraLayer
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        torch.cuda.synchronize = lambda *_: None
        # What it asks of its arguments: a 7 in the model's name means 64 sequences for RMI.
        self._asked = types.SimpleNamespace(model="7b", sparsity_ratio=SPARSITY, nsamples=SAMPLES, use_variant=False)
        base = peft.prepare_model_for_kbit_training(build(args))
        base.enable_input_require_grads()
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=names, bias="none", lora_dropout=0.1, task_type="CAUSAL_LM"
        )
        self._model = peft.get_peft_model(base, config)
        self._inner = cast(Any, self._model.base_model.model)
        self._inner.hf_device_map, self._inner.seqlen = {}, args.length
        self._inner.eval()
        self._length, self._features = args.length, []  # type: int, list[torch.Tensor]
        self._embed_positions()

    def _embed_positions(self) -> None:
        """A block of today's transformers is given its rotary embeddings, of which the authors' code does not know."""
        ids = torch.arange(self._length)[None]
        with torch.no_grad():
            rotary = self._inner.model.rotary_emb(self._inner.model.embed_tokens(ids), position_ids=ids)

        def give(_module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return inputs, {"position_embeddings": rotary} | named

        for layer in self._inner.model.layers:
            layer.register_forward_pre_hook(give, with_kwargs=True)

    def _loader(self, samples: int) -> list[tuple[torch.Tensor, None]]:
        return [(row[None], None) for row in tokens(SAMPLES, self._length, 1)[:samples]]

    def features(self) -> dict[str, Any]:
        self._model.merge_adapter()
        clock = Clock()
        made = self._prune.get_feature_map(
            self._asked, self._inner, None, torch.device("cpu"), dataloader=self._loader(SAMPLES)
        )
        found = {"features": clock.lap()}
        self._model.unmerge_adapter()
        self._features = [feature.cpu() for feature in made]
        return found

    def pruning(self) -> dict[str, Any]:
        """One function of theirs: what comes before its linear programme are the rates."""
        found: dict[str, Any] = {}
        solve = self._prune.optimize.minimize

        def minimize(function: Any, x0: Any, jac: Any, **named: Any) -> Any:
            # in fp64, without which today's scipy refuses
            result = solve(lambda x: float(function(x)), x0, jac=lambda x: jac(x).astype(numpy.float64), **named)
            found["rates"], found["chosen"] = clock.lap(), result.x.tolist()
            return result

        self._prune.optimize = types.SimpleNamespace(minimize=minimize)
        self._model.merge_adapter()
        clock = Clock()
        errors = self._prune.prune_wanda(
            self._asked,
            self._inner,
            None,
            torch.device("cpu"),
            dataloader=self._loader(SAMPLES),
            calib_dataloader=self._loader(RMI_SAMPLES),
            dense_feature=self._features,
            prune_iter=1,
            iters=STEPS,
        )
        found |= {"pruning": clock.lap(), "errors": errors}
        self._prune.optimize = types.SimpleNamespace(minimize=solve)
        self._model.unmerge_adapter()
        return found

    def recovery(self, sequences: int) -> dict[str, Any]:
        for module in self._model.modules():
            if isinstance(module, self._layer):
                module.iter_rank = MEAN_RANK  # type: ignore[assignment] # a number of theirs, no tensor
        trained = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.001)
        self._model.train()
        clock, losses = Clock(), []
        for rows in tokens(sequences, self._length, 2).split(BATCH):
            for some in rows.split(MICRO):
                loss = self._model(input_ids=some, labels=some).loss / (len(rows) / len(some))
                loss.backward()
                losses.append(loss.item() * len(rows) / len(some))
            torch.nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            optimizer.zero_grad()
        found = {"recovery": clock.lap(), "loss": losses[0]}
        self._inner.eval()
        return found


def ours(args: argparse.Namespace) -> Parts:
    """The same of losa: the pipeline's own functions."""
    settings = {"error_tokens": args.error_tokens, "dtype": args.dtype, "device": "cpu"}
    return Parts(build(args), args.length, settings)


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def serve(side: str, args: argparse.Namespace) -> None:
    """Do what standard input asks for, a line of JSON each, and answer in one."""
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  (theirs prints as it goes)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    worker: Any = Theirs(args) if side == "theirs" else ours(args)
    for line in sys.stdin:
        part, arguments = json.loads(line)
        peak, done = [anonymous()], threading.Event()

        def look(peak: list[int] = peak, done: threading.Event = done) -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous())

        watch = threading.Thread(target=look)
        before = peak[0]
        watch.start()
        found = getattr(worker, part)(*arguments)
        done.set()
        watch.join()
        print(json.dumps(found | {"before": before, "peak": peak[0]}), file=answers, flush=True)


class Side:
    """A process that serves one side."""

    def __init__(self, name: str, args: argparse.Namespace, **changed: Any) -> None:
        settings = vars(args) | ({"dtype": args.their_dtype} if name == "theirs" else {}) | changed
        flags = [f"--{key.replace('_', '-')}={settings[key]}" for key in ("hidden", "blocks", "length", "threads")]
        flags += [f"--dtype={settings['dtype']}", f"--error-tokens={settings['error_tokens']}", f"--serve={name}"]
        command = [sys.executable, __file__, str(args.folder), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, part: str, *arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([part, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("one side ended: see above. Nothing more is timed.")
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def check(args: argparse.Namespace) -> None:
    """Exits unless both sides make the same errors of the same rates, and the same loss of the model that is left."""
    sides = [Side(name, args, blocks=2, length=16, error_tokens=0) for name in ("theirs", "ours")]
    theirs, ours = sides
    theirs.do("features")
    ours.do("features")
    found = theirs.do("pruning")
    made = ours.do("pruning", found["chosen"])
    pairs = list(zip(found["errors"], made["errors"], strict=True))
    pairs.append((theirs.do("recovery", BATCH)["loss"], ours.do("recovery", BATCH)["loss"]))
    for side in sides:
        side.end()
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    print(json.dumps({"benchmark": "authors", "checked": len(pairs), "largest_difference": worst}), flush=True)
    if worst > (3e-2 if "bfloat16" in (args.dtype, args.their_dtype) else 1e-3):
        sys.exit(f"the two sides disagree: {pairs}. Nothing is timed.")


def operations(args: argparse.Namespace, tokens: int) -> float:
    """Floating-point operations of the blocks' linears on so many tokens, once."""
    mlp = args.hidden * 43 // 16
    return float(2 * tokens * args.blocks * (4 * args.hidden**2 + 3 * args.hidden * mlp))


def rate(args: argparse.Namespace) -> float:
    """Operations a second of processor time, of products as a block's MLP has them, on one thread."""
    torch.set_num_threads(1)
    x = torch.randn(4096, args.hidden).to(getattr(torch, args.dtype))
    weight = torch.randn(args.hidden * 43 // 16, args.hidden).to(x)
    best = 0.0
    for _ in range(10):
        began = time.process_time()
        torch.nn.functional.linear(x, weight)
        best = max(best, 2.0 * x.numel() * len(weight) / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a clone of the authors' repository")
    for name, default in (("hidden", 512), ("blocks", 8), ("length", 512), ("rounds", 1), ("sequences", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--error-tokens", type=int, default=4096, help="of ours: tokens that errors are measured at")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--their-dtype", choices=("float32", "bfloat16"), help="of theirs, if another one")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--serve", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.their_dtype = args.their_dtype or args.dtype
    if args.serve:
        return serve(args.serve, args)
    if not (args.folder / "lib" / "prune.py").is_file():
        sys.exit(f"{args.folder} is no clone of the authors' repository: it has no lib/prune.py")
    check(args)
    passes = {"features": 1, "rates": 1, "pruning": 2, "recovery": 3}
    seen = {"features": SAMPLES, "rates": RMI_SAMPLES, "pruning": SAMPLES, "recovery": args.sequences}
    calls: dict[str, list[Any]] = {
        "features": ["features"],
        "rates+pruning": ["pruning"],
        "recovery": ["recovery", args.sequences],
    }
    for number in range(args.rounds):
        sides = {name: Side(name, args) for name in ("theirs", "ours")[:: 1 if number % 2 else -1]}
        for call in PARTS:
            if call not in args.part and not (call == "features" and "rates+pruning" in args.part):  # which needs them
                continue
            found = {name: side.do(*calls[call]) for name, side in sides.items()}
            speed = rate(args)
            for part in call.split("+"):
                times = {name: found[name][part] for name in ("theirs", "ours")}
                theirs, ours = times.values()
                floor = passes[part] * operations(args, seen[part] * args.length) / speed
                result: dict[str, Any] = {
                    "benchmark": "authors",
                    "part": part,
                    "round": number,
                    "dtype": args.dtype,
                    "their_dtype": args.their_dtype,
                    "threads": args.threads,
                    "sequences": seen[part],
                    **{name: {**times[name], **{k: found[name][k] for k in ("before", "peak")}} for name in sides},
                    "ratio": round(theirs["seconds"] / ours["seconds"], 2),
                    "processor_ratio": round(theirs["processor"] / ours["processor"], 2),
                    "memory_ratio": round(found["theirs"]["peak"] / found["ours"]["peak"], 2),
                    "gflops_a_thread": round(speed / 1e9, 1),
                    "floor_processor": round(floor, 2),
                }
                print(json.dumps(result), flush=True)
        for side in sides.values():
            side.end()


if __name__ == "__main__":
    main()
