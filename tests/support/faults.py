"""`requant` as a process of its own, killed or refused something at a chosen file operation.

Every operation by which a process changes what is on the disk is seen: Python tells of opening,
renaming, deleting and making directories (audit events); `os.fsync` and the writer's writes are
wrapped.  An operation that is refused or killed at has not happened, but for writes: half of the
bytes are there.  Reads of source tensors (`os.preadv`) are counted apart.
"""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants
from support.kill import process_context

from pipeline import hybrid
from pipeline.checkpoint import writer
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.hybrid.generate import stream_text
from pipeline.recipe import Publish
from pipeline.stages.publish import publish_model
from pipeline.stages.shard import split_existing
from pipeline.stages.validate import validate_model
from pipeline.stages.verify import verify_model

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
"""Audit events of operations that change a disk; those of `open` are looked at for how."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
STRUCK = "struck at: "
TAKES_ROOM = ("open", "write", "os.mkdir", "fsync")
"""What a full disk refuses."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process; the default: nothing."""

    at: int | None = None
    """The operation that it happens at."""
    targets: frozenset[tuple[str, int]] = frozenset()
    """Operations of which the first kills, each told by what `plain` makes of it and how many such
    went before: a resumed run does fewer than a whole one.  The log then ends in STRUCK and what it
    was."""
    delay: float = 0.0
    """Seconds after that operation at which the process is killed."""
    error: int | None = None
    """What the system answers there; a full disk goes on answering so.  None: the process is
    killed."""
    read: int | None = None
    """The read of source tensors that fails with `error`; without one it ends too soon."""
    short: bool = False
    """Every read of source tensors gives a part only of what was asked for."""
    deletes: str | None = None
    """A directory that disappears at the operation `at`, instead of a kill."""
    seconds: float | None = None
    """When the process is killed from outside."""
    file_bytes: int | None = None
    """Largest file that the system allows."""
    clock: bool = False
    """The clock goes back by an hour whenever it is looked at."""
    memory: int | None = None
    """Bytes of address space that the process may take beside what it has when it starts."""


@dataclass(frozen=True)
class Outcome:
    """What became of a process."""

    code: int
    """Exit code; negative: the signal that killed it."""
    said: str
    operations: tuple[str, ...]
    """Those that were done, as "what path"; empty for a process that was killed."""
    reads: int = 0

    @property
    def line(self) -> str:
        """The last line, which says what is wrong."""
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""


def requant(
    arguments: list[Any], folder: Path, fault: Fault | None = None, **variables: str
) -> Outcome:
    """`requant ARGUMENTS` with a fault; operations in `folder` count."""
    fault = fault or Fault()
    context = process_context()
    mine, theirs = context.Pipe(duplex=False)
    log = folder.parent / f"{folder.name}.log"
    words = [str(word) for word in arguments]
    process = context.Process(target=_child, args=(theirs, words, folder, fault, log, variables))
    process.start()
    theirs.close()
    timer = threading.Timer(fault.seconds or 0, process.kill)
    if fault.seconds is not None:
        timer.start()
    operations: tuple[str, ...] = ()
    reads = 0
    with contextlib.suppress(EOFError):
        operations, reads = mine.recv()
    process.join()
    timer.cancel()
    mine.close()
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return Outcome(process.exitcode or 0, said, operations, reads)


def plain(operation: str) -> str:
    """An operation without what differs from process to process."""
    return re.sub(r"\.\d+\.tmp$", ".tmp", operation)


def _child(
    answer: Any,
    arguments: list[str],
    folder: Path,
    fault: Fault,
    log: Path,
    variables: dict[str, str],
) -> None:
    os.environ |= variables
    if "HF_ENDPOINT" in variables:
        constants.HF_HUB_DISABLE_XET = True  # read when it was imported
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    watch = Watch(folder, fault)
    watch.install()
    sys.argv = ["requant", *arguments]
    try:
        main()
    finally:
        watch.off = True
        answer.send((tuple(watch.done), watch.reads))


