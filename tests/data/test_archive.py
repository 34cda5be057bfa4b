"""Images in zips: both layouts, the cache modes, and archives that must not be trusted."""

import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from swinq.data import archive
from swinq.data.datasets import open_dataset
from swinq.data.images import MAX_ENCODED_BYTES, UnreadableImageError
from swinq.data.loader import BatchLoader
from swinq.data.transforms import EvalTransform
from swinq.errors import ConfigError, DataError, SwinqError

WriteFolder = Callable[[Mapping[str, bytes]], Path]
Write = Callable[..., Path]


def assert_same(ours: object, theirs: object) -> None:
    assert [ours.path(i) for i in range(len(ours))] == theirs.names  # type: ignore[attr-defined,arg-type]
    assert ours.classes == theirs.classes  # type: ignore[attr-defined]
    for (pixels, label), (other, same) in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
        assert label == same
        np.testing.assert_array_equal(pixels.numpy(), other.numpy())


def failure(path: Path, transform: EvalTransform, split: str = "val", **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(path, split, transform, **options)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) <= 10
    return str(caught.value)


def map_lines(files: Mapping[str, bytes], split: str = "val") -> dict[str, bytes]:
    """Files of a split, with names below it, as the official archives hold them."""
    return {k.removeprefix(f"{split}/"): v for k, v in files.items() if k.startswith(split)}


def test_two_data_sets_in_a_zip_are_refused(
    image_files: dict[str, bytes], write_zip: Callable[..., Path], transform: EvalTransform
) -> None:
    twice = {f"{top}/{name}": data for top in "AB" for name, data in image_files.items()}
    assert "which are one image's place" in failure(write_zip(twice), transform)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("cache_mode", ["no", "part", "full"])
@pytest.mark.parametrize("prefix", ["", "imagenet/"])
def test_a_zip_is_the_same_data_set_as_its_folder(
    image_files: dict[str, bytes],
    write_folder: WriteFolder,
    write_zip: Write,
    transform: EvalTransform,
    method: int,
    cache_mode: str,
    prefix: str,
) -> None:
    extra = {"classes.json": b"{}", "__MACOSX/val/ant/._a.png": b"", "val/ant/notes.txt": b""}
    inside = {prefix + name: data for name, data in {**image_files, **extra}.items()}
    path = write_zip(inside, method=method)
    folder = write_folder(image_files)
    for split in ("train", "val"):
        zipped = open_dataset(path, split, transform, cache_mode=cache_mode, num_classes=3)
        assert_same(zipped, open_dataset(folder, split, transform))


def test_microsofts_zip_and_map_round_trip(
    image_files: dict[str, bytes],
    write_folder: WriteFolder,
    write_mapped: Write,
    transform: EvalTransform,
) -> None:
    files = map_lines(image_files)
    labels = {"ant": 0, "bee": 1, "cat": 2}
    root = write_mapped(files, [f"{name}\t{labels[name.split('/')[0]]}" for name in files])
    zipped = open_dataset(root, "val", transform, zip_mode=True, num_classes=3)
    assert_same(zipped, open_dataset(write_folder(image_files), "val", transform))
    assert_same(open_dataset(root, "val", transform), zipped)  # found without --zip as well


def test_the_map_decides_labels_and_order(
    image_files: dict[str, bytes], write_mapped: Write, transform: EvalTransform
) -> None:
    files = {f"ILSVRC_{i}.png": data for i, data in enumerate(map_lines(image_files).values())}
    lines = ["ILSVRC_4.png\t7", "", "ILSVRC_1.png\t0 ", "ILSVRC_0.png\t7"]
    data = open_dataset(write_mapped(files, lines), "val", transform, num_classes=10)
    assert data.labels.tolist() == [7, 0, 7] and data.path(0) == "val/ILSVRC_4.png"
    assert data.classes == [str(i) for i in range(10)]


