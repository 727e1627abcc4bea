"""chat.py: the prompt is the training prompt, the text is whole, answers end where they should, nothing is lost."""

import codecs
import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, render_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import chat
import train as trainer
import utils
from utils import UserError

# Two questions as Chinese users put them, plain and with the template around them.
ZH = "用三句话介绍一下长城。"
ZH_INPUT = ("把下面的句子翻译成英文。", "今天的天气很好🙂")


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# --- A model that says what a test wants -----------------------------------------------------------------------------


def write_script(folder, base, tokens, ends=True):
    """Write a LLaMA that says `tokens` after a prompt ending in ":", then its end token, or all again for ever.

    Its only layer adds nothing, and the head maps each token's embedding to the token that follows it; so no token
    may stand in `tokens` twice.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert len(set(ids)) == len(ids) and tokenizer.unk_token_id not in ids
    colon = tokenizer("### Response:").input_ids[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    layer, rows = model.model.layers[0], torch.randn(len(tokenizer), 256)
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_(), model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.copy_(rows)
        last = tokenizer.eos_token_id if ends else ids[0]
        for token, following in zip([colon, *ids], [*ids, last], strict=True):
            model.lm_head.weight[following] += rows[token]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def spell(text):
    """A text as LLaMA's byte tokens."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]


@pytest.fixture(scope="module")
def chinese(base, tmp_path_factory):
    """A model that answers 中文🦙 in byte tokens, and then "▁the"."""
    return write_script(tmp_path_factory.mktemp("chinese") / "model", base, [*spell("中文🦙"), "▁the"])


@pytest.fixture(scope="module")
def endless(base, tmp_path_factory):
    """A model that says "a the" for ever."""
    return write_script(tmp_path_factory.mktemp("endless") / "model", base, ["a", "▁the"], ends=False)


@pytest.fixture(scope="module")
def hostile(base, tmp_path_factory):
    """A model that answers with a title for the terminal, an eight-bit CSI, a return and a Chinese character."""
    text = "\x1b]0;a\x07\x9b\r\t中\n!"
    return write_script(tmp_path_factory.mktemp("hostile") / "model", base, spell(text)), text


@pytest.fixture
def ask(monkeypatch, capsys):
    """Run chat.py in this process: ask(words, stdin=...) gives (stdout, stderr); errors are raised."""
    state = torch.get_rng_state()

    def run(*words, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            chat.main()
        finally:
            run.out, run.err = capsys.readouterr()
        return run.out, run.err

    yield run
    torch.set_rng_state(state)


def prompt_text(style, turns, tokenizer=None):
    """What the model reads before it answers the last of `turns`."""
    messages = [message for turn in turns[:-1] for message in utils.as_messages(turn)]
    messages += utils.as_messages(turns[-1], needs_answer=False)
    return "".join(text for text, _ in utils.spans(style, messages, tokenizer))


def load(folder, *words):
    words = ["--model_name_or_path", str(folder), *words]
    return chat.load_chat(chat.parse_arguments(words))


# --- Prompts ---------------------------------------------------------------------------------------------------------

TURNS = [{"instruction": "Hello!", "input": "", "output": "Hi."}, {"instruction": "How {are} you?", "input": "1\n2"}]
V0 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.\n\n### Human: Hello!\n### Assistant: Hi.\n### Human: How {are} you?"
    "\n\n1\n2\n### Assistant:"
)
V11 = (  # what fschat 0.2.36 gives
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Hello! ASSISTANT: Hi.</s>USER: How {are} you?\n\n1\n2 ASSISTANT:"
)


def test_vicuna_prompts_byte_for_byte():
    assert prompt_text("vicuna_v0", TURNS) == V0
    assert prompt_text("vicuna_v1.1", TURNS) == V11


def test_alpaca_asks_for_the_last_turn_alone():
    assert prompt_text("alpaca", TURNS) == render_prompt(TURNS[-1])
    assert render_prompt(TURNS[-1]).endswith("### Instruction:\nHow {are} you?\n\n### Input:\n1\n2\n\n### Response:")


def test_an_answer_may_end_with_its_first_token():
    answer = chat.Answer(lambda token_id: b"x", frozenset({2}))
    answer.add(2)
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("", "end_token", 1)


