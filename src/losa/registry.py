"""Names to implementations, imported when first asked for. A new one of a kind is one file and one line here."""

import difflib
import importlib
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from losa.errors import LosaError

PRUNERS = {
    "magnitude": "losa.pruners.magnitude:Magnitude",
    "wanda": "losa.pruners.wanda:Wanda",
    "sparsegpt": "losa.pruners.sparsegpt:SparseGPT",
    "pruner-zero": "losa.pruners.pruner_zero:PrunerZero",
    "alps": "losa.pruners.alps:ALPS",
}
STRUCTURED = {  # pruners of whole heads and channels
    "wanda-sp": "losa.pruners.wanda_sp:WandaSP",
    "flap": "losa.pruners.flap:FLAP",
}
ALLOCATORS = {
    "uniform": "losa.allocators.uniform:Uniform",
    "rmi": "losa.allocators.rmi:RMI",
    "owl": "losa.allocators.owl:OWL",
    "error": "losa.allocators.error:MeasuredError",
}
RECOVERIES = {
    "losa": "losa.recovery.low_rank:MaskedLowRank",
    "sparse-lora": "losa.recovery.low_rank:SparseLoRA",
    "sora": "losa.recovery.sora:SoRA",
    "lora": "losa.recovery.low_rank:LowRankApart",
    "adalora": "losa.recovery.adalora:AdaLoRA",
    "full": "losa.recovery.full:KeptWeights",
    "none": "losa.recovery.none:NoRecovery",
}
KERNELS = {  # in order of preference
    "avx512-bf16": "losa.sparse.cpu:AVX512BF16",
    "avx512": "losa.sparse.cpu:AVX512",
    "avx2": "losa.sparse.cpu:AVX2",
    "portable": "losa.sparse.cpu:Portable",
    "2:4": "losa.sparse.semi_structured:SemiStructured",
    "triton": "losa.sparse.gpu:Triton",
    "reference": "losa.sparse.reference:Reference",
}
KINDS: dict[str, Mapping[str, str]] = {
    "pruner": ChainMap(PRUNERS, STRUCTURED),
    "allocator": ALLOCATORS,
    "recovery": RECOVERIES,
    "kernel": KERNELS,
}


def unknown(kind: str, name: object, known: Iterable[str]) -> LosaError:
    """The error for a name that is not `known`, with the nearest one that is."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return LosaError(f"unknown {kind} {name!r}: {hint}")


def get(kind: str, name: str) -> Any:
    """The class registered as `name`; raises LosaError with the nearest name if there is none."""
    table = KINDS[kind]
    if name not in table:
        raise unknown(kind, name, table)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)
