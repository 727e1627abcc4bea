"""From records to batches, and the public names of Stanford Alpaca's train.py as a fork uses them."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import MODEL_FILES, ROOT, environment, make_records, render_prompt
from make_tiny_llama import CORPUS, train_sentencepiece

import engines
import train
import utils
from train import IGNORE_INDEX, SupervisedDataset, cut, encode, flatten, preprocess
from utils import UserError

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
END = "data: the end token is trained in "


def prompt_of(instruction):
    return HEAD + "### Instruction:\n" + instruction + "\n\n### Response:"


def original_rule(prompt, answer, tokenizer, window):
    """Ids and labels of one row as Stanford Alpaca made them: two calls a row, the first len(prompt ids) masked."""
    ids = tokenizer(prompt + answer, max_length=window, truncation=True).input_ids
    border = len(tokenizer(prompt, max_length=window, truncation=True).input_ids)
    return ids, [IGNORE_INDEX if position < border else ids[position] for position in range(len(ids))]


def varied_pairs(count):
    """Prompts and answers of all sorts and lengths; the same every time."""
    draw = random.Random(1)
    words = CORPUS.read_text(encoding="utf-8").split()

    def text(length):
        kinds = ["words"] * 6 + ["blanks", "chinese", "bytes", "marks", "special"]
        parts = []
        for _ in range(length):
            kind = draw.choice(kinds)
            parts.append(
                {
                    "words": " " + draw.choice(words),
                    "blanks": draw.choice(["\n", "  ", "\t", "    "]),
                    "chinese": chr(draw.randint(0x4E00, 0x9FA5)),
                    "bytes": chr(draw.choice([0x1F999, 0x301, 0xE9, 0x2028, 0x7F])),
                    "marks": draw.choice([":", ")", "):", "###", "\\", "{}", '":', "▁"]),
                    "special": draw.choice(["</s>", "<s>", "<unk>"]) if draw.random() < 0.1 else "-",
                }[kind]
            )
        return "".join(parts)

    lengths = [0, 1, 2, 5, 20, 60, 200]
    pairs = []
    for i in range(count):
        prompt = render_prompt({"instruction": text(draw.choice(lengths)), "input": text(i % 3)})
        pairs.append((prompt if i % 4 else text(draw.choice(lengths)), text(draw.choice(lengths)) + "</s>"))
    return pairs


def write_records(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def plain(outputs, instruction="Go."):
    return [{"instruction": instruction, "output": output} for output in outputs]


def with_window(tokenizer, window):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = window
    return tokenizer


@pytest.fixture(scope="session")
def smiling(tmp_path_factory):
    """A SentencePiece model with a piece ":)", which straddles the border of "### Response:" and ")"; its path."""
    text = CORPUS.read_text(encoding="utf-8") + "\n" + "\n".join(["good:) fine:) yes:) "] * 40)
    path = tmp_path_factory.mktemp("smiling") / "tokenizer.model"
    path.write_bytes(train_sentencepiece([text, *utils.PROMPT_DICT.values()], 1000))
    return path


def sentencepiece_row(model_path, prompt, output):
    """(ids of the prompt, ids of the whole row), as SentencePiece itself gives them."""
    from sentencepiece import SentencePieceProcessor

    encode = SentencePieceProcessor(model_file=str(model_path)).encode
    return [1, *encode(prompt)], [1, *encode(prompt + output), 2]


# --- preprocess ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [512, 64, 16])
def test_ids_and_labels_are_those_of_the_original_rule(window, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "CHUNK", 64)  # so that the rows fill several calls
    tokenizer, pairs = with_window(tokenizer, window), varied_pairs(200)
    data = preprocess([prompt for prompt, _ in pairs], [answer for _, answer in pairs], tokenizer)
    expected = [original_rule(prompt, answer, tokenizer, window) for prompt, answer in pairs]
    assert [row.tolist() for row in data["input_ids"]] == [ids for ids, _ in expected]
    assert [row.tolist() for row in data["labels"]] == [labels for _, labels in expected]
    assert {row.dtype for row in data["input_ids"] + data["labels"]} == {torch.int64}
    heads = [tokenizer(prompt, max_length=window, truncation=True).input_ids for prompt, _ in pairs]
    assert data["straddling"] == [ids[: len(head)] != head for head, (ids, _) in zip(heads, expected, strict=True)]
    assert len({len(ids) for ids, _ in expected}) > 10 or window == 16


def test_a_row_is_begin_prompt_answer_end(base, tokenizer):
    head, row = sentencepiece_row(base / "tokenizer.model", prompt_of("Add 1 and 2."), "3.")
    data = preprocess([prompt_of("Add 1 and 2.")], ["3.</s>"], tokenizer)
    assert data["input_ids"][0].tolist() == row
    assert data["labels"][0].tolist() == [-100] * len(head) + row[len(head) :]
    assert tokenizer.decode(row[len(head) :]) == "3.</s>"
    assert data["straddling"] == [False]


def test_a_token_that_straddles_the_border_is_masked_and_reported(tokenizer):
    """The tiny tokenizer has the piece "):": the prompt ends inside it."""
    data = preprocess(["a)", "a)"], [": b</s>", " b</s>"], tokenizer)
    pieces = ["<s>", "▁a", "):", "▁b", "</s>"]
    assert data["input_ids"][0].tolist() == tokenizer.convert_tokens_to_ids(pieces)
    assert data["labels"][0].tolist() == [-100, -100, -100, *tokenizer.convert_tokens_to_ids(["▁b", "</s>"])]
    assert data["straddling"] == [True, False]


def test_nothing_gives_nothing(tokenizer):
    assert preprocess([], [], tokenizer) == {"input_ids": [], "labels": [], "straddling": []}


def test_prompts_without_answers_are_a_mistake(tokenizer):
    with pytest.raises(ValueError):
        preprocess(["a", "b"], ["c"], tokenizer)


def test_a_tokenizer_without_a_limit_cuts_nothing(base):
    unlimited = utils.tokenizer_from_sentencepiece(base / "tokenizer.model")
    assert unlimited.model_max_length > 10**29  # transformers' word for "none"
    data = preprocess(["word " * 1000], ["end</s>"], unlimited)
    assert data["input_ids"][0].tolist() == unlimited("word " * 1000 + "end</s>").input_ids
    assert data["labels"][0].tolist()[-1] == 2


def token_ids(texts, tokenizer):
    """The ids that `encode` gives texts of one span."""
    return [row["input_ids"].tolist() for row in encode([[(text, True)] for text in texts], tokenizer)]


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_are_those_of_a_call_for_each_text(split_special_tokens, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.split_special_tokens = split_special_tokens
    texts = [*utils.NASTY_STRINGS, "a</s> b<s>", "", *(answer for _, answer in varied_pairs(50))]
    expected = [tokenizer(text).input_ids for text in texts]
    tokenizer(texts[:3], padding="max_length", max_length=20, truncation=True)  # leaves the Rust half padding, cutting
    assert token_ids(texts, tokenizer) == expected


@pytest.mark.parametrize("step", ["__call__", "_encode_plus", "_convert_encoding"])
def test_a_tokenizer_with_a_step_of_its_own_is_called(step, base, tokenizer):
    library = transformers.PreTrainedTokenizerFast

    def backwards(self, text, *arguments, **options):
        return getattr(library, step)(self, [one[::-1] for one in text], *arguments, **options)

    def spoilt(self, *arguments, **options):
        made, encodings = library._convert_encoding(self, *arguments, **options)
        return made | {"input_ids": [[i + 1 for i in ids] for ids in made["input_ids"]]}, encodings

    own = type("Own", (library,), {step: spoilt if step == "_convert_encoding" else backwards}).from_pretrained(base)
    texts = ["river", "no", "lamp"]
    assert token_ids(texts, own) == own(texts).input_ids
    assert token_ids(texts, own) != tokenizer(texts).input_ids


# --- The steps of the data path --------------------------------------------------------------------------------------


def test_a_record_is_two_messages_and_two_spans(tokenizer):
    messages = utils.as_messages({"instruction": "Add.", "input": "1, 2", "output": "3"})
    question = {"role": "user", "content": "Add.", "input": "1, 2"}
    assert messages == [question, {"role": "assistant", "content": "3"}]
    prompt = utils.PROMPT_DICT["prompt_input"].format(instruction="Add.", input="1, 2")
    assert utils.spans("alpaca", messages, tokenizer) == [(prompt, False), ("3</s>", True)]
    assert utils.spans("alpaca", messages[:1]) == [(prompt, False)]
    assert utils.as_messages({"instruction": "Add.", "input": "1, 2"}, needs_answer=False) == [question]


def test_any_number_of_spans_is_encoded_and_only_the_trained_ones_have_labels(base, tokenizer):
    spans = [("one", False), (" two three", True), (" four", False), (" five</s>", True)]
    (row,) = encode([spans], tokenizer)
    whole = tokenizer("one two three four five</s>").input_ids
    assert row["input_ids"].tolist() == whole
    borders = [0, *(len(tokenizer(text).input_ids) for text in ("one", "one two three", "one two three four")), None]
    expected = []
    for (_, trained), first, last in zip(spans, borders, borders[1:]):
        ids = whole[first:last]
        expected += ids if trained else [IGNORE_INDEX] * len(ids)
    assert row["labels"].tolist() == expected and row["straddling"] is False
    assert tokenizer.decode([label for label in expected if label != IGNORE_INDEX]) == "two three five</s>"


def test_a_token_that_straddles_a_border_of_many_is_masked(smiling):
    """ ":)" is one piece: its ":" is the user's, its ")" the assistant's."""
    tokenizer = utils.tokenizer_from_sentencepiece(smiling, model_max_length=512)
    spans = [
        ("one:", False),
        (") two</s>", True),
        ("three: ", False),
        ("four</s>", True),
        ("five:", False),
        (") six</s>", True),
    ]
    (row,) = encode([spans], tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
    smiles = [i for i, piece in enumerate(pieces) if piece == ":)"]
    assert len(smiles) == 2 and row["straddling"] is True
    assert all(row["labels"][i] == IGNORE_INDEX and row["labels"][i + 1] != IGNORE_INDEX for i in smiles)
    assert len(row["ends"]) == 3 and all(pieces[end - 1] == "</s>" for end in row["ends"])


def test_cut_gives_the_example_of_its_docstring():
    whole = row([1, 5, 6, 2], [-100, -100, 6, 2])
    rows, outcomes = cut([whole] * 3, 3)
    assert outcomes == ["truncated"] * 3 and lists(rows[0]) == {"input_ids": [1, 5, 6], "labels": [-100, -100, 6]}
    assert cut([whole], 2)[1] == ["dropped"] and cut([whole], 4)[1] == ["kept"] and cut([whole], 10**30)[1] == ["kept"]
    assert rows[0]["input_ids"].untyped_storage().nbytes() == 3 * 8  # the rest of a long text is not kept in memory


def test_a_record_passes_through_nine_functions_of_ours_on_its_way_to_the_model(base, tokenizer, tmp_path):
    """From the file to the model's forward, traced; what only speaks of the records is left out."""
    path, names = write_records(tmp_path / "d.json", make_records(2)), []

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and Path(code.co_filename).parent == ROOT and not code.co_name.startswith("<"):
            names.append(code.co_name)

    args = train.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, report_to="none")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)

    class Seen(Exception):
        pass

    def forward(*arguments, **keywords):
        raise Seen

    sys.setprofile(note)
    try:
        dataset = SupervisedDataset(path, tokenizer)
    finally:
        sys.setprofile(None)
    rows = dataset.rows(1)
    trainer = train.SFTTrainer(model=model, args=args, train_dataset=rows, data_collator=flatten)
    trainer.remove_callback(trainer)
    model.forward = forward
    sys.setprofile(note)
    try:
        trainer.train()
    except Seen:
        pass
    finally:
        sys.setprofile(None)
    speaking = {
        "report_of",
        "turns_of",
        "kind_of",
        "account",
        "say",
        "rank",
        "unused_keys",
        "unused_of",
        "printable",
        "terminal_width",
        "put",
    }
    # The file as a whole, the JSON parser's look for doubled keys, a question to the tokenizer, lengths: no record.
    other = {
        "rows_of",
        "split_of",
        "is_data_set",
        "rows_of_text",
        "decode",
        "file_kind",
        "once",
        "begin_ids",
        "borders",
        "columns_of",
        "talk_of",
    }
    found = [name for name in dict.fromkeys(names) if name not in speaking | other]
    assert found == [
        "__init__", "read_records", "as_messages", "render", "spans", "encode", "cut", "get_batch_samples", "flatten",
    ]  # fmt: skip


