"""Who may use what. Without keys in the configuration everybody may use everything."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.errors import Unauthorized


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What one API key stands for."""

    tenant: str = ""
    owners: frozenset[str] | None = None
    """Whose variants it may use; None: everybody's. The base is open to every key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedKey:
    sha256: str
    account: Account


ANYBODY = Account()


def authenticate(keys: Sequence[HashedKey], authorization: str | None) -> Account:
    """The account of an `Authorization` header. Takes the same time whichever key matches.

    Raises:
        Unauthorized: keys are configured and the header brings none of them.
    """
    if not keys:
        return ANYBODY
    scheme, _, token = (authorization or "").partition(" ")
    given = hashlib.sha256(token.strip().encode()).hexdigest()
    matches = [key.account for key in keys if hmac.compare_digest(key.sha256, given)]
    if scheme.lower() != "bearer" or not matches:
        raise Unauthorized("Give a valid API key in the header `Authorization: Bearer KEY`.")
    return matches[0]
