"""How often the rules of `requant nightly` cry wolf, and how often they sleep.

    python scripts/nightly/simulate.py [--series 2000] [--seed N]

Series of decode speeds are drawn with fresh seeds and lived through night by night, with the
package's own rules: a suspicious night is measured again, good nights become the past of the next.
Two questions, for each kind of noise:

- quiet: of series of 100 nights without a change, how many see no alarm at all;
- found: of series whose speed falls to 70 % after 10, 20, 40 or 60 nights, how many see the alarm
  on the first or second slow night (series that cried wolf before are drawn again).
"""

from __future__ import annotations

import argparse
import random
import secrets
from collections.abc import Callable

from pipeline.nightly.rules import FIGURES, baselines, compare, is_suspicious

FIGURE = next(figure for figure in FIGURES if figure.name == "decode_tokens_per_second")
NIGHTS, MINIMUM = 60, 7  # the defaults of a nightly recipe
QUIET_NIGHTS = 100
SLOW = 0.7

Noise = Callable[[random.Random], float]


def _disturbed(rng: random.Random) -> float:
    """5 % of normal noise, and once in 33 runs something else takes half of the machine."""
    return rng.gauss(1, 0.05) * (0.5 if rng.random() < 0.03 else 1.0)


KINDS: dict[str, Noise] = {
    "uniform, up to 10 % either way": lambda rng: rng.uniform(0.9, 1.1),
    "normal, standard deviation 2 %": lambda rng: rng.gauss(1, 0.02),
    "normal, standard deviation 5 %": lambda rng: rng.gauss(1, 0.05),
    "normal, standard deviation 10 %": lambda rng: max(rng.gauss(1, 0.10), 0.2),
    "normal 5 %, 3 % of runs halved": _disturbed,
}


def live(
    noise: Noise, rng: random.Random, nights: int, slow_from: int | None
) -> tuple[int | None, int]:
    """One series: the night of its first alarm, and how many nights were measured twice."""
    past: list[dict[str, object]] = []
    last: list[dict[str, float]] = []
    twice = 0
    for night in range(nights):
        speed = 100.0 * (SLOW if slow_from is not None and night >= slow_from else 1.0)
        base = baselines(past, "machine", NIGHTS, MINIMUM)
        runs = [{FIGURE.name: speed * noise(rng)}]
        if is_suspicious(base, runs[0]):
            runs.append({FIGURE.name: speed * noise(rng)})
            twice += 1
        if any(found.regression for found in compare(base, runs, last)):
            return night, twice
        past.append(
            {"outcome": "ok", "accepted": False, "machine": {"key": "machine"}, "runs": runs}
        )
        last = runs
    return None, twice


def main() -> None:
    """Print one line per kind of noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--series", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.series} series for each figure")
    for title, noise in KINDS.items():
        rng = random.Random(f"{given.seed} {title}")
        ends = [live(noise, rng, QUIET_NIGHTS, None) for _ in range(given.series)]
        quiet = sum(alarm is None for alarm, _ in ends)
        twice = sum(count for _, count in ends) / sum(
            QUIET_NIGHTS if alarm is None else alarm + 1 for alarm, _ in ends
        )
        words = [f"quiet {quiet}/{given.series}", f"measured twice {twice:.1%}"]
        for start in (10, 20, 40, 60):
            first = second = drawn = 0
            while drawn < given.series:
                alarm, _ = live(noise, rng, start + 2, start)
                if alarm is not None and alarm < start:
                    continue
                drawn += 1
                first += alarm == start
                second += alarm is not None
            words.append(f"after {start}: {first}, within two {second}")
        print(f"{title}: {'; '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
