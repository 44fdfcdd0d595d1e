"""Every layout of weights in the wild, built small on disk and loaded; and everything that must be refused."""
import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN_T5, ROOT, SMALL, golden_state, python, random_dit
from safetensors.torch import load_file, save_file

import wan_causal as wc

pytestmark = pytest.mark.quick


def state_of(seed=0):
    return {key: value.clone() for key, value in random_dit(seed).state_dict().items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def lora_pairs(state, modules, rank=4, seed=1):
    """(A, B) for each module, and the state with them folded in at scale 1."""
    random, pairs, folded = torch.Generator().manual_seed(seed), {}, dict(state)
    for module in modules:
        weight = state[f"{module}.weight"]
        A = torch.randn(rank, weight.shape[1], generator=random)
        B = torch.randn(weight.shape[0], rank, generator=random)
        pairs[module], folded[f"{module}.weight"] = (A, B), weight + B @ A
    return pairs, folded


LORA_MODULES = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2", "text_embedding.0",
                "time_projection.1", "head.head"]
OTHER = state_of(5)  # weights that must not be the ones that are loaded

LAYOUTS = {  # name -> what is in the .pt file, given the state that must come out
    "flat": lambda s: s,
    "generator": lambda s: {"generator": prefixed(s, "model."), "critic": prefixed(OTHER, "model.")},
    "only the ema": lambda s: {"generator_ema": prefixed(s, "model.")},
    "an empty ema": lambda s: {"generator_ema": {}, "generator": prefixed(s, "model.")},
    "ema": lambda s: {"model": prefixed(OTHER, "model."), "ema": prefixed(s, "model.")},
    "torch's average": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "ema preferred": lambda s: {"generator": prefixed(OTHER, "model."), "generator_ema": prefixed(s, "model.")},
    "fsdp": lambda s: {"generator_ema": prefixed(s, "model._fsdp_wrapped_module.")},
    "nested wrappers": lambda s: {"generator": {k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."
                                                          "_checkpoint_wrapped_module."): v
                                                for k, v in prefixed(s, "model.").items()}},
    "compiled and distributed": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "state_dict": lambda s: {"state_dict": s, "step": 3},
    "comfyui": lambda s: prefixed(s, "model.diffusion_model."),
    "diffusers": lambda s: {wc.dit_diffusers_key(k): v for k, v in s.items()},
    "rcm": lambda s: {**{"net." + k: v.flatten(1) if k == "patch_embedding.weight" else v for k, v in s.items()},
                      "net.accum_video_sample_counter": torch.zeros(1)},
    "critic heads and rope table": lambda s: {"model": {
        **s, "freqs": torch.zeros(3), "_register_tokens": torch.zeros(2), "_cls_pred_branch.0.weight": torch.zeros(2)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    state = state_of()
    torch.save(LAYOUTS[layout](state), tmp_path / "model.pt")
    model = random_dit(7)
    assert wc.load_checkpoint(model, tmp_path / "model.pt") == {}
    assert same(model, state)


def test_without_ema(tmp_path):
    state = state_of()
    torch.save({"generator": state, "generator_ema": OTHER}, tmp_path / "model.pt")
    model = random_dit(7)
    wc.load_checkpoint(model, tmp_path / "model.pt", ema=False)
    assert same(model, state)
    torch.save({"generator_ema": state}, tmp_path / "only.pt")  # the one that is there
    wc.load_checkpoint(model, tmp_path / "only.pt", ema=False)
    assert same(model, state)


def test_old_pickle_format(tmp_path):
    state = state_of()
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    model = random_dit(7)
    wc.load_checkpoint(model, tmp_path / "model.pt")
    assert same(model, state)


@pytest.mark.parametrize("wrap", ["", "generator_lora"])
@pytest.mark.parametrize("default", ["", ".default"])
def test_lora_adapter_is_folded_into_the_base(tmp_path, wrap, default):
    state = state_of()
    pairs, folded = lora_pairs(state, LORA_MODULES)
    adapter = {f"base_model.model.{m}.lora_{side}{default}.weight": x for m, (A, B) in pairs.items()
               for side, x in (("A", A), ("B", B))}
    model = random_dit(0)
    if wrap:
        torch.save({wrap: adapter, "step": 1}, tmp_path / "lora.pt")
        wc.load_checkpoint(model, tmp_path / "lora.pt")
    else:
        save_file(adapter, tmp_path / "lora.safetensors", metadata={"lora_alpha": "8"})  # alpha / rank = 2
        wc.load_checkpoint(model, tmp_path / "lora.safetensors")
        folded = {k: state[k] + 2 * (v - state[k]) for k, v in folded.items()}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, folded[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix, names", [("transformer.", wc.dit_diffusers_key), ("diffusion_model.", str),
                                           ("base_model.model.", wc.dit_diffusers_key)])
def test_lora_adapters_under_the_names_of_other_projects(tmp_path, prefix, names):
    pairs, folded = lora_pairs(state_of(), ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2"])
    adapter = {f"{prefix}{names(f'{m}.weight').removesuffix('.weight')}.lora_{side}.weight": x
               for m, pair in pairs.items() for side, x in zip("AB", pair)}
    save_file(adapter, tmp_path / "lora.safetensors")
    model = random_dit(0)
    wc.load_checkpoint(model, tmp_path / "lora.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, folded[key], atol=1e-5, rtol=1e-5)


def test_an_adapter_for_given_weights_ignores_its_own_base(tmp_path):
    pairs, folded = lora_pairs(OTHER, LORA_MODULES)
    adapter = {f"{m}.lora_{side}.weight": x for m, pair in pairs.items() for side, x in zip("AB", pair)}
    wc.save_checkpoint(tmp_path / "lora.safetensors", adapter, kind="causal", base="a/file/of/another/machine")
    model = random_dit(5)  # OTHER
    assert wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)["kind"] == "causal"
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, folded[key], atol=1e-5, rtol=1e-5)
    wc.save_checkpoint(tmp_path / "whole.safetensors", OTHER)
    with pytest.raises(wc.InputError, match="is no LoRA adapter"):
        wc.load_checkpoint(model, tmp_path / "whole.safetensors", onto=True)


def test_an_adapter_is_folded_where_the_weights_are():
    pair = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2)}
    folded = wc.merge_lora(pair, {"a.weight": torch.ones(3, 4, device="meta")})
    assert folded["a.weight"].device.type == "meta"  # as it would be a GPU's


