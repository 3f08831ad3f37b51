"""Who calls: tokens become owners with scopes."""

from __future__ import annotations

import hashlib
import hmac
import logging

from mcp.server.auth.provider import AccessToken

from ..errors import SeerError
from ..scoped import CALL
from ..tools.seam import LOCAL_OWNER
from .oidc import Issuer
from .serving import Serving
from .tokens import SCOPES, Token, TokenFile

log = logging.getLogger(__name__)


class Access:
    """Accepts the tokens of a Serving. Of a token that is not known it does not say why."""

    def __init__(self, serving: Serving) -> None:
        token = serving.token.strip()
        self._one = hashlib.sha256(token.encode()).digest() if token else None
        self._users: TokenFile | None = serving.users
        self._issuer: Issuer | None = serving.issuer
        self._resource = serving.resource
        self._local = (CALL,) if serving.scope is not None else SCOPES[:4]

    async def verify_token(self, token: str) -> AccessToken | None:
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        if self._one is not None and hmac.compare_digest(digest, self._one):
            return self._made("local", LOCAL_OWNER, self._local, None)
        if (kept := self._kept(token)) is not None:
            expires = None if kept.expires is None else int(kept.expires)
            return self._made(f"token {kept.id}", kept.user, kept.scopes, expires)
        if self._issuer is not None and (claims := await self._issuer.check(token)) is not None:
            # Another name space than that of the token file: a subject cannot be chosen to be a user.
            owner = f"oidc:{claims.subject}"
            return self._made(claims.client, owner, claims.scopes, claims.expires)
        return None

    def _kept(self, token: str) -> Token | None:
        """Of a file that cannot be read or trusted no token opens; the log says what to do."""
        try:
            return self._users.find(token) if self._users is not None else None
        except (SeerError, OSError) as error:
            log.error("No token of the team opens: %s", error)
            return None

    def _made(
        self, client: str, owner: str, scopes: tuple[str, ...], expires: int | None
    ) -> AccessToken:
        return AccessToken(
            token="",
            client_id=client,
            scopes=list(scopes),
            subject=owner,
            expires_at=expires,
            resource=self._resource,
        )
