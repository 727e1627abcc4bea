"""How a run ends from outside, and what it says while it waits: signals, lost processes, full memory, locks."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import FSDP, ROOT, ZERO3, basic_options, environment, field, make_records, needs_deepspeed, train

import train as script
import utils

LONG = {"num_train_epochs": 500, "save_strategy": "steps", "save_steps": 20}
# train.py with a step that counts as slow after two seconds, less room for memory where MORE_MEMORY says so, and a
# process that hangs after the step, or in the save, that HANGS names.
QUICK = """
import os, resource, signal, sys, train, utils
train.SLOW_STEP = 2.0
if "MORE_MEMORY" in os.environ:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ["MORE_MEMORY"]),) * 2)
begin = train.Watch.begin
def begin_or_hang(watch, doing):
    begin(watch, doing)
    if os.environ.get("HANGS") == f"{doing} after {watch.last}":
        os.kill(os.getpid(), signal.SIGSTOP)
    watch.last = doing
train.Watch.last, train.Watch.begin = "", begin_or_hang
utils.run_main(train.train)
"""


def begin(options, log, command=(), **variables):
    """Start train.py with its output in a file; stderr and stdout together, as on a screen."""
    words = [*(command or [sys.executable, str(ROOT / "train.py")]), *map(str, options)]
    out = open(log, "w", encoding="utf-8")
    return subprocess.Popen(words, stdout=out, stderr=out, env=environment() | variables, start_new_session=True)


def wait_for(log, text, process, seconds=90):
    """Wait until `text` stands in a log; returns the log."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        said = log.read_text(encoding="utf-8")
        if text in said:
            return said
        assert process.poll() is None or text in log.read_text(encoding="utf-8"), said[-2000:]
        time.sleep(0.1)
    raise AssertionError(f"{text!r} not in:\n{said[-2000:]}")


def last_line(log, seconds=10):
    """The last line of a log once nothing more is written to it."""
    text, until = None, time.monotonic() + seconds
    while text != (text := log.read_text(encoding="utf-8")) or time.monotonic() < until - seconds + 1.5:
        time.sleep(0.7)
    return text.splitlines()[-1]


def test_the_first_ctrl_c_saves_a_checkpoint_and_the_second_does_not_wait(base, data, tmp_path):
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    first = begin(basic_options(base, data, tmp_path / "one", **LONG), one)
    second = begin(basic_options(base, data, tmp_path / "two", **LONG), two)
    wait_for(one, "step 3/", first)
    first.send_signal(signal.SIGINT)
    wait_for(two, "step 3/", second)
    second.send_signal(signal.SIGSTOP)  # so that no step ends between the two
    for _ in range(2):
        second.send_signal(signal.SIGINT)
        second.send_signal(signal.SIGCONT)
    assert first.wait(60) == 130 and second.wait(60) == 130
    step = field(r"SIGINT: stopped at step (\d+), checkpoint saved; the same command goes on", one.read_text())
    assert [path.name for path in utils.find_checkpoints(tmp_path / "one")[0]][-1] == f"checkpoint-{step}"
    said = two.read_text(encoding="utf-8")
    assert ("SIGINT: ended at once, asked twice" in said) != ("SIGINT: stopped at step" in said)  # one may be two


STEP, SAVE = "step 26 after saving a checkpoint", "saving a checkpoint after step 40"


