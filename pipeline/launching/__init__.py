"""Before a job starts and after it ended: checks, snapshots, submission, its verdict."""
