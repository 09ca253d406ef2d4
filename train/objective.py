"""The objective: the mean loss of the supervised tokens of a global batch, however the batch is cut up.

Invariant: the gradient depends neither on packing, nor on the number of micro-steps, nor on the world size.

Worked example: 2 data-parallel ranks x 2 micro-steps, supervised tokens and sums of their losses

                 micro-step 1      micro-step 2
    rank 0       3 tokens, 6.0     1 token,  4.0
    rank 1       2 tokens, 2.0     2 tokens, 8.0

The global batch has n_global = 8 supervised tokens with a loss of 20.0 in sum: the objective is 20 / 8 = 2.5. The mean of the four
micro-batches' means would be (2 + 4 + 1 + 4) / 4 = 2.75: there the lone token of rank 0 weighs three times as much as each of the
three beside it, for no reason but where the packer put it.

Ranks exchange their counts before the first backward pass, so each of them knows n_global. DeepSpeed adds up the gradients of the
micro-steps (`scale_wrt_gas=False` keeps it from dividing by their number) and averages over the dp = 2 ranks. The average divides
by dp, so each micro-batch hands over loss_sum * dp / n_global:

    rank 0       6.0 * 2 / 8 = 1.5      4.0 * 2 / 8 = 1.0      sum 2.5
    rank 1       2.0 * 2 / 8 = 0.5      8.0 * 2 / 8 = 2.0      sum 2.5      average over the ranks 2.5, as it should be

(that both ranks reach 2.5 is a coincidence of the numbers: each contributes 10 of the 20.)

Ranks of a sequence group (`parallel.sequence`) hold parts of one pack: each sums the losses of its part's targets, n_global counts every
target once, and the same average over all ranks, dp = world size, adds the parts up. What one part's loss owes to the keys and values of
another comes to that other rank in the backward pass, through the exchange of heads.
"""

from torch import Tensor

from data_pipeline.batch import IGNORE, PackedBatch


def scaled_loss(loss_sum: Tensor, dp: int, n_global: int) -> Tensor:
    """What `engine.backward(..., scale_wrt_gas=False)` takes.

    `loss_sum` is one micro-batch's sum of token losses, `dp` the ranks that the engine averages over, `n_global` the supervised tokens over
    all ranks and micro-steps; a global batch without any (all packs empty) counts as one token and has loss 0.
    """
    return loss_sum * (dp / max(n_global, 1))


def losses_by_source(per_target_L: Tensor, batch: PackedBatch, num_sources: int) -> tuple[Tensor, Tensor]:
    """Sums [num_sources] fp32 of a micro-batch's token losses by source, and counts [num_sources] int64 of its supervised tokens.

    Rows that only round L up count nowhere. No host sync: index_add, where bincount would ask the device for its length.
    """
    # Padding rows are lent to source 0, where they add a loss of 0 and no count.
    source_L = batch.segment_source.index_select(0, batch.target_segment).long().clamp_min(0)
    sums = per_target_L.new_zeros(num_sources).index_add_(0, source_L, per_target_L)
    counts = source_L.new_zeros(num_sources).index_add_(0, source_L, (batch.targets != IGNORE).long())
    return sums, counts
