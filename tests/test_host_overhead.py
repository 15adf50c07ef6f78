"""The benchmark of the host's own work in a step."""

from support.configs import make_digits

from marjax.benchmarks.host_overhead import host_work


def test_what_is_measured():
    found = host_work(make_digits(), steps=20)
    assert found["devices"] == 1 and found["arrays"] > 100 and found["steps"] == 20
    assert 0 < found["seconds"] <= found["seconds_p90"]
