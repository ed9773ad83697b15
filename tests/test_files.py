"""Files that are whole or not there."""

from pathlib import Path

import pytest

from higgs_ds.errors import first_of
from higgs_ds.files import filling, first_free, name_beside, remove_leftovers, replacing, write_text


def test_a_file_and_a_folder_are_replaced_whole(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_text(file, "one")
    write_text(file, "zwölf")
    assert file.read_text(encoding="utf-8") == "zwölf"
    long, link = tmp_path / ("ü" * 125 + ".flac"), tmp_path / "link"  # 255 bytes; a link is replaced, not followed
    link.symlink_to(folder)
    for path in (long, link):
        write_text(path, "text")
        assert path.is_file() and not path.is_symlink()
        path.unlink()
    for name in ("one", "two"):
        with replacing(folder) as beside:
            beside.mkdir()
            (beside / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_new_folder_appears_whole_and_an_empty_one_is_filled_from_within(tmp_path, monkeypatch):
    there, new = tmp_path / "there", tmp_path / "above" / "new"
    there.mkdir()
    monkeypatch.chdir(there)
    (tmp_path / "link").symlink_to(there)
    for folder in (new, Path.cwd(), tmp_path / "link"):
        was = folder.stat().st_ino if folder.exists() else None
        with filling(folder) as beside:
            (beside / "config.json").write_text("{}")
            (beside / "weights").write_text("w")
            assert not any((folder / name).exists() for name in ("config.json", "weights"))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights"]
        assert was in (None, folder.stat().st_ino)
        for file in folder.iterdir():
            file.unlink()
    assert (tmp_path / "link").is_symlink() and sorted(path.name for path in tmp_path.iterdir())[0] == "above"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_could_not_be_filled_is_as_it_was(there, tmp_path):
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt), filling(folder) as beside:
        (beside / "weights").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == ([folder] if there else [])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    write_text(file, "before")
    with pytest.raises(ZeroDivisionError), replacing(file) as beside:
        beside.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError):
        write_text(tmp_path / "nowhere" / "file", "x")
    file.unlink()  # nor is a folder replaced by a file
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "loss.png/somebodys").write_text("work")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "loss.png", "x")
    assert (tmp_path / "loss.png/somebodys").read_text() == "work" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path):
    left = [name_beside(tmp_path / "adapter"), name_beside(tmp_path / "adapter")]
    left[0].mkdir()
    (left[0] / "half").write_text("x")
    left[1].write_text("x")
    others = [".adapter.tmp", ".adapter.mine-01234567.tmp", "adapter.1-01234567.tmp", ".adapter-best.1-01234567.tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    remove_leftovers(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    remove_leftovers(tmp_path / "nowhere/adapter")


def test_the_first_free_name_is_no_link_to_nowhere_either(tmp_path):
    assert first_free(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-1").symlink_to("nowhere")
    assert first_free(tmp_path / "a") == tmp_path / "a-2"


def test_a_long_list_of_problems_is_counted():
    assert first_of(["a", "b"], 2) == ["a", "b"]
    assert first_of(["a", "b", "c"], 2) == ["a", "b", "… and 1 more"]
