"""Built from compiled_reads.c where there is a compiler."""

from array import array

import numpy as np

def read_windows(
    file: tuple[int, int, int, int, int, int, int, int],
    compared: bytearray,
    rows: array[int],
    into: np.ndarray,
    stride: int,
) -> int:
    """Reads windows of activations, and gives how many of them, from the first on, are there and match their checksums.

    file: descriptor, places of the activations and of the checksums, bytes of all activations, of a row and of a block,
    blocks of a chain, address of ISA-L's crc32_gzip_refl. compared: a bit for each block, which is set where it was compared.
    rows: int64 [windows, 2], from to. into: where window i begins at byte i * stride; zero behind it.
    """
