"""What Cria's scripts share and must agree on: errors, files, records, prompts, options, tokenizers, run.json.

Importing it does nothing: torch, transformers and sentencepiece are imported inside the functions that need them.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

# --- Errors, and talking to the user ---------------------------------------------------------------------------------

HELD = []  # locks of folders: these last as long as their files are open, also where nobody keeps them


class UserError(Exception):
    """Something the user can mend: the text says what is wrong, where, and what to do, on one line.

    `code` is the exit code; with another than 2 it is no error but an end, as by a signal (128 + its number).
    """

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def first_line(error):
    """The first line of an error's text, shortened: for quoting another library's message inside ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def rank():
    """This process's number in the run, as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def printable(text):
    """The text with what a terminal would obey as \\x1b or \\u009b: all but newline and tab; JSON stays JSON."""
    unsafe = "[\0-\b\v-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"  # C0, C1, directions, halves of UTF-16
    return re.sub(unsafe, lambda c: f"\\x{ord(c[0]):02x}" if c[0] < " " else f"\\u{ord(c[0]):04x}", text)


def terminal_width(stream):
    """The columns of the terminal that a stream writes to; None or False where it is none, or one without escapes."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # of a stream that is closed, or is no file
        return os.environ.get("TERM") != "dumb" and (os.get_terminal_size(stream.fileno()).columns or 80)


def put(text, end="\n"):
    """Print on stderr; where its terminal or its reader is gone, as tee is after Ctrl-C, all goes on without it."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def say(message, anyone=False):
    """Print one line on stderr, in the place of a progress line, from the run's first process, or from `anyone`."""
    if sys.stderr and (anyone or rank() == 0):
        put("\r\x1b[K" * bool(terminal_width(sys.stderr)) + printable(message))


def show_progress(line, is_due=False, is_last=False):
    """Rewrite the line of progress on a terminal, cut to its width; elsewhere print it where it is due, or the last."""
    if width := terminal_width(sys.stderr):
        from tqdm.utils import disp_trim

        put(f"\r{disp_trim(line, width - 1)}\x1b[K", end="\n" * is_last)
    elif is_due or is_last:
        say(line)


@contextlib.contextmanager
def say_if_slow(message):
    """Say what is being waited for where the block takes longer than ten seconds."""
    timer = threading.Timer(10, say, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def on_signals(handler, *numbers):
    """Within the block the signals `numbers` call handler(number, frame).

    One that is ignored stays so: nohup ignores SIGHUP. Outside the main thread there are no signals.
    """
    old = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def first_to_fail():
    """A socket for one process of the run on each machine, the first that asks, as its name is given once; else None.

    A process without a launcher has no others.
    """
    claim = socket.socket(socket.AF_UNIX)
    if "LOCAL_RANK" not in os.environ:
        return claim
    run = [str(os.getppid()), *(os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))]
    with contextlib.suppress(OSError):
        claim.bind(f"\0cria-failed-{'-'.join(run)}")
        return claim


def leave(message, code):
    """End this process at once, without what libraries do at exit; the line is said by the first that asks.

    It is said again when the launcher has ended, whose own report of 30 lines would bury it.
    """
    if message and (claim := first_to_fail()):
        say(line := " ".join(message.split("\n")), anyone=True)
        if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():  # of torchrun, of deepspeed
            wait = 'i=0; while kill -0 "$1" 2>/dev/null && [ $i -lt 400 ]; do i=$((i+1)); sleep 0.1; done; sleep 0.2'
            script = f'({wait}; printf "%s\\n" "$2" >&2) &'  # no child of ours, which the launcher would end with us
            words = ["sh", "-c", script, "sh", str(os.getppid()), printable(line)]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
            subprocess.run(words, **quiet, pass_fds=[claim.fileno()])
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def process_group():
    """torch.distributed where a process group exists, else None; torch is not imported for the question."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def end_by_ctrl_c():
    """Let Ctrl-C end the process without a traceback while libraries load; `run_main` hears it again."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_main(main, goes_on=False):
    """Run a script's `main`; what is the user's to mend ends as one line on stderr and exit code 2, no traceback.

    Returns only where it `goes_on` and `main` has returned.
    """
    message, code = "", 0
    for number in range(3):  # one that the shell has closed: else the next file that is opened would take its place
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see end_by_ctrl_c
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if goes_on:
            return end_by_ctrl_c()
        if sys.stdout:
            sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code or 0
    except UserError as error:
        message, code = f"{'error: ' * (error.code == 2)}{error}", error.code
    except KeyboardInterrupt:
        message, code = "interrupted; the same command begins again", 130
    except BrokenPipeError:  # its reader has what it wanted, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"error: {where}{error.strerror or error}", 2
    is_group = process_group() is not None
    if is_group and not message:  # in step with the others; after an error they may wait for this one for ever
        process_group().barrier()
        process_group().destroy_process_group()
    if is_group or message:  # threads of DeepSpeed at times abort the interpreter's own way out
        leave(message, code)
    sys.exit(code)


# --- Files -----------------------------------------------------------------------------------------------------------


def jload(f, mode="r"):
    """Load JSON from a path or an open file; a .jsonl file, or any of one JSON value per line, becomes a list."""
    if not isinstance(f, io.IOBase):
        with open(f, mode=mode, encoding=None if "b" in mode else "utf-8-sig") as opened:
            return jload(opened)
    text = f.read()
    lines = [line for line in text.split("\n" if isinstance(text, str) else b"\n") if line.strip()]
    if not str(getattr(f, "name", "")).endswith(".jsonl"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            if len(lines) < 2:
                raise
        except RecursionError:
            raise ValueError("JSON is nested too deeply to be read") from None
    return [json.loads(line) for line in lines]


def jdump(obj, f, mode="w", indent=4, default=str):
    """Write a str as it is, or a dict or list as JSON, to a path (its folders are made) or an open file."""
    if not isinstance(obj, (str, dict, list)):
        raise ValueError(f"jdump writes a str, dict or list, not {type(obj).__name__}")
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
    text.encode("utf-8")  # a lone surrogate must fail before the file is emptied
    if not isinstance(f, io.IOBase):
        os.makedirs(os.path.dirname(os.path.abspath(f)), exist_ok=True)
    with contextlib.nullcontext(f) if isinstance(f, io.IOBase) else open(f, mode=mode, encoding="utf-8") as opened:
        opened.write(text)


def write_text(path, text):
    """Write a file so that `path` holds the old text or the new one, whole, whatever happens.

    Raises UserError where the disk does not take it.
    """
    hidden = Path(f"{path}.tmp")
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        with open(hidden, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except OSError as error:
        hidden.unlink(missing_ok=True)
        what = f"{path}: cannot be written ({error.strerror})"
        raise UserError(f"{what}; make room, then give the same command again") from None


def write_json(obj, path):
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, default=str))


