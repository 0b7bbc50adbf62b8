"""A transformers model from an output directory of this pipeline, or any of its layout.

The skeleton comes from the config on the meta device; then every file is read once, matrix by
matrix, and what is read goes to its final place: dense tensors and quantised linear layers to the
GPU if there is one, routed experts (`routed.py`) where their roads want them.
"""

from __future__ import annotations

import gc
import importlib
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from pipeline.checkpoint import Checkpoint, StoredWeight
from pipeline.checkpoint.files import Memory, fresh
from pipeline.checkpoint.names import expert_of, natural
from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.errors import CheckpointError, ResourceError, UserError
from pipeline.hybrid.host import Staging
from pipeline.hybrid.modules import QuantizedLinear
from pipeline.hybrid.native import dense, steps
from pipeline.hybrid.native.experts import unusable
from pipeline.hybrid.native.library import name as kernel_name
from pipeline.hybrid.places import Machine, Places, find_places
from pipeline.hybrid.placing import count, divided
from pipeline.hybrid.remarks import tell, tell_rounded
from pipeline.hybrid.roads import CHOSEN, kernels_fail, known_use
from pipeline.hybrid.routed import PinningError, RoutedExperts
from pipeline.hybrid.stored import to_matrices
from pipeline.models import Architecture
from pipeline.models.architecture import Geometry
from pipeline.models.skeleton import (
    architecture_of,
    assign,
    build_skeleton,
    geometry_of,
    model_config,
    rotary_embedding,
)
from pipeline.sizes import parse_size

_DENSE_AT_ONCE = 4
"""Tensors outside the experts that are read side by side."""

NO_GPU = "no GPU was found: the whole model runs on the CPU"


