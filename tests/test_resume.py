"""Runs that are stopped, killed, repeated or started in the wrong folder; resumed, they end in the same bits.

A run here takes 18 steps of 8 micro-batches in all, so that a signal comes in the middle of one, and saves a
checkpoint every 4 steps. What a stopped run left is copied before it is resumed, for other tests to look at.
"""

import concurrent.futures
import csv
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import FSDP, ROOT, RUN_FILES, ZERO2, ZERO3, Run, basic_options, finish, make_records, start

import train
import utils

STEPS = 18
SPLIT = {1: (1, 8), 2: (2, 2)}  # processes -> micro-batch, accumulation: the global batch is 8
ENGINES = {
    "ddp": [],
    "fsdp": list(FSDP),
    "zero2": list(ZERO2),
    "zero3": list(ZERO3),
}
NO_ROOM = ["prlimit", "--fsize=500000", sys.executable]  # bytes a file; that of the model has 910,696
slow = pytest.mark.slow


def run_options(base, data, folder, processes=1, extra=(), **changes):
    """The options of a run; `changes` replace some of them, `extra` are words to add."""
    micro, accumulation = SPLIT[processes]
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    return basic_options(base, data, folder, **options | changes) + list(extra)


def play(options, processes=1, until="", then=None, command=None):
    """Run train.py; when `until` stands on its stderr call `then(process)`. Returns its Run."""
    folder = Path(options[options.index("--output_dir") + 1])
    log = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.err")
    with open(log, "w", encoding="utf-8") as stderr:
        process = start(options, processes, command=command, stderr=stderr)
    try:
        deadline = time.monotonic() + 300
        while then is not None and until not in log.read_text(encoding="utf-8"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
            time.sleep(0.01)
        if then is not None:
            then(process)
        run = finish(process, options)
    finally:
        if process.poll() is None:
            kill(process)
    return Run(run.code, run.out, log.read_text(encoding="utf-8"), folder)


def together(calls):
    """Call the functions of a dict at the same time, three at once; returns their results under the same names.

    One run alone leaves a core idle for much of its start.
    """
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = {name: pool.submit(call) for name, call in calls.items()}
    return {name: future.result() for name, future in futures.items()}


def workers(process):
    """The processes of train.py that a launcher has started, by rank."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if str(ROOT / "train.py") in p.cmdline()]
    return sorted(found, key=lambda worker: int(worker.environ()["RANK"]))


def kill(process):
    """kill -9 for a process and all that it has started; torchrun's workers are in groups of their own."""
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:
        one.kill()


def send(number):
    return lambda process: process.send_signal(number)


def signal_last_worker(process):
    """Signal one worker alone, the last: that it is not the first process's to hear must not matter."""
    workers(process)[-1].send_signal(signal.SIGTERM)


def copied(run, folder):
    """A copy of a run's folder, for a command to go on in."""
    shutil.copytree(run.folder, folder)
    return folder


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


def checkpoints(folder):
    """The numbers of the whole checkpoints, and of the others."""
    return tuple([int(path.name[11:]) for path in group] for group in utils.find_checkpoints(folder))


def rows_of(run):
    with open(run.folder / "loss.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def printed_steps(run):
    return [int(line.split("/")[0][5:]) for line in run.err.splitlines() if line.startswith("step ")]


def assert_same_end(run, unbroken, resumed_from):
    """A resumed run made only the steps that were missing, and ended in the same bits as the unbroken one."""
    assert f"resuming from {run.folder / f'checkpoint-{resumed_from}'}\n" in run.err
    assert printed_steps(run) == list(range(resumed_from + 1, STEPS + 1))
    assert rows_of(run.finished()) == rows_of(unbroken.finished())
    weights, expected = run.weights(), unbroken.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert run.info()["status"] == "finished" and run.info()["results"] == unbroken.info()["results"]


def assert_stopped_with_a_checkpoint(run):
    """A signalled run left a whole checkpoint of its last step and no model. Returns the number of that step."""
    step = printed_steps(run)[-1]
    assert 5 <= step < STEPS
    assert f": stopped at step {step}, checkpoint saved; the same command goes on from there\n" in run.err
    assert names_in(run.folder) == {
        ".lock",
        "run.json",
        "loss.csv",
        "loss.png",
        "checkpoint-4",
        f"checkpoint-{step}",
    } | {f"checkpoint-{number}" for number in range(4, step, 4)}
    assert checkpoints(run.folder)[0][-1] == step and not checkpoints(run.folder)[1]
    for folder in utils.find_checkpoints(run.folder)[0]:  # marked last, when all processes had written theirs
        marker = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert marker["files"].keys() == files - {"complete.json"} and len(files) > 8
        assert (f"checkpoint-{marker['step']}", marker["resumable"]) == (folder.name, True)
    assert run.info()["status"] == "started"
    return step


def watch_checkpoints(folder, seen):
    """Look at a folder until its run is finished; collect in `seen` how many whole checkpoints there were."""

    def look(process):
        while process.poll() is None:
            count = len(checkpoints(folder)[0]) or len(checkpoints(folder)[0])  # one look may meet the change
            if count or seen:
                seen.append(count)

    return look


@pytest.fixture(scope="session")
def heavy_base(base, tmp_path_factory):
    """A base model with a weight that float16 cannot hold."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "heavy"
    model = LlamaForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(base, data, tmp_path_factory):
    """Runs of one process, each in a new folder: name -> Run."""
    folder = tmp_path_factory.mktemp("runs")

    def options(name):
        return run_options(base, data, folder / name)

    return together(
        {
            "unbroken": lambda: play(options("unbroken")),
            "terminated": lambda: play(options("terminated"), until="step 5/", then=send(signal.SIGTERM)),
            "killed": lambda: play(options("killed"), until="step 6/", then=kill),
        }
    )


@pytest.fixture(scope="session")
def again(runs, base, data, tmp_path_factory):
    """The stopped runs of `runs` gone on with, each in a copy of its folder: name -> Run."""
    folder = tmp_path_factory.mktemp("again")
    return together(
        {
            name: lambda name=name: play(run_options(base, data, copied(runs[name], folder / name)))
            for name in ("terminated", "killed")
        }
    )


@pytest.fixture(scope="session")
def in_use(runs, base, data, tmp_path_factory):
    """Commands in copies of folders that hold a run: name -> Run."""
    folder = tmp_path_factory.mktemp("in_use")

    def afresh():
        copy = copied(runs["unbroken"], folder / "afresh")
        (copy / "notes.txt").write_text("mine", encoding="utf-8")
        (copy / "checkpoint-best").mkdir()
        (copy / "checkpoint-best" / "model.bin").write_text("mine too", encoding="utf-8")
        return play(run_options(base, data, copy, overwrite_output_dir=True, max_steps=2, save_strategy="no"))

    other = folder / "other.json"
    other.write_text(json.dumps(make_records(71)), encoding="utf-8")
    changes = {"learning_rate": "2e-3", "num_train_epochs": 3, "seed": 7, "data_path": other}
    finished, stopped = copied(runs["unbroken"], folder / "finished"), copied(runs["terminated"], folder / "changed")
    return together(
        {
            "finished": lambda: play(run_options(base, data, finished)),
            "changed": lambda: play(run_options(base, data, stopped, **changes)),
            "afresh": afresh,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and killed runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_terminated_run_stops_with_a_checkpoint_and_no_model(runs):
    run = runs["terminated"]
    assert run.code == 143
    assert "\nSIGTERM: saving a checkpoint after this step, then exit 143" in run.err
    assert_stopped_with_a_checkpoint(run)


@slow
@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="nohup is around the tests themselves")
def test_a_run_that_is_hung_up_stops_like_a_terminated_one(base, data, tmp_path):
    run = play(run_options(base, data, tmp_path / "out"), until="step 5/", then=send(signal.SIGHUP))
    assert run.code == 129
    assert "\nSIGHUP: saving a checkpoint after this step, then exit 129" in run.err
    assert_stopped_with_a_checkpoint(run)


def test_a_terminated_run_resumes_to_the_same_bits(runs, again):
    assert_same_end(again["terminated"], runs["unbroken"], printed_steps(runs["terminated"])[-1])


def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_bits(runs, again):
    assert runs["killed"].code == -signal.SIGKILL and printed_steps(runs["killed"])[-1] < STEPS
    assert runs["killed"].info()["status"] == "started"
    assert_same_end(again["killed"], runs["unbroken"], checkpoints(runs["killed"].folder)[0][-1])


def test_checkpoints_are_marked_every_four_steps_and_at_the_end(runs):
    folder = runs["unbroken"].finished().folder
    assert checkpoints(folder) == ([4, 8, 12, 16, 18], [])
    assert names_in(folder) == RUN_FILES | {".lock", "run.json"} | {f"checkpoint-{n}" for n in (4, 8, 12, 16, 18)}


@slow
def test_nohup_keeps_a_run_from_being_hung_up(runs, base, data, tmp_path):
    options = run_options(base, data, tmp_path / "out")
    run = play(options, until="step 5/", then=send(signal.SIGHUP), command=["nohup", sys.executable])
    assert run.code == 0 and "SIGHUP" not in run.err
    assert rows_of(run.finished()) == rows_of(runs["unbroken"])


@slow
def test_an_unfinished_checkpoint_is_named_and_not_used(runs, base, data, tmp_path):
    folder, stopped = copied(runs["terminated"], tmp_path / "out"), printed_steps(runs["terminated"])[-1]
    (folder / f"checkpoint-{stopped}" / "complete.json").unlink()
    run = play(run_options(base, data, folder))
    assert f"{run.folder / f'checkpoint-{stopped}'}: unfinished checkpoint, not used\n" in run.err
    assert_same_end(run, runs["unbroken"], [number for number in (4, 8, 12, 16) if number < stopped][-1])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_checkpoint_with_a_damaged_file_does_not_count(runs, tmp_path, name, damage, capsys):
    folder = copied(runs["unbroken"], tmp_path / "copy")
    settings = dict(runs["unbroken"].info()["settings"], seed=1)  # changed, and the run goes on anyway
    damage(folder / "checkpoint-18" / name)
    assert checkpoints(folder) == ([4, 8, 12, 16], [18])
    assert train.resume_point(folder, settings, anyway=True) == (False, str(folder / "checkpoint-16"))
    assert capsys.readouterr().err == (
        f"{folder}/checkpoint-18: unfinished checkpoint, not used\nresuming from {folder}/checkpoint-16\n"
    )


def test_a_checkpoint_without_an_optimizer_is_not_resumed(runs, tmp_path, capsys):
    folder = copied(runs["terminated"], tmp_path / "copy")
    for path in utils.find_checkpoints(folder)[0]:
        train.mark_checkpoint(
            path, int(path.name[11:]), SimpleNamespace(save_only_model=True)
        )  # as --save_only_model does
    assert train.resume_point(folder, runs["terminated"].info()["settings"]) == (False, None)
    assert capsys.readouterr().err == f"{folder}: its run has no whole checkpoint yet; starting from the first step\n"


@slow
def test_one_kept_checkpoint_goes_only_when_the_next_is_whole(runs, base, data, tmp_path):
    seen, options = [], run_options(base, data, tmp_path / "out", save_total_limit=1)
    run = play(options, until="engine: ", then=watch_checkpoints(tmp_path / "out", seen)).finished()
    assert checkpoints(run.folder) == ([18], [])
    assert set(seen) <= {1, 2} and len(seen) > 10
    assert rows_of(run) == rows_of(runs["unbroken"])


# ---------------------------------------------------------------------------------------------------------------------
# The same command, and others, in a folder that is in use
# ---------------------------------------------------------------------------------------------------------------------


@slow
def test_a_finished_run_is_left_as_it_is(runs, in_use):
    run, first = in_use["finished"], runs["unbroken"].folder
    assert run.code == 0 and run.out == ""
    assert run.err.splitlines()[-1] == f"{run.folder}: this run is finished (18 steps); nothing to do"
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 40
    for name in files:  # copytree keeps the times
        assert (run.folder / name).stat().st_mtime_ns == (first / name).stat().st_mtime_ns, name
        assert (run.folder / name).read_bytes() == (first / name).read_bytes(), name
    assert {path.name for path in run.folder.rglob("*")} == {path.name for path in first.rglob("*")}


@slow
def test_changed_settings_are_named_and_refused(runs, in_use, data):
    run, before = in_use["changed"], runs["terminated"].folder
    other = run.folder.with_name("other.json")
    assert run.code == 2
    assert run.error() == (
        f"error: {run.folder}: its run had other settings: seed was 42 and is 7; "
        "learning_rate was 0.001 and is 0.002; num_train_epochs was 2.0 and is 3.0; "
        f"data was {[utils.sha256_of(data)]} and is {[utils.sha256_of(other)]}; "
        "choose another --output_dir, start afresh with --overwrite_output_dir, "
        "or go on all the same with --resume_anyway True"
    )
    assert (run.folder / "run.json").read_bytes() == (before / "run.json").read_bytes()
    assert names_in(run.folder) == names_in(before)


@slow
def test_changed_settings_may_be_resumed_anyway(runs, base, data, tmp_path):
    folder, stopped = copied(runs["terminated"], tmp_path / "out"), printed_steps(runs["terminated"])[-1]
    run = play(run_options(base, data, folder, learning_rate="2e-3", resume_anyway=True)).finished()
    assert printed_steps(run) == list(range(stopped + 1, STEPS + 1))
    assert run.info()["settings"]["learning_rate"] == 0.002
    assert rows_of(run)[:stopped] == rows_of(runs["unbroken"])[:stopped]
    rates = [float(row["learning_rate"]) for row in rows_of(run)[stopped:]]
    assert rates == pytest.approx([2e-3 * (1 - step / STEPS) for step in range(stopped, STEPS)])


@slow
def test_another_split_of_the_same_global_batch_is_no_change(runs, base, data, tmp_path):
    folder, stopped = copied(runs["terminated"], tmp_path / "out"), printed_steps(runs["terminated"])[-1]
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run = play(run_options(base, data, folder, **split)).finished()
    assert " micro-batch 4 flat x accumulation 2 x processes 1 = global batch 8, " in run.err
    assert printed_steps(run) == list(range(stopped + 1, STEPS + 1))
    assert run.losses() == pytest.approx(runs["unbroken"].losses(), abs=1e-5)


@slow
def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(in_use):
    run = in_use["afresh"].finished()
    assert printed_steps(run) == [1, 2] and "resuming" not in run.err
    assert names_in(run.folder) == RUN_FILES | {".lock", "run.json", "notes.txt", "checkpoint-best"}
    assert (run.folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (run.folder / "checkpoint-best" / "model.bin").read_text(encoding="utf-8") == "mine too"


@slow
def test_a_signal_saves_the_optimizer_of_a_run_that_saves_models_only(runs, base, data, tmp_path):
    options = run_options(base, data, tmp_path / "out", save_only_model=True)
    stopped = play(options, until="step 6/", then=send(signal.SIGTERM))
    assert stopped.code == 143 and "optimizer.pt" not in names_in(tmp_path / "out" / "checkpoint-4")
    assert_same_end(play(options), runs["unbroken"], printed_steps(stopped)[-1])


@slow
def test_what_there_was_is_kept_until_a_run_that_overwrites_it_works(runs, base, data, tmp_path):
    folder = copied(runs["unbroken"], tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    half = Path(shutil.copytree(base, tmp_path / "half"))
    (half / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:300_000])
    for model in (half, folder):
        run = play(run_options(model, data, folder, overwrite_output_dir=True))
        assert run.code == 2 and ("cannot load its weights" if model == half else "would delete") in run.error()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@slow
def test_overwriting_deletes_the_model_of_the_run_before_an_interrupted_one(runs, base, data, tmp_path):
    folder = copied(runs["unbroken"], tmp_path / "copy")
    more = run_options(base, data, folder, num_train_epochs=3, resume_anyway=True)
    assert play(more, until="step 20/", then=send(signal.SIGTERM)).code == 143
    afresh = run_options(base, data, folder, num_train_epochs=3, overwrite_output_dir=True)
    assert play(afresh, until="step 1/", then=kill).code == -signal.SIGKILL
    assert names_in(folder) == {".lock", "run.json"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "checkpoint-500"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_refused(tmp_path, name, overwrite):
    (tmp_path / name).write_text("theirs", encoding="utf-8")
    message = f"{tmp_path}: holds {name}, which is not of a run of ours; choose another --output_dir"
    with pytest.raises(utils.UserError) as caught:
        train.resume_point(tmp_path, {}, overwrite=overwrite)
    assert str(caught.value) == message
    assert (tmp_path / name).read_text(encoding="utf-8") == "theirs"


def test_a_run_json_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"made_by": "another"}', encoding="utf-8")
    with pytest.raises(utils.UserError) as caught:
        train.resume_point(tmp_path, {}, overwrite=True)
    assert str(caught.value) == f"{tmp_path}/run.json: not a run.json of these scripts; choose another folder"
    assert names_in(tmp_path) == {"run.json"}


def test_files_that_are_no_model_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert train.resume_point(tmp_path, {}) == (False, None)


def test_a_folder_is_claimed_by_one_run_at_a_time(tmp_path):
    lock = utils.claim_folder(tmp_path / "out")
    with pytest.raises(utils.UserError) as caught:
        utils.claim_folder(tmp_path / "out")
    wait = "another run is writing here; wait for it, or choose another folder"
    assert str(caught.value) == f"{tmp_path}/out: {wait}"
    lock.close()
    utils.claim_folder(tmp_path / "out").close()


@slow
def test_a_second_run_in_a_folder_is_refused_while_the_first_runs(base, data, tmp_path):
    options, second = run_options(base, data, tmp_path / "out", num_train_epochs=99), []

    def start_second(process):
        second.append(play(options))
        assert process.poll() is None
        kill(process)

    first = play(options, until="step 1/", then=start_second)
    assert second[0].code == 2
    wait = "another run is writing here; wait for it, or choose another folder"
    assert second[0].error() == f"error: {tmp_path}/out: {wait}"
    assert names_in(tmp_path / "out") >= {".lock", "run.json"} and first.info()["status"] == "started"
    utils.claim_folder(tmp_path / "out").close()  # the lock ended with the first, which was killed


# ---------------------------------------------------------------------------------------------------------------------
# --resume_from_checkpoint, and run.json as a command
# ---------------------------------------------------------------------------------------------------------------------


@slow
def test_a_checkpoint_of_another_folder_may_be_named(runs, base, data, tmp_path):
    unbroken = runs["unbroken"]
    named = {"resume_from_checkpoint": unbroken.folder / "checkpoint-8"}
    run = play(run_options(base, data, tmp_path / "out", **named)).finished()
    assert printed_steps(run) == list(range(9, STEPS + 1))
    assert rows_of(run) == rows_of(unbroken)
    weights, expected = run.weights(), unbroken.weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@slow
def test_going_back_to_an_earlier_checkpoint_leaves_no_later_one_that_counts(runs, base, data, tmp_path):
    folder = copied(runs["unbroken"], tmp_path / "out")
    back = run_options(base, data, folder, resume_from_checkpoint=folder / "checkpoint-8")
    run = play(back, command=NO_ROOM)  # it trains nothing anew
    assert "File too large" in run.error() and checkpoints(folder) == ([4, 8, 12, 16, 18], [])
    seen = []
    run = play(back, until="step 10/", then=lambda process: (seen.append(checkpoints(folder)), kill(process)))
    assert f"{folder}/checkpoint-12: of steps that are trained anew, no longer used\n" in run.err
    assert seen[0] == ([4, 8], [12, 16, 18])
    run = play(run_options(base, data, folder, resume_anyway=True)).finished()
    assert printed_steps(run) == list(range(9, STEPS + 1)) and checkpoints(folder) == ([4, 8, 12, 16, 18], [])
    assert rows_of(run) == rows_of(runs["unbroken"])


def refusal(*arguments, **keywords):
    with pytest.raises(utils.UserError) as caught:
        train.resume_point(*arguments, **keywords)
    return str(caught.value)


def test_a_named_checkpoint_that_is_missing_is_refused(runs, tmp_path):
    settings = runs["unbroken"].info()["settings"]
    path = tmp_path / "checkpoint-4"
    message = refusal(tmp_path, settings, str(path))
    assert message.startswith(f"--resume_from_checkpoint {path}: no checkpoint there") and message.endswith(": none")


@pytest.mark.parametrize("wanted", ["True", "true"])
def test_resuming_where_nothing_is_to_resume_is_refused(runs, tmp_path, wanted):
    run = runs["terminated"]
    message = f"--resume_from_checkpoint: {tmp_path} holds no run; leave the option out to start one"
    assert refusal(tmp_path, run.info()["settings"], wanted) == message
    shutil.copy(run.folder / "run.json", tmp_path)
    message = f"--resume_from_checkpoint: {tmp_path} holds no whole checkpoint; leave the option out"
    assert refusal(tmp_path, run.info()["settings"], wanted) == message


def test_resuming_may_be_asked_for_and_forbidden(runs):
    run, last = runs["terminated"], printed_steps(runs["terminated"])[-1]
    settings = run.info()["settings"]
    assert train.resume_point(run.folder, settings, "True") == (False, str(run.folder / f"checkpoint-{last}"))
    message = f"{run.folder}: holds a run already; to start it afresh use --overwrite_output_dir"
    assert refusal(run.folder, settings, "False") == message


@slow
def test_run_json_is_a_command_for_the_same_run(runs, tmp_path):
    unbroken = runs["unbroken"]
    run = play([str(unbroken.folder / "run.json"), "--output_dir", str(tmp_path / "again")]).finished()
    assert printed_steps(run) == list(range(1, STEPS + 1))
    assert rows_of(run) == rows_of(unbroken)
    weights, expected = run.weights(), unbroken.weights()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert run.info()["settings"] == unbroken.info()["settings"]


# ---------------------------------------------------------------------------------------------------------------------
# Saves that fail
# ---------------------------------------------------------------------------------------------------------------------


@slow
def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(heavy_base, data, tmp_path):
    run = play(run_options(heavy_base, data, tmp_path / "out", save_dtype="float16"))
    assert run.code == 2 and printed_steps(run) == []
    assert run.error() == (
        "error: weight model.layers.0.mlp.up_proj.weight has values that are not finite in float16; "
        "use --save_dtype float32"
    )
    assert names_in(run.folder) == {".lock", "run.json"}


@slow
def test_a_disk_without_room_is_found_before_the_first_step(base, data, tmp_path):
    run = play(run_options(base, data, tmp_path / "out"), command=NO_ROOM)
    assert run.code == 2 and printed_steps(run) == []
    assert "File too large" in run.error() and run.error().count("make room") == 1 and "Traceback" not in run.err
    assert names_in(run.folder) - {".rehearsal"} == {".lock", "run.json"}
    assert not list(run.folder.rglob("*.safetensors"))


@slow
def test_a_final_save_that_fails_leaves_a_checkpoint_and_no_model(base, data, tmp_path):
    """Steps so large that float16 cannot hold their result; with --save_dtype float32, as advised, the model is saved."""
    options = run_options(base, data, tmp_path / "out", learning_rate="1e5", max_steps=2, save_steps=1)
    run = play([*options, "--save_dtype", "float16"])
    assert run.code == 2 and printed_steps(run) == [1, 2] and "save rehearsed: " in run.err
    assert "has values that are not finite in float16; use --save_dtype float32" in run.error()
    assert names_in(run.folder) == {".lock", "run.json", "checkpoint-1", "checkpoint-2"}
    assert run.info()["status"] == "started"
    run = play([*options, "--save_dtype", "float32"]).finished()
    assert f"resuming from {run.folder / 'checkpoint-2'}\n" in run.err
    assert printed_steps(run) == [] and len(run.losses()) == run.info()["results"]["steps"] == 2


@slow
def test_a_disk_without_room_at_the_end_leaves_no_model(base, data, tmp_path):
    options = run_options(base, data, tmp_path / "out", save_strategy="no")
    limit = (500_000, 500_000)
    run = play(options, until="step 5/", then=lambda p: psutil.Process(p.pid).rlimit(psutil.RLIMIT_FSIZE, limit))
    assert run.code == 2 and printed_steps(run)[-1] == STEPS
    assert "File too large" in run.error() and run.error().count("make room") == 1
    assert names_in(run.folder) == {".lock", "run.json"}


@slow
def test_the_rehearsal_may_be_left_out(heavy_base, data, tmp_path):
    changes = {"save_dtype": "float16", "save_rehearsal": False, "max_steps": 2, "save_strategy": "no"}
    run = play(run_options(heavy_base, data, tmp_path / "out", **changes))
    assert run.code == 2 and printed_steps(run) == [1, 2] and "save rehearsed" not in run.err
    assert "has values that are not finite in float16" in run.error()
    assert names_in(run.folder) == {".lock", "run.json"}


# ---------------------------------------------------------------------------------------------------------------------
# Under the engines of several processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unbroken(base, data, tmp_path_factory):
    """A function from an engine's name to its unbroken run; each is made once."""
    made, folder = {}, tmp_path_factory.mktemp("unbroken")

    def get(engine):
        if engine not in made:
            made[engine] = play(run_options(base, data, folder / engine, 2, ENGINES[engine]), 2).finished()
        return made[engine]

    return get


@pytest.fixture
def deepspeed_ready(request):
    """Ask for the fixture of the same name in conftest.py, where the test's engine is of DeepSpeed."""
    if request.node.callspec.params["engine"].startswith("zero"):
        request.getfixturevalue("deepspeed_ready")


@slow
@pytest.mark.usefixtures("deepspeed_ready")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_of_two_processes_resumes_to_the_same_bits(engine, base, data, tmp_path, unbroken):
    """At step 5, where DeepSpeed's CPU Adam would go on with another bias correction if it were not told; at 4 not."""
    options = run_options(base, data, tmp_path / "out", 2, ENGINES[engine], save_steps=5)
    killed = play(options, 2, until="step 7/", then=kill)
    assert killed.code == -signal.SIGKILL and killed.info()["status"] == "started"
    assert checkpoints(tmp_path / "out")[0] == [5]
    assert_same_end(play(options, 2), unbroken(engine), 5)


@slow
@pytest.mark.usefixtures("deepspeed_ready")
@pytest.mark.parametrize(
    ("engine", "stop"),
    [
        ("ddp", signal_last_worker),
        ("fsdp", send(signal.SIGTERM)),
        ("zero2", signal_last_worker),
        ("zero3", send(signal.SIGTERM)),
    ],
)
def test_a_terminated_run_of_two_processes_resumes_to_the_same_bits(engine, stop, base, data, tmp_path, unbroken):
    options = run_options(base, data, tmp_path / "out", 2, ENGINES[engine])
    stopped = play(options, 2, until="step 5/", then=stop)
    assert stopped.code != 0
    if stop is signal_last_worker:
        assert "exitcode  : 143 " in stopped.err and "\nSIGTERM: saving" not in stopped.err  # the first heard nothing
    else:
        assert "\nSIGTERM: saving a checkpoint after this step, then exit 143" in stopped.err
    step = assert_stopped_with_a_checkpoint(stopped)
    assert_same_end(play(options, 2), unbroken(engine), step)


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_grouped_by_length_resumes_to_the_same_bits(processes, base, data, tmp_path):
    def options(name):
        return run_options(base, data, tmp_path / name, processes, train_sampling_strategy="group_by_length")

    whole = play(options("whole"), processes).finished()
    targets = [int(row["num_targets"]) for row in rows_of(whole)]
    assert sum(targets[:9]) == sum(targets[9:]) and targets[:9] != targets[9:]  # all in each epoch, in another order
    play(options("out"), processes, until="step 13/", then=kill)
    assert_same_end(play(options("out"), processes), whole, 12)


@slow
def test_a_sharded_run_is_not_resumed_by_another_number_of_processes(base, data, tmp_path, unbroken):
    folder = copied(unbroken("fsdp"), tmp_path / "copy")
    utils.write_json(unbroken("fsdp").info() | {"status": "started"}, folder / "run.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    options = run_options(base, data, folder, 1, ENGINES["fsdp"])
    run = play(options, command=launcher)
    assert run.error().startswith(f"error: {folder}: its run had other settings: processes was 2 and is 1; ")
