"""Stage: CM-GRPO: policy-gradient RL on the Gaussian kernel of the consistency sampler itself.

Papers: RAVEN with CM-GRPO (arXiv 2605.15190) 4; GRPO (2402.03300); Flow-GRPO (2505.05470)
for the baseline kernel.

One step:
  1. rollouts: for each prompt a group of G videos from fresh noise, with the cache, without
     gradient, all states recorded
  2. rewards: each kind is normalised within the group, weighted, summed, normalised again,
     clipped: the advantage A
  3. policy: a step from u to the next timestep s of the sampler draws z_s ~ N(mean, std^2);
     x0 is the prediction at u, sigma_s = s / 1000
         consistency (cm):     mean = (1 - sigma_s) x0,  std = sigma_s
         Euler-Maruyama (em):  Flow-GRPO's stochastic step, see `euler_maruyama`
     one transition is drawn at random (never the last one, which is not random); one
     interleaved forward on the rollout's own states predicts x0 again, with gradient
  4. loss = w |x0 - sg(x0 + A / 2 * d log pi / d x0)|^2, whose gradient at x0 is
     -w A d log pi / d x0
On-policy: one update per rollout, so the probability ratio is 1 and there is nothing to
clip. The surrogate counts 100 times beside `--kl`, as in the public code.

  paper       code          paper       code           paper      code
  x_theta     x0            z_s         z_next         alpha_s    slope
  G           --group       A           advantage      beta       --kl
  u           steps[k]      s           steps[k + 1]   sigma_s    std

Differs from the paper: text alignment, motion and smoothness are measured by smaller means
(see Rewards), since the paper's judges (Qwen2-VL, RAFT, AMT) need other packages; bring them
with module:function. ImageReward stands where its imaging quality (MUSIQ) does; the aesthetic
head counts once it is given (--aesthetic-head, --rewards ... aesthetic=1).
Differs from the public code: one transition for all rollouts of a step (there one for each);
every reward is normalised over the whole group (there over the 4 rollouts of a rank; the
advantages correlate 0.91); the KL's reference is the start (there the bidirectional base);
its Euler-Maruyama sampler adds noise at the last step too.
Whatever the kernel it was trained with, the generator is then used with the consistency
sampler, as any other.

Tiny model, on a CPU, in minutes; then one machine of 8 GPUs:
    python cm_grpo.py --init runs/raven/model.safetensors --out runs/grpo
    torchrun --standalone --nproc_per_node 8 cm_grpo.py --model Wan-AI/Wan2.1-T2V-1.3B \\
        --init mvp-lab/RAVEN:raven_model.pt --out runs/grpo
"""
import contextlib
import copy
import json
import math
import os
import random

from wan_causal import (EMA, InputError, Parser, Run, aesthetic_head, checked_reward,
                        chunk_sizes, chunk_weights, claim_folder, clip_preprocess,
                        compute_dtype, counted, consistency_kernel, find_folder, format_steps,
                        gaussian, interleaved_x0, latent_shape, load_clip, load_function,
                        load_generator, load_image_reward, load_text_encoder, load_vae,
                        merge_lora, number, parse_stage, processes, read_prompts,
                        recorded_rollout, refuse_unused, replace_file, run_script,
                        sample_generators, sample_numbers, save_checkpoint, say_cut, shuffled,
                        trainable, training_flags, v_from_x0, whole)

import torch
from torch import nn
from torch.nn import functional as F


# ----------------------------------------------------------------------------------------
# Policy: kernels, advantages, losses

