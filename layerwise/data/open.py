"""From `--data KIND:PATH` to a data set."""

from pathlib import Path

from layerwise.config import DATA_KINDS, DataOptions
from layerwise.data.source import DataSet
from layerwise.data.views import WithViews
from layerwise.errors import ConfigError, DataError


def open_data(options: DataOptions, shortest: int) -> DataSet:
    """The data set that the options name; samples of fewer than `shortest` frames are skipped where lengths differ.

    Raises DataError where it cannot be read, ConfigError where the name is none.
    """
    data = _open(options, shortest)
    return data if options.views in (None, data.views) else WithViews(data, options.views)


def _open(options: DataOptions, shortest: int) -> DataSet:
    kind, _, place = options.source.partition(":")
    if kind == "demo":
        from layerwise.data.demo import open_demo

        return open_demo()
    if not place or kind not in DATA_KINDS:
        raise ConfigError(f"--data {options.source}: name the folder too, like {kind}:DIR.")
    try:
        folder = Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data {options.source} cannot be found: {error}.") from None
    if kind in ("speech", "fsdd", "librispeech"):
        return _open_speech(kind, folder, options, shortest)
    return _open_pictures(kind, folder, options)


def _open_speech(kind: str, folder: Path, options: DataOptions, shortest: int) -> DataSet:
    from layerwise.data.speech import open_recordings
    from layerwise.data.speech_corpora import open_fsdd, open_librispeech

    if kind == "fsdd":
        return open_fsdd(folder, options.sample_rate, shortest)
    if kind == "librispeech":
        return open_librispeech(folder, options.sample_rate, shortest)
    return open_recordings(folder, options.sample_rate, options.pattern, shortest)


def _open_pictures(kind: str, folder: Path, options: DataOptions) -> DataSet:
    from layerwise.data.images import PatchOptions, open_image_folder
    from layerwise.data.torchvision_sets import open_cifar10, open_stl10

    patches = PatchOptions(options.picture, options.patch, options.patch_stride, options.gray, options.flip)
    opener = {"images": open_image_folder, "stl10": open_stl10, "cifar10": open_cifar10}[kind]
    return opener(folder, patches)
