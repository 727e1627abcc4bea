"""What Cria's scripts share and must agree on: errors, records, prompts, tokenizers, verified writes, run.json.

Nothing here trains, downloads or prints on import; torch, transformers and sentencepiece are imported inside the
functions that need them, so that every script starts with only what it uses.
"""

import argparse
import asyncio
import contextlib
import copy
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# Errors, and talking to the user
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: the text says what is wrong, where, and what to do, on one line."""


def rank():
    """This process's number in the run, as the launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def say(message):
    """Print one line on stderr, from the first process of the run only."""
    if rank() == 0:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # of a progress line
        print(f"{clear}{message}", file=sys.stderr, flush=True)


def is_first_to_fail():
    """True in one process of the run, the first that asks; needs no cooperation from the others.

    Before the process group exists all processes do the same work, so the first of each node speaks. Afterwards a
    counter in the launcher's key-value store decides.
    """
    dist = process_group()
    if dist is None:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        from datetime import timedelta

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"cria/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:  # the store went down with the process that held it: then somebody has failed before
        return rank() == 0


def process_group():
    """torch.distributed where a process group exists, else None; torch is not imported for the question."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def from_first_process(function, *arguments):
    """Call `function` on the first process and return its result on all of them, which wait for it.

    What the user can mend, a full disk included, is raised on all of them, so that none waits for ever.
    """
    result, problem = None, None
    if rank() == 0:
        try:
            result = function(*arguments)
        except UserError as error:
            problem = str(error)
        except Exception as error:
            if not is_disk_full(error):
                raise
            problem = f"cannot write ({first_line(error)}); make room, then give the same command again"
    if process_group():
        shared = [result, problem]
        process_group().broadcast_object_list(shared)
        result, problem = shared
    if problem is not None:
        raise UserError(problem)
    return result


def run_main(main):
    """Run a script's `main`; what is the user's to mend ends as one line on stderr and exit code 2, no traceback."""
    message, code = "", 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except UserError as error:
        message, code = f"error: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        message, code = f"error: {where}{error.strerror or error}", 2
    if message and is_first_to_fail():
        print(" ".join(message.split("\n")), file=sys.stderr, flush=True)
    if process_group():
        if not message:  # in step with the others; after an error they may be waiting for this process for ever
            process_group().barrier()
            process_group().destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # threads of DeepSpeed at times abort the interpreter's own way out, when all is saved
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# JSON files
# ---------------------------------------------------------------------------------------------------------------------


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
    return [json.loads(line) for line in lines]


def jdump(obj, f, mode="w", indent=4, default=str):
    """Write a str as it is, or a dict or list as JSON, to a path (its folders are made) or an open file.

    Raises ValueError for any other type.
    """
    if not isinstance(obj, (str, dict, list)):
        raise ValueError(f"jdump writes a str, dict or list, not {type(obj).__name__}")
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
    text.encode("utf-8")  # a lone surrogate must fail before the file is emptied
    if isinstance(f, io.IOBase):
        f.write(text)
        return
    os.makedirs(os.path.dirname(os.path.abspath(f)), exist_ok=True)
    with open(f, mode=mode, encoding="utf-8") as opened:
        opened.write(text)


def write_json(obj, path):
    """Write JSON so that `path` holds the old text or the new one, whole, whenever the process is killed."""
    temporary = f"{path}.tmp"
    jdump(obj, temporary, indent=2)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Records and prompts
# ---------------------------------------------------------------------------------------------------------------------

IGNORE_INDEX = -100  # PyTorch's cross entropy leaves these labels out

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


def render_prompt(record):
    """The prompt of a record {instruction, input}; a missing, null or empty input takes the shorter template."""
    template = PROMPT_DICT["prompt_input" if record.get("input") else "prompt_no_input"]
    return template.format_map(record)


def json_type(value):
    """What a value read from JSON is, in JSON's words: "a number", "text", "null"."""
    words = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return words.get(type(value)) or json.dumps(value)


def check_record(record, required=("instruction", "output")):
    """What is wrong with a record, as words; "" where nothing is. Keys that are not `required` may be null."""
    if not isinstance(record, dict):
        return f"{json_type(record)}, expected an object with the keys instruction, input (optional), output"
    missing = [key for key in required if key not in record]
    if missing:
        return (
            f"no {' and no '.join(missing)}; keys found: {', '.join(map(str, record)) or 'none'}; "
            f"keys expected: instruction, input (optional), output{'' if 'output' in required else ' (optional)'}"
        )
    for key in ("instruction", "input", "output"):
        value = record.get(key)
        if not isinstance(value, str) and not (key not in required and value is None):
            return f"{key} is {json_type(value)}, expected text"
        try:
            (value or "").encode("utf-8")
        except UnicodeEncodeError:
            return f"{key} holds a lone surrogate (half of a character, such as \\ud83d), which has no UTF-8 form"
    return ""


def read_text(path, hint=""):
    """The text of a UTF-8 file, without a byte order mark. Raises UserError, with `hint`, where it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from None
    return decode_text(data, path)


def decode_text(data, path):
    """The text in the bytes of `path`, without a byte order mark. Raises UserError where they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "GB18030"
        raise UserError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
            f"convert the file, for example: iconv -f {encoding} -t UTF-8 {path} > converted.json"
        ) from None


def _json_problem(error):
    where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
    return f"not valid JSON, {where}"


