"""Pictures as patches: exact pixels, every kind of file that people have, and clear words about the ones that fail."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from layerwise.config import resolve
from layerwise.data.images import PatchOptions, cut_patches, normalise, open_images
from layerwise.errors import ConfigError, DataError

COLOUR = PatchOptions(picture=32, patch=8, patch_stride=4, gray=False, flip=True)
GRAY = PatchOptions(picture=32, patch=8, patch_stride=4, gray=True, flip=False)
REAL = Path(__file__).parents[2].parent / "shared/data/cifar10"


def noise(seed: int, height: int = 32, width: int = 32, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, two pictures each, one of them deeper down."""
    for seed, name in enumerate(["cat/1.png", "cat/more/2.PNG", "dog/1.png", "dog/2.bmp"]):
        save(noise(seed), tmp_path / name)
    return tmp_path


def pixels_of(patches: torch.Tensor, gray: bool) -> np.ndarray:
    """The 0 to 255 value of each channel, averaged over all patches."""
    black, white = (normalise(torch.full((1 if gray else 3, 1, 1), v, dtype=torch.uint8)).flatten() for v in (0, 255))
    return (((patches.mean((0, 2, 3)) - black) / (white - black)) * 255).numpy()


def test_patches_equal_slices_of_the_picture(folder: Path):
    pictures = open_images(folder, COLOUR)
    patches = pictures.read(0, 0, 49)
    picture = torch.from_numpy(np.array(Image.open(folder / pictures.ids[0]))).permute(2, 0, 1)
    assert patches.shape == (49, 3, 8, 8)
    assert patches.dtype == torch.float32
    for row in range(7):
        for column in range(7):
            piece = picture[:, row * 4 : row * 4 + 8, column * 4 : column * 4 + 8]
            assert torch.equal(patches[row * 7 + column], normalise(piece))


def test_patches_of_a_picture_that_is_not_square():
    picture = torch.arange(3 * 12 * 20).reshape(3, 12, 20)
    patches = cut_patches(picture, 4, 4)
    assert patches.shape == (3 * 5, 3, 4, 4)
    assert torch.equal(patches[2 * 5 + 2], picture[:, 8:12, 8:12])


@given(st.integers(0, 49), st.integers(0, 49), st.integers(0, 1))
def test_any_range_equals_a_slice_of_the_whole_grid(tmp_path_factory, one: int, other: int, view: int):
    start, stop = sorted((one, other))
    folder = tmp_path_factory.getbasetemp() / "range"
    for seed in range(2):
        if not (folder / f"{seed}.png").exists():
            save(noise(seed), folder / f"{seed}.png")
    pictures = open_images(folder, COLOUR)
    assert torch.equal(pictures.read(1, start, stop, view), pictures.read(1, 0, 49, view)[start:stop])


def test_mirror_view_equals_patches_of_the_mirrored_picture(folder: Path, tmp_path: Path):
    mirrored = tmp_path / "mirrored"
    for name in ("1.png", "2.png"):
        save(Image.open(folder / "cat/1.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored / name)
    plain = open_images(folder, COLOUR)
    assert plain.views == 2
    assert torch.equal(plain.read(0, 0, 49, view=1), open_images(mirrored, COLOUR).read(0, 0, 49))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 1))
def test_a_crop_begins_at_any_pixel_of_its_view(tmp_path_factory, top: int, left: int, view: int):
    folder = tmp_path_factory.getbasetemp() / "crop"
    for seed in range(2):
        if not (folder / f"{seed}.png").exists():
            save(noise(seed), folder / f"{seed}.png")
    pictures = open_images(folder, COLOUR)
    picture = normalise(torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1))
    part = (picture.flip(-1) if view else picture)[:, top : top + 12, left : left + 12]
    assert torch.equal(pictures.read_crop(1, top, left, (2, 2), view), cut_patches(part, 8, 4))
    with pytest.raises(IndexError):
        pictures.read_crop(1, top, left, (2, 2), 2)


