"""generate_instruction.py against a server and a model that are not ours: transformers serve, with a tiny LLaMA.

Random weights write no tasks, so what is tested is that requests are understood, answers arrive and are counted, and a
model that writes nothing of use ends the run with one line.
"""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import environment
from test_generate_run import answers_of, quick, refused, rows_of  # noqa: F401

from generate_instruction import generate_instruction_following_data

MISSING = [name for name in ("fastapi", "uvicorn", "rich") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs packages that are not here: {MISSING}"),
]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def local(base, tmp_path_factory):
    """(URL, model folder) of transformers serve on a free port."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(folder.parent / "log", "w+")
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", port]
    command = list(map(str, [*command, "--device", "cpu", folder]))
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        log.seek(0)
        assert process.poll() is None, log.read()[-3000:]
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_a_random_model_behind_transformers_serve(endpoint, local, tmp_path):
    url, folder = local
    (tmp_path / "prompt.txt").write_text("List of 20 tasks:\n", encoding="utf-8")
    said = refused(
        generate_instruction_following_data,
        output_dir=str(tmp_path / "out"),
        base_url=url,
        model_name=folder,
        endpoint=endpoint,
        prompt_path=str(tmp_path / "prompt.txt"),
        num_prompt_instructions=1,
        num_parallel_requests=2,
        max_tokens=16,
        patience=3,
        timeout=120,
    )
    assert said.startswith(f"{folder} at {url}: nothing was kept of the last 3 requests ("), said
    answers = answers_of(tmp_path / "out")
    assert [answer["request"] for answer in answers[:3]] == [0, 1, 2] and rows_of(tmp_path / "out") == []
    for answer in answers:
        assert answer["finish_reason"] in ("length", "stop") and answer["attempts"] == 1
        assert 0 < answer["usage"]["completion_tokens"] <= 16 < answer["usage"]["prompt_tokens"]
        assert "estimated" not in answer["usage"] and isinstance(answer["text"], str)
