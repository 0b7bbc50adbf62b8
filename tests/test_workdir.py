"""The lock, the markers, and who owns a directory."""

import json
import multiprocessing
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.writer import write_bytes
from pipeline.errors import OutputError
from pipeline.workdir import MANIFEST, WorkDirectory, difference


@pytest.fixture
def work(tmp_path):
    return WorkDirectory(tmp_path / "deep" / "out")


def test_opening_and_taking_up_again(work):
    with work:
        work.open({"threads": 1, "tuple": (1, 2)})
        assert work.begun and work.fingerprint() == {"threads": 1, "tuple": [1, 2]}
        work.open({"threads": 1, "tuple": (1, 2)})
        with pytest.raises(OutputError, match=r"threads was 1, is now 2; undo the change"):
            work.open({"threads": 2, "tuple": (1, 2)})
    assert sorted(p.name for p in work.root.parent.iterdir()) == ["out.partial"]


def test_half_written_files_are_swept_up(work):
    work.open({})
    left = [work.root / ".model.safetensors.123.tmp", work.internal / "markers" / ".x.json.9.tmp"]
    for path in left:
        path.touch()
    (work.root / "tmp").touch()
    work.open({})
    assert not any(path.exists() for path in left) and (work.root / "tmp").exists()


def test_killed_before_the_manifest(work):
    (work.internal / "markers").mkdir(parents=True)
    (work.internal / f".{MANIFEST}.77.tmp").touch()
    work.open({"a": 1})
    assert work.begun and [p.name for p in work.internal.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", ["thesis.tex", ".work/thesis.tex", ".hidden"])
def test_directories_of_others(work, name):
    file = work.root / name
    file.parent.mkdir(parents=True)
    file.touch()
    for attempt in (work.check, work.clear, lambda: work.open({})):
        with pytest.raises(OutputError, match="is no work directory of requant; move it away"):
            attempt()
    assert file.exists()


def test_markers(work):
    work.open({})
    record = write_bytes(work.root / "data", b"12345")
    made = work.finish("unit-1", [record], 1.23456, {"numbers": [1, 2]})
    found = work.finished("unit-1")
    assert (found.unit, found.outputs, found.data) == (made.unit, made.outputs, made.data)
    assert found.seconds == 1.235 and work.finished("unit-2") is None
    assert [marker.unit for marker in work.markers()] == ["unit-1"]
    (work.root / "data").write_bytes(b"1234")  # not whole
    assert work.finished("unit-1") is None and work.markers() == []
    (work.root / "data").write_bytes(b"54321")
    assert work.finished("unit-1") is not None
    for damage in ("{", "[]", "{}", '{"unit": 1, "outputs": [{}]}'):
        (work.internal / "markers" / "unit-1.json").write_text(damage)
        assert work.finished("unit-1") is None


def test_a_damaged_manifest_is_no_match(work):
    work.open({"a": 1})
    (work.internal / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"a was absent, is now 1; .* --fresh"):
        work.open({"a": 1})
    work.clear()
    work.open({"a": 1})


def test_publishing_replaces_and_recovers(work):
    """From every point that a kill can leave behind."""
    for moment in range(4):
        with work:
            work.open({"n": moment})
            (work.root / "conversion.json").write_text(json.dumps({"n": moment}))
            renames = [
                lambda: work.internal.rename(work._aside(".work")),
                lambda: work.output.exists() and work.output.rename(work._aside(".previous")),
                lambda: work.root.rename(work.output),
            ]
            for rename in renames[:moment]:
                rename()
            if moment == 0:
                work.publish()
            else:
                work.check()
                work.recover()
        assert json.loads((work.output / "conversion.json").read_text()) == {"n": moment}
        assert [p.name for p in work.output.parent.iterdir()] == ["out"]
        assert not (work.output / ".work").exists()


def test_clearing_what_a_kill_left_of_clearing(work):
    work.open({})
    work.root.rename(work._aside(".discarded"))
    work.recover()
    assert list(work.output.parent.iterdir()) == []


def _hold(output, taken, done):
    with WorkDirectory(output):
        taken.set()
        done.wait(30)


def test_the_lock_across_processes(work):
    context = multiprocessing.get_context("forkserver")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(work.output, taken, done))
    process.start()
    assert taken.wait(60)
    with pytest.raises(OutputError, match=r"another run is working on .*out"), work:
        pass
    process.kill()
    process.join()
    assert work._aside(".lock").exists()
    with work:
        pass
    assert not work._aside(".lock").exists()


def test_the_lock_is_never_held_twice(work):
    """Also where the file is deleted by one while another is about to lock it."""
    inside, most, wrong = 0, 0, []

    def compete():
        nonlocal inside, most
        for _ in range(200):
            try:
                with WorkDirectory(work.output):
                    inside += 1
                    most = max(most, inside)
                    os.sched_yield()
                    inside -= 1
            except OutputError:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, wrong) == (1, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(JSON, JSON)
def test_difference(first, second):
    assert difference(first, first) is None
    assert (difference(first, second) is None) == (first == second)


def test_difference_names_the_place():
    found = {"a": {"b": 1, "c": 2}, "d": 3}
    assert difference(found, {"a": {"b": 1, "c": 5}, "d": 4}) == "a.c was 2, is now 5"
    assert difference(found, {"a": {"b": 1}, "d": 3}) == "a.c was 2, is now absent"
    assert difference({}, {"x": None}) == "x was absent, is now None"
