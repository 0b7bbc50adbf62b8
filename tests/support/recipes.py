"""Recipes for the micro model, and running them in this process."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import Recipe, parse_recipe
from pipeline.run import run
from pipeline.stages.context import Context
from pipeline.workdir import WorkDirectory

MICRO = Path(__file__).parents[1] / "models" / "micro-nf4"

TIMED = (
    "conversion.json",
    "report.json",
    "report.html",
    "recipe.resolved.yaml",
    "recipe.yaml",
    "README.md",
)
"""Files of an output that tell of the run, not of the result."""


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` on top, section by section."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


class Project:
    """A directory with a recipe, and the output that it makes."""

    def __init__(self, folder: Path, texts: dict[str, Path]) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.partial = folder / "out.partial"
        self.said: list[str] = []
        """What the last run announced."""
        self.data: dict[str, Any] = {
            "source": {"model": str(MICRO)},
            "output": {"path": str(self.output)},
            "requantize": {"group_size": 32},
            "calibration": {
                "sources": [str(texts["calibration"])],
                "samples": 8,
                "sequence_length": 64,
            },
            "validate": {
                "text": str(texts["evaluation"]),
                "window": 64,
                "stride": 32,
                "max_windows": 4,
                "thresholds": {"perplexity_ratio": 2.0},
            },
            # One thread: on a busy machine two are far slower at matrices as small as these.
            "limits": {"threads": 1},
        }

    def change(self, **sections: Any) -> "Project":
        """Override keys: change(limits={"threads": 2}); returns itself."""
        self.data = merged(self.data, sections)
        return self

    @property
    def recipe(self) -> Recipe:
        """The recipe, checked."""
        return parse_recipe(self.data, "recipe.yaml")

    @property
    def text(self) -> str:
        """The recipe as a file has it."""
        return yaml.safe_dump(self.data)

    def write(self) -> Path:
        """The recipe as a file."""
        path = self.folder / "recipe.yaml"
        path.write_text(self.text)
        return path

    def run(self, **options: Any) -> Context:
        """`requant run`, in this process."""
        self.said = []
        return run(self.recipe, self.text, quiet=True, announce=self.said.append, **options)

    def work(self) -> WorkDirectory:
        """The work directory's view of the output."""
        return WorkDirectory(self.output)

    def report(self) -> dict[str, Any]:
        """report.json."""
        return json.loads((self.output / "report.json").read_text())


def digests(folder: Path, without: tuple[str, ...] = TIMED) -> dict[str, str]:
    """sha256 of every file below a directory, hidden ones included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
