"""Fine-tuning on a tenth of the labels: from a layerwise encoder against from random weights.

python benchmarks/fine_tuning.py [--fsdd DIR] [--cifar10 DIR] [--seeds 3] [--out runs/fine-tuning]

The encoder learns from all training samples without labels: of Free Spoken Digits from the 2700 that are no customary test
recordings, of CIFAR-10 from all training pictures. Then encoder and a linear layer on the mean of its frames are trained
together, in plain PyTorch, on a tenth of these samples with their labels, the same ones for both starts. The learning rate is
the better of two on a fifth of the labelled samples of the first seed; with it the training is done on all of them, of every
seed. Nothing is chosen by the test samples. Goes on where it was stopped: what is done stands in OUT/results.json. The tables
belong at the end of docs/results.md.
"""

import argparse
import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import nn

import layerwise
from layerwise.config import resolve
from layerwise.files import write_atomically
from layerwise.nets import build_network
from layerwise.nets.network import copied

RATES = (1e-3, 3e-4)
BATCH = 32
STARTS = ("layerwise", "random")
STATISTICS_EVERY = 2
"""Of the labelled samples, those of which random weights take statistics."""


@dataclass(frozen=True)
class Samples:
    """What a classifier learns or is tested on."""

    inputs: list[torch.Tensor]
    """Waveforms [samples], or pictures uint8 [3, 32, 32]."""
    classes: torch.Tensor
    """int64 [N]"""

    def some(self, numbers: np.ndarray) -> "Samples":
        return Samples([self.inputs[number] for number in numbers], self.classes[torch.from_numpy(numbers)])


@dataclass(frozen=True)
class Experiment:
    """One data set."""

    name: str
    """Of its recipe."""
    source: str
    module_epochs: int
    """Of each module, without labels."""
    epochs: int
    """Of encoder and linear layer, with labels."""
    train: Samples
    test: Samples


