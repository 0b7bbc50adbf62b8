"""Whether the hybrid runtime computes the layers of Qwen3-Next's true geometry that float32 does.

    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.same_layers zero-copy cpu both:5
    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.same_layers cpu --device cpu --no-native

Four layers with random weights (`hybrid_model.py`) read a prompt and decode given tokens.  The
measure is transformers' own dense model in float32 on the CPU, its hidden states rounded to
bfloat16 where a bfloat16 model stores them; what an all-CPU bfloat16 model is off by stands in
brackets, and a placement (as of `bench_hybrid.py`) may be twice as far.

A token's chosen experts are a sharp decision: one choice that flips at a near-tie moves everything
behind it, which no exactness prevents.  So layers are compared from the same input, experts from
the same input and choices, and logits once with float32's choices and once with own ones; the last
is printed and not judged.  Distances are of all tokens together, relative to float32's.  Ends with
1 if a placement is not the same model.
"""

# transformers' modules and what hooks pass are known by what they have, not by types.
# ruff: noqa: ANN401

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from bench_hybrid import Placement, place, placement
from hybrid_model import build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hybrid_peers.four_layers import GEOMETRY, LAYERS, VOCABULARY, dense
from hybrid_peers.timing import prompt
from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.runtime import prompts
from pipeline.hybrid.steps import Frame

STEPS = 8
ALLOWED, ROUNDED = 2.0, 0.01
"""Times the CPU's distance; and what never is a fault: two roundings to bfloat16 and a half, as of
inputs, of gated products and of sums, come to 0.005 (torch's int4 product on the CPU), while the
compiled kernel only rounds its result, 0.0017."""
FLIPS = 0.01
"""Choices that may flip beside those allowed: few of few tokens are a matter of luck."""
CPU = torch.device("cpu")


@dataclass
class Layer:
    """What passed through one layer; on the CPU, tokens first."""

    entered: Tensor | None = None
    """[T, hidden]"""
    x: Tensor | None = None
    """[T, hidden], what router and experts read."""
    index: Tensor | None = None
    """int64 [T, k], the router's own choice."""
    weights: Tensor | None = None
    routed: Tensor | None = None
    """[T, hidden], the routed experts' sum."""
    left: Tensor | None = None


@dataclass
class Seen:
    """One call of the model: of a prompt or of a token."""

    layers: list[Layer] = field(default_factory=lambda: [Layer() for _ in range(LAYERS)])
    logits: Tensor | None = None
    """[1, vocabulary], behind the last token."""


@dataclass(frozen=True)
class Mode:
    """What a model takes from float32's calls instead of its own."""

    inputs: bool
    """The layers' inputs and the experts'."""
    choices: bool


SAME, ROUTED, FREE = Mode(True, True), Mode(False, True), Mode(False, False)


def recorded(model: Any, ids: Tensor, tokens: Tensor) -> list[Seen]:
    """float32's calls: of the prompt int64 [1, n], then of each of `tokens` [m]."""
    cache, calls = DynamicCache(config=model.config), []
    for piece in (ids, *tokens.view(-1, 1, 1)):
        seen = Seen()
        with watched(model, seen, None, FREE):
            out: Any = model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
        seen.logits = out.logits[:, -1].clone()
        calls.append(seen)
    return calls


def repeated(
    model: PreTrainedModel, ids: Tensor, tokens: Tensor, calls: list[Seen], mode: Mode
) -> list[Seen]:
    """The same calls by a model as it is decoded with; `calls`: float32's."""
    decoder = Decoder(model, 1, ids.shape[1] + len(tokens) + 8)
    first = Seen()
    with watched(model, first, calls[0], mode):
        first.logits = decoder.prefill(ids.to(model.device)).float().cpu()
    with torch.inference_mode(False), torch.no_grad():  # as `step` would
        decoder._build()
        tapes = [Tape(decoder, number, mode) for number in range(LAYERS)]
    decoder._halves = [half for tape in tapes for half in tape.halves]
    result = [first]
    for token, call in zip(tokens.tolist(), calls[1:], strict=True):
        for tape, layer in zip(tapes, call.layers, strict=True):
            tape.load(layer)
        decoder.tokens.fill_(token)
        logits = decoder.step().float().cpu()
        result.append(Seen([tape.read() for tape in tapes], logits))
    return result


