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
        (turns(("human", True), ("gpt", "b")), "turn 1: value is true, expected text"),
        (turns(("human", {"text": "a"}), ("gpt", "b")), "turn 1: value is an object, expected text"),
        (turns(("human", [{"type": "text"}]), ("gpt", "b")), "turn 1: value is a list, expected text"),
        (turns((None, "a"), ("gpt", "b")), "turn 1: from is None; known are system"),
        (turns((1, "a"), ("gpt", "b")), "turn 1: from is 1; known are system"),
        (turns(("", "a"), ("gpt", "b")), "turn 1: from is ''; known are system"),
        (
            turns(("observation", "a"), ("observation", "b"), ("gpt", "c")),
            "turn 2: two turns of the same side, the tool's",
        ),
        (turns(("human", "a"), ("observation", "b"), ("gpt", "c")), "turn 2: two turns of the same side, the user's"),
        (turns(("system", "a"), ("gpt", "b")), "turn 2: it begins with the assistant's turn"),
        (
            turns(("system", "a"), ("system", "b"), ("human", "c"), ("gpt", "d")),
            "turn 2: a system's turn in the middle",
        ),
        (turns(("human", "a"), ("gpt", "b"), ("human", "c")), "conversations: ends with the user's turn"),
        (turns(("human", "a"), ("gpt", "\t\n")), "turn 2: value is empty"),
        ({"conversations": [None]}, "turn 1 is null; expected {from, value}"),
        ({"conversations": [[{"from": "human", "value": "a"}]]}, "turn 1 is a list; expected {from, value}"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "turn 1: value is empty"),
        ({"conversations": {"from": "human", "value": "a"}}, "no instruction and no output; keys found: conversations"),
        ({"conversations": None}, "no instruction and no output; keys found: conversations"),
        ({"messages": "Hi"}, "no instruction and no output; keys found: messages"),
        ({**turns(("human", "a"), ("gpt", "b")), "tools": "[{"}, "tools: not valid JSON"),
        ({**turns(("human", "a"), ("gpt", "b")), "tools": {"name": "f"}}, "tools is an object, expected a list"),
        ({**turns(("human", "a"), ("gpt", "b")), "system": 3}, "system is a number, expected text"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": []}]},
            "turn 2",
        ),
        ({"prompt": "p", "completion": None}, "output is null, expected text"),
        ({"question": 3, "answer": "a"}, "instruction is a number, expected text"),
        ({"instruction": "i", "output": "o", "history": [["a", "b", "c"]]}, "history is no list of pairs"),
        ({"instruction": "i", "output": "o", "history": [["a", ""]]}, "turn 2: content is empty"),
        ({"text": ["a"]}, "text is a list, expected text"),
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


@pytest.mark.parametrize(
    "names",
    ["human gpt", "user assistant", "prompter assistant", "user chatgpt", "Human GPT", "user bard", "USER model"],
)
def test_the_roles_of_every_dialect_are_known(names):
    user, reply = names.split()
    record = {"conversations": [{"from": user, "value": "a"}, {"from": reply, "value": "b"}]}
    assert [message["role"] for message in utils.as_messages(record)] == ["user", "assistant"]
    for result in ("tool", "observation", "function", "function_response", "ipython"):
        more = [{"from": result, "value": "r"}, {"from": reply, "value": "c"}]
        assert utils.as_messages({"conversations": record["conversations"] + more})[2]["role"] == "tool"


def test_what_stands_beside_a_conversation_is_named_or_used():
    rows = [
        {"messages": MESSAGES, "text": "t", "prompt": "p"},
        {"prompt": "p", "response": "r", "history": [["a", "b"]], "input": "i", "tools": [{"name": "f"}]},
    ]
    records, problems = utils.read_records([("d.jsonl", "\n".join(map(json.dumps, rows)))])
    assert problems == [] and utils.unused_keys(records) == {"text": 1, "prompt": 1}
    assert records[1]["messages"] == [
        {"role": "system", "content": "", "tools": [{"name": "f"}]},
        {"role": "user", "content": "a"}, answer("b"), question("p", "i"), answer("r"),
    ]  # fmt: skip


CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"city": "Oslo"}'}}


