"""Turn a base model and a delta into a tuned model, or two models into a delta, in half a gigabyte of memory.

    python -m apply_delta --base BASE --delta DELTA --target TARGET            # what DELTA is, is read from the folder
    python -m apply_delta --make --base BASE --target TUNED --delta DELTA [--exact]

A delta is one of three: weights that were subtracted (Vicuna's, Stanford Alpaca's, anybody's made with --make), an
exact delta (made with --make --exact: every tensor comes back bit for bit), or a LoRA adapter of peft. Folders and
names on the hub are taken alike, as .safetensors or .bin; safetensors are written. All is compared before the first
byte is written, and TARGET appears at the end, whole. Command and public names are those of FastChat's apply_delta.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.end_by_ctrl_c()

import torch

import weights
from utils import UserError, say
from weights import DTYPES, StoredTensor, row_blocks

ALPACA_SUM = 50637.1836  # of all numbers of Stanford Alpaca 7B; from its weight_diff.py
NEW_ROWS = {"float16": "zero", "float32": "mean"}  # for new rows, by dtype of the delta: FastChat's, Stanford Alpaca's
STYLES = {  # of the prompt, by rule for new rows and dtype of the delta: the three families of deltas without a record
    ("zero", "float16"): "vicuna_v0", (None, "float16"): "vicuna_v1.1", ("mean", "float32"): "alpaca",
}  # fmt: skip
SIGNED = {2: "int16", 4: "int32", 8: "int64"}  # dtypes of an exact delta, by bytes of the target's
PRODUCT = 96 * 2**20  # bytes of a LoRA product, or of the columns of a mean, that are held at once
PRODUCT_ROWS = 256  # the least: products of fewer rows are summed in another order by BLAS
EMBEDDINGS, OUTPUT = (re.compile(rf"(^|\.)({n})\.weight$") for n in ("embed_tokens|wte|word_embeddings", "lm_head"))
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")
FILES = ("*.json", "*.safetensors", "*.bin", *TOKENIZER)  # wanted from the hub
MORE_THAN_LORA = (  # options of peft that change what an adapter adds, or to what
    "lora_bias fan_in_fan_out target_parameters layer_replication use_qalora "
    "alora_invocation_tokens use_bdlora arrow_config kasa_config monteclora_config enable_lora"
).split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Add a delta or merge a LoRA adapter: TARGET = BASE + DELTA. With --make: DELTA = TARGET - BASE.",
        epilog="example: python -m apply_delta --base llama-7b --delta lmsys/vicuna-7b-delta-v1.1 --target vicuna-7b",
        allow_abbrev=False,
    )
    add = parser.add_argument
    spellings = {  # ours, FastChat's, Stanford's, merge_peft's
        "base": ("--base", "--base-model-path", "--base_model_path", "--path_raw", "--base_model"),
        "delta": ("--delta", "--delta-path", "--delta_path", "--path_diff", "--peft_model"),
        "target": ("--target", "--target-model-path", "--target_model_path", "--path_tuned", "--output_dir"),
    }
    for name, words in spellings.items():
        add(*words, dest=name, required=True, metavar="DIR", help=f"The {name} model: a folder, or a name on the hub.")
    add("--make", action="store_true", help="Make the delta instead: of --target, which is read, and --base.")
    add("--exact", action="store_true", help="With --make: of the same size; gives every tensor back bit for bit.")
    dtypes = ("float16", "bfloat16", "float32")
    add("--dtype", choices=dtypes, help="Of the result. By default the delta's, for an adapter the base's.")
    add("--new_rows", choices=("zero", "mean"), help="What rows that the base lacks are taken to be in it.")
    add("--any_base", action="store_true", help="Skip the checks that base and delta belong together.")
    add("--overwrite", action="store_true", help="Write into a folder that exists; only namesakes are replaced.")
    truth = utils.TRUTH | {"metavar": "True|False"}
    add("--check_integrity_naively", **truth, help=f"Stanford Alpaca 7B: the sum of all numbers must be {ALPACA_SUM}.")
    add("--low-cpu-mem", "--low_cpu_mem", action="store_true", help=argparse.SUPPRESS)
    return utils.parse_options(parser, argv)


# --- The maths -------------------------------------------------------------------------------------------------------


def working_dtype(delta_dtype, result_dtype):
    """What is added: float16 where delta and result are float16, as in FastChat; else float32, to be rounded once."""
    return "float16" if delta_dtype == result_dtype == "float16" else "float32"


def bits(tensor):
    """The bit patterns of a floating-point tensor as signed integers of the same width."""
    return tensor.contiguous().view(getattr(torch, SIGNED[tensor.element_size()]))


def bit_difference(target, base):
    """An exact delta: the difference, modulo 2^width, of the bit patterns of `target` and of `base` in its dtype."""
    return bits(target) - bits(base.to(target.dtype))


def bit_sum(base, delta, dtype):
    """The inverse of `bit_difference`: the target, bit for bit, as a tensor of `dtype`."""
    return (bits(base.to(dtype)) + delta).view(dtype)


def lora_product(lora_a, lora_b, scaling, embedding=False):
    """scaling * B A, in float32: what an adapter adds to a weight [out, in] (https://arxiv.org/abs/2106.09685, 4.1).

    `lora_a` is [rank, in], `lora_b` [out, rank]; for an embedding [rank, rows] and [columns, rank], transposed.
    """
    product = lora_b.float() @ lora_a.float()
    return (product.T if embedding else product).mul_(scaling)


def merge(base, product, embedding=False, magnitude=None):
    """base + product in the dtype of `base`, rounded as peft's merge_and_unload(safe_merge=False) does it.

    The sum is computed in float32 and rounded once; for an embedding the product is rounded before. DoRA's `magnitude`
    (rows,) is the norm that each row of the sum gets (https://arxiv.org/abs/2402.09353, equation 5).
    """
    if embedding:
        return base + product.to(base.dtype)
    total = base + product
    if magnitude is not None:
        total = (magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1) * total
    return total.to(base.dtype)


def lora_scaling(config, module):
    """(rank, scaling) of a module: alpha / rank, for rslora (https://arxiv.org/abs/2312.03732) alpha / sqrt(rank)."""

    def pick(patterns, default):  # the first pattern that names the module counts, then the default
        return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = pick(config.get("rank_pattern"), config["r"])
    alpha = pick(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_named(words, module):
    """Whether `words` of an adapter's config, a pattern or ends of names, name a module; as peft reads them."""
    if isinstance(words, str):
        return re.fullmatch(words, module) is not None
    return any(f".{module}".endswith(f".{word}") for word in words or ())


def is_target(config, module):
    """Whether an adapter's config targets `module`, such as model.layers.0.self_attn.q_proj, as peft reads it."""
    if is_named(config.get("exclude_modules"), module) or not is_named(config["target_modules"], module):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if layers in (None, []) or isinstance(config["target_modules"], str):
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


class Fingerprint:
    """SHA-256 of a set of tensors in any files and order: of the lines `name dtype shape sha256` of all, sorted."""

    def __init__(self):
        self.tensors = {}  # name: [digest, dtype, rows so far, shape of a row]

    def add(self, name, rows):
        """The next rows of a tensor."""
        entry = self.tensors.setdefault(name, [hashlib.sha256(), str(rows.dtype)[6:], 0, list(rows.shape[1:])])
        entry[0].update(array(rows))
        entry[2] += len(rows)

    def shapes(self):
        """{name: "dtype shape"} of all tensors."""
        return {name: f"{dtype} {[rows, *rest]}" for name, (_, dtype, rows, rest) in sorted(self.tensors.items())}

    def hexdigest(self):
        lines = [f"{name} {shape} {self.tensors[name][0].hexdigest()}\n" for name, shape in self.shapes().items()]
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


# --- Rows of tensors in files ----------------------------------------------------------------------------------------


def read_tensor(tensor, start=0, stop=None, dtype=None, fill=None):
    """Rows of a StoredTensor, cast to `dtype`; those beyond its last are `fill`, a row that broadcasts."""
    rows = len(tensor)
    stop = rows if stop is None else stop
    block = torch.from_numpy(tensor.read(min(start, rows), min(stop, rows))).view(getattr(torch, tensor.dtype))
    block = block if dtype is None else block.to(dtype)
    missing = stop - max(start, rows)
    if missing <= 0:
        return block
    return torch.cat([block, fill.to(block.dtype).expand(missing, *block.shape[1:])])


def array(rows):
    """The bits of a contiguous tensor as a numpy array, without a copy."""
    return rows.contiguous().view(torch.uint8).numpy()


def mean_row(tensor):
    """The mean of all rows of a StoredTensor, in float32, bit-equal with torch's mean of the whole.

    Column by column torch sums in the same order whether it sees all columns or some, if they are a multiple of 64.
    """
    rows, columns = tensor.shape
    step = max(PRODUCT // (4 * rows) // 64, 1) * 64
    slices = []
    for first in range(0, columns, step):
        part = torch.empty(rows, min(step, columns - first), dtype=torch.float32)
        for start, stop in row_blocks(tensor.shape, tensor.dtype):
            part[start:stop] = read_tensor(tensor, start, stop)[:, first : first + step]
        slices.append(part.mean(dim=0))
    return torch.cat(slices)


# What an adapter adds to one weight; see `lora_product` and `merge`.
Lora = collections.namedtuple("Lora", "a b scaling embedding magnitude", defaults=[None])
Rows = collections.namedtuple("Rows", "tensor indices")  # some rows of a weight, and their numbers


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of the result: `base` changed by `change`, a stored tensor, a Lora, Rows or None."""

    name: str
    dtype: str
    shape: tuple
    base: StoredTensor
    change: object = None
    fill: object = None  # the row that stands for those which `base` lacks; see `read_tensor`


def sum_rows(part):
    """The rows of base + delta, block by block; an integer delta is an exact one."""
    dtype, change = getattr(torch, part.dtype), part.change
    exact = not is_float(change.dtype)
    working = dtype if exact else getattr(torch, working_dtype(change.dtype, part.dtype))
    for start, stop in row_blocks(part.shape, part.dtype):
        base, delta = read_tensor(part.base, start, stop, working, part.fill), read_tensor(change, start, stop)
        yield start, stop, bit_sum(base, delta, dtype) if exact else (base + delta.to(working)).to(dtype)


def merged_rows(part):
    """The rows of a weight with its adapter merged in, block by block."""
    dtype, lora, rows = getattr(torch, part.dtype), part.change, part.shape[0] if part.shape else 1
    if not isinstance(lora, Lora):
        places, new = (torch.tensor(lora.indices), read_tensor(lora.tensor, dtype=dtype)) if lora else ((), ())
        for start, stop in row_blocks(part.shape, part.dtype):
            block = read_tensor(part.base, start, stop, dtype)
            if lora is not None:
                inside = (places >= start) & (places < stop)
                block[places[inside] - start] = new[inside]
            yield start, stop, block
        return
    a, b = read_tensor(lora.a), read_tensor(lora.b)
    magnitude = None if lora.magnitude is None else read_tensor(lora.magnitude)
    borders = [start for start, _ in row_blocks(part.shape, "float32", PRODUCT_ROWS, PRODUCT)]
    if len(borders) > 1 and rows - borders[-1] < PRODUCT_ROWS:
        borders.pop()
    for first, last in zip(borders, [*borders[1:], rows], strict=True):
        some = (a[:, first:last], b) if lora.embedding else (a, b[first:last])
        product = lora_product(*some, lora.scaling, lora.embedding)
        for start, stop in row_blocks((last - first, *part.shape[1:]), "float32"):
            base = read_tensor(part.base, first + start, first + stop, dtype)
            norms = None if magnitude is None else magnitude[first + start : first + stop]
            yield first + start, first + stop, merge(base, product[start:stop], lora.embedding, norms)


def check_rows(rows, part, start, stop):
    """Raise UserError for rows of a result that are not finite, naming the file to blame or the dtype."""
    if rows.numel() == 0 or all(math.isfinite(value) for value in torch.aminmax(rows)):  # NaN is passed on
        return
    sources = [(tensor, start, stop) for tensor in (part.base, part.change) if isinstance(tensor, StoredTensor)]
    sources += [(half, 0, None) for half in (part.change[:2] if isinstance(part.change, Lora) else ())]
    for tensor, first, last in sources:
        where = f"{tensor.file.path}: tensor {tensor.name}"
        weights.check_finite(tensor.read(first, last), tensor.dtype, where)
    wider = "float32 or bfloat16" if part.dtype == "float16" else "float32"
    raise UserError(f"tensor {part.name}: the result is too large for {part.dtype}; give --dtype {wider}")


# --- Input: models and deltas ----------------------------------------------------------------------------------------


def open_inputs(output, option, **paths):
    """The folders of two inputs, {option: path or name on the hub}, and what the second is; see utils.check_model.

    A delta may be a delta, an adapter, or a model that `check_is_delta` looks at. `output` must be outside of both,
    they apart. Raises UserError for anything else.
    """
    folders = [weights.find_model(path, FILES, f"--{name}") for name, path in paths.items()]
    (one, first), (two, second) = paths.items()
    utils.check_model(folders[0], f"--{one}", ("not causal",), second, output)
    changes = ("not causal", "a delta", "a LoRA adapter") if two == "delta" else ("not causal",)
    kind = utils.check_model(folders[1], f"--{two}", changes, first, output)
    if weights.same_place(*folders):
        raise UserError(f"--{two} {second}: the same place as --{one} {first}; give two different folders")
    for folder in folders:
        if folder.resolve() in Path(output).resolve().parents:
            raise UserError(f"{option} {output}: inside {folder}, which is read; choose a folder elsewhere")
    return folders, kind


def run_of(folder):
    """The run.json that a script of ours left in a folder; {} where there is none, or somebody else's."""
    try:
        return utils.read_run(folder) or {}
    except UserError as error:
        say(f"{str(error).partition(';')[0]}; what it says is not used")
        return {}


def open_model(path):
    """The tensors of a model, without the rotary frequencies that early releases of transformers stored."""
    tensors = weights.open_weights(path).items()
    return {name: tensor for name, tensor in tensors if not name.endswith("rotary_emb.inv_freq")}


def is_float(dtype):
    """Whether a dtype, by its name, is one of floating-point numbers."""
    return DTYPES[dtype][2] != 0


def compare(base, other, base_config, other_config, names=("base", "delta"), exact=False):
    """Compare two sets of StoredTensors by name. Raises UserError that lists what is missing, extra or different.

    Returns (rows of the vocabulary in base, in other) where other has more, else None. An exact delta holds integers.
    """
    problems = [f"{name} is missing from the {names[1]}" for name in base if name not in other]
    problems += [f"{name} is not in the {names[0]}" for name in other if name not in base]
    grown, rows = set(), base_config.get("vocab_size")
    for name in (name for name in base if name in other):
        old, new = base[name].shape, other[name].shape
        if len(old) == len(new) == 2 and old[1] == new[1] and old[0] < new[0] and old[0] == (rows or old[0]):
            grown.add((old[0], new[0]))
        elif old != new:
            problems.append(f"{name} is {list(old)} in the {names[0]} and {list(new)} in the {names[1]}")
    if len(grown) > 1:
        problems.append(f"rows are added in several ways: {sorted(grown)}")
    for tensors, what, integers in ((base, names[0], False), (other, names[1], exact)):
        odd = [name for name, tensor in tensors.items() if is_float(tensor.dtype) == integers]
        problems += [f"{name} is {tensors[name].dtype} in the {what}" for name in odd]
    for key in ("model_type", "num_attention_heads", "num_key_value_heads"):
        one, two = base_config.get(key), other_config.get(key)
        if None not in (one, two) and one != two:
            problems.append(f"{key} is {one} in the {names[0]}'s config and {two} in the {names[1]}'s")
    refuse(problems, f"{names[0]} and {names[1]} do not fit together")
    return grown.pop() if grown else None


def refuse(problems, what):
    """Raise UserError for a list of problems, if there are any; the first six are named."""
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(f"{what}: {'; '.join(problems[:6])}{more}; check that both are of the same model")


def new_rows_rule(grown, dtype, asked=None, recorded=None):
    """(rule for rows that the base lacks, its words): as asked, recorded, or by NEW_ROWS for the delta's dtype."""
    if grown is None:
        return None, "none, the vocabularies are the same"
    rule = asked or recorded or NEW_ROWS.get(dtype)
    if rule is None:
        what = f"no rule says what a {dtype} delta takes the missing ones to be"
        way = "give --new_rows zero (FastChat's rule) or mean (Stanford Alpaca's)"
        raise UserError(f"the base has {grown[0]:,} rows of vocabulary and the other {grown[1]:,}; {what}; {way}")
    value, peer = ("zero", "FastChat") if rule == "zero" else ("the mean of the old ones", "Stanford Alpaca")
    whose = "as asked" if asked else "as the delta's run.json says" if recorded else f"{peer}'s rule for {dtype} deltas"
    return rule, f"{grown[0]:,} -> {grown[1]:,}, those that the base lacks are {value} in it ({whose})"


def fill_row(rule, tensor, shape):
    """What stands for the rows of `shape` that a tensor of the base lacks; None where it lacks none."""
    return None if tensor.shape == shape else torch.zeros(tensor.shape[1]) if rule == "zero" else mean_row(tensor)


def check_is_delta(base, delta, folder):
    """Refuse a whole model in place of a delta: its norm weights are nearly the base's, and a delta's are near 0."""
    norms = [name for name, tensor in base.items() if len(tensor.shape) == 1 and "norm" in name]
    if not norms:
        return
    one, two = (read_tensor(tensors[norms[-1]]).double() for tensors in (base, delta))
    if (two - one).norm() < 0.5 * two.norm():
        what = f"a whole model, it seems, and no delta: its {norms[-1]} is nearly the base's"
        raise UserError(f"{folder}: {what}; use it as it is, or if it is a delta all the same, give --any_base")


def delta_parts(base, delta, configs, folder, record, dtype=None, new_rows=None, any_base=False):
    """Plan the sum of base and delta. Returns (Parts of the result, rule for new rows). Raises UserError."""
    exact, found = record.get("format") == "exact", " and ".join(sorted({tensor.dtype for tensor in delta.values()}))
    if not exact and not any(is_float(tensor.dtype) for tensor in delta.values()):
        raise UserError(f"{folder}: holds integers, as an exact delta does, and no run.json; copy the whole folder")
    if exact and (dtype or new_rows or any_base):
        raise UserError(f"{folder}: an exact delta gives one result; leave --dtype, --new_rows and --any_base out")
    grown = compare(base, delta, *configs, exact=exact)
    check_delta_record(record, delta, folder)
    if not exact and not any_base:
        check_is_delta(base, delta, folder)
    rule, words = new_rows_rule(grown, found, new_rows, record.get("new_rows"))
    kinds = {name: dtype or tensor.dtype for name, tensor in delta.items()}
    if exact:
        kinds = {name: described.split()[0] for name, described in record["tensors"].items()}
    as_fastchat = all(working_dtype(tensor.dtype, kinds[name]) == "float16" for name, tensor in delta.items())
    plain = "float16(base) + delta, as FastChat" if as_fastchat else "base + delta in float32, rounded once"
    say(f"delta: {folder} is {'an exact delta' if exact else f'a weight delta in {found}'}; new rows: {words}")
    say(f"arithmetic: {'sum of bit patterns' if exact else plain}; result in {' and '.join(sorted({*kinds.values()}))}")
    fills = {name: fill_row(rule, old, delta[name].shape) for name, old in base.items()}
    parts = [Part(name, kinds[name], delta[name].shape, base[name], delta[name], fills[name]) for name in base]
    return parts, rule


def check_delta_record(record, delta, folder):
    """Refuse a delta that is not the one its run.json describes: by the names of its tensors, and its tokenizer."""
    sums = record.get("tokenizer", {})
    there = {name: utils.sha256_of(folder / name) for name in sums if (folder / name).is_file()}
    wrong = ["its tensors"] if record and set(record["tensors"]) != set(delta) else []
    wrong += [name for name, sha256 in sums.items() if there.get(name) != sha256]
    if names := ", ".join(wrong):
        raise UserError(f"{folder}: its run.json describes other files: {names}; copy the whole folder again")


def check_base(parts, record, folder):
    """Refuse a base other than the one that the delta was made from; it is read as the delta sees it."""
    found = Fingerprint()
    with weights.meter("checking the base", sum(part.base.nbytes for part in parts)) as meter:
        for part in parts:
            seen = part.change.dtype if is_float(part.change.dtype) else part.dtype
            working = getattr(torch, working_dtype(seen, seen) if is_float(part.change.dtype) else seen)
            for start, stop in row_blocks(part.base.shape, part.base.dtype):
                found.add(part.name, read_tensor(part.base, start, stop, working))
            meter.update(part.base.nbytes)
    if found.hexdigest() != record["base"]["sha256"]:
        way = "give that one" if record["format"] == "exact" else "give that one, or for any base --any_base"
        path, sha256 = record["base"]["path"], record["base"]["sha256"][:12]
        what = f"its tensors have sha256 {found.hexdigest()[:12]}, those of {path} had {sha256}"
        raise UserError(f"{folder}: not the base that this delta was made from: {what}; {way}")


def check_alpaca_sum(total, config):
    """Compare the sum of all numbers of a result with the one that Stanford published for Alpaca 7B.

    Theirs was summed in float32, in which 291 sums wander by about 0.02, and by a release of transformers that counted
    the rotary frequencies among the weights; with and without them is accepted.
    """
    width = config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    rotary = sum(10000 ** (-2 * i / width) for i in range(width // 2)) * config.get("num_hidden_layers", 0)
    if min(abs(total - ALPACA_SUM), abs(total + rotary - ALPACA_SUM)) > 0.05:
        sums = f"{total:.4f}, with rotary frequencies {total + rotary:.4f}, and Stanford Alpaca 7B's is {ALPACA_SUM}"
        what = "--check_integrity_naively: the sum of all numbers is"
        raise UserError(f"{what} {sums}; for any other model leave the option out")
    say(f"integrity: the sum of all numbers is Stanford Alpaca 7B's, {ALPACA_SUM}")


# --- LoRA adapters ---------------------------------------------------------------------------------------------------


def check_adapter_config(config, path):
    """Refuse, with a way round, the kinds of adapter that are more than base + scaling * B A."""
    kind, found = config.get("peft_type"), [key for key in MORE_THAN_LORA if config.get(key)]
    found += ["use_dora"] if config.get("use_dora") and "embed_tokens" in (config.get("target_modules") or ()) else []
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        found.append("init_lora_weights")  # the others change the base's weights first
    if kind != "LORA" or found:
        what = f"{found[0]} is {json.dumps(config[found[0]])}" if kind == "LORA" else f"peft_type is {json.dumps(kind)}"
        way = "peft merges what can be merged: PeftModel.from_pretrained(model, adapter).merge_and_unload()"
        raise UserError(f"{path}: {what}, so it is not a plain LoRA; {way}")
    numbers = [config.get("r"), config.get("lora_alpha")]
    numbers += [v for key in ("rank_pattern", "alpha_pattern") for v in (config.get(key) or {}).values()]
    words, rslora = config.get("target_modules"), config.get("use_rslora")
    if not all(type(n) in (int, float) and n > 0 for n in numbers) or not words or rslora not in (None, True, False):
        raise UserError(f"{path}: its r, lora_alpha, use_rslora or target_modules is none; copy the adapter again")


def open_adapter(folder):
    """The tensors of an adapter's folder. Raises UserError where there are none."""
    path = next((path for path in map(folder.joinpath, weights.ADAPTERS) if path.is_file()), None)
    if path is None:
        what = f"has adapter_config.json and neither {' nor '.join(weights.ADAPTERS)}"
        raise UserError(f"{folder}: {what}{weights.places_below(folder)}")
    tensors = weights.open_weights(path)
    full = sum(tensor.nbytes > 0 for tensor in tensors.values())
    if not full or full < len(tensors):  # of a ZeRO-3 run that gathered nothing every shape is [0]
        what = f"{full} of its {len(tensors)} tensors hold numbers"
        raise UserError(f"{path}: {what}; the run that saved it saved nothing, train again")
    return tensors


def indices_of(config, module):
    """The numbers of the rows of `module` that an adapter's config trains, a list for all embeddings or {module: list}."""
    chosen = config.get("trainable_token_indices") or []
    if isinstance(chosen, dict):
        return next((rows for name, rows in chosen.items() if f".{module}".endswith(f".{name}")), [])
    return chosen


def output_layer(base, config):
    """(embeddings, output layer, whether they are tied): names of weights; a base need not hold what is so tied.

    transformers ties where config.json says nothing, and does not where the files hold two that differ.
    """
    embedding, head = (next(filter(words.search, base), None) for words in (EMBEDDINGS, OUTPUT))
    tied = embedding is not None and config.get("tie_word_embeddings") in (True, None)
    blocks = row_blocks(base[head].shape, "float32") if tied and head else ()
    pairs = ([read_tensor(base[name], *rows, torch.float32) for name in (head, embedding)] for rows in blocks)
    return embedding, head or "lm_head.weight", tied and all(torch.equal(*pair) for pair in pairs)


def match_adapter(base, adapter, config, head):
    """Which tensors of an adapter belong to which weight of the base, whose output layer is named `head`.

    Returns ({weight: {"A": tensor, "B": tensor, "magnitude": tensor of DoRA}}, {weight: tensor of some rows of it},
    names of embeddings among the former, {weight: tensor that replaces it whole}, problems as words).
    """
    halves, rows, embeddings, replaced, problems = {}, {}, set(), {}, []
    for key, tensor in adapter.items():
        if ".original_module." in key:  # the weight that another one replaces; peft saves it where rows were added
            continue
        name = key.removeprefix("base_model.model.")
        if found := re.fullmatch(
            r"(.+)\.(?:lora_(magnitude)_vector|token_adapter\.(trainable)_tokens_delta)(\.weight)?", name
        ):
            weight = f"{found[1]}.weight"
            if weight not in base:
                problems.append(f"{key} has no counterpart in the base")
            elif found[2]:
                halves.setdefault(weight, {})["magnitude"] = tensor
            else:
                rows[weight] = tensor
            continue
        lora = re.fullmatch(r"(.+)\.lora_(?:(embedding_[AB])|([AB])\.weight)", name)
        weight = f"{lora[1]}.weight" if lora else name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if weight not in base or len(base[weight].shape) != (2 if lora else len(tensor.shape)):
            problems.append(f"{key} has no counterpart in the base")
        elif lora:
            halves.setdefault(weight, {})[(lora[2] or lora[3])[-1]] = tensor
            embeddings |= {weight} if lora[2] else set()
        elif ".modules_to_save." not in key or weight not in replaced:  # then it is saved twice
            replaced[weight] = tensor
    if config["target_modules"] != "all-linear":
        modules = {name.removesuffix(".weight"): name for name in base if name.endswith(".weight")}
        targets = {name for module, name in modules.items() if is_target(config, module)}
        if config.get("ensure_weight_tying") and targets & embeddings:  # then peft adapts both and names one
            targets |= {head} & {*halves}
        problems += [f"{name} is a target by its config and not in it" for name in targets - {*halves, *replaced}]
        problems += [f"{name} is in it and by its config no target" for name in {*halves} - targets]
    problems += [f"{name} has one of lora_A and lora_B only" for name, pair in halves.items() if not {*"AB"} <= {*pair}]
    wanted = bool(config.get("use_dora"))
    without = [name for name, pair in halves.items() if ("magnitude" in pair) != wanted]
    problems += [
        f"{name} has {'no' * wanted or 'a'} magnitude, by its config {'it is' if wanted else 'no'} DoRA"
        for name in without
    ]
    odd = [tensor for tensor in (*adapter.values(), *map(base.get, halves)) if not is_float(tensor.dtype)]
    problems += [f"{tensor.name} is {tensor.dtype}, quantised; give the weights before that" for tensor in odd]
    return halves, rows, embeddings, replaced, sorted(problems)


def lora_parts(base, adapter, base_config, folder, dtype=None):
    """Plan the merge of a LoRA adapter: (Parts of the result, changes to the base's config).

    What peft changes in tied embeddings or the output layer is not tied, so the result has both; with
    ensure_weight_tying, or where the adapter only holds them, it has one. Raises UserError for what does not fit.
    """
    config = utils.config_of(folder, "adapter_config.json")
    check_adapter_config(config, folder / "adapter_config.json")
    embedding, head, tied = output_layer(base, base_config)
    base = base | ({head: base[embedding]} if tied else {})
    halves, some_rows, embeddings, replaced, problems = match_adapter(base, adapter, config, head)
    sources, loras, vocabulary = base | replaced, {}, sorted({embedding, head} & {*base})
    saved = {name for name in vocabulary if is_named(config.get("modules_to_save"), name.removesuffix(".weight"))}
    if tied and head not in replaced and embedding not in saved:
        sources[head] = sources[embedding]
    for name, pair in halves.items():
        rank, scaling = lora_scaling(config, name.removesuffix(".weight"))
        (rows, columns), shapes = sources[name].shape, [pair[half].shape for half in "AB" if half in pair]
        wanted = [(rank, rows), (columns, rank)] if name in embeddings else [(rank, columns), (rows, rank)]
        wanted += [(rows,)] if "magnitude" in pair else []
        shapes += [pair["magnitude"].shape] if "magnitude" in pair else []
        if {*"AB"} <= {*pair} and shapes != wanted:
            what = " and ".join(str(list(shape)) for shape in shapes)
            problems.append(f"{name} is [{rows}, {columns}], its adapter {what}, of rank {rank} by its config")
        loras[name] = Lora(pair.get("A"), pair.get("B"), scaling, name in embeddings, pair.get("magnitude"))
    for name, tensor in some_rows.items():
        indices = indices_of(config, name.removesuffix(".weight"))
        if tensor.shape != (len(indices), sources[name].shape[1]) or max(indices, default=0) >= sources[name].shape[0]:
            problems.append(f"{name} gets rows {list(tensor.shape)}, by its config {len(indices)} of them")
        loras[name] = Rows(tensor, indices)
    for name, tensor in replaced.items():
        if tensor.shape != base[name].shape and (name not in vocabulary or tensor.shape[1:] != base[name].shape[1:]):
            problems.append(f"{name} is {list(base[name].shape)} in the base and {list(tensor.shape)} in the adapter")
    if len({sources[name].shape[0] for name in vocabulary}) > 1:
        problems.append(f"not all of {', '.join(vocabulary)} get the same number of rows")
    refuse(problems, f"{folder}: adapter and base do not fit together")
    if not replaced and not some_rows and not any(read_tensor(lora.b).any() for lora in loras.values()):
        say(f"warning: every lora_B of {folder} is zero, so it changes nothing; was it saved before it was trained?")
    untied = tied and not config.get("ensure_weight_tying") and bool(saved | halves.keys() & {*vocabulary})
    if tied and not untied:
        del sources[head]
    ranks = sorted({lora.a.shape[0] for lora in loras.values() if isinstance(lora, Lora)})
    found = [word for word, key in (("rslora", "use_rslora"), ("DoRA", "use_dora")) if config.get(key)]
    words = f" ({', '.join(found)})" if found else ""
    changed, new = sources.keys() & loras, sources.keys() & replaced
    say(
        f"delta: {folder} is a LoRA adapter, rank {', '.join(map(str, ranks))}{words}: "
        f"{len(changed)} weights are changed, {len(new)} replaced, {len(sources) - len(changed | new)} kept"
    )
    say("arithmetic: base + scaling * B A in float32, rounded once, as peft's merge_and_unload(safe_merge=False)")
    if untied:
        say(f"tied embeddings: the adapter changes {embedding} and {head} apart, so the result has both, untied")
    kinds = {name: dtype or base[name].dtype for name in sources}
    parts = [Part(name, kinds[name], source.shape, source, loras.get(name)) for name, source in sources.items()]
    return parts, {"tie_word_embeddings": False} if head in sources else {}


# --- Writing: apply and make -----------------------------------------------------------------------------------------


def write_weights(folder, plan, parts, rows_of, what, sources):
    """Write every Part into `folder`, as planned; `rows_of(part)` yields its rows in order, as (start, stop, rows).

    `sources` are all tensors of the files that are read: these must be whole, and the same when it ends.
    """
    with weights.checksums(sources), weights.WeightWriter(folder, plan) as writer:
        with weights.meter(what, weights.plan_size(plan)) as meter:
            for part, start, stop, rows in weights.ahead((part, *block) for part in parts for block in rows_of(part)):
                check_rows(rows, part, start, stop)
                writer.append(part.name, array(rows))
                meter.update(rows.nbytes)


def copy_files(folder, config_from, tokenizer_from, parts, changes=None):
    """Copy config, with `changes`, and tokenizer into `folder`, each from the first of two folders that has one.

    The config's dtype and vocabulary become those of the tensors. Raises UserError where neither has a config.
    """
    source = next((path for path in config_from if (path / "config.json").is_file()), None)
    if source is None:
        raise UserError(f"{config_from[0]}: has no config.json, nor has {config_from[1]}; copy it there")
    config, dtypes = utils.config_of(source), {part.dtype for part in parts if is_float(part.dtype)}
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    changes = (changes or {}) | ({dtype_key: next(iter(dtypes))} if len(dtypes) == 1 else {})
    changes |= {"vocab_size": part.shape[0] for part in parts if EMBEDDINGS.search(part.name)}
    changes |= {"pad_token_id": None} if config.get("pad_token_id") == -1 else {}  # no row has it: it would not load
    for key, value in changes.items():
        if key in config and config[key] != value:
            say(f"config: {key} {config[key]} -> {value}")
    utils.write_json(config | changes, folder / "config.json")
    files = choose_tokenizer(tokenizer_from)
    for file in [*files, source / "generation_config.json"]:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    places = " and ".join(dict.fromkeys(str(file.parent) for file in files))
    say(f"config from {source}, tokenizer {f'from {places}' if files else 'missing in both; copy one there'}")


def choose_tokenizer(folders):
    """The tokenizer's files of the first of two folders that has one, and SentencePiece's or tiktoken's file.

    That one is the other folder's where the first lacks it, as what transformers saves does, and ids are the same.
    """
    originals = ("tokenizer.model", "tokenizer.tiktoken")
    kinds = {*originals, "tokenizer.json", "vocab.json"}
    files = next((found for found in map(tokenizer_files, folders) if kinds & {file.name for file in found}), [])
    vocabularies = [(utils.config_of(path, "tokenizer.json").get("model") or {}).get("vocab") for path in folders]
    if vocabularies[0] == vocabularies[1] is not None and not any(file.name in originals for file in files):
        files += [path / name for path in folders for name in originals if (path / name).is_file()]
    return files


def tokenizer_files(folder):
    """The tokenizer's files in a model folder, sorted."""
    return sorted(path for pattern in TOKENIZER for path in Path(folder).glob(pattern) if path.is_file())


def write_run(folder, **facts):
    """Write run.json into a folder that is whole otherwise; facts that are None are left out."""
    about = {"made_by": "cria", "script": "apply_delta.py", "status": "finished"}
    about |= {key: value for key, value in facts.items() if value is not None}
    about |= {"versions": utils.versions("torch"), "git_commit": utils.git_commit()}
    files = sorted(path.name for path in folder.iterdir() if path.name != utils.LOCK)
    utils.write_json(about | {"files": files}, folder / "run.json")


def apply_delta(
    base_model_path, target_model_path, delta_path,
    dtype=None, new_rows=None, any_base=False, overwrite=False, check_sum=False,
):  # fmt: skip
    """Write base + delta, or base with a LoRA adapter merged in, to `target_model_path`; see the head of this file.

    Paths are folders or names on the hub; the other arguments are those of the command line. Raises UserError where
    the inputs do not fit together, the target exists, or the result is not the one that the delta's record names.
    """
    inputs, kind = open_inputs(target_model_path, "--target", base=base_model_path, delta=delta_path)
    (base_path, source), lora = inputs, kind == "a LoRA adapter"
    run, configs = run_of(source), [*map(utils.config_of, inputs)]
    record, rule, found, total, changes = run.get("delta", {}), None, Fingerprint(), [0.0], {}
    if lora and (new_rows or any_base):
        raise UserError(f"{source}: a LoRA adapter; leave --new_rows and --any_base out")
    base, delta = open_model(base_path), open_adapter(source) if lora else open_model(source)
    if lora:
        parts, changes = lora_parts(base, delta, configs[0], source, dtype)
    else:
        parts, rule = delta_parts(base, delta, configs, source, record, dtype, new_rows, any_base)
    is_recorded = bool(record) and not any_base and dtype is None and rule == record["new_rows"]
    plan = {part.name: (part.dtype, part.shape) for part in parts}
    size, files = weights.plan_size(plan), weights.weight_file_names(plan)
    weights.check_output(target_model_path, inputs, overwrite, files, "--target")
    if record and not any_base:
        check_base(parts, record, base_path)

    def rows_of(part):
        for start, stop, rows in (merged_rows if lora else sum_rows)(part):
            if is_recorded:
                found.add(part.name, rows)
            if check_sum:
                total[0] += rows.double().sum().item()
            yield start, stop, rows

    with weights.new_folder(target_model_path, size, inputs, overwrite, files, "--target") as folder:
        write_weights(folder, plan, parts, rows_of, "applying", [*base.values(), *delta.values()])
        if is_recorded and found.hexdigest() != record["sha256"]:
            raise UserError(f"{source}: the result is not the one that its run.json names; copy the delta again")
        if check_sum:
            check_alpaca_sum(total[0], configs[0])
        copy_files(folder, inputs if lora else inputs[::-1], inputs[::-1], parts, changes)
        style = run.get("prompt_style") if run or lora else STYLES.get((rule, *{new.dtype for new in delta.values()}))
        given = {"base": base_model_path, "delta": delta_path, "dtype": dtype, "new_rows": new_rows}
        write_run(folder, arguments=given | {"any_base": any_base}, new_rows=rule, prompt_style=style)
    if is_recorded:
        say("result: its sha256 is the one that the delta's run.json names")
    say(f"prompt style: {style or 'not known; give chat.py --prompt_style'}")
    print(f"{target_model_path}: {len(parts)} tensors, {size / 1e9:.2f} GB", flush=True)


apply_delta_low_cpu_mem = apply_delta  # FastChat's other name


def make_delta(base_model_path, target_model_path, delta_path, exact=False, dtype=None, new_rows=None, overwrite=False):
    """Write target - base to `delta_path`, in FastChat's format or an exact one, with a record. Raises UserError."""
    (base_path, target_path), _ = open_inputs(delta_path, "--delta", base=base_model_path, target=target_model_path)
    if exact and (dtype or new_rows):
        raise UserError("--exact has the target's dtype, and new rows do not matter to it; leave both options out")
    base, target = open_model(base_path), open_model(target_path)
    grown = compare(base, target, utils.config_of(base_path), utils.config_of(target_path), ("base", "target"))
    dtype = dtype or "float16"
    rule, words = new_rows_rule(grown, dtype, "zero" if exact else new_rows)
    kinds = {name: SIGNED[DTYPES[tensor.dtype][1]] if exact else dtype for name, tensor in target.items()}
    fills = {name: fill_row(rule, base[name], tensor.shape) for name, tensor in target.items()}
    parts = [Part(name, kinds[name], new.shape, base[name], new, fills[name]) for name, new in target.items()]
    say(f"delta: {'exact, bit patterns' if exact else dtype}; new rows: {words}")
    of_base, of_result, differing = Fingerprint(), Fingerprint(), [0]

    def rows_of(part):
        stored = getattr(torch, part.dtype)
        working = getattr(torch, part.change.dtype if exact else working_dtype(part.dtype, part.dtype))
        for start, stop in row_blocks(part.shape, part.change.dtype):
            target = read_tensor(part.change, start, stop)
            base = read_tensor(part.base, start, stop, working, part.fill)
            if exact:
                check_rows(target, part, start, stop)
                rows = bit_difference(target, base)
                result = bit_sum(base, rows, working)
            else:
                rows = (target.to(working) - base).to(stored)
                result = (base + rows.to(working)).to(stored)
            of_base.add(part.name, base[: max(len(part.base) - start, 0)])
            of_result.add(part.name, result)
            differing[0] += int((result != target).sum())
            yield start, stop, rows

    plan = {part.name: (part.dtype, part.shape) for part in parts}
    size, files = weights.plan_size(plan), weights.weight_file_names(plan)
    with weights.new_folder(delta_path, size, (base_path, target_path), overwrite, files, "--delta") as folder:
        write_weights(folder, plan, parts, rows_of, "making", [*base.values(), *target.values()])
        copy_files(folder, (target_path, base_path), (target_path, base_path), parts)
        record = {
            "format": "exact" if exact else "weights",
            "new_rows": rule,
            "base": {"path": str(base_model_path), "sha256": of_base.hexdigest()},
            "sha256": of_result.hexdigest(),  # of what applying this delta gives
            "tensors": of_result.shapes(),
            "tokenizer": {path.name: utils.sha256_of(path) for path in tokenizer_files(folder)},
        }
        write_run(folder, prompt_style=run_of(target_path).get("prompt_style"), delta=record)
    count = sum(math.prod(part.shape) for part in parts)
    hint = "" if exact else "; --exact gives every bit back"
    say(f"applying it gives {differing[0]:,} of {count:,} numbers rounded otherwise ({differing[0] / count:.2%}){hint}")
    print(f"{delta_path}: {len(parts)} tensors, {size / 1e9:.2f} GB", flush=True)


def main():
    args = parse_args()
    if args.low_cpu_mem:
        say("--low-cpu-mem: it never needs more; ignored")
    if args.exact and not args.make:
        raise UserError("--exact goes with --make; to apply a delta, its kind is read from the folder")
    options = {key: getattr(args, key) for key in ("dtype", "new_rows", "overwrite")}
    if args.make:
        make_delta(args.base, args.target, args.delta, exact=args.exact, **options)
    else:
        options |= {"any_base": args.any_base, "check_sum": args.check_integrity_naively}
        apply_delta(args.base, args.target, args.delta, **options)


if __name__ == "__main__":
    utils.run_main(main)
