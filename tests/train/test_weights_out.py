"""An export is the run, bitwise, under the official names: what is loaded, written and loaded again is the same."""

import json
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_folders import stage_config
from safetensors.torch import load_file, save_file
from tars import make_image

from compose.cli import main as compose
from data_pipeline.config import SourceConfig
from data_pipeline.errors import EXIT_DONE, EXIT_USER, UserError
from train import configure
from train.cli import main
from train.config import Config, GroupRule, Stage
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRank, LowRankMode, PLoRAConfig, RopeKind, RopeScaling
from train.run_dir import RunDir
from train.weights import claims, final, hub, initial, official
from train.weights.export import _config_json
from train.weights.opened import open_model

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER, CONFIGS = ROOT / "examples/demo/tokenizer", ROOT / "configs"
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


@pytest.mark.parametrize("shard_bytes", [hub.SHARD_BYTES, 20_000], ids=["one shard", "shards"])
def test_in_and_out_and_in_again_is_bitwise(config, released, shard_bytes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub, "write", partial(hub.write, shard_bytes=shard_bytes))
    run = finished(config, tmp_path / "run")
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 3) == (shard_bytes == 20_000)
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
    assert "PLoRA's rank is 4 in wo, w1, w3, w2: engines take 256 for granted" in said
    assert "PLoRA's rank is 4 in wqkv: engines take 8 for granted" in said


def test_the_folder_says_what_engines_and_people_need(config, tmp_path):
    from transformers import PreTrainedTokenizerFast

    run = finished(config, tmp_path / "run")
    run.metrics.write_text(
        json.dumps({"step": 7, "loss/train": 1.5, "loss_by_source/pairs": 1.25, "data/tokens": 12345, "data/images": 67}) + "\n"
    )
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


def test_ranks_and_scales_that_engines_do_not_know_are_said_linear_by_linear():
    model = configure.load(CONFIGS / "pretrain_7b.yaml").model
    khd = configure.load(CONFIGS / "khd_7b.yaml").model
    assert claims.engines(Config(model=model)) == claims.engines(Config(model=khd)) == []
    khd.plora.linears = {}
    assert claims.engines(Config(model=khd)) == [
        "PLoRA's rank is 256 in wqkv: engines take 8 for granted, and cannot load it",
        "PLoRA's scale is 1 in wqkv: engines apply 2, and see images wrongly (multiply Plora_B by 0.5 there)",
    ]
    model.plora.alpha, model.plora.linears = 512.0, {"w2": LowRank(64, 64.0)}
    assert claims.engines(Config(model=model)) == [
        "PLoRA's rank is 64 in w2: engines take 256 for granted, and cannot load it",
        "PLoRA's scale is 2 in wqkv, wo, w1, w3: engines apply 1, and see images wrongly (multiply Plora_B by 2 there)",
    ]
    model.plora = PLoRAConfig(LowRankMode.lora)
    assert [line.partition(":")[0] for line in claims.engines(Config(model=model))] == [
        "low-rank weights act on all tokens (model.plora.mode"
    ]
    model.plora = PLoRAConfig(LowRankMode.none, rank=4)
    assert [line.partition(" (")[0] for line in claims.engines(Config(model=model))] == ["there are no low-rank weights"]


def test_a_foreign_tower_is_refused(config, tmp_path, capfd):
    config.model.projector.standardise = False
    config.model.vision.name, config.model.vision.patch = "vit_tiny_patch16_224", 16
    config.data.images.size, config.data.images.tokens, config.run.init_from = 64, 16, None
    assert xc_train("export", finished(config, tmp_path / "other").path, tmp_path / "out2") == EXIT_USER
    assert "is not CLIP's tower" in capfd.readouterr().err


def test_of_text_only_logits_no_more_is_claimed_than_is_true(config, tmp_path, capsys):
    kept = "the language model's {} frozen tensors are those that the stage began from, bitwise"
    other = "text-only logits are not those that it began with"
    upper = [GroupRule(r"decoder\.layers\.1\.feed_forward"), *FROZEN]
    for i, (mode, groups, said) in enumerate(
        (
            (LowRankMode.plora, FROZEN, f"{kept.format(17)}: so are text-only logits"),
            (LowRankMode.plora, upper, f"{kept.format(14)}; its other 3 were trained: {other}"),
            (
                LowRankMode.lora,
                FROZEN,
                f"{kept.format(17)}; but low-rank weights act on text too (model.plora.mode: lora): text-only logits may be others",
            ),
        )
    ):
        config.model.plora.mode, config.train.groups = mode, groups
        assert xc_train("export", finished(config, tmp_path / f"run{i}").path, tmp_path / f"out{i}") == EXIT_DONE
        assert said in capsys.readouterr().out.splitlines()
        card = (tmp_path / f"out{i}/README.md").read_text()
        assert f"- {said}" in card.splitlines()
        assert ("PLoRA: rank 4" in card, "LoRA on all tokens: rank 4" in card) == (mode is LowRankMode.plora, mode is LowRankMode.lora)