@contextmanager
def watched(model: Any, seen: Seen, given: Seen | None, mode: Mode) -> Iterator[None]:
    """Record a call of the model, by hooks; `given`: where `mode` takes from, None: float32 itself,
    which rounds where a bfloat16 model would."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        own = seen.layers[number]
        other = None if given is None else given.layers[number]
        enter = partial(_enter, own, other, mode)
        handles += [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.mlp.register_forward_pre_hook(partial(_rounded, other)),
            layer.mlp.experts.register_forward_pre_hook(partial(_route, own, other, mode)),
            layer.mlp.experts.register_forward_hook(partial(_keep, own, "routed")),
            layer.register_forward_hook(partial(_keep, own, "left")),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(own: Layer, other: Layer | None, mode: Mode, _: object, args: Any, kwargs: Any) -> Any:
    hidden, *rest = args
    if other is None:
        hidden = _round(hidden)
        own.entered = hidden.flatten(0, 1).clone()
    elif mode.inputs:
        assert other.entered is not None
        hidden = other.entered.to(hidden).view_as(hidden)
    return (hidden, *rest), kwargs


def _rounded(other: Layer | None, _: object, args: tuple[Tensor]) -> tuple[Tensor] | None:
    return (_round(args[0]),) if other is None else None


def _route(own: Layer, other: Layer | None, mode: Mode, _: object, args: Any) -> Any:
    x, index, weights = args
    own.index = index.cpu().clone()
    if other is None:
        own.x, own.weights = x.clone(), _round(weights).clone()
        return x, index, own.weights
    if mode.choices:
        assert other.index is not None and other.weights is not None
        index, weights = other.index.to(index), other.weights.to(weights)
    if mode.inputs:
        assert other.x is not None
        x = other.x.to(x)
    return x, index, weights


def _keep(own: Layer, name: str, _: object, args: object, output: Any) -> None:
    output = output[0] if isinstance(output, tuple) else output
    setattr(own, name, output.detach().float().cpu().view(-1, output.shape[-1]).clone())


def _round(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


class Tape:
    """A layer's two halves of a decode step, with buffers that a captured graph writes and reads:
    no Python runs between its kernels."""

    def __init__(self, decoder: Decoder, number: int, mode: Mode) -> None:
        self._mixer, self._block = decoder._halves[2 * number : 2 * number + 2]
        hidden = decoder._hidden
        top_k = decoder.model.config.num_experts_per_tok
        self._mode = mode
        new = partial(torch.zeros, device=hidden.device)
        self._given = {
            "entered": new(hidden.shape, dtype=hidden.dtype),
            "x": new(hidden.shape, dtype=hidden.dtype),
            "index": new((len(hidden), top_k), dtype=torch.int64),
            "weights": new((len(hidden), top_k), dtype=hidden.dtype),
        }
        self._own = {
            "index": new((len(hidden), top_k), dtype=torch.int64),
            "routed": new(hidden.shape),
            "left": new(hidden.shape),
        }
        self._routed = self._block._routed
        self._block._routed = self._route

    @property
    def halves(self) -> list[Callable[[Frame], Any]]:
        """See `Half`."""
        return [self._begin, self._end]

    @torch.inference_mode(False)
    def load(self, call: Layer) -> None:
        """What the next step is given."""
        for name, buffer in self._given.items():
            buffer.copy_(getattr(call, name))

    def read(self) -> Layer:
        """What the last step left."""
        return Layer(**{name: buffer.cpu().clone() for name, buffer in self._own.items()})

    def _begin(self, frame: Frame) -> Any:
        if self._mode.inputs:
            frame.hidden.copy_(self._given["entered"])
        yield from self._mixer(frame)

    def _end(self, frame: Frame) -> Any:
        yield from self._block(frame)
        self._own["left"].copy_(frame.hidden)

    def _route(self, x: Tensor, index: Tensor, weights: Tensor) -> Any:
        self._own["index"].copy_(index)
        if self._mode.choices:
            index.copy_(self._given["index"])
            weights.copy_(self._given["weights"])
        routed = yield from self._routed(
            self._given["x"] if self._mode.inputs else x, index, weights
        )
        self._own["routed"].copy_(routed)
        return routed


@dataclass
class Figures:
    """Of one model against float32, for the prompt or for all steps together."""

    left: list[float]
    """Per layer, its output from the same input with the same choices."""
    experts: list[float]
    flips: list[float]
    """Part of the router's choices from the same input that are not float32's."""
    routed: float = 0.0
    """Logits with float32's choices."""
    free: float = 0.0


def figures(sides: dict[Mode, list[Seen]], calls: list[Seen], part: slice) -> Figures:
    """`part`: of the calls."""
    pairs = list(zip(sides[SAME][part], calls[part], strict=True))
    found = Figures([], [], [])
    for number in range(LAYERS):
        layers = [(got.layers[number], want.layers[number]) for got, want in pairs]
        found.left.append(_apart([(a.left, b.left) for a, b in layers]))
        found.experts.append(_apart([(a.routed, b.routed) for a, b in layers]))
        found.flips.append(_flips([(a.index, b.index) for a, b in layers]))
    found.routed, found.free = (
        _apart([(a.logits, b.logits) for a, b in zip(sides[mode][part], calls[part], strict=True)])
        for mode in (ROUTED, FREE)
    )
    return found


