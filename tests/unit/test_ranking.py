"""Margin, its standard error and AUC against scikit-learn and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from nemo_kto.objective.ranking import separation


@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_scikit_learn_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-5, 6, (200,), generator=generator).double()  # many ties
    desirable = torch.rand(200, generator=generator) < 0.3
    found = separation(scores, desirable)
    # both are ratios of whole and half numbers below 2^53: equal to the last rounding of one division
    assert found.auc == pytest.approx(roc_auc_score(desirable.numpy(), scores.numpy()), abs=1e-12)


def test_margin_and_standard_error_by_hand() -> None:
    found = separation(torch.tensor([1.0, 3.0, 0.0, 1.0]), torch.tensor([True, True, False, False]))
    assert (found.num_desirable, found.num_undesirable) == (2, 2)
    assert (found.mean_desirable, found.mean_undesirable, found.margin) == (2.0, 0.5, 1.5)
    assert found.margin_se == pytest.approx(math.sqrt(2.0 / 2 + 0.5 / 2))
    assert found.auc == 3.5 / 4  # pairs: 1>0, 1=1, 3>0, 3>1


def test_an_absent_class_gives_none_and_no_nan() -> None:
    found = separation(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    assert (found.mean_undesirable, found.margin, found.margin_se, found.auc) == (None, None, None, None)
    assert separation(torch.tensor([1.0, 2.0]), torch.tensor([True, False])).margin_se is None
