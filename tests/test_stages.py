"""The training stages: closed forms of their losses, then the scripts themselves as a user runs them."""
import json
import math
import os
import random
import shutil
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (ROOT, alone_and_together, random_dit, random_latents, ranks, run, start_script, torchrun,
                      weights_apart)
from safetensors.torch import load_file

import distill_dmd
import ode_init
import reward_forcing
import wan_causal as wc

TINY = ROOT / "tests/tiny"


@pytest.fixture(scope="module")
def parts():
    return wc.load_dit(TINY), wc.load_vae(TINY), wc.load_text_encoder(TINY), wc.load_image_reward(TINY / "reward_model")


# ------------------------------------------------------------------------------- what the stages share

def test_every_epoch_goes_through_all_items_in_another_order():
    epochs = [[wc.shuffled("abcdefghij", n, seed=3) for n in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(e) == list("abcdefghij") for e in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_every_bit_of_a_seed_counts():
    """torch's own generator of a CPU would give seed 7 and seed 7 + 2^40 the same noise."""
    args = [types.SimpleNamespace(seed=seed) for seed in (0, 1, 2, 4096, (1 << 24) - 1)]
    generators = [g for a in args for g in wc.sample_generators(a, range(100))]
    generators += [wc.seeded(seed) for seed in (1 << 32, 1 << 63, (1 << 63) - 1, -1)]
    draws = {tuple(torch.randn(4, generator=g).tolist()) for g in generators}
    assert len(draws) == len(generators)
    plain = torch.randn(4, generator=torch.Generator().manual_seed(7))  # small ones are torch's
    assert torch.equal(torch.randn(4, generator=wc.seeded(7)), plain)
    orders = [tuple(wc.shuffled(range(50), n, seed) for n in range(50)) for seed in (0, 1, 4096, (1 << 24) - 1)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)


def test_the_split_over_processes_and_accumulation_takes_the_same_samples():
    def taken(batch, accum, world):
        args = types.SimpleNamespace(batch=batch, accum=accum)
        return sorted(n for rank in range(world) for micro in range(accum) for n in
                      wc.sample_numbers(args, types.SimpleNamespace(rank=rank, world=world), 5, micro))
    assert taken(8, 1, 1) == taken(2, 2, 2) == taken(1, 4, 2) == taken(2, 1, 4) == list(range(40, 48))


def test_ema_closed_form_and_start():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = wc.EMA(model, decay=0.9, start=2)
    for step in range(5):
        model.weight.data.fill_(float(step + 1))
        ema.update(model, step)
    expected = 2.0  # a copy up to step 1, averaged from step 2 on
    for value in (3.0, 4.0, 5.0):
        expected = 0.9 * expected + 0.1 * value
    assert ema.average["weight"].item() == pytest.approx(expected)
    with ema.swapped_in(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 5.0 and ema.average["weight"].item() == pytest.approx(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_keeps_gradients_after_a_forward_without(checkpointing):
    """Weights cast without gradient must not be used again by a forward with gradient."""
    x, t, context = random_latents(2, 16, 3, 4, 4), torch.tensor([900.0, 300.0]), random_latents(2, 8, 16, seed=1)
    gradients = []
    for autocast in (None, torch.bfloat16):
        model = random_dit()
        model.autocast, model.checkpointing = autocast, checkpointing
        with torch.no_grad():
            model(x, t, context)
        model(x, t, context).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)  # it really was another precision


# ----------------------------------------------------------------------------------- distribution matching

class Gaussian:
    """The velocity field of data ~ N(mean, std^2): v = (x_t - E[x0 | x_t]) / sigma in closed form."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, x, t, context, **kwargs):
        sigma = wc.sigma_of(t, x)
        variance = ((1 - sigma) * self.std) ** 2 + sigma ** 2
        x0 = self.mean + (1 - sigma) * self.std ** 2 / variance * (x - (1 - sigma) * self.mean)
        return (x - x0) / sigma


def test_dmd_direction_between_two_gaussians_is_the_closed_form():
    """Both scores known: fake - real = sigma^2 (m_fake - m_real) / ((1 - sigma)^2 s^2 + sigma^2) everywhere."""
    real, fake, std = 2.0, -1.0, 0.7
    x0 = fake + std * random_latents(3, 16, 2, 4, 4)
    generators = lambda: [wc.seeded(n) for n in range(3)]  # noqa: E731
    got = distill_dmd.compare_scores(x0, Gaussian(real, std), Gaussian(fake, std), None, None, 1, 5.0, generators())

    again = generators()  # the same noise level and noise
    t = distill_dmd.score_timestep(again, 5.0, x0.device)
    x_t = wc.add_noise(x0, wc.gaussian(x0.shape, again, "cpu"), t)
    sigma = (t / 1000).view(3, 1, 1, 1, 1).double()
    difference = sigma ** 2 * (fake - real) / (((1 - sigma) * std) ** 2 + sigma ** 2)
    real_x0 = wc.x0_from_v(x_t, Gaussian(real, std)(x_t, t, None), t)
    expected = difference / (x0 - real_x0).abs().double().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got, expected.expand_as(got), atol=1e-4, rtol=1e-4)


def test_dmd_moves_a_gaussian_student_onto_the_teacher():
    """With exact scores of both, the student's mean goes to the teacher's."""
    mean = torch.nn.Parameter(torch.tensor(-1.0))
    optimizer = torch.optim.SGD([mean], lr=0.2)
    for step in range(60):
        generators = [wc.seeded(8 * step + n) for n in range(8)]
        x0 = mean + 0.7 * wc.gaussian((8, 16, 1, 2, 2), generators, "cpu")
        direction = distill_dmd.compare_scores(x0.detach(), Gaussian(2.0, 0.7), Gaussian(mean.item(), 0.7), None, None,
                                               1, 5.0, generators)
        optimizer.zero_grad()
        distill_dmd.dmd_loss(x0, direction).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(2.0, abs=0.05)


def test_dmd_loss_has_the_direction_as_its_gradient():
    x0 = random_latents(2, 16, 2, 4, 4).requires_grad_()
    direction = random_latents(2, 16, 2, 4, 4, seed=1).double()
    distill_dmd.dmd_loss(x0, direction).backward()
    torch.testing.assert_close(x0.grad, (direction / direction.numel()).float())


def test_score_timesteps_are_shifted_bounded_and_per_sample():
    generators = [wc.seeded(n) for n in range(4000)]
    t = distill_dmd.score_timestep(generators, 5.0, "cpu")
    assert t.min() >= 20 and t.max() <= 980
    # P(t < T) = P(tau < inverse shift of T); at shift 5, T = 500 has tau = 1/6
    assert (t < 500).float().mean().item() == pytest.approx(1 / 6, abs=0.02)
    assert torch.equal(t[:10], distill_dmd.score_timestep([wc.seeded(n) for n in range(10)], 5.0, "cpu"))


def test_guidance_of_the_real_score_is_the_usual_formula():
    class Conditional(Gaussian):
        def __call__(self, x, t, context, **kwargs):
            return Gaussian(context.mean().item(), 1.0)(x, t, context)
    x, t = random_latents(1, 16, 1, 2, 2), torch.tensor([500.0])
    cond, uncond = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    model = Conditional(0, 1)
    got = wc.guided_velocity(model, x, t, cond, uncond, 3.0)
    torch.testing.assert_close(got, model(x, t, uncond) + 3 * (model(x, t, cond) - model(x, t, uncond)))


# ------------------------------------------------------------------------------------ the causal histories

def batch(chunks, exit_step=1, seed=0, B=2):
    generators = [wc.seeded(seed + n) for n in range(B)]
    shape = (B, 16, sum(chunks), 4, 4)
    return distill_dmd.Batch(["x"] * B, random_latents(B, 8, 16, seed=5), generators, exit_step,
                             wc.gaussian(shape, generators, "cpu"), data=random_latents(*shape, seed=6))


CHUNKS, STEPS = [3, 3, 2], wc.warped_steps()


@pytest.mark.parametrize("level", range(4))
def test_ravens_forward_is_what_the_rollout_computed(level):
    """Training attention equals inference attention, at each of the steps and in every chunk."""
    net, b = random_dit(), batch(CHUNKS, level)
    b.states, b.endpoints = wc.recorded_rollout(net, b.noise, b.context, STEPS, CHUNKS, b.generators)
    again = batch(CHUNKS, level)
    with torch.no_grad():
        parts = list(wc.rollout(net, again.noise, again.context, STEPS, CHUNKS, record=True,
                                generator=again.generators))
        x0 = distill_dmd.student_sample("raven", net, b, STEPS, CHUNKS)
    torch.testing.assert_close(b.endpoints, torch.cat([p.x0 for p in parts], dim=2))
    torch.testing.assert_close(x0, torch.cat([p.predictions[level] for p in parts], dim=2), atol=1e-5, rtol=1e-5)


def test_gradient_through_the_history():
    """RAVEN: later chunks reach what encodes the history. Self Forcing: it is a constant, with the same values."""
    net, b = random_dit(), batch(CHUNKS, exit_step=3)
    b.states, b.endpoints = wc.recorded_rollout(net, b.noise, b.context, STEPS, CHUNKS, b.generators)
    b.endpoints.requires_grad_()
    distill_dmd.student_sample("raven", net, b, STEPS, CHUNKS)[:, :, 6:].sum().backward()
    assert b.endpoints.grad[:, :, :3].abs().sum() > 0 and b.endpoints.grad[:, :, 3:6].abs().sum() > 0
    raven = torch.cat([p.grad.flatten() for p in net.parameters()])

    net.zero_grad()
    noise = batch(CHUNKS, exit_step=3)
    noise.noise.requires_grad_()
    x0 = distill_dmd.self_rollout(net, noise, STEPS, CHUNKS, grad_from=0)
    torch.testing.assert_close(x0, b.endpoints, atol=1e-5, rtol=1e-5)  # step 3 is the last one
    x0[:, :, 6:].sum().backward()
    assert noise.noise.grad is None or noise.noise.grad.abs().sum() == 0
    own = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert torch.nn.functional.cosine_similarity(raven, own, dim=0) < 0.999  # RAVEN's has the path through the history


@pytest.mark.parametrize("clean", [False, True])
def test_what_a_chunk_sees_of_data(clean):
    """Diffusion forcing: the noisy chunks before it. Teacher forcing: the clean ones. Never a later chunk."""
    net = random_dit()

    def x0(changed):
        b = batch(CHUNKS)
        b.data[:, :, changed] += 1.0
        with torch.no_grad():
            return distill_dmd.denoise_data(net, b, STEPS[1:], CHUNKS, clean)

    same = x0([])
    for chunk, frames in ((0, slice(0, 3)), (1, slice(3, 6)), (2, slice(6, 8))):
        moved = [not torch.allclose(x0(frames)[:, :, where], same[:, :, where], atol=1e-6)
                 for where in (slice(0, 3), slice(3, 6), slice(6, 8))]
        assert moved == [i >= chunk for i in range(3)]
    if clean:  # at t = 1000 the noisy input does not show the data at all: only the clean history can
        b = batch(CHUNKS)
        b.data[:, :, :3] += 1.0
        with torch.no_grad():
            other = distill_dmd.denoise_data(net, b, [1000.0], CHUNKS, True)
            again = distill_dmd.denoise_data(net, batch(CHUNKS), [1000.0], CHUNKS, True)
        assert torch.allclose(other[:, :, :3], again[:, :, :3], atol=1e-5)
        assert not torch.allclose(other[:, :, 3:6], again[:, :, 3:6], atol=1e-5)


def test_chunk_weights_closed_form():
    weights = wc.chunk_weights([3] * 7, -1.0)
    expected = torch.tensor([1 / (7 - j) for j in range(7)]).repeat_interleave(3)
    torch.testing.assert_close(weights, expected / expected.mean())
    assert weights[-1].item() == pytest.approx(2.7, abs=0.01) and weights[0].item() == pytest.approx(0.386, abs=0.01)
    assert torch.equal(wc.chunk_weights([1, 3, 3], 0.0), torch.ones(7))
    early = wc.chunk_weights([3, 3, 1], 1.0)
    torch.testing.assert_close(early, torch.tensor([1, 1, 1, 4 / 7, 4 / 7, 4 / 7, 1 / 7]) / (3 + 12 / 7 + 1 / 7) * 7)
    for shift in (-3.0, 2.0):
        assert wc.chunk_weights([2, 3, 1], shift).mean().item() == pytest.approx(1)


def test_weighted_loss_has_the_weighted_direction_as_its_gradient():
    x0 = random_latents(2, 16, 3, 4, 4).requires_grad_()
    direction, weights = random_latents(2, 16, 3, 4, 4, seed=1).double(), torch.tensor([0.5, 0.5, 2.0])
    distill_dmd.dmd_loss(x0, direction, weights).backward()
    torch.testing.assert_close(x0.grad, (direction * weights.view(1, 1, 3, 1, 1) / direction.numel()).float())


def test_reward_and_distillation_have_the_same_scale():
    direction, gradient = random_latents(2, 16, 3, 4, 4).double(), 1e-3 * random_latents(2, 16, 3, 4, 4, seed=1)
    for weights in (torch.ones(3), torch.tensor([0.5, 0.5, 2.0])):
        x0 = [random_latents(2, 16, 3, 4, 4, seed=2).requires_grad_() for _ in range(2)]
        with_it = distill_dmd.with_reward(direction, gradient, 0.5, weights)
        alone, both = (torch.autograd.grad(distill_dmd.dmd_loss(x, d, weights), x)[0]
                       for x, d in zip(x0, (direction, with_it)))
        added = alone - both
        torch.testing.assert_close(added.flatten(1).norm(dim=1), 0.5 * alone.flatten(1).norm(dim=1))
        assert torch.cosine_similarity(added.flatten(), gradient.double().flatten(), dim=0) > 0.99


def test_the_last_window_of_a_longer_rollout(parts):
    _, vae, _, _ = parts
    x0 = random_latents(1, 16, 5, 4, 4).requires_grad_()
    assert distill_dmd.last_window(x0, 5, vae) is x0
    window = distill_dmd.last_window(x0, 3, vae)
    torch.testing.assert_close(window[:, :, 1:], x0[:, :, 3:])
    with torch.no_grad():
        frame = vae.decode(x0[:, :, :3])[:, :, -1:]
        torch.testing.assert_close(window[:, :, :1], vae.encode(frame))
    window.sum().backward()
    assert x0.grad[:, :, :3].abs().sum() == 0 and x0.grad[:, :, 3:].abs().sum() > 0


def test_the_papers_settings_are_the_defaults_of_their_history():
    def defaults(*args):
        return distill_dmd.parse_args(["--model", "Wan-AI/Wan2.1-T2V-1.3B", *args])
    causal = ["--student", "causal", "--init", "x", "--history"]
    raven, own, data = (defaults(*causal, history) for history in ("raven", "self-forcing", "diffusion-forcing"))
    assert (raven.ratio, raven.lr, raven.critic_lr, raven.ema, raven.guidance, raven.steps, raven.accum) == \
        (2, 2e-6, 4e-7, 0.9675, 3.0, 150, 4) and raven.chunk_weight_shift == -1
    assert (own.ratio, own.guidance, own.ema, own.ema_start, own.beta1) == (5, 4, 0.99, 40, 0)
    assert own.chunk_weight_shift == 0 and (own.steps, data.steps) == (120, 200)  # 600 and 1000 critic updates
    assert (data.ratio, data.guidance, data.shift, data.critic_lr, data.beta1) == (5, 4.5, 8.0, 2e-6, 0.9)
    assert defaults().history == "bidirectional"
    assert defaults("--student", "causal", "--init", "x").history == "self-forcing"
    assert defaults(*causal, "raven", "--ratio", "7").ratio == 7


# ------------------------------------------------------------------------------------------ ODE trajectories

@pytest.mark.parametrize("shift, count", [(5.0, 48), (3.0, 24), (8.0, 50), (1.0, 4)])
def test_the_solver_grid_contains_the_students_timesteps_exactly(shift, count):
    timesteps = wc.warped_steps(shift=shift)
    sigmas, kept = ode_init.solver_grid(timesteps, shift, count)
    assert [1000 * sigmas[i] for i in kept[:-1]] == pytest.approx(timesteps, abs=1e-9) and sigmas[kept[-1]] == 0
    assert all(a > b for a, b in zip(sigmas, sigmas[1:])) and abs(len(sigmas) - 1 - count) <= 2
    if (shift, count) == (5.0, 48):  # what the public scripts would do, at the right shift
        assert kept == [0, 12, 24, 36, 48]
        np.testing.assert_allclose(sigmas, [wc.shift_sigma(1 - i / 48, 5.0) for i in range(49)], atol=1e-12)


def test_euler_on_a_linear_field_keeps_the_known_states():
    """dx/dsigma = a x has x(sigma) = x(1) exp(-a (1 - sigma)); Euler steps multiply by 1 - a * step."""
    a, x = 0.8, random_latents(1, 16, 1, 2, 2).double()
    sigmas, kept = ode_init.solver_grid(wc.warped_steps(), 5.0, 480)
    states = list(ode_init.euler_trajectory(lambda x, t, context: a * x, x, None, None, sigmas, 1))
    product = 1.0
    for i, state in enumerate(states):
        torch.testing.assert_close(state, product * x, atol=1e-12, rtol=1e-12)
        product *= 1 - a * (sigmas[i] - sigmas[i + 1]) if i < len(sigmas) - 1 else 1
    for i in kept:
        torch.testing.assert_close(states[i], x * math.exp(-a * (1 - sigmas[i])), atol=0, rtol=3e-3)


def test_each_frame_takes_the_state_that_its_chunk_drew():
    trajectory = torch.arange(5.0).view(1, 5, 1, 1, 1, 1).expand(2, 5, 3, 4, 2, 2)
    index = torch.tensor([[0, 0, 4, 4], [3, 3, 1, 1]])
    picked = ode_init.pick_states(trajectory, index)
    assert torch.equal(picked, index.float().view(2, 1, 4, 1, 1).expand(2, 3, 4, 2, 2))


def test_regression_counts_noisy_frames_only():
    x0, clean = torch.zeros(2, 3, 4, 2, 2), torch.zeros(2, 3, 4, 2, 2)
    x0[0, :, 0], x0[0, :, 1], x0[1, :, 3] = 2.0, 5.0, 3.0
    t = torch.tensor([[1000.0, 0, 0, 625], [0, 0, 0, 0]])
    # sample 0: frames 0 and 3 are noisy, squared errors 4 and 0; sample 1: none is
    assert ode_init.regression_loss(x0, clean, t).item() == pytest.approx((4 / 2 + 0) / 2)


# --------------------------------------------------------------------------------------------- the reward

def test_video_frames_and_the_latent_frames_they_come_from():
    assert [wc.latent_frame(i) for i in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    rng = random.Random(0)
    assert reward_forcing.rewarded_frames("last", 57, rng) == [56]
    assert reward_forcing.rewarded_frames("all", 9, rng) == list(range(9))
    assert {reward_forcing.rewarded_frames("random", 9, rng)[0] for _ in range(200)} == set(range(9))


CAPTIONS = ["a red striped circle moving left on a navy background",
            "a green plain square bouncing on a gray background"]


def reward_and_gradient(vae, reward, latents, frames, past=None):
    """Rewards of some video frames, and their gradient at the latents, as the stages take it."""
    z = latents.clone().requires_grad_()
    r = wc.checked_reward(reward, wc.rewarded_video(vae, z, frames, past), CAPTIONS[:len(z)])
    return r.detach(), torch.autograd.grad(r.sum(), z)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frames", [[12], [0], [5], [10, 12], list(range(13))])
def test_the_rewards_gradient_is_that_of_a_full_decode(parts, frames, checkpointing, monkeypatch):
    """Autograd through the whole decoder at once, against one checkpoint for each latent frame."""
    _, vae, _, model = parts
    latents = random_latents(2, 16, 4, 8, 8)
    reward = wc.frame_reward(model)
    z = latents.clone().requires_grad_()
    expected = reward(vae.decode(z)[:, :, frames], CAPTIONS)
    full, = torch.autograd.grad(expected.sum(), z)
    monkeypatch.setattr(vae.decoder, "checkpointing", checkpointing)
    rewards, gradient = reward_and_gradient(vae, reward, latents, frames)
    torch.testing.assert_close(rewards, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, full, atol=1e-5 * full.abs().max().item(), rtol=1e-3)
    assert (gradient[:, :, 0].abs().sum() > 0) and (gradient[:, :, wc.latent_frame(frames[-1]) + 1:] == 0).all()


@pytest.mark.parametrize("past", [0, 1, 2, 3])
def test_the_rewards_gradient_goes_on_through_so_many_latent_frames_of_memory(parts, past):
    """It is that of a decoder for which the memory before latent frame 3 - past is a constant."""
    _, vae, _, model = parts
    latents, reward = random_latents(2, 16, 4, 8, 8), wc.frame_reward(model)
    _, gradient = reward_and_gradient(vae, reward, latents, [12], past)
    begin, memory = 3 - past, {}
    with torch.no_grad():
        if begin:
            vae.decode(latents[:, :, :begin], memory)
    z = latents[:, :, begin:].clone().requires_grad_()
    full, = torch.autograd.grad(reward(vae.decode(z, memory)[:, :, -1:], CAPTIONS).sum(), z)
    assert (gradient[:, :, :begin] == 0).all()
    torch.testing.assert_close(gradient[:, :, begin:], full, atol=1e-5 * full.abs().max().item(), rtol=1e-3)


def test_the_rewards_gradient_of_all_frames_without_memory_is_that_of_each_given_the_past(parts):
    _, vae, _, _ = parts
    latents, weight = random_latents(1, 16, 3, 8, 8), random_latents(1, 3, 9, 64, 64, seed=1)
    def reward(video, prompts):
        return (video * weight).sum((1, 2, 3, 4))

    _, gradient = reward_and_gradient(vae, reward, latents, list(range(9)), past=0)
    memory = {}
    for i in range(3):
        z = latents[:, :, i:i + 1].clone().requires_grad_()
        shown = vae.decode(z, memory)
        start = max(0, 4 * i - 3)
        expected, = torch.autograd.grad((shown * weight[:, :, start:start + shown.shape[2]]).sum(), z)
        torch.testing.assert_close(gradient[:, :, i:i + 1], expected, atol=1e-3, rtol=1e-3)
        memory = {module: x.detach() if torch.is_tensor(x) else x for module, x in memory.items()}


def test_the_rewards_gradient_against_finite_differences(parts):
    """In all latent frames: the exact one."""
    _, vae, _, model = parts
    reward, latents = wc.frame_reward(model), random_latents(2, 16, 3, 8, 8)
    _, gradient = reward_and_gradient(vae, reward, latents, [8])
    direction = gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1, 1)
    with torch.no_grad():
        def score(step):
            return reward(vae.decode(latents + step * direction)[:, :, 8:9], CAPTIONS)
        slope = (score(0.01) - score(-0.01)) / 0.02
    torch.testing.assert_close(slope, gradient.flatten(1).norm(dim=1), rtol=0.02, atol=0)


def test_gradient_reaches_the_rewarded_chunk_and_the_generator_alone(parts):
    """Not the history, not the steps before the exit step, not the decoder, the text encoder or the reward model."""
    dit, vae, text, model = parts
    net = wc.load_dit(TINY).train()
    context, noise = text(CAPTIONS), random_latents(2, 16, 5, 8, 8).requires_grad_()
    chunks, seen = [3, 2], []
    for part in wc.rollout(net, noise, context, wc.warped_steps(), chunks, exit_step=0, grad_from=3,
                           generator=wc.seeded(0)):
        seen.append(part.x0)
    assert not seen[0].requires_grad and seen[1].requires_grad
    x0 = torch.cat(seen, dim=2)
    reward = wc.frame_reward(model)(wc.rewarded_video(vae, x0, [16], past=1), CAPTIONS)
    (-reward.mean()).backward()
    assert noise.grad[:, :, :3].abs().sum() == 0 and noise.grad[:, :, 3:].abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    for frozen in (vae, text.encoder, model):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


# ------------------------------------------------------------------------------------ the scripts themselves

SMALL = ["--frames", 13, "--height", 32, "--width", 32]
FEW = [*SMALL, "--batch", 2]
SHORT = [*FEW, "--sample-every", 0, "--save-every", 1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A few-step student's file, trajectories and a causal student's file, as the stages before leave them."""
    folder = tmp_path_factory.mktemp("made")
    config = wc.load_config(TINY)
    state = wc.load_dit(TINY).state_dict()
    steps = ",".join(f"{t:.10g}" for t in wc.warped_steps())
    wc.save_checkpoint(folder / "student.safetensors", state, stage="distill_dmd", kind="bidirectional",
                       timesteps=steps, config=config)
    wc.save_checkpoint(folder / "ode.safetensors", state, stage="ode_init", kind="causal", timesteps=steps, chunk=3,
                       config=config)
    done = run(*SAMPLE, "--out", folder / "trajectories")
    assert done.returncode == 0, done.stderr
    return folder


SAMPLE = ["ode_init.py", "sample", *SMALL, "--count", 6, "--per-file", 2, "--steps", 4]


def command(stage, made):
    return {"distill_dmd": ["distill_dmd.py", "--ratio", 1],
            "ode_init": ["ode_init.py", "train", "--data", made / "trajectories",
                         "--init", made / "student.safetensors"],
            **{history: ["distill_dmd.py", "--student", "causal", "--history", history, "--ratio", 2,
                         "--init", made / "ode.safetensors",
                         *(["--data", made / "trajectories"] if history in distill_dmd.WITH_DATA else [])]
               for history in list(distill_dmd.SETTINGS)[1:]},
            "cm_grpo": ["cm_grpo.py", "--init", made / "ode.safetensors", "--group", 2, "--prompts-per-step", 2,
                        "--lora-rank", 4, "--rewards", "imagereward=1", "motion=0.5"],
            "reward_forcing": ["reward_forcing.py", "--init", made / "ode.safetensors"],
            }[stage]


STAGES = ["distill_dmd", "ode_init", "reward_forcing", "cm_grpo", "diffusion-forcing", "self-forcing", "raven"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_and_accumulation_equal_one_process_with_the_whole_batch(stage, made, tmp_path):
    """Also: two steps as plain python and in two processes, there with recomputed activations (the default at full size),
    under DistributedDataParallel and sharded, with sample videos and a usable result."""
    args = [*command(stage, made), *FEW, "--lr", 1e-4, "--steps", 2]
    args += {"reward_forcing": ["--reward-frames", "all"], "cm_grpo": ["--kl", 0.5],  # gradient in every chunk
             "self-forcing": ["--reward-weight", 0.5, "--rollout-frames", 25]}.get(stage, [])
    batch, accum = (4, 2) if stage in ("ode_init", "raven") else (2, 1)
    share = [] if stage == "cm_grpo" else ["--accum", accum]  # which has 2 of its own
    together = ["--batch", 1, *share, "--checkpointing"]
    start = torchrun if stage == "reward_forcing" else ranks  # one of them as users start it, the others faster
    one, two = alone_and_together(args, ["--batch", batch, "--sample-every", 2, "--out", tmp_path / "one"], [
        "--sample-every", 0, *together, "--out", tmp_path / "two"], start)
    sampled = 2 * (stage in ("reward_forcing", "cm_grpo"))  # all weights, and LoRA's
    sharded = start(2, *args, *together, "--shard", "--sample-every", sampled, "--out", tmp_path / "sharded")
    assert one.returncode == two.returncode == sharded.returncode == 0, one.stderr + two.stderr + sharded.stderr
    start = wc.load_dit(TINY).state_dict()
    a, *others = (torch.load(tmp_path / name / "state.pt", weights_only=True)["parts"]["generator"]
                  for name in ("one", "two", "sharded"))
    # Adam's first steps are the gradient's sign: an element whose gradient is float noise may differ by a whole step.
    for b in others:
        assert weights_apart(a, b, start) < 1e-2
    for name in ("two", "sharded"):
        for x, y in zip(metrics(tmp_path / "one"), metrics(tmp_path / name)):
            for key in set(x) & set(y) - {"seconds", "peak_gib"}:
                assert x[key] == pytest.approx(y[key], rel=2e-3, abs=1e-4), key
    for step in ("step_000000", "step_000002"):  # what it starts from, and what has come of it
        names = sorted(path.name for path in (tmp_path / "one/samples" / step).iterdir())
        assert [name[:4] for name in names] == ["0_a_", "1_a_", "2_a_", "3_a_", "meas"]
    measured = json.loads((tmp_path / "one/samples/step_000002/measured.json").read_text())
    assert measured["held_out_motion"] == pytest.approx(metrics(tmp_path / "one")[-1]["held_out_motion"], rel=1e-5)
    settings = json.loads((tmp_path / "one/settings.json").read_text())
    assert settings["stage"] == command(stage, made)[0].removesuffix(".py") and settings["lr"] == 1e-4
    assert [("held_out_motion" in row) for row in metrics(tmp_path / "one")] == [False, True]
    lines = one.stdout.splitlines()
    assert len({len(line) for line in lines if line.startswith("step ")}) == 1
    last = lines.index(f"done: {tmp_path / 'one/model.safetensors'}; try")
    assert f"--checkpoint {tmp_path / 'one/model.safetensors'} --model" in lines[last + 1]
    assert "it/s" not in one.stderr and "Loading" not in one.stdout + one.stderr  # no terminal, no bars

    kind = wc.load_checkpoint(wc.load_dit(TINY), tmp_path / "one/model.safetensors")
    assert kind["stage"] == command(stage, made)[0].removesuffix(".py") and kind["step"] == "2"
    assert wc.saved_steps(kind) == pytest.approx(wc.warped_steps())
    assert kind["kind"] == ("bidirectional" if stage == "distill_dmd" else "causal")
    assert "timesteps 1000, 937.5, 833.333, 625" in one.stdout


def start_and_kill(args, log, after):
    """Start a script, kill it with SIGKILL once it has printed `after` steps and a random moment has passed."""
    log.touch()
    process = start_script(log, os.devnull, *args)
    while process.is_alive() and sum(line.startswith("step") for line in log.read_text().splitlines()) < after:
        time.sleep(0.01)
    process.join(random.random() * 0.5)
    process.kill()
    process.join()


@pytest.mark.parametrize("stage", ["distill_dmd", "ode_init", "reward_forcing", "cm_grpo"])
def test_killed_at_random_moments_and_resumed_gives_the_same_weights(stage, made, tmp_path):
    args = [*command(stage, made), *SHORT, "--lr", 1e-4, "--steps", 5, "--keep-every", 2]
    with ThreadPoolExecutor() as side_by_side:
        whole = side_by_side.submit(run, *args, "--out", tmp_path / "whole")
        for i, after in enumerate((1, 2, 1)):
            start_and_kill([*args, "--out", tmp_path / "killed", "--resume"], tmp_path / f"log{i}", after)
        done = run(*args, "--out", tmp_path / "killed", "--resume")
    assert whole.result().returncode == done.returncode == 0, whole.result().stderr + done.stderr
    names = ["model.safetensors", "model_000002.safetensors", "model_000004.safetensors"]
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        assert sorted(f.name for f in folder.glob("*model*")) == names
        assert [wc.read_weights(folder / name)[1]["step"] for name in names] == ["5", "2", "4"]
    for name in names:
        a, b = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[{k: v for k, v in m.items() if k not in ("seconds", "peak_gib")} for m in metrics(tmp_path / name)]
            for name in ("whole", "killed")]
    assert logs[0] == logs[1] and [m["step"] for m in logs[0]] == [1, 2, 3, 4, 5]


def test_the_result_is_written_before_the_state(tmp_path):
    """So that a run killed in between has a step left to do, and makes the result again."""
    args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path / "run")])
    with wc.processes("cpu") as process:
        training = wc.Run("reward_forcing", args, process, [])
        training.state.mkdir()  # so that it cannot be written
        with pytest.raises(wc.InputError, match="cannot write .*state.pt"):
            training.save({"x": torch.ones(1)}, [1000.0], kind="causal")
    assert load_file(tmp_path / "run/model.safetensors")["x"] == 1


