"""Turn raw LLaMA weights, as Meta ships them, into a Hugging Face model folder, bit for bit, or back again.

    python convert_llama_weights.py --input_dir DIR --model_size 7B --output_dir OUT
    python convert_llama_weights.py --input_dir DIR/7B --output_dir OUT --verify     # compares logits as well
    python convert_llama_weights.py --reverse --input_dir OUT --output_dir RAW --num_shards 2

Reads consolidated.NN.pth, params.json and tokenizer.model of LLaMA 1, Llama 2, Code Llama, Llama 3, 3.1 and 3.2, in
DIR/7B with the tokenizer in DIR, or all in one folder; DIR may be a name on the hub. Writes safetensors, config and
tokenizer into one flat folder. Tensors stream through in blocks, so memory does not depend on the model.
"""

import argparse
import base64
import concurrent.futures
import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.end_by_ctrl_c()

import numpy as np

import weights
from utils import UserError, say
from weights import DTYPES

# How a tensor lies in the shards of Meta's model parallel layout: ColumnParallelLinear splits the outputs (dim 0),
# RowParallelLinear the inputs (dim 1), norms are whole in every shard.
COLUMNS, ROWS, WHOLE = 0, 1, None
LAYER = {  # Meta's name: (name in transformers, how shards split it, its sizes; see Llama.tensors)
    "attention_norm.weight": ("input_layernorm.weight", WHOLE, "dim"),
    "attention.wq.weight": ("self_attn.q_proj.weight", COLUMNS, "dim dim"),
    "attention.wk.weight": ("self_attn.k_proj.weight", COLUMNS, "key_value dim"),
    "attention.wv.weight": ("self_attn.v_proj.weight", COLUMNS, "key_value dim"),
    "attention.wo.weight": ("self_attn.o_proj.weight", ROWS, "dim dim"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", WHOLE, "dim"),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", COLUMNS, "ffn dim"),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", COLUMNS, "ffn dim"),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", ROWS, "dim ffn"),
}
ROTARY = re.compile(r"(^|\.)rope\.freqs$")  # a table that both sides compute anew
INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")  # of params.json
FLOATS = ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor")
LLAMA3_CONTEXT = 8192  # tokens that Llama 3.1 and 3.2 were trained on before their rotary tables were stretched
LLAMA3_PATTERN = (  # how Llama 3's tokenizer cuts text before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = ("tokenizer.tiktoken", "tokenizer.model", "original/tokenizer.model")  # Meta's file in a model folder
VERIFY_TOKENS, VERIFY_TOLERANCE = 32, 1e-4  # of the largest logit, in float32


@dataclasses.dataclass
class Llama:
    """What a checkpoint is, by its tensors and params.json."""

    num_shards: int
    dtype: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # of Llama 3.1's stretched rotary tables
    embedding_axis: int  # along which the shards split the embedding: ROWS up to Llama 2, COLUMNS in Llama 3
    kv_copies: int  # neighbouring shards that hold the same key and value heads
    tied: bool

    head_dim = property(lambda self: self.dim // self.num_heads)

    def tensors(self):
        """{Meta's name: (name in transformers, how shards split it, its whole shape)}, in the order of the model."""
        dim = self.dim
        sizes = {"dim": dim, "key_value": self.num_kv_heads * self.head_dim, "ffn": self.ffn_dim}
        table = {"tok_embeddings.weight": ("model.embed_tokens.weight", self.embedding_axis, (self.vocab_size, dim))}
        for i in range(self.num_layers):
            for raw, (name, axis, words) in LAYER.items():
                shape = tuple(sizes[word] for word in words.split())
                table[f"layers.{i}.{raw}"] = (f"model.layers.{i}.{name}", axis, shape)
        table["norm.weight"] = ("model.norm.weight", WHOLE, (dim,))
        table["output.weight"] = ("lm_head.weight", COLUMNS, (self.vocab_size, dim))
        return table

    def shard_shape(self, raw, axis, shape, num_shards):
        """The shape of one shard's part of a tensor."""
        if axis == WHOLE:
            return shape
        return tuple(n * self.copies_of(raw) // num_shards if i == axis else n for i, n in enumerate(shape))

    def copies_of(self, raw):
        """Neighbouring shards that hold the same part of a tensor that is split."""
        return self.kv_copies if raw.endswith(("wk.weight", "wv.weight")) else 1


# --- Reading a checkpoint: where it is, and what it is ---------------------------------------------------------------


def find_folder(input_dir, model_size=None):
    """The folder that holds the shards: `input_dir`, its subfolder `model_size`, or its only subfolder with shards."""
    input_dir = weights.find_model(input_dir, ("*.pth", "*params.json", "*tokenizer.model"), "--input_dir")
    if not input_dir.is_dir():
        raise UserError(f"--input_dir {input_dir}: not a folder; give the one that holds params.json")
    if model_size and (input_dir / model_size).is_dir():
        return input_dir / model_size
    if list(input_dir.glob("consolidated*.pth")):
        return input_dir
    inside = sorted({path.parent for path in input_dir.glob("*/consolidated*.pth")})
    names = ", ".join(path.name for path in inside)
    if inside and model_size:
        raise UserError(f"--model_size {model_size}: {input_dir} has no such subfolder; it holds {names}")
    if len(inside) > 1:
        raise UserError(f"--input_dir {input_dir}: holds several models: {names}; choose one with --model_size")
    if not inside:
        utils.check_model(input_dir, "--input_dir", ("not causal", "raw weights of LLaMA"))
        is_model = (input_dir / "config.json").is_file()
        hint = "; it is in the format of transformers already (--reverse goes back)" if is_model else ""
        raise UserError(f"--input_dir {input_dir}: no consolidated.00.pth there, nor in a subfolder{hint}")
    return inside[0]


def find_shards(folder):
    """consolidated.NN.pth in numeric order, or the only consolidated.pth; other .pth files are named and left out."""
    numbers = {}
    for path in sorted(folder.glob("*.pth")):
        match = re.fullmatch(r"consolidated(?:\.(\d+))?\.pth", path.name)
        if not match:
            say(f"{path}: not a shard (those are consolidated.NN.pth); left out")
        elif (number := int(match[1] or 0)) in numbers:
            raise UserError(f"{folder}: {numbers[number].name} and {path.name} are both shard {number}; remove one")
        else:
            numbers[number] = path
    absent = sorted(set(range(max(numbers, default=0) + 1)) - set(numbers))
    if absent:
        found = ", ".join(str(number) for number in sorted(numbers)) or "none"
        raise UserError(f"{folder}: shard consolidated.{absent[0]:02}.pth is missing (found: {found}); download it")
    return [numbers[number] for number in sorted(numbers)]


def read_params(folder):
    """params.json, of which n_heads and norm_eps are needed. Raises UserError where it is none."""
    path = folder / "params.json"
    try:
        params = utils.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; Meta has it beside the shards, download it from there") from None
    params = params["model"] if isinstance(params.get("model"), dict) else params
    params = {key: value for key, value in params.items() if value is not None}
    for key in (*INTEGERS, *FLOATS):
        if key not in params and key in ("n_heads", "norm_eps"):
            raise UserError(f"{path}: {key} is missing, and the tensors do not tell it; download the file again")
        value, kinds = params.get(key, 1), (int,) if key in INTEGERS else (int, float)
        if type(value) not in kinds or not (0 < value < math.inf or (key, value) == ("vocab_size", -1)):
            raise UserError(f"{path}: {key} is {json.dumps(value)}, expected a number above 0; download the file again")
    scaled = params.get("use_scaled_rope", False)
    if type(scaled) is not bool:  # any text would count as true
        raise UserError(f"{path}: use_scaled_rope is {json.dumps(scaled)}, expected true or false; correct params.json")
    if unread := sorted(params.keys() - {*INTEGERS, *FLOATS, "use_scaled_rope"}):
        say(f"{path}: has no use for {', '.join(unread)}; the model is converted without")
    return {"n_kv_heads": params["n_heads"], "rope_theta": 10000} | params


def open_shards(paths):
    """The tensors of each shard. Raises UserError where shards differ in names, shapes or dtypes."""
    shards = [weights.open_weights(path) for path in paths]
    one, first = paths[0], shards[0]
    for path, shard in zip(paths, shards, strict=True):
        if differing := sorted(set(first) ^ set(shard)):
            holder, other = (one, path) if differing[0] in first else (path, one)
            what = f"{holder} holds tensor {differing[0]} and {other.name} does not"
            raise UserError(f"{what}; they are not of one model")
        for name, tensor in shard.items():
            here, there = (f"{stored.dtype} {list(stored.shape)}" for stored in (tensor, first[name]))
            if here != there:
                raise UserError(f"{path}: tensor {name} is {here}, in {one.name} {there}; they are not of one model")
    return shards


def check_names(where, found, needed):
    """Refuse names `found` of tensors that are not exactly those `needed`."""
    found, needed = dict.fromkeys(found), dict.fromkeys(needed)  # both keep their order
    problems = [f"{name} is missing" for name in needed if name not in found]
    problems += [f"{name} is not of a LLaMA" for name in found if name not in needed]
    if problems:
        advice = "a model is converted whole or not at all"
        raise UserError(f"{where}: tensor {problems[0]} ({len(problems)} such); {advice}")


def count_layers(tensors, folder):
    """The layers of a shard. Raises UserError where it does not hold exactly the tensors of a LLaMA."""
    layers = [int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in tensors) if match]
    num_layers = max(layers, default=0) + 1  # without any, the first is missing
    needed = ["tok_embeddings.weight", "norm.weight"]
    needed += [f"layers.{i}.{name}" for i in range(min(num_layers, len(tensors))) for name in LAYER]
    check_names(folder, [name for name in tensors if name != "output.weight" and not ROTARY.search(name)], needed)
    return num_layers


def check_heads(first, rows, count, params, folder):
    """How many neighbouring shards hold the same key-value heads; `rows` are those of the `first` shard's tensors.

    Refuses `count` shards that do not make whole heads, and heads other than those of params.json.
    """
    query, key = (rows[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
    dim, num_heads, num_kv_heads = rows["norm.weight"], params["n_heads"], params["n_kv_heads"]
    if query * count != dim:
        whole = f"wq has {query * count} rows in them, n_heads * head_dim is {dim}"
        if query and query * count < dim and dim % query == 0:
            raise UserError(f"{folder}: found {count} of {dim // query} shards: {whole}; download the others")
        raise UserError(f"{folder}: {count} shards do not fit together: {whole}")
    values = next((math.prod(tensor.shape) for name, tensor in first.items() if ROTARY.search(name)), None)
    wrong = f"{dim} rows of wq do not divide by it" if values is None and dim % num_heads else None
    if values is not None and 2 * values * num_heads != dim:
        wrong = f"rope.freqs has {values} values, so n_heads is {dim // max(2 * values, 1)}"
    if wrong:
        raise UserError(f"{folder}: params.json says n_heads {num_heads}, but {wrong}; correct params.json")
    if values is None:
        say(f"{folder}: n_heads {num_heads} is from params.json; without rope.freqs in the shards nothing checks it")
    copies = count // num_kv_heads if count > num_kv_heads and count % num_kv_heads == 0 else 1
    head_dim = dim // num_heads
    if key * count != num_kv_heads * head_dim * copies:
        wanted = f"n_kv_heads {num_kv_heads} * head_dim {head_dim} is {num_kv_heads * head_dim}"
        what = f"wk has {key * count} rows in {count} shards, {wanted}"
        raise UserError(f"{folder}: {what}; a shard is missing or params.json is of another model")
    return copies


def describe(shards, params, folder):
    """The Llama that the shards hold; see `check_tensors`. Sizes come from the tensors, params.json must agree."""
    first, count = shards[0], len(shards)
    num_layers = count_layers(first, folder)
    embedding, query = first["tok_embeddings.weight"], first["layers.0.attention.wq.weight"]
    for tensor in (embedding, query):
        if len(tensor.shape) != 2:
            raise UserError(f"{folder}: tensor {tensor.name} is {list(tensor.shape)}, expected a matrix")
    rows = {name: tensor.shape[0] if tensor.shape else 0 for name, tensor in first.items()}
    dim, ffn_dim = rows["norm.weight"], rows["layers.0.feed_forward.w1.weight"] * count
    for word, value in (("dim", dim), ("n_layers", num_layers)):
        if params.get(word, value) != value:
            what = f"params.json says {word} {params[word]}, the tensors {value}"
            raise UserError(f"{folder}: {what}; one of them is of another model")
    copies = check_heads(first, rows, count, params, folder)
    axis = COLUMNS if embedding.shape[1] == dim else ROWS
    vocab_size = embedding.shape[0] * count if axis == COLUMNS else embedding.shape[0]
    output = first.get("output.weight", embedding)
    tied = output is embedding or (count == 1 and output.shape == embedding.shape and are_equal(output, embedding))
    multiple_of, said = params.get("multiple_of"), params.get("vocab_size", -1)
    if multiple_of and ffn_dim != ffn_size(dim, multiple_of, params.get("ffn_dim_multiplier")):
        say(f"{folder}: multiple_of {multiple_of} of params.json does not give w1's {ffn_dim} rows; the tensors count")
    if said not in (-1, vocab_size):
        say(f"{folder}: params.json says vocab_size {said}, the tensors {vocab_size}; the tensors count")
    factor = float(params.get("rope_scaling_factor", 32 if tied else 8)) if params.get("use_scaled_rope") else None
    return Llama(
        num_shards=count, dtype=query.dtype, dim=dim, num_layers=num_layers,
        num_heads=params["n_heads"], num_kv_heads=params["n_kv_heads"], ffn_dim=ffn_dim, vocab_size=vocab_size,
        norm_eps=params["norm_eps"], rope_theta=float(params["rope_theta"]), rope_factor=factor,
        embedding_axis=axis, kv_copies=copies, tied=tied,
    )  # fmt: skip


def check_tensors(llama, shards, folder):
    """Refuse shards whose tensors do not have the shapes of `llama`."""
    for raw, (_, axis, shape) in llama.tensors().items():
        if raw not in shards[0]:
            continue  # output.weight of a tied model
        wanted, tensor = llama.shard_shape(raw, axis, shape, len(shards)), shards[0][raw]
        if tensor.shape != wanted:
            raise UserError(f"{folder}: tensor {raw} is {list(tensor.shape)} in each shard, expected {list(wanted)}")
        if not DTYPES[tensor.dtype][2]:
            raise UserError(f"{folder}: tensor {raw} is {tensor.dtype}; quantized weights are not converted")


def check_copies(llama, shards, folder):
    """Refuse shards that differ in tensors of which each has a copy; damaged ones are found by `check_values`."""
    for raw, (_, axis, _) in llama.tensors().items():
        copies = len(shards) if axis == WHOLE else llama.copies_of(raw)
        for i, shard in enumerate(shards):
            if i % copies and not are_equal(shards[i - i % copies][raw], shard[raw]):
                one, other = shards[i - i % copies][raw].file.path.name, shard[raw].file.path.name
                raise UserError(f"{folder}: tensor {raw} differs between {one} and {other}; download both again")


def check_values(tensors, dtype=None):
    """Refuse tensors whose checksums are wrong, or whose values are not finite, in `dtype` where one is given.

    So nothing is written of damaged weights, for the price of reading them twice.
    """

    def check(tensor):
        where = f"{tensor.file.path}: tensor {tensor.name}"
        for start, stop in weights.row_blocks(tensor.shape, tensor.dtype):
            block = tensor.read(start, stop)
            weights.check_finite(block, tensor.dtype, where)
            if dtype and dtype != tensor.dtype:
                cast(block, tensor.dtype, dtype, where)
        return tensor.nbytes

    total, threads = sum(tensor.nbytes for tensor in tensors), concurrent.futures.ThreadPoolExecutor(2)
    with weights.checksums(tensors), weights.meter("check", total) as meter, threads:
        for size in threads.map(check, tensors):
            meter.update(size)


def are_equal(one, other):
    """Whether two stored tensors of one shape hold the same bits; stops at the first difference."""
    blocks = weights.row_blocks(one.shape, one.dtype)
    return all((one.read(start, stop) == other.read(start, stop)).all() for start, stop in blocks)


def ffn_size(dim, multiple_of, multiplier=None):
    """Rows of w1 by Meta's rule: two thirds of 4 * dim, times the multiplier, up to a multiple of `multiple_of`."""
    hidden = int(2 * 4 * dim / 3)
    hidden = int(multiplier * hidden) if multiplier else hidden
    return multiple_of * -(-hidden // multiple_of)


# --- Writing the model -----------------------------------------------------------------------------------------------


def permute(rows, head_dim, back=False):
    """Reorder whole heads of wq or wk, (heads * head_dim, dim), from adjacent rotary pairs to halves, or back.

    Meta rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + head_dim / 2: rows 0 1 2 3 of a
    head of 4 come in the order 0 2 1 3.
    """
    pairs = (2, head_dim // 2) if back else (head_dim // 2, 2)
    heads = rows.reshape(-1, *pairs, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def joined(parts, axis, multiple=1):
    """The rows of a tensor in blocks: part after part (COLUMNS), parts side by side (ROWS), or the first (WHOLE)."""
    if axis == ROWS and len(parts) > 1:
        shape = (parts[0].shape[0], parts[0].shape[1] * len(parts))
        for start, stop in weights.row_blocks(shape, parts[0].dtype):
            yield np.concatenate([part.read(start, stop) for part in parts], axis=1)
        return
    for part in parts[:1] if axis == WHOLE else parts:
        for start, stop in weights.row_blocks(part.shape, part.dtype, multiple):
            yield part.read(start, stop)


def cast(block, old, new, where):
    """A block's bits in another dtype, rounded once. Raises UserError where a value has no place in it."""
    import torch

    numbers = torch.from_numpy(block).view(getattr(torch, old)).to(getattr(torch, new))
    bits = numbers.view(getattr(torch, f"uint{8 * numbers.itemsize}")).numpy()
    weights.check_finite(bits, new, f"{where}: cast to {new} it", "choose another --dtype")
    return bits


def converted_blocks(llama, table, shards, dtype=None):
    """(name in transformers, its next rows), tensor after tensor of `table`, which is a part of `llama.tensors()`."""
    for raw, (name, axis, _) in table.items():
        is_rotated = raw.endswith(("wq.weight", "wk.weight"))
        parts = [shard[raw] for shard in shards[:: llama.copies_of(raw)]]
        old, new = parts[0].dtype, dtype or parts[0].dtype
        for block in joined(parts, axis, llama.head_dim if is_rotated else 1):
            block = permute(block, llama.head_dim) if is_rotated else block
            yield name, block if old == new else cast(block, old, new, raw)


def write_blocks(blocks, writer, size, sums=None):
    """Let a BlockWriter take (key, block) after block, `size` bytes; `sums`, {key: 0}, collects the CRC-32 of each."""
    with writer, weights.meter("weights", size) as meter:
        for key, block in weights.ahead(blocks):
            writer.append(key, block)
            if sums is not None:
                sums[key] = zlib.crc32(block, sums[key])
            meter.update(block.nbytes)


def context_length(llama, chosen=None):
    """(tokens, why): `chosen`, or what the model was trained on, which no file of Meta's says."""
    if chosen:
        return chosen, "as --context says"
    known = {5e5: (8192, "Llama 3, by rope_theta 500000"), 1e6: (16384, "Code Llama, by rope_theta 1000000")}
    older = (4096, "Llama 2, by bfloat16") if llama.dtype == "bfloat16" else (2048, f"LLaMA 1, by {llama.dtype}")
    tokens, reason = known.get(llama.rope_theta, older)
    if llama.rope_factor:
        tokens, reason = 131072, "Llama 3.1 and 3.2, by use_scaled_rope"
    return tokens, f"{reason}; no file says it, --context sets it"


def model_config(llama, dtype, context, special):
    """config.json, in the words of transformers 4, which 5 reads too. `special`: {bos_token_id: ..., ...}."""
    scaling = {"rope_type": "llama3", "factor": llama.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": LLAMA3_CONTEXT}  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": llama.vocab_size, "hidden_size": llama.dim, "intermediate_size": llama.ffn_dim,
        "num_hidden_layers": llama.num_layers, "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads, "head_dim": llama.head_dim,
        "hidden_act": "silu", "rms_norm_eps": llama.norm_eps,
        "rope_theta": llama.rope_theta, "rope_scaling": scaling if llama.rope_factor else None,
        "max_position_embeddings": context, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "initializer_range": 0.02, "tie_word_embeddings": llama.tied, "use_cache": True,
        **special, "torch_dtype": dtype,
    }  # fmt: skip


# --- Tokenizers ------------------------------------------------------------------------------------------------------


def find_tokenizer(folder, chosen=None):
    """The tokenizer.model of a checkpoint: `chosen`, beside the shards, or one folder up; None for "none"."""
    if chosen:
        if chosen != "none" and not Path(chosen).is_file():
            raise UserError(f"--tokenizer {chosen}: no such file; give a tokenizer.model, or none to convert without")
        return None if chosen == "none" else Path(chosen)
    places = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        way = "download it, or name it with --tokenizer FILE (--tokenizer none converts without)"
        raise UserError(f"{places[0]}: missing, and so is {places[1]}; {way}")
    return found


def read_tiktoken(path):
    """{bytes of a token: id} of a file of base64 words and ranks, as Llama 3 has it; None where it is none."""
    data = path.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return None
    try:
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in map(bytes.split, data.splitlines())}
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([i]) for i in range(256)} <= set(ranks):
        raise UserError(f"{path}: begins like a tiktoken file and is damaged; download it again")
    return ranks


def llama3_special_tokens(count, newer):
    """The `count` special tokens of Llama 3, or (`newer`) of 3.1 and 3.2, in the order of their ids."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if newer:
        names |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    reserved = itertools.count()
    return [f"<|{names.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(count)]


def build_from_tiktoken(ranks, special):
    """A tokenizers.Tokenizer that gives tiktoken's ids for `ranks`, {bytes: id}; `special` tokens follow them.

    tiktoken joins the two neighbours whose bytes together have the lowest rank. So every way to cut a token into two
    tokens is a merge, in the order of ranks, and a piece of text that is a token is taken whole (ignore_merges).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()  # GPT-2's alphabet: a printable character for every byte
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(text[left], text[right]) for left, right in sorted(cuts, key=lambda cut: [ranks[c] for c in cut])]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([cut, to_letters])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    begin, pair = special[0], [special[0], "$A", f"{special[0]}:1", "$B:1"]
    built.post_processor = processors.TemplateProcessing([begin, "$A"], pair, [(begin, len(ranks))])
    return built


def read_tokenizer(path, llama, chosen=False):
    """(kind, tokenizers.Tokenizer, entries for tokenizer_config.json) of a tokenizer.model, checked against the model.

    `chosen` says that the user named the file, so that fewer tokens than the embedding has rows are accepted.
    """
    head = path.read_bytes()[:64].lstrip()
    kinds = {b"version https://git-lfs": "a git-lfs pointer", b"<": "a web page", b"{": "a web page"}
    what = next((kind for start, kind in kinds.items() if head.startswith(start)), None if head else "empty")
    if what:
        raise UserError(f"{path}: {what}, not the tokenizer itself; download it again")
    if ranks := read_tiktoken(path):
        count = max(llama.vocab_size - len(ranks), 11)
        special = llama3_special_tokens(count, bool(llama.rope_factor))
        kind, size, built = "tiktoken", len(ranks) + count, build_from_tiktoken(ranks, special)
        names = {"bos_token": special[0], "eos_token": special[1], "clean_up_tokenization_spaces": False}
    else:
        try:
            kind, size = "SentencePiece", len(utils.sentencepiece_proto(path).pieces)
        except Exception:  # protobuf's own
            raise UserError(f"{path}: neither a SentencePiece nor a tiktoken file; download it again") from None
        built, names = utils.build_from_sentencepiece(path)
        text = utils.differs_from_sentencepiece(built, path)
        if text is not None:
            way = "convert with --tokenizer none and copy it into the new folder, where train.py and chat.py read it"
            raise UserError(f"{path}: the fast tokenizer built from it reads {text!r} otherwise; {way}")
        names |= {"add_bos_token": True, "add_eos_token": False}
    if size > llama.vocab_size or (size < llama.vocab_size and not chosen):
        named = f"if it is the right one, name it: --tokenizer {path}"
        advice = named if size < llama.vocab_size else "give the right one with --tokenizer FILE, or none"
        what = f"{path}: {kind} with {size:,} tokens, but the embedding has {llama.vocab_size:,} rows"
        raise UserError(f"{what}; it is of another model; {advice}")
    return kind, built, names


def write_tokenizer(folder, path, kind, built, names, context):
    """Write tokenizer.json, its settings and the original file. Returns {bos_token_id, eos_token_id} and those of chat.

    The class is the plain fast one: with LlamaTokenizer, and with no class, transformers 5 reads some texts otherwise.
    """
    built.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    utils.jdump({**settings, **names, "model_max_length": context}, folder / "tokenizer_config.json", indent=2)
    # A tiktoken file under the name tokenizer.model would be taken for one of SentencePiece.
    shutil.copyfile(path, folder / ("tokenizer.model" if kind == "SentencePiece" else "tokenizer.tiktoken"))
    ids = built.get_vocab()
    tokens = {key: names.get(f"{key}_token") for key in ("bos", "eos")}
    special = {f"{key}_token_id": ids[token] for key, token in tokens.items() if token}
    ends = [ids[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if token in ids]
    return special, {**special, "eos_token_id": ends} if ends else special


# --- Verifying: a forward pass on the raw shards that shares no code with the converter ------------------------------


def reference_logits(paths, params, ids, rope_factor=None, dtype=None):
    """Logits, (len(ids), vocabulary), of raw shards, computed one matrix at a time in float64.

    LLaMA (Touvron et al. 2023, section 2.2), RoFormer (Su et al. 2021, section 3.4.2), grouped queries (Ainslie et
    al. 2023), and the stretched frequencies of Llama 3.1, with rotary on adjacent pairs as in the papers, and every
    shard on its own, its partial sums added up. `dtype` rounds the weights first, as --dtype does.
    """
    import torch

    shards = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    shards = [next(iter(shard.values())) if len(shard) == 1 else shard for shard in shards]  # {"model": {...}}

    def weight(shard, name, rows=slice(None)):
        tensor = shard[name].detach()[rows]
        return (tensor.to(getattr(torch, dtype)) if dtype else tensor).to(torch.float64).numpy()

    def normed(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + params["norm_eps"]) * weight(shards[0], name)

    dim, count = len(shards[0]["norm.weight"]), len(ids)
    size = dim // params["n_heads"]  # of a head
    frequencies = params.get("rope_theta", 10000.0) ** (-np.arange(0, size, 2) / size)
    if rope_factor:  # waves longer than the old context are slowed down, those in between by degrees
        share = np.clip((8192 * frequencies / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0, 1)
        frequencies = frequencies * (share + (1 - share) / rope_factor)
    turn = np.exp(1j * np.outer(np.arange(count), frequencies))[:, None]  # (tokens, 1, size / 2)

    def rotated(x):  # (tokens, heads, size)
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    rows, width = shards[0]["tok_embeddings.weight"].shape
    if width * len(shards) == dim:
        x = np.concatenate([weight(shard, "tok_embeddings.weight", ids) for shard in shards], -1)
    else:  # Llama 3: each shard has rows of its own
        x = np.stack([weight(shards[i // rows], "tok_embeddings.weight", i % rows) for i in ids])
    future = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(sum(name.endswith("ffn_norm.weight") for name in shards[0])):
        at, y = f"layers.{layer}.attention", normed(x, f"layers.{layer}.attention_norm.weight")
        for shard in shards:
            q, k, v = ((y @ weight(shard, f"{at}.w{c}.weight").T).reshape(count, -1, size) for c in "qkv")
            q, k = rotated(q), rotated(k)
            group = q.shape[1] // k.shape[1]  # heads that share keys and values
            scores = np.einsum("ihc,jhc->hij", q, np.repeat(k, group, axis=1)) / np.sqrt(size) + future
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            heads = np.einsum("hij,jhc->ihc", scores, np.repeat(v, group, axis=1))
            x = x + heads.reshape(count, -1) @ weight(shard, f"{at}.wo.weight").T
        ffn, y = f"layers.{layer}.feed_forward", normed(x, f"layers.{layer}.ffn_norm.weight")
        for shard in shards:
            gate = y @ weight(shard, f"{ffn}.w1.weight").T
            gated = gate / (1 + np.exp(-gate)) * (y @ weight(shard, f"{ffn}.w3.weight").T)
            x = x + gated @ weight(shard, f"{ffn}.w2.weight").T
    x = normed(x, "norm.weight")
    if "output.weight" in shards[0] or width * len(shards) != dim:
        output = "output.weight" if "output.weight" in shards[0] else "tok_embeddings.weight"
        return np.concatenate([x @ weight(shard, output).T for shard in shards], -1)
    return sum(y @ weight(shard, "tok_embeddings.weight").T for y, shard in zip(np.split(x, len(shards), -1), shards))


def model_logits(folder, ids):
    """Logits, (len(ids), vocabulary), of a model folder by transformers in float32, one matrix in memory at a time."""
    import torch
    import transformers
    from accelerate import init_empty_weights
    from safetensors import safe_open

    config = transformers.AutoConfig.from_pretrained(folder)
    with init_empty_weights():  # tables such as the rotary one are computed, weights are not there
        model = transformers.LlamaForCausalLM(config)
    model.eval()
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    places = {name: file for file in files for name in file.keys()}

    def fill(module, name):
        name = "model.embed_tokens" if name == "lm_head" and config.tie_word_embeddings else name
        weight = places[f"{name}.weight"].get_tensor(f"{name}.weight").float()
        module.weight = torch.nn.Parameter(weight, requires_grad=False)

    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_pre_hook(lambda module, _, name=name: fill(module, name))
            module.register_forward_hook(lambda module, *_: setattr(module, "weight", None))
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def verify(folder, paths, params, llama, dtype=None):
    """Compare both forward passes. Raises UserError where they differ by more than VERIFY_TOLERANCE."""
    largest = max(llama.vocab_size, llama.ffn_dim) * llama.dim
    say(f"verify: needs about {0.7 + 16 * largest / 1e9:.1f} GB of memory")
    ids = [(i * 7919 + 11) % llama.vocab_size for i in range(VERIFY_TOKENS)]
    wanted = reference_logits(paths, params, ids, llama.rope_factor, dtype)
    difference = np.abs(model_logits(folder, ids) - wanted).max() / np.abs(wanted).max()
    found = f"verify: logits differ from those of the raw shards by {difference:.1e} of the largest"
    if not difference <= VERIFY_TOLERANCE:  # NaN is refused too
        found += f", more than {VERIFY_TOLERANCE:.0e}"
        raise UserError(f"{found}; this is a fault of the converter, please report it")
    say(f"{found}, {len(ids)} tokens")


# --- The way back: from a Hugging Face folder to Meta's layout -------------------------------------------------------


def make_raw_shard(path, plan):
    """Write a file of torch.save with room for a plan's tensors. Returns these: {name: StoredTensor}."""
    import torch

    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in plan.items()}
    with torch.serialization.skip_data(), open(path, "xb") as file:  # tensors that are never touched take no memory
        torch.save(tensors, file)
    return weights.open_weights(path)


def add_checksums(path, shard, sums):
    """Put the CRC-32 of each tensor, {name: number}, into a raw shard: torch wrote none for data that it skipped."""
    records = {tensor.file.records[tensor.offset].filename: sums[name] for name, tensor in shard.items()}
    with zipfile.ZipFile(path, "a") as archive:
        for entry in archive.infolist():
            entry.CRC = records.get(entry.filename, entry.CRC)
        archive.comment = b""  # a comment that is set, even to nothing, has the table of contents written again


def read_llama(folder, num_shards):
    """The Llama of a transformers folder, to be split into `num_shards`. Raises UserError for another model."""
    path = folder / "config.json"
    config = utils.read_json(path, hint="; --reverse takes a model folder of transformers")
    try:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        scaled = rope.get("rope_type", rope.get("type", "default"))
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000)
        is_llama3 = theta == 5e5 or (folder / "tokenizer.tiktoken").is_file()
        llama = Llama(
            num_shards=num_shards, dtype=config.get("dtype") or config.get("torch_dtype"), dim=dim,
            num_layers=config["num_hidden_layers"], num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads, ffn_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"], norm_eps=config["rms_norm_eps"],
            rope_theta=theta, rope_factor=float(rope["factor"]) if scaled == "llama3" else None,
            embedding_axis=COLUMNS if is_llama3 else ROWS,
            kv_copies=1, tied=config.get("tie_word_embeddings") or False,
        )  # fmt: skip
        for field in dataclasses.fields(llama):  # such as "false" for false
            if field.name != "dtype" and not isinstance(value := getattr(llama, field.name), field.type):
                raise TypeError(f"{field.name} is {json.dumps(value)}")
        odd = {
            "model_type": config["model_type"] != "llama",
            "rope_scaling": scaled not in ("default", "llama3"),
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            "head_dim": (config.get("head_dim") or llama.head_dim) != llama.head_dim,
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the config of a LLaMA ({utils.first_line(error)})") from None
    if any(odd.values()):
        raise UserError(f"{path}: its {next(key for key in odd if odd[key])} is nothing that Meta's format can say")
    for what, number in (("heads", heads), ("key-value heads", llama.num_kv_heads), ("ffn rows", llama.ffn_dim),
                         ("rows of the vocabulary", llama.vocab_size)):  # fmt: skip
        if number % num_shards:
            raise UserError(f"--num_shards {num_shards}: {number} {what} do not divide by it; choose another number")
    return llama


def find_sources(folder, llama):
    """The tensors of a transformers folder, {name: StoredTensor}. Raises UserError where they are not a Llama's."""
    stored = weights.open_weights(folder).items()
    sources = {name: tensor for name, tensor in stored if not name.endswith("rotary_emb.inv_freq")}
    wanted = {name: shape for name, _, shape in llama.tensors().values()}
    if llama.tied and "lm_head.weight" not in sources and "model.embed_tokens.weight" in sources:
        sources["lm_head.weight"] = sources["model.embed_tokens.weight"]
    check_names(folder, sources, wanted)
    for name, shape in wanted.items():
        if (old := sources[name]).shape != shape or not DTYPES[old.dtype][2]:  # quantised, or an exact delta
            raise UserError(f"{folder}: tensor {name} is {old.dtype} {[*old.shape]}, by config.json floats {[*shape]}")
    return sources


def raw_blocks(llama, sources, plan):
    """((number of a shard, Meta's name), its next rows), tensor after tensor; rope.freqs is computed anew."""
    count = llama.num_shards
    for raw, (name, axis, shape) in llama.tensors().items():
        is_rotated = raw.endswith(("wq.weight", "wk.weight"))
        dtype, (share, *_) = plan[raw]  # rows of a shard
        for first in range(0, shape[0], share):
            for start, stop in weights.row_blocks((share, *shape[1:]), dtype, llama.head_dim if is_rotated else 1):
                block = sources[name].read(first + start, first + stop)
                block = permute(block, llama.head_dim, back=True) if is_rotated else block
                copies = [block] * (1 if axis == COLUMNS else count)
                pieces = np.split(block, count, axis=1) if axis == ROWS else copies
                for i, piece in enumerate(pieces, first // share):
                    yield (i, raw), np.ascontiguousarray(piece)
    frequencies = 1.0 / llama.rope_theta ** (np.arange(0, llama.head_dim, 2, dtype=np.float32) / llama.head_dim)
    bits = frequencies.astype(np.float32).view(np.uint32)
    for i in range(count):
        yield (i, "rope.freqs"), cast(bits, "float32", plan["rope.freqs"][0], "rope.freqs")


def reverse(args):
    """Write Meta's layout from a model folder of transformers; see `main`."""
    folder, count = weights.find_model(args.input_dir, option="--input_dir"), args.num_shards or 1
    utils.check_model(folder, "--input_dir")
    llama = read_llama(folder, count)
    sources = find_sources(folder, llama)
    plan = {
        raw: (sources[name].dtype, llama.shard_shape(raw, axis, shape, count))
        for raw, (name, axis, shape) in llama.tensors().items()
    }
    plan["rope.freqs"] = (sources["model.norm.weight"].dtype, (llama.head_dim // 2,))
    names = [f"consolidated.{i:02}.pth" for i in range(count)]
    size = weights.plan_size(plan) * count
    with weights.new_folder(args.output_dir, size + 2**22, [folder], args.overwrite, names) as target:
        check_values(list(sources.values()))
        shards, places = [make_raw_shard(target / name, plan) for name in names], {}
        for i, shard in enumerate(shards):
            places |= {(i, raw): (target / names[i], new.offset, new.offset + new.nbytes) for raw, new in shard.items()}
        sums = dict.fromkeys(places, 0)
        write_blocks(raw_blocks(llama, sources, plan), weights.BlockWriter(places), size, sums)
        for i, shard in enumerate(shards):
            add_checksums(target / names[i], shard, {raw: sums[i, raw] for raw in plan})
        weights.check_unchanged(sources.values())
        utils.jdump(raw_params(llama), target / "params.json", indent=None)
        found = [path for path in map(folder.joinpath, TOKENIZERS) if path.is_file()]
        for path in found[:1]:
            shutil.copyfile(path, target / "tokenizer.model")
    if not found:
        say(f"tokenizer: none of {', '.join(TOKENIZERS)} is in {folder}; copy Meta's file to {args.output_dir}")
    kept = f"{len(sources)} tensors + rope.freqs, computed anew, in {count} shard{'s' * (count > 1)}"
    say(f"{args.output_dir}: {kept}; {size / 1e9:.2f} GB in Meta's layout")


def raw_params(llama):
    """params.json of a Llama, in which Meta's rule gives the rows of w1."""
    exact = (llama.ffn_dim + 0.5) / int(8 * llama.dim / 3)
    rules = [(256, None), (1024, 1.3), (4096, 1.3), (256, 1.5)]  # Meta's own
    rules += [(2**i, None) for i in range(7, -1, -1)] + [(1, exact)]
    multiple_of, multiplier = next(rule for rule in rules if ffn_size(llama.dim, *rule) == llama.ffn_dim)
    params = {
        "dim": llama.dim, "multiple_of": multiple_of, "n_heads": llama.num_heads, "n_layers": llama.num_layers,
        "norm_eps": llama.norm_eps, "vocab_size": llama.vocab_size,
    }  # fmt: skip
    params |= {"ffn_dim_multiplier": multiplier} if multiplier else {}
    params |= {"n_kv_heads": llama.num_kv_heads} if llama.num_kv_heads != llama.num_heads else {}
    params |= {"rope_theta": llama.rope_theta} if llama.rope_theta != 10000 else {}
    return params | ({"use_scaled_rope": True, "rope_scaling_factor": llama.rope_factor} if llama.rope_factor else {})


# --- The story -------------------------------------------------------------------------------------------------------


def convert(args):
    """Convert `args.input_dir` into `args.output_dir`; see `main`."""
    folder = find_folder(args.input_dir, args.model_size)
    paths, params = find_shards(folder), read_params(folder)
    shards = open_shards(paths)
    llama = describe(shards, params, folder)
    check_tensors(llama, shards, folder)
    tokenizer = find_tokenizer(folder, args.tokenizer)
    table = {raw: entry for raw, entry in llama.tensors().items() if raw in shards[0]}
    if llama.tied:
        table.pop("output.weight", None)  # it is the embedding
    plan = {name: (args.dtype or shards[0][raw].dtype, shape) for raw, (name, _, shape) in table.items()}
    size, dtype = weights.plan_size(plan), args.dtype or llama.dtype
    count = sum(math.prod(shape) for _, shape in plan.values())
    what = f"{len(paths)} shard{'s' * (len(paths) > 1)}, {count:,} parameters in {llama.dtype}"
    sizes = f"{llama.num_layers} layers, {llama.num_heads} heads ({llama.num_kv_heads} key-value), width {llama.dim}"
    sizes += f", feed-forward {llama.ffn_dim}, vocabulary {llama.vocab_size:,}"
    say(f"{folder}: {what}; {sizes}{', tied embeddings' * llama.tied}")
    if args.dtype and args.dtype != llama.dtype:
        say(f"dtype: {llama.dtype} -> {args.dtype}, as --dtype says; the result is no longer bit for bit the source")
    context, reason = context_length(llama, args.context)
    say(f"context length: {context:,} tokens ({reason})")
    if llama.rope_factor:
        origin = "as params.json says" if "rope_scaling_factor" in params else "8 in Llama 3.1, 32 in the tied 3.2"
        origin = "as --rope_factor says" if args.rope_factor else f"{origin}; --rope_factor sets it"
        llama.rope_factor = args.rope_factor or llama.rope_factor
        say(f"rotary tables: stretched by {llama.rope_factor:g} ({origin})")
    elif args.rope_factor or "rope_scaling_factor" in params:
        say(f"rotary tables: not stretched, for params.json of {folder} lacks use_scaled_rope; the factor is not used")
    files = weights.weight_file_names(plan, args.max_shard_size)
    special, generation = {"bos_token_id": 1, "eos_token_id": 2}, {}
    loaded = read_tokenizer(tokenizer, llama, bool(args.tokenizer)) if tokenizer else None
    with weights.new_folder(args.output_dir, size + 2**25, [folder, args.input_dir], args.overwrite, files) as target:
        check_values([shard[raw] for raw in table for shard in shards], args.dtype)
        check_copies(llama, shards, folder)
        if loaded:
            special, generation = write_tokenizer(target, tokenizer, *loaded, context)
            say(f"tokenizer: {loaded[0]}, {loaded[1].get_vocab_size():,} tokens, from {tokenizer}")
        writer = weights.WeightWriter(target, plan, args.max_shard_size)
        write_blocks(converted_blocks(llama, table, shards, args.dtype), writer, size)
        weights.check_unchanged(tensor for shard in shards for tensor in shard.values())
        assert {name: (tensor.dtype, tensor.shape) for name, tensor in weights.open_weights(target).items()} == plan
        utils.jdump(generation or special, target / "generation_config.json", indent=2)
        utils.jdump(model_config(llama, dtype, context, special), target / "config.json", indent=2)
        if args.verify:
            verify(target, paths, params, llama, args.dtype)
    dropped = [f"{name}, computed anew" for name in shards[0] if ROTARY.search(name)]
    dropped += ["output.weight, tied"] if llama.tied and "output.weight" in shards[0] else []
    reasons = f" ({'; '.join(dropped[:3])}{'; ...' if dropped[3:] else ''})" if dropped else ""
    counts = f"{len(plan)} tensors written + {len(dropped)} dropped{reasons} = {len(shards[0])} in each shard"
    num_files = sum(name.endswith(".safetensors") for name in files)
    say(f"{args.output_dir}: {counts}; {size / 1e9:.2f} GB of {dtype} in {num_files} files")
    say(f"next: python train.py --model_name_or_path {args.output_dir} --data_path DATA.json --output_dir TUNED")


def parse_size(text):
    """Bytes of a size such as 5GB, 500MB, 2GiB or 1000. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise UserError(f"{text!r} is no size; write it like 5GB, 500MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def parse_arguments(words):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input_dir", required=True, help="folder of the raw weights, or a name on the hub")
    add("--model_size", help="subfolder of --input_dir, such as 7B; needed where there are several")
    add("--output_dir", required=True, help="folder to write; must not exist, or be empty")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="cast the weights (default: keep them bit for bit)")
    add("--max_shard_size", type=parse_size, default=weights.SHARD_SIZE, help="default: 5GB")
    add("--context", type=int, help="context length in tokens; printed with its reason when left out")
    add("--rope_factor", type=float, help="stretch of the rotary tables of Llama 3.1 and 3.2")
    add("--tokenizer", help="the tokenizer.model, where it is elsewhere; none converts without")
    add("--verify", action="store_true", help="compare logits with those of the raw shards")
    add("--overwrite", action="store_true", help="replace files of the names that are written")
    add("--reverse", action="store_true", help="from a Hugging Face folder to Meta's layout")
    add("--num_shards", type=int, help="shards that --reverse writes (default: 1)")
    for name in ("--llama_version", "--safe_serialization"):  # of older converters, accepted and without meaning
        add(name, nargs="?", const="", help=argparse.SUPPRESS)
    args = utils.parse_options(parser, words)
    for name in ("llama_version", "safe_serialization"):
        if getattr(args, name) is not None:
            say(f"--{name} has no meaning any more; ignored")
    for name in ("context", "rope_factor", "num_shards"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: expected a number above 0")
    others = "model_size dtype context rope_factor tokenizer verify" if args.reverse else "num_shards"
    if ignored := ", ".join(f"--{name}" for name in others.split() if getattr(args, name)):
        say(f"{ignored}: no meaning with{'out' * (not args.reverse)} --reverse; ignored")
    return args


def main(words=None):
    args = parse_arguments(sys.argv[1:] if words is None else words)
    (reverse if args.reverse else convert)(args)


if __name__ == "__main__":
    utils.run_main(main)
