"""Stage: reward forcing: a causal few-step generator learns texture from an image reward on
its own rollouts.

Paper: Reward-Forcing (arXiv 2601.16933; not 2512.04678, another paper of nearly the same
name) 3.2 (loss), 3.4 and B (settings), 5.2 (which frames); rollout of Self Forcing
(2506.08009); ImageReward (2304.05977).

One step:
  1. roll out a video chunk by chunk with the KV cache, as at inference; every chunk stops at
     a shared exit step
  2. decode it, score the last frame:  r = R(frame, prompt)
  3. loss = -mean r; its gradient goes back through the reward, through the decoder (and its
     memory of earlier latent frames, as far as --reward-past says) and through the exit step
     of the chunks that it reaches. The history (the cache) is a constant.
No teacher, no critic, no data but prompts.

  paper        code                 paper        code
  G_theta      generator            R            reward
  x^_T         video[:, :, -1]      z            noise

"Random frames" are one frame for each update. The exit step is drawn at random, as in Self
Forcing, whose rollout the paper takes. Where it is silent: no warm-up, 600 steps, gradients
clipped at 10, and the gradient goes through the two latent frames before the rewarded one in
the decoder's memory, so that of the last frame reaches the last chunk alone. With the tiny VAE
that is 98 % of the exact gradient's squared norm (0: 90 %, 5: 99.9 %), with random weights of
Wan's sizes 3 %; with Wan's own it was not measured. `--reward-past all` is exact.

Tiny model, on a CPU, in minutes; then one machine of 8 GPUs (batch 8, as in the paper):
    python reward_forcing.py --init runs/ode/model.safetensors --out runs/reward
    torchrun --standalone --nproc_per_node 8 reward_forcing.py \\
        --model Wan-AI/Wan2.1-T2V-1.3B --init runs/ode/model.safetensors --out runs/reward
A reward of your own is any callable (video (B, 3, T, H, W) in [-1, 1], prompts) -> (B,):
    --reward my_module:my_function
"""
import random

from wan_causal import (EMA, InputError, Parser, Run, block_causal, checked_reward, chunk_sizes,
                        claim_folder, compute_dtype, counted, find_folder, format_steps,
                        frame_reward, gaussian, latent_frame, latent_motion, latent_shape,
                        load_function, load_generator, load_image_reward, load_text_encoder,
                        load_vae, parse_stage, processes, read_prompts, refuse_unused,
                        rewarded_video, rollout, run_script, sample_generators, sample_numbers,
                        say_cut, shuffled, trainable, training_flags, whole)

import torch


# ----------------------------------------------------------------------------------------
# Rewards

def load_reward(args, process, prompts):
    """The reward that --reward names: 'imagereward', or `module:function` of the user's own."""
    if args.reward == 'imagereward':
        model = load_image_reward(args.reward_model, process.device)
        say_cut(process, prompts, model, 'ImageReward')
        return frame_reward(model)
    return load_function(args.reward, '--reward', 'imagereward')


def latent_past(text):
    """An argparse type: a number of latent frames, or all of them (-> None)."""
    return None if text == 'all' else whole(0)(text)


def rewarded_frames(mode, frames, steer):
    """Numbers of the video frames that are rewarded: the 'last' or 'all' (paper 3.2), or one
    'random' (5.2)."""
    if mode == 'all':
        return list(range(frames))
    return [frames - 1 if mode == 'last' else steer.randrange(frames)]


def first_reached(frames, past):
    """The first latent frame that the gradient of these video frames reaches through `past`
    latent frames (None: all) of the decoder's memory."""
    return 0 if past is None else max(0, latent_frame(frames[0]) - past)


# ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(description='Reward feedback on the rollouts of a causal generator.')
    training_flags(p, out='runs/reward_forcing', steps=600)
    g = p.add_argument_group('reward forcing')
    g.add_argument('--init', metavar='FILE', help='causal few-step generator to start from')
    g.add_argument('--reward', default='imagereward', help='imagereward, or module:function')
    g.add_argument('--reward-model', default='THUDM/ImageReward',
                   help='ImageReward\'s folder or hub repository')
    g.add_argument('--reward-frames', choices=['last', 'random', 'all'], default='last',
                   help='which frames it sees')
    g.add_argument('--reward-past', type=latent_past, default=2, metavar='N',
                   help='through how many latent frames before a rewarded one the gradient '
                        'goes on in the decoder\'s memory; all: exact')
    g.add_argument('--exit-step', choices=['random', 'last'], default='random',
                   help='the denoising step whose prediction is rewarded, shared by all chunks')
    g.add_argument('--chunk', type=whole(1),
                   help='latent frames per chunk; 1 is frame-wise (default: as --init)')
    args = parse_stage(p, 'reward_forcing', argv)
    if args.reward != 'imagereward':
        refuse_unused(p, args, f'the reward is {args.reward}', 'reward_model')
    if not args.init:
        raise InputError('no --init: reward forcing starts from a causal few-step generator, '
                         'such as the result of ode_init.py train')
    return args


