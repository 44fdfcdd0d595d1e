"""Stage: few-step distillation by distribution matching (DMD): Wan 2.1 -> a student that
samples in a few steps.

Papers: DMD2 (arXiv 2405.14867), CausVid (2412.07772), Self Forcing (2506.08009), RAVEN
(2605.15190) 3; Reward-Forcing (2601.16933) 3.1, the two losses, 3.4, first stage, and 5.1,
the ablation with a reward.

One step:
  `--ratio` times, the critic:  x0 = student's sample; flow matching of the fake score on it
  once, the generator:
    1. x0 = student's sample, with gradient where the history in the table below has it
    2. x_s = (1 - s) x0 + s eps, with s random
    3. real = frozen teacher with guidance, fake = critic, both as predictions of x0 from x_s
    4. d = (fake - real) / mean|x0 - real|;  loss = 1/2 w |x0 - sg(x0 - d)|^2, whose gradient
       at x0 is w d

  --history          what a chunk sees of the past              gradient  noisy states
                                                                to it
  (bidirectional)    everything                                 -         its own, one step
  diffusion-forcing  the noisy chunks before it (CausVid)       yes       noised data
  teacher-forcing    clean data                                 yes       noised data
  self-forcing       its own endpoints, cached                  no        its own, one step
  raven              its own endpoints, in the same forward     yes       its own, one step
Data are the endpoints of ODE trajectories, so no stage needs real videos; they are noised to
a step of each chunk's own.

  paper         code               paper             code
  G_theta       generator          s_real, s_fake    teacher, critic (as x0 predictions)
  tau, s        t                  grad D_KL, L_DMD  direction
  z^_j^(u)      states[exit_step]  x^_j              endpoints
  pi_alpha      chunk_weights      I_u               interleaved_x0
  Phi           add_noise          x_1               eps

Differs from DMD2: no GAN loss. From the public code: a direction that is not a number stops
the run instead of being set to zero; one random step for all samples of an update, as Self
Forcing has it (RAVEN: one for each sample); a step is one generator update (the public
scripts count critic updates). RAVEN's public code rounds the timesteps, to 1000, 938, 833,
625; here they are 1000, 937.5, 833.33, 625. Self Forcing's public code lets later chunks'
losses reach earlier chunks' noisy keys through its cache (7 to 14 % of the weight gradient),
here the history is the constant that the paper has; its score networks keep shift 8 (at most
6 % of the direction), and its clean history has a sigma above 0 (x0 off by 2e-3). CausVid
noises data to 1000, 757, 522 or 0, here to the start's own steps or 0 (without metadata: those
of shift 8); it has no EMA, here its default is Self Forcing's. Teacher forcing has CausVid's
settings, though RAVEN compares it under its own. The bidirectional student's settings are Self
Forcing's with RAVEN's guidance: Reward-Forcing gives none for that stage. Reward +
distillation has Self Forcing's batch of 64 (the paper's appendix: 8).

Tiny model, on a CPU, in minutes; then one machine of 8 GPUs:
    python distill_dmd.py --out runs/student
    python distill_dmd.py --student causal --history raven --init runs/ode/model.safetensors \\
        --out runs/raven
    torchrun --standalone --nproc_per_node 8 distill_dmd.py \\
        --model Wan-AI/Wan2.1-T2V-1.3B --accum 8 --out runs/student
    torchrun --standalone --nproc_per_node 8 distill_dmd.py --student causal \\
        --model Wan-AI/Wan2.1-T2V-1.3B --teacher Wan-AI/Wan2.1-T2V-14B \\
        --history self-forcing --init runs/ode/model.safetensors --out runs/self_forcing
"""
import dataclasses
import random

from wan_causal import (EMA, FRAMES, NEGATIVE_PROMPT, InputError, Parser, Run, Trajectories,
                        add_noise, block_causal, checked_reward, chunk_sizes, chunk_weights,
                        claim_folder, compute_dtype, counted, draw_per_chunk, find_folder,
                        format_steps, frame_reward, gaussian, guided_velocity, interleaved_x0,
                        latent_frames, latent_motion, latent_shape, load_dit, load_generator,
                        load_image_reward, load_text_encoder, load_vae, number, parse_known,
                        parse_stage, processes, read_prompts, recorded_rollout, refuse_unused,
                        rewarded_video, rollout, run_script, sample_generators, sample_numbers,
                        say_cut, shift_sigma, shuffled, trainable, training_flags, whole,
                        x0_from_v)

