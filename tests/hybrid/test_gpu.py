"""With a GPU: experts stay in RAM, the rest is on the device, logits are those of the model."""

import pytest
import torch
from hybrid_models import EVERYTHING, MODELS, dequantised, write_output

from pipeline import hybrid
from pipeline.quantize.tensor import AffineScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_split_model(tmp_path):
    out = write_output(MODELS / "micro-nf4", tmp_path, AffineScheme(4, 64, True), also=EVERYTHING)
    model = hybrid.load(out, device_memory="1GiB", dtype=torch.float32)
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
    model = hybrid.load(out)
    taken = torch.cuda.memory_allocated() - before
    placed = model.hybrid_placement["bytes"]
    on_device = placed["dense"] + placed["quantized_linears"]
    blocks = 512 * (len(list(model.parameters())) + 5 * 12 + 8)  # the allocator's granularity
    assert on_device <= taken <= on_device + blocks
