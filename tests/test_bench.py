"""bench.py: its counts in closed form and against torch's, and simulated memory with real tensors as with fake ones."""
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import run
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench  # noqa: E402
import check  # noqa: E402
import wan_causal  # noqa: E402
from wan_causal import CONFIGS, WanModel, WanVAE, rewarded_video  # noqa: E402


@pytest.fixture(autouse=True)
def no_fake_table_is_kept():
    yield
    for table in (wan_causal.rope_axis, wan_causal.rope_table, wan_causal.per_channel):
        table.cache_clear()


def test_the_ledger_adds_up_what_is_alive():
    with FakeTensorMode(), bench.Ledger() as ledger:
        a = torch.zeros(1024)  # 4096 bytes
        b = a + 1
        view = b[:512]
        assert ledger.now == ledger.peak == 8192
        del a, b
        assert ledger.now == 4096  # the view keeps b alive
        small = torch.zeros(1)
        assert (ledger.now, ledger.peak) == (4096 + 512, 8192)
        del view, small
        assert ledger.now == 0


def test_what_reads_a_fake_tensor_gets_zeros():
    with FakeTensorMode(), bench.Unread():
        x = torch.ones(3)
        assert (x.sum().item(), float(x.sum()), bool(x.sum()), x.tolist()) == (0, 0, False, [0, 0, 0])
        assert isinstance(torch.randperm(3).tolist()[0], int)


def test_fake_tensors_take_the_memory_of_real_ones():
    """Two optimizer steps of a DiT with recomputed blocks in mixed precision."""
    config = dataclasses.replace(CONFIGS["tiny"], num_layers=1)

    def train():
        model = WanModel(config)
        model.checkpointing, model.autocast = True, torch.bfloat16
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            model(torch.randn(2, 16, 3, 8, 8), torch.ones(2), torch.zeros(2, 32, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def peak():
        with bench.Ledger() as ledger:
            train()
        return ledger.peak
    train()  # fills the tables that are kept
    real = peak()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = peak()
    weights = sum(p.numel() for p in WanModel(config).parameters())
    assert real > 16 * weights  # float32 weights, gradients, two moments
    assert abs(fake - real) < 0.02 * real


def test_the_rewards_graph_grows_by_the_decoders_memory_alone():
    """A latent frame more costs what the decoder remembers, not what it computes."""
    vae = WanVAE(4, num_res_blocks=1).eval().requires_grad_(False)
    vae.decoder.checkpointing = True

    def peak(frames, past):
        with bench.Ledger() as ledger:
            z = torch.zeros(2, 16, 7, 4, 4, requires_grad=True)
            rewarded_video(vae, z, frames, past).mean().backward()
        return ledger.peak
    memory, pixels = {}, 2 * 25 * 3 * 32 * 32 * 4  # bytes of the video
    vae.decode(torch.zeros(2, 16, 7, 4, 4), memory)
    remembered = sum(x.nbytes for x in memory.values() if torch.is_tensor(x))
    each = (peak([24], 5) - peak([24], 1)) / 4
    assert 0.9 * remembered < each < 1.3 * remembered
    assert peak(list(range(25)), None) - peak([24], None) < 3 * pixels
    assert peak(list(range(25)), 1) == peak(list(range(25)), None)  # the gradient is exact there too


def test_simulated_generation_takes_the_size_that_was_asked_for():
    config, mode = dataclasses.replace(CONFIGS["tiny"], num_layers=1), FakeTensorMode()

    def activations(size, batch):
        with mode, bench.Ledger() as ledger:
            bench.fake_generation(config, True, size, batch)
        return ledger.peak - weights
    weights = 2 * sum(p.numel() for make in (lambda: WanModel(config), WanVAE) for p in make().parameters())
    once = activations((64, 64, 25), 1)
    assert 1.9 * once < activations((64, 64, 25), 2) < 2.1 * once
    assert 1.9 * once < activations((64, 128, 25), 1) < 2.1 * once


def test_the_counted_operations_are_those_of_a_forward():
    """But for the embeddings and the head, which are a few percent."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config = dataclasses.replace(CONFIGS["tiny"], num_layers=12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which it counts
        WanModel(config)(torch.zeros(2, 16, 6, 8, 8), torch.zeros(2), torch.zeros(2, 32, 64))
    texts = 2 * 2 * config.num_layers * 2 * 32 * config.dim ** 2  # keys and values of the prompt, cached in a rollout
    assert 0.9 < (bench.dit_flops(config, 6 * 16, 6 * 16, 32, batch=2) + texts) / counter.get_total_flops() <= 1


def test_generate_prints_what_it_measured():
    done = run("tests/bench.py", "generate", "--size", "tiny", "--frames", 21, "--warmup", 0, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    rows = {line[:31].strip(): line[31:] for line in done.stdout.splitlines()}
    assert rows["attention"] and len(re.findall(r"\d+\.\d+", rows["DiT per chunk"])) == 2
    for name in ("text", "decoder per chunk", "first chunk", "end to end, without text", "DiT alone",
                 "limit of the DiT", "limit of the decoder", "least traffic of the DiT", "peak memory"):
        assert re.search(r"\d", rows[name]) or "not measured on a CPU" in rows[name]


def test_a_video_is_measured(tmp_path):
    done = run("tests/bench.py", "video", "--", "a red circle", "--frames", 21, "--out", tmp_path / "x.mp4")
    assert done.returncode == 0, done.stderr
    for row in ("text", "decoder", "DiT and writing", "first chunk, without text", "end to end, without text",
                "peak memory"):
        assert f"\n{row} " in done.stdout


def test_check_runs_everything_on_a_cpu(tmp_path):
    """The command for a card, here at the tiny size; it says what it saw in words, JSON and Markdown."""
    flags = ("--device", "cpu", "--warmup", 0, "--repeats", 1, "--frames", 9, "--out", tmp_path / "seen.json",
             "--only", "^(?!tiny)|raven|killed")  # the other stages run in tests of their own
    done = run("tests/bench.py", "check", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())["rows"]
    assert {row["part"] for row in seen} == {"correctness", "stages", "speed"} and all(row["passed"] for row in seen)
    assert sum(row["name"].startswith("gradient, ") for row in seen) == 6
    assert sum(row["name"].startswith("tiny: ") for row in seen) == 2
    assert f"| {seen[0]['name']} | pass | {seen[0]['figure']} |" in (tmp_path / "seen.md").read_text()


def test_check_goes_on_after_a_failure_and_says_so(tmp_path, capsys):
    report = check.Report(torch.device("cpu"), "a|b|c")
    report.check("x", "a", lambda: (2e-3, 1e-3))
    report.check("x", "b", lambda: (float("nan"), 1))
    report.check("x", "c", lambda: 1 / 0)
    report.check("x", "ac", lambda: "well")
    report.check("x", "d", lambda: "is not asked for")
    report.write(tmp_path / "x.json", "machine")
    assert [row["passed"] for row in report.rows] == [False, False, False, True]
    assert "ZeroDivisionError: division by zero" in report.rows[2]["figure"]
    assert capsys.readouterr().out.count("FAIL") == 3


def test_memory_runs_stages_on_tensors_without_values():
    done = run("tests/bench.py", "memory", "--size", "tiny", "--frames", 9, "--only", "generate.py|ode_init|raven")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d  on a card of", done.stdout)) == 4
