import pytest
from training import small

from niwaki.tasks import Task


@pytest.fixture
def small_task() -> Task:
    """A task that trains in a moment: which side of a plane a point lies on."""
    return small.plane()
