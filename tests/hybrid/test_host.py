"""Memory for experts, and threads that make it ahead; the GPU that it is for is not needed."""

import gc
import threading
import weakref

import pytest
import torch

from pipeline.hybrid.host import fault_in, host_memory
from pipeline.hybrid.routed import made_ahead


@pytest.mark.parametrize("nbytes", [1, 5000, (5 << 20) + 3])
def test_memory_begins_at_a_page(nbytes):
    data = host_memory(nbytes, pin=False)
    fault_in(data)
    assert data.data_ptr() % 4096 == 0 and data.shape == (nbytes,)
    written = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    assert data.copy_(written).equal(written)


def test_what_is_made_ahead(one_thread):
    """In order; an error is raised where its own result is asked for; nothing else is kept."""
    begun = []

    def make(number):
        begun.append(number)
        if number == 1:
            raise MemoryError("no room for 1")
        return torch.full((4,), number)

    with made_ahead({n: lambda n=n: make(n) for n in range(4)}) as made:
        assert made.pop(0).result().tolist() == [0] * 4
        with pytest.raises(MemoryError, match="no room for 1"):
            made.pop(1).result()
        left = weakref.ref(made[3].result())
    gc.collect()
    assert made == {} and left() is None and sorted(begun) == [0, 1, 2, 3]


def test_what_is_not_begun_is_not_made():
    """Whoever fails while memory is made waits for what is begun alone."""
    began, end = threading.Semaphore(0), threading.Event()
    begun = []

    def make(number):
        begun.append(number)
        began.release()
        assert end.wait(60)

    def fail():
        with made_ahead({n: lambda n=n: make(n) for n in range(9)}) as made:
            began.acquire()
            began.acquire()
            made[8].add_done_callback(lambda _: end.set())  # all before it are cancelled then
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sorted(begun) == [0, 1]
