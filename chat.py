"""Talk to a model in the very prompt that it was trained with: a conversation, one question, or a file of them.

    python chat.py --model_name_or_path OUT                                              # a conversation
    python chat.py --model_name_or_path OUT --instruction "Sort these." --input "b, a"   # one answer
    python chat.py --model_name_or_path OUT < questions.jsonl > answers.jsonl            # many, in batches

Reads a model folder or LoRA adapters, whose run.json names the prompt style, and questions: lines of text, or JSON
records {instruction, input (optional)}. Answers go to stdout, those of many questions as JSON Lines; all else to stderr.
"""

import argparse
import codecs
import contextlib
import json
import logging
import os
import re
import select
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import utils
from utils import PROMPT_STYLES, UserError, say

# --- Arguments -------------------------------------------------------------------------------------------------------


def parse_arguments(words):
    """Parse argv without the script's name. Raises UserError for what cannot be meant, all of it at once."""
    parser = argparse.ArgumentParser(
        "chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", "--lora_weights", required=True, help="Model or adapter folder, or a name on the hub.")
    add("--base", "--base_model", help="The model that adapters belong to; by default the one that they name.")
    add("--instruction", help="Answer this once and end.")
    add("--input", default="", help="What the instruction is about.")
    add("--data_path", help="A file of questions: lines of text, JSON Lines or a JSON list; - is standard input.")
    add("--prompt_style", help=f"{', '.join(PROMPT_STYLES)}; by default what the model's run.json says, else alpaca.")
    add("--system", help="What the system says before the conversation; Alpaca's prompt has no place for it.")
    add("--stop", action="append", default=[], help="A text that ends an answer; given again, it adds.")
    add("--output", help="Write the answers to a file of questions there; the same command goes on where it stopped.")
    add("--max_new_tokens", type=int, default=512, help="Longest answer (default: 512).")
    add("--do_sample", **utils.TRUTH, help="Sample; implied by the next three. Default: greedy.")
    add("--temperature", type=float, help="1.0 where sampling and not given; 0 is greedy.")
    add("--top_p", type=float, help="Sample from the likeliest tokens with this sum of probabilities.")
    add("--top_k", type=int, help="Sample from so many likeliest tokens.")
    add("--repetition_penalty", type=float, default=1.0, help="Above 1.0 repeats become less likely (default: 1.0).")
    add("--seed", type=int, default=0, help="Of sampling (default: 0).")
    add("--batch_size", type=int, default=8, help="Questions of a file answered at a time (default: 8).")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="By default as the files, on a CPU float32.")
    add("--cache_dir", help="Where the hub's files are cached.")
    args = utils.parse_options(parser, words)
    drawn = [name for name in ("temperature", "top_p", "top_k") if getattr(args, name)]
    known = ", ".join(PROMPT_STYLES)
    wrong = {
        f"--prompt_style {args.prompt_style} is none of {known}": args.prompt_style not in (None, *PROMPT_STYLES),
        "--instruction and --data_path exclude each other": args.instruction is not None and args.data_path,
        "--instruction is empty": args.instruction is not None and not args.instruction.strip(),
        "--input needs an --instruction": args.input and args.instruction is None,
        "--max_new_tokens must be at least 1": args.max_new_tokens < 1,
        "--batch_size must be at least 1": args.batch_size < 1,
        "--temperature must be at least 0": args.temperature is not None and not 0 <= args.temperature < 100,
        "--top_p must be above 0 and at most 1": args.top_p is not None and not 0 < args.top_p <= 1,
        "--top_k must be at least 0": args.top_k is not None and args.top_k < 0,
        "--repetition_penalty must be above 0": not 0 < args.repetition_penalty < 100,
        f"--do_sample False and --{', --'.join(drawn)} contradict each other": args.do_sample is False and drawn,
        "--do_sample and --temperature 0 contradict each other": args.do_sample and args.temperature == 0,
    }
    utils.refuse_all(wrong)
    args.do_sample = bool(args.do_sample or drawn) and args.temperature != 0
    return args


# --- Questions -------------------------------------------------------------------------------------------------------

# A message that brings Alpaca's template itself, whole or from "### Instruction:" on, as tutorials show it.
PASTED = re.compile(
    r"\s*(?:Below is an instruction that describes a task[^\n]*\n\s*)?### ?Instruction:[ \t]*\n?(?P<instruction>.*?)"
    r"(?:\n\s*### ?Input:[ \t]*\n?(?P<input>.*?))?(?:\n\s*### ?Response:\s*)?",
    re.DOTALL,
)


