"""Streamed equals whole; padded equals alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d

from layerwise.config import NetOptions
from layerwise.nets import build_network
from layerwise.nets.module import Module
from layerwise.nets.speech import SMALLEST_DEVIATION

KINDS = {"paper": {}, "centred": {"centred": True}, "dense": {"centred": True, "dense": True}}


def speech_module(stage: int | None = None, kind: str = "paper") -> Module:
    network = build_network(NetOptions(width=6, context=5, **KINDS[kind]), (1,))
    layers = range(6) if stage is None else range(stage, stage + 1)
    module = network.build(layers, seed=3, device="cpu")
    module.first_weights_from(some_frames(4, 4000, stage, kind) + 1, np.random.default_rng(0))
    return module


def some_frames(count: int, length: int, stage: int | None, kind: str) -> torch.Tensor:
    """(count, length, C) as a stage reads them: what lies below has found nothing that is negative."""
    frames = torch.randn(count, length, channels_in(stage, kind), generator=torch.Generator().manual_seed(length))
    return frames.relu() if stage else frames


def channels_in(stage: int | None, kind: str) -> int:
    return 6 * (stage if kind == "dense" else 1) if stage else 1


def whole(module: Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, np.full(len(x), x.shape[1]))[1]


def streamed(module: Module, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    states, pieces = None, []
    edges = [0, *sorted(cuts), x.shape[1]]
    for number, (start, stop) in enumerate(pairwise(edges)):
        piece, states = module.push(x[:, start:stop], states, last=number == len(edges) - 2)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 3000), st.one_of(st.none(), st.integers(0, 5)), st.sampled_from([*KINDS]))
def test_streamed_outputs_equal_one_pass(data: st.DataObject, length: int, stage: int | None, kind: str) -> None:
    cuts = data.draw(st.lists(st.integers(0, length), max_size=6))
    module, x = speech_module(stage, kind), some_frames(1, length, stage, kind)
    with torch.no_grad():
        if int(module.out_length(length)) == 0:
            assert streamed(module, x, cuts).shape[1] == 0
        else:
            torch.testing.assert_close(streamed(module, x, cuts), whole(module, x), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(400, 3000), min_size=2, max_size=4), st.sampled_from([*KINDS]))
def test_a_padded_sample_gives_what_it_gives_alone(lengths: list[int], kind: str) -> None:
    module = speech_module(kind=kind)
    samples = [torch.randn(length, 1, generator=torch.Generator().manual_seed(length)) for length in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    with torch.no_grad():
        targets, outputs = module(batch, np.array(lengths))
        for row, sample in enumerate(samples):
            alone_targets, alone = module(sample[None], np.array([len(sample)]))
            count = alone.shape[1]
            torch.testing.assert_close(outputs[row, :count], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(targets[row, :count], alone_targets[0], rtol=1e-5, atol=1e-5)
            assert not outputs[row, count:].any()


@given(st.integers(1, 40_000))
@settings(deadline=None, max_examples=20)
def test_out_length_is_the_length_that_comes_out(length: int) -> None:
    module = speech_module(stage=0)
    expected = int(module.out_length(length))
    if expected:
        assert whole(module, torch.zeros(1, length, 1)).shape[1] == expected


def test_the_convolution_is_torchs_own() -> None:
    module = speech_module(stage=1)
    layer = module.layers["1"]
    x = torch.randn(2, 57, 6)
    reference = torch.relu(conv1d(x.transpose(1, 2), layer.weight, layer.bias, layer.stride, layer.padding))
    torch.testing.assert_close(whole(module, x), reference.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [200, 201, 1777])
def test_the_output_of_a_long_stream_does_not_keep_its_input(length: int) -> None:
    _, states = speech_module(stage=0).push(torch.zeros(1, length, 1), None, last=False)
    assert states[0].untyped_storage().nbytes() <= 10 * 4


def test_a_centred_convolution_is_torchs_own_of_standardised_channels() -> None:
    module = speech_module(stage=1)
    layer = speech_module(stage=1, kind="centred").layers["1"]
    frames = torch.randn(2, 57, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 1
    layer.first_weights_from(frames, np.random.default_rng(0))
    read = (frames - frames.mean((0, 1))) / (frames.flatten(0, 1).std(0, correction=0) + SMALLEST_DEVIATION)
    weight, bias = layer.weight - layer.weight.mean(0), layer.bias - layer.bias.mean()
    expected = conv1d(read.transpose(1, 2), weight, bias, layer.stride)
    torch.testing.assert_close(layer.valid(frames), torch.relu(expected).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert expected.mean(1).abs().max() < 1e-5  # so that at every frame some channels lie above 0
    assert module.layers["1"].weight.equal(layer.weight)  # the same first weights otherwise


def test_a_dense_layer_adds_its_channels_to_the_means_of_those_that_it_reads() -> None:
    convolution, recurrence = (speech_module(stage, "dense").layers[str(stage)] for stage in (2, 5))
    frames = some_frames(2, 57, 2, "dense")
    read = torch.nn.functional.avg_pool1d(frames.transpose(1, 2), 4, stride=2, padding=2).transpose(1, 2)
    assert convolution(frames)[..., :12].equal(read)
    frames = some_frames(2, 57, 5, "dense")
    assert recurrence(frames)[..., :30].equal(frames)
    standardised = (frames - recurrence.mean) / recurrence.deviation
    assert recurrence(frames)[..., 30:].equal(recurrence.gru(standardised)[0])


def test_a_dense_layer_takes_any_padding_that_a_convolution_takes() -> None:
    options = NetOptions(width=6, context=0, centred=True, dense=True, kernels=[3, 4], strides=[1, 2], paddings=[2, 4])
    module = build_network(options, (1,)).build(range(2), seed=3, device="cpu")
    x = torch.randn(2, 50, 1)
    with torch.no_grad():
        torch.testing.assert_close(streamed(module, x, [7, 20]), whole(module, x), rtol=1e-5, atol=1e-5)


def test_filters_of_a_waveform_hear_its_loud_low_part_less() -> None:
    untouched = build_network(NetOptions(width=6), (1,)).build(range(1), seed=3, device="cpu").layers["0"].weight
    module = speech_module(0, "centred")
    layer = module.layers["0"]
    rng = torch.Generator().manual_seed(0)
    noise, tone = torch.randn(3, 20_000, 1, generator=rng), torch.sin(torch.arange(20_000) * 0.05)[:, None]

    def louder(weight: torch.Tensor) -> float:
        """How much more filters answer to the tone than to the noise."""
        of_tone, of_noise = (conv1d(x.transpose(0, 1)[None], weight).square().mean() for x in (tone, noise[0]))
        return (of_tone / of_noise).item()

    for waveforms, least, most in ((noise, 0.95, 1.05), (noise * 0.1 + tone, 0.05, 0.2)):
        layer.weight.data.copy_(untouched)
        module.first_weights_from(waveforms, np.random.default_rng(0))
        assert least < louder(layer.weight) / louder(untouched) < most
    layer.weight.data.copy_(untouched)
    module.first_weights_from(torch.zeros(3, 100, 1), np.random.default_rng(0))  # of silence nothing is known
    torch.testing.assert_close(layer.weight, untouched)
