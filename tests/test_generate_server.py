"""What generate_instruction.py does with servers that misbehave: a row for every fault that has been seen."""

import asyncio
import json
import random
import time

import pytest
from scripted_server import Server, completion, refusal
from test_generate_run import answers_of, generate, journal_of, quick, refused, rows_of, run_script  # noqa: F401

import generate_instruction
from generate_instruction import ChatClient, Options, check_options, retry_after

GOOD = {}
QUOTA = refusal("You exceeded your current quota.", code="insufficient_quota", kind="insufficient_quota")


def name_of(server):
    return f"gpt-4o-mini at {server.url}"


# --- What passes: a retry gets the answer ----------------------------------------------------------------------------

PASSING = {
    "500": ({"status": 500, "raw": b"oops"}, "HTTP 500: oops"),
    "503 of a proxy": (
        {"status": 503, "headers": {"Content-Type": "text/html"}, "raw": b"<html><title>Bad\nday</title><p>x"},
        "HTTP 503: Bad day",
    ),
    "408": ({"status": 408, "body": refusal("late")}, "late"),
    "409": ({"status": 409, "body": refusal("busy")}, "busy"),
    "reset": ({"fault": "reset"}, "no connection"),
    "truncated": ({"fault": "truncated"}, "no connection"),
    "hang": ({"fault": "hang"}, "no answer within 1 s"),
    "drip": ({"fault": "drip"}, "no answer within 1 s"),
    "html": ({"headers": {"Content-Type": "text/html"}, "raw": b"<html>hello"}, "bad answer (no choices): <html>hello"),
    "invalid JSON": ({"raw": b'{"choices": ['}, "bad answer"),
    "empty body": ({"raw": b""}, "bad answer"),
    "null": ({"raw": b"null"}, "bad answer (no choices)"),
    "list": ({"raw": b"[]"}, "bad answer (no choices)"),
    "error with 200": ({"body": refusal("too busy")}, "bad answer (no choices): too busy"),
    "502 with 200": ({"body": refusal("upstream", code=502)}, "bad answer (no choices): upstream"),
    "status_msg with 200": ({"body": {"base_resp": {"status_msg": "late"}}}, "late"),
    "choices null": ({"body": completion("x", choices=None)}, "bad answer (no choices)"),
    "choices empty": ({"body": completion("x", choices=[])}, "bad answer (no choices)"),
    "choices of text": ({"body": completion("x", choices=["x"])}, "bad answer"),
    "no message": ({"body": completion("x", choices=[{"index": 0}])}, "bad answer"),
    "content null": (
        {"body": completion(None, finish_reason="stop")},
        "bad answer (no text, finish_reason stop)",
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
        assert said.startswith(f"{name_of(server)} has not answered once: ") and problem in said
        assert said.endswith("; the same command tries again") and "\n" not in said
        assert len(server.requests) == 2
    assert rows_of(tmp_path) == [] and answers_of(tmp_path) == []


@pytest.mark.parametrize(("step", "problem"), [PASSING["500"], PASSING["content null"]], ids=["500", "content null"])
def test_a_fault_that_stays_behind_answers_ends_the_run_when_the_patience_does(step, problem, tmp_path):
    with Server(script={0: GOOD}, **step) as server:
        said = refused(generate, server, tmp_path, max_retries=1, patience=3, num_parallel_requests=1)
        assert said.startswith(f"{name_of(server)}: nothing was kept of the last 3 requests (") and problem in said
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
        assert len(server.requests) <= 3  # no other was started when the first answer had come
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


def test_a_long_wait_is_said_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate_instruction, "REPORT_S", 0.3)
    for status in (429, 503):
        script = {1: {"status": status, "headers": {"Retry-After": "1"}, "body": {}}}
        with Server(script=script) as server:
            generate(server, tmp_path / str(status), 20)
        said = capsys.readouterr().err
        assert said.count("the next request waits") >= 3, said
        assert ("all requests wait 1 s" in said) == (status == 429)


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
        ({"retry-after": "7.5", "date": "x"}, 7.5),
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
        assert said.startswith(f"{name_of(server)}: ") and problem in said
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
    assert said.startswith(f"{name_of(server)} has not answered once: no connection (") and rows_of(tmp_path) == []


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


WORDINGS = {
    "OpenAI": (400, refusal("Unsupported parameter: '{}' is not supported with this model.", param="{}")),
    "OpenAI, no param": (400, refusal("Unrecognized request argument supplied: {}")),
    "Anthropic": (400, refusal("`{}` may only be set to 1 when thinking is enabled.")),
    "Groq": (400, refusal("property '{}' is unsupported")),
    "DashScope": (400, refusal("<400> InvalidParameter: Range of {} should be as it is not", code="invalid_parameter")),
    "vLLM": (400, {"object": "error", "message": "Value error, {} must be unset", "code": 400, "param": None}),
    "Mistral": (422, {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "{}"], "msg": "Extra"}]}}),
    "FastAPI": (422, {"detail": [{"loc": ["body", "{}"], "msg": "Extra inputs are not permitted"}]}),
    "in capitals": (400, refusal("INVALID VALUE: {}")),
}


