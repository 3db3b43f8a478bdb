"""The training behind the command line, and the record of a run."""

from niwaki.training.jobs import Job, job, run
from niwaki.training.record import Record, read

__all__ = ["Job", "Record", "job", "read", "run"]
