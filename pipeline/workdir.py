"""The work directory, its markers, and how a run resumes.

A result NAME is built in `NAME.partial/` beside its final place and renamed once, whole.  Files
that only the run itself needs live in `NAME.partial/.work/`:

    work.json               says that the directory is ours, and the fingerprint of the whole run
    markers/UNIT.json       one per finished unit: its output files with size and sha256, timings
    ...                     activations and other state between units

The fingerprint holds everything that can change a byte of the result: digests of the inputs, the
parts of the recipe that matter, versions, device kind, thread count and the fixed tile sizes.  A
run whose fingerprint differs from the one in work.json is refused with a line that names what
changed; otherwise each unit whose marker and files are in place is skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.checkpoint.admission import WORK
from pipeline.checkpoint.writer import FileRecord, sweep, write_json
from pipeline.errors import OutputError
from pipeline.evaluate.speed import peak_device_bytes, peak_host_bytes
from pipeline.hub.cache import refuse_hub_cache
from pipeline.system_errors import advice

MANIFEST = "work.json"
PEAKS = ("peak_host_bytes", "peak_device_bytes")
CONVERSION = "conversion.json"
"""In a finished output directory: how it was made; by its presence the directory is ours."""


@dataclass(frozen=True)
class Marker:
    """What a finished unit left behind."""

    unit: str
    outputs: tuple[FileRecord, ...]
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)
    """What later units and the report need to know, as plain JSON types."""
    peak_host_bytes: int = 0
    """Most memory of the process since the unit's stage began in it."""
    peak_device_bytes: int = 0


