"""What is done ahead for a GPU; here on the CPU, where a run does without."""

import gc
import json
import weakref
from threading import Event

import pytest
import torch

from pipeline import run as run_module
from pipeline.models import ARCHITECTURES
from pipeline.stages import warm_up
from pipeline.stages.order import StageEntry
from pipeline.stages.stream import LayerStream
from pipeline.stages.warm_up import Problem, WarmUp

QWEN = ARCHITECTURES["qwen3_next"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_the_solver_goes_through_a_recipes_widths(project, micro, one_thread, method):
    weighted = {"method": method, "router_weighted": method == "gptq"}
    recipe = project.change(requantize=weighted).recipe
    geometry = QWEN.geometry(json.loads((micro / "config.json").read_text()))
    before = torch.get_rng_state()
    problem = Problem(recipe, QWEN, geometry, CPU)
    with torch.inference_mode():
        problem.solve(2 * geometry.inner, geometry.hidden, last=False)
        problem.solve(geometry.hidden, geometry.inner, last=True)
        problem.outputs()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_warm_up_that_fails_is_told_once_and_fails_no_run(project, monkeypatch, one_thread):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    held: list[weakref.ref[torch.Tensor]] = []

    def broken(_device):
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise RuntimeError("no driver\nlong story")

    monkeypatch.setattr(warm_up, "solver_backend", broken)
    said: list[str] = []
    with WarmUp(project.recipe, said.append, wanted=True) as warm:
        warm.wait()
        warm.wait()
        assert [ref() for ref in held] == [None]  # the error is not kept, nor what it holds
    assert said == ["kernels could not be compiled ahead (no driver); going on without"]


def test_what_fails_later_is_not_kept_either(project, monkeypatch, one_thread):
    """Nor is it left to a search for garbage, which does not find what was set aside meanwhile."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(warm_up, "solver_backend", lambda _device: "torch")
    held: list[weakref.ref[torch.Tensor]] = []

    def broken(*_arguments, **_named):
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Problem, "solve", broken)
    monkeypatch.setattr(Problem, "outputs", broken)
    said: list[str] = []
    gc.disable()
    try:
        with WarmUp(project.recipe, said.append, wanted=True) as warm:
            warm.wait()
            assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
    assert said == ["kernels could not be compiled ahead (no room); going on without"]


def test_validation_does_not_go_on_beside_it(project, cpu_only, one_thread, monkeypatch):
    """Where all layers were done before, nothing has waited for the threads yet."""
    done: list[str] = []
    context = project.run(until="dequantize")
    context.warmed = lambda: done.append("warmed")

    class Stage:
        def __init__(self, _context):
            done.append("made")

        def close(self):
            pass

    monkeypatch.setitem(run_module.STAGES, "validate", StageEntry(lambda _context: [], Stage))
    run_module._execute_rest(context, "validate", quiet=True)
    assert done == ["warmed", "made"]


def test_layers_go_through_a_forward_pass(project, cpu_only, one_thread, monkeypatch):
    """The context of a run; the layers' kinds are the micro model's two."""
    seen: list[int] = []
    build = LayerStream.build_layer

    def noted(self, layer, tensors):
        seen.append(layer)
        return build(self, layer, tensors)

    context = project.run(until="dequantize")
    monkeypatch.setattr(LayerStream, "build_layer", noted)
    warm_up._forward(context, [0, 1], Event())
    assert seen == [0, 1]
