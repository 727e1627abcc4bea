"""Answers in the manner of many model families, with the tasks that they truly hold: made by rule, with a seed.

`make(name, seed)` gives (text, finish_reason, tasks) for a request that showed three tasks. A case of which a part
cannot be told apart by anybody lists the tasks that a reader would be sure of.
"""

import json
import random
import re

# Tasks whose texts hold nothing that looks like a form.
EASY = [
    ("Name two uses of vinegar in the kitchen.", "", "It cleans kettles and dresses salads."),
    ("Translate the sentence into German.", "The train is late.", "Der Zug hat Verspätung."),
    ("Decide whether the number is prime.", "91", "No, it is 7 times 13."),
    ("Write a two-line poem about rain.", "", "Rain taps the sill all night,\nand morning drinks the light."),
    ("Sort the words by length.", "pear, fig, banana", "fig, pear, banana"),
    ("Fix the spelling mistake.", "I recieved the letter.", "I received the letter."),
    ("What do bees do in winter?", "", "They cluster around the queen and shiver to keep warm."),
    ("Give the opposite of each word.", "hot, tall, early", "cold, short, late"),
    ("Turn the statement into a question.", "She plays the cello.", "Does she play the cello?"),
]
# Tasks whose texts hold what could be taken for form.
HARD = [
    ("List three steps to boil an egg.", "", "1. Boil the water.\n2. Add the egg.\n3. Wait eight minutes."),
    ("Explain what a mortgage is to a child.", "", "A bank lends you money for a house.\n\nYou pay it back slowly."),
    ("Show a loop in Python.", "", "```python\nfor i in range(3):\n    print(i)\n```"),
    ("Write front matter for a page about bread.", "", "---\ntitle: Bread\ndraft: true\n---"),
    ("Write the letter O in Morse code.", "", "---"),
    ("Hide the code with asterisks.", "pin: 4711", "****"),
    ("Underline the heading.", "Notes", "Notes\n====="),
    ("Leave a gap for the verb.", "I ___ to school.", "I\n____\nto school."),
    ("Make a table of two fruits.", "", "| Fruit | Colour |\n| --- | --- |\n| Plum | blue |\n| Lime | green |"),
    ("Plan a small trip.", "", "### Before\nPack a bag.\n\n### After\nUnpack it."),
    ("Write a shell script that lists a folder.", "", "#!/bin/sh\n# list\nls -l\n"),
    ("Answer with one bold word.", "Is ice cold?", "**Yes**"),
    ("Write an advert for jam.", "", '"Summer in a jar."'),
    ("Strike the wrong word.", "big small", "<s>big</s> small"),
    ("Write a short talk between a guest and a waiter.", "", "User: The menu, please.\nAssistant: Here it is."),
    ("Write the record as JSON.", "Ann, 31", '{"name": "Ann", "age": 31}'),
    ("Name the tag that ends a paragraph.", "", "It is </p>, and </think> ends a thought."),
    ("Write a note to a neighbour about a parcel.", "", "Dear Kim,\n\nyour parcel is with us.\n\nBest regards\nLee"),
]
NUMBERED_TRAPS = [  # what an answer with numbered labels can hold, and one without cannot
    ("Draft a template for a prompt.", "", "Instruction: {what}\nInput: {text}\nOutput:"),
    ("Tell what the program returns.", "Input: n = 3\nOutput: 9", "The square of the number."),
    ("List the parts of a pump.", "", "1. Input: a pipe.\n2. Output: another pipe.\n3. A motor between them."),
    ("Explain the bullet style.", "", "**Input:** what goes in.\n**Output:** what comes out."),
]
CHINESE = [
    ("说出两种水果的名字。", "", "苹果和梨。"),
    ("把句子翻译成英文。", "今天下雨。", "It is raining today."),
    ("判断这句话是否正确。", "太阳从西边升起。", "不正确。"),
    ("列出三个节约用水的方法。", "", "1. 关紧水龙头。\n2. 缩短淋浴时间。\n3. 一水多用。"),
    ("用一句话解释什么是利息。", "", "利息是借钱所付的报酬。"),
]
JAPANESE = [
    ("果物の名前を二つ挙げてください。", "", "りんごと梨です。"),
    ("次の文を英語に訳してください。", "今日は雨です。", "It is raining today."),
    ("短い挨拶を書いてください。", "", "おはようございます。"),
]
KOREAN = [
    ("과일 이름 두 가지를 말하세요.", "", "사과와 배입니다."),
    ("문장을 영어로 번역하세요.", "오늘은 비가 옵니다.", "It is raining today."),
    ("짧은 인사말을 쓰세요.", "", "안녕하세요."),
]
OTHER = {
    "fr": [("Traduisez la phrase.", "Le train est en retard.", "The train is late."), ("Nommez deux fruits.", "", "La poire et la prune.")],
    "de": [("Übersetze den Satz.", "Der Zug kommt.", "The train is coming."), ("Nenne zwei Obstsorten.", "", "Birne und Pflaume.")],
    "pt": [("Traduza a frase.", "O trem atrasou.", "The train is late."), ("Cite duas frutas.", "", "Pera e ameixa.")],
    "it": [("Traduci la frase.", "Il treno è in ritardo.", "The train is late."), ("Nomina due frutti.", "", "Pera e prugna.")],
    "ru": [("Переведи предложение.", "Поезд опаздывает.", "The train is late."), ("Назови два фрукта.", "", "Груша и слива.")],
    "es": [("Traduce la frase.", "El tren llega tarde.", "The train is late."), ("Nombra dos frutas.", "", "Pera y ciruela.")],
}  # fmt: skip


def form(tasks, labels, between="###\n", first=4, none="<noinput>", end="\n", no_input_label=False):
    """The tasks one after another. `labels` are three formats of number n and text t."""
    blocks = []
    for n, (instruction, given, output) in enumerate(tasks, first):
        values = [instruction, given or none, output]
        lines = [
            label.format(n=n, t=value)
            for label, value in zip(labels, values, strict=True)
            if not (no_input_label and value == none)
        ]
        blocks.append("\n".join(lines) + "\n")
    if callable(between):
        text = blocks[0] if between(first).startswith("\n") else between(first) + blocks[0]
        for n, block in enumerate(blocks[1:], first + 1):
            text += between(n) + block
        return text.rstrip("\n") + end
    return between.join(blocks).rstrip("\n") + end


WIRE = ("{n}. Instruction: {t}", "{n}. Input:\n{t}", "{n}. Output:\n{t}")
SAME_LINE = ("{n}. Instruction: {t}", "{n}. Input: {t}", "{n}. Output: {t}")
BOLD = ("**{n}. Instruction:** {t}", "**{n}. Input:** {t}", "**{n}. Output:** {t}")
BOLD_PLAIN = ("**Instruction:** {t}", "**Input:** {t}", "**Output:** {t}")
PLAIN = ("Instruction: {t}", "Input: {t}", "Output: {t}")


def some(draw, count=4, hard=2, traps=0):
    tasks = draw.sample(EASY, count - hard - traps) + draw.sample(HARD, hard) + draw.sample(NUMBERED_TRAPS, traps)
    draw.shuffle(tasks)
    return tasks


def wire(draw, **choice):
    tasks = some(draw, **choice)
    return form(tasks, WIRE), tasks


