import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CalibrationError
from pipeline.evaluate.windows import Windows, sliding_windows


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_each_token_is_scored_once_with_enough_context(data):
    length = data.draw(st.integers(2, 24))
    stride = data.draw(st.integers(1, length))
    total = data.draw(st.integers(length, 120))
    tokens = torch.arange(1000, 1000 + total)  # a token's value tells where it came from
    windows = sliding_windows(tokens, length, stride)
    assert not windows.scored[:, 0].any()
    scored = windows.token_ids[windows.scored]
    assert scored.unique().numel() == scored.numel()
    if stride < length:
        assert sorted(scored.tolist()) == list(range(1001, 1000 + total))
    for row in range(1, len(windows)):
        assert windows.scored[row].nonzero().min() >= length - stride


def test_stride_equal_to_length_skips_first_tokens():
    windows = sliding_windows(list(range(12)), 4, 4)
    assert windows.token_ids[windows.scored].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]


def test_limit_keeps_the_first_windows():
    assert len(sliding_windows(range(100), 10, 5, limit=3)) == 3
    assert sliding_windows(range(100), 10, 5, limit=3).stride == 5


def test_short_text_is_the_users_to_mend():
    with pytest.raises(CalibrationError, match="7 tokens, one window needs 8"):
        sliding_windows(range(7), 8, 4)


@pytest.mark.parametrize(("length", "stride", "limit"), [(1, 1, None), (8, 0, None), (8, 9, None)])
def test_impossible_geometry(length, stride, limit):
    with pytest.raises(ValueError, match="stride"):
        sliding_windows(range(20), length, stride, limit)


def test_windows_check_themselves():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    scored = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="first token"):
        Windows(ids, scored)
    scored[:, 0] = False
    scored[1] = False
    with pytest.raises(ValueError, match="every window"):
        Windows(ids, scored)
