"""Model folders as the tutorials have them, and damaged ones: repaired with a line, or refused with one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FSDP, ZERO3, basic_options, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import engines
import train as script
import utils


@pytest.fixture(scope="session")
def early_llama(base, tmp_path_factory):
    """The layout of the first LLaMA conversions: 5 .bin shards in fp16, rotary buffers, odd names, empty specials."""
    folder = tmp_path_factory.mktemp("models") / "early-llama"
    folder.mkdir()
    weights = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names, index = sorted(weights), {"metadata": {"total_size": 0}, "weight_map": {}}
    for shard in range(5):
        file = f"pytorch_model-{shard + 1:05}-of-00005.bin"
        torch.save({name: weights[name] for name in names[shard::5]}, folder / file)
        index["weight_map"] |= dict.fromkeys(names[shard::5], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    odd = {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    config |= odd | {"torch_dtype": "float16", "transformers_version": "4.27.0.dev0"}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
    special = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 10**30}))
    (folder / "special_tokens_map.json").write_text("{}")
    shutil.copy(base / "tokenizer.model", folder)
    return folder


def copied(base, folder, **config):
    """A copy of the tiny model with entries of its config changed."""
    shutil.copytree(base, folder)
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


REPAIRS = (
    "tokenizer: it has no tokenizer.json; built from tokenizer.model, ids checked against it",
    "bos_token_id 0 -> 1, as the tokenizer has it",
    "eos_token_id 1 -> 2, as the tokenizer has it",
    "generation config: do_sample -> True",
)


def test_early_llama_folder_is_repaired_line_by_line(early_llama, base, tmp_path, capsys):
    model, said = load(early_llama, tmp_path), capsys.readouterr().err
    assert [line for line in REPAIRS if line not in said] == []
    wanted = load_file(base / "model.safetensors")
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].half().float()) for name, tensor in model.state_dict().items())
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


@pytest.mark.slow
def test_early_llama_folder_trains(early_llama, data, base, tmp_path):
    run = train(basic_options(early_llama, data, tmp_path / "out", max_steps=2)).finished()
    assert run.code == 0
    assert [line for line in REPAIRS if line not in run.err] == []
    plain = train(basic_options(base, data, tmp_path / "plain", max_steps=2)).finished()
    half = abs(run.losses()[0] - plain.losses()[0])
    assert 0 < half < 1e-2  # the same weights, once rounded to fp16, and the same ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    assert model.generation_config.eos_token_id in (2, [2]) and model.generation_config.do_sample  # older ones list it
    assert model.config.architectures == ["LlamaForCausalLM"] and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "</s>" and tokenizer("a  b").input_ids[0] == 1


def load(folder, tmp_path):
    """The model of a folder as train.py loads it, without the run around it."""
    args = script.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    config, tokenizer = utils.load_config(folder), utils.load_tokenizer(folder, 512)
    return script.load_model(script.ModelArguments(str(folder)), args, config, tokenizer)


def refusal(folder, tmp_path):
    with pytest.raises(utils.UserError) as caught:
        load(folder, tmp_path)
    return str(caught.value)


def test_folder_without_tokenizer_is_refused(base, tmp_path):
    folder = copied(base, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    message = refusal(folder, tmp_path)
    assert message.startswith(f"{folder}: it holds no tokenizer; ")
    assert message.endswith(
        "; --model_name_or_path takes a folder with config.json, weights and tokenizer, or a name on the hub (HF_ENDPOINT names a mirror of it)"
    )


def test_folder_without_weights_is_refused(base, tmp_path):
    folder = copied(base, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    message = refusal(folder, tmp_path)
    assert f"{folder} is unfinished (neither model.safetensors nor" in message


def test_half_a_shard_is_refused(base, tmp_path):
    folder = copied(base, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(folder, tmp_path).startswith(f"{folder}: cannot load its weights (")


def rewrite(folder, change):
    """Save the folder's weights again after `change` was applied to them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_tensor_is_refused_by_name(base, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewrite(copied(base, tmp_path / "model"), lambda weights: weights.pop(name))
    assert refusal(folder, tmp_path) == f"{folder}: its files lack 1 tensors, first {name}; copy it again"


