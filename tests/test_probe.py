"""The probe load: what goes wrong with a request is counted, whatever it is, and the load goes on."""

from tasks.probe import Probe, ProbeLoad, SwapProof, judge_swap
from tasks.serving import TritonAddress


def test_a_connection_that_is_cut_is_a_failed_request_and_not_the_end_of_the_load(gateway):
    """A server that dies in the middle of a switch cuts what it was asked: the switch must be undone for it."""
    cut = gateway("http://127.0.0.1:9")
    cut.before = lambda path, headers: False
    address = TritonAddress(cut.url.removeprefix("http://"), "127.0.0.1:9")
    with ProbeLoad(address, "tire", [b"a photograph"], lanes=("http",)) as load:
        load.wait_for(3, within=10)
    assert len(load.probes) >= 3 and all(probe.error and probe.version is None for probe in load.probes)


STEADY = [Probe(at / 100, at / 100 + 0.01, "grpc", 1) for at in range(100)]  # until second 1
AFTER = [Probe(3 + at / 100, 3.01 + at / 100, "grpc", 2) for at in range(100)]


def judged(*probes: Probe) -> SwapProof:
    """Loaded from second 1 on, switched at second 2."""
    return judge_swap(probes, 1, 2, began=1.005, switched=(2.0, 2.1), late_ms=500)


def test_a_request_that_failed_after_the_load_began_takes_the_switch_back():
    found = judged(*STEADY, Probe(1.2, 1.3, "http", error="cut"), *AFTER)
    assert (found.failed, found.failed_before, found.holds) == (1, 0, False) and found.errors == ("cut",)


def test_what_failed_before_the_load_began_is_told_and_does_not_condemn_the_new_version():
    found = judged(*STEADY, Probe(0.5, 0.6, "grpc", error="the champion has no number"), *AFTER)
    assert (found.failed, found.failed_before, found.holds) == (0, 1, True)
    assert found.figures["swap_failed_before"] == 1 and found.figures["swap_failed_requests"] == 0
    assert "1 that the former champion did not answer are not counted" in found.measured


def test_a_champion_that_failed_before_is_not_taken_for_the_new_version_while_that_is_loaded():
    failing = [Probe(at, at + 0.01, "grpc", error="no number") for at in (0.5, 1.5, 1.99)]
    assert judged(*STEADY, *failing, *AFTER).holds
    found = judged(*STEADY, *failing, *AFTER, Probe(3, 3.1, "grpc", error="no number"))
    assert (found.failed, found.failed_before, found.holds) == (1, 3, False)


def test_a_new_version_that_answered_nothing_is_no_proof():
    found = judged(*STEADY)
    assert not found.holds and "the new version answered nothing" in found.measured
    assert found.ratio is None and "swap_p99_ms" not in found.figures
    assert not judged().holds
