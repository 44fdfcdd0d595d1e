"""generate.py as a user runs it: real subprocesses, real files."""
import math
import subprocess

import imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, alone_and_together, frames_apart, python, random_dit, run
from safetensors.torch import save_file

import generate
import wan_causal as wc

PROMPT = "a red striped circle moving left on a navy background"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A causal generator for the tiny model, with random weights, as a later stage would save it."""
    path = tmp_path_factory.mktemp("weights") / "causal.safetensors"
    config = wc.load_config(ROOT / "tests/tiny")
    wc.save_checkpoint(path, random_dit(**vars(config)).state_dict(), stage="test", kind="causal", chunk=3,
                       timesteps="1000,937.5,833.333,625", config=config)
    return path


def read(path):
    return np.stack(list(imageio.v3.imiter(path)))


@pytest.mark.parametrize("flags, words", [
    ([], "timesteps 1000, 937.5, 833.333, 625; chunks of 3 latent frames"),  # the model folder's causal generator
    (["--bidirectional", "--steps", 2], "bidirectional teacher: 2 unipc steps, shift 5.0, guidance 2.0")])
def test_default_model_writes_a_video_and_says_so(tmp_path, flags, words):
    done = run("generate.py", PROMPT, "--frames", 9, *flags, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "a_red_striped_circle_moving_left_on_a_navy_background-0.mp4"
    assert f"{file}: 9 frames at 64x64 in " in done.stdout and "FPS" in done.stdout
    assert words in done.stdout
    assert read(file).shape == (9, 64, 64, 3) and list(tmp_path.iterdir()) == [file]


def test_causal_streaming_and_its_flags(tmp_path, causal):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue circle\n\na red square\n")
    done = run("generate.py", PROMPT, "--prompts", prompts, "--checkpoint", causal, "--frames", 45, "--seed", 5,
               "--first-chunk", 1, "--window", 6, "--sink", 2, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    assert "timesteps 1000, 937.5, 833.333, 625; chunks of 3 latent frames" in done.stdout
    files = sorted(tmp_path.glob("new/folder/*"))
    assert sorted(f.name[-6:] for f in files) == ["-5.mp4", "-6.mp4", "-7.mp4"]
    assert all(read(f).shape == (45, 64, 64, 3) for f in files)


def test_a_chunk_is_decoded_before_the_next_one_is_made(causal):
    args = generate.parse_args([PROMPT, "--checkpoint", str(causal), "--frames", "33"])
    model, vae, text = generate.load(args, wc.find_folder(args.model), wc.Process(0, 1, torch.device("cpu")))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with torch.no_grad():
        pieces = generate.causal_video(model, vae, text, args, PROMPT, seed=0)
        made = [(piece.shape[1], len(forwards)) for piece in pieces]
    assert made == [(9, 4), (12, 9), (12, 14)]  # four steps a chunk, and a pass at t = 0 before the next one


def test_the_seed_decides(tmp_path, causal):
    seeds = {"a": 1, "b": 1, "c": 2}
    for name, seed in seeds.items():
        done = run("generate.py", PROMPT, "--checkpoint", causal, "--frames", 9, "--seed", seed,
                   "--out", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr
    videos = [read(tmp_path / f"{name}.mp4") for name in seeds]
    assert frames_apart(videos[0], videos[1]) < 1 < frames_apart(videos[0], videos[2])


def test_goes_on_from_a_video_and_from_an_image(tmp_path, causal):
    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (96, 1, 3))  # 96 x 128
    imageio.v3.imwrite(tmp_path / "image.png", ramp)
    with imageio.get_writer(tmp_path / "video.mp4", fps=16, macro_block_size=2) as writer:
        for _ in range(11):  # 1 + 4k: the last 9
            writer.append_data(ramp)
    on, *others = (run("generate.py", PROMPT, "--checkpoint", causal, "--frames", frames, "--init", tmp_path / init,
                       "--out", tmp_path / out)
                   for frames, init, out in ((9, "video.mp4", "none.mp4"), (21, "image.png", "1.mp4"),
                                             (21, "video.mp4", "9.mp4")))
    assert on.returncode == 2 and "already has 9 frames or more: --frames 9 must be more" in on.stderr
    assert not (tmp_path / "none.mp4").exists()
    for done, kept in zip(others, (1, 9)):
        assert done.returncode == 0, done.stderr
        frames = read(tmp_path / f"{kept}.mp4").astype(float)
        assert frames.shape == (21, 64, 64, 3)
        columns = frames[:kept, 8:-8].mean((0, 1, 3))  # the ramp, through the VAE, still rises to the right
        assert np.corrcoef(columns, np.arange(64))[0, 1] > 0.9


def test_pictures_of_every_kind_to_start_from(tmp_path):
    from PIL import Image
    gray = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    image = Image.fromarray(gray)
    for mode in ("L", "LA", "RGB", "RGBA", "P"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    image.save(tmp_path / "gray.jpg", quality=100)
    exif, half = Image.Exif(), Image.fromarray(gray[::2, ::2])
    exif[0x112] = 6  # stored on its side, as a phone held upright does; and with a smaller picture after it
    image.rotate(90).save(tmp_path / "phone.jpg", "MPO", quality=100, exif=exif, save_all=True, append_images=[half])
    imageio.mimwrite(tmp_path / "video.mp4", np.repeat(gray[None, ..., None], 3, axis=3), fps=16, quality=10, **wc.VIDEO)
    for name in ("video.m4v", "video.ts", "video"):  # what it holds decides
        (tmp_path / name).write_bytes((tmp_path / "video.mp4").read_bytes())
    expected = torch.from_numpy(gray).float().expand(3, -1, -1) / 127.5 - 1
    for file in sorted(tmp_path.iterdir()):
        frames = generate.read_frames(file, 64, 64, limit=5)
        assert frames.shape == (1, 3, 1, 64, 64)
        assert (frames[0, :, 0] - expected).abs().max() < 0.02, file


def test_a_video_names_its_colour_matrix(tmp_path):
    """Red comes back as red, by the matrix that the file names, which is the one of such pictures."""
    import imageio_ffmpeg
    red = np.zeros((4, 64, 64, 3), np.uint8)
    red[..., 0] = 255
    imageio.mimwrite(tmp_path / "red.mp4", red, fps=16, quality=8, **wc.VIDEO)
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "red.mp4"], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709" in said
    seen = read(tmp_path / "red.mp4").reshape(-1, 3).astype(int)
    assert abs(seen - [255, 0, 0]).max() <= 4


def test_16_bits_and_transparency(tmp_path):
    """By what the file holds; what is transparent lies on white."""
    import numpy as np
    from PIL import Image
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deep.tiff")
    for file in ("deep.png", "deep.tiff"):
        seen = generate.read_frames(tmp_path / file, 64, 64, limit=5)[0, :, 0]
        assert (seen - torch.from_numpy(ramp / 32767.5 - 1)).abs().max() < 0.01
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (generate.read_frames(tmp_path / "clear.png", 64, 64, limit=5) == 1).all()
    Image.new("RGBA", (64, 64), (255, 0, 0, 51)).save(tmp_path / "pale.png")  # a fifth
    (tmp_path / "pale.png").rename(tmp_path / "pale.mp4")
    pale = generate.read_frames(tmp_path / "pale.mp4", 64, 64, limit=5)[0, :, 0, 0, 0]
    torch.testing.assert_close(pale, torch.tensor([1.0, 0.6, 0.6]))
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "real.tiff")
    with pytest.raises(wc.InputError, match="no 8 or 16 bits per pixel"):
        generate.read_frames(tmp_path / "real.tiff", 64, 64, limit=5)
    frames = np.random.default_rng(0).integers(0, 255, (37, 64, 64, 3), dtype=np.uint8)
    imageio.mimwrite(tmp_path / "half.mp4", frames, output_params=["-movflags", "+faststart"])  # the index comes first
    assert generate.read_frames(tmp_path / "half.mp4", 64, 64, limit=50).shape[2] == 37
    whole = (tmp_path / "half.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(wc.InputError, match="half.mp4 cannot be read as an image or a video .*cut off"):
        generate.read_frames(tmp_path / "half.mp4", 64, 64, limit=50)


@pytest.mark.parametrize("value, words", [(math.nan, "holds weights that are not finite"), (3e38, "the video is not finite")])
def test_weights_or_a_video_that_are_not_finite_leave_no_video(tmp_path, causal, value, words):
    state = dict(wc.read_weights(causal)[0])
    state["head.head.bias"] = torch.full_like(state["head.head.bias"], value, dtype=torch.float32)
    save_file(state, tmp_path / "bad.safetensors", metadata={"kind": "causal", "chunk": "3"})  # not by our own hand
    done = run("generate.py", PROMPT, "--checkpoint", tmp_path / "bad.safetensors", "--frames", 9, "--out", tmp_path / "x.mp4")
    assert done.returncode == 2 and words in done.stderr
    assert not list(tmp_path.glob("*.mp4"))


def test_a_lora_adapter_on_top_of_a_generator(tmp_path, causal):
    state, random = dict(wc.read_weights(causal)[0]), torch.Generator().manual_seed(3)
    A, B = torch.randn(4, 192, generator=random), torch.randn(192, 4, generator=random) / 20
    wc.save_checkpoint(tmp_path / "lora.safetensors", {"base_model.model.blocks.1.self_attn.v.lora_A.weight": A,
                                                       "base_model.model.blocks.1.self_attn.v.lora_B.weight": B})
    state["blocks.1.self_attn.v.weight"] = state["blocks.1.self_attn.v.weight"] + B @ A
    wc.save_checkpoint(tmp_path / "folded.safetensors", state, kind="causal", chunk=3,
                       timesteps="1000,937.5,833.333,625")
    weights = {"plain": [causal], "folded": [tmp_path / "folded.safetensors"],
               "lora": [causal, "--lora", tmp_path / "lora.safetensors"]}
    for name, flags in weights.items():
        done = run("generate.py", PROMPT, "--checkpoint", *flags, "--frames", 9, "--out", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr
    plain, folded, lora = (tmp_path / f"{name}.mp4" for name in weights)
    assert frames_apart(folded, lora) < 1 < frames_apart(plain, lora)


def test_an_adapter_says_how_its_generator_is_sampled(tmp_path, causal):
    """Its chunk and timesteps, where the generator names none; where they differ a flag decides."""
    state = wc.read_weights(causal)[0]
    A, B = torch.ones(4, 192), torch.zeros(192, 4)
    wc.save_checkpoint(tmp_path / "silent.safetensors", state)
    wc.save_checkpoint(tmp_path / "lora.safetensors", {"blocks.1.self_attn.v.lora_A.weight": A,
                                                       "blocks.1.self_attn.v.lora_B.weight": B},
                       kind="causal", chunk=1, timesteps="1000, 500")

    def loaded(*flags):
        args = generate.parse_args([PROMPT, "--lora", str(tmp_path / "lora.safetensors"), *map(str, flags)])
        with wc.processes("cpu") as process:
            generate.load(args, wc.find_folder(args.model), process)
        return args.chunk, args.timesteps
    assert loaded("--checkpoint", tmp_path / "silent.safetensors") == (1, [1000, 500])
    with pytest.raises(wc.InputError, match="names timesteps = .* say which by --timesteps"):
        loaded("--checkpoint", causal)
    with pytest.raises(wc.InputError, match="names chunk = 3, --lora chunk = 1: say which by --chunk"):
        loaded("--checkpoint", causal, "--timesteps", 1000, 500)
    assert loaded("--checkpoint", causal, "--timesteps", 1000, 500, "--chunk", 3) == (3, [1000, 500])


def test_overlapping_rollouts_of_any_length(tmp_path, causal):
    """57-frame segments that give up 9 frames each: 48 of the first, and the last one's 45 make 93."""
    flags = {"long": ["--frames", 93, "--overlap", 3], "plain": ["--frames", 57]}
    for name in flags:
        done = run("generate.py", PROMPT, "--checkpoint", causal, *flags[name], "--out", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr
    long, plain = (read(tmp_path / f"{name}.mp4").astype(float) for name in ("long", "plain"))
    assert long.shape == (93, 64, 64, 3)
    assert abs(long[:40] - plain[:40]).mean() < 4 < abs(long[60:93] - plain[:33]).mean()  # mp4 is lossy


def test_two_processes_share_the_prompts_and_write_the_same_files(tmp_path, causal):
    prompts = [PROMPT, "a blue circle", "a plain green square bouncing on a gray background"]
    args = ["generate.py", *prompts, "--checkpoint", causal, "--frames", 21]
    alone, done = alone_and_together(args, ["--out", tmp_path / "one"], ["--out", tmp_path / "two"])
    assert alone.returncode == done.returncode == 0, alone.stderr + done.stderr
    assert done.stdout.count("FPS)") == 3
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert [f.name for f in one] == [f.name for f in two] and len(one) == 3
    for a, b in zip(one, two):
        assert frames_apart(a, b) < 1


BAD = [
    ([PROMPT, "--checkpoint", "CAUSAL", "--frames", 93, "--overlap", 4], "--overlap 4 must be a multiple of the chunk of 3"),
    ([PROMPT, "--checkpoint", "CAUSAL", "--frames", 93, "--overlap", 3, "--window", 9], "--overlap goes with neither --init nor"),
    ([PROMPT, "--model", "no/such/model/here"], "no model folder"),
    ([PROMPT, "--model", "README.md"], "no model folder"),
    ([PROMPT, "--checkpoint", "nowhere.pt"], "error: no file nowhere.pt: give a file, or repository:path"),
    ([PROMPT, "--checkpoint", "README.md"], "not a weight file"),
    ([PROMPT, "--checkpoint", "tests/tiny/vae/diffusion_pytorch_model.safetensors"], "is a VAE, not generator weights"),
    ([PROMPT, "--checkpoint", "tests/tiny/reward_model/ImageReward.safetensors"], "is an ImageReward model"),
    ([PROMPT, "--frames", 0], "--frames: 0 must be at least 1"),
    ([PROMPT, "--fps", 0], "--fps: 0 must be at least 1"),
    ([PROMPT, "--frames", 82], "--frames: 82 is not 1 + 4k: take 81 or 85"),
    ([PROMPT, "--width", 65], "--width: 65 is not 16 + 16k: take 64 or 80"),
    (["--frames", 82, "--", "-a red circle"], "--frames: 82 is not 1 + 4k"),
    ([PROMPT, "--frames", 113, "--overlap", 3, "--first-chunk", 1, "--checkpoint", "CAUSAL"],
     "--first-chunk 1 has no effect here: every segment begins with a whole chunk"),
    ([PROMPT, "--chunk", 0], "--chunk: 0 must be at least 1"),
    ([PROMPT, "--timesteps", 500, 900], "must fall"),
    ([PROMPT, "--window", 2, "--checkpoint", "CAUSAL"], "--window 2 is smaller than a chunk of 3"),
    ([PROMPT, "--sink", 2, "--checkpoint", "CAUSAL"], "needs a --window"),
    ([PROMPT, "--bidirectional", "--checkpoint", "CAUSAL"], "kind = causal, but kind = bidirectional is needed"),
    ([PROMPT, "--init", "nothing.png", "--checkpoint", "CAUSAL"], "no file nothing.png"),
    ([PROMPT, "--init", "README.md", "--checkpoint", "CAUSAL"], "cannot be read as an image or a video"),
    ([PROMPT, "--init", "README.md", "--bidirectional"], "need a causal generator"),
    ([], "empty prompt"), ([""], "empty prompt"), (["  "], "empty prompt"),
    (["--prompts", "nothing.txt"], "cannot read nothing.txt: No such file"),
    (["--jobs", "README.md"], 'README.md must hold lines such as {"prompt": "a cat", "seed": 0, "out": "cat.mp4"}'),
    (["--jobs", "nothing.jsonl"], "error: cannot read nothing.jsonl"),
    ([PROMPT, "--jobs", "jobs.jsonl"], "give prompts or --jobs, not both"),
    ([PROMPT, PROMPT, "--out", "OUT/x.mp4"], "is one file, but there are 2 prompts"),
    ([PROMPT, "--out", "README.md/x.mp4"], "cannot write"),
    ([PROMPT, "--device", "cuda"], "no CUDA device"),
    ([PROMPT, "--device", "abacus"], "unknown device"),
    ([PROMPT, "--device", "meta"], "nothing here has been tried on it; use cpu or cuda"),
    ([PROMPT, "--checkpoint", "CAUSAL", "--guidance", 7], "--guidance 7.0 has no effect here: a few-step generator is"),
    ([PROMPT, "--bidirectional", "--chunk", 5], "--chunk 5 has no effect here: all frames are made at once"),
    (["--jobs", "jobs.jsonl", "--seed", 5], "--seed 5 has no effect here: each line of --jobs has its own"),
    ([PROMPT, "--seed", 1 << 63], "--seed: 9223372036854775808 must be at most 9223372036854775807"),
    ([PROMPT, PROMPT, "--seed", (1 << 63) - 1], "a seed must be a whole number of at most 63 bits"),
    ([PROMPT, "--timesteps", "nan"], "--timesteps: nan is no number"),
    ([PROMPT, "--bidirectional", "--guidance", "nan"], "--guidance: nan is no number"),
    ([PROMPT, "--frames", 21, "--window", 12, "--sink", 6, "--checkpoint", "CAUSAL"],
     "--sink 6 must be less than the 6"),
    ([PROMPT, "--frames", 4097, "--checkpoint", "CAUSAL"], "past the RoPE table"),
]


@pytest.fixture(scope="module")
def refused(causal, tmp_path_factory):
    """(how it ended, its folder) of each case of BAD."""
    folders = [tmp_path_factory.mktemp("bad") for _ in BAD]
    commands = []
    for folder, (args, _) in zip(folders, BAD):
        args = [str(a).replace("CAUSAL", str(causal)).replace("OUT", str(folder)) for a in args]
        commands.append(["generate.py", *args, *([] if {"--out", "--jobs"} & {*args} else ["--out", folder / "out"])])
    return [(run(*command), folder) for command, folder in zip(commands, folders)]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_one_sentence_and_leaves_nothing(refused, case):
    done, folder = refused[case]
    assert done.returncode == 2 and BAD[case][1] in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not [f for f in folder.rglob("*") if f.is_file()]


def test_compiling_without_a_compiler_is_refused(tmp_path):
    # by a Python of its own: torch reads CXX when it is imported
    done = python("generate.py", PROMPT, "--compile", "--out", tmp_path / "x.mp4", env={"CXX": "no-such-compiler"})
    assert done.returncode == 2 and "torch cannot compile on this machine (" in done.stderr
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_what_stands_in_for_the_model_gives_a_rollout_its_cache():
    """`Graphed` records on CUDA alone; what a rollout asks of it before that is the same everywhere."""
    model = random_dit()
    graphed = generate.Graphed(model)
    cache = graphed.make_cache(1, 6, 16, 2, rolling=True)  # as `rollout` asks for it
    assert (cache.frames, cache.tokens, cache.sink, cache.rolling) == (6, 16, 2, True)
    assert graphed.make_cache(1, 6, 16, 2, rolling=True) is cache is not graphed.make_cache(1, 9, 16, 2, rolling=True)
    noise, context = torch.randn(1, 16, 6, 8, 8), torch.randn(1, 8, 16)
    with torch.no_grad():  # a ring is not recorded
        ours, plain = (list(wc.rollout(net, noise, context, [1000.0, 500.0], [3, 3], window=3,
                                       generator=wc.seeded(0))) for net in (graphed, model))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a.x0, b.x0)


def test_help_needs_no_model():
    for script, words in (("generate.py", "--bidirectional"), ("ode_init.py", "{sample,train}")):
        done = run(script, "--help")
        assert done.returncode == 0 and words in done.stdout