import torch

# The settings of the papers, as far as they differ: the flags' defaults for each history.
# Guidance in the usual formula: CausVid's 3.5 and Self Forcing's 3.0 multiply (cond - uncond)
# on top of cond. Steps are generator updates; the public 600 and 1000 count critic updates,
# five for each of the generator, and RAVEN's 300 two.
SELF_FORCING = dict(steps=120, accum=8, lr=2e-6, critic_lr=4e-7, beta1=0.0, weight_decay=0.01,
                    grad_clip=10.0, ema=0.99, ema_start=40, ratio=5, guidance=4.0, shift=5.0,
                    chunk_weight_shift=0.0)
CAUSVID = {**SELF_FORCING, 'steps': 200, 'critic_lr': 2e-6, 'beta1': 0.9, 'guidance': 4.5,
           'shift': 8.0}
SETTINGS = {
    # no alarm: Wan itself in a few steps, where it starts, is a blur
    'bidirectional': {**SELF_FORCING, 'guidance': 3.0, 'motion_alarm': 0},
    'diffusion-forcing': CAUSVID,
    'teacher-forcing': CAUSVID,
    'self-forcing': SELF_FORCING,
    'raven': {
        **SELF_FORCING, 'steps': 150, 'accum': 4, 'weight_decay': 0.0, 'grad_clip': 1000.0,
        'ema': 0.9675, 'ema_start': 0, 'ratio': 2, 'guidance': 3.0, 'chunk_weight_shift': -1.0,
        'negative': 'slow motion, time dilation, 高帧率，' + NEGATIVE_PROMPT
    },
}
# whose clean history comes from trajectories
WITH_DATA = ('diffusion-forcing', 'teacher-forcing')


# ----------------------------------------------------------------------------------------
# The losses

def score_timestep(generators, shift, device):
    """Timesteps (B,) at which the scores are compared: uniform whole numbers, shifted, within
    [20, 980].

    Self Forcing's rule, for every history: RAVEN scales into that range where this clamps to
    it.
    """
    tau = [torch.randint(1000, (), generator=g, device=g.device) for g in generators]
    tau = torch.stack(tau).to(device)  # (B,)
    # neither pure noise, where both scores know nothing, nor clean, where both agree
    return 1000 * shift_sigma(tau / 1000, shift).clamp(0.02, 0.98)


def dmd_direction(x0, fake, real):
    """Gradient of the KL divergence between student and teacher at x0; all (B, C, F, H, W),
    float64 out.

    DMD2 eq. 2-3 and DMD eq. 7-8 in terms of x0 predictions: (fake - real) / mean|x0 - real|,
    the mean per sample.
    """
    x0, fake, real = x0.double(), fake.double(), real.double()
    # DMD eq. 8: the same size of gradient at every noise level
    scale = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)  # (B, 1, 1, 1, 1)
    return (fake - real) / scale.clamp(min=1e-5)  # DMD eq. 7: fake - real


def dmd_loss(x0, direction, weights=1.0):
    """1/2 mean w (x0 - sg(x0 - direction))^2 in float64: its gradient is w direction /
    x0.numel().

    x0, direction (B, C, F, H, W); weights (F,), see `chunk_weights`.
    """
    target = (x0.double() - direction).detach()  # sg: no gradient through the scores
    square = (x0.double() - target).square()  # (B, C, F, H, W)
    return 0.5 * (square.mean(dim=(0, 1, 3, 4)) * weights).mean()  # (F,) -> ()


def flow_loss(model, x0, t, context, eps):
    """Flow matching: mean (v - (eps - x0))^2 at x_t; t (B,)."""
    v = model(add_noise(x0, eps, t), t, context)  # (B, C, F, H, W)
    return (v - (eps - x0)).square().mean()


