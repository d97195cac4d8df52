"""The probe load: what goes wrong with a request is counted, whatever it is, and the load goes on."""

from tasks.probe import ProbeLoad
from tasks.serving import TritonAddress


def test_a_connection_that_is_cut_is_a_failed_request_and_not_the_end_of_the_load(gateway):
    """A server that dies in the middle of a switch cuts what it was asked: the switch must be undone for it."""
    cut = gateway("http://127.0.0.1:9")
    cut.before = lambda path, headers: False
    address = TritonAddress(cut.url.removeprefix("http://"), "127.0.0.1:9")
    with ProbeLoad(address, "tire", [b"a photograph"], lanes=("http",)) as load:
        load.wait_for(3, within=10)
    assert len(load.probes) >= 3 and all(probe.error and probe.version is None for probe in load.probes)
