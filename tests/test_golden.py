"""What the public Self-Forcing and ImageReward code computes, reproduced to 1e-4 or better in float32."""
import pytest
import torch
from conftest import GOLDEN, GOLDEN_T5, golden_state
from safetensors.torch import load_file

import wan_causal as wc

pytestmark = pytest.mark.quick

CHUNKS = [3, 3, 3]


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_bidirectional(golden, golden_dit):
    close(golden_dit(golden["x"], golden["t_batch"], golden["context"]), golden["bidirectional.out"])


@pytest.mark.parametrize("backend", ["rectangles", "flex"])
def test_block_causal(golden, golden_dit, backend, monkeypatch):
    monkeypatch.setattr(golden_dit, "backend", backend)
    layout = wc.block_causal(CHUNKS)
    close(golden_dit(golden["x"], golden["t_frames"], golden["context"], layout), golden["block_causal.out"])


@pytest.mark.parametrize("backend", ["rectangles", "flex"])
@pytest.mark.parametrize("window, name", [(None, "teacher_forcing"), (None, "kv_cache"), (6, "kv_window")])
def test_interleaved(golden, golden_dit, backend, window, name, monkeypatch):
    """One forward over noisy and clean segments: what teacher forcing computes, and also what the cache computes."""
    monkeypatch.setattr(golden_dit, "backend", backend)
    t = golden["t_frames"]
    out = golden_dit(wc.interleave(golden["x"], golden["clean"], CHUNKS), wc.interleave(t, 0 * t, CHUNKS),
                     golden["context"], wc.interleaved(CHUNKS, window))
    close(wc.noisy_part(out, CHUNKS), golden[f"{name}.out"])


@pytest.mark.parametrize("backend", ["rectangles", "flex"])
@pytest.mark.parametrize("frames, name", [(9, "kv_cache"), (6, "kv_window")])
def test_cache(golden, golden_dit, backend, frames, name, monkeypatch):
    """Chunk by chunk: the noisy chunk, then the clean one over it; a cache of 6 frames is the rolling window."""
    monkeypatch.setattr(golden_dit, "backend", backend)
    cache = wc.KVCache(golden_dit.config, 2, frames, tokens=24, rolling=frames < 9)
    out = []
    with torch.no_grad():
        for start in (0, 3, 6):
            part = slice(start, start + 3)
            t = golden["t_frames"][:, part]
            out.append(golden_dit(golden["x"][:, :, part], t, golden["context"], cache=cache, start=start))
            golden_dit(golden["clean"][:, :, part], 0 * t, golden["context"], cache=cache, start=start)
    close(torch.cat(out, dim=2), golden[f"{name}.out"])


def test_schedule_exactly(golden):
    sigmas = wc.shift_sigma(torch.linspace(1, 0, 1001)[:-1], 5.0)
    assert torch.equal(sigmas, golden["flow_match.sigmas_shift5"])
    assert torch.equal(1000 * sigmas, golden["flow_match.timesteps_shift5"])
    assert torch.equal(torch.tensor(wc.warped_steps()), golden["flow_match.warped_steps_1000_750_500_250"])
    assert wc.format_steps(wc.warped_steps()) == "1000, 937.5, 833.333, 625"


@torch.no_grad()
def test_vae(golden):
    config, state = golden_state("vae")
    vae = wc.WanVAE(config["dim"], config["z_dim"], config["dim_mult"], config["num_res_blocks"],
                    config["temperal_downsample"], latent_mean=[0.] * 16, latent_std=[1.] * 16)
    wc.load_exactly(vae, state, "golden")
    close(vae.encode(golden["vae.video"]), golden["vae.latent"])
    close(vae.decoder(vae.conv2(golden["vae.latent"])), golden["vae.decoded"])  # the whole clip in one call
    close(vae.decode(golden["vae.latent"]), golden["vae.decoded"].clamp(-1, 1))  # streamed, clamped


def test_umt5(golden, tmp_path):
    """Through the very loader that reads models_t5_umt5-xxl-enc-bf16.pth."""
    from tiny_world import make_tokenizer
    config, state = golden_state("umt5")
    make_tokenizer().save_pretrained(tmp_path / "google" / "umt5-xxl")
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    encoder = wc.load_text_encoder(tmp_path, sizes=GOLDEN_T5).encoder
    assert encoder.config.num_layers == config["num_layers"] and encoder.config.d_ff == config["dim_ffn"]
    with torch.no_grad():
        out = encoder(input_ids=golden["umt5.ids"], attention_mask=golden["umt5.mask"]).last_hidden_state
    valid = golden["umt5.mask"].bool()
    close(out[valid], golden["umt5.out"][valid])


def test_image_reward():
    config, state = golden_state("imagereward")
    model = wc.ImageReward(**config)
    names = {wc.ImageReward.published_key(key): key for key in model.state_dict()}
    model.load_state_dict({names[key]: value for key, value in state.items() if key in names})
    model.eval()
    tensors = load_file(GOLDEN / "imagereward_tensors.safetensors")
    image = tensors["image"].clone().requires_grad_()
    reward = model(image, tensors["ids"], tensors["mask"])
    reward.sum().backward()
    close(reward, tensors["reward"], atol=1e-5)
    close(image.grad, tensors["reward.grad_image"], atol=1e-5)
