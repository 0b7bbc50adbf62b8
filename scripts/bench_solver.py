"""Times the batched GPTQ solver against the usual loop over experts, in one run.

    python scripts/bench_solver.py                                        # 64 experts of 128 x 384
    python scripts/bench_solver.py --device cuda --experts 512 --out 1024 --in 2048
    python scripts/bench_solver.py --device cuda --experts 512 --out 2048 --in 512

The loop is GPTQ as its usual implementations have it: one matrix at a time, inverse by Cholesky,
blocks of 128 columns, a column loop in Python.  Both sides get the same grid (plain minimum and
maximum), damping and activation order; the scale search is timed by itself.  For many experts the
loop may be timed on the first few (--loop-experts) and scaled up; the table says so.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench_machine import timed
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.grid import Grid, fit_grid
from pipeline.quantize.hessian import routed_hessians
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.precision import full_float32
from pipeline.quantize.rows import RowOrder, row_order
from pipeline.quantize.solved import energy
from pipeline.quantize.tensor import AffineScheme

LOOP_BLOCK = 128
TOKENS_PER_EXPERT = 4  # times the columns


def textbook_gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, bits: int, options: SolverOptions
) -> Tensor:
    """The quantised matrix [out, in] for `weight` [out, in], as usual implementations do it."""
    columns = weight.shape[1]
    group = columns // grid.scales.shape[1]
    scales, zeros = (t.float().repeat_interleave(group, 1) for t in (grid.scales, grid.zeros))
    weight, hessian = weight.clone(), hessian.clone()
    order = torch.argsort(hessian.diagonal(), descending=True)
    weight, scales, zeros = weight[:, order], scales[:, order], zeros[:, order]
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(options.damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, columns, LOOP_BLOCK):
        stop = min(start + LOOP_BLOCK, columns)
        block = weight[:, start:stop].clone()
        errors = torch.zeros_like(block)
        triangle = upper[start:stop, start:stop]
        for i in range(stop - start):
            scale, zero = scales[:, start + i], zeros[:, start + i]
            code = torch.clamp(torch.round(block[:, i] / scale) + zero, 0, 2**bits - 1)
            value = scale * (code - zero)
            result[:, start + i] = value
            error = (block[:, i] - value) / triangle[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(triangle[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return result[:, torch.argsort(order)]


def problem(
    experts: int, out: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Random weights [E, out, in], Hessians of correlated inputs, and a call that forms those."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = 0.03 * torch.randn((experts, out, columns), generator=generator, device=device)
    tokens = TOKENS_PER_EXPERT * columns
    mixing = torch.randn((columns, columns), generator=generator, device=device)
    mixing *= torch.arange(1, columns + 1, device=device).pow(-0.4)
    x = torch.empty((experts * tokens, columns), dtype=torch.bfloat16, device=device)
    for part in x.split(tokens):
        seed = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(seed @ mixing.T / columns**0.5)
    offsets = torch.arange(experts + 1, device=device) * tokens

    def form() -> Tensor:
        return routed_hessians(x, offsets)

    return weight, form() / tokens, form


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--out", type=int, default=128)
    parser.add_argument("--in", dest="columns", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--tile", type=int, default=64, help="experts solved at once")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loop-experts", type=int, default=0, help="0: the loop does all experts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    scheme = AffineScheme(args.bits, args.group_size, symmetric=True)
    plain = SolverOptions(scale_search=False, refinement_passes=0)
    searched, refined = SolverOptions(refinement_passes=0), SolverOptions()
    readers = torch.randn(
        (args.out, args.out), device=device, generator=torch.Generator(device).manual_seed(1)
    )
    weighed = row_order(readers.T @ readers)
    weight, hessian, form = problem(args.experts, args.out, args.columns, device)
    gptq = QUANTIZERS["gptq"]
    looped = args.loop_experts or args.experts
    losses: dict[str, float] = {}

    def batched(options: SolverOptions, outputs: RowOrder | None = None) -> None:
        loss = [
            gptq.quantize(w, h, scheme, options, outputs).loss
            for w, h in zip(weight.split(args.tile), hessian.split(args.tile), strict=True)
        ]
        losses["batched"] = float(torch.cat(loss)[:looped].mean())

    def loop() -> None:
        grid = fit_grid(weight[:looped], scheme, search=False)
        lost = []
        with full_float32():
            for i in range(looped):
                one = Grid(grid.scales[i], grid.zeros[i])
                dense = textbook_gptq(weight[i], hessian[i], one, args.bits, plain)
                lost.append((weight[i] - dense).unsqueeze(0))
            ratio = energy(torch.cat(lost), hessian[:looped]) / energy(
                weight[:looped], hessian[:looped]
            )
        losses["loop"] = float(ratio.mean())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    batch_time = timed(lambda: batched(plain), args.repeat)
    if device.type == "cuda":
        peak = f"{(torch.cuda.max_memory_allocated(device) - held) / 2**30:.2f} GiB of GPU memory"
    else:
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident"
    batch_loss = losses["batched"]
    times = {}
    for name, options, weighting in (
        ("with scale search", searched, None),
        ("and refinement", refined, None),
        ("and output weights", refined, weighed),
    ):
        seconds = timed(partial(batched, options, weighting), args.repeat)
        times[name] = (seconds, losses["batched"])
    form_time = timed(form, args.repeat)
    loop_time = timed(loop, 1) * args.experts / looped
    scaled = "" if looped == args.experts else f" ({looped} experts timed, scaled up)"
    print(f"{args.experts} experts of {args.out} x {args.columns}, {args.bits} bits, group")
    print(f"  {args.group_size}, {device}, {solver_backend(device)}, {args.threads} threads")
    print(f"loop over experts   {loop_time:9.3f} s   loss {losses['loop']:.6f}{scaled}")
    print(f"batched             {batch_time:9.3f} s   loss {batch_loss:.6f}")
    print(f"ratio               {loop_time / batch_time:9.1f} x")
    for name, (seconds, loss) in times.items():
        print(f"{name:20}{seconds:9.3f} s   loss {loss:.6f}")
    print(
        f"routed Hessians     {form_time:9.3f} s   {TOKENS_PER_EXPERT * args.columns} tokens each"
    )
    print(f"peak, batched       {peak} beyond what it was given")


if __name__ == "__main__":
    main()
