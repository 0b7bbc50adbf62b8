"""A layer's forward pass as a CUDA graph: launched once for a batch instead of kernel by kernel.

A DeltaNet layer is some 1,500 small kernels, which take longer to launch than to run.  The graph
launches the same kernels on the same shapes, so the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], tuple[Tensor, ...]]


class Graphs:
    """The graph of one call at a time, made anew when module, weights or shape change."""

    def __init__(self, device: torch.device) -> None:
        self._key: tuple[object, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self._side = torch.cuda.Stream(device)
        self._warmed: set[tuple[str, ...]] = set()
        self._pool = torch.cuda.graph_pool_handle()
        # Holds the pool, so that each layer's graph gets the memory of the one before.
        self._anchor = torch.cuda.CUDAGraph()
        self._captured(self._anchor, lambda x: (x + 1,), torch.zeros(1, device=device))

    def run(self, module: nn.Module, call: Call, x: Tensor) -> tuple[Tensor, ...]:
        """`call(x)`; the outputs are overwritten by the next run."""
        key = (id(module), x.shape, x.dtype, *(p.data_ptr() for p in module.parameters()))
        if key != self._key:
            self.drop()
            graph, example = torch.cuda.CUDAGraph(), x.clone()
            kind = tuple(type(part).__name__ for part in module.modules())
            if kind not in self._warmed:
                self._warm_up(call, example)
                self._warmed.add(kind)
            self._outputs = self._captured(graph, call, example)
            self._graph, self._input, self._key = graph, example, key
        assert self._graph is not None
        assert self._input is not None
        self._input.copy_(x)
        self._graph.replay()
        return self._outputs

    def drop(self) -> None:
        """Forget the graph, so that its memory can be used."""
        self._key, self._graph, self._input, self._outputs = (), None, None, ()

    def _warm_up(self, call: Call, x: Tensor) -> None:
        """Libraries set themselves up in a first call, which a graph cannot hold."""
        current = torch.cuda.current_stream(x.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            call(x)
        current.wait_stream(self._side)
        torch.cuda.empty_cache()  # this stream's memory serves nothing else

    def _captured(self, graph: torch.cuda.CUDAGraph, call: Call, x: Tensor) -> tuple[Tensor, ...]:
        # Not `torch.cuda.graph`: that gives all cached memory back first, pinned buffers too.
        current = torch.cuda.current_stream(x.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            # Other threads go on using the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = call(x)
            finally:
                graph.capture_end()
        current.wait_stream(self._side)
        return outputs
