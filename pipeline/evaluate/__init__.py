"""How good and how fast a model is: windows of text, a compact record of the source, comparisons.

Knows models only as something that turns token ids into logits; knows no recipe and no stage.
"""