# --- SupervisedDataset -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [512, 120, 100, 70, 64, 32])
def test_every_record_is_kept_or_dropped_and_the_counts_name_them(window, smiling, tmp_path, capsys):
    """Judged by the ids that SentencePiece gives the rows."""
    records = make_records(40) + plain([") smile", "x", ")", "word " * 60]) + plain(["y"], "word " * 40)
    path = write_records(tmp_path / "d.json", records)
    tokenizer = utils.tokenizer_from_sentencepiece(smiling, model_max_length=window)
    expected, kept, rows, num_ends = {"dropped": [], "truncated": [], "straddling": []}, [], [], 0
    for i, record in enumerate(records):
        head, row = sentencepiece_row(smiling, render_prompt(record), record["output"])
        if len(head) >= window:
            expected["dropped"].append(f"d.json[{i}]")
            continue
        kept.append(f"d.json[{i}]")
        rows.append((row[:window], [-100] * len(head) + row[len(head) : window]))
        expected["truncated"] += [kept[-1]] * (len(row) > window)
        expected["straddling"] += [kept[-1]] * (row[: len(head)] != head)
        num_ends += len(row) <= window
    outcome = {512: (45, 0, 0), 70: (24, 21, 18), 32: (0, 45, 0)}.get(window)  # that the windows are not all alike
    assert outcome in (None, (len(kept), len(expected["dropped"]), len(expected["truncated"])))
    if not kept:
        with pytest.raises(UserError):
            SupervisedDataset(path, tokenizer)
        return
    dataset = SupervisedDataset(path, tokenizer)
    assert [(item["input_ids"].tolist(), item["labels"].tolist()) for item in dataset] == rows
    assert len(dataset) == len(kept) and dataset.sources == kept
    assert dataset.report == {
        "read": 45,
        "kept": len(kept),
        "unreadable": [],
        "unused": {},
        "prompt_fills_window": expected["dropped"],
        "no_turn_fits": [],
        "truncated": expected["truncated"],
        "straddling": expected["straddling"],
        "empty_output": [],
        "special_tokens": [],
        "end_token_trained": num_ends,
        "kinds": {"alpaca": 45},
        "turns": {"in all": 45, "trained": len(kept), "left out by the template": 0, "cut off": 45 - len(kept)},
    }
    err = capsys.readouterr().err
    assert err.startswith(f"data: {len(kept)} kept + {45 - len(kept)} dropped = 45 read\n")
    assert ("warning: models that seldom see the end token" in err) == (num_ends / len(kept) < 0.99)


