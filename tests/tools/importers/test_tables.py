"""Tables as people write them by hand and by script: what cannot be told for sure is left out and counted."""

import json

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.tools.importers.formats import read_foreign

NEVER_CLOSED = "rows whose quotes do not close, or close in another row"
OTHER_WIDTH = "rows with another number of cells than the header has names"
NO_JSON = "lines that are not JSON"


@pytest.fixture
def clips(tmp_path):
    """The clips a.wav to e.wav, by name."""
    for name in "abcde":
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF")
    return {name: f"{tmp_path}/{name}.wav" for name in "abcde"}


@pytest.fixture
def read(tmp_path, clips):
    """Rows as (clip's name, text), and what was left out by reason, of a table beside the clips."""

    def read(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        _, found = read_foreign(tmp_path / name, None)
        return [(row["audio"][-5:-4], row["text"]) for row in found.rows], dict(found.left_out)

    return read


CSV, TSV = "file_name,text\n", "path\tsentence\n"


@pytest.mark.parametrize(
    ("name", "content", "rows", "left_out"),
    [
        # A quote that is never closed takes no other row with it, nor one that the next quote closes, nor one that is
        # closed where a row may end, be it that clips have no endings.
        ("m.csv", CSV + 'a.wav,"Hello there\nb.wav,One\nc.wav,Two', {"b": "One", "c": "Two"}, {NEVER_CLOSED: 1}),
        ("m.csv", CSV + 'a.wav,"So\nb.wav,"One, two"\nc.wav,Two', {"b": "One, two", "c": "Two"}, {NEVER_CLOSED: 1}),
        ("m.csv", CSV + 'a.wav,"Hello there\nb.wav,One"\nc.wav,Two', {"b": 'One"', "c": "Two"}, {NEVER_CLOSED: 1}),
        ("m.csv", CSV + 'a,"Hello\nb,One"\nc,"Two\nthree"', {"b": 'One"', "c": "Two three"}, {NEVER_CLOSED: 1}),
        ("m.csv", 'text,file_name\n"So,a.wav\nOne",b.wav\nTwo,c.wav', {"b": 'One"', "c": "Two"}, {NEVER_CLOSED: 1}),
        (
            "m.csv",
            CSV + 'a.wav,"Hello," he said\nb.wav,"Quoted, yes"\nc.wav,"two\r\nlines"\nd.wav,\n',
            {"b": "Quoted, yes", "c": "two lines"},
            {NEVER_CLOSED: 1, "rows without a text": 1},
        ),
        (
            "m.csv",
            'text,file_name\n"one\n\nand ""two""",a.wav\n"So, well",b.wav',
            {"a": 'one and "two"', "b": "So, well"},
            {},
        ),
        ("m.csv", CSV + f"a.wav,{'x' * 140_000}\nb.wav,One", {"b": "One"}, {NEVER_CLOSED: 1}),
        # With tabs, quotes are part of the text, unless all of them enclose a cell.
        ("m.tsv", TSV + 'a.wav\t"So\nb.wav\tOne\nc.wav\tTwo "3"', {"a": '"So', "b": "One", "c": 'Two "3"'}, {}),
        ("m.tsv", TSV + 'a.wav\t"So\nb.wav\tOne"\nc.wav\tTwo', {"a": '"So', "b": 'One"', "c": "Two"}, {}),
        (
            "m.tsv",
            TSV + 'a.wav\t"He said ""hello"""\nb.wav\t"One\ntwo"\nc.wav\tThree',
            {"a": 'He said "hello"', "b": "One two", "c": "Three"},
            {},
        ),
        # A table that doubles quotes within others encloses its cells: one that does not close costs its row alone.
        (
            "m.tsv",
            TSV + 'a.wav\t"""Good-bye,"" he said."\nb.wav\tPlain.\nc.wav\t"Well\nd.wav\t5" and 6"',
            {"a": '"Good-bye," he said.', "b": "Plain.", "d": '5" and 6"'},
            {NEVER_CLOSED: 1},
        ),
        ("m.csv", CSV + "a.wav,So, so\nb.wav,One\nc.wav\nd.wav,Two,, ", {"b": "One", "d": "Two"}, {OTHER_WIDTH: 2}),
        (
            "m.csv",
            "file_name|text|speaker_name\na.wav|Hello, you|anna\nb.wav|One|two|anna\nc|Three|bert",
            {"a": "Hello, you", "c": "Three"},
            {OTHER_WIDTH: 1},
        ),
        ("m.csv", "file_name;text\na.wav;Hello, you", {"a": "Hello, you"}, {}),
        (
            "m.jsonl",
            '{"file_name": "a.wav", "text": "One"}\n{"file_name": "b.wav" "text": "Two"}\n5',
            {"a": "One"},
            {NO_JSON: 1, "rows that are no JSON objects": 1},
        ),
        (
            "m.jsonl",
            '{"file_name": "a.wav", "text": "One", "text": "Two"}\n{"file_name": "b.wav", "text": "Three"}',
            {"b": "Three"},
            {"rows that have a column twice": 1},
        ),
    ],
)
def test_a_row_takes_no_other_row_and_no_cell_is_lost(read, name, content, rows, left_out):
    assert read(name, content) == (list(rows.items()), left_out)


def test_what_is_left_out_is_named_with_its_line(tmp_path, clips):
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.wav", "text": "One"}\n\n{"file_name": "b.wav" "text": "Two"}')
    _, found = read_foreign(tmp_path / "m.jsonl", None)
    assert found.lines(tmp_path) == [
        f"left out: 1 × {NO_JSON}, e.g. {tmp_path}/m.jsonl:3: Expecting ',' delimiter, column 23"
    ]
    (tmp_path / "m.csv").write_text("file_name,text\n\na.wav,One\nb.wav,Two, three\n")
    _, found = read_foreign(tmp_path / "m.csv", None)
    assert found.lines(tmp_path) == [f"left out: 1 × {OTHER_WIDTH}, e.g. {tmp_path}/m.csv:4: 3 instead of 2"]


def test_two_texts_of_which_none_is_called_so(read):
    with pytest.raises(ConfigError, match="`sentence`, `raw_text`: which is the text"):
        read("m.csv", "file_name,sentence,raw_text\na.wav,One,Two\n")
    assert read("m.csv", "file_name,sentence,raw_text\na.wav,One,One\n")[0] == [("a", "One")]


@pytest.mark.parametrize("header", ["file_name,text,Text", "file_name,text,Speaker ID,speaker-id"])
def test_a_column_that_is_there_twice(read, header):
    with pytest.raises(ConfigError, match="m.csv:1 has the column `(text|speaker_id)` twice"):
        read("m.csv", f"{header}\na.wav,One,a,b\n")


def test_columns_are_carried_over_and_the_others_named_once(tmp_path, clips):
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
    reference = {"ref_audio": clips["b"], "ref_text": "Two."}
    assert found.rows == [
        {"audio": clips["a"], "text": "One.", "speaker": "anna", "scene": "A quiet room."}
        | reference
        | {"offset": 0.0, "duration": 0.5},
        {"audio": clips["b"], "text": "Two.", "speaker": "bert"},
        {"audio": clips["c"], "text": "Three.", "speaker": "1", "duration": 2.5},
        {"audio": clips["e"], "text": "Five."},
    ]
    assert [line.split(", e.g. ")[0] for line in found.lines(tmp_path)] == [
        f"{tmp_path}: language: not read, in 4 rows",
        f"{tmp_path}: sentence: not read, in 1 row",
        "left out: 1 × references whose clip or text is not there (their rows are kept)",
        "left out: 1 × references that are the spoken clip itself (their rows are kept)",
        "left out: 1 × rows whose `offset` or `duration` is no number of seconds",
        "left out: 1 × durations that are no number of seconds (their rows are kept)",
    ]


def test_a_speaker_may_be_number_0(tmp_path, clips):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", "text": "One.", "speaker": 0}))
    _, found = read_foreign(tmp_path, None)
    assert found.rows == [{"audio": clips["a"], "text": "One.", "speaker": "0"}] and found.lines(tmp_path) == []


def test_nan_is_what_pandas_writes_for_nothing(tmp_path, clips):
    row = {"file_name": "a.wav", "text": "One."} | dict.fromkeys(
        ("speaker", "offset", "duration", "lang"), float("nan")
    )
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    _, found = read_foreign(tmp_path, None)
    assert found.rows == [{"audio": clips["a"], "text": "One."}] and found.lines(tmp_path) == []


def test_of_two_tables_in_a_folder_one_is_read(tmp_path, read):
    read("metadata.csv", "file_name,text\na.wav,One\n")
    rows, _ = read("metadata.jsonl", json.dumps({"file_name": "a.wav", "text": "One"}))
    _, found = read_foreign(tmp_path, None)
    assert len(rows) == len(found.rows) == 1
    assert found.left_out == {"tables beside a metadata.csv that is read": 1}
    (tmp_path / "metadata.csv").write_text("other,columns\n1,2\n")
    _, found = read_foreign(tmp_path, "audiofolder")
    assert len(found.rows) == 1 and found.left_out == {"tables beside a metadata.jsonl that is read": 1}


def test_a_table_deep_in_a_folder_is_found_and_hidden_ones_are_not(tmp_path):
    for folder in ("data/train", ".ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.wav").write_bytes(b"RIFF")
        (tmp_path / folder / "metadata.csv").write_text("file_name,text\na.wav,One\n")
    kind, found = read_foreign(tmp_path, None)
    assert kind == "audiofolder" and [row["audio"] for row in found.rows] == [f"{tmp_path}/data/train/a.wav"]
