"""seed_tasks.jsonl: its format, and that its tasks differ from one another as the generation of data requires."""

import itertools
import json
import re

import pytest
from conftest import ROOT

import utils

PATH = ROOT / "seed_tasks.jsonl"
TASKS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
KEYS = ["id", "name", "instruction", "instances", "is_classification"]


def test_ids_and_names():
    assert [task["id"] for task in TASKS] == [f"seed_task_{i}" for i in range(175)]
    assert len({task["name"] for task in TASKS}) == 175
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", task["name"]) for task in TASKS)


def test_keys_and_types():
    for task in TASKS:
        assert list(task) == KEYS, task["id"]
        assert isinstance(task["is_classification"], bool), task["id"]
        assert isinstance(task["instances"], list) and len(task["instances"]) == 1, task["id"]
        assert list(task["instances"][0]) == ["input", "output"], task["id"]


def test_texts_are_clean():
    for task in TASKS:
        for key, text in {"instruction": task["instruction"], **task["instances"][0]}.items():
            where = f"{task['id']}, {key}"
            assert isinstance(text, str) and (text or key == "input"), where
            assert text == text.strip(), where
            assert "</s>" not in text and "### " not in text, where
        assert not task["instruction"][0].islower(), task["id"]


def test_lines_are_plain_utf8_json():
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in TASKS]
    assert PATH.read_bytes() == "".join(lines).encode()


def test_variety():
    inputs = sum(bool(task["instances"][0]["input"]) for task in TASKS)
    words = sum(len(task["instances"][0]["output"].split()) for task in TASKS)
    assert 0.55 <= inputs / len(TASKS) <= 0.65
    assert 20 <= sum(task["is_classification"] for task in TASKS) <= 30
    assert 25 <= words / len(TASKS) <= 40


def test_no_two_instructions_are_alike():
    scoring = pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge_score is not installed")
    scorer = scoring.RougeScorer(["rougeL"], use_stemmer=False)
    for one, other in itertools.combinations(TASKS, 2):
        score = scorer.score(one["instruction"], other["instruction"])["rougeL"].fmeasure
        assert score <= 0.7, f"{one['id']} and {other['id']}: {score:.2f}"
    assert len({task["instruction"] for task in TASKS}) == 175  # the scorer sees no words in Chinese or Japanese


def test_loads_as_training_records():
    records, problems = utils.read_records([PATH])
    assert problems == []
    for task, record in zip(TASKS, records, strict=True):
        assert record["instruction"] == task["instruction"]
        assert {key: record[key] for key in ("input", "output")} == task["instances"][0]
