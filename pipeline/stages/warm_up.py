"""What a GPU's first layer would have to wait for, done while the source is opened and checked.

Triton compiles a kernel when it is first launched, and CUDA's libraries set themselves up in a
first call.  So the solver is run on random matrices of the model's own widths as soon as its
config.json is read, and one layer of each kind goes through a forward pass once the source is open:
the layers to come find what they need.  Nothing of it reaches the result, and a run does without it
where it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Self

import torch
from torch import Tensor

from pipeline.checkpoint.index import read_json
from pipeline.checkpoint.untrusted import expanded
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import architecture_of, geometry_of
from pipeline.quantize.backend import solver_backend
from pipeline.quantize.correction import corrected, routed_drift
from pipeline.quantize.hessian import effective_rank, routed_hessians, shrink
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.routed import add_rows, grouped_product, token_sums
from pipeline.quantize.rows import row_order
from pipeline.quantize.tensor import AffineScheme
from pipeline.recipe import Recipe
from pipeline.stages.context import Context
from pipeline.stages.experts import STRENGTH, TileSource, decode_tile
from pipeline.stages.formats import solver_options
from pipeline.stages.home import Home
from pipeline.stages.placement import place
from pipeline.stages.routing import sort_by_expert
from pipeline.stages.stream import COMPUTE_DTYPE, TOKENS_PER_BATCH, LayerStream
from pipeline.stages.tiling import tile_experts
from pipeline.workdir import WorkDirectory

EXPERTS = 16
"""Matrices of a warm-up, where a tile has as many: kernels are compiled for whole sixteenths, for
one, and for any other number."""

TOKENS = 129
"""Tokens of a warm-up, odd, so that its second chunk's sums begin at no whole 16 bytes."""

CHUNK = 64 * 16
"""Pairs whose outputs are added together."""

THREADS = 4
"""Warm-ups at once."""


@dataclass(frozen=True)
class Problem:
    """A tile's shapes and what is done with them."""

    recipe: Recipe
    architecture: Architecture
    geometry: Geometry
    device: torch.device

    @property
    def experts(self) -> int:
        """Matrices of a batch."""
        text = self.recipe.calibration
        whole = tile_experts(self.geometry, text.samples * text.sequence_length, self.device)
        return min(EXPERTS, whole, self.geometry.experts)

    def solve(self, rows: int, columns: int, *, last: bool) -> None:
        """Statistics, correction and quantiser for matrices of a width; `last`: of the layer."""
        wanted = self.recipe.requantize
        quantizer = QUANTIZERS[wanted.method]
        weight = self._random(self.experts, rows, columns).float()
        hessian = None
        if quantizer.needs_hessian:
            inputs = self._random(self.experts * TOKENS, columns)
            offsets = list(range(0, len(inputs) + 1, TOKENS))
            emphasis = None
            if wanted.router_weighted:
                emphasis = torch.ones(len(inputs), device=self.device)
            own = routed_hessians(inputs, torch.tensor(offsets), weights=emphasis)
            effective_rank(own)
            common = torch.eye(columns, device=self.device)
            hessian = shrink(own, torch.tensor(offsets).diff(), common, STRENGTH * columns)
            if wanted.error_correction:
                drift = routed_drift(inputs * 1.125, inputs, offsets, emphasis) / len(inputs)
                weight = corrected(weight, hessian, drift)
        outputs = None
        if last and wanted.output_weighting and quantizer.weighs_outputs:
            outputs = row_order(torch.eye(rows, device=self.device))
        scheme = AffineScheme(wanted.bits, wanted.group_size, wanted.symmetric)
        quantizer.quantize(weight, hessian, scheme, solver_options(wanted), outputs)

    def outputs(self) -> None:
        """Products of tokens with a tile, and the sums of what its experts give to them."""
        g = self.geometry
        inputs = self._random(self.experts * TOKENS, g.hidden)
        offsets = list(range(0, len(inputs) + 1, TOKENS))
        wide = self._random(self.experts, 2 * g.inner, g.hidden)
        gate, up = grouped_product(inputs, wide, offsets).chunk(2, dim=-1)
        between = self.architecture.activation(gate) * up
        output = grouped_product(between, self._random(self.experts, g.hidden, g.inner), offsets)
        tokens = torch.arange(TOKENS, device=self.device).repeat(self.experts)
        weights = torch.ones(len(tokens), device=self.device)
        sums = token_sums(tokens, CHUNK)
        values = torch.zeros(len(sums.rows), g.hidden, device=self.device)
        for number, start in enumerate(range(0, len(tokens), CHUNK)):
            part = slice(start, start + CHUNK)
            sums.add(values, number, start, output[part], weights[part])
        add_rows(torch.zeros_like(values), sums.rows, values)

    def _random(self, *shape: int) -> Tensor:
        # A generator of its own: the process's belongs to whoever else draws from it.
        drawn = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=drawn, device=self.device, dtype=COMPUTE_DTYPE)


