"""The module that computes a layer's experts by the compiled kernel."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.hybrid.native.library import Library, find, takes, threads
from pipeline.hybrid.placing import ROADS
from pipeline.hybrid.records import Layout, Records, layout_of, packable
from pipeline.quantize.tensor import QuantizedTensor

if TYPE_CHECKING:
    from pipeline.hybrid.handover import Handover

_NO_MEMORY, NO_EXPERT = 1, 2
"""Results of calls in layer.c."""

_ROOM = 1 << 26
"""Bytes of products that wait to be added up; more tokens are taken in turns."""


def kernel_for(
    gate_up: QuantizedTensor, down: QuantizedTensor, dtype: torch.dtype
) -> Library | None:
    """The kernel, if it is there and can compute experts like those of the batch in that dtype."""
    library = find()
    if isinstance(library, str) or dtype != torch.bfloat16:
        return None
    if not all(packable(q.scheme, q.shape[-1]) for q in (gate_up, down)):
        return None
    layout = layout_of(gate_up, down)
    return library if takes(layout.gate_up) and takes(layout.down) else None


def unusable(native: bool, dtype: torch.dtype) -> str:
    """Why the kernel computes no experts of any format; "" where it does.  native: see `load`."""
    if not native:
        return "it is not to be used (native, --no-native)"
    if dtype != torch.bfloat16:
        return "it computes in bfloat16"
    library = find()
    return library if isinstance(library, str) else ""


def sizes_of(layout: Layout) -> Tensor:
    """int64 [14], on the CPU: the layout as the kernel's functions take it."""
    sizes = [
        number
        for part in (layout.gate_up, layout.down)
        for number in (
            part.rows,
            part.columns,
            part.group,
            part.codes,
            part.scales,
            -1 if part.zero else part.zeros,
            part.zero,
        )
    ]
    return torch.tensor(sizes)


class NativeExperts(nn.Module):
    """See `HybridExperts`, whose place this takes; for bfloat16 on the CPU, silu its activation.

    Inputs are rounded to 15 bits of their largest element, sums are exact or float32, and gated
    products are not rounded to bfloat16 on the way, so errors are below those of bfloat16.  A
    token's result does not depend on the others of the call, nor on the number of threads.
    """

    def __init__(self, library: Library, records: Records) -> None:
        """records: on the CPU; `library`: what `kernel_for` returned for such experts."""
        super().__init__()
        self.num_experts = records.count
        self.handover: Handover | None = None
        """By which a device's decode steps reach these experts without Python, if they can."""
        self._library = library
        self._records = records
        self._addresses = records.addresses()
        self._sizes = sizes_of(records.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeExperts:
        # The library has no copies, and the copied records have other addresses.
        return NativeExperts(self._library, deepcopy(self._records, memo))

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self._records.nbytes

    @property
    def records(self) -> Records:
        """The experts."""
        return self._records

    @property
    def places(self) -> tuple[int, int]:
        """Addresses of what `requant_experts` takes: the sizes, and the records' addresses."""
        return self._sizes.data_ptr(), self._addresses.data_ptr()

    def roads(self, device: torch.device) -> Tensor:
        """See `HybridExperts.roads`."""
        return torch.full((self.num_experts,), ROADS.index("cpu"), device=device)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `HybridExperts.forward`; IndexError for an index that is none."""
        x = hidden_states.to("cpu", torch.bfloat16).contiguous()
        index = top_k_index.to("cpu", torch.int64).contiguous()
        weights = top_k_weights.to("cpu", torch.float32).contiguous()
        output = torch.empty(x.shape, dtype=torch.float32)
        tokens, hidden = x.shape
        some = max(1, _ROOM // max(4 * hidden * index.shape[1], 1))
        for first in range(0, tokens, some):
            last = min(first + some, tokens)
            self._compute(x[first:last], index[first:last], weights[first:last], output[first:last])
        return output.to(hidden_states.device, hidden_states.dtype)

    def _compute(self, x: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> None:
        failed = self._library.experts(
            self._sizes.data_ptr(),
            self._addresses.data_ptr(),
            self.num_experts,
            x.data_ptr(),
            index.data_ptr(),
            weights.data_ptr(),
            *index.shape,
            output.data_ptr(),
            self._library.kind,
            threads(),
            self._library.parallel,
        )
        if failed == _NO_MEMORY:
            raise MemoryError("no memory for the experts' products")
        if failed == NO_EXPERT:
            raise IndexError(f"an expert's index is not within 0 and {self.num_experts}")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"experts={self.num_experts}, device=cpu, bytes={self.nbytes:,}"