def size_of(count):
    """A number of bytes in words: "2.5 GiB", "12.0 MiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


# How a file begins that is not what a script reads, what it is, and what makes of it a file that can be read.
PYTHON = "python -c 'import json, sys, {}; json.dump({}, sys.stdout)' {{path}} > converted.json"
PANDAS = PYTHON.format("pandas", 'json.loads(pandas.read_{}(sys.argv[1]).to_json(orient="records"))')
FILE_KINDS = (
    (rb"\x1f\x8b", "gzip data", "gzip -dc < {path} > converted.json"),
    (rb"BZh\d1AY", "bzip2 data", "bzip2 -dc < {path} > converted.json"),
    (rb"\xfd7zXZ", "xz data", "xz -dc < {path} > converted.json"),
    (rb"\x28\xb5\x2f\xfd", "zstd data", "zstd -dc < {path} > converted.json"),
    (rb"PK\x03\x04(?=.{0,3000}xl/)", "an Excel workbook", PANDAS.replace("{}", "excel")),
    (rb"PK\x03\x04", "a zip archive", "unzip {path}"),
    (rb"PAR1", "Parquet", PANDAS.replace("{}", "parquet")),
    (rb"ARROW1|\xff\xff\xff\xff", "Arrow", PYTHON.format("datasets", "[*datasets.Dataset.from_file(sys.argv[1])]")),
    (rb"SQLite format 3", "an SQLite database", "sqlite3 -json {path} 'select * from TABLE' > converted.json"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "let the program that wrote it write JSON"),
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file", "git lfs pull"),
    (rb"(?i)\s*<(?:!doctype|html|\?xml)", "a web page or XML", "download the file itself, not the page that shows it"),
)
RECORD_KINDS = (  # text, where records are expected
    (
        rb"[\w\" \x80-\xff]+(?:[,;\t][\w\" \x80-\xff]+)+\r?\n",
        "a table",
        "let its name end in .csv: mv {path} {path}.csv",
    ),
    (rb"(?:---\s*|\w+:\s*|- +\w+:.*?)\n", "YAML", PYTHON.format("yaml", 'yaml.safe_load(open(sys.argv[1], "rb"))')),
)
ICONV = "iconv -f {} -t UTF-8 {} > converted.json"
EVERYDAY = {  # encoding: the bytes of its most used characters, and of how many characters one is of these
    "GB18030": (rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]", 1),
    "BIG5": (rb"[\xa1-\xc6].", 1),
    "CP949": (rb"[\xb0-\xc8][\xa1-\xfe]", 1),
    "CP932": (rb"\x82[\x9f-\xf1]|\x83[\x40-\x96]", 3),  # kana
    "EUC-JP": (rb"[\xa4\xa5].", 3),
}


def read_text(path, hint=""):
    """The text of a file; see `decode`. Raises UserError, with `hint`, where there is none."""
    try:
        return decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from None


def decode(data, path):
    """The bytes of a UTF-8 file as text, without a byte order mark. Raises UserError, with the cure, for any others."""
    if kind := file_kind(path, data):
        raise UserError(f"{path}: {kind}")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset, line, names = error.start, data.count(b"\n", 0, error.start) + 1, encodings_of(data)
    where = f"{path}:{line}: byte 0x{data[offset]:02x} at offset {offset} is not UTF-8"
    likely = f"it looks like {' or '.join(names)}" if names else "its writer may know the ENCODING"
    raise UserError(f"{where}; {likely}: {ICONV.format((names or ['ENCODING'])[0], shlex.quote(str(path)))}")


def file_kind(path, data, kinds=FILE_KINDS):
    """What a file is by its first bytes, with the cure, where it is none of text; else ""."""
    for pattern, what, cure in kinds:
        if re.match(pattern, data.removeprefix(b"\xef\xbb\xbf"), re.DOTALL):
            return f"it is {what}; {cure.format(path=shlex.quote(str(path)))}"
    name = json.detect_encoding(data).upper()  # by its first bytes, which are ASCII in JSON; NUL is UTF-8 too
    with contextlib.suppress(UnicodeDecodeError):
        if not name.startswith("UTF-8") and data.decode(name):
            return f"it is {name}; {ICONV.format(re.sub('-(?=.E)', '', name), shlex.quote(str(path)))}"
    return ""


def encodings_of(data):
    """What text that is not UTF-8 may be in, the likeliest first, by its share of everyday characters; [] for no clue.

    A letter of Western Europe stands alone between others.
    """
    high, alone = rb"[\x80-\xff]", rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])"
    shares = {"WINDOWS-1252": len(re.findall(alone, data)) / len(re.findall(high, data))}
    pairs = re.findall(rb"[\x80-\xff].", data, re.DOTALL)
    for name, (everyday, times) in EVERYDAY.items():
        with contextlib.suppress(UnicodeDecodeError):
            data.decode(name)
            shares[name] = min(1, times * sum(bool(re.match(everyday, pair)) for pair in pairs) / max(len(pairs), 1))
            shares[name] += 0.2 * (name == "CP949" and len(pairs) > 20)  # all Hangul is hardly chance
    best = max(shares.values())
    return [name for name in sorted(shares, key=shares.get, reverse=True) if 0.5 <= shares[name] > best - 0.15]


def read_json(path, text=None, hint=""):
    """The JSON object of a file, or of its `text`. Raises UserError where it is none."""
    try:
        value = json.loads(read_text(path, hint) if text is None else text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: {json_problem(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {json_type(value)}, expected a JSON object")
    return value


def json_problem(error):
    """What is wrong with JSON, in words, by the exception of its parser."""
    where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
    where += "; a file holds one list, or one record a line" * where.startswith("Extra data")
    return f"not valid JSON, {where}"


# --- Records, conversations and prompts ------------------------------------------------------------------------------

# The two templates of Stanford Alpaca: a wire format, byte for byte. Nothing follows "### Response:"; the answer does.
PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


# The keys of a record, and those that our own files hold beside them: the generator's rows, chat.py's answers.
USED = {"instruction", "input", "output", "instances", "system", "history", "tools"}
KNOWN = USED | {"most_similar_instructions", "model", "demonstrations", "finish_reason"}


def json_type(value):
    """What a value read from JSON is, in JSON's words: "a number", "text", "null"."""
    words = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    if type(value) in words and value == value:
        return words[type(value)]
    try:
        return json.dumps(value)  # null, true, NaN
    except TypeError:  # of Parquet: bytes, dates
        return f"of the type {type(value).__name__}"


def once(pairs):
    """A JSON object as a dict, for the parser; raises ValueError where a key stands twice: one would win silently."""
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in the object of {', '.join(f'{k}: {str(v)[:40]!r}' for k, v in pairs)}")
    return made


# Where a record holds a conversation, and the keys of a turn's role and text there: ShareGPT's, OpenAI's.
TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
ROLES = {
    word: role
    for role, words in {
        "system": "system developer",
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt bot model bard bing function_call",  # a call is the assistant's to write
        "tool": "tool observation function function_response ipython",
    }.items()
    for word in words.split()
}
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
SURROGATE = re.compile("[\ud800-\udfff]")
HALF = "a lone surrogate (half of a character, such as \\ud83d), which has no UTF-8 form"
TALKS = {*TURNS, *sum(PAIRS, ()), "text"}  # the keys of a record without an instruction


