"""One decoder layer at a time: the dense parts of a model on the device, its experts aside.

A layer's `experts` module is replaced by a recorder that notes what the router sent it and
contributes nothing.  The routed experts' own output is then added by whoever computes it
(`pipeline.stages.experts`), tile by tile, so that the experts of a layer are never on the device
all at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import NumericalError
from pipeline.models import Architecture
from pipeline.models.skeleton import (
    assign,
    build_skeleton,
    geometry_of,
    model_config,
    rotary_embedding,
)
from pipeline.quantize.backend import solver_backend
from pipeline.stages.graphs import Call, Graphs
from pipeline.stages.home import Home

TOKENS_PER_BATCH = 8192
"""Tokens that go through a layer together.  Fixed: other batch sizes give other bytes."""

COMPUTE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Recorded:
    """What one pass of a stream through a layer's dense parts left behind."""

    base: Tensor
    """Layer output without the routed experts, bf16 [sequences, length, hidden]."""
    inputs: Tensor | None
    """Input of the experts module, bf16 [tokens, hidden]; None in a layer without experts."""
    index: Tensor | None
    """Chosen experts, int64 [tokens, top_k]."""
    weight: Tensor | None
    """Router weights, float32 [tokens, top_k]."""

    def with_experts(self, total: Tensor) -> Tensor:
        """The layer's whole output: base + routed experts' sum, float32 [tokens, hidden].  Both
        are overwritten: at full size a copy is gigabytes."""
        return self.base.copy_(total.view(self.base.shape).add_(self.base))


