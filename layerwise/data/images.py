"""Pictures as samples: each one is resized, cropped to a square and cut into a grid of overlapping patches.

A picture delivers its whole grid, from which caches are made: a cached stage is cropped anew in every epoch, as a sub-grid.
What reads the pictures themselves is given crops from any pixel on, as in Löwe et al. 2019.

Files are decoded at each read: host memory stays the same whatever the size of the data set, and a small JPEG takes about a
tenth of a millisecond. Opening a folder decodes every picture once, because a truncated file opens without complaint and fails
only there: no damaged file is met during training.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from layerwise.config import DataOptions
from layerwise.data.files import Extensions, usable_files
from layerwise.data.source import SampleSet, Skipped, digest, several
from layerwise.data.splits import folder_split
from layerwise.errors import ConfigError, DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}
OTHER_FORMATS = {".heic", ".heif", ".avif", ".jxl", ".jp2"}
"""Of pictures that are not read."""

# Pillow looks at the contents, not at the name. Without this list an EPS file called x.jpg would run Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")

# Text in a PNG may say anything, such as how the picture was made. Pillow's own limit of 1 MiB refuses the picture with it.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Mean and standard deviation of STL-10, pixels from 0 to 1, as in the reference code of Greedy InfoMax. They serve for
# every data set: they only have to bring pixels near zero mean and unit variance, and to be the same at every reading.
GRAY_MEAN, GRAY_STD = (0.4120,), (0.2570,)
COLOUR_MEAN, COLOUR_STD = (0.4313, 0.4156, 0.3663), (0.2683, 0.2610, 0.2687)


HEIC_BRANDS = ("heic", "heix", "hevc", "heim", "heis", "mif1", "msf1")

MOST_OF_FEW_BITS = 14
"""A set of pictures of 16 bits whose values need no more is likely to come from a device of so many."""


@dataclass(frozen=True)
class PatchOptions:
    """How pictures become patches; all sizes in pixels.

    Raises ConfigError where the patches do not tile the picture from edge to edge.
    """

    picture: int
    """Side of the square that every picture is resized and centre-cropped to."""
    patch: int
    """Side of a patch."""
    patch_stride: int
    """From one patch to the next, across and down."""
    gray: bool
    """One channel rather than three."""
    flip: bool
    """Offer the horizontal mirror as view 1."""

    def __post_init__(self) -> None:
        steps = (self.picture - self.patch) / self.patch_stride
        if steps < 0 or steps != int(steps):
            nearest = self.patch + self.patch_stride * max(0, round(steps))
            raise ConfigError(
                f"A picture of {self.picture} pixels cannot be cut into patches of {self.patch} pixels every "
                f"{self.patch_stride} pixels; the nearest picture size that can is {nearest}."
            )

    @property
    def columns(self) -> int:
        """Patches per row, which is also the number of rows."""
        return (self.picture - self.patch) // self.patch_stride + 1

    @property
    def channels(self) -> int:
        """1 for gray, 3 for colour."""
        return 1 if self.gray else 3


def patch_options(options: DataOptions) -> PatchOptions:
    """As the options of a run say; a whole picture is one patch. Raises ConfigError."""
    if options.frames == "whole":
        return PatchOptions(options.picture, options.picture, options.picture, options.gray, flip=False)
    return PatchOptions(options.picture, options.patch, options.patch_stride, options.gray, options.flip)


@dataclass(eq=False)
class PictureSet(SampleSet):
    """Pictures in patches, whole grids of them and crops: see `Crops`."""

    pixels: Callable[[int], torch.Tensor] = field(kw_only=True)
    """Sample to uint8 [channels, picture, picture]; safe to call from several threads."""
    options: PatchOptions = field(kw_only=True)

    @property
    def pixels_apart(self) -> int:
        """From one patch to the next; of whole pictures there is one, and no crops."""
        return self.options.patch_stride if self.columns > 1 else 1

    def read_crop(self, sample: int, top: int, left: int, side: tuple[int, int], view: int = 0) -> torch.Tensor:
        """See `Crops`. Raises IndexError for views that there are not, DataError where a file has become unreadable."""
        if not 0 <= view < self.views:
            raise IndexError(f"no view {view} of sample {sample}")
        options = self.options
        height, width = (options.patch + options.patch_stride * (count - 1) for count in side)
        picture = _rendered(self.pixels(sample), view)
        out = (-left, left + width - options.picture, -top, top + height - options.picture)
        if max(out) > 0:
            above, before = max(-top, 0), max(-left, 0)
            picture = F.pad(picture.float(), [max(pixels, 0) for pixels in out], mode="reflect").to(picture.dtype)
            top, left = top + above, left + before
        part = picture[:, top : top + height, left : left + width]
        return cut_patches(normalise(part), options.patch, options.patch_stride)


def picture_set(
    pixels: Callable[[int], torch.Tensor],
    options: PatchOptions,
    ids: Sequence[str],
    identity: str,
    labels: dict[str, np.ndarray],
    test: np.ndarray | None = None,
    skipped: Sequence[Skipped] = (),
) -> PictureSet:
    """A DataSet of pictures cut into patches; view 1 is cut from the mirrored picture.

    `pixels(i)` gives picture i as uint8 [channels, picture, picture] and is safe to call from several threads.
    """
    return PictureSet(
        takes="pictures",
        ids=ids,
        lengths=np.full(len(ids), options.columns**2, dtype=np.int64),
        frame_shape=(options.channels, options.patch, options.patch),
        identity=identity,
        read_values=partial(_read_patches, pixels, options),
        labels=labels,
        test=test,
        skipped=skipped,
        columns=options.columns,
        views=2 if options.flip else 1,
        pixels=pixels,
        options=options,
    )


def _rendered(pixels: torch.Tensor, view: int) -> torch.Tensor:
    """[C, H, W] as it is, or mirrored as view 1."""
    return pixels.flip(-1) if view == 1 else pixels


def _read_patches(
    pixels: Callable[[int], torch.Tensor], options: PatchOptions, sample: int, start: int, stop: int, view: int
) -> np.ndarray:
    """Patches start to stop, row after row: normalised float32 [stop - start, channels, patch, patch].

    Raises IndexError outside the grid or the views, DataError where the file has become unreadable.
    """
    if not (0 <= start <= stop <= options.columns**2 and 0 <= view < (2 if options.flip else 1)):
        raise IndexError(f"no patches {start} to {stop} of view {view} of sample {sample}")
    picture = normalise(_rendered(pixels(sample), view))
    return cut_patches(picture, options.patch, options.patch_stride)[start:stop].numpy()


def open_images(place: Path, options: PatchOptions, fewest: int = 2) -> PictureSet:
    """The pictures anywhere below a folder, sorted by id, which is the path below the folder, with '/'.

    Each sub-folder is a class, found in the label "class"; without sub-folders there is no such label. Where the sub-folders
    are parts (see `folder_split`), those are the customary split, and the classes lie one level further down.
    Names that start with a dot are ignored. What cannot be decoded is in `skipped`.

    fewest: pictures that must be usable; where one is enough, `place` may be a picture.
    Raises DataError where the folder is missing or too few can be used.
    """
    kinds = Extensions(EXTENSIONS, OTHER_FORMATS, "PNG or JPEG")
    files = usable_files(place, kinds, "pictures", partial(_inspect, options), fewest)
    split = folder_split(files.ids)
    folders = [name.split("/")[1 if split else 0 : -1] for name in files.ids]
    classes = np.array([each[0] if each else "" for each in folders])
    named = list(zip(files.ids, files.details, strict=True))
    # What was called otherwise than train and test were classes once, and were trained on.
    kind = " ".join(["images", *sorted(set(split.folders if split else ()) - {"train", "test"})])
    pictures = picture_set(
        pixels=partial(_read_file, files.folder, options, files.ids),
        options=options,
        ids=files.ids,
        identity=picture_identity(kind, options, [(name, each.size) for name, each in named]),
        labels={"class": classes} if any(classes) else {},
        test=split.test if split else None,
        skipped=files.skipped,
    )
    pictures.held_out = split.held_out if split else None
    bits = _few_bits({name: each.largest for name, each in named if each.largest is not None})
    pictures.notes = [*bits, *_enlarged([each.side for _, each in named], options.picture)]
    return pictures


def _enlarged(sides: list[int], picture: int) -> list[str]:
    """Says where most of the pictures are made larger, which adds work and no detail."""
    usual = int(np.median(sides)) if sides else picture
    if usual >= picture:
        return []
    return [
        f"pictures are enlarged to {picture} pixels a side; half of them have {usual} or fewer (data.picture={usual})"
    ]


def _few_bits(largest: dict[str, int]) -> list[str]:
    """Says where all values of 16 bits are small. largest: value of each such picture, by its id."""
    bits = max(largest.values(), default=0).bit_length()
    if not 8 < bits <= MOST_OF_FEW_BITS:
        return []
    return [
        f"{len(largest)} pictures of 16 bits hold values up to {max(largest.values())} only, as if of {bits} bits, and are "
        f"nearly black: {several(list(largest))}; store them times {2 ** (16 - bits)}, if they are not meant to be"
    ]


def square_pixels(image: Image.Image, options: PatchOptions) -> torch.Tensor:
    """Any Pillow image as uint8 [channels, picture, picture]: upright, resized by its shorter side, centre-cropped.

    Transparent parts are laid over white, as viewers show them. Values of 16 bits are scaled to 8. Raises ValueError
    for pixels without a known range (floating point, 32 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        image = _scale_16_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if options.gray else "RGB")
    pixels = np.array(ImageOps.fit(image, (options.picture, options.picture)))
    return torch.from_numpy(pixels).reshape(options.picture, options.picture, options.channels).permute(2, 0, 1)


