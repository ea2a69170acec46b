"""Optimizers for training on manifolds, as `torch.optim.Optimizer`s."""

from manifolds.optim.adam import RiemannianAdam
from manifolds.optim.gradients import clip_grad_norm_
from manifolds.optim.low_rank_adam import LowRankAdam
from manifolds.optim.muon import RiemannianMuon
from manifolds.optim.sgd import RiemannianSGD

__all__ = ["LowRankAdam", "RiemannianAdam", "RiemannianMuon", "RiemannianSGD", "clip_grad_norm_"]