def test_positions_are_exported_as_the_model_has_them(config):
    def exported(kind: RopeKind, factor: float, positions: int, context: int) -> tuple:
        config.model.decoder.rope_scaling, config.model.decoder.max_positions = RopeScaling(kind, factor), positions
        config.data.context = context
        values = _config_json(config, torch.bfloat16)
        return values["rope_scaling"], values["max_position_embeddings"]

    released = {"factor": 1.0, "type": "dynamic"}
    assert exported(RopeKind.none, 1.0, 32768, 4096) == (released, 32768)
    assert exported(RopeKind.none, 1.0, 2048, 4096) == (None, 2048)
    assert exported(RopeKind.linear, 4.0, 2048, 8192) == ({"factor": 4.0, "type": "linear"}, 2048)
    assert exported(RopeKind.dynamic, 2.0, 4096, 8192) == ({"factor": 2.0, "type": "dynamic"}, 4096)


def test_code_that_a_tokenizer_names_beside_it_is_copied_and_never_run_or_its_lack_said(config, tmp_path, capsys):
    tokenizer = Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))
    names = ["tokenization_mine.Mine", "tokenization_mine_fast.MineFast"]
    settings = {"auto_map": {"AutoTokenizer": names, "AutoX": "internlm/x--tokenization_far.Far", "AutoY": "../up.Up", "AutoZ": [None]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "tokenization_mine.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "up.py").write_text("")
    config.data.tokenizer = str(tokenizer)
    run = finished(config, tmp_path / "run")
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    assert [file.name for file in (tmp_path / "out").glob("*.py")] == ["tokenization_mine.py"]
    missing = [line for line in capsys.readouterr().out.splitlines() if "tokenizer_config.json" in line]
    assert missing == [f"tokenizer_config.json names tokenization_mine_fast.py, which is not in {tokenizer} (put it beside)"]
    (tokenizer / "tokenizer_config.json").write_text("{")
    assert xc_train("export", run.path, tmp_path / "out2") == EXIT_USER
    assert "is no JSON (" in capsys.readouterr().err and sorted(p.name for p in tmp_path.glob("*out2*")) == []


def test_a_run_of_another_image_size_is_a_start_with_its_positions_resampled(config, tmp_path):
    run = finished(config, tmp_path / "run")
    config.run.init_from, config.data.images.size, config.data.images.tokens = str(run.path), 84, 36
    initial.check(config)
    model = XComposer2(config.model, 84)
    initial.fill(model, config)
    assert model.vision.vit.pos_embed.shape == (1, 37, 32)
    assert model.vision.vit.pos_embed.isfinite().all()


def complaint(config: Config) -> str:
    with pytest.raises(UserError) as raised:
        initial.check(config)
    return " ".join(str(raised.value).split())


def test_a_stage_that_means_something_else_by_the_weights_of_the_one_before_is_refused(config, tmp_path):
    config.model.plora.alpha = 8.0
    config.model.plora.linears = {"wo": LowRank(4, 4.0)}
    run = finished(config, tmp_path / "run")
    assert xc_train("export", run.path, tmp_path / "out") == EXIT_DONE
    for start, file in ((run.path, "config.yaml"), (tmp_path / "out", "stage.yaml")):
        config.run.init_from = str(start)
        initial.check(config)
        ours = deepcopy(config)
        ours.model.plora, ours.model.decoder.rope_theta = PLoRAConfig(LowRankMode.lora, 4, 4.0), 500000.0
        ours.model.vision.mean, ours.model.vision.overrides["num_heads"] = [0.5, 0.5, 0.5], 4
        said = complaint(ours)
        assert said.startswith(f"run.init_from: {start}") and "in 5 places" in said
        assert f"wrong value model.plora.alpha {file} 8 at rank 4, not 4 at rank 4" in said
        assert f"wrong value model.plora.mode {file} plora, not lora" in said
        assert f"wrong value model.decoder.rope_theta {file} 10000.0, not 500000.0" in said
        assert "model.vision.mean" in said and "model.vision.overrides" in said
        ours = deepcopy(config)
        ours.model.plora.linears["wo"].alpha = 2.0
        assert f"wrong value model.plora.linears.wo.alpha {file} 4 at rank 4, not 2 at rank 4" in complaint(ours)
        ours = deepcopy(config)
        ours.model.plora.dropout, ours.model.vision.overrides["drop_path_rate"] = 0.5, 0.1
        ours.model.decoder.rope_scaling = RopeScaling(RopeKind.linear, 2.0)
        initial.check(ours)  # what is drawn anew, and a context that grows


def test_low_rank_weights_that_never_moved_bind_no_later_stage_to_their_scale(config, tmp_path):
    config.run.init_from = None
    config.model.projector.standardise = False
    run = finished(config, tmp_path / "run")
    config.run.init_from, config.model.plora.alpha = str(run.path), 8.0
    initial.check(config)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, environment):
    from train.weights import checkpointed

    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (ran,)

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for name, read in (("mp_rank_00", checkpointed._whole), ("zero_pp_rank_0_mp_rank_00", checkpointed._partitioned)):
        torch.save({"module": {"head.weight": torch.zeros(2)}, "more": Code()}, folder / f"{name}_model_states.pt")
        torch.save({"optimizer_state_dict": {"zero_stage": 3, "partition_count": 1, "more": Code()}}, folder / f"{name}_optim_states.pt")
        with pytest.raises(UserError, match="might be code"):
            read(folder)
    assert not ran.exists()


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