def euler_maruyama(noise):
    """Flow-GRPO eq. 9, its noise level a = `noise`: the reverse SDE's step instead of the
    consistency sampler's.

    x' = x + [v + sigma_t^2 / (2 t) (x + (1 - t) v)] dt + sigma_t sqrt|dt| eps,
    sigma_t = a sqrt(t / (1 - t)); t and dt are noise levels. At t = 1, where that is infinite,
    1 - t is that of the next step, as in its code.
    """
    def kernel(x, x0, t, s):
        t, s = t / 1000, s / 1000  # noise levels; dt < 0
        dt = s - t
        spread = noise * math.sqrt(t / (1 - (s if t == 1 else t)))  # sigma_t
        drift = spread ** 2 / (2 * t)
        v = v_from_x0(x, x0, 1000 * t)
        mean = x + (v + drift * (x + (1 - t) * v)) * dt
        slope = -(1 + drift * (1 - t)) * dt / t  # d mean / d x0, as v contains -x0 / t
        return mean, spread * math.sqrt(-dt), slope
    return kernel


def surrogate(x0, z_next, mean, std, slope, advantage, weights):
    """Mean w |x0 - sg(x0 + A / 2 * d log pi / d x0)|^2: its gradient at x0 is
    -w A (d log pi / d x0) / numel.

    x0, z_next, mean (B, C, F, H, W), advantage (B,), weights (F,). RAVEN eq. 12; for the
    consistency kernel d log pi / d x0 = (1 - sigma_s) (z_s - (1 - sigma_s) x0) / sigma_s^2.
    """
    A = advantage.view(-1, 1, 1, 1, 1)
    score = slope * (z_next - mean) / std ** 2  # d log pi / d x0 of N(mean(x0), std^2)
    target = (x0 + A / 2 * score).detach()  # sg: a step along the policy gradient
    square = (x0 - target).square().mean(dim=(0, 1, 3, 4))  # (F,)
    return (square * weights).mean()


def kl_to_reference(x0, x0_reference, std, slope, weights):
    """KL of two Gaussian kernels with the same std, mean w slope^2 |x0 - x0_ref|^2 / (2 std^2)
    over the elements.

    x0, x0_reference (B, C, F, H, W); weights (F,), those of the policy's loss, as in the public
    code.
    """
    # the means differ by slope (x0 - x0_ref), as both start from the same state
    square = (x0 - x0_reference).square().mean(dim=(0, 1, 3, 4))  # (F,)
    return slope ** 2 * (square * weights).mean() / (2 * std ** 2)


def normalise(x):
    """Zero mean and unit standard deviation within each row (P, G).

    As the public code has it: a standard deviation below 1e-4 counts as 1e-4, so that a reward
    with hardly any spread hardly counts. In float64: a row of equal rewards becomes zeros, not
    the noise of its rounding.
    """
    centred = x.double() - x.double().mean(dim=1, keepdim=True)  # (P, G)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    return centred / (std.clamp(min=1e-4) + 1e-5)


def group_advantages(rewards, weights, clip=5.0):
    """rewards (P prompts, G, kinds), weights (kinds,) -> advantages (P, G) within +-clip."""
    # each kind by itself first, so that no scale of a reward outweighs the others
    total = sum(w * normalise(rewards[:, :, i]) for i, w in enumerate(weights))
    return normalise(total).clamp(-clip, clip).float()


# ----------------------------------------------------------------------------------------
# Rewards: callables (video (B, 3, T, H, W) in [-1, 1], prompts) -> (B,); no gradient is needed

