"""A brake on one job's process: it really runs slower, and knows nothing of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

PERIOD = 0.06


class Brake:
    """Lets the process of one nightly job run only `share` of the time, as cpulimit does.

    It is found by its command line, and braked from its first line of log on, so that nobody waits
    for imports at that pace.  Use as a context manager.
    """

    def __init__(self, job: str, share: float, under: Path) -> None:
        """`under`: where the night keeps its files, absolute; other nights' jobs are left alone."""
        self._under, self._mark = str(under), f"/{job}-"
        self._running, self._stopped = PERIOD * share, PERIOD * (1 - share)
        self._ended = threading.Event()
        self._braked = False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Brake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._braked:
            raise RuntimeError(f"no process of the job {self._mark[1:-1]} was found to be braked")

    def _work(self) -> None:
        process = None
        while not self._ended.is_set():
            process = process or self._find()
            if process is not None:
                process = process if self._signal(process, signal.SIGSTOP) else None
                self._braked |= process is not None
                time.sleep(self._stopped)
            if process is not None:
                process = process if self._signal(process, signal.SIGCONT) else None
            time.sleep(self._running)

    def _find(self) -> int | None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            asked = next((word for word in words if word.endswith(".recipe.json")), "")
            if "pipeline.nightly.worker" in words and self._under in asked and self._mark in asked:
                log = Path(asked.removesuffix(".recipe.json") + ".log")
                return int(folder.name) if log.stat().st_size else None
        return None

    @staticmethod
    def _signal(process: int, number: int) -> bool:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return False
        return True
