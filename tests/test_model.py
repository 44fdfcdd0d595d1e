"""The DiT, its cache, the VAE and the samplers against diffusers, against each other and against closed forms."""
import dataclasses
import math

import pytest
import torch
from conftest import SMALL, random_dit, random_latents

import generate
import wan_causal as wc
from generate import compile_for_inference

pytestmark = pytest.mark.quick

CONTEXT = random_latents(2, 8, 16, seed=9)


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


# ------------------------------------------------------------------------------------- against diffusers

def diffusers_dit(model):
    from diffusers import WanTransformer3DModel
    c = model.config
    other = WanTransformer3DModel(
        patch_size=c.patch_size, num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads,
        in_channels=16, out_channels=16, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim,
        num_layers=c.num_layers)
    other.load_state_dict({wc.dit_diffusers_key(k): v for k, v in model.state_dict().items()})
    return other.eval()


@pytest.mark.parametrize("sizes", [{}, dict(dim=64, num_heads=4, num_layers=3), dict(dim=128, num_heads=1)])
def test_dit_equals_diffusers(sizes):
    model = random_dit(**sizes)
    x, t = random_latents(2, 16, 5, 6, 10), torch.tensor([999.0, 20.5])
    with torch.no_grad():
        theirs = diffusers_dit(model)(x, t, CONTEXT, return_dict=False)[0]
        close(model(x, t, CONTEXT), theirs, atol=2e-5)


@pytest.mark.parametrize("sizes", [dict(dim=4), dict(dim=8, dim_mult=[1, 2, 2, 4], num_res_blocks=1)])
def test_vae_equals_diffusers(sizes):
    from diffusers import AutoencoderKLWan
    torch.manual_seed(0)
    vae = wc.WanVAE(**{"num_res_blocks": 2, "dim_mult": [1, 2, 4, 4], **sizes}).eval()
    n = sizes.get("num_res_blocks", 2)
    other = AutoencoderKLWan(base_dim=sizes["dim"], dim_mult=sizes.get("dim_mult", [1, 2, 4, 4]), num_res_blocks=n)
    other.load_state_dict({wc.vae_diffusers_key(k, n): v for k, v in vae.state_dict().items()})
    video = random_latents(1, 3, 9, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        mean = other.encode(video).latent_dist.mode()
        close((vae.encode(video) * vae.std + vae.mean), mean)
        z = random_latents(1, 16, 3, 2, 3)
        close(vae.decode((z - vae.mean) / vae.std), other.decode(z).sample.clamp(-1, 1))


@pytest.mark.parametrize("steps, shift", [(50, 5.0), (50, 8.0), (7, 3.0), (2, 5.0), (1, 5.0)])
def test_unipc_equals_diffusers(steps, shift):
    """A velocity field that is no straight line, so that every term of the solver counts."""
    from diffusers import UniPCMultistepScheduler
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
                                        num_train_timesteps=1000, solver_order=2)
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1].numpy())
    sigmas = generate.sigma_schedule(steps, shift)
    assert [int(1000 * s) for s in sigmas[:-1]] == scheduler.timesteps.tolist()

    def field(x, t, context):
        return torch.sin(x) + float(t[0]) / 1000 * x
    noise = random_latents(1, 16, 1, 2, 2)
    *_, ours = generate.ode_trajectory(field, noise, None, None, sigmas, guidance=1, solver="unipc")
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t.expand(1), None), t, x).prev_sample
    close(ours, x, atol=1e-4)


# --------------------------------------------------------------------------------------------- schedule

@pytest.mark.parametrize("shift, first, last", [(5.0, [999, 995, 991], 92), (8.0, [999, 997, 994], 140)])
def test_the_teachers_timesteps_are_wans(shift, first, last):
    t = [int(1000 * s) for s in generate.sigma_schedule(50, shift)]
    assert t[:3] == first and t[-2:] == [last, 0] and len(t) == 51


