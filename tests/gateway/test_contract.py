"""The OpenAPI document: no request that it allows, and none that it forbids, gets an answer that it does not name."""

from __future__ import annotations

import itertools
import warnings

from hypothesis import HealthCheck, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own dependencies'
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

from ltx2_pool.gateway import app

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_document_has_every_route_and_no_other():
    routes = {(route.path, method) for route in app.ROUTES for method in (route.methods or set()) - {"HEAD"}}
    documented = {
        (path, method.upper())
        for path, item in app.document()["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert routes - documented == {("/openapi.json", "GET"), *((f"/{name}", "GET") for name in app.PAGE)}
    assert documented <= routes


schema = schemathesis.openapi.from_dict(app.document())
numbers = itertools.count()


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_documented(case, gateway):
    if "id" in (case.path_parameters or {}) and next(numbers) % 2:
        listed = gateway.client.get("/v1/videos", params={"limit": 1}).json()["data"]
        case.path_parameters["id"] = listed[0]["id"] if listed else gateway.create()
    case.call_and_validate(base_url=gateway.url, checks=CHECKS, timeout=30)
