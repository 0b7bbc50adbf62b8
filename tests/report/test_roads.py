"""Where experts were, in words."""

import pytest

from pipeline.hybrid.generate import Generated
from pipeline.report.roads import by_layer, by_road
from pipeline.report.tables import stats_tables


def test_copies_that_followed_use_have_a_row():
    use = {"0": {"zero-copy": 0.25, "resident": 0.75}, "1": {"resident": 1.0}}
    rows = by_road({"zero-copy": 1 << 20}, use)
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("resident", "copies", "87.50\u00a0%"),
        ("zero-copy", "1.0 MiB", "12.50\u00a0%"),
    ]


@pytest.mark.parametrize("resident", [0.0, 0.2])
def test_divided_calls_are_the_cpus(resident):
    use = {"0": {"resident": resident, "zero-copy": 0.3, "cpu": 0.7 - resident}}
    rows = by_road({"zero-copy": 1 << 20}, use)
    assert (rows[-1][0], rows[-1][2]) == ("cpu", "those of zero-copy")
    placed = {
        "request": "fill", "device": "cuda:0", "load_seconds": 1.0,
        "expert_bytes": {"zero-copy": 5}, "prompts": "", "cpu_calls": 6,
        "backends": {"experts": {"triton": 2}}, "ledger": {},
        "experts": {"0": "zero-copy"},
    }  # fmt: skip
    made = Generated(5, 6, 1.0, 1.0, placed, use, use)
    cells = list(stats_tables(made)[0].columns[1].cells)
    most = "at most " if resident else ""
    assert f"in decoding, the CPU computes {most}6 of a token's a layer" in cells


def test_layers_show_roads_that_calls_took():
    head, rows = by_layer({"0": "zero-copy"}, {"decode": {"0": {"resident": 1.0}}})
    assert head == ["layer", "resident", "zero-copy", "decode: resident", "decode: zero-copy"]
    assert rows == [["0", "", "all", "100.00\u00a0%", "0.00\u00a0%"]]


def test_roads_without_bytes_and_calls_are_left_out():
    assert [row[0] for row in by_road({"cpu": 5, "resident": 0}, {})] == ["cpu"]
