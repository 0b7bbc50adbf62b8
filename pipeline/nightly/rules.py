"""What counts as a regression, and what is noise.

A figure of tonight is compared with the median of the good nights before it on the same machine.
Their noise is 1.4826 times the median absolute deviation (the standard deviation, if the noise is
normal), drawn towards what is usual for such a figure as long as there are few nights.  From it:

- *suspicious*: worse than the median by the figure's tolerance and by GATE times the noise.  A job
  with a suspicious figure, or one that misses an absolute bound, is run again.
- *regression at once*: the better of the two runs is worse by ONE_NIGHT times the noise.
- *regression in two nights*: all runs of tonight and of last night are suspicious, and their mean
  is worse by TWO_NIGHTS times the noise of such a mean.
- *watched*: both runs are suspicious, and that is all that can be said tonight.

The factors come from simulated series (scripts/nightly/simulate.py; rates in docs/nightly.md).
First runs alone make the median and the noise: a second run is made only after a bad first one, so
taking the better would make the history look better and steadier than the machine is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.build import UPPER

GATE = 0.7
ONE_NIGHT = 3.0
TWO_NIGHTS = 3.6
PRIOR_NIGHTS = 20
"""How many nights the usual noise of a figure counts for, beside the nights seen."""
MEDIAN_VARIANCE = math.pi / 2
"""Variance of the median of n normal values, times n, in units of their variance."""


@dataclass(frozen=True)
class Figure:
    """A key of the report that is compared with its past."""

    name: str
    title: str
    tolerance: float
    """Relative change for the worse that is never reported."""
    noise: float
    """Usual relative noise from night to night; 0: none on one machine, compared at once."""

    def worse_by(self, value: float, median: float) -> float:
        """Relative change for the worse (negative: better); infinite for NaN."""
        if not math.isfinite(value):
            return math.inf
        change = (value - median) / max(abs(median), 1e-9)
        return change if self.name in UPPER else -change


FIGURES = (
    Figure("perplexity_ratio", "perplexity ratio", 0.002, 0.0),
    Figure("kl_divergence", "KL divergence", 0.05, 0.0),
    Figure("top1_agreement", "top-1 agreement", 0.01, 0.0),
    Figure("decode_tokens_per_second", "decode, tokens/s", 0.08, 0.10),
    Figure("prefill_tokens_per_second", "prefill, tokens/s", 0.08, 0.10),
    Figure("load_seconds", "load time, s", 0.25, 0.25),  # the page cache may be cold
    Figure("peak_host_bytes", "peak host memory", 0.05, 0.02),
    Figure("peak_device_bytes", "peak device memory", 0.02, 0.01),
)


@dataclass(frozen=True)
class Baseline:
    """The past of one figure of one job on one machine."""

    figure: Figure
    median: float
    noise: float
    """Relative, of one run."""
    nights: int

    def suspicious(self, value: float) -> bool:
        """Whether one run's value asks for a second run."""
        limit = max(self.figure.tolerance, GATE * self.noise)
        return self.figure.worse_by(value, self.median) > limit

    def beyond(self, worse: float, factor: float, runs: int) -> bool:
        """Whether a mean of `runs` values is worse by `factor` times its noise."""
        noise = self.noise * math.sqrt(1 / runs + MEDIAN_VARIANCE / self.nights)
        return worse > max(self.figure.tolerance, factor * noise)


@dataclass(frozen=True)
class Finding:
    """What a comparison with the past says of one figure."""

    figure: Figure
    regression: bool
    """False: watched."""
    words: str


def baselines(
    records: Sequence[Mapping[str, Any]], machine: str, nights: int, minimum: int
) -> tuple[Baseline, ...]:
    """Medians and noises of the good nights on `machine` since figures were last accepted."""
    accepted = [i for i, record in enumerate(records) if record["accepted"]]
    since = records[accepted[-1] :] if accepted else records
    good = [r for r in since if r["outcome"] == "ok" and r["machine"]["key"] == machine]
    found = []
    for figure in FIGURES:
        values = [float(v) for r in good if (v := r["runs"][0].get(figure.name)) is not None]
        values = values[-nights:]
        if len(values) >= (minimum if figure.noise else 1):
            found.append(_baseline(figure, values))
    return tuple(found)


def _baseline(figure: Figure, values: Sequence[float]) -> Baseline:
    median = statistics.median(values)
    deviation = statistics.median(abs(v - median) for v in values) / max(abs(median), 1e-9)
    own, usual = 1.4826 * deviation, figure.noise
    n = len(values)
    noise = math.sqrt((PRIOR_NIGHTS * usual**2 + n * own**2) / (PRIOR_NIGHTS + n))
    return Baseline(figure, median, noise, n)


def is_suspicious(past: Sequence[Baseline], run: Mapping[str, Any]) -> bool:
    """Whether any figure of one run is worse than usual."""
    return any(b.suspicious(run[b.figure.name]) for b in past if b.figure.name in run)


def compare(
    past: Sequence[Baseline],
    runs: Sequence[Mapping[str, Any]],
    last_night: Sequence[Mapping[str, Any]],
) -> list[Finding]:
    """Figures that are worse in every run of tonight.

    `runs`: the figures of tonight's runs; `last_night`: those of the night before if it was on the
    same machine, else nothing.
    """
    found = []
    for base in past:
        name = base.figure.name
        tonight = [float(run[name]) for run in runs if name in run]
        before = [float(v) for run in last_night if (v := run.get(name)) is not None]
        if not tonight or not all(map(base.suspicious, tonight)):
            continue
        worse = [base.figure.worse_by(value, base.median) for value in tonight]
        regression = base.beyond(min(worse), ONE_NIGHT, 1)
        if not regression and len(before) > 1 and all(map(base.suspicious, before)):
            worse += [base.figure.worse_by(value, base.median) for value in before]
            regression = base.beyond(statistics.fmean(worse), TWO_NIGHTS, len(worse))
        found.append(Finding(base.figure, regression, _words(base, tonight)))
    return found


def _words(base: Baseline, values: Sequence[float]) -> str:
    worse = [base.figure.worse_by(value, base.median) for value in values]
    value = values[worse.index(min(worse))]
    nights = "1 night" if base.nights == 1 else f"{base.nights} nights"
    return (
        f"{base.figure.name} {_number(value)} is {min(worse):.1%} worse than the median of"
        f" {nights}, {_number(base.median)} (noise {base.noise:.1%})"
    )


def _number(value: float) -> str:
    """Five digits, and never a power of ten for what people count: tokens and bytes."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.5g}"