@torch.no_grad()
def compare_scores(x0, teacher, critic, context, negative, guidance, shift, generators):
    """The DMD direction at x0 (B, C, F, H, W), at one random noise level per sample."""
    t = score_timestep(generators, shift, x0.device)  # (B,)
    x_t = add_noise(x0, gaussian(x0.shape, generators, x0.device), t)
    # s_real: where the data's distribution lies; guidance sharpens it
    v = guided_velocity(teacher, x_t, t, context, negative, guidance)
    real = x0_from_v(x_t, v, t)
    # s_fake: where the student's own distribution lies
    fake = x0_from_v(x_t, critic(x_t, t, context), t)
    return dmd_direction(x0, fake, real)


def reward_and_gradient(reward, vae, x0, prompts, frame):
    """Rewards (B,) of one video frame, and their gradient at x0 (B, C, F, H, W) through two
    latent frames of the decoder's memory, reward_forcing.py's default; see `rewarded_video`."""
    x0 = x0.requires_grad_()
    score = checked_reward(reward, rewarded_video(vae, x0, [frame], past=2), prompts)
    return score.detach(), torch.autograd.grad(score.sum(), x0)[0]


def with_reward(direction, gradient, weight, weights):
    """Distillation and reward on the same scale, summed: a direction for `dmd_loss`.
    Reward-Forcing's appendix B has the two losses on one scale, without a formula; here it is
    their gradients at x0 that are.

    direction, and the reward's gradient at x0, which goes the other way: both (B, C, F, H, W).
    Per sample, the gradient is brought to the norm of the direction as the loss weights it;
    weights (F,), of that loss.
    """
    weights, gradient = weights.view(-1, 1, 1), gradient.double()
    size, of_reward = (x.flatten(1).norm(dim=1) for x in (direction * weights, gradient))  # (B,)
    scale = size / of_reward.clamp(min=1e-12)
    # minus: the loss falls against the direction, the reward rises along its gradient
    return direction - weight * scale.view(-1, 1, 1, 1, 1) * gradient / weights


# ----------------------------------------------------------------------------------------
# The student's sample: the histories

@dataclasses.dataclass
class Batch:
    """What one backward pass starts from."""
    prompts: list
    context: torch.Tensor  # (B, L', text_dim)
    generators: list  # of the noise, one per sample
    # the exit step, or the step whose states are trained: the same for all samples and ranks
    exit_step: int
    noise: torch.Tensor  # (B, C, F, H, W)
    # clean latents (B, C, F, H, W), for the histories that come from data
    data: torch.Tensor | None = None
    # RAVEN's rollout: per step the noisy states of all chunks (B, C, F, H, W)
    states: list = ()
    endpoints: torch.Tensor | None = None  # and their clean endpoints


def self_rollout(generator, b, steps, chunks, grad_from=0):
    """Self Forcing alg. 1: x0 of the rollout whose chunks all stop at step b.exit_step, which
    carries gradient.

    The history is in the cache, a constant. With one chunk: backward simulation of the
    bidirectional student.
    """
    parts = rollout(generator, b.noise, b.context, steps, chunks, exit_step=b.exit_step,
                    grad_from=grad_from, generator=b.generators)
    return torch.cat([part.x0 for part in parts], dim=2)


def denoise_data(generator, b, steps, chunks, clean_history):
    """CausVid (history: the noisy chunks) and teacher forcing (history: the clean data): one
    forward over all chunks.

    Each chunk has a timestep of its own among `steps`; for CausVid also 0, as its history is
    clean at inference.
    """
    device = b.data.device
    levels = torch.tensor([*steps] if clean_history else [*steps, 0.0], device=device)
    index = draw_per_chunk(len(levels), chunks, b.generators, device)
    t = levels[index]  # (B, F)
    x_t = add_noise(b.data, gaussian(b.data.shape, b.generators, device), t)
    if clean_history:  # the sequence has both: noisy chunks, and clean ones as their history
        return interleaved_x0(generator, x_t, t, b.data, b.context, chunks)
    # what a chunk sees of the past is as noisy as it happens to be
    return x0_from_v(x_t, generator(x_t, t, b.context, block_causal(chunks)), t)


