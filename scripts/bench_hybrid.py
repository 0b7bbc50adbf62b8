"""Prefill and decode of Qwen3-Next-80B's geometry on one GPU, placement by placement.

    python scripts/bench_hybrid.py --device-memory 10GiB
    python scripts/bench_hybrid.py --layers 8 --placements zero-copy --steps decode --profile

Weights are random, experts packed in place (`hybrid_model.py`); kernels, roads and memory are those
of a loaded model.  Decode is batch 1, its tokens drawn anew for every step; at long contexts the
cache is empty but read in full.  GPU memory is printed beside what the ledger says.  A placement is
a road, or parts such as "resident:0.1,zero-copy:0.9"; "follow:0.1" adds copies of a tenth of the
experts, which follow use, and "both:4" has the CPU take 4 of each token's calls of zero-copy
experts, on one thread less than there are.  torch is held to `--device-memory` less its context.
Figures of fewer layers are also scaled to 48.  The step "peers" times other runtimes.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch
from hybrid_model import Shares, build
from hybrid_peers.table import print_peers
from roofline import print_roofline
from synthetic_geometries import MODELS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.host import host_memory
from pipeline.hybrid.ledger import RESIDENT_THREADS, Experts, Ledger, ledger, resident_threads
from pipeline.hybrid.placing import ROADS, Table, fixed
from pipeline.hybrid.probe import cpu_rate
from pipeline.hybrid.residency import Residency
from pipeline.hybrid.runtime import connect, hand_over, prompts
from pipeline.hybrid.split import SplitExperts
from pipeline.hybrid.steps.qwen3_next import Sparse
from pipeline.hybrid.stream import BOTH, NEAR
from pipeline.models.skeleton import architecture_of, geometry_of
from pipeline.sizes import parse_size

FULL_LAYERS = 48
PROMPTS = (512, 4096, 16384)
CONTEXTS = (128, 4096, 32768)
EXPERT_KERNELS = ("_gate_up_kernel", "_down_kernel", "_grouped_kernel")


@dataclass(frozen=True)
class Placement:
    """Where experts lie, as `placement` reads it."""

    name: str
    shares: Shares
    follow: float
    """Share of the experts that have a copy on the device, which follows use."""
    cpu_calls: int | None
    """Of a token's calls of zero-copy experts; None: they are not divided."""


@dataclass
class Figures:
    """One placement's row of the table."""

    placement: str
    build_seconds: float = 0.0
    device_gib: float = 0.0
    host_gib: float = 0.0
    prefill: dict[int, float] = field(default_factory=dict)
    decode: dict[int, float] = field(default_factory=dict)
    split: str = ""


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(args.threads)
    print(time.strftime("%Y-%m-%d %H:%MZ", time.gmtime()), "commit", args.commit)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads;", _gpu(device))
    cuda = device.type == "cuda"
    if cuda and args.device_memory:
        limit_memory(device, parse_size(args.device_memory))
    rates = machine(device) if "machine" in args.steps else {}
    rows = []
    timed = {"prefill", "decode"} & set(args.steps)
    for placement in args.placements if timed else ():
        rows.append(measure(placement, args, device))
        print_table(rows[-1:], args.layers)
    if len(rows) > 1:
        print_table(rows, args.layers)
    if rates:
        print_roofline(rates)
    if "peers" in args.steps:
        print_peers(args.threads)


