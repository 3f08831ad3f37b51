"""Who may call, and what belongs to the workspace: environment, apps, secrets, prices."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpclib import Status
from modal_proto import api_pb2

from . import ids
from .errors import not_found, refuse
from .ledger import CORE_SECOND, GIB_SECOND, GPU_PER_SECOND
from .service import Context

BUILDER_VERSION = "2025.06"
CREATE = api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING
CREATE_NEW = api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS
OVERWRITE = api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS
ANONYMOUS = (
    api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
    api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL,
)


@dataclass
class Secret:
    id: str
    name: str
    env: dict[str, str] = field(repr=False)
    created: float = field(default_factory=time.time)

    def metadata(self) -> api_pb2.SecretMetadata:
        return api_pb2.SecretMetadata(
            name=self.name,
            keys=sorted(self.env),
            creation_info=api_pb2.CreationInfo(created_at=self.created, created_by="tests"),
            environment_name="main",
        )


class Accounts:
    def __init__(self, token_id: str, token_secret: str) -> None:
        self.token_id = token_id
        self.token_secret = token_secret
        self.refusal = ""
        """A status name with which every call is refused, e.g. PERMISSION_DENIED."""
        self.rates = True
        """Whether the workspace's prices can be asked for."""
        self.apps: dict[str, str] = {}
        """Id -> name."""
        self.secrets: dict[str, Secret] = {}
        self._auth_tokens: set[str] = set()

    def admit(self, rpc: str, metadata: Mapping[str, str]) -> None:
        """Every call carries the token; calls for version 2 sandboxes also what AuthTokenGet gave."""
        if self.refusal:
            refuse(Status[self.refusal], f"planned fault: {self.refusal}")
        if (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret")) != (
            self.token_id,
            self.token_secret,
        ):
            refuse(Status.UNAUTHENTICATED, "Token ID or secret is invalid.")
        version_2 = rpc.endswith("V2") or rpc in ("SandboxSetName", "SandboxGetCommandRouterAccess")
        if version_2 and metadata.get("x-modal-auth-token") not in self._auth_tokens:
            refuse(Status.UNAUTHENTICATED, "the auth token is missing or unknown")

    async def ClientHello(self, _request: Any, _: Context) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse(image_builder_version=BUILDER_VERSION)

    async def AuthTokenGet(self, _request: Any, _: Context) -> api_pb2.AuthTokenGetResponse:
        token = ids.jwt(1200)
        self._auth_tokens.add(token)
        return api_pb2.AuthTokenGetResponse(token=token)

    async def EnvironmentGetOrCreate(
        self, request: api_pb2.EnvironmentGetOrCreateRequest, _: Context
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        name = request.deployment_name or "main"
        metadata = api_pb2.EnvironmentMetadata(name=name, settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id="en-0000000000000000000000", metadata=metadata
        )

    async def AppGetOrCreate(
        self, request: api_pb2.AppGetOrCreateRequest, _: Context
    ) -> api_pb2.AppGetOrCreateResponse:
        found = [app for app, name in self.apps.items() if request.app_name in (app, name)]
        if not found:
            if request.object_creation_type != CREATE:
                not_found(f"App {request.app_name!r}")
            found = [ids.new("ap")]
            self.apps[found[0]] = request.app_name
        metadata = api_pb2.AppHandleMetadata(
            app_id=found[0], description=self.apps[found[0]], environment_name="main"
        )
        return api_pb2.AppGetOrCreateResponse(app_id=found[0], handle_metadata=metadata)

    def app_named(self, name: str) -> str:
        """The app's id; refuses with NOT_FOUND."""
        found = [app for app, called in self.apps.items() if called == name]
        if not found:
            not_found(f"App {name!r}")
        return found[0]

    async def WorkspaceNameLookup(
        self, _request: Any, _: Context
    ) -> api_pb2.WorkspaceNameLookupResponse:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name="tests", username="tests")

    async def WorkspaceBillingRates(
        self, _request: Any, _: Context
    ) -> api_pb2.WorkspaceBillingRatesResponse:
        """The names of the keys are ours: facts about the real ones are missing."""
        if not self.rates:
            refuse(Status.UNIMPLEMENTED, "this workspace does not tell its prices")
        rates = {f"gpu_{name.lower()}": price for name, price in GPU_PER_SECOND.items()}
        rates |= {"sandbox_cpu": CORE_SECOND, "sandbox_memory": GIB_SECOND}
        shown = {name: f"{price:.8f}" for name, price in rates.items()}
        return api_pb2.WorkspaceBillingRatesResponse(rates=shown, formatted=str(shown))

    async def SecretGetOrCreate(
        self, request: api_pb2.SecretGetOrCreateRequest, _: Context
    ) -> api_pb2.SecretGetOrCreateResponse:
        kind = request.object_creation_type
        if kind in ANONYMOUS:
            secret = Secret(ids.new("st"), "", dict(request.env_dict))
        else:
            secret = self._named(request)
            missing = set(request.required_keys) - set(secret.env)
            if missing:
                keys = ", ".join(sorted(missing))
                refuse(Status.FAILED_PRECONDITION, f"Secret {secret.name!r} has no key {keys}")
        self.secrets[secret.id] = secret
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret.id, metadata=secret.metadata())

    def _named(self, request: api_pb2.SecretGetOrCreateRequest) -> Secret:
        name, kind = request.deployment_name, request.object_creation_type
        found = next((one for one in self.secrets.values() if one.name == name), None)
        if found and kind == CREATE_NEW:
            refuse(Status.ALREADY_EXISTS, f"Secret {name!r} exists")
        if found and kind == OVERWRITE:
            found.env = dict(request.env_dict)
        if found is None:
            if kind not in (CREATE, CREATE_NEW, OVERWRITE):
                not_found(f"Secret {name!r}")
            found = Secret(ids.new("st"), name, dict(request.env_dict))
        return found

    def keep(self, name: str, env: dict[str, str]) -> None:
        """Have a named secret, as if it was made on the dashboard."""
        secret = next((one for one in self.secrets.values() if one.name == name), None)
        secret = secret or Secret(ids.new("st"), name, {})
        secret.env = dict(env)
        self.secrets[secret.id] = secret

    def secret(self, secret_id: str) -> Secret:
        if secret_id not in self.secrets:
            not_found(f"Secret {secret_id}")
        return self.secrets[secret_id]

    async def SecretGetInfo(
        self, request: api_pb2.SecretGetInfoRequest, _: Context
    ) -> api_pb2.SecretGetInfoResponse:
        return api_pb2.SecretGetInfoResponse(metadata=self.secret(request.secret_id).metadata())

    async def SecretList(
        self, request: api_pb2.SecretListRequest, _: Context
    ) -> api_pb2.SecretListResponse:
        named = sorted(
            (one for one in self.secrets.values() if one.name), key=lambda one: -one.created
        )
        before = request.pagination.created_before
        items = [
            api_pb2.SecretListItem(
                label=one.name, secret_id=one.id, created_at=one.created, metadata=one.metadata()
            )
            for one in named
            if not before or one.created < before
        ]
        return api_pb2.SecretListResponse(items=items[: request.pagination.max_objects or None])

    async def SecretUpdate(self, request: api_pb2.SecretUpdateRequest, _: Context) -> None:
        env = self.secret(request.secret_id).env
        for update in request.updates:
            env[update.key] = update.value

    async def SecretDelete(self, request: api_pb2.SecretDeleteRequest, _: Context) -> None:
        self.secret(request.secret_id)
        del self.secrets[request.secret_id]

    def environment(self, sources: Any) -> dict[str, str]:
        """What a list of SecretSource adds to the environment; later ones win."""
        env: dict[str, str] = {}
        for source in sources:
            if source.HasField("secret_id"):
                env |= self.secret(source.secret_id).env
            else:
                env |= dict(source.env.contents)
        return env
