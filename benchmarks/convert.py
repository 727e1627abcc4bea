"""Converting raw weights: wall time, CPU time, peak memory and bytes written, beside `cp` and a released converter.

    python benchmarks/convert.py --work_dir out/weights --size 1b
    python benchmarks/convert.py --work_dir out/weights --size 7b --tokenizer tokenizer.model \\
        --data_path alpaca_data.json --peer_python ENV/bin/python --peer_script convert_llama_weights_to_hf.py

The peer is Hugging Face's converter, last released in the wheel of transformers 4.47.1, with an environment of
transformers 4.57 to run it. Raw weights are random float16 of LLaMA's shape. All arms run in turn, each into a new
folder; `cp` and ours end with their files on the disk, the peer does not wait for that. With --tokenizer and
--data_path the ids of the converted tokenizer are compared with SentencePiece's in both environments. Exits with 1
where a bound is missed.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import common

import weights

SIZES = {  # dim, layers, heads, rows of w1; parameters with a vocabulary of 32,000
    "tiny": (256, 4, 8, 688),
    "1b": (2048, 24, 16, 5632),  # 1.36 billion, 2.73 GB
    "3b": (4096, 16, 32, 11008),  # 3.50 billion, 7.00 GB
    "7b": (4096, 32, 32, 11008),  # 6.74 billion, 13.48 GB
}
VOCAB_SIZE = 32000
BOUNDS = {
    "peak_rss_gb": 0.5,
    "peak_anon_gb": 0.3,
    "wall_of_cp": 3.0,
    "peer_wall_of_ours": 4.0,
}  # the last two from LARGE on
LARGE = 7e9
READ_IDS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(tokenizer(json.load(open(sys.argv[2], encoding="utf-8")), add_special_tokens=False).input_ids))
"""


