"""Qwen3-Next at its true geometry for benchmarks: random weights, experts packed in place.

One layer's experts are random int4 codes; other layers hold copies of the same bytes at addresses
of their own, which takes seconds where quantising would take minutes.  Nothing else is cut short:
modules, kernels and roads are those of a loaded model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from synthetic_geometries import MODELS
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.hybrid.backends import BACKENDS
from pipeline.hybrid.host import fault_in, host_memory, pin_memory
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native import dense, steps
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.placing import ROADS, Road
from pipeline.hybrid.records import Layout, Records, empty, planned_layout
from pipeline.hybrid.split import DeviceRoad, SplitExperts
from pipeline.hybrid.stored import to_matrices
from pipeline.models.skeleton import build_skeleton, model_config, rotary_embedding
from pipeline.quantize.tensor import AffineScheme

SCHEME = AffineScheme(4, 128, True)
Shares = dict[Road, float]
POOL = 16_777_213
"""Random values that all weights are cut from; a prime, so that no row of a matrix is another's."""
_SOME = 32
"""Experts centred at once."""


def build(
    layers: int,
    experts: int,
    device: torch.device,
    shares: Shares,
    *,
    scheme: AffineScheme = SCHEME,
    vocabulary: int | None = None,
    pinned: bool = True,
    native: bool = True,
) -> PreTrainedModel:
    """A model of that many layers; `shares`: the part of each layer's experts on each road; pinned:
    beside a GPU, the CPU's experts too; native: those by the compiled kernel, where it is there.

    The same model whatever the shares.
    """
    model = without_experts(layers, experts, device, vocabulary)
    geometry = MODELS["qwen3-next-80b"]
    block = random_records(experts, geometry.hidden, geometry.inner, scheme)
    splits = _all(block, layers, shares, device, pinned, native)
    for layer, split in zip(model.model.layers, splits, strict=True):
        layer.mlp.experts = split
    if device.type == "cpu":
        dense.use_in(model)
        steps.use_in(model)
    return model


