from . import cases
def test_x(): assert cases.A==1
