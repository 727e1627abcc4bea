"""What generate_instruction.py does with servers that misbehave: a row for every fault that has been seen."""

import asyncio
import json
import random
import time

import pytest
from scripted_server import Server, completion, refusal
from test_generate_run import answers_of, generate, quick, refused, rows_of, run_script  # noqa: F401

import generate_instruction
from generate_instruction import ChatClient, Options, check_options, retry_after

GOOD = {}
QUOTA = refusal("You exceeded your current quota.", code="insufficient_quota", kind="insufficient_quota")


def name(server):
    return f"gpt-4o-mini at {server.url}"


# --- What passes: a retry gets the answer ----------------------------------------------------------------------------

PASSING = {
    "429": ({"status": 429, "body": refusal("slow down")}, "slow down"),
    "429 with Retry-After": ({"status": 429, "headers": {"Retry-After": "0"}, "body": refusal("slow")}, "slow"),
    "500": ({"status": 500, "raw": b"oops"}, "Error code: 500"),
    "503 of a proxy": ({"status": 503, "headers": {"Content-Type": "text/html"}, "raw": b"<html>"}, "Error code: 503"),
    "408": ({"status": 408, "body": refusal("late")}, "late"),
    "409": ({"status": 409, "body": refusal("busy")}, "busy"),
    "reset": ({"fault": "reset"}, "no connection"),
    "truncated": ({"fault": "truncated"}, "no connection"),
    "hang": ({"fault": "hang"}, "no answer within 1 s"),
    "drip": ({"fault": "drip"}, "no answer within 1 s"),
    "html": ({"headers": {"Content-Type": "text/html"}, "raw": b"<html>hello"}, "bad answer (not JSON: '<html>hello')"),
    "invalid JSON": ({"raw": b'{"choices": ['}, "bad answer"),
    "empty body": ({"raw": b""}, "bad answer"),
    "null": ({"raw": b"null"}, "bad answer (no choices)"),
    "list": ({"raw": b"[]"}, "bad answer (no choices)"),
    "error with 200": ({"body": refusal("x")}, "bad answer (no choices)"),
    "choices null": ({"body": completion("x", choices=None)}, "bad answer (no choices)"),
    "choices empty": ({"body": completion("x", choices=[])}, "bad answer (no choices)"),
    "choices of text": ({"body": completion("x", choices=["x"])}, "bad answer"),
    "no message": ({"body": completion("x", choices=[{"index": 0}])}, "bad answer"),
    "content null": (
        {"body": completion(None, finish_reason="content_filter")},
        "bad answer (no text, finish_reason content_filter)",
    ),
    "content a dict": ({"body": completion({"text": "x"})}, "bad answer (no text, finish_reason stop)"),
}


@pytest.mark.parametrize(("step", "problem"), PASSING.values(), ids=PASSING.keys())
def test_a_passing_fault_costs_a_retry_and_no_row(step, problem, tmp_path):
    with Server(script={0: step}) as server:
        rows = generate(server, tmp_path, 5, timeout=1)
        assert len(rows) == 7 and len(server.requests) == 2
        assert server.requests[0]["prompt"] == server.requests[1]["prompt"]
        assert answers_of(tmp_path)[0]["attempts"] == 2


@pytest.mark.parametrize(("step", "problem"), PASSING.values(), ids=PASSING.keys())
def test_a_fault_that_stays_ends_a_run_that_has_no_answer_yet(step, problem, tmp_path):
    with Server(**step) as server:
        said = refused(generate, server, tmp_path, timeout=1, max_retries=1, num_parallel_requests=1)
        assert said.startswith(f"{name(server)} has not answered once: ") and problem in said
        assert said.endswith("; the same command tries again") and "\n" not in said
        assert len(server.requests) == 2
    assert rows_of(tmp_path) == [] and answers_of(tmp_path) == []


@pytest.mark.parametrize(("step", "problem"), [PASSING["500"], PASSING["content null"]], ids=["500", "content null"])
def test_a_fault_that_stays_behind_answers_ends_the_run_when_the_patience_does(step, problem, tmp_path):
    with Server(script={0: GOOD}, **step) as server:
        said = refused(generate, server, tmp_path, max_retries=1, patience=3, num_parallel_requests=1)
        assert said.startswith(f"{name(server)}: nothing was kept of the last 3 requests (") and problem in said
        assert len(server.requests) == 1 + 3 * 2
        assert len(rows_of(tmp_path)) == 7
        failed = answers_of(tmp_path)[1:]
        assert [entry["request"] for entry in failed] == [1, 2, 3] and all(problem in e["failed"] for e in failed)
        server.default = GOOD
        rows = generate(server, tmp_path, 30, num_parallel_requests=1)  # goes on; failures keep their numbers
        assert len(rows) == 35 and [row["request"] for row in rows[::7]] == [0, 4, 5, 6, 7]