def last_easy(draw, **choice):
    """Tasks of which the last has one line alone."""
    return [*some(draw, **choice), draw.choice([task for task in EASY if "\n" not in task[2]])]


def heading(template):
    return lambda n: template.format(n=n)


DRAFT = (
    "Okay, the user wants tasks. Let me draft some.\n\n4. Instruction: Ask about something with birds.\n4. Input:\n"
    "<noinput>\n4. Output:\nto be written\n###\n5. Instruction: Ask for a rhyme maybe.\n5. Output:\nwhatever\n"
    "That looks good."
)

FAMILIES = {}


def family(function):
    FAMILIES[function.__name__] = function
    return function


def simple(name, labels, between="\n", choose=some, clean="stop", **options):
    """A family that only writes the form in its own way."""

    def render(draw):
        tasks = choose(draw)
        return form(tasks, labels, between, **options), clean, tasks

    FAMILIES[name] = render


def wrapped(name, change, finish="stop", keep=slice(None)):
    """A family whose answer in the asked-for form has something around it."""

    def render(draw):
        tasks = last_easy(draw, hard=2, traps=1)
        return change(form(tasks, WIRE)), finish, tasks[keep]

    FAMILIES[name] = render


def easy(draw):
    return some(draw, hard=0)


def one_line(draw):
    return draw.sample([task for task in EASY if "\n" not in task[2]], 4)


def no_rules(draw):
    """Tasks for a form that has lines of dashes between tasks, or blank lines and no numbers."""
    return draw.sample(EASY, 3) + draw.sample([task for task in HARD if not re.search(r"^\W*$", task[2], re.M)], 1)


# --- Other ways to write the form ------------------------------------------------------------------------------------
simple("wire_with_traps", WIRE, "###\n", lambda draw: some(draw, 6, 3, 2))
simple("wire_traps_last", WIRE, "###\n", lambda draw: [*some(draw), *draw.sample(HARD + NUMBERED_TRAPS, 1)])
simple("wire_closed", WIRE, "###\n", end="\n###\n")
simple("wire_after_space", WIRE, "\n###\n\n")
simple("wire_restarted", WIRE, "###\n", first=1)
simple("same_line_blank", SAME_LINE, "\n")
simple("same_line_none", SAME_LINE, "", easy)
simple("bold_numbers", BOLD, "\n")
simple("bold_rule", BOLD, "\n---\n\n", no_rules)
simple("bold_label_after_number", ("{n}. **Instruction:** {t}", "   **Input:** {t}", "   **Output:** {t}"), "\n", easy)
simple("colon_outside", ("**{n}. Instruction**: {t}", "**{n}. Input**: {t}", "**{n}. Output**: {t}"), "###\n")
simple("bold_plain_heading", BOLD_PLAIN, heading("\n### Task {n}\n\n"), no_rules)
simple("bold_plain_hash_number", BOLD_PLAIN, heading("\n**Task #{n}**\n"), no_rules)
simple("bold_plain_example", BOLD_PLAIN, heading("\n**Example {n}:**\n\n"), no_rules)
simple("rule_and_heading", BOLD_PLAIN, heading("\n---\n\n## Task {n}\n\n"), no_rules)
simple("plain_blank", PLAIN, "\n", no_rules)
simple("plain_hash", PLAIN, "###\n", no_rules)
simple(
    "hash_labels", ("### Instruction {n}:\n{t}\n", "### Input {n}:\n{t}\n", "### Output {n}:\n{t}\n"), "\n", no_rules
)
simple("alpaca", ("### Instruction:\n{t}\n", "### Input:\n{t}\n", "### Response:\n{t}\n"), "\n", easy)
simple("number_behind", ("Instruction {n}: {t}", "Input {n}: {t}", "Output {n}: {t}"), "\n")
simple("round_bracket", ("{n}) Instruction: {t}", "{n}) Input: {t}", "{n}) Output: {t}"), "\n")
simple("square_bracket", ("[{n}] Instruction: {t}", "[{n}] Input: {t}", "[{n}] Output: {t}"), "\n")
simple("task_word", ("Task {n} Instruction: {t}", "Task {n} Input: {t}", "Task {n} Output: {t}"), "###\n")
simple("upper_case", ("{n}. INSTRUCTION: {t}", "{n}. INPUT: {t}", "{n}. OUTPUT: {t}"), "###\n")
simple("lower_case", ("{n}. instruction: {t}", "{n}. input: {t}", "{n}. output: {t}"), "###\n")
simple("n_a", SAME_LINE, "###\n", none="N/A")
simple("no_input_sentence", SAME_LINE, "\n", none="(No input required)")
simple("no_input_label", SAME_LINE, "###\n", no_input_label=True)
simple("empty_input", WIRE, "###\n", none="")
simple(
    "chinese",
    ("{n}. 指令：{t}", "{n}. 输入：{t}", "{n}. 输出：{t}"),
    "###\n",
    lambda draw: draw.sample(CHINESE, 4),
    none="无",
)
simple(
    "chinese_bold",
    ("**指令：** {t}", "**输入：** {t}", "**输出：** {t}"),
    heading("\n### 任务 {n}\n"),
    lambda draw: draw.sample(CHINESE, 3),
    none="无输入",
)
simple(
    "chinese_numerals",
    ("指令：{t}", "输入：{t}", "输出：{t}"),
    lambda n: f"任务{'零一二三四五六七八九'[n]}：\n",
    lambda draw: draw.sample(CHINESE, 4),
    none="（无）",
)
simple(
    "japanese",
    ("{n}. 指示：{t}", "{n}. 入力：{t}", "{n}. 出力：{t}"),
    "\n",
    lambda draw: draw.sample(JAPANESE, 3),
    none="なし",
)
simple(
    "korean",
    ("{n}. 지시: {t}", "{n}. 입력: {t}", "{n}. 출력: {t}"),
    "###\n",
    lambda draw: draw.sample(KOREAN, 3),
    none="없음",
)
simple(
    "french",
    ("{n}. Instruction : {t}", "{n}. Entrée : {t}", "{n}. Sortie : {t}"),
    "\n",
    lambda draw: OTHER["fr"],
    none="aucune",
)
simple(
    "german",
    ("{n}. Anweisung: {t}", "{n}. Eingabe: {t}", "{n}. Ausgabe: {t}"),
    "###\n",
    lambda draw: OTHER["de"],
    none="keine",
)
simple(
    "russian",
    ("{n}. Инструкция: {t}", "{n}. Ввод: {t}", "{n}. Вывод: {t}"),
    "###\n",
    lambda draw: OTHER["ru"],
    none="нет",
)

