"""`transactions` takes new rows only: the database refuses to change what it says about money, whoever asks.

For each statement, not for each row, so that one that would touch nothing is refused too; ALWAYS, so that neither a superuser nor a replica's session
(`session_replication_role`) passes by.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
                USING ERRCODE = 'restrict_violation', HINT = 'What is wrong in it is put right by another row.';
        END
        $$""")
    op.execute("""
        CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON transactions FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()""")
    op.execute("ALTER TABLE transactions ENABLE ALWAYS TRIGGER append_only")