@pytest.mark.parametrize("shape_t", ["number", "batch", "frames"])
def test_conversions_invert_each_other(shape_t):
    x0, eps = random_latents(2, 16, 3, 4, 4), random_latents(2, 16, 3, 4, 4, seed=1)
    t = {"number": 300.0, "batch": torch.tensor([1000.0, 7.0]), "frames": torch.rand(2, 3) * 999 + 1}[shape_t]
    x_t = wc.add_noise(x0, eps, t)
    close(wc.x0_from_v(x_t, eps - x0, t), x0)
    close(wc.v_from_x0(x_t, x0, t), eps - x0, atol=1e-3)


def test_noise_at_the_ends():
    x0, eps = random_latents(1, 16, 2, 2, 2), random_latents(1, 16, 2, 2, 2, seed=1)
    assert torch.equal(wc.add_noise(x0, eps, 0.0), x0) and torch.equal(wc.add_noise(x0, eps, 1000.0), eps)


def test_sigma_of_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 16, 5, 4, 4\)"):
        wc.sigma_of(torch.zeros(3), torch.zeros(2, 16, 5, 4, 4))


def test_euler_solves_a_linear_ode():
    """dx/dsigma = x, from sigma = 1 to 0: x(0) = x(1) / e, and Euler's error falls with the step."""
    noise = torch.ones(1, 16, 1, 2, 2)

    def error(n):
        *_, x = generate.ode_trajectory(lambda x, t, c: x, noise, None, None, torch.linspace(1, 0, n + 1), 1, "euler")
        return (x - math.exp(-1)).abs().max().item()
    assert error(1000) < 2e-4 < error(100) < 2e-3


def test_guidance():
    def model(x, t, context):
        return context * torch.ones_like(x)
    x = torch.zeros(1, 16, 1, 2, 2)
    assert torch.equal(wc.guided_velocity(model, x, 500, 3.0, 1.0, 1), torch.full_like(x, 3))
    assert torch.equal(wc.guided_velocity(model, x, 500, 3.0, 1.0, 5), torch.full_like(x, 1 + 5 * (3 - 1)))


# ------------------------------------------------------------------------------------------- visibility

def brute_force(segments, window, sink):
    """The definition, segment by segment: (chunk, clean, positions) in sequence order -> F x F booleans."""
    rows = []
    for chunk, clean, positions in segments:
        for _ in positions:
            row = []
            for other, other_clean, other_positions in segments:
                same = (other, other_clean) == (chunk, clean)
                earlier = other_clean and other < chunk
                first = positions[-1] + 1 - (10 ** 9 if window is None else window - sink)
                row += [same or (earlier and (p < sink or p >= first)) for p in other_positions]
            rows.append(tuple(row))
    return tuple(rows)


@pytest.mark.parametrize("window, sink", [(None, 0), (6, 0), (7, 1), (9, 3), (4, 0)])
@pytest.mark.parametrize("chunks", [[3, 3, 3, 3], [1, 3, 3, 2], [1] * 6, [2, 4]])
def test_interleaved_rule_is_the_definition(chunks, window, sink):
    segments, start = [], 0
    for i, n in enumerate(chunks):
        positions = list(range(start, start + n))
        segments += [(i, False, positions), (i, True, positions)]
        start += n
    expected = brute_force(segments[:-1], window, sink)
    assert wc.interleaved(chunks, window, sink).visible == (None if all(map(all, expected)) else expected)


def test_block_causal_rule():
    assert wc.block_causal([2, 1]).visible == ((True, True, False),) * 2 + ((True, True, True),)
    assert wc.bidirectional(5).visible is None


def test_interleave_and_back():
    noisy, clean = random_latents(1, 16, 7, 2, 2), random_latents(1, 16, 7, 2, 2, seed=1)
    sequence = wc.interleave(noisy, clean, [1, 3, 3])
    assert sequence.shape[2] == 7 + 4 and torch.equal(wc.noisy_part(sequence, [1, 3, 3]), noisy)
    assert torch.equal(sequence[:, :, 4:5 + 3][:, :, 1:4], clean[:, :, 1:4])  # noisy 0 | clean 0 | 1-3 | clean 1-3