def text_of_turn(value, where):
    """The text of a turn: text, or a list of parts {type: text, text}. Raises ValueError for anything else."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is {json_type(value)}, expected text")
    if value and SURROGATE.search(value):
        raise ValueError(f"{where} holds {HALF}")
    return value or ""


TURN_KEYS = ("name", "tool_call_id", "reasoning_content")  # which a chat template may write


def calls_of(turn, where):
    """The tool calls of a turn, their arguments as objects. Raises ValueError for what is no list of named calls."""
    calls = turn.get("tool_calls") or [turn[name] for name in ("function_call",) if turn.get(name)]
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is {json_type(calls)}, expected a list")
    found = []
    for call in calls:
        made = (call.get("function") or call) if isinstance(call, dict) else call
        if not isinstance(made, dict) or not isinstance(made.get("name"), str):
            raise ValueError(f"{where}: tool_calls: expected objects with a name, or with a function that has one")
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # what is no JSON stays as it is
            made = made | {"arguments": json.loads(made["arguments"])} if "arguments" in made else made
        found.append(call | {"function": made} if call.get("function") else made)
    return found


def conversation(record, key, needs_answer):
    """The turns of a record under `key` of TURNS as messages {role, content}; the tools stand in the system's.

    The user's, or a tool's result, and the assistant's take turns behind what the system says. Raises ValueError, with
    the turn, for what breaks that, for an unknown role and for a turn without text.
    """
    messages, said = [], text_of_turn(record.get("system"), "system")
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "[]") or []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools: {json_problem(error)}") from None
    if not isinstance(tools, list):
        raise ValueError(f"tools is {json_type(tools)}, expected a list")
    if said or tools:
        messages.append({"role": "system", "content": said} | ({"tools": tools} if tools else {}))
    for number, turn in enumerate(record[key], 1):
        where, keys = f"{key}, turn {number}", turn if isinstance(turn, dict) else ()
        pairs = [pair for pair in (TURNS[key], *TURNS.values()) if pair[0] in keys]
        names = next((pair for pair in pairs if turn[pair[0]] is not None), next(iter(pairs), None))
        if names is None:
            what = f"has no {TURNS[key][0]}" if isinstance(turn, dict) else f"is {json_type(turn)}"
            raise ValueError(f"{where} {what}; expected {{{TURNS[key][0]}, {TURNS[key][1]}}}")
        role = ROLES.get(str(turn[names[0]]).lower())
        if role is None:
            raise ValueError(f"{where}: {names[0]} is {turn[names[0]]!r}; known are {', '.join(ROLES)}")
        message = {"role": role, "content": text_of_turn(turn.get(names[1]), f"{where}: {names[1]}")}
        if calls := calls_of(turn, where):
            message["tool_calls"] = calls
        message |= {key: turn[key] for key in TURN_KEYS if isinstance(turn.get(key), str)}
        if turn.get("weight") == 0:
            raise ValueError(f"{where}: weight 0, but every turn of the assistant's is trained; leave the record out")
        if not message["content"].strip() and not calls:
            raise ValueError(f"{where}: {names[1]} is empty")
        if role == "system" and messages and messages[0] == {"role": "system", "content": "", "tools": tools}:
            messages[0]["content"] = message["content"]  # the tools came from beside it
            continue
        before = messages[-1]["role"] if messages else ""
        if role == "system" and messages:
            raise ValueError(f"{where}: a system's turn in the middle")
        if role == "assistant" and before in ("", "system"):
            raise ValueError(f"{where}: it begins with the assistant's turn; the user's is missing")
        results = len(list(itertools.takewhile(lambda m: m["role"] == "tool", reversed(messages))))
        asked = len(messages[-1 - results].get("tool_calls", ())) if len(messages) > results else 0
        is_next = role == before == "tool" and results < asked  # of several calls at once
        if (role == before == "assistant") or ({role, before} <= {"user", "tool"} and not is_next):
            raise ValueError(f"{where}: two turns of the same side, the {before}'s and the {role}'s")
        messages.append(message)
    if not messages or messages[-1]["role"] == "system":
        raise ValueError(f"{key}: holds no turn of the user's")
    if needs_answer and messages[-1]["role"] != "assistant":
        raise ValueError(f"{key}: ends with the {messages[-1]['role']}'s turn, which has no answer")
    return messages[:-1] if not needs_answer and messages[-1]["role"] == "assistant" else messages


def talk_of(record, needs_answer=True):
    """The key, or the pair of keys, under which a record without an instruction says something; () for none."""
    if record.get("instruction") is not None:
        return ()
    has = {key for key, value in record.items() if value is not None}  # Parquet writes null for what is absent
    turns = [(key,) for key in TURNS if isinstance(record.get(key), list)]
    pairs = [pair for pair in PAIRS if pair[0] in has and (pair[1] in has or not needs_answer)]
    text = [("text",)] if needs_answer and "text" in has and "output" not in has else []
    broken = [pair for pair in PAIRS if "instruction" not in record and {*pair} <= {*record}]
    return next(iter([*turns, *pairs, *text, *broken]), ())


def as_messages(record, needs_answer=True):
    """A record as messages {role, content}, in the order of the conversation.

    {instruction, input (optional), output} gives the user's, which has an `input` too, and the assistant's; with
    `history`, pairs of earlier questions and answers, and `system` these stand before. The names of PAIRS are taken
    for instruction and output; TURNS are conversations; {text} is a message of the role "text", which is trained whole.
    Where no answer is needed, it may be missing or null, and the last message is the user's: a question. Raises
    ValueError, whose text says what is wrong, for what is no such record.
    """
    keys = talk_of(record, needs_answer) if isinstance(record, dict) else ()
    if keys and keys[0] in TURNS:
        return conversation(record, keys[0], needs_answer)
    if keys == ("text",):
        if not text_of_turn(record["text"], "text").strip():
            raise ValueError("text is empty")
        return [{"role": "text", "content": record["text"]}]
    if len(keys) == 2:
        rest = {key: record[key] for key in ("input", "system", "history", "tools") if key in record}
        record = rest | {"instruction": record[keys[0]], "output": record.get(keys[1])}
    needed = ("instruction", "output") if needs_answer else ("instruction",)
    if not isinstance(record, dict):
        raise ValueError(f"{json_type(record)}, expected an object with the keys instruction, input (optional), output")
    missing = [key for key in needed if key not in record]
    if missing:
        inner = [k for k, v in record.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if inner and "instruction" in record[inner[0]][0]:
            take = f"the records are its list {inner[0]}; take that out: jq '.{inner[0]}' FILE > converted.json"
            raise ValueError(f"no {' and no '.join(missing)}: {take}")
        raise ValueError(
            f"no {' and no '.join(missing)}; keys found: {', '.join([*map(str, record)][:10]) or 'none'}; "
            f"keys expected: instruction, input (optional), output{' (optional)' * (not needs_answer)}"
        )
    for key in ("instruction", "input", "output"):
        value = record.get(key)
        if not isinstance(value, str) and (value is not None or key in needed):
            raise ValueError(f"{key} is {json_type(value)}, expected text")
        if value and SURROGATE.search(value):
            raise ValueError(f"{key} holds {HALF}")
    earlier, history = [], record.get("history") or []
    if isinstance(history, str):  # in a table
        with contextlib.suppress(ValueError, RecursionError):
            history = json.loads(history) or []
    if record.get("system") or history or record.get("tools"):
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError("history is no list of pairs [question, answer]")
        turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair)]
        both = {"messages": [*turns, {"role": "user", "content": "x"}]}
        both |= {key: record.get(key) for key in ("system", "tools")}
        earlier = conversation(both, "messages", False)[:-1]
    question = {"role": "user", "content": record["instruction"], "input": record.get("input") or ""}
    answer = [{"role": "assistant", "content": record["output"]}] if needs_answer else []
    return [*earlier, question, *answer]


def kind_of(messages):
    """What a conversation is called: "text", "alpaca" for one question with its answer, else "conversation"."""
    if messages[0]["role"] == "text":
        return "text"
    return "alpaca" if len(messages) <= 2 and "input" in messages[0] else "conversation"


def rows_of_text(where, name, text):
    """(rows, problems) of a JSON list, JSON Lines, one object or its list `data`; see `rows_of`."""
    rows, broken = [], []
    if not text.strip():
        raise UserError(f"{where}: the file is empty; it should hold a JSON list or JSON Lines")
    is_list = text.lstrip().startswith("[")
    for number, line in enumerate([] if is_list else text.split("\n"), 1):  # not splitlines(): U+2028 in strings
        try:
            rows += [(f"{name}:{number}", json.loads(line, object_pairs_hook=once))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            broken.append(f"{name}:{number}: {json_problem(error)}")
    if broken and text.lstrip().startswith("{"):  # one object over several lines, some of which are objects too
        with contextlib.suppress(ValueError, RecursionError):
            rows, broken = [(f"{name}:1", json.loads(text, object_pairs_hook=once))], []
    if not rows:
        try:  # a list, or one record that is written over several lines
            value, broken = json.loads(text, object_pairs_hook=once), []
        except (ValueError, RecursionError) as error:
            kind = file_kind(where, text.encode("utf-8", "replace"), RECORD_KINDS)
            what = f"{name}:{getattr(error, 'lineno', 1)}: {json_problem(error)}"
            raise UserError(f"{where}: {kind}" if kind else what) from None
        rows = [(f"{name}[{i}]", item) for i, item in enumerate(value)] if is_list else [(f"{name}:1", value)]
    whole = rows[0][1] if len(rows) == 1 and isinstance(rows[0][1], dict) else {"instruction": ""}
    if isinstance(whole.get("data"), list) and "instruction" not in whole and not talk_of(whole):
        others = [key for key in rows[0][1] if key != "data"]
        say(f"{where}: the records are its list data; not used: {', '.join(others)}") if others else None
        rows = [(f"{name}[{i}]", item) for i, item in enumerate(rows[0][1]["data"])]
    return rows, broken


def rows_of_table(path, name, text, suffix):
    """(rows, problems) of a table with a head; in .csv the separator is the head's most frequent of comma, ; and tab.

    Raises UserError where quotes do not close, or where two columns have one name.
    """
    empty = len(text) - len(text.lstrip("\r\n"))
    first, text = text.count("\n", 0, empty), text[empty:]
    head = text.partition("\n")[0]
    separator = "\t" if suffix == ".tsv" else max(",;\t", key=head.count)
    csv.field_size_limit(2**31 - 1)
    reader, rows, problems = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [], []
    try:
        names = reader.fieldnames or []
        if double := sorted({key for key in names if names.count(key) > 1}):
            raise UserError(f"{path}: two columns are named {double[0]}; rename one of them")
        for value in reader:
            cells = [cell for cell in [*value.values(), *value.pop(None, [])] if isinstance(cell, str)]
            place = f"{name}:{first + reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
            if len(cells) != len(names):
                problems.append(f"{place}: {len(cells)} cells, where the head has {len(names)}")
            else:
                rows.append((place, value))
    except csv.Error as error:
        raise UserError(f"{path}:{first + reader.line_num}: {error}; the rows behind it cannot be told") from None
    return rows, problems


def package(name, what):
    """An optional package. Raises UserError, with what needs it, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} needs the package: pip install {name.partition('.')[0]}") from None


def rows_of_data_set(path):
    """The rows of a data set that `datasets` has saved in a folder, or of one on the hub; "name:test" is its split test."""
    datasets, (name, split) = package("datasets", f"{path}: no such file; a data set"), split_of(path)
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(name) if os.path.isdir(name) else datasets.load_dataset(name)
    except Exception as error:  # whatever the hub's library raises
        what = "neither a file nor a folder is here, and as a data set of the hub it cannot be had"
        raise UserError(f"{path}: {what} ({type(error).__name__}: {first_line(error)})") from None
    if isinstance(found, dict):
        split = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
        if split not in found:
            raise UserError(f"{path}: no split {split}; give {' or '.join(f'{name}:{split}' for split in found)}")
        found = found[split]
    name = os.path.basename(name) if os.path.isdir(name) else name
    return [(f"{name}[{i}]", value) for i, value in enumerate(found)]


def is_data_set(folder):
    """Whether `datasets` has saved a data set in a folder."""
    names = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
    return any(all(Path(folder, name).is_file() for name in some) for some in names)


def split_of(path):
    """(the name of a data set, its split) of "name:split"; a path that exists is a name."""
    return (str(path), "") if os.path.exists(path) else str(path).partition(":")[::2]


def rows_of(path, name=None):
    """Every value of a file of records, a folder of such files or a data set, in order: (rows, problems).

    Rows are pairs (place, value), where place is "name[index]", or "name:line" in files of lines; problems are texts.
    Files are JSON, JSON Lines, .csv, .tsv and Parquet, also as gzip data. Raises UserError for a source that is missing,
    a pipe, empty, not UTF-8 or of another kind.
    """
    path = Path(path)
    name, suffix = name or path.name, Path(str(path).removesuffix(".gz")).suffix
    if path.is_fifo():
        raise UserError(f"{path}: a pipe, which can be read only once; write it to a file first")
    is_saved = is_data_set(split_of(path)[0])
    is_of_hub = not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w+)?", str(path))
    if is_saved or (is_of_hub and suffix not in RECORD_FILES):
        return rows_of_data_set(path), []
    if path.is_dir():
        parts = [rows_of(file, str(file.relative_to(path.parent))) for file in files_in(path, RECORD_FILES)]
        return [row for rows, _ in parts for row in rows], [text for _, problems in parts for text in problems]
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        hint = f"; --data_path takes {', '.join(RECORD_FILES)}, folders of them and names of the hub"
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}{hint}") from None
    if data.startswith(b"PAR1"):
        parquet = package("pyarrow.parquet", f"{path}: Parquet")
        try:
            return [(f"{name}[{i}]", row) for i, row in enumerate(parquet.read_table(io.BytesIO(data)).to_pylist())], []
        except (OSError, ValueError, OverflowError) as error:  # pyarrow's own are of these
            raise UserError(f"{path}: Parquet that cannot be read, or a torn file ({first_line(error)})") from None
    text = decode(data, path)
    if suffix == ".txt" and text.lstrip()[:1] not in ("[", "{"):
        return [(place, {"text": found}) for place, found in texts_of(path, [])], []
    return rows_of_table(path, name, text, suffix) if suffix in (".csv", ".tsv") else rows_of_text(path, name, text)


