"""Jobs on training sets, with or without a model, the data sets they make, and pictures that are resized when they are read.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.add_column(sa.Column("origin_job_id", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("resize", sa.Integer(), nullable=True))
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.alter_column("model_id", existing_type=sa.String(length=40), nullable=True)
        batch_op.add_column(sa.Column("suspect_dataset_id", sa.String(length=40), nullable=True))
        batch_op.add_column(sa.Column("cleansed_dataset_id", sa.String(length=40), nullable=True))
        batch_op.create_index(batch_op.f("ix_job_suspect_dataset_id"), ["suspect_dataset_id"], unique=False)


def downgrade() -> None:
    op.execute("DELETE FROM job WHERE model_id IS NULL")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_job_suspect_dataset_id"))
        batch_op.drop_column("cleansed_dataset_id")
        batch_op.drop_column("suspect_dataset_id")
        batch_op.alter_column("model_id", existing_type=sa.String(length=40), nullable=False)
    with op.batch_alter_table("dataset", schema=None) as batch_op:
        batch_op.drop_column("resize")
        batch_op.drop_column("origin_job_id")
