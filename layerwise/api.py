"""What a notebook or a script calls, in the words of the command line: networks and data may be objects here.

Options are keywords named as the flags are, `gpu_mem="4GB"` for --gpu-mem 4GB; `options={"objective.negatives": 16}` reaches
those without a flag, as --set does.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.config import OWN, Config, resolve
from layerwise.config import options as all_options
from layerwise.data.open import as_data, open_data
from layerwise.engines.plan import plan as plan_config
from layerwise.engines.run import RunResult, UserObjects
from layerwise.engines.run import run as run_config
from layerwise.errors import ConfigError, did_you_mean
from layerwise.events import EpochDone, Event, Message, Notify, StageDone
from layerwise.forecast import Forecast
from layerwise.nets import shortest_sample
from layerwise.nets.network import Network
from layerwise.nets.traced import give_weights, traced_network, with_present_weights
from layerwise.report.printing import PlainConsole
from layerwise.report.progress import LogFile, display
from layerwise.report.tables import stages_at_chance
from layerwise.run_store import RunStore, own_options
from layerwise.screen import Screen
from layerwise.stop import StopFlag, stop_on_signals
from layerwise.training.cut import cut_network
from layerwise.training.encoder import load_encoder
from layerwise.training.optimizer import Make, Optimization, Schedule

Model = nn.Module | Network | str | Config | None
"""A network: a module, one that `cut` has cut, the name that --net takes; or all options at once; None: the recipe's."""

Data = Any
"""A torch.utils.data.Dataset, an array or tensor [N, ...], a `DataSet`, the text that --data takes, or None: the demo."""


