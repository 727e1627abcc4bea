"""The parts of utils.py, train.py and engines.py that need no model: files, records, old options, resuming, memory."""

import bz2
import copy
import csv
import io
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment, render_prompt

import engines
import train
import utils
from utils import UserError

KEYS = "instruction, input (optional), output"  # what a message says of the keys it expects


def refusal(function, *arguments, **keywords):
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def python(code, cwd=ROOT, **variables):
    """Run Python code that can import utils, in a process of its own."""
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=cwd, env=environment() | variables, capture_output=True, text=True, timeout=120)


# --- JSON files ------------------------------------------------------------------------------------------------------


def test_jdump_writes_what_jload_reads_and_makes_the_folders(tmp_path):
    value = {"a": [1, "é\u2028你"], "b": None}
    path = tmp_path / "new" / "deep" / "x.json"
    utils.jdump(value, path)
    assert utils.jload(path) == value
    assert path.read_bytes() == '{\n    "a": [\n        1,\n        "é\u2028你"\n    ],\n    "b": null\n}'.encode()


def test_jdump_writes_a_string_as_it_is(tmp_path):
    utils.jdump('not "json"', tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_bytes() == b'not "json"'


def test_jdump_takes_indent_default_and_mode(tmp_path):
    path = tmp_path / "x.jsonl"
    utils.jdump({"p": Path("a")}, path, indent=None)
    utils.jdump("\n", path, mode="a")
    utils.jdump([1], path, mode="a", indent=None)
    assert path.read_bytes() == b'{"p": "a"}\n[1]'


def test_jdump_and_jload_take_open_files_and_leave_them_open():
    file = io.StringIO()
    utils.jdump([1, 2], file, indent=None)
    file.seek(0)
    assert utils.jload(file) == [1, 2]
    assert not file.closed


@pytest.mark.parametrize("value", [3, None, (1, 2), {1}])
def test_jdump_refuses_other_types_and_writes_nothing(value, tmp_path):
    with pytest.raises(ValueError) as caught:
        utils.jdump(value, tmp_path / "x.json")
    assert str(caught.value) == f"jdump writes a str, dict or list, not {type(value).__name__}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["r", "rb"])
@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'[{"a": 1}]', [{"a": 1}]),
        (b'{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": 1}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}\r\n\r\n{"b": 2}\r\n', [{"a": 1}, {"b": 2}]),
        ('{"a": "x\u2028y"}\n{"b": 2}'.encode(), [{"a": "x\u2028y"}, {"b": 2}]),
    ],
    ids=["list", "object", "byte-order-mark", "lines", "crlf", "u2028"],
)
def test_jload_reads_json_and_json_lines(data, value, mode, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(data)
    assert utils.jload(str(path), mode=mode) == value


def test_jload_reads_one_line_of_a_jsonl_file_as_a_list(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    assert utils.jload(tmp_path / "x.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}\nbroken'])
def test_jload_raises_for_what_is_no_json(text):
    with pytest.raises(json.JSONDecodeError):
        utils.jload(io.StringIO(text))


def test_a_line_of_progress_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(utils.os, "get_terminal_size", lambda handle: os.terminal_size((20, 24)))
    utils.show_progress("x" * 30)
    utils.show_progress("last", is_last=True)
    assert capsys.readouterr().err == "\r" + "x" * 19 + "\x1b[K\rlast\x1b[K\n"
    monkeypatch.setattr(utils.os, "get_terminal_size", lambda handle: os.terminal_size((0, 0)))  # in some containers
    utils.show_progress("x" * 90)
    assert capsys.readouterr().err == "\r" + "x" * 79 + "\x1b[K"


def test_off_a_terminal_progress_is_a_line_where_it_is_due(capsys):
    for words in ({}, {"is_due": True}, {}, {"is_last": True}):
        utils.show_progress("x" * 200, **words)
    assert capsys.readouterr().err == ("x" * 200 + "\n") * 2


def test_signals_are_heard_within_the_block_and_an_ignored_one_stays_ignored():
    heard, before = [], signal.getsignal(signal.SIGTERM)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with utils.on_signals(lambda number, frame: heard.append(number), signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_write_json_leaves_the_old_text_when_the_new_one_cannot_be_written(tmp_path):
    class Unprintable:
        def __str__(self):
            raise RuntimeError("cannot be written")

    path = tmp_path / "run.json"
    utils.write_json({"a": 1}, path)
    assert path.read_bytes() == b'{\n  "a": 1\n}'
    with pytest.raises(RuntimeError):
        utils.write_json({"a": Unprintable()}, path)
    assert path.read_bytes() == b'{\n  "a": 1\n}'


# --- Records ---------------------------------------------------------------------------------------------------------


def record(instruction="i", input="", output="o", source="d[0]"):
    messages = [{"role": "user", "content": instruction, "input": input}, {"role": "assistant", "content": output}]
    return {"instruction": instruction, "input": input, "output": output, "source": source, "messages": messages}


GOOD = '{"instruction": "i", "output": "o"}'


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("[]", []),
        (f"[{GOOD}]", [record()]),
        (f"\n  [{GOOD},\n {GOOD}]\n", [record(), record(source="d[1]")]),
        (GOOD, [record(source="d:1")]),
        (f"{GOOD}\n\n{GOOD}\n", [record(source="d:1"), record(source="d:3")]),
        (f"{GOOD}\r\n{GOOD}\r\n", [record(source="d:1"), record(source="d:2")]),
        ('{"instruction": "i", "output": "a\u2028b\x85c"}', [record(output="a\u2028b\x85c", source="d:1")]),
        ('{"instruction": "i", "input": null, "output": "o"}', [record(source="d:1")]),
        ('{"instruction": "i", "input": "", "output": "o"}', [record(source="d:1")]),
        ('{"instruction": "i", "input": "x", "output": ""}', [record(input="x", output="", source="d:1")]),
        (
            '{"id": 7, "instruction": "i", "source": "web", "output": "o", "text": null}',
            [record(source="d:1") | {"unused": ["source"]}],
        ),
        ('{\n  "instruction": "i",\n  "output": "o"\n}\n', [record(source="d:1")]),
        (r'{"instruction": "\ud83e\udd99", "output": "{x} %s"}', [record("🦙", output="{x} %s", source="d:1")]),
    ],
    ids="empty one list line lines crlf u2028 null blank-input empty-output other-keys indented surrogate-pair".split(),
)
def test_read_records_reads(text, records):
    assert utils.read_records([("d", text)]) == (records, [])


def test_read_records_reads_every_instance_of_a_self_instruct_seed_task():
    seed = {"id": "seed_task_0", "name": "n", "instruction": "i", "is_classification": False}
    seed["instances"] = [{"input": "", "output": "a"}, {"input": "x", "output": "b"}, 3, {"input": "y"}]
    text = json.dumps(seed) + "\n" + json.dumps(seed | {"instances": [{"output": "c"}]})
    records, problems = utils.read_records([("seed.jsonl", text)])
    assert records == [
        record(output="a", source="seed.jsonl:1"),
        record(input="x", output="b", source="seed.jsonl:1"),
        record(output="c", source="seed.jsonl:2"),
    ]
    assert problems == [
        f"seed.jsonl:1: a number, expected an object with the keys {KEYS}",
        f"seed.jsonl:1: no output; keys found: input, instruction; keys expected: {KEYS}",
    ]


def test_a_seed_task_without_instances_is_counted_as_a_problem():
    records, problems = utils.read_records([("d", '[{"instruction": "i", "instances": []}]')])
    assert (records, len(problems)) == ([], 1)
    assert problems[0].startswith("d[0]: ")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["i", "o"], f"a list, expected an object with the keys {KEYS}"),
        (3, f"a number, expected an object with the keys {KEYS}"),
        (None, f"null, expected an object with the keys {KEYS}"),
        ({"instruction": "i", "text": "t"}, f"no output; keys found: instruction, text; keys expected: {KEYS}"),
        ({"output": "o"}, f"no instruction; keys found: output; keys expected: {KEYS}"),
        ({}, f"no instruction and no output; keys found: none; keys expected: {KEYS}"),
        ({"instruction": "i", "output": 3}, "output is a number, expected text"),
        ({"instruction": "i", "output": None}, "output is null, expected text"),
        ({"instruction": ["i"], "output": "o"}, "instruction is a list, expected text"),
        ({"instruction": "i", "input": False, "output": "o"}, "input is false, expected text"),
        ({"instruction": {}, "output": "o"}, "instruction is an object, expected text"),
        ("i", f"text, expected an object with the keys {KEYS}"),
        (1.5, f"a number, expected an object with the keys {KEYS}"),
        (True, f"true, expected an object with the keys {KEYS}"),
        (
            {"instruction": "i", "input": "\ud83d", "output": "o"},
            r"input holds a lone surrogate (half of a character, such as \ud83d), which has no UTF-8 form",
        ),
    ],
)
def test_as_messages_says_what_is_wrong_with_a_record(value, problem):
    with pytest.raises(ValueError) as caught:
        utils.as_messages(value)
    assert str(caught.value) == problem


