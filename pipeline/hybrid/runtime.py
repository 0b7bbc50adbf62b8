"""What connects a loaded model's layers: prefill's stream, copies that follow use, decoding, and
the threads that decoding calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from pipeline.errors import ResourceError
from pipeline.hybrid import delta_prefill
from pipeline.hybrid.calls import calls_fail
from pipeline.hybrid.generation import install
from pipeline.hybrid.handover import Handover
from pipeline.hybrid.native.crew import Crew
from pipeline.hybrid.native.experts import NativeExperts
from pipeline.hybrid.native.library import crew_threads, find, takes
from pipeline.hybrid.placing import Division, Road, copies_each, divide, fixed, worth_dividing
from pipeline.hybrid.probe import link_rate, probe, tokens_worth
from pipeline.hybrid.records import Layout
from pipeline.hybrid.residency import Residency
from pipeline.hybrid.roads import CHOSEN
from pipeline.hybrid.split import SplitExperts
from pipeline.hybrid.steps import STEPS
from pipeline.hybrid.stream import BOTH, NEAR, PARTS, Stream


def connect(
    model: PreTrainedModel,
    copies: Mapping[int, Sequence[int]] | None = None,
    *,
    top_k: int | None = None,
    buffers: int = PARTS,
    kernels: bool | None = None,
) -> Residency | None:
    """Stream experts in host memory to long prompts, and let `model.generate` decode in fixed
    buffers.

    copies: per decoder layer, the experts to begin with of those that get copies on the device; as
    many in every layer as the mean, and which follows use from then on.  None: no copies.
    top_k: experts a token, where those of the CPU come for prompts as well, from as many tokens on
    as make that the quicker way on this machine; None: they stay.
    buffers: in the ring that they come through, at most.
    kernels: see `Decoder`.
    """
    splits = {
        number: module
        for number, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if isinstance(module, SplitExperts)
    }
    residency = None
    if len({split.layout for split in splits.values()}) == 1:  # buffers and copies are of one size
        device: torch.device = model.device
        _stream(list(splits.values()), device, top_k, buffers)
        layers = {k: split for k, split in splits.items() if "zero-copy" in split.device_roads}
        if copies:
            begin = [copies.get(number, ()) for number in layers]
            residency = Residency(list(layers.values()), copies_each(begin), device)
            residency.begin_with(begin)
    if model.device.type == "cuda" if kernels is None else kernels:
        for layer in model.model.layers:
            delta_prefill.install_in(layer)
    install(model, residency, kernels=kernels)
    return residency


def hand_over_as(model: PreTrainedModel, placement: str, cpu_calls: int | None) -> tuple[int, str]:
    """`hand_over` as a placement wants it; "auto" and "fill" divide calls of zero-copy experts
    where that was measured to be faster.

    cpu_calls: see `placing.divided`.  Returns how many of a token's calls the CPU takes, and why
    that is none.
    """
    calls: int = model.config.num_experts_per_tok
    splits = [m for m in model.modules() if isinstance(m, SplitExperts)]
    layouts = {m.layout for m in splits if "zero-copy" in m.device_roads}
    if why_not := _cannot_divide(model, layouts):
        hand_over(model)
        return 0, why_not
    division = None
    if cpu_calls is None or placement in CHOSEN:
        size = max(layout.nbytes for layout in layouts)
        rates = probe(model.device, threads=crew_threads())
        if cpu_calls is None or worth_dividing(rates, size, calls):
            division = divide(rates, size)
    elif cpu_calls:
        division = fixed(cpu_calls)
    number = 0 if division is None else division(calls, 1)
    hand_over(model, division if number else None)
    return number, "" if number else "it was measured to be slower"


def _cannot_divide(model: PreTrainedModel, layouts: set[Layout]) -> str:
    """Why calls of zero-copy experts, of these layouts, are the device's alone; "" if they need not
    be."""
    if not layouts:
        return "there are none"
    if not _decodes(model):
        return f"{model.config.model_type} decodes as transformers does it"
    if not all(takes(part) for layout in layouts for part in (layout.gate_up, layout.down)):
        return "the compiled kernel does not take their format"
    return ""


def _decodes(model: PreTrainedModel) -> bool:
    """Whether it decodes in steps of ours, and in a dtype that the compiled kernel takes."""
    known = STEPS.get(model.config.model_type) is not None
    return known and model.dtype == torch.bfloat16 and not isinstance(find(), str)


def hand_over(model: PreTrainedModel, division: Division | None = None) -> bool:
    """Let decode steps call the CPU's experts by themselves, without Python, where the compiled
    kernel computes them; division: how calls of zero-copy experts are divided, None: not at all.

    To be called before the first step; returns whether anything is handed over.  ResourceError,
    and all is as before, where the device cannot call threads here, or there are none.
    """
    found = find()
    if isinstance(found, str) or not _decodes(model):
        return False
    splits = [m for m in model.modules() if isinstance(m, SplitExperts)]
    splits = [m for m in splits if m.host or (division and "zero-copy" in m.device_roads)]
    inside = {id(m.host.experts) for m in splits if m.host is not None}
    whole = [m for m in model.modules() if isinstance(m, NativeExperts) and id(m) not in inside]
    if not splits and not whole:
        return False
    if failed := calls_fail(model.device):
        raise ResourceError(f"the device cannot call the CPU's threads: {failed}")
    crew = Crew(found, model.device, crew_threads())
    for split in splits:
        split.hand_over(crew, division or fixed(0))
    for experts in whole:
        crew.hold(experts.records.data)
        nothing = torch.zeros(experts.num_experts, dtype=torch.int64, device=model.device)
        experts.handover = Handover(
            crew, experts.records.layout, experts.records.addresses(), nothing, division or fixed(0)
        )
    return True


def prompts(model: PreTrainedModel) -> str:
    """Which side computes the CPU's experts for prompts, for reports."""
    splits = (module for module in model.modules() if isinstance(module, SplitExperts))
    tokens = next((split.all_from for split in splits if split.host is not None), None)
    if tokens is None:
        return "the CPU"
    return f"the CPU below {tokens} tokens, from there on the GPU"


def _stream(
    splits: Sequence[SplitExperts], device: torch.device, top_k: int | None, buffers: int
) -> None:
    """Let all layers' prompts come through one ring."""
    if top_k is not None and (some := _with_any(BOTH, splits)):
        try:
            stream = Stream([split.in_ram for split in some], device, buffers)
        except RuntimeError:  # no memory can be pinned for those on their way
            all_from = None
        else:
            all_from = _worth(stream, some, top_k)
        if all_from is not None:
            for number, split in enumerate(some):
                split.stream_from(stream, number, all_from)
            return
    if some := _with_any(NEAR, splits):
        near = [{road: split.in_ram[road] for road in NEAR} for split in some]
        stream = Stream(near, device, buffers)
        for number, split in enumerate(some):
            split.stream_from(stream, number)


def _with_any(roads: Sequence[Road], splits: Sequence[SplitExperts]) -> list[SplitExperts]:
    return [split for split in splits if any(road in split.in_ram for road in roads)]


def _worth(stream: Stream, splits: Sequence[SplitExperts], top_k: int) -> int | None:
    """Tokens from which all experts of a layer come sooner than the CPU computes its own."""
    for number, split in enumerate(splits):
        if split.host is not None and isinstance(split.host.experts, NativeExperts):
            seconds = stream.bytes_of(number) / link_rate(stream.device, staged=stream.staged)
            return tokens_worth(split.host.experts, split.num_experts, top_k, seconds)
    return None
