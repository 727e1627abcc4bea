"""See a model learn and talk to it, on a laptop, without network: what `make demo` runs.

    python examples/demo.py                                  # everything, in out/demo
    python examples/demo.py --tasks 3 --epochs 150 --preset tiny --output_dir out/short

The whole path: raw weights of a small random LLaMA are converted, the model learns tasks of seed_tasks.jsonl by heart,
chat.py asks for the answers, and a delta of it is made and applied. Every command is printed before it runs and can be
typed by hand. A demo that was stopped goes on where it was.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from utils import UserError

SHOWN = ("moving_day_order", "window_to_chinese", "last_tram_poem")  # names of tasks; where none is learnt, the first
PASS = 170 / 175  # the share of answers that must be right, and of those that must stop by themselves
COLUMNS = 80
PYTHON = os.path.relpath(sys.executable, ROOT) if sys.executable.startswith(str(ROOT)) else "python"
EPOCHS = 32
LEARNING_RATE = 1.5e-3  # with Adam's second beta at 0.95; 2.5e-3 is slower, 3e-3 with a beta of 0.999 learns nothing
MEANING = """
This is memorising: the model was asked what it had been taught, word for word,
and knows nothing else. It proves that prompts, masks, training, saving and
stopping fit together. A 7B model tuned on 52,000 records should do what this
one cannot: answer instructions that it has never seen, mostly right, in its own
words, and stop. Exact copies of its records would be a bad sign there.

Talk to it:  {python} chat.py --model_name_or_path {tuned}"""


def tell(text):
    print(utils.printable(text), flush=True)  # answers are a model's text


def heading(number, text):
    tell(f"\n--- {number}. {text} " + "-" * max(COLUMNS - len(text) - 8, 0))


def run(*words, quiet=False, stdout=None):
    """Run one of the scripts with this Python, and print the command. Raises UserError where it fails.

    `stdout` is a file to write its stdout to; of a `quiet` one only the last line of stderr is shown.
    """
    tell(f"$ {PYTHON} {shlex.join(map(str, words))}" + (f" > {stdout.name}" if stdout else ""))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if quiet else {"stdout": stdout}
    done = subprocess.run([sys.executable, *map(str, words)], check=False, encoding="utf-8", **streams)
    said = (done.stderr or "see above").strip()
    if done.returncode:
        raise UserError(f"{words[0]} ended with exit code {done.returncode}: {said}")
    if quiet:
        tell(said.splitlines()[-1])


def choose_tasks(count, folder):
    """Write the first `count` seed tasks, and all prompts and outputs as text for the tokenizer; returns both paths."""
    tasks, texts = folder / "tasks.jsonl", folder / "texts.txt"
    lines = utils.read_text(ROOT / "seed_tasks.jsonl").splitlines(keepends=True)[:count]
    folder.mkdir(parents=True, exist_ok=True)
    tasks.write_text("".join(lines), encoding="utf-8")
    records, _ = utils.read_records([(tasks.name, "".join(lines))])
    prompts = [utils.spans("alpaca", record["messages"][:1])[0][0] for record in records]
    lines = [f"{prompt}\n{record['output']}" for prompt, record in zip(prompts, records, strict=True)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    return tasks, texts


def make_base(folder, texts, preset):
    """A model of random weights that has read nothing, raw in two shards and converted; returns its folder."""
    raw, base = folder / "raw", folder / "base"
    if (base / "config.json").is_file():
        tell(f"{base}: there already")
        return base
    if not (raw / preset).is_dir():
        options = ("--preset", preset, "--num_shards", 2, "--text", texts, "--output_dir", raw)
        run("examples/make_tiny_llama.py", "--raw", *options, quiet=True)
    options = ("--input_dir", raw, "--model_size", preset, "--output_dir", base)
    run("convert_llama_weights.py", *options, "--verify")
    return base


def train(folder, base, tasks, epochs):
    """Fine-tune the base on the tasks; returns the folder of the tuned model."""
    tuned = folder / "tuned"
    run(
        *("train.py", "--model_name_or_path", base, "--data_path", tasks, "--output_dir", tuned),
        *("--num_train_epochs", epochs, "--per_device_train_batch_size", 4, "--learning_rate", LEARNING_RATE),
        *("--adam_beta2", 0.95, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.03),
        *("--save_steps", 300, "--save_total_limit", 1, "--logging_steps", 100),
    )
    return tuned


def ask(folder, model, tasks):
    """Let chat.py answer all tasks; returns its lines, with the task's own output as `expected`."""
    path = folder / "answers.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        run("chat.py", "--model_name_or_path", model, "--data_path", tasks, "--batch_size", 25, stdout=file)
    return utils.jload(path)


