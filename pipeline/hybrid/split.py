"""One layer's experts on several roads: GPU memory, pinned host memory, and the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.hybrid import kernels
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.packed import PackedStack
from pipeline.hybrid.placing import Road

_FEW_TOKENS = 8
"""Up to here each pair reads its expert by itself; above, pairs that share one are put together."""


@dataclass(frozen=True)
class DeviceRoad:
    """Experts that the device's kernels compute, in the order of their slots."""

    experts: Sequence[int]
    gate_up: PackedStack
    down: PackedStack


class SplitExperts(nn.Module):
    """See `HybridExperts`, whose place this takes where a layer's experts are spread.

    The CPU's part is computed while the device's kernels run; without one, nothing is waited for.
    """

    def __init__(
        self,
        roads: Mapping[Road, DeviceRoad],
        cpu: tuple[Sequence[int], HybridExperts] | None,
        experts: int,
        activation: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """cpu: the experts it computes, and the module that does; device: of activations."""
        super().__init__()
        self.num_experts = experts
        self._activation = activation
        self._roads = dict(roads)
        self._slots = {road: _slots(r.experts, experts, -1, device) for road, r in roads.items()}
        self._cpu = None if cpu is None else cpu[1]
        if cpu is not None:
            self._places = _slots(cpu[0], experts, len(cpu[0]), torch.device("cpu"))

    def bytes_by_road(self) -> dict[str, int]:
        """Road -> bytes of its experts."""
        sizes = {str(k): r.gate_up.nbytes + r.down.nbytes for k, r in self._roads.items()}
        return sizes if self._cpu is None else {**sizes, "cpu": self._cpu.nbytes}

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(self.bytes_by_road().values())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `HybridExperts.forward`."""
        host: tuple[Tensor, Tensor, Tensor] | None = None
        if self._cpu is not None:  # before the kernels are queued, or the copy would wait for them
            index = self._places[top_k_index.to("cpu")]
            host = hidden_states.to("cpu"), index, top_k_weights.to("cpu")
        output = self._on_device(hidden_states.contiguous(), top_k_index, top_k_weights)
        if self._cpu is not None and host is not None:
            output += self._cpu(*host).to(output.device, torch.float32)
        return output.to(hidden_states.dtype)

    def _on_device(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen = index.flatten()
        slots = {road: table[chosen] for road, table in self._slots.items()}
        few = x.shape[0] <= _FEW_TOKENS
        groups = {
            road: kernels.Groups(slots[road], len(self._roads[road].experts))
            for road in ([] if few else slots)
        }

        def product(name: str, inputs: Tensor, rows: int) -> Tensor:
            # zeros: pairs of the CPU's experts are in it too
            out = torch.zeros((chosen.numel(), rows), dtype=torch.float32, device=x.device)
            for road, parts in self._roads.items():
                stack: PackedStack = getattr(parts, name)
                if few:
                    kernels.matvec(inputs, slots[road], stack, out)
                else:
                    kernels.grouped(inputs, groups[road], stack, out)
            return out

        one = next(iter(self._roads.values()))
        gate, up = product("gate_up", x, one.gate_up.rows).chunk(2, dim=-1)
        inner = (self._activation(gate) * up).to(x.dtype).contiguous()
        result = product("down", inner, one.down.rows) * weights.flatten().float().unsqueeze(1)
        return result.view(x.shape[0], -1, result.shape[1]).sum(1)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"experts={self.num_experts}, bytes={self.bytes_by_road()}"


def _slots(members: Sequence[int], experts: int, missing: int, device: torch.device) -> Tensor:
    """int64 [experts]: each member's position, `missing` for all others."""
    table = torch.full((experts,), missing, dtype=torch.int64)
    table[list(members)] = torch.arange(len(members))
    return table.to(device)
