"""The ideas themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ideas.conversion import Idea, Source, Tensors
from pipeline.quantize.correction import corrected, routed_drift
from pipeline.quantize.hessian import PRIOR, routed_hessians, shrink
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.routed import grouped_product
from pipeline.stages.experts import (
    STRENGTH,
    DenseTile,
    LayerStatistics,
    SolvedTile,
    TileJob,
    _down_problem,
    _quantize,
    _share,
)
from pipeline.stages.routing import Routed
from pipeline.stages.stream import COMPUTE_DTYPE, LayerStream, Recorded


class Rounding(Idea):
    """Plain rounding with the same search for scales."""

    method = "rtn"


class Uncorrected(Idea):
    """Without making up for what earlier layers lost."""

    corrects = False


def constant(module: ModuleType, name: str, value: object) -> AbstractContextManager[object]:
    """Another value of a module's constant for a while."""
    return patch.object(module, name, value)


class Options(Idea):
    """Other solver options; `folds_down`: up and down scaled against each other besides."""

    def __init__(self, *, folds_down: bool = False, method: str = "gptq", **options: Any) -> None:  # noqa: ANN401
        self.folds_down, self.method = folds_down, method
        self.options = SolverOptions(**options)


class Gradients(Idea):
    """Errors of the experts' outputs weighed by the loss's own gradients, not by the readers.

    M is the second moment of the gradient of a sampled label's loss with respect to the layer's
    output, over the calibration tokens; `routers`: of every later router's Gram matrix, each of
    trace 1, this much is added to M of trace 1.
    """

    def __init__(self, routers: float) -> None:
        self._routers = routers

    def sensitivity(self, source: Source) -> Callable[[int], Tensor]:
        """See the class."""
        moments, grams = _gradient_moments(source), _router_grams(source)

        def after(layer: int) -> Tensor:
            return _unit(moments[layer]) + self._routers * sum(
                grams[layer + 1 :], torch.zeros_like(grams[0])
            )

        return after


def _gradient_moments(source: Source, batch: int = 4) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(source.checkpoint.path, dtype=torch.float32)
    model.requires_grad_(False)
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    layers = model.model.layers
    for layer in layers:
        layer.register_forward_hook(note)
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    width = model.config.hidden_size
    total = [torch.zeros(width, width) for _ in layers]
    generator = torch.Generator().manual_seed(5)
    for tokens in source.calibration.split(batch):
        outputs.clear()
        logits = model(tokens, use_cache=False).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        loss = nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="sum")
        loss.backward()
        for moment, output in zip(total, outputs, strict=True):
            assert output.grad is not None
            gradient = output.grad.flatten(0, 1)
            moment.addmm_(gradient.T, gradient)
    return total


def _router_grams(source: Source) -> list[Tensor]:
    a, load = source.stream().architecture, source.checkpoint.load
    grams = []
    for layer in range(source.stream().geometry.layers):
        norm = load(f"{a.layer_prefix(layer)}post_attention_layernorm.weight").float()
        router = load(f"{a.layer_prefix(layer)}{a.router}.weight").float() * (1 + norm)
        router = router - router.mean(0)
        grams.append(_unit(router.T @ router))
    return grams


def _unit(moment: Tensor) -> Tensor:
    return moment / moment.trace()


