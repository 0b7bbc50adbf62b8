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
from judging import FORMATS, PLACEMENTS, TRAINED, error, passages, surprise
from test_backends import random_quantized

from pipeline import hybrid
from pipeline.hybrid import places
from pipeline.hybrid.grouped import Groups, grouped
from pipeline.hybrid.matvec import down, gate_up
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.placing import ROADS
from pipeline.hybrid.records import Records, pack
from pipeline.hybrid.split import DeviceRoad, SplitExperts
from pipeline.hybrid.stream import Stream
from pipeline.hybrid.use import UseCounter
from pipeline.quantize.tensor import AffineScheme


def products(_: Path) -> None:
    """All kernels against the float64 product, for every scheme; 24 rows fill no tile."""
    schemes = [(4, g, s) for g in (32, 64, 128, -1) for s in (True, False)]
    schemes += [(8, g, s) for g in (32, 128) for s in (True, False)] + [(3, 64, False)]
    for bits, group, symmetric in schemes:
        dtype, bound = random.choice([(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
        made = {"bits": bits, "group": group, "symmetric": symmetric}
        wide, narrow = random_quantized(3, 48, 128, **made), random_quantized(3, 24, 128, **made)
        records = pack(wide, narrow)
        for got, want in zip(records.unpack(), (wide, narrow), strict=True):
            assert torch.equal(got.dequantize(), want.dequantize())
        layout = records.layout
        table = torch.tensor([0, *records.addresses()])[[1, 2, 0, 3]]  # expert 2 is elsewhere
        share, tokens = random.choice([(1, 9), (3, 3)])
        x = torch.randn(tokens, 128).to(dtype)
        index = torch.randint(0, 4, (tokens * share,))
        index[:2] = torch.tensor([2, 3])
        mine = index != 2
        place = (index - (index > 2).long()).clamp(max=2)
        rows = x.double().repeat_interleave(share, 0)
        gates, ups = product(wide, place, rows).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gates) * ups
        plain = product(narrow, place, rows)
        weights = torch.rand(tokens * share).to(dtype)
        summed = plain * (weights.double() * mine).unsqueeze(1)
        summed = summed.view(tokens, share, -1).sum(1)
        groups = Groups(index, 4)
        for name in ("gate_up", "grouped gate_up", "grouped down", "down"):
            out = torch.full((len(index), 24), 7.0, dtype=dtype)
            want = plain if name == "grouped down" else inner
            if name == "gate_up":
                gate_up(x, index, table, layout.gate_up, out)
            elif name == "grouped gate_up":
                grouped(x, groups, table, layout.gate_up, out, gated=True)
            elif name == "grouped down":
                grouped(x, groups, table, layout.down, out, gated=False)
            else:
                each = x.repeat_interleave(share, 0)
                out = torch.full((tokens, 24), 7.0)
                down(each, index, table, weights, layout.down, out)
                error = ((out.double() - summed).norm() / summed.norm().clamp(min=1)).item()
                assert error < bound, (made, name, dtype, error)
                continue
            assert bool((out[~mine] == 7).all()), "wrote to another road's pair"
            error = ((out.double() - want)[mine].norm() / want[mine].norm()).item()
            assert error < bound, (made, name, dtype, error)
        print(made, dtype, f"{error:.1e}")


def product(quantized, place, rows):
    return (quantized.dequantize().double()[place] @ rows.unsqueeze(-1)).squeeze(-1)


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
    chosen = places.choose

    def anywhere(*args):
        table, remarks = chosen(*args)
        anyhow = {layer: random.choices(ROADS, k=len(roads)) for layer, roads in table.items()}
        return anyhow, remarks

    places.choose = anywhere
    parts = "resident:0.3,zero-copy:0.4,cpu:0.3"
    check(hybrid.load(out, device="cpu", dtype=torch.float32, placement=parts), out)
    places.choose = chosen
    placed = hybrid.place(hybrid.load(out, device="cpu", dtype=torch.float32), placement=parts)
    assert any(isinstance(module, SplitExperts) for module in placed.modules())
    assert placed.hybrid_placement["experts"]["0"] == {"resident": 2, "zero-copy": 4, "cpu": 2}


def visiting(_: Path) -> None:
    """The CPU's experts of long prompts come to the device, and nothing is left to the CPU."""
    made = {"bits": 4, "symmetric": True, "group": 32}
    wide, narrow = random_quantized(12, 64, 64, **made), random_quantized(12, 64, 32, **made)
    kernel = kernel_for(wide, narrow, torch.bfloat16)
    if kernel is None:
        print("no native kernel here")
        return
    records = pack(wide, narrow)
    x = torch.randn(20, 64).bfloat16()
    index = torch.rand(20, 12).topk(3).indices
    weights = torch.rand(20, 3)
    want = torch.zeros(20, 64)
    for number in range(3):
        place = index[:, number]
        gates, ups = product(wide, place, x.double()).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gates) * ups
        want += (product(narrow, place, inner) * weights[:, number : number + 1]).float()
    layers = []
    for spread in (["cpu"] * 12, random.choices(ROADS, k=12), ["resident", "cpu"] * 6):
        members = {road: [i for i in range(12) if spread[i] == road] for road in ROADS}
        roads, cpu = {}, None
        for road, some in members.items():
            held = Records(records.layout, records.data[some])
            if road == "cpu":
                cpu = (some, NativeExperts(kernel, held)) if some else None
            elif some:
                roads[road] = DeviceRoad(some, held)
        layers.append(SplitExperts(roads, cpu, 12, torch.nn.functional.silu, x.device))
        apart = layers[-1](x, index, weights)
        assert off(apart, want) < 0.02, spread
    stream = Stream([layer.in_ram for layer in layers], x.device, 2)
    for number, layer in enumerate(layers):
        layer.stream_from(stream, number, 10)
        if layer.host is not None:
            layer.host.forward = None  # whoever calls it fails
        assert off(layer(x, index, weights), want) < 0.02, number
        assert off(layer(x[:10], index[:10], weights[:10]), want[:10]) < 0.02, number
    try:
        layers[0](x[:9], index[:9], weights[:9])
    except TypeError:
        print("shorter prompts stay with the CPU")


def off(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def trained(folder: Path) -> None:
    """The trained model, one layer's experts on each road in turn, in a format drawn for each.

    In float32, where a token cannot go to another expert by mere noise: the same figures as
    `judging.judge` asks for, and what is left is the kernels' own error.
    """
    ids = passages(1, 12)
    for placement in PLACEMENTS:
        method, scheme = random.choice(FORMATS)
        out = write_output(TRAINED, folder / placement, scheme, method=method)
        layer = random.randrange(6)
        chosen = places.choose

        def one(*arguments, its=layer, where=placement, choose=chosen):
            table, remarks = choose(*arguments)
            roads = table[its]
            spread = random.choices(ROADS, k=len(roads)) if where == "random" else [where] * 32
            return {**{k: ["cpu"] * 32 for k in table}, its: spread}, remarks

        places.choose = one
        model = hybrid.load(out, device="cpu", dtype=torch.float32, placement="cpu")
        places.choose = chosen
        counter = UseCounter(model)
        with torch.inference_mode():
            got, want = model(ids).logits, dequantised(out, torch.float32)(ids).logits
        use = counter.take()
        assert set(use) == {str(k) for k in range(6)}
        assert all(abs(sum(parts.values()) - 1) < 1e-9 for parts in use.values())
        if placement != "random":
            assert use[str(layer)] == {placement: 1.0}
        off = error(got, want)
        change = (surprise(got, ids) - surprise(want, ids)).mean().exp().item()
        assert off < 2e-3 and abs(change - 1) < 0.002, (method, scheme, placement, off, change)
        first, second = want.topk(2, dim=-1).values.unbind(-1)
        sure = first - second > 2 * (got - want).abs().amax()
        assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure]) and bool(sure.any())
        print(method, scheme, placement, layer, f"{off:.1e}")


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
    parts = {"products": products, "models": models, "visiting": visiting, "trained": trained}
    parts[sys.argv[1]](Path(sys.argv[2]))