V, FFN = "blocks.1.self_attn.v", "blocks.0.ffn.0"
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def two_parts(a, b, name=lambda module: module, **more):
    """An adapter of the modules V and FFN under some project's names; more: other parts of V."""
    return lambda pairs: {f"{name(m)}.{part}": x for m, (A, B) in pairs.items() for part, x in
                          ((a, A), (b, B), *((more.items() if m == V else ())))}


@pytest.mark.parametrize("adapter, config, scales", [
    (two_parts("lora_A.weight", "lora_B.weight"), {**PEFT, "use_rslora": True}, (4, 4)),  # 8 / sqrt(4)
    (two_parts("lora_A.weight", "lora_B.weight"), {**PEFT, "alpha_pattern": {"self_attn.v": 2}}, (0.5, 2)),
    (two_parts("lora_A.my_name.weight", "lora_B.my_name.weight"), PEFT, (2, 2)),
    (two_parts("lora_down.weight", "lora_up.weight", alpha=torch.tensor(2.0)), None, (0.5, 1)),
    (two_parts("lora_down.weight", "lora_up.weight", lambda m: "lora_unet_" + m.replace(".", "_"),
               alpha=torch.tensor(2.0)), None, (0.5, 1)),  # kohya's
    (two_parts("lora_A.weight", "lora_B.weight", lambda m: wc.dit_diffusers_key(m + ".weight")[:-7]), None, (1, 1)),
])
def test_the_scale_of_an_adapter_belongs_to_each_module(tmp_path, adapter, config, scales):
    pairs, _ = lora_pairs(state_of(), [V, FFN])
    save_file({k: v.contiguous() for k, v in adapter(pairs).items()}, tmp_path / "lora.safetensors")
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = random_dit()
    wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)
    for (module, (A, B)), scale in zip(pairs.items(), scales):
        torch.testing.assert_close(model.state_dict()[f"{module}.weight"], state_of()[f"{module}.weight"] + scale * B @ A)


def test_adapters_of_the_feed_forward_layers_alone_under_diffusers_names(tmp_path):
    pairs, merged = lora_pairs(state_of(), [FFN])
    save_file({f"transformer.blocks.0.ffn.net.0.proj.lora_{s}.weight": x for s, x in zip("AB", pairs[FFN])},
              tmp_path / "lora.safetensors")
    model = random_dit()
    wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)
    torch.testing.assert_close(model.state_dict(), merged)


def test_biases_and_differences_of_an_adapter_are_added():
    base = {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3), "b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)}
    adapter = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2), "a.lora_B.bias": torch.ones(3),
               "b.diff": torch.full((2, 2), 0.5), "b.diff_b": torch.full((2,), 0.25)}
    out = wc.merge_lora(adapter, base, {"lora_alpha": 6})
    assert [out[key].unique().tolist() for key in base] == [[7], [4], [1.5], [1.25]]


