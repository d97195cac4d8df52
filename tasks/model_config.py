"""ModelConfig -> the text of a Triton `config.pbtxt`. Pure; the workarounds it carries are explained where they stand."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from tasks.inference import INPUT, Accelerator

_PLANS: Final = re.compile(r"_trt_\d+$")


@dataclass(frozen=True)
class Tensor:
    """One input or output. dims without the batch dimension; -1 for any."""

    name: str
    data_type: Literal["TYPE_UINT8", "TYPE_FP32", "TYPE_INT64", "TYPE_STRING"]
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """What we say about a model to Triton. Times in microseconds.

    versions: the versions to load (`version_policy specific`); empty for the server's default, the newest one.
    instances: processes of a Python-based backend. Always written, because the default is two; never with a `kind`,
    because KIND_GPU fails on a server without one and an unspecified kind means "GPU if there is one".
    """

    name: str
    backend: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    max_batch_size: int = 8
    instances: int = 1
    versions: tuple[int, ...] = ()
    max_queue_delay: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)
    cpu_accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.instances < 1:
            raise ValueError(
                f"{self.name}: max_batch_size {self.max_batch_size} and instances {self.instances} start at 1"
            )
        if any(version < 1 for version in self.versions):
            raise ValueError(f"{self.name}: versions {self.versions} start at 1")


def network_config(
    network: str,
    image_size: int,
    versions: tuple[int, ...],
    accelerator: Accelerator,
    threads: int,
    max_batch_size: int = 8,
) -> ModelConfig:
    """The configuration of a network model `<model>_onnx_<size>`.

    Outputs are left out on purpose: the server completes them for each version (the C++ backend from the graph, ours in
    `auto_complete_config`), so versions with another number of classes or another embedding stand side by side.
    `specific` instead of `all`: one damaged version on disk must not keep the champion from loading, and what is kept
    for the record takes no memory. A policy edit reloads nothing that is loaded already.
    A model `<model>_trt_<size>` is one of TensorRT plans: its batch must lie in the profile of each, and threads mean nothing.
    """
    if _PLANS.search(network):
        return ModelConfig(
            name=network,
            backend="tensorrt",
            inputs=(Tensor(INPUT, "TYPE_UINT8", (image_size, image_size, 3)),),
            max_batch_size=max_batch_size,
            versions=tuple(sorted(versions)),
        )
    return ModelConfig(
        name=network,
        backend="onnxruntime",
        inputs=(Tensor(INPUT, "TYPE_UINT8", (image_size, image_size, 3)),),
        max_batch_size=max_batch_size,
        versions=tuple(sorted(versions)),
        parameters={"intra_op_thread_count": str(threads)},
        cpu_accelerator=accelerator if accelerator == "openvino" else None,
    )


def config_text(config: ModelConfig) -> str:
    """The `config.pbtxt` of the model, in protobuf text format."""
    blocks = [
        f"name: {_quoted(config.name)}",
        f"backend: {_quoted(config.backend)}",
        f"max_batch_size: {config.max_batch_size}",
        *(_tensor("input", tensor) for tensor in config.inputs),
        *(_tensor("output", tensor) for tensor in config.outputs),
        f"instance_group [ {{ count: {config.instances} }} ]",
        _batching(config),
    ]
    if config.versions:
        blocks.append(f"version_policy {{ specific {{ versions: {list(config.versions)} }} }}")
    blocks += [_parameter(key, value) for key, value in sorted(config.parameters.items())]
    if config.cpu_accelerator:
        name = _quoted(config.cpu_accelerator)
        blocks.append(
            f"optimization {{ execution_accelerators {{ cpu_execution_accelerator [ {{ name: {name} }} ] }} }}"
        )
    return "\n".join(blocks) + "\n"


def _tensor(kind: str, tensor: Tensor) -> str:
    dims = ", ".join(str(dim) for dim in tensor.dims)
    flags = (" optional: true" if tensor.optional else "") + (" allow_ragged_batch: true" if tensor.ragged else "")
    return f"{kind} [ {{ name: {_quoted(tensor.name)} data_type: {tensor.data_type} dims: [ {dims} ]{flags} }} ]"


def _batching(config: ModelConfig) -> str:
    """Without a queue policy, on purpose: any limit or time-out of the queue takes Triton's prefetching away, and then a
    request that arrives while the last batch is just being finished wakes nobody: 1 to 3 % of the requests waited for the
    batcher's own 500 ms (measured on 24.10; docs/decisions.md).
    """
    return f"dynamic_batching {{ max_queue_delay_microseconds: {config.max_queue_delay} }}"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)
