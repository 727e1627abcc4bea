"""docs/generate.md is true: its commands run, its options exist, and it names the files that a run writes."""

import inspect
import re
import shlex

import pytest
from conftest import ROOT
from scripted_server import Server
from test_generate_run import journal_of, quick, rows_of, run_script  # noqa: F401

from generate_instruction import generate_instruction_following_data

TEXT = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python generate_instruction\.py (.*)$", TEXT, re.MULTILINE)


def test_every_option_exists():
    known = {*inspect.signature(generate_instruction_following_data).parameters, "help"}
    other = {"data_path", "model_name_or_path"}  # of train.py
    assert {name for name in re.findall(r"--(\w+)", TEXT)} <= known | other


def test_it_names_the_files_that_a_run_writes(tmp_path):
    with Server() as server:
        run_script(["--output_dir", tmp_path, "--base_url", server.url, "--num_instructions_to_generate", 5], code=0)
    assert len(rows_of(tmp_path)) == 7 and len(journal_of(tmp_path)) == 3
    written = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert written | {"regen.start.json"} == set(re.findall(r"^\| `(regen[^`]+)`", TEXT, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command, tmp_path):
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(command)]
    with Server() as server:
        run_script([*words, "--max_requests", 2], cwd=tmp_path, code=0, OPENAI_BASE_URL=server.url)
    assert len(rows_of(tmp_path / words[1])) == 14


def test_there_are_commands():
    assert len(COMMANDS) == 2
