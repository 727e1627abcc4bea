"""docs/language.md is true: its commands can be given, and its hours are what its formula says."""

import re
import shlex

import pytest
from conftest import ROOT

import apply_delta
import extend_vocab
import train as trainer

TEXT = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
BLOCK = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1].replace("\\\n", " ")
COMMANDS = [shlex.split(line, comments=True) for line in BLOCK.splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:3]))
def test_every_command_can_be_given(command, monkeypatch):
    script, words = command[1], command[2:]
    if script == "train.py":
        model_args, data_args, args, _ = trainer.parse_arguments([*words, "--use_cpu", "True"])
        assert data_args.data_path and bool(args.trained_modules) != bool(args.lora_r)
    elif script == "extend_vocab.py":
        assert extend_vocab.parse_arguments(words).vocab_size == 20000
    elif script == "-m":
        monkeypatch.setattr("sys.argv", ["apply_delta", *words[1:]])
        assert words[0] == "apply_delta" and apply_delta.parse_args().target == "llama-7b-zh-text"
    else:
        assert script == "chat.py"


def test_the_hours_are_those_of_the_formula():
    tokens, parameters = 350e6 * 0.6, {"7B": 6.74e9, "13B": 13.02e9}
    rows = re.findall(r"^\| (7B|13B) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 2
    for name, cells in rows:
        hours = [c * parameters[name] * tokens / (rate * 0.4) / 3600 for rate in (312e12, 8 * 989e12) for c in (6, 4)]
        assert [cell.strip() for cell in cells.split("|")] == [f"{one:.1f} h" for one in hours]


def test_the_presets_are_named():
    assert all(f"`{name}`" in TEXT or name in TEXT for name in trainer.PRESETS)
