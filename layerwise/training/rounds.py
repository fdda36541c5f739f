"""The run directories of all rounds, prepared or resumed together."""

from collections.abc import Sequence

import torch

from layerwise.cache.inventory import cache_files
from layerwise.config import Config
from layerwise.data.source import DataSet
from layerwise.run_store import RunState, RunStore
from layerwise.training.cache_plan import keep_of_round
from layerwise.training.resume import check_going_on, delete_pending, is_trained, prepare, reset_above
from layerwise.training.spec import StageSpec


def prepare_rounds(
    config: Config,
    store: RunStore,
    data: DataSet,
    specs: list[StageSpec],
    device: torch.device,
    *,
    from_stage: int | None,
    overwrite: bool,
    cached: Sequence[bool],
) -> dict[int, RunState]:
    """States of the rounds that there is still something to do in, by number; of the last one in any case.

    Everything else as in `prepare`, which does the same for one round. What one of them refuses is refused before the first is
    changed.
    """
    rounds, states = config.training.rounds, {}
    if not overwrite:
        for number in _to_be_prepared(store, rounds, from_stage):
            of_round = store.round(number, rounds)
            if of_round.state.exists() and of_round.config.exists():
                check_going_on(RunState.load(of_round.state), config, of_round, data, specs, from_stage)
    for number in range(rounds, 0, -1):
        of_round, keep = store.round(number, rounds), keep_of_round(config, number)
        if number < rounds and not of_round.state.exists() and _is_ours(store):
            _clear(of_round)
        states[number] = prepare(
            config,
            of_round,
            data,
            specs,
            device,
            from_stage=from_stage,
            overwrite=overwrite,
            cached=cached,
            keep=keep,
        )
        if number < rounds:
            _find_lost_ends(number, store, rounds, states)
        if all(is_trained(record) for record in states[number].stages) and number == rounds:
            break  # what came before has served its purpose, and may have been deleted
    return dict(sorted(states.items()))


def _to_be_prepared(store: RunStore, rounds: int, from_stage: int | None) -> list[int]:
    """The last round; and those before it, unless it is trained and is to stay so."""
    trained = store.state.exists() and all(is_trained(record) for record in RunState.load(store.state).stages)
    return [rounds] if trained and from_stage is None else list(range(rounds, 0, -1))


def _is_ours(store: RunStore) -> bool:
    """Whether the caches of the run are its own, and with them those of its rounds; the last round is prepared by now."""
    return store.cache_owner.exists() and store.cache_owner.read_text() == RunState.load(store.state).run_id


def _clear(store: RunStore) -> None:
    """Deletes the caches of a round whose folder was deleted: nothing says any more what they are."""
    for file in cache_files(store.caches):
        file.path.unlink(missing_ok=True)
    store.cache_owner.unlink(missing_ok=True)


def _find_lost_ends(number: int, store: RunStore, rounds: int, states: dict[int, RunState]) -> None:
    """Where the next round cannot begin for want of what this one ended with, this one trains the stage again."""
    here, above = store.round(number, rounds), store.round(number + 1, rounds)
    for record, following in zip(states[number].stages, states[number + 1].stages, strict=True):
        to_begin = not is_trained(following) and not above.checkpoint(record.stage).exists()
        if is_trained(record) and to_begin and not here.checkpoint(record.stage).exists():
            for later in range(number, rounds + 1):
                reset_above(states[later], record.stage)
                states[later].save(store.round(later, rounds).state)
                delete_pending(states[later], store.round(later, rounds))
            return
