"""Which caches find room, which are kept, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.errors import BudgetError, CacheError, ConfigError
from layerwise.nets.network import Network
from layerwise.nets.speech import Convolution, Recurrence
from layerwise.training.cache_plan import CachePlan, cache_sizes, disk_peak, plan_caches
from layerwise.training.spec import StageSpec

Planned = Callable[..., tuple[Config, list[StageSpec]]]
FREE = 10**12


def data(plans: list[StageSpec], views: int = 1) -> DataSet:
    count = len(plans[0].lengths)
    labels = {"speaker": np.array(["a", "b"] * count)[:count]}
    ids = [str(number) for number in range(count)]
    return SimpleNamespace(ids=ids, columns=1, views=views, labels=labels, frame_label_names=("phone",))


def sizes(plans: list[StageSpec], config: Config) -> list[int]:
    return [room.file for room in cache_sizes(plans, data(plans), config.cache)]


def peak(plans: list[StageSpec], config: Config) -> int:
    return disk_peak(config.cache, cache_sizes(plans, data(plans), config.cache), CachePlan((True,) * len(plans)))


def test_with_room_enough_every_stage_is_cached(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech")
    storage = plan_caches(config, plans, data(plans), FREE)
    assert storage == CachePlan((True,) * 4)
    assert [storage.input_kind(stage) for stage in (1, 2, 3, 4)] == ["data", "cache", "cache", "cache"]


@pytest.mark.parametrize("keep", ["needed", "all", "last"])
def test_the_room_that_is_planned_is_enough_and_a_byte_less_is_not(planned_stages: Planned, keep: str) -> None:
    config, plans = planned_stages("speech", **{"cache.keep": keep, "cache.policy": "always"})
    one, two, *_ = found = sizes(plans, config)
    needed = peak(plans, config)
    assert needed == (sum(found) if keep == "all" else one + two)
    assert all(plan_caches(config, plans, data(plans), needed).cached)
    with pytest.raises(BudgetError, match="of free disk does not hold the cache of stage"):
        plan_caches(config, plans, data(plans), needed - 1)
    config, plans = planned_stages("speech", **{"cache.keep": keep, "cache.policy": "always", "cache.disk": 10**12})
    with pytest.raises(BudgetError, match="of free disk does not hold the cache of stage"):
        plan_caches(config, plans, data(plans), needed - 1)
    with pytest.raises(BudgetError, match="--disk 1 TB does not hold the cache of stage 1"):
        many = [replace(plan, output_lengths=plan.output_lengths * 10**9) for plan in plans]
        plan_caches(config, many, data(plans), 10**16)


def test_what_finds_no_room_is_recomputed_from_the_nearest_cache(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech", **{"cache.keep": "needed"})
    one = sizes(plans, config)[0]
    storage = plan_caches(config, plans, data(plans), one - 1)
    assert storage.cached[:2] == (False, True)
    assert storage.input_kind(2) == "recompute"
    assert [plan.stage for plan in storage.below(2, plans)] == [1]
    assert "stage 2 recomputes them from the data" in storage.notes[0]


def test_never_caches_nothing(planned_stages: Planned) -> None:
    config, plans = planned_stages("vision", **{"cache.policy": "never"})
    storage = plan_caches(config, plans, data(plans, 2), FREE)
    assert not any(storage.cached)
    assert [plan.stage for plan in storage.below(3, plans)] == [1, 2]


def test_outputs_of_a_recurrent_layer_are_not_recomputed(planned_stages: Planned) -> None:
    # They depend on all frames before them.
    layers = [partial(Recurrence, 1, 4), partial(Convolution, 4, 4, 8, 4, 2)]
    network = Network(layers, natural_cut=(1, 1))
    config, plans = planned_stages("speech", network, **{"cache.policy": "never"})
    with pytest.raises(ConfigError, match="stage 1 has a recurrent layer"):
        plan_caches(config, plans, data(plans), FREE)
    config, plans = planned_stages("speech", network)
    with pytest.raises(BudgetError, match="stage 1 has a recurrent layer"):
        plan_caches(config, plans, data(plans), 1000)


def test_what_earlier_starts_decided_stays(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech", **{"cache.policy": "always"})
    assert plan_caches(config, plans, data(plans), FREE, decided=[True, False]).cached == (True, False, True, True)


def test_what_earlier_starts_meant_to_do_is_done_unless_it_finds_no_room(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech", **{"cache.keep": "needed"})
    storage = plan_caches(config, plans, data(plans), FREE, intended=[True, False, True, True])
    assert storage.cached == (True, False, True, True)
    assert "stage 2 are not cached (as an earlier start decided)" in storage.notes[0]
    storage = plan_caches(config, plans, data(plans), sizes(plans, config)[0] - 1, intended=[True, True, False, False])
    assert storage.cached == (False, True, False, False)
    assert "an earlier start was to cache the outputs of stage 1; they find no room any more" in storage.notes


def test_caches_of_trained_stages_that_pass_the_disk_budget_are_refused(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech", **{"cache.keep": "all", "cache.disk": 1000})
    one, two, *_ = sizes(plans, config)
    for sealed in ({1: one}, {1: one, 2: two}):
        with pytest.raises(BudgetError, match=r"--disk 1 kB does not hold .* trained already.*--from-stage 2"):
            plan_caches(config, plans, data(plans), FREE, decided=[True, True], sealed=sealed)
    config, plans = planned_stages("speech", **{"cache.keep": "last", "cache.disk": 1000})
    assert not any(
        plan_caches(config, plans, data(plans), FREE, decided=[True, True], sealed={1: 10**9, 2: 900}).cached[2:]
    )


def test_int8_is_not_recomputed(planned_stages: Planned) -> None:
    # Its scales are those of a thousand rows, which a window does not have.
    config, plans = planned_stages("speech", **{"cache.dtype": "int8", "cache.policy": "never"})
    with pytest.raises(ConfigError, match=r"--cache never: with cache.dtype int8 .*--cache-dtype float16"):
        plan_caches(config, plans, data(plans), FREE)
    config, plans = planned_stages("speech", **{"cache.dtype": "int8"})
    with pytest.raises(BudgetError, match=r"does not hold the cache of stage 1.*cannot be recomputed"):
        plan_caches(config, plans, data(plans), 1000)
    # Nothing is trained on the outputs of the last stage.
    beside_the_last = peak(plans[:3], config)
    assert plan_caches(config, plans, data(plans), beside_the_last).cached == (True, True, True, False)


def test_packing_is_planned_to_need_the_room_twice(planned_stages: Planned) -> None:
    config, plans = planned_stages("speech", **{"cache.policy": "always", "cache.compression": "zstd"})
    one, *_ = sizes(plans, config)
    assert peak(plans, config) >= 2 * one
    needed = peak(plans, config)
    storage = plan_caches(config, plans, data(plans), needed)
    assert all(storage.cached)
    assert "while a cache is packed it lies on the disk twice" in storage.notes[-1]
    with pytest.raises(BudgetError, match="while it is packed"):
        plan_caches(config, plans, data(plans), needed - 1)


def test_caches_that_are_there_are_as_large_as_they_are(planned_stages: Planned) -> None:
    options = {"cache.policy": "always", "cache.compression": "zstd", "cache.keep": "needed"}
    config, plans = planned_stages("speech", **options)
    one, *_ = sizes(plans, config)
    needed = one + cache_sizes(plans, data(plans), config.cache)[1].written - 1
    with pytest.raises(BudgetError):
        plan_caches(config, plans, data(plans), needed, decided=[True])
    assert all(plan_caches(config, plans, data(plans), needed, decided=[True], sealed={1: one - 1}).cached)
    with pytest.raises(BudgetError):  # it will be made anew
        plan_caches(config, plans, data(plans), needed, sealed={1: one - 1})


def test_without_zstandard_nothing_is_begun(planned_stages: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plans = planned_stages("speech", **{"cache.compression": "zstd"})
    monkeypatch.setattr("layerwise.cache.zstd.zstandard", None)
    with pytest.raises(CacheError, match=r"pip install 'layerwise\[compression\]'"):
        plan_caches(config, plans, data(plans), FREE)


def test_what_is_kept_under_each_rule() -> None:
    storage = CachePlan((True, False, True, True))
    assert [storage.source(stage) for stage in (1, 2, 3, 4, 5)] == [0, 1, 1, 3, 4]
    assert storage.kept(4, "needed") == {4, 3}
    assert storage.kept(3, "needed") == {3, 1}
    assert storage.kept(2, "last") == {1}
    assert storage.kept(4, "last") == {4}
    assert storage.kept(3, "all") == {1, 2, 3}