def test_the_tokens_of_attempts_that_gave_nothing_are_counted(tmp_path):
    with Server(script={0: PASSING["content null"][0]}) as server:
        generate(server, tmp_path, 5)
    assert answers_of(tmp_path)[0]["usage"] == {"prompt_tokens": 200, "completion_tokens": 400}


def test_what_ends_the_run_does_not_wait_for_its_turn(tmp_path):
    with Server() as server:
        generate(server, tmp_path / "first", 5)
        first = server.requests.pop()["prompt"]
        refused_key = {"status": 401, "body": refusal("Incorrect API key")}
        server.step_of = lambda request: {"delay": 1} if request["prompt"] == first else refused_key
        assert "Incorrect API key" in refused(generate, server, tmp_path / "all", 1000, num_parallel_requests=3)
        assert len(server.requests) == 3  # no other was started when the first answer had come
    assert len(rows_of(tmp_path / "all")) == 7  # which is kept


def test_one_request_in_vain_among_others(tmp_path, capsys):
    with Server() as server:
        fault = {
            "status": 400,
            "body": refusal("This model's maximum context length is 4097 tokens; max_tokens is 3072"),
        }
        prompts = []

        def step_of(request):
            prompts.append(request["prompt"])
            return fault if prompts.index(request["prompt"]) == 2 else GOOD

        server.step_of = step_of
        assert len(generate(server, tmp_path, 50, num_parallel_requests=2)) == 56
        assert all(request["max_tokens"] == 3072 for request in server.requests)
    assert sum("failed" in entry for entry in answers_of(tmp_path)) == 1
    assert "  1 failed  " in capsys.readouterr().err


def test_retry_after_is_obeyed(tmp_path):
    arrivals = []
    with Server(script={0: {"status": 429, "headers": {"Retry-After": "3"}, "body": {}}}) as server:
        server.step_of = lambda request: arrivals.append(time.monotonic())
        generate(server, tmp_path, 5)
    assert len(arrivals) == 2 and arrivals[1] - arrivals[0] >= 2.9  # the pause of our own is 0.01 s


def test_pauses_grow_up_to_a_limit_and_no_two_requests_wait_alike():
    for attempt, longest in ((1, 0.01), (2, 0.02), (5, 0.16), (100, generate_instruction.LONGEST_PAUSE_S)):
        pauses = [generate_instruction.pause_before(attempt) for _ in range(100)]
        assert len(set(pauses)) == 100 and max(pauses) - min(pauses) > longest / 8
        assert all(0.75 * longest <= pause <= longest for pause in pauses)


def test_a_request_pauses_before_each_attempt_but_the_first(tmp_path, monkeypatch):
    attempts = []
    monkeypatch.setattr(generate_instruction, "pause_before", lambda attempt: attempts.append(attempt) or 0.4)
    with Server(script=dict.fromkeys(range(2), {"status": 500, "body": {}})) as server:
        start = time.monotonic()
        generate(server, tmp_path, 5)
        assert time.monotonic() - start >= 0.8 and attempts == [1, 2] and len(server.requests) == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "200", "retry-after": "9"}, 0.2),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "Sat, 01 Jan 2000 00:01:00 GMT", "date": "Sat, 01 Jan 2000 00:00:00 GMT"}, 60),
        ({"retry-after": "Sat, 01 Jan 2000 00:00:00 GMT", "date": "Sat, 01 Jan 2000 00:01:00 GMT"}, 0),
        ({"retry-after": "soon", "date": "x"}, None),
        ({}, None),
    ],
)
def test_what_retry_after_says(headers, seconds):
    assert retry_after(headers) == seconds


# --- What is final: one line, no retry -------------------------------------------------------------------------------

