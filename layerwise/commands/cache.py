"""`layerwise cache`: what is there, whether it is whole, room, and features for other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerwise.commands.options import directory_argument
from layerwise.errors import CacheError, ConfigError, DamagedCache
from layerwise.report.printing import answer, answer_json, say
from layerwise.report.tables import table
from layerwise.run_store import open_run
from layerwise.units import size

if TYPE_CHECKING:
    from layerwise.cache.inventory import Entry


@click.group(short_help="List, verify, remove and export activation caches.")
def cache() -> None:
    """Activation caches: the outputs of each stage for the whole data set."""


@cache.command(name="ls", short_help="What is there.")
@click.argument("place", metavar="[PLACE]", type=click.Path(path_type=Path), default="cache")
@click.option("--json", "as_json", is_flag=True, help="One JSON list on stdout, for scripts.")
def list_caches(place: Path, as_json: bool) -> None:
    """List the caches of PLACE: a run directory, a folder of caches (default: cache) or a file."""
    from layerwise.cache.inventory import entries

    found = list(entries(_files(place)))
    if as_json:
        answer_json([_as_json(entry) for entry in found])
        return
    if found:
        answer(table(map(_row, found)))
    for entry in found:
        if entry.finding:
            answer(entry.finding)
    answer(f"{size(sum(entry.bytes for entry in found))} in all" if found else f"{place} holds no caches.")


def _as_json(entry: "Entry") -> dict[str, Any]:
    layout = entry.layout
    return {
        "path": str(entry.path),
        "bytes": entry.bytes,
        "state": entry.state,
        "finding": entry.finding,
        "stage": layout and layout.stage,
        "dtype": layout and layout.dtype,
        "compression": layout and layout.compression,
        "samples": layout and len(layout.ids),
        "frames": layout and layout.rows,
        "frame_shape": layout and list(layout.frame_shape),
    }


def _row(entry: "Entry") -> dict[str, str]:
    row = {
        "cache": "/".join(entry.path.parts[-2:]),
        **dict.fromkeys(("stage", "samples", "frames", "frame", "dtype"), "-"),
    }
    if layout := entry.layout:
        row |= {
            "stage": str(layout.stage),
            "samples": f"{len(layout.ids):,}",
            "frames": f"{layout.rows:,}",
            "frame": " x ".join(map(str, layout.frame_shape)),
            "dtype": layout.dtype if layout.compression == "none" else f"{layout.dtype}, {layout.compression}",
        }
    return row | {"size": size(entry.bytes), "": entry.state}


@cache.command(short_help="Read everything and compare it with its checksums.")
@click.argument("place", type=click.Path(path_type=Path))
def verify(place: Path) -> None:
    """Read every byte of the caches of PLACE: a run directory, a folder of caches or a file.

    Exit code 2 where one is damaged; a run makes that one again when it needs it.
    """
    from layerwise.cache import ActivationCache
    from layerwise.cache.inventory import UNSEALED

    errors = []
    for path, fingerprint in _some_files(place).items():
        if path.suffix in UNSEALED:
            answer(f"{path}: {UNSEALED[path.suffix]}; its run goes on with it")
            continue
        try:
            with ActivationCache(path, fingerprint) as opened:
                opened.verify()
            answer(f"{path}: whole")
        except CacheError as error:
            errors.append(error)
            answer(str(error))
    if damaged := sum(isinstance(error, DamagedCache) for error in errors):
        raise CacheError(f"Damaged caches: {damaged}. Delete them, and a run makes what it needs again.")
    if errors:
        raise CacheError(f"{len(errors)} of these files could not be read as caches.")


@cache.command(short_help="Free the room of caches.")
@directory_argument
@click.option("--stage", "stages", type=int, multiple=True, help="Of this stage; may be given several times.")
@click.option("--all", "everything", is_flag=True, help="Of every stage.")
def rm(directory: Path, stages: tuple[int, ...], everything: bool) -> None:
    """Delete caches of the run in DIR. Its weights stay; a later start makes what it keeps or needs again."""
    from layerwise.training.cache_retention import remove_caches

    if bool(stages) == everything:
        raise ConfigError("Say which caches: either --stage S or --all.")
    if not (directory / "run.json").exists():
        raise ConfigError(f"{directory} is not a run directory; name the one of the run whose caches are to go.")
    freed = size(remove_caches(directory, None if everything else stages))
    say(f"{freed} freed; a later start of the run makes again what its --keep names")


@cache.command(short_help="Hand features over as .npy, .h5, .npz or .parquet.")
@click.argument("place", metavar="DIR|FILE", type=click.Path(path_type=Path))
@click.option("--stage", type=int, help="Of this stage of the run in DIR; default: the last that is cached.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="NAME.npy, .h5, .npz or .parquet")
@click.option("--mean", is_flag=True, help="One row per sample, the mean of its frames.")
def export(place: Path, stage: int | None, output: Path, mean: bool) -> None:
    """Write the features of a stage, in view 0, for other programs: frame after frame, sample after sample.

    float16 stays float16; all else, and means, become float32. NAME.npy has NAME.index.npz beside it: ids, offsets and
    labels; in NAME.h5 they lie beside the data set `features`. Sample i has rows offsets[i] to offsets[i + 1]. Of a run in DIR
    it is known where each row lies, in seconds, steps or pixels, and written as `layerwise extract` writes it.
    """
    from layerwise.cache import ActivationCache
    from layerwise.cache.export import export as export_cache
    from layerwise.cache.inventory import UNSEALED
    from layerwise.encoder.entry import row_places

    state = open_run(place)[1] if (place / "run.json").exists() else None
    if state is not None and stage is not None and not 1 <= stage <= len(state.stages):
        raise CacheError(f"--stage {stage}: {place} has stages 1 to {len(state.stages)}.")
    recorded = _some_files(place)
    files = [path for path in recorded if path.suffix not in UNSEALED]
    if stage is not None:
        files = [path for path in files if path.name == f"stage-{stage}.h5"]
    if not files:
        raise CacheError(
            f"{place} has no sealed cache{'' if stage is None else f' of stage {stage}'}; start its run again with --keep all, "
            "or take the features from the trained stages: layerwise extract."
        )
    if len({path.parent for path in files}) > 1:
        raise CacheError(f"{place} holds the caches of several runs; name one of them.")
    with ActivationCache(files[-1], recorded[files[-1]]) as opened:
        places = None
        if state is not None and state.takes:
            places = row_places(state.config.data, state.takes, opened.layout.hop, opened.layout.offset)
        export_cache(opened, output, mean, places)
    beside = f"; ids and labels: {output.with_suffix('.index.npz')}" if output.suffix == ".npy" else ""
    say(f"{output}: stage {opened.layout.stage}, {len(opened.ids)} samples, {size(output.stat().st_size)}{beside}")


def _files(place: Path) -> dict[Path, str | None]:
    """The cache files of a run directory, a folder of caches or one file, to the fingerprint that the run has recorded."""
    from layerwise.cache.inventory import find_caches

    if not (place / "run.json").exists():
        return dict.fromkeys(find_caches(place))
    store, state = open_run(place)
    named = store.named_caches(state)
    if named is not None and store.recorded_caches(state) is None:
        raise CacheError(
            f"{named}, which {place / 'run.json'} names, does not say that it is of this run; name it by itself."
        )
    recorded = {store.cache(record.stage): record.fingerprint for record in state.stages}
    return {path: recorded.get(path) for path in find_caches(store.caches)} if store.caches.exists() else {}


def _some_files(place: Path) -> dict[Path, str | None]:
    """The same; raises CacheError where there is none."""
    files = _files(place)
    if not files:
        raise CacheError(f"{place} holds no caches; name a run directory, a folder of caches or a cache file.")
    return files
