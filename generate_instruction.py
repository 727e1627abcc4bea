"""Let a language model write instruction data from a few seed tasks: Self-Instruct in Stanford Alpaca's way.

Every request shows some tasks and asks for up to 20 in all. Each answer is appended to a journal and synced as it
arrives; tasks are taken from the journal in request order, and kept where they break no rule and are not too similar
to what is there already. So the process can be killed at any moment: the same command goes on from the journal.
Written to the output folder: regen.json, the rows, which train.py --data_path takes; regen.journal.jsonl, all answers;
regen.dropped.jsonl, every block of text that made no row, with the reason.
"""

import asyncio
import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import string
import sys
import textwrap
import time
import unicodedata
import urllib.parse
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace

import utils

if __name__ == "__main__":
    utils.end_by_ctrl_c()

import numpy as np
import regex
from rapidfuzz import process
from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize as rouge_tokenize

from utils import UserError, say

HERE = Path(__file__).resolve().parent
TASKS_PER_PROMPT = 20  # that prompt.txt asks for, the shown ones included
SHOWN_CHARACTERS = 10_000  # a longer task is not shown as a demonstration
GRACE_S = 20  # how long a run that ends early waits for answers on their way, which are paid for

# ---------------------------------------------------------------------------------------------------------------------
# The wire format: the prompt, and the parser that gets tasks out of an answer
# ---------------------------------------------------------------------------------------------------------------------


IN_JSON = (
    'Whatever the form of the tasks above, answer with those that follow as one JSON object, {"tasks": [{"instruction": '
    '"...", "input": "...", "output": "..."}, ...]}. Where a task needs no input, "input" is an empty string.'
)


def read_prompt(prompt_path=None):
    """The text of the prompt file; by default prompt.txt beside this script."""
    return utils.read_text(prompt_path or HERE / "prompt.txt", "; --prompt_path takes a text file").rstrip("\n") + "\n"


def encode_prompt(prompt_instructions, header=None, response_format="text"):
    """The text of a request: the prompt file's, the tasks to show in the wire format, and the head of the next one.

    `prompt_instructions` is a list of {instruction, input, output}; `header` defaults to `read_prompt()`. With the
    `response_format` json there is no head, but a word on the form of the answer.
    """
    prompt = read_prompt() if header is None else header
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        prompt += f"###\n{number}. Instruction: {instruction}\n"
        prompt += f"{number}. Input:\n{task['input'] or '<noinput>'}\n{number}. Output:\n{task['output']}\n"
    return f"{prompt}###\n{IN_JSON if response_format == 'json' else f'{len(prompt_instructions) + 1}. Instruction:'}"


def cannot_be_shown(task):
    """Why a task must not stand in a prompt, where it would read as several; "" where it may."""
    for key in ("instruction", "input", "output"):
        for line in task[key].split("\n"):
            if line.strip() == "###" or any(not label.rare for label in find_markers(line)):
                return f"its {key} holds the line {line.strip()[:40]!r}, which separates tasks"
    length = sum(len(task[key]) for key in ("instruction", "input", "output"))
    return f"it is {length:,} characters long" if length > SHOWN_CHARACTERS else ""


WORDS = {  # for the labels, in the languages that models answer in; those behind the bar count where no others are
    "instruction": "instruction 指令 指示 instrucción instruções instrução istruzione anweisung инструкция 지시사항 지시 명령 "
    "talimat hướng_dẫn "
    "| question prompt aufgabe consigne tarea задание 问题 問題 任务 任務 질문",
    "input": "input 输入 輸入 入力 entrada entrée eingabe ingresso ввод 입력 girdi đầu_vào | context contexte kontext 上下文",
    "output": "output 输出 輸出 出力 salida saída sortie ausgabe uscita вывод 출력 çıktı đầu_ra "
    "| response answer réponse respuesta resposta risposta antwort ответ 回答 答案 답변",
}
LABELS = {word.replace("_", " "): name for name, words in WORDS.items() for word in words.replace("|", "").split()}
RARE = {word for words in WORDS.values() for word in words.partition("|")[2].split()}
TASK = "(?:task|example|exercise|任务|任務|タスク|例题|示例|例|과제|課題|문제|tarea|tâche|aufgabe|задание)"
# A line that begins with a label: "4. Instruction:", "**Input:**", "- Output 5 -", "（4）指令：", "【入力】", "### Output".
# Every repetition is bounded, so that no line can make the search slow.
LINE = r"""^(?=.*?[^\W\d_]{2})(?P<lead>[ \t]{0,12}(?:[-*+•][ \t]{1,4})?(?:\#{1,6}[ \t]?)?(?:[☀-➿🀀-🫿]\ufe0f?[ \t])?)(?P<bold>[*_]{0,3})[ \t]?(?P<open>[【\[<]?)
    (?:(?:%s[ \t]{0,3})?[(（\[]?(?P<number>\d{1,4})(?:\.\d)?[*_]{0,3}[ \t]?[])）.:：．、-]{0,2}[*_ \t]{0,6})?
    (?P<label>%s)s?(?:[ \t]?\#?(?P<behind>\d{1,4}))?(?P<close>[*_\]】>]{0,4})
    (?:(?P<colon>[ \t]?[:：]|[ \t][-–—](?=[ \t]))|(?=[ \t]{0,9}$)|(?<=[】\]>]))"""
FLAGS = re.IGNORECASE | re.MULTILINE | re.VERBOSE
LINE = LINE.replace(r" \t]", r" \t\xa0\u3000]")  # blanks of other widths
MARKER = re.compile(LINE % (TASK, "|".join(map(re.escape, sorted(LABELS, key=len, reverse=True)))), FLAGS)
ANY_LABEL = re.compile(
    r"^[ \t*_#]{0,8}(?P<number>\d{1,4})[.)][*_ \t]{0,4}(?P<word>[^\W\d_][^:：\n*]{1,30}?)[ \t]?[*_]{0,3}[:：]",
    re.MULTILINE,
)
OTHER_LABEL = re.compile(LINE % (TASK, r"[^\W\d_]{3,14}"), FLAGS)
META = "category difficulty level type topic tags domain skill 类别 难度 类型 主题".split()
EXTRA = META + "explanation rationale reasoning hint note notes reason 解释 说明".split()
NUMBERED = re.compile(r"^[ \t#*_(（\[>-]{0,12}(\d{1,4})[])）.:：．、](?!\d)(?=[ \t]*\S)", re.MULTILINE)
HASHES, RULE = re.compile(r"#{2,6}"), re.compile(r"(?=\S)[-=_*~.#•—–+ ]{1,80}")
HEADING = re.compile(  # "**Task #5:**", "### Example 5: Rain", "任务五：", "第5题", "## 5.", "5. **Rain**"
    rf"""^(?P<deco>[ \t]{{0,3}}[^\w\s(（"'“]{{1,6}}[ \t]?[*_]{{0,3}})?
    (?:{TASK}[ \t]?(?:no\.?[ ]?)?\#?[ \t]?(?:\d{{1,4}}|[ivx]{{1,5}}|[一二三四五六七八九十]{{1,3}})
    |第.{{1,3}}[题題个個]|\d{{1,4}}[.)]|\d{{1,4}}(?:(?<=[#* ]\d)|(?<=[#* ]\d\d))|\d{{1,4}}\.(?=[ ]\*\*[^*]{{1,60}}\*\*:?$))
    (?:[*_]{{0,3}}[.:：)]?[*_]{{0,3}}|(?(deco)[*_.:：) -].{{0,60}}|[ ]\*\*.{{0,60}}))[ \t]{{0,9}}""",
    FLAGS,
)
FENCE = re.compile(r"^[ \t]*```(?P<info>[^`\n]*)$", re.MULTILINE)
FENCED = re.compile(r"^```[^`]*```$", re.MULTILINE)
THINK = "(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratch_?pad|inner_monologue|plan)"
OPENED = re.compile(
    rf"[<\[◁]\|?(?:begin_of_|start_)?{THINK}\|?[>\]▷]|<\|?channel\|?>(?!final)|<unused94>"
    r"|analysis(?:(?-i:(?=[A-Z]))|(?=<\|message))|here is my thought process:",
    re.IGNORECASE,
)
CLOSED = re.compile(
    rf"[<\[◁](?:/|\|end_of_|\|end_){THINK}\|?[>\]▷]|<channel\|>|<unused95>|<\|channel\|>final<\|message\|>"
    "|assistantfinal|^here is my response:",
    re.IGNORECASE | re.MULTILINE,
)
ALWAYS = ("unused95", "channelfinalmessage", "assistantfinal", "hereismyresponse")
TEMPLATE = re.compile(  # of a chat template, or the tag that ends an answer
    r"<[|｜][\w▁]{2,40}[|｜]>|</?s>|<[be]os>|<(?:end|start)_of_turn>|\[/?INST\]"
    r"|</(?:answer|response|solution)>|\[/ANSWER\]"
)
LEADING = re.compile(
    rf"\A(?:\s*(?!{OPENED.pattern}|<\|?channel)(?:{TEMPLATE.pattern}|<(?:answer|response)>|\[ANSWER\])\s*"
    r"(?:(?:assistant|model)\b)?)+\s*",
    re.IGNORECASE,
)
TURN = re.compile(
    r"^#{2,4} ?(?:Human|User|Assistant|Instruction|Response)\b|\n(?:Human|User|USER|用户) ?[:：]|assistant\n"
    r"|[<\[(/](?:end|eos|eot|done|stop)[>\])]\s*\Z",
    re.MULTILINE | re.IGNORECASE,
)
FAREWELL = re.compile(  # on the last line of an answer
    r"\b(?:let me know|feel free|want more|hope (?:this|these|that|it)|espero que|ich hoffe|as requested"
    r"|these (?:tasks|examples)|list of)\b|希望|以上|如需|^\W{0,9}(?:note|end)\b",
    re.IGNORECASE,
)
TO_THE_READER = re.compile(  # a last paragraph that speaks of the tasks themselves, which is no output's
    r"\A(?=.{0,250}(?:\b(?:tasks|instructions|tareas|tâches|aufgaben|tarefas|compiti)\b|任务|指令|タスク|과제|задани))"
    r".{0,250}(?:\b(?:let me know|would you like|hope|i(?:'ve| have|'ll| will| can)|these|if you|feel free|as requested"
    r"|continue[sd]?|remaining|in total|total|more|follow|ends?|espero|restantes|n'hésitez|voilà|hoffe|waren)\b"
    r"|希望|以上|如果|需要|结束|ます|바랍|надеюсь)|\A\W{0,4}(?:end of (?:the )?list|list (?:is )?complete)\W{0,4}\Z",
    re.IGNORECASE,
)
ALOUD = re.compile(r"\bthe user\b|\bwe (?:need|have|must)\b|\blet me (?:think|draft|see|plan)\b|用户", re.IGNORECASE)
NO_INPUT = re.compile(
    r"""(?:input:[ ])?(?:(?:(?:there[ ]is[ ])?no[ _-]?(?:additional[ ]|further[ ])?(?:input|context)(?:[ ]is)?|none|not)
    (?:[ ](?:needed|required|necessary|given|provided|available|applicable))?(?:[ ]for[ ]this[ ]\w{1,12})?
    |n/?a|nil|null|(?:girdi[ ])?yok|không[ ]có(?:[ ]đầu[ ]vào)?|tidak[ ]ada|لا[ ]يوجد|ไม่มี|कोई[ ]नहीं|ing[ae][nt]|geen(?:[ ]invoer)?|brak(?:[ ]danych)?|empty|(?:leave[ ]|left[ ])?blank|keine?(?:[ ]eingabe)?|(?:aucune?|sans)(?:[ ]entrée)?|néant
    |(?:ningun[ao]|nenhuma?|sem|sin)(?:[ ]entrada)?|nessuno?(?:[ ]input)?|нет(?:[ ]ввода)?|(?:입력[ ]|해당[ ])?없음|空
    |(?:入力)?[はが]?(?:なし|不要|無し)|特になし
    |(?:[此本这該该]?(?:任务|任務|题|題|指令))?(?:无|無|没有|沒有|无需|無需|不需要|不用)(?:额外|額外|任何)?(?:输入|輸入)?(?:内容|內容)?)""",
    re.IGNORECASE | re.VERBOSE,
)
# A last line of an output that is form rather than text: a heading, a number; a remark in brackets, a mark, a tag.
HEADED = re.compile(r"#{2,6}[ ].*[^:：]|\*\*[^*]+\*\*:?|\d{1,4}[.)]")
REMARK = re.compile(r"[*_#]{0,3}[(\[（【#].{0,60}[)\]）】#][*_#]{0,3}|&\w{1,8};")
TAG = re.compile(r"</?\w{1,10}[^<>]{0,20}>")
CLEAN_ENDS = (
    "none stop eos eos_token end_turn stop_sequence stop_token end_of_turn end complete completed finished".split()
)
Marker = collections.namedtuple("Marker", "start end label number key shape rare indent")
CHATTER = re.compile(
    r"^\W{0,3}\d{1,4}\W|^(?:sure|here|okay|ok|certainly|below|好的|以下|はい)\b.{0,200}[:!：]$|```", re.I
)
UNCLEAR = "its end is unclear"
FIELDS = ("instruction", "input", "output")
WRAPS = ("****", "____", "**", "__", '""', "''", "``", "“”", "「」")


