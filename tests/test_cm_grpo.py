"""CM-GRPO: closed forms of the policy, then the script itself."""
import argparse
import json
from pathlib import Path
import shutil

import pytest
import torch
from conftest import ROOT, random_dit, random_latents, run
from safetensors.torch import load_file, save_file

import cm_grpo
import wan_causal as wc

STEPS = wc.warped_steps()
KERNELS = {"cm": wc.consistency_kernel, "em": cm_grpo.euler_maruyama(0.4)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("t, s", [(1000, 937.5), (937.5, 833.333), (833.333, 625)])
@pytest.mark.parametrize("shape", [(1, 16, 1, 2, 2), (3, 16, 5, 4, 6)])
def test_the_surrogates_gradient_is_minus_advantage_times_the_policy_gradient(kernel, t, s, shape):
    x, z = (random_latents(*shape, seed=i) for i in range(2))
    advantage, weights = random_latents(shape[0], seed=3), torch.rand(shape[2]) + 0.5
    x0 = random_latents(*shape, seed=2).requires_grad_()
    mean, std, slope = KERNELS[kernel](x, x0, t, s)
    cm_grpo.surrogate(x0, z, mean, std, slope, advantage, weights).backward()

    again = x0.detach().clone().requires_grad_()
    mean, std, _ = KERNELS[kernel](x, again, t, s)
    each = torch.distributions.Normal(mean, std).log_prob(z)  # by autograd, element by element
    wanted = -(advantage.view(-1, 1, 1, 1, 1) * weights.view(1, 1, -1, 1, 1) * each).sum() / each.numel()
    wanted.backward()
    torch.testing.assert_close(x0.grad, again.grad, rtol=1e-4, atol=1e-7)


def test_euler_maruyama_without_noise_is_the_ode_step():
    x, x0 = random_latents(1, 16, 2, 4, 4), random_latents(1, 16, 2, 4, 4, seed=1)
    mean, std, _ = cm_grpo.euler_maruyama(1e-6)(x, x0, 937.5, 833.333)
    torch.testing.assert_close(mean, x + (0.833333 - 0.9375) * (x - x0) / 0.9375, atol=1e-5, rtol=1e-5)
    assert std < 1e-5


def test_advantages():
    rewards = random_latents(4, 6, 2, seed=0) * torch.tensor([1.0, 100.0]) + 3
    rewards[2] = 5.0  # a group without spread
    advantage = cm_grpo.group_advantages(rewards, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(advantage.sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    assert advantage[2].abs().max() == 0
    torch.testing.assert_close(advantage[[0, 1, 3]].square().mean(1), torch.ones(3), atol=1e-4, rtol=0)
    # by hand, one group
    a, b = (rewards[0, :, i] for i in range(2))
    total = 2 * (a - a.mean()) / a.std(correction=0) + (b - b.mean()) / b.std(correction=0)
    torch.testing.assert_close(advantage[0], (total - total.mean()) / total.std(correction=0), atol=1e-4, rtol=0)
    outlier = torch.zeros(1, 100, 1)
    outlier[0, 0] = 1.0
    assert cm_grpo.group_advantages(outlier, torch.ones(1)).max() == 5  # clipped


def test_a_reward_with_hardly_any_spread_hardly_counts():
    """Its standard deviation of 3e-5 counts as 1.1e-4, as in the public code."""
    rewards = torch.tensor([[[1, 0.90003], [2, 0.89997], [3, 0.90003], [4, 0.89997]]], dtype=torch.float64)
    advantage = cm_grpo.group_advantages(rewards, torch.ones(2))
    torch.testing.assert_close(advantage, torch.tensor([[-1.173, -0.790, 0.790, 1.173]]), atol=1e-3, rtol=0)


def test_the_kl_has_the_weights_of_the_chunks():
    x0, weights = torch.zeros(1, 1, 3, 1, 1, requires_grad=True), wc.chunk_weights([1, 1, 1], -1)
    cm_grpo.kl_to_reference(x0, torch.full_like(x0, -1), 0.8, 0.2, weights).backward()
    torch.testing.assert_close(x0.grad.flatten(), torch.tensor([0.01136, 0.01705, 0.03409]), atol=1e-5, rtol=0)


def test_kl_is_torchs():
    x, a, b = (random_latents(2, 16, 2, 4, 4, seed=i) for i in range(3))
    (mean_a, std, slope), (mean_b, _, _) = (wc.consistency_kernel(x, x0, 937.5, 833.333) for x0 in (a, b))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean_a, std), normal(mean_b, std)).mean()
    torch.testing.assert_close(cm_grpo.kl_to_reference(a, b, std, slope, torch.ones(2)), expected)


def test_the_policy_of_a_one_dimensional_consistency_model_moves_to_the_optimum():
    """x0 = theta; the reward of z' is -(z' - 0.3)^2, so the best mean (1 - s') theta is 0.3."""
    theta, random = torch.nn.Parameter(torch.tensor(-1.0)), torch.Generator().manual_seed(0)
    optimizer, s = torch.optim.Adam([theta], lr=0.05), 625.0
    for _ in range(400):
        x0 = theta.expand(32, 1, 1, 1, 1)
        mean, std, slope = wc.consistency_kernel(None, x0, 833.333, s)
        z = (mean + std * torch.randn(x0.shape, generator=random)).detach()
        advantage = cm_grpo.group_advantages(-(z - 0.3).square().view(1, 32, 1), torch.ones(1))[0]
        optimizer.zero_grad()
        cm_grpo.surrogate(x0, z, mean, std, slope, advantage, torch.ones(1)).backward()
        optimizer.step()
    assert (1 - s / 1000) * theta.item() == pytest.approx(0.3, abs=0.1)


def test_lora_starts_as_the_model_and_folds_into_what_it_became(tmp_path, monkeypatch):
    net = random_dit()
    x, t, context = random_latents(2, 16, 3, 4, 4), torch.tensor([900.0, 300.0]), random_latents(2, 8, 16, seed=1)
    linears = sum(isinstance(m, torch.nn.Linear) for m in net.modules())
    with torch.no_grad():
        before = net(x, t, context)
        cm_grpo.add_lora(net, 4, 8.0, seed=0)
        torch.testing.assert_close(net(x, t, context), before)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert linears == 2 * 10 + 6 and len(trained) == 2 * linears and all(".lora_" in n for n in trained)
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        after = net(x, t, context)
        assert not torch.allclose(after, before, atol=1e-2)
        with cm_grpo.without_lora(net):
            torch.testing.assert_close(net(x, t, context), before)
        torch.testing.assert_close(net(x, t, context), after)
        ema = wc.EMA(net, 0.9)
        plain = random_dit(seed=1)
        wc.load_exactly(plain, cm_grpo.merged(net.state_dict(), ema.average, 8.0), "merged")
        torch.testing.assert_close(plain(x, t, context), after, atol=1e-4, rtol=1e-4)
        # the adapter alone, through the loader: into the generator that it names, whatever the model held
        wc.save_checkpoint(tmp_path / "start.safetensors", random_dit().state_dict(), kind="causal")
        monkeypatch.chdir(tmp_path)  # its --init is relative to where the training was started
        args = argparse.Namespace(init=Path("start.safetensors"), lora_rank=4, lora_alpha=8.0)
        cm_grpo.save_adapter(tmp_path, ema.average, args, chunk=3)
        other = random_dit(seed=1)
        monkeypatch.chdir("/")
        assert wc.load_checkpoint(other, tmp_path / "adapter_model.safetensors")["chunk"] == "3"
        torch.testing.assert_close(other(x, t, context), after, atol=1e-4, rtol=1e-4)
    # PEFT's names and settings
    names = {n for n, m in random_dit().named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{n}.lora_{side}.weight" for n in names for side in "AB"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert set(config["target_modules"]) == names


def test_motion_rewards_know_still_from_moving_from_jerky():
    still = torch.zeros(1, 3, 9, 16, 16)
    moving, jerky = still.clone(), still.clone()
    for i in range(9):
        moving[0, :, i, :, i:i + 4] = 1
        jerky[0, :, i, :, (5 * i) % 12:(5 * i) % 12 + 4] = 1
    amount = [cm_grpo.motion_amount(v, ["x"]).item() for v in (still, moving, jerky)]
    smooth = [cm_grpo.motion_smoothness(v, ["x"]).item() for v in (still, moving, jerky)]
    assert amount[0] == 0 < amount[1] and smooth[0] == 1 > smooth[1] > smooth[2]
    picture = moving[:, :, :1]
    assert (cm_grpo.motion_amount(picture, ["x"]), cm_grpo.motion_smoothness(picture, ["x"])) == (0, 1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in the hub's layout, with a word-level tokenizer, and a LAION head."""
    from transformers import CLIPConfig, CLIPModel

    import tiny_world
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0,
                                              "max_position_embeddings": 32},
                                 vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=12))
    model.save_pretrained(folder)
    tiny_world.make_tokenizer().save_pretrained(folder)
    torch.save({"weight": torch.randn(1, 12), "bias": torch.randn(1)}, folder / "head.pth")
    return folder, model.eval()