def test_tensor_of_another_shape_is_refused_with_both_shapes(base, tmp_path):
    def shorten(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()

    folder = rewrite(copied(base, tmp_path / "model"), shorten)
    what = "lm_head.weight is [999, 64] in its files and [1000, 64] by its config"
    assert refusal(folder, tmp_path) == f"{folder}: {what}; copy the folder again"


def test_extra_tensor_is_left_out_with_a_line(base, tmp_path, capsys):
    folder = copied(base, tmp_path / "model")
    rewrite(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(1)}))
    model = load(folder, tmp_path)
    assert (
        f"{folder}: 1 tensors that the model does not use were left out, first value_head.weight"
        in capsys.readouterr().err
    )
    assert "value_head.weight" not in model.state_dict()


def test_path_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty is empty" in refusal(tmp_path / "empty", tmp_path)
    assert refusal(tmp_path / "nothing", tmp_path).startswith(f"{tmp_path}/nothing cannot be read as a model (")


def test_model_that_is_no_causal_language_model_is_refused(base, tmp_path):
    folder = copied(base, tmp_path / "model", model_type="t5")
    assert "is not causal (model type t5)" in refusal(folder, tmp_path)


def test_fp16_files_give_fp32_masters_unless_asked_otherwise(early_llama, tmp_path):
    assert {parameter.dtype for parameter in load(early_llama, tmp_path).parameters()} == {torch.float32}
    args = script.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    config, tokenizer = utils.load_config(early_llama), utils.load_tokenizer(early_llama, 512)
    half = script.load_model(script.ModelArguments(str(early_llama), dtype="bfloat16"), args, config, tokenizer)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "engine"), [(1, ()), (2, FSDP), (2, ZERO3)], ids=["single", "fsdp", "zero3"])
@pytest.mark.usefixtures("deepspeed_ready")
def test_pad_token_add_gives_a_row_with_the_mean_of_the_old(processes, engine, base, data, tmp_path):
    options = basic_options(base, data, tmp_path / "out", pad_token="add", max_steps=1, learning_rate=0)
    run = train([*options, *engine], processes).finished()
    before, after = load_file(base / "model.safetensors"), run.weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (1001, 64)
        assert torch.equal(after[name][:1000], before[name])
        assert torch.allclose(after[name][1000], before[name].mean(0), atol=1e-7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 1000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 1001


@pytest.mark.slow
def test_tied_model_is_saved_once_and_loads(base, data, tmp_path):
    folder = tmp_path / "model"
    config = OPTConfig(
        vocab_size=1000, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=512, dropout=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    run = train(basic_options(folder, data, tmp_path / "out")).finished()
    assert run.code == 0
    assert "attention: each example by itself" in run.err
    assert "lm_head.weight" not in run.weights()
    model, info = AutoModelForCausalLM.from_pretrained(run.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert run.losses()[-1] < run.losses()[0]


SMALL = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "tie_word_embeddings": False}
PUBLISHED = {  # configuration, and a name that the library changes when it loads
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL), "embed_out.weight"),
    "mixtral": (
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ),
    "llama": (transformers.LlamaConfig(**SMALL), "lm_head.weight"),
}


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """Folders of small random models as they are on the hub: name -> folder."""
    folders = {}
    for name, (config, _) in PUBLISHED.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_is_saved_with_the_names_of_its_published_files(name, published, tokenizer, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(published[name])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model_wrapped=model,
        processing_class=tokenizer,
        state=transformers.TrainerState(),
        args=SimpleNamespace(bf16=False, fp16=False, cache_dir=None),
    )
    assert "model.safetensors" in script.write_model(trainer, dict(model.state_dict()), tmp_path)
    before, after = load_file(published[name] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert PUBLISHED[name][1] in after and after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], FSDP, ZERO3], ids=["single", "fsdp", "zero3"])
