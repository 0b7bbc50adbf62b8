"""The tokenizer of a model, in a process of its own, and texts through it.

tokenizer.json holds regular expressions and replacements of a stranger's, which the tokenizers
library runs without limits of time or memory, when it loads them too; nothing in this process could
stop it.  So the tokenizer lives in a copy (fork) of this process, which costs no imports, has no
files of this one, and is ended by the kernel when a request takes too long.  With it goes the
library's cache of words, which it keeps for every tokenizer that a thread ever used.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.calibration.template_child import limit_memory
from pipeline.checkpoint.admission import refuse_code
from pipeline.checkpoint.index import resolve_inside
from pipeline.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these holds a tokenizer's vocabulary."""
READ_BESIDE = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
"""What transformers reads to make one."""
SECONDS = 60.0
"""To load a tokenizer, or for one text; sound ones take a second for a vocabulary of 150,000."""
CHARACTERS_A_SECOND = 20_000
"""A long text gets more time; sound tokenizers read forty times as much."""
MEMORY_BYTES = 4 << 30
"""On top of what this process has."""
BYTES_A_CHARACTER = 512
"""And more memory for a text: a token takes about 150 bytes while it is made."""


class Tokenizer:
    """A tokenizer in a process of its own, which ends with this object."""

    def __init__(self, model: Path) -> None:
        """Raises CheckpointError for one that cannot be loaded within the limits."""
        self.model = model
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, str(model), SECONDS), daemon=True
        )
        self._process.start()
        theirs.close()
        weakref.finalize(self, _end, self._process, self._connection)
        about = self._answer("cannot be loaded", SECONDS)
        self.chat_template: str | None = about["template"]
        self.special_tokens: Mapping[str, Any] = about["special"]

    def vocabulary(self) -> dict[str, int]:
        """Every token, as the vocabulary spells it, and its id."""
        return dict(self._ask("tells no vocabulary", SECONDS, what="vocabulary"))

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; `special`: with those that begin or end one."""
        seconds = SECONDS + len(text) / CHARACTERS_A_SECOND
        failed = f"cannot read a text of {len(text):,} characters"
        return list(self._ask(failed, seconds, what="ids", text=text, special=special))

    def decode(self, ids: Sequence[int] | Tensor, **options: bool) -> str:
        """The text of tokens; `options` as transformers' `decode` has them."""
        failed = f"cannot spell {len(ids):,} tokens"
        return str(
            self._ask(failed, SECONDS, what="decode", ids=[int(i) for i in ids], options=options)
        )

    def _ask(self, failed: str, seconds: float, **question: object) -> Any:  # noqa: ANN401
        asked = json.dumps({"seconds": seconds, **question}).encode()
        with contextlib.suppress(OSError):  # its process has ended: the answer will be missing
            self._connection.send_bytes(asked)
        return self._answer(failed, seconds)

    def _answer(self, failed: str, seconds: float) -> Any:  # noqa: ANN401
        try:
            found = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            late = self._process.exitcode == -signal.SIGALRM
            why = (
                f"it takes longer than {seconds:.0f} s; it may never end"
                if late
                else "its process ended; it may need more memory than there is, or than the"
                f" {MEMORY_BYTES / 2**30:g} GiB that it may take"
            )
            found = {"error": why}
        if "error" in found:
            raise CheckpointError(f"{self.model}: the tokenizer {failed} ({found['error']})")
        return found["found"]


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model directory; never runs code from it.

    Raises CheckpointError for one that is missing (transformers would make up an empty one), is
    damaged, takes forever, asks for code of its own, or links to files elsewhere.
    """
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{model}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it too"
        )
    refuse_code(model)
    for name in READ_BESIDE:
        if (model / name).is_symlink() or (model / name).exists():
            resolve_inside(model, name)  # refuses links to elsewhere
    return Tokenizer(model)


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids int64 [tokens] of a text, without special tokens."""
    return torch.tensor(tokenizer.ids(text), dtype=torch.int64)


def _end(process: BaseProcess, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.join()


def _serve(connection: Connection, model: str, seconds: float) -> None:
    """The child: answer until the parent closes the pipe."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever it is doing
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _leave_all_to_the_parent(connection.fileno())
    limit_memory(MEMORY_BYTES)
    tokenizer: PreTrainedTokenizerBase | None = None
    answer: dict[str, object]
    question: dict[str, Any] = {}
    while True:
        try:
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(
                    model, trust_remote_code=False, local_files_only=True
                )
                answer = {"found": _about(tokenizer)}
            else:
                answer = {"found": _asked(tokenizer, question)}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY_BYTES / 2**30:g} GiB"}
        except BaseException as error:  # the library raises no narrower class, even panics
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": line}
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send_bytes(json.dumps(answer).encode())
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, question["seconds"])
        limit_memory(MEMORY_BYTES + BYTES_A_CHARACTER * len(question.get("text", "")))


def _leave_all_to_the_parent(kept: int) -> None:
    """Close its files (a lock would stay with us), clean up nothing of its, say nothing."""
    gc.disable()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _about(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # has none, or several and no default
        template = None
    return {"template": template, "special": dict(tokenizer.special_tokens_map)}


def _asked(tokenizer: PreTrainedTokenizerBase, question: Mapping[str, Any]) -> object:
    if question["what"] == "vocabulary":
        return tokenizer.get_vocab()
    if question["what"] == "decode":
        return tokenizer.decode(question["ids"], **question["options"])
    # Verbose, it warns about texts longer than the model's context, which windows are cut from.
    return tokenizer(question["text"], add_special_tokens=question["special"], verbose=False)[
        "input_ids"
    ]
