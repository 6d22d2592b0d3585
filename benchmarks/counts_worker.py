"""FLOP and bytes of the backbone passes of one training step, counted in one source tree, for benchmarks/counts.py.

    cd TREE; PYTHONPATH=TREE python -P .../counts_worker.py '{"backbone": "r2plus1d_10", "B": 128, ...}'

It imports the code of TREE, an older commit or today's, and prints the counts as JSON on the last line. Tensors are
torch's FakeTensors, which have shapes and no memory, so no GPU is needed.

Two counts of bytes:
    eager       a hook on every aten operation: the bytes of its arguments and its results. Each is read or written once
    compiled    the kernels that torch.compile plans for an H200: the bytes that each kernel reads and writes. The
                backbone is compiled as `compile_backbone` compiles it, up to the plan of kernels. No code is generated

A part is the stem or a stage, found by data flow: an operation belongs to the last part whose weights or activations
it uses. A kind is a convolution, a copy (the kernel only copies data) or the rest, batch normalisation with ReLU.
"""

import importlib
import json
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
from torch import Tensor
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, FusedSchedulerNode, NopKernelSchedulerNode
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

PARTS = ("stem", "layer1", "layer2", "layer3", "layer4")
aten = torch.ops.aten

COPIES = {"clone", "copy", "copy_", "_to_copy", "cat", "contiguous", "pixel_unshuffle", "constant_pad_nd", "fill_"}
MOVES = {"permute", "view", "clone", "transpose", "getitem", "cat", "slice", "expand", "unsqueeze", "squeeze", "select"}
MOVES |= {"convolution", "convolution_backward", "_unsafe_view", "constant_pad_nd", "as_strided", "alias", "full"}
"""Operations that compute nothing in a kernel. Inductor also names the convolution that a kernel prepares data for."""


def part_of(name: str) -> int | None:
    """Return the number of the part that a parameter's name belongs to."""
    found = re.search("|".join(PARTS), name)
    return PARTS.index(found[0]) if found else None


def combine(inputs: Sequence[tuple[int | None, bool]]) -> tuple[int | None, bool]:
    """Return the label of a result: the number of its part, and whether it is a gradient.

    inputs: the labels of the arguments. A gradient belongs to the part of the activations that it is computed with.
    """
    gradient = any(is_gradient for _, is_gradient in inputs)
    values = [part for part, is_gradient in inputs if part is not None and not is_gradient]
    if values or not gradient:
        return max(values, default=None), gradient
    return min((part for part, _ in inputs if part is not None), default=None), gradient


# ----------------------------------------------------------------------------------------------------------- the passes


def make_views(cell: dict[str, Any], fake: Callable[[Tensor], Tensor]) -> Any:
    """Return the three views of a clip. The static view is one frame, expanded, where the tree expects that."""
    from dclr.kernels import Views

    B, T, side = cell["B"], cell["T"], cell["side"]

    def view(frames: int) -> Tensor:
        shape = (B, 3, frames, side, side)
        made = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last_3d)
        return fake(made)

    static = view(1).expand(-1, -1, T, -1, -1) if cell["static_once"] else view(T)
    return Views(view(T), static, view(T))


def make_backbone(cell: dict[str, Any], fake: Callable[[Tensor], Tensor]) -> Any:
    """Return the backbone with fake parameters, in training mode, padded as a run pads it."""
    from dclr.config import RunConfig
    from dclr.models import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(cell["backbone"], cell["width"])
    backbone.pad_channels(RunConfig().pad_channels)
    for module in backbone.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(fake(value.data)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(buffer))
    return backbone.train()


PASSES = {
    "query encoder": ("vsd", True),
    "key encoder, query clip": ("sd", False),
    "key encoder, key clip": ("vsd", False),
}
"""The passes of a backbone in a step: letters of the views, and whether a backward pass follows."""


# ------------------------------------------------------------------------------------------------------------- the hook


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor. An expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()