def cut(model: nn.Module, example: torch.Tensor, stages: int | None = None, at: Sequence[str] = ()) -> Network:
    """The model as gradient-isolated stages, for frames like those of the example: (N, C, ...), N of them.

    stages: how many, cut so that the largest takes the least memory at this N; default: as many as there can be. at: in place
    of a number, the names of the modules that begin a stage, as in named_modules(). The stages are compared with the model on
    a sample of noise, and the model keeps its weights, from which training starts. Raises ConfigError, naming the operation,
    where the model cannot be recorded or cut so, or the stages would not give what it gives.
    """
    if stages is not None and at:
        raise ConfigError(f"at={list(at)} says where the stages begin, so leave stages={stages} out.")
    shape = tuple(example.shape[1:])
    network = traced_network(model, shape, at)
    if stages is None:
        return network
    given = {"training.stages": stages, "training.batch_size": max(len(example) // 2 * 2, 4)}
    config = resolve("whole", overrides={"data.source": OWN, "net.name": OWN, **given})
    data = as_data(np.ones((4, *shape), dtype=np.float32), config.data)
    specs = cut_network(config, data, torch.device("cpu"), network)
    return replace(network, natural_cut=tuple(len(spec.layers) for spec in specs))


def plan(
    network: Model = None,
    data: Data = None,
    *,
    optimizer: Make | None = None,
    schedule: Schedule | None = None,
    options: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Forecast:
    """What a run would take on the device, on the disk and on the host; nothing is trained and nothing written.

    Parameters as in `run`. Raises LayerwiseErrors where a run could not even be begun.
    """
    config, given = _request(network, data, optimizer, schedule, options, flags)
    return plan_config(config, network=given.network, data=given.data, optimization=given.optimization)


def run(
    network: Model = None,
    data: Data = None,
    *,
    optimizer: Make | None = None,
    schedule: Schedule | None = None,
    on_epoch: Callable[[EpochDone], None] | None = None,
    on_stage: Callable[[StageDone], None] | None = None,
    notify: Notify | None = None,
    from_stage: int | None = None,
    overwrite: bool = False,
    stop: StopFlag | None = None,
    options: Mapping[str, Any] | None = None,
    **flags: Any,
) -> RunResult:
    """Trains every stage that is not done yet, each from the cache of the one below; the same call goes on where it stopped.

    network: see `Model`; a module is applied to each frame. Its weights are where a new run starts, and once all stages are
    done it has the trained ones, also where nothing was left to train. data: see `Data`.
    optimizer: makes a torch optimizer of a stage's parameters, in place of Adam; schedule: makes a scheduler of that
    optimizer, stepped once an epoch. on_epoch, on_stage: are told when one is over; notify: is told of everything, and then no
    progress is shown. from_stage, overwrite: as the flags. stop: ends the run after the step in hand, when its reason is set.
    options, flags: see the module, for example gpu_mem="4GB", out="runs/mine", stages=6, max_epochs=20, objective="ntxent".

    Raises Interrupted after saving, where Ctrl-C or a signal asked for it, and other LayerwiseErrors where the request cannot
    be met. It never ends the process.
    """
    config, given = _request(network, data, optimizer, schedule, options, flags, overwrite)
    log = LogFile(RunStore.of(config.out, config.cache.dir).log)
    shown = display(PlainConsole(file=Screen(sys.stdout))) if notify is None else contextlib.nullcontext(notify)
    # Ctrl-C and signals save first; outside of the main thread Python does not hand them out.
    hears_signals = stop is None and threading.current_thread() is threading.main_thread()
    stopping = stop_on_signals() if hears_signals else contextlib.nullcontext(stop or StopFlag())
    with shown as show, stopping as flag:

        def tell(event: Event) -> None:
            show(event)
            log(event)
            if on_epoch is not None and isinstance(event, EpochDone):
                on_epoch(event)
            if on_stage is not None and isinstance(event, StageDone):
                on_stage(event)

        result = run_config(config, given, from_stage=from_stage, overwrite=overwrite, stop=flag, notify=tell)
        if given.network is not None and given.network.model is not None:
            give_weights(given.network.model, load_encoder(result.paths.encoder, result.state.encoder)[0])
        if warning := stages_at_chance(result.state, result.config.objective):
            tell(Message(warning))
        return result


def _request(
    network: Model,
    data: Data,
    optimizer: Make | None,
    schedule: Schedule | None,
    options: Mapping[str, Any] | None,
    flags: Mapping[str, Any],
    overwrite: bool = False,
) -> tuple[Config, UserObjects]:
    """What the engines take. overwrite: whether the run that is there is to be deleted, so that its options say nothing."""
    if isinstance(network, Config):
        if data is not None or options or flags:
            raise ConfigError(
                "A Config holds all options already: change it with layerwise.resolve, and give it alone."
            )
        return network, UserObjects(optimization=_optimization(optimizer, schedule, network))
    if not isinstance(network, nn.Module | Network | str | None):
        what = f"the class {network.__name__}" if isinstance(network, type) else f"a {type(network).__name__}"
        raise ConfigError(
            f"The network is {what}; give an nn.Module, called where it is a class, or a name as --net takes it."
        )
    flags = dict(flags)
    recipe, config_file = flags.pop("recipe", None), flags.pop("config", None)
    overrides = {_key(name): value for name, value in flags.items() if value is not None} | dict(options or {})
    if data is not None:
        overrides["data.source"] = data if isinstance(data, str) else OWN
    if network is not None:
        overrides["net.name"] = network if isinstance(network, str) else OWN
    if isinstance(network, Network):
        network = with_present_weights(network)
        overrides.setdefault("training.stages", len(network.natural_cut))
    says_no_more = recipe is None and config_file is None and network is None and data is None
    own = own_options(overrides) if says_no_more and not overwrite else None
    config = own or resolve(recipe, None if config_file is None else Path(config_file), overrides)
    samples = None if data is None or isinstance(data, str) else as_data(data, config.data)
    if isinstance(network, nn.Module):
        reading = samples if samples is not None else open_data(config.data, shortest_sample(config))
        network = traced_network(network, tuple(reading.frame_shape), config.net.at)
    optimization = _optimization(optimizer, schedule, config)
    return config, UserObjects(None if isinstance(network, str) else network, None, samples, optimization)


def _optimization(optimizer: Make | None, schedule: Schedule | None, config: Config) -> Optimization | None:
    if optimizer is not None:
        for name in ("warmup_steps", "cosine", "weight_decay"):
            if value := getattr(config.training, name):
                raise ConfigError(
                    f"training.{name} {value} is for layerwise's own Adam; leave it out, and give your optimizer a "
                    "schedule, or a weight decay of its own."
                )
        return Optimization.of(optimizer, schedule, config.training.max_epochs)
    if schedule is not None:
        raise ConfigError("A schedule goes with an optimizer of your own: give optimizer= too.")
    return None


def _key(name: str) -> str:
    """The dotted key of a keyword that is named as a flag."""
    keys = {option.flag.removeprefix("--").replace("-", "_"): option.key for option in all_options() if option.flag}
    if name not in keys:
        known = [*keys, "recipe", "config", "options"]
        raise ConfigError(
            f"There is no option {name}; those without a flag go into options={{'section.name': value}}."
            f"{did_you_mean(name, known)}"
        )
    return keys[name]