def without_reasoning(text):
    """The answer without its reasoning; None where that does not end."""
    head, closed = OPENED.match(text, len(text) - len(text.lstrip())), []
    for found in CLOSED.finditer(text):
        line = text[max(text.rfind("\n", 0, found.start()) + 1, found.start() - 200) : found.start()]
        behind = text[found.end() : found.end() + 200]
        if not line.strip() or not behind.partition("\n")[0].strip() or MARKER.match(behind.lstrip()):
            closed.append(found)
    if head and not closed:
        name = re.sub(r"begin_of_|start_|\W", "", head[0].lower())
        named = [m for m in CLOSED.finditer(text) if re.sub(r"end_of_|end_|\W", "", m[0].lower()) in (name, *ALWAYS)]
        closed = named[:1]
    if head and not closed:
        return None
    behind, opened = text[closed[-1].end() :] if closed else text, []
    if closed and not behind.strip() and not head:  # reasoning behind the tasks
        opened = [m.start() for m in OPENED.finditer(text) if m.start() < closed[-1].start()]
    return text[: opened[-1]] if opened else behind


def unwrapped(text):
    """(the answer alone, whether a token of the chat template ended it); None where it is reasoning without an end."""
    text = re.sub(r"\r\n?", "\n", text).lstrip("\ufeff\u200b")
    text = without_reasoning(LEADING.sub("", text))
    if text is None:
        return None, False
    text, ends = LEADING.sub("", text), False
    closed = re.findall(r"^(?!#).*\S[ \t]+###[ \t]*\n(?=\s*(.*))", text, re.MULTILINE)
    if closed and all(not line or MARKER.match(line) for line in closed):  # a separator at the end of a line
        text = re.sub(r"^((?!#).*\S)[ \t]+###[ \t]*$", r"\1\n###", text, flags=re.MULTILINE)
    for token in TEMPLATE.finditer(text):
        behind = text[token.end() : token.end() + 40]
        is_spoken_of = re.match(r"(?!assistant|user|system)(?: +[^\s<\[]|[^\s<\[A-Z])", behind)
        if not (is_spoken_of and "INST" not in token[0]) and token[0] != "<s>":
            text, ends = text[: token.start()], True
            break
    lines = text.split("\n")
    quoted = [k for k, line in enumerate(lines) if line.startswith(">")]
    if quoted and all(line.startswith(">") or not line.strip() for line in lines[quoted[0] : quoted[-1]]):
        bare = "\n".join(line[1:].removeprefix(" ") for line in lines[quoted[0] : quoted[-1] + 1])
        if MARKER.search(bare) and not MARKER.search(text[: text.index(lines[quoted[0]])]):
            text = "\n".join(["###", bare, "###", *lines[quoted[-1] + 1 :]])
    return text, ends


def settle_fences(text):
    """(the text in which a fence around tasks is a line "###", [(start, end) of what else stands in fences])"""
    fences, spans, around, opener, swaps = list(FENCE.finditer(text)), [], False, None, []
    first = MARKER.search(text)

    def is_outside(fence):  # before all tasks, or behind what separates them
        above = text[max(0, fence.start() - 80) : fence.start()].rstrip().rpartition("\n")[2]
        return fence.start() < first.start() or bool(HASHES.fullmatch(above) or FENCE.fullmatch(above))

    for fence in fences:
        behind = re.sub(r"\A\s*(?:#{2,6}\s*\n\s*)?", "", text[fence.end() : fence.end() + 400])
        head, is_bare = MARKER.match(behind), not fence["info"].strip()
        if opener and is_bare:
            spans.append((opener.start(), fence.end()))
            opener = None
        elif not opener and head and LABELS[head["label"].lower()] == "instruction" and is_outside(fence):
            swaps.append(fence)
            around = True
        elif around and not opener and is_bare and (fence is fences[-1] or FENCE.match(behind)):
            swaps.append(fence)
            around = False
        else:
            opener = fence
    for fence in swaps:
        text = text[: fence.start()] + "###".ljust(len(fence[0])) + text[fence.end() :]
    return text, spans


def settle_headings(text, markers):
    """The text in which a line above each task that names its number, however it is written, is "#5" or the like."""
    heads, places = [m for m in markers if m.label == "instruction"], []
    for head in heads if text[: heads[0].start if heads else 0].strip() else heads[1:]:
        end = len(text[: head.start].rstrip())
        begin = text.rfind("\n", 0, end) + 1
        if end - begin > 60 or (begin > 1 and text[begin - 2] != "\n") or MARKER.match(text[begin:end]):
            return text
        places.append((begin, end))
    lines = [text[begin:end] for begin, end in places]
    if len(lines) < 2 or len({re.sub(r"\d+", "0", line) for line in lines}) > 1:
        return text
    for column in zip(*(map(int, re.findall(r"\d+", line)) for line in lines), strict=True):
        if all(b == a + 1 for a, b in itertools.pairwise(column)):
            for (begin, end), number in zip(places, column, strict=True):
                form = f"#{number}".ljust(end - begin)
                text = text[:begin] + (form if len(form) == end - begin else text[begin:end]) + text[end:]
            break
    return text


def stands_in(spans, position):
    """Whether a position stands in one of the spans."""
    k = bisect.bisect_right(spans, (position, math.inf)) - 1
    return k >= 0 and position < spans[k][1]


def find_markers(text, spans=()):
    """The lines that begin with a label, but for those in fences."""
    found = []
    for m in MARKER.finditer(text):
        word, number = m["label"].lower(), int(m["number"] or m["behind"] or -1)
        is_marked = "#" in m["lead"] or m["bold"] or m["open"] or "**" in m[0]
        is_prose = (number < 0 and m["label"][0].islower() and not m["open"]) or (m["colon"] is None and not is_marked)
        if not is_prose and not stands_in(spans, m.start()):
            marks = (re.findall(r"[*_]+", text[m.end("lead") : m.start("label")]) or [""])[-1]
            end = m.end() + len(marks) * (marks not in m["close"] and text.startswith(marks, m.end()))
            key = re.sub(r"\d+", "0", text[m.start() : end].strip()).replace("：", ":")
            indent = 0 if "#" in m["lead"] else len(m["lead"].expandtabs(4))
            shape = key.replace(m["label"], "").rstrip("*_")
            found.append(Marker(m.start(), end, LABELS[word], number, key, shape, word in RARE, indent))
    return found


def with_usual_labels(text):
    """The text with our labels, where all tasks lack the instruction's or have three others: "4. Command:", "4. Data:".

    It lacks one where the line above each input has the next number, or the input's own marks, or all have one word.
    """
    labels = {}
    for m in ANY_LABEL.finditer(text):
        labels.setdefault(int(m["number"]), []).append(m)
    kinds = {number: [m["word"].lower() for m in found] for number, found in labels.items()}
    usual = max(kinds.values(), key=len, default=[])
    full = sum(words == usual for words in kinds.values())
    partial = [number for number, words in kinds.items() if words == usual[1:]]  # behind the head in the prompt
    if len(usual) == 3 and full + len(partial) == len(kinds) >= 2 and partial in ([], [min(kinds)]):
        pairs = (zip(found, FIELDS[-len(found) :], strict=True) for found in labels.values())
        found = [(m.span("word"), name) for pair in pairs for m, name in pair]
    else:
        found = [((place, place), "instruction") for place in bare_instructions(text)]
    for (start, end), name in sorted(found, reverse=True):
        behind = text[end:] if start < end else f": {text[end:].lstrip(' ')}"
        text = text[:start] + (" " if start == end else "") + name.capitalize() + behind
    return text


def bare_instructions(text):
    """Where the label "Instruction:" is missing in each task of a text; [] where that is not clear."""
    markers = find_markers(text)
    inputs = [m for m in markers if m.label == "input"]
    if len(inputs) < 2 or any(m.label == "instruction" for m in markers):
        return []
    places, numbers = [], []
    for marker in inputs:
        begin = text[: marker.start].rstrip().rfind("\n") + 1
        line = text[begin : marker.start].rstrip()
        is_first = not text[:begin].strip()
        marks, number = re.match(r"[*#_ ]{1,6}", text[marker.start : marker.end]), NUMBERED.match(line)
        if number:
            numbers.append(int(number[1]))
            places.append(begin + number.end())
        elif (
            marks and line.startswith(marks[0]) and (is_first or lines_above(text, begin, 0)[0][0] not in ("", "blank"))
        ):
            places.append(begin + len(marks[0].rstrip()))
        elif marker is not inputs[0]:
            return []
        if OTHER_LABEL.match(line):
            return []
    return [] if any(b != a + 1 for a, b in itertools.pairwise(numbers)) else places


def is_heading(line):
    """Whether a line is the heading of a task alone."""
    label = MARKER.match(line)  # but for "任务 5：", where the word means a task
    is_label = label and not (label["label"].lower() in RARE and not line[label.end() :].strip("*_ "))
    return len(line) < 120 and bool(HEADING.fullmatch(line)) and not is_label


def lines_above(text, start, floor):
    """[(kind, start)] of the lines of form right above a position, the nearest first: "###", a rule, a heading,
    a field as "Difficulty: easy".

    Where there are none it is [("blank", start)] or [("", start)].
    """
    kinds, position = [], start
    while position > floor and not (kinds and kinds[-1][0].startswith("##")):
        begin = max(text.rfind("\n", 0, position - 1) + 1, floor)
        line = text[begin : position - 1].strip() if position - begin < 120 else "x"
        kind = line if HASHES.fullmatch(line) or RULE.fullmatch(line) or not line else "heading"
        if kind == "heading" and not is_heading(line):
            label = OTHER_LABEL.match(line)
            kind = "field" if label and label["label"].lower() in META else "text"
        if kind in [known for known, _ in kinds] or kind == "text":
            break
        kinds += [(kind, begin)] if kind else []
        position = begin
    return kinds or [("blank" if text[max(floor, start - 2) : start] == "\n\n" else "", start)]


