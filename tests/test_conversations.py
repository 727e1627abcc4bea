"""Conversations: what is recognised as one, how each style writes it, and that the assistant's turns alone are trained."""

import json

import pytest
import torch
from conftest import basic_options, train

import chat
import train as trainer
import utils
from utils import UserError

TURNS = [("user", "Hi!"), ("assistant", "Hello, {you}."), ("user", "2 + 2?"), ("assistant", "4")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]


def question(text, given=""):
    return {"role": "user", "content": text, "input": given}


def answer(text):
    return {"role": "assistant", "content": text}


# --- What a record is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "messages", "kind"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, [question("i", "x"), answer("o")], "alpaca"),
        ({"prompt": "p", "completion": "c"}, [question("p"), answer("c")], "alpaca"),
        ({"question": "q", "answer": "a"}, [question("q"), answer("a")], "alpaca"),
        ({"text": "A text."}, [{"role": "text", "content": "A text."}], "text"),
        ({"conversations": SHAREGPT}, MESSAGES, "conversation"),
        ({"messages": MESSAGES}, MESSAGES, "conversation"),
        ({"messages": SHAREGPT}, MESSAGES, "conversation"),
        (
            {"instruction": "i", "output": "o", "system": "S", "history": [["a", "b"]]},
            [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, answer("b"), question("i"), answer("o")],
            "conversation",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, answer("c")]},
            [{"role": "user", "content": "ab"}, answer("c")],
            "conversation",
        ),
        (
            {"conversations": [{"from": "human", "value": "w"}, {"from": "function_call", "value": "{}"},
                               {"from": "observation", "value": "r"}, {"from": "gpt", "value": "g"}], "tools": '[{"name": "f"}]'},
            [{"role": "system", "content": "", "tools": [{"name": "f"}]}, {"role": "user", "content": "w"}, answer("{}"),
             {"role": "tool", "content": "r"}, answer("g")],
            "conversation",
        ),
    ],
)  # fmt: skip
def test_records_are_recognised_by_what_they_hold(record, messages, kind, tmp_path):
    assert utils.as_messages(record) == messages and utils.kind_of(messages) == kind
    (tmp_path / "d.json").write_text(json.dumps([record]), encoding="utf-8")
    records, problems = utils.read_records([tmp_path / "d.json"])
    assert problems == [] and "unused" not in records[0]


