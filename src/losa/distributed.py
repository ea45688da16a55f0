"""Several processes, as torchrun starts them: each holds the model and a part of the data; what they sum is the same in all.

In a process of its own everything here does nothing, and outside of `joined` all but `launched` and `leads`.
Collectives are torch.distributed's: gloo between processors, nccl between GPUs.
"""

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from losa.errors import LosaError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# How long the others wait while rank 0 writes a large model. A process that dies is noticed at once: its connections close.
TIMEOUT = timedelta(minutes=30)
STORE = timedelta(seconds=25)  # torchrun kills what it ends after 30
PIECE = 1 << 24  # numbers that are summed at once
RESUME = "losa compress ... --resume goes on with the run, also with another number of processes"
LOST = f"another process of the job has ended or does not answer: {RESUME}"
_joined = False
_saying = threading.Lock()


def launched() -> int:
    """How many processes torchrun, or whoever sets its variables, started; 1 for a process of its own."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def neighbours() -> int:
    """How many of them share this machine, as far as torchrun or whoever started them says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


def leads() -> bool:
    """Whether this is the one that writes and prints: rank 0."""
    return launched() == 1 or int(os.environ["RANK"]) == 0


def world() -> int:
    """How many share the work: those launched inside `joined`, else 1."""
    return launched() if _joined else 1


def rank() -> int:
    """Which of those that share the work this is, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


@contextmanager
def joined(device: "torch.device") -> Iterator[None]:
    """The processes share the work inside, and leave together. device: where this one computes.

    Raises LosaError if another process ends meanwhile.
    """
    global _joined
    if launched() == 1 or _joined:
        yield
        return
    try:
        _join(device)
        _joined = True
        yield
        gather(None)  # none goes on before rank 0 has written everything
    except RuntimeError as error:
        import torch.distributed as dist

        if isinstance(error, dist.DistError) or "gloo" in str(error):
            atexit.unregister(dist.destroy_process_group)  # it would wait for the lost one
            raise LosaError(LOST) from error
        raise
    finally:
        _joined = False


def _join(device: "torch.device") -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)  # not before: a group cannot be made a second time on the same store


# ------------------------------------------------------------------------------------------------------- who does what


def own_range(count: int) -> range:
    """This process's part of `count` things: parts follow each other and differ by one at most; none is larger than rank 0's."""
    if world() == 1:
        return range(count)
    return range(*((count * r + world() - 1) // world() for r in (rank(), rank() + 1)))


def turns(count: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` things this process does, one by one, and whether it counts: all do as many, as a sharded model runs
    in all together, and the last may be one that another process does."""
    for first in range(0, count, world()):
        yield min(first + rank(), count - 1), first + rank() < count


def gather(value: Any) -> list[Any]:
    """Every process's `value` (JSON), by rank. Also where all wait for each other."""
    if world() == 1:
        return [value]
    import torch
    import torch.distributed as dist

    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
    return [json.loads(bytes(t[: int(size)].tolist())) for t, size in zip(texts, sizes, strict=True)]


def check_alike(what: dict[str, Any]) -> None:
    """Raise LosaError, in all processes, naming the first of `what` (JSON) that is not the same in all."""
    first, *others = gather(what)
    for other, found in enumerate(others, 1):
        for name in first | found:
            here, there = first.get(name, "nothing"), found.get(name, "nothing")
            if here != there:
                raise LosaError(
                    f"the processes differ in {name}: {here!r} in rank 0, {there!r} in rank {other}: start "
                    "all with the same command, code and data"
                )


# -------------------------------------------------------------------------------------------------------------- tensors


def sum_(tensors: Iterable["Tensor"], dtype: "torch.dtype | None" = None) -> None:
    """Each tensor becomes its sum over the processes, in place, the same bits in all; added up in `dtype` (fp64)."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    dtype = dtype or torch.float64
    pending: list[Tensor] = []

    def flush() -> None:
        if pending:
            flat = torch.cat([_reachable(part).to(dtype) for part in pending])
            dist.all_reduce(flat)
            for part, total in zip(pending, flat.split([len(part) for part in pending]), strict=True):
                part.copy_(total)
            pending.clear()

    for tensor in tensors:
        for part in tensor.detach().view(-1).split(PIECE):
            if pending and (pending[0].device != part.device or sum(map(len, pending)) + len(part) > PIECE):
                flush()
            pending.append(part)
    flush()


def exchange(pieces: list["Tensor"]) -> "Tensor":
    """pieces[r] [own rows, columns of r] goes to rank r; returns [all rows, own columns], rows in the order of ranks.

    Pieces of one process have the same rows, those for one process the same columns; there may be none of either.
    """
    if world() == 1:
        return pieces[0]
    import torch
    import torch.distributed as dist

    columns = pieces[rank()].shape[1]
    width = columns * pieces[0].element_size()
    sent = [_reachable(piece).reshape(-1).view(torch.uint8) for piece in pieces]
    rows: list[int] = gather(len(pieces[0]))
    received = torch.empty(sum(rows) * width, dtype=torch.uint8, device=sent[0].device)
    dist.all_to_all_single(received, torch.cat(sent), [count * width for count in rows], [len(s) for s in sent])
    return received.view(pieces[0].dtype).view(sum(rows), columns).to(pieces[0].device)


def collect(tensor: "Tensor") -> "Tensor":
    """On rank 0 all processes' tensors, which may differ in their first size, one behind the other; elsewhere `tensor`."""
    if world() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    lengths: list[int] = gather(len(tensor))
    if rank():
        dist.send(tensor.cpu().contiguous().view(torch.uint8), 0)
        return tensor
    parts = [tensor.cpu()]
    for other, length in enumerate(lengths[1:], 1):
        parts.append(torch.empty(length, *tensor.shape[1:], dtype=tensor.dtype))
        dist.recv(parts[-1].view(torch.uint8), other)
    return torch.cat(parts)


def _reachable(tensor: "Tensor") -> "Tensor":
    """Where a collective reaches it: on the processor, or on a CUDA device."""
    return tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()


# ------------------------------------------------------------------------------------------------------- how a job ends


def say_end(line: str) -> None:
    """How the job ends, on standard error, if no other process of it has said so: of all that fail for one reason, one says it.

    A thread that says it (`say_when_ended`) ends this process no sooner than another has finished its line.
    """
    with _saying:
        if _first_to_say():
            print(f"losa: {line}", file=sys.stderr, flush=True)


def _first_to_say() -> bool:
    """Asks torchrun's store, which outlives the processes; where there is none, everyone says it."""
    if launched() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store: Any = getattr(dist, "TCPStore")(  # noqa: B009  (mypy does not see it)
            host, port, is_master=False, timeout=STORE, wait_for_workers=False
        )
        return bool(store.add(f"losa/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1)
    except RuntimeError:
        return True


def leave(code: int) -> NoReturn:
    """End this process with all that is to be done at exit, but without taking the interpreter down.

    A thread of gloo that still holds a finished work would free its tensors then, which aborts the process (pytorch's pull
    request 179291): seen once in some forty runs, after everything was saved.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say_when_ended() -> None:
    """Let a thread say it if torchrun ends this process, as it does with all when one dies: the main thread may be in a
    collective that never returns."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def watch() -> None:
        while os.read(read, 1) != bytes([signal.SIGTERM]):
            pass
        say_end(f"torchrun ended this process, with the job or because another has ended: {RESUME}")
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
