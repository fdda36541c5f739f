"""A glance at the data of a run that is only thought of."""

from dataclasses import dataclass

from layerwise.config import Config
from layerwise.data.open import open_data
from layerwise.nets import shortest_sample


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run would find."""

    samples: int
    skipped: int
    """Files that could not be used."""
    labels: tuple[str, ...]


def look(config: Config) -> Seen:
    """Opens the data as a run does. Raises DataError where it could not."""
    data = open_data(config.data, shortest_sample(config))
    return Seen(len(data.ids), len(data.skipped), (*data.labels, *data.frame_label_names))
