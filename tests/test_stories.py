"""The stories of examples/ on little: each runs from its first command to its last, and its table has a row a stage."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from test_extend_vocab import ZH

pytestmark = pytest.mark.slow


def tell(name, words, **options):
    env = environment() | options | {"PYTHON": sys.executable}
    command = ["bash", ROOT / "examples" / name, *words]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:], done


def test_from_nothing(tmp_path):
    texts = [f"The river {i} runs to the sea, and {j} boats are on it." for i in range(20) for j in range(5)]
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    records = [{"instruction": f"Say {i}.", "output": f"River {i}."} for i in range(60)]
    (tmp_path / "r.json").write_text(json.dumps(records), encoding="utf-8")
    options = {
        "PRESET": "tiny",
        "VOCAB": "330",
        "WINDOW": "96",
        "TEXT_STEPS": "8",
        "TUNE_STEPS": "4",
        "BATCH": "4",
        "HELD_OUT": "4",
    }
    options["OPTIONS"] = f"--cache_dir {tmp_path / 'cache'}"
    rows, done = tell("from_nothing.sh", [tmp_path / "out", tmp_path / "t.txt", tmp_path / "r.json"], **options)
    assert [row[0].strip() for row in rows] == ["pretrained", "tuned"]
    assert all(float(row[2]) < float(row[1]) for row in rows)


def test_teach_chinese(base, tmp_path):
    records = [{"instruction": text, "output": ZH[i % 6] + str(i)} for i, text in enumerate(ZH * 12)]
    (tmp_path / "r.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    options = {"VOCAB": "420", "WINDOW": "128", "STEPS": "4", "BATCH": "4", "EMBEDDINGS": "embed_tokens,lm_head"}
    options["OPTIONS"] = f"--cache_dir {tmp_path / 'cache'}"
    words = [tmp_path / "out", tmp_path / "r.json", tmp_path / "r.json", base]
    rows, done = tell("teach_chinese.sh", words, **options)
    assert [row[0].strip() for row in rows] == ["before", "embeddings", "pretrained", "tuned"]
    assert float(rows[1][3]) < 0.6 * float(rows[0][3]) and float(rows[0][1]) == float(rows[0][2])


def test_a_story_without_words_says_how_it_goes(tmp_path):
    for name in ("from_nothing.sh", "teach_chinese.sh"):
        done = subprocess.run(["bash", ROOT / "examples" / name], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2 and f"examples/{name} OUT TEXTS RECORDS" in done.stderr
