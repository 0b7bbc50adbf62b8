"""Experts on the CPU through a kernel of our own, which reads them as records (`records.py`).

It is compiled when the package is installed, where there is a C compiler; without one, torch's own
products serve (`pipeline.hybrid.backends`).
"""