def cut_patches(picture: torch.Tensor, patch: int, patch_stride: int) -> torch.Tensor:
    """Pictures [..., C, H, W] to their patches [..., rows * columns, C, patch, patch] of the same dtype, row after row."""
    rows = picture.unfold(-2, patch, patch_stride)
    return rows.unfold(-2, patch, patch_stride).movedim(-5, -3).flatten(-5, -4)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., C, H, W] to float32 of the same shape, by the constants above for C = 1 or 3."""
    mean, std = mean_and_deviation(pixels.shape[-3])
    return (pixels / 255 - mean) / std


def mean_and_deviation(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The constants above for 1 or 3 channels, each float32 [C, 1, 1]."""
    mean, std = (GRAY_MEAN, GRAY_STD) if channels == 1 else (COLOUR_MEAN, COLOUR_STD)
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def picture_identity(kind: str, options: PatchOptions, files: Iterable[tuple[str, int]]) -> str:
    """SHA-256, as hex, over the kind of source, the options and each file's name and size in bytes."""
    constants = [GRAY_MEAN, GRAY_STD, COLOUR_MEAN, COLOUR_STD]
    return digest(json.dumps([kind, asdict(options), constants, sorted(files)]))


@dataclass(frozen=True, slots=True)
class Picture:
    """One file."""

    size: int
    """Bytes."""
    largest: int | None
    """Value, where it has 16 bits."""
    side: int
    """The shorter one, pixels."""


