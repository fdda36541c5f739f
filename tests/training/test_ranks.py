"""Two ranks take the step that one process takes with the whole batch, and hold the same bits after it."""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from layerwise.config import Config, resolve
from layerwise.data.batches import Batch, Window, ordered_epoch
from layerwise.errors import BudgetError, ConfigError, LayerwiseError
from layerwise.memory.meter import Meter
from layerwise.memory.plan import MemoryPlan
from layerwise.memory.ranks import ALONE, LostRank, Ranks
from layerwise.nets.layer import Layer
from layerwise.nets.network import Network
from layerwise.stop import StopFlag
from layerwise.training.context import RunContext
from layerwise.training.cut import cut_network
from layerwise.training.loader import SourceLoader
from layerwise.training.spec import StageSpec, check_shareable
from layerwise.training.trainer import NoSmallerSlices, StageTrainer, StepRandomness

CPU = torch.device("cpu")
COUNT = 2


class Dropping(Layer):
    """A linear layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(1, 6), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x))


class Normalised(Layer):
    """A linear layer with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(1, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x).flatten(0, 1)).unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class Case:
    """A stage, a batch, and how the batch is laid out."""

    stage: int = 2
    kind: str = "speech"
    windows: int = 4
    ragged: bool = True
    micro_batch: int = 4
    layout: dict[str, object] = field(default_factory=dict)
    """Of the memory plan, beside the micro-batch."""
    options: dict[str, object] = field(default_factory=dict)
    dropout: bool = False
    like: int | None = None
    """Micro-batch of the one process, where it takes the same slices for the same random numbers, or rounding to few digits."""


STREAMED = {"optimizer_on_host": True, "predictors": 1, "parts": 2, "gradients_at_once": True}
CASES = {
    "a convolution": Case(),
    "a GRU": Case(stage=4),
    "blocks on pictures": Case(kind="vision"),
    "windows of one length": Case(ragged=False),
    "shares of different size": Case(windows=3),
    "one window, so that the second rank has none": Case(windows=1),
    "one sample at a time": Case(micro_batch=1),
    "one sample at a time, a part for each": Case(micro_batch=1, layout={"parts": 4}),
    "whole shares, streamed in parts": Case(layout={"parts": 4}),
    "one window, streamed, so that the second rank has none": Case(windows=1, layout={"parts": 1}),
    "the optimizer on the host": Case(layout={"optimizer_on_host": True}),
    "everything on the host": Case(stage=4, micro_batch=1, layout=STREAMED | {"recompute": True}),
    "everything on the host, for whole samples": Case(
        layout=STREAMED, options={"objective.name": "supervised", "objective.label": "digit"}
    ),
    "everything on the host, one predictor at a time for all targets": Case(layout=STREAMED | {"parts": 1}),
    "bfloat16": Case(like=2, options={"training.precision": "bfloat16"}),
    "float16 with loss scaling": Case(like=2, options={"training.precision": "float16"}),
    "hinge": Case(options={"objective.name": "hinge"}),
    "supervised": Case(options={"objective.name": "supervised", "objective.label": "digit"}),
    "dropout": Case(stage=1, dropout=True, like=2),
}


def planned(case: Case, options: dict[str, dict[str, object]]) -> tuple[Config, StageSpec]:
    config = resolve(overrides={**options[case.kind], **case.options})
    lengths, columns, shape = np.full(24, 4 * config.data.window), 1, (1,)
    if case.kind == "vision":
        columns = (config.data.picture - config.data.patch) // config.data.patch_stride + 1
        lengths, shape = np.full(24, columns**2), (3, config.data.patch, config.data.patch)
    labels = {"digit": np.array(["a", "b", "c"] * 8)}
    data = SimpleNamespace(
        lengths=lengths,
        columns=columns,
        frame_shape=shape,
        views=1,
        identity="noise",
        labels=labels,
        frame_label_names=(),
    )
    data.ids, data.test, data.skipped = [str(number) for number in range(24)], None, ()
    network = Network([Dropping], (1,)) if case.dropout else None
    return config, cut_network(config, data, CPU, network)[case.stage - 1]