@pytest.mark.parametrize("args, expected", [((21, 3), [3] * 7), ((7, 3, 1), [1, 3, 3]), ((5, 1), [1] * 5),
                                            ((8, 3), [3, 3, 2]), ((2, 3), [2])])
def test_chunk_sizes(args, expected):
    assert wc.chunk_sizes(*args) == expected


# ----------------------------------------------------------------------- rollout, cache and one forward agree

STEPS = wc.warped_steps()


def run_rollout(model, chunks, **kwargs):
    frames = sum(chunks)
    kwargs = {"record": True, "generator": wc.seeded(3), **kwargs}
    return list(wc.rollout(model, random_latents(2, 16, frames, 4, 6), CONTEXT, STEPS, chunks, **kwargs))


@pytest.mark.parametrize("chunks", [[3, 3, 3], [1, 3, 3], [1] * 5, [2, 5]])
@pytest.mark.parametrize("window, sink", [(None, 0), (6, 0), (7, 1), (8, 3)])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_interleaved_forward_equals_cached_rollout(chunks, window, sink, step):
    """One forward over the recorded states and endpoints predicts what the rollout predicted (RAVEN's claim)."""
    if window is not None and max(chunks) > window - sink:
        pytest.skip("the window does not hold a chunk")
    model = random_dit()
    with torch.no_grad():
        video = run_rollout(model, chunks, window=window, sink=sink)
        state, clean, predicted = (torch.cat(parts, 2) for parts in zip(
            *[(c.states[step], c.x0, c.predictions[step]) for c in video]))
        t = torch.full((2, sum(chunks)), STEPS[step])
        v = model(wc.interleave(state, clean, chunks), wc.interleave(t, 0 * t, chunks), CONTEXT,
                  wc.interleaved(chunks, window, sink))
    close(wc.x0_from_v(state, wc.noisy_part(v, chunks), t), predicted)


@pytest.mark.parametrize("backend", ["rectangles", "flex"])
@pytest.mark.parametrize("window, sink, chunks", [(6, 0, [3] * 5), (7, 2, [2] * 6), (5, 1, [1, 3, 3, 1, 2]),
                                                  (4, 0, [3, 3, 3]), (5, 4, [1] * 8)])
def test_ring_buffer_equals_recomputed_window(backend, window, sink, chunks):
    """A ring that overwrites in place gives what a forward over exactly the frames in the window gives."""
    model = random_dit().requires_grad_(False)
    model.backend = backend
    total = sum(chunks)
    x, clean = random_latents(2, 16, total, 4, 6), random_latents(2, 16, total, 4, 6, seed=1)
    cache, start = wc.KVCache(model.config, 2, window, 6, sink), 0
    t = torch.full((2,), 500.0)
    for i, n in enumerate(chunks):
        part = slice(start, start + n)
        with torch.no_grad():
            cached = model(x[:, :, part], t, CONTEXT, cache=cache, start=start)
            model(clean[:, :, part], 0 * t, CONTEXT, cache=cache, start=start)
        before, now = chunks[:i], list(chunks[:i + 1])
        layout = wc.interleaved(now, window, sink)
        times = wc.interleave(torch.full((2, start + n), 500.0), torch.zeros(2, start + n), now)
        out = model(wc.interleave(x[:, :, :start + n], clean[:, :, :start + n], now), times, CONTEXT, layout)
        close(cached, wc.noisy_part(out, now)[:, :, sum(before):])
        start += n


def test_gradient_forward_reads_the_same_cache_and_writes_nothing():
    model = random_dit()
    x, clean = random_latents(2, 16, 9, 4, 6), random_latents(2, 16, 9, 4, 6, seed=1)
    for window in (9, 6, 5):
        cache = wc.KVCache(model.config, 2, window, 6)
        for start in (0, 3, 6):
            args = (x[:, :, start:start + 3], torch.full((2,), 625.0), CONTEXT)
            before = [k.clone() for k in cache.k]
            with_grad = model(*args, cache=cache, start=start)
            assert all(torch.equal(a, b) for a, b in zip(before, cache.k))
            with torch.no_grad():
                close(model(*args, cache=cache, start=start), with_grad.detach())
                model(clean[:, :, start:start + 3], torch.zeros(2), CONTEXT, cache=cache, start=start)