class WarmUp:
    """Warm-ups in threads; a context manager, which waits for those that are running."""

    def __init__(self, recipe: Recipe, announce: Callable[[str], None], *, wanted: bool) -> None:
        """Begins; `wanted`: whether layers may be solved at all.  `announce` is told, once, where
        something failed."""
        self._recipe = recipe
        self._announce = announce
        self._stop = Event()
        self._begun: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="warm-up")
        self._wanted = wanted and torch.cuda.is_available()
        self._first: Future[None] | None = None
        if self._wanted:
            self._first = self._pool.submit(self._begin, torch.device("cuda"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def opened(self, context: Context) -> None:
        """Go on with what needs the source's own layers."""
        if self._wanted:
            kinds = context.geometry.layer_kinds
            first = sorted({kind: kinds.index(kind) for kind in kinds}.values())
            self._submit(lambda: _forward(context, first, self._stop))

    def wait(self) -> None:
        """Until all is done; to be called before the first layer."""
        if not self._wanted:
            return
        self._wanted = False
        assert self._first is not None
        reasons = [_reason(self._first), *map(_reason, self._begun)]
        reason = next(filter(None, reasons), None)
        if reason is not None:  # the layers will say themselves what is wrong, if it matters
            self._announce(f"kernels could not be compiled ahead ({reason}); going on without")
        self._pool.shutdown()  # the threads' handles of CUDA's libraries serve others then
        self._first, self._begun = None, []  # an error holds on to what was on the device
        torch.cuda.empty_cache()

    def _submit(self, what: Callable[[], None]) -> None:
        def run() -> None:
            if not self._stop.is_set():
                with torch.inference_mode():
                    what()

        self._begun.append(self._pool.submit(run))

    def _begin(self, device: torch.device) -> None:
        """All that a config.json is enough for."""
        path = expanded(self._recipe.source.model)
        if not path.is_dir():
            return  # it is not on this machine yet
        config = read_json(path, "config.json")
        architecture = architecture_of(config, str(path))
        geometry = geometry_of(architecture, config, str(path))
        solver_backend(device)
        problem = Problem(self._recipe, architecture, geometry, device)
        inner, hidden = geometry.inner, geometry.hidden
        self._submit(lambda: problem.solve(2 * inner, hidden, last=False))
        self._submit(lambda: problem.solve(hidden, inner, last=True))
        self._submit(problem.outputs)


def _reason(begun: Future[None]) -> str | None:
    """Why it failed; None if it has not.

    An error that was raised here would hold itself by way of this frame, and with it what it held
    on the device, until a search for garbage, which leaves it out if it is older (`set_aside`).
    """
    error = begun.exception()
    return None if error is None else (str(error) or type(error).__name__).splitlines()[0]


def output_exists(recipe: Recipe) -> bool:
    """Whether the output is in place, so that there may be no layer left to do."""
    try:
        return WorkDirectory(Path(recipe.output.path).absolute()).output.exists()
    except OSError:  # told of by whoever opens it
        return True


def _forward(context: Context, layers: list[int], stop: Event) -> None:
    """A tile decoded, and some layers' dense parts on a batch of zeros, as a run does both."""
    # Begun in float32, which no other thread notices (`skeleton.build_skeleton`).
    home = Home(context.device, beside=place(context).beside)
    stream = LayerStream(
        context.checkpoint, context.architecture, context.device, torch.float32, home
    )
    stream.dtype = COMPUTE_DTYPE
    recipe = context.recipe
    lengths = {recipe.calibration.sequence_length, recipe.validate_.window}
    g = context.geometry
    first = range(min(context.tile_experts, g.experts))
    tile = TileSource(
        context.checkpoint, context.architecture, g.moe_layers[0], first, context.device
    )
    decode_tile(tile)
    with ExitStack() as after:
        after.callback(stream.rest)
        for layer in layers:
            if stop.is_set():
                return
            module = stream.build_layer(layer, stream.load_dense(layer))
            for length in sorted(lengths):
                sequences = max(1, TOKENS_PER_BATCH // length)
                shape = (sequences, length, g.hidden)
                hidden = home.empty(shape, COMPUTE_DTYPE).zero_()
                recorded = stream.record(module, hidden, hooked=False)
                if recorded.inputs is not None:
                    sort_by_expert(recorded, g.experts)
