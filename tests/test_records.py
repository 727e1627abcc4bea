"""Files of records of every kind, folders of them and data sets: the same rows, each with the place that it has."""

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import train

import train as trainer
import utils
from utils import UserError

ROWS = [
    {"instruction": "Add 1, 2", "input": "", "output": "3\n"},
    {"instruction": 'Say "é"', "input": "x; y", "output": "é\n\nand so on"},
    {"instruction": "你好", "input": "", "output": "您好"},
]


def table(separator=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def parquet(rows=ROWS):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
FILES = {  # name: (bytes, places)
    "d.json": (json.dumps(ROWS).encode(), "[0] [1] [2]"),
    "d.json.gz": (gzip.compress(json.dumps(ROWS).encode()), "[0] [1] [2]"),
    "d.jsonl": (LINES, ":1 :2 :3"),
    "d.jsonl.gz": (gzip.compress(LINES), ":1 :2 :3"),
    "d.csv": (b"\xef\xbb\xbf" + table(), ":2 :4 :7"),
    "semicolons.csv": (table(";"), ":2 :4 :7"),
    "d.tsv": (table("\t"), ":2 :4 :7"),
    "d.csv.gz": (gzip.compress(table()), ":2 :4 :7"),
    "d.parquet": (parquet(), "[0] [1] [2]"),
    "one line.json": (json.dumps({"data": ROWS}).encode(), "[0] [1] [2]"),
    "several lines.json": (json.dumps({"data": ROWS, "version": 2}, indent=1).encode(), "[0] [1] [2]"),
}


def plain(records):
    return [{key: record[key] for key in ("instruction", "input", "output")} for record in records]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_rows(name, tmp_path, capsys):
    data, places = FILES[name]
    (tmp_path / name).write_bytes(data)
    records, problems = utils.read_records([tmp_path / name])
    assert plain(records) == ROWS and problems == []
    assert [record["source"] for record in records] == [f"{name}{place}" for place in places.split()]
    said = f"{tmp_path / name}: the records are its list data; not used: version\n"
    assert capsys.readouterr().err == said * name.startswith("several")


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b/d.csv", "a.json", "c.parquet", "b/notes.txt", ".hidden.json"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES["d" + path.suffix][0] if path.suffix != ".txt" else b"no record")
    records, problems = utils.read_records([tmp_path / "data"])
    assert plain(records) == ROWS * 3 and problems == []
    assert [record["source"] for record in records][::3] == ["data/a.json[0]", "data/b/d.csv:2", "data/c.parquet[0]"]


def test_rows_of_a_table_that_do_not_fit_its_head_are_named(tmp_path):
    (tmp_path / "d.csv").write_text('instruction,output\na,b,c\nd\n"e\nf",g\n', encoding="utf-8")
    records, problems = utils.read_records([tmp_path / "d.csv"])
    assert problems == ["d.csv:2: 3 cells, where the head has 2", "d.csv:3: 1 cells, where the head has 2"]
    assert [(record["source"], record["instruction"]) for record in records] == [("d.csv:4", "e\nf")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('instruction,output\na,1\nb,"not closed\nc,3\n', "d.csv:2: unexpected end of data; the rows behind it"),
        ("instruction,output,output\ni,a,b\n", "two columns are named output"),
    ],
)
def test_a_table_that_cannot_be_told_is_refused(text, said, tmp_path):
    (tmp_path / "d.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        utils.read_records([tmp_path / "d.csv"])


def test_places_in_a_table_count_empty_lines(tmp_path):
    (tmp_path / "d.csv").write_text("\n\ninstruction,output\n\n\na,b\nc\n", encoding="utf-8")
    records, problems = utils.read_records([tmp_path / "d.csv"])
    assert [record["source"] for record in records] == ["d.csv:6"] and problems == [
        "d.csv:7: 1 cells, where the head has 2"
    ]


def test_an_object_over_several_lines_is_one(tmp_path):
    lines = ",\n".join(map(json.dumps, ROWS))
    records, problems = utils.read_records([("d.json", f'{{"data": [\n{lines}\n]}}')])
    assert plain(records) == ROWS and problems == []
    records, _ = utils.read_records([("d.json", json.dumps({**ROWS[0], "data": [1]}))])
    assert plain(records) == ROWS[:1]


def test_a_folder_reads_each_file_once_and_nothing_hidden(tmp_path):
    for name in ("v1.json/a.json", ".cache/b.json", "C.JSONL", "state.json"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINES if name.endswith("L") else FILES["d.json"][0])
    records, _ = utils.read_records([tmp_path / "data"])
    assert [record["source"] for record in records][::3] == [
        "data/C.JSONL:1",
        "data/state.json[0]",
        "data/v1.json/a.json[0]",
    ]


def test_values_of_parquet_that_json_has_no_word_for_are_named(tmp_path):
    (tmp_path / "d.parquet").write_bytes(parquet([{"instruction": b"i", "output": "o"}]))
    assert utils.read_records([tmp_path / "d.parquet"])[1] == [
        "d.parquet[0]: instruction is of the type bytes, expected text"
    ]


def test_texts_may_stand_beside_instructions(tmp_path, base):
    (tmp_path / "t.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    dataset = trainer.SupervisedDataset([tmp_path / "d.json", tmp_path / "t.txt"], utils.load_tokenizer(base, 512))
    assert dataset.report["kinds"] == {"alpaca": 3, "text": 2} and dataset.sources[-1] == "t.txt:3"
    (tmp_path / "m.jsonl").write_text('{"text": "a"}\n{"instruction": "i", "output": "o"}', encoding="utf-8")
    assert not utils.is_text(tmp_path / "m.jsonl")


def test_conversations_of_parquet_are_conversations(tmp_path):
    turns = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Ho", "name": "x"}]
    (tmp_path / "d.parquet").write_bytes(parquet([{"messages": turns, "tools": None}]))
    records, problems = utils.read_records([tmp_path / "d.parquet"])
    assert problems == [] and records[0]["messages"] == [{k: v for k, v in turn.items() if v} for turn in turns]


@pytest.mark.parametrize("name", ["d.json.gz", "d.parquet"])
def test_a_torn_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name][0][:-9])
    with pytest.raises(UserError, match=f"{name}: "):
        utils.read_records([tmp_path / name])


