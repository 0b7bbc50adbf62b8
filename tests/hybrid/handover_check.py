"""Run by test_spread.py in a process of its own, under Triton's interpreter.

Decode steps that call the CPU's threads themselves, against those that go through Python.
"""

import random
import sys
from pathlib import Path

import torch
from fused_check import small_tiles
from hybrid_models import MODELS, write_output

from pipeline import hybrid
from pipeline.errors import ResourceError
from pipeline.hybrid import runtime
from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.native.crew import Crew
from pipeline.hybrid.placing import ROADS, fixed
from pipeline.hybrid.split import SplitExperts
from pipeline.hybrid.steps.qwen3_next import _routed
from pipeline.hybrid.use import UseCounter
from pipeline.quantize.tensor import AffineScheme

BOUND = 0.01
"""The GPU's kernels round gated products to bfloat16, the CPU's do not."""
PLACEMENTS = ["zero-copy", "cpu", "resident:0.25,zero-copy:0.5,cpu:0.25"]


def layers(out: Path) -> None:
    """Every placement and division: a layer's calls come out as they do through Python."""
    for placement in PLACEMENTS:
        model = hybrid.load(out, device="cpu", placement=placement)
        experts = [layer.mlp.experts for layer in model.model.layers]
        count, top_k = experts[0].num_experts, model.config.num_experts_per_tok
        tokens = random.randint(1, 3)
        x = torch.randn(tokens, model.config.hidden_size).bfloat16()
        weights = torch.rand(tokens, top_k).bfloat16()
        index = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])
        want = [module(x, index, weights) for module in experts]
        for share in [0] if placement == "cpu" else random.sample(range(1, top_k + 1), 1):
            told = runtime.hand_over_as(model, "both", share)
            assert told == ((0, "there are none") if placement == "cpu" else (share, ""))
            crew = experts[0].handover.crew
            for module, expected in zip(experts, want, strict=True):
                with crew.awake():
                    got = _finish(_routed(module)(x, index, weights))
                error = (got - expected).norm() / expected.norm()
                assert error < BOUND, (placement, share, error)
                if isinstance(module, SplitExperts):
                    _check_roads(module, index, share)
                held = {tensor.data_ptr() for tensor in crew._held}
                assert {its.data_ptr() for its in _in_ram(module)} <= held
            crew.check()
            assert crew.served == len(experts)


def undivided(out: Path) -> None:
    """What keeps the CPU from calls that it was to get is said."""
    wide = write_output(MODELS / "micro-nf4", out / "8", AffineScheme(8, 64, True))
    model = hybrid.load(wide, device="cpu", placement="zero-copy")
    told = runtime.hand_over_as(model, "both", 2)
    assert told == (0, "the compiled kernel does not take their format")
    resident = hybrid.load(wide, device="cpu", placement="resident")
    assert not runtime.hand_over(resident, fixed(2))
    model.config.model_type = "qwen3_moe"
    calls, why = runtime.hand_over_as(model, "both", 2)
    assert calls == 0 and "qwen3_moe" in why


def _in_ram(module):
    if isinstance(module, SplitExperts):
        return [records.data for records in module.in_ram.values()]
    return [module.records.data]


def _finish(pieces):
    try:
        next(pieces)
    except StopIteration as end:
        return end.value
    raise AssertionError("something was left to Python")


def _check_roads(module: SplitExperts, index: torch.Tensor, share: int) -> None:
    """Residents stay where they are, experts at home on the CPU too, and as many others as fit."""
    at_home = module.roads(torch.device("cpu"))[index]
    now = module.roads_of(index)
    for before, after in zip(at_home.tolist(), now.tolist(), strict=True):
        moved = [b for b, a in zip(before, after, strict=True) if a != b]
        assert set(moved) <= {ROADS.index("zero-copy")}
        bound = before.count(ROADS.index("cpu"))
        free = before.count(ROADS.index("zero-copy"))
        assert len(moved) == min(free, max(0, min(share, bound + free) - bound))


def steps(out: Path) -> None:
    """Several sequences, copies that move, calls counted: each layer's sums in every step."""
    model = hybrid.load(out, device="cpu", placement="zero-copy:0.75,cpu:0.25")
    experts = [layer.mlp.experts for layer in model.model.layers]
    copies = {
        number: list(module.device_roads["zero-copy"].experts[:3])
        for number, module in enumerate(experts)
    }
    followed = runtime.connect(model, copies, kernels=False)
    assert runtime.hand_over(model, fixed(1))
    errors: list[float] = []
    for module in experts:
        module.pieces = _compared(module, errors)
    counter = UseCounter(model)
    decoder = Decoder(model, 2, 24, residency=followed, kernels=True)
    decoder.prefill(torch.randint(5, 512, (2, 6)))
    counter.take()
    for _ in range(2):
        decoder.tokens.copy_(torch.randint(5, 512, (2,)))
        decoder.step()
    assert len(errors) == 2 * len(experts) and max(errors) < BOUND, errors
    for parts in counter.take().values():
        assert 0 < parts["cpu"] < 1 and abs(sum(parts.values()) - 1) < 1e-6, parts


def _compared(module, errors):
    """`pieces`, the same through Python beside it."""
    pieces = module.pieces

    def both(*inputs):
        uses, module.uses = module.uses, None
        want = module(*inputs)
        module.uses = uses
        got = yield from pieces(*inputs)
        errors.append(float((got - want).norm() / want.norm()))
        return got

    return both


def late(out: Path) -> None:
    """Answers that do not come: the device gives up, the next step says so, and all is well."""
    model = hybrid.load(out, device="cpu", placement="cpu")
    assert runtime.hand_over(model)
    counter = UseCounter(model)
    decoder = Decoder(model, 1, 24, kernels=True)
    decoder.prefill(torch.randint(5, 512, (1, 6)))
    counter.take()
    decoder.step()
    assert list(counter.take().values()) == [{"cpu": 1.0}] * len(model.model.layers)
    decoder.prefill(torch.randint(5, 512, (1, 6)))
    answer, Crew.answer = Crew.answer, Crew.late  # for the device, a word that nobody writes
    decoder._crew.patience.fill_(20)
    decoder.step()
    Crew.answer = answer
    try:
        decoder.step()
    except ResourceError as error:
        assert "in time" in str(error)
    else:
        raise AssertionError("nothing was said")
    for _ in range(2):
        decoder.step()
    decoder._crew.check()


if __name__ == "__main__":
    seed = random.randrange(2**31)
    print("seed", seed)
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(random.choice([1, 2, 4]))
    small_tiles()
    made = write_output(MODELS / "micro-nf4", Path(sys.argv[2]), AffineScheme(4, 64, True))
    layers(made)
    undivided(Path(sys.argv[2]))
    steps(made)
    late(made)
