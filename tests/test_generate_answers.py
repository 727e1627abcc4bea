"""Answers as model families write them, disturbed in every way we know: a row is kept only if it is exactly theirs."""

import itertools
import json
import re

import pytest

from generate_instruction import parse_response

TASKS = [
    ("Suggest a name for a small bakery.", "", "Crumb & Co."),
    ("Put the words in alphabetical order.", "pear, fig, apple", "apple, fig, pear"),
    ("Write the first lines of a Dockerfile.", "", "FROM alpine\nRUN apk add curl\n\nCMD curl"),
    ("Turn the note into a polite request.", "send me the file", "Could you please send me the file?"),
    ("List two ways to save water.", "", "1. Fix taps.\n2. Collect rain."),
    ("Translate the greeting into French.", "Good evening", "Bonsoir"),
]
CHINESE = [
    ("请用一句话解释光合作用。", "", "植物利用阳光把水和二氧化碳变成养分。"),
    ("把下面的句子改成否定句。", "他喜欢喝茶。", "他不喜欢喝茶。"),
    ("写出两种节约用电的方法。", "", "1. 随手关灯。\n2. 使用节能灯。"),
]


def wire(
    tasks, first=4, between="###\n", head="{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n", no="<noinput>"
):
    parts = [head.format(n=n, i=i, x=x or no, o=o) for n, (i, x, o) in enumerate(tasks, first)]
    return between.join(parts)