@pytest.mark.parametrize("window", [None, 6])
def test_gradients_survive_later_chunks_and_checkpointing(window):
    """Backward after the whole rollout, when the ring has been overwritten: the same gradient as backward at once,
    and as with recomputed activations."""
    def gradient(late, recompute):
        model = random_dit()
        model.checkpointing = recompute
        kept = []
        for chunk in run_rollout_stream(model, [3] * 4, window):
            loss = chunk.x0.square().mean()
            kept.append(loss) if late else loss.backward()
        if late:
            sum(kept).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    reference = gradient(late=False, recompute=False)
    assert reference.abs().max() > 1e-3
    close(gradient(late=True, recompute=False), reference, atol=1e-6)
    close(gradient(late=True, recompute=True), reference, atol=1e-6)


def run_rollout_stream(model, chunks, window):
    return wc.rollout(model, random_latents(2, 16, sum(chunks), 4, 6), CONTEXT, STEPS, chunks, window=window,
                      exit_step=2, generator=wc.seeded(3))


def test_rollout_exit_step_and_grad_from():
    model = random_dit()
    chunks = run_rollout(model, [3, 3, 3], exit_step=1, grad_from=3)
    assert [c.x0.requires_grad for c in chunks] == [False, True, True]
    assert [len(c.states) for c in chunks] == [2, 2, 2]
    with torch.no_grad():
        plain = run_rollout(model, [3, 3, 3], exit_step=1)
    for a, b in zip(chunks, plain):
        close(a.x0.detach(), b.x0)
    assert not any(c.x0.requires_grad for c in run_rollout(model, [3, 3]))


def test_rollout_consistency_step():
    """Each recorded state is the earlier prediction, re-noised: (x_s - (1 - sigma_s) x0) / sigma_s is N(0, 1)."""
    with torch.no_grad():
        chunk = run_rollout(random_dit(), [9])[0]
    for k in range(1, 4):
        sigma = STEPS[k] / 1000
        eps = (chunk.states[k] - (1 - sigma) * chunk.predictions[k - 1]) / sigma
        assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    assert torch.equal(chunk.predictions[-1], chunk.x0)


def test_rollout_does_not_depend_on_the_batch():
    model = random_dit().requires_grad_(False)
    noise = random_latents(2, 16, 6, 4, 6)
    both = [c.x0 for c in wc.rollout(model, noise, CONTEXT, STEPS, [3, 3], generator=[wc.seeded(1), wc.seeded(2)])]
    for i in range(2):
        alone = [c.x0 for c in wc.rollout(model, noise[i:i + 1], CONTEXT[i:i + 1], STEPS, [3, 3],
                                          generator=wc.seeded(1 + i))]
        close(torch.cat(alone, 2), torch.cat(both, 2)[i:i + 1])


def test_rollout_continues_from_init():
    """Clean latents given as init are the history that the rollout itself would have made of them."""
    model = random_dit().requires_grad_(False)
    whole = run_rollout(model, [3, 3, 3], exit_step=0)  # one step: no fresh noise, so both runs see the same
    noise = random_latents(2, 16, 9, 4, 6)
    rest = list(wc.rollout(model, noise[:, :, 3:], CONTEXT, STEPS, [3, 3], init=whole[0].x0, exit_step=0))
    assert [c.start for c in rest] == [3, 6]
    close(rest[-1].x0, whole[-1].x0)
    # as well before chunks that are smaller
    short = [list(wc.rollout(model, noise[:, :, 3:4], CONTEXT, STEPS, [1], init=whole[0].x0, exit_step=0, **how))[0].x0
             for how in ({"init_chunk": 3}, {})]
    cache, t = model.make_cache(2, 4, 6), torch.full((2,), float(STEPS[0]))
    with torch.no_grad():
        model(whole[0].x0, torch.zeros(2), CONTEXT, cache=cache, start=0)
        close(short[0], wc.x0_from_v(noise[:, :, 3:4], model(noise[:, :, 3:4], t, CONTEXT, cache=cache, start=3), t))
    assert not torch.allclose(*short, atol=1e-4)


