"""What an expert that saw few tokens should be solved on, and whether gate values should count.

    python scripts/bench_coverage.py layers    # held-out error of single layers
    python scripts/bench_coverage.py texts     # the same, by the length of the whole text
    python scripts/bench_coverage.py short     # conversions with very short texts
    python scripts/bench_coverage.py router    # router-weighted against plain

`layers`: every expert of a layer keeps so many of its calibration tokens and no more (the source's
own activations), is solved by `solve_tile` with other weights of the substitute statistics, and the
error of its output is measured on held-out tokens, relative to plain rounding with the same scale
search: below 1 is better than rounding.  `short` and `router`: whole conversions, measured as in
bench_quality.py (same dense source, same evaluator, fewer windows).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from quality.workplace import RECIPE, TEXTS, Workplace, prepare
from torch import Tensor

from pipeline.calibration import calibration_sequences, load_tokenizer, read_text, tokenize
from pipeline.checkpoint.reader import Checkpoint
from pipeline.evaluate.metrics import Comparison, paired_bootstrap
from pipeline.evaluate.windows import sliding_windows
from pipeline.models.skeleton import architecture_of
from pipeline.quantize import hessian
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme
from pipeline.recipe import parse_recipe
from pipeline.run import run
from pipeline.stages import experts as stage
from pipeline.stages.routing import Routed, sort_by_expert
from pipeline.stages.stream import LayerStream, Recorded

LAYERS = (1, 4)
BUDGETS = (0, 4, 16, 64, 256, 1024, None)
STRENGTHS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0)
"""In tokens per input column."""
SAMPLES = (0, 64, 512, 2048)
"""Tokens sent through an expert's own gate and up; 0: as few as keep it solvable, one."""
LENGTHS = (32, 128, 1024, 3000, 8192, 32768)
PRIORS = (0.001, 1.0, 3.0, 10.0, 30.0)
"""In tokens per input column."""
SHORT = ((1, 32), (2, 64), (8, 128))
"""Sequences and their length."""


@contextmanager
def constants(module: ModuleType, **values: float) -> Iterator[None]:
    """A module with other constants."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class Bench:
    """One layer of the source: its experts, calibration tokens and held-out tokens."""

    def __init__(self, stream: LayerStream, layer: int, kept: Recorded, held: Recorded) -> None:
        geometry = stream.geometry
        assert kept.inputs is not None
        self.routed = sort_by_expert(kept, geometry.experts)
        self.held = sort_by_expert(held, geometry.experts)
        self.layer = layer
        self.job = stage.TileJob(
            checkpoint=stream.checkpoint,
            architecture=stream.architecture,
            layer=layer,
            experts=range(geometry.experts),
            device=stream.device,
            quantizer=QUANTIZERS["gptq"],
            scheme=AffineScheme(4, 128, True),
            options=SolverOptions(),
            inner=geometry.inner,
        )
        self.tile = stage.decode_tile(self.job)
        self.wanted = self._output(self.tile)
        rounded = replace(self.job, quantizer=QUANTIZERS["rtn"])
        self.rounding = self._error(stage.solve_tile(rounded, self.tile, *self._input(None, 512)))

    def _output(self, tile: stage.DenseTile) -> Tensor:
        total = torch.zeros_like(self.held.inputs, dtype=torch.float32)
        stage.tile_output(self.job, tile, self.held).add_to(total)
        return total

    def _error(self, solved: stage.SolvedTile) -> float:
        return float((self._output(solved.dense) - self.wanted).double().square().sum())

    def _input(
        self, budget: int | None, sample: int, length: int | None = None
    ) -> tuple[Routed, stage.LayerStatistics]:
        """The routed tokens of a text of `length` tokens cut to a budget an expert, and the layer's
        statistics."""
        text = self.routed.inputs[:length]
        chance = random.Random(0)
        taken: list[int] = []
        offsets = [0]
        for expert in range(self.job.experts.stop):
            every = range(self.routed.offsets[expert], self.routed.offsets[expert + 1])
            pairs = [pair for pair in every if int(self.routed.tokens[pair]) < len(text)]
            keep = len(pairs) if budget is None else min(budget, len(pairs))
            taken += sorted(chance.sample(pairs, keep))
            offsets.append(len(taken))
        chosen = torch.tensor(taken, dtype=torch.int64)
        routed = replace(
            self.routed,
            tokens=self.routed.tokens[chosen],
            weights=self.routed.weights[chosen],
            offsets=tuple(offsets),
        )
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(self.layer))
        x = text.float()
        common = hessian.rounded_out(x.T @ x / len(x), len(x))
        return routed, stage.LayerStatistics(common, text[order[: max(sample, 1)]], None)

    def relative(self, budget: int | None, sample: int, length: int | None = None) -> float:
        """Held-out error relative to rounding's."""
        solved = stage.solve_tile(self.job, self.tile, *self._input(budget, sample, length))
        return self._error(solved) / self.rounding


