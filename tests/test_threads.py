"""How many threads there are by default."""

import pytest

from pipeline.threads import least_of

FILES = {
    "cpu.max": "cpu.max",
    "quota": "cpu/cpu.cfs_quota_us",
    "period": "cpu/cpu.cfs_period_us",
}


@pytest.mark.parametrize(
    ("written", "threads"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"quota": "-1\n", "period": "100000\n"}, 8),
        ({"quota": "300000\n", "period": "100000\n"}, 3),
        ({"quota": "300000\n"}, 8),
    ],
)
def test_a_containers_limit_counts(tmp_path, written, threads):
    """As both versions of control groups write it; without a limit, and without groups, none."""
    (tmp_path / "cpu").mkdir()
    for name, text in written.items():
        (tmp_path / FILES[name]).write_text(text)
    assert least_of(8, tmp_path) == threads