# --- Something around it ---------------------------------------------------------------------------------------------
wrapped("preamble", lambda text: f"Sure! Here are 17 more tasks:\n\n{text}")
wrapped("preamble_rule", lambda text: f"Certainly. Below you find the list.\n\n---\n\n{text}")
wrapped("farewell_behind_separator", lambda text: f"{text}###\nI hope these are of use. Do you want more?")
wrapped("farewell", lambda text: f"{text}\nLet me know if you need more tasks!")
wrapped("farewell_close", lambda text: f"{text}I hope these tasks help!", keep=slice(0, -1))
wrapped("farewell_note", lambda text: f"{text}\nNote: these examples cover several domains.", keep=slice(0, -1))
wrapped("eot_id", lambda text: f"{text.rstrip()}<|eot_id|>")
wrapped("eot_turn", lambda text: f"{text}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThanks!<|eot_id|>")
wrapped("endoftext", lambda text: f"{text}<|endoftext|>Once upon a time there was a fox.\n4. Output:\nno")
wrapped("slash_s", lambda text: f"{text.rstrip()}</s>")
wrapped(
    "slash_s_inst", lambda text: f"{text.rstrip()}</s><s>[INST] More, please. [/INST] 9. Instruction: x\n9. Output: y"
)
wrapped("end_of_turn", lambda text: f"{text.rstrip()}<end_of_turn>\n<start_of_turn>user\nmore")
wrapped("think_own_line", lambda text: f"<think>\n{DRAFT}\n</think>\n\n{text}")
wrapped("think_template", lambda text: f"{DRAFT}</think>\n{text}")
wrapped("thinking", lambda text: f"<thinking>{DRAFT}</thinking>{text}")
wrapped("bracket_think", lambda text: f"[THINK]{DRAFT}[/THINK]{text}")
wrapped("kimi", lambda text: f"◁think▷{DRAFT}◁/think▷{text}")
wrapped("seed_think", lambda text: f"<seed:think>\n{DRAFT}\n</seed:think>\n{text}")
wrapped(
    "harmony",
    lambda text: (
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"
    ),
)
wrapped("unclosed_thought", lambda text: f"<thought>\n{text}", "length", keep=slice(0, 0))
wrapped("cohere_unclosed", lambda text: f"<|START_THINKING|>{text}", keep=slice(0, 0))
wrapped("fence_text", lambda text: f"Here it is:\n\n```text\n{text}```\n", keep=slice(None))
wrapped("carriage_return", lambda text: text.replace("\n", "\r"))
wrapped("crlf", lambda text: text.replace("\n", "\r\n"))
wrapped("goes_on", lambda text: text.removeprefix("4. Instruction:"))
wrapped("content_filter", lambda text: text, "content_filter", keep=slice(0, -1))
wrapped("cut_behind_separator", lambda text: f"{text}###\n9. Instr", "max_tokens")
wrapped(
    "next_document",
    lambda text: f"{text}\nList of 20 tasks:\n###\n1. Instruction: Name a bird.\n1. Input:\n<noinput>\n1. Out",
    "length",
    keep=slice(0, -1),
)


# --- Something wrong in the middle -----------------------------------------------------------------------------------
def broken(name, pattern, replacement, lost, labels=WIRE, between="###\n", choose=easy):
    """A family that goes wrong at task 5; `lost` are the numbers of the tasks that nobody can be sure of."""

    def render(draw):
        tasks = choose(draw)
        text = form(tasks, labels, between)
        text, changes = re.subn(pattern, replacement, text, count=1)
        assert changes == 1, name
        return text, "stop", [task for n, task in enumerate(tasks, 4) if n not in lost]

    FAMILIES[name] = render


broken("label_left_out", r"5\. Instruction: ", "5. ", {5})
broken("label_and_number_left_out", r"5\. Instruction: ", "", {5})
broken("label_misspelt", r"5\. Instruction", "5. Instrution", {5})
broken("label_misspelt_no_separator", r"###\n5\. Instruction", "5. Intsruction", {4, 5})
broken("output_misspelt", r"5\. Output", "5. Ouput", {5})
broken("output_left_out", r"5\. Output:\n", "", {5})
broken("input_misspelt", r"5\. Input", "5. Imput", {5})
broken("two_outputs", r"(5\. Output:\n)", r"\1first\n\1", {5})
broken("output_other_number", r"5\. Output", "6. Output", {5})
broken("separator_left_out", r"###\n(5\. Instruction)", r"\1", set())
broken(
    "number_skipped",
    r"5\. Instruction(.*\n)5\. Input([^#]*\n)5\. Output",
    r"9. Instruction\g<1>9. Input\g<2>9. Output",
    set(),
)
broken("no_label_no_separator_plain", r"\nInstruction: ", "\n", {4, 5}, PLAIN, "\n")
broken("bold_misspelt", r"\*\*5\. Instruction", "**5. Instuction", {4, 5}, BOLD, "\n")


@family
def json_list(draw):
    tasks = some(draw, 5, 3)
    rows = [{"instruction": i, "input": g, "output": o} for i, g, o in tasks]
    return json.dumps(rows, ensure_ascii=False, indent=draw.choice([None, 2])), "stop", tasks


@family
def json_fenced_cut(draw):
    tasks = some(draw, 5, 3)
    rows = [{"instruction": i, "input": g or "<noinput>", "output": o} for i, g, o in tasks]
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    return f"Here you go:\n\n```json\n{text[: text.rindex('output')]}", "length", tasks[:-1]


@family
def quoted_in_fence_plain(draw):
    tasks = draw.sample(EASY, 3)
    tasks.insert(1, ("Show a prompt in a code block.", "", "```\nInstruction: Sum up.\nInput: x\nOutput: y\n```"))
    return form(tasks, PLAIN, "\n"), "stop", tasks


