"""The OpenAPI document of the HTTP API, which `/openapi.json` serves."""
