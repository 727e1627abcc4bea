"""Data generation in Chinese: another prompt and other seed tasks, no other switch."""

import itertools
import json

import pytest
from conftest import ROOT
from scripted_server import Server
from test_generate_run import generate, quick  # noqa: F401

import utils
from generate_instruction import broken_rule, cannot_be_shown, tokenize

SEEDS, PROMPT = ROOT / "examples" / "seed_tasks_zh.jsonl", ROOT / "examples" / "prompt_zh.txt"
TASKS = [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]


def test_seed_tasks_have_the_form_of_the_english_ones():
    assert len(TASKS) >= 20 and [task["id"] for task in TASKS] == [f"seed_task_zh_{i}" for i in range(len(TASKS))]
    assert len({task["name"] for task in TASKS}) == len(TASKS)
    assert SEEDS.read_bytes() == "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in TASKS).encode()
    records, problems = utils.read_records([SEEDS])
    assert problems == [] and len(records) == len(TASKS)
    for task, record in zip(TASKS, records, strict=True):
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        texts = [record[key] for key in ("instruction", "input", "output")]
        assert all(text == text.strip() for text in texts) and record["output"]
        assert (cannot_be_shown(record), broken_rule(record["instruction"])) == ("", ""), task["id"]


def test_no_two_seed_tasks_are_alike():
    scoring = pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge_score is not installed")
    for one, other in itertools.combinations(TASKS, 2):
        score = scoring._score_lcs(tokenize(one["instruction"]), tokenize(other["instruction"])).fmeasure
        assert score <= 0.5, f"{one['id']} and {other['id']}: {score:.2f}"


ANSWER = """ 写一首关于春天的短诗。
4. 输入：
无输入
4. 输出：
春风吹过小河边，
柳叶青青又一年。
###
5. 指令：写一首关于秋天的短诗。
5. 输入：<noinput>
5. 输出：秋叶落满山间路。
###
6. 指令：请说明光合作用需要哪些条件。
6. 输入：
<无输入>
6. 输出：
需要光、水、二氧化碳和叶绿素。
###
7. 指令：算出这个长方形的面积。
7. 输入：
长8厘米，宽5厘米
7. 输出：
8×5＝40（平方厘米）
"""


def test_a_run_in_chinese(tmp_path):
    with Server(text=ANSWER) as server:
        options = {"seed_tasks_path": str(SEEDS), "prompt_path": str(PROMPT), "max_requests": 1}
        rows = generate(server, tmp_path, 10, **options)
        prompt = server.requests[0]["prompt"]
    assert prompt.startswith("请为语言模型编写") and prompt.endswith("\n###\n4. Instruction:")
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == [
        ("写一首关于春天的短诗。", "", "春风吹过小河边，\n柳叶青青又一年。"),
        ("请说明光合作用需要哪些条件。", "", "需要光、水、二氧化碳和叶绿素。"),
        ("算出这个长方形的面积。", "长8厘米，宽5厘米", "8×5＝40（平方厘米）"),
    ]
    dropped = json.loads((tmp_path / "regen.dropped.jsonl").read_text(encoding="utf-8"))
    assert (dropped["reason"], dropped["similar_to"]) == ("duplicate", "写一首关于春天的短诗。")
