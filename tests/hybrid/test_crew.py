"""The threads that a device calls, with this process in the device's place: against one call."""

import ctypes
import gc
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_native import FOUND, _calls, _experts

from pipeline.hybrid.native.crew import Crew

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernel: {FOUND}"),
]

CPU = torch.device("cpu")


class Caller:
    """Writes and reads a crew's words as a device would."""

    def __init__(self, crew, module, tokens, each):
        hidden = module.records.layout.down.rows
        self.crew, self.number = crew, 0
        self.x = torch.zeros((tokens, hidden), dtype=torch.bfloat16)
        self.index = torch.zeros((tokens, each), dtype=torch.int64)
        self.weights = torch.zeros((tokens, each))
        self.out = torch.zeros((tokens, hidden))
        self.desk = crew.desk(
            module.records.layout,
            module.records.addresses(),
            self.x,
            self.index,
            self.weights,
            self.out,
        )

    def call(self, x, index, weights):
        self.ask(x, index, weights)
        return self.answer()

    def ask(self, x, index, weights):
        self.x.copy_(x)
        self.index.copy_(index)
        self.weights.copy_(weights)
        self.out.fill_(float("nan"))
        self.crew.counter += 1
        word = self.desk << 32 | int(self.crew.counter)
        ctypes.c_uint64.from_address(self.crew.request).value = word

    def answer(self):
        answer = ctypes.c_uint64.from_address(self.crew.answer)
        end = time.monotonic() + 60
        while answer.value != int(self.crew.counter):
            assert time.monotonic() < end, "no answer"
            time.sleep(0)
        return self.out.clone()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_calls_are_one_calls(threads):
    """Two layers of unlike sizes in turn, whatever number of threads computes: the same bits."""
    crew = Crew(FOUND, CPU, threads)
    tokens = random.randint(1, 5)
    made = [
        _experts(4, 128, 256, 128, symmetric=True)[0],
        _experts(4, 32, 96, 64, symmetric=False)[0],
    ]
    callers = [Caller(crew, module, tokens, 4) for module in made]
    for _ in range(40):
        crew.begin(len(callers))
        for module, caller in zip(made, callers, strict=True):
            calls = _calls(tokens, module.records.layout.down.rows)
            want = module(calls[0], calls[1], calls[2]).float()
            assert torch.equal(caller.call(*calls).bfloat16().float(), want)
    assert crew.served == 80
    crew.check()


def test_sleeps_and_wakes():
    """Without a step its threads take no processor time; the next step finds them all the same."""
    crew = Crew(FOUND, CPU, 3)
    module, *_ = _experts(4, 128, 256, 128, symmetric=True)
    caller = Caller(crew, module, 2, 4)
    calls = _calls(2, 256)
    for _ in range(3):
        with suppress(KeyboardInterrupt), crew.awake():  # and however that step ends
            caller.call(*calls)
            raise KeyboardInterrupt
        deadline = time.monotonic() + 60
        while True:  # however slow the machine is, they sleep in the end
            before = time.process_time()
            time.sleep(0.2)
            if time.process_time() - before < 0.1:
                break
            assert time.monotonic() < deadline, "threads never sleep"


def test_a_call_that_was_not_begun():
    """It is served with the next step's, of which it takes none away."""
    crew = Crew(FOUND, CPU, 2)
    module, *_ = _experts(4, 128, 256, 128, symmetric=True)
    caller = Caller(crew, module, 1, 4)
    for begun in (0, 1, 0, 1):
        calls = _calls(1, 256)
        if begun:
            crew.begin(1)
        caller.ask(*calls)
        if not begun:
            crew.begin(0)
        assert torch.equal(caller.answer().bfloat16(), module(*calls))
    assert crew.served == 4


def test_an_index_that_is_none_is_told():
    crew = Crew(FOUND, CPU, 2)
    module, *_ = _experts(4, 128, 256, 128, symmetric=True)
    caller = Caller(crew, module, 1, 4)
    x, index, weights = _calls(1, 256)
    index[0, 0] = module.num_experts + 1
    with crew.awake():
        assert torch.equal(caller.call(x, index, weights), torch.zeros(1, 256))
    with pytest.raises(IndexError, match="an expert that there is not"):
        crew.check()
    crew.check()


def test_a_crew_ends_with_its_last_reference():
    """Named by its threads, which are there for a moment longer than who waits for them."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("threads are listed in /proc")
    before = {task.name for task in tasks.iterdir()}
    crew = Crew(FOUND, CPU, 3)
    mine = {task.name for task in tasks.iterdir()} - before
    assert len(mine) >= 3
    del crew
    gc.collect()
    deadline = time.monotonic() + 60
    while mine & {task.name for task in tasks.iterdir()}:
        assert time.monotonic() < deadline, "threads are left"
        time.sleep(0.01)


def test_two_crews_at_once():
    """Each from a thread of its own, as two models would."""
    wrong = []

    def work(seed):
        torch.manual_seed(seed)
        crew = Crew(FOUND, CPU, 2)
        module, *_ = _experts(4, 128, 256, 128, symmetric=True)
        caller = Caller(crew, module, 1, 4)
        for _ in range(20):
            calls = _calls(1, 256)
            crew.begin(1)
            got = caller.call(*calls).bfloat16()
            if not torch.equal(got, module(*calls)):
                wrong.append(seed)

    both = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong
