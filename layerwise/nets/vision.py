"""The paper's vision network: the first three modules of a ResNet-50, on patches (Löwe et al. 2019, appendix A.1)."""

from collections.abc import Callable
from functools import partial

from layerwise.config import NetOptions
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.nets.residual import EXPANSION, Bottleneck, Stem


def vision_network(net: NetOptions, channels_in: int) -> Network:
    """One layer per residual block; module m has net.blocks[m] blocks of width net.width * 2**m."""
    layers: list[Callable[[], Layer]] = [partial(Stem, channels_in, net.width, net.stem_stride)]
    channels_in = net.width * EXPANSION
    for module, blocks in enumerate(net.blocks):
        width = net.width * 2**module
        for block in range(blocks):
            if module == block == 0:
                continue
            stride = 2 if module > 0 and block == 0 else 1
            layers.append(partial(Bottleneck, channels_in, width, stride))
            channels_in = width * EXPANSION
    return Network(layers, natural_cut=net.blocks)