def find_heads(text, markers, shown):
    """(the markers at which tasks begin, the starts of those that may be another task's text, what separates tasks).

    What separates is the tuple of `lines_above` of most tasks.
    """
    named = [m for m in markers if m.label == "instruction"]
    named = [m for m in named if not m.rare] or named
    first, goes_on = markers[0], False
    if first.label != "instruction" and text[: first.start].strip():
        goes_on = lines_above(text, first.start, 0)[0][0] in ("", "blank")
    style = first if goes_on or not named else named[0]
    named = [m for m in named if style.number >= 0 <= m.number or (style.number < 0 and m.key == named[0].key)]
    if goes_on:
        named.insert(0, Marker(0, 0, "instruction", first.number if first.number >= 0 else shown + 1, "", "", False, 0))
    above = [tuple(kind for kind, _ in lines_above(text, m.start, 0)) for m in named]
    usual = collections.Counter(above[1:] or [("",)])
    separator = max(usual, key=lambda kinds: (usual[kinds], kinds[-1].startswith("##"), any(kinds)))
    if usual[separator] * 2 <= len(above) - 1 > 1 and not separator[-1].startswith("##"):
        separator = ("",)  # these are ends of outputs
    formal = separator[-1] not in ("", "blank")
    strong = [kinds[: len(separator)] == separator or (not formal and kinds != ("",)) for kinds in above]
    strongly = {m.number: k for k, m in enumerate(named) if strong[k]}
    heads, unsure = named[:1], set()
    for k, marker in enumerate(named[1:], 1):
        sure = strong[k]
        if style.number >= 0 and not (sure and formal):
            if formal and strongly.get(heads[-1].number + 1, 0) > k:
                continue  # a quotation: the next number comes later, behind what separates tasks
            sure = marker.number == heads[-1].number + 1
        if not sure:
            unsure |= {heads[-1].start, marker.start}
        heads.append(marker)
    return heads, unsure, separator


def choose_labels(markers, heads, starts, name):
    """A function that says whether a marker is its task's input (output): by its number, or as most tasks write it."""
    seen = set()
    for m in markers:
        k = bisect.bisect_right(starts, m.start) - 1
        if m.label == name and k >= 0:
            seen.add((("" if 0 <= m.number == heads[k].number else m.key, m.rare), k))
    counts = collections.Counter(kind for kind, _ in seen)
    key, rare = max(counts, key=lambda kind: (counts[kind], not kind[1], not kind[0], kind), default=("none", False))
    return lambda m, head: m.label == name and m.rare == rare and (m.key == key if key else m.number == head.number)


def read_blocks(text, shown):
    """The blocks of an answer in labels: [(task or None, reason, its text, what stands behind it, whether it ends)]."""
    text, spans = settle_fences(text.rstrip() + "\n")
    markers = find_markers(text, spans)
    text = settle_headings(text, markers)
    heads, unsure, separator = find_heads(text, markers, shown) if markers else ([], (), ("",))
    if not heads:
        return []
    positions, starts, blocks, ways = [m.start for m in markers], [], [], {}  # ways: of ending, by block
    for head in heads:
        before, floor = markers[bisect.bisect_left(positions, head.start) - 1], starts[-1] if starts else 0
        early = before.label == "input" and floor <= before.start < head.start and before.number == head.number
        if early and (lines_above(text, before.start, floor)[0][0] in ("", "blank") and text[: before.start].strip()):
            early = False
        starts.append(before.start if early else head.start)  # an input may stand before its instruction
    bar = re.compile(rf"^{separator[-1] if separator[-1].startswith('##') else '###'}[ \t]*$", re.MULTILINE)
    if ALOUD.search(text, 0, starts[0]):
        return [(None, "reasoning without an end", text, "", False)]
    if markers[0].start < starts[0]:
        blocks.append((None, "a label is left out", text[: starts[0]], "", True))
    chosen = [choose_labels(markers, heads, starts, name) for name in ("input", "output")]
    ends_at = [*starts[1:], len(text)]
    for head, following, start, end in zip(heads, [*heads[1:], None], starts, ends_at, strict=True):
        above = [line for line in lines_above(text, end, head.end) if line[0] not in ("", "blank")]
        ends, is_last = bool(above) and above[-1][0].startswith("##"), end == len(text)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1], zip(above, separator)))
        if is_last and not common and above and separator[-len(above) :] == tuple(kind for kind, _ in above):
            common = len(above)
        common = len(above) if ends else common
        stop, rest = above[common - 1][1] if common else end, ""
        for found in bar.finditer(text, head.end, stop):
            if not stands_in(spans, found.start()):
                rest, stop, ends = bar.sub("", text[found.end() : stop]).strip(), found.start(), True
                break
        fields = [text[at:].partition("\n")[0] for kind, at in above[:common] if kind == "field"]
        inside = markers[bisect.bisect_left(positions, start) : bisect.bisect_left(positions, stop)]
        is_wire = separator[-1].startswith("##")
        loose = [kind for kind, _ in above[common:]]
        if is_wire and ends and above and above[-1][0] != separator[-1]:
            loose = ["heading"]  # half of a separator, or the heading of a task that was cut
        task, reason = read_block(text[start:stop], start, head, inside, chosen, spans)
        looks = (FAREWELL.search, TO_THE_READER.match, OPENED.match, re.compile(r"\W{0,4}\d").match, find_markers)
        if rest and not any(look(rest) for look in looks):
            loose = ["heading"]  # it may be the output's own
        if task and is_last and not ends:
            task, rest = without_farewell(task)
        if head.start in unsure or "heading" in loose or (loose and not (is_last and is_wire)):
            reason = UNCLEAR
        elif task:
            kind = "##" if ends else lines_above(text, end, head.end)[0][0]
            restarts = not is_last and 0 <= following.number <= head.number
            ways[len(blocks)] = (is_last and not (ends and is_wire), kind, restarts)
        blocks.append((task, reason, text[start:end], rest or "".join(fields), ends))
    return judge(blocks, ways, separator)


def without_farewell(task):
    """(the task, the last paragraph of its output) where that speaks of the tasks themselves, else (the task, "")."""
    text, _, last = task["output"].rpartition("\n\n")
    speaks_of_tasks = re.search("task|instruction|任务|指令", text + task["instruction"], re.IGNORECASE)
    if not text or "\n" in last or len(last) > 250 or speaks_of_tasks or TURN.search(task["output"]):
        return task, ""
    return (task | {"output": text.strip()}, last) if TO_THE_READER.match(last) else (task, "")


def judge(blocks, ways, separator):
    """Take off a last line of form that all outputs share, then say why an end is unclear; for `ways` see `doubt`."""
    tails = [re.sub(r"\d+", "0", task["output"].rpartition("\n")[2].strip()) if task else "" for task, *_ in blocks]
    for k, (is_open, kind, restarts) in ways.items():
        (task, _, *others), tail, reason = blocks[k], tails[k], ""
        is_form = RULE.fullmatch(tail) or is_tail(task["output"])
        if is_form and "\n" in task["output"] and tails.count(tail) >= max(len(tails) / 2, 2):
            is_sure = tails.count(tail) >= max(len(tails) - 1, 3) and not RULE.fullmatch(tail)
            task = task | {"output": task["output"].rpartition("\n")[0].strip()}
            reason, kind = "" if is_sure else UNCLEAR, "form"
        blocks[k] = (task, reason or doubt(task["output"], separator, is_open, kind, restarts), *others)
    return blocks


def read_block(raw, start, head, markers, chosen, spans):
    """({instruction, input, output}, "") of one task, or (None, why not). Its text `raw` begins at `start`."""
    inputs, outputs = ([m for m in markers if is_own(m, head)] for is_own in chosen)
    if not outputs:
        return None, "no output label"
    quoted = [m for m in markers if m.label == "instruction" and not m.rare and head.start < m.start < outputs[0].start]
    if len(inputs) > 1 or len(outputs) > 1 or (quoted and head.number >= 0 <= quoted[0].number):
        return None, "a label stands twice"
    own = sorted([head, *inputs, *outputs])
    if own[-1] is not outputs[0]:
        return None, "labels out of order"
    if has_strange_label(raw, start, head, own, spans):
        return None, "a label is misspelt, or of another task"
    task = {"input": ""}
    for marker, stop in zip(own, [*(m.start for m in own[1:]), start + len(raw)], strict=True):
        line = raw[marker.start - start : stop - start]
        value = read_field(line[: marker.end - marker.start], line[marker.end - marker.start :], marker)
        if value is None:
            return None, UNCLEAR
        task[marker.label] = value
    if any(not m.rare for m in find_markers(task["instruction"].split("\n")[0])):
        return None, "a label stands twice"
    bare = task["instruction"]
    is_bare = not head.key and ("\n" in bare or CHATTER.search(bare) or OTHER_LABEL.match(bare))
    if is_bare or ("\n" in task["instruction"] and not inputs):
        return None, "a label is left out"
    return task, ""


def has_strange_label(raw, start, head, own, spans):
    """Whether a line of a task is like its labels, but none of them: misspelt, of another kind, of the next task."""
    suspects = (head.number, head.number + 1)
    listed, own_starts, shapes = {0, 1}, {m.start for m in own}, {m.shape for m in own if m.key}
    for m in NUMBERED.finditer(raw):
        number = int(m[1])
        if start + m.start() not in own_starts and not stands_in(spans, start + m.start()):
            if head.number >= 0 and number in suspects and not {number, number - 1} & listed:
                return True
            listed.add(number)
    for m in OTHER_LABEL.finditer(raw):
        at, word, number = start + m.start(), m["label"].lower(), int(m["number"] or m["behind"] or -1)
        shape = re.sub(r"\d+", "0", m[0].strip()).replace("：", ":").replace(m["label"], "").rstrip("*_")
        is_like = shape in shapes or (m["number"] and m["colon"] and number == head.number)
        if is_like and at not in own_starts and not stands_in(spans, at):
            is_suspect = number < 0 or (number in suspects and (number == head.number or number - 1 not in listed))
            if is_suspect and (word in EXTRA or at < own[-1].start):
                return True
    return False


def read_field(label, field, marker):
    """The text behind a label, without its indentation and what closes the label's marks; None where it is unclear."""
    tag = re.fullmatch(r"[^<]*<(\w+)>", label)
    if tag:
        field, closed, behind = field.partition(f"</{tag[1]}>")
        if not closed or re.sub(r"</?\w+[^<>\n]{0,80}>|\s", "", behind):
            return None
    if label.count("**") % 2 and not label.startswith("** "):
        if not field.rstrip().endswith("**"):
            return None
        field = field.rstrip()[:-2]
    first, _, more = field.partition("\n")
    widths = [len(line) - len(line.lstrip()) for line in more.split("\n") if line.strip()]
    if marker.indent and widths and min(widths):
        if first.strip() and min(widths) != marker.indent:
            return None
        field = f"{first}\n{textwrap.dedent(more)}"
    return field.strip()


