"""CPU time of the duplicate filter: the original's, a plain rouge_score loop, and generate_instruction.py's.

    python benchmarks/generation.py --data_path alpaca_data.json

The original compares every candidate with the whole pool through rouge_score in a fresh pool of 16 processes; the
plain loop does the same in one process; ours takes the candidates of an answer together. At pools of several sizes all
three judge the same real instructions, in turn, and their means, nearest and decisions must be equal; seconds are CPU
seconds of the process and its children. From them the cost of the whole file is projected piecewise linearly, for a
pool that grows by every candidate. Ours then really runs over the whole file, in a process of its own. The exit code
is 1 where a ratio or a bound is missed.
"""

import argparse
import functools
import json
import multiprocessing
import re
import resource
import subprocess
import sys
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

BOUNDS = {"original": 750, "plain": 400}  # times ours, in CPU
MAX_CPU_S, MAX_MIB = 60, 300  # of ours over the whole file
SIZES = (175, 1000, 5000, 10_000, 51_900)  # of the pool
BATCH = 20  # candidates that ours takes together: an answer


def cpu_seconds():
    """CPU seconds of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def original(tokens, pool, processes=16):
    """The scores of one candidate as the original computes them: a new process pool for each."""
    from rouge_score import rouge_scorer

    with multiprocessing.Pool(processes) as workers:
        scores = workers.map(functools.partial(rouge_scorer._score_lcs, tokens), pool)
    return [score.fmeasure for score in scores]


def plain(tokens, pool):
    """The same in one process."""
    from rouge_score import rouge_scorer

    return [rouge_scorer._score_lcs(tokens, other).fmeasure for other in pool]


def measure(texts, size, candidates):
    """CPU seconds a candidate of each arm at a pool of the first `size` texts, and whether all agree."""
    import numpy as np
    from rouge_score.tokenize import tokenize

    from generate_instruction import RougeFilter

    spent, scores = {}, {}
    pool, batch = texts[:size], texts[-BATCH:]
    tokens = [tokenize(text, None) for text in pool]
    for name, arm in (("original", original), ("plain", plain)):
        start = cpu_seconds()
        scores[name] = [arm(tokenize(text, None), tokens) for text in batch[:candidates]]
        spent[name] = (cpu_seconds() - start) / candidates
    ours = RougeFilter(tokenize=lambda text: tokenize(text, None))
    for text in pool:
        ours.add(text)
    repeat = max(1, 2000 // size)  # a call takes a millisecond where the pool is small
    start = cpu_seconds()
    for _ in range(repeat):
        verdicts = ours.judge(batch)
        del ours.texts[size:], ours.coded[size:]
    spent["ours"] = (cpu_seconds() - start) / repeat / BATCH
    agree = scores["original"] == scores["plain"]
    first = next(zip(verdicts, scores["plain"], strict=False))
    if first[0]["kept"]:  # later ones are compared with those of their batch too
        agree &= first[0]["avg_similarity_score"] == float(np.mean(first[1]))
        agree &= max(first[0]["most_similar_instructions"].values()) == max(first[1]) <= 0.7
    else:
        agree &= first[0]["score"] == max(first[1]) > 0.7
    return spent, agree


def project(sizes, seconds, count):
    """Seconds over a pool that grows from nothing to `count`, with a cost that is linear between measured sizes."""
    import numpy as np

    pools = np.arange(count)
    return float(np.interp(pools, sizes, seconds).sum())


def replay(path):
    """Judge every instruction of a file in order, an answer's worth at a time; prints what was kept as JSON."""
    from rouge_score.tokenize import tokenize

    from generate_instruction import RougeFilter

    with open(path, encoding="utf-8") as file:
        texts = json.load(file, object_hook=lambda row: row["instruction"])  # the other fields are not the filter's
    ours = RougeFilter(tokenize=lambda text: tokenize(text, None))
    kept = 0
    for start in range(0, len(texts), BATCH):
        kept += sum(verdict["kept"] for verdict in ours.judge(texts[start : start + BATCH]))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's, where that is larger
    mib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    print(json.dumps({"rows": len(texts), "kept": kept, "cpu_seconds": cpu_seconds(), "max_rss_mib": mib}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="Alpaca's 52,002 records, as JSON")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each size (default: 3)")
    parser.add_argument("--candidates", type=int, default=3, help="of the two slow arms, at each size (default: 3)")
    parser.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    common.add_tiny(parser)
    common.add_output(parser, "generation")
    args = parser.parse_args()
    if args.replay:
        replay(args.data_path)
        return
    result = common.surroundings()
    texts = [row["instruction"] for row in common.utils.jload(args.data_path)]
    sizes = [size for size in SIZES if size + BATCH <= len(texts)] or [len(texts) - BATCH]
    runs, agree = {"original": [], "plain": [], "ours": []}, True
    for i in range(args.repeat):
        common.utils.say(f"  repetition {i + 1} of {args.repeat}")
        found = [measure(texts, size, args.candidates) for size in sizes]
        agree &= all(same for _, same in found)
        for arm in runs:
            runs[arm].append([spent[arm] for spent, _ in found])
    whole = {arm: [project(sizes, seconds, len(texts)) for seconds in runs[arm]] for arm in runs}
    ratios = {arm: common.ratio(whole[arm], whole["ours"]) for arm in BOUNDS}
    command = [sys.executable, __file__, "--data_path", args.data_path, "--replay"]
    replayed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    cpu, mib = replayed["cpu_seconds"], replayed["max_rss_mib"]
    is_fast = all(ratios[arm]["median"] >= bound for arm, bound in BOUNDS.items())
    is_small = cpu <= MAX_CPU_S and mib <= MAX_MIB
    passed = agree and replayed["kept"] == replayed["rows"] and (args.tiny or is_fast and is_small)
    result |= {
        "what": "CPU seconds of the duplicate filter over a whole file",
        "settings": {"rows": len(texts), "sizes": sizes, "candidates": args.candidates, "repeat": args.repeat},
        "versions": common.utils.versions("rapidfuzz", "rouge_score", "numpy"),
        "cpu_seconds_a_candidate": runs,
        "projected_cpu_seconds": whole,
        "ratios_to_ours": ratios,
        "bound": BOUNDS,
        "scores_agree": agree,
        "replay": {**replayed, "bounds": [MAX_CPU_S, MAX_MIB]},
        "passed": bool(passed),
    }
    common.write_result(result, args.output)
    for arm, found in whole.items():
        print(f"{arm}: {common.in_words(common.spread(found))} CPU s for {len(texts):,} rows, projected")
    for arm, bound in BOUNDS.items():
        print(f"{arm} / ours: {common.in_words(ratios[arm])}, at least {bound}")
    print(
        f"replayed: {replayed['kept']:,} of {replayed['rows']:,} kept, {cpu:.2f} CPU s (at most {MAX_CPU_S}), "
        f"{mib:.0f} MiB (at most {MAX_MIB}); scores agree: {agree}"
    )
    if args.tiny:
        print(common.NOT_JUDGED)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    common.utils.run_main(main)
