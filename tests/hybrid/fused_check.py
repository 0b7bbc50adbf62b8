"""Run by test_spread.py in a process of its own, under Triton's interpreter.

Decode steps with fused kernels and experts on all roads, against the dense model.
"""

import logging
import random
import sys
from pathlib import Path

import torch
from hybrid_models import EXPERTS_ONLY, MODELS, dequantised, write_output

from pipeline import hybrid
from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.hybrid import fused_attention, fused_linear, matvec, residency, runtime, stream
from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.ledger import COPIES, Experts, ledger
from pipeline.hybrid.placing import by_request
from pipeline.hybrid.steps.qwen3_next import Attention, Delta, Sparse
from pipeline.models.skeleton import architecture_of
from pipeline.quantize.tensor import AffineScheme

PARTS = "resident:0.25,zero-copy:0.5,cpu:0.25"


def small_tiles() -> None:
    """The interpreter's time goes by programs, not by what each does."""
    fused_linear._ROWS = 128
    fused_attention._SPLITS, fused_attention._KEYS = 2, 4
    matvec._ROWS = 64


def steps(folder: Path) -> None:
    """Two sequences of unequal lengths, some steps, float32: equal to rounding."""
    out = write_output(MODELS / "micro-nf4", folder, AffineScheme(4, 64, True), EXPERTS_ONLY)
    plain = dequantised(out, torch.float32)
    model = hybrid.load(out, device="cpu", dtype=torch.float32, placement=PARTS)
    decoder = Decoder(model, 2, 24, kernels=True)
    ids = torch.randint(5, 512, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, : random.randint(1, 4)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        decoder.prefill(ids, mask)
        want = plain(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        for step in range(3):
            tokens = torch.randint(5, 512, (2,))
            decoder.tokens.copy_(tokens)
            got = decoder.step()
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            want = plain(
                tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=want.past_key_values,
                use_cache=True,
            )
            error = ((got - want.logits[:, -1]).norm() / got.norm()).item()
            assert error < 3e-3, error  # the CPU's int4 product rounds its input
            print("step", step, f"{error:.1e}")
    kinds = {type(half) for half in decoder._halves}
    assert kinds == {Delta, Attention, Sparse}, kinds


def moving(folder: Path) -> None:
    """Long prompts through the ring, and copies that come and go, change no result."""
    out = write_output(MODELS / "micro-nf4", folder, AffineScheme(4, 64, False), EXPERTS_ONLY)
    plain = hybrid.load(out, device="cpu", dtype=torch.float32, placement="zero-copy")
    model = hybrid.load(out, device="cpu", dtype=torch.float32, placement="zero-copy")
    stream.PART_BYTES = 3 * model.model.layers[0].mlp.experts.layout.nbytes
    stream.PARTS = 2
    residency.INTERVAL = 1
    followed = runtime.connect(model, {0: [3, 1], 1: [0, 2]}, kernels=False)
    assert followed is not None and followed.kept() == [[3, 1], [0, 2]]
    ids = torch.randint(5, 512, (1, 12))
    with torch.inference_mode():
        for _ in range(2):
            got, want = model(ids).logits, plain(ids).logits
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-4)
    decoder, reference = Decoder(model, 1, 32, residency=followed), Decoder(plain, 1, 32)
    decoder.prefill(ids)
    reference.prefill(ids)
    seen = set()
    for _ in range(8):
        token = torch.randint(5, 512, (1,))
        decoder.tokens.copy_(token)
        reference.tokens.copy_(token)
        assert torch.allclose(decoder.step(), reference.step(), rtol=1e-3, atol=1e-4)
        seen.add(str(followed.kept()))
        for number, layer in enumerate(model.model.layers):
            held = layer.mlp.experts.roads(torch.device("cpu")) == 0
            have = set(held.nonzero().flatten().tolist())
            assert set(followed.kept()[number]) >= have
    assert len(seen) > 1, "nothing moved"
    print("moved", seen)


def counted(folder: Path) -> None:
    """What experts, ring, copies and cache take is what the ledger says, to the byte."""
    out = write_output(MODELS / "micro-nf4", folder, AffineScheme(4, 64, True), EXPERTS_ONLY)
    stream.PART_BYTES = 1 << 14
    tables = [("resident:0.25,zero-copy:0.75", {}), ("zero-copy:0.5,cpu:0.5", {0: [1], 1: [0, 2]})]
    for request, copies in tables:
        model = hybrid.load(out, device="cpu", placement=request)
        splits = [layer.mlp.experts for layer in model.model.layers]
        followed = runtime.connect(model, copies, kernels=False)
        decoder = Decoder(model, 2, 24)
        decoder.prefill(torch.randint(5, 512, (2, 8)))
        geometry = architecture_of(model.config.to_dict(), "").geometry(model.config.to_dict())
        homes = by_request({i: LayerExperts(8, 1) for i in range(2)}, request)
        sizes = {i: split.layout.nbytes for i, split in enumerate(splits)}
        told = ledger(model.config, geometry, 0, Experts(homes, sizes, copies), length=24, tokens=2)
        held = [
            s.device_roads["resident"].records.nbytes
            for s in splits
            if "resident" in s.device_roads
        ]
        ring = {id(s._stream[0]): s._stream[0]._buffers.nbytes for s in splits}
        keys = [
            t.nbytes for x in decoder.cache.layers if hasattr(x, "keys") for t in (x.keys, x.values)
        ]
        want = {
            "resident experts": sum(held),
            COPIES: followed.nbytes if followed else 0,
            "ring that prompts' experts pass through": sum(ring.values()),
            "keys and values of 24 tokens": sum(keys),
            "recurrent states": sum(t.nbytes for t in decoder.cache.all_states()),
        }
        assert {name: told.torch[name] for name in want} == want
        assert sum(ring.values()) > 0 and bool(copies) == bool(want[COPIES])
        print(want)


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    small_tiles()
    {"steps": steps, "moving": moving, "counted": counted}[sys.argv[1]](Path(sys.argv[2]))
