"""S3 in and out: list with paging, read, write, write if absent, read many."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Store:
    """One bucket and how to reach it; small enough to travel between tasks."""

    bucket: str
    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    region: str = "us-east-1"

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    @property
    def lance_options(self) -> dict[str, str]:
        """`storage_options` of lance.dataset for this bucket."""
        options = {"aws_region": self.region, "aws_virtual_hosted_style_request": "false"}
        if self.endpoint_url:
            options |= {"aws_endpoint": self.endpoint_url, "allow_http": str(self.endpoint_url.startswith("http:")).lower()}
        if self.access_key_id and self.secret_access_key:
            options |= {"aws_access_key_id": self.access_key_id, "aws_secret_access_key": self.secret_access_key}
        return options