RECORD_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def files_in(folder, suffixes):
    """The files below a folder that end in one of the suffixes, or in .gz behind it, in the order of their paths."""
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files = [path for path in found if path.name.lower().removesuffix(".gz").endswith(suffixes)]
    if not files:
        raise UserError(f"{folder}: a folder without files of records ({', '.join(suffixes)})")
    return files


def lines_of(path):
    """Yield the lines of a UTF-8 file, which may be gzip data, one at a time. Raises UserError with a wrong byte's offset."""
    with open(path, "rb") as plain:
        is_packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        offset = 0
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=plain) if is_packed else plain, 1):
                yield line.decode("utf-8").removeprefix("\ufeff" * (number == 1))
                offset += len(line)
        except UnicodeDecodeError as error:
            byte, where = error.object[error.start], f"{path}:{number}"
            what = f"{where}: byte 0x{byte:02x} at offset {offset + error.start} is not UTF-8"
            raise UserError(f"{what}; its writer may know the ENCODING: {ICONV.format('ENCODING', path)}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: {first_line(error)}") from None


def is_text(path):
    """Whether a source holds plain texts: a .txt or .bin file, records of which the first is {text}, a folder of these."""
    path = Path(path)
    if path.is_dir() and not is_data_set(path):
        return all(is_text(file) for file in files_in(path, (*RECORD_FILES, ".txt")))
    suffix = Path(str(path).removesuffix(".gz")).suffix
    if suffix in (".txt", ".bin") or not path.is_file():
        return suffix in (".txt", ".bin")
    try:
        if suffix == ".jsonl":  # of a large file the first row is to tell
            count = None if path.stat().st_size < 2**26 else 1
            lines = itertools.islice((line for line in lines_of(path) if line.strip()), count)
            values = map(json.loads, lines)
        else:
            values = (value for _, value in rows_of(path)[0])
        kinds = [isinstance(value, dict) and talk_of(value) == ("text",) for value in values]
    except (UserError, ValueError, RecursionError):  # who reads the records says what is wrong
        return False
    return bool(kinds) and all(kinds)


def texts_of(path, problems):
    """Yield (place, text) of a source that `is_text`, one at a time; what is no text is named in the list `problems`.

    In .txt a text ends at an empty line; in a file without any, at the end of each line.
    """
    path, name = Path(path), os.path.basename(path)
    if path.is_dir() and not is_data_set(path):
        for file in files_in(path, (*RECORD_FILES, ".txt")):
            yield from texts_of(file, problems)
        return
    if (suffix := Path(str(path).removesuffix(".gz")).suffix) == ".txt":
        lines, start = [], 1
        by_line = not any(line.isspace() for line in lines_of(path))
        for number, line in enumerate(itertools.chain(lines_of(path), [""]), 1):
            if lines and (by_line or not line.strip()):
                yield f"{name}:{start}", "".join(lines).rstrip("\r\n")
                lines = []
            start = start if lines else number
            lines += [line] if line.strip() else []
        return
    lines = ((f"{name}:{i}", line) for i, line in enumerate(lines_of(path), 1) if line.strip())
    rows, broken = (lines, []) if suffix == ".jsonl" else rows_of(path)
    problems += broken
    for place, value in rows:
        try:
            message = as_messages(json.loads(value, object_pairs_hook=once) if isinstance(value, str) else value)[0]
            if message["role"] != "text":
                raise ValueError("an instruction or a conversation among texts; put it into a file of its own")
            yield place, message["content"]
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {first_line(error)}")


def columns_of(words):
    """{our key: theirs} of "instruction=question,output=answer"; {} for none. Raises UserError for anything else."""
    pairs = [pair.strip().partition("=") for pair in words.split(",")] if words else []
    known = sorted((USED | TALKS) - {"instances"})
    ours = [pair[0] for pair in pairs]
    if wrong := ["".join(pair) for pair in pairs if pair[0] not in known or not pair[2] or ours.count(pair[0]) > 1]:
        what = f"--columns {wrong[0]}: expected OURS=THEIRS, as instruction=question,output=answer"
        raise UserError(f"{what}; ours are {', '.join(known)}")
    return {ours: theirs for ours, _, theirs in pairs}


def renamed(value, columns):
    """A row with the values of other keys under ours: {instruction: question}. Raises ValueError where one is missing."""
    if not isinstance(value, dict):
        return value
    if missing := [key for key in columns.values() if key not in value]:
        raise ValueError(
            f"no {' and no '.join(missing)}, which --columns names; keys found: {', '.join(map(str, value))}"
        )
    kept = {f"{key} (replaced)" * (key in columns) or key: value[key] for key in value if key not in columns.values()}
    return kept | {ours: value[theirs] for ours, theirs in columns.items()}


def read_records(sources, needs_answer=True, columns=None):
    """Read every record of files, folders and data sets (see `rows_of`), Self-Instruct's seed tasks among them, in order.

    `sources` are paths, or pairs (name, text) of what is read already; `columns` are of `columns_of`. Returns
    (records, problems): records as {instruction, input, output, source, messages}, where source is their place and
    messages are of `as_messages`; problems as one line of text each. Keys with text that no script uses are
    listed in `unused`; where no answer is needed, all other keys are kept in `others`. Raises UserError as `rows_of`.
    """
    records, problems, columns = [], [], columns_of(columns)
    for source in sources:
        is_read = isinstance(source, tuple)
        rows, broken = rows_of_text(source[0], os.path.basename(source[0]), source[1]) if is_read else rows_of(source)
        problems += broken
        for place, value in rows:
            try:
                value = renamed(value, columns) if columns else value
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            examples = [value]
            if isinstance(value, dict) and isinstance(value.get("instances"), list):  # a Self-Instruct seed task
                shared = {key: value[key] for key in ("instruction",) if value.get(key) is not None}
                examples = [one | shared if isinstance(one, dict) else one for one in value["instances"]]
                problems += [] if examples else [f"{place}: a seed task without instances"]
            for example in examples:
                try:
                    messages = as_messages(example, needs_answer)
                except ValueError as error:
                    problems.append(f"{place}: {error}")
                    continue
                fields = {key: example.get(key) or "" for key in ("instruction", "input", "output")}
                if "instruction" not in example:
                    fields["instruction"] = "".join([m["content"] for m in messages if m["role"] == "user"][-1:])
                    with contextlib.suppress(ValueError):  # of a question, which need not have an answer
                        fields["output"] = (messages if needs_answer else as_messages(example))[-1]["content"]
                records.append({**fields, "source": place, "messages": messages})
                if not needs_answer:
                    records[-1]["others"] = {k: v for k, v in {**value, **example}.items() if k not in USED}
                if texts := unused_of(example, needs_answer):
                    records[-1]["unused"] = texts
    return records, problems


def unused_of(record, needs_answer):
    """The keys of a record with text, or with more, that are no part of its prompt and answer, and none of our own."""
    keys, used = talk_of(record, needs_answer), USED
    if keys:
        more = ("system", "tools") if keys[0] in TURNS else ("input", "system", "history", "tools") * (len(keys) == 2)
        used = {*keys, *more}
    ours = (KNOWN - USED) | used | ({"output"} if not needs_answer else set())
    return [key for key, value in record.items() if key not in ours and value and isinstance(value, (str, list, dict))]


def unused_keys(records):
    """{key: records of `read_records` that have text under it which no script uses}, in the order of their counts."""
    return dict(collections.Counter(key for record in records for key in record.get("unused", ())).most_common())


NO_PLACE = "Alpaca's prompt has no place for earlier turns or a system's; give another --prompt_style"
# "prompt_style" in a model's run.json is one of these names; each with the texts that end an answer, beside the end
# token: the next turn's head in Alpaca's and Vicuna v0's (FastChat's stop_str), the end token spelled out in the others.
PROMPT_STYLES = {
    "alpaca": ("### Instruction:",), "vicuna_v0": ("###",), "vicuna_v1.1": ("</s>",), "llama2": ("</s>",),
    "chat_template": (),
}  # fmt: skip

# Wire formats, byte for byte. Vicuna's: FastChat's docs/vicuna_weights_version.md; v0 as its train.py of March 2023
# wrote it, whose models write the ### of the next turn, v1.1 as its conversation.py joins it. Llama 2's: the chat of
# Meta's llama repository. Each is what stands first, with {} for the system's message, that message by default, the
# user's turn, and the assistant's, which is trained; {} is the message.
VICUNA_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
TURN_STYLES = {
    "vicuna_v0": ("{}\n\n###", VICUNA_SYSTEM.format("human"), " Human: {}\n### Assistant:", " {}\n###"),
    "vicuna_v1.1": ("{} ", VICUNA_SYSTEM.format("user"), "USER: {} ASSISTANT:", " {}</s>"),
    "llama2": ("<<SYS>>\n{}\n<</SYS>>\n\n", "", "<s>[INST] {} [/INST]", " {} </s>"),
}


