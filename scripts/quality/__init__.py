"""What `bench_quality.py` is made of: one source, our rows and the peers', one evaluator, a table.

Only `quality.peers` is imported in the peers' own environments; it must not import the package.
"""
