"""extend_vocab.py: ids that are SentencePiece's, nothing old spelled longer, rows that are means, a model that trains."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, basic_options, environment, train
from safetensors.torch import save_file

import extend_vocab
import utils
from utils import UserError

ZH = [
    "今天天气很好，我们去公园散步吧。", "请把下面的句子翻译成英文，并解释它的意思。", "学习一门语言需要时间和耐心。",
    "天气预报说明天会下雨，请带上雨伞。", "公园里有很多人在散步，也有人在跑步。", "这个句子的意思是学习需要耐心。",
]  # fmt: skip
EN = ["Hello, how are you? The weather is fine.", "def f(x):\n    return x + 1\n", "  two  spaces  ", "1 + 2 = 3"]


def extend(words):
    args = extend_vocab.parse_arguments([str(word) for word in words])
    extend_vocab.extend_vocab(args)
    return args


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "zh.jsonl"
    lines = [{"text": "".join(ZH[(i + j) % len(ZH)] for j in range(3)) + str(i)} for i in range(60)]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def extended(base, corpus, tmp_path_factory):
    target = tmp_path_factory.mktemp("extended") / "zh"
    words = ["--base", base, "--corpus", corpus, "--vocab_size", 420, "--target", target]
    done = subprocess.run(
        [sys.executable, ROOT / "extend_vocab.py", *map(str, words)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target, done.stderr


def test_the_ids_are_sentencepieces_and_nothing_old_gets_longer(extended, base):
    target, said = extended
    old, new = (utils.load_tokenizer(path) for path in (base, target))
    texts = [*ZH, *EN, *utils.NASTY_STRINGS]
    found = new(texts, add_special_tokens=False).input_ids
    assert found == utils.sentencepiece_ids(target / "tokenizer.model", texts)
    before = old(texts, add_special_tokens=False).input_ids
    assert all(len(a) <= len(b) for a, b in zip(found, before, strict=True))
    assert found[len(ZH) : len(ZH) + len(EN)] == before[len(ZH) : len(ZH) + len(EN)]
    assert sum(map(len, found[: len(ZH)])) < 0.5 * sum(map(len, before[: len(ZH)]))
    assert [new.decode(ids) for ids in found[: len(ZH)]] == ZH
    assert "corpus: " in said and "held out: " in said and "0 got longer" in said


def test_the_scores_are_distinct_and_below_all_old_ones(extended, base):
    old, new = (utils.sentencepiece_proto(path / "tokenizer.model") for path in (base, extended[0]))
    count = len(old.pieces)
    assert [p.piece for p in new.pieces][:count] == [p.piece for p in old.pieces]
    scores = [piece.score for piece in new.pieces[count:]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores) > 20
    assert max(scores) < min(p.score for p in old.pieces if p.type == p.NORMAL and set(p.piece) != {"▁"})
    assert new.trainer_spec.vocab_size == len(new.pieces)


def test_new_rows_are_the_means_of_the_old_pieces_and_all_else_is_kept(extended, base):
    target, _ = extended
    old, new = (utils.load_weights(path, utils.load_config(path), torch.float32) for path in (base, target))
    reader, names = utils.load_tokenizer(base), utils.load_tokenizer(target)
    for one, two in ((old.model.embed_tokens, new.model.embed_tokens), (old.lm_head, new.lm_head)):
        assert two.weight.shape[0] % 64 == 0 and torch.equal(two.weight[:1000], one.weight)
        for i in range(1000, len(names)):
            piece = names.convert_ids_to_tokens(i).replace("▁", " ")
            ids = reader("\n" + piece, add_special_tokens=False).input_ids[2:]  # behind the space and the line break
            assert torch.allclose(two.weight[i], one.weight[ids].mean(0), atol=1e-6)
        assert torch.allclose(two.weight[len(names) :], one.weight.mean(0), atol=1e-6)
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    before = old.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items() if name not in grown)
    assert utils.load_config(target).vocab_size == new.lm_head.weight.shape[0]


@pytest.mark.slow
def test_the_extended_model_trains_in_two_stages(extended, corpus, tmp_path):
    target, _ = extended
    options = {
        "max_steps": 4,
        "model_max_length": 64,
        "cache_dir": tmp_path / "cache",
        "per_device_train_batch_size": 4,
    }
    first = basic_options(target, corpus, tmp_path / "one", trained_modules="embed_tokens,lm_head", **options)
    one = train(first).finished()
    more = {"lora_r": 4, "lora_modules_to_save": "embed_tokens,lm_head"}
    two = train(basic_options(tmp_path / "one", corpus, tmp_path / "two", **more, **options)).finished()
    assert one.losses()[-1] < one.losses()[0] and two.losses()[0] < one.losses()[0]
    assert "and embed_tokens, lm_head whole" in two.err


def test_tied_embeddings_stay_tied(base, corpus, tmp_path):
    config = utils.read_json(base / "config.json") | {"tie_word_embeddings": True}
    tied = tmp_path / "tied"
    tied.mkdir()
    weights = utils.load_weights(base, utils.load_config(base), torch.float32).state_dict()
    save_file(
        {k: v.clone() for k, v in weights.items() if k != "lm_head.weight"},
        tied / "model.safetensors",
        {"format": "pt"},
    )
    utils.write_json(config, tied / "config.json")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (tied / name).write_bytes((base / name).read_bytes())
    extend(["--base", tied, "--corpus", corpus, "--vocab_size", 420, "--target", tmp_path / "out"])
    model = utils.load_weights(tmp_path / "out", utils.load_config(tmp_path / "out"), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(model.lm_head.weight) > 1000


def test_byte_level_bpe_grows_by_merges_behind_the_old_ones(base, corpus, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        EN * 9, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<e>"])
    )
    folder, config = tmp_path / "bpe", utils.load_config(base)
    config.vocab_size = 320
    old = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", model_max_length=512)
    old.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    extend(["--base", folder, "--corpus", corpus, "--vocab_size", 400, "--target", tmp_path / "out"])
    new = utils.load_tokenizer(tmp_path / "out")
    before, after = (one([*EN, *ZH], add_special_tokens=False).input_ids for one in (old, new))
    assert before[: len(EN)] == after[: len(EN)] and new.eos_token_id == old.eos_token_id
    assert sum(map(len, after[len(EN) :])) < 0.6 * sum(map(len, before[len(EN) :]))
    assert [new.decode(ids) for ids in after] == [*EN, *ZH]
    one, two = (utils.load_weights(path, utils.load_config(path), torch.float32) for path in (folder, tmp_path / "out"))
    rows, count = two.model.embed_tokens.weight, len(old)
    assert (
        rows.shape[0] % 64 == 0
        and len(new) <= len(rows)
        and torch.equal(rows[:count], one.model.embed_tokens.weight[:count])
    )
    checked = 0
    for i in range(count, len(new)):
        text = new.decode([i])
        if "\ufffd" not in text:  # whole characters, which can be given to the old one
            ids = old(text, add_special_tokens=False).input_ids
            assert torch.allclose(rows[i], one.model.embed_tokens.weight[ids].mean(0), atol=1e-6)
            checked += 1
    assert checked > 20


def merged(base, folder, score):
    """A base with pieces of one score, as the published merge script makes them."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    proto = utils.sentencepiece_proto(base / "tokenizer.model")
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL][-40:]
    for piece in normal:
        piece.score = score
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer.json").unlink()
    return folder


