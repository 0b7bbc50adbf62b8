"""Linear layers that are not quantised, by the compiled kernel where few tokens meet them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.hybrid.host import host_memory
from pipeline.hybrid.native.library import Library, find, threads

FEW = 4
"""Tokens up to which the kernel was faster than torch's product (docs/performance.md)."""
_MATRICES = 4
"""MATRICES in dense.c."""


class NativeLinear(nn.Linear):
    """A linear layer without bias on another's weight, which stays a parameter.

    Up to FEW tokens on the CPU, all in bfloat16, go through the kernel of dense.c: sums in float32,
    results rounded once.  Everything else, and what gradients are wanted of, is torch's.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """weight: [out, in]."""
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, library = self.weight, find()
        if isinstance(library, str) or not _fits(x, weight):
            return super().forward(x)
        return multiply(x, weight, library)


def multiply(x: Tensor, weight: Tensor, library: Library) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]; see `side_by_side`."""
    return side_by_side(x, (weight,), library)


def side_by_side(x: Tensor, weights: Sequence[Tensor], library: Library) -> Tensor:
    """x [..., in] times each of up to four weights [out, in] transposed: [..., sum of out].

    All bfloat16 on the CPU, weights contiguous; a token's result depends neither on the others of
    the call nor on the number of threads.  MemoryError where there is no room for x in float32.
    """
    columns = weights[0].shape[1]
    x = x.contiguous()
    sizes: list[int] = []
    for weight in weights:
        sizes += weight.data_ptr(), weight.shape[0]
    out = x.new_empty((*x.shape[:-1], sum(sizes[1::2])))
    if library.dense(
        *(*sizes, *(0,) * (2 * _MATRICES - len(sizes)), columns),
        *(x.data_ptr(), x.numel() // columns, out.data_ptr()),
        *(library.kind, threads(), library.parallel),
    ):
        raise MemoryError("no memory for a linear layer's inputs")
    return out


def use_in(model: nn.Module) -> None:
    """Let the kernel, if it is there, serve the model's bfloat16 linear layers without bias.

    Their weights move to memory in large pages, one after the other; tied ones stay tied.
    """
    library = find()
    if isinstance(library, str):
        return
    moved: set[int] = set()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module.bias is not None:
            continue
        weight = module.weight
        if weight.dtype != torch.bfloat16:
            continue
        if id(weight) not in moved:
            weight.data = _in_large_pages(weight.data)
            moved.add(id(weight))
        parent, _, child = name.rpartition(".")
        new = NativeLinear(weight).train(module.training)
        setattr(model.get_submodule(parent), child, new)


def _in_large_pages(weight: Tensor) -> Tensor:
    room = host_memory(weight.nbytes, pin=False)
    return room.view(weight.dtype).view(weight.shape).copy_(weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    few = 0 < x.numel() <= FEW * weight.shape[1] and x.shape[-1] == weight.shape[1]
    alike = x.dtype == weight.dtype == torch.bfloat16 and x.is_cpu and weight.is_cpu
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return few and alike and weight.is_contiguous() and not wanted
