"""apply_delta.py: three kinds of delta against plain arithmetic and peft, and everything that can be wrong with them."""

import itertools
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, environment, finish
from safetensors.torch import load_file, save_file

import apply_delta as script
import train
import utils
import weights
from utils import UserError

CONFIG = {"model_type": "llama", "vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
SIGNED = {2: torch.int16, 4: torch.int32}


def shapes(rows=40, hidden=8):
    """The tensors of a LLaMA with two layers, as far as apply_delta.py can tell."""
    found = {
        "model.embed_tokens.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    for i in range(2):
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        found[f"model.layers.{i}.self_attn.v_proj.weight"] = (hidden, hidden)
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, 3 * hidden)
        found[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
    return found


def numbers(dtype=HALF, seed=0, scale=1.0, **kwargs):
    """Random tensors of those shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in shapes(**kwargs).items()
    }


def model(folder, tensors, config=None, tokenizer=None):
    """Write a model folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = {"vocab_size": len(tensors["model.embed_tokens.weight"])} if "model.embed_tokens.weight" in tensors else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | rows | (config or {})), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.model").write_text(tokenizer, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"of": tokenizer}), encoding="utf-8")
    return folder


def tensors_in(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_bits(found, expected):
    """Every tensor has the dtype, the shape and the bits that are expected; there are no others."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        view = SIGNED.get(tensor.element_size(), tensor.dtype)
        assert torch.equal(found[name].view(view), tensor.contiguous().view(view)), name


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def refused(*arguments, **options):
    """The text of the UserError that apply_delta raises."""
    with pytest.raises(UserError) as error:
        script.apply_delta(*map(str, arguments), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that every tensor takes several."""
    monkeypatch.setattr(weights, "BLOCK", 100)


@pytest.fixture
def base(tmp_path):
    return model(tmp_path / "base", numbers(), tokenizer="the base's")


@pytest.fixture
def delta(tmp_path):
    return model(tmp_path / "delta", numbers(seed=1, scale=0.01), tokenizer="the delta's")


# ---------------------------------------------------------------------------------------------------------------------
# Weight deltas
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT], ids=str)
def test_float16_delta_is_added_to_the_base_in_float16(tmp_path, delta, dtype, capsys):
    base = model(tmp_path / "base", numbers(dtype))
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    old, change = tensors_in(base), tensors_in(delta)
    assert_bits(tensors_in(tmp_path / "out"), {name: old[name].half() + change[name] for name in old})
    shown = capsys.readouterr()
    assert f"delta: {delta} is a weight delta in float16; new rows: none, the vocabularies are the same" in shown.err
    assert "arithmetic: float16(base) + delta, as FastChat; result in float16" in shown.err
    assert shown.out == f"{tmp_path / 'out'}: 11 tensors, 0.00 GB\n"


def test_the_order_of_casts_matters(tmp_path, delta):
    """What the test above would not see if its numbers were tame: casting first and adding first differ."""
    old, change = numbers(FLOAT), tensors_in(delta)
    first = {name: old[name].half() + change[name] for name in old}
    last = {name: (old[name] + change[name].float()).half() for name in old}
    assert sum(int((first[name] != last[name]).sum()) for name in old) > 50


def test_vicuna_v0_new_rows_of_the_base_are_zero(tmp_path, base, capsys):
    change = numbers(seed=1, scale=0.01, rows=42)
    delta = model(tmp_path / "delta", change, {"vocab_size": 32000})
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    expected = {}
    for name, old in tensors_in(base).items():
        grown = torch.zeros(change[name].shape, dtype=HALF)
        grown[: len(old)] = old
        expected[name] = grown + change[name]
    assert_bits(tensors_in(tmp_path / "out"), expected)
    rule = "new rows: 40 -> 42, those that the base lacks are zero in it (FastChat's rule for float16 deltas)"
    assert rule in capsys.readouterr().err
    assert read(tmp_path / "out" / "config.json")["vocab_size"] == 42
    assert read(tmp_path / "out" / "run.json")["prompt_style"] == "vicuna_v0"
    assert read(tmp_path / "out" / "run.json")["new_rows"] == "zero"


def test_stanford_new_rows_of_the_base_are_the_mean(tmp_path, base, capsys):
    change = numbers(FLOAT, seed=1, scale=0.01, rows=41)
    delta = model(tmp_path / "diff", change)
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    expected = {}
    for name, old in tensors_in(base).items():
        old = old.float()
        new = old.mean(dim=0, keepdim=True).expand(len(change[name]) - len(old), *old.shape[1:])
        expected[name] = change[name] + torch.cat([old, new])
    assert_bits(tensors_in(tmp_path / "out"), expected)
    shown = capsys.readouterr().err
    assert "those that the base lacks are the mean of the old ones in it (Stanford Alpaca's rule for float32" in shown
    assert "arithmetic: base + delta in float32, rounded once; result in float32" in shown
    assert read(tmp_path / "out" / "run.json")["prompt_style"] == "alpaca"


def test_mean_of_slices_of_columns_is_the_mean_of_the_whole(tmp_path, monkeypatch):
    matrix = torch.randn(3001, 320, generator=torch.Generator().manual_seed(0)).half()
    save_file({"x": matrix}, tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "BLOCK", 2**16)
    monkeypatch.setattr(script, "PRODUCT", 4 * 3001 * 64)
    row = script.mean_row(weights.open_weights(tmp_path / "x.safetensors")["x"])
    assert torch.equal(row, matrix.float().mean(dim=0))


def test_bfloat16_delta_is_added_in_float32_and_rounded_once(tmp_path, base):
    change = numbers(BRAIN, seed=1, scale=0.01)
    delta = model(tmp_path / "delta", change)
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    expected = {name: (old.float() + change[name].float()).bfloat16() for name, old in tensors_in(base).items()}
    assert_bits(tensors_in(tmp_path / "out"), expected)
    assert "prompt_style" not in read(tmp_path / "out" / "run.json")  # of no family that is known


def test_new_rows_without_a_rule_are_asked_for(tmp_path, base):
    change = numbers(BRAIN, seed=1, scale=0.01, rows=41)
    delta = model(tmp_path / "delta", change)
    message = refused(base, tmp_path / "out", delta)
    assert message == (
        "the base has 40 rows of vocabulary and the other 41; no rule says what a bfloat16 delta takes the missing "
        "ones to be; give --new_rows zero (FastChat's rule) or mean (Stanford Alpaca's)"
    )
    for rule, row in (("zero", torch.zeros(8)), ("mean", tensors_in(base)["lm_head.weight"].float().mean(dim=0))):
        script.apply_delta(str(base), str(tmp_path / rule), str(delta), new_rows=rule)
        found = tensors_in(tmp_path / rule)["lm_head.weight"][40]
        assert torch.equal(found, (row + change["lm_head.weight"][40].float()).bfloat16())


def test_dtype_of_the_result(tmp_path, base, delta):
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta), dtype="float32")
    change = tensors_in(delta)
    assert_bits(
        tensors_in(tmp_path / "out"), {n: old.float() + change[n].float() for n, old in tensors_in(base).items()}
    )
    assert read(tmp_path / "out" / "config.json")["torch_dtype"] == "float32"


