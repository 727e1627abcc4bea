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
import inspect
import io
import json
import math
import os
import random
import re
import signal
import string
import sys
import time
import unicodedata
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries load, Ctrl-C shows no traceback; see run_main

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize as rouge_tokenize

import utils
from utils import UserError, say

HERE = Path(__file__).resolve().parent
TASKS_PER_PROMPT = 20  # that prompt.txt asks for, the shown ones included
SHOWN_CHARACTERS = 10_000  # a longer task is not shown as a demonstration
GRACE_S = 20  # how long a run that ends early waits for answers on their way, which are paid for

# ---------------------------------------------------------------------------------------------------------------------
# The wire format: the prompt, and the parser that gets tasks out of an answer
# ---------------------------------------------------------------------------------------------------------------------


def read_prompt(prompt_path=None):
    """The text of the prompt file; by default prompt.txt beside this script."""
    return utils.read_text(prompt_path or HERE / "prompt.txt", "; --prompt_path takes a text file").rstrip("\n") + "\n"


def encode_prompt(prompt_instructions, header=None):
    """The text of a request: the prompt file's, the tasks to show in the wire format, and the head of the next one.

    `prompt_instructions` is a list of {instruction, input, output}; `header` defaults to `read_prompt()`.
    """
    prompt = read_prompt() if header is None else header
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        prompt += f"###\n{number}. Instruction: {instruction}\n"
        prompt += f"{number}. Input:\n{task['input'] or '<noinput>'}\n{number}. Output:\n{task['output']}\n"
    return f"{prompt}###\n{len(prompt_instructions) + 1}. Instruction:"


def cannot_be_shown(task):
    """Why a task must not stand in a prompt, where it would read as several; "" where it may."""
    for key in ("instruction", "input", "output"):
        for line in task[key].split("\n"):
            if line.strip() == "###" or MARKER.match(line):
                return f"its {key} holds the line {line.strip()[:40]!r}, which separates tasks"
    length = sum(len(task[key]) for key in ("instruction", "input", "output"))
    return f"it is {length:,} characters long" if length > SHOWN_CHARACTERS else ""