def content_of(message):
    """The text of a message, with its input after an empty line."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def words_of(message):
    """The text of a message where no template renders it: `content_of`, the tools there are, the calls made."""
    parts = [content_of(message)]
    if tools := message.get("tools"):
        parts.append(f"Tools:\n{json.dumps(tools, ensure_ascii=False)}")
    for call in message.get("tool_calls") or ():
        made = call.get("function") or call
        parts.append(json.dumps({"name": made["name"], "arguments": made.get("arguments") or {}}, ensure_ascii=False))
    return ("\n" if message.get("tool_calls") else "\n\n").join(filter(None, parts))


def template_spans(messages, tokenizer):
    """The spans of a conversation in the tokenizer's own chat template, and how many turns it would not have trained.

    Turn i is what the template adds to the turns before it and its prompt for an answer, up to the first end token. A
    turn that the template writes otherwise once others follow (as those that drop earlier reasoning) is not trained.
    Raises ValueError where the template refuses the conversation, or where its last turn cannot be told.
    """
    if not tokenizer.chat_template:
        others = ", ".join(name for name in PROMPT_STYLES if name != "chat_template")
        raise UserError(f"the tokenizer has no chat template; choose another --prompt_style: {others}")
    tools = messages[0].get("tools")
    plain = [{key: value for key, value in message.items() if key not in ("tools", "input")} for message in messages]
    for message, made in zip(messages, plain, strict=True):
        made["content"] = content_of(message)
    plain = plain[1:] if plain[0] == {"role": "system", "content": ""} else plain

    def render(count, ask):
        try:
            return tokenizer.apply_chat_template(plain[:count], tokenize=False, add_generation_prompt=ask, tools=tools)
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from None

    if plain[-1]["role"] != "assistant":
        return [(render(len(plain), True), False)], 0
    whole, parts, position, lost = render(len(plain), False), [], 0, 0
    for number in (number for number, message in enumerate(plain) if message["role"] == "assistant"):
        head, tail = render(number, True), render(number + 1, False)
        if not (whole.startswith(tail) and tail.startswith(head)):
            lost += 1
            continue
        said = plain[number]["content"].strip()
        at = max(whole.find(said, len(head), len(tail)), len(head) - len(said))
        end = whole.find(tokenizer.eos_token, at + len(said), len(tail))  # not one that it speaks of
        if end < 0:
            why = "a model would not learn to stop; set eos_token in its tokenizer_config.json to what ends a turn"
            raise UserError(f"the chat template ends no turn with {tokenizer.eos_token}: {why}")
        end += len(tokenizer.eos_token)
        parts += [(whole[position : len(head)], False), (whole[len(head) : end], True)]
        position = end
    if not parts or parts[-1][0] != whole[-len(parts[-1][0]) :] and whole[position:].strip():
        raise ValueError(
            "the chat template does not continue its own prompt: its last turn cannot be told; give another --prompt_style"
        )
    if missing := left_out(plain, tools, whole):
        raise ValueError(f"the chat template leaves out {missing}")
    return parts, lost


def left_out(messages, tools, whole):
    """What of a conversation a rendered text does not hold, in words, judged by its longest word; "" for nothing."""
    said = [(f"what turn {i + 1}, the {m['role']}'s, says", m["content"]) for i, m in enumerate(messages)]
    calls = [call.get("function") or call for message in messages for call in message.get("tool_calls", ())]
    said += [(f"the call of {call['name']}", call["name"]) for call in calls]
    tools = [tool.get("function") or tool for tool in tools or () if isinstance(tool, dict)]
    said += [(f"the tool {tool['name']}", tool["name"]) for tool in tools if isinstance(tool.get("name"), str)]
    words = (
        (what, max(re.findall(r"\w+", text.rpartition("</think>")[2]), key=len, default="")) for what, text in said
    )
    return next((what for what, word in words if word not in whole), "")


def spans(style, messages, tokenizer=None):
    """A conversation as [(text, trained), ...]: joined, the texts are what a model of that prompt style reads.

    `messages` are of `as_messages`. Where the last is the user's, the last span ends where the answer begins; where it
    is the assistant's, each of its answers with the end token is trained. Alpaca's prompt has no place for earlier
    turns, so they are left out, and a row is two spans: [("Below is ... ### Response:", False), ("Hello.</s>", True)].
    In the other styles an input follows its instruction after an empty line. `tokenizer` holds the end token, and for
    "chat_template" the template; see `template_spans`. Plain text is one span.
    """
    if messages[0]["role"] == "text":
        return [(messages[0]["content"] + tokenizer.eos_token, True)]
    if style == "alpaca":
        question = [message for message in messages if message["role"] == "user"][-1]
        given = question.get("input") or ""
        template = PROMPT_DICT["prompt_input" if given else "prompt_no_input"]
        parts = [(template.format_map({"instruction": question["content"], "input": given}), False)]
        return parts + [(m["content"] + tokenizer.eos_token, True) for m in messages[-1:] if m["role"] == "assistant"]
    if style == "chat_template":
        return template_spans(messages, tokenizer)[0]
    frame, system, question, reply = TURN_STYLES[style]
    if messages[0]["role"] == "system":
        system, messages = words_of(messages[0]) or system, messages[1:]
    ends = {"</s>": tokenizer.eos_token, "<s>": tokenizer.bos_token} if tokenizer is not None else {}
    for text, own in ends.items():
        question, reply = (part.replace(text, own) if own else part for part in (question, reply))
    parts, begin = [], frame.format(system) if system else ""
    for message in messages:
        is_answer = message["role"] == "assistant"
        parts.append(((reply if is_answer else question).replace("{}", words_of(message)), is_answer))
    first = parts[0][0]
    if style == "llama2":  # its system's message stands in the first turn, which encode begins
        first, begin = first.partition("[INST] ")[2], f"[INST] {begin}"
    parts[0] = (begin + first, False)
    return parts


# --- Options ---------------------------------------------------------------------------------------------------------


def unknown_options(words, known):
    """The error for options that a script does not have, each with the nearest name that exists."""
    names = [word.split("=")[0] for word in words if word.startswith("--")] or words
    if "--trust_remote_code" in {name.replace("-", "_").replace("__", "--", 1) for name in names}:
        return UserError(f"--trust_remote_code: {CURES['custom code']}")
    near = {name: difflib.get_close_matches(name, known, n=1) for name in names}
    hints = [f"{name} (did you mean {match[0]}?)" if match else name for name, match in near.items()]
    return UserError(f"unknown option: {', '.join(hints)}; --help lists those that exist")


def parse_options(parser, words):
    """Parse `words` with an argparse parser. Raises UserError for whatever it refuses, unknown options included."""

    def refuse(message):  # in one line, without the usage
        raise UserError(message)

    parser.error = refuse
    args, rest = parser.parse_known_args(words)
    if rest and not rest[0].startswith("-"):
        option = [word for word in words[: words.index(rest[0])] if word.startswith("--")][-1:]
        more = "quote a value with spaces; where it is a regular expression, join several as '.*(one|other).*'"
        raise UserError(
            f"unexpected word {rest[0]!r}: {f'{option[0]} takes one value' if option else 'no option'}; {more}"
        )
    if rest:
        raise unknown_options(rest, [name for action in parser._actions for name in action.option_strings])
    return args


def refuse_all(wrong):
    """Raise one UserError of all texts of {text: whether it is so} that are."""
    if problems := [text for text, is_so in wrong.items() if is_so]:
        raise UserError("; ".join(problems))


def truth(word):
    """The value of an option that is True or False."""
    if word.lower() not in ("true", "1", "false", "0"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() in ("true", "1")


TRUTH = {"type": truth, "nargs": "?", "const": True}  # of add_argument; the bare option is True


# --- Tokenizers ------------------------------------------------------------------------------------------------------

# Where converted tokenizers have been seen to differ from their SentencePiece model: runs of spaces, leading and
# trailing space, tabs and newlines, the word mark itself, byte fallback, joined and combining characters.
NASTY_STRINGS = [
    "Hello world", " leading", "trailing ", "two  spaces", "   three   ", "\tif x:\n\t\treturn  1\n",
    "a\n\nb\r\nc", "def f(x):\n    for i in range(10):\n        print(  i  )", "▁word▁mark", "x ▁ y",
    "1234567890.00 1,000", "...!!??;;", "### Response:- one", "你好，世界。请翻译", "こんにちは 世界",
    "안녕하세요", "Привет мир", "مرحبا بالعالم", "שלום", "नमस्ते", "🦙 emoji 👩‍👩‍👧‍👦 🇨🇳", "e\u0301 combining é",
    "zero\u200bwidth", "non\u00a0breaking", "\u3000ideographic\u3000", "\x00\x01\x7f", "ﬁ ﬂ ligature ½ ①",
    "\U00020000 rare", "http://a.b/c?d=e&f=g", "CamelCase_snake-kebab", "", " ", "  ", "\n", "a" * 300,
]  # fmt: skip


def sentencepiece_proto(model_path):
    """The parsed `tokenizer.model`: pieces with scores and types, and how it was trained."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(Path(model_path).read_bytes())


