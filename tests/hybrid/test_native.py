"""The compiled kernel for experts on the CPU against float64, in all its variants."""

import copy
import ctypes
import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
from test_backends import random_quantized
from test_modules import _plain

from pipeline.hybrid.backends import choose
from pipeline.hybrid.modules import HybridExperts
from pipeline.hybrid.native import library
from pipeline.hybrid.native.experts import NativeExperts, kernel_for
from pipeline.hybrid.records import pack

FOUND = library.find()
EXPERTS = 6

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernel: {FOUND}"),
]

# bits, group, hidden, inner; widths that are not of whole vectors among them
KINDS = [
    (4, 128, 256, 128),
    (4, 128, 1024, 384),
    (4, 64, 192, 64),
    (4, 32, 96, 64),
    (4, 32, 544, 96),
    (4, 16, 2080, 16),
    (4, 256, 768, 256),
    (4, -1, 96, 48),
    (4, -1, 400, 32),
    (3, 128, 128, 128),
    (2, 64, 64, 192),
]


def _experts(bits, group, hidden, inner, symmetric, kind=None):
    """The module, by one of the kernel's variants, and its dense matrices."""
    make = {"bits": bits, "group": group, "symmetric": symmetric, "bf16_scales": False}
    wide = random_quantized(EXPERTS, 2 * inner, hidden, **make)
    narrow = random_quantized(EXPERTS, hidden, inner, **make)
    kernel = kernel_for(wide, narrow, torch.bfloat16)
    assert kernel is not None
    if kind is not None:
        kernel = dataclasses.replace(kernel, kind=kind)
    module = NativeExperts(kernel, pack(wide, narrow))
    return module, wide, narrow


def _calls(tokens, hidden, each=4):
    """Inputs with a mean, and choices in which some experts are computed elsewhere."""
    x = (torch.randn(tokens, hidden) + 0.3).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS + 1)[:each] for _ in range(tokens)])
    return x, index, torch.rand(tokens, each)


def _want(x, index, weights, wide, narrow):
    """Token by token in float64; the expert that is none gives zeros."""
    gate_up, down = wide.dequantize().double(), narrow.dequantize().double()
    gate_up, down = (torch.cat([m, torch.zeros_like(m[:1])]) for m in (gate_up, down))
    return _plain(x, index, weights, gate_up, down)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group", "hidden", "inner"), KINDS)
def test_every_variant(*, bits, group, hidden, inner, symmetric):
    for kind in range(FOUND.kind + 1):
        module, wide, narrow = _experts(bits, group, hidden, inner, symmetric, kind)
        for tokens in (1, 2, 7, 41):
            x, index, weights = _calls(tokens, hidden)
            got = _raw(module, x, index, weights)
            want = _want(x, index, weights, wide, narrow)
            # bfloat16 alone would leave 0.002
            assert (got.double() - want).norm() < 0.001 * want.norm()


def _raw(module, x, index, weights):
    """Before the result is rounded to bfloat16."""
    output = torch.empty(x.shape)
    module._compute(x, index, weights, output)
    return output


def test_threads_and_company_change_no_bit(monkeypatch):
    module, *_ = _experts(4, 32, 544, 96, False)
    x, index, weights = _calls(37, 544)
    alone = _raw(module, x, index, weights)
    for count in (2, 3, 7, 40):
        monkeypatch.setattr("pipeline.hybrid.native.experts.threads", lambda count=count: count)
        for _ in range(5):
            assert torch.equal(_raw(module, x, index, weights), alone)
    for first, last in ((0, 1), (5, 7), (30, 37)):
        some = slice(first, last)
        assert torch.equal(_raw(module, x[some], index[some], weights[some]), alone[some])
    monkeypatch.setattr("pipeline.hybrid.native.experts._ROOM", 4 * 544 * 4 * 5)  # in turns
    assert torch.equal(module(x, index, weights), alone.bfloat16())


def test_torchs_products_agree():
    module, wide, narrow = _experts(4, 32, 96, 64, False)
    packed = [choose(q.scheme, *q.shape[1:], torch.device("cpu")) for q in (wide, narrow)]
    packed = [b.pack(q, torch.bfloat16) for b, q in zip(packed, (wide, narrow), strict=True)]
    fallback = HybridExperts(*packed, EXPERTS, torch.nn.functional.silu)
    for tokens in (1, 9):
        x, index, weights = _calls(tokens, 96)
        got, want = module(x, index, weights), fallback(x, index, weights)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got.float() - want.float()).norm() < 0.02 * want.float().norm()


