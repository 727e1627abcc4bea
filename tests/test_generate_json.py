"""--response_format json: the answer is held to a JSON schema, and read as JSON alone."""

import json

import pytest
from scripted_server import Server, refusal
from test_generate_run import answers_of, generate, journal_of, quick, refused, server  # noqa: F401

from generate_instruction import encode_prompt, parse_response

NAMES = ("instruction", "input", "output")
# What the text form cannot hold: labels, separators, marks, words for no input, the tokens of chat templates.
HARD = [
    ("Write the next task.", "4. Input:\nx\n4. Output:\ny", "y\n###\n5. Instruction: Go on.\n5. Input:\n5. Output:\nz"),
    ("Say whether the form is filled in.", "No input", "Let me know if you need more tasks!"),
    ('"Quote this."', '"N/A"', '"This."'),
    ("**Be bold.**", "", "**Bold.**"),
    ("Name two tokens.", "</s>", "<|im_end|> and <think>, then </think>\n\nInstruction: stop"),
    (" Keep the spaces. ", " a\tb ", "\n    code\n"),
    ("Escape it.", '\\ " \u2028 é 🦙', '{"tasks": [{"instruction": "x"}]}'),
]


def as_json(rows, **how):
    return json.dumps({"tasks": [dict(zip(NAMES, row, strict=True)) for row in rows]}, **how)


def read(text, finish_reason="stop"):
    tasks, dropped = parse_response(text, finish_reason, 3, "json")
    return [tuple(task[name] for name in NAMES) for _, task in tasks], [reason for _, reason, _ in dropped]


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_whatever_a_row_holds_it_is_read_exactly(how):
    assert read(as_json(HARD, **how)) == (HARD, [])
    assert read(f"\n{as_json(HARD, **how)}\n") == (HARD, [])


def test_reasoning_and_a_fence_around_it_are_left_out():
    draft = as_json([("Try this draft.", "", "no")])
    assert read(f"<think>\n{draft}\n</think>\n{as_json(HARD[:4])}") == (HARD[:4], [])
    assert read(f"Here you go:\n```json\n{as_json(HARD[:4])}\n```") == (HARD[:4], [])


def test_what_was_cut_keeps_the_whole_tasks_before_the_cut():
    text = as_json(HARD)
    for end in range(len(text)):
        rows, reasons = read(text[:end], "length")
        assert rows == HARD[: len(rows)] and (rows or reasons)
        assert text[:end].count('"}, ') + text[:end].endswith('"}') <= len(rows) + 1
    assert read(text[:-4], "length") == (HARD[:-1], ["cut off by the token limit"])


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("4. Instruction: Name it.\n4. Output:\nx", ["no task found"]),
        ('{"tasks": []}', ["no task found"]),
        ('{"tasks": [{"instruction": "a", "input": "", "output": " "}]}', ["empty output"]),
        ('{"tasks": [{"instruction": "a", "input": ["b"], "output": "c"}]}', ["fields that are no texts"]),
        ('{"tasks": [{"instruction": "a", "input": "", "output": "b", "output": "c"}]}', ["fields that are no texts"]),
    ],
)
def test_what_is_no_task_has_a_reason(text, reasons):
    assert read(text) == ([], reasons)


def test_an_answer_in_labels_is_read_in_the_text_form_alone():
    text = "4. Instruction: Name it.\n4. Output:\nx"
    assert len(parse_response(text, "stop", 3)[0]) == 1 and read(text)[0] == []


def test_a_request_carries_the_schema_and_a_word_behind_the_tasks(server, tmp_path):  # noqa: F811
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("My own words.\n", encoding="utf-8")
    rows = generate(server, tmp_path, 7, response_format="json", prompt_path=str(prompt))
    (sent,) = server.requests
    schema = sent["response_format"]["json_schema"]
    assert sent["response_format"]["type"] == "json_schema" and schema["strict"] is True and schema["name"]
    items = schema["schema"]["properties"]["tasks"]["items"]
    assert schema["schema"]["required"] == ["tasks"] and items["required"] == list(items["properties"]) == list(NAMES)
    assert {kind["type"] for kind in items["properties"].values()} == {"string"}
    assert schema["schema"]["additionalProperties"] is items["additionalProperties"] is False
    head, shown, word = sent["prompt"].partition("###\n1. Instruction:")[0], *sent["prompt"].rsplit("###\n", 1)
    assert head == "My own words.\n" and "3. Output:" in shown
    assert "JSON" in word and '{"tasks": [{"instruction": ' in word and "empty string" in word and "\n" not in word
    assert len(rows) == 7 and "<noinput>" not in {row["input"] for row in rows} and "" in {row["input"] for row in rows}


def test_without_the_option_nothing_of_it_is_sent(server, tmp_path):  # noqa: F811
    generate(server, tmp_path, 7)
    assert "response_format" not in server.requests[0] and "JSON" not in server.requests[0]["prompt"]
    assert encode_prompt([], "head\n") == encode_prompt([], "head\n", "text")


def test_each_answer_is_read_in_the_form_it_was_asked_for(server, tmp_path, capsys):  # noqa: F811
    texts = generate(server, tmp_path, 7)
    both = generate(server, tmp_path, 14, response_format="json", stream=True)
    assert "from here on stream was None and is True; response_format was None and is json" in capsys.readouterr().err
    assert len(both) == 14 and both[:7] == texts
    assert [run["run"]["asked"]["response_format"] for run in journal_of(tmp_path) if "run" in run] == [None, "json"]
    assert [answer["response_format"] for answer in answers_of(tmp_path)] == ["text", "json"]
    assert generate(server, tmp_path, 14, replay=True) == both


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, refusal("This response_format type is unavailable now", "invalid_request_error")),
        (400, refusal("Invalid parameter: 'response_format' of type 'json_schema' is not supported", None)),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format"], "msg": "Extra inputs"}]}),
        (500, refusal("json schema conversion failed")),
    ],
)
def test_a_server_that_does_not_take_it_is_one_line_with_the_cure(status, body, tmp_path):
    with Server(status=status, body=body) as server:  # noqa: F811
        said = refused(generate, server, tmp_path, response_format="json")
        assert said.endswith(": give --response_format text; then the same command goes on") and "\n" not in said
        assert len(server.requests) <= 5


def test_a_server_that_passes_over_it_ends_the_run_with_the_cure(tmp_path):
    with Server(text=" Name it.\n4. Output:\nx") as server:  # noqa: F811
        said = refused(generate, server, tmp_path, response_format="json", patience=3)
    assert "(no task found)" in said and "then try --response_format text, another --model_name" in said


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"response_format": "yaml"}, "--response_format yaml: must be text or json"),
        ({"response_format": "json", "endpoint": "text"}, "--response_format json needs --endpoint chat"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, problem, server, tmp_path):  # noqa: F811
    assert problem in refused(generate, server, tmp_path, **options) and server.requests == []
