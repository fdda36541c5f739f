"""Which rows of a picture an output depends on, found by sending numbers that are none (NaN) through the network.

Whatever is computed from such a number is none either, so this needs to know nothing of the layers.
"""

import numpy as np
import torch

from layerwise.nets.network import Network, memoised_per

NUMBERS_AT_ONCE = 2**22
"""Of the input. A row of each picture is none, and each picture has another one."""


@memoised_per(Network)
def rows_seen(network: Network, layers: range, frame_shape: tuple[int, ...]) -> np.ndarray:
    """bool [rows of an output frame, rows of an input frame], by the module of these layers; on the CPU.

    frame_shape: of its input, (C, H, ...); the rows are those of the first axis behind the channels.
    """
    module = network.build(layers, 0, "cpu").eval()
    height = frame_shape[1]
    at_once = max(NUMBERS_AT_ONCE // int(np.prod(frame_shape)), 1)
    picture = torch.rand(1, 1, *frame_shape, generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad():
        for rows in torch.arange(height).split(at_once):
            pictures = picture.repeat(len(rows), *[1] * (picture.dim() - 1))
            pictures[torch.arange(len(rows)), 0, :, rows] = torch.nan
            outputs = module(pictures, np.ones(len(rows), dtype=np.int64))[1][:, 0]
            seen.append(outputs.isnan().movedim(2, 1).flatten(2).any(2))
    return torch.cat(seen).T.numpy()


def rows_between(seen: np.ndarray, cells: int) -> int | None:
    """Rows of cells to leave out between two cells of an output, so that they see no row of the picture in common.

    seen: bool [rows of the output, rows of the picture]; cells: rows of cells, which share the rows of the output evenly. None
    where even the first and the last cell have one in common.
    """
    of_cells = np.stack([rows.any(0) for rows in np.array_split(seen, cells)]).astype(np.int64)
    first, second = np.nonzero(of_cells @ of_cells.T)
    apart = int(np.abs(first - second).max(initial=0))
    return apart if apart < cells - 1 else None