class Classifier(nn.Module):
    """An encoder and a linear layer on the mean of its frames."""

    def __init__(self, encoder: layerwise.Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = copied(encoder)
        channels = self._mean(encoder.entry.sizes(encoder.shortest, 1)[0]).shape[1]
        self.head = nn.Sequential(
            nn.BatchNorm1d(channels), nn.Linear(channels, classes)
        )  # whatever the level of the features

    def _mean(self, size: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return self.encoder(torch.zeros(size)).mean(1)

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Scores [N, classes] of samples, of several lengths where they are waveforms."""
        if inputs[0].dim() > 1:
            return self.head(self.encoder(torch.stack(inputs)).mean(1))
        lengths = torch.tensor([len(each) for each in inputs])
        features = self.encoder(nn.utils.rnn.pad_sequence(inputs, batch_first=True), lengths)
        frames = torch.from_numpy(self.encoder.out_length(lengths.numpy()))
        return self.head(features.sum(1) / frames[:, None])


def fsdd(folder: Path) -> Experiment:
    """Recordings 0 to 4 of each digit and speaker are for the test."""
    parts: dict[bool, list[tuple[torch.Tensor, int]]] = defaultdict(list)
    for path in sorted(folder.rglob("*.wav")):
        digit, _, index = path.stem.split("_")
        waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        parts[int(index) < 5].append((waveform, int(digit)))
    return Experiment("fsdd", f"fsdd:{folder}", 8, 60, _samples(parts[False]), _samples(parts[True]))


def cifar10(folder: Path) -> Experiment:
    """Training and test pictures in one folder per class."""
    parts: dict[str, list[tuple[torch.Tensor, int]]] = defaultdict(list)
    for part in ("train", "test"):
        for number, kind in enumerate(sorted((folder / part).iterdir())):
            for path in sorted(kind.iterdir()):
                pixels = np.array(Image.open(path).convert("RGB"))
                parts[part].append((torch.from_numpy(pixels).permute(2, 0, 1), number))
    return Experiment("cifar10", f"images:{folder}", 2, 8, _samples(parts["train"]), _samples(parts["test"]))


def _samples(pairs: list[tuple[torch.Tensor, int]]) -> Samples:
    return Samples([sample for sample, _ in pairs], torch.tensor([label for _, label in pairs]))


def a_part(samples: Samples, part: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of one in `part` samples of each class, and of the others."""
    rng = np.random.default_rng(seed)
    chosen = [
        each
        for label in range(int(samples.classes.max()) + 1)
        for each in _some(rng, np.flatnonzero(samples.classes.numpy() == label), part)
    ]
    return np.array(sorted(chosen)), np.setdiff1d(np.arange(len(samples.inputs)), chosen)


def _some(rng: np.random.Generator, numbers: np.ndarray, part: int) -> np.ndarray:
    return rng.permutation(numbers)[: max(len(numbers) // part, 1)]


def error_of(classifier: Classifier, samples: Samples) -> float:
    """The part of the samples that is put into a wrong class."""
    classifier.eval()
    wrong = 0
    with torch.no_grad():
        for first in range(0, len(samples.inputs), BATCH):
            found = classifier(samples.inputs[first : first + BATCH]).argmax(1)
            wrong += int((found != samples.classes[first : first + BATCH]).sum())
    return wrong / len(samples.inputs)


def fine_tuned(encoder: layerwise.Encoder, samples: Samples, rate: float, epochs: int, seed: int) -> Classifier:
    """All weights trained together, with Adam and a learning rate that falls to zero along a cosine."""
    torch.manual_seed(seed)
    classifier = Classifier(encoder, int(samples.classes.max()) + 1).train()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=rate)
    steps = -(-len(samples.inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(samples.inputs)).split(BATCH):
            scores = classifier([samples.inputs[number] for number in chosen.tolist()])
            loss = nn.functional.cross_entropy(scores, samples.classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


def with_random_weights(
    encoder: layerwise.Encoder, config: layerwise.Config, seed: int, inputs: list[torch.Tensor]
) -> layerwise.Encoder:
    """The same network before any training, but for what its layers take of their inputs without it: statistics and patches."""
    network = build_network(config.net, tuple(encoder.entry.frame_shape))
    module = network.build(range(len(network.layers)), seed, "cpu")
    if module.begins_with_data:
        shortest = min(each.shape[-1] for each in inputs)
        some = encoder.entry(torch.stack([each[..., :shortest] for each in inputs[::STATISTICS_EVERY]]))
        module.first_weights_from(some, np.random.default_rng(seed))
    fresh = copy.deepcopy(encoder)
    fresh.load_state_dict(module.state_dict())
    return fresh


def measure(
    experiment: Experiment, seed: int, out: Path, done: Collection[str], rates: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains the encoder where it is not trained yet, and a classifier from each start that is not done; gives what came of
    it. rates: of each start, where they are chosen already."""
    config = resolve(
        experiment.name,
        overrides={
            "data.source": experiment.source,
            "out": str(out / f"{experiment.name}-{seed}"),
            "cache.dir": str(out / "cache"),
            "training.max_epochs": experiment.module_epochs,
            "training.seed": seed,
        },
    )
    result = layerwise.run(config)
    trained = layerwise.load(result.paths.out)
    labelled = experiment.train.some(a_part(experiment.train, 10, seed)[0])
    held_out, fitted = (labelled.some(numbers) for numbers in a_part(labelled, 5, seed))
    for start in (each for each in STARTS if each not in done):
        made = partial(with_random_weights, trained, config, seed + 1000, labelled.inputs)
        encoder = trained if start == "layerwise" else made()
        tune = partial(fine_tuned, encoder, epochs=experiment.epochs, seed=seed)
        rate = rates.get(start) or min(RATES, key=lambda rate: error_of(tune(fitted, rate), held_out))
        error = error_of(tune(labelled, rate), experiment.test)
        yield start, {"error": error, "rate": rate, "labelled": len(labelled.inputs)}


def named(experiment: Experiment, seed: int) -> str:
    """What results.json calls it."""
    return f"{experiment.name}, {experiment.module_epochs} and {experiment.epochs} epochs, seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--module-epochs", type=int, help="without labels, of each module; default: 8 for FSDD, 2 for CIFAR-10"
    )
    parser.add_argument("--epochs", type=int, help="with labels; default: 60 for FSDD, 8 for CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/fine-tuning"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    experiments = [
        *([fsdd(options.fsdd)] if options.fsdd else []),
        *([cifar10(options.cifar10)] if options.cifar10 else []),
    ]
    changes = {"epochs": options.epochs, "module_epochs": options.module_epochs}
    changes = {name: value for name, value in changes.items() if value}
    experiments = [replace(each, **changes) for each in experiments]
    for experiment in experiments:
        rates: dict[str, float] = {}
        for seed in range(options.seeds):
            entries = found.setdefault(named(experiment, seed), {})
            if len(entries) < len(STARTS):
                for start, entry in measure(experiment, seed, options.out, entries.keys(), rates):
                    entries[start] = entry
                    write_atomically(path, json.dumps(found, indent=2).encode())
            rates = rates or {start: entry["rate"] for start, entry in entries.items()}
    print("\n| data, labelled samples | start | test error, % | learning rates |\n| --- | --- | --- | --- |")
    for experiment in experiments:
        for start in STARTS:
            entries = [found[named(experiment, seed)][start] for seed in range(options.seeds)]
            errors = [100 * entry["error"] for entry in entries]
            spread = f" ± {statistics.stdev(errors):.1f}" if len(errors) > 1 else ""
            learning_rates = ", ".join(f"{entry['rate']:g}" for entry in entries)
            title = f"{experiment.name}, {entries[0]['labelled']}"
            print(f"| {title} | {start} | {statistics.mean(errors):.1f}{spread} | {learning_rates} |")


if __name__ == "__main__":
    main()
