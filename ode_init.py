"""Stage: ODE trajectories of the teacher, then a causal student that regresses them ("ODE
only").

Papers: CausVid (arXiv 2412.07772) 4.3; Self Forcing (2506.08009); Reward-Forcing
(2601.16933) 3.2 and 3.4: few trajectories teach the motion, the texture comes from the
reward.

sample  for each prompt: x = noise; solve dx/dsigma = v(x, sigma) with guidance, Euler steps;
        keep x at the student's few timesteps t_1 = 1000 > ... > t_K and at the end:
        a trajectory (K + 1, C, F, H, W)
train   each chunk of frames draws one of the K + 1 states (the last one is clean, t = 0);
        one block-causal forward over all frames, with a timestep per frame;
        loss = mean (x0 - clean)^2 over the frames with t > 0

  paper (Reward-Forcing 3.2)    code
  x_t^i, i counts chunks        trajectory[:, k], k = 0..K; the last one is x_0^i
  t^i                           t, one for each chunk: levels[index]
  G_phi({x_t^i}, {t^i})         x0_from_v(x_t, generator(x_t, t, ...), t)
  L_ode                         regression_loss

The solver's grid contains the student's timesteps exactly, at the student's shift, as Causal
Forcing's does. Differs from Self Forcing's script, which solves at shift 8 and keeps states at
t = 1000, 960, 889, 727, while its student runs at 1000, 937.5, 833.3, 625; and from CausVid's,
which keeps 1000, 757, 522 and solves in float32 (here bfloat16 on CUDA, without --dtype
float32). Reward-Forcing speaks of all timesteps; the K + 1 states of the student's are kept
here, as in CausVid. The loss is averaged within each sample first, in the public code over all
noisy frames of the batch at once. Training has CausVid's settings (3000 steps of 128, beta1
0.9), and the averaged weights of the other stages.

Tiny model, on a CPU, in minutes; then one machine of 8 GPUs:
    python ode_init.py sample --out runs/trajectories
    python ode_init.py train --data runs/trajectories --init runs/student/model.safetensors \\
        --out runs/ode
    torchrun --standalone --nproc_per_node 8 ode_init.py sample \\
        --model Wan-AI/Wan2.1-T2V-1.3B --out runs/trajectories
    torchrun --standalone --nproc_per_node 8 ode_init.py train \\
        --model Wan-AI/Wan2.1-T2V-1.3B --data runs/trajectories \\
        --init runs/student/model.safetensors --out runs/ode
"""
import json
import sys
from pathlib import Path

from wan_causal import (EMA, FRAMES, NEGATIVE_PROMPT, PIXELS, SEED, InputError, Parser, Run,
                        Trajectories, block_causal, check_writable, chunk_sizes, claim_folder,
                        compute_dtype, counted, draw_per_chunk, find_folder, format_steps,
                        gaussian, guided_velocity, latent_motion, latent_shape, load_dit,
                        load_generator, load_text_encoder, load_vae, machine_flags, number,
                        parse_stage, processes, read_prompts, refuse_unused, replace_file,
                        require_space, run_script, sample_generators, sample_numbers, say_cut,
                        set_threads, shift_sigma, shuffled, tiny_model, trainable,
                        training_flags, warped_steps, whole, write_tensors, x0_from_v)

import torch
from tqdm import tqdm


# ----------------------------------------------------------------------------------------
# The solver's grid and the loss

def solver_grid(timesteps, shift, count):
    """Noise levels from 1 to 0 in about `count` Euler steps that contain `timesteps` exactly:
    (sigmas, indices).

    Even in the unshifted sigma between two timesteps. timesteps fall from 1000; indices: where
    they are in `sigmas`.
    """
    # 1 / shift undoes the shift
    edges = [shift_sigma(t / 1000, 1 / shift) for t in timesteps] + [0.0]
    sigmas, indices = [], []
    for t, high, low in zip(timesteps, edges, edges[1:]):
        indices.append(len(sigmas))
        sigmas.append(t / 1000)
        # between two of the student's timesteps as many steps as their distance deserves
        n = max(1, round(count * (high - low)))
        between = [high + (low - high) * i / n for i in range(1, n)]
        sigmas += [shift_sigma(sigma, shift) for sigma in between]
    return sigmas + [0.0], indices + [len(sigmas)]