def test_problems_name_the_record_and_the_good_ones_stay():
    text = f'[{GOOD}, [1], {GOOD}, {{"instruction": "i", "output": 1}}]'
    assert utils.read_records([("d.json", text)]) == (
        [record(source="d.json[0]"), record(source="d.json[2]")],
        [f"d.json[1]: a list, expected an object with the keys {KEYS}", "d.json[3]: output is a number, expected text"],
    )


def test_a_broken_line_is_named_among_good_ones():
    text = f'{GOOD}\n{{"instruction": "i", "output": }}\nnull\n{GOOD}\n{{"a'
    records, problems = utils.read_records([("d.jsonl", text)])
    assert [r["source"] for r in records] == ["d.jsonl:1", "d.jsonl:4"]
    assert sorted(problems) == [
        "d.jsonl:2: not valid JSON, Expecting value at column 32",
        f"d.jsonl:3: null, expected an object with the keys {KEYS}",
        "d.jsonl:5: not valid JSON, Unterminated string starting at at column 2",
    ]


def test_a_broken_list_is_refused_with_line_and_column():
    text = f'[\n  {GOOD},\n  {{"instruction": "i" "output": "o"}}\n]'
    message = "d.json:3: not valid JSON, Expecting ',' delimiter at column 23"
    assert refusal(utils.read_records, [("d.json", text)]) == message


def test_read_records_joins_files_in_order_and_names_them_without_folders(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + f"[{GOOD}]".encode())
    (tmp_path / "b.jsonl").write_text(f"{GOOD}\n7\n", encoding="utf-8")
    assert utils.read_records([tmp_path / "b.jsonl", tmp_path / "a.json"]) == (
        [record(source="b.jsonl:1"), record(source="a.json[0]")],
        [f"b.jsonl:2: a number, expected an object with the keys {KEYS}"],
    )


