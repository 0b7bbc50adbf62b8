"""`requant nightly`: validate models again, compare with their history, say what changed.

jobs.py      what to validate: nightly recipes, conversion recipes, models, Hub ids
worker.py    one job, in a process of its own
attempt.py   starts that process, with a time limit, and says how it ended
history.py   one row per job and night, kept by trackio
rules.py     what counts as a regression, and what is noise
night.py     all of it, in order
outputs.py   JSON, JUnit XML, Markdown; notify.py: webhook and GitHub step summary
"""
