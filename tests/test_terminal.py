"""What reaches a terminal: lines of progress within its width, no escapes but colour and erasing, no foreign commands.

Every script runs healthily on a real pseudo-terminal; what it prints is read as a terminal reads it.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import unicodedata

import pytest
from conftest import ROOT, basic_options, environment
from make_tiny_llama import make_tiny_raw
from safetensors.torch import load_file, save_file
from scripted_server import Server

# A title for the window, eight-bit CSI, a bell, a return, a backspace, DEL, and letters that run from right to left.
HOSTILE = "\x1b]0;owned\x07\x9b2J\rx\b\x7f\u202eabc\u2066"
SHOWN = r"\x1b]0;owned\x07\u009b2J\x0dx\x08\u007f\u202eabc\u2066"


def resize(terminal, columns):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@contextlib.contextmanager
def terminal(words, columns, cwd=None, **variables):
    """A process on a pseudo-terminal; yields (it, a generator of what it prints, the handle to resize)."""
    master, slave = pty.openpty()
    resize(slave, columns)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    env = {key: value for key, value in environment().items() if key not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        list(map(str, words)), cwd=cwd, env=env | {"TERM": "xterm"} | variables, start_new_session=True, **streams
    )
    os.close(slave)

    def pieces():
        with contextlib.suppress(OSError):  # Linux reports the closed terminal so
            while piece := os.read(master, 65536):
                yield piece

    try:
        yield process, pieces(), master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def on_terminal(words, columns, cwd=None, **variables):
    """What a process that ends well prints on a terminal of so many columns, stdout and stderr as they come."""
    with terminal(words, columns, cwd, **variables) as (process, pieces, _):
        text = b"".join(pieces).decode()  # fails where a character is cut in two
        assert process.wait(timeout=60) == 0, text
    return text


def width(text):
    """Columns of a text on a terminal, escapes apart."""
    wide = {"W": 2, "F": 2}
    shown = re.sub(r"\x1b\[(?:K|[\d;]*m)", "", text)
    return sum(wide.get(unicodedata.east_asian_width(c), 1) for c in shown if not unicodedata.combining(c))


def rewritten(text):
    """The parts of lines that a terminal was told to write over, or to begin again; a message after them is none."""
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if "\r" in line]
    return [part for line in lines for part in line.split("\r") if part and not part.startswith("\x1b[K")]


def check_manners(text, columns):
    """Lines of progress fit, and nothing but SGR and EL escapes commands the terminal."""
    assert [part for part in rewritten(text) if width(part) > columns] == []
    rest = re.sub(r"\x1b\[(?:K|[\d;]*m)", "", text).replace("\r", "")
    assert [repr(c) for c in rest if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"] == []


def python(code, *arguments):
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import utils; {code}", *arguments]


# --- The line of progress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "line", "shown"),
    [
        (80, "x" * 100, "x" * 79),
        (50, "x" * 100, "x" * 49),
        (0, "x" * 100, "x" * 79),  # some containers do not know it
        (10, "步骤步骤步骤步骤", "步骤步骤"),  # 9 columns are left: the fifth would be cut in two
        (11, "步骤步骤步骤步骤", "步骤步骤步"),
        (10, "a🦙b", "a🦙b"),
        (1, "abc", ""),
    ],
)
def test_a_line_of_progress_is_cut_in_columns(columns, line, shown):
    text = on_terminal(python("utils.show_progress(sys.argv[1], is_last=True)", line), columns)
    assert text == f"\r{shown}\x1b[K\r\n"
    assert width(shown) < (columns or 80)


def test_a_message_takes_the_place_of_the_line_of_progress():
    text = on_terminal(python("utils.show_progress('step'); utils.say('done')"), 80)
    assert text == "\rstep\x1b[K\r\x1b[Kdone\r\n"


def test_a_dumb_terminal_gets_plain_lines_where_they_are_due():
    code = "utils.show_progress('one'); utils.show_progress('two', is_due=True); utils.say('three')"
    assert on_terminal(python(code), 80, TERM="dumb") == "two\r\nthree\r\n"


@pytest.mark.parametrize("stream", ["sys.stdout", "sys.stderr", "None"])
def test_messages_go_to_stderr_or_nowhere(stream):
    """print(file=None) would take stdout, where answers go."""
    code = f"sys.stderr = {stream}; utils.say('hello'); utils.show_progress('there', is_last=True)"
    done = subprocess.run(python(code), capture_output=True, text=True, check=True)
    said = "hello\nthere\n"
    assert (done.stdout, done.stderr) == {"sys.stdout": (said, ""), "sys.stderr": ("", said), "None": ("", "")}[stream]


# --- Foreign text ----------------------------------------------------------------------------------------------------


def test_what_a_terminal_obeys_is_escaped_and_json_stays_the_same_json():
    import utils

    every = [chr(n) for n in (*range(0x500), *range(0x2000, 0x2100), 0x3000, 0xDFFF, 0xD83D, 0xFEFF, 0x1F999)]
    obeyed = [c for c in every if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    obeyed += list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert len(obeyed) == 32 - 2 + 1 + 32 + 9 + 2
    for c in every:
        assert (utils.printable(c) == c) == (c not in obeyed), repr(c)
    assert utils.printable(HOSTILE) == SHOWN
    line = json.dumps("".join(every), ensure_ascii=False)
    assert json.loads(utils.printable(line)) == "".join(every)
    assert utils.printable("中文\u200d🦙\ta\nb") == "中文\u200d🦙\ta\nb"


def test_a_message_commands_no_terminal():
    text = on_terminal(python("utils.say(sys.argv[1])", HOSTILE), 80)
    assert text == f"\r\x1b[K{SHOWN}\r\n"


@pytest.mark.parametrize(
    "variables",
    [{}, {"NO_COLOR": "1"}, pytest.param({"TERM": "dumb"}, marks=pytest.mark.slow)],
    ids=["colour", "none", "dumb"],
)
def test_a_dry_run_shows_hostile_records_in_green_or_between_marks(base, tmp_path, variables):
    name = "da\x1b]0;x\x07ta.json"
    record = {"instruction": f"Say {HOSTILE}", "output": HOSTILE}
    (tmp_path / name).write_text(json.dumps([record]), encoding="utf-8")
    options = basic_options(base, name, "out", dry_run=1)
    text = on_terminal([sys.executable, ROOT / "train.py", *options], 50, cwd=tmp_path, **variables)
    check_manners(text, 50)
    assert r"--- da\x1b]0;x\x07ta.json[0]: " in text and f"Say {SHOWN}" in text
    shown = f"{SHOWN}</s>"
    assert (f"\x1b[32m{shown}\x1b[0m" if not variables else f">>>{shown}<<<") in text
    assert "\x1b" not in text or "TERM" not in variables


# --- Every script ----------------------------------------------------------------------------------------------------


def test_training_fits_a_terminal_that_is_made_narrower(base, data, tmp_path):
    """80 columns, from step 2 on 50: the kernel holds 4 KiB of it, so the last of 100 steps come after that."""
    options = basic_options(base, data, tmp_path / "out", max_steps=100, save_strategy="steps", save_steps=60)
    text = b""
    with terminal([sys.executable, ROOT / "train.py", *options], 80) as (process, pieces, handle):
        for piece in pieces:
            text += piece
            if b"step 2/" in text:
                resize(handle, 50)
        assert process.wait(timeout=60) == 0, text.decode()
    text = text.decode()
    check_manners(text.partition("step 99/")[0], 80)
    check_manners(text[text.index("\rstep 99/") :], 50)
    steps = [part for part in rewritten(text) if part.startswith("step ")]
    assert [int(re.match(r"step (\d+)/100  ", step)[1]) for step in steps] == list(range(1, 101))
    assert width(steps[0]) > 50 and re.search(r"  lr \d\.\d\de-\d\d  epoch 0\.", steps[0])
    for step in steps[-2:]:
        assert re.match(r"step \d+/100  loss \d\.\d{4}  ETA 0:00:\d\d", step), step


def test_answers_on_a_terminal_are_lines_of_their_own(base, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(f'{{"instruction": "Say {HOSTILE[-4:]} {i}."}}\n' for i in range(5)), encoding="utf-8")
    words = [sys.executable, ROOT / "chat.py", "--model_name_or_path", base, "--max_new_tokens", "4"]
    text = on_terminal([*words, "--data_path", questions, "--batch_size", "2"], 50)
    check_manners(text, 50)
    answers = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [answer["source"] for answer in answers] == [f"q.jsonl:{i}" for i in range(1, 6)]
    assert {answer["instruction"][4:8] for answer in answers} == {HOSTILE[-4:]}


def test_a_delta_and_a_conversion_fit_the_terminal(base, tmp_path):
    shutil.copytree(base, tmp_path / "tuned")
    tensors = {name: tensor + 0.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    make_tiny_raw(tmp_path / "raw")
    made = ["apply_delta.py", "--make", "--base", base, "--target", tmp_path / "tuned", "--delta", tmp_path / "delta"]
    applied = ["apply_delta.py", "--base", base, "--delta", tmp_path / "delta", "--target", tmp_path / "again"]
    raw = ["convert_llama_weights.py", "--input_dir", tmp_path / "raw", "--model_size", "tiny"]
    runs = {80: made, 50: applied, 40: [*raw, "--output_dir", tmp_path / "llama", "--verify"]}
    for columns, (script, *options) in runs.items():
        text = on_terminal([sys.executable, ROOT / script, *options], columns)
        check_manners(text, columns)
        assert "\r" in text.replace("\r\n", "\n") and "GB" in text
    plain = on_terminal([sys.executable, ROOT / applied[0], *applied[1:], "--overwrite"], 80, TERM="dumb")
    assert "\x1b" not in plain


@pytest.mark.parametrize(("columns", "term"), [(80, "xterm"), (50, "xterm"), (80, "dumb")])
def test_generating_fits_the_terminal(tmp_path, columns, term):
    options = ["--output_dir", tmp_path / "out", "--num_instructions_to_generate", "60", "--price_in", "0.15"]
    with Server() as server:
        words = [sys.executable, ROOT / "generate_instruction.py", *options, "--base_url", server.url]
        text = on_terminal(words, columns, TERM=term, OPENAI_API_KEY="none")
    check_manners(text, columns)
    lines = [part for part in rewritten(text) if part.startswith("kept ")]
    if term == "dumb":
        assert lines == [] and "\x1b" not in text and re.match(r"kept 6\d/60  ", text)
    else:
        assert len(lines) > 3
        for line in lines[:-2]:
            assert re.match(r"kept \d+/60  ETA 0:00:\d\d  cost 0\.\d{4}, 0\.\d{4} at 6", line), line


def test_a_curve_with_a_nan_says_nothing(base, data, tmp_path):
    """The gradient's norm of a step that overflows is no number; --report_to tensorboard writes it all the same."""
    write = "from tensorboardX import SummaryWriter; SummaryWriter(sys.argv[1]).add_scalar('norm', float('nan'), 1)"
    options = list(map(str, basic_options(base, data, tmp_path / "out", dry_run=1)))
    look = f"import train; words = sys.argv; sys.argv = ['train.py', *{options!r}]; train.train(); sys.argv = words; "
    plain, ours = (
        subprocess.run(python(code, tmp_path / "curves"), env=environment(), capture_output=True, text=True, check=True)
        for code in (write, look + write)
    )
    assert "NaN or Inf found" in plain.stderr and "NaN or Inf found" not in ours.stderr


