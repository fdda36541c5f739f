"""What the cache of a stage will hold besides its activations: known before the stage is trained, so its room is, too."""

from dataclasses import replace

import numpy as np

from layerwise.cache import Layout
from layerwise.cache.layout import as_codes, in_chains
from layerwise.data.source import DataSet
from layerwise.training.labels import frame_labels
from layerwise.training.plan import StagePlan


def planned_layout(plan: StagePlan, data: DataSet, dtype: str) -> Layout:
    """Without what is not known yet, or takes long to find out and no room. Raises CacheError."""
    labels = {name: as_codes(values) for name, values in data.labels.items()}
    layout = Layout(
        fingerprint="",
        stage=plan.stage,
        dtype=dtype,
        frame_shape=plan.output_shape,
        columns=data.columns,
        views=data.views,
        lengths=plan.output_lengths,
        ids=tuple(data.ids),
        split=np.zeros(len(data.ids), dtype=np.uint8),
        labels={name: codes for name, (codes, _) in labels.items()},
        labels_classes={name: classes for name, (_, classes) in labels.items()},
        frame_labels_classes=dict.fromkeys(data.frame_label_names, ()),
        hop=plan.geometry.hop,
        offset=plan.geometry.offset,
    )
    return in_chains(layout)


def cache_layout(plan: StagePlan, data: DataSet, dtype: str, split: np.ndarray, fingerprint: str) -> Layout:
    """All of it. The labels of the frames are gone through sample by sample: there may be more than memory holds."""
    classes = {name: _classes(name, plan, data) for name in data.frame_label_names}
    planned = planned_layout(plan, data, dtype)
    return replace(planned, split=split, fingerprint=fingerprint, frame_labels_classes=classes)


def _classes(name: str, plan: StagePlan, data: DataSet) -> tuple[str, ...]:
    found: set[str] = set()
    for sample, length in enumerate(plan.output_lengths.tolist()):
        found.update(np.unique(frame_labels(name, plan, data, sample, np.arange(length))).tolist())
    return tuple(sorted(found))
