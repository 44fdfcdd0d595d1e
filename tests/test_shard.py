"""--shard and several machines: the same weights as one process, whatever happens on the way. (That each stage's sharded
step equals one process's is in test_stages.py, beside DistributedDataParallel's.)"""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, free_port, python, ranks, run, torchrun, weights_apart, without_gpu

import wan_causal as wc

TINY = ROOT / "tests/tiny"
SMALL = ["--frames", 13, "--height", 32, "--width", 32, "--lr", 1e-4, "--sample-every", 0, "--save-every", 1]
STAGES = {
    "distill_dmd": ["distill_dmd.py", "--student", "causal", "--history", "self-forcing", "--ratio", 1, *SMALL],
    "cm_grpo": ["cm_grpo.py", "--group", 2, "--prompts-per-step", 1, "--lora-rank", 4, "--chunk", 3, "--rewards",
                "imagereward=1", *SMALL],
}


def trained(folder):
    """The generator's weights in a run's state."""
    return torch.load(folder / "state.pt", weights_only=True)["parts"]["generator"]


def apart(a, b):
    """How far two runs' weights are from each other, in parts of how far the first has come."""
    a, b = trained(a), trained(b)
    start = wc.load_dit(TINY)
    wc.load_checkpoint(start, TINY / "ode.safetensors")
    return weights_apart(a, b, start.state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_a_sharded_run_goes_on_with_another_number_of_processes(stage, tmp_path):
    """Two processes, one, and for one stage three sharded ones, whose shares are uneven: to the weights of one alone."""
    args = [*STAGES[stage], "--init", TINY / "ode.safetensors"]
    if stage == "cm_grpo":
        args[args.index("--group") + 1] = 6
    steps = 3 if stage == "distill_dmd" else 2
    with ThreadPoolExecutor() as side_by_side:
        whole = side_by_side.submit(run, *args, "--batch", 6, "--steps", steps, "--out", tmp_path / "whole")
        mixed = [ranks(2, *args, "--shard", "--batch", 3, "--steps", 1, "--out", tmp_path / "mixed"),
                 run(*args, "--resume", "--batch", 6, "--steps", 2, "--out", tmp_path / "mixed")]
        if steps == 3:
            mixed.append(ranks(3, *args, "--resume", "--shard", "--batch", 2, "--steps", 3, "--out",
                               tmp_path / "mixed"))
    for done in (whole.result(), *mixed):
        assert done.returncode == 0, done.stderr[-2000:]
    assert apart(tmp_path / "whole", tmp_path / "mixed") < 2e-2
    state = torch.load(tmp_path / "mixed/state.pt", weights_only=True)["parts"]
    assert all(type(x) is torch.Tensor for x in state["ema"].values())  # whole, for any reader


def test_shares_come_together_whatever_their_sizes(tmp_path):
    """Also where some processes have fewer rows, or none; and what is kept holds nothing besides."""
    (tmp_path / "shares.py").write_text(
        "import torch, wan_causal as wc\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "def main():\n"
        "    with wc.processes('cpu', shard=True) as process:\n"
        "        mesh = init_device_mesh('cpu', (3,))\n"
        "        for n in (1, 2, 3, 4, 5, 7):\n"
        "            x = torch.arange(2.0 * n).view(n, 2)\n"
        "            y = process.whole({'a': [distribute_tensor(x, mesh, [Shard(0)]), 'other']})['a']\n"
        "            assert y[1] == 'other'\n"
        "            if process.rank:\n"
        "                assert y[0] is None\n"
        "            else:\n"
        "                assert torch.equal(y[0], x) and y[0].untyped_storage().nbytes() == x.nbytes\n"
        "wc.run_script(main)\n")
    done = ranks(3, tmp_path / "shares.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_two_machines_equal_one_process(tmp_path):
    """torchrun --nnodes 2, both machines being this one: one process each, sharded."""
    args = ["reward_forcing.py", *SMALL, "--init", TINY / "ode.safetensors", "--steps", 2]
    machine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test", "--local_addr=127.0.0.1", *args, "--batch", 1,
               "--shard", "--out", tmp_path / "two"]
    both = [subprocess.Popen(list(map(str, machine)), cwd=ROOT, env=without_gpu(None), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    one = run(*args, "--batch", 2, "--out", tmp_path / "one")
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and one.returncode == 0, said
    assert "x 2 processes" in "".join(said)
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-2


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Whoever waits for it in a collective is ended by the launcher, which says who died and how."""
    (tmp_path / "mine.py").write_text("import os\ndef die(video, prompts):\n    if os.environ['RANK'] == '1':\n"
                                      "        os.kill(os.getpid(), 9)\n    return video.mean((1, 2, 3, 4))\n")
    done = torchrun(2, "reward_forcing.py", *SMALL, "--init", TINY / "ode.safetensors", "--steps", 2, "--batch", 1,
                    "--shard", "--reward", "mine:die", "--out", tmp_path / "run", env={"PYTHONPATH": str(tmp_path)},
                    timeout=600)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr and not (tmp_path / "run/state.pt").exists()


def test_processes_with_different_weights_are_refused(tmp_path):
    code = ("import torch, wan_causal as wc\n"
            "def main():\n"
            "    with wc.processes('cpu', shard=True) as process:\n"
            "        net = wc.load_dit('tests/tiny')\n"
            "        net.head.head.bias.data[0] += process.rank\n"
            "        process.wrap(net)\n"
            "wc.run_script(main)\n")
    (tmp_path / "differ.py").write_text(code)
    done = ranks(2, tmp_path / "differ.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode != 0 and "error: the processes hold different weights" in done.stderr


def test_one_process_has_nothing_to_share():
    done = python("reward_forcing.py", "--init", TINY / "ode.safetensors", "--shard", "--out", "/nowhere")
    assert done.returncode == 2 and "error: --shard needs several processes: start with torchrun" in done.stderr
