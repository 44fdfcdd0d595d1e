"""Faults of users and machines: full disks, kills, two runs in one folder, closed pipes, flags and files that make no
sense. Each ends in one sentence that names the cause, and what was there before is still there."""
import datetime
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, each_rank, free_port, python, run, start_script, torchrun
from safetensors.torch import load_file

import cm_grpo
import distill_dmd
import eval_vbench
import generate
import ode_init
import reward_forcing
import wan_causal as wc

TINY = ROOT / "tests/tiny"
PROMPT = "a red circle"


def error_of(done, code=2):
    """The only sentence of a script that failed."""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode == code and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert sum("error: " in line for line in lines) == 1  # it stands glued to nothing
    return errors[0].removeprefix("error: ")


# ----------------------------------------------------------------------------------------------------------- flags

TRAIN = {"dmd": (distill_dmd, []), "ode": (ode_init, ["train"]), "sample": (ode_init, ["sample"]),
         "reward": (reward_forcing, ["--init", "x"]), "grpo": (cm_grpo, ["--init", "x"]),
         "causal": (distill_dmd, ["--student", "causal", "--init", "x"]), "generate": (generate, ["a cat"]),
         "scores": (eval_vbench, ["score"]), "suite": (eval_vbench, ["sample"])}
REFUSED = [
    ("dmd --lr -1", "--lr: -1 must be at least 0"), ("dmd --lr inf", "--lr: inf is no number"),
    ("generate --checkpoint=", "--checkpoint is empty"), ("scores --videos=", "--videos is empty"),
    ("reward --prompts=", "--prompts is empty"),
    ("dmd --lr=1e400", "--lr: 1e400 is no number"), ("dmd --beta1 1", "--beta1: 1 must be less than 1"),
    ("dmd --grad-clip -1", "--grad-clip: -1 must be more than 0"), ("dmd --ema 2", "--ema: 2 must be less than 1"),
    ("dmd --weight-decay -1", "--weight-decay: -1 must be at least 0"), ("dmd --ema-start -1", "must be at least 0"),
    ("dmd --frames 5001", "--frames: 5001 must be at most 4093"), ("dmd --width 32768", "must be at most 16384"),
    ("dmd --steps 1.5", "--steps: 1.5 is no whole number"), ("dmd --batch x", "--batch: x is no whole number"),
    ("dmd --critic-lr -1", "--critic-lr: -1"), ("dmd --reward-weight nan", "--reward-weight: nan is no number"),
    ("dmd --student sideways", "--student: invalid choice"), ("dmd --nothing", "unrecognized arguments: --nothing"),
    ("grpo --rewards motion=inf", "--rewards: inf is no number"), ("grpo --kl -1", "--kl: -1 must be at least 0"),
    ("grpo --em-noise 0.5", "--em-noise 0.5 has no effect here: it is that of --policy em"),
    ("grpo --clip-model x", "--clip-model x has no effect here"),
    ("grpo --rewards motion --reward-model x", "--reward-model x has no effect here: imagereward=WEIGHT is not"),
    ("grpo --lora-rank 0 --lora-alpha 2", "--lora-alpha 2.0 has no effect here"),
    ("dmd --reward-model x", "--reward-model x has no effect here: no --reward-weight is given"),
    ("causal --guidance 1 --negative x", "--negative x has no effect here: --guidance 1 needs none"),
    ("sample --guidance 1 --negative x", "--negative x has no effect here"), ("sample --count 0", "--count: 0 must be"),
    ("reward --reward mine:f --reward-model x", "--reward-model x has no effect here: the reward is mine:f"),
    ("generate --bidirectional --no-ema", "--no-ema has no effect here: there are no weights"),
    ("generate --overlap 3", "--overlap 3 has no effect here: 57 frames are one segment of 57"),
    ("generate --seed 1e3", "--seed: 1e3 is no whole number"), ("generate --timesteps 1000 1001", "must be at most"),
    ("scores --vbench-gpus 0", "--vbench-gpus: 0 must be at least 1"), ("suite --seed -1", "--seed: -1 must be"),
]


@pytest.mark.quick
@pytest.mark.parametrize("line, words", REFUSED)
def test_flags_out_of_range_or_without_effect(line, words):
    which, *flags = line.split()
    script, before = TRAIN[which]
    with pytest.raises(wc.InputError) as refused:
        script.parse_args([*before, *flags])
    assert words in str(refused.value)


@pytest.mark.quick
def test_what_comes_behind_two_dashes_is_a_prompt():
    """And the model's defaults still hold."""
    args = generate.parse_args(["--model", str(TINY), "--fps", "8", "--", "-a cat"])
    assert (args.prompt, args.frames, args.fps, args.width) == (["-a cat"], 57, 8, 64)


@pytest.mark.quick
@pytest.mark.parametrize("content, words", [
    ({"lr": [1, 2]}, "--lr cannot be [1, 2]"), ({"lr": None}, "--lr cannot be null"), ({"lr": "much"}, "much is no number"),
    ({"negative": None}, "--negative cannot be null"), ({"distill_dmd bidirectional": 3}, "is not {flag: value"),
    ({"negative": "x" * 300, "lr": None}, "--lr cannot be null"), ({"checkpoint": 3}, "checkpoint = 3 is no name of a file"),
    ({"batch": True}, "--batch"), ({"batch": 0}, "--batch: 0 must be at least 1"), ([], "must hold an object")])
def test_defaults_of_a_model_are_checked_as_flags(content, words, tmp_path):
    (tmp_path / "defaults.json").write_text(json.dumps(content))
    with pytest.raises(wc.InputError) as refused:
        distill_dmd.parse_args(["--model", str(tmp_path)])
    assert str(tmp_path / "defaults.json") in str(refused.value) and words in str(refused.value)
    assert distill_dmd.parse_args(["--model", "x"]).lr == 2e-6  # and so are those of the paper


@pytest.mark.quick
def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = distill_dmd.parse_args(["--out=~/runs/x", "--held-out", "~/y", "--model", "~other"])
    assert (args.out, args.held_out, args.model) == ("/home/me/runs/x", "/home/me/y", "~other")


# -------------------------------------------------------------------------------------------------------- machines

@pytest.mark.quick
@pytest.mark.parametrize("fault, words", [
    (lambda: torch.empty(1 << 60), "no memory left, take a smaller --batch"),
    (lambda: np.empty(1 << 55, np.uint8), "no memory left"),
    (lambda: print("x", file=open("/dev/full", "w"), flush=True), "No space left on device"),
    (lambda: open("x" * 300), "File name too long")])
def test_what_the_machine_lacks_is_said(fault, words, capsys):
    with pytest.raises(SystemExit) as stop:
        wc.run_script(fault)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.quick
def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        wc.run_script(lambda: 1 / 0)
    with pytest.raises(FileNotFoundError):
        wc.run_script(lambda: open("/no/such/file"))


@pytest.mark.quick
def test_a_script_without_a_terminal_or_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    wc.run_script(lambda: print("x"))


@pytest.mark.quick
def test_processes_that_do_not_meet(monkeypatch):
    for key, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(wc, "MEETING", datetime.timedelta(seconds=1))
    with pytest.raises(wc.InputError, match="2 processes were to meet at 127.0.0.1:.*start them all, or unset WORLD_SIZE"):
        with wc.processes("cpu"):
            pass


@pytest.mark.quick
@pytest.mark.parametrize("device, env", [("cuda:1", {"LOCAL_RANK": "0"}), ("cuda", {})])
def test_two_processes_on_one_gpu_are_refused(device, env, monkeypatch):
    world = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in {**world, **env}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(wc.InputError, match="each process takes a GPU of its own"):
        with wc.processes(device):
            pass


@pytest.mark.quick
def test_a_folder_that_can_be_written_to_is_left_as_it_is(tmp_path):
    (tmp_path / ".probe").write_text("mine")
    wc.check_writable(tmp_path)
    assert (tmp_path / ".probe").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.quick
