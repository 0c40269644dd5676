"""tests.bench.outsider: its calls are valid, so that only the handshake refuses them."""

import random
from collections import Counter

from agent.service.bounds import check_request
from drover.agent.v1 import handshake_pb2 as pb
from tests.bench.outsider import Known, Outsider, is_for_destination
from tests.unit.asking import ID, REF

AGENTS = {"h1": "unix:/run/h1.sock", "h2": "unix:/run/h2.sock", "h3": "unix:/run/h3.sock"}
UUIDS = {"web1": "b356b8f5-3bac-5f6b-92ee-83c483fe25c8"}


def test_requests_are_valid_and_go_to_the_right_host_mostly() -> None:
    outsider = Outsider(random.Random(1), AGENTS, UUIDS)
    outsider.known[ID] = Known("web1", "h1", "h2")
    outsider.learn(pb.PrepareRequest(ref=REF), pb.PrepareResponse(cookie_out=b"c", uri_out="tcp://127.0.0.1:1"))
    methods: Counter[str] = Counter()
    right = 0
    for _ in range(1000):
        host, method, request = outsider.next()
        check_request(request)
        methods[method] += 1
        right += host == ("h2" if is_for_destination(method, request) else "h1")
    assert len(methods) == 13
    assert right > 750
    assert outsider.known[ID].cookies == [b"", b"c"]


def test_the_same_seed_makes_the_same_calls() -> None:
    first, second = (Outsider(random.Random(7), AGENTS, UUIDS) for _ in range(2))
    first.known[ID] = second.known[ID] = Known("web1", "h1", "h2")

    def calls(outsider: Outsider) -> list[str]:
        made = []
        for _ in range(50):
            host, method, request = outsider.next()
            request.ClearField("statement") if "statement" in request.DESCRIPTOR.fields_by_name else None  # has the time
            made.append(f"{host} {method} {request}")
        return made

    assert calls(first) == calls(second)