def test_a_rollout_encodes_the_prompt_once_and_makes_a_chunk_when_it_is_asked_for():
    model, texts, passes = random_dit().requires_grad_(False), [], []
    model.text_embedding.register_forward_hook(lambda *_: texts.append(1))
    model.blocks[0].cross_attn.k.register_forward_hook(lambda *_: texts.append(2))
    model.register_forward_hook(lambda *_: passes.append(1))
    rolled = wc.rollout(model, random_latents(2, 16, 9, 4, 6), CONTEXT, STEPS, [3, 3, 3])
    next(rolled)
    assert len(passes) == len(STEPS)
    assert len(list(rolled)) == 2 and texts == [1, 2]


@pytest.mark.parametrize("chunks", [[3, 3, 3], [1, 2, 3, 1]])
def test_a_rollout_is_the_steps_of_each_chunk_and_its_clean_pass(chunks):
    """Self Forcing's algorithm 1, but for the last chunk's clean pass; a ring that is never full changes nothing."""
    model, passes = random_dit().requires_grad_(False), []
    model.register_forward_hook(lambda module, given, v: passes.append(v.shape[2]))
    plain = run_rollout(model, chunks)
    assert passes == [n for n in chunks for _ in range(len(STEPS) + 1)][:-1]
    for a, b in zip(plain, run_rollout(model, chunks, window=sum(chunks))):
        close(a.x0, b.x0)


@pytest.mark.parametrize("begin, passes", [(1, [1]), (3, [3]), (4, [1, 3]), (5, [2, 3])])
def test_a_given_start_is_encoded_in_whole_chunks_after_what_is_left_over(begin, passes):
    """An independent first frame comes first, as in training with chunks of 1, 3, 3, ..."""
    model, seen = random_dit().requires_grad_(False), []
    model.register_forward_hook(lambda module, given, v: seen.append(v.shape[2]))
    list(wc.rollout(model, random_latents(2, 16, 3, 4, 6), CONTEXT, STEPS[:1], [3],
                    init=random_latents(2, 16, begin, 4, 6)))
    assert seen == [*passes, 3]


def test_a_forward_with_a_cache_takes_one_chunk():
    model, cache = random_dit(), wc.KVCache(random_dit().config, 2, 6, 6)
    with pytest.raises(ValueError, match="one chunk"):
        model(random_latents(2, 16, 6, 4, 6), torch.zeros(2, 6), CONTEXT, wc.block_causal([3, 3]), cache)


def test_rollout_leaves_the_grad_mode_alone():
    assert torch.is_grad_enabled()
    for _ in run_rollout_stream(random_dit(), [3, 3], None):
        assert torch.is_grad_enabled()


def test_rope_rotates():
    """A rotation keeps lengths, and turning back by the same angles gives what was there."""
    x = torch.randn(2, 24, 3, 16, generator=wc.seeded(0))
    rope = wc.rope_table((0, 1, 5, 900), 2, 3, 16, x.device)
    turned = wc.rotate(x, rope)
    close(turned.norm(dim=-1), x.norm(dim=-1))
    a, b = turned.double().unflatten(-1, (-1, 2)).unbind(-1)
    angle = torch.atan2(rope[..., 1], rope[..., 0])
    back = torch.complex(a, b) * torch.exp(-1j * angle.double())
    close(back, torch.view_as_complex(x.unflatten(-1, (-1, 2)).double()))


# ------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("layout", [wc.block_causal([2, 3, 1]), wc.interleaved([2, 2, 2]),
                                    wc.interleaved([1, 2, 2, 2], window=4, sink=1)])
