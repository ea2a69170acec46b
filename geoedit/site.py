"""A site: where in a model, and at which tokens, a state is read or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from torch import Tensor

from geoedit.errors import EditError

TokenChooser = Callable[[Tensor, Tensor], Tensor]
"""From input_ids and the mask of real tokens, both (batch, tokens), to positions (batch,) or a bool mask."""

TOKEN_NAMES = ("last", "all", "value")
STREAMS = (
    "residual_in",
    "residual_out",
    "attention_out",
    "mlp_hidden",
    "mlp_out",
    "heads",
    "embedding",
)
_FIELDS = ("block", "stream", "token", "stack", "head", "module")


@dataclass(frozen=True)
class Site:
    """Where in a model (block and stream, or a module) and at which tokens a state lives.

    A site names a place without holding a model, so it can be a dictionary key, be saved, and be used on any
    model that has such a place; `anatomy(model).locate(site)` finds it.

    Args:
        block: Index of the block, negative from the end. None for the stream "embedding" and with `module`.
        stream: One of `STREAMS`. Ignored when `module` is given.
        token: "last" (the last real token), "all" (every real token), "value" (the last token of the value of
            the concept), an integer (counted over the real tokens, without padding; negative from the end),
            or a callable from (input_ids, mask of real tokens), both (batch, tokens), to positions (batch,)
            or to a bool mask (batch, tokens).
        stack: "encoder" or "decoder" and the like, for models with more than one stack of blocks.
        head: One attention head, with the stream "heads".
        module: Dotted path of a module, read at its output; "path:input" reads its input.

    Raises:
        EditError: a field has a value that no model could satisfy.

    >>> str(Site(3)), str(Site(-1, "heads", "value", head=2)), str(Site(module="lm_head:input", token="all"))
    ('block 3 residual_out @ last', 'block -1 heads[2] @ value', 'lm_head:input @ all')
    """

    block: int | None = None
    stream: str = "residual_out"
    token: str | int | TokenChooser = "last"
    _: KW_ONLY
    stack: str | None = None
    head: int | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could satisfy."""
        self._check_place()
        self._check_token()

    def _check_place(self) -> None:
        for name in ("block", "head"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise EditError(f"Site({name}={value!r}): {name} is an integer or None.")
        for name in ("stack", "module"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise EditError(f"Site({name}={value!r}): {name} is a non-empty name or None.")
        if self.module is not None:
            if self.block is not None or self.head is not None:
                raise EditError(
                    f"Site(module={self.module!r}) names its place by path;"
                    f" leave out block={self.block} and head={self.head}."
                )
            return
        if self.stream not in STREAMS:
            raise EditError(
                f"Site(stream={self.stream!r}): the streams are {', '.join(STREAMS)}. "
                "For any other place give module='dotted.path' (or 'dotted.path:input')."
            )
        if self.stream == "embedding":
            if self.block is not None:
                raise EditError(
                    f"Site(block={self.block}, stream='embedding'): the embedding belongs to no block;"
                    " use Site(stream='embedding')."
                )
        elif self.block is None:
            raise EditError(
                f"Site(stream={self.stream!r}) needs a block, such as Site(0, {self.stream!r});"
                " only 'embedding' and module= have none."
            )
        if self.head is not None and self.stream != "heads":
            raise EditError(
                f"Site(stream={self.stream!r}, head={self.head}): head= goes with stream='heads'."
            )
        if self.head is not None and self.head < 0:
            raise EditError(f"Site(head={self.head}): heads are counted from 0.")

    def _check_token(self) -> None:
        token = self.token
        named = isinstance(token, str) and token in TOKEN_NAMES
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not (named or whole or (callable(token) and not isinstance(token, type))):
            raise EditError(
                f"Site(token={token!r}): token is one of {', '.join(TOKEN_NAMES)}, an integer, or a callable"
                " (input_ids, real) -> positions or mask."
            )

    @property
    def place(self) -> str:
        """The site without its token, in words."""
        if self.module is not None:
            words = self.module
        elif self.stream == "embedding":
            words = "embedding"
        else:
            head = "" if self.head is None else f"[{self.head}]"
            words = f"block {self.block} {self.stream}{head}"
        return words if self.stack is None else f"{self.stack} {words}"

    @property
    def token_name(self) -> str:
        """The token in words."""
        if callable(self.token):
            return f"<{getattr(self.token, '__name__', type(self.token).__name__)}>"
        return str(self.token)

    def with_token(self, token: str | int | TokenChooser) -> Site:
        """Give the same place at another token."""
        return replace(self, token=token)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values, leaving out those at their defaults.

        Raises:
            EditError: the token is a callable, which no safe file can hold.
        """
        if callable(self.token):
            raise EditError(
                f"Site {self} selects tokens with a callable, which cannot be saved;"
                " use 'last', 'all', 'value' or an integer."
            )
        default = {
            "block": None,
            "stream": "residual_out",
            "token": "last",
            "stack": None,
            "head": None,
            "module": None,
        }
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) != default[name]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_dict`.

        Raises:
            EditError: a field is unknown or has an impossible value.
        """
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            raise EditError(f"A site has no field {unknown[0]!r}; its fields are {', '.join(_FIELDS)}.")
        token = fields.get("token", "last")
        if not isinstance(token, (str, int)):
            raise EditError(f"A saved site's token is a name or an integer, not {token!r}.")
        return cls(**fields)

    def __str__(self) -> str:
        """Give place and token in words."""
        return f"{self.place} @ {self.token_name}"
