"""Every layout of folder that the documentation names is read: InternLM2, a whole CLIP, a release in .bin shards; and written in shards."""

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from hub_folders import as_bins, clip, saved, stage_config
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from data_pipeline.errors import UserError
from train.config import Config
from train.model.xcomposer2 import XComposer2
from train.weights import hub, initial, internlm2, official
from train.weights.hub import HubFolder
from train.weights.mapping import Entry, fits

GENERATOR = torch.Generator().manual_seed(5)


def model_of(config: Config) -> XComposer2:
    with torch.device("meta"):
        return XComposer2(config.model, config.data.images.size)


def filled(config: Config) -> dict[str, torch.Tensor]:
    initial.check(config)
    model = XComposer2(config.model, config.data.images.size)
    initial.fill(model, config)
    return model.state_dict()


def written(entries: list[Entry], folder: Path) -> dict[str, torch.Tensor]:
    """Random weights under foreign names, in one file."""
    folder.mkdir()
    shapes = {name: shape for entry in entries for name, shape in entry.theirs.items()}
    tensors = {name: torch.randn(shape, generator=GENERATOR).bfloat16() for name, shape in shapes.items()}
    hub.write(folder, {name: t.nbytes for name, t in tensors.items()}, tensors.__getitem__)
    return tensors


@pytest.mark.parametrize("bins", [False, True], ids=["safetensors", "bins"])
def test_an_internlm2_is_the_decoder_and_its_head(tmp_path: Path, bins: bool) -> None:
    config, folder = stage_config(), tmp_path / "internlm2"
    theirs = written(internlm2.entries(model_of(config).shapes()), folder)
    (folder / "config.json").write_text(json.dumps({"rope_theta": 10000, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}))
    if bins:
        as_bins(folder)
    fresh = filled(config)
    config.model.decoder.weights = str(folder)
    state = filled(config)
    assert {"model.tok_embeddings.weight", "output.weight", "model.layers.1.attention.wqkv.weight"} < theirs.keys()
    assert torch.equal(state["head.weight"], theirs["output.weight"].float())
    for name, tensor in state.items():
        if internlm2.is_base(name):
            assert torch.equal(tensor, theirs[internlm2.name(name)].float()), name
        else:
            assert torch.equal(tensor, fresh[name]), name


def test_a_whole_clip_gives_its_tower_and_its_text_side_is_passed_over(tmp_path: Path) -> None:
    tower = clip()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=8))
    both.vision_model.load_state_dict({name.removeprefix("vision_model."): t for name, t in tower.state_dict().items()})
    saved(both, tmp_path / "whole")
    saved(tower, tmp_path / "tower")
    names = HubFolder(tmp_path / "whole", "x").facts
    assert {"logit_scale", "text_projection.weight", "visual_projection.weight"} < names.keys()
    states = []
    for folder in ("whole", "tower"):
        config = stage_config()
        config.model.vision.weights = str(tmp_path / folder)
        states.append(filled(config))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_release_in_bin_shards_is_the_one_in_safetensors(tmp_path: Path) -> None:
    config, folder = stage_config(), tmp_path / "released"
    config.run.init_from = str(folder)
    written(official.entries(model_of(config).shapes(), config.model.vision.name), folder)
    before = filled(config)
    as_bins(folder)
    assert len(list(folder.glob("pytorch_model-*.bin"))) == 2 and not list(folder.glob("*.safetensors"))
    after = filled(config)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_file_system_that_refuses_is_heard_as_one(tmp_path: Path) -> None:
    """Here for the size of the file; a full disk is refused in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            hub.save({"w": torch.zeros(100_000)}, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.errno == errno.EFBIG and refused.value.filename == str(tmp_path / "w.safetensors")


def test_weights_that_are_no_longer_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no folder {tmp_path}/gone, where the stage's first weights lie \(put them back"):
        initial.fingerprint(tmp_path / "gone")


def test_an_export_in_several_shards_holds_each_tensor_once_as_its_index_says(tmp_path: Path) -> None:
    entries = official.entries(model_of(stage_config()).shapes(), stage_config().model.vision.name)
    tensors = written(entries, tmp_path / "one")
    (tmp_path / "many").mkdir()
    shards = hub.write(tmp_path / "many", {n: t.nbytes for n, t in tensors.items()}, tensors.__getitem__, shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert shards == len(files) > 3 and files[0].name == f"model-00001-of-{shards:05}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 or len(load_file(file)) == 1 for file in files)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    found = HubFolder(tmp_path / "many", "export")
    fits(entries, found, "export")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
