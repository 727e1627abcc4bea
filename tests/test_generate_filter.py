"""The filter of generate_instruction.py against rouge_score: the same floats, bit for bit, and the same decisions."""

import json
import random

import numpy as np
import pytest
from conftest import ROOT

from generate_instruction import RougeFilter, tokenize

scoring = pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge_score is not installed")
from rouge_score.tokenize import tokenize as rouge_tokenize  # noqa: E402

SEEDS = [task["instruction"] for task in map(json.loads, (ROOT / "seed_tasks.jsonl").open(encoding="utf-8"))]
SHORT = sorted(SEEDS, key=len)[:120]
CHINESE = [
    "计算一个边长为5厘米的正方形的面积。",
    "编制一份包含5个州的列表。",
    "请写一首关于春天的诗。",
    "把下面的句子翻译成英文。",
    "写一首关于秋天的诗。",
    "请用三句话说明光合作用。",
    "列出三种可再生能源。",
    "列出三种不可再生能源。",
]
ODD = [
    "",
    "!!! ???",
    "\x00",
    "🦙",
    "👩‍👩‍👧‍👦 family 👨‍👩‍👦",
    "é",
    "Café au lait",
    "Cafe\u0301 au lait",
    "ＦＵＬＬ width",
    "नमस्ते दुनिया",
    "こんにちは 世界",
    "안녕하세요 세계",
    "Привет мир",
    "مرحبا بالعالم",
    "ไทยแลนด์",
    "a\ud83db",
    "_under_score_",
    "naïve İstanbul",
    "word " * 70,
    "other " * 140,
    "ab " * 64,
    "x1 2y 3",
    "don't stop",
]


class OurTokenizer:
    """For rouge_score's scorer."""

    def tokenize(self, text):
        return tokenize(text)


def mutate(text, draw):
    """Nearly the same text: a few words taken out, put in, doubled or exchanged."""
    words = text.split()
    for _ in range(draw.randint(1, 5)):
        i = draw.randrange(len(words)) if words else 0
        how = draw.randrange(3)
        words[i : i + 1] = [[], ["new"], [*words[i : i + 1], draw.choice(["the", "a", "5", "词"])]][how]
    return " ".join(words)


def make_texts(count, seed=0):
    draw = random.Random(seed)
    texts = SHORT + CHINESE + ODD
    while len(texts) < count:
        texts.append(mutate(draw.choice(SHORT + CHINESE + ODD[:15]), draw))
    return texts


@pytest.mark.parametrize(("count", "wanted"), [(160, 25_600), pytest.param(330, 108_900, marks=pytest.mark.slow)])
def test_every_score_of_all_pairs_is_rouge_scores_bit_for_bit(count, wanted):
    texts, scorer, pairs = make_texts(count), scoring.RougeScorer(["rougeL"]), 0
    tokens = [tokenize(text) for text in texts]
    for one, known in zip(texts, tokens, strict=True):
        pool = RougeFilter(threshold=-1)  # everything is a duplicate, with the score of the only known text
        pool.add(one)
        for verdict, candidate in zip(pool.judge(texts), tokens, strict=True):
            if candidate:
                expected = scoring._score_lcs(candidate, known).fmeasure
                assert verdict["score"].hex() == float(expected).hex(), (one, candidate)
            else:
                assert verdict == {"kept": False, "reason": "no words"}
            pairs += 1
    assert pairs == wanted
    one, other = SEEDS[0], SEEDS[1]  # the scorer's public face gives the same
    found = scoring._score_lcs(tokenize(one), tokenize(other)).fmeasure
    assert scorer.score(one, other)["rougeL"].fmeasure == found