def machine(device: torch.device) -> dict[str, float]:
    """Bytes per second of PCIe, RAM, the CPU's product and the device's memory."""
    size = 1 << 29
    ram = torch.ones(size // 8, dtype=torch.int64)
    rates = {"ram": size / _best(ram.sum), "cpu": cpu_rate(size)}
    if device.type == "cuda":
        pinned = host_memory(size, pin=True)
        target = torch.empty(size, dtype=torch.uint8, device=device)
        rates["pcie"] = size / _best(lambda: target.copy_(pinned, non_blocking=True))
        rates["gpu"] = size / _best(lambda: target.view(torch.int64).sum())
    print("measured rates:", ", ".join(f"{k} {v / 1e9:.0f} GB/s" for k, v in rates.items()))
    return rates


def measure(wanted: Placement, args: argparse.Namespace, device: torch.device) -> Figures:
    """Build the model so placed, time it, and let go of it."""
    placement = wanted.name
    figures = Figures(placement)
    started = time.perf_counter()
    model = build(args.layers, args.experts, device, wanted.shares, pinned=not args.unpinned)
    copies = round(wanted.follow * args.experts)
    residency = place(model, wanted)
    _wait(device)
    figures.build_seconds = time.perf_counter() - started
    print(f"{placement}: built in {figures.build_seconds:.0f} s", flush=True)
    if "cpu" in wanted.shares:
        print(f"{placement}: its experts on the CPU are computed for prompts by", prompts(model))
    longest = max([p + 64 for p in args.prompts] + [c + 256 for c in args.contexts])
    told = stated(model, residency, copies, longest, device)
    print("ledger:", ", ".join(f"{k} {v / 2**30:.2f}" for k, v in told.items().items()))
    held(placement, "built", told, device)
    ids = torch.randint(5, model.config.vocab_size, (1, max(PROMPTS)), device=device)
    with torch.inference_mode():
        if "prefill" in args.steps:
            for length in args.prompts:
                figures.prefill[length] = _prefill(model, ids[:, :length], device)
                print(f"{placement}: prefill {length}: {figures.prefill[length]:.0f}", flush=True)
                held(placement, f"prefill {length}", told, device)
                if args.profile and length == 4096:
                    _show("prefill", partial(_prefill_once, model, ids[:, :4096]), device)
        if "decode" in args.steps:
            for context in args.contexts:
                decoder = at_context(model, ids[:, :64], context, residency)
                figures.decode[context] = 1 / _step_seconds(decoder, device, args.tokens)
                print(
                    f"{placement}: decode {context}: {figures.decode[context]:.1f}, "
                    f"{hits(decoder, model):.1%} of the calls hit",
                    flush=True,
                )
                held(placement, f"decode {context}", told, device)
                if context == 4096 or (context == args.contexts[-1] and not figures.split):
                    figures.split = _split(decoder, device, args.profile)
                del decoder
    figures.device_gib = held(placement, "profiled", told, device)
    figures.host_gib = psutil.Process().memory_info().rss / 2**30
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def place(model: PreTrainedModel, wanted: Placement) -> Residency | None:
    """What `load` does with a model whose experts lie where they belong."""
    config, cuda = model.config, model.device.type == "cuda"
    copies = range(round(wanted.follow * config.num_experts))
    begin = dict.fromkeys(range(config.num_hidden_layers), copies) if copies else None
    residency = connect(model, begin, top_k=config.num_experts_per_tok if cuda else None)
    if cuda:
        hand_over(model, None if wanted.cpu_calls is None else fixed(wanted.cpu_calls))
    return residency


def stated(
    model: PreTrainedModel,
    residency: Residency | None,
    copies: int,
    length: int,
    device: torch.device,
) -> Ledger:
    """What the ledger says of a model that was built here."""
    config = MODELS["qwen3-next-80b"].config | {"num_hidden_layers": model.config.num_hidden_layers}
    config |= {"num_experts": model.config.num_experts}
    homes: Table = {}
    sizes: dict[int, int] = {}
    roads = NEAR
    for number, layer in enumerate(model.model.layers):
        split = layer.mlp.experts
        homes[number] = [ROADS[road] for road in split.roads(torch.device("cpu")).tolist()]
        if isinstance(split, SplitExperts):
            sizes[number] = split.layout.nbytes
            roads = NEAR if split.all_from is None else BOTH
            if residency is not None:  # whose copies look like residents
                homes[number] = ["zero-copy"] * split.num_experts
    begin = {number: list(range(copies)) for number in homes} if copies else {}
    dense = sum(p.nbytes for p in model.parameters())
    geometry = geometry_of(architecture_of(config, ""), config, "")
    threads = resident_threads(device) if device.type == "cuda" else RESIDENT_THREADS
    experts = Experts(homes, sizes, begin, streamed=roads)
    return ledger(model.config, geometry, dense, experts, length=length, threads=threads)


def held(placement: str, stage: str, told: Ledger, device: torch.device) -> float:
    """Print what is in use of the GPU, and how it divides; returns GiB."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    used, reserved = (total - free) / 2**30, torch.cuda.memory_reserved(device) / 2**30
    allocated, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    print(
        f"{placement}, {stage}: {used:.2f} GiB in use, {reserved:.2f} reserved by torch "
        f"({allocated / 2**30:.2f} allocated, {most / 2**30:.2f} at most), {used - reserved:.2f} "
        f"beside; ledger {told.total / 2**30:.2f} = {sum(told.torch.values()) / 2**30:.2f} + "
        f"{sum(told.driver.values()) / 2**30:.2f}",
        flush=True,
    )
    torch.cuda.reset_peak_memory_stats(device)
    return used


def hits(decoder: Decoder, model: PreTrainedModel) -> float:
    """Part of the calls of a few steps whose experts are in GPU memory."""
    found: list[Tensor] = []
    for _ in range(4):
        decoder.tokens.random_(5, model.config.vocab_size)
        decoder.step()
        for half in decoder._halves:
            if isinstance(half, Sparse):
                roads = half._block.experts.roads(half._index.device)
                found.append((roads[half._index] == ROADS.index("resident")).float().mean())
    return float(torch.stack(found).mean()) if found else 0.0


def at_context(
    model: PreTrainedModel, ids: Tensor, context: int, residency: Residency | None
) -> Decoder:
    """A decoder that has read a short prompt and stands at `context`."""
    decoder = Decoder(model, 1, context + 256, residency=residency)
    decoder.prefill(ids)
    decoder.filled = context
    decoder._position.fill_(context)
    return decoder


def _prefill(model: PreTrainedModel, ids: Tensor, device: torch.device) -> float:
    """Tokens per second, the second time."""
    for _ in range(2):
        started = time.perf_counter()
        _prefill_once(model, ids)
        _wait(device)
        seconds = time.perf_counter() - started
    return ids.shape[1] / seconds


def _prefill_once(model: PreTrainedModel, ids: Tensor) -> None:
    Decoder(model, 1, ids.shape[1] + 64).prefill(ids)


def _step_seconds(decoder: Decoder, device: torch.device, steps: int) -> float:
    for _ in range(3):
        decoder.step()
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        decoder.tokens.random_(5, len(decoder.logits[0]))
        decoder.step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def _split(decoder: Decoder, device: torch.device, show: bool) -> str:
    """Milliseconds of one step: experts' kernels, waiting for the CPU's after those, other kernels,
    and the rest of the wall clock."""
    steps = 4
    wall = _step_seconds(decoder, device, 8) * 1e3
    if device.type != "cuda":
        return f"{wall:.1f} ms"
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            decoder.tokens.random_(5, len(decoder.logits[0]))
            decoder.step()
        _wait(device)
    events = recorded.key_averages()
    everything = sum(e.self_device_time_total for e in events) / steps / 1e3
    experts, waiting = (
        sum(e.self_device_time_total for e in events if e.key.startswith(names)) / steps / 1e3
        for names in (EXPERT_KERNELS, ("_take_kernel",))
    )
    if show:
        _print_events("decode step", recorded, steps)
    return (
        f"experts {experts:.2f} + waiting {waiting:.2f} + others "
        f"{everything - experts - waiting:.2f} + rest "
        f"{wall - everything:.2f} = {wall:.2f} ms"
    )


def _show(name: str, call: Callable[[], None], device: torch.device) -> None:
    if device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        _wait(device)
    _print_events(name, recorded, 1)


def _print_events(name: str, recorded: profile, steps: int) -> None:
    print(f"kernels of one {name}:")
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events[:14]:
        each = event.self_device_time_total / steps
        print(f"{each:10.0f} us {event.count // steps:6d} x {event.key[:70]}")


def print_table(rows: list[Figures], layers: int) -> None:
    """One line a placement, and what follows from fewer layers for all."""
    for row in rows:
        print(
            f"{row.placement:24s} build {row.build_seconds:.0f} s  device {row.device_gib:.2f} GiB"
            f"  host {row.host_gib:.1f} GiB"
        )
        for name, figures in (("prefill", row.prefill), ("decode", row.decode)):
            for length, rate in figures.items():
                scaled = rate * layers / FULL_LAYERS
                note = "" if layers == FULL_LAYERS else f" ({scaled:,.1f} scaled to 48 layers)"
                print(f"  {name:8s} {length:6d}: {rate:9,.1f} tok/s{note}", flush=True)
        if row.split:
            print("  one step:", row.split)


def placement(text: str) -> Placement:
    """ValueError, which argparse reports, for what is no placement."""
    shares: Shares = {}
    special: dict[str, str] = {}
    for piece in text.split(","):
        road, _, part = piece.partition(":")
        if road in ("follow", "both"):
            special[road] = part
        else:
            shares[ROADS[ROADS.index(road)]] = float(part or 1)
    if not shares:
        shares["zero-copy"] = 1.0
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(text)
    calls = int(special["both"]) if "both" in special else None
    return Placement(text, shares, float(special.get("follow", 0)), calls)


def limit_memory(device: torch.device, limit: int) -> None:
    """Hold torch to that many bytes of the device, less what its context takes."""
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free
    torch.cuda.set_per_process_memory_fraction((limit - context) / total, device)
    print(f"device memory limited to {limit / 2**30:.1f} GiB, {context / 2**30:.2f} of it context")


def _best(call: Callable[[], object], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpu(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return f"{name}, torch {torch.__version__}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=FULL_LAYERS)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--placements", nargs="+", type=placement, default=[placement("zero-copy")])
    parser.add_argument(
        "--steps", nargs="+", choices=("machine", "prefill", "decode", "peers"),
        default=["machine", "prefill", "decode", "peers"],
    )  # fmt: skip
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--tokens", type=int, default=50, help="decode steps that are timed")
    parser.add_argument(
        "--unpinned", action="store_true", help="the CPU's experts lie in memory that is not pinned"
    )
    parser.add_argument("--device-memory", default=None, help="such as 10GiB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--commit", default=os.environ.get("REQUANT_COMMIT", "unknown"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