def load(
    path: Path | str,
    *,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    placement: str = "auto",
    follow_use: bool = True,
    native: bool = True,
) -> PreTrainedModel:
    """Load a directory for inference; `generate`, `forward` and the rest work as usual.

    device_memory: bytes, or a size such as "10GiB", that the process may take of the GPU, all in
    all (`ledger.py`); without a GPU, what weights outside the experts may take.
    host_memory: the same for experts in RAM.
    device: where all but the experts goes; by default the first GPU if there is one.
    dtype: of activations and dense tensors, bfloat16, or float32 (exact, and slow on experts).

    placement: where experts are computed, see `pipeline.hybrid.placing`: "cpu"; "resident" or
    "zero-copy" (a GPU computes them, from its own or from pinned host memory); parts of each layer
    such as "resident:0.1,zero-copy:0.5,cpu:0.4"; "both": zero-copy, but while decoding the CPU
    computes a part of every token's calls, as a short measurement says, or "both:3"; "auto":
    zero-copy where there is a GPU and RAM can be pinned, both where that is measured to be faster,
    else cpu; "fill": the most used experts resident as far as `device_memory` goes, the others as
    by "auto".

    follow_use: resident experts are copies of zero-copy ones, and change with use while the model
    decodes on a GPU; False: the table stays as it is chosen, for timings that can be repeated.

    native: the CPU computes experts, and all of a decode step for a few tokens, by the compiled
    kernels where those were built and can; False: by torch's own operations.

    The model gains `hybrid_placement` (where things are, bytes, back ends, load seconds, and
    remarks: what is also logged, once per process, of a GPU or kernels that are missing) and
    `hybrid_quantization` (config.json's quantization_config, which transformers must not see).

    Raises UserErrors: CheckpointError for a directory that is damaged, of an unknown architecture
    or without packed experts, ResourceError when the device's memory does not suffice.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"dtype {dtype} is not supported: use torch.bfloat16 or torch.float32")
    limit = None if device_memory is None else parse_size(device_memory)
    host = None if host_memory is None else parse_size(host_memory)
    started = time.perf_counter()
    target = _choose_device(device)
    remarks = [NO_GPU] if device is None and target.type == "cpu" else []
    loader: _Loader | None = None
    try:
        loader = _filled(Path(path), target, dtype, placement, limit, host, follow_use, native)
    except PinningError as error:
        if placement not in CHOSEN:
            raise
        remarks.append(f"the CPU computes all experts: {error}")
    if loader is None:
        gc.collect()  # what was read so far: there is no room for it twice
        loader = _filled(Path(path), target, dtype, "cpu", limit, host, False, native)
    remarks += loader.remarks
    for remark in remarks:
        tell(remark)
    model = loader.model
    config = loader.checkpoint.config
    model.hybrid_quantization = config.get("quantization_config") or {}  # type: ignore[assignment]
    model.hybrid_placement = {  # type: ignore[assignment]
        "request": placement,
        **loader.placement(),
        "device_memory_limit": limit,
        "remarks": remarks,
        "load_seconds": time.perf_counter() - started,
    }
    model.save_pretrained = _refuse_saving  # type: ignore[method-assign]
    return model


def _filled(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    placement: str,
    limit: int | None,
    host: int | None,
    follow_use: bool,
    native: bool,
) -> _Loader:
    """A loader whose model has all its weights."""
    checkpoint = Checkpoint.open(path)
    loader = _Loader(checkpoint, device, dtype, follow_use and device.type == "cuda", native)
    need = loader.check_memory(limit)
    loader.choose_roads(placement, need, limit, host)
    with torch.inference_mode(False), torch.no_grad():
        loader.fill()
        loader.connect()
    checkpoint.close()
    return loader


class _Loader:
    """One load: the skeleton being filled, and what is counted on the way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        follow_use: bool,
        native: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self._follow_use = follow_use
        self._native = native
        self.device = device
        self.dtype = dtype
        where = str(checkpoint.path)
        self.architecture: Architecture = architecture_of(checkpoint.config, where)
        self.geometry: Geometry = geometry_of(self.architecture, checkpoint.config, where)
        self.model = build_skeleton(model_config(checkpoint.config), dtype)
        self.linears: list[StoredWeight] = []
        self.dense: list[StoredWeight] = []
        self._sort_weights()
        self._backends: dict[str, Counter[str]] = {"experts": Counter(), "linears": Counter()}
        self._bytes = {"experts": 0, "quantized_linears": 0, "dense": 0}
        self._rounded: list[str] = []
        self.remarks: list[str] = []
        """What is to be said of the roads that were chosen."""
        self._places = Places()
        self._request = ""
        self._cpu_calls: int | None = 0
        self._divided = 0
        self._prompts = ""
        """Beside a GPU, which side computes the CPU's experts for prompts."""
        self._memory: Memory = Staging(device) if device.type == "cuda" else fresh
        self._experts = RoutedExperts(
            checkpoint, self.architecture, self.geometry, device, dtype, self._memory, native=native
        )
        self._by_road: Counter[str] = Counter()

    def _sort_weights(self) -> None:
        """Which weights outside the experts stay quantised, which are dense, which are not ours."""
        ignored = [re.compile(p) for p in self.model._keys_to_ignore_on_load_unexpected or ()]
        modules = dict(self.model.named_modules())
        for name in sorted(self.checkpoint.weights, key=natural):
            weight = self.checkpoint.weights[name]
            if any(pattern.search(name) for pattern in ignored) or expert_of(name):
                continue
            linear = isinstance(modules.get(name.removesuffix(".weight")), nn.Linear)
            packed = linear and self.checkpoint.is_packed(name)
            (self.linears if packed else self.dense).append(weight)

    def check_memory(self, limit: int | None) -> int:
        """Bytes outside the experts; ResourceError when they exceed `limit` or what is free."""
        need = sum(weight.nbytes for weight in self.linears)
        need += sum(weight.elements for weight in self.dense) * self.dtype.itemsize
        gib = f"{need / 2**30:.2f} GiB"
        if limit is not None and need > limit:
            more = " or more"
            if self.device.type == "cuda":
                more = " and some 4 GiB for caches, prompts and code, or use device cpu"
            raise ResourceError(
                f"{self.checkpoint.path}: weights outside the experts need {gib} on the device, "
                f"device_memory allows {limit / 2**30:.2f} GiB: allow {need:,} bytes{more}"
            )
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if need > free:
                raise ResourceError(
                    f"{self.checkpoint.path}: weights outside the experts need {gib}, "
                    f"{free / 2**30:.2f} GiB are free on {self.device}: "
                    "free some, or use device cpu"
                )
        return need

    def choose_roads(self, placement: str, need: int, limit: int | None, host: int | None) -> None:
        """Find every expert's place; ResourceError when experts do not fit where it wants them.

        need: bytes that the rest takes on the device; limit and host: of device and RAM.
        """
        self._request = placement
        placement, self._cpu_calls = divided(placement)
        if self._cpu_calls != 0 and (missing := unusable(self._native, self.dtype)):
            raise UserError(f'placement "{self._request}" needs the compiled kernel: {missing}')
        machine = Machine(self.device, self.dtype, limit, host, self._follow_use, self._native)
        self._places = find_places(
            placement,
            self._layer_experts(),
            self._experts,
            self.model.config,
            self.geometry,
            need,
            machine,
            str(self.checkpoint.path),
        )
        self.remarks += self._places.remarks
        on_cpu = any("cpu" in roads for roads in self._places.homes.values())
        wanted = on_cpu and self._native and self.dtype == torch.bfloat16
        if wanted and (missing := unusable(self._native, self.dtype)):
            self.remarks.append(f"no native kernel, torch's products compute experts: {missing}")

    def _layer_experts(self) -> dict[int, LayerExperts]:
        """Size and use of each layer's experts; use is known where there is a shard map."""
        experts = self.geometry.experts
        shares = known_use(self.checkpoint.path)
        layers = {}
        for layer in self.geometry.moe_layers:
            size = self._experts.nbytes(layer)
            calls = shares.get(layer)
            fits = calls is not None and len(calls) == experts
            layers[layer] = LayerExperts(experts, size, calls if fits else None)
        return layers

    def fill(self) -> None:
        """Give every module of the skeleton its weights."""
        for layer in self.geometry.moe_layers:  # so that nobody looks for these parameters
            self._place(self._experts_name(layer), nn.Identity())
        places = self._places
        with self._experts.rooms(places.homes, visiting=places.visiting, pinning=places.pinning):
            for weight in self.linears:
                self._fill_linear(weight)
            self._fill_dense()
            if self._native and self.device.type == "cpu":
                dense.use_in(self.model)
                steps.use_in(self.model)
            for filled in self._experts.fill(places.homes):
                self._by_road.update(filled.by_road)
                self._backends["experts"].update(filled.backends)
                self._rounded += filled.rounded
                self._bytes["experts"] += filled.module.nbytes
                self._place(self._experts_name(filled.layer), filled.module)
        if self._rounded:
            tell_rounded(str(self.checkpoint.path), len(self._rounded), self._rounded[0])
        path = self.checkpoint.path
        self.model.config.name_or_path = self.model.name_or_path = str(path)
        if (path / "generation_config.json").exists():
            self.model.generation_config = GenerationConfig.from_pretrained(path)
        everything = (*self.model.named_parameters(), *self.model.named_buffers())
        lost = [name for name, tensor in everything if tensor.is_meta]
        if lost:
            raise CheckpointError(f"{path}: {lost[0]} and {len(lost) - 1} more have no weights")

    def connect(self) -> None:
        """On a GPU, decode in fixed buffers and so on, as far as its kernels work."""
        if self.device.type == "cuda" and kernels_fail(self.device) is None:
            runtime = importlib.import_module("pipeline.hybrid.runtime")  # imports Triton
            places = self._places
            top_k = self.geometry.top_k if places.visiting else None
            runtime.connect(self.model, places.copies, top_k=top_k, buffers=places.buffers)
            if self._native:
                self._hand_over(runtime.hand_over_as)
            if any("cpu" in roads for roads in places.homes.values()):
                self._prompts = runtime.prompts(self.model) + places.why_not
            torch.cuda.empty_cache()  # what laying out experts took is free for prompts' needs

    def _hand_over(
        self, hand_over_as: Callable[[PreTrainedModel, str, int | None], tuple[int, str]]
    ) -> None:
        """Decoding goes through Python where it cannot be handed over, unless that was wanted."""
        try:
            self._divided, why_not = hand_over_as(self.model, self._request, self._cpu_calls)
            if self._divided:
                self._backends["experts"][kernel_name()] += self._backends["experts"]["triton"]
            elif self._cpu_calls != 0:
                self.remarks.append(f"the CPU gets no calls of zero-copy experts: {why_not}")
        except ResourceError as error:
            if self._cpu_calls != 0:
                raise
            self.remarks.append(str(error))

    def placement(self) -> dict[str, Any]:
        """For reports: plain strings and numbers."""
        whole = {str(layer): roads[0] for layer, roads in self._places.roads.items()}
        mixed = {k: v for k, v in count(self._places.roads).items() if len(v) > 1}
        return {
            "device": str(self.device),
            "bytes": {**self._bytes},
            "experts": {**whole, **mixed},
            "expert_bytes": dict(self._by_road),
            "cpu_calls": self._divided,
            "prompts": self._prompts,
            "ledger": self._places.ledger.items() if self._places.ledger else {},
            "backends": {kind: dict(counts) for kind, counts in self._backends.items()},
        }

    def _fill_linear(self, weight: StoredWeight) -> None:
        module = weight.name.removesuffix(".weight")
        old = self.model.get_submodule(module)
        assert isinstance(old, nn.Linear), f"{module} was sorted as a linear layer"
        rows, columns = old.out_features, old.in_features
        if weight.shape != (rows, columns):
            raise CheckpointError(
                f"{self.checkpoint.path}: {weight.name} is {list(weight.shape or ())}, "
                f"config.json asks for {[rows, columns]}"
            )
        quantized = self.checkpoint.load_quantized([weight.name], self.device, self._memory)
        backend, matrix = to_matrices(quantized, self.dtype)
        self._backends["linears"][backend] += 1
        self._rounded += [module] if matrix.rounded_scales else []
        self._bytes["quantized_linears"] += matrix.nbytes
        # the bias, if any, stays on meta here and comes with the dense tensors
        self._place(module, QuantizedLinear(matrix, rows, columns, old.bias))

    def _fill_dense(self) -> None:
        def load(weight: StoredWeight) -> Tensor:
            fetched = self.checkpoint.fetch([[weight.name]], self._memory).to(self.device)
            return self.checkpoint.decode(fetched, self.dtype)[0][0]

        with ThreadPoolExecutor(min(_DENSE_AT_ONCE, torch.get_num_threads()), "dense") as pool:
            names = (weight.name for weight in self.dense)
            tensors = dict(zip(names, pool.map(load, self.dense), strict=True))
        self._bytes["dense"] += sum(tensor.nbytes for tensor in tensors.values())
        # A tied head is the embedding's own parameter, whether or not it is stored again.
        tied = (self.architecture.head,) if self.model.config.tie_word_embeddings else ()
        assign(self.model, {k: v for k, v in tensors.items() if not k.startswith(tied)}, tied)
        if tied:
            self.model.tie_weights()
        rotary = rotary_embedding(self.model, self.device)
        self.model.model.rotary_emb = rotary

    def _experts_name(self, layer: int) -> str:
        return self.architecture.layer_prefix(layer) + self.architecture.experts

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module.eval())


def _choose_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", torch.cuda.current_device())
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {chosen}: torch finds no GPU here; use device cpu")
    return chosen


def _refuse_saving(*args: object, **kwargs: object) -> NoReturn:
    raise UserError("a hybrid model cannot be saved: its directory is already on disk, copy that")