def euler_trajectory(model, noise, context, negative, sigmas, guidance):
    """Solve dx/dsigma = v(x, sigma) from noise (B, C, F, H, W) by Euler steps; yield x at each
    of `sigmas`.

    context, negative (B, L', text_dim); sigmas fall from 1 to 0.
    """
    x = noise
    yield x
    for sigma, lower in zip(sigmas, sigmas[1:]):
        v = guided_velocity(model, x, 1000 * sigma, context, negative, guidance)
        x = x + (lower - sigma) * v
        yield x


def pick_states(trajectory, index):
    """trajectory (B, K + 1, C, F, H, W), index (B, F): which state each frame takes -> (B, C,
    F, H, W)."""
    B, _, C, F, H, W = trajectory.shape
    index = index.view(B, 1, 1, F, 1, 1).expand(B, 1, C, F, H, W)
    return trajectory.gather(1, index).squeeze(1)


def regression_loss(x0, clean, t):
    """Mean squared error over the frames with t > 0, per sample, then over samples.

    x0, clean (B, C, F, H, W), t (B, F). Reward-Forcing 3.2, L_ode; CausVid eq. 6. A clean
    frame (t = 0) is input, and has nothing to be learned.
    """
    noisy = (t > 0).float()  # (B, F)
    error = (x0 - clean).square().mean(dim=(1, 3, 4))  # (B, F)
    # differs from the public code: the mean of each sample first, then of the samples
    each = (error * noisy).sum(1) / noisy.sum(1).clamp(min=1)  # (B,)
    return each.mean()


def megabytes(count):
    """A number of bytes in words."""
    return f'{count / 1e6:.1f} MB' if count < 1e9 else f'{count / 1e9:.1f} GB'


def shard_path(folder, first):
    """The file of the trajectories first, first + 1, ...: a fixed range of numbers, written
    whole or not at all."""
    return Path(folder) / f'trajectories_{first:06d}.safetensors'


# ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = Parser(description='ODE trajectories of the teacher (sample), and their regression '
                           '(train).')
    p.add_argument('verb', choices=['sample', 'train'],
                   help='what to do; `ode_init.py VERB --help` shows its flags')
    verb = argv[0] if argv else None
    if verb not in ('sample', 'train'):
        p.parse_args(argv)  # --help, or an error
    if verb == 'train':
        # no alarm: what it starts from does not move as a causal generator does
        training_flags(p, out='runs/ode', steps=3000, beta1=0.9, accum=16, motion_alarm=0)
        g = p.add_argument_group('regression')
        g.add_argument('--data', default='runs/trajectories', metavar='FOLDER',
                       help='what `sample` wrote')
        g.add_argument('--init', metavar='FILE',
                       help='few-step student to start from (default: --model)')
        g.add_argument('--chunk', type=whole(1), default=3,
                       help='latent frames per chunk; 1 is frame-wise')
    else:
        p.add_argument('--model', default=tiny_model(),
                       help='the teacher: a folder or hub repository')
        p.add_argument('--prompts', default='gdhe17/Self-Forcing:vidprom_filtered_extended.txt',
                       metavar='FILE',
                       help='one per line, a file or repository:path on the hub; --count of '
                            'them are drawn')
        p.add_argument('--held-out', metavar='FILE',
                       help='prompts that no stage trains on (default: the last 4 of '
                            '--prompts)')
        p.add_argument('--count', type=whole(1), default=1400, help='trajectories')
        p.add_argument('--frames', type=FRAMES, default=81, help='video frames, 1 + 4k')
        p.add_argument('--height', type=PIXELS, default=480, help='pixels, a multiple of 16')
        p.add_argument('--width', type=PIXELS, default=832, help='pixels, a multiple of 16')
        p.add_argument('--steps', type=whole(1), default=48, help='Euler steps')
        p.add_argument('--shift', type=number(above=0), default=5.0,
                       help='timestep shift, which must be the student\'s')
        p.add_argument('--guidance', type=number(), default=6.0,
                       help='classifier-free guidance, 1 is off')
        p.add_argument('--negative', default=NEGATIVE_PROMPT, help='negative prompt')
        p.add_argument('--batch', type=whole(1), default=1, help='trajectories solved at once')
        p.add_argument('--per-file', type=whole(1), default=8, help='trajectories per file')
        p.add_argument('--seed', type=SEED, default=0, help='of the noise')
        p.add_argument('--out', default='runs/trajectories', help='the folder of the shards')
        machine_flags(p)
        p.set_defaults(shard=False)  # the teacher alone fits whole
    args = parse_stage(p, f'ode_init {verb}', argv)
    if verb == 'sample' and args.guidance == 1:
        refuse_unused(p, args, '--guidance 1 needs none', 'negative')
    if verb == 'train':  # the size is the trajectories': who asks for another is told
        args.asked = {name: getattr(args, name) for name in ('frames', 'height', 'width')
                      if getattr(args, name) != p.get_default(name)}
    return args