# --- More of each kind ---
simple(
    "title_line",
    ("   - **Instruction:** {t}", "   - **Input:** {t}", "   - **Output:** {t}"),
    lambda n: f"{n}. **A short task**\n",
    easy,
)
simple("hash_number", ("#{n} Instruction: {t}", "#{n} Input: {t}", "#{n} Output: {t}"), "\n", easy)
simple("instruction_hash", ("Instruction #{n}: {t}", "Input #{n}: {t}", "Output #{n}: {t}"), "\n", easy)
simple("no_space", ("{n}.Instruction:{t}", "{n}.Input:{t}", "{n}.Output:{t}"), "###\n")
simple("stars", SAME_LINE, "***\n", no_rules)
simple("underscores", SAME_LINE, "\n___\n\n", no_rules)
simple("equals", SAME_LINE, "==========\n", no_rules)
simple("h2_number", BOLD_PLAIN, heading("\n## {n}.\n"), easy)
simple("bullet_dot", ("• Instruction: {t}", "• Input: {t}", "• Output: {t}"), "\n", easy)
simple("star_bullet_num", ("* {n}. Instruction: {t}", "* {n}. Input: {t}", "* {n}. Output: {t}"), "\n", easy)
simple(
    "fullwidth_digits",
    ("４．指示：{t}", "４．入力：{t}", "４．出力：{t}"),
    "\n",
    lambda d: d.sample(JAPANESE, 1),
    none="なし",
)
simple("xml", ("<instruction>{t}</instruction>", "<input>{t}</input>", "<output>{t}</output>"), "\n", easy, none="")
simple(
    "xml_task",
    ("<task>\n<instruction>{t}</instruction>", "<input>{t}</input>", "<output>{t}</output>\n</task>"),
    "\n",
    easy,
    none="",
)
simple("q_a", ("**Question:** {t}", "**Context:** {t}", "**Answer:** {t}"), "\n", easy, none="N/A")
simple("prompt_response", ("Prompt: {t}", "Input: {t}", "Response: {t}"), "\n", easy)
simple(
    "blank_lines",
    ("{n}. Instruction:\n\n{t}\n", "{n}. Input:\n\n{t}\n", "{n}. Output:\n\n{t}\n"),
    "###\n\n",
    lambda d: some(d, 5, 2),
)
simple(
    "italics_none",
    ("**{n}. Instruction:** {t}", "**{n}. Input:** {t}", "**{n}. Output:** {t}"),
    "\n",
    easy,
    none="_None_",
)
simple("leave_blank", SAME_LINE, "###\n", easy, none="(leave blank)")
simple("underline_label", ("__{n}. Instruction:__ {t}", "__{n}. Input:__ {t}", "__{n}. Output:__ {t}"), "\n", easy)
simple(
    "h4_labels", ("#### Instruction\n{t}", "#### Input\n{t}", "#### Output\n{t}"), heading("\n### Task {n}\n\n"), easy
)
simple("task_title", ("Instruction: {t}", "Input: {t}", "Output: {t}"), heading("\n**Task {n}: A small job**\n"), easy)
simple(
    "pt",
    ("{n}. Instrução: {t}", "{n}. Entrada: {t}", "{n}. Saída: {t}"),
    "###\n",
    lambda d: OTHER["pt"],
    none="nenhuma",
)
simple(
    "it",
    ("{n}. Istruzione: {t}", "{n}. Input: {t}", "{n}. Output: {t}"),
    "###\n",
    lambda d: OTHER["it"],
    none="nessuno",
)
simple(
    "zh_trad",
    ("**{n}. 指令：**{t}", "**{n}. 輸入：**{t}", "**{n}. 輸出：**{t}"),
    "\n",
    lambda d: d.sample(CHINESE, 3),
    none="無",
)
simple(
    "zh_shili",
    ("指令：{t}", "输入：{t}", "输出：{t}"),
    heading("\n示例{n}：\n"),
    lambda d: d.sample(CHINESE, 3),
    none="无",
)
simple(
    "zh_di",
    ("指令：{t}", "输入：{t}", "输出：{t}"),
    heading("\n第{n}题\n"),
    lambda d: d.sample(CHINESE, 3),
    none="无需输入。",
)
simple("zh_q", ("{n}. 任务：{t}", "{n}. 输入：{t}", "{n}. 输出：{t}"), "\n", lambda d: d.sample(CHINESE, 3), none="无")
simple("dash_en", ("{n}. Instruction – {t}", "{n}. Input – {t}", "{n}. Output – {t}"), "\n", easy)
simple("angle", ("<Instruction>: {t}", "<Input>: {t}", "<Output>: {t}"), "\n", easy, none="None")
simple(
    "fenced_io", ("**{n}. Instruction:** {t}", "**{n}. Input:**\n{t}", "**{n}. Output:**\n{t}"), "\n---\n\n", no_rules
)
simple("inner_colon", ("{n}: Instruction: {t}", "{n}: Input: {t}", "{n}: Output: {t}"), "\n", easy)
simple("dotted", ("{n}.1 Instruction: {t}", "{n}.2 Input: {t}", "{n}.3 Output: {t}"), "\n", easy)


@family
def indented_multiline(d):
    t = d.sample([x for x in EASY + HARD if "\n" in x[2] and "```" not in x[2] and "\n\n" not in x[2]], 4)
    out = ""
    for n, (i, g, o) in enumerate(t, 4):
        o = "\n".join("     " + line for line in o.split("\n")).strip()
        out += f"{n}. **Instruction:** {i}\n   - **Input:** {g or 'None'}\n   - **Output:** {o}\n\n"
    return out, "stop", t


@family
def yaml_list(d):
    t = easy(d)
    out = "".join(
        f"- instruction: {i}\n  input: {g or ''}\n  output: |\n    " + o.replace("\n", "\n    ") + "\n" for i, g, o in t
    )
    return out, "stop", t


@family
def jsonl(d):
    t = some(d, 5, 2)
    return "\n".join(json.dumps({"instruction": i, "input": g, "output": o}) for i, g, o in t), "stop", t


@family
def json_tasks(d):
    t = some(d, 5, 2)
    return (
        json.dumps(
            {
                "tasks": [
                    {"id": n, "Instruction": i, "Input": g or None, "Output": o} for n, (i, g, o) in enumerate(t, 4)
                ]
            },
            indent=1,
        )
        + "\nI hope this helps!",
        "stop",
        t,
    )


@family
def py_single_quotes(d):
    t = easy(d)
    return repr([{"instruction": i, "input": g, "output": o} for i, g, o in t]), "stop", t


@family
def md_table(d):
    t = d.sample([x for x in EASY if "\n" not in x[2]], 4)
    return (
        "| # | Instruction | Input | Output |\n|---|---|---|---|\n"
        + "".join(f"| {n} | {i} | {g or '<noinput>'} | {o} |\n" for n, (i, g, o) in enumerate(t, 4)),
        "stop",
        t,
    )


@family
def double_label(d):
    t = easy(d)
    return "4. Instruction: " + form(t, WIRE), "stop", t[1:]