def batch_of(case: Case, plan: StageSpec) -> Batch:
    frames = torch.randn(
        case.windows, plan.window.frames, *plan.frame_shape, generator=torch.Generator().manual_seed(1)
    )
    lengths = np.full(case.windows, plan.window.frames)
    if case.ragged:
        lengths[1::2] = lengths[1::2] * 2 // 3 // plan.window.columns * plan.window.columns
        for sample, length in enumerate(lengths):
            frames[sample, length:] = 0
    return Batch(frames, lengths, np.array([0, 2, -1, 1])[: case.windows])


def take_step(case: Case, options: dict[str, dict[str, object]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """What a step leaves: score, held-out score after it, weights, gradients of module and predictors."""
    config, plan = planned(case, options)
    batch = batch_of(case, plan)
    micro_batch = case.like if case.like and ranks.count == 1 else case.micro_batch
    memory_plan = MemoryPlan(case.windows, micro_batch, **(case.layout if ranks.count > 1 else {}))
    randomness = StepRandomness(partial(np.random.default_rng, 3), seed=3)
    with Meter(CPU) as meter:
        loaded = StageTrainer(plan, config, memory_plan, RunContext(CPU, meter, ranks=ranks))
        if config.training.precision == "float16":
            loaded.scale.factor = 2.0**10
        score = loaded.train(batch, randomness)
        held_out = loaded.evaluate(batch, randomness)
        # Adam's first moments are a tenth of the gradients; the weights alone would not show a factor.
        moments = {f"module {n}": state["exp_avg"] for n, state in loaded.optimizer.state().items()}
        moments |= {f"objective {n}": state["exp_avg"] for n, state in loaded.predictor_optimizer.state().items()}
        weights = [*loaded.module.parameters(), *loaded.objective.parameters()]
        return {
            "loss": score.loss,
            "accuracy": score.accuracy,
            "held-out": held_out.loss,
            "weights": torch.cat([weight.detach().flatten() for weight in weights]),
            **{name: moment.clone() for name, moment in moments.items()},
        }


def in_a_rank(work: Callable[..., object], rank: int, folder: Path, *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=COUNT)
    torch.save(work(Ranks(rank, COUNT), *arguments), folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads would wait for a rank that is lost


def in_ranks(work: Callable[..., object], folder: Path, *arguments: object) -> list[object]:
    """What each rank's work gives, in processes of their own."""
    context = multiprocessing.get_context("fork")  # torch is imported already; tests/end_to_end starts torchrun
    processes = [context.Process(target=in_a_rank, args=(work, rank, folder, *arguments)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(50)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def all_steps(ranks: Ranks, options: dict[str, dict[str, object]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: take_step(case, options, ranks) for name, case in CASES.items()}


Steps = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, tiny_options: dict[str, dict[str, object]]) -> list[Steps]:
    """Of each rank."""
    return in_ranks(all_steps, tmp_path_factory.mktemp("steps"), tiny_options)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_step_of_one_process(
    steps: list[Steps], tiny_options: dict[str, dict[str, object]], name: str
) -> None:
    expected = take_step(CASES[name], tiny_options, ALONE)
    for key, value in steps[0][name].items():
        assert (value - expected[key]).norm() <= 1e-5 * max(expected[key].norm(), 1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_stay_equal_to_the_bit(steps: list[Steps], name: str) -> None:
    for key, value in steps[0][name].items():
        assert torch.equal(value, steps[1][name][key]), key


def test_shares_are_those_of_array_split() -> None:
    for samples in range(9):
        for count in range(1, 6):
            shares = [Ranks(rank, count).share(samples) for rank in range(count)]
            for share, expected in zip(shares, np.array_split(np.arange(samples), count), strict=True):
                assert np.arange(samples)[share].tolist() == expected.tolist()


class Counted(SimpleNamespace):
    """A source that remembers what was read."""

    def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
        self.seen.append(sample)
        return torch.arange(start, stop, dtype=torch.float32)[:, None] + 1000 * sample


@pytest.mark.parametrize("columns", [1, 5])
def test_a_rank_reads_its_own_windows_alone(columns: int) -> None:
    lengths = np.array([20, 35, 50, 10, 40])
    window = Window(4, min(columns, 3))
    source = Counted(lengths=lengths, columns=columns, views=1, seen=[])
    epoch = ordered_epoch(source, np.arange(5), window, 4, np.random.default_rng(0))
    whole = list(SourceLoader(source).batches(epoch, 0, nullcontext))
    for rank, own in enumerate(([[0, 1], [4]], [[2, 3], []])):
        source.seen.clear()
        batches = list(SourceLoader(source, Ranks(rank, COUNT)).batches(epoch, 0, nullcontext))
        assert source.seen == [*own[0], *(own[1] or [4])]  # with none of its own, it looks at one
        for batch, expected, samples in zip(batches, whole, own, strict=True):
            assert batch.lengths.tolist() == expected.lengths.tolist()
            assert batch.frames.shape == expected.frames.shape
            rows = [sample % 4 for sample in samples]
            assert torch.equal(batch.frames[rows], expected.frames[rows])


def test_a_module_that_ties_samples_together_is_named_and_refused(tiny_options: dict[str, dict[str, object]]) -> None:
    _, plan = planned(Case(stage=1), tiny_options)
    tied = replace(plan, network=Network([Normalised], (1,)), layers=range(1))
    check_shareable([plan, tied], ALONE)
    check_shareable([plan], Ranks(1, 2))
    with pytest.raises(
        ConfigError, match=r"Stage 1: .*BatchNorm1d.*2 processes cannot share its batches.*without torchrun"
    ):
        check_shareable([plan, tied], Ranks(1, 2))


def stop_and_fail(ranks: Ranks, options: dict[str, dict[str, object]]) -> dict[str, object]:
    """What becomes of a signal to one rank, of work that fails in the first, of a rank without memory, of one that is gone."""
    stop = StopFlag()
    context = RunContext(CPU, Meter(CPU), stop=stop, ranks=ranks)
    asked = [context.asked_to_stop()]
    stop.reason = "SIGUSR1" if ranks.rank == 1 else None
    asked.append(context.asked_to_stop())
    found: dict[str, object] = {"asked": asked, "reason": stop.reason}

    def refuse() -> None:
        raise BudgetError("It is full.")

    try:
        ranks.wait_for_first(refuse)
    except LayerwiseError as error:
        found["failed"] = type(error).__name__, error.exit_code
    found["broadcast"] = ranks.broadcast_object("of the first" if ranks.first else None)
    case = Case()
    config, plan = planned(case, options)
    batch = batch_of(case, plan)
    with Meter(CPU) as meter:
        loaded = StageTrainer(plan, config, MemoryPlan(4, 4), RunContext(CPU, meter, ranks=ranks))
        if ranks.rank == 1:
            meter.limit = meter.live + 1000
        try:
            loaded.train(batch, StepRandomness(partial(np.random.default_rng, 3)))
        except LayerwiseError as error:
            found["step"] = type(error), str(error)
    return found


def test_what_befalls_one_rank_reaches_the_others(tmp_path: Path, tiny_options: dict[str, dict[str, object]]) -> None:
    first, second = in_ranks(stop_and_fail, tmp_path, tiny_options)
    assert first["asked"] == second["asked"] == [False, True]
    assert first["reason"] == second["reason"] == "SIGUSR1"
    assert first["failed"] == ("BudgetError", 2)
    assert second["failed"] == ("ToldElsewhere", 2)
    assert first["broadcast"] == second["broadcast"] == "of the first"
    kind, sentence = second["step"]
    assert kind is NoSmallerSlices
    assert sentence.endswith("give --set memory.micro_batch=1.")
    kind, sentence = first["step"]
    assert kind is LostRank
    assert "Start the same command again" in sentence