class Hook(TorchDispatchMode):
    """Counts FLOP and bytes of every aten operation by part and kind.

    Attributes:
        flops, bytes: by (part, kind), kind being "convolution", "copy" or "normalisation".
        largest: most elements of a tensor that an operation made.
        convolutions: of each convolution of the forward pass its part, and the shapes of input, weight and output.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.largest = 0
        self.convolutions: list[tuple[str, list[int], list[int], list[int]]] = []
        self.labels: dict[int, tuple[int | None, bool]] = {}
        for name, value in backbone.named_parameters():
            self.set_label(value, (part_of(name), False))

    def set_label(self, tensor: Tensor, label: tuple[int | None, bool]) -> None:
        self.labels[tensor.untyped_storage()._cdata] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {id(t): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}.values()
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        label = combine([self.labels.get(t.untyped_storage()._cdata, (None, False)) for t in given])
        for tensor in made:
            if func.is_view and given:
                continue  # shares its storage, and so the label, with an argument
            self.set_label(tensor, label)
        if func.is_view or not made:
            return out
        name = func.overloadpacket.__name__
        kind = "convolution" if name.startswith("convolution") else "copy" if name in COPIES else "normalisation"
        key = PARTS[label[0] or 0], kind
        size = sum(map(nbytes, given)) + sum(map(nbytes, made))
        if name == "convolution_backward" and args[-1][0] and args[-1][1]:
            size += nbytes(args[0])  # two kernels read the output's gradient
        self.bytes[key] += size
        if func.overloadpacket in flop_registry:
            self.flops[key] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        self.largest = max(self.largest, *(t.numel() for t in made))
        if name == "convolution":
            given_shape, weight_shape, made_shape = (list(t.shape) for t in (args[0], args[1], out))
            self.convolutions.append((key[0], given_shape, weight_shape, made_shape))
        return out


def find_run_backbone() -> Any:
    """Return `run_backbone` of the tree that is counted. The older commit has it in another module."""
    # To try an import is not enough: in a tree without the module, it would find that of an installed dclr.
    name = "dclr.methods.encoder" if Path("dclr/methods").is_dir() else "dclr.method"
    return importlib.import_module(name).run_backbone


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let the stem convolve blocks inside the context, as on a GPU. Backbones of older commits cannot."""
    from dclr.models import video_resnet

    if not hasattr(video_resnet, "_as_blocks"):
        yield
        return
    from dclr.kernels.space_to_depth import space_to_depth

    with mock.patch.object(video_resnet, "_as_blocks", lambda x: space_to_depth(x) if x.shape[1] == 3 else x):
        yield


@as_on_a_gpu()
def count_eager(cell: dict[str, Any], letters: str, backward: bool) -> dict[str, Any]:
    """Return the counts of a pass without torch.compile."""
    run_backbone = find_run_backbone()
    mode = FakeTensorMode()

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor, torch.device("cpu"))

    backbone, views = make_backbone(cell, fake), make_views(cell, fake)
    encoder: Any = types.SimpleNamespace(backbone=backbone)
    with mode, Hook(backbone) as hook:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(backward):
            maps = list(run_backbone(encoder, views, letters).values())
        if backward:
            gradients = [torch.empty_like(each) for each in maps]
            for gradient in gradients:
                hook.set_label(gradient, (len(PARTS) - 1, True))
            torch.autograd.backward(maps, gradients)
    return {
        "flops": named(hook.flops),
        "bytes": named(hook.bytes),
        "largest": hook.largest,
        "convolutions": hook.convolutions,
    }


def named(counts: dict[tuple[str, str], int]) -> dict[str, int]:
    return {", ".join(key): value for key, value in sorted(counts.items())}


# -------------------------------------------------------------------------------------------------------- torch.compile


RNG_STATE = torch.zeros(16, dtype=torch.uint8)


class Counted(Exception):
    """All graphs of a pass are counted, so compiling ends here."""


