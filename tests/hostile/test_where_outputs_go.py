"""Where results go: nowhere through a link, never into a Hub cache, with the usual permissions."""

import os
import shutil
import stat

import pytest
from huggingface_hub import constants
from support.recipes import digests

from pipeline.errors import OutputError


@pytest.fixture
def umask():
    """Sets the process's umask; put back at the end."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_files_get_the_usual_permissions(project, finished, umask):
    usual = 0o666 & ~umask(0o027)  # the umask that the other conversion ran under
    assert modes(finished.output) == {usual}
    project.change(validate={"max_windows": 1}).run()
    assert modes(project.output) == {0o640}
    assert stat.S_IMODE(project.output.stat().st_mode) == 0o750


@pytest.fixture
def snapshot(finished, tmp_path):
    """A finished model as another program's Hub cache holds it."""
    folder = tmp_path / "cache" / "models--acme--m" / "snapshots" / ("0" * 40)
    shutil.copytree(finished.output, folder)
    return folder


def contents(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(cli, *words):
    answer = cli(*words)
    assert answer.code == 2 and "lies in the Hub's local cache, which is only read" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_nothing_is_written_into_a_hub_cache(cli, project, snapshot, monkeypatch, tmp_path):
    before = contents(tmp_path / "cache")
    recipe = project.write()
    inside = snapshot.parents[1] / "new"
    refused(cli, "run", recipe, "--set", f"output.path={inside}")
    (project.folder / "way").symlink_to(snapshot.parents[1])  # a link on the way there
    refused(cli, "run", recipe, "--set", f"output.path={project.folder}/way/new")
    refused(cli, "report", snapshot)
    refused(cli, "report", snapshot, "--output", snapshot / "x.html")
    refused(cli, "shard", snapshot, "--output", inside)
    refused(cli, "validate", snapshot, "--json", inside.parent / "x.json")
    refused(cli, "publish", snapshot, "--repo", "a/b", "--license", "mit", "--dry-run")
    refused(cli, "nightly", snapshot, "--state", inside)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project.folder / "own"))
    refused(cli, "run", recipe, "--set", f"output.path={project.folder}/own/new")
    assert contents(tmp_path / "cache") == before


def test_a_validation_leaves_a_cache_alone(cli, snapshot):
    before = contents(snapshot)
    answer = cli("validate", snapshot, "--device-memory", "4GiB")
    assert answer.code == 0 and "the report is not kept" in answer.err
    assert contents(snapshot) == before


@pytest.mark.parametrize("name", ["out", "out.partial", ".out.lock"])
def test_links_are_not_followed(cli, project, tmp_path, name):
    theirs = tmp_path / "theirs"
    (theirs / "thesis").mkdir(parents=True)
    victim = theirs / "victim.txt"
    victim.write_text("theirs")
    (project.folder / name).symlink_to(victim if name == ".out.lock" else theirs)
    answer = cli("run", project.write())
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert "symbolic link" in answer.err
    assert victim.read_text() == "theirs"
    assert sorted(p.name for p in theirs.iterdir()) == ["thesis", "victim.txt"]


def test_a_link_among_the_parents_is_the_users_own(project, finished):
    """Many a home is one; what it leads to is checked as if it were named."""
    real = project.folder / "real"
    (real / "theirs").mkdir(parents=True)
    (real / "theirs" / "notes.txt").write_text("mine")
    (project.folder / "way").symlink_to(real)
    project.change(output={"path": str(project.folder / "way" / "out")})
    project.run(until="shard")
    assert digests(real / "out") == digests(finished.output)
    assert {path.name for path in real.iterdir()} == {"out", "theirs"}
    project.change(output={"path": str(project.folder / "way" / "theirs")})
    with pytest.raises(OutputError, match="was not made by requant"):
        project.run(until="shard")
    assert (real / "theirs" / "notes.txt").read_text() == "mine"