@torch.no_grad()
def sample(args, process):
    """Solve --count trajectories; shards that exist already are kept."""
    # --- setup
    device, out = process.device, Path(args.out)
    dtype = compute_dtype(args, device)
    timesteps = warped_steps(shift=args.shift)
    sigmas, kept = solver_grid(timesteps, args.shift, args.steps)
    prompts, _ = read_prompts(args)
    folder = find_folder(args.model)
    names = ('model', 'prompts', 'prompts_hash', 'count', 'frames', 'height', 'width', 'steps',
             'shift', 'guidance', 'negative', 'per_file', 'seed')
    settings = {**{key: getattr(args, key) for key in names}, 'timesteps': timesteps}
    there = any(out.glob('trajectories_*.safetensors'))
    if there and (old := Trajectories(out).settings) != settings:
        key = next(key for key in settings if old.get(key) != settings[key])
        raise InputError(f'{out} holds trajectories with {key} = {old.get(key)}, not '
                         f'{settings[key]}: give the same flags to go on, or another --out')

    # --- models
    model = load_dit(folder, dtype, device).eval()
    set_threads(model, device)
    text = load_text_encoder(folder, dtype, device, args.offload_text)
    say_cut(process, prompts, text, 'the text encoder')
    shape = latent_shape(args, model.config)
    negative = text([args.negative])

    # --- what is to be done
    shards = [range(first, min(first + args.per_file, args.count))
              for first in range(0, args.count, args.per_file)]
    missing = [shard for shard in shards if not shard_path(out, shard[0]).exists()]
    each = 2 * len(kept) * torch.Size(shape).numel()  # bytes, float16
    left = sum(map(len, missing))
    need = each * left
    process.print(f'timesteps {format_steps(timesteps)} and 0, out of {len(sigmas) - 1} Euler '
                  f'steps at guidance {args.guidance}\n{args.count} trajectories of '
                  f'{megabytes(each)}: {megabytes(args.count * each)} on disk in all; '
                  f'{left} to be made, {megabytes(need)}')
    check_writable(out)
    require_space(out, need, 'the trajectories of --count take')
    process.barrier()

    # --- loop
    mine = missing[process.rank::process.world]
    bar = tqdm(total=sum(map(len, mine)), desc='trajectories', unit='', disable=process.quiet,
               mininterval=1)
    for shard in mine:
        done = []
        for first in range(shard[0], shard[-1] + 1, args.batch):
            numbers = range(first, min(first + args.batch, shard[-1] + 1))
            # of the trajectory's number, not of the rank's turn
            generators = sample_generators(args, numbers, device)
            noise = gaussian((len(numbers), *shape), generators, device)
            context = text([shuffled(prompts, n, args.seed) for n in numbers])
            states = euler_trajectory(model, noise, context, negative.expand_as(context),
                                      sigmas, args.guidance)
            # (B, K + 1, C, F, H, W)
            done.append(torch.stack([x for i, x in enumerate(states) if i in kept], dim=1))
            bar.update(len(numbers))
        trajectory = torch.cat(done).half().cpu()
        if not trajectory.isfinite().all():
            raise InputError(f'trajectories {shard[0]} to {shard[-1]} are not finite: lower '
                             '--guidance, or use --dtype float32')
        if process.quiet:  # no bar in a log file
            process.print(f'trajectories {shard[0]} to {shard[-1]} of {args.count}')
        save_shard(shard_path(out, shard[0]), trajectory,
                   [shuffled(prompts, n, args.seed) for n in shard], settings)
    bar.close()
    process.barrier()
    process.print(f'{out}: {len(Trajectories(out))} trajectories')


def save_shard(path, trajectory, prompts, settings):
    """One shard, whole or not at all."""
    metadata = {'prompts': json.dumps(prompts), 'settings': json.dumps(settings)}
    state = {'trajectory': trajectory}
    replace_file(path, lambda temporary: write_tensors(temporary, state, metadata))


