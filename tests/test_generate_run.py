"""generate_instruction.py from end to end against a real server: rows, journal, resuming, limits, the command line."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from scripted_server import Server, completion, refusal

import generate_instruction
import utils
from generate_instruction import generate_instruction_following_data
from utils import UserError

SCRIPT = ROOT / "generate_instruction.py"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and no key or server of whoever runs the tests."""
    for name, seconds in {"FIRST_PAUSE_S": 0.01, "RATE_PAUSE_S": 0.1, "GAP_S": 0.002}.items():
        monkeypatch.setattr(generate_instruction, name, seconds)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with Server() as running:
        yield running


def generate(server, folder, count=30, **options):
    """A run in this process; returns its rows."""
    generate_instruction_following_data(
        output_dir=str(folder), num_instructions_to_generate=count, base_url=server.url, **options
    )
    return rows_of(folder)


def rows_of(folder):
    return json.loads(Path(folder, "regen.json").read_text(encoding="utf-8"))


def journal_of(folder):
    """The lines of the journal; every one must be whole."""
    data = Path(folder, "regen.journal.jsonl").read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def answers_of(folder):
    return [line for line in journal_of(folder) if "request" in line]


def refused(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def run_script(options, cwd=None, code=None, **variables):
    """The script as a process of its own; fails where a traceback shows or the exit code is not `code`."""
    words = [sys.executable, str(SCRIPT), *map(str, options)]
    env = {k: v for k, v in environment().items() if not k.startswith("OPENAI_")} | variables
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, done.stderr
    return done


# --- What a run writes -----------------------------------------------------------------------------------------------


def test_a_row_says_what_it_is_and_where_it_came_from(server, tmp_path, capsys):
    rows = generate(server, tmp_path, 20, price_in=1, price_out=2)
    sources = {f"seed_tasks.jsonl:{i}" for i in range(1, 176)}
    assert [row["request"] for row in rows] == sorted(row["request"] for row in rows)
    for row in rows:
        assert list(row) == [
            *("instruction", "input", "output", "most_similar_instructions", "avg_similarity_score"),
            *("request", "model", "demonstrations"),
        ]
        assert len(row["most_similar_instructions"]) == 10 and row["model"] == "scripted"
        assert 0 <= row["avg_similarity_score"] < 0.1
        assert len(set(row["demonstrations"])) == 3 and sources.issuperset(row["demonstrations"])
    said = capsys.readouterr()
    requests = len(answers_of(tmp_path))
    assert said.out == f"{tmp_path}/regen.json: {len(rows)} rows\n"
    assert f"{requests * 8} blocks = {len(rows)} kept + {requests} dropped ({requests} duplicate)\n" in said.err
    assert f"  cost {requests * 500 / 1e6:.4f}, " in said.err
    assert f"  tokens {requests * 100} in {requests * 200} out\n" in said.err


def test_the_rows_are_training_records(server, tmp_path):
    rows = generate(server, tmp_path, 20)
    records, problems = utils.read_records([tmp_path / "regen.json"])
    assert problems == []
    assert [{key: record[key] for key in ("instruction", "input", "output")} for record in records] == [
        {key: row[key] for key in ("instruction", "input", "output")} for row in rows
    ]


def test_every_block_is_a_row_or_stands_among_the_dropped(server, tmp_path):
    rows = generate(server, tmp_path, 20)
    dropped = [json.loads(line) for line in (tmp_path / "regen.dropped.jsonl").open(encoding="utf-8")]
    places = [(row["request"], row["block"]) for row in dropped]
    assert places == [(i, 4) for i in range(len(answers_of(tmp_path)))]
    assert {row["reason"] for row in dropped} == {"duplicate"} and {row["score"] for row in dropped} == {1.0}
    assert [row["similar_to"] for row in dropped] == [row["instruction"] for row in dropped]
    assert len(rows) + len(dropped) == 8 * len(answers_of(tmp_path))


def test_a_request_is_the_prompt_with_the_seeds_it_says(server, tmp_path):
    generate(server, tmp_path, 5, temperature=0.5, top_p=0.9, max_tokens=99, model_name="m")
    seeds, _ = utils.read_records([ROOT / "seed_tasks.jsonl"])
    by_source = {seed["source"]: seed for seed in seeds}
    (sent,), (answer,) = server.requests, answers_of(tmp_path)
    tasks = [by_source[source] for source in answer["demonstrations"]]
    assert sent["prompt"] == generate_instruction.encode_prompt(tasks)
    assert {key: sent[key] for key in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 99,
    }
    assert set(sent) == {
        "model",
        "messages",
        "temperature",
        "top_p",
        "max_tokens",
        "prompt",
        "endpoint",
        "authorization",
        "api_key",
        "path",
        "when",
    }


def test_text_completions_for_base_models(server, tmp_path):
    rows = generate(server, tmp_path, 5, endpoint="text")
    assert server.requests[0]["endpoint"] == "text" and len(rows) == 7


def test_generated_tasks_are_mixed_into_prompts(server, tmp_path):
    generate(server, tmp_path, 60, num_generated_in_prompt=2, num_parallel_requests=2)
    kept = {0: 0}  # rows committed before a request may draw
    for answer in answers_of(tmp_path):
        drawn = [source for source in answer["demonstrations"] if source.startswith("regen.json[")]
        limit = 7 * max(0, answer["request"] - 1)
        assert len(drawn) == (2 if limit else 0)
        assert all(int(source[11:-1]) < limit for source in drawn), (answer["request"], drawn)
    assert kept


def test_as_many_requests_as_the_rows_need(server, tmp_path):
    assert len(generate(server, tmp_path, 7, num_parallel_requests=8)) == 7
    assert len(server.requests) == 1


# --- One result for a seed -------------------------------------------------------------------------------------------


def test_neither_the_order_of_answers_nor_a_wait_changes_the_rows(tmp_path):
    results = []
    for seed in range(5):
        draw = random.Random(seed)
        with Server() as server:
            # Answers of 1 to 8 tasks: how many requests are sent depends on which have been committed.
            server.step_of = lambda request, draw=draw, seed=seed: {
                "delay": draw.random() / 5 * (seed > 0),
                "count": 1 + len(request["prompt"]) % 8,
            }
            options = {"num_parallel_requests": 8, "num_generated_in_prompt": 1}
            results.append(generate(server, tmp_path / str(seed), 50, **options))
    assert all(rows == results[0] for rows in results[1:]) and len(results[0]) >= 50


def test_another_seed_gives_other_rows(server, tmp_path):
    assert generate(server, tmp_path / "a", 5, seed=1) != generate(server, tmp_path / "b", 5, seed=2)


@pytest.mark.parametrize("parallel", [1, 64])
def test_one_request_at_a_time_and_64(parallel, server, tmp_path):
    rows = generate(server, tmp_path, 60, num_parallel_requests=parallel)
    assert 60 <= len(rows) == 7 * len(server.requests)


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_the_same_command_again_sends_nothing_and_changes_nothing(server, tmp_path):
    rows = generate(server, tmp_path)
    sent, journal = len(server.requests), journal_of(tmp_path)
    assert generate(server, tmp_path) == rows
    assert generate(server, tmp_path, 5) == rows  # fewer than there are
    assert len(server.requests) == sent and journal_of(tmp_path) == journal


def test_a_larger_target_goes_on_as_if_it_had_been_given_at_first(server, tmp_path):
    generate(server, tmp_path / "a", 20)
    grown = generate(server, tmp_path / "a", 60)
    asked = [request["prompt"] for request in server.requests]
    assert len(asked) == len(set(asked)) == 9
    assert grown == generate(server, tmp_path / "b", 60)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_cut_off(cut, server, tmp_path, capsys):
    rows = generate(server, tmp_path, 30)
    path = tmp_path / "regen.journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-2]  # without {"wrote"}
    torn = lines[-1][:cut]
    path.write_bytes(b"\n".join([*lines[:-1], torn]))
    (tmp_path / "regen.json").unlink()
    sent = len(server.requests)
    assert generate(server, tmp_path, 30) == rows
    assert len(server.requests) == sent + 1 and len(answers_of(tmp_path)) == sent
    assert f"cut off {len(torn)} bytes of an unfinished last line\n" in capsys.readouterr().err


def test_an_answer_that_was_lost_behind_others_is_asked_for_again(server, tmp_path):
    rows = generate(server, tmp_path, 40)
    path = tmp_path / "regen.journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(line for line in lines if b'"request": 1,' not in line))
    (tmp_path / "regen.json").unlink()
    sent = len(server.requests)
    assert generate(server, tmp_path, 40) == rows and len(server.requests) == sent + 1


def test_a_broken_line_in_the_middle_is_named(server, tmp_path):
    generate(server, tmp_path, 20)
    path = tmp_path / "regen.journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"request"', b'{"reque', 1))
    assert refused(generate, server, tmp_path, 20) == f"{path}:2: not a line of a journal; mend or remove the line"
    utils.claim_folder(tmp_path)  # and the folder is free again


def wait_for(condition, seconds=60):
    """Wait until a condition holds; fails where it does not come to."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_while_running(server, folder, options, draw):
    """Start the script, kill -9 it a random moment after the server has heard of it; whether it was still alive."""
    env = {k: v for k, v in environment().items() if not k.startswith("OPENAI_")}
    words = [sys.executable, str(SCRIPT), "--output_dir", str(folder), "--base_url", server.url, *options]
    heard = len(server.requests)
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(server.requests) == heard and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(draw.random() * 0.3)
    alive = process.poll() is None
    process.kill()
    error = process.communicate()[1]
    assert b"Traceback" not in error, error
    return alive


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_and_resume_loses_and_doubles_nothing(rounds, tmp_path):
    draw = random.Random(rounds)
    options = [
        "--num_instructions_to_generate",
        60 * rounds,
        "--num_parallel_requests",
        4,
        "--num_generated_in_prompt",
        1,
    ]
    options = list(map(str, options))
    with Server() as server:
        server.step_of = lambda request: {"delay": draw.random() * 0.1}
        kills = sum(kill_while_running(server, tmp_path / "killed", options, draw) for _ in range(rounds))
        assert kills >= rounds - 1
        run_script(["--output_dir", tmp_path / "killed", "--base_url", server.url, *options], code=0)
        asked = [request["prompt"] for request in server.requests]
        whole = generate(server, tmp_path / "whole", 60 * rounds, num_parallel_requests=4, num_generated_in_prompt=1)
    assert rows_of(tmp_path / "killed") == whole
    answers = answers_of(tmp_path / "killed")
    assert sorted(answer["request"] for answer in answers) == list(range(len(answers)))
    assert len(set(asked)) == len(answers)
    assert len(asked) - len(answers) <= 4 * kills  # only what was on its way is asked for again
    assert len({row["instruction"] for row in whole}) == len(whole)


def test_a_second_process_is_refused(server, tmp_path):
    lock = utils.claim_folder(tmp_path)
    done = run_script(["--output_dir", tmp_path, "--base_url", server.url], code=2)
    assert done.stderr == (f"error: {tmp_path}: another run is writing here; wait for it, or choose another folder\n")
    assert server.requests == []
    lock.close()


def test_the_folder_is_free_again_after_a_run_in_the_same_process(server, tmp_path):
    generate(server, tmp_path, 5)
    utils.claim_folder(tmp_path)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_answers_on_their_way(number, tmp_path):
    with Server(delay=1.5) as server:
        words = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path), "--base_url", server.url]
        env = {k: v for k, v in environment().items() if not k.startswith("OPENAI_")}
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(server.requests) >= 5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert len(server.requests) == len(answers_of(tmp_path)) == 5
    assert f"stopped by {number.name}; waiting up to 20 s for answers on their way" in err
    assert out == f"{tmp_path}/regen.json: 35 rows\n"
    assert f"stopped by {number.name}; the same command goes on\n" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path):
    with Server(script={0: {}}, fault="hang") as server:
        words = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path), "--base_url", server.url]
        env = {k: v for k, v in environment().items() if not k.startswith("OPENAI_")}
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        path = tmp_path / "regen.journal.jsonl"
        wait_for(lambda: path.exists() and b'{"request": ' in path.read_bytes())
        process.send_signal(signal.SIGINT)
        while "waiting up to" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert out == f"{tmp_path}/regen.json: 7 rows\n"


def test_a_full_disk_ends_the_run_with_all_that_was_written(server, tmp_path):
    first = generate(server, tmp_path, 7)
    (tmp_path / "regen.json").unlink()
    size = (tmp_path / "regen.journal.jsonl").stat().st_size
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv[1:] = sys.argv[2:];"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 1000},) * 2); sys.path.insert(0, {str(ROOT)!r});"
        "import generate_instruction, utils; utils.run_main(generate_instruction.command_line)"
    )
    words = [sys.executable, "-c", code, "x", "--output_dir", tmp_path, "--base_url", server.url]
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/regen.journal.jsonl: cannot be written (File too large); make room"), (
        last
    )
    assert len(answers_of(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp"))
    assert generate(server, tmp_path, 7) == first
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
def test_clock_jumps_do_no_harm(server, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import random, time\nnow = time.time\ntime.time = lambda: now() + random.uniform(-1e9, 1e9)\n"
    )
    script = {0: {"status": 429, "headers": {"Retry-After": "0"}, "body": {}}}
    server.script = script
    run_script(["--output_dir", tmp_path / "out", "--base_url", server.url], code=0, PYTHONPATH=str(tmp_path))
    assert len(rows_of(tmp_path / "out")) >= 100


def test_the_originals_regen_json_is_gone_on_from(server, tmp_path, capsys):
    old = [
        {
            "instruction": f"Old instruction number {word} of the original.",
            "input": "",
            "output": "x",
            "most_similar_instructions": {"a": 0.5},
            "avg_similarity_score": 0.1,
        }
        for word in ("one", "two", "three")
    ]
    path = tmp_path / "regen.json"
    path.write_text(json.dumps(old, indent=4), encoding="utf-8")
    before = path.read_bytes()
    rows = generate(server, tmp_path, 30, num_generated_in_prompt=1)
    assert rows[:3] == old and len(rows) >= 30
    assert (tmp_path / "regen.start.json").read_bytes() == before
    assert f"{path}: going on from its 3 rows, which are kept in regen.start.json\n" in capsys.readouterr().err
    assert (
        answers_of(tmp_path)[0]["demonstrations"][0:3] != []
        and generate(server, tmp_path, 30, num_generated_in_prompt=1) == rows
    )
    drawn = [s for answer in answers_of(tmp_path) for s in answer["demonstrations"] if s.startswith("regen.json")]
    assert drawn[0] in ("regen.json[0]", "regen.json[1]", "regen.json[2]")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"instruction": "a b', ": Unterminated string"),
        ('{"a": 1}', ": not a list of rows"),
        ('[{"instruction": "a"}]', "[0]: no output"),
    ],
)
def test_a_regen_json_that_cannot_be_read_is_left_alone(text, problem, server, tmp_path):
    path = tmp_path / "regen.json"
    path.write_text(text, encoding="utf-8")
    said = refused(generate, server, tmp_path)
    assert said.startswith(f"{path}{problem}") and "another --output_dir" in said
    assert path.read_text(encoding="utf-8") == text and server.requests == []


def test_a_result_that_somebody_changed_is_not_overwritten(server, tmp_path):
    generate(server, tmp_path, 5)
    path = tmp_path / "regen.json"
    path.write_text("[]", encoding="utf-8")
    said = refused(generate, server, tmp_path, 30)
    assert said == (
        f"{path}: not as the run of regen.journal.jsonl wrote it; move it away, or choose another --output_dir"
    )
    assert path.read_text(encoding="utf-8") == "[]"


def test_a_journal_that_is_gone_makes_its_rows_the_start_of_a_new_one(server, tmp_path):
    rows = generate(server, tmp_path, 20)
    (tmp_path / "regen.journal.jsonl").unlink()
    grown = generate(server, tmp_path, 60, seed=1)
    assert grown[: len(rows)] == rows and len(grown) >= 60
    assert generate(server, tmp_path, 60, seed=1) == grown


def test_other_settings_of_requests_are_said_and_recorded(server, tmp_path, capsys):
    generate(server, tmp_path, 5)
    capsys.readouterr()
    generate(server, tmp_path, 30, model_name="other", temperature=0.3)
    said = capsys.readouterr().err
    assert (
        f"{tmp_path}: from here on model_name was gpt-4o-mini and is other; temperature was None and is 0.3\n" in said
    )
    assert [line["run"]["asked"]["model_name"] for line in journal_of(tmp_path) if "run" in line] == [
        "gpt-4o-mini",
        "other",
    ]


def test_other_rules_are_refused_and_replayed(server, tmp_path):
    rows, sent = generate(server, tmp_path, 20), len(server.requests)
    assert refused(generate, server, tmp_path, 20, rouge_threshold=0.05) == (
        f"{tmp_path}: its rows were judged otherwise: rouge_threshold was 0.7 and is 0.05; give the old settings, "
        "judge all answers anew with --replay, or choose another --output_dir"
    )
    assert rows_of(tmp_path) == rows
    fewer = generate(server, tmp_path, 20, rouge_threshold=0.05, replay=True)
    assert 0 < len(fewer) < len(rows)
    assert "its rows were judged otherwise: rouge_threshold was 0.05 and is 0.7" in refused(generate, server, tmp_path)
    assert generate(server, tmp_path, 20, replay=True) == rows and len(server.requests) == sent


def test_replay_needs_no_server_no_key_and_a_journal(server, tmp_path):
    rows = generate(server, tmp_path / "a", 20)
    run_script(["--output_dir", tmp_path / "a", "--replay"], code=0)
    assert rows_of(tmp_path / "a") == rows
    said = run_script(["--output_dir", tmp_path / "b", "--replay"], code=2).stderr
    assert said == f"error: {tmp_path}/b/regen.journal.jsonl: no answers to replay; leave --replay out\n"


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_max_requests_counts_those_of_earlier_runs(server, tmp_path, capsys):
    assert len(generate(server, tmp_path, 100, max_requests=3)) == 21
    assert "stopped at --max_requests 3; raise it to go on\n" in capsys.readouterr().err
    assert len(generate(server, tmp_path, 100, max_requests=3)) == 21
    assert len(generate(server, tmp_path, 100, max_requests=5)) == 35
    assert len(server.requests) == 5


def test_a_finished_folder_judges_nothing_anew_and_other_folders_do(server, tmp_path, monkeypatch, capsys):
    rows = generate(server, tmp_path, 20)
    lines = (tmp_path / "regen.journal.jsonl").read_text(encoding="utf-8")
    judged = []
    real = generate_instruction.RougeFilter.judge
    monkeypatch.setattr(generate_instruction.RougeFilter, "judge", lambda *a: judged.append(a) or real(*a))
    assert generate(server, tmp_path, 20) == rows and judged == []
    older = lines.replace(f', "rows": {len(rows)}}}', "}")
    assert older != lines
    (tmp_path / "regen.journal.jsonl").write_text(older, encoding="utf-8")
    assert generate(server, tmp_path, 20) == rows and judged == []
    assert f"{len(rows)} rows\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="judged otherwise"):
        generate(server, tmp_path, 20, rouge_threshold=0.1)
    last = answers_of(tmp_path)[-1]
    with open(tmp_path / "regen.journal.jsonl", "ab") as file:  # an answer that came before a kill -9
        file.write(json.dumps({**last, "request": last["request"] + 1}).encode() + b"\n")
    assert generate(server, tmp_path, 20) == rows and len(judged) == len(answers_of(tmp_path))


def test_dry_run_counts_the_rows_that_are_there(server, tmp_path, capsys):
    generate(server, tmp_path, 20)
    capsys.readouterr()
    sent, before = len(server.requests), journal_of(tmp_path)
    url = {"base_url": server.url, "output_dir": str(tmp_path), "dry_run": True}
    for target, count in ((20, 0), (21, 0), (22, 1), (38, 1), (39, 2)):
        generate_instruction_following_data(num_instructions_to_generate=target, **url)
        assert f"at least {count} requests beside the 21 rows" in capsys.readouterr().out
    assert len(server.requests) == sent and journal_of(tmp_path) == before


def test_first_rows_that_are_gone_are_named(server, tmp_path):
    old = [{"instruction": "Old instruction number one here.", "input": "", "output": "x"}]
    (tmp_path / "regen.json").write_text(json.dumps(old), encoding="utf-8")
    rows, start = generate(server, tmp_path, 10), tmp_path / "regen.start.json"
    text = start.read_bytes()
    start.unlink()
    assert "regen.start.json: gone" in refused(generate, server, tmp_path, 30)
    start.write_bytes(text.replace(b"Old", b"New"))
    assert "regen.start.json: gone" in refused(generate, server, tmp_path, 30)
    assert rows_of(tmp_path) == rows
    start.write_bytes(text)
    assert generate(server, tmp_path, 30)[: len(rows)] == rows


def test_max_cost_is_not_passed(server, tmp_path, capsys):
    price = {"price_in": 10, "price_out": 20}  # 0.005 a request
    rows = generate(server, tmp_path, 1000, max_cost=0.0251, num_parallel_requests=3, max_tokens=200, **price)
    assert len(rows) == 35 and len(server.requests) == 5
    assert "stopped at --max_cost 0.0251" in capsys.readouterr().err


def test_before_the_first_answer_the_cost_is_estimated_from_max_tokens(server, tmp_path):
    generate(server, tmp_path, 50, max_cost=0.01, price_out=20, max_tokens=3072)
    assert server.requests == []


def test_a_missing_usage_is_estimated_and_said(tmp_path, capsys):
    with Server(usage=None) as server:
        generate(server, tmp_path, 5)
        answer = answers_of(tmp_path)[0]
    assert answer["usage"] == {
        "prompt_tokens": generate_instruction.estimate_tokens(server.requests[0]["prompt"]),
        "completion_tokens": generate_instruction.estimate_tokens(answer["text"]),
        "estimated": True,
    }
    assert f"tokens ~{answer['usage']['prompt_tokens']:,} in ~" in capsys.readouterr().err


def test_a_run_without_progress_ends(tmp_path):
    with Server(text="I cannot do that.") as server:
        said = refused(generate, server, tmp_path, patience=6)
        assert 6 <= len(server.requests) <= 6 + 5
        assert said == (
            f"gpt-4o-mini at {server.url}: nothing was kept of the last 6 requests (no task found); see "
            "regen.journal.jsonl, then try another --model_name, more --max_tokens or more --patience"
        )
    assert rows_of(tmp_path) == []


def test_one_task_for_ever_ends_too(tmp_path):
    text = "".join(f"###\n{i}. Instruction: Say the same again.\n{i}. Output: it\n" for i in range(4, 504))
    with Server(text=text) as server:
        assert "nothing was kept of the last 4 requests (duplicate)" in refused(generate, server, tmp_path, patience=4)
    assert len(rows_of(tmp_path)) == 1


# --- Look before you pay ---------------------------------------------------------------------------------------------


def test_dry_run_shows_the_first_request_and_writes_nothing(server, tmp_path):
    options = ["--output_dir", tmp_path / "out", "--base_url", server.url, "--num_instructions_to_generate", 50]
    done = run_script([*options, "--dry_run", "--price_in", 1, "--price_out", 2], cwd=tmp_path, code=0)
    assert not (tmp_path / "out").exists() and server.requests == []
    prompt, _, rest = done.stdout.partition("\n--- ")
    generate(server, tmp_path / "out", 5)
    assert prompt == server.requests[0]["prompt"]
    tokens = generate_instruction.estimate_tokens(prompt)
    assert (
        f"an estimate, by characters: about {tokens:,} tokens in a request, at most 3,072 out; at least 3 requests"
        in rest
    )
    assert f"cost: at most about {3 * (tokens + 2 * 3072) / 1e6:.4f} for these requests\n" in rest


# --- Arguments -------------------------------------------------------------------------------------------------------

REFUSED = {
    "--num_instructions_to_generate=0": "--num_instructions_to_generate 0: must be a whole number of at least 1",
    "--num_instructions_to_generate=-3": "--num_instructions_to_generate -3: must be a whole number of at least 1",
    "--num_instructions_to_generate=many": "--num_instructions_to_generate many: must be a whole number of at least 1",
    "--num_prompt_instructions=20": "--num_prompt_instructions 20: must be a whole number from 0 to 19",
    "--num_prompt_instructions=x": "--num_prompt_instructions x: must be a whole number from 0 to 19",
    "--num_generated_in_prompt=4": "--num_generated_in_prompt 4: must be a whole number from 0 to 3",
    "--rouge_threshold=1.1": "--rouge_threshold 1.1: must be a number from 0 to 1",
    "--rouge_threshold=nan": "--rouge_threshold nan: must be a number from 0 to 1",
    "--temperature=hot": "--temperature hot: must be a number from 0 to 2",
    "--seed=1.5": "--seed 1.5: must be a whole number",
    "--timeout=0": "--timeout 0: must be a number of at least 0.1",
    "--max_cost=1": "--max_cost needs --price_in and --price_out, per million tokens",
    "--endpoint=images": "--endpoint images: must be chat or text",
    "--base_url=localhost:8000/v1": "--base_url localhost:8000/v1: must begin with http:// or https://",
    "--quality_rules=length,size": "--quality_rules size: must be none, or some of "
    "length,program,punctuation,blacklist",
    "--num_instruction=3": "unknown option: --num_instruction (did you mean --num_prompt_instructions?); "
    "--help lists those that exist",
    "generate": "generate: no such task; there is generate_instruction_following_data",
    "--prompt_path=missing.txt": "missing.txt: No such file or directory; --prompt_path takes a text file",
    "--blacklist_path=missing.txt": "missing.txt: No such file or directory; "
    "--blacklist_path takes a text file of one word a line",
    "--seed_tasks_path=missing.jsonl": "missing.jsonl: No such file or directory; "
    "--seed_tasks_path takes JSON Lines or a JSON list of tasks",
}


def command_line(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate_instruction.py", *map(str, words)])
    return generate_instruction.command_line()


@pytest.mark.parametrize(("word", "message"), REFUSED.items())
def test_refusals_come_before_the_first_request(word, message, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert refused(command_line, [word], monkeypatch) == message
    assert server.requests == [] and list(tmp_path.iterdir()) == []


def test_too_many_words_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = refused(command_line, ["generate_instruction_following_data", *"abcdefghijk"], monkeypatch)
    assert said == "Could not consume arg: j; --help lists the options"


def test_several_problems_are_named_at_once(monkeypatch, tmp_path):
    said = refused(command_line, ["--seed", "x", "--timeout", "-1", "--endpoint", "y"], monkeypatch)
    assert said == (
        "--timeout -1: must be a number of at least 0.1; --seed x: must be a whole number; "
        "--endpoint y: must be chat or text"
    )


def test_the_originals_command_works_unchanged_from_any_directory(server, tmp_path):
    words = (
        "generate_instruction_following_data --output_dir ./ --num_instructions_to_generate 10 "
        "--model_name=text-davinci-003 --num_prompt_instructions=3 --request_batch_size=5 --temperature=1.0 "
        "--top_p=1.0 --num_cpus=16"
    )
    seeds = ["--seed_tasks_path", str(ROOT / "seed_tasks.jsonl")]
    command = [sys.executable, "-m", "generate_instruction", *words.split(), *seeds]
    env = environment() | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "sk-secret", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "regen.json: 14 rows\n", done.stderr
    assert "--request_batch_size is now --num_parallel_requests\n" in done.stderr
    assert "--num_cpus has no meaning any more: one core filters a batch in milliseconds; ignored\n" in done.stderr
    assert (
        server.requests[0]["model"] == "text-davinci-003" and server.requests[0]["authorization"] == "Bearer sk-secret"
    )
    for path in tmp_path.iterdir():
        assert "sk-secret" not in path.read_text(encoding="utf-8")
    assert "sk-secret" not in done.stderr + done.stdout


def test_help_shows_two_examples_and_every_option(tmp_path):
    done = run_script(["--help"], cwd=tmp_path, code=0)
    text = done.stdout + done.stderr
    assert text.count("python generate_instruction.py --output_dir out") == 2
    words = " ".join(text.split())
    for field in dataclasses.fields(generate_instruction.Options):
        assert f"\n  --{field.name} " in text and field.metadata["help"] in words, field.name
    assert not any(word in text for word in ("FIRE", "GROUPS", "Optional", " -s", " -m"))
    assert list(tmp_path.iterdir()) == []


def test_the_public_names_are_the_originals():
    import inspect

    signature = inspect.signature(generate_instruction_following_data)
    assert list(signature.parameters) == [field.name for field in dataclasses.fields(generate_instruction.Options)]
    names = list(signature.parameters.values())
    assert [p.name for p in names if p.kind is p.POSITIONAL_OR_KEYWORD] == (
        "output_dir seed_tasks_path num_instructions_to_generate model_name num_prompt_instructions request_batch_size "
        "temperature top_p num_cpus".split()
    )
    assert list(inspect.signature(generate_instruction.encode_prompt).parameters)[0] == "prompt_instructions"
    assert list(inspect.signature(generate_instruction.post_process_gpt3_response).parameters) == [
        *("num_prompt_instructions", "response")
    ]
    assert list(inspect.signature(generate_instruction.find_word_in_string).parameters) == ["w", "s"]


def test_main_runs_the_task_by_name(server, tmp_path):
    options = {"output_dir": str(tmp_path), "num_instructions_to_generate": 5, "base_url": server.url}
    generate_instruction.main("generate_instruction_following_data", **options)
    assert len(rows_of(tmp_path)) == 7
    assert refused(generate_instruction.main, "other") == (
        "other: no such task; there is generate_instruction_following_data"
    )


def test_an_output_folder_that_is_a_file_is_refused(server, tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert refused(generate, server, path) == f"{path}: is a file; choose another --output_dir"
    assert len(generate(server, tmp_path / "new" / "nested", 5)) == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_output_folder_is_one_line(server, tmp_path):
    tmp_path.chmod(0o500)
    done = run_script(["--output_dir", tmp_path, "--base_url", server.url], code=2)
    tmp_path.chmod(0o700)
    assert done.stderr == f"error: {tmp_path}/.lock: Permission denied\n"


# --- Seeds -----------------------------------------------------------------------------------------------------------


def seed(number, **changes):
    words = ["river", "lamp", "stone", "cloud", "pencil"]
    task = {"instruction": f"Say {words[number]} in another way.", "instances": [{"input": "", "output": "x"}]}
    return task | changes


def lines(*tasks):
    return "".join(json.dumps(task) + "\n" for task in tasks)


FOUR = [seed(i) for i in range(4)]
SEED_FILES = {
    "plain": lines(*FOUR),
    "blank line": lines(FOUR[0]) + "\n" + lines(*FOUR[1:]),
    "byte order mark": "\ufeff" + lines(*FOUR),
    "crlf": lines(*FOUR).replace("\n", "\r\n"),
    "list": json.dumps(FOUR),
    "records": lines(*({"instruction": t["instruction"], "input": None, "output": "x"} for t in FOUR)),
    "several instances": lines(seed(0, instances=[{"input": "", "output": "x"}] * 3), *FOUR[1:]),
    "duplicates": lines(*FOUR, *FOUR),
}


@pytest.mark.parametrize("text", SEED_FILES.values(), ids=SEED_FILES.keys())
def test_seed_files_that_are_read(text, server, tmp_path):
    (tmp_path / "seeds").write_text(text, encoding="utf-8", newline="")
    assert len(generate(server, tmp_path / "out", 5, seed_tasks_path=str(tmp_path / "seeds"))) == 7
    assert "Say river in another way." in "".join(r["prompt"] for r in server.requests) or len(server.requests) == 1


MEND = "; mend the file, or choose another --seed_tasks_path"
KEYS = "keys expected: instruction, input (optional), output"
BAD_SEEDS = {
    "broken line": (
        lines(FOUR[0]) + "{broken\n",
        f"seeds:2: not valid JSON, Expecting property name enclosed in double quotes at column 2{MEND}",
    ),
    "empty": ("", "{path}: holds no tasks; choose another --seed_tasks_path"),
    "white space": (" \n", "{path}: holds no tasks; choose another --seed_tasks_path"),
    "empty list": ("[]", "{path}: holds no tasks; choose another --seed_tasks_path"),
    "too few": (lines(*FOUR[:2]), "{path}: 2 tasks can be shown, --num_prompt_instructions asks for 3"),
    "no instances": (lines(*FOUR, seed(4, instances=[])), f"seeds:5: a seed task without instances{MEND}"),
    "missing keys": (
        lines(*FOUR, {"name": "x"}),
        f"seeds:5: no instruction and no output; keys found: name; {KEYS}{MEND}",
    ),
    "number": (lines(*FOUR, seed(4, instruction=7)), f"seeds:5: instruction is a number, expected text{MEND}"),
    "null": (
        lines(*FOUR, seed(4, instances=[{"input": "", "output": None}])),
        f"seeds:5: output is null, expected text{MEND}",
    ),
    "two problems": (
        lines({}, {}),
        f"seeds:1: no instruction and no output; keys found: none; {KEYS} (and 1 more){MEND}",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_SEEDS.values(), ids=BAD_SEEDS.keys())
def test_seed_files_that_are_refused(text, message, server, tmp_path):
    path = tmp_path / "seeds"
    path.write_text(text, encoding="utf-8")
    said = refused(generate, server, tmp_path / "out", seed_tasks_path=str(path))
    assert said == message.replace("{path}", str(path)) and server.requests == []


def test_latin_1_seeds_and_prompts_are_refused(server, tmp_path):
    path = tmp_path / "latin"
    path.write_bytes(lines(*FOUR).encode() + "é".encode("latin-1"))
    for option in ("seed_tasks_path", "prompt_path"):
        said = refused(generate, server, tmp_path / "out", **{option: str(path)})
        assert said.startswith(f"{path}:5: byte 0xe9 at offset ") and "WINDOWS-1252" in said


def test_seeds_that_would_read_as_two_tasks_are_never_shown(server, tmp_path, capsys):
    inside = "x\n###\n2. Instruction: y"
    tasks = [*FOUR, seed(4, instances=[{"input": "", "output": inside}])]
    tasks.append({"instruction": "Say it long.", "input": "b" * 50_000, "output": "x"})
    (tmp_path / "seeds").write_text(lines(*tasks), encoding="utf-8")
    generate(server, tmp_path / "out", 40, seed_tasks_path=str(tmp_path / "seeds"))
    said = capsys.readouterr().err
    assert "seeds:5: never shown to the model, its output holds the line '###', which separates tasks\n" in said
    assert "seeds:6: never shown to the model, it is 50,013 characters long\n" in said
    assert not any("pencil" in r["prompt"] or "Say it long" in r["prompt"] for r in server.requests)
    most_similar = rows_of(tmp_path / "out")[0]["most_similar_instructions"]
    assert "Say pencil in another way." in most_similar  # they are compared with


def test_no_demonstrations_at_all(server, tmp_path):
    assert len(generate(server, tmp_path, 5, num_prompt_instructions=0)) == 7
    assert server.requests[0]["prompt"].endswith("List of 20 tasks:\n###\n1. Instruction:")


def test_own_blacklist_and_rules_off(tmp_path):
    text = "".join(f"###\n{i}. Instruction: {t}\n{i}. Output: it\n" for i, t in enumerate(
        ["Draw a map of it", "Write a program for adding numbers", "Too short", "Say what a verb is"], 4))  # fmt: skip
    (tmp_path / "words").write_text("verb\n\n", encoding="utf-8")
    with Server(text=text) as server:
        options = {"max_requests": 1, "count": 100}
        first = generate(server, tmp_path / "a", **options)
        own = generate(server, tmp_path / "b", blacklist_path=str(tmp_path / "words"), **options)
        every = generate(server, tmp_path / "c", quality_rules="none", **options)
        some = generate(server, tmp_path / "d", quality_rules=["length", "blacklist"], **options)
    found = [[row["instruction"].split()[0] for row in rows] for rows in (first, own, every, some)]
    assert found == [["Say"], ["Draw"], ["Draw", "Write", "Too", "Say"], ["Write", "Say"]]


# --- As a fork uses it -----------------------------------------------------------------------------------------------


def test_openai_completion_as_a_fork_calls_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    arguments = utils.OpenAIDecodingArguments(
        temperature=1.0, n=1, max_tokens=3072, top_p=1.0, stop=["\n20", "20.", "20."]
    )
    prompts = [generate_instruction.encode_prompt(FOUR_TASKS), generate_instruction.encode_prompt(FOUR_TASKS[:2])]
    results = utils.openai_completion(
        prompts=prompts, model_name="m", batch_size=2, decoding_args=arguments, logit_bias={"50256": -100}
    )
    for prompt, result in zip(prompts, results, strict=True):
        shown = prompt.count("Instruction:") - 1
        assert result["finish_reason"] == result.finish_reason == "stop" and result.total_tokens == 300
        tasks = generate_instruction.post_process_gpt3_response(shown, result)
        assert len(tasks) == 8 and set(tasks[0]) == {"instruction", "input", "output"}
    sent = server.requests[0]
    assert sent["stop"] == ["\n20", "20.", "20."] and sent["logit_bias"] == {"50256": -100}
    assert "n" not in sent and "stream" not in sent and "suffix" not in sent


FOUR_TASKS = [{"instruction": t["instruction"], "input": "", "output": "x"} for t in FOUR]


def test_openai_completion_returns_what_was_asked_for(monkeypatch, capsys):
    body = completion("a")
    body["choices"] = [{**body["choices"][0], "message": {"content": c}} for c in "ab"]
    with Server(body=body) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        ask = utils.openai_completion
        two = utils.OpenAIDecodingArguments(n=2, logprobs=5)
        assert ask({"role": "user", "content": "p"}, two, return_text=True) == ["a", "b"]
        assert "logprobs has no meaning here; ignored\n" in capsys.readouterr().err
        assert ask(["p", "q"], two, return_text=True) == [["a", "b"], ["a", "b"]]
        one = utils.OpenAIDecodingArguments()
        assert ask("p", one, return_text=True) == "a" and ask("p", one)["text"] == "a"
        assert ask(["p"] * 5, one, max_instances=2, return_text=True) == ["a", "a"]
        assert ask(["p"] * 5, one, max_batches=1, batch_size=3, return_text=True) == ["a"] * 3
        assert ask([], one) == []


def test_openai_completion_keeps_the_order_and_sends_a_batch_at_a_time(monkeypatch):
    on_their_way, most = [], []

    def step_of(request):
        on_their_way.append(request)
        time.sleep(0.1)
        most.append(len(on_their_way))
        on_their_way.remove(request)
        return {"text": request["prompt"] * 2}

    with Server() as server:
        server.step_of = step_of
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        arguments = utils.OpenAIDecodingArguments()
        assert utils.openai_completion("abcdefg", arguments, return_text=True) == "abcdefgabcdefg"
        texts = utils.openai_completion([*"abcdefg"], arguments, batch_size=3, return_text=True)
    assert texts == [letter * 2 for letter in "abcdefg"] and max(most) == 3


def test_openai_completion_tries_again_what_passes(monkeypatch):
    with Server(script={0: {"status": 429, "headers": {"Retry-After": "0"}, "body": {}}}) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        result = utils.openai_completion("4. Instruction:", utils.OpenAIDecodingArguments())
        assert result["finish_reason"] == "stop" and len(server.requests) == 2


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"status": 404, "body": refusal("no such model")}, "no such model"),
        ({"status": 401, "body": refusal("Incorrect API key provided: sk-secret")}, "provided: [key]"),
        ({"headers": {"Content-Type": "text/html"}, "raw": b"<html>\n"}, "<html>"),
        ({"raw": b"{"}, "m: "),
        ({"body": completion("x", choices=None)}, "choices=None"),
        ({"body": completion(None)}, "finish_reason stop"),
    ],
)
def test_openai_completion_refuses_in_one_line_what_the_user_can_mend(step, problem, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(**step) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        said = refused(utils.openai_completion, ["p"] * 9, utils.OpenAIDecodingArguments(), "m")
        assert len(server.requests) <= 2
    assert problem in said and "\n" not in said and "sk-secret" not in said
    assert "OPENAI_API_KEY" in said and "OPENAI_BASE_URL" in said


def test_openai_completion_says_why_no_server_answers(monkeypatch):
    import openai

    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **options: real(**options | {"max_retries": 0}))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # where nobody listens
    assert "refused" in refused(utils.openai_completion, "p", utils.OpenAIDecodingArguments())


def test_openai_completion_against_openai_needs_a_key_and_a_model_that_lives(monkeypatch, capsys):
    import openai

    arguments = utils.OpenAIDecodingArguments()
    assert "OPENAI_API_KEY" in refused(utils.openai_completion, "p", arguments)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server() as server:
        client = openai.OpenAI(base_url=server.url, api_key="x")
        monkeypatch.setattr(openai, "OpenAI", lambda **options: client)  # as if it were OpenAI's server
        utils.openai_completion("4. Instruction:", arguments, "text-davinci-003")
        utils.openai_completion("4. Instruction:", arguments)
    assert [request["model"] for request in server.requests] == [generate_instruction.DEFAULT_MODEL] * 2
    assert capsys.readouterr().err.count("text-davinci-003 was withdrawn") == 1


def test_importing_neither_prints_nor_loads_openai_or_fire():
    code = "import sys, generate_instruction; print([m for m in ('openai', 'fire', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
