"""Every setting, read from `UNPOISON_*` variables; the defaults are a laptop's."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What each floor runs on."""

    model_config = SettingsConfigDict(env_prefix="UNPOISON_", extra="ignore")

    data_folder: Path = Field(default=Path.home() / ".local" / "share" / "unpoison", description="Where a laptop keeps everything.")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder.")
    queue_url: str = Field(default="", description="`redis://…` or `filesystem://FOLDER`; empty: a folder in the data folder.")
    objects_url: str = Field(default="", description="`file:///…`, `s3://bucket/prefix`, `gs://…` or `az://…`; empty: the data folder.")
    lease_seconds: float = Field(default=60.0, gt=0, description="How long a worker owns a job without a sign of life.")
    beat_seconds: float = Field(default=10.0, gt=0, description="How often a worker renews its lease.")
    sweep_seconds: float = Field(default=10.0, gt=0, description="How often lost jobs are looked for.")
    max_crashes: int = Field(default=3, ge=1, description="Crashes in a row without a new checkpoint before a job is given up.")
    max_job_seconds: float = Field(default=24 * 3600.0, gt=0, description="Longest run of a job that asks for no limit of its own.")
    checkpoint_seconds: float = Field(default=20.0, ge=0, description="Least time between two checkpoints of a stage.")
    engine_command: str = Field(default="", description="What runs the engine, before the job's folder; empty: this installation's own.")
    engine_memory_bytes: int | None = Field(default=None, description="Address-space limit of the engine; None: no limit (CUDA maps a lot).")
    engine_file_bytes: int = Field(default=64 << 30, description="Largest file the engine may write.")
    max_upload_bytes: int = Field(default=16 << 30, gt=0, description="Largest upload.")
    quota_uploads: int | None = Field(default=None, ge=0, description="Models and data sets a tenant may keep; None: no limit.")
    quota_bytes: int | None = Field(default=None, ge=0, description="Bytes of uploads a tenant may keep; None: no limit.")
    quota_jobs: int | None = Field(default=None, ge=0, description="Jobs a tenant may have waiting or running; None: no limit.")
    audit_days: float = Field(default=400.0, gt=0, description="How long entries of the audit log are kept.")
    upload_endpoint: str = Field(
        default="",
        description="Where clients reach the object store: `https://…`, or `cloud` for its provider's own address. Set, large files go straight there, in presigned parts.",
    )
    upload_part_bytes: int = Field(default=64 << 20, gt=0, description="Least size of a presigned part.")
    transfer_seconds: float = Field(default=86_400.0, gt=0, description="How long an upload in parts is kept without a new part.")
    intake_seconds: float = Field(default=1800.0, gt=0, description="Longest time one file may take to read.")
    intake_wait_seconds: float = Field(default=20.0, ge=0, description="How long an upload's answer waits for the file to be read.")
    sandbox: str = Field(default="best_effort", pattern="^(best_effort|required)$", description="`required`: not ready unless the fence proves itself.")
    host: str = Field(default="127.0.0.1", description="Where the API listens.")
    port: int = Field(default=8642, ge=0, le=65535, description="0 takes a free one.")

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_folder / 'unpoison.db'}"

    @property
    def queue(self) -> str:
        """The queue's URL."""
        return self.queue_url or f"filesystem://{self.data_folder / 'queue'}"

    @property
    def objects(self) -> str:
        """The object store's URL."""
        return self.objects_url or f"file://{self.data_folder / 'objects'}"

    @property
    def scratch(self) -> Path:
        """Where running jobs and uploads under way lie."""
        return self.data_folder / "scratch"
