"""The history: trackio's file, written by trackio, checked and pruned by us."""

import json
import os
import random
import sqlite3
import subprocess
import sys

import pytest

from pipeline.errors import OutputError
from pipeline.nightly.history import FILE, History


def record(job, value, **more):
    return {
        "job": job,
        "outcome": "ok",
        "figures": {"perplexity_ratio": value, "kl_divergence": None},
        "accepted": False,
        "text": "Größe \u2028 'quoted' \N{SNOWMAN}",
        **more,
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two jobs, three nights; not to be written to."""
    folder = tmp_path_factory.mktemp("history")
    history = History(folder)
    values = [random.random() for _ in range(3)]
    history.append([record(job, v) for v in values for job in ("a", "b job.1")])
    return folder, values


@pytest.fixture
def copy(written, tmp_path):
    source = sqlite3.connect(written[0] / FILE)
    with sqlite3.connect(tmp_path / FILE) as target:
        source.backup(target)
    source.close()
    return tmp_path


def test_rows_come_back_as_they_were(written):
    folder, values = written
    history = History(folder)
    assert history.kept_aside is None
    for job in ("a", "b job.1"):
        assert list(history.of(job)) == [record(job, v) for v in values]
    assert list(history.of("c")) == []


def test_trackio_sees_runs_and_figures(written):
    code = "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S;"
    code += "print(json.dumps({r.name: S.get_logs('nightly', r.name)"
    code += " for r in trackio.Api().runs('nightly')}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRACKIO_DIR": str(written[0])},
        capture_output=True,
        text=True,
        check=True,
    )
    logs = json.loads(done.stdout.splitlines()[-1])
    assert {name: [row["perplexity_ratio"] for row in rows] for name, rows in logs.items()} == {
        "a": written[1],
        "b job.1": written[1],
    }


def test_appending_goes_on(copy, written, monkeypatch):
    """Even where the environment would send rows to a server."""
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:9")
    history = History(copy)
    history.append([record("a", 2.0)])
    assert [r["figures"]["perplexity_ratio"] for r in history.of("a")] == [*written[1], 2.0]


def test_retention_keeps_each_jobs_newest(copy, written):
    history = History(copy)
    assert history.prune(2) == 2
    for found in (history, History(copy)):
        for job in ("a", "b job.1"):
            assert [r["figures"]["perplexity_ratio"] for r in found.of(job)] == written[1][1:]


def _not_a_database(path):
    path.write_bytes(random.randbytes(5000))


def _holes(path):
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 300] = random.randbytes(300)
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_json(path):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE metrics SET metrics = substr(metrics, 9) WHERE id = 2")


def _no_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE metrics")


@pytest.mark.parametrize("damage", [_not_a_database, _holes, _cut, _not_json, _no_table])
def test_a_damaged_history_is_kept_aside(copy, damage):
    damage(copy / FILE)
    before = (copy / FILE).read_bytes()
    history = History(copy)
    assert history.kept_aside is not None and history.kept_aside.read_bytes() == before
    assert not (copy / FILE).exists() and list(history.of("a")) == []
    assert History(copy).kept_aside is None  # said once


def test_a_new_one_is_begun_after_damage(copy):
    _holes(copy / FILE)
    history = History(copy)
    history.append([record("a", 1.0)])
    assert list(History(copy).of("a")) == [record("a", 1.0)]


def test_rows_that_do_not_arrive_are_an_error(tmp_path):
    history = History(tmp_path)
    (tmp_path / FILE).mkdir()  # SQLite cannot open it
    with pytest.raises(OutputError, match="the history could not be written"):
        history.append([record("a", 1.0)])
