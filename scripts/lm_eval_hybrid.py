"""lm-eval's HFLM over a hybrid model: its requests answered, or tasks evaluated.

    scripts/lm_eval_env.sh
    .env-lm-eval/bin/python scripts/lm_eval_hybrid.py out/demo [--tasks hellaswag --limit 50]

Without --tasks nothing is downloaded: the three kinds of request that tasks are made of are put on
a few lines of the evaluation text, batched, and compared with what the model itself says of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate  # type: ignore[import-not-found]
from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
from transformers import AutoTokenizer, PreTrainedModel

from pipeline import hybrid

TEXT = Path(__file__).parents[1] / "calibration" / "docs-eval.txt"


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """As a task would make them."""
    return [Instance(kind, {}, some, number) for number, some in enumerate(arguments)]


def own_likelihood(model: PreTrainedModel, tokenizer: Any, text: str, end: str) -> float:  # noqa: ANN401
    """Log-probability of `end` behind `text`, one sequence at a time."""
    begin = tokenizer(text).input_ids
    ids = torch.tensor([tokenizer(text + end).input_ids])  # as lm-eval splits them
    with torch.inference_mode():
        logits = model(ids.to(model.device)).logits[0, len(begin) - 1 : -1].float().cpu()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(begin) :, None]).sum())


def check(lm: Any, model: PreTrainedModel, tokenizer: Any) -> None:  # noqa: ANN401
    """Three kinds of request, batched; SystemExit where they disagree with the model."""
    lines = [line for line in TEXT.read_text().splitlines() if 60 < len(line) < 120][:200]
    pairs = [(line[:40], line[40:]) for line in lines if line[40] == " "]
    found = lm.loglikelihood(requests("loglikelihood", pairs))
    own = [own_likelihood(model, tokenizer, *pair) for pair in pairs]
    off = max(abs(a - b) / abs(b) for (a, _), b in zip(found, own, strict=True))
    print(f"loglikelihood of {len(pairs)} endings: at most {off:.2%} off")
    rolling = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(line,) for line in lines[:24]])
    )
    print(
        f"loglikelihood_rolling: {-sum(rolling) / sum(map(len, lines[:24])):.3f} nats a character"
    )
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    texts = lm.generate_until(
        requests("generate_until", [(start, settings) for start, _ in pairs[:6]])
    )
    print(f"generate_until: {texts[0]!r} and {len(texts) - 1} more")
    if off > 0.1 or not all(map(torch.isfinite, torch.tensor(rolling))):
        raise SystemExit("lm-eval and the model disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--placement", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    model = hybrid.load(args.model, placement=args.placement)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    if args.tasks:
        results = simple_evaluate(model=lm, tasks=args.tasks, limit=args.limit)
        print(json.dumps(results["results"], indent=2))
    else:
        check(lm, model, tokenizer)


if __name__ == "__main__":
    main()
