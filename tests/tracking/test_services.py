"""Curves at a service: what is really stored there, read back with the service's own reader, after a stop and a retraining."""

import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.errors import ConfigError, Interrupted
from layerwise.events import EpochDone, Event, Message, StageDone, StepDone, silent
from layerwise.files import json_lines
from layerwise.stop import StopFlag
from layerwise.tracking import TrackingCallback, open_service

Tiny = Callable[..., Config]

EPOCH_VALUES = {"loss", "accuracy", "held_out_loss", "held_out_accuracy", "seconds", "peak_bytes"}
STAGE_VALUES = {"cache_peak_bytes", "cache_bytes"}


def run_in_two_starts(config: Config) -> Path:
    """Stops in the second epoch of stage 2, and goes on."""
    stop = StopFlag()

    def stop_later(event: Event) -> None:
        if isinstance(event, StepDone) and (event.stage, event.epoch) == (2, 1):
            stop.reason = "the test"

    with pytest.raises(Interrupted):
        run(config, stop=stop, notify=stop_later)
    return run(config).paths.out


def losses(out: Path, stage: int) -> list[float]:
    return [entry["held_out_loss"] for entry in json_lines(out / "stages" / str(stage) / "metrics.jsonl")]


def test_tensorboard_holds_each_epoch_once_over_two_starts(tiny_speech: Tiny, digits: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_speech(f"fsdd:{digits}", **{"training.log": "tensorboard"})
    out = run_in_two_starts(config)

    def read(stage: int) -> dict[str, list[tuple[int, float]]]:
        accumulator = accumulators.EventAccumulator(str(out / "stages" / str(stage) / "tensorboard"))
        accumulator.Reload()
        tags = accumulator.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}

    for stage in range(1, 5):
        curves = read(stage)
        assert curves.keys() == EPOCH_VALUES | STAGE_VALUES
        assert [step for step, _ in curves["held_out_loss"]] == [1, 2]
        assert [value for _, value in curves["held_out_loss"]] == pytest.approx(losses(out, stage))
        assert [step for step, _ in curves["cache_bytes"]] == [2]

    run(config, from_stage=4)
    assert [step for step, _ in read(4)["loss"]] == [1, 2]


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 32 KiB blocks of pieces with a header of checksum, length and kind."""
    position, record = 7, b""  # behind the file's own header
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no piece begins so near to the end of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_weights_and_biases_holds_each_epoch_once_over_two_starts(
    tiny_speech: Tiny, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    out = run_in_two_starts(tiny_speech(f"fsdd:{digits}", **{"training.log": "wandb"}))
    rows, ids = [], set()
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in leveldb_log(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
    assert len(ids) == 1
    for stage in range(1, 5):
        found = [float(row[f"stage-{stage}/held_out_loss"]) for row in rows if f"stage-{stage}/held_out_loss" in row]
        assert found == pytest.approx(losses(out, stage))
        epochs = [int(row[f"stage-{stage}/epoch"]) for row in rows if f"stage-{stage}/epoch" in row]
        assert epochs == [1, 2, 2]  # the last with what the cache took


def test_mlflow_holds_each_epoch_once_over_two_starts(
    tiny_speech: Tiny, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    out = run_in_two_starts(tiny_speech(f"fsdd:{digits}", **{"training.log": "mlflow"}))
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("layerwise").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["net.width"] == "8"
    for stage in range(1, 5):
        history = client.get_metric_history(found.info.run_id, f"stage-{stage}/held_out_loss")
        assert [entry.step for entry in history] == [1, 2]
        assert [entry.value for entry in history] == pytest.approx(losses(out, stage))


@pytest.mark.parametrize(
    ("service", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_named_before_anything_is_written(
    service: str, package: str, tiny_speech: Tiny, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    config = tiny_speech(f"fsdd:{digits}", **{"training.log": service})
    with pytest.raises(ConfigError, match=rf"--log {service}.* pip install 'layerwise\[{service}\]'"):
        run(config)
    assert not Path(config.out).exists()


def test_a_service_may_change_between_two_starts(tiny_speech: Tiny, digits: Path) -> None:
    pytest.importorskip("tensorboard")
    source = f"fsdd:{digits}"
    run(tiny_speech(source))
    assert run(tiny_speech(source, **{"training.log": "tensorboard"})).state.done


class Broken:
    """A service that takes one epoch and then no more."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
        if self.taken:
            raise ConnectionError("nobody answers")
        self.taken.append(step)

    def close(self) -> None:
        raise ConnectionError("nobody answers")


def epoch(number: int) -> EpochDone:
    return EpochDone(1, number, 2.0, 0.3, 1.9, 0.4, 12.0, 5)


def test_a_service_that_fails_is_told_of_once_and_stops_nothing() -> None:
    seen: list[Event] = []
    broken = Broken()
    with TrackingCallback(broken, seen.append) as follow:
        for number in (1, 2, 3):
            follow(epoch(number))
    assert broken.taken == [1]
    assert [event for event in seen if isinstance(event, EpochDone)] == [epoch(1), epoch(2), epoch(3)]
    messages = [event.text for event in seen if isinstance(event, Message)]
    assert messages == ["--log takes no more, metrics.jsonl goes on: nobody answers"]


def test_a_service_that_refuses_at_the_start_is_a_sentence() -> None:
    def refuse(*arguments: object) -> None:
        raise ConnectionError("no server there.")

    with pytest.raises(ConfigError, match=r"--log wandb: no server there\. Mend that, or leave --log out"):
        open_service("wandb", refuse, None, "id", None)


def test_steps_of_a_stage_never_fall() -> None:
    class Kept:
        steps: list[int]

        def __init__(self) -> None:
            self.steps = []

        def log(self, stage: int, step: int, values: Mapping[str, float]) -> None:
            self.steps.append(step)

        def close(self) -> None:
            """Nothing to do."""

    kept = Kept()
    with TrackingCallback(kept, silent) as follow:
        for event in (epoch(1), epoch(2), StageDone(1, 2, True, 1.5, 5, 3, 0, 40, 100.0)):
            follow(event)
    assert kept.steps == [1, 2, 2]