wrapped("assistantfinal", lambda x: f"analysis{DRAFT}assistantfinal{x}")
wrapped("harmony_no_final", lambda x: f"<|channel|>analysis<|message|>{x}", keep=slice(0, 0))
wrapped("thought_process", lambda x: f"Here is my thought process:\n{DRAFT}\nHere is my response:\n{x}")
wrapped(
    "begin_of_thought",
    lambda x: f"<|begin_of_thought|>\n{DRAFT}\n<|end_of_thought|>\n\n<|begin_of_solution|>\n{x}<|end_of_solution|>",
)
wrapped("cohere", lambda x: f"<|START_THINKING|>{DRAFT}<|END_THINKING|><|START_RESPONSE|>{x}<|END_RESPONSE|>")
wrapped("think_answer", lambda x: f"<think>{DRAFT}</think>\n<answer>\n{x}</answer>")
wrapped("reasoning_upper", lambda x: f"<REASONING>\n{DRAFT}\n</REASONING>\n{x}")
wrapped("scratchpad", lambda x: f"<scratchpad>\n{DRAFT}\n</scratchpad>\n\n{x}")
wrapped("think_preamble", lambda x: f"Alright.\n<think>\n{DRAFT}\n</think>\n{x}")
wrapped("think_twice", lambda x: f"<think>{DRAFT}</think>\n<think>{DRAFT}</think>\n{x}")
wrapped(
    "template_unclosed_cut",
    lambda x: f"Okay, let me think about what the user wants.\n\n{x}",
    "length",
    keep=slice(0, 0),
)
wrapped("gemma4", lambda x: f"<|channel>thought\n{DRAFT}<channel|>{x}")
wrapped("inst_turn", lambda x: x.rstrip() + " [/INST] Thanks, these are great.")
wrapped("user_tag", lambda x: x + "<|user|>\nMore please\n<|assistant|>\n4. Instruction: a\n4. Output: b")
wrapped("human_turn", lambda x: x + "\n### Human: Thanks!\n### Assistant: You are welcome.", keep=slice(0, -1))
wrapped("human_plain", lambda x: x + "\nHuman: Thanks!\n\nAssistant: You are welcome.", keep=slice(0, -1))
wrapped("eos_lt", lambda x: x.rstrip() + "<eos>")
wrapped("deepseek_eos", lambda x: x.rstrip() + "<｜end▁of▁sentence｜>")
wrapped("phi_end", lambda x: x + "<|end|>")
wrapped("eom", lambda x: x + "<|eom_id|>")
wrapped("end_of_text", lambda x: x.rstrip() + "<|end_of_text|>")
wrapped("glm", lambda x: x + "<|observation|>")
wrapped("start_header", lambda x: "<|start_header_id|>assistant<|end_header_id|>\n\n" + x)
wrapped("im_start", lambda x: "<|im_start|>assistant\n" + x + "<|im_end|>")
wrapped("bom", lambda x: "\ufeff" + x)
wrapped("end_mark", lambda x: x + "\n[END]", keep=slice(0, -1))
wrapped("end_list", lambda x: x + "\n(End of list)")
wrapped("fare_es", lambda x: x + "\n¡Espero que estas tareas te sean útiles!")
wrapped("fare_zh", lambda x: x + "\n希望这些任务对您有帮助！")
wrapped("fare_zh2", lambda x: x + "\n以上是17个任务，如需更多请告诉我。")
wrapped("fare_fr", lambda x: x + "\nN'hésitez pas à me demander d'autres tâches.")
wrapped("fare_de", lambda x: x + "\nIch hoffe, diese Aufgaben helfen weiter.")
wrapped("fare_ja", lambda x: x + "\n以上、4つのタスクを作成しました。")
wrapped("fare_rule", lambda x: x + "\n---\n\nThis list covers language, arithmetic and daily life.", keep=slice(0, -1))
wrapped("fare_total", lambda x: x + "\n---\n**Total: 20 tasks**", keep=slice(0, -1))
wrapped("fare_cont", lambda x: x + "\nWould you like me to continue with the remaining ones?", keep=slice(0, -1))
wrapped(
    "fare_variety", lambda x: x + "\nThese cover a wide variety of topics and difficulty levels.", keep=slice(0, -1)
)
wrapped("fare_feel", lambda x: x + "\nFeel free to adjust them as you see fit.", keep=slice(0, -1))
wrapped("fare_omit", lambda x: x + "\n... (and so on up to 20)", keep=slice(0, -1))
wrapped("fare_omit2", lambda x: x + "\n[Tasks 8-20 follow the same form]")
wrapped("fare_hash_head", lambda x: x + "###\n\nLet me know!")
wrapped("next_head", lambda x: x + "###\n9. Instruction:")
wrapped("next_head_nosep", lambda x: x + "\n9. Instruction:")
wrapped("next_task_head", lambda x: x + "\nTask 9:", "length", keep=slice(0, -1))
wrapped("tool_calls", lambda x: x, "tool_calls", keep=slice(0, -1))
wrapped("STOP", lambda x: x, "STOP")
wrapped("end_turn", lambda x: x, "end_turn")
wrapped("eos_token", lambda x: x, "eos_token")
wrapped("safety", lambda x: x[:-2], "SAFETY", keep=slice(0, -1))
wrapped("fence_unclosed", lambda x: "```\n" + x)
wrapped("fence_md_bye", lambda x: "```markdown\n" + x + "```\n\nLet me know if you want more.")
wrapped("bracket_answer", lambda x: "[ANSWER]\n" + x + "[/ANSWER]")
wrapped("preamble_head", lambda x: "List of 20 tasks:\n###\n" + x)
broken("both_labels_out", r"5\. Instruction: (.*)\n5\. Input:\n", r"\1\n", {5})
broken("instruction_word_spanish", r"5\. Instruction", "5. Instrucción", set())
broken("extra_label", r"5\. Output:\n", "5. Hint: think\n5. Output:\n", {5})
broken("no_colon", r"5\. Instruction: ", "5. Instruction ", {5})
broken("semicolon", r"5\. Instruction:", "5. Instruction;", {5})
broken("glued_two_lines", r"\n###\n5\. Instruction", r" 5. Instruction", {4, 5})
broken("glued_sep", r"\n###\n5\. Instruction", r" ### 5. Instruction", {4, 5})
broken("misspelt_nosep_same", r"5\. Instruction", "5. Instrucion", {4, 5}, SAME_LINE, "\n")
broken("label_out_bold", r"\*\*5\. Instruction:\*\* ", "**5.** ", {4, 5}, BOLD, "\n")
broken(
    "label_out_boldplain",
    r"(### Task 5\n\n)\*\*Instruction:\*\* ",
    r"\1",
    {4, 5},
    BOLD_PLAIN,
    heading("\n### Task {n}\n\n"),
)
broken("output_out_boldplain", r"\*\*Output:\*\* ", "", {4}, BOLD_PLAIN, heading("\n### Task {n}\n\n"))
broken("output_answer", r"5\. Output", "5. Answer", {5})
broken("explanation", r"(5\. Output:\n.*\n)", r"\g<1>5. Explanation: because it is so.\n", {5})
broken("rationale_bold", r"(\*\*5\. Output:\*\* .*\n)", r"\g<1>**5. Rationale:** because it is so.\n", {5}, BOLD, "\n")
broken("labels_swapped", r"5\. Input:\n(.*)\n5\. Output:\n(.*)\n", r"5. Output:\n\2\n5. Input:\n\1\n", {5})
broken("midthink", r"###\n5\.", "###\n<think>hm</think>\n5.", set())
broken("midthink2", r"###\n5\.", "<think>what next</think>\n5.", {4})
broken("category", r"5\. Input:", "5. Category: Language\n5. Input:", {5})


@family
def refusal(d):
    return "I'm sorry, I can't help with that.\nInput: none given.", "stop", []


@family
def only_prose(d):
    return "1. Think of a task.\n2. Write the instruction: keep it short.\n3. Output: check it.", "stop", []


