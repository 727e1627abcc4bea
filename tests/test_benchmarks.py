"""The benchmarks run, each script and arm on little, and end with 1 where an arm fails or a bound is missed."""

import argparse
import importlib
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, environment, make_records

FOLDER = ROOT / "benchmarks"
NOT_JUDGED = "tiny: bounds of speed and memory are not judged"


def run(script, *options, code=0):
    """Run a benchmark; returns (what it printed, what it said on stderr)."""
    words = [sys.executable, FOLDER / script, *options]
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout, done.stderr


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the scripts set
    return importlib.import_module


@pytest.fixture
def model_file(base):
    return base / "tokenizer.model"


def fake_python(path, script, words=""):
    """A file that stands for the python of a peer's environment: it takes the peer's options and runs ours."""
    lines = ["#!/bin/sh", f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi']
    path.write_text("\n".join([*lines, words, f'exec {sys.executable} {script} "$@"\n']))
    path.chmod(0o755)
    return path


# --- micro_batches.py ------------------------------------------------------------------------------------------------


def test_micro_batches_runs_every_arm_of_speed(tmp_path):
    words = ("--preset", "tiny", "--part", "speed", "--steps", 2, "--repeat", 1, "--loss_steps", 2)
    out, _ = run("micro_batches.py", *words, "--output", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["speed"]["runs"].keys() == {"original 4", "ours 4", "ours 32", "masked 32"}
    assert result["speed"]["bounds"] == {
        "ours 32 / ours 4": 0.95,
        "ours 32 / masked 32": 1.8,
        "ours 4 / original 4": 1.3,
    }
    assert result["speed"]["equal"] and all(len(runs[0]["losses"]) == 2 for runs in result["speed"]["float32"].values())
    assert NOT_JUDGED in out and "ours 32 / masked 32: " in out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["memory", "windows", "lora"])
def test_micro_batches_measures_memory_and_windows(part, tmp_path, base, data):
    words = ("--preset", "tiny", "--part", part, "--steps", 2, "--repeat", 1, "--output", tmp_path / "out.json")
    out, _ = run("micro_batches.py", *words)
    found = json.loads((tmp_path / "out.json").read_text())[part]
    if part == "memory":
        assert 0.1 < found["peak_anon_gb"]["ours 32"]["median"] < 2 and found["runs"].keys() == {
            "original 32",
            "ours 32",
        }
    elif part == "lora":
        assert found["speed"]["equal"] and found["speed"]["bounds"] == {"our LoRA 4 / peft 4": 1.3}
        assert found["memory"]["bound"] == 0.45 and found["memory"]["runs"].keys() == {"ours 4", "our LoRA 4"}
    else:
        assert (
            len(found["ms_a_token"]) == 6 and "| ms a token, window | micro-batch 2 | " in out and "\n| 128 | " in out
        )


@pytest.mark.slow
def test_micro_batches_takes_a_model_folder_and_judges_it(tmp_path, base, data):
    words = ("--data_path", data, "--model", base, "--part", "memory", "--steps", 2, "--repeat", 1)
    _, err = run("micro_batches.py", *words, "--output", tmp_path / "out.json", code=1)  # libraries take most of it
    assert "Traceback" not in err and not json.loads((tmp_path / "out.json").read_text())["memory"]["passed"]


@pytest.mark.parametrize(
    ("preset", "found", "code"),
    [
        ("20m", {"passed": True}, 0),
        ("20m", {"passed": False}, 1),
        ("20m", {"passed": True, "equal": False}, 1),
        ("tiny", {"passed": False, "equal": True}, 0),
        ("tiny", {"passed": True, "equal": False}, 1),
    ],
)
def test_a_missed_bound_ends_with_1_and_tiny_judges_losses_alone(preset, found, code, load, monkeypatch, tmp_path):
    micro_batches = load("micro_batches")
    monkeypatch.setattr(micro_batches, "PARTS", {"speed": lambda args: found})
    monkeypatch.setattr(micro_batches, "make_model", lambda args: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, "num_parameters", lambda self: 0, raising=False)
    words = ["--preset", preset, "--data_path", "d", "--tokenizer", "t", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["micro_batches.py", *words])
    with pytest.raises(SystemExit) as end:
        micro_batches.main()
    assert end.value.code == code


def test_an_arm_that_fails_ends_the_script_with_1(load, capsys):
    common = load("common")
    done = []

    def measure(arm):
        done.append(arm)
        return {}["gone"] if arm == "two" else 1

    with pytest.raises(common.utils.UserError, match="error: two failed: 'gone'") as end:
        common.alternate(["one", "two", "three"], 2, measure)
    assert end.value.code == 1 and done == ["one", "two"] and "KeyError" in capsys.readouterr().err


def test_the_padded_memory_is_estimated_before_it_is_taken(load, monkeypatch, base, data):
    micro_batches = load("micro_batches")
    assert micro_batches.padded_bytes(10, 2, 3, 1, 1, 1) == 180 + 2 * (42 + 54)
    args = argparse.Namespace(model=None, preset="20m")
    rows = argparse.Namespace(input_ids=[range(100), range(400)])
    need = micro_batches.check_memory(args, rows)
    assert 6e9 < need < 10e9
    monkeypatch.setattr(micro_batches.common.utils, "free_host_memory", lambda: need - 1)
    with pytest.raises(micro_batches.common.utils.UserError, match="give a lower --memory_window than 400"):
        micro_batches.check_memory(args, rows)


def test_ratios_are_given_in_two_digits_with_their_spread(load):
    common = load("common")
    assert common.in_words(common.ratio([3, 2, 4.5], [2, 2, 2])) == "1.50 (1.00 to 2.25)"
    assert common.in_words({"median": 2309.4, "min": 900.0, "max": 2500.6}) == "2,309 (900 to 2,501)"


def test_rows_of_a_window_are_full(load):
    micro_batches = load("micro_batches")
    rows = argparse.Namespace(input_ids=[torch.arange(5), torch.arange(10, 17)])
    filled = micro_batches.fill_windows(rows, 8, 3)
    assert torch.cat(filled.input_ids)[:14].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16, 0, 1]
    assert [len(row) for row in filled.input_ids] == [8] * 3
    assert filled.labels[0].tolist() == [-100] * 4 + [4, 10, 11, 12]


