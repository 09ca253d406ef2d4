"""Rules decide by first match, and the learning rate is a function of progress alone."""

import math

import pytest
import torch
from batches import IMAGE_SIZE, IMAGE_TOKENS, tiny_config, tiny_model

from data_pipeline.errors import UserError
from train.config import GroupRule, Schedule, TrainConfig
from train.model.xcomposer2 import XComposer2
from train.optim import adamw, learning_rate, resolve, set_lr, table


def config(*rules: GroupRule, **changes: object) -> TrainConfig:
    return TrainConfig(lr=1e-3, groups=list(rules), **changes)


def test_the_first_rule_that_matches_decides_and_every_parameter_is_decided_once():
    model = tiny_model()
    rules = GroupRule("plora_a", lr_scale=3.0), GroupRule("decoder", trainable=False), GroupRule(".*", lr_scale=0.5)
    trained, frozen = resolve(model, config(*rules))
    decided = [name for group in (*trained, *frozen) for name in group.names]
    assert sorted(decided) == sorted(name for name, _ in model.named_parameters())
    by_name = {name: group for group in trained for name in group.names}
    assert {by_name[n].lr_scale for n in by_name if "plora_a" in n} == {3.0}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("plora_a" in name or not name.startswith("decoder."))


def test_layer_decay_counts_blocks_from_the_top():
    trained, _ = resolve(tiny_model(), config(GroupRule("vision", layer_decay=0.5), GroupRule(".*", trainable=False)))
    scale = {name: group.lr_scale for group in trained for name in group.names}
    assert scale["vision.vit.blocks.2.attn.qkv.weight"] == 0.5
    assert scale["vision.vit.blocks.0.attn.qkv.weight"] == 0.5**3
    assert scale["vision.vit.pos_embed"] == 0.5**4


def test_norms_biases_and_position_tables_never_decay():
    model = tiny_model()
    trained, _ = resolve(model, config(GroupRule(".*"), weight_decay=0.3))
    for group in trained:
        for name in group.names:
            plain = model.get_parameter(name).dim() > 1 and not name.endswith(("pos_embed", "cls_token"))
            assert group.weight_decay == (0.3 if plain else 0.0), name


def test_adamw_has_the_betas_the_epsilon_and_of_each_group_the_decay_that_the_config_says():
    model = tiny_model()
    settings = config(GroupRule("plora", weight_decay=0.7), GroupRule(".*"), weight_decay=0.3, betas=[0.8, 0.85], eps=1e-5)
    trained, _ = resolve(model, settings)
    decays = {parameter: group["weight_decay"] for group in adamw(trained, model, settings).param_groups for parameter in group["params"]}
    assert decays == {model.get_parameter(name): group.weight_decay for group in trained for name in group.names}
    assert set(decays.values()) == {0.0, 0.3, 0.7}
    for group in adamw(trained, model, settings).param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.85), 1e-5)


def test_what_features_are_standardised_by_never_trains_whatever_the_rules_say():
    settings = tiny_config()
    settings.projector.standardise = True
    model = XComposer2(settings, IMAGE_SIZE, IMAGE_TOKENS)
    trained, frozen = resolve(model, config(GroupRule(".*")))
    assert [name for group in frozen for name in group.names] == ["projector.feature_mean", "projector.feature_std"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("projector.feature_"))
    assert sum(len(group.names) for group in trained) == len(list(model.parameters())) - 2


def test_a_parameter_without_rule_and_a_model_without_anything_to_train_are_refused():
    with pytest.raises(UserError, match="no rule matches vision"):
        resolve(tiny_model(), config(GroupRule("decoder")))
    with pytest.raises(UserError, match="every parameter is frozen"):
        resolve(tiny_model(), config(GroupRule(".*", trainable=False)))


def test_the_table_shows_every_group_with_its_peak_rate():
    text = table(*resolve(tiny_model(), config(GroupRule("vision", lr_scale=0.25), GroupRule(".*", trainable=False))), lr=1e-3)
    assert "2.50e-04" in text
    assert "frozen" in text


def test_the_schedule_warms_up_linearly_and_ends_where_it_says():
    settings = config(GroupRule(".*"), warmup=0.1, final_lr=0.2)
    assert learning_rate(settings, 0.05, 5) == pytest.approx(0.5e-3)
    assert learning_rate(settings, 0.1, 10) == pytest.approx(1e-3)
    assert learning_rate(settings, 0.55, 55) == pytest.approx(1e-3 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert learning_rate(settings, 1.0, 100) == pytest.approx(0.2e-3)
    assert learning_rate(config(GroupRule(".*"), warmup=0.0), 0.0, 0) == pytest.approx(1e-3)


def test_constant_stays_at_the_peak_and_wsd_falls_in_a_line_at_the_end():
    constant = config(GroupRule(".*"), warmup=0.1, final_lr=0.2, schedule=Schedule.constant)
    assert [learning_rate(constant, at, 0) for at in (0.05, 0.1, 0.5, 1.0)] == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])
    wsd = config(GroupRule(".*"), warmup=0.1, decay=0.4, final_lr=0.2, schedule=Schedule.wsd)
    assert [learning_rate(wsd, at, 0) for at in (0.05, 0.3, 0.6, 0.8, 1.0)] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.6e-3, 0.2e-3])


def test_warm_up_in_steps_rises_to_the_schedule_whatever_the_length_of_the_run():
    settings = config(GroupRule(".*"), warmup=0.0, warmup_steps=10)
    plain = config(GroupRule(".*"), warmup=0.0)
    for step in (0.5, 5, 9.5):
        assert learning_rate(settings, step / 1000, step) == pytest.approx(learning_rate(plain, step / 1000, step) * step / 10)
    for step in (10, 500, 1000):
        assert learning_rate(settings, step / 1000, step) == learning_rate(plain, step / 1000, step)


def test_each_group_gets_its_share_of_the_rate():
    model = tiny_model()
    trained, _ = resolve(model, config(GroupRule("vision", lr_scale=0.1), GroupRule(".*")))
    optimizer = adamw(trained, model, config(GroupRule(".*")))
    set_lr(optimizer, 2e-3)
    assert {round(g["lr"], 9) for g in optimizer.param_groups} == {2e-4, 2e-3}
    assert isinstance(optimizer, torch.optim.AdamW)
