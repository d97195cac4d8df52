"""The one frozen settings class, and the only reader of the environment."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.serving import TritonAddress
from tasks.storage import Store

if TYPE_CHECKING:
    from tasks.sample_cache import Cache


class Settings(BaseSettings):
    """Where everything is. Every field is read from `TIREWATCH_<FIELD>`; `tirewatch up` sets them for its own stack."""

    model_config = SettingsConfigDict(env_prefix="TIREWATCH_", frozen=True)

    s3_bucket: str = Field("tirewatch", description="Bucket of photographs, datasets, captures and the ledger")
    s3_endpoint_url: str | None = Field(None, description="S3 endpoint; empty for AWS")
    s3_access_key_id: str | None = Field(None, description="Empty: the usual AWS credential chain")
    s3_secret_access_key: SecretStr | None = Field(None, description="Empty: the usual AWS credential chain")
    s3_region: str = Field("us-east-1", description="Region of the bucket")

    mlflow_tracking_uri: str = Field("http://127.0.0.1:5000", description="MLflow tracking and registry server")
    prefect_ui_url: str = Field("http://127.0.0.1:4200", description="Prefect UI, for links in reports and alerts")

    serving_root: Path = Field(
        Path(".tirewatch/serving"),
        description="Directory on the server's file system: model_repository/, staging/, routing/ and spool/",
    )
    triton_http: str = Field("127.0.0.1:8000", description="host:port of Triton's HTTP endpoint")
    triton_grpc: str = Field("127.0.0.1:8001", description="host:port of Triton's gRPC endpoint")
    triton_admin_key: SecretStr | None = Field(None, description="Key of Triton's restricted APIs (model control)")
    triton_python: Path = Field(
        Path(".venv-triton/bin/python"), description="Python of the serving environment, for scratch servers"
    )
    capture_share: float = Field(
        0.05, ge=0, le=1, description="Share of the traffic that front doors capture for drift and review"
    )
    cpu_accelerator: Literal["openvino", "onnxruntime"] = Field(
        "openvino", description="What runs the ONNX network where there is no GPU"
    )
    training_limit: str | None = Field(
        None,
        description="Global concurrency limit that each training holds; empty: `gpu` where there is a GPU, else none",
    )
    ray_address: str | None = Field(
        None,
        description="Ray cluster that examines and writes the photographs of a batch (`ray://head:10001`, or `auto`); "
        "empty: threads of the flow's own process",
    )
    cache_dir: Path = Field(
        Path(".tirewatch/cache"),
        description="Local directory of decoded photographs, shared by every run on the machine",
    )
    cache_gb: float = Field(
        10.0, ge=0, description="What they may take there; the least recently used make room. 0: every run decodes anew"
    )

    search_storage: SecretStr = Field(
        SecretStr("sqlite:///.tirewatch/search.db"),
        description="Optuna storage of searches, shared by their workers; a database server's address in production",
    )

    @property
    def cache(self) -> "Cache":
        from tasks.sample_cache import Cache

        return Cache(self.cache_dir.absolute(), int(self.cache_gb * 1e9))

    @property
    def store(self) -> Store:
        return Store(
            bucket=self.s3_bucket,
            endpoint_url=self.s3_endpoint_url,
            access_key_id=self.s3_access_key_id,
            secret_access_key=self.s3_secret_access_key.get_secret_value() if self.s3_secret_access_key else None,
            region=self.s3_region,
        )

    @property
    def triton(self) -> TritonAddress:
        key = self.triton_admin_key.get_secret_value() if self.triton_admin_key else None
        return TritonAddress(self.triton_http, self.triton_grpc, key)


@cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
