"""The one error that a caller of manifolds may want to catch."""


class ManifoldError(ValueError):
    """A point, a tangent or a setting does not fit; the message says which, why and how to mend it."""


class MissingOperationError(ManifoldError, NotImplementedError):
    """The manifold has no such operation; the message names both."""
