"""convert_llama_weights.py and damaged, mixed or malicious files, full disks, signals: refused, and nothing is left."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file, save_file
from test_convert import make_raw, make_weights, pieces, run  # noqa: F401 (pieces is a fixture)

import convert_llama_weights as convert
import utils
import weights

COPY = "copy or download it again"


@pytest.fixture
def source(pieces, tmp_path):  # noqa: F811
    """Two shards with everything beside them."""
    return make_raw(tmp_path / "raw", pieces, shards=2)


def refusal(source, *words, target=None):
    """The message of a refused conversion, after which nothing stands beside the source that did not before."""
    folder = source.parent
    target = target or folder / "out"
    before = sorted(folder.rglob("*"))
    with pytest.raises(utils.UserError) as caught:
        run(source, target, *words)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def unwritten(monkeypatch):
    """A refusal of this test comes before a file is begun."""
    monkeypatch.setattr(weights, "WeightWriter", None)
    monkeypatch.setattr(weights, "BlockWriter", None)
    monkeypatch.setattr(convert, "write_tokenizer", None)


def change(path, **tensors):
    """Replace or add tensors of a shard; None removes one."""
    shard = torch.load(path, weights_only=True)
    shard |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    torch.save({name: tensor for name, tensor in shard.items() if tensors.get(name, 0) is not None}, path)


def set_params(source, **values):
    path = source / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def test_truncated_shard(source):
    path = source / "consolidated.01.pth"
    data = path.read_bytes()
    path.write_bytes(data[:100000])
    assert refusal(source) == (
        f"{path}: truncated: it has 100,000 bytes and lacks the table of contents that ends such a file; {COPY}"
    )
    path.write_bytes(data[:200])  # not even the list of tensors
    assert refusal(source).startswith(f"{path}: truncated: it has 200 bytes and lacks ")
    path.write_bytes(b"")
    assert refusal(source) == f"{path}: the file is empty; {COPY}"


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2.weight", "tok_embeddings.weight", "norm.weight"])
@pytest.mark.parametrize("shard", ["consolidated.00.pth", "consolidated.01.pth"])
def test_flipped_bits_in_a_tensor(shard, name, source, unwritten):
    path = source / shard
    found = weights.open_weights(path)[name]
    with open(path, "r+b") as file:
        file.seek(found.offset + found.nbytes // 2)
        byte = file.read(1)[0] ^ 1
        file.seek(found.offset + found.nbytes // 2)
        file.write(bytes([byte]))
    message = refusal(source)
    assert message == f"{path}: damaged: the CRC-32 of tensor {name} is wrong; {COPY}"


def test_a_record_that_no_tensor_reads_is_checked_too(source):
    path = source / "consolidated.00.pth"
    data = bytearray(path.read_bytes())
    at = data.find(b"3\n", data.find(b"/version"))
    data[at] = ord("4")
    path.write_bytes(data)
    assert refusal(source).startswith(f"{path}: damaged: the CRC-32 of what describes its tensors is ")


def test_a_header_that_is_not_the_one_of_the_table_of_contents(source):
    path = source / "consolidated.00.pth"
    data = bytearray(path.read_bytes())
    data[data.index(b"/version")] = 0xFF  # in the record's own header, no UTF-8 any more
    path.write_bytes(data)
    assert refusal(source) == (f"{path}: damaged: a record has another header than the table of contents says; {COPY}")


def test_a_file_without_checksums_is_no_false_alarm(source, tmp_path, capsys):
    torch.serialization.set_crc32_options(False)
    try:
        for path in source.glob("*.pth"):
            torch.save(torch.load(path, weights_only=True), path)
    finally:
        torch.serialization.set_crc32_options(True)
    run(source, tmp_path / "out", "--verify")
    said = f"{source / 'consolidated.00.pth'}: it was written without checksums; damage cannot be noticed"
    assert capsys.readouterr().err.count(said) == 1


def test_a_missing_shard_a_gap_and_a_duplicate(source):
    one, two = source / "consolidated.00.pth", source / "consolidated.01.pth"
    os.rename(two, source / "consolidated.02.pth")
    assert refusal(source) == f"{source}: shard consolidated.01.pth is missing (found: 0, 2); download it"
    (source / "consolidated.02.pth").unlink()
    assert refusal(source) == (
        f"{source}: found 1 of 2 shards: wq has 32 rows in them, n_heads * head_dim is 64; download the others"
    )
    shutil.copy(one, source / "consolidated.0.pth")
    assert refusal(source) == (f"{source}: consolidated.0.pth and consolidated.00.pth are both shard 0; remove one")
    (source / "consolidated.0.pth").unlink()
    os.rename(one, two)
    assert refusal(source) == f"{source}: shard consolidated.00.pth is missing (found: 1); download it"
    two.unlink()
    assert refusal(source) == f"--input_dir {source}: no consolidated.00.pth there, nor in a subfolder"


def test_more_shards_than_belong_together(source):
    for i in (2, 3):
        shutil.copy(source / "consolidated.01.pth", source / f"consolidated.{i:02}.pth")
    assert refusal(source) == (
        f"{source}: 4 shards do not fit together: wq has 128 rows in them, n_heads * head_dim is 64"
    )


def test_a_stray_pth_is_named_and_left_out(source, tmp_path, capsys):
    torch.save({"x": torch.ones(1)}, source / "optimizer.pth")
    run(source, tmp_path / "out")
    said = f"{source / 'optimizer.pth'}: not a shard (those are consolidated.NN.pth); left out\n"
    assert said in capsys.readouterr().err


def test_shards_of_different_models(source):
    one, two = source / "consolidated.00.pth", source / "consolidated.01.pth"
    good = two.read_bytes()
    change(two, **{"layers.1.ffn_norm.weight": torch.ones(64).half()})
    assert refusal(source) == (
        f"{source}: tensor layers.1.ffn_norm.weight differs between {one.name} and {two.name}; download both again"
    )
    two.write_bytes(good)
    change(two, **{"norm.weight": torch.load(two, weights_only=True)["norm.weight"].float()})
    assert refusal(source) == (
        f"{two}: tensor norm.weight is float32 [64], in {one.name} float16 [64]; they are not of one model"
    )
    two.write_bytes(good)
    change(two, **{"output.weight": torch.zeros(499, 64).half()})
    assert refusal(source) == (
        f"{two}: tensor output.weight is float16 [499, 64], in {one.name} float16 [500, 64]; they are not of one model"
    )
    two.write_bytes(good)
    change(two, **{"extra": torch.zeros(1)})
    assert refusal(source) == f"{two} holds tensor extra and {one.name} does not; they are not of one model"


@pytest.mark.parametrize("wrong", ["wk", "wv"])
def test_key_value_copies_that_differ(wrong, pieces, tmp_path):  # noqa: F811
    weights = make_weights(2)
    for name in [name for name in weights if name.endswith(("wk.weight", "wv.weight"))]:
        heads = weights[name].reshape(2, 16, 64)  # shards must hold heads 0 0 1 1, and hold 0 1 0 1 where it is wrong
        copies = torch.cat([heads, heads]) if wrong in name else heads.repeat_interleave(2, 0)
        weights[name] = copies.reshape(64, 64)
    source = make_raw(tmp_path / "raw", pieces, weights, 4, n_kv_heads=2)
    name = f"layers.0.attention.{wrong}.weight"
    assert refusal(source) == (
        f"{source}: tensor {name} differs between consolidated.00.pth and consolidated.01.pth; download both again"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite(value, dtype, pieces, tmp_path, unwritten):  # noqa: F811
    weights = make_weights(dtype=dtype)
    weights["layers.1.attention.wk.weight"][63, 63] = value
    source = make_raw(tmp_path / "raw", pieces, weights, shards=2)
    assert refusal(source) == (
        f"{source / 'consolidated.01.pth'}: tensor layers.1.attention.wk.weight: holds values that are not finite "
        "(infinite or NaN); the weights are damaged"
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"])
def test_finite_is_what_torch_says_it_is(name):
    dtype, (_, size, exponent) = getattr(torch, name), weights.DTYPES[name]
    kind, sign = np.dtype(f"u{size}"), 1 << 8 * size - 1
    if size <= 2:
        patterns = np.arange(2 if name == "bool" else 256**size, dtype=kind)  # all there are
    else:
        edges = [half + bits + i for half in (0, sign) for bits in (0, exponent, sign - 1) for i in (-1, 0, 1)]
        patterns = np.random.default_rng(0).integers(0, 256**size, 1000, dtype=kind)
        patterns = np.append(patterns, np.array([bits % 256**size for bits in edges], dtype=kind))
    wanted = torch.isfinite(torch.from_numpy(patterns).view(dtype)).tolist()
    for others in ([], [0, 1], [min(sign, int(patterns.max()))]):
        for bits, finite in zip(patterns, wanted, strict=True):
            block = np.array([bits, *others], dtype=kind)
            with contextlib.nullcontext() if finite else pytest.raises(utils.UserError, match="^here: holds values"):
                weights.check_finite(block, name, "here")


def test_unknown_and_missing_tensors(source):
    halves = "a model is converted whole or not at all"
    good = {path: path.read_bytes() for path in source.glob("*.pth")}

    def with_all(**tensors):
        for path in good:
            path.write_bytes(good[path])
            change(path, **tensors)
        return refusal(source)

    assert with_all(**{"vision.weight": torch.ones(1)}) == (
        f"{source}: tensor vision.weight is not of a LLaMA (1 such); {halves}"
    )
    assert with_all(**{"layers.0.attention.wq.bias": torch.ones(1)}) == (
        f"{source}: tensor layers.0.attention.wq.bias is not of a LLaMA (1 such); {halves}"
    )
    assert with_all(**{"layers.1.attention.wo.weight": None}) == (
        f"{source}: tensor layers.1.attention.wo.weight is missing (1 such); {halves}"
    )
    assert with_all(**{"layers.3.attention.wo.weight": torch.ones(1)}) == (
        f"{source}: tensor layers.2.attention_norm.weight is missing (17 such); {halves}"
    )
    assert with_all(**{"layers.99999999.wo.weight": torch.ones(1)}).startswith(f"{source}: tensor layers.2.")
    assert with_all(**{"layers.1.attention.wo.weight": torch.ones(64, 33).half()}) == (
        f"{source}: tensor layers.1.attention.wo.weight is [64, 33] in each shard, expected [64, 32]"
    )
    assert with_all(**{"layers.1.attention.wo.weight": torch.ones(64, 32, dtype=torch.int8)}) == (
        f"{source}: tensor layers.1.attention.wo.weight is int8; quantized weights are not converted"
    )


def test_code_in_a_pickle_is_refused_and_not_run(source, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'raw' / 'was-run'}",)

    path = source / "consolidated.01.pth"
    torch.save(torch.load(path, weights_only=True) | {"x": Payload()}, path)
    assert refusal(source) == (
        f"{path}: its pickle asks for posix.system, which no weights need; nothing of it was run; get the weights as "
        "safetensors, or from somebody you trust"
    )
    others = ("builtins", "eval"), ("torch", "load"), ("os", "system"), ("torch.storage", "_load_from_bytes")
    for module, name in others:
        pickled = b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + b")Rs."
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
        asked = f"{module}.{name}".removeprefix("builtins.")  # torch's name of it
        assert refusal(source).startswith(f"{path}: its pickle asks for {asked}, which no weights need")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)


def test_what_is_read_from_a_pickle_is_what_torchs_weights_only_reads(tmp_path):
    path = tmp_path / "all.bin"
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    tensors = {name: torch.arange(6).view(2, 3).to(getattr(torch, name)) for name in dtypes}
    tensors |= {"turned": tensors["float32"].T, "part": tensors["float16"][1:, 1:], "one": torch.tensor(7.0)}
    torch.save(tensors | {"parameter": torch.nn.Parameter(torch.ones(2))}, path)
    read, wanted = weights.open_weights(path), torch.load(path, weights_only=True)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (read[name].dtype, read[name].shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        found = torch.from_numpy(read[name].read()).view(tensor.dtype).reshape(tensor.shape)
        assert torch.equal(found, tensor.detach()), name
    weights.check_unchanged(read.values())


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"garbage", f"damaged: its list of tensors cannot be read; {COPY}"),
        (b"\x80\x02]q\x00.", "holds no dict of tensors; rewrite it with python -c"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "entry 'a' is no tensor, so this is no file of weights"),
    ],
)
def test_pickles_that_are_no_weights(pickled, message, source):
    path = source / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    assert refusal(source).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, 2).to_sparse(), "entry 'a' is no tensor, so this is no file of weights"),
        (torch.ones(2, dtype=torch.complex64), "tensor a is complex64, which is not supported"),
        (torch.ones(2).to(torch.float8_e4m3fn), "tensor a is float8_e4m3fn, which is not supported"),
        (torch.ones(2, device="meta"), "tensor a has no record where torch looks for it; rewrite it with python -c"),
    ],
)
def test_tensors_that_are_no_plain_numbers(tensor, message, source):
    path = source / "consolidated.00.pth"
    torch.save({"a": tensor}, path)
    assert refusal(source).startswith(f"{path}: {message}")


def test_a_tensor_that_reaches_past_its_record(source):
    path = source / "consolidated.00.pth"
    data = path.read_bytes()
    at = data.rindex(struct.pack("<BHB", ord("M"), 500, ord("K")))  # the pickle says 500 rows of the output layer
    path.write_bytes(data[:at] + struct.pack("<BH", ord("M"), 501) + data[at + 3 :])
    assert refusal(source) == f"{path}: damaged: tensor output.weight [501, 64] reaches past its record; {COPY}"
    count = struct.pack("<Bi", ord("J"), 500 * 64)  # ... and that its storage has so many numbers
    count = count if data.count(count) else struct.pack("<BH", ord("M"), 500 * 64)
    at = data.rindex(count)
    path.write_bytes(
        data[:at] + count[:1] + (500 * 64 + 1).to_bytes(len(count) - 1, "little") + data[at + len(count) :]
    )
    assert refusal(source) == f"{path}: damaged: tensor output.weight [500, 64] reaches past its record; {COPY}"


def zipped_again(path, **options):
    """Write the records of a zip into a new one, as other programs than torch do."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_records_that_do_not_lie_where_torch_puts_them(source):
    path = source / "consolidated.00.pth"
    zipped_again(path)
    message = refusal(source)
    assert message.startswith(f"{path}: tensor ") and message.endswith(
        f" no record where torch looks for it; {REWRITE}"
    )
    command = REWRITE.removeprefix("rewrite it with python").replace("OLD", str(path)).replace("NEW", str(path))
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, env=environment())
    run(source, source.parent / "rewritten")  # the way round


