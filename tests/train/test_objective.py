"""The objective is the mean over the supervised tokens of the global batch, however it is cut up."""

import pytest
import torch
from batches import batch_of, mixed_segments, text, tiny_model
from no_host_sync import no_host_sync

from data_pipeline.batch import IGNORE
from train.objective import losses_by_source, scaled_loss


def test_the_worked_example() -> None:
    sums = [[6.0, 4.0], [2.0, 8.0]]
    handed_over = [[scaled_loss(torch.tensor(loss_sum), dp=2, n_global=8).item() for loss_sum in rank] for rank in sums]
    assert handed_over == [[1.5, 1.0], [0.5, 2.0]]
    assert sum(sum(rank) for rank in handed_over) / 2 == 20 / 8


@pytest.mark.parametrize("cut", [[[[0], [1]], [[2], [3, 4]]], [[[3, 1], [2]], [[0], [4]]]])
def test_gradient_does_not_depend_on_the_cut(cut: list[list[list[int]]]) -> None:
    """Two ranks x two micro-steps in any cut, gradients summed over steps and averaged over ranks, against one pack."""
    model, segments = tiny_model(), mixed_segments()
    whole = batch_of(segments)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(whole).loss_sum / whole.supervised, parameters)
    got = [torch.zeros_like(parameter) for parameter in parameters]
    for rank in cut:
        for micro in rank:
            loss = scaled_loss(model(batch_of([segments[number] for number in micro])).loss_sum, 2, whole.supervised)
            for total, grad in zip(got, torch.autograd.grad(loss, parameters), strict=True):
                total += grad / len(cut)
    for grad, expected_grad in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


def test_a_global_batch_without_targets_has_loss_zero() -> None:
    loss = scaled_loss(tiny_model()(batch_of([])).loss_sum, dp=4, n_global=0)
    assert loss.item() == 0


def test_losses_and_counts_by_source() -> None:
    batch = batch_of([*mixed_segments(), [text(7, 7)]], sources=[2, 0, 2, 0, 4, 0])
    per_target_L = torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(0)) * (batch.targets != IGNORE)
    with no_host_sync():
        sums, counts = losses_by_source(per_target_L, batch, num_sources=5)
    expected_sums, expected_counts = [0.0] * 5, [0] * 5
    for loss, target, segment in zip(per_target_L.tolist(), batch.targets.tolist(), batch.target_segment.tolist(), strict=True):
        if target != IGNORE:
            expected_sums[batch.segment_source[segment]] += loss
            expected_counts[batch.segment_source[segment]] += 1
    torch.testing.assert_close(sums, torch.tensor(expected_sums))
    assert counts.tolist() == expected_counts and expected_counts[1] == expected_counts[3] == 0
    assert counts.sum() == batch.supervised
