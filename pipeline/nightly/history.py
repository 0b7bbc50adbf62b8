"""The local history: one row per job and night, kept by trackio (project `nightly`, one run a job).

trackio keeps a project in one SQLite file and shows it in its dashboard (`trackio show`).  Rows are
written through its public interface, in a process of its own (`trackio_rows.py`), because trackio
takes its folder from the environment when it is imported and can be told by the environment to
send rows elsewhere.  It offers no way to read rows back, so reading, the check for damage and
retention go to the file directly, by the standard library: a row is one line of its table
`metrics`, whose column `metrics` is our JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError
from pipeline.secrets import without_secrets

PROJECT = "nightly"
FILE = f"{PROJECT}.db"
RECORD = "record"
"""Key of a row's whole record; the figures stand beside it, where the dashboard draws them."""
WRITER_SECONDS = 120

Record = dict[str, Any]


class History:
    """Records of all jobs in one folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.kept_aside: Path | None = None
        """Where a damaged history was put, if there was one."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = self._read()
        except (sqlite3.DatabaseError, ValueError, KeyError):
            self.kept_aside = self._put_aside()
            self._records = {}
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written to ({error.strerror})") from None

    def of(self, job: str) -> Sequence[Record]:
        """Records of one job, oldest first."""
        return self._records.get(job, [])

    def append(self, records: Sequence[Record]) -> None:
        """Add one row per record; OutputError unless all of them are there afterwards."""
        if not records:
            return
        wanted = {name: len(self.of(name)) for name in (str(r["job"]) for r in records)}
        for record in records:
            wanted[record["job"]] += 1
        # Whatever would make trackio send rows to a server, a Space or a webhook stays out.
        environment = without_secrets(dict(os.environ))
        environment = {k: v for k, v in environment.items() if not k.startswith("TRACKIO_")}
        environment |= {"TRACKIO_DIR": str(self.folder.resolve()), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pipeline.nightly.trackio_rows"],
                input=json.dumps([_row(record) for record in records]),
                capture_output=True,
                text=True,
                env=environment,
                timeout=WRITER_SECONDS,
                check=False,
            )
            said = done.stderr
        except subprocess.TimeoutExpired:
            said = f"trackio took longer than {WRITER_SECONDS} s"
        try:
            self._records = self._read()
        except (sqlite3.DatabaseError, ValueError, KeyError) as error:
            said = f"{said}\n{error}"
        if any(len(self.of(name)) != count for name, count in wanted.items()):
            last = said.strip().splitlines()[-1:] or ["rows are missing"]
            raise OutputError(f"{self.path}: the history could not be written ({last[0]})")

    def prune(self, keep: int) -> int:
        """Forget all but each job's `keep` newest rows; returns how many were forgotten."""
        with self._connection("rw") as connection, connection:
            cursor = connection.execute(
                "DELETE FROM metrics WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER"
                " (PARTITION BY run_name ORDER BY id DESC) AS age FROM metrics) WHERE age > ?)",
                (keep,),
            )
            forgotten = cursor.rowcount
        self._records = self._read()
        return forgotten

    def _read(self) -> dict[str, list[Record]]:
        """All rows; raises DatabaseError, ValueError or KeyError when the file is damaged."""
        found: dict[str, list[Record]] = {}
        if not self.path.exists():
            return found
        with self._connection("rw") as connection:  # rw: a write-ahead log may have to be read
            state = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != ("ok",):
                raise sqlite3.DatabaseError(str(state))
            for name, text in connection.execute(
                "SELECT run_name, metrics FROM metrics ORDER BY id"
            ):
                found.setdefault(name, []).append(json.loads(text)[RECORD])
        return found

    @contextlib.contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True)
        try:
            yield connection
        finally:
            connection.close()

    def _put_aside(self) -> Path:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self.path.with_name(f"{FILE}.damaged-{stamp}")
        try:
            for suffix in ("", "-wal", "-shm"):
                part = self.path.with_name(FILE + suffix)
                if part.exists():
                    part.replace(target.with_name(target.name + suffix))
        except OSError as error:
            raise OutputError(
                f"{self.path} is damaged and cannot be moved ({error.strerror})"
            ) from None
        return target


def _row(record: Record) -> dict[str, Any]:
    """A record as trackio gets it: finite figures that can be drawn, and all of it beside them."""
    figures: Mapping[str, float | None] = record["figures"]
    drawn = {k: v for k, v in figures.items() if v is not None and math.isfinite(v)}
    return {**drawn, "failing": int(record["outcome"] != "ok"), RECORD: record}
