"""The table of roads, and the ways in that lead to `load`."""

import random

import pytest
import torch
from hybrid_models import MODELS, dequantised, write_output
from test_backends import random_quantized

from pipeline import hybrid
from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.errors import ResourceError, UserError
from pipeline.hybrid import probe as probing
from pipeline.hybrid import roads as road_table
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.native.library import find
from pipeline.hybrid.placing import (
    Rates,
    as_copies,
    by_policy,
    by_request,
    count,
    divide,
    divided,
    fixed,
    worth_dividing,
)
from pipeline.hybrid.probe import cpu_rate, link_rate, tokens_worth
from pipeline.hybrid.records import pack
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_only")

GIB = 2**30


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("placing")
    return write_output(MODELS / "micro-nf4", out, AffineScheme(4, 32, True))


def _layers(count=3, experts=40, nbytes=1000):
    return {
        layer: LayerExperts(experts, nbytes, [random.randint(1, 1000) for _ in range(experts)])
        for layer in range(count)
    }


def test_policy_keeps_the_most_used_and_balances_the_rest():
    layers = _layers()
    rates = Rates(pcie=40e9, cpu=60e9)
    table = by_policy(layers, 25_500, rates)
    resident = [
        (k, e) for k, roads in table.items() for e, r in enumerate(roads) if r == "resident"
    ]
    assert len(resident) == 25
    for layer, roads in table.items():
        calls = layers[layer].calls
        kept = [calls[e] for e, road in enumerate(roads) if road == "resident"]
        rest = [calls[e] for e, road in enumerate(roads) if road != "resident"]
        assert not kept or min(kept) >= max(rest)
        load = {r: sum(c for c, its in zip(calls, roads, strict=True) if its == r) for r in roads}
        ends = load["zero-copy"] / rates.pcie, load["cpu"] / rates.cpu
        assert abs(ends[0] - ends[1]) <= max(rest) / min(rates.pcie, rates.cpu)


def test_policy_without_memory_or_use():
    layers = {0: LayerExperts(10, 1000)}
    table = by_policy(layers, -5, Rates(pcie=1.0, cpu=1.0))
    assert count(table) == {"0": {"zero-copy": 5, "cpu": 5}}
    assert by_policy(layers, 10**6, Rates(1.0, 1.0)) == {0: ["resident"] * 10}
    assert by_policy(layers, 0, Rates(pcie=1.1, cpu=1.0)) == {0: ["zero-copy"] * 10}


def test_policy_where_calls_are_divided():
    layers = _layers(count=2)
    held = [road for roads in by_policy(layers, 8_000, None).values() for road in roads]
    assert held.count("resident") == 8 and held.count("zero-copy") == 72


def test_both_roads_end_together():
    """Any other number of calls on the CPU would end later; with more tokens it is no smaller."""
    for _ in range(50):
        rates = Rates(pcie=random.uniform(5e9, 60e9), cpu=random.uniform(5e9, 200e9))
        nbytes, calls = random.randrange(10**5, 10**7), random.randint(1, 12)
        mine = divide(rates, nbytes)

        def end(some, tokens, rates=rates, nbytes=nbytes, calls=calls):
            seconds = (calls - some) * tokens * nbytes / (rates.pcie * 0.88)
            return max(seconds, some and 25e-6 + some * tokens * nbytes / rates.cpu)

        shares = []
        for tokens in (1, 2, 8):
            some = mine(calls, tokens)
            assert end(some, tokens) <= min(end(n, tokens) for n in range(calls + 1)) * 1.0001
            shares.append(some)
        assert shares == sorted(shares)
        assert mine(0, 1) == 0


def test_whether_two_roads_are_worth_it():
    """Experts of the 80B model: 36.8 us each over PCIe, and on a CPU at 60 GB/s 27 us after 25."""
    nbytes = 1_622_016
    assert divide(Rates(pcie=50e9, cpu=60e9), nbytes)(10, 1) == 5
    assert worth_dividing(Rates(pcie=50e9, cpu=60e9), nbytes, 10)
    assert worth_dividing(Rates(pcie=50e9, cpu=24e9), nbytes, 10)
    assert not worth_dividing(Rates(pcie=50e9, cpu=5e9), nbytes, 10)
    # what the CPU's reads take from PCIe's is not won
    assert not worth_dividing(Rates(pcie=30e9, cpu=24e9, alone=55e9), nbytes, 10)
    assert not worth_dividing(Rates(pcie=50e9, cpu=60e9), 10_000, 4), "small experts"
    assert [fixed(3)(calls, 1) for calls in range(6)] == [0, 1, 2, 3, 3, 3]


def test_requests_of_both_roads():
    assert divided("both") == ("zero-copy", None)
    assert divided("both:3") == ("zero-copy", 3)
    for other in ("auto", "fill", "cpu", "zero-copy:0.5,cpu:0.5"):
        assert divided(other) == (other, 0)


def test_parts_go_by_use():
    layers = _layers(count=1)
    roads = by_request(layers, "resident:0.1, zero-copy:0.5, cpu:0.4")[0]
    assert count({0: roads}) == {"0": {"resident": 4, "zero-copy": 20, "cpu": 16}}
    calls = layers[0].calls
    by_road = {r: [c for c, its in zip(calls, roads, strict=True) if its == r] for r in roads}
    assert min(by_road["resident"]) >= max(by_road["zero-copy"])
    assert min(by_road["zero-copy"]) >= max(by_road["cpu"])