STYLES = {
    "wire": wire,
    "wire, rules": lambda t: wire(t, between="---\n"),
    "wire, blank lines": lambda t: wire(t, between="\n"),
    "wire, from 1": lambda t: wire(t, first=1),
    "one line each": lambda t: wire(t, between="\n", head="{n}. Instruction: {i}\n{n}. Input: {x}\n{n}. Output: {o}\n"),
    "bold": lambda t: wire(t, between="\n", head="**{n}. Instruction:** {i}\n**{n}. Input:** {x}\n**{n}. Output:** {o}\n"),
    "bold label": lambda t: wire(t, head="{n}. **Instruction:** {i}\n{n}. **Input:** {x}\n{n}. **Output:** {o}\n"),
    "dash bullets": lambda t: wire(t, between="\n", head="{n}. **Instruction**: {i}\n   - **Input**: {x}\n   - **Output**: {o}\n"),
    "star bullets": lambda t: wire(t, between="\n", head="**Task {n}**\n\n* **Instruction:** {i}\n* **Input:** {x}\n* **Output:** {o}\n"),
    "headings": lambda t: wire(t, between="\n", head="## Task {n}\n\n### Instruction\n{i}\n\n### Input\n{x}\n\n### Output\n{o}\n"),
    "headings with a colon": lambda t: wire(t, between="\n---\n\n", head="### Task {n}\n**Instruction:**\n{i}\n**Input:**\n{x}\n**Output:**\n{o}\n"),
    "brackets": lambda t: wire(t, between="\n", head="[Instruction]\n{i}\n[Input]\n{x}\n[Output]\n{o}\n"),
    "parentheses": lambda t: wire(t, between="\n", head="({n}) Instruction: {i}\n({n}) Input: {x}\n({n}) Output: {o}\n"),
    "behind": lambda t: wire(t, head="Instruction {n}: {i}\nInput {n}: {x}\nOutput {n}: {o}\n"),
    "named tasks": lambda t: wire(t, between="\n", head="Task {n}:\nInstruction: {i}\nInput: {x}\nOutput: {o}\n", no="None"),
    "indented": lambda t: wire(t, between="\n", head="{n}. Instruction: {i}\n   Input: {x}\n   Output: {o}\n", no="N/A"),
    "dashes": lambda t: wire(t, between="\n", head="{n}. Instruction - {i}\n{n}. Input - {x}\n{n}. Output - {o}\n"),
    "response": lambda t: wire(t, head="{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Response:\n{o}\n"),
    "spanish": lambda t: wire(t, head="{n}. Instrucción: {i}\n{n}. Entrada: {x}\n{n}. Salida: {o}\n", no="ninguna"),
    "german": lambda t: wire(t, head="{n}. Anweisung: {i}\n{n}. Eingabe: {x}\n{n}. Ausgabe: {o}\n", no="keine"),
    "quoted block": lambda t: re.sub("(?m)^", "> ", wire(t, between="\n")),
    "fenced": lambda t: f"```\n{wire(t)}```\n",
    "fenced text": lambda t: f"Here you go:\n\n```text\n{wire(t)}```",
    "quotes": lambda t: wire([tuple(f'"{v}"' if v else v for v in task) for task in t], no='"<noinput>"'),
    "json": lambda t: json.dumps([{"instruction": i, "input": x, "output": o} for i, x, o in t]),
    "json in a fence": lambda t: "Sure!\n```json\n" + json.dumps(
        {"tasks": [{"instruction": i, "input": x, "output": o} for i, x, o in t]}, indent=2) + "\n```",
    "json lines": lambda t: "\n".join(json.dumps({"instruction": i, "input": x, "output": o}) for i, x, o in t),
    "windows": lambda t: wire(t).replace("\n", "\r\n"),
}  # fmt: skip
CHINESE_STYLES = {
    "chinese": lambda t: wire(t, head="{n}. 指令：{i}\n{n}. 输入：{x}\n{n}. 输出：{o}\n", no="无"),
    "full width": lambda t: wire(t, between="\n", head="（{n}）指令：{i}\n（{n}）输入：{x}\n（{n}）输出：{o}\n", no="无需输入"),
    "task headings": lambda t: wire(t, between="\n", head="**任务{n}：**\n- **指令：** {i}\n- **输入：** {x}\n- **输出：** {o}\n", no="（无）"),
    "english labels": lambda t: wire(t, no="无输入"),
    "brackets": lambda t: wire(t, between="\n", head="【指令】\n{i}\n【输入】\n{x}\n【输出】\n{o}\n", no="无"),
    "questions": lambda t: wire(t, between="\n", head="{n}. 问题：{i}\n{n}. 输入：{x}\n{n}. 回答：{o}\n", no="空"),
}  # fmt: skip
DRAFT = (
    "The user wants tasks.\n4. Instruction: Try a draft.\n4. Input:\n<noinput>\n4. Output:\nnot yet\nNow for real.\n"
)
# What stands around the tasks, or happens to them. All that is asked of these is that nothing wrong is kept.
AROUND = {
    "nothing": lambda text: text,
    "preamble": lambda text: f"Sure, here are more tasks:\n\n{text}",
    "think": lambda text: f"<think>\n{DRAFT}</think>\n\n{text}",
    "thought": lambda text: f"<thought>{DRAFT}</thought>{text}",
    "brackets": lambda text: f"[THINK]{DRAFT}[/THINK]\n{text}",
    "seed": lambda text: f"<seed:think>\n{DRAFT}</seed:think>\n{text}",
    "kimi": lambda text: f"◁think▷{DRAFT}◁/think▷\n{text}",
    "cohere": lambda text: f"<|START_THINKING|>{DRAFT}<|END_THINKING|>\n{text}",
    "only closed": lambda text: f"{DRAFT}</think>\n\n{text}",
    "closed at a line's end": lambda text: f"{DRAFT.strip()}</think>\n{text}",
    "harmony": lambda text: f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>",
    "harmony without marks": lambda text: f"analysis{DRAFT}assistantfinal{text}",
    "unfinished draft": lambda text: f"<think>\n{DRAFT}{text}",
    "im_end": lambda text: f"{text.rstrip()}<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\nAny time.",
    "eot": lambda text: f"{text.rstrip()}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nMore, please.",
    "gemma": lambda text: f"{text.rstrip()}<end_of_turn>\n<start_of_turn>user\nMore",
    "llama 2": lambda text: f"{text.rstrip()} </s>",
    "deepseek": lambda text: f"{text.rstrip()}<｜end▁of▁sentence｜>",
    "head": lambda text: f"<|start_header_id|>assistant<|end_header_id|>\n\n{text}",
    "answer tags": lambda text: f"<answer>\n{text}\n</answer>",
    "farewell behind a separator": lambda text: f"{text.rstrip()}\n###\nLet me know if you need more tasks!",
    "farewell": lambda text: f"{text.rstrip()}\n\nLet me know if you would like more tasks!",
    "farewell without the word": lambda text: f"{text.rstrip()}\n\nI hope this helps!",
    "chinese farewell": lambda text: f"{text.rstrip()}\n\n希望这些任务对您有帮助！",
    "note": lambda text: f"{text.rstrip()}\n\nNote: These tasks are all original.",
    "user turn": lambda text: f"{text.rstrip()}\n\nUser: Great, thanks!\nAssistant: You are welcome.",
    "next heading": lambda text: f"{text.rstrip()}\n\nTask 10:",
    "last separator": lambda text: f"{text.rstrip()}\n###\n",
    "next prompt": lambda text: f"{text.rstrip()}\n\nList of 20 tasks:\n###\n1. Instruction: Name a colour.\n1. Input:\n<noinput>\n1. Output:\nRed\n",
}  # fmt: skip
NEXT_PROMPT = ("Name a colour.", "", "Red")