# --- gpu.py ----------------------------------------------------------------------------------------------------------


def test_the_checks_of_a_gpu_pass_on_a_cpu(tmp_path):
    out, _ = run("gpu.py", "--tiny", "--part", "checks", "--output", tmp_path / "out.json")
    checks = json.loads((tmp_path / "out.json").read_text())["checks"]
    names = {f"{what}, {precision}" for what in ("losses", "attention") for precision in ("float32", "bf16")}
    assert checks.keys() == names and out.count("passed: ") == 4
    assert checks["attention, bf16"]["kernel"] == "sdpa" and checks["attention, bf16"]["others_move_no_bit"]


def test_an_arm_of_ours_runs_in_a_process_of_its_own(tmp_path):
    run("gpu.py", "--tiny", "--arm", "ours 32 x 1", "--layers", 2, "--output", tmp_path / "arm.json")
    arm = json.loads((tmp_path / "arm.json").read_text())
    assert len(arm["losses"]) == 2 and len(arm["step_seconds"]) == 1 and arm["parameters"] == 234816


@pytest.mark.slow
def test_the_whole_of_gpu_is_rehearsed_on_a_cpu(tmp_path, deepspeed_ready):
    out, _ = run("gpu.py", "--tiny", "--minutes", 14, "--output", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [name for name in result["checks"] if name.startswith("engine")] == [
        "engine single process",
        "engine FSDP",
        "engine ZeRO-3 with offload",
    ]
    assert len(result["speed"]["arms"]) == 8 and result["speed"]["best"].keys() == {"original", "ours"}
    assert result["speed"]["loss_difference"] < 1e-2 and result["not_run"] == {"check: overflow": "fp16 needs a GPU"}
    assert "nothing here was measured on a GPU" in out


def speed_alone(gpu, monkeypatch, tmp_path, measured, *words):
    """Run gpu.py's speed part with arms that are not trained; returns (exit code, the result)."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)  # bitsandbytes is there
    monkeypatch.setattr(gpu, "measure_arm", measured)
    words = ["gpu.py", "--tiny", "--part", "speed", "--output", str(tmp_path / "out.json"), *words]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return end.value.code, json.loads((tmp_path / "out.json").read_text())


def arm_of(**more):
    figures = {"losses": [3.0], "step_seconds": [2.0, 4.0], "parameters": 10, "tokens": 100, "wall_s": 0}
    return figures | {"gradient_checkpointing": False} | more


def test_a_failed_arm_is_named_and_the_others_are_measured(load, monkeypatch, tmp_path, capsys):
    gpu = load("gpu")

    def measure(name, args, checkpointing):
        return {"error": "boom", "wall_s": 0} if name == "ours 4 x 8" else arm_of(step_seconds=[1.0, gpu.ARMS[name][1]])

    code, result = speed_alone(gpu, monkeypatch, tmp_path, measure)
    assert code == 1 and "FAILED: ours 4 x 8: boom" in capsys.readouterr().out
    assert len(result["speed"]["arms"]) == 7 and result["speed"]["best"] == {
        "original": "original 4 x 8",
        "ours": "ours 16 x 2",
    }
    assert result["speed"]["ratio_of_the_best"] == {"median": (1 + 4 / 16) / 2, "min": 0.25, "max": 1}


def test_arms_without_time_are_named_and_no_failure(load, monkeypatch, tmp_path):
    gpu = load("gpu")
    code, result = speed_alone(gpu, monkeypatch, tmp_path, lambda *_: arm_of(wall_s=1000))
    assert code == 0 and len(result["speed"]["runs"]) == 1
    assert result["not_run"] == {f"arm: {name}": "no time left" for name in list(gpu.ARMS)[1:]}


def test_gradient_checkpointing_is_for_those_that_need_it(load, monkeypatch, tmp_path):
    gpu = load("gpu")
    asked = {}

    def measure(name, args, checkpointing):
        asked[name] = checkpointing
        return arm_of(gradient_checkpointing=name in ("original 4 x 8", "ours 32 x 1"))

    speed_alone(gpu, monkeypatch, tmp_path, measure)
    assert asked == {name: name in ("original 8 x 4", "original 16 x 2") for name in gpu.ARMS}


def test_an_arm_that_does_not_fit_starts_again_with_checkpointing(load, monkeypatch, tmp_path):
    gpu = load("gpu")
    tried = []

    def train(*arguments, gradient_checkpointing, **options):
        tried.append(gradient_checkpointing)
        if not gradient_checkpointing:
            raise torch.OutOfMemoryError("full")
        return {"losses": [1.0], "step_seconds": [1.0]}

    monkeypatch.setattr(gpu.common, "train_arm", train)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    words = {"arm": "ours 32 x 1", "tiny": True, "preset": "tiny", "layers": 2, "steps": 1, "skip": 0}
    words |= {"data_path": None, "tokenizer": None, "checkpointing": False, "output": tmp_path / "arm.json"}
    gpu.train_in_process(argparse.Namespace(**words))
    assert tried == [False, True] and json.loads((tmp_path / "arm.json").read_text())["gradient_checkpointing"] is True
    tried.clear()
    monkeypatch.setattr(gpu.common, "train_arm", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(RuntimeError, match="does not fit"):
        gpu.train_in_process(argparse.Namespace(**words))


def test_as_many_layers_as_fit(load):
    gpu = load("gpu")
    gib = gpu.common.utils.GIB
    assert gpu.layers_that_fit("7b", 138 * gib) == 32 and 14 <= gpu.layers_that_fit("7b", 78 * gib) <= 18
    with pytest.raises(gpu.common.utils.UserError, match="no layer fits"):
        gpu.layers_that_fit("7b", 16 * gib)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(load):
    gpu = load("gpu")
    start = gpu.time.perf_counter()
    code, said = gpu.run_process(["sh", "-c", "echo here >&2; sleep 60 & sleep 60"], start + 2)
    assert code is None and said == "here\n" and gpu.time.perf_counter() - start < 20
    assert gpu.run_process(["sh", "-c", "exit 3"], start + 60) == (3, "")


def test_without_a_gpu_it_says_so():
    assert run("gpu.py", code=2)[1].endswith("error: no GPU here; the way through the script needs none: give --tiny\n")


# --- The others ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preprocessing_compares_three_ways(tmp_path, data, model_file):
    words = ("--data_path", data, "--tokenizer", model_file, "--tiny", "--repeat", 2, "--output", tmp_path / "out.json")
    out, _ = run("preprocessing.py", *words)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rows_that_differ"] == {"batched": 0, "ours": 0} and NOT_JUDGED in out
    assert [len(result["cpu_seconds"][way]) for way in ("original", "batched", "ours")] == [2, 2, 2]


@pytest.mark.slow
def test_generation_compares_three_filters(tmp_path):
    lines = (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()[:48]  # no two of which are alike
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": json.loads(line)["instruction"]} for line in lines]))
    words = ("--data_path", data, "--repeat", 1, "--candidates", 1, "--output", tmp_path / "out.json")
    out, _ = run("generation.py", *words, "--tiny")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["scores_agree"] and result["replay"]["kept"] == 48 and NOT_JUDGED in out
    assert result["cpu_seconds_a_candidate"].keys() == {"original", "plain", "ours"}
    out, _ = run("generation.py", *words, code=1)  # a small pool is no place to be fast
    assert "plain / ours: " in out and NOT_JUDGED not in out


@pytest.mark.slow
def test_convert_runs_with_and_without_a_peer(tmp_path, data, model_file):
    words = ("--work_dir", tmp_path / "work", "--size", "tiny", "--repeat", 1, "--output", tmp_path / "out.json")
    run("convert.py", *words)
    assert json.loads((tmp_path / "out.json").read_text())["figures"].keys() == {"cp + sync", "ours"}
    script, ours = "peer.py", ROOT / "convert_llama_weights.py"
    python = fake_python(tmp_path / "python", ours, 'set -- "$2" "$3" "$4" "$5" --tokenizer none')
    peer = ("--peer_python", python, "--peer_script", script)
    run("convert.py", *words, "--tokenizer", model_file, "--data_path", data, *peer)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["figures"].keys() == {"cp + sync", "ours", "peer"} and set(result["ids_that_differ"].values()) == {0}
    _, err = run("convert.py", *words, "--peer_python", "false", "--peer_script", script, code=1)
    assert "error: peer failed: false ended with 1" in err and not (tmp_path / "work").exists()


@pytest.mark.slow
def test_deltas_runs_with_and_without_a_peer(tmp_path, model_file):
    words = ("--work_dir", tmp_path / "work", "--size", "tiny", "--repeat", 1, "--output", tmp_path / "out.json")
    run("deltas.py", *words)
    assert json.loads((tmp_path / "out.json").read_text())["equal"] == {"ours, .bin": "39 of 39"}
    python = fake_python(tmp_path / "python", ROOT / "apply_delta.py", "shift 2")
    run("deltas.py", *words, "--tokenizer", model_file, "--peer_python", python)
    equal = json.loads((tmp_path / "out.json").read_text())["equal"]
    assert equal == dict.fromkeys(("ours, .bin", "FastChat", "FastChat --low-cpu-mem"), "39 of 39")
    _, err = run("deltas.py", *words, "--peer_python", "false", code=1)
    assert "error: FastChat failed: false ended with 1" in err


@pytest.mark.slow
def test_real_data_is_checked_row_by_row(data, model_file):
    out, _ = run("check_real_data.py", "--data_path", data, "--tokenizer", model_file)
    assert out.startswith("70 read, 70 kept, 0 dropped\nrows whose ids or labels differ from the original's: 0 []\n")


@pytest.mark.slow
def test_a_real_run_learns_alike_on_both_engines(tmp_path, model_file, deepspeed_ready):
    data = tmp_path / "records.json"
    data.write_text(json.dumps(make_records(48)), encoding="utf-8")
    words = (
        "--data_path",
        data,
        "--tokenizer",
        model_file,
        "--rows",
        48,
        "--accumulation",
        1,
        "--output",
        tmp_path / "o",
    )
    run("real_run.py", *words, "--micro_batch", 2, "--work_dir", tmp_path / "work")
    result = json.loads((tmp_path / "o").read_text())
    assert result["engines"].keys() == {"FSDP", "ZeRO-3 with offload"} and result["steps"] == 12
    _, err = run("real_run.py", *words, "--micro_batch", 0, "--work_dir", tmp_path / "other", code=1)
    assert "error: FSDP failed: " in err


# --- real_model.py ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_model_trains_by_both_methods_and_compares(tmp_path, base, data):
    words = (
        "--data_path",
        data,
        "--work_dir",
        tmp_path / "w",
        "--model",
        base,
        "--rows",
        32,
        "--held_out",
        8,
        "--tiny",
    )
    out, _ = run("real_model.py", *words, "--accumulation", 1, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["methods"]
    assert found.keys() == {"all weights", "LoRA"} and all(one["steps"] == 4 for one in found.values())
    assert found["LoRA"]["before"] == pytest.approx(found["all weights"]["before"], abs=2e-2)
    held_out = json.loads((tmp_path / "w" / "held_out.json").read_text())
    trained = json.loads((tmp_path / "w" / "records.json").read_text())
    assert (len(held_out), len(trained)) == (8, 32) and not any(record in trained for record in held_out)
    assert "| LoRA | " in out and NOT_JUDGED in out