simple(
    "qwen_bold_head",
    ("**Instruction:** {t}", "**Input:** {t}", "**Output:**  \n{t}"),
    heading("\n---\n\n### **Task {n}**\n\n"),
    easy,
)
simple(
    "claude_nested",
    ("**Instruction:**\n{t}\n", "**Input:**\n{t}\n", "**Output:**\n{t}\n"),
    heading("\n---\n\n**{n}.**\n\n"),
    easy,
)
simple("mixtral_nums", ("{n}. Instruction: {t}", "Input: {t}", "Output: {t}"), "\n", easy)
simple("phi_colon_space", ("{n} . Instruction : {t}", "{n} . Input : {t}", "{n} . Output : {t}"), "###\n", easy)
simple("llama2_stars", ("* Instruction: {t}", "* Input: {t}", "* Output: {t}"), heading("\n**Task {n}**\n\n"), easy)
simple("trailing_spaces", ("{n}. Instruction: {t}  ", "{n}. Input: {t}  ", "{n}. Output: {t}  "), "###  \n")
simple(
    "indent_all",
    ("    {n}. Instruction: {t}", "    {n}. Input: {t}", "    {n}. Output: {t}"),
    "    ###\n",
    lambda d: d.sample([t for t in EASY if "\n" not in t[2]], 4),
)
simple("tabs", ("{n}.\tInstruction:\t{t}", "{n}.\tInput:\t{t}", "{n}.\tOutput:\t{t}"), "###\n")
simple("long_sep", WIRE, "########\n")
simple("hash_blank", WIRE, "\n#\n\n", easy)
simple("tilde", SAME_LINE, "~~~~~\n", easy)
simple("dots_sep", SAME_LINE, "...\n", easy)
simple(
    "h3_number_title",
    ("**Instruction:** {t}", "**Input:** {t}", "**Output:** {t}"),
    heading("\n### {n}. A daily matter\n"),
    easy,
)
simple("emoji_heading", ("**Instruction:** {t}", "**Input:** {t}", "**Output:** {t}"), heading("\n📝 Task {n}\n"), easy)
simple("paren_label", ("({n}) **Instruction**: {t}", "({n}) **Input**: {t}", "({n}) **Output**: {t}"), "\n", easy)
simple("Instructions_plural", ("Instructions: {t}", "Input: {t}", "Output: {t}"), "\n###\n", easy)
simple("expected_output", ("{n}. Instruction: {t}", "{n}. Input: {t}", "{n}. Expected Output: {t}"), "###\n", easy)
simple("output_paren", ("{n}. Instruction: {t}", "{n}. Input (optional): {t}", "{n}. Output: {t}"), "###\n", easy)
simple(
    "code_fenced_fields",
    ("**Instruction:** {t}", "**Input:**\n```\n{t}\n```", "**Output:**\n```\n{t}\n```"),
    heading("\n### Task {n}\n"),
    easy,
)
simple(
    "double_newline_none",
    ("{n}. Instruction: {t}", "{n}. Input:\n{t}", "{n}. Output:\n{t}"),
    "\n\n\n###\n\n\n",
    easy,
    none="<noinput>\n",
)
simple(
    "ar",
    ("{n}. التعليمات: {t}", "{n}. المدخلات: {t}", "{n}. المخرجات: {t}"),
    "###\n",
    lambda d: [("اكتب اسم فاكهة.", "", "تفاحة"), ("ترجم الجملة.", "Good day", "يوم سعيد")],
    none="لا يوجد",
)
simple(
    "vi",
    ("{n}. Hướng dẫn: {t}", "{n}. Đầu vào: {t}", "{n}. Đầu ra: {t}"),
    "###\n",
    lambda d: [("Kể tên một loại quả.", "", "Táo"), ("Dịch câu.", "Good day", "Chào")],
    none="Không có",
)
simple(
    "es_accent",
    ("**{n}. Instrucción:** {t}", "**{n}. Entrada:** {t}", "**{n}. Salida:** {t}"),
    "\n",
    lambda d: OTHER["es"],
    none="Ninguna",
)
simple(
    "fr_space",
    ("**{n}. Instruction :** {t}", "**{n}. Entrée :** {t}", "**{n}. Sortie :** {t}"),
    "\n",
    lambda d: OTHER["fr"],
    none="(aucune)",
)
simple(
    "ko_bold",
    ("**지시문:** {t}", "**입력:** {t}", "**출력:** {t}"),
    heading("\n### 과제 {n}\n"),
    lambda d: d.sample(KOREAN, 3),
    none="(없음)",
)
simple("zh_bracket", ("【指令】{t}", "【输入】{t}", "【输出】{t}"), "\n", lambda d: d.sample(CHINESE, 4), none="无")
simple(
    "zh_dun", ("{n}、指令：{t}", "{n}、输入：{t}", "{n}、输出：{t}"), "\n", lambda d: d.sample(CHINESE, 4), none="<无>"
)
simple(
    "zh_task_num",
    ("任务{n}指令：{t}", "任务{n}输入：{t}", "任务{n}输出：{t}"),
    "\n",
    lambda d: d.sample(CHINESE, 4),
    none="无",
)
simple(
    "ja_kadai",
    ("指示: {t}", "入力: {t}", "出力: {t}"),
    heading("\n## 課題{n}\n"),
    lambda d: d.sample(JAPANESE, 3),
    none="（なし）",
)
simple(
    "all_quoted",
    ('{n}. Instruction: "{t}"', '{n}. Input: "{t}"', '{n}. Output: "{t}"'),
    "###\n",
    lambda d: d.sample([t for t in EASY if "\n" not in t[2]], 4),
)
simple("instr_quoted_only", ('{n}. Instruction: "{t}"', "{n}. Input: {t}", "{n}. Output: {t}"), "###\n", easy)
simple("italic_instr", ("{n}. Instruction: *{t}*", "{n}. Input: {t}", "{n}. Output: {t}"), "###\n", easy)
simple(
    "bold_outputs_real",
    WIRE,
    "###\n",
    lambda d: [
        ("Give one word for big.", "", "**Large**"),
        ("Give one word for small.", "", "**Tiny**"),
        ("Give one word for fast.", "", "**Quick**"),
    ],
)
simple(
    "quoted_outputs_real",
    WIRE,
    "###\n",
    lambda d: [
        ("Write a slogan for tea.", "", '"Sip slowly."'),
        ("Write a slogan for soap.", "", '"Clean days."'),
        ("Write a slogan for ink.", "", '"Say more."'),
    ],
)
simple(
    "rules_real",
    WIRE,
    "###\n",
    lambda d: [
        ("Draw a line of dashes.", "", "-----"),
        ("Draw a line of stars.", "", "*****"),
        ("Draw a long line.", "", "=========="),
    ],
)
simple(
    "all_yaml",
    WIRE,
    "###\n",
    lambda d: [
        ("Give YAML for tea.", "", "---\na: 1\n---"),
        ("Give YAML for soap.", "", "---\nb: 2\n---"),
        ("Give YAML for ink.", "", "---\nc: 3\n---"),
    ],
)
simple(
    "rule_all_yaml",
    WIRE,
    "---\n",
    lambda d: [
        ("Give YAML for tea.", "", "---\na: 1\n---"),
        ("Give YAML for soap.", "", "---\nb: 2\n---"),
        ("Give YAML for ink.", "", "---\nc: 3\n---"),
    ],
)
simple(
    "numbers_out",
    WIRE,
    "###\n",
    lambda d: [
        ("What is two plus two?", "", "4"),
        ("Add two and three.", "", "5."),
        ("Name a number.", "", "6) six"),
        ("Double it.", "7", "14"),
    ],
)
simple(
    "list_from_n",
    WIRE,
    "###\n",
    lambda d: [
        ("Continue the list.", "1. a\n2. b\n3. c", "4. d\n5. e"),
        ("Continue the list.", "3. x\n4. y", "5. z\n6. w"),
        ("Say hi.", "", "hi"),
    ],
)
simple(
    "steps_labels",
    WIRE,
    "###\n",
    lambda d: [
        ("Describe a form.", "", "Instruction: fill it in.\n\nInput: your name.\n\nOutput: a card."),
        ("Give an example.", "", "Input:\n3\nOutput:\n9"),
        ("Say hi.", "", "hi"),
    ],
)
simple(
    "bold_inside_boldplain",
    BOLD_PLAIN,
    heading("\n### Task {n}\n"),
    lambda d: [
        ("Compare cats and dogs.", "", "**Cats:** quiet.\n**Dogs:** loud."),
        ("Say hi.", "", "hi"),
        ("Say ho.", "", "ho"),
    ],
)


@family
def plain_trap(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Give a prompt example.", "", "Instruction: Sum up.\nInput: x\nOutput: y"),
        ("Say ho.", "", "ho"),
        ("Say hu.", "", "hu"),
    ]
    return form(t, PLAIN, "\n"), "stop", [t[0], t[2], t[3]]


@family
def plain_trap_hash(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Give a prompt example.", "", "Instruction: Sum up.\nInput: x\nOutput: y"),
        ("Say ho.", "", "ho"),
        ("Say hu.", "", "hu"),
    ]
    return form(t, PLAIN, "###\n"), "stop", [t[0], t[2], t[3]]


