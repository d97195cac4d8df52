"""Settings of the bridge, read from `TIREWATCH_BRIDGE_<FIELD>`."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class BridgeSettings(BaseSettings):
    """Who may post, which bucket counts, where events go and where pending batches are kept."""

    model_config = SettingsConfigDict(env_prefix="TIREWATCH_BRIDGE_", frozen=True)

    token: SecretStr = Field(min_length=16, description="What a sender must present as bearer token or basic password")
    bucket: str = Field("tirewatch", description="Objects of any other bucket are ignored")
    prefect_api_url: str = Field("http://127.0.0.1:4200/api", description="API of the Prefect server")
    prefect_authorization: SecretStr | None = Field(
        None, description="Authorization header for a Prefect server that asks for one, for example `Basic ...`"
    )
    state: Path = Field(Path("bridge.db"), description="SQLite file of the batches that wait to be sealed")
    quiet_seconds: float = Field(
        20.0, gt=0, description="A batch without a marker is sealed this long after its last object"
    )
    answer_within: float = Field(
        5.0, gt=0, description="Seconds a sender waits for Prefect before the batch is kept on disk"
    )
    max_body_bytes: int = Field(2 * 2**20, gt=0, description="Larger requests are refused")
