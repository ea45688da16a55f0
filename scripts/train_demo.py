"""Trains the built-in model from nothing: tokenizer, then a small Llama on Python source. About an hour on two cores.

    python scripts/train_demo.py --output /tmp/demo --stdlib /usr/lib/python3.13 ...
    python scripts/train_demo.py --output /tmp/larger --shape 768x12x2048 --device cuda --steps 6000 --batch 65536

Text: the standard library of the Python that runs this (its `train` split, twice) and the packages installed in its
environment. Whatever repeats a module held out in it, or in a standard library named with --stdlib, is left out.
Run it again with the same --output and it goes on from its last checkpoint. `--output` gets the model folder that
ships as src/losa/demo/model (of the default shape), and `manifest.txt`, the documents it was trained on.
"""

import argparse
import hashlib
import json
import random
import sysconfig
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from losa.demo import corpus

VOCABULARY = 2048
END = "<|endoftext|>"
SHAPE, BATCH, MICRO = "256x6x512", 16384, 8192  # the built-in model's; tokens an update, and at once
HEAD, WINDOW = 64, 512
MUON_RATE, ADAM_RATE = 0.02, 4e-3
LARGEST_DOCUMENT = 150_000  # characters; longer ones are mostly generated


def training_documents(stdlibs: list[Path]) -> list[corpus.Document]:
    """Every document the model may see, shuffled: no copy of a held-out module, no two near-identical ones."""
    held_out: set[tuple[str, ...]] = set()
    for root in [Path(sysconfig.get_path("stdlib")), *stdlibs]:
        for document in corpus.read_documents(root):
            if corpus.split_of(document.name) != "train":
                held_out |= corpus.shingles(document.text)
    library = corpus.without_copies(corpus.standard_library()["train"], held_out)
    packages = list(corpus.read_documents(Path(sysconfig.get_path("purelib"))))
    random.Random(0).shuffle(packages)
    kept, seen = [], set().union(*(corpus.shingles(document.text) for document in library))
    for document in corpus.without_copies(packages, held_out):
        own = corpus.shingles(document.text)
        if len(document.text) <= LARGEST_DOCUMENT and len(own & seen) <= 0.3 * len(own):
            seen |= own
            kept.append(document)
    documents = 2 * library + kept
    random.Random(1).shuffle(documents)
    return documents


def train_tokenizer(documents: list[corpus.Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps runs of spaces and line ends whole, digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents[:3000]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=512)


def save_state(path: Path, step: int, masters: list[torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = {f"master.{i}": master.detach() for i, master in enumerate(masters)}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"state.{o}.{i}.{name}": value for name, value in state.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step)})
    path.with_suffix(".new").replace(path)


def load_state(path: Path, masters: list[torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = load_file(path)
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, value in tensors.items():
        kind, *rest = key.split(".")
        if kind == "master":
            masters[int(rest[0])].data.copy_(value)
        else:
            states[int(rest[0])].setdefault(int(rest[1]), {})[rest[2]] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def config(shape: str) -> LlamaConfig:
    """HIDDENxBLOCKSxMLP."""
    hidden, blocks, mlp = (int(n) for n in shape.split("x"))
    return LlamaConfig(  # type: ignore[call-arg] # its types leave out attn_implementation
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    losses = []
    for batch in tokens[: 64 * WINDOW].to(model.device).view(-1, WINDOW).split(16):
        losses.append(model(input_ids=batch, labels=batch, use_cache=False).loss.float())
    return torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, action="append", default=[], help="another Python's standard library")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--shape", default=SHAPE, help="HIDDENxBLOCKSxMLP, heads of 64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=BATCH, help="tokens an update; 8192 at once")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    data = args.output / "tokens.safetensors"
    if not data.exists():
        documents = training_documents(args.stdlib)
        lines = sorted({f"{hashlib.sha256(d.text.encode()).hexdigest()[:16]} {d.name}\n" for d in documents})
        (args.output / "manifest.txt").write_text("".join(lines))
        tokenizer = train_tokenizer(documents)
        tokenizer.save_pretrained(args.output)
        text = [document.text + END for document in documents]
        tokens = torch.tensor([token for ids in tokenizer(text)["input_ids"] for token in ids], dtype=torch.int16)
        validation = [document.text + END for document in corpus.standard_library()["validation"]]
        held = torch.tensor([t for ids in tokenizer(validation)["input_ids"] for t in ids], dtype=torch.int16)
        save_file({"train": tokens, "validation": held}, data)
        print(
            f"{len(documents)} documents, {sum(map(len, text)) / 1e6:.1f} MB, {len(tokens) / 1e6:.1f}M tokens",
            flush=True,
        )
    loaded = load_file(data)
    tokens, validation_tokens = loaded["train"].long(), loaded["validation"].long()

    torch.manual_seed(0)
    model = LlamaForCausalLM(config(args.shape)).to(args.device)
    # bf16 model, fp32 masters: on two cores twice as fast as autocast
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model = model.bfloat16()
    matrices = [
        m for m, (name, p) in zip(masters, model.named_parameters(), strict=True) if p.ndim == 2 and "embed" not in name
    ]
    others = [m for m in masters if not any(m is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    state, first = args.output / "state.safetensors", 0
    if state.exists():
        load_state(state, masters, optimizers)
        with safe_open(state, "pt") as file:
            first = int(file.metadata()["step"])
    body = torch.compile(lambda ids: model.model(input_ids=ids, use_cache=False).last_hidden_state)

    started = time.time()
    for step in range(first, args.steps):
        # short sequences first: attention is a third of the cost at 512
        length = WINDOW // 2 if step < 0.8 * args.steps else WINDOW
        rate = min(1.0, (step + 1) / 60) * min(1.0, (args.steps - step) / (0.6 * args.steps))
        for optimizer, base in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
                p.grad = None
        start = step * args.batch % (len(tokens) - args.batch - 1)
        seen = tokens[start : start + args.batch + 1].to(args.device)
        inputs, targets = seen[:-1].view(-1, length), seen[1:].view(-1, length)
        micro = MICRO // length
        total = torch.zeros((), device=args.device)
        for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
            loss = torch.nn.functional.cross_entropy(model.lm_head(body(x)).flatten(0, 1).float(), y.flatten())
            (loss * len(x) / len(inputs)).backward()
            total += loss.detach() * len(x) / len(inputs)
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 10 == 0:
            speed = (step + 1 - first) * args.batch / (time.time() - started)
            print(f"step {step + 1}/{args.steps} loss {total.item():.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            save_state(state, step + 1, masters, optimizers)
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
            print(json.dumps({"step": step + 1, "validation": held_out_loss(model, validation_tokens)}), flush=True)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(args.output / "model")
    PreTrainedTokenizerFast.from_pretrained(args.output).save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
