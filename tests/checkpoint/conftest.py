import pytest

from tests.checkpoint.hostile_process import hostile_reader


@pytest.fixture(scope="session")
def hostile():
    with hostile_reader() as reader:
        yield reader