@pytest.fixture
def pair(request, base, tmp_path):
    """Two processes of one FSDP run without a launcher, where one hangs, as one that is lost does: (processes, logs).

    The parameter: (the rank of the one that hangs, where).
    """
    hanging, place = request.param
    data = tmp_path / "data.json"
    data.write_text(utils.json.dumps(make_records(400)), encoding="utf-8")
    processes, logs = [], []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        logs.append(tmp_path / f"{rank}.log")
        where = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}
        where |= {"TORCHELASTIC_RUN_ID": "two nodes", "HANGS": place if rank == hanging else ""}
        options = [*basic_options(base, data, tmp_path / "out", ddp_timeout=20, **LONG), *FSDP]
        processes.append(begin(options, logs[-1], [sys.executable, "-c", QUICK], **where))
    yield processes, logs
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("pair", [(1, STEP), (1, SAVE)], indirect=True, ids=["step", "save"])
def test_a_step_or_a_save_that_waits_is_named_and_a_signal_ends_it(pair, request):
    processes, logs = pair
    what = "step 26" if request.node.callspec.id == "step" else "saving a checkpoint"
    said = wait_for(logs[0], "waiting for another process", processes[0])
    assert f"{what} has taken" in said and "--ddp_timeout ends that after 20 s; last good checkpoint: " in said
    processes[0].terminate()
    assert processes[0].wait(30) == 143  # the main thread hangs in a collective call
    said = logs[0].read_text(encoding="utf-8")
    assert f"SIGTERM: ended at once, {what} has not ended within 4 s; last good checkpoint: " in said


@pytest.mark.parametrize("pair", [(1, STEP)], indirect=True)
def test_the_second_signal_ends_a_step_that_cannot_end(pair):
    processes, logs = pair
    wait_for(logs[0], "waiting for another process", processes[0])
    processes[0].send_signal(signal.SIGINT)
    wait_for(logs[0], "SIGINT: saving a checkpoint after this step, then exit 130", processes[0])
    processes[0].send_signal(signal.SIGINT)  # a launcher's, which sends on what the terminal has sent
    time.sleep(2.2)
    assert processes[0].poll() is None
    processes[0].send_signal(signal.SIGINT)
    assert processes[0].wait(5) == 130
    assert "SIGINT: ended at once, asked twice; last good checkpoint: " in logs[0].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(0, STEP), (0, SAVE)], indirect=True, ids=["step", "save"])
def test_a_process_that_does_not_answer_ends_the_other_after_the_timeout(pair, request):
    processes, logs = pair  # the first one hangs: the other must speak for itself
    assert processes[1].wait(120) == 2
    said = logs[1].read_text(encoding="utf-8")
    what = "step 26" if request.node.callspec.id == "step" else "saving a checkpoint"
    assert "waiting for another process" in said and f"error: {what}" in said
    assert "another process has not answered for 20 s (--ddp_timeout); last good checkpoint: " in said