FINAL = {
    "401": (
        {"status": 401, "body": refusal("Incorrect API key", code="invalid_api_key")},
        "Incorrect API key",
        "set the environment variable OPENAI_API_KEY",
    ),
    "402": (
        {"status": 402, "body": refusal("Insufficient Balance")},
        "Insufficient Balance",
        "there is no credit left; put it in order",
    ),
    "403": (
        {"status": 403, "body": refusal("Forbidden")},
        "Forbidden",
        "this key may not do that; choose another --model_name, or check the key",
    ),
    "404": (
        {"status": 404, "body": refusal("The model `m` does not exist", code="model_not_found")},
        "does not exist",
        "check --model_name and --base_url, which mostly ends in /v1",
    ),
    "quota": (
        {"status": 429, "body": QUOTA},
        "You exceeded your current quota.",
        "there is no credit left; put it in order",
    ),
    "Retry-After 600": (
        {"status": 429, "headers": {"Retry-After": "600"}, "body": refusal("later")},
        "later",
        "it asks to wait 600 s; wait, or give a longer --timeout",
    ),
    "Retry-After a date": (
        {"status": 503, "headers": {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, "body": refusal("later")},
        "later",
        "wait, or give a longer --timeout",
    ),
}


@pytest.mark.parametrize(("step", "problem", "advice"), FINAL.values(), ids=FINAL.keys())
def test_what_no_request_can_pass_ends_the_run_at_once_and_keeps_the_rest(step, problem, advice, tmp_path):
    with Server(script={0: GOOD}, **step) as server:
        said = refused(generate, server, tmp_path, timeout=10, num_parallel_requests=1)
        assert said.startswith(f"{name(server)}: ") and problem in said
        assert said.endswith(f"{advice}; then the same command goes on") and "\n" not in said
        assert len(server.requests) == 2 and len(rows_of(tmp_path)) == 7
        server.default = GOOD
        assert len(generate(server, tmp_path, 30)) == 35  # no number is lost


def test_a_wrong_key_is_one_line_and_exit_code_2_and_is_never_shown(tmp_path):
    key = "sk-very-secret-0123456789"
    with Server(status=401, body=refusal(f"Incorrect API key provided: {key}")) as server:
        done = run_script(["--output_dir", tmp_path], code=2, OPENAI_API_KEY=key, OPENAI_BASE_URL=server.url)
        assert server.requests[0]["authorization"] == f"Bearer {key}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith("check OPENAI_API_KEY; then the same command goes on")
    written = done.stdout + done.stderr + "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert key not in written and "[key]" in errors[0]


def test_a_password_in_the_url_is_used_and_never_shown(tmp_path, capsys):
    with Server(script={2: {"status": 401, "body": {}}}) as server:
        server.url = server.url.replace("//", "//user:password@")
        said = refused(generate, server, tmp_path, num_parallel_requests=1)
        assert server.requests[0]["authorization"].startswith("Basic ")
    said += capsys.readouterr().err + "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert "password" not in said and "user" not in said


def test_openai_needs_a_key_and_other_servers_do_not(tmp_path, monkeypatch):
    done = run_script(["--output_dir", tmp_path], code=2)
    assert done.stderr == (
        "error: no key: set the environment variable OPENAI_API_KEY, or give --base_url of another server\n"
    )
    with Server() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\nkey")
        assert refused(generate, server, tmp_path) == "OPENAI_API_KEY holds characters that no key has; set it again"


def test_a_server_that_is_not_there(tmp_path):
    with Server() as server:
        pass  # and is gone
    said = refused(generate, server, tmp_path, max_retries=1)
    assert said.startswith(f"{name(server)} has not answered once: no connection (") and rows_of(tmp_path) == []


# --- Parameters that a model refuses ---------------------------------------------------------------------------------


def refusing(
    *names, wording="Unsupported parameter: '{}' is not supported with this model.", with_param=True, status=400
):
    """A step for requests that hold one of `names`."""

    def step_of(request):
        wrong = [key for key in names if key in request]
        if wrong:
            body = refusal(wording.format(wrong[0]), param=wrong[0] if with_param else None)
            return {"status": status, "body": body}
        return GOOD

    return step_of


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"with_param": False},
        {"with_param": False, "wording": "1 validation error: {}: Extra inputs are not permitted", "status": 422},
    ],
    ids=["param", "message", "422"],
)
def test_refused_parameters_are_renamed_or_dropped_once_and_said(how, tmp_path, capsys):
    with Server() as server:
        server.step_of = refusing("max_tokens", "temperature", **how)
        rows = generate(server, tmp_path, 60)
        assert len(rows) >= 60
        good = [
            request
            for request in server.requests
            if "max_completion_tokens" in request and "temperature" not in request
        ]
        assert len(good) == len(answers_of(tmp_path))
        assert all(request["max_completion_tokens"] == 3072 and request["top_p"] == 1.0 for request in good)
        said = capsys.readouterr().err
        assert said.count("refuses") == 2
        assert f"{name(server)}: refuses max_tokens 3072; from here on sending it as max_completion_tokens\n" in said
        assert f"{name(server)}: refuses temperature 1.0; from here on sent without it\n" in said
    assert {answer["attempts"] for answer in answers_of(tmp_path)} == {1}


