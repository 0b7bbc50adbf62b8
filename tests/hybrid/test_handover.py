"""The kernels that hand calls over, as a launch types and compiles them; no GPU is needed."""

import pytest
import torch

triton = pytest.importorskip("triton")
handover = pytest.importorskip("pipeline.hybrid.handover")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402


class _Device:
    """As much of a driver as a launch asks before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99  # not a real one's number: kernels are kept by it

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def sm_90(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Device())


@pytest.mark.parametrize("memory", [0x1230_0000, 0x7F12_3456_0000])
def test_host_addresses_are_whole(sm_90, memory):
    """Also where they would do with fewer bits: an interpreter's heap may lie below 2 GiB.

    Sending ends in a release that the CPU sees, waiting looks past all caches.
    """
    x = torch.zeros((2, 2048), dtype=torch.bfloat16)
    index, weights = torch.zeros((2, 10), dtype=torch.int64), torch.zeros((2, 10))
    table, shares, out = index[0], torch.zeros(11, dtype=torch.int32), torch.zeros((2, 2048))
    send = handover._send_kernel.warmup(
        x, index, weights, table, table, shares, table, index, memory, memory + 8192, 1, 4096,
        4352, 2, 10, 2048, 64, grid=(1,), PTX=True, EACH=16, BLOCK=2048,
    )  # fmt: skip
    lines = send.asm["ptx"].splitlines()
    stores = [line.split()[-3] for line in lines if "st." in line and ".global" in line]
    assert stores[-1] == "st.release.sys.global.b64" and len(stores) > 4
    assert send.asm["cubin"]
    take = handover._take_kernel.warmup(
        memory, table, memory + 8192, memory + 8256, out, table, 2048,
        grid=(2,), ADD=True, BLOCK=2048, num_warps=1,
    )  # fmt: skip
    assert "ld.volatile.global.b64" in take.asm["ptx"]
    assert "ld.volatile.global.v4.b32" in take.asm["ptx"]
    assert take.asm["cubin"]
