"""Experts that saw few tokens or none: solved like the others, and told of in the report."""

import json

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme

PARTS = ("gate_proj", "up_proj", "down_proj")


def _solved_like_rounding(project, micro, layer, expert):
    """Matrices of an expert that are what plain rounding makes of the source."""
    source, result = Checkpoint.open(micro), Checkpoint.open(project.output)
    names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" for part in PARTS]
    count = 0
    for name in names:
        weight = source.load(name, dtype=torch.float32)[None]
        rounded = QUANTIZERS["rtn"].quantize(
            weight, None, AffineScheme(4, 32, True), SolverOptions()
        )
        ours = result.load_quantized([name])
        error = (ours.dequantize(torch.float32) - weight).norm() / weight.norm()
        assert error < 0.2, name  # it is still the expert
        count += torch.equal(ours.arrays["codes"].long(), rounded.quantized.arrays["codes"].long())
    return count


def test_no_expert_is_rounded_however_short_the_text(project, micro, tmp_path, cli):
    text = tmp_path / "short.txt"
    text.write_text("of " * 60)
    project.change(
        calibration={"sources": [str(text)], "samples": 1, "sequence_length": 16},
        requantize={"error_correction": True},
    )
    answer = cli("run", project.write())
    assert answer.code == 0, answer.err
    assert "tokens that 16 experts saw in calibration" in answer.out
    figures = project.report()["experts"]
    assert figures["without_tokens"] > 0 and figures["tokens_min"] == 0
    assert figures["fallback"] == 0
    for layer in figures["coverage"]:
        assert sum(layer["tokens"]) == 16 * 2 and abs(sum(layer["share"]) - 1) < 1e-4
        for expert, (tokens, rank) in enumerate(
            zip(layer["tokens"], layer["effective_rank"], strict=True)
        ):
            assert rank == 0 if tokens == 0 else 0.99 <= rank <= tokens + 0.01
            if tokens == 0:
                assert _solved_like_rounding(project, micro, layer["layer"], expert) == 0


def test_router_weights_change_the_result_and_the_fingerprint(project, finished):
    project.change(requantize={"router_weighted": True})
    project.run(until="shard")
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    ours, plain = Checkpoint.open(project.output), Checkpoint.open(finished.output)
    assert not torch.equal(ours.load(name), plain.load(name))
    made = [json.loads((p.output / "conversion.json").read_text()) for p in (project, finished)]
    said = [one["fingerprint"]["recipe"]["requantize"]["router_weighted"] for one in made]
    assert said == [True, False]