def test_a_chat_template_is_the_tokenizers_own(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    message = refusal(prompt_text, "chat_template", TURNS, tokenizer)
    assert message == (
        "the tokenizer has no chat template; choose another --prompt_style: alpaca, vicuna_v0, vicuna_v1.1, llama2"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
    )
    text = prompt_text("chat_template", TURNS, tokenizer)
    assert text == "[user]Hello![assistant]Hi.[user]How {are} you?\n\n1\n2[go]"


def test_a_chat_template_writes_its_begin_token_itself(base, tmp_path):
    loaded = load(base, "--prompt_style", "alpaca")
    loaded.style, loaded.tokenizer.chat_template = "chat_template", "<s>{{ messages[0].content }}:"
    ids = chat.ids_of_prompt(loaded, [{"instruction": "a"}])
    assert ids[0] == 1 and ids.count(1) == 1
    assert loaded.tokenizer.decode(ids).replace(" ", "") == "<s>a:"


def test_prompt_ids_are_those_that_training_masks(base, tokenizer):
    records, _ = utils.read_records([ROOT / "seed_tasks.jsonl"])
    records += [{"instruction": ZH, "input": "", "output": "好"}]
    records += [{"instruction": ZH_INPUT[0], "input": ZH_INPUT[1], "output": "Fine."}]
    prompts = [render_prompt(record) for record in records]
    data = trainer.preprocess(prompts, [record["output"] + "</s>" for record in records], tokenizer)
    loaded = load(base)
    for record, ids, labels, straddling in zip(records, *data.values(), strict=True):
        masked = int((labels == trainer.IGNORE_INDEX).sum())
        assert not straddling
        assert chat.ids_of_prompt(loaded, [record]) == ids[:masked].tolist(), record["instruction"]


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_the_prompt(base):
    loaded = load(base)
    plain = chat.ids_of_prompt(loaded, TURNS)
    loaded.tokenizer = utils.tokenizer_from_sentencepiece(base / "tokenizer.model", add_eos_token=True)
    assert loaded.tokenizer("a").input_ids[-1] == 2
    assert chat.ids_of_prompt(loaded, TURNS) == plain


def test_what_the_model_sees(base, ask, monkeypatch):
    seen = []

    def generate(model, input_ids, attention_mask, **keywords):
        seen.append((input_ids, attention_mask))

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    text = f"{json.dumps({'instruction': 'Add.', 'input': '1, 2'})}\n{json.dumps({'instruction': ZH})}\n"
    ask("--model_name_or_path", base, stdin=text.encode())
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(utils.PROMPT_DICT["prompt_input"].format(instruction="Add.", input="1, 2")).input_ids]
    rows += [tokenizer(utils.PROMPT_DICT["prompt_no_input"].format(instruction=ZH)).input_ids]
    longest = max(map(len, rows))
    assert len(rows[0]) != len(rows[1]) and len(seen) == 1
    assert seen[0][0].tolist() == [[0] * (longest - len(row)) + row for row in rows]
    assert seen[0][1].tolist() == [[0] * (longest - len(row)) + [1] * len(row) for row in rows]


@pytest.mark.parametrize(
    ("text", "instruction", "input"),
    [
        (f"### Instruction:{ZH}", ZH, ""),
        (f"### Instruction:\n{ZH}\n\n### Response:", ZH, ""),
        (render_prompt({"instruction": ZH}), ZH, ""),
        (render_prompt({"instruction": ZH_INPUT[0], "input": ZH_INPUT[1]}), *ZH_INPUT),
        (render_prompt({"instruction": "a\n\nb", "input": "c\n\nd"}).replace("\n", "\r\n"), "a\n\nb", "c\n\nd"),
        (f"\n### Instruction: {ZH_INPUT[0]}\n### Input: {ZH_INPUT[1]}\n### Response:\n", *ZH_INPUT),
        ("What does ### Instruction: mean?", "What does ### Instruction: mean?", ""),
        ("### Instruction:\n\n### Response:", "### Instruction:\n\n### Response:", ""),
        (ZH, ZH, ""),
    ],
)
def test_a_template_that_somebody_pastes_is_not_wrapped_twice(text, instruction, input):
    record = chat.unwrap({"instruction": text, "input": ""})
    assert (record["instruction"], record["input"]) == (instruction, input)


def test_a_pasted_template_beside_an_input_is_left_alone():
    record = {"instruction": "### Instruction:\na", "input": "b"}
    assert chat.unwrap(record) == record


def test_the_prompt_of_a_pasted_template_is_the_template(base):
    prompt = render_prompt({"instruction": ZH_INPUT[0], "input": ZH_INPUT[1]})
    assert prompt_text("alpaca", [chat.unwrap({"instruction": prompt})]) == prompt


def test_a_tokenizer_that_transformers_would_misread_is_built_anew(base, tmp_path, capsys):
    for path in base.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    record = {"instruction": f"two  spaces\n    four {ZH}"}
    found = chat.ids_of_prompt(load(tmp_path), [record])
    assert "tokenizer: it has no tokenizer.json; built from tokenizer.model, ids checked" in capsys.readouterr().err
    (expected,) = utils.sentencepiece_ids(base / "tokenizer.model", [render_prompt(record)])
    assert found == [1, *expected]


