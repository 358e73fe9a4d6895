"""Tokens of AWS IAM for ElastiCache and MemoryDB: `DYN_REDIS_CREDENTIALS=aws_iam_login:token`.

A token is a presigned request of Signature Version 4 that lives 15 minutes. The service takes it as a
password, and ends each connection 12 hours after its last AUTH. Needs `pip install botocore`, and TLS (`rediss://`).

    REDIS_IAM_USER      the id of the user, which is its name, too
    REDIS_IAM_CACHE     the id of the replication group, the serverless cache, or the MemoryDB cluster
    REDIS_IAM_SERVICE   elasticache (default) or memorydb
    REDIS_IAM_SERVERLESS=1   for a serverless cache
"""

from __future__ import annotations

import os
import time
from urllib.parse import urlencode

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.session import Session

LIVES_S = 900
_session = Session()


def token() -> tuple[str, str, float]:
    """Return the user, a new token, and its end in seconds since 1970."""
    service = os.environ.get("REDIS_IAM_SERVICE", "elasticache")
    user = os.environ["REDIS_IAM_USER"]
    query = {"Action": "connect", "User": user}
    if os.environ.get("REDIS_IAM_SERVERLESS"):
        query["ResourceType"] = "ServerlessCache"
    credentials, region = _session.get_credentials(), _session.get_config_variable("region")
    if credentials is None or region is None:
        raise LookupError("botocore finds no credentials or no region (AWS_REGION)")
    request = AWSRequest("GET", f"http://{os.environ['REDIS_IAM_CACHE']}/?{urlencode(query)}")
    begin = time.time()
    SigV4QueryAuth(credentials.get_frozen_credentials(), service, region, expires=LIVES_S).add_auth(request)
    return user, request.url.removeprefix("http://"), begin + LIVES_S