def benches(model: Path) -> list[Bench]:
    """The chosen layers, with tokens as the source's own layers before them make them."""
    recipe = yaml.safe_load(RECIPE.read_text())
    checkpoint = Checkpoint.open(model)
    stream = LayerStream(
        checkpoint, architecture_of(checkpoint.config, str(model)), torch.device("cpu")
    )
    tokenizer = load_tokenizer(model)
    texts = [
        calibration_sequences(
            tokenizer, recipe["calibration"]["sources"], samples=64, length=512, seed=0
        ),
        sliding_windows(tokenize(tokenizer, read_text(TEXTS["in"])), 512, 512, 48)
        .token_ids,
    ]  # fmt: skip
    hidden = [stream.embed(tokens) for tokens in texts]
    made = []
    for layer in range(max(LAYERS) + 1):
        module = stream.build_layer(layer, stream.load_dense(layer))
        recorded = [stream.record(module, part) for part in hidden]
        if layer in LAYERS:
            made.append(Bench(stream, layer, *recorded))
        for place, part in enumerate(recorded):
            routed = sort_by_expert(part, stream.geometry.experts)
            total = torch.zeros_like(routed.inputs, dtype=torch.float32)
            every = range(stream.geometry.experts)
            source = stage.TileSource(
                checkpoint, stream.architecture, layer, every, stream.device
            )  # fmt: skip
            stage.tile_output(source, stage.decode_tile(source), routed).add_to(total)
            hidden[place] = part.with_experts(total)
    return made


def layers(model: Path) -> None:
    """Error by tokens an expert kept, and by strength or sample."""
    made = benches(model)
    usual = stage.DOWN_SAMPLE_TOKENS
    for what, values in (("strength", STRENGTHS), ("sample", SAMPLES)):
        print(f"\n| tokens an expert | {' | '.join(f'{what} {v:g}' for v in values)} |")
        print("|---" * (len(values) + 1) + "|")
        for budget in BUDGETS:
            cells = []
            for value in values:
                strength, sample = (value, usual) if what == "strength" else (None, int(value))
                with constants(stage, STRENGTH=strength or stage.STRENGTH):
                    errors = [bench.relative(budget, sample) for bench in made]
                cells.append(f"{sum(errors) / len(errors):.3f}")
            print(f"| {'all' if budget is None else budget} | {' | '.join(cells)} |", flush=True)


def texts(model: Path) -> None:
    """Error by the length of the whole text, and by the weight of no knowledge."""
    made = benches(model)
    print(f"\n| tokens of the text | {' | '.join(f'prior {v:g}' for v in PRIORS)} |")
    print("|---" * (len(PRIORS) + 1) + "|")
    for length in LENGTHS:
        cells = []
        for prior in PRIORS:
            with constants(hessian, PRIOR=prior):
                errors = [b.relative(None, stage.DOWN_SAMPLE_TOKENS, length) for b in made]
            cells.append(f"{sum(errors) / len(errors):.3f}")
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


def convert(folder: Path, place: Workplace, sections: Mapping[str, Any]) -> Path:
    """A conversion of the demo's recipe with other keys."""
    data = copy.deepcopy(dict(place.recipe)) | {"output": {"path": str(folder)}}
    for name, keys in sections.items():
        data[name] |= keys
    run(parse_recipe(data, "bench"), yaml.safe_dump(data), until="shard", quiet=True)
    return folder


def compare(place: Workplace, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """KL divergence of every row, and what it wins back of the first one's, both texts."""
    print("\n| conversion | text | experts without tokens | ppl ratio | KL | KL won back [95 %] |")
    print("|---|---|---|---|---|---|")
    first: dict[str, Comparison] = {}
    for number, (name, sections) in enumerate(rows.items()):
        output = convert(place.folder / f"coverage-{number}", place, sections)
        made = json.loads((output / "conversion.json").read_text())
        unseen = sum(count == 0 for layer in made["layers"] for count in layer.get("tokens", []))
        for text, result in place.evaluate(output).items():
            a, b = first.setdefault(text, result).windows, result.windows
            gain = paired_bootstrap(a.kl, b.kl, a.count)
            print(
                f"| {name} | {text} | {unseen} | {result.perplexity_ratio:.4f}"
                f" | {result.kl_divergence:.5f} | {gain.estimate:+.5f}"
                f" [{gain.low:+.5f}, {gain.high:+.5f}] |",
                flush=True,
            )


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=("layers", "texts", "short", "router"))
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows of a text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {arguments.part}")
    if arguments.part in ("layers", "texts"):
        measure = layers if arguments.part == "layers" else texts
        measure(Path(yaml.safe_load(RECIPE.read_text())["source"]["model"]))
        return
    if arguments.part == "short":
        rows: dict[str, dict[str, Any]] = {"rounding": {"requantize": {"method": "rtn"}}}
        for samples, length in SHORT:
            few = {"calibration": {"samples": samples, "sequence_length": length}}
            rows[f"gptq on {samples} x {length} tokens"] = few
    else:
        weighted = {"requantize": {"router_weighted": True}}
        rows = {"gptq": {}, "gptq, router-weighted": weighted}
    with tempfile.TemporaryDirectory() as scratch:
        compare(prepare(Path(scratch), None, arguments.windows), rows)


if __name__ == "__main__":
    main()
