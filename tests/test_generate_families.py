"""The parser on answers of many families: nothing wrong is kept of any, and little is lost. See answers.py."""

import time

import pytest
from answers import FAMILIES, make

from generate_instruction import parse_response

SEEDS = range(4)
# What the parser does not read: all that is asked is that it keeps nothing of it, and says so.
UNREAD = ["yaml_list", "py_single_quotes", "md_table", "md_think", "final_answer_head"]


def kept(name, seed):
    """(rows kept, rows there truly are, what was dropped)"""
    text, finish_reason, tasks = make(name, seed)
    found, dropped = parse_response(text, finish_reason, 3)
    rows = [(task["instruction"].strip(), task["input"].strip(), task["output"].strip()) for _, task in found]
    return rows, tasks, dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_wrong_is_kept(name):
    for seed in SEEDS:
        rows, tasks, dropped = kept(name, seed)
        assert rows or dropped
        for row in rows:
            assert row in tasks
            tasks.remove(row)  # each once


def test_little_is_lost():
    exact = total = 0
    for name in FAMILIES:
        for seed in SEEDS:
            rows, tasks, _ = kept(name, seed)
            exact, total = exact + len(rows), total + len(tasks)
    assert total > 4500 and exact / total > 0.94


@pytest.mark.parametrize("name", UNREAD)
def test_an_answer_in_no_known_form_is_dropped_with_a_reason(name):
    rows, _, dropped = kept(name, 0)
    assert rows == [] and dropped and all(reason and text for _, reason, text in dropped)


@pytest.mark.parametrize(
    "name", ["farewell", "farewell_close", "bracket_think", "eot_turn", "json_list", "label_misspelt"]
)
def test_what_goes_wrong_in_one_place_costs_no_other_task(name):
    for seed in SEEDS:
        rows, tasks, _ = kept(name, seed)
        assert sorted(rows) == sorted(tasks)


WHOLE = (
    "own_words two_languages number_alone marks_alone item_heading keycap_heading roman_heading hashes_at_the_end "
    "no_break_spaces field_behind field_before think_after"
).split()


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_in_a_form_of_its_own_is_read_whole(name):
    for seed in SEEDS:
        rows, tasks, dropped = kept(name, seed)
        assert sorted(rows) == sorted(tasks), dropped


SIZE = 200_000
HOSTILE = {  # texts on which a search that goes back would take minutes
    "spaces in a field": f"4. Instruction: x\n4. Input:{' ' * SIZE}\n4. Output: y",
    "lines of a space": "4. Instruction: x\n4. Output: y" + " \n" * SIZE + "z",
    "separators and text": "4. Instruction: x\n4. Output: y\n" + "###\n" * SIZE + "z",
    "rules": "4. Instruction: x\n4. Output: y\n" + "---\n" * SIZE,
    "headings": "4. Instruction: x\n4. Output: y\n" + "Task 5\n\n" * SIZE,
    "labels of no kind": "Instruction: x\nOutput: y\n" + "Word: x\n" * SIZE,
    "numbers": "4. Instruction: x\n4. Output: y\n" + "5. x\n" * SIZE,
    "closing tags": "</think>" * SIZE,
    "open and closed tags": "<think>" + "x</think>x" * SIZE,
    "opening tags": "<think>" * SIZE,
    "tokens": "4. Instruction: x\n4. Output: y" + " <|im_end|> x" * SIZE,
    "struck out": "4. Instruction: x\n4. Output: y" + "<s>x</s>" * SIZE,
    "quoted": ">" * SIZE + "\n" + "> \n" * SIZE,
    "brackets": "[" * SIZE,
    "objects": "[" + '{"a":' * SIZE,
    "stars": "4" + "*" * SIZE,
    "words of tasks": "任务" * SIZE,
    "hashes behind lines": "4. Instruction: x\n4. Output: y\n" + "a ###\n" * SIZE,
    "labels of any word": "4. word: x\n" * SIZE,
    "inputs alone": "x\nInput: y\n" * (SIZE // 10),
    "headings with a number": "".join(f"\n\nItem {k}\nInstruction: x\nOutput: y" for k in range(SIZE // 50)),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_makes_a_search_go_back(text):
    """About a second for the slowest; what is quadratic takes minutes at this length."""
    start = time.process_time()
    tasks, dropped = parse_response(text, "stop", 3)
    assert (tasks or dropped) and time.process_time() - start < 20