@pytest.mark.parametrize(("vendor", "answer"), WORDINGS.items(), ids=WORDINGS.keys())
def test_refused_parameters_are_renamed_or_dropped_once_and_said(vendor, answer, tmp_path, capsys):
    status, body = answer

    def step_of(request):
        wrong = [key for key in ("max_tokens", "temperature") if key in request]
        name = wrong and (wrong[0].upper() if vendor == "in capitals" else wrong[0])
        return {"status": status, "body": json.loads(json.dumps(body).replace("{}", name))} if wrong else GOOD

    with Server() as server:
        server.step_of = step_of
        rows = generate(server, tmp_path, 60, temperature=0.5, top_p=0.9)
        assert len(rows) >= 60
        good = [request for request in server.requests if not {"max_tokens", "temperature"} & set(request)]
        assert len(good) == len(answers_of(tmp_path))
        assert all(request["max_completion_tokens"] == 3072 and request["top_p"] == 0.9 for request in good)
        said = capsys.readouterr().err
        assert said.count("refuses") == 2
        assert f"{name_of(server)}: refuses max_tokens 3072; from here on sending it as max_completion_tokens\n" in said
        assert f"{name_of(server)}: refuses temperature 0.5; from here on sent without it\n" in said
    assert {answer["attempts"] for answer in answers_of(tmp_path)} == {1}


def test_temperature_and_top_p_are_sent_where_they_are_given_and_of_both_one_may_stay(tmp_path):
    both = refusal("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")
    with Server() as server:
        server.step_of = lambda request: (
            {"status": 400, "body": both} if {"temperature", "top_p"} <= set(request) else GOOD
        )
        generate(server, tmp_path / "none", 5)
        assert not {"temperature", "top_p"} & set(server.requests[0]) and len(server.requests) == 1
        generate(server, tmp_path / "both", 5, temperature=1.0, top_p=1.0)
        assert server.requests[-1]["temperature"] == 1.0 and "top_p" not in server.requests[-1]


def test_a_server_that_refuses_both_names_of_the_limit_gets_none(tmp_path):
    with Server() as server:
        server.step_of = refusing("max_tokens", "max_completion_tokens")
        assert len(generate(server, tmp_path, 5)) == 7
        assert set(server.requests[-1]) & {"max_tokens", "max_completion_tokens"} == set()


# --- Prompts that are refused ----------------------------------------------------------------------------------------