def sentencepiece_ids(model_path, texts):
    """The ids that the SentencePiece model itself gives each text, without begin and end tokens."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model_path)).encode(list(texts))


def differs_from_sentencepiece(tokenizer, model_path):
    """The first text that `tokenizer` reads otherwise than the SentencePiece model; None where all agree.

    `tokenizer` is of transformers or of tokenizers. Pieces defined by hand split the text, so each has its own string.
    So has each overlap of two pieces of equal score, as of 一个 and 个人 in 一个人, thousands in a merged model:
    SentencePiece joins the left one first, merges have an order. LLaMA's own equals, runs of spaces, read alike.
    """
    pieces = sentencepiece_proto(model_path).pieces
    normal = [p for p in pieces if p.type == p.NORMAL and len(p.piece) > 1]
    count = collections.Counter(p.score for p in normal)
    equal = [p.piece for p in normal if count[p.score] > 1]
    begins = {piece[:k]: piece for piece in reversed(equal) for k in range(1, len(piece))}
    texts = NASTY_STRINGS + [f"a{p.piece} b{p.piece}c" for p in pieces if p.type == p.USER_DEFINED]
    texts += [left + begins[left[-k:]][k:] for left in equal for k in range(1, len(left)) if left[-k:] in begins]
    expected = sentencepiece_ids(model_path, texts)
    if hasattr(tokenizer, "encode_batch"):
        found = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    else:
        found = tokenizer(texts, add_special_tokens=False).input_ids
    return next((text for text, a, b in zip(texts, expected, found, strict=True) if a != b), None)


def tokenizer_from_sentencepiece(model_path, add_bos_token=True, add_eos_token=False, **kwargs):
    """`build_from_sentencepiece` as a tokenizer of transformers; `kwargs` go to it."""
    from transformers import PreTrainedTokenizerFast

    built, names = build_from_sentencepiece(model_path, add_bos_token, add_eos_token)
    return PreTrainedTokenizerFast(tokenizer_object=built, **{**names, **kwargs})


def build_from_sentencepiece(model_path, add_bos_token=True, add_eos_token=False):
    """Build a fast tokenizer that gives exactly the ids of a SentencePiece BPE model such as LLaMA's.

    transformers 5.x converts a folder that holds only `tokenizer.model` with the merges in the order of their ids;
    SentencePiece merges by score, and LLaMA's runs of spaces have high ids and the lowest scores. So the merges here
    are sorted by score, and the leading word mark is there or not as the model says. Returns a tokenizers.Tokenizer
    and the entries of its tokenizer_config.json; torch is not imported. Raises UserError for a model that is not BPE.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers.convert_slow_tokenizer import generate_merges

    proto = sentencepiece_proto(model_path)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{model_path}: not a BPE model, cannot be rebuilt; put a right tokenizer.json beside it")
    pieces = proto.pieces
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    normal = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    special = {piece.piece for piece in pieces if piece.type not in (piece.NORMAL, piece.BYTE, piece.USER_DEFINED)}
    unk = next(piece.piece for piece in pieces if piece.type == piece.UNKNOWN)
    merges = generate_merges(vocab, normal, skip_tokens=set(vocab) - set(normal))
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if proto.normalizer_spec.add_dummy_prefix else []
    built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    built.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in sorted(special)])
    built.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == p.USER_DEFINED])
    # An id of -1 says that the model has no such token.
    bos, eos = (pieces[i].piece if i >= 0 else None for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
    head = [bos] if add_bos_token and bos else []
    tail = [eos] if add_eos_token and eos else []
    if head or tail:
        first, second = ([f"{token}:{i}" for token in (*head, f"${'AB'[i]}", *tail)] for i in range(2))
        ids = [(token, vocab[token]) for token in {*head, *tail}]
        built.post_processor = processors.TemplateProcessing(single=first, pair=first + second, special_tokens=ids)
    return built, {"bos_token": bos, "eos_token": eos, "unk_token": unk, "clean_up_tokenization_spaces": False}


def find_sentencepiece(name_or_path, cache_dir=None):
    """The `tokenizer.model` of a model folder or of a hub model in the cache; None where there is none."""
    path = Path(name_or_path, "tokenizer.model")
    if path.is_file() or path.parent.is_dir():
        return path if path.is_file() else None
    import huggingface_hub

    with contextlib.suppress(huggingface_hub.errors.HFValidationError):  # no name on the hub can be like that
        cached = huggingface_hub.try_to_load_from_cache(str(name_or_path), path.name, cache_dir=cache_dir)
        return Path(cached) if isinstance(cached, str) else None


def begin_ids(tokenizer):
    """The ids that go before a text: what `tokenizer` puts there itself, once; what it puts behind one has no place."""
    own, plain = (tokenizer(["x"], add_special_tokens=added).input_ids[0] for added in (True, False))
    length = next((i for i in range(len(own)) if own[i : i + len(plain)] == plain), 0)
    return list(dict.fromkeys(own[:length]))


def check_ids(named, tokenizer, config):
    """Raise UserError where one of `named`, pairs (name, ids), has an id that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", sys.maxsize)
    for name, ids in named:
        if (top := max(ids, default=0)) >= size:
            what = f"{name}: token {tokenizer.convert_ids_to_tokens(top)!r} has id {top:,}, the embedding {size:,} rows"
            raise UserError(f"{what}; put the model's own tokenizer into its folder, or do without that token")


def rebuild_tokenizer(model_path, problem, options):
    """A tokenizer by `tokenizer.model` and what its folder adds; through SentencePiece itself where no merges do it."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    config, ids = (config_of(model_path.parent, f"{name}.json") for name in ("tokenizer_config", "added_tokens"))
    template = model_path.with_name("chat_template.jinja")
    ids |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    switches = {key: config[key] for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)}
    options = options | {"chat_template": read_text(template) if template.is_file() else config.get("chat_template")}
    tokenizer, how = tokenizer_from_sentencepiece(model_path, **switches, **options), "ids checked against it"
    if (text := differs_from_sentencepiece(tokenizer, model_path)) is not None:
        how = f"SentencePiece itself reads, since no merges read {text!r} alike"
        decoder, head = tokenizer.backend_tokenizer.decoder, "bos" if begin_ids(tokenizer) else "none"
        options |= tokenizer.special_tokens_map | {"special_tokens_pattern": head}
        tokenizer = SentencePieceBackend(vocab_file=str(model_path), **options)
        tokenizer.init_kwargs["special_tokens_pattern"] = head  # for those who load what we save
        tokenizer.convert_tokens_to_string = decoder.decode  # it joins bytes to characters
    new = sorted((token for token in ids if ids[token] >= tokenizer.vocab_size), key=ids.get)
    tokenizer.add_tokens(new, special_tokens=True)
    if wrong := [token for token in new if tokenizer.convert_tokens_to_ids(token) != ids[token]]:
        what = f"{wrong[0]!r} is said to have id {ids[wrong[0]]:,}, which leaves a gap behind {model_path.name}"
        raise UserError(f"{model_path.parent}: {what}; put a right tokenizer.json into the folder")
    for key in ("eos_token", "pad_token"):
        name = config[key].get("content") if isinstance(config.get(key), dict) else config.get(key)
        setattr(tokenizer, key, name if name in new else getattr(tokenizer, key))
    say(f"tokenizer: {problem}; built from {model_path.name}, {how}")
    return tokenizer


