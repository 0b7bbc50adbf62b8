"""Fixtures of all rooms: the micro model, short random texts, one finished conversion."""

import logging
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parent / "hybrid"))  # its reader of our own output
sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))  # its writer of small directories

from support.hub import HubServer
from support.recipes import MICRO, Project

from pipeline.cli import main

WORDS = """the of and to in is a for it as with that this be are value list type name file table
index row column key class method function returns object string default module data error query"""


@pytest.fixture(autouse=True)
def _same_threads():
    """Runs set the process's thread count; the tests after them are not to notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_same_threads):
    """For tests that call torch themselves: several threads on a busy machine are slow."""
    torch.set_num_threads(1)


@pytest.fixture
def roomy(monkeypatch):
    """For plans of large models: the machine has a large disk and hardly any free memory."""
    disk = SimpleNamespace(free=1 << 50)
    monkeypatch.setattr("pipeline.plan.shutil.disk_usage", lambda _path: disk)
    memory = SimpleNamespace(available=1 << 29, total=1 << 30)
    monkeypatch.setattr("pipeline.plan.psutil.virtual_memory", lambda: memory)


@pytest.fixture
def cpu_only(monkeypatch):
    """For tests that compare to the bit, or count host memory: a GPU of the machine is not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def micro() -> Path:
    """The untrained two-layer model (DeltaNet, attention), 8 experts, NF4."""
    return MICRO


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Random words for calibration and evaluation, other ones in every session."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {}
    for name in ("calibration", "evaluation"):
        paths[name] = folder / f"{name}.txt"
        paths[name].write_text(" ".join(random.choices(WORDS.split(), k=4000)))
    return paths


@pytest.fixture
def project(tmp_path, texts) -> Project:
    """A recipe for the micro model in a directory of its own; quick, on one thread."""
    return Project(tmp_path, texts)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, texts) -> Project:
    """One conversion of the micro model, run to the end; not to be written to."""
    project = Project(tmp_path_factory.mktemp("finished"), texts)
    threads = torch.get_num_threads()
    project.run()
    torch.set_num_threads(threads)
    return project


HUB_TOKEN = "hf_" + "".join(random.choices(string.ascii_letters, k=34))
"""Another one in every session, so that a search for it in what was written finds no other text."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of one's own, with an empty cache; the token belongs to `ann`, a member of `acme`."""
    with HubServer() as server:
        server.store.token(HUB_TOKEN, user="ann", orgs=("acme",))
        for name, value in server.environment(HUB_TOKEN).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read when it was imported
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            monkeypatch.setattr(constants, name, str(tmp_path / name))
            monkeypatch.setenv(name, str(tmp_path / name))
        yield server


@dataclass(frozen=True)
class Answer:
    """What a command line said."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys):
    """`requant ARGUMENTS` in this process, from its real entry point."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["requant", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        finally:
            logging.disable(logging.NOTSET)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call
