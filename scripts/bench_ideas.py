"""Ways to win back more of rounding's loss that were tried: what each gives, beside what is done.

    python scripts/bench_ideas.py [--group 128] [--samples 64] [IDEA ...]

Each idea converts the source of bench_quality.py (made there first) in memory and is measured on
every fourth window of the text from the calibration text's domain and every third of the other, in
float32 over the whole vocabulary: KL divergence, log perplexity, and both against what the pipeline
does today (paired bootstrap over windows).  One to three minutes an idea on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from ideas.conversion import Idea, Source, convert, source_states
from ideas.scales import fitted_in_loop
from ideas.tried import (
    Gradients,
    Options,
    Rounding,
    Router,
    TokenWeights,
    Uncorrected,
    constant,
)
from quality.workplace import RECIPE, STRIDE, TEXTS, WINDOW, device
from torch import Tensor

from pipeline.calibration import calibration_sequences, load_tokenizer, read_text, tokenize
from pipeline.evaluate.metrics import paired_bootstrap
from pipeline.evaluate.windows import sliding_windows
from pipeline.quantize import correction

EVERY = {"in": 4, "out": 3}
IDEAS: dict[str, Callable[[], Idea]] = {
    "uncorrected": Uncorrected,
    "correction-0.3": Idea,
    "scales-in-loop": Idea,
    "scales-jointly": Idea,
    "positive-scales": lambda: Options(negative_scales=False),
    "rounding-positive-scales": lambda: Options(method="rtn", negative_scales=False),
    "folds-down": lambda: Options(folds_down=True),
    "gradients": lambda: Gradients(0.5),
    "slopes": lambda: TokenWeights(0, 0),
    "router-weights-1": lambda: TokenWeights(1, 1),
    "router-weights-2": lambda: TokenWeights(2, 1),
    "router": Router,
}
AROUND: dict[str, Callable[[int], AbstractContextManager[object]]] = {
    "correction-0.3": lambda _: constant(correction, "DAMPING", 0.3),
    "scales-in-loop": lambda group: fitted_in_loop(group, jointly=False),
    "scales-jointly": lambda group: fitted_in_loop(group, jointly=True),
}


@dataclass(frozen=True)
class Scores:
    """Of every window: the text it is of, and sums over its tokens, float64 [windows]."""

    texts: list[str]
    source_nll: Tensor
    nll: Tensor
    kl: Tensor


def windows_of(model: Path) -> tuple[Tensor, list[str]]:
    """Tokens [n, length] of the windows of both texts, and whose each is."""
    taken, texts = [], []
    for name, step in EVERY.items():
        tokens = tokenize(load_tokenizer(model), read_text(TEXTS[name]))
        some = sliding_windows(tokens, WINDOW, STRIDE, None).token_ids[1::step]
        taken.append(some)
        texts += [name] * len(some)
    return torch.cat(taken), texts


@torch.inference_mode()
def score(source: Source, texts: list[str], ours: Tensor, theirs: Tensor) -> Scores:
    """Both models' last hidden states [windows, length, hidden] compared.

    In inference mode as a whole: the two generators leave their own in the order in which they
    entered it, and the second would leave it switched on.
    """
    stream = source.stream(torch.float32)
    rows = []
    pairs = zip(stream.logits(theirs), stream.logits(ours), strict=True)
    for (first, dense), (_, quantized) in pairs:
        for offset in range(len(dense)):
            p, q = (x[offset, :-1].log_softmax(-1) for x in (dense, quantized))
            label = source.windows[first + offset, 1:, None].to(p.device)
            kl = (p.exp() * (p - q)).sum()
            rows.append([-p.gather(1, label).sum(), -q.gather(1, label).sum(), kl])
    return Scores(texts, *torch.tensor(rows).double().unbind(1))


def say(name: str, group: int, found: Scores, rounding: Scores, usual: Scores) -> None:
    """One line of Markdown a text."""
    for text in EVERY:
        here = torch.tensor([t == text for t in found.texts])
        count = torch.full((int(here.sum()),), WINDOW - 1)
        kl, nll = found.kl[here], found.nll[here]
        share = float(kl.sum() / rounding.kl[here].sum())
        lost = float((nll - found.source_nll[here]).sum() / count.sum())
        gaps = [paired_bootstrap(a, b[here], count) for a, b in ((kl, usual.kl), (nll, usual.nll))]
        shown = [f"{g.estimate:+.5f} [{g.low:+.5f}, {g.high:+.5f}]" for g in gaps]
        print(
            f"| {group} | {name} | {text} | {float(kl.sum() / count.sum()):.5f} | {share:.3f}"
            f" | {lost:+.5f} | {shown[0]} | {shown[1]} |",
            flush=True,
        )


def main() -> None:
    """Parse arguments, convert, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ideas", nargs="*", metavar="IDEA", help=f"of {', '.join(IDEAS)}; or none")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--model", type=Path, default=Path("out/quality/source-bf16"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.ideas if name not in IDEAS]
    if unknown or not arguments.model.is_dir():
        parser.error(
            f"no idea is called {unknown[0]!r}; known: {', '.join(IDEAS)}"
            if unknown
            else f"{arguments.model} is missing: scripts/bench_quality.py makes it"
        )
    torch.set_num_threads(1)
    settings = yaml.safe_load(RECIPE.read_text())["calibration"]
    tokens = calibration_sequences(
        load_tokenizer(arguments.model),
        settings["sources"],
        samples=arguments.samples,
        length=settings["sequence_length"],
        seed=settings["seed"],
    )
    windows, texts = windows_of(arguments.model)
    source = Source.of(arguments.model, tokens, windows, device())
    states = source_states(source)

    def measured(idea: Idea) -> Scores:
        return score(source, texts, convert(source, idea, arguments.group), states)

    rounding, usual = measured(Rounding()), measured(Idea())
    print("| group | idea | text | KL | KL / rounding's | log perplexity lost | KL, less today's"
          " | log perplexity, less today's |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    say("rounding", arguments.group, rounding, rounding, usual)
    say("as it is", arguments.group, usual, rounding, usual)
    for name in arguments.ideas:
        begun = time.monotonic()
        with AROUND.get(name, nullcontext)(arguments.group):
            found = measured(IDEAS[name]())
        say(f"{name} ({time.monotonic() - begun:.0f} s)", arguments.group, found, rounding, usual)


if __name__ == "__main__":
    main()
