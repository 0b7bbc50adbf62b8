"""What every row starts from: one dense source, one file of calibration tokens, one evaluator."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from pipeline.calibration import calibration_sequences, digest, load_tokenizer, read_text, tokenize
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.sums import digest_file
from pipeline.evaluate.metrics import Comparer, Comparison
from pipeline.evaluate.reference import Reference
from pipeline.evaluate.windows import Windows, sliding_windows
from pipeline.models.skeleton import architecture_of
from pipeline.stages.source import record_source, stream_logits

RECIPE = Path("recipes/demo.yaml")
TEXTS = {"in": "calibration/docs-eval.txt", "out": "calibration/ood-eval.txt"}
WINDOW, STRIDE = 512, 512


@dataclass(frozen=True)
class Workplace:
    """The common start of all rows.

    model: the dense bf16 source.  tokens: the calibration file.  recipe: what ours are made by.
    references: the source's own predictions on every text.  made_from, read_by: digests of what
    conversions start from, and of what they are evaluated on.
    """

    folder: Path
    model: Path
    tokens: Path
    recipe: Mapping[str, Any]
    references: Mapping[str, Reference]
    made_from: str
    read_by: str

    def evaluate(self, model: Path) -> dict[str, Comparison]:
        """A directory's dequantised weights in float32 against the source, on every text."""
        checkpoint = Checkpoint.open(model)
        architecture = architecture_of(checkpoint.config, str(model))
        found = {}
        for name, reference in self.references.items():
            comparer = Comparer(reference)
            for first, logits in stream_logits(
                checkpoint, architecture, reference.windows, device(), torch.float32
            ):
                comparer.add(first, logits)
            found[name] = comparer.build()
        return found


def device() -> torch.device:
    """Where rows are evaluated."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(folder: Path, samples: int | None, windows: int | None) -> Workplace:
    """Make, or find again, what all rows start from.

    samples: calibration sequences, windows: of each evaluation text; None: as the recipe says, and
    all there are.
    """
    recipe = yaml.safe_load(RECIPE.read_text())
    if samples:
        recipe["calibration"]["samples"] = samples
    # One window: ours records the source on the validation text on its way, peers do not.
    recipe["validate"]["max_windows"] = 1
    folder.mkdir(parents=True, exist_ok=True)
    model = _dense_source(folder, recipe)
    recipe["source"]["model"] = str(model)
    tokens = _calibration(folder, model, recipe["calibration"])
    stored = [*sorted(model.glob("*.safetensors")), model / "config.json", tokens]
    made_from = _joined(digest_file(file) for file in stored)
    references = {name: _reference(folder, model, name, windows) for name in TEXTS}
    read_by = _joined(digest(reference.windows.token_ids) for reference in references.values())
    return Workplace(folder, model, tokens, recipe, references, made_from, read_by)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _dense_source(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """The recipe's source in bf16, by the pipeline's own stage; made anew when it has changed."""
    stored = Path(recipe["source"]["model"])
    known = folder / "source.txt"
    now = " ".join(digest_file(file) for file in sorted(stored.glob("*.safetensors")))
    target = folder / "source-bf16"
    if known.is_file() and known.read_text() == now and target.is_dir():
        return target
    command = [sys.executable, "-m", "pipeline", "run", str(RECIPE), "--until", "dequantize"]
    command += ["--fresh", "--set", "dequantize.write=true"]
    subprocess.run([*command, "--set", f"output.path={folder / 'source'}"], check=True)
    known.write_text(now)
    for record in folder.glob("reference-*.safetensors"):
        record.unlink()
    return target


def _calibration(folder: Path, model: Path, settings: Mapping[str, Any]) -> Path:
    """The tokens that the pipeline draws by this recipe, as a file for those who cannot."""
    tokens = calibration_sequences(
        load_tokenizer(model),
        settings["sources"],
        samples=settings["samples"],
        length=settings["sequence_length"],
        seed=settings["seed"],
    )
    path = folder / f"tokens-{digest(tokens)[:12]}.safetensors"
    if not path.is_file():
        save_file({"tokens": tokens}, path)
    return path


def _reference(folder: Path, model: Path, name: str, limit: int | None) -> Reference:
    """The source's predictions on a whole text, recorded once in float32."""
    wanted = text_windows(model, name, limit)
    path = folder / f"reference-{name}.safetensors"
    if path.is_file():
        known = Reference.load(path)
        if torch.equal(known.windows.token_ids, wanted.token_ids):
            return known
    checkpoint = Checkpoint.open(model)
    architecture = architecture_of(checkpoint.config, str(model))
    labels = {"text": TEXTS[name]}
    made = record_source(checkpoint, architecture, wanted, labels, device(), torch.float32)
    made.save(path)
    return made


def text_windows(model: Path, name: str, limit: int | None) -> Windows:
    """A whole evaluation text, each token scored once."""
    tokens = tokenize(load_tokenizer(model), read_text(TEXTS[name]))
    return sliding_windows(tokens, WINDOW, STRIDE, limit)
