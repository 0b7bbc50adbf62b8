"""Which roads the calls of experts took, layer by layer, counted where the router's choice is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.hybrid.placing import ROADS

Shares = dict[str, dict[str, float]]
"""Layer -> road -> its part of the layer's calls; roads that were never taken are left out."""


@runtime_checkable
class _Placed(Protocol):
    """An experts module, of whatever kind."""

    def roads(self, device: torch.device) -> Tensor:
        """int64 [experts]: where each expert is now, as an index into ROADS."""


@runtime_checkable
class _Dividing(Protocol):
    """One whose calls are divided between roads while the model decodes."""

    def roads_of(self, index: Tensor) -> Tensor:
        """int64 [T, k]: the road of each of a step's calls, as an index into ROADS."""


class UseCounter:
    """Counts while it is open, in tensors on the model's device: nothing is waited for.

    Decoding in fixed buffers is counted if this was opened before the first `generate`, as graphs
    hold what there was when they were captured; the step that is run for that counts as well.
    The road of a call is the one on which the expert was found at that moment, so residency that
    changes while the model runs is counted as it was.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Open: `model` is one that `load` returned."""
        layers = model.hybrid_placement["experts"]  # type: ignore[index]
        placed = [name for name, module in model.named_modules() if isinstance(module, _Placed)]
        inner = tuple(f"{name}." for name in placed)  # the CPU's part of a layer has roads as well
        modules = [model.get_submodule(name) for name in placed if not name.startswith(inner)]
        self._calls = {
            layer: torch.zeros(len(ROADS), dtype=torch.int64, device=model.device)
            for layer in layers
        }
        self._hooks = []
        self._in_pieces: list[Any] = []
        for module, calls in zip(modules, self._calls.values(), strict=True):
            self._hooks.append(module.register_forward_pre_hook(_counting(calls)))
            if hasattr(module, "pieces"):  # decoding's way, past the module's call
                module.pieces = _also(_counting(calls, decoding=True), module)
                self._in_pieces.append(module)

    def take(self) -> Shares:
        """The shares since it was opened or last taken; layers without a call are left out."""
        shares: Shares = {}
        for layer, calls in self._calls.items():
            numbers = calls.tolist()
            if total := sum(numbers):
                pairs = zip(ROADS, numbers, strict=True)
                shares[layer] = {road: number / total for road, number in pairs if number}
            calls.zero_()
        return shares

    def close(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()
        for module in self._in_pieces:
            del module.pieces


def _counting(
    calls: Tensor, *, decoding: bool = False
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _Placed), "the hook is on an experts module"
        chosen = inputs[1].to(calls.device)
        if decoding and isinstance(module, _Dividing):
            roads = module.roads_of(chosen).flatten()
        else:
            roads = module.roads(calls.device)[chosen.flatten()]
        calls.index_add_(0, roads, torch.ones_like(roads))

    return count


def _also(count: Callable[[nn.Module, tuple[Tensor, ...]], None], module: Any) -> Any:  # noqa: ANN401
    """The module's `pieces`, its calls counted first."""
    pieces = module.pieces

    def counted(*inputs: Tensor) -> Any:  # noqa: ANN401
        count(module, inputs)
        return pieces(*inputs)

    return counted
