import pytest

from pipeline.errors import UserError
from pipeline.sizes import parse_size


def test_sizes():
    assert parse_size("10GiB") == 10 * 2**30
    assert parse_size("1.5 MB") == 1_500_000
    assert parse_size("123") == parse_size(123) == 123


@pytest.mark.parametrize("text", ["", "plenty", "10 bananas", "GiB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not a size") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)
