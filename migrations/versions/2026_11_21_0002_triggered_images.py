"""Jobs without clean images, and with triggered ones.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.alter_column("dataset_id", existing_type=sa.String(length=40), nullable=True)
        batch_op.add_column(sa.Column("triggered_dataset_id", sa.String(length=40), nullable=True))
        batch_op.create_index(batch_op.f("ix_job_triggered_dataset_id"), ["triggered_dataset_id"], unique=False)


def downgrade() -> None:
    op.execute("DELETE FROM job WHERE dataset_id IS NULL")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_job_triggered_dataset_id"))
        batch_op.drop_column("triggered_dataset_id")
        batch_op.alter_column("dataset_id", existing_type=sa.String(length=40), nullable=False)