def test_compressed_records(source):
    path = source / "consolidated.00.pth"
    zipped_again(path, compression=zipfile.ZIP_DEFLATED)
    message = refusal(source)
    assert message.startswith(f"{path}: damaged: record consolidated.00/data.pkl") and message.endswith(f"; {COPY}")


def test_big_endian_numbers(source):
    path = source / "consolidated.00.pth"
    data = path.read_bytes()
    at = data.index(b"little", data.index(b"byteorder"))
    path.write_bytes(data[:at] + b"big   " + data[at + 6 :])
    assert refusal(source) == f"{path}: its numbers are big-endian: {REWRITE}"


REWRITE = "rewrite it with python -c \"import torch; torch.save(torch.load('OLD', 'cpu', weights_only=True), 'NEW')\""


def test_files_of_other_kinds(source):
    path = source / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    torch.save(shard, path, _use_new_zipfile_serialization=False)
    assert refusal(source) == f"{path}: the format of torch before 1.6, which cannot be read in parts; {REWRITE}"
    command = REWRITE.removeprefix("rewrite it with python").replace("OLD", str(path)).replace("NEW", str(path))
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, env=environment())
    run(source, source.parent / "rewritten")  # the way round
    page = "a web page or an error message, not weights; download it again"
    pointer = "a git-lfs pointer, not the file itself; run git lfs pull in its folder"
    for content, message in {
        b"<!DOCTYPE html><html>": page,
        b'{"error": "Access denied"}': page,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": pointer,
        b"something": f"no zip of torch.save (damaged, or of another program); if torch can load it, {REWRITE}",
    }.items():
        path.write_bytes(content)
        assert refusal(source) == f"{path}: {message}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    assert refusal(source) == f"{path}: a zip, but none of torch.save: {REWRITE}"
    path.unlink()
    path.mkdir()
    assert refusal(source) == (
        f"{path}: no weights there: neither model.safetensors nor pytorch_model.bin nor an index"
    )


