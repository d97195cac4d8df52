"""rollback: the previous champion answers again, within seconds, without copying anything.

Makes: a new routing table, the alias `champion`, a ledger entry, the event `tirewatch.model.rolled-back`. Needs: Triton, S3,
MLflow. By hand: `prefect deployment run 'rollback/tire' -p why='...'`, or, quicker, `tirewatch rollback tire --why '...'`.
"""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.settings import settings


@flow(name="rollback", flow_run_name="rollback {model}")
def rollback(model: str, why: str) -> State[Any]:
    """Withdraw the version in production; the one it replaced answers again.

    Args:
        model: Registered model, and public name of the Triton model.
        why: What was wrong with the version; it stands in the ledger for ever.
    """
    from tasks.rollback import roll_back

    here = settings()
    who = f"flow-run/{flow_run.get_id() or 'by-hand'}"
    done = roll_back(here.serving_root, here.triton, here.store, here.mlflow_tracking_uri, model, who, why)
    return Completed(name="RolledBack", message=f"{model} v{done.version} answers again instead of v{done.withdrawn}")
