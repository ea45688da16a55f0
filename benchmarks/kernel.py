"""Products with packed weights in the shapes of Llama-2-7B's linears: `losa bench kernel` over shapes and sparsities.

python benchmarks/kernel.py > results.jsonl: one line of JSON a result, see losa.bench.kernel. --rows 512 is prefill.
"""

import argparse
import json

from losa import bench
from losa.sparse.packed import DTYPES


def main() -> None:
    """Parses the flags; prints one line of JSON a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["4096x4096", "11008x4096", "4096x11008"]
    parser.add_argument("--shape", nargs="+", default=shapes, help="OUTxIN, one or more")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--values", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--activations", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="tokens at once")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    parser.add_argument("--kernel", nargs="+", help="default: the one that is chosen")
    args = parser.parse_args()
    for shape in args.shape:
        for values in args.values:
            for activations in args.activations:
                for rows in args.rows:
                    for sparsity in args.sparsity:
                        for name in args.kernel or [None]:
                            found = bench.kernel(
                                shape, sparsity, values, activations, rows, name, args.rounds, args.threads
                            )
                            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