@pytest.mark.parametrize("pair", [(1, STEP)], indirect=True)
def test_a_process_that_is_killed_leaves_one_line_in_the_other(pair):
    processes, logs = pair
    wait_for(logs[0], "waiting for another process", processes[0])
    processes[1].kill()
    assert processes[0].wait(60) == 2
    errors = [line for line in logs[0].read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1 and "another process is lost or stuck (" in errors[0]
    assert "checkpoint-20; the same command goes on" in errors[0] and "Traceback" not in logs[0].read_text()


def test_under_torchrun_our_line_is_the_last(base, tmp_path):
    log, words = tmp_path / "log", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = basic_options(base, tmp_path / "nothing.json", tmp_path / "out")
    process = begin(options, log, [*words, str(ROOT / "train.py")])
    assert process.wait(90) == 1
    assert last_line(log).startswith(f"error: {tmp_path}/nothing.json: No such file")
    assert "ChildFailedError" in log.read_text(encoding="utf-8")  # so there was something to come behind


@needs_deepspeed
def test_under_deepspeed_our_line_is_the_last(base, tmp_path):
    log = tmp_path / "log"
    words = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_gpus", "2"]
    options = [*basic_options(base, tmp_path / "nothing.json", tmp_path / "out"), *ZERO3]
    process = begin(options, log, [*words, str(ROOT / "train.py")])
    assert process.wait(90) != 0
    assert last_line(log).startswith(f"error: {tmp_path}/nothing.json: No such file")


def test_full_memory_is_one_line_with_what_to_lower(base, tmp_path):
    data = tmp_path / "data.json"
    records = [record | {"output": "river lamp stone " * 150} for record in make_records(256)]
    data.write_text(utils.json.dumps(records), encoding="utf-8")
    options = basic_options(base, data, tmp_path / "out", per_device_train_batch_size=128, memory_check=False)
    log = tmp_path / "log"
    process = begin(options, log, [sys.executable, "-c", QUICK], MORE_MEMORY=str(700 * 2**20))
    assert process.wait(120) == 2, log.read_text(encoding="utf-8")[-2000:]
    line = log.read_text(encoding="utf-8").splitlines()[-1]
    assert "the memory is full (" in line and "--per_device_train_batch_size 64 --gradient_accumulation_steps 2" in line
    assert "--gradient_checkpointing True" in line and "no checkpoint was written yet" in line


@pytest.mark.parametrize("name", ["train.py", "apply_delta.py", "generate_instruction.py", "convert_llama_weights.py"])
def test_ctrl_c_while_libraries_load_shows_no_traceback(name, tmp_path):
    for library in ("torch", "numpy"):  # as if Ctrl-C came just then
        (tmp_path / f"{library}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    here = environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / name], capture_output=True, text=True, env=here, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_operators_that_are_compiled_and_locks_that_are_awaited_are_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, new = tmp_path / "cpu_adam" / "lock", tmp_path / "py312_cu130" / "fused_adam" / "lock"
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    script.watch_compiler()
    until, said = time.monotonic() + 20, ""
    while "fused_adam" not in said and time.monotonic() < until:
        time.sleep(0.2)
        said += capfd.readouterr().err
    assert f"DeepSpeed waits for {old}, which is 120 min old" in said and f"rm {old}" in said
    assert f"DeepSpeed compiles fused_adam once, which takes a minute or more ({new.parent})" in said
    assert said.count("\n") == 2  # each once


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--auto_find_batch_size", "True"], "give a --per_device_train_batch_size that fits"),
        (["--push_to_hub", "True"], "when the run has ended: hf upload NAME"),
        (["--save_strategy", "best"], "--save_strategy best: there is no data to evaluate on"),
        (
            ["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 4}}'],
            "--gradient_accumulation_steps",
        ),
    ],
)
def test_options_that_would_do_something_else_are_refused(words, says, tmp_path):
    with pytest.raises(utils.UserError) as caught:
        script.parse_arguments(["--output_dir", str(tmp_path), *words])
    assert says in str(caught.value)


def test_a_closed_standard_stream_is_no_crash(base, data, tmp_path):
    options = " ".join(map(str, basic_options(base, data, tmp_path / "out", dry_run=2)))
    done = subprocess.run(f"{sys.executable} {ROOT}/train.py {options} <&- >&- 2>&-", shell=True, env=environment())
    assert done.returncode == 0


def test_a_reader_that_has_enough_is_no_error(base, data, tmp_path):
    options = " ".join(map(str, basic_options(base, data, tmp_path / "out", dry_run=70)))
    command = (
        f"set -o pipefail; {sys.executable} {ROOT}/train.py {options} 2> {tmp_path}/err | head -n 1; exit $PIPESTATUS"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.count("\n") == 1 and done.returncode in (0, 141)
    assert not {"error", "Traceback", "BrokenPipe"} & set((tmp_path / "err").read_text(encoding="utf-8").split())


def test_the_files_of_a_run_are_as_the_umask_says_and_the_model_is_whole(base, data, tmp_path):
    options = basic_options(base, data, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    train(options).finished()
    for path in [*(tmp_path / "out").glob("*.*"), *(tmp_path / "out" / "checkpoint-1").iterdir()]:
        assert path.name == ".lock" or oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask()), path
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert utils.read_json(tmp_path / "out" / "config.json")["use_cache"] is True


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_ctrl_c_with_tee_behind_still_saves_a_checkpoint(base, data, tmp_path):
    """tee dies of the same Ctrl-C, and what is printed on stderr then has no reader."""
    read, write = os.pipe()
    words = [sys.executable, str(ROOT / "train.py"), *map(str, basic_options(base, data, tmp_path / "out", **LONG))]
    process = subprocess.Popen(words, stdout=write, stderr=write, env=environment(), start_new_session=True)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as reader:
        next(line for line in reader if line.startswith("step 3/"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert utils.find_checkpoints(tmp_path / "out")[0]