def student_sample(history, generator, b, steps, chunks, grad_from=0):
    """x0 (B, C, F, H, W) of the student, with the gradient that its history allows (if
    gradients are on)."""
    if history == 'raven':  # the latents are constants, the history is encoded in the graph
        x_t = b.states[b.exit_step]
        t = torch.full((x_t.shape[0], x_t.shape[2]), steps[b.exit_step], device=x_t.device)
        return interleaved_x0(generator, x_t, t, b.endpoints, b.context, chunks)
    if history in WITH_DATA:
        return denoise_data(generator, b, steps, chunks, history == 'teacher-forcing')
    return self_rollout(generator, b, steps, chunks, grad_from)


def last_window(x0, frames, vae):
    """The last `frames` latent frames of a longer rollout (B, C, F, H, W), as the teacher
    expects a clip.

    Its first latent frame stands for four video frames there, but for one in a clip: its last
    video frame is encoded anew, without gradient (Self Forcing, which also leaves the rest of
    its chunk out of the loss).
    """
    start = x0.shape[2] - frames
    if start == 0:
        return x0
    with torch.no_grad():
        first = vae.encode(vae.decode(x0[:, :, :start + 1])[:, :, -1:])
    return torch.cat([first, x0[:, :, start + 1:]], dim=2)


# ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(description='Few-step distillation by distribution matching.')
    training_flags(p, out='runs/distill_dmd')
    g = p.add_argument_group('student')
    g.add_argument('--student', choices=['bidirectional', 'causal'], default='bidirectional',
                   help='what is trained')
    g.add_argument('--history', choices=list(SETTINGS)[1:],
                   help='of the causal student, and only there (default: self-forcing)')
    g.add_argument('--init', metavar='FILE',
                   help='weights that the student starts from (default: --model)')
    g.add_argument('--chunk', type=whole(1),
                   help='latent frames per chunk; 1 is frame-wise (default: as --init, else 3)')
    g.add_argument('--data', default='runs/trajectories', metavar='FOLDER',
                   help='ODE trajectories, for the histories that need data')
    g.add_argument('--rollout-frames', type=FRAMES, metavar='N',
                   help='self-forcing: roll out this many video frames, and train the last '
                        '--frames of them')
    g = p.add_argument_group('distribution matching')
    g.add_argument('--teacher',
                   help='the Wan model of the real score, e.g. the 14B one (default: --model)')
    g.add_argument('--shift', type=number(above=0),
                   help='timestep shift of the scores, and of the student unless --init says')
    g.add_argument('--guidance', type=number(),
                   help='of the real score, usual formula; 1 is off')
    g.add_argument('--negative', default=NEGATIVE_PROMPT,
                   help='negative prompt of the real score')
    g.add_argument('--ratio', type=whole(1), help='critic updates per generator update')
    g.add_argument('--critic-lr', type=number(0), help='learning rate of the critic')
    g.add_argument('--chunk-weight-shift', type=number(),
                   help='loss weights: -1 later chunks more, 1 earlier ones, 0 all alike')
    g.add_argument('--reward-weight', type=number(), default=0.0,
                   help='of an ImageReward of the last frame; 0: none')
    g.add_argument('--reward-model', default='THUDM/ImageReward',
                   help='ImageReward\'s folder or hub repository')
    asked = parse_known(p, argv)
    if asked.history and asked.student == 'bidirectional':
        raise InputError(f'--history {asked.history} needs --student causal')
    history = 'bidirectional'
    if asked.student == 'causal':
        history = asked.history or 'self-forcing'
    p.set_defaults(**SETTINGS[history])
    args = parse_stage(p, f'distill_dmd {asked.student}', argv)
    args.history = history
    if history not in WITH_DATA:
        refuse_unused(p, args, f'history {history} trains on the student\'s own rollouts',
                      'data')
    if args.student == 'bidirectional':
        if args.chunk:
            raise InputError(f'--chunk {args.chunk} needs --student causal: a bidirectional one '
                             'makes all frames at once')
        refuse_unused(p, args, 'all frames are one chunk', 'chunk_weight_shift')
    if not args.reward_weight:
        refuse_unused(p, args, 'no --reward-weight is given', 'reward_model')
    if args.guidance == 1:
        refuse_unused(p, args, '--guidance 1 needs none', 'negative')
    if args.student == 'causal' and not args.init:
        raise InputError('no --init: a causal student starts from a causal few-step one, such '
                         'as the result of ode_init.py train')
    if args.rollout_frames and (args.history != 'self-forcing' or
                                args.rollout_frames < args.frames):
        raise InputError(f'--rollout-frames {args.rollout_frames} needs --history '
                         f'self-forcing, and must be at least --frames {args.frames}')
    if args.frames == 1 < (args.rollout_frames or 1):
        raise InputError(f'--rollout-frames {args.rollout_frames} with --frames 1 trains nothing: '
                         'the first latent frame of the last window is a constant')
    return args


