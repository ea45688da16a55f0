"""The run directory: what is saved when, atomically, so that a killed run goes on as if it had never stopped.

DIR/run/recipe.json    what was asked, of which model, with which versions, in which dtype it is computed
DIR/run/log.jsonl      one line an event, as they came: started, machine, begins and phase (seconds and peak memory of a
                       part of the work), dense, samples, rates, pruned, update, step, finished ...
DIR/run/files.json     what of DIR/* is losa's
DIR/run/finetuned.*    the dense model's linears, if it is fine-tuned first
DIR/run/dense.*        measurements of the dense model: features, Gram matrices, perplexity
DIR/run/before.*       measurements of a model that was pruned already, where that is recovered
DIR/run/pruned.*       weights, masks and pairs after the latest pruning, and the history so far
DIR/run/teacher-*.*    what the dense model says of the recovery rows
DIR/run/rate.*         the learning rate, if it was searched for
DIR/run/recovery.*     the pairs or weights being trained since, with the optimizer's state
DIR/run/dense-*, rates.*, masks-*   of a run from disk: features by block, rates, masks and errors of finished blocks
DIR/*                  the finished model; losa.json comes last. From disk, finished blocks are there as they are made

Every file is written beside its place, synced and renamed over it.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from losa import distributed
from losa.errors import LosaError
from losa.progress import Progress
from losa.recipe import Recipe
from losa.units import size
from losa.usage import Usage

T = TypeVar("T")
VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "datasets")
CLAIMED = "files.json"
CARD = "README.md"
REPORT = "report.html"
REPORT_MARK = b"<!doctype html><!-- a report of losa -->"  # how a report begins
STATES = ("finetuned", "dense", "before", "pruned", "rate", "rates", "recovery")
# Settings that decide how a run is computed, not what comes out but for rounding: others may be given when it goes on.
CHANGEABLE = ("micro_batch_size", "checkpointing", "checkpoint_minutes", "device")
FORMAT = 1  # of the run directory; a reader refuses others


@dataclass
class Saved:
    tensors: dict[str, Any]
    meta: dict[str, Any]


class Run:
    """A run and its directory; without one (None) nothing is kept and nothing can be resumed.

    Of several processes only rank 0 writes and shows progress; all read, so that the directory must be the same to all.
    """

    def __init__(self, output: Path | None, progress: Progress) -> None:
        self.output, self.progress = output, progress if distributed.leads() else Progress(quiet=True)
        self.writes = output is not None and distributed.leads()
        self._saved_at = time.monotonic()
        self._lock: int | None = None
        self._early: list[str] | None = []  # what is to be logged once there is a folder
        self.from_disk: bool | None = None  # whether the model stays on disk, once it has been chosen
        self.steps = 0  # of the recipe, once it is known

    def start(
        self,
        recipe: Recipe,
        source: str,
        overwrite: bool = False,
        from_disk: bool = False,
        computed: dict[str, str] | None = None,
    ) -> None:
        """Begin in `output`. computed: the dtype and the device type that the recipe's come to on this machine.

        Raises LosaError if something is there that may not be replaced, or it cannot be written.
        """
        self.steps = recipe.steps
        if self.output is None or not self.writes:
            return
        asked = _asked(recipe, source)
        where = {"from_disk": from_disk, "computed": computed or {}, "folder": str(Path.cwd())}
        with writing(self.output):
            check_output(self.output, overwrite)
            self._take_lock()
            _remove(self.output)
            self.from_disk = from_disk
            write_json(self.folder / "recipe.json", asked | where)
        self._begin_log("started", asked)

    def resume(self, recipe: Recipe, source: str, computed: dict[str, str] | None = None) -> None:
        """Go on with what `output` holds. Raises LosaError if it holds no run, or one in another dtype or with other settings
        than those of CHANGEABLE."""
        if self.output is None:
            raise LosaError("nothing to resume: name the output folder of the run")
        self.steps = recipe.steps
        asked = _asked(recipe, source)
        self._check_same(asked, computed or {})
        if not self.writes:
            return
        with writing(self.output):
            self._take_lock()
            if not self.finished:
                path = self.folder / "recipe.json"
                kept = json.loads(path.read_text())
                kept["recipe"] |= {name: asked["recipe"][name] for name in CHANGEABLE}
                write_json(path, kept)
            for left in [p for name in ("*.new", "export", "shard", "activations*") for p in self.folder.glob(name)]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            log = self.folder / "log.jsonl"
            if log.is_file() and not log.read_bytes().endswith(b"\n"):  # killed in the middle of a line
                with log.open("a") as file:
                    file.write("\n")
        self._begin_log("resumed", asked)

    @property
    def folder(self) -> Path:
        assert self.output is not None
        return self.output / "run"

    def _check_same(self, asked: dict[str, Any], computed: dict[str, str]) -> None:
        assert self.output is not None
        kept = read_recipe(self.output)
        self.from_disk = kept["from_disk"]
        for name in ("command", "source", "versions"):
            if kept[name] != asked[name] and not (name == "source" and may_be_same(kept[name], asked[name])):
                raise LosaError(
                    f"{self.output} was started with {name} {kept[name]}, not {asked[name]}: start a new run"
                )
        was, now = ({"dtype": "", "device": ""} | found for found in (kept["computed"], computed))
        if was["dtype"] and now["dtype"] and not self.finished:
            if was["dtype"] != now["dtype"]:
                raise LosaError(
                    f"{self.output} was started in {was['dtype']}, this would be {now['dtype']}: resume it with "
                    f"--dtype {was['dtype']}"
                )
            if was["device"] != now["device"]:
                self.say(f"begun on {was['device']}, resumed on {now['device']}: the two round differently")
        for name, value in asked["recipe"].items():
            if name == "dtype" and was["dtype"] and was["dtype"] == now["dtype"]:
                continue  # auto, and what it comes to
            before = kept["recipe"].get(name)
            if before != value and name not in CHANGEABLE:
                raise LosaError(
                    f"{self.output} was started with {name} = {before!r}, not {value!r}: resume it as it was"
                )
            if before != value and name == "micro_batch_size":
                self.say(f"begun with {name} {before}, resumed with {value}: sums are rounded in another order")

    def _take_lock(self) -> None:
        """The system frees it however the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise LosaError(f"{self.output} is in use by another losa: wait for it, or choose another output") from None

    def close(self) -> None:
        self.progress.stop()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        return self.output is not None and (self.output / "losa.json").is_file()

    # ------------------------------------------------------------------------------------------------------- state

    def save(self, name: str, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Keep `tensors` (contiguous) and `meta` (JSON) as `name`, in place of what was there, in one step."""
        if not self.writes:
            return
        from safetensors.torch import save_file

        path = self.path(name)
        with writing(self.folder), replacing(path) as new:
            save_file(tensors, new, {"losa": json.dumps(meta)})
        self._saved_at = time.monotonic()

    def load(self, name: str) -> Saved | None:
        """What was kept as `name`, on the CPU, or None; the same to all processes, which wait for each other here."""
        path = self.path(name) if self.output else None
        saved = None if path is None or not path.is_file() else self._read(path)
        distributed.check_alike({f"what they find in {path}": saved and saved.meta})
        return saved

    @staticmethod
    def _read(path: Path) -> Saved:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return Saved(tensors, json.loads(file.metadata()["losa"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LosaError(f"{path} is damaged ({error}): start a new run") from None

    def path(self, name: str) -> Path:
        """Where `save` keeps the tensors of that name."""
        return self.folder / f"{name}.safetensors"

    def drop_states(self) -> None:
        """Forget what only resuming needs: a finished run."""
        if not self.writes:
            return
        for name in (*STATES, "teacher-*", "dense-*", "masks-*"):
            for path in self.folder.glob(f"{name}.safetensors"):
                path.unlink(missing_ok=True)

    @property
    def claimed(self) -> list[str]:
        """The names in `output` that are losa's."""
        return _claimed(self.folder)

    def claim(self, names: list[str]) -> None:
        """Say which names in `output` are losa's, before they are put there; --overwrite takes away these and no others."""
        write_json(self.folder / CLAIMED, sorted({*self.claimed, *names}))

    def checkpoint_due(self, minutes: float) -> bool:
        """Whether so much time has passed since something was saved."""
        return self.writes and time.monotonic() - self._saved_at >= 60 * minutes

    # ------------------------------------------------------------------------------------------------------ telling

    def log(self, event: str, **fields: Any) -> None:
        """Add a line to log.jsonl, once there is one: before, it is kept for then."""
        if not self.writes:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        if self._early is not None:
            self._early.append(line)
        else:
            self._write(line)

    def _begin_log(self, event: str, asked: dict[str, Any]) -> None:
        early, self._early = self._early or [], None
        self.log(event, **asked)
        for line in early:
            self._write(line)

    def _write(self, line: str) -> None:
        with writing(self.folder), (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """A part of the work: logged when it begins, and with what it took when it ends well. Phases do not nest."""
        where = {"phase": name} if step is None else {"phase": name, "step": step}
        self.log("begins", **where)
        of = f"{step}/{self.steps}" if self.steps else step
        with self.progress.working(f"step {of}: {name}" if step else name), Usage() as usage:  # 0: fine-tuned first
            yield
        self.log("phase", **where, **usage.found)

    def track(self, items: Sequence[T], what: str, unit: str = "block", done: int = 0) -> Iterator[T]:
        """`items` (each a `unit`) one by one, showing how far and how long; `done` came before."""
        return self.progress.track(items, what, unit, done)

    def note(self, text: str) -> None:
        """What to say of the present item."""
        self.progress.note(text)

    def say(self, line: str) -> None:
        self.progress.say(line)

    def say_if(self, line: str) -> None:
        """What need not be said where it is empty."""
        if line:
            self.say(line)


def versions() -> dict[str, str]:
    """Of what decides the result's bytes."""
    from losa import __version__

    return {"losa": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in VERSIONED
    }


def code() -> str:
    """A digest of losa's source, which a version alone does not tell from a changed copy."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_output(output: Path, overwrite: bool = False) -> None:
    """Raise LosaError if a new run may not be put there: a file, a run not to be overwritten, anything that is not a run."""
    if output.exists() and not output.is_dir():
        raise LosaError(f"output {str(output)!r} is a file: name a folder")
    if output.is_dir() and any(output.iterdir()) and not _hardly_begun(output):
        if not (output / "run" / "recipe.json").is_file():
            raise LosaError(f"output {str(output)!r} exists and is no run of losa: name another folder")
        if not overwrite:
            raise LosaError(f"output {str(output)!r} holds a run: --resume goes on with it, --overwrite replaces it")
        _claimed(output / "run")  # what would be taken away can be read
    parent = _nearest(output)
    if not os.access(parent, os.W_OK):
        raise LosaError(f"output {str(output)!r} cannot be written: no permission in {str(parent)!r}")


def short_of_room(output: Path, needed: int) -> str:
    """What to say where the disk of `output` has less room than `needed`, about, in bytes; empty if it has enough."""
    there = shutil.disk_usage(_nearest(output))
    free = there.free + sum(path.stat().st_size for path in output.rglob("*") if path.is_file())  # what is overwritten
    if needed <= free or not there.total:  # not a disk at all, as /proc
        return ""
    what = f"about {size(needed)} will be written to {str(output)!r}, {size(free)} are free there"
    return f"the disk may not suffice: {what}"


def _nearest(output: Path) -> Path:
    """It, or the nearest folder above it that is there."""
    return next(path for path in [output, *output.absolute().parents] if path.is_dir())


def read_recipe(output: Path) -> dict[str, Any]:
    """run/recipe.json. Raises LosaError if `output` holds no run, or one of another format."""
    path = output / "run" / "recipe.json"
    if not path.is_file():
        raise LosaError(f"{str(output)!r} holds no run to resume: start it without --resume")
    try:
        kept = json.loads(path.read_text())
        if kept["format"] != FORMAT:
            raise LosaError(f"{path} is of format {kept['format']}, this losa reads {FORMAT}: start a new run")
        names = ("command", "source", "recipe", "versions")
        added = {"from_disk": kept.get("from_disk", False), "computed": kept.get("computed", {})}
        added["folder"] = str(kept.get("folder", ""))
        return added | {name: kept[name] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LosaError(f"{path} is damaged: start a new run in another folder, or with --overwrite") from None


def read_made(path: Path, any_format: bool = False) -> dict[str, Any]:
    """losa.json. Raises LosaError for a damaged one, and for one of another format, of which nothing else is known."""
    kinds = {"command": str, "source": str, "versions": dict, "recipe": dict, "measurements": dict, "history": list}
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if made["format"] == FORMAT:
            if wrong := [name for name, kind in kinds.items() if not isinstance(made[name], kind)]:
                raise TypeError(f"{wrong[0]} is no {kinds[wrong[0]].__name__}")
            measured = made["measurements"]
            if not all(isinstance(found, dict) for found in (measured["sparse"], *measured.values())):
                raise TypeError("measurements hold what is no dict")
            steps = made["history"]
            if not steps or not all(isinstance(step, dict) and isinstance(step["ranks"], list) for step in steps):
                raise TypeError("history is no list of steps with ranks")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, error) from None
    if made["format"] != FORMAT and not any_format:
        raise LosaError(f"{path} is of format {made['format']}, this losa reads {FORMAT}: use the losa that wrote it")
    return made


def rates_found(history: list[dict[str, Any]]) -> list[float]:
    """The learning rates that trials found in the steps of `history`; none where one was named."""
    return sorted({step["learning_rate"] for step in history if "learning_rate" in step})


def damaged(path: Path, error: Exception) -> LosaError:
    """What to raise where a losa.json could not be read for that."""
    what = f"{type(error).__name__}: {error}"
    return LosaError(f"{path} is damaged ({what}): make the model again, or take that file away")


def may_be_same(was: str, now: str) -> bool:
    """Whether two names may be of one model: written otherwise, or moved. Whether they are, only what is in them says."""
    there = Path(os.path.expanduser(now))
    return was == now or (there.is_dir() and (not Path(was).exists() or Path(was).resolve() == there.resolve()))


def _asked(recipe: Recipe, source: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "command": recipe.command,
        "source": source,
        "recipe": recipe.to_json(),
        "versions": versions(),
    }


def _hardly_begun(output: Path) -> bool:
    """Whether there is no more than what a run killed before its recipe was written leaves."""
    inside = list(output.iterdir())
    if any(path.name != "run" for path in inside):  # perhaps a home folder: not to be gone through
        return False
    inside += [path for run in inside if run.is_dir() for path in run.iterdir()]
    return {str(path.relative_to(output)) for path in inside} <= {"run", "run/lock", "run/recipe.json.new"}


def _claimed(folder: Path) -> list[str]:
    """The names that files.json says are losa's. Raises LosaError for a damaged one."""
    path = folder / CLAIMED
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text())
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError
    except (ValueError, RecursionError):
        raise LosaError(
            f"{path} is damaged: name another output, or take that file away, and what it named stays as if it were yours"
        ) from None
    return [name for name in names if "/" not in name and name not in ("", ".", "..", "run")]


def _remove(output: Path) -> None:
    """Take away a run: losa.json first, so that no half of it looks finished; its recipe stays until it is replaced.

    Killed in between, it is still a run, to be resumed or overwritten. Files that are not losa's stay.
    """
    folder = output / "run"
    ours = [output / name for name in _claimed(folder)]
    (output / "losa.json").unlink(missing_ok=True)
    ours += [output / REPORT] if is_report(output / REPORT) else []
    for path in [*ours, *(path for path in folder.iterdir() if path.name not in ("lock", "recipe.json"))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def in_use(output: Path) -> bool:
    """Whether a losa is at work in `output`."""
    try:
        lock = os.open(output / "run" / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)  # and the lock with it, if it was to be had
    return False


def is_report(path: Path) -> bool:
    """Whether that is a page that `losa report` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(REPORT_MARK)) == REPORT_MARK


def write_json(path: Path, value: Any) -> None:
    """JSON to read, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`content` at `path`, whole or not at all."""
    with replacing(path) as new:
        new.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path given; it is then synced and renamed to `path`, or taken away if writing fails."""
    new = path.with_name(path.name + ".new")
    try:
        yield new
        sync(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_readable(path: Path) -> None:
    """Give a file the rights of any other: safetensors makes files that only their owner reads."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(place: Path, note: str = "; what was saved before can be resumed") -> Iterator[None]:
    """Turns what the file system refuses into a LosaError that names the place."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LosaError(f"{str(place)!r} cannot be written: {reason}{note}") from error
