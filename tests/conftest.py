"""Settings of all tests."""

from hypothesis import settings

# No test is timed, and every run of the suite sees the same examples.
settings.register_profile("niwaki", deadline=None, derandomize=True)
settings.load_profile("niwaki")