def test_what_newer_packages_write_is_understood(tmp_path):
    """PEFT's group size of another method, patterns under the file's own names, and differences of the modulation."""
    base = state_of()
    pairs, _ = lora_pairs(base, [V])
    theirs = wc.dit_diffusers_key(f"{V}.weight").removesuffix(".weight")
    for prefix, pattern in (("transformer.", theirs), ("model.", f"model.{theirs}")):
        save_file({f"{prefix}{theirs}.lora_{s}.weight": x for s, x in zip("AB", pairs[V])}, tmp_path / "lora.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({
            **PEFT, "use_qalora": False, "qalora_group_size": 16, "alpha_pattern": {pattern: 2}}))
        model = random_dit()
        wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)
        A, B = pairs[V]
        torch.testing.assert_close(model.state_dict()[f"{V}.weight"], base[f"{V}.weight"] + 2 / len(A) * B @ A)
    (tmp_path / "adapter_config.json").unlink()
    for name in ("blocks.0", "head"):
        key = f"{name}.modulation"
        save_file({f"diffusion_model.{name}.diff_m": torch.full(base[key].shape, 0.5)}, tmp_path / "lora.safetensors")
        model = random_dit()
        wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)
        torch.testing.assert_close(model.state_dict(), {**base, key: base[key] + 0.5})


def test_a_pair_and_a_difference_of_one_module_both_count():
    base = {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}
    adapter = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2),
               "a.diff": torch.full((3, 4), 0.5), "a.diff_b": torch.full((3,), 0.25)}
    out = wc.merge_lora(adapter, base)
    assert [out[key].unique().tolist() for key in base] == [[3.5], [1.25]]


def test_an_adapter_and_its_base_in_one_bfloat16_file_are_merged_in_float32():
    state = {"a.weight": torch.full((1, 1), 256.0, dtype=torch.bfloat16),
             "a.lora_A.weight": torch.ones(1, 1, dtype=torch.bfloat16),
             "a.lora_B.weight": torch.ones(1, 1, dtype=torch.bfloat16)}
    assert wc.merge_lora(state, {})["a.weight"].item() == 257  # bfloat16 knows 256 and 258