def without_experts(
    layers: int, experts: int, device: torch.device, vocabulary: int | None = None
) -> PreTrainedModel:
    """The same model, its experts still to be put in; the same weights every time."""
    geometry = MODELS["qwen3-next-80b"].cut(layers, experts)
    config = geometry.config | {"vocab_size": vocabulary or geometry.vocabulary}
    model = build_skeleton(model_config(config), torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts = nn.Identity()
    _fill(model, device)
    model.model.rotary_emb = rotary_embedding(model, device)
    return model.eval()


def random_records(experts: int, hidden: int, inner: int, scheme: AffineScheme = SCHEME) -> Records:
    """One layer's experts in plain host memory; the same every time."""
    layout = full_layout(hidden, inner, scheme)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(
        -(2**63), 2**63 - 1, (experts, layout.nbytes // 8), dtype=torch.int64, generator=generator
    ).view(torch.uint8)
    for part in (layout.gate_up, layout.down):
        scales = data[:, part.scales : part.scales + 2 * part.rows * part.groups]
        scales.view(torch.float16).fill_(0.004)
        if part.zero and part.paired:
            for some in data[:, part.codes : part.codes + part.rows * part.width].split(_SOME):
                _centre(some, part.zero)
    return Records(layout, data)


def _centre(pairs: Tensor, zero: int) -> None:
    """Give codes of 0, which have no opposite, the value of weights of 0.

    With them the mean weight is below 0: all experts share a part, which grows from layer to layer
    until tokens' hidden states have one direction and choose the same experts.
    """
    low, high = pairs & 15, pairs >> 4
    low[low == 0] = zero
    high[high == 0] = zero
    torch.bitwise_or(low, high << 4, out=pairs)


def full_layout(hidden: int, inner: int, scheme: AffineScheme = SCHEME) -> Layout:
    """The record of one expert."""
    return planned_layout(scheme, hidden, inner)


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """The same values on every device: cut from one pool of the CPU's generator."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(POOL, dtype=torch.bfloat16).normal_(std=0.02, generator=generator).to(device)
    first = 0
    for name, parameter in list(model.named_parameters()):
        new = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if name.endswith("norm.weight") and "linear_attn" not in name:
            new.zero_()
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            new.fill_(1)
        elif name.endswith("A_log"):
            decay = torch.empty(parameter.shape).uniform_(0.01, 16, generator=generator).log_()
            new.copy_(decay)
        else:
            flat = new.view(-1)
            for start in range(0, len(flat), POOL):
                part = flat[start : start + POOL]
                cut = min(len(part), POOL - first)
                part[:cut] = pool[first : first + cut]
                part[cut:] = pool[: len(part) - cut]
                first = (first + len(part)) % POOL
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, nn.Parameter(new, requires_grad=False))


def _all(
    block: Records,
    layers: int,
    shares: Shares,
    device: torch.device,
    pinned: bool,
    native: bool,
) -> list[SplitExperts | HybridExperts | NativeExperts]:
    for name in BACKENDS:
        BACKENDS[name]  # imported at first use, which threads must not do side by side
    with ThreadPoolExecutor(8) as pool:
        one = partial(_layer, block, shares=shares, device=device, pinned=pinned, native=native)
        return list(pool.map(one, range(layers)))


def _on_cpu(
    block: Records, members: list[int], pin: bool, native: bool
) -> HybridExperts | NativeExperts:
    """By the kernel that `load` would choose."""
    wide, narrow = Records(block.layout, block.data[:1]).unpack()
    library = kernel_for(wide, narrow, torch.bfloat16) if native else None
    if library is not None:
        records = empty(block.layout, len(members), torch.device("cpu"))
        if pin:
            fault_in(records.data)
            pin_memory(records.data)
        _gather(block, members, records.data)
        return NativeExperts(library, records)
    some = Records(block.layout, block.data[torch.tensor(members)]).unpack()
    gate_up, down = (to_matrices(q, torch.bfloat16)[1] for q in some)
    return HybridExperts(gate_up, down, len(members), nn.functional.silu)


def _gather(block: Records, members: list[int], into: Tensor) -> Tensor:
    """These experts' own records, so that every placement is the same model."""
    return torch.index_select(block.data, 0, torch.tensor(members), out=into)


def _order(count: int, shares: Shares, number: int) -> list[int]:
    """A layer's experts as its roads take them; a module that is alone knows no other order."""
    if all(road == "cpu" or not share for road, share in shares.items()):
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(number)).tolist()


def _layer(
    block: Records,
    number: int,
    shares: Shares,
    device: torch.device,
    pinned: bool,
    native: bool,
) -> SplitExperts | HybridExperts | NativeExperts:
    order, done = _order(block.count, shares, number), 0.0
    roads: dict[Road, DeviceRoad] = {}
    cpu: tuple[list[int], HybridExperts | NativeExperts] | None = None
    for road in ROADS:
        begin, done = round(done * block.count), done + shares.get(road, 0.0)
        members = order[begin : round(done * block.count)]
        count = len(members)
        if not members:
            continue
        if road == "cpu":
            cpu = members, _on_cpu(block, members, pinned and device.type == "cuda", native)
        elif road == "resident":
            data = block.data[torch.tensor(members)].to(device)
            roads[road] = DeviceRoad(members, Records(block.layout, data))
        else:
            data = host_memory(count * block.layout.nbytes, pin=device.type == "cuda")
            data = _gather(block, members, data.view(count, -1))
            roads[road] = DeviceRoad(members, Records(block.layout, data))
    if not roads and cpu is not None:
        visiting = device.type == "cuda" and isinstance(cpu[1], NativeExperts)
        if not visiting:
            return cpu[1]
    return SplitExperts(roads, cpu, block.count, nn.functional.silu, device)