class H200:
    """The properties of a GPU that torch.compile asks for."""

    name, major, minor, multi_processor_count, total_memory = "NVIDIA H200", 9, 0, 132, 139 * 2**30
    L2_cache_size, warp_size, regs_per_multiprocessor = 60 * 2**20, 32, 65536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448
    gcnArchName, type, index, cc = "", "cuda", 0, 90


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let torch.compile find an H200 inside the context. Nothing may run on it."""
    none, zero, props = (lambda value: lambda *a, **k: value)(None), (lambda *a, **k: 0), (lambda *a, **k: H200())
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda._lazy_init": none,
        "torch.cuda.get_rng_state": lambda *a, **k: RNG_STATE,
        "torch.cuda.set_rng_state": none,
        "torch.cuda.get_device_properties": props,
        "torch.cuda.get_device_capability": lambda *a, **k: (9, 0),
        "torch.cuda.is_bf16_supported": lambda *a, **k: True,
        "torch.cuda.current_device": zero,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.set_device": none,
        "torch.cuda.synchronize": none,
        "torch.cuda._exchange_device": zero,
        "torch.cuda._maybe_exchange_device": zero,
        "torch._inductor.scheduler.has_triton": lambda *a, **k: True,
        "torch.utils._triton.has_triton": lambda *a, **k: True,
    }
    # cuDNN, if asked, keeps the memory format of the input. Without a GPU, torch would choose the default format.
    answers["torch._C._conv_determine_backend_memory_format"] = lambda x, *a, **k: (
        torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    )
    names = ("_accelerator_getDeviceIndex", "_accelerator_maybeExchangeDevice", "_accelerator_exchangeDevice")
    answers |= {f"torch._C.{name}": zero for name in names}
    answers |= {"torch._C._accelerator_getStream": none, "torch._C._accelerator_setDeviceIndex": none}
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        for name, answer in {
            "torch.cuda._get_device_properties": props,
            "torch._C._cuda_getCurrentRawStream": zero,
        }.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        yield


def kernel_bytes(node: Any, graph: GraphLowering) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that a planned kernel reads and writes, by buffer. Each element of a buffer counts once.

    torch's own `get_read_write_buffer_accesses` stops at 10^9 elements in fused kernels.
    """
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return {}, {}

    def whole(name: str) -> int:
        buffer = graph.name_to_buffer.get(name) or graph.graph_inputs.get(name)
        if buffer is None or not isinstance(buffer, ir.IRNode):
            return 0
        layout = getattr(buffer, "layout", None)
        if isinstance(layout, ir.MultiOutputLayout):
            users: Any = graph.scheduler.name_to_buf[name].users
            outputs = [
                o.get_name()
                for user in users
                if isinstance(user.node.node, ir.MultiOutput)
                for o in user.node.get_outputs()
            ]
            return sum(map(whole, outputs))
        if isinstance(layout, ir.NoneLayout):
            return 0
        return graph.sizevars.optimization_hint(ir.sympy_product(buffer.get_size())) * buffer.get_dtype().itemsize

    def touched(deps: Any) -> dict[str, int]:
        sizes: dict[str, int] = defaultdict(int)
        for dep in deps:
            sizes[dep.name] += graph.get_dep_size_hint(dep) or whole(dep.name)
        return {name: min(size, whole(name)) for name, size in sizes.items()}

    reads, writes = touched(node.read_writes.reads), touched(node.read_writes.writes)
    if isinstance(node, ExternKernelSchedulerNode):
        reads, writes = {name: whole(name) for name in reads}, {name: whole(name) for name in writes}
        if str(getattr(node.node, "op_overload", "")).startswith("aten.convolution_backward"):
            gradient = node.node.inputs[0].get_name()
            reads[gradient] *= 2  # one kernel for the input's gradient and one for the weight's
    inside = set(node.snodes) if isinstance(node, FusedSchedulerNode) else {node}
    for name in list(writes):
        reads.pop(name, None)  # in registers
        if all(user.node in inside for user in graph.scheduler.name_to_buf[name].users):
            writes.pop(name)
    return reads, writes


def graph_labels(graph: GraphLowering, inputs: Sequence[str], forward: dict[str, int | None]) -> dict[str, Any]:
    """Return the label of every node of a graph by its name: see `combine`.

    inputs: names of the forward graph's inputs. forward: parts of the forward graph's nodes, for the backward graph.
    """
    labels: dict[str, tuple[int | None, bool]] = {}
    module: Any = graph.module
    for node in module.graph.nodes:
        if node.op == "placeholder":
            number = re.fullmatch(r"(?:primals_|arg)(\d+)(?:_1)?", node.name)
            if number:
                labels[node.name] = part_of(inputs[int(number[1]) - node.name.startswith("primals")]), False
            elif node.name.startswith("tangents"):
                labels[node.name] = len(PARTS) - 1, True
            else:
                labels[node.name] = forward.get(node.name), False
        else:
            labels[node.name] = combine([labels[each.name] for each in node.all_input_nodes])
    return labels