def test_overflow_is_refused_and_the_way_round_works(tmp_path, delta):
    tensors = numbers(BRAIN)
    tensors["model.layers.1.mlp.down_proj.weight"][7, 3] = 70000.0
    base = model(tmp_path / "base", tensors)
    message = refused(base, tmp_path / "out", delta)
    assert message == (
        "tensor model.layers.1.mlp.down_proj.weight: the result is too large for float16; "
        "give --dtype float32 or bfloat16"
    )
    assert names_in(tmp_path) == {"base", "delta"}
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta), dtype="bfloat16")
    assert tensors_in(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"][7, 3] > 69000


@pytest.mark.parametrize("culprit", ["base", "delta"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_by_file(tmp_path, base, delta, culprit, value):
    folder = {"base": base, "delta": delta}[culprit]
    tensors = tensors_in(folder)
    tensors["lm_head.weight"][39, 7] = value
    model(folder, tensors)
    message = refused(base, tmp_path / "out", delta)
    assert message.startswith(
        f"{folder / 'model.safetensors'}: tensor lm_head.weight: holds values that are not finite"
    )
    assert not (tmp_path / "out").exists()


def test_bin_files_and_rotary_frequencies(tmp_path, base, delta):
    """One .bin file, several with an index, the frequencies of early conversions; safetensors go before .bin."""
    old, change = tensors_in(base), tensors_in(delta)
    expected = {name: old[name] + change[name] for name in old}
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) for i in range(2)}
    (base / "model.safetensors").unlink()
    torch.save(old | frequencies, base / "pytorch_model.bin")
    (delta / "model.safetensors").unlink()
    parts = [dict(list(change.items())[:4]), dict(list(change.items())[4:])]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for part, file in zip(parts, files):
        torch.save(part, delta / file)
    index = {"weight_map": {name: file for part, file in zip(parts, files) for name in part}}
    (delta / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    assert_bits(tensors_in(tmp_path / "out"), expected)
    model(base, {name: tensor * 0 for name, tensor in old.items()})
    script.apply_delta(str(base), str(tmp_path / "again"), str(delta))
    assert_bits(tensors_in(tmp_path / "again"), change)


def test_result_is_split_into_shards(tmp_path, base, delta, monkeypatch):
    monkeypatch.setattr(weights.split_plan, "__defaults__", (500,))
    monkeypatch.setattr(weights.weight_file_names, "__defaults__", (500,))
    defaults = weights.WeightWriter.__init__.__defaults__
    monkeypatch.setattr(weights.WeightWriter.__init__, "__defaults__", (500, *defaults[1:]))
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    change = tensors_in(delta)
    assert_bits(tensors_in(tmp_path / "out"), {name: old + change[name] for name, old in tensors_in(base).items()})


def test_config_and_tokenizer_are_those_of_the_right_side(tmp_path, base, delta):
    (delta / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 7.0, "torch_dtype": "x", "pad_token_id": -1}))
    (delta / "generation_config.json").write_text('{"temperature": 0.5}')
    (delta / "README.md").write_text("not for the model")
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    config = read(tmp_path / "out" / "config.json")
    assert config == CONFIG | {"rope_theta": 7.0, "torch_dtype": "float16", "pad_token_id": None}
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "the delta's"
    assert names_in(tmp_path / "out") == {
        "config.json", "generation_config.json", "model.safetensors", "run.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (delta / name).unlink()
    script.apply_delta(str(base), str(tmp_path / "again"), str(delta))
    assert (tmp_path / "again" / "tokenizer.model").read_text() == "the base's"
    assert "rope_theta" not in read(tmp_path / "again" / "config.json")
    (base / "config.json").unlink()
    assert refused(base, tmp_path / "third", delta).endswith(f"nor has {base}; copy it there")
    assert not (tmp_path / "third").exists()


def json_tokenizer(folder, vocab, **originals):
    """tokenizer.json with a vocabulary, as transformers saves it alone, and files that it was built from."""
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for kind, text in originals.items():
        (folder / f"tokenizer.{kind}").write_text(text)


@pytest.mark.parametrize("kind", ["model", "tiktoken"])
@pytest.mark.parametrize("fits", [True, False])
def test_the_original_tokenizer_goes_along_where_it_fits(tmp_path, base, fits, kind, capsys):
    """Into a merge, a delta and what the delta gives; a base of other ids keeps its file to itself."""
    target = model(tmp_path / "target", numbers(seed=3))
    ids = {"a": 0, "b": 1}
    json_tokenizer(base, ids, **{kind: "the base's"})
    json_tokenizer(target, ids if fits else {"b": 0, "a": 1})
    adapter(tmp_path / "lora")
    json_tokenizer(tmp_path / "lora", ids if fits else {"a": 0})
    script.apply_delta(str(base), str(tmp_path / "merged"), str(tmp_path / "lora"))
    assert (f"tokenizer from {tmp_path / 'lora'} and {base}" in capsys.readouterr().err) == fits
    make(base, target, tmp_path / "made", exact=True)
    script.apply_delta(str(base), str(tmp_path / "applied"), str(tmp_path / "made"))
    for folder, of in (("merged", "lora"), ("made", "target"), ("applied", "target")):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (tmp_path / of / "tokenizer.json").read_bytes()
        assert (tmp_path / folder / f"tokenizer.{kind}").is_file() == fits, folder
        assert not fits or (tmp_path / folder / f"tokenizer.{kind}").read_text() == "the base's"
    json_tokenizer(target, ids, **{kind: "the target's"})
    make(base, target, tmp_path / "own")
    assert (tmp_path / "own" / f"tokenizer.{kind}").read_text() == "the target's"


def test_what_run_json_says(tmp_path, base, delta, capsys):
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    run = utils.read_run(tmp_path / "out")
    assert run["prompt_style"] == "vicuna_v1.1" and run["status"] == "finished"
    assert (run["arguments"]["base"], run["arguments"]["delta"]) == (str(base), str(delta))
    assert set(run["files"]) == names_in(tmp_path / "out") - {"run.json"}
    utils.write_json({"made_by": "cria", "prompt_style": "alpaca"}, delta / "run.json")
    script.apply_delta(str(base), str(tmp_path / "styled"), str(delta))
    assert read(tmp_path / "styled" / "run.json")["prompt_style"] == "alpaca"
    (delta / "run.json").write_text("somebody else's")
    capsys.readouterr()
    script.apply_delta(str(base), str(tmp_path / "other"), str(delta))
    assert f"{delta / 'run.json'}: not a run.json of these scripts; what it says is not used" in capsys.readouterr().err
    assert read(tmp_path / "other" / "run.json")["prompt_style"] == "vicuna_v1.1"


def test_train_refuses_to_resume_in_a_folder_of_ours(tmp_path, base, delta):
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds what apply_delta.py wrote; choose another --output_dir"):
            train.resume_point(tmp_path / "out", {}, overwrite=overwrite)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_checksum_of_stanford_is_asked_for_and_never_forced(tmp_path, base, monkeypatch, capsys):
    change = numbers(FLOAT, seed=1, scale=0.01)
    delta = model(tmp_path / "diff", change)
    total = sum((old.double() + change[name]).sum().item() for name, old in tensors_in(base).items())
    script.apply_delta(str(base), str(tmp_path / "free"), str(delta))
    message = refused(base, tmp_path / "out", delta, check_sum=True)
    assert message.startswith(f"--check_integrity_naively: the sum of all numbers is {total:.4f}, with rotary")
    assert "Alpaca 7B's is 50637.1836; for any other model leave the option out" in message
    assert not (tmp_path / "out").exists()
    rotary = 2 * (1 + 10000**-0.5)  # two layers, heads of 4
    for i, expected in enumerate((total + 0.04, total + rotary - 0.04)):
        monkeypatch.setattr(script, "ALPACA_SUM", expected)
        script.apply_delta(str(base), str(tmp_path / f"sum{i}"), str(delta), check_sum=True)
    assert "integrity: the sum of all numbers is Stanford Alpaca 7B's" in capsys.readouterr().err
    monkeypatch.setattr(script, "ALPACA_SUM", total + 0.1)
    refused(base, tmp_path / "out", delta, check_sum=True)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit together
# ---------------------------------------------------------------------------------------------------------------------


def spoil(tensors, what):
    """Change a set of tensors; returns what a message must say."""
    name = "model.layers.1.self_attn.v_proj.weight"
    if what == "missing":
        del tensors[name]
        return f"{name} is missing from the delta"
    if what == "extra layer":
        tensors["model.layers.2.self_attn.v_proj.weight"] = tensors[name].clone()
        return "model.layers.2.self_attn.v_proj.weight is not in the base"
    if what == "renamed":
        tensors["layers.1.self_attn.v_proj.weight"] = tensors.pop(name)
        return f"{name} is missing from the delta; layers.1.self_attn.v_proj.weight is not in the base"
    if what == "shape":
        tensors[name] = tensors[name][:, :4].contiguous()
        return f"{name} is [8, 8] in the base and [8, 4] in the delta"
    if what == "rows of a layer":
        tensors[name] = torch.cat([tensors[name]] * 2)
        return f"{name} is [8, 8] in the base and [16, 8] in the delta"
    if what == "two ways":
        tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"]] * 2)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(3, 1)
        return "rows are added in several ways: [(40, 80), (40, 120)]"
    if what == "fewer rows":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:30].contiguous()
        return "lm_head.weight is [40, 8] in the base and [30, 8] in the delta"
    if what == "integers":
        tensors[name] = tensors[name].to(torch.int64)
        return f"{name} is int64 in the delta"


