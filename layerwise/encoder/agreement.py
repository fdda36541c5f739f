"""Whether something computes what the encoder does: on inputs of the run's shape, at several lengths and batch sizes."""

from collections.abc import Callable, Collection, Sequence

import torch

from layerwise.encoder.model import Encoder
from layerwise.errors import ExportError
from layerwise.training.encoder import Origin

TOLERANCE = 1e-4
"""Of the largest feature. Rounding makes about 1e-6 of it, any mistake far more."""

Computes = Callable[[torch.Tensor], torch.Tensor]


def inputs_of_the_run(encoder: Encoder, origin: Origin, may_vary: Collection[int] = (0, 1, 2, 3)) -> list[torch.Tensor]:
    """Three batches of noise: the first of the size that the run was trained on, others where these axes may vary."""
    data, generator = origin.config.data, torch.Generator().manual_seed(0)
    if encoder.entry.takes == "waveforms":
        longer = data.window + 3 * encoder.geometry.hop + 1
        sizes: list[tuple[int, ...]] = [(2, data.window), (1, longer), (3, max(data.window // 2, encoder.shortest))]
        draw = torch.randn
    else:
        channels, side, stride = encoder.entry.frame_shape[0], data.picture, data.patch_stride
        sizes = [
            (2, channels, side, side),
            (1, channels, side + stride, side),
            (3, channels, side, side + 2 * stride + 1),
        ]
        draw = torch.rand
    allowed = [tuple(n if axis in may_vary else sizes[0][axis] for axis, n in enumerate(size)) for size in sizes]
    # In order, and each size once.
    return [draw(*size, generator=generator) * origin.level for size in dict.fromkeys(allowed)]


def largest_difference(computes: Computes, encoder: Encoder, inputs: Sequence[torch.Tensor]) -> float:
    """From the encoder's own output, in units of its largest feature. Raises ExportError beyond TOLERANCE."""
    largest = 0.0
    for x in inputs:
        with torch.no_grad():
            expected, found = encoder(x), computes(x)
        if found.shape != expected.shape:
            raise ExportError(
                f"What was exported gives features of shape {tuple(found.shape)} for an input of {tuple(x.shape)}, and the "
                f"encoder {tuple(expected.shape)}; nothing was kept. Export as safetensors, and please report this."
            )
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"What was exported differs from the encoder by {difference:.1g} of its largest feature for an input of "
                f"{tuple(x.shape)}; nothing was kept. Export as safetensors, and please report this."
            )
        largest = max(largest, difference)
    return largest
