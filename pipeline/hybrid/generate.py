"""Continue a text with a model loaded hybrid, token by token as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from transformers import TextStreamer

from pipeline.calibration import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.hybrid.loader import load


class _Stream(TextStreamer):
    """Writes finished words to a stream, and notes when each token was there."""

    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        # Of a tokenizer it asks for `decode` only.
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._out = out
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
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
    placement: str = "cpu",
) -> float:
    """Write the continuation of `prompt` to `out`; return tokens per second after the first token.

    Greedy, or as the directory's generation_config.json says; 0.0 when a single token ended it.
    Raises CheckpointError for a tokenizer that is missing or damaged, UserError for an empty
    prompt, and what `load` raises.
    """
    path = Path(model)
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer.ids(prompt, special=True)], dtype=torch.int64)
    if not ids.numel():
        raise UserError("the prompt has no tokens: give at least a word")
    loaded = load(path, device_memory=device_memory, placement=placement)
    ids = ids.to(loaded.device)
    stream = _Stream(tokenizer, out)
    with torch.inference_mode():
        loaded.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=stream,
        )
    made = stream.times[1:]  # the first call hands over the prompt
    return (len(made) - 1) / (made[-1] - made[0]) if len(made) > 1 else 0.0