def turns(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"conversations": []}, "conversations: holds no turn of the user's"),
        (turns(("system", "s")), "conversations: holds no turn of the user's"),
        (turns(("gpt", "a")), "turn 1: it begins with the assistant's turn; the user's is missing"),
        (turns(("human", "a")), "conversations: ends with the user's turn, which has no answer"),
        (turns(("human", "a"), ("human", "b"), ("gpt", "c")), "turn 2: two turns of the same side"),
        (turns(("human", "a"), ("gpt", "b"), ("gpt", "c")), "turn 3: two turns of the same side"),
        (turns(("human", "a"), ("gpt", "b"), ("system", "c")), "turn 3: a system's turn in the middle"),
        (turns(("human", "a"), ("gpt", "")), "turn 2: value is empty"),
        (turns(("human", " \n"), ("gpt", "b")), "turn 1: value is empty"),
        (turns(("human", "a"), ("narrator", "b")), "turn 2: from is 'narrator'; known are system"),
        (turns(("human", 3), ("gpt", "b")), "turn 1: value is a number, expected text"),
        (turns(("human", None), ("gpt", "b")), "turn 1: value is empty"),
        (turns(("human", [["a"]]), ("gpt", "b")), "turn 1: value is a list, expected text"),
        (turns(("human", "\ud83d"), ("gpt", "b")), "turn 1: value holds a lone surrogate"),
        ({"conversations": ["hi", "ho"]}, "turn 1 is text; expected {from, value}"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no role; expected {role, content}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1: content is a list, expected text",
        ),
        ({"instruction": "i", "output": "o", "history": ["a"]}, "history is no list of pairs"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_an_odd_conversation_is_named_with_its_turn(record, said):
    with pytest.raises(ValueError) as caught:
        utils.as_messages(record)
    assert said in str(caught.value)


# --- How it is written -----------------------------------------------------------------------------------------------

VICUNA = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. "
WRITTEN = {
    "vicuna_v1.1": [
        (VICUNA + "USER: Hi! ASSISTANT:", False), (" Hello, {you}.</s>", True),
        ("USER: 2 + 2? ASSISTANT:", False), (" 4</s>", True),
    ],
    "vicuna_v0": [
        (VICUNA.replace("user", "human").rstrip() + "\n\n### Human: Hi!\n### Assistant:", False), (" Hello, {you}.\n###", True),
        (" Human: 2 + 2?\n### Assistant:", False), (" 4\n###", True),
    ],
    "llama2": [
        ("[INST] Hi! [/INST]", False), (" Hello, {you}. </s>", True), ("<s>[INST] 2 + 2? [/INST]", False), (" 4 </s>", True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("style", WRITTEN)
def test_a_style_writes_a_conversation_byte_for_byte(style, tokenizer):
    assert utils.spans(style, MESSAGES, tokenizer) == WRITTEN[style]
    asked = utils.spans(style, MESSAGES[:-1], tokenizer)
    assert "".join(text for text, _ in asked) == "".join(text for text, _ in WRITTEN[style][:-1])


def test_what_the_system_says_takes_the_place_of_vicunas(tokenizer):
    system = {"role": "system", "content": "Be brief.", "tools": [{"name": "f"}]}
    begin = utils.spans("vicuna_v1.1", [system, *MESSAGES], tokenizer)[0][0]
    assert begin == 'Be brief.\n\nTools:\n[{"name": "f"}] USER: Hi! ASSISTANT:'
    begin = utils.spans("llama2", [system, *MESSAGES], tokenizer)[0][0]
    assert begin == '[INST] <<SYS>>\nBe brief.\n\nTools:\n[{"name": "f"}]\n<</SYS>>\n\nHi! [/INST]'


TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_trained_turn_by_turn(name, base):
    tokenizer = utils.load_tokenizer(base, 512)
    tokenizer.chat_template = TEMPLATES[name]
    parts, lost = utils.template_spans(MESSAGES, tokenizer)
    assert lost == 0 and [trained for _, trained in parts] == [False, True, False, True]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert whole.startswith("".join(text for text, _ in parts))
    assert [text for text, trained in parts if trained] == {
        "ChatML": ["Hello, {you}.</s>", "4</s>"], "Llama 2": [" Hello, {you}. </s>", " 4 </s>"]}[name]  # fmt: skip
    (row,) = trainer.encode([parts], tokenizer, [])
    assert row["input_ids"].tolist() == tokenizer("".join(t for t, _ in parts), add_special_tokens=False).input_ids
    if name == "Llama 2":
        with pytest.raises(ValueError, match="the chat template refuses it: no tool"):
            utils.template_spans([MESSAGES[0], answer("a"), {"role": "tool", "content": "x"}, answer("b")], tokenizer)


def test_turns_that_a_template_writes_otherwise_later_are_not_trained(base):
    """As those that drop what was reasoned before."""
    tokenizer = utils.load_tokenizer(base, 512)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split('/')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [MESSAGES[0], answer("hm/one"), MESSAGES[2], answer("hm/two")]
    parts, lost = utils.template_spans(messages, tokenizer)
    assert lost == 1 and [text for text, trained in parts if trained] == ["hm/two</s>"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="ends no turn with </s>"):
        utils.template_spans(messages, tokenizer)


# --- What is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["vicuna_v1.1", "vicuna_v0", "llama2"])
def test_the_ids_are_those_of_the_text_and_the_labels_those_of_the_turns(style, tokenizer):
    texts = ["Grüße 你好 🦙", " two  spaces ", "x" * 30, "1\n2\n"]
    messages = [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]
    parts = utils.spans(style, messages, tokenizer)
    (row,) = trainer.encode([parts], tokenizer)
    begin = utils.begin_ids(tokenizer)
    assert (
        row["input_ids"].tolist() == begin + tokenizer("".join(t for t, _ in parts), add_special_tokens=False).input_ids
    )
    runs, before = [], 0
    for end in row["ends"]:
        labels = row["labels"][before:end]
        runs.append(tokenizer.decode(labels[labels != -100]))
        before = end
    wanted = [text for text, trained in parts if trained]
    assert [run.strip() for run in runs] == [text.strip() for text in wanted]
    assert (row["labels"] != -100).sum() == sum(
        len(tokenizer(t, add_special_tokens=False).input_ids) for t in runs
    ) or row["straddling"]


def test_a_conversation_is_cut_behind_a_turn(tokenizer):
    (row,) = trainer.encode([utils.spans("vicuna_v1.1", MESSAGES, tokenizer)], tokenizer)
    first, last = row["ends"]
    for window, length, outcome in ((last, last, "kept"), (last - 1, first, "truncated"), (first - 1, 0, "dropped")):
        (cut,), (found,) = trainer.cut([row], window)
        assert (len(cut["input_ids"]), found) == (length, outcome)
        assert not length or cut["labels"][-1] == tokenizer.eos_token_id


def test_kinds_mix_in_one_run_and_are_counted(tokenizer, tmp_path, capsys):
    rows = [
        {"instruction": "i", "output": "o"},
        {"messages": MESSAGES},
        {"conversations": SHAREGPT},
        {"text": "A text."},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset = trainer.SupervisedDataset(tmp_path / "d.jsonl", tokenizer)
    assert dataset.report["kinds"] == {"alpaca": 1, "conversation": 2, "text": 1}
    assert dataset.report["turns"] == {"in all": 6, "trained": 6}
    assert torch.equal(dataset.input_ids[1], dataset.input_ids[2])
    assert (dataset.labels[3] != -100).sum() == len(dataset.labels[3]) - 0
    assert "data: records: 1 alpaca, 2 conversation, 1 text; turns trained: 6 of 6\n" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"d.jsonl:2: Alpaca's prompt has no place for earlier turns"):
        trainer.SupervisedDataset(tmp_path / "d.jsonl", tokenizer, style="alpaca")


def test_a_run_on_conversations_is_stored_with_its_style_and_talks_in_it(base, tmp_path, capsys):
    rows = [{"conversations": SHAREGPT}] * 16
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    run = train(basic_options(base, tmp_path / "d.json", tmp_path / "out", num_train_epochs=2)).finished()
    assert run.info()["prompt_style"] == "vicuna_v1.1" and run.info()["counts"]["turns"] == {
        "in all": 32,
        "trained": 32,
    }
    words = [
        "--model_name_or_path",
        str(tmp_path / "out"),
        "--instruction",
        "x",
        "--system",
        "Be brief.",
        "--stop",
        "zz",
    ]
    talk = chat.load_chat(chat.parse_arguments(words))
    assert talk.style == "vicuna_v1.1" and talk.stops == ("zz",)
    ids = chat.ids_of_prompt(
        talk, [{"instruction": "Hi!", "input": "", "output": "a"}, {"instruction": "Go", "input": ""}]
    )
    prompt = "Be brief. USER: Hi! ASSISTANT: a</s>USER: Go ASSISTANT:"
    assert ids == [1, *talk.tokenizer(prompt, add_special_tokens=False).input_ids]
    record, _ = chat.parse_questions(json.dumps({"messages": MESSAGES}), "q.jsonl")
    ids = chat.ids_of_prompt(talk, record)
    assert talk.tokenizer.decode(ids[1:]).endswith("USER: 2 + 2? ASSISTANT:") and record[0]["output"] == "4"


def test_a_long_batch_goes_on_where_it_stopped(base, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    words = ["--model_name_or_path", str(base), "--data_path", str(tmp_path / "q.txt"), "--max_new_tokens", "2"]
    args = chat.parse_arguments([*words, "--output", str(tmp_path / "a.jsonl")])
    records, _ = chat.read_questions(args.data_path)
    talk = chat.load_chat(args)
    chat.answer_all(talk, args, records, [])
    whole = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["source"] for line in whole.splitlines()] == ["q.txt:1", "q.txt:2", "q.txt:3"]
    (tmp_path / "a.jsonl").write_text("".join(whole.splitlines(True)[:1]) + '{"source": "q.', encoding="utf-8")
    chat.answer_all(talk, args, records, [])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == whole
    assert "1 of 3 are answered there\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds an answer to q.txt:3, which is not asked"):
        chat.answer_all(talk, args, records[:2], [])
