"""One cache, several threads and processes."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_cache import layout, rows_of, write

from layerwise.cache import ActivationCache


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    a_layout = layout([200, 300], block_bytes=64)
    write(tmp_path / "c.h5", a_layout, rows_of(a_layout), append_bytes=10_000)
    with ActivationCache(tmp_path / "c.h5") as opened:
        yield opened


def total(cache: ActivationCache, sample: int) -> float:
    return float(cache.read(sample, 0, int(cache.lengths[sample])).double().sum())


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_cache_travels_to_another_process_as_its_path(cache: ActivationCache, method: str) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert [pool.submit(total, cache, sample).result() for sample in (0, 1)] == [total(cache, 0), total(cache, 1)]


def test_a_forked_child_goes_on_with_the_open_file(cache: ActivationCache) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cache.read(1, 7, 150), rows_of(cache.layout)[207:350]) else 1)
    for start in range(100):
        cache.read(0, start, start + 100)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_read_at_once(cache: ActivationCache) -> None:
    rows = rows_of(cache.layout)
    windows = [(start, stop) for start in range(0, 100, 3) for stop in range(start, 200, 7)]
    with ThreadPoolExecutor(8) as pool:
        for (start, stop), window in zip(windows, pool.map(lambda ends: cache.read(0, *ends), windows), strict=True):
            assert torch.equal(window, rows[start:stop])


def test_a_data_loader_reads_it_in_workers(cache: ActivationCache) -> None:
    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, number: int) -> torch.Tensor:
            return cache.read(1, number, number + 100)

    rows = rows_of(cache.layout)
    loader = torch.utils.data.DataLoader(Windows(), None, num_workers=2, multiprocessing_context="fork")
    for number, window in enumerate(loader):
        assert torch.equal(window, rows[200 + number : 300 + number])
