"""The calls about the server and its models, which need no worker."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

from dynamo_redis.frontend.health import health
from dynamo_redis.frontend.http.errors import ApiError, model_not_found
from dynamo_redis.frontend.kserve import inference_pb2 as pb
from dynamo_redis.frontend.kserve.requests import VERSION
from dynamo_redis.frontend.models import LiveModels
from dynamo_redis.store.base import Registry

PLATFORM: Final = "dynamo"


class Metadata:
    """Answers from the live set of models. Errors are those of the API."""

    def __init__(self, models: LiveModels, registry: Registry) -> None:
        self._models = models
        self._registry = registry

    def server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Return that the server lives."""
        return pb.ServerLiveResponse(live=True)

    def is_ready(self) -> bool:
        """Return whether a model can be served, as `/health` tells it."""
        return health(self._models.served(), self._registry)[0] == 200

    def server(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Describe the server."""
        return pb.ServerMetadataResponse(
            name="dynamo-redis", version=version("dynamo-redis"), extensions=["model_configuration"]
        )

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Return whether requests to a model reach a worker. An unknown model is not ready."""
        try:
            name = self._completing(request.name, request.version)
        except ApiError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=bool(self._models.named(name).instances()))

    def model(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Describe the tensors of a model. Raises ApiError."""
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self._completing(request.name, request.version),
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[
                tensor(name="text_input", datatype="BYTES", shape=[1]),
                tensor(name="streaming", datatype="BOOL", shape=[1]),
            ],
            outputs=[
                tensor(name="text_output", datatype="BYTES", shape=[-1]),
                tensor(name="finish_reason", datatype="BYTES", shape=[-1]),
            ],
        )

    def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Describe a model as Triton's clients ask for it. Raises ApiError."""
        config = pb.ModelConfig(
            name=self._completing(request.name, request.version),
            platform=PLATFORM,
            backend=PLATFORM,
            input=[
                pb.ModelInput(name="text_input", data_type=pb.TYPE_STRING, dims=[1]),
                pb.ModelInput(name="streaming", data_type=pb.TYPE_BOOL, dims=[1], optional=True),
            ],
            output=[
                pb.ModelOutput(name="text_output", data_type=pb.TYPE_STRING, dims=[-1]),
                pb.ModelOutput(name="finish_reason", data_type=pb.TYPE_STRING, dims=[-1]),
            ],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    def _completing(self, name: str, wanted_version: str) -> str:
        """Return the name of a model that completes text. Raises ApiError."""
        if wanted_version not in ("", VERSION):
            raise ApiError(404, f"Models have version {VERSION!r}.", code="model_not_found")
        model = self._models.named(name)
        if not any(version.loaded and version.loaded.completes_text for version in model.loaded()):
            raise model_not_found(name)
        return model.name