def _apart(pairs: list[tuple[Tensor | None, Tensor | None]]) -> float:
    got, want = (torch.cat([t for t in side if t is not None]) for side in zip(*pairs, strict=True))
    return float((got - want).norm() / want.norm())


def _flips(pairs: list[tuple[Tensor | None, Tensor | None]]) -> float:
    got, want = (torch.cat([t for t in side if t is not None]) for side in zip(*pairs, strict=True))
    alike = (got.unsqueeze(-1) == want.unsqueeze(-2)).any(-1)
    return 1 - float(alike.float().mean())


def faults(got: Figures, cpu: Figures) -> list[str]:
    """What is further from float32 than a bfloat16 model has reason to be."""
    rows = [("logits with the same choices", got.routed, cpu.routed)]
    flips = []
    for number in range(LAYERS):
        rows.append((f"layer {number}'s output", got.left[number], cpu.left[number]))
        rows.append((f"layer {number}'s experts", got.experts[number], cpu.experts[number]))
        flips.append((f"of layer {number}'s choices", got.flips[number], cpu.flips[number]))
    # not so, so that NaN is a fault
    found = [
        f"{what}: {own:.4f} from float32's, the CPU's {theirs:.4f}"
        for what, own, theirs in rows
        if not own <= max(ALLOWED * theirs, ROUNDED)
    ]
    found += [
        f"{own:.2%} {what} are others than float32's, of the CPU's {theirs:.2%}"
        for what, own, theirs in flips
        if not own <= ALLOWED * theirs + FLIPS
    ]
    return found


def show(what: str, got: Figures, cpu: Figures) -> None:
    """One line a layer."""
    print(f"{what}: distance from float32 (all-CPU bfloat16's)")
    for number in range(LAYERS):
        print(
            f"  layer {number}: output {got.left[number]:.4f} ({cpu.left[number]:.4f}), experts "
            f"{got.experts[number]:.4f} ({cpu.experts[number]:.4f}), choices alike "
            f"{1 - got.flips[number]:.2%} ({1 - cpu.flips[number]:.2%})"
        )
    print(
        f"  logits, float32's choices {got.routed:.4f} ({cpu.routed:.4f}), own choices "
        f"{got.free:.4f} ({cpu.free:.4f})",
        flush=True,
    )


def measured(
    wanted: Placement,
    device: torch.device,
    args: argparse.Namespace,
    calls: list[Seen],
    *,
    native: bool,
) -> list[Figures]:
    """Build a model and compare: the prompt's figures and the steps'."""
    with torch.inference_mode(False), torch.no_grad():  # buffers are written under any mode
        model = build(
            LAYERS, args.experts, device, wanted.shares, vocabulary=VOCABULARY, native=native
        )
        residency = place(model, wanted)
    if device.type == "cuda" and "cpu" in wanted.shares:
        print(f"{wanted.name}: its experts are computed for prompts by {prompts(model)}")
    ids, tokens = _tokens(args)
    sides = {mode: repeated(model, ids, tokens, calls, mode) for mode in (SAME, ROUTED, FREE)}
    del model, residency
    gc.collect()
    return [figures(sides, calls, part) for part in (slice(0, 1), slice(1, None))]


def _tokens(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The prompt [1, n] and what is decoded behind it."""
    ids = prompt(VOCABULARY)
    return ids[:, : args.prompt], ids[0, -STEPS:]


def run(args: argparse.Namespace) -> int:
    """Number of placements that are another model."""
    started = time.perf_counter()
    reference = dense(args.experts, 1, torch.float32)
    calls = recorded(reference, *_tokens(args))
    del reference
    gc.collect()
    cpu = measured(placement("cpu"), CPU, args, calls, native=True)
    device = torch.device(args.device)
    parts = f"prompt of {args.prompt}", f"{STEPS} steps"
    others = 0
    for wanted in args.placements:
        name = f"{wanted.name} on {device}"
        got = measured(wanted, device, args, calls, native=not args.no_native)
        wrong = []
        for what, own, theirs in zip(parts, got, cpu, strict=True):
            show(f"{name}, {what}", own, theirs)
            wrong += [f"  {what}: {fault}" for fault in faults(own, theirs)]
        verdict = "NOT THE SAME MODEL" if wrong else "the same model, but for bfloat16's rounding"
        print(f"{name}: {verdict}", *wrong, sep="\n", flush=True)
        others += bool(wrong)
    print(f"{time.perf_counter() - started:.0f} s")
    return others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("placements", nargs="+", type=placement)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=64, help=f"of {GEOMETRY.experts}")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-native", action="store_true", help="the CPU's experts by torch")
    args = parser.parse_args()
    if args.device == "cpu" and any(set(wanted.shares) != {"cpu"} for wanted in args.placements):
        parser.error("these placements take a GPU; cpu runs without")
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        others = run(args)
    raise SystemExit(bool(others))


if __name__ == "__main__":
    main()