def test_rectangles_equal_a_dense_mask(layout):
    q, k, v = (random_latents(2, 2, len(layout) * 4, 8, seed=s).requires_grad_() for s in range(3))
    mask = torch.tensor(layout.visible).repeat_interleave(4, 0).repeat_interleave(4, 1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = wc.attend(q, k, v, layout.visible, "rectangles")
    close(out, dense)
    grads = [torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (out, dense)]
    for ours, theirs in zip(*grads):
        close(ours, theirs)
    q, k, v = q.detach(), k.detach(), v.detach()
    close(wc.attend(q, k, v, layout.visible, "flex"), dense.detach())


@pytest.mark.parametrize("layout", [wc.block_causal([2, 3, 1]), wc.interleaved([1, 2, 2, 2], window=4, sink=1)])
@pytest.mark.parametrize("tokens", [4, 40, 128, 200])  # a block of 128 tokens: many frames, parts of them, one, a part
def test_block_mask_equals_that_of_torch(layout, tokens):
    from torch.nn.attention.flex_attention import create_block_mask
    table, length = torch.tensor(layout.visible), len(layout) * tokens
    theirs = create_block_mask(lambda b, h, q, k: table[q // tokens, k // tokens], None, None, length, length, "cpu")
    ours = wc.flex_mask(layout.visible, tokens, torch.device("cpu"))
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.kv_indices.is_contiguous() and ours.full_kv_indices.is_contiguous()  # CUDA's kernel takes it for granted
    for part in ("kv", "full_kv", "q", "full_q"):
        for of in (f"{part}_num_blocks", f"{part}_indices"):
            assert torch.equal(getattr(ours, of), getattr(theirs, of))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention's backward needs CUDA")


@needs_gpu
@pytest.mark.parametrize("layout", [wc.block_causal([3, 3, 3]), wc.interleaved([3, 3, 3], window=6)])
def test_flex_equals_rectangles_on_gpu(layout):
    q, k, v = (random_latents(1, 2, len(layout) * 40, 64, seed=s).cuda().requires_grad_() for s in range(3))
    outs = [wc.attend(q, k, v, layout.visible, backend) for backend in ("flex", "rectangles")]
    torch.testing.assert_close(*outs, atol=2e-3, rtol=1e-2)
    grads = [torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in outs]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=1e-2)


def test_positions_past_the_rope_table_raise():
    model = random_dit().requires_grad_(False)
    with pytest.raises(ValueError, match="position 1024 .* 1024 positions"):
        cache = wc.KVCache(model.config, 2, 6, 6)
        model(random_latents(2, 16, 3, 4, 6), torch.zeros(2), CONTEXT, cache=cache, start=1022)


def test_chunk_larger_than_the_cache_raises():
    model = random_dit().requires_grad_(False)
    for frames, sink, start, numbers in ((3, 0, 0, "chunk of 4 .* cache of 3"),
                                         (6, 3, 4, "chunk of 4 .* cache of 6 .* sink of 3.* = 7")):
        with torch.no_grad(), pytest.raises(ValueError, match=numbers):
            model(random_latents(2, 16, 4, 4, 6), torch.zeros(2), CONTEXT,
                  cache=wc.KVCache(model.config, 2, frames, 6, sink), start=start)
    with torch.no_grad(), pytest.raises(ValueError, match="frames 3 to 5 do not fit a cache of 4"):
        cache = wc.KVCache(model.config, 2, 4, 6, rolling=False)
        model(random_latents(2, 16, 3, 4, 6), torch.zeros(2), CONTEXT, cache=cache, start=3)


@pytest.mark.parametrize("change", [dict(x=torch.zeros(2, 8, 3, 4, 6)), dict(x=torch.zeros(2, 16, 3, 5, 6)),
                                    dict(t=torch.zeros(3)), dict(context=torch.zeros(2, 8, 17)),
                                    dict(context=torch.zeros(1, 8, 16)), dict(layout=wc.bidirectional(4))])
def test_wrong_shapes_raise_with_the_shapes(change):
    args = {**dict(x=torch.zeros(2, 16, 3, 4, 6), t=torch.zeros(2), context=CONTEXT), **change}
    with pytest.raises(ValueError, match=r"x \(2, \d+, 3, \d, 6\), t \(\d,\), context"):
        random_dit()(**args)


def test_bfloat16_stays_close():
    model = random_dit().requires_grad_(False)
    x, t = random_latents(2, 16, 6, 4, 6), torch.tensor([900.0, 100.0])
    full = model(x, t, CONTEXT)
    half = model.bfloat16()(x, t, CONTEXT)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.03 * full.abs().mean()


def test_published_sizes():
    for name, tensors, parameters in (("1.3B", 825, 1_418_996_800), ("14B", 1095, 14_288_491_584)):
        with torch.device("meta"):
            model = wc.WanModel(wc.CONFIGS[name])
        assert len(model.state_dict()) == tensors
        assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.device("meta"):
        vae = wc.WanVAE()
    assert len(vae.state_dict()) == 194 and sum(p.numel() for p in vae.parameters()) == 126_892_531


def test_config_refuses_what_it_cannot_build():
    with pytest.raises(wc.InputError, match="patch"):
        wc.WanConfig(patch_size=(1, 4, 4))
    assert [f.name for f in dataclasses.fields(wc.WanConfig)][:3] == ["dim", "ffn_dim", "num_heads"] and SMALL


# ---------------------------------------------------------------------------------------------------- VAE

@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return wc.WanVAE(4, num_res_blocks=1).eval().requires_grad_(False)


@pytest.mark.parametrize("cuts", [[1] * 5, [3, 2], [1, 4], [2, 1, 2]])
def test_streamed_decode_equals_whole(vae, cuts):
    z = random_latents(2, 16, 5, 2, 3)
    cache = {}
    streamed = torch.cat([vae.decode(part, cache) for part in z.split(cuts, dim=2)], dim=2)
    whole = vae.decoder(vae.conv2(z * vae.std + vae.mean)).clamp(-1, 1)
    assert streamed.shape == (2, 3, 17, 16, 24)
    close(streamed, whole)
    close(vae.decode(z, at_once=max(cuts)), whole)


def test_streamed_encode_equals_whole(vae):
    video = random_latents(1, 3, 13, 16, 24).clamp(-1, 1)
    mu = vae.conv1(vae.encoder(video))[:, :16]
    close(vae.encode(video), (mu - vae.mean) / vae.std)


def can_compile():
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception:
        return False
    return True


@pytest.mark.skipif(not can_compile(), reason="torch.compile finds no C++ compiler here")
def test_compiled_rollout_and_decoder_equal_plain_ones():
    """In all their shapes, none of which may be left uncompiled because there are too many, and each part in one
    piece."""
    model = random_dit().requires_grad_(False)
    torch.manual_seed(0)
    vae = wc.WanVAE(dim=4).requires_grad_(False)  # with the levels and blocks of the real one

    def video():
        cache = {}
        rolled = wc.rollout(model, random_latents(1, 16, 9, 8, 12), CONTEXT[:1], STEPS, [3, 3, 3],
                            generator=torch.Generator().manual_seed(0))
        return torch.cat([vae.decode(chunk.x0, cache) for chunk in rolled], dim=2)
    settings = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)  # the limit: put back
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), settings:
        plain = video()
        compile_for_inference(model, vae)
        vae.decoder.compile(dynamic=False, fullgraph=True)  # as on CUDA
        close(video(), plain, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("frames", [[1] * 4, [4]])
def test_recomputed_decoder_layers_change_nothing(vae, frames, monkeypatch):
    """Values and gradients, also through the cache from call to call, and in a second backward pass."""
    def decode(z):
        cache = {}
        return torch.cat([vae.decode(part, cache) for part in z.split(frames, dim=2)], dim=2)
    z = random_latents(1, 16, 4, 2, 3).requires_grad_()
    plain = decode(z)
    weight = random_latents(*plain.shape, seed=1)
    expected, = torch.autograd.grad((plain * weight).sum(), z)
    monkeypatch.setattr(vae.decoder, "checkpointing", True)
    again = decode(z)
    close(again, plain)
    for _ in range(2):
        gradient, = torch.autograd.grad((again * weight).sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_recomputing_keeps_less(vae, monkeypatch):
    def kept():
        """Bytes of all tensors that the backward pass of two latent frames needs."""
        saved = []  # alive, so that no two have one address
        z = random_latents(1, 16, 2, 2, 3).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            vae.decode(z)
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}.values())
    plain = kept()
    monkeypatch.setattr(vae.decoder, "checkpointing", True)
    assert kept() < plain / 3