def kept(text, finish_reason="stop"):
    return [(t["instruction"], t["input"], t["output"]) for _, t in parse_response(text, finish_reason, 3)[0]]


@pytest.mark.parametrize("name", STYLES)
def test_each_style_is_read_exactly(name):
    assert kept(STYLES[name](TASKS)) == TASKS


@pytest.mark.parametrize("name", CHINESE_STYLES)
def test_each_chinese_style_is_read_exactly(name):
    assert kept(CHINESE_STYLES[name](CHINESE)) == CHINESE


def test_whatever_stands_around_nothing_wrong_is_kept_and_little_is_lost():
    exact, total, wrong = 0, 0, []
    for (style, render), (around, change) in itertools.product(
        [*STYLES.items(), *CHINESE_STYLES.items()], AROUND.items()
    ):
        tasks = CHINESE if render in CHINESE_STYLES.values() else TASKS
        found = kept(change(render(tasks)))
        more = [NEXT_PROMPT] if around == "next prompt" else []
        wrong += [(style, around, row) for row in found if row not in [*tasks, *more]]
        exact, total = exact + len([row for row in found if row in tasks]), total + len(tasks)
    assert wrong == []
    assert exact / total > 0.85


LINES = re.compile(
    r"(?i)instr|\b(in|out)put|response|anweisung|eingabe|ausgabe|entrada|salida|指令|输入|输出|问题|回答|^#|^---|task"
)


def test_a_label_or_separator_that_is_missing_or_doubled_glues_no_tasks():
    wrong = []
    for style, render in {**STYLES, **CHINESE_STYLES}.items():
        tasks = CHINESE if render in CHINESE_STYLES.values() else TASKS
        lines = render(tasks).split("\n")
        for k, line in enumerate(lines):
            # An input that stood on the line goes with it, and the answer holds a task without one.
            known = [*tasks, *((i, "", o) for i, x, o in tasks if x and x in line)]
            if LINES.search(line):
                for changed in ([*lines[:k], *lines[k + 1 :]], [*lines[:k], line, *lines[k:]]):
                    wrong += [(style, line, row) for row in kept("\n".join(changed)) if row not in known]
    assert wrong == []


@pytest.mark.parametrize(
    "reason",
    ["length", "max_tokens", "MAX_TOKENS", "model_length", "content_filter", "error", "insufficient_system_resource"],
)
def test_what_was_cut_loses_its_last_task(reason):
    assert kept(STYLES["wire"](TASKS).rstrip()[:-3], reason) == TASKS[:-1]


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos", "end_turn", "eos_token", "stop_sequence", None])
def test_what_ended_by_itself_keeps_all(reason):
    assert kept(STYLES["wire"](TASKS), reason) == TASKS


def test_released_rows_that_end_like_separators_stay():
    ends = [
        "---\ntitle: x\n---",
        "Fill in: ______",
        "********",
        "Title\n=====",
        "a\n\n---",
        "Thank you!\n\nBest,\nAnn",
        "```\nx\n```",
    ]
    tasks = [("Write it down now.", "", end) for end in ends]
    assert kept(wire(tasks)) == tasks


def test_what_is_indented_with_its_label_is_read_without_the_indent():
    tasks = [
        ("Sort the food.", "apple, oat", "Fruit: apple\nGrain: oat"),
        ("Name a tree.", "", "Oak"),
        ("Count.", "a b", "2"),
    ]
    lines = [line for i, (a, b, c) in enumerate(tasks, 4) for line in (
        f"{i}. Instruction: {a}", f"   Input: {b or '<noinput>'}", f"   Output: {c}".replace("\n", "\n   "), "")]  # fmt: skip
    assert kept("\n".join(lines)) == tasks


QUOTING = [("Name a tree.", "", "Oak"), ("Name a fish.", "", "Trout"), ("Count the words.", "a b", "2")]


def test_a_task_that_quotes_others_is_dropped():
    quote = "6. Instruction: Go on.\n6. Input:\n1. Instruction: Add.\n1. Input:\n2, 3\n1. Output:\n5\n"
    quote += "6. Output:\n2. Instruction: Multiply.\n2. Input:\n2, 3\n2. Output:\n6\n"
    text = wire(QUOTING[:2]) + "###\n" + quote + "###\n" + wire(QUOTING[2:], first=7)
    assert kept(text) == QUOTING


@pytest.mark.parametrize("label", ["{n}. Explanation:", "**{n}. Note:**"])
def test_a_label_of_the_model_s_own_behind_an_output_is_not_part_of_it(label):
    heads = "{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n" + label + " Because.\n"
    assert kept(wire(QUOTING, head=heads)) == []


