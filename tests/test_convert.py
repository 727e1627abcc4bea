"""convert_llama_weights.py: the same bits, the same logits, the same ids, for every family and layout, and back."""

import collections
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from make_tiny_llama import PRESETS, make_tiny_raw, raw_weights, write_raw
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convert_llama_weights as convert
import utils
import weights

IDS = [(i * 37 + 5) % 1000 for i in range(24)]
PARAMS = {"dim": 64, "multiple_of": 64, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1}


def make_weights(kv_heads=4, dtype=torch.float16, vocab_size=1000, theta=1e4, seed=0):
    """Weights large enough that attention is not uniform and norms matter: then every mistake moves the logits."""
    weights = raw_weights({**PRESETS["tiny"], "vocab_size": vocab_size}, 2, kv_heads, seed, std=0.2)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if "norm" in name:
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    weights["rope.freqs"] = 1.0 / theta ** (torch.arange(0, 16, 2).float() / 16)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.fixture(scope="session")
def pieces(base):
    """The path of a tokenizer.model of 1,000 pieces."""
    return base / "tokenizer.model"


def make_raw(folder, pieces, weights=None, shards=1, split=None, **params):
    """Meta's files in `folder`, tokenizer included."""
    folder.mkdir(parents=True)
    weights = make_weights(params.get("n_kv_heads", 4)) if weights is None else weights
    write_raw(folder, weights, PARAMS | params, shards, **(split or {}))
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    return folder


