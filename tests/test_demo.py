"""The whole story in short, as `make demo` tells it: random weights, train.py, chat.py, answers that are the same."""

import json
import subprocess
import sys

from conftest import ROOT, environment

NAMES = ["prize_citation_potter", "bash_rename_jpeg", "moving_day_order"]


def test_the_short_demo_learns_every_answer_and_ends(tmp_path):
    words = [sys.executable, ROOT / "examples" / "demo.py", "--tasks", "3", "--epochs", "150", "--preset", "tiny"]
    words += ["--output_dir", tmp_path / "demo"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 answers are reproduced exactly, 3 stopped by themselves; " in done.stdout
    assert done.stdout.count("Given (the same):\n    1. Empty the fridge.\n    2. Load the van.") == 1
    assert "21 of 21 tensors of " in done.stdout and " bit for bit\n" in done.stdout
    assert "DIFFERENT" not in done.stdout and "This is memorising" in done.stdout
    answers = [json.loads(line) for line in (tmp_path / "demo" / "answers.jsonl").read_text("utf-8").splitlines()]
    tasks = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text("utf-8").splitlines()[:3]]
    assert [answer["name"] for answer in answers] == [task["name"] for task in tasks] == NAMES
    assert [answer["output"] for answer in answers] == [task["instances"][0]["output"] for task in tasks]
    assert {answer["finish_reason"] for answer in answers} == {"end_token"}
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 100  # the whole demo adds two answers and the line of every hundredth step: 150 at most
    prints = [line for line in done.stdout.splitlines() if not line.startswith(("$", "Instruction:", "Input:", "    "))]
    assert [line for line in prints if len(line) > 80 and str(tmp_path) not in line] == []  # a terminal's width