def _inspect(options: PatchOptions, path: Path) -> Picture | str:
    """What there is to know of a file, or why it cannot be decoded."""
    try:
        _decode(path, options)
        with Image.open(path, formats=FORMATS) as image:
            largest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
            side = min(image.size)
        return Picture(path.stat().st_size, largest, side)
    except UnidentifiedImageError:
        return _unknown_format(path)
    except Exception as error:  # damaged files make Pillow raise nearly anything: OSError, SyntaxError, struct.error
        return str(error) or type(error).__name__


def _unknown_format(path: Path) -> str:
    """Telephones call their HEIC files x.jpg, too."""
    with path.open("rb") as file:
        start = file.read(12)
    brand = start[8:12].decode("ascii", "replace").strip()
    if start[4:8] != b"ftyp":
        return "not a picture"
    kind = "HEIC" if brand in HEIC_BRANDS else f"a file of the kind {brand!r}"
    return f"{kind} is not read; convert it to PNG or JPEG"


def _read_file(folder: Path, options: PatchOptions, ids: Sequence[str], sample: int) -> torch.Tensor:
    """A picture that was fine when the folder was opened."""
    path = folder / ids[sample]
    try:
        return _decode(path, options)
    except Exception as error:
        raise DataError(f"The picture {path} can no longer be read ({error}); restore it, or start afresh.") from error


def _decode(path: Path, options: PatchOptions) -> torch.Tensor:
    """One file as uint8 [channels, picture, picture]."""
    with Image.open(path, formats=FORMATS) as image:
        image.draft(None, (2 * options.picture, 2 * options.picture))  # large JPEGs decode faster at a reduced size
        return square_pixels(image, options)


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """A 16-bit gray image as mode L. Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))
