"""The README is true: its laptop commands run as they stand, and the files that it names exist."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_names_exists():
    table = README[README.index("## Files") :]
    names = re.findall(r"`([^`]+)`", table)
    assert {"train.py", "utils.py", "ds_config.json", "seed_tasks.jsonl"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_names_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")} | {"ds_config.json", "seed_tasks.jsonl"}
    assert [name for name in sorted(scripts) if f"`{name}`" not in README] == []


@pytest.mark.slow
def test_the_laptop_commands_run_as_they_stand(tmp_path):
    start = README.index("```", README.index("## Try it on a laptop")) + 4
    commands = README[start : README.index("```", start)].strip().splitlines()
    assert len(commands) == 3
    for name in ("train.py", "utils.py", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "out: model saved (0.00 GiB torch.float32), last loss" in done.stdout
