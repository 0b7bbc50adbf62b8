"""The rules on random series: what is found, and what is not."""

import math
import random

import pytest

from pipeline.nightly.rules import FIGURES, Baseline, baselines, compare, is_suspicious

DECODE = next(f for f in FIGURES if f.name == "decode_tokens_per_second")
RATIO = next(f for f in FIGURES if f.name == "perplexity_ratio")
LOAD = next(f for f in FIGURES if f.name == "load_seconds")


def night(runs, outcome="ok", machine="a", accepted=False):
    return {
        "outcome": outcome,
        "machine": {"key": machine},
        "accepted": accepted,
        "runs": [{DECODE.name: run} for run in runs],
    }


def series(draw, nights, slow_from=None, slow=0.7):
    """Nights as they are lived through: the night of the first alarm, or None."""
    past = []
    for number in range(nights):
        factor = slow if slow_from is not None and number >= slow_from else 1.0
        base = baselines(past, "a", 60, 7)
        runs = [{DECODE.name: 100 * factor * draw()}]
        if is_suspicious(base, runs[0]):
            runs.append({DECODE.name: 100 * factor * draw()})
        found = compare(base, runs, past[-1]["runs"] if past else ())
        if any(finding.regression for finding in found):
            return number
        past.append(night([run[DECODE.name] for run in runs]))
    return None


@pytest.mark.parametrize("slow_from", [10, 30])
def test_a_slowdown_is_found_within_two_nights(slow_from):
    draw = lambda: random.uniform(0.9, 1.1)  # noqa: E731
    found = [series(draw, slow_from + 2, slow_from) for _ in range(40)]
    # About one series in 500 misses it with ten nights of history, none with thirty.
    assert sum(number is not None and number >= slow_from for number in found) >= 38


def test_noise_raises_no_alarm_in_a_hundred_nights():
    draw = lambda: random.uniform(0.9, 1.1)  # noqa: E731
    assert [series(draw, 100) for _ in range(15)] == [None] * 15


def test_a_small_change_is_left_alone_even_without_noise():
    change = random.uniform(0.0, 0.9) * DECODE.tolerance
    assert series(lambda: 1.0, 40, 20, 1 - change) is None
    assert series(lambda: 1.0, 60, 40, 0.7) == 40


def test_median_and_noise_of_a_plain_reference():
    values = [random.gauss(100, 8) for _ in range(random.randint(7, 59))]
    past = [night([value]) for value in values]
    past.insert(3, night([1.0], outcome="regression"))
    past.insert(5, night([1.0], machine="b"))
    base = next(b for b in baselines(past, "a", 60, 7) if b.figure is DECODE)
    ordered = sorted(values)
    n = len(values)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    away = sorted(abs(v - median) for v in values)
    own = 1.4826 * (away[(n - 1) // 2] + away[n // 2]) / 2 / median
    assert base.nights == n and base.median == pytest.approx(median)
    assert base.noise == pytest.approx(math.sqrt((20 * 0.1**2 + n * own**2) / (20 + n)))


def test_only_the_newest_nights_count_and_speed_waits_for_enough():
    past = [night([value]) for value in (1.0, 1.0, 50.0, 51.0, 52.0)]
    (base,) = baselines(past, "a", 3, 3)
    assert (base.median, base.nights) == (51.0, 3)
    assert baselines(past, "a", 60, 6) == ()
    quality = [{**night([]), "runs": [{RATIO.name: 1.01}]}]
    assert [b.figure for b in baselines(quality, "a", 60, 7)] == [RATIO]


def test_accepted_figures_begin_a_new_past():
    past = [night([100.0])] * 20 + [night([60.0], accepted=True)] + [night([61.0])] * 2
    (base,) = baselines(past, "a", 60, 3)
    assert (base.median, base.nights) == (61.0, 3)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.name)
def test_worse_is_the_right_way_round(figure):
    upper = figure.name not in {DECODE.name, "prefill_tokens_per_second", "top1_agreement"}
    assert (figure.worse_by(2.0, 1.0) > 0) == upper
    assert (figure.worse_by(0.5, 1.0) > 0) != upper
    assert figure.worse_by(math.nan, 1.0) == math.inf
    assert figure.worse_by(0.0, 0.0) == 0


def test_one_good_run_is_enough():
    base = [Baseline(DECODE, 100.0, 0.02, 30)]
    assert compare(base, [{DECODE.name: 30.0}, {DECODE.name: 99.0}], ()) == []
    (found,) = compare(base, [{DECODE.name: 30.0}, {DECODE.name: 40.0}], ())
    assert found.regression and "40 is 60.0% worse" in found.words


def test_watched_first_then_a_regression():
    base = [Baseline(DECODE, 100.0, 0.1, 40)]
    runs = [{DECODE.name: 80.0}, {DECODE.name: 78.0}]
    assert [f.regression for f in compare(base, runs, ())] == [False]
    assert [f.regression for f in compare(base, runs, runs)] == [True]
    assert [f.regression for f in compare(base, runs, runs[:1])] == [False]  # once was no proof
    better = [{DECODE.name: 80.0}, {DECODE.name: 99.0}]
    assert [f.regression for f in compare(base, runs, better)] == [False]


def test_quality_without_noise_is_found_at_once():
    base = [Baseline(RATIO, 1.002, 0.0, 1), Baseline(LOAD, 1.0, 0.25, 7)]
    run = {RATIO.name: 1.002 * 1.0021, LOAD.name: 1.2}
    (found,) = compare(base, [run, run], ())
    assert found.figure is RATIO and found.regression
