"""The guard's stores on databases that many machines share; the drivers load where first needed.

`Guard("postgresql://user@host/db")` needs the extra `postgres`, `Guard("redis://host:6379/0")` the extra `redis`,
`Guard("dynamodb://table?region=eu-central-1")` the extra `dynamodb`, `Guard("mongodb://host/db")` the extra `mongodb`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ledger import Store, UsageError

#: scheme of a URL → module, class, extra, and the packages that come with the extra
_STORES = {
    "postgresql": ("postgres", "PostgresStore", "postgres", ("psycopg",)),
    "postgres": ("postgres", "PostgresStore", "postgres", ("psycopg",)),
    "redis": ("redis", "RedisStore", "redis", ("redis",)),
    "rediss": ("redis", "RedisStore", "redis", ("redis",)),
    "dynamodb": ("dynamodb", "DynamoStore", "dynamodb", ("boto3", "botocore")),
    "mongodb": ("mongodb", "MongoStore", "mongodb", ("pymongo", "bson")),
    "mongodb+srv": ("mongodb", "MongoStore", "mongodb", ("pymongo", "bson")),
}


def open_store(url: str, **settings: Any) -> Store:
    """The store of a URL; it connects when it is first used.

    Raises `UsageError` for a scheme that is none, or when the driver is not installed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in _STORES:
        known = ", ".join(f"{name}://" for name in _STORES)
        raise UsageError(
            f"there is no store for {scheme}://; a plain path, sqlite:///path, memory:// and {known} can be used"
        )
    module, kind, extra, drivers = _STORES[scheme]
    try:
        found = importlib.import_module(f"ledger_stores.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in drivers:
            raise
        raise UsageError(
            f'{scheme}:// needs a driver that is not installed; pip install "ledger-guard[{extra}]"'
        ) from error
    store: Store = getattr(found, kind)(url, **settings)
    return store