def test_the_account_of_a_dataset_is_exact(smiling, tmp_path, capsys):
    records = [
        *plain(["one", "", ") smile"]),
        {"instruction": "Say </s> twice.", "input": "", "output": "no"},
        {"instruction": "Go.", "input": "<unk>", "output": "stop</s>more"},
        {"instruction": "Go.", "output": 3},
        "word",
        *plain(["word " * 600]),
        *plain(["x"], "word " * 600),
    ]
    path = write_records(tmp_path / "d.json", records)
    tokenizer = utils.tokenizer_from_sentencepiece(smiling, model_max_length=512)
    dataset = SupervisedDataset(data_path=[str(path)], tokenizer=tokenizer, skip_bad_records=True)
    keys = "instruction, input (optional), output"
    problems = [f"d.json[6]: text, expected an object with the keys {keys}"]
    problems.insert(0, "d.json[5]: output is a number, expected text")
    assert dataset.report == {
        "read": 9,
        "kept": 6,
        "unreadable": problems,
        "unused": {},
        "prompt_fills_window": ["d.json[8]"],
        "no_turn_fits": [],
        "truncated": ["d.json[7]"],
        "straddling": ["d.json[2]"],
        "empty_output": ["d.json[1]"],
        "special_tokens": ["d.json[3]", "d.json[4]"],
        "end_token_trained": 5,
        "kinds": {"alpaca": 7},
        "turns": {"in all": 7, "trained": 6, "left out by the template": 0, "cut off": 1},
    }
    assert capsys.readouterr().err == (
        "data: 6 kept + 3 dropped = 9 read\n"
        f"data: dropped, unreadable: 2 ({problems[0]}, {problems[1]})\n"
        "data: dropped, the prompt fills the window of 512 tokens: 1 (d.json[8])\n"
        "data: truncated at 512 tokens: 1 (d.json[7])\n"
        "data: a token straddles the border of prompt and answer and is masked: 1 (d.json[2])\n"
        "data: empty output, only the end token is trained: 1 (d.json[1])\n"
        "warning: special tokens such as </s> stand in the text of records: 2 (d.json[3], d.json[4])\n"
        "data: the end token is trained in 5 of 6 rows (83.3%)\n"
        "warning: models that seldom see the end token do not stop; raise --model_max_length\n"
    )