@family
def heading_trap(d):
    t = [("Say hi.", "", "hi"), ("List exercises.", "", "Task 1\nRun.\nTask 2\nJump."), ("Say ho.", "", "ho")]
    return form(t, BOLD_PLAIN, heading("\n### Task {n}\n")), "stop", [t[0], t[2]]


@family
def few_shot_hash(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Write a few-shot prompt.", "", "Review: good\nMood: +\n###\nReview: bad\nMood: -"),
        ("Say ho.", "", "ho"),
    ]
    return form(t, WIRE), "stop", [t[0], t[2]]


@family
def few_shot_last(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Say ho.", "", "ho"),
        ("Write a few-shot prompt.", "", "Review: good\nMood: +\n###\nReview: bad\nMood: -"),
    ]
    return form(t, WIRE), "stop", t[:2]


@family
def md_rule_inside(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Write two sections.", "", "One\n\n---\n\nTwo"),
        ("Say ho.", "", "ho"),
        ("Say hu.", "", "hu"),
    ]
    return form(t, BOLD, "\n---\n\n"), "stop", t


@family
def code_with_hash(d):
    t = [
        ("Write a banner.", "", "```sh\n###\n# x\n###\n```"),
        ("Say ho.", "", "ho"),
        ("Comment code.", "", "# Input: n\n# Output: n*n\nx = n * n"),
    ]
    return form(t, WIRE), "stop", t


@family
def unclosed_code(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Show code.", "", "```python\nprint(1)"),
        ("Say ho.", "", "ho"),
        ("Show more.", "", "```python\nprint(2)\n```"),
    ]
    return form(t, WIRE), "stop", [t[0], t[2], t[3]]


@family
def unclosed_bare(d):
    t = [
        ("Say hi.", "", "hi"),
        ("Show code.", "", "```\nprint(1)"),
        ("Say ho.", "", "ho"),
        ("Show more.", "", "```\nprint(2)\n```"),
        ("Say hu.", "", "hu"),
    ]
    return form(t, WIRE), "stop", [t[0], t[2], t[3], t[4]]


@family
def restart_mid(d):
    t = some(d, 2, 0) + []
    u = some(d, 2, 0)
    return form(t, WIRE) + "###\n" + form(u, WIRE, first=1), "stop", t + u


@family
def all_same_number(d):
    t = easy(d)
    return re.sub(r"(?m)^\d+\.", "4.", form(t, WIRE)), "stop", t


@family
def no_numbers_in_io(d):
    t = easy(d)
    return form(t, ("{n}. Instruction: {t}", "Input:\n{t}", "Output:\n{t}"), "###\n"), "stop", t


@family
def jsonl_fence(d):
    t = some(d, 4, 1)
    return (
        "```jsonl\n"
        + "\n".join(json.dumps({"instruction": i, "input": g or "<noinput>", "output": o}) for i, g, o in t)
        + "\n```",
        "stop",
        t,
    )


@family
def json_pre_post(d):
    t = some(d, 4, 1)
    return (
        "Here are the tasks:\n"
        + json.dumps([{"instruction": i, "input": g, "output": o} for i, g, o in t], indent=2)
        + "\n\nLet me know!",
        "stop",
        t,
    )


@family
def json_nontext(d):
    return (
        json.dumps(
            [
                {"instruction": "a b c", "input": "", "output": ["x", "y"]},
                {"instruction": "Add it up.", "input": {"a": 1}, "output": "1"},
                {"instruction": "Say hi.", "input": None, "output": "hi"},
            ]
        ),
        "stop",
        [("Say hi.", "", "hi")],
    )


@family
def json_dup(d):
    return (
        '[{"instruction":"Say hi.","input":"","output":"hi","output":"ho"},{"instruction":"Say ho.","input":"","output":"ho"}]',
        "stop",
        [("Say ho.", "", "ho")],
    )


@family
def json_separate(d):
    t = some(d, 4, 1)
    return "\n###\n".join(json.dumps({"instruction": i, "input": g, "output": o}) for i, g, o in t), "stop", t


@family
def json_trailing_comma(d):
    t = some(d, 4, 1)
    return "[" + ",\n".join(json.dumps({"instruction": i, "input": g, "output": o}) for i, g, o in t) + ",]", "stop", t


@family
def json_fenced_each(d):
    t = some(d, 3, 1)
    return (
        "\n\n".join(
            "```json\n" + json.dumps({"instruction": i, "input": g, "output": o}, indent=1) + "\n```" for i, g, o in t
        ),
        "stop",
        t,
    )


@family
def xml_attr(d):
    t = easy(d)
    return (
        "".join(
            f'<task id="{n}">\n  <instruction>{i}</instruction>\n  <input>{g}</input>\n  <output>{o}</output>\n</task>\n'
            for n, (i, g, o) in enumerate(t, 4)
        ),
        "stop",
        t,
    )