@pytest.mark.parametrize(
    "what", ["missing", "extra layer", "renamed", "shape", "rows of a layer", "two ways", "fewer rows", "integers"]
)
def test_tensors_are_compared_before_anything_is_written(tmp_path, base, delta, what):
    tensors = tensors_in(delta)
    expected = spoil(tensors, what)
    model(delta, tensors, {"vocab_size": 40})
    message = refused(base, tmp_path / "new" / "out", delta)
    assert message == f"base and delta do not fit together: {expected}; check that both are of the same model"
    assert names_in(tmp_path) == {"base", "delta"}


def test_a_long_list_is_cut_and_counted(tmp_path, base):
    delta = model(tmp_path / "delta", numbers(hidden=16, seed=1), {"num_attention_heads": 4})
    message = refused(base, tmp_path / "out", delta)
    assert message.count("in the base and") == 6 and "; and 6 more; check that" in message


def test_heads_are_compared_though_no_shape_shows_them(tmp_path, base, delta):
    model(delta, tensors_in(delta), {"num_attention_heads": 4})
    assert "num_attention_heads is 2 in the base's config and 4 in the delta's" in refused(base, tmp_path / "o", delta)


def test_a_whole_model_is_no_delta(tmp_path, base):
    tuned = {name: tensor + 0.01 for name, tensor in tensors_in(base).items()}
    delta = model(tmp_path / "vicuna-v1.3", tuned)
    assert refused(base, tmp_path / "out", delta) == (
        f"{delta}: a whole model, it seems, and no delta: its model.norm.weight is nearly the base's; "
        "use it as it is, or if it is a delta all the same, give --any_base"
    )
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta), any_base=True)
    assert_bits(tensors_in(tmp_path / "out"), {name: old + tuned[name] for name, old in tensors_in(base).items()})


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-10]), "truncated"),
    "lfs": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "a web page or an error message"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_are_refused_by_name(tmp_path, base, delta, kind, damage):
    if kind == "pytorch_model.bin":
        torch.save(tensors_in(delta), delta / kind)
        (delta / "model.safetensors").unlink()
    spoil_file, words = DAMAGES[damage]
    spoil_file(delta / kind)
    message = refused(base, tmp_path / "out", delta)
    assert message.startswith(f"{delta / kind}: {words}")
    assert names_in(tmp_path) == {"base", "delta"}


def test_flipped_byte_in_a_bin_is_found_by_its_checksum(tmp_path, base, delta):
    tensors = tensors_in(delta)
    torch.save(tensors, delta / "pytorch_model.bin")
    (delta / "model.safetensors").unlink()
    data = bytearray((delta / "pytorch_model.bin").read_bytes())
    place = bytes(data).index(tensors["model.layers.0.mlp.down_proj.weight"].numpy().tobytes())
    data[place + 100] ^= 1
    (delta / "pytorch_model.bin").write_bytes(data)
    message = refused(base, tmp_path / "out", delta)
    assert "damaged: the CRC-32 of tensor model.layers.0.mlp.down_proj.weight is" in message
    assert names_in(tmp_path) == {"base", "delta"}


def test_a_missing_shard_is_refused(tmp_path, base, delta):
    """FastChat wrote 14 of 21 tensors and exited with 0."""
    names = list(tensors_in(base))
    index = {"weight_map": {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}}
    save_file(
        {n: t for n, t in tensors_in(base).items() if names.index(n) % 2 == 0},
        base / "model-00001-of-00002.safetensors",
    )
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(base, tmp_path / "out", delta)
    assert f"{base} is unfinished (model-00002-of-00002.safetensors is missing)" in message


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, base, delta):
    (delta / "model.safetensors").rename(tmp_path / "x.safetensors")
    names = dict.fromkeys(tensors_in(base), "../x.safetensors")
    (delta / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "names ../x.safetensors, which is not a file beside it" in refused(base, tmp_path / "out", delta)


def test_a_malicious_pickle_does_not_run(tmp_path, base, delta):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (delta / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload()}, delta / "pytorch_model.bin")
    assert "its pickle asks for posix.system, which no weights need" in refused(base, tmp_path / "out", delta)
    assert names_in(tmp_path) == {"base", "delta"}


def test_folders_without_a_model(tmp_path, base, delta):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is empty" in refused(base, tmp_path / "out", tmp_path / "empty")
    assert refused(tmp_path / "none", tmp_path / "out", delta) == f"--base {tmp_path / 'none'}: no such folder"
    for text in ("<html>", "[]", "[" * 100_000, '{"a":' * 100_000):
        (delta / "config.json").write_text(text)
        message = refused(base, tmp_path / "out", delta)
        assert message.startswith(f"{delta / 'config.json'}:") and message.endswith("; copy or download it again")


# ---------------------------------------------------------------------------------------------------------------------
# Making deltas
# ---------------------------------------------------------------------------------------------------------------------


def make(base, target, delta, **options):
    script.make_delta(str(base), str(target), str(delta), **options)
    return delta


@pytest.mark.parametrize("rows", [40, 41])
def test_fastchat_format(tmp_path, base, rows, capsys):
    tuned = numbers(seed=0, rows=rows)
    old = tensors_in(base)
    grown = {n: torch.cat([t, torch.zeros(len(tuned[n]) - len(t), *t.shape[1:], dtype=HALF)]) for n, t in old.items()}
    tuned = {
        n: (t + torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) * 0.01).half()
        for n, t in grown.items()
    }
    target = model(tmp_path / "tuned", tuned, tokenizer="the target's")
    make(base, target, tmp_path / "d")
    expected = {name: tuned[name] - grown[name] for name in tuned}
    assert_bits(tensors_in(tmp_path / "d"), expected)
    assert (tmp_path / "d" / "tokenizer.model").read_text() == "the target's"
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "d"))
    result = {name: grown[name] + expected[name] for name in tuned}
    assert_bits(tensors_in(tmp_path / "out"), result)
    lost = sum(int((result[name] != tuned[name]).sum()) for name in tuned)
    total = sum(tensor.numel() for tensor in tuned.values())
    shown = capsys.readouterr().err
    assert lost > 0
    assert f"applying it gives {lost:,} of {total:,} numbers rounded otherwise ({lost / total:.2%})" in shown
    assert "result: its sha256 is the one that the delta's run.json names" in shown
    if rows == 41:  # another rule, or another dtype, than the one that was recorded gives another result
        for options in ({"new_rows": "mean"}, {"dtype": "float32"}):
            script.apply_delta(str(base), str(tmp_path / str(options)), str(tmp_path / "d"), **options)
            assert "result: its sha256" not in capsys.readouterr().err


