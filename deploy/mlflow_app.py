"""MLflow's server as an application for uvicorn: `uvicorn --factory deploy.mlflow_app:create_app`.

`mlflow server` makes the tables of its database before it starts uvicorn. Without that, two first requests at once both make
them, one fails, and the server answers 500 for ever (seen with 3.17.2): so they are made here, before anybody can ask.
"""

import os
from typing import Any


def create_app() -> Any:
    from mlflow.server.handlers import initialize_backend_stores

    database = os.environ["_MLFLOW_SERVER_FILE_STORE"]
    initialize_backend_stores(database, database, os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"])
    from mlflow.server.fastapi_app import app

    return app