def test_an_end_token_inside_a_record_is_one_id(base, tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", plain(["a</s>b"]))
    row = SupervisedDataset(path, tokenizer)[0]["input_ids"].tolist()
    head = sentencepiece_row(base / "tokenizer.model", prompt_of("Go.") + "a", "")[0]
    assert row == [*head, 2, *tokenizer.convert_tokens_to_ids(["▁b", "</s>"])]


def test_a_row_as_long_as_the_window_is_not_truncated(base, tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", plain(["one two three"]))
    row = sentencepiece_row(base / "tokenizer.model", prompt_of("Go."), "one two three")[1]
    exact = SupervisedDataset(path, with_window(tokenizer, len(row)))
    assert (exact.report["truncated"], exact.report["end_token_trained"]) == ([], 1)
    short = SupervisedDataset(path, with_window(tokenizer, len(row) - 1))
    assert (short.report["truncated"], short.report["end_token_trained"]) == (["d.json[0]"], 0)
    assert short[0]["input_ids"].tolist() == row[:-1]


def test_a_prompt_one_token_shorter_than_the_window_is_kept(base, tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", plain(["one"]) + plain(["one"], "Go on."))
    heads = [sentencepiece_row(base / "tokenizer.model", prompt_of(text), "")[0] for text in ("Go.", "Go on.")]
    assert len(heads[0]) < len(heads[1])
    dataset = SupervisedDataset(path, with_window(tokenizer, len(heads[0]) + 1))
    assert dataset.sources == ["d.json[0]"]
    assert (dataset[0]["labels"] != -100).sum() == 1
    assert dataset.report["prompt_fills_window"] == ["d.json[1]"]


def test_one_record_in_a_hundred_without_its_end_token_is_no_warning(tokenizer, tmp_path, capsys):
    for count, warned in ((100, False), (99, True)):
        path = write_records(tmp_path / "d.json", plain(["word " * 600]) + plain(["x"] * (count - 1)))
        SupervisedDataset(path, tokenizer)
        err = capsys.readouterr().err
        assert f"{END}{count - 1} of {count} rows (99.0%)\n" in err
        assert ("warning" in err) == warned


def test_an_output_of_a_megabyte_is_cut_and_counted(base, tokenizer, tmp_path):
    output = "word 你 " * 100_000
    assert len(output.encode()) == 900_000
    path = write_records(tmp_path / "d.json", plain([output, "x"]))
    dataset = SupervisedDataset(path, tokenizer)
    assert dataset.report["truncated"] == ["d.json[0]"]
    row = sentencepiece_row(base / "tokenizer.model", prompt_of("Go."), output[:5000])[1]
    assert dataset[0]["input_ids"].tolist() == row[:512]


def test_chinese_records_are_trained_to_their_end(base, tokenizer, tmp_path):
    record = {"instruction": "把下面的句子翻译成英文。", "input": "今天天气很好，𠀀🦙", "output": "她在图书馆读书。"}
    path = tmp_path / "zh.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    dataset = SupervisedDataset(path, tokenizer)
    head, row = sentencepiece_row(base / "tokenizer.model", render_prompt(record), record["output"])
    assert dataset.sources == ["zh.jsonl:1"]
    assert dataset[0]["input_ids"].tolist() == row
    assert tokenizer.decode(dataset[0]["labels"][len(head) :]) == "她在图书馆读书。</s>"
    assert dataset.report["end_token_trained"] == 1


def test_several_files_are_one_dataset_in_their_order(tokenizer, tmp_path):
    first = write_records(tmp_path / "a.json", plain(["one", "two"]))
    second = tmp_path / "b.jsonl"
    second.write_text('\n{"instruction": "Go.", "output": "three"}\n', encoding="utf-8")
    dataset = SupervisedDataset([second, first], tokenizer)
    assert dataset.sources == ["b.jsonl:2", "a.json[0]", "a.json[1]"]
    assert [tokenizer.decode(item["labels"][item["labels"] != -100]) for item in dataset] == [
        "three</s>",
        "one</s>",
        "two</s>",
    ]


def test_bad_records_are_refused_by_name(tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", [*plain(["x"]), *plain([1]), *plain(["y"])])
    with pytest.raises(UserError) as caught:
        SupervisedDataset(path, tokenizer)
    assert str(caught.value) == (
        "1 of 3 records cannot be used: d.json[1]: output is a number, expected text; mend them, "
        "or drop and count them with --skip_bad_records True"
    )
    write_records(path, plain(["x", 1, 2.5, None, True]))
    with pytest.raises(UserError) as caught:
        SupervisedDataset(path, tokenizer)
    assert str(caught.value) == (
        "4 of 5 records cannot be used: d.json[1]: output is a number, expected text; "
        "d.json[2]: output is a number, expected text; d.json[3]: output is null, expected text; ...; mend them, "
        "or drop and count them with --skip_bad_records True"
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "the list is empty"),
        ("{}", "d.json:1: no instruction and no output"),
        ('[{"instruction": "i", "output": 1}]', "d.json[0]: output is a number"),
        ("instruction,input,output\ni,,o\n", "a table"),
    ],
    ids="list object bad-record csv".split(),
)
def test_a_file_without_a_record_is_refused_also_beside_a_good_one(text, why, skip, tokenizer, tmp_path):
    good, path = write_records(tmp_path / "good.json", plain(["x"])), tmp_path / "d.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        SupervisedDataset([good, path], tokenizer, skip_bad_records=skip)
    assert str(path) in str(caught.value) and why in str(caught.value)
    assert "skip_bad_records" not in str(caught.value) and "token" not in str(caught.value).replace(str(path), "")


def test_keys_with_text_that_are_not_used_are_counted_and_named_once_for_each_file(tokenizer, tmp_path, capsys):
    records = plain(["x"] * 5)
    for record in records[:3]:
        record["source"] = "somewhere"
    records[4] |= {"topics": [["hello", "hi"]], "meta": {"a": 1}}
    records[0] |= {"topics": [], "label": "", "score": 0.5, "index": 3}  # nothing that could be trained
    first = write_records(tmp_path / "a.json", records)
    second = write_records(tmp_path / "b.json", [plain(["y"])[0] | {"source": "here"}])
    dataset = SupervisedDataset([first, second], tokenizer)
    assert dataset.report["unused"] == {str(first): {"source": 3, "topics": 1, "meta": 1}, str(second): {"source": 1}}
    lines = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    assert lines == [
        f"data: {first}: not used: source (3), topics (1), meta (1)",
        f"data: {second}: not used: source (1)",
    ]


def test_our_own_files_have_nothing_that_is_not_used(tokenizer, tmp_path, capsys):
    row = {"instruction": "i", "input": "", "output": "o", "most_similar_instructions": {"a": 0.5}}
    row |= {"avg_similarity_score": 0.5, "request": 3, "model": "m", "demonstrations": ["seed_tasks.jsonl:1"]}
    regenerated = write_records(tmp_path / "regen.json", [row])
    dataset = SupervisedDataset([regenerated, ROOT / "seed_tasks.jsonl"], tokenizer, skip_bad_records=True)
    assert dataset.report["unused"] == {} and "not used" not in capsys.readouterr().err


def test_a_window_that_holds_no_prompt_is_refused(base, data, tmp_path, monkeypatch, capsys):
    words = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), "--model_max_length", "8"])
    with pytest.raises(UserError) as caught:
        train.train()
    assert str(caught.value) == (
        f"{data}: nothing to train on, none of 70 records is left; see the counts above, or raise --model_max_length"
    )
    names = "records.json[0], records.json[1], records.json[2], ..."
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4:] == [
        "data: 0 kept + 70 dropped = 70 read",
        f"data: dropped, the prompt fills the window of 8 tokens: 70 ({names})",
        "data: the end token is trained in 0 of 0 rows (0.0%)",
        "warning: models that seldom see the end token do not stop; raise --model_max_length",
    ]
    assert not (tmp_path / "out").exists()


