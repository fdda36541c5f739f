"""The header of a safetensors file, checked before anything that it describes takes memory.

The file may come from somebody else: numpy lacks some dtypes of the format, and a header may describe what is not there.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from layerwise.errors import RunError, UnreadableFile
from layerwise.files import open_readable
from layerwise.records import Count, finding

_LENGTH_BYTES = 8

_HEADER_BYTES = 100_000_000
"""Most that safetensors itself takes."""

_Dtype = Literal["BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64"]
"""What numpy has a name for, too."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Array(_Strict):
    dtype: _Dtype
    shape: Annotated[list[Count], Field(max_length=32)]
    data_offsets: tuple[Count, Count]

    @property
    def is_whole(self) -> bool:
        """Whether the bytes are those of the shape."""
        first, stop = self.data_offsets
        bits = 8 if self.dtype == "BOOL" else int(self.dtype[1:])
        return stop - first == math.prod(self.shape) * bits // 8


class _Header(BaseModel):
    """Every name but __metadata__ is that of an array."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, _Array] = Field(init=False)
    metadata: dict[str, str] = Field(alias="__metadata__")


def check_header(path: Path, way_out: str) -> None:
    """To be called before the file is opened as safetensors.

    Raises RunError with the way out where it is missing, is no plain file, describes what it does not hold, or has more
    bytes than this machine has memory.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open_readable(path, memory) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > min(_HEADER_BYTES, size - _LENGTH_BYTES):
                raise ValueError("its header is longer than the file")
            header = _Header.model_validate_json(file.read(length))
    except FileNotFoundError:
        raise RunError(f"{path} is missing; {way_out}") from None
    except UnreadableFile as error:
        raise RunError(f"{str(error).partition(';')[0].rstrip('.')}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, finding(error), way_out) from None
    arrays = header.model_extra or {}
    for name, array in arrays.items():
        if not array.is_whole:
            raise _damaged(path, f"it does not hold what it says of {name}", way_out)
    if size != _LENGTH_BYTES + length + max((array.data_offsets[1] for array in arrays.values()), default=0):
        raise _damaged(path, "it has another size than it says", way_out)


def _damaged(path: Path, reason: str, way_out: str) -> RunError:
    return RunError(f"{path} cannot be read as safetensors ({reason}); {way_out}")
