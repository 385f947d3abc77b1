"""Which key opens which routes, as FastAPI dependencies.

    keys given       API              reading /admin   changing the pools
    none             everybody        everybody        everybody
    API keys         an API key       an API key       nobody
    admin keys       everybody        an admin key     an admin key
    both             a key of either  an admin key     an admin key

Clients and operators are different people: who may ask for text may not drain a worker.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from router.api_keys import ApiKeys


@dataclass(frozen=True, slots=True)
class Access:
    """Each method lets a request pass, or raises HTTPException: 401 without a key, 403 with a
    key that is not enough."""

    api_keys: ApiKeys
    admin_keys: ApiKeys

    async def use(self, request: Request) -> None:
        """To the API. Notes whose request it is."""
        given = _given(request)
        client = self.api_keys.client(given)
        if client is None and self.admin_keys:
            client = self.admin_keys.client(given)
        if client is None:
            raise _unknown("API key")
        request.state.client = client

    async def read(self, request: Request) -> None:
        """To what ``/admin`` tells."""
        if not self.admin_keys:
            await self.use(request)
        elif self.admin_keys.client(_given(request)) is None:
            if self.api_keys and self.api_keys.client(_given(request)) is not None:
                raise HTTPException(403, "this needs an admin key, and the key given is an API key")
            raise _unknown("admin key")

    async def change(self, request: Request) -> None:
        """To change the pools; follows ``read``."""
        if self.api_keys and not self.admin_keys:
            raise HTTPException(
                403, "changing the pools needs an admin key: start the router with --admin-api-key"
            )


def _given(request: Request) -> str:
    return request.headers.get("authorization", "")


def _unknown(kind: str) -> HTTPException:
    return HTTPException(401, f"the {kind} is missing or wrong", {"WWW-Authenticate": "Bearer"})