@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
@pytest.mark.usefixtures("deepspeed_ready")
def test_a_model_whose_names_the_library_changes_is_trained_and_saved(name, options, published, data, tmp_path):
    """At a learning rate of 0, so that the model saved is the one that was read."""
    words = basic_options(published[name], data, tmp_path / "out", learning_rate=0, max_steps=2)
    run = train([*words, *options], 2 if options else 1).finished()
    before, after = load_file(published[name] / "model.safetensors"), run.weights()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def probe(model, batch, longest):
    """engines.choose_layout on a model without an engine around it."""
    trainer = SimpleNamespace(model_wrapped=model, model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    trainer.args = SimpleNamespace(device="cpu", per_device_train_batch_size=batch, attn_implementation=None)
    trainer.args.padded = trainer.args.use_liger_kernel = trainer.args.label_smoothing_factor = False
    return engines.choose_layout(trainer, longest)


SHAPE = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
GPT = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEO = {"vocab_size": 120, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16,
       "attention_types": [[["global", "local"], 1]]}  # fmt: skip
BLOOM = {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4}
OPT = {"vocab_size": 120, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "word_embed_proj_dim": 32}  # fmt: skip
ALONE, MASKED = "each example by itself", ", masked: "
# For rows of 40 tokens at most: configuration class, its arguments, layout, what is said of the attention.
ATTENTIONS = {
    "llama": ("LlamaConfig", SHAPE, "flat", ALONE),
    "a window as long as the rows": ("MistralConfig", SHAPE | {"sliding_window": 40}, "flat", ALONE),
    "a window one token shorter": ("MistralConfig", SHAPE | {"sliding_window": 39}, "flat, masked", "more than causal"),
    "windows in some layers": ("Gemma3TextConfig", SHAPE | {"head_dim": 8, "sliding_window": 16}, "flat, masked",
                               "more than causal"),
    "a soft cap": ("Gemma2Config", SHAPE | {"head_dim": 8}, "flat, masked", "softcap"),
    "sinks": ("GptOssConfig", SHAPE | {"head_dim": 8, "num_local_experts": 4}, "padded", "eager" + MASKED[:-2]),
    "experts": ("MixtralConfig", SHAPE | {"num_local_experts": 4}, "flat", ALONE),
    "gpt2": ("GPT2Config", GPT, "flat", ALONE),
    "opt": ("OPTConfig", OPT, "flat", ALONE),
    "its layers drop the borders": ("StableLmConfig", SHAPE, "flat, masked", "differs from the same alone"),
    "its attention cannot be exchanged": ("GPTNeoConfig", NEO | {"max_position_embeddings": 256}, "flat, masked",
                                          "cannot be exchanged"),
    "a mask of 64 tokens": ("GPTNeoConfig", NEO | {"max_position_embeddings": 64}, "padded", "eager, masked"),
    "attention scaled by the place in the row": ("Llama4TextConfig", SHAPE | {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_hidden_layers": 4, "floor_scale": 32,
        "attn_scale": 4.0, "initializer_range": 0.2}, "padded", "masked"),
    "ALiBi": ("BloomConfig", BLOOM, "padded", "eager, masked"),
    "ALiBi, and SDPA": ("FalconConfig", SHAPE | {"alibi": True}, "padded", "sdpa, masked"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_attention_of_flat_rows_is_chosen_by_proof(name, dtype):
    kind, arguments, layout, attention = ATTENTIONS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)).to(dtype)
    own = model.config._attn_implementation
    found = probe(model, 4, 40)
    if name == "a soft cap" and own == "sdpa":  # of transformers before 5.20, whose SDPA passed over the cap itself
        layout, attention = "flat", ALONE
    assert (found[0], found[2]) == (layout, dtype) and attention in found[1]
    assert model.config._attn_implementation == (engines.BY_EXAMPLE if attention == ALONE else own)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_flat_rows_are_proven_at_the_width_that_is_used(batch, capsys):
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**NEO, max_position_embeddings=64))
    assert probe(model, batch, 40)[0] == ("flat, masked" if batch == 1 else "padded")  # its mask is of 64 x 64
    assert ("takes no flat rows of" in capsys.readouterr().err) == (batch > 1)


def test_a_model_whose_tokens_see_later_ones_is_refused():
    config = transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, initializer_range=0.5)  # fmt: skip
    with pytest.raises(utils.UserError, match="earlier tokens see later ones"):
        probe(transformers.BertLMHeadModel(config), 4, 40)
    config.is_decoder = True
    assert probe(transformers.BertLMHeadModel(config), 4, 40)[0] == "flat"  # causal


def test_rows_longer_than_a_rotary_model_knows_are_named(capsys):
    config = transformers.LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    for longest, lines in ((64, 0), (65, 1)):
        engines.check_layers(SimpleNamespace(fsdp_config=None), utils.skeleton(config), longest)
        said = capsys.readouterr().err
        assert said.count("\n") == lines and ("65 tokens" in said and "64 positions" in said) == bool(lines)