def test_zip_mode_wins_over_a_folder_of_the_same_split(
    image_files: dict[str, bytes], write_mapped: Write, transform: EvalTransform, tmp_path: Path
) -> None:
    root = write_mapped({"a.png": image_files["val/ant/ant_0.png"]}, ["a.png\t0"])
    for name, data in image_files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    assert len(open_dataset(root, "val", transform)) == 6
    assert len(open_dataset(root, "val", transform, zip_mode=True)) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.png", "line 2"),
        ("a.png 0", "line 2"),
        ("a.png\t", "line 2"),
        ("a.png\tzero", "line 2"),
        ("a.png\t-1", "line 2"),
        ("a.png\t1.0", "line 2"),
        ("a.png\t²", "line 2"),
        ("\t1", "line 2"),
        ("a.png\t3", "label 3 of a.png is out of range"),
        ("a.png\t99999999999999999999", "line 2"),
        ("missing.png\t1", "missing.png"),
        ("../a.png\t1", "../a.png"),
        ("b.png\t1", "more than once: b.png"),
    ],
)
def test_wrong_lines_of_a_map_are_named(
    image_files: dict[str, bytes],
    write_mapped: Write,
    transform: EvalTransform,
    line: str,
    said: str,
) -> None:
    sound = image_files["val/ant/ant_0.png"]
    root = write_mapped({"a.png": sound, "b.png": sound}, ["b.png\t0", line])
    message = failure(root, transform, num_classes=3)
    assert said in message and "fix: " in message


def test_an_empty_map_and_a_binary_one_are_named(
    image_files: dict[str, bytes], write_mapped: Write, transform: EvalTransform
) -> None:
    root = write_mapped({"a.png": image_files["val/ant/ant_0.png"]}, [])
    assert "lists no images" in failure(root, transform)
    (root / "val_map.txt").write_bytes(b"\xff\xfe\x00a")
    assert "UTF-8" in failure(root, transform)


