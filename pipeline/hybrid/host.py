"""Host memory that a GPU works on: in large pages, faulted in by several threads, then pinned.

Pinning walks through memory page by page in one thread, and brings in every page that nobody has
touched yet: some 2 GB/s.  Pages that are large and there already cost a fraction of that.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 4096
_LARGE = 1 << 21
_MAPPED = 3
"""cudaHostRegisterPortable and cudaHostRegisterMapped: kernels of any device may use it."""
_STAGED = 64 << 20
"""Bytes that a thread's staging memory holds at most."""
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}
_DLPACK_NAME = b"dltensor"


def host_memory(nbytes: int, *, pin: bool) -> Tensor:
    """uint8 [nbytes] at a page's beginning; RuntimeError when it cannot be pinned.

    pin: see `pin_memory`.  torch's own pinned allocator rounds up to powers of two and keeps what
    was freed.
    """
    room = torch.empty(nbytes + _PAGE, dtype=torch.uint8)
    skip = -room.data_ptr() % _PAGE
    # By way of numpy, so that its storage begins there too: `is_pinned` asks for that byte.
    data = torch.from_numpy(room.numpy()[skip : skip + nbytes])
    if nbytes >= _LARGE:
        _ask_for_large_pages(data)
    if pin:
        fault_in(data)
        pin_memory(data)
    return data


def fault_in(data: Tensor) -> None:
    """Bring in the pages of memory that nothing was written to yet, with torch's threads."""
    data[::_PAGE].zero_()


def pin_memory(data: Tensor) -> None:
    """Lock the pages of host memory, so that a GPU's kernels can read it, until its storage is
    released; RuntimeError where that is refused."""
    cudart = torch.cuda.cudart()
    refused = cudart.cudaHostRegister(data.data_ptr(), data.nbytes, _MAPPED)
    if int(refused):
        with suppress(RuntimeError):  # the next launch would report this error as its own
            torch.ones(1, device="cuda")
    torch.cuda.check_error(refused)
    weakref.finalize(data.untyped_storage(), cudart.cudaHostUnregister, data.data_ptr())


def pin_fresh(data: Tensor, device: torch.device) -> None:
    """The same, on behalf of a device, with memory that nothing was written to yet."""
    fault_in(data)
    with torch.cuda.device(device):
        pin_memory(data)


class _DLManagedTensor(ctypes.Structure):
    """DLPack's description of a tensor (`DLManagedTensor`), its one dimension behind it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    )


def seen_from(data: Tensor, device: torch.device) -> Tensor:
    """The bytes of contiguous memory as a tensor of a device that reaches them: uint8 [bytes].

    A GPU reaches pinned memory under the address that it has in the process, over the bus: what is
    computed with the tensor runs on the GPU and reads and writes host memory in place.  The memory
    stays for as long as the tensor's storage does.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    place = libc.malloc(ctypes.sizeof(_DLManagedTensor))  # freed by whoever takes the tensor over
    described = _DLManagedTensor.from_address(place)
    described.data, described.byte_offset = data.data_ptr(), 0
    number = device.index
    if number is None:
        number = torch.cuda.current_device() if device.type == "cuda" else 0
    described.device_type, described.device_id = _DLPACK_DEVICES[device.type], number
    described.dtype_code, described.dtype_bits, described.dtype_lanes = 1, 8, 1
    described.ndim, described.size, described.strides = 1, data.nbytes, None
    described.shape = place + _DLManagedTensor.size.offset
    described.manager_ctx = None
    described.deleter = ctypes.cast(libc.free, ctypes.c_void_p).value
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    seen: Tensor = torch.utils.dlpack.from_dlpack(new(place, _DLPACK_NAME, None))
    weakref.finalize(seen.untyped_storage(), _let_go, data)
    return seen


def _let_go(_data: Tensor) -> None:
    """Holds on to memory for as long as this is to be called."""


class Staging(threading.local):
    """Pinned memory that each thread reads into, again and again, for copies to a GPU: fresh memory
    would cost page faults every time, and the driver's own copy into pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: Tensor | None = None  # each thread's own

    def __call__(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], for as long as nothing else is asked for; pinned if it can be."""
        if nbytes > _STAGED:
            return host_memory(nbytes, pin=False)
        stream = torch.cuda.current_stream(self._device)
        stream.synchronize()  # the copies of what was in it
        if self._held is None or len(self._held) < nbytes:
            self._held = None
            self._held = host_memory(nbytes, pin=False)
            with suppress(RuntimeError):
                pin_fresh(self._held, self._device)
            # A thread may end while what it read last still travels; called before unpinning.
            weakref.finalize(self._held.untyped_storage(), stream.synchronize)
        return self._held[:nbytes]


def _ask_for_large_pages(data: Tensor) -> None:
    """Before anything is written there; systems may decline.

    Reading all over it goes through few of the processor's page table entries then.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
    if advice is not None:
        address, size = ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.nbytes)
        ctypes.CDLL(None).madvise(address, size, advice)
