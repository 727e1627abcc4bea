"""Tokenizers: the ids are those of SentencePiece, whatever files lie beside its model."""

import copy
import io
import json
import random
import shutil
import sys

import pytest
import transformers
from make_tiny_llama import CORPUS

import utils
from utils import UserError

END = "tokenizer: padding token was missing; now <unk>\n"  # LLaMA has no padding token


def train_model(path, **changes):
    """A SentencePiece model of the tiny corpus at `path`, of LLaMA's kind but for `changes`; returns the path."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 700,
        "character_coverage": 0.998,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    lines = [line for line in CORPUS.read_text(encoding="utf-8").split("\n") if line.strip()]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **(options | changes))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(written.getvalue())
    return path


def sentencepiece_ids(model_path, texts, bos=False, eos=False):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model_path))
    head, tail = [processor.bos_id()] * bos, [processor.eos_id()] * eos
    return [head + ids + tail for ids in processor.encode(texts)]


def random_strings(count):
    """Strings of words, runs of blanks and characters from all over Unicode; the same every time."""
    draw = random.Random(0)
    words = CORPUS.read_text(encoding="utf-8").split()
    parts = [
        lambda: draw.choice(words),
        lambda: " " * draw.choice([1, 1, 1, 2, 3, 4, 8, 17]),
        lambda: draw.choice(["\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u2028", "▁", "▁▁", "\u200b", "\ufeff"]),
        lambda: "".join(draw.choice("abcXYZ019.,:;!?()[]{}<>/\\'\"#*_-=+|~`^&%$@") for _ in range(draw.randint(1, 9))),
        lambda: chr(
            draw.choice([draw.randint(0x00, 0xFF), draw.randint(0x100, 0xD7FF), draw.randint(0xE000, 0x1FFFF)])
        ),
        lambda: chr(draw.randint(0x4E00, 0x9FFF)) + chr(draw.randint(0x0300, 0x036F)),
    ]
    return ["".join(draw.choice(parts)() for _ in range(draw.randint(1, 30))) for _ in range(count)]


TEXTS = utils.NASTY_STRINGS + random_strings(400)


# --- tokenizer_from_sentencepiece ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (False, True), (True, True)])
def test_the_ids_are_sentencepieces_also_after_saving_and_loading(bos, eos, base, tmp_path):
    from transformers import AutoTokenizer

    model = base / "tokenizer.model"
    built = utils.tokenizer_from_sentencepiece(model, add_bos_token=bos, add_eos_token=eos)
    built.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    expected = sentencepiece_ids(model, TEXTS, bos, eos)
    for tokenizer in (built, loaded):
        assert tokenizer(TEXTS).input_ids == expected
        assert [tokenizer(text).input_ids for text in TEXTS[:50]] == expected[:50]  # one by one
        assert tokenizer(TEXTS, add_special_tokens=False).input_ids == sentencepiece_ids(model, TEXTS)
        assert tokenizer.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        assert tokenizer.all_special_ids == [1, 2, 0]
        assert len(tokenizer) == 1000


def test_pieces_are_merged_by_score_where_their_ids_have_another_order(base, tmp_path):
    """As LLaMA's runs of spaces, whose ids and scores disagree."""
    proto = utils.sentencepiece_proto(base / "tokenizer.model")
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL]
    pieces = [(proto.pieces[i].piece, proto.pieces[i].score) for i in normal]
    random.Random(0).shuffle(pieces)
    for i, (piece, score) in zip(normal, pieces, strict=True):
        proto.pieces[i].piece, proto.pieces[i].score = piece, score
    model = tmp_path / "tokenizer.model"
    model.write_bytes(proto.SerializeToString())
    expected = sentencepiece_ids(model, TEXTS, bos=True)
    assert expected != sentencepiece_ids(base / "tokenizer.model", TEXTS, bos=True)
    assert utils.tokenizer_from_sentencepiece(model)(TEXTS).input_ids == expected


