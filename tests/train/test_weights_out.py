"""An export is the run, bitwise, under the official names: what is loaded, written and loaded again is the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_folders import stage_config
from safetensors.torch import load_file, save_file
from tars import make_image

from compose.cli import main as compose
from data_pipeline.config import SourceConfig
from data_pipeline.errors import EXIT_DONE, EXIT_USER
from train import configure
from train.cli import main
from train.config import Config, GroupRule, Stage
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir
from train.weights import final, hub, initial, official
from train.weights.export import _config_json
from train.weights.opened import open_model

TOKENIZER = Path(__file__).resolve().parents[2] / "examples/demo/tokenizer"
FROZEN = [GroupRule("vision"), GroupRule("projector"), GroupRule("plora"), GroupRule(".*", trainable=False)]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A tiny InternLM-XComposer2 in bf16 under its official names, in two shards, with what old transformers saved beside."""
    folder = tmp_path_factory.mktemp("released")
    config = stage_config()
    config.model.projector.marks = config.model.projector.standardise = True  # 4KHD's two embeddings, and ours
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for entry in official.entries(model.shapes(), config.model.vision.name)
        for name, shape in entry.theirs.items()
    }
    tensors["vit.vision_tower.vision_model.post_layernorm.weight"] = torch.ones(32)
    tensors["vit.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    hub.write(folder, {n: t.nbytes for n, t in tensors.items()}, tensors.__getitem__, shard_bytes=80_000)
    (folder / "config.json").write_text(json.dumps({"rope_theta": 10000, "num_attention_heads": 6, "rms_norm_eps": 1e-5}))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def finished(config: Config, path: Path) -> RunDir:
    """What a stage leaves that trained nothing: its first weights, in bf16."""
    run = RunDir(path)
    run.create()
    run.config.write_text(configure.to_yaml(config))
    model = XComposer2(config.model, config.data.images.size)
    initial.fill(model, config)
    final.write(run, {n: p.detach().bfloat16() for n, p in model.named_parameters()}, 7)
    return run


@pytest.fixture
def config(released, tmp_path) -> Config:
    config = stage_config()
    config.model.projector.marks = config.model.projector.standardise = True
    config.run.stage, config.run.init_from, config.train.groups, config.train.lr, config.train.steps = (
        Stage.pretrain,
        str(released),
        FROZEN,
        1e-3,
        7,
    )
    config.run.dir = str(tmp_path / "run")
    config.data.tokenizer, config.data.global_batch = str(TOKENIZER), 4
    config.data.sources = {"pairs": SourceConfig("data/pairs", weight="0.9"), "text": SourceConfig("data/text", weight="0.1")}
    return config


def xc_train(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_in_and_out_and_in_again_is_bitwise(config, released, tmp_path, capsys):
    run = finished(config, tmp_path / "run")
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    before, after = tensors_of(released), tensors_of(tmp_path / "out")
    assert set(before) - set(after) == {n for n in before if "post_layernorm" in n or "position_ids" in n}
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, before[n]) for n, t in after.items())
    assert after["plora_sub_GN"].shape[:-1] == (1, 1, 1) and after["plora_glb_GN"].shape[:-1] == (1, 1)

    config.run.init_from = str(tmp_path / "out")
    again = finished(config, tmp_path / "again")
    ours, theirs = (load_file(r.final / final.MODEL_FILE) for r in (run, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    said = capsys.readouterr().out
    assert "language model's 17 frozen tensors are those that the stage began from, bitwise" in said
    assert "rank is 4" in said and "scale" not in said


def test_the_folder_says_what_engines_and_people_need(config, tmp_path):
    from transformers import PreTrainedTokenizerFast

    run = finished(config, tmp_path / "run")
    run.metrics.write_text(json.dumps({"step": 7, "loss/train": 1.5, "loss/pairs": 1.25, "data/tokens": 12345, "data/images": 67}) + "\n")
    split = {"pictures": 200, "nll_right": 1.1, "retrieval_of_10": 0.65, "stderr": {}}
    measured = {"weights": final.digest(run.path), "splits": {"unseen": split}, "text": {"nll": 2.5, "tokens": 9}}
    run.evaluation.write_text(json.dumps(measured))
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["auto_map"]["AutoModelForCausalLM"] == (
        "internlm/internlm-xcomposer2-4khd-7b--modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
    )
    config.model.projector.marks = False
    assert _config_json(config, torch.bfloat16)["auto_map"]["AutoModel"].startswith("internlm/internlm-xcomposer2-vl-7b--")
    expected = {"hidden_size": 48, "num_key_value_heads": 2, "img_size": 56, "vocab_size": 97, "torch_dtype": "bfloat16", "bos_token_id": 1}
    assert {k: values[k] for k in expected} == {
        **expected,
        "bos_token_id": PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").bos_token_id,
    }
    card = (tmp_path / "out/README.md").read_text()
    for fact in (
        "stage: **pretrain**, step 7",
        "12,345 tokens",
        "| pairs | 0.9 | 1.2500 |",
        "| unseen | 200 | 1.1000 | 0.6500 |",
        "2.5000 nats",
    ):
        assert fact in card
    run.evaluation.write_text(json.dumps({**measured, "weights": "of others"}))
    assert xc_train("export", run.path, tmp_path / "unmeasured") == EXIT_DONE
    assert "None were measured" in (tmp_path / "unmeasured/README.md").read_text()


def test_a_frozen_weight_that_moved_is_refused(config, tmp_path, capfd):
    run = finished(config, tmp_path / "run")
    file = run.final / final.MODEL_FILE
    weights = load_file(file)
    weights["decoder.layers.1.attention.wo.weight"][0, 0] += 1
    save_file(weights, file)
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_USER
    assert "decoder.layers.1.attention.wo.weight was frozen and is not what" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    config.train.groups = [GroupRule(".*")]
    run.config.write_text(configure.to_yaml(config))
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    assert "the language model was trained" in capfd.readouterr().out


def test_nothing_is_overwritten_and_nothing_half_written_is_left(config, tmp_path, capfd, monkeypatch):
    run = finished(config, tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    assert xc_train("export", run.path, out) == EXIT_USER
    assert "exists" in capfd.readouterr().err and not list(out.iterdir())
    assert xc_train("export", tmp_path / "nowhere", tmp_path / "new") == EXIT_USER
    monkeypatch.setattr("train.weights.card.text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert xc_train("export", run.path, tmp_path / "new") == EXIT_USER
    assert "No space left" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_scale_that_engines_do_not_know_and_a_foreign_tower_are_said(config, tmp_path, capfd):
    config.model.plora.alpha = 8.0
    run = finished(config, tmp_path / "run")
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    assert "scale is 2: engines apply 1" in capfd.readouterr().out
    config.model.vision.name, config.model.vision.patch = "vit_tiny_patch16_224", 16
    config.data.images.size, config.data.images.tokens, config.run.init_from = 64, 16, None
    assert xc_train("export", finished(config, tmp_path / "other").path, tmp_path / "out2") == EXIT_USER
    assert "is not CLIP's tower" in capfd.readouterr().err


def test_a_run_of_another_image_size_is_a_start_with_its_positions_resampled(config, tmp_path):
    run = finished(config, tmp_path / "run")
    config.run.init_from, config.data.images.size, config.data.images.tokens = str(run.path), 84, 36
    initial.check(config)
    model = XComposer2(config.model, 84)
    initial.fill(model, config)
    assert model.vision.vit.pos_embed.shape == (1, 37, 32)
    assert model.vision.vit.pos_embed.isfinite().all()


CLIP = {"name": "vit_large_patch14_clip_quickgelu_336", "patch": 14, "overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
DECIDED = {"vocab": 4096, "hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "rope_theta": 10000.0, "init_std": 0.3}
"""A decoder with opinions, so that an argmax is not a coin toss."""


def said(checkpoint: Path, picture: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What `xc-compose chat` prints, which is its answer and nothing else."""
    with pytest.raises(SystemExit) as ended:
        compose([*map(str, ("chat", checkpoint, "--ask", f"what is '{picture}'?", "--max-tokens", 24))])
    assert not ended.value.code
    return capfd.readouterr().out


@pytest.mark.parametrize("zero", [2, 3])
def test_a_checkpoint_exports_and_answers_with_the_same_weights_as_the_run_that_ended_there(stage, tmp_path, capfd, zero):
    made = stage(
        data={"images": {"size": 28, "tokens": 1}},
        model={"vision": CLIP, "decoder": DECIDED},
        train={"steps": 2, "groups": [{"match": "vision|projector|plora"}, {"match": ".*", "trainable": False}], "precision": "bf16"},
        deepspeed={"stage": zero},
    )
    ran = made.train()
    assert ran.returncode == EXIT_DONE, ran.stderr
    assert xc_train("export", made.run.path, tmp_path / "run_out") == EXIT_DONE
    assert xc_train("export", made.run.checkpoints / "step-00000002", tmp_path / "checkpoint_out") == EXIT_DONE
    assert "fresh weights: there was nothing to compare" in capfd.readouterr().out
    ours, theirs = tensors_of(tmp_path / "run_out"), tensors_of(tmp_path / "checkpoint_out")
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    assert any((t != 0).any() for n, t in ours.items() if "Plora_B" in n)
    places = (made.run.path, made.run.checkpoints / "step-00000002", tmp_path / "checkpoint_out")
    opened = [open_model(p) for p in places]
    assert [o.step for o in opened] == [2, 2, None]
    first, *others = (dict(o.model.named_parameters()) for o in opened)
    assert all(torch.equal(p, other[name]) for other in others for name, p in first.items())
    (picture := tmp_path / "apple.png").write_bytes(make_image())
    answers = [said(where, picture, capfd) for where in places]
    assert answers[0] == answers[1] == answers[2] and len(answers[0].split()) > 5 and answers[0].count("\n") == 1
    if zero == 2:
        shutil.rmtree(made.run.final)
        assert xc_train("export", made.run.path, tmp_path / "none") == EXIT_USER
        assert "export a checkpoint: " in capfd.readouterr().err
        (made.run.checkpoints / "step-00000002" / "state.json").write_text("{}")
        assert xc_train("export", made.run.checkpoints / "step-00000002", tmp_path / "none") == EXIT_USER
        assert "is no complete checkpoint" in capfd.readouterr().err