def main():
    args = parse_args()
    with processes(args.device, args.shard) as process:
        train(args, process)


def train(args, process):
    # --- setup
    claim_folder(args, process)
    device, causal = process.device, args.student == 'causal'
    dtype = compute_dtype(args, device)
    prompts, held_out = read_prompts(args)

    # --- models
    folder = find_folder(args.model)
    text = load_text_encoder(folder, dtype, device, args.offload_text)
    vae = load_vae(folder, dtype, device)
    say_cut(process, prompts, text, 'the text encoder')
    net, steps, chunk, shift = load_generator(folder, args.init, args.student, args.shift)
    teacher = process.frozen(load_dit(args.teacher or folder, dtype))
    critic_net = load_dit(folder)  # the fake score starts from the model itself
    reward = None
    if args.reward_weight:
        judge = load_image_reward(args.reward_model, device)
        say_cut(process, prompts, judge, 'ImageReward')
        reward = frame_reward(judge)

    # --- what is trained
    net, critic_net = (trainable(m, args, device, dtype) for m in (net, critic_net))
    generator, critic = process.wrap(net), process.wrap(critic_net)
    vae.decoder.checkpointing = args.checkpointing
    negative = text([args.negative] * args.batch).float()

    # --- the video and its chunks
    C, F, H, W = shape = latent_shape(args, net.config)
    chunk = (args.chunk or chunk) if causal else F
    rolled = latent_frames(args.rollout_frames or args.frames)
    chunks = chunk_sizes(rolled, chunk)
    if (rolled - F) % chunk:
        raise InputError(f'--rollout-frames {args.rollout_frames} is not --frames '
                         f'{args.frames} and whole chunks of {4 * chunk} frames: take '
                         f'{args.frames + 4 * ((rolled - F) // chunk + 1) * chunk}')
    weights = chunk_weights(chunk_sizes(F, chunk), args.chunk_weight_shift).to(device)
    data = Trajectories(args.data) if args.history in WITH_DATA else None
    if data:
        # a run is not resumed with more of them, which would change their order
        args.trajectories = len(data)
        if (held := tuple(data[0][0].shape[1:])) != shape:
            raise InputError(f'{args.data} holds latents {held}, but the flags ask for {shape}')
    how = 'all frames at once'
    if causal:
        how = f'history {args.history}, chunks of {counted(chunk, "latent frame")}'
    process.print(f'timesteps {format_steps(steps)}; {how}')

    # --- optimizers
    ema = EMA(net, args.ema, args.ema_start)
    optimizer, critic_optimizer = (
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(args.beta1, 0.999),
                          weight_decay=args.weight_decay, fused=True)
        for model, lr in ((net, args.lr), (critic_net, args.critic_lr)))
    then = ['generate.py "PROMPT" --bidirectional --checkpoint', 'ode_init.py train --init']
    if causal:
        then = ['generate.py "PROMPT" --checkpoint', 'cm_grpo.py --init']
    run = Run('distill_dmd', args, process, then, generator=net, critic=critic_net, ema=ema,
              optimizer=optimizer, critic_optimizer=critic_optimizer)

    def sample():
        with ema.swapped_in(net):
            return run.samples(net, vae, text, held_out, shape, steps, chunk_sizes(F, chunk))

    def draw(update, micro):
        """What one backward pass starts from; every update has its own samples."""
        numbers = sample_numbers(args, process, update, micro)
        generators = sample_generators(args, numbers, device)
        clean = None
        if data:
            states, captions = zip(*(shuffled(data, n, args.seed) for n in numbers))
            clean = torch.stack([s[-1] for s in states]).to(device)
        else:
            captions = [shuffled(prompts, n, args.seed) for n in numbers]
        # the same on all ranks
        exit_step = random.Random(f'{args.seed} {update}').randrange(len(steps))
        noise = gaussian((args.batch, C, rolled, H, W), generators, device)
        context = text(list(captions)).float()
        return Batch(list(captions), context, generators, exit_step, noise, clean)

    # --- loop
    if run.step == 0 and run.due(args.sample_every):
        sample()  # what it starts from
    for step in run.steps():
        # critic: the fake score follows the student's distribution
        first = step * (args.ratio + 1)  # of this step's updates; the generator's is the last
        last = first + args.ratio
        for update in range(first, last):
            critic_loss, batches = 0, []
            for micro in range(args.accum):
                b = draw(update, micro)
                batches.append(b)
                if args.history == 'raven':
                    b.states, b.endpoints = recorded_rollout(generator, b.noise, b.context,
                                                             steps, chunks, b.generators)
                    x0 = b.endpoints
                else:
                    with torch.no_grad():  # the critic's loss does not train the generator
                        x0 = student_sample(args.history, generator, b, steps, chunks)
                        x0 = last_window(x0, F, vae)
                t = score_timestep(b.generators, args.shift, device)
                eps = gaussian(x0.shape, b.generators, device)
                with process.sync(critic, micro == args.accum - 1):
                    loss = flow_loss(critic, x0, t, b.context, eps) / args.accum
                    loss.backward()
                critic_loss += loss.item()
            critic_norm = torch.nn.utils.clip_grad_norm_(critic_net.parameters(),
                                                         args.grad_clip)
            run.check(critic_loss=critic_loss, critic_norm=critic_norm)
            critic_optimizer.step()
            process.forget_gradients(critic_optimizer)

        # generator: towards the teacher's distribution, away from its own
        sums = torch.zeros(3, device=device)  # size of the direction, motion, reward
        for micro in range(args.accum):
            # RAVEN trains on the rollout that the critic has just seen; the others on a new one
            b = batches[micro] if args.history == 'raven' else draw(last, micro)
            with process.sync(generator, micro == args.accum - 1):
                x0 = student_sample(args.history, generator, b, steps, chunks,
                                    grad_from=rolled - F)
                x0 = last_window(x0, F, vae)
                direction = compare_scores(x0.detach(), teacher, critic_net, b.context,
                                           negative, args.guidance, args.shift, b.generators)
                size, score = direction.abs().mean(), torch.zeros(1, device=device)
                if reward:
                    score, gradient = reward_and_gradient(reward, vae, x0.detach(), b.prompts,
                                                          args.frames - 1)
                    direction = with_reward(direction, gradient, args.reward_weight, weights)
                (dmd_loss(x0, direction, weights) / args.accum).backward()
            each = size, latent_motion(x0.detach()), score.mean()
            sums += torch.stack(each) / args.accum
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        metrics = run.check(critic_loss=critic_loss, dmd=sums[0], grad_norm=norm,
                            critic_norm=critic_norm, motion=sums[1],
                            **({'reward': sums[2]} if reward else {}))
        optimizer.step()
        process.forget_gradients(optimizer)
        ema.update(net, step)

        # --- log, sample, save
        if run.due(args.sample_every):
            metrics |= sample()
        run.report(**metrics)
        if run.due(args.save_every):
            run.save(ema.average, steps, kind=args.student, history=args.history, chunk=chunk,
                     shift=shift, config=net.config)


if __name__ == '__main__':
    run_script(main)
