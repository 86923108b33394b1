"""Frames of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbfeat
from nbfeat import RequestError


def make(top: Path, *names: str) -> None:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"")


def test_a_folder_is_a_frame_of_paths_and_labels_as_people_count(tmp_path: Path) -> None:
    make(tmp_path, "b/10.jpg", "b/2.JPEG", "a/deep/er/x.webp", "a/y.png", "top.tif", "a/notes.txt", ".hidden/z.png")
    make(tmp_path, "b/.z.png", "a 10/1.png", "a 9/1.png")
    frame = nbfeat.folder(tmp_path)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in frame["path"]] == [
        "a/deep/er/x.webp", "a/y.png", "a 9/1.png", "a 10/1.png", "b/2.JPEG", "b/10.jpg", "top.tif",
    ]  # fmt: skip
    assert frame["label"].tolist()[:-1] == ["a", "a", "a 9", "a 10", "b", "b"]
    assert frame["label"].isna().tolist() == [False] * 6 + [True]
    assert list(nbfeat.folder(str(tmp_path), labels=False).columns) == ["path"]


def test_a_folder_is_found_from_anywhere_once_it_is_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "photos/a/1.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nbfeat.folder("photos")["path"].tolist() == [str(tmp_path / "photos" / "a" / "1.png")]
    assert nbfeat.folder("~/photos")["path"].tolist() == [str(tmp_path / "photos" / "a" / "1.png")]


def test_a_folder_that_is_linked_into_itself_ends(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "elsewhere.d/2.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "elsewhere.d" / "2.png")
    names = [Path(path).name for path in nbfeat.folder(tmp_path)["path"]]
    assert names == ["1.png", "linked.png", "2.png"]


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    try:
        (tmp_path / "\udcff.jpg").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such names")
    (path,) = nbfeat.folder(tmp_path)["path"]
    assert Path(path).is_file()


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    make(tmp_path, "notes.txt")
    with pytest.raises(RequestError, match="has no images"):
        nbfeat.folder(tmp_path)
    with pytest.raises(RequestError, match="is a file, not a folder"):
        nbfeat.folder(tmp_path / "notes.txt")
    with pytest.raises(RequestError, match="exist"):
        nbfeat.folder(tmp_path / "gone")
