"""The training loop behind the command line, and the record of a run."""

from niwaki.training.jobs import Job, job, run
from niwaki.training.loop import evaluate, fit
from niwaki.training.record import Record, read

__all__ = ["Job", "Record", "evaluate", "fit", "job", "read", "run"]
