import json
import threading

import pytest

from tasks.routing import Route, RoutingTable, promoted, read_routing, routing_file, write_routing

FIRST, SECOND, THIRD = (Route("tire_onnx_32", version) for version in (1, 2, 3))


def test_a_table_comes_back_as_it_was_written_and_says_when(tmp_path):
    table = RoutingTable("tire", SECOND, FIRST, THIRD, share=0.25, revision=4)
    written = write_routing(tmp_path, table)
    assert read_routing(tmp_path, "tire") == written
    assert written.changed_at.endswith("+00:00")
    assert (written.champion, written.previous, written.challenger, written.share) == (SECOND, FIRST, THIRD, 0.25)


def test_no_file_is_no_production(tmp_path):
    assert read_routing(tmp_path, "tire") is None


def test_a_new_champion_keeps_the_former_one_for_a_rollback_and_dismisses_the_challenger():
    first = promoted(None, "tire", FIRST)
    assert (first.champion, first.previous, first.revision) == (FIRST, None, 1)
    canary = RoutingTable("tire", FIRST, None, SECOND, share=0.1, revision=7)
    after = promoted(canary, "tire", SECOND)
    assert (after.champion, after.previous, after.challenger, after.share) == (SECOND, FIRST, None, 0.0)
    assert after.revision == 8


def test_promoting_the_champion_again_does_not_forget_the_previous_one():
    table = promoted(promoted(None, "tire", FIRST), "tire", SECOND)
    assert promoted(table, "tire", SECOND).previous == FIRST


def test_everything_named_must_stay_loaded_once_each():
    assert RoutingTable("tire", SECOND, FIRST, SECOND, share=0.5).routes == (SECOND, FIRST)


@pytest.mark.parametrize(
    ("share", "challenger", "message"),
    [(1.5, SECOND, "outside"), (-0.1, SECOND, "outside"), (0.2, None, "needs a challenger")],
)
def test_an_impossible_share_is_refused(share, challenger, message):
    with pytest.raises(ValueError, match=message):
        RoutingTable("tire", FIRST, None, challenger, share)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "7", '{"model": "tire"}'),
        json.dumps({"model": "tire", "champion": None, "previous": None, "challenger": None}),
        json.dumps({"model": "tire", "champion": {"network": "n"}, "previous": None, "challenger": None}),
        json.dumps(
            {"model": "tire", "champion": {"network": "n", "version": "x"}, "previous": None, "challenger": None}
        ),
    ],
)
def test_a_damaged_table_is_refused_with_the_remedy(tmp_path, text):
    write_routing(tmp_path, RoutingTable("tire", FIRST))
    routing_file(tmp_path, "tire").write_text(text)
    with pytest.raises(ValueError, match=r"tire.json is no routing table .*promote or rollback"):
        read_routing(tmp_path, "tire")


def test_a_table_under_the_name_of_another_model_is_refused(tmp_path):
    write_routing(tmp_path, RoutingTable("solar_cells", FIRST))
    routing_file(tmp_path, "solar_cells").rename(routing_file(tmp_path, "tire"))
    with pytest.raises(ValueError, match="routes 'solar_cells', not 'tire'"):
        read_routing(tmp_path, "tire")


def test_a_reader_never_sees_half_a_table(tmp_path):
    write_routing(tmp_path, RoutingTable("tire", FIRST, revision=0))
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(read_routing(tmp_path, "tire"))

    reader = threading.Thread(target=read)
    reader.start()
    for revision in range(1, 300):
        write_routing(tmp_path, RoutingTable("tire", SECOND if revision % 2 else FIRST, revision=revision))
    stop.set()
    reader.join()
    assert len(seen) > 100 and None not in seen
    revisions = [table.revision for table in seen]
    assert revisions == sorted(revisions)
    assert all((table.champion == SECOND) == (table.revision % 2 == 1) for table in seen)
    assert list(tmp_path.glob("routing/.*")) == []
