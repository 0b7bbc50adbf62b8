"""What half.c is told of a half of a layer, kept from step to step as long as it is true.

Looking up a layer's weights in its modules took a few hundred microseconds where other weights had
swept Python's objects out of the caches, as they do in every step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.hybrid.native.library import numbers


class Plan:
    """Addresses of a half's weights, and its sizes."""

    def __init__(
        self, owner: nn.Module, weights: Sequence[str], sizes: Sequence[int], eps: Sequence[float]
    ) -> None:
        """weights: names of parameters of `owner`, in the order of the structure in half.c, which
        `sizes` follow; eps: of the norms among them."""
        slots: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        parts: dict[str, nn.Module] = {}
        self._weights: list[Tensor] = []
        for path in weights:
            module, (*names, last) = owner, path.split(".")
            for name in names:
                child = module._modules[name]
                assert child is not None, path
                slots[id(module), name] = module._modules, name, child
                module = child
                parts[str(id(module))] = module
            weight = module._parameters[last]
            assert weight is not None, path
            slots[id(module), last] = module._parameters, last, weight
            self._weights.append(weight)
        self._slots = tuple(slots.values())
        self._hooks: tuple[Mapping[int, Any], ...] = ()
        for part in parts.values():
            self._hooks += part._forward_hooks, part._forward_pre_hooks
        self._places = [weight.data_ptr() for weight in self._weights]
        self.fits = all(w.dtype == torch.bfloat16 and w.is_contiguous() for w in self._weights)
        """Whether the kernels can read them."""
        self.sizes, self.eps = tuple(sizes), tuple(eps)
        self.half: ctypes.Array[ctypes.c_int64] = numbers(*self._places, *sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copied modules have other weights, and make plans of their own."""

    def holds(self) -> bool:
        """Whether modules and weights are where they were, and nobody listens to one of them."""
        return (
            all(owner.get(name) is part for owner, name, part in self._slots)
            and not any(self._hooks)
            and [weight.data_ptr() for weight in self._weights] == self._places
        )
