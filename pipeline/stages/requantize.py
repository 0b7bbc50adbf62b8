"""Stage 2: quantise layer by layer on calibration activations.

Streams of activations go through the model together, one layer at a time:
  calibration  through the quantised layers, so that each layer is solved for the inputs that it
               will really get;
  target       the same text through the source's layers, so that the experts can make up for what
               the layers before them lost (`pipeline.quantize.correction`);
  evaluation   through the source's layers, so that at the end the source's own predictions on the
               validation text are known without the source ever being in memory.

A layer's unit: record the streams through the dense parts, fold scales where the method asks for
them (the calibration stream alone goes on through what was folded), quantise the chosen dense
modules, sort the routed tokens by expert, solve the experts tile by tile, write the layer's files,
save the streams.  The last unit turns the evaluation stream into the reference.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.writer import FileRecord
from pipeline.errors import NumericalError
from pipeline.evaluate.reference import ReferenceBuilder
from pipeline.evaluate.windows import Windows
from pipeline.models.architecture import ModuleGroup
from pipeline.quantize.hessian import add_moment, rounded_out
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.context import Context, Job
from pipeline.stages.experts import DOWN_SAMPLE_TOKENS, LayerStatistics, TileJob
from pipeline.stages.folding import FoldedLayer, LayerFolding
from pipeline.stages.formats import output_format, solver_options
from pipeline.stages.home import Home
from pipeline.stages.nonexpert import gather_nonexpert
from pipeline.stages.output import LayerEnd, LayerOutput, OutputWriter
from pipeline.stages.placement import place
from pipeline.stages.routing import Routed, rows_of, sort_by_expert
from pipeline.stages.sensitivity import Sensitivity
from pipeline.stages.source import record_source
from pipeline.stages.stream import COMPUTE_DTYPE, LayerStream, Recorded, check_finite
from pipeline.stages.streams import SavePolicy, Streams
from pipeline.stages.tiles import LayerInputs, TileCrew
from pipeline.stages.tiling import tiles
from pipeline.stages.units import (
    ORIGINAL_FILE,
    ORIGINAL_UNIT,
    REFERENCE_FILE,
    REFERENCE_UNIT,
    dense_file,
)


class Requantize:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        context.warmed()
        self._texts = context.texts
        recipe = context.recipe.requantize
        self._quantizer = QUANTIZERS[recipe.method]
        self._scheme = AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric)
        self._options = solver_options(recipe)
        self._corrects = recipe.error_correction and self._quantizer.needs_hessian
        self._weighs = recipe.output_weighting and self._quantizer.weighs_outputs
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="sensitivity")
        self._sensitivity: Future[Sensitivity] | None = None
        self._pack = output_format(recipe).pack
        placement = place(context)
        self._home = Home(context.device, beside=placement.beside)
        self._stream = LayerStream(
            context.checkpoint, context.architecture, context.device, home=self._home
        )
        parts = (context, self._stream, self._scheme, self._options)
        self._folding = LayerFolding(*parts) if self._quantizer.folds else None
        self._streams: Streams | None = None
        self._policy = SavePolicy()
        self._snapshot: dict[str, Tensor] | None = None
        self._writer = OutputWriter(context.work, placement.behind)
        self._crew = TileCrew(context.solvers, placement, self._home, self._pack)
        self._reading = False
        self._begun = time.monotonic()
        self._read_before = context.checkpoint.bytes_read
        self._solved = 0

    def run(self, job: Job) -> None:
        """Quantise one layer, or record the reference after the last."""
        started = time.monotonic()
        if job.unit == ORIGINAL_UNIT:
            self._record_original(started)
            return
        layer = self._context.geometry.layers if job.layer is None else job.layer
        if job.layer is None:
            self._record_reference(self._enter(layer), started)
            return
        if self._weighs and self._sensitivity is None:
            context = self._context
            self._sensitivity = self._beside.submit(
                Sensitivity, context.checkpoint, context.architecture, context.device
            )
        streams = self._enter(layer)
        if self._sensitivity is not None:
            # Before a layer is gone through: it sets the precision of the process's products.
            self._sensitivity.result()
        if not self._reading:
            self._crew.read(lambda: self._jobs_from(layer))
            self._reading = True
        self._layer(layer, streams, started)

    def close(self) -> None:
        """Wait for the last layer to be on disk."""
        try:
            self._writer.close()
        finally:
            self._crew.close()
            self._beside.shutdown()
            self._home.settle(self._context.solvers)  # if stopped, they work on the streams still
            self._streams = self._snapshot = self._sensitivity = None

    def _enter(self, layer: int) -> Streams:
        """The streams as they enter a layer: in memory, embedded anew, or from disk."""
        if self._streams is not None and self._streams.after == layer - 1:
            return self._streams
        if layer == 0:
            texts = (self._texts.calibration, self._texts.windows.token_ids)
            calibration, evaluation = self._stream.embed_all(texts)
            check_finite(calibration, "the embedding")
            target = self._home.keep(calibration) if self._corrects else None
            self._streams = Streams(-1, calibration, evaluation, target)
        else:
            self._streams = Streams.load(self._context.work, layer - 1, self._home)
        return self._streams

    def _layer(self, layer: int, streams: Streams, started: float) -> None:
        """Advance the streams by a layer; its files are written behind."""
        context = self._context
        stored = self._stream.load_dense(layer)
        module = self._stream.build_layer(layer, stored)
        source = self._stream.record(module, streams.evaluation, hooked=False)
        check_finite(source.base, f"layer {layer} of the source")
        target = None
        if streams.target is not None:
            target = self._stream.record(module, streams.target, hooked=False)
        folded = FoldedLayer()
        if self._folding is not None:
            folded = self._folding.fold(layer, module, stored, streams.calibration)
            stored |= folded.tensors
            module = self._stream.build_layer(layer, stored)
        counted: Counter[str] = Counter(raised_damping=0, smallest_scales=0)
        packed, losses = self._dense_modules(layer, module, streams.calibration, counted)
        written = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in packed}
        for name, parts in packed.items():
            written |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        dense = {n: t.cpu() for n, t in written.items()}
        recorded = self._stream.record(module, streams.calibration, hooked=False)
        check_finite(recorded.base, f"layer {layer}")
        data: dict[str, Any] = {"layer": layer, "dense_loss": losses, "folds": folded.scales}
        sparse = recorded.inputs is not None
        output = self._writer.begin(
            layer,
            context.geometry.experts if sparse else 0,
            lambda expert, p: context.architecture.expert_module(layer, expert, p),
        )
        try:
            if sparse:
                data |= self._experts(
                    layer, recorded, source, target, folded, streams, output, counted
                )
            else:
                streams.calibration, streams.evaluation = recorded.base, source.base
                streams.target = None if target is None else target.base
            data |= counted
            streams.after = layer
            where = f"layer {layer}"
            check_finite(streams.evaluation, f"{where} of the source")
            check_finite(streams.calibration, where)
            if streams.target is not None:
                check_finite(streams.target, f"{where} of the source")
            due = self._policy.due(streams.nbytes, self._writer.bytes_per_second)
            if due:
                spare = None if self._writer.saving else self._snapshot
                self._snapshot = streams.snapshot(spare)
            # Writing goes on beside the next layer's work, so its time is not this unit's.
            saved = self._snapshot if due else None
            output.put(LayerEnd(dense, saved, time.monotonic() - started, data))
        except BaseException:
            output.abandon()
            raise
        context.progress(f"layer {layer + 1} of {context.geometry.layers} solved")

    def _dense_modules(
        self, layer: int, module: nn.Module, hidden: Tensor, counted: Counter[str]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """Quantise the chosen modules outside the experts, in the order a forward pass meets them.

        Each group is solved on a pass through what was quantised before it.  `counted` is added to.
        """
        architecture = self._context.architecture
        chosen = set(self._context.recipe.requantize.modules)
        packed: dict[str, dict[str, Tensor]] = {}
        losses: dict[str, float] = {}
        for group in (*architecture.mixer_groups, *architecture.shared_groups):
            if group.module_class not in chosen or not _present(module, group):
                continue
            hessian = None
            if self._quantizer.needs_hessian:
                hessian = self._group_hessian(module, group, hidden)
            for name in group.modules:
                linear = module.get_submodule(name)
                assert isinstance(linear.weight, Tensor)
                full = f"{architecture.layer_prefix(layer)}{name}"
                weight = linear.weight.float().unsqueeze(0)
                try:
                    solved = self._quantizer.quantize(weight, hessian, self._scheme, self._options)
                except NumericalError as error:
                    raise NumericalError(f"{full}: {error}") from None
                packed[full] = {
                    part: stack[0].cpu() for part, stack in self._pack(solved.quantized).items()
                }
                losses[name] = float(solved.loss[0])
                counted["raised_damping"] += solved.raised
                counted["smallest_scales"] += solved.smallest_scales
                dense = solved.quantized.dequantize(COMPUTE_DTYPE)[0]
                linear.weight = nn.Parameter(dense, requires_grad=False)
        return packed, losses

    def _group_hessian(self, module: nn.Module, group: ModuleGroup, hidden: Tensor) -> Tensor:
        """Mean of x x^T over the inputs of a group, float32 [1, in, in]."""
        first = module.get_submodule(group.modules[0])
        total: Tensor | None = None
        tokens = 0

        def collect(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal total, tokens
            total = add_moment(total, inputs[0])
            tokens += inputs[0].shape[:-1].numel()

        handle = first.register_forward_pre_hook(collect)
        try:
            self._stream.record(module, hidden)
        finally:
            handle.remove()
        assert total is not None
        return (total / tokens).unsqueeze(0)

    def _experts(
        self,
        layer: int,
        recorded: Recorded,
        source: Recorded,
        target: Recorded | None,
        folded: FoldedLayer,
        streams: Streams,
        output: LayerOutput,
        counted: Counter[str],
    ) -> dict[str, Any]:
        """Solve a layer's experts tile by tile; advances the streams."""
        geometry = self._context.geometry
        routed = sort_by_expert(recorded, geometry.experts)
        # Streams that see the source's weights: the same decoded tile serves them.
        faithful = [s for s in (source, target) if s is not None]
        inputs = LayerInputs(
            routed,
            tuple(sort_by_expert(s, geometry.experts) for s in faithful),
            self._layer_statistics(layer, routed, target, folded),
        )
        shapes = [stream.inputs.shape for stream in (routed, *inputs.source)]
        totals = [self._home.empty(shape, torch.float32).zero_() for shape in shapes]
        losses: dict[str, list[float]] = {"gate_up_loss": [], "down_loss": []}
        rank: list[float] = []
        jobs = list(self._layer_jobs(layer))
        for result in self._crew.solve(jobs, inputs, totals):
            output.put(result.packed)
            losses["gate_up_loss"] += result.gate_up_loss
            losses["down_loss"] += result.down_loss
            rank += [round(value, 2) for value in result.effective_rank]
            counted["raised_damping"] += result.raised_damping
            counted["smallest_scales"] += result.smallest_scales
            self._solved += len(result.job.experts)
            self._context.within(result.job.experts.stop / geometry.experts)
            self._context.progress(
                f"layer {layer + 1} of {geometry.layers}, expert {result.job.experts.stop}"
                f" of {geometry.experts}; {self._rates()}"
            )
        streams.calibration = recorded.with_experts(totals[0])
        streams.evaluation = source.with_experts(totals[1])
        if target is not None:
            streams.target = target.with_experts(totals[2])
        tokens = [routed.count(e) for e in range(geometry.experts)]
        return {"tokens": tokens, "effective_rank": rank, **losses}

    def _rates(self) -> str:
        """How fast it goes, since this run's first layer."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        read = (self._context.checkpoint.bytes_read - self._read_before) / seconds / 1e9
        written = self._writer.bytes_written / seconds / 1e9
        experts = self._solved / seconds
        return f"{experts:.1f} experts/s, {read:.2f} GB/s read, {written:.2f} GB/s written"

    def _layer_statistics(
        self, layer: int, routed: Routed, target: Recorded | None, folded: FoldedLayer
    ) -> LayerStatistics:
        tokens = len(routed.inputs)
        device = self._context.device
        common = torch.zeros(routed.inputs.shape[1], routed.inputs.shape[1], device=device)
        for part in routed.inputs.split(8192):
            add_moment(common, part)
        generator = torch.Generator().manual_seed(
            self._context.recipe.calibration.seed * 1_000_003 + layer
        )
        chosen = torch.randperm(tokens, generator=generator)[:DOWN_SAMPLE_TOKENS]
        return LayerStatistics(
            common=rounded_out(common / tokens, tokens),
            sample=rows_of(routed.inputs, chosen.to(device)),
            target=None if target is None else target.inputs,
            outputs=self._sensitivity.result().rows(layer) if self._sensitivity else None,
            scale=folded.experts,
            folds_down=folded.down,
        )

    def _jobs_from(self, layer: int) -> Iterator[TileJob]:
        """All tiles from a layer on."""
        for i in self._context.geometry.moe_layers:
            if i >= layer:
                yield from self._layer_jobs(i)

    def _layer_jobs(self, layer: int) -> Iterator[TileJob]:
        context = self._context
        for number, experts in enumerate(tiles(context.geometry.experts, context.tile_experts)):
            yield TileJob(
                checkpoint=context.checkpoint,
                architecture=context.architecture,
                layer=layer,
                experts=experts,
                device=self._crew.device_of(number),
                quantizer=self._quantizer,
                scheme=self._scheme,
                options=self._options,
                inner=context.geometry.inner,
                router_weighted=context.recipe.requantize.router_weighted,
            )

    def _record_reference(self, streams: Streams, started: float) -> None:
        """Source predictions on the validation windows, and the tensors outside all layers."""
        windows: Windows = self._texts.windows
        builder = ReferenceBuilder(windows, labels=self._texts.labels)
        with ThreadPoolExecutor(1, thread_name_prefix="outer") as beside:
            rest = beside.submit(self._write_rest)
            for first, logits in self._stream.logits(streams.evaluation):
                builder.add(first, logits)
            reference = builder.build()
            record = reference.save(self._context.work.root / REFERENCE_FILE)
            records = [*rest.result(), record]
        self._context.work.finish(
            REFERENCE_UNIT,
            records,
            time.monotonic() - started,
            {"source_perplexity": reference.perplexity},
        )

    def _write_rest(self) -> list[FileRecord]:
        """The shards of all but experts: what the layers left, and what lies outside all layers."""
        context = self._context
        self._writer.wait()
        files = [dense_file(layer) for layer in range(context.geometry.layers)]
        outer = self._stream.outer_names()
        return list(gather_nonexpert(context.work.root, files, context.checkpoint, outer))

    def _record_original(self, started: float) -> None:
        """The original's predictions on the validation windows."""
        context = self._context
        assert context.original is not None
        reference = record_source(
            context.original,
            context.architecture,
            self._texts.windows,
            self._texts.labels,
            context.device,
            progress=lambda message: context.progress(message.replace("source", "original", 1)),
        )
        record = reference.save(context.work.root / ORIGINAL_FILE)
        seconds = time.monotonic() - started
        context.work.finish(ORIGINAL_UNIT, [record], seconds, {"perplexity": reference.perplexity})


def _present(module: nn.Module, group: ModuleGroup) -> bool:
    try:
        module.get_submodule(group.modules[0])
    except AttributeError:
        return False
    return True