def test_a_run_whose_motion_falls_says_so_once(tmp_path, capsys):
    """Below --motion-alarm of what the samples before the first step moved, also after it was resumed."""
    args = reward_forcing.parse_args(["--init", "x", "--out", str(tmp_path), "--steps", "30", "--motion-alarm", "0.6"])

    start = tmp_path / "samples/step_000000/measured.json"
    start.parent.mkdir(parents=True)

    def said(motion):
        training.warn_when_still(motion)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    with wc.processes("cpu") as process:
        training = wc.Run("reward_forcing", args, process, [])
        assert said(0.1) == []  # no samples were made before the first step
        start.write_text('{"held_out_motion": 0.5}')
        for training.step, motion in ((10, 0.4), (20, 0.31)):
            assert said(motion) == []
        training.step = 30
        line, = said(0.29)
        assert line.startswith("warning: the motion of the held-out videos fell from 0.5000 to 0.2900: ")
        training.step = 40
        assert said(0.1) == []  # it was said
        training = wc.Run("reward_forcing", args, process, [])
        training.step = 50
        assert len(said(0.1)) == 1
        training = wc.Run("reward_forcing", args, process, [])
        start.write_text('{"held_out_motion": null}')
        with pytest.raises(wc.InputError, match='measured.json has no number "held_out_motion": delete the file'):
            said(0.1)