@pytest.mark.parametrize("extra, config, words", [
    ({f"{V}.lora_magnitude_vector": torch.ones(48)}, PEFT, "lora_magnitude_vector: only LoRA without DoRA"),
    ({f"{V}.dora_scale": torch.ones(48)}, None, "dora_scale: only LoRA without DoRA"),
    ({f"{V}.hada_w1_a": torch.ones(4, 4)}, None, "hada_w1_a: only LoRA"),
    ({}, {**PEFT, "use_dora": True}, "use_dora = True, which is not supported"),
    ({}, {**PEFT, "fan_in_fan_out": True}, "fan_in_fan_out = True"), ({}, {**PEFT, "bias": "all"}, "bias = all"),
    ({}, {**PEFT, "peft_type": "LOHA"}, "peft_type = LOHA"), ({}, {**PEFT, "new_trick": 3}, "new_trick = 3"),
    ({}, {**PEFT, "init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    ({}, {**PEFT, "alpha_pattern": {"no.such": 1}}, "alpha_pattern names no.such"),
    ({}, {**PEFT, "use_qalora": True, "qalora_group_size": 16}, "use_qalora = True"),
    ({f"{V}.reshape_weight": torch.ones(2)}, None, f"beside its parts it has {V}.reshape_weight"),
    ({f"{V}.lora_A.old.weight": torch.ones(4, 48)}, None, "is a second tensor for"),
    ({}, [1], "must hold an object")])
def test_what_an_adapter_has_besides_is_refused_by_name(tmp_path, extra, config, words):
    pairs, _ = lora_pairs(state_of(), [V])
    save_file({f"{V}.lora_{s}.weight": x for s, x in zip("AB", pairs[V])} | extra, tmp_path / "lora.safetensors")
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = random_dit()
    with pytest.raises(wc.InputError, match=words):
        wc.load_checkpoint(model, tmp_path / "lora.safetensors", onto=True)
    assert same(model, state_of())


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1", "is a Git-LFS pointer"), (b"GGUF\x03", "is a GGUF file"),
    (b"\n<!DOCTYPE html>", "is a web page")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_no_weights_are_told_from_damage(tmp_path, content, words, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(content + b" and more" * 9)
    with pytest.raises(wc.InputError, match=words):
        wc.read_weights(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("name", ["x.sft", "X.SAFETENSORS", "blob", "x.pt"])
def test_weights_are_recognised_by_their_first_bytes(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / name)
    assert wc.read_weights(tmp_path / name)[0]["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert wc.read_weights(tmp_path / "x.safetensors")[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("metadata, words", [
    ({"timesteps": "500,900"}, "names the timesteps 500,900"), ({"timesteps": "nan"}, "names the timesteps nan"),
    ({"timesteps": "1000,x"}, "names the timesteps"), ({"chunk": "three"}, "chunk = three"), ({"chunk": "0"}, "chunk = 0"),
    ({"shift": "-1"}, "shift = -1"), ({"shift": "inf"}, "shift = inf")])
def test_metadata_that_make_no_sense(tmp_path, metadata, words):
    wc.save_checkpoint(tmp_path / "x.safetensors", wc.load_dit(ROOT / "tests/tiny").state_dict(), kind="causal", **metadata)
    with pytest.raises(wc.InputError, match=words):
        wc.load_generator(ROOT / "tests/tiny", tmp_path / "x.safetensors", "causal")


@pytest.mark.parametrize("prompt, cleaned", [
    ("a person\u2019s \u201cred\u201d hat", "a person's \"red\" hat"), ("cafe\u0301", "caf\u00e9"),
    ("\uff21\uff22\uff0c\uff11", "AB,1"), ("\ufeffa\u3000b", "a b"), ("&amp;lt;b&amp;gt;", "<b>"), ("\u02bc\u2018", "''"),
    ("  a \n b ", "a b"), ("\u8272\u8c03\u8273\u4e3d\uff0c", "\u8272\u8c03\u8273\u4e3d,"), ("x\u00b2 \ufb01", "x\u00b2 \ufb01")])
def test_prompts_are_cleaned_as_wan_does(prompt, cleaned):
    assert wc.clean_text(prompt) == cleaned


def test_text_files(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert wc.read_lines(file) == ["one", "two"]
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert wc.read_json(file, dict) == {"a": 1}
    for content, words in ((b"version https://git-lfs.github.com/spec/v1\noid x", "Git-LFS pointer"),
                           (b"a\0b", "zero bytes"), (b"\xff\xfe", "cannot read .*x.txt")):
        file.write_bytes(content)
        for read in (wc.read_lines, wc.read_json):
            with pytest.raises(wc.InputError, match=words):
                read(file)


@pytest.mark.parametrize("reward, words", [
    (lambda video, prompts: None, r"returned shape \(\)"), (lambda video, prompts: {}, "returned dict, not a number"), (lambda video, prompts: ["x", "y"], "list, not a number"),
    (lambda video, prompts: [1.0], r"returned shape \(1,\)"),
    (lambda video, prompts: video.detach().mean((1, 2, 3, 4)), "has no gradient in the video")])
def test_rewards_of_users(reward, words):
    with pytest.raises(wc.InputError, match=words):
        wc.checked_reward(reward, torch.zeros(2, 3, 1, 4, 4, requires_grad=True), ["a", "b"])
    assert wc.checked_reward(lambda video, prompts: [1, 2], torch.zeros(2, 3, 1, 4, 4), ["a", "b"]).tolist() == [1, 2]


def test_a_lora_adapter_alone_is_no_generator_and_peft_tells_its_alpha(tmp_path):
    state = state_of()
    pairs, folded = lora_pairs(state, LORA_MODULES)
    adapter = {f"base_model.model.{m}.lora_{side}.weight": x
               for m, pair in pairs.items() for side, x in zip("AB", pair)}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 12}')
    model = random_dit(0)
    metadata = wc.load_checkpoint(model, tmp_path / "adapter_model.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key] + 3 * (folded[key] - state[key]), atol=1e-5, rtol=1e-5)
    with pytest.raises(wc.InputError, match="kind = a LoRA adapter without its generator, but kind = causal is needed"):
        wc.require(metadata, "adapter", kind="causal")


def test_full_peft_state_dict(tmp_path):
    """Base weights under .base_layer beside their LoRA pairs (RAVEN's cmgrpo_raven_full.pt)."""
    state = state_of()
    pairs, folded = lora_pairs(state, LORA_MODULES)
    full = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        full[f"base_model.model.{module}.base_layer.{leaf}" if module in pairs else f"base_model.model.{key}"] = value
    for module, (A, B) in pairs.items():
        full[f"base_model.model.{module}.lora_A.default.weight"] = A
        full[f"base_model.model.{module}.lora_B.default.weight"] = B
    torch.save(full, tmp_path / "full.pt")
    model = random_dit(7)  # its own weights must not matter
    wc.load_checkpoint(model, tmp_path / "full.pt")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, folded[key], atol=1e-5, rtol=1e-5)


def test_save_and_load_with_metadata(tmp_path):
    model = random_dit(0).bfloat16()
    path = tmp_path / "new" / "student.safetensors"
    wc.save_checkpoint(path, model.state_dict(), stage="ode_init", kind="causal", timesteps="1000,937.5", chunk=3,
                       config=model.config)
    other = random_dit(7)
    metadata = wc.load_checkpoint(other, path)
    assert metadata["stage"] == "ode_init" and metadata["chunk"] == "3"
    assert json.loads(metadata["config"])["dim"] == SMALL["dim"]
    assert other.patch_embedding.weight.dtype == torch.float32  # the model keeps its own dtype
    assert same(other, {k: v.float() for k, v in model.state_dict().items()})
    assert [p.name for p in path.parent.iterdir()] == ["student.safetensors"]  # nothing temporary is left
    wc.require(metadata, path, kind="causal")
    with pytest.raises(wc.InputError, match="stage ode_init with kind = causal, but kind = bidirectional is needed"):
        wc.require(metadata, path, kind="bidirectional")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    wc.save_checkpoint(path, {"a": torch.ones(2)}, stage="x")
    before = path.read_bytes()
    with pytest.raises(Exception):
        wc.save_checkpoint(path, {"a": object()}, stage="x")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_published_image_reward(tmp_path):
    """ImageReward.pt has the unused projections and a position_ids buffer, and ImageReward.safetensors its sizes."""
    config, state = golden_state("imagereward")
    assert any(key.startswith("blip.vision_proj.") for key in state)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    from transformers import BertTokenizer
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    save_file(state, tmp_path / "ImageReward.safetensors", metadata={"config": json.dumps(config)})
    model = wc.load_image_reward(tmp_path)
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = model.score(images, ["a cat", "a dog"])
    assert scores.shape == (2,) and scores.isfinite().all()
    with pytest.raises(ValueError, match=r"\(2, 3, 40, 48\) .* got 1 prompts"):
        model.score(images, ["a cat"])
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "ImageReward.safetensors").unlink()  # a .pt has the published sizes, which these weights have not
    with pytest.raises(wc.InputError, match="of another shape"):
        wc.load_image_reward(tmp_path)
    (tmp_path / "ImageReward.pt").unlink()
    with pytest.raises(wc.InputError, match="neither ImageReward.pt nor ImageReward.safetensors"):
        wc.load_image_reward(tmp_path)


# ------------------------------------------------------------------------------------------------ refusals

class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def broken(tmp_path, kind):
    path, state = tmp_path / "bad.pt", state_of()
    if kind == "missing file":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-4000])
    elif kind == "truncated safetensors":
        path = tmp_path / "bad.safetensors"
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-4000])
    elif kind == "code":
        torch.save({"generator": Evil()}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "a number":
        torch.save(3, path)
    elif kind == "no tensors":
        torch.save({"optimizer": {"lr": 1}, "note": "x"}, path)
    elif kind == "other size":
        torch.save(state_of() | {"head.head.bias": torch.zeros(3)}, path)
    elif kind == "missing keys":
        torch.save({k: v for k, v in state.items() if "blocks.1." not in k}, path)
    elif kind == "extra keys":
        torch.save({**state, "img_emb.proj.0.weight": torch.zeros(2)}, path)
    elif kind == "reward model":
        torch.save({"blip.visual_encoder.cls_token": torch.zeros(1, 1, 4)}, path)
    elif kind == "vae":
        torch.save(wc.WanVAE(4).state_dict(), path)
    elif kind == "lora for another module":
        torch.save({"base_model.model.blocks.7.ffn.0.lora_A.weight": torch.zeros(2, 48),
                    "base_model.model.blocks.7.ffn.0.lora_B.weight": torch.zeros(64, 2)}, path)
    elif kind == "half a lora":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48)}, path)
    elif kind == "a lora of two ranks":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48),
                    "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 3)}, path)
    elif kind == "a flat lora":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(48), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64)},
                   path)
    elif kind == "numbered tensors":
        torch.save({0: torch.zeros(2)}, path)
    elif kind == "another patch":
        torch.save(state | {"patch_embedding.weight": torch.zeros(3, 5)}, path)
    elif kind == "a lora of no rank":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(0, 48), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 0)},
                   path)
    elif kind == "whole numbers":
        torch.save(state | {"head.head.bias": torch.zeros(64, dtype=torch.int8)}, path)
    elif kind == "not finite":
        torch.save(state | {"head.head.bias": torch.full((64,), math.nan)}, path)
    elif kind == "a generator and an adapter":
        torch.save({"generator": state, "generator_lora": {"x": torch.zeros(1)}}, path)
    elif kind == "another adapter's config":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 2)},
                   path)
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64, "lora_alpha": 128}')
    elif kind == "no pattern":
        torch.save({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 2)},
                   path)
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "alpha_pattern": {"*.v": 3}}')
    elif kind == "its own base":
        path = tmp_path / "bad.safetensors"
        save_file({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48), "blocks.0.ffn.0.lora_B.weight":
                   torch.zeros(64, 2)}, path, metadata={"base": str(path)})
    elif kind == "each other's base":
        for name, base in (("bad", "other"), ("other", "bad")):
            path = tmp_path / f"{name}.safetensors"
            save_file({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48), "blocks.0.ffn.0.lora_B.weight":
                       torch.zeros(64, 2)}, path, metadata={"base": str(tmp_path / f"{base}.safetensors")})
    elif kind == "words for numbers":
        path = tmp_path / "bad.safetensors"
        save_file({"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 48), "blocks.0.ffn.0.lora_B.weight":
                   torch.zeros(64, 2)}, path, metadata={"lora_alpha": "much"})
    return path


