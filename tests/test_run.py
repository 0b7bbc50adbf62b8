"""Running, resuming, being killed, and what may not be mixed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from support.kill import run_killed
from support.recipes import Project, digests

from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import CheckpointError, OutputError, RecipeError, ResourceError
from pipeline.workdir import MANIFEST


@pytest.fixture(scope="module")
def changes(tmp_path_factory, texts, finished):
    """Every change of the disk that an uninterrupted run makes, in order."""
    project = Project(tmp_path_factory.mktemp("counted"), texts)
    made = run_killed(project.data, project.text, "shard", None)
    assert digests(project.output) == digests(finished.output)
    return made


def _moments(changes):
    """Indices of changes after which a run may be killed: the delicate ones, and some others."""

    def index(part, start=0):
        return next(i for i in range(start, len(changes)) if part in changes[i])

    marker = index("markers/requantize-layer-000.json")
    publish = len(changes) - 1 - [".work" in c for c in changes[::-1]].index(True)
    first_rename = next(i for i, c in enumerate(changes) if c.startswith("rename"))
    named = {
        "no manifest yet": index("work.json"),
        "experts written, no marker": marker,
        "marker written, old streams not yet deleted": index("unlink", marker + 2),
        "reference half done": index("validation_reference"),
        "shard: tables": index("shard_map.json"),
        "shard: sealed, not renamed": first_rename,
        "publish: between the renames": first_rename + 1,
        "publish: renamed, not tidied up": publish,
    }
    chosen = dict(named)
    others = [i for i in range(len(changes)) if i not in named.values()]
    for number in random.sample(others, 3):
        chosen[f"before {changes[number]}"] = number
    return chosen


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, texts, finished, changes):
    expected = digests(finished.output)
    for number, (moment, kill_at) in enumerate(_moments(changes).items()):
        project = Project(tmp_path / str(number), texts)
        project.folder.mkdir()
        assert run_killed(project.data, project.text, "shard", kill_at) is None, moment
        renamed = "renamed" in moment and "not renamed" not in moment
        assert project.output.exists() == renamed, moment
        project.run(until="shard")
        assert digests(project.output) == expected, moment
        left = sorted(path.name for path in project.folder.iterdir())
        assert left == ["out"], (moment, left)
