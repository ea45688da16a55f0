# %% [markdown]
# # From a dense model to a packed one, in Python
#
# This file is a notebook in percent format: editors such as VS Code, PyCharm and Jupytext run it cell by cell, and
# `python docs/example.py` runs all of it. It needs no download and writes into a temporary folder.

# %%
import tempfile
from pathlib import Path

import torch
import transformers

import losa
from losa.sparse.convert import convert

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Say what should happen
#
# A recipe holds every setting; it is checked when it is made, before any model loads. These figures are small so that
# the example takes seconds: `losa.recipe.load("demo")` has those of `losa demo`.

# %%
recipe = losa.Recipe(
    sparsity=0.6,
    steps=2,
    calibration="demo",
    calibration_samples=16,
    sequence_length=64,
    train_data="demo",
    train_samples=32,
    train_length=64,
    eval_data="demo:validation",
    eval_tokens=2048,
    eval_step_tokens=0,
    sample_tokens=0,
    dtype="float32",
)
print([round(recipe.sparsity_at(step), 3) for step in (1, 2)])

try:
    losa.Recipe(sparsity=1.5)
except losa.LosaError as error:
    print(error)

# %% [markdown]
# ## Prune and repair

# %%
result = losa.compress("demo", recipe, folder / "sparse")

for name, measured in result.measurements.items():
    print(f"{name}: perplexity {measured['perplexity']:.2f}")

# %% [markdown]
# `history` has what was decided at each step: sparsity by block, what pruning did to each block's output, and the rank
# that this block's pairs got for it.

# %%
last = result.history[-1]
for (block, rate), error, rank in zip(last["rates"].items(), last["errors"], last["ranks"], strict=True):
    print(f"{block}: sparsity {rate:.3f}, error {error:.3f}, rank {rank}")

# %% [markdown]
# ## What came out is an ordinary model
#
# Every pruned weight is zero, and stays where the mask has it.

# %%
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "sparse", dtype=torch.float32)
weight = model.model.layers[0].mlp.down_proj.weight
print(f"{(weight == 0).float().mean():.3f} of the first down_proj are zeros")
assert abs(result.measurements["sparse"]["sparsity"] - 0.6) < 0.01

# %% [markdown]
# ## Perplexity of any model, on any tokens

# %%
tokens = torch.tensor(result.tokenizer("def main():\n    return 0\n" * 40)["input_ids"])
print(f"perplexity {losa.perplexity(model, tokens, window=128):.2f}")

# %% [markdown]
# ## Train it further, with its zeros kept
#
# `attach` gives a model masked pairs in place; whatever loop trains them, `merge` puts them into the weights exactly.

# %%
before = weight == 0
adapters = losa.attach(model, rank=4)
optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)
for _ in range(3):
    rows = tokens[:256].view(2, 128)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss:.3f}")
losa.merge(model)
assert torch.equal(model.model.layers[0].mlp.down_proj.weight[before], torch.zeros(int(before.sum())))

# %% [markdown]
# ## Leave the zeros out

# %%
convert(folder / "sparse", folder / "packed", "packed")  # on the command line: losa export
loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "packed")
prompt = result.tokenizer("def main():", return_tensors="pt")
written = loaded.generate(**prompt, max_new_tokens=12, do_sample=False)
print(result.tokenizer.decode(written[0]))
sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("sparse", "packed")}
print(f"{sizes['sparse'] / 1e6:.2f} MB with zeros, {sizes['packed'] / 1e6:.2f} MB without")
assert sizes["packed"] < sizes["sparse"]