# --- Streams that are closed -----------------------------------------------------------------------------------------


def closed(redirection, script, *options):
    """A script run by bash with a stream closed."""
    words = ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, ROOT / script, *options]
    words = list(map(str, words))
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_a_conversation_without_standard_input_or_output_is_refused(base):
    for redirection, cure in (("<&-", "--instruction"), (">&-", ">&-")):
        done = closed(redirection, "chat.py", "--model_name_or_path", base)
        assert (done.returncode, done.stdout) == (2, "")
        [line] = done.stderr.splitlines()
        assert line.startswith("error: standard ") and " is closed" in line and cure in line


def test_one_question_needs_no_standard_input_and_no_standard_error(base):
    words = ["chat.py", "--model_name_or_path", base, "--instruction", "Hello", "--max_new_tokens", "3"]
    no_input, no_errors = (closed(redirection, *words) for redirection in ("<&-", "2>&-"))
    assert no_input.returncode == no_errors.returncode == 0
    assert no_input.stdout == no_errors.stdout != ""
    assert "prompt style: alpaca" in no_input.stderr and no_errors.stderr == ""


def test_a_dry_run_without_standard_output_ends_well(base, data, tmp_path):
    done = closed(">&-", "train.py", *basic_options(base, data, tmp_path / "out", dry_run=1))
    assert done.returncode == 0, done.stderr
