"""The files that lie beside NAME until it is sealed."""

from pathlib import Path


def unsealed(path: Path) -> tuple[Path, Path, Path]:
    """Of the cache NAME: its rows so far (NAME.part), what of them is durable (.journal), its compressed form (.packing)."""
    part, journal, packing = (path.with_name(path.name + ending) for ending in (".part", ".journal", ".packing"))
    return part, journal, packing


def remove_unsealed(path: Path) -> None:
    """Deletes those that are there. Raises OSError."""
    for beside in unsealed(path):
        beside.unlink(missing_ok=True)
