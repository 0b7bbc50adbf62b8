"""What is done ahead for a GPU; here on the CPU, where a run does without."""

import json
import weakref
from threading import Event

import pytest
import torch

from pipeline.models import ARCHITECTURES
from pipeline.stages import warm_up
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