@pytest.mark.parametrize("kind, words", [
    ("missing file", "no file .*: give a file, or repository:path on the hub"),
    ("folder", "no file .*: give a file, or repository:path on the hub"), ("text", "not a weight file"), ("empty", "not a weight file"), ("truncated", "damaged"), ("truncated safetensors", "damaged"),
    ("code", "objects other than tensors"), ("bare pickle", "cannot read"), ("a number", "holds no state dict"),
    ("no tensors", "holds no state dict"),
    ("other size", r"1 of another shape \(head.head.bias \(3,\) instead of \(64,\)"),
    ("missing keys", "missing"), ("extra keys", r"1 unexpected \(img_emb.proj.0.weight\)"),
    ("reward model", "is an ImageReward model"), ("vae", "is a VAE"), ("lora for another module", "does not fit"),
    ("half a lora", "does not fit"), ("a lora of two ranks", "does not fit"), ("a flat lora", "does not fit"),
    ("numbered tensors", "holds no state dict"), ("another patch", r"1 of another shape \(patch_embedding.weight \(3, 5\)"),
    ("words for numbers", "alpha of blocks.0.ffn.0 is much, which is no number"),
    ("a lora of no rank", "does not fit"), ("whole numbers", r"holds head.head.bias as torch.int8"),
    ("a generator and an adapter", "save each in a file of its own"), ("no pattern", "which is no regular expression"),
    ("another adapter's config", "says rank 64, but its LoRA of blocks.0.ffn.0 has 2"),
    ("its own base", "names itself as the generator"), ("each other's base", "names itself .*, or another adapter that does")])