def test_clip_rewards_are_clips_own_numbers(clip_folder):
    folder, model = clip_folder
    clip = cm_grpo.Clip(str(folder), str(folder / "head.pth"), torch.device("cpu"))
    video, prompts = random_latents(2, 3, 4, 32, 32).clamp(-1, 1), ["a red circle", "a blue striped square moving up"]
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (wc.CLIP_MEAN, wc.CLIP_STD))
    words = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    similar, beauty, head = 0, 0, torch.load(folder / "head.pth")
    with torch.no_grad():
        for i in range(4):
            out = model(input_ids=words.input_ids, attention_mask=words.attention_mask,
                        pixel_values=((video[:, :, i] / 2 + 0.5) - mean) / std)
            similar = similar + out.logits_per_image.diag() / model.logit_scale.exp() / 4
            beauty = beauty + (out.image_embeds @ head["weight"].T + head["bias"])[:, 0] / 4
        torch.testing.assert_close(clip.similarity(video, prompts), similar, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clip.aesthetic(video, prompts), beauty, atol=1e-5, rtol=1e-5)
        assert clip.images(torch.zeros(1, 3, 48, 80)).shape == (1, 12)


def test_a_clip_with_less_than_it_needs_is_refused(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder[0], tmp_path / "clip")
    torch.save({"weight": torch.randn(1, 5), "bias": torch.randn(1)}, copy / "head.pth")
    with pytest.raises(wc.InputError, match="head.pth is no aesthetic head for CLIP features of 12 numbers"):
        cm_grpo.Clip(str(copy), str(copy / "head.pth"), "cpu")
    torch.save(3, copy / "head.pth")
    with pytest.raises(wc.InputError, match="head.pth holds no state dict"):
        cm_grpo.Clip(str(copy), str(copy / "head.pth"), "cpu")
    weights = load_file(copy / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "visual_projection.weight"},
              copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(wc.InputError, match="clip lacks 1 of its tensors; it must hold a CLIPModel"):
        cm_grpo.Clip(str(copy), None, "cpu")