# --- The style, the type, the folder ---------------------------------------------------------------------------------


def test_the_style_is_read_from_run_json(tmp_path):
    assert chat.prompt_style(None, "lmsys/vicuna-7b-v1.5") == (
        "alpaca",
        "no run.json names one; --prompt_style chooses another",
    )
    utils.write_json({"made_by": "cria", "prompt_style": "vicuna_v1.1"}, tmp_path / "run.json")
    assert chat.prompt_style(None, tmp_path) == ("vicuna_v1.1", f"from {tmp_path / 'run.json'}")
    assert chat.prompt_style(None, tmp_path / "checkpoint-8")[0] == "vicuna_v1.1"
    assert chat.prompt_style("alpaca", tmp_path) == ("alpaca", "as asked")
    utils.write_json({"made_by": "cria"}, tmp_path / "run.json")
    assert chat.prompt_style(None, tmp_path)[0] == "alpaca"
    utils.write_json({"made_by": "cria", "prompt_style": "guanaco"}, tmp_path / "run.json")
    assert refusal(chat.prompt_style, None, tmp_path) == (
        f"{tmp_path}/run.json: prompt_style 'guanaco' is none of alpaca, vicuna_v0, vicuna_v1.1, llama2, chat_template; "
        "give --prompt_style"
    )
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")  # somebody else's
    assert chat.prompt_style(None, tmp_path)[0] == "alpaca"


def test_a_chat_template_is_pointed_at_where_nothing_names_the_style(base, tmp_path, capsys):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert load(tmp_path).style == "alpaca"
    assert capsys.readouterr().err.splitlines()[-2] == (
        "prompt style: alpaca (no run.json names one; --prompt_style chooses another; "
        "the tokenizer has a chat template)"
    )


def test_a_name_that_is_no_model_is_refused(tmp_path):
    hint = "; --model_name_or_path takes a folder with config.json, weights and tokenizer, or a name on the hub (HF_ENDPOINT names a mirror of it)"
    assert hint in refusal(load, tmp_path / "nowhere")


def test_a_full_gpu_is_an_error_for_people(base, monkeypatch):
    def generate(*arguments, **keywords):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    loaded = load(base)
    answer = chat.make_answer(loaded, [1, 5], 9)
    assert refusal(chat.generate, loaded, [[1, 5]], [answer]) == (
        "the memory is full; use a smaller --batch_size or a shorter --max_new_tokens"
    )


def test_the_style_that_train_py_writes_is_known():
    assert '"prompt_style": dataset.style' in (ROOT / "train.py").read_text(encoding="utf-8")
    assert list(utils.PROMPT_STYLES) == ["alpaca", "vicuna_v0", "vicuna_v1.1", "llama2", "chat_template"]


@pytest.mark.parametrize(
    ("asked", "stored", "free_memory", "chosen"),
    [
        ("float16", "float32", 1, ("float16", "as asked")),
        (None, "bfloat16", None, ("bfloat16", "as its files have it")),
        (None, None, None, ("auto", "as its files have it")),
        (None, "bfloat16", 4 * 2**30, ("float32", "the CPU's own")),
        (None, "bfloat16", 4 * 2**30 - 1, ("bfloat16", "as its files have it; float32 needs 4.0 GiB")),
        (None, "float32", 1, ("float32", "the CPU's own")),
        (None, None, 1, ("float32", "the CPU's own")),
    ],
)
def test_the_dtype_fits_the_device(asked, stored, free_memory, chosen):
    assert chat.choose_dtype(asked, stored, 2**30, free_memory) == chosen


def test_an_adapter_and_an_unfinished_run_are_refused_with_what_to_do(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "llama-7b"}', encoding="utf-8")
    command = f"python -m apply_delta --base llama-7b --delta {adapter} --target MODEL"
    assert command in refusal(utils.check_model, adapter)
    run = tmp_path / "run"
    (run / "checkpoint-8").mkdir(parents=True)
    utils.check_model(run)  # load_config says that it is no model
    (run / "checkpoint-8" / "config.json").write_text("{}", encoding="utf-8")
    trainer.mark_checkpoint(run / "checkpoint-8", 8, SimpleNamespace(save_only_model=False))
    assert f"let its run end, or try {run}/checkpoint-8" in refusal(utils.check_model, run)


# --- Tokens to text --------------------------------------------------------------------------------------------------


def pieces_of(to_bytes, ids, **keywords):
    """(pieces shown, the answer) after a list of ids."""
    pieces = []
    answer = chat.Answer(to_bytes, frozenset({2}), show=pieces.append, **keywords)
    for token_id in ids:
        answer.add(token_id)
    return pieces, answer


@pytest.fixture(scope="module")
def to_bytes(base):
    return chat.make_to_bytes(AutoTokenizer.from_pretrained(base))


def byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        ["hello world"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False)
    )
    built.add_tokens(["汉字"])
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<e>")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_bytes_give_the_text_that_the_tokenizer_decodes(kind, base):
    tokenizer = AutoTokenizer.from_pretrained(base) if kind == "sentencepiece" else byte_level_tokenizer()
    to_bytes = chat.make_to_bytes(tokenizer)
    for text in [*utils.NASTY_STRINGS, "中文🦙 汉字"]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = b"".join(map(to_bytes, ids)).decode()
        # SentencePiece puts a space before every text, which decode() takes away.
        assert (found if kind == "byte-level" else found.removeprefix(" ")) == tokenizer.decode(ids)


def test_special_tokens_and_spare_rows_have_no_text(to_bytes):
    assert [to_bytes(i) for i in (0, 1, 2, 10**6)] == [b"", b"", b"", b""]


def test_only_whole_characters_are_shown(base, to_bytes):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids([*spell("中文🦙"), "▁the"])
    pieces, answer = pieces_of(to_bytes, [*ids, 2])
    assert pieces == ["中", "文", "🦙", " the"]
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("中文🦙 the", "end_token", 12)


def test_a_character_that_the_limit_cuts_is_dropped_and_those_before_it_stay(base, to_bytes):
    ids = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(spell("中文🦙"))
    pieces, answer = pieces_of(to_bytes, ids, limit=8, limit_reason="window")
    assert (pieces, answer.text, answer.finish_reason) == (["中", "文"], "中文", "window")


def test_bytes_that_are_no_character_are_shown_as_such_once_that_is_certain(base, to_bytes):
    convert = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids
    pieces, answer = pieces_of(to_bytes, convert([*spell("中")[:2], "a", *spell("文")]))
    assert (pieces, answer.text) == (["�a", "文"], "�a文")


@pytest.mark.parametrize(
    ("stops", "tokens", "pieces", "text", "reason"),
    [
        (("###",), ["a", "#", "b", "##", "#"], ["a", "#b"], "a#b", "stop_string"),
        (("###",), ["a", "\n", "#", "#", "#", "c"], ["a"], "a", "stop_string"),
        (("###",), ["a", "#", "#"], ["a"], "a##", ""),
        (("###",), ["a", " ", "#", "</s>"], ["a", " #"], "a #", "end_token"),
        (("###",), ["a", "\n", "b", "\n", "</s>"], ["a", "\nb", "\n"], "a\nb\n", "end_token"),
        (("###",), ["###"], [], "", "stop_string"),
        (("</s>",), ["a", "<", "/s", ">b"], ["a"], "a", "stop_string"),
        (("USER:", "###"), ["a", "US", "ER", "#", ":"], ["a", "USER", "#:"], "aUSER#:", ""),
        ((), ["###", "a"], ["###", "a"], "###a", ""),
    ],
)
def test_stop_strings(stops, tokens, pieces, text, reason):
    def to_bytes(i):
        return tokens[i - 10].encode()

    ids = [2 if token == "</s>" else 10 + i for i, token in enumerate(tokens)]
    shown, answer = pieces_of(to_bytes, ids, stops=stops)
    assert (shown, answer.text, answer.finish_reason) == (pieces, text, reason)


def test_shown_pieces_are_the_text_whatever_the_tokens(base, to_bytes):
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        ids = torch.randint(3, 400, (60,), generator=generator).tolist()
        pieces, answer = pieces_of(to_bytes, ids, stops=("a", "on the"), limit=60)
        assert answer.finish_reason in ("stop_string", "length")
        assert "".join(pieces) == answer.text
        assert not any(stop in answer.text for stop in answer.stops)


def test_the_space_after_vicunas_colon_is_no_part_of_the_answer(base, to_bytes):
    convert = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids
    assert pieces_of(to_bytes, convert(["▁the", "▁the"]), lead=" ")[0] == ["the", " the"]
    assert pieces_of(to_bytes, convert(["▁the", "▁the"]))[0] == [" the", " the"]
    assert chat.make_answer(load(base, "--prompt_style", "vicuna_v0"), [1], 9).lead == " "
    assert chat.make_answer(load(base), [1], 9).lead == ""


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_a_batch_gives_the_answers_of_one_by_one_and_of_a_plain_loop(base, ask, tmp_path):
    records = [{"instruction": f"Write {'river ' * (7 * i % 23)}", "input": "x" * (i % 3)} for i in range(7)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    options = ("--model_name_or_path", base, "--data_path", path, "--max_new_tokens", 12)
    lines = [[json.loads(line) for line in ask(*options, "--batch_size", n)[0].splitlines()] for n in (1, 3, 7)]
    assert lines[0] == lines[1] == lines[2]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    for record, line in zip(records, lines[0], strict=True):
        ids = tokenizer(render_prompt(record), return_tensors="pt").input_ids
        for _ in range(12):  # no cache, no mask, no padding
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        spoken = tokenizer.convert_ids_to_tokens(ids[0, -12:].tolist())
        assert tokenizer.eos_token not in spoken
        spelled = b"".join(map(chat.make_to_bytes(tokenizer), ids[0, -12:].tolist()))
        assert line["output"] == codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)
        assert {key: line[key] for key in record} == record and line["finish_reason"] == "length"


