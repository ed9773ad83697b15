"""Files that are whole or not there."""

import hashlib

import pytest

from higgs_ds.errors import first_of
from higgs_ds.files import replacing, sha256, write_text


def test_a_file_and_a_folder_are_replaced_whole(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_text(file, "one")
    write_text(file, "zwölf")
    assert file.read_text(encoding="utf-8") == "zwölf"
    for name in ("one", "two"):
        with replacing(folder) as beside:
            beside.mkdir()
            (beside / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("name", ["n" * 251 + ".wav", "ü" * 125 + ".flac", "\udcff" * 240])
def test_a_name_as_long_as_may_be_is_written_to(name, tmp_path):
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    write_text(file, "before")
    with pytest.raises(ZeroDivisionError), replacing(file) as beside:
        beside.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError):
        write_text(tmp_path / "nowhere" / "file", "x")


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "loss.png/somebodys").write_text("work")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "loss.png", "x")
    assert (tmp_path / "loss.png/somebodys").read_text() == "work" and len(list(tmp_path.iterdir())) == 1


def test_a_name_where_a_link_stands_replaces_the_link_and_not_what_it_points_to(tmp_path):
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.mkdir()
    link.symlink_to(kept)
    write_text(link, "text")
    assert link.is_file() and not link.is_symlink() and kept.is_dir()


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert sha256(tmp_path / "file") == hashlib.sha256(bytes(3 << 20)).hexdigest()


def test_a_long_list_of_problems_is_counted():
    assert first_of(["a", "b"], 2) == ["a", "b"]
    assert first_of(["a", "b", "c"], 2) == ["a", "b", "… and 1 more"]