def is_tail(output):
    """Whether the last line of an output is form: an only tag is, the last of many is HTML's."""
    last = output.rpartition("\n")[2].strip()
    return bool(HEADED.fullmatch(last) or REMARK.fullmatch(last) or (TAG.fullmatch(last) and output.count("<") == 1))


def doubt(output, separator, is_open, kind, restarts):
    """Why it is unclear what belongs to an output, behind which a line of form of this `kind` stands, as "blank".

    `is_open`: it ends the answer, and a farewell may stand in it. `restarts`: the next task has no higher number, and
    the head of another list may stand before it.
    """
    lines = output.split("\n")
    last, is_apart = lines[-1].strip(), len(lines) > 1 and not lines[-2].strip()
    has_heading = re.search(r"\S[ \t]+#{2,}$", last) or (is_apart and HEADED.fullmatch(last))
    has_tail = not kind.startswith("##") and len(lines) > 1 and is_tail(output)
    has_remark = not kind and not is_open and is_apart  # or the next task's heading
    # A line that separates tasks elsewhere, or half of what does.
    has_form = any(line.strip() == form for line in lines for form in separator if form and not form.startswith("##"))
    has_form = has_form or ("heading" in separator and any(map(is_heading, lines)))
    has_draft = OPENED.match(output) or re.search(rf"\n(?:{OPENED.pattern})", output)
    is_cut = len(FENCE.findall(output)) % 2 or (restarts and "\n\n" in output)
    if has_heading or has_tail or has_remark or has_form or has_draft or is_cut:
        return UNCLEAR
    is_turn = TURN.search(output) and not re.match(r"(?:user|human|assistant)\b", output, re.IGNORECASE)
    if is_open and (is_turn or "\n\n" in FENCED.sub("", output) or (len(lines) > 1 and FAREWELL.search(lines[-1]))):
        return UNCLEAR
    return ""


def read_json_tasks(text):
    """The blocks of an answer that is JSON: a list of tasks, an object around it, JSON Lines; [] where it is not."""
    begin, blocks = re.search(r"^[ \t]*(?=[\[{])", text, re.MULTILINE), []
    if not begin or MARKER.search(text[: begin.start()]):
        return []
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else {})
    position = re.compile(r'(?:\[\s*|\{\s*"\w{1,40}"\s*:\s*\[\s*)?').match(text, begin.end()).end()
    while text[position : position + 1] == "{":
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            blocks.append((None, "JSON without an end", text[position:], "", False))
            break
        row = {LABELS.get(key.lower(), key): value for key, value in row.items()}
        task = {key: row.get(key) for key in FIELDS} | {"input": row.get("input") or ""}
        good = all(isinstance(value, str) for value in task.values())
        why = "" if good else "fields that are no texts"
        blocks.append((task if good else None, why, text[position:end], "", True))
        position = re.compile(r"(?:[\s,\]]|###+|```\w*)*").match(text, end).end()
    if blocks and position < len(text) and re.search(r"\w", text[position:]) and blocks[-1][4]:
        blocks[-1] = (*blocks[-1][:3], text[position:].strip(" \n]}`"), True)
    return blocks


def is_no_input(text):
    """Whether an input says that there is none: "<noinput>", "(None)", "-", "无需输入"."""
    if len(lines := {line.strip() for line in text.strip().split("\n")}) == 1:
        text = html.unescape(lines.pop())  # once, or again and again
    text = re.sub(r"</noinput>|[ ][(（][^()（）]{1,40}[)）]$", "", text)  # a remark behind it
    bare = re.sub(r"^[\W_]+|[\W_]+$", "", text.partition("#")[0] if "noinput" in text else text)
    return text.strip() in ("", "-", "–", "—", "--", '""', "''") or bool(NO_INPUT.fullmatch(bare))


