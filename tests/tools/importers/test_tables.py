"""Tables written by hand or by script: ambiguous rows are left out and counted."""

import json
from pathlib import Path

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.tools.importers.formats import read_foreign

CASES = Path(__file__).with_name("tables.json")
OTHER_WIDTH = "rows with more or fewer cells than columns"


@pytest.fixture
def read(tmp_path, clips):
    """Reads a table beside the clips; returns rows as (clip's name, text), and counts by reason of the others."""

    def read(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        _, found = read_foreign(tmp_path / name, None)
        return [(row["audio"][-5:-4], row["text"]) for row in found.rows], dict(found.left_out)

    return read


@pytest.mark.parametrize(("name", "content", "rows", "left_out"), json.loads(CASES.read_text()))
def test_bad_quotes_cost_no_other_row_or_cell(read, name, content, rows, left_out):
    assert read(name, content) == (list(rows.items()), left_out)


def test_cell_over_the_limit_of_csv_costs_only_its_row(read):
    rows, left_out = read("m.csv", f"file_name,text\na.wav,{'x' * 140_000}\nb.wav,One")
    assert rows == [("b", "One")] and [*left_out.values()] == [1]


def test_left_out_rows_are_reported_with_their_line(tmp_path, clips):
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.wav", "text": "One"}\n\n{"file_name": "b.wav" "text": "Two"}')
    _, found = read_foreign(tmp_path / "m.jsonl", None)
    assert found.lines(tmp_path) == [
        f"left out: 1 × lines that are not JSON, e.g. {tmp_path}/m.jsonl:3: Expecting ',' delimiter, column 23"
    ]
    (tmp_path / "m.csv").write_text("file_name,text\n\na.wav,One\nb.wav,Two, three\n")
    _, found = read_foreign(tmp_path / "m.csv", None)
    assert found.lines(tmp_path) == [f"left out: 1 × {OTHER_WIDTH}, e.g. {tmp_path}/m.csv:4: 3 instead of 2"]


def test_two_text_columns_without_the_name_text(read):
    with pytest.raises(ConfigError, match="`sentence`, `raw_text`: which one is the text"):
        read("m.csv", "file_name,sentence,raw_text\na.wav,One,Two\n")
    assert read("m.csv", "file_name,sentence,raw_text\na.wav,One,One\n")[0] == [("a", "One")]


@pytest.mark.parametrize("header", ["file_name,text,Text", "file_name,text,Speaker ID,speaker-id"])
def test_duplicate_column(read, header):
    with pytest.raises(ConfigError, match="m.csv:1 has a duplicate column `(text|speaker_id)`"):
        read("m.csv", f"{header}\na.wav,One,a,b\n")


def test_known_columns_are_kept_and_others_reported_once(tmp_path, clips):
    header = "file_name,text,Speaker ID,scene,ref_audio,ref_text,offset,duration,language,sentence"
    lines = [
        "a.wav,One.,anna,A quiet room.,b.wav,Two.,0,0.5,en,",
        "b.wav,Two.,bert,,gone.wav,Two.,,,en,",
        "c.wav,Three.,1,,c.wav,Three.,,2.5,,",
        "d.wav,Four.,,,,,soon,1,en,4",
        "e.wav,Five.,,,,,,long,en,",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join([header, *lines]))
    _, found = read_foreign(tmp_path, None)
    reference = {"ref_audio": f"{clips}/b.wav", "ref_text": "Two."}
    assert found.rows == [
        {"audio": f"{clips}/a.wav", "text": "One.", "speaker": "anna", "scene": "A quiet room."}
        | reference
        | {"offset": 0.0, "duration": 0.5},
        {"audio": f"{clips}/b.wav", "text": "Two.", "speaker": "bert"},
        {"audio": f"{clips}/c.wav", "text": "Three.", "speaker": "1", "duration": 2.5},
        {"audio": f"{clips}/e.wav", "text": "Five."},
    ]
    assert [line.split(", e.g. ")[0] for line in found.lines(tmp_path)] == [
        f"{tmp_path}: language: not read, in 4 rows",
        f"{tmp_path}: sentence, duration: not read, in 1 row",
        "left out: 1 × references without a clip or text (their rows are kept)",
        "left out: 1 × references that are the row's own clip (their rows are kept)",
        "left out: 1 × rows with an invalid slice (`offset`, `duration`)",
    ]


@pytest.mark.parametrize(
    ("columns", "cells", "row"),
    [
        ("start_sec,end_sec", "0.5,0.75", {"offset": 0.5, "duration": 0.25}),
        ("begin_time,duration,Channel ID", "0.5,0.25,1", {"offset": 0.5, "duration": 0.25, "channel": 1}),
        ("offset_ms,duration_ms", "500,250", {"offset": 0.5, "duration": 0.25}),
        ("channel,duration", "left,long", {}),
        ("end", "-1", None),
        ("start,end", "0.5,0.5", None),
        ("start_sample,end_sample", "1,2", "`start_sample`: is not in seconds"),
        ("channel,ch", "0,1", "`ch`: "),
    ],
)
def test_slice_under_any_name_is_read_or_the_table_is_refused(tmp_path, clips, columns, cells, row):
    (tmp_path / "m.csv").write_text(f"file_name,text,{columns}\na.wav,One.,{cells}\n")
    if isinstance(row, str):
        with pytest.raises(ConfigError, match=row):
            read_foreign(tmp_path / "m.csv", None)
    else:
        _, found = read_foreign(tmp_path / "m.csv", None)
        assert found.rows == ([{"audio": f"{clips}/a.wav", "text": "One.", **row}] if row is not None else [])
        assert [*found.left_out.values()] == ([1] if row is None else [])


def test_table_without_a_header_may_have_other_delimiters(tmp_path, clips):
    for delimiter in "|\t,":
        rows = [["a", "anna", "One, two."], ["b", "bert", 'Say "so".'], ["c", "anna", "Three."]]
        quoted = [[cells[0], cells[1], f'"{cells[2].replace(chr(34), chr(34) * 2)}"'] for cells in rows]
        lines = [delimiter.join(cells) for cells in (quoted if delimiter == "," else rows)]
        (tmp_path / "m.csv").write_text("\n".join(lines))
        _, found = read_foreign(tmp_path / "m.csv", "ljspeech")
        assert [(row["audio"], row["speaker"], row["text"]) for row in found.rows] == [
            (f"{clips}/{clip}.wav", *more) for clip, *more in rows
        ]


def test_speaker_may_be_number_0(tmp_path, clips):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", "text": "One.", "speaker": 0}))
    _, found = read_foreign(tmp_path, None)
    assert found.rows == [{"audio": f"{clips}/a.wav", "text": "One.", "speaker": "0"}] and found.lines(tmp_path) == []


def test_nan_counts_as_missing(tmp_path, clips):
    row = {"file_name": "a.wav", "text": "One."} | dict.fromkeys(
        ("speaker", "offset", "duration", "lang"), float("nan")
    )
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    _, found = read_foreign(tmp_path, None)
    assert found.rows == [{"audio": f"{clips}/a.wav", "text": "One."}] and found.lines(tmp_path) == []


def test_one_of_two_tables_in_a_folder_is_read(tmp_path, read):
    read("metadata.csv", "file_name,text\na.wav,One\n")
    rows, _ = read("metadata.jsonl", json.dumps({"file_name": "a.wav", "text": "One"}))
    _, found = read_foreign(tmp_path, None)
    assert len(rows) == len(found.rows) == 1
    assert found.left_out == {"further tables in a folder with a metadata.csv": 1}
    (tmp_path / "metadata.csv").write_text("other,columns\n1,2\n")
    _, found = read_foreign(tmp_path, "audiofolder")
    assert len(found.rows) == 1 and found.left_out == {"further tables in a folder with a metadata.jsonl": 1}


def test_nested_table_is_found_but_hidden_ones_are_not(tmp_path):
    for folder in ("data/train", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.wav").write_bytes(b"RIFF")
        (tmp_path / folder / "metadata.csv").write_text("file_name,text\na.wav,One\n")
    kind, found = read_foreign(tmp_path, None)
    assert kind == "audiofolder" and [row["audio"] for row in found.rows] == [f"{tmp_path}/data/train/a.wav"]