def motion_amount(video, prompts):
    """How much moves: mean over frames of the top 5 % of |brightness change| from frame to
    frame, in 0..1.

    Stands in for the dynamic degree (top 5 % of RAFT's optical flow). A picture has none.
    """
    if video.shape[2] == 1:
        return video.new_zeros(len(video))
    change = video.mean(1).diff(dim=1).abs().flatten(2) / 2  # (B, T - 1, H W)
    return change.topk(max(1, change.shape[2] // 20), dim=2).values.mean(dim=(1, 2))


def motion_smoothness(video, prompts):
    """How well each odd frame is the mean of its neighbours: 1 - mean |difference|.

    Stands in for motion smoothness, which asks how well AMT interpolates the odd frames. A
    picture has 1.
    """
    if video.shape[2] == 1:
        return video.new_ones(len(video))
    between = (video[:, :, :-2:2] + video[:, :, 2::2]) / 2
    return 1 - (video[:, :, 1:-1:2] - between).abs().mean(dim=(1, 2, 3, 4)) / 2


def some_frames(video, count=8):
    """`count` evenly spaced frames of a video, as a list of (B, 3, H, W)."""
    where = torch.linspace(0, video.shape[2] - 1, min(count, video.shape[2])).round().long()
    return [video[:, :, i] for i in where.tolist()]


class Clip:
    """CLIP ViT-L/14: text-image similarity, and the LAION aesthetic head on its images."""

    def __init__(self, name, head, device):
        self.model, self.tokenizer = load_clip(
            find_folder(name, ['*.json', '*.txt', 'model.safetensors']), device)
        self.device, self.head = device, None
        if head:
            self.head = aesthetic_head(head, self.model.config.projection_dim, device)

    def images(self, frames):
        """(B, 3, H, W) in [-1, 1] -> unit image features (B, D)."""
        pixels = clip_preprocess(frames, self.model.config.vision_config.image_size)
        seen = self.model.vision_model(pixels).pooler_output
        return F.normalize(self.model.visual_projection(seen), dim=-1)

    def similarity(self, video, prompts):
        """Mean cosine of the frames with the prompt."""
        words = self.tokenizer(list(prompts), padding=True, truncation=True,
                               return_tensors='pt').to(self.device)
        read = self.model.text_model(**words).pooler_output
        text = F.normalize(self.model.text_projection(read), dim=-1)
        return torch.stack([(self.images(frame) * text).sum(-1)
                            for frame in some_frames(video)]).mean(0)

    def aesthetic(self, video, prompts):
        """Mean LAION aesthetic score of the frames, 1..10."""
        return torch.stack([F.linear(self.images(frame), *self.head)[:, 0]
                            for frame in some_frames(video)]).mean(0)


def named_weight(text):
    """An argparse type: name=weight, as it is."""
    number()(text.partition('=')[2] or '1')
    return text


def load_rewards(args, process, prompts):
    """--rewards name=weight ... -> ([(name, callable)], weights (kinds,))."""
    rewards, weights, clip, device = [], [], None, process.device
    for item in args.rewards:
        name, _, weight = item.partition('=')
        weights.append(float(weight or 1))
        if name == 'imagereward':
            model = load_image_reward(args.reward_model, device)
            say_cut(process, prompts, model, 'ImageReward')
            rewards.append((name, lambda video, prompts: torch.stack(
                [model.score(frame, prompts) for frame in some_frames(video)]).mean(0)))
        elif name == 'motion':
            rewards.append((name, motion_amount))
        elif name == 'smoothness':
            rewards.append((name, motion_smoothness))
        elif name in ('clip', 'aesthetic'):
            if name == 'aesthetic' and not args.aesthetic_head:
                raise InputError('the reward aesthetic needs --aesthetic-head, LAION\'s '
                                 'sa_0_4_vit_l_14_linear.pth')
            clip = clip or Clip(args.clip_model, args.aesthetic_head, device)
            rewards.append((name, clip.similarity if name == 'clip' else clip.aesthetic))
        else:
            known = 'imagereward, motion, smoothness, clip, aesthetic'
            rewards.append((name, load_function(name, '--rewards', known)))
    return rewards, torch.tensor(weights)


# ----------------------------------------------------------------------------------------
# LoRA

class LoRA(nn.Module):
    """A frozen linear layer plus alpha / rank * B A; its parts have PEFT's names, B starts at
    zero."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base_layer, self.scale, self.on = base.requires_grad_(False), alpha / rank, True
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        out = self.base_layer(x)
        return out + self.scale * self.lora_B(self.lora_A(x)) if self.on else out


def add_lora(net, rank, alpha, seed):
    """Replace all linear layers of a DiT (the paper's 306 at full size) by LoRA ones and freeze
    everything else."""
    torch.manual_seed(seed)  # A is random, and the same on all ranks
    net.requires_grad_(False)
    for name, module in [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child,
                LoRA(module, rank, alpha).to(module.weight.device))


def save_adapter(folder, average, args, **metadata):
    """Averaged LoRA weights as PEFT keeps them: its names, its two files. metadata: see
    `save_checkpoint`."""
    weights = {f'base_model.model.{name}': value for name, value in average.items()}
    # a file is found from everywhere; repository:path stays
    base = os.path.abspath(args.init) if os.path.exists(args.init) else str(args.init)
    save_checkpoint(folder / 'adapter_model.safetensors', weights, stage='cm_grpo',
                    kind='causal', lora_alpha=args.lora_alpha, base=base, **metadata)
    modules = sorted({name.partition('.lora_')[0] for name in average})
    config = {'peft_type': 'LORA', 'r': args.lora_rank, 'lora_alpha': args.lora_alpha,
              'bias': 'none', 'target_modules': modules}
    replace_file(folder / 'adapter_config.json',
                 lambda path: path.write_text(json.dumps(config, indent=1) + '\n'))


def merged(state, average, alpha):
    """Plain DiT weights: the base in the model's state with the averaged LoRA merged in, on the
    CPU, or the averaged weights themselves."""
    if not any('.lora_' in name for name in average):
        return average
    average = {name: value.cpu() for name, value in average.items()}
    base = {key.replace('.base_layer', ''): value.cpu()
            for key, value in state.items() if '.lora_' not in key}
    return merge_lora(average, base, {'lora_alpha': alpha})


@contextlib.contextmanager
def without_lora(net):
    """The model as it was before LoRA was added."""
    def switch(on):
        for layer in net.modules():
            if isinstance(layer, LoRA):
                layer.on = on
    switch(False)
    try:
        yield net
    finally:
        switch(True)


@torch.no_grad()
def reference_x0(net, frozen, *inputs):
    """The prediction of the generator as it was at the start: `frozen`, or the model without
    its LoRA."""
    if frozen is not None:
        return interleaved_x0(frozen, *inputs)
    with without_lora(net):
        return interleaved_x0(net, *inputs)


# ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(description='Policy gradients on the consistency sampler\'s own kernel.')
    training_flags(p, out='runs/cm_grpo', steps=160, lr=5e-6, weight_decay=0.0,
                   grad_clip=1000.0, ema=0.9675)
    g = p.add_argument_group('policy')
    g.add_argument('--init', metavar='FILE', help='causal few-step generator to start from')
    g.add_argument('--policy', choices=['cm', 'em'], default='cm',
                   help='kernel: consistency, or Euler-Maruyama')
    g.add_argument('--em-noise', type=number(above=0), default=0.4,
                   help='noise level of --policy em')
    g.add_argument('--group', type=whole(2), default=32, help='rollouts per prompt')
    g.add_argument('--prompts-per-step', type=whole(1), default=8,
                   help='prompts per step; --accum follows from it')
    g.add_argument('--kl', type=number(0), default=0.0,
                   help='weight of the KL to the start; 0: off')
    g.add_argument('--chunk-weight-shift', type=number(), default=-1.0,
                   help='loss weights, see distill_dmd.py')
    g.add_argument('--chunk', type=whole(1),
                   help='latent frames per chunk; 1 is frame-wise (default: as --init)')
    g.add_argument('--lora-rank', type=whole(0), default=256, help='0: train all weights')
    g.add_argument('--lora-alpha', type=number(), default=256,
                   help='the update is alpha / rank * B A')
    g = p.add_argument_group('rewards')
    g.add_argument('--rewards', nargs='+', type=named_weight, metavar='NAME=WEIGHT',
                   default=['imagereward=1', 'clip=2', 'motion=0.35', 'smoothness=0.75'],
                   help='imagereward, clip, aesthetic, motion, smoothness, or module:function')
    g.add_argument('--reward-model', default='THUDM/ImageReward',
                   help='ImageReward\'s folder or hub repository')
    g.add_argument('--clip-model', default='openai/clip-vit-large-patch14', help='CLIP')
    g.add_argument('--aesthetic-head', metavar='FILE',
                   help='LAION\'s sa_0_4_vit_l_14_linear.pth')
    args = parse_stage(p, 'cm_grpo', argv)
    if not args.init:
        raise InputError('no --init: CM-GRPO starts from a causal few-step generator, such as '
                         'the result of distill_dmd.py --history raven or of reward_forcing.py')
    if args.accum != p.get_default('accum'):
        raise InputError(f'--accum {args.accum} follows from --prompts-per-step, --group and '
                         '--batch: change these')
    names = {item.partition('=')[0] for item in args.rewards}
    for reward, flag, *others in (('aesthetic', 'aesthetic_head'),
                                  ('clip', 'clip_model', 'aesthetic'),
                                  ('imagereward', 'reward_model')):
        if not names & {reward, *others}:
            refuse_unused(p, args, f'{reward}=WEIGHT is not among --rewards', flag)
    if args.policy == 'cm':
        refuse_unused(p, args, 'it is that of --policy em', 'em_noise')
    if args.lora_rank == 0:
        refuse_unused(p, args, '--lora-rank 0 trains all weights', 'lora_alpha')
    return args


def main():
    args = parse_args()
    with processes(args.device, args.shard) as process:
        train(args, process)


def train(args, process):
    # --- setup
    claim_folder(args, process)
    device, total = process.device, args.prompts_per_step * args.group
    dtype = compute_dtype(args, device)
    if total % (args.batch * process.world):
        raise InputError(f'{args.prompts_per_step} prompts x {args.group} rollouts do not '
                         f'divide into --batch {args.batch} on {process.world} processes')
    args.accum = total // (args.batch * process.world)
    prompts, held_out = read_prompts(args)

    # --- models
    folder = find_folder(args.model)
    text = load_text_encoder(folder, dtype, device, args.offload_text)
    vae = load_vae(folder, dtype, device)
    say_cut(process, prompts, text, 'the text encoder')
    rewards, reward_weights = load_rewards(args, process, prompts)
    net, steps, chunk, shift = load_generator(folder, args.init, 'causal')
    if len(steps) < 2:
        raise InputError(f'{args.init} samples in one step: CM-GRPO needs at least two, as the '
                         'last one is not random')

    # --- what is trained
    net = trainable(net, args, device, dtype)
    frozen = None  # the start, for the KL; with LoRA that is the model without it
    if args.kl and not args.lora_rank:
        frozen = process.frozen(copy.deepcopy(net))
    if args.lora_rank:
        add_lora(net, args.lora_rank, args.lora_alpha, args.seed)
    generator = process.wrap(net)
    chunk = args.chunk or chunk
    shape = latent_shape(args, net.config)
    chunks = chunk_sizes(shape[1], chunk)
    weights = chunk_weights(chunks, args.chunk_weight_shift).to(device)
    kernel = consistency_kernel if args.policy == 'cm' else euler_maruyama(args.em_noise)
    process.print(f'timesteps {format_steps(steps)}; chunks of '
                  f'{counted(chunk, "latent frame")}; {args.prompts_per_step} groups of '
                  f'{args.group}; rewards {", ".join(args.rewards)}')

    # --- optimizer
    ema = EMA(net, args.ema, args.ema_start)
    weights_trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights_trained, lr=args.lr, betas=(args.beta1, 0.999),
                                  eps=1e-10, weight_decay=args.weight_decay, fused=True)
    run = Run('cm_grpo', args, process, ['generate.py "PROMPT" --checkpoint'], generator=net,
              ema=ema, optimizer=optimizer)

    def sample():
        with ema.swapped_in(net):
            return run.samples(net, vae, text, held_out, shape, steps, chunks)

    # --- loop
    if run.step == 0 and run.due(args.sample_every):
        sample()  # what it starts from
    for step in run.steps():
        # one transition, never the last one, which is not random; the same on all ranks
        k = random.Random(f'{args.seed} {step}').randrange(len(steps) - 1)

        # sample: the group of sample n is n // G
        batches, scores, motion = [], [], 0
        for micro in range(args.accum):
            numbers = sample_numbers(args, process, step, micro)
            generators = sample_generators(args, numbers, device)
            captions = [shuffled(prompts, n // args.group, args.seed) for n in numbers]
            context = text(captions).float()
            noise = gaussian((args.batch, *shape), generators, device)
            states, endpoints = recorded_rollout(generator, noise, context, steps, chunks,
                                                 generators, kernel)
            with torch.no_grad():  # the policy gradient needs none through the reward
                video = vae.decode(endpoints)
                each = [checked_reward(reward, video, captions) for _, reward in rewards]
            scores.append(torch.stack(each, dim=1).float())  # (B, kinds)
            motion += motion_amount(video, captions).mean().item() / args.accum
            batches.append((context, states[k], states[k + 1], endpoints))

        # score: rewards of the whole step, in the order of the sample numbers, on all ranks
        gathered = process.gather(torch.stack(scores))  # (world, accum, batch, kinds)
        values = gathered.transpose(0, 1).cpu().reshape(
            args.prompts_per_step, args.group, len(rewards))  # (P, G, kinds)
        named = {f'{what}_{name}': of[..., i].mean().item()
                 for i, (name, _) in enumerate(rewards)
                 for what, of in (('reward', values), ('spread', values.std(dim=1)))}
        run.check(**named)
        advantage = group_advantages(values, reward_weights)  # (P, G)
        mine = advantage.view(args.accum, process.world, args.batch)[:, process.rank].to(device)

        # policy: the same transition again, now with gradient
        t = torch.full((args.batch, shape[1]), steps[k], device=device)  # (B, F)
        kl_sum = 0
        for micro, (context, x_t, z_next, endpoints) in enumerate(batches):
            with process.sync(generator, micro == args.accum - 1):
                # one forward on the rollout's own states (RAVEN's I_u) gives what it computed
                x0 = interleaved_x0(generator, x_t, t, endpoints, context, chunks)
                mean, std, slope = kernel(x_t, x0, steps[k], steps[k + 1])
                loss = 100 * surrogate(x0, z_next, mean, std, slope, mine[micro], weights)
                if args.kl:
                    reference = reference_x0(net, frozen, x_t, t, endpoints, context, chunks)
                    kl = kl_to_reference(x0, reference, std, slope, weights)
                    loss, kl_sum = loss + args.kl * kl, kl_sum + kl.item() / args.accum
                (loss / args.accum).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip)
        metrics = run.check(grad_norm=norm, motion=motion,
                            **({'kl': kl_sum} if args.kl else {}))
        optimizer.step()
        process.forget_gradients(optimizer)
        ema.update(net, step)

        # --- log, sample, save
        # the share of groups without any spread, which teach nothing
        dead = (advantage.abs().amax(dim=1) < 1e-6).float().mean().item()
        metrics = {**named, 'no_spread': dead, 'transition': k, **metrics}
        if run.due(args.sample_every):
            metrics |= sample()
        run.report(**metrics)
        if run.due(args.save_every):
            average, state = process.whole(ema.average), process.whole(net.state_dict())
            result = None  # rank 0 writes
            if process.rank == 0:
                result = merged(state, average, args.lora_alpha)
                if args.lora_rank:
                    save_adapter(run.folder / 'lora', average, args,
                                 timesteps=format_steps(steps, 10), chunk=chunk)
            run.save(result, steps, kind='causal', chunk=chunk, shift=shift, config=net.config)


if __name__ == '__main__':
    run_script(main)