def unquote(tasks):
    """Take off the marks around most instructions, and around all inputs and outputs of these: "...", **...**."""
    tasks = [dict(task) for task in tasks]
    halves = [(re.escape(wrap[: len(wrap) // 2]), re.escape(wrap[len(wrap) // 2 :])) for wrap in WRAPS]
    wraps = [re.compile(rf"{first}((?:\\.|(?!{first}|{last}).)+){last}", re.DOTALL) for first, last in halves]
    quotes = wraps[WRAPS.index('""')]  # in which a quotation mark of the text is escaped
    for wrap in wraps:
        marked = [task for task in tasks if wrap.fullmatch(task["instruction"])]
        if len(marked) > 1 and len(marked) * 3 >= len(tasks) * 2:
            for key, around in itertools.product(FIELDS, wraps):
                if all(not task[key] or around.fullmatch(task[key]) for task in marked):
                    for task in marked:
                        bare = around.sub(r"\1", task[key])
                        task[key] = bare.replace('\\"', '"') if wrap is quotes else bare
    fence = re.compile(r"```\n((?:(?!```).)+)\n```", re.DOTALL)
    if len(tasks) > 1 and all(fence.fullmatch(task[key]) for task in tasks for key in ("input", "output")):
        tasks = [task | {key: fence.sub(r"\1", task[key]) for key in ("input", "output")} for task in tasks]
    return tasks


def parse_response(text, finish_reason, num_prompt_instructions, response_format="text"):
    """Parse an answer. Returns (tasks, dropped): [(block number, {instruction, input, output})] and
    [(block number, reason, text)]. The blocks of both together are the whole answer, but for a preamble and reasoning.

    A task is kept only if it is exactly what the answer holds: where it is unclear what belongs to it, it is dropped.
    With the `response_format` json an answer is JSON or nothing, and its texts are taken as they are.
    """
    is_json = response_format == "json"
    answer, ends = (text, False) if is_json and text.lstrip().startswith("{") else unwrapped(text)
    if not (answer or "").strip():
        return [], [(0, "empty answer" if answer is not None or not text.strip() else "reasoning without an end", text)]
    blocks = read_json_tasks(answer)
    if not is_json and not any(task for task, *_ in blocks):
        blocks = read_blocks(answer, num_prompt_instructions)
        if not any(task for task, *_ in blocks) and (usual := with_usual_labels(answer)) != answer:
            blocks = read_blocks(usual, num_prompt_instructions)
    if not blocks:
        return [], [(0, "no task found", text)]
    if not (ends or blocks[-1][4] or str(finish_reason).lower() in CLEAN_ENDS):
        why = "cut off by the token limit" if finish_reason == "length" else f"cut off ({finish_reason})"
        blocks[-1] = (None, why, blocks[-1][2], blocks[-1][3], False)
    tasks, dropped = [], []
    for number, (task, reason, raw, rest, _) in enumerate(blocks):
        if task and not reason:
            texts = "".join(task.values())
            if empty := [key for key in ("instruction", "output") if not task[key].strip()]:
                reason = f"empty {empty[0]}"
            elif re.search("[\x00\ud800-\udfff]", texts):
                reason = "broken characters"
            elif not is_json and any(token[0] not in ("<s>", "</s>") for token in TEMPLATE.finditer(texts)):
                reason = "a token of a chat template"
        if reason:
            dropped.append((number, reason, raw))
        else:
            tasks.append((number, task))
        if rest:
            dropped.append((number, "text between tasks", rest))
    if is_json:
        return tasks, dropped
    bare = [{key: task[key] for key in FIELDS} for task in unquote([task for _, task in tasks])]
    bare = [task | {"input": "" if is_no_input(task["input"]) else task["input"]} for task in bare]
    return [(number, task) for (number, _), task in zip(tasks, bare, strict=True)], dropped


# --- What is kept: the rules, and the filter by ROUGE-L with everything kept so far ----------------------------------

# Scripts that are written without spaces between words: Chinese characters, kana, hangul, and south-east Asian ones.
NO_SPACES = "".join(rf"\p{{{name}}}" for name in "Han Hiragana Katakana Hangul Thai Lao Myanmar Khmer".split()) + "ー"
TOKEN = regex.compile(rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+")  # accents and vowel signs belong to the word they stand in
# A character of a script without spaces counts as a word.
WORD = regex.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")
RULES = ("length", "program", "punctuation", "blacklist")
# What a model without eyes, ears and hands cannot do; the words are Stanford Alpaca's.
BLACKLIST = (
    "image, images, graph, graphs, picture, pictures, file, files, map, maps, draw, plot, go to, video, audio, music, "
    "flowchart, diagram"
).split(", ")


def find_word_in_string(w, s):
    """The match of a whole word in a text, whatever its case; None where it does not occur."""
    # A character of a script without spaces may have letters beside it.
    before, after = rf"(?:(?<!\w)|(?=[{NO_SPACES}]))", rf"(?:(?!\w)|(?<=[{NO_SPACES}]))"
    return regex.search(before + regex.escape(w) + after, s, regex.IGNORECASE)


def broken_rule(instruction, rules=RULES, blacklist=BLACKLIST):
    """The rule of Stanford Alpaca that an instruction breaks, as words; "" where it breaks none of `rules`."""
    num_words = len(WORD.findall(instruction))
    first = unicodedata.normalize("NFKC", instruction[0])[0]
    found = (
        ("length", num_words <= 3, "instruction too short"),
        ("length", num_words > 150, "instruction too long"),
        ("blacklist", any(find_word_in_string(word, instruction) for word in blacklist), "blacklisted word"),
        ("program", instruction.startswith("Write a program"), "starts with Write a program"),
        ("punctuation", first in string.punctuation + "。、", "starts with punctuation"),
    )
    return next((reason for rule, is_broken, reason in found if is_broken and rule in rules), "")


def post_process_gpt3_response(num_prompt_instructions, response):
    """The tasks of `response`, {text, finish_reason}, that break no rule: [{instruction, input, output}]."""
    if response is None or response["text"] is None:
        return []
    tasks, _ = parse_response(response["text"], response["finish_reason"], num_prompt_instructions)
    return [task for _, task in tasks if not broken_rule(task["instruction"])]


def tokenize(text):
    """Words of any script, lower-case; characters where a script has no spaces. ASCII text is rouge_score's."""
    if text.isascii():
        return rouge_tokenize(text, None)
    return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


class RougeFilter:
    """A pool of texts to which a text is added where its ROUGE-L F1 with each of them is at most `threshold`.

    The scores are rouge_score's, bit for bit: the longest common subsequence is an integer, and the few float
    operations behind it are the same in the same order. That matters: with 7 words of 10 and 10 in common the score is
    0.7, with 7 of 9 and 11 it is 0.7000000000000001, and real data hits both. Every token is one character of a
    string, so that rapidfuzz compares a batch with the whole pool in one vectorised call.
    """

    def __init__(self, threshold=0.7, tokenize=tokenize):
        self.threshold, self.tokenize = threshold, tokenize
        self.ids, self.texts, self.coded = {}, [], []

    def code(self, text):
        """The tokens of a text as a string with one character for each; the string is never encoded."""
        return "".join(chr(self.ids.setdefault(token, len(self.ids))) for token in self.tokenize(text))

    def add(self, text, coded=None):
        """Put a text into the pool without asking."""
        self.texts.append(text)
        self.coded.append(self.code(text) if coded is None else coded)

    def judge(self, texts):
        """Judge a batch in order; what is kept joins the pool, before the next is judged.

        Returns for each text {"kept": True, "most_similar_instructions": {text: score} of the ten nearest, highest
        first and the older first among equals, "avg_similarity_score": mean over the pool}, or {"kept": False,
        "reason", and for a duplicate "similar_to" and "score"}.
        """
        coded, verdicts = [self.code(text) for text in texts], []
        columns, is_known = self.coded + coded, np.arange(len(self.coded) + len(coded)) < len(self.coded)
        lengths = np.array([len(column) or 1 for column in columns], float)
        lcs = process.cdist(coded, columns, scorer=LCSseq.similarity, dtype=np.int32)
        for text, code, row in zip(texts, coded, lcs, strict=True):
            if not code:
                verdicts.append({"kept": False, "reason": "no words"})
                continue
            precision, recall = row / lengths, row / len(code)
            scores = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[is_known]  # 0 for 0 in common
            if scores.max(initial=0) > self.threshold:
                best = int(scores.argmax())
                near = {"similar_to": self.texts[best], "score": float(scores[best])}
                verdicts.append({"kept": False, "reason": "duplicate", **near})
                continue
            bar = np.partition(scores, -10)[-10] if len(scores) > 10 else -1.0
            top = np.flatnonzero(scores >= bar)
            top = top[np.argsort(-scores[top], kind="stable")][:10]
            nearest = {self.texts[i]: float(scores[i]) for i in top}
            mean = float(scores.mean()) if len(scores) else 0.0
            verdicts.append({"kept": True, "most_similar_instructions": nearest, "avg_similarity_score": mean})
            is_known[len(verdicts) - len(texts) - 1] = True
            self.add(text, code)
        return verdicts


# --- The journal of all answers, and the rows that are taken from them -----------------------------------------------


class Journal:
    """JSON Lines, only ever appended to: {"run": settings}, {"request": number, ...} an answer or a failure, and
    {"wrote": sha256, "rows": number} of each regen.json. A line counts when it is on the disk with its end.
    """

    def __init__(self, path):
        self.path, self.answers, self.runs, self.wrote, self.size = Path(path), {}, [], set(), 0
        self.latest = {}  # an answer, or the digest of a regen.json that holds all that stands above
        with open(self.path, "rb") if self.path.exists() else io.BytesIO() as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    say(f"{path}: cut off {len(line)} bytes of an unfinished last line")
                    break
                try:
                    self.take(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}:{number}: not a line of a journal; mend or remove the line") from None
                self.size += len(line)

    def take(self, entry):
        if "request" in entry:
            self.latest = self.answers.setdefault(entry["request"], entry)
        elif "run" in entry:
            self.runs.append(entry["run"])
        else:
            self.wrote.add(entry["wrote"])
            self.latest = entry

    def append(self, entry):
        """Append a line and wait for the disk; half a line, now or of a process that was killed, is cut off."""
        # A lone surrogate has no UTF-8 form; the escape that takes its place is JSON's too.
        line = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            with open(self.path, "ab") as file:
                file.truncate(self.size)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.size)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room, then go on") from None
        self.size += len(line)
        self.take(entry)


def read_regenerated(path):
    """The rows of a regen.json, ours or the original's."""
    where, text = path, utils.read_text(path)
    try:
        if not isinstance(rows := json.loads(text), list):
            raise ValueError("not a list of rows")
        for i, row in enumerate(rows):
            where = f"{path}[{i}]"
            utils.as_messages(row)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}; mend it, move it away, or choose another --output_dir") from None
    return [{**row, "input": row.get("input") or ""} for row in rows]


class Collection:
    """The rows, and the account of everything else, as requests are committed one after the other.

    `rows_after[n]` is the number of rows after n commits; rows that were there before count from the start.
    """

    def __init__(self, args, seeds, old_rows):
        self.args, self.rows, self.seeds = args, list(old_rows), [seed for seed in seeds if not cannot_be_shown(seed)]
        self.filter = RougeFilter(args.rouge_threshold)
        for task in [*seeds, *old_rows]:
            self.filter.add(task["instruction"])
        self.shown_rows = [i for i, row in enumerate(self.rows) if not cannot_be_shown(row)]
        self.rows_after, self.num_old, self.committed = [len(self.rows)], len(self.rows), set()
        self.dropped, self.reasons, self.failures = [], collections.Counter(), collections.Counter()
        self.usage, self.dearest = {"prompt_tokens": 0, "completion_tokens": 0}, 0.0
        self.estimated, self.began = False, time.monotonic()  # estimated: a server has not counted its tokens

    @property
    def per_request(self):
        """Rows kept per request so far; before the first the most that there can be."""
        if self.committed:
            return (len(self.rows) - self.num_old) / len(self.committed)
        return max(1, TASKS_PER_PROMPT - self.args.num_prompt_instructions)

    def draw(self, request):
        """The demonstrations of a request; they depend on the seed, its number and the first `num_rows` rows alone."""
        args, draw = self.args, random.Random(f"{self.args.seed}:{request}")
        num_rows = self.rows_after[max(0, request - args.num_parallel_requests + 1)]
        shown = self.shown_rows[: bisect.bisect_left(self.shown_rows, num_rows)]
        chosen = draw.sample(shown, min(args.num_generated_in_prompt, len(shown)))
        tasks = [{**self.rows[i], "source": f"regen.json[{i}]"} for i in chosen]
        tasks += draw.sample(self.seeds, args.num_prompt_instructions - len(tasks))
        draw.shuffle(tasks)
        return tasks

    def commit(self, entry):
        """Take the tasks from one line of the journal, in request order; returns how many were kept."""
        number, usage, before = entry["request"], entry["usage"], len(self.rows)
        for key in self.usage:
            self.usage[key] += usage[key]
        self.estimated |= "estimated" in usage
        self.dearest = max(self.dearest, self.cost(usage))
        if "failed" in entry:
            self.failures[entry["failed"]] += 1
        else:
            how = (len(entry["demonstrations"]), entry.get("response_format", "text"))  # which older journals lack
            tasks, dropped = parse_response(entry["text"], entry["finish_reason"], *how)
            for block, reason, text in dropped:
                self.drop(number, block, {"reason": reason, "text": text})
            candidates = []
            for block, task in tasks:
                reason = broken_rule(task["instruction"], self.args.quality_rules, self.args.blacklist)
                if reason:
                    self.drop(number, block, {"reason": reason, **task})
                else:
                    candidates.append((block, task))
            verdicts = self.filter.judge([task["instruction"] for _, task in candidates])
            for (block, task), verdict in zip(candidates, verdicts, strict=True):
                if not verdict.pop("kept"):
                    self.drop(number, block, {**verdict, **task})
                    continue
                origin = {"request": number, "model": entry["model"], "demonstrations": entry["demonstrations"]}
                self.rows.append({**task, **verdict, **origin})
                if not cannot_be_shown(task):
                    self.shown_rows.append(len(self.rows) - 1)
        self.rows_after.append(len(self.rows))
        self.committed.add(number)
        return len(self.rows) - before

    def drop(self, request, block, facts):
        self.dropped.append({"request": request, "block": block, **facts})
        self.reasons[facts["reason"]] += 1

    def cost(self, usage):
        """What tokens cost, in the unit of the prices; 0 without prices."""
        price_in, price_out = self.args.price_in or 0, self.args.price_out or 0
        return (price_in * usage["prompt_tokens"] + price_out * usage["completion_tokens"]) / 1e6

    def estimate(self, request):
        """An upper estimate of the tokens of a request, in the form of its usage."""
        prompt = encode_prompt(self.draw(request), self.args.header, self.args.response_format)
        return {"prompt_tokens": estimate_tokens(prompt), "completion_tokens": self.args.max_tokens}

    def limit(self, request, num_on_their_way):
        """Why a request must not be sent, "enough" or the option that forbids it; "" where it may."""
        if len(self.rows) + num_on_their_way * self.per_request >= self.args.num_instructions_to_generate:
            return "enough"
        if self.args.max_requests is not None and request >= self.args.max_requests:
            return f"--max_requests {self.args.max_requests}"
        if self.args.max_cost is not None:
            dearest = self.dearest or self.cost(self.estimate(request))
            if self.cost(self.usage) + (num_on_their_way + 1) * dearest > self.args.max_cost:
                return f"--max_cost {self.args.max_cost}"
        return ""

    def progress(self):
        """The line of progress; what matters most comes first, as a narrow terminal cuts the end."""
        args, kept, target = self.args, len(self.rows), self.args.num_instructions_to_generate
        new, num_requests, about = kept - self.num_old, len(self.committed), "~" if self.estimated else ""
        parts = [f"kept {kept:,}/{target:,}"]
        if new and kept < target:
            left = int((time.monotonic() - self.began) / new * (target - kept))
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        if args.price_in is not None or args.price_out is not None:
            cost = self.cost(self.usage)
            whole = f", {cost / new * (target - self.num_old):.4f} at {target:,}" if new else ""
            parts.append(f"cost {about}{cost:.4f}{whole}")
        parts += [f"{self.failures.total():,} failed"] if self.failures else []
        parts += [f"{self.per_request:.1f} per request", f"{num_requests:,} requests"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common(3))
        parts.append(f"dropped {self.reasons.total():,}{f' ({reasons})' if reasons else ''}")
        tokens_in, tokens_out = self.usage.values()
        parts.append(f"tokens {about}{tokens_in:,} in {about}{tokens_out:,} out")
        return "  ".join(parts)

    def account(self):
        """One line in which the counts add up."""
        kept, dropped = len(self.rows) - self.num_old, self.reasons.total()
        parts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        old = f", and {self.num_old:,} rows that were there before" if self.num_old else ""
        return f"{kept + dropped:,} blocks = {kept:,} kept + {dropped:,} dropped{f' ({parts})' if parts else ''}{old}"


# --- Servers that speak OpenAI's protocol ----------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
URL_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # the latter is the older
DEFAULT_MODEL = "gpt-4o-mini"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30  # before a request is tried again: doubled from time to time
RATE_PAUSE_S = 60  # behind a rate limit that names no time: most count by the minute
GAP_S = 0.05  # between two requests, so that a rate limit is heard of before all parallel requests have met it
REPORT_S = 10  # how often a wait is said again
# Where servers put their words, and their codes: of these alone, not of prose, a lack of credit is known.
SAID = re.compile(r'"(?:message|msg|error|detail|code|type|param|title|raw|status_msg)": "((?:[^"\\]|\\.)+)"')
NO_CREDIT = re.compile(r"insufficient_(quota|balance|credit)|billing_(hard|not)_|exceeded_current_quota|\bArrearage\b")
TASK_SCHEMA = {
    "type": "object",
    "properties": {key: {"type": "string"} for key in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}
LIST_SCHEMA = {
    "type": "object",
    "properties": {"tasks": {"type": "array", "items": TASK_SCHEMA}},
    "required": ["tasks"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "tasks", "strict": True, "schema": LIST_SCHEMA}}
TOO_LONG = re.compile("context.{0,20}(length|window|size)|too long|reduce the length", re.I)
OF_THE_PROMPT = re.compile(f"{TOO_LONG.pattern}|filter|policy|moderat|flagged|safety|sensitive|inappropriat", re.I)


def estimate_tokens(text):
    """About how many tokens a text has: one for four ASCII characters, one for any other character."""
    ascii_only = sum(character < "\x80" for character in text)
    return ascii_only // 4 + len(text) - ascii_only


def retry_after(headers, said=""):
    """Seconds that a server asks to wait; None where it does not. A date is measured from the server's own."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / unit)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        until = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, (until - parsedate_to_datetime(headers["date"])).total_seconds())
    told = re.search(r"(?:again|retry) in (\d+\.?\d*)(m?)s\b", said)
    return float(told[1]) / (1000 if told[2] else 1) if told else None


def pause_before(attempt):
    """Seconds before another attempt; they differ, so that requests refused together do not come back together."""
    return min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1)


def text_of_message(content):
    """The text of a message, which is a text or a list of parts; None where it is neither. Reasoning is left out."""
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


Fault = collections.namedtuple("Fault", "text body status wait")  # what comes instead of an answer; wait in seconds


def read_fault(what, body="", status=0, headers=()):
    """A server's refusal or bad answer: its words and codes, and a status that a body of status 200 names."""
    said = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    title = re.search("<title>(.*?)</title>", said, re.IGNORECASE | re.DOTALL)
    words = [title[1] if title else body[:60]] if isinstance(body, str) else SAID.findall(said)
    text = " ".join(f"{what}: {' '.join(dict.fromkeys(words))}".split()).removesuffix(":")
    code = re.search(r'"(?:code|status)": "?([45]\d\d)\b', said)
    return Fault(text, said, status or int(code[1] if code else 0), retry_after(dict(headers), text))


class ChatClient:
    """Asks one model of one server, with bounded retries, and learns what it refuses: parameters, and a pace.

    `args.timeout` is the longest that an attempt, or a wait asked for by the server, may take, in seconds. `ending`,
    once set, lets requests on the wire arrive and starts no other attempt. Use it inside one event loop.
    """

    def __init__(self, args):
        import openai

        self.openai, self.args, self.key = openai, args, (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.key and args.base_url == OPENAI_URL:
            raise UserError("no key: set the environment variable OPENAI_API_KEY, or give --base_url of another server")
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has; set it again")
        url = urllib.parse.urlsplit(args.base_url)  # Azure's has a query, and another header for the key
        how = {"base_url": url._replace(query="").geturl(), "default_query": dict(urllib.parse.parse_qsl(url.query))}
        how |= {"default_headers": {"api-key": self.key}} if url.query and self.key else {}
        try:
            if re.fullmatch(r"localhost|127\..*|::1|0\.0\.0\.0", url.hostname or ""):  # which no proxy can reach
                how["http_client"] = openai.DefaultAsyncHttpxClient(trust_env=False)
            self.client = openai.AsyncOpenAI(api_key=self.key or "none", timeout=None, max_retries=0, **how)
        except (ImportError, ValueError) as error:  # of the HTTP library, which reads ALL_PROXY and its like
            cure = "install what it asks for, or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY"
            raise UserError(f"the environment's proxy: {utils.first_line(error)}; {cure}") from None
        asked = {"top_p": args.top_p, "temperature": args.temperature, "max_tokens": args.max_tokens}
        asked["stream_options"] = {"include_usage": True} if args.stream else None
        self.parameters = {name: value for name, value in asked.items() if value is not None}
        self.name, self.num_answers, self.ending = f"{args.model_name} at {args.server}", 0, asyncio.Event()
        # The pace of all requests together: times, seconds between two, and numbers of requests.
        self.turn, self.next_start, self.interval, self.too_fast, self.since = asyncio.Lock(), 0, 0, 0, 0
        self.refused_at = self.refused_since = self.num_refused = self.num_passed = self.num_sent = 0

    async def ask(self, prompt):
        """The answer to a text: {text, finish_reason, model, usage, attempts}; where it fails, {failed: why, usage}.

        The usage is that of all attempts. Raises UserError for what no other request can get past either, and
        CancelledError where `ending` is set before there is an answer.
        """
        usage, attempts = {"prompt_tokens": 0, "completion_tokens": 0}, 0
        while started := await self._wait_for_turn():
            sent = dict(self.parameters)
            answer, fault = await self._attempt(prompt, sent, usage)
            if answer:
                self._pass(started)
                return {**answer, "usage": usage, "attempts": attempts + 1}
            fault = fault._replace(text=fault.text.replace(self.key or "\n", "[key]")[:500])
            if fault.status in (400, 422) and self._adapt(fault, sent):
                continue
            self._raise_if_final(fault)
            if fault.status == 429:
                self._hold(fault, started)
                continue
            attempts += 1
            of_prompt = fault.status in (0, 400, 403, 413, 422, 451) and OF_THE_PROMPT.search(fault.text)
            passes = not 400 <= fault.status < 500 or fault.status in (408, 409, 425)
            most = min(self.args.max_retries, 1 if usage["completion_tokens"] else 100)  # what costs is asked for twice
            if of_prompt or not passes or "more than --max_tokens" in fault.text or attempts > most:
                break
            self.next_start = max(self.next_start, time.monotonic() + (fault.wait or 0))  # all wait as long as it asks
            await self._sleep(pause_before(attempts) if fault.wait is None else 0)
        else:
            raise asyncio.CancelledError
        if not self.num_answers and not of_prompt:
            raise UserError(f"{self.name} has not answered once: {fault.text}; the same command tries again")
        return {"failed": fault.text, "usage": usage}

    async def _attempt(self, prompt, sent, usage):
        """({text, finish_reason, model}, None) or (None, the fault), whatever a server sends; adds to `usage`."""
        try:
            async with asyncio.timeout(self.args.timeout):  # the client's own is for each read: a drip never ends
                body = await self._send(prompt, sent)
        except TimeoutError:
            return None, read_fault(f"no answer within {self.args.timeout:g} s")
        except self.openai.APIStatusError as error:
            status = error.status_code
            return None, read_fault(f"HTTP {status}", error.body, status, error.response.headers)
        except self.openai.APIConnectionError as error:
            return None, read_fault(f"no connection ({utils.first_line(error.__cause__ or error)})")
        except (self.openai.APIError, ValueError) as error:  # in the middle of a stream; no JSON
            return None, read_fault("bad answer", getattr(error, "body", None) or str(error))
        text, choice = None, None
        with contextlib.suppress(AttributeError, LookupError, TypeError):
            choice = body["choices"][0]
            text = text_of_message(choice["text"] if self.args.endpoint == "text" else choice["message"]["content"])
        if not isinstance(choice, dict):
            return None, read_fault("bad answer (no choices)", body)
        counted = body.get("usage") if isinstance(body.get("usage"), dict) else {}
        if not all(isinstance(counted.get(key), int) for key in ("prompt_tokens", "completion_tokens")):
            counted = {"prompt_tokens": estimate_tokens(prompt), "completion_tokens": estimate_tokens(text or "")}
            usage["estimated"] = True
        usage["prompt_tokens"] += counted["prompt_tokens"]
        usage["completion_tokens"] += counted["completion_tokens"]
        finish, model = choice.get("finish_reason"), body.get("model")
        if text is None:
            cure = f"; give more than --max_tokens {self.args.max_tokens}" if finish == "length" else ""
            return None, read_fault(f"bad answer (no text, finish_reason {finish}{cure})", choice.get("error") or "")
        self.num_answers += 1
        model = model if isinstance(model, str) else self.args.model_name
        return {"text": text, "finish_reason": finish, "model": model}, None

    async def _send(self, prompt, sent):
        """The parsed JSON of an answer; that of a stream in the form of one that comes at once."""
        is_text, api = self.args.endpoint == "text", self.client.chat.completions
        content = {"messages": [{"role": "user", "content": prompt}]}
        if is_text:
            content, api = {"prompt": prompt}, self.client.completions
        content |= {"response_format": JSON_FORMAT} if self.args.response_format == "json" else {}
        sent = {"model": self.args.model_name, **content, **sent, "extra_body": self.args.extra_body}
        if not self.args.stream:
            raw = (await api.with_raw_response.create(**sent)).text
            with contextlib.suppress(ValueError):
                return json.loads(raw)
            return raw  # which has no choices
        whole, text, finish = {}, "", None
        async for event in await api.create(stream=True, **sent):
            with contextlib.suppress(AttributeError, TypeError):  # whatever a server sends
                part = event.to_dict(warnings=False)
                whole |= {key: part[key] for key in ("model", "usage") if part.get(key)}
                for choice in part.get("choices") or []:
                    text += (choice.get("text") if is_text else text_of_message(choice["delta"].get("content"))) or ""
                    finish = choice.get("finish_reason") or finish
        if finish is None:
            raise ValueError("the stream was cut off")
        return {**whole, "choices": [{"finish_reason": finish, "text": text, "message": {"content": text}}]}

    def _adapt(self, fault, sent):
        """Rename or drop the parameter that the server refuses; whether there is something new to try."""
        named = [key for key in sent if re.search(rf"\b{key}\b", fault.body, re.I)]
        if not named or TOO_LONG.search(fault.text):  # the latter speaks of max_tokens too
            return False
        name, how = named[0], "sent without it"
        if name in self.parameters:  # else another request has met the same
            value = self.parameters.pop(name)
            if name == "max_tokens":
                self.parameters["max_completion_tokens"], how = value, "sending it as max_completion_tokens"
            say(f"{self.name}: refuses {name} {value}; from here on {how}")
        return True

    def _raise_if_final(self, fault):
        """Raise UserError for what no request of this run can get past."""
        status = 402 if fault.status in (400, 403, 429) and NO_CREDIT.search(fault.text) else fault.status
        advice = {
            401: "check OPENAI_API_KEY" if self.key else "set the environment variable OPENAI_API_KEY",
            402: "there is no credit left; put it in order",
            403: "this key may not do that; choose another --model_name, or check the key",
            404: "check --model_name and --base_url, which mostly ends in /v1",
        }.get(status)
        if fault.wait is not None and fault.wait > self.args.timeout:
            advice = f"it asks to wait {fault.wait:.0f} s; wait, or give a longer --timeout"
        if status == 400 and not self.args.stream and re.search("stream|enable_thinking", fault.text):
            advice = """give --stream, or for example --extra_body '{"enable_thinking": false}'"""
        is_form = self.args.response_format == "json" and re.search("response_format|json.?schema", fault.body, re.I)
        if is_form and not OF_THE_PROMPT.search(fault.text):
            advice = "give --response_format text"
        if advice and not (status == 403 and OF_THE_PROMPT.search(fault.text)):
            raise UserError(f"{self.name}: {fault.text}: {advice}; then the same command goes on")

    async def _sleep(self, seconds):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ending.wait(), seconds)

    async def _wait_for_turn(self):
        """Wait until a request may start: none behind a rate limit, then each an interval apart. Returns when."""
        async with self.turn:
            while (wait := self.next_start - time.monotonic()) > 0 and not self.ending.is_set():
                await self._sleep(min(wait, REPORT_S))
                if wait > 1.1 * REPORT_S:
                    say(f"{self.name}: the next request waits {wait - REPORT_S:.0f} s more, as the server asks")
            now = time.monotonic()
            self.since, self.num_sent = self.since or now, self.num_sent + 1
            self.next_start = now + max(self.interval, GAP_S)
        return 0 if self.ending.is_set() else now

    def _hold(self, fault, started):
        """Let all requests wait behind a rate limit. Raises UserError where it lets none pass for long."""
        if started < self.refused_at:  # it has met the same refusal as another
            return
        now, self.num_sent, self.num_refused = time.monotonic(), self.num_sent - 1, self.num_refused + 1
        self.refused_since, self.refused_at = self.refused_since or now, now
        pause = RATE_PAUSE_S * min(self.num_refused, 2) if fault.wait is None else fault.wait
        self.next_start = now + max(pause, pause_before(self.num_refused))
        if self.next_start - self.refused_since > max(self.args.timeout, 10 * RATE_PAUSE_S):
            waited = f"nothing else for {now - self.refused_since:.0f} s; wait, or give a longer --timeout"
            raise UserError(f"{self.name}: {fault.text}: {waited}; then the same command goes on")
        say(f"{self.name}: {fault.text}; all requests wait {self.next_start - now:.2g} s")
        if self.num_sent > 0:  # what it took up to here tells the pace that it takes
            self.too_fast, pace = self.interval, (self.next_start - self.since) / self.num_sent
            self.interval, self.since = max(self.interval, pace), self.next_start
            self.num_sent = self.num_passed = 0

    def _pass(self, started):
        """Note that a rate limit let a request pass; after eight a faster pace is tried, where it is a new one."""
        if started > self.refused_at:
            self.num_refused, self.refused_since, self.num_passed = 0, 0, self.num_passed + 1
            if self.num_passed % 8 == 0 and self.interval / 2 > max(self.too_fast, GAP_S):
                self.interval /= 2


# --- Before the first request: arguments, seeds, and what the folder holds already -----------------------------------


def setting(default, text, least=None, most=math.inf):
    """A field of `Options` with its help; where it is a number that is checked, with the least and the most."""
    return dataclasses.field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclasses.dataclass
class Options:
    """What --help lists. One whose default is None need not be given."""

    output_dir: str = setting("./", "Folder of the results and of the journal.")
    seed_tasks_path: str = setting(None, "Seed tasks, as JSON Lines or a list (default: this script's own).")
    num_instructions_to_generate: int = setting(100, "How many rows the folder should hold in the end.", 1)
    model_name: str = setting(None, f"The model that writes (default: {DEFAULT_MODEL}).")
    num_prompt_instructions: int = setting(3, "Tasks shown in a request.", 0, TASKS_PER_PROMPT - 1)
    request_batch_size: int = setting(5, "The old name of --num_parallel_requests.", 1, 1000)
    temperature: float = setting(None, "Sampling temperature (default: the server's, mostly 1).", 0, 2)
    top_p: float = setting(None, "Share of probability that is sampled from (default: the server's).", 0, 1)
    num_cpus: int = setting(None, "Has no meaning any more.")
    _: dataclasses.KW_ONLY
    base_url: str = setting(None, "The server (default: OPENAI_BASE_URL or OPENAI_API_BASE, else OpenAI's).")
    endpoint: str = setting("chat", "chat, or text for base models (text completions).")
    max_tokens: int = setting(3072, "The longest answer, in tokens.", 1)
    extra_body: str = setting(None, "JSON that is added to each request, such as '{\"enable_thinking\": false}'.")
    response_format: str = setting("text", "text, or json for chat servers that hold answers to a JSON schema.")
    stream: bool = setting(False, "Ask for answers piece by piece, for servers that give no others.")
    num_parallel_requests: int = setting(None, "Requests at a time (default: --request_batch_size).", 1, 1000)
    num_generated_in_prompt: int = setting(0, "How many of the shown tasks are taken from those generated so far.", 0)
    prompt_path: str = setting(None, "What the model is told before the tasks (default: this script's prompt.txt).")
    rouge_threshold: float = setting(0.7, "Above this ROUGE-L with a known instruction a task is a duplicate.", 0, 1)
    quality_rules: str = setting(",".join(RULES), "What an instruction must not break, separated by commas, or none.")
    blacklist_path: str = setting(None, "Words that no instruction may hold, one a line, instead of the usual ones.")
    price_in: float = setting(None, "Price of a million tokens of prompt.", 0)
    price_out: float = setting(None, "Price of a million tokens of answer.", 0)
    max_cost: float = setting(None, "Send no request that would bring the cost above this.", 0)
    max_requests: int = setting(None, "Send no more requests than this, earlier runs of the folder included.", 0)
    timeout: float = setting(600, "Seconds that an answer may take, and that a server may ask to wait.", 0.1)
    max_retries: int = setting(5, "How often a request is tried again.", 0, 100)
    patience: int = setting(20, "End after so many requests in a row of which nothing was kept.", 1)
    seed: int = setting(0, "Decides which tasks are shown in which request.", -math.inf)
    dry_run: bool = setting(False, "Show the first request and what the run may cost; send and write nothing.")
    replay: bool = setting(False, "Parse and judge the journal's answers anew, under the rules given; send nothing.")
    report: str = setting(None, "Write an HTML page about the rows to this file.")


def wrong_numbers(options):
    """What is wrong with the options that are numbers, one text for each."""
    problems = []
    for field in dataclasses.fields(options):
        value, least, most = getattr(options, field.name), field.metadata["least"], field.metadata["most"]
        if least is None or (value is None and field.default is None):
            continue
        kind, types = ("a whole number", int) if field.type is int else ("a number", (int, float))
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:  # NaN is between nothing
            bounds = f" of at least {least}" if most == math.inf else f" from {least} to {most}"
            problems.append(f"--{field.name} {value}: must be {kind}{'' if least == -math.inf else bounds}")
    return problems


def check_options(options):
    """The options with what follows from them, as a namespace. Raises one UserError that names all that is wrong."""
    args, problems = SimpleNamespace(**vars(options)), wrong_numbers(options)
    if not problems and args.num_generated_in_prompt > args.num_prompt_instructions:
        bounds = f"from 0 to {args.num_prompt_instructions}"
        problems.append(f"--num_generated_in_prompt {args.num_generated_in_prompt}: must be a whole number {bounds}")
    if args.max_cost is not None and args.price_in is None and args.price_out is None:
        problems.append("--max_cost needs --price_in and --price_out, per million tokens")
    if args.endpoint not in ("chat", "text"):
        problems.append(f"--endpoint {args.endpoint}: must be chat or text")
    if args.response_format not in ("text", "json"):
        problems.append(f"--response_format {args.response_format}: must be text or json")
    elif args.response_format == "json" and args.endpoint == "text":
        problems.append("--response_format json needs --endpoint chat; give --response_format text")
    args.base_url = next(filter(None, [args.base_url, *map(os.environ.get, URL_VARIABLES), OPENAI_URL]))
    args.server = re.sub("//[^/@]*@", "//", args.base_url.partition("?")[0])  # without what may be secret in it
    if not re.match("https?://[^/]", args.base_url):
        problems.append(f"--base_url {args.base_url}: must begin with http:// or https://")
    with contextlib.suppress(TypeError, ValueError):  # as Python gives it, or not JSON
        args.extra_body = json.loads(args.extra_body)
    if not isinstance(args.extra_body, dict | None):
        problems.append(f"""--extra_body {args.extra_body}: must be JSON such as '{{"enable_thinking": false}}'""")
    rules = args.quality_rules.replace(",", " ").split() if isinstance(args.quality_rules, str) else args.quality_rules
    args.quality_rules = [rule for rule in rules if rule != "none"]
    if wrong := [rule for rule in args.quality_rules if rule not in RULES]:
        problems.append(f"--quality_rules {wrong[0]}: must be none, or some of {','.join(RULES)}")
    args.output_dir = Path(args.output_dir)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.append(f"{args.output_dir}: is a file; choose another --output_dir")
    if problems:
        raise UserError("; ".join(problems))
    args.num_parallel_requests = args.num_parallel_requests or args.request_batch_size
    args.blacklist = BLACKLIST
    if args.blacklist_path:
        words = utils.read_text(args.blacklist_path, "; --blacklist_path takes a text file of one word a line")
        args.blacklist = [*filter(None, map(str.strip, words.split("\n")))]
    args.header = read_prompt(args.prompt_path)
    args.seed_tasks_path = args.seed_tasks_path or HERE / "seed_tasks.jsonl"
    if args.model_name == "text-davinci-003" and args.base_url == OPENAI_URL:
        say(f"text-davinci-003 was withdrawn in 2024; using {DEFAULT_MODEL}")
        args.model_name = DEFAULT_MODEL
    args.model_name = args.model_name or DEFAULT_MODEL
    if args.num_cpus is not None:
        say("--num_cpus has no meaning any more: one core filters a batch in milliseconds; ignored")
    return args


def read_seeds(args):
    """The seed tasks: [{instruction, input, output, source}], of several instances the first."""
    path = args.seed_tasks_path
    text = utils.read_text(path, "; --seed_tasks_path takes JSON Lines or a JSON list of tasks")
    found, problems = utils.read_records([(path, text)]) if text.strip() else ([], [])
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; mend the file, or choose another --seed_tasks_path")
    if not found:
        raise UserError(f"{path}: holds no tasks; choose another --seed_tasks_path")
    seeds = {}
    for task in found:
        seeds.setdefault(task["source"], task)
    reasons = {source: cannot_be_shown(seed) for source, seed in seeds.items()}
    for source, reason in reasons.items():
        if reason:
            say(f"{source}: never shown to the model, {reason}")
    if (shown := [*reasons.values()].count("")) < (asked := args.num_prompt_instructions):
        raise UserError(f"{path}: {shown} tasks can be shown, --num_prompt_instructions asks for {asked}")
    return list(seeds.values())


def digest_of(path):
    """The SHA-256 of a file; None where there is none."""
    return utils.sha256_of(path) if path.exists() else None


def adopt_rows(folder, journal):
    """Rows that the folder held before its journal began; kept in regen.start.json from then on."""
    path, start = folder / "regen.json", folder / "regen.start.json"
    if journal.runs and journal.runs[0].get("start") not in (None, digest_of(start)):
        advice = "put it back, or choose another --output_dir"
        raise UserError(f"{start}: gone or changed, and {journal.path.name} goes on from its rows; {advice}")
    if path.exists() and not journal.runs:
        rows = read_regenerated(path)
        utils.write_text(start, path.read_text(encoding="utf-8-sig"))
        say(f"{path}: going on from its {len(rows):,} rows, which are kept in {start.name}")
    elif path.exists():
        if digest_of(path) not in {*journal.wrote, digest_of(start)}:
            advice = "move it away, or choose another --output_dir"
            raise UserError(f"{path}: not as the run of {journal.path.name} wrote it; {advice}")
    return read_regenerated(start) if start.exists() else []


def record_run(args, journal):
    """Write the settings into the journal, and say what has changed; other rules are for --replay alone."""
    seeds = hashlib.sha256(Path(args.seed_tasks_path).read_bytes()).hexdigest()
    judged = {name: getattr(args, name) for name in ("rouge_threshold", "quality_rules", "blacklist")}
    judged["seed_tasks"] = seeds[:16]
    names = "model_name endpoint temperature top_p max_tokens num_prompt_instructions num_generated_in_prompt"
    asked = {name: getattr(args, name) for name in [*names.split(), "num_parallel_requests", "seed", "extra_body"]}
    asked["stream"] = args.stream or None  # absent in older journals, as extra_body is
    asked["response_format"] = args.response_format if args.response_format == "json" else None
    asked["base_url"], asked["prompt"] = args.server, hashlib.sha256(args.header.encode()).hexdigest()[:16]
    last = journal.runs[-1] if journal.runs else {"judged": judged, "asked": asked}
    if args.replay:
        asked = last["asked"]  # nothing is
    changes = {}
    for key, settings in (("judged", judged), ("asked", asked)):
        pairs = [(name, last[key].get(name), now) for name, now in settings.items()]
        changes[key] = [f"{name} was {old} and is {now}" for name, old, now in pairs if old != now]
    if changes["judged"] and not args.replay:
        advice = "give the old settings, judge all answers anew with --replay, or choose another --output_dir"
        raise UserError(f"{args.output_dir}: its rows were judged otherwise: {'; '.join(changes['judged'])}; {advice}")
    if changes["asked"]:
        say(f"{args.output_dir}: from here on {'; '.join(changes['asked'])}")
    if not journal.runs or any(changes.values()):
        facts = {"versions": utils.versions("openai", "rapidfuzz", "rouge_score"), "git_commit": utils.git_commit()}
        facts["start"] = digest_of(args.output_dir / "regen.start.json")
        journal.append({"run": {"judged": judged, "asked": asked, **facts}})


# --- The story -------------------------------------------------------------------------------------------------------


class Requests:
    """Those on their way, as {number: task of asyncio} in the order of their numbers.

    `stopped` is a future that ends the run: by the number of a signal, or by the error that a request has met.
    """

    def __init__(self, collection, journal, client):
        self.args, self.collection, self.journal, self.client = collection.args, collection, journal, client
        self.tasks, self.started, self.fruitless, self.stopped = {}, 0, [], asyncio.get_running_loop().create_future()
        self.last_known = max(journal.answers, default=-1)  # up to here an earlier run has asked

    def start(self):
        """Start as many as may be on their way; returns what holds the next one back, "" where nothing does."""
        while len(self.tasks) < self.args.num_parallel_requests:
            limit = self.collection.limit(self.started, len(self.tasks)) if self.started > self.last_known else ""
            if limit:
                return limit
            self.tasks[self.started] = task = asyncio.ensure_future(self.obtain(self.started))
            task.add_done_callback(self.check)
            self.started += 1
        return ""

    async def obtain(self, number):
        """The journal's line of a request, which is sent where the journal has none."""
        if number in self.journal.answers:
            return self.journal.answers[number]
        shown = self.collection.draw(number)
        entry = {"request": number, "demonstrations": [task["source"] for task in shown]}
        entry["response_format"] = self.args.response_format
        entry |= await self.client.ask(encode_prompt(shown, self.args.header, self.args.response_format))
        self.journal.append(entry)
        return entry

    def check(self, task):
        """What a request raises ends the run, whether it is its turn or not."""
        if not task.cancelled() and task.exception() and not self.stopped.done():
            self.stopped.set_exception(task.exception())

    def commit(self, number):
        """Commit an answer that is there. Raises UserError where nothing was kept of too many in a row."""
        if self.collection.commit(self.tasks.pop(number).result()):
            self.fruitless = []
        elif number > self.last_known:
            self.fruitless.append(number)
        if len(self.fruitless) >= self.args.patience:
            reasons = [row["reason"] for row in self.collection.dropped if row["request"] in self.fruitless]
            reasons += [self.journal.answers[i].get("failed") for i in self.fruitless]
            why = ", ".join(filter(None, dict.fromkeys(reasons)))
            what = f"nothing was kept of the last {len(self.fruitless)} requests ({why}); see {self.journal.path.name}"
            tokens = "fewer --num_prompt_instructions or less" if TOO_LONG.search(why) else "more"
            form = "--response_format text, " if self.args.response_format == "json" else ""
            advice = f"then try {form}another --model_name, {tokens} --max_tokens or more --patience"
            raise UserError(f"{self.client.name}: {what}, {advice}")

    def stop(self, number):
        """Take a signal: the first lets answers arrive that are on their way, the second does not."""
        if not self.stopped.done():
            self.stopped.set_result(number)
        else:
            for task in self.tasks.values():
                task.cancel()


async def collect(collection, journal, client):
    """Ask for answers and commit them in request order until there are enough rows.

    A request starts when the one num_parallel_requests before it is committed, and only while the rows expected of
    those on their way leave a gap; both depend on what is committed alone, so a seed and the same answers give the
    same rows, in whatever order the answers come, and however often the process was killed. Returns (message, exit
    code) of an end before the target, else ("", 0).
    """
    requests, limit, message, code = Requests(collection, journal, client), "", "", 0
    stopped, signals = requests.stopped, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    hear = asyncio.get_running_loop().call_soon_threadsafe  # else the loop sleeps on
    with utils.on_signals(lambda number, frame: hear(requests.stop, number), *signals):
        try:
            while not stopped.done():
                limit = requests.start()
                if not requests.tasks:
                    break
                number, first = next(iter(requests.tasks.items()))
                await asyncio.wait([first, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not stopped.done():
                    requests.commit(number)  # one alone: what is started next must not depend on the others
                    utils.show_progress(collection.progress(), is_due=len(collection.committed) % 10 == 0)
            if stopped.done():
                message, code = f"stopped by {signal.Signals(stopped.result()).name}", 128 + stopped.result()
            elif limit not in ("", "enough"):
                message = f"stopped at {limit}"
        except UserError as error:
            message, code = str(error), 2
            stopped.cancel()  # so that the next signal counts as the second
        client.ending.set()
        pending = [task for task in requests.tasks.values() if not task.done()]
        if pending:
            say(f"{message}; waiting up to {GRACE_S} s for answers on their way; Ctrl-C leaves at once")
            await asyncio.wait(pending, timeout=GRACE_S)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    await client.client.close()
    return message, code


def preview(args, collection):
    """--dry_run: the first request as it would be sent, and what the run may cost."""
    usage, rows = collection.estimate(0), TASKS_PER_PROMPT - args.num_prompt_instructions
    requests = math.ceil(max(0, args.num_instructions_to_generate - collection.num_old) / rows)
    cost = f"at most about {collection.cost(usage) * requests:.4f} for these requests"
    if args.price_in is None and args.price_out is None:
        cost = "give --price_in and --price_out, per million tokens"
    return (
        f"{encode_prompt(collection.draw(0), args.header, args.response_format)}\n"
        f"--- {args.model_name} at {args.server}, temperature {args.temperature}, top_p {args.top_p} (None: its own)\n"
        f"--- an estimate, by characters: about {usage['prompt_tokens']:,} tokens in a request, at most "
        f"{args.max_tokens:,} out; at least {requests:,} requests"
        f" beside the {collection.num_old:,} rows that are there, if each gave {rows} new rows\n"
        f"--- cost: {cost}"
    )


def write_results(args, collection, journal):
    """Commit what the journal holds beyond a gap, then write the rows, what was dropped, and the report."""
    for number in sorted(journal.answers):
        if number not in collection.committed:
            collection.commit(journal.answers[number])
    dropped = "".join(json.dumps(row) + "\n" for row in collection.dropped)  # ASCII: it may hold lone surrogates
    utils.write_text(args.output_dir / "regen.dropped.jsonl", dropped)
    text = json.dumps(collection.rows, indent=4, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if journal.latest.get("rows") != len(collection.rows) or digest not in journal.wrote:
        journal.append({"wrote": digest, "rows": len(collection.rows)})
    utils.write_text(args.output_dir / "regen.json", text)
    if args.report:
        sys.path.insert(0, str(HERE / "examples"))
        from generation_report import render

        utils.write_text(args.report, render(collection.rows, dict(collection.reasons)))
        say(f"{args.report}: report written")


def generate_instruction_following_data(*positional, **options):
    """Let a language model write instruction data from a few seed tasks, in Stanford Alpaca's way.

    The key is read from OPENAI_API_KEY; a server of your own needs none. Rows go to regen.json in --output_dir, which
    train.py --data_path takes. The same command goes on where an earlier one stopped or was killed.

    Examples:

      python generate_instruction.py --output_dir out --num_instructions_to_generate 1000 --max_requests 200

      python generate_instruction.py --output_dir out --base_url http://localhost:8000/v1 --model_name MODEL --dry_run
    """
    args = check_options(Options(*positional, **options))
    seeds = read_seeds(args)
    if args.dry_run:
        path = args.output_dir / "regen.json"
        print(preview(args, Collection(args, seeds, read_regenerated(path) if path.exists() else [])))
        return
    client = None if args.replay else ChatClient(args)
    with utils.claim_folder(args.output_dir):
        go_on(args, seeds, Journal(args.output_dir / "regen.journal.jsonl"), client)


# To whoever asks for the signature it is a function of the options.
generate_instruction_following_data.__signature__ = inspect.signature(Options)


def go_on(args, seeds, journal, client):
    """Bring the folder from what the journal holds to what is asked for; without a client nothing is sent."""
    if args.replay and not journal.runs:
        raise UserError(f"{journal.path}: no answers to replay; leave --replay out")
    path, target = args.output_dir / "regen.json", args.num_instructions_to_generate
    if client and not args.report and journal.latest.get("wrote", "none") == digest_of(path):
        count = journal.latest.get("rows") or len(read_regenerated(path))  # older journals do not count them
        if count >= target:  # nothing is to be asked or judged
            record_run(args, journal)
            print(f"{path}: {count:,} rows", flush=True)
            return
    collection = Collection(args, seeds, adopt_rows(args.output_dir, journal))
    record_run(args, journal)
    if journal.answers:
        say(f"{journal.path}: going on behind {len(journal.answers):,} requests")
    message, code = asyncio.run(collect(collection, journal, client)) if client else ("", 0)
    try:
        write_results(args, collection, journal)
    except UserError as error:
        if code != 2:
            raise
        say(str(error))  # the full disk that has ended the run
    utils.show_progress(collection.progress(), is_last=True)
    say(collection.account())
    if code == 2:
        raise UserError(message)  # now that all there is has been written
    if message:
        say(f"{message}; {'raise it to go on' if message.startswith('stopped at') else 'the same command goes on'}")
    print(f"{path}: {len(collection.rows):,} rows", flush=True)
    if code:
        sys.exit(code)


def main(task="generate_instruction_following_data", **kwargs):
    """Run a task by its name, as in Stanford Alpaca; there is one."""
    if task != "generate_instruction_following_data":
        raise UserError(f"{task}: no such task; there is generate_instruction_following_data")
    return generate_instruction_following_data(**kwargs)


def command_line():
    """Parse the command line with fire, wholly, and only then run."""
    words, said, given = sys.argv[1:], io.StringIO(), []
    if {"--help", "-h"} & set(words):  # fire's own help speaks of flags and groups
        print(inspect.getdoc(generate_instruction_following_data) or "", "\nOptions:")  # python -OO has no docstrings
        for field in dataclasses.fields(Options):
            default = "" if field.default is None or field.type is bool else f" (default: {field.default})"
            print(f"  --{field.name} {field.type.__name__.upper()}\n        {field.metadata['help']}{default}")
        return
    import fire

    task = words.pop(0) if words and not words[0].startswith("-") else generate_instruction_following_data.__name__

    @fire.decorators.SetParseFn(str, *(field.name for field in dataclasses.fields(Options) if field.type is str))
    @functools.wraps(generate_instruction_following_data)
    def parse(*positional, **options):
        given.append(Options(*positional, **options))

    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(parse, command=words, name="generate_instruction.py")
    except fire.core.FireExit:
        what = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip().split("\n")[0].removeprefix("ERROR: ")
        unknown = what.removeprefix("Could not consume arg: ")
        if unknown.startswith("--"):
            raise utils.unknown_options([unknown], [f"--{f.name}" for f in dataclasses.fields(Options)]) from None
        raise UserError(f"{what}; --help lists the options") from None
    if any(word.startswith("--request_batch_size") for word in words):
        say("--request_batch_size is now --num_parallel_requests")
    main(task, **vars(given[0]))


if __name__ == "__main__":
    utils.run_main(command_line)