def test_a_run_is_not_resumed_with_other_trajectories(made, tmp_path):
    args = [*command("ode_init", made), *SHORT, "--out", tmp_path / "run", "--data", tmp_path / "data"]
    shutil.copytree(made / "trajectories", tmp_path / "data")
    assert run(*args, "--steps", 1).returncode == 0
    (tmp_path / "data/trajectories_000004.safetensors").unlink()
    done = run(*args, "--steps", 2, "--resume")
    assert done.returncode == 2 and "was begun with trajectories = 6, not 4" in done.stderr


def test_sampling_is_resumed_without_a_lost_or_doubled_trajectory(made, tmp_path):
    out = tmp_path / "trajectories"
    done = torchrun(2, *SAMPLE, "--out", out)
    assert done.returncode == 0 and "6 trajectories of 0.0 MB: 0.1 MB on disk in all; 6 to be made" in done.stdout, done.stderr
    files = sorted(out.glob("*"))
    assert [f.name for f in files] == [f"trajectories_{n:06d}.safetensors" for n in (0, 2, 4)]
    files[1].unlink()  # as if killed before this one was written
    wc.temporary_name(files[1]).write_bytes(b"half")
    done = run(*SAMPLE, "--out", out)
    assert done.returncode == 0 and "2 to be made" in done.stdout, done.stderr
    assert sorted(out.iterdir()) == files
    data, reference = wc.Trajectories(out), wc.Trajectories(made / "trajectories")
    assert len(data) == 6
    for i in range(6):  # two processes = one, resumed = whole
        torch.testing.assert_close(data[i][0], reference[i][0], atol=2e-3, rtol=2e-3)
        assert data[i][1] == reference[i][1] == wc.shuffled((TINY / "prompts.txt").read_text().splitlines(), i, 0)
    done = run(*SAMPLE, "--count", 10 ** 12, "--per-file", 10 ** 11, "--out", tmp_path / "more")  # 10 PB
    assert done.returncode == 2 and "GB free, but the trajectories of --count take 1" in done.stderr, done.stderr
    assert not any((tmp_path / "more").iterdir())


