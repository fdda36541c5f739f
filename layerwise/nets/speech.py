"""The paper's speech network: strided convolutions with ReLU, then a GRU.

Löwe et al. 2019, appendix A.2; van den Oord et al. 2018. With net.dense a layer's channels lie beside those that it reads, as
in DenseNet (Huang et al. 2017, arXiv 1608.06993): a module adds to what those below have found.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.config import NetOptions
from layerwise.nets.channel_statistics import take_statistics
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network


def speech_network(net: NetOptions, channels_in: int = 1) -> Network:
    """One layer, and one of the paper's modules, per convolution; the GRU is the last where net.context is not 0."""
    layers: list[Callable[[], Layer]] = []
    for kernel, stride, padding in zip(net.kernels, net.strides, net.paddings, strict=True):
        beside = net.dense and bool(layers)  # the data themselves are not handed on
        kind = DenseConvolution if beside else CentredConvolution if net.centred else Convolution
        layers.append(partial(kind, channels_in, net.width, kernel, stride, padding))
        channels_in = net.width + channels_in * beside
    if net.context:
        layers.append(partial(DenseRecurrence if net.dense else Recurrence, channels_in, net.context))
    return Network(layers, natural_cut=(1,) * len(layers))


class Convolution(Layer):
    """Conv1d and ReLU, without normalisation.

    Computed as a flat two-dimensional convolution in channels-last order: input and output then lie frame-major in
    memory as they are cached, with no transposed copies, and at width 128 on a CPU it takes half the time of Conv1d.
    """

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.channels_out = kernel, stride, padding, channels
        conv = nn.Conv1d(channels_in, channels, kernel)
        self.weight, self.bias = conv.weight, cast(nn.Parameter, conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _frames(self._found(x, self.padding))

    def arrange_for_gpu(self) -> None:
        """Channels last, as the input is."""
        self.weight.data = self.weight.data.transpose(1, 2).contiguous().transpose(1, 2)

    def valid(self, x: torch.Tensor) -> torch.Tensor:
        return _frames(self._found(x, padding=0))

    def before_activation(self, x: torch.Tensor) -> torch.Tensor:
        return _frames(self._convolve(x, self.padding))

    def activation(self, y: torch.Tensor) -> torch.Tensor:
        return F.relu_(y)

    def push(self, x: torch.Tensor, state: torch.Tensor | None, last: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The state is the tail of the input that later outputs still need."""
        edge = x.new_zeros(x.shape[0], self.padding, *x.shape[2:])
        x = torch.cat([edge if state is None else state, x] + [edge] * last, dim=1)
        ready = max((x.shape[1] - self.kernel) // self.stride + 1, 0)
        tail = None if last else x[:, ready * self.stride :].clone()
        if ready == 0:
            return x.new_zeros(x.shape[0], 0, self.channels_out), tail
        return self.valid(x[:, : (ready - 1) * self.stride + self.kernel]), tail

    def _found(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        """What comes out, as a picture (B, C', 1, L')."""
        # In place before the views of it are made: autograd would copy a view twice on its way back.
        return F.relu_(self._convolve(x, padding))

    def _convolve(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        """Frames (B, L, C) to a picture (B, C', 1, L') in channels-last order."""
        picture, (weight, bias) = x.transpose(1, 2).unsqueeze(2), self.filters()
        return F.conv2d(picture, weight.unsqueeze(2), bias, stride=(1, self.stride), padding=(0, padding))

    def filters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (C', C, kernel) and bias (C') by which inputs are multiplied."""
        return self.weight, self.bias


class CentredConvolution(Convolution):
    """A convolution of standardised channels, by filters that are centred over the channels that come out.

    At every frame some of these lie above their mean, and the ReLU lets them through: no channel stays silent for good, and
    few directions do not take all of the variance. The standardising is a part of the filters: what is padded stays zero.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__(channels_in, channels, kernel, stride, padding)
        self.register_buffer("mean", torch.zeros(channels_in))
        self.register_buffer("deviation", torch.ones(channels_in))

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Mean and deviation of the channels of frames (B, L, C). A waveform's filters are whitened in their place."""
        if x.shape[2] > 1:
            take_statistics(self.mean, self.deviation, x.transpose(1, 2).split(AT_ONCE), SMALLEST_DEVIATION)
        else:
            self.weight.copy_((self.weight[:, 0] @ _emphasis(x[..., 0], self.kernel)).unsqueeze(1))

    def filters(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = (self.weight - self.weight.mean(0)) / self.deviation[:, None]
        bias = self.bias - self.bias.mean() - (weight * self.mean[:, None]).sum((1, 2))
        return weight, bias


class DenseConvolution(CentredConvolution):
    """A centred convolution of what such layers have found, whose channels (C') lie behind those that it reads (C)."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__(channels_in, channels, kernel, stride, padding)
        self.channels_in, self.channels_out = channels_in, channels_in + channels

    def before_activation(self, x: torch.Tensor) -> torch.Tensor:
        return _frames(torch.cat([self._read(x, self.padding), self._convolve(x, self.padding)], 1))

    def activation(self, y: torch.Tensor) -> torch.Tensor:
        read, found = y.split([self.channels_in, self.channels_out - self.channels_in], -1)
        return torch.cat([read, F.relu(found)], -1)

    def _found(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        return torch.cat([self._read(x, padding), super()._found(x, padding)], 1)

    def _read(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        """Means of the frames that a filter sees, (B, C, 1, L')."""
        # As a convolution: a program that is exported with avg_pool2d takes inputs of one length alone.
        each = x.new_full((x.shape[2], 1, 1, self.kernel), 1 / self.kernel)
        picture = x.transpose(1, 2).unsqueeze(2)
        return F.conv2d(picture, each, stride=(1, self.stride), padding=(0, padding), groups=x.shape[2])


SMALLEST_DEVIATION = 1e-3
"""What a channel that never varies is divided by."""

AT_ONCE = 32
"""Windows whose channels are summed up."""


def _emphasis(waveforms: torch.Tensor, kernel: int) -> torch.Tensor:
    """[kernel, kernel]: divides every direction of the stretches of waveforms (B, L) by its deviation, beside that of all.

    As pre-emphasis does, it keeps the low and loud part of a voice from being all that random filters hear. The quietest
    directions, which are noise, are not made as loud as the others.
    """
    products = torch.zeros(kernel, kernel, dtype=torch.float64)
    for waveform in waveforms:
        stretches = waveform.unfold(0, kernel, 1) if len(waveform) >= kernel else waveform.new_zeros(0, kernel)
        for some in stretches.split(max(NUMBERS_AT_ONCE // kernel, 1)):
            numbers = some.double()
            products += numbers.T @ numbers
    variance, directions = torch.linalg.eigh(products)
    mean = variance.mean() or torch.ones(())  # of silence nothing is known
    return (directions * (1 + variance.clamp(min=0) / mean).rsqrt() @ directions.T).to(waveforms.dtype)


NUMBERS_AT_ONCE = 2**18
"""Of a waveform, each as often as stretches hold it."""


def _frames(picture: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, L) to (B, L, C), a view."""
    return picture.squeeze(2).transpose(1, 2)


class Recurrence(Layer):
    """A GRU over the frames; its output at t is the context c_t of frames 0 to t."""

    recurrent = True

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels_in, channels, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]

    def push(self, x: torch.Tensor, state: torch.Tensor | None, last: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The state is the hidden state after the last frame."""
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, self.gru.hidden_size), state
        return self.gru(x, state)


class DenseRecurrence(Recurrence):
    """A GRU over standardised frames, whose context lies behind the channels that it reads."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels)
        self.register_buffer("mean", torch.zeros(channels_in))
        self.register_buffer("deviation", torch.ones(channels_in))

    def first_weights_from(self, x: torch.Tensor, rng: np.random.Generator) -> None:
        """Mean and deviation of the channels of frames (B, L, C)."""
        take_statistics(self.mean, self.deviation, x.transpose(1, 2).split(AT_ONCE), SMALLEST_DEVIATION)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, super().forward(self._standardised(x))], 2)

    def push(self, x: torch.Tensor, state: torch.Tensor | None, last: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, state = super().push(self._standardised(x), state, last)
        return torch.cat([x, context], 2), state

    def _standardised(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation
