"""Shared by the tests: the reference tensors, small random models, and running scripts as a user does."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Idle threads must not spin: several processes share few cores here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be downloaded

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


def run(*args, env=None, cwd=ROOT, timeout=600):
    """Run a script with this Python, offline and on one thread; returns the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, cwd=cwd,
                          timeout=timeout)


def run_each(commands, env=None):
    """Run scripts one after the other in one process, which imports the packages once; returns them as `run` does."""
    code = f"""
import contextlib, io, json, runpy, sys
sys.path.insert(0, '.')
for sys.argv in {[[str(a) for a in command] for command in commands]!r}:
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        code = stop.code
    print(json.dumps([sys.argv, code, out.getvalue(), err.getvalue()]))
"""
    done = run("-c", code, env=env)
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(*json.loads(line)) for line in done.stdout.splitlines()]


def torchrun(processes, *args, **kwargs):
    """The same under torchrun with several processes."""
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *args, **kwargs)


def alone_and_under_torchrun(args, one, two):
    """A script with the flags `one` in one process and, at the same time, with `two` in two: both as `run` returns."""
    with ThreadPoolExecutor() as side_by_side:
        alone = side_by_side.submit(run, *args, *one)
        together = torchrun(2, *args, *two)
    return alone.result(), together