def make_raw(folder, size, num_shards):
    """Write raw shards of random float16 numbers, streamed; returns their bytes."""
    import numpy as np

    import convert_llama_weights as convert

    dim, layers, heads, ffn = SIZES[size]
    sizes = (dim, layers, heads, heads, ffn, VOCAB_SIZE)
    llama = convert.Llama(num_shards, "float16", *sizes, 1e-6, 1e4, None, convert.ROWS, 1, False)
    plan = {
        raw: ("float16", llama.shard_shape(raw, axis, shape, num_shards))
        for raw, (_, axis, shape) in llama.tensors().items()
    }
    folder.mkdir(parents=True)
    noise = (np.random.default_rng(0).standard_normal(2**22) * 0.02).astype(np.float16)
    table = (1.0 / 1e4 ** (np.arange(0, dim // heads, 2) / (dim // heads))).astype(np.float16)
    plan["rope.freqs"] = ("float16", table.shape)
    for i in range(num_shards):
        path, sums = folder / f"consolidated.{i:02}.pth", dict.fromkeys(plan, 0)
        shard = convert.make_raw_shard(path, plan)
        places = {name: (path, new.offset, new.offset + new.nbytes) for name, new in shard.items()}
        with weights.BlockWriter(places) as writer:
            for name, (dtype, shape) in plan.items():
                source = table if name == "rope.freqs" else noise if len(shape) == 2 else np.ones(dim, np.float16)
                left = math.prod(shape)
                while left:
                    block = source[:left]
                    writer.append(name, block)
                    sums[name] = zlib.crc32(block, sums[name])
                    left -= len(block)
        convert.add_checksums(path, shard, sums)
    (folder / "params.json").write_text(json.dumps(convert.raw_params(llama)))
    return sum(path.stat().st_size for path in folder.glob("*.pth"))


def measure(command, environment=None):
    """Run a command to its end: {wall_s, cpu_s, peak_rss_gb, peak_anon_gb, written_gb}; RuntimeError where it fails.

    The system lets a process start with the peak memory of its parent, so this one must stay small. peak_anon_gb leaves
    out pages of files, which the system can drop at any time; it is looked at 20 times a second.
    """
    start, anonymous, ended = time.perf_counter(), [0], threading.Event()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=subprocess.PIPE, env=environment)

        def watch():
            while not ended.wait(0.05):
                status = Path(f"/proc/{process.pid}/status").read_text()
                anonymous.extend(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        err = process.stderr.read()  # to its end, where the process closes it
        ended.set()
        watcher.join()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {err.decode(errors='replace')[-1500:]}")
    return {
        "wall_s": round(time.perf_counter() - start, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_rss_gb": round(used.ru_maxrss * 1024 / 1e9, 3),
        "peak_anon_gb": round(max(anonymous) * 1024 / 1e9, 3),
        "written_gb": round(used.ru_oublock * 512 / 1e9, 2),
    }


def differing_ids(folder, texts, pythons, work_dir):
    """{transformers' version: texts whose ids through AutoTokenizer differ from SentencePiece's}."""
    wanted = common.utils.sentencepiece_ids(folder / "tokenizer.model", texts)
    common.utils.jdump(texts, work_dir / "texts.json")
    found = {}
    for python in pythons:
        version = [python, "-c", "import transformers; print(transformers.__version__)"]
        version = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
        command = [python, "-c", READ_IDS, str(folder), str(work_dir / "texts.json")]
        ids = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found[version] = sum(a != b for a, b in zip(ids, wanted, strict=True))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", required=True, help="a folder on the disk to be measured; must not exist")
    parser.add_argument("--size", choices=SIZES, default="1b", help="default: 1b")
    parser.add_argument("--num_shards", type=int, default=1, help="shards of the raw weights (default: 1)")
    parser.add_argument("--tokenizer", help="a tokenizer.model of 32,000 pieces; needed by the peer")
    parser.add_argument("--data_path", help="Alpaca's records, for the comparison of ids")
    parser.add_argument("--peer_python", help="python of an environment with transformers 4.57")
    parser.add_argument("--peer_script", help="convert_llama_weights_to_hf.py of transformers 4.47.1")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each arm (default: 3)")
    common.add_output(parser, "convert")
    measure_in_folder(parser.parse_args(), compare, "ids_that_differ")


def measure_in_folder(args, compare, key):
    """Run `compare(args, work_dir)` in a new folder, write its result, print medians, ratios and `key`, and exit."""
    work = Path(args.work_dir)
    if work.exists():
        raise common.utils.UserError(f"--work_dir {work}: exists already; choose another folder")
    load = [round(value, 2) for value in os.getloadavg()]
    try:
        result = compare(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = common.surroundings() | result  # imports torch
    result["machine"]["load_average_at_start"] = load
    common.write_result(result, args.output)
    for arm, runs in result["figures"].items():
        words = [f"{name} {common.in_words(common.spread([one[name] for one in runs]))}" for name in runs[0]]
        print(f"{arm}: {', '.join(words)}")
    for name, found in result["ratios"].items():
        print(f"{name}: {common.in_words(found)}")
    print(f"{key}: {result[key]}")
    sys.exit(0 if result["passed"] else 1)


def compare(args, work):
    """Measure all arms and judge them; see `measure_in_folder`."""
    raw, out = work / "raw", work / "out"
    spawn = multiprocessing.get_context("spawn")  # its torch must not count as memory of the arms; see `measure`
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        size = pool.submit(make_raw, raw, args.size, args.num_shards).result()
    for path in raw.iterdir():  # so that no arm pays for writing them
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if args.tokenizer:
        shutil.copy(args.tokenizer, raw / "tokenizer.model")
    script = str(common.ROOT / "convert_llama_weights.py")
    ours = [sys.executable, script, "--input_dir", str(raw), "--output_dir", str(out)]
    arms = {
        "cp + sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(raw), str(out)],
        "ours": [*ours, "--tokenizer", str(raw / "tokenizer.model") if args.tokenizer else "none"],
    }
    if args.peer_script:
        arms["peer"] = [args.peer_python, args.peer_script, "--input_dir", str(raw), "--output_dir", str(out)]
        arms["peer"] += ["--num_shards", str(args.num_shards), "--llama_version", "1"]
    ids = {}

    def run(arm):
        shutil.rmtree(out, ignore_errors=True)
        environment = os.environ | ({"TMPDIR": str(work)} if arm == "peer" else {})
        figures = measure(arms[arm], environment)
        if arm == "ours" and args.tokenizer and args.data_path and not ids:
            rows = common.utils.read_records([args.data_path])[0][:2000]
            texts = common.utils.NASTY_STRINGS + [row[key] for row in rows for key in ("instruction", "output")]
            pythons = [python for python in (sys.executable, args.peer_python) if python]
            ids.update(differing_ids(out, texts, pythons, work))
        shutil.rmtree(out, ignore_errors=True)
        return figures

    figures = common.alternate(arms, args.repeat, run)
    walls = {arm: [one["wall_s"] for one in runs] for arm, runs in figures.items()}
    ratios = {"wall_of_cp": common.ratio(walls["ours"], walls["cp + sync"])}
    if "peer" in arms:
        ratios["peer_wall_of_ours"] = common.ratio(walls["peer"], walls["ours"])
    medians = {
        arm: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for arm, runs in figures.items()
    }
    passed = all(medians["ours"][key] <= BOUNDS[key] for key in ("peak_rss_gb", "peak_anon_gb"))
    passed = passed and not any(ids.values())
    if size >= LARGE:
        passed = passed and ratios["wall_of_cp"]["median"] <= BOUNDS["wall_of_cp"]
        if "peer" in arms:
            passed = passed and ratios["peer_wall_of_ours"]["median"] >= BOUNDS["peer_wall_of_ours"]
    return {
        "what": "raw weights to safetensors: wall and CPU seconds, peak memory and bytes written of one process",
        "settings": {"size": args.size, "num_shards": args.num_shards, "raw_bytes": size, "repeat": args.repeat},
        "figures": figures,
        "medians": medians,
        "ratios": ratios,
        "bounds": BOUNDS,
        "ids_that_differ": ids,
        "least_rss_that_can_be_seen_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "passed": passed,
    }


if __name__ == "__main__":
    common.utils.run_main(main)