def test_a_server_that_refuses_both_names_of_the_limit_gets_none(tmp_path):
    with Server() as server:
        server.step_of = refusing("max_tokens", "max_completion_tokens")
        assert len(generate(server, tmp_path, 5)) == 7
        assert set(server.requests[-1]) & {"max_tokens", "max_completion_tokens"} == set()


def test_a_400_that_names_no_parameter_is_not_tried_again(tmp_path):
    with Server(status=400, body=refusal("The response was filtered", code="content_filter")) as server:
        said = refused(generate, server, tmp_path)
        assert "has not answered once: " in said and "The response was filtered" in said
        assert len(server.requests) <= 5


# --- Answers that are odd, and good ----------------------------------------------------------------------------------


def one_answer(tmp_path, text, **more):
    """The rows and the reasons of a run of one request."""
    with Server(text=text, **more) as server:
        rows = generate(server, tmp_path, 100, max_requests=1)
    dropped = [json.loads(line) for line in (tmp_path / "regen.dropped.jsonl").open(encoding="utf-8")]
    return rows, [row["reason"] for row in dropped]


TASK = " Say what a {} is.\n4. Input:\n<noinput>\n4. Output:\n{}\n"


def test_lone_surrogates_cost_one_task_and_are_journaled(tmp_path):
    text = (
        TASK.format("lamp", "half \ud83d")
        + "###\n"
        + "5. Instruction:"
        + TASK.format("river", "water").replace("4.", "5.")
    )
    rows, reasons = one_answer(tmp_path, text)
    assert [row["output"] for row in rows] == ["water"] and reasons == ["broken characters"]
    assert answers_of(tmp_path)[0]["text"] == text
    (tmp_path / "regen.json").read_text(encoding="utf-8").encode("utf-8")


def test_line_separators_of_unicode_do_not_cut_the_journal(tmp_path):
    text = TASK.format("lamp", "one\u2028two\u0085three\x0cfour")
    rows, reasons = one_answer(tmp_path, text)
    assert [row["output"] for row in rows] == ["one\u2028two\u0085three\x0cfour"] and reasons == []
    with Server(text=text) as server:
        assert generate(server, tmp_path, 100, max_requests=1) == rows and server.requests == []


def test_finish_reasons(tmp_path):
    text = TASK.format("lamp", "a light")
    for reason, kept in (("length", 0), ("stop", 1), ("eos", 1), (None, 1), ("content_filter", 1)):
        rows, _ = one_answer(tmp_path / str(reason), text, finish_reason=reason)
        assert len(rows) == kept, reason


def test_an_answer_of_10_megabytes(tmp_path):
    rows, reasons = one_answer(tmp_path, "x" * 10_000_000)
    assert rows == [] and reasons == ["no task found"]
    rows, reasons = one_answer(tmp_path / "b", TASK.format("lamp", "x" * 10_000_000))
    assert [len(row["output"]) for row in rows] == [10_000_000] and reasons == []


def test_a_huge_task_is_not_shown_in_later_prompts(tmp_path):
    with Server(text=TASK.format("lamp", "x" * 100_000)) as server:
        refused(generate, server, tmp_path, 10, num_generated_in_prompt=1, patience=3, num_parallel_requests=1)
        assert max(len(request["prompt"]) for request in server.requests) < 20_000


def test_100_requests_of_which_most_meet_a_fault(tmp_path, monkeypatch):
    """Whatever a bad server does, all requests end, and every request is an answer or a failure in the journal."""
    faults = [step for key, (step, _) in PASSING.items() if key not in ("hang", "drip")]
    with Server() as server:
        draw = random.Random(0)
        server.step_of = lambda request: draw.choice([draw.choice(faults), {}])
        rows = generate(
            server, tmp_path, 10_000, max_requests=100, num_parallel_requests=16, max_retries=2, patience=100
        )
        entries = answers_of(tmp_path)
    assert sorted(entry["request"] for entry in entries) == list(range(100))
    failed = sum("failed" in entry for entry in entries)
    assert 0 < failed < 50 and len(rows) == 7 * (100 - failed)


def test_an_ending_client_starts_no_other_attempt():
    with Server(status=500, body={}) as server:

        async def ask():
            client = ChatClient(check_options(Options(base_url=server.url, timeout=5)))
            task = asyncio.ensure_future(client.ask("4. Instruction:"))
            while not server.requests:
                await asyncio.sleep(0.01)
            client.ending.set()
            await asyncio.wait([task])
            await client.client.close()
            return task.cancelled()

        assert asyncio.run(ask()) and len(server.requests) == 1