def test_a_source_that_changes_while_it_is_read(source, monkeypatch):
    append, path = weights.WeightWriter.append, source / "consolidated.00.pth"

    def touching(self, name, block):
        append(self, name, block)
        if name == "lm_head.weight":
            with open(path, "ab") as file:
                file.write(b" ")

    monkeypatch.setattr(weights.WeightWriter, "append", touching)
    assert refusal(source) == f"{path}: somebody wrote to it while it was read; try again when it is whole"

    def cutting(self, name, block):
        append(self, name, block)
        os.truncate(path, 50000)  # a reader of mapped memory would die of SIGBUS

    monkeypatch.setattr(weights.WeightWriter, "append", cutting)
    assert refusal(source) == f"{path}: somebody wrote to it while it was read; try again when it is whole"


# ---------------------------------------------------------------------------------------------------------------------
# params.json
# ---------------------------------------------------------------------------------------------------------------------


def test_params_that_contradict_the_tensors(source, tmp_path, capsys):
    good = (source / "params.json").read_text()
    for values, message in (
        ({"n_heads": 8}, f"{source}: params.json says n_heads 8, but rope.freqs has 8 values, so n_heads is 4; correct "
                         "params.json"),
        ({"n_heads": 3}, f"{source}: params.json says n_heads 3, but rope.freqs has 8 values, so n_heads is 4; correct "
                         "params.json"),
        ({"n_layers": 1}, f"{source}: params.json says n_layers 1, the tensors 2; one of them is of another model"),
        ({"n_layers": 3}, f"{source}: params.json says n_layers 3, the tensors 2; one of them is of another model"),
        ({"dim": 128}, f"{source}: params.json says dim 128, the tensors 64; one of them is of another model"),
        ({"n_kv_heads": 2}, f"{source}: wk has 64 rows in 2 shards, n_kv_heads 2 * head_dim 16 is 32; a shard is "
                            "missing or params.json is of another model"),
    ):  # fmt: skip
        set_params(source, **values)
        assert refusal(source) == message
        (source / "params.json").write_text(good)
    set_params(source, multiple_of=256, vocab_size=32000)
    run(source, tmp_path / "out", "--verify")
    err = capsys.readouterr().err
    assert f"{source}: multiple_of 256 of params.json does not give w1's 192 rows; the tensors count\n" in err
    assert f"{source}: params.json says vocab_size 32000, the tensors 1000; the tensors count\n" in err