def main():
    args = parse_args()
    with processes(args.device, args.shard) as process:
        train(args, process)


def train(args, process):
    # --- setup
    claim_folder(args, process)
    device = process.device
    dtype = compute_dtype(args, device)
    prompts, held_out = read_prompts(args)

    # --- models
    folder = find_folder(args.model)
    text = load_text_encoder(folder, dtype, device, args.offload_text)
    vae = load_vae(folder, dtype, device)
    say_cut(process, prompts, text, 'the text encoder')
    reward = load_reward(args, process, prompts)
    net, steps, chunk, shift = load_generator(folder, args.init, 'causal')

    # --- what is trained
    vae.decoder.checkpointing = args.checkpointing
    generator = process.wrap(trainable(net, args, device, dtype))
    chunk = args.chunk or chunk
    shape = latent_shape(args, net.config)
    chunks = chunk_sizes(shape[1], chunk)
    layout = block_causal(chunks)
    process.print(f'timesteps {format_steps(steps)}; chunks of '
                  f'{counted(chunk, "latent frame")}; reward: {args.reward} of '
                  f'{args.reward_frames} frame{"s" * (args.reward_frames == "all")}')

    # --- optimizer
    ema = EMA(net, args.ema, args.ema_start)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(args.beta1, 0.999),
                                  weight_decay=args.weight_decay, fused=True)
    run = Run('reward_forcing', args, process,
              ['generate.py "PROMPT" --checkpoint', 'cm_grpo.py --init'],
              generator=net, ema=ema, optimizer=optimizer)

    def seen(video, prompts):
        frames = video if args.reward_frames == 'all' else video[:, :, -1:]
        return checked_reward(reward, frames, prompts)

    def sample():
        with ema.swapped_in(net):
            return run.samples(net, vae, text, held_out, shape, steps, chunks, reward=seen)

    # --- loop
    if run.step == 0 and run.due(args.sample_every):
        sample()  # what it starts from
    for step in run.steps():
        # what steers the step is the same on all ranks
        steer = random.Random(f'{args.seed} {step}')
        exit_step = len(steps) - 1
        if args.exit_step == 'random':
            exit_step = steer.randrange(len(steps))
        frames = rewarded_frames(args.reward_frames, args.frames, steer)
        # chunks after the last rewarded frame are not made, those before the first latent
        # frame that the gradient reaches are made without a graph
        rolled = chunks[:layout.chunk[latent_frame(frames[-1])] + 1]
        reached = layout.chunk[first_reached(frames, args.reward_past)]
        grad_from = layout.chunk.index(reached)

        rewards, motion = [], 0
        for micro in range(args.accum):
            numbers = sample_numbers(args, process, step, micro)
            captions = [shuffled(prompts, n, args.seed) for n in numbers]
            generators = sample_generators(args, numbers, device)
            context = text(captions).float()
            noise = gaussian((args.batch, *shape), generators, device)[:, :, :sum(rolled)]
            with process.sync(generator, micro == args.accum - 1):
                # rollout: x^ = G(z), the history a constant
                parts = rollout(generator, noise, context, steps, rolled, exit_step=exit_step,
                                grad_from=grad_from, generator=generators)
                x0 = torch.cat([part.x0 for part in parts], dim=2)  # (B, C, F, H, W)
                # reward: r = R(x^_T)
                video = rewarded_video(vae, x0, frames, args.reward_past)  # (B, 3, T', H, W)
                r = checked_reward(reward, video, captions)  # (B,)
                # loss (paper 3.2): L = -E[R(x^_T)]
                (-r.mean() / args.accum).backward()
            rewards.append(r.detach())
            motion += latent_motion(x0.detach()).item() / args.accum
        rewards = torch.cat(rewards)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        metrics = run.check(reward=rewards.mean(), square=rewards.square().mean(),
                            motion=motion, grad_norm=norm)
        optimizer.step()
        process.forget_gradients(optimizer)
        ema.update(net, step)

        # --- log, sample, save
        spread = max(0, metrics.pop('square') - metrics['reward'] ** 2) ** 0.5
        metrics = {'reward': metrics.pop('reward'), 'spread': spread, 'exit': exit_step,
                   **metrics}
        if run.due(args.sample_every):
            metrics |= sample()
        run.report(**metrics)
        if run.due(args.save_every):
            run.save(ema.average, steps, kind='causal', chunk=chunk, shift=shift,
                     config=net.config)


if __name__ == '__main__':
    run_script(main)
