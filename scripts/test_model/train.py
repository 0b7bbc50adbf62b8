"""Trains the test model: a small Qwen3-Next with all its parts, in minutes on one GPU.

    python train.py --data .corpus --output OUT --minutes 5.5      # or --steps N, to repeat a run
    python train.py --data .corpus --output OUT --smoke            # a few tiny steps on CPU

The weights are bfloat16 while training, with float32 masters in the optimiser, so what is
validated is what is shipped. The number of steps follows from a measured probe, the schedule
(warm-up, cosine to zero) from the number of steps. There is no dropout, as in the models that
this one stands for: it would make the weights robust to noise, and quantisation look harmless. Few
passes and the best validation loss guard against learning the corpus by heart. Needs PyTorch and
transformers 5.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import smoke_config, tiny_config
from torch import nn
from torch.nn import functional
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from weights_file import write_pieces

PROBE_STEPS = 40


@dataclass(frozen=True)
class Settings:
    """What decides the result, beside the corpus and the number of steps."""

    seed: int = 20261125
    batch: int = 32
    length: int = 1024
    learning_rate: float = 2e-3
    warmup: int = 150
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    balance: float = 0.005
    evaluations: int = 14


class Balance:
    """Collects router logits and returns the load-balancing loss, layer by layer.

    The loss in transformers joins all layers first, which lets one layer starve an expert that
    another one feeds; here each layer is balanced on its own (Fedus et al. 2021, eq. 4).
    """

    def __init__(self, model: nn.Module) -> None:
        self.terms: list[torch.Tensor] = []
        for module in model.modules():
            if type(module).__name__ == "Qwen3NextTopKRouter":
                module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        if not module.training:
            return
        logits, _scores, chosen = output
        probabilities = logits.float().softmax(-1)
        count = probabilities.shape[-1]
        load = torch.zeros(count, device=logits.device)
        load.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=load.dtype))
        share = load / chosen.numel()
        self.terms.append(count * (share * probabilities.mean(0)).sum())

    def take(self) -> torch.Tensor:
        loss = torch.stack(self.terms).mean()
        self.terms.clear()
        return loss


class Masters:
    """AdamW over float32 copies of bfloat16 parameters; matrices decay, vectors do not."""

    def __init__(self, model: nn.Module, settings: Settings, fused: bool) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        decay = [m for m in self.masters if m.dim() > 1]
        rest = [m for m in self.masters if m.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": settings.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=fused,
        )

    def step(self, rate: float, clip: float) -> torch.Tensor:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(list[torch.Tensor](self.parameters), self.masters)
        return norm


def build_model(config: dict[str, Any], settings: Settings, device: str) -> Qwen3NextForCausalLM:
    """A fresh model in bfloat16."""
    torch.manual_seed(settings.seed)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**config))
    depth = 2 * model.config.num_hidden_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(depth**-0.5)  # so that the residual stream starts at unit scale
    model.set_experts_implementation("grouped_mm" if device == "cuda" else "eager")
    nn.Module.to(model, device=device, dtype=torch.bfloat16)
    return model


class Batches:
    """Windows of the corpus in a new order, and at a new offset, for every pass."""

    def __init__(self, tokens: torch.Tensor, settings: Settings) -> None:
        self.tokens, self.settings = tokens, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.starts: list[int] = []

    def next(self) -> torch.Tensor:
        batch, length = self.settings.batch, self.settings.length
        if len(self.starts) < batch:
            offset = int(torch.randint(length, (1,), generator=self.generator))
            count = (len(self.tokens) - offset - 1) // length
            order = torch.randperm(count, generator=self.generator)
            self.starts = (offset + order * length).tolist()
        chosen, self.starts = self.starts[:batch], self.starts[batch:]
        return torch.stack([self.tokens[at : at + length + 1] for at in chosen]).long()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor, length: int, batch: int) -> float:
    """Over non-overlapping windows; the first token of each window is given, not predicted."""
    model.eval()
    total, count = 0.0, 0
    windows = [tokens[at : at + length] for at in range(0, len(tokens) - 1, length)]
    full = [window for window in windows if len(window) == length]
    groups = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    if len(windows[-1]) < length:
        groups.append(windows[-1][None])
    for group in groups:
        ids = group.long()
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + ids[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def rate_at(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(settings.warmup, steps // 5 + 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Holds what one run needs; `step` is one update, `run` the whole schedule."""

    def __init__(self, config: dict[str, Any], data: Path, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, device
        self.model = build_model(config, settings, device)
        self.masters = Masters(self.model, settings, fused=device == "cuda")
        self.balance = Balance(self.model)
        self.train = self._load(data / "train.bin")
        self.valid = self._load(data / "valid.bin")
        self.batches = Batches(self.train, settings)
        self.log: list[dict[str, float]] = []

    def _load(self, path: Path) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(path, np.uint16).astype(np.int32)).to(self.device)

    def step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = self.batches.next()
        logits = self.model(ids[:, :-1], use_cache=False).logits.float()
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        balance = self.balance.take()
        (loss + self.settings.balance * balance).backward()
        return loss.detach(), balance.detach(), self.masters.step(rate, self.settings.clip)

    def probe(self, steps: int = PROBE_STEPS) -> float:
        """Seconds a step, measured on throw-away steps at rate zero (which change no weight)."""
        start = 0.0
        for i in range(steps):
            if i == steps // 2:
                self._wait()
                start = time.perf_counter()
            self.step(0.0)
        self._wait()
        return (time.perf_counter() - start) / (steps - steps // 2)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def run(self, steps: int) -> dict[str, torch.Tensor]:
        """Train for `steps` and return the weights that validated best."""
        settings = self.settings
        every = max(steps // settings.evaluations, 1)
        best, kept = math.inf, copy.deepcopy(self.model.state_dict())
        start, losses = time.perf_counter(), []
        for step in range(steps):
            losses.append(torch.stack(self.step(rate_at(step, steps, settings))))
            if (step + 1) % every and step + 1 != steps:
                continue
            valid = perplexity(self.model, self.valid, settings.length, settings.batch)
            loss, balance, norm = torch.stack(losses).mean(0).tolist()
            losses.clear()
            seconds = time.perf_counter() - start
            row = {"step": step + 1, "seconds": round(seconds, 1), "loss": round(loss, 4)}
            row |= {"balance": round(balance, 3), "norm": round(norm, 3)}
            self.log.append(row | {"valid_perplexity": round(valid, 3)})
            print(json.dumps(self.log[-1]), flush=True)
            if valid < best and step > steps // 2:
                best, kept = valid, copy.deepcopy(self.model.state_dict())
        return kept


def final_figures(trainer: Trainer, data: Path, texts: list[str]) -> dict[str, float]:
    """Perplexity on every text, in bfloat16 and in float32 arithmetic on the same weights."""
    settings, figures = trainer.settings, {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind in ("bf16", "fp32"):
        model = trainer.model if kind == "bf16" else trainer.model.float()
        for text in texts:
            tokens = trainer._load(data / text)
            value = perplexity(model, tokens, settings.length, settings.batch)
            figures[f"{text} {kind}"] = round(value, 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--steps", type=int, help="instead of --minutes: no probe")
    parser.add_argument("--passes", type=float, default=9.0, help="at most, over the corpus")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # the delta rule is float32; training may round
    settings = Settings(batch=4, length=128, evaluations=2) if args.smoke else Settings()
    config = smoke_config() if args.smoke else tiny_config()
    trainer = Trainer(config, args.data, settings, device)
    texts = ["valid.bin", "docs-eval.txt.bin", "ood-eval.txt.bin"]
    if args.smoke:
        args.steps = args.steps or 6
        trainer.valid = trainer.valid[:2048]
        texts = []
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    versions = {"torch": torch.__version__, "device": device}
    print(json.dumps({"parameters": count, **versions, "tokens": len(trainer.train)}), flush=True)
    steps = args.steps
    if not steps:
        seconds = trainer.probe()
        per_pass = len(trainer.train) / (settings.batch * settings.length)
        steps = int(min(args.minutes * 60 / seconds, args.passes * per_pass))
        print(json.dumps({"probe_seconds_a_step": seconds, "steps": steps}), flush=True)
        trainer = Trainer(config, args.data, settings, device)  # so that --steps repeats it
    weights = trainer.run(steps)
    args.output.mkdir(parents=True, exist_ok=True)
    sizes = write_pieces(weights, args.output)
    trainer.model.load_state_dict(weights)
    record = {"settings": asdict(settings), "steps": steps, "parameters": count, **versions}
    record |= {"log": trainer.log, "seconds": round(time.perf_counter() - begin, 1)}
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"pieces": sizes, "seconds": record["seconds"]}), flush=True)
    record["perplexity"] = final_figures(trainer, args.data, texts)
    print(json.dumps(record["perplexity"]), flush=True)
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
