"""One YAML a stage: inheritance, overrides, and a resolved config that repeats the run."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.inspect.simulate import default_cost
from train import configure
from train.config import Config, Precision, Stage
from train.flops import cost_model
from train.weights import meaning

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = sorted(path for path in CONFIGS.glob("small/**/*.yaml") if path.stem != "base")
DEMO = sorted(CONFIGS.glob("demo/[0-9]*.yaml"))


@pytest.mark.parametrize("path", [*DEMO, *SMALL], ids=lambda p: str(p.relative_to(CONFIGS)))
def test_the_configs_of_demo_and_small_model_load_and_their_resolved_form_is_the_same_config(path, tmp_path):
    config = configure.load(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(configure.to_yaml(config))
    assert configure.load(resolved) == config


def test_each_demo_stage_begins_where_the_one_before_ended():
    configs = [configure.load(path) for path in DEMO]
    assert [c.run.stage for c in configs] == [Stage.language, Stage.pretrain, Stage.sft]
    assert [c.run.init_from for c in configs] == [None, configs[0].run.dir, configs[1].run.dir]
    assert all(c.model == configs[0].model for c in configs)


def test_in_every_chain_of_stages_that_is_shipped_weights_mean_the_same() -> None:
    shipped = [configure.load(path) for path in sorted(DEMO[0].parents[1].rglob("*.yaml")) if "base" not in path.stem]
    links = [(b, a) for a in shipped for b in shipped if a.run.init_from == b.run.dir]
    assert len(links) >= 6
    for before, after in links:
        assert meaning.differences(before.model, after.model, after.data.context, low_rank=True) == {}
    before, after = next(link for link in links if link[1].run.name == "sft-7b")
    before.model.plora.alpha = 512.0
    assert meaning.trains_low_rank(before.model, before.train)
    found = meaning.differences(before.model, after.model, after.data.context, low_rank=True)
    assert found == {"model.plora.alpha": "512 at rank 256, not 256 at rank 256"}
    assert not meaning.trains_low_rank(*(getattr(configure.load(DEMO[0]), section) for section in ("model", "train")))


def test_each_small_stage_begins_where_the_one_before_ended_and_the_ablation_changes_only_what_learns():
    pretrain, sft, compose = (configure.load(CONFIGS / "small" / f"{name}.yaml") for name in ("pretrain", "sft", "compose"))
    assert [c.run.stage for c in (pretrain, sft, compose)] == [Stage.pretrain, Stage.sft, Stage.compose]
    assert [c.run.init_from for c in (pretrain, sft, compose)] == [None, pretrain.run.dir, sft.run.dir]
    ablation = [configure.load(path) for path in SMALL if path.parent.name == "ablation"]
    assert len({c.run.dir for c in ablation}) == 4
    assert all(c.run.stage is Stage.pretrain and c.data == ablation[0].data for c in ablation)
    assert {c.model.plora.mode.value for c in ablation} == {"plora", "lora", "none"}


def test_a_layer_overrides_its_base_and_the_command_line_overrides_both(tmp_path):
    (tmp_path / "base.yaml").write_text(DEMO[0].with_name("base.yaml").read_text())
    (tmp_path / "stage.yaml").write_text(DEMO[0].read_text().replace("train:", "train:\n  lr: 0.5\n  warmup: 0.5").replace("lr: 0.002", ""))
    config = configure.load(tmp_path / "stage.yaml", ["train.lr=0.25", "train.precision=fp32", "run.name=it's"])
    assert (config.train.lr, config.train.warmup) == (0.25, 0.5)
    assert config.train.precision is Precision.fp32
    assert config.run.name == "it's"


def test_a_base_that_leads_back_to_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        configure.load(tmp_path / "a.yaml")


def test_only_what_shapes_the_result_makes_two_configs_differ():
    one = configure.load(DEMO[1])
    cadence = ["data.workers=7", "track.every=99", "checkpoint.every=3", "deepspeed.stage=1", "run.name=x", "train.attention=sdpa"]
    assert configure.shaping_difference(one, configure.load(DEMO[1], cadence)) is None
    shaping = ["train.lr=1", "data.context=64", "data.images.crop=0.5", "run.seed=5", "run.stage=sft", "run.init_from=elsewhere"]
    shaping += ["model.plora.alpha=3", "model.decoder.rope_theta=1e5", "train.betas=[0.8,0.9]", "deepspeed.extra.zero_optimization=1"]
    for override in shaping:
        found = configure.shaping_difference(one, configure.load(DEMO[1], [override]))
        assert found and override.startswith(found), override
    formats = [configure.load(DEMO[1], [f"train.precision={name}"]) for name in ("auto", "bf16", "fp32")]
    assert configure.shaping_difference(formats[0], formats[1]) is None, "the checkpoint knows what auto was"
    assert configure.shaping_difference(formats[1], formats[2]) == "train.precision"
    zero_pp = ["deepspeed.stage=3", "deepspeed.zero_pp.quantized_gradients=true"]
    assert configure.shaping_difference(one, configure.load(DEMO[1], zero_pp)) == "deepspeed.zero_pp.quantized_gradients"


def test_slurm_settings_are_kept_unread(tmp_path):
    (tmp_path / "base.yaml").write_text(DEMO[0].with_name("base.yaml").read_text())
    (tmp_path / "stage.yaml").write_text(DEMO[0].read_text() + "slurm: {nodes: 4, anything: [1, 2]}\n")
    assert configure.load(tmp_path / "stage.yaml").slurm == {"nodes": 4, "anything": [1, 2]}


def test_simulated_costs_are_by_default_those_that_training_the_7b_would_compute():
    config = Config()
    for size in (224, 490):
        config.data.images.size = size
        assert default_cost(size) == cost_model(config)
