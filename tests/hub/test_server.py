"""The server that the other tests talk to, held against the real client."""

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from support.hub import HubServer, git_hash

REPO = "acme/model"


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url)


def _add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def _download(hub: HubServer, cache: Path, **options) -> Path:
    return Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=cache, **options))


def test_what_was_sent_is_what_comes_back(api, hub, tmp_path):
    big, small = os.urandom(300_000), b'{"a": 1}\n'
    assert api.create_repo(REPO).repo_id == REPO
    shard = _add("model.safetensors", big)
    api.preupload_lfs_files(REPO, [shard])
    assert set(hub.store.repos["model", REPO].head()) == {".gitattributes"}  # not visible yet
    info = api.create_commit(
        REPO, [shard, _add("config.json", small), _add("a/b.txt", b"x")], commit_message="all"
    )
    folder = _download(hub, tmp_path / "cache")
    assert folder.name == info.oid
    assert (folder / "model.safetensors").read_bytes() == big
    assert (folder / "config.json").read_bytes() == small
    assert (folder / "a" / "b.txt").read_bytes() == b"x"
    assert (folder / "model.safetensors").resolve().name == hashlib.sha256(big).hexdigest()
    assert len(hub.seen("PUT", "/put/")) == 1
    files = {f.path: f for f in api.list_repo_tree(REPO, recursive=True) if hasattr(f, "size")}
    assert files["model.safetensors"].lfs.sha256 == hashlib.sha256(big).hexdigest()
    assert files["config.json"].blob_id == git_hash(small)
    assert not api.verify_repo_checksums(REPO, cache_dir=tmp_path / "cache").mismatches


def test_an_object_that_is_there_is_not_sent_again(api, hub):
    api.create_repo(REPO)
    data = os.urandom(1000)
    for _ in range(2):
        api.preupload_lfs_files(REPO, [_add("model.safetensors", data)])
    assert len(hub.seen("PUT", "/put/")) == 1


def test_uploads_in_parts(hub, api):
    hub.part_bytes = 1000
    api.create_repo(REPO)
    data = os.urandom(2500)
    add = _add("model.safetensors", data)
    api.create_commit(REPO, [add], commit_message="parts")
    assert len(hub.seen("PUT", "/put/")) == 3
    assert hub.store.repos["model", REPO].head()["model.safetensors"].data == data


def test_long_listings_come_in_pages(hub, api):
    hub.page = 3
    hub.store.seed(REPO, {f"{i}.txt": b"x" for i in range(10)})
    assert len(list(api.list_repo_tree(REPO))) == 11


def test_range_requests_give_headers_alone(hub, api, micro):
    files = {path.name: path.read_bytes() for path in micro.iterdir()}
    hub.store.seed(REPO, files)
    metadata = api.get_safetensors_metadata(REPO)
    assert "model.norm.weight" in metadata.weight_map
    assert any(r.headers.get("range") for r in hub.seen("GET", ".safetensors"))


def test_private_repositories(hub, api, tmp_path):
    hub.store.seed(REPO, {"config.json": b"{}"}, private=True)
    hub.store.token("hf_stranger", user="bob")
    assert _download(hub, tmp_path / "mine").is_dir()
    for token in (False, "hf_stranger"):
        with pytest.raises(RepositoryNotFoundError):
            _download(hub, tmp_path / "none", token=token)
    hub.store.repos["model", REPO].private = False
    hub.store.repos["model", REPO].gated = True
    with pytest.raises(GatedRepoError):
        _download(hub, tmp_path / "none", token="hf_stranger")


def test_tokens_and_rights(hub, api):
    hub.store.token("hf_reader", user="ann", write=False)
    assert api.whoami()["name"] == "ann"
    for token, repo, status in (
        ("hf_unknown", REPO, 401),
        ("hf_reader", "ann/model", 403),
        (None, "someone/model", 403),
        (False, REPO, 401),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo(repo, token=token)
        assert caught.value.response.status_code == status


def test_refusals_of_a_commit(hub, api):
    api.create_repo(REPO)
    head = hub.store.repos["model", REPO].branches["main"]
    api.create_commit(REPO, [_add("a.txt", b"1")], commit_message="first")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(REPO, [_add("a.txt", b"2")], commit_message="late", parent_commit=head)
    assert caught.value.response.status_code == 412
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, [_add("a.txt", b"2")], commit_message="x", revision="nowhere")
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, [CommitOperationDelete("b.txt")], commit_message="gone")
    with pytest.raises(ValueError, match="license"):
        card = b"---\nlicense: my-own\n---\n"
        api.create_commit(REPO, [_add("README.md", card)], commit_message="card")
    absent = _add("x.safetensors", b"never sent")
    absent._upload_mode, absent._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(REPO, [absent], commit_message="pointer to nothing")
    assert hub.store.repos["model", REPO].head()["a.txt"].data == b"1"
    assert len(hub.store.repos["model", REPO].commits) == 2


def test_objects_that_are_not_what_they_are_said_to_be(hub, api):
    api.create_repo(REPO)
    hub.faults.add("flip", on="PUT", times=9)
    with pytest.raises(RuntimeError) as caught:
        api.preupload_lfs_files(REPO, [_add("model.safetensors", b"abc")])
    assert "did not match the calculated checksum" in str(caught.value.__cause__)
    assert not hub.store.repos["model", REPO].objects


@pytest.mark.parametrize("kind", ["status", "cut", "lost", "slow"])
def test_the_client_gets_over_single_faults(hub, api, kind):
    api.create_repo(REPO)
    hub.faults.add(kind, on="PUT")
    data = os.urandom(200_000)
    api.preupload_lfs_files(REPO, [_add("model.safetensors", data)])
    assert hub.faults.struck[0][0] == kind
    assert list(hub.store.repos["model", REPO].objects.values()) == [data]


def test_a_download_that_is_cut_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # it keeps whole chunks only
    data = os.urandom(400_000)
    hub.store.seed(REPO, {"model.safetensors": data})
    hub.faults.add("cut", on="GET /get/")
    folder = _download(hub, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == data
    assert [r.headers.get("range") for r in hub.seen("GET", "/get/")] == [None, "bytes=200000-"]


def test_the_storage_takes_no_token_and_no_other_link(hub, api):
    hub.store.seed(REPO, {"model.safetensors": b"abc"})
    (oid,) = hub.store.repos["model", REPO].objects
    path = f"/get/model/{REPO}/{oid}"
    session = get_session()
    assert session.get(hub.signed(path)).content == b"abc"
    assert session.get(hub.storage_url + path).status_code == 403
    with_token = session.get(hub.signed(path), headers={"Authorization": "Bearer x"})
    assert with_token.status_code == 400


def test_a_token_expires(hub, api):
    hub.faults.add("expire", on="/api/repos/create", after=1)
    api.create_repo(REPO)
    for call in (lambda: api.create_repo("ann/other"), api.whoami):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