def unwrap(record):
    """The record, or where its instruction is a whole Alpaca prompt, the {instruction, input} inside that.

    So the template is never put around itself: "### Instruction:\\nAdd.\\n\\n### Input:\\n1, 2\\n\\n### Response:" is
    the instruction "Add." with the input "1, 2".
    """
    text = record["instruction"].replace("\r\n", "\n")
    match = PASTED.fullmatch(text)
    if record.get("input") or not match or not match["instruction"].strip():
        return record
    return {**record, "instruction": match["instruction"].strip("\n"), "input": (match["input"] or "").strip("\n")}


def parse_questions(text, name):
    """Parse lines of text, JSON Lines or a JSON list; it is JSON where a line begins like an object with a key.

    Returns (records, problems) as `utils.read_records` does; a line of text is an instruction without input, and
    blank lines are no questions. Raises UserError for a JSON list that is no JSON.
    """
    if re.search(r'^\s*\[?\s*\{\s*"|\A"?instruction"?[,;\t]', text, re.MULTILINE):
        return as_questions(*utils.read_records([(name, text)], needs_answer=False), name)
    name = os.path.basename(name)
    lines = [(i, line.strip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = [{"instruction": line, "input": "", "output": "", "source": f"{name}:{i}"} for i, line in lines]
    return as_questions(records, [], name)


def as_questions(records, problems, name):
    """(records, problems) of `utils.read_records`, of which those without a question are problems; see `unwrap`."""
    if unused := utils.unused_keys(records):
        say(f"{name}: no part of the prompt: {', '.join(unused)}")
    empty = [record["source"] for record in records if not record["instruction"].strip()]
    problems += [f"{source}: the instruction is empty" for source in empty]
    records = [record for record in records if record["source"] not in empty]
    return [record if is_conversation(record) else unwrap(record) for record in records], problems


def is_conversation(record):
    """Whether a record has more than one question, or a system's message."""
    return "messages" in record and utils.kind_of(record["messages"]) == "conversation"


def read_questions(path):
    """Read a file of questions, "-" being standard input; see `parse_questions`. Raises UserError where it is empty."""
    where = "stdin" if path == "-" else path
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; give questions by --instruction or --data_path FILE")
        text = utils.decode(sys.stdin.buffer.read(), where)
    elif Path(path).suffix in (".csv", ".tsv", ".parquet", ".gz"):
        return as_questions(*utils.read_records([path], needs_answer=False), path)
    else:
        text = utils.read_text(path)
    if not text.strip("[] \t\r\n"):
        raise UserError(
            f"{os.path.basename(where)}: no questions; give lines of text, or JSON records with an instruction"
        )
    return parse_questions(text, where)


# --- Tokens to text --------------------------------------------------------------------------------------------------


def make_to_bytes(tokenizer):
    """A function from a token id to the UTF-8 bytes that it stands for; none for special tokens.

    Bytes, because LLaMA spells rare characters in byte tokens, and tokenizer.decode() turns a whole run of those into
    U+FFFD as long as its last character is not complete.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    is_byte_level = tokenizer.is_fast and b"ByteLevel" in tokenizer.backend_tokenizer.decoder.__getstate__()  # GPT-2's
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder

    def to_bytes(token_id):
        token = None if token_id in special else tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # special, or one of the spare rows that some models have
            return b""
        if token_id in added:
            return token.encode()
        if is_byte_level:
            return bytes(byte_of[character] for character in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    return to_bytes


@dataclass
class Answer:
    """One answer as it grows token by token; `finish_reason` is empty until it has ended.

    `show` is called with each new piece of text: whole characters, and nothing that may yet turn out to be the
    beginning of a stop string. The pieces joined are `text`. `limit` is a number of tokens and `limit_reason` what to
    call it; `lead` is what the prompt style puts before an answer, dropped once.
    """

    to_bytes: object
    end_ids: frozenset
    stops: tuple = ()
    limit: int = 512
    limit_reason: str = "length"
    lead: str = ""
    show: object = None
    text: str = ""
    num_tokens: int = 0
    num_shown: int = 0
    finish_reason: str = ""
    decoder: object = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token_id):
        """Take the next token; one that comes after the end is ignored."""
        if self.finish_reason:
            return
        self.num_tokens += 1
        if token_id in self.end_ids:
            return self.finish("end_token")
        self.text += self.decoder.decode(self.to_bytes(token_id))
        if self.text and self.lead:
            self.text, self.lead = self.text.removeprefix(self.lead), ""
        found = [place for place in (self.text.find(stop, self.num_shown) for stop in self.stops) if place >= 0]
        if found:
            self.text = self.text[: min(found)].rstrip()
            return self.finish("stop_string")
        if self.num_tokens >= self.limit:
            return self.finish(self.limit_reason)
        self._show(len(self.text) - self._held())

    def _held(self):
        """How many characters at the end may belong to a stop string, with the white space before it."""
        parts = (stop[:k] for stop in self.stops for k in range(1, len(stop)))
        held = max((len(part) for part in parts if self.text.endswith(part)), default=0)
        return len(self.text) - len(self.text[: len(self.text) - held].rstrip())

    def _show(self, end):
        if end > self.num_shown:
            piece, self.num_shown = self.text[self.num_shown : end], end
            if self.show:
                self.show(piece)

    def finish(self, reason):
        """End the answer; the bytes of an unfinished character are dropped."""
        self.finish_reason = reason
        self._show(len(self.text))


# --- The model -------------------------------------------------------------------------------------------------------


def prompt_style(asked, name_or_path):
    """Choose the prompt style. Returns (style, where it is from). Raises UserError for one that is not known."""
    if asked:
        return asked, "as asked"
    folder = Path(name_or_path)
    for path in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        run = utils.record_of(path)
        if "prompt_style" in run:
            style = run["prompt_style"]
            if style not in PROMPT_STYLES:
                known = ", ".join(PROMPT_STYLES)
                raise UserError(f"{path / 'run.json'}: prompt_style {style!r} is none of {known}; give --prompt_style")
            return style, f"from {path / 'run.json'}"
    return "alpaca", "no run.json names one; --prompt_style chooses another"


def base_of(folder, asked=None):
    """The base model of the adapters in `folder`: the one asked for, or the one that they name.

    A path that they name may be as it was typed, or relative to the folder or those above it. Raises UserError where
    none is there.
    """
    named = utils.config_of(folder, "adapter_config.json").get("base_model_name_or_path") or ""
    if asked:
        return asked
    places = [Path(named), *(place / named for place in (folder, folder.parent, folder.parent.parent))]
    places += [place / Path(named).name for place in (folder.parent, folder.parent.parent)]  # moved with it
    found = next((place for place in places if named and place.is_dir()), None)
    if found is None and (not named or os.path.isabs(named) or named.startswith(".")):
        raise UserError(f"{folder}: its base {named or 'is not named and'} is not there; give it with --base")
    return str(found or named)


def merge_adapters(model, folder, base):
    """Merge the adapters of `folder` into their base; raises UserError where they do not fit it."""
    import peft

    try:
        with utils.say_if_slow(f"{folder}: merging its adapters"):
            return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        what = f"its adapters do not fit {base} ({utils.first_line(error)})"
        raise UserError(f"{folder}: {what}; give the right one with --base, or try apply_delta.py") from None


def choose_dtype(asked, stored, num_params, free_memory=None):
    """The dtype to compute in, with the reason. `free_memory` is the host's in bytes, None with a GPU."""
    if asked:
        return asked, "as asked"
    if free_memory is None:
        return stored or "auto", "as its files have it"
    if stored in ("bfloat16", "float16") and 4 * num_params > free_memory:
        return stored, f"as its files have it; float32 needs {utils.size_of(4 * num_params)}"
    return "float32", "the CPU's own"


@dataclass
class Chat:
    """A model ready to answer: everything that stays the same from one answer to the next."""

    model: object
    tokenizer: object
    style: str
    window: int
    options: dict  # of transformers' GenerationConfig
    end_ids: frozenset
    to_bytes: object
    system: str = ""
    stops: tuple = ()


def load_chat(args):
    """Load tokenizer and model, and say what was chosen and why. Raises UserError for a folder that is no model."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports where it is installed
    warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    name = args.model_name_or_path
    style, reason = prompt_style(args.prompt_style, name)
    adapted = Path(name, "adapter_config.json").is_file() and utils.check_model(name, allowed=("a LoRA adapter",))
    base = base_of(Path(name), args.base) if adapted else name
    if args.base and not adapted:
        say(f"--base: {name} is a whole model and needs none; ignored")
    try:
        config = utils.load_config(base, args.cache_dir)
    except UserError as error:
        raise UserError(f"{name}: its base {error}; --base gives another" if adapted else str(error)) from None
    has_tokenizer = not adapted or any(Path(name).glob("tokenizer*"))
    tokenizer = utils.load_tokenizer(name if has_tokenizer else base, cache_dir=args.cache_dir)
    utils.check_ids([("eos_token", [tokenizer.eos_token_id])], tokenizer, config)
    if style == "alpaca" and not args.prompt_style and tokenizer.chat_template and "run.json names" in reason:
        reason += "; the tokenizer has a chat template"
    say(f"prompt style: {style} ({reason})")
    on_gpu = torch.cuda.is_available()
    num_params = sum(parameter.numel() for parameter in utils.skeleton(config).parameters())
    stored = str(config.dtype).removeprefix("torch.") if config.dtype else None
    free_memory = None if on_gpu else utils.free_host_memory()
    dtype, reason = choose_dtype(args.dtype, stored, num_params, free_memory)
    # "sequential": the first GPU, the next where it is full, the host's memory where all are
    model = utils.load_weights(base, config, dtype, args.cache_dir, device_map="sequential" if on_gpu else None)
    if adapted:
        say(f"adapters: {name}, merged into their base, {base}")
        model = merge_adapters(model, name, base)
    devices = ", ".join(sorted({str(parameter.device) for parameter in model.parameters()}))
    say(f"model: {base}, {num_params:,} parameters, {str(model.dtype)[6:]} on {devices} ({reason})")
    ends = {tokenizer.eos_token_id}  # and those of the generation config, of which chat models have several
    more = model.generation_config.eos_token_id
    ends.update(more if isinstance(more, list) else [more] if more is not None else [])
    options = {"do_sample": args.do_sample, "repetition_penalty": args.repetition_penalty}
    if args.do_sample:
        chosen = {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0, "top_k": args.top_k or 0}
        options |= chosen
        say(f"sampling: {', '.join(f'{key} {value:g}' for key, value in chosen.items())}, seed {args.seed}")
        torch.manual_seed(args.seed)
    window = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    to_bytes, more = make_to_bytes(tokenizer), {"system": args.system, "stops": tuple(args.stop)}
    return Chat(model, tokenizer, style, window, options, frozenset(ends), to_bytes, **more)


def ids_of_prompt(chat, turns):
    """The ids of the prompt for the last of `turns`, as training has them before the answer.

    Raises UserError where they fill the window.
    """
    try:
        messages = [message for turn in turns[:-1] for message in utils.as_messages(turn)]
        is_whole = is_conversation(turns[-1])
        messages += turns[-1]["messages"] if is_whole else utils.as_messages(turns[-1], needs_answer=False)
        if chat.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": chat.system})
        if chat.style == "alpaca" and (chat.system or is_whole):
            raise ValueError(utils.NO_PLACE)
        prompt = "".join(text for text, _ in utils.spans(chat.style, messages, chat.tokenizer))
    except ValueError as error:
        raise UserError(str(error)) from None
    begin = utils.begin_ids(chat.tokenizer) if chat.style != "chat_template" else []  # a template has its own
    ids = begin + chat.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    utils.check_ids([("the prompt", ids)], chat.tokenizer, chat.model.config)
    if len(ids) >= chat.window:
        raise UserError(f"the prompt has {len(ids):,} tokens and the model's window is {chat.window:,}; shorten it")
    return ids


def make_answer(chat, prompt_ids, max_new_tokens, show=None):
    """The empty answer to a prompt, with the limits and stop rules that hold for it."""
    room = chat.window - len(prompt_ids)
    limit = (max_new_tokens, "length") if max_new_tokens <= room else (room, "window")
    lead = " " if chat.style in utils.TURN_STYLES else ""
    return Answer(chat.to_bytes, chat.end_ids, PROMPT_STYLES[chat.style] + chat.stops, *limit, lead, show)


def pad_left(rows):
    """Pad rows of ids on the left with 0. Returns (input_ids, attention_mask), LongTensors (batch, longest)."""
    import torch

    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def generate(chat, prompts, answers):
    """Let the model write each of `answers` behind its prompt, a list of ids; each ends as its own rules say.

    Raises UserError where the GPU's memory does not hold them.
    """
    import torch
    import transformers

    def watch(input_ids, scores, **kwargs):  # called after every token; input_ids is (batch, tokens so far)
        for answer, token_id in zip(answers, input_ids[:, -1].tolist(), strict=True):
            answer.add(token_id)
        return torch.tensor([bool(answer.finish_reason) for answer in answers], device=input_ids.device)

    ids, mask = pad_left(prompts)
    longest = max(answer.limit for answer in answers)
    # The model's own generation config is replaced whole: its sampling, penalties and lengths must not leak in.
    config = transformers.GenerationConfig(max_new_tokens=longest, pad_token_id=0, **chat.options)
    chat.model.generation_config = config
    try:
        chat.model.generate(
            input_ids=ids.to(chat.model.device),
            attention_mask=mask.to(chat.model.device),
            generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )
    except (RuntimeError, MemoryError) as error:
        if not utils.is_memory_full(error):
            raise
        raise UserError("the memory is full; use a smaller --batch_size or a shorter --max_new_tokens") from None


# --- A conversation, one question, many ------------------------------------------------------------------------------


def show(text):
    """Print a piece of an answer at once, as far as a terminal may see it; JSON Lines hold an answer as it is."""
    print(utils.printable(text), end="", flush=True)


def note_end(answer):
    """Say why an answer is not whole, where it is not."""
    notes = {
        "length": f"(cut after {answer.limit} tokens; --max_new_tokens allows more)",
        "window": f"(cut after {answer.limit} tokens: the model's window is full)",
        "interrupted": "(stopped)",
    }
    if answer.finish_reason in notes:
        say(notes[answer.finish_reason])


def fit(chat, turns, max_new_tokens):
    """Drop the oldest turns until the prompt leaves room for an answer. Returns (prompt ids, turns dropped).

    The room is `max_new_tokens`, at most half the window. Raises UserError where the last turn alone is too long.
    """
    room = min(max_new_tokens, chat.window // 2)
    for first in range(len(turns)):
        with contextlib.suppress(UserError):
            ids = ids_of_prompt(chat, turns[first:])
            if len(ids) + room <= chat.window:
                return ids, turns[:first]
    return ids_of_prompt(chat, turns[-1:]), turns[:-1]


def read_message():
    """Read what the user says; lines that arrive together, as a paste does, are one message."""
    lines = [input("> ")]
    while select.select([sys.stdin], [], [], 0.05)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


def converse(chat, args):
    """Read, answer, remember, until the end of input. Ctrl-C stops an answer, not the program."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() its line editing
    memory = "each message is answered by itself" if chat.style == "alpaca" else "earlier messages are remembered"
    say(f"{memory}; Ctrl-C stops an answer, Ctrl-D ends")
    turns = []
    while True:
        try:
            text = read_message()
            if not text.strip():
                continue
            turns = [] if chat.style == "alpaca" else turns
            asked = [*turns, unwrap({"instruction": text, "input": ""})]
            ids, dropped = fit(chat, asked, args.max_new_tokens)
            if dropped:
                say(f"(forgotten, as the window of {chat.window:,} tokens is full: {name_turns(dropped)})")
            turns = asked[len(dropped) :]
            answer = make_answer(chat, ids, args.max_new_tokens, show)
            try:
                generate(chat, [ids], [answer])
            except KeyboardInterrupt:
                answer.finish("interrupted")
            print(flush=True)
            note_end(answer)
            turns[-1]["output"] = answer.text
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            print()
            say("(Ctrl-D ends)")
        except EOFError:
            print()
            return
        turns = [turn for turn in turns if "output" in turn]  # what was not answered was not said


def name_turns(turns):
    """Turns as words: how many, and how the first and last of them begin."""
    begins = [" ".join(turn["instruction"].split())[:30] for turn in (turns[0], turns[-1])]
    return f'"{begins[0]}"' if len(turns) == 1 else f'{len(turns)} messages, from "{begins[0]}" to "{begins[1]}"'


def answer_once(chat, args):
    """Answer --instruction on stdout."""
    record = {"instruction": args.instruction, "input": args.input}
    ids = ids_of_prompt(chat, [unwrap(record)])
    answer = make_answer(chat, ids, args.max_new_tokens, show)
    try:
        generate(chat, [ids], [answer])
    finally:  # Ctrl-C leaves what there is
        answer.finish(answer.finish_reason or "interrupted")
        print(flush=True)
    note_end(answer)


def answered_before(path, records):
    """The records that a file of answers does not hold yet; its last line is taken off where it is torn."""
    if not Path(path).exists():
        return records
    lines = Path(path).read_bytes().split(b"\n")
    if lines[-1]:
        say(f"{path}: its last line is torn, and asked again")
        with open(path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
    done = {utils.read_json(path, line.decode("utf-8")).get("source") for line in lines[:-1] if line.strip()}
    if strange := done - {record["source"] for record in records}:
        raise UserError(
            f"{path}: holds an answer to {min(map(str, strange))}, which is not asked; give another --output"
        )
    say(f"{path}: {len(done):,} of {len(records):,} are answered there")
    return [record for record in records if record["source"] not in done]


def answer_all(chat, args, records, problems):
    """Answer every record, in batches and in order, as JSON Lines on stdout or to --output; account for all of them.

    Raises UserError, after all that can be answered is answered, where a record could not be.
    """
    records = answered_before(args.output, records) if args.output else records
    with open(args.output, "a", encoding="utf-8") if args.output else contextlib.nullcontext(sys.stdout) as file:
        answer_into(file, chat, args, records, problems)


def answer_into(file, chat, args, records, problems):
    """`answer_all` of what is left to answer, into an open file."""
    ready, reasons = [], {}
    for record in records:
        try:
            ready.append((record, ids_of_prompt(chat, [record])))
        except UserError as error:
            problems = [*problems, f"{record['source']}: {error}"]
            say(problems[-1])
    for start in range(0, len(ready), args.batch_size):
        batch, prompts = zip(*ready[start : start + args.batch_size], strict=True)
        answers = [make_answer(chat, ids, args.max_new_tokens) for ids in prompts]
        try:
            generate(chat, prompts, answers)
        except KeyboardInterrupt:
            what = f"interrupted: {start} of {len(ready)} answers are written"
            raise UserError(f"{what}; ask again from {batch[0]['source']} on", 130) from None
        for record, answer in zip(batch, answers, strict=True):
            print(utils.printable(json.dumps(answered(record, answer), ensure_ascii=False)), file=file)  # the same JSON
            reasons[answer.finish_reason] = reasons.get(answer.finish_reason, 0) + 1
        file.flush()
        if not utils.terminal_width(file):  # where the answers themselves are seen
            utils.show_progress(f"answered {start + len(batch)} of {len(ready)}")
    total, how = len(ready) + len(problems), ", ".join(f"{key} {count:,}" for key, count in sorted(reasons.items()))
    say(f"{len(ready):,} answered + {len(problems):,} not = {total:,} read; ended by: {how or 'none'}")
    if problems:
        shown = "; ".join(problems[:3] + ["..."] * (len(problems) > 3))
        raise UserError(f"{len(problems)} of {total} questions could not be answered: {shown}")


def answered(record, answer):
    """The line of output for a record: all that came in, with an output of its own as `expected`, and the answer."""
    line = {"source": record["source"], "instruction": record["instruction"], "input": record["input"]}
    line |= {"expected": record["output"]} if record["output"] else {}
    return {**line, **record.get("others", {}), "output": answer.text, "finish_reason": answer.finish_reason}


# --- The story -------------------------------------------------------------------------------------------------------


def main():
    """Parse the command line, read the questions, load the model, answer; see the module's docstring."""
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale says
    args = parse_arguments(sys.argv[1:])
    if sys.stdout is None:
        raise UserError("standard output is closed, so answers have nowhere to go; leave >&- out")
    path = args.data_path or (None if args.instruction is not None or (sys.stdin and sys.stdin.isatty()) else "-")
    records, problems = read_questions(path) if path else ([], [])
    for problem in problems:
        say(problem)
    if path and not records:
        raise UserError(f"none of {len(problems)} questions can be answered: {problems[0]}")
    chat = load_chat(args)
    if path:
        answer_all(chat, args, records, problems)
    elif args.instruction is not None:
        answer_once(chat, args)
    else:
        converse(chat, args)


if __name__ == "__main__":
    utils.run_main(main)
