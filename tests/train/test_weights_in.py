"""Weights of Hugging Face folders make the model that they made there, and what does not fit is refused in one table."""

import json
import pickle
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of
from hub_folders import SIZE, as_bins, change, clip, dinov2, llama, saved, stage_config
from safetensors.torch import save_file
from stages import run_ranks

from data_pipeline.errors import UserError
from train.config import Config, GroupRule
from train.model.xcomposer2 import XComposer2
from train.model_config import RopeKind, RopeScaling
from train.weights import initial
from train.weights.hub import HubFolder

TEXT = [5, 17, 42, 9, 88, 3, 61, 2, 30, 71, 11]


def filled(config: Config) -> XComposer2:
    initial.check(config)
    model = XComposer2(config.model, config.data.images.size)
    initial.fill(model, config)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    saved(llama(), root / "llama")
    saved(llama(kv_heads=6), root / "mha")
    saved(llama(tied=True), root / "tied")
    saved(llama(), root / "sharded", shard_size="40KB")
    saved(llama(), root / "bins")
    as_bins(root / "bins")
    saved(clip(), root / "clip")
    saved(dinov2(), root / "dinov2")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return root


@pytest.mark.parametrize(("name", "kv_heads", "tied"), [("llama", 2, False), ("mha", 6, False), ("tied", 2, True)])
def test_decoder_is_transformers_llama_with_the_same_weights(folders, name, kv_heads, tied):
    config = stage_config(kv_heads, size=28)
    config.model.decoder.weights = str(folders / name)
    model, reference = filled(config), llama(kv_heads, tied)
    batch = replace(batch_of([[TEXT[:4]], [TEXT]]), images=torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    logits = model.logits(batch)[: len(TEXT) + 2]  # 3 targets of the first segment, 10 of the second
    expected = torch.cat([reference(torch.tensor([ids])).logits[0, :-1] for ids in (TEXT[:4], TEXT)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = {n: p.grad for n, p in reference.named_parameters()}
    for i, layer in enumerate(model.decoder.layers):
        H, g = 8, 6 // kv_heads
        fused = layer.attention.wqkv.weight.grad.view(kv_heads, g + 2, H, 48)
        q, k, v = fused[:, :g].reshape(-1, 48), fused[:, g].reshape(-1, 48), fused[:, g + 1].reshape(-1, 48)
        linears = {"q": q, "k": k, "v": v, "o": layer.attention.wo.weight.grad}
        for part, ours in linears.items():
            close(ours, theirs[f"model.layers.{i}.self_attn.{part}_proj.weight"])
        for ours, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            close(getattr(layer.feed_forward, ours).weight.grad, theirs[f"model.layers.{i}.mlp.{name}_proj.weight"])
        close(layer.ffn_norm.weight.grad, theirs[f"model.layers.{i}.post_attention_layernorm.weight"])
    embeddings = model.decoder.tok_embeddings.weight.grad
    close(embeddings + model.head.weight.grad if tied else embeddings, theirs["model.embed_tokens.weight"])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_shards_and_bins_hold_the_same_weights(folders):
    config = stage_config()
    states = []
    for name in ("llama", "sharded", "bins"):
        config.model.decoder.weights = str(folders / name)
        states.append(filled(config).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize(("size", "block"), [(SIZE, -1), (SIZE, -2), (84, -1), (28, -1)])
def test_vision_tower_is_transformers_clip_at_native_and_resampled_size(folders, size, block):
    config = stage_config(size=size, block=block)
    config.model.vision.weights = str(folders / "clip")
    tower, reference = filled(config).vision, clip()
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.model.vision.mean, config.model.vision.std))
    pixels = (images / 255 - mean) / std
    if size != SIZE:  # the official code's way: patch rows rounded to fp16
        table, grid = reference.embeddings.position_embedding, size // 14
        rows = table.weight[1:].T.reshape(1, 32, 4, 4)
        rows = F.interpolate(rows, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T.half().float()
        ours = torch.cat([table.weight[:1], rows])
        exact = reference(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[block][:, 1:]
        torch.testing.assert_close(tower(images), exact, atol=2e-3, rtol=0)  # transformers does not round
        reference = clip(size)
        reference.load_state_dict({**clip().state_dict(), "embeddings.position_embedding.weight": ours})
    expected = reference(pixels, output_hidden_states=True).hidden_states[block][:, 1:]
    features = tower(images)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    theirs = {n: p.grad for n, p in reference.named_parameters()}
    for i, layer in enumerate(tower.vit.blocks):
        parts = [theirs[f"encoder.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"]
        close(layer.attn.qkv.weight.grad, torch.cat(parts))
        close(layer.mlp.fc1.bias.grad, theirs[f"encoder.layers.{i}.mlp.fc1.bias"])
    close(tower.vit.pos_embed.grad[0], theirs["embeddings.position_embedding.weight"])


@pytest.mark.parametrize("block", [-1, 1])
def test_vision_tower_is_transformers_dinov2(folders, block):
    config = stage_config(block=block)
    config.model.vision.name, config.model.vision.weights = "vit_small_patch14_dinov2", str(folders / "dinov2")
    tower, reference = filled(config).vision, dinov2()
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.model.vision.mean, config.model.vision.std))
    states = reference((images / 255 - mean) / std, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(images), states[block % 3 + 1][:, 1:], atol=1e-5, rtol=1e-5)
    config.data.images.size, config.data.images.tokens = 84, 36
    assert filled(config).vision(torch.zeros(1, 3, 84, 84, dtype=torch.uint8)).shape == (1, 36, 32), "its position table is resampled"
    config.model.vision.name = "vit_small_patch14_reg4_dinov2"
    assert "is no DINOv2, it has reg_token" in complaint(config)


def test_a_number_that_a_config_keeps_in_fp32_is_the_same_number(damaged):
    folder, config = damaged()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 9.999999747378752e-06}))
    initial.check(config)
    (folder / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1.1e-05}))
    assert "rms_norm_eps" in complaint(config)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_of_a_folder_must_be_that_of_the_config_where_documents_are_long_enough_to_show_it(damaged, key):
    folder, config = damaged()
    values = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if not k.startswith("rope_")}

    def has(kind: str, factor: float) -> None:
        rope = {"type": kind, "rope_type": kind, "factor": factor, "rope_theta": 1e4}
        (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 64, key: rope}))

    config.data.context = 64
    has("dynamic", 2.0)
    initial.check(config)
    config.data.context = 65
    said = complaint(config)
    assert "dynamic by 2 beyond 64 positions, not none" in said
    assert "model.decoder.rope_scaling.kind=dynamic model.decoder.rope_scaling.factor=2 model.decoder.max_positions=64" in said
    config.model.decoder.rope_scaling, config.model.decoder.max_positions = RopeScaling(RopeKind.dynamic, 2.0), 64
    initial.check(config)
    has("linear", 4.0)
    assert "linear by 4, not dynamic by 2 beyond 64 positions (set model.decoder.rope_scaling.kind=linear " in complaint(config)
    config.model.decoder.rope_scaling = RopeScaling(RopeKind.linear, 4.0)
    initial.check(config)
    has("linear", 1.0)
    initial.check(config)  # a context that grows
    has("yarn", 4.0)
    assert "yarn, which this decoder has not" in complaint(config)


