"""Access tokens of Google Cloud for Memorystore with IAM: `DYN_REDIS_CREDENTIALS=gcp_iam_login:token`.

The metadata server of a machine or pod gives a token of its service account, which lives up to an hour. No
package is needed. The role of the account is `roles/redis.dbConnectionUser`, or `roles/memorystore.dbConnectionUser`
for Memorystore for Valkey.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import time
from urllib.request import ProxyHandler, Request, build_opener

_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
_direct = build_opener(ProxyHandler({}))


def token() -> tuple[str, str, float]:
    """Return the user, an access token, and its end in seconds since 1970."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = Request(f"http://{host}{_PATH}", headers={"Metadata-Flavor": "Google"})
    with _direct.open(request, timeout=5.0) as answer:
        found = json.load(answer)
    return "default", found["access_token"], time.time() + found["expires_in"]