def test_columns_are_other_names_of_the_keys(tmp_path):
    rows = [{"question": "q", "answer": "a", "instruction": "old"}, {"question": "q"}, 7]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = "instruction=question, output=answer"
    records, problems = utils.read_records([tmp_path / "d.jsonl"], columns=columns)
    assert plain(records) == [{"instruction": "q", "input": "", "output": "a"}]
    assert utils.unused_keys(records) == {"instruction (replaced)": 1}
    assert problems[0] == "d.jsonl:2: no answer, which --columns names; keys found: question"
    assert problems[1].startswith("d.jsonl:3: a number")


@pytest.mark.parametrize(
    "columns", ["instruction", "instruction=", "wish=question", "=a", "instruction=a,instruction=b"]
)
def test_columns_that_say_nothing_are_refused(columns):
    with pytest.raises(UserError, match="--columns .*expected OURS=THEIRS"):
        trainer.DataArguments(columns=columns)


def test_an_unknown_style_is_refused():
    with pytest.raises(UserError, match="--prompt_style vicuna: choose from alpaca, "):
        trainer.DataArguments(prompt_style="vicuna")


def test_a_data_set_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="no_org/no_name: "):
        utils.read_records(["no_org/no_name"])


def test_a_data_set_saved_by_datasets_is_read_with_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(tmp_path / "two")
    assert plain(utils.read_records([tmp_path / "one"])[0]) == plain(utils.read_records([tmp_path / "two"])[0]) == ROWS
    records, _ = utils.read_records([f"{tmp_path / 'two'}:test"])
    assert plain(records) == ROWS[2:] and records[0]["source"] == "two[0]"
    with pytest.raises(UserError, match="no split dev; give .*two:train or .*two:test"):
        utils.read_records([f"{tmp_path / 'two'}:dev"])


def test_a_run_on_a_folder_and_columns(base, tmp_path):
    (tmp_path / "data").mkdir()
    lines = "".join(f"{json.dumps({'question': f'What is {i}?', 'answer': str(i)})}\n" for i in range(8))
    (tmp_path / "data" / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    words = ["--columns", "instruction=question,output=answer", "--dry_run", "1", "--data_path", tmp_path / "data"]
    run = train(["--model_name_or_path", base, "--output_dir", tmp_path / "out", *words])
    assert run.code == 0 and "data: 8 kept + 0 dropped = 8 read" in run.err and "What is 0?" in run.out
    assert len(trainer.hash_of(tmp_path / "data")) == 64
    before = trainer.hash_of(tmp_path / "data")
    (tmp_path / "data" / "more.csv").write_bytes(table())
    assert trainer.hash_of(tmp_path / "data") != before
