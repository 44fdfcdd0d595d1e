"""Stage: few-step distillation by distribution matching (DMD): Wan 2.1 -> a student that samples in a few steps.

Papers: DMD2 (arXiv 2405.14867), CausVid (2412.07772), Self Forcing (2506.08009); Reward-Forcing 3.4, first stage.

One step:
  `--ratio` times, the critic:    x0 = student's sample; flow matching of the fake score on it
  once, the generator:
    1. x0 = student's sample by backward simulation: the consistency sampler without gradient up to an exit step drawn
       at random, whose prediction carries gradient
    2. x_s = (1 - s) x0 + s eps, with s random
    3. real = frozen teacher with guidance, fake = critic, both as predictions of x0 from x_s
    4. d = (fake - real) / mean|x0 - real|;  loss = 1/2 |x0 - sg(x0 - d)|^2, whose gradient at x0 is d

  paper         code              paper             code
  G_theta       generator         s_real, s_fake    teacher, critic (as x0 predictions)
  tau, s        t                 grad of D_KL      direction

Needs prompts only. Differs from DMD2: no GAN loss; from the public code: a direction that is not a number stops the run
instead of being set to zero.

    python distill_dmd.py --out runs/student                                             # tiny model, CPU, minutes
    torchrun --standalone --nproc_per_node 8 distill_dmd.py --model Wan-AI/Wan2.1-T2V-1.3B --accum 8 --out runs/student
"""
import argparse
import random

import torch

from wan_causal import (EMA, NEGATIVE_PROMPT, InputError, Run, add_noise, find_folder, format_steps, gaussian,
                        guided_velocity, latent_shape, load_checkpoint, load_dit, load_text_encoder, load_vae,
                        parse_stage, processes, read_prompts, require, rollout, run_script, sample_generators,
                        sample_numbers, shift_sigma, shuffled, trainable, training_flags, warped_steps, x0_from_v)


# ----------------------------------------------------------------------------------------------------------
# The losses

def score_timestep(generators, shift, device):
    """Timesteps (B,) at which the scores are compared: uniform whole numbers, shifted, within [20, 980]."""
    tau = torch.stack([torch.randint(1000, (), generator=g, device=g.device) for g in generators]).to(device)
    return 1000 * shift_sigma(tau / 1000, shift).clamp(0.02, 0.98)  # Self Forcing's rule


def dmd_direction(x0, fake, real):
    """Gradient of the KL divergence between student and teacher at x0; all (B, C, F, H, W), float64 out.

    DMD2 eq. 2-3 and DMD eq. 7-8 in terms of x0 predictions: (fake - real) / mean|x0 - real|, the mean per sample.
    """
    x0, fake, real = x0.double(), fake.double(), real.double()
    scale = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1e-5)
    return (fake - real) / scale


def dmd_loss(x0, direction):
    """1/2 mean (x0 - sg(x0 - direction))^2 in float64: its gradient is direction / x0.numel()."""
    target = (x0.double() - direction).detach()  # no gradient through the scores
    return 0.5 * (x0.double() - target).square().mean()


def flow_loss(model, x0, t, context, eps):
    """Flow matching: mean (v - (eps - x0))^2 at x_t; t (B,)."""
    return (model(add_noise(x0, eps, t), t, context) - (eps - x0)).square().mean()


@torch.no_grad()
def compare_scores(x0, teacher, critic, context, negative, guidance, shift, generators):
    """The DMD direction at x0 (B, C, F, H, W), at one random noise level per sample."""
    t = score_timestep(generators, shift, x0.device)
    x_t = add_noise(x0, gaussian(x0.shape, generators, x0.device), t)
    real = x0_from_v(x_t, guided_velocity(teacher, x_t, t, context, negative, guidance), t)
    fake = x0_from_v(x_t, critic(x_t, t, context), t)
    return dmd_direction(x0, fake, real)


# ----------------------------------------------------------------------------------------------------------
# The student's sample

def student_sample(generator, noise, context, steps, exit_step, generators):
    """x0 (B, C, F, H, W) of the bidirectional student; the step `exit_step` carries gradient if gradients are on."""
    chunk, = rollout(generator, noise, context, steps, [noise.shape[2]], exit_step=exit_step, generator=generators)
    return chunk.x0