def test_account_names_three_records_of_each_kind():
    kinds = ["unreadable", "prompt_fills_window", "truncated", "straddling", "empty_output", "special_tokens"]
    report = {key: [f"{key[0]}{i}" for i in range(count)] for count, key in enumerate(kinds, 1)}
    report |= {"read": 52002, "kept": 50000, "end_token_trained": 49500, "unused": {}, "kinds": {"alpaca": 52002}}
    assert train.account(report, 512) == [
        "data: 50,000 kept + 2,002 dropped = 52,002 read",
        "data: dropped, unreadable: 1 (u0)",
        "data: dropped, the prompt fills the window of 512 tokens: 2 (p0, p1)",
        "data: truncated at 512 tokens: 3 (t0, t1, t2)",
        "data: a token straddles the border of prompt and answer and is masked: 4 (s0, s1, s2, ...)",
        "data: empty output, only the end token is trained: 5 (e0, e1, e2, ...)",
        "warning: special tokens such as </s> stand in the text of records: 6 (s0, s1, s2, ...)",
        "data: the end token is trained in 49,500 of 50,000 rows (99.0%)",
    ]
    report |= dict.fromkeys(kinds, []) | {"kept": 52002, "end_token_trained": 51400}
    assert train.account(report, 512) == [
        "data: 52,002 kept + 0 dropped = 52,002 read",
        "data: the end token is trained in 51,400 of 52,002 rows (98.8%)",
        "warning: models that seldom see the end token do not stop; raise --model_max_length",
    ]