def test_refused_in_one_sentence_and_model_untouched(tmp_path, capsys, kind, words):
    model = random_dit(7)
    with pytest.raises(wc.InputError, match=words) as caught:
        wc.load_checkpoint(model, broken(tmp_path, kind))
    assert "\n" not in str(caught.value) and "this must never run" not in capsys.readouterr().out
    assert same(model, random_dit(7).state_dict())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(wc.InputError, match="holds weights that are not finite: it is damaged, or of a run that diverged"):
        wc.load_checkpoint(random_dit(7), broken(tmp_path, "not finite"))


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory a process may take is set in Linux's way")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_too_large_for_the_memory_is_not_called_damaged(tmp_path, name):
    (torch.save if name == "x.pt" else save_file)({"a": torch.zeros(1 << 26)}, tmp_path / name)  # 256 MB
    done = python("-c", "import resource, sys, wan_causal as wc\n"
                  "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
                  "resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), ) * 2)\n"
                  "wc.run_script(lambda: wc.read_weights(sys.argv[1]))", tmp_path / name)
    assert done.returncode == 2 and "error: no memory left" in done.stderr and name in done.stderr, done.stderr


def test_json_too_deep_and_prompts_that_are_no_text(tmp_path):
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(wc.InputError, match="cannot read .*x.json as JSON"):
        wc.read_json(tmp_path / "x.json")
    with pytest.raises(wc.InputError, match="is no UTF-8 text"):
        wc.load_text_encoder(ROOT / "tests/tiny")(["a cat", "\udcff"])


def test_a_header_that_begins_like_a_web_page(tmp_path):
    """Its length, 15392 = 0x3C20 bytes, is written as ' <'."""
    for n in range(15200, 15400):
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"note": "x" * n})
        if (tmp_path / "x.safetensors").read_bytes()[:2] == b" <":
            break
    assert wc.read_weights(tmp_path / "x.safetensors")[0]["a"].item() == 1
    assert (tmp_path / "x.safetensors").read_bytes()[:3] == b" <\0"


# -------------------------------------------------------------------------------------------- model folders

VAE_SIZES = dict(dim=4, num_res_blocks=1)
load_vae = functools.partial(wc.load_vae, **VAE_SIZES)  # Wan's own layout does not say sizes
load_text = functools.partial(wc.load_text_encoder, sizes=GOLDEN_T5)


