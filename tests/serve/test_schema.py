"""Schemathesis on the served OpenAPI: whatever is sent, no 5xx, and every reply as the schema says it."""

import json

import pytest
from served import byte_tokenizer, tiny

import undertow as ut
from undertow.serve import api
from undertow.serve.engine import Limits

pytestmark = pytest.mark.slow
EXAMPLES = 40  # of every operation
LIMITS = Limits(max_tokens=8, max_queue=16, batch=4, max_watched=6)


def checked(key: str | None) -> dict[str, int]:
    """Every operation with generated requests, valid and invalid; how many replies had which status."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    wanted = [
        not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection,
        checks.unsupported_method,
    ]  # fmt: skip
    app = api.build(tiny(time=ut.T2MLR(1, 2)), byte_tokenizer(), LIMITS, "tiny", key=key)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    found: dict[str, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]:

            @seed(0)
            @settings(
                max_examples=EXAMPLES // 2,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def every(case):
                response = case.call(headers=headers)
                case.validate_response(response, checks=wanted, headers=headers)
                found[str(response.status_code)] = found.get(str(response.status_code), 0) + 1
                if response.status_code >= 400:
                    error = response.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"} and error["message"]
                elif "event-stream" in response.headers["content-type"][0]:
                    events = response.text.split("\n\n")
                    assert events[-2:] == ["data: [DONE]", ""]
                    assert not any("error" in json.loads(event[6:]) for event in events[:-2])

            every()
    app.state.engine.close()
    return found


def test_whatever_is_sent_is_answered_as_the_schema_says(capsys):
    found = checked(None)
    assert found["200"] >= 5 and found["400"] > 10, found
    assert set(found) <= {"200", "400", "404", "405", "413", "429"}
    with capsys.disabled():
        print("\nreplies by status:", found)


def test_with_a_key():
    assert checked("s3cret")["200"] >= 5