PROMPT_REFUSED = {
    "Azure": (400, refusal("The response was filtered", code="content_filter", param="prompt")),
    "OpenAI": (400, refusal("Your request was rejected", code="content_policy_violation")),
    "OpenRouter": (403, {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"]}}}),
    "length": (400, refusal("This model's maximum context length is 99 tokens; max_tokens is 3072")),
    "length, vLLM": (400, {"object": "error", "message": "Please reduce the length of the messages", "code": 400}),
    "size": (413, refusal("Request too large: the prompt is too long")),
    "DashScope": (400, {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."}),
    "FastAPI": (422, {"detail": "the safety check of this prompt failed"}),
    "finish_reason": (200, completion(None, finish_reason="content_filter")),
}


@pytest.mark.parametrize(("status", "body"), PROMPT_REFUSED.values(), ids=PROMPT_REFUSED.keys())
def test_a_refused_prompt_is_skipped_and_never_asked_again(status, body, tmp_path):
    with Server(script={0: {"status": status, "body": body}}) as server:
        rows = generate(server, tmp_path, 20, num_parallel_requests=1)
        entries = answers_of(tmp_path)
        assert [("failed" in entry) for entry in entries] == [True, False, False, False]
        assert [row["request"] for row in rows[::7]] == [1, 2, 3]
        generate(server, tmp_path, 30, num_parallel_requests=1)
        prompts = [request["prompt"] for request in server.requests]
        assert len(prompts) == len(set(prompts)) == 6


def test_many_refused_prompts_in_a_row_end_the_run_with_the_cure(tmp_path):
    with Server(status=400, body=PROMPT_REFUSED["length"][1]) as server:
        said = refused(generate, server, tmp_path, patience=4, num_parallel_requests=2)
        assert "last 4 requests" in said and "context length" in said and "less --max_tokens" in said
        assert len(server.requests) <= 6 and all(request["max_tokens"] == 3072 for request in server.requests)


def test_a_first_400_with_other_words_ends_the_run(tmp_path):
    with Server(status=400, body=refusal("no such model")) as server:
        assert "has not answered once: HTTP 400: no such model" in refused(generate, server, tmp_path)
        assert len(server.requests) <= 5 and answers_of(tmp_path) == []


def test_an_answer_that_thinks_up_to_the_limit_is_not_bought_again(tmp_path):
    with Server(body=completion(None, finish_reason="length")) as server:
        said = refused(generate, server, tmp_path, num_parallel_requests=1)
        assert "--max_tokens 3072" in said and len(server.requests) == 1
        server.script = {1: GOOD, 2: {"body": completion(None)}, 3: {"body": completion(None)}}
        server.default = GOOD
        assert len(generate(server, tmp_path, 20, num_parallel_requests=1)) == 21
    assert [entry.get("failed", "") != "" for entry in answers_of(tmp_path)] == [False, True, False, False]
    assert answers_of(tmp_path)[1]["usage"]["completion_tokens"] == 400  # twice, not six times


# --- The server's own words, wherever they stand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "THE WORDS"}},
        {"error": "THE WORDS"},
        [{"error": {"code": 500, "message": "THE WORDS", "status": "INTERNAL"}}],
        {"detail": "THE WORDS"},
        {"detail": [{"loc": ["body"], "msg": "THE WORDS"}]},
        {"message": "THE WORDS"},
        {"object": "error", "message": {"detail": [{"msg": "THE WORDS"}]}},
        {"error": {"message": "Provider returned error", "metadata": {"raw": "THE WORDS"}}},
        "THE WORDS",
    ],
)
@pytest.mark.parametrize("status", [500, 200])
def test_the_words_of_a_server_are_shown(status, body, tmp_path):
    with Server(status=status, body=body) as server:
        said = refused(generate, server, tmp_path, max_retries=0, num_parallel_requests=1)
        assert "THE WORDS" in said and "Traceback" not in said


# --- Rate limits -----------------------------------------------------------------------------------------------------


class Limiter:
    """Lets `count` requests pass in any `seconds`, as a server does; refuses others with `refusal`."""

    def __init__(self, count, seconds, message="Rate limit reached: slow down", **step):
        self.count, self.seconds, self.passed, self.refused = count, seconds, [], 0
        self.step = {"status": 429, "body": refusal(message, code="rate_limit_exceeded"), **step}

    def __call__(self, request):
        recent = [when for when in self.passed if when > request["when"] - self.seconds]
        if len(recent) >= self.count:
            self.refused += 1
            return self.step
        self.passed.append(request["when"])
        return None


@pytest.mark.parametrize("needed", [9, pytest.param(20, marks=pytest.mark.slow)])
def test_a_rate_limit_without_a_word_about_time_costs_few_requests_and_no_number(needed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate_instruction, "RATE_PAUSE_S", 1.0)
    monkeypatch.setattr(generate_instruction, "GAP_S", 0.05)
    with Server(count=20) as server:
        server.step_of = limiter = Limiter(3, 0.9)
        generate(server, tmp_path, 19 * needed, max_retries=0, num_parallel_requests=5)
        assert len(server.requests) <= 1.2 * needed, len(server.requests)
    entries = answers_of(tmp_path)
    assert sorted(entry["request"] for entry in entries) == list(range(needed)) and limiter.refused >= 1
    assert not any("failed" in entry for entry in entries) and {entry["attempts"] for entry in entries} == {1}
    assert "all requests wait 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "step",
    [
        {"headers": {"Retry-After": "1"}},
        {"headers": {"retry-after-ms": "700"}},
        {"message": "Rate limit reached for m on requests per day. Please try again in 700ms."},
    ],
)
def test_the_time_that_a_rate_limit_names_is_waited_by_all(step, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_instruction, "RATE_PAUSE_S", 30)
    with Server(count=20) as server:
        server.step_of = limiter = Limiter(3, 0.6, **step)
        generate(server, tmp_path, 19 * 6, max_retries=0, num_parallel_requests=5)
        refusals = [r["when"] for r in server.requests if r["when"] not in limiter.passed]
        assert not [r for r in server.requests if refusals[0] + 0.2 < r["when"] < refusals[0] + 0.6]
    assert [entry["request"] for entry in sorted(answers_of(tmp_path), key=lambda e: e["request"])] == list(range(6))


BILLING = "Rate limit reached for gpt-4o-mini: Limit 3, Used 3. Visit https://platform.example/settings/billing."


def test_a_rate_limit_that_speaks_of_billing_is_no_lack_of_credit(tmp_path):
    limited = {"status": 429, "body": refusal(BILLING, code="rate_limit_exceeded", kind="requests")}
    with Server(script={1: limited}) as server:
        assert len(generate(server, tmp_path, 20)) == 21


@pytest.mark.parametrize("code", "insufficient_quota billing_hard_limit_reached billing_not_active".split())
def test_a_lack_of_credit_is_known_by_its_code(code, tmp_path):
    with Server(status=429, body=refusal("You may not.", code=code)) as server:
        said = refused(generate, server, tmp_path, num_parallel_requests=1)
        assert "no credit" in said and len(server.requests) == 1


def test_a_rate_limit_that_never_ends_ends_the_run(tmp_path, monkeypatch):
    with Server(script={0: GOOD}, status=429, body=refusal("slow down")) as server:
        said = refused(generate, server, tmp_path, timeout=1, num_parallel_requests=2)
        assert "slow down" in said and "the same command goes on" in said and len(server.requests) < 20
        server.default = GOOD
        assert len(rows_of(tmp_path)) == 7 and len(generate(server, tmp_path, 20)) == 21


def test_a_429_in_a_body_of_status_200_is_a_rate_limit(tmp_path, capsys):
    with Server(script={0: {"body": refusal("upstream limit", code=429)}}) as server:
        assert len(generate(server, tmp_path, 5, max_retries=0)) == 7
    assert "all requests wait" in capsys.readouterr().err


# --- Forms of requests and answers -----------------------------------------------------------------------------------


def test_content_as_a_list_of_parts_is_joined_without_reasoning(tmp_path):
    task = TASK.format("lamp", "a light")
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": task[:9]}]
    with Server(body=completion([*parts, {"type": "text", "text": task[9:]}])) as server:
        assert generate(server, tmp_path, 1)[0]["output"] == "a light"


def test_extra_body_is_sent_and_recorded(tmp_path, monkeypatch):
    with Server() as server:
        generate(server, tmp_path, 5, extra_body='{"enable_thinking": false, "top_k": 3}')
        assert server.requests[0]["enable_thinking"] is False and server.requests[0]["top_k"] == 3
        assert "--extra_body [1]" in refused(generate, server, tmp_path, extra_body="[1]")
        assert "--extra_body {" in refused(generate, server, tmp_path, extra_body="{")
        run_script(["--output_dir", tmp_path / "b", "--base_url", server.url, "--extra_body", '{"x": 1}',
                    "--num_instructions_to_generate", 5], code=0)  # fmt: skip
        assert server.requests[-1]["x"] == 1
    assert journal_of(tmp_path)[0]["run"]["asked"]["extra_body"] == {"enable_thinking": False, "top_k": 3}


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_streams(endpoint, tmp_path):
    with Server() as server:
        whole = generate(server, tmp_path / "whole", 20, endpoint=endpoint)
        server.script = {len(server.requests): {"fault": "cut"}}
        assert generate(server, tmp_path / "stream", 20, endpoint=endpoint, stream=True) == whole
        assert server.requests[-1]["stream"] is True
        assert server.requests[-1]["stream_options"] == {"include_usage": True}
    entries = answers_of(tmp_path / "stream")
    assert sorted(entry["attempts"] for entry in entries) == [1, 1, 2]  # whichever request came first
    assert all(entry["usage"] == {"prompt_tokens": 100, "completion_tokens": 200} for entry in entries)
    assert journal_of(tmp_path / "stream")[0]["run"]["asked"]["stream"] is True


ODD_STREAMS = {
    "connection lost": (b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n', "truncated"),
    "half an event": (b'data: {"choices": [', None),
    "no JSON": (b"data: {oops}\n\n", None),
    "an error": (b'data: {"error": {"message": "mid way", "code": 502}}\n\n', None),
    "no stream": (b'{"choices": []}', None),
    "no delta": (b'data: {"choices": [{"index": 0, "delta": null}]}\n\n', None),
    "a list": (b"data: [1]\n\n", None),
    "null": (b"data: null\n\n", None),
    "no events": (b"data: [DONE]\n\n", None),
}


@pytest.mark.parametrize(("raw", "fault"), ODD_STREAMS.values(), ids=ODD_STREAMS.keys())
def test_a_stream_that_breaks_off_is_a_failed_attempt(raw, fault, tmp_path):
    step = {"raw": raw, "fault": fault, "headers": {"Content-Type": "text/event-stream"}}
    with Server(script={0: step}) as server:
        assert len(generate(server, tmp_path, 5, stream=True)) == 7
    assert answers_of(tmp_path)[0]["attempts"] == 2


def test_stream_options_that_are_refused_are_dropped(tmp_path):
    with Server() as server:
        server.step_of = refusing("stream_options")
        assert len(generate(server, tmp_path, 5, stream=True)) == 7


@pytest.mark.parametrize("words", ["This model only supports stream mode.", "parameter.enable_thinking must be false"])
def test_a_server_that_only_streams_or_thinks_is_told_apart(words, tmp_path):
    with Server(status=400, body=refusal(words)) as server:
        assert "--stream" in refused(generate, server, tmp_path)


def test_azure_has_a_query_and_its_own_header(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-secret")
    with Server() as server:
        server.url = server.url.replace("/v1", "/openai/deployments/D?api-version=V")
        assert len(generate(server, tmp_path, 5)) == 7
        request = server.requests[0]
    assert request["path"] == "/openai/deployments/D/chat/completions?api-version=V"
    assert request["api_key"] == "azure-secret"


def test_the_older_name_of_the_variable_is_read(tmp_path, monkeypatch):
    with Server() as server:
        run_script(["--output_dir", tmp_path, "--num_instructions_to_generate", 5], code=0, OPENAI_API_BASE=server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "socks4://127.0.0.1:9"])
def test_a_proxy_does_not_stand_before_this_machine(proxy, tmp_path):
    with Server() as server:
        words = ["--output_dir", tmp_path, "--num_instructions_to_generate", 5, "--base_url", server.url]
        run_script(words, code=0, ALL_PROXY=proxy)
        assert len(server.requests) == 1


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks4://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_one_line(proxy, tmp_path):
    words = ["--output_dir", tmp_path, "--base_url", "http://models.invalid/v1"]
    said = run_script(words, code=2, ALL_PROXY=proxy).stderr
    assert said.count("\n") == 1 and "ALL_PROXY" in said


# --- All together ----------------------------------------------------------------------------------------------------


def test_every_quirk_in_one_run_costs_at_most_a_tenth_more_tokens(tmp_path):
    """The server counts what it is paid for: every completion that it sends, with or without text."""
    quirks = [step for key, (step, _) in PASSING.items() if key not in ("hang", "drip", "content a dict")]
    quirks += [{"status": status, "body": body} for status, body in PROMPT_REFUSED.values()]
    quirks += [{"status": 429, "body": refusal(BILLING)}, {"status": 429, "headers": {"Retry-After": "0"}, "body": {}}]
    quirks += [{"body": completion(None, finish_reason="length")}]
    paid = []

    def pay(request, step):
        body = step.get("body")
        is_completion = body is None and "raw" not in step and step.get("fault") is None
        paid.append(
            200 if is_completion or (isinstance(body, dict) and body.get("usage") and body.get("choices")) else 0
        )

    totals = []
    for script in ({}, {3 + 2 * i: quirk for i, quirk in enumerate(quirks)}):
        with Server() as server:

            def step_of(request, server=server, script=script):
                if "temperature" in request:
                    return {"status": 400, "body": refusal("`temperature` is deprecated for this model.")}
                step = script.get(len(server.requests) - 1, {})
                pay(request, step)
                return step

            server.step_of = step_of
            rows = generate(
                server, tmp_path / str(len(script)), 450, num_parallel_requests=1, temperature=1.0, timeout=5
            )
            assert len(rows) >= 450 and len(server.requests) > max(script, default=0)
        totals.append(sum(paid))
        paid.clear()
    assert totals[0] < totals[1] <= 1.1 * totals[0], totals


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
    for reason, kept in (("length", 0), ("stop", 1), ("eos", 1), (None, 1), ("content_filter", 0)):
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
