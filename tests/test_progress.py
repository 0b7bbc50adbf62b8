"""What a person is told while a run goes on."""

import io

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import Reporter, duration, size


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10 << 30, "10.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes(count, said):
    assert size(count) == said


def test_no_guess_before_it_is_known():
    with Reporter(100.0, quiet=True) as reporter:
        assert reporter.remaining() == "warming up"
        reporter.skip(20)
        reporter.finish(10, 50.0)  # the first pays for start-up and is not counted
        assert reporter.remaining() == "warming up"
        reporter.finish(10, 5.0)
        assert reporter.remaining() == "30 s left"
        reporter.finish(20, 10.0)
        assert reporter.remaining() == "20 s left"
        reporter.finish(50, 1.0)
        assert reporter.remaining() == "0.0 s left"


def test_one_long_job_is_reckoned_from_within(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Reporter(50.0, quiet=True) as reporter:
        reporter.start("dequantize: check", 10)
        reporter.finish(10, 5.0)
        reporter.start("requantize: layer 1 of 1", 30)
        now += 40
        reporter.within(0.125)
        assert reporter.remaining() == "warming up"
        reporter.within(0.5)  # 15 of 30 in 40 s, and 25 to come
        assert reporter.remaining() == "1 min 07 s left"
        reporter.finish(30, 80.0)
        assert reporter.remaining() == "27 s left"


def test_lines_without_a_terminal(capsys, monkeypatch):
    with Reporter(10.0) as reporter:
        reporter.start("requantize: layer 1 of 2")
        reporter.detail("expert 32 of 512")
        monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.0)
        reporter.detail("expert 64 of 512")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[") and lines[0].endswith("s] requantize: layer 1 of 2")
    assert lines[1].endswith("expert 64 of 512; warming up")


def test_bar_on_a_terminal(monkeypatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120, _environ={})
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    with Reporter(2.0) as reporter:
        reporter.start("requantize: layer 1 of 2")
        reporter.skip(0.5)
        reporter.finish(0.5, 1.0)
        reporter.finish(0.5, 1.0)
        reporter.detail("expert 32 of 512")
    assert "expert 32 of 512" in out.getvalue() and "1.0 s left" in out.getvalue()