def test_kept_states_are_the_teachers_ode(made, parts):
    """Solved again here, step by step."""
    dit, _, text, _ = parts
    trajectory, prompt = wc.Trajectories(made / "trajectories")[3]
    sigmas, x = [1.0, 0.9375, 5 / 6, 0.625, 0.0], trajectory[0][None]
    with torch.no_grad():
        for k in range(4):
            t = torch.tensor([1000 * sigmas[k]])
            cond, uncond = dit(x, t, text([prompt])), dit(x, t, text([""]))
            x = x + (sigmas[k + 1] - sigmas[k]) * (uncond + 2.0 * (cond - uncond))
            torch.testing.assert_close(x[0], trajectory[k + 1], atol=0.02, rtol=0.02)  # stored as float16


def test_a_reward_of_ones_own_is_learned(made, tmp_path):
    """Any callable: here brightness, which a few steps raise; a reward that is not a number stops the run in words."""
    (tmp_path / "mine.py").write_text(
        "def bright(video, prompts):\n    assert video.shape[1:3] == (3, 1)\n    return video.mean(dim=(1, 2, 3, 4))\n"
        "calls = []\n"
        "def broken(video, prompts):\n    calls.append(1)\n    r = video.mean(dim=(1, 2, 3, 4))\n"
        "    return r / 0 if len(calls) == 3 else r\n"
        "def wrong(video, prompts):\n    return video.mean()\n")
    bright, broken, wrong = (
        run("reward_forcing.py", "--init", made / "ode.safetensors", *SHORT, "--lr", 1e-3, "--exit-step", "last",
            "--reward", f"{where}:{name}", "--steps", steps, "--out", tmp_path / name, "--sample-every", sample,
            env={"PYTHONPATH": str(tmp_path)}) for where, name, steps, sample in
        ((tmp_path / "mine.py", "bright", 10, 0), ("mine", "broken", 5, 0), ("mine", "wrong", 5, 5)))
    assert bright.returncode == 0, bright.stderr
    rewards = [m["reward"] for m in metrics(tmp_path / "bright")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
    assert f"reward is inf at step 3; the last good state is step 2 in {tmp_path / 'broken/state.pt'}" in \
        broken.stderr.replace("nan", "inf").replace("-inf", "inf")
    assert wrong.returncode == 2 and "the reward wrong returned shape ()" in wrong.stderr


def test_frame_wise_and_first_steps_of_the_whole_path(tmp_path):
    """Each stage's file is what the next one takes, chunk 1; and generate.py shows both kinds of student."""
    flags = ["--batch", 2, "--frames", 9]
    train = [*flags, "--steps", 1, "--sample-every", 0]
    student, ode, reward = (tmp_path / name / "model.safetensors" for name in ("student", "ode", "reward"))
    *stages, shown, streamed = (run(*command) for command in [
        ["distill_dmd.py", "--ratio", 1, *train, "--out", student.parent],
        ["ode_init.py", "sample", "--count", 2, "--steps", 4, *flags, "--out", tmp_path / "data"],
        ["ode_init.py", "train", "--data", tmp_path / "data", "--init", student, "--chunk", 1, *train,
         "--out", ode.parent],
        ["reward_forcing.py", "--init", ode, "--reward-frames", "random", *train, "--out", reward.parent],
        *(["generate.py", CAPTIONS[0], "--checkpoint", file, *more, "--frames", 9, "--out", tmp_path / f"{i}.mp4"]
          for i, (file, more) in enumerate(((student, ["--bidirectional"]), (reward, []))))])
    for done in (*stages, shown, streamed):
        assert done.returncode == 0, done.stderr
    assert "chunks of 1 latent frame;" in stages[-1].stdout and "all frames at once" in shown.stdout
    for done in (shown, streamed):
        assert "timesteps 1000, 937.5, 833.333, 625" in done.stdout


BAD = [
    (["reward_forcing.py", "--model", "Wan-AI/x"], "no --init: reward forcing starts from a causal few-step generator"),
    (["reward_forcing.py", "--init", "{ode}", "--reward-past", -1], "--reward-past: -1 must be at least 0"),
    (["reward_forcing.py", "--init", "{ode}", "--reward-past", "some"], "--reward-past: some is no whole number"),
    (["reward_forcing.py", "--init", "{student}"], "kind = bidirectional, but kind = causal is needed here"),
    (["distill_dmd.py", "--model", "Wan-AI/x", "--student", "causal"],
     "no --init: a causal student starts from a causal few-step one"),
    (["distill_dmd.py", "--student", "causal", "--init", "{student}"], "but kind = causal is needed here"),
    (["distill_dmd.py", "--student", "causal", "--history", "raven", "--init", "{ode}", "--rollout-frames", 61],
     "--rollout-frames 61 needs --history self-forcing"),
    (["distill_dmd.py", "--student", "causal", "--init", "{ode}", "--frames", 1, "--rollout-frames", 13, "--chunk", 1],
     "--rollout-frames 13 with --frames 1 trains nothing"),
    (["distill_dmd.py", "--student", "causal", "--init", "{ode}", "--rollout-frames", 61],
     "--rollout-frames 61 is not --frames 57 and whole chunks of 12 frames: take 69"),
    (["distill_dmd.py", "--student", "causal", "--history", "teacher-forcing", "--init", "{ode}", "--data", "{data}"],
     "holds latents (16, 4, 4, 4), but the flags ask for (16, 15, 8, 8)"),
    (["cm_grpo.py", "--model", "Wan-AI/x"], "no --init: CM-GRPO starts from a causal few-step generator"),
    (["cm_grpo.py", "--init", "{ode}", "--group", 1], "--group: 1 must be at least 2"),
    (["cm_grpo.py", "--init", "{ode}", "--policy", "em", "--em-noise", 0], "--em-noise: 0 must be more than 0"),
    (["cm_grpo.py", "--init", "{ode}", "--group", 3, "--prompts-per-step", 3, "--batch", 2], "do not divide into"),
    (["cm_grpo.py", "--init", "{ode}", "--rewards", "beauty=1"], "--rewards beauty cannot be loaded"),
    (["cm_grpo.py", "--init", "{ode}", "--rewards", "motion=much"], "--rewards: much is no number"),
    (["cm_grpo.py", "--init", "{ode}", "--rewards", "aesthetic=1"], "the reward aesthetic needs --aesthetic-head"),
    (["ode_init.py", "train", "--data", "{data}", "--init", "{ode}"], "but kind = bidirectional is needed here"),
    (["reward_forcing.py", "--init", "{ode}", "--reward", "nothing:here"], "--reward nothing:here cannot be loaded"),
    (["reward_forcing.py", "--init", "{ode}", "--reward-model", "{empty}"], "holds neither ImageReward.pt nor"),
    (["distill_dmd.py", "--frames", 12], "--frames: 12 is not 1 + 4k: take 9 or 13"),
    (["distill_dmd.py", "--height", 60], "--height: 60 is not 16 + 16k: take 48 or 64"),
    (["distill_dmd.py", "--batch", 0], "--batch: 0 must be at least 1"),
    (["ode_init.py", "train", "--keep-every", 75], "--keep-every 75 must be a multiple of --save-every 50"),
    (["distill_dmd.py", "--prompts", "{empty}/none.txt"], "none.txt"),
    (["distill_dmd.py", "--chunk", 1], "--chunk 1 needs --student causal"),
    (["distill_dmd.py", "--data", "{data}"], "has no effect here: history bidirectional trains on the"),
    (["distill_dmd.py", "--chunk-weight-shift", -1], "--chunk-weight-shift -1.0 has no effect here: all frames are one chunk"),
    (["ode_init.py", "train", "--data", "{data}", "--frames", 5, "--height", 32, "--width", 32], "--frames 5, but the trajectories in"),
    (["cm_grpo.py", "--init", "{ode}", "--accum", 3], "--accum 3 follows from --prompts-per-step, --group and --batch"),
    (["cm_grpo.py", "--init", "{ode}", "--aesthetic-head", "x.pth"], "has no effect here: aesthetic=WEIGHT is not among --rewards"),
    (["cm_grpo.py", "--init", "{one_step}"], "samples in one step: CM-GRPO needs at least two"),
    (["cm_grpo.py", "--init", "{adapter}"], "with kind = a LoRA adapter without its generator, but kind = causal is"),
    (["distill_dmd.py", "--out", "{run}"], "already holds a run: go on with --resume"),
    (["distill_dmd.py", "--out", "{run}", "--resume"], "was begun with"),
    (["ode_init.py", "train", "--data", "{empty}"], "holds no trajectories: make them with ode_init.py sample"),
    (["ode_init.py", "train", "--data", "{damaged}"], "is not a shard of trajectories, or is damaged"),
    (["ode_init.py", "sample", "--out", "{data}", "--seed", 5], "holds trajectories with"),
    (["ode_init.py", "sample", "--out", "README.md"], "cannot write to README.md"),
    (["ode_init.py", "train", "--data", "{data}", "--init", "{other}"], "samples at 1000, 900, but"),
    (["distill_dmd.py", "--out", "/dev/null/x"], "cannot write to /dev/null/x"),
    (["distill_dmd.py", "--history", "raven"], "--history raven needs --student causal"),
    (["distill_dmd.py", "--shift", 0], "--shift: 0 must be more than 0"),
    (["reward_forcing.py", "--init", "{ode}", "--seed", 1 << 24], "--seed: 16777216 must be at most 16777215"),
]


@pytest.fixture(scope="module")
def refused(made, tmp_path_factory):
    """(how it ended, the folder it was told to write to) of each case of BAD."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "damaged", "run"):
        (folder / name).mkdir()
    (folder / "damaged/trajectories_000000.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{nothing")
    torch.save({"step": 1, "settings": {"stage": "distill_dmd"}, "parts": {}}, folder / "run/state.pt")
    wc.save_checkpoint(folder / "other.safetensors", wc.load_dit(TINY).state_dict(), kind="bidirectional",
                       timesteps="1000,900")
    wc.save_checkpoint(folder / "one_step.safetensors", wc.load_dit(TINY).state_dict(), kind="causal",
                       timesteps="1000")
    wc.save_checkpoint(folder / "adapter.safetensors", {f"blocks.0.ffn.0.lora_{side}.weight": torch.zeros(shape) for
                                                        side, shape in (("A", (2, 192)), ("B", (768, 2)))})
    names = {**{name: folder / f"{name}.safetensors" for name in ("other", "one_step", "adapter")},
             "student": made / "student.safetensors",
             "ode": made / "ode.safetensors", "data": made / "trajectories",
             **{name: folder / name for name in ("empty", "damaged", "run")}}
    commands = []
    for i, (args, _) in enumerate(BAD):
        args = [a.format(**names) if isinstance(a, str) else a for a in args]
        args += [] if "--out" in args else ["--out", folder / str(i)]
        commands.append(args if "sample" in args else [*args, "--steps", 1])
    return [(run(*command), folder / str(i)) for i, command in enumerate(commands)]


@pytest.mark.parametrize("case", range(len(BAD)), ids=[words for _, words in BAD])
def test_bad_input_is_one_sentence(refused, case):
    done, out = refused[case]
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and BAD[case][1] in done.stderr
    assert "Traceback" not in done.stderr and not (out / "state.pt").exists()
