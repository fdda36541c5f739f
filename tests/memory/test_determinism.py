"""--deterministic holds while tasks are performed, and is gone behind them."""

import os

import pytest
import torch
import torch.backends.cudnn.rnn  # which hides a setting in torch 2.9

from layerwise.errors import ConfigError
from layerwise.memory.determinism import same_bits


def settings() -> list[object]:
    exact = [torch._C._get_fp32_precision_getter("cuda", operation) for operation in ("conv", "rnn", "matmul")]
    return [torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory, *exact]


def test_operations_are_deterministic_and_float32_exact_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = settings()
    with same_bits(True):
        assert settings() == [True, False, "ieee", "ieee", "ieee"]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings() == before
    with same_bits(False):
        assert settings() == before


def test_what_the_user_has_chosen_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with same_bits(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_that_cannot_be_so_is_refused_by_name() -> None:
    x, at = torch.zeros(4), torch.tensor([0, 1])
    with (
        pytest.raises(ConfigError, match=r"--deterministic: put_.* does not have a deterministic implementation"),
        same_bits(True),
    ):
        x.put_(at, torch.ones(2), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