class Compiler:
    """Replaces the code generation of torch.compile, and counts the planned kernels.

    Attributes:
        kernels: one for each planned kernel: its graph, part, kind, and bytes read and written by buffer.
        largest: most elements of a buffer.
    """

    def __init__(self, backward: bool) -> None:
        self.backward = backward
        self.kernels: list[dict[str, Any]] = []
        self.largest = 0
        self.inputs: list[str] = []
        self.labels: dict[str, int | None] = {}

    def plan(self, graph: GraphLowering) -> Any:
        """Plan the kernels of a graph and count them. Called where torch would generate code."""
        graph._update_scheduler()
        labels = graph_labels(graph, self.inputs, self.labels)
        if not graph.is_backward:
            self.labels = {name: part for name, (part, _) in labels.items()}
        for node in graph.scheduler.nodes:
            reads, writes = kernel_bytes(node, graph)
            if not reads and not writes:
                continue
            origins = {o for each in node.get_nodes() if each.node is not None for o in each.node.get_origins()}
            parts = [labels[o.name][0] for o in origins if labels.get(o.name, (None,))[0] is not None]
            part = (min if graph.is_backward else max)(parts, default=0)
            self.kernels.append({
                "graph": "backward" if graph.is_backward else "forward",
                "part": PARTS[part],
                "kind": kernel_kind(node, origins),
                "operations": sorted(o.name for o in origins),
                "reads": reads,
                "writes": writes,
            })  # fmt: skip
        for buffer in graph.name_to_buffer.values():
            if getattr(buffer, "layout", None) is not None and hasattr(buffer.layout, "size"):
                self.largest = max(self.largest, graph.sizevars.optimization_hint(ir.sympy_product(buffer.get_size())))
        if graph.is_backward or not self.backward:
            raise Counted
        return types.SimpleNamespace(call=lambda arguments: None, runner=None, __file__="")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let torch.compile call `plan` inside the context instead of generating code, with tensors of a GPU."""
        codegen, compile_all = compile_fx.fx_codegen_and_compile, compile_fx.compile_fx

        def on_gpu(tensor: Any) -> Any:
            if not isinstance(tensor, FakeTensor):
                return tensor
            with _disable_current_modes():
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                return FakeTensor(tensor.fake_mode, made, torch.device("cuda", 0))

        def generate(gm: Any, inputs: Any, *arguments: Any, **settings: Any) -> Any:
            for node in gm.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
                node.meta |= {key: tree_map(on_gpu, node.meta[key]) for key in ("val",) if key in node.meta}
            with pretended_gpu():
                return codegen(gm, [on_gpu(each) for each in inputs], *arguments, **settings)

        def plan(graph: GraphLowering) -> Any:
            return self.plan(graph)

        def compile_recorded(gm: Any, inputs: Any, **settings: Any) -> Any:
            self.inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
            return compile_all(gm, inputs, **settings)

        with (
            mock.patch.object(GraphLowering, "compile_to_module", plan),
            mock.patch.object(compile_fx, "fx_codegen_and_compile", generate),
            mock.patch.object(compile_fx, "compile_fx", compile_recorded),
            mock.patch.object(fake_tensor, "init_gpu_context", return_value=None),
            torch._inductor.config.patch(force_disable_caches=True),
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        ):
            yield


def kernel_kind(node: Any, origins: Any) -> str:
    names = {getattr(o.target, "overloadpacket", o.target) for o in origins if o.op == "call_function"}
    names = {getattr(name, "__name__", str(name)) for name in names}
    if isinstance(node, ExternKernelSchedulerNode):
        return "convolution" if any(name.startswith("convolution") for name in names) else "normalisation"
    return "copy" if names <= MOVES else "normalisation"


def count_compiled(function: Callable[[], Any], backward: bool) -> dict[str, Any]:
    """Compile a function of fake tensors by calling it once. Return the counts and the kernels."""
    torch.compiler.reset()
    compiler = Compiler(backward)
    with compiler.installed():
        try:
            function()
        except Exception as error:
            if not is_counted(error):
                raise
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for kernel in compiler.kernels:
        size = sum(kernel["reads"].values()) + sum(kernel["writes"].values())
        sums[kernel["part"], kernel["kind"]] += size
    return {"bytes": named(sums), "largest": compiler.largest, "kernels": compiler.kernels}


def is_counted(error: BaseException | None) -> bool:
    return error is not None and ("Counted" in str(error) or is_counted(error.__cause__))


@as_on_a_gpu()
def count_pass(cell: dict[str, Any], letters: str, backward: bool) -> dict[str, Any]:
    """Return the counts of a pass with torch.compile, and its kernels."""
    run_backbone = find_run_backbone()
    from dclr.training.compile import compile_backbone

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor, torch.device("cpu"))

    backbone, views = make_backbone(cell, fake), make_views(cell, fake)
    encoder: Any = types.SimpleNamespace(backbone=backbone)
    compile_backbone(backbone)

    def call() -> None:
        with mode, torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(backward):
            run_backbone(encoder, views, letters)

    return count_compiled(call, backward)


def main() -> None:
    cell = json.loads(sys.argv[1])
    found = {}
    for name, (letters, backward) in PASSES.items():
        compiled = count_pass(cell, letters, backward)
        del compiled["kernels"]
        found[name] = {"eager": count_eager(cell, letters, backward), "compiled": compiled}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