def test_a_pair_of_texts_gets_the_tokens_of_each(base):
    built = utils.tokenizer_from_sentencepiece(base / "tokenizer.model", add_eos_token=True)
    (a,), (b,) = (
        sentencepiece_ids(base / "tokenizer.model", ["one"]),
        sentencepiece_ids(base / "tokenizer.model", ["two"]),
    )
    assert built("one", "two").input_ids == [1, *a, 2, 1, *b, 2]


def test_decoding_gives_the_text_back(base):
    built = utils.tokenizer_from_sentencepiece(base / "tokenizer.model")
    texts = [text for text in TEXTS if "▁" not in text]  # the word mark itself reads as a space, also in SentencePiece
    assert len(texts) > 250
    assert built.batch_decode(built(texts).input_ids, skip_special_tokens=True) == texts


def test_the_end_token_in_a_text_is_one_id(base):
    built = utils.tokenizer_from_sentencepiece(base / "tokenizer.model")
    ids = built("stop</s>").input_ids
    assert ids == [1, *sentencepiece_ids(base / "tokenizer.model", ["stop"])[0], 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"control_symbols": ["<ctl>"]},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "##"]},
    ],
    ids=["no-dummy-prefix", "no-byte-fallback", "control-symbol", "user-defined-without-prefix"],
)
def test_other_bpe_models_are_read_rightly_too(changes, tmp_path):
    model = train_model(tmp_path / "tokenizer.model", **changes)
    texts = [*TEXTS, "a<sep> b ##c", "<sep><sep>", " ### x"]
    if "control_symbols" in changes:
        texts.remove("a<sep> b ##c"), texts.remove("<sep><sep>")
    built = utils.tokenizer_from_sentencepiece(model)
    expected = sentencepiece_ids(model, texts, bos=True)
    found = built(texts).input_ids
    assert [text for text, a, b in zip(texts, expected, found, strict=True) if a != b] == []