def peer_judge(pool, texts, threshold=0.7):
    """The rule of Stanford Alpaca, one candidate after the other, with rouge_score."""
    pool, tokens, results = list(pool), [tokenize(text) for text in pool], []
    for text in texts:
        mine = tokenize(text)
        scores = [scoring._score_lcs(mine, other).fmeasure for other in tokens]
        if not mine:
            results.append("no words")
        elif max(scores) > threshold:
            results.append("duplicate")
        else:
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:10]
            results.append(({pool[i]: scores[i] for i in order}, float(np.mean(scores))))
            pool.append(text)
            tokens.append(mine)
    return results


@pytest.mark.parametrize("size", [1, pytest.param(7, marks=pytest.mark.slow), 20, 400])
def test_decisions_top_ten_and_mean_are_those_of_a_plain_loop(size):
    texts = make_texts(400, seed=size)[120:]
    ours, found = RougeFilter(), []
    for seed in SEEDS[:30]:
        ours.add(seed)
    for start in range(0, len(texts), size):
        found += ours.judge(texts[start : start + size])
    expected = peer_judge(SEEDS[:30], texts)
    kinds = {"no words": 0, "duplicate": 0, "kept": 0}
    for verdict, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, str):
            assert verdict["reason"] == wanted
        else:
            assert list(verdict["most_similar_instructions"].items()) == list(wanted[0].items())
            assert verdict["avg_similarity_score"].hex() == wanted[1].hex()
        kinds[wanted if isinstance(wanted, str) else "kept"] += 1
    assert min(kinds.values()) > 3, kinds


def words(first, count):
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_the_boundary_of_07_is_decided_by_rounding_as_rouge_score_does():
    pool = RougeFilter()
    pool.add(f"{words(0, 7)} {words(100, 3)}")  # 10 words
    kept, dropped = pool.judge([f"{words(0, 7)} {words(200, 3)}"])[0], None
    assert kept["kept"] and max(kept["most_similar_instructions"].values()) == 0.7
    pool = RougeFilter()
    pool.add(f"{words(0, 7)} {words(100, 2)}")  # 9 words
    dropped = pool.judge([f"{words(0, 7)} {words(200, 4)}"])[0]  # 11 words
    assert (dropped["kept"], dropped["reason"], dropped["score"]) == (False, "duplicate", 0.7000000000000001)


def test_all_lengths_at_the_boundary_decide_as_rouge_score_does():
    above = 0
    for ours in range(1, 100):
        for theirs in range(ours, 101):
            common = 0.35 * (ours + theirs)
            if common == int(common) <= ours:
                one, other = words(0, int(common)) + " ", words(0, int(common)) + " "
                one += words(1000, ours - int(common))
                other += words(2000, theirs - int(common))
                pool = RougeFilter()
                pool.add(one)
                expected = scoring._score_lcs(other.split(), one.split()).fmeasure > 0.7
                assert pool.judge([other])[0]["kept"] != expected, (ours, theirs)
                above += expected
    assert above > 50


def test_duplicates_inside_one_batch_are_found():
    pool = RougeFilter()
    found = pool.judge(["Name three rivers of Europe", "Name three rivers of Europe!", "Bake a cake", "bake a CAKE"])
    assert [verdict["kept"] for verdict in found] == [True, False, True, False]
    assert found[1]["similar_to"] == "Name three rivers of Europe"
    assert pool.texts == ["Name three rivers of Europe", "Bake a cake"]


def test_a_dropped_text_of_a_batch_is_not_compared_with():
    pool = RougeFilter()
    pool.add(words(0, 10))
    found = pool.judge([f"{words(0, 8)} {words(20, 2)}", f"{words(4, 4)} {words(20, 2)} {words(40, 4)}"])
    assert [verdict["kept"] for verdict in found] == [False, True]
    assert list(found[1]["most_similar_instructions"]) == [words(0, 10)]


def test_the_first_text_of_an_empty_pool_is_kept():
    assert RougeFilter().judge(["Name three rivers"]) == [
        {"kept": True, "most_similar_instructions": {}, "avg_similarity_score": 0.0}
    ]
    assert RougeFilter().judge([]) == []


