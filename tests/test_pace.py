"""What a plan reckons with: probes that find a rate, and what of a job counts."""

import math

import pytest
import torch

from pipeline.pace import DISK_BYTES_PER_SECOND, JOB_SECONDS, PROBE_BYTES, matrix_rate, read_rate
from pipeline.plan import Plan
from pipeline.stages.context import Job


def _plan(device="cuda", read=8e9):
    return Plan((), device, 50e12, 700e12, read, 0, 0, 0)


def _job(stage="requantize", **what):
    return Job(stage, "unit", (), (), **what)


def test_probes_find_rates(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < matrix_rate(torch.device("cpu"), dtype) < math.inf
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(1000))
    assert read_rate([small]) == DISK_BYTES_PER_SECOND  # tells nothing
    with large.open("wb") as stream:
        stream.truncate(20 * PROBE_BYTES)  # takes no room
    assert 0 < read_rate([small, large]) < math.inf


def test_the_slowest_of_a_job_counts():
    job = _job(flops=1e14, bytes_read=8_000_000_000, bytes_written=600_000_000)
    assert _plan().job_seconds(job) == pytest.approx(2 + JOB_SECONDS)
    assert _plan(read=2e9).job_seconds(job) == pytest.approx(4 + JOB_SECONDS)
    assert _plan("cpu").job_seconds(job) == pytest.approx(6 + JOB_SECONDS)  # a third of the rate
    result = _job("validate", bytes_read=2_400_000_000)  # is not the source: its rate is unknown
    assert _plan().job_seconds(result) == pytest.approx(2 + JOB_SECONDS)


def test_columns_take_their_time_on_a_gpu():
    few, many = (_job(flops=flops, steps=200_000) for flops in (5e12, 4e13))
    assert _plan().job_seconds(few) == pytest.approx(1.1 + JOB_SECONDS)
    assert _plan().job_seconds(many) == pytest.approx(1.8 + JOB_SECONDS)
    assert _plan("cpu").job_seconds(_job(steps=200_000)) == JOB_SECONDS


def test_saving_is_more_to_write():
    job = _job(flops=1e14, bytes_written=1_200_000_000, bytes_scratch=6_000_000_000)
    assert _plan().job_seconds(job) == pytest.approx(2 + JOB_SECONDS)  # beside the computing
    job = _job(flops=5e13, bytes_written=1_200_000_000, bytes_scratch=6_000_000_000)
    assert _plan().job_seconds(job) == pytest.approx(1.1 + JOB_SECONDS)  # a tenth, no more