class WorkDirectory:
    """`NAME.partial/` of one output path; use as a context manager to hold its lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output.with_name(output.name + ".partial")
        self.internal = self.root / WORK
        self._lock: IO[str] | None = None

    def check(self) -> None:
        """Raise OutputError if the output or work directory exists and is not ours."""
        if self.internal.is_symlink():
            raise OutputError(f"{self.internal} is a symbolic link; move it away")
        for path in (self.output, self.root):
            refuse_immovable(path)
        refuse_hub_cache(self.output)
        if _occupied(self.output) and not (self.output / CONVERSION).is_file():
            raise OutputError(
                f"{self.output} is not empty and was not made by requant;"
                " choose another output.path"
            )
        if _occupied(self.root) and not self._is_ours():
            raise OutputError(
                f"{self.root} is not empty and is no work directory of requant; move it away"
            )

    def open(self, fingerprint: Mapping[str, Any]) -> None:
        """Create the directory, or take up an earlier run's; refuse another run's work."""
        self.check()
        (self.internal / "markers").mkdir(parents=True, exist_ok=True)
        for left in self.root.rglob(".*.tmp"):  # half-written files of a run that was killed
            left.unlink()
        wanted = json.loads(json.dumps(fingerprint))
        if not self.begun:
            write_json(self.internal / MANIFEST, {"schema": 1, "fingerprint": wanted})
        elif changed := difference(self.fingerprint(), wanted):
            raise OutputError(
                f"{self.root} holds unfinished work made differently: {changed};"
                " undo the change, or start again with --fresh"
            )

    @property
    def begun(self) -> bool:
        """Whether an earlier run has left unfinished work."""
        return (self.internal / MANIFEST).is_file()

    def __enter__(self) -> WorkDirectory:
        """Take the lock; OutputError when another run holds it."""
        path = self._aside(".lock")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            while self._lock is None:
                lock = open(path, "a", opener=_without_links)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run before may have deleted the file between our open and our lock.
                if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    self._lock = lock
                else:
                    lock.close()
        except BlockingIOError:
            lock.close()
            raise OutputError(f"another run is working on {self.output}") from None
        except OSError as error:
            raise OutputError(
                f"{self.output.parent}: cannot be written to ({error.strerror})"
                f"{advice(error) or '; choose another output.path'}"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Delete the work directory (and nothing that is not ours)."""
        self.check()
        self._discard()
        if self.root.exists():
            # Renamed first: what a kill leaves of it must not look like somebody else's.
            self.root.rename(self._aside(".discarded"))
            self._discard()

    def finished(self, unit: str) -> Marker | None:
        """The marker of a unit, if it is there and its files are in place with their sizes."""
        path = self._marker_path(unit)
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_text())
            outputs = tuple(FileRecord(**record) for record in raw["outputs"])
            peaks = {key: int(raw[key]) for key in PEAKS}
            marker = Marker(raw["unit"], outputs, raw["seconds"], raw["data"], **peaks)
        except (ValueError, TypeError, KeyError):  # damaged: as good as none
            return None
        for record in outputs:
            file = self.root / record.name
            if not file.is_file() or file.stat().st_size != record.size:
                return None
        return marker

    def markers(self) -> list[Marker]:
        """Markers of all finished units."""
        names = sorted(path.stem for path in (self.internal / "markers").glob("*.json"))
        return [marker for name in names if (marker := self.finished(name)) is not None]

    def fingerprint(self) -> dict[str, Any]:
        """What `open` was given; empty when that cannot be read any more."""
        try:
            manifest = json.loads((self.internal / MANIFEST).read_text())
            fingerprint: dict[str, Any] = manifest["fingerprint"]
        except (OSError, ValueError, TypeError, KeyError):
            return {}
        return fingerprint

    def finish(
        self, unit: str, outputs: Sequence[FileRecord], seconds: float, data: Mapping[str, Any]
    ) -> Marker:
        """Record a unit as done; its files must be written and synced before."""
        peaks = {"peak_host_bytes": peak_host_bytes(), "peak_device_bytes": peak_device_bytes()}
        marker = Marker(unit, tuple(outputs), seconds, dict(data), **peaks)
        write_json(
            self._marker_path(unit),
            {
                "unit": unit,
                "outputs": [asdict(record) for record in outputs],
                "seconds": round(seconds, 3),
                **peaks,
                "data": dict(data),
            },
        )
        return marker

    def publish(self) -> None:
        """Give the finished directory its final name; a previous result of ours is replaced.

        Three renames, each atomic; `recover` completes them after a kill at any point between.
        """
        self.internal.rename(self._aside(".work"))
        if self.output.exists():
            self.output.rename(self._aside(".previous"))
        self.root.rename(self.output)
        _sync_directory(self.output.parent)
        self._discard()

    def recover(self) -> None:
        """Complete a `publish` that was cut off, and delete half-written files of a result.

        The latter are what a killed process has left of a report, page or card.
        """
        sweep(self.output)
        if not self._aside(".work").exists():
            self._discard()
            return
        if self.root.exists():
            if self.output.exists():
                self.output.rename(self._aside(".previous"))
            self.root.rename(self.output)
        self._discard()

    def _aside(self, suffix: str) -> Path:
        # What is found under these names is deleted: no one else's directory may be called so.
        ours = suffix if suffix == ".lock" else f".requant{suffix}"
        return self.output.with_name(f".{self.output.name}{ours}")

    def _is_ours(self) -> bool:
        """Whether the (non-empty) work directory was made by us."""
        if self.begun or self._aside(".work").exists():  # the latter: killed within `publish`
            return True
        # Killed within `open`, before the manifest was there.
        files = [path for path in self.root.rglob("*") if not path.is_dir()]
        return self.internal.is_dir() and all(path.suffix == ".tmp" for path in files)

    def _discard(self) -> None:
        for suffix in (".previous", ".discarded", ".work"):
            if self._aside(suffix).exists():
                _remove(self._aside(suffix))

    def _marker_path(self, unit: str) -> Path:
        return self.internal / "markers" / f"{unit}.json"


def refuse_immovable(path: Path) -> None:
    """OutputError for a path that no directory could be renamed to, or from, if it exists."""
    if path.is_symlink():
        raise OutputError(f"{path} is a symbolic link; give the real path, or move it away")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} exists and is not a directory")
    if path.exists() and path.stat().st_dev != path.parent.stat().st_dev:
        raise OutputError(
            f"{path} is a file system of its own, so that nothing can be renamed to or from"
            " it; set output.path to a directory inside it"
        )


def difference(found: object, wanted: object, where: str = "") -> str | None:
    """The first place where two JSON values differ, as "key was X, is now Y"; None if nowhere."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            at = f"{where}.{key}" if where else key
            if key not in found or key not in wanted:
                return f"{at} was {found.get(key, 'absent')}, is now {wanted.get(key, 'absent')}"
            inner = difference(found[key], wanted[key], at)
            if inner:
                return inner
        return None
    return None if found == wanted else f"{where} was {found}, is now {wanted}"


def _remove(directory: Path) -> None:
    """Delete a directory; a second for four gigabytes, unless several files go at once."""
    with ThreadPoolExecutor(8, thread_name_prefix="remove") as pool:
        for removed in [pool.submit(p.unlink) for p in directory.glob("*.safetensors")]:
            removed.result()
    shutil.rmtree(directory)


def _occupied(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _without_links(path: str, flags: int) -> int:
    """Opens a file, but nothing that a link of that name leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
