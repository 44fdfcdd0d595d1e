"""The tiny world: what is drawn is what is measured, and the committed models are as good as the README says."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_latents, run
from safetensors.torch import load_file

import generate
import miniature
import tiny_world as tw
import wan_causal as wc

TINY = ROOT / "tests" / "tiny"


def clips(captions, frames=57, seed=0, size=64):
    return tw.render(captions, frames, size, torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- world

def test_captions():
    captions, (train, held_out) = tw.all_captions(), tw.split()
    assert len(set(captions)) == 2016 and len(train) == 1816 and len(held_out) == 200
    assert set(train).isdisjoint(held_out) and set(train) | set(held_out) == set(captions)
    assert {w for c in train for w in c.split()} == {w for c in held_out for w in c.split()} == set(tw.words())
    assert tw.parse("a red striped circle moving left on a navy background") == {
        "colour": "red", "texture": "striped", "shape": "circle", "motion": "moving left", "background": "navy"}
    with pytest.raises(ValueError, match="not a caption of the tiny world: 'a pink cat'"):
        tw.parse("a pink cat")


@pytest.mark.parametrize("frames", [57, 113])
def test_everything_drawn_is_measured(frames):
    """All 7 motions with all colours, textures, shapes and backgrounds among them."""
    captions = tw.all_captions()[::79][:24]  # 79: no divisor of 2016, so that none of their words is left out
    captions += [f"a red dotted square {motion} on a teal background" for motion in tw.MOTIONS]
    assert {word for caption in captions for word in caption.split()} == set(tw.words())
    card = tw.scorecard(clips(captions, frames), captions)
    assert card["all"] == 1
    assert card["texture_correlation"] > 0.97 and card["shape_iou"] > 0.97 and card["flicker"] < 3


def test_clips_repeat_with_the_seed_and_scale_with_the_size():
    caption = ["a green checkered triangle bouncing on a gray background"]
    a, b, c = clips(caption, 9), clips(caption, 9), clips(caption, 9, seed=1)
    assert a.shape == (1, 3, 9, 64, 64) and (a - b).abs().max() < 1e-5 < (a - c).abs().max()
    assert a.min() >= -1 and a.max() <= 1
    big = torch.nn.functional.avg_pool2d(clips(caption, 9, size=128)[0].transpose(0, 1), 2)
    assert (big - a[0].transpose(0, 1)).abs().mean() < 0.02


def test_measurements_fall_with_what_they_measure():
    captions = [f"a blue {t} {s} moving right on a brown background" for t in tw.TEXTURES[1:] for s in tw.SHAPES]
    sharp = clips(captions, 17)
    flat = sharp.transpose(1, 2).flatten(0, 1)
    blurred = [tw.degrade(flat, "blur", torch.full((len(flat),), strength), None).unflatten(0, (-1, 17))
               .transpose(1, 2) for strength in (0.4, 1.0)]
    cards = [tw.scorecard(v, captions) for v in (sharp, *blurred)]
    for name in ("sharpness", "texture_correlation"):
        assert cards[0][name] > cards[1][name] > cards[2][name]
    still = sharp[:, :, :1].expand(-1, -1, 17, -1, -1)
    assert tw.scorecard(still, captions)["path"] < 0.01 < 0.5 < cards[0]["path"]
    swapped = sharp.clone()
    swapped[:, :, ::2] = sharp.roll(1, dims=0)[:, :, ::2]  # another texture or shape in every other frame
    assert tw.scorecard(swapped, captions)["flicker"] > 5 * cards[0]["flicker"]


@pytest.mark.parametrize("video", [torch.full((2, 3, 5, 64, 64), -0.9), random_latents(2, 3, 5, 64, 64),
                                   random_latents(2, 3, 1, 16, 24) * 9])
def test_nothing_to_see_is_no_error(video):
    for row in tw.measure(video):
        assert all(math.isfinite(x) for x in [row["texture_correlation"], row["shape_iou"], row["path"], *row["net"]])
        if video.std() == 0:
            assert row["object"] == row["texture_correlation"] == 0 and row["shape"] is row["motion"] is None
        else:
            assert row["texture_correlation"] < 0.6


# ----------------------------------------------------------------------------------------------- training

def linear_problem(folder, stop=None, steps=7):
    model = torch.nn.Linear(4, 4)
    torch.nn.init.eye_(model.weight)
    torch.nn.init.zeros_(model.bias)

    def loss_of(step, random):
        if step == stop:
            raise KeyboardInterrupt
        return (model(torch.randn(8, 4, generator=random)) - 1).square().mean()
    return tw.fit("linear", folder, model, loss_of, steps, lr=0.1, ema=0.9, every=2)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = linear_problem(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        linear_problem(tmp_path / "b", stop=5)
    resumed = linear_problem(tmp_path / "b")
    torch.testing.assert_close(resumed.weight, whole.weight)
    torch.testing.assert_close(resumed.bias, whole.bias)


def test_muon_orthogonalises():
    p = torch.nn.Parameter(torch.zeros(6, 3, 2))
    p.grad = random_latents(6, 3, 2)
    tw.Muon([p], lr=1.0).step()
    singular = torch.linalg.svdvals(p.detach().flatten(1)) / (0.2 * 6 ** 0.5)
    assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("kind", ["blur", "warp", "smear", "noise"])
def test_degrading(kind):
    images = clips(tw.split()[1][:4], 1)[:, :, 0]
    distance = [(tw.degrade(images, kind, torch.full((4,), s), torch.Generator().manual_seed(0)) - images)
                .abs().mean().item() for s in (0.0, 0.3, 1.0)]
    assert distance[0] < 1e-3 < distance[1] < distance[2]


def test_quality_of_frames():
    caption, random = "a red striped circle moving left on a navy background", torch.Generator().manual_seed(2)
    frames = tw.render([caption] * 3, 1, generator=random)[:, :, 0]
    good, *worse = tw.quality(torch.cat([frames[:1], tw.degrade(frames[:1].expand(2, -1, -1, -1), "warp",
                                                                torch.tensor([0.4, 1.0]), random)]), caption).tolist()
    assert 1.9 < good <= 2 and good > worse[0] > worse[1] >= 0
    assert tw.quality(frames, caption.replace("red", "blue")).tolist() == [-1] * 3
    assert tw.quality(frames, caption.replace("navy", "gray")).tolist() == [-1] * 3
    assert tw.quality(frames, caption.replace("circle", "square")).max() <= 1  # the texture alone
    assert tw.quality(frames, caption.replace("striped", "dotted")).max() < good - 0.2  # they look alike by half


def test_pairs_of_generated_frames():
    """Frames of one caption, ordered by their quality, each somewhere else on the torus."""
    scores = torch.tensor([[0.1, 0.25, 1.0], [0.5, 0.5, 0.6]])  # no pair of the second is apart by 0.2
    frames = torch.zeros(2, 3, 3, 64, 64, dtype=torch.uint8)
    frames[:, :, 0] = (scores * 200).round().to(torch.uint8)[:, :, None, None]
    frames[:, :, 1, 0, 0] = 255  # a mark
    random = torch.Generator().manual_seed(0)
    better, worse, same = tw.generated_pairs(frames, scores, ["one", "two"], 50, random)
    assert same == ["one"] * 50 and better.shape == worse.shape == (50, 3, 64, 64)
    high, low = ((x[:, 0, 0, 0] + 1) * 127.5 / 200 for x in (better, worse))
    assert torch.allclose(high, torch.ones(50), atol=1e-4)
    assert {round(v, 2) for v in low.tolist()} == {0.1, 0.25}
    assert torch.equal((better[:, 1] > 0).sum((1, 2)), torch.ones(50, dtype=torch.long))
    assert len({int(x[1].argmax()) for x in torch.cat([better, worse])}) > 90  # of 4096 places
    nothing = tw.generated_pairs(frames, torch.ones(2, 3), ["one", "two"], 50, random)
    assert nothing[0].shape == nothing[1].shape == (0, 3, 64, 64) and nothing[2] == []


# ---------------------------------------------------------------------------------------- committed models

@pytest.fixture(scope="module")
def parts():
    return wc.load_dit(TINY).eval(), wc.load_vae(TINY), wc.load_text_encoder(TINY)


def test_size():
    sizes = {f: f.stat().st_size for f in TINY.rglob("*") if f.is_file()}
    generators = sum(size for f, size in sizes.items() if f.parent == TINY and f.suffix == ".safetensors")
    assert sum(sizes.values()) - generators < 20e6 and sum(sizes.values()) < 40e6


def test_tiny_is_the_config_in_the_table(parts):
    held = wc.load_config(TINY)  # whose text_len is the tokenizer's
    assert dataclasses.replace(held, text_len=wc.CONFIGS["tiny"].text_len) == wc.CONFIGS["tiny"]
    assert parts[2].text_len == wc.CONFIGS["tiny"].text_len and parts[2].dim == wc.CONFIGS["tiny"].text_dim


def test_vae_is_good(parts):
    captions = tw.split()[1][::20]
    card = tw.reconstruct(parts[1], captions)
    assert card["psnr"] > 29 and card["all"] == 1 and card["texture_correlation"] > 0.85
    measured = json.loads((TINY / "measured.json").read_text())["vae"]
    assert measured["psnr"] >= 30 and measured["all"] >= 0.98


def test_teacher_shows_what_it_is_told(parts):
    """Captions it never saw; few of them and half the steps, so below measured.json, which has 200 at 50 steps."""
    captions = tw.split()[1][7::25]
    video = tw.sample_teacher(parts[0], parts[1], parts[2], captions, steps=25)
    card = tw.scorecard(video, captions)
    assert min(card[name] for name in ("colour", "background", "shape")) >= 0.85  # at most one of 8 wrong
    assert min(card[name] for name in ("motion", "texture")) >= 0.75  # at most two
    assert card["texture_correlation"] > 0.55
    measured = json.loads((TINY / "measured.json").read_text())["teacher"]
    assert min(measured[name] for name in ("colour", "background", "shape", "motion")) >= 0.97
    assert measured["texture"] >= 0.92 and measured["texture_correlation"] >= 0.75


def test_reward_is_good():
    reward, random = wc.load_image_reward(TINY / "reward_model"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        pairs = [tw.preference_pairs(tw.split()[1], 64, random) for _ in range(4)]
        right = torch.cat([reward.score(a, good) > reward.score(b, bad) for a, good, b, bad, _ in pairs])
        captions = tw.random_captions(tw.split()[1], 8)
        better, worse, same = tw.generated_pairs(*tw.candidates(TINY, captions), captions, 256, random)
        chosen = reward.score(better, same) > reward.score(worse, same)
    assert right.float().mean() > 0.95 and chosen.float().mean() > 0.65
    measured = json.loads((TINY / "measured.json").read_text())["reward"]
    assert min(measured["sharp"], measured["true"]) >= 0.95 and measured["generated"] >= 0.75


def test_agreement_of_a_reward_with_the_measurement():
    caption, random = "a red striped circle moving left on a navy background", torch.Generator().manual_seed(2)
    clip = tw.render([caption], 17, generator=random)
    clip[0, :, 4::4] = tw.degrade(clip[0, :, 4::4].transpose(0, 1), "warp", torch.linspace(0.2, 0.8, 4),
                                  random).transpose(0, 1)  # frames 0, 4, 8, 12 and 16 are ever worse

    def texture(frames, captions):
        return torch.tensor([seen["texture_scores"]["striped"] for seen in tw.measure(frames.unsqueeze(2))])
    share, pairs = tw.agreement(texture, clip, [caption])
    assert share == 1 and 5 <= pairs <= 10  # of the ten pairs some lie closer than the margin
    assert tw.agreement(lambda *args: -texture(*args), clip, [caption]) == (0, pairs)
    flat = clip[:, :, :1].expand_as(clip)
    assert tw.agreement(texture, flat, [caption]) == (0, 0)  # frames that are alike are no pairs


def test_generators_are_named_by_run_step_and_seed():
    assert tw.label("runs/raven-1/model.safetensors") == "raven-1"
    assert tw.label("runs/raven-1/model_000050.safetensors") == "raven_50-1"
    assert tw.label("tests/tiny/raven.safetensors") == "raven"


def test_what_is_measured_of_each_sample(tmp_path, monkeypatch):
    """Captions and noise are the same for every generator, whatever the count."""
    asked = []

    def sampler(out, name):
        return lambda captions, seed: (asked.append((seed, captions)), clips(captions, 9, seed=seed))[1]
    monkeypatch.setattr(tw, "sampler", sampler)
    tw.compare(TINY, ["ode.safetensors"], tmp_path, count=202)
    assert [(seed, len(captions)) for seed, captions in asked] == [(0, 100), (100, 100), (200, 2)]
    assert asked[2][1] == tw.split()[1][:2]  # all captions are through: from the first again, with other noise
    measured = load_file(tmp_path / "measured/ode.safetensors")
    assert set(measured) == set(tw.COMPARED) and all(value.shape == (202,) for value in measured.values())
    video = clips(asked[1][1], 9, seed=100)
    for name in ("path", "texture_correlation"):
        theirs = [row[name] for row in tw.scores(video, asked[1][1])]
        assert measured[name][100:200].tolist() == pytest.approx(theirs, abs=2e-3)


def test_what_is_measured_over_time(tmp_path, monkeypatch):
    """A thing that stops after half of the clip: the path by latent frame says so."""
    monkeypatch.setattr(tw, "split", lambda: ([], ["a red striped circle moving left on a navy background"] * 200))
    moving = clips(tw.split()[1][:2], 25)
    moving[:, :, 13:] = moving[:, :, 12:13]
    monkeypatch.setattr(tw, "sampler", lambda out, name: lambda captions, seed, frames: moving)
    tw.over_time(TINY, ["ode.safetensors"], tmp_path, count=2, frames=7)
    measured = load_file(tmp_path / "measured/ode.long.safetensors")
    assert {key for key in measured} == {f"{what}_{key}" for what in ("time", "late") for key in tw.OVER_TIME}
    path = measured["time_path"].tolist()  # latent frames 1 to 6
    assert len(path) == 6 and min(path[:3]) > 0.5 and max(path[3:]) < 0.01
    assert measured["late_path"].shape == (2,)
    reward = wc.load_image_reward(TINY / "reward_model")
    with torch.no_grad():
        last = reward.score(moving[:, :, 12], tw.split()[1][:2]).mean().item()
    assert measured["time_reward"].tolist()[2:] == pytest.approx([last] * 4, abs=2e-3)
    flicker, still = measured["time_flicker"].tolist(), measured["late_flicker"].tolist()
    assert max(flicker[3:]) < 0.1 < min(flicker[:3]) and len(still) == 2


# ---------------------------------------------------------------------------------------------- pictures

def test_grid_of_clips():
    """Every clip lies where its row and column meet, in white gutters, and moves; labels fold and are drawn outside."""
    colours = torch.linspace(-0.8, 0.5, 6).view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 4, 32, 48).clone()
    colours[:, :, :, 3] = -1  # the last frame is black
    frames = tw.grid(colours, ["one", "another row"], ["a", "b", "a caption of some length"], margin=64, gap=8)
    assert frames.dtype == torch.uint8 and frames.shape[0] == 4 and frames.shape[3] == 3
    assert frames.shape[1] % 16 == frames.shape[2] % 16 == 0
    changes = (frames[0] != frames[3]).any(2)
    places = [changes.any(axis).diff().nonzero().flatten() + 1 for axis in (0, 1)]  # where clips begin and end
    assert places[0].tolist() == [64, 112, 120, 168, 176, 224]
    top = int(places[1][0])
    assert places[1].tolist() == [top, top + 32, top + 40, top + 72]
    values = tw.to_bytes(colours[:, :, 0, 0, 0, 0])
    for r, c in ((r, c) for r in range(2) for c in range(3)):
        y, x = top + 40 * r, 64 + 56 * c
        assert (frames[0, y:y + 32, x:x + 48] == values[r, c]).all()
    for part in (frames[0, top:, 112:120], frames[0, top + 32:top + 40, 64:], frames[0, top + 72:]):
        assert (part == 255).all()
    assert (frames[0, top:top + 32, :64] < 128).any() and (frames[0, :top, 176:224] < 128).any()  # the labels


def test_labels_fold_between_words():
    from PIL import ImageFont
    font = ImageFont.load_default(size=13)
    text = "a green checkered circle moving in circles on a navy background"
    folded = tw.fold(text, font, 128)
    assert folded.replace("\n", " ") == text and 3 <= len(folded.splitlines()) <= 4
    assert max(font.getlength(line) for line in folded.splitlines()) <= 128
    assert tw.fold(text, font, 1).splitlines() == text.split()
    assert tw.in_words("runs/raven_cm-1/model.safetensors") == "RAVEN + CM-GRPO"
    assert tw.in_words("tests/tiny/reward_forced.safetensors") == "reward forcing"
    assert tw.in_words("mine.safetensors") == "mine"


def test_close_up_has_the_object_in_the_middle_and_whole():
    captions = [f"a red striped {shape} moving right on a teal background" for shape in tw.SHAPES]
    frames = clips(captions, 57)[:, :, ::8].transpose(1, 2).flatten(0, 1)  # on its way round the torus
    for frame in frames:
        near = tw.close_up(frame)
        mask = tw.find_object((near[:, None] + 1) / 2)[2]
        assert near.shape == (3, 48, 48) and (torch.remainder(tw.centroids(mask), 48) - 24).abs().max() < 1.5
        whole = tw.find_object((frame[:, None] + 1) / 2)[2]
        assert mask.sum() > 0.97 * whole.sum()
    nothing = torch.zeros(3, 64, 64)
    assert torch.equal(tw.close_up(nothing), nothing[:, 8:56, 8:56])


def test_captions_of_the_close_up_are_chosen_by_rule(tmp_path, monkeypatch, capsys):
    assert tw.at_shares([5, 1, 4, 2, 3], [0, 0.5, 1]) == [1, 4, 0]
    captions = tw.split()[1][::5]
    drawn = tw.render(captions, 2, generator=torch.Generator().manual_seed(0))
    blurred = tw.degrade(drawn[:, :, -1], "blur", torch.linspace(0, 1, 40), None).unsqueeze(2)
    monkeypatch.setattr(tw, "sampler", lambda out, name: lambda some: drawn if name == "reward" else blurred)
    tw.closeup(None, "ode", "reward", tmp_path / "x.png", 40)
    told = capsys.readouterr().out
    assert "Of 40 held-out captions" in told and "from ODE only to reward forcing" in told
    fits = [tw.texture_fit(frames[:, :, -1], captions) for frames in (blurred, drawn)]
    for texture in tw.TEXTURES[1:]:
        rows = [f"{c}: {a:.2f} to {b:.2f}" for b, a, c in sorted(
            ((b, a, c) for a, b, c in zip(*fits, captions) if tw.parse(c)["texture"] == texture),
            key=lambda row: row[0] - row[1])]
        assert "\n".join(rows[round(share * (len(rows) - 1))] for share in (0.1, 0.5, 0.9)) in told
    from PIL import Image
    assert Image.open(tmp_path / "x.png").size[0] > 1000


@pytest.mark.parametrize("name", ["videos.webp", "videos.mp4"])
def test_videos_side_by_side(name, tmp_path, monkeypatch):
    import imageio
    monkeypatch.setattr(tw, "sampler", lambda out, name: lambda some: clips(some, 9, seed=len(name)))
    tw.picture(None, ["teacher", "ode"], tmp_path / name, 2)
    video = imageio.v3.imread(tmp_path / name, index=...)  # all frames
    assert video.shape[:3] == (9, 352, 432)


def test_the_committed_pictures():
    from PIL import Image
    with Image.open(ROOT / "tests" / "videos.webp") as videos:
        assert videos.n_frames == 57 and videos.info["loop"] == 0
    assert (ROOT / "tests" / "videos.webp").stat().st_size < 1e6
    for name in ("closeup", "claims", "curves", "over_time", "trades"):
        assert min(Image.open(ROOT / "tests" / f"{name}.png").size) >= 400


def test_measured_figures_are_those_of_the_readme():
    measured = json.loads((TINY / "measured.json").read_text())
    readme = (ROOT / "tests/README.md").read_text()
    for figure in (f"{measured['vae']['psnr']:.1f} dB", f"{100 * measured['teacher']['texture']:.1f} %",
                   f"{measured['teacher']['texture_correlation']:.2f}",
                   *(f"{100 * share:.1f} %" for share in measured["reward"].values())):
        assert figure in readme
    page = (ROOT / "tests/claims.md").read_text()
    assert miniature.results_table(miniature.read_figures(TINY)) in page


@pytest.mark.parametrize("name, kind", [("ode", "ode_init"), ("raven_frame", "distill_dmd"),
                                        ("reward_forced", "reward_forcing")])
def test_the_committed_generators(parts, name, kind):
    """Causal, with their settings in the file, and as good as figures.safetensors says, within what 8 captions can show."""
    net = wc.load_dit(TINY)
    metadata = wc.load_checkpoint(net, TINY / f"{name}.safetensors")
    assert metadata["kind"] == "causal" and metadata["stage"] == kind
    assert metadata["chunk"] == ("1" if name == "raven_frame" else "3")
    assert wc.saved_steps(metadata) == pytest.approx(wc.warped_steps())
    captions, reward = tw.split()[1][7::25], wc.load_image_reward(TINY / "reward_model")
    video = tw.sample_student(net.eval(), metadata, parts[1], parts[2], captions)
    card = tw.scorecard(video, captions)
    assert min(card[name] for name in ("colour", "background", "shape")) >= 0.85 and card["path"] > 0.4
    assert tw.frame_rewards(reward, video, captions).mean() > {"ode": 0.1, "raven_frame": 0.25, "reward_forced": 0.5}[name]


def test_pipeline_equals_diffusers(parts):
    """The committed folder, as it is, in diffusers' WanPipeline: the same video from the same noise."""
    from diffusers import WanPipeline
    pipe = WanPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    caption, (dit, vae, text) = "a green checkered triangle moving up on a gray background", parts
    noise = random_latents(1, 16, 4, 8, 8)
    theirs = pipe(caption, negative_prompt="", height=64, width=64, num_frames=13, num_inference_steps=6,
                  guidance_scale=3.0, latents=noise, max_sequence_length=text.text_len, output_type="pt").frames
    *_, x = generate.ode_trajectory(dit, noise, text([caption]), text([""]), pipe.scheduler.sigmas, 3.0)
    with torch.no_grad():
        ours = vae.decode(x) / 2 + 0.5
    torch.testing.assert_close(ours.transpose(1, 2), theirs, atol=2e-3, rtol=0)


def test_the_committed_weights_can_be_made_again(tmp_path):
    """`tests/tiny_world.py train` runs through, writes every part, and each part loads."""
    done = run("tests/tiny_world.py", "train", "--out", tmp_path / "tiny", "--work", tmp_path / "work",
               "--scale", 0.001)
    assert done.returncode == 0, done.stderr
    wc.load_dit(tmp_path / "tiny"), wc.load_vae(tmp_path / "tiny"), wc.load_text_encoder(tmp_path / "tiny")
    wc.load_image_reward(tmp_path / "tiny" / "reward_model")
    theirs, ours = ({f.relative_to(d) for f in d.rglob("*.json")} for d in (TINY, tmp_path / "tiny"))
    assert ours == theirs - {Path("curves.json")}  # of runs that start from it
