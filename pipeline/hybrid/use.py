"""Which roads the calls of experts took, layer by layer, counted where the router's choice is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
        self._wrapped: list[tuple[Any, str]] = []
        for module, calls in zip(modules, self._calls.values(), strict=True):
            self._hooks.append(module.register_forward_pre_hook(_counting(calls)))
            owner, method = _decoding_way(module)
            if owner is not None:
                count = partial(_counting(calls, decoding=True), module)
                setattr(owner, method, _also(count, getattr(owner, method)))
                self._wrapped.append((owner, method))

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
        for owner, method in self._wrapped:
            delattr(owner, method)


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


def _decoding_way(module: Any) -> tuple[Any, str]:  # noqa: ANN401
    """What a decode step calls instead of the module, if it does, and by which method: all of these
    take tokens, then choices, then weights."""
    if hasattr(module, "pieces"):
        return module, "pieces"
    return getattr(module, "handover", None), "send"  # the CPU's experts, called by the device


def _also(count: Callable[[tuple[Any, ...]], None], method: Callable[..., Any]) -> Any:  # noqa: ANN401
    """The method, its calls counted first."""

    def counted(*inputs: Any) -> Any:  # noqa: ANN401
        count(inputs)
        return method(*inputs)

    return counted
