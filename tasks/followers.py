"""Which deployments an event starts, as the Prefect server's automations have it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.orchestration.routes import ServerRoutes

_PAGE: Final = 200
_UNFINISHED: Final = {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED"]}}


@dataclass(frozen=True)
class Follower:
    """A deployment that an automation starts when `event` comes for `resource`. active: parameters of its unfinished runs."""

    event: str
    resource: str
    stage: str  # <flow>/<deployment>
    active: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The dataset or model: `tire` of `tirewatch.dataset.tire`."""
        return self.resource.rsplit(".", 1)[-1]

    def is_at(self, parameters: Mapping[str, Any]) -> bool:
        """Whether an unfinished run has these parameters already."""
        return any(all(run.get(key) == value for key, value in parameters.items()) for run in self.active)


def read_followers(event: str) -> list[Follower]:
    """Deployments that enabled automations start on this event. Call it synchronously, with PREFECT_API_URL set."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [
            Follower(event, resource, *_stage_and_active(client, deployment))
            for automation in _all_of(client, "/automations/filter", {})
            if automation["enabled"] and event in (automation["trigger"].get("expect") or ())
            for resource in [(automation["trigger"].get("match") or {}).get("prefect.resource.id")]
            if isinstance(resource, str)
            for deployment in _started_by(automation)
        ]


def _started_by(automation: Mapping[str, Any]) -> Iterator[str]:
    for action in automation["actions"]:
        if action["type"] == "run-deployment" and action.get("deployment_id"):
            yield action["deployment_id"]


def _stage_and_active(client: "SyncPrefectClient", identity: str) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    deployment = client.request("GET", "/deployments/{id}", path_params={"id": identity}).json()
    flow = client.request("GET", "/flows/{id}", path_params={"id": deployment["flow_id"]}).json()
    wanted = {"deployments": {"id": {"any_": [identity]}}, "flow_runs": {"state": _UNFINISHED}}
    runs = _all_of(client, "/flow_runs/filter", wanted)
    return f"{flow['name']}/{deployment['name']}", tuple(run["parameters"] for run in runs)


def _all_of(client: "SyncPrefectClient", path: "ServerRoutes", wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every page of what a filter route finds."""
    found: list[dict[str, Any]] = []
    while True:
        page = client.request("POST", path, json={**wanted, "limit": _PAGE, "offset": len(found)}).json()
        found += page
        if len(page) < _PAGE:
            return found
