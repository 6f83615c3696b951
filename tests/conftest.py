"""Settings shared by all tests."""
from hypothesis import settings

settings.register_profile("minitensor", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("minitensor")