def test_reads_outside_the_grid_or_the_views_are_refused(folder: Path):
    pictures = open_images(folder, GRAY)
    for start, stop, view in [(-1, 3, 0), (0, 50, 0), (5, 4, 0), (0, 49, 1)]:
        with pytest.raises(IndexError):
            pictures.read(0, start, stop, view)


def test_shapes_ids_and_labels_follow_the_protocol(folder: Path):
    pictures = open_images(folder, GRAY)
    assert pictures.ids == ["cat/1.png", "cat/more/2.PNG", "dog/1.png", "dog/2.bmp"]
    assert pictures.labels["class"].tolist() == ["cat", "cat", "dog", "dog"]
    assert pictures.lengths.tolist() == [49] * 4
    assert pictures.lengths.dtype == np.int64
    assert (pictures.columns, pictures.frame_shape, pictures.views) == (7, (1, 8, 8), 1)
    assert pictures.test is None
    assert pictures.frame_label_names == ()
    assert pictures.read(3, 0, 49).shape == (49, 1, 8, 8)
    with pytest.raises(DataError, match="phone"):
        pictures.frame_labels("phone", 0, np.zeros(1))


def test_pictures_without_class_folders_have_no_class(tmp_path: Path):
    for seed in range(2):
        save(noise(seed), tmp_path / f"{seed}.png")
    pictures = open_images(tmp_path, COLOUR)
    assert len(pictures.ids) == 2
    assert pictures.labels == {}


def test_customary_split_is_found(tmp_path: Path):
    for seed, name in enumerate(["test/cat/1.png", "train/cat/1.png", "train/dog/1.png", "unlabeled/1.png"]):
        save(noise(seed), tmp_path / name)
    pictures = open_images(tmp_path, COLOUR)
    assert pictures.test.tolist() == [True, False, False, False]
    assert pictures.labels["class"].tolist() == ["cat", "cat", "dog", ""]


def test_a_class_called_train_alone_is_no_split(tmp_path: Path):
    for seed, name in enumerate(["train/1.png", "tram/1.png"]):
        save(noise(seed), tmp_path / name)
    pictures = open_images(tmp_path, COLOUR)
    assert pictures.test is None
    assert pictures.labels["class"].tolist() == ["train", "tram"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("options", [COLOUR, GRAY], ids=["colour", "gray"])
def test_every_mode_loads_as_the_same_middle_gray(tmp_path: Path, mode: str, options: PatchOptions):
    if mode.startswith("I"):
        image = Image.fromarray(np.full((40, 40), 128 * 257, dtype=np.uint16 if mode == "I;16" else np.int32))
    elif mode == "1":
        image = Image.fromarray(np.indices((40, 40)).sum(0) % 2 == 0)  # a chessboard
    else:
        image = Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode)
    suffix = ".jpg" if mode in ("CMYK", "YCbCr") else ".tif" if mode == "I" else ".png"
    for name in ("1", "2"):
        save(image, tmp_path / (name + suffix))
    with Image.open(tmp_path / ("1" + suffix)) as saved:
        assert saved.mode == ("RGB" if mode == "YCbCr" else mode)
    patches = open_images(tmp_path, options).read(0, 0, 49)
    assert np.allclose(pixels_of(patches, options.gray), 128, atol=4)


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "bmp", "webp", "tif", "TIFF", "ppm"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (33, 500)])
def test_every_extension_and_size_loads(tmp_path: Path, extension: str, size: tuple[int, int]):
    for name in ("1", "2"):
        save(Image.new("RGB", size, (200, 100, 50)), tmp_path / f"{name}.{extension}")
    patches = open_images(tmp_path, COLOUR).read(1, 0, 49)
    assert np.allclose(pixels_of(patches, gray=False), (200, 100, 50), atol=4)


