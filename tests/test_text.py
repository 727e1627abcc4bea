"""Plain text: every token but a text's first is a target once, texts do not see each other, and the file is made once."""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import basic_options, train

import engines
import train as trainer
import utils
from utils import UserError

TEXTS = ["One river runs to the sea.", "Two.", "你好，世界。" * 9, "A longer text, " * 30, "é"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cria" / "tokens"


def write(path, texts=TEXTS):
    """The texts as a file of the kind that its name says."""
    lines = [json.dumps({"text": text}) for text in texts]
    data = {
        ".jsonl": "\n".join(lines),
        ".json": f"[{','.join(lines)}]",
        ".txt": "\n\n\n".join(texts) + "\n",
        ".lines": "\n".join(texts),
    }["".join(path.suffixes[:1])]
    path = path.with_suffix(".txt") if path.suffix == ".lines" else path
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt", "d.lines", "d.txt.gz", "d.jsonl.gz"])
def test_texts_are_read_from_every_kind_of_file(name, tmp_path):
    path, problems = write(tmp_path / name), []
    assert utils.is_text(path)
    assert [text for _, text in utils.texts_of(path, problems)] == TEXTS and problems == []
    assert utils.is_text(tmp_path) and [text for _, text in utils.texts_of(tmp_path, problems)] == TEXTS


def test_in_a_text_file_empty_lines_part_texts(tmp_path):
    (tmp_path / "d.txt").write_text("\ufeffa\nb\n \n\n\nc\n", encoding="utf-8")
    assert list(utils.texts_of(tmp_path / "d.txt", [])) == [("d.txt:1", "a\nb"), ("d.txt:6", "c")]
    (tmp_path / "d.txt").write_text("a\r\nb\n", encoding="utf-8")
    assert list(utils.texts_of(tmp_path / "d.txt", [])) == [("d.txt:1", "a"), ("d.txt:2", "b")]


def test_a_wrong_byte_is_named_with_its_offset(tmp_path):
    (tmp_path / "d.txt").write_bytes("é\n".encode() * 3 + b"ab\xff\n")
    with pytest.raises(UserError, match="d.txt:4: byte 0xff at offset 11 is not UTF-8"):
        list(utils.texts_of(tmp_path / "d.txt", []))


def test_what_is_no_text_among_texts_is_named(tmp_path, cache, tokenizer):
    rows = [{"text": "a"}, {"instruction": "i", "output": "o"}, {"text": ""}, {"text": "b"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(
        UserError, match="2 of 4 records are no texts: d.jsonl:2: an instruction.*d.jsonl:3: text is empty"
    ):
        trainer.TextDataset([tmp_path / "d.jsonl"], tokenizer, 1000)
    assert not list(cache.iterdir())
    dataset = trainer.TextDataset([tmp_path / "d.jsonl"], tokenizer, 1000, skip_bad_records=True)
    assert dataset.report["read"] == 4 and dataset.report["kept"] == 2 and len(dataset.report["unreadable"]) == 2


@pytest.mark.parametrize("window", [2, 3, 7, 16, 64, 1000])
def test_every_token_but_the_first_of_a_text_is_a_target_once(window, tmp_path, cache, base):
    tokenizer = utils.load_tokenizer(base, window)
    dataset = trainer.TextDataset([write(tmp_path / "d.jsonl")], tokenizer, 1000)
    wanted = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in TEXTS]
    found, alone = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        assert len(item["input_ids"]) == sum(item["lengths"]) <= window
        start = 0
        for length in item["lengths"]:
            ids, labels = (item[key][start : start + length].tolist() for key in ("input_ids", "labels"))
            assert labels[0] == trainer.IGNORE_INDEX and labels[1:] == ids[1:]
            found += ids[1:]
            start += length
            alone += [ids]
    assert found == [token for ids in wanted for token in ids[1:]]
    assert dataset.report["targets"] == len(found) and dataset.report["tokens"] == sum(map(len, wanted))
    if window == 1000:
        assert alone == wanted and len(dataset) == 1
    assert dataset.source(0) == "d.jsonl, text 1"


def test_rows_of_texts_are_flat_and_padded_the_same(tmp_path, cache, base):
    tokenizer = utils.load_tokenizer(base, 40)
    rows = trainer.TextDataset([write(tmp_path / "d.jsonl")], tokenizer, 1000).rows(4)
    assert len(rows) % 4 == 0 and rows[len(rows) - 1]["row"] == len(rows) - 1
    with pytest.raises(IndexError):
        rows[len(rows)]
    config = trainer.new_config("tiny", tokenizer, 40)
    torch.manual_seed(0)
    model = trainer.transformers.LlamaForCausalLM(config)
    instances = [rows[i] for i in range(len(rows))]
    flat, padded = trainer.flatten(instances), trainer.DataCollatorForSupervisedDataset(tokenizer)(instances)
    engines.register_attention()
    model.set_attn_implementation(engines.BY_EXAMPLE)
    one = model(**flat, use_cache=False).loss
    model.set_attn_implementation("sdpa")
    two = model(**padded, use_cache=False).loss
    assert torch.allclose(one, two, atol=1e-5)
    assert flat["shift_labels"].numel() == (padded["labels"] != -100).sum()


def test_the_token_file_is_made_once_and_again_for_another_text_or_tokenizer(tmp_path, cache, tokenizer):
    path = write(tmp_path / "d.txt")
    trainer.TextDataset([path], tokenizer, 1000)
    (folder,) = cache.iterdir()
    before = (folder / trainer.TOKENS).stat()
    trainer.TextDataset([path], tokenizer, 1000)
    assert (folder / trainer.TOKENS).stat() == before and np.fromfile(folder / trainer.TOKENS, np.uint16).max() < 1000
    write(path, [*TEXTS, "more"])
    trainer.TextDataset([path], tokenizer, 1000)
    trainer.TextDataset([path], tokenizer, 70_000)
    assert len(list(cache.iterdir())) == 3
    index = np.load(folder / "ends.npy")
    np.save(folder / "ends.npy", index[:-1])
    write(path)
    with pytest.raises(UserError, match="tokens, where its index has .*; remove the folder"):
        trainer.TextDataset([path], tokenizer, 1000)


def test_a_token_file_made_elsewhere_is_read_as_it_is(tmp_path, tokenizer):
    ids = [5, 6, 7, 2, 8, 2, 9, 10]
    np.array(ids, np.uint16).tofile(tmp_path / "x.bin")
    dataset = trainer.TextDataset([tmp_path / "x.bin"], tokenizer, 1000)
    assert dataset[0]["input_ids"].tolist() == ids and dataset[0]["lengths"] == [4, 2, 2]
    assert dataset[0]["labels"].tolist() == [-100, 6, 7, 2, -100, 2, -100, 10]
    for size, said in ((10, "id 10, where the model's vocabulary has 10"),):
        with pytest.raises(UserError, match=said):
            trainer.TextDataset([tmp_path / "x.bin"], tokenizer, size)
    np.array([5, 6], np.uint16).tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match="the end id 2 of the tokenizer does not occur"):
        trainer.TextDataset([tmp_path / "x.bin"], tokenizer, 1000)
    (tmp_path / "x.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="3 bytes are no whole number of uint16 ids"):
        trainer.TextDataset([tmp_path / "x.bin"], tokenizer, 1000)


def test_texts_among_other_records_lose_nothing_either(tmp_path, base):
    tokenizer = utils.load_tokenizer(base, 30)
    rows = [{"instruction": "i", "output": "o"}, {"text": TEXTS[3]}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = trainer.SupervisedDataset(tmp_path / "d.json", utils.load_tokenizer(base, 200))
    whole = dataset.input_ids[1].tolist()
    dataset = trainer.SupervisedDataset(tmp_path / "d.json", tokenizer, skip_bad_records=True)
    parts = [ids.tolist() for ids, name in zip(dataset.input_ids, dataset.sources, strict=True) if name == "d.json[1]"]
    assert parts[0] + [token for part in parts[1:] for token in part[1:]] == whole and len(parts) > 3
    assert all(one[-1] == two[0] for one, two in zip(parts, parts[1:]))


@pytest.mark.slow
def test_a_model_from_nothing_learns_texts_and_resumes_to_the_bit(base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write(tmp_path / "d.txt", [f"{text} {i}" for i in range(12) for text in TEXTS])
    options = ["--config_name", "tiny", "--tokenizer_name", base, "--data_path", data, "--model_max_length", "32"]
    options += [
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "1e-2",
        "--max_steps",
        "12",
        "--val_set_size",
        "4",
    ]
    options += ["--save_steps", "6"]
    whole = train([*options, "--output_dir", tmp_path / "whole"]).finished()
    losses = whole.column("loss")
    assert losses[12] < losses[1] - 1 and abs(losses[1] - np.log(1024)) < 0.3
    assert not (whole.folder / trainer.START).exists() and whole.info()["counts"]["rows"] > 40
    assert utils.load_config(whole.folder).vocab_size == 1024
    two = train([*options, "--output_dir", tmp_path / "two", "--max_steps", "12"], processes=1)
    for name in ("checkpoint-12", "model.safetensors", "config.json"):
        target = two.folder / name
        trainer.shutil.rmtree(target) if target.is_dir() else target.unlink()
    (two.folder / "run.json").write_text(
        (two.folder / "run.json").read_text().replace('"status": "finished"', '"status": "started"')
    )
    again = train([*options, "--output_dir", tmp_path / "two"]).finished()
    assert again.column("loss") == losses
    assert all(torch.equal(again.weights()[name], tensor) for name, tensor in whole.weights().items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config_name", "huge", "--tokenizer_name", "{base}"], "--config_name huge: no such file, and none of tiny"),
        (["--config_name", "tiny"], "--config_name: give --tokenizer_name FOLDER too"),
        (["--tokenizer_name", "{base}", "--model_name_or_path", "{base}"], "--tokenizer_name: a model brings its own"),
        (["--config_name", "tiny", "--tokenizer_name", "{base}", "--lora_r", "4"], "--config_name: random weights"),
        (
            ["--config_name", "{base}/small.json", "--tokenizer_name", "{base}"],
            "vocab_size 100, where the tokenizer has 1000",
        ),
    ],
)
def test_what_no_model_can_start_from_is_refused(words, said, base, tmp_path, monkeypatch, capsys):
    config = utils.read_json(base / "config.json") | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(config))
    words = [word.format(base=base) if "small" not in word else str(tmp_path / "small.json") for word in words]
    words += ["--data_path", str(write(tmp_path / "d.txt")), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    monkeypatch.setattr(trainer.sys, "argv", ["train.py", *words])
    with pytest.raises(UserError, match=said):
        trainer.train()


@pytest.mark.slow
def test_modules_that_alone_are_trained(base, tmp_path, data):
    options = basic_options(base, data, tmp_path / "out", max_steps=2, trained_modules="embed_tokens,lm_head")
    run = train(options).finished()
    assert "trained: embed_tokens, lm_head" in run.err and "128,000 trained" in run.err
    before, after = utils.load_weights(base, utils.load_config(base), torch.float32).state_dict(), run.weights()
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    config = engines.skeleton(utils.load_config(base))
    args = trainer.TrainingArguments(output_dir="none", trained_modules=["nothing"], use_cpu=True)
    with pytest.raises(UserError, match="--trained_modules nothing: no module"):
        trainer.choose_trained(config, args)