def train(args, process):
    """Regress the trajectories' clean endpoint with a block-causal student."""
    # --- setup
    claim_folder(args, process)
    device = process.device
    dtype = compute_dtype(args, device)
    data = Trajectories(args.data)
    for name, value in vars(args).pop('asked').items():
        if value != data.settings[name]:
            raise InputError(f'--{name} {value}, but the trajectories in {args.data} have '
                             f'{data.settings[name]}: leave the flag out')
    timesteps, shift = data.settings['timesteps'], data.settings['shift']
    args.frames, args.height, args.width = (data.settings[key]
                                            for key in ('frames', 'height', 'width'))
    # a run is not resumed with more of them, which would change their order
    args.trajectories = len(data)
    _, held_out = read_prompts(args)
    process.print(f'timesteps {format_steps(timesteps)}; chunks of '
                  f'{counted(args.chunk, "latent frame")}; {len(data)} of '
                  f'{data.settings["count"]} trajectories, of {args.frames} frames at '
                  f'{args.width}x{args.height}')

    # --- models
    folder = find_folder(args.model)
    text = load_text_encoder(folder, dtype, device, args.offload_text)
    vae = load_vae(folder, dtype, device)
    net, steps, *_ = load_generator(folder, args.init, 'bidirectional', shift)
    if format_steps(steps) != format_steps(timesteps):
        raise InputError(f'{args.init} samples at {format_steps(steps)}, but {args.data} holds '
                         f'states at {format_steps(timesteps)}: sample trajectories at the '
                         'student\'s --shift')
    shape = latent_shape(args, net.config)
    if (held := tuple(data[0][0].shape[1:])) != shape:
        raise InputError(f'{args.data} holds latents {held}, but those of {args.frames} frames '
                         f'at {args.width}x{args.height} are {shape}')

    # --- what is trained
    generator = process.wrap(trainable(net, args, device, dtype))
    chunks = chunk_sizes(shape[1], args.chunk)
    layout = block_causal(chunks)
    levels = torch.tensor([*timesteps, 0.0], device=device)

    # --- optimizer
    ema = EMA(net, args.ema, args.ema_start)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(args.beta1, 0.999),
                                  weight_decay=args.weight_decay, fused=True)
    run = Run('ode_init', args, process,
              ['generate.py "PROMPT" --checkpoint', 'reward_forcing.py --init'],
              generator=net, ema=ema, optimizer=optimizer)

    def sample():
        with ema.swapped_in(net):
            return run.samples(net, vae, text, held_out, shape, timesteps, chunks)

    # --- loop
    if run.step == 0 and run.due(args.sample_every):
        sample()  # what it starts from
    for step in run.steps():
        loss = motion = 0
        for micro in range(args.accum):
            numbers = sample_numbers(args, process, step, micro)
            trajectory, prompts = zip(*(shuffled(data, n, args.seed) for n in numbers))
            trajectory = torch.stack(trajectory).to(device)  # (B, K + 1, C, F, H, W)
            context = text(list(prompts)).float()
            # each chunk draws one of the K + 1 states, the last of which is clean
            generators = sample_generators(args, numbers)
            index = draw_per_chunk(len(levels), chunks, generators, device)  # (B, F)
            x_t, t = pick_states(trajectory, index), levels[index]
            with process.sync(generator, micro == args.accum - 1):
                x0 = x0_from_v(x_t, generator(x_t, t, context, layout), t)
                # L_ode = E |G_phi({x_t^i}, {t^i}) - {x_0^i}|^2
                micro_loss = regression_loss(x0, trajectory[:, -1], t) / args.accum
                micro_loss.backward()
            loss += micro_loss.item()
            motion += latent_motion(x0.detach()).item() / args.accum
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        metrics = run.check(loss=loss, motion=motion, grad_norm=norm)
        optimizer.step()
        process.forget_gradients(optimizer)
        ema.update(net, step)

        # --- log, sample, save
        if run.due(args.sample_every):
            metrics |= sample()
        run.report(**metrics)
        if run.due(args.save_every):
            run.save(ema.average, timesteps, kind='causal', chunk=args.chunk, shift=shift,
                     config=net.config)


def main():
    args = parse_args()
    with processes(args.device, args.shard) as process:
        {'sample': sample, 'train': train}[args.verb](args, process)


if __name__ == '__main__':
    run_script(main)