def load_tokenizer(name_or_path, model_max_length=None, cache_dir=None):
    """Load a model's tokenizer and prove it: where there is a SentencePiece model, its ids are the law.

    transformers 5.x reads some folders wrongly and says nothing, so the ids of `NASTY_STRINGS` are compared. A folder
    without a right tokenizer.json, or with the class and empty special tokens of early LLaMA conversions, gets a
    tokenizer built in memory from the SentencePiece model. Padding is on the right and never the end token. Raises
    UserError where no right tokenizer can be had.
    """
    from transformers import AutoTokenizer

    options = {"padding_side": "right"} | ({"model_max_length": model_max_length} if model_max_length else {})
    model_path, problem, tokenizer = find_sentencepiece(name_or_path, cache_dir), "", None
    folder = Path(name_or_path)
    if model_path is not None and not (model_path.parent / "tokenizer.json").is_file():
        problem = "it has no tokenizer.json"
    elif folder.is_dir() and not any(path.name.startswith(("tokenizer", "vocab")) for path in folder.iterdir()):
        problem = "it holds no tokenizer"
    else:
        try:
            hub = {"cache_dir": cache_dir, "trust_remote_code": False}  # which would ask on the terminal
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub, **options)
        except Exception as error:  # whatever transformers raises for a folder it cannot read
            problem = f"its tokenizer files cannot be read ({first_line(error)})"
    if tokenizer is not None and model_path is not None:
        if not tokenizer.eos_token:
            problem = "its end token is empty"
        elif (text := differs_from_sentencepiece(tokenizer, model_path)) is not None:
            problem = f"its tokenizer.json reads {text!r} otherwise than its tokenizer.model"
    if problem and model_path is None:
        raise UserError(f"{name_or_path}: {problem}; {tokenizer_hint(Path(name_or_path))}")
    if problem:
        tokenizer = rebuild_tokenizer(model_path, problem, options)
    if not tokenizer.eos_token:
        raise UserError(f"{name_or_path}: the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # The unknown token never is a target, so masks stay right even if somebody masks by id. Without one there is
        # no padding token: our batches are masked by length and pad with id 0 or 1.
        unk = tokenizer.unk_token if tokenizer.unk_token_id != tokenizer.eos_token_id else None
        was = f"{tokenizer.pad_token} (the end token)" if tokenizer.pad_token else "missing"
        tokenizer.pad_token = unk
        say(f"tokenizer: padding token was {was}; {'now ' + unk if unk else 'none is set, batches mask by length'}")
    return tokenizer


# --- Model folders ---------------------------------------------------------------------------------------------------


OTHER_HEADS = re.compile("For(MaskedLM|[A-Z][A-Za-z]+Classification|QuestionAnswering|MultipleChoice|PreTraining)$")
QUANTISED = re.compile(r"\.(qweight|qzeros|absmax|quant_map|SCB|weight_scale|weight_packed)\b")
ZERO_CENTRED = re.compile("gemma|nemotron|qwen3_next|qwen3_5")  # they add 1 to the weights of their norms
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
APPLY = "python -m apply_delta --base {base} --delta {delta} --target {target}"
CURES = {  # by what lies where a model is expected; `check_model` fills in the words
    "a LoRA adapter": f"merge it first: {APPLY}",
    "a folder around a LoRA adapter": f"merge that first: {APPLY}",
    "a folder around a model": "give the model: {inner}",
    "a folder beside a model": "give the model: {parent}",
    "an adapter beside a whole model": "move the files of one of them elsewhere",
    "a delta": f"apply it first: {APPLY}",
    "raw weights of LLaMA": "convert them first: python convert_llama_weights.py --input_dir {path} --output_dir NEW",
    "quantised": "give the 16-bit model that it was made from",
    "not causal": "give a model that continues text, one of those whose architecture ends in ForCausalLM",
    "custom code": "code out of model folders is never run; give a model that transformers itself knows",
    "a file": "give its folder: {parent}",
    "empty": "copy or download the model into it",
    "unfinished": "{whole}",
    "the state of a run": "give the model that the run writes when it ends; {whole}",
    "": "--model_name_or_path takes a folder with config.json, weights and tokenizer, or a name on the hub "
    "(HF_ENDPOINT names a mirror of it)",
}


def tokenizer_hint(folder):
    """What to do about a folder without a tokenizer: the first converters wrote OUT/llama-7b beside OUT/tokenizer."""
    near = [folder.parent, folder.parent / "tokenizer"]
    found = [path for path in near if any((path / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))]
    if folder.is_dir() and found:
        return f"{found[-1]} has one: cp {shlex.quote(f'{found[-1]}/')}*token* {shlex.quote(f'{folder}/')}"
    return CURES[""]


def stored_tensors(folder):
    """(name, dtype, a function that reads it) of every tensor in the files of a model folder."""
    import torch
    from safetensors import safe_open

    for path in sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        if path.suffix == ".bin":
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            yield from ((name, str(tensor.dtype)[6:], tensor.clone) for name, tensor in found.items())
        else:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_slice(name).get_dtype(), lambda name=name: file.get_tensor(name)


def what_tensors_say(folder, config):
    """What `what_it_is` says of a folder by its tensors: an exact delta has integers, a delta norms of nearly 0."""
    norms = []
    with contextlib.suppress(Exception):  # what is damaged is told by those who load it
        for name, dtype, read in stored_tensors(folder):
            is_mask = name.endswith(("bias", "mask"))  # of causal attention, as older releases stored it
            if QUANTISED.search(name) or (dtype.lower().endswith("8") and dtype[0] in "IUiu" and not is_mask):
                return "quantised", f"by its tensor {name}"
            if dtype[0] in "IUiu" and name.endswith(".weight"):
                return "a delta", f"an exact one: {name} is {dtype}"
            norms += [read().float().mean().item()] if re.search(r"(norm|ln_\w+)\.weight$", name) else []
    is_delta = norms and max(map(abs, norms)) < 0.01 and not ZERO_CENTRED.search(str(config.get("model_type")))
    return ("a delta", f"the weights of all {len(norms)} norms are near 0") if is_delta else ("", "")


def what_config_says(config):
    """What `what_it_is` says of a model by its config, a dict."""
    heads, how = config.get("architectures"), config.get("quantization_config")
    head = str(heads[0] or "") if isinstance(heads, list) and heads else ""
    if how:
        return "quantised", f"by its config: {how.get('quant_method', 'no method') if isinstance(how, dict) else how}"
    is_encoder = config.get("is_decoder") is False and "add_cross_attention" in config
    is_encoder = is_encoder and not str(config.get("model_type")).startswith(("gpt", "openai-gpt", "ctrl", "xglm"))
    is_other = config.get("is_encoder_decoder") or OTHER_HEADS.search(head) or is_encoder
    return ("not causal", head or str(config.get("model_type"))) if is_other else ("", "")


def last_inside(folder, *names):
    """The subfolder, or its own, with a file like one of `names`: a whole checkpoint first, then the last; or None."""
    found = {path.parent for depth in ("*", "*/*") for name in names for path in folder.glob(f"{depth}/{name}")}
    whole = find_checkpoints(folder)[0]
    numbers = {path: [int(number) for number in re.findall(r"\d+", str(path))] for path in sorted(found)}
    return max(numbers, key=lambda path: (path in whole, numbers[path]), default=None)


def what_a_folder_says(path, names, run):
    """What `what_it_is` says of a folder without a config, by the names in it."""
    adapter, model = last_inside(path, "adapter_model.*"), last_inside(path, "config.json")
    states = [n for n in names if n.startswith(("global_step", "pytorch_model_fsdp", "bf16_zero"))]
    raw = [found.name for pattern in ("params.json", "*/params.json") for found in path.glob(pattern)]
    kinds = {
        "unfinished": ["run.json"] * (run.get("status") == "started") + [p.name for p in find_checkpoints(path)[0]],
        "the state of a run": states,
        "quantised": [n for n in names if n.endswith(".gguf")],
        "raw weights of LLaMA": raw,
        "a folder around a LoRA adapter": [adapter and adapter.name],
        "a folder around a model": [model and model.name],
        "a folder beside a model": ["no config.json"] * (path.parent / "config.json").is_file(),
    }
    return next(((kind, why[0]) for kind, why in kinds.items() if why and why[0]), ("", ""))


def config_of(folder, name="config.json"):
    """A JSON object of a model folder, {} where there is no such file. Raises UserError where it is something else."""
    try:
        return read_json(folder / name) if (folder / name).is_file() else {}
    except UserError as error:
        raise UserError(f"{error}; copy or download it again") from None


def what_it_is(path):
    """(what lies at `path` in place of a model, how that is seen): a key of CURES, by files alone.

    "" is a model, or nothing that is known: a name on the hub, a folder of other things.
    """
    if not path.is_dir():
        if path.suffix == ".gguf" or path.exists():
            return "quantised" if path.suffix == ".gguf" else "a file", path.name
        is_beside = path.is_absolute() and (path.parent / "config.json").is_file()
        return ("a folder beside a model", path.name) if is_beside else ("", "")
    names, run = {entry.name for entry in path.iterdir()} - {LOCK}, record_of(path)
    weights = [name for name in WEIGHTS if name in names]
    if not names:
        return "empty", "nothing in it"
    if "adapter_config.json" in names:
        return "an adapter beside a whole model" if weights else "a LoRA adapter", "adapter_config.json"
    if "delta" in run:
        return "a delta", "by its run.json"
    if path.name.startswith("checkpoint-") and record_of(path.parent) and COMPLETE not in names:
        return "unfinished", f"a checkpoint without {COMPLETE}"
    if "config.json" not in names:
        return what_a_folder_says(path, names, run)
    if not weights:
        return "unfinished", f"neither {WEIGHTS[0]} nor {WEIGHTS[2]} nor their index"
    places = config_of(path, weights[0]).get("weight_map") if weights[0].endswith(".json") else {}
    parts = set(map(str, places.values())) if isinstance(places, dict) else set()
    if lost := sorted(name for name in parts - names if Path(name).name == name not in ("", "..")):
        return "unfinished", f"{lost[0]} is missing"
    config = config_of(path)
    return next((said for said in (what_config_says(config), what_tensors_say(path, config)) if said[0]), ("", ""))


def check_model(path, option="--model_name_or_path", allowed=(), base="BASE", target="MODEL", name=None):
    """Refuse what is no model, with the command that was probably meant; returns what it is where that is `allowed`.

    `name` is what the user calls the folder `path`: one on the hub, which the cache holds.
    """
    path = Path(path)
    kind, why = what_it_is(path)
    if kind in ("", *allowed):
        return kind
    known = config_of(path, "adapter_config.json") if kind == "a LoRA adapter" else record_of(path).get("delta", {})
    base = known.get("base_model_name_or_path") or known.get("base", {}).get("path") or base
    inner = last_inside(path, "adapter_model.*" if "adapter" in kind else "config.json")
    delta = inner if kind == "a folder around a LoRA adapter" else name or path
    words = {"base": base, "delta": delta, "target": target, "path": path, "parent": path.parent, "inner": inner}
    words = {key: shlex.quote(str(word)) for key, word in words.items()}
    run = path.parent if path.name.startswith("checkpoint-") else path
    whole = [one for one in find_checkpoints(run)[0] if (one / "config.json").is_file()]
    words["whole"] = f"let its run end, or try {whole[-1]}" if whole else "copy it again"
    raise UserError(f"{option} {name or path} is {kind} ({why}); {CURES[kind].format(**words)}")


def load_config(name_or_path, cache_dir=None, allowed=()):
    """The config of a causal language model. Raises UserError for a path or name that is none; see `check_model`."""
    import transformers

    check_model(name_or_path, allowed=allowed)
    try:
        with say_if_slow(f"{name_or_path}: asking the hub for it; HF_HUB_OFFLINE=1 takes what the cache holds"):
            config = transformers.AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:  # whatever the library and its checks raise
        is_lost = isinstance(error, OSError)  # the hub did not answer, in a minute: the cache alone is asked now
        with contextlib.suppress(OSError):  # of what can be no name there
            where = {"cache_dir": cache_dir, "local_files_only": is_lost}
            if found := transformers.utils.find_adapter_config_file(str(name_or_path), **where):
                check_model(Path(found).parent, name=name_or_path)
        kind = "custom code" if "trust_remote_code" in str(error) else ""
        what = f"is {kind}" if kind else f"cannot be read as a model ({first_line(error)})"
        raise UserError(f"{name_or_path} {what}; {CURES[kind]}") from None
    kind, why = what_config_says(config.to_dict())
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind, why = "not causal", f"model type {config.model_type}"
    if kind:
        raise UserError(f"{name_or_path} is {kind} ({why}); {CURES[kind]}")
    return config


def skeleton(config):
    """The model without memory for its weights: for counting parameters and finding layer classes."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def load_weights(name_or_path, config, dtype, cache_dir=None, device_map=None, quantization_config=None):
    """Load a model whole. Raises UserError where weights are missing, damaged or of another shape."""
    import transformers

    try:
        options = {"config": config, "cache_dir": cache_dir, "dtype": dtype, "device_map": device_map}
        options |= {"quantization_config": quantization_config} if quantization_config else {}
        options |= {"trust_remote_code": False, "output_loading_info": True}
        options |= {"ignore_mismatched_sizes": True}  # so that they are named, below
        with say_if_slow(f"{name_or_path}: loading its weights"):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except Exception as error:  # from half a download to a damaged shard: each library has its own exception
        what = first_line(error)
        raise UserError(f"{name_or_path}: cannot load its weights ({what}); copy the folder again") from error
    for key, found, wanted in info["mismatched_keys"]:
        what = f"{key} is {list(found)} in its files and {list(wanted)} by its config"
        raise UserError(f"{name_or_path}: {what}; copy the folder again")
    if missing := sorted(info["missing_keys"]):
        what = f"its files lack {len(missing)} tensors, first {missing[0]}"
        has_no_head = all(name.rpartition(".")[0] in ("lm_head", "embed_out", "output") for name in missing)
        cure = "it is no causal language model, but one without an output layer" if has_no_head else "copy it again"
        raise UserError(f"{name_or_path}: {what}; {cure}")
    if not os.path.isdir(name_or_path):  # of the hub: its files are here now
        path = transformers.utils.cached_file(name_or_path, "config.json", cache_dir=cache_dir)
        check_model(Path(path).parent, name=name_or_path)
    if unused := sorted(info["unexpected_keys"]):
        say(f"{name_or_path}: {len(unused)} tensors that the model does not use were left out, first {unused[0]}")
    return model


# --- Folders that are written whole, or claimed ----------------------------------------------------------------------

GIB = 2**30
COMPLETE = "complete.json"  # written into a checkpoint folder last, by one process, after all have written theirs
LOCK = ".lock"  # in a folder that a run has claimed
# Without these a folder does not load.
LAST_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "params.json")
LAST_FILES += ("config.json", "adapter_config.json")


def claim_folder(folder, name=None):
    """Make `folder` and lock it until the file that is returned is closed, or this process ends, however it ends.

    Raises UserError, which speaks of `name`, where another process holds it.
    """
    path = Path(folder, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())  # else it has just ended
    except BlockingIOError:
        is_free = False
    except OSError:  # a file system without locks
        is_free = True
    if not is_free:
        lock.close()
        raise UserError(f"{name or folder}: another run is writing here; wait for it, or choose another folder")
    HELD.append(lock)
    return lock


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def hidden_folder(hidden, final):
    """Yield the folder `hidden`, whose files take their places in `final` when the block ends well; else they go.

    A `final` that is absent or empty gets its name in one step. Elsewhere files replace their namesakes, each whole,
    those that make the folder load last, and all others stay.
    """
    hidden, final = Path(hidden), Path(final)
    hidden.mkdir(parents=True, exist_ok=True)
    for path in (path for path in hidden.iterdir() if path.name != LOCK):  # of a run that was killed
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    os.umask(umask := os.umask(0))
    try:
        yield hidden
        files = [path for path in hidden.iterdir() if path.name != LOCK]
        for path in files:
            if path.is_file():
                os.chmod(path, 0o666 & ~umask)  # safetensors writes files that only their owner can read
            sync(path)
        sync(hidden)
        if not final.is_dir() or not any(final.iterdir()):
            os.rename(hidden, final)
            (final / LOCK).unlink(missing_ok=True)
            sync(final.parent)
        else:
            names = sorted((path.name for path in files), key=lambda name: (name in LAST_FILES, name))
            for name in (name for name in names if name in LAST_FILES):
                (final / name).unlink(missing_ok=True)  # while this lasts, the folder does not load
            for name in names:
                if (final / name).is_dir():
                    shutil.rmtree(final / name)  # of an earlier save
                os.replace(hidden / name, final / name)
            shutil.rmtree(hidden)
            sync(final)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def is_disk_full(error):
    """Whether an exception says that there was no room to write, in the words of Python, torch or safetensors."""
    words = ("No space left on device", "File too large", "Disk quota exceeded", "file write failed")
    of_torch_save = ("iostream error", "unexpected pos")  # it counts what it wrote, and does not say why it is less
    return any(word in str(error) for word in words + of_torch_save)


def is_memory_full(error):
    """Whether an exception says that there was no memory, on the host or on a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
    is_kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # of torch
    return is_kind or any(word in str(error) for word in words)


# --- run.json, checkpoints and memory: what a run was made of, and what it finds -------------------------------------


def sha256_of(path):
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(*packages):
    """The installed version of Python and of each named package; packages that are absent are left out."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit():
    """The commit these scripts stand at, with "+" where files differ from it; None outside a checkout."""
    git, said = ["git", "-C", str(Path(__file__).resolve().parent)], []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            said.append(subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip())
        except (OSError, subprocess.CalledProcessError):
            return None
    return said[0] + "+" * bool(said[1])


def read_run(folder):
    """The run.json of a folder as a dict; None where there is none. Raises UserError where it is no run of ours."""
    if not (path := Path(folder, "run.json")).is_file():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["made_by"] == "cria":
            return run
    raise UserError(f"{path}: not a run.json of these scripts; choose another folder")


def record_of(folder):
    """The run.json that a script of ours left in a folder; {} where there is none, or somebody else's."""
    with contextlib.suppress(UserError):
        return read_run(folder) or {}
    return {}


def find_checkpoints(folder):
    """({whole checkpoint: its marker}, [unfinished ones]), oldest first; whole ones have all files of their marker."""
    found, whole = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()], {}
    found.sort(key=lambda path: int(path.name[11:]))
    for path in found:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            marker = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
            if all((path / name).stat().st_size == size for name, size in marker["files"].items()):
                whole[path] = marker
    return whole, [path for path in found if path not in whole]


