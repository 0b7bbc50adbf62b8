"""A tokenizer's chat template, rendered by a process that is ended when it takes too long.

A template is a program of the checkpoint's.  transformers runs it in a sandbox, which keeps it from
code but not from loops without end (two nested ranges are enough); a timer in this process could
not stop one that is inside a single call.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CalibrationError
from pipeline.secrets import without_secrets

CHILD = Path(__file__).with_name("template_child.py")
START_SECONDS = 120.0
"""For the process to start: it imports a part of transformers (1.4 s on an idle machine)."""
SECONDS = 10.0
"""For one conversation; sound templates take milliseconds."""
ANSWER_BYTES = 64 << 20


class TemplateRefusal(Exception):
    """Why a conversation was not rendered."""


class ChatTemplate:
    """The template of a tokenizer; use as a context manager, which ends its process."""

    def __init__(
        self, template: str, variables: Mapping[str, Any], seconds: float = SECONDS
    ) -> None:
        """`variables`: the special tokens that it may name; `seconds`: for one conversation."""
        self._seconds = seconds
        self._asked = {"template": template, "variables": dict(variables)}
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> ChatTemplate:
        environment = without_secrets(dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            self._ask(self._asked, START_SECONDS)
        except TemplateRefusal as refusal:
            self.__exit__()
            raise CalibrationError(f"the chat template cannot be run: {refusal}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def render(self, messages: list[Any]) -> str:
        """The text of a conversation; TemplateRefusal for what the template does not take."""
        found = self._ask(messages, self._seconds)
        if "text" not in found:
            raise TemplateRefusal(found.get("error", "no answer"))
        return str(found["text"])

    def _ask(self, question: object, seconds: float) -> dict[str, Any]:
        assert self._process is not None, "the template is used as a context manager"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question, default=str).encode() + b"\n")
            self._process.stdin.flush()
            found: dict[str, Any] = json.loads(self._line(time.monotonic() + seconds))
        except (BrokenPipeError, ValueError):
            raise TemplateRefusal("its process ended") from None
        return found

    def _line(self, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            if not ready:
                self._process.kill()
                raise TemplateRefusal("it takes longer than its time limit; it may never end")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data or len(self._rest) > ANSWER_BYTES:
                self._process.kill()
                raise TemplateRefusal("its process ended" if not data else "its text has no end")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line
