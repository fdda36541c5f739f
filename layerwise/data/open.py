"""From `--data KIND:PATH` to a data set."""

from pathlib import Path

from layerwise.config import DATA_KINDS, Config, DataOptions
from layerwise.data.images import PatchOptions, open_image_folder, pictures_at
from layerwise.data.source import DataSet
from layerwise.data.views import WithViews
from layerwise.errors import ConfigError, DataError


def open_data(options: DataOptions, shortest: int) -> DataSet:
    """The data set that the options name; samples of fewer than `shortest` frames are skipped where lengths differ.

    Raises DataError where it cannot be read, ConfigError where the name is none.
    """
    data = _open(options, shortest)
    return data if options.views in (None, data.views) else WithViews(data, options.views)


def open_input(source: str, config: Config, level: float, shortest: int) -> DataSet:
    """What a trained encoder is to be given: a file or a folder, or KIND:PATH as --data takes it; in one view.

    level: of the run's recordings. What cannot be used is in `skipped`. Raises DataError where nothing is left or the
    encoder does not read such data.
    """
    options = config.data.model_copy(update={"source": source, "views": None, "flip": False})
    kind, colon, _ = source.partition(":")
    if not colon and source != "demo" and not Path(source).expanduser().exists():
        raise DataError(f"There is no file or folder {source}; name one, or KIND:PATH as --data takes it.")
    if source == "demo" or (colon and kind in DATA_KINDS and kind not in ("speech", "images")):
        data = _open(options, shortest)
        data.level = level
    else:
        speech = kind == "speech" if colon and kind in DATA_KINDS else config.net.name == "speech"
        data = _open_plain(source, options, speech, level, shortest)
    is_speech = len(data.frame_shape) == 1
    if is_speech != (config.net.name == "speech"):
        given, taken = ("recordings", "pictures") if is_speech else ("pictures", "recordings")
        raise DataError(f"{source} holds {given}, but the encoder was trained on {taken}; name some of those.")
    if not len(data.ids):
        first = data.skipped[0]
        raise DataError(
            f"Nothing of {source} can be used; {len(data.skipped)} files were skipped, the first: {first.path}, "
            f"{first.reason}. Name others."
        )
    return data


def _open_plain(source: str, options: DataOptions, speech: bool, level: float, shortest: int) -> DataSet:
    """A file or a folder, with or without its kind in front."""
    from layerwise.data.speech import recordings_at

    place = _found(source, source.removeprefix("speech:" if speech else "images:"))
    if speech:
        return recordings_at(place, options.sample_rate, level, shortest)
    return pictures_at(place, _patches(options))


def _open(options: DataOptions, shortest: int) -> DataSet:
    kind, _, place = options.source.partition(":")
    if kind == "demo":
        from layerwise.data.demo import open_demo

        return open_demo()
    if not place or kind not in DATA_KINDS:
        raise ConfigError(f"--data {options.source}: name the folder too, like {kind}:DIR.")
    folder = _found(options.source, place)
    if kind in ("speech", "fsdd", "librispeech"):
        return _open_speech(kind, folder, options, shortest)
    return _open_pictures(kind, folder, options)


def _found(source: str, place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data {source} cannot be found: {error}.") from None


def _open_speech(kind: str, folder: Path, options: DataOptions, shortest: int) -> DataSet:
    from layerwise.data.speech import open_recordings
    from layerwise.data.speech_corpora import open_fsdd, open_librispeech

    if kind == "fsdd":
        return open_fsdd(folder, options.sample_rate, shortest)
    if kind == "librispeech":
        return open_librispeech(folder, options.sample_rate, shortest)
    return open_recordings(folder, options.sample_rate, options.pattern, shortest)


def _open_pictures(kind: str, folder: Path, options: DataOptions) -> DataSet:
    from layerwise.data.torchvision_sets import open_cifar10, open_stl10

    opener = {"images": open_image_folder, "stl10": open_stl10, "cifar10": open_cifar10}[kind]
    return opener(folder, _patches(options))


def _patches(options: DataOptions) -> PatchOptions:
    return PatchOptions(options.picture, options.patch, options.patch_stride, options.gray, options.flip)