# --- Micro-batches ---------------------------------------------------------------------------------------------------


def row(ids, labels, **more):
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **more}


def lists(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


THREE, TWO, FILLER = row([4, 5, 6], [-100, 5, 6]), row([8, 7], [-100, 7]), row([2], [-100])
COLLATE = train.DataCollatorForSupervisedDataset


def ends(*borders, longest):
    """The part of a flat row that names its borders."""
    return {"cu_seq_lens_q": [*borders], "cu_seq_lens_k": [*borders], "max_length_q": longest, "max_length_k": longest}


def test_flatten_gives_the_example_of_its_docstring():
    assert lists(flatten([THREE, TWO])) == ends(0, 3, 5, longest=3) | {
        "input_ids": [[4, 5, 6, 8, 7]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "logits_to_keep": [0, 1, 3],
        "shift_labels": [[5, 6, 7]],
        "labels": [[5, 6, 7]],
    }


def test_flatten_never_predicts_the_first_token_of_the_next_example():
    assert lists(flatten([row([4, 5], [4, 5]), FILLER, row([6, 7], [6, 7])])) == ends(0, 2, 3, 5, longest=2) | {
        "input_ids": [[4, 5, 2, 6, 7]],
        "position_ids": [[0, 1, 0, 0, 1]],
        "logits_to_keep": [0, 3],
        "shift_labels": [[5, 7]],
        "labels": [[5, 7]],
    }


def test_flatten_without_a_target_stays_long():
    batch = flatten([FILLER, FILLER])
    assert lists(batch) == ends(0, 1, 2, longest=1) | {
        "input_ids": [[2, 2]],
        "position_ids": [[0, 0]],
        "logits_to_keep": [],
        "shift_labels": [[]],
        "labels": [[]],
    }
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    assert {name for name, tensor in tensors.items() if tensor.dtype != torch.int64} == set(engines.BORDERS[:2])
    assert batch["labels"].shape == (1, 0)


def test_the_padding_collator_pads_on_the_right_and_masks_by_length():
    """The padding id also stands inside a row."""
    tokenizer = SimpleNamespace(pad_token_id=6, eos_token_id=2)
    batch = COLLATE(tokenizer=tokenizer)([THREE, TWO, FILLER])
    assert lists(batch) == {
        "input_ids": [[4, 5, 6], [8, 7, 6], [2, 6, 6]],
        "labels": [[-100, 5, 6], [-100, 7, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("end", "pad"), [(2, 0), (0, 1)])
def test_without_a_padding_token_any_id_but_the_end_token_pads(end, pad):
    batch = COLLATE(SimpleNamespace(pad_token_id=None, eos_token_id=end))([THREE, TWO])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [8, 7, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_both_collators_tell_the_numbers_of_rows_that_have_one():
    right, instances = COLLATE(SimpleNamespace(pad_token_id=0)), [THREE | {"row": 9}, TWO | {"row": 4}]
    assert lists(flatten(instances)) == lists(flatten([THREE, TWO])) | {"rows": [9, 4]}
    assert lists(right(instances)) == lists(right([THREE, TWO])) | {"rows": [9, 4]}


@pytest.mark.parametrize(("count", "multiple", "filled"), [(5, 4, 3), (4, 4, 0), (1, 8, 7), (3, 1, 0)])
def test_rows_are_the_records_once_and_fillers_without_targets(count, multiple, filled, tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", make_records(count))
    dataset = SupervisedDataset(path, tokenizer)
    rows = dataset.rows(multiple)
    assert (len(dataset), len(rows)) == (count, count + filled)
    items = [{**lists(dataset[i]), "source": f"d.json[{i}]", "row": i} for i in range(count)]
    items += [{"input_ids": [2], "labels": [-100], "source": "", "row": i} for i in range(count, count + filled)]
    assert [{k: v.tolist() if torch.is_tensor(v) else v for k, v in row.items()} for row in rows] == items


def exact_loss(model, instances):
    """The mean over all targets, every example alone: no padding, no flattening. Returns (sum, number of targets)."""
    total, count = 0.0, 0
    for instance in instances:
        ids, labels = instance["input_ids"], instance["labels"]
        log_probabilities = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if labels[position] != IGNORE_INDEX:
                total = total - log_probabilities[position - 1, labels[position]]
                count += 1
    return total, count


@pytest.fixture
def model(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flat_and_padded_batches_have_the_loss_and_gradient_of_single_examples(attention, base, data, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    rows = SupervisedDataset(data, tokenizer).rows(8)
    instances = [
        {key: rows[i][key] for key in ("input_ids", "labels")} for i in (0, 71, 6, 13, 70, 68)
    ]  # 70, 71: fillers
    assert len({len(instance["input_ids"]) for instance in instances}) == 5
    flat = flatten(instances)
    padded = COLLATE(tokenizer)(instances)
    found = []
    for batch in (flat, padded):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), model.model.embed_tokens.weight.grad.clone()))
    model.zero_grad()
    total, count = exact_loss(model, instances)
    assert count == flat["labels"].numel() == int((padded["labels"][:, 1:] != IGNORE_INDEX).sum())
    (total / count).backward()
    gradient = model.model.embed_tokens.weight.grad
    for loss, found_gradient in found:
        assert loss == pytest.approx((total / count).item(), abs=1e-5)
        assert torch.allclose(found_gradient, gradient, atol=1e-5)
        assert gradient.abs().max() > 1e-3
    # What the Trainer passes on: the targets of the whole step, over all micro-batches.
    split = model(**flat, use_cache=False, num_items_in_batch=torch.tensor(1000)).loss.item()
    assert split == pytest.approx(total.item() / 1000, abs=1e-5)


def test_a_micro_batch_of_fillers_alone_adds_nothing(model):
    loss = model(**flatten([FILLER, FILLER]), use_cache=False, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# --- What --dry_run prints -------------------------------------------------------------------------------------------


def test_examples_are_shown_with_what_is_trained_marked(base, tokenizer, tmp_path):
    records = [
        {"instruction": "Add.", "input": "1, 2", "output": "3\n"},
        {"instruction": "Say it.", "output": "  你 🦙"},
        {"instruction": "Stop.", "output": ""},
    ]
    dataset = SupervisedDataset(write_records(tmp_path / "d.json", records), tokenizer)
    prompts = ["<s> " + render_prompt(record) for record in records]
    titles = []
    for i, record in enumerate(records):
        head, ids = sentencepiece_row(base / "tokenizer.model", render_prompt(record), record["output"])
        titles.append(f"--- d.json[{i}]: {len(ids)} tokens, {len(ids) - len(head)} trained\n")
    assert titles[2].endswith(", 1 trained\n")

    def shown(dataset, count, colour):  # without the summary
        return (
            train.dry_run(dataset, tokenizer, arguments(), count, colour).partition("lengths in tokens")[0].rstrip("\n")
        )

    assert shown(dataset, 2, False) == (
        f"{titles[0]}{prompts[0]}>>>3\n</s><<<\n{titles[1]}{prompts[1]}>>>  你 🦙</s><<<"
    )
    green = "\x1b[32m{}\x1b[0m"
    assert shown(dataset, 9, True) == (
        f"{titles[0]}{prompts[0]}{green.format('3' + chr(10) + '</s>')}\n"
        f"{titles[1]}{prompts[1]}{green.format('  你 🦙</s>')}\n"
        f"{titles[2]}{prompts[2]}{green.format('</s>')}"
    )
    assert shown(dataset, 0, False) == ""


def arguments(micro_batch=1, accumulation=1, processes=1, epochs=1, max_steps=-1):
    return SimpleNamespace(
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        world_size=processes,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )


class Rows:
    """Rows of given lengths, each with two targets."""

    def __init__(self, lengths):
        self.input_ids, self.sources = (
            [torch.zeros(length, dtype=torch.long) for length in lengths],
            [""] * len(lengths),
        )
        self.labels = [torch.tensor([-100] * (length - 2) + [1, 2]) for length in lengths]

    def __len__(self):
        return len(self.input_ids)


def test_the_summary_gives_lengths_tokens_and_steps():
    rows = Rows([110, 10, 20, 90, 100, 30, 40, 50, 60, 70, 80])
    assert train.dry_run(rows, None, arguments(2, 2, 1, epochs=3), 0, False) == (
        "lengths in tokens: median 60, 90 % 100, 99 % 110, longest 110\n"
        "tokens per epoch: 660, of which trained 22 (3.3%)\n"
        "steps: 9 of 4 examples (3 epochs)"
    )
    assert train.dry_run(Rows([1234]), None, arguments(epochs=0.5), 0, False) == (
        "lengths in tokens: median 1234, 90 % 1234, 99 % 1234, longest 1234\n"
        "tokens per epoch: 1,234, of which trained 2 (0.2%)\n"
        "steps: 1 of 1 examples (0.5 epochs)"
    )


@pytest.mark.parametrize(
    ("num_examples", "args", "batch", "steps"),
    [
        (70, arguments(8), 8, 9),
        (70, arguments(2, 2, 2, epochs=3), 8, 27),  # a last, incomplete batch in each epoch
        (72, arguments(4, 1, 2), 8, 9),
        (70, arguments(8, epochs=0.5), 8, 5),
        (70, arguments(8, epochs=3, max_steps=4), 8, 4),
        (3, arguments(4, 4, 8), 128, 1),
        (52002, arguments(4, 8, 4, epochs=3), 128, 1221),
    ],
)
def test_steps_are_counted_over_the_global_batch(num_examples, args, batch, steps):
    assert (engines.global_batch(args), engines.num_steps(num_examples, args)) == (batch, steps)


# --- The public names of 2023, as a fork uses them -------------------------------------------------------------------


def test_importing_prints_and_changes_nothing_and_loads_neither_openai_nor_deepspeed():
    code = (
        "import os, sys; before = dict(os.environ); import train, utils; assert dict(os.environ) == before; "
        "print([m for m in ('openai', 'deepspeed', 'fire') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_importing_utils_loads_no_heavy_library():
    code = "import sys, utils; print(sorted({'torch', 'transformers', 'sentencepiece', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_constants_and_defaults_are_those_of_2023(tmp_path):
    from train import DEFAULT_BOS_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_PAD_TOKEN, DEFAULT_UNK_TOKEN, PROMPT_DICT

    assert IGNORE_INDEX == -100
    tokens = (DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN)
    assert tokens == ("[PAD]", "</s>", "<s>", "<unk>")
    assert PROMPT_DICT["prompt_no_input"].format(instruction="Go.") == prompt_of("Go.")
    assert train.ModelArguments().model_name_or_path == "facebook/opt-125m"
    assert train.DataArguments().data_path is None
    args = train.TrainingArguments(output_dir=str(tmp_path))
    assert isinstance(args, transformers.TrainingArguments)
    assert (args.model_max_length, args.cache_dir) == (512, None)


def test_the_data_module_of_no_data_is_refused(tokenizer):
    with pytest.raises(UserError) as caught:
        train.make_supervised_data_module(tokenizer=tokenizer, data_args=train.DataArguments())
    assert str(caught.value) == "--data_path is missing: name one or more files of records"


def test_the_data_module_counts_bad_records_when_told_to(tokenizer, tmp_path):
    path = write_records(tmp_path / "d.json", plain(["x", 1]))
    data_args = train.DataArguments(data_path=str(path), skip_bad_records=True)
    module = train.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
    assert (len(module["train_dataset"]), module["eval_dataset"]) == (1, None)
    assert module["data_collator"] == train.DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    theirs = SimpleNamespace(data_path=str(path))  # a fork's own arguments, without our option
    with pytest.raises(UserError):
        train.make_supervised_data_module(tokenizer=tokenizer, data_args=theirs)


def random_llama(vocab_size, tied):
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("vocab_size", "after"), [(1000, 1002), (1024, 1024), (1001, 1002)])
def test_new_tokens_get_the_mean_of_the_old_rows(vocab_size, after, tied, tokenizer):
    """1024: a model with spare rows keeps them; 1001: one token takes the spare row, the other a new one."""
    model, tokenizer = random_llama(vocab_size, tied), copy.deepcopy(tokenizer)
    before = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
    assert torch.equal(*before) == tied
    special = {"pad_token": "[PAD]", "additional_special_tokens": ["<|end|>"]}
    train.smart_tokenizer_and_embedding_resize(special_tokens_dict=special, tokenizer=tokenizer, model=model)
    assert (tokenizer.pad_token_id, len(tokenizer), tokenizer("<|end|>").input_ids) == (1000, 1002, [1, 1001])
    assert model.config.vocab_size == after
    for old, module in zip(before, (model.model.embed_tokens, model.lm_head), strict=True):
        assert module.weight.shape == (after, 16)
        assert torch.equal(module.weight[:1000], old[:1000])
        assert torch.equal(module.weight[1002:], old[1002:])
        mean = torch.stack([old[:1000, column].double().sum() / 1000 for column in range(16)])
        for new in (1000, 1001):
            assert torch.allclose(module.weight[new].double(), mean, atol=1e-7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.requires_grad
    assert model(torch.tensor([[1, 1000]])).logits.shape == (1, 2, after)


def test_a_token_that_exists_already_changes_nothing(tokenizer):
    model, tokenizer = random_llama(1000, False), copy.deepcopy(tokenizer)
    before = model.lm_head.weight.detach().clone()
    train.smart_tokenizer_and_embedding_resize({"pad_token": "<unk>"}, tokenizer, model)
    assert torch.equal(model.lm_head.weight, before)
    assert (len(tokenizer), tokenizer.pad_token_id) == (1000, 0)


def test_a_fork_trains_with_the_stock_trainer_and_saves(base, tokenizer, model, tmp_path, capsys):
    from train import (
        DataArguments,
        TrainingArguments,
        make_supervised_data_module,
        safe_save_model_for_hf_trainer,
    )

    assert callable(train.train)
    path = write_records(tmp_path / "d.json", make_records(8))
    data_module = make_supervised_data_module(tokenizer=tokenizer, data_args=DataArguments(data_path=str(path)))
    output_dir = str(tmp_path / "out")
    training_args = TrainingArguments(
        output_dir=output_dir,
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
    )
    rows = [data_module["train_dataset"][i] for i in range(8)]
    with torch.no_grad():
        total, count = exact_loss(model, rows)
    trainer = transformers.Trainer(model=model, processing_class=tokenizer, args=training_args, **data_module)
    trainer.train()
    trainer.save_state()
    safe_save_model_for_hf_trainer(trainer=trainer, output_dir=output_dir)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[0] == pytest.approx((total / count).item(), abs=1e-4)
    assert losses[0] > losses[1] > losses[2]
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == MODEL_FILES | {"trainer_state.json"}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == torch.float32
    trained, original = trainer.model.state_dict(), transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name])
        assert not torch.equal(tensor, original[name])
    text = prompt_of("Go.")
    assert transformers.AutoTokenizer.from_pretrained(output_dir)(text).input_ids == tokenizer(text).input_ids