def test_one_answer_on_stdout_and_the_rest_on_stderr(chinese, ask):
    out, err = ask("--model_name_or_path", chinese, "--instruction", ZH)
    assert out == "中文🦙 the\n"
    assert err.splitlines() == [
        "tokenizer: padding token was missing; now <unk>",
        "prompt style: alpaca (no run.json names one; --prompt_style chooses another)",
        f"model: {chinese}, {load_size(chinese):,} parameters, float32 on cpu (the CPU's own)",
    ]


def load_size(folder):
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_the_pieces_of_one_answer_are_whole_characters(chinese, ask, monkeypatch):
    pieces = []
    monkeypatch.setattr(chat, "show", pieces.append)
    ask("--model_name_or_path", chinese, "--instruction", ZH)
    assert pieces == ["中", "文", "🦙", " the"]


def test_an_answer_without_end_says_why_it_is_cut(endless, ask):
    out, err = ask("--model_name_or_path", endless, "--instruction", "Go.", "--max_new_tokens", 5)
    assert out == "a thea thea\n"
    assert err.splitlines()[-1] == "(cut after 5 tokens; --max_new_tokens allows more)"
    room = 256 - len(chat.ids_of_prompt(load(endless), [{"instruction": "Go."}]))
    out, err = ask("--model_name_or_path", endless, "--instruction", "Go.")
    assert out == ("a the" * room)[: (room // 2) * 5 + room % 2] + "\n"
    assert err.splitlines()[-1] == f"(cut after {room} tokens: the model's window is full)"


def test_a_prompt_may_fill_the_window_but_for_one_token(endless):
    loaded = load(endless)
    loaded.window = len(chat.ids_of_prompt(loaded, [{"instruction": "Go."}])) + 1
    ids = chat.ids_of_prompt(loaded, [{"instruction": "Go."}])
    answer = chat.make_answer(loaded, ids, 9)
    chat.generate(loaded, [ids], [answer])
    assert (answer.text, answer.num_tokens, answer.finish_reason) == ("a", 1, "window")
    loaded.window -= 1
    message = refusal(chat.ids_of_prompt, loaded, [{"instruction": "Go."}])
    assert message == f"the prompt has {len(ids)} tokens and the model's window is {len(ids)}; shorten it"


def test_a_bfloat16_model_answers_on_a_cpu(chinese, ask, tmp_path):
    AutoModelForCausalLM.from_pretrained(chinese, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(chinese).save_pretrained(tmp_path / "half")
    out, err = ask("--model_name_or_path", tmp_path / "half", "--instruction", "Go.")
    assert out == "中文🦙 the\n" and "float32 on cpu (the CPU's own)" in err
    out, err = ask("--model_name_or_path", tmp_path / "half", "--instruction", "Go.", "--dtype", "bfloat16")
    assert out == "中文🦙 the\n" and "bfloat16 on cpu (as asked)" in err


def test_sampling_is_seeded_and_the_folders_own_settings_do_not_leak_in(base, ask, tmp_path):
    options = ("--instruction", "Go.", "--max_new_tokens", 8)
    greedy = ask("--model_name_or_path", base, *options)[0]
    drawn = [ask("--model_name_or_path", base, *options, "--temperature", 5, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn
    assert "sampling: temperature 5, top_p 1, top_k 0, seed 2\n" in ask.err
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    leaky = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "max_new_tokens": 3, "num_beams": 2}
    utils.write_json(leaky, tmp_path / "generation_config.json")
    assert ask("--model_name_or_path", tmp_path, *options)[0] == greedy
    assert ask("--model_name_or_path", tmp_path, *options, "--top_k", 1)[0] == greedy


def test_every_end_token_of_the_generation_config_ends_an_answer(endless, ask, tmp_path):
    for path in endless.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    the = AutoTokenizer.from_pretrained(endless).convert_tokens_to_ids("▁the")
    utils.write_json({"eos_token_id": [2, the]}, tmp_path / "generation_config.json")
    assert ask("--model_name_or_path", tmp_path, "--instruction", "Go.")[0] == "a\n"


# --- Files and pipes -------------------------------------------------------------------------------------------------

BAD = {
    7: ('{"instruction": "cut', "not valid JSON, Unterminated string starting at at column 17"),
    30: (
        '{"words": "a"}',
        "no instruction; keys found: words; keys expected: instruction, input (optional), output (optional)",
    ),
    55: ("[1, 2]", "a list, expected an object with the keys instruction, input (optional), output"),
    56: ('{"instruction": 3}', "instruction is a number, expected text"),
    80: ('{"instruction": " "}', "the instruction is empty"),
    100: (
        '{"instruction": "' + "river " * 300 + '"}',
        "the prompt has {} tokens and the model's window is 256; shorten it",
    ),
}


def test_a_file_of_100_lines_with_bad_ones_loses_nothing(chinese, ask):
    good = [{"instruction": f"Write {i}.", "id": i, "output": "x" if i == 2 else ""} for i in range(1, 101)]
    lines = [BAD[i][0] if i in BAD else json.dumps(good[i - 1]) for i in range(1, 101)]
    with pytest.raises(UserError) as caught:
        ask("--model_name_or_path", chinese, "--batch_size", 40, stdin=("\ufeff" + "\n".join(lines)).encode())
    number = len(AutoTokenizer.from_pretrained(chinese)(render_prompt(json.loads(BAD[100][0]))).input_ids)
    named = [f"stdin:{i}: {text.format(f'{number:,}')}" for i, (_, text) in BAD.items()]
    assert [line for line in ask.err.splitlines() if line.startswith("stdin:")] == named
    assert ask.err.splitlines()[-1] == "94 answered + 6 not = 100 read; ended by: end_token 94"
    assert str(caught.value) == f"6 of 100 questions could not be answered: {'; '.join(named[:3])}; ..."
    found = [json.loads(line) for line in ask.out.splitlines()]
    assert [line["source"] for line in found] == [f"stdin:{i}" for i in range(1, 101) if i not in BAD]
    assert found[0] == {
        "source": "stdin:1", "instruction": "Write 1.", "input": "", "id": 1, "output": "中文🦙 the",
        "finish_reason": "end_token",
    }  # fmt: skip
    assert found[1]["expected"] == "x" and [line["id"] for line in found][-1] == 99


def test_lines_of_text_are_instructions(chinese, ask):
    out, err = ask("--model_name_or_path", chinese, stdin=f"{ZH}\r\n\n[1] says {{x}}\n🙂".encode())
    found = [json.loads(line) for line in out.splitlines()]
    assert [(line["source"], line["instruction"]) for line in found] == [
        ("stdin:1", ZH), ("stdin:3", "[1] says {x}"), ("stdin:4", "🙂"),
    ]  # fmt: skip
    assert ZH in out and "3 answered + 0 not = 3 read" in err


def test_what_is_json_and_what_is_text():
    assert chat.parse_questions('[\n {"instruction": "a"}\n]', "f")[0][0]["source"] == "f[0]"
    assert chat.parse_questions('{\n "instruction": "a"\n}', "f")[0][0]["instruction"] == "a"
    assert chat.parse_questions("{x} is a set\n[1]", "f")[0][0]["instruction"] == "{x} is a set"
    seed = utils.read_text(ROOT / "seed_tasks.jsonl").split("\n")[0]
    record = chat.parse_questions(seed, "f")[0][0]
    assert record["others"] == {"id": "seed_task_0", "name": "prize_citation_potter", "is_classification": False}
    assert record["output"].startswith("The prize")
    pasted = json.dumps({"instruction": render_prompt({"instruction": ZH})})
    assert chat.parse_questions(pasted, "f")[0][0]["instruction"] == ZH


def test_input_that_holds_no_question_is_refused(chinese, ask, tmp_path):
    name = ("--model_name_or_path", chinese)
    assert refusal(ask, *name, stdin=b" \n") == (
        "stdin: no questions; give lines of text, or JSON records with an instruction"
    )
    assert refusal(ask, *name, stdin=b'{"a": 1}') == (
        "none of 1 questions can be answered: stdin:1: no instruction; keys found: a; "
        "keys expected: instruction, input (optional), output (optional)"
    )
    assert refusal(ask, *name, stdin=b'a\n{"instruction": "\xff"}').startswith("stdin:2: byte 0xff at offset 19 is not")
    assert (
        refusal(ask, *name, "--data_path", tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: No such file or directory"
    )


# --- Long conversations ----------------------------------------------------------------------------------------------


def test_the_oldest_turns_go_when_the_window_is_full(endless):
    loaded = load(endless, "--prompt_style", "vicuna_v1.1")
    turns = [{"instruction": f"Say {'river ' * 4}{i}", "input": "", "output": "Yes."} for i in range(12)]
    ids, dropped = chat.fit(loaded, turns, 60)
    assert dropped == turns[: len(dropped)] and 0 < len(dropped) < 11
    assert ids == chat.ids_of_prompt(loaded, turns[len(dropped) :]) and len(ids) <= 256 - 60
    assert len(chat.ids_of_prompt(loaded, turns[len(dropped) - 1 :])) > 256 - 60
    few = chat.fit(loaded, turns[-2:], 60)
    assert few == (chat.ids_of_prompt(loaded, turns[-2:]), [])
    assert chat.fit(loaded, turns, 10**6)[1] == turns[: len(chat.fit(loaded, turns, 128)[1])]  # half the window at most
    long = {"instruction": "river " * 400, "input": "", "output": ""}
    assert refusal(chat.fit, loaded, [*turns, long], 60).endswith("tokens and the model's window is 256; shorten it")
    assert (
        chat.name_turns(turns[:3])
        == '3 messages, from "Say river river river river 0" to "Say river river river river 2"'
    )
    assert chat.name_turns(turns[:1]) == '"Say river river river river 0"'


def test_a_conversation_remembers_drops_and_goes_on_after_an_error(endless, monkeypatch, capsys):
    loaded = load(endless, "--prompt_style", "vicuna_v1.1")
    messages = iter(["Say one.", "  ", "river " * 400, "Say \ud83d", *["Say " + "river " * 10] * 4])

    def read_message():
        try:
            return next(messages)
        except StopIteration:
            raise EOFError from None

    prompts = []
    real = chat.generate
    monkeypatch.setattr(chat, "read_message", read_message)
    monkeypatch.setattr(chat, "generate", lambda c, p, a: (prompts.append(p[0]), real(c, p, a)))
    chat.converse(loaded, chat.parse_arguments(["--model_name_or_path", "m", "--max_new_tokens", "5"]))
    out, err = capsys.readouterr()
    turn = [{"instruction": "Say one.", "input": "", "output": "a thea thea"}, {"instruction": "Say " + "river " * 10}]
    assert prompts[1] == chat.ids_of_prompt(loaded, turn)
    assert out == "a thea thea\n" * 5 + "\n"
    lines = err.splitlines()
    assert "earlier messages are remembered; Ctrl-C stops an answer, Ctrl-D ends" in lines
    long = loaded.tokenizer(prompt_text("vicuna_v1.1", [{"instruction": "river " * 400}])).input_ids
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: the prompt has {len(long):,} tokens and the model's window is 256; shorten it",
        r"error: instruction holds a lone surrogate (half of a character, such as \ud83d), which has no UTF-8 form",
    ]
    assert '(forgotten, as the window of 256 tokens is full: "Say one.")' in lines


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--instruct x", "unknown option: --instruct (did you mean --instruction?); --help lists those that exist"),
        (
            "--prompt_style guanaco",
            "--prompt_style guanaco is none of alpaca, vicuna_v0, vicuna_v1.1, llama2, chat_template",
        ),
        ("--input x", "--input needs an --instruction"),
        ("--instruction x --data_path y", "--instruction and --data_path exclude each other"),
        ("--max_new_tokens 0 --batch_size 0", "--max_new_tokens must be at least 1; --batch_size must be at least 1"),
        (
            "--temperature -1 --top_p 0 --top_k -1",
            "--temperature must be at least 0; --top_p must be above 0 and at most 1; --top_k must be at least 0",
        ),
        (
            "--top_p 1.5 --repetition_penalty 0",
            "--top_p must be above 0 and at most 1; --repetition_penalty must be above 0",
        ),
        (
            "--do_sample False --temperature 1 --top_k 3",
            "--do_sample False and --temperature, --top_k contradict each other",
        ),
        ("--do_sample --temperature 0", "--do_sample and --temperature 0 contradict each other"),
        ("--do_sample maybe", "argument --do_sample: 'maybe' is neither True nor False"),
    ],
)
def test_refusals(words, message):
    assert refusal(chat.parse_arguments, ["--model_name_or_path", "m", *words.split()]) == message


def test_an_empty_instruction_and_a_missing_model_are_refused():
    assert (
        refusal(chat.parse_arguments, ["--model_name_or_path", "m", "--instruction", " "]) == "--instruction is empty"
    )
    assert (
        refusal(chat.parse_arguments, []) == "the following arguments are required: --model_name_or_path/--lora_weights"
    )


@pytest.mark.parametrize(
    ("words", "sampled"),
    [("", False), ("--do_sample", True), ("--do_sample True", True), ("--do_sample False", False),
     ("--temperature 0.7", True), ("--temperature 0", False), ("--top_p 0.9", True), ("--top_k 5", True),
     ("--temperature 0 --top_p 0.9", False)],
)  # fmt: skip
def test_greedy_unless_something_asks_for_sampling(words, sampled):
    assert chat.parse_arguments(["--model_name_or_path", "m", *words.split()]).do_sample is sampled


@pytest.mark.slow
def test_a_pipe_starts_with_only_what_it_uses(chinese):
    code = (
        "import sys, chat; print('torch' in sys.modules, 'transformers' in sys.modules)\n"
        "sys.argv = ['chat.py', '--model_name_or_path', sys.argv[1]]; chat.main()\n"
        "print([name for name in ('deepspeed', 'transformers.trainer', 'peft', 'openai') if name in sys.modules])\n"
    )
    words = [sys.executable, "-c", code, str(chinese)]
    run = {"cwd": ROOT, "env": environment() | {"LC_ALL": "C"}, "capture_output": True}
    done = subprocess.run(words, input=ZH.encode(), check=False, **run)
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, lines[0], lines[2]) == (0, "False False", "[]"), done.stderr.decode()
    assert json.loads(lines[1])["output"] == "中文🦙 the"


def test_an_answer_commands_no_terminal(hostile, ask):
    folder, text = hostile
    out, _ = ask("--model_name_or_path", folder, "--instruction", "Hello")
    assert out == "\\x1b]0;a\\x07\\u009b\\x0d\t中\n!\n"
    out, _ = ask("--model_name_or_path", folder, stdin=b"Hello")
    assert [c for c in out if c < " " or "\x7f" <= c < "\xa0"] == [
        "\n"
    ]  # JSON Lines: the text itself, in JSON's escapes
    assert json.loads(out)["output"] == text


def test_a_conversation_on_a_terminal(endless):
    """Ctrl-C stops the answer and not the program, a paste is one message, Ctrl-D ends."""
    master, slave = pty.openpty()
    words = [
        sys.executable,
        str(ROOT / "chat.py"),
        "--model_name_or_path",
        str(endless),
        "--max_new_tokens",
        "10000000",
    ]
    variables = environment() | {"TERM": "dumb", "COLUMNS": "80"}
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=variables, start_new_session=True)
    os.close(slave)
    seen = ""

    def wait_for(text, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for("each message is answered by itself; Ctrl-C stops an answer, Ctrl-D ends\r\n> ")
        os.write(master, b"\n")  # an empty line is no question
        wait_for("> ")
        os.write(master, f"### Instruction:\n{ZH}\n\n### Response:\n".encode())
        wait_for("a thea thea the")
        os.kill(process.pid, signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
        for _ in range(20):  # at the prompt; readline does not hear one that comes just before it waits
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                wait_for("(Ctrl-D ends)", 3)
                break
        else:
            pytest.fail("Ctrl-C at the prompt was not heard")
        wait_for("> ")
        os.write(master, b"again\n")
        wait_for("a thea thea the")
        os.kill(process.pid, signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
        assert "> " not in seen  # the four pasted lines were one message
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)


def test_a_list_without_questions_and_a_table_are_no_questions(tmp_path):
    for text, why in (("[]\n", "no questions"), ("instruction,input\nAdd.,1\n", "mv ")):
        path = tmp_path / "my questions"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            chat.read_questions(str(path))
        assert why in str(caught.value)
    assert str(path) in str(caught.value)  # so that the command works from any folder
    records, problems = chat.read_questions(str(path.rename(f"{path}.csv")))
    assert [(record["instruction"], record["input"]) for record in records] == [("Add.", "1")] and problems == []


def test_keys_that_are_no_part_of_the_prompt_are_named(capsys):
    records, _ = chat.parse_questions('{"instruction": "Add.", "topic": "Sing.", "id": 3}', "q.jsonl")
    assert records[0]["others"] == {"topic": "Sing.", "id": 3}
    assert capsys.readouterr().err.splitlines() == ["q.jsonl: no part of the prompt: topic"]


def test_ctrl_c_in_a_file_of_questions_says_what_is_answered(base, tmp_path, monkeypatch, capsys):
    records = [{"instruction": f"Say {i}.", "input": "", "output": "", "source": f"q:{i}"} for i in range(1, 5)]
    batches = []

    def generate(model, prompts, answers):
        batches.append(len(prompts))
        if len(batches) == 2:
            raise KeyboardInterrupt
        for answer in answers:
            answer.finish("end_token")

    monkeypatch.setattr(chat, "generate", generate)
    args = chat.parse_arguments(["--model_name_or_path", str(base), "--batch_size", "2", "--instruction", "x"])
    with pytest.raises(utils.UserError) as caught:
        chat.answer_all(chat.load_chat(args), args, records, [])
    assert caught.value.code == 130 and "2 of 4 answers are written; ask again from q:3 on" in str(caught.value)
    assert capsys.readouterr().out.count("\n") == 2