# around
wrapped("think_upper_line", lambda x: f"<Think>\n{DRAFT}\n</Think>\n{x}")
wrapped("thoughts", lambda x: f"<thoughts>\n{DRAFT}\n</thoughts>\n\n{x}")
wrapped("inner", lambda x: f"<inner_monologue>\n{DRAFT}\n</inner_monologue>\n\n{x}")
wrapped("plan_tag", lambda x: f"<plan>\n{DRAFT}\n</plan>\n\n{x}")
wrapped("md_think", lambda x: f"**Thinking:**\n{DRAFT}\n\n**Answer:**\n{x}")
wrapped("final_answer_head", lambda x: f"{DRAFT}\n\n## Final answer\n\n{x}")
wrapped("unused", lambda x: f"<unused94>thought\n{DRAFT}<unused95>{x}")
wrapped(
    "gptoss_commentary",
    lambda x: f"<|channel|>commentary<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{x}",
)
wrapped("think_tool", lambda x: f"<think>\n{DRAFT}\n</think>\n<tool_call>\n{{}}\n</tool_call>\n{x}")
wrapped("empty_think", lambda x: f"<think>\n\n</think>\n\n{x}")
wrapped(
    "think_nested", lambda x: f"<think>a <think>{DRAFT}</think> b\n4. Instruction: draft\n4. Output: no\n</think>\n{x}"
)
wrapped("nothink_close_only_first", lambda x: f"</think>\n\n{x}")
wrapped("think_after", lambda x: f"{x}\n<think>\nWas that enough? Yes.\n</think>")
wrapped("think_at_end_unclosed", lambda x: f"{x}\n<think>\nWas that enough?", keep=slice(0, -1))
wrapped("s_end_tok", lambda x: x.rstrip() + "\n</s>")
wrapped("multi_eos", lambda x: x.rstrip() + "<|endoftext|><|endoftext|><|endoftext|>")
wrapped("eot_then_assistant", lambda x: x.rstrip() + "<|eot_id|>assistant\n\nHere are more tasks: none.")
wrapped("plain_assistant", lambda x: x.rstrip() + "assistant\n\nMore tasks follow.", keep=slice(0, -1))
wrapped("user_line", lambda x: x.rstrip() + "\nUser: thanks", keep=slice(0, -1))
wrapped("hash_user", lambda x: x.rstrip() + "\n\n### User:\nthanks", keep=slice(0, -1))
wrapped(
    "hash_instruction_turn",
    lambda x: x.rstrip() + "\n\n### Instruction:\nWrite more.\n\n### Response:\nSure.",
    keep=slice(0, -1),
)
wrapped("gt_end", lambda x: x.rstrip() + "\n<|END|>")
wrapped("end_token_text", lambda x: x.rstrip() + " <END>", keep=slice(0, -1))
wrapped("stars_end", lambda x: x.rstrip() + "\n\n***", keep=slice(0, -1))
wrapped("rule_end", lambda x: x.rstrip() + "\n\n---\n", keep=slice(0, -1))
wrapped("fare1", lambda x: x + "\nHappy to provide more!", keep=slice(0, -1))
wrapped("fare2", lambda x: x + "\nEnjoy!", keep=slice(0, -1))
wrapped("fare3", lambda x: x + "\nThat's all for now.", keep=slice(0, -1))
wrapped("fare4", lambda x: x + "\nThis completes the list of 20 tasks.", keep=slice(0, -1))
wrapped("fare5", lambda x: x + "\n*Note: All tasks can be done with text alone.*", keep=slice(0, -1))
wrapped("fare6", lambda x: x + "\n(The remaining tasks are omitted for brevity.)")
wrapped("fare7", lambda x: x + "\nDo you want me to go on?", keep=slice(0, -1))
wrapped("fare8", lambda x: x + "\nPlease let me know if any of these need adjusting.", keep=slice(0, -1))
wrapped("fare9", lambda x: x + "\n如果您还有其他需求，请随时告诉我。", keep=slice(0, -1))
wrapped("fare10", lambda x: x + "\nEstas son las tareas solicitadas.", keep=slice(0, -1))
wrapped("fare11", lambda x: x + "\nI've made sure to cover many domains.", keep=slice(0, -1))
wrapped("fare12", lambda x: x + "\nHere is the complete list as requested.", keep=slice(0, -1))
wrapped("fare13", lambda x: x + "\nThe tasks above follow the requested format.")
wrapped("fare14", lambda x: x + "\nIf you need anything else, just ask.", keep=slice(0, -1))
wrapped("fare15", lambda x: x + "\n✅ Done!", keep=slice(0, -1))
wrapped("fare16", lambda x: x + "\nI can continue with tasks 8 to 20.")
wrapped("fare17", lambda x: x + "\n~~~\nEnd.", keep=slice(0, -1))
wrapped("fare18", lambda x: x + "\n20 tasks in total, varied in subject.")
wrapped("cut_len_mid_label", lambda x: x + "###\n8. Instruction: Foo bar baz\n8. In", "length")
wrapped("cut_len_mid_hash", lambda x: x + "##", "length", keep=slice(0, -1))
wrapped("preamble_label", lambda x: "Below, each task has an Instruction: what to do, and so on.\n\n" + x)
wrapped("preamble_long", lambda x: "I thought about the list.\n\nIt should be varied.\n\n" + x)
wrapped("preamble_bold", lambda x: "**List of Tasks:**\n\n" + x)
wrapped("preamble_goes", lambda x: "Sure.\n###\n" + x)
wrapped("zwsp", lambda x: "\u200b" + x)
wrapped("formfeed", lambda x: x.replace("###\n", "###\n\x0c"))
wrapped("space_before_hash", lambda x: x.replace("###\n", " ###\n"))
wrapped("error", lambda x: x, "error", keep=slice(0, -1))
wrapped("max_output_tokens", lambda x: x, "max_output_tokens", keep=slice(0, -1))
wrapped("abort", lambda x: x, "abort", keep=slice(0, -1))
wrapped("incomplete", lambda x: x, "incomplete", keep=slice(0, -1))
# broken
broken("sep_text", r"###\n5\. ", "### Task 5 ###\n5. ", set())
broken("two_seps", r"###\n5\. ", "###\n\n###\n5. ", set())
broken("bold_one", r"5\. Instruction: (.*)\n", r"**5. Instruction:** \1\n", set())
broken("io_lower", r"5\. Output", "5. output", set())
broken("out_of_label", r"5\. Output:", "5. Output", {5})
broken("out_no_num", r"5\. Output", "Output", {5})
broken("in_no_num", r"5\. Input", "Input", {5})
broken("instr_twice", r"5\. Instruction: (.*)\n", r"5. Instruction: \1\n5. Instruction: \1\n", {5})
broken("instr_empty", r"5\. Instruction: .*\n", "5. Instruction:\n", {5})
broken("misspelt_in_plain", r"\nInput:", "\nImput:", {4}, PLAIN, "\n")
broken("misspelt_out_plain", r"\nOutput:", "\nOuptut:", {4}, PLAIN, "\n")
broken("misspelt_instr_plain2", r"\nInstruction:", "\nInstructon:", {4, 5}, PLAIN, "\n")
broken(
    "misspelt_instr_bold2", r"\n\*\*Instruction:", "\n**Instrucion:", {4, 5}, BOLD_PLAIN, heading("\n### Task {n}\n")
)
broken("heading_gone", r"\n### Task 5\n", "\n", {4, 5}, BOLD_PLAIN, heading("\n### Task {n}\n"))
broken("both_gone", r"\n### Task 5\n\*\*Instruction:\*\* ", "\n", {4, 5}, BOLD_PLAIN, heading("\n### Task {n}\n"))

# Labels of other words, or none, and headings of any words with the task's number.
simple("own_words", ("{n}. Command: {t}", "{n}. Data:\n{t}", "{n}. Result:\n{t}"), "###\n", easy)
simple(
    "two_languages",
    ("{n}. 指令 (Instruction): {t}", "{n}. 输入 (Input):\n{t}", "{n}. 输出 (Output):\n{t}"),
    "###\n",
    easy,
)
simple("number_alone", ("{n}. {t}", "   Input: {t}", "   Output: {t}"), "\n", one_line)
simple("marks_alone", ("** {t}\n", "** Input:\n{t}\n", "** Output:\n{t}"), heading("\nTask {n}:\n"), one_line)
simple("item_heading", PLAIN, heading("\nItem #{n} of 20\n"), one_line)
simple("keycap_heading", PLAIN, heading("\n{n}\ufe0f\u20e3\n"), one_line)
simple(
    "numbers_that_do_not_rise", PLAIN, "\n",
    lambda d: [("Add up.", "3 4", "seven\n\nTotal 7"), ("Add up these.", "1 1", "two\n\nTotal 2"), ("And these.", "2 2", "four\n\nTotal 4")],
)  # fmt: skip
simple("roman_heading", PLAIN, lambda n: f"\nTask {['IV', 'V', 'VI', 'VII'][n - 4]}\n", one_line)
simple("hashes_at_the_end", (*SAME_LINE[:2], "{n}. Output: {t} ###"), "", one_line)
simple("no_break_spaces", ("{n}.\xa0Instruction:\xa0{t}", "{n}.\xa0Input: {t}", "{n}.\xa0Output: {t}"), "\n", one_line)
simple(
    "field_behind",
    BOLD_PLAIN,
    heading("**Difficulty:** easy\n\n### Task {n}\n"),
    one_line,
    end="\n**Difficulty:** easy\n",
)
simple("field_before", BOLD_PLAIN, heading("\n### Task {n}\n**Category:** daily life\n"), one_line)


def make(name, seed):
    """(text, finish_reason, tasks) of one answer."""
    text, finish, tasks = FAMILIES[name](random.Random(f"{name} {seed}"))
    return text, finish, [(i.strip(), g.strip(), o.strip()) for i, g, o in tasks]
