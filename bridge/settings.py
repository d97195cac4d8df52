"""Settings of the bridge, read from `TIREWATCH_BRIDGE_<FIELD>`."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class BridgeSettings(BaseSettings):
    """Who may post, which bucket counts, which queue is read, where events go and where pending batches are kept."""

    model_config = SettingsConfigDict(env_prefix="TIREWATCH_BRIDGE_", frozen=True)

    token: SecretStr = Field(min_length=16, description="What a sender must present as bearer token or basic password")
    bucket: str = Field("tirewatch", description="Objects of any other bucket are ignored")
    prefect_api_url: str = Field("http://127.0.0.1:4200/api", description="API of the Prefect server")
    prefect_authorization: SecretStr | None = Field(
        None, description="Authorization header for a Prefect server that asks for one, for example `Basic ...`"
    )
    state: Path = Field(
        Path("bridge.db"),
        description="SQLite file of pending batches, accepted sealings and dead letters: on a disk that stays",
    )
    quiet_seconds: float = Field(
        20.0, gt=0, description="A batch without a marker is sealed this long after its last object"
    )
    answer_within: float = Field(
        5.0, gt=0, description="Seconds a sender waits for Prefect; the batch is on disk before that"
    )
    max_body_bytes: int = Field(2 * 2**20, gt=0, description="Larger requests are refused")
    keep_sealings_days: float = Field(
        30.0,
        gt=0,
        description="An event told again after this many days seals its batch again (ingest then changes nothing)",
    )
    open_metrics: bool | None = Field(
        None,
        description="Whether /metrics answers without the token; empty: only over loopback and not through a proxy",
    )

    queue_url: str | None = Field(
        None, pattern=r"^https?://", description="SQS queue with the bucket's notifications; empty: no queue is read"
    )
    sqs_endpoint_url: str | None = Field(None, description="Endpoint of SQS; empty for AWS")
    sqs_region: str | None = Field(
        None, description="Region of the queue; empty: as its URL says, else the usual AWS chain"
    )
    sqs_access_key_id: str | None = Field(None, description="Empty: the usual AWS credential chain")
    sqs_secret_access_key: SecretStr | None = Field(None, description="Empty: the usual AWS credential chain")
    sqs_wait_seconds: int = Field(20, ge=0, le=20, description="How long one request waits for messages (long polling)")
    poison_receives: int = Field(
        5,
        ge=1,
        description="Where the queue has no redrive policy, a message nobody understands is kept here after so many",
    )
