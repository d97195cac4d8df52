import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from tasks.limits import held, training_slot


def slots(name: str) -> int:
    with get_client(sync_client=True) as client:
        limits = client.request("POST", "/v2/concurrency_limits/filter", json={"limit": 50, "offset": 0}).json()
    return next(each["active_slots"] for each in limits if each["name"] == name)


def test_a_slot_is_held_while_the_work_is_done_and_given_back_when_it_fails(prefect_server):
    with get_client(sync_client=True) as client:
        wanted = GlobalConcurrencyLimitCreate(name="lathe", limit=1)
        client.request("POST", "/v2/concurrency_limits/", json=wanted.model_dump(mode="json", exclude_unset=True))
    with pytest.raises(ArithmeticError), held("lathe"):
        assert slots("lathe") == 1
        raise ArithmeticError
    assert slots("lathe") == 0


def test_a_missing_limit_is_named_with_how_to_make_it(prefect_server):
    done = []
    with pytest.raises(LookupError, match=r"'mill'.*`prefect global-concurrency-limit create mill"), held("mill"):
        done.append("worked without a slot")
    assert not done


def test_without_a_limit_no_server_is_asked(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with held(None):
        pass


def test_a_training_slot_is_one_of_the_named_limit(prefect_server):
    with pytest.raises(LookupError, match="create anvil --limit 1"), training_slot("anvil"):
        pass
