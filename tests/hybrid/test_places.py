"""How experts and the ring of prompts are fitted into a GPU and into RAM; the GPU is only said."""

from types import SimpleNamespace

import pytest
import torch
from synthetic_geometries import MODELS

from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.errors import ResourceError
from pipeline.hybrid import ledger, places, roads
from pipeline.hybrid.placing import Rates
from pipeline.hybrid.records import planned_layout
from pipeline.models.skeleton import architecture_of, geometry_of, model_config
from pipeline.quantize.tensor import AffineScheme

GIB = 1 << 30
WEIGHTS = round(3.81 * GIB)
MADE = MODELS["qwen3-next-80b"]
LAYOUT = planned_layout(AffineScheme(4, 128, True), MADE.hidden, MADE.inner)
GEOMETRY = geometry_of(architecture_of(MADE.config, ""), MADE.config, "")
LAYERS = {layer: LayerExperts(MADE.experts, LAYOUT.nbytes) for layer in GEOMETRY.moe_layers}


@pytest.fixture
def found(monkeypatch):
    """Places on a card of so many free GiB, beside so much RAM, of the 80B model's experts."""

    def find(placement, gpu, ram=64.0, native=True, follow_use=True, model_type=None):
        free = int(gpu * GIB) - ledger.CONTEXT
        memory = SimpleNamespace(available=int(ram * GIB))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
        monkeypatch.setattr(roads.psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(places, "resident_threads", lambda _: ledger.RESIDENT_THREADS)
        for module in (roads, places):
            monkeypatch.setattr(module, "kernels_fail", lambda _: None)
        experts = SimpleNamespace(layout=lambda _: LAYOUT, native=lambda _: native)
        device = torch.device("cuda")
        machine = places.Machine(device, torch.bfloat16, None, None, follow_use, native)
        config = model_config(MADE.config)
        config.model_type = model_type or config.model_type
        return places.find_places(
            placement, LAYERS, experts, config, GEOMETRY, WEIGHTS, machine, "model"
        )

    return find


@pytest.mark.parametrize("placement", ["cpu", "zero-copy", "zero-copy:0.5,cpu:0.5"])
def test_the_ring_shrinks_with_the_card(found, placement):
    rings = {}
    for gpu in (8.5, 7.4, 7.0):
        made = found(placement, gpu)
        assert made.ledger.total <= gpu * GIB and not made.why_not
        rings[gpu] = made.ledger.torch[ledger.RING]
        assert rings[gpu] == made.buffers * 64 * LAYOUT.nbytes
    assert rings[8.5] > rings[7.4] > rings[7.0] == 2 * 64 * LAYOUT.nbytes


def test_no_room_for_a_ring(found):
    """The CPU's experts stay; others have no other way."""
    made = found("cpu", 6.8)
    assert (made.visiting, made.pinning) == (False, False) and "ring" in made.why_not
    assert made.ledger.torch[ledger.RING] == 0 and made.ledger.total < 6.8 * GIB
    auto = found("auto", 6.8)
    assert auto.roads[0] == ["cpu"] * 512 and "ring" in auto.remarks[0]
    assert found("auto", 7.0).roads[0] == ["zero-copy"] * 512
    with pytest.raises(ResourceError, match="are needed"):
        found("zero-copy", 6.8)


def test_what_fill_leaves_is_a_whole_ring(found, monkeypatch):
    monkeypatch.setattr(roads, "probe", lambda *_: Rates(pcie=50e9, cpu=20e9))
    made = found("fill", 10.0)
    assert made.copies and made.buffers == 8 and made.ledger.total <= 10 * GIB


def test_fill_gives_the_cpu_experts_where_calls_cannot_be_divided(found, monkeypatch):
    """Without the compiled kernel, for a format that it does not take, and where decoding is
    transformers' own."""
    monkeypatch.setattr(roads, "probe", lambda *_: Rates(pcie=50e9, cpu=60e9))
    assert "cpu" not in found("fill", 10.0).roads[0]
    assert "cpu" in found("fill", 10.0, native=False).roads[0]
    assert "cpu" in found("fill", 10.0, model_type="qwen3_moe").roads[0]


@pytest.mark.parametrize(("ram", "pinning"), [(64, True), (42, True), (41, False)])
def test_ram_is_left_unpinned(found, ram, pinning):
    made = found("cpu", 10.0, ram=ram)
    assert (made.visiting, made.pinning) == (True, pinning)


def test_experts_in_torchs_layout_stay(found):
    made = found("cpu", 10.0, native=False)
    assert not made.visiting and not made.pinning and made.ledger.torch[ledger.RING] == 0
    assert not found("zero-copy", 10.0).visiting
