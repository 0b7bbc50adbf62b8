"""The system refuses something in the middle: one line, exit code 2, and the run goes on later."""

import errno
import random
import shutil
import subprocess
import sys

import pytest
from support.faults import FULL, TAKES_ROOM, Fault, accepted, half_made, requant
from support.recipes import MICRO, Project, digests

SHARD = ("--until", "shard")


@pytest.fixture(scope="module")
def operations(tmp_path_factory, texts, finished):
    """All that an uninterrupted run does to the disk up to its seal."""
    project = Project(tmp_path_factory.mktemp("counted") / "x", texts)
    project.folder.mkdir()
    outcome = requant(["run", project.write(), *SHARD], project.folder)
    assert outcome.code == 0, outcome.said
    assert digests(project.output) == digests(finished.output)
    return outcome.operations


@pytest.fixture
def survives(project, finished):
    """A run with a fault is refused in one line, and ends in the same bytes when repeated."""

    def check(fault, *said, mend=lambda: None):
        command = ["run", project.write(), *SHARD]
        outcome = requant(command, project.folder, fault)
        assert outcome.code == 2, (fault, outcome.said)
        assert "Traceback" not in outcome.said and outcome.line.startswith("requant: ")
        assert "then give the same command again" in outcome.line or "make room" in outcome.line
        assert all(part in outcome.line for part in said), outcome.line
        if half_made(project.partial):
            assert accepted(project.partial, project.folder) == []
        assert not list(project.partial.rglob("*.tmp"))
        mend()
        outcome = requant(command, project.folder)
        assert outcome.code == 0, (fault, outcome.said)
        assert digests(project.output) == digests(finished.output), fault
        shutil.rmtree(project.output)

    return check


def test_a_full_disk(operations, survives):
    """At operations of different kinds, drawn at random."""
    for kind in random.sample(TAKES_ROOM, 2):
        of_kind = [i for i, operation in enumerate(operations) if operation.startswith(kind)]
        # Its parents are there when a directory is asked for first, so nothing is refused.
        at = random.choice([i for i in of_kind if "out.partial" in operations[i]])
        if kind == "os.mkdir":
            at = next(i for i in of_kind if ".work" in operations[i])
        survives(Fault(at=at, error=FULL), "No space left on device")


def test_a_limit_on_file_sizes(finished, survives):
    """The system itself refuses: the largest file, then most of them."""
    sizes = sorted(path.stat().st_size for path in finished.output.glob("*.safetensors"))
    survives(Fault(file_bytes=random.choice(sizes) - 1), "File too large")


def _first(operations, *parts):
    return next(i for i, o in enumerate(operations) if all(part in o for part in parts))


def test_a_disk_that_fails_or_may_not_be_written(operations, survives):
    at = _first(operations, "write", "experts-layer-001")
    survives(Fault(at=at, error=errno.EIO), "model-experts-layer-001", "the disk fails")
    at = _first(operations, "os.rename", "requantize-layer-000.json")
    survives(Fault(at=at, error=errno.EROFS), "read-only" if False else "file system writable")


def test_a_mount_point_is_not_renamed(operations, survives):
    """What a bind mount of the same disk answers, at the very last step."""
    at = next(i for i, o in enumerate(operations) if o.endswith("out.partial/.work"))
    at = max(i for i, o in enumerate(operations) if o.startswith("os.rename")) if at < 9 else at
    survives(Fault(at=at, error=errno.EXDEV), "no mount point")


def test_a_file_system_of_its_own_is_refused_at_once(tmp_path):
    """A real one, where this user may mount it."""
    script = """
        mkdir out && mount -t tmpfs none out || exit 77
        "$1" -c 'from pathlib import Path; from pipeline.workdir import WorkDirectory
WorkDirectory(Path("out").absolute()).check()'
    """
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("this user may not mount anything")
    assert "out is a file system of its own" in done.stderr, done.stderr


@pytest.fixture
def source(project):
    """A copy of the source that may be spoilt."""
    copy = shutil.copytree(MICRO, project.folder.parent / f"{project.folder.name}-source")
    project.change(source={"model": str(copy)})
    return copy


def test_a_source_that_cannot_be_read(source, survives):
    survives(Fault(read=60, error=errno.EIO), "model-0000", "Input/output error")
    survives(Fault(read=90), "model-0000", "ends before byte", "put the old file back")


def test_reads_that_come_in_pieces_change_nothing(project, source, finished):
    outcome = requant(["run", project.write(), *SHARD], project.folder, Fault(short=True))
    assert outcome.code == 0, outcome.said
    assert digests(project.output) == digests(finished.output)


def test_a_source_deleted_in_mid_run(source, operations, survives):
    """Early, when its tensors are still to be read; late, when only its tokenizer is."""
    copy = shutil.copytree(source, source.with_name("kept"))
    for part in ("dequantize-check.json", ".config.json"):
        at = _first(operations, "os.rename", part)
        fault = Fault(at=at, deletes=str(source))
        survives(fault, str(source), "put", mend=lambda: shutil.copytree(copy, source))
        assert source.is_dir()


def test_a_clock_that_goes_back(project, finished):
    outcome = requant(["run", project.write()], project.folder, Fault(clock=True))
    assert outcome.code == 0, outcome.said
    assert digests(project.output) == digests(finished.output)


def test_too_little_memory(survives):
    """The system itself refuses: before the first layer, or in the middle of one."""
    survives(Fault(memory=random.randrange(20, 60) << 20), "the machine's memory ran out")


def test_a_second_run_on_the_same_directory(project):
    with project.work():
        outcome = requant(["run", project.write()], project.folder)
    assert outcome.code == 2
    assert outcome.line == f"requant: another run is working on {project.output}"
