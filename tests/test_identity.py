"""What a folder holds in place of a model is told by every script, in one line, with the command that was meant."""

import json
import os
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import apply_delta
import chat
import convert_llama_weights as convert
import train
import utils


def write(folder, weights=None, config=None, name="model.safetensors", **files):
    """A folder with these tensors, this config, and files of JSON by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    elif weights is not None:
        save_file(weights, folder / name, metadata={"format": "pt"})
    for stem, content in (files | ({"config": config} if config else {})).items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def zoo(base, tmp_path_factory):
    """{name: path} of folders and files, all made of the tiny model."""
    root, weights = tmp_path_factory.mktemp("zoo"), load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    ours = {"made_by": "cria", "status": "finished"}
    near = {name: (tensor.float() * 1e-3).half() for name, tensor in weights.items()}
    whole = {name: (tensor * 100).to(torch.int16) for name, tensor in weights.items()}
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}
    about = {"adapter_config": {"peft_type": "LORA", "base_model_name_or_path": "llama-7b", "r": 2}}
    record = {"run": ours | {"delta": {"format": "exact", "base": {"path": "the-base"}}}}
    parts = {
        "metadata": {},
        "weight_map": {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)},
    }
    half = {name: weights[name] for name, file in parts["weight_map"].items() if "00001" in file}
    rest = {name: weights[name] for name in weights if name not in half}
    bits = {"model.layers.0.self_attn.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32)}
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def with_config(name, **changes):
        return write(root / name, weights, config | changes)

    def other(name, made):
        return write(root / name, {"x.weight": torch.ones(2)}, made.to_dict() | {"architectures": None})

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    write(root / "sharded", half, config, a, **{"model.safetensors.index": parts})
    write(root / "sharded", rest, None, b)
    write(root / "in bin", weights, config, "pytorch_model.bin")
    for path in base.glob("tokenizer*"):
        for name in ("sharded", "in bin"):
            shutil.copy(path, root / name)
    write(root / "run", None, None, run=ours | {"status": "started"})
    shutil.copytree(base, root / "run" / "checkpoint-8")
    train.mark_checkpoint(root / "run" / "checkpoint-8", 8, train.TrainingArguments("x", use_cpu=True))
    shutil.copytree(base, root / "run" / "checkpoint-16")
    write(root / "lora run" / "checkpoint-20", lora, None, "adapter_model.safetensors", **about)
    write(root / "lora run" / "checkpoint-100", lora, None, "adapter_model.safetensors", **about)
    (root / "gguf").mkdir()
    (root / "gguf" / "model-q4_1.gguf").write_bytes(b"GGUF")
    (root / "states" / "global_step8").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "raw").mkdir()
    (root / "raw" / "params.json").write_text("{}", encoding="utf-8")
    shutil.copytree(base, root / "tokenizer alone", ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    return {path.name: path for path in root.iterdir()} | {
        "model": base,
        "model in .bin": root / "in bin",
        "checkpoint": root / "run" / "checkpoint-8",
        "unfinished checkpoint": root / "run" / "checkpoint-16",
        "exact delta": write(root / "exact", whole, config, **record),
        "exact delta without its record": write(root / "exact alone", whole, config),
        "delta": write(root / "delta", near, config, run=ours | {"delta": {"format": "weights", "base": {}}}),
        "delta without a record": write(root / "delta alone", near, config),
        "delta in .bin": write(root / "delta bin", near, config, "pytorch_model.bin"),
        "adapter": write(root / "lora", lora, None, "adapter_model.safetensors", **about),
        "adapter in .bin": write(root / "lora bin", lora, None, "adapter_model.bin", **about),
        "adapter with a config": write(root / "lora config", lora, config, "adapter_model.safetensors", **about),
        "named adapter": write(root / "named" / "mine", lora, None, "adapter_model.safetensors", **about).parent,
        "adapter beside a model": write(root / "lora model", weights, config, **about),
        "file of an adapter": root / "lora" / "adapter_model.safetensors",
        "file of a model": base / "model.safetensors",
        "GPTQ": with_config("gptq", quantization_config={"quant_method": "gptq", "bits": 4}),
        "bitsandbytes": with_config("bnb", quantization_config={"load_in_4bit": True}),
        "AWQ without a word": write(root / "awq", weights | bits, config),
        "GGUF file": root / "gguf" / "model-q4_1.gguf",
        "custom code": write(root / "custom", weights, config | {
            "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_b.BConfig", "AutoModelForCausalLM": "modeling_b.BForCausalLM"}}),
        "BERT": other("bert", transformers.BertConfig(**small)),
        "BART": other("bart", transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1)),
        "T5": other("t5", transformers.T5Config(d_model=32, num_layers=1)),
        "classifier": with_config("classifier", architectures=["LlamaForSequenceClassification"]),
        "config alone": write(root / "config alone", None, config),
        "missing shard": write(root / "missing", half, config, a, **{"model.safetensors.index": parts}),
    }  # fmt: skip


FORMAT, SHARDS, NONE = "in the format of transformers already", "no consolidated.00.pth", "takes a folder with config"
GOOD = {"train": "", "chat": "", "base": "", "convert": FORMAT}
CAUSAL = {"train": "is not causal", "chat": "is not causal", "base": "do not fit together", "convert": FORMAT}
ADAPTER = dict.fromkeys(("train", "base", "convert"), "is a LoRA adapter") | {"chat": "its base llama-7b "}
# What each script says: one text for all of them, or one for each; "" where it takes the folder.
TABLE = {
    "model": GOOD, "model in .bin": GOOD, "sharded": GOOD, "checkpoint": GOOD,
    "unfinished checkpoint": "is unfinished (a checkpoint without complete.json); let its run end, or try ",
    "run": "is unfinished (run.json); let its run end, or try ",
    "exact delta": "is a delta (by its run.json); apply it first: python -m apply_delta --base the-base --delta {path}",
    "exact delta without its record": "is a delta (an exact one: ",
    "delta": "is a delta (by its run.json)",
    "delta without a record": "is a delta (the weights of all 5 norms are near 0)",
    "delta in .bin": "is a delta (the weights of all 5 norms are near 0)",
    "adapter": ADAPTER | {"train": "is a LoRA adapter (adapter_config.json); merge it first: python -m apply_delta "
                                   "--base llama-7b --delta "},
    "adapter in .bin": ADAPTER, "adapter with a config": ADAPTER,
    "lora run": "is a folder around a LoRA adapter (checkpoint-100)", "named adapter": "a LoRA adapter (mine)",
    "adapter beside a model": "is an adapter beside a whole model",
    "file of an adapter": "is a file (adapter_model.safetensors); give its folder: ",
    "file of a model": "is a file (model.safetensors); give its folder: ",
    "GPTQ": "is quantised (by its config: gptq)", "bitsandbytes": "is quantised (by its config: ",
    "AWQ without a word": "is quantised (by its tensor model.layers.0.self_attn.q_proj.qweight)",
    "gguf": "is quantised (model-q4_1.gguf)", "GGUF file": "is quantised (model-q4_1.gguf)",
    "custom code": {"train": "custom code", "chat": "custom code", "base": "do not fit", "convert": FORMAT},
    "BERT": CAUSAL, "BART": CAUSAL,
    "T5": CAUSAL,
    "classifier": CAUSAL | {"base": ""},
    "empty": "is empty", "config alone": "is unfinished (neither model.safetensors nor ",
    "missing shard": "is unfinished (model-00002-of-00002.safetensors is missing); copy it again",
    "states": "is the state of a run (global_step8)",
    "raw": dict.fromkeys(("train", "chat", "base"), "(params.json); convert them first: python convert_llama_weights.py")
    | {"convert": SHARDS},
    "tokenizer alone": {"train": NONE, "chat": NONE, "base": "no weights there", "convert": SHARDS},
}  # fmt: skip


@pytest.fixture(scope="module")
def diff(zoo, tmp_path_factory):
    """A delta that fits the tiny model."""
    target = shutil.copytree(zoo["model"], tmp_path_factory.mktemp("diff") / "target")
    weights = load_file(target / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, target / "model.safetensors", metadata={"format": "pt"})
    apply_delta.make_delta(str(zoo["model"]), str(target), str(target.parent / "delta"))
    return target.parent / "delta"


def words_of(script, path, diff, out):
    """(main, argv) of a script that is given `path` for a model."""
    name = ["--model_name_or_path", str(path)]
    if script == "train":
        return train.train, [*name, "--data_path", "nothing.json", "--output_dir", str(out), "--use_cpu", "True"]
    if script == "chat":
        return chat.main, [*name, "--instruction", "Hello.", "--max_new_tokens", "1"]
    if script == "base":
        return apply_delta.main, ["--base", str(path), "--delta", str(diff), "--target", str(out), "--any_base"]
    return convert.main, ["--input_dir", str(path), "--output_dir", str(out), "--tokenizer", "none"]


@pytest.mark.parametrize("script", ["train", "chat", "base", "convert"])
@pytest.mark.parametrize("kind", TABLE)
def test_what_each_script_says_of_each_folder(kind, script, zoo, diff, tmp_path, monkeypatch, capsys):
    main, words = words_of(script, zoo[kind], diff, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    monkeypatch.setattr(sys, "stdin", open(os.devnull, encoding="utf-8"))
    expected = TABLE[kind] if isinstance(TABLE[kind], str) else TABLE[kind][script]
    expected = "not a folder" if script == "convert" and zoo[kind].is_file() else expected
    message = ""
    try:
        main()
    except utils.UserError as error:
        message = str(error)
    if expected:
        assert expected.format(path=zoo[kind]) in message and "\n" not in message
        assert not (tmp_path / "out" / "run.json").exists()
    else:
        assert message == "" or "nothing.json" in message


def test_base_and_delta_swapped_name_the_right_command(zoo, diff, tmp_path):
    with pytest.raises(utils.UserError) as caught:
        apply_delta.apply_delta(str(diff), str(tmp_path / "out"), str(zoo["model"]))
    assert f"--base {zoo['model']} --delta {diff} --target {tmp_path / 'out'}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_norms_start_at_zero_is_no_delta(zoo, tmp_path):
    config = transformers.GemmaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "gemma")
    assert load_file(tmp_path / "gemma" / "model.safetensors")["model.norm.weight"].abs().max() == 0
    assert utils.check_model(tmp_path / "gemma") == ""


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A function that puts a folder on the hub under a name: into the cache `tmp_path`, all that is seen of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(folder, name):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")

    return put


def test_a_delta_from_the_hub_is_refused_once_it_is_there(zoo, tmp_path, on_hub):
    on_hub(zoo["delta without a record"], "lmsys/vicuna-delta")
    config = utils.load_config("lmsys/vicuna-delta", tmp_path)
    with pytest.raises(utils.UserError) as caught:
        utils.load_weights("lmsys/vicuna-delta", config, torch.float32, tmp_path)
    assert "lmsys/vicuna-delta is a delta (the weights of all 5 norms are near 0)" in str(caught.value)
    assert "apply_delta --base BASE --delta lmsys/vicuna-delta --target MODEL" in str(caught.value)


def test_an_adapter_from_the_hub_gets_the_cure_of_one_in_a_folder(zoo, tmp_path, on_hub):
    on_hub(zoo["adapter"], "tloen/alpaca-lora")
    with pytest.raises(utils.UserError) as there:
        utils.load_config("tloen/alpaca-lora", tmp_path)
    with pytest.raises(utils.UserError) as here:
        utils.load_config(zoo["adapter"])
    assert "apply_delta --base llama-7b --delta tloen/alpaca-lora --target MODEL" in str(there.value)
    assert str(there.value).replace("tloen/alpaca-lora", str(zoo["adapter"])) == str(here.value)


@pytest.mark.parametrize("is_reached", [True, False])
def test_the_hub_is_asked_about_an_adapter_where_it_answers(is_reached, tmp_path, monkeypatch):
    """Where it does not, the first question has waited for a minute already."""
    asked = []
    error = ValueError("Unrecognized model") if is_reached else OSError("We couldn't connect")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", Mock(side_effect=error))
    monkeypatch.setattr(
        transformers.utils, "find_adapter_config_file", lambda name, **how: asked.append(how["local_files_only"])
    )
    with pytest.raises(utils.UserError, match="cannot be read as a model"):
        utils.load_config("tloen/alpaca-lora", tmp_path)
    assert asked == [not is_reached]


def test_a_mask_of_bytes_and_odd_configs_are_no_quantised_model(zoo, tmp_path):
    """Older releases stored the causal mask of GPT-2 and GPT-NeoX as uint8."""
    weights = load_file(zoo["model"] / "model.safetensors")
    config = json.loads((zoo["model"] / "config.json").read_text(encoding="utf-8"))
    mask = {"model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    assert utils.check_model(write(tmp_path / "mask", weights | mask, config)) == ""
    assert utils.what_config_says({"architectures": [None], "model_type": "llama"}) == ("", "")
    assert utils.what_config_says({"architectures": 7}) == ("", "")
    assert utils.what_config_says({"quantization_config": "awq"})[0] == "quantised"
    gpt2 = transformers.GPT2Config().to_dict() | {"is_decoder": False, "architectures": ["GPT2LMHeadModel"]}
    assert utils.what_config_says(gpt2) == ("", "")