def write_original(folder, shards=1, tokenizer=True):
    """A folder in Wan's own layout; returns the (DiT, VAE) that are in it."""
    from tiny_world import make_tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    dit, vae = random_dit(0, text_dim=32), wc.WanVAE(**VAE_SIZES)
    config = {**SMALL, "text_dim": 32, "in_dim": 16, "out_dim": 16, "eps": 1e-6, "model_type": "t2v",
              "_class_name": "WanModel", "_diffusers_version": "0.30.0"}
    (folder / "config.json").write_text(json.dumps(config))
    state, name = dit.state_dict(), "diffusion_pytorch_model"
    if shards == 1:
        save_file(state, folder / f"{name}.safetensors")
    else:
        weight_map, keys = {}, list(state)
        for i in range(shards):
            file, part = f"{name}-{i + 1:05d}-of-{shards:05d}.safetensors", keys[i::shards]
            save_file({k: state[k] for k in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save(vae.state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(golden_state("umt5")[1], folder / "models_t5_umt5-xxl-enc-bf16.pth")
    make_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return dit, vae


def write_diffusers(folder, dit, vae):
    """The same models as diffusers itself saves them."""
    from diffusers import AutoencoderKLWan
    from test_model import diffusers_dit
    diffusers_dit(dit).save_pretrained(folder / "transformer")
    other = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    other.load_state_dict({wc.vae_diffusers_key(k, 1): v for k, v in vae.state_dict().items()})
    other.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))


@pytest.mark.parametrize("shards", [1, 3])
def test_wans_own_layout(tmp_path, shards):
    dit, vae = write_original(tmp_path / "wan", shards)
    assert same(wc.load_dit(tmp_path / "wan"), dit.state_dict())
    loaded = load_vae(tmp_path / "wan")
    assert same(loaded, vae.state_dict()) and loaded.mean.flatten().tolist() == pytest.approx(wc.LATENT_MEAN)
    text = load_text(tmp_path / "wan")
    out = text(["a red circle", "a"])
    assert out.shape == (2, 32, 32)
    assert (out[0, 4:] == 0).all() and (out[0, 3] != 0).any()  # a red circle </s>, then zero rows
    assert (out[1, 2:] == 0).all()
    assert text.encoder.encoder.embed_tokens.weight is text.encoder.shared.weight  # 2 GB in the real one


def test_the_published_sizes(tmp_path):
    """Wan2.1_VAE.pth and models_t5_umt5-xxl-enc-bf16.pth with their real shapes: of each tensor one number is kept."""
    from tiny_world import make_tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

    def number(shape):
        return torch.zeros((), dtype=torch.bfloat16).expand(shape)
    with torch.device("meta"):
        vae = wc.WanVAE()
        text = UMT5EncoderModel(UMT5Config(**wc.UMT5_XXL, feed_forward_proj="gated-gelu"))
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    torch.save({key: number(value.shape) for key, value in vae.state_dict().items()}, tmp_path / "Wan2.1_VAE.pth")
    shapes, names = {key: value.shape for key, value in text.state_dict().items()}, golden_state("umt5")[1]
    names = {key.replace("blocks.0.", f"blocks.{i}.") for key in names if "blocks.1." not in key for i in range(24)}
    torch.save({key: number(shapes[wc.t5_key(key)]) for key in names}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    make_tokenizer().save_pretrained(tmp_path / "google/umt5-xxl")
    assert wc.load_vae(tmp_path, torch.bfloat16).z_dim == 16
    assert wc.load_text_encoder(tmp_path, torch.bfloat16).dim == 4096


def test_words_outside_the_vocabulary(tmp_path):
    """Wan's tokenizer has <s> 2 and <unk> 3, and its config names a class that would take 2 for the latter."""
    from tokenizers import Tokenizer, models
    write_original(tmp_path / "wan")
    folder = tmp_path / "wan/google/umt5-xxl"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    Tokenizer(models.Unigram(pieces, unk_id=3)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}))
    text = load_text(tmp_path / "wan")
    assert text.tokenizer("a\N{LLAMA}").input_ids[:2] == [4, 3]
    short, long = text(["a"]), text(["a" * 600])
    assert short.shape == long.shape == (1, 512, 32) and (short[0, 1:] == 0).all() and (long != 0).any(2).all()


@pytest.mark.parametrize("damage, words", [
    (lambda file: save_file({k: v for k, v in load_file(file).items() if ".wo." not in k}, file), "lacks 2 of its tensors"),
    (lambda file: file.write_bytes(file.read_bytes()[:5000]), "cannot load the UMT5EncoderModel of .*text_encoder")])
