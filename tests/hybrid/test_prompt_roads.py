"""The ring that prompts' experts pass through: every record comes, whole, in its place."""

import random

import pytest
import torch
from test_backends import random_quantized

from pipeline.hybrid import stream as module
from pipeline.hybrid.host import host_memory
from pipeline.hybrid.records import pack
from pipeline.hybrid.stream import BOTH, NEAR, Stream, ring

CPU = torch.device("cpu")


def _records(count):
    scheme = {"bits": 4, "symmetric": True}
    wide = random_quantized(count, 32, 32, group=32, **scheme)
    return pack(wide, random_quantized(count, 32, 16, group=16, **scheme))


def _layers():
    """Three layers: of both roads, of the CPU alone, of zero-copy alone."""
    first = {"cpu": _records(7), "zero-copy": _records(5)}
    return [first, {"cpu": _records(9)}, {"zero-copy": _records(6)}]


def _come(stream, layers, number, roads):
    """The layer's records as its parts brought them."""
    size = layers[0]["cpu"].layout.nbytes
    wanted = [layers[number][road].data for road in roads if road in layers[number]]
    want = torch.cat([*wanted, torch.empty((0, size), dtype=torch.uint8)])
    got = torch.zeros_like(want)
    first = stream._buffers
    for part in stream.parts(number, roads):
        place = part.address - stream._buffers.data_ptr()
        held = stream._buffers.view(-1)[place : place + part.count * size]
        got[part.first : part.first + part.count] = held.view(part.count, size)
    assert first is None or stream._buffers is first, "the ring is made once"
    assert torch.equal(got, want), (number, roads)


@pytest.mark.parametrize("most", [2, 3, 8])
def test_everything_comes_in_any_order(most, monkeypatch):
    """Prompt after prompt, layers left out, and one road or both in turn; nothing is pinned here,
    so that all of it goes through the thread's buffers."""
    layers = _layers()
    monkeypatch.setattr(module, "PART_BYTES", 3 * layers[0]["cpu"].layout.nbytes)
    stream = Stream(layers, CPU, most)
    assert stream.staged
    for _ in range(3):
        for number in range(3):
            _come(stream, layers, number, BOTH)
    assert stream._issued == 0, "after the last layer all of it has come and nothing more is coming"
    for _ in range(40):
        _come(stream, layers, random.randrange(3), random.choice([NEAR, BOTH]))
    assert stream.nbytes == stream._buffers.nbytes <= most * 3 * layers[0]["cpu"].layout.nbytes
    assert stream.bytes_of(0) == 12 * layers[0]["cpu"].layout.nbytes


def test_a_prompt_that_breaks_off(monkeypatch):
    """What was on its way then is not taken for what comes next."""
    layers = _layers()
    monkeypatch.setattr(module, "PART_BYTES", layers[0]["cpu"].layout.nbytes)
    stream = Stream(layers, CPU)
    for stop in (0, 1, 5):
        for _, _part in zip(range(stop), stream.parts(0, NEAR), strict=False):
            pass
        for roads in (BOTH, NEAR):
            next(stream.parts(0, roads))
            _come(stream, layers, 0, roads)


def test_a_thread_that_fails_is_heard(monkeypatch):
    layers = _layers()
    stream = Stream(layers, CPU)

    def no(*_):
        raise MemoryError("as it happens")

    monkeypatch.setattr(stream, "_send", no)
    with pytest.raises(MemoryError, match="as it happens"):
        list(stream.parts(0, BOTH))


def test_host_memory_is_asked_about_where_it_begins():
    """`is_pinned` asks for a storage's first byte, so that it must be locked with the rest."""
    for nbytes in (1, 5000, 1 << 20):
        data = host_memory(nbytes, pin=False)
        storage = data.untyped_storage()
        assert data.data_ptr() == storage.data_ptr() and data.data_ptr() % 4096 == 0
        assert len(data) == storage.nbytes() == nbytes


def test_buffers():
    assert ring([512], 1 << 20) == (6, 100)
    assert ring([512] * 48, 1_622_016) == (8, 64)
    assert ring([512] * 48, 1_622_016, 2) == (2, 64)
    assert ring([3, 1], 1 << 30) == (4, 1)
