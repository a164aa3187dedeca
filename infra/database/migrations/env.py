"""Alembic's hook: runs the migrations on the connection that `run.py` hands over."""

from alembic import context

from infra.database.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, include_schemas=True)
with context.begin_transaction():
    context.run_migrations()