def test_stanford_format(tmp_path, base):
    """--dtype float32, whose rule is the mean; Stanford's own arithmetic gives the target back."""
    tuned = numbers(FLOAT, seed=5, rows=41)
    make(base, model(tmp_path / "tuned", tuned), tmp_path / "d", dtype="float32")
    for name, diff in tensors_in(tmp_path / "d").items():
        old = tensors_in(base)[name].float()
        if len(old) < len(diff):
            old = torch.cat([old, old.mean(dim=0, keepdim=True)])
        assert torch.equal(diff, tuned[name] - old)
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "d"))
    for name, tensor in tensors_in(tmp_path / "out").items():
        assert torch.allclose(tensor, tuned[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtypes", [(HALF, HALF), (BRAIN, BRAIN), (FLOAT, FLOAT), (FLOAT, BRAIN), (HALF, FLOAT)], ids=str
)
def test_exact_format_gives_every_bit_back(tmp_path, dtypes):
    old = numbers(dtypes[0])
    tuned = numbers(dtypes[1], seed=1, rows=43)
    for name, tensor in tuned.items():  # any bits at all, as long as they are finite
        low, high = (-(2**15), 2**15) if tensor.element_size() == 2 else (-(2**31), 2**31)
        wild = torch.randint(low, high, tensor.shape, generator=torch.Generator().manual_seed(9))
        wild = wild.to(SIGNED[tensor.element_size()]).view(tensor.dtype)
        tuned[name] = torch.where(wild.isfinite(), wild, tensor)
    base, target = model(tmp_path / "base", old), model(tmp_path / "tuned", tuned, tokenizer="t")
    make(base, target, tmp_path / "d", exact=True)
    assert all(not tensor.is_floating_point() for tensor in tensors_in(tmp_path / "d").values())
    size = sum(tensor.nbytes for tensor in tuned.values())
    assert sum(tensor.nbytes for tensor in tensors_in(tmp_path / "d").values()) == size
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "d"))
    assert_bits(tensors_in(tmp_path / "out"), tuned)


@pytest.mark.parametrize("exact", [False, True])
def test_wrong_base_is_refused_before_anything_is_written(tmp_path, base, exact):
    tuned = {name: tensor + 0.01 for name, tensor in tensors_in(base).items()}
    make(base, model(tmp_path / "tuned", tuned), tmp_path / "d", exact=exact)
    record = read(tmp_path / "d" / "run.json")["delta"]
    other = tensors_in(base)
    other["model.layers.0.self_attn.q_proj.weight"][7, 7] += 0.5
    other = model(tmp_path / "other", other)
    message = refused(other, tmp_path / "new" / "out", tmp_path / "d")
    assert message.startswith(f"{other}: not the base that this delta was made from: its tensors have sha256 ")
    assert f"those of {base} had {record['base']['sha256'][:12]}; give that one" in message
    assert not (tmp_path / "new").exists()
    if exact:
        assert "leave --dtype, --new_rows and --any_base out" in refused(
            other, tmp_path / "o", tmp_path / "d", any_base=True
        )
    else:  # a difference can be added to a relative of its base
        assert message.endswith("or for any base --any_base")
        script.apply_delta(str(other), str(tmp_path / "out"), str(tmp_path / "d"), any_base=True)
        change = tensors_in(tmp_path / "d")
        assert_bits(tensors_in(tmp_path / "out"), {name: old + change[name] for name, old in tensors_in(other).items()})


def test_the_right_base_in_another_dtype_and_format_is_accepted(tmp_path, base):
    """The delta sees float16(base), so a float32 copy in .bin files is the same base to it."""
    tuned = {name: tensor + 0.01 for name, tensor in tensors_in(base).items()}
    make(base, model(tmp_path / "tuned", tuned), tmp_path / "d")
    (tmp_path / "copy").mkdir()
    torch.save(
        {name: tensor.float() for name, tensor in tensors_in(base).items()}, tmp_path / "copy" / "pytorch_model.bin"
    )
    script.apply_delta(str(tmp_path / "copy"), str(tmp_path / "out"), str(tmp_path / "d"))
    change = tensors_in(tmp_path / "d")
    assert_bits(tensors_in(tmp_path / "out"), {name: old + change[name] for name, old in tensors_in(base).items()})


@pytest.mark.parametrize("exact", [False, True])
def test_a_delta_that_was_changed_is_found_and_nothing_is_left(tmp_path, base, exact):
    tuned = {name: tensor + 0.01 for name, tensor in tensors_in(base).items()}
    delta = make(base, model(tmp_path / "tuned", tuned, tokenizer="t"), tmp_path / "d", exact=exact)
    data = bytearray((delta / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (delta / "model.safetensors").write_bytes(data)
    assert refused(base, tmp_path / "out", delta) == (
        f"{delta}: the result is not the one that its run.json names; copy the delta again"
    )
    assert names_in(tmp_path) == {"base", "tuned", "d"}
    (delta / "tokenizer.model").write_text("another")
    message = f"{delta}: its run.json describes other files: tokenizer.model; copy the whole folder again"
    assert refused(base, tmp_path / "out", delta) == message


def test_an_exact_delta_needs_its_record(tmp_path, base):
    delta = make(base, model(tmp_path / "tuned", numbers(seed=4)), tmp_path / "d", exact=True)
    (delta / "run.json").unlink()
    message = f"{delta}: holds integers, as an exact delta does, and no run.json; copy the whole folder"
    assert refused(base, tmp_path / "out", delta) == message


def test_what_a_delta_records(tmp_path, base):
    target = model(tmp_path / "tuned", numbers(seed=4, rows=41), tokenizer="t")
    utils.write_json({"made_by": "cria", "prompt_style": "alpaca", "settings": {}}, target / "run.json")
    delta = make(base, target, tmp_path / "d")
    run = read(delta / "run.json")
    record = run["delta"]
    assert run["prompt_style"] == "alpaca"
    assert record["new_rows"] == "zero" and record["format"] == "weights"
    assert record["tensors"]["model.embed_tokens.weight"] == "float16 [41, 8]"
    assert record["tensors"]["model.norm.weight"] == "float16 [8]"
    assert set(record["tokenizer"]) == {"tokenizer.model", "tokenizer_config.json"}
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    assert read(tmp_path / "out" / "run.json")["prompt_style"] == "alpaca"


def test_fingerprint_does_not_depend_on_order_or_blocks():
    import hashlib

    tensors = {"b": torch.arange(12.0).reshape(4, 3), "a": torch.ones(5, dtype=BRAIN)}
    one, two = script.Fingerprint(), script.Fingerprint()
    for name, tensor in tensors.items():
        one.add(name, tensor)
    for name, tensor in sorted(tensors.items()):
        two.add(name, tensor[:2])
        two.add(name, tensor[2:])
    digests = {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    text = f"a bfloat16 [5] {digests['a']}\nb float32 [4, 3] {digests['b']}\n"
    assert one.hexdigest() == two.hexdigest() == hashlib.sha256(text.encode()).hexdigest()
    two.add("a", torch.ones(1, dtype=BRAIN))
    assert one.hexdigest() != two.hexdigest()


def test_make_refuses_what_does_not_fit(tmp_path, base):
    target = model(tmp_path / "tuned", numbers(seed=4, hidden=16), {"num_attention_heads": 2})
    with pytest.raises(UserError, match="^base and target do not fit together: .*; model.embed_tokens.weight is "):
        make(base, target, tmp_path / "d")
    target = model(tmp_path / "tuned", numbers(seed=4))
    with pytest.raises(UserError, match="^--exact has the target's dtype, and new rows do not matter"):
        make(base, target, tmp_path / "d", exact=True, dtype="float32")
    tensors = tensors_in(target)
    tensors["lm_head.weight"][0, 0] = math.nan
    model(target, tensors)
    for exact in (False, True):
        with pytest.raises(UserError, match="tensor lm_head.weight: holds values that are not finite"):
            make(base, target, tmp_path / "d", exact=exact)
    with pytest.raises(UserError, match="^--target .*: the same place as --base"):
        make(base, base, tmp_path / "d")
    assert names_in(tmp_path) == {"base", "tuned"}


# ---------------------------------------------------------------------------------------------------------------------
# LoRA adapters
# ---------------------------------------------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def adapter(folder, config=None, modules=None, rank=4, scale=0.1, file="adapter_model.safetensors", **extra):
    """Write an adapter for the base of these tests, of the form that alpaca-lora's runs leave; returns its tensors."""
    folder.mkdir(exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(2), {}
    for i in range(2):
        for module in modules or ("self_attn.q_proj", "self_attn.v_proj"):
            rows, columns = shapes()[f"model.layers.{i}.{module}.weight"]
            key = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * scale
    tensors |= extra.pop("tensors", {})
    (torch.save if file.endswith(".bin") else save_file)(tensors, folder / file)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | (config or {})))
    return tensors


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_is_merged_as_the_formula_says(tmp_path, base, file, capsys):
    """W + alpha / rank * B A, and every other tensor as it was."""
    tensors = adapter(tmp_path / "lora", file=file)
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "lora"))
    expected = tensors_in(base)
    for key in [key for key in tensors if ".lora_A." in key]:
        product = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * 2.0
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        expected[name] = (expected[name].float() + product).half()
        assert not torch.equal(expected[name], tensors_in(base)[name])
    assert_bits(tensors_in(tmp_path / "out"), expected)
    shown = capsys.readouterr().err
    assert f"delta: {tmp_path / 'lora'} is a LoRA adapter, rank 4: 4 weights are changed, 0 replaced, 7 kept" in shown
    assert "prompt style: not known; give chat.py --prompt_style" in shown
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "the base's"


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


