"""Spans of a cache: neighbouring blocks that one process writes while others write the rest of the same file."""

from dataclasses import dataclass
from itertools import pairwise

from layerwise.cache.layout import Layout


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks `first` to `stop`, whole chains; blocks end inside rows, so the rows of two spans overlap."""

    layout: Layout
    first: int
    stop: int

    @property
    def start_byte(self) -> int:
        """Of the activations."""
        return min(self.first * self.layout.block_bytes, self.layout.activation_bytes)

    @property
    def stop_byte(self) -> int:
        return min(self.stop * self.layout.block_bytes, self.layout.activation_bytes)

    @property
    def stop_row(self) -> int:
        """Behind the last row that has bytes in it; for int8, behind the last whole group of rows."""
        layout = self.layout
        rows = -(-self.stop_byte // layout.row_bytes)
        if layout.dtype == "int8":
            rows = -(-rows // layout.scale_rows) * layout.scale_rows
        return min(rows, layout.rows)


def spans(layout: Layout, count: int) -> list[Span]:
    """The whole cache in `count` spans of nearly as many chains; of few chains the last spans are empty.

    An empty span lies behind all blocks: were it where another begins, the two writers would share a journal.
    """
    chains, size = -(-layout.blocks // layout.chain_blocks), layout.chain_blocks
    ends = [
        min((part * (chains // count) + min(part, chains % count)) * size, layout.blocks) for part in range(count + 1)
    ]
    return [Span(layout, first, stop) for first, stop in pairwise(ends)]
