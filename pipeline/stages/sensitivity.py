"""Which directions of a layer's output the rest of the model listens to, from weights alone.

The output of a layer's experts is added to the residual stream, and what reads that stream later
are matrices behind norms: the token mixers' projections, the routers and the head.  The sum of
their Gram matrices says how far an error in each direction gets, and errors of several output rows
can be made to cancel where it counts (`pipeline.quantize.rows`).  A router's directions are the
most dangerous ones, since a token sent to another expert is a large error.

Every layer counts alike: its matrices' scale says little, since each stands behind a norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import NumericalError
from pipeline.models import Architecture
from pipeline.models.skeleton import geometry_of
from pipeline.quantize.precision import full_float32
from pipeline.quantize.rows import RowOrder, row_order

ROUTER_SHARE = 0.5
"""Weight of a layer's router, relative to its token mixer."""


class Sensitivity:
    """Sums of Gram matrices of what lies behind a layer; layers must be asked for in order."""

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, device: torch.device
    ) -> None:
        """Reads all token mixers' input projections, routers and the head once."""
        self._checkpoint, self._architecture, self._device = checkpoint, architecture, device
        self._layers = geometry_of(architecture, checkpoint.config, str(checkpoint.path)).layers
        self._done = 0
        with full_float32():
            self._behind = self._head()
            for layer in range(self._layers):
                self._behind += self._layer(layer)

    def after(self, layer: int) -> Tensor:
        """M of `layer`'s output, float32 [hidden, hidden] on the device, up to a factor."""
        if layer < self._done - 1:
            raise ValueError(f"layer {layer} was asked for after layer {self._done - 1}")
        with full_float32():
            while self._done <= layer:
                self._behind -= self._layer(self._done)
                self._done += 1
        return self._behind.clone()

    def _layer(self, layer: int) -> Tensor:
        """What one layer adds, of trace 1 + ROUTER_SHARE where it has both kinds of readers."""
        a, weights = self._architecture, self._checkpoint.weights
        total = torch.zeros_like(self._behind)
        for fold in a.folds:
            producer = f"{a.fold_module(layer, fold.producer)}.weight"
            routes = a.router in fold.consumers
            readers = (a.router,) if routes else fold.consumers
            names = [f"{a.fold_module(layer, name)}.weight" for name in readers]
            if fold.producer not in a.residual_norms or names[0] not in weights:
                continue
            gain = self._gain(producer, fold.form)
            gram = torch.zeros_like(total)
            for name in names:
                matrix = self._read(name) * gain
                # What moves all experts' scores alike moves none.
                gram += _gram(matrix - matrix.mean(dim=0) if routes else matrix)
                _require_finite(gram, f"layer {layer}", name)
            total += _unit(gram) * (ROUTER_SHARE if routes else 1)
        return total

    def rows(self, layer: int) -> RowOrder:
        """The order in which rows of the layer's down projections are solved for it."""
        try:
            return row_order(self.after(layer))
        except NumericalError as error:
            raise NumericalError(f"layer {layer}, down: {error}") from None

    def _head(self) -> Tensor:
        a = self._architecture
        tied = f"{a.head}.weight" not in self._checkpoint.weights
        name = f"{a.embedding if tied else a.head}.weight"
        head = self._read(name) * self._gain(f"{a.final_norm}.weight", a.norm_form)
        gram = _gram(head - head.mean(dim=0))
        _require_finite(gram, "the head", name)
        return _unit(gram)

    def _gain(self, norm: str, form: str) -> Tensor:
        weight = self._read(norm)
        return 1 + weight if form == "1+w" else weight

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.load(name, self._device).float()


def _require_finite(gram: Tensor, what: str, name: str) -> None:
    # The trace as well: it is what the sum is divided by.
    if not bool(torch.isfinite(gram).all() & torch.isfinite(gram.diagonal().sum())):
        raise NumericalError(
            f"{what} cannot be weighed: products of {name} hold NaN or Inf; its weights are too"
            " large, or set requantize.output_weighting=false"
        )


def _gram(matrix: Tensor) -> Tensor:
    return matrix.T @ matrix


def _unit(gram: Tensor) -> Tensor:
    """The same of trace 1; zeros stay zeros."""
    trace = gram.diagonal().sum()
    return gram / torch.where(trace > 0, trace, torch.ones_like(trace))
