"""Files that are written: whole or absent, always the same bytes, readable by others."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.sums import (
    BLOCK_BYTES,
    SUMS_NAME,
    EarlyDigests,
    check_sums,
    read_sums,
    write_sums,
)
from pipeline.checkpoint.writer import (
    FileRecord,
    sweep,
    write_bytes,
    write_json,
    write_safetensors,
)
from pipeline.errors import CheckpointError, OutputError


def tensors():
    return {
        "e.10.qweight": torch.randint(-9, 9, (4, 6), dtype=torch.int32),
        "e.2.qweight": torch.randint(-9, 9, (4, 6), dtype=torch.int32),
        "norm": torch.randn(7, dtype=torch.bfloat16),
        "scales": torch.randn(3, 5).half(),
        "transposed": torch.randn(5, 3).t(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "double": torch.randn(2, dtype=torch.float64),
        "flag": torch.tensor([True, False]),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
    }


def test_safetensors_package_reads_it(tmp_path):
    given = tensors()
    record = write_safetensors(tmp_path / "m.safetensors", given, {"made": "here"})
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "m.safetensors", "pt") as stream:
        assert stream.metadata() == {"format": "pt", "made": "here"}
    data = (tmp_path / "m.safetensors").read_bytes()
    assert record == FileRecord("m.safetensors", len(data), hashlib.sha256(data).hexdigest())


def test_aligned_and_in_natural_order(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", tensors())
    header = read_header(tmp_path / "m.safetensors", "m.safetensors")
    for entry in header.entries:
        count = max(1, torch.Size(entry.shape).numel())
        assert entry.offset % max(1, entry.nbytes // count) == 0
    names = [entry.name for entry in header.entries]
    assert names.index("e.2.qweight") < names.index("e.10.qweight")


def test_same_bytes_whatever_the_order(tmp_path):
    given = tensors()
    first = write_safetensors(tmp_path / "a", given, {"x": "1", "b": "2"})
    turned = dict(reversed(given.items()))
    second = write_safetensors(tmp_path / "a", turned, {"b": "2", "x": "1"})
    assert first == second


def test_large_tensors_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.checkpoint.writer.CHUNK_BYTES", 1000)
    given = {"a": torch.randn(123, 45)}
    record = write_safetensors(tmp_path / "m", given)
    data = (tmp_path / "m").read_bytes()
    assert hashlib.sha256(data).hexdigest() == record.sha256
    assert torch.equal(load_file(tmp_path / "m")["a"], given["a"])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_safetensors(tmp_path / "m", tensors())
        write_json(tmp_path / "j", {})
    finally:
        os.umask(old)
    for name in ("m", "j"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_nothing_is_left_after_a_failure(tmp_path):
    class Broken(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            if self.reads > 2:
                raise RuntimeError("the GPU fell over")
            return super().__getitem__(name)

    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_safetensors(tmp_path / "m", Broken({"a": torch.ones(3)}))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"


def test_a_disk_that_fails_beside_the_writing(tmp_path, monkeypatch):
    """What was written is flushed meanwhile, and an error of that is not told a second time."""
    flushed = []
    monkeypatch.setattr("pipeline.checkpoint.writer.FLUSH_BYTES", 100)
    monkeypatch.setattr("pipeline.checkpoint.writer.os.fdatasync", flushed.append)
    record = write_safetensors(tmp_path / "m", {"a": torch.randn(1000)})
    assert flushed
    old = (tmp_path / "m").read_bytes()
    assert hashlib.sha256(old).hexdigest() == record.sha256

    def failing(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pipeline.checkpoint.writer.os.fdatasync", failing)
    with pytest.raises(OutputError, match="cannot be written"):
        write_safetensors(tmp_path / "m", {"a": torch.randn(1000)})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == old


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "below", b"x")


def test_json_keeps_order_and_refuses_nan(tmp_path):
    write_json(tmp_path / "j", {"b": 1, "a": ["ü"]})
    assert (tmp_path / "j").read_text() == '{\n  "b": 1,\n  "a": [\n    "ü"\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "k", {"a": float("nan")})
    assert not (tmp_path / "k").exists()


def sealed(path):
    path.mkdir(exist_ok=True)
    record = write_safetensors(path / "m.safetensors", tensors())
    (path / "config.json").write_text("{}")
    (path / "sub").mkdir(exist_ok=True)
    (path / "sub" / "name with space").write_text("x")
    (path / "README.md").write_text("a card")
    (path / ".hidden").write_text("h")
    write_sums(path, {record.name: record.sha256})
    return path


def test_coreutils_agrees(tmp_path):
    path = sealed(tmp_path)
    assert set(read_sums(path)) == {"m.safetensors", "config.json", "sub/name with space"}
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", SUMS_NAME], cwd=path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert check_sums(path) == []


def test_changes_are_found(tmp_path):
    path = sealed(tmp_path)
    data = bytearray((path / "m.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "m.safetensors").write_bytes(data)
    (path / "config.json").unlink()
    (path / "stray.bin").write_text("x")
    (path / "README.md").write_text("another card")
    assert {(problem.file, problem.what.split(" ")[0]) for problem in check_sums(path)} == {
        ("m.safetensors", "its"),
        ("config.json", "listed"),
        ("stray.bin", "not"),
    }
    assert [problem.file for problem in check_sums(path, ["config.json"])] == ["config.json"]


def test_digests_begun_early_are_of_the_files_as_they_are(tmp_path):
    paths = [tmp_path / str(number) for number in range(3)]
    for path, size in zip(paths, (0, 1, BLOCK_BYTES + 17), strict=True):
        path.write_bytes(os.urandom(size))
    absent = tmp_path / "absent"
    with EarlyDigests([*paths, absent]) as early:
        before = [early.of(path) for path in paths]
        assert before == [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
        with pytest.raises(FileNotFoundError):
            early.of(absent)
        paths[1].write_bytes(b"changed")
        later = tmp_path / "later"
        later.write_bytes(b"another")
        assert early.of(paths[1]) == hashlib.sha256(b"changed").hexdigest()
        assert early.of(later) == hashlib.sha256(b"another").hexdigest()
    assert early.of(paths[2]) == before[2]


def test_sums_of_others(tmp_path):
    path = sealed(tmp_path)
    text = (path / SUMS_NAME).read_text().replace("  ", " *", 1)
    (path / SUMS_NAME).write_text(text)
    assert check_sums(path) == []
    (path / SUMS_NAME).write_text(text + "0" * 64 + "  ../outside\n")
    assert [problem.file for problem in check_sums(path)] == ["../outside"]
    (path / SUMS_NAME).write_text("hello\n")
    assert "line 1" in str(check_sums(path)[0])
    (path / SUMS_NAME).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sums(path)


def test_record_is_json(tmp_path):
    record = write_json(tmp_path / "j", {"a": 1})
    assert json.loads((tmp_path / record.name).read_text()) == {"a": 1}


NOBODY = 1 << 22
"""No process has this number: Linux ends below it."""


def test_a_killed_writers_file_is_swept_and_a_living_ones_is_not(tmp_path):
    program = """
import sys, time
from pathlib import Path
from pipeline.checkpoint.writer import _atomic
with _atomic(Path(sys.argv[1])) as digest:
    digest.write(b"half of it")
    print("writing", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "report.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        (half,) = tmp_path.iterdir()
        sweep(tmp_path)
        assert half.exists()
        # As another container sees it: the number is no process of its own, the lock is held.
        elsewhere = half.with_name(f".report.json.{NOBODY}.tmp")
        half.rename(elsewhere)
        sweep(tmp_path)
        assert elsewhere.exists()
        writer.kill()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_half_written_file_of_ours_stays(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    for name in (".notes.tmp", ".a.b.tmp", "a.1.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f".link.{NOBODY}.tmp").symlink_to(kept)
    (tmp_path / f".folder.{NOBODY}.tmp").mkdir()
    os.mkfifo(tmp_path / f".pipe.{NOBODY}.tmp")
    before = sorted(tmp_path.iterdir())
    (tmp_path / f".README.md.{NOBODY}.tmp").write_text("half")
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == before and kept.read_text() == "x"
    sweep(tmp_path / "nowhere")