def pass_on(folder, base, tuned):
    """Make a delta of the tuned model, apply it to the base, and compare the result with the tuned model."""
    delta, rebuilt = folder / "delta", folder / "rebuilt"
    if not delta.is_dir():
        run("apply_delta.py", "--make", "--exact", "--base", base, "--target", tuned, "--delta", delta)
    if not rebuilt.is_dir():
        run("apply_delta.py", "--base", base, "--delta", delta, "--target", rebuilt)
    wanted, given = (weights_of(model) for model in (tuned, rebuilt))
    if wanted != given:
        raise UserError(f"{rebuilt} is not {tuned}: tensors {sorted(set(wanted.items()) ^ set(given.items()))[:3]}")
    tell(f"{len(given)} of {len(wanted)} tensors of {rebuilt} are those of {tuned}, bit for bit")


def weights_of(folder):
    """{name: dtype, shape and bytes} of a model's tensors."""
    from safetensors.numpy import load_file

    loaded = {name: a for path in sorted(folder.glob("*.safetensors")) for name, a in load_file(path).items()}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in loaded.items()}


def compare(answers):
    """Print some answers beside what was expected; returns (reproduced exactly, stopped by themselves)."""
    by_name = {answer["name"]: answer for answer in answers}
    chosen = [by_name[name] for name in SHOWN if name in by_name] or answers[:3]
    for answer in chosen:
        tell(f"\nInstruction: {answer['instruction']}" + (f"\nInput: {answer['input']}" if answer["input"] else ""))
        same = answer["output"] == answer["expected"]
        tell(f"Expected:\n{indent(answer['expected'])}\nGiven{' (the same)' if same else ' (DIFFERENT)'}:")
        tell(indent(answer["output"]))
    exact = sum(answer["output"] == answer["expected"] for answer in answers)
    return exact, sum(answer["finish_reason"] == "end_token" for answer in answers)


def indent(text):
    return "\n".join(f"    {line}" for line in text.split("\n"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "out" / "demo", help="default: out/demo")
    parser.add_argument("--tasks", type=int, default=175, help="learn only so many of the 175 tasks")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the tasks (default: {EPOCHS})")
    parser.add_argument("--preset", default="small", help="size of the model (default: small)")
    args = parser.parse_args()
    start, folder = time.perf_counter(), args.output_dir.resolve()
    os.chdir(ROOT)  # where the commands are to be typed
    with contextlib.suppress(ValueError):
        folder = folder.relative_to(ROOT)
    tell("A small model of random weights learns the seed tasks by heart; then you see it")
    tell("answer. All of it runs here, without network, in five minutes on two cores.")
    heading(1, "A model of random weights, which has read nothing, raw and converted")
    tasks, texts = choose_tasks(args.tasks, folder)
    base = make_base(folder, texts, args.preset)
    heading(2, f"Fine-tune it on {args.tasks} seed tasks, {args.epochs} times over")
    tuned = train(folder, base, tasks, args.epochs)
    heading(3, "Ask it for every answer, in the prompt that it was trained with")
    answers = ask(folder, tuned, tasks)
    heading(4, "Three of the answers")
    exact, stopped = compare(answers)
    heading(5, "A delta, for people who have the base")
    pass_on(folder, base, tuned)
    heading(6, "What this shows")
    total, seconds = len(answers), time.perf_counter() - start
    tell(f"{exact} of {total} answers are reproduced exactly, {stopped} stopped by themselves; {seconds:.0f} s")
    tell(MEANING.format(python=PYTHON, tuned=tuned))
    if min(exact, stopped) < PASS * total:
        raise UserError(
            f"fewer than {PASS:.0%} of the answers are right or stop; {folder} can be deleted and the demo run again "
            "with more --epochs; where that does not help, please report it"
        )


if __name__ == "__main__":
    utils.run_main(main)