def test_texts_without_words_are_rejected_even_twice():
    pool = RougeFilter()
    assert [verdict["reason"] for verdict in pool.judge(["!!!", "🦙", "", "🦙"])] == ["no words"] * 4
    assert pool.texts == []


def test_chinese_duplicates_are_found_and_others_are_not():
    pool = RougeFilter()
    assert all(verdict["kept"] for verdict in pool.judge(CHINESE[:4]))
    assert not any(verdict["kept"] for verdict in pool.judge(CHINESE[:4]))
    assert pool.judge(["请写一首关于夏天的诗。"])[0]["similar_to"] == CHINESE[2]


@pytest.mark.parametrize("threshold", [0, 1])
def test_thresholds_at_the_ends(threshold):
    found = RougeFilter(threshold).judge(["one two three", "one two three", "four five six", "one five nine"])
    assert [verdict["kept"] for verdict in found] == [[True, False, True, False], [True, True, True, True]][threshold]


def test_ties_go_to_the_older_text():
    pool = RougeFilter()
    for i in range(30):
        pool.add(f"shared word number x{i}")
    top = pool.judge(["shared thing entirely other"])[0]["most_similar_instructions"]
    assert list(top) == [f"shared word number x{i}" for i in range(10)]


def test_more_than_55_000_different_words_pass_the_code_points_of_surrogates():
    pool = RougeFilter()
    for start in range(0, 56_000, 1000):
        pool.add(words(start, 1000))
    assert len(pool.ids) == 56_000 > 0xDFFF - 0x800
    found = pool.judge([words(55_280, 20), words(60_000, 20)])
    assert [verdict["kept"] for verdict in found] == [True, True]
    assert (
        max(found[0]["most_similar_instructions"].values())
        == scoring._score_lcs(words(55_280, 20).split(), words(55_000, 1000).split()).fmeasure
    )


def test_long_texts():
    pool = RougeFilter(threshold=-1)
    pool.add(words(0, 3000))
    expected = scoring._score_lcs(words(1500, 1000).split(), words(0, 3000).split()).fmeasure
    assert pool.judge([words(1500, 1000)])[0]["score"] == expected


# --- The tokenizer ---------------------------------------------------------------------------------------------------


def test_ascii_is_rouge_scores_own():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(draw.randrange(128)) for _ in range(draw.randrange(60)))
        assert tokenize(text) == rouge_tokenize(text, None)


TOKENS = {
    "写一首诗 about AI": ["写", "一", "首", "诗", "about", "ai"],
    "Größe, naïve_Café": ["größe", "naïve", "café"],
    "Cafe\u0301": ["café"],
    "ＡＢＣ１２": ["abc12"],
    "こんにちは": list("こんにちは"),
    "안녕": list("안녕"),
    "Привет, мир!": ["привет", "мир"],
    "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
    "ไทย": list("ไทย"),
    "مرحبا بالعالم": ["مرحبا", "بالعالم"],
    "🦙 — …": [],
    "x\ud83dy": ["x", "y"],
}


@pytest.mark.parametrize(("text", "tokens"), TOKENS.items())
def test_words_of_other_scripts(text, tokens):
    assert tokenize(text) == tokens


def test_the_seed_tasks_are_kept_by_the_filter():
    assert [verdict["kept"] for verdict in RougeFilter().judge(SEEDS)] == [True] * 175


@pytest.mark.slow
def test_rouge_scores_scorer_with_our_tokenizer_gives_our_scores():
    scorer, texts = scoring.RougeScorer(["rougeL"], tokenizer=OurTokenizer()), make_texts(150)
    for one in texts:
        pool = RougeFilter(threshold=-1)
        pool.add(one)
        for other, verdict in zip(texts, pool.judge(texts), strict=True):
            expected = scorer.score(other, one)["rougeL"].fmeasure
            assert verdict.get("score", 0.0) == expected