def test_calls_have_objects_as_arguments_and_several_results_may_follow():
    results = [{"role": "tool", "content": text, "tool_call_id": "id"} for text in ("a", "b")]
    record = {
        "messages": [
            MESSAGES[0],
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            *results,
            MESSAGES[1],
        ]
    }
    messages = utils.as_messages(record)
    assert messages[1]["tool_calls"][0]["function"] == {"name": "look_up", "arguments": {"city": "Oslo"}}
    assert [message["role"] for message in messages[2:4]] == ["tool", "tool"] and messages[2]["tool_call_id"] == "id"
    assert utils.words_of(messages[1]).count('{"name": "look_up", "arguments": {"city": "Oslo"}}') == 2
    record["messages"].insert(3, results[0])
    with pytest.raises(ValueError, match="turn 5: two turns of the same side"):
        utils.as_messages(record)


@pytest.mark.parametrize("calls", [5, True, "text", {"name": "f"}, [None], [{"function": "f"}], [{"id": 1}]])
def test_calls_that_are_none_are_named(calls):
    record = {"messages": [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(ValueError, match="messages, turn 2: tool_calls"):
        utils.as_messages(record)


def test_null_is_what_parquet_writes_for_an_absent_key():
    record = {"instruction": None, "output": None, "messages": MESSAGES, "text": None}
    assert utils.as_messages(record) == MESSAGES
    assert utils.as_messages({"prompt": None, "completion": None, "text": "t"})[0]["role"] == "text"
    mixed = [{"from": None, "value": None, **message} for message in MESSAGES]
    assert utils.as_messages({"messages": mixed}) == MESSAGES


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


def template(user, reply, prompt, system="{{ raise_exception('no system') }}", begin=""):
    """A chat template of these parts; other roles are refused."""
    parts = {"system": system, "user": user, "assistant": reply}
    cases = "".join(f"{{% {'el' * (role != 'system')}if m.role == '{role}' %}}{part}" for role, part in parts.items())
    cases += "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    ask = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{begin}{{% for m in messages %}}{cases}{{% endfor %}}{ask}"


def turn_of(head, body, end):
    return f"{head}{{{{ {body} }}}}{end}"


CONTENT, STRIPPED = "m.content", "m.content.strip()"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {  # name: (template, end token, other special tokens, what an answer is trained as)
    "ChatML": (
        template(*(turn_of(f"<|im_start|>{role}\n", CONTENT, "<|im_end|>\n") for role in ("user", "assistant")),
                 "<|im_start|>assistant\n", turn_of("<|im_start|>system\n", CONTENT, "<|im_end|>\n")),
        "<|im_end|>", ["<|im_start|>"], "{}<|im_end|>"),
    "Llama 2": (
        template(turn_of("<s>[INST] ", STRIPPED, " [/INST]"), turn_of(" ", STRIPPED, " </s>"), ""), "</s>", [], " {} </s>"),
    "Llama 3": (
        template(*(turn_of(HEAD.format(role), STRIPPED, "<|eot_id|>") for role in ("user", "assistant")),
                 HEAD.format("assistant"), turn_of(HEAD.format("system"), STRIPPED, "<|eot_id|>"), "<|begin_of_text|>"),
        "<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], "{}<|eot_id|>"),
    "Zephyr": (
        template(*(turn_of(f"<|{role}|>\n", CONTENT, "</s>\n") for role in ("user", "assistant")), "<|assistant|>\n",
                 turn_of("<|system|>\n", CONTENT, "</s>\n")),
        "</s>", [], "{}</s>"),
    "Mistral": (template(turn_of("[INST] ", CONTENT, " [/INST]"), turn_of(" ", CONTENT, "</s>"), "", begin="<s>"),
                "</s>", [], " {}</s>"),
}  # fmt: skip


def with_template(base, name):
    """The tokenizer with one of TEMPLATES, and how that trains an answer."""
    tokenizer = utils.load_tokenizer(base, 512)
    text, end, special, trained = TEMPLATES[name]
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": special})
    tokenizer.chat_template = text
    return tokenizer, trained


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_trained_turn_by_turn(name, base):
    tokenizer, written = with_template(base, name)
    parts, lost = utils.template_spans(MESSAGES, tokenizer)
    assert lost == 0 and [trained for _, trained in parts] == [False, True, False, True]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert whole.startswith("".join(text for text, _ in parts))
    assert [text for text, trained in parts if trained] == [written.format("Hello, {you}."), written.format("4")]
    (row,) = trainer.encode([parts], tokenizer, [])
    assert row["input_ids"].tolist() == tokenizer("".join(t for t, _ in parts), add_special_tokens=False).input_ids
    assert row["input_ids"].tolist().count(1) == whole.count("<s>")  # no begin token but the template's own
    before = 0
    for end, text in zip(row["ends"], ("Hello, {you}.", "4"), strict=True):
        labels = row["labels"][before:end]
        assert tokenizer.decode(labels[labels != -100]).strip() == written.format(text).strip()
        assert labels[-1] == tokenizer.eos_token_id
        before = end
    if name in ("Llama 2", "Mistral"):
        with pytest.raises(ValueError, match="the chat template refuses it: no tool"):
            utils.template_spans([MESSAGES[0], answer("a"), {"role": "tool", "content": "x"}, answer("b")], tokenizer)
    else:
        system = {"role": "system", "content": "Be brief."}
        (begin, _), *_ = utils.template_spans([system, *MESSAGES], tokenizer)[0]
        assert "Be brief." in begin


@pytest.mark.parametrize(
    "texts", [("Hello, {you}.", "4"), ("Grüße 你好 🦙 <b>", "def f():\n    return 1\n"), ("a", "b c")]
)
def test_the_labels_are_the_librarys_own_mask_where_a_template_has_one(texts, base):
    tokenizer, _ = with_template(base, "ChatML")
    messages = [MESSAGES[0], answer(texts[0]), MESSAGES[2], answer(texts[1])]
    parts, _ = utils.template_spans(messages, tokenizer)
    (row,) = trainer.encode([parts], tokenizer, [])
    reply = turn_of("<|im_start|>assistant\n", CONTENT, "<|im_end|>\n")
    marked = reply.replace("{{ m", "{% generation %}{{ m")
    marked = marked.replace("<|im_end|>\n", "<|im_end|>{% endgeneration %}{{ '\n' }}")  # a newline behind a tag goes
    assert reply in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(reply, marked)
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    count = len(row["input_ids"])
    assert row["input_ids"].tolist() == found["input_ids"][:count] and sum(found["assistant_masks"][count:]) == 0
    assert (row["labels"] != -100).tolist() == [bool(one) for one in found["assistant_masks"][:count]]


FORGETFUL = (  # as Qwen3's, which drops what was reasoned before
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split('/')[-1] }}"
    "</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_turns_that_a_template_writes_otherwise_later_are_not_trained(base):
    tokenizer = utils.load_tokenizer(base, 512)
    tokenizer.chat_template = FORGETFUL
    messages = [MESSAGES[0], answer("hm/one"), MESSAGES[2], answer("hm/two")]
    parts, lost = utils.template_spans(messages, tokenizer)
    assert lost == 1 and [text for text, trained in parts if trained] == ["hm/two</s>"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="ends no turn with </s>.*set eos_token"):
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


def test_turns_add_up_and_no_answer_is_cut(base, tmp_path, capsys):
    """As trained, left out by the template, or cut off; of a single long answer nothing is left, of an Alpaca row a part."""
    tokenizer, long = utils.load_tokenizer(base, 4000), [MESSAGES[0], answer("a/word " * 200)]
    rows = [{"messages": [*MESSAGES, *long]}, {"messages": long}, {"messages": MESSAGES[:2]}]
    (row,) = trainer.encode([utils.spans("vicuna_v1.1", rows[0]["messages"], tokenizer)], tokenizer)
    (tmp_path / "d.json").write_text(json.dumps([*rows, {"instruction": "i", "output": "o " * 400}]), encoding="utf-8")
    dataset = trainer.SupervisedDataset(tmp_path / "d.json", utils.load_tokenizer(base, row["ends"][1] + 3))
    assert dataset.report["turns"] == {"in all": 6, "trained": 4, "left out by the template": 0, "cut off": 2}
    assert dataset.sources == ["d.json[0]", "d.json[2]", "d.json[3]"] and dataset.report["end_token_trained"] == 2
    assert "turns trained: 4 of 6 (2 cut off)" in capsys.readouterr().err
    tokenizer.chat_template = FORGETFUL
    turns = [*long, *long, *MESSAGES[:2]]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": turns}]), encoding="utf-8")
    dataset = trainer.SupervisedDataset(tmp_path / "d.json", tokenizer, style="chat_template")
    assert dataset.report["turns"] == {"in all": 3, "trained": 1, "left out by the template": 2, "cut off": 0}
    whole = trainer.SupervisedDataset(tmp_path / "d.json", tokenizer, style="vicuna_v0", train_all=True)
    assert torch.equal(whole.labels[0], whole.input_ids[0]) and whole.report["turns"]["trained"] == 3
    assert whole.report["end_token_trained"] == 1  # Vicuna v0's are ###, and no model is said not to stop


def test_a_tokenizer_that_trims_offsets_trains_the_same_turns(base):
    """Its spaces have no place in the text: no answer may be lost for that, and no question trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [VICUNA], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    rows = []
    for trims in (False, True):
        made.post_processor = processors.ByteLevel(trim_offsets=trims)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
        (row,) = trainer.encode([utils.spans("vicuna_v1.1", MESSAGES, tokenizer)], tokenizer, [])
        rows.append(row)
        trained = tokenizer.decode(row["input_ids"][row["labels"] != -100])
        assert trained == " Hello, {you}.</s> 4</s>" and len(row["ends"]) == 2
    assert torch.equal(rows[0]["labels"], rows[1]["labels"]) and rows[0]["ends"] == rows[1]["ends"]


def test_an_end_token_that_takes_the_line_break_behind_it_is_trained(base):
    from tokenizers import AddedToken

    tokenizer = utils.load_tokenizer(base, 512)
    text, end, special, _ = TEMPLATES["ChatML"]
    tokenizer.add_special_tokens(
        {"eos_token": AddedToken(end, special=True, rstrip=True), "additional_special_tokens": special}
    )
    tokenizer.chat_template = text
    messages = [MESSAGES[0], answer(f"say {end} to end"), *MESSAGES[2:]]
    (row,) = trainer.encode([utils.template_spans(messages, tokenizer)[0]], tokenizer, [])
    assert [int(row["labels"][end - 1]) for end in row["ends"]] == [tokenizer.eos_token_id] * 2 and not row[
        "straddling"
    ]
    assert "to end" in tokenizer.decode(row["labels"][: row["ends"][0]][row["labels"][: row["ends"][0]] != -100])


def test_what_a_template_leaves_out_is_named(base):
    tokenizer, _ = with_template(base, "ChatML")
    called = [MESSAGES[0], {**answer(""), "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}, answer("Fine.")]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% else %}{{ raise", "{% elif m.role == 'tool' %}{% else %}{{ raise"
    )
    with pytest.raises(ValueError, match="leaves out what turn 3, the tool's, says"):
        utils.template_spans(called, tokenizer)
    with pytest.raises(ValueError, match="leaves out the call of look_up"):
        utils.template_spans(called[:2], tokenizer)
    with pytest.raises(ValueError, match="leaves out the tool look_up"):
        utils.template_spans([{"role": "system", "content": "", "tools": [CALL["function"]]}, *MESSAGES], tokenizer)


def test_one_question_in_messages_is_alpacas_too_and_texts_begin_as_ever(base, tmp_path, capsys):
    rows = [{"messages": MESSAGES[:2]}, {"instruction": "i", "output": "o"}]
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = utils.load_tokenizer(base, 512)
    assert trainer.SupervisedDataset(tmp_path / "d.json", tokenizer, style="alpaca").report["kept"] == 2
    assert trainer.SupervisedDataset(tmp_path / "d.json", tokenizer, style="vicuna_v0").report["end_token_trained"] == 2
    tokenizer.chat_template = TEMPLATES["Zephyr"][0]
    (tmp_path / "d.json").write_text(json.dumps([*rows, {"text": "A text."}]), encoding="utf-8")
    dataset = trainer.SupervisedDataset(
        tmp_path / "d.json", tokenizer, sentencepiece_path=base / "tokenizer.model", style="chat_template"
    )
    assert dataset.input_ids[2][0] == tokenizer.bos_token_id and dataset.input_ids[0][0] != tokenizer.bos_token_id


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
    none = {"left out by the template": 0, "cut off": 0}
    assert dataset.report["turns"] == {"in all": 6, "trained": 6} | none
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
        "in all": 32, "trained": 32, "left out by the template": 0, "cut off": 0,
    }  # fmt: skip
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
