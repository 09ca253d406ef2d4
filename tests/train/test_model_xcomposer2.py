"""The whole model: packing, Partial LoRA and images change what they should and nothing else."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import IMAGE_SIZE, IMAGE_TOKENS, batch_of, image, mixed_segments, text, tiny_config, tiny_model
from no_host_sync import no_host_sync
from torch import Tensor

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from train.model.plora import PLoRALinear
from train.model.xcomposer2 import XComposer2
from train.model_config import ModelConfig


def logits_of(model: XComposer2, batch: PackedBatch) -> list[Tensor]:
    """Logits at the supervised positions, segment by segment."""
    with torch.no_grad():
        logits = model.logits(batch)
    return [logits[batch.target_segment == number] for number in range(len(batch.segment_lengths) - 1)]


def test_packed_equals_one_by_one() -> None:
    model, segments = tiny_model(), mixed_segments()
    alone = [logits_of(model, batch_of([segment]))[0] for segment in segments]
    for packed, single in zip(logits_of(model, batch_of(segments)), alone, strict=True):
        torch.testing.assert_close(packed, single, atol=2e-5, rtol=0)  # logits reach 5


def test_gradients_of_a_pack_are_the_sum_of_those_one_by_one() -> None:
    model, segments = tiny_model(), mixed_segments()
    model(batch_of(segments)).loss_sum.backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for segment in segments:
        model(batch_of([segment])).loss_sum.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_positions_restart_in_every_segment() -> None:
    """The order of the segments in a pack does not matter; their positions do."""
    model, segments = tiny_model(), mixed_segments()
    forward, backward = batch_of(segments), batch_of(segments[::-1])
    for one, other in zip(logits_of(model, forward), logits_of(model, backward)[::-1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    stretched = replace(forward, position_ids=forward.position_ids * 2)
    assert (logits_of(model, stretched)[2] - logits_of(model, forward)[2]).abs().max() > 0.01


def test_nan_in_one_segment_leaves_the_others_bitwise_unchanged() -> None:
    model, segments = tiny_model(), mixed_segments()
    batch = batch_of(segments)
    clean = logits_of(model, batch)
    only_in_segment_2 = 0
    ids = batch.input_ids.clone()
    start, length = sum(batch.segment_lengths[:2]), batch.segment_lengths[2]
    ids[start + length // 2] = only_in_segment_2
    ids[-batch.segment_lengths[-1] :] = 1
    batch = replace(batch, input_ids=ids)
    model.decoder.tok_embeddings.weight.data[only_in_segment_2] = math.nan
    poisoned = logits_of(model, batch)
    assert poisoned[2].isnan().any()
    for number in (0, 1, 3, 4):
        assert poisoned[number].isfinite().all()
        assert torch.equal(poisoned[number], clean[number])


def test_a_broken_image_poisons_its_own_segment_only() -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    clean = logits_of(model, batch)
    tokens = model.projector.forward
    model.projector.forward = lambda *inputs: tokens(*inputs).index_fill(0, torch.arange(IMAGE_TOKENS), math.nan)
    poisoned = logits_of(model, batch)
    assert poisoned[0].isnan().all()
    assert all(torch.equal(one, other) for one, other in zip(poisoned[1:], clean[1:], strict=True))


def test_model_starts_as_its_base_model_bitwise(monkeypatch) -> None:
    model, batch = tiny_model(trained_plora=False), batch_of(mixed_segments())
    with_plora = model.logits(batch)
    monkeypatch.setattr(PLoRALinear, "forward", lambda self, x, *_: F.linear(x, self.weight))
    assert torch.equal(model.logits(batch), with_plora)


def test_text_only_logits_ignore_plora_and_images_bitwise() -> None:
    batch = batch_of([[text(9, 0)], [text(14, 1)], [text(30, 2)]])
    logits = [tiny_model(trained_plora=False), tiny_model()]
    other_vision = tiny_model()
    for parameter in other_vision.vision.parameters():
        parameter.data.mul_(1.5)
    one, two, three = (model.logits(batch)[: batch.supervised] for model in (*logits, other_vision))
    assert torch.equal(one, two) and torch.equal(two, three)


def test_images_are_seen_through_every_part() -> None:
    """The counterpart: with an image in the segment, PLoRA, the tower and the words before the answer matter."""
    model, batch = tiny_model(), batch_of([[image(0), text(6, 0)]])
    logits = logits_of(model, batch)[0]
    other_image = batch_of([[image(1), text(6, 0)]])
    assert (logits_of(model, other_image)[0] - logits).abs().max() > 1e-3
    assert (logits_of(tiny_model(trained_plora=False), batch)[0] - logits).abs().max() > 1e-3


def test_ids_at_image_positions_do_not_matter() -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    other = replace(batch, input_ids=batch.input_ids.index_fill(0, batch.image_index, 7))
    assert torch.equal(model.logits(batch), model.logits(other))


@pytest.mark.parametrize("segments", [[[text(9, 0)], [text(14, 1)]], []], ids=["text only", "empty pack"])
def test_every_parameter_gets_a_finite_gradient_without_images(segments: list) -> None:
    model = tiny_model()
    model(batch_of(segments)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all((parameter.grad == 0).all() for parameter in model.vision.parameters())


def test_frozen_weights_get_no_gradient_and_the_rest_does() -> None:
    model = tiny_model()
    trained = {n for n, _ in model.named_parameters() if "plora" in n or n.startswith(("vision", "projector"))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model(batch_of(mixed_segments())).loss_sum.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_losses_are_cross_entropy_of_the_logits() -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    losses = model(batch)
    expected = F.cross_entropy(model.logits(batch), batch.targets, reduction="none")
    torch.testing.assert_close(losses.per_target_L, expected)
    torch.testing.assert_close(losses.loss_sum, expected[: batch.supervised].sum())
    assert losses.loss_sum.requires_grad and not losses.per_target_L.requires_grad
    assert (losses.per_target_L[batch.supervised :] == 0).all()


@pytest.mark.parametrize("chunk_rows", [1 << 20, 8], ids=["one chunk", "chunks"])
def test_forward_and_backward_never_wait_for_a_value(chunk_rows: int) -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    model.head.chunk_rows = chunk_rows
    with no_host_sync():
        model(batch).loss_sum.backward()
        model.logits(batch)


@pytest.mark.parametrize(
    "sync",
    [lambda x: x.item(), lambda x: x.tolist(), lambda x: bool(x[0]), lambda x: x[x > 0], torch.nonzero, lambda x: x.cpu().numpy()],
)
def test_the_guard_against_host_syncs_sees_them(sync: Callable[[Tensor], Any]) -> None:
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="host sync"), no_host_sync():
        sync(x)


def test_bf16_trains_with_fp32_losses() -> None:
    model, batch = tiny_model(), batch_of(mixed_segments())
    exact = model(batch)
    rough = model.bfloat16()(batch)
    rough.loss_sum.backward()
    assert rough.loss_sum.dtype == rough.per_target_L.dtype == torch.float32
    torch.testing.assert_close(rough.loss_sum, exact.loss_sum, atol=0, rtol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_fresh_weights_depend_on_seed_and_name_alone() -> None:
    one = tiny_model(seed=3, trained_plora=False).state_dict()
    torch.rand(5)  # the global generator has moved on
    again = tiny_model(seed=3, trained_plora=False).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    deeper = tiny_config()
    deeper.decoder.layers = 3
    model = XComposer2(deeper, IMAGE_SIZE)
    model.init_weights(3)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in one.items())
    other = tiny_model(seed=4).state_dict()
    assert not torch.equal(one["decoder.layers.0.attention.wqkv.weight"], other["decoder.layers.0.attention.wqkv.weight"])
    assert not torch.equal(one["decoder.layers.0.attention.wo.weight"], one["decoder.layers.1.attention.wo.weight"])


def test_fresh_weights_are_scaled_and_neutral_where_they_should_be() -> None:
    config = tiny_config()
    config.vision.overrides["init_values"] = 0.1  # LayerScale
    with torch.device("meta"):
        model = XComposer2(config, IMAGE_SIZE)
    model.to_empty(device="cpu").init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("plora_b", "bias")):
            assert (parameter == 0).all(), name
        elif name.endswith("gamma"):
            assert (parameter == 0.1).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert 0.18 < parameter.std() < 0.22, name
    assert torch.isfinite(model(batch_of(mixed_segments())).loss_sum)


def test_state_dict_is_the_parameters_under_plain_names() -> None:
    model = tiny_model()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert {name for name in model.state_dict() if name.startswith(("decoder.layers.1.", "decoder.norm", "head", "projector"))} == {
        *(f"decoder.layers.1.{part}.{name}" for part in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3",
          "feed_forward.w2") for name in ("weight", "plora_a", "plora_b")),
        "decoder.layers.1.attention_norm.weight", "decoder.layers.1.ffn_norm.weight", "decoder.norm.weight", "head.weight",
        "projector.linear_in.weight", "projector.linear_in.bias", "projector.linear_out.weight", "projector.linear_out.bias",
    }  # fmt: skip


def test_image_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.images.tokens is 9, .*32 pixels.*makes 4 tokens"):
        XComposer2(tiny_config(), IMAGE_SIZE, 9)


def test_the_7b_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = XComposer2(ModelConfig(), 490, 1225)
    counts = {"base": 0, "plora": 0, "vision": 0, "projector": 0}
    for name, parameter in model.named_parameters():
        part = "plora" if "plora" in name else name.split(".")[0].replace("decoder", "base").replace("head", "base")
        counts[part] += parameter.numel()
    assert counts == {"base": 7_737_708_544, "plora": 603_979_776, "vision": 304_169_984, "projector": 20_979_712}