def run(source, target, *words):
    convert.main(["--input_dir", str(source), "--output_dir", str(target), *map(str, words)])
    return target


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def expected(weights, head_dim=16):
    """Plain tensor arithmetic: rows 2i of each head, then rows 2i + 1, for wq and wk; all others as they are."""
    result = {}
    for name, tensor in weights.items():
        if name == "rope.freqs":
            continue
        if name.endswith(("wq.weight", "wk.weight")):
            starts = range(0, len(tensor), head_dim)
            rows = [start + i for start in starts for half in (0, 1) for i in range(half, head_dim, 2)]
            tensor = tensor[rows]
        new = {"tok_embeddings.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}.get(name)
        new = new or "model." + name
        for old, there in {"attention.w": "self_attn.", "feed_forward.": "mlp."}.items():
            new = new.replace(old, there)
        for old, there in {
            "self_attn.q.": "self_attn.q_proj.",
            "self_attn.k.": "self_attn.k_proj.",
            "self_attn.v.": "self_attn.v_proj.",
            "self_attn.o.": "self_attn.o_proj.",
            "mlp.w1": "mlp.gate_proj",
            "mlp.w2": "mlp.down_proj",
            "mlp.w3": "mlp.up_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            new = new.replace(old, there)
        result[new] = tensor
    return result


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def difference(source, target, shards, factor=None):
    """The largest difference of logits between the raw shards and the converted model, over the largest logit."""
    paths = [source / f"consolidated.{i:02}.pth" for i in range(shards)]
    params = json.loads((source / "params.json").read_text())
    wanted = torch.from_numpy(convert.reference_logits(paths, params, IDS, factor))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([IDS])).logits[0].double()
    return float((found - wanted).abs().max() / wanted.abs().max())


# shards, key-value heads, dtype, dimension along which the embedding is split, params.json
FAMILIES = {
    "LLaMA 1, 7B": (1, 4, torch.float16, 1, {"norm_eps": 1e-6}),
    "LLaMA 1, 13B": (2, 4, torch.float16, 1, {"norm_eps": 1e-6}),
    "LLaMA 1, 65B": (4, 4, torch.float16, 1, {"vocab_size": 1000}),
    "Llama 2, 7B": (1, 4, torch.bfloat16, 1, {}),
    "Llama 2, 70B": (2, 2, torch.bfloat16, 1, {"n_kv_heads": 2, "ffn_dim_multiplier": 1.02}),
    "Code Llama": (2, 4, torch.bfloat16, 1, {"rope_theta": 1e6}),
    "Llama 3, 70B": (4, 4, torch.bfloat16, 0, {"rope_theta": 5e5}),
    "Llama 3.1, 70B": (2, 2, torch.bfloat16, 0, {"rope_theta": 5e5, "n_kv_heads": 2, "use_scaled_rope": True}),
    "float32": (1, 1, torch.float32, 1, {"n_kv_heads": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_and_logits_are_those_of_the_raw_shards(family, pieces, tmp_path):
    shards, kv_heads, dtype, axis, params = FAMILIES[family]
    weights = make_weights(kv_heads, dtype, theta=params.get("rope_theta", 1e4))
    source = make_raw(tmp_path / "raw", pieces, weights, shards, {"tok_embeddings": axis}, **params)
    run(source, tmp_path / "out", "--max_shard_size", "100KB")
    assert_same(tensors(tmp_path / "out"), expected(weights))
    assert difference(source, tmp_path / "out", shards, 8 if "use_scaled_rope" in params else None) < 1e-5
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.dtype, config.rms_norm_eps) == (dtype, params.get("norm_eps", 1e-5))
    assert config.rope_parameters["rope_theta"] == params.get("rope_theta", 1e4)


def test_key_value_heads_stored_twice_are_written_once(pieces, tmp_path):
    weights = make_weights(2)  # 4 shards for 2 key-value heads: each lies in two neighbouring shards
    twice = {
        name: tensor.reshape(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64) if re.search("w[kv].weight", name)
        else tensor
        for name, tensor in weights.items()
    }  # fmt: skip
    source = make_raw(tmp_path / "raw", pieces, twice, 4, n_kv_heads=2)
    run(source, tmp_path / "out", "--verify")
    assert_same(tensors(tmp_path / "out"), expected(weights))
    assert difference(source, tmp_path / "out", 4) < 1e-5


@pytest.mark.parametrize("has_output", [True, False])
def test_tied_embeddings_are_written_once(has_output, pieces, tmp_path, capsys):
    weights = make_weights(dtype=torch.bfloat16, theta=5e5)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    if not has_output:
        del weights["output.weight"]
    params = {"rope_theta": 5e5, "use_scaled_rope": True}
    source = make_raw(tmp_path / "raw", pieces, weights, **params)
    run(source, tmp_path / "out", "--verify")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.tie_word_embeddings and config.max_position_embeddings == 131072
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert config.rope_parameters == scaling | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
    assert difference(source, tmp_path / "out", 1, 32) < 1e-5
    err = capsys.readouterr().err
    assert "rotary tables: stretched by 32 (8 in Llama 3.1, 32 in the tied 3.2; --rope_factor sets it)" in err
    run(source, tmp_path / "eight", "--rope_factor", 8, "--verify")
    assert AutoConfig.from_pretrained(tmp_path / "eight").rope_parameters["factor"] == 8.0


@pytest.mark.parametrize(
    "mutant",
    ["no permutation", "gate and up swapped", "wrong eps", "wrong theta", "wrong factor", "wrong kv heads", "one bit"],
)
def test_verify_refuses_a_wrong_conversion_and_leaves_nothing(mutant, pieces, tmp_path, monkeypatch):
    params = {"rope_theta": 5e5, "use_scaled_rope": True, "n_kv_heads": 2}
    source = make_raw(tmp_path / "raw", pieces, make_weights(2, theta=5e5), 2, **params)
    config = convert.model_config

    def changed(**values):
        monkeypatch.setattr(convert, "model_config", lambda *words: config(*words) | values)

    if mutant == "no permutation":
        monkeypatch.setattr(convert, "permute", lambda rows, head_dim: rows)
    elif mutant == "gate and up swapped":
        gate, up = convert.LAYER["feed_forward.w1.weight"], convert.LAYER["feed_forward.w3.weight"]
        monkeypatch.setitem(convert.LAYER, "feed_forward.w1.weight", up)
        monkeypatch.setitem(convert.LAYER, "feed_forward.w3.weight", gate)
    elif mutant == "wrong eps":
        changed(rms_norm_eps=1e-2)
    elif mutant == "wrong theta":
        changed(rope_theta=1e4)
    elif mutant == "wrong factor":
        changed(rope_scaling=None)
    elif mutant == "wrong kv heads":
        permute = convert.permute
        monkeypatch.setattr(convert, "permute", lambda rows, size: permute(rows, size if len(rows) > 16 else 8))
    elif mutant == "one bit":
        permute = convert.permute
        monkeypatch.setattr(convert, "permute", lambda rows, size: permute(rows, size) ^ 0x4000)
    with pytest.raises(utils.UserError, match=r"^verify: logits differ from those of the raw shards by \S+ of "):
        run(source, tmp_path / "out", "--verify")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("form", ["tensors", "parameters", "wrapped"])
def test_verify_reads_every_form_of_a_tied_checkpoint(form, shards, axis, pieces, tmp_path, capsys):
    """Its own logits against those of the whole embedding as the output layer, by transformers, and back."""
    tied = make_weights()
    del tied["output.weight"]
    source = make_raw(tmp_path / "raw", pieces, tied, shards, {"tok_embeddings": axis})
    for path in source.glob("*.pth"):
        shard = torch.load(path, weights_only=True)
        if form != "tensors":
            shard = {name: torch.nn.Parameter(tensor) for name, tensor in shard.items()}
        torch.save({"state_dict": shard} if form == "wrapped" else shard, path)
    run(source, tmp_path / "out", "--verify")
    assert_same(tensors(tmp_path / "out"), expected(tied))
    assert difference(source, tmp_path / "out", shards) < 1e-5
    assert re.search(r"verify: logits differ from those of the raw shards by \S+e-\d+ of", capsys.readouterr().err)


def test_verify_names_its_memory_and_its_result(pieces, tmp_path, capsys):
    run(make_raw(tmp_path / "raw", pieces), tmp_path / "out", "--verify")
    lines = capsys.readouterr().err.splitlines()
    assert "verify: needs about 0.7 GB of memory" in lines
    said = next(line for line in lines if line.startswith("verify: logits"))
    match = re.fullmatch(r"verify: logits differ from those of the raw shards by (\S+) of the largest, 32 tokens", said)
    assert float(match[1]) < 1e-5


def test_every_tensor_is_accounted_for(pieces, tmp_path, capsys):
    source = make_raw(tmp_path / "raw", pieces, shards=2)
    run(source, tmp_path / "out", "--max_shard_size", "128KB")
    err = capsys.readouterr().err
    assert (
        f"{source}: 2 shards, 234,816 parameters in float16; 2 layers, 4 heads (4 key-value), width 64, feed-forward "
        "192, vocabulary 1,000\n" in err
    )
    assert (
        "21 tensors written + 1 dropped (rope.freqs, computed anew) = 22 in each shard; 0.00 GB of float16 in 4 files\n"
        in err
    )
    assert f"next: python train.py --model_name_or_path {tmp_path / 'out'} --data_path" in err
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    rest = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names + rest)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 234816 * 2
    assert sorted(index["weight_map"]) == sorted(tensors(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# Back to Meta's layout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_shard_has_the_same_bytes(family, pieces, tmp_path):
    shards, kv_heads, dtype, axis, params = FAMILIES[family]
    weights = make_weights(kv_heads, dtype, theta=params.get("rope_theta", 1e4))
    source = make_raw(tmp_path / "raw", pieces, weights, shards, {"tok_embeddings": axis}, **params)
    run(source, tmp_path / "out")
    if axis == 0:
        os.rename(tmp_path / "out" / "tokenizer.model", tmp_path / "out" / "tokenizer.tiktoken")
    run(tmp_path / "out", tmp_path / "back", "--reverse", "--num_shards", shards)
    names = [f"consolidated.{i:02}.pth" for i in range(shards)]
    assert sorted(os.listdir(tmp_path / "back")) == [*names, "params.json", "tokenizer.model"]
    for name in names:
        old = torch.load(source / name, weights_only=True)
        new = torch.load(tmp_path / "back" / name, weights_only=True, mmap=True)
        assert list(new) == sorted(new, key=list(new).index) and sorted(old) == sorted(new)
        for key in old:
            assert old[key].dtype == new[key].dtype and torch.equal(old[key], new[key]), key
            assert new[key].is_contiguous()
        with zipfile.ZipFile(tmp_path / "back" / name) as archive:  # torch wrote zeros for the data that it skipped
            assert archive.testzip() is None and all(entry.CRC for entry in archive.infolist())
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == pieces.read_bytes()
    found = json.loads((tmp_path / "back" / "params.json").read_text())
    rule = convert.ffn_size(64, found["multiple_of"], found.get("ffn_dim_multiplier"))
    same = {key: found.get(key, {"rope_theta": 1e4}.get(key)) for key in ("dim", "n_heads", "n_layers", "norm_eps")}
    assert same == {key: (PARAMS | params)[key] for key in same} and rule == 192
    (tmp_path / "back2").mkdir()
    run(tmp_path / "back", tmp_path / "again")  # rope.freqs is there, so heads are checked
    assert_same(tensors(tmp_path / "again"), expected(weights))


@pytest.mark.parametrize(
    ("dim", "ffn", "multiple_of", "multiplier"),
    [
        (4096, 11008, 256, None),  # LLaMA 1 and Llama 2, 7B
        (8192, 22016, 256, None),  # 65B, Code Llama 34B
        (8192, 28672, 4096, 1.3),  # Llama 2 and 3, 70B
        (4096, 14336, 1024, 1.3),  # Llama 3, 8B
        (2048, 8192, 256, 1.5),  # Llama 3.2, 1B
        (3072, 8192, 256, None),  # Llama 3.2, 3B
    ],
)
def test_the_rows_of_w1_by_metas_rule(dim, ffn, multiple_of, multiplier):
    assert convert.ffn_size(dim, multiple_of, multiplier) == ffn
    llama = convert.Llama(1, "float16", dim, 1, 32, 32, ffn, 100, 1e-5, 1e4, None, 1, 1, False)
    params = convert.raw_params(llama)
    assert convert.ffn_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == ffn


def test_reverse_says_where_metas_tokenizer_is_missing(pieces, tmp_path, capsys):
    """A Llama 3 folder of the hub has it in original/, or not at all; its embedding is split as Meta's either way."""
    source = make_raw(tmp_path / "raw", pieces, make_weights(theta=5e5), rope_theta=5e5)
    folder = run(source, tmp_path / "out")
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    run(folder, tmp_path / "back", "--reverse", "--num_shards", 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenizer: none of ")]
    assert len(said) == 1 and f"is in {folder}; copy Meta's file to {tmp_path / 'back'}" in said[0]
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    assert sorted(os.listdir(tmp_path / "back")) == names
    shard = torch.load(tmp_path / "back" / names[0], weights_only=True)
    assert shard["tok_embeddings.weight"].shape == (500, 64)
    (folder / "original").mkdir()
    (tmp_path / "tokenizer.model").rename(folder / "original" / "tokenizer.model")
    run(folder, tmp_path / "again", "--reverse")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == pieces.read_bytes()
    assert "tokenizer: none" not in capsys.readouterr().err


def test_reverse_says_what_cannot_be_said_in_metas_format(pieces, tmp_path):
    folder = run(make_raw(tmp_path / "raw", pieces), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())

    def refusal(*words, **changes):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(utils.UserError) as caught:
            run(folder, tmp_path / "back", "--reverse", *words)
        assert not (tmp_path / "back").exists()
        return str(caught.value)

    at = folder / "config.json"
    assert refusal(model_type="opt") == f"{at}: its model_type is nothing that Meta's format can say"
    assert refusal(attention_bias=True) == f"{at}: its attention_bias is nothing that Meta's format can say"
    for changes, what in (
        ({"tie_word_embeddings": "false"}, 'tied is "false"'),
        ({"num_attention_heads": "4"}, 'num_heads is "4"'),
        ({"num_key_value_heads": "4"}, 'num_kv_heads is "4"'),
        ({"intermediate_size": "192"}, 'ffn_dim is "192"'),
        ({"num_hidden_layers": None}, "num_layers is null"),
        ({"rms_norm_eps": "1e-5"}, 'norm_eps is "1e-5"'),
        ({"num_attention_heads": 0}, "division"),
    ):
        message = refusal(**changes)
        assert message.startswith(f"{at}: not the config of a LLaMA (") and what in message
    assert refusal(head_dim=32) == f"{at}: its head_dim is nothing that Meta's format can say"
    assert refusal(rope_scaling={"rope_type": "yarn", "factor": 2.0}).endswith("its rope_scaling is nothing that "
                                                                               "Meta's format can say")  # fmt: skip
    whole, name = "(9 such); a model is converted whole or not at all", "input_layernorm.weight"
    assert refusal(num_hidden_layers=3) == f"{folder}: tensor model.layers.2.{name} is missing {whole}"
    assert refusal(num_hidden_layers=1) == f"{folder}: tensor model.layers.1.{name} is not of a LLaMA {whole}"
    assert refusal(intermediate_size=176).endswith(
        "tensor model.layers.0.mlp.gate_proj.weight is float16 [192, 64], by config.json floats [176, 64]"
    )
    assert refusal("--num_shards", 3) == "--num_shards 3: 4 heads do not divide by it; choose another number"
    assert refusal("--num_shards", 0) == "--num_shards 0: expected a number above 0"
    quantised = tensors(folder) | {"model.norm.weight": torch.ones(64, dtype=torch.int16)}
    save_file(quantised, folder / "model.safetensors", {"format": "pt"})
    assert "is a delta (an exact one: model.norm.weight is I16)" in refusal()
    (folder / "config.json").unlink()
    with pytest.raises(utils.UserError, match="config.json: .*; --reverse takes a model folder of transformers"):
        run(folder, tmp_path / "back", "--reverse")


# ---------------------------------------------------------------------------------------------------------------------
# dtypes, views, sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("new", ["float16", "bfloat16", "float32"])
def test_dtype_casts_as_torch_does(old, new, pieces, tmp_path, capsys):
    weights = make_weights(dtype=getattr(torch, old))
    run(make_raw(tmp_path / "raw", pieces, weights), tmp_path / "out", "--dtype", new, "--verify")
    wanted = {name: tensor.to(getattr(torch, new)) for name, tensor in expected(weights).items()}
    assert_same(tensors(tmp_path / "out"), wanted)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, new)
    said = f"dtype: {old} -> {new}, as --dtype says; the result is no longer bit for bit the source"
    assert (said in capsys.readouterr().err) == (old != new)


def test_a_cast_that_overflows_is_refused(pieces, tmp_path, monkeypatch):
    weights = make_weights(dtype=torch.bfloat16)
    weights["layers.1.feed_forward.w2.weight"][3, 4] = 1e5
    source = make_raw(tmp_path / "raw", pieces, weights)
    with pytest.raises(utils.UserError) as caught, monkeypatch.context() as patch:
        patch.setattr("weights.WeightWriter", None)  # nothing is begun
        run(source, tmp_path / "out", "--dtype", "float16")
    assert str(caught.value) == (
        f"{source / 'consolidated.00.pth'}: tensor layers.1.feed_forward.w2.weight: cast to float16 it: holds values "
        "that are not finite (infinite or NaN); choose another --dtype"
    )
    run(source, tmp_path / "out")  # the way round


def test_every_bit_pattern_of_finite_numbers_survives(pieces, tmp_path):
    weights = make_weights()
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = bits[bits.isfinite()]
    assert len(finite) == 63488  # of both zeros, subnormal numbers and all others
    weights["tok_embeddings.weight"] = finite.repeat(2)[:64000].reshape(1000, 64)
    weights["layers.0.attention.wq.weight"] = finite[:4096].reshape(64, 64).clone()
    run(make_raw(tmp_path / "raw", pieces, weights), tmp_path / "out")
    found = tensors(tmp_path / "out")
    for name, tensor in expected(weights).items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_views_of_shared_storage_transposed_and_wrapped(pieces, tmp_path):
    weights = make_weights()
    storage = torch.cat([tensor.flatten() for tensor in reversed(weights.values())])
    views, end = {}, len(storage)
    for name, tensor in weights.items():
        views[name] = storage[end - tensor.numel() : end].view(tensor.shape)
        end -= tensor.numel()
    weights["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].contiguous()
    views["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].t().contiguous().t()
    views["layers.1.feed_forward.w2.weight"] = weights["layers.1.feed_forward.w2.weight"].t().contiguous().t()
    wide = torch.zeros(64, 200, dtype=torch.float16)
    wide[:, 4:196] = weights["layers.0.feed_forward.w2.weight"]
    views["layers.0.feed_forward.w2.weight"] = wide[:, 4:196]
    views["norm.weight"] = torch.nn.Parameter(weights["norm.weight"])
    source = make_raw(tmp_path / "raw", pieces, weights)
    views = collections.OrderedDict(views)
    views._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save({"model": views}, source / "consolidated.00.pth")
    assert os.path.getsize(source / "consolidated.00.pth") < 2.5 * storage.nbytes
    run(source, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected(weights))


def test_blocks_of_one_row_give_the_same_bytes(pieces, tmp_path, monkeypatch):
    source = make_raw(tmp_path / "raw", pieces, make_weights(2), 2, n_kv_heads=2)
    run(source, tmp_path / "out")
    monkeypatch.setattr(weights, "BLOCK", 100)
    run(source, tmp_path / "small", "--verify")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name


def test_no_model_class_of_transformers_is_loaded_to_convert(pieces, tmp_path):
    source = make_raw(tmp_path / "raw", pieces)
    code = (
        f"import sys, convert_llama_weights as c; c.main(['--input_dir', {str(source)!r}, '--output_dir', 'out']); "
        "print('transformers.modeling_utils' in sys.modules)"
    )
    words = {"cwd": tmp_path, "env": environment() | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **words)
    assert done.stdout == "False\n", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Folders and commands
# ---------------------------------------------------------------------------------------------------------------------


def test_the_tutorials_command_and_its_layouts(tmp_path, capsys):
    make_tiny_raw(tmp_path / "raw", num_shards=2, num_key_value_heads=2)
    assert sorted(os.listdir(tmp_path / "raw")) == ["tiny", "tokenizer.model"]
    os.rename(tmp_path / "raw" / "tiny", tmp_path / "raw" / "7B")
    run(tmp_path / "raw", tmp_path / "raw" / "hf", "--model_size", "7B", "--verify")  # inside the input folder
    first = {path.name: path.read_bytes() for path in (tmp_path / "raw" / "hf").iterdir()}
    run(tmp_path / "raw", tmp_path / "out")  # the only one
    run(tmp_path / "raw" / "7B", tmp_path / "out2")
    run(tmp_path / "raw" / "7B", tmp_path / "out3", "--model_size", "7B")
    (tmp_path / "flat").mkdir()
    for path in [*(tmp_path / "raw" / "7B").iterdir(), tmp_path / "raw" / "tokenizer.model"]:
        (tmp_path / "flat" / path.name).symlink_to(path)  # as in a hub cache
    os.rename(tmp_path / "flat" / "consolidated.00.pth", tmp_path / "flat" / "consolidated.0.pth")
    (tmp_path / "empty").mkdir()
    run(tmp_path / "flat", tmp_path / "empty")
    for name in ("out", "out2", "out3", "empty"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == first
    os.rename(tmp_path / "raw" / "7B", tmp_path / "raw" / "13B")
    (tmp_path / "raw" / "30B").mkdir()
    (tmp_path / "raw" / "30B" / "consolidated.00.pth").touch()
    for words, message in {
        ("--model_size", "7B"): f"--model_size 7B: {tmp_path / 'raw'} has no such subfolder; it holds 13B, 30B",
        (): f"--input_dir {tmp_path / 'raw'}: holds several models: 13B, 30B; choose one with --model_size",
    }.items():
        with pytest.raises(utils.UserError) as caught:
            run(tmp_path / "raw", tmp_path / "new", *words)
        assert str(caught.value) == message
    with pytest.raises(utils.UserError) as caught:
        run(tmp_path / "out", tmp_path / "new")
    assert str(caught.value) == (
        f"--input_dir {tmp_path / 'out'}: no consolidated.00.pth there, nor in a subfolder; it is in the format of "
        "transformers already (--reverse goes back)"
    )
    with pytest.raises(utils.UserError) as caught:
        run("/nowhere", tmp_path / "new")
    assert str(caught.value) == "--input_dir /nowhere: no such folder"


def test_a_single_consolidated_pth(pieces, tmp_path):
    source = make_raw(tmp_path / "raw", pieces)
    os.rename(source / "consolidated.00.pth", source / "consolidated.pth")
    run(source, tmp_path / "out")
    assert len(tensors(tmp_path / "out")) == 21


def test_a_hub_name_works_where_a_path_does(pieces, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--meta--tiny" / "snapshots" / "0123"
    make_raw(snapshot / "original", pieces)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run("meta/tiny", tmp_path / "out")
    assert len(tensors(tmp_path / "out")) == 21
    with pytest.raises(utils.UserError, match="--input_dir meta/other: no such folder here, and from the hub it "):
        run("meta/other", tmp_path / "new")


CONTEXTS = {
    (torch.float16, 1e4, ()): (2048, "2,048 tokens (LLaMA 1, by float16; no file says it, --context sets it)"),
    (torch.bfloat16, 1e4, ()): (4096, "4,096 tokens (Llama 2, by bfloat16; no file says it, --context sets it)"),
    (torch.bfloat16, 1e6, ()): (16384, "16,384 tokens (Code Llama, by rope_theta 1000000; no file says it, --context"),
    (torch.bfloat16, 5e5, ()): (8192, "8,192 tokens (Llama 3, by rope_theta 500000; no file says it, --context sets"),
    (torch.float16, 1e4, ("--context", "4096")): (4096, "4,096 tokens (as --context says)\n"),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_length_is_said_with_its_reason(case, pieces, tmp_path, capsys):
    dtype, theta, words = case
    source = make_raw(tmp_path / "raw", pieces, make_weights(dtype=dtype, theta=theta), rope_theta=theta)
    run(source, tmp_path / "out", *words)
    length, said = CONTEXTS[case]
    assert f"context length: {said}" in capsys.readouterr().err
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == length
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == length


def test_options(pieces, tmp_path, capsys):
    source = make_raw(tmp_path / "raw", pieces)
    run(source, tmp_path / "out", "--llama_version", "1", "--safe_serialization")
    err = capsys.readouterr().err
    assert "--llama_version has no meaning any more; ignored" in err and "--safe_serialization has no" in err
    for words, message in {
        ("--modelsize", "7B"): "unknown option: --modelsize (did you mean --model_size?); --help lists those that "
        "exist",
        ("--max_shard_size",): "argument --max_shard_size: expected one argument",
        ("--context", "-1"): "--context -1: expected a number above 0",
        ("--max_shard_size", "5 apples"): "'5 apples' is no size; write it like 5GB, 500MB or 2GiB",
    }.items():
        with pytest.raises(utils.UserError) as caught:
            run(source, tmp_path / "new", *words)
        assert str(caught.value) == message
    capsys.readouterr()
    run(source, tmp_path / "counted", "--num_shards", 2, "--rope_factor", 8)
    err = capsys.readouterr().err
    assert "--num_shards: no meaning without --reverse; ignored\n" in err
    assert "rotary tables: not stretched" in err
    run(tmp_path / "out", tmp_path / "back", "--reverse", "--dtype", "float32", "--verify")
    assert "--dtype, --verify: no meaning with --reverse; ignored\n" in capsys.readouterr().err
    sizes = {"5GB": 5e9, "500MB": 5e8, "2GiB": 2**31, "1000": 1000, "1.5 kb": 1500, "3T": 3e12, "7B": 7}
    assert {text: convert.parse_size(text) for text in sizes} == sizes


def test_help_and_errors_of_the_command(tmp_path):
    words = {"capture_output": True, "text": True, "env": environment(), "check": False}
    done = subprocess.run([sys.executable, ROOT / "convert_llama_weights.py", "--help"], **words)
    assert done.returncode == 0 and "--model_size" in done.stdout
    command = [sys.executable, ROOT / "convert_llama_weights.py", "--input_dir", tmp_path, "--output_dir", "x"]
    done = subprocess.run(command, **words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --input_dir {tmp_path} is empty") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_sentencepiece_through_autotokenizer(pieces, tmp_path, capsys):
    source = make_raw(tmp_path / "raw", pieces)
    run(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = (ROOT / "examples" / "tiny_corpus.txt").read_text(encoding="utf-8").split("\n\n")[:200]
    texts = utils.NASTY_STRINGS + rows
    wanted = utils.sentencepiece_ids(pieces, texts)
    assert tokenizer(texts, add_special_tokens=False).input_ids == wanted
    assert tokenizer(texts).input_ids == [[1, *ids] for ids in wanted]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == pieces.read_bytes()
    assert f"tokenizer: SentencePiece, 1,000 tokens, from {source / 'tokenizer.model'}" in capsys.readouterr().err
    utils.load_tokenizer(tmp_path / "out")
    assert "built from" not in capsys.readouterr().err  # train.py has nothing to mend
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


LLAMA3 = (  # the pattern of Meta's llama3/tokenizer.py, for tiktoken
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def tiktoken_ranks(count):
    """Ranks as tiktoken trains them: 256 bytes, then the commonest neighbours of a corpus, again and again."""
    import regex

    text = (ROOT / "examples" / "tiny_corpus.txt").read_text(encoding="utf-8")[:12000] + "".join(utils.NASTY_STRINGS)
    pieces = dict.fromkeys(regex.findall(LLAMA3, text))
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < count:
        pairs = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(b"".join(best), len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [b"".join(best)]
                i += 1
    return ranks


@pytest.fixture(scope="session")
def ranks():
    ranks = tiktoken_ranks(742)
    assert b"23" not in ranks  # with it 2023, which is cut after three digits, shows where it was cut
    return ranks | {b"23": 742, b" qwxzk": 743}  # the last no two tokens make: it is taken where it is a whole piece


def write_tiktoken(path, ranks):
    import base64

    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


@pytest.mark.parametrize("newer", [False, True])
def test_a_tiktoken_file_becomes_a_right_fast_tokenizer(newer, ranks, pieces, tmp_path, capsys):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    weights = make_weights(dtype=torch.bfloat16, theta=5e5)
    params = {"rope_theta": 5e5} | ({"use_scaled_rope": True} if newer else {})
    source = make_raw(tmp_path / "raw", pieces, weights, **params)
    write_tiktoken(source / "tokenizer.model", ranks)
    run(source, tmp_path / "out")
    assert "tokenizer: tiktoken, 1,000 tokens, from" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = (ROOT / "examples" / "tiny_corpus.txt").read_text(encoding="utf-8").split("\n\n")[:200]
    assert encoding.encode_ordinary("a qwxzk b")[1] == 743
    for text in ["a qwxzk b", "in 2023, 1234567", *utils.NASTY_STRINGS, *rows]:
        wanted = encoding.encode_ordinary(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted, text
        assert tokenizer(text).input_ids == [744, *wanted] and tokenizer.decode(wanted) == text
    names = {"<|begin_of_text|>": 744, "<|end_of_text|>": 745, "<|reserved_special_token_0|>": 746,
             "<|start_header_id|>": 750, "<|end_header_id|>": 751, "<|eot_id|>": 753}  # fmt: skip
    names |= {"<|eom_id|>": 752, "<|python_tag|>": 754, "<|finetune_right_pad_id|>": 748} if newer else {}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert len(tokenizer) == 1000 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (744, 745)
    assert tokenizer("<|eot_id|>a<|eot_id|>").input_ids == [744, 753, ranks[b"a"], 753]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == ([745, 752, 753] if newer else [745, 753])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (744, 745)
    utils.load_tokenizer(tmp_path / "out")  # does not take the file for one of SentencePiece
    assert (tmp_path / "out" / "tokenizer.tiktoken").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_special_tokens_of_llama_3_stand_at_their_published_ids():
    old, new = convert.llama3_special_tokens(256, False), convert.llama3_special_tokens(256, True)
    assert (len(old), len(new), len(set(old)), len(set(new))) == (256, 256, 256, 256)
    at = {2: "reserved_special_token_0", 5: "reserved_special_token_3", 8: "reserved_special_token_4", 9: "eot_id",
          10: "reserved_special_token_5", 255: "reserved_special_token_250"}  # fmt: skip
    assert {i: old[i].strip("<|>") for i in at} == at
    at = {4: "finetune_right_pad_id", 5: "reserved_special_token_2", 8: "eom_id", 9: "eot_id", 10: "python_tag",
          11: "reserved_special_token_3", 255: "reserved_special_token_247"}  # fmt: skip
    assert {i: new[i].strip("<|>") for i in at} == at


def test_train_py_accepts_what_the_converter_wrote(tmp_path):
    make_tiny_raw(tmp_path / "raw")
    run(tmp_path / "raw", tmp_path / "out")
    config, tokenizer = utils.load_config(tmp_path / "out"), utils.load_tokenizer(tmp_path / "out", 512)
    model = utils.load_weights(tmp_path / "out", config, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 234816 and tokenizer.eos_token_id == 2
    with pytest.raises(utils.UserError) as caught:
        utils.load_config(str(tmp_path / "out" / "llama-7b"))
    out = tmp_path / "out"
    assert str(caught.value).endswith(f"; give the model: {out}")
    with pytest.raises(utils.UserError) as caught:
        utils.load_config(str(tmp_path / "raw" / "tiny"))
    command = f"python convert_llama_weights.py --input_dir {tmp_path / 'raw' / 'tiny'} --output_dir NEW"
    assert str(caught.value).endswith(f" (params.json); convert them first: {command}")


def test_the_old_converters_layout_gets_the_copy_command(tmp_path):
    make_tiny_raw(tmp_path / "raw")
    run(tmp_path / "raw", tmp_path / "out")
    (tmp_path / "X" / "tokenizer").mkdir(parents=True)
    os.rename(tmp_path / "out", tmp_path / "X" / "llama-7b")
    for path in list((tmp_path / "X" / "llama-7b").glob("*token*")):
        os.rename(path, tmp_path / "X" / "tokenizer" / path.name)
    model = tmp_path / "X" / "llama-7b"
    with pytest.raises(utils.UserError) as caught:
        utils.load_tokenizer(model)
    command = f"cp {tmp_path / 'X' / 'tokenizer'}/*token* {model}/"
    assert str(caught.value) == f"{model}: it holds no tokenizer; {tmp_path / 'X' / 'tokenizer'} has one: {command}"
    subprocess.run(command, shell=True, check=True)
    assert utils.load_tokenizer(model).eos_token_id == 2
    with pytest.raises(utils.UserError, match=f"; give the model: {model}$"):
        utils.load_config(tmp_path / "X")


def test_make_tiny_llama_writes_the_raw_layout(tmp_path):
    script = ROOT / "examples" / "make_tiny_llama.py"
    words = {"capture_output": True, "text": True, "env": environment(), "check": False, "cwd": tmp_path}
    command = [sys.executable, script, "--output_dir", "raw"]
    options = ["--raw", "--num_shards", "2", "--num_key_value_heads", "2"]
    done = subprocess.run([*command, *options], **words)
    assert done.returncode == 0, done.stderr
    params = json.loads((tmp_path / "raw" / "tiny" / "params.json").read_text())
    assert params == PARAMS | {"n_kv_heads": 2, "norm_eps": 1e-6}
    for i in range(2):
        shard = torch.load(tmp_path / "raw" / "tiny" / f"consolidated.{i:02}.pth", weights_only=True)
        shapes = {name: list(tensor.shape) for name, tensor in shard.items() if not name.startswith("layers.1")}
        assert len(shard) == 22 and {tensor.dtype for tensor in shard.values()} == {torch.float16}
        assert shapes["tok_embeddings.weight"] == [1000, 32] and shapes["output.weight"] == [500, 64]
        assert shapes["layers.0.attention.wk.weight"] == [16, 64] and shapes["layers.0.attention.wo.weight"] == [64, 32]
    done = subprocess.run([*command, *options], **words)
    assert done.stderr == "error: --output_dir raw: there is a tiny already; choose another folder\n"
    done = subprocess.run([*command, "--num_shards", "2"], **words)
    assert done.stderr == "error: --num_shards and --num_key_value_heads belong to --raw; add it\n"
    with pytest.raises(utils.UserError, match="^2 key-value heads must divide the 4 heads, and --num_shards 4 "):
        make_tiny_raw(tmp_path / "other", num_shards=4, num_key_value_heads=2)
    assert not Path(tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The parts in weights.py
# ---------------------------------------------------------------------------------------------------------------------


def test_row_blocks_cover_every_row_once_in_whole_heads():
    assert list(weights.row_blocks((10, 4), "float16", block=24)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(weights.row_blocks((8, 4), "float16", 4, block=60)) == [(0, 4), (4, 8)]
    assert list(weights.row_blocks((8, 4), "float16", 4, block=1)) == [(0, 4), (4, 8)]  # a head is never split
    assert list(weights.row_blocks((), "float32")) == [(0, 1)] and list(weights.row_blocks((0, 3), "float32")) == []


def test_blocks_of_a_tensor_whose_rows_lie_apart(tmp_path):
    matrix = torch.arange(64 * 48, dtype=torch.float32).reshape(64, 48)
    views = {"turned": matrix.T, "cube": matrix.reshape(8, 8, 48).permute(2, 0, 1)}
    torch.save(views, tmp_path / "x.bin")
    stored = weights.open_weights(tmp_path / "x.bin")
    for name, wanted in views.items():
        block = stored[name].read(8, 12)
        assert torch.equal(torch.from_numpy(block).view(torch.float32), wanted[8:12]) and block.flags.c_contiguous


def test_a_plan_is_split_where_transformers_would():
    plan = {name: ("float16", (rows, 10)) for name, rows in {"a": 10, "b": 30, "c": 1, "d": 4}.items()}
    assert weights.split_plan(plan, 10**6) == {"model.safetensors": plan}
    parts = weights.split_plan(plan, 240)
    assert [list(part) for part in parts.values()] == [["a"], ["b"], ["c", "d"]]  # b alone is larger than a shard
    assert list(parts) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weights.weight_file_names(plan, 240) == [*parts, "model.safetensors.index.json"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_on_a_terminal_and_elsewhere(is_terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with weights.meter("weights", 4 * 10**9) as meter:
        meter.update(10**9)
        meter.update(3 * 10**9)
    *bar, last = capsys.readouterr().err.split("\r")
    assert re.search(r"weights: 4\.00 GB, [\d.]+ GB/s, 0 s\n$", last) and bool(bar) == is_terminal
    assert not is_terminal or ("weights" in bar[1] and "4.00G" in bar[1])


def test_same_place_sees_through_links(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for file in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text(name)
    os.remove(tmp_path / "b" / "tokenizer.json")
    os.link(tmp_path / "a" / "tokenizer.json", tmp_path / "b" / "tokenizer.json")
    os.remove(tmp_path / "c" / "model.safetensors")
    os.link(tmp_path / "a" / "model.safetensors", tmp_path / "c" / "model.safetensors")
    (tmp_path / "link").symlink_to("a")
    places = {name: weights.same_place(tmp_path / "a", tmp_path / name) for name in ("a", "b", "c", "link", "gone")}
    assert places == {"a": True, "b": False, "c": True, "link": True, "gone": False}
    assert weights.same_place(tmp_path / "gone", tmp_path / "b" / ".." / "gone")