def test_heads_without_the_rotary_table(source, tmp_path, capsys):
    for path in source.glob("*.pth"):
        change(path, **{"rope.freqs": None})
    run(source, tmp_path / "out")
    said = f"{source}: n_heads 4 is from params.json; without rope.freqs in the shards nothing checks it\n"
    assert said in capsys.readouterr().err
    set_params(source, n_heads=7)
    assert refusal(source, target=tmp_path / "new") == (
        f"{source}: params.json says n_heads 7, but 64 rows of wq do not divide by it; correct params.json"
    )


def test_params_that_are_not_read_are_named(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    assert "has no use for" not in capsys.readouterr().err
    set_params(source, use_scaled_rope=False, rope_scaling_factor=8.0, rope_high_freq_factor=1, quantization_args={})
    run(source, tmp_path / "again")
    err = capsys.readouterr().err
    assert f"{source / 'params.json'}: has no use for quantization_args, rope_high_freq_factor; the model" in err
    assert f"rotary tables: not stretched, for params.json of {source} lacks use_scaled_rope" in err
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_scaling"] is None


def test_params_that_are_no_params(source):
    path = source / "params.json"
    good = json.loads(path.read_text())
    again, there = "download the file again", "Meta has it beside the shards, download it from there"
    for text, message in {
        "<!DOCTYPE html>": f"{path}: it is a web page or XML; download the file itself, not the page that shows it; {there}",
        "[1]": f"{path}: holds a list, expected a JSON object; {there}",
        "{}": f"{path}: n_heads is missing, and the tensors do not tell it; {again}",
        json.dumps({"n_heads": 4}): f"{path}: norm_eps is missing, and the tensors do not tell it; {again}",
        json.dumps(good | {"n_layers": "32"}): f'{path}: n_layers is "32", expected a number above 0; {again}',
        json.dumps(good | {"n_heads": 4.5}): f"{path}: n_heads is 4.5, expected a number above 0; {again}",
        json.dumps(good | {"n_heads": 0}): f"{path}: n_heads is 0, expected a number above 0; {again}",
        json.dumps(good | {"n_heads": True}): f"{path}: n_heads is true, expected a number above 0; {again}",
        json.dumps(good | {"norm_eps": -1}): f"{path}: norm_eps is -1, expected a number above 0; {again}",
        json.dumps(good | {"norm_eps": float("nan")}): f"{path}: norm_eps is NaN, expected a number above 0; {again}",
    }.items():
        path.write_text(text)
        assert refusal(source) == message
    for value in ("false", 0, 1, "true"):
        path.write_text(json.dumps(good | {"use_scaled_rope": value}))
        what = f"use_scaled_rope is {json.dumps(value)}, expected true or false"
        assert refusal(source) == f"{path}: {what}; correct params.json"
    for key in (*convert.INTEGERS, *convert.FLOATS):
        path.write_text(json.dumps(good | {key: "8"}))
        assert refusal(source) == f'{path}: {key} is "8", expected a number above 0; {again}'
    path.write_bytes(b"\xff")
    assert refusal(source).startswith(f"{path}:1: byte 0xff at offset 0 is not UTF-8")
    path.unlink()
    assert refusal(source) == f"{path}: No such file or directory; {there}"
    path.write_text("[" * 100000)
    message = refusal(source)
    assert message.startswith(f"{path}:1: not valid JSON, maximum recursion depth") and message.endswith(f"; {there}")
    path.write_text(json.dumps({"model": good}))
    run(source, source.parent / "wrapped")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def test_tokenizers_that_do_not_fit(source, tmp_path, capsys):
    path = source / "tokenizer.model"
    good = path.read_bytes()
    path.unlink()
    assert refusal(source) == (
        f"{path}: missing, and so is {tmp_path / 'tokenizer.model'}; download it, or name it with --tokenizer FILE "
        "(--tokenizer none converts without)"
    )
    again = "not the tokenizer itself; download it again"
    for content, message in {
        b"version https://git-lfs.github.com/spec/v1\n": f"{path}: a git-lfs pointer, {again}",
        b"<html>": f"{path}: a web page, {again}",
        b"": f"{path}: empty, {again}",
        b"nonsense" * 9: f"{path}: neither a SentencePiece nor a tiktoken file; download it again",
        b"IQ== 0\nIg== 1\n": f"{path}: begins like a tiktoken file and is damaged; download it again",
        b"IQ== 0\n!! 1\n": f"{path}: begins like a tiktoken file and is damaged; download it again",
    }.items():
        path.write_bytes(content)
        assert refusal(source) == message
    from make_tiny_llama import CORPUS, train_sentencepiece

    for count, advice in ((1001, "give the right one with --tokenizer FILE, or none"),
                          (900, f"if it is the right one, name it: --tokenizer {path}")):  # fmt: skip
        path.write_bytes(train_sentencepiece([CORPUS.read_text(encoding="utf-8")], count))
        assert refusal(source) == (
            f"{path}: SentencePiece with {count:,} tokens, but the embedding has 1,000 rows; it is of another model; "
            f"{advice}"
        )
    run(source, tmp_path / "named", "--tokenizer", path)  # the ways round
    assert refusal(source, "--tokenizer", "gone").startswith("--tokenizer gone: no such file; give a tokenizer.model")
    run(source, tmp_path / "none", "--tokenizer", "none")
    assert sorted(os.listdir(tmp_path / "none")) == ["config.json", "generation_config.json", "model.safetensors"]
    other = tmp_path / "elsewhere.model"
    other.write_bytes(good)
    path.unlink()
    run(source, tmp_path / "out", "--tokenizer", other)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == good


def test_a_tokenizer_that_cannot_be_rebuilt(source, tmp_path, monkeypatch):
    build = utils.build_from_sentencepiece

    def wrong(path):
        built, names = build(path)
        built.normalizer = None
        return built, names

    monkeypatch.setattr(utils, "build_from_sentencepiece", wrong)
    assert refusal(source) == (
        f"{source / 'tokenizer.model'}: the fast tokenizer built from it reads 'Hello world' otherwise; "
        "convert with --tokenizer none and copy it into the new folder, where train.py and chat.py read it"
    )
    run(source, tmp_path / "out", "--tokenizer", "none")


# ---------------------------------------------------------------------------------------------------------------------
# Output folders
# ---------------------------------------------------------------------------------------------------------------------


def test_an_output_that_exists(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    others = "choose another folder, or give --overwrite, which replaces only files of the names that are written"
    names = "config.json, generation_config.json, model.safetensors, ..."
    assert refusal(source) == f"--output_dir {out}: exists and holds {names}; {others}"
    shutil.rmtree(out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert refusal(source) == f"--output_dir {out}: exists and holds notes.txt; {others}"
    run(source, out, "--overwrite")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert first["notes.txt"] == b"mine"
    (out / "config.json").write_text("old")
    run(source, out, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert refusal(source, "--overwrite", "--max_shard_size", "100KB") == (
        f"--output_dir {out}: holds model.safetensors, which might be loaded instead of the new weights; remove it"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_outputs_that_cannot_be(source, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "hard").mkdir()
    os.link(source / "consolidated.00.pth", tmp_path / "hard" / "consolidated.00.pth")
    another = "choose another folder"
    for name, message in {
        "file": f"a file of that name exists; {another}",
        "dangling": "a link to a place which does not exist; remove the link",
        "raw": f"the same place as {source}; {another}",
        "alias": f"the same place as {source}; {another}",
        "hard": f"the same place as {source}; {another}",
        "raw/../raw": f"the same place as {source}; {another}",
    }.items():
        for words in ((), ("--overwrite",)):
            assert refusal(source, *words, target=tmp_path / name) == f"--output_dir {tmp_path / name}: {message}"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run(source, tmp_path / "link")  # a link to an empty folder, on another disk perhaps
    assert (tmp_path / "link").is_symlink() and len(load_file(tmp_path / "real" / "model.safetensors")) == 21
    under = tmp_path / "file" / "out"
    assert refusal(source, target=under) == f"--output_dir {under}: Not a directory; {another}"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_place_that_cannot_be_written(source, tmp_path):
    (tmp_path / "closed").mkdir()
    os.chmod(tmp_path / "closed", 0o500)
    command = [sys.executable, ROOT / "convert_llama_weights.py", "--input_dir", source, "--output_dir"]
    words = {"capture_output": True, "text": True, "env": environment(), "check": False}
    target = tmp_path / "closed" / "out"
    done = subprocess.run([*command, target], **words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: --output_dir {target}: Permission denied; choose another folder"


def test_too_little_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert refusal(source) == (
        f"--output_dir {tmp_path / 'out'}: 0.03 GB will be written and 0.00 GB are free; make room, or choose a folder "
        "on another disk"
    )


def test_a_disk_that_fills_up(source, tmp_path, monkeypatch):
    write, count = os.pwrite, iter(range(100))

    def full(handle, data, position):
        if next(count) == 7:
            raise OSError(28, "No space left on device")
        return write(handle, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    assert refusal(source) == (
        f"--output_dir {tmp_path / 'out'}: No space left on device (0.03 GB are needed); nothing is left of this run; "
        "make room, then give the same command again"
    )


def test_a_disk_that_fills_up_under_raw_shards(model, tmp_path):
    """torch.save must not hide what the system says; files may have 100,000 bytes here."""
    words = ["--reverse", "--input_dir", str(model), "--output_dir", str(tmp_path / "back")]
    code = f"import resource, sys; sys.path[:0] = [{str(ROOT)!r}]; import convert_llama_weights as convert, utils; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); utils.run_main(lambda: convert.main({words}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: --output_dir {tmp_path / 'back'}: File too large (0.00 GB are needed); nothing is left of this run; "
        "make room, then give the same command again"
    )
    assert not (tmp_path / "back").exists() and not (tmp_path / ".back.unfinished").exists()


SLOW = """
import sys, time
sys.path[:0] = [{root!r}]
import convert_llama_weights as convert, utils, weights
append = weights.WeightWriter.append
def slow(self, name, block):
    append(self, name, block)
    print("writing", flush=True)
    time.sleep(0.3)
weights.WeightWriter.append = slow
utils.run_main(lambda: convert.main({words!r}))
"""


def started(source, target):
    """A conversion that has begun to write, as a process."""
    code = SLOW.format(root=str(ROOT), words=["--input_dir", str(source), "--output_dir", str(target)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), **pipes)
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM; nothing is left of this run"),
        pytest.param(signal.SIGHUP, 129, "stopped by SIGHUP; nothing is left of this run", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "stopped by SIGINT; nothing is left of this run", marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_nothing(number, code, line, source, tmp_path):
    process = started(source, tmp_path / "out")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (code, line)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_kill_9_leaves_no_model_and_the_next_run_says_what_it_found(source, tmp_path, capsys):
    process = started(source, tmp_path / "out")
    with pytest.raises(utils.UserError) as caught:
        run(source, tmp_path / "out")  # two at a time
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: another run is writing here; wait for it, or choose another folder"
    )
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    hidden = tmp_path / ".out.unfinished"
    assert not (hidden / "config.json").exists() and sorted(tmp_path.iterdir()) == [hidden, source]
    time.sleep(0.1)
    run(source, tmp_path / "out")
    said = f"{hidden}: left by a run that did not finish (4 files, 0.00 GB); removed\n"
    assert said in capsys.readouterr().err
    assert not hidden.exists() and len(load_file(tmp_path / "out" / "model.safetensors")) == 21


def test_a_hidden_folder_of_somebody_else_is_not_touched(source, tmp_path):
    hidden = tmp_path / ".out.unfinished"
    hidden.mkdir()
    (hidden / "diary.txt").write_text("mine")
    assert refusal(source) == (f"{hidden}: holds diary.txt, which no run of ours left behind; move that folder away")


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors, read by --reverse
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(source, tmp_path):
    return run(source, tmp_path / "model")


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, text, body):
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_safetensors_with_headers_that_lie(model):
    path = model / "model.safetensors"
    good = path.read_bytes()
    header, body = header_of(path)
    damaged = f"{path}: truncated or damaged: "

    def refused(text, body=body):
        with_header(path, text, body)
        message = refusal(model, "--reverse")
        path.write_bytes(good)
        return message

    def changed(name, **values):
        return json.dumps(header | {name: header[name] | values})

    name = "model.norm.weight"
    first, last = header[name]["data_offsets"]
    rows = header["lm_head.weight"]["data_offsets"]
    for text in (
        changed(name, data_offsets=[first - 2, last - 2]),  # they overlap
        changed(name, data_offsets=[first + 2, last + 2]),
        changed(name, shape=[65]),
        changed(name, shape=[-64]),
        changed(name, shape="x"),
        changed(name, shape=[2**62, 4]),
        changed(name, dtype="QQ"),
        json.dumps(header)[:-5],
        "{" + "[" * 100000,
        b'{"\xff": 1}',
    ):
        message = refused(text)
        assert message.startswith(damaged) and message.endswith(f"; {COPY}"), message
    assert f"tensor `{name}`" in refused(changed(name, data_offsets=[first - 2, last - 2]))
    message = refused(changed(name, dtype="F8_E4M3", shape=[128]))
    assert message == f"{path}: tensor {name} is F8_E4M3, which is not supported"
    assert refused(changed("lm_head.weight", data_offsets=[rows[0], rows[1] + 2], shape=[64001]), body + b"  ") == (
        f"{model}: tensor lm_head.weight is float16 [64001], by config.json floats [1000, 64]"
    )
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    assert refused(twice) == f"{path}: damaged: {name} stands twice in its header; {COPY}"
    for other in (body[:-2], body + b"  "):
        assert refused(json.dumps(header), other) == f"{damaged}incomplete metadata, file not fully covered; {COPY}"
    path.write_bytes((2**63).to_bytes(8, "little") + good[8:])
    assert refusal(model, "--reverse") == f"{damaged}header too large; {COPY}"
    path.write_bytes(good[:1000])
    assert refusal(model, "--reverse") == f"{damaged}invalid header length; {COPY}"
    path.write_bytes(b"")
    assert refusal(model, "--reverse") == f"{path}: the file is empty; {COPY}"
    path.write_bytes(b"1234567890")
    assert refusal(model, "--reverse") == f"{path}: no safetensors file; {COPY}"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(model, "--reverse").startswith(f"{path}: a git-lfs pointer")


def test_an_index_that_leads_elsewhere(source, tmp_path):
    model = run(source, tmp_path / "model", "--max_shard_size", "100KB")
    path = model / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    places = good["weight_map"]

    def refused(weight_map):
        path.write_text(json.dumps(good | {"weight_map": weight_map}))
        return refusal(model, "--reverse")

    first, *_, last = sorted(set(places.values()))
    shutil.copy(model / first, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", ""):
        message = refused(places | {"model.norm.weight": name})
        assert message == f"{path}: names {name}, which is not a file beside it; refused"
    assert refused([1]) == f"{path}: not an index of weights; {COPY}"
    path.write_text('{"weight_map":' * 100_000)
    assert refusal(model, "--reverse").startswith(f"{path}:1: not valid JSON")
    name = "model.layers.0.input_layernorm.weight"
    assert refused({key: value for key, value in places.items() if key != name}) == (
        f"{model / places[name]}: it holds, against its index, tensor {name} (of 1); copy the folder again"
    )
    assert refused(places | {"x": first}) == f"{model / first}: it lacks tensor x (of 1); copy the folder again"
    (model / last).unlink()
    assert f"is unfinished ({last} is missing)" in refused(places)
    path.unlink()
    assert "is unfinished (neither model.safetensors nor" in refusal(model, "--reverse")


def test_reverse_reads_bin_files_and_refuses_to_overwrite(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    (model / "model.safetensors").unlink()
    torch.save(weights | rotary, model / "pytorch_model.bin")
    run(model, tmp_path / "back", "--reverse", "--num_shards", 2)
    for i in range(2):
        one, other = (torch.load(tmp_path / f / f"consolidated.{i:02}.pth", weights_only=True) for f in ("raw", "back"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    back = tmp_path / "back"
    assert refusal(model, "--reverse", target=back).startswith(f"--output_dir {back}: exists and holds consolidated.00")
    assert convert.VERIFY_TOLERANCE == 1e-4


def test_reverse_refuses_values_that_are_not_finite(model, unwritten):
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][5, 5] = float("nan")
    save_file(weights, model / "model.safetensors")
    assert refusal(model, "--reverse") == (
        f"{model / 'model.safetensors'}: tensor lm_head.weight: holds values that are not finite (infinite or NaN); "
        "the weights are damaged"
    )


def note_calls(monkeypatch, calls):
    """Let `calls` collect, in order, what is synced, renamed and replaced, by names."""
    sync, rename, replace = utils.sync, os.rename, os.replace
    monkeypatch.setattr(utils, "sync", lambda path: (calls.append(("sync", Path(path).name)), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", Path(b).name)), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(b).name)), replace(a, b)))


def write_some(target, **options):
    with weights.new_folder(target, 10, **options) as folder:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("new", encoding="utf-8")


def test_all_is_on_the_disk_before_the_folder_takes_its_name(tmp_path, monkeypatch):
    calls = []
    note_calls(monkeypatch, calls)
    write_some(tmp_path / "out")
    *before, rename, last = calls
    files = {("sync", name) for name in ("config.json", "model.safetensors", "tokenizer.json", ".out.unfinished")}
    assert set(before) == files and len(before) == 4 and before[-1] == ("sync", ".out.unfinished")
    assert (rename, last) == (("rename", "out"), ("sync", tmp_path.name))


def test_overwriting_replaces_what_makes_a_folder_load_last(tmp_path, monkeypatch):
    write_some(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    calls, there = [], []
    note_calls(monkeypatch, calls)
    replace = os.replace
    config = tmp_path / "out" / "config.json"
    monkeypatch.setattr(os, "replace", lambda a, b: (there.append(config.exists()), replace(a, b)))
    write_some(tmp_path / "out", overwrite=True, writes=["model.safetensors"])
    names = [name for what, name in calls if what == "replace"]
    assert names == ["model.safetensors", "tokenizer.json", "config.json"] and there == [False] * 3
    assert (tmp_path / "out" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("fails", [1, 3])
def test_a_write_that_the_disk_loses_is_an_error(fails, tmp_path, monkeypatch):
    """Three syncs in the background, of which the first or the last fails; the fsync at the end succeeds."""
    calls = []

    def fdatasync(handle):
        calls.append(handle)
        if len(calls) == fails:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(weights, "SYNC", 1)
    block = torch.zeros(4, 2, dtype=torch.int16).numpy()
    with pytest.raises(OSError, match="Input/output error"):
        with weights.WeightWriter(tmp_path, {"a": ("int16", (12, 2))}) as writer:
            for _ in range(3):
                writer.append("a", block)
    assert len(calls) >= fails