class _Recorder(nn.Module):
    """Stands where the experts module stands; records its inputs and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        self.calls.append((hidden.detach(), index.detach(), weight.detach()))
        return torch.zeros_like(hidden)


class LayerStream:
    """Runs a checkpoint's model layer by layer on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype = COMPUTE_DTYPE,
        home: Home | None = None,
    ) -> None:
        """`dtype`: of weights and activations; float32 where bf16's noise would hide an effect.
        `home`: where streams live; None: on the device."""
        self.dtype = dtype
        self.home = home or Home(device)
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.device = device
        self.geometry = geometry_of(architecture, checkpoint.config, str(checkpoint.path))
        self._model = build_skeleton(model_config(checkpoint.config), dtype)
        self._rotary = rotary_embedding(self._model, device)
        self._built: nn.Module | None = None

    def dense_names(self, layer: int) -> list[str]:
        """Names of a layer's tensors outside the routed experts."""
        prefix = self.architecture.layer_prefix(layer)
        experts = f"{prefix}{self.architecture.experts}."
        return [
            n for n in self.checkpoint.weights if n.startswith(prefix) and not n.startswith(experts)
        ]

    def outer_names(self) -> list[str]:
        """Names of the tensors outside all layers: embedding, final norm, head."""
        a = self.architecture
        wanted = (a.embedding, a.final_norm, a.head)
        return [n for n in self.checkpoint.weights if n.rpartition(".")[0] in wanted]

    def load_dense(self, layer: int) -> dict[str, Tensor]:
        """A layer's dense tensors as stored (decoded, not cast), on the device."""
        return {n: self.checkpoint.load(n, self.device) for n in self.dense_names(layer)}

    def build_layer(self, layer: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer's module with its dense tensors in place, in the compute dtype.

        The layer built before, if it was another one, gives up its own.
        """
        prefix = self.architecture.layer_prefix(layer)
        module = self._model.get_submodule(prefix.rstrip("."))
        if self._built is not None and self._built is not module:
            assign(self._built, {n: p.to("meta") for n, p in self._built.named_parameters()})
        self._built = module
        if solver_backend(self.device) == "triton":
            # transformers' own scan over chunks is two thirds of a DeltaNet layer's time.
            importlib.import_module("pipeline.hybrid.delta_prefill").install_in(module)
        if layer in self.geometry.moe_layers:
            parent, _, name = self.architecture.experts.rpartition(".")
            module.get_submodule(parent).register_module(name, _Recorder())
        cast = {n.removeprefix(prefix): t.to(self.dtype) for n, t in tensors.items()}
        assign(module, cast)
        return module

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [sequences, length] -> a stream [sequences, length, hidden]."""
        return self.embed_all([tokens])[0]

    def embed_all(self, texts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same of several texts; the table is read once."""
        name = f"{self.architecture.embedding}.weight"
        table = self.checkpoint.load(name, self.device).to(self.dtype)
        streams = []
        for tokens in texts:
            stream = self.home.empty((*tokens.shape, table.shape[1]), self.dtype)
            for sequence, ids in zip(stream, tokens, strict=True):
                sequence.copy_(nn.functional.embedding(ids.to(self.device), table))
            streams.append(stream)
        return tuple(streams)

    def record(self, module: nn.Module, hidden: Tensor, *, hooked: bool = True) -> Recorded:
        """Run a stream through a layer's dense parts, a fixed token batch at a time.

        `hooked`: the module has hooks that are to see every batch.  Without, this is the stream's
        last use: the output takes its place, and a GPU that holds the streams replays one graph for
        all batches.
        """
        recorder = self._recorder(module)
        batch = max(1, TOKENS_PER_BATCH // hidden.shape[1])
        base = self.home.empty(hidden.shape, hidden.dtype) if hooked else hidden
        replays = not hooked and hidden.is_cuda and not self.home.beside
        taken: list[Tensor] = []
        call = self._call_of(module, recorder, hidden.shape[1])
        with torch.inference_mode():
            for start in range(0, len(hidden), batch):
                part = hidden[start : start + batch]
                if replays and len(part) == batch:
                    output, *noted = self._graphs.run(module, call, part)
                else:
                    output, *noted = call(part)
                base[start : start + batch].copy_(output)
                if not taken:
                    tokens = hidden.shape[:2].numel()
                    taken = [self.home.empty((tokens, t.shape[1]), t.dtype) for t in noted]
                first = start * hidden.shape[1]
                for whole, some in zip(taken, noted, strict=True):
                    whole[first : first + len(some)].copy_(some)
        if recorder is None:
            return Recorded(base, None, None, None)
        inputs, index, weight = taken
        return Recorded(base, inputs, index, weight)

    def _call_of(self, module: nn.Module, recorder: _Recorder | None, length: int) -> Call:
        """One batch through a layer: its output, and what the recorder noted."""
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        some = torch.empty(0, dtype=self.dtype, device=self.device)
        rotary: tuple[Tensor, Tensor] = self._rotary(some, positions)

        def call(part: Tensor) -> tuple[Tensor, ...]:
            output = self.architecture.call_layer(module, part, rotary)
            if recorder is None:
                return (output,)
            hidden, index, weight = recorder.calls.pop()
            return output, hidden, index, weight.float()

        return call

    @cached_property
    def _graphs(self) -> Graphs:
        return Graphs(self.device)

    def rest(self) -> None:
        """Give back the memory that passes through layers hold."""
        if "_graphs" in self.__dict__:
            self._graphs.drop()

    def logits(self, hidden: Tensor) -> Iterable[tuple[int, Tensor]]:
        """(first sequence, float32 logits [batch, length, vocabulary]) for a finished stream."""
        a = self.architecture
        norm = self._model.get_submodule(a.final_norm)
        weight = self.checkpoint.load(f"{a.final_norm}.weight", self.device).to(self.dtype)
        assign(norm, {"weight": weight})
        tied = f"{a.head}.weight" not in self.checkpoint.weights
        name = a.embedding if tied else a.head
        head = self.checkpoint.load(f"{name}.weight", self.device).to(self.dtype)
        batch = max(1, TOKENS_PER_BATCH // hidden.shape[1] // 4)
        with torch.inference_mode():
            for start in range(0, len(hidden), batch):
                part = norm(hidden[start : start + batch])
                yield start, nn.functional.linear(part, head).float()

    def _recorder(self, module: nn.Module) -> _Recorder | None:
        found = [m for m in module.modules() if isinstance(m, _Recorder)]
        return found[0] if found else None


def check_finite(hidden: Tensor, where: str) -> None:
    """Raise NumericalError, naming the place and the first sequence, for NaN or Inf."""
    low, high = torch.aminmax(hidden)  # hands NaN on, and allocates nothing
    if not bool(torch.isfinite(torch.stack([low, high])).all()):
        sequence = next(i for i, rows in enumerate(hidden) if not torch.isfinite(rows).all())
        raise NumericalError(f"activations after {where} hold NaN or Inf (sequence {sequence})")
