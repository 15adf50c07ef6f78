"""Which folders are splits and which are classes: as data sets are published, and as people unpack them."""

import shlex

import pytest

from marjax.data.prepare.listing import list_folder
from marjax.errors import UserError


def put(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return str(root)


BOTH = {"train": 2, "validation": 1}
LAYOUTS = {
    "Training/a/1.png Training/b/2.png Testing/a/3.png": (["a", "b"], {"train": 2, "test": 1}),
    "seg_train/seg_train/a/1.png seg_train/seg_train/b/2.png seg_test/seg_test/a/3.png": (
        ["a", "b"],
        {"train": 2, "test": 1},
    ),
    "Train/a/1.png Train/b/2.png Val/b/3.png": (["a", "b"], BOTH),
    "TRAIN/a/1.png TRAIN/b/2.png VALIDATION/b/3.png": (["a", "b"], BOTH),
    "train/a/1.png train/b/2.png valid/b/3.png": (["a", "b"], BOTH),
    "train/a/1.png train/b/2.png dev/b/3.png": (["a", "b"], BOTH),
    "training_set/a/1.png training_set/b/2.png test_set/b/3.png": (["a", "b"], {"train": 2, "test": 1}),
    "train2017/a/1.png train2017/b/2.png val2017/b/3.png": (["a", "b"], BOTH),
    "archive/data/train/a/1.png archive/data/train/b/2.png archive/data/val/a/3.png": (["a", "b"], BOTH),
    "cats_and_dogs/train/a/1.png cats_and_dogs/train/b/2.png cats_and_dogs/notes.txt": (["a", "b"], {"train": 2}),
    "images/001.a/1.png images/002.b/2.png images.txt attributes/x.txt": (["001.a", "002.b"], {"train": 2}),
    "set/images/a/1.png set/images/b/2.png set/lists/train.txt": (["a", "b"], {"train": 2}),
    "set/images/a/1.png set/lists/train.txt": (["set"], {"train": 1}),
    "train/images/1.png val/images/2.png": (["own"], {"train": 1, "validation": 1}),
    "train/a/images/1.png train/b/images/2.png": (["a", "b"], {"train": 2}),
}


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_and_classes_by_their_common_names(tmp_path, names):
    listing = list_folder(put(tmp_path / "own", names.split()))
    classes, counts = LAYOUTS[names]
    assert listing.classes == classes
    assert {split: len(items) for split, items in listing.splits.items()} == counts
    for items in listing.splits.values():
        assert len(classes) == 1 or all(f"/{classes[item.label]}/" in item.name for item in items)


@pytest.mark.parametrize(
    "names, left_out",
    [
        ("train/a/1.png train/b/2.png test/3.png test/4.png", "test/ holds 2 pictures without class folders"),
        (
            "seg_train/seg_train/a/1.png seg_train/seg_train/b/2.png seg_pred/seg_pred/3.png seg_pred/seg_pred/4.png",
            "seg_pred/ holds 2 pictures without class folders",
        ),
        ("train/a/images/1.png train/b/images/2.png val/images/3.png val/images/4.png", "val/images/ holds 2 pictures"),
    ],
)
def test_pictures_of_no_class_are_left_out_with_a_warning(tmp_path, names, left_out):
    listing = list_folder(put(tmp_path / "own", names.split()))
    assert listing.classes == ["a", "b"] and {s: len(items) for s, items in listing.splits.items()} == {"train": 2}
    assert listing.ignored == {"without a class": 2} and left_out in listing.warnings[0]


def test_commands_in_warnings_can_be_pasted(tmp_path):
    folder = put(tmp_path / "my pictures", ["dogs/terrier/1.png", "dogs/poodle/2.png"])
    (warning,) = list_folder(folder).warnings
    assert shlex.split(warning.partition("--images ")[2]) == [str(tmp_path / "my pictures" / "dogs")]


@pytest.mark.parametrize(
    "names, classes, doubt",
    [
        ("dogs/terrier/1.png dogs/poodle/2.png", ["dogs"], "dogs/ is the only class, with dogs/poodle/"),
        ("images/1.png annotations/1.png", ["annotations", "images"], "images/ is taken for a class"),
        ("test/1.png cats/1.png", ["cats", "test"], "test/ is taken for a class"),
        ("trainA/1.png B/1.png", ["B", "trainA"], "trainA/ is taken for a class"),
        ("images/a/1.png images/b/1.png", ["a", "b"], "classes are the folders in images/"),
    ],
)
def test_what_is_doubtful_is_warned_about(tmp_path, names, classes, doubt):
    listing = list_folder(put(tmp_path / "own", names.split()))
    assert listing.classes == classes
    (warning,) = listing.warnings
    assert doubt in warning and (f"--images {tmp_path}" in warning or len(classes) == 2)


@pytest.mark.parametrize(
    "names, says",
    [
        ("val/a/1.png test/a/1.png", "test/, val/ but no train/.*--images"),
        ("Validation/a/1.png", "Validation/ but no train/"),
        ("train/a/1.png Train/a/2.png", "Train/ and train/ are both split train"),
        ("train/a/1.png val/a/2.png valid/a/2.png", "val/ and valid/ are both split validation"),
        ("Training/a/1.png Training/2.png", "Training/ holds pictures .Training/2.png. beside class folders"),
        ("Training/a/1.png extra/1.png", "Training/ with folders inside, and extra/"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path, names, says):
    with pytest.raises(UserError, match=says) as caught:
        list_folder(put(tmp_path / "own", names.split()))
    assert "\n" not in str(caught.value)