def test_the_last_output_of_an_open_answer_is_dropped_where_a_farewell_may_stand_in_it():
    tasks = [*QUOTING[:2], ("Write two verses.", "", "One line.\n\nAnother line.")]
    assert kept(wire(tasks)) == tasks[:2]
    assert kept(f"{wire(tasks)}###\n") == tasks


def test_an_output_that_holds_what_separates_tasks_is_dropped():
    tasks = [("Write two verses.", "", "One line.\n***\nAnother line."), *QUOTING]
    assert kept(wire(tasks, between="***\n")) == QUOTING
    assert kept(f"{wire(tasks[1:], between='***' + chr(10))}***\nThat was the set.") == QUOTING[:2]


PLAIN = "Instruction: {i}\nInput: {x}\nOutput: {o}\n"
# Lines between two tasks, above the labels and behind a blank line, that are no output's. {n} is a number.
ABOVE = (
    "Task #{n} of 20", "Task Five", "Item {n}", "Entry {n}:", "({n})", "[{n}]", "No. {n}", "T{n}:", "<b>Task {n}</b>",
    "_Task {n}_", "`Task {n}`", "{n}", "{n}.", "Question {n}.", "Exercice {n} :", "第五个任务", "任务（{n}）", "Next task:",
    "## Mathematics", "**Mathematics**", "Task V", "Here is task {n}:", "Moving on to the next one.",
)  # fmt: skip
BEHIND = (
    "(Word count: {n})", "</task>", "<br>", "<hr>", "&nbsp;", "(Task {n} complete)", "({n}/20)", "[End of Task {n}]",
    "**End of task {n}.**", "###END###", "---",
)  # fmt: skip


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("line", ABOVE)
def test_a_line_above_a_task_ends_in_no_output(line, numbered):
    head = "{n}. " * numbered + PLAIN.replace("\n", "\n{n}. ", 2) if numbered else PLAIN
    parts = [head.format(n=n, i=i, x=x or "<noinput>", o=o) for n, (i, x, o) in enumerate(TASKS, 4)]
    text = "".join(f"{part}\n{line.format(n=n)}\n" * (n < 9) + part * (n == 9) for n, part in enumerate(parts, 4))
    assert set(kept(text)) <= set(TASKS)


@pytest.mark.parametrize("between", ["", "\n", "\n###\n", "###\n"])
@pytest.mark.parametrize("line", BEHIND)
def test_a_line_behind_every_output_is_no_outputs(line, between):
    head = "{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n"
    for gap in ("", "\n"):
        text = wire(TASKS, between=between, head=f"{head}{gap}{line}\n")
        assert set(kept(text)) <= set(TASKS)
    assert set(kept(wire(TASKS, head=head.rstrip("\n") + " ###\n", between=""))) <= set(TASKS)


def test_what_an_output_ends_in_is_its_own_where_a_separator_closes_it():
    ends = [
        "Dear all,\n\nsee you.\n[Your Name]",
        "x = 1\nprint(x)\n# Output: 1",
        "<p>\nHi\n</p>",
        "a\n_____",
        "1, 2\n(3)",
    ]
    tasks = [(f"Write text number {k} as before.", "", end) for k, end in enumerate(ends * 2)]
    assert kept(wire(tasks) + "###\n")[:8] == tasks[:8]


@pytest.mark.parametrize("spelling", [
    "&lt;noinput&gt;", "<aucune entrée>", "<sem entrada>", "<sin entrada>", "<нет ввода>", "<nessun input>", "[blank]",
    "No additional input is required for this task.", "None (general knowledge)", "<noinput> (a question)", "null",
    "<noinput></noinput>", "There is no input for this task.", "（此任务无需输入）", "本题无输入", "特になし", "입력 없음", "Nil",
])  # fmt: skip
def test_more_spellings_of_no_input(spelling):
    assert kept(wire([("Name the capital of Peru.", spelling, "Lima"), TASKS[1]])) == [
        ("Name the capital of Peru.", "", "Lima"), TASKS[1],
    ]  # fmt: skip


def test_a_task_that_is_unclear_stays_so_where_all_end_in_one_line_of_form():
    fence = "```python\nx = 1"
    tasks = [(f"Do number {n} now.", "", output) for n, output in enumerate(["a", fence, "b", "c"])]
    text = wire(tasks, between="", head="{n}. Instruction: {i}\n{n}. Input: {x}\n{n}. Output: {o}\n&nbsp;\n")
    assert kept(text) == [task for task in tasks if task[2] != fence]