class TokenWeights(Idea):
    """An expert's tokens weighed by what their errors do to the layer's output.

    router: power of the token's router weight.  relative: power of the residual stream's mean
    square by which it is divided, as the next norm does.  Gate and up besides by the squared
    derivative of the expert's output, summed over channels.
    """

    def __init__(self, router: float, relative: float) -> None:
        self._router, self._relative = router, relative

    def solve(
        self,
        job: TileJob,
        tile: DenseTile,
        routed: Routed,
        layer: LayerStatistics,
        recorded: Recorded,
    ) -> SolvedTile:
        """`solve_tile` with these weights; without folds."""
        first, last = routed.offsets[job.experts.start], routed.offsets[job.experts.stop]
        offsets = [o - first for o in routed.offsets[job.experts.start : job.experts.stop + 1]]
        tokens = routed.tokens[first:last]
        inputs = routed.inputs[tokens]
        target = None if layer.target is None else layer.target[tokens]
        level = recorded.base.float().square().mean(-1).flatten()[tokens]
        given = routed.weights[first:last].pow(self._router) * level.pow(-self._relative)
        outer = _mean_one(_slopes(tile, inputs, offsets) * given, offsets)
        inner = _mean_one(given, offsets)
        counts, ends = torch.tensor(offsets).diff(), torch.tensor(offsets)
        strength = STRENGTH * inputs.shape[1]
        hessian = shrink(
            routed_hessians(inputs, ends, weights=outer), counts, layer.common, strength
        )
        weight = tile.gate_up.float()
        if target is not None:
            drift = routed_drift(target, inputs, offsets, outer) / _share(
                counts, strength, inputs.device
            )
            weight = corrected(weight, hessian, drift)
        solved = _quantize(job, "gate and up", weight, hessian)
        gate_up = solved.quantized.dequantize(COMPUTE_DTYPE)
        wanted, moment, between = _down_problem(
            job, tile, tile.down.float(), inputs, target, inner, gate_up, None, offsets, layer
        )
        down = _quantize(job, "down", wanted, moment, layer.outputs)
        return SolvedTile(
            gate=solved.quantized.rows(0, job.inner),
            up=solved.quantized.rows(job.inner, 2 * job.inner),
            down=down.quantized,
            dense=DenseTile(gate_up, down.quantized.dequantize(COMPUTE_DTYPE)),
            inner=between,
            gate_up_loss=solved.loss.tolist(),
            down_loss=down.loss.tolist(),
            effective_rank=[],
            raised_damping=solved.raised + down.raised,
            smallest_scales=solved.smallest_scales + down.smallest_scales,
        )


def _slopes(tile: DenseTile, inputs: Tensor, offsets: Sequence[int]) -> Tensor:
    """Squared derivatives of an expert's output by gate and up, summed: float32 [pairs]."""
    gate, up = grouped_product(inputs, tile.gate_up, offsets).float().chunk(2, -1)
    sigmoid = gate.sigmoid()
    by_up, by_gate = gate * sigmoid, up * sigmoid * (1 + gate * (1 - sigmoid))
    columns = tile.down.float().square().sum(1)
    total = by_up.square() + by_gate.square()
    parts = [total[start:stop] @ columns[e] for e, (start, stop) in enumerate(pairwise(offsets))]
    return torch.cat(parts)


def _mean_one(weights: Tensor, offsets: Sequence[int]) -> Tensor:
    parts = [weights[start:stop] for start, stop in pairwise(offsets)]
    return torch.cat([p / p.mean().clamp_min(1e-30) if len(p) else p for p in parts])


class Router(Idea):
    """The router, which stays dense, moved to the inputs that it gets in the quantised model.

    W (I + C H^-1), C being the mean of (t - x) x^T and H that of x x^T over its inputs x and the
    source's t: the best linear guess of the source's scores.
    """

    damping = 0.03

    def before(
        self, stream: LayerStream, layer: int, dense: Tensors, calibration: Tensor, target: Tensor
    ) -> Tensors:
        """See the class; the first layer's inputs are the source's."""
        if not layer:
            return dense
        module = stream.build_layer(layer, dense)
        wanted, actual = (
            stream.record(module, hidden).inputs for hidden in (target.clone(), calibration.clone())
        )
        assert wanted is not None and actual is not None
        x = actual.float()
        moment, drift = x.T @ x, (wanted.float() - x).T @ x
        columns = len(moment)
        moment += self.damping * moment.diagonal().mean() * torch.eye(columns)
        guess = torch.linalg.solve(moment, drift.T).T * (len(x) / (len(x) + PRIOR * columns))
        name = f"{stream.architecture.layer_prefix(layer)}{stream.architecture.router}.weight"
        router = dense[name].float()
        return dense | {name: (router + router @ guess).to(dense[name].dtype)}
