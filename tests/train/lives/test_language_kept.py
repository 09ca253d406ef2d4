"""PLoRA's promise: pretraining changes nothing that text alone can see, to the last bit, and yet it has learnt."""

import torch
from stages import Life, live_together

from train.evaluate import evaluate_run

FROZEN_DECODER = [{"match": "plora|^vision|^projector"}, {"match": ".*", "trainable": False}]


def test_text_only_logits_before_and_after_pretraining_are_equal_to_the_last_bit(stage, demo):
    measured = {"evaluate": {"text": str(demo.source("heldout/text"))}, "train": {"steps": 4, "precision": "auto"}}
    text = {"sources": {"text": {"path": str(demo.source("text"))}}}
    language = stage("language", run={"stage": "language"}, data=text, **measured)
    follow = {"stage": "pretrain", "init_from": str(language.run.path)}
    pretrain = stage("pretrain", run=follow, evaluate=measured["evaluate"], train={**measured["train"], "groups": FROZEN_DECODER})
    sft = stage("sft", run={"stage": "sft", "init_from": str(pretrain.run.path)}, **measured)
    live_together([Life(language), Life(pretrain), Life(sft)])
    before, after, moved = (evaluate_run(one.run.path) for one in (language, pretrain, sft))
    (file,) = (pretrain.run.checkpoints / "step-00000004").glob("*model_states.pt")
    stored = [name for name in torch.load(file, weights_only=False)["module"] if name.startswith(("decoder.", "head."))]
    assert stored and all("plora" in name for name in stored), "a checkpoint leaves out what is frozen"
    assert before["text"]["logits_sha256"] == after["text"]["logits_sha256"]
    assert before["text"]["nll"] == after["text"]["nll"]
    assert before["plora_b_norm"] == 0  # no image, no gradient: PLoRA is still the identity
    assert after["plora_b_norm"] > 0
    assert moved["text"]["logits_sha256"] != after["text"]["logits_sha256"]