@pytest.mark.parametrize(
    ("changes", "bos", "eos", "unk"),
    [({"bos_id": -1}, None, 2, 0), ({"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2}, 0, 1, 3)],
    ids=["no-begin-token", "other-ids"],
)
def test_the_special_tokens_are_those_of_the_model(changes, bos, eos, unk, tmp_path):
    model = train_model(tmp_path / "tokenizer.model", **changes)
    built = utils.tokenizer_from_sentencepiece(model, add_eos_token=True)
    assert (built.bos_token_id, built.eos_token_id, built.unk_token_id) == (bos, eos, unk)
    head = [] if bos is None else [bos]
    assert built("one").input_ids == [*head, *sentencepiece_ids(model, ["one"])[0], eos]


def test_keywords_go_to_the_tokenizer(base):
    built = utils.tokenizer_from_sentencepiece(base / "tokenizer.model", model_max_length=5, pad_token="<unk>")
    assert (built.model_max_length, built.pad_token_id) == (5, 0)
    assert len(built("one two three four", truncation=True).input_ids) == 5


def test_a_unigram_model_is_refused(tmp_path):
    model = train_model(tmp_path / "tokenizer.model", model_type="unigram")
    with pytest.raises(UserError) as caught:
        utils.tokenizer_from_sentencepiece(model)
    assert str(caught.value) == (f"{model}: not a BPE model, cannot be rebuilt; put a right tokenizer.json beside it")


# --- load_tokenizer --------------------------------------------------------------------------------------------------


def make_folder(base, folder, *names):
    """A model folder with only some of the files of `base`."""
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(base / name, folder)
    return folder


def edit_json(path, edit):
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def check_llama(tokenizer, base):
    """It reads as the SentencePiece model does, begins with <s>, pads with <unk> on the right, at 512 tokens."""
    assert tokenizer(TEXTS, truncation=False).input_ids == sentencepiece_ids(base / "tokenizer.model", TEXTS, bos=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    assert tokenizer.special_tokens_map == special
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 512)


CONFIG, JSON, MODEL = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"


def test_a_right_folder_loads_without_a_word_but_for_padding(base, tmp_path, capsys):
    for name in ([CONFIG, JSON, MODEL], [CONFIG, JSON]):
        check_llama(utils.load_tokenizer(make_folder(base, tmp_path / str(len(name)), *name), 512), base)
        assert capsys.readouterr().err == END


@pytest.mark.parametrize("names", [(MODEL,), (MODEL, "config.json"), (MODEL, "config.json", CONFIG)])
def test_a_folder_without_tokenizer_json_is_built_from_the_sentencepiece_model(names, base, tmp_path, capsys):
    check_llama(utils.load_tokenizer(make_folder(base, tmp_path, *names), 512), base)
    line = "tokenizer: it has no tokenizer.json; built from tokenizer.model, ids checked against it\n"
    assert capsys.readouterr().err == line + END


def test_the_early_llama_layout_is_built_from_the_sentencepiece_model(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, MODEL, "config.json")
    config = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    config["model_max_length"] = 1000000000000000019884624838656
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text("{}")
    check_llama(utils.load_tokenizer(folder, 512), base)
    line = "tokenizer: it has no tokenizer.json; built from tokenizer.model, ids checked against it\n"
    assert capsys.readouterr().err == line + END


def test_the_begin_and_end_switches_of_the_folder_are_honoured(base, tmp_path):
    folder = make_folder(base, tmp_path, MODEL, "config.json")
    (folder / CONFIG).write_text('{"add_bos_token": false, "add_eos_token": true, "tokenizer_class": "LlamaTokenizer"}')
    tokenizer = utils.load_tokenizer(folder, 512)
    assert tokenizer("one").input_ids == sentencepiece_ids(base / MODEL, ["one"], eos=True)[0]


def test_merges_in_another_order_are_noticed(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    edit_json(folder / JSON, lambda value: value["model"]["merges"].reverse())
    check_llama(utils.load_tokenizer(folder, 512), base)
    assert capsys.readouterr().err == (
        "tokenizer: its tokenizer.json reads 'Hello world' otherwise than its tokenizer.model; "
        "built from tokenizer.model, ids checked against it\n" + END
    )


def test_a_missing_word_mark_is_noticed(base, tmp_path, capsys):
    """As in conversions that put no space before the first word."""
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    edit_json(folder / JSON, lambda value: value["normalizer"]["normalizers"].pop(0))
    check_llama(utils.load_tokenizer(folder, 512), base)
    assert "tokenizer.json reads 'Hello world' otherwise" in capsys.readouterr().err


def test_a_wrong_order_of_the_runs_of_spaces_alone_is_noticed(base, tmp_path, capsys):
    """As in transformers' own conversion, which merges by id: runs of spaces then join in another order."""
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)

    def spaces_first(value):
        value["model"]["merges"].sort(key=lambda pair: set("".join(pair)) != {"▁"})

    edit_json(folder / JSON, spaces_first)
    check_llama(utils.load_tokenizer(folder, 512), base)
    line = capsys.readouterr().err.split("\n")[0]
    assert line.startswith("tokenizer: its tokenizer.json reads ") and line.endswith("ids checked against it")


def test_an_empty_end_token_is_noticed(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    edit_json(folder / CONFIG, lambda value: value.pop("eos_token"))
    check_llama(utils.load_tokenizer(folder, 512), base)
    line = "tokenizer: its end token is empty; built from tokenizer.model, ids checked against it\n"
    assert capsys.readouterr().err == line + END


def test_a_damaged_tokenizer_json_is_noticed(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    (folder / JSON).write_text((folder / JSON).read_text(encoding="utf-8")[:1000], encoding="utf-8")
    check_llama(utils.load_tokenizer(folder, 512), base)
    first, *rest = capsys.readouterr().err.splitlines(keepends=True)
    assert first.startswith("tokenizer: its tokenizer files cannot be read (")
    assert first.endswith("); built from tokenizer.model, ids checked against it\n")
    assert rest == [END]


def test_user_defined_symbols_are_read_by_sentencepiece_itself(tmp_path, capsys):
    """A symbol in the middle of a text, where SentencePiece puts no word mark behind it."""
    model = train_model(tmp_path / "models" / MODEL, user_defined_symbols=["<sep>"])
    tokenizer = utils.load_tokenizer(model.parent, 512)
    texts = [*TEXTS, "a<sep> b<sep>c", "<sep>"]
    assert tokenizer(texts, verbose=False).input_ids == sentencepiece_ids(model, texts, bos=True)
    assert "'a<sep> b<sep>c'" in capsys.readouterr().err


def merge(base, path, *pieces):
    """The tiny model with more pieces, all of score 0, as scripts that merge two models write them; returns `path`."""
    proto = utils.sentencepiece_proto(base / MODEL)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


# Pieces that overlap and are added in the order in which ranked merges take the right one first.
PIECES = "一个人都在 人都 个人 一个 ▁一个 ▁一 都在 在家 一起 家里 里面 a个 个b".split()
CHINESE = ["一个人", "他一个人都在家里面。", "一个人都在", "一起在家 一个", "a个b", "</s>一个人"]


def random_chinese(count):
    draw = random.Random(2)
    return ["".join(draw.choice("一个人都在家里面起他。 ab") for _ in range(draw.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("names", [(), (JSON, CONFIG)], ids=["model-alone", "with-ranked-merges"])
def test_pieces_of_equal_score_are_read_by_sentencepiece_itself(names, base, tmp_path, capsys):
    model = merge(base, tmp_path / "merged" / MODEL, *PIECES)
    ranked = utils.tokenizer_from_sentencepiece(model)
    ranked.save_pretrained(tmp_path / "ranked")
    for name in names:
        shutil.copy(tmp_path / "ranked" / name, model.parent)
    tokenizer = utils.load_tokenizer(model.parent, 512)
    texts = [*CHINESE[:-1], *random_chinese(300), *TEXTS]
    expected = sentencepiece_ids(model, texts, bos=True)
    assert [ranked(text).input_ids for text in texts] != expected
    assert tokenizer(texts, verbose=False).input_ids == expected
    assert tokenizer.convert_ids_to_tokens(tokenizer("一个人").input_ids)[1:] == ["▁一个", "人"]
    assert tokenizer("</s>一个人").input_ids == [1, 2, *sentencepiece_ids(model, ["一个人"])[0]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (tokenizer.padding_side, tokenizer.model_max_length, len(tokenizer)) == ("right", 512, 1000 + len(PIECES))
    assert [tokenizer.decode(ids) for ids in expected] == [ranked.decode(ids) for ids in expected]
    err = capsys.readouterr().err
    assert "SentencePiece itself" in err and "ids checked" not in err


def test_training_and_chat_run_on_sentencepiece_itself(base, tmp_path):
    import chat
    import train

    model = merge(base, tmp_path / "merged" / MODEL, *PIECES)
    tokenizer, outputs = utils.load_tokenizer(model.parent, 512), [text.strip() for text in random_chinese(50)]
    data = tmp_path / "d.json"
    data.write_text(json.dumps([{"instruction": "一个人", "output": output} for output in outputs]))
    dataset = train.SupervisedDataset(data, tokenizer, sentencepiece_path=model)
    prompt = utils.PROMPT_DICT["prompt_no_input"].format(instruction="一个人")
    head, *rows = sentencepiece_ids(model, [prompt, *(prompt + output for output in outputs)], bos=True)
    assert [ids.tolist() for ids in dataset.input_ids] == [[*row, 2] for row in rows]
    assert [row.tolist() for row in dataset.labels] == [[-100] * len(head) + [*row[len(head) :], 2] for row in rows]
    to_bytes = chat.make_to_bytes(tokenizer)
    (answer,) = sentencepiece_ids(model, ["一个人🦙\n好"])
    assert b"".join(map(to_bytes, [*answer, 2])).decode() == " 一个人🦙\n好"


def test_what_sentencepiece_reads_is_saved_so_that_it_loads_again(base, tmp_path):
    from transformers import AutoTokenizer

    model = merge(base, tmp_path / "merged" / MODEL, *PIECES)
    utils.load_tokenizer(model.parent, 512).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / MODEL).read_bytes() == model.read_bytes()
    texts = [*CHINESE[:-1], *random_chinese(100)]
    for loaded in (utils.load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert loaded(texts).input_ids == sentencepiece_ids(model, texts, bos=True)


@pytest.mark.parametrize("pieces", [(), PIECES], ids=["built", "itself"])
@pytest.mark.parametrize("place", ["added_tokens.json", CONFIG])
def test_tokens_that_were_added_to_the_model_keep_their_ids(place, pieces, base, tmp_path):
    """As in ChatML fine-tunes of 2023, whose end token is none of SentencePiece's."""
    model, size = merge(base, tmp_path / "merged" / MODEL, *pieces), 1000 + len(pieces)
    names = {"<|im_end|>": size, "<|im_start|>": size + 1, "[PAD]": size + 2}
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]"}, "chat_template": "{{ messages }}"}
    if place == CONFIG:
        config["added_tokens_decoder"] = {str(i): {"content": token} for token, i in {"<unk>": 0, **names}.items()}
    else:
        (model.parent / place).write_text(json.dumps(dict(reversed(names.items()))))
    (model.parent / CONFIG).write_text(json.dumps(config))
    tokenizer = utils.load_tokenizer(model.parent, 512)
    (one,) = sentencepiece_ids(model, ["一个人"])
    assert tokenizer("<|im_start|>一个人<|im_end|>").input_ids == [1, size + 1, *one, size]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (size, size + 2, 1)
    assert (len(tokenizer), tokenizer.chat_template) == (size + 3, "{{ messages }}")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = utils.load_tokenizer(tmp_path / "saved")
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (size, size + 2, size + 3)
    assert again.chat_template == "{{ messages }}"
    assert again("一个人<|im_end|>").input_ids == [1, *one, size]


def test_an_added_token_whose_id_cannot_be_is_refused(base, tmp_path):
    folder = make_folder(base, tmp_path, MODEL)
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 1003}')
    with pytest.raises(UserError, match="im_end.*1,003.*tokenizer.json"):
        utils.load_tokenizer(folder)


def test_equal_scores_of_runs_of_spaces_are_no_alarm(base, tmp_path, capsys):
    """As in LLaMA's own model, whose fast tokenizer is right."""
    proto = utils.sentencepiece_proto(base / MODEL)
    runs = [piece for piece in proto.pieces if not piece.piece.strip("▁")]
    assert len(runs) > 3
    for piece in runs:
        piece.score = -1e9
    (tmp_path / MODEL).write_bytes(proto.SerializeToString())
    tokenizer = utils.load_tokenizer(tmp_path, 512)
    assert tokenizer.is_fast and tokenizer(TEXTS).input_ids == sentencepiece_ids(tmp_path / MODEL, TEXTS, bos=True)
    assert capsys.readouterr().err.endswith("ids checked against it\n" + END)


def test_the_converter_claims_no_checked_ids_for_pieces_of_equal_score(base, tmp_path):
    from types import SimpleNamespace

    import convert_llama_weights

    model = merge(base, tmp_path / "merged" / MODEL, *PIECES)
    llama = SimpleNamespace(vocab_size=1000 + len(PIECES), rope_factor=None)
    with pytest.raises(UserError, match="--tokenizer none and copy it"):
        convert_llama_weights.read_tokenizer(model, llama)


# --- A tokenizer's own begin and end, and ids without a row ------------------------------------------------------------


def with_template(tokenizer, template):
    """A copy that puts the words of `template` around every text, and that cuts and pads on the left by itself."""
    from tokenizers import processors

    spoilt = copy.deepcopy(tokenizer)
    ids = [("<s>", 1), ("</s>", 2)]
    spoilt.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    spoilt.backend_tokenizer.enable_truncation(5, direction="left")
    spoilt.backend_tokenizer.enable_padding(direction="left", length=9)
    spoilt.truncation_side = spoilt.padding_side = "left"
    return spoilt


TEMPLATES = [("<s> $0", [1]), ("<s> $0 </s>", [1]), ("<s> <s> $0 </s> </s>", [1]), ("$0 </s>", []), ("$0", [])]


@pytest.mark.parametrize(("template", "begin"), TEMPLATES)
def test_rows_and_prompts_hold_the_begin_token_alone(template, begin, base, tokenizer):
    """Judged by SentencePiece's own ids; also that only a token that really straddles is said to."""
    from types import SimpleNamespace

    import chat
    import train

    spoilt = with_template(tokenizer, template)
    assert utils.begin_ids(spoilt) == begin
    question = {"instruction": "Add 1 and 2.", "output": "3."}
    messages = utils.as_messages(question)
    (prompt, _), (answer, _) = utils.spans("alpaca", messages, spoilt)
    head, whole, short = sentencepiece_ids(base / MODEL, [prompt, prompt + "3.", "a):"])
    data = train.preprocess([prompt, "a)"], [answer, ": b</s>"], spoilt)
    assert data["input_ids"][0].tolist() == [*begin, *whole, 2]
    assert data["labels"][0].tolist() == [-100] * len(begin + head) + [*whole[len(head) :], 2]
    assert data["straddling"] == [False, True]
    model = SimpleNamespace(config=transformers.LlamaConfig(vocab_size=1000))
    talk = SimpleNamespace(style="alpaca", tokenizer=spoilt, model=model, window=512, system="")
    assert chat.ids_of_prompt(talk, [question]) == [*begin, *head]


def test_the_begin_token_of_sentencepiece_itself_is_one(base, tmp_path):
    model = merge(base, tmp_path / "merged" / MODEL, *PIECES)
    for switches, begin in (("{}", [1]), ('{"add_bos_token": false}', []), ('{"add_eos_token": true}', [1])):
        (model.parent / CONFIG).write_text(switches)
        assert utils.begin_ids(utils.load_tokenizer(model.parent)) == begin


@pytest.mark.parametrize(
    ("name", "ids", "token"),
    [("d.json[3]", [5, 1000, 7], "<extra>"), ("eos_token", [1001], "<end>"), ("the prompt", [1], None)],
)
def test_an_id_that_the_embedding_has_no_row_for_is_refused_by_name(name, ids, token, tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<extra>", "<end>"], special_tokens=True)
    named = [("before", [1, 999]), ("empty", []), (name, ids)]
    config = transformers.LlamaConfig(vocab_size=1000)
    if token is None:
        utils.check_ids(named, grown, config)  # a tokenizer may be larger, as long as nothing uses the rest
        return
    with pytest.raises(UserError) as caught:
        utils.check_ids(named, grown, config)
    for word in (name, token, f"{max(ids):,}", "1,000 rows"):
        assert word in str(caught.value)


def test_a_question_with_such_a_token_is_refused(tokenizer):
    from types import SimpleNamespace

    import chat

    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<extra>"], special_tokens=True)
    model = SimpleNamespace(config=transformers.LlamaConfig(vocab_size=1000))
    talk = SimpleNamespace(style="alpaca", tokenizer=grown, model=model, window=512, system="")
    assert max(chat.ids_of_prompt(talk, [{"instruction": "Go."}])) < 1000
    with pytest.raises(UserError, match="the prompt: token '<extra>' has id 1,000"):
        chat.ids_of_prompt(talk, [{"instruction": "Go <extra>."}])


def add_token(folder, token, **names):
    """Give a model folder's tokenizer one token more than its embedding has rows."""
    grown = transformers.AutoTokenizer.from_pretrained(folder)
    grown.add_tokens([token], special_tokens=True)
    for name, value in names.items():
        setattr(grown, name, value)
    grown.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", ["train", "chat"])
def test_both_scripts_refuse_it_before_weights_are_loaded(script, base, tmp_path, capsys, monkeypatch):
    import chat
    import train

    folder = make_folder(base, tmp_path / "grown", CONFIG, JSON, MODEL, "config.json")
    (folder / "model.safetensors").write_bytes(b"no weights")
    data = tmp_path / "d.json"
    data.write_text(
        json.dumps([{"instruction": "Go.", "output": "yes"}, {"instruction": "Go <extra>.", "output": "x"}])
    )
    add_token(folder, "<extra>", **({"eos_token": "<extra>"} if script == "chat" else {}))
    words = {"train": ["--data_path", str(data), "--output_dir", str(tmp_path / "out"), "--pad_token", "add"]}
    words = words.get(script, ["--instruction", "Go."])
    monkeypatch.setattr(sys, "argv", [script, "--model_name_or_path", str(folder), *words])
    main = train.train if script == "train" else lambda: chat.load_chat(chat.parse_arguments(sys.argv[1:]))
    with pytest.raises(UserError) as caught:
        main()
    place = "d.json[1]" if script == "train" else "eos_token"
    assert str(caught.value).startswith(f"{place}: token '<extra>' has id 1,000")
    if script == "train":
        data.write_text(json.dumps([{"instruction": "Go.", "output": "yes"}]))
        sys.argv += ["--dry_run", "1"]
        main()  # unused, it does no harm
        add_token(folder, "<pad>", pad_token="<pad>")
        with pytest.raises(UserError, match="pad_token: token '<pad>' has id 1,001"):
            main()
    capsys.readouterr()


# --- compare_ids -----------------------------------------------------------------------------------------------------


def forget_merge(folder, word):
    """Take the last merge of a word out of a folder's tokenizer.json."""

    def edit(value):
        kept = [pair for pair in value["model"]["merges"] if "".join(pair) != word]
        assert len(kept) == len(value["model"]["merges"]) - 1
        value["model"]["merges"] = kept

    edit_json(folder / JSON, edit)


def test_a_row_that_the_folder_reads_otherwise_is_named(base, tmp_path, monkeypatch):
    """A difference that no fixed list shows: 2,500 rows, of which every second is looked at."""
    import train

    word = "▁bicycle"
    assert word in [piece.piece for piece in utils.sentencepiece_proto(base / MODEL).pieces]
    folder = make_folder(base, tmp_path / "wrong", CONFIG, JSON, MODEL)
    forget_merge(folder, word)
    tokenizer, seen, law = utils.load_tokenizer(folder, 512), [], utils.sentencepiece_ids
    assert tokenizer.is_fast and not any("bicycle" in text for text in utils.NASTY_STRINGS)
    monkeypatch.setattr(utils, "sentencepiece_ids", lambda path, texts: (seen.append(len(texts)), law(path, texts))[1])
    rows = [{"instruction": "Go.", "output": f"yes {i}"} for i in range(2500)]
    rows[4]["output"] = "no bicycle</s>"  # SentencePiece knows no special token inside a text
    data = tmp_path / "d.json"

    def dataset():
        data.write_text(json.dumps(rows))
        return train.SupervisedDataset(data, tokenizer, sentencepiece_path=folder / MODEL)

    assert len(dataset()) == 2500 and 1000 <= seen[0] < 2500
    rows[2499]["output"] = "the bicycle is long"
    with pytest.raises(UserError) as caught:
        dataset()
    message = str(caught.value)
    shutil.copy(base / "config.json", folder)
    words = ["--model_name_or_path", folder, "--data_path", data, "--output_dir", tmp_path / "out", "--dry_run", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(UserError) as caught:
        train.train()
    assert str(caught.value) == message
    assert message.startswith("d.json[2499]: ") and "bicycle" in message and str(folder / MODEL) in message
    assert "tokenizer.json" in message
    (folder / JSON).unlink()  # as the message says
    tokenizer = utils.load_tokenizer(folder, 512)
    assert len(dataset()) == 2500


def test_a_unigram_folder_without_tokenizer_json_is_refused(tmp_path):
    model = train_model(tmp_path / "models" / MODEL, model_type="unigram")
    with pytest.raises(UserError) as caught:
        utils.load_tokenizer(model.parent, 512)
    assert str(caught.value) == f"{model}: not a BPE model, cannot be rebuilt; put a right tokenizer.json beside it"


@pytest.mark.parametrize("names", [(), ("config.json",)])
def test_a_folder_without_a_tokenizer_is_refused(names, base, tmp_path):
    with pytest.raises(UserError) as caught:
        utils.load_tokenizer(make_folder(base, tmp_path, *names), 512)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: it holds no tokenizer")
    hint = "--model_name_or_path takes a folder with config.json, weights and tokenizer, or a name on the hub (HF_ENDPOINT names a mirror of it)"
    assert message.endswith(f"; {hint}")
    assert "\n" not in message


def test_a_tokenizer_without_an_end_token_is_refused(base, tmp_path):
    folder = make_folder(base, tmp_path, CONFIG, JSON)
    edit_json(folder / CONFIG, lambda value: value.pop("eos_token"))
    with pytest.raises(UserError) as caught:
        utils.load_tokenizer(folder, 512)
    assert str(caught.value) == (
        f"{folder}: the tokenizer has no end token; set eos_token in its tokenizer_config.json"
    )


def test_padding_with_the_end_token_is_changed(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    edit_json(folder / CONFIG, lambda value: value.update(pad_token="</s>", padding_side="left"))
    check_llama(utils.load_tokenizer(folder, 512), base)
    assert capsys.readouterr().err == "tokenizer: padding token was </s> (the end token); now <unk>\n"


def test_a_padding_token_of_its_own_is_kept(base, tmp_path, capsys):
    folder = make_folder(base, tmp_path, CONFIG, JSON, MODEL)
    edit_json(folder / CONFIG, lambda value: value.update(pad_token="<s>"))
    assert utils.load_tokenizer(folder, 512).pad_token_id == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "was"),
    [
        ({}, "missing"),
        ({"unk_token": "<|endoftext|>"}, "missing"),
        ({"pad_token": "<|endoftext|>"}, "<|endoftext|> (the end token)"),
    ],
    ids=["no-unknown-token", "unknown-is-end", "padding-is-end"],
)
def test_without_an_unknown_token_there_is_no_padding_token(more, was, tmp_path, capsys):
    """As GPT-2: one special token for all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    options = {"vocab_size": 260, "special_tokens": [end], "initial_alphabet": alphabet, "show_progress": False}
    bytes_.train_from_iterator(["hello"], trainers.BpeTrainer(**options))
    PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=end, bos_token=end, **more).save_pretrained(tmp_path)
    tokenizer = utils.load_tokenizer(tmp_path, 512)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == (None, None, 0)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 512)
    line = f"tokenizer: padding token was {was}; none is set, batches mask by length\n"
    assert capsys.readouterr().err == line


def test_the_folders_own_length_stays_where_none_is_given(base):
    assert utils.load_tokenizer(base).model_max_length == 2048


def test_find_sentencepiece_looks_into_folders_and_takes_any_name(base, tmp_path):
    assert utils.find_sentencepiece(base) == base / MODEL
    assert utils.find_sentencepiece(tmp_path) is None
    assert utils.find_sentencepiece("nobody/no-such-model", tmp_path) is None
    assert utils.find_sentencepiece("a/b/c is no name on the hub", tmp_path) is None


def test_a_tokenizer_of_custom_code_is_refused_without_a_question(base, tmp_path, monkeypatch):
    folder = make_folder(base, tmp_path / "own", "config.json")
    about = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "tokenization_own.py").write_text("raise SystemExit('this code was run')\n")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("a question on the terminal"))
    with pytest.raises(UserError, match="its tokenizer files cannot be read"):
        utils.load_tokenizer(folder)
