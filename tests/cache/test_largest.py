"""The largest absolute value, by which a cache knows whether its dtype can hold an output."""

import math

import pytest
import torch

from layerwise.cache.dtypes import largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("worst", [-3.0, math.inf, -math.inf, math.nan])
def test_it_is_found_however_the_values_lie(dtype: torch.dtype, worst: float) -> None:
    values = torch.zeros(3, 4, 6, dtype=dtype)
    values[1, 2, 3] = worst
    expected = torch.tensor(abs(worst), dtype=dtype)
    for view in (
        values,
        values.transpose(1, 2),
        values.permute(2, 0, 1),
        values[..., 1:5],
        values[:, 2, 3],
        values[1, 2, 3],
    ):
        torch.testing.assert_close(largest(view), expected, equal_nan=True)


def test_of_no_values_it_is_zero() -> None:
    assert largest(torch.zeros(2, 0, 3, dtype=torch.float16)) == 0
