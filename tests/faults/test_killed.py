"""`requant` killed at any file operation: nothing lost, nothing half-made taken for a model.

`scripts/torture.py` does the same hundreds of times.
"""

import random
import shutil
from itertools import pairwise

import pytest
from support.faults import Fault, accepted, half_made, requant
from support.recipes import Project, digests

from pipeline.stages.verify import verify_model


@pytest.fixture(scope="module")
def operations(tmp_path_factory, texts, finished):
    """All that an uninterrupted run does to the disk, in order."""
    project = Project(tmp_path_factory.mktemp("counted") / "x", texts)
    project.folder.mkdir()
    outcome = requant(["run", project.write()], project.folder)
    assert outcome.code == 0, outcome.said
    assert digests(project.output) == digests(finished.output)
    kinds = {operation.split()[0] for operation in outcome.operations}
    assert kinds == {"open", "write", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
    return outcome.operations


def _index(operations, part):
    return next(i for i, operation in enumerate(operations) if part in operation)


def test_killed_at_a_random_operation_of_every_stage(tmp_path, texts, finished, operations):
    expected = digests(finished.output)
    bounds = [
        0,
        _index(operations, "write " + str(_marker(operations, "dequantize-check"))),
        _index(operations, "write " + str(_marker(operations, "requantize-reference"))),
        _index(operations, ".report.json."),
        len(operations),
    ]
    for number, (first, stop) in enumerate(pairwise(bounds)):
        at = random.randrange(first, stop)
        moment = f"{at}: {operations[at]}"
        project = Project(tmp_path / str(number), texts)
        project.folder.mkdir()
        command = ["run", project.write(), "--until", "shard" if number < 3 else "validate"]
        outcome = requant(command, project.folder, Fault(at=at))
        assert outcome.code == -9, moment
        if half_made(project.partial):
            assert accepted(project.partial, project.folder) == [], moment
        if project.output.exists():
            assert not verify_model(project.output), moment
            whole = {n: d for n, d in digests(project.output).items() if not n.endswith(".tmp")}
            assert whole == expected, moment
        outcome = requant(command, project.folder)
        assert outcome.code == 0, (moment, outcome.said)
        assert digests(project.output) == expected, moment
        left = {path.name for path in project.folder.iterdir()}
        assert left == {"out", "recipe.yaml"}, moment


def _marker(operations, unit):
    """The path of a unit's marker while it is written."""
    (found,) = {o.split()[1] for o in operations if o.startswith("write") and f".{unit}.json" in o}
    return found


def test_a_whole_directory_with_its_tables_is_no_model_before_it_is_sealed(project, operations):
    """All of index, config and weights are in place; the tokenizer and the seal are not."""
    at = _index(operations, ".conversion.json.")
    assert requant(["run", project.write()], project.folder, Fault(at=at)).code == -9
    assert {"config.json", "model.safetensors.index.json", "shard_map.json"} <= {
        path.name for path in project.partial.iterdir()
    }
    assert accepted(project.partial, project.folder) == []
    # The same files without the mark of the unfinished: what is missing is noticed all the same.
    copy = project.folder / "copy"
    shutil.copytree(project.partial, copy, ignore=shutil.ignore_patterns(".work"))
    assert "verify" not in accepted(copy, project.folder)


def test_the_readers_take_what_is_whole(finished, tmp_path):
    """Or the checks above would prove nothing."""
    copy = shutil.copytree(finished.output, tmp_path / "copy")
    assert accepted(copy, tmp_path) == [
        "verify", "hybrid.load", "validate", "generate", "shard", "publish"
    ]  # fmt: skip


def test_a_publication_that_is_killed_shows_nothing_half(finished, tmp_path, hub):
    model = shutil.copytree(finished.output, tmp_path / "there" / "model")
    command = ["publish", model, "--repo", "acme/micro", "--license", "apache-2.0"]
    command += ["--unvalidated"]
    token = next(iter(hub.store.tokens))
    runs = 0
    for at in (random.randrange(3), random.randrange(3, 6), None):
        fault = None if at is None else Fault(at=at)
        outcome = requant(command, model.parent, fault, **hub.environment(token))
        runs += outcome.code == -9
    assert (outcome.code, runs > 0) == (0, True), outcome.said
    repo = hub.store.repos["model", "acme/micro"]
    here = {p.name: p.read_bytes() for p in model.iterdir() if p.name[0] != "."}
    there = {name: blob.data for name, blob in repo.head().items() if name[0] != "."}
    assert there == here
    for commit in list(repo.commits.values())[1:]:
        assert {name for name in commit.tree if name[0] != "."} == here.keys()