def test_odd_calls():
    module, *_ = _experts(4, 32, 96, 64, True)
    x, index, weights = _calls(3, 96)
    none = torch.full_like(index, EXPERTS)
    assert not module(x, none, weights).any()
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 96)
    assert not module(x, index[:, :0], weights[:, :0]).any()
    # other dtypes and strides mean the same
    other = module(x.t().contiguous().t(), index.int(), weights.double())
    assert torch.equal(other, module(x, index, weights))
    for wrong in (-1, EXPERTS + 1, 1 << 40):
        with pytest.raises(IndexError, match="index is not within 0 and 6"):
            module(x, torch.full_like(index, wrong), weights)


def test_extreme_numbers():
    """Zeros stay zeros, one large element swamps no token but its own, NaN and infinity show."""
    module, wide, narrow = _experts(4, 32, 96, 64, True)
    x, index, weights = _calls(6, 96)
    index = index.clamp(max=EXPERTS - 1)
    x[0] = 0
    x[1] *= 1e-36
    x[2, 5] = 3e4
    x[3, 7], x[4, 8] = float("nan"), float("-inf")
    got = _raw(module, x, index, weights)
    assert not got[0].any() and got[1].abs().max() < 1e-30
    assert got[3].isnan().all() and got[4].isnan().all()
    want = _want(x, index, weights, wide, narrow)
    for token in (2, 5):
        assert (got[token].double() - want[token]).norm() < 0.002 * want[token].norm()


def test_it_is_neither_moved_nor_cast():
    module, *_ = _experts(4, 64, 64, 64, True)
    calls = _calls(2, 64)
    before = module(*calls)
    module.to(torch.float32).to("meta")
    assert torch.equal(module(*calls), before)
    assert not list(module.state_dict()) and module.nbytes > 0


def test_what_it_leaves_to_torch():
    def kernel(dtype=torch.bfloat16, **kind):
        wide = random_quantized(1, 64, 384, symmetric=True, **kind)
        return kernel_for(wide, random_quantized(1, 384, 384, symmetric=True, **kind), dtype)

    assert kernel(bits=4, group=128) is FOUND
    assert kernel(bits=4, group=128, dtype=torch.float32) is None
    assert kernel(bits=8, group=128) is None
    assert kernel(bits=4, group=96) is None
    assert kernel(bits=4, group=8) is None


def test_from_several_threads_at_once():
    module, *_ = _experts(4, 32, 96, 64, True)
    calls = _calls(11, 96)
    want, wrong = module(*calls), []

    def run():
        wrong.extend(i for i in range(20) if not torch.equal(module(*calls), want))

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORKED = """
import os, sys, torch
sys.path[:0] = sys.argv[1:]
from test_native import _calls, _experts, _raw
torch.set_num_threads(3)
module, *_ = _experts(4, 32, 96, 64, True)
calls = _calls(9, 96)
want = _raw(module, *calls)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(_raw(module, *calls), want) else 1)
print(os.waitpid(child, 0)[1], torch.equal(_raw(module, *calls), want))
"""


def test_a_forked_child_computes_too():
    """OpenMP's threads are not there in the child, and waiting for them would never end."""
    paths = [os.path.dirname(__file__), os.getcwd()]  # noqa: PTH109, PTH120
    command = [sys.executable, "-c", FORKED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0", "True"]


def test_nothing_stays_behind():
    """A thousand calls, and the C library's own count of what is allocated."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("the C library has no mallinfo2")
    mallinfo.restype = type(
        "Info",
        (ctypes.Structure,),
        {
            "_fields_": [
                (name, ctypes.c_size_t)
                for name in (
                    "arena",
                    "ordblks",
                    "smblks",
                    "hblks",
                    "hblkhd",
                    "usmblks",
                    "fsmblks",
                    "used",
                    "fordblks",
                    "keepcost",
                )
            ]
        },
    )
    module, *_ = _experts(4, 32, 544, 96, True)
    x, index, weights = _calls(8, 544)
    output = torch.empty(x.shape)
    module._compute(x, index, weights, output)
    before = mallinfo()
    for _ in range(1000):
        module._compute(x, index, weights, output)
    after = mallinfo()
    # one call's room is 200 kB; Python's own small pieces come and go
    assert after.used + after.hblkhd < before.used + before.hblkhd + 1_000_000


def test_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(library, "_VERSION", -1)
    assert "another version" in library.find.__wrapped__()


def test_a_copy_outlives_what_it_was_copied_from():
    module, _, _ = _experts(4, 128, 256, 128, True)
    x, index, weights = _calls(3, 256)
    want = module(x, index, weights)
    twin = copy.deepcopy(module)
    module._records.data.zero_()
    assert torch.equal(twin(x, index, weights), want)
