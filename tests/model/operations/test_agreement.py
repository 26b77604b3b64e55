"""How far ahead the heads agree, by worked examples."""

import torch

from model.operations.agreement import agreement_counts


def test_agreement_of_heads() -> None:
    """Worked example: three heads, five positions of one row.

    Head 2 at t must predict what head 1 predicts at t+1, and head 3 what head 1 predicts at t+2.
    Of the three positions that can be compared, 0 and 2 agree for head 2 and only 0 for head 3.
    """
    predictions = torch.tensor([[7, 8, 9, 5, 6], [8, 0, 5, 6, 0], [9, 5, 0, 0, 0]]).unsqueeze(2)
    valid = torch.ones(3, 5, 1, dtype=torch.bool)
    assert agreement_counts(predictions, valid).tolist() == [3, 2, 1]


def test_agreement_ends_with_the_document() -> None:
    """The same, where tokens 3 and 4 begin another document: head 3 at 0 and head 2 at 1 reach it.

    Position 2 has no target at all and is not compared.
    """
    predictions = torch.tensor([[7, 8, 9, 5, 6], [8, 9, 5, 6, 0], [9, 5, 0, 0, 0]]).unsqueeze(2)
    valid = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1]]).bool().unsqueeze(2)
    assert agreement_counts(predictions, valid).tolist() == [2, 1, 0]