def test_the_centre_is_kept(tmp_path: Path):
    image = Image.new("RGB", (96, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    for name in ("1.png", "2.png"):
        save(image, tmp_path / name)
    assert np.allclose(pixels_of(open_images(tmp_path, COLOUR).read(0, 0, 49), gray=False), 255, atol=1e-3)


def test_16_bits_are_scaled_not_clipped(tmp_path: Path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    save(Image.fromarray(ramp), tmp_path / "1.png")
    save(Image.fromarray(np.rint(ramp / 257).astype(np.uint8)), tmp_path / "2.png")
    pictures = open_images(tmp_path, GRAY)
    assert torch.equal(pictures.read(0, 0, 49), pictures.read(1, 0, 49))


def test_transparent_parts_are_white(tmp_path: Path):
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    save(clear, tmp_path / "rgba.png")
    save(Image.new("P", (32, 32), 0), tmp_path / "palette.png", transparency=0)
    save(clear.convert("LA"), tmp_path / "la.png")
    pictures = open_images(tmp_path, COLOUR)
    for sample in range(3):
        assert np.allclose(pixels_of(pictures.read(sample, 0, 49), gray=False), 255, atol=1e-3)


def test_exif_orientation_is_respected(tmp_path: Path):
    upright = noise(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    save(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.png", exif=exif)
    save(upright, tmp_path / "upright.png")
    pictures = open_images(tmp_path, COLOUR)
    assert torch.equal(pictures.read(0, 0, 49), pictures.read(1, 0, 49))


@pytest.mark.parametrize("size", [(32, 32), (640, 480)])
def test_truncated_jpeg_is_named_and_skipped(folder: Path, size: tuple[int, int]):
    path = save(noise(9, *size), folder / "dog/3.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    Image.open(path).close()  # it opens fine
    pictures = open_images(folder, COLOUR)
    assert len(pictures.ids) == 4
    assert [skip.path for skip in pictures.skipped] == ["dog/3.jpg"]
    assert "truncated" in pictures.skipped[0].reason


def test_what_is_no_picture_is_named_and_skipped(folder: Path):
    (folder / "cat/empty.png").touch()
    (folder / "cat/text.jpg").write_text("not a picture")
    (folder / "cat/link.png").symlink_to(folder / "nowhere.png")
    (folder / "cat/script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    save(Image.fromarray(np.ones((32, 32), dtype=np.float32)), folder / "cat/float.tif")
    (folder / "cat/.hidden.png").write_text("ignored")
    (folder / "cat/notes.txt").write_text("ignored")
    pictures = open_images(folder, COLOUR)
    reasons = {Path(skip.path).name: skip.reason for skip in pictures.skipped}
    assert reasons == {
        "empty.png": "not a picture",
        "text.jpg": "not a picture",
        "script.jpg": "not a picture",
        "link.png": "a link to what is not there",
        "float.tif": "floating-point pixels have no known range",
    }


def test_a_picture_lost_after_opening_is_named(folder: Path):
    pictures = open_images(folder, COLOUR)
    (folder / "cat/1.png").unlink()
    with pytest.raises(DataError, match=re.escape(str(folder / "cat/1.png"))):
        pictures.read(0, 0, 49)


@pytest.mark.parametrize("case", ["missing", "file", "empty", "one picture", "one usable picture"])
def test_bad_input_gives_an_error_with_the_path(tmp_path: Path, case: str):
    path = tmp_path / "pictures"
    if case == "file":
        path.touch()
    elif case != "missing":
        path.mkdir()
    if case.startswith("one"):
        save(noise(0), path / "1.png")
    if case == "one usable picture":
        (path / "2.png").touch()
    with pytest.raises(DataError, match=re.escape(str(path))):
        open_images(path, COLOUR)


def test_identity_changes_with_files_and_options_only(folder: Path):
    identity = open_images(folder, COLOUR).identity
    assert identity == open_images(folder, COLOUR).identity
    assert identity != open_images(folder, GRAY).identity
    with open(folder / "cat/1.png", "ab") as file:
        file.write(b"more")
    assert identity != open_images(folder, COLOUR).identity


@pytest.mark.parametrize(("picture", "nearest"), [(65, 64), (70, 72), (10, 16), (0, 16)])
def test_an_impossible_picture_size_names_the_nearest_possible(picture: int, nearest: int):
    with pytest.raises(ConfigError, match=f"{picture} pixels .* is {nearest}\\."):
        PatchOptions(picture=picture, patch=16, patch_stride=8, gray=False, flip=False)
    assert PatchOptions(picture=nearest, patch=16, patch_stride=8, gray=False, flip=False).columns >= 1


@pytest.mark.parametrize(("patch", "patch_stride"), [(0, 8), (16, 0), (16, -8)])
def test_impossible_patches_are_refused(patch: int, patch_stride: int):
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        resolve(overrides={"data.picture": 64, "data.patch": patch, "data.patch_stride": patch_stride})


def test_real_pictures(tmp_path: Path):
    if not REAL.is_dir():
        pytest.skip(f"the CIFAR-10 pictures are not at {REAL}")
    for part in ("train", "test"):
        for name in ("cat", "ship"):
            (tmp_path / part / name).mkdir(parents=True)
            for path in sorted((REAL / part / name).iterdir())[:5]:
                (tmp_path / part / name / path.name).symlink_to(path)
    pictures = open_images(tmp_path, COLOUR)
    patches = torch.stack([pictures.read(i, 0, 49) for i in range(20)])
    assert pictures.test.sum() == 10
    assert sorted(set(pictures.labels["class"])) == ["cat", "ship"]
    assert not pictures.skipped
    assert abs(patches.mean()) < 0.7
    assert 0.5 < patches.std() < 1.5


def test_a_long_text_is_no_hindrance(folder: Path):
    info = PngImagePlugin.PngInfo()
    for number, letters in enumerate((2**21, 2**22)):
        info.add_text(f"Comment {number}", "x" * letters, zip=True)
    save(noise(5), folder / "cat/zipped.png", pnginfo=info)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 2**21)
    save(noise(6), folder / "cat/plain.png", pnginfo=info)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Comment", "é" * 2**20, zip=True)
    save(noise(7), folder / "cat/international.png", pnginfo=info)
    pictures = open_images(folder, COLOUR)
    assert (len(pictures.ids), pictures.skipped) == (7, [])


@pytest.mark.parametrize("frames", [1, 3])
def test_a_gif_is_read(tmp_path: Path, frames: int):
    first, *others = [Image.new("L", (32, 32), 128 + number) for number in range(frames)]
    for name in ("1.gif", "2.GIF"):
        save(first, tmp_path / name, save_all=True, append_images=others)
    assert np.allclose(pixels_of(open_images(tmp_path, COLOUR).read(0, 0, 49), gray=False), 128, atol=2)


@pytest.mark.parametrize(("largest", "bits"), [(4095, 12), (3000, 12), (1023, 10), (16383, 14)])
def test_values_of_few_bits_in_pictures_of_16_are_pointed_out(tmp_path: Path, largest: int, bits: int):
    for number, most in enumerate((largest, 40)):
        save(Image.fromarray(np.full((32, 32), most, dtype=np.uint16)), tmp_path / f"{number}.png")
    (note,) = open_images(tmp_path, GRAY).notes
    assert f"2 pictures of 16 bits hold values up to {largest} only, as if of {bits} bits" in note
    assert f"store them times {2 ** (16 - bits)}" in note


def test_values_of_all_bits_are_as_they_should_be(tmp_path: Path):
    for number, most in enumerate((65535, 40)):
        save(Image.fromarray(np.full((32, 32), most, dtype=np.uint16)), tmp_path / f"{number}.png")
    assert open_images(tmp_path, GRAY).notes == []


def test_formats_that_are_not_read_are_named(folder: Path):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name, content in {
        "1.HEIC": heic,
        "2.jpg": heic,
        "3.jpg": heic.replace(b"heic", b"mif1", 1),
        "4.png": heic.replace(b"heic", b"avif", 1),
        "5.avif": b"",
    }.items():
        (folder / name).write_bytes(content)
    reasons = {skip.path: skip.reason for skip in open_images(folder, COLOUR).skipped}
    assert reasons == {
        "1.HEIC": "HEIC is not read; convert it to PNG or JPEG",
        "2.jpg": "HEIC is not read; convert it to PNG or JPEG",
        "3.jpg": "HEIC is not read; convert it to PNG or JPEG",
        "4.png": "a file of the kind 'avif' is not read; convert it to PNG or JPEG",
        "5.avif": "AVIF is not read; convert it to PNG or JPEG",
    }