FIELDS = ("instruction 指令 指示", "input 输入 輸入 入力", "output 输出 輸出 出力")  # in the words of several languages
LABELS = {word: words.split()[0] for words in FIELDS for word in words.split()}
# A line that begins with a label: "4. Instruction:", "**Input:**", "### Output 5:", "Task 5 Output:", "指令：".
# Every repetition of the middle is bounded, so that no line can make the search slow.
MARKER = re.compile(
    rf"""^[ \t#*_]*  (?:(?:task|任务|任務|タスク)[ \t]{{0,3}})?
    (?:(?P<number>\d{{1,4}})[ \t*_]{{0,3}}[.):：．、）]?[ \t*_]{{0,5}})?
    (?P<label>{"|".join(LABELS)}) (?:[ \t]?(?P<number_behind>\d{{1,4}}))? [*_]{{0,3}}[ \t]?[:：][*_]{{0,3}}""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
FENCE = re.compile(r"^[ \t]*```[^`\n]*$", re.MULTILINE)
# A line that may stand between two tasks: "###", "---", "**Task 5:**", "### Example 5".
BETWEEN = re.compile(
    r"(?=.{0,60}$)(?:[ \t]*[#*_=-]{2,}[ \t]*|[#*_ \t]*(?:task|example|任务|任務|タスク|例)[ \t]?\d{1,4}[*_ \t]*[.:：]?[*_ \t]*)",
    re.IGNORECASE,
)
NO_INPUT = (
    "noinput|no input|none|n/a|na|not applicable|empty|no input needed|no input required|no input provided|"
    "no input is needed|无输入|無輸入|无需输入|无|入力なし|なし"
).split("|")
Marker = collections.namedtuple("Marker", "start end label number")


def without_reasoning(text):
    """The answer behind a block of reasoning; "" where the reasoning does not end."""
    head = re.match(r"\s*<(think|thinking|reasoning)>", text)
    if head:
        return text.partition(f"</{head[1]}>")[2]
    tail = re.search(r"^[ \t]*</think>[ \t]*$", text, re.MULTILINE)  # some servers open the block in their template
    return text[tail.end() :] if tail else text


def find_markers(text):
    """The lines that begin with a label, of the kind that the answer uses for its instructions: numbered, or not."""
    found = [
        Marker(m.start(), m.end(), LABELS[m["label"].lower()], int(m["number"] or m["number_behind"] or -1))
        for m in MARKER.finditer(text)
        if m["number"] or m["number_behind"] or not m["label"][0].islower()  # without a number, prose has no capital
    ]
    heads = [marker.number >= 0 for marker in found if marker.label == "instruction"]
    if heads.count(False) > heads.count(True):
        return found
    return [marker for marker in found if marker.number >= 0 or marker.label != "instruction"]


def find_blocks(text, markers):
    """Positions in `markers` at which tasks begin: at an instruction, or at an input that stands before its own."""
    blocks = []
    for k, marker in enumerate(markers):
        if marker.label == "instruction" and not (blocks and blocks[-1] == k - 1 and markers[k - 1].label == "input"):
            blocks.append(k)
        elif marker.label == "input" and k + 1 < len(markers):
            before = text[max(0, marker.start - 80) : marker.start].rstrip()  # holds the whole of a line that separates
            opens = BETWEEN.fullmatch(before.rpartition("\n")[2]) or (k == 0 and not text[: marker.start].strip())
            if opens and markers[k + 1].label == "instruction" and markers[k + 1].number == marker.number:
                blocks.append(k)
    return blocks


def read_block(text, markers, end):
    """The fields of one task as {instruction, input, output}; None without an output. `end` is where it ends."""
    head = next(marker for marker in markers if marker.label == "instruction")
    # An output may quote labels: the one with the instruction's number comes before any other.
    for fits in (lambda m: m.number == head.number, lambda m: m.number >= 0, lambda m: True):
        after = [m for m in markers if m.label == "output" and m.start > head.start and fits(m)]
        if after:
            output = after[0]
            inputs = [m for m in markers if m.label == "input" and m.start < output.start]
            inputs = [m for m in inputs if fits(m)] or inputs
            chosen = sorted([head, output, *inputs[:1]])
            stops = [*(m.start for m in chosen[1:]), end]
            fields = {m.label: clean(text[m.end : stop]) for m, stop in zip(chosen, stops, strict=True)}
            given = fields.get("input", "")
            if re.sub(r"[<>\[\]().。（）\s]+", " ", given).strip().lower() in NO_INPUT:
                given = ""
            return {"instruction": fields["instruction"], "input": given, "output": fields["output"]}
    return None


def clean(field):
    """A field without what belongs to the form: separators and headings of the next task, a fence left open, bold."""
    lines = field.strip().split("\n")
    fences = sum(bool(FENCE.match(line)) for line in lines)
    while lines:
        is_fence = bool(FENCE.match(lines[-1]))
        loose = is_fence and (fences % 2 or (len(lines) > 1 and FENCE.match(lines[-2])))
        if not (loose or BETWEEN.fullmatch(lines[-1]) or not lines[-1].strip()):
            break
        lines.pop()
        fences -= is_fence
    field = "\n".join(lines).strip()
    return field.removesuffix("**").rstrip() if field.count("**") % 2 else field


def parse_response(text, finish_reason, num_prompt_instructions):
    """Parse an answer. Returns (tasks, dropped): [(block number, {instruction, input, output})] and
    [(block number, reason, text)]. The blocks of both together are the whole answer, but for a preamble.
    """
    tasks, dropped = [], []
    answer = without_reasoning(text)
    markers = find_markers(answer)
    head = answer[: markers[0].start].rstrip() if markers else ""
    if head and markers[0].label != "instruction" and not BETWEEN.fullmatch(head.rpartition("\n")[2]):
        markers.insert(0, Marker(0, 0, "instruction", num_prompt_instructions + 1))  # it goes on from the prompt
    blocks = find_blocks(answer, markers)
    if not blocks:
        return [], [(0, "no task found" if answer.strip() else "empty answer", text)]
    for number, (first, stop) in enumerate(zip(blocks, [*blocks[1:], len(markers)], strict=True)):
        is_last, rest, reason = stop == len(markers), "", ""
        end = len(answer) if is_last else markers[stop].start
        task = read_block(answer, markers[first:stop], end)
        if is_last and finish_reason == "length":
            reason = "cut off by the token limit"
        elif task is None:
            reason = "no output label"
        elif not task["instruction"]:
            reason = "empty instruction"
        else:
            task["output"], rest = split_tail(task["output"])
            if not task["output"]:
                reason = "empty output"
            elif re.search("[\x00\ud800-\udfff]", "".join(task.values())):
                reason = "broken characters"
        if reason:
            dropped.append((number, reason, answer[markers[first].start : end]))
        else:
            tasks.append((number, task))
        if rest:
            dropped.append((number, "text between tasks", rest))
    return tasks, dropped


def split_tail(output):
    """(output, what follows a separator line in it): the farewell behind the last task, for example."""
    fenced = False
    for match in re.finditer(r"^(?:###|[ \t]*(```)[^`\n]*)[ \t]*$", output, re.MULTILINE):
        if match[1]:
            fenced = not fenced
        elif not fenced:
            return clean(output[: match.start()]), output[match.end() :].strip()
    return output, ""


# ---------------------------------------------------------------------------------------------------------------------
# What is kept: the rules, and the filter by ROUGE-L with everything kept so far
# ---------------------------------------------------------------------------------------------------------------------

# Scripts that are written without spaces between words: Chinese characters, kana, hangul, and south-east Asian ones.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff" \
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"  # fmt: skip
# Accents and vowel signs belong to the word that they stand in.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
TOKEN = re.compile(rf"[{NO_SPACES}]|(?:(?![{NO_SPACES}])[^\W_]|[{MARKS}])+")
# A character of a script without spaces counts as a word.
WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")
RULES = ("length", "program", "punctuation", "blacklist")
# What a model without eyes, ears and hands cannot do; the words are Stanford Alpaca's.
BLACKLIST = (
    "image, images, graph, graphs, picture, pictures, file, files, map, maps, draw, plot, go to, video, audio, music, "
    "flowchart, diagram"
).split(", ")


def find_word_in_string(w, s):
    """The match of a whole word in a text, whatever its case; None where it does not occur."""
    spaceless = re.compile(f"[{NO_SPACES}]")  # such a character may have letters beside it
    before = "" if spaceless.match(w[0]) else r"(?<!\w)"
    after = "" if spaceless.match(w[-1]) else r"(?!\w)"
    return re.search(before + re.escape(w) + after, s, re.IGNORECASE)


def broken_rule(instruction, rules=RULES, blacklist=BLACKLIST):
    """The rule of Stanford Alpaca that an instruction breaks, as words; "" where it breaks none of `rules`."""
    num_words = len(WORD.findall(instruction))
    if "length" in rules and num_words <= 3:
        return "instruction too short"
    if "length" in rules and num_words > 150:
        return "instruction too long"
    if "blacklist" in rules and any(find_word_in_string(word, instruction) for word in blacklist):
        return "blacklisted word"
    if "program" in rules and instruction.startswith("Write a program"):
        return "starts with Write a program"
    if "punctuation" in rules and unicodedata.normalize("NFKC", instruction[0])[0] in string.punctuation + "。、":
        return "starts with punctuation"
    return ""


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


def f_measures(lcs, length, lengths):
    """ROUGE-L F1 of a text of `length` tokens with others: rouge_score's own float operations in its order.

    `lcs` and `lengths` are integer arrays (pool,): how long the common subsequences are, and the others.
    """

    def compute(lcs, lengths):
        precision, recall = lcs / np.maximum(lengths, 1), lcs / length
        with np.errstate(invalid="ignore"):
            return np.where(lcs > 0, 2 * precision * recall / (precision + recall), 0.0)

    height, width = int(lcs.max(initial=0)) + 1, int(lengths.max(initial=0)) + 1
    if height * width > 100_000:  # else each case that there can be is computed once
        return compute(lcs, lengths)
    table = compute(np.arange(height)[:, None], np.arange(width)[None])
    return table.ravel()[lcs * width + lengths]


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
        self.lengths = np.zeros(1024, dtype=np.int32)  # in tokens, of self.coded; grown by doubling

    def code(self, text):
        """The tokens of a text as a string with one character for each; the string is never encoded."""
        return "".join(chr(self.ids.setdefault(token, len(self.ids))) for token in self.tokenize(text))

    def add(self, text, coded=None):
        """Put a text into the pool without asking."""
        coded = self.code(text) if coded is None else coded
        if len(self.coded) == len(self.lengths):
            self.lengths = np.concatenate([self.lengths, np.zeros_like(self.lengths)])
        self.lengths[len(self.coded)] = len(coded)
        self.texts.append(text)
        self.coded.append(coded)

    def judge(self, texts):
        """Judge a batch in order; what is kept joins the pool, before the next is judged.

        Returns for each text {"kept": True, "most_similar_instructions": {text: score} of the ten nearest, highest
        first and the older first among equals, "avg_similarity_score": mean over the pool}, or {"kept": False,
        "reason", and for a duplicate "similar_to" and "score"}.
        """
        coded, known, verdicts = [self.code(text) for text in texts], len(self.coded), []
        lcs = process.cdist(coded, self.coded + coded, scorer=LCSseq.similarity, dtype=np.int32)
        fresh = []  # columns of this batch that have been kept
        for text, code, row in zip(texts, coded, lcs, strict=True):
            if not code:
                verdicts.append({"kept": False, "reason": "no words"})
                continue
            common = np.concatenate([row[:known], row[fresh]]) if fresh else row[:known]
            scores = f_measures(common, len(code), self.lengths[: len(self.coded)])
            best = int(scores.argmax()) if len(scores) else 0
            if len(scores) and scores[best] > self.threshold:
                near = {"similar_to": self.texts[best], "score": float(scores[best])}
                verdicts.append({"kept": False, "reason": "duplicate", **near})
                continue
            bar = np.partition(scores, -10)[-10] if len(scores) > 10 else -1.0
            top = np.flatnonzero(scores >= bar)
            top = top[np.argsort(-scores[top], kind="stable")][:10]
            nearest = {self.texts[i]: float(scores[i]) for i in top}
            mean = float(scores.mean()) if len(scores) else 0.0
            verdicts.append({"kept": True, "most_similar_instructions": nearest, "avg_similarity_score": mean})
            fresh.append(known + len(verdicts) - 1)
            self.add(text, code)
        return verdicts


# ---------------------------------------------------------------------------------------------------------------------
# The journal of all answers, and the rows that are taken from them
# ---------------------------------------------------------------------------------------------------------------------


class Journal:
    """JSON Lines, only ever appended to: {"run": settings}, {"request": number, ...} an answer or a failure, and
    {"wrote": sha256} of each regen.json. A line counts when it is on the disk with its end.
    """

    def __init__(self, path):
        self.path, self.answers, self.runs, self.wrote, self.size = Path(path), {}, [], set(), 0
        data = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(data.split(b"\n")[:-1], 1):  # behind the last line end stands a torn line or b""
            try:
                entry = json.loads(line)
                if "request" in entry:
                    self.answers.setdefault(entry["request"], entry)
                elif "run" in entry:
                    self.runs.append(entry["run"])
                else:
                    self.wrote.add(entry["wrote"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: not a line of a journal; mend or remove the line") from None
            self.size += len(line) + 1
        if len(data) > self.size:
            say(f"{path}: cut off {len(data) - self.size} bytes of an unfinished last line")

    def append(self, entry):
        """Append a line and wait for the disk; half a line, now or of a process that was killed, is cut off."""
        # A lone surrogate has no UTF-8 form; the escape that takes its place is JSON's too.
        line = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self.size)
            try:
                rest = line
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(self.size)
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room, then go on") from None
        self.size += len(line)
        if "request" in entry:
            self.answers[entry["request"]] = entry


def read_regenerated(path):
    """The rows of a regen.json, ours or the original's."""
    text, problems = utils.read_text(path), ["not valid JSON; its writer may have been killed"]
    with contextlib.suppress(ValueError, RecursionError):
        rows = json.loads(text)
        problems = ["not a list of rows"]
        if isinstance(rows, list):
            problems = utils.read_records([(path, text)])[1]
    if problems:
        raise UserError(f"{path}: {problems[0]}; mend it, move it away, or choose another --output_dir")
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
            tasks, dropped = parse_response(entry["text"], entry["finish_reason"], len(entry["demonstrations"]))
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
        prompt = encode_prompt(self.draw(request), self.args.header)
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
        """The line of progress."""
        args, kept, target = self.args, len(self.rows), self.args.num_instructions_to_generate
        new, num_requests, about = kept - self.num_old, len(self.committed), "~" if self.estimated else ""
        parts = [f"kept {kept:,}/{target:,}", f"{self.per_request:.1f} per request", f"{num_requests:,} requests"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common(3))
        parts.append(f"dropped {self.reasons.total():,}{f' ({reasons})' if reasons else ''}")
        if self.failures:
            parts.append(f"{self.failures.total():,} failed")
        tokens_in, tokens_out = self.usage.values()
        parts.append(f"tokens {about}{tokens_in:,} in {about}{tokens_out:,} out")
        if args.price_in is not None or args.price_out is not None:
            cost = self.cost(self.usage)
            whole = f", {cost / new * (target - self.num_old):.4f} at {target:,}" if new else ""
            parts.append(f"cost {about}{cost:.4f}{whole}")
        if new and kept < target:
            left = int((time.monotonic() - self.began) / new * (target - kept))
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        return "  ".join(parts)

    def account(self):
        """One line in which the counts add up."""
        kept, dropped = len(self.rows) - self.num_old, self.reasons.total()
        parts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        old = f", and {self.num_old:,} rows that were there before" if self.num_old else ""
        return f"{kept + dropped:,} blocks = {kept:,} kept + {dropped:,} dropped{f' ({parts})' if parts else ''}{old}"


# ---------------------------------------------------------------------------------------------------------------------
# Servers that speak OpenAI's protocol
# ---------------------------------------------------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-mini"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30  # before a request is tried again: doubled from time to time


def estimate_tokens(text):
    """About how many tokens a text has: one for four ASCII characters, one for any other character."""
    ascii_only = sum(character < "\x80" for character in text)
    return ascii_only // 4 + len(text) - ascii_only


def retry_after(headers):
    """Seconds that a server asks to wait; None where it does not. A date is measured from the server's own."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / unit)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        until = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, (until - parsedate_to_datetime(headers["date"])).total_seconds())
    return None


def pause_before(attempt):
    """Seconds before another attempt; they differ, so that requests refused together do not come back together."""
    return min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1)


class ChatClient:
    """Asks one model of one server, with bounded retries, and learns which parameters the model refuses.

    `args.timeout` is the longest that an attempt, or a wait asked for by the server, may take, in seconds. `ending`,
    once set, lets requests on the wire arrive and starts no other attempt. Use it inside one event loop.
    """

    def __init__(self, args):
        import openai

        key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key and args.base_url == OPENAI_URL:
            raise UserError("no key: set the environment variable OPENAI_API_KEY, or give --base_url of another server")
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has; set it again")
        self.openai, self.key, self.timeout, self.max_retries = openai, key, args.timeout, args.max_retries
        client = openai.AsyncOpenAI(api_key=key or "none", base_url=args.base_url, timeout=args.timeout, max_retries=0)
        self.client, self.model, self.endpoint = client, args.model_name, args.endpoint
        self.parameters = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
        self.name, self.num_answers, self.ending = f"{self.model} at {args.server}", 0, asyncio.Event()

    async def ask(self, prompt):
        """The answer to a text: {text, finish_reason, model, usage, attempts}; where it fails, {failed: why, usage}.

        The usage is that of all attempts. Raises UserError for what no other request can get past either, and
        CancelledError where `ending` is set before there is an answer.
        """
        content, create = {"messages": [{"role": "user", "content": prompt}]}, self.client.chat.completions.create
        if self.endpoint == "text":
            content, create = {"prompt": prompt}, self.client.completions.create
        usage, attempts = {"prompt_tokens": 0, "completion_tokens": 0}, 0
        while not self.ending.is_set():
            sent, pause = dict(self.parameters), None
            try:
                async with asyncio.timeout(self.timeout):  # the client's own limit is for each read: a drip never ends
                    response = await create(model=self.model, **content, **sent)
                answer, problem = self._read(response, prompt, usage)
                if answer:
                    self.num_answers += 1
                    return {**answer, "usage": usage, "attempts": attempts + 1}
            except self.openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._adapt(error, sent):
                    continue
                problem, pause = self._public(error), retry_after(error.response.headers)
                self._raise_if_final(error, problem, pause)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    break
            except (TimeoutError, self.openai.APITimeoutError):
                problem = f"no answer within {self.timeout:g} s"
            except self.openai.APIConnectionError as error:
                problem = f"no connection ({self._public(error.__cause__ or error)})"
            except (self.openai.APIError, ValueError) as error:  # ValueError: a body that is not JSON
                problem = f"bad answer ({self._public(error)})"
            attempts += 1
            if attempts > self.max_retries:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause_before(attempts) if pause is None else pause)
        else:
            raise asyncio.CancelledError
        if not self.num_answers:
            raise UserError(f"{self.name} has not answered once: {problem}; the same command tries again")
        return {"failed": problem, "usage": usage}

    def _public(self, error):
        """The first line of an error, without the key."""
        return utils.first_line(error).replace(self.key or "\n", "[key]")

    def _raise_if_final(self, error, problem, pause):
        """Raise UserError for what no request of this run can get past."""
        status, said = error.status_code, f"{error.code} {error.type} {error.message}".lower()
        if status == 429 and ("insufficient_quota" in said or "billing" in said):
            status = 402
        advice = {
            401: "check OPENAI_API_KEY" if self.key else "set the environment variable OPENAI_API_KEY",
            402: "there is no credit left; put it in order",
            403: "this key may not do that; choose another --model_name, or check the key",
            404: "check --model_name and --base_url, which mostly ends in /v1",
        }.get(status)
        if pause is not None and pause > self.timeout:
            advice = f"it asks to wait {pause:.0f} s; wait, or give a longer --timeout"
        if advice:
            raise UserError(f"{self.name}: {problem}: {advice}; then the same command goes on") from None

    def _read(self, response, prompt, usage):
        """({text, finish_reason, model}, "") or (None, what is wrong), whatever a server sends; adds to `usage`."""
        if isinstance(response, str):
            return None, f"bad answer (not JSON: {self._public(response)[:60]!r})"
        text, problem, counted = None, "bad answer (no choices)", (None, None)
        with contextlib.suppress(AttributeError, LookupError, TypeError):
            choice = response.choices[0]
            problem = f"bad answer (no text, finish_reason {choice.finish_reason})"
            text = choice.text if self.endpoint == "text" else choice.message.content
        with contextlib.suppress(AttributeError):
            counted = response.usage.prompt_tokens, response.usage.completion_tokens
        if not all(isinstance(count, int) for count in counted):
            counted = estimate_tokens(prompt), estimate_tokens(text if isinstance(text, str) else "")
            usage["estimated"] = True
        usage["prompt_tokens"] += counted[0]
        usage["completion_tokens"] += counted[1]
        if not isinstance(text, str):
            return None, problem
        model = response.model if isinstance(getattr(response, "model", None), str) else self.model
        return {"text": text, "finish_reason": choice.finish_reason, "model": model}, ""

    def _adapt(self, error, sent):
        """Rename or drop the parameter that the server refuses; whether there is something new to try."""
        said = error.message.replace("`", "'")
        named = [key for key in sent if key == error.param]
        if not named and re.search("support|unknown|unexpected|unrecognized|extra|permitted|allowed|invalid", said):
            named = [key for key in sent if re.search(rf"\b{key}\b", said)]
        if not named or re.search(r"context.{0,20}(length|window|size)", f"{error.code} {said}"):
            return False  # the latter says that the prompt is too long, and speaks of max_tokens too
        name, how = named[0], "sent without it"
        if name in self.parameters:  # else another request has met the same
            value = self.parameters.pop(name)
            if name == "max_tokens":
                self.parameters["max_completion_tokens"], how = value, "sending it as max_completion_tokens"
            say(f"{self.name}: refuses {name} {value}; from here on {how}")
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Before the first request: arguments, seeds, and what the folder holds already
# ---------------------------------------------------------------------------------------------------------------------


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
    temperature: float = setting(1.0, "Sampling temperature.", 0, 2)
    top_p: float = setting(1.0, "Share of probability that is sampled from.", 0, 1)
    num_cpus: int = setting(None, "Has no meaning any more.")
    _: dataclasses.KW_ONLY
    base_url: str = setting(None, "The server (default: OPENAI_BASE_URL, else OpenAI's), as http://HOST:8000/v1.")
    endpoint: str = setting("chat", "chat, or text for base models (text completions).")
    max_tokens: int = setting(3072, "The longest answer, in tokens.", 1)
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
    replay: bool = setting(
        False, "Parse and judge all answers of the journal anew, with the rules given; send nothing."
    )
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
    args.base_url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    args.server = re.sub("//[^/@]*@", "//", args.base_url.partition("?")[0])  # without what may be secret in it
    if not re.match("https?://[^/]", args.base_url):
        problems.append(f"--base_url {args.base_url}: must begin with http:// or https://")
    rules = args.quality_rules
    rules = re.split(r"[,\s]+", rules.strip()) if isinstance(rules, str) else list(rules)
    args.quality_rules = [rule for rule in rules if rule not in ("", "none")]
    wrong = [rule for rule in args.quality_rules if rule not in RULES]
    if wrong:
        problems.append(f"--quality_rules {wrong[0]}: must be none, or some of {','.join(RULES)}")
    args.output_dir = Path(args.output_dir)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        problems.append(f"{args.output_dir}: is a file; choose another --output_dir")
    if problems:
        raise UserError("; ".join(problems))
    args.num_parallel_requests = args.num_parallel_requests or args.request_batch_size
    args.blacklist = BLACKLIST
    if args.blacklist_path:
        text = utils.read_text(args.blacklist_path, "; --blacklist_path takes a text file of one word a line")
        args.blacklist = [line.strip() for line in text.split("\n") if line.strip()]
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
    shown = list(reasons.values()).count("")
    if shown < args.num_prompt_instructions:
        asked = args.num_prompt_instructions
        raise UserError(f"{path}: {shown} tasks can be shown, --num_prompt_instructions asks for {asked}")
    return list(seeds.values())


def adopt_rows(folder, journal):
    """Rows that the folder held before its journal began; kept in regen.start.json from then on."""
    path, start = folder / "regen.json", folder / "regen.start.json"
    if path.exists() and not journal.runs:
        rows = read_regenerated(path)
        utils.write_text(start, path.read_text(encoding="utf-8-sig"))
        say(f"{path}: going on from its {len(rows):,} rows, which are kept in {start.name}")
    elif path.exists():
        known = journal.wrote | {utils.sha256_of(start) if start.exists() else ""}
        if utils.sha256_of(path) not in known:
            advice = "move it away, or choose another --output_dir"
            raise UserError(f"{path}: not as the run of {journal.path.name} wrote it; {advice}")
    return read_regenerated(start) if start.exists() else []


def record_run(args, journal):
    """Write the settings into the journal, and say what has changed; other rules are for --replay alone."""
    seeds = hashlib.sha256(Path(args.seed_tasks_path).read_bytes()).hexdigest()
    judged = {"rouge_threshold": args.rouge_threshold, "quality_rules": args.quality_rules, "seed_tasks": seeds[:16]}
    judged["blacklist"] = args.blacklist
    names = "model_name endpoint temperature top_p max_tokens num_prompt_instructions num_generated_in_prompt"
    asked = {name: getattr(args, name) for name in [*names.split(), "num_parallel_requests", "seed"]}
    asked["base_url"], asked["prompt"] = args.server, hashlib.sha256(args.header.encode()).hexdigest()[:16]
    last = journal.runs[-1] if journal.runs else {"judged": judged, "asked": asked}
    if args.replay:
        asked = last["asked"]  # nothing is
    changes = {"judged": [], "asked": []}
    for key, settings in (("judged", judged), ("asked", asked)):
        for name, now in settings.items():
            if last[key].get(name) != now:
                changes[key].append(f"{name} was {last[key].get(name)} and is {now}")
    if changes["judged"] and not args.replay:
        advice = "give the old settings, judge all answers anew with --replay, or choose another --output_dir"
        raise UserError(f"{args.output_dir}: its rows were judged otherwise: {'; '.join(changes['judged'])}; {advice}")
    if changes["asked"]:
        say(f"{args.output_dir}: from here on {'; '.join(changes['asked'])}")
    if not journal.runs or any(changes.values()):
        facts = {"versions": utils.versions("openai", "rapidfuzz", "rouge_score"), "git_commit": utils.git_commit()}
        journal.append({"run": {"judged": judged, "asked": asked, **facts}})


# ---------------------------------------------------------------------------------------------------------------------
# The story
# ---------------------------------------------------------------------------------------------------------------------


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
        entry |= await self.client.ask(encode_prompt(shown, self.args.header))
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
            advice = "then try another --model_name, more --max_tokens or more --patience"
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
    requests = math.ceil((args.num_instructions_to_generate - collection.num_old) / rows)
    cost = f"at most about {collection.cost(usage) * requests:.4f} for these requests"
    if args.price_in is None and args.price_out is None:
        cost = "give --price_in and --price_out, per million tokens"
    return (
        f"{encode_prompt(collection.draw(0), args.header)}\n"
        f"--- {args.model_name} at {args.server}, temperature {args.temperature}, top_p {args.top_p}\n"
        f"--- an estimate, by characters: about {usage['prompt_tokens']:,} tokens in a request, at most "
        f"{args.max_tokens:,} out; at least {requests:,} requests, if each gave {rows} new rows\n"
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
    if digest not in journal.wrote:
        journal.append({"wrote": digest})
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
        print(preview(args, Collection(args, seeds, [])))
        return
    client = None if args.replay else ChatClient(args)
    with utils.claim_folder(args.output_dir):
        go_on(args, seeds, Journal(args.output_dir / "regen.journal.jsonl"), client)


# To fire, and to whoever asks for the signature, it is a function of the options.
generate_instruction_following_data.__signature__ = inspect.signature(Options)
ABOUT = "".join(f"      {field.name}: {field.metadata['help']}\n" for field in dataclasses.fields(Options))
if generate_instruction_following_data.__doc__:  # python -OO has none
    generate_instruction_following_data.__doc__ += f"\n    Args:\n{ABOUT}"


def go_on(args, seeds, journal, client):
    """Bring the folder from what the journal holds to what is asked for; without a client nothing is sent."""
    if args.replay and not journal.runs:
        raise UserError(f"{journal.path}: no answers to replay; leave --replay out")
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
        say(f"{message}; the same command goes on")
    print(f"{args.output_dir / 'regen.json'}: {len(collection.rows):,} rows", flush=True)
    if code:
        sys.exit(code)


def main(task="generate_instruction_following_data", **kwargs):
    """Run a task by its name, as in Stanford Alpaca; there is one."""
    if task != "generate_instruction_following_data":
        raise UserError(f"{task}: no such task; there is generate_instruction_following_data")
    return generate_instruction_following_data(**kwargs)


def command_line():
    """Parse the command line with fire, wholly, and only then run."""
    import fire

    words, said, given = sys.argv[1:], io.StringIO(), []
    task = words.pop(0) if words and not words[0].startswith("-") else generate_instruction_following_data.__name__

    @fire.decorators.SetParseFn(str, *(field.name for field in dataclasses.fields(Options) if field.type is str))
    @functools.wraps(generate_instruction_following_data)
    def parse(*positional, **options):
        given.append(Options(*positional, **options))

    try:
        with contextlib.redirect_stderr(sys.stderr if {"--help", "-h"} & set(words) else said):
            fire.Fire(parse, command=words, name="generate_instruction.py")
    except fire.core.FireExit as stop:
        if stop.code == 0:
            raise
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