def test_what_is_not_loaded_is_fresh_and_the_low_rank_output_is_zero(folders):
    config = stage_config()
    fresh = filled(config).state_dict()
    config.model.decoder.weights, config.model.vision.weights = str(folders / "llama"), str(folders / "clip")
    state = filled(config).state_dict()
    assert all(torch.equal(state[n], t) for n, t in fresh.items() if n.startswith("projector.") or "plora" in n)
    assert all((t == 0).all() for n, t in state.items() if n.endswith("plora_b"))
    assert not any(torch.equal(state[n], t) for n, t in fresh.items() if "plora" not in n and not n.startswith("projector."))


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a folder, and the complaint about it once it was damaged."""
    import shutil

    def copy(name: str = "llama") -> tuple[Path, Config]:
        folder = Path(shutil.copytree(folders / name, tmp_path / name))
        config = stage_config()
        (config.model.vision if name == "clip" else config.model.decoder).weights = str(folder)
        return folder, config

    return copy


def complaint(config: Config) -> str:
    with pytest.raises(UserError) as raised:
        initial.check(config)
    return str(raised.value)


def test_missing_unexpected_wrongly_shaped_and_wrongly_typed_tensors_are_one_table(damaged):
    folder, config = damaged()
    change(
        folder,
        model__norm__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.zeros(48),
        model__layers__1__self_attn__k_proj__weight=torch.zeros(32, 48),
        model__layers__1__mlp__up_proj__weight=torch.zeros(64, 48, dtype=torch.int8),
    )
    (folder / "config.json").write_text(json.dumps({"rope_theta": 1e6, "hidden_act": "gelu"}))
    first, header, *rows = complaint(config).splitlines()
    assert first.startswith(f"model.decoder.weights: {folder} does not fit the model in 6 places (")
    assert header.split() == ["problem", "name", "where", "what"]
    assert [" ".join(row.split()) for row in rows] == [
        "wrong value hidden_act config.json gelu, not silu",
        "wrong value rope_theta config.json 1000000.0, not 10000.0",
        "missing model.norm.weight in no file [48]",
        "unexpected model.layers.0.self_attn.q_proj.bias model.safetensors [48]",
        "wrong type model.layers.1.mlp.up_proj.weight model.safetensors int8, not a floating-point format",
        "wrong shape model.layers.1.self_attn.k_proj.weight model.safetensors [32, 48], not [16, 48]",
    ]


def test_a_position_table_that_is_no_square_is_refused(damaged):
    folder, config = damaged("clip")
    names = {n.rpartition("embeddings.")[0]: n for n in HubFolder(folder, "x").facts if n.endswith("position_embedding.weight")}
    change(folder, **{next(iter(names.values())).replace(".", "__"): torch.zeros(16, 32)})
    assert "[16, 32], not [17, 32]" in complaint(config)


def test_head_counts_that_no_shape_shows_are_compared(damaged):
    _, config = damaged("clip")
    config.model.vision.overrides["num_heads"] = 4
    assert "num_attention_heads  config.json  2, not 4" in complaint(config)


def test_files_that_are_not_what_the_index_says_are_named(damaged):
    folder, config = damaged("bins")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    (folder / "pytorch_model-00002-of-00002.bin").rename(folder / "elsewhere")
    assert "pytorch_model-00002-of-00002.bin cannot be read" in complaint(config)
    (folder / "elsewhere").rename(folder / "pytorch_model-00002-of-00002.bin")
    content["weight_map"]["model.ghost"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    assert "the index says that it holds model.ghost" in complaint(config)
    content["weight_map"]["model.ghost"] = "../outside.bin"
    index.write_text(json.dumps(content))
    assert "no weight_map" in complaint(config)
    index.write_text("{")
    assert f"{index} cannot be read" in complaint(config)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_a_file_that_is_cut_short_is_named(damaged, file):
    folder, config = damaged("llama" if file == "model.safetensors" else "bins")
    content = (folder / file).read_bytes()
    for length in (0, 100, len(content) - 1):
        (folder / file).write_bytes(content[:length])
        assert f"{file} cannot be read" in complaint(config), length


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_with_wrong_bytes_in_it_is_read_or_refused_and_never_a_crash(tmp_path, layout):
    tensors = {f"layer.{i}": torch.zeros(3, 4) for i in range(5)}
    file = tmp_path / ("model.safetensors" if layout == "safetensors" else "pytorch_model.bin")
    if layout == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=layout == "zip")
    good, dice, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(dice.choice((1, 3, 20))):
            damaged[dice.randrange(min(len(good), dice.choice((64, 400, len(good)))))] = dice.randrange(256)
        file.write_bytes(damaged)
        try:
            folder = HubFolder(tmp_path, "model.decoder.weights")
            for name in folder.facts:
                folder.read(name)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert 50 < refused < 200


def test_a_pickle_with_code_in_it_is_refused_and_not_run(damaged, tmp_path):
    folder, config = damaged("bins")
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (ran,)

    file = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({"model.norm.weight": Code()}, file)
    assert f"{file.name} cannot be read" in complaint(config)
    with file.open("wb") as out:
        pickle.dump({"model.norm.weight": Code()}, out)
    assert f"{file.name} cannot be read" in complaint(config)
    assert not ran.exists()


def test_a_folder_of_another_kind_is_refused_with_the_key_it_belongs_to(folders, tmp_path):
    config = stage_config()
    config.model.decoder.weights = str(folders / "clip")
    assert "neither InternLM2 nor a Llama" in complaint(config)
    config.model.decoder.weights = str(tmp_path)
    assert "no weights in" in complaint(config)
    config.model.decoder.weights = str(folders / "llama")
    config.run.init_from = str(folders / "llama")
    assert "drop one: model.decoder.weights=null" in complaint(config)
    config.model.decoder.weights = None
    assert "a language model goes to model.decoder.weights" in complaint(config)
    config.run.init_from = str(tmp_path)
    assert "neither a run nor" in complaint(config)
    config = stage_config()
    config.model.vision.weights = str(folders / "llama")
    assert "no vision tower of CLIP or DINOv2" in complaint(config)
    config.model.vision.name, config.model.vision.patch = "vit_tiny_patch16_224", 16
    config.model.vision.weights, config.data.images.size, config.data.images.tokens = str(folders / "clip"), 64, 16
    assert "is not CLIP's tower" in complaint(config)


def test_the_digest_of_a_folder_follows_its_bytes(damaged):
    folder, config = damaged()
    before = initial.digest(config)
    assert before == initial.digest(config)
    change(folder, model__norm__weight=torch.full((48,), 0.5))
    assert initial.digest(config) != before
    assert initial.digest(stage_config()) is None


def test_what_features_are_standardised_by_comes_with_the_tower_or_is_missing_in_the_table(folders, tmp_path):
    config = stage_config()
    config.model.projector.standardise, config.model.vision.weights = True, str(folders / "clip")
    with pytest.raises(UserError, match=r"missing +features\.mean"):
        initial.check(config)
    measured = tmp_path / "measured"
    shutil.copytree(folders / "clip", measured)
    config.model.vision.weights = str(measured)
    mean, std = torch.randn(32), torch.rand(32) + 0.5
    change(measured, **{"features.mean": mean, "features.std": std})
    model = filled(config)
    assert torch.equal(model.projector.feature_mean, mean)
    assert torch.equal(model.projector.feature_std, std)
    config.model.projector.standardise = False
    assert "projector.feature_mean" not in filled(config).shapes(), "a folder may hold what a model does not use"


def test_under_zero_3_each_rank_holds_its_part_and_one_module_more_and_one_rank_reads(folders, environment, tmp_path):
    config = stage_config()
    config.model.decoder.weights, config.model.vision.weights = str(folders / "sharded"), str(folders / "clip")
    config.train.groups = [GroupRule("decoder", trainable=False), GroupRule(".*")]
    config.deepspeed.stage, config.data.global_batch = 3, 2
    torch.save(config, tmp_path / "config.pt")
    worker = str(Path(__file__).parents[1] / "support" / "parts_worker.py")
    command = [sys.executable, worker, str(tmp_path / "config.pt"), str(tmp_path / "out.pt")]
    run_ranks(command, {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]})

    model, weights = filled(config), torch.load(tmp_path / "out.pt", weights_only=True)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: w.shape for name, w in weights.items()}
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()), "the same weights, bitwise"

    first, second = (json.loads((tmp_path / f"out.pt.{rank}.json").read_text()) for rank in range(2))
    whole = sum(p.nbytes for p in model.parameters())
    module = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    assert (first["filled"] > 10, second["filled"]) == (True, 0)
    for rank in (first, second):
        assert rank["held"] < 0.51 * whole
    assert first["most"] < 0.51 * whole + module