@pytest.mark.parametrize("env", [{"WORLD_SIZE": "4"}, {"RANK": "3"}, {"WORLD_SIZE": "2", "RANK": "1"},
                                 {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
                                 {"WORLD_SIZE": "many", "RANK": "0"}, {"RANK": "-1"}])
def test_half_of_what_torchrun_sets_is_refused(env, monkeypatch):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(wc.InputError, match="which is not what torchrun sets: start with torchrun, or unset it"):
        with wc.processes("cpu"):
            pass


@pytest.mark.quick
def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        wc.save_checkpoint(tmp_path / "x.safetensors", {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.ones(())},
                           stage="test")
        assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    state = load_file(tmp_path / "x.safetensors")
    assert torch.equal(state["b"], torch.ones(3, dtype=torch.bfloat16)) and state["a"].shape == ()
    assert wc.read_weights(tmp_path / "x.safetensors")[1] == {"stage": "test"}


# ---------------------------------------------------------------------------------------------------------- videos

@pytest.mark.quick
@pytest.mark.parametrize("flags, words", [
    (["x.avi"], "--out x.avi: videos are written as .mp4 files"), ([f"{'x' * 252}.mp4"], "File name too long"),
    (["x.TS"], "--out x.TS: videos are written as .mp4 files"), (["folder.mp4"], "folder.mp4 is a folder"),
    ([f"{'x' * 300}/"], "File name too long")])
def test_names_that_cannot_be_are_refused_before_any_model(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(wc.InputError, match=words):
        generate.read_jobs(generate.parse_args([PROMPT, "--model", str(TINY), "--out", *flags]))


@pytest.mark.quick
@pytest.mark.parametrize("job, words", [
    ({"out": "a.gif"}, "names no .mp4 file"), ({"out": "a\0.mp4"}, "names no .mp4 file"), ({"out": "./b.mp4"}, "several"),
    ({"prompt": "\udcff"}, "is no UTF-8 text"), ({"out": "\ud800.mp4"}, "must hold lines such as"),
    ({"out": "~nobodyofthisname/a.mp4", "seed": 1.7}, "a whole number"), ({"seed": float("inf")}, "a whole number"),
    ({"seed": True}, "a whole number"), ({"prompt": None}, "must be a text"), ({"prompt": ["a"]}, "must be a text"),
    ({"frames": 33}, "has other keys")])
def test_jobs_that_cannot_be_are_refused_before_any_model(job, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [{"prompt": "a cat", "seed": 0, "out": "b.mp4"}, {"prompt": "a dog", "seed": 1, "out": "c.mp4", **job}]
    (tmp_path / "jobs").write_text("\n".join(map(json.dumps, jobs)))
    with pytest.raises(wc.InputError, match=words):
        generate.read_jobs(generate.parse_args(["--model", str(TINY), "--jobs", "jobs"]))


@pytest.mark.quick
def test_captions_that_cannot_name_a_video_are_refused(tmp_path):
    for text in ("../cat", "a\0cat", "c" * 231):
        (tmp_path / "captions.txt").write_text(f"a dog\n{text}\n")
        with pytest.raises(wc.InputError, match="the prompt of entry 1 cannot be a file name|it holds zero bytes"):
            eval_vbench.sampling_suite(eval_vbench.parse_args(["sample", "--held-out", str(tmp_path / "captions.txt")]))


def test_a_video_is_whole_or_not_there_and_a_broken_one_is_made_again(tmp_path):
    """Also: the longest name there can be, and a folder of one's own to stand in."""
    long = tmp_path / f"{'x' * 251}.mp4"
    full = run("generate.py", PROMPT, "--out", long, limits={resource.RLIMIT_FSIZE: 8192}, folder="/")
    assert "cannot write" in error_of(full) and not any(tmp_path.iterdir())
    good, cut, text = (tmp_path / f"{name}.mp4" for name in ("good", "cut", "text"))
    imageio.mimwrite(good, [np.zeros((64, 64, 3), np.uint8)] * 5, macro_block_size=2)
    cut.write_bytes(good.read_bytes()[:800]), text.write_text("no video")
    before = good.read_bytes()
    (tmp_path / "jobs").write_text("\n".join(json.dumps({"prompt": PROMPT, "seed": 0, "out": str(path)})
                                             for path in (good, cut, text, long)))
    done = run("generate.py", "--jobs", tmp_path / "jobs", "--frames", 9, folder="/")
    assert done.returncode == 0 and "4 videos, 3 of them to be made" in done.stdout, done.stderr
    assert good.read_bytes() == before and [wc.frames_in(path) for path in (good, cut, text, long)] == [5, 9, 9, 9]


@pytest.mark.quick
@pytest.mark.parametrize("script", ["generate.py", "distill_dmd.py", "eval_vbench.py"])
def test_ctrl_c_while_importing(script, tmp_path):
    """Importing takes seconds, in which nothing of ours has begun."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    done = python(script, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 130 and done.stderr == "error: stopped by Ctrl-C\n", done.stderr


def test_without_ffmpeg(tmp_path):
    done = run("generate.py", PROMPT, "--frames", 5, "--out", tmp_path, env={"IMAGEIO_FFMPEG_EXE": "/no/ffmpeg"})
    assert "videos cannot be written (FileNotFoundError: " in error_of(done) and not any(tmp_path.iterdir())
    done = run("reward_forcing.py", "--out", tmp_path / "run", env={"IMAGEIO_FFMPEG_EXE": "/no/ffmpeg"})
    assert "videos cannot be written (FileNotFoundError: " in error_of(done) and not any(tmp_path.iterdir())  # before any model is loaded


def test_a_closed_pipe(tmp_path):
    done = subprocess.run(["bash", "-c", f"{sys.executable} generate.py cat dog --frames 5 --out {tmp_path} | head -1; "
                           "exit ${PIPESTATUS[0]}"], capture_output=True, text=True, cwd=ROOT)
    assert "the pipe that the output goes to is closed" in error_of(done) and done.stdout.startswith("timesteps")


# -------------------------------------------------------------------------------------------------------- training

RUN = ["reward_forcing.py", "--init", TINY / "ode.safetensors", "--frames", 5, "--chunk", 1, "--height", 32, "--width",
       32, "--batch", 1, "--sample-every", 0, "--save-every", 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    done = run(*RUN, "--steps", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_state_before_it(trained):
    before = contents(trained)
    assert set(before) == {"state.pt", "model.safetensors", "metrics.jsonl", "settings.json", ".lock"}
    done = run(*RUN, "--steps", 2, "--out", trained, "--resume", limits={resource.RLIMIT_FSIZE: 30_000_000})
    assert error_of(done) == f"cannot write {trained / 'state.pt'}: no space left"
    after = contents(trained)
    assert set(after) == set(before) and all(after[key] == before[key] for key in ("state.pt", "model.safetensors"))


def test_one_run_in_one_folder(trained):
    """A second one is refused while the first one lives, however it ends; Ctrl-C is one sentence."""
    log, err = trained.parent / "log", trained.parent / "err"
    first = start_script(log, err, *RUN, "--steps", 1000, "--save-every", 1000, "--out", trained, "--resume")
    try:
        while first.is_alive() and not (log.exists() and "step " in log.read_text()):
            time.sleep(0.05)
        second = run(*RUN, "--steps", 3, "--out", trained, "--resume")
        assert f"another process trains in {trained}" in error_of(second)
        os.kill(first.pid, signal.SIGINT)
        first.join()
    finally:
        first.kill()
    assert first.exitcode == 130 and err.read_text().splitlines()[-1] == "error: stopped by Ctrl-C", err.read_text()
    before = contents(trained)
    done = run(*RUN, "--steps", 1, "--out", trained, "--resume")
    assert done.returncode == 0, done.stderr
    told = ("metrics.jsonl", "settings.json")  # which a run writes anew when it is gone on with
    assert {k: v for k, v in contents(trained).items() if k not in told} == \
        {k: v for k, v in before.items() if k not in told}


class Loses:
    """What arises in its destructor, Python drops."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_gets_lost_ends_the_run_at_the_next_step(resumed, capfd, monkeypatch):
    begun, steps = resumed(lambda state, log: None), []
    begun.step, begun.args.steps = 0, 3

    def main():
        for step in begun.steps():
            steps.append(step)
            if step == 1:
                Loses()
    monkeypatch.setattr(wc, "INTERRUPTS", [])
    usual = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            wc.run_script(main)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert end.value.code == 130 and capfd.readouterr().err.splitlines()[-1] == "error: stopped by Ctrl-C"
    assert steps == [0, 1]


def test_a_result_is_not_written_over_where_the_state_is_gone(trained, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    for flags in ([], ["--resume"]):
        args = reward_forcing.parse_args([*map(str, RUN[1:]), "--out", str(tmp_path), *flags])
        with wc.processes("cpu") as process, pytest.raises(wc.InputError, match="a run whose state.pt is gone"):
            wc.claim_folder(args, process)
    assert list(contents(tmp_path)) == ["model.safetensors"]


def test_a_run_that_diverges_saves_nothing(tmp_path):
    done = run(*RUN, "--steps", 2, "--out", tmp_path, "--lr", 1e40)
    assert "the weights are not finite after step 1; no step was saved; try a lower --lr" in error_of(done)
    assert set(contents(tmp_path)) == {"metrics.jsonl", "settings.json", ".lock"}


def test_processes_that_do_not_see_one_folder(tmp_path):
    """Machines without common storage: one resumes, the other would begin anew."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    done = run(*RUN, "--steps", 1, "--accum", 2, "--out", "run", folder=tmp_path / "0")  # as many samples as two processes
    assert done.returncode == 0, done.stderr
    for one in each_rank(2, *RUN, "--steps", 2, "--resume", "--out", "run", folders=[tmp_path / "0", tmp_path / "1"]):
        assert one.returncode == 2 and "not every process sees the run in run: --out must lie on" in one.stderr


@pytest.mark.quick
def test_a_run_goes_on_with_the_same_prompts_only(tmp_path):
    file, model = tmp_path / "prompts.txt", torch.nn.Linear(2, 1)

    def begin(prompts):
        file.write_text("\n".join(prompts))
        args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path / "run"), "--prompts", str(file), "--resume"])
        wc.read_prompts(args)
        with wc.processes("cpu") as process:
            (tmp_path / "run").mkdir(exist_ok=True)
            return wc.Run("test", args, process, [], net=model)
    begin("abcdef").save({"x": torch.ones(2)}, [1000.0])
    begin("abcdef")
    with pytest.raises(wc.InputError, match="was begun with prompts_hash = [0-9a-f]{16}, not [0-9a-f]{16}"):
        begin("abcdeg")


@pytest.mark.quick
def test_a_first_save_that_is_interrupted_leaves_nothing_that_stops_the_next_run(tmp_path, monkeypatch):
    args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path), "--keep-every", "50"])
    args.prompts_hash = ""
    with wc.processes("cpu") as process:
        wc.claim_folder(args, process)
        run = wc.Run("test", args, process, [], net=torch.nn.Linear(2, 2))
        run.step, real = 50, os.fsync
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.save({"x": torch.ones(2)}, [1000.0])
        monkeypatch.setattr(os, "fsync", real)
        assert not any("safetensors" in file.name or "state" in file.name for file in tmp_path.iterdir())
        process.lock.close()
        wc.claim_folder(args, process)
        run.save({"x": torch.ones(2)}, [1000.0])
        assert {"model.safetensors", "model_000050.safetensors", "state.pt"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.quick
def test_a_disk_too_small_is_known_before_the_first_step(tmp_path, monkeypatch):
    args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path)])
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB, and 8 of AdamW's
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=11_900_000))
    with wc.processes("cpu") as process, pytest.raises(wc.InputError, match="has 0.01 GB free, but a state to resume"):
        wc.Run("test", args, process, [], net=model, optimizer=torch.optim.AdamW(model.parameters()))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=12_100_000))
    with wc.processes("cpu") as process:
        wc.Run("test", args, process, [], net=model, optimizer=torch.optim.AdamW(model.parameters()))


@pytest.mark.quick
def test_a_folder_of_any_name_but_of_no_other_program(tmp_path):
    out = tmp_path / os.fsdecode(b"sr\xff")
    args = reward_forcing.parse_args(["--init", "x", "--out", str(out)])
    with wc.processes("cpu") as process:
        wc.claim_folder(args, process)
        wc.Run("test", args, process, [], net=torch.nn.Linear(1, 1))
        process.lock.close()
    (out / "settings.json").write_text('{"editor.fontSize": 14}')
    with wc.processes("cpu") as process, pytest.raises(wc.InputError, match="settings.json is not of a training run"):
        wc.claim_folder(args, process)


@pytest.fixture
def resumed(tmp_path):
    """A function: what is done to the files of a run of two steps -> it is gone on with."""
    def resume(change):
        def begin():
            args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path), "--resume"])
            with wc.processes("cpu") as process:
                wc.claim_folder(args, process)
                model = torch.nn.Linear(2, 1)
                run = wc.Run("test", args, process, [], net=model, ema=wc.EMA(model, 0.9))
                process.lock.close()
                return run
        begun = begin()
        for begun.step in (1, 2):
            begun.began = 0
            begun.report(loss=1.0)
        begun.save({"x": torch.ones(2)}, [1000.0])
        change(tmp_path / "state.pt", tmp_path / "metrics.jsonl")
        return begin()
    return resume


def without(*names):
    """A change of state.pt: it lacks something."""
    def change(state, log):
        content = part = torch.load(state, weights_only=True)
        for name in names[:-1]:
            part = part[name]
        del part[names[-1]]
        torch.save(content, state)
    return change


@pytest.mark.quick
@pytest.mark.parametrize("change", [lambda state, log: torch.save([1], state), without("step"), without("settings"),
                                    without("parts", "ema"), without("parts", "ema", "bias"),
                                    without("parts", "net", "bias")])
def test_a_state_that_holds_something_else(change, resumed):
    with pytest.raises(wc.InputError, match="state.pt does not hold the state of this run .*give another --out"):
        resumed(change)


@pytest.mark.quick
@pytest.mark.parametrize("content", [b"\xff\xfe\0", b'{"step": 1}\n{"st', b"[1]\n[2]\n", b"1\n"])
def test_a_log_that_holds_something_else(content, resumed):
    with pytest.raises(wc.InputError, match="metrics.jsonl is not a line of JSON for each step"):
        resumed(lambda state, log: log.write_bytes(content))


@pytest.mark.quick
def test_a_log_that_is_gone_or_goes_on_too_far(resumed):
    assert resumed(lambda state, log: log.unlink()).log.read_text() == ""


@pytest.mark.quick
def test_a_full_disk_under_the_log(tmp_path):
    with pytest.raises(wc.InputError, match="cannot write metrics.jsonl: no space left"):
        with wc.writing("metrics.jsonl"), open("/dev/full", "a") as file:
            file.write("x")


@pytest.mark.quick
def test_a_log_of_steps_to_come_is_cut(resumed):
    def go_on(state, log):
        log.write_text(log.read_text() + '{"step": 3, "loss": 1}\n{"step": 4, "lo')  # killed while it was written
    run = resumed(go_on)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [1, 2] and run.step == 2


@pytest.mark.quick
@pytest.mark.parametrize("shapes", [[(2, 3, 4), (2, 3, 5)], [(3, 3, 4)], [(2, 2, 4)], [(2,)]])
def test_trajectories_of_other_shapes(shapes, tmp_path):
    for i, shape in enumerate(shapes):
        ode_init.save_shard(ode_init.shard_path(tmp_path, 2 * i), torch.zeros(shape), ["a", "b"],
                            {"timesteps": [1000, 500]})
    with pytest.raises(wc.InputError, match="is not a shard of trajectories, or is damaged"):
        wc.Trajectories(tmp_path)


def test_under_torchrun_it_is_said_once(trained, tmp_path):
    """Both processes fail in the middle of the training, at the same step."""
    (tmp_path / "mine.py").write_text("def broken(video, prompts):\n    return video.mean(dim=(1, 2, 3, 4)) / 0\n")
    done = torchrun(2, *RUN, "--reward", "mine:broken", "--steps", 2, "--out", tmp_path / "out",
                    env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1  # torchrun's own
    done.returncode = 2
    done.stderr = done.stderr.partition("closing signal SIGTERM")[0].partition("failed (exitcode")[0]
    assert "reward is" in error_of(done) and "at step 1; no step was saved" in done.stderr