def test_vae_statistics_are_exact_in_bfloat16():
    vae = wc.WanVAE(4, num_res_blocks=1).to(torch.bfloat16)
    assert vae.mean.flatten().tolist() == torch.tensor(wc.LATENT_MEAN).tolist()
    assert vae.std.flatten().tolist() == torch.tensor(wc.LATENT_STD).tolist()


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16)])
def test_encode_refuses_wrong_shapes(vae, shape):
    with pytest.raises(ValueError, match=r"1 \+ 4k"):
        vae.encode(torch.zeros(shape))


def test_decode_refuses_wrong_shapes(vae):
    with pytest.raises(ValueError, match=r"\(1, 8, 2, 2, 2\)"):
        vae.decode(torch.zeros(1, 8, 2, 2, 2))


# --------------------------------------------------------------------------------------------------- text

def test_text_cleaning():
    assert wc.clean_text("  a &amp;amp; b\n\t c ") == "a & b c"


# ---------------------------------------------------------------------------------- reward and processes

@pytest.mark.parametrize("height, width", [(300, 400), (90, 64), (24, 40)])
def test_reward_preprocessing_is_pils(height, width):
    """Shorter side to S with PIL's antialiased bicubic, centre crop, CLIP's normalisation; to one level of 255."""
    from PIL import Image
    small = 0.25 * random_latents(1, 3, 12, 16)  # inside the gamut, where PIL's rounding is all that differs
    x = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    ours = wc.clip_preprocess(pixels / 127.5 - 1, 32)[0]
    ours = ours * torch.tensor(wc.CLIP_STD).view(3, 1, 1) + torch.tensor(wc.CLIP_MEAN).view(3, 1, 1)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    w, h = (int(32 * width / height), 32) if height <= width else (32, int(32 * height / width))
    image = image.resize((w, h), Image.BICUBIC)
    left, top = round((w - 32) / 2), round((h - 32) / 2)
    theirs = torch.tensor(list(image.crop((left, top, left + 32, top + 32)).tobytes())).view(32, 32, 3) / 255
    assert (ours.permute(1, 2, 0) - theirs).abs().max() < 1.5 / 255


def test_two_processes_average_gradients_and_end_their_threads(tmp_path):
    from conftest import ranks
    script = tmp_path / "average.py"
    script.write_text("""
import pathlib, sys, torch
import wan_causal as wc
def threads():
    return [file.read_text() for file in pathlib.Path('/proc/self/task').glob('*/comm')]  # Linux
def average(p):
    torch.manual_seed(0)
    model = p.wrap(torch.nn.Linear(2, 1, bias=False))
    model(torch.full((1, 2), float(p.rank))).sum().backward()
    p.barrier()
    p.print('world', p.world, type(model).__name__, model.module.weight.grad.tolist())
with wc.processes('cpu') as p:
    average(p)
    assert any('gloo' in name for name in threads()) or sys.platform != 'linux'
assert not any('gloo' in name for name in threads()), threads()
""")
    done = ranks(2, script, env={"PYTHONPATH": "."})
    assert done.returncode == 0 and done.stdout.strip() == "world 2 DistributedDataParallel [[0.5, 0.5]]", done.stderr
    with wc.processes("cpu") as alone:
        linear = torch.nn.Linear(1, 1)
        assert (alone.rank, alone.world, alone.wrap(linear)) == (0, 1, linear)