TINY_RUN = ["--height", 32, "--width", 32, "--batch", 2, "--group", 2, "--prompts-per-step", 1, "--steps", 1]


def test_other_settings_run_and_leave_a_generator(clip_folder, tmp_path):
    folder, _ = clip_folder
    start = wc.load_dit(ROOT / "tests/tiny").state_dict()
    wc.save_checkpoint(tmp_path / "start.safetensors", start, kind="causal", chunk=3, timesteps="1000,900,750,500")
    settings = {"full": ["--lora-rank", 0, "--kl", 0.01], "em": ["--policy", "em", "--em-noise", 0.8, "--kl", 0.01],
                "again": ["--clip-model", folder, "--rewards", "clip=2", "aesthetic=1", "smoothness=0.75",
                          "--aesthetic-head", folder / "head.pth"]}
    for name, flags in settings.items():
        done = run("cm_grpo.py", "--init", tmp_path / "start.safetensors", *TINY_RUN, "--frames", 13, "--lora-rank", 4,
                   "--sample-every", 1, "--rewards", "motion", *flags, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        result = load_file(tmp_path / name / "model.safetensors")
        assert set(result) == set(start) and any(not torch.equal(result[k], start[k]) for k in start)
        assert (tmp_path / name / "lora/adapter_config.json").exists() == (name != "full")
        assert ("kl" in json.loads((tmp_path / name / "metrics.jsonl").read_text())) == ("--kl" in flags)


def test_a_reward_that_is_not_a_number_stops_the_run_in_words(tmp_path):
    wc.save_checkpoint(tmp_path / "start.safetensors", wc.load_dit(ROOT / "tests/tiny").state_dict(), kind="causal")
    (tmp_path / "mine.py").write_text("def nan(video, prompts):\n    return video.mean((1, 2, 3, 4)) * float('nan')\n"
                                      "def scalar(video, prompts):\n    return video.mean()\n")
    messages = {"nan": "reward_mine:nan is nan at step 1", "scalar": "the reward scalar returned shape ()"}
    for name, words in messages.items():
        done = run("cm_grpo.py", "--init", tmp_path / "start.safetensors", *TINY_RUN, "--sample-every", 0, "--rewards",
                   f"mine:{name}", "--out", tmp_path / name, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
