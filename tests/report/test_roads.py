"""Where experts were, in words."""

from pipeline.report.roads import by_layer, by_road


def test_copies_that_followed_use_have_a_row():
    use = {"0": {"zero-copy": 0.25, "resident": 0.75}, "1": {"resident": 1.0}}
    rows = by_road({"zero-copy": 1 << 20}, use)
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("resident", "copies", "87.50\u00a0%"),
        ("zero-copy", "1.0 MiB", "12.50\u00a0%"),
    ]


def test_layers_show_roads_that_calls_took():
    head, rows = by_layer({"0": "zero-copy"}, {"decode": {"0": {"resident": 1.0}}})
    assert head == ["layer", "resident", "zero-copy", "decode: resident", "decode: zero-copy"]
    assert rows == [["0", "", "all", "100.00\u00a0%", "0.00\u00a0%"]]


def test_roads_without_bytes_and_calls_are_left_out():
    assert [row[0] for row in by_road({"cpu": 5, "resident": 0}, {})] == ["cpu"]