def parse_records(text, name, required=("instruction", "output")):
    """Parse a JSON list, JSON Lines or Self-Instruct seed tasks; `name` stands in messages for the file.

    Returns (records, problems): records as {instruction, input, output, source}, where source is "name[index]" in a
    list and "name:line" in JSON Lines; problems as one line of text each. Where no output is `required`, the other
    keys of a record are kept in `others`. Raises UserError for text that is no JSON.
    """
    rows, problems = [], []  # rows: (source, value)
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{name}[{i}]", value) for i, value in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{getattr(error, 'lineno', 1)}: {_json_problem(error)}") from None
    else:
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a string
            if line.strip():
                try:
                    rows.append((f"{name}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{name}:{number}: {_json_problem(error)}")
        if problems and not rows:
            with contextlib.suppress(ValueError, RecursionError):  # one record, written over several lines
                rows, problems = [(f"{name}:1", json.loads(text))], []
    records = []
    for source, value in rows:
        examples = [value]
        if isinstance(value, dict) and isinstance(value.get("instances"), list):  # a Self-Instruct seed task
            examples = [
                {**instance, "instruction": value.get("instruction")} if isinstance(instance, dict) else instance
                for instance in value["instances"]
            ]
            if not examples:
                problems.append(f"{source}: a seed task without instances")
        for example in examples:
            problem = check_record(example, required)
            if problem:
                problems.append(f"{source}: {problem}")
            else:
                fields = {key: example.get(key) or "" for key in ("instruction", "input", "output")}
                others = {k: v for k, v in {**value, **example}.items() if k not in (*fields, "instances")}
                kept = {} if "output" in required else {"others": others}
                records.append({**fields, "source": source, **kept})
    return records, problems


def read_records(paths):
    """Read every record of one or several files, in order; see `parse_records`.

    Raises UserError for a file that is missing, empty, not UTF-8 or not JSON.
    """
    records, problems = [], []
    for path in paths:
        text = read_text(path, "; --data_path takes JSON or JSON Lines files")
        if not text.strip():
            raise UserError(f"{path}: the file is empty; it should hold a JSON list or JSON Lines")
        found = parse_records(text, os.path.basename(path))
        records += found[0]
        problems += found[1]
    return records, problems


def account(report, window):
    """The lines that account for every record of a `SupervisedDataset.report`."""

    def some(key, what):
        names = report[key]
        return [f"{what}: {len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"] if names else []

    kept, ends = report["kept"], report["end_token_trained"]
    share = ends / max(kept, 1)
    advice = "warning: models that seldom see the end token do not stop; raise --model_max_length"
    return [
        f"data: {kept:,} kept + {report['read'] - kept:,} dropped = {report['read']:,} read",
        *some("unreadable", "data: dropped, unreadable"),
        *some("prompt_fills_window", f"data: dropped, the prompt fills the window of {window} tokens"),
        *some("truncated", f"data: truncated at {window} tokens"),
        *some("straddling", "data: a token straddles the border of prompt and answer and is masked"),
        *some("empty_output", "data: empty output, only the end token is trained"),
        *some("special_tokens", "warning: special tokens such as </s> stand in the text of records"),
        f"data: the end token is trained in {ends:,} of {kept:,} rows ({share:.1%})",
        *([advice] if share < 0.99 else []),
    ]


def show_examples(dataset, tokenizer, count, colour):
    """The first `count` rows as text with what is trained marked: green on a terminal, >>> <<< otherwise."""
    shown = []
    for i in range(min(count, len(dataset))):
        ids, labels = dataset.input_ids[i], dataset.labels[i]
        border = int((labels == IGNORE_INDEX).sum())
        text, head = tokenizer.decode(ids), tokenizer.decode(ids[:border])
        tail = text[len(head) :] if text.startswith(head) else tokenizer.decode(ids[border:])
        marked = f"\x1b[32m{tail}\x1b[0m" if colour else f">>>{tail}<<<"
        shown.append(f"--- {dataset.sources[i]}: {len(ids)} tokens, {len(ids) - border} trained\n{head}{marked}")
    return "\n".join(shown)


def summarize(dataset, args):
    """What --dry_run prints of a dataset: lengths in tokens, and the steps that the run would take."""
    lengths = sorted(map(len, dataset.input_ids))
    targets = sum(int((labels != IGNORE_INDEX).sum()) for labels in dataset.labels)
    at = {share: lengths[min(int(share * len(lengths)), len(lengths) - 1)] for share in (0.5, 0.9, 0.99)}
    steps = num_steps(len(dataset), args)
    epochs = round(steps / -(-len(dataset) // global_batch(args)), 2) if args.max_steps > 0 else args.num_train_epochs
    return (
        f"lengths in tokens: median {at[0.5]}, 90 % {at[0.9]}, 99 % {at[0.99]}, longest {lengths[-1]}\n"
        f"tokens per epoch: {sum(lengths):,}, of which trained {targets:,} ({targets / sum(lengths):.1%})\n"
        f"steps: {steps:,} of {global_batch(args):,} examples ({epochs:g} epochs)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Prompt styles: how a conversation is put to a model, and what ends its answer
# ---------------------------------------------------------------------------------------------------------------------

# "prompt_style" in a model's run.json is one of these names; each with the texts that end an answer, beside the end
# token: the next turn's head in Alpaca's and Vicuna v0's (FastChat's stop_str), the end token spelled out in v1.1's.
PROMPT_STYLES = {"alpaca": ("### Instruction:",), "vicuna_v0": ("###",), "vicuna_v1.1": ("</s>",), "chat_template": ()}

# What Vicuna was trained with, a wire format byte for byte: FastChat's docs/vicuna_weights_version.md; for v0 as its
# train.py of March 2023 wrote it, for v1.1 as its conversation.py joins it. {0} is a message, {1} the answer to it.
VICUNA_TURNS = {
    "vicuna_v0": (
        (
            "A chat between a curious human and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
        ),
        "### Human: {0}\n### Assistant:",
        " {1}\n",
    ),
    "vicuna_v1.1": (
        (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        "USER: {0} ASSISTANT:",
        " {1}</s>",
    ),
}


def render_conversation(style, turns, tokenizer=None):
    """The prompt that asks for the answer to the last of `turns`, records {instruction, input, output}.

    Alpaca's prompt has no place for earlier turns, so they are left out; it is `render_prompt` of the last. In the
    other styles an input follows its instruction after an empty line. `tokenizer` holds the template of
    "chat_template"; raises UserError where it holds none.
    """
    if style == "alpaca":
        return render_prompt(turns[-1])
    texts = ["\n\n".join(filter(None, (turn["instruction"], turn.get("input")))) for turn in turns]
    answers = [turn["output"] for turn in turns[:-1]]
    if style == "chat_template":
        if not tokenizer.chat_template:
            others = ", ".join(name for name in PROMPT_STYLES if name != style)
            raise UserError(f"the tokenizer has no chat template; choose another --prompt_style: {others}")
        said = [text for pair in zip(texts, [*answers, None], strict=True) for text in pair][:-1]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, question, reply = VICUNA_TURNS[style]
    earlier = [(question + reply).format(*pair) for pair in zip(texts[:-1], answers, strict=True)]
    return system + "".join(earlier) + question.format(texts[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Options of 2023
# ---------------------------------------------------------------------------------------------------------------------


def _is_true(value):
    return value.lower() in ("", "true", "1", "yes", "y", "t")


def _renamed(new):
    return lambda value: [f"--{new}", value] if value else [f"--{new}"]


def _fsdp_config(key):
    return lambda value: ["--fsdp_config", json.dumps({key: value})]


# Spellings of 2023 that today's libraries reject. Each maps its value to today's words, [] where it only said the
# default, or to None where nothing corresponds; None options are named and ignored.
OLD_OPTIONS = {
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _renamed("warmup_steps"),  # today a warm-up below 1 is a share of all steps
    "fsdp_transformer_layer_cls_to_wrap": _fsdp_config("transformer_layer_cls_to_wrap"),
    "fsdp_min_num_params": _fsdp_config("min_num_params"),
    "group_by_length": lambda v: ["--train_sampling_strategy", "group_by_length"] if _is_true(v) else [],
    "no_cuda": lambda v: ["--use_cpu", v or "True"],
    "logging_dir": lambda v: ["--tensorboard_dir", v],
    "adafactor": lambda v: ["--optim", "adafactor"] if _is_true(v) else [],
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "torch_dtype": _renamed("dtype"),
    "push_to_hub_model_id": _renamed("hub_model_id"),
    "push_to_hub_token": _renamed("hub_token"),
    **dict.fromkeys(
        "save_safetensors half_precision_backend fp16_backend fp16_opt_level use_mps_device use_ipex xpu_backend "
        "sharded_ddp jit_mode_eval past_index tpu_num_cores tpu_metrics_debug ray_scope include_tokens_per_second "
        "include_inputs_for_metrics mp_parameters dispatch_batches split_batches lazy_preprocess use_fast_tokenizer "
        "overwrite_cache push_to_hub_organization torchdynamo use_legacy_prediction_loop".split()
    ),
}


OLD_VALUES = {("optim", "adamw_hf"): ["--optim", "adamw_torch"], ("debug", ""): []}  # of options that are still there


def translate_old_options(words):
    """Turn a 2023 command line into today's. `words` is argv without the script's name.

    Returns (words, notices). `--old value`, `--old=value` and `--old-name` are all understood. For example
    ["--evaluation_strategy", "no"] gives (["--eval_strategy", "no"], ["--evaluation_strategy is now --eval_strategy"]).
    """
    result, notices, position, last = [], [], 0, []
    while position < len(words):
        word, position = words[position], position + 1
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key == "local_rank":  # torch.distributed.launch and deepspeed pass it; the environment says it too
            position += not equals
            continue
        following = value if equals else "".join(words[position : position + 1])
        if (key, following) in OLD_VALUES:
            position, new = position + (not equals), OLD_VALUES[key, following]
            result += new
            notices.append(
                f"{name} {following} is now {' '.join(new)}" if new else f"{name} '' has no meaning; ignored"
            )
            continue
        if key not in OLD_OPTIONS:
            result.append(word)
            continue
        while not equals and position < len(words) and not words[position].startswith("--"):
            value, position = f"{value} {words[position]}".strip(), position + 1
        new = OLD_OPTIONS[key](value) if OLD_OPTIONS[key] else None
        steps = _last_value("--warmup_steps", words) if key == "warmup_ratio" else ""
        if steps.strip("0."):
            notices.append(f"{name} gives way to --warmup_steps {steps}, as it did")
            continue
        if steps:  # 0, which in 2023 counted as none
            last = new
        else:
            result += new or []
        meaning = f"is now {' '.join(w for w in new if w != value)}" if new else "has no meaning any more; ignored"
        notices.append(f"{name} {meaning}")
    return result + last, notices


def _last_value(name, words):
    """The value that option `name` has in `words`, "" where it is not given."""
    pairs = [word.partition("=")[::2] if "=" in word else (word, after) for word, after in zip(words, [*words[1:], ""])]
    return next((value for word, value in reversed(pairs) if word == name), "")


def unknown_options(words, known):
    """The error for options that a script does not have, each with the nearest name that exists."""
    names = [word.split("=")[0] for word in words if word.startswith("--")] or words
    near = {name: difflib.get_close_matches(name, known, n=1) for name in names}
    hints = [f"{name} (did you mean {match[0]}?)" if match else name for name, match in near.items()]
    return UserError(f"unknown option: {', '.join(hints)}; --help lists those that exist")


def _refuse(message):
    raise UserError(message)


def parse_options(parser, words):
    """Parse `words` with an argparse parser. Raises UserError for whatever it refuses, unknown options included."""
    parser.error = _refuse  # one line, without the usage
    args, rest = parser.parse_known_args(words)
    if rest:
        raise unknown_options(rest, [name for action in parser._actions for name in action.option_strings])
    return args


def truth(word):
    """The value of an option that is True or False."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return known[word.lower()]


TRUTH = {"type": truth, "nargs": "?", "const": True}  # of add_argument; the bare option is True


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

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

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(model_path).read_bytes())
    return proto


def sentencepiece_ids(model_path, texts):
    """The ids that the SentencePiece model itself gives each text, without begin and end tokens."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model_path)).encode(list(texts))


def differs_from_sentencepiece(tokenizer, model_path):
    """The first nasty string that `tokenizer` reads otherwise than the SentencePiece model; None where all agree.

    `tokenizer` is one of transformers or of tokenizers. Pieces that the model's maker defined by hand split the text
    around them, so each stands in a string of its own.
    """
    pieces = sentencepiece_proto(model_path).pieces
    texts = NASTY_STRINGS + [f"a{p.piece} b{p.piece}c" for p in pieces if p.type == p.USER_DEFINED]
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
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    built = Tokenizer(bpe)
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
        second = [f"{token}:1" for token in (*head, "$B", *tail)]
        built.post_processor = processors.TemplateProcessing(
            single=[*head, "$A", *tail],
            pair=[*head, "$A", *tail, *second],
            special_tokens=[(token, vocab[token]) for token in {*head, *tail}],
        )
    return built, {"bos_token": bos, "eos_token": eos, "unk_token": unk, "clean_up_tokenization_spaces": False}


def find_sentencepiece(name_or_path, cache_dir=None):
    """The `tokenizer.model` of a model folder or of a hub model in the cache; None where there is none."""
    path = Path(name_or_path, "tokenizer.model")
    if path.is_file():
        return path
    if Path(name_or_path).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(name_or_path), "tokenizer.model", cache_dir=cache_dir)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def load_tokenizer(name_or_path, model_max_length=None, cache_dir=None):
    """Load a model's tokenizer and prove it: where there is a SentencePiece model, its ids are the law.

    transformers 5.x reads some folders wrongly and says nothing, so the ids of `NASTY_STRINGS` are compared. A folder
    without a right tokenizer.json, or with the class and empty special tokens of early LLaMA conversions, gets a
    tokenizer built in memory from the SentencePiece model; what was done is said in one line. Padding is on the right
    and never the end token. Raises UserError where no right tokenizer can be had.
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
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, **options)
        except Exception as error:  # whatever transformers raises for a folder it cannot read
            problem = f"its tokenizer files cannot be read ({first_line(error)})"
    if tokenizer is not None and model_path is not None:
        if not tokenizer.eos_token:
            problem = "its end token is empty"
        elif (text := differs_from_sentencepiece(tokenizer, model_path)) is not None:
            problem = f"its tokenizer.json reads {text!r} otherwise than its tokenizer.model"
    if problem and model_path is None:
        raise UserError(f"{name_or_path}: {problem}; {layout_hint(name_or_path, for_tokenizer=True)}")
    if problem:
        config = Path(name_or_path, "tokenizer_config.json")
        config = json.loads(read_text(config)) if config.is_file() else {}
        added = {key: config[key] for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)}
        tokenizer = tokenizer_from_sentencepiece(model_path, **added, **options)
        text = differs_from_sentencepiece(tokenizer, model_path)
        if text is not None:
            raise UserError(
                f"{name_or_path}: {problem}, and one built from {model_path.name} reads {text!r} differently too; "
                "put a right tokenizer.json into the folder"
            )
        say(f"tokenizer: {problem}; built from {model_path.name}, ids checked against it")
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


# ---------------------------------------------------------------------------------------------------------------------
# Model folders
# ---------------------------------------------------------------------------------------------------------------------


def layout_hint(name_or_path, for_tokenizer=False):
    """What to do about a model that does not load, by what lies around it.

    The first converters wrote OUT/llama-7b and OUT/tokenizer, and tutorials name those; today's write one flat folder.
    """
    folder = Path(name_or_path)
    near = [folder.parent, folder.parent / "tokenizer"]
    tokenizers = [path for path in near if any((path / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))]
    if for_tokenizer and folder.is_dir() and tokenizers:
        source, target = shlex.quote(f"{tokenizers[-1]}/"), shlex.quote(f"{folder}/")
        return f"{tokenizers[-1]} has one: cp {source}*token* {target}"
    inside = list(folder.iterdir()) if folder.is_dir() else []
    models = [path for path in (folder.parent, *inside) if (path / "config.json").is_file()]
    if not (folder / "config.json").is_file() and len(models) == 1:
        return f"the model is in {models[0]}: give --model_name_or_path {shlex.quote(str(models[0]))}"
    if any((path / "params.json").is_file() for path in (folder, *inside)):
        command = f"python convert_llama_weights.py --input_dir {shlex.quote(str(folder))} --output_dir NEW"
        return f"it holds raw weights; convert them first: {command}"
    return "--model_name_or_path takes a folder with config.json, weights and tokenizer, or a hub name"


def load_config(name_or_path, cache_dir=None):
    """The config of a causal language model. Raises UserError for a path or name that is none."""
    import transformers

    hint = layout_hint(name_or_path)
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name_or_path}: cannot be read as a model ({first_line(error)}); {hint}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name_or_path}: model type {config.model_type} is not a causal language model; {hint}")
    return config


def skeleton(config):
    """The model without memory for its weights: for counting parameters and finding layer classes."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def empty_model(config, dtype):
    """The model with room for its weights on the host, not filled: the system gives no memory until it is written."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():  # buffers, which no file holds, get their values
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=dtype)))
    model.tie_weights()
    return model


def load_weights(name_or_path, config, dtype, cache_dir=None, device_map=None):
    """Load a model whole. Raises UserError where weights are missing, damaged or of another shape."""
    import transformers

    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            cache_dir=cache_dir,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named, below
        )
    except Exception as error:  # from half a download to a damaged shard: each library has its own exception
        what = first_line(error)
        raise UserError(f"{name_or_path}: cannot load its weights ({what}); copy the folder again") from error
    for key, found, wanted in info["mismatched_keys"]:
        what = f"{key} is {list(found)} in its files and {list(wanted)} by its config"
        raise UserError(f"{name_or_path}: {what}; copy the folder again")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{name_or_path}: its files lack {len(missing)} tensors, first {missing[0]}; copy the folder again"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        say(f"{name_or_path}: {len(unused)} tensors that the model does not use were left out, first {unused[0]}")
    return model


def repair_ids(model, tokenizer):
    """Give config and generation config the tokenizer's special ids, and make the generation config one that saves.

    Returns what was changed, as words.
    """
    import transformers

    changed = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value, old = getattr(tokenizer, key), getattr(model.config, key, None)
        if old != value and not (isinstance(old, list) and value in old):
            if old is not None:
                changed.append(f"{key} {old} -> {value}, as the tokenizer has it")
            setattr(model.config, key, value)
            setattr(model.generation_config, key, value)

    def problem():
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            return first_line(error)

    if problem():  # a temperature or top_p without sampling, as Llama 2 and Vicuna ship it
        model.generation_config.do_sample = True
        changed.append("generation config: do_sample -> True")
    if reason := problem():
        model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
        changed.append(f"generation config replaced ({reason})")
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# Verified writes
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "checkpoint-*", "trainer_state.json")
COMPLETE = "complete.json"  # written into a checkpoint folder last, by one process, after all have written theirs
LAST_FILES = ("model.safetensors.index.json", "config.json")  # without these a folder does not load


def first_line(error):
    """The first line of an error's text, shortened: for quoting another library's message inside ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@contextlib.contextmanager
def staged(folder):
    """Yield a hidden folder inside `folder`; when the block ends well its files move up, those that make it load last.

    A block that fails leaves `folder` as it was. Files move by rename, so each is whole or absent.
    """
    staging = Path(folder, ".saving")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        names = sorted((path.name for path in staging.iterdir()), key=lambda n: (n in LAST_FILES and 1, n))
        umask = os.umask(0)
        os.umask(umask)
        for name in names:
            if (staging / name).is_dir():
                shutil.rmtree(Path(folder, name), ignore_errors=True)  # of an earlier save
            else:
                os.chmod(staging / name, 0o666 & ~umask)  # safetensors writes files that only their owner can read
            os.replace(staging / name, Path(folder, name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def weight_files(folder):
    """The .safetensors files of a model folder, in order."""
    return sorted(Path(folder).glob("*.safetensors"))


def weights_size(folder):
    """Bytes of the weights in a model folder."""
    return sum(path.stat().st_size for path in weight_files(folder))


def is_disk_full(error):
    """Whether an exception says that there was no room to write, in the words of Python, torch or safetensors."""
    words = ("No space left on device", "File too large", "Disk quota exceeded", "file write failed")
    of_torch_save = ("iostream error", "unexpected pos")  # it counts what it wrote, and does not say why it is less
    return any(word in str(error) for word in words + of_torch_save)


def check_weights(folder, expected, may_lack=()):
    """Read the weights of `folder` back and compare them with `expected`, a dict of name -> tensor.

    Names in `may_lack` (tied to a tensor that is there) may be absent. Every value must be finite and bit-equal.
    Returns the number of tensors read. Raises UserError naming the first tensor that is wrong.
    """
    import torch
    from safetensors import safe_open

    seen = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor, source = file.get_tensor(name), expected.get(name)
                if source is None:
                    raise UserError(f"{path.name}: tensor {name} was not to be saved")
                if tensor.shape != source.shape or tensor.dtype != source.dtype:
                    raise UserError(
                        f"{path.name}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                        f"expected {source.dtype} {list(source.shape)}"
                    )
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path.name}: tensor {name} holds values that are not finite")
                if not torch.equal(tensor, source):
                    raise UserError(f"{path.name}: tensor {name} read back differs from what was written")
                seen.add(name)
    missing = sorted(set(expected) - seen - set(may_lack))
    if missing or not seen:
        raise UserError(f"{folder}: saved weights lack {len(missing)} of {len(expected)} tensors, first {missing[:1]}")
    return len(seen)


def save_dtype(args):
    """The dtype of the final model: --save_dtype, else what the run computes in."""
    import torch

    chosen = getattr(args, "save_dtype", None)
    return getattr(torch, chosen or ("bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"))


def gather_weights(trainer, dtype):
    """The whole model as {name: CPU tensor of `dtype`} on the first process, {} elsewhere; all processes call it.

    A tensor tied to an earlier one is left out.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    names, first = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    weights = {}
    if hasattr(trainer.model_wrapped, "zero_optimization_stage") and dtype != next(model.parameters()).dtype:
        from deepspeed.utils import safe_get_full_fp32_param  # the masters; the model itself is in 16 bits

        for name, parameter in model.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if trainer.args.should_save:
                weights[name] = whole.to("cpu", dtype, copy=True)
        return weights
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    for name in list(state) if trainer.args.should_save else []:
        tensor = state.pop(name)  # so that host memory holds each tensor once
        if names.get(name, name) == name:
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    return weights


def write_model(trainer, weights, folder):
    """Write weights, config and tokenizer into `folder`, read the weights back and compare; see `staged`.

    Returns the names of the files. Raises UserError for a value that is not finite in the dtype of the weights.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    weights = revert_weight_conversion(model, weights)  # the names of published files, where the library's differ
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            advice = "lower --learning_rate" if weight.dtype == torch.float32 else "use --save_dtype float32"
            raise UserError(f"weight {name} has values that are not finite in {str(weight.dtype)[6:]}; {advice}")
    with staged(folder) as staging:
        model.save_pretrained(staging, state_dict=dict(weights), max_shard_size="5GB", save_original_format=False)
        config = jload(staging / "config.json") | {"dtype": str(save_dtype(trainer.args))[6:]}
        jdump(config, staging / "config.json", indent=2)  # the library writes the dtype of the masters
        trainer.processing_class.save_pretrained(staging)
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        check_weights(staging, weights)
        return sorted(path.name for path in staging.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# run.json: what a run was made of
# ---------------------------------------------------------------------------------------------------------------------


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
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if status.stdout.strip() else "")


def read_run(folder):
    """The run.json of a folder as a dict; None where there is none. Raises UserError where it is no run of ours."""
    path = Path(folder, "run.json")
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return run if run["made_by"] == "cria" else run["not ours"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a run.json of these scripts; choose another folder") from None


def settings_of(args, model_args, hashes):
    """The settings that decide what a run computes; a resumed run must have the same. `hashes` are of the data files."""
    names = (
        "model_max_length pad_token seed data_seed learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm "
        "fp16 bf16 label_smoothing_factor neftune_noise_alpha train_sampling_strategy average_tokens_across_devices"
    )
    settings = {name: getattr(args, name) for name in names.split()}
    model = model_args.model_name_or_path
    settings |= {"model": os.path.abspath(model) if os.path.isdir(model) else model, "dtype": model_args.dtype}
    settings |= {"data": hashes}
    settings |= {"global_batch": global_batch(args), "engine": engine_name(args).removesuffix(" with offload")}
    for name in ("optimizer", "scheduler"):  # which DeepSpeed's JSON may set in place of the options
        if args.deepspeed and name in args.deepspeed:
            settings[f"DeepSpeed's {name}"] = args.deepspeed[name]
    if args.deepspeed or args.fsdp:
        settings["processes"] = args.world_size  # its checkpoints are in as many parts
    return json.loads(json.dumps(settings, default=str))


def portable(given, args):
    """The arguments as run.json keeps them: paths made absolute and a DeepSpeed JSON by its content."""
    kept = dict(given)
    if kept.get("data_path"):
        kept["data_path"] = [os.path.abspath(path) for path in kept["data_path"]]
    if os.path.isdir(kept.get("model_name_or_path", "")):
        kept["model_name_or_path"] = os.path.abspath(kept["model_name_or_path"])
    if kept.get("deepspeed"):
        kept["deepspeed"] = args.deepspeed
    for name in ("resume_from_checkpoint", "resume_anyway", "overwrite_output_dir"):
        kept.pop(name, None)
    return kept


def started_run(args, given, settings, hashes, data):
    """What run.json says of a run of train.py before its first step; `data` is its FilledDataset."""
    return {
        "made_by": "cria",
        "status": "started",
        "arguments": portable(given, args),
        "settings": settings,
        "prompt_style": "alpaca",
        "data": hashes,
        "counts": {key: value if isinstance(value, int) else len(value) for key, value in data.dataset.report.items()},
        "filled": data.num_filled,
        "versions": versions("torch", "transformers", "accelerate", "deepspeed", "tokenizers"),
        "git_commit": git_commit(),
        "seed": args.seed,
        "files": (read_run(args.output_dir) or {}).get("files", []),  # of the model that this run will replace
    }


def results_of(trainer):
    """What run.json says of a run of train.py at its end."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.num_skipped,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": sum(losses) / len(losses),
        "dtypes": trainer.dtypes,
        "engine": engine_name(trainer.args),
        "processes": trainer.args.world_size,
        "padded": trainer.data_collator.padded,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and output folders: whose they are, and what of them is whole
# ---------------------------------------------------------------------------------------------------------------------


HELD_LOCKS = []  # a lock lasts as long as its file is open


def claim_folder(folder):
    """Make `folder` and lock it until this process ends, however it ends; returns the lock, an open file.

    Raises UserError where another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = open(Path(folder, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is writing here; wait for it, or choose another --output_dir") from None
    except OSError:  # a file system without locks
        pass
    HELD_LOCKS.append(lock)
    return lock


def find_checkpoints(folder):
    """(whole, unfinished) checkpoint folders, oldest first; whole means that all files of the marker are there."""
    whole, unfinished = [], []
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[11:])):
        try:
            files = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
            is_whole = all((path / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        (whole if is_whole else unfinished).append(path)
    return whole, unfinished


def mark_checkpoint(folder, **facts):
    """Write the marker that makes a checkpoint count: its files with their sizes, and `facts`."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(COMPLETE, None)
    write_json({**facts, "files": files}, folder / COMPLETE)


def unmark_checkpoints_after(step, folder):
    """Let the checkpoints behind `step` count no more: these steps are trained anew and will write over them."""
    for path in find_checkpoints(folder)[0]:
        if int(path.name[11:]) > step:
            (path / COMPLETE).unlink()
            say(f"{path}: of steps that are trained anew, no longer used")


def delete_checkpoint(path):
    """Remove a checkpoint; the marker goes first, so that a kill in between leaves nothing that counts."""
    if path.is_symlink():  # what it leads to was put there by the user
        path.unlink()
        return
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def delete_run(folder):
    """Remove what a run of ours wrote into `folder`, and nothing else."""
    folder = Path(folder)
    for path in sum(find_checkpoints(folder), []):
        if any(any(path.glob(pattern)) for pattern in (COMPLETE, *RUN_FILES)):
            delete_checkpoint(path)
        else:
            say(f"{path}: holds nothing of a run; left")
    for name in [*(read_run(folder) or {}).get("files", []), "loss.csv", "run.json"]:
        if Path(folder, name).is_dir():
            shutil.rmtree(Path(folder, name))
        else:
            Path(folder, name).unlink(missing_ok=True)


def is_resumable(path):
    """Whether a whole checkpoint holds the optimizer too (not so with --save_only_model)."""
    return json.loads((path / COMPLETE).read_text(encoding="utf-8"))["resumable"]


def resume_point(folder, settings, wanted="", overwrite=False, anyway=False):
    """Decide what a run does with its output folder. Returns (finished, checkpoint to resume from or None).

    `settings` decide what the run computes; a resumed run must have the same unless `anyway`. `wanted` is the value of
    --resume_from_checkpoint. With `overwrite` an earlier run of ours does not count; `delete_run` removes it once the
    new one is known to work. Raises UserError where the folder belongs to something else or its run had other settings.
    """
    folder, wanted = Path(folder), str(wanted or "").strip()
    run = read_run(folder)
    if run is not None and "settings" not in run:  # a model that another script of ours wrote
        raise UserError(f"{folder}: holds what {run.get('script')} wrote; choose another --output_dir")
    foreign = sorted(path.name for pattern in RUN_FILES for path in folder.glob(pattern)) if run is None else []
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which is not of a run of ours; choose another --output_dir")
    if overwrite:
        run = None
    for hidden in (".saving", ".rehearsal"):  # of a run that was killed
        shutil.rmtree(folder / hidden, ignore_errors=True)
    named = None if wanted.lower() in ("", "true", "false") else Path(wanted)
    owner = None if named is None else read_run(named.resolve().parent)  # the run of ours that wrote the checkpoint
    if named and not (named / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {named}: no checkpoint there (it lacks trainer_state.json)")
    if owner is not None:
        usable = [path for path in find_checkpoints(named.resolve().parent)[0] if is_resumable(path)]
        if named.resolve() not in usable:
            raise UserError(
                f"--resume_from_checkpoint {named}: it is unfinished or holds no optimizer; "
                f"whole ones there: {', '.join(path.name for path in usable) or 'none'}"
            )
    if run is None and named is None:
        if wanted.lower() == "true":
            raise UserError(f"--resume_from_checkpoint: {folder} holds no run; leave the option out to start one")
        return False, None
    olds = [old["settings"] for old in (run, owner) if old and "settings" in old]
    changed = [
        f"{key} was {old.get(key)} and is {value}"
        for old in olds
        for key, value in settings.items()
        if old.get(key) != value
    ]
    if changed and not anyway:
        raise UserError(
            f"{folder if run is not None else named.resolve().parent}: its run had other settings: "
            f"{'; '.join(dict.fromkeys(changed))}; choose another --output_dir, start afresh "
            "with --overwrite_output_dir, or go on all the same with --resume_anyway True"
        )
    if named is not None:
        return False, str(named)
    if wanted.lower() == "false":
        raise UserError(f"{folder}: holds a run already; to start it afresh use --overwrite_output_dir")
    weights = [name for name in run.get("files", []) if name.endswith(".safetensors")]
    gone = [name for name in weights if not Path(folder, name).exists()]
    if run["status"] == "finished" and not changed and not gone:
        say(f"{folder}: this run is finished ({run['results']['steps']} steps); nothing to do")
        return True, None
    if run["status"] == "finished" and gone:
        say(f"{folder}: this run was finished, but {gone[0]} is gone")
    whole, unfinished = find_checkpoints(folder)
    for path in unfinished:
        say(f"{path}: unfinished checkpoint, not used")
    resumable = [path for path in whole if is_resumable(path)]
    if resumable:
        say(f"resuming from {resumable[-1]}")
    elif wanted.lower() == "true":
        raise UserError(f"--resume_from_checkpoint: {folder} holds no whole checkpoint; leave the option out")
    else:
        say(f"{folder}: its run has no whole checkpoint yet; starting from the first step")
    return False, str(resumable[-1]) if resumable else None


def open_output(args, settings, model):
    """Take the output folder for this process, and decide what to do with it; see `resume_point`.

    Raises UserError where --overwrite_output_dir would delete what the run reads: `model`, the folder that it starts
    from, or the checkpoint that it is to resume from.
    """
    claim_folder(args.output_dir)
    wanted, overwrite, anyway = args.resume_from_checkpoint, args.overwrite_output_dir, args.resume_anyway
    folder = Path(args.output_dir).resolve()
    for path in (Path(name).resolve() for name in (model, wanted) if overwrite and os.path.isdir(str(name))):
        if path == folder or (path.parent == folder and path.name.startswith("checkpoint-")):
            raise UserError(
                f"--overwrite_output_dir would delete {path}, which this run reads; choose another --output_dir"
            )
    return resume_point(args.output_dir, settings, wanted, overwrite, anyway)


def write_loss_csv(history, path):
    """Write the per-step log of the Trainer as CSV."""
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_targets", "skipped_steps")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(entry for entry in history if "loss" in entry)


# ---------------------------------------------------------------------------------------------------------------------
# Engines: what they need, and what the machine has
# ---------------------------------------------------------------------------------------------------------------------

GIB = 2**30
ENGINE_OPTIONS = {
    "FSDP": '--fsdp "full_shard auto_wrap"',
    "FSDP with offload": '--fsdp "full_shard auto_wrap offload"',
    "ZeRO-2 with offload": "--deepspeed examples/ds_zero2.json",
    "ZeRO-3 with offload": "--deepspeed ds_config.json",
}


def fit_device(args):
    """Drop, with a line, what this device cannot honour; a command for a cluster can be rehearsed on a laptop."""
    import torch
    import transformers

    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to find out
    if args.tf32 and (args.use_cpu or not transformers.utils.is_torch_tf32_available()):
        say("--tf32 needs a GPU of the Ampere generation or newer; ignored here")
        args.tf32 = None
    if args.fp16 and args.use_cpu and not args.deepspeed:
        say("--fp16 needs a GPU, or --deepspeed; computing in float32 here")
        args.fp16 = False
    if args.fp16 and not args.deepspeed and args.optim == "adamw_torch_fused":
        args.optim = "adamw_torch"  # the fused one skips overflowed steps itself and tells nobody
    if args.bf16 and not args.use_cpu and not transformers.utils.is_torch_bf16_gpu_available():
        raise UserError("--bf16 needs a GPU of the Ampere generation or newer; use --fp16 True here")


def check_launcher(args):
    """Plain `python` runs one process on one device: refuse or say what needs a launcher, never DataParallel."""
    import torch

    for engine, option in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed)):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" and not option:
            raise UserError(f"the launcher asks for {engine} and the options do not; give --{engine.lower()} here")
    if "WORLD_SIZE" in os.environ:
        return
    devices = 0 if args.use_cpu else torch.cuda.device_count()
    command = f"torchrun --standalone --nproc_per_node={max(devices, 1 if devices else 2)} train.py ..."
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():  # on a CPU it starts one process for all
        raise UserError(f"accelerate launch has started one process in place of several; use {command}")
    if args.fsdp or args.deepspeed:
        raise UserError(f"--{'fsdp' if args.fsdp else 'deepspeed'} needs a launcher: {command}")
    if devices > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        say(f"using GPU {visible} of {devices}; for all of them: {command}")


# The keys of --fsdp_config, without "fsdp_": those that FSDP2 heeds, those that only FSDP1 did, accelerate's names.
FSDP_KEYS = set(
    "activation_checkpointing auto_wrap_policy cpu_offload cpu_ram_efficient_loading min_num_params "
    "reshard_after_forward state_dict_type transformer_layer_cls_to_wrap version".split()
)
FSDP1_KEYS = set(
    "backward_prefetch forward_prefetch limit_all_gathers sync_module_states use_orig_params "
    "xla xla_fsdp_grad_ckpt xla_fsdp_v2".split()
)
FSDP_NAMES = {"offload_params": "cpu_offload", "sharding_strategy": "reshard_after_forward"}
RESHARD = {"TRUE": True, "FULL_SHARD": True, "1": True, "FALSE": False, "SHARD_GRAD_OP": False, "2": False}


def configure_fsdp(args):
    """Turn the words of --fsdp into FSDP2's settings; what the user wrote in --fsdp_config wins."""
    words = args.fsdp.lower().split() if isinstance(args.fsdp, str) else []
    known = {"full_shard", "shard_grad_op", "auto_wrap", "offload", "true"}
    if not known.issuperset(words):
        raise UserError(f"--fsdp {args.fsdp}: choose from full_shard, shard_grad_op, auto_wrap, offload")
    config = args.fsdp_config or {}
    if isinstance(config, str):
        text = (
            config if config.lstrip().startswith("{") else read_text(config, "; --fsdp_config takes JSON or its file")
        )
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--fsdp_config: {_json_problem(error)}") from None
    config = {FSDP_NAMES.get(key.removeprefix("fsdp_"), key.removeprefix("fsdp_")): config[key] for key in config}
    if unknown := sorted(config.keys() - FSDP_KEYS - FSDP1_KEYS):
        raise UserError(f"--fsdp_config: unknown key {unknown[0]}; those that exist: {', '.join(sorted(FSDP_KEYS))}")
    if dropped := sorted(config.keys() & FSDP1_KEYS):
        say(f"--fsdp_config: {', '.join(dropped)}: of FSDP1, without meaning in FSDP2; ignored")
        config = {key: value for key, value in config.items() if key not in dropped}
    if str(config.get("version", 2)) != "2":
        raise UserError("--fsdp_config: there is FSDP2 only; leave version out")
    strategy = str(config.get("reshard_after_forward", "true")).upper()
    if strategy not in RESHARD:
        raise UserError(
            f"--fsdp_config: {strategy} is not there in FSDP2; choose FULL_SHARD, SHARD_GRAD_OP or no --fsdp"
        )
    if "reshard_after_forward" in config:
        config["reshard_after_forward"] = RESHARD[strategy]
    config.setdefault("reshard_after_forward", "shard_grad_op" not in words)
    config.setdefault("cpu_offload", "offload" in words)
    config.setdefault("cpu_ram_efficient_loading", True)  # one full copy of the weights per node
    if config.get("min_num_params"):
        config["min_num_params"] = int(config["min_num_params"])
        config.setdefault("auto_wrap_policy", "SIZE_BASED_WRAP")
    if args.gradient_checkpointing:  # FSDP's own form saves the Trainer's extra gather in the backward pass
        config.setdefault("activation_checkpointing", True)
        args.gradient_checkpointing = False
    args.fsdp, args.fsdp_config = True, config
    # accelerate reads these when the process group is made: with them CPU tensors get a gloo group beside NCCL.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")


def configure_deepspeed(args):
    """Read --deepspeed, a path or a dict, and complete it; see `complete_ds_config`."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("--deepspeed needs the package: pip install deepspeed; or use --fsdp") from None
    deepspeed.utils.logger.setLevel("ERROR")
    path, config = "DeepSpeed configuration", args.deepspeed
    if isinstance(config, str):
        try:
            path = config
            config = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON, {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object; ds_config.json is a whole one")
    args.deepspeed, notices = complete_ds_config(config)
    for notice in notices:
        say(f"{path}: {notice}")
    if args.deepspeed["zero_optimization"].get("stage") not in (1, 2, 3):
        raise UserError(f"{path}: its zero_optimization has no stage 1, 2 or 3; ds_config.json is a whole one")
    fp16 = args.deepspeed["fp16"]
    for name in ("fp16", "bf16"):
        if args.deepspeed[name].get("enabled") is True and not getattr(args, name):
            say(f"{path}: it asks for {name}, as --{name} True does")
            setattr(args, name, True)
    if args.fp16 and args.bf16:
        raise UserError(f"{path}: fp16 and bf16 are both asked for; keep one of them")
    if args.fp16 and args.use_cpu and not deepspeed.get_accelerator().is_fp16_supported():  # DeepSpeed would refuse
        say("fp16 under DeepSpeed needs a GPU, or a CPU that computes in fp16; computing in float32 here")
        args.fp16, fp16["enabled"] = False, "auto"


def configure_more(args):
    """What can be set only after the Trainer's arguments have made the process group and accelerate's settings."""
    import torch

    if args.fsdp and (args.bf16 or args.fp16) and args.fsdp_plugin_args["fsdp_version"] == 2:
        half = torch.bfloat16 if args.bf16 else torch.float16
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy  # accelerate's own would round the loss as well
    if args.deepspeed and args.use_cpu:
        import deepspeed  # it must adopt torch's gloo group before from_pretrained partitions the model

        with contextlib.redirect_stdout(io.StringIO()):  # every process would say that it built an operator
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def fix_layer_class(args, model):
    """Correct the case of FSDP's layer class, or refuse it; without one the model's own choice is used."""
    import torch

    wanted = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap") or []
    classes = sorted({type(module).__name__ for module in model.modules()})
    for i, name in enumerate(wanted):
        match = next((c for c in classes if c.lower() == name.lower()), None)
        if match is None:
            lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
            layers = ", ".join(sorted({type(layer).__name__ for layers in lists for layer in layers}))
            raise UserError(f"FSDP layer class {name} is not in this model; it has {layers}; or leave the option out")
        if match != name:
            say(f"FSDP layer class {name} is {match} in this model")
            wanted[i] = match
    if wanted and "transformer_cls_names_to_wrap" in args.fsdp_plugin_args:
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(wanted)


def check_positions(model, longest):
    """Refuse rows that are longer than a model's table of learned positions (GPT-2, OPT); `longest` is in tokens."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            rows = module.num_embeddings - getattr(module, "offset", 0)
            if longest > rows:
                raise UserError(
                    f"rows of up to {longest} tokens, but this model has {rows} positions; give --model_max_length {rows}"
                )


def complete_ds_config(config):
    """Fill in what a DeepSpeed JSON of 2023 leaves out. Returns (config, notices); `config` itself is not changed."""
    config, notices = copy.deepcopy(config), []
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",  # without it any accumulation fails an assertion
        "gradient_clipping": "auto",  # without it accelerate clips at 1.0 whatever --max_grad_norm says
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},  # without it --bf16 trains in float32
    }
    added = [key for key in auto if key not in config]
    config.update({key: auto[key] for key in added})
    if added:
        notices.append(f'added {", ".join(added)} as "auto"')
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        notices.append("set stage3_gather_16bit_weights_on_model_save, without which no model would be saved")
    blocks = [key for key in ("optimizer", "scheduler") if key in config]
    notices += [f"its {key} block takes the place of the options" for key in blocks]
    return config, notices


def memory_needs(num_params, weight_bytes, half, adam, world_size, local_world_size):
    """Lower bounds in bytes: {engine: (on each device, on each host)} for weights, gradients and AdamW's two moments.

    `weight_bytes` is the size of a master weight, `half` whether ZeRO computes in 16 bits. Sources: the ZeRO paper,
    section 3.1 (16 bytes a parameter for mixed precision Adam), and one full copy per node while FSDP loads.
    """
    share, states = local_world_size / world_size, 2 * weight_bytes + 8 * adam
    work = 2 if half else 4  # ZeRO's working weights
    needs = {
        "single process": (states, 0),
        "DDP": (states, 0),
        "FSDP": (states / world_size, weight_bytes),
        "FSDP with offload": (0, max(states * share, weight_bytes)),
        "ZeRO-2": (work + (work + 4 + 8 * adam) / world_size, 0),
        "ZeRO-2 with offload": (work, (4 + 8 * adam) * share),
        "ZeRO-3": ((2 * work + 4 + 8 * adam) / world_size, 0),
        "ZeRO-3 with offload": (0, (2 * work + 4 + 8 * adam) * share),
    }
    return {name: (num_params * device, num_params * host) for name, (device, host) in needs.items()}


def free_host_memory():
    """Bytes of host memory that can be had: what the machine has available, within the container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.isfile(path) and (limit := Path(path).read_text().strip()).isdigit():
            free = min(free, int(limit))
    return free


def memory_problem(engine, needs, local_world_size, host_free, device_free=None):
    """Why `engine` cannot fit, with the options of those that do; "" where it may. All sizes in bytes.

    `needs` is of `memory_needs`; `device_free` None says that the devices are the host's own processors.
    """

    def lack(name):
        device, host = needs[name]
        if device_free is None:
            device, host = 0, host + device * local_world_size
        if device > (device_free or 0):
            return f"{device / GIB:.1f} GiB on each GPU, where {device_free / GIB:.1f} GiB are free"
        if host > host_free:
            return f"{host / GIB:.1f} GiB of host memory, where {host_free / GIB:.1f} GiB are free"
        return ""

    if engine not in needs or not lack(engine):
        return ""
    fits = [option for name, option in ENGINE_OPTIONS.items() if not lack(name)]
    advice = f"what fits here: {' or '.join(fits)}" if fits else "no engine fits here: more devices, or a smaller model"
    return f"{engine} needs {lack(engine)}, for weights, gradients and optimizer; {advice}"


def engine_name(args):
    """The engine that the arguments ask for: single process, DDP, FSDP, ZeRO-2 or ZeRO-3, and " with offload"."""
    if args.deepspeed:
        zero = args.deepspeed["zero_optimization"]
        devices = [(zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")]
        offload = devices != ["none", "none"]
        return f"ZeRO-{zero.get('stage', 0)}" + " with offload" * offload
    if args.fsdp:
        return "FSDP" + " with offload" * bool(args.fsdp_config["cpu_offload"])
    return "DDP" if args.world_size > 1 else "single process"


def global_batch(args):
    """Examples per optimizer step, over all processes and accumulated micro-batches."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def num_steps(num_examples, args):
    """Optimizer steps of the run."""
    per_epoch = -(-num_examples // global_batch(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def check_needs(args, dtype, num_params, steps):
    """Refuse, before anything is loaded, a run that cannot fit in memory or on the disk. `dtype` is of the masters.

    Only weights, gradients, optimizer and files are counted, so nothing that could run is refused.
    """
    import torch

    if not args.memory_check:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    half, adam = args.fp16 or args.bf16, args.optim.value in ("adamw_torch", "adamw_torch_fused")
    weight_bytes = getattr(torch, dtype).itemsize
    needs = memory_needs(num_params, weight_bytes, half, adam, args.world_size, local)
    device_free = None if args.use_cpu else torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf
    problem = memory_problem(engine_name(args), needs, local, free_host_memory(), device_free)
    if problem:
        size = f"{num_params / 1e9:.2f} billion parameters"
        raise UserError(f"{size}: {problem}; to try all the same: --memory_check False")
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    planned = {"no": 0, "epoch": math.ceil(args.num_train_epochs)}.get(args.save_strategy.value)
    if planned is None:
        planned = math.ceil(steps / max(every, 1))  # the last step is saved too
    kept = min(planned, args.save_total_limit + 1) if args.save_total_limit else planned  # the new before the old goes
    disk = num_params * ((2 if half else 4) + kept * (4 if args.save_only_model else 12))
    free = shutil.disk_usage(args.output_dir).free
    if args.overwrite_output_dir:  # what there is goes before the first step
        free += sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    if disk > free:
        raise UserError(
            f"{args.output_dir}: the model and {kept} checkpoints need {disk / GIB:.1f} GiB, {free / GIB:.1f} GiB "
            "are free; use --save_total_limit 1, --save_only_model True or --save_strategy no; "
            "to try all the same: --memory_check False"
        )


def enable_fsdp2_on_cpu(trainer):
    """Open accelerate's gate that lets FSDP run on a CPU; used only there.

    AcceleratorState turns FSDP on for a list of device types that leaves out several CPU processes, and silently runs
    DDP; everything behind the gate is device neutral. So two private dicts of shared state get what the gate would
    have written. tests/test_engines.py says when it is no longer needed.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.accelerator.state.mixed_precision != "no":
        plugin.set_mixed_precision(trainer.accelerator.state.mixed_precision)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning needs an accelerator
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    trainer.is_fsdp_enabled = True


def replay_cpu_adam(trainer):
    """Take DeepSpeed's CPU Adam, where a run resumes with it, through the steps of the checkpoint on a stand-in.

    Its bias correction is a product that takes another factor at every step and is in no checkpoint. A resumed one
    would begin with a power in its place, which differs in the last bits, from step 18 on always.
    """
    import torch

    optimizer = getattr(trainer.model_wrapped, "basic_optimizer", None)
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    steps = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    groups, stand_in = optimizer.param_groups, torch.nn.Parameter(torch.zeros(1))
    stand_in.grad = torch.zeros(1)
    optimizer.param_groups = [groups[0] | {"params": [stand_in]}]
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups = groups
    optimizer.state.pop(stand_in, None)


def local_numel(parameter):
    """Elements of a parameter that this process holds: a shard under FSDP2 (DTensor) and ZeRO-3 (ds_tensor)."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def gathered(parameters):
    """A context in which partitioned (ZeRO-3) parameters are whole and rank 0's changes reach all ranks."""
    import torch

    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return torch.no_grad()


def master_dtype(trainer, parameter):
    """The dtype in which the optimizer updates a parameter, under ZeRO that of a copy; all processes call it."""
    if hasattr(trainer.model_wrapped, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).dtype
    return parameter.dtype


def measured_dtypes(trainer, compute):
    """The dtypes of weights and masters as found, and of `compute`, in words; all processes call it."""
    parameters = list(trainer.model_wrapped.parameters())
    groups = {p.dtype for p in parameters}, {master_dtype(trainer, p) for p in parameters[-1:]}, {compute}
    names = ["/".join(sorted(str(dtype)[6:] for dtype in group)) for group in groups]
    return "weights {}, masters {}, compute {}".format(*names)


def start_line(trainer, max_steps):
    """What runs where, as found on the wrapped model, and the batches of the run."""
    args, parameters = trainer.args, list(trainer.model_wrapped.parameters())
    here, total = sum(map(local_numel, parameters)), sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return (
        f"engine: {engine_name(args)}, {args.world_size} process{'es' * (args.world_size > 1)} on {args.device.type}, "
        f"{here:,} of {total:,} parameters here, {trainer.dtypes}, "
        f"micro-batch {args.per_device_train_batch_size} {'padded' if trainer.data_collator.padded else 'flat'} "
        f"x accumulation {args.gradient_accumulation_steps} x processes {args.world_size} "
        f"= global batch {global_batch(args)}, {max_steps:,} steps"
    )


def check_engine(trainer):
    """Compare the engine that wraps the model with the one asked for. Raises UserError where they differ."""
    import torch

    wanted, model = engine_name(trainer.args), trainer.model_wrapped
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(model, "zero_optimization_stage"):
        found = f"ZeRO-{model.zero_optimization_stage()}"
    elif isinstance(model, torch.distributed.fsdp.FSDPModule):
        found = "FSDP"
    elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
        found = "DDP"
    else:
        found = "single process"
    if found != wanted.removesuffix(" with offload"):
        raise UserError(f"{wanted} was asked for and {found} would run; check the versions against requirements.txt")


def use_learning_rate(trainer):
    """Let schedule and optimizer, which come from a checkpoint, go on from the learning rate of the arguments."""
    import torch

    args, schedule = trainer.args, trainer.lr_scheduler
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        rates = [args.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        base = {"base_lrs": [args.learning_rate] * len(rates), "_last_lr": rates}
        schedule.load_state_dict(schedule.state_dict() | base)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def probe(trainer):
    """Flatten two examples and change the first: the second one's logits must not move by a bit.

    Runs on the wrapped model of any engine, with the arguments of a training step. Returns (why the model cannot take
    flat rows, or "", dtype that the output layer computed in).
    """
    import torch

    model, vocab_size = trainer.model_wrapped, trainer.model.config.get_text_config().vocab_size
    device, seen = trainer.args.device, []
    head = trainer.accelerator.unwrap_model(model).get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    one = (torch.arange(3, 27, device=device) % vocab_size)[None]  # two examples, of 8 and of 16 tokens
    other = one.clone()
    other[:, :8] = (other[:, :8] + 5) % vocab_size
    flat = {
        "position_ids": torch.cat([torch.arange(8), torch.arange(16)])[None].to(device),
        "logits_to_keep": torch.arange(8, 24, device=device),
        "use_cache": False,
    }
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = [model(input_ids=ids, **flat).logits for ids in (one, other)]
        if logits[0].shape[1] != 16:
            return "it does not compute selected logits", seen[-1]
        if not torch.allclose(*logits, rtol=0, atol=0, equal_nan=True):
            return "in a flat row its examples see each other", seen[-1]
        return "", seen[-1]
    except TypeError as error:
        with torch.no_grad():
            model(input_ids=one, use_cache=False)
        return f"its forward takes no flat rows ({first_line(error)})", seen[-1]
    finally:
        hook.remove()
        model.train(training)
        for module in model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.reshard()  # the last unit stays whole for a backward pass that a probe does not have


# ---------------------------------------------------------------------------------------------------------------------
# Generated rows and the journal that they come from
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
        self.torn = len(data) - self.size
        self.file = None

    def append(self, entry):
        """Append a line and wait for the disk; what was half written on failure is taken back."""
        if self.file is None:
            self.file = open(self.path, "ab", buffering=0)
            self.file.truncate(self.size)  # cuts a torn line off
        try:
            line = json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form, but an escape
            line = json.dumps(entry).encode()
        try:
            rest = line + b"\n"
            while rest:
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then the same command goes on"
            )
        self.size += len(line) + 1
        if "request" in entry:
            self.answers[entry["request"]] = entry

    def close(self):
        if self.file:
            self.file.close()


def read_rows(path):
    """The rows of a regen.json, ours or the original's."""
    text = read_text(path)
    try:
        rows = json.loads(text)
        problem = "" if isinstance(rows, list) else "not a list of rows"
        for i, row in enumerate(rows if not problem else []):
            what = check_record(row)
            problem = problem or (what and f"row {i}: {what}")
    except (ValueError, RecursionError):
        problem = "not valid JSON; its writer may have been killed"
    if problem:
        raise UserError(f"{path}: {problem}; mend it, move it away, or choose another --output_dir")
    return [{**row, "input": row.get("input") or ""} for row in rows]


def write_text(path, text):
    """Write a file so that it is the old one or the new one, whole, whatever happens."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room, then give the same command again"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Servers that speak OpenAI's protocol
# ---------------------------------------------------------------------------------------------------------------------

OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4o-mini"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30  # before a request is tried again: doubled from time to time


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How an answer is sampled, by the names of the text completions of 2023; None leaves a choice to the server."""

    max_tokens: int | None = 1800
    temperature: float | None = 0.2
    top_p: float | None = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


class Completion(dict):
    """One answer: text, finish_reason, model, usage and total_tokens, as keys and as attributes."""

    __getattr__ = dict.__getitem__


class RequestFailed(Exception):
    """One request has no answer, others may have; `usage` is what its attempts cost in tokens."""

    def __init__(self, message, usage):
        super().__init__(message)
        self.usage = usage


def public_url(url):
    """A URL without what may be secret in it: user, password and query."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def estimate_tokens(text):
    """About how many tokens a text has: one for four ASCII characters, one for any other character."""
    ascii_only = sum(character < "\x80" for character in text)
    return ascii_only // 4 + len(text) - ascii_only


def retry_after(headers):
    """Seconds that a server asks to wait; None where it does not. A date is measured from the server's own."""
    from email.utils import parsedate_to_datetime

    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / unit)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        until = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, (until - parsedate_to_datetime(headers["date"])).total_seconds())
    return None


class ChatClient:
    """Asks one model of one server, with bounded retries, and learns which parameters the model refuses.

    `endpoint` is "chat" or "text"; `timeout` is the longest that an attempt, or a wait asked for by the server, may
    take, in seconds; `parameters` go with every request. Use it inside one event loop, and close it there. `ending`,
    once set, lets requests on the wire arrive and starts no other attempt.
    """

    def __init__(self, base_url, model, endpoint, timeout, max_retries, parameters):
        import openai

        key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key and base_url == OPENAI_URL:
            raise UserError("no key: set the environment variable OPENAI_API_KEY, or give --base_url of another server")
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has; set it again")
        self.openai, self.key, self.model, self.endpoint = openai, key, model, endpoint
        self.client = openai.AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self.timeout, self.max_retries, self.parameters = timeout, max_retries, dict(parameters)
        self.refused = set()
        self.name, self.num_answers, self.ending = f"{model} at {public_url(base_url)}", 0, asyncio.Event()

    async def close(self):
        await self.client.close()

    async def ask(self, prompt):
        """Ask for an answer to `prompt`, a text or a list of chat messages.

        Returns {choices: [(text, finish reason)], model, usage, attempts}; the usage is that of all attempts. Raises
        RequestFailed where this request stays without an answer, UserError where all would, and CancelledError where
        `ending` is set before it has one.
        """
        usage, attempts, problem = {"prompt_tokens": 0, "completion_tokens": 0}, 0, ""
        while not self.ending.is_set():
            sent, pause = dict(self.parameters), None
            try:
                async with asyncio.timeout(self.timeout):  # the client's own limit is for each read: a drip never ends
                    response = await self._send(prompt, sent)
                choices, problem = self._read(response, prompt, usage)
                if choices:
                    self.num_answers += 1
                    model = _within(response, "model")
                    model = model if isinstance(model, str) else self.model
                    return {"choices": choices, "model": model, "usage": usage, "attempts": attempts + 1}
            except self.openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._adapt(error, sent):
                    continue
                problem, pause = self._public(error), retry_after(error.response.headers)
                self._raise_if_final(error, problem, pause)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    raise RequestFailed(problem, usage) from None
            except (TimeoutError, self.openai.APITimeoutError):
                problem = f"no answer within {self.timeout:g} s"
            except self.openai.APIConnectionError as error:
                problem = f"no connection ({self._public(error.__cause__ or error)})"
            except (self.openai.APIError, ValueError) as error:  # ValueError: a body that is not JSON
                problem = f"bad answer ({self._public(error)})"
            attempts += 1
            if attempts > self.max_retries:
                raise RequestFailed(problem, usage)
            if pause is None:
                pause = min(FIRST_PAUSE_S * 2 ** (attempts - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), pause)
        raise asyncio.CancelledError

    def _public(self, error):
        """The first line of an error, short and without the key."""
        text = first_line(error)[:300]
        return text.replace(self.key, "[key]") if self.key else text

    def _raise_if_final(self, error, problem, pause):
        """Raise UserError for what no request of this run can get past."""
        said = f"{error.code} {error.type} {error.message}".lower()
        advice = {
            401: "check OPENAI_API_KEY" if self.key else "set the environment variable OPENAI_API_KEY",
            402: "there is no credit left; put it in order",
            403: "this key may not do that; choose another --model_name, or check the key",
            404: "check --model_name and --base_url, which mostly ends in /v1",
        }.get(error.status_code)
        if error.status_code == 429 and ("insufficient_quota" in said or "billing" in said):
            advice = "there is no credit left; put it in order"
        if pause is not None and pause > self.timeout:
            advice = f"it asks to wait {pause:.0f} s; wait, or give a longer --timeout"
        if advice:
            raise UserError(f"{self.name}: {problem}: {advice}; then the same command goes on") from None

    def _send(self, prompt, parameters):
        if self.endpoint == "text":
            return self.client.completions.create(model=self.model, prompt=prompt, **parameters)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.client.chat.completions.create(model=self.model, messages=messages, **parameters)

    def _read(self, response, prompt, usage):
        """([(text, finish reason)], "") or (None, what is wrong); adds the tokens to `usage`. Servers send anything."""
        if isinstance(response, str):
            return None, f"bad answer (not JSON: {self._public(response)[:60]!r})"
        counted = {name: _within(response, "usage", name) for name in ("prompt_tokens", "completion_tokens")}
        choices, texts = _within(response, "choices"), []
        for choice in choices if isinstance(choices, list) else []:
            text = _within(choice, "text") if self.endpoint == "text" else _within(choice, "message", "content")
            texts.append((text, _within(choice, "finish_reason")))
        if not all(isinstance(count, int) for count in counted.values()):
            words = prompt if isinstance(prompt, str) else "".join(str(message.get("content")) for message in prompt)
            answers = "".join(text for text, _ in texts if isinstance(text, str))
            counted = {"prompt_tokens": estimate_tokens(words), "completion_tokens": estimate_tokens(answers)}
            usage["estimated"] = True
        for name, count in counted.items():
            usage[name] += count
        if not texts:
            return None, "bad answer (no choices)"
        if not all(isinstance(text, str) for text, _ in texts):
            return None, f"bad answer (no text, finish_reason {texts[0][1]})"
        return texts, ""

    def _adapt(self, error, sent):
        """Rename or drop the parameter that the server refuses; whether there is something new to try."""
        said = error.message.replace("`", "'")
        if re.search(r"context.{0,20}(length|window|size)", f"{error.code} {said}"):
            return False  # the prompt is too long; it speaks of max_tokens too
        name = error.param if error.param in sent else None
        if name is None and re.search("support|unknown|unexpected|unrecognized|extra|permitted|allowed|invalid", said):
            named = [key for key in sent if re.search(rf"\b{key}\b", said)]
            name = named[0] if named else None
        if name is None:
            return False
        if name in self.parameters:  # else another request has met the same
            value, other = self.parameters.pop(name), {"max_tokens": "max_completion_tokens"}.get(name)
            if other:
                self.parameters[other] = value
            how = f"sending it as {other}" if other else "sent without it"
            say(f"{self.name}: refuses {name} {value}; from here on {how}")
        return True


def _within(value, *names):
    """An attribute of an attribute; None where there is none: what a server sends is not checked by the client."""
    for name in names:
        value = getattr(value, name, None)
    return value


def living_model(name, base_url):
    """`name`, or the default model for the one of 2023 that OpenAI has withdrawn."""
    if name == "text-davinci-003" and base_url == OPENAI_URL:
        say(f"text-davinci-003 was withdrawn in 2024; using {DEFAULT_MODEL}")
        return DEFAULT_MODEL
    return name or DEFAULT_MODEL


def openai_completion(
    prompts,
    decoding_args,
    model_name=None,
    sleep_time=2,
    batch_size=1,
    max_instances=sys.maxsize,
    max_batches=sys.maxsize,
    return_text=False,
    **decoding_kwargs,
):
    """Complete one prompt or several through the server of OPENAI_BASE_URL, `batch_size` at a time.

    A prompt is a text, or a chat message {role, content}. `decoding_kwargs` are sent beside what `decoding_args` says.
    Returns a `Completion` for a single prompt, else a list, of texts with `return_text`; with decoding_args.n above 1
    a list of n for each prompt. `sleep_time` has no meaning any more: waiting is bounded and grows. Models that OpenAI
    serves as text completions are asked so, all others through chat completions. Raises UserError where a prompt
    stays without an answer.
    """
    single = isinstance(prompts, (str, dict))
    prompts = [prompts] if single else list(prompts)
    prompts = prompts[: min(max_instances, max_batches * batch_size)]
    base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    model = living_model(model_name, base_url)
    endpoint = "text" if model.startswith(("davinci-", "babbage-", "gpt-3.5-turbo-instruct")) else "chat"
    parameters = {**dataclasses.asdict(decoding_args), **decoding_kwargs}
    defaults = {"n": 1, "stream": False, "presence_penalty": 0.0, "frequency_penalty": 0.0, "echo": False}
    for name in ["stream"] + ["suffix", "logprobs", "echo"] * (endpoint == "chat"):
        if parameters.pop(name, None):
            say(f"{name} has no meaning here; ignored")
    parameters = {k: v for k, v in parameters.items() if v is not None and (k not in defaults or v != defaults[k])}

    async def ask_all():
        client = ChatClient(base_url, model, endpoint, 600, 5, parameters)
        gate = asyncio.Semaphore(batch_size)

        async def ask(prompt):
            async with gate:
                return await client.ask([prompt] if isinstance(prompt, dict) else prompt)

        try:
            return await asyncio.gather(*map(ask, prompts))
        except RequestFailed as failure:
            raise UserError(f"{client.name}: {failure}") from None
        finally:
            await client.close()

    results = []
    for answer in asyncio.run(ask_all()):
        total = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
        facts = {"model": answer["model"], "usage": answer["usage"], "total_tokens": total}
        found = [Completion(text=text, finish_reason=reason, **facts) for text, reason in answer["choices"]]
        found = [completion.text for completion in found] if return_text else found
        results.append(found if decoding_args.n > 1 else found[0])
    return results[0] if single else results
