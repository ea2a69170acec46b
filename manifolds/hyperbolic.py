"""geoopt's hyperbolic manifolds, as they are.

`PoincareBall` and `PoincareBallExact` (the open ball; the second retracts along geodesics), `Lorentz` (the
upper sheet of the hyperboloid) and `Stereographic`, `StereographicExact`, `StereographicProductManifold`
(constant curvature of either sign, learnable) are geoopt's own classes, re-exported under our roof:
`manifolds.check` runs on them, and so do our solvers. They bring no Hessian conversion and no second
fundamental form.

Their curvature is a buffer in the default dtype: for work in float64 convert the manifold, too, as in
`PoincareBall().double()`.

`check` finds one error in geoopt 0.5.1: `inner` of the stereographic models returns (batch, batch) numbers
for a batch of points unless it is called with `keepdim=True`. Everything of ours calls it so.
"""

from geoopt import (
    Lorentz,
    PoincareBall,
    PoincareBallExact,
    Stereographic,
    StereographicExact,
    StereographicProductManifold,
)

__all__ = [
    "Lorentz",
    "PoincareBall",
    "PoincareBallExact",
    "Stereographic",
    "StereographicExact",
    "StereographicProductManifold",
]
