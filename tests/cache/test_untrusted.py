"""A cache from elsewhere reads no other file, runs no filter, and takes no more memory than its own size."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
import pytest
import zstandard
from small_cache import layout, memory_below, reseal, rows_of, write

from layerwise.cache import ActivationCache
from layerwise.cache.format import read_layout
from layerwise.errors import CacheError, DamagedCache, UnusableCache


def changed(path: Path, change: Callable[[h5py.File], None], compression: str = "none") -> None:
    """A whole cache, changed by someone who can compute checksums."""
    a_layout = layout([5, 5], "int8", scale_rows=4) if compression == "none" else layout([500, 500])
    write(path, a_layout, rows_of(a_layout), append_bytes=10**6, compression=compression)
    with h5py.File(path, "r+", libver=("earliest", "latest")) as file:
        change(file)
    reseal(path)


def replaced(name: str, **creation: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **creation)

    return change


def linked(name: str, link: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


LINKED = ["split", "activations", "checksums", "scales", "ids", "labels", "labels/speaker", "frame_labels_classes"]


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/x"), h5py.SoftLink("/offsets")])
def test_links_are_refused(tmp_path: Path, name: str, link: object) -> None:
    changed(tmp_path / "c.h5", linked(name, link))
    write(tmp_path / "other.h5", layout([5]), rows_of(layout([5])))
    with pytest.raises(CacheError, match=f"{name} is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize("name", ["extra", "labels/extra"])
def test_links_that_nobody_needs_are_refused(tmp_path: Path, name: str) -> None:
    def change(file: h5py.File) -> None:
        file[name] = h5py.ExternalLink("other.h5", "/x")

    changed(tmp_path / "c.h5", change)
    with pytest.raises(CacheError, match=f"{name} is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


def external(file: h5py.File) -> None:
    del file["split"]
    file.create_dataset("split", (2,), "u1", external=[("other", 0, 2)])


def virtual(file: h5py.File) -> None:
    del file["split"]
    source = h5py.VirtualLayout((2,), "u1")
    source[:] = h5py.VirtualSource("other", "x", (2,))
    file.create_virtual_dataset("split", source)


@pytest.mark.parametrize(
    "change", [external, virtual, linked("split", h5py.ExternalLink("other", "/x"))], ids=["storage", "virtual", "link"]
)
def test_another_file_is_not_even_opened(tmp_path: Path, change: Callable[[h5py.File], None]) -> None:
    """The other file is a named pipe: to open it would wait for ever."""
    changed(tmp_path / "c.h5", change)
    os.mkfifo(tmp_path / "other")
    assert "split is missing or stored in a way" in refusal(tmp_path / "c.h5", UnusableCache)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stage-1.h5")
    assert "stage-1.h5 is no file" in refusal(tmp_path / "stage-1.h5", CacheError)


def refusal(path: Path, kind: type[CacheError]) -> str:
    """Why the cache is not opened: found by a process that can be ended where it waits."""

    def open_and_tell(pipe: Connection) -> None:
        try:
            ActivationCache(path)
        except kind as error:
            pipe.send(str(error))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=open_and_tell, args=(there,))
    process.start()
    try:
        assert here.poll(60)
        return here.recv()
    finally:
        process.kill()
        process.join()


STRANGE = {
    "chunked": replaced("split", data=np.zeros(2, "u1"), chunks=(1,)),
    "filtered": replaced("split", data=np.zeros(2, "u1"), chunks=(1,), compression="gzip"),
    "scalar": replaced("split", data=np.uint8(0)),
    "of another dtype": replaced("split", data=np.zeros(2, "<i8")),
    "big-endian": replaced("offsets", data=np.array([0, 5, 10], ">i8")),
    "of strings of any length": replaced("ids", data=["a", "b"], dtype=h5py.string_dtype()),
    "of references": replaced("split", shape=(2,), dtype=h5py.ref_dtype),
    "of compounds": replaced("split", shape=(2,), dtype=[("a", "u1")]),
    "a group": lambda file: (file.__delitem__("split"), file.create_group("split")),
    "too short": replaced("split", data=np.zeros(1, "u1")),
    "out of range": replaced("split", data=np.full(2, 9, "u1")),
    "falling": replaced("offsets", data=np.array([0, 11, 10], "<i8")),
    "beyond the rows": replaced("offsets", data=np.array([0, 5, 11], "<i8")),
    "before the rows": replaced("offsets", data=np.array([-1, 5, 10], "<i8")),
    "without classes": lambda file: file["labels_classes"].__delitem__("speaker"),
    "of unknown classes": replaced("labels/speaker", data=np.array([0, 7], "<i4")),
    "of negative classes": replaced("labels/speaker", data=np.array([0, -1], "<i4")),
    "without checksums": replaced("checksums", data=np.zeros(0, "<u4")),
    "without scales": replaced("scales", data=np.zeros((0, 0), "<f4")),
    "missing": lambda file: file.__delitem__("offsets"),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
def test_strange_data_sets_are_refused(tmp_path: Path, change: Callable[[h5py.File], None]) -> None:
    changed(tmp_path / "c.h5", change)
    with pytest.raises(CacheError, match=r"c\.h5 is not a"):
        ActivationCache(tmp_path / "c.h5")


def test_a_named_dtype_is_refused(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["split"]
        file["labels/named"] = np.dtype("u1")
        file.create_dataset("split", (2,), file["labels/named"])

    changed(tmp_path / "c.h5", change)
    with pytest.raises(CacheError, match="is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", np.bytes_("complex64")),
        ("dtype", "float16"),  # a string of any length
        ("views", np.int64(2**62)),
        ("views", np.int64(0)),
        ("views", np.float64(1)),
        ("views", np.ones(3, np.int64)),
        ("block_bytes", np.int64(0)),
        ("block_bytes", np.int64(2**40)),
        ("chain_blocks", np.int64(0)),
        ("scale_rows", np.int64(-1)),
        ("fingerprint", np.bytes_(b"f" * 10_000)),
        ("format_version", np.int64(1)),
        ("stage", None),
    ],
)
def test_strange_attributes_are_refused(tmp_path: Path, name: str, value: object) -> None:
    def change(file: h5py.File) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    changed(tmp_path / "c.h5", change)
    with pytest.raises(CacheError, match=r"c\.h5 "):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize("name", ["activations", "ids", "offsets", "checksums"])
def test_a_size_that_the_file_does_not_have_is_refused_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    """Late allocation: 4 terabytes that take no room."""

    def change(file: h5py.File) -> None:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (2**42 // dtype.itemsize, *[3] * (name == "activations")), dtype)

    changed(tmp_path / "c.h5", change)
    assert (tmp_path / "c.h5").stat().st_size < 100_000
    with memory_below(2_000_000), pytest.raises(CacheError, match=f"{name} is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize("name", ["labels/speaker", "labels_classes/speaker", "frame_labels/phone", "split"])
def test_a_second_name_of_a_data_set_is_refused(tmp_path: Path, name: str) -> None:
    """Forty names of one data set would take forty times the memory of what the file holds."""

    def change(file: h5py.File) -> None:
        file[f"{name}-again" if "/" in name else "labels/again"] = file[name]

    changed(tmp_path / "c.h5", change)
    with pytest.raises(CacheError, match="is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


def test_long_labels_of_many_samples_take_their_room_once(tmp_path: Path) -> None:
    a_layout = replace(layout([1] * 20_000), labels_classes={"speaker": ("s0", "ü" * 100_000)}, frame_labels_classes={})
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), append_bytes=10**6)
    with memory_below(15_000_000), ActivationCache(tmp_path / "c.h5") as cache:
        assert cache.labels["speaker"][:3].tolist() == ["s0", "ü" * 100_000, "s0"]


def test_labels_of_frames_that_are_in_no_class_are_refused(tmp_path: Path) -> None:
    for number in (-1, 2):
        path = tmp_path / f"c{number}.h5"
        changed(path, replaced("frame_labels/phone", data=np.array([0, 1, number] + [0] * 7, "<i4")))
        with ActivationCache(path) as cache, pytest.raises(CacheError, match="frame_labels/phone is missing or stored"):
            cache.frame_labels("phone", 0)
    changed(tmp_path / "short.h5", replaced("frame_labels/phone", data=np.zeros(9, "<i4")))
    with pytest.raises(CacheError, match="frame_labels/phone is missing or stored"):
        ActivationCache(tmp_path / "short.h5")


def repacked(**creation: object) -> Callable[[h5py.File], None]:
    """Other filters or chunks for the rows of 166 in a chunk."""

    def change(file: h5py.File) -> None:
        replaced("activations", **{"shape": (1000, 3), "dtype": "<f2", "chunks": (166, 3), **creation})(file)
        file["places"][:] = 4096 + np.arange(len(file["places"]))  # the old rows are gone from the end of the file

    return change


STRANGELY_PACKED = {
    "unfiltered": repacked(),
    "contiguous": repacked(chunks=None),
    "gzip": repacked(compression="gzip", shuffle=True),
    "without shuffle": repacked(compression=32015, compression_opts=(1,), allow_unknown_filter=True),
    "checked by HDF5": repacked(
        compression=32015, compression_opts=(1,), allow_unknown_filter=True, shuffle=True, fletcher32=True
    ),
    "another filter": repacked(compression=32001, compression_opts=(1,), allow_unknown_filter=True, shuffle=True),
    "other chunks": repacked(
        compression=32015, compression_opts=(1,), allow_unknown_filter=True, shuffle=True, chunks=(83, 3)
    ),
    "more rows": repacked(
        compression=32015, compression_opts=(1,), allow_unknown_filter=True, shuffle=True, shape=(2**40, 3)
    ),
    "larger blocks": lambda file: file.attrs.modify("block_bytes", np.int64(166 * 6 + 1)),
    "huge blocks": lambda file: file.attrs.modify("block_bytes", np.int64(2**40)),
    "chains": lambda file: file.attrs.modify("chain_blocks", np.int64(2)),
    "said to be raw": lambda file: (file.attrs.__delitem__("compression"), set_compression(file, b"none")),
    "by another codec": lambda file: (file.attrs.__delitem__("compression"), set_compression(file, b"lzma")),
    "few places": replaced("places", data=np.zeros(3, "<i8")),
}


def set_compression(file: h5py.File, name: bytes) -> None:
    file.attrs["compression"] = np.bytes_(name)


@pytest.mark.parametrize("change", STRANGELY_PACKED.values(), ids=STRANGELY_PACKED)
def test_strange_compression_is_refused(tmp_path: Path, change: Callable[[h5py.File], None]) -> None:
    changed(tmp_path / "c.h5", change, "zstd")
    with memory_below(2_000_000), pytest.raises(CacheError, match="is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


def test_what_is_only_said_to_be_compressed_is_refused(tmp_path: Path) -> None:
    changed(tmp_path / "c.h5", lambda file: file.attrs.modify("compression", np.bytes_(b"zstd")))
    with pytest.raises(CacheError, match="activations is missing or stored in a way"):
        ActivationCache(tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("block", "place"), [(2, 0), (2, -(2**63)), (2, 2**63 - 1), (1, 2**40), (3, 5000)], ids=lambda value: str(value)
)
def test_places_outside_of_the_activations_are_refused(tmp_path: Path, block: int, place: int) -> None:
    def change(file: h5py.File) -> None:
        file["places"][block] = place

    changed(tmp_path / "c.h5", change, "zstd")
    with memory_below(2_000_000), ActivationCache(tmp_path / "c.h5") as cache:
        with pytest.raises(DamagedCache, match="the places of blocks 0 to 3 contradict themselves"):
            cache.read(0, 0, 500)
        with pytest.raises(DamagedCache, match="contradict themselves"):
            cache.verify()


def test_a_place_that_makes_a_block_longer_than_it_can_be_is_refused(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        places = file["places"][:]
        file["places"][1:-1] = places[-1] - np.arange(len(places) - 2, 0, -1)

    changed(tmp_path / "c.h5", change, "zstd")
    with ActivationCache(tmp_path / "c.h5") as cache, pytest.raises(DamagedCache, match="contradict themselves"):
        cache.read(0, 0, 1)


BOMB = zstandard.compress(bytes(2**26))
CHUNK = np.random.default_rng(0).bytes(166 * 6)
FRAMES = {
    "no frame": bytes(100),
    "empty": zstandard.compress(b""),
    "a shorter content": zstandard.compress(CHUNK[:-1]),
    "a longer content": zstandard.compress(CHUNK[:500] + bytes(1000)),
    "64 MB": BOMB[:900],
    "said to be 2**62 bytes": b"\x28\xb5\x2f\xfd\xc0\x00" + (2**62).to_bytes(8, "little") + bytes(50),
    "more than it says": BOMB[:4] + b"\x60" + (166 * 6 - 256).to_bytes(2, "little") + BOMB[9:900],
    "without a content size": zstandard.ZstdCompressor(write_content_size=False).compress(CHUNK[:500] * 2),
    "cut off": zstandard.compress(CHUNK)[:-5],
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_frames_that_do_not_hold_a_block_are_refused_and_take_no_memory(
    tmp_path: Path, frame: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_layout = layout([500, 500])
    monkeypatch.setattr("layerwise.cache.packing.encode", lambda chunks, itemsize: [frame] * len(chunks))
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), append_bytes=10**6, compression="zstd")
    with memory_below(2_000_000), ActivationCache(tmp_path / "c.h5") as cache:
        cache.verify()  # the checksums are right
        with pytest.raises(DamagedCache, match="block 0 of its activations cannot be decompressed"):
            cache.read(0, 0, 100)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damage_that_passed_for_a_seal_is_still_a_sentence(tmp_path: Path, compression: str) -> None:
    """Whatever bytes HDF5 is given, the reader answers with a cache or with a CacheError."""
    path = tmp_path / "c.h5"
    a_layout = layout([5, 5])
    write(path, a_layout, rows_of(a_layout), compression=compression)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.choice(np.arange(4096, len(content)), 400, replace=False).tolist():
        old, content[position] = content[position], int(rng.integers(256))
        path.write_bytes(content)
        with open(path, "rb") as file, contextlib.suppress(CacheError):
            read_layout(path, file.fileno())
        content[position] = old