def test_a_damaged_text_encoder_of_diffusers(tmp_path, damage, words):
    shutil.copytree("tests/tiny/text_encoder", tmp_path / "text_encoder")
    shutil.copytree("tests/tiny/tokenizer", tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text("{}")
    wc.load_text_encoder(tmp_path)
    damage(tmp_path / "text_encoder/model.safetensors")
    with pytest.raises(wc.InputError, match=words):
        wc.load_text_encoder(tmp_path)


def test_a_prompt_is_encoded_once_and_alone(tmp_path):
    write_original(tmp_path / "wan")
    text, encoded = load_text(tmp_path / "wan", offload=True), []
    text.encoder.register_forward_hook(lambda module, args, out: encoded.append(out.last_hidden_state.shape[0]))
    out = text(["a red circle", "a", "a red circle"])
    assert encoded == [1, 1]
    assert torch.equal(out[0], out[2]) and torch.equal(text(["a", "a red circle"]), out[[1, 0]])
    assert encoded == [1, 1]


def test_diffusers_layout(tmp_path):
    dit, vae = write_original(tmp_path / "wan")
    write_diffusers(tmp_path / "hf", dit, vae)
    assert same(wc.load_dit(tmp_path / "hf"), dit.state_dict())
    assert same(wc.load_vae(tmp_path / "hf"), vae.state_dict())


def test_sharded_diffusers_layout(tmp_path):
    from test_model import diffusers_dit
    dit = random_dit(0)
    (tmp_path / "model_index.json").write_text("{}")
    diffusers_dit(dit).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert same(wc.load_dit(tmp_path), dit.state_dict())


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "config.json").unlink(), "config.json"),
    (lambda d: (d / "config.json").write_text("{"), "as JSON"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "model_type": "i2v"})), "i2v model"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "text_dim": 32, "dim": 64})), "of another shape"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "dim": 50, "num_heads": 4})), "unsupported DiT"),
    (lambda d: (d / "diffusion_pytorch_model.safetensors").unlink(), "no file"),
    (lambda d: (d / "Wan2.1_VAE.pth").write_bytes(b"junk"), "not a weight file"),
    (lambda d: torch.save({"a": torch.ones(1)}, d / "Wan2.1_VAE.pth"), r"wan \(VAE\) does not fit this model"),
    (lambda d: torch.save(3, d / "Wan2.1_VAE.pth"), "Wan2.1_VAE.pth holds no state dict"),
    (lambda d: torch.save({"a": torch.ones(1)}, d / "models_t5_umt5-xxl-enc-bf16.pth"), "bf16.pth does not fit this model"),
    (lambda d: torch.save(3, d / "models_t5_umt5-xxl-enc-bf16.pth"), "bf16.pth holds no state dict"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json must hold an object"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "in_dim": 36})), "reads 36 channels and predicts 16"),
    (lambda d: (d / "high_noise_model").mkdir(), "two experts"),
    (lambda d: (d / "model_index.json").write_text('{"boundary_ratio": 0.9}'), "two experts"),
    (lambda d: (d / "model_index.json").write_text('{"transformer_2": ["diffusers", "X"]}'), "two experts"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "num_heads": 0})), "cannot load .*config.json"),
    (lambda d: (d / "config.json").write_text(json.dumps({**SMALL, "dim": "wide"})), "cannot load .*config.json"),
    (lambda d: (d / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"), "cannot load .*index.json"),
    (lambda d: (d / "google/umt5-xxl/tokenizer.json").unlink(), "cannot load the tokenizer of .*umt5-xxl")])
def test_damaged_folders(tmp_path, damage, words):
    write_original(tmp_path / "wan")
    damage(tmp_path / "wan")
    with pytest.raises(wc.InputError, match=words) as caught:
        wc.load_dit(tmp_path / "wan"), load_vae(tmp_path / "wan"), load_text(tmp_path / "wan")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "tests/nowhere", "/no/such/folder", "README.md"])
def test_unknown_model(name):
    with pytest.raises(wc.InputError, match="no model folder"):
        wc.find_folder(name)


def test_a_hub_repository_in_the_cache_works_offline(tmp_path, monkeypatch):
    """In the hub's own layout; only the files that are read are there, and an adapter's config is found beside it."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"

    def cached(name):
        folder = tmp_path / f"models--some-one--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return folder / "snapshots" / commit
    dit, _ = write_original(cached("wan"))
    assert same(wc.load_dit("some-one/wan"), dit.state_dict())
    assert wc.find_folder("some-one/wan") == tmp_path / "models--some-one--wan/snapshots" / commit
    pairs, _ = lora_pairs(state_of(), [V])
    folder = cached("lora")
    save_file({f"{V}.lora_{s}.weight": x for s, x in zip("AB", pairs[V])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT))
    model = random_dit()
    wc.load_checkpoint(model, "some-one/lora:adapter_model.safetensors", onto=True)
    A, B = pairs[V]
    torch.testing.assert_close(model.state_dict()[f"{V}.weight"], state_of()[f"{V}.weight"] + 2 * B @ A)


def test_how_many_prompts_are_cut_is_said(capsys):
    text = wc.load_text_encoder(ROOT / "tests/tiny")
    process = wc.Process(0, 1, torch.device("cpu"))
    wc.say_cut(process, ["a red circle", "red " * 40, "blue " * 31], text, "the text encoder")
    assert capsys.readouterr().out == "1 of 3 prompts are cut at the 32 tokens that the text encoder reads\n"
    wc.say_cut(process, ["a red circle"], text, "the text encoder")
    assert capsys.readouterr().out == ""


def test_the_hub_out_of_reach():
    with pytest.raises(wc.InputError, match="nobody-here/nothing is no folder here, and the hub did not give it"):
        wc.find_folder("nobody-here/nothing")
    with pytest.raises(wc.InputError, match="nobody-here/nothing:model.pt is no file here"):
        wc.find_file("nobody-here/nothing:model.pt")


def test_what_a_killed_write_leaves_is_replaced(tmp_path):
    code = ("import os, pathlib, wan_causal as wc\n"
            "wc.replace_file(pathlib.Path('a.bin'), lambda path: (path.write_bytes(b'half'), os._exit(9)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 9 and len(os.listdir(tmp_path)) == 1
    wc.replace_file(tmp_path / "a.bin", lambda path: path.write_bytes(b"whole"))
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"whole"
