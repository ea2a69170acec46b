"""Batched minimisation on manifolds: `minimize`, what it returns, and the constraints it can keep."""

from manifolds.solvers.constraints import NullSpace, TrustBall
from manifolds.solvers.minimize import minimize
from manifolds.solvers.solution import Solution, State, Status

__all__ = ["NullSpace", "Solution", "State", "Status", "TrustBall", "minimize"]
