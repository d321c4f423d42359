"""Whatever lies in a folder is found once, or named with the reason why it is not used."""

import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.files import walk
from haste.files.walk import Directory


def tree(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def found(root):
    """Names and what is not used, as text."""
    inside = Directory(root)
    return {"/".join(name) for name in inside.names}, dict(inside.unused)


def test_what_is_hidden_or_left_there_by_a_program_is_named(tmp_path):
    left = [".DS_Store", "Thumbs.db", "a/._1.png", ".git/2.png", "__MACOSX/a/._1.png", "a/@eaDir/1.png/THUMB.jpg"]
    names, unused = found(tree(tmp_path, "a/1.png", "b.txt", *left))
    assert names == {"a/1.png", "b.txt"}
    where = {".DS_Store", "Thumbs.db", "a/._1.png", ".git/", "__MACOSX/", "a/@eaDir/"}
    assert unused == dict.fromkeys(where, walk.HIDDEN)


def test_folders_and_files_behind_links_are_found(tmp_path):
    tree(tmp_path, "in/a/1.png", "elsewhere/2.png", "elsewhere/deep/3.png", "other/4.png")
    (tmp_path / "in/b").symlink_to("../elsewhere")
    (tmp_path / "in/a/4.png").symlink_to(tmp_path / "other/4.png")
    assert found(tmp_path / "in") == ({"a/1.png", "a/4.png", "b/2.png", "b/deep/3.png"}, {})
    assert Directory(tmp_path / "in").folders == ["a", "b"]


def test_nothing_is_taken_twice_by_way_of_a_link(tmp_path):
    root = tree(tmp_path / "in", "z/1.png", "z/deep/2.png", "y/3.png")
    for name, target in {
        "a": "z",
        "y/back": "..",
        "y/self": ".",
        "b.png": "z/1.png",
        "up": "/",
        "more": "more",
    }.items():
        (root / name).symlink_to(target)
    (tmp_path / "out.png").touch()
    for name in ("c.png", "d.png"):
        (root / name).symlink_to("../out.png")
    names, unused = found(root)
    assert names == {"z/1.png", "z/deep/2.png", "y/3.png", "c.png", "more"}  # a link to itself is one to nothing
    twice = {"a/", "y/back/", "y/self/", "b.png", "d.png"}
    assert unused == dict.fromkeys(twice, "a link to what is here too") | {"up/": "a link to a folder above"}
    assert Directory(root).folders == ["y", "z"]


def test_a_file_is_opened_only_if_it_is_one(tmp_path, monkeypatch):
    tree(tmp_path, "whole.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")  # whose path must be short
    inside, reasons = Directory(tmp_path), {}
    assert len(inside.names) == 6 and not inside.unused
    for name in inside.names:
        try:
            assert inside.read(name) == b"whole.png"
        except ValueError as error:
            reasons[name[0]] = str(error)
    assert reasons == {
        "empty.png": walk.EMPTY,
        "link.png": walk.NO_TARGET,
        "loop.png": walk.NO_TARGET,
        "pipe.png": walk.NOT_REGULAR,
        "socket.png": walk.NOT_REGULAR,
    }


NAMES = st.sampled_from(
    ["a", "b", "A", "x.png", "X.PNG", ".DS_Store", ".h", "__MACOSX", "n.txt", os.fsdecode(b"\xff.png")]
)
PLACES = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
THINGS = st.lists(
    st.tuples(st.sampled_from(["file", "folder", "link", "hard", "pipe"]), PLACES, PLACES), min_size=1, max_size=12
)


@settings(max_examples=400, deadline=None)
@given(things=THINGS)
def test_every_file_of_any_tree_is_found_once_or_named(things, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for kind, name, other in things:
        path = root / name
        if os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_bytes(b"x")
            elif kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(os.path.relpath(root / other, path.parent))
            elif kind == "hard":
                os.link(root / other, path, follow_symlinks=False)
            else:
                os.mkfifo(path)
        except OSError:
            continue  # a file where a folder would be
    inside = Directory(root)
    names, left = {"/".join(name) for name in inside.names}, dict(inside.unused)
    assert len(names) == len(inside.names) and len(left) == len(inside.unused) and not names & left.keys()
    # By another walk: everything without a link is used, or it or a folder above it is named.
    for place, folders, files in os.walk(root, followlinks=False):
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(place, name)))):
            path = os.path.relpath(os.path.join(place, name), root)
            above = {path, *(path[: at + 1] for at, letter in enumerate(path) if letter == "/"), path + "/"}
            is_folder = os.path.isdir(os.path.join(place, name))
            below = is_folder and any(one.startswith(path + "/") for one in {*names, *left})
            empty = is_folder and not any(files for *_, files in os.walk(os.path.join(place, name)))
            assert path in names or above & left.keys() or below or empty, path
    # No file is taken by two ways, unless it has two names of its own.
    real = [os.path.realpath(root / name) for name in names if (root / name).exists()]
    assert len(real) == len(set(real))
    walk.told(walk.grouped(inside.unused)).encode()


def test_what_is_not_used_is_counted_by_reason_the_most_frequent_first_and_said_in_one_line():
    unused = [(f"{i}.{suffix}", f"no pictures (.{suffix})") for i in range(5) for suffix in ("a", "txt")]
    groups = walk.grouped([*unused, (".x", "hidden"), ("b\udcff", "an empty file"), (".y", "hidden")])
    found = [("no pictures (.a)", 5), ("no pictures (.txt)", 5), ("hidden", 2), ("an empty file", 1)]
    assert [(one["reason"], one["count"]) for one in groups] == found
    said = r"no pictures (10: .a, .txt); hidden (2: .x, .y); an empty file (1: b\udcff)"
    assert walk.told(groups) == f"not used: {said}"
    assert walk.told([]) == ""


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, instead in (("file", "a file"), ("gone", "nothing")):
        with pytest.raises(ValueError, match=f"{name}: expected a folder of images, found {instead}"):
            Directory(tmp_path / name)
