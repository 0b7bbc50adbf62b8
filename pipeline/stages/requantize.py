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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.checkpoint.split import experts_file
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.errors import NumericalError
from pipeline.evaluate.reference import ReferenceBuilder
from pipeline.evaluate.windows import Windows
from pipeline.models.architecture import ModuleGroup
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor
from pipeline.stages.context import Context, Job
from pipeline.stages.experts import (
    DOWN_SAMPLE_TOKENS,
    LayerStatistics,
    Routed,
    SolvedTile,
    TileJob,
    add_output,
    decode_tile,
    solve_tile,
    sort_by_expert,
    tiles,
)
from pipeline.stages.folding import FoldedLayer, LayerFolding
from pipeline.stages.formats import output_format
from pipeline.stages.stream import (
    COMPUTE_DTYPE,
    LayerStream,
    Recorded,
    check_finite,
)
from pipeline.stages.units import (
    REFERENCE_FILE,
    REFERENCE_UNIT,
    dense_file,
    layer_unit,
    streams_file,
)


@dataclass
class _Streams:
    """The streams, bf16 [sequences, length, hidden], as they leave layer `after`."""

    after: int
    calibration: Tensor
    evaluation: Tensor
    target: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name."""
        kept = {"calibration": self.calibration, "evaluation": self.evaluation}
        return kept if self.target is None else kept | {"target": self.target}


class Requantize:
    """The stage; see the module's text."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._texts = context.texts
        recipe = context.recipe.requantize
        self._quantizer = QUANTIZERS[recipe.method]
        self._scheme = AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric)
        self._options = SolverOptions(
            damping=recipe.damping,
            activation_order=recipe.activation_order,
            scale_search=recipe.scale_search,
            refinement_passes=recipe.refinement_passes,
        )
        self._corrects = recipe.error_correction and self._quantizer.needs_hessian
        self._pack = output_format(recipe).pack
        self._stream = LayerStream(context.checkpoint, context.architecture, context.device)
        self._folding = (
            LayerFolding(context, self._stream, self._scheme, self._options)
            if self._quantizer.folds
            else None
        )
        self._streams: _Streams | None = None
        # One writer, at most one layer behind: the packed layer being written and the one being
        # solved are all the host ever holds.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._pending: Future[None] | None = None

    def run(self, job: Job) -> None:
        """Quantise one layer, or record the reference after the last."""
        started = time.monotonic()
        layer = self._context.geometry.layers if job.layer is None else job.layer
        streams = self._enter(layer)
        if job.layer is None:
            self._wait()
            self._record_reference(streams, started)
            return
        files, data = self._layer(layer, streams)
        self._wait()
        snapshot = streams.tensors()
        # Writing goes on beside the next layer's work, so its time is not this unit's.
        seconds = time.monotonic() - started
        self._pending = self._writer.submit(self._write, layer, files, snapshot, data, seconds)

    def close(self) -> None:
        """Wait for the last layer to be on disk."""
        try:
            self._wait()
        finally:
            self._writer.shutdown()
            self._reader.shutdown(cancel_futures=True)
            self._streams = None

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _enter(self, layer: int) -> _Streams:
        """The streams as they enter a layer: in memory, embedded anew, or from disk."""
        if self._streams is not None and self._streams.after == layer - 1:
            return self._streams
        device = self._context.device
        if layer == 0:
            calibration = self._stream.embed(self._texts.calibration)
            evaluation = self._stream.embed(self._texts.windows.token_ids)
            check_finite(calibration, "the embedding")
            target = calibration if self._corrects else None
            self._streams = _Streams(-1, calibration, evaluation, target)
        else:
            saved = load_file(self._context.work.root / streams_file(layer - 1))
            moved = {name: tensor.to(device) for name, tensor in saved.items()}
            self._streams = _Streams(layer - 1, **moved)
        return self._streams

    def _layer(
        self, layer: int, streams: _Streams
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Advance the streams by a layer; returns its files' tensors and its statistics."""
        context = self._context
        stored = self._stream.load_dense(layer)
        module = self._stream.build_layer(layer, stored)
        source = self._stream.record(module, streams.evaluation)
        check_finite(source.base, f"layer {layer} of the source")
        target = None if streams.target is None else self._stream.record(module, streams.target)
        folded = FoldedLayer()
        if self._folding is not None:
            folded = self._folding.fold(layer, module, stored, streams.calibration)
            stored |= folded.tensors
            module = self._stream.build_layer(layer, stored)
        packed, losses = self._dense_modules(layer, module, streams.calibration)
        written = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in packed}
        for name, parts in packed.items():
            written |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        files = {dense_file(layer): {n: t.cpu() for n, t in written.items()}}
        recorded = self._stream.record(module, streams.calibration)
        check_finite(recorded.base, f"layer {layer}")
        data: dict[str, Any] = {"layer": layer, "dense_loss": losses, "folds": folded.scales}
        if recorded.inputs is None:
            streams.calibration, streams.evaluation = recorded.base, source.base
            streams.target = None if target is None else target.base
        else:
            experts, statistics = self._experts(layer, recorded, source, target, folded, streams)
            files[experts_file(layer)] = experts
            data |= statistics
        streams.after = layer
        where = f"layer {layer}"
        check_finite(streams.evaluation, f"{where} of the source")
        check_finite(streams.calibration, where)
        context.progress(f"layer {layer + 1} of {context.geometry.layers} solved")
        return files, data

    def _dense_modules(
        self, layer: int, module: nn.Module, hidden: Tensor
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """Quantise the chosen modules outside the experts, in the order a forward pass meets them.

        Each group is solved on a pass through what was quantised before it.
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
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            total = x.T @ x if total is None else total.addmm_(x.T, x)
            tokens += len(x)

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
        streams: _Streams,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Solve a layer's experts tile by tile; advances the streams."""
        geometry = self._context.geometry
        routed = sort_by_expert(recorded, geometry.experts)
        total = torch.zeros_like(routed.inputs, dtype=torch.float32)
        # Streams that see the source's weights: the same decoded tile serves them.
        sorted_ = [sort_by_expert(s, geometry.experts) for s in (source, target) if s is not None]
        faithful = [(r, torch.zeros_like(r.inputs, dtype=torch.float32)) for r in sorted_]
        statistics = self._layer_statistics(layer, routed, target, folded)
        packed: dict[str, Tensor] = {}
        losses: dict[str, list[float]] = {"gate_up_loss": [], "down_loss": []}
        rank: list[float] = []
        jobs = [self._tile_job(layer, experts) for experts in tiles(geometry.experts)]
        ahead = self._reader.submit(decode_tile, jobs[0])
        for number, job in enumerate(jobs):
            dense = ahead.result()
            if number + 1 < len(jobs):
                ahead = self._reader.submit(decode_tile, jobs[number + 1])
            with torch.inference_mode():
                for of_source, sum_of_source in faithful:
                    add_output(job, dense, of_source, sum_of_source)
                solved = solve_tile(job, dense, routed, statistics)
                add_output(job, solved.dense, routed, total)
            packed |= self._packed(job, solved)
            losses["gate_up_loss"] += solved.gate_up_loss
            losses["down_loss"] += solved.down_loss
            rank += [round(value, 2) for value in solved.effective_rank]
            self._context.progress(
                f"layer {layer + 1} of {geometry.layers}, expert {job.experts.stop}"
                f" of {geometry.experts}"
            )
        streams.calibration = recorded.with_experts(total)
        streams.evaluation = source.with_experts(faithful[0][1])
        if target is not None:
            streams.target = target.with_experts(faithful[1][1])
        tokens = [routed.count(e) for e in range(geometry.experts)]
        return packed, {"tokens": tokens, "effective_rank": rank, **losses}

    def _layer_statistics(
        self, layer: int, routed: Routed, target: Recorded | None, folded: FoldedLayer
    ) -> LayerStatistics:
        tokens = len(routed.inputs)
        common = torch.zeros(
            routed.inputs.shape[1], routed.inputs.shape[1], device=routed.inputs.device
        )
        for part in routed.inputs.split(8192):
            x = part.float()
            common.addmm_(x.T, x)
        generator = torch.Generator().manual_seed(
            self._context.recipe.calibration.seed * 1_000_003 + layer
        )
        chosen = torch.randperm(tokens, generator=generator)[:DOWN_SAMPLE_TOKENS]
        return LayerStatistics(
            common=common / tokens,
            sample=routed.inputs[chosen.to(routed.inputs.device)],
            target=None if target is None else target.inputs,
            scale=folded.experts,
            folds_down=folded.down,
        )

    def _tile_job(self, layer: int, experts: range) -> TileJob:
        context = self._context
        return TileJob(
            checkpoint=context.checkpoint,
            architecture=context.architecture,
            layer=layer,
            experts=experts,
            device=context.device,
            quantizer=self._quantizer,
            scheme=self._scheme,
            options=self._options,
            inner=context.geometry.inner,
            router_weighted=context.recipe.requantize.router_weighted,
        )

    def _packed(self, job: TileJob, solved: SolvedTile) -> dict[str, Tensor]:
        """A tile's packed tensors by on-disk name, on the host."""
        a = job.architecture
        named: dict[str, Tensor] = {}
        by_projection: Mapping[str, QuantizedTensor] = {
            a.gate: solved.gate,
            a.up: solved.up,
            a.down: solved.down,
        }
        for projection, quantized in by_projection.items():
            parts = {k: v.cpu() for k, v in self._pack(quantized).items()}
            for i, expert in enumerate(job.experts):
                module = a.expert_module(job.layer, expert, projection)
                named |= {f"{module}.{part}": stack[i] for part, stack in parts.items()}
        return named

    def _write(
        self,
        layer: int,
        files: Mapping[str, Mapping[str, Tensor]],
        snapshot: Mapping[str, Tensor],
        data: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Write a layer's files, then the streams, then the marker; drop older streams."""
        work = self._context.work
        records = [self._write_file(name, tensors) for name, tensors in files.items()]
        # The streams are no output: a later layer may remove them, so the marker leaves them out.
        self._write_file(streams_file(layer), {k: v.cpu() for k, v in snapshot.items()})
        work.finish(layer_unit(layer), records, seconds, data)
        if layer > 0:
            (work.root / streams_file(layer - 1)).unlink(missing_ok=True)

    def _write_file(self, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        path = self._context.work.root / name
        record = write_safetensors(path, tensors, {"format": "pt"})
        return FileRecord(name, record.size, record.sha256)

    def _record_reference(self, streams: _Streams, started: float) -> None:
        """Source predictions on the validation windows, and the tensors outside all layers."""
        checkpoint = self._context.checkpoint
        records = [
            self._write_file(
                dense_file(None), {n: checkpoint.load(n) for n in self._stream.outer_names()}
            )
        ]
        windows: Windows = self._texts.windows
        builder = ReferenceBuilder(windows, labels=self._texts.labels)
        for first, logits in self._stream.logits(streams.evaluation):
            builder.add(first, logits)
        reference = builder.build()
        path = self._context.work.root / REFERENCE_FILE
        records.append(reference.save(path))
        self._context.work.finish(
            REFERENCE_UNIT,
            records,
            time.monotonic() - started,
            {"source_perplexity": reference.perplexity},
        )


def _present(module: nn.Module, group: ModuleGroup) -> bool:
    try:
        module.get_submodule(group.modules[0])
    except AttributeError:
        return False
    return True