def test_pieces_of_equal_score_are_recognised_and_repaired(base, corpus, tmp_path, capsys):
    folder = merged(base, tmp_path / "merged", 0.0)
    with pytest.raises(UserError, match="pieces share scores, as merged ones do; extend_vocab.py --repair goes first"):
        extend(["--base", folder, "--corpus", corpus, "--target", tmp_path / "no"])
    extend(["--base", folder, "--repair", "--corpus", corpus, "--target", tmp_path / "out"])
    said = capsys.readouterr().err
    assert "pieces shared a score with another" in said and "ids of " in said
    proto = utils.sentencepiece_proto(tmp_path / "out" / "tokenizer.model")
    scores = [p.score for p in proto.pieces if p.type == p.NORMAL and set(p.piece) != {"▁"}]
    assert len(set(scores)) == len(scores)
    tokenizer = utils.load_tokenizer(tmp_path / "out")
    texts = [*ZH, *EN]
    assert tokenizer(texts, add_special_tokens=False).input_ids == utils.sentencepiece_ids(
        tmp_path / "out" / "tokenizer.model", texts
    )
    with pytest.raises(UserError, match="nothing to repair"):
        extend(["--base", tmp_path / "out", "--repair", "--target", tmp_path / "again"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "{base}", "--target", "{tmp}/out"], "give --corpus FILES, or --pieces MODEL"),
        (["--base", "{base}", "--pieces", "{base}/tokenizer.model", "--target", "{tmp}/out"], "nothing to add"),
        (["--base", "{base}", "--corpus", "{zh}", "--target", "{base}"], "--target .*: the same place as"),
        (
            ["--base", "{base}", "--corpus", "{zh}", "--vocab_size", "30000", "--target", "{tmp}/out"],
            "do not make a vocab",
        ),
        (["--base", "{tmp}", "--corpus", "{zh}", "--target", "{tmp}/out"], "--base .* is empty"),
    ],
)
def test_what_does_not_fit_is_refused(words, said, base, corpus, tmp_path):
    with pytest.raises(UserError, match=said):
        extend([word.format(base=base, tmp=tmp_path, zh=corpus) for word in words])
    assert not (tmp_path / "out").exists()


def test_tokens_behind_the_pieces_are_refused(base, corpus, tmp_path):
    tokenizer = utils.load_tokenizer(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\[PAD\] stand behind the 1,000 pieces"):
        extend(["--base", tmp_path, "--corpus", corpus, "--target", tmp_path / "out"])
