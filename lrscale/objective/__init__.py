"""Pure tensor functions of the training objectives: no files, no ranks, no models."""

from lrscale.objective.advantage import AdvantageKind, count_groups_without_signal, group_advantages
from lrscale.objective.policy_loss import PolicyLoss, PolicyObjective, PolicyStats, loss_normaliser, policy_loss
from lrscale.objective.projector_loss import after_first_marker_mask, projector_loss, projector_nll
from lrscale.objective.schedule import learning_rate_at

__all__ = [
    "AdvantageKind",
    "PolicyLoss",
    "PolicyObjective",
    "PolicyStats",
    "after_first_marker_mask",
    "count_groups_without_signal",
    "group_advantages",
    "learning_rate_at",
    "loss_normaliser",
    "policy_loss",
    "projector_loss",
    "projector_nll",
]
