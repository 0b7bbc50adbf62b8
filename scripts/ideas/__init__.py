"""Ways to solve experts that were tried and not taken, for scripts/bench_ideas.py."""
