import pytest

from .cases import Case


@pytest.fixture
def case():
    return Case()
