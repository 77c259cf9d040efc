"""What to tell a user about class balance and batches without partners. Not for printing it."""

from __future__ import annotations

BALANCED = (1.0, 4.0 / 3.0)
"""Where w_des n_des : w_und n_und should lie, by the KTO paper."""
_SLACK = 1.01  # a weight typed with two decimals is close enough


def class_balance_warning(
    num_desirable: int,
    num_undesirable: int,
    desirable_weight: float,
    undesirable_weight: float,
    loss_normalization: str,
) -> str | None:
    """What is wrong with the balance of the classes, and the weight that mends it; None if nothing is.

    Under ``per_batch`` a class counts by its weight times its number of rows. Under ``per_class`` its loss is a mean
    over the class, so that only the weights count, and numbers of rows do not matter.
    """
    if not num_desirable or not num_undesirable:
        missing = "undesirable" if num_desirable else "desirable"
        return f"the data holds no {missing} row: KTO then only pushes in one direction; add rows of the other class"
    desirable, undesirable, what = desirable_weight, undesirable_weight, "weights"
    if loss_normalization == "per_batch":
        desirable, undesirable = desirable * num_desirable, undesirable * num_undesirable
        what = "weight times number of rows"
    if not desirable or not undesirable or BALANCED[0] / _SLACK <= desirable / undesirable <= BALANCED[1] * _SLACK:
        return None  # a weight of 0 is no accident
    ratio = desirable / undesirable
    if ratio < BALANCED[0]:
        key, low, high = "desirable", desirable_weight * BALANCED[0] / ratio, desirable_weight * BALANCED[1] / ratio
    else:
        key = "undesirable"
        low, high = undesirable_weight * ratio / BALANCED[1], undesirable_weight * ratio / BALANCED[0]
    return (
        f"desirable : undesirable is {ratio:.3g} : 1 by {what}, outside the KTO paper's 1 : 1 to 4 : 3; set "
        f"model.kto.{key}_loss_weight between {low:.3g} and {high:.3g}"
    )
