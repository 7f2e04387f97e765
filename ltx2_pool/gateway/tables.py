"""What the database holds: one row for each job, from its request until its video has expired."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

metadata = MetaData()
videos = Table(
    "videos",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Integer, nullable=False, default=0),
    Column("model", String(256), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("size", String(64), nullable=False),
    Column("seconds", String(64), nullable=False),
    Column("created", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("expires", Double),
    Column("remixed_from", String(64)),
    Column("error_code", String(64)),
    Column("error", Text),
    Column("content", String(256)),
    Column("bytes", Integer, nullable=False, default=0),
    Column("etag", String(80), nullable=False, default=""),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Double, nullable=False),
    Column("claim", String(64)),
    Column("claimed_until", Double),
    Column("deleted", Boolean, nullable=False, default=False),
    Column("idempotency_key", String(256)),
    Column("fingerprint", String(64)),
    UniqueConstraint("owner", "idempotency_key"),
    Index("videos_by_owner", "owner", "id"),
    Index("videos_by_status", "status", "created"),
    Index("videos_by_expiry", "expires"),
)
