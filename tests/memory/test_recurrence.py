"""A recurrent layer that is rehearsed in fewer, wider steps takes as much as it does in real ones, or hardly more."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.memory.meter import Meter, fake_tensors, rehearsal
from layerwise.memory.recurrence import FoldedFrames

CPU = torch.device("cpu")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: nn.GRU(8, 16, batch_first=True),
    "GRU, frames first": lambda: nn.GRU(8, 16),
    "GRU, both ways, two layers": lambda: nn.GRU(8, 16, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM": lambda: nn.LSTM(8, 16, batch_first=True),
    "RNN": lambda: nn.RNN(8, 16, batch_first=True),
}


def step(
    build: Callable[[], nn.Module], channels_first: bool, trained: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the outputs of a layer, forward, and backward where it is trained."""
    layer = build()
    frames = torch.zeros(4, 8, 128).transpose(1, 2) if channels_first else torch.zeros(4, 128, 8)
    if not layer.batch_first:
        frames = frames.transpose(0, 1)
    with contextlib.nullcontext() if trained else torch.no_grad():
        outputs, _ = layer(frames.requires_grad_(trained))
        if trained:
            (outputs * 2).relu().sum().backward()
    return outputs.shape, outputs.stride()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_it_takes_no_less_than_real_steps_and_hardly_more(
    build: Callable[[], nn.Module], channels_first: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # as in networks that are traced
    with Meter(CPU) as real:
        expected = step(build, channels_first, trained)
    with rehearsal() as folded:
        assert step(build, channels_first, trained) == expected
    assert 1 <= folded.peak / real.peak <= 1.08


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_it_takes_an_eighth_of_the_operations_for_an_eighth_of_the_steps() -> None:
    counts = []
    for mode in (contextlib.nullcontext(), FoldedFrames(lambda: 0)):
        with fake_tensors(), Operations() as operations, mode:
            step(LAYERS["GRU"], channels_first=False, trained=True)
        counts.append(operations.count)
    assert 0.1 < counts[1] / counts[0] < 0.25


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_packed_sequences_are_taken_as_they_are(kind: type[nn.RNNBase]) -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(128, 4, 8), torch.tensor([128, 100, 90, 80]))
    layer = kind(8, 16)
    with FoldedFrames(lambda: 0):
        assert layer(packed)[0].data.shape == (398, 16)


def test_tensors_with_values_are_taken_as_they_are() -> None:
    """A rehearsal may be what first asks whether a recurrent layer ties samples together, which is tried on real ones."""
    layer, frames = nn.LSTM(8, 16, batch_first=True), torch.randn(2, 64, 8)
    expected = layer(frames)[0]
    with FoldedFrames(lambda: 0):
        assert torch.equal(layer(frames)[0], expected)


def test_a_number_of_frames_without_a_divisor_is_taken_as_it_is() -> None:
    with rehearsal():
        outputs, state = nn.GRU(8, 16, batch_first=True)(torch.zeros(4, 127, 8))
    assert (outputs.shape, state.shape) == ((4, 127, 16), (1, 4, 16))