def free_host_memory():
    """Bytes of host memory that can be had: what the machine has available, within the container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.isfile(path) and (limit := Path(path).read_text().strip()).isdigit():
            free = min(free, int(limit))
    return free


# --- Completions by the name that forks of Stanford Alpaca import from here ------------------------------------------


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How an answer is sampled, by the names of the text completions of 2023; None leaves a choice to the server."""

    max_tokens: int | None = 1800
    temperature: float | None = 0.2
    top_p: float | None = 1.0
    n: int = 1
    stream: bool = False
    stop: list[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


def openai_completion(
    prompts, decoding_args, model_name=None, sleep_time=2, batch_size=1,
    max_instances=sys.maxsize, max_batches=sys.maxsize, return_text=False, **decoding_kwargs,
):  # fmt: skip
    """Answer one prompt, or a list of them, through the chat server of OPENAI_BASE_URL, `batch_size` at a time.

    A prompt is a text or a chat message {role, content}. Returns for each {text, finish_reason, model, total_tokens},
    as keys and as attributes, or the text alone with `return_text`; a list of them where decoding_args.n is above 1.
    The library tries again what fails, so `sleep_time` has no meaning any more. Raises UserError without an answer.
    """
    import openai

    Completion = type("Completion", (dict,), {"__getattr__": dict.__getitem__})

    def ask(prompt):
        message = prompt if isinstance(prompt, dict) else {"role": "user", "content": prompt}
        response = client.chat.completions.create(model=model, messages=[message], **sent)
        choices = getattr(response, "choices", None)  # an HTML page, for example, is handed through as a str
        empty = [c.finish_reason for c in choices or [] if not c.message or c.message.content is None]
        if not choices or empty:
            text = f"no text, finish_reason {empty[0]}" if empty else f"no completion, but {str(response)[:60]!r}"
            raise ValueError(text)
        facts = {"model": response.model, "total_tokens": response.usage and response.usage.total_tokens}
        found = [Completion(text=c.message.content, finish_reason=c.finish_reason, **facts) for c in choices]
        found = [completion.text for completion in found] if return_text else found
        return found if decoding_args.n > 1 else found[0]

    url, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY", "").strip()
    if (model := model_name or "gpt-4o-mini") == "text-davinci-003" and not url:
        model = "gpt-4o-mini"
        say(f"text-davinci-003 was withdrawn in 2024; using {model}")
    usual = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # not sent: some servers refuse them
    asked = {**dataclasses.asdict(decoding_args), **decoding_kwargs}
    for name in ("stream", "suffix", "logprobs", "echo"):
        if asked.pop(name, None):
            say(f"{name} has no meaning here; ignored")
    sent = {name: value for name, value in asked.items() if value not in (None, usual.get(name))}
    prompts = [prompts] if (single := isinstance(prompts, (str, dict))) else list(prompts)
    prompts = prompts[: min(max_instances, max_batches * batch_size)]
    try:
        client = openai.OpenAI(api_key=key or ("none" if url else None), max_retries=5)
        with concurrent.futures.ThreadPoolExecutor(batch_size) as pool:
            results = list(pool.map(ask, prompts))
    except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
        said = first_line(error.__cause__ or error).replace(key or "\n", "[key]") + "; check OPENAI_API_KEY"
        raise UserError(f"{model}: {said}, OPENAI_BASE_URL, the model's name and what is asked of it") from None
    return results[0] if single else results
