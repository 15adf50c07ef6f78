"""Folders of folders: each real one once, links after them, and nothing of the system's."""

import os
import socket
import subprocess

import pytest

from marjax.data.prepare.listing import list_folder, list_pictures
from marjax.data.prepare.tree import read_tree
from marjax.errors import UserError


def names(root):
    return [item.name for item in read_tree(root).top.below()]


def put(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * len(path))
    return root


def test_pictures_with_their_names_and_sizes(tmp_path):
    put(tmp_path, "b/2.png", "a/x/1.jpg", "a/0.PNG", "note.txt", "3.tif", "c/none.txt")
    tree = read_tree(tmp_path)
    assert names(tmp_path) == ["3.tif", "a/0.PNG", "a/x/1.jpg", "b/2.png"]
    assert [folder.name for folder in tree.top.filled] == ["a", "b"]
    assert [folder.name for folder in tree.top.empty] == ["c"]
    assert tree.top.num_pictures == 4 and tree.top.folders[0].num_pictures == 2
    assert [(item.size, item.path) for item in tree.top.items] == [(5, str(tmp_path / "3.tif"))]
    assert list_pictures(tmp_path)[0].name == f"{tmp_path.name}/3.tif"


def test_class_folders_that_link_to_each_other(tmp_path):
    """Followed at every level, these would be 8 ** 8 folders."""
    classes = [f"c{i}" for i in range(8)]
    put(tmp_path, *(f"{name}/1.png" for name in classes))
    for name in classes:
        for other in classes:
            if other != name:
                os.symlink(tmp_path / other, tmp_path / name / f"to_{other}")
    listing = list_folder(str(tmp_path))
    assert listing.classes == classes and len(listing.splits["train"]) == 8
    assert len(listing.warnings) == 56 and all("/to_c" in text for text in listing.warnings)


def test_a_real_folder_goes_before_a_link_to_it(tmp_path):
    put(tmp_path / "own", "b/1.png", "b/deep/2.png")
    put(tmp_path / "far", "3.png", "below/4.png")
    os.symlink(tmp_path / "own" / "b", tmp_path / "own" / "a")  # comes first by name
    os.symlink(tmp_path / "far", tmp_path / "own" / "c")
    os.symlink(tmp_path / "far" / "below", tmp_path / "own" / "d")
    os.symlink(tmp_path / "own", tmp_path / "own" / "up")
    os.symlink("/", tmp_path / "own" / "b" / "root")
    os.symlink(tmp_path / "own" / "itself", tmp_path / "own" / "itself")
    tree = read_tree(tmp_path / "own")
    assert [item.name for item in tree.top.below()] == ["b/1.png", "b/deep/2.png", "c/3.png", "c/below/4.png"]
    assert sorted(text.split(" ")[0] for text in tree.warnings) == ["a", "b/root", "d", "up"]
    assert tree.top.num_pictures == 4


@pytest.fixture
def deep(tmp_path):
    """A folder in which to nest folders; pytest itself cannot remove what is nested that deeply."""
    folder = tmp_path / "deep"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", folder], check=True)


def nest(where, name, count):
    """Makes folders in each other below an open one; returns the innermost, open."""
    for _ in range(count):
        os.mkdir(name, dir_fd=where)
        inner = os.open(name, os.O_RDONLY, dir_fd=where)
        os.close(where)
        where = inner
    return where


def test_folders_in_folders_at_any_depth(deep):
    where = nest(os.open(deep, os.O_RDONLY), "a", 1100)
    os.close(os.open("1.png", os.O_CREAT | os.O_WRONLY, dir_fd=where))
    listing = list_folder(str(deep))
    assert listing.classes == ["a"] and listing.splits["train"][0].name == "a/" * 1100 + "1.png"
    os.close(nest(where, "abcdef", 300))  # longer than any path may be
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_tree(deep)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        ".ipynb_checkpoints",
        "__MACOSX",
        "#recycle",
        ".thumbnails",
        "#snapshot",
        ".Trash-1000",
        ".git",
        "@tmp",
        "__pycache__",
    ],
)
def test_folders_of_systems_are_ignored(tmp_path, name):
    put(tmp_path, "a/1.png", "b/1.png", f"{name}/1.png", f"a/{name}/x/2.png")
    listing = list_folder(str(tmp_path))
    assert listing.classes == ["a", "b"] and len(listing.splits["train"]) == 2
    assert listing.ignored == {"hidden or the system's": 2} and not listing.warnings


def test_files_of_systems_and_what_is_no_file(tmp_path):
    put(tmp_path, "a/1.png", "a/Thumbs.db", "a/._1.png", "a/.DS_Store", "a/desktop.ini", "a/notes.txt")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "a" / "zero.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "a" / "s.png"))
    tree = read_tree(tmp_path)
    server.close()
    assert names(tmp_path) == ["a/1.png"]
    assert tree.ignored == {"hidden or the system's": 4, ".txt": 1, "pipes, sockets and devices": 3}
