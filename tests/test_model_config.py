"""`config.pbtxt` as Triton's own protobuf reads it."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig as Parsed

from tasks.model_config import ModelConfig, Tensor, config_text, network_config
from tasks.model_repository import FRONT_DOOR_TEMPLATE, install_front_door


def parse(text: str) -> Parsed:
    return text_format.Parse(text, Parsed())


def test_triton_reads_what_was_meant():
    inputs = (Tensor("image", "TYPE_UINT8", (-1,), optional=True, ragged=True), Tensor("id", "TYPE_INT64", (1,)))
    outputs = (Tensor("label", "TYPE_STRING", (1,)), Tensor("p", "TYPE_FP32", (2, 3)))
    found = parse(
        config_text(
            ModelConfig(
                *("tire", "python", inputs, outputs),
                max_batch_size=16,
                instances=3,
                versions=(2, 11),
                max_queue_delay=250,
                parameters={"b": 'say "no"\n', "a": "1"},
                cpu_accelerator="openvino",
            )
        )
    )
    assert (found.name, found.backend, found.max_batch_size) == ("tire", "python", 16)
    image, number = found.input
    assert (image.name, list(image.dims), image.optional, image.allow_ragged_batch) == ("image", [-1], True, True)
    assert (number.name, list(number.dims), number.optional, number.allow_ragged_batch) == ("id", [1], False, False)
    assert [(o.name, Parsed.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[o.data_type].name, list(o.dims))
            for o in found.output] == [("label", "TYPE_STRING", [1]), ("p", "TYPE_FP32", [2, 3])]  # fmt: skip
    assert list(found.version_policy.specific.versions) == [2, 11]
    assert found.dynamic_batching.max_queue_delay_microseconds == 250
    assert found.HasField("dynamic_batching")
    assert not found.dynamic_batching.HasField("default_queue_policy")  # it would cost 1 to 3 % of the requests 500 ms
    assert {key: value.string_value for key, value in found.parameters.items()} == {"a": "1", "b": 'say "no"\n'}
    [accelerator] = found.optimization.execution_accelerators.cpu_execution_accelerator
    assert accelerator.name == "openvino"


def test_the_number_of_instances_is_always_said_and_their_kind_never():
    for text in (
        config_text(network_config("tire_onnx_32", 32, (1,), "openvino", 2)),
        config_text(ModelConfig("m", "python", ())),
    ):
        [group] = parse(text).instance_group
        assert group.count == 1
        assert group.kind == group.KIND_AUTO and "kind" not in text


def test_a_network_model_lists_its_versions_and_leaves_its_outputs_to_the_graph():
    found = parse(config_text(network_config("tire_onnx_224", 224, (9, 3), "onnxruntime", 2)))
    assert (found.name, found.backend) == ("tire_onnx_224", "onnxruntime")
    assert list(found.input[0].dims) == [224, 224, 3]
    assert not found.output
    assert list(found.version_policy.specific.versions) == [3, 9]
    assert found.parameters["intra_op_thread_count"].string_value == "2"
    assert not found.optimization.execution_accelerators.cpu_execution_accelerator


def test_without_versions_there_is_no_policy():
    assert not parse(config_text(ModelConfig("m", "python", ()))).HasField("version_policy")


@pytest.mark.parametrize("changes", [{"max_batch_size": 0}, {"instances": 0}, {"versions": (0, 1)}])
def test_numbers_that_triton_would_read_otherwise_are_refused(changes):
    with pytest.raises(ValueError, match="start at 1"):
        ModelConfig("m", "python", (), **changes)


def test_the_installed_front_door_is_a_valid_configuration_with_nothing_left_to_fill_in(tmp_path):
    text = (install_front_door(tmp_path, "tire") / "config.pbtxt").read_text()
    assert "${" not in text
    found = parse(text)
    assert (found.name, found.backend) == ("tire", "python")
    assert {tensor.name for tensor in found.output} == {"label", "probabilities", "score", "model_version", "lineage"}
    assert all(tensor.optional and tensor.allow_ragged_batch for tensor in found.input)
    assert found.instance_group[0].count >= 1
    assert found.HasField("dynamic_batching")
    assert not found.dynamic_batching.HasField("default_queue_policy")
    assert "${" in (FRONT_DOOR_TEMPLATE / "config.pbtxt").read_text()
