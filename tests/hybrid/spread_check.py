"""Run by test_spread.py in a process of its own, under Triton's interpreter.

Prints one line a case; any assertion that fails ends it with an error.
"""

import itertools
import logging
import random
import sys
from pathlib import Path

import torch
from hybrid_models import EXPERTS_ONLY, MODELS, dequantised, write_output
from test_backends import random_quantized

from pipeline import hybrid
from pipeline.hybrid import kernels, loader
from pipeline.hybrid.packed import pack
from pipeline.hybrid.placing import ROADS
from pipeline.hybrid.split import SplitExperts
from pipeline.quantize.tensor import AffineScheme


def products() -> None:
    """Both kernels against the float64 product, for every scheme; 24 rows fill no tile."""
    schemes = [(4, g, s) for g in (32, 64, 128, -1) for s in (True, False)]
    schemes += [(8, g, s) for g in (32, 128) for s in (True, False)] + [(3, 64, False)]
    for bits, group, symmetric in schemes:
        dtype, bound = random.choice([(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
        quantized = random_quantized(4, 24, 128, bits=bits, group=group, symmetric=symmetric)
        stack, weight = pack(quantized), quantized.dequantize().double()
        assert torch.equal(stack.unpack().dequantize().double(), weight)
        share, tokens = random.choice([(1, 9), (3, 3)])
        x = torch.randn(tokens, 128).to(dtype)
        slots = torch.randint(-1, 4, (tokens * share,))
        slots[:2] = torch.tensor([-1, 2])
        rows = x.double().repeat_interleave(share, 0)
        want = (weight[slots.clamp(min=0)] @ rows.unsqueeze(-1)).squeeze(-1)
        for name in ("matvec", "grouped"):
            out = torch.full((len(slots), 24), 7.0)
            if name == "matvec":
                kernels.matvec(x, slots, stack, out)
            else:
                kernels.grouped(x, kernels.Groups(slots, 4), stack, out)
            assert bool((out[slots < 0] == 7).all()), "wrote to another road's pair"
            mine = slots >= 0
            error = ((out.double() - want)[mine].norm() / want[mine].norm()).item()
            assert error < bound, (bits, group, symmetric, name, dtype, error)
            print(name, bits, group, symmetric, dtype, f"{error:.1e}")


def models(folder: Path) -> None:
    """The micro model with experts spread at random, or all on one road, is its dense model."""
    for (bits, group, symmetric), request in zip(
        [(4, 64, False), (8, 32, True)],
        ["random", "zero-copy"],
        strict=True,
    ):
        scheme = AffineScheme(bits, group, symmetric)
        out = write_output(MODELS / "micro-nf4", folder / request, scheme, EXPERTS_ONLY)
        if request == "random":
            with_random_roads(out)
            continue
        check(hybrid.load(out, device="cpu", dtype=torch.float32, placement=request), out)


def with_random_roads(out: Path) -> None:
    chosen = loader.choose

    def anywhere(*args):
        table = chosen(*args)
        return {layer: random.choices(ROADS, k=len(roads)) for layer, roads in table.items()}

    loader.choose = anywhere
    parts = "resident:0.3,zero-copy:0.4,cpu:0.3"
    check(hybrid.load(out, device="cpu", dtype=torch.float32, placement=parts), out)
    loader.choose = chosen
    placed = hybrid.place(hybrid.load(out, device="cpu", dtype=torch.float32), placement=parts)
    assert any(isinstance(module, SplitExperts) for module in placed.modules())
    assert placed.hybrid_placement["experts"]["0"] == {"resident": 2, "zero-copy": 4, "cpu": 2}


def check(model, out: Path) -> None:
    assert any(isinstance(module, SplitExperts) for module in model.modules())
    everything = itertools.chain(model.parameters(), model.buffers())
    assert not any(tensor.is_meta for tensor in everything)
    ids = torch.randint(5, 512, (1, 9))
    plain = dequantised(out, torch.float32)
    with torch.inference_mode():
        for tokens in (ids, ids[:, :2]):  # grouped, and pair by pair
            got, want = model(tokens).logits, plain(tokens).logits
            error = ((got - want).norm() / want.norm()).item()
            assert error < 2e-3, error
            print("model", model.hybrid_placement["experts"], f"{error:.1e}")
    text = model.generate(ids[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert text.shape == (1, 11)


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    {"products": lambda _: products(), "models": models}[sys.argv[1]](Path(sys.argv[2]))
