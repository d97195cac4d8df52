"""stage: a registered version on a Triton server of its own, for a while: the environment in which people test it.

Makes: a server with the launch line and front door of production, the alias `staged`, a page with its addresses. Needs: MLflow,
and S3 where the version is quantized. Nothing of production changes, and nobody is routed to it.
By hand: `prefect deployment run 'stage/tire' -p version=7 -p minutes=120`; cancelling the run ends it earlier.
"""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.promote import export, find_candidate
from flows.settings import Settings, settings
from tasks.export import Export
from tasks.storage import NETWORK_RETRY

if TYPE_CHECKING:
    from tasks.registry import ModelCard, TrainedModel
    from tasks.scratch import ScratchServer
    from tasks.serving import TritonAddress


@flow(name="stage", flow_run_name="stage {model}")
def stage(
    model: str,
    version: int | None = None,
    minutes: Annotated[float, Field(gt=0, le=7 * 24 * 60)] = 60,
    artifact: Export = Export(),
) -> State[Any]:
    """Serve a registered version beside production, under its public name and on ports of its own, and end after a while.

    Args:
        model: Registered model, and public name of the Triton model.
        version: Registered version; the newest one when left empty.
        minutes: How long it is served.
        artifact: In which form it is served; that of `promote` unless told otherwise.
    """
    from tasks.scratch import ScratchServer

    here = settings()
    candidate, card = find_candidate(here, model, version)
    with TemporaryDirectory(prefix="tirewatch-stage-") as folder:
        apart = here.model_copy(
            update={"serving_root": Path(folder)}
        )  # a promotion of the same version may run meanwhile
        staged = export(apart, candidate, card, artifact)
        with ScratchServer(here.triton_python, staged, apart.serving_root, here.cpu_accelerator) as server:
            until = datetime.now(UTC) + timedelta(minutes=minutes)
            announce(here, candidate, card, server.address, until)
            keep(server, until)
    return Completed(name="Ended", message=f"{model} v{candidate.version} was served for {minutes:g} minutes")


@task(**NETWORK_RETRY, cache_policy=NO_CACHE)
def announce(
    here: Settings, candidate: "TrainedModel", card: "ModelCard", address: "TritonAddress", until: datetime
) -> None:
    """The alias, and a page that says where the version answers."""
    from tasks.registry import STAGED, set_alias

    set_alias(here.mlflow_tracking_uri, candidate.name, STAGED, candidate.version)
    title = f"{candidate.name} v{candidate.version} for testing"
    create_markdown_artifact(
        key=f"stage-{candidate.name.replace('_', '-')}",
        markdown=page(title, candidate, card, address, until),
        description=f"{title}, until {until:%H:%M} UTC",
    )


def page(title: str, candidate: "TrainedModel", card: "ModelCard", address: "TritonAddress", until: datetime) -> str:
    """Addresses, and a request to begin with."""
    return f"""# {title}

| | |
| --- | --- |
| Triton, HTTP | `{address.http}` |
| Triton, gRPC | `{address.grpc}` |
| model | `{candidate.name}`, as in production |
| data | {card.dataset} v{card.dataset_version}, `{card.dataset_digest}` |
| MLflow run | `{candidate.run_id}` |
| ends | {until:%Y-%m-%d %H:%M} UTC, or when this run is cancelled |

```python
import numpy as np, tritonclient.http as triton

photograph = np.fromfile("photograph.jpg", dtype=np.uint8)[None]
image = triton.InferInput("image", photograph.shape, "UINT8")
image.set_data_from_numpy(photograph)
answer = triton.InferenceServerClient("{address.http}").infer("{candidate.name}", [image])
print(answer.as_numpy("label"), answer.as_numpy("score"), answer.as_numpy("model_version"))
```

It has passed no gate. Production answers as before.
"""


def keep(server: "ScratchServer", until: datetime) -> None:
    """Waits until then. Raises RuntimeError with the server's last words when it ends before."""
    from tasks.scratch import last_words

    while (left := (until - datetime.now(UTC)).total_seconds()) > 0:
        if not server.is_running:
            raise RuntimeError(f"the server ended before its time: {last_words(server.log())}")
        time.sleep(min(1.0, left))
