"""The parser and the rules of generate_instruction.py: every block of an answer becomes a task or a counted reason."""

import pytest

from generate_instruction import (
    BLACKLIST,
    broken_rule,
    cannot_be_shown,
    encode_prompt,
    find_word_in_string,
    parse_response,
    post_process_gpt3_response,
)


def parse(text, finish_reason="stop", shown=3):
    """(tasks as (instruction, input, output), reasons of what was dropped)"""
    tasks, dropped = parse_response(text, finish_reason, shown)
    fields = [(task["instruction"], task["input"], task["output"]) for _, task in tasks]
    return fields, [reason for _, reason, _ in dropped]


PLAIN = """ Name three rivers.
4. Input:
<noinput>
4. Output:
Rhine, Rhone, Po.
###
5. Instruction: Count the words.
5. Input:
one two
5. Output:
2
"""
RIVERS, WORDS = ("Name three rivers.", "", "Rhine, Rhone, Po."), ("Count the words.", "one two", "2")


def renumbered(first, second):
    return f"###\n{first}. Instruction:{PLAIN}".replace("4.", f"{first}.").replace("5.", f"{second}.")


SAME_TASKS = {
    "goes on from the prompt": PLAIN,
    "repeats the head": f"4. Instruction:{PLAIN}",
    "separator first": f"###\n4. Instruction:{PLAIN}###\n",
    "restarted at 1": renumbered(1, 2),
    "skipped number": renumbered(4, 7),
    "repeated number": renumbered(4, 4),
    "number behind the end": renumbered(20, 21),
    "preamble": f"Sure! Here are the tasks:\n\n###\n4. Instruction:{PLAIN}",
    "preamble without a separator": f"Sure! Here are the tasks:\n\n4. Instruction:{PLAIN}",
    "farewell": f"{PLAIN}###\n",
    "two hashes": PLAIN.replace("###", "##"),
    "four hashes": PLAIN.replace("###", "####"),
    "dashes": PLAIN.replace("###", "---"),
    "no separator": PLAIN.replace("###\n", ""),
    "blank lines": PLAIN.replace("\n", "\n\n"),
    "crlf": PLAIN.replace("\n", "\r\n"),
    "text on the label's line": PLAIN.replace(":\n", ": "),
    "no space": f"4. Instruction:{PLAIN}".replace(": ", ":").replace(". I", ".I").replace(". O", ".O"),
    "bold labels": f"**4. Instruction:**{PLAIN}".replace("5. Instruction:", "**5. Instruction:**").replace(
        "4. Output:", "**4. Output:**"
    ),
    "bold label only": f"4. **Instruction**:{PLAIN}".replace("5. Instruction:", "5. **Instruction:**"),
    "bold line": f"**4. Instruction: Name three rivers.**\n{PLAIN.partition(chr(10))[2]}",
    "unnumbered": f"Instruction:{PLAIN}".replace("4. ", "").replace("5. ", ""),
    "bold unnumbered": f"**Instruction:**{PLAIN}".replace("4. ", "").replace("5. Instruction:", "**Instruction:**")
    .replace("Output:", "**Output:**").replace("5. ", ""),
    "headings": f"### Instruction:{PLAIN}".replace("###\n5. ", "### ").replace("4. ", "### ").replace("5. ", "### "),
    "task headings": f"**Task 4:**\nInstruction:{PLAIN}".replace("###\n5. ", "Task 5:\n").replace("4. ", "")
    .replace("5. ", ""),
    "task in the label's line": f"Task 4 Instruction:{PLAIN}".replace("5. I", "Task 5 I"),
    "number behind": f"Instruction 4:{PLAIN}".replace("4. Input", "Input 4").replace("4. Output", "Output 4")
    .replace("5. Instruction", "Instruction 5").replace("5. Input", "Input 5").replace("5. Output", "Output 5"),
    "bracket": f"4) Instruction:{PLAIN}".replace("4. ", "4) ").replace("5. ", "5) "),
    "full width": f"4．Instruction：{PLAIN}".replace("4. ", "4．").replace("5. ", "5．").replace("put:", "put："),
    "Chinese labels": f"4. 指令：{PLAIN}".replace("Instruction:", "指令：").replace("Input:", "输入：")
    .replace("Output:", "输出："),
    "code fence": f"```\n###\n4. Instruction:{PLAIN}```",
    "code fence with a preamble": f"Here:\n```text\n4. Instruction:{PLAIN}```\n",
    "a fence for each": f"```\n4. Instruction:{PLAIN}```".replace("###", "```\n```"),
    "reasoning": f"<think>\n4. Instruction: try\n4. Output: this\n</think>\n\n4. Instruction:{PLAIN}",
    "reasoning opened in the template": f"Try\n4. Instruction: x\n4. Output: y\n</think>\n4. Instruction:{PLAIN}",
    "reasoning, then it goes on": f"<think>hm</think>{PLAIN}",
    "lower case": f"4. instruction:{PLAIN}".replace("Input", "input").replace("Output", "output"),
    "no input label": PLAIN.replace("4. Input:\n<noinput>\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", SAME_TASKS.values(), ids=SAME_TASKS.keys())
def test_the_same_two_tasks_in_other_forms(text):
    assert parse(text) == ([RIVERS, WORDS], [])


@pytest.mark.parametrize("spelling", ["<noinput>", "<noinput>.", "No input", "no input.", "N/A", "None", "<No Input>",
                                      "[no input]", "(none)", "<无输入>", "无", "なし", ""])  # fmt: skip
def test_spellings_of_no_input(spelling):
    assert parse(PLAIN.replace("<noinput>", spelling)) == ([RIVERS, WORDS], [])


def test_an_input_that_begins_like_none_stays():
    assert parse(PLAIN.replace("<noinput>", "None of them came."))[0][0][1] == "None of them came."


def one(output, **changes):
    """The output that the parser reads where a task has `output`, between two others; nothing may be lost."""
    middle = f"###\n5. Instruction: Do it well now.\n5. Input:\n<noinput>\n5. Output:\n{output}\n"
    last = renumbered(6, 7)
    tasks, reasons = parse(PLAIN.partition("###")[0] + middle + last)
    assert [reasons, tasks[0], tasks[2:]] == [[], RIVERS, [RIVERS, WORDS]]
    return tasks[1][2]


OUTPUTS = {
    "heading": "### Plan\nFirst this.\n### Costs\nThen that.",
    "heading of two": "## Plan\nFirst this.",
    "numbered list to 20": "\n".join(f"{i}. item" for i in range(1, 23)),
    "the year 2020": "It was in 2020. Then 37.9 million people as of 2020.",
    "ends in 20": "between $13 and $20",
    "quoted input": "Write:\n4. Input:\nthe text\nand go on.",
    "quoted output and input": "Write:\n9. Output:\n9. Input:\nthe text",
    "unnumbered labels": "Input: a\nOutput: b\nInstruction: c",
    "the template": "### Instruction:\nDo.\n\n### Response:",
    "fenced code": "Use this:\n```python\nprint(1)\n```",
    "fenced code, then text": "```\nx\n```\nThat is all.",
    "fenced separator": "```\na\n###\nb\n```\nThat is all.",
    "rule": "Above\n---\nBelow",
    "bold": "**Yes**, and **no**",
    "u2028": "one\u2028two\u0085three",
    "a closing tag": "Close it with </think> at the end.",
    "comment banner": "####################\n# main\n####################\nrun()",
    "emoji and Chinese": "🦙 你好，世界。",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_what_stands_in_an_output_stays_in_it(output):
    assert one(output) == output


def test_input_before_instruction():
    text = f"{PLAIN}###\n6. Input:\nthe text\n6. Instruction: Shorten it well.\n6. Output:\nshort"
    assert parse(text) == ([RIVERS, WORDS, ("Shorten it well.", "the text", "short")], [])
    assert parse("4. Input:\nthe text\n4. Instruction: Shorten it.\n4. Output:\nshort") == (
        [("Shorten it.", "the text", "short")],
        [],
    )


DROPPED = {
    "missing output": (PLAIN.replace("4. Output:\nRhine, Rhone, Po.\n", ""), [WORDS], ["no output label"]),
    "empty output": (PLAIN.replace("Rhine, Rhone, Po.", ""), [WORDS], ["empty output"]),
    "output of a separator": (PLAIN.replace("Rhine, Rhone, Po.", "###"), [WORDS], ["empty output"]),
    "empty instruction": (f"4. Instruction:{PLAIN}".replace("Name three rivers.", ""), [WORDS], ["empty instruction"]),
    "lone surrogate": (PLAIN.replace("Rhine", "\ud83d"), [WORDS], ["broken characters"]),
    "nul": (PLAIN.replace("Rhine", "\x00"), [WORDS], ["broken characters"]),
    "farewell": (f"{PLAIN}###\nDo you want more?", [RIVERS, WORDS], ["text between tasks"]),
    "prose": ("I cannot do that.", [], ["no task found"]),
    "labels without an instruction": ("###\n4. Input:\nx\n4. Output:\ny", [], ["no task found"]),
    "reasoning without an end": (f"<think>\n4. Instruction:{PLAIN}", [], ["reasoning without an end"]),
    "nothing": ("", [], ["empty answer"]),
    "white space": (" \n\n ", [], ["empty answer"]),
}


@pytest.mark.parametrize(("text", "tasks", "reasons"), DROPPED.values(), ids=DROPPED.keys())
def test_discarded_blocks_have_a_reason(text, tasks, reasons):
    assert parse(text) == (tasks, reasons)


def test_only_the_last_task_of_a_truncated_answer_is_dropped():
    assert parse(PLAIN, "length") == ([RIVERS], ["cut off by the token limit"])
    assert parse(PLAIN.partition("5. Output")[0], "length") == ([RIVERS], ["cut off by the token limit"])
    assert parse(PLAIN, "eos") == ([RIVERS, WORDS], [])
    assert parse(PLAIN, None) == ([RIVERS, WORDS], [])


def test_a_dropped_block_keeps_its_number_and_its_text():
    tasks, dropped = parse_response(PLAIN.replace("Rhine, Rhone, Po.", ""), "stop", 3)
    assert [number for number, _ in tasks] == [1]
    assert dropped == [(0, "empty output", " Name three rivers.\n4. Input:\n<noinput>\n4. Output:\n\n###\n")]


def test_a_task_repeated_500_times_is_500_tasks():
    text = "###\n".join(f"{i}. Instruction: Say it again.\n{i}. Output:\nit\n" for i in range(4, 504))
    assert parse(text) == ([("Say it again.", "", "it")] * 500, [])


HOSTILE = {
    "one line": "a" * 2_000_000,
    "spaces": " " * 2_000_000 + "x",
    "hashes": "#" * 1_000_000,
    "stars behind a number": "4" + "*" * 1_000_000,
    "blank lines": "\n" * 1_000_000 + "x",
    "separators": "4. Instruction: x\n4. Output: y\n" + "###\n" * 200_000,
    "fences": "4. Instruction: x\n4. Output: y\n" + "```\n" * 200_000,
    "fences and separators": "4. Instruction: x\n4. Output: y\n```\n" + "###\n" * 200_000,
    "inputs": "4. Input:\n" * 50_000,
    "instructions": "4. Instruction:\n" * 50_000,
    "tasks": "4. Instruction: x\n4. Output: y\n###\n" * 30_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_answer_makes_the_parser_slow(text):
    """A second or two each; a search that is quadratic would hold the tests up for minutes."""
    tasks, dropped = parse_response(text, "stop", 3)
    assert tasks or dropped


# --- Rules -----------------------------------------------------------------------------------------------------------

RULED = {
    "Stop at once": "instruction too short",
    "Stop it at once": "",
    "word " * 150 + "end": "instruction too long",
    "word " * 150: "",
    "Explain what a hash map is.": "blacklisted word",
    "Go to the end of it.": "blacklisted word",
    "GO TO the end of it.": "blacklisted word",
    "Explain what mapping is here.": "",
    "Write a program that adds numbers.": "starts with Write a program",
    "Write a poem about two numbers.": "",
    "- Name three of the rivers": "starts with punctuation",
    "$5 is how many euros?": "starts with punctuation",
    "，请写一首关于春天的诗": "starts with punctuation",
    "请写一首关于春天的诗": "",
    "写诗吧": "instruction too short",
    "Übersetze diesen Satz ins Englische.": "",
    "¿Cómo se llama la capital de Francia?": "",
}


@pytest.mark.parametrize(("instruction", "reason"), RULED.items())
def test_rules(instruction, reason):
    assert broken_rule(instruction) == reason
    assert broken_rule(instruction, rules=[]) == ""


def test_rules_can_be_switched_off_one_by_one():
    assert broken_rule("Write a program", ["length"]) == "instruction too short"
    assert broken_rule("Write a program", ["program"]) == "starts with Write a program"
    assert broken_rule("Write a program", ["punctuation", "blacklist"]) == ""
    assert broken_rule("Say hello to them", blacklist=["hello"]) == "blacklisted word"
    assert broken_rule("Explain what a hash map is.", blacklist=[]) == ""


def test_blacklist_is_the_originals():
    assert " ".join(BLACKLIST) == (
        "image images graph graphs picture pictures file files map maps draw plot go to video audio music flowchart "
        "diagram"
    )


def test_find_word_in_string():
    assert find_word_in_string("map", "a MAP of").group() == "MAP"
    assert find_word_in_string("map", "a mapping") is None
    assert find_word_in_string("c++", "in C++, not C").group() == "C++"
    assert find_word_in_string("图片", "请描述这张图片的内容").group() == "图片"


def test_post_process_gpt3_response_as_a_fork_calls_it():
    response = {"text": PLAIN, "finish_reason": "stop"}
    assert post_process_gpt3_response(3, response) == []  # three words are too few
    response["text"] = PLAIN.replace("Name three", "Name the three").replace("Count the", "Count all the")
    assert post_process_gpt3_response(3, response) == [
        {"instruction": "Name the three rivers.", "input": "", "output": "Rhine, Rhone, Po."},
        {"instruction": "Count all the words.", "input": "one two", "output": "2"},
    ]
    assert post_process_gpt3_response(3, response | {"finish_reason": "length"}) == [
        {"instruction": "Name the three rivers.", "input": "", "output": "Rhine, Rhone, Po."}
    ]
    assert post_process_gpt3_response(3, None) == post_process_gpt3_response(3, response | {"text": None}) == []


# --- The prompt ------------------------------------------------------------------------------------------------------


def test_encode_prompt_is_the_wire_format():
    tasks = [
        {"instruction": " Name  the\nrivers: ", "input": "", "output": "Rhine"},
        {"instruction": "Count", "input": "one\ntwo", "output": "2"},
    ]
    assert encode_prompt(tasks, "head\n") == (
        "head\n"
        "###\n1. Instruction: Name the rivers\n1. Input:\n<noinput>\n1. Output:\nRhine\n"
        "###\n2. Instruction: Count\n2. Input:\none\ntwo\n2. Output:\n2\n"
        "###\n3. Instruction:"
    )
    assert encode_prompt([], "head\n") == "head\n###\n1. Instruction:"
    assert "\nList of 20 tasks:\n###\n1. Instruction: Name the rivers\n" in encode_prompt(tasks)


@pytest.mark.parametrize("line", ["###", "2. Instruction: x", "  4. Output: y", "**Input:** z"])
@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_a_task_that_would_read_as_two_is_not_shown(key, line):
    task = {"instruction": "a", "input": "b", "output": "c"}
    assert cannot_be_shown(task) == ""
    assert (
        cannot_be_shown(task | {key: f"a\n{line}\nb"})
        == f"its {key} holds the line {line.strip()!r}, which separates tasks"
    )


def test_a_very_long_task_is_not_shown():
    task = {"instruction": "a", "input": "b" * 50_000, "output": "c"}
    assert cannot_be_shown(task) == "it is 50,002 characters long"
