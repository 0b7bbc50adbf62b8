"""Data sets in the Hub's layout: from a directory, and over HTTP from a small server."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from support.dataset_server import COMMIT, serve

from pipeline.calibration import TextSource
from pipeline.calibration.source import records
from pipeline.errors import CalibrationError

CARD = """---
configs:
- config_name: short
  data_files: [{split: train, path: short-*}]
- config_name: long
  data_files: [{split: train, path: long-0*}, {split: held, path: long-1*}]
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory, texts):
    """ORG/NAME directories: one of two configs in parquet, one of plain .jsonl."""
    root = tmp_path_factory.mktemp("hub")
    words = texts["calibration"].read_text().split()
    body = [" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]
    folder = root / "org" / "both"
    folder.mkdir(parents=True)
    for name in ("short-0", "long-0", "long-1"):
        part = body[:5] if name == "short-0" else body
        table = pyarrow.table({"body": part, "id": range(len(part))})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    (folder / "README.md").write_text(CARD)
    folder = root / "org" / "lines"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in body))
    return root, body


def _refused(**source):
    with pytest.raises(CalibrationError) as error:
        next(iter(records(TextSource(**source))))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_of_a_directory(hub):
    root, body = hub
    source = TextSource(
        dataset=str(root / "org" / "both"), config="long", split="held", column="body"
    )
    assert [record.value for record in records(source)] == body
    source = TextSource(dataset=str(root / "org" / "lines"))
    found = list(records(source))
    assert [record.value for record in found] == body
    assert found[2].where == f"data set {root}/org/lines, record 3"


def test_what_a_data_set_has_not(hub):
    name = str(hub[0] / "org" / "both")
    assert "several configs; set config to one of: short, long" in _refused(dataset=name)
    assert "no config 'longer'; it has: short, long" in _refused(dataset=name, config="longer")
    held = _refused(dataset=name, config="long", split="test")
    assert "no split 'test'; it has: train, held" in held
    assert "no column 'text'; it has: body, id" in _refused(dataset=name, config="long")
    (hub[0] / "org" / "none").mkdir()
    assert "cannot be read (" in _refused(dataset=str(hub[0] / "org" / "none"))


def _with_hub(url, home, *arguments):
    """Python in a process of its own: the clients read the endpoint when they are imported."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_recipe_over_http(hub, project):
    wanted = {"config": "long", "split": "held", "column": "body"}
    remote = {**wanted, "dataset": "org/both", "revision": COMMIT}
    recipe = project.change(calibration={"sources": [remote]}).write()
    with serve(hub[0]) as url:
        home = project.folder / "home"
        done = _with_hub(url, home, "-m", "pipeline", "run", recipe, "--until", "dequantize")
    assert done.returncode == 0, done.stderr
    over_http = project.work().fingerprint()["texts"]["calibration"]
    # The very tokens that the same rows give from a directory.
    local = {**wanted, "dataset": str(hub[0] / "org" / "both")}
    project.change(calibration={"sources": [local]})
    project.run(until="dequantize", fresh=True)
    assert project.work().fingerprint()["texts"]["calibration"] == over_http


ASK = """
import json, sys
from pipeline.calibration import TextSource
from pipeline.calibration.source import records
from pipeline.errors import CalibrationError

for source in json.loads(sys.argv[1]):
    try:
        print(next(iter(records(TextSource(**source)))).value)
    except CalibrationError as error:
        print(error)
"""


def test_what_the_hub_has_not(hub, tmp_path):
    asked = [
        {"dataset": "org/both", "config": "long", "column": "body"},
        {"dataset": "org/both", "revision": "gone"},
        {"dataset": "org/unknown"},
        {"dataset": "org/both", "config": "long", "split": "test"},
    ]
    with serve(hub[0]) as url:
        done = _with_hub(url, tmp_path / "home", "-c", ASK, json.dumps(asked))
    assert done.stdout.splitlines() == [
        hub[1][0],
        "data set org/both has no revision 'gone'",
        "data set org/unknown is not on the Hub, or not for you; check the id, or hf auth login",
        "data set org/both has no split 'test'; it has: train, held",
    ], done.stderr


def test_the_command_line_says_it_in_one_line(hub, project, cli):
    local = {"dataset": str(hub[0] / "org" / "both"), "config": "long", "split": "test"}
    answer = cli("run", project.change(calibration={"sources": [local]}).write())
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert answer.err.startswith("requant: data set ") and "no split 'test'" in answer.err
    assert not project.partial.exists()
