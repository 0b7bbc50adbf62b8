"""Continue a text with a model loaded hybrid, token by token as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import TextStreamer

from pipeline.calibration import Tokenizer, load_tokenizer
from pipeline.checkpoint.admission import refuse_unfinished
from pipeline.errors import CheckpointError, UserError
from pipeline.hybrid.loader import load
from pipeline.hybrid.native.crew import crew_of
from pipeline.hybrid.use import Shares, UseCounter


@dataclass(frozen=True)
class Generated:
    """How a text came about."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Until the first token was there; kernels that compile at first use are in it."""
    decode_seconds: float
    """From the first token to the last."""
    placement: dict[str, Any]
    """The model's `hybrid_placement`."""
    prefill_use: Shares
    decode_use: Shares
    """Both empty unless they were asked for."""

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first; 0.0 when there was none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class _Stream(TextStreamer):
    """Writes finished words to a stream, and notes when each token was there."""

    def __init__(
        self, tokenizer: Tokenizer, out: TextIO, at_first_token: Callable[[], None]
    ) -> None:
        # Of a tokenizer it asks for `decode` only.
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._out = out
        self._at_first_token = at_first_token
        self.times: list[float] = []
        """When the prompt was handed over, then when each token was."""

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._at_first_token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(text)
        self._out.flush()


def stream_text(
    model: Path | str,
    prompt: str,
    max_new_tokens: int,
    device_memory: str | int | None,
    out: TextIO,
    placement: str = "auto",
    *,
    announce: Callable[[str], None] = lambda _line: None,
    count_use: bool = False,
    native: bool = True,
    follow_use: bool = True,
) -> Generated:
    """Write the continuation of `prompt` to `out`.

    Greedy, or as the directory's generation_config.json says.  `announce` is told, once the model
    is loaded, what it cannot do as asked; `count_use`: count which roads experts' calls take;
    `native`, `follow_use`: see `hybrid.load`.
    Raises CheckpointError for a tokenizer that is missing or damaged, UserError for an empty
    prompt, what `load` raises, and what `Crew.check` finds.
    """
    path = Path(model)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    refuse_unfinished(path)
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer.ids(prompt, special=True)], dtype=torch.int64)
    if not ids.numel():
        raise UserError("the prompt has no tokens: give at least a word")
    loaded = load(
        path,
        device_memory=device_memory,
        placement=placement,
        native=native,
        follow_use=follow_use,
    )
    placed: dict[str, Any] = loaded.hybrid_placement  # type: ignore[assignment]
    for remark in placed["remarks"]:
        announce(remark)
    ids = ids.to(loaded.device)
    counter = UseCounter(loaded) if count_use else None
    prefill: Shares = {}

    def at_first_token() -> None:
        if counter is not None:
            prefill.update(counter.take())

    stream = _Stream(tokenizer, out, at_first_token)
    started = time.perf_counter()
    with torch.inference_mode():
        loaded.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=stream,
        )
    if (crew := crew_of(loaded)) is not None:
        crew.check()  # the last step: there is none behind it that would
    made = stream.times[1:]
    return Generated(
        prompt_tokens=ids.numel(),
        new_tokens=len(made),
        prefill_seconds=made[0] - started,
        decode_seconds=made[-1] - made[0],
        placement=placed,
        prefill_use=prefill,
        decode_use=counter.take() if counter is not None else {},
    )