@pytest.mark.parametrize(
    "request_", ["gpu", "", "cpu:0.5", "cpu:x", "resident:-1,cpu:2", "both:x", "both:-1"]
)
def test_unknown_placements(directory, request_):
    with pytest.raises(UserError, match="placement") as caught:
        hybrid.load(directory, device="cpu", placement=request_)
    assert "\n" not in str(caught.value)


def test_refusals_of_the_machine(directory):
    for asked in ("zero-copy", "fill"):
        with pytest.raises(UserError, match="need a GPU"):
            hybrid.load(directory, device="cpu", placement=asked)
    with pytest.raises(UserError, match="needs the compiled kernel"):
        hybrid.load(directory, device="cpu", placement="both", native=False)
    with pytest.raises(UserError, match="finds no GPU"):
        hybrid.load(directory, device="cuda")
    with pytest.raises(ResourceError, match="of RAM"):
        hybrid.load(directory, device="cpu", host_memory=1000)


def test_copies_have_a_home_in_pinned_memory():
    """What is resident is at home in RAM when it may change; the most used come first."""
    calls = random.sample(range(1, 100), 8)
    layers = {0: LayerExperts(8, 100, calls), 3: LayerExperts(8, 100)}
    table = by_request(layers, "resident:0.25,zero-copy:0.5,cpu:0.25")
    copies, homes = as_copies(table, layers)
    ranked = sorted(range(8), key=lambda expert: -calls[expert])
    assert copies == {0: ranked[:2], 3: [0, 1]}
    for layer, roads in table.items():
        assert homes[layer] == [r.replace("resident", "zero-copy") for r in roads]
    assert as_copies(homes, layers) == ({}, homes)
    whole = by_request(layers, "resident")
    assert as_copies(whole, layers) == ({}, whole), "what is resident as a whole stays so"


@pytest.mark.parametrize("native", [True, False])
def test_the_cpus_rate_is_a_rate(native):
    assert cpu_rate(1 << 21, native) > 0


def test_tokens_worth_bringing_experts(monkeypatch):
    """None if bringing takes forever, as few as may be if it takes no time; else in between."""
    if isinstance(find(), str):
        pytest.skip(f"no native kernel: {find()}")
    made = {"bits": 4, "group": 32, "symmetric": True}
    wide, narrow = random_quantized(6, 64, 64, **made), random_quantized(6, 64, 32, **made)
    library = kernel_for(wide, narrow, torch.bfloat16)
    experts = NativeExperts(library, pack(wide, narrow))
    assert tokens_worth(experts, 8, 3, 1e9) is None
    assert tokens_worth(experts, 8, 3, 0.0) == 16
    times = {16: 1.0, 32: 2.0, 64: 8.0}
    monkeypatch.setattr(probing, "_best", lambda work: times[len(work.args[0])])
    for seconds, tokens in ((0.5, 16), (1.0, 16), (1.5, 24), (2.0, 32), (5.0, 48)):
        assert tokens_worth(experts, 8, 3, seconds) == tokens


def test_the_links_rate_is_a_rate():
    for staged in (True, False):
        assert link_rate(torch.device("cpu"), staged=staged, nbytes=1 << 20) > 0


def test_what_a_gpu_gets_unasked(monkeypatch):
    """Zero-copy without residents, which was measured good; "fill" fills the room that is left."""
    monkeypatch.setattr(road_table, "kernels_fail", lambda _: None)
    monkeypatch.setattr(road_table, "probe", lambda *_: Rates(pcie=2.0, cpu=1.0))
    layers, cuda = _layers(count=2), torch.device("cuda")
    assert road_table.choose("auto", layers, cuda, 10**6) == (by_request(layers, "zero-copy"), [])
    filled, _ = road_table.choose("fill", layers, cuda, 8_000)
    held = [road for its in filled.values() for road in its]
    assert held.count("resident") == 8 and held.count("zero-copy") == 72
    assert road_table.choose("auto", layers, torch.device("cpu")) == (by_request(layers, "cpu"), [])


def test_from_pretrained(directory):
    model = hybrid.from_pretrained(
        directory, device_map="auto", max_memory={0: "1GiB", "cpu": "1GiB"}, placement="auto"
    )
    assert model.hybrid_placement["device_memory_limit"] == GIB
    assert model.hybrid_placement["experts"] == {"0": "cpu", "1": "cpu"}
    with pytest.raises(ResourceError, match="device_memory"):
        hybrid.from_pretrained(directory, max_memory={0: 1000})
    for wrong in ({"device_map": {"": 0}}, {"max_memory": {0: 1, 1: 1}}, {"max_memory": {"x": 1}}):
        with pytest.raises(UserError):
            hybrid.from_pretrained(directory, **wrong)


def test_a_dense_model_becomes_hybrid(directory):
    model = dequantised(directory, torch.float32)
    model.name_or_path = str(directory)
    ids = torch.randint(5, 512, (2, 7))
    with torch.inference_mode():
        want = model(ids).logits
        assert hybrid.place(model, device="cpu") is model
        got = model(ids).logits
    assert any(isinstance(module, HybridExperts) for module in model.modules())
    assert (got - want).norm() < 2e-3 * want.norm()
    model.name_or_path = "nowhere"
    with pytest.raises(UserError, match="not a model directory"):
        hybrid.place(model)
