"""Labels in a CSV file: for what is learnt, and for probes of an encoder that was trained before they were written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from layerwise.commands import main
from layerwise.config import Config
from layerwise.engines.run import run
from layerwise.errors import DataError, RunError
from layerwise.evaluate.probe import probe


@pytest.fixture
def labels(few_digits: Path, tmp_path: Path) -> Path:
    """Whether the digit of a recording is even, by its name alone; of one nothing is known."""
    rows = [f"{path.stem},{'even' if path.name[0] == '0' else 'odd'},{path.name[0]}" for path in few_digits.iterdir()]
    rows[3] = rows[3].partition(",")[0] + ",,"
    (tmp_path / "labels.csv").write_text("\n".join(["file,parity,digit", *rows]))
    return tmp_path / "labels.csv"


def test_labels_that_are_written_after_the_training_can_be_probed(
    few_digits: Path, labels: Path, tiny_speech: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_speech(f"speech:{few_digits}", **{"training.max_epochs": 1})
    out = run(config).paths.out
    with pytest.raises(SystemExit) as ended:
        main(["probe", str(out), "--label", "parity", "--labels", str(labels)])
    _, err = capfd.readouterr()
    assert ended.value.code in (None, 0), err
    assert f"labels from {labels}, by file: parity (11 of 12), digit (11 of 12)" in err
    (out / "probes/parity.json").read_text()
    with pytest.raises(DataError, match=r"no label 'parity'.*--labels FILE\.csv can bring more"):
        probe(out, "parity")
    given = config.model_copy(update={"data": config.data.model_copy(update={"labels": str(labels)})})
    # Nothing is trained again, and the run knows them now; of a flat folder it knows no speakers.
    assert run(given).labels == ("parity", "digit")
    assert probe(out, "parity").stages[0].test > 0


def test_a_label_from_a_file_is_learnt_and_must_stay_what_it_was(
    few_digits: Path, labels: Path, tiny_speech: Callable[..., Config]
) -> None:
    learnt = {"objective.name": "supervised", "objective.label": "parity", "data.labels": str(labels)}
    config = tiny_speech(f"speech:{few_digits}", **learnt, **{"training.max_epochs": 1})
    state = run(config).state
    assert run(config).state.stages == state.stages
    other = labels.with_name("other.csv")
    other.write_text("file,who\n" + "\n".join(f"{path.stem},{path.name[2]}" for path in few_digits.iterdir()))
    assert probe(config.out, "who", labels=other).label == "who"
    moved = labels.rename(labels.with_name("moved.csv"))
    assert probe(config.out, "parity", labels=moved).label == "parity"
    moved.rename(labels)
    labels.write_text(labels.read_text().replace("even", "odd").replace("odd", "even", 1))
    with pytest.raises(RunError, match=r"label 'parity' has other values .*labels\.csv has changed"):
        run(config)


def test_a_run_whose_file_of_labels_is_gone_can_do_without(
    few_digits: Path, labels: Path, tiny_speech: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_speech(f"fsdd:{few_digits}", **{"training.max_epochs": 1, "data.labels": str(labels)})
    out = str(run(config).paths.out)
    labels.unlink()
    for command in (["probe", out, "--label", "digit"], ["run", "--out", out]):
        assert exit_code(command) != 0
        assert f'There is no file of labels {labels}; give --labels the one there is, or --labels "" for none.' in (
            capfd.readouterr().err
        )
        assert exit_code([*command, "--labels", ""]) == 0, capfd.readouterr().err
        capfd.readouterr()


def exit_code(command: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(command)
    return ended.value.code or 0
