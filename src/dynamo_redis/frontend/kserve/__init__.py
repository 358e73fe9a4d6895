"""The KServe v2 inference protocol over gRPC: text in and out, beside the HTTP APIs."""

import os

# grpcio reads these when it is imported. Its own lines on stderr would say again what comes as exceptions.
# This process forks only to start other programs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
