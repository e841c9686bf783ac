"""ONNX files: written by torch's exporter, checked, and run by onnxruntime and OpenVINO."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from swinv2_mm import compat
from swinv2_mm.messages import first_line

from .onnx_models import Exported

TOLERANCE = 1e-4  # of what `Exported.difference` gives
LIBRARIES = ('onnx', 'onnxruntime', 'onnxscript')
Runtime = Callable[[Tensor], 'list[Tensor]']


class VerificationError(Exception):
    """The exported file does not do what the model does. The message is one line."""


def export(model: Exported, image: Tensor, names: Sequence[str], dynamic: dict[int, object], opset: int):
    """The ONNX model of what takes an image, with a name for each output.

    The exporter is the one on `torch.export`, in which sizes may be expressions of the input's. The tracing exporter
    would write them into the file as constants, and the file would be wrong for any other batch.

    Args:
        image (Tensor): an example.
        dynamic (dict): the `torch.export.Dim` of each axis of the image that is open.

    Raises:
        ValueError: torch can't export it.
    """
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        with warnings.catch_warnings(), compat.open_sizes() if len(dynamic) > 1 else nullcontext():
            warnings.simplefilter('ignore')  # about code of torch itself
            program = torch.onnx.export(
                model,
                (image,),
                input_names=['image'],
                output_names=names,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=(dynamic,) if dynamic else None,
                custom_translation_table=model.translations(),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(f'torch {torch.__version__} does not export {model}: {reason}') from error
    onnx_model = program.model_proto
    graph = onnx_model.graph
    for node in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        node.ClearField('metadata_props')  # stack traces
    return onnx_model


def check_standard(model) -> None:
    """Check that an ONNX model is valid, and that any runtime has its operators.

    Raises:
        VerificationError: it is not, or needs custom operators.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f'what was exported is not valid: {first_line(error)}') from error
    custom = {opset.domain for opset in model.opset_import} - {'', 'ai.onnx'}
    if custom:
        raise VerificationError(
            f'what was exported needs operators beyond the standard, of {", ".join(sorted(custom))}'
        )


def operators(model) -> str:
    """The operators of an ONNX model, with how many there are of each."""
    counts = Counter(node.op_type for node in model.graph.node)
    return ', '.join(f'{name} {count}' for name, count in sorted(counts.items()))


def runtimes() -> dict[str, Callable[[Path], Runtime]]:
    """What can run a file here: by name, a function that loads a file and gives a function of an image."""
    loaders = {'onnxruntime': load_onnxruntime, 'OpenVINO': load_openvino}
    return {name: load for name, load in loaders.items() if importlib.util.find_spec(name.lower())}


def load_onnxruntime(path: Path) -> Runtime:
    """Load a file with onnxruntime, on CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})]


def load_openvino(path: Path) -> Runtime:
    """Load a file with OpenVINO, on CPU, in float32 and with as many threads as torch has."""
    import openvino

    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    model = openvino.Core().compile_model(path, 'CPU', settings)
    request = model.create_infer_request()
    return lambda image: [torch.from_numpy(out.copy()) for out in request.infer([image.numpy()]).values()]


def compare(path: Path, model: Exported, images: Sequence[Tensor], expected: Sequence[Sequence[Tensor]]) -> None:
    """Run a file with each runtime that there is, and compare its outputs with those of PyTorch.

    Args:
        path (Path): the file.
        model (Exported): what the file is of.
        images (Sequence[Tensor]): the images.
        expected (Sequence[Sequence[Tensor]]): what `Exported.expected` gives for each.

    Raises:
        VerificationError: one differs by more than `TOLERANCE`, or the file does not run.
    """
    for name, load in runtimes().items():
        worst = 0.0
        try:
            run = load(path)
            all_outs = [run(image) for image in images]
        except Exception as error:  # each runtime has classes of its own for each reason
            raise VerificationError(f'{name} does not run what was exported: {first_line(error)}') from error
        for image, outs, values in zip(images, all_outs, expected):
            found = model.difference(outs, values)
            if not found <= TOLERANCE:
                raise VerificationError(
                    f'for an image of {shape(image)} {name} and PyTorch differ by {found:.1e}, '
                    f'more than {TOLERANCE:.0e}: nothing is written'
                )
            worst = max(worst, found)
        print(f'{name} and PyTorch differ by {worst:.1e} at most, for {", ".join(map(shape, images))}', flush=True)
    if 'OpenVINO' not in runtimes():
        print('not compared with OpenVINO, which is not installed: pip install openvino')


def shape(image: Tensor) -> str:
    """The shape of an image, to read."""
    return ' x '.join(map(str, image.shape))


def measure(path: Path, model: Exported, image: Tensor, repeats: int) -> dict[str, float]:
    """The median seconds of PyTorch and of each runtime, which take turns."""
    runs = {'PyTorch': model.predict, **{name: load(path) for name, load in runtimes().items()}}
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first is not counted
        for name, run in runs.items():
            start = time.perf_counter()
            run(image)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
