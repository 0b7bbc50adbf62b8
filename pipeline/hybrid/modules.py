"""The modules that take the place of a transformers model's experts and quantised linear layers.

Their weights are no parameters or buffers: `model.to(...)`, `.half()` and the like must neither
move experts into a GPU nor change the dtype that a packed layout was made for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.hybrid.backends import Matrices
from pipeline.hybrid.placing import ROADS


class HybridExperts(nn.Module):
    """One layer's routed experts, computed where their weights are.

    Called as transformers 5 calls a MoE block's experts:
    (hidden_states [T, H], top_k_index int [T, k], top_k_weights [T, k]) -> [T, H], in the dtype
    and on the device of hidden_states.
    """

    def __init__(
        self,
        gate_up: Matrices,
        down: Matrices,
        experts: int,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        """gate_up: gate rows, then up rows, as one matrix per expert; `activation`: of the gate."""
        super().__init__()
        self.num_experts = experts
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self._gate_up.nbytes + self._down.nbytes

    def roads(self, device: torch.device) -> Tensor:
        """Where each expert is: int64 [experts] on `device`, an index into ROADS."""
        return torch.full((self.num_experts,), ROADS.index("cpu"), device=device)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each chosen expert runs once, on all its tokens; sums are kept in float32.

        An index of num_experts stands for an expert that is computed elsewhere.
        """
        device = self._gate_up.device
        x = hidden_states.to(device)
        weights = top_k_weights.to(device, torch.float32)
        output = torch.zeros(x.shape, dtype=torch.float32, device=device)
        if x.shape[0] == 1:  # decoding: no sorting, no gathering
            for expert, weight in zip(top_k_index[0].tolist(), weights[0], strict=True):
                if expert < self.num_experts:
                    output += self._expert(expert, x).float() * weight
            return output.to(hidden_states.device, hidden_states.dtype)
        chosen = top_k_index.to(device).flatten()
        order = chosen.argsort(stable=True)
        tokens = order // top_k_index.shape[1]
        weights = weights.flatten()[order].unsqueeze(1)
        counts = chosen.bincount(minlength=self.num_experts).tolist()[: self.num_experts]
        start = 0
        for expert, count in enumerate(counts):
            if count:
                mine = tokens[start : start + count]
                result = self._expert(expert, x[mine]).float() * weights[start : start + count]
                output.index_add_(0, mine, result)
                start += count
        return output.to(hidden_states.device, hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate, up = self._gate_up.multiply(index, x).float().chunk(2, dim=-1)
        return self._down.multiply(index, (self._activation(gate) * up).to(x.dtype))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"experts={self.num_experts}, device={self._gate_up.device}, bytes={self.nbytes:,}"


class QuantizedLinear(nn.Module):
    """A linear layer over a quantised matrix, computed where the matrix is."""

    def __init__(self, matrix: Matrices, rows: int, columns: int, bias: Tensor | None) -> None:
        """matrix: a stack of one, [rows, columns]; bias [rows] or None."""
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self._matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._matrix.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], same dtype and device."""
        flat = x.reshape(-1, self.in_features).to(self._matrix.device)
        y = self._matrix.multiply(0, flat).to(x.device)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