@pytest.mark.parametrize("data", [b"", b" \r\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(data, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(data)
    message = f"{path}: the file is empty; it should hold a JSON list or JSON Lines"
    assert refusal(utils.read_records, [path]) == message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    said = refusal(utils.read_records, [tmp_path / "no.json"])
    assert said.startswith(f"{tmp_path}/no.json: No such file or directory; --data_path takes ")
    assert refusal(utils.read_records, [tmp_path]).startswith(f"{tmp_path}: a folder without files of records (.json, ")


@pytest.mark.parametrize(
    ("data", "where", "byte"),
    [
        (b'[{"instruction": "caf\xe9"}]', "1: byte 0xe9 at offset 21", 0xE9),
        ("一\n".encode() + b"\n\xc4\xe3", "3: byte 0xc4 at offset 5", 0xC4),
        (b'\xef\xbb\xbf[\n"\xff"]', "2: byte 0xff at offset 6", 0xFF),
        (b"an end \xb1", "1: byte 0xb1 at offset 7", 0xB1),
    ],
    ids=["latin-1", "line-3", "after-a-byte-order-mark", "last"],
)
def test_bytes_that_are_not_utf8_are_named_with_line_and_offset(data, where, byte, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(data)
    assert data[int(where.split()[-1])] == byte  # the offset in the message is that of the file
    assert refusal(utils.read_records, [path]).startswith(f"{path}:{where} is not UTF-8; ")


def follow(message, folder):
    """Run the command that a refusal of a file in `folder` names; the records of what it wrote, as Python reads them."""
    command = re.search("(?:iconv|gzip|bzip2|xz|python) .*", message)[0].replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return json.loads((folder / "converted.json").read_text(encoding="utf-8"))


TEXTS = {
    "zh": "你好，世界。今天天气很好，我们去公园散步吧。请把下面的句子翻译成英文，并解释它的意思。",
    "tw": "今天天氣很好，我們去公園散步吧。請把下面的句子翻譯成英文，並解釋它的意思。",
    "ja": "次の文章を英語に翻訳してください。今日は天気がいいので、公園へ散歩に行きましょう。",
    "ko": "다음 문장을 영어로 번역하세요. 오늘은 날씨가 좋아서 공원에 갑니다. 컴퓨터의 역사를 설명해 주세요.",
    "fr": "Où étiez-vous né? Garçon, voilà l'été à Besançon.",
    "de": "Übersetze die Sätze: Größe, Straße, schön, Mädchen.",
    "en": "Translate.",
}


@pytest.mark.skipif(not shutil.which("iconv"), reason="iconv is what the refusal names")
@pytest.mark.parametrize(
    "case",
    "zh-gb18030 zh-utf-16 zh-utf-16-le zh-utf-16-be zh-utf-32 zh-utf-32-le en-utf-16-le en-utf-32-be tw-big5 ja-cp932 "
    "ja-euc_jp ko-cp949 fr-cp1252 de-latin-1".split(),
)
def test_a_file_in_another_encoding_is_read_after_the_command_of_its_refusal(case, tmp_path):
    language, encoding = case.split("-", 1)
    records, path = [{"instruction": TEXTS[language], "output": "o"}] * 3, tmp_path / "it's mine.json"
    path.write_bytes(json.dumps(records, ensure_ascii=False).encode(encoding))
    assert follow(refusal(utils.read_records, [path]), tmp_path) == records


def test_an_encoding_that_the_bytes_do_not_tell_is_not_guessed(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes('["Переведите предложение"]'.encode("cp1251"))
    assert "ENCODING" in refusal(utils.read_records, [path])
    path.write_bytes('["你好"]'.encode("gb18030"))
    assert all(name in refusal(utils.read_records, [path]) for name in ("GB18030", "BIG5"))


ROWS = [
    {"instruction": "Add 1, 2", "input": "", "output": "3\n"},
    {"instruction": 'Say "é"', "input": "x", "output": "é"},
]


def table(separator):
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


@pytest.mark.parametrize(
    "data",
    [
        *(module.compress(json.dumps(ROWS).encode()) for module in (bz2, lzma)),
        b'---\n- instruction: Add 1, 2\n  input: ""\n  output: "3\\n"\n'
        b'- instruction: Say "\xc3\xa9"\n  input: x\n  output: \xc3\xa9\n',
    ],
    ids="bzip2 xz yaml".split(),
)
def test_a_file_of_another_kind_is_read_after_the_command_of_its_refusal(data, tmp_path):
    path = tmp_path / "my data.json"
    path.write_bytes(data)
    assert follow(refusal(utils.read_records, [path]), tmp_path) == ROWS


@pytest.mark.parametrize("separator", ",;\t")
def test_a_table_is_read_after_the_command_of_its_refusal(separator, tmp_path):
    path = tmp_path / "my data.json"
    path.write_bytes(table(separator))
    subprocess.run(re.search("mv .*", refusal(utils.read_records, [path]))[0], shell=True, check=True)
    records, problems = utils.read_records([f"{path}.csv"])
    assert [{key: record[key] for key in ROWS[0]} for record in records] == ROWS and problems == []


def zipped(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<a/>")
        archive.writestr(name, "[]")
    return file.getvalue()


def database(folder):
    connection = sqlite3.connect(folder / "base.db")
    connection.execute("create table t (a)")
    connection.commit()
    connection.close()
    return (folder / "base.db").read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped("data.json"), "unzip "),
        (zipped("xl/workbook.xml"), "read_excel"),
        (b"PAR1\x15\x04\x15", "arquet"),
        (b"ARROW1\0\0", "Dataset.from_file"),
        (b"\xff\xff\xff\xff\x10\0\0\0", "Dataset.from_file"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd -dc"),
        (database, "sqlite3"),
        (pickle.dumps([1]), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
    ],
    ids="zip xlsx parquet arrow arrow-stream zstd sqlite pickle lfs html".split(),
)
def test_a_file_that_is_no_text_of_ours_is_named_wherever_text_is_read(data, words, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(data(tmp_path) if callable(data) else data)
    for read in (lambda: utils.read_records([path]), lambda: utils.read_text(path), lambda: utils.read_json(path)):
        message = refusal(read)
        assert words in message and str(path) in message and "iconv" not in message


@pytest.mark.parametrize("text", ["a,b\n", "Note: this is\nno YAML\n", "zip\n", "", "é"])
def test_a_plain_text_is_read_as_it_is(text, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    assert utils.read_text(path) == text


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in refusal(utils.read_records, [tmp_path / "pipe"])


def test_a_key_that_stands_twice_is_named_and_no_value_wins_in_silence():
    twice = '{"instruction": "i", "output": "a", "output": "b"}'
    records, problems = utils.read_records([("d.jsonl", f"{GOOD}\n{twice}")])
    assert len(records) == 1 and problems[0].startswith("d.jsonl:2: ") and "twice" in problems[0]
    message = refusal(utils.read_records, [("d.json", f"[{GOOD}, {twice}]")])
    assert "twice" in message and "'i'" in message and "'b'" in message


@pytest.mark.parametrize("text", [f"[{GOOD}]\n[{GOOD}]", f"[{GOOD}]\n{GOOD}"])
def test_a_second_value_behind_a_list_is_named(text):
    message = refusal(utils.read_records, [("d.json", text)])
    assert message.startswith("d.json:2: ") and "one list" in message


@pytest.mark.parametrize("indent", [None, 2])
def test_records_inside_an_object_are_named_with_their_key(indent):
    text = json.dumps({"version": 1, "rows": [json.loads(GOOD)]}, indent=indent)
    assert "jq '.rows' FILE" in utils.read_records([("d.json", text)])[1][0]


def test_not_a_number_is_named():
    records, problems = utils.read_records([("d.jsonl", '{"instruction": "i", "input": NaN, "output": "o"}')])
    assert records == [] and problems == ["d.jsonl:1: input is NaN, expected text"]


def test_what_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000, encoding="utf-8")
    assert "not a run.json" in refusal(utils.read_run, tmp_path)
    with pytest.raises(ValueError):
        utils.jload(tmp_path / "run.json")


@pytest.mark.parametrize(("size", "words"), [(0, "0.0 MiB"), (12 * 2**20, "12.0 MiB"), (2.5 * 2**30, "2.5 GiB")])
def test_a_size_is_told_in_the_unit_that_fits(size, words):
    assert utils.size_of(size) == words


# --- Prompts ---------------------------------------------------------------------------------------------------------

PREAMBLE = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
WITHOUT_INPUT = PREAMBLE + ". " + REQUEST + "\n\n### Instruction:\n{instruction}\n\n### Response:"
WITH_INPUT = (
    PREAMBLE
    + ", paired with an input that provides further context. "
    + REQUEST
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def test_the_two_templates_are_stanford_alpacas_byte_for_byte():
    assert utils.PROMPT_DICT == {"prompt_input": WITH_INPUT, "prompt_no_input": WITHOUT_INPUT}


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({"instruction": "Add.", "input": "12"}, WITH_INPUT.replace("{instruction}", "Add.").replace("{input}", "12")),
        ({"instruction": "Add.", "input": " "}, WITH_INPUT.replace("{instruction}", "Add.").replace("{input}", " ")),
        ({"instruction": "Add.", "input": ""}, WITHOUT_INPUT.replace("{instruction}", "Add.")),
        ({"instruction": "Add.", "input": None}, WITHOUT_INPUT.replace("{instruction}", "Add.")),
        ({"instruction": "Add."}, WITHOUT_INPUT.replace("{instruction}", "Add.")),
        ({"instruction": "{input} {0} {", "output": "x"}, WITHOUT_INPUT.replace("{instruction}", "{input} {0} {")),
    ],
    ids=["input", "space", "empty", "null", "missing", "braces"],
)
def test_render_prompt_chooses_the_template_by_the_input(given, prompt):
    assert render_prompt(given) == prompt


# --- Options of 2023 -------------------------------------------------------------------------------------------------

LAYER = '{"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}'
GONE = "has no meaning any more; ignored"
PEERS = (  # of alpaca-lora and Axolotl, without a meaning here
    "add_eos_token wandb_project wandb_watch wandb_log_model adapter base_model_config base_model_ignore_patterns "
    "dataset_prepared_path eval_sample_packing flash_attention is_llama_derived_model lora_fan_in_fan_out lora_model_dir "
    "lora_target_linear model_type pad_to_sequence_len sample_packing sdp_attention special_tokens strict tokenizer_type "
    "wandb_entity wandb_run_id xformers_attention"
)
# (old name, value, today's words, what the notice says of it)
TRANSLATED = [
    ("evaluation_strategy", "no", ["--eval_strategy", "no"], "is now --eval_strategy"),
    ("warmup_ratio", "0.03", ["--warmup_steps", "0.03"], "is now --warmup_steps"),
    (
        "fsdp_transformer_layer_cls_to_wrap",
        "LlamaDecoderLayer",
        ["--fsdp_config", LAYER],
        f"is now --fsdp_config {LAYER}",
    ),
    (
        "fsdp_min_num_params",
        "100000000",
        ["--fsdp_config", '{"min_num_params": "100000000"}'],
        'is now --fsdp_config {"min_num_params": "100000000"}',
    ),
    (
        "group_by_length",
        "True",
        ["--train_sampling_strategy", "group_by_length"],
        "is now --train_sampling_strategy group_by_length",
    ),
    ("group_by_length", "False", [], GONE),
    ("no_cuda", "True", ["--use_cpu", "True"], "is now --use_cpu"),
    ("no_cuda", "false", ["--use_cpu", "false"], "is now --use_cpu"),
    ("logging_dir", "logs", ["--tensorboard_dir", "logs"], "is now --tensorboard_dir"),
    ("adafactor", "yes", ["--optim", "adafactor"], "is now --optim adafactor"),
    ("adafactor", "0", [], GONE),
    ("per_gpu_train_batch_size", "4", ["--per_device_train_batch_size", "4"], "is now --per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "4", ["--per_device_eval_batch_size", "4"], "is now --per_device_eval_batch_size"),
    ("torch_dtype", "bfloat16", ["--dtype", "bfloat16"], "is now --dtype"),
    ("save_safetensors", "False", [], GONE),
    ("half_precision_backend", "auto", [], GONE),
    ("fp16_backend", "auto", [], GONE),
    ("fp16_opt_level", "O1", [], GONE),
    ("use_mps_device", "True", [], GONE),
    ("use_ipex", "True", [], GONE),
    ("xpu_backend", "ccl", [], GONE),
    ("sharded_ddp", "zero_dp_2 auto_wrap", [], GONE),
    ("jit_mode_eval", "True", [], GONE),
    ("past_index", "-1", [], GONE),
    ("tpu_num_cores", "8", [], GONE),
    ("tpu_metrics_debug", "True", [], GONE),
    ("ray_scope", "last", [], GONE),
    ("include_tokens_per_second", "True", [], GONE),
    ("include_inputs_for_metrics", "True", [], GONE),
    ("mp_parameters", "x", [], GONE),
    ("dispatch_batches", "True", [], GONE),
    ("split_batches", "True", [], GONE),
    ("lazy_preprocess", "True", [], GONE),
    ("use_fast_tokenizer", "False", [], GONE),
    ("overwrite_cache", "True", [], GONE),
    ("torchdynamo", "eager", [], GONE),
    ("use_legacy_prediction_loop", "True", [], GONE),
    ("push_to_hub_model_id", "m", ["--hub_model_id", "m"], "is now --hub_model_id"),
    ("push_to_hub_organization", "o", [], GONE),
    ("push_to_hub_token", "t", ["--hub_token", "t"], "is now --hub_token"),
    ("base_model", "m", ["--model_name_or_path", "m"], "is now --model_name_or_path"),
    ("micro_batch_size", "4", ["--per_device_train_batch_size", "4"], "is now --per_device_train_batch_size"),
    ("num_epochs", "3", ["--num_train_epochs", "3"], "is now --num_train_epochs"),
    ("cutoff_len", "256", ["--model_max_length", "256"], "is now --model_max_length"),
    ("sequence_len", "256", ["--model_max_length", "256"], "is now --model_max_length"),
    ("optimizer", "adamw_torch", ["--optim", "adamw_torch"], "is now --optim"),
    ("lr_scheduler", "cosine", ["--lr_scheduler_type", "cosine"], "is now --lr_scheduler_type"),
    ("wandb_run_name", "r", ["--run_name", "r"], "is now --run_name"),
    ("batch_size", "128", ["--gradient_accumulation_steps", "16"], "is now --gradient_accumulation_steps"),
    ("prompt_template_name", "alpaca", [], GONE),
    ("load_in_8bit", "False", [], GONE),
    *((name, "x", [], GONE) for name in PEERS.split()),
]


def test_every_old_option_has_a_case_here():
    assert {row[0] for row in TRANSLATED} == set(train.OLD_OPTIONS)


@pytest.mark.parametrize(("name", "value", "words", "meaning"), TRANSLATED)
def test_an_old_option_is_translated_in_every_spelling(name, value, words, meaning):
    dashes = name.replace("_", "-")
    for spelling, shown in (
        ([f"--{name}", *value.split()], name),
        ([f"--{name}={value}"], name),
        ([f"--{dashes}", *value.split()], dashes),
        ([f"--{dashes}={value}"], dashes),
    ):
        result = train.translate_old_options(["--seed", "1", *spelling, "--bf16", "True"])
        assert result == (["--seed", "1", *words, "--bf16", "True"], [f"--{shown} {meaning}"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("group_by_length", ["--train_sampling_strategy", "group_by_length"]),
        ("no_cuda", ["--use_cpu"]),
        ("adafactor", ["--optim", "adafactor"]),
        ("evaluation_strategy", ["--eval_strategy"]),
        ("use_ipex", []),
    ],
)
def test_an_old_option_without_a_value_is_translated(name, words):
    assert train.translate_old_options([f"--{name}", "--tf32", "True"])[0] == [*words, "--tf32", "True"]
    assert train.translate_old_options([f"--{name}"])[0] == words


@pytest.mark.parametrize("equals", [True, False])
@pytest.mark.parametrize(
    ("words", "today", "notice"),
    [
        ("--optim adamw_hf", "--optim adamw_torch", "--optim adamw_hf is now --optim adamw_torch"),
        ("--optim adafactor", "--optim adafactor", None),
        ("--debug ", "", "--debug has no meaning any more; ignored"),
        ("--debug underflow_overflow", "--debug underflow_overflow", None),
    ],
)
def test_an_old_value_of_an_option_that_is_still_there_is_translated(words, today, notice, equals):
    join = "=" if equals else " "
    given, expected = words.replace(" ", join), today if notice else today.replace(" ", join)
    result = train.translate_old_options([*(given.split(" ")), "--seed", "1"])
    assert result == ([*expected.split(), "--seed", "1"], [notice] if notice else [])


@pytest.mark.parametrize(
    ("words", "value", "notice"),
    [
        ("--warmup_steps 10 --warmup_ratio 0.03", "10", "--warmup_ratio gives way to --warmup_steps 10, as it did"),
        ("--warmup_ratio 0.03 --warmup_steps=10", "10", "--warmup_ratio gives way to --warmup_steps 10, as it did"),
        ("--warmup_ratio 0.03 --warmup_steps 0", "0.03", "--warmup_ratio is now --warmup_steps"),
        ("--warmup_steps=0 --warmup_ratio=0.03", "0.03", "--warmup_ratio is now --warmup_steps"),
        ("--warmup_ratio 0.03", "0.03", "--warmup_ratio is now --warmup_steps"),
    ],
)
def test_of_two_warm_ups_the_one_counts_that_counted_in_2023(words, value, notice):
    result, notices = train.translate_old_options(words.split())
    assert result[-1].rpartition("=")[2] == value and notices == [notice]  # argparse takes the last


def test_the_new_names_exist_today_and_the_old_ones_do_not():
    import dataclasses

    import train

    classes = (train.ModelArguments, train.DataArguments, train.TrainingArguments)
    today = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert not today & set(train.OLD_OPTIONS)
    assert {row[2][0][2:] for row in TRANSLATED if row[2]} <= today


@pytest.mark.parametrize("words", ["--local_rank 3", "--local_rank=3", "--local-rank=3", "--local-rank 3"])
def test_the_launchers_local_rank_is_dropped_without_a_word(words):
    words = words.split()
    assert train.translate_old_options([*words, "--seed", "1"]) == (["--seed", "1"], [])
    assert train.translate_old_options(["--seed", "1", *words]) == (["--seed", "1"], [])


def test_words_of_today_pass_unchanged():
    words = ["out/run.json", "--fsdp", "full_shard auto_wrap", "--fsdp_config={}", "-1", "--model-max-length", "9"]
    assert train.translate_old_options(words) == (words, [])


def test_an_unknown_option_is_named_with_the_nearest_that_exists():
    known = ["--learning_rate", "--data_path", "--seed"]
    error = utils.unknown_options(["--learning_rat=1e-5", "stray", "--qqqq"], known)
    assert isinstance(error, UserError)
    assert str(error) == (
        "unknown option: --learning_rat (did you mean --learning_rate?), --qqqq; --help lists those that exist"
    )
    assert str(utils.unknown_options(["stray"], known)) == "unknown option: stray; --help lists those that exist"


# --- Errors, and talking to the user ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("pass", 0, ""),
        ("raise utils.UserError('bad\\nvalue')", 2, "error: bad value\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; the same command begins again\n"),
        ("open('missing.json')", 2, "error: missing.json: No such file or directory\n"),
        ("raise OSError(28, 'No space left on device')", 2, "error: No space left on device\n"),
        ("sys.exit(143)", 143, ""),
        ("sys.exit()", 0, ""),
    ],
    ids=["success", "user-error", "interrupt", "missing-file", "disk-full", "exit-143", "exit"],
)
def test_run_main_ends_with_one_line_and_a_code(body, code, err):
    done = python(f"import sys, utils\ndef main(): {body}\nutils.run_main(main)")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


@pytest.mark.parametrize("error", ["ZeroDivisionError('bug')", "OSError('bug')", "KeyError('bug')"])
def test_run_main_shows_the_traceback_of_a_bug(error):
    done = python(f"import utils\ndef main(): raise {error}\nutils.run_main(main)")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert "in main" in done.stderr and "error: " not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("bug") or done.stderr.splitlines()[-1].endswith("'bug'")


def test_only_the_first_process_speaks():
    code = "import utils\ndef main():\n utils.say('a line')\n raise utils.UserError('bad')\nutils.run_main(main)"
    assert python(code, RANK="0", LOCAL_RANK="0").stderr == "a line\nerror: bad\n"
    assert python(code, RANK="1", LOCAL_RANK="1").stderr == "error: bad\n"  # the first to fail, whatever its number
    with socket.socket(socket.AF_UNIX) as first:  # one that has failed before
        first.bind(f"\0cria-failed-{os.getpid()}--")
        other = python(code, RANK="1", LOCAL_RANK="1")
    assert (other.returncode, other.stderr) == (2, "")


def test_from_first_process_without_a_group_calls_the_function(monkeypatch):
    assert train.from_first_process(lambda a, b: a + b, 1, 2) == 3
    monkeypatch.setenv("RANK", "1")
    assert train.from_first_process(lambda: 1) is None


# --- run.json --------------------------------------------------------------------------------------------------------


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert utils.sha256_of(tmp_path / "a") == expected


def test_versions_leave_out_absent_packages():
    import pytest as package

    found = utils.versions("pytest", "no-such-package-here")
    assert found == {"python": "{}.{}.{}".format(*sys.version_info), "pytest": package.__version__}


def test_git_commit_of_a_checkout_with_and_without_changes_and_outside_one(tmp_path):
    (tmp_path / "utils.py").write_bytes((ROOT / "utils.py").read_bytes())
    ask = "import utils; print(utils.git_commit())"
    outside = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    assert python(ask, tmp_path, **outside).stdout == "None\n"
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "utils.py"], [*names, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    (tmp_path / "untracked").touch()
    assert python(ask, tmp_path, **outside).stdout == f"{head}\n"
    with open(tmp_path / "utils.py", "a") as file:
        file.write("# changed\n")
    assert python(ask, tmp_path, **outside).stdout == f"{head}+\n"
    assert python(ask, tmp_path, **(outside | {"PATH": "/nowhere"})).stdout == "None\n"


def test_read_run_returns_ours_and_none_where_there_is_none(tmp_path):
    assert utils.read_run(tmp_path) is None
    utils.write_json({"made_by": "cria", "status": "started"}, tmp_path / "run.json")
    assert utils.read_run(tmp_path) == {"made_by": "cria", "status": "started"}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"{}", b'{"made_by": "other"}', b"\xff"])
def test_read_run_refuses_a_file_that_is_not_ours(data, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(data)
    message = f"{path}: not a run.json of these scripts; choose another folder"
    assert refusal(utils.read_run, tmp_path) == message


def test_loss_csv_has_one_row_per_logged_step(tmp_path):
    history = [
        {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-05, "grad_norm": 1.25, "num_targets": 40, "x": 1},
        {"step": 2, "epoch": 1.0, "loss": 2.25, "learning_rate": 0.0, "num_targets": 30, "skipped_steps": 1},
        {"step": 2, "train_runtime": 3.0},
    ]
    train.write_loss_csv(history, tmp_path / "loss.csv")
    assert (tmp_path / "loss.csv").read_bytes() == (
        b"step,epoch,loss,learning_rate,grad_norm,num_targets,skipped_steps\r\n"
        b"1,0.5,2.5,1e-05,1.25,40,\r\n"
        b"2,1.0,2.25,0.0,,30,1\r\n"
    )


# --- Verified writes -------------------------------------------------------------------------------------------------


def contents(folder):
    """{relative path: bytes} of every file below a folder, and None for every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_block_that_fails_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text("old")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), utils.hidden_folder(tmp_path / ".saving", tmp_path) as staging:
        (staging / "config.json").write_text("new")
        (staging / "model.safetensors").write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == before


def test_staged_files_move_up_with_those_that_make_a_folder_load_last(tmp_path, monkeypatch):
    names = ["config.json", "a.json", "model.safetensors.index.json", "tokenizer.json", "model-2.safetensors", "z"]
    moves, replace = [], os.replace
    with utils.hidden_folder(tmp_path / "new" / ".saving", tmp_path / "new") as staging:
        assert staging.parent == tmp_path / "new"
        for name in names:
            (staging / name).write_text(name)
        assert contents(tmp_path / "new").keys() == {".saving", *(f".saving/{name}" for name in names)}
        monkeypatch.setattr(os, "replace", lambda a, b: (moves.append((Path(a).name, Path(b))), replace(a, b)))
    ordered = ["a.json", "model-2.safetensors", "tokenizer.json", "z", "config.json", "model.safetensors.index.json"]
    assert moves == [(name, tmp_path / "new" / name) for name in ordered]
    assert contents(tmp_path / "new") == {name: name.encode() for name in names}


def test_staging_starts_empty_where_a_killed_run_left_files(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "stale.safetensors").touch()
    with utils.hidden_folder(tmp_path / ".saving", tmp_path) as staging:
        (staging / "config.json").write_text("{}")
    assert contents(tmp_path) == {"config.json": b"{}"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_staged_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    old = os.umask(umask)
    try:
        with utils.hidden_folder(tmp_path / ".saving", tmp_path) as staging:
            (staging / "model.safetensors").touch(mode=0o600)
        assert os.umask(umask) == umask  # and it is what it was
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode


def test_a_staged_folder_stays_one_that_can_be_entered(tmp_path):
    """A tokenizer with several chat templates is saved with a folder of them; saving twice replaces it."""
    for text in ("one", "two"):
        with utils.hidden_folder(tmp_path / ".saving", tmp_path) as staging:
            (staging / "additional_chat_templates").mkdir()
            (staging / "additional_chat_templates" / "rag.jinja").write_text(text)
        assert (tmp_path / "additional_chat_templates").stat().st_mode & 0o111
        assert (tmp_path / "additional_chat_templates" / "rag.jinja").read_text() == text


def save_tensors(folder, name="model.safetensors", **tensors):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk_is_known_by_the_words_of_each_library():
    import torch

    few, many = {"w": torch.zeros(3)}, {"w": torch.zeros(600_000)}
    writers = {
        "Python": lambda: Path("/dev/full").write_bytes(b"x"),
        "torch, at the end": lambda: torch.save(few, "/dev/full"),
        "torch, amid a tensor": lambda: torch.save(many, "/dev/full"),
    }
    for name, write in writers.items():
        with pytest.raises((OSError, RuntimeError)) as raised:
            write()
        assert utils.is_disk_full(raised.value), (name, raised.value)
    assert not utils.is_disk_full(RuntimeError("Expected all tensors to be on the same device"))


def test_check_weights_reads_all_files(tmp_path):
    import torch

    a, b, n = torch.randn(2, 3), torch.randn(4).bfloat16(), torch.arange(3)
    save_tensors(tmp_path, "model-00001-of-00002.safetensors", a=a)
    save_tensors(tmp_path, "model-00002-of-00002.safetensors", b=b, n=n)
    train.check_weights(tmp_path, {"a": a, "b": b, "n": n})


def test_check_weights_names_the_tensor_that_is_wrong(tmp_path):
    import torch

    a = torch.tensor([[1.0, 2.0]])
    close = torch.nextafter(a, a + 1)
    for name, written in (
        ("zz", {"a": a, "zz": a.clone()}),
        ("a", {"a": a.T.contiguous()}),
        ("a", {"a": a.half()}),
        ("a", {"a": a * float("inf")}),
        ("a", {"a": torch.tensor([[1.0, float("nan")]])}),
        ("a", {"a": close}),
    ):
        save_tensors(tmp_path, **written)
        message = f"model.safetensors: tensor {name} read back differs from what was written"
        assert refusal(train.check_weights, tmp_path, {"a": a}) == message


def test_check_weights_refuses_what_is_missing(tmp_path):
    import torch

    a = torch.ones(1)
    message = f"{tmp_path}: saved weights lack 1 of 1 tensors, first a"
    assert refusal(train.check_weights, tmp_path, {"a": a}) == message
    save_tensors(tmp_path, a=a)
    message = f"{tmp_path}: saved weights lack 2 of 3 tensors, first b"
    assert refusal(train.check_weights, tmp_path, {"c": a, "b": a, "a": a}) == message


# --- Checkpoints and output folders ----------------------------------------------------------------------------------


def make_checkpoint(folder, step, mark=True, resumable=True):
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    (path / "global_step" / "optimizer.pt").write_text("moments")
    if mark:
        train.mark_checkpoint(path, step, SimpleNamespace(save_only_model=not resumable))
    return path


def test_the_marker_holds_the_files_with_their_sizes_and_the_facts(tmp_path):
    path = make_checkpoint(tmp_path, 3)
    train.mark_checkpoint(path, 3, SimpleNamespace(save_only_model=False))  # again: the marker is no part of itself
    assert json.loads((path / "complete.json").read_text()) == {
        "step": 3,
        "resumable": True,
        "files": {"global_step/optimizer.pt": 7, "model.safetensors": 7},
    }


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    whole, unfinished = utils.find_checkpoints(tmp_path)
    assert [path.name for path in whole] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert unfinished == []


def test_a_checkpoint_is_whole_only_with_marker_and_all_files(tmp_path):
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2, mark=False)
    (make_checkpoint(tmp_path, 3) / "model.safetensors").unlink()
    (make_checkpoint(tmp_path, 4) / "global_step" / "optimizer.pt").write_text("moment")
    (make_checkpoint(tmp_path, 5) / "complete.json").write_text('{"step": 5, "fi')
    (make_checkpoint(tmp_path, 6) / "complete.json").write_text("{}")
    (make_checkpoint(tmp_path, 7) / "complete.json").write_text("[]")
    (make_checkpoint(tmp_path, 8) / "extra.txt").touch()
    whole, unfinished = utils.find_checkpoints(tmp_path)
    assert [path.name[11:] for path in whole] == ["1", "8"]
    assert [path.name[11:] for path in unfinished] == ["2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize(("limit", "kept"), [(1, [12]), (2, [8, 12]), (None, [4, 8, 12])])
def test_so_many_checkpoints_stay_when_one_is_saved(limit, kept, tmp_path):
    for step in (4, 8):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 12, mark=False)
    args = SimpleNamespace(should_save=True, output_dir=str(tmp_path), save_only_model=False)
    state = SimpleNamespace(global_step=12, best_model_checkpoint=None)
    trainer = SimpleNamespace(num_kept=limit, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))
    train.SFTTrainer.on_save(trainer, args, state, None)
    assert [int(path.name[11:]) for path in utils.find_checkpoints(tmp_path)[0]] == kept
    assert len(list(tmp_path.glob("checkpoint-*"))) == len(kept)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("loss", "norm", "skipped", "is_sound"),
    [
        (1.5, 0.3, False, True),
        (1.5, None, False, True),
        (0.0, 0.3, False, True),
        (0.0, None, False, True),
        (1.5, INF, True, True),  # how fp16 knows that it must skip
        (1.5, INF, False, False),
        (1.5, NAN, False, False),
        (NAN, 0.3, False, False),
        (INF, None, False, False),
        (0.0, 0.0, False, False),
        (0.0, NAN, True, False),
    ],
)
def test_a_step_is_sound_by_its_loss_and_the_norm_of_its_gradient(loss, norm, skipped, is_sound, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    rows = [{"source": "d.json[3]"}, {"source": ""}, {"source": "d.json[9]"}]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda own: own, optimizer_step_was_skipped=skipped),
        args=SimpleNamespace(output_dir=str(tmp_path), process_index=1, save_only_model=True, eval_strategy="no"),
        control=SimpleNamespace(should_save=False, should_training_stop=False),
        state=SimpleNamespace(global_step=7, log_history=[]),
        signal=0, step_rows=[0, 1], train_dataset=rows, dtypes="weights float32",
    )  # fmt: skip
    if is_sound:
        train.SFTTrainer.end_step(trainer, torch.tensor(loss), norm)
        assert trainer.control.should_log and not trainer.control.should_save and trainer.step_skipped == skipped
        trainer.signal = 15
        train.SFTTrainer.end_step(trainer, torch.tensor(loss), norm)
        assert trainer.stopped_by == 15 and trainer.control.should_save and trainer.control.should_training_stop
        assert trainer.args.save_only_model is False
        return
    message = refusal(train.SFTTrainer.end_step, trainer, torch.tensor(loss), norm)
    assert message.startswith(
        f"step 7: the loss is {loss} and the gradient norm {norm}; records of process 1: d.json[3];"
    )


def test_a_deletion_that_is_interrupted_leaves_nothing_that_counts(tmp_path, monkeypatch):
    path, removed = make_checkpoint(tmp_path, 1), []
    with monkeypatch.context() as patch:
        patch.setattr(utils.shutil, "rmtree", removed.append)  # killed before this
        train.delete_checkpoint(path)
    assert removed == [path]
    assert utils.find_checkpoints(tmp_path) == ({}, [path])
    train.delete_checkpoint(path)
    assert not path.exists()


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path):
    folder = tmp_path / "deep" / "out"
    message = f"{folder}: another run is writing here; wait for it, or choose another folder"
    code = f"import utils; utils.run_main(lambda: utils.claim_folder({str(folder)!r}))"
    lock = utils.claim_folder(folder)
    second = python(code)
    assert (second.returncode, second.stderr) == (2, f"error: {message}\n")
    assert refusal(utils.claim_folder, folder) == message
    lock.close()
    assert python(code).returncode == 0


SETTINGS = {"learning_rate": 0.1, "seed": 42}


def make_run(folder, status="started", **more):
    run = {"made_by": "cria", "status": status, "settings": SETTINGS, "results": {"steps": 9}, **more}
    utils.write_json(run, folder / "run.json")


def test_an_empty_or_absent_folder_starts_a_run(tmp_path):
    assert train.resume_point(tmp_path / "absent", SETTINGS) == (False, None)
    (tmp_path / "notes.txt").touch()
    assert train.resume_point(tmp_path, SETTINGS, wanted="False") == (False, None)
    assert train.resume_point(str(tmp_path), SETTINGS, wanted=None, overwrite=True) == (False, None)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "checkpoint-5", "trainer_state.json"],
)
def test_a_folder_with_somebody_elses_model_is_refused_also_when_overwriting(name, tmp_path):
    (tmp_path / name).write_text("theirs")
    message = f"{tmp_path}: holds {name}, which is not of a run of ours; choose another --output_dir"
    for overwrite in (False, True):
        assert refusal(train.resume_point, tmp_path, SETTINGS, overwrite=overwrite) == message
    assert contents(tmp_path) == {name: b"theirs"}


def test_asking_to_resume_where_there_is_nothing_is_refused(tmp_path):
    assert refusal(train.resume_point, tmp_path, SETTINGS, wanted="True") == (
        f"--resume_from_checkpoint: {tmp_path} holds no run; leave the option out to start one"
    )
    make_run(tmp_path)
    make_checkpoint(tmp_path, 2, resumable=False)
    assert refusal(train.resume_point, tmp_path, SETTINGS, wanted="true") == (
        f"--resume_from_checkpoint: {tmp_path} holds no whole checkpoint; leave the option out"
    )


def test_a_named_checkpoint_is_taken_where_it_is_one(tmp_path):
    path = make_checkpoint(tmp_path / "elsewhere", 4)
    assert f"--resume_from_checkpoint {path}: " in refusal(train.resume_point, tmp_path, SETTINGS, wanted=str(path))
    (path / "trainer_state.json").write_text("{}")
    assert train.resume_point(tmp_path, SETTINGS, wanted=str(path)) == (False, str(path))


@pytest.mark.parametrize("keywords", [{"mark": False}, {"resumable": False}], ids=["unmarked", "no optimizer"])
def test_a_named_checkpoint_of_a_run_of_ours_counts_only_when_whole(keywords, tmp_path):
    make_run(tmp_path)
    make_checkpoint(tmp_path, 2)
    path = make_checkpoint(tmp_path, 4, **keywords)
    (path / "trainer_state.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "another"):
        message = refusal(train.resume_point, folder, SETTINGS, wanted=str(path))
        assert message.startswith(f"--resume_from_checkpoint {path}: ")
        assert message.endswith("it is unfinished or holds no optimizer; whole ones there: checkpoint-2")


def test_a_named_checkpoint_does_not_excuse_other_settings(tmp_path):
    make_run(tmp_path / "old")
    path = make_checkpoint(tmp_path / "old", 4)
    (path / "trainer_state.json").write_text("{}")
    for folder, place in ((tmp_path / "old", tmp_path / "old"), (tmp_path / "new", path)):
        assert refusal(train.resume_point, folder, SETTINGS | {"seed": 1}, wanted=str(path)) == (
            f"{place}: its run had other settings: seed was 42 and is 1; "
            "choose another --output_dir, start afresh with --overwrite_output_dir, "
            "or go on all the same with --resume_anyway True"
        )
        assert train.resume_point(folder, SETTINGS | {"seed": 1}, str(path), anyway=True) == (False, str(path))
        assert train.resume_point(folder, SETTINGS, str(path)) == (False, str(path))


def test_checkpoints_behind_the_step_resumed_from_count_no_more(tmp_path, capsys):
    for step in (2, 4, 6, 10):
        make_checkpoint(tmp_path, step)
    train.unmark_checkpoints_after(4, tmp_path)
    assert [[path.name for path in group] for group in utils.find_checkpoints(tmp_path)] == [
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-6", "checkpoint-10"],
    ]
    assert capsys.readouterr().err == "".join(
        f"{tmp_path}/checkpoint-{step}: of steps that are trained anew, no longer used\n" for step in (6, 10)
    )


def test_changed_settings_are_refused_and_named(tmp_path, capsys):
    make_run(tmp_path, settings=SETTINGS | {"gone": 1})
    changed = {"learning_rate": 0.2, "seed": 42, "bf16": True}
    assert refusal(train.resume_point, tmp_path, changed) == (
        f"{tmp_path}: its run had other settings: learning_rate was 0.1 and is 0.2; bf16 is True; "
        "choose another --output_dir, start afresh with --overwrite_output_dir, "
        "or go on all the same with --resume_anyway True"
    )
    path = make_checkpoint(tmp_path, 3)
    assert train.resume_point(tmp_path, changed, anyway=True) == (False, str(path))
    assert capsys.readouterr().err == f"resuming from {path}\n"


def test_refusing_to_resume_a_run_needs_overwriting(tmp_path):
    make_run(tmp_path)
    message = f"{tmp_path}: holds a run already; to start it afresh use --overwrite_output_dir"
    assert refusal(train.resume_point, tmp_path, SETTINGS, wanted="false") == message


def test_a_finished_run_has_nothing_to_do_unless_its_settings_changed(tmp_path, capsys):
    make_run(tmp_path, "finished")
    path = make_checkpoint(tmp_path, 9)
    for wanted in ("", "True"):
        assert train.resume_point(tmp_path, SETTINGS, wanted=wanted) == (True, None)
        assert capsys.readouterr().err == f"{tmp_path}: this run is finished (9 steps); nothing to do\n"
    assert train.resume_point(tmp_path, SETTINGS | {"seed": 1}, anyway=True) == (False, str(path))


def test_a_run_resumes_from_its_newest_whole_checkpoint(tmp_path, capsys):
    make_run(tmp_path)
    for step in (9, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 11, resumable=False)
    make_checkpoint(tmp_path, 12, mark=False)
    for hidden in (".saving", ".rehearsal"):
        (tmp_path / hidden).mkdir()
    names = ("resume_from_checkpoint", "overwrite_output_dir", "resume_anyway")
    args = SimpleNamespace(output_dir=str(tmp_path), **dict.fromkeys(names))
    assert train.open_output(args, SETTINGS, "some/model") == (False, f"{tmp_path}/checkpoint-10")
    assert capsys.readouterr().err == (
        f"{tmp_path}/checkpoint-12: unfinished checkpoint, not used\nresuming from {tmp_path}/checkpoint-10\n"
    )
    assert not (tmp_path / ".saving").exists() and not (tmp_path / ".rehearsal").exists()


def test_a_run_without_a_whole_checkpoint_starts_from_the_first_step(tmp_path, capsys):
    make_run(tmp_path)
    assert train.resume_point(tmp_path, SETTINGS) == (False, None)
    line = f"{tmp_path}: its run has no whole checkpoint yet; starting from the first step\n"
    assert capsys.readouterr().err == line


def test_a_folder_of_somebody_else_is_left_as_it_is(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "mine").touch()
    (tmp_path / "config.json").write_text("{}")
    names = ("resume_from_checkpoint", "overwrite_output_dir", "resume_anyway")
    args = SimpleNamespace(output_dir=str(tmp_path), **dict.fromkeys(names))
    assert "config.json, which is not of a run of ours" in refusal(train.open_output, args, SETTINGS, "some/model")
    assert (tmp_path / ".saving" / "mine").exists()


def test_nothing_outside_of_the_folder_is_deleted(tmp_path):
    (tmp_path / "precious").mkdir()
    make_run(tmp_path / "out", "finished", files=["../precious", "config.json"])
    train.delete_run(tmp_path / "out")
    assert (tmp_path / "precious").is_dir() and not (tmp_path / "out" / "run.json").exists()


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(tmp_path, capsys):
    make_run(tmp_path, "finished", files=["config.json", "model.safetensors", "already-gone.json"])
    make_checkpoint(tmp_path, 3)
    make_checkpoint(tmp_path, 4, mark=False)
    for name in ("config.json", "model.safetensors", "loss.csv", "notes.txt", "generation_config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-999").mkdir()
    (tmp_path / "checkpoint-999" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    changed = {"learning_rate": 9}
    assert train.resume_point(tmp_path, changed, overwrite=True) == (False, None)
    assert contents(tmp_path) == before  # not before the new run is known to work
    train.delete_run(tmp_path)
    left = {name: name.encode() for name in ("notes.txt", "generation_config.json")}
    assert contents(tmp_path) == left | {"checkpoint-999": None, "checkpoint-999/thesis.txt": b"mine"}
    assert capsys.readouterr().err == f"{tmp_path / 'checkpoint-999'}: holds nothing of a run; left\n"


def test_a_checkpoint_that_is_a_link_goes_and_what_it_leads_to_stays(tmp_path):
    make_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-3").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "elsewhere")
    whole = contents(tmp_path / "elsewhere")
    train.delete_checkpoint(tmp_path / "checkpoint-3")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"} and contents(tmp_path / "elsewhere") == whole


def test_a_finished_run_whose_model_is_gone_is_not_finished(tmp_path, capsys):
    make_run(tmp_path, "finished", files=["model.safetensors"])
    make_checkpoint(tmp_path, 3)
    assert train.resume_point(tmp_path, SETTINGS) == (False, str(tmp_path / "checkpoint-3"))
    assert capsys.readouterr().err == (
        f"{tmp_path}: this run was finished, but model.safetensors is gone\nresuming from {tmp_path / 'checkpoint-3'}\n"
    )


# --- Engines ---------------------------------------------------------------------------------------------------------

TUTORIAL = {  # what guides of 2023 told users to paste
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 32, "hysteresis": 2},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
STANFORD = {  # Stanford Alpaca's default_offload_opt_param.json
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(["total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"], "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 5,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
GATHERED = "set stage3_gather_16bit_weights_on_model_save, without which no model would be saved"


@pytest.mark.parametrize(
    ("config", "added", "gather", "notices"),
    [
        (
            TUTORIAL,
            {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
            True,
            ['added gradient_accumulation_steps, gradient_clipping, bf16 as "auto"'],
        ),
        (
            STANFORD,
            {"fp16": {"enabled": "auto"}},
            True,
            [
                'added fp16 as "auto"',
                GATHERED,
                "its optimizer block takes the place of the options",
                "its scheduler block takes the place of the options",
            ],
        ),
    ],
    ids=["tutorial", "stanford"],
)
def test_a_deepspeed_json_of_2023_is_completed(config, added, gather, notices):
    before = copy.deepcopy(config)
    completed, said = engines.complete_ds_config(config)
    expected = before | added
    expected["zero_optimization"] = before["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": gather}
    assert completed == expected
    assert said == notices
    assert config == before


def test_an_empty_deepspeed_json_is_completed_and_a_complete_one_left_alone():
    completed, said = engines.complete_ds_config({"zero_optimization": {"stage": 2}})
    assert completed == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
    }
    assert said == [
        "added train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps, gradient_clipping, fp16, "
        'bf16 as "auto"'
    ]
    assert engines.complete_ds_config(completed) == (completed, [])
    for name in ("ds_config.json", "examples/ds_zero2.json"):
        ours = json.loads((ROOT / name).read_text(encoding="utf-8"))
        assert engines.complete_ds_config(ours) == (ours, [])


BILLION = 10**9


def test_memory_needs_of_seven_billion_parameters_on_eight_devices_in_half_precision():
    """fp32 masters (4), gradients (4) and two moments (8): 16 bytes a parameter; ZeRO works in 2 bytes on top."""
    needs = engines.memory_needs(7 * BILLION, 4, half=True, adam=True, world_size=8, local_world_size=8)
    assert needs == {
        "single process": (112 * BILLION, 0),
        "DDP": (112 * BILLION, 0),
        "FSDP": (14 * BILLION, 28 * BILLION),
        "FSDP with offload": (0, 112 * BILLION),
        "ZeRO-2": (14 * BILLION + 12.25 * BILLION, 0),  # 2 whole, and 2 + 12 in eight parts
        "ZeRO-2 with offload": (14 * BILLION, 84 * BILLION),
        "ZeRO-3": (14 * BILLION, 0),  # the 16 bytes of the ZeRO paper in eight parts
        "ZeRO-3 with offload": (0, 112 * BILLION),
    }


def test_memory_needs_on_two_hosts_in_single_precision_without_moments():
    needs = engines.memory_needs(BILLION, 4, half=False, adam=False, world_size=4, local_world_size=2)
    assert needs == {
        "single process": (8 * BILLION, 0),
        "DDP": (8 * BILLION, 0),
        "FSDP": (2 * BILLION, 4 * BILLION),
        "FSDP with offload": (0, 4 * BILLION),
        "ZeRO-2": (6 * BILLION, 0),
        "ZeRO-2 with offload": (4 * BILLION, 2 * BILLION),
        "ZeRO-3": (3 * BILLION, 0),
        "ZeRO-3 with offload": (0, 6 * BILLION),
    }


LLAMA = 6_740_000_000  # x 16 bytes = 107.84e9 = 100.4 GiB
GIB = 1_073_741_824


def test_a_7b_model_does_not_fit_one_gpu_and_the_engines_that_do_are_named():
    needs = engines.memory_needs(LLAMA, 4, half=True, adam=True, world_size=1, local_world_size=1)
    lack = "100.4 GiB on each GPU, where 79.2 GiB are free"
    # On the host: FSDP with offload 100.4 GiB, ZeRO-2 75.3 beside 12.6 on the GPU, ZeRO-3 100.4.
    for host, advice in (
        (
            128,
            'what fits here: --fsdp "full_shard auto_wrap offload" or --deepspeed examples/ds_zero2.json '
            "or --deepspeed ds_config.json",
        ),
        (90, "what fits here: --deepspeed examples/ds_zero2.json"),
        (64, "no engine fits here: more devices, or a smaller model"),
    ):
        problem = engines.memory_problem("single process", needs, 1, host * GIB, 79.2 * GIB)
        assert problem == f"single process needs {lack}, for weights, gradients and optimizer; {advice}"
    assert engines.memory_problem("single process", needs, 1, 0, 100.5 * GIB) == ""
    assert engines.memory_problem("ZeRO-1", needs, 1, 0, 0) == ""


def test_host_memory_is_counted_where_engines_offload():
    needs = engines.memory_needs(LLAMA, 4, half=True, adam=True, world_size=8, local_world_size=8)
    assert engines.memory_problem("FSDP", needs, 8, 26 * GIB, 13 * GIB) == ""  # 12.6 each, 25.1 on the host
    assert engines.memory_problem("ZeRO-3 with offload", needs, 8, 100 * GIB, 13 * GIB) == (
        "ZeRO-3 with offload needs 100.4 GiB of host memory, where 100.0 GiB are free, for weights, gradients and "
        'optimizer; what fits here: --fsdp "full_shard auto_wrap" or --deepspeed examples/ds_zero2.json'
    )


def test_on_cpu_the_devices_of_a_host_share_its_memory():
    needs = engines.memory_needs(BILLION, 4, half=False, adam=True, world_size=2, local_world_size=2)
    assert engines.memory_problem("DDP", needs, 2, 32 * BILLION) == ""
    assert engines.memory_problem("DDP", needs, 2, 31 * BILLION) == (
        "DDP needs 29.8 GiB of host memory, where 28.9 GiB are free, for weights, gradients and optimizer; "
        'what fits here: --fsdp "full_shard auto_wrap" or --fsdp "full_shard auto_wrap offload" '
        "or --deepspeed examples/ds_zero2.json or --deepspeed ds_config.json"
    )


def test_free_host_memory_is_no_more_than_the_machine_has():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < utils.free_host_memory() <= total
