"""Decoding with fixed buffers: a step that a CUDA graph holds, and that runs without one as well.

A step takes the token of each sequence from one buffer, and leaves the logits in another and the
greedy next token in the first.  It is a chain of device work, cut only where the CPU computes
experts by torch's products; on a GPU each piece is captured once and replayed, so that Python
launches as many things as there are pieces: one where the CPU takes no part, or where the device
calls its threads itself (`handover.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.collection import collection_paused
from pipeline.errors import UserError
from pipeline.hybrid.cache import PREFILL_CHUNK, FixedCache
from pipeline.hybrid.native.crew import crew_of
from pipeline.hybrid.residency import DECAY, Residency
from pipeline.hybrid.steps import STEPS, Frame

Host = Callable[[], None]


class Decoder:
    """Prefill and decode steps of one model for a number of sequences, in fixed buffers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: int,
        length: int,
        *,
        residency: Residency | None = None,
        kernels: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        """tokens: sequences, each one token a step; length: tokens for which there is room.

        residency: told of every step, so that copies on the device follow use.
        kernels: fused where possible; graphs: captured and replayed; both by default on a GPU.
        """
        with torch.inference_mode(False):  # buffers may be written under any mode
            self._allocate(model, tokens, length)
        self._residency = residency
        cuda = model.device.type == "cuda"
        self._kernels = cuda if kernels is None else kernels
        self._graphs = cuda if graphs is None else graphs
        self._crew = crew_of(model)
        self._calls = 0
        self._halves: list[Any] = []
        self._captured: list[tuple[torch.cuda.CUDAGraph, Host | None]] = []

    def _allocate(self, model: PreTrainedModel, tokens: int, length: int) -> None:
        self.model: Any = model
        device = model.device
        self.length = length
        self.cache = FixedCache(model.config, length)
        self.tokens = torch.zeros(tokens, dtype=torch.int64, device=device)
        """int64 [T]: what the next step reads; a step leaves its greedy choice here."""
        self.logits = torch.zeros(
            (tokens, model.config.vocab_size), dtype=model.dtype, device=device
        )
        """[T, vocabulary], of the last step."""
        self.filled = 0
        """Tokens read so far."""
        self.busy = False
        """While the model itself is called from here."""
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._begins = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(
            (tokens, model.config.hidden_size), dtype=model.dtype, device=device
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was read."""
        self.cache.reset()
        self.filled = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read prompts int64 [T, n], padded on the left where mask [T, n] is 0; logits
        [T, vocabulary] behind the last token, whose argmax the next step reads.

        Begins anew; UserError for prompts that are longer than the buffers.
        """
        if ids.shape[1] >= self.length:
            raise UserError(f"{ids.shape[1]} tokens of prompt, room for {self.length}")
        self.reset()
        self._begins.zero_()
        positions = None
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            self._begins.copy_(mask.shape[1] - mask.sum(1))
        self.busy = True
        try:
            for first in range(0, ids.shape[1], PREFILL_CHUNK):
                part = slice(first, first + PREFILL_CHUNK)
                out = self.model(
                    input_ids=ids[:, part],
                    attention_mask=None if mask is None else mask[:, : part.stop],
                    position_ids=None if positions is None else positions[:, part],
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        finally:
            self.busy = False
        self.filled = ids.shape[1]
        self._position.fill_(self.filled)
        self.logits.copy_(out.logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1))
        return self.logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> Tensor:
        """Read `tokens`; logits [T, vocabulary], overwritten by the next step.

        Raises UserError when the buffers are full, and what `Crew.check` finds in earlier steps.
        """
        if self.filled >= self.length:
            raise UserError(f"the text has reached {self.length} tokens, for which there is room")
        if not self._halves:
            self._build()
        self.cache.decoding_at(self._position)
        if self._crew is not None:
            self._crew.check()
        if not self._graphs:
            with self._awake():
                for host in self._pieces():
                    host()
        else:
            if not self._captured:
                self._capture()
            if self._crew is not None:
                self._crew.begin(self._calls)
            for graph, after in self._captured:
                graph.replay()
                if after is not None:
                    after()
        if self._residency is not None:
            self._residency.after_step()
        self.filled += 1
        self.cache.moved_to(self.filled)
        return self.logits

    def _awake(self) -> AbstractContextManager[None]:
        """For steps that are not captured."""
        return nullcontext() if self._crew is None else self._crew.awake()

    def _build(self) -> None:
        self._rotary = self._turn()
        self._frame = Frame(self._hidden, self._rotary, self._position, self._begins, self.cache)
        halves = STEPS[self.model.config.model_type]
        made: list[Any] = []
        for number, layer in enumerate(self.model.model.layers):
            made += halves(layer, number, self._frame, kernels=self._kernels)
        self._halves = made  # all or none, should this be interrupted

    def _turn(self) -> tuple[Tensor, Tensor]:
        positions = (self._position - self._begins).unsqueeze(1)
        cos, sin = self.model.model.rotary_emb(self._hidden, positions)
        return cos, sin

    def _pieces(self) -> Generator[Host, None, None]:
        """One step; what is yielded is for the CPU, between pieces of device work."""
        model = self.model
        self._hidden.copy_(model.model.embed_tokens(self.tokens))
        for buffer, new in zip(self._rotary, self._turn(), strict=True):
            buffer.copy_(new)
        for half in self._halves:
            yield from half(self._frame)
        self.logits.copy_(model.lm_head(model.model.norm(self._hidden)))
        self.tokens.copy_(self.logits.argmax(-1))
        self._position += 1
        if self._residency is not None:
            self._residency.counts.mul_(DECAY)

    def _capture(self) -> None:
        """Record the pieces; a first run without graphs compiles kernels, and is undone."""
        kept = [state.clone() for state in self.cache.all_states()]
        before = self.tokens.clone(), self._position.clone()
        # On this stream: every other one would get workspaces of its own from cuBLAS, for good.
        served = 0 if self._crew is None else self._crew.served
        with self._awake():
            for host in self._pieces():
                host()
        if self._crew is not None:
            self._crew.check()
            self._calls = self._crew.served - served
        for state, old in zip(self.cache.all_states(), kept, strict=True):
            state.copy_(old)
        self.tokens.copy_(before[0])
        self._position.copy_(before[1])
        del kept
        with collection_paused():  # the end of another model's pinned memory would be in the graph
            self._captured = self._record()

    def _record(self) -> list[tuple[torch.cuda.CUDAGraph, Host | None]]:
        pieces = self._pieces()
        pool = torch.cuda.graph_pool_handle()
        captured: list[tuple[torch.cuda.CUDAGraph, Host | None]] = []
        after: Host | None = _nothing
        while after is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                after = next(pieces, None)
            captured.append((graph, after))
        return captured


def _nothing() -> None:
    """What the CPU does before the first piece."""
