"""With a GPU: experts stay in RAM, the rest is on the device, logits are those of the model."""

import random

import pytest
import torch
from hybrid_models import (
    EVERYTHING,
    MODELS,
    dequantised,
    dequantised_state,
    plain_model,
    write_output,
)
from judging import FORMATS, PLACEMENTS, TRAINED, judge, passages

from pipeline import hybrid
from pipeline.hybrid import places
from pipeline.hybrid.host import host_memory, pin_memory
from pipeline.hybrid.native.library import find
from pipeline.hybrid.placing import ROADS
from pipeline.quantize.tensor import AffineScheme

runtime = pytest.importorskip("pipeline.hybrid.runtime", exc_type=ImportError)
SplitExperts = runtime.SplitExperts
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_split_model(tmp_path):
    out = write_output(MODELS / "micro-nf4", tmp_path, AffineScheme(4, 64, True), also=EVERYTHING)
    model = hybrid.load(out, device_memory="4GiB", dtype=torch.float32, placement="cpu")
    placement = model.hybrid_placement
    assert placement["backends"] == {"experts": {"int4pack": 4}, "linears": {"dequantize": 12}}
    assert model.device.type == "cuda"
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    plain = dequantised(out, torch.float32)
    ids = torch.randint(5, 512, (3, 40))
    with torch.inference_mode():
        got, want = model(ids.cuda()).logits, plain(ids).logits
    assert got.is_cuda
    assert (got.cpu() - want).norm() < 2e-3 * want.norm()
    text = model.generate(ids.cuda(), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert text.shape == (3, 48) and text.is_cuda


def test_device_memory_is_small(tmp_path):
    """What lies on the device is what the placement says, without experts."""
    out = write_output(MODELS / "micro-nf4", tmp_path, AffineScheme(4, 64, True), also=EVERYTHING)
    before = torch.cuda.memory_allocated()
    model = hybrid.load(out, placement="cpu")
    taken = torch.cuda.memory_allocated() - before
    placed = model.hybrid_placement["bytes"]
    on_device = placed["dense"] + placed["quantized_linears"]
    tables = 5 * model.config.num_hidden_layers
    # the allocator's granularity
    blocks = 512 * (len(list(model.parameters())) + 5 * 12 + tables + 8)
    assert on_device <= taken <= on_device + blocks


@pytest.mark.parametrize(("method", "scheme"), FORMATS, ids=str)
def test_trained_model_everywhere(method, scheme, tmp_path, monkeypatch):
    """Every format on every road, and spread over all three at random."""
    ids = passages(24, 192)
    out = write_output(TRAINED, tmp_path, scheme, method=method)
    state = dequantised_state(out)
    choose = places.choose
    with torch.inference_mode():
        exact = plain_model(out, state, torch.float32)(ids).logits
        rounded = plain_model(out, state, torch.bfloat16)(ids).logits
        for placement in PLACEMENTS:
            if placement == "random":
                monkeypatch.setattr(places, "choose", lambda *a: _anywhere(*choose(*a)))
            asked = "zero-copy" if placement == "random" else placement
            model = hybrid.load(out, placement=asked, follow_use=False)
            judge(model(ids.cuda()).logits.cpu(), rounded, exact, ids)


@pytest.mark.parametrize("placement", ["cpu", "resident:0.2,zero-copy:0.4,cpu:0.4"])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_cpus_experts_come_for_prompts(placement, pinned, tmp_path, monkeypatch):
    """From memory that is pinned or not; the CPU is asked by shorter prompts alone."""
    if isinstance(find(), str):
        pytest.skip(f"no native kernel: {find()}")
    monkeypatch.setattr(runtime, "tokens_worth", lambda *_: 200)
    monkeypatch.setattr(places, "UNPINNED", 0 if pinned else 1 << 50)
    ids = passages(24, 192)
    out = write_output(TRAINED, tmp_path, AffineScheme(4, 32, True))
    state = dequantised_state(out)
    model = hybrid.load(out, placement=placement)
    assert model.hybrid_placement["prompts"] == "the CPU below 200 tokens, from there on the GPU"
    splits = [module for module in model.modules() if isinstance(module, SplitExperts)]
    locked = {split.in_ram["cpu"].data.is_pinned() for split in splits}
    assert locked == {pinned} and len(splits) == 6
    with torch.inference_mode():
        exact = plain_model(out, state, torch.float32)(ids).logits
        rounded = plain_model(out, state, torch.bfloat16)(ids).logits
        model(ids[:1, :8].cuda())
        for split in splits:
            split.host.forward = None  # whoever calls it fails
        for _ in range(2):
            judge(model(ids.cuda()).logits.cpu(), rounded, exact, ids)
        with pytest.raises(TypeError):
            model(ids[:1, :8].cuda())


def test_memory_that_cannot_be_pinned():
    """One error, and none for whoever uses the GPU next."""
    data = host_memory(1 << 20, pin=True)
    with pytest.raises(RuntimeError):
        pin_memory(data)
    assert (torch.arange(8, device="cuda") + 1).sum().item() == 36


def _anywhere(table, remarks):
    return {k: random.choices(ROADS, k=len(roads)) for k, roads in table.items()}, remarks