def test_zip_mode_without_the_files_says_which_is_missing(
    image_files: dict[str, bytes], write_folder: WriteFolder, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    message = failure(root, transform, zip_mode=True)
    assert "val.zip" in message and "val_map.txt" in message and "drop --zip" in message


def test_one_file_of_the_pair_given_alone_is_explained(
    image_files: dict[str, bytes], write_mapped: Write, transform: EvalTransform
) -> None:
    root = write_mapped({"a.png": image_files["val/ant/ant_0.png"]}, ["a.png\t0"])
    assert "give the folder that holds both" in failure(root / "val.zip", transform)


def test_a_zip_without_the_split_says_what_it_holds(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    path = write_zip({k: v for k, v in image_files.items() if k.startswith("train")})
    assert "it holds train/" in failure(path, transform)
    assert "no images" in failure(write_zip({"a.txt": b"x"}, "b.zip"), transform)


def test_class_counts_and_class_names_of_the_splits_are_checked(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    assert "3 classes" in failure(write_zip(image_files), transform, num_classes=1000)
    partial = {k: v for k, v in image_files.items() if not k.startswith("val/ant")}
    assert "ant" in failure(write_zip(partial, "b.zip"), transform)


@pytest.mark.parametrize(
    "name",
    ["/etc/a.png", "../a.png", "val/../../a.png", "C:/a.png", "val\\..\\..\\a.png", "\\a.png"],
)
def test_names_that_lead_outside_are_refused(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform, name: str
) -> None:
    message = failure(write_zip({**image_files, name: b"x"}), transform)
    assert "lead outside" in message


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_the_same_name_twice_is_refused(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    path = write_zip(image_files)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("val/ant/ant_0.png", b"another")
    assert "more than once" in failure(path, transform)


def test_other_compression_and_encryption_are_refused(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    path = write_zip(image_files, method=zipfile.ZIP_LZMA)
    assert "neither stored nor deflated" in failure(path, transform)
    path = write_zip(image_files, "locked.zip")
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:  # set the encryption bit of every entry of the directory
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)
    assert "encrypted" in failure(path, transform)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_an_archive_cut_short_is_named(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform, keep: float
) -> None:
    path = write_zip(image_files)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "images.zip" in failure(path, transform)


def test_a_damaged_member_is_an_unreadable_image(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(image_files, f"m{method}.zip", method)
        with zipfile.ZipFile(path) as file:
            at = file.getinfo("val/bee/bee_0.png").header_offset + 30 + 17 + 60
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)
        dataset = open_dataset(path, "val", transform, cache_mode="full")
        dataset[0]
        with pytest.raises(UnreadableImageError, match=r"val/bee/bee_0\.png.*damaged in the zip"):
            dataset[2]


def test_random_damage_to_an_archive_ends_in_images_or_our_errors(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    good = np.frombuffer(write_zip(image_files, method=8).read_bytes(), np.uint8)
    path = write_zip({}, "damaged.zip")
    random = np.random.RandomState(2)
    readable = 0
    for _ in range(150):
        bad = good.copy()
        bad[random.randint(len(bad), size=3)] = random.randint(256, size=3)
        path.write_bytes(bad.tobytes())
        try:
            dataset = open_dataset(path, "val", transform)
        except SwinqError:
            continue
        for index in range(len(dataset)):
            try:
                dataset.raw(index)
                readable += 1
            except UnreadableImageError:
                pass
    assert readable > 300  # the damage is small: most images are still there


def test_a_member_larger_than_it_says_is_not_unpacked(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    bomb = {**image_files, "val/ant/ant_0.png": bytes(64 * 2**20)}
    path = write_zip(bomb, method=zipfile.ZIP_DEFLATED)
    data = path.read_bytes().replace(struct.pack("<I", 64 * 2**20), struct.pack("<I", 1000))
    path.write_bytes(data)
    dataset = open_dataset(path, "val", transform)
    tracemalloc.start()
    with pytest.raises(UnreadableImageError, match="damaged in the zip"):
        dataset[0]
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_member_that_says_it_is_huge_is_not_unpacked(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    path = write_zip({**image_files, "val/ant/ant_0.png": b"x" * 77_777}, method=8)
    huge = struct.pack("<I", MAX_ENCODED_BYTES + 1)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 77_777), huge))
    with pytest.raises(UnreadableImageError, match="larger than"):
        open_dataset(path, "val", transform)[0]


def test_cache_modes_keep_nothing_this_ranks_share_or_everything(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    share = [[0, 1], [4]]
    for cache_mode, kept in (("no", []), ("part", [0, 1, 4]), ("full", list(range(9)))):
        path = write_zip(image_files, f"{cache_mode}.zip")
        dataset = open_dataset(path, "train", transform, cache_mode=cache_mode)
        for _ in range(2):  # the second pass finds its images kept already
            assert len(list(BatchLoader(dataset, share))) == 2
        path.write_bytes(bytes(path.stat().st_size))  # what is kept needs no archive any more
        for index in range(9):
            if index in kept:
                dataset[index]
            else:
                with pytest.raises(UnreadableImageError):
                    dataset[index]


def test_more_than_the_memory_holds_is_refused_before_reading(
    image_files: dict[str, bytes],
    write_zip: Write,
    transform: EvalTransform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert archive._free_memory() is None or archive._free_memory() > 2**20  # type: ignore[operator]
    monkeypatch.setattr(archive, "_free_memory", lambda: 100)
    path = write_zip(image_files)
    assert "--cache-mode no" in failure(path, transform, "train", cache_mode="full")
    assert len(open_dataset(path, "train", transform, cache_mode="no")) == 9


def test_a_copy_for_another_process_opens_the_file_itself_and_leaves_the_cache_behind(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    large = {
        **image_files,
        "train/ant/ant_0.png": image_files["train/ant/ant_0.png"] + bytes(10**6),
    }
    dataset = open_dataset(write_zip(large), "train", transform, cache_mode="full")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10**5
    assert_same(pickle.loads(pickled), dataset)  # noqa: S301


def test_unknown_cache_modes_are_refused(
    image_files: dict[str, bytes], write_zip: Write, transform: EvalTransform
) -> None:
    with pytest.raises(ConfigError, match="some"):
        open_dataset(write_zip(image_files), "val", transform, cache_mode="some")


def test_the_shared_photographs_open_and_decode(shared_dir: Path) -> None:
    path = shared_dir / "data" / "imagenette-ci.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    from swinq.data.transforms import eval_transform

    for split, count in (("train", 200), ("val", 100)):
        dataset = open_dataset(path, split, eval_transform("squash", 32), num_classes=10)
        assert len(dataset) == count and dataset.classes[0] == "n01440764"
        assert np.bincount(dataset.labels, minlength=10).min() > 0
        for batch in BatchLoader(dataset, [range(count)]):
            assert batch.images.shape == (count, 3, 32, 32) and batch.images.isfinite().all()
