"""Applying a delta: wall time, CPU time, peak memory and bytes written, beside `cp` and FastChat's two modes.

    python benchmarks/deltas.py --work_dir out/deltas --size 1b
    python benchmarks/deltas.py --work_dir out/deltas --size 1b --tokenizer tokenizer.model --peer_python ENV/bin/python

The peer is the released package fschat, in an environment of its own. Base and delta are random float16 of LLaMA's
shape, in sharded .bin files, the only kind that FastChat's --low-cpu-mem reads, and as safetensors. All arms run in
turn, each into a new folder; `cp` and ours end with their files on the disk, the peer does not wait for that. Every
tensor of ours is compared with the peer's, bit by bit. Exits with 1 where a bound is missed.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import shutil
import statistics
import sys

import common

from convert import SIZES, VOCAB_SIZE, measure, measure_in_folder

import weights

BOUNDS = {"peak_rss_gb": 0.5, "peak_anon_gb": 0.3, "low_cpu_mem_wall_of_ours": 10.0}  # the last from LARGE bytes on
LARGE = 2e9
SHARDS = 2


def plan_of(size):
    """The tensors of a Hugging Face LLaMA: {name: (dtype, shape)}."""
    hidden, layers, _, ffn = SIZES[size]
    plan = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        plan |= {f"{at}self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        plan |= {f"{at}mlp.{word}_proj.weight": (ffn, hidden) for word in ("gate", "up")}
        plan |= {f"{at}mlp.down_proj.weight": (hidden, ffn)}
        plan |= {f"{at}{word}_layernorm.weight": (hidden,) for word in ("input", "post_attention")}
    plan |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB_SIZE, hidden)}
    return {name: ("float16", shape) for name, shape in plan.items()}


def make_folder(folder, size, scale, norm, kind, tokenizer):
    """Write random float16 numbers of one size as `kind`, "safetensors" or "bin", with config and tokenizer.

    `scale` is their standard deviation, `norm` the mean of those of norms: 1 in a model, 0 in a delta.
    """
    import torch

    hidden, layers, heads, ffn = SIZES[size]
    plan, generator = plan_of(size), torch.Generator().manual_seed(norm)
    noise = (torch.randn(max(ffn, VOCAB_SIZE) * hidden + len(plan), generator=generator) * scale).half()
    folder.mkdir(parents=True)

    def tensor(i, shape):
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        numbers = noise[i : i + count].reshape(shape)  # each begins elsewhere
        return numbers + norm if len(shape) == 1 else numbers

    if kind == "safetensors":
        with weights.WeightWriter(folder, plan) as writer:
            for i, (name, (_, shape)) in enumerate(plan.items()):
                writer.append(name, tensor(i, shape).contiguous().view(torch.uint8).numpy())
    else:
        names, places = list(plan), {}
        for k in range(SHARDS):
            file = f"pytorch_model-{k + 1:05}-of-{SHARDS:05}.bin"
            part = {
                name: tensor(i, plan[name][1]).clone() for i, name in enumerate(names) if i * SHARDS // len(names) == k
            }
            torch.save(part, folder / file)
            places |= dict.fromkeys(part, file)
        common.utils.jdump({"metadata": {}, "weight_map": places}, folder / "pytorch_model.bin.index.json")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    common.utils.jdump(config, folder / "config.json")
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.model")
        words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        common.utils.jdump({"tokenizer_class": "LlamaTokenizer", **words}, folder / "tokenizer_config.json")
    for path in folder.iterdir():  # so that no arm pays for writing them
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def equal_tensors(one, other):
    """(tensors that are bit-equal in two folders, tensors in all)."""
    first, second = (weights.open_weights(folder) for folder in (one, other))
    equal = 0
    for name, tensor in first.items():
        there = second.get(name)
        if there is not None and (there.dtype, there.shape) == (tensor.dtype, tensor.shape):
            blocks = weights.row_blocks(tensor.shape, tensor.dtype)
            equal += all((tensor.read(*rows) == there.read(*rows)).all() for rows in blocks)
    return equal, len(first | second)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", required=True, help="a folder on the disk to be measured; must not exist")
    parser.add_argument("--size", choices=SIZES, default="1b", help="default: 1b")
    parser.add_argument("--tokenizer", help="a tokenizer.model; needed by the peer")
    parser.add_argument("--peer_python", help="python of an environment with fschat")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each arm (default: 3)")
    common.add_output(parser, "deltas")
    measure_in_folder(parser.parse_args(), compare, "equal")


def compare(args, work):
    """Measure all arms and judge them; see `convert.measure_in_folder`."""
    spawn = multiprocessing.get_context("spawn")  # its torch must not count as memory of the arms; see `measure`
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        for kind in ("safetensors", "bin"):
            for name, scale, norm in (("base", 0.02, 1), ("delta", 0.0005, 0)):
                pool.submit(make_folder, work / kind / name, args.size, scale, norm, kind, args.tokenizer).result()
    out, size = work / "out", weights.plan_size(plan_of(args.size))

    def command(python, script, kind, *words):
        folders = ["--base", work / kind / "base", "--delta", work / kind / "delta", "--target", out]
        return [python, *script, *map(str, folders), *words]

    ours, peer = [str(common.ROOT / "apply_delta.py")], ["-m", "fastchat.model.apply_delta"]
    copy = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(work / "safetensors" / "base"), str(out)]
    arms = {
        "cp + sync": copy,
        "ours": command(sys.executable, ours, "safetensors"),
        "ours, .bin": command(sys.executable, ours, "bin"),
    }
    if args.peer_python:
        arms["FastChat"] = command(args.peer_python, peer, "bin")
        arms["FastChat --low-cpu-mem"] = command(args.peer_python, peer, "bin", "--low-cpu-mem")
    kept, equal = work / "kept", {}

    def run(arm):
        shutil.rmtree(out, ignore_errors=True)
        figures = measure(arms[arm], os.environ | {"TMPDIR": str(work)})
        if arm == "ours" and not kept.exists():
            out.rename(kept)
        elif arm not in ("cp + sync", "ours") and arm not in equal:
            equal[arm] = " of ".join(map(str, equal_tensors(kept, out)))
        shutil.rmtree(out, ignore_errors=True)
        return figures

    figures = common.alternate(arms, args.repeat, run)
    walls = {arm: [one["wall_s"] for one in runs] for arm, runs in figures.items()}
    ratios = {"wall_of_cp": common.ratio(walls["ours"], walls["cp + sync"])}
    if args.peer_python:
        ratios["wall_of_FastChat"] = common.ratio(walls["ours, .bin"], walls["FastChat"])
        ratios["low_cpu_mem_wall_of_ours"] = common.ratio(walls["FastChat --low-cpu-mem"], walls["ours, .bin"])
    medians = {
        arm: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for arm, runs in figures.items()
    }
    tensors = len(plan_of(args.size))
    limits, mine = ("peak_rss_gb", "peak_anon_gb"), ("ours", "ours, .bin")
    passed = all(medians[arm][key] <= BOUNDS[key] for arm in mine for key in limits)
    passed = passed and set(equal.values()) == {f"{tensors} of {tensors}"}
    if size >= LARGE and args.peer_python:
        passed = passed and ratios["low_cpu_mem_wall_of_ours"]["median"] >= BOUNDS["low_cpu_mem_wall_of_ours"]
    return {
        "what": "base + delta in float16: wall and CPU seconds, peak memory and bytes written of one process",
        "settings": {"size": args.size, "bytes": size, "repeat": args.repeat},
        "figures": figures,
        "medians": medians,
        "ratios": ratios,
        "bounds": BOUNDS,
        "equal": equal,
        "passed": passed,
    }


if __name__ == "__main__":
    common.utils.run_main(main)
