"""One layer's experts on the CPU, ours beside kt-kernel's, both reading the same GPTQ file.

Each side runs in an environment of its own (`make_env.sh`):

    .venv/bin/python scripts/hybrid_peers/one_layer.py make DIR
    .venv/bin/python scripts/hybrid_peers/one_layer.py ours DIR --threads 2
    .env-kt-kernel/bin/python scripts/hybrid_peers/one_layer.py kt-kernel DIR --threads 2
    .env-kt-kernel/bin/python scripts/hybrid_peers/one_layer.py kt-kernel-q4_0 DIR --threads 2

`make` writes one layer of random experts: hidden 2048, inner 512, 4 bits symmetric in groups of
128, 64 experts, which no cache holds.  Printed are the milliseconds of one token (top 10, others
every time) and of a prompt, the best and the median of several, and the bytes of weights read per
second in decoding; whoever comes second also prints how far its output is from the first one's.
"""

# Each side imports what only its environment has.
# ruff: noqa: PLC0415

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

EXPERTS, HIDDEN, INNER, TOP, GROUP = 64, 2048, 512, 10, 128
PROMPT = 512
FILE, RESULT = "model.safetensors", "result.pt"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, hidden], experts int64 [T, k], weights float32 [T, k]) -> [T, hidden], as in the model."""


def make(folder: Path) -> None:
    """Random codes and scales in AutoGPTQ's layout, version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for expert in range(EXPERTS):
        for name, columns, rows in (
            ("gate_proj", HIDDEN, INNER),
            ("up_proj", HIDDEN, INNER),
            ("down_proj", INNER, HIDDEN),
        ):
            stem = f"model.layers.0.mlp.experts.{expert}.{name}."
            words = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int64)
            scales = torch.rand(columns // GROUP, rows).add(0.5).mul(0.005).bfloat16().half()
            tensors[stem + "qweight"] = words.int()
            tensors[stem + "scales"] = scales
            tensors[stem + "qzeros"] = torch.full(
                (columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32
            )
            tensors[stem + "g_idx"] = (torch.arange(columns) // GROUP).int()
    save_file(tensors, folder / FILE)
    config = '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128,'
    (folder / "config.json").write_text(config + ' "sym": true, "desc_act": false}}\n')


def ours(folder: Path, threads: int) -> Layer:
    """The CPU's road of the hybrid runtime: the compiled kernel."""
    from pipeline.hybrid.native.experts import NativeExperts, kernel_for
    from pipeline.hybrid.records import empty, pack

    wide, narrow = _quantised(folder)
    kernel = kernel_for(wide, narrow, torch.bfloat16)
    if kernel is None:
        raise SystemExit("the compiled kernel is missing: `requant doctor` says why")
    packed = pack(wide, narrow)
    cpu = torch.device("cpu")
    records = empty(packed.layout, packed.count, cpu)
    records.data.copy_(packed.data)
    return NativeExperts(kernel, records)


def ours_by_torch(folder: Path, threads: int) -> Layer:
    """The same road where that kernel is missing: torch's int4 product, expert by expert."""
    from pipeline.hybrid.modules import HybridExperts
    from pipeline.hybrid.stored import to_matrices

    gate_up, down = (to_matrices(q, torch.bfloat16)[1] for q in _quantised(folder))
    return HybridExperts(gate_up, down, EXPERTS, torch.nn.functional.silu)


def _quantised(folder: Path) -> tuple[Any, Any]:
    """Gate and up stacked, and down, in this repository's type, which is imported late."""
    from pipeline.checkpoint.formats.gptq import unpack
    from pipeline.hybrid.stored import pair_rows
    from pipeline.quantize.tensor import AffineScheme

    scheme = AffineScheme(4, GROUP, True)
    with safe_open(folder / FILE, "pt") as file:

        def read(*names: str) -> Any:  # noqa: ANN401
            experts = [f"model.layers.0.mlp.experts.{e}." for e in range(EXPERTS)]
            stems = [f"{expert}{name}." for expert in experts for name in names]
            parts = {
                part: torch.stack([file.get_tensor(stem + part) for stem in stems])
                for part in ("qweight", "qzeros", "scales")
            }
            return unpack(parts, scheme)

        return pair_rows(read("gate_proj", "up_proj")), read("down_proj")


def kt_kernel(folder: Path, threads: int) -> Layer:
    """kt-kernel's experts for GPTQ, of the kind that it picks itself for this CPU."""
    from kt_kernel.utils import amx, loader  # type: ignore[import-not-found]

    cpu, config, on_gpu = _kt_pool(threads)
    weights = loader.GPTQSafeTensorLoader(str(folder)).load_experts("model.layers.0")
    for name in ("gate", "up", "down"):
        for kind, key in (("projs", name), ("scales", f"{name}_scale")):
            setattr(config, f"{name}_{kind}", [[tensor.data_ptr() for tensor in weights[key]]])
    config.quant_config.bits, config.quant_config.group_size = 4, GROUP
    config.quant_config.zero_point = False
    moe = amx._select_gptq_int4_backend(GROUP)(config)
    return _kt_layer(cpu, moe, (weights, on_gpu))


def kt_llamafile(folder: Path, threads: int) -> Layer:
    """Its other road on a CPU without AMX, over blocks of Q4_0: 32 of our codes and their scale."""
    import kt_kernel  # type: ignore[import-not-found]

    library = kt_kernel.kt_kernel_ext
    ggml_type = library.kvcache.ggml_type
    cpu, config, on_gpu = _kt_pool(threads)
    config.m_block, config.group_min_len, config.group_max_len = 32, 10, 2048
    config.hidden_type = ggml_type.BF16
    kept = [on_gpu]
    for name in ("gate", "up", "down"):
        kept.append(_q4_0(folder, f"{name}_proj"))
        setattr(config, f"{name}_proj", kept[-1].data_ptr())
        setattr(config, f"{name}_type", ggml_type.Q4_0)
    return _kt_layer(cpu, library.moe.MOE(config), kept)


def _q4_0(folder: Path, name: str) -> Tensor:
    """All experts' blocks: a float16 scale, then code j low and code j + 16 high in byte j."""
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    rows = []
    with safe_open(folder / FILE, "pt") as file:
        for expert in range(EXPERTS):
            stem = f"model.layers.0.mlp.experts.{expert}.{name}."
            words = file.get_tensor(stem + "qweight").T.unsqueeze(-1)
            codes = (words >> shifts & 15).to(torch.uint8).reshape(words.shape[0], -1, 2, 16)
            scales = file.get_tensor(stem + "scales").T.repeat_interleave(GROUP // 32, dim=1)
            scales = scales.contiguous().unsqueeze(-1).view(torch.uint8)
            rows.append(torch.cat([scales, codes[..., 0, :] | codes[..., 1, :] << 4], dim=-1))
    return torch.stack(rows)


def _kt_pool(threads: int) -> tuple[Any, Any, Tensor]:
    """Its threads, the layer's sizes, and a table that says no expert is on a GPU.

    Taken from the library itself: its Python wrapper pins memory, which takes a GPU.
    """
    import kt_kernel
    from kt_kernel.utils import amx

    library = kt_kernel.kt_kernel_ext
    pool = library.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = library.CPUInfer(pool)
    on_gpu = torch.zeros(EXPERTS, dtype=torch.bool)
    config = amx.MOEConfig(EXPERTS, TOP, HIDDEN, INNER, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 2048
    return cpu, config, on_gpu


def _kt_layer(cpu: Any, moe: Any, kept: object) -> Layer:  # noqa: ANN401
    """`kept`: what the library holds addresses of."""
    order = torch.arange(EXPERTS)
    cpu.submit(moe.load_weights_task(order.data_ptr()))
    cpu.sync()
    print(f"kt-kernel computes with {type(moe).__name__}")

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert kept is not None
        output, count = torch.empty_like(x), torch.tensor([x.shape[0]], dtype=torch.int32)
        pointers = (index.data_ptr(), weights.data_ptr(), x.data_ptr(), output.data_ptr())
        cpu.submit(moe.forward_task(count.data_ptr(), index.shape[1], *pointers, False))
        cpu.sync()
        return output

    return layer


def timed(layer: Layer, tokens: int, repeats: int, warm: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each call by the clock, and of processor time, both in rising order; routed
    anew every time, the first `warm` calls not counted."""
    taken = []
    for _ in range(repeats + warm):
        x = torch.randn(tokens, HIDDEN).bfloat16()
        index = torch.rand(tokens, EXPERTS).topk(TOP).indices.contiguous()
        weights = torch.rand(tokens, TOP)
        clock, busy = time.perf_counter(), time.process_time()
        layer(x, index, weights)
        ended = time.perf_counter(), time.process_time()
        taken.append((1e3 * (ended[0] - clock), 1e3 * (ended[1] - busy)))
    clocks, busies = zip(*taken[warm:], strict=True)
    return sorted(clocks), sorted(busies)


def report(side: str, layer: Layer, folder: Path, threads: int) -> None:
    """Time it, and compare with what the other side made of the same tokens; see `table.py`."""
    nbytes = TOP * 3 * HIDDEN * INNER * (4 + 16 / GROUP) / 8
    (one, one_busy), (many, many_busy) = timed(layer, 1, 60, 3), timed(layer, PROMPT, 2, 1)
    median = statistics.median(one)
    note = (
        f"{threads} threads: one token {one[0]:.2f} ms best, {median:.2f} median "
        f"({nbytes / one[0] / 1e6:.1f} GB/s at best); {PROMPT} tokens {many[0]:.0f} ms"
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, HIDDEN, generator=generator).bfloat16()
    index = torch.rand(8, EXPERTS, generator=generator).topk(TOP).indices.contiguous()
    got = layer(x, index, torch.rand(8, TOP, generator=generator)).float()
    other = folder / RESULT
    if other.is_file():
        known = torch.load(other, weights_only=True)
        apart = float((got - known["y"]).norm() / got.norm())
        note += f"; output {apart:.4f} from {known['side']}'s"
    else:
        torch.save({"side": side, "y": got}, other)
    row = {
        "side": f"one layer, {side}",
        "decode": 1e3 / median,
        "prefill": 1e3 * PROMPT / many[0],
        "decode_busy": 1e3 / statistics.median(one_busy),
        "prefill_busy": 1e3 * PROMPT / many_busy[0],
        "note": note,
    }
    print(json.dumps(row))


SIDES = {
    "ours": ours,
    "ours-torch": ours_by_torch,
    "kt-kernel": kt_kernel,
    "kt-kernel-q4_0": kt_llamafile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", *SIDES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "make":
        make(args.folder)
        return
    build = SIDES[args.what]
    with torch.inference_mode():
        report(args.what, build(args.folder, args.threads), args.folder, args.threads)


if __name__ == "__main__":
    main()
