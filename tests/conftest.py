"""Shared by the tests: the reference tensors, small random models, and running scripts as a user does."""
import faulthandler
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # several processes share few cores here
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be downloaded

import imageio
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

import wan_causal as wc  # noqa: E402


def golden_state(name):
    """(config, state dict) of one of the reference models."""
    path = GOLDEN / f"{name}_state_dict.safetensors"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), load_file(path)


# The sizes of the reference UMT5 encoder, whose file does not say them.
GOLDEN_T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="session")
def golden_dit():
    config, state = golden_state("dit")
    config = {k: v for k, v in config.items() if k not in ("qk_norm", "cross_attn_norm")}
    return wc.load_exactly(wc.WanModel(wc.WanConfig(**config)), state, "golden").eval().requires_grad_(False)


SMALL = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=8)


def random_dit(seed=0, **sizes):
    """A small DiT whose head is not zero, as it is at the start of training."""
    torch.manual_seed(seed)
    model = wc.WanModel(wc.WanConfig(**{**SMALL, **sizes}))
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float(p.mean() > 0.5), std=0.1)
    return model


def random_latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A script that a test runs is a process of its own, forked from a server that has imported the packages once: a new
# Python would take seconds for that each time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["imageio", "transformers.models.auto.tokenization_auto",
                               "transformers.models.blip.modeling_blip_text", "transformers.models.umt5.modeling_umt5"])


def frames_apart(a, b):
    """Mean difference of two videos, files or arrays, in levels. The same computation in other memory or by another
    kernel is rounded otherwise, which a video file makes visible: below 1; other videos are far above."""
    a, b = (np.stack(list(imageio.v3.imiter(x))) if isinstance(x, Path) else x for x in (a, b))
    return abs(a.astype(float) - b).mean() if a.shape == b.shape else np.inf


def weights_apart(a, b, start):
    """How far two runs' weights (state dicts, LoRA's parts among them) are from each other, in parts of how far the first
    has come from the model's state dict `start`; LoRA's B starts at zero."""
    moved = torch.cat([(a[k] - start.get(k, 0)).flatten() for k in a if k in start or ".lora_B." in k]).norm()
    return (torch.cat([(a[k] - b[k]).flatten() for k in a]).norm() / moved).item()


def without_gpu(env):
    """The environment of a script, with the variables `env` on top."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})}


def be_script(args, environment, out, err, limits, folder):
    """In the forked process: what `python SCRIPT ARGUMENTS` does in a folder, with its output in two files."""
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
        stream.reconfigure(line_buffering=True)
    faulthandler.enable()  # a crash in a library says where
    os.environ.clear()
    os.environ.update(environment)
    args[0] = str(ROOT / args[0])
    os.chdir(folder)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.argv = args
    sys.path[:0] = [str(Path(args[0]).parent), *filter(None, [environment.get("PYTHONPATH")])]
    runpy.run_path(args[0], run_name="__main__")


def start_script(out, err, *args, env=None, limits={}, folder=ROOT):
    """Start a script whose output goes to two files; returns the process. limits: {resource: what `ulimit` sets}."""
    process = SERVER.Process(target=be_script, args=([str(a) for a in args], without_gpu(env), out, err, limits, folder))
    process.start()
    return process


PATIENCE = 3600  # seconds, after which a script counts as hanging; machines may be busy


def run(*args, env=None, timeout=PATIENCE, **kwargs):
    """Run a script; returns the finished process as subprocess.run does."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_script(out, err, *args, env=env, **kwargs)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(args, timeout)
        return subprocess.CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def python(*args, env=None, timeout=PATIENCE):
    """The same by a Python of its own."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=timeout,
                          env=without_gpu(env))


def torchrun(processes, *args, **kwargs):
    """The same under torchrun with several processes."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *args, **kwargs)


def free_port():
    """A port that nobody listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def each_rank(processes, *args, env=None, folders=None):
    """The same in several processes with the variables that torchrun sets, but forked as in `run`: a tenth of the time.
    A list of what `run` returns. folders: where each of them runs."""
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
             "OMP_NUM_THREADS": "1", **(env or {})}
    with ThreadPoolExecutor(processes) as side_by_side:
        return list(side_by_side.map(
            lambda rank, folder: run(*args, env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder=folder),
            range(processes), folders or [ROOT] * processes))


def ranks(processes, *args, env=None):
    """`each_rank` as one process, whose messages are together, the first rank's first."""
    done = each_rank(processes, *args, env=env)
    return subprocess.CompletedProcess(args, max((p.returncode for p in done), key=abs),
                                       *("".join(texts) for texts in zip(*((p.stdout, p.stderr) for p in done))))


def alone_and_together(args, one, two, start=ranks):
    """A script with the flags `one` in one process and, at the same time, with `two` in two: both as `run` returns.
    start: `ranks` or `torchrun`."""
    with ThreadPoolExecutor() as side_by_side:
        alone = side_by_side.submit(run, *args, *one)
        together = start(2, *args, *two)
    return alone.result(), together


def pytest_configure(config):
    # a shell's job in the background ignores Ctrl-C, and so would the scripts that the tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "quick: a minute of tests that start no training")
