"""Models by their Hub id: headers by range requests, downloads pinned, resumed and verified."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.big import write_headers

from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import CheckpointError, HubError
from pipeline.hub import client
from pipeline.hub.fetch import download, find, with_headers

SOURCE = "acme/micro-nf4"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01, 0.02, 0.04))


@pytest.fixture
def files(micro) -> dict[str, bytes]:
    """The micro model as it would be on the Hub, its card naming a licence."""
    found = {path.name: path.read_bytes() for path in micro.iterdir()}
    card = b"---\nlicense: apache-2.0\nlanguage: en\n---\n" + found["README.md"]
    return found | {"README.md": card, "pytorch_model.bin": b"\0never", "onnx/model.onnx": b"\0"}


def _sent(hub, part: str) -> list[str]:
    return [str(request) for request in hub.seen("GET", part)]


def test_inspect_reads_headers_alone(cli, hub, files, micro):
    hub.store.seed(SOURCE, files)
    here = json.loads(cli("inspect", micro, "--json").out)
    there = json.loads(cli("inspect", SOURCE, "--json").out)
    assert there == here | {"headers_only": True}
    assert all("range" in request.headers for request in hub.seen("GET", "/get/"))
    count = len(hub.requests)
    assert json.loads(cli("inspect", SOURCE, "--json").out) == there
    assert len(hub.requests) == count + 1  # which commit; the rest was kept


def test_long_headers_take_a_second_request(cli, hub, tmp_path):
    """The 80B source, cut to one of its shards: a header of several MB."""
    big = write_headers(tmp_path / "big")
    name = "model-00001-of-00009.safetensors"
    index = json.loads((big / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v == name}
    shard = (big / name).read_bytes()
    hub.store.seed(SOURCE, {
        name: shard,
        "config.json": (big / "config.json").read_bytes(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    })  # fmt: skip
    folder = with_headers(SOURCE)
    assert (folder / name).read_bytes() == shard
    assert Checkpoint.open(folder).headers_only


def test_plan_needs_no_download(cli, hub, files, project):
    hub.store.seed(SOURCE, files)
    recipe = project.change(source={"model": SOURCE}).write()
    answer = cli("plan", recipe, "--json")
    assert answer.code == 0, answer.err
    units = [job["unit"] for job in json.loads(answer.out)["jobs"]]
    here = cli("plan", project.change(source={"model": "tests/models/micro-nf4"}).write(), "--json")
    assert units == [job["unit"] for job in json.loads(here.out)["jobs"]]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_run_downloads_its_source_and_the_card_names_it(hub, files, project, cli):
    commit = hub.store.seed(SOURCE, files, private=True)
    project.change(source={"model": SOURCE}, publish={"repo": "acme/micro-gptq"})
    project.run()
    repo = hub.store.repos["model", SOURCE]
    repo.commit("main", "moved on", {})
    project.run()  # still the commit that was downloaded
    card = (project.output / "README.md").read_text()
    assert f"base_model: {SOURCE}" in card
    assert "base_model_relation: quantized" in card
    assert "license: apache-2.0" in card
    assert commit in card
    assert not _sent(hub, ".bin") and not _sent(hub, "onnx")
    published = hub.store.repos["model", "acme/micro-gptq"].head()
    assert published["README.md"].data.decode() == card


def test_what_cannot_be_published_is_not_even_downloaded(hub, files, project):
    hub.store.seed(SOURCE, {n: d for n, d in files.items() if n != "README.md"})
    project.change(source={"model": SOURCE}, publish={"repo": "acme/micro-gptq"})
    with pytest.raises(HubError, match="licence"):
        project.run()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_a_download_goes_on_after_a_fault_and_keeps_what_it_has(hub, files):
    hub.store.seed(SOURCE, files)
    hub.faults.add("status", on="GET /get/", after=1, times=99, status=500)
    with pytest.raises(HubError, match="goes on from here"):
        download(SOURCE, None, print)
    hub.faults.clear()
    hub.faults.add("cut", on="GET /get/")
    folder = download(SOURCE, None, print)
    for name, data in files.items():
        if name.endswith((".safetensors", ".json", ".md")):
            assert (folder / name).read_bytes() == data
    assert find(SOURCE) == folder


def test_damage_on_the_way_is_found_and_mended(hub, files):
    hub.store.seed(SOURCE, files)
    hub.faults.add("flip", on="GET /get/")
    said = []
    folder = download(SOURCE, None, said.append)
    assert any("once more" in line for line in said)
    for name in (n for n in files if n.endswith(".safetensors")):
        assert (folder / name).read_bytes() == files[name]


def test_damage_in_the_cache_is_found_before_the_conversion(hub, files, project):
    hub.store.seed(SOURCE, files)
    folder = download(SOURCE, None, print)
    weight = Checkpoint.open(folder).entries["model.layers.1.mlp.experts.7.down_proj.weight"]
    shard = (folder / weight.file).resolve()
    data = bytearray(shard.read_bytes())
    data[weight.offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="not what the Hub lists"):
        project.change(source={"model": SOURCE}).run()


def test_a_revision_is_kept_to(hub, files):
    first = hub.store.seed(SOURCE, files)
    hub.store.seed(SOURCE, files | {"config.json": b"{}"}, branch="other")
    hub.store.seed(SOURCE, files | {"config.json": b"[]"})
    assert download(SOURCE, first, print).name == first
    assert (download(SOURCE, "other", print) / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("acme/absent", "no such model"),
        ("acme/texts", "data set"),
        ("acme/not--a-name", "no name"),
        ("acme/gated", "accept its terms"),
        ("acme/old", "only models in safetensors"),
        ("./nowhere", "does not exist"),
    ],
)
def test_refused_in_one_line(cli, hub, files, model, words):
    hub.store.seed("acme/texts", {"a.txt": b"x"}, kind="dataset")
    hub.store.seed("acme/old", {"config.json": b"{}", "pytorch_model.bin": b"\0"})
    hub.store.seed("bob/gated", files)
    gated = hub.store.repos["model", "acme/gated"] = hub.store.repos["model", "bob/gated"]
    gated.gated, gated.id = True, "bob/gated"
    answer = cli("inspect", model)
    assert answer.code == 2
    assert answer.err.count("\n") == 1 and words in answer.err


def test_an_unknown_revision_and_no_network(cli, hub, files, project, monkeypatch):
    hub.store.seed(SOURCE, files)
    project.change(source={"model": SOURCE, "revision": "v9"})
    answer = cli("run", project.write())
    assert (answer.code, answer.err.count("\n")) == (2, 1) and "no such revision" in answer.err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    answer = cli("inspect", SOURCE)
    assert (answer.code, answer.err.count("\n")) == (2, 1) and "cannot be reached" in answer.err
    answer = cli("inspect", "tests/modles")
    assert answer.code == 2 and "no directory here" in answer.err


@pytest.mark.parametrize("name", ["../../evil.safetensors", "a/b.safetensors", "evil.bin"])
def test_an_index_that_names_other_places(hub, files, name):
    index = {"weight_map": {"x": name}}
    hub.store.seed(SOURCE, files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="beside it"):
        with_headers(SOURCE)


def test_headers_that_are_none(hub, files):
    for data in (b"", b"123", b"\xff" * 8 + b"x" * 100, os.urandom(50)):
        name = "model-00001-of-00003.safetensors"
        hub.store.seed(SOURCE, files | {name: data})
        with pytest.raises(CheckpointError):
            Checkpoint.open(with_headers(SOURCE))


def test_what_came_is_what_the_hub_lists(hub, files):
    hub.store.seed(SOURCE, files)
    folder = download(SOURCE, None, print)
    for path in folder.glob("*.safetensors"):
        assert path.resolve().name == hashlib.sha256(path.read_bytes()).hexdigest()
