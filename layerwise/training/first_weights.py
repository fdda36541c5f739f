"""What training begins with, where the seed does not say it: what a network of the user's brings along, or an earlier run's.

It is kept in the run, so that a later start, or a probe, may be given the network with any weights. Other layers take something
of their first weights from their input: that is no part of the network with random weights, since it is learnt from the data.
"""

import contextlib
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from layerwise.config import Config, with_options
from layerwise.data.batches import gathered, ordered_epoch, stream
from layerwise.errors import ConfigError, RunError
from layerwise.memory.meter import uncounted
from layerwise.nets.network import Network, copied
from layerwise.run_store import RunState, RunStore
from layerwise.training.checkpoint import Arrays, digest, load_arrays, load_weights, save_arrays, weights_of
from layerwise.training.encoder import warm_start
from layerwise.training.loader import Loader
from layerwise.training.run import Run
from layerwise.training.simultaneous import AnyTrainer
from layerwise.training.spec import StageSpec


def first_weights(config: Config, network: Network) -> Arrays | None:
    """What training begins with: what an earlier run has learnt, or what the network brings along. None where the seed says it.

    Raises RunError or ConfigError where the earlier run's do not fit the network.
    """
    place = config.training.warm_start
    if place is not None:
        return warm_start(Path(place).expanduser(), network)
    if network.model is None:
        return None
    weights: Arrays = {}
    for layer in range(len(network.layers)):  # one at a time: the whole of it may be large
        weights |= weights_of(network.build(range(layer, layer + 1), 0, "cpu"))
    return weights


def without_lost_weights(config: Config, store: RunStore) -> Config:
    """The options without the file of --weights, where it is gone and the run goes on from what it has kept of it."""
    file = config.net.weights
    if file and store.first_weights.exists() and not Path(file).expanduser().exists():
        return with_options(config, {"net.weights": ""})
    return config


def weights_of_new_run(config: Config, store: RunStore, network: Network) -> Arrays | None:
    """The first weights of a run that is begun, before anything in its folder is deleted.

    Raises RunError or ConfigError where it cannot begin with what --warm-start names.
    """
    place = config.training.warm_start
    if place is not None and Path(place).expanduser().resolve().is_relative_to(store.out.resolve()):
        raise ConfigError(
            f"--warm-start {place} lies in the run's own folder, {store.out}, which begins anew; name another --out."
        )
    return first_weights(config, network)


def keep_first_weights(store: RunStore, weights: Arrays | None) -> None:
    """Replaces those that a start left which was killed. To be called before run.json says what they are."""
    store.delete_first_weights()
    if weights is not None:
        save_arrays(store.first_weights, weights, {})


def restore_first_weights(state: RunState, run: Run) -> None:
    """Writes them again where they were lost, and what is given now still has them. Raises RunError where it has not."""
    try:
        load_first_weights(run.store)
    except RunError:
        weights = None
        with contextlib.suppress(ConfigError, RunError):
            weights = first_weights(run.config, run.specs[0].network)
        if weights is None or digest(weights) != state.first_weights:
            raise
        save_arrays(run.store.first_weights, weights, {})


def is_network_of(state: RunState, store: RunStore, network: Network) -> bool:
    """Whether a run was begun with this network: with the same weights, or with others where it has kept its first ones.

    store: of the run itself, whichever round the state is of.
    """
    same_structure = state.structure == network.structure != ""
    return state.network == network.identity or (same_structure and store.first_weights.exists())


def other_weights(state: RunState, network: Network) -> list[str]:
    """A line where the network was given with other weights than the run was begun with, and these still matter."""
    if state.network == network.identity or state.is_trained:
        return []
    return ["the network has other weights now than those that this run was begun with; it goes on from its own"]


def check_warm_start(state: RunState, run: Run) -> None:
    """Raises ConfigError where a run that goes on is to be one that was begun with other weights.

    Its own lie in its folder, so those that it took them from may be gone by now, or have changed.
    """
    place = run.config.training.warm_start
    if place is None or (state.first_weights and place == state.config.training.warm_start):
        return
    source = Path(place).expanduser()
    if source.exists() and digest(warm_start(source, run.specs[0].network)) != state.first_weights:
        raise ConfigError(
            f"--warm-start {place}: {run.store.out} was not begun with these weights; leave it out to go on, or give another "
            "--out."
        )


def take_from_data(trainer: AnyTrainer, loader: Loader, samples: np.ndarray) -> None:
    """Sets what layers take of their first weights from their input: that of some of these samples, int64 [N], on the host."""
    spec, training, ranks = trainer.spec, trainer.config.training, trainer.context.ranks
    if not any(module.begins_with_data for module in trainer.modules):
        return
    rng = stream(training.seed, "first weights", spec.stage)
    count = max(NUMBERS // _most_numbers(spec), training.batch_size)
    epoch = ordered_epoch(loader, rng.permutation(samples)[:count], spec.window, training.batch_size, rng)
    with uncounted():
        read: list[torch.Tensor] = []
        for batch in loader.batches(epoch, 0, trainer.offloaded):
            own = ranks.share(len(batch.lengths))  # the others are zeros
            windows = zip(batch.frames[own].split(1), batch.lengths[own].tolist(), strict=True)
            gathered_windows = ranks.all_gather(
                [_on_host(frames[:, :length], batch.rows) for frames, length in windows]
            )
            read += chain.from_iterable(gathered_windows)
        x = _in_equal_pieces(read)
        for module in trainer.modules:
            on_host = copied(module, torch.device("cpu")).eval()
            x = on_host.first_weights_from(x, rng, above=module is not trainer.modules[-1])
            load_weights(module, weights_of(on_host))
            ranks.broadcast(module.state_dict().values())  # processors may round differently


def _in_equal_pieces(windows: list[torch.Tensor]) -> torch.Tensor:
    """Windows (1, L, ...) of several lengths L as pieces (B, l, ...), as long as the shortest that is half the longest or more.

    What is shorter is left out: a piece begins and ends with padding, and in short ones there would be little else.
    """
    lengths = [window.shape[1] for window in windows]
    piece = min(length for length in lengths if 2 * length >= max(lengths))
    return torch.cat([part for window in windows for part in window.split(piece, 1) if part.shape[1] == piece])


def _most_numbers(spec: StageSpec) -> int:
    """Most that is read of a window by any of the layers that begin together."""
    x = torch.empty(1, spec.window.frames, *spec.frame_shape, device="meta")
    most = x.numel()
    *below, _ = spec.shapes.layers.values()
    for layer in below:
        x = layer(x)
        most = max(most, x.numel())
    return most


def _on_host(frames: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """float32, what some frames of a batch stand for; see `gathered`. Memory of its own: other ranks are sent all of it."""
    return gathered(frames if rows is None else frames.to(rows.device), rows).float().cpu().clone()


NUMBERS = 2**23
"""Of the input of any layer that first weights are taken from."""


def load_first_weights(store: RunStore) -> Arrays | None:
    """What a run was begun with, by the names in the whole network; None where the seed says all about it.

    Raises RunError where it is missing, or not what the run has recorded.
    """
    recorded = store.load_state().first_weights
    if recorded is None:
        return None
    way_out = "restore it, or start anew with --overwrite."
    weights = load_arrays(store.first_weights, way_out)[0]
    if digest(weights) != recorded:
        raise RunError(f"{store.first_weights} does not hold the weights that its run was begun with; {way_out}")
    return weights