# ----------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description='Few-step distillation by distribution matching.',
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training_flags(p, out='runs/distill_dmd', steps=600, accum=8, ema_start=200)
    g = p.add_argument_group('distillation')
    g.add_argument('--student', choices=['bidirectional'], default='bidirectional', help='what is trained')
    g.add_argument('--init', metavar='FILE', help='weights that the student starts from (default: --model)')
    g.add_argument('--teacher', help='the Wan model of the real score, e.g. the 14B one (default: --model)')
    g.add_argument('--shift', type=float, default=5.0, help='timestep shift, of the student and of the scores')
    g.add_argument('--guidance', type=float, default=3.0, help='of the real score, usual formula; 1 is off')
    g.add_argument('--negative', default=NEGATIVE_PROMPT, help='negative prompt of the real score')
    g.add_argument('--ratio', type=int, default=5, help='critic updates per generator update')
    g.add_argument('--critic-lr', type=float, default=4e-7, help='learning rate of the critic')
    args = parse_stage(p, 'distill_dmd', argv)
    if args.ratio < 1:
        raise InputError(f'--ratio {args.ratio} must be at least 1')
    return args


def main():
    args = parse_args()
    with processes(args.device) as process:
        train(args, process)


def train(args, process):
    # --- setup
    device = process.device
    dtype = getattr(torch, args.dtype or ('bfloat16' if device.type == 'cuda' else 'float32'))
    steps = warped_steps(shift=args.shift)
    prompts, held_out = read_prompts(args)
    process.print(f'timesteps {format_steps(steps)}; all frames at once')

    # --- models
    folder = find_folder(args.model)
    text, vae = load_text_encoder(folder, dtype, device), load_vae(folder, dtype, device)
    net, critic_net = (trainable(load_dit(folder), args, device, dtype) for _ in range(2))
    if args.init:
        require(load_checkpoint(net, args.init), args.init, kind='bidirectional')
    teacher = load_dit(args.teacher or folder, dtype, device).eval().requires_grad_(False)  # frozen
    generator, critic = process.wrap(net), process.wrap(critic_net)
    negative = text([args.negative] * args.batch).float()
    shape = latent_shape(args, net.config)

    # --- optimizers
    ema = EMA(net, args.ema, args.ema_start)
    optimizer, critic_optimizer = (torch.optim.AdamW(model.parameters(), lr=lr, betas=(args.beta1, 0.999),
                                                     weight_decay=args.weight_decay)
                                   for model, lr in ((net, args.lr), (critic_net, args.critic_lr)))
    run = Run('distill_dmd', args, process, generator=net, critic=critic_net, ema=ema, optimizer=optimizer,
              critic_optimizer=critic_optimizer)

    def draw(update, micro):
        """Noise, text and an exit step for one backward pass; every update has its own samples."""
        numbers = sample_numbers(args, process, update, micro)
        generators = sample_generators(args, numbers, device)
        context = text([shuffled(prompts, n, args.seed) for n in numbers]).float()
        noise = gaussian((args.batch, *shape), generators, device)
        exit_step = random.Random(f'{args.seed} {update}').randrange(len(steps))  # the same on all ranks
        return noise, context, exit_step, generators

    # --- loop
    for step in run.steps():
        update = step * (args.ratio + 1)
        for update in range(update, update + args.ratio):  # the critic follows the student's distribution
            critic_loss = 0
            for micro in range(args.accum):
                noise, context, exit_step, generators = draw(update, micro)
                with torch.no_grad():  # the critic's loss does not train the generator
                    x0 = student_sample(generator, noise, context, steps, exit_step, generators)
                t = score_timestep(generators, args.shift, device)
                with process.sync(critic, micro == args.accum - 1):
                    loss = flow_loss(critic, x0, t, context, gaussian(x0.shape, generators, device)) / args.accum
                    loss.backward()
                critic_loss += loss.item()
            critic_norm = torch.nn.utils.clip_grad_norm_(critic_net.parameters(), args.grad_clip)
            run.check(critic_loss=critic_loss, critic_norm=critic_norm)
            critic_optimizer.step()
            critic_optimizer.zero_grad(set_to_none=True)

        dmd_norm = motion = 0
        for micro in range(args.accum):
            noise, context, exit_step, generators = draw(update + 1, micro)
            with process.sync(generator, micro == args.accum - 1):
                x0 = student_sample(generator, noise, context, steps, exit_step, generators)
                direction = compare_scores(x0.detach(), teacher, critic_net, context, negative, args.guidance,
                                           args.shift, generators)
                (dmd_loss(x0, direction) / args.accum).backward()
            dmd_norm += direction.abs().mean().item() / args.accum
            motion += x0.detach().diff(dim=2).abs().mean().item() / args.accum
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        metrics = run.check(critic_loss=critic_loss, dmd=dmd_norm, grad_norm=norm, critic_norm=critic_norm,
                            motion=motion)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(net, step)

        # --- log, sample, save
        run.report(**metrics)
        if run.due(args.sample_every):
            with ema.swapped_in(net):
                for _ in run.samples(net, vae, text, held_out, shape, steps, [shape[1]]):
                    pass
        if run.due(args.save_every):
            run.save(ema.average, steps, kind='bidirectional', shift=args.shift, config=net.config)


if __name__ == '__main__':
    run_script(main)