CASES = {  # options of peft, changes to the base's config, rows after resizing, file
    "alpaca-lora-float16": (HALF, {"bin": True}),
    "alpaca-lora-bfloat16": (BRAIN, {"bin": True}),
    "alpaca-lora-float32": (FLOAT, {}),
    "rslora": (HALF, {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (BRAIN, {"target_modules": ["q_proj", "v_proj", "o_proj"],
                         "rank_pattern": {"layers.1.self_attn.v_proj": 3, "o_proj": 5},
                         "alpha_pattern": {"^model.layers.0.*q_proj": 7, "v_proj": 64}}),
    "regex": (HALF, {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    "layers": (HALF, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "exclude": (HALF, {"exclude_modules": ["model.layers.1.self_attn.q_proj"]}),
    "modules to save": (HALF, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "embedding-float16": (HALF, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding-bfloat16": (BRAIN, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied": (HALF, {"tied": True}),
    "tied, embeddings saved": (BRAIN, {"modules_to_save": ["embed_tokens"], "tied": True}),
    "tied, output layer saved": (HALF, {"modules_to_save": ["lm_head"], "tied": True}),
    "tied, both saved": (HALF, {"modules_to_save": ["embed_tokens", "lm_head"], "tied": True}),
    "tied, added rows": (HALF, {"tied": True, "resize": 220}),
    "added rows": (HALF, {"modules_to_save": ["embed_tokens", "lm_head"], "resize": 220}),
    "half adapter": (HALF, {"half": True}),
    "DoRA-float16": (HALF, {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "DoRA-bfloat16": (BRAIN, {"use_dora": True, "use_rslora": True}),
    "DoRA-float32": (FLOAT, {"use_dora": True}),
    "biases of all": (HALF, {"bias": "all"}),
    "biases of what is adapted": (BRAIN, {"bias": "lora_only"}),
    "rows of tokens": (HALF, {"trainable_token_indices": [3, 150, 7]}),
    "rows of both": (BRAIN, {"trainable_token_indices": {"embed_tokens": [3, 199], "lm_head": [0, 5]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_adapter_equals_peft(tmp_path, peft, case, monkeypatch):
    """Bit for bit what merge_and_unload(safe_merge=False) gives, on a model that transformers loads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(weights, "BLOCK", 8 * 2**10)
    dtype, options = CASES[case]
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | options
    extra = {key: options.pop(key, None) for key in ("bin", "tied", "resize", "half")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=bool(extra["tied"]), attention_bias="bias" in options, mlp_bias="bias" in options,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "base")

    def load():
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        if extra["resize"]:
            loaded.resize_token_embeddings(extra["resize"])
        return loaded

    tuned = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.05
    (tuned.half() if extra["half"] else tuned).save_pretrained(tmp_path / "lora")
    if extra["bin"]:
        file = tmp_path / "lora" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    merged = peft.PeftModel.from_pretrained(load(), tmp_path / "lora").merge_and_unload(safe_merge=False)
    expected = merged.state_dict()
    if not options.get("modules_to_save") and extra["tied"]:
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    script.apply_delta(str(tmp_path / "base"), str(tmp_path / "out"), str(tmp_path / "lora"))
    assert_bits(tensors_in(tmp_path / "out"), expected)
    before = tensors_in(tmp_path / "base")
    assert any(not torch.equal(before[n], expected[n]) for n in before if before[n].shape == expected[n].shape)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.vocab_size == (extra["resize"] or 200)


def test_adapters_in_turn_equal_peft(tmp_path, peft):
    """The second is merged into what the first was merged into; bit for bit as peft does it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    before = tmp_path / "base"
    for name, options in (("one", {"target_modules": ["q_proj", "v_proj"]}), ("two", {"target_modules": ["v_proj"]})):
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.05
        tuned.save_pretrained(tmp_path / name)
        model = tuned.merge_and_unload(safe_merge=False)
        script.apply_delta(str(before), str(tmp_path / f"with {name}"), str(tmp_path / name))
        before = tmp_path / f"with {name}"
        assert_bits(tensors_in(before), model.state_dict())


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {  # options of peft, rows after resizing, whether the result is tied; of a base that is
    "nothing of them": ({}, None, True),
    "saved without need": ({"save": True}, None, True),
    "added rows": ({}, 210, True),
    "LoRA on the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, None, False),
    "LoRA on the output layer": ({"target_modules": ["q_proj", "lm_head"]}, None, False),
    "LoRA on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None, False),
    "LoRA on one for both": ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, None, True),
    "LoRA on both, as one": ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, None, True),
    "embeddings saved": ({"modules_to_save": ["embed_tokens"]}, None, False),
    "output layer saved": ({"modules_to_save": ["lm_head"]}, None, False),
    "both saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None, False),
    "saved as one": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, None, True),
    "added rows, embeddings saved": ({"modules_to_save": ["embed_tokens"]}, 210, False),
    "added rows, saved as one": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 210, True),
    "added rows, LoRA on the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, 210, False),
    "one of each": ({"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, None, False),
    "the other of each": ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, None, False),
}  # fmt: skip


OTHERWISE = ("saved without need", "LoRA on the embeddings", "LoRA on one for both", "added rows, embeddings saved")
STORED = [(case, "once") for case in TIED] + [(case, stored) for case in OTHERWISE for stored in ("twice", "unsaid")]


@pytest.mark.parametrize(("case", "stored"), STORED)
def test_a_tied_base_answers_as_the_adapter_model_does(tmp_path, peft, case, stored, capsys):
    """The logits of peft's own forward pass with the adapter on, which its merge misses where it adds two changes to
    one weight; also where the base's files hold both, or its config.json leaves transformers' default unsaid."""
    from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

    options, rows, is_tied = TIED[case]
    options, saving = dict(options), {"save_embedding_layers": True} if options.get("save") else {}
    options.pop("save", None)
    sizes = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    kind, config = LlamaForCausalLM, LlamaConfig(**sizes)
    if stored == "unsaid":
        kind, config = GemmaForCausalLM, GemmaConfig(**sizes, head_dim=8)
    kind(config).save_pretrained(tmp_path / "base")
    config = read(tmp_path / "base" / "config.json")
    if stored == "unsaid":
        config.pop("tie_word_embeddings", None)
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensors = tensors_in(tmp_path / "base")
    if stored == "twice":
        save_file(tensors | {HEAD: tensors[EMBED].clone()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    def load():
        loaded = kind.from_pretrained(tmp_path / "base", dtype=FLOAT)
        if rows:
            torch.manual_seed(1)  # for the new rows, which the adapter replaces or is put on
            loaded.resize_token_embeddings(rows)
        return loaded

    ids = torch.arange(30)[None] * 7 % (rows or 200)
    tuned = peft.get_peft_model(load(), peft.LoraConfig(r=8, **({"target_modules": ["q_proj"]} | options)))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    for _ in range(2):  # what is tied gets the gradients of both and stays so
        tuned(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(trained, lr=0.1).step()
        tuned.zero_grad()
    tuned.save_pretrained(tmp_path / "lora", **saving)
    script.apply_delta(str(tmp_path / "base"), str(tmp_path / "out"), str(tmp_path / "lora"))
    adapted = peft.PeftModel.from_pretrained(load(), tmp_path / "lora").eval()
    merged, info = kind.from_pretrained(tmp_path / "out", dtype=FLOAT, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted, found = adapted(ids).logits, merged.eval()(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (HEAD not in tensors_in(tmp_path / "out")) == is_tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == is_tied
    assert (read(tmp_path / "out" / "config.json").get("tie_word_embeddings", True) is True) == is_tied
    assert ("apart, so the result has both, untied" in capsys.readouterr().err) != is_tied


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("rows", [512, 769, 1001])  # 769: a last block of one row is summed in another order
def test_products_in_blocks_are_the_product_of_the_whole(tmp_path, monkeypatch, rows, embedding):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, 96, generator=generator)
    a, b = torch.randn(8, rows if embedding else 96, generator=generator), torch.randn(96 if embedding else rows, 8)
    save_file({"base": base, "a": a, "b": b}, tmp_path / "x.safetensors")
    stored = weights.open_weights(tmp_path / "x.safetensors")
    lora = script.Lora(stored["a"], stored["b"], 0.37, embedding)
    part = script.Part("x", "float32", tuple(base.shape), stored["base"], lora)
    monkeypatch.setattr(script, "PRODUCT", 4 * 96 * 300)
    blocks = list(script.merged_rows(part))
    assert blocks[0][0] == 0 and blocks[-1][1] == rows and all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
    product = (b @ a) * 0.37
    assert torch.equal(torch.cat([block[2] for block in blocks]), base + (product.T if embedding else product))


def test_adapter_in_another_dtype_overflow_and_style(tmp_path, base):
    adapter(tmp_path / "lora", scale=1e6)
    assert "the result is too large for float16; give --dtype float32" in refused(
        base, tmp_path / "o", tmp_path / "lora"
    )
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "lora"), dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {BRAIN}
    utils.write_json({"made_by": "cria", "prompt_style": "alpaca", "settings": {}}, tmp_path / "lora" / "run.json")
    (tmp_path / "lora" / "tokenizer.model").write_text("the adapter's")
    script.apply_delta(str(base), str(tmp_path / "styled"), str(tmp_path / "lora"), dtype="float32")
    assert read(tmp_path / "styled" / "run.json")["prompt_style"] == "alpaca"
    assert (tmp_path / "styled" / "tokenizer.model").read_text() == "the adapter's"


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_named(tmp_path, base, half):
    name = f"base_model.model.model.layers.1.self_attn.v_proj.{half}.weight"
    tensors = adapter(tmp_path / "lora")
    tensors[name][0, 0] = math.nan
    adapter(tmp_path / "lora", tensors=tensors)
    message = refused(base, tmp_path / "out", tmp_path / "lora")
    at = f"{tmp_path / 'lora' / 'adapter_model.safetensors'}: tensor {name}"
    assert message.startswith(f"{at}: holds values that are not finite")


def test_adapter_that_changes_nothing_is_named(tmp_path, base, capsys):
    adapter(tmp_path / "lora", scale=0.0)
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "lora"))
    assert "is zero, so it changes nothing; was it saved before it was trained?" in capsys.readouterr().err
    assert_bits(tensors_in(tmp_path / "out"), tensors_in(base))


KEY = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_ADAPTERS = {
    "dora": ({"use_dora": True}, {}, f"{KEY.removeprefix('base_model.model.')}.weight has no magnitude, by its config it is DoRA"),
    "dora of embeddings": ({"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}, {},
                           "use_dora is true, so it is not a plain LoRA; peft merges what can be merged: PeftModel"),
    "fan": ({"fan_in_fan_out": True}, {}, "fan_in_fan_out is true, so"),
    "bias": ({"bias": "all"}, {f"{KEY}.bias": torch.ones(8)}, f"{KEY}.bias has no counterpart in the base"),
    "rows of tokens": ({"trainable_token_indices": [1, 2]},
             {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 8)},
             "model.embed_tokens.weight gets rows [1, 8], by its config 2 of them"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, 'init_lora_weights is "pissa", so'),
    "other": ({"peft_type": "IA3"}, {}, 'peft_type is "IA3", so it is not a plain LoRA; peft merges'),
    "no rank": ({"r": None}, {}, "r, lora_alpha, use_rslora or target_modules is none; copy the adapter again"),
    "rslora": ({"use_rslora": "false"}, {}, "use_rslora or target_modules is none"),
    "rank": ({"r": 5}, {}, "q_proj.weight is [8, 8], its adapter [4, 8] and [8, 4], of rank 5 by its config"),
    "half": ({}, {f"{KEY}.lora_B.weight": None}, "model.layers.0.self_attn.q_proj.weight has one of lora_A and lora_B"),
    "target": ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, {}, "down_proj.weight is a target by its config and"),
    "no target": ({"target_modules": ["q_proj"]}, {}, "v_proj.weight is in it and by its config no target"),
    "shape": ({}, {f"{KEY}.lora_A.weight": torch.ones(4, 9)}, "is [8, 8], its adapter [4, 9] and [8, 4], of rank 4"),
    "name": ({}, {"base_model.model.score.weight": torch.ones(2)}, "base_model.model.score.weight has no counterpart"),
    "magnitude": ({}, {f"{KEY}.lora_magnitude_vector": torch.ones(8)}, "has a magnitude, by its config no DoRA"),
    "rows": ({}, {"base_model.model.lm_head.weight": torch.ones(41, 8)}, "not all of lm_head.weight, model.embed_tokens.weight get"),
    "norm": ({}, {"base_model.model.model.norm.weight": torch.ones(9)}, "model.norm.weight is [8] in the base and [9]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_adapters_that_cannot_be_merged(tmp_path, base, case):
    config, changes, words = BAD_ADAPTERS[case]
    tensors = adapter(tmp_path / "lora", config)
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    message = refused(base, tmp_path / "out", tmp_path / "lora")
    assert words in message and message.startswith(str(tmp_path / "lora"))
    assert names_in(tmp_path) == {"base", "lora"}


def test_a_base_that_says_tied_and_stores_two_is_not_tied(tmp_path, base, capsys):
    """transformers does not tie what differs; what is the same it does, and one change of the embeddings parts them."""
    config = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    halves = {key + "A": torch.randn(4, 40), key + "B": torch.randn(8, 4)}
    adapter(tmp_path / "lora", config, tensors=halves)
    for same in (False, True):
        tensors = tensors_in(base) | ({HEAD: tensors_in(base)[EMBED].clone()} if same else {})
        model(base, tensors, {"tie_word_embeddings": True})
        script.apply_delta(str(base), str(tmp_path / f"out{same}"), str(tmp_path / "lora"))
        found = tensors_in(tmp_path / f"out{same}")
        product = (halves[key + "B"] @ halves[key + "A"]).T * 2.0
        assert_bits(
            {name: found[name] for name in (HEAD, EMBED)},
            {HEAD: tensors[HEAD], EMBED: tensors[EMBED] + product.half()},
        )
        assert ("the result has both, untied" in capsys.readouterr().err) == same
        assert read(tmp_path / f"out{same}" / "config.json")["tie_word_embeddings"] is False


def test_adapter_folders_that_are_none(tmp_path, base):
    folder = tmp_path / "lora"
    adapter(folder)
    model(folder, numbers(seed=1))
    what = f"{folder} is an adapter beside a whole model (adapter_config.json); move the files of one of them elsewhere"
    assert what in refused(base, tmp_path / "out", folder)
    (folder / "model.safetensors").unlink()
    assert "a LoRA adapter; leave --new_rows and --any_base out" in refused(base, tmp_path / "o", folder, any_base=True)
    save_file({}, folder / "adapter_model.safetensors")  # what 443 bytes of alpaca-lora were
    assert "0 of its 0 tensors hold numbers; the run that saved it" in refused(base, tmp_path / "out", folder)
    (folder / "adapter_model.safetensors").unlink()
    for kept, full in ((0, 0), (0, 8), (3, 8)):  # of a ZeRO-3 run all tensors are empty, or those that nobody gathered
        tensors = adapter(folder)
        halves = {name: half if i < kept else torch.empty(0) for i, (name, half) in enumerate(tensors.items()) if full}
        for write, file in ((save_file, "adapter_model.safetensors"), (torch.save, "adapter_model.bin")):
            (folder / "adapter_model.safetensors").unlink(missing_ok=True)
            write(halves, folder / file)
            what = f"{folder / file}: {kept} of its {full} tensors hold numbers; the run that saved it saved nothing"
            assert refused(base, tmp_path / "out", folder).startswith(what)
    (folder / "adapter_model.bin").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refused(base, tmp_path / "out", folder)
    (folder / "adapter_config.json").write_text("[]")
    (folder / "adapter_model.safetensors").touch()
    assert refused(base, tmp_path / "out", folder).startswith(str(folder))


def test_an_adapter_of_parameters_is_merged_as_one_of_tensors(tmp_path, base):
    tensors = adapter(tmp_path / "lora")
    script.apply_delta(str(base), str(tmp_path / "plain"), str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save(
        {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "lora/adapter_model.bin"
    )
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "lora"))
    assert_bits(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "plain"))


@pytest.mark.parametrize("names", [["checkpoint-9", "checkpoint-10"], ["default"], ["checkpoint-10/default"]])
def test_an_adapter_in_a_folder_of_the_run_is_named(tmp_path, base, names):
    """With the last checkpoint that is whole, and the command as it was meant works."""
    run = tmp_path / "run"
    for name in names:
        (run / name).mkdir(parents=True)
        adapter(run / name)
    (run / "checkpoint-11").mkdir()  # was killed while it saved
    (run / "checkpoint-11" / "adapter_config.json").write_text("{}")
    for config in (False, True):
        if config:
            (run / "adapter_config.json").write_text(json.dumps(ADAPTER))
        message = refused(base, tmp_path / "out", run)
        assert str(run / names[-1]) in message and "checkpoint-11" not in message
    script.apply_delta(str(base), str(tmp_path / "out"), str(run / names[-1]))


def test_a_checkpoint_that_train_py_finished_goes_before_a_later_one(tmp_path, base):
    for number in (5, 6):
        folder = tmp_path / "run" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        model(folder, numbers(seed=number))
    utils.write_json({"files": {}}, tmp_path / "run" / "checkpoint-5" / utils.COMPLETE)
    for pair in ((tmp_path / "run", base), (base, tmp_path / "run")):
        assert f"or try {tmp_path / 'run' / 'checkpoint-5'}" in refused(pair[0], tmp_path / "out", pair[1])


@pytest.mark.parametrize("option", ["base", "delta"])
def test_a_file_in_place_of_its_folder(tmp_path, base, delta, option):
    adapter(tmp_path / "lora")
    for file in (tmp_path / "lora/adapter_model.safetensors", delta / "model.safetensors", delta / "config.json"):
        paths = {"base": base, "delta": delta} | {option: file}
        message = refused(paths["base"], tmp_path / "out", paths["delta"])
        assert message == f"--{option} {file} is a file ({file.name}); give its folder: {file.parent}"


def test_integers_are_no_weights_of_a_lora(tmp_path, base):
    """8-bit weights have the shape of those before; neither the base's nor the adapter's can be added up."""
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter(tmp_path / "lora")
    quantised = model(tmp_path / "int8", tensors_in(base) | {name: torch.ones(8, 8, dtype=torch.int8)})
    assert f"is quantised (by its tensor {name}); give the 16-bit" in refused(
        quantised, tmp_path / "out", tmp_path / "lora"
    )
    for key in ("base_model.model.model.norm.weight", f"{KEY}.lora_B.weight"):
        shape = (8,) if "norm" in key else (8, 4)
        adapter(tmp_path / "lora", tensors={key: torch.ones(shape, dtype=torch.uint8)})
        assert f"{key} is uint8, quantised" in refused(base, tmp_path / "out", tmp_path / "lora")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is destroyed
# ---------------------------------------------------------------------------------------------------------------------


def contents(folder):
    """Every file under a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("way", ["same", "link", "hard link", "inside"])
@pytest.mark.parametrize("victim", ["base", "delta"])
def test_target_that_is_an_input_is_refused(tmp_path, base, delta, victim, way):
    folder = {"base": base, "delta": delta}[victim]
    target = {"same": folder, "inside": folder / "out"}.get(way, tmp_path / "alias")
    if way == "link":
        target.symlink_to(folder)
    if way == "hard link":
        target.mkdir()
        os.link(folder / "model.safetensors", target / "model.safetensors")
    before = contents(tmp_path)
    for overwrite in (False, True):
        message = refused(base, target, delta, overwrite=overwrite)
        words = f"inside {folder}, which is read" if way == "inside" else f"the same place as {folder}"
        assert message.startswith(f"--target {target}: {words}; choose ")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("way", ["same", "link", "hard link"])
def test_base_that_is_the_delta_is_refused(tmp_path, base, way):
    delta = base if way == "same" else tmp_path / "alias"
    if way == "link":
        delta.symlink_to(base)
    if way == "hard link":
        delta.mkdir()
        os.link(base / "model.safetensors", delta / "model.safetensors")
    message = refused(base, tmp_path / "out", delta)
    assert message == f"--delta {delta}: the same place as --base {base}; give two different folders"


def test_target_that_exists_is_refused(tmp_path, base, delta):
    target = tmp_path / "out"
    target.write_text("a file")
    assert "a file of that name exists" in refused(base, target, delta, overwrite=True)
    target.unlink()
    target.symlink_to(tmp_path / "nowhere")
    assert "which does not exist; remove the link" in refused(base, target, delta, overwrite=True)
    target.unlink()
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    message = refused(base, target, delta)
    assert message.startswith(
        f"--target {target}: exists and holds notes.txt; choose another folder, or give --overwrite"
    )
    (tmp_path / "alias").symlink_to(target)
    assert "exists and holds notes.txt" in refused(base, tmp_path / "alias", delta)
    assert contents(target) == {"notes.txt": b"mine"}
    (target / "config.json").write_text("old")
    script.apply_delta(str(base), str(target), str(delta), overwrite=True)
    assert (target / "notes.txt").read_text() == "mine" and read(target / "config.json")["model_type"] == "llama"
    (target / "pytorch_model.bin").write_text("of an older model")
    message = refused(base, target, delta, overwrite=True)
    assert "holds pytorch_model.bin, which might be loaded instead of the new weights; remove it" in message
    assert not list(tmp_path.glob(".*"))


def test_target_is_looked_at_before_the_base_is_read_whole(tmp_path, base, monkeypatch):
    make(base, model(tmp_path / "tuned", numbers(seed=4)), tmp_path / "d")
    monkeypatch.setattr(script, "check_base", lambda *args: pytest.fail("read"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "exists and holds notes.txt" in refused(base, tmp_path / "out", tmp_path / "d")


def test_an_empty_target_is_taken(tmp_path, base, delta):
    (tmp_path / "out").mkdir()
    script.apply_delta(str(base), str(tmp_path / "out"), str(delta))
    assert "model.safetensors" in names_in(tmp_path / "out")


def test_no_room_is_noticed_before_writing(tmp_path, base, delta, monkeypatch):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    message = refused(base, tmp_path / "out", delta)
    assert message.startswith(f"--target {tmp_path / 'out'}: 0.00 GB will be written and 0.00 GB are free; make room")
    assert names_in(tmp_path) == {"base", "delta"}


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, base, delta, monkeypatch):
    def pwrite(handle, data, position):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "pwrite", pwrite)
    message = refused(base, tmp_path / "out", delta)
    assert "No space left on device (0.00 GB are needed); nothing is left of this run; make room, then give" in message
    assert names_in(tmp_path) == {"base", "delta"}


STOP = """
import os, signal, sys
sys.path.insert(0, {root!r})
import apply_delta, utils, weights
weights.BLOCK, blocks, append = 100, [], weights.WeightWriter.append

def stopping(self, name, block):
    append(self, name, block)
    blocks.append(name)
    if len(blocks) == 20:
        os.kill(os.getpid(), getattr(signal, {signal!r}))

weights.WeightWriter.append = stopping
sys.argv = ["apply_delta.py", "--base", {base!r}, "--delta", {delta!r}, "--target", {target!r}]
utils.run_main(apply_delta.main)
"""


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_stopped_run_leaves_no_half_model(tmp_path, base, delta, signal, capsys):
    target = tmp_path / "out"
    words = {"base": str(base), "delta": str(delta), "target": str(target), "root": str(ROOT), "signal": signal}
    before = contents(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", STOP.format(**words)], env=environment(), capture_output=True, text=True, check=False
    )
    assert not target.exists()
    if signal == "SIGKILL":
        assert run.returncode == -9
        script.apply_delta(str(base), str(target), str(delta))
        shown = capsys.readouterr().err
        assert f"{tmp_path / '.out.unfinished'}: left by a run that did not finish (1 files, 0.00 GB); removed" in shown
        change = tensors_in(delta)
        assert_bits(tensors_in(target), {name: old + change[name] for name, old in tensors_in(base).items()})
        assert names_in(tmp_path) == {"base", "delta", "out"}
    else:
        assert run.returncode == {"SIGTERM": 143, "SIGINT": 130}[signal]
        assert "Traceback" not in run.stderr
        assert contents(tmp_path) == before


def test_two_runs_to_one_target(tmp_path, base, delta):
    with weights.new_folder(tmp_path / "out", 0):
        assert "another run is writing here" in refused(base, tmp_path / "out", delta)


@pytest.mark.parametrize("which", ["base", "delta"])
def test_a_file_that_changes_while_it_is_read(tmp_path, base, delta, monkeypatch, which):
    append = weights.WeightWriter.append

    def touching(self, name, block):
        os.utime(tmp_path / which / "model.safetensors", (1, 1))
        append(self, name, block)

    monkeypatch.setattr(weights.WeightWriter, "append", touching)
    assert "somebody wrote to it while it was read" in refused(base, tmp_path / "out", delta)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Commands and names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--base B --delta D --target T",
        "--base-model-path B --target-model-path T --delta-path D --low-cpu-mem",
        "--base_model_path B --target_model_path T --delta_path D",
        "--path_raw B --path_diff D --path_tuned T --check_integrity_naively False",
    ],
)
def test_spellings_of_the_originals(words):
    args = script.parse_args(words.split())
    assert (args.base, args.delta, args.target) == ("B", "D", "T")
    assert not args.check_integrity_naively and not args.overwrite and not args.make


@pytest.mark.parametrize(
    ("word", "value"), [([], True), (["True"], True), (["1"], True), (["false"], False), (["0"], False)]
)
def test_checksum_option(word, value):
    common = ["--path_raw", "B", "--path_diff", "D", "--path_tuned", "T"]
    assert script.parse_args([*common, "--check_integrity_naively", *word]).check_integrity_naively is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--base B --delta D", "the following arguments are required: --target/"),
        ("--base B --delta D --target T --check_integrity_naively Ture", "argument --check_integrity_naively: 'Ture' is "
         "neither True nor False"),
        ("--base B --delta D --target T --dtype fp16", "argument --dtype: invalid choice: 'fp16'"),
        ("--base B --delta D --target T --exakt", "unknown option: --exakt (did you mean --exact?); --help"),
    ],
)  # fmt: skip
def test_wrong_options(words, message):
    with pytest.raises(UserError) as caught:
        script.parse_args(words.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_wrong_option_is_one_line():
    run = run_script("--base", "B", "--delta", "D")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: the following arguments are required: --target/") and run.err.count("\n") == 1


def run_script(*words):
    """Run `python -m apply_delta` in a process of its own."""
    command = [sys.executable, "-m", "apply_delta"]
    return finish(
        subprocess.Popen(
            [*command, *map(str, words)], cwd=ROOT, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ),
        words,
    )  # fmt: skip


def test_fastchat_command(tmp_path, base, delta):
    words = ["--base-model-path", base, "--target-model-path", tmp_path / "out", "--delta-path", delta, "--low-cpu-mem"]
    run = run_script(*words)
    assert run.code == 0, run.err
    assert run.err.startswith("--low-cpu-mem: it never needs more; ignored\n")
    assert run.out == f"{tmp_path / 'out'}: 11 tensors, 0.00 GB\n"
    change = tensors_in(delta)
    assert_bits(tensors_in(tmp_path / "out"), {name: old + change[name] for name, old in tensors_in(base).items()})
    again = run_script(*words)
    assert again.code == 2 and again.error().startswith(f"error: --target {tmp_path / 'out'}: exists and holds ")


def test_make_command(tmp_path, base, monkeypatch, capsys):
    target = model(tmp_path / "tuned", numbers(seed=4))
    words = ["apply_delta.py", "--base", str(base), "--target", str(target), "--delta", str(tmp_path / "d")]
    monkeypatch.setattr(sys, "argv", [*words, "--exact"])
    with pytest.raises(UserError, match="^--exact goes with --make; to apply a delta, its kind is read"):
        script.main()
    monkeypatch.setattr(sys, "argv", [*words, "--exact", "--make"])
    script.main()
    assert "delta: exact, bit patterns; new rows: none" in capsys.readouterr().err
    script.apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "d"))
    assert_bits(tensors_in(tmp_path / "out"), tensors_in(target))


def test_public_names_of_fastchat():
    import inspect

    for function in (script.apply_delta, script.apply_delta_low_cpu_mem, script.make_delta):
        names = list(inspect.signature(function).parameters)
        assert names[:3] == ["base_model_path", "target_model_path", "delta_path"]


def test_importing_does_nothing(tmp_path):
    code = "import apply_delta, sys; print(sorted({'transformers', 'peft', 'safetensors'} & set(sys.modules)))"
    environ = environment() | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == ("[]\n", "") and not list(tmp_path.iterdir())


def test_names_on_the_hub(tmp_path, base, delta, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str({"lmsys/vicuna-7b-delta-v1.1": delta, "huggyllama/llama-7b": base}[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["pytorch_model.bin"])
    script.apply_delta("huggyllama/llama-7b", str(tmp_path / "out"), "lmsys/vicuna-7b-delta-v1.1")
    assert [name for name, _ in asked] == ["huggyllama/llama-7b", "lmsys/vicuna-7b-delta-v1.1"]
    assert all({"*.json", "*.safetensors", "*.bin", "tokenizer*"} <= set(patterns) for _, patterns in asked)
    change = tensors_in(delta)
    assert_bits(tensors_in(tmp_path / "out"), {name: old + change[name] for name, old in tensors_in(base).items()})
    assert read(tmp_path / "out" / "run.json")["arguments"]["base"] == "huggyllama/llama-7b"


@pytest.mark.parametrize(
    ("there", "unwanted"),
    [(["model.safetensors", "pytorch_model.bin"], ["*.bin"]), (["pytorch_model.bin"], []), (OSError("no network"), [])],
)
def test_a_model_on_the_hub_is_not_fetched_twice(there, unwanted, tmp_path, monkeypatch):
    def list_repo_files(name):
        if isinstance(there, OSError):
            raise there
        return there

    def snapshot_download(name, **options):
        ignored.append(options["ignore_patterns"])
        return str(tmp_path)

    ignored = []
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert weights.find_model("nobody/model") == tmp_path and ignored == [unwanted]