class Watch:
    """Sees every operation of its process, and strikes."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault = str(folder), fault
        self.done: list[str] = []
        self.reads = 0
        self.off = False
        self._seen: Counter[str] = Counter()
        self._struck = False
        self._lock = threading.RLock()
        self._full = False

    def install(self) -> None:
        """For the rest of the process's life."""
        fault = self.fault
        fsync, store, preadv = os.fsync, writer._Digest._store, os.preadv

        def synced(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.operation("fsync", path)
            fsync(descriptor)

        def stored(digest: Any, data: Any) -> None:
            path = str(Path(f"/proc/self/fd/{digest.stream.fileno()}").readlink())
            self.operation("write", path, lambda: store(digest, data[: len(data) // 2]))
            store(digest, data)

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            number, self.reads = self.reads, self.reads + 1
            if number == fault.read:
                if fault.error is None:
                    return 0
                raise OSError(fault.error, os.strerror(fault.error))
            if fault.short:
                buffers = [buffers[0][: len(buffers[0]) // 2 + 1]]
            return preadv(descriptor, buffers, offset)

        os.fsync, os.preadv = synced, read
        writer._Digest._store = stored
        sys.addaudithook(self._event)
        if fault.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
        if fault.memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + fault.memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if fault.clock:
            _turn_back_the_clock()

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if self.off or event not in CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
            return
        path = args[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, (str, Path)):
            relative = not Path(path).is_absolute() and event in ("os.remove", "os.rmdir")
            self.operation(event, self.folder if relative else str(path))

    def operation(self, what: str, path: str, half: Callable[[], None] | None = None) -> None:
        """About to happen: count it, or strike."""
        if self.off or not path.startswith(self.folder):
            return
        with self._lock:
            fault = self.fault
            here = self._is_target(f"{what} {path}")
            if here and fault.delay:
                Thread(target=self._strike_later, daemon=True).start()
                here = False
            if self._full and what in TAKES_ROOM:
                raise OSError(fault.error, os.strerror(fault.error), path)
            if (here or len(self.done) == fault.at) and not self._full:
                self.off = True
                if fault.deletes is not None:
                    shutil.rmtree(fault.deletes)
                elif fault.error is None:
                    if half is not None:
                        half()
                    os.kill(os.getpid(), signal.SIGKILL)
                elif what in TAKES_ROOM or fault.error not in writer.FULL:
                    self.off = False
                    self._full = fault.error in writer.FULL
                    self.done.append(f"{what} {path}")
                    if half is not None:
                        self.off = True
                        half()
                        self.off = False
                    raise OSError(fault.error, os.strerror(fault.error), path)
                else:
                    self._full = True  # nothing is refused before something takes room
                self.off = False
            self.done.append(f"{what} {path}")

    def _is_target(self, operation: str) -> bool:
        if self._struck or not self.fault.targets:
            return False
        name = plain(operation)
        self._seen[name] += 1
        self._struck = (name, self._seen[name] - 1) in self.fault.targets
        if self._struck:
            os.write(2, f"\n{STRUCK}{name}\n".encode())
        return self._struck

    def _strike_later(self) -> None:
        time.sleep(self.fault.delay)
        os.kill(os.getpid(), signal.SIGKILL)


def _turn_back_the_clock() -> None:
    real, looks = time.time, 0

    def backwards() -> float:
        nonlocal looks
        looks += 1
        return real() - 3600.0 * looks

    time.time = backwards
    time.time_ns = lambda: int(backwards() * 1e9)


def accepted(directory: Path, scratch: Path) -> list[str]:
    """The readers that take a directory for a model; none for a half-made one."""

    def verify() -> None:
        if verify_model(directory):
            raise UserError("not verified")

    def publish() -> None:
        wanted = Publish(repo="acme/half", license="apache-2.0")
        publish_model(directory, wanted, lambda _: None, unvalidated=True, dry_run=True)

    readers: dict[str, Callable[[], object]] = {
        "verify": verify,
        "hybrid.load": lambda: hybrid.load(directory),
        "validate": lambda: validate_model(directory, device_memory=4 << 30, thresholds={}),
        "generate": lambda: stream_text(directory, "a", 1, "4GiB", sys.stderr),
        "shard": lambda: split_existing(directory, scratch / "split", lambda _: None),
        "publish": publish,
    }
    taken = []
    for name, reader in readers.items():
        try:
            reader()
        except UserError:
            continue
        taken.append(name)
    return taken


def half_made(partial: Path) -> bool:
    """Whether a work directory is there that is not yet whole: sealing is its last step, and takes
    `.work` away from it."""
    return partial.is_dir() and (partial / ".work").is_dir()


FULL = errno.ENOSPC
